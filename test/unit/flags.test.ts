import { expect, test } from "bun:test";
import { parseFlags, USAGE } from "../../maxgroup.ts";
import { fixture } from "./fixtures/index.ts";

const on = ["-r", "us-east-2", "-b", "bucket"];
const both = { r: "us-east-2", b: "bucket", t: false, v: false };

test("the usage text is the manual's, byte for byte", () => {
  expect(USAGE).toBe(fixture("usage.txt"));
});

test.each([
  ["-r X", ["-r", "us-east-2", "-b", "bucket"]],
  ["-r=X", ["-r=us-east-2", "-b=bucket"]],
  ["--r X", ["--r", "us-east-2", "--b", "bucket"]],
  ["--r=X", ["--r=us-east-2", "--b=bucket"]],
  ["in any order, the last one wins", ["-b", "bucket", "-r", "eu-west-1", "-r", "us-east-2"]],
])("a flag may be spelled as Go spells it: %s", (_, args) => {
  expect(parseFlags(args)).toEqual(both);
});

test("a value may begin with a hyphen or hold an equals sign", () => {
  expect(parseFlags([...on, "-K", "-odd", "-l=a=b"])).toEqual({ ...both, K: "-odd", l: "a=b" });
});

test("every flag of the manual is read", () => {
  expect(parseFlags([...on, "-K", "kube", "-k", "AKIA", "-l", "log", "-p", "secret", "-t"])).toEqual({
    ...both,
    K: "kube",
    k: "AKIA",
    l: "log",
    p: "secret",
    t: true,
  });
});

test.each([
  ["-t", true],
  ["-t=true", true],
  ["-t=1", true],
  ["-t=T", true],
  ["--t=TRUE", true],
  ["-t=false", false],
  ["-t=0", false],
  ["-t=F", false],
])("a boolean flag takes a value only behind an equals sign: %s", (flag, t) => {
  expect(parseFlags([flag, ...on])).toEqual({ ...both, t });
});

test.each([
  ["nothing", []],
  ["a bucket only", ["-b", "bucket"]],
  ["an empty region", ["-r", "", "-b", "bucket"]],
  ["an empty region behind an equals sign", ["-r=", "-b", "bucket"]],
  ["local test mode only", ["-t"]],
])("the region is asked for first: %s", (_, args) => {
  expect(parseFlags(args)).toBe("region is required.");
});

test("then the bucket, but not in local test mode", () => {
  expect(parseFlags(["-r", "us-east-2"])).toBe("S3 bucket is required.");
  expect(parseFlags(["-r", "us-east-2", "-b="])).toBe("S3 bucket is required.");
  expect(parseFlags(["-r", "us-east-2", "-t"])).toEqual({ r: "us-east-2", t: true, v: false });
});

test("the version is printed without a region", () => {
  expect(parseFlags(["-v"])).toEqual({ t: false, v: true });
});

test.each([
  [["-x"], "flag provided but not defined: -x"],
  [["-v", "--region", "x"], "flag provided but not defined: -region"],
  [["-v", "-x=1"], "flag provided but not defined: -x"],
  [["-r"], "flag needs an argument: -r"],
  [["-v", "-t=maybe"], /^invalid boolean value "maybe" for -t/],
])("what cannot be read is named in Go's words, before anything that is missing: %j", (args, message) => {
  const said = parseFlags(args);
  expect(typeof said).toBe("string");
  expect(String(said)).toMatch(message);
});

test.each([[["us-east-2"]], [["-r", "us-east-2", "bucket"]], [["-"]], [["---r", "x"]], [["-=x"]]])(
  "an argument that is no flag is refused and not passed over: %j",
  (args) => {
    expect(parseFlags(args)).toBeString();
  },
);

test("an access key and its secret go together", () => {
  expect(parseFlags([...on, "-k", "AKIA"])).toBeString();
  expect(parseFlags([...on, "-p", "secret"])).toBeString();
});

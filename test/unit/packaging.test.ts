import { describe, expect, test } from "bun:test";
import { generateKeyPairSync, verify } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { rawPublicKey, signLicense } from "../license.ts";
import { faultOf, readCounts, readFailures } from "../run.ts";

const root = join(import.meta.dir, "../..");
const read = (path: string) => readFileSync(join(root, path), "utf8");

test("the sample configuration has the manual's keys and values", () => {
  const queue = (name: string) => ({
    queue_url: `https://sqs.YOUR-REGION.amazonaws.com/YOUR-AWS-ACCOUT/${name}`,
    visibility_timeout_seconds: 61,
    max_number_of_messages: 5,
    wait_time_seconds: 1,
  });
  expect(JSON.parse(read("conf/service_config.json"))).toEqual({
    system: {},
    global: {
      interruption_evt_sqs: { ...queue("spot-interruption-notice"), preaction_snapshot_interval_minutes: 20 },
      detach_evt_sqs: queue("dettach-event"),
      termination_evt_sqs: queue("preact-termination"),
      preaction_snapshot_interval_minutes: 0,
    },
    groups: {
      "YOUR-ASG-NAME": {
        detaching_delay_seconds: 20,
        max_num_of_terminated_one_time: 2,
        preaction_termination_delay_seconds: 10,
        preaction_detach_delay_seconds: 5,
        is_enable_preaction: false,
      },
    },
  });
});

test("the log configuration says debug, as the manual's output shows it", () => {
  expect(read("conf/seelog.xml")).toMatch(/<seelog[^>]*\sminlevel="debug"/);
});

describe("the systemd unit", () => {
  const settings = read("conf/max_group.service")
    .split("\n")
    .filter((line) => /^\w+=/.test(line));

  test("restarts for ever", () => {
    expect(settings).toContain("Restart=always");
    expect(settings).toContain("StartLimitIntervalSec=0");
  });

  test("lets the JavaScript engine compile", () => {
    expect(settings.filter((line) => line.startsWith("MemoryDenyWriteExecute="))).toEqual([]);
  });
});

describe("a license", () => {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");

  test("is its Key:Value lines and a signature over them, sorted", () => {
    const license = signLicense(["Expires:2027-12-31", " Customer:ACME ", "", "License:old"], privateKey);
    const lines = license.trimEnd().split("\n");
    expect(lines.slice(0, 2)).toEqual(["Expires:2027-12-31", "Customer:ACME"]);
    const signature = Buffer.from((lines[2] ?? "").replace("License:", ""), "base64");
    expect(verify(null, Buffer.from("Customer:ACME\nExpires:2027-12-31"), publicKey, signature)).toBe(true);
    expect(verify(null, Buffer.from("Customer:ACME\nExpires:2028-12-31"), publicKey, signature)).toBe(false);
  });

  test("is refused where a line is no Key:Value, a key comes twice, or nothing is said", () => {
    expect(() => signLicense(["Customer"], privateKey)).toThrow('not a Key:Value line: "Customer"');
    expect(() => signLicense(["Customer:"], privateKey)).toThrow("not a Key:Value line");
    expect(() => signLicense(["A:1", "A:2"], privateKey)).toThrow("twice in the license: A");
    expect(() => signLicense(["", "License:x"], privateKey)).toThrow("without a single Key:Value line");
  });

  test("is checked against the 32 raw bytes of a public key", () => {
    expect(Buffer.from(rawPublicKey(privateKey), "base64")).toHaveLength(32);
  });

  test("comes as a sample whose every line is Key:Value, the signature last", () => {
    const lines = read("conf/license.txt").trimEnd().split("\n");
    for (const line of lines) expect(line).toMatch(/^\w+:\S/);
    expect(lines.at(-1)).toStartWith("License:");
  });

  // Bun puts the key in place of exactly this expression; written otherwise it would be read at run time.
  test("cannot be checked against a key from the environment", () => {
    const lines = read("maxgroup.ts").match(/.*MAXGROUP_LICENSE_PUBLIC_KEY.*/g) ?? [];
    const uses = lines.filter((line) => !/^\s*(\/\/|\*)/.test(line));
    expect(uses).not.toEqual([]);
    for (const use of uses) expect(use).toContain("process.env.MAXGROUP_LICENSE_PUBLIC_KEY");
  });
});

describe("the count of tests", () => {
  test("is read from the report, and absent where there is none", () => {
    expect(readCounts('<testsuites name="bun test" tests="7" failures="1" skipped="4" time="0">')).toEqual({
      passed: 2,
      failed: 1,
      skipped: 4,
    });
    expect(readCounts(undefined)).toBeUndefined();
    expect(readCounts("")).toBeUndefined();
  });

  test("comes with the names of the failed ones, and what was wrong", () => {
    const report = `<testsuite name="x &amp; y" file="a.test.ts" line="2" tests="3">
      <testcase name="bad &lt;1&gt;" classname="x &amp; y" file="a.test.ts" line="3" assertions="1">
        <failure type="AssertionError" message="expected&#10;&#10;Received: 1&#10;">AssertionError</failure>
      </testcase>
      <testcase name="fine" classname="x &amp; y" file="a.test.ts" line="4" assertions="1" />
      <testcase name="slow" classname="" file="a.test.ts" line="5">
        <failure type="TimeoutError" message="test timed out" />
      </testcase>`;
    expect(readFailures(report)).toEqual([
      "a.test.ts:3: x & y > bad <1>\n    expected\n    Received: 1",
      "a.test.ts:5: slow\n    test timed out",
    ]);
    expect(readFailures(undefined)).toEqual([]);
  });

  test("does not hide a crash, an early exit, an empty folder, or a skip in CI", () => {
    const fine = { passed: 1, failed: 0, skipped: 0 };
    expect(faultOf(fine, "exit 0", true)).toBeUndefined();
    expect(faultOf(undefined, "exit 0", false)).toContain("without a report");
    expect(faultOf(fine, "SIGSEGV", false)).toContain("SIGSEGV");
    expect(faultOf({ ...fine, passed: 0 }, "exit 0", false)).toBe("no test was run");
    expect(faultOf({ ...fine, skipped: 1 }, "exit 0", false)).toBeUndefined();
    expect(faultOf({ ...fine, skipped: 1 }, "exit 0", true)).toContain("1 skipped");
  });
});

/** The names and modes in a zip, from its central directory. */
function zipEntries(bytes: Buffer): Map<string, number> {
  const end = bytes.lastIndexOf("PK\x05\x06");
  const entries = new Map<string, number>();
  let at = bytes.readUInt32LE(end + 16);
  for (let left = bytes.readUInt16LE(end + 10); left > 0; left--) {
    const nameLength = bytes.readUInt16LE(at + 28);
    const mode = (bytes.readUInt32LE(at + 38) >>> 16) & 0o777;
    entries.set(bytes.toString("utf8", at + 46, at + 46 + nameLength), mode);
    at += 46 + nameLength + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
  }
  return entries;
}

// `make test` builds the program but no zips: these are looked at where `make zip` has made them.
const zips = ["dist/max_group.zip", "dist/max_group-arm64.zip"].filter((path) => existsSync(join(root, path)));
if (zips.length > 0) {
  test.each(zips)("%s holds the program, executable, and conf/ beside it", (path) => {
    const entries = zipEntries(readFileSync(join(root, path)));
    for (const name of entries.keys()) expect(name).toMatch(/^(max_group|conf\/[\w.-]+)$/);
    expect(entries.get("max_group")).toBe(0o755);
    for (const name of ["license.txt", "seelog.xml", "service_config.json", "spotmax_init.yml"]) {
      expect(entries.get(`conf/${name}`)).toBe(0o644);
    }
  });
}

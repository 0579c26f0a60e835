import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { formatLine, type Level, makeLog, seelogLevel } from "../../maxgroup.ts";

const start = Date.parse("2019-09-17T12:05:14Z");
const at = start + 1_999;

test.each([
  ["debug", "DEBU"],
  ["info", "INFO"],
  ["warn", "WARN"],
  ["error", "ERRO"],
] as const)("on a terminal a line of level %s begins with %s and the seconds since the start", (level, short) => {
  expect(formatLine(level, "start instance manager...", {}, at, start, true)).toBe(`${short}[0001] start instance manager...\n`);
});

test("on a terminal fields follow the message", () => {
  expect(formatLine("info", "Loaded maxgroup web", { group: "web", n: 1 }, start + 12_345_678, start, true)).toBe(
    "INFO[12345] Loaded maxgroup web group=web n=1\n",
  );
});

test.each([
  ["debug", "debug"],
  ["info", "info"],
  ["warn", "warning"],
  ["error", "error"],
] as const)("elsewhere a line is logfmt as in the manual: %s", (level, name) => {
  expect(formatLine(level, "Has persistence volume.", { group: "web" }, at, start, false)).toBe(
    `time="2019-09-17T12:05:15Z" level=${name} msg="Has persistence volume." group=web\n`,
  );
});

test.each([
  ["web-1", "web-1"],
  [12, "12"],
  [true, "true"],
  ["", '""'],
  ["a b", '"a b"'],
  ["a=b", '"a=b"'],
  ['a"b', '"a\\"b"'],
  ["a\\b", '"a\\\\b"'],
  ["a\nb\tc", '"a\\nb\\tc"'],
  ["größe", '"größe"'],
])("logfmt quotes a value where it must: %j", (value, written) => {
  expect(formatLine("info", "m", { key: value }, at, start, false)).toEndWith(` msg="m" key=${written}\n`);
});

test("a message keeps its quotes and line ends within its own line", () => {
  expect(formatLine("error", 'no "x"\nnext', {}, at, start, false)).toEndWith(' msg="no \\"x\\"\\nnext"\n');
});

test("a field that is not known is left out", () => {
  expect(formatLine("info", "m", { group: undefined, instance: "i-1" }, at, start, true)).toBe("INFO[0001] m instance=i-1\n");
});

describe("a log", () => {
  const make = (level: { now: Level }) => {
    const lines: string[] = [];
    const clock = { now: start };
    const log = makeLog(
      (line) => lines.push(line),
      () => clock.now,
      true,
      () => level.now,
    );
    return { lines, clock, log };
  };

  test("counts its seconds from when it was made", () => {
    const { lines, clock, log } = make({ now: "debug" });
    clock.now += 61_000;
    log.info("m");
    expect(lines).toEqual(["INFO[0061] m\n"]);
  });

  test("carries what it was given on every line, and a line's own fields win", () => {
    const { lines, log } = make({ now: "debug" });
    const one = log.with({ group: "web", instance: "i-1" }).with({ notice: "n" });
    one.warn("m", { instance: "i-2", type: "m5.large" });
    log.info("bare");
    expect(lines).toEqual(["WARN[0000] m group=web instance=i-2 notice=n type=m5.large\n", "INFO[0000] bare\n"]);
  });

  test("follows a level that changes while it runs, derived ones too", () => {
    const level: { now: Level } = { now: "warn" };
    const { lines, log } = make(level);
    const one = log.with({ a: 1 });
    for (const name of ["debug", "info", "warn", "error"] as const) one[name](name);
    level.now = "debug";
    one.debug("again");
    expect(lines).toEqual(["WARN[0000] warn a=1\n", "ERRO[0000] error a=1\n", "DEBU[0000] again a=1\n"]);
  });
});

describe("conf/seelog.xml", () => {
  test("as it ships says debug", () => {
    expect(seelogLevel(readFileSync(`${import.meta.dir}/../../conf/seelog.xml`, "utf8"))).toBe("debug");
  });

  test.each([
    ["trace", "debug"],
    ["debug", "debug"],
    ["info", "info"],
    ["warn", "warn"],
    ["error", "error"],
    ["critical", "error"],
  ] as const)("minlevel %s means %s", (name, level) => {
    expect(seelogLevel(`<seelog type="sync" minlevel="${name}"><outputs/></seelog>`)).toBe(level);
  });

  test("is XML: quotes may be single, and spaces and lines stand where XML allows them", () => {
    expect(seelogLevel('<seelog\n  minlevel = "info"\n>')).toBe("info");
    expect(seelogLevel("<seelog minlevel='info'/>")).toBe("info");
  });

  test("minlevel off logs as little as there is", () => {
    expect(seelogLevel('<seelog minlevel="off"/>')).toBe("error");
  });

  test("without a known minlevel says nothing", () => {
    for (const xml of ["", "<seelog/>", '<seelog minlevel="loud"/>', '<seelog maxlevel="info"/>'])
      expect(seelogLevel(xml)).toBeUndefined();
  });

  test("what stands in a comment does not count", () => {
    expect(seelogLevel('<!-- <seelog minlevel="error"> -->\n<seelog minlevel="info"/>')).toBe("info");
  });
});

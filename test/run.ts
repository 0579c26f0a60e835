/**
 * Runs the tests: `make test`, or `bun test/run.ts [FOLDER ...]` for some folders of test/ only.
 *
 * Each folder is one `bun test`, so that a crash or a hang in one does not hide the others. The failed tests are
 * named once more at the end, and the last line says `N passed, N failed, N skipped`. Fails on a failed test, on a
 * `bun test` that crashes, hangs or leaves early, on a folder without tests, and in CI on a skipped test: there, a
 * missing server is a fault.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, constants, setPriority, tmpdir } from "node:os";
import { join } from "node:path";

/** In this order, and how long each may take in all. Folders that are not named come last, with the default. */
const minutesByFolder: Record<string, number> = {
  unit: 10,
  sim: 40,
  e2e: 20,
  wire: 20,
  kube: 20,
  consul: 10,
};
const defaultMinutes = 10;

/**
 * What runs side by side: folders of one lane follow each other. Most tests wait in real time for servers and daemons;
 * the lives of test/sim only reckon, and do so in what the others leave of the cores.
 */
const lanes = [["unit", "wire"], ["e2e"], ["kube", "consul"], ["sim"]];
const yielding = ["sim"];
/** Files at once, where a folder's files take long and do not measure time. */
const filesAtOnce: Record<string, number> = { sim: 2, e2e: 2, wire: 2, kube: 3, consul: 3 };

/** These must be there: a folder lost by accident would else be a pass. */
const required = ["unit", "sim", "e2e", "wire"];

/**
 * For one test that sets no limit itself. The servers and the program take seconds to start; a life in virtual time is
 * no slower for a busy machine, and takes as long as the others leave it.
 */
const testTimeoutMs = (folder: string) => (yielding.includes(folder) ? 20 * 60_000 : 60_000);

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

/** The counts in a JUnit report; undefined where there is none, because `bun test` did not get to its end. */
export function readCounts(report: string | undefined): Counts | undefined {
  const head = /<testsuites\b[^>]*>/.exec(report ?? "")?.[0];
  if (head === undefined) return undefined;
  const number = (name: string) => Number(new RegExp(`\\s${name}="(\\d+)"`).exec(head)?.[1] ?? "0");
  const [failed, skipped] = [number("failures") + number("errors"), number("skipped")];
  return { passed: number("tests") - failed - skipped, failed, skipped };
}

/** The failed tests in a JUnit report: file and line, the name, and what was wrong, in its first lines. */
export function readFailures(report: string | undefined): string[] {
  const entities: Record<string, string> = { lt: "<", gt: ">", quot: '"', apos: "'", "#10": "\n", amp: "&" };
  const read = (tag: string, name: string) =>
    (new RegExp(`\\s${name}="([^"]*)"`).exec(tag)?.[1] ?? "").replace(/&(#?\w+);/g, (all, word) => entities[word] ?? all);
  const failed = (report ?? "").matchAll(/(<testcase\b[^>]*[^/]>)\s*(<(?:failure|error)\b[^>]*>)/g);
  return [...failed].map(([, test = "", failure = ""]) => {
    const group = read(test, "classname");
    const name = `${group === "" ? "" : `${group} > `}${read(test, "name")}`;
    const lines = read(failure, "message")
      .split("\n")
      .filter((line) => line.trim() !== "");
    return `${read(test, "file")}:${read(test, "line")}: ${[name, ...lines.slice(0, 8)].join("\n    ")}`;
  });
}

/** What is wrong with a folder's run beside its failed tests, in words; undefined where nothing is. */
export function faultOf(counts: Counts | undefined, end: string, ci: boolean): string | undefined {
  if (counts === undefined) return `bun test ended without a report (${end})`;
  if (counts.passed + counts.failed + counts.skipped === 0) return "no test was run";
  if (counts.failed === 0 && end !== "exit 0") return `bun test failed outside the tests (${end})`;
  if (ci && counts.skipped > 0) return `${counts.skipped} skipped, which CI does not allow`;
  return undefined;
}

/** The test files in a folder of test/; "" is test/ itself. */
function testFiles(folder: string): string[] {
  const pattern = folder === "" ? "*.test.ts" : `${folder}/**/*.test.ts`;
  return [...new Bun.Glob(pattern).scanSync(import.meta.dir)].sort();
}

/** The folders of test/ that hold tests, and those that must, in order. */
function testFolders(): string[] {
  const found = testFiles("**").map((file) => (file.includes("/") ? file.slice(0, file.indexOf("/")) : ""));
  const order = Object.keys(minutesByFolder);
  const rank = (folder: string) => (order.indexOf(folder) + order.length + 1) % (order.length + 1);
  return [...new Set([...required, ...found])].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

const running = new Set<ChildProcess>();

/** The child leads its own process group: what it started and forgot ends with it. */
function killGroup(child: ChildProcess, signal: NodeJS.Signals) {
  if (child.pid === undefined) return;
  try {
    process.kill(-child.pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error; // ESRCH: the group has ended already
  }
}

/** All other processes go first. A session of its own is a scheduling group of its own, where the kernel makes them. */
function yieldTo(pid: number) {
  setPriority(pid, constants.priority.PRIORITY_LOW);
  try {
    writeFileSync(`/proc/${pid}/autogroup`, "19");
  } catch {
    // No such groups here, or not ours to say: then the priority above counts, or nothing does.
  }
}

/** Runs one folder's tests, their output going to `output`, and says how it ended: "exit 0", "SIGSEGV", ... */
async function runFolder(folder: string, reportFile: string, output: number | "inherit"): Promise<string> {
  const minutes = minutesByFolder[folder] ?? defaultMinutes;
  const parallel = filesAtOnce[folder];
  const child = spawn(
    process.execPath,
    [
      ...["test", "--no-orphans", `--timeout=${testTimeoutMs(folder)}`],
      ...(parallel === undefined ? [] : [`--parallel=${parallel}`]),
      ...["--reporter=junit", `--reporter-outfile=${reportFile}`],
      ...testFiles(folder).map((file) => `./test/${file}`),
    ],
    { cwd: join(import.meta.dir, ".."), stdio: ["ignore", output, output], detached: true },
  );
  running.add(child);
  if (yielding.includes(folder) && child.pid !== undefined) yieldTo(child.pid);
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    killGroup(child, "SIGKILL");
  }, minutes * 60_000);
  const end = await new Promise<string>((resolve) => {
    child.on("error", (error) => resolve(error.message));
    child.on("exit", (code, signal) => resolve(signal ?? `exit ${code}`));
  });
  clearTimeout(timer);
  killGroup(child, "SIGKILL");
  running.delete(child);
  return late ? `stopped after ${minutes} minutes` : end;
}

async function main() {
  const ci = process.env.CI === "true";
  const wanted = process.argv.slice(2);
  const reports = mkdtempSync(join(tmpdir(), "max_group-test-"));
  process.on("exit", () => rmSync(reports, { recursive: true, force: true }));
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(signal, () => {
      for (const child of running) killGroup(child, "SIGKILL");
      process.exit(130);
    });
  }

  const total: Counts = { passed: 0, failed: 0, skipped: 0 };
  const faults: string[] = [];
  const failures: string[] = [];
  const runOne = async (folder: string, isAlone: boolean) => {
    const reportFile = join(reports, `${folder || "top"}.xml`);
    const outputFile = `${reportFile}.txt`;
    const empty = testFiles(folder).length === 0;
    if (isAlone) console.log(`\n== test/${folder}`);
    const output = isAlone ? "inherit" : openSync(outputFile, "w");
    const startMs = performance.now();
    const end = empty ? "exit 0" : await runFolder(folder, reportFile, output);
    if (output !== "inherit") {
      closeSync(output);
      process.stdout.write(`\n== test/${folder}\n${readFileSync(outputFile, "utf8")}`);
    }
    console.log(`test/${folder}: ${((performance.now() - startMs) / 1000).toFixed(0)} s`);
    const report = await Bun.file(reportFile)
      .text()
      .catch(() => undefined); // absent: readCounts says so
    const counts = empty ? { passed: 0, failed: 0, skipped: 0 } : readCounts(report);
    failures.push(...readFailures(report));
    total.passed += counts?.passed ?? 0;
    total.failed += counts?.failed ?? 0;
    total.skipped += counts?.skipped ?? 0;
    const fault = faultOf(counts, end, ci);
    if (fault === undefined) return;
    faults.push(`test/${folder}: ${fault}`);
    // A fault that no failed test stands for counts as one, so that the last line never says "0 failed" then.
    if ((counts?.failed ?? 0) === 0) total.failed += 1;
  };

  const folders = wanted.length > 0 ? wanted : testFolders();
  const isAlone = folders.length === 1 || availableParallelism() === 1;
  const laneOf = (folder: string) => (isAlone ? 0 : lanes.findIndex((lane) => lane.includes(folder)));
  if (!isAlone) console.log(`test/${folders.join(", test/")}: side by side, each printed when it has ended`);
  await Promise.all(
    [...Map.groupBy(folders, laneOf).values()].map(async (lane) => {
      for (const folder of lane) await runOne(folder, isAlone);
    }),
  );

  console.log("");
  for (const failure of failures) console.log(`FAILED ${failure}`);
  for (const fault of faults) console.log(`FAULT ${fault}`);
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  process.exitCode = total.failed > 0 || faults.length > 0 ? 1 : 0;
}

if (import.meta.main) await main();

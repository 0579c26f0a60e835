// Lives by the thousand: `make sim SEEDS=2000`; one of them again: `make sim SEED=7`; or
//
//   bun test/sim/run.ts 2000 [--from 1]       many lives, on two processes (--workers 1: on one)
//   bun test/sim/run.ts --seed 7 [--log]      one life again, with the daemons' log and what AWS did
//   bun test/sim/run.ts --seed 7 --shrink     leaves out features as long as the life still fails
//     --without kills,stale                   without these features
//     --given kills,stale                     with these in any case
//     --mutation "a name, or part of it"      against the program with that bug (see mutations.ts)
//
// A worker process prints one line of JSON for each life, so that the parent knows which seed a crash belongs to.
import { rmSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { EPOCH_MS } from "../aws/clock.ts";
import type { Program } from "./harness.ts";
import type { Finding } from "./invariants.ts";
import { type Feature, featureNames, live, type Outcome } from "./life.ts";
import { MUTATIONS, type Mutation, writeMutant } from "./mutations.ts";

export interface Failure {
  seed: number;
  /** What was found first. */
  text: string;
  replay: string;
}
interface Line {
  seed: number;
  findings: Finding[];
  minutes: number;
  calls: number;
  data: Outcome["data"];
  ms: number;
}

const WORKERS = 2;
const LIVES_A_PROCESS = 250;
/** A life takes 200 ms of a core; one that takes this long, on the busiest machine, goes round in circles. */
const HANG_MS = 10 * 60_000;

const replayOf = (seed: number) => `make sim SEED=${seed}`;
const describe = ({ rule, atMs, text }: Finding) => `invariant ${rule} at ${((atMs - EPOCH_MS) / 1000).toFixed(1)} s: ${text}`;

/** Lives with seeds `from` to `from + count - 1` on two processes; the failed ones, by seed. */
export async function runSeeds(
  count: number,
  { from = 1, workers = WORKERS, onLine }: { from?: number; workers?: number; onLine?: (line: Line) => void } = {},
): Promise<Failure[]> {
  const failures: Failure[] = [];
  const runWorker = async (first: number) => {
    for (let next = first; next < from + count; ) {
      // A process that lives on gets slow: a life leaves megabytes behind.
      const last = Math.min(from + count - 1, next + LIVES_A_PROCESS * workers - 1);
      const child = Bun.spawn([process.execPath, import.meta.path, "--worker", `${next}`, `${last}`, `${workers}`], {
        stdout: "pipe",
        stderr: "inherit",
      });
      let timer = setTimeout(() => child.kill("SIGKILL"), HANG_MS);
      let text = "";
      const decoder = new TextDecoder();
      for await (const chunk of child.stdout) {
        clearTimeout(timer);
        timer = setTimeout(() => child.kill("SIGKILL"), HANG_MS);
        text += decoder.decode(chunk, { stream: true });
        const lines = text.split("\n");
        text = lines.pop() ?? "";
        for (const one of lines) {
          const line = JSON.parse(one) as Line;
          next = line.seed + workers;
          onLine?.(line);
          const [finding] = line.findings;
          if (finding) failures.push({ seed: line.seed, text: describe(finding), replay: replayOf(line.seed) });
        }
      }
      clearTimeout(timer);
      await child.exited;
      if (next > last) continue;
      // It ended before its last life did: that life is to blame, the others go on.
      const how =
        child.signalCode === "SIGKILL" ? `did not end in ${HANG_MS / 1000} s` : `ended the process (exit ${child.exitCode})`;
      failures.push({ seed: next, text: how, replay: replayOf(next) });
      next += workers;
    }
  };
  await Promise.all(Array.from({ length: workers }, (_, n) => runWorker(from + n)));
  return failures.sort((a, b) => a.seed - b.seed);
}

/**
 * The seed that finds a mutation, or undefined where `limit` lives do not; the one that found it last is tried first. A
 * seed that the real program fails at proves nothing.
 */
async function findMutation(mutation: Mutation, limit: number): Promise<{ seed: number; finding: Finding } | undefined> {
  const path = await writeMutant(mutation);
  try {
    const program = (await import(pathToFileURL(path).href)) as Program;
    const seeds = Array.from({ length: limit }, (_, n) => n + 1);
    for (const seed of [mutation.seed, ...seeds]) {
      const [finding] = (await live(seed, { program, given: mutation.given })).findings;
      if (finding && !(await live(seed, { given: mutation.given })).findings.length) return { seed, finding };
    }
    return undefined;
  } finally {
    rmSync(path);
  }
}

/** What became of each mutation: the seed that finds it, or in words why there is none up to `limit`. On two processes. */
export async function runMutations(limit: number): Promise<Map<string, number | string>> {
  const found = new Map<string, number | string>();
  const waiting = MUTATIONS.map(({ name }) => name);
  const runWorker = async () => {
    for (let name = waiting.shift(); name !== undefined; name = waiting.shift()) {
      const command = [process.execPath, import.meta.path, "--find", name, "--limit", `${limit}`];
      const child = Bun.spawn(command, { stdout: "pipe", stderr: "inherit" });
      const text = await new Response(child.stdout).text();
      await child.exited;
      found.set(name, text.startsWith("{") ? (JSON.parse(text) as { seed: number }).seed : text || `exit ${child.exitCode}`);
    }
  };
  await Promise.all(Array.from({ length: WORKERS }, runWorker));
  return found;
}

/** Leaves out one feature after the other as long as the same invariant still breaks. */
async function shrink(seed: number, without: Feature[], given: Feature[], program: Program | undefined): Promise<Outcome> {
  let outcome = await live(seed, { program, without, given });
  const rule = outcome.findings[0]?.rule;
  for (const feature of rule ? [...outcome.features] : []) {
    const fewer = await live(seed, { program, without: [...without, feature], given });
    if (fewer.findings[0]?.rule !== rule) continue;
    without.push(feature);
    outcome = fewer;
  }
  return outcome;
}

async function main(args: string[]): Promise<number> {
  const value = (name: string) => {
    const place = args.indexOf(name);
    return place < 0 ? undefined : args[place + 1];
  };
  const named = (option: string) => featureNames.filter((name) => value(option)?.split(",").includes(name));
  const without = named("--without");
  const mutation = MUTATIONS.find(({ name }) => args.includes("--mutation") && name.includes(value("--mutation") ?? ""));

  if (args[0] === "--worker") {
    for (let seed = Number(args[1]); seed <= Number(args[2]); seed += Number(args[3])) {
      const startMs = performance.now();
      const { findings, minutes, calls, data } = await live(seed);
      const line: Line = { seed, findings: findings.slice(0, 3), minutes, calls, data, ms: performance.now() - startMs };
      process.stdout.write(`${JSON.stringify(line)}\n`);
      if (seed % 50 < 2) Bun.gc(true); // a life leaves megabytes behind, and two workers share the machine with others
    }
    return 0;
  }

  const wanted = MUTATIONS.find(({ name }) => name === value("--find"));
  if (wanted) {
    const startMs = performance.now();
    const limit = Number(value("--limit"));
    const found = await findMutation(wanted, limit).catch((error: Error) => error.message); // it fits no longer
    const seconds = ((performance.now() - startMs) / 1000).toFixed(1);
    if (typeof found === "object" && found.seed !== wanted.seed)
      console.error(`found by seed ${found.seed}, and not by ${wanted.seed}, after ${seconds} s: ${wanted.name}`);
    process.stdout.write(typeof found === "object" ? JSON.stringify(found) : (found ?? `not found within ${limit} lives`));
    return 0;
  }

  const seed = value("--seed");
  if (seed !== undefined) {
    const path = mutation && (await writeMutant(mutation));
    const program = path ? ((await import(pathToFileURL(path).href)) as Program) : undefined;
    if (path) rmSync(path);
    const given = mutation?.given ?? named("--given");
    const outcome = args.includes("--shrink")
      ? await shrink(Number(seed), without, given, program)
      : await live(Number(seed), { program, log: args.includes("--log"), without, given });
    process.stdout.write(outcome.lines.join(""));
    const { features, isQuiet, minutes, restMinutes, launches, calls, findings } = outcome;
    console.log(`\nseed ${seed}: ${isQuiet ? "quiet; " : ""}${features.join(", ") || "no features"}`);
    if (without.length) console.log(`without ${without.join(",")}`);
    console.log(`${minutes} minutes, ${restMinutes} of them to come to rest; ${launches} launches, ${calls} calls`);
    for (const finding of findings) console.log(describe(finding));
    return findings.length ? 1 : 0;
  }

  const count = Number(args[0] ?? 2000);
  const startMs = performance.now();
  let [done, minutes, calls] = [0, 0, 0];
  const failures = await runSeeds(count, {
    from: Number(value("--from") ?? 1),
    workers: Number(value("--workers") ?? WORKERS),
    onLine: (line) => {
      minutes += line.minutes;
      calls += line.calls;
      if (++done % 100 === 0) console.log(`${done} of ${count} lives`);
      const [finding] = line.findings;
      if (finding) console.log(`seed ${line.seed}: ${describe(finding)}\n  ${replayOf(line.seed)}`);
    },
  });
  const seconds = (performance.now() - startMs) / 1000;
  console.log(
    `${count} lives, ${failures.length} failed; ${Math.round(minutes / 60)} virtual hours and ${calls} calls in ${seconds.toFixed(0)} s`,
  );
  for (const { seed: s, text, replay } of failures) console.log(`seed ${s}: ${text.slice(0, 300)}\n  ${replay}`);
  return failures.length ? 1 : 0;
}

if (import.meta.main) process.exit(await main(process.argv.slice(2)));

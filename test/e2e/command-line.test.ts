// What the compiled binary says when it cannot start: an exit code and one clear message, and quickly.
import { afterAll, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import pkg from "../../package.json" with { type: "json" };
import { BUCKET, Daemon, environment, onStage, REGION, runBinary, type Scene, sleep } from "./harness.ts";

const folder = mkdtempSync(join(tmpdir(), "max_group-cli-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const NOWHERE = "http://127.0.0.1:9";
const run = (args: string[], endpoint?: string, cwd = folder) => runBinary(args, { env: environment(cwd, endpoint), cwd });

/** Exit code 1, nothing on standard output, and on standard error so many lines of error, whose messages are returned. */
async function refused(args: string[], endpoint: string | undefined, cwd = folder, lines = 1): Promise<string> {
  const { code, stdout, stderr, tookMs } = await run(args, endpoint, cwd);
  expect([code, stdout]).toEqual([1, ""]);
  expect(tookMs).toBeLessThan(10_000);
  expect(stderr).not.toMatch(/^\s+at /m); // no stack trace
  const messages = stderr.split("\n").flatMap((line): string[] => {
    const quoted = /level=error msg=("(?:[^"\\]|\\.)*")/.exec(line)?.[1];
    return quoted === undefined ? [] : [JSON.parse(quoted)];
  });
  expect(messages.length).toBe(lines);
  return messages.join("\n");
}

// ─── Flags ───────────────────────────────────────────────────────────────────────────────────────────────

test("-v prints the version and exits 0", async () => {
  const { code, stdout, stderr } = await run(["-v"]);
  expect([code, stdout, stderr]).toEqual([0, `${pkg.version}\n`, ""]);
});

for (const [title, args, message] of [
  ["no -r", [], "region is required."],
  ["no -r beside -b", ["-b", BUCKET], "region is required."],
  ["no -b", ["-r", REGION], "S3 bucket is required."],
  ["an unknown flag", ["-r", REGION, "-b", BUCKET, "-x"], "flag provided but not defined: -x"],
  ["a flag without its value", ["-r", REGION, "-b"], "flag needs an argument: -b"],
  ["a stray argument", ["-r", REGION, "-b", BUCKET, "now"], 'unexpected argument "now"'],
  ["-k without -p", ["-r", REGION, "-b", BUCKET, "-k", "AKIA"], "-k and -p go together"],
] as const)
  test(`${title}: exit 2, one sentence, then the usage text, all on standard error`, async () => {
    const { code, stdout, stderr } = await run([...args]);
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr.split("\n")[0]).toStartWith(message);
    for (const flag of "Kbklprtv") expect(stderr).toMatch(new RegExp(`^  -${flag}\\b`, "m"));
  });

test("a log file that cannot be opened: exit 1 and one sentence that names it, no stack trace", async () => {
  const { code, stderr } = await run(["-b", BUCKET, "-r", REGION, "-l", "no/such/folder/x.log"], NOWHERE);
  expect(code).toBe(1);
  expect(stderr).toContain("no/such/folder/x.log");
  expect(stderr.trimEnd().split("\n").length).toBe(1);
});

// ─── Local test mode ─────────────────────────────────────────────────────────────────────────────────────

test("-t refuses to start without a loopback endpoint", async () => {
  expect(await refused(["-t", "-r", REGION], undefined)).toContain("set AWS_ENDPOINT_URL to a loopback address");
  expect(await refused(["-t", "-r", REGION], "https://sqs.us-east-2.amazonaws.com")).toContain("loopback");
  expect(await refused(["-t", "-r", REGION], "http://localhost.example.com:4566")).toContain("loopback");
});

test("-t refuses a queue that is not on a loopback address", async () => {
  const cwd = mkdtempSync(join(folder, "t-"));
  mkdirSync(join(cwd, "conf"));
  const queue = (host: string, name: string) => ({ queue_url: `${host}/123456789012/${name}` });
  const config = {
    global: {
      interruption_evt_sqs: queue("https://sqs.us-east-2.amazonaws.com", "a"),
      detach_evt_sqs: queue(NOWHERE, "b"),
      termination_evt_sqs: queue(NOWHERE, "c"),
    },
    groups: { web: {} },
  };
  writeFileSync(join(cwd, "conf/service_config.json"), JSON.stringify(config));
  const message = await refused(["-t", "-r", REGION], NOWHERE, cwd);
  expect(message).toContain("global.interruption_evt_sqs.queue_url is https://sqs.us-east-2.amazonaws.com/123456789012/a");
});

test("-t without conf/service_config.json names the file", async () => {
  expect(await refused(["-t", "-r", REGION], NOWHERE)).toContain("conf/service_config.json is not in the working folder");
});

// ─── Where the configuration comes from ──────────────────────────────────────────────────────────────────

const withBucket = (tell: (s: Scene) => Promise<void>) =>
  onStage(async (s) => {
    s.group({ name: "web", min: 1, max: 3, desired: 2 });
    s.configure();
    await tell(s);
  });
const start = (s: Scene, bucket = BUCKET, lines = 1) => refused(["-b", bucket, "-r", REGION], s.url, s.folder, lines);

test("a bucket that is not there", () =>
  withBucket(async (s) => {
    expect(await start(s, "other-bucket")).toBe("s3://other-bucket/service_config.json: there is no such bucket; check -b");
  }));

test("an object that is not there: the command that uploads it", () =>
  withBucket(async (s) => {
    s.world.s3.put("empty-bucket", "another.json", "{}");
    expect(await start(s, "empty-bucket")).toContain("aws s3 cp service_config.json s3://empty-bucket/");
  }));

test("access denied: the right that is missing", () =>
  withBucket(async (s) => {
    s.world.denied.add("s3:GetObject");
    expect(await start(s)).toContain("access is denied; the role needs s3:GetObject");
  }));

test("an endpoint that does not answer", async () => {
  const message = await refused(["-b", BUCKET, "-r", REGION], NOWHERE);
  expect(message).toContain("the endpoint cannot be reached");
  expect(message).toContain("AWS_ENDPOINT_URL");
});

test("an AWS_ENDPOINT_URL that is no URL is named as what is wrong", async () => {
  expect(await refused(["-b", BUCKET, "-r", REGION], "127.0.0.1:9")).toContain("AWS_ENDPOINT_URL");
});

// ─── Signals at start ────────────────────────────────────────────────────────────────────────────────────

/** Starts the binary, whose configuration is not answered before all is over, and calls `then` when it has asked for it. */
const whileStarting = (then: (daemon: Daemon) => Promise<void>) =>
  withBucket(async (s) => {
    const [asked, over] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    s.world.intercept = ({ operation }) => {
      if (operation !== "GetObject") return undefined;
      asked.resolve();
      return { wait: over.promise };
    };
    const daemon = new Daemon(["-b", BUCKET, "-r", REGION], environment(s.folder, s.url), s.folder);
    s.daemons.push(daemon);
    await asked.promise;
    await then(daemon);
    over.resolve();
  });

test("SIGTERM while starting: exit 0 at once, and no error", () =>
  whileStarting(async (daemon) => {
    const { code, tookMs } = await daemon.end("SIGTERM");
    expect(daemon.lines.filter((line) => line.includes("level=error"))).toEqual([]);
    expect([code, tookMs < 9_000]).toEqual([0, true]); // 9.5 s: given up
  }));

test("SIGHUP while starting does not end it", () =>
  whileStarting(async (daemon) => {
    daemon.signal("SIGHUP");
    await sleep(1_000);
    expect(daemon.isAlive).toBe(true);
  }));

// ─── The configuration ───────────────────────────────────────────────────────────────────────────────────

test("JSON that is none: line and column", () =>
  withBucket(async (s) => {
    s.world.s3.put(BUCKET, "service_config.json", '{\n  "system": {},\n  "global": {]\n}');
    const message = await start(s);
    expect(message).toContain("service_config.json is not valid JSON");
    expect(message).toContain("line 3, column 14");
  }));

test("several faults are reported at once, each with its path and line, an unknown key with the nearest name", () =>
  withBucket(async (s) => {
    const config: { global: { detach_evt_sqs: object }; groups: object } = JSON.parse(
      s.world.s3.buckets.get(BUCKET)?.objects.get("service_config.json")?.body ?? "",
    );
    Object.assign(config.global.detach_evt_sqs, { wait_time_seconds: 21 });
    config.groups = { web: { detaching_delay_second: 5 }, api: { is_enable_preaction: "yes" } };
    s.world.s3.put(BUCKET, "service_config.json", JSON.stringify(config, null, 2));
    const [head = "", ...faults] = (await start(s, BUCKET, 4)).split("\n");
    expect(head).toContain("3 faults");
    expect(faults.length).toBe(3);
    const all = faults.join("\n");
    expect(all).toMatch(/global\.detach_evt_sqs\.wait_time_seconds \(line \d+\) is 21: must be a whole number from 0 to 20/);
    expect(all).toMatch(/groups\.web\.detaching_delay_second .*did you mean "detaching_delay_seconds"\?/);
    expect(all).toMatch(/groups\.api\.is_enable_preaction .*true or false/);
  }));

test("a queue that is not there", () =>
  withBucket(async (s) => {
    const text = s.world.s3.buckets.get(BUCKET)?.objects.get("service_config.json")?.body ?? "";
    s.world.s3.put(BUCKET, "service_config.json", text.replace("/termination", "/terminations"));
    expect(await start(s)).toMatch(/global\.termination_evt_sqs\.queue_url http\S+: there is no such queue/);
  }));

test("no group that can be looked after: each is named with its reason, and the exit code is 1", () =>
  withBucket(async (s) => {
    const text = s.world.s3.buckets.get(BUCKET)?.objects.get("service_config.json")?.body ?? "";
    s.world.s3.put(BUCKET, "service_config.json", text.replace('"web"', '"Web"'));
    const { code, stderr } = await run(["-b", BUCKET, "-r", REGION], s.url, s.folder);
    expect(code).toBe(1);
    expect(stderr).toContain("group Web is left out: there is no Auto Scaling group");
    expect(stderr).toContain("no group can be looked after");
  }));

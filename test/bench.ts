/**
 * `make bench`: what the program costs. No test: nothing fails here, and no figure decides anything.
 *
 *   bun test/bench.ts [--full] [SECTION...]       sections: see SECTIONS; --full: 10,000 notices at once as well
 *
 * One table: the median of several runs, least and most, and the simulator's own part of it, which AWS would spend
 * elsewhere. Each section runs in a process of its own, so that no heap and no warm code is another one's.
 *
 * Over HTTP the simulator is in this process and the program, as it is shipped, in another. "Simulator" is then the
 * time between the two moments in which at least one request was inside the server (a poll from the moment that there
 * was something to receive); "beyond" is the rest: the program, the sockets, and the scheduler between the two. In
 * process it is the time spent inside World.call. Under virtual time nothing computes: a figure is AWS's latency
 * (20 to 60 ms a call), its request rates, and the program's own waiting.
 */
import { heapStats } from "bun:jsc";
import { existsSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { cpus, loadavg, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import {
  type Config,
  type Ctx,
  checkGroups,
  type Deps,
  makeContext,
  makeLog,
  parseConfig,
  run,
  type State,
} from "../maxgroup.ts";
import { AwsError, faultError, operationSchema, parse } from "./aws/basics.ts";
import { client } from "./aws/clients.ts";
import { type Clock, RealClock, VirtualClock } from "./aws/clock.ts";
import { type Served, serve } from "./aws/server.ts";
import { type GroupSpec, type InterruptOptions, type Queues, type Service, World, type WorldOptions } from "./aws/world.ts";
import { type Cluster, startCluster } from "./kube/cluster.ts";

const BINARY = resolve(process.env.MAX_GROUP_BINARY ?? join(import.meta.dir, "../dist/max_group"));
const REGION = "us-east-2";
const BUCKET = "max-group-conf";
const GROUPS = 20;
/** The replacement of an instance that is reclaimed finds a place in its own zone: capacity is not what is measured. */
const NOTICE: InterruptOptions = { keepCapacity: true };

/** A row of the table, or some of its runs. */
type Row = {
  what: string;
  unit: string;
  digits: number;
  runs: number[];
  /** The simulator's part of each run, in the same unit. */
  simulator?: number[];
  /** What is hoped for: at most, or at least. */
  most?: number;
  least?: number;
};
/** Requests a notice by operation: until the last old one is out, how many of these AWS refused for their rate, and in all. */
type Calls = Record<string, { out: number; refused: number; story: number }>;
type Section = { times: number; run: (isFull: boolean) => Promise<Row[] | { rows: Row[]; calls: Calls[] }> };

const row = (what: string, unit: string, runs: number[], more: Partial<Row> = {}): Row => ({
  what,
  unit,
  digits: 0,
  runs,
  ...more,
});
const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
/** The value that a share `p` of all does not exceed. */
function quantile(values: number[], p: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(p * sorted.length) - 1)] ?? Number.NaN;
}

// ─── The stage in process ────────────────────────────────────────────────────────────────────────────────

/** Equal groups under names of their own, with room above desired. Returns each one's members. */
function makeGroups(
  world: World,
  prefix: string,
  count: number,
  desired: number,
  more: Partial<GroupSpec> = {},
): Map<string, string[]> {
  const names = Array.from({ length: count }, (_, n) => `${prefix}-${n}`);
  return new Map(
    names.map((name) => [name, world.createGroup({ name, min: 1, max: 2 * desired, desired, ...more }).instanceIds]),
  );
}

function configOf(queues: Queues, groups: Record<string, object>, system: object = {}): string {
  const queue = (queue_url: string) => ({ queue_url });
  return JSON.stringify({
    system,
    global: {
      interruption_evt_sqs: queue(queues.interruption),
      detach_evt_sqs: queue(queues.detach),
      termination_evt_sqs: queue(queues.termination),
    },
    groups,
  });
}

/** The program in this process, on effects that lead into the world; `stop` is its SIGTERM. */
type Program = { ctx: Ctx; running: Promise<void>; stop: () => void };

function startProgram(world: World, clock: Clock, config: Config): Program {
  const sqs = client(world, "sqs");
  const stop = new AbortController();
  let bytes = 0;
  const deps: Deps = {
    ec2: client(world, "ec2"),
    autoScaling: client(world, "autoscaling"),
    elb: client(world, "elbv2"),
    s3: client(world, "s3"),
    sqs: () => sqs,
    fetch,
    credentials: async () => ({ accessKeyId: "AKIATEST", secretAccessKey: "secret" }),
    region: REGION,
    now: () => clock.now(),
    sleep: (ms, signal) => clock.sleep(ms, signal),
    random: () => world.random.next(),
    // Lines are made, as by default down to debug, and written nowhere.
    log: makeLog(
      (line) => {
        bytes += line.length;
      },
      () => clock.now(),
      false,
      () => "debug",
    ),
  };
  const ctx = makeContext(deps, config, stop.signal);
  const running = checkGroups(ctx).then(() => run(ctx));
  return { ctx, running, stop: () => stop.abort(new Error(`stopped after ${bytes} bytes of log`)) };
}

// ─── The stage over HTTP ─────────────────────────────────────────────────────────────────────────────────

type Interval = [fromMs: number, toMs: number];

/** How much of `from` to `to` the intervals cover together. */
function covered(intervals: Interval[], fromMs: number, toMs: number): number {
  let sum = 0;
  let endMs = fromMs;
  for (const [a, b] of intervals.toSorted((x, y) => x[0] - y[0])) {
    const start = Math.max(a, endMs);
    endMs = Math.min(Math.max(endMs, b), toMs);
    sum += Math.max(0, endMs - start);
  }
  return sum;
}

/** A world at latency 0 behind a port of its own, and processes of the compiled program that use it. */
class Site {
  readonly folder = mkdtempSync(join(tmpdir(), "max_group-bench-"));
  readonly world: World;
  readonly queues: Queues;
  /** When a request was inside the server. */
  busy: Interval[] = [];
  firstReceiveMs: number | undefined;
  /** When the first CreateFleet for an old instance arrived. */
  readonly launchMs = new Map<string, number>();
  readonly #served: Served;
  readonly #polls = new Map<object, { sinceMs: number } | "empty">();
  readonly #children: Bun.Subprocess[] = [];
  #deliveredMs = 0;

  constructor(delays: Partial<WorldOptions> = {}) {
    process.on("SIGTERM", () => void this.close().then(() => process.exit(1)));
    this.#served = serve(
      { call: (...call) => this.#call(...call) },
      {
        log: ({ call, tookMs }) => {
          const endMs = performance.now();
          const poll = call && this.#polls.get(call.input);
          if (poll !== "empty") this.busy.push([Math.max(endMs - tookMs, poll?.sinceMs ?? 0), endMs]);
          if (call) this.#polls.delete(call.input);
        },
      },
    );
    const options = { clock: new RealClock(), region: REGION, origin: this.#served.url, latencyMs: [0, 0] as [number, number] };
    this.world = new World({ ...options, cidr: "127.0.0.0/8", ...delays });
    this.queues = this.world.createQueues();
  }

  async #call(service: Service, operation: string, input: object, options?: { signal?: AbortSignal }): Promise<object> {
    if (operation === "CreateFleet") {
      const atMs = performance.now();
      for (const old of replacedBy(input)) if (!this.launchMs.has(old)) this.launchMs.set(old, atMs);
    }
    if (operation !== "ReceiveMessage") return this.world.call(service, operation, input, options);
    this.firstReceiveMs ??= performance.now();
    const calledMs = performance.now();
    this.#polls.set(input, "empty");
    const answer = await this.world.call(service, operation, input, options);
    if ("Messages" in answer) this.#polls.set(input, { sinceMs: Math.max(calledMs, this.#deliveredMs) });
    return answer;
  }

  /** Starts the program on these groups; returns its process once it receives, and how long that took. */
  async start(groups: Record<string, object>): Promise<{ pid: number; startMs: number; end: () => Promise<void> }> {
    this.world.s3.put(BUCKET, "service_config.json", configOf(this.queues, groups));
    this.firstReceiveMs = undefined;
    const log = join(this.folder, `log-${this.#children.length}`);
    const startMs = performance.now();
    const child = Bun.spawn([BINARY, "-b", BUCKET, "-r", REGION], {
      cwd: this.folder,
      env: {
        HOME: this.folder,
        AWS_ACCESS_KEY_ID: "test",
        AWS_SECRET_ACCESS_KEY: "test",
        AWS_EC2_METADATA_DISABLED: "true",
        AWS_ENDPOINT_URL: this.#served.url,
      },
      stdin: "ignore",
      stdout: "ignore",
      stderr: openSync(log, "w"),
    });
    this.#children.push(child);
    await until(20, () => {
      if (child.exitCode !== null) throw new Error(`the program ended at start:\n${readFileSync(log, "utf8")}`);
      return this.firstReceiveMs !== undefined;
    });
    const end = async () => {
      child.kill("SIGKILL");
      await child.exited;
    };
    return { pid: child.pid, startMs, end };
  }

  /** Sends a notice for each, all at once; resolves with how long each one's launch call took to arrive, in ms. */
  async notify(ids: string[], seconds = 30): Promise<{ totalMs: number; simulatorMs: number }[]> {
    this.busy = [];
    const fromMs = performance.now();
    this.#deliveredMs = fromMs;
    for (const id of ids) this.world.interrupt(id, NOTICE);
    await until(seconds, () => ids.every((id) => this.launchMs.has(id)));
    await sleep(5); // the calls themselves are answered
    return ids.map((id) => {
      const toMs = this.launchMs.get(id) ?? Number.NaN;
      return { totalMs: toMs - fromMs, simulatorMs: covered(this.busy, fromMs, toMs) };
    });
  }
  /** Until the program asks for nothing but messages; at start it looks at its rights for a while. */
  async silence(): Promise<void> {
    for (let known = -1; known !== this.busy.length; await sleep(700)) known = this.busy.length;
  }
  depth(url: string): number {
    const { visible, delayed, inFlight } = this.world.queueDepth(url);
    return visible + delayed + inFlight;
  }
  async close(): Promise<void> {
    for (const child of this.#children) child.kill("SIGKILL");
    await this.#served.stop();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/** The old instances that a launch request names in its tag. */
function replacedBy(input: object): string[] {
  const { TagSpecifications = [] } = input as { TagSpecifications?: { Tags?: { Key?: string; Value?: string }[] }[] };
  const tags = TagSpecifications.flatMap(({ Tags = [] }) => Tags);
  return (tags.find(({ Key }) => Key === "spotmax:replaces")?.Value ?? "").split(" ").filter(Boolean);
}

async function until(seconds: number, done: () => boolean): Promise<void> {
  for (const endMs = performance.now() + 1000 * seconds; !done(); await sleep(1))
    if (performance.now() > endMs) throw new Error(`not within ${seconds} s`);
}

/** Of a process, in MiB: resident in all, and what of it is no file's page. */
function memoryOf(pid: number): { rss: number; anonymous: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const mib = (name: string) => Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(status)?.[1]) / 1024;
  return { rss: mib("VmRSS"), anonymous: mib("RssAnon") };
}
/** utime + stime, in seconds; ticks are hundredths on Linux. */
function cpuSeconds(pid: number): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8")
    .replace(/^.*\) /, "")
    .split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

// ─── Sections ────────────────────────────────────────────────────────────────────────────────────────────

/** What AWS takes seconds for takes no time: a story is over in a moment, and the next notice finds nothing in hand. */
const AT_ONCE: Partial<WorldOptions> = { pendingMs: [0, 0], attachMs: [0, 0], detachMs: [0, 0], reactionMs: [0, 0] };
const empty = (names: Iterable<string>, options: object = {}) => Object.fromEntries([...names].map((name) => [name, options]));

/** Process start to first receive, and the first notice of a process whose code is cold. */
async function start(): Promise<Row[]> {
  const starts: { totalMs: number; simulatorMs: number }[] = [];
  const notices: { totalMs: number; simulatorMs: number }[] = [];
  for (let n = 0; n < 8; n++) {
    const site = new Site();
    const groups = makeGroups(site.world, "web", 1, 3);
    const { startMs, end } = await site.start(empty(groups.keys()));
    const endMs = site.firstReceiveMs ?? Number.NaN;
    const first = { totalMs: endMs - startMs, simulatorMs: covered(site.busy, startMs, endMs) };
    await site.silence();
    const [notice] = await site.notify([...groups.values()].flatMap(([id]) => id ?? []));
    if (n > 0) starts.push(first); // the first run warms the server
    if (n > 0 && notice) notices.push(notice);
    await end();
    await site.close();
  }
  return [...timed("start to first receive", starts), ...timed("first notice of a fresh process to CreateFleet", notices)];
}
/** Two rows: in all, and beyond the simulator's part. */
function timed(what: string, all: { totalMs: number; simulatorMs: number }[], goal: Partial<Row> = {}): Row[] {
  const simulator = all.map((x) => x.simulatorMs);
  const beyond = all.map((x) => x.totalMs - x.simulatorMs);
  return [
    row(
      what,
      "ms",
      all.map((x) => x.totalMs),
      { simulator },
    ),
    row(`  beyond the simulator`, "ms", beyond, goal),
  ];
}

/** Notice to CreateFleet over HTTP: a hundred at once in a fresh process, thirty alone, a hundred at once again. */
async function notices(): Promise<Row[]> {
  const site = new Site(AT_ONCE);
  try {
    const single = makeGroups(site.world, "single", GROUPS, 10);
    const together = makeGroups(site.world, "together", GROUPS, 20);
    await site.start({
      ...empty(single.keys(), { detaching_delay_seconds: 900 }),
      ...empty(together.keys(), { detaching_delay_seconds: 5 }),
    });
    /** These members of each group. */
    const pick = (groups: Map<string, string[]>, from: number) =>
      [...groups.values()].flatMap((ids) => ids.slice(from, from + 100 / GROUPS));
    const isAttached = () => site.depth(site.queues.interruption) === 0;
    const isOver = () => isAttached() && site.depth(site.queues.detach) === 0;
    const wave = async (from: number) => {
      await site.silence();
      site.world.delays.pendingMs = [3_000, 3_000]; // what comes after the launch is not in its way
      const found = await site.notify(pick(together, from));
      site.world.delays.pendingMs = [0, 0];
      return found;
    };
    const cold = await wave(0);
    await until(60, isOver);
    const one: { totalMs: number; simulatorMs: number }[] = [];
    for (const id of pick(single, 0).slice(0, 30)) {
      one.push(...(await site.notify([id])));
      await until(20, isAttached); // the way out begins when all of this is over
      await sleep(1_500); // alone: in a row they would wait for company
    }
    const warm = await wave(5);
    const both = (what: string, all: { totalMs: number; simulatorMs: number }[], goal: Partial<Row>) => {
      const simulator = all.map((x) => x.simulatorMs);
      const beyond = all.map((x) => x.totalMs - x.simulatorMs);
      return [0.5, 0.99].flatMap((p) => [
        row(
          `${what}, p${100 * p}`,
          "ms",
          [
            quantile(
              all.map((x) => x.totalMs),
              p,
            ),
          ],
          { digits: 1, simulator: [quantile(simulator, p)] },
        ),
        row(`  beyond the simulator, p${100 * p}`, "ms", [quantile(beyond, p)], { digits: 1, ...(p > 0.5 ? goal : {}) }),
      ]);
    };
    return [
      ...both("notice to CreateFleet, alone", one, { most: 50 }),
      ...both("notice to CreateFleet, 100 at once, fresh process", cold, { most: 50 }),
      ...both("notice to CreateFleet, 100 at once, warm process", warm, { most: 50 }),
    ];
  } finally {
    await site.close();
  }
}

/** A world that tells when a launch call that names an old instance was accepted, and what was refused for its rate. */
class LaunchingWorld extends World {
  readonly accepted = new Map<string, number>();
  readonly refused: Record<string, number> = {};
  override async call(service: Service, operation: string, input: object, options?: { signal?: AbortSignal }): Promise<object> {
    try {
      const answer = await super.call(service, operation, input, options);
      if (operation === "CreateFleet")
        for (const old of replacedBy(input)) if (!this.accepted.has(old)) this.accepted.set(old, this.now());
      return answer;
    } catch (error) {
      const name = `${service}:${operation}`;
      if (error instanceof AwsError && /^(Throttling|RequestLimitExceeded)$/.test(error.name))
        this.refused[name] = (this.refused[name] ?? 0) + 1;
      throw error;
    }
  }
}

/** Virtual time, AWS's request rates on: how long until every notice's launch call is out, and what it all costs in calls. */
async function wave(count: number, seed: number, isToTheEnd: boolean): Promise<{ rows: Row[]; calls: Calls[] }> {
  const clock = new VirtualClock();
  const world = new LaunchingWorld({ clock, seed, region: REGION, cidr: "10.0.0.0/8" });
  world.buckets = true;
  const queues = world.createQueues();
  const each = Math.ceil(count / GROUPS);
  const groups = makeGroups(world, "web", GROUPS, Math.max(10, 2 * each));
  for (const subnet of world.ec2.subnets.values()) subnet.freeAddresses = 60_000;
  const { running, stop } = startProgram(world, clock, parseConfig(configOf(queues, empty(groups.keys()))));
  await clock.advance(60_000);
  // In no order, as they come.
  const olds = [...groups.values()]
    .flatMap((members) => members.slice(0, each))
    .slice(0, count)
    .map((id) => ({ id, at: world.random.next() }))
    .sort((a, b) => a.at - b.at)
    .map(({ id }) => id);
  const before = { ...world.calls };
  const refusedBefore = { ...world.refused };
  const sinceMs = clock.now();
  const seconds = () => (clock.now() - sinceMs) / 1000;
  for (const id of olds) world.interrupt(id, NOTICE);
  await clock.runUntil(() => world.accepted.size === olds.length || seconds() > 125, 150_000);
  const what = `${number(count, 0)} notices at once, in ${Math.min(count, GROUPS)} groups: last launch call out`;
  const last = (Math.max(...world.accepted.values()) - sinceMs) / 1000;
  const rows = [row(what, "virtual s", [last], { digits: 1 })];
  const missing = olds.length - world.accepted.size;
  if (missing) rows.push(row("  not named by any launch call before their deadline", "notices", [missing]));
  const calls: Calls = {};
  if (isToTheEnd) {
    const spent = (name: string) => ((world.calls[name] ?? 0) - (before[name] ?? 0)) / count;
    await clock.runUntil(() => olds.every((id) => world.instance(id).group === undefined), 600_000);
    rows.push(row("  last old one out of its group", "virtual s", [seconds()], { digits: 1 }));
    for (const name of Object.keys(world.calls)) {
      const refused = ((world.refused[name] ?? 0) - (refusedBefore[name] ?? 0)) / count;
      if (spent(name) > 0) calls[name] = { out: spent(name), refused, story: 0 };
    }
    const isQuiet = () =>
      [queues.interruption, queues.detach, queues.termination].every((url) => world.sqs.queues.get(url)?.messages.size === 0);
    await clock.runUntil(isQuiet, 1_800_000);
    rows.push(row("  last message gone", "virtual s", [seconds()], { digits: 1 }));
    for (const name of Object.keys(world.calls))
      if (spent(name) > 0) calls[name] = { out: 0, refused: 0, ...calls[name], story: spent(name) };
  }
  stop();
  await clock.advance(20_000);
  await running;
  return { rows, calls: isToTheEnd ? [calls] : [] };
}

async function waves(isFull: boolean): Promise<{ rows: Row[]; calls: Calls[] }> {
  const all: { rows: Row[]; calls: Calls[] }[] = [];
  for (const seed of [1, 2, 3]) for (const count of [10, 100, 1_000]) all.push(await wave(count, seed, count === 1_000));
  if (isFull) all.push(await wave(10_000, 1, false));
  return { rows: all.flatMap((one) => one.rows), calls: all.flatMap((one) => one.calls) };
}

/** Does so for each, so many at a time. */
async function each<T>(items: T[], parallel: number, act: (item: T) => Promise<unknown>): Promise<void> {
  const rest = items.values();
  await Promise.all(
    Array.from({ length: parallel }, async () => {
      for (const item of rest) await act(item);
    }),
  );
}

const NODES = 100;
const PODS_A_NODE = 30;
/** From a replacement's launch to its node in the cluster, and from an eviction to the pod's end. */
const JOIN_MS = 30_000;
const POD_ENDS = "5s";

/** A node for each member, with its pods; resolves when all of them run. */
async function populate(cluster: Cluster, world: World, ids: string[]): Promise<void> {
  const nodes = ids.map((id) => ({ id, name: world.instance(id).privateDns }));
  await each(nodes, 16, ({ id, name }) => cluster.makeNode({ name, instanceId: id }));
  const pods = nodes.flatMap(({ name }) =>
    Array.from({ length: PODS_A_NODE }, (_, n) => ({ name: `pod-${n}-of-${name}`, node: name })),
  );
  await each(pods, 32, ({ name, node }) =>
    cluster.create({
      apiVersion: "v1",
      kind: "Pod",
      metadata: { name, namespace: "default", annotations: { "max-group.test/ends-after": POD_ENDS } },
      spec: { nodeName: node, containers: [{ name: "main", image: "registry.example/main:1" }] } as object,
    }),
  );
  const pending = async () => {
    const { body } = await cluster.must("GET", "/api/v1/pods?fieldSelector=status.phase%3DPending&limit=1");
    return body.items?.length ?? 0;
  };
  while (await pending()) await sleep(500);
}

/** A hundred nodes are reclaimed at once: the compiled program, AWS with its latency and rates, a real API server. */
async function drain(): Promise<Row[]> {
  const cluster = await startCluster();
  if (!cluster) return [];
  const site = new Site({ latencyMs: [20, 60] });
  try {
    const { world } = site;
    const groups = makeGroups(world, "web", GROUPS, NODES / GROUPS);
    const ids = [...groups.values()].flat();
    await populate(cluster, world, ids);
    const options = {
      k8s_node_drain_option: true,
      k8s_config_file_path: cluster.tokenKubeconfig("max_group", ["system:masters"]),
    };
    const { pid } = await site.start(empty(groups.keys(), options));
    await site.silence();
    const usedBefore = cpuSeconds(pid);
    const fromMs = performance.now();
    for (const id of ids) world.interrupt(id, NOTICE);
    const known = new Set(ids);
    const detachedMs = new Map<string, number>();
    let atDetach = 0;
    await until(140, () => {
      for (const { id, state, launchedAtMs, privateDns: name } of world.ec2.instances.values()) {
        if (known.has(id) || state !== "running" || Date.now() - launchedAtMs < JOIN_MS) continue;
        known.add(id);
        void cluster.makeNode({ name, instanceId: id });
      }
      for (const { what, ids: detached } of world.audit) {
        if (what !== "detach") continue;
        for (const id of detached) {
          if (detachedMs.has(id)) continue;
          detachedMs.set(id, performance.now() - fromMs);
          void cluster.podsOn(world.instance(id).privateDns).then((pods) => {
            atDetach += pods.length;
          });
        }
      }
      return ids.every((id) => detachedMs.has(id));
    });
    const all = [...detachedMs.values()].map((ms) => ms / 1000);
    const { rss } = memoryOf(pid);
    const used = cpuSeconds(pid) - usedBefore;
    await sleep(1_000);
    return [
      row(`${NODES} nodes of ${PODS_A_NODE} pods: first notice to last detach`, "s", [Math.max(...all)], {
        digits: 1,
        most: 120,
      }),
      row("  first detach", "s", [Math.min(...all)], { digits: 1 }),
      row("  pods still there when their node was detached", "pods", [atDetach], { most: 0 }),
      row("  CPU of the program", "s", [used], { digits: 1 }),
      row("  resident memory", "MiB", [rss], { most: 150 }),
    ];
  } finally {
    await site.close();
    await cluster.stop();
  }
}

/** A world at latency 0 whose every call runs in one piece, so that its time can be told from the program's. */
class MeteredWorld extends World {
  spentMs = 0;
  override call(service: Service, operation: string, input: object, { signal }: { signal?: AbortSignal } = {}): Promise<object> {
    const startMs = performance.now();
    try {
      const handler = this[service].operations[operation];
      const clean = parse(operationSchema(service, operation)?.input, input, "", (fault) => {
        throw faultError(service, fault);
      });
      if (!handler) throw new Error(`the simulator has no ${service}:${operation}`);
      return Promise.resolve(handler(clean as never, { signal }));
    } catch (error) {
      return Promise.reject(error);
    } finally {
      this.spentMs += performance.now() - startMs;
    }
  }
}

/** Notices for instances of other people: half in a group that is not configured, half in none. */
async function strangers(): Promise<Row[]> {
  const count = 20_000;
  const clock = new RealClock();
  const world = new MeteredWorld({ clock, region: REGION, cidr: "10.0.0.0/8", latencyMs: [0, 0] });
  const queues = world.createQueues();
  const mine = makeGroups(world, "web", 1, 3);
  const [others = []] = makeGroups(world, "other", 1, count / 2).values();
  const ids = others.flatMap((id) => [id, world.createInstance({}).id]);
  const { running, stop } = startProgram(world, clock, parseConfig(configOf(queues, empty(mine.keys()))));
  await sleep(1_000);
  for (const id of ids) world.interrupt(id, { withoutReclaim: true, keepCapacity: true });
  world.spentMs = 0;
  const startMs = performance.now();
  const left = () => world.sqs.queues.get(queues.interruption)?.messages.size ?? 0;
  await until(120, () => left() === 0);
  const [tookMs, simulatorMs] = [performance.now() - startMs, world.spentMs];
  stop();
  await running;
  return [
    row(`${number(count, 0)} events for strangers, one core`, "s", [tookMs / 1000], {
      digits: 2,
      simulator: [simulatorMs / 1000],
    }),
    row("  a second, simulator included", "events", [(1000 * count) / tookMs]),
    row("  a second, beyond the simulator", "events", [(1000 * count) / (tookMs - simulatorMs)], { least: 2_000 }),
  ];
}

/** Resident memory of the compiled program with so many notices in hand: there is no capacity, so they try again and again. */
async function memory(count: number): Promise<Row[]> {
  const site = new Site();
  try {
    const groups = makeGroups(site.world, "web", GROUPS, Math.max(3, count / GROUPS));
    for (const letter of "abc")
      for (const type of ["m5.large", "m5a.large", "m4.large"]) site.world.pool("spot", type, REGION + letter).capacity = 0;
    const { pid } = await site.start(empty(groups.keys(), { is_enable_od_fallback: false, detaching_delay_seconds: 900 }));
    await site.silence();
    for (const members of groups.values())
      for (const id of members.slice(0, count / GROUPS)) site.world.interrupt(id, { withoutReclaim: true });
    const sentMs = performance.now();
    const messages = () => [...(site.world.sqs.queues.get(site.queues.interruption)?.messages.values() ?? [])];
    // None is deleted before the deadline: what was received once is in hand, also where its lease has lapsed since.
    const inHand = () => messages().filter((m) => m.receiveCount > 0).length;
    for (const endMs = performance.now() + 40_000; inHand() < count && performance.now() < endMs; ) await sleep(50);
    const reached = inHand();
    const reachedMs = performance.now() - sentMs;
    const samples: { rss: number; anonymous: number }[] = [];
    for (let n = 0; n < 10; n++) {
      await sleep(500);
      samples.push(memoryOf(pid));
    }
    const middle = (pick: (s: { rss: number; anonymous: number }) => number) => quantile(samples.map(pick), 0.5);
    return [
      row(`resident memory, ${number(count, 0)} messages, no capacity anywhere`, "MiB", [middle((s) => s.rss)], { most: 100 }),
      row("  of it no file's", "MiB", [middle((s) => s.anonymous)]),
      row("  most", "MiB", [Math.max(...samples.map((s) => s.rss))]),
      row("  in hand by then", "messages", [reached]),
      row("  received more than once, for their lease had lapsed", "messages", [
        messages().filter((m) => m.receiveCount > 1).length,
      ]),
      row("  until all were in hand", "s", [reachedMs / 1000], { digits: 1 }),
    ];
  } finally {
    await site.close();
  }
}

/** How many entries each map of the program's state has; those that grow with the groups are left out. */
const mapsOf = (state: State) =>
  Object.entries(state).flatMap(([name, field]): [string, number][] =>
    (field instanceof Map || field instanceof Set) && name !== "groups" && name !== "lanes" ? [[name, field.size]] : [],
  );

/** An interruption a minute, virtual time. The program's own part of the heap is what goes when it is let go. */
async function soak(minutes: number): Promise<Row[]> {
  const clock = new VirtualClock();
  const world = new World({ clock, seed: 1, region: REGION });
  const queues = world.createQueues();
  const groups = makeGroups(world, "web", GROUPS, 5);
  const heap = async () => {
    for (let n = 0; n < 3; n++) {
      Bun.gc(true);
      await sleep(10);
    }
    return heapStats().heapSize / 2 ** 20;
  };
  // In a function of its own: a variable of this one would hold the program to the end, whatever it is set to.
  const live = async () => {
    const { ctx, running, stop } = startProgram(world, clock, parseConfig(configOf(queues, empty(groups.keys()))));
    await clock.advance(60_000);
    for (let minute = 0; minute < minutes; minute++) {
      const members = [...world.autoscaling.groups.values()].flatMap((group) => [...group.members.values()]);
      const steady = members.filter((m) => m.state === "InService" && m.instance.tags.get("spotmax:attached") !== "");
      const chosen = steady[Math.floor(world.random.next() * steady.length)];
      if (chosen) world.interrupt(chosen.instance.id, NOTICE);
      await clock.advance(60_000);
    }
    const all = await heap();
    const maps = mapsOf(ctx.state);
    stop();
    await clock.advance(60_000);
    await running;
    return { all, maps };
  };
  const { all, maps } = await live();
  const rest = await heap();
  return [
    row(`heap after ${minutes} minutes, an interruption a minute`, "MiB", [all], { digits: 1, simulator: [rest] }),
    row("  the program's own part", "KiB", [(all - rest) * 1024]),
    ...maps.map(([name, size]) => row(`  state.${name}`, "entries", [size])),
  ];
}

/** Nothing happens. */
async function idle(): Promise<Row[]> {
  const clock = new VirtualClock();
  const world = new World({ clock, region: REGION });
  const queues = world.createQueues();
  const names = makeGroups(world, "web", 1, 3).keys();
  const { running, stop } = startProgram(world, clock, parseConfig(configOf(queues, empty(names))));
  await clock.advance(60_000);
  const before = { ...world.calls };
  await clock.advance(3_600_000);
  const count = (service: string) =>
    Object.entries(world.calls).reduce((sum, [name, n]) => sum + (name.startsWith(service) ? n - (before[name] ?? 0) : 0), 0);
  const requests = [
    row("idle: SQS requests an hour", "requests", [count("sqs:")], { most: 540 }),
    row("idle: EC2 and Auto Scaling requests an hour", "requests", [count("ec2:") + count("autoscaling:")]),
  ];
  stop();
  await clock.advance(20_000);
  await running;
  const site = new Site();
  try {
    const groups = makeGroups(site.world, "web", 1, 3);
    const pids: number[] = [];
    for (let n = 0; n < 3; n++) pids.push((await site.start(empty(groups.keys()))).pid);
    await sleep(10_000);
    const used = pids.map(cpuSeconds);
    await sleep(20_000);
    const hour = pids.map((pid, n) => (cpuSeconds(pid) - (used[n] ?? 0)) * 180);
    const memory = pids.map(memoryOf);
    return [
      ...requests,
      row("idle: CPU seconds an hour, of 20 s", "s", hour, { digits: 1 }),
      row(
        "resident memory, idle for half a minute",
        "MiB",
        memory.map((m) => m.rss),
        { most: 100 },
      ),
      row(
        "  of it no file's",
        "MiB",
        memory.map((m) => m.anonymous),
      ),
    ];
  } finally {
    await site.close();
  }
}

const SECTIONS: Record<string, Section> = {
  start: { times: 1, run: start },
  notices: { times: 3, run: notices },
  waves: { times: 1, run: waves },
  strangers: { times: 3, run: strangers },
  memory1000: { times: 3, run: () => memory(1_000) },
  memory10000: { times: 2, run: () => memory(10_000) },
  drain: { times: 1, run: drain },
  soak10: { times: 3, run: () => soak(10) },
  soak60: { times: 3, run: () => soak(60) },
  idle: { times: 1, run: idle },
};

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────

/** Runs one section in a process of its own. */
async function runSection(name: string, isFull: boolean): Promise<{ rows: Row[]; calls: Calls[] } | undefined> {
  const taskset = name === "strangers" && Bun.which("taskset") ? ["taskset", "-c", "0"] : [];
  const child = Bun.spawn([...taskset, process.execPath, import.meta.path, `--run=${name}`, ...(isFull ? ["--full"] : [])], {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    timeout: isFull ? 1_800_000 : 300_000,
  });
  const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (child.exitCode === 0) return JSON.parse(stdout);
  console.log(`${name}: ${child.exitCode === null ? "did not end" : stderr.trim().split("\n").slice(-12).join("\n")}`);
  return undefined;
}

const number = (x: number | undefined, digits: number) =>
  x === undefined || Number.isNaN(x)
    ? ""
    : x.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
/** Columns as wide as they must be; the first one to the left. */
function print(table: string[][]): void {
  const widths = (table[0] ?? []).map((_, column) => Math.max(...table.map((cells) => (cells[column] ?? "").length)));
  for (const cells of table)
    console.log(
      cells
        .map((cell, n) => (n ? cell.padStart(widths[n] ?? 0) : cell.padEnd(widths[0] ?? 0)))
        .join("  ")
        .trimEnd(),
    );
}

function tableOf(rows: Row[]): string[][] {
  let above = "";
  const byPlace = Map.groupBy(rows, ({ what }) => {
    if (!what.startsWith(" ")) above = what;
    return `${above} ${what}`; // an indented row belongs to the one above it
  });
  return [...byPlace.values()].flatMap((same) => {
    const [first] = same;
    if (!first) return [];
    const { what, digits, unit, most, least } = first;
    const runs = same.flatMap((r) => r.runs);
    const simulator = same.flatMap((r) => r.simulator ?? []);
    const median = quantile(runs, 0.5);
    const isMet = median <= (most ?? Number.POSITIVE_INFINITY) && median >= (least ?? Number.NEGATIVE_INFINITY);
    const goal = most !== undefined ? `<= ${number(most, 0)}` : least !== undefined ? `>= ${number(least, 0)}` : "";
    const range = runs.length > 1 ? `${number(Math.min(...runs), digits)} – ${number(Math.max(...runs), digits)}` : "";
    const share = simulator.length ? number(quantile(simulator, 0.5), digits) : "";
    return [[what, number(median, digits), range, share, unit, String(runs.length), goal, isMet ? "" : "missed"]];
  });
}

function callsTable(calls: Calls[]): string[][] {
  const names = [...new Set(calls.flatMap((one) => Object.keys(one)))].sort();
  const median = (of: string[], pick: "out" | "refused" | "story") =>
    quantile(
      calls.map((one) => of.reduce((sum, name) => sum + (one[name]?.[pick] ?? 0), 0)),
      0.5,
    );
  const line = (title: string, of: string[], goal = "") => [
    title,
    ...(["out", "refused", "story"] as const).map((pick) => number(median(of, pick), 3)),
    goal,
  ];
  const isSqs = (name: string) => name.startsWith("sqs:");
  return [
    ["calls a notice, 1,000 at once in 20 groups", "until the last is out", "of it refused", "whole story", "goal"],
    ...names.map((name) => line(`  ${name}`, [name])),
    line(
      "EC2 and Auto Scaling together",
      names.filter((name) => !isSqs(name)),
      "<= 0.5 until the last is out",
    ),
    line("SQS", names.filter(isSqs)),
  ];
}

async function main(): Promise<void> {
  const args = process.argv.slice(2);
  const isFull = args.includes("--full");
  const only = args.find((arg) => arg.startsWith("--run="))?.slice("--run=".length);
  if (only !== undefined) {
    const found = await SECTIONS[only]?.run(isFull);
    await Bun.write(Bun.stdout, JSON.stringify(Array.isArray(found) ? { rows: found, calls: [] } : found));
    process.exit(0); // worlds that are over have timers still
  }
  if (!existsSync(BINARY)) throw new Error(`${BINARY} is missing: \`make build\` makes it`);
  const wanted = args.filter((arg) => !arg.startsWith("--"));
  const load = () => loadavg()[0]?.toFixed(1);
  console.log(`Bun ${Bun.version}, ${cpus().length} cores of ${cpus()[0]?.model}, load ${load()} at the start`);
  const rows: Row[] = [];
  const calls: Calls[] = [];
  for (const [name, { times }] of Object.entries(SECTIONS)) {
    if (wanted.length && !wanted.includes(name)) continue;
    for (let n = 0; n < times; n++) {
      if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${name} ${n + 1} of ${times}`);
      const found = await runSection(name, isFull);
      rows.push(...(found?.rows ?? []));
      calls.push(...(found?.calls ?? []));
    }
  }
  if (process.stderr.isTTY) process.stderr.write("\r\x1b[K");
  console.log(`load ${load()} at the end\n`);
  print([["", "median", "least – most", "simulator", "unit", "runs", "goal", ""], ...tableOf(rows)]);
  if (calls.length) console.log();
  if (calls.length) print(callsTable(calls));
}
await main();

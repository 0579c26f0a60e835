// The stage of the compiled binary: a world served over HTTP on a port of its own, its configuration in the world's
// S3, and daemons as child processes in a temporary folder. Real seconds, made few: what AWS takes minutes for takes a
// second or two, notices arrive late (with the time of an earlier second), and the delayed message that stands at the
// very end, a minute after the deadline, is checked and then let through at once.
import { expect } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { AwsError } from "../aws/basics.ts";
import { RealClock } from "../aws/clock.ts";
import type { Instance } from "../aws/ec2.ts";
import { type Served, serve } from "../aws/server.ts";
import { type CapacitySample, type Delays, type GroupSpec, isoSeconds, type Queues, type Service, World } from "../aws/world.ts";

export const BINARY = resolve(process.env.MAX_GROUP_BINARY ?? join(import.meta.dir, "../../dist/max_group"));
if (!existsSync(BINARY)) throw new Error(`${BINARY} is missing: \`make build\` makes it`);

export const REGION = "us-east-2";
export const BUCKET = "max-group-conf";
/** What a daemon finds in its environment: nothing of ours, so that no real account can ever be meant. */
export const environment = (folder: string, endpoint: string | undefined): Record<string, string> => ({
  PATH: "/usr/bin:/bin",
  HOME: folder,
  AWS_ACCESS_KEY_ID: "test",
  AWS_SECRET_ACCESS_KEY: "test",
  AWS_EC2_METADATA_DISABLED: "true",
  ...(endpoint === undefined ? {} : { AWS_ENDPOINT_URL: endpoint }),
});

export const only = <T>(list: readonly T[]): T => {
  const [first] = list;
  if (first === undefined || list.length > 1) throw new Error(`one was expected, not ${list.length}`);
  return first;
};
export const first = <T>(list: readonly T[]): T => {
  const [item] = list;
  if (item === undefined) throw new Error("nothing there");
  return item;
};
export const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** Each process has a hundred of its own, and gives none out twice. */
let nextPort = 20_000 + 100 * (process.pid % 120);
/**
 * Listens on a port below the range from which the kernel gives ports to outgoing connections: whoever comes back
 * after an outage finds it free, and no client that calls it meanwhile is connected to itself.
 */
export function listenBelow<T>(listen: (port: number) => T): T {
  for (let tries = 1; ; tries++) {
    try {
      return listen(nextPort++);
    } catch (error) {
      if (tries === 100 || (error as NodeJS.ErrnoException).code !== "EADDRINUSE") throw error;
    }
  }
}

/** Runs the binary to its end. */
export async function runBinary(
  args: string[],
  { env, cwd }: { env: Record<string, string>; cwd: string },
): Promise<{ code: number; stdout: string; stderr: string; tookMs: number }> {
  const startMs = performance.now();
  const child = Bun.spawn([BINARY, ...args], { env, cwd, stdin: "ignore", stdout: "pipe", stderr: "pipe", timeout: 50_000 });
  const [stdout, stderr, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  return { code, stdout, stderr, tookMs: performance.now() - startMs };
}

/** One process of the binary. */
export class Daemon {
  readonly lines: string[] = [];
  readonly #child: Bun.Subprocess<"ignore", "ignore", "pipe">;
  readonly #read: Promise<void>;

  constructor(args: string[], env: Record<string, string>, cwd: string) {
    this.#child = Bun.spawn([BINARY, ...args], { env, cwd, stdin: "ignore", stdout: "ignore", stderr: "pipe" });
    this.#read = this.#collect();
  }
  async #collect(): Promise<void> {
    let rest = "";
    const decoder = new TextDecoder();
    for await (const chunk of this.#child.stderr) {
      const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
      rest = lines.pop() ?? "";
      this.lines.push(...lines);
    }
    if (rest) this.lines.push(rest);
  }
  get pid(): number {
    return this.#child.pid;
  }
  get isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }
  /** Undefined once it has ended. */
  get rssMb(): number | undefined {
    const kib = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${this.#child.pid}/status`, "utf8"))?.[1];
    return kib === undefined ? undefined : Number(kib) / 1024;
  }
  signal(name: "SIGTERM" | "SIGKILL" | "SIGHUP"): void {
    this.#child.kill(name);
  }
  /** Sends the signal and waits for the end; the exit code, or null where a signal ended it. */
  async end(name: "SIGTERM" | "SIGKILL"): Promise<{ code: number | null; tookMs: number }> {
    const startMs = performance.now();
    this.signal(name);
    await this.#child.exited;
    await this.#read;
    return { code: this.#child.signalCode === null ? this.#child.exitCode : null, tookMs: performance.now() - startMs };
  }
  has(text: string | RegExp): boolean {
    return this.lines.some((line) => (typeof text === "string" ? line.includes(text) : text.test(line)));
  }
}

/** A call of the daemons, before its effect or after it and before its answer. */
export type Moment = { call: string; when: "before" | "after"; matches?: (input: object) => boolean };

/** Short, so that a story takes seconds. Zones are not evened out meanwhile: that is another story. */
const SHORT: Partial<Delays> = {
  pendingMs: [800, 1_500],
  attachMs: [200, 500],
  detachMs: [200, 500],
  shuttingDownMs: [500, 1_000],
  replaceMs: [1_000, 2_000],
  reactionMs: [200, 500],
  launchRetryMs: 1_000,
  healthyMs: [500, 1_000],
  drainMs: 1_000,
  rebalanceMs: 3_600_000,
};

/** One after another: a start takes a core for half a second, and its time is measured. */
let starting: Promise<unknown> = Promise.resolve();

export class Scene {
  readonly folder = mkdtempSync(join(tmpdir(), "max_group-e2e-"));
  readonly world: World;
  readonly queues: Queues;
  readonly samples: CapacitySample[] = [];
  readonly daemons: Daemon[] = [];
  /** What the daemons find in their environment beside AWS's variables. */
  readonly env: Record<string, string> = {};
  #served: Served;
  readonly #groups: Record<string, object> = {};
  readonly #before = new Map<string, { sizes: object; capacity: number }>();
  /** Deadlines of the interrupted, ms since 1970. */
  readonly #deadlines = new Map<string, number>();
  #moments: (Moment & { fire: () => Promise<void> })[] = [];
  /** Calls that launch, dry runs aside. */
  readonly launchCalls: object[] = [];
  receives = 0;

  /** What stands before the world, if anything does; the daemons know no other address. */
  readonly #front: { url: string } | undefined;

  constructor(delays: Partial<Delays> = {}, front?: (url: string) => { url: string }) {
    this.#served = listenBelow((port) => this.#serve(port));
    this.#front = front?.(this.#served.url);
    this.world = new World({
      clock: new RealClock(),
      seed: 7,
      region: REGION,
      origin: this.url,
      cidr: "127.0.0.0/16",
      ...SHORT,
      ...delays,
    });
    this.queues = this.world.createQueues();
    this.world.onCapacity((sample) => this.samples.push(sample));
  }
  #serve(port: number): Served {
    return serve({ call: (service, operation, input, options) => this.#call(service, operation, input, options) }, { port });
  }
  get url(): string {
    return this.#front?.url ?? this.#served.url;
  }

  async #call(service: Service, operation: string, input: object, options?: { signal?: AbortSignal }): Promise<object> {
    const call = `${service}:${operation}`;
    if (operation === "ReceiveMessage") this.receives++;
    if ((operation === "CreateFleet" || operation === "RunInstances") && !("DryRun" in input && input.DryRun))
      this.launchCalls.push(input);
    const take = (when: Moment["when"]) => {
      const moment = this.#moments.find((m) => m.call === call && m.when === when && (m.matches?.(input) ?? true));
      this.#moments = this.#moments.filter((m) => m !== moment);
      return moment;
    };
    const before = take("before");
    if (before) {
      await before.fire();
      throw new AwsError("ServiceUnavailable", "the caller is dead, and nothing was done", 503);
    }
    const answer = await this.world.call(service, operation, input, options);
    await take("after")?.fire();
    return answer;
  }

  /** A group that the daemons look after, with these options over short delays. Returns its members' IDs. */
  group(spec: GroupSpec, options: object = {}): string[] {
    this.#groups[spec.name] = { detaching_delay_seconds: 1, ...options };
    const { instanceIds } = this.world.createGroup(spec);
    this.#before.set(spec.name, { sizes: this.#sizes(spec.name), capacity: spec.desired });
    return instanceIds;
  }
  #group(name: string) {
    const group = this.world.autoscaling.groups.get(name);
    if (!group) throw new Error(`the world has no group ${name}`);
    return group;
  }
  #sizes(name: string): object {
    const { min, max, desired, mixed, template, tags, suspended, subnets, newProtected } = this.#group(name);
    const subnetIds = subnets.map((subnet) => subnet.id);
    return structuredClone({ min, max, desired, mixed, template, tags, suspended, subnetIds, newProtected });
  }

  /** The configuration as it stands in the bucket; `change` may do anything to it. */
  configure(change: { queue?: object; system?: object; groups?: Record<string, object> } = {}): void {
    Object.assign(this.#groups, change.groups);
    const queue = (queue_url: string) => ({ queue_url, visibility_timeout_seconds: 20, ...change.queue });
    const config = {
      system: { config_refresh_seconds: 0, ...change.system },
      global: {
        interruption_evt_sqs: queue(this.queues.interruption),
        detach_evt_sqs: queue(this.queues.detach),
        termination_evt_sqs: queue(this.queues.termination),
      },
      groups: this.#groups,
    };
    this.world.s3.put(BUCKET, "service_config.json", JSON.stringify(config, null, 2));
  }

  /** Starts a daemon and waits for its first receive, whose distance from the start is returned. */
  async start(...args: string[]): Promise<{ daemon: Daemon; firstReceiveMs: number }> {
    if (!this.world.s3.buckets.has(BUCKET)) this.configure();
    const run = async () => {
      const [startMs, receives] = [performance.now(), this.receives];
      const env = { ...environment(this.folder, this.url), ...this.env };
      const daemon = new Daemon(["-b", BUCKET, "-r", REGION, ...args], env, this.folder);
      this.daemons.push(daemon);
      let firstReceiveMs = 0;
      await this.until("the first receive", 60, () => {
        if (!daemon.isAlive) throw new Error(`the daemon ended at start:\n${daemon.lines.join("\n")}`);
        if (this.receives > receives) firstReceiveMs ||= performance.now() - startMs;
        return firstReceiveMs > 0 && (args.includes("-l") || daemon.has("start termination handler"));
      });
      return { daemon, firstReceiveMs };
    };
    // A restart waits for nobody: its notice's time runs.
    const result = this.daemons.length > 0 ? run() : starting.then(run);
    starting = Promise.allSettled([starting, result]);
    return result;
  }

  /** A notice of an interruption in `seconds`; the event is on its way for the rest of the two minutes. */
  interrupt(id: string, { seconds = 100, copies = 1, keepCapacity = false } = {}): void {
    const instance = this.world.instance(id);
    const { type, zone, lifecycle } = instance;
    const detail = { "instance-id": id, "instance-action": "terminate" };
    const resources = [`arn:aws:ec2:${zone}:instance/${id}`];
    const event: object = JSON.parse(this.world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", resources, detail));
    const time = isoSeconds(Date.now() + (seconds - 120) * 1000);
    const deadlineMs = Date.parse(time) + 120_000;
    for (let n = 0; n < copies; n++) this.world.sendRaw(this.queues.interruption, JSON.stringify({ ...event, time }));
    this.#deadlines.set(id, deadlineMs);
    if (!keepCapacity) this.world.pool(lifecycle, type, zone).capacity = 0;
    this.world.at(deadlineMs, () => this.world.ec2.reclaim(instance, "terminate"));
  }
  deadlineMs(id: string): number {
    return this.#deadlines.get(id) ?? Number.NaN;
  }

  /** The pools of these types in every zone of the region, both lifecycles or one. */
  pools(types: string[], ...lifecycles: ("spot" | "on-demand")[]) {
    return lifecycles.flatMap((l) => types.flatMap((type) => [..."abc"].map((zone) => this.world.pool(l, type, REGION + zone))));
  }

  /** Nobody answers for so long: connections are cut, new ones refused. */
  async outage(ms: number): Promise<void> {
    const port = Number(new URL(this.#served.url).port);
    await this.#served.stop();
    await sleep(ms);
    this.#served = this.#serve(port);
  }

  async until(what: string, seconds: number, done: () => boolean): Promise<void> {
    const endMs = performance.now() + seconds * 1000;
    while (!done()) {
      if (performance.now() > endMs)
        throw new Error(`${what}: not within ${seconds} s\n${this.daemons.flatMap((d) => d.lines.slice(-30)).join("\n")}`);
      await sleep(20);
    }
  }

  /** Does this at that moment, before the call goes on; resolves once it is done. */
  at(moment: Moment, act: () => Promise<unknown>): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const fire = async () => {
      await act();
      resolve();
    };
    this.#moments.push({ ...moment, fire });
    return promise;
  }
  /** Kills the daemon with signal 9 at that moment; resolves once it is dead. */
  killAt(daemon: Daemon, moment: Moment): Promise<void> {
    return this.at(moment, () => daemon.end("SIGKILL"));
  }
  /** Resolves at that moment, and disturbs nothing; the effect of a call noticed before it is yet to come. */
  reached(call: string): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.world.intercept = (made) => {
      if (`${made.service}:${made.operation}` === call && !("DryRun" in made.input && made.input.DryRun)) resolve();
      return undefined;
    };
    return promise;
  }

  /** Delivers what a queue holds back. */
  hurry(url: string): void {
    const queue = this.world.sqs.queues.get(url);
    for (const message of queue?.messages.values() ?? []) {
      if (message.receiptHandle !== undefined || message.visibleAtMs <= Date.now()) continue;
      message.visibleAtMs = Date.now();
      message.version++; // its entry in the queue's heap is void
      queue?.ready.push(message);
    }
    for (const wake of [...(queue?.pollers ?? [])]) wake();
  }
  /** How many messages the queue holds, in whatever state. */
  depth(url: string): number {
    const { visible, delayed, inFlight } = this.world.queueDepth(url);
    return visible + delayed + inFlight;
  }

  claims(): Instance[] {
    return [...this.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces"));
  }
  isLiving = (i: Instance) => i.state === "pending" || i.state === "running";
  /** Every claim is settled, every maximum and protection is back, every group is full, and the first two queues are empty. */
  isSettled(): boolean {
    return (
      this.claims().every((i) => !this.isLiving(i) || i.tags.has("spotmax:attached")) &&
      [...this.world.autoscaling.groups.values()].every(
        ({ tags, members, desired, newProtected }) =>
          !tags.has("spotmax:max_size") &&
          [...members.values()].every((m) => m.state === "InService" && m.protected === newProtected) &&
          [...members.values()].reduce((units, m) => units + m.weight, 0) === desired,
      ) &&
      this.depth(this.queues.interruption) + this.depth(this.queues.detach) === 0
    );
  }
  least(name: string): number {
    return Math.min(...this.samples.filter((s) => s.group === name).map((s) => s.inService));
  }

  /**
   * Waits for the end of the story, looks at the last message, lets it through, stops the daemons, and checks all that
   * must hold when all is quiet. `olds` are the interrupted, each replaced once; a number in `launches` where it is not
   * as many as these.
   */
  async finish(
    olds: string[],
    {
      seconds = 200,
      launches = olds.length,
      dips = false,
      deadLetters = 0,
      toTheVeryEnd = false,
      replaced = true,
      onTime = true,
    }: {
      seconds?: number;
      launches?: number | "any";
      dips?: boolean;
      deadLetters?: number;
      toTheVeryEnd?: boolean;
      replaced?: boolean;
      /** The last message is due a minute after the deadline. */
      onTime?: boolean;
    } = {},
  ): Promise<void> {
    const gone = () => olds.every((id) => this.world.instance(id).group === undefined);
    await this.until("everything settled", seconds, () => this.isSettled() && gone());
    if (!toTheVeryEnd) {
      if (onTime) this.#checkLastMessages(olds);
      this.hurry(this.queues.termination);
    }
    await this.until("the last message handled", 130, () => this.depth(this.queues.termination) === 0);
    for (const daemon of this.daemons.filter((d) => d.isAlive)) {
      const { code, tookMs } = await daemon.end("SIGTERM");
      expect([code, tookMs < 10_000]).toEqual([0, true]);
    }
    this.#check(olds, launches, dips, deadLetters, replaced);
  }

  /** What waits in the termination queue is due a minute after its instance's deadline, and names every one of ours. */
  #checkLastMessages(olds: string[]): void {
    const named = new Set<string>();
    for (const { body, visibleAtMs, receiptHandle } of this.world.sqs.queues.get(this.queues.termination)?.messages.values() ??
      []) {
      const message: { "detail-type": string; detail: { "instance-id": string } } = JSON.parse(body);
      const id = message.detail["instance-id"];
      expect(message["detail-type"]).toBe("MaxGroup Termination");
      named.add(id);
      if (receiptHandle !== undefined || !this.#deadlines.has(id)) continue; // not the last wait of an interruption
      // Late by as much as it took to send it.
      expect(visibleAtMs - this.deadlineMs(id) - 60_000).toBeWithin(-1_000, 15_000);
    }
    const due = olds.filter((id) => Date.now() < this.deadlineMs(id) + 50_000);
    expect(due.filter((id) => !named.has(id))).toEqual([]);
  }

  #check(olds: string[], launches: number | "any", dips: boolean, deadLetters: number, replaced: boolean): void {
    const living = [...this.world.ec2.instances.values()].filter(this.isLiving);
    const replacedBy = (i: Instance): string | undefined => {
      const names = (i.tags.get("spotmax:replaces") ?? "").split(" ").filter(Boolean);
      return names.length < 2 ? names[0] : names[(i.tags.get("spotmax:order") ?? "").split(" ").indexOf(i.id)];
    };
    if (launches !== "any") expect(["launched", this.claims().length]).toEqual(["launched", launches]);
    if (replaced) {
      const places = olds.map((old) => [old, living.filter((i) => i.group !== undefined && replacedBy(i) === old).length]);
      expect(places).toEqual(olds.map((old) => [old, 1]));
    }
    const leaks = living.filter(
      (i) => i.group === undefined && (i.tags.has("spotmax:replaces") || i.tags.has("spotmax:detached")),
    );
    expect(leaks.map((i) => i.id)).toEqual([]);
    for (const [name, before] of this.#before) {
      expect([name, this.#sizes(name)]).toEqual([name, before.sizes]);
      const members = [...this.#group(name).members.values()];
      expect([name, members.reduce((units, m) => units + m.weight, 0)]).toEqual([name, before.capacity]);
      expect(members.map((m) => m.protected)).toEqual(members.map(() => this.#group(name).newProtected));
      if (dips) continue;
      const own = this.samples.filter((sample) => sample.group === name);
      const least = { inService: this.least(name), serving: Math.min(...own.map((sample) => sample.serving)) };
      expect([name, least]).toEqual([name, { inService: before.capacity, serving: before.capacity }]);
    }
    const { interruption, detach, termination, deadLetter } = this.queues;
    expect([interruption, detach, termination].map((url) => this.depth(url))).toEqual([0, 0, 0]);
    expect(["dead letters", this.depth(deadLetter)]).toEqual(["dead letters", deadLetters]);
  }

  /** To be called whatever became of the test. */
  async close(): Promise<void> {
    for (const daemon of this.daemons) if (daemon.isAlive) await daemon.end("SIGKILL");
    await this.#served.stop();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/** A story on a stage of its own, which is cleared away at its end. */
export async function onStage(story: (scene: Scene) => Promise<void>, delays: Partial<Delays> = {}): Promise<void> {
  const scene = new Scene(delays);
  try {
    await story(scene);
  } finally {
    await scene.close();
  }
}

// One life: a fleet, its weather, its faults, its daemons and its operator, all drawn from one seed, against the real
// program under virtual time. A seed and a program give the same life, call for call.
//
// Most lives are mild and some are wild: every feature is drawn by itself, with its own probability, and draws from a
// stream of its own, so that a failing life can be made smaller by leaving features out (`without`) while the others
// stay as they were. One life in five is a quiet one, in which nothing fails and the strict rules hold.
import * as maxgroup from "../../maxgroup.ts";
import { SpotAdvisor } from "../aws/advisor.ts";
import { Random } from "../aws/basics.ts";
import type { VolumeSpec } from "../aws/ebs.ts";
import { AwsError, type Call, type Fault, type GroupSpec, type Service } from "../aws/world.ts";
import { Agents, CONSUL_PORT } from "./consul.ts";
import type { Account } from "./data.ts";
import { type Daemon, type Program, Stage } from "./harness.ts";
import { type Expected, type Finding, type Traits, Watch } from "./invariants.ts";
import { FakeKube, KUBECONFIG, type KubeFault } from "./kube.ts";

/** How often each feature is there in a life that is not a quiet one. */
const FEATURES = {
  /** Several instances at once. */
  waves: 0.4,
  rebalance: 0.4,
  health: 0.2,
  /** Events for instances of nobody we look after, and of kinds that are not for us. */
  strangers: 0.3,
  poison: 0.25,
  /** The same event twice, at once or minutes later. */
  duplicates: 0.35,
  /** Events that are under way for long, and notices that leave less than two minutes. */
  late: 0.25,
  /** Notices that nothing follows, with or without a time. */
  rehearsals: 0.2,
  /** Our own replacements are interrupted as well, attached or not. */
  replacements: 0.3,
  /** Pools come and go; without it a reclaimed pool has capacity again at once. */
  droughts: 0.4,
  /** Replacements that die before they run. */
  stillborn: 0.15,
  capacityErrorsAsCall: 0.15,
  /** The order of instances in a fleet's answer is nobody's promise. */
  shuffled: 0.3,
  throttles: 0.3,
  errors: 0.3,
  hangs: 0.15,
  slowness: 0.2,
  /** Receives that hang: apart, because a daemon that hears nothing is a matter of its own. */
  deafness: 0.1,
  stale: 0.3,
  latency: 0.2,
  buckets: 0.2,
  /** SQS as a standard queue may be: copies, order, parts of a batch, deletes that are lost. */
  sqs: 0.3,
  lostDeletes: 0.15,
  daemons: 0.4,
  skew: 0.3,
  kills: 0.4,
  sigterms: 0.2,
  /** Desired, minimum and maximum change, processes are suspended and resumed. */
  operator: 0.25,
  /** Members are detached, ended or put into Standby by hand. */
  meddling: 0.2,
  removal: 0.05,
  /** A group leaves the configuration and comes back. */
  reconfiguration: 0.08,
  /** Members younger than ten minutes. */
  young: 0.15,
  big: 0.06,
  /** Groups whose data volume moves with the instance. */
  volumes: 0.35,
  /** Snapshots that outlast an instance, or fail; instances and volumes that hang on their way out. */
  slowVolumes: 0.3,
  /** A whole zone has no spot capacity: the data cannot stay where it is. */
  zoneDroughts: 0.3,
  /** One instance, its replacement, and the replacement of that, each with its notice, here and there. */
  generations: 0.25,
  /** Groups with preaction, and fallbacks that go back to spot early. */
  preaction: 0.35,
  /** The configuration is read from S3 every minute; now and then S3 is away, or what lies there is broken. */
  s3: 0.25,
  /** A member is put in Standby, and then interrupted. */
  aside: 0.15,
  /** Groups whose nodes are drained, in a cluster with pods that end late, or that a budget holds. */
  pods: 0.25,
  /** Groups whose services leave Consul. */
  consul: 0.25,
  /** The cluster and the agents are away, slow, busy, or fail. */
  outages: 0.5,
  /** Describes whose first page is empty, with more behind it. */
  emptyPages: 0.15,
  /** Daemons that die as they change something: before the call, while it is out, or as its answer comes. */
  deaths: 0.25,
  /** Answers that never come, to calls that take effect, at once or when their caller has given up. */
  unanswered: 0.15,
} as const;
export type Feature = keyof typeof FEATURES;
export const featureNames = Object.keys(FEATURES) as Feature[];
/** Younger than the rest: each is drawn from a stream of its own, so that the lives of before stay as they were. */
const LATER = new Set<Feature>([
  "volumes",
  "slowVolumes",
  "zoneDroughts",
  "generations",
  "s3",
  "preaction",
  "aside",
  "pods",
  "consul",
  "outages",
  "emptyPages",
  "deaths",
  "unanswered",
]);
/** What a quiet life may have: nothing of it takes anything away. */
const GENTLE = new Set<Feature>([
  "waves",
  "rebalance",
  "health",
  "strangers",
  "poison",
  "duplicates",
  "shuffled",
  "young",
  "big",
  "volumes",
  "preaction",
  "s3",
  "pods",
  "consul",
]);

export interface LifeOptions {
  /** The real program, or a copy with a bug in it. */
  program?: Program;
  /** Keeps the daemons' log and the world's record, in order. */
  log?: boolean;
  without?: readonly Feature[];
  /** These in any case. */
  given?: readonly Feature[];
}
export interface Outcome {
  seed: number;
  features: Feature[];
  isQuiet: boolean;
  findings: Finding[];
  lines: string[];
  /** How long the life was, in virtual minutes, and how long it took to come to rest. */
  minutes: number;
  restMinutes: number;
  launches: number;
  rivals: number;
  calls: number;
  /** What became of the data volumes; undefined where the life did not come to rest. */
  data: Account | undefined;
}

const MINUTE = 60_000;
/** Preaction goes on by itself: as members grow an hour old, one after the other. */
const REST_MINUTES = { usual: 90, unhurried: 240 };
const STEP_MS = 5_000;
const BUCKET = "config";
const CHANGES = [
  "CreateFleet",
  "RunInstances",
  "CreateTags",
  "AttachInstances",
  "DetachInstances",
  "SetInstanceProtection",
  "UpdateAutoScalingGroup",
  "CreateOrUpdateTags",
  "DeleteTags",
  "TerminateInstances",
  "TerminateInstanceInAutoScalingGroup",
  "SendMessageBatch",
  "DeleteMessageBatch",
  "ModifyInstanceAttribute",
  "CreateSnapshot",
  "CreateVolume",
  "AttachVolume",
];
/** How many times as often calls fail in a storm. */
const STORM = 4;
const ZONES = ["us-east-1a", "us-east-1b", "us-east-1c"];
const TYPES = ["m5.large", "m5a.large", "m4.large", "m6i.large", "m6a.large", "c5.large", "c5a.large", "r5.large"];
const HEAVY = ["m5.xlarge", "m5a.xlarge", "m4.xlarge", "m6i.xlarge"];

/** FNV-1a: a stream of numbers for each purpose, so that one does not shift the others. */
function streamOf(seed: number, purpose: string): Random {
  let hash = 0x811c9dc5 ^ (seed < 10 ? 0 : seed); // one digit and its character would cancel out: one life for nine seeds
  for (const character of `${seed} ${purpose}`) hash = Math.imul(hash ^ character.charCodeAt(0), 0x01000193);
  return new Random(hash);
}
function pick<T>(random: Random, list: readonly T[]): T | undefined {
  return list[Math.floor(random.next() * list.length)];
}
function choose<T>(random: Random, ...list: [T, ...T[]]): T {
  return pick(random, list) ?? list[0];
}
function sample<T>(random: Random, list: readonly T[], count: number): T[] {
  const left = [...list];
  const chosen: T[] = [];
  while (chosen.length < count && left.length) chosen.push(...left.splice(Math.floor(random.next() * left.length), 1));
  return chosen;
}

export async function live(seed: number, options: LifeOptions = {}): Promise<Outcome> {
  const life = new Life(seed, options);
  return await life.run();
}

/** A place for a daemon: it is started again there. */
interface Slot {
  daemon: Daemon | undefined;
  skewMs: number;
  alive: boolean;
  /** At how many more await points it is killed. */
  killIn: number | undefined;
  /** At which calls it is killed. */
  killOn: readonly string[];
}

class Life {
  readonly #seed: number;
  readonly #features: Set<Feature>;
  readonly #isQuiet: boolean;
  readonly #stage: Stage;
  readonly #watch: Watch;
  readonly #log: boolean;
  readonly #stretchMs: number;
  readonly #startMs: number;
  readonly #slots: Slot[] = [];
  readonly #program: Program;
  readonly #leftOut = new Map<string, object>();
  /** When notices are due, in ms from the start: that is when accidents hurt. */
  readonly #noticeTimes: number[] = [];
  #isOver = false;
  #spawned = 0;

  constructor(seed: number, { program = maxgroup, log = false, without = [], given = [] }: LifeOptions) {
    this.#seed = seed;
    this.#log = log;
    this.#program = program;
    const random = streamOf(seed, "features");
    this.#isQuiet = random.chance(0.2) && given.every((name) => GENTLE.has(name));
    const mildness = choose(random, 0.25, 0.6, 1, 1.4);
    this.#features = new Set(
      featureNames.filter((name) => {
        const draw = (LATER.has(name) ? streamOf(seed, `feature ${name}`) : random).next();
        if (without.includes(name)) return false;
        if (given.includes(name)) return true;
        return this.#isQuiet ? GENTLE.has(name) && draw < FEATURES[name] : draw < FEATURES[name] * mildness;
      }),
    );
    // Two daemons get in each other's way most where events come in numbers and twice.
    if (this.#features.has("daemons") && random.chance(0.5))
      for (const name of ["duplicates", "waves"] as const) if (!without.includes(name)) this.#features.add(name);
    this.#stretchMs = random.between([10, 30]) * MINUTE;
    const has = (name: Feature) => this.#features.has(name);
    const latency = streamOf(seed, "latency");
    const staleMs = has("stale") ? streamOf(seed, "stale").between([500, 5_000]) : 0;
    this.#stage = new Stage({
      seed,
      program,
      checkOutputs: false,
      staleMs,
      ...(has("latency") && {
        latencyMs: [20, latency.between([200, 1500])] as [number, number],
        attachMs: [1_000, latency.between([5_000, 20_000])] as [number, number],
        healthyMs: [5_000, latency.between([15_000, 40_000])] as [number, number],
        replaceMs: [1_000, latency.between([10_000, 60_000])] as [number, number],
      }),
    });
    this.#startMs = this.#stage.clock.now();
    const skew = streamOf(seed, "skew");
    const count = has("daemons") ? choose(streamOf(seed, "daemons"), 2, 2, 3) : 1;
    const skews = Array.from({ length: count }, () => (has("skew") ? skew.between([-20_000, 20_000]) : 0));
    const isFaulty = this.#isFaulty();
    const isShaken = ["kills", "deaths", "sigterms", "sqs", "lostDeletes"].some((f) => has(f as Feature));
    const isOperated = ["operator", "meddling", "removal", "reconfiguration", "aside"].some((f) => has(f as Feature));
    const traits: Traits = {
      strict: this.#isQuiet,
      prompt: !isFaulty && !isShaken && !has("stale") && !has("latency") && !has("skew") && !isOperated,
      // Two latencies and what else a batch reads; a slow or repeated call may take a minute and a half.
      lagMs: 3_000 + staleMs + (has("latency") ? 10_000 : 0) + (isFaulty ? 120_000 : 0),
      spreadMs: Math.max(0, ...skews) + Math.max(0, ...skews.map((ms) => -ms)),
      alone: !has("daemons") && !isShaken && !has("stale"),
      served: !has("outages"),
      deadLetters: isFaulty || isShaken,
    };
    this.#watch = new Watch(this.#stage.world, this.#stage.queues, traits);
    if (log) this.#keepRecord();
    this.#makeFleet();
    this.#makeFaults();
    this.#makeAdvisor();
    this.#makeCluster();
    this.#makeAgents();
    for (const skewMs of skews) this.#spawn(skewMs);
    this.#makeWeather();
    this.#makeMarket();
    this.#makeOperator();
    this.#makeAccidents();
  }

  async run(): Promise<Outcome> {
    const { clock } = this.#stage;
    const endMs = this.#startMs + this.#stretchMs;
    while (clock.now() < endMs && !this.#watch.findings.length) await clock.advance(STEP_MS);
    const calmMs = clock.now();
    this.#calm();
    const data = await this.#rest();
    for (const { daemon } of this.#slots) daemon?.kill(); // what is left of it must not go on
    return {
      seed: this.#seed,
      features: [...this.#features],
      isQuiet: this.#isQuiet,
      findings: this.#watch.findings,
      lines: this.#stage.lines,
      minutes: Math.round((clock.now() - this.#startMs) / MINUTE),
      restMinutes: Math.round((clock.now() - calmMs) / MINUTE),
      launches: this.#watch.claims.size,
      rivals: this.#watch.rivals,
      calls: Object.values(this.#stage.world.calls).reduce((sum, n) => sum + n, 0),
      data,
    };
  }

  /** Until nothing moves for a while; not to come to rest is a failure. */
  async #rest(): Promise<Account | undefined> {
    const { clock } = this.#stage;
    // Fallbacks go back to spot one after the other, with all the delays of their group.
    const fallbacks = [...this.#stage.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:fallback") && i.group);
    // So do those without a hard deadline, one at a time.
    const isUnhurried = (["preaction", "rebalance", "health"] as const).some((name) => this.#features.has(name));
    const restMinutes = REST_MINUTES[isUnhurried ? "unhurried" : "usual"] + 30 * fallbacks.length;
    const endMs = clock.now() + restMinutes * MINUTE;
    let calmSteps = 0;
    for (let why: string | undefined = "not looked yet"; ; ) {
      if (this.#watch.findings.length) return undefined;
      if (clock.now() > endMs) {
        this.#watch.find("quiet", `no rest after ${restMinutes} minutes: ${why}`);
        return undefined;
      }
      await clock.advance(STEP_MS);
      why = this.#watch.unrest(this.#stage.lines);
      calmSteps = why ? 0 : calmSteps + 1;
      if (calmSteps >= 8) return this.#watch.final();
    }
  }

  /** The weather is over: no more faults, capacity everywhere, all daemons up. */
  #calm(): void {
    const { world } = this.#stage;
    this.#isOver = true;
    world.intercept = undefined;
    world.buckets = false;
    world.delays.staleMs = 0;
    world.ec2.dieWhilePending = undefined;
    Object.assign(world.sqs.unreliability, { duplicates: 0, reorder: 0, partialReceives: 0 });
    this.#rain();
    for (const name of world.autoscaling.groups.keys()) this.#resume(name);
    for (const slot of this.#slots) Object.assign(slot, { killIn: undefined, killOn: [] });
    for (const name of [...this.#leftOut.keys()]) this.#takeIn(name);
    // A replacement that he has put aside would have its old one wait for him.
    for (const { members } of world.autoscaling.groups.values())
      for (const { instance, state } of [...members.values()])
        if (state === "Standby" && this.#watch.claims.has(instance.id) && !instance.tags.has("spotmax:attached"))
          this.#watch.operate("ec2", "TerminateInstances", { InstanceIds: [instance.id] });
    this.#mend();
  }

  // --- The fleet -------------------------------------------------------------------------------------------------

  #makeFleet(): void {
    const random = streamOf(this.#seed, "fleet");
    const has = (name: Feature) => this.#features.has(name);
    const count = has("big") ? random.between([5, 20]) : choose(random, 1, 1, 1, 2, 2, 3, 4);
    for (let n = 0; n < count; n++) this.#makeGroup(random, `g${n + 1}`, true);
    if (has("strangers")) this.#makeGroup(random, "other", false);
    if (has("strangers"))
      for (let n = 0; n < 2; n++) this.#stage.world.createInstance({ zone: choose(random, "us-east-1a", "us-east-1b") });
  }

  #makeGroup(random: Random, name: string, isConfigured: boolean): void {
    const { world } = this.#stage;
    const members = random.chance(0.75) ? random.between([1, 4]) : random.between([5, 12]);
    const kind = choose(
      random,
      "mixed",
      "mixed",
      "mixed",
      "partly on-demand",
      "weighted",
      "attributes",
      "on-demand",
      "asks for spot",
    );
    const isWeighted = kind === "weighted";
    const desired = isWeighted ? members * 2 : members;
    const min = random.chance(0.5) ? desired : random.between([0, desired]);
    const max = random.chance(0.5) ? desired : desired + random.between([1, 6]);
    const zones = sample(random, ZONES, random.between([1, 3])).sort();
    const isProtected = random.chance(0.15);
    // Where nothing may fail, a pool alone in its group has a neighbour.
    const isPlain = kind === "on-demand" || kind === "asks for spot";
    const types = isPlain
      ? sample(random, TYPES, 1)
      : isWeighted
        ? HEAVY.slice(0, random.between([2, 4]))
        : sample(random, TYPES, random.between([2, 4]));
    const isSuspended = random.chance(0.03);
    const spec: GroupSpec = {
      name,
      min,
      max,
      desired,
      zones,
      protected: isProtected,
      types: isWeighted ? ["m5.large", "m5a.large", ...types] : types,
      ...(isWeighted && {
        weights: Object.fromEntries([["m5.large", 1] as const, ["m5a.large", 1] as const, ...types.map((t) => [t, 2] as const)]),
      }),
      ...(kind === "attributes" && {
        overrides: [{ InstanceRequirements: { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 4096 } } }],
      }),
      ...(kind === "partly on-demand" && { onDemandBase: random.between([0, 2]), onDemandPercentage: random.between([0, 60]) }),
      ...(kind === "asks for spot" && { template: { InstanceMarketOptions: { MarketType: "spot" as const } } }),
      ...(random.chance(0.3) && { targetGroups: random.chance(0.2) ? [`${name}-a`, `${name}-b`] : [`${name}-a`] }),
      suspended: [...(random.chance(0.2) ? ["AZRebalance"] : []), ...(isSuspended ? ["Launch"] : [])],
      ...(random.chance(0.2) && { tags: { team: "blue" } }),
    };
    const isSlow = streamOf(this.#seed, `slow ${name}`).chance(0.05);
    const options = {
      detaching_delay_seconds: choose(random, 0, 10, 20, 20, 60, 300),
      is_enable_od_fallback: random.chance(0.8),
      max_num_of_terminated_one_time: choose(random, 1, 1, 2, 4),
      preaction_detach_delay_seconds: choose(random, 0, 10, 10, 120),
      // Longer than SQS delays a message, at times.
      preaction_termination_delay_seconds: Math.max(choose(random, 0, 10, 10, 300), isSlow ? 1_000 : 0),
      is_to_handle_rebalance_event: random.chance(0.7),
      is_to_handle_maintenance_event: random.chance(0.7),
      ...(random.chance(0.2) && { alt1: "m5n.large" }),
      ...this.#preactionOptions(name),
      ...this.#serviceOptions(name),
    };
    this.#watch.groups.set(name, {
      configured: isConfigured,
      rebalance: options.is_to_handle_rebalance_event,
      maintenance: options.is_to_handle_maintenance_event,
      min,
      max,
      desired,
      below: 0,
      above: 0,
      floor: desired,
      protects: isProtected,
      fallback: options.is_enable_od_fallback,
      drained: "k8s_node_drain_option" in options,
      graceMs: (options.k8s_node_drain_grace_second ?? 0) * 1000,
      consul: "consul_port" in options,
      limit: options.max_num_of_terminated_one_time,
      detachMs: options.detaching_delay_seconds * 1000,
      softDetachMs: options.preaction_detach_delay_seconds * 1000,
      softEndMs: options.preaction_termination_delay_seconds * 1000,
      weighted: isWeighted,
      balancing: 0,
      resized: false,
      cut: 0,
      deleted: false,
      pausedUntilMs: isSuspended ? Number.POSITIVE_INFINITY : 0,
      outUntilMs: 0,
    });
    const data = isConfigured ? this.#makeVolumes(name) : undefined;
    const ids = isConfigured
      ? this.#stage.group(
          { ...spec, ...(data && { volumes: [data] }) },
          { ...options, ...(data && { persistence_dev: data.device }) },
        )
      : world.createGroup(spec).instanceIds;
    if (data) this.#watch.data.enrol(name, data.device, ids);
    // Where things fail, whoever finishes what another has begun takes it to be as its group has them.
    const byHand = streamOf(this.#seed, `protection ${name}`);
    for (const id of this.#isQuiet ? ids.filter(() => byHand.chance(0.2)) : []) {
      const member = world.autoscaling.groups.get(name)?.members.get(id);
      if (member) member.protected = !isProtected;
      this.#watch.byHand.add(id);
    }
    if (this.#features.has("young"))
      for (const id of ids)
        if (random.chance(0.5)) world.instance(id).launchedAtMs = this.#startMs - random.between([0, 9 * MINUTE]);
  }

  /** The data volume in a group's template, if it is such a group. */
  #makeVolumes(name: string): VolumeSpec | undefined {
    const random = streamOf(this.#seed, `volumes ${name}`);
    if (!this.#features.has("volumes") || random.chance(0.25)) return undefined;
    const spec: VolumeSpec = {
      device: choose(random, "/dev/sdf", "/dev/sdf", "/dev/xvdb"),
      sizeGiB: choose(random, 8, 125, 400, 4_000),
      encrypted: random.chance(0.3),
    };
    const type = choose(random, "gp3", "gp3", "gp2", "io2", "standard");
    if (type === "gp3" && random.chance(0.5)) return { ...spec, type, iops: 3_500, throughput: 250 };
    if (type === "io2") return { ...spec, type, iops: 3_000 };
    return { ...spec, type, ...(type === "standard" && { sizeGiB: 400 }) };
  }

  // --- Faults of AWS ---------------------------------------------------------------------------------------------

  #makeFaults(): void {
    const { world } = this.#stage;
    const has = (name: Feature) => this.#features.has(name);
    const random = streamOf(this.#seed, "faults");
    world.emptyFirstPages = has("emptyPages");
    world.buckets = has("buckets");
    if (has("buckets"))
      for (const sizes of Object.values(world.bucketSizes)) sizes[0] = Math.ceil(sizes[0] / random.between([1, 8]));
    world.ec2.capacityErrorsAsCall = has("capacityErrorsAsCall");
    const stillborn = streamOf(this.#seed, "stillborn");
    if (has("stillborn"))
      world.ec2.dieWhilePending = () =>
        stillborn.chance(0.25) ? { Code: "Client.InternalError", Message: "Client error on launch" } : undefined;
    if (has("sqs"))
      Object.assign(world.sqs.unreliability, {
        duplicates: choose(random, 0, 0.02, 0.1),
        reorder: choose(random, 0, 0.3),
        partialReceives: choose(random, 0, 0.3),
      });
    if (has("slowVolumes")) this.#slowVolumes();
    if (has("s3")) this.#breakConfiguration();
    if (has("shuffled")) this.#shuffleAnswers();
    if (has("lostDeletes")) this.#loseDeletes();

    const rates = {
      throttle: has("throttles") ? choose(random, 0.01, 0.05, 0.15) : 0,
      before: has("errors") ? choose(random, 0.005, 0.02, 0.05) : 0,
      after: has("errors") ? choose(random, 0.005, 0.02, 0.05) : 0,
      hang: has("hangs") ? choose(random, 0.002, 0.01, 0.03) : 0,
      slow: has("slowness") ? choose(random, 0.01, 0.05, 0.2) : 0,
    };
    const sum = Object.values(rates).reduce((a, b) => a + b, 0);
    const deafness = has("deafness") ? 0.02 : 0;
    // In a storm in which most calls fail nobody can promise anything within two minutes.
    const isOutage = sum * STORM >= 0.6;
    const isHampered = sum + deafness > 0 || ["kills", "deaths", "sigterms", "sqs", "buckets"].some((f) => has(f as Feature));
    this.#watch.data.patienceMs = isOutage ? Number.POSITIVE_INFINITY : isHampered ? MINUTE : 20_000;
    const own = streamOf(this.#seed, "unanswered");
    const unanswered = has("unanswered") ? choose(own, 0.005, 0.02, 0.05) : 0;
    if (unanswered) this.#watch.data.patienceMs = Math.max(this.#watch.data.patienceMs, MINUTE);
    if (!sum && !deafness && !unanswered) return;
    // Faults come in storms; between them little fails.
    const storms = Array.from({ length: random.between([1, 4]) }, () => random.between([0, this.#stretchMs]));
    const stormMs = random.between([20_000, 240_000]);
    world.intercept = (call) => {
      const sinceMs = world.now() - this.#startMs;
      const strength = storms.some((s) => sinceMs >= s && sinceMs < s + stormMs) ? STORM : 0.5;
      const fault = sum || deafness ? this.#faultOf(call, random, rates, strength, deafness) : undefined;
      if (fault || !own.chance(unanswered * strength)) return fault;
      if (call.operation === "ReceiveMessage") this.#watch.data.nobodyListens();
      const isLate = call.operation !== "UpdateAutoScalingGroup" && call.operation !== "ReceiveMessage" && own.chance(0.5);
      return { lost: true, delayMs: isLate ? own.between([1_000, choose(own, 6_000, 12_000)]) : 0 };
    };
  }

  #faultOf(
    { service, operation }: Call,
    random: Random,
    rates: { throttle: number; before: number; after: number; hang: number; slow: number },
    strength: number,
    deafness: number,
  ): Fault | undefined {
    const lost = () => operation === "ReceiveMessage" && this.#watch.data.nobodyListens();
    if (operation === "ReceiveMessage" && random.chance(deafness)) {
      lost();
      return { hang: true };
    }
    let draw = random.next() / strength;
    const falls = (rate: number) => {
      draw -= rate;
      return draw < 0;
    };
    if (falls(rates.throttle)) return { before: throttleOf(service) };
    if (falls(rates.before)) return { before: new AwsError("InternalError", "An internal error has occurred", 500) };
    if (falls(rates.after)) {
      lost();
      return { after: new AwsError("InternalFailure", "An internal error has occurred", 500) };
    }
    if (operation === "ReceiveMessage") return undefined; // a long poll is slow by nature
    if (falls(rates.hang)) return { hang: true };
    // AWS has no conditional update: between the last read of a maximum and the call that puts it back nobody can
    // help what another daemon does. The program makes that gap one call short; a simulator that stretches it by ten
    // seconds on purpose asks for what cannot be had.
    if (operation === "UpdateAutoScalingGroup") return undefined;
    if (falls(rates.slow)) return { delayMs: random.between([200, choose(random, 1_000, 5_000, 12_000)]) };
    return undefined;
  }

  #slowVolumes(): void {
    const random = streamOf(this.#seed, "slowVolumes");
    const { delays, ec2 } = this.#stage.world;
    if (random.chance(0.5)) delays.snapshotMs = [MINUTE, random.between([3, 40]) * MINUTE];
    if (random.chance(0.5)) delays.volumeReleaseMs = [1_000, random.between([1, 15]) * MINUTE];
    if (random.chance(0.3)) delays.shuttingDownMs = [25_000, random.between([2, 15]) * MINUTE];
    if (random.chance(0.5)) Object.assign(delays, { volumeCreatingMs: [5_000, 60_000], volumeAttachingMs: [5_000, 60_000] });
    if (random.chance(0.3))
      ec2.ebs.failSnapshot = () => (random.chance(0.3) ? "An internal error occurred during the copy" : undefined);
  }

  #publish(): void {
    const { s3 } = this.#stage.world;
    if (this.#features.has("s3")) s3.put(BUCKET, "service_config.json", this.#configText());
    if (s3.buckets.get(BUCKET)?.denied) return;
    for (const [name, expected] of this.#watch.groups)
      if (expected.outUntilMs === Number.POSITIVE_INFINITY && !this.#leftOut.has(name))
        expected.outUntilMs = this.#stage.clock.now() + 2 * MINUTE;
  }
  #breakConfiguration(): void {
    const { world } = this.#stage;
    const random = streamOf(this.#seed, "s3");
    this.#publish();
    const bucket = world.s3.buckets.get(BUCKET);
    for (let n = random.between([1, 4]); n > 0; n--)
      world.after(random.between([0, this.#stretchMs]), () => {
        if (this.#isOver || !bucket) return;
        const text = this.#configText();
        const broken = choose(random, undefined, "", text.slice(0, text.length / 2), "{}", text.replace("groups", "group"));
        this.#say(
          broken === undefined ? "operator: S3 is denied" : `operator: puts a broken configuration: ${broken.slice(0, 40)}`,
        );
        if (broken === undefined) bucket.denied = true;
        else world.s3.put(BUCKET, "service_config.json", broken);
        for (const expected of this.#watch.groups.values())
          if (expected.outUntilMs > world.now()) expected.outUntilMs = Number.POSITIVE_INFINITY;
        world.after(random.between([MINUTE, 5 * MINUTE]), () => this.#mend());
      });
  }
  #mend(): void {
    const bucket = this.#stage.world.s3.buckets.get(BUCKET);
    if (bucket) bucket.denied = false;
    this.#publish();
  }

  #shuffleAnswers(): void {
    const random = streamOf(this.#seed, "shuffled");
    const { operations } = this.#stage.world.ec2;
    const inner = operations.CreateFleet;
    if (!inner) throw new Error("the simulator has no CreateFleet");
    operations.CreateFleet = (input, context) => {
      const answer = inner(input, context) as { Instances?: { InstanceIds?: string[] }[] };
      for (const one of answer.Instances ?? []) one.InstanceIds = sample(random, one.InstanceIds ?? [], 1_000);
      return answer;
    };
  }

  /** A standard queue may give a message once more although its delete was answered. */
  #loseDeletes(): void {
    const random = streamOf(this.#seed, "lostDeletes");
    const { operations } = this.#stage.world.sqs;
    const inner = operations.DeleteMessageBatch;
    if (!inner) throw new Error("the simulator has no DeleteMessageBatch");
    operations.DeleteMessageBatch = (input: { Entries?: { Id: string }[] }, context) => {
      if (this.#isOver || !random.chance(0.05)) return inner(input as never, context);
      return { Successful: (input.Entries ?? []).map(({ Id }) => ({ Id })), Failed: [] };
    };
  }

  // --- Weather ---------------------------------------------------------------------------------------------------

  #makeWeather(): void {
    const { world } = this.#stage;
    const random = streamOf(this.#seed, "weather");
    const has = (name: Feature) => this.#features.has(name);
    // The last notices come early enough for the stretch to see most of what follows.
    const someday = (stream: Random) => {
      const ms = stream.between([2_000, this.#stretchMs - 2 * MINUTE]);
      this.#noticeTimes.push(ms);
      return ms;
    };
    const often = (feature: Feature, times: [number, number], act: (stream: Random) => void) => {
      if (!has(feature)) return;
      const stream = streamOf(this.#seed, `weather ${feature}`);
      for (let n = stream.between(times); n > 0; n--) world.after(someday(stream), () => !this.#isOver && act(stream));
    };
    const single = random.between([1, 4]);
    for (let n = 0; n < single; n++) world.after(someday(random), () => this.#interruptOne(random, "InService"));
    often("waves", [1, 2], (stream) => {
      const group = pick(stream, this.#groupNames());
      const size = stream.between([2, 10]);
      for (let n = 0; n < size; n++)
        world.after(stream.between([0, 3_000]), () => this.#interruptOne(stream, "InService", group));
    });
    often("replacements", [1, 3], (stream) => this.#interruptReplacement(stream));
    often("rebalance", [1, 4], (stream) => this.#rebalanceOne(stream));
    often("health", [1, 2], (stream) => this.#healthEvent(stream));
    often("strangers", [1, 4], (stream) => this.#strangeEvent(stream));
    often("poison", [1, 3], (stream) => this.#poison(stream));
    often("rehearsals", [1, 2], (stream) => this.#rehearse(stream));
    often("droughts", [1, 3], (stream) => this.#dry(stream));
    often("generations", [1, 2], (stream) => {
      const id = pick(
        stream,
        this.#spotMembers(undefined).filter((member) => !this.#watch.isInHand(member)),
      );
      if (id) this.#interruptLine(stream, id, stream.between([2, 4]));
    });
    // A moment before the notice that it matters to.
    if (has("zoneDroughts")) {
      const stream = streamOf(this.#seed, "weather zoneDroughts");
      for (const ms of this.#noticeTimes.filter(() => stream.chance(0.4)))
        world.after(Math.max(0, ms - stream.between([0, 5_000])), () => !this.#isOver && this.#dryZone(stream));
    }
  }

  /** Any moment, but more often one at which something is being replaced. */
  #moment(random: Random): number {
    const near = pick(random, this.#noticeTimes);
    return near === undefined || random.chance(0.3)
      ? random.between([1_000, this.#stretchMs])
      : near + random.between([0, choose(random, 3_000, 30_000, 120_000)]);
  }

  #groupNames(): string[] {
    return [...this.#watch.groups].flatMap(([name, { configured }]) => (configured ? [name] : []));
  }

  #spotMembers(group: string | undefined): string[] {
    const { groups } = this.#stage.world.autoscaling;
    return [...groups.values()]
      .filter((g) => (group === undefined ? this.#watch.groups.get(g.name)?.configured : g.name === group))
      .flatMap((g) => [...g.members.values()])
      .filter(({ state, instance }) => state === "InService" && instance.state === "running" && instance.lifecycle === "spot")
      .map(({ instance }) => instance.id);
  }

  /** A member that nothing is known about yet: what is in hand already is `replacements`' matter. */
  #interruptOne(random: Random, _state: "InService", group?: string): void {
    if (this.#isOver) return;
    const id = pick(
      random,
      this.#spotMembers(group).filter((member) => !this.#watch.isInHand(member)),
    );
    if (id) this.#interrupt(random, id);
  }
  #interruptReplacement(random: Random): void {
    const { world } = this.#stage;
    const living = [...this.#watch.claims.keys()].filter((id) => {
      const { state, lifecycle } = world.instance(id);
      return lifecycle === "spot" && (state === "pending" || state === "running") && !this.#watch.notices.has(id);
    });
    const id = pick(random, living);
    if (id) this.#interrupt(random, id);
  }

  /** And then whoever has taken its place by then, early or late; at times its zone has nothing for the next one. */
  #interruptLine(random: Random, id: string, times: number): void {
    const { world } = this.#stage;
    if (this.#isOver || times === 0) return;
    const { zone, lifecycle, state } = world.instance(id);
    if (random.chance(0.5)) {
      const pools = ALL_TYPES.map((type) => world.pool("spot", type, zone));
      for (const pool of pools) pool.capacity = 0;
      world.after(random.between([30_000, 3 * MINUTE]), () => {
        for (const pool of pools) pool.capacity = Number.POSITIVE_INFINITY;
      });
    }
    if (lifecycle === "spot" && state === "running" && !this.#watch.notices.has(id)) this.#interrupt(random, id);
    const next = () => {
      const claims = [...this.#watch.claims].filter(
        ([claim, { old }]) => old === id && world.instance(claim).state === "running",
      );
      const [claim] = pick(random, claims) ?? [id];
      this.#interruptLine(random, claim, times - 1);
    };
    world.after(random.between([15_000, choose(random, MINUTE, 3 * MINUTE, 8 * MINUTE)]), next);
  }

  #interrupt(random: Random, id: string): void {
    const { world } = this.#stage;
    const has = (name: Feature) => this.#features.has(name);
    const isShort = has("late") && random.chance(0.3);
    const noticeSeconds = isShort ? random.between([20, 118]) : 120;
    const eventDelayMs =
      has("late") && random.chance(0.5)
        ? random.between([1_000, choose(random, 10_000, 60_000, 150_000)])
        : random.between([0, 2_000]);
    const action = random.chance(0.1) ? choose(random, "stop", "hibernate") : "terminate";
    const copies = has("duplicates") && random.chance(0.6) ? random.between([2, 4]) : 1;
    const keepCapacity = !has("droughts") || random.chance(0.5);
    this.#watch.noticed(id, this.#wholeSecond() + 120_000, !isShort && eventDelayMs <= 30_000);
    const resources = [`arn:aws:ec2:${world.instance(id).zone}:instance/${id}`];
    const body = world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", resources, {
      "instance-id": id,
      "instance-action": action,
    });
    // Copies a moment apart: so each may reach another daemon before the launch for the first one can be seen.
    for (let n = 0; n < copies; n++)
      world.after(eventDelayMs + (n && random.between([0, 1_500])), () => world.sendRaw(this.#stage.queues.interruption, body));
    world.interrupt(id, { noticeSeconds, action, duplicates: 0, keepCapacity });
    if (has("duplicates") && random.chance(0.2))
      world.after(random.between([5_000, 5 * MINUTE]), () => {
        if (!this.#isOver) world.interrupt(id, { withoutReclaim: true });
      });
  }
  /** Events carry whole seconds. */
  #wholeSecond(): number {
    return Math.floor(this.#stage.clock.now() / 1000) * 1000;
  }

  #rebalanceOne(random: Random): void {
    const { world } = this.#stage;
    const members = this.#spotMembers(undefined).filter((id) => !this.#watch.isInHand(id));
    const id = pick(random, members);
    if (!id) return;
    if (this.#watch.groups.get(world.instance(id).group ?? "")?.rebalance) this.#watch.noticed(id, undefined, false);
    world.rebalance(id, { eventDelayMs: random.between([0, 5_000]), duplicates: this.#features.has("duplicates") ? 2 : 1 });
    // In a quiet life nothing follows: the group's limit would make the order of launches a matter of luck.
    if (!this.#isQuiet && random.chance(0.4))
      world.after(random.between([0, 10 * MINUTE]), () => {
        if (!this.#isOver && world.instance(id).state === "running") this.#interrupt(random, id);
      });
  }

  #healthEvent(random: Random): void {
    const { world } = this.#stage;
    const all = [...world.autoscaling.groups.values()].flatMap((g) => [...g.members.values()]);
    const fresh = all.filter(({ state, instance }) => state === "InService" && !this.#watch.isInHand(instance.id));
    const ids = sample(random, fresh, random.between([1, 3])).map(({ instance }) => instance.id);
    const statusCode = choose(random, "open", "upcoming", "upcoming", "closed");
    if (statusCode !== "closed")
      for (const id of ids) {
        const expected = this.#watch.groups.get(world.instance(id).group ?? "");
        if (expected?.configured && expected.maintenance) this.#watch.noticed(id, undefined, false);
      }
    if (ids.length) world.healthEvent(ids, { statusCode });
  }

  #strangeEvent(random: Random): void {
    const { world, queues } = this.#stage;
    const outside = [...world.ec2.instances.values()].filter(
      (i) =>
        i.state === "running" &&
        !this.#watch.claims.has(i.id) &&
        !this.#watch.letGo.has(i.id) &&
        (!i.group || i.group === "other"),
    );
    const stranger = pick(random, outside);
    switch (random.between([0, 3])) {
      case 0:
        if (stranger) world.interrupt(stranger.id, { withoutReclaim: random.chance(0.5), keepCapacity: true });
        break;
      case 1:
        if (stranger) world.rebalance(stranger.id);
        break;
      case 2: {
        const member = pick(random, this.#spotMembers(undefined));
        const detail = { "instance-id": member ?? "i-0123456789abcdef0", state: "running" };
        world.sendRaw(queues.interruption, world.event("EC2 Instance State-change Notification", "aws.ec2", [], detail));
        break;
      }
      default:
        world.sendRaw(
          queues.interruption,
          world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], {
            "instance-id": `i-0${random.hex(16)}`,
            "instance-action": "terminate",
          }),
        );
    }
  }

  #poison(random: Random): void {
    const { world, queues } = this.#stage;
    const broken = [
      `not JSON ${random.hex(8)}`,
      JSON.stringify({ hello: random.hex(8) }),
      JSON.stringify([random.hex(8)]),
      world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], { "instance-id": 7 }),
      world.event("EC2 Instance Rebalance Recommendation", "aws.ec2", [], { "instance-id": "i-xyz" }),
      world.event("MaxGroup Detach", "spotmax.maxgroup", [], { "instance-id": "i-0123456789abcdef0" }),
      "",
    ];
    const body = pick(random, broken) || `{"detail-type":${random.between([0, 9])},"id":"${random.hex(8)}"}`;
    this.#watch.poison.add(body);
    world.sendRaw(choose(random, queues.interruption, queues.interruption, queues.detach, queues.termination), body);
  }

  /** A notice that no reclaim follows; an old sample counts from its receipt. */
  #rehearse(random: Random): void {
    const { world, queues } = this.#stage;
    const id = pick(
      random,
      this.#spotMembers(undefined).filter((member) => !this.#watch.isInHand(member)),
    );
    if (!id) return;
    this.#watch.noticed(id, this.#wholeSecond() + 120_000, true);
    if (random.chance(0.6)) {
      world.interrupt(id, { withoutReclaim: true });
      return;
    }
    const detail = { "instance-id": id, "instance-action": "terminate" };
    const event = JSON.parse(world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], detail)) as { time?: string };
    if (random.chance(0.5)) delete event.time;
    else event.time = "2019-09-17T12:05:15Z";
    world.sendRaw(queues.interruption, JSON.stringify(event));
  }

  /** Some pools run dry for a while, at times all of a kind. */
  #dry(random: Random): void {
    const { world } = this.#stage;
    const share = choose(random, 0.3, 0.7, 1);
    const lifecycles = choose<("spot" | "on-demand")[]>(random, ["spot"], ["spot"], ["spot", "on-demand"]);
    const pools = lifecycles.flatMap((l) => ALL_TYPES.flatMap((t) => ZONES.map((z) => world.pool(l, t, z))));
    const dry = pools.filter(() => random.chance(share));
    for (const pool of dry) pool.capacity = choose(random, 0, 0, 0, 1);
    world.after(random.between([20_000, 6 * MINUTE]), () => {
      for (const pool of dry) pool.capacity = Number.POSITIVE_INFINITY;
    });
  }
  #dryZone(random: Random): void {
    const { world } = this.#stage;
    const zones = sample(random, ZONES, choose(random, 1, 1, 2));
    const lifecycles = choose<("spot" | "on-demand")[]>(random, ["spot"], ["spot", "on-demand"]);
    const pools = lifecycles.flatMap((l) => ALL_TYPES.flatMap((t) => zones.map((z) => world.pool(l, t, z))));
    for (const pool of pools) pool.capacity = 0;
    world.after(random.between([60_000, 6 * MINUTE]), () => {
      for (const pool of pools) pool.capacity = Number.POSITIVE_INFINITY;
    });
  }
  #rain(): void {
    for (const lifecycle of ["spot", "on-demand"] as const)
      for (const type of ALL_TYPES)
        for (const zone of ZONES) this.#stage.world.pool(lifecycle, type, zone).capacity = Number.POSITIVE_INFINITY;
  }

  // --- Preaction -------------------------------------------------------------------------------------------------

  #configText(): string {
    if (!this.#features.has("preaction")) return this.#stage.configText();
    const minutes = choose(streamOf(this.#seed, "interval"), 1, 2, 5, 10);
    return this.#stage.configText({ preaction_snapshot_interval_minutes: minutes });
  }
  #preactionOptions(name: string): object {
    const random = streamOf(this.#seed, `preaction ${name}`);
    if (!this.#features.has("preaction")) return {};
    return { is_enable_preaction: random.chance(0.7), od_least_live_mins: choose(random, 0, 1, 10, 12) };
  }

  /** What is known of how often AWS takes types back; away or broken at times where things fail. */
  #makeAdvisor(): void {
    if (!this.#features.has("preaction")) return;
    const random = streamOf(this.#seed, "advisor");
    const { bands } = this.#watch;
    for (const type of ALL_TYPES) if (random.chance(0.9)) bands.set(type, random.between([0, 4]));
    const advisor = new SpotAdvisor();
    const isFaulty = this.#features.has("errors");
    this.#stage.http = async (_, init) => {
      advisor.regions = { "us-east-1": { Linux: Object.fromEntries(bands) } };
      const draw = isFaulty && !this.#isOver ? random.next() : 1;
      if (draw < 0.1) throw Object.assign(new Error("reset"), { code: "ECONNRESET" });
      advisor.fault = draw < 0.2 ? { status: 503 } : draw < 0.3 ? { status: 200, body: '{"ranges":[{}]}' } : undefined;
      return advisor.answer(new Headers(init?.headers).get("if-none-match"));
    };
  }

  /** The advisor's data moves, and whoever is to be replaced is interrupted after all. */
  #makeMarket(): void {
    if (!this.#features.has("preaction") || this.#isQuiet) return;
    const { world } = this.#stage;
    const random = streamOf(this.#seed, "market");
    for (let n = random.between([0, 2]); n > 0; n--)
      world.after(random.between([MINUTE, this.#stretchMs]), () => {
        const type = pick(random, ALL_TYPES);
        if (type && !this.#isOver) this.#watch.bands.set(type, random.between([0, 4]));
      });
    for (let at = 0; at < this.#stretchMs; at += 15_000)
      world.after(at + random.between([0, 15_000]), () => {
        const asked = [...this.#watch.asked].filter((id) => {
          const { state, lifecycle } = world.instance(id);
          return state === "running" && lifecycle === "spot" && !Number.isFinite(this.#watch.notices.get(id)?.deadlineMs);
        });
        const id = pick(random, asked);
        if (id && !this.#isOver && random.chance(0.15)) this.#interrupt(random, id);
      });
  }

  // --- Pods and services -----------------------------------------------------------------------------------------

  #serviceOptions(name: string): { k8s_node_drain_option?: true; k8s_node_drain_grace_second?: number; consul_port?: number } {
    const [pods, consul] = [streamOf(this.#seed, `pods ${name}`), streamOf(this.#seed, `consul ${name}`)];
    const drain = {
      k8s_node_drain_option: true as const,
      k8s_config_file_path: KUBECONFIG,
      k8s_node_drain_grace_second: choose(pods, 0, 20, 60, 300),
    };
    return {
      ...(this.#features.has("pods") && pods.chance(0.7) && drain),
      ...(this.#features.has("consul") && consul.chance(0.7) && { consul_port: CONSUL_PORT }),
    };
  }

  /** A cluster of all groups: others' nodes are nobody's business. */
  #makeCluster(): void {
    if (!this.#features.has("pods")) return;
    const { world } = this.#stage;
    const random = streamOf(this.#seed, "pods");
    const kube = new FakeKube(this.#stage);
    this.#watch.watchCluster(kube);
    const left = new Set<string>();
    kube.emptyFirstPages = this.#features.has("emptyPages");
    kube.joinSeconds = choose(random, 5, 20, 30, 60, 3_600);
    for (const group of world.autoscaling.groups.values())
      for (const id of group.members.keys()) {
        const isHeld = random.chance(0.1);
        kube.populate([id], random.between([0, 4]), { graceSeconds: choose(random, 1, 5, 30, 120), isHeld });
        if (random.chance(0.05)) this.#watch.theirs.add(id);
        if (random.chance(0.1) && this.#watch.groups.get(group.name)?.configured) left.add(id);
      }
    for (const id of this.#watch.theirs) kube.node(id).spec.unschedulable = true;
    const longAgoMs = this.#startMs - 50 * MINUTE;
    for (const id of left)
      kube.leave(id, {
        deadlineMs: random.chance(0.5) ? longAgoMs : null,
        ...(random.chance(0.5) && { drainMs: longAgoMs }),
      });
    kube.schedule = (free) => pick(random, free);
    const held = kube.pods.filter((pod) => pod.isHeld);
    world.after(random.between([0, this.#stretchMs]), () => {
      for (const pod of held) pod.isHeld = false;
    });
    const fault = this.#outages("cluster");
    kube.fault = () => {
      if (random.chance(0.05)) kube.touch();
      return fault();
    };
  }

  #makeAgents(): void {
    if (!this.#features.has("consul")) return;
    const agents = new Agents(this.#stage, []);
    this.#watch.agents = agents;
    const fault = this.#outages("agents");
    agents.instead = (_, __, address) => {
      this.#watch.agentAsked(address);
      if (!agents.services.has(address)) agents.services.set(address, new Set(["web", "api 1/a"]));
      const { is = "slow", delayMs = 0 } = fault() ?? {};
      if (is === "frozen") return new Promise(() => undefined);
      if (is === "down") return Promise.reject(Object.assign(new Error("connection refused"), { code: "ECONNREFUSED" }));
      if (is === "slow") return this.#stage.clock.sleep(delayMs).then(() => undefined);
      return Promise.resolve(new Response("a fault", { status: is.status }));
    };
  }

  /** Long ones, in which nobody answers, and between them single requests that come to nothing. */
  #outages(whose: string): () => KubeFault | undefined {
    const random = streamOf(this.#seed, `outages ${whose}`);
    const rate = choose(random, 0.02, 0.1, 0.3);
    const long = Array.from({ length: random.between([0, 3]) }, () => {
      const fromMs = this.#startMs + random.between([0, this.#stretchMs]);
      return {
        fromMs,
        toMs: fromMs + random.between([10_000, 5 * MINUTE]),
        is: choose<KubeFault["is"]>(random, "down", "frozen"),
      };
    });
    return () => {
      if (!this.#features.has("outages") || this.#isOver) return undefined;
      const nowMs = this.#stage.clock.now();
      const outage = long.find(({ fromMs, toMs }) => nowMs >= fromMs && nowMs < toMs);
      if (outage || !random.chance(rate)) return outage;
      const delayMs = random.between([200, choose(random, 1_000, 4_000, 12_000)]);
      const statuses = [429, 500, 503].map((status) => ({ status, isDone: random.chance(0.5) }));
      return { delayMs, is: choose<KubeFault["is"]>(random, "down", "frozen", "slow", "slow", ...statuses) };
    };
  }

  // --- Daemons ---------------------------------------------------------------------------------------------------

  #spawn(skewMs: number): void {
    const name = `daemon ${++this.#spawned}`;
    const slot: Slot = { skewMs, alive: true, killIn: undefined, killOn: [], daemon: undefined };
    const daemon = this.#stage.spawn({
      skewMs,
      config: this.#program.parseConfig(this.#configText()),
      // What is left available is to be reported.
      level: this.#log ? "debug" : this.#watch.data.isUsed ? "warn" : "error",
      onAwait: (input, operation) => {
        if (operation && slot.killOn.includes(operation)) this.#killAround(slot);
        if (input) this.#watch.heard(name, input);
        if (slot.killIn !== undefined && slot.killIn-- <= 0) this.#kill(slot);
      },
    });
    slot.daemon = daemon;
    this.#slots.push(slot);
    daemon.running.then(
      () => this.#ended(slot, 1_000),
      (error: unknown) => {
        // Start-up checks that fail end the program; systemd starts it again.
        this.#say(`daemon ended: ${String(error)}`);
        this.#ended(slot, 5_000);
      },
    );
    void this.#refresh(slot, daemon);
  }
  #kill(slot: Slot): void {
    if (!slot.alive) return;
    this.#say("killed");
    slot.daemon?.kill();
    this.#ended(
      slot,
      streamOf(this.#seed, `restart ${this.#spawned}`).between([
        500,
        choose(streamOf(this.#seed, `how long ${this.#spawned}`), 3_000, 10_000, 60_000),
      ]),
    );
  }
  #killAround(slot: Slot): void {
    slot.killOn = [];
    const random = streamOf(this.#seed, `death ${this.#spawned}`);
    if (random.chance(0.3)) this.#kill(slot);
    else this.#stage.world.after(random.between([1, 80]), () => !this.#isOver && this.#kill(slot));
  }
  #ended(slot: Slot, afterMs: number): void {
    if (!slot.alive) return;
    slot.alive = false;
    this.#watch.data.nobodyListens();
    slot.daemon?.kill();
    this.#stage.world.after(afterMs, () => this.#spawn(slot.skewMs));
  }
  /** As main does once a minute: groups are looked at again. */
  async #refresh(slot: Slot, daemon: Daemon): Promise<void> {
    for (;;) {
      await this.#stage.clock.sleep(MINUTE);
      if (!slot.alive) return;
      if (this.#features.has("s3")) {
        await this.#program.refresh(daemon.ctx, { b: BUCKET, r: this.#stage.world.region, t: false, v: false });
        continue;
      }
      try {
        if (this.#features.has("reconfiguration")) daemon.ctx.state.config = this.#program.parseConfig(this.#configText());
        await this.#program.checkGroups(daemon.ctx);
      } catch (error) {
        this.#say(`refresh: ${String(error)}`); // the last good one stays, as main has it
      }
    }
  }

  #makeAccidents(): void {
    const { world } = this.#stage;
    const random = streamOf(this.#seed, "accidents");
    const has = (name: Feature) => this.#features.has(name);
    const anyone = (stream = random) =>
      this.#isOver
        ? undefined
        : pick(
            stream,
            this.#slots.filter((slot) => slot.alive && slot.killIn === undefined),
          );
    if (has("kills"))
      for (let n = random.between([1, 6]); n > 0; n--)
        world.after(this.#moment(random), () => {
          const slot = anyone();
          if (slot) slot.killIn = random.between([0, choose(random, 5, 30, 100)]);
        });
    if (has("deaths")) {
      const stream = streamOf(this.#seed, "deaths");
      for (let n = stream.between([1, 6]); n > 0; n--)
        world.after(this.#moment(stream), () => {
          const slot = anyone(stream);
          if (slot) slot.killOn = sample(stream, CHANGES, 5);
        });
    }
    if (has("sigterms"))
      for (let n = random.between([1, 3]); n > 0; n--)
        world.after(this.#moment(random), () => {
          const slot = anyone();
          if (!slot) return;
          this.#say("SIGTERM");
          slot.daemon?.sigterm();
          world.after(9_500, () => this.#ended(slot, 1_000));
        });
  }

  // --- The operator ----------------------------------------------------------------------------------------------

  #makeOperator(): void {
    const { world } = this.#stage;
    const often = (feature: Feature, times: [number, number], act: (stream: Random, name: string) => void) => {
      if (!this.#features.has(feature)) return;
      const stream = streamOf(this.#seed, `operator ${feature}`);
      for (let n = stream.between(times); n > 0; n--)
        world.after(this.#moment(stream), () => {
          const busy = this.#groupNames().filter((group) => !this.#watch.isCalm(group));
          const name = pick(stream, busy.length && stream.chance(0.5) ? busy : this.#groupNames());
          if (name && !this.#isOver && !world.autoscaling.groups.get(name)?.status) act(stream, name);
        });
    };
    often("operator", [1, 5], (stream, name) => this.#operate(stream, name));
    often("meddling", [1, 4], (stream, name) => this.#meddle(stream, name));
    often("aside", [1, 2], (stream, name) => this.#putAside(stream, name));
    often("removal", [1, 1], (_, name) => {
      this.#say(`operator: removes ${name}`);
      this.#watch.operate("autoscaling", "DeleteAutoScalingGroup", { AutoScalingGroupName: name, ForceDelete: true });
    });
    often("reconfiguration", [1, 2], (stream, name) => this.#leaveOut(stream, name));
  }

  /** Sizes and processes. A change of desired shifts what is expected; so do bounds. */
  #operate(random: Random, name: string): void {
    const { world } = this.#stage;
    const group = world.autoscaling.groups.get(name);
    const expected = this.#watch.groups.get(name);
    if (!group || !expected) return;
    const isCalm = this.#watch.isCalm(name);
    const update = (sizes: { MinSize?: number; MaxSize?: number }): void => {
      // Between its read and its call a program cannot see that the operator was faster, for AWS has no conditional
      // update; so bounds are changed where nothing is being replaced, and where reads show the present.
      if (!isCalm || this.#features.has("stale")) return;
      this.#say(`operator: ${name} ${JSON.stringify(sizes)}`);
      if (!this.#watch.operate("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: name, ...sizes })) return;
      expected.min = sizes.MinSize ?? expected.min;
      expected.max = sizes.MaxSize ?? expected.max;
    };
    switch (random.between([0, 4])) {
      case 0:
        update({ MinSize: random.between([0, group.desired]) });
        return;
      case 1:
        update({ MaxSize: group.desired + random.between([0, 4]) });
        return;
      case 2: {
        const names = sample(
          random,
          ["Launch", "Terminate", "AZRebalance", "HealthCheck", "ReplaceUnhealthy", "AddToLoadBalancer"],
          random.between([1, 3]),
        );
        this.#say(`operator: suspends ${names.join(" ")} of ${name}`);
        if (names.includes("Launch")) expected.pausedUntilMs = Number.POSITIVE_INFINITY;
        this.#watch.operate("autoscaling", "SuspendProcesses", { AutoScalingGroupName: name, ScalingProcesses: names });
        world.after(random.between([20_000, 6 * MINUTE]), () => this.#resume(name));
        return;
      }
      default: {
        // As a scaling policy does it: so many more, so many fewer than there are now.
        const before = group.desired;
        const change = choose(random, -2, -1, -1, 1, 1, 2);
        this.#say(`operator: desired of ${name} from ${before} to ${before + change}`);
        const input = { AutoScalingGroupName: name, DesiredCapacity: before + change };
        expected.resized = true;
        if (!this.#watch.operate("autoscaling", "SetDesiredCapacity", input)) return;
        expected.desired += change;
        expected.floor += Math.min(0, change);
        if (isCalm) return;
        // Whether the member that a scale-in takes was one on its way out is its group's choice.
        expected.below += Math.abs(change);
        expected.above += Math.abs(change);
      }
    }
  }
  #resume(name: string): void {
    const expected = this.#watch.groups.get(name);
    const group = this.#stage.world.autoscaling.groups.get(name);
    if (!expected || !group) return;
    this.#say(`operator: resumes all of ${name}`);
    if (group.suspended.has("Launch")) expected.pausedUntilMs = this.#stage.clock.now();
    this.#watch.operate("autoscaling", "ResumeProcesses", { AutoScalingGroupName: name });
    // What joined while AddToLoadBalancer was suspended is not added afterwards: AWS leaves that to the operator.
    const { elbv2 } = this.#stage.world;
    for (const arn of group.targetGroupArns)
      for (const [id, { state }] of group.members)
        if (state === "InService" && elbv2.health(arn, id) === "unused") elbv2.register(arn, id);
  }

  /** AWS's answers are late, lost or refusals. */
  #isFaulty(): boolean {
    const faults: Feature[] = ["throttles", "errors", "hangs", "slowness", "deafness", "buckets", "unanswered"];
    return faults.some((name) => this.#features.has(name));
  }

  /** A member is taken out by hand. */
  #meddle(random: Random, name: string): void {
    const { world } = this.#stage;
    const group = world.autoscaling.groups.get(name);
    const expected = this.#watch.groups.get(name);
    const members = [...(group?.members.values() ?? [])].filter(({ state }) => state === "InService");
    const busy = members.filter(({ instance }) => this.#watch.isInHand(instance.id));
    const member = pick(random, busy.length && random.chance(0.6) ? busy : members);
    if (!group || !expected || !member) return;
    const { id } = member.instance;
    const ShouldDecrementDesiredCapacity = random.chance(0.5);
    const many = { AutoScalingGroupName: name, InstanceIds: [id], ShouldDecrementDesiredCapacity };
    const before = group.desired;
    const act = choose(
      random,
      "DetachInstances",
      "DetachInstances",
      "TerminateInstanceInAutoScalingGroup",
      "TerminateInstances",
      "EnterStandby",
    );
    this.#say(`operator: ${act} ${id} of ${name}${ShouldDecrementDesiredCapacity ? " with decrement" : ""}`);
    const isInHand = this.#watch.isInHand(id);
    if (act === "TerminateInstances") {
      // As if it had failed: its group substitutes it, and all sizes stay, whatever it was.
      this.#watch.operate("ec2", act, { InstanceIds: [id] });
      // Where answers take long as well, the one that it stands for may be gone before anybody has acted: both are substituted.
      if (isInHand && this.#isFaulty()) expected.above += member.weight;
      return;
    }
    const input = act === "TerminateInstanceInAutoScalingGroup" ? { InstanceId: id, ShouldDecrementDesiredCapacity } : many;
    if (!this.#watch.operate("autoscaling", act, input)) return;
    expected.desired += group.desired - before;
    this.#belowMinimum(expected);
    if (!isInHand) return;
    expected.resized = true;
    expected.below += member.weight;
    expected.above += member.weight;
  }

  /**
   * Below the minimum it could go only because ours stood beside an old one: what that leaves is no size of anybody's,
   * and with weights not even the minimum.
   */
  #belowMinimum(expected: Expected): void {
    if (expected.desired >= expected.min) return;
    expected.resized = true;
    if (expected.weighted) expected.above++;
  }

  #putAside(random: Random, name: string): void {
    const group = this.#stage.world.autoscaling.groups.get(name);
    const expected = this.#watch.groups.get(name);
    const id = pick(
      random,
      this.#spotMembers(name).filter((member) => !this.#watch.isInHand(member)),
    );
    if (!group || !expected || !id) return;
    const before = group.desired;
    const input = { AutoScalingGroupName: name, InstanceIds: [id], ShouldDecrementDesiredCapacity: random.chance(0.5) };
    this.#say(`operator: EnterStandby ${id} of ${name}`);
    if (!this.#watch.operate("autoscaling", "EnterStandby", input)) return;
    expected.desired += group.desired - before;
    this.#belowMinimum(expected);
    this.#stage.world.after(random.between([10_000, 2 * MINUTE]), () => {
      const { state } = this.#stage.world.instance(id);
      if (!this.#isOver && state === "running" && !this.#watch.isInHand(id)) this.#interrupt(random, id);
    });
  }

  /** A group leaves the configuration, and comes back; each daemon hears of it within a minute. */
  #leaveOut(random: Random, name: string): void {
    const expected = this.#watch.groups.get(name);
    const options = this.#stage.groups[name];
    if (!expected || !options || Object.keys(this.#stage.groups).length < 2) return;
    this.#say(`operator: ${name} leaves the configuration`);
    delete this.#stage.groups[name];
    this.#publish();
    this.#leftOut.set(name, options);
    expected.outUntilMs = Number.POSITIVE_INFINITY;
    this.#stage.world.after(random.between([MINUTE, 8 * MINUTE]), () => this.#takeIn(name));
  }
  #takeIn(name: string): void {
    const expected = this.#watch.groups.get(name);
    const options = this.#leftOut.get(name);
    if (!expected || !options) return;
    this.#leftOut.delete(name);
    this.#stage.groups[name] = options;
    this.#publish();
  }

  // --- The log ---------------------------------------------------------------------------------------------------

  #say(text: string): void {
    if (this.#log) this.#stage.lines.push(`     [${this.#second()}] ${text}\n`);
  }
  #second(): string {
    return String(Math.floor((this.#stage.clock.now() - this.#startMs) / 1000)).padStart(4, "0");
  }
  #keepRecord(): void {
    const { world } = this.#stage;
    const record = world.record;
    this.#watch.trace = (text) => this.#say(`call: ${text}`);
    world.record = (what, ids, group, detail) => {
      this.#say(`aws: ${what} ${ids.join(" ")}${group ? ` in ${group}` : ""}${detail ? ` (${detail})` : ""}`);
      record(what, ids, group, detail);
    };
  }
}

const ALL_TYPES = [
  ...new Set([
    ...TYPES,
    ...HEAVY,
    "m5n.large",
    "m5d.large",
    "m7i.large",
    "c4.large",
    "c6i.large",
    "c6a.large",
    "r4.large",
    "r5a.large",
    "r6i.large",
  ]),
];

function throttleOf(service: Service): AwsError {
  if (service === "ec2") return new AwsError("RequestLimitExceeded", "Request limit exceeded.", 503);
  if (service === "sqs") return new AwsError("RequestThrottled", "The request was denied due to request throttling.", 403);
  if (service === "s3") return new AwsError("SlowDown", "Please reduce your request rate.", 503);
  return new AwsError("Throttling", "Rate exceeded");
}

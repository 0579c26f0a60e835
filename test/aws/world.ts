// The AWS of the tests: five services that obey AWS's rules, one clock, one seed. A run is a function of the seed
// and the scenario, byte for byte: no host time, no host randomness, no I/O in here.
import type { LaunchTemplateOverrides } from "@aws-sdk/client-auto-scaling";
import type { ResponseLaunchTemplateData } from "@aws-sdk/client-ec2";
import { AutoScaling } from "./autoscaling.ts";
import { AwsError, copyOf, faultError, operationSchema, parse, Random, type Range, type Service } from "./basics.ts";
import type { Clock } from "./clock.ts";
import { mappingsOf, type VolumeSpec } from "./ebs.ts";
import { Ec2, type Instance, type Pool } from "./ec2.ts";
import { Elbv2 } from "./elbv2.ts";
import { S3 } from "./s3.ts";
import { Sqs } from "./sqs.ts";

export { AwsError, type Range, type Service } from "./basics.ts";

/** How long things take, in milliseconds; a range is drawn from anew each time. Change any at any time. */
export interface Delays {
  /** A call there and back. [0, 0]: none. */
  latencyMs: Range;
  /** Launch to running: 5 to 17 s were measured. */
  pendingMs: Range;
  shuttingDownMs: Range;
  /** EC2 shows terminated instances for about an hour. */
  terminatedVisibleMs: number;
  /** Attached (or launched by the group and running) to InService. */
  attachMs: Range;
  /** Detaching to gone, without target groups; with them the drain comes on top. */
  detachMs: Range;
  /** Until a group notices that a member is no longer running. */
  replaceMs: Range;
  /** Until a group acts on a desired capacity that differs from what it has. */
  reactionMs: Range;
  /** Until a group tries again after a launch that failed. */
  launchRetryMs: number;
  rebalanceMs: number;
  /** Registered in a target group to healthy. */
  healthyMs: Range;
  /** Deregistration delay of target groups. */
  drainMs: number;
  /** CreateVolume to `available`. */
  volumeCreatingMs: Range;
  volumeAttachingMs: Range;
  /** DetachVolume to `available`, or to `busy` where the guest has the volume mounted. */
  volumeDetachingMs: Range;
  /** From an instance's `terminated` until a volume that outlives it is `available`. */
  volumeReleaseMs: Range;
  volumeDeletingMs: Range;
  /** CreateSnapshot to `completed`. */
  snapshotMs: Range;
  /** EC2's and Auto Scaling's describes may show a state up to this old. 0: always the present. */
  staleMs: number;
}

export interface WorldOptions extends Partial<Delays> {
  clock: Clock;
  seed?: number;
  region?: string;
  account?: string;
  /** Of queue URLs. */
  origin?: string;
  /** Where private addresses come from; a /8, /16 or /24. */
  cidr?: string;
  /** Judge answers by the SDK's schemas too: a check on the simulator itself. */
  checkOutputs?: boolean;
}

export interface Call {
  service: Service;
  operation: string;
  input: object;
}

export interface Fault {
  /** Thrown instead of the effect. */
  before?: AwsError;
  /** Thrown after the effect: the caller cannot know that it was done. */
  after?: AwsError;
  delayMs?: number;
  /** The effect comes after it. */
  wait?: Promise<unknown>;
  /** No answer, ever, and no effect; only an abort ends it. */
  hang?: boolean;
  /** No answer, ever, and the effect, after `delayMs`, whether or not its caller still waits. */
  lost?: boolean;
}

export interface AuditEntry {
  atMs: number;
  what: string;
  group?: string;
  ids: string[];
  detail?: string;
}

export interface CapacitySample {
  atMs: number;
  group: string;
  /** Capacity units (members, where there are no weights) that are InService and truly running. */
  inService: number;
  /** Of these, the ones that are also healthy in every target group. */
  serving: number;
  desired: number;
  min: number;
  max: number;
}

export type Handler = (input: never, context: { signal?: AbortSignal }) => object | Promise<object>;
export type Handlers = Record<string, Handler>;

export interface Queues {
  interruption: string;
  detach: string;
  termination: string;
  deadLetter: string;
}

export interface GroupSpec {
  name: string;
  min: number;
  max: number;
  desired: number;
  /** Default: the region's a, b and c. */
  zones?: string[];
  /**
   * One type: a plain launch template, on-demand unless its data asks for spot. More: a mixed instances policy,
   * all spot. Default: m5.large, m5a.large, m4.large.
   */
  types?: string[];
  /** Instead of `types`: the policy's overrides as they are. */
  overrides?: LaunchTemplateOverrides[];
  /** Weighted capacity by instance type; min, max and desired then count in these units. */
  weights?: Record<string, number>;
  /** Of the policy's InstancesDistribution; default 0 and 0, all spot. */
  onDemandBase?: number;
  onDemandPercentage?: number;
  /** Names; made if absent. */
  targetGroups?: string[];
  /** NewInstancesProtectedFromScaleIn. */
  protected?: boolean;
  /** Propagated to instances at launch. */
  tags?: Record<string, string>;
  /** Of its launch template, beside the root; `template` may say the same in AWS's words. */
  volumes?: VolumeSpec[];
  template?: ResponseLaunchTemplateData;
  /** The group follows this; default "$Default". */
  templateVersion?: string;
  /** A launch configuration instead of a template. */
  launchConfiguration?: boolean;
  suspended?: string[];
  capacityRebalance?: boolean;
  healthCheckType?: "EC2" | "ELB";
  healthCheckGraceSeconds?: number;
  lifecycleHooks?: string[];
  /** How long the members have been running already; default a day. */
  ageSeconds?: number;
}

export interface InterruptOptions {
  noticeSeconds?: number;
  /** How long the event is on its way; its `time` is the moment of the notice all the same. */
  eventDelayMs?: number;
  /** How many copies of the event are delivered. */
  duplicates?: number;
  action?: "terminate" | "stop" | "hibernate";
  /** By default the spot pool of a reclaimed instance has nothing left. */
  keepCapacity?: boolean;
  /** Only the event: a rehearsal. */
  withoutReclaim?: boolean;
}

const DEFAULT_DELAYS: Delays = {
  latencyMs: [20, 60],
  pendingMs: [5_000, 17_000],
  shuttingDownMs: [25_000, 35_000],
  terminatedVisibleMs: 3_600_000,
  attachMs: [1_000, 5_000],
  detachMs: [1_000, 4_000],
  replaceMs: [10_000, 40_000],
  reactionMs: [1_000, 5_000],
  launchRetryMs: 60_000,
  rebalanceMs: 60_000,
  healthyMs: [5_000, 15_000],
  drainMs: 30_000,
  volumeCreatingMs: [1_000, 3_000],
  volumeAttachingMs: [1_000, 4_000],
  volumeDetachingMs: [1_000, 5_000],
  volumeReleaseMs: [1_000, 10_000],
  volumeDeletingMs: [1_000, 3_000],
  snapshotMs: [30_000, 120_000],
  staleMs: 0,
};

/** [capacity, refill a second]. EC2's are documented; Auto Scaling's and ELB's are guesses. */
const BUCKETS = {
  "ec2:read": [100, 20],
  "ec2:unfiltered": [50, 10],
  "ec2:mutation": [50, 5],
  "ec2:RunInstances": [5, 2],
  "ec2:instances": [1000, 2],
  "ec2:TerminateInstances": [100, 5],
  "ec2:CreateTags": [100, 10],
  autoscaling: [100, 10],
  elbv2: [40, 10],
  "ec2:CreateSnapshot": [100, 5],
  "ec2:CreateVolume": [100, 5],
} satisfies Record<string, [number, number]>;

type BucketName = keyof typeof BUCKETS;

export class World {
  readonly clock: Clock;
  readonly random: Random;
  readonly region: string;
  readonly account: string;
  readonly origin: string;
  readonly cidr: string;
  readonly delays: Delays;
  readonly ec2: Ec2;
  readonly autoscaling: AutoScaling;
  readonly elbv2: Elbv2;
  readonly sqs: Sqs;
  readonly s3: S3;
  checkOutputs: boolean;
  /** Request throttling, one set of buckets for the account. */
  buckets = false;
  /** A describe that is asked for pages may begin with an empty one, with a token for the rest. */
  emptyFirstPages = false;
  readonly bucketSizes: Record<BucketName, [number, number]> = copyOf(BUCKETS);
  readonly #tokens = new Map<BucketName, { tokens: number; atMs: number }>();
  /** Faults on purpose; asked once for every call. */
  intercept: ((call: Call) => Fault | undefined) | undefined;
  /** "service:Operation" (as in IAM policies) that the caller's role may not do. */
  readonly denied = new Set<string>();
  /** How often each "service:Operation" was called. */
  readonly calls: Record<string, number> = {};
  readonly audit: AuditEntry[] = [];
  readonly #samplers: ((sample: CapacitySample) => void)[] = [];
  #queues: Queues | undefined;

  constructor(options: WorldOptions) {
    this.clock = options.clock;
    this.random = new Random(options.seed ?? 1);
    this.region = options.region ?? "us-east-1";
    this.account = options.account ?? "123456789012";
    this.origin = options.origin ?? "http://127.0.0.1:4566";
    this.cidr = options.cidr ?? "127.0.0.0/16";
    this.checkOutputs = options.checkOutputs ?? false;
    const given = Object.entries(options).filter(([key, value]) => key in DEFAULT_DELAYS && value !== undefined);
    this.delays = { ...copyOf(DEFAULT_DELAYS), ...(Object.fromEntries(given) as Partial<Delays>) };
    this.ec2 = new Ec2(this);
    this.elbv2 = new Elbv2(this);
    this.autoscaling = new AutoScaling(this);
    this.sqs = new Sqs(this);
    this.s3 = new S3(this);
  }

  // --- Calls -----------------------------------------------------------------------------------------------------

  /** One request. Its effect happens half a latency after the call, its answer comes half a latency later. */
  async call(service: Service, operation: string, input: object, options: { signal?: AbortSignal } = {}): Promise<object> {
    const { signal } = options;
    const name = `${service}:${operation}`;
    this.calls[name] = (this.calls[name] ?? 0) + 1;
    try {
      const fault = this.intercept?.({ service, operation, input });
      const latencyMs = this.random.between(this.delays.latencyMs);
      const arriveMs = Math.floor(latencyMs / 2) + (fault?.delayMs ?? 0);
      if (fault?.lost)
        void this.#pass(arriveMs, undefined)
          .then(() => this.#perform(service, operation, input, undefined))
          .catch((error) => {
            if (!(error instanceof AwsError)) throw error; // a refusal that nobody hears
          });
      if (fault?.hang || fault?.lost) await new Promise<never>((_, reject) => onAbort(signal, reject));
      await this.#pass(arriveMs, signal);
      if (fault?.wait) await fault.wait;
      let answer: object;
      try {
        if (fault?.before) throw fault.before;
        answer = await this.#perform(service, operation, input, signal);
        if (fault?.after) throw fault.after;
      } catch (error) {
        await this.#pass(Math.ceil(latencyMs / 2), signal);
        throw error;
      }
      await this.#pass(Math.ceil(latencyMs / 2), signal);
      return answer;
    } catch (error) {
      if (signal?.aborted) throw abortError();
      if (error instanceof AwsError) error.$service = service;
      throw error;
    }
  }

  async #pass(ms: number, signal: AbortSignal | undefined): Promise<void> {
    if (signal?.aborted) throw abortError();
    if (ms > 0) await this.clock.sleep(ms, signal);
  }

  async #perform(service: Service, operation: string, input: object, signal: AbortSignal | undefined): Promise<object> {
    const schema = operationSchema(service, operation);
    const handler = this[service].operations[operation];
    if (!schema) throw new AwsError("InvalidAction", `The action ${operation} is not valid for this web service.`);
    if (!handler) throw new Error(`the simulator has no ${service}:${operation}`);
    const clean = parse(schema.input, input, "", (fault) => {
      throw faultError(service, fault);
    });
    if (this.denied.has(`${service}:${operation}`)) throw denied(service, operation);
    if (this.buckets) this.#takeTokens(service, operation, clean as Record<string, unknown>);
    const answer = await handler(clean as never, { signal });
    if (this.checkOutputs)
      parse(schema.output, answer, "", (fault) => {
        throw new Error(`the simulator's answer to ${operation} is not AWS's: ${JSON.stringify(fault)}`);
      });
    return answer;
  }

  #takeTokens(service: Service, operation: string, input: Record<string, unknown>): void {
    if (service === "sqs" || service === "s3") return;
    const take = (name: BucketName, count = 1): boolean => {
      const [capacity, refill] = this.bucketSizes[name];
      const now = this.clock.now();
      const bucket = this.#tokens.get(name) ?? { tokens: capacity, atMs: now };
      bucket.tokens = Math.min(capacity, bucket.tokens + ((now - bucket.atMs) / 1000) * refill);
      bucket.atMs = now;
      this.#tokens.set(name, bucket);
      if (bucket.tokens < count) return false;
      bucket.tokens -= count;
      return true;
    };
    if (service === "autoscaling" || service === "elbv2") {
      if (!take(service)) throw new AwsError("Throttling", "Rate exceeded");
      return;
    }
    let granted: boolean;
    if (operation === "RunInstances") granted = take("ec2:RunInstances") && take("ec2:instances", Number(input.MaxCount ?? 1));
    else if (`ec2:${operation}` in BUCKETS) granted = take(`ec2:${operation}` as BucketName);
    else if (/^(Describe|Get)/.test(operation)) {
      const narrowed = Object.entries(input).some(([key, value]) =>
        Array.isArray(value) ? value.length > 0 : key === "MaxResults" || key === "NextToken",
      );
      granted = take(narrowed ? "ec2:read" : "ec2:unfiltered");
    } else granted = take("ec2:mutation");
    if (!granted) throw new AwsError("RequestLimitExceeded", "Request limit exceeded.", 503);
  }

  // --- Time, record ----------------------------------------------------------------------------------------------

  now(): number {
    return this.clock.now();
  }

  /** Runs `act` in `ms` milliseconds. */
  after(ms: number, act: () => void): void {
    void this.clock.sleep(ms).then(act);
  }

  /** Runs `act` at a time of the world's clock (ms since the epoch). */
  at(atMs: number, act: () => void): void {
    this.after(Math.max(0, atMs - this.now()), act);
  }

  /** The moment that a describe shows: now, or with `staleMs` some moment before it. */
  viewMs(): number {
    return this.now() - (this.delays.staleMs > 0 ? this.random.between([0, this.delays.staleMs]) : 0);
  }

  record(what: string, ids: string[], group?: string, detail?: string): void {
    this.audit.push({ atMs: this.now(), what, ids, ...(group && { group }), ...(detail && { detail }) });
    if (group && this.#samplers.length > 0) {
      const sample = this.autoscaling.sample(group);
      if (sample) for (const sampler of this.#samplers) sampler(sample);
    }
  }

  /** `sampler` sees every change of a group's members or sizes, the moment it happens. */
  onCapacity(sampler: (sample: CapacitySample) => void): void {
    this.#samplers.push(sampler);
  }

  // --- Scenarios -------------------------------------------------------------------------------------------------

  /** The free capacity of a pool; set `capacity` to change it (default: unlimited). */
  pool(lifecycle: "spot" | "on-demand", type: string, zone: string): Pool {
    return this.ec2.pool(lifecycle, type, zone);
  }

  /** The program's three queues and their dead-letter queue (redrive after 10). Returns their URLs. */
  createQueues(prefix = ""): Queues {
    const deadLetter = this.sqs.create(`${prefix}dead-letter`);
    const redrive = JSON.stringify({ deadLetterTargetArn: deadLetter.arn, maxReceiveCount: 10 });
    const make = (name: string): string =>
      this.sqs.create(prefix + name, { RedrivePolicy: redrive, MessageRetentionPeriod: "1209600" }).url;
    const queues = {
      interruption: make("interruption"),
      detach: make("detach"),
      termination: make("termination"),
      deadLetter: deadLetter.url,
    };
    this.#queues ??= queues;
    return queues;
  }

  /** A group with its members running and in service at once. Returns their IDs, in order of launch. */
  createGroup(spec: GroupSpec): { name: string; templateId: string; subnetIds: string[]; instanceIds: string[] } {
    return this.autoscaling.createFromSpec(spec);
  }

  /** A running instance of no group. */
  createInstance(spec: {
    type?: string;
    zone?: string;
    lifecycle?: "spot" | "on-demand";
    tags?: Record<string, string>;
    volumes?: VolumeSpec[];
    ageSeconds?: number;
  }): Instance {
    const zone = spec.zone ?? `${this.region}a`;
    const instance = this.ec2.launch({
      type: spec.type ?? "m5.large",
      subnet: this.ec2.subnetIn(zone),
      lifecycle: spec.lifecycle ?? "spot",
      imageId: "ami-0123456789abcdef0",
      tags: Object.entries(spec.tags ?? {}),
      blockDevices: mappingsOf(spec.volumes ?? []),
      atOnce: true,
      ageMs: 1000 * (spec.ageSeconds ?? 86_400),
    });
    return instance;
  }

  instance(id: string): Instance {
    const instance = this.ec2.instances.get(id);
    if (!instance) throw new Error(`the world has no instance ${id}`);
    return instance;
  }

  /** Sends the interruption warning, and takes the instance away at the deadline. */
  interrupt(instanceId: string, options: InterruptOptions = {}): void {
    const { noticeSeconds = 120, action = "terminate" } = options;
    const instance = this.instance(instanceId);
    const body = this.event("EC2 Spot Instance Interruption Warning", "aws.ec2", this.#resources(instance), {
      "instance-id": instanceId,
      "instance-action": action,
    });
    this.#deliver(body, options);
    this.record("notice", [instanceId], instance.group, action);
    if (options.withoutReclaim) return;
    const pool = this.ec2.pool(instance.lifecycle, instance.type, instance.zone);
    if (!options.keepCapacity) pool.capacity = 0;
    this.after(noticeSeconds * 1000, () => this.ec2.reclaim(instance, action));
  }

  /** Sends a rebalance recommendation; nothing else happens. */
  rebalance(instanceId: string, options: Pick<InterruptOptions, "eventDelayMs" | "duplicates"> = {}): void {
    const body = this.event("EC2 Instance Rebalance Recommendation", "aws.ec2", this.#resources(this.instance(instanceId)), {
      "instance-id": instanceId,
    });
    this.#deliver(body, options);
    this.record("rebalance recommendation", [instanceId]);
  }

  /** Sends a scheduled change of AWS Health for some instances. */
  healthEvent(
    instanceIds: string[],
    options: {
      statusCode?: "open" | "upcoming" | "closed";
      startMs?: number;
      eventTypeCode?: string;
      category?: string;
      service?: string;
    } & Pick<InterruptOptions, "eventDelayMs" | "duplicates"> = {},
  ): void {
    const startMs = options.startMs ?? this.now() + 14 * 86_400_000;
    const service = options.service ?? "EC2";
    const code = options.eventTypeCode ?? "AWS_EC2_INSTANCE_RETIREMENT_SCHEDULED";
    const arn = `arn:aws:health:${this.region}::event/${service}/${code}/${code}_${this.random.hex(16)}`;
    const detail = {
      eventArn: arn,
      service,
      eventScopeCode: "ACCOUNT_SPECIFIC",
      communicationId: this.random.hex(40),
      lastUpdatedTime: new Date(this.now()).toUTCString(),
      eventRegion: this.region,
      eventTypeCode: code,
      eventTypeCategory: options.category ?? "scheduledChange",
      startTime: new Date(startMs).toUTCString(),
      eventDescription: [{ language: "en_US", latestDescription: "A description of the event." }],
      affectedEntities: instanceIds.map((entityValue) => ({
        entityValue,
        lastUpdatedTime: new Date(this.now()).toUTCString(),
        status: "IMPAIRED",
      })),
      statusCode: options.statusCode ?? "upcoming",
      affectedAccount: this.account,
      page: "1",
      totalPages: "1",
    };
    this.#deliver(this.event("AWS Health Event", "aws.health", instanceIds, detail), options);
  }

  /** An EventBridge envelope, keys in AWS's order. */
  event(detailType: string, source: string, resources: string[], detail: object): string {
    return JSON.stringify({
      version: "0",
      id: this.random.uuid(),
      "detail-type": detailType,
      source,
      account: this.account,
      time: isoSeconds(this.now()),
      region: this.region,
      resources,
      detail,
    });
  }

  /** Puts a message of any text into a queue, at once. */
  sendRaw(queueUrl: string, body: string): void {
    this.sqs.deliver(queueUrl, body);
  }

  queueDepth(queueUrl: string): { visible: number; delayed: number; inFlight: number } {
    return this.sqs.depth(queueUrl);
  }

  /** Everything as plain JSON: two runs of one seed give the same text. */
  snapshot(): object {
    return {
      atMs: this.now(),
      groups: this.autoscaling.snapshot(),
      instances: this.ec2.snapshot(),
      ebs: this.ec2.ebs.snapshot(),
      targets: this.elbv2.snapshot(),
      queues: this.sqs.snapshot(),
    };
  }

  /** The ARN of spot events names the zone in place of the region, and no account. */
  #resources(instance: Instance): string[] {
    return [`arn:aws:ec2:${instance.zone}:instance/${instance.id}`];
  }

  #deliver(body: string, options: Pick<InterruptOptions, "eventDelayMs" | "duplicates">): void {
    const url = this.#queues?.interruption;
    if (!url) throw new Error("call createQueues() before sending events");
    const send = () => {
      for (let i = 0; i < (options.duplicates ?? 1); i++) this.sqs.deliver(url, body);
    };
    if (options.eventDelayMs) this.after(options.eventDelayMs, send);
    else send();
  }
}

/** AWS's times in events and activity texts have whole seconds. */
export function isoSeconds(ms: number): string {
  return `${new Date(ms).toISOString().slice(0, 19)}Z`;
}

function onAbort(signal: AbortSignal | undefined, reject: (reason: unknown) => void): void {
  if (signal?.aborted) reject(signal.reason);
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
}

function abortError(): Error {
  const error = new Error("Request aborted");
  error.name = "AbortError";
  return error;
}

function denied(service: Service, operation: string): AwsError {
  if (service === "ec2") return new AwsError("UnauthorizedOperation", "You are not authorized to perform this operation.", 403);
  if (service === "s3") return new AwsError("AccessDenied", "Access Denied", 403);
  const action = `${service === "elbv2" ? "elasticloadbalancing" : service}:${operation}`;
  const text = `User is not authorized to perform: ${action} because no identity-based policy allows it`;
  return new AwsError(service === "sqs" ? "AccessDeniedException" : "AccessDenied", text, 403);
}

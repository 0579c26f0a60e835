// What must hold in every life, whatever is thrown at it: the seven invariants, each put so that it is true
// of a correct program even where daemons are killed, reads are stale and clocks are apart, and otherwise as sharp
// as can be.
//
// The watch stands inside the world: it wraps the services' own handlers, so it judges each change at the moment of
// its effect, against the truth and not against what a describe would have shown. What the operator does goes past
// the wrappers (`operate`) and moves the expectations instead. Three sorts of leniency exist, all computed here:
//  - `lagMs`: how old a daemon's picture may be when its call takes effect. A call acts on what was read before it,
//    and may itself be slow or repeated; a world without faults and stale reads has a lag of seconds.
//  - `spreadMs`: how far the daemons' clocks are apart. A deadline is written by one clock and read by another.
//  - slack on desired, where the operator laid hands on an instance that was being replaced: then it is a matter
//    of taste whose decrement it was.
import type {
  AttachInstancesQuery,
  CreateOrUpdateTagsType,
  DetachInstancesQuery,
  SetInstanceProtectionQuery,
  TerminateInstanceInAutoScalingGroupType,
  UpdateAutoScalingGroupType,
} from "@aws-sdk/client-auto-scaling";
import type {
  AttachVolumeRequest,
  CreateFleetRequest,
  CreateSnapshotRequest,
  CreateTagsRequest,
  CreateVolumeRequest,
  ModifyInstanceAttributeRequest,
  RunInstancesRequest,
  TerminateInstancesRequest,
} from "@aws-sdk/client-ec2";
import type { DeleteMessageBatchRequest, ReceiveMessageResult, SendMessageBatchRequest } from "@aws-sdk/client-sqs";
import { MARK } from "../../maxgroup.ts";
import type { Group } from "../aws/autoscaling.ts";
import type { Instance } from "../aws/ec2.ts";
import type { Message } from "../aws/sqs.ts";
import { AwsError, type Handler, type Queues, type Service, type World } from "../aws/world.ts";
import type { Agents } from "./consul.ts";
import { type Account, DataWatch } from "./data.ts";
import { type FakeKube, OF_OLD } from "./kube.ts";

export interface Finding {
  /** The invariant's number; "preaction" | "choice": another of its rules, on what is launched, and when one goes. */
  rule: "1" | "2" | "3" | "4" | "5" | "6" | "7" | "capacity" | "quiet" | "late" | "preaction" | "choice" | "pods" | "consul";
  atMs: number;
  text: string;
}

/** What kind of life it is, as far as it matters for what must hold. */
export interface Traits {
  /** Nothing fails, one daemon, endless capacity: exactly one launch a notice, never less in service than at the start. */
  strict: boolean;
  /** Daemons are alive and prompt: who is interrupted in time has left the group before AWS takes it. */
  prompt: boolean;
  lagMs: number;
  spreadMs: number;
  /** One daemon from beginning to end, and it sees the present. */
  alone: boolean;
  /** The cluster and Consul's agents answer. */
  served: boolean;
  /** Good messages may end in the dead-letter queue: crashes, duplicates and lost deletes count as receives. */
  deadLetters: boolean;
}

/** A group as it must look when all is quiet. */
export interface Expected {
  configured: boolean;
  rebalance: boolean;
  maintenance: boolean;
  /** How many without a hard deadline may be in hand at a time. */
  limit: number;
  min: number;
  max: number;
  desired: number;
  /** How far desired may be off, below and above. */
  below: number;
  above: number;
  /** Members in service may never be fewer: the start, less what the world and the operator took. */
  floor: number;
  protects: boolean;
  /** As the configuration has them. */
  fallback: boolean;
  drained: boolean;
  graceMs: number;
  consul: boolean;
  detachMs: number;
  softDetachMs: number;
  softEndMs: number;
  weighted: boolean;
  /** Launched to aid in balancing, and nobody was ended for it yet. */
  balancing: number;
  /** Taken off desired by a maximum that was rightly put back, and not ended yet. */
  cut: number;
  /** The operator has changed its sizes: groups end members of their own accord then. */
  resized: boolean;
  deleted: boolean;
  /** Until then Launch was suspended: no replacement is owed. */
  pausedUntilMs: number;
  /** Until then it was out of the configuration: nor is one then. */
  outUntilMs: number;
}

interface NoticeRecord {
  /** It has one that is not preaction's, which takes any type. */
  isNamed: boolean;
  /** When the first one was made; and whether any of them has no deadline. */
  madeMs: number;
  isSoft: boolean;
  /** The earliest hard deadline that any notice of it states; undefined: none has one. */
  deadlineMs: number | undefined;
  /** Nothing stood against its replacement when the notice was made. */
  owed: boolean;
  /** The notice reached the queue early enough to do all by the deadline. */
  inTime: boolean;
}

const DETACH = "MaxGroup Detach";
const TERMINATION = "MaxGroup Termination";
/** The program lets an instance go this long before it goes by itself. */
const MARGIN_MS = 5_000;
const DRAIN_MS = 30_000;
const YOUNG_MS = 10 * 60_000;
/** So long desired may stand above the operator's maximum with nothing in hand; then that is put back all the same. */
const ABOVE_MS = 10 * 60_000;
/** Pods may go so long before their node does, wherever they go to. */
const PRESSED_MS = 60_000;
/** A notice did not come true so long after its deadline, or, without one, after the node was marked. */
const UNTRUE_MS = 2 * 60_000;
const FORGOTTEN_MS = 10 * 60_000;
const DRAIN_ENDS_MS = 10_000;
const CONSUL_MS = 3_000;
/** A group sees within half a minute that a member is gone, and another takes as long to serve. */
const SUBSTITUTE_MS = 60_000;

type Actor = "daemon" | "operator" | "world";

export class Watch {
  readonly findings: Finding[] = [];
  readonly groups = new Map<string, Expected>();
  readonly notices = new Map<string, NoticeRecord>();
  /** Bodies that nobody can understand. */
  readonly poison = new Set<string>();
  /** Launched by a daemon, and for whom: the n-th of a call, by ID, stands for the n-th old one, by ID. */
  readonly claims = new Map<string, { old: string; daemon: string | undefined }>();
  readonly letGo = new Set<string>();
  /** The truth about data volumes. */
  readonly data: DataWatch;
  /** Whom a daemon asked to have replaced, and the Spot Advisor's bands, by type. */
  readonly asked = new Set<string>();
  readonly bands = new Map<string, number>();
  /** Members whose protection from scale-in is not as their group has it. */
  readonly byHand = new Set<string>();
  /** Nodes that somebody else had cordoned, by instance. */
  readonly theirs = new Set<string>();
  agents: Agents | undefined;
  #kube: FakeKube | undefined;
  /** How often a second one was launched beside a living one: two daemons may, and the loser goes. */
  rivals = 0;
  /** Hears of the daemons' changes to groups as they take effect: for the log. */
  trace: ((text: string) => void) | undefined;
  readonly #world: World;
  readonly #queues: Queues;
  readonly #traits: Traits;
  readonly #raw = new Map<string, Handler>();
  #actor: Actor = "world";
  /** Which daemons have sent a launch token. */
  readonly #tokens = new Map<string, Set<string>>();
  /** IDs that the handler under way has launched. */
  #launched: string[] = [];
  readonly #inServiceMs = new Map<string, number>();
  readonly #outOfServiceMs = new Map<string, number>();
  /** Of what is out of service: the group that it was in. */
  readonly #leftGroup = new Map<string, string>();
  /** When the minimum last refused to let a daemon have it. */
  readonly #keptMs = new Map<string, number>();
  /** When a message about an instance last went to a queue: "QUEUE INSTANCE". */
  readonly #sentMs = new Map<string, number>();
  readonly #orders = new Map<string, string>();
  /** The types that preaction has named as better, by old instance; none for a fallback. */
  readonly #better = new Map<string, Set<string>>();
  readonly #detachedMs = new Map<string, number>();
  /** When a group last had as many in service as it desires. */
  readonly #fullMs = new Map<string, number>();
  readonly #asideMs = new Map<string, number>();
  /** Since when a group desires more than the operator's maximum, with no claim unsettled; and until when. */
  readonly #above = new Map<string, { sinceMs: number; untilMs?: number }>();

  constructor(world: World, queues: Queues, traits: Traits) {
    this.#world = world;
    this.#queues = queues;
    this.#traits = traits;
    this.data = new DataWatch({
      world,
      find: (text) => this.find("5", text),
      oldOf: (id) => this.claims.get(id)?.old,
      claims: () => this.claims.keys(),
      actor: () => this.#actor,
      lagMs: traits.lagMs,
    });
    // Before the record is made, because the samplers of capacity hear of the record.
    const record = world.record.bind(world);
    world.record = (what, ids, group, detail) => {
      this.#see(what, ids, group, detail);
      record(what, ids, group, detail);
    };
    world.onCapacity(({ group, inService }) => {
      const expected = this.groups.get(group);
      if (inService >= (world.autoscaling.groups.get(group)?.desired ?? 0)) this.#fullMs.set(group, world.now());
      if (expected?.configured && !expected.deleted && inService < expected.floor) {
        this.find("capacity", `${group} has ${inService} in service, and without us it had at least ${expected.floor}`);
        expected.floor = inService; // said once
      }
    });
    this.#watchLaunches();
    this.#watchInstances();
    this.#watchVolumes();
    this.#watchGroups();
    this.#watchMessages();
  }

  find(rule: Finding["rule"], text: string): void {
    this.findings.push({ rule, atMs: this.#world.now(), text });
  }

  /** A daemon sends a call: a launch token says later whose launch it was. */
  heard(daemon: string, input: object): void {
    const token: unknown = Reflect.get(input, "ClientToken");
    if (typeof token !== "string") return;
    const known = this.#tokens.get(token);
    if (known) known.add(daemon);
    else this.#tokens.set(token, new Set([daemon]));
  }

  /** A call of the operator's; false where AWS refuses it. Takes effect at once. */
  operate(service: Service, operation: string, input: object): boolean {
    const inner = this.#raw.get(`${service}:${operation}`) ?? this.#world[service].operations[operation];
    if (!inner) throw new Error(`the simulator has no ${service}:${operation}`);
    try {
      this.#as("operator", () => inner(input as never, {}) as object);
      return true;
    } catch (error) {
      if (error instanceof AwsError) return false;
      throw error;
    }
  }

  /** A notice about this instance is on its way. */
  noticed(id: string, deadlineMs: number | undefined, reachesInTime: boolean): void {
    const known = this.notices.get(id);
    const instance = this.#world.instance(id);
    const group = this.#groupOf(instance);
    const expected = group && this.groups.get(group.name);
    const owed =
      group !== undefined &&
      expected?.configured === true &&
      !group.status &&
      !group.suspended.has("Launch") &&
      Math.max(expected.pausedUntilMs, expected.outUntilMs) < this.#world.now() &&
      group.members.get(id)?.state === "InService" &&
      instance.state === "running";
    this.notices.set(id, {
      isNamed: true,
      madeMs: known?.madeMs ?? this.#world.now(),
      isSoft: deadlineMs === undefined || known?.isSoft === true,
      deadlineMs: Math.min(known?.deadlineMs ?? Number.POSITIVE_INFINITY, deadlineMs ?? Number.POSITIVE_INFINITY),
      owed: owed || known?.owed === true,
      inTime: (owed && reachesInTime && deadlineMs !== undefined) || known?.inTime === true,
    });
    // Its data is to be kept whether or not anything can be launched for it.
    const isOurs = expected?.configured === true && expected.outUntilMs < this.#world.now() && instance.state === "running";
    const state = group?.members.get(id)?.state;
    const isThere = isOurs && !group?.status && (state === "InService" || state === "Standby");
    this.data.noticed(id, deadlineMs !== undefined, isThere && reachesInTime);
  }

  /** It is being replaced, or replaces another one. */
  isInHand(id: string): boolean {
    const claim = this.#world.ec2.instances.get(id);
    return this.notices.has(id) || (this.claims.has(id) && claim !== undefined && !claim.tags.has("spotmax:attached"));
  }

  /** Nothing of this group is being replaced, and its maximum is its own. */
  isCalm(name: string): boolean {
    const group = this.#world.autoscaling.groups.get(name);
    if (!group || group.tags.has("spotmax:max_size")) return false;
    return ![...group.members.keys()].some((id) => this.isInHand(id)) && !this.#hasOpenClaim(name);
  }

  // --- What happens ----------------------------------------------------------------------------------------------

  #see(what: string, ids: string[], groupName: string | undefined, detail: string | undefined): void {
    const now = this.#world.now();
    if (what === "launch") this.#launched.push(...ids);
    if (what === "in service" || what === "group created")
      for (const id of ids) {
        this.#inServiceMs.set(id, now);
        this.#outOfServiceMs.delete(id);
      }
    this.data.see(what, ids, groupName);
    if (what === "standby") for (const id of ids) this.#asideMs.set(id, now);
    const expected = groupName === undefined ? undefined : this.groups.get(groupName);
    this.#seeAbove();
    if (what === "group deleted" && expected) expected.deleted = true;
    const isBalancing = /to aid in balancing|to balance instances in zones/.test(detail ?? "");
    const isScaleIn = !isBalancing && /difference between desired and actual/.test(detail ?? "");
    if (what === "group launch" && expected && isBalancing) expected.balancing++;
    const isDeath = /^(shutting-down|terminated|stopping)$/.test(what);
    if (!isDeath && !/^(detach|terminating|standby)$/.test(what)) return;
    for (const id of ids) {
      if (!this.#inServiceMs.has(id) || this.#outOfServiceMs.has(id)) continue;
      this.#outOfServiceMs.set(id, now);
      if (groupName !== undefined) this.#leftGroup.set(id, groupName);
      if (!expected) continue;
      // What the world and the operator take is nobody's fault. What a daemon lets go before its time is up must
      // have somebody in its place already, and what it ends as surplus was above the number to begin with; so is
      // what AZRebalance ends, for it launches first.
      // With weights AZRebalance and scale-in give and take in steps of other sizes than ours.
      const isExcused = isDeath
        ? this.#actor !== "daemon"
        : this.#actor === "operator" ||
          (this.#actor === "daemon" && what === "detach" && this.#isTimeUp(id)) ||
          (this.#actor === "world" && expected.weighted);
      // So the group may take one on its way out for a surplus of its own making, and say that it shrinks; and so it may
      // where AZRebalance has launched ahead, and the one it would have ended has gone by itself.
      const isAhead = expected.balancing > 0 && isScaleIn;
      if ((expected.weighted || isAhead) && this.#actor === "world" && what === "terminating" && this.isInHand(id)) {
        expected.above += this.#weightOf(groupName, id);
        expected.resized = true;
      }
      // One too many that AWS or the operator takes before it was ended is substituted, too, and nothing of ours is left
      // to be ended; so it is where AZRebalance has launched another in its place.
      const claim = this.claims.get(id);
      const isOldThere = claim && this.#isMember(claim.old, groupName) && this.#instance(claim.old)?.state === "running";
      const isSurplus = claim && !this.#instance(id)?.tags.has("spotmax:attached") && !isOldThere;
      // And so it is where the old one follows its replacement before the group has another in that one's place.
      const claims = this.#claimsOf(id);
      const wasThere = (other: string) => (this.#outOfServiceMs.get(other) ?? 0) > now - SUBSTITUTE_MS;
      const isFollowing = claims.some(wasThere) && !claims.some((other) => this.#isLiving(other));
      const isTaken = isDeath || (what === "terminating" && isBalancing);
      if (isTaken && this.#actor !== "daemon" && (isSurplus || isFollowing)) {
        expected.above += this.#weightOf(groupName, id);
        expected.resized = true;
      }
      if (isExcused) expected.floor -= this.#weightOf(groupName, id);
      const notice = this.notices.get(id);
      if (isDeath && this.#actor === "world" && this.#traits.prompt && notice?.owed && notice.inTime)
        this.find("late", `${id} was taken by AWS while still in service in ${groupName}`);
      // Our sizes always come out even, so a group ends somebody for its size only where a maximum was put back
      // below what it has, or where the operator did it. Weights may start a group above desired, and AZRebalance
      // leaves it there where the one it would have ended has gone by itself.
      if (what === "terminating" && isBalancing) expected.balancing--;
      if (what === "terminating" && isScaleIn)
        if (expected.balancing > 0) expected.balancing--;
        else if (expected.cut > 0) expected.cut -= this.#weightOf(groupName, id);
        else if (expected.configured && !expected.resized && !expected.weighted)
          this.find("2", `${groupName} scaled in and ended ${id}, and nobody but us has changed its sizes: ${detail}`);
    }
  }

  #seeAbove(): void {
    const nowMs = this.#world.now();
    const seenMs = nowMs - this.#traits.lagMs; // what passes within the lag may be seen by nobody
    for (const [name, { max }] of this.groups) {
      const isAbove = (this.#world.autoscaling.groups.get(name)?.desired ?? 0) > max && !this.#hasOpenClaim(name);
      const known = this.#above.get(name);
      if (known && (known.untilMs ?? nowMs) < seenMs) this.#above.delete(name);
      else if (!isAbove && known) known.untilMs ??= nowMs;
      else if (known) known.untilMs = undefined;
      if (isAbove && !this.#above.has(name)) this.#above.set(name, { sinceMs: nowMs });
    }
  }
  #hasOpenClaim(name: string): boolean {
    const open = [...this.claims.keys()].map((id) => this.#world.instance(id));
    return open.some((i) => i.tags.get("spotmax:group") === name && this.#isLiving(i.id) && !i.tags.has("spotmax:attached"));
  }

  #isTimeUp(id: string, earlierMs = MARGIN_MS): boolean {
    const deadlineMs = this.notices.get(id)?.deadlineMs ?? Number.POSITIVE_INFINITY;
    return this.#world.now() >= deadlineMs - earlierMs - this.#traits.spreadMs;
  }
  /**
   * Its group's minimum allows one fewer. Where it does not, and nothing presses, old and new both stay: the operator
   * wanted so many, and a detach without decrement would only launch a third. What has just been refused stays, whatever
   * has changed since.
   */
  #canGo(id: string): boolean {
    return this.#fits(id) && (this.#keptMs.get(id) ?? 0) < this.#world.now() - this.#traits.lagMs;
  }
  #fits(id: string): boolean {
    const group = this.#groupOf(this.#instance(id));
    return group !== undefined && group.desired - this.#weightOf(group.name, id) >= group.min;
  }
  /** It is in service, or was so a moment ago, by which time somebody may have seen it. */
  #wasInService(id: string): boolean {
    const outMs = this.#outOfServiceMs.get(id) ?? Number.POSITIVE_INFINITY;
    return this.#inServiceMs.has(id) && outMs >= this.#world.now() - this.#traits.lagMs;
  }
  #isMember(id: string, group: string | undefined): boolean {
    return this.#world.autoscaling.groups.get(group ?? "")?.members.get(id)?.state === "InService";
  }
  #groupOf(instance: Instance | undefined): Group | undefined {
    return instance?.group === undefined ? undefined : this.#world.autoscaling.groups.get(instance.group);
  }
  #weightOf(group: string | undefined, id: string): number {
    return this.#world.autoscaling.groups.get(group ?? "")?.members.get(id)?.weight ?? 1;
  }
  #instance(id: string | undefined): Instance | undefined {
    return this.#world.ec2.instances.get(id ?? "");
  }
  #isLiving(id: string): boolean {
    const state = this.#instance(id)?.state;
    return state === "pending" || state === "running";
  }
  #claimsOf(old: string): string[] {
    return [...this.claims].flatMap(([id, claim]) => (claim.old === old ? [id] : []));
  }
  /** As the first of its line was. */
  #isToBeProtected(id: string, { protects }: Expected): boolean {
    let first = id;
    for (let old = this.claims.get(id)?.old; old; old = this.claims.get(old)?.old) first = old;
    return protects !== this.byHand.has(first);
  }
  /** All that was ever launched in its place, and in the place of that. */
  #chainOf(old: string, depth = 0): string[] {
    const own = this.#claimsOf(old);
    return depth > 5 ? own : [...own, ...own.flatMap((id) => this.#chainOf(id, depth + 1))];
  }

  // --- Calls of daemons, at the moment of their effect -----------------------------------------------------------

  #as(actor: Actor, act: () => object): object {
    const before = this.#actor;
    this.#actor = actor;
    try {
      return act();
    } finally {
      this.#actor = before;
    }
  }
  #around<I>(service: Service, operation: string, judge: (input: I, perform: () => object) => object): void {
    const { operations } = this.#world[service];
    const inner = operations[operation];
    if (!inner) throw new Error(`the simulator has no ${service}:${operation}`);
    this.#raw.set(`${service}:${operation}`, inner);
    operations[operation] = (input: never, context) => {
      if (service === "autoscaling") this.trace?.(`${operation} ${JSON.stringify(input)}`);
      return judge(input, () => this.#as("daemon", () => inner(input, context) as object));
    };
  }

  #watchLaunches(): void {
    const judge = (input: CreateFleetRequest | RunInstancesRequest, perform: () => object) => {
      this.#launched = [];
      const answer = perform();
      const ids = this.#launched.sort();
      this.#launched = [];
      const tags = new Map((input.TagSpecifications ?? []).flatMap((s) => s.Tags ?? []).map((t) => [t.Key, t.Value ?? ""]));
      const olds = (tags.get("spotmax:replaces") ?? "").split(" ").filter(Boolean).sort();
      const daemons = [...(this.#tokens.get(input.ClientToken ?? "") ?? [])];
      const daemon = daemons.length === 1 ? daemons[0] : undefined;
      if (olds.length > 1 && this.data.keepsData(tags.get("spotmax:group")))
        this.find("5", `one launch for ${olds.join(" ")}, which have data`);
      if (ids.length > olds.length) this.find("1", `${ids.join(" ")} were launched for no more than ${olds.join(" ")}`);
      ids.forEach((id, n) => {
        const old = olds[n] ?? "";
        // Invariant 1: one daemon never launches two. The earlier one must be dead or dying before the next one is
        // asked for; a lost answer is no excuse, for the token and the claim's tag tell what became of the call.
        // Two daemons may each launch one, and then one of the two goes: that is judged when all is quiet.
        // One that is itself being reclaimed before it was attached is marked lost, and counts as dying.
        const isLost = (r: string) => this.#instance(r)?.tags.has("spotmax:lost") ?? false;
        const rival = this.#claimsOf(old).find(
          (r) => daemon && this.claims.get(r)?.daemon === daemon && this.#isLiving(r) && !isLost(r),
        );
        if (rival) this.find("1", `the daemon that launched ${rival} for ${old} has launched ${id} as well`);
        if (this.#claimsOf(old).some((r) => this.#isLiving(r))) this.rivals++;
        this.claims.set(id, { old, daemon });
        this.data.launched(id, tags.get("spotmax:group"));
        this.#judgePreaction(id, old);
        if (!this.notices.has(old)) this.find("4", `${id} was launched for ${old}, which had no notice`);
        if (!this.groups.get(tags.get("spotmax:group") ?? "")?.configured)
          this.find("4", `${id} was launched for the group ${tags.get("spotmax:group")}, which is not configured`);
        this.#judgeLaunch(id, old, tags.get("spotmax:group") ?? "");
      });
      return answer;
    };
    this.#around<CreateFleetRequest>("ec2", "CreateFleet", judge);
    this.#around<RunInstancesRequest>("ec2", "RunInstances", judge);
  }

  /** Which of an instance's notices count: only ones with a deadline, only ones without, or both, where nothing is said. */
  #kindOf(id: string): "hard" | "soft" | "both" {
    const notice = this.notices.get(id);
    const isHard = Number.isFinite(notice?.deadlineMs);
    return isHard === notice?.isSoft ? "both" : isHard ? "hard" : "soft";
  }

  /** What is launched for whom, and when: the ladder's rules as far as they show in one launch. */
  #judgeLaunch(id: string, old: string, name: string): void {
    const [claim, before] = [this.#instance(id), this.#instance(old)];
    const [group, expected] = [this.#world.autoscaling.groups.get(name), this.groups.get(name)];
    if (!claim || !before || !group || !expected) return;
    const what = `${id} (${claim.lifecycle}) was launched for ${old} (${before.lifecycle})`;
    const kind = this.#kindOf(old);
    const isSpotMember = before.lifecycle === "spot" || before.tags.has("spotmax:fallback");
    if (!isSpotMember && claim.lifecycle === "spot") this.find("choice", what);
    if (isSpotMember && claim.lifecycle === "on-demand" && (kind === "soft" || !expected.fallback))
      this.find("choice", `${what}, which has ${kind === "soft" ? "no deadline" : "no fallback"}`);
    for (const [key, { value, propagate }] of group.tags)
      if (propagate && claim.tags.get(key) !== value) this.find("choice", `${what} without the group's tag ${key}`);
    // By that tag it goes back to spot; and an on-demand member stays one.
    const isFallback = isSpotMember && claim.lifecycle === "on-demand";
    if (claim.tags.has("spotmax:fallback") !== isFallback)
      this.find("choice", `${what}, and ${isFallback ? "does not say" : "says"} that it is a fallback`);
    const isBack = claim.type === before.type && claim.zone === before.zone && kind === "hard";
    if (this.#traits.strict && isBack && !this.data.keepsData(name) && this.#hasFreshPool(group, old))
      this.find("choice", `${what}, from the pool that AWS takes it back to (${claim.type} in ${claim.zone})`);
    const asideMs = this.#asideMs.get(old) ?? Number.POSITIVE_INFINITY;
    if (group.members.get(old)?.state === "Standby" && asideMs < this.#world.now() - this.#traits.lagMs)
      this.find("choice", `${what}, which is in Standby`);
    // Somebody must own the deadline, whatever becomes of the launch.
    if (kind === "hard" && !this.#sentMs.has(`detach ${old}`)) this.find("choice", `${what} before a detach message was sent`);
    if (kind !== "soft") return;
    const ageMs = this.#world.now() - before.launchedAtMs;
    if (ageMs < YOUNG_MS - this.#traits.spreadMs - 1_000) this.find("choice", `${what}, which is ${ageMs / 1000} s old`);
    if (!this.#traits.alone) return;
    // Those with a deadline may come in between.
    const open = [...this.claims].filter(
      ([other, c]) =>
        this.#isLiving(other) && !this.#instance(other)?.tags.has("spotmax:attached") && this.#kindOf(c.old) === "soft",
    );
    const inHand = new Set(
      open.flatMap(([other, c]) => (this.#instance(other)?.tags.get("spotmax:group") === name ? [c.old] : [])),
    );
    inHand.delete(old);
    if (inHand.size >= expected.limit)
      this.find("choice", `${what} beside ${[...inHand].join(" ")}, and ${name} may have ${expected.limit} in hand`);
  }

  /** The group offers one of this member's weight that no notice names. */
  #hasFreshPool(group: Group, old: string): boolean {
    const noticed = [...this.notices].flatMap(([id, { deadlineMs }]) =>
      Number.isFinite(deadlineMs) ? [this.#instance(id)] : [],
    );
    const taken = new Set(noticed.map((instance) => `${instance?.type} ${instance?.zone}`));
    const offers = (group.mixed?.LaunchTemplate?.Overrides ?? []).flatMap(({ InstanceType: type, WeightedCapacity }) =>
      type && Number(WeightedCapacity ?? 1) === this.#weightOf(group.name, old) ? [type] : [],
    );
    return offers.some((type) => group.subnets.some(({ zone }) => !taken.has(`${type} ${zone}`)));
  }

  /** One that we let go lives on for as long as the configuration says. */
  #judgeEnd(id: string, detachedMs: number): void {
    const name = this.#instance(id)?.tags.get("spotmax:detached") ?? "";
    const expected = this.groups.get(name);
    const kind = this.#kindOf(id);
    if (!expected || kind === "both" || (kind === "hard" && this.data.keepsData(name))) return;
    const dueMs = kind === "soft" ? detachedMs + expected.softEndMs : (this.notices.get(id)?.deadlineMs ?? 0) + 60_000;
    if (this.#world.now() < dueMs - this.#traits.spreadMs - 1_000)
      this.find("choice", `${id} was ended ${(dueMs - this.#world.now()) / 1000} s before its time`);
  }

  #watchInstances(): void {
    this.#around<TerminateInstancesRequest>("ec2", "TerminateInstances", (input, perform) => {
      for (const id of input.InstanceIds ?? []) {
        const instance = this.#instance(id);
        if (!instance || !this.#isLiving(id)) continue;
        const detachedMs = this.#detachedMs.get(id);
        if (detachedMs !== undefined) this.#judgeEnd(id, detachedMs);
        // Invariant 4. A tag in itself is not enough of a reason, but without one of these two nothing is ended.
        if (!instance.tags.has("spotmax:replaces") && !instance.tags.has("spotmax:detached"))
          this.find("4", `${id}, which carries no tag of ours, was ended`);
        // Members are ended through their group or not at all, else the group is one short until it notices.
        const member = this.#groupOf(instance)?.members.get(id);
        if (member && (member.state === "InService" || member.state === "Pending"))
          this.find("4", `${id} was ended while a member of ${instance.group}`);
      }
      return perform();
    });
    this.#around<CreateTagsRequest>("ec2", "CreateTags", (input, perform) => {
      const answer = perform();
      const ids = input.Resources ?? [];
      const tags = new Map((input.Tags ?? []).map((tag) => [tag.Key, tag.Value ?? ""]));
      for (const id of ids) {
        // Only what has had a notice, or was launched by us, is ever tagged.
        const isOurs = this.data.tags(input, id) || this.notices.has(id) || this.claims.has(id);
        if (!isOurs) this.find("4", `${id}, which is not our business, was tagged`);
        const order = tags.get("spotmax:order");
        if (order === undefined) continue;
        // Two daemons, or two versions, that name different orders would give one old instance two replacements: so
        // the order is that of the IDs, whatever the order in an answer, and once written it stays.
        if (order !== order.split(" ").sort().join(" ")) this.find("1", `the order on ${id} is not sorted: ${order}`);
        const before = this.#orders.get(id);
        if (before !== undefined && before !== order) this.find("1", `the order on ${id} was ${before} and became ${order}`);
        this.#orders.set(id, order);
      }
      // A settled claim is never looked at again: it must have its place for good.
      if (tags.has("spotmax:attached"))
        for (const id of ids) {
          const old = this.claims.get(id)?.old ?? "";
          if (!this.#wasInService(id) && !this.#groupOf(this.#instance(id)))
            this.find("3", `${id} was settled without being in service`);
          const member = this.#groupOf(this.#instance(old))?.members.get(old);
          const group = this.#groupOf(this.#instance(old));
          if (member?.state === "InService" && group?.name === this.#instance(id)?.group && this.#canGo(old))
            this.find("6", `${id} was settled while ${old} is still in service`);
        }
      return answer;
    });
  }

  #watchVolumes(): void {
    const effect = <I>(operation: string, judge: (input: I, answer: object) => void) =>
      this.#around<I>("ec2", operation, (input, perform) => {
        const answer = perform(); // what is refused has no effect to be judged
        judge(input, answer);
        return answer;
      });
    effect<ModifyInstanceAttributeRequest>("ModifyInstanceAttribute", (input) => this.data.kept(input));
    effect<AttachVolumeRequest>("AttachVolume", (input) => this.data.attached(input));
    effect<CreateSnapshotRequest>("CreateSnapshot", (input, answer) =>
      this.data.copied(input, (answer as { SnapshotId: string }).SnapshotId),
    );
    effect<CreateVolumeRequest>("CreateVolume", (input, answer) =>
      this.data.made(input, (answer as { VolumeId: string }).VolumeId),
    );
    // Nobody of ours ever does these, whatever it is that they name.
    for (const operation of ["DetachVolume", "DeleteVolume", "DeleteSnapshot"])
      effect<object>(operation, (input) => this.find("5", `${operation} of ${JSON.stringify(input)}`));
  }

  #configured(what: string, name: string | undefined): void {
    if (!this.groups.get(name ?? "")?.configured) this.find("4", `${what} of ${name}, which is not configured`);
  }

  #watchGroups(): void {
    this.#around<AttachInstancesQuery>("autoscaling", "AttachInstances", (input, perform) => {
      this.#configured("an attach", input.AutoScalingGroupName);
      const answer = perform();
      for (const id of input.InstanceIds ?? []) {
        const tag = this.#instance(id)?.tags.get("spotmax:group");
        if (!this.claims.has(id) || tag !== input.AutoScalingGroupName)
          this.find("4", `${id}, launched for ${tag}, was attached to ${input.AutoScalingGroupName}`);
      }
      return answer;
    });

    this.#around<DetachInstancesQuery>("autoscaling", "DetachInstances", (input, perform) => {
      this.#configured("a detach", input.AutoScalingGroupName);
      const isKept = (id: string) => input.ShouldDecrementDesiredCapacity && !this.#fits(id);
      for (const id of (input.InstanceIds ?? []).filter(isKept)) this.#keptMs.set(id, this.#world.now());
      const answer = perform(); // what is refused has no effect to be judged
      for (const id of input.InstanceIds ?? []) this.#judgeDetach(id, input);
      return answer;
    });

    this.#around<UpdateAutoScalingGroupType>("autoscaling", "UpdateAutoScalingGroup", (input, perform) => {
      const name = input.AutoScalingGroupName ?? "";
      this.#configured("an update", name);
      const group = this.#world.autoscaling.groups.get(name);
      const expected = this.groups.get(name);
      if (!group || !expected) return perform();
      const { min, max, desired } = group;
      this.#seeAbove();
      const aboveMs = this.#above.get(name)?.sinceMs ?? Number.POSITIVE_INFINITY;
      const answer = perform();
      if (group.min !== min) this.find("2", `the minimum of ${name} went from ${min} to ${group.min}`);
      // AWS lets a bound take desired along. Only where the operator himself asked for more than his own maximum
      // may that happen, or where desired is higher by what nobody can take back (the slack `above`, used up by it):
      // a weighted group has taken one of ours for a surplus of its own making, or the operator has ended one of ours
      // that was one too many. Then ten minutes come first. Anywhere else it costs a member.
      const cut = desired - group.desired;
      const isOwed = !expected.resized && cut > 0 && cut <= expected.above && aboveMs <= this.#world.now() - ABOVE_MS;
      const isExcused = expected.resized || isOwed;
      if (isOwed) expected.above -= cut;
      if (isOwed) expected.cut += cut;
      if (group.desired !== desired && !(isExcused && group.max === expected.max))
        this.find("2", `a maximum of ${group.max} took desired of ${name} from ${desired} to ${group.desired}`);
      if (group.max < max && group.max !== expected.max)
        this.find("2", `the maximum of ${name} was put back to ${group.max} instead of ${expected.max}`);
      return answer;
    });

    this.#around<SetInstanceProtectionQuery>("autoscaling", "SetInstanceProtection", (input, perform) => {
      this.#configured("a protection", input.AutoScalingGroupName);
      for (const id of input.InstanceIds ?? [])
        if (!this.claims.has(id)) this.find("4", `the protection of ${id}, which we did not launch, was changed`);
      return perform();
    });

    this.#around<TerminateInstanceInAutoScalingGroupType>(
      "autoscaling",
      "TerminateInstanceInAutoScalingGroup",
      (input, perform) => {
        const id = input.InstanceId ?? "";
        if (!this.claims.has(id)) this.find("4", `${id}, which we did not launch, was ended in its group`);
        const answer = perform(); // what is refused has no effect to be judged
        if (this.#instance(id)?.tags.has("spotmax:attached")) this.find("1", `${id} was ended, although its claim is settled`);
        if (!input.ShouldDecrementDesiredCapacity) this.find("2", `${id} was ended without decrement`);
        return answer;
      },
    );

    for (const operation of ["CreateOrUpdateTags", "DeleteTags"])
      this.#around<CreateOrUpdateTagsType>("autoscaling", operation, (input, perform) => {
        for (const { ResourceId, Key } of input.Tags ?? []) {
          this.#configured(`a tag ${Key}`, ResourceId);
          if (Key !== "spotmax:max_size" && Key !== "spotmax:cooldown")
            this.find("4", `the tag ${Key} of ${ResourceId} was changed`);
        }
        return perform();
      });
  }

  /**
   * Invariant 6. An instance with a notice goes when somebody launched for it is in service, or, where its deadline
   * is hard, when its time is up; without decrement in the latter case only. Its tag must stand before it goes:
   * after a crash in between nobody would know whose it was.
   */
  #judgeDetach(id: string, input: DetachInstancesQuery): void {
    const name = input.AutoScalingGroupName ?? "";
    const instance = this.#instance(id);
    const decrement = input.ShouldDecrementDesiredCapacity === true;
    this.letGo.add(id);
    this.#detachedMs.set(id, this.#world.now());
    const kind = this.#kindOf(id);
    const { madeMs = 0, deadlineMs = 0 } = this.notices.get(id) ?? {};
    const { detachMs = 0, softDetachMs = 0, drained } = this.groups.get(name) ?? {};
    const outMs = deadlineMs - (drained ? PRESSED_MS : DRAIN_MS);
    const dueMs = kind === "soft" ? madeMs + softDetachMs : Math.min(madeMs + detachMs, outMs);
    if (kind !== "both" && this.#world.now() < dueMs - this.#traits.spreadMs - 2_000)
      this.find("choice", `${id} was detached ${(dueMs - this.#world.now()) / 1000} s before its time`);
    if (!this.notices.has(id)) this.find("4", `${id} was detached from ${name} without any notice`);
    this.#judgeDeregistration(id, name);
    this.#judgeDrain(id, name);
    if (this.#traits.prompt && this.notices.get(id)?.inTime && this.#world.now() > deadlineMs - MARGIN_MS + 2_000)
      this.find("late", `${id} was detached only ${(deadlineMs - this.#world.now()) / 1000} s before its deadline`);
    if (instance?.tags.get("spotmax:detached") !== name) this.find("3", `${id} was detached before it carries spotmax:detached`);
    if (this.#isTimeUp(id)) return;
    if (!decrement) {
      this.find("6", `${id} was detached without decrement before its time was up`);
      return;
    }
    const ready = this.#chainOf(id).filter((claim) => this.#wasInService(claim));
    // A replacement that died as a member was substituted by the group, as any member is: then the group's own
    // stands in for it, and the group must be full without the one that goes.
    const group = this.#world.autoscaling.groups.get(name);
    // One that has just died is a member until the group notices, and for that one it has a substitute.
    const shown = [...(group?.members.values() ?? [])].filter(({ state }) => state === "InService");
    const isFullNow = group !== undefined && shown.reduce((sum, { weight }) => sum + weight, 0) >= group.desired;
    // Or it was so a moment ago, when somebody may have seen it.
    const isFull = isFullNow || (this.#fullMs.get(name) ?? 0) >= this.#world.now() - this.#traits.lagMs;
    if (!ready.length && isFull && this.#chainOf(id).some((claim) => this.#inServiceMs.has(claim))) return;
    if (!ready.length) {
      this.find("6", `${id} was detached, and nobody launched for it is in service`);
      return;
    }
    if (this.#isTimeUp(id, DRAIN_MS)) return;
    const arns = group?.targetGroupArns ?? [];
    const isHealthy = (claim: string) => arns.every((arn) => this.#world.elbv2.health(arn, claim) === "healthy");
    if (!ready.some((claim) => isHealthy(claim) || this.#outOfServiceMs.has(claim)))
      this.find("6", `${id} was detached before ${ready.join(" ")} is healthy in its target groups`);
  }

  /** Pods have their time: until the deadline presses, or until their grace is over. */
  #judgeDrain(id: string, name: string): void {
    const expected = this.groups.get(name);
    const kind = this.#kindOf(id);
    const notice = this.notices.get(id);
    if (!this.#kube || !notice || !expected?.drained || !this.#traits.prompt || !this.#traits.served || kind === "both") return;
    const count = this.#kube.hasJoined(id, 2 * 60_000) ? this.#kube.podsOn(id).length : 0;
    const dueMs = kind === "hard" ? (notice.deadlineMs ?? 0) - DRAIN_ENDS_MS : notice.madeMs + expected.graceMs;
    if (count && this.#world.now() < dueMs - this.#traits.spreadMs - 2_000)
      this.find("pods", `${id} was detached with ${count} pods ${(dueMs - this.#world.now()) / 1000} s before their time was up`);
  }
  /** Where agents answer, the services have left before their instance does, as long as nothing presses. */
  #judgeDeregistration(id: string, name: string): void {
    const { state, privateIp = "" } = this.#instance(id) ?? {};
    const isOwed = this.groups.get(name)?.consul && this.#traits.served && this.#traits.prompt && state === "running";
    if (!isOwed || this.#isTimeUp(id, MARGIN_MS + CONSUL_MS)) return;
    const left = this.agents?.services.get(privateIp)?.size;
    if (left !== 0) this.find("consul", `${id} was detached with ${left ?? "all"} of its services in Consul`);
  }
  /** No agent is asked but the one on an instance that has a notice. */
  agentAsked(address: string): void {
    const instance = [...this.#world.ec2.instances.values()].find(({ privateIp }) => privateIp === address);
    // Taken out by somebody else meanwhile, what was begun is done to its end.
    const outMs = this.#outOfServiceMs.get(instance?.id ?? "") ?? 0;
    const isJustOut = outMs >= this.#world.now() - this.#traits.lagMs - CONSUL_MS;
    const left = isJustOut ? this.#leftGroup.get(instance?.id ?? "") : undefined;
    const name = instance?.group ?? instance?.tags.get("spotmax:detached") ?? left;
    if (!instance || !this.notices.has(instance.id) || !this.groups.get(name ?? "")?.consul)
      this.find("4", `the agent at ${address}, on ${instance?.id} of ${name}, was asked`);
  }

  watchCluster(kube: FakeKube): void {
    this.#kube = kube;
    kube.onChange = (what, id, marked) => this.#judgeNode(kube, what, id, marked);
  }
  /** A node of an instance with a notice, and no other, is cordoned, then drained; it is given back where the instance stays. */
  #judgeNode(kube: FakeKube, what: "cordon" | "uncordon" | "evict", id: string, marked: string | undefined): void {
    const instance = this.#instance(id);
    const notice = this.notices.get(id);
    const name = instance?.group ?? instance?.tags.get("spotmax:detached");
    // Until it is marked for a new notice, of which no daemon may have heard yet. One without a deadline leaves the mark.
    if (what === "uncordon" && marked === OF_OLD && !this.theirs.has(id)) {
      if (!this.#wasInService(id)) this.find("pods", `the node of ${id} was given back, which is not in service`);
      return;
    }
    if (!notice || (name !== undefined && !this.groups.get(name)?.drained)) {
      this.find("4", `${what} on the node of ${id} of ${name}, which is not our business`);
      return;
    }
    const now = this.#world.now() + this.#traits.spreadMs + 1_000;
    if (what === "uncordon") {
      const dueMs = Math.min(
        (notice.deadlineMs ?? Number.POSITIVE_INFINITY) + UNTRUE_MS,
        notice.isSoft ? notice.madeMs + FORGOTTEN_MS : Number.POSITIVE_INFINITY,
      );
      if (this.theirs.has(id)) this.find("pods", `the node of ${id} was uncordoned, and it was cordoned by somebody else`);
      if (now < dueMs) this.find("pods", `the node of ${id} was uncordoned ${(dueMs - now) / 1000} s too early`);
      if (!this.#wasInService(id)) this.find("pods", `the node of ${id} was uncordoned, which is not in service`);
      return;
    }
    if (what === "cordon") return;
    if (!kube.node(id).spec.unschedulable) this.find("pods", `a pod was evicted from the node of ${id}, which is not cordoned`);
    if (this.#isTimeUp(id, PRESSED_MS + 1_000)) return;
    const isSoft = this.#kindOf(id) !== "hard";
    const group = this.#world.autoscaling.groups.get(name ?? "");
    const isFull = group !== undefined && (this.#world.autoscaling.sample(group.name)?.inService ?? 0) >= group.desired;
    const hasPlace = (claim: string) => this.#wasInService(claim) && (isSoft || kube.hasJoined(claim) || !this.#isLiving(claim));
    const chain = this.#chainOf(id);
    if (!chain.some(hasPlace) && !(isFull && chain.some((claim) => this.#inServiceMs.has(claim))))
      this.find("pods", `a pod was evicted from the node of ${id}, and ${chain.join(" ") || "nobody"} has no node for it yet`);
  }
  /** Members that stay, and whose nodes are still marked. */
  #marked(): string[] {
    const kube = this.#kube;
    const groups = [...this.#world.autoscaling.groups.values()].filter(({ name }) => this.groups.get(name)?.drained);
    return groups.flatMap(({ members }) =>
      [...members].flatMap(([id, { state }]) => (state === "InService" && kube && MARK in kube.node(id).annotations ? [id] : [])),
    );
  }

  #watchMessages(): void {
    this.#around<SendMessageBatchRequest>("sqs", "SendMessageBatch", (input, perform) => {
      const answer = perform();
      for (const { MessageBody = "" } of input.Entries ?? [])
        if (readBody(MessageBody)?.type === PREACTION) this.#judgeAsking(MessageBody);
      for (const { MessageBody = "" } of input.Entries ?? [])
        for (const id of readBody(MessageBody)?.ids ?? [])
          this.#sentMs.set(`${this.#queueName(input.QueueUrl)} ${id}`, this.#world.now());
      return answer;
    });
    if (this.#traits.strict) this.#watchReceives();
    this.#around<DeleteMessageBatchRequest>("sqs", "DeleteMessageBatch", (input, perform) => {
      const queue = this.#world.sqs.queues.get(input.QueueUrl ?? "");
      const going = new Set<Message>();
      for (const { ReceiptHandle = "" } of input.Entries ?? []) {
        const message = queue?.receipts.get(ReceiptHandle);
        // Only the newest receipt deletes.
        if (message && !message.deleted && message.receiptHandle === ReceiptHandle) going.add(message);
      }
      for (const message of going) this.#judgeDelete(this.#queueName(input.QueueUrl), message, going);
      return perform();
    });
  }
  /** Where nothing fails a good message is received once: while it is in hand its lease does not run out. */
  #watchReceives(): void {
    const { operations } = this.#world.sqs;
    const inner = operations.ReceiveMessage;
    if (!inner) throw new Error("the simulator has no ReceiveMessage");
    operations.ReceiveMessage = async (input: { QueueUrl?: string }, context) => {
      const answer = (await inner(input as never, context)) as ReceiveMessageResult;
      for (const { Body = "", Attributes } of answer.Messages ?? [])
        if (!this.poison.has(Body) && Number(Attributes?.ApproximateReceiveCount) > 1)
          this.find("7", `received again although nothing failed: ${this.#queueName(input.QueueUrl)} ${Body.slice(0, 300)}`);
      return answer;
    };
  }
  /** Preaction asks for members that it may ask for, old enough, and for better types only. */
  #judgeAsking(body: string): void {
    const { maxgroup } = JSON.parse(body) as { maxgroup?: { better?: string[][] } };
    const [id = ""] = readBody(body)?.ids ?? [];
    const instance = this.#instance(id);
    const better = maxgroup?.better?.flat();
    this.asked.add(id);
    if (better) this.#better.set(id, new Set([...(this.#better.get(id) ?? []), ...better]));
    const known = this.notices.get(id);
    if (known) known.isSoft = true;
    if (known) return; // a copy, or one that has another notice as well
    const madeMs = this.#world.now();
    this.notices.set(id, {
      isNamed: false,
      madeMs,
      isSoft: true,
      deadlineMs: Number.POSITIVE_INFINITY,
      owed: false,
      inTime: false,
    });
    if (!instance || !this.groups.get(instance.group ?? "")?.configured) {
      if (!this.#outOfServiceMs.has(id)) this.find("4", `${id}, which is in no group of ours, is to be replaced`);
      return;
    }
    const ageMs = this.#world.now() - instance.launchedAtMs + this.#traits.spreadMs + 1_000;
    if (!better) {
      if (!instance.tags.has("spotmax:fallback") || ageMs < 600_000)
        this.find("preaction", `${id} is no fallback old enough to go back to spot`);
      return;
    }
    const band = this.bands.get(instance.type) ?? -1;
    // The data may have moved since; two of a life's types do.
    const isBetter = better.some((type) => (this.bands.get(type) ?? 9) < band) || !this.#traits.strict;
    if (instance.lifecycle !== "spot" || ageMs < 3_600_000 || !isBetter)
      this.find(
        "preaction",
        `${id} (${instance.lifecycle}) was launched ${Math.round(ageMs / 1000)} s ago and is to be replaced`,
      );
  }

  /** Whoever has no other notice is replaced by spot only, in a strictly better band; and no more at a time than allowed. */
  #judgePreaction(id: string, old: string): void {
    if (!this.asked.has(old) || Number.isFinite(this.notices.get(old)?.deadlineMs)) return;
    const [fresh, replaced] = [this.#instance(id), this.#instance(old)];
    if (fresh?.lifecycle !== "spot") this.find("preaction", `${id}, launched for ${old} without need, is on-demand`);
    const better = this.#better.get(old);
    if (better && fresh && !this.notices.get(old)?.isNamed && !better.has(fresh.type))
      this.find("preaction", `${id} is a ${fresh.type}, and in the place of ${old} only ${[...better].join(" ")} would do`);
    if (!this.#traits.strict) return;
    const open = [...this.claims].flatMap(([claim, { old: o }]) =>
      this.#isLiving(claim) &&
      !this.#instance(claim)?.tags.has("spotmax:attached") &&
      this.#instance(claim)?.tags.get("spotmax:group") === replaced?.group
        ? [o]
        : [],
    );
    const soft = new Set([...open.filter((o) => !Number.isFinite(this.notices.get(o)?.deadlineMs)), old]);
    const limit = this.groups.get(replaced?.group ?? "")?.limit ?? 1;
    if (soft.size > limit)
      this.find("preaction", `${[...soft].join(" ")} are in hand in ${replaced?.group}, which allows ${limit}`);
  }

  #queueName(url: string | undefined): string {
    const { interruption, detach, termination } = this.#queues;
    return url === interruption ? "interruption" : url === detach ? "detach" : url === termination ? "termination" : "other";
  }

  /**
   * Invariant 7. Whatever a message asked for must be done, be impossible, or be owned by another message that is in
   * a queue by now. "Done" is judged by the truth, and what was true within the lag is allowed for: the daemon
   * read before it deleted. `going` are all that the same call deletes: none of them owns anything any more.
   */
  #judgeDelete(queue: string, message: Message, going: ReadonlySet<Message>): void {
    const { body } = message;
    if (this.poison.has(body)) {
      this.find("7", `a message that nobody can understand was deleted: ${body.slice(0, 80)}`);
      return;
    }
    const event = readBody(body);
    if (!event) return;
    const sentSince = (to: string, id: string) =>
      (this.#sentMs.get(`${to} ${id}`) ?? Number.NEGATIVE_INFINITY) >= message.firstReceivedAtMs;
    for (const id of event.ids) {
      const instance = this.#instance(id);
      const group = this.#groupOf(instance);
      const expected = this.groups.get(group?.name ?? event.group ?? "");
      const inServiceMs = this.#inServiceMs.get(id);
      // For as long as anybody looked, it was a member in service of a group that we look after.
      const wasThere =
        group !== undefined &&
        expected?.configured === true &&
        !expected.deleted &&
        group.members.get(id)?.state === "InService" &&
        instance?.state === "running" &&
        inServiceMs !== undefined &&
        inServiceMs <= this.#world.now() - this.#traits.lagMs;
      const what = `the ${event.type} about ${id} was deleted`;
      if (queue === "interruption" && wasThere && !sentSince("interruption", id)) {
        const claims = this.#claimsOf(id).filter((c) => this.#isLiving(c));
        const barredUntilMs = Math.max(expected.pausedUntilMs, expected.outUntilMs);
        const couldLaunch = !group.suspended.has("Launch") && barredUntilMs < this.#world.now() - this.#traits.lagMs;
        const attached = claims.some((c) => group.members.has(c)) || this.#claimsOf(id).some((c) => this.#outOfServiceMs.has(c));
        const isOn = event.type === PREACTION || (event.type === "AWS Health Event" ? expected.maintenance : expected.rebalance);
        // Copies that two daemons sent may read alike.
        const isOwned = this.#world.sqs.queues
          .get(this.#queues.interruption)
          ?.messages.values()
          .some((other) => !going.has(other) && readBody(other.body)?.ids.includes(id));
        // With a hard deadline somebody must own the way out, and there is a replacement, or no time is left for one.
        if (event.type === WARNING && couldLaunch) {
          if (!attached && !this.#isTimeUp(id)) this.find("7", `${what} before a replacement was attached`);
          if (!this.#sentMs.has(`detach ${id}`)) this.find("7", `${what} before a detach message was sent`);
        }
        // Without one, having nobody launched is an end; having one launched and left alone is not.
        // One that is itself reclaimed before it was attached is a rung that failed.
        else if (
          SOFT.has(event.type) &&
          isOn &&
          !isOwned &&
          claims.some((c) => !this.#instance(c)?.tags.has("spotmax:lost")) &&
          (!attached || !this.#sentMs.has(`detach ${id}`))
        )
          this.find("7", `${what}, and ${claims.join(" ")} was launched for it and left alone`);
        else if (event.ids.length > 1 && expected.maintenance && couldLaunch && !sentSince("interruption", id))
          this.find("7", `${what}, and no message of its own was sent`);
      }
      if (queue === "detach" && event.type === DETACH && !sentSince("detach", id) && !sentSince("termination", id)) {
        // A minute after its deadline a notice that did not come true is one without.
        const lapsesMs = (event.deadlineMs ?? 0) + 60_000 + this.#traits.spreadMs;
        const isHard = event.deadlineMs !== undefined && this.#world.now() < lapsesMs;
        const claims = this.#claimsOf(id).filter((c) => this.#isLiving(c) || this.#wasInService(c));
        if (wasThere && (isHard || (claims.length && this.#canGo(id)))) this.find("7", `${what} while it is still a member`);
        else if (this.letGo.has(id) && this.#isLiving(id) && !group && !expected?.deleted)
          this.find("7", `${what} before a termination message was sent`);
      }
      if (queue === "termination" && event.type === TERMINATION && !sentSince("termination", id))
        if (this.#isLiving(id) && !group && instance?.tags.get("spotmax:detached") === event.group)
          this.find("7", `${what} while it is running`);
    }
  }

  // --- When all is quiet -----------------------------------------------------------------------------------------

  /** What still keeps the world from being quiet, in words; undefined: nothing does. `lines` is what daemons have logged. */
  unrest(lines: readonly string[]): string | undefined {
    const { ec2, autoscaling } = this.#world;
    for (const [name, url] of Object.entries(this.#queues)) {
      if (name === "deadLetter") continue;
      const size = this.#world.sqs.queues.get(url)?.messages.size ?? 0;
      if (size) return `${size} messages in the queue ${name}: ${this.#world.sqs.bodies(url).join(" ").slice(0, 400)}`;
    }
    for (const group of autoscaling.groups.values()) {
      const expected = this.groups.get(group.name);
      if (!expected?.configured) continue;
      if (group.status) return `${group.name} is being deleted`;
      if (group.tags.has("spotmax:max_size"))
        return `${group.name} carries spotmax:max_size=${group.tags.get("spotmax:max_size")?.value}`;
      let units = 0;
      for (const [id, { state, instance, weight }] of group.members) {
        if (state === "Standby") continue;
        if (state !== "InService" || instance.state !== "running")
          return `${id} of ${group.name} is ${state} and ${instance.state}`;
        units += weight;
      }
      if (units < group.desired) return `${group.name} has ${units} units and desires ${group.desired}`;
    }
    for (const id of this.claims.keys()) {
      const instance = this.#instance(id);
      if (instance && this.#isLiving(id) && !instance.tags.has("spotmax:attached")) return `the claim ${id} is not settled`;
    }
    for (const id of this.letGo) {
      const instance = ec2.instances.get(id);
      if (instance && this.#isLiving(id) && !instance.group) return `${id}, which we let go, is still running`;
    }
    const [marked] = this.#marked();
    if (marked) return `the node of ${marked}, which stays, is still cordoned`;
    return this.data.unrest(lines);
  }

  /** To be called when all is quiet. */
  final(): Account {
    for (const [name, expected] of this.groups) {
      const group = this.#world.autoscaling.groups.get(name);
      if (!group || !expected.configured || expected.deleted) continue;
      // Invariant 2. Where more is desired than the operator's own maximum, AWS itself has cut it; and fewer than the
      // minimum he could ask for only because ours stood beside the old one at that moment.
      const wanted = Math.max(expected.min, Math.min(expected.desired, expected.max));
      if (group.min !== expected.min) this.find("2", `the minimum of ${name} is ${group.min} and was ${expected.min}`);
      if (group.max !== expected.max) this.find("2", `the maximum of ${name} is ${group.max} and was ${expected.max}`);
      if (group.desired < wanted - expected.below || group.desired > wanted + expected.above)
        this.find("2", `desired of ${name} is ${group.desired} and was ${wanted}`);
      for (const [id, member] of group.members)
        if (this.claims.has(id) && member.state === "InService" && member.protected !== this.#isToBeProtected(id, expected))
          this.find("2", `${id} is ${member.protected ? "still" : "no longer"} protected from scale-in`);
    }
    for (const id of this.theirs)
      if (this.#isLiving(id) && !this.#kube?.node(id).spec.unschedulable)
        this.find("pods", `the node of ${id} is uncordoned, and it was cordoned by somebody else`);
    const inGroup = new Map<string, string[]>();
    for (const [id, { old }] of this.claims) {
      const instance = this.#instance(id);
      if (!instance || !this.#isLiving(id)) continue;
      // Invariant 1: at most one of those launched for it is a member in the end.
      if (instance.group) inGroup.set(old, [...(inGroup.get(old) ?? []), id]);
      // Invariant 3; a settled one outside was taken out later, by the operator or for another notice.
      if (!instance.group && !instance.tags.has("spotmax:attached")) this.find("3", `${id}, launched for ${old}, is in no group`);
    }
    for (const [old, ids] of inGroup)
      if (ids.length > 1) this.find("1", `${ids.join(" ")} are all members in the place of ${old}`);
    for (const id of this.letGo)
      if (this.#isLiving(id) && !this.#instance(id)?.group) this.find("3", `${id}, which we let go, is still running`);
    // Invariant 7: what nobody understands is in the dead-letter queue, each of it, and nothing else is there.
    const dead = this.#world.sqs.bodies(this.#queues.deadLetter);
    for (const body of this.poison)
      if (!dead.includes(body)) this.find("7", `not in the dead-letter queue: ${body.slice(0, 80)}`);
    if (!this.#traits.deadLetters)
      for (const body of dead)
        if (!this.poison.has(body)) this.find("7", `in the dead-letter queue, and it is a good message: ${body.slice(0, 300)}`);
    if (this.#traits.strict)
      for (const [id, { owed }] of this.notices) {
        const launches = this.#claimsOf(id).length;
        // AZRebalance may have ended one that waited for its turn.
        const isGone = !this.letGo.has(id) && !this.#groupOf(this.#instance(id));
        if (owed && launches !== 1 && !(isGone && launches === 0))
          this.find("1", `${launches} launches for ${id} in a life in which nothing fails`);
      }
    return this.data.final();
  }
}

const WARNING = "EC2 Spot Instance Interruption Warning";
const PREACTION = "MaxGroup Preaction";
const SOFT = new Set(["EC2 Instance Rebalance Recommendation", "AWS Health Event", PREACTION]);

/** What a good message is about; undefined for anything else. */
function readBody(body: string): { type: string; ids: string[]; group?: string; deadlineMs?: number } | undefined {
  let event: {
    "detail-type"?: string;
    detail?: { "instance-id"?: string; statusCode?: string; affectedEntities?: { entityValue?: string }[] };
    maxgroup?: { group?: string; deadlineMs?: number };
  };
  try {
    event = JSON.parse(body);
  } catch (error) {
    if (error instanceof SyntaxError) return undefined; // poison
    throw error;
  }
  const { "detail-type": type, detail } = event;
  if (typeof type !== "string" || typeof detail !== "object" || detail === null || detail.statusCode === "closed")
    return undefined;
  const many = Array.isArray(detail.affectedEntities) ? detail.affectedEntities : [];
  const ids = [detail["instance-id"], ...many.map((entity) => entity.entityValue)];
  return {
    type,
    ids: ids.filter((id) => typeof id === "string"),
    group: event.maxgroup?.group,
    deadlineMs: event.maxgroup?.deadlineMs,
  };
}

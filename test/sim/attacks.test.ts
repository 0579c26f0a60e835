// Attempts to break the invariants: each test names the rule that it attacks.
import { expect, test } from "bun:test";
import { AwsError, type Call, type Fault } from "../aws/world.ts";
import { type Daemon, Stage } from "./harness.ts";

const three = { min: 3, max: 5, desired: 3 };
const full = { min: 3, max: 3, desired: 3 };
const first = <T>(list: readonly T[]): T => {
  const [one] = list;
  if (one === undefined) throw new Error("nothing there");
  return one;
};
const internal = () => new AwsError("InternalError", "internal", 500);
const claims = (s: Stage) => [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces"));
const sizes = (s: Stage, name = "web") => {
  const g = s.world.autoscaling.groups.get(name);
  return [g?.min, g?.max, g?.desired];
};
/** The fault once, at the n-th call of this operation. */
const once = (s: Stage, operation: string, fault: Fault, nth = 1) => {
  let n = 0;
  s.world.intercept = (call: Call) => (call.operation === operation && ++n === nth ? fault : undefined);
};
/** A daemon that, once its last long poll has ended, receives nothing more from this queue. */
const deaf = (d: Daemon, queue: string) => {
  const open = d.ctx.deps.sqs;
  d.ctx.deps.sqs = (url) => {
    const inner = open(url);
    const send = (command: { constructor: { name: string } }, o: { abortSignal?: AbortSignal }) =>
      url === queue && command.constructor.name === "ReceiveMessageCommand"
        ? d.ctx.deps.sleep(1_000, o.abortSignal).then(() => ({}))
        : (inner.send as (c: unknown, o: unknown) => unknown)(command, o);
    return { send } as never;
  };
};
const story = (s: Stage) => `\n${s.lines.join("")}`;
/** Runs to quiet and checks; what fails carries the log. */
async function ends(s: Stage, olds: string[], want: Record<string, [number, number, number]>, o: object = {}, seconds = 3600) {
  try {
    await s.quiet(seconds);
    s.check(olds, want, o);
  } catch (cause) {
    throw new Error(`${(cause as Error).message} ${JSON.stringify(sizes(s))} ${process.env.STORY ? story(s) : ""}`, { cause });
  }
}

/** Members that a group ended to come down to a smaller desired, and what is left of its sizes. */
const fallout = (s: Stage, name = "web") => ({
  scaledIn: s.world.audit.filter((a) => a.what === "terminating" && /constraints|shrinking/.test(a.detail ?? "")).length,
  least: s.least(name),
  sizes: sizes(s, name),
});

test("two daemons that raise one maximum at once terminate nobody and put it back", async () => {
  for (let seed = 1; seed <= 60; seed++) {
    const s = new Stage({ seed, latencyMs: [20, 300], pendingMs: [6_000, 9_000] });
    const olds = s.group({ name: "web", min: 12, max: 12, desired: 12, zones: ["us-east-1a"] }).slice(0, 11);
    await s.start();
    await s.start();
    let n = 0;
    s.world.intercept = ({ operation }) =>
      seed % 2 && operation === "UpdateAutoScalingGroup" && ++n % 2
        ? { before: new AwsError("Throttling", "Rate exceeded") }
        : undefined;
    for (const old of olds.slice(0, 6)) s.world.interrupt(old, { keepCapacity: true });
    for (const [k, old] of olds.slice(6).entries())
      s.world.after(k * 500 + (seed % 8) * 300, () => s.world.interrupt(old, { keepCapacity: true }));
    await s.seconds(10);
    await s.quiet(3600).catch(() => undefined);
    expect([seed, fallout(s)]).toEqual([seed, { scaledIn: 0, least: 12, sizes: [12, 12, 12] }]);
  }
});

test("a maximum that one daemon has recorded, and is slow to raise, keeps its record", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  await s.start();
  let hung = 0;
  s.world.intercept = ({ operation }) => (operation === "UpdateAutoScalingGroup" && ++hung <= 3 ? { hang: true } : undefined);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 3, 3] });
});

test("a daemon that dies as it raises a maximum has recorded it before", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  const daemon = await s.start();
  s.world.intercept = ({ operation }) => {
    if (operation === "UpdateAutoScalingGroup") daemon.kill();
    return undefined;
  };
  s.world.interrupt(old);
  await s.until(() => s.world.autoscaling.groups.get("web")?.max === 6, 60);
  s.world.intercept = undefined;
  await s.start();
  await s.quiet();
  s.check([old], { web: [3, 3, 3] });
});

test("one daemon under stale reads never lowers a maximum below desired, and launches once", async () => {
  for (let seed = 1; seed <= 40; seed++) {
    const s = new Stage({ seed, staleMs: 5_000 });
    const olds = s.group({ name: "web", min: 6, max: 6, desired: 6 }).slice(0, 4);
    await s.start();
    for (const old of olds) s.world.interrupt(old, { keepCapacity: true });
    await s.seconds(10);
    await s.quiet(3600).catch(() => undefined);
    expect([seed, claims(s).length, fallout(s)]).toEqual([seed, 4, { scaledIn: 0, least: 6, sizes: [6, 6, 6] }]);
  }
});

test("an attach whose answer was lost, under stale reads, does not end the member", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    const s = new Stage({ seed, staleMs: 8_000 });
    const old = first(s.group({ name: "web", ...three }));
    await s.start();
    once(s, "AttachInstances", { after: new AwsError("ResourceContention", "contention", 500) });
    s.world.interrupt(old);
    await ends(s, [old], { web: [3, 5, 3] });
  }
});

test("a replacement that dies as a member leaves desired as it was", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [first(s.openClaims())] });
  await s.quiet(3600);
  expect(sizes(s)).toEqual([3, 5, 3]);
});

test("a replacement that dies as a member, no deadline, leaves desired as it was", async () => {
  const s = new Stage();
  const old = first(
    s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 60 }),
  );
  await s.start();
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [first(s.openClaims())] });
  await s.quiet(3600);
  expect(sizes(s)).toEqual([3, 5, 3]);
});

test("what was let go without a deadline is ended, also under stale reads", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    const s = new Stage({ seed, staleMs: 10_000 });
    const old = first(
      s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_termination_delay_seconds: 0 }),
    );
    await s.start();
    s.world.rebalance(old);
    await s.quiet(3600);
    await s.seconds(120);
    expect([seed, s.world.instance(old).group, s.world.instance(old).state]).toEqual([seed, undefined, "terminated"]);
  }
});

test("a launch whose answers are all lost is looked for before the next rung", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  let n = 0;
  s.world.intercept = ({ operation }) => (operation === "CreateFleet" && ++n <= 6 ? { after: internal() } : undefined);
  s.world.interrupt(old);
  await ends(s, [old], { web: [3, 5, 3] });
});

test("SIGTERM while a launch call is being repeated launches nothing more", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  const d = await s.start();
  let n = 0;
  s.world.intercept = ({ operation }) => {
    if (operation !== "CreateFleet") return undefined;
    if (++n === 1) s.world.after(100, () => d.sigterm());
    return n === 1 ? { after: internal() } : undefined;
  };
  s.world.interrupt(old);
  await s.seconds(12);
  await s.start();
  await ends(s, [old], { web: [3, 5, 3] });
});

test("a receive that hangs for ever does not make the daemon deaf", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  let hung = 0;
  s.world.intercept = ({ operation, input }) =>
    operation === "ReceiveMessage" && (input as { QueueUrl: string }).QueueUrl === s.queues.interruption && ++hung === 1
      ? { hang: true }
      : undefined;
  await s.start();
  await s.seconds(60);
  s.world.interrupt(old);
  await ends(s, [old], { web: [3, 5, 3] }, {}, 600);
});

test("a deferred notice does not follow its instance into a group that is not configured", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  s.world.createGroup({ name: "other", min: 0, max: 9, desired: 1 });
  s.world.instance(old).launchedAtMs = s.clock.now() - 300_000; // too young: a copy for later
  await s.start();
  s.world.rebalance(old);
  await s.seconds(30);
  await s.call("autoscaling", "DetachInstances", {
    AutoScalingGroupName: "web",
    InstanceIds: [old],
    ShouldDecrementDesiredCapacity: false,
  });
  await s.seconds(20);
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "other", InstanceIds: [old] });
  await s.seconds(900);
  expect(claims(s).length).toBe(0);
  expect(s.world.instance(old).group).toBe("other");
});

test("reminders do not multiply detach messages", async () => {
  const s = new Stage({ healthyMs: [1e9, 1e9] });
  const old = first(s.group({ name: "web", ...three, targetGroups: ["tg"] }, { is_to_handle_rebalance_event: true }));
  await s.start({ level: "info" });
  s.world.rebalance(old);
  await s.seconds(3 * 3600);
  const { visible, delayed, inFlight } = s.world.queueDepth(s.queues.detach);
  expect(visible + delayed + inFlight).toBeLessThan(3);
});

test("capacity errors thrown by the call itself cost no time", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  s.world.ec2.capacityErrorsAsCall = true;
  for (const type of ["m5.large", "m5a.large", "m4.large"])
    for (const z of "abc") s.world.pool("spot", type, `us-east-1${z}`).capacity = 0;
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.until(() => claims(s).length > 0, 120).catch(() => process.env.STORY && console.log(story(s)));
  expect((s.clock.now() - startMs) / 1000).toBeLessThan(3);
});

test("a template that asks for spot: nine empty pools are passed in seconds", async () => {
  const s = new Stage();
  const old = first(
    s.group({
      name: "web",
      ...three,
      types: ["m5.large", "m5a.large", "m4.large"],
      template: { InstanceMarketOptions: { MarketType: "spot" } },
    }),
  );
  await s.start();
  for (const type of ["m5.large", "m5a.large", "m4.large"])
    for (const z of "abc") s.world.pool("spot", type, `us-east-1${z}`).capacity = type === "m4.large" && z === "c" ? 5 : 0;
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.until(() => claims(s).length > 0, 240).catch(() => process.env.STORY && console.log(story(s)));
  expect((s.clock.now() - startMs) / 1000).toBeLessThan(10);
});

test("a replacement's own notice that reaches another daemon before the attach is not thrown away", async () => {
  const s = new Stage({ pendingMs: [25_000, 25_000] });
  const old = first(s.group({ name: "web", ...three }));
  const a = await s.start();
  const b = await s.start();
  deaf(b, s.queues.interruption);
  await s.seconds(21);
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 30);
  const claim = first(s.openClaims());
  // The notice for the claim reaches B alone, as half of them do.
  const inner = b.ctx.deps.sqs;
  const body = s.world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], {
    "instance-id": claim,
    "instance-action": "terminate",
  });
  let given = false;
  b.ctx.deps.sqs = (url) => {
    const send = (command: { constructor: { name: string } }, o: unknown) => {
      if (url !== s.queues.interruption || given || command.constructor.name !== "ReceiveMessageCommand")
        return (inner(url).send as (c: unknown, o: unknown) => unknown)(command, o);
      given = true;
      return Promise.resolve({ Messages: [{ MessageId: "m", ReceiptHandle: "r", Body: body, Attributes: {} }] });
    };
    return { send } as never;
  };
  s.world.after(120_000, () => s.world.ec2.reclaim(s.world.instance(claim), "terminate"));
  await s.until(() => given, 60);
  await s.seconds(300);
  expect(a.ctx.signal.aborted).toBe(false);
  expect(s.least("web")).toBe(3);
});

test("the group is deleted right after the detach: what was let go is ended", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  const d = await s.start();
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "detach"), 200);
  d.kill();
  await s.seconds(10);
  await s.call("autoscaling", "DeleteAutoScalingGroup", { AutoScalingGroupName: "web", ForceDelete: true });
  await s.seconds(120);
  s.group({ name: "next", ...three });
  delete s.groups.web;
  await s.start();
  await s.seconds(1800);
  expect(s.world.instance(old).state).toBe("terminated");
});

test("an old one that the operator attached again does not block the group's limit for ever", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true });
  await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.until(() => s.world.audit.some((a) => a.what === "detached"), 200);
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [old] });
  await s.seconds(600);
  s.world.rebalance(other);
  await s.seconds(1800);
  expect(s.world.instance(other).group).toBeUndefined();
});

test("a minimum that was raised meanwhile does not keep a claim open for ever", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  await s.quiet(3600);
  expect(s.lines.filter((l) => l.startsWith("ERRO")).length).toBeLessThan(5);
});

test("a big health event for ten instances is split, not sent to the dead-letter queue", async () => {
  const s = new Stage();
  const olds = s.group({ name: "web", min: 10, max: 12, desired: 10 }, { is_to_handle_maintenance_event: true });
  await s.start();
  const event = JSON.parse(
    s.world.event("AWS Health Event", "aws.health", [], {
      service: "EC2",
      eventTypeCategory: "scheduledChange",
      statusCode: "upcoming",
      eventDescription: [{ language: "en_US", latestDescription: "x".repeat(30_000) }],
      affectedEntities: olds.map((entityValue) => ({ entityValue })),
    }),
  ) as object;
  s.world.sendRaw(s.queues.interruption, JSON.stringify(event));
  await s.seconds(3600);
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(0);
});

test("a big wave, detached without decrement just before the late replacements join: desired is what it was", async () => {
  const s = new Stage({ pendingMs: [52_000, 56_000], replaceMs: [5_000, 5_000], checkOutputs: false });
  // What AZRebalance takes of the surplus before it is ended, its group substitutes (BUGS.md).
  const olds = s.group({ name: "web", min: 100, max: 400, desired: 150, suspended: ["AZRebalance"] });
  await s.start({ level: "info" });
  await s.seconds(1);
  for (const old of olds) s.world.interrupt(old, { eventDelayMs: 60_000, keepCapacity: true });
  await s.seconds(170);
  await s.quiet(7200);
  expect(sizes(s)).toEqual([100, 400, 150]);
});

test("a maximum that the operator raises while ours is raised is the operator's, within twice the original too", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MaxSize: 5, DesiredCapacity: 5 });
  await s.seconds(2400);
  expect(s.world.audit.filter((a) => a.what === "terminating").length).toBe(0);
  expect(s.world.autoscaling.groups.get("web")?.max).toBe(5);
});

test("a minimum above the recorded maximum does not make its restoring fail for ever", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  await s.seconds(3600);
  expect(s.lines.filter((l) => l.startsWith("ERRO")).length).toBeLessThan(5);
  expect(s.world.autoscaling.groups.get("web")?.tags.has("spotmax:max_size")).toBe(false);
});

test("a deadline written by a slow clock and read by a fast one detaches nobody early", async () => {
  const s = new Stage({ pendingMs: [40_000, 40_000] });
  const old = first(s.group({ name: "web", ...three }));
  const slow = await s.start({ skewMs: -60_000 });
  const fast = await s.start({ skewMs: 60_000 });
  deaf(slow, s.queues.detach);
  deaf(fast, s.queues.interruption);
  await s.seconds(21);
  s.world.interrupt(old);
  await ends(s, [old], { web: [3, 5, 3] });
});

test("a missing right to read lifecycle hooks does not stop the program", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  s.world.denied.add("autoscaling:DescribeLifecycleHooks");
  const started = s.start().catch((e: unknown) => e);
  await s.until(() => s.lines.some((l) => l.includes("start interruption handler")), 30);
  await started;
});

test("capacity that came back is found by the next notice, whatever the earlier one was answered", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }, { is_to_handle_rebalance_event: true }));
  const pools = ["m5.large", "m4.large"].flatMap((t) => [..."abc"].map((z) => s.world.pool("spot", t, `us-east-1${z}`)));
  for (const p of pools) p.capacity = 0;
  await s.start();
  s.world.rebalance(old);
  await s.seconds(600);
  for (const p of pools) p.capacity = 9;
  s.world.rebalance(old);
  await s.seconds(600);
  expect(claims(s).length).toBe(1);
});

test("a replacement's replacement that came too late is surplus, also when it stands for the first old one", async () => {
  for (const notice of [10, 20, 30, 40]) {
    const s = new Stage({ replaceMs: [2_000, 2_000] });
    const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
    await s.start();
    s.world.interrupt(old);
    await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
    s.world.interrupt(first(s.openClaims()), { noticeSeconds: notice });
    await s.quiet(3600);
    expect([notice, ...sizes(s)]).toEqual([notice, 3, 5, 3]);
  }
});
test("a message that is delivered again while it is in hand is held by its newest receipt", async () => {
  const s = new Stage({ pendingMs: [60_000, 60_000] });
  const old = first(s.group({ name: "web", ...three }));
  const config = s.config();
  config.global.interruption_evt_sqs.visibility_timeout_seconds = 10;
  await s.start({ config });
  s.world.denied.add("sqs:ChangeMessageVisibilityBatch");
  s.world.interrupt(old);
  const messages = () => [...(s.world.sqs.queues.get(s.queues.interruption)?.messages.values() ?? [])];
  await s.until(() => messages().some((m) => m.receiveCount === 2), 30);
  s.world.denied.clear();
  await s.seconds(40);
  expect(messages().map((m) => m.receiveCount)).toEqual([2]);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("message deletes that are refused do not multiply messages", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  s.world.instance(old).launchedAtMs = s.clock.now();
  s.world.denied.add("sqs:DeleteMessageBatch");
  await s.start({ level: "error" });
  s.world.rebalance(old);
  await s.seconds(560);
  const { visible, delayed, inFlight } = s.world.queueDepth(s.queues.interruption);
  expect(visible + delayed + inFlight).toBeLessThan(20);
});

test("an instance ID is named once in a call, however many notices there are", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }));
  await s.start();
  const twice: string[] = [];
  s.world.intercept = ({ operation, input }) => {
    const { InstanceIds: ids = [] } = input as { InstanceIds?: string[] };
    if (new Set(ids).size < ids.length) twice.push(operation);
    return undefined;
  };
  s.world.interrupt(old, { duplicates: 5 });
  await s.quiet();
  expect(twice).toEqual([]);
});

test("a daemon that takes over asks for capacity anew, not for the dead one's old answers", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }));
  const pools = (["spot", "on-demand"] as const).flatMap((l) =>
    ["m5.large", "m4.large"].flatMap((t) => [..."abc"].map((z) => s.world.pool(l, t, `us-east-1${z}`))),
  );
  for (const p of pools) p.capacity = 0;
  const d = await s.start();
  s.world.interrupt(old);
  await s.seconds(50);
  d.kill();
  for (const p of pools) p.capacity = 9;
  await s.start();
  await s.until(() => claims(s).length > 0, 30);
});

test("an old one put into Standby without decrement: the group substitutes, so desired comes back", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("autoscaling", "EnterStandby", {
    AutoScalingGroupName: "web",
    InstanceIds: [old],
    ShouldDecrementDesiredCapacity: false,
  });
  await s.quiet(3600);
  expect(sizes(s)).toEqual([3, 5, 3]);
});

test("a replacement in Standby does not keep its claim open and its maximum raised for ever", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.call("autoscaling", "EnterStandby", {
    AutoScalingGroupName: "web",
    InstanceIds: [first(s.openClaims())],
    ShouldDecrementDesiredCapacity: true,
  });
  await s.seconds(7200);
  expect(s.world.autoscaling.groups.get("web")?.max).toBe(3);
});

test("a replacement that is in Standby for a while: its old one waits, and goes once it is back", async () => {
  for (const seconds of [30, 300, 1_800]) {
    const s = new Stage();
    const delays = { preaction_detach_delay_seconds: 60 };
    const old = first(s.group({ name: "web", ...full, max: 5 }, { is_to_handle_rebalance_event: true, ...delays }));
    await s.start();
    s.world.rebalance(old);
    await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
    const web = { AutoScalingGroupName: "web", InstanceIds: s.openClaims() };
    await s.call("autoscaling", "EnterStandby", { ...web, ShouldDecrementDesiredCapacity: true });
    await s.seconds(seconds);
    expect([seconds, s.world.instance(old).group]).toEqual([seconds, "web"]);
    await s.call("autoscaling", "ExitStandby", web);
    await s.quiet(3_600);
    s.check([old], { web: [3, 5, 3] });
  }
});

test("a member that describes do not show as one yet is not ended by its own notice", async () => {
  for (let seed = 1; seed <= 20; seed++) {
    const s = new Stage({ seed, staleMs: 8_000 });
    const old = first(s.group({ name: "web", ...three }));
    await s.start();
    s.world.interrupt(old);
    await s.until(() => s.world.audit.some((a) => a.what === "in service"), 100);
    const claim = first(claims(s)).id;
    s.world.interrupt(claim);
    await s.seconds(60);
    expect([seed, s.world.instance(claim).state]).toEqual([seed, "running"]);
  }
});

test("a follow-up that SQS refused in the batch is sent again", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }));
  const d = await s.start();
  const open = d.ctx.deps.sqs;
  let refusals = 0;
  d.ctx.deps.sqs = (url) => {
    const inner = open(url);
    const send = (command: { constructor: { name: string }; input: { Entries?: { Id: string }[] } }, o: unknown) =>
      command.constructor.name === "SendMessageBatchCommand" && [1, 2, 3, 5, 8].includes(++refusals)
        ? Promise.resolve({
            Failed: command.input.Entries?.map(({ Id }) => ({ Id, SenderFault: false, Code: "InternalError" })),
          })
        : (inner.send as (c: unknown, o: unknown) => unknown)(command, o);
    return { send } as never;
  };
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(5);
  await ends(s, [old], { web: [3, 3, 3] });
  expect(s.world.instance(old).state).not.toBe("running");
});

test("forty seconds without a right cost no message", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  await s.seconds(12);
  const sinceMs = s.clock.now();
  s.world.intercept = ({ service }) =>
    service === "ec2" && s.clock.now() - sinceMs < 40_000
      ? { before: new AwsError("AuthFailure", "AWS was not able to validate the provided access credentials", 401) }
      : undefined;
  await s.quiet(3600);
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(0);
});

test("one answer of SQS that was twenty seconds on its way moves no deadline", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }));
  for (const l of ["spot", "on-demand"] as const)
    for (const t of ["m5.large", "m4.large"]) for (const z of "abc") s.world.pool(l, t, `us-east-1${z}`).capacity = 0;
  const d = await s.start();
  const open = d.ctx.deps.sqs;
  let late = false;
  d.ctx.deps.sqs = (url) => {
    const inner = open(url);
    const send = async (command: { constructor: { name: string } }, o: unknown) => {
      const answer = await (inner.send as (c: unknown, o: unknown) => Promise<{ Messages?: unknown[] }>)(command, o);
      if (url === s.queues.detach && command.constructor.name === "ReceiveMessageCommand" && answer.Messages && !late) {
        late = true;
        await d.ctx.deps.sleep(20_000);
      }
      return answer;
    };
    return { send } as never;
  };
  await s.seconds(21); // the first long polls end, the next go through the slow line
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.seconds(140);
  const detach = first(s.world.audit.filter((a) => a.what === "detach"));
  expect((detach.atMs - startMs) / 1000).toBeWithin(110, 119);
});

test("a message given back at SIGTERM right after its launch launches nothing more, although describes lag", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    const s = new Stage({ seed, staleMs: 8_000, pendingMs: [15_000, 15_000] });
    const old = first(s.group({ name: "web", ...three }));
    const a = await s.start();
    s.world.interrupt(old);
    await s.until(() => claims(s).length > 0, 30);
    await s.start();
    await s.seconds(0.5);
    a.sigterm();
    await s.seconds(10);
    await s.quiet(3600);
    expect([seed, claims(s).length]).toEqual([seed, 1]);
  }
});

test("how a hundred and fifty left one group is read in shared calls, for Auto Scaling has one bucket for the account", async () => {
  const s = new Stage({ pendingMs: [52_000, 56_000], replaceMs: [5_000, 5_000], checkOutputs: false });
  const olds = s.group({ name: "web", min: 100, max: 400, desired: 150 });
  await s.start({ level: "info" });
  await s.seconds(1);
  for (const old of olds) s.world.interrupt(old, { eventDelayMs: 60_000, keepCapacity: true });
  await s.seconds(170);
  await s.quiet(7200);
  expect(s.world.calls["autoscaling:DescribeScalingActivities"]).toBeLessThan(300);
});

test("a replacement is protected from scale-in beside its old one, though AWS refuses that while it is Pending", async () => {
  const s = new Stage({ attachMs: [5_000, 5_000] });
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 90 }));
  await s.start();
  s.world.intercept = ({ operation, input }) => {
    const { InstanceIds: ids = [] } = input as { InstanceIds?: string[] };
    const pending = ids.find((id) => s.world.autoscaling.groups.get("web")?.members.get(id)?.state === "Pending");
    const text = `The instance ${pending} is not in InService or EnteringStandby or Standby.`;
    return operation === "SetInstanceProtection" && pending ? { before: new AwsError("ValidationError", text) } : undefined;
  };
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  await s.seconds(15);
  const claim = first(s.openClaims());
  expect(s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected).toBe(true);
});

test("SIGTERM while launches wait for their pace gives their messages back at once, and nothing is launched twice", async () => {
  const s = new Stage({ latencyMs: [50, 100] });
  const names = Array.from({ length: 12 }, (_, n) => `g${n}`);
  const olds = names.map((name) => first(s.group({ name, ...three })));
  s.world.buckets = true;
  s.world.bucketSizes["ec2:mutation"] = [2, 0.3];
  const d = await s.start();
  await s.seconds(2);
  for (const old of olds) s.world.interrupt(old);
  await s.seconds(5);
  expect(claims(s).length).toBeLessThan(8);
  const errors = () => s.lines.filter((line) => line.startsWith("ERRO")).length;
  const before = errors();
  await s.stop(d);
  expect(errors()).toBe(before);
  expect(s.world.queueDepth(s.queues.interruption).inFlight).toBe(0);
  s.world.bucketSizes["ec2:mutation"] = [50, 5];
  await s.start();
  const all = Object.fromEntries(names.map((name) => [name, [3, 5, 3] as [number, number, number]]));
  await ends(s, olds, all);
});

test("a maximum is not put back long after the look that allowed it", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...full }));
  const d = await s.start();
  let [isSecond, lookedMs] = [false, Number.NaN];
  const gaps: number[] = [];
  s.world.intercept = ({ operation, input }) => {
    const { Filters: [filter] = [], MaxSize } = input as { Filters?: { Name: string }[]; MaxSize?: number };
    if (operation === "DescribeInstances" && filter?.Name === "tag:spotmax:group") isSecond = true;
    if (operation === "DescribeAutoScalingGroups" && isSecond) {
      // AWS's patience ends here, and changes of other groups come first.
      if (Number.isNaN(lookedMs)) d.ctx.state.paces.get("autoscaling")?.refused();
      for (let n = 0; Number.isNaN(lookedMs) && n < 25; n++)
        void d.ctx.state.paces
          .get("autoscaling")
          ?.take(0)
          .catch(() => undefined);
      lookedMs = s.clock.now();
    }
    if (operation === "UpdateAutoScalingGroup" && MaxSize === 3) gaps.push(s.clock.now() - lookedMs);
    return undefined;
  };
  s.world.interrupt(old);
  await s.quiet();
  expect(gaps.length).toBeGreaterThan(0);
  expect(Math.max(...gaps)).toBeLessThan(5_100);
});

test("what could not be asked for before the deadline, for AWS's requests were short, is not launched after it", async () => {
  const s = new Stage();
  const names = Array.from({ length: 60 }, (_, n) => `g${n}`);
  const olds = names.map((name) => first(s.group({ name, ...three })));
  s.world.buckets = true;
  s.world.bucketSizes["ec2:mutation"] = [1, 0.25];
  await s.start({ level: "info" });
  await s.seconds(2);
  const startMs = s.clock.now();
  for (const old of olds) s.world.interrupt(old);
  await s.seconds(600);
  const late = claims(s).filter((c) => c.launchedAtMs - startMs > 142_000);
  expect([claims(s).length > 15, late.length]).toEqual([true, 0]);
});

// Whole stories: something happens to a fleet, the program answers, and at the end all that must hold holds.
import { expect, test } from "bun:test";
import { checkGroups, checkPermissions } from "../../maxgroup.ts";
import { AwsError } from "../aws/world.ts";
import { Stage } from "./harness.ts";

const three = { min: 3, max: 5, desired: 3 };
/** The only one of its kind, or a failure that says what was asked for. */
const only = <T>(list: readonly T[]): T => {
  const [first] = list;
  if (first === undefined) throw new Error("nothing there");
  return first;
};

test("an interrupted instance is replaced before it goes", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(s.world.calls["autoscaling:UpdateAutoScalingGroup"]).toBeUndefined();
});

test("where minimum, maximum and desired are the same, the maximum is raised and put back", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 3, 3] });
  expect(Math.max(...s.samples.map((x) => x.max))).toBe(6);
});

test("the same notice five times leads to one launch", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old, { duplicates: 5 });
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a duplicate that comes minutes later launches nothing", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  await s.seconds(60);
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(300);
  s.world.interrupt(old, { withoutReclaim: true });
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("ten notices found together share one launch call, and each gets its own replacement", async () => {
  const s = new Stage();
  const olds = s.group({ name: "web", min: 12, max: 12, desired: 12, zones: ["us-east-1a"] }).slice(0, 10);
  await s.start();
  for (const old of olds) s.world.interrupt(old, { keepCapacity: true });
  await s.quiet();
  s.check(olds, { web: [12, 12, 12] });
  expect(s.world.calls["ec2:CreateFleet"]).toBe(1);
});

test("1,000 notices in one group: hardly more than one launch call for ten, describes by the hundred", async () => {
  const s = new Stage({ checkOutputs: false });
  const olds = s.group({ name: "web", min: 1000, max: 1000, desired: 1000 });
  await s.start({ level: "info" });
  for (const old of olds) s.world.interrupt(old, { keepCapacity: true });
  await s.quiet();
  s.check(olds, { web: [1000, 1000, 1000] });
  expect(s.world.calls["ec2:CreateFleet"]).toBeLessThan(150);
  expect((s.world.calls["ec2:DescribeInstances"] ?? 0) / 1000).toBeLessThan(0.6);
});

/** One interrupted where no pool has spot, and replaced. */
async function replacedWithoutSpot(): Promise<Stage> {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }));
  await s.start();
  for (const type of ["m5.large", "m4.large"])
    for (const zone of "abc") s.world.pool("spot", type, `us-east-1${zone}`).capacity = 0;
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  return s;
}

test("no spot anywhere: an on-demand instance takes the place, and says so", async () => {
  const s = await replacedWithoutSpot();
  const fallback = only([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")));
  expect([fallback.lifecycle, fallback.tags.get("spotmax:fallback")]).toEqual(["on-demand", "on-demand"]);
});

test("without is_enable_od_fallback nothing turns on-demand", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }, { is_enable_od_fallback: false }));
  await s.start();
  const pools = ["m5.large", "m4.large"].flatMap((type) =>
    [..."abc"].map((zone) => s.world.pool("spot", type, `us-east-1${zone}`)),
  );
  for (const pool of pools) pool.capacity = 0;
  s.world.interrupt(old);
  s.world.after(40_000, () => {
    for (const pool of pools) pool.capacity = 5;
  });
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  const claim = only([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")));
  expect(claim.lifecycle).toBe("spot");
});

test("no capacity at all: the old one is detached five seconds before it goes, and the group substitutes it", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }));
  await s.start();
  const pools = (["spot", "on-demand"] as const).flatMap((l) =>
    ["m5.large", "m4.large"].flatMap((type) => [..."abc"].map((z) => s.world.pool(l, type, `us-east-1${z}`))),
  );
  for (const pool of pools) pool.capacity = 0;
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.seconds(130);
  const detach = only(s.world.audit.filter((a) => a.what === "detach"));
  expect(detach.detail).not.toContain("with decrement");
  expect((detach.atMs - startMs) / 1000).toBeWithin(114.9, 115.5);
  for (const pool of pools) pool.capacity = 9;
  // The group's own next try may come a moment after the last message.
  await s.until(() => s.world.autoscaling.groups.get("web")?.members.size === 3, 120);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { dips: true, launches: 0 });
});

test("the old one is detached five seconds before its deadline wherever in a second the daemon's clock stands", async () => {
  for (const skewMs of [-700, -10, 0, 300, 990]) {
    const s = new Stage({ pendingMs: [200_000, 200_000] });
    const old = only(s.group({ name: "web", ...three }));
    await s.start({ skewMs });
    await s.clock.advance(1_000 - (s.clock.now() % 1_000));
    const startMs = s.clock.now();
    s.world.interrupt(old);
    await s.seconds(130);
    const detach = only(s.world.audit.filter((a) => a.what === "detach"));
    expect((detach.atMs - startMs) / 1000).toBeWithin(114.9, 115.6);
  }
});

test("a replacement that comes too late joins all the same, and goes when the group's own is in service", async () => {
  const s = new Stage({ pendingMs: [100_000, 100_000], replaceMs: [5_000, 5_000] });
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  await s.seconds(1);
  s.world.interrupt(old, { eventDelayMs: 60_000 });
  await s.seconds(170);
  expect(s.openClaims().length).toBe(1);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { dips: true });
});

test("a replacement that dies while pending is followed by the next choice", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  let dead = 0;
  s.world.ec2.dieWhilePending = () =>
    dead++ === 0 ? { Code: "Client.InternalError", Message: "Client error on launch" } : undefined;
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { launches: 2 });
});

test("our own replacement reclaimed before it was attached: the next choice follows", async () => {
  const s = new Stage({ pendingMs: [15_000, 15_000] });
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 10);
  const first = only(s.openClaims());
  await s.seconds(3);
  s.world.interrupt(first);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { launches: 2 });
  expect(s.world.instance(first).state).toBe("terminated");
});

test("a replacement that is interrupted once it is a member is replaced in its turn", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  const first = only(
    s.openClaims().length
      ? s.openClaims()
      : [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")).map((i) => i.id),
  );
  s.world.interrupt(first);
  await s.quiet();
  s.check([first], { web: [3, 5, 3] }, { launches: 2 });
});

test("a rehearsal: the notice comes, the reclaim does not; the old one is ended a minute after the deadline", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(170);
  expect(s.world.instance(old).state).toBe("running");
  await s.quiet();
  await s.seconds(60);
  expect(s.world.instance(old).state).toBe("terminated");
  s.check([old], { web: [3, 5, 3] });
});

test("an old sample as a rehearsal counts from its receipt", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.sendRaw(
    s.queues.interruption,
    JSON.stringify({
      version: "0",
      id: "sample",
      "detail-type": "EC2 Spot Instance Interruption Warning",
      source: "aws.ec2",
      time: "2019-09-17T12:05:15Z",
      detail: { "instance-id": old, "instance-action": "terminate" },
    }),
  );
  await s.quiet();
  await s.seconds(60);
  s.check([old], { web: [3, 5, 3] });
});

test("an instance protected from scale-in hands its protection on", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, protected: true }));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("scale-in while both are members does not choose the replacement", async () => {
  const s = new Stage({ attachMs: [1000, 1000] });
  const old = only(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  const claim = only(s.openClaims());
  await s.seconds(3);
  await s.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 3 });
  await s.quiet();
  expect(s.world.instance(claim).group).toBe("web");
});

test("the replacement must be healthy in its target groups before the old one goes", async () => {
  const s = new Stage({ healthyMs: [25_000, 25_000] });
  const old = only(s.group({ name: "web", ...three, targetGroups: ["tg"] }, { detaching_delay_seconds: 0 }));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(Math.min(...s.samples.map((x) => x.serving))).toBe(3);
});

test("never healthy: detached 30 s before the deadline all the same, so that connections can drain", async () => {
  const s = new Stage({ healthyMs: [900_000, 900_000] });
  const old = only(s.group({ name: "web", ...three, targetGroups: ["tg"] }));
  await s.start();
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.seconds(200);
  const detach = only(s.world.audit.filter((a) => a.what === "detach"));
  expect((detach.atMs - startMs) / 1000).toBeWithin(89, 94);
  expect(detach.detail).toContain("with decrement");
});

test.each([
  ["is not allowed", { before: new AwsError("AccessDenied", "not authorized to perform DescribeTargetHealth", 403) }],
  ["is not answered", { hang: true }],
])("a read of target health that %s does not keep the old one beyond its time", async (_, fault) => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, targetGroups: ["tg"] }));
  s.world.intercept = ({ operation }) => (operation === "DescribeTargetHealth" ? fault : undefined);
  await s.start();
  if ("before" in fault) expect(s.lines.join("")).toMatch(/WARN.*role.*target health/);
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.seconds(200);
  const detach = only(s.world.audit.filter((a) => a.what === "detach"));
  expect((detach.atMs - startMs) / 1000).toBeWithin(89, 99);
  expect(detach.detail).toContain("with decrement");
});

test("a replacement that nobody has registered with its target group is not healthy", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, targetGroups: ["tg"], suspended: ["AddToLoadBalancer"] }));
  await s.start();
  const startMs = s.clock.now();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "detach"), 120);
  expect((s.clock.now() - startMs) / 1000).toBeWithin(88, 93);
});

test("a target group that is gone keeps nobody waiting", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, targetGroups: ["tg"] }, { is_to_handle_rebalance_event: true }));
  await s.start();
  for (const arn of s.world.elbv2.groups.keys())
    s.world.intercept = ({ operation }) =>
      operation === "DescribeTargetHealth" ? { before: new AwsError("TargetGroupNotFound", `${arn} not found`) } : undefined;
  s.world.rebalance(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a weighted group gets the old one's weight", async () => {
  const s = new Stage();
  const olds = s.group({
    name: "web",
    min: 8,
    max: 8,
    desired: 8,
    types: ["m5.large", "m5.xlarge", "m4.xlarge"],
    weights: { "m5.large": 1, "m5.xlarge": 2, "m4.xlarge": 2 },
    suspended: ["AZRebalance"],
  });
  const old = only(olds.filter((id) => s.world.instance(id).type.endsWith("xlarge")).concat(olds));
  const weight = s.world.instance(old).type.endsWith("xlarge") ? 2 : 1;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [8, 8, 8] });
  const claim = only([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")));
  expect(claim.type.endsWith("xlarge") ? 2 : 1).toBe(weight);
});

test("attribute-based requirements are handed on", async () => {
  const s = new Stage();
  const old = only(
    s.group({
      name: "web",
      ...three,
      overrides: [{ InstanceRequirements: { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 4096 } } }],
    }),
  );
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a template that itself asks for spot goes through RunInstances", async () => {
  const s = new Stage();
  const old = only(
    s.group({ name: "web", ...three, types: ["m5.large"], template: { InstanceMarketOptions: { MarketType: "spot" } } }),
  );
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect([s.world.calls["ec2:RunInstances"], s.world.calls["ec2:CreateFleet"]]).toEqual([1, undefined]);
});

test("a template's network interfaces get the subnet themselves where it asks for spot, and are no reason to warn", async () => {
  const NetworkInterfaces = [{ DeviceIndex: 0, AssociatePublicIpAddress: true, Groups: ["sg-1"] }];
  const spot = { InstanceMarketOptions: { MarketType: "spot" as const }, NetworkInterfaces };
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, types: ["m5.large"], template: spot }));
  s.group({ name: "api", ...three, template: { NetworkInterfaces } });
  const { ctx } = await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  let isChecked = false;
  void checkPermissions(ctx).then(() => {
    isChecked = true;
  });
  await s.until(() => isChecked, 60);
  expect(s.lines.filter((line) => /dry run|cannot launch|ERROR/.test(line))).toEqual([]);
});

test("attributes in six zones are asked for in four of them at a time, the next ones in the next round", async () => {
  const zones = [..."abcdef"].map((z) => `us-east-1${z}`);
  const s = new Stage();
  const overrides = [{ InstanceRequirements: { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 15_000, Max: 16_384 } } }];
  const old = only(s.group({ name: "web", min: 6, max: 8, desired: 6, zones, overrides }));
  await s.start();
  const types = ["r4.large", "r5.large", "r5a.large", "r6i.large"];
  for (const lifecycle of ["spot", "on-demand"] as const)
    for (const type of types)
      for (const zone of zones) s.world.pool(lifecycle, type, zone).capacity = lifecycle === "spot" && zone.endsWith("f") ? 1 : 0;
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [6, 8, 6] });
  const claim = only([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")));
  expect([claim.lifecycle, claim.zone]).toEqual(["spot", "us-east-1f"]);
});

test("a launch template that carries a reserved tag is not launched from, and its group is left out until it is mended", async () => {
  const s = new Stage();
  const Tags = [{ Key: "spotmax:attached", Value: "2026-01-01T00:00:00Z" }];
  const old = only(s.group({ name: "web", ...three }));
  const { ctx } = await s.start();
  const data = only([...s.world.ec2.templates.values()]).versions[0]?.data ?? {};
  // It changes under a daemon that has read it a while ago.
  data.TagSpecifications = [{ ResourceType: "instance", Tags }];
  await s.seconds(70);
  s.world.interrupt(old, { keepCapacity: true });
  await s.seconds(30);
  expect(s.world.calls["ec2:CreateFleet"]).toBeUndefined();
  expect(s.lines.join("\n")).toMatch(/spotmax:attached.*remove/);
  expect(ctx.state.groups.get("web")?.broken).toContain("spotmax:attached");
  void checkGroups(ctx);
  await s.seconds(70);
  expect(ctx.state.groups.get("web")?.broken).toContain("spotmax:attached");
  data.TagSpecifications = [];
  await s.seconds(70);
  void checkGroups(ctx);
  await s.quiet();
  expect(ctx.state.groups.get("web")?.broken).toBeUndefined();
});

test("one subnet that somebody has deleted leaves the other zones to launch in", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group({ name: "web", ...three });
  await s.start();
  const subnet = s.world.ec2.subnetIn("us-east-1c");
  s.world.ec2.subnets.delete(subnet.id);
  expect([old, other].map((id) => s.world.instance(id).zone)).toEqual(["us-east-1a", "us-east-1b"]);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("what left a group days ago is not looked for in weeks of activities", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  const group = s.world.autoscaling.groups.get("web");
  const like = { group: "web", cause: "At a time", statusCode: "Successful" as const, statusMessage: undefined };
  for (let n = 2_000; n > 0; n--) {
    const startMs = s.clock.now() - n * 1_800_000;
    const description = `Terminating EC2 instance: i-${n.toString(16).padStart(17, "0")}`;
    group?.activities.unshift({ ...like, id: `old-${n}`, description, startMs, endMs: startMs + 1_000 });
  }
  group?.activities.sort((a, b) => a.startMs - b.startMs);
  let dead = 0;
  s.world.ec2.dieWhilePending = () => (dead++ === 0 ? { Code: "Client.InternalError", Message: "key" } : undefined);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { launches: 2 });
  expect(s.world.calls["autoscaling:DescribeScalingActivities"]).toBeLessThan(20);
});

test("a capacity outage is one line for each launch call, not one for each pool", async () => {
  const s = await replacedWithoutSpot();
  expect(s.lines.filter((line) => line.includes("InsufficientInstanceCapacity")).length).toBeLessThanOrEqual(2);
});

test("the zones stay balanced: AZRebalance has nothing to undo", async () => {
  const s = new Stage();
  const olds = s.group({ name: "web", min: 9, max: 12, desired: 9 }).slice(0, 4);
  await s.start();
  for (const old of olds) s.world.interrupt(old);
  await s.quiet();
  s.check(olds, { web: [9, 12, 9] });
  const zones = Map.groupBy(
    [...s.world.ec2.instances.values()].filter((i) => i.group === "web" && i.state === "running"),
    (i) => i.zone,
  );
  expect([...zones.values()].map((z) => z.length).sort()).toEqual([3, 3, 3]);
});

test("propagated tags are on the replacement, the others are not", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, tags: { team: "blue" } }));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  const claim = only([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")));
  expect(claim.tags.get("team")).toBe("blue");
  expect(claim.tags.has("spotmax:max_size")).toBe(false);
});

test("strangers, other events and standby members are left alone", async () => {
  const s = new Stage();
  const [old = "", standby = ""] = s.group({ name: "web", min: 1, max: 5, desired: 3 });
  const stranger = s.world.createInstance({});
  s.world.createGroup({ name: "other", ...three });
  await s.start();
  await s.call("autoscaling", "EnterStandby", {
    AutoScalingGroupName: "web",
    InstanceIds: [standby],
    ShouldDecrementDesiredCapacity: true,
  });
  await s.seconds(10);
  s.world.interrupt(stranger.id, { withoutReclaim: true });
  s.world.interrupt(standby, { withoutReclaim: true });
  s.world.sendRaw(
    s.queues.interruption,
    s.world.event("EC2 Instance State-change Notification", "aws.ec2", [], { "instance-id": old, state: "running" }),
  );
  await s.seconds(200);
  expect(s.world.calls["ec2:CreateFleet"]).toBeUndefined();
  expect(s.isQuiet()).toBe(true);
  expect([...stranger.tags.keys()]).toEqual([]);
});

test("a suspended Launch process: nothing is launched, and the log says so", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, suspended: ["Launch"] }));
  await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(60);
  expect(s.world.calls["ec2:CreateFleet"]).toBeUndefined();
  expect(s.lines.join("")).toContain("the Launch process of web is suspended: AWS would refuse");
});

test("what cannot be understood goes to the dead-letter queue, and a good message beside it is handled", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  s.world.sendRaw(s.queues.interruption, "not JSON");
  s.world.sendRaw(
    s.queues.interruption,
    s.world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], { "instance-id": 7 }),
  );
  s.world.interrupt(old);
  await s.seconds(900);
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(2);
  expect(s.lines.filter((l) => l.startsWith("WARN") && l.includes("left to the dead-letter queue")).length).toBe(2);
  expect(s.world.instance(old).state).toBe("terminated");
  expect(s.least("web")).toBe(3);
});

test("rebalance recommendations are handled where the option is on, within the limit, none too young", async () => {
  const s = new Stage();
  const olds = s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true });
  const off = s.group({ name: "off", ...three });
  await s.start();
  for (const id of [...olds, ...off]) s.world.rebalance(id);
  let most = 0;
  s.world.onCapacity(() => {
    most = Math.max(most, s.openClaims().length);
  });
  await s.quiet(3600);
  s.check(olds, { web: [3, 5, 3], off: [3, 5, 3] });
  expect(most).toBe(1);
});

test("no more are ended at a time than the group allows, however long an end takes", async () => {
  const s = new Stage({ shuttingDownMs: [600_000, 600_000] });
  const olds = s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true });
  await s.start();
  for (const id of olds) s.world.rebalance(id);
  let most = 0;
  for (let n = 0; n < 360; n++) {
    await s.seconds(10);
    most = Math.max(most, olds.filter((id) => s.world.instance(id).state === "shutting-down").length);
  }
  s.check(olds, { web: [3, 5, 3] });
  expect(most).toBe(1);
});

test("a rebalance recommendation that turns into a warning launches once", async () => {
  const s = new Stage();
  const old = only(
    s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 600 }),
  );
  await s.start();
  s.world.rebalance(old);
  await s.seconds(60);
  s.world.interrupt(old);
  await s.quiet(3600);
  s.check([old], { web: [3, 5, 3] });
});

test("without a hard deadline no capacity ends the matter, with nothing to undo", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }, { is_to_handle_rebalance_event: true }));
  for (const type of ["m5.large", "m4.large"])
    for (const zone of "abc") s.world.pool("spot", type, `us-east-1${zone}`).capacity = 0;
  await s.start();
  s.world.rebalance(old);
  await s.quiet();
  expect([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")).length).toBe(0);
  expect(s.world.instance(old).group).toBe("web");
});

test("AWS Health: scheduled changes of several instances, one at a time; closed ones are nothing", async () => {
  const s = new Stage();
  const olds = s.group(
    { name: "web", ...three, onDemandBase: 1, onDemandPercentage: 0 },
    { is_to_handle_maintenance_event: true },
  );
  await s.start();
  s.world.healthEvent([...olds.slice(0, 2), "i-0123456789abcdef0"]);
  s.world.healthEvent(olds, { statusCode: "closed" });
  await s.quiet(3600);
  s.check(olds.slice(0, 2), { web: [3, 5, 3] });
  const onDemand = [...s.world.ec2.instances.values()].filter(
    (i) => i.group === "web" && i.lifecycle === "on-demand" && i.state === "running",
  );
  expect(onDemand.length).toBe(1);
});

test("two daemons on the same queues: one replacement in the end", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", ...three }));
  await s.start();
  await s.start();
  s.world.interrupt(old, { duplicates: 4 });
  await s.quiet();
  const living = [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces") && i.state === "running");
  expect(living.length).toBe(1);
  expect([s.world.autoscaling.groups.get("web")?.max, s.world.autoscaling.groups.get("web")?.desired]).toEqual([5, 3]);
  expect(s.least("web")).toBe(3);
});

test("killed at any call and started again: one replacement, sizes as before, nothing left over", async () => {
  const kills = [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44, 47, 50, 55, 60, 65, 70, 80];
  for (const at of kills) {
    const s = new Stage({ seed: at });
    const old = only(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
    await s.killAt(at, () => s.world.interrupt(old));
    await s.quiet(3600);
    try {
      s.check([old], { web: [3, 3, 3] });
    } catch (cause) {
      throw new Error(`killed at call ${at}:\n${s.lines.join("")}`, { cause });
    }
  }
});

test("throttled calls are tried again", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  let n = 0;
  s.world.intercept = ({ service }) => {
    n++;
    if (service === "ec2" && n % 2 === 0) return { before: new AwsError("RequestLimitExceeded", "Request limit exceeded.", 503) };
    if (service === "autoscaling" && n % 3 === 0) return { after: new AwsError("ResourceContention", "contention", 500) };
    if (service === "sqs" && n % 4 === 0) return { after: new AwsError("InternalError", "internal", 500) };
    return undefined;
  };
  s.world.interrupt(old);
  await s.quiet(3600);
  s.check([old], { web: [3, 3, 3] });
});

test("what is begun is finished, also when the group has left the configuration meanwhile", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  s.group({ name: "other", ...three });
  const daemon = await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  daemon.kill();
  delete s.groups.web;
  await s.start();
  await s.quiet();
  s.check([old], { web: [3, 3, 3] });
});

test("a maximum that somebody else changed meanwhile is left as it is", async () => {
  const s = new Stage();
  const old = only(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MaxSize: 9 });
  await s.quiet();
  s.check([old], { web: [3, 9, 3] });
});

test("SIGTERM gives back what is in hand, and the next daemon goes on with it", async () => {
  const s = new Stage({ pendingMs: [15_000, 15_000] });
  const old = only(s.group({ name: "web", ...three }));
  const first = await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 30);
  await s.seconds(2);
  const startMs = s.clock.now();
  await s.stop(first);
  expect(s.clock.now() - startMs).toBeLessThan(10_000);
  expect(s.world.queueDepth(s.queues.interruption)).toEqual({ visible: 1, delayed: 0, inFlight: 0 });
  await s.start();
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

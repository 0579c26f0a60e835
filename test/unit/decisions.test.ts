import { describe, expect, test } from "bun:test";
import {
  howItLeft,
  judgeClaim,
  judgeState,
  type Member,
  QUEUES,
  raisedMax,
  readMaxTag,
  replacedBy,
  type Standing,
  TABLE,
  toGroup,
  toInstance,
  whenToDetach,
  winner,
} from "../../maxgroup.ts";
import { instance } from "./fixtures/index.ts";

describe("the steps", () => {
  // Before and after the attach where that depends on the deadline.
  const order = {
    interruption_evt_sqs: [
      "find group",
      "send detach message",
      "protect volume",
      "cordon",
      "launch",
      "wait until running",
      "attach",
      "send detach message",
      "protect volume",
      "cordon",
      "remember how it came out",
    ],
    // The volume once more: where protecting it failed on notice, this is the second chance.
    // Pods move before target groups are looked at, for the new one may be healthy only once it has them.
    detach_evt_sqs: [
      "protect volume",
      "wait for the replacement's node",
      "drain",
      "wait for the replacement",
      "deregister",
      "detach",
      "send termination message",
    ],
    termination_evt_sqs: ["terminate", "move volume"],
  };

  test.each(QUEUES)("of %s stand in the order of the design", (queue) => {
    let from = 0;
    for (const { name } of TABLE[queue]) {
      const at = order[queue].indexOf(name, from);
      expect([name, at >= from]).toEqual([name, true]);
      from = at + 1;
    }
  });
});

describe("a member's state", () => {
  test.each([
    ["InService", "go on"],
    ["Pending", "later"],
    ["Pending:Wait", "later"],
    ["Pending:Proceed", "later"],
    ["Standby", "not in service"],
    ["EnteringStandby", "not in service"],
    ["Quarantined", "not in service"],
    ["Warmed:Pending", "not in service"],
    ["Warmed:Pending:Wait", "not in service"],
    ["Warmed:Running", "not in service"],
    ["Warmed:Stopped", "not in service"],
    ["Warmed:Hibernated", "not in service"],
    ["Warmed:Terminating", "not in service"],
    ["Terminating", "leaving"],
    ["Terminating:Wait", "leaving"],
    ["Terminating:Proceed", "leaving"],
    ["Terminated", "leaving"],
    ["Detaching", "leaving"],
    ["Detached", "leaving"],
  ] as const)("%s means: %s", (state, verdict) => {
    expect(judgeState(state)).toBe(verdict);
  });
});

describe("how an instance left its group", () => {
  const id = "i-0b662ef9931388ba0";
  const at = "At 2026-03-01T12:00:00Z";
  const activity = (verb: string, cause: string, of = id) => ({
    ActivityId: "a",
    AutoScalingGroupName: "web",
    StartTime: new Date(0),
    StatusCode: "Successful" as const,
    Description: `${verb} EC2 instance: ${of}`,
    Cause: cause,
  });
  const shrinking = "shrinking the capacity from 4 to 3";
  const balancing =
    "instances were launched to balance instances in zones us-east-2b with other zones resulting in more than desired number of instances in the group.";

  test.each([
    ["detached with decrement", "Detaching", `${at} instance ${id} was detached in response to a user request, ${shrinking}.`],
    [
      "ended with decrement",
      "Terminating",
      `${at} instance ${id} was taken out of service in response to a user request, ${shrinking}.`,
    ],
    [
      "scaled in by hand",
      "Terminating",
      `${at} a user request update of AutoScalingGroup constraints to min: 0, max: 4, desired: 3 changing the desired capacity from 4 to 3.  ${at} an instance was taken out of service in response to a difference between desired and actual capacity, ${shrinking}.  ${at} instance ${id} was selected for termination.`,
    ],
    [
      "scaled in by a policy",
      "Terminating",
      `${at} a monitor alarm TargetTracking-web-AlarmLow-1 in state ALARM triggered policy cpu50 changing the desired capacity from 4 to 3.  ${at} an instance was taken out of service in response to a difference between desired and actual capacity, ${shrinking}.  ${at} instance ${id} was selected for termination.`,
    ],
    [
      "scaled in on a schedule",
      "Terminating",
      `${at} a scheduled action update of AutoScalingGroup constraints to min: 0, max: 4, desired: 3 changing the desired capacity from 4 to 3.  ${at} an instance was taken out of service in response to a difference between desired and actual capacity, ${shrinking}.  ${at} instance ${id} was selected for termination.`,
    ],
    [
      "scaled in while zones are balanced",
      "Terminating",
      `${at} ${balancing}  ${at} a user request explicitly set group desired capacity changing the desired capacity from 4 to 3.  ${at} an instance was taken out of service in response to a difference between desired and actual capacity, shrinking the capacity from 5 to 3.  ${at} instance ${id} was selected for termination.`,
    ],
  ])("%s: nothing is owed", (_, verb, cause) => {
    expect(howItLeft([activity(verb, cause)], id)).toBe("decremented");
  });

  test.each([
    [
      "taken by the balancing of zones, which has launched another one",
      "Terminating",
      `${at} ${balancing}  ${at} an instance was taken out of service in response to a difference between desired and actual capacity, ${shrinking}.  ${at} instance ${id} was selected for termination.`,
    ],
    ["detached without decrement", "Detaching", `${at} instance ${id} was detached in response to a user request.`],
    ["ended without decrement", "Terminating", `${at} instance ${id} was taken out of service in response to a user request.`],
    [
      "reclaimed",
      "Terminating",
      `${at} an instance was taken out of service in response to an EC2 health check indicating it has been terminated or stopped.`,
    ],
    [
      "stopped",
      "Terminating",
      `${at} an instance was taken out of service in response to an EC2 instance status checks failure.`,
    ],
    ["ill", "Terminating", `${at} an instance was taken out of service in response to an ELB system health check failure.`],
    ["called ill", "Terminating", `${at} an instance was taken out of service in response to a user health-check.`],
    ["refreshed", "Terminating", `${at} an instance was taken out of service in response to an instance refresh.`],
    [
      "rebalanced",
      "Terminating",
      `${at} an instance was taken out of service in response to an EC2 instance rebalance recommendation.`,
    ],
  ])("%s: the group substitutes by itself, whatever the tag says", (_, verb, cause) => {
    expect(howItLeft([activity(verb, cause)], id)).toBe("substituted");
  });

  test("an activity that lacks its cause tells nothing, and the next one is asked", () => {
    const silent = { ...activity("Detaching", ""), Cause: undefined };
    expect(howItLeft([silent], id)).toBe("unknown");
    expect(howItLeft([silent, activity("Detaching", shrinking)], id)).toBe("decremented");
  });

  test("the newest activity counts, which stands first", () => {
    const old = activity("Detaching", `${at} instance ${id} was detached in response to a user request, ${shrinking}.`);
    const now = activity("Terminating", `${at} an instance was taken out of service in response to an EC2 health check.`);
    expect(howItLeft([now, old], id)).toBe("substituted");
    expect(howItLeft([old, now], id)).toBe("decremented");
  });

  test.each([
    ["out of Standby", activity("Moving EC2 instance out of Standby", "moved out", "x")],
    ["attached again", activity("Attaching an existing", `${at} an instance was attached in response to user request.`)],
    ["launched", activity("Launching a new", `${at} an instance was started.`)],
  ])("one that is back (%s) has not left by what came before", (_, back) => {
    const now = back.Description.includes("Standby")
      ? { ...back, Description: `Moving EC2 instance out of Standby: ${id}` }
      : back;
    const old = activity("Detaching", `${at} instance ${id} was detached, ${shrinking}.`);
    expect(howItLeft([now, old], id)).toBe("unknown");
  });

  test("a description may say more behind the ID", () => {
    const { Cause } = activity("Terminating", `${at} an instance was taken out of service, ${shrinking}.`);
    const Description = `Terminating EC2 instance: ${id} - Waiting For ELB Connection Draining`;
    expect(howItLeft([{ ...activity("", ""), Description, Cause }], id)).toBe("decremented");
  });

  test.each([
    ["none at all", []],
    ["another instance's", [activity("Detaching", `detached, ${shrinking}.`, "i-0ffffffffffffffff")]],
    ["one whose ID begins alike", [activity("Detaching", `detached, ${shrinking}.`, `${id}1`)]],
    ["its launch", [activity("Launching a new", `${at} an instance was started.`)]],
    ["its attach", [activity("Attaching an existing", `${at} an instance was attached in response to user request.`)]],
    [
      "its standby",
      [activity("Moving", `${at} instance ${id} was moved to standby in response to a user request, ${shrinking}.`)],
    ],
    ["without words", [{ ...activity("", ""), Description: undefined, Cause: undefined }]],
  ])("activities that do not tell (%s) leave it open", (_, activities) => {
    expect(howItLeft(activities, id)).toBe("unknown");
  });
});

// Seconds before the deadline; then, for each standing, what is done without and with a refused decrement.
const standings: Standing[] = ["none", "outside", "joining", "in service", "healthy"];
const early = "wait wait wait wait decrement / wait wait wait wait wait";
const draining = "wait wait wait decrement decrement / wait wait wait wait wait";
const up = "substitute substitute decrement decrement decrement / substitute substitute substitute substitute substitute";
describe("when to detach", () => {
  test.each([
    ["two minutes before the deadline", 120, early],
    ["31 s before it", 31, early],
    ["30 s before it, for connections to drain", 30, draining],
    ["6 s before it", 6, draining],
    ["5 s before it, whatever the replacement does", 5, up],
    ["at the deadline", 0, up],
    ["long after it", -600, up],
    ["without a hard deadline", undefined, early],
  ])("%s", (_, seconds, answers) => {
    const deadlineMs = seconds === undefined ? undefined : 1_000_000 + seconds * 1000;
    const row = (refused: boolean) =>
      standings.map((standing) => whenToDetach({ nowMs: 1_000_000, deadlineMs, standing, refused }));
    expect(`${row(false).join(" ")} / ${row(true).join(" ")}`).toBe(answers);
  });
});

describe("what becomes of an unsettled claim", () => {
  const member = (lifecycleState = "InService"): Member => ({
    id: "i-2",
    group: "web",
    lifecycleState,
    zone: "a",
    type: "m5.large",
    isProtected: false,
    weight: 1,
  });
  const minute = 60_000;
  const inside = {
    isWinner: true,
    winnerInService: true,
    member: member(),
    outsideMs: 0,
    ageMs: 5 * minute,
    old: "staying" as const,
    watchedMs: 5 * minute,
    messageMs: 1.5 * minute,
    membersInService: 4,
    desired: 5,
    patienceMs: 2 * minute,
    isLetGo: false,
  };
  const outside = { ...inside, member: undefined, winnerInService: false, outsideMs: 31_000 };
  type Case = [string, Parameters<typeof judgeClaim>[0], ReturnType<typeof judgeClaim>];

  test.each<Case>([
    ["on its way into the group: nothing", outside, "leave"],
    ["outside, and its old one left with decrement: ended", { ...outside, old: "decremented" }, "end outside"],
    ["the same, seen for less than 30 s: the second read first", { ...outside, old: "decremented", outsideMs: 29_000 }, "leave"],
    [
      "outside, and its group substitutes: it is attached all the same, for capacity comes first",
      { ...outside, old: "substituted" },
      "leave",
    ],
    ["outside for more than ten minutes: a leak", { ...outside, ageMs: 10 * minute + 1 }, "end outside"],
    [
      "let go: its termination message's business",
      { ...outside, isLetGo: true, ageMs: 60 * minute, old: "decremented" },
      "leave",
    ],
    ["old, but seen outside for less than 30 s", { ...outside, ageMs: 60 * minute, outsideMs: 29_000 }, "leave"],
    ["outside, a loser whose winner is in service: ended", { ...outside, isWinner: false, winnerInService: true }, "end outside"],
    ["outside, a loser whose winner is not: kept", { ...outside, isWinner: false }, "leave"],

    ["a member beside its old one: the detach message's business", inside, "leave"],
    ["for more than ten minutes and the group's own delays: reminded of", { ...inside, ageMs: 12 * minute + 1 }, "remind"],
    ["within them: not yet", { ...inside, ageMs: 12 * minute - 1 }, "leave"],
    ["a member that is not in service yet", { ...inside, member: member("Pending"), old: "decremented" }, "leave"],
    ["in service, and its old one left with decrement: settled", { ...inside, old: "decremented" }, "settle"],
    [
      "in service, the group substitutes, and members do not reach desired: it stays",
      { ...inside, old: "substituted", membersInService: 4 },
      "leave",
    ],
    [
      "in service, the group substitutes, and members reach desired: one too many",
      { ...inside, old: "substituted", membersInService: 5 },
      "end member",
    ],
    [
      "nobody knows how its old one left: what is there stays, and is settled in the end",
      { ...inside, old: "unknown", watchedMs: 60 * minute },
      "settle",
    ],
    ["a loser in the group whose winner is in service: ended", { ...inside, isWinner: false }, "end member"],
    ["a loser in the group whose winner is not: kept", { ...inside, isWinner: false, winnerInService: false }, "leave"],
    [
      "a loser on its way into the group: ended by ID all the same",
      { ...inside, isWinner: false, member: member("Pending") },
      "end member",
    ],
    ["a loser never settles", { ...inside, isWinner: false, winnerInService: false, old: "decremented" }, "leave"],
  ])("%s", (_, claim, verdict) => {
    expect(judgeClaim(claim)).toBe(verdict);
  });

  test("a member is never ended as a leak, however old", () => {
    for (const old of ["staying", "decremented", "unknown"] as const)
      for (const isWinner of [true, false])
        expect(judgeClaim({ ...inside, old, isWinner, winnerInService: isWinner, ageMs: 1e9, watchedMs: 1e9 })).not.toMatch(
          "end",
        );
  });
});

describe("the maximum", () => {
  test.each([
    ["4/5", { original: 4, raised: 5 }],
    ["0/20", { original: 0, raised: 20 }],
  ])("is recorded as ORIGINAL/RAISED: %s", (tag, sizes) => {
    expect(readMaxTag(tag)).toEqual(sizes);
  });

  test.each([[undefined], [""], ["4"], ["4/"], ["/5"], ["a/b"], ["-4/5"], ["4/5/6"], ["4 / 5"], ["4.5/5"]])(
    "and from nothing else: %p",
    (tag) => {
      expect(readMaxTag(tag)).toBeUndefined();
    },
  );

  const tagged = (tag: string) => ({ "spotmax:max_size": tag });
  test("is left alone where there is room", () => {
    for (const tags of [{}, tagged("4/5")]) expect(raisedMax({ desired: 3, max: 5, tags }, 2)).toBeUndefined();
  });

  test.each([
    ["makes room for what comes", 4, 4, {}, 1, 4],
    ["makes room in units of weight", 8, 10, {}, 4, 10],
    ["makes room for a wave of any size", 4, 4, {}, 20, 4],
    ["may have been none at all", 0, 0, {}, 1, 0],
    ["keeps its first original when it is raised again", 8, 8, tagged("4/8"), 1, 4],
    ["keeps it also where it was raised in part", 8, 8, tagged("4/12"), 4, 4],
    [
      "is somebody else's where it is no multiple of the original: an operator's word within our range",
      5,
      5,
      tagged("4/8"),
      1,
      5,
    ],
    ["is somebody else's above what we raised it to: that is the original now", 9, 9, tagged("4/5"), 1, 9],
    ["is somebody else's below our original too", 3, 3, tagged("4/5"), 1, 3],
    ["is the original itself where we only recorded it", 4, 4, tagged("4/5"), 1, 4],
    ["counts a tag that cannot be read as none", 4, 4, tagged("x"), 1, 4],
  ])("raised, %s", (_, desired, max, tags, units, original) => {
    const raised = raisedMax({ desired, max, tags }, units);
    expect(raised?.max).toBeGreaterThanOrEqual(desired + units);
    // What is recorded says both where it was and where it is now.
    expect(readMaxTag(raised?.tag)).toEqual({ original, raised: raised?.max ?? Number.NaN });
  });
});

describe("whom a claim replaces", () => {
  const claim = (id: string, replaces?: string, order?: string) =>
    instance(id, {
      tags: {
        ...(replaces === undefined ? {} : { "spotmax:replaces": replaces }),
        ...(order === undefined ? {} : { "spotmax:order": order }),
      },
    });
  test.each([
    ["launched alone: the one it names", claim("i-9", "i-1"), "i-1"],
    ["launched in a batch: the n-th replaces the n-th", claim("i-9", "i-1 i-2 i-3", "i-7 i-9 i-8"), "i-2"],
    ["one of fewer than were asked for", claim("i-8", "i-1 i-2 i-3", "i-7 i-8"), "i-2"],
    ["the order is not written yet", claim("i-9", "i-1 i-2"), undefined],
    ["the order does not name it", claim("i-9", "i-1 i-2", "i-7 i-8"), undefined],
    ["the order has more than there were old ones", claim("i-9", "i-1 i-2", "i-7 i-8 i-9"), undefined],
    ["none of ours", claim("i-9"), undefined],
    ["an empty tag", claim("i-9", ""), undefined],
  ])("%s", (_, of, old) => {
    expect(replacedBy(of)).toBe(old);
  });
});

describe("where two claims live, the winner", () => {
  const settled = { tags: { "spotmax:attached": "2026-03-01T12:00:00Z" } };
  test.each([
    ["has the lowest ID, in whatever order they come", [instance("i-3"), instance("i-1"), instance("i-2")], "i-1"],
    ["may be pending", [instance("i-1", { state: "pending" }), instance("i-2")], "i-1"],
    ["is the settled one before that", [instance("i-1"), instance("i-2", settled)], "i-2"],
    ["is the lowest of two settled ones", [instance("i-3", settled), instance("i-2", settled), instance("i-1")], "i-2"],
    [
      "is never dead",
      [instance("i-1", { state: "shutting-down" }), instance("i-2", { state: "terminated", ...settled }), instance("i-3")],
      "i-3",
    ],
    ["is never stopped", [instance("i-1", { state: "stopped" }), instance("i-2", { state: "stopping" })], undefined],
    ["is nobody where there is none", [], undefined],
  ])("%s", (_, claims, id) => {
    const before = claims.map((c) => c.id);
    expect(winner(claims)?.id).toBe(id);
    expect(claims.map((c) => c.id)).toEqual(before);
  });
});

describe("AWS's answers become plain records", () => {
  test("an instance", () => {
    expect(
      toInstance({
        InstanceId: "i-1",
        InstanceType: "m5.large",
        Placement: { AvailabilityZone: "a" },
        State: { Name: "terminated" },
        StateReason: { Code: "Client.InternalError", Message: "Client error on launch" },
        InstanceLifecycle: "spot",
        PlatformDetails: "Red Hat Enterprise Linux",
        Architecture: "arm64",
        VirtualizationType: "hvm",
        LaunchTime: new Date(5),
        Tags: [{ Key: "Name", Value: "x" }, { Key: "empty" }],
        BlockDeviceMappings: [
          { DeviceName: "/dev/xvda", Ebs: { VolumeId: "vol-1", DeleteOnTermination: true } },
          { DeviceName: "/dev/sdz", Ebs: { VolumeId: "vol-2", DeleteOnTermination: false } },
          { DeviceName: "/dev/sdb" },
        ],
      }),
    ).toEqual({
      id: "i-1",
      type: "m5.large",
      zone: "a",
      state: "terminated",
      stateReason: "Client.InternalError: Client error on launch",
      spot: true,
      platform: "Linux",
      architecture: "arm64",
      virtualization: "hvm",
      launchedMs: 5,
      tags: { Name: "x", empty: "" },
      volumes: { "/dev/xvda": { id: "vol-1", ends: true }, "/dev/sdz": { id: "vol-2", ends: false } },
    });
    expect(toInstance({ InstanceId: "i-1" })?.spot).toBeFalse();
    for (const PlatformDetails of ["Windows", "Windows with SQL Server Standard", "Windows BYOL"])
      expect(toInstance({ InstanceId: "i-1", PlatformDetails })?.platform).toBe("Windows");
    expect(toInstance({ InstanceId: "i-1", Platform: "windows" as never })?.platform).toBe("Windows");
    expect(toInstance({})).toBeUndefined();
  });

  const sizes = { MinSize: 1, MaxSize: 4, DesiredCapacity: 2, DefaultCooldown: 0, CreatedTime: new Date(0) };
  const bare = { AutoScalingGroupName: "web", AvailabilityZones: ["a"], HealthCheckType: "EC2", ...sizes };

  test("a group with a launch template", () => {
    const record = toGroup({
      ...bare,
      VPCZoneIdentifier: "subnet-1, subnet-2",
      LaunchTemplate: { LaunchTemplateId: "lt-1", Version: "3" },
      Instances: [
        {
          InstanceId: "i-1",
          AvailabilityZone: "a",
          LifecycleState: "InService",
          HealthStatus: "Healthy",
          ProtectedFromScaleIn: true,
          WeightedCapacity: "3",
        },
      ],
      SuspendedProcesses: [{ ProcessName: "Launch" }],
      TargetGroupARNs: ["arn:1"],
      TrafficSources: [
        { Identifier: "arn:1", Type: "elbv2" },
        { Identifier: "arn:2", Type: "elbv2" },
        { Identifier: "arn:3", Type: "vpc-lattice" },
      ],
      Status: "Delete in progress",
    });
    expect(record).toMatchObject({
      name: "web",
      min: 1,
      max: 4,
      desired: 2,
      subnets: ["subnet-1", "subnet-2"],
      template: { LaunchTemplateId: "lt-1", Version: "3" },
      targetGroups: ["arn:1", "arn:2"],
      status: "Delete in progress",
    });
    expect(record?.suspended.has("Launch")).toBeTrue();
    expect(record?.members.get("i-1")).toMatchObject({ group: "web", isProtected: true, weight: 3, lifecycleState: "InService" });
  });

  test("a mixed instances policy's template, types, weights, price and order", () => {
    const own = { LaunchTemplateName: "arm" };
    const record = toGroup({
      ...bare,
      MixedInstancesPolicy: {
        LaunchTemplate: {
          LaunchTemplateSpecification: { LaunchTemplateId: "lt-2" },
          Overrides: [
            { InstanceType: "m5.large", WeightedCapacity: "2" },
            { InstanceType: "m6g.large", LaunchTemplateSpecification: own },
            { InstanceRequirements: { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 1 } } },
          ],
        },
        InstancesDistribution: { SpotMaxPrice: "0.05", OnDemandAllocationStrategy: "prioritized" },
      },
    });
    expect(record).toMatchObject({
      template: { LaunchTemplateId: "lt-2" },
      overrides: [
        { type: "m5.large", weight: 2 },
        { type: "m6g.large", weight: 1, template: own },
        { requirements: { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 1 } }, weight: 1 },
      ],
      spotMaxPrice: "0.05",
      prioritized: true,
      desiredType: "units",
    });
  });

  test("a launch configuration is no template, and a group without a name no group", () => {
    expect(toGroup({ ...bare, LaunchConfigurationName: "lc" })?.template).toBeUndefined();
    expect(toGroup({ ...bare, AutoScalingGroupName: undefined })).toBeUndefined();
  });

  // A maximum of 0 would be raised to desired + 1, and that would end members.
  test.each(["MinSize", "MaxSize", "DesiredCapacity"])("a group without its %s is no answer", (key) => {
    expect(() => toGroup({ ...bare, [key]: undefined })).toThrow(`AWS's answer for web lacks ${key}`);
  });

  test("nor is one with a member that has no state", () => {
    const member = { InstanceId: "i-1", AvailabilityZone: "a", HealthStatus: "Healthy", ProtectedFromScaleIn: false };
    expect(() => toGroup({ ...bare, Instances: [{ ...member, LifecycleState: undefined }] })).toThrow("lacks LifecycleState");
  });

  test("of a group's tags those it propagates go onto what we launch, without our own and AWS's", () => {
    const record = toGroup({
      ...bare,
      Tags: [
        { Key: "team", Value: "x", PropagateAtLaunch: true },
        { Key: "stays", Value: "x", PropagateAtLaunch: false },
        { Key: "aws:cloudformation:stack-id", Value: "x", PropagateAtLaunch: true },
        ...["group", "replaces", "order", "attached", "detached", "max_size"].map((name) => ({
          Key: `spotmax:${name}`,
          Value: "x",
          PropagateAtLaunch: true,
        })),
      ],
    });
    expect(record?.propagatedTags).toEqual([{ Key: "team", Value: "x" }]);
    expect(record?.tags).toMatchObject({ stays: "x", "spotmax:max_size": "x" });
  });
});

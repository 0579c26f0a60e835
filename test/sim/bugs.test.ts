// Bugs that lives have found, each as the smallest scenario that shows it; BUGS.md tells their stories.
import { expect, test } from "bun:test";
import type { CreateFleetCommandInput } from "@aws-sdk/client-ec2";
import * as maxgroup from "../../maxgroup.ts";
import { AwsError } from "../aws/world.ts";
import { Stage } from "./harness.ts";

const three = { min: 3, max: 5, desired: 3 };
const first = <T>(list: readonly T[]): T => {
  const [one] = list;
  if (one === undefined) throw new Error("nothing there");
  return one;
};
const sizes = (s: Stage, name = "web") => {
  const g = s.world.autoscaling.groups.get(name);
  return [g?.min, g?.max, g?.desired];
};
/** As its owner does, by hand. */
const protect = (s: Stage, id: string) =>
  s.call("autoscaling", "SetInstanceProtection", { AutoScalingGroupName: "web", InstanceIds: [id], ProtectedFromScaleIn: true });
/** Who was launched for it alone, or in a batch. */
const claimOf = (s: Stage, old: string): string => {
  const claims = [...s.world.ec2.instances.values()].filter((i) => i.tags.get("spotmax:replaces")?.includes(old));
  const place = first(claims).tags.get("spotmax:replaces")?.split(" ").indexOf(old) ?? 0;
  return claims.map(({ id }) => id).sort()[place] ?? "";
};
/** Until a claim that is none of `known` is in service. */
async function inService(s: Stage, known: string[] = []): Promise<string> {
  const found = () =>
    s
      .openClaims()
      .find((id) => !known.includes(id) && s.world.autoscaling.groups.get("web")?.members.get(id)?.state === "InService");
  await s.until(() => found() !== undefined, 120);
  return found() ?? "";
}

/** For `ms` from now no describe shows that this one is a member. */
function hide(s: Stage, id: string, ms: number): void {
  const { operations } = s.world.autoscaling;
  const { DescribeAutoScalingInstances: find, DescribeAutoScalingGroups: read } = operations;
  const untilMs = s.clock.now() + ms;
  const without = <T extends { InstanceId?: string }>(all: T[]) =>
    all.filter((one) => one.InstanceId !== id || s.clock.now() > untilMs);
  const DescribeAutoScalingInstances = (input: never) => {
    const answer = find?.(input, {}) as { AutoScalingInstances: object[] };
    return { ...answer, AutoScalingInstances: without(answer.AutoScalingInstances) };
  };
  const DescribeAutoScalingGroups = (input: never) => {
    const answer = read?.(input, {}) as { AutoScalingGroups: { Instances: object[] }[] };
    return { AutoScalingGroups: answer.AutoScalingGroups.map((g) => ({ ...g, Instances: without(g.Instances) })) };
  };
  Object.assign(operations, { DescribeAutoScalingInstances, DescribeAutoScalingGroups });
}
/** What a group does is told in its activities only after `ms`. */
function lagActivities(s: Stage, ms: number): void {
  const { DescribeScalingActivities: describe } = s.world.autoscaling.operations;
  const lagging = (input: never) => {
    const answer = describe?.(input, {}) as { Activities: { StartTime: Date }[] };
    return { ...answer, Activities: answer.Activities.filter((a) => a.StartTime.getTime() < s.clock.now() - ms) };
  };
  Object.assign(s.world.autoscaling.operations, { DescribeScalingActivities: lagging });
}

test("a replacement replaced while the first old one is still a member stands in for both", async () => {
  const s = new Stage({ pendingMs: [6_000, 6_000], replaceMs: [5_000, 5_000] });
  const old = first(s.group({ name: "web", min: 1, max: 5, desired: 3 }));
  await s.start();
  // The first one cannot be let go.
  s.world.intercept = ({ operation, input }) =>
    operation === "DetachInstances" && (input as { InstanceIds: string[] }).InstanceIds.includes(old)
      ? { before: new AwsError("ResourceContention", "busy", 500) }
      : undefined;
  s.world.interrupt(old);
  const one = await inService(s);
  s.world.interrupt(one);
  await s.until(() => s.world.instance(one).group === undefined, 90);
  // So that one goes by itself, and its group substitutes it.
  await s.until(() => s.world.instance(old).group === undefined, 200);
  await s.quiet(3600);
  expect(sizes(s)).toEqual([1, 5, 3]);
});

test("a replacement that is let go stands for nobody while its connections drain", async () => {
  const s = new Stage({ pendingMs: [6_000, 6_000] });
  const old = first(s.group({ name: "web", min: 1, max: 5, desired: 3, targetGroups: ["tg"] }, { detaching_delay_seconds: 0 }));
  await s.start();
  // Nobody acts on the first one's detach message.
  s.world.intercept = ({ operation, input }) =>
    operation === "DetachInstances" && (input as { InstanceIds: string[] }).InstanceIds.includes(old)
      ? { before: new AwsError("ResourceContention", "busy", 500) }
      : undefined;
  s.world.interrupt(old, { withoutReclaim: true });
  const one = await inService(s);
  s.world.interrupt(one, { withoutReclaim: true });
  const state = () => s.world.autoscaling.groups.get("web")?.members.get(one)?.state;
  await s.until(() => state() === "Detaching", 200);
  const said = s.lines.length;
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(5);
  expect(state()).toBe("Detaching");
  // Its own replacement does, as long as that is not settled.
  const [line = "nothing"] = s.lines.slice(said).filter((l) => l.includes("was launched before"));
  expect(line).toMatch(new RegExp(`(?<!${one}) was launched before for ${one}`));
});

test("a copy made before the group could be read does not forget that the old one was protected", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, protected: true }));
  await s.start();
  const untilMs = s.clock.now() + 30_000;
  s.world.intercept = ({ operation }) =>
    operation === "DescribeAutoScalingGroups" && s.clock.now() < untilMs
      ? { before: new AwsError("Throttling", "Rate exceeded") }
      : undefined;
  s.world.interrupt(old);
  await s.quiet(3600);
  s.check([old], { web: [3, 5, 3] });
});

test("a slow call that protects the replacement does not outlive its claim", async () => {
  for (let seed = 1; seed <= 20; seed++) {
    const s = new Stage({ seed, staleMs: 5_000, attachMs: [1_000, 1_000], healthyMs: [500, 500] });
    const old = first(s.group({ name: "web", ...three, targetGroups: ["tg"] }, { detaching_delay_seconds: 0 }));
    await s.start();
    s.world.intercept = ({ operation, input }) =>
      operation === "SetInstanceProtection" && (input as { ProtectedFromScaleIn: boolean }).ProtectedFromScaleIn
        ? { delayMs: 4_000 }
        : undefined;
    s.world.interrupt(old);
    await s.quiet(3600);
    await s.seconds(300);
    for (const [id, m] of s.world.autoscaling.groups.get("web")?.members ?? [])
      expect([seed, id, m.protected]).toEqual([seed, id, false]);
  }
});

test("a decrement that the minimum refuses for good does not hold up the group's limit for ever", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group(
    { name: "web", ...three },
    { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 60 },
  );
  await s.start();
  await s.call("autoscaling", "SetInstanceProtection", {
    AutoScalingGroupName: "web",
    InstanceIds: [old, other],
    ProtectedFromScaleIn: true,
  });
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 120);
  await s.seconds(5);
  // The operator takes one away meanwhile: old and new are both needed now.
  await s.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 3 });
  await s.seconds(120);
  s.world.rebalance(other);
  await s.seconds(3600);
  expect([...s.world.ec2.instances.values()].some((i) => i.tags.get("spotmax:replaces") === other)).toBe(true);
});

test("more messages than a daemon holds in hand are all taken, one after the other", async () => {
  const s = new Stage({ checkOutputs: false, latencyMs: [0, 0] });
  s.group({ name: "web", ...three });
  await s.start({ level: "error" });
  for (let i = 0; i < 15_000; i++) {
    const id = `i-${i.toString(16).padStart(17, "0")}`;
    s.world.sendRaw(
      s.queues.interruption,
      s.world.event("EC2 Instance Rebalance Recommendation", "aws.ec2", [], { "instance-id": id }),
    );
  }
  await s.quiet(3600);
});

test("a group with dots in its name: an attach whose answer was lost is none that was refused", async () => {
  for (let seed = 1; seed <= 20; seed++) {
    const s = new Stage({ seed, staleMs: 20_000 });
    const old = first(s.group({ name: "nodes.prod.example.com", ...three }));
    await s.start();
    let lost = false;
    s.world.intercept = ({ operation }) => {
      if (operation !== "AttachInstances" || lost) return undefined;
      lost = true;
      return { after: new AwsError("InternalError", "internal", 500) };
    };
    s.world.interrupt(old);
    await s.quiet(3600);
    expect([seed, s.lines.filter((line) => line.includes("is ended"))]).toEqual([seed, []]);
  }
});

test("a tag's removal that is not answered does not take away what is recorded afterwards", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  let hung = false;
  s.world.intercept = ({ operation }) => {
    if (operation !== "DeleteTags" || hung) return undefined;
    hung = true;
    return { hang: true };
  };
  s.world.interrupt(old);
  await s.until(() => hung, 600);
  // While the call hangs another daemon raises the maximum for the next one.
  const tag = { ResourceId: "web", ResourceType: "auto-scaling-group", Key: "spotmax:max_size", Value: "3/6" };
  await s.call("autoscaling", "CreateOrUpdateTags", { Tags: [{ ...tag, PropagateAtLaunch: false }] });
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MaxSize: 6 });
  await s.seconds(20);
  await s.quiet(3600);
  expect(sizes(s)).toEqual([3, 3, 3]);
});

test("a replacement whose old one has a second notice after it died as a member is not launched again", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  s.world.ec2.terminate(s.world.instance(claim), "Client.UserInitiatedShutdown: by hand");
  await s.seconds(20);
  s.world.interrupt(old, { withoutReclaim: true });
  await s.quiet(3600);
  await s.seconds(900);
  expect(sizes(s)).toEqual([1, 6, 3]);
});

test("Launch suspended between launch and attach, and resumed: the replacement waits, and is attached", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  await s.start();
  s.world.rebalance(old);
  await s.until(() => s.openClaims().length === 1, 60);
  await s.call("autoscaling", "SuspendProcesses", { AutoScalingGroupName: "web", ScalingProcesses: ["Launch"] });
  await s.seconds(60);
  await s.call("autoscaling", "ResumeProcesses", { AutoScalingGroupName: "web", ScalingProcesses: ["Launch"] });
  await s.quiet(3600);
  s.check([old], { web: [3, 5, 3] });
});

test("an interruption of one that was just let go does not forget that it was protected", async () => {
  const s = new Stage();
  const delays = { detaching_delay_seconds: 0, preaction_detach_delay_seconds: 60 };
  const old = first(s.group({ name: "web", ...three, protected: true }, { is_to_handle_rebalance_event: true, ...delays }));
  const config = s.config();
  config.global.detach_evt_sqs.visibility_timeout_seconds = 300;
  const daemon = await s.start({ config });
  s.world.intercept = ({ operation }) => {
    // Nobody settles the claim before the interruption's own detach message does.
    if (operation === "DetachInstances") daemon.kill();
    return undefined;
  };
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "detach"), 300);
  s.world.intercept = undefined;
  await s.until(() => s.world.instance(old).group === undefined, 60);
  await s.start({ config });
  s.world.interrupt(old);
  await s.quiet(3600);
  s.check([old], { web: [3, 5, 3] });
});

test("without a hard deadline too, a replacement that another daemon launched meanwhile is gone on with", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  await s.start();
  let deaths = 0;
  let theirs = "";
  s.world.ec2.dieWhilePending = () => {
    if (++deaths === 2) {
      const tags = { "spotmax:group": "web", "spotmax:replaces": old };
      const instance = s.world.createInstance({ zone: s.world.instance(old).zone, tags, ageSeconds: 5 });
      theirs = instance.id;
    }
    return { Code: "Client.InternalError", Message: "Client error on launch" };
  };
  s.world.rebalance(old);
  await s.quiet(3600);
  expect([deaths, s.world.instance(theirs).group]).toEqual([2, "web"]);
  expect(s.world.instance(theirs).tags.has("spotmax:attached")).toBe(true);
  expect(sizes(s)).toEqual([3, 5, 3]);
});

test("a replacement that was just released and still shows as protected does not hand that on", async () => {
  const s = new Stage({ staleMs: 5_000 });
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 300);
  s.world.interrupt(claim);
  await s.quiet(3600);
  const isProtected = [...(s.world.autoscaling.groups.get("web")?.members.values() ?? [])].map((m) => m.protected);
  expect(isProtected).toEqual([false, false, false]);
});

test("a notice from a year ahead about an instance that nobody knows is not waited for", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  await s.start();
  const detail = { "instance-id": "i-0b662ef9931388ba0", "instance-action": "terminate" };
  const event = JSON.parse(s.world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], detail));
  s.world.sendRaw(s.queues.interruption, JSON.stringify({ ...event, time: "2027-01-01T00:00:00Z" }));
  await s.seconds(60);
  expect(s.isQuiet()).toBe(true);
});

test("half an answer about a group changes no size", async () => {
  const s = new Stage({
    program: {
      ...maxgroup,
      makeContext: (deps, config, signal) => {
        const send = async (...args: Parameters<typeof deps.autoScaling.send>) => {
          const answer: unknown = await deps.autoScaling.send(...args);
          const groups = s.clock.now() < untilMs ? ((answer as { AutoScalingGroups?: object[] }).AutoScalingGroups ?? []) : [];
          for (const g of groups) Reflect.deleteProperty(g, "MaxSize");
          return answer;
        };
        return maxgroup.makeContext({ ...deps, autoScaling: { send } as typeof deps.autoScaling }, config, signal);
      },
    },
  });
  let untilMs = 0;
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  const set: unknown[] = [];
  s.world.intercept = ({ operation, input }) => {
    if (operation === "UpdateAutoScalingGroup") set.push(input);
    return undefined;
  };
  untilMs = s.clock.now() + 40_000;
  s.world.interrupt(old);
  await s.quiet(3600);
  expect(set).toEqual([]);
  s.check([old], { web: [3, 5, 3] });
});

test("a second notice, read when the old one has left, does not take the replacement's protection away", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await protect(s, old);
  const daemon = await s.start();
  let isOut = false;
  s.world.intercept = ({ operation }) => {
    if (operation === "DetachInstances" && !isOut) {
      isOut = true;
      daemon.kill();
    }
    return undefined;
  };
  s.world.interrupt(old);
  await s.until(() => isOut, 300);
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(5);
  await s.start();
  await s.quiet(3600);
  await s.seconds(200);
  expect([sizes(s), s.least("web"), s.openClaims()]).toEqual([[3, 5, 3], 3, []]);
  const [claim] = [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:attached"));
  expect(s.world.autoscaling.groups.get("web")?.members.get(claim?.id ?? "")?.protected).toBe(true);
});

test("a replacement interrupted just after it was released does not hand on a protection that is over", async () => {
  for (let seed = 1; seed <= 10; seed++) {
    const s = new Stage({ seed, staleMs: 5_000 });
    const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 0 }));
    await s.start();
    s.world.interrupt(old);
    const one = await inService(s);
    await s.until(() => s.world.instance(one).tags.has("spotmax:attached"), 120);
    s.world.interrupt(one);
    await s.quiet(3600);
    await s.seconds(200);
    for (const [id, m] of s.world.autoscaling.groups.get("web")?.members ?? [])
      expect([seed, id, m.protected]).toEqual([seed, id, false]);
  }
});

test("a queue that takes no messages for a quarter of an hour makes no dead letters", async () => {
  const s = new Stage();
  const [old = "", calm = ""] = s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true });
  await s.start();
  const untilMs = s.clock.now() + 900_000;
  s.world.intercept = ({ operation }) =>
    operation === "SendMessageBatch" && s.clock.now() < untilMs
      ? { before: new AwsError("ServiceUnavailable", "Service Unavailable", 503) }
      : undefined;
  s.world.instance(calm).launchedAtMs = s.clock.now() - 300_000; // too young yet: a copy is to take the message's place
  s.world.rebalance(calm);
  s.world.interrupt(old, { withoutReclaim: true });
  await s.quiet(7200);
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(0);
  // The interruption did not come true, and its time was over long before anything could be launched for it.
  expect(s.world.instance(old).group).toBe("web");
  s.check([calm], { web: [3, 5, 3] });
});

test("a second notice, when its replacement was itself replaced and let go, goes on with that one's replacement", async () => {
  const s = new Stage();
  const old = first(
    s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 600 }),
  );
  await s.start();
  s.world.rebalance(old);
  const one = await inService(s);
  s.world.interrupt(one);
  await s.until(() => s.world.instance(one).state === "terminated", 300);
  s.world.interrupt(old);
  await s.quiet(7200);
  expect([...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces")).length).toBe(2);
  expect(sizes(s)).toEqual([3, 5, 3]);
});

test("a replacement's notice that meets a daemon just started does not take our protection for its owner's", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  const daemon = await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  await s.until(() => s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected === true, 60);
  daemon.kill();
  await s.seconds(21); // its last receive takes no message with it
  const untilMs = s.clock.now() + 30_000;
  s.world.intercept = ({ operation, input }) =>
    operation === "DescribeInstances" && JSON.stringify(input).includes("tag-key") && s.clock.now() < untilMs
      ? { before: new AwsError("RequestLimitExceeded", "Request limit exceeded.", 503) }
      : undefined;
  s.world.interrupt(claim);
  s.spawn();
  await s.quiet(3600);
  const isProtected = [...(s.world.autoscaling.groups.get("web")?.members.values() ?? [])].map((m) => m.protected);
  expect(isProtected).toEqual([false, false, false]);
});

test("recommendations that wait for their turn do not hold up an interruption of their group", async () => {
  const s = new Stage({ latencyMs: [400, 400] });
  const [old = "", ...others] = s.group(
    { name: "web", min: 300, max: 320, desired: 300 },
    { is_to_handle_rebalance_event: true },
  );
  await s.start();
  for (const id of others) s.world.rebalance(id);
  await s.seconds(90);
  s.world.interrupt(old);
  const isForIt = (id: string) => s.world.instance(id).tags.get("spotmax:replaces") === old;
  await s.until(() => s.world.audit.some((a) => a.what === "attach" && a.ids.some(isForIt)), 40);
  await s.seconds(150);
  expect(s.world.instance(old).state).not.toBe("running");
  expect(s.least("web")).toBe(300);
});

test("a group that is busy when its maximum is to be raised is asked again at once", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
  await s.start();
  let times = 0;
  s.world.intercept = ({ operation }) =>
    operation === "UpdateAutoScalingGroup" && ++times <= 3
      ? { before: new AwsError("ScalingActivityInProgress", "You already have a pending update.") }
      : undefined;
  s.world.interrupt(old);
  await s.quiet(3600);
  expect(s.lines.filter((line) => line.includes("the message comes again"))).toEqual([]);
  s.check([old], { web: [3, 3, 3] });
});

test("notices that are switched off do not circle because their group is left out", async () => {
  const s = new Stage();
  s.group({ name: "fine", ...three });
  const members = s.group({ name: "web", ...three, launchConfiguration: true });
  await s.start();
  for (const id of members) s.world.rebalance(id);
  await s.seconds(30);
  expect(s.isQuiet()).toBe(true);
  // An interruption waits for its group to be mended, as long as there is time.
  s.world.interrupt(first(members), { withoutReclaim: true });
  await s.seconds(30);
  expect(s.isQuiet()).toBe(false);
});

test("short polls that find nothing are no hot loop", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  await s.start({ config: s.config({ wait_time_seconds: 0 }) });
  await s.seconds(60);
  expect(s.world.calls["sqs:ReceiveMessage"]).toBeLessThan(3 * 65);
});

/** Two groups at their maximum, each of which has had one replaced: both maximums are raised and are to come down. */
async function twoRaised(): Promise<{ s: Stage; raised: () => string[] }> {
  const s = new Stage({ drainMs: 900_000 });
  const full = { min: 1, max: 2, desired: 2 };
  const api = first(s.group({ name: "api", ...full, targetGroups: ["tg"] }));
  const web = first(s.group({ name: "web", ...full }, { detaching_delay_seconds: 80 }));
  await s.start();
  for (const old of [api, web]) s.world.interrupt(old);
  const raised = () => [...s.world.autoscaling.groups.values()].filter((g) => g.max > 2).map((g) => g.name);
  await s.until(() => raised().length === 2, 120);
  return { s, raised };
}

test("what somebody has tagged by hand, and no launch of ours could have, is nobody's to end", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  const old = { "spotmax:replaces": "i-0123456789abcdef0" };
  const ours = s.world.createInstance({ tags: { ...old, "spotmax:group": "web" } });
  const theirs = [
    old,
    { "spotmax:replaces": "the old one", "spotmax:group": "web" },
    { "spotmax:replaces": "", "spotmax:group": "web" },
  ].map((tags) => s.world.createInstance({ tags }));
  await s.start();
  await s.seconds(1_800);
  expect([ours, ...theirs].map(({ state }) => state === "running")).toEqual([false, true, true, true]);
});

test("one that was settled, replaced and let go meanwhile is not ended by a daemon that has been slow", async () => {
  const s = new Stage();
  const delays = { preaction_detach_delay_seconds: 0, preaction_termination_delay_seconds: 3_600 };
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, ...delays }));
  const held = new Set<string>();
  /** A daemon of which Auto Scaling and the queues hear nothing as long as it is held. */
  const start = async (name: string) => {
    const { deps, state } = (await s.start({ config: s.config({ wait_time_seconds: 1 }) })).ctx;
    const hold = <C extends { send: unknown }>({ send }: C): C => {
      const late = async (...args: unknown[]) => {
        while (held.has(name)) await s.clock.sleep(500);
        return (send as (...a: unknown[]) => Promise<unknown>)(...args);
      };
      return { send: late } as unknown as C;
    };
    const sqs = hold(deps.sqs(s.queues.detach));
    Object.assign(deps, { autoScaling: hold(deps.autoScaling), sqs: () => sqs });
    return state;
  };
  const [slow] = [await start("slow"), await start("quick")];
  held.add("quick");
  await s.seconds(5);
  s.world.rebalance(old);
  await s.until(() => [...slow.inHand.values()].some((work) => work.claim), 60);
  const id = claimOf(s, old);
  held.delete("quick");
  held.add("slow");
  s.world.rebalance(old);
  await s.until(() => s.world.instance(id).tags.has("spotmax:attached"), 120);
  s.world.instance(id).launchedAtMs -= 3_600_000;
  s.world.rebalance(id);
  await s.until(() => s.world.instance(id).tags.has("spotmax:detached") && s.world.instance(id).group === undefined, 120);
  held.delete("slow");
  await s.seconds(60);
  expect(s.world.instance(id).state).toBe("running");
});

test("a line of replacements, none of them settled yet, hands on that the first one was protected by hand", async () => {
  const s = new Stage({ pendingMs: [6_000, 6_000] });
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { detaching_delay_seconds: 85 }));
  const web = { AutoScalingGroupName: "web" };
  await protect(s, old);
  await s.start();
  s.world.interrupt(old);
  const one = await inService(s);
  s.world.interrupt(one);
  const two = await inService(s, [one]);
  // Both go by somebody else's hand.
  const out = { ShouldDecrementDesiredCapacity: true };
  await s.call("autoscaling", "TerminateInstanceInAutoScalingGroup", { InstanceId: one, ...out });
  await s.call("autoscaling", "DetachInstances", { ...web, InstanceIds: [old], ...out });
  await s.quiet(3_600);
  const group = s.world.autoscaling.groups.get("web");
  expect([sizes(s), group?.members.get(two)?.protected]).toEqual([[1, 9, 3], true]);
});

test("a rival that another daemon has settled by the time of the settling is the one that stays", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { detaching_delay_seconds: 60 }));
  const { state } = (await s.start()).ctx;
  s.world.interrupt(old);
  await inService(s);
  const rival = s.world.createInstance({}).id;
  const web = { AutoScalingGroupName: "web" };
  await s.call("autoscaling", "AttachInstances", { ...web, InstanceIds: [rival] });
  let isHung = true;
  s.world.intercept = ({ operation }) => (isHung && operation === "DescribeScalingActivities" ? { hang: true } : undefined);
  await s.call("autoscaling", "DetachInstances", { ...web, InstanceIds: [old], ShouldDecrementDesiredCapacity: true });
  await s.until(() => [...state.inHand.values()].some((work) => work.left && work.claim), 120);
  await s.seconds(2);
  const { tags } = s.world.instance(rival);
  tags.set("spotmax:replaces", old).set("spotmax:group", "web").set("spotmax:attached", new Date(s.clock.now()).toISOString());
  isHung = false;
  await s.quiet(3_600);
  expect([sizes(s), s.world.autoscaling.groups.get("web")?.members.has(rival)]).toEqual([[1, 9, 3], true]);
});

test("a group that is being deleted does not keep the maximums of others raised", async () => {
  const { s, raised } = await twoRaised();
  await s.until(() => s.openClaims().length === 1, 60); // that of api is settled
  await s.call("autoscaling", "DeleteAutoScalingGroup", { AutoScalingGroupName: "api", ForceDelete: true });
  // Nothing says that a forced deletion takes the maximum along.
  Object.assign(s.world.autoscaling.groups.get("api") ?? {}, { max: 4 });
  await s.seconds(300);
  expect([s.world.autoscaling.groups.get("api")?.status !== undefined, raised()]).toEqual([true, ["api"]]);
  expect(s.lines.filter((line) => line.includes("putting the maximum of api back"))).toEqual([]);
});

test("a maximum that may not be put back does not keep those of others raised", async () => {
  const { s, raised } = await twoRaised();
  s.world.intercept = ({ operation, input }) =>
    operation === "UpdateAutoScalingGroup" && (input as { AutoScalingGroupName: string }).AutoScalingGroupName === "api"
      ? { before: new AwsError("AccessDenied", "not yours") }
      : undefined;
  await s.seconds(300);
  expect(raised()).toEqual(["api"]);
  expect(s.lines.filter((line) => line.includes("putting the maximum of api back")).length).toBe(1);
  s.world.intercept = undefined;
  await s.quiet();
});

test("a claim whose group no group can be called by holds up nobody", async () => {
  for (const name of ["", "x".repeat(256)]) {
    const s = new Stage();
    const old = first(s.group({ name: "web", min: 3, max: 3, desired: 3 }));
    const stray = s.world.createInstance({ tags: { "spotmax:replaces": "i-0123456789abcdef0", "spotmax:group": name } });
    await s.start();
    s.world.interrupt(old);
    await s.quiet();
    expect(sizes(s)).toEqual([3, 3, 3]);
    expect(stray.state).not.toBe("running");
  }
});

test("the way out keeps its delay when the group leaves the configuration meanwhile", async () => {
  const s = new Stage();
  const old = first(
    s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 3_600 }),
  );
  s.group({ name: "api", ...three });
  const daemon = await s.start();
  s.world.rebalance(old);
  await inService(s);
  delete s.groups.web;
  daemon.ctx.state.config = s.config();
  void maxgroup.checkGroups(daemon.ctx);
  await s.seconds(3_000);
  expect(s.world.instance(old).group).toBe("web");
  await s.quiet(3_600);
  s.check([old], { web: [3, 5, 3] });
});

test("of two installations in one region neither hurries the other's replacements", async () => {
  const s = new Stage();
  s.group({ name: "api", ...three });
  const others = s.config();
  const queues = s.world.createQueues("others-");
  others.global.interruption_evt_sqs.queue_url = queues.interruption;
  others.global.detach_evt_sqs.queue_url = queues.detach;
  others.global.termination_evt_sqs.queue_url = queues.termination;
  s.groups = {};
  const old = first(
    s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 3_600 }),
  );
  await s.start();
  await s.start({ config: others });
  s.world.rebalance(old);
  await s.seconds(3_000);
  expect(s.world.instance(old).group).toBe("web");
  await s.quiet(3_600);
  s.check([old], { web: [3, 5, 3] });
});

test("a configuration whose text never comes does not hold up the refresh for ever", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  const { ctx } = await s.start();
  const transformToString = () => new Promise(() => undefined);
  ctx.deps.s3.send = (async () => ({ Body: { transformToString } })) as unknown as typeof ctx.deps.s3.send;
  let isOver = false;
  void maxgroup.refresh(ctx, { b: "bucket", t: false, v: false }).then(() => {
    isOver = true;
  });
  await s.until(() => isOver, 120);
  expect(s.lines.at(-1)).toContain("the last good one stays");
});

test("what stands in the way of a raised maximum is said at the start: a full row of tags, a warm pool that grows with it", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three });
  s.group({ name: "api", ...three });
  const web = s.world.autoscaling.groups.get("web");
  if (web) web.warmPool = { MinSize: 0 };
  for (let n = 0; n < 49; n++) web?.tags.set(`tag${n}`, { value: "", propagate: false });
  const api = s.world.autoscaling.groups.get("api");
  if (api) api.warmPool = { MaxGroupPreparedCapacity: 4 };
  for (let n = 0; n < 48; n++) api?.tags.set(`tag${n}`, { value: "", propagate: false });
  for (let n = 0; n < 5; n++) api?.tags.set(`aws:tag${n}`, { value: "", propagate: false });
  await s.start();
  const warned = s.lines.filter((line) => line.startsWith("WARN"));
  expect(warned).toEqual([expect.stringMatching(/web has 49 tags/), expect.stringMatching(/warm pool of web/)]);
});

test("dry runs: a group whose template is gone keeps no other from being asked for, and real launches go first", async () => {
  const s = new Stage();
  s.group({ name: "api", ...three, types: ["m5.large"] });
  const old = first(s.group({ name: "web", ...three }));
  const { ctx } = await s.start();
  const asked: number[] = [];
  s.world.intercept = ({ operation, input }) => {
    if ((input as { DryRun?: boolean }).DryRun) asked.push(s.clock.now());
    const isApi = operation === "DescribeLaunchTemplateVersions" && JSON.stringify(input).includes(templateOf("api"));
    return isApi ? { before: new AwsError("InvalidLaunchTemplateId.NotFound", "gone") } : undefined;
  };
  const templateOf = (name: string) => s.world.autoscaling.groups.get(name)?.template?.LaunchTemplateId ?? "none";
  await s.seconds(70); // what was read at the start is remembered for a minute
  s.world.interrupt(old);
  await s.until(() => ctx.state.inHand.size > 0, 30);
  void maxgroup.checkPermissions(ctx);
  await s.until(() => ctx.state.inHand.size === 0, 120);
  expect(asked).toEqual([]);
  await s.seconds(30);
  expect(asked.length).toBe(2);
  expect(s.lines.some((line) => /^WARN.* api .*gone/.test(line))).toBe(true);
});

test("one whose settled replacement is still draining is replaced anew, and desired stays", async () => {
  const s = new Stage({ drainMs: 300_000 });
  const old = first(
    s.group({ name: "web", min: 3, max: 9, desired: 3, targetGroups: ["tg"] }, { is_to_handle_rebalance_event: true }),
  );
  await s.start();
  s.world.rebalance(old);
  const claim = await inService(s);
  // The minimum has the last word: both stay.
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 3_600);
  s.world.interrupt(claim);
  await s.until(() => s.world.autoscaling.groups.get("web")?.members.get(claim)?.state === "Detaching", 120);
  s.world.interrupt(old);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([4, 9, 4]);
  expect(s.lines.filter((line) => line.includes("without a replacement in service"))).toEqual([]);
});

test("an alternative type that the group offers itself is asked for once in the dry run", async () => {
  const s = new Stage();
  s.group({ name: "web", ...three, types: ["m5.large"] }, { alt1: "m5.large", alt2: "m5a.large" });
  const { ctx } = await s.start();
  const asked: string[][] = [];
  s.world.intercept = ({ operation, input }) => {
    const { DryRun, LaunchTemplateConfigs = [] } = input as CreateFleetCommandInput;
    if (operation === "CreateFleet" && DryRun)
      asked.push(LaunchTemplateConfigs.flatMap((c) => c.Overrides ?? []).map((o) => o.InstanceType ?? ""));
    return undefined;
  };
  void maxgroup.checkPermissions(ctx);
  await s.seconds(10);
  expect(asked).toEqual([["", "m5a.large"]]); // the first is the template's own
});

test("a surplus that another daemon settles while its end waits for an attach stays", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group({ name: "web", min: 3, max: 9, desired: 3 }, { detaching_delay_seconds: 80 });
  await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [old] });
  let isHeld = true;
  s.world.intercept = ({ operation }) => (operation === "AttachInstances" && isHeld ? { hang: true } : undefined);
  s.world.interrupt(other);
  await s.seconds(60);
  // The minimum has refused another daemon the end.
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  const Tags = [{ Key: "spotmax:attached", Value: "2026-01-01T00:01:00.000Z" }];
  await s.call("ec2", "CreateTags", { Resources: [claim], Tags });
  isHeld = false;
  await s.quiet();
  expect(s.world.instance(claim).state).toBe("running");
  expect(sizes(s)).toEqual([4, 9, 4]);
});

test("an old one that somebody takes out while there is no capacity is replaced by its group, and not by us as well", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, types: ["m5.large", "m4.large"] }, { is_enable_od_fallback: false }));
  const pools = ["m5.large", "m4.large"].flatMap((type) =>
    [..."abc"].map((zone) => s.world.pool("spot", type, `us-east-1${zone}`)),
  );
  for (const pool of pools) pool.capacity = 0;
  await s.start();
  s.world.interrupt(old);
  await s.seconds(30);
  await s.call("autoscaling", "EnterStandby", {
    AutoScalingGroupName: "web",
    InstanceIds: [old],
    ShouldDecrementDesiredCapacity: false,
  });
  await s.seconds(15);
  for (const pool of pools) pool.capacity = 9;
  await s.quiet();
  const ours = [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces"));
  expect([ours.length, sizes(s)]).toEqual([0, [3, 5, 3]]);
  expect(s.lines.filter((line) => line.startsWith("ERRO"))).toEqual([]);
  expect(s.lines.filter((line) => line.includes("it has left web meanwhile: none is launched"))).toHaveLength(1);
});

test("a batch has one order: what one of it shows is the order of all", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group({ name: "web", min: 1, max: 9, desired: 3, zones: ["us-east-1a"] });
  const daemon = await s.start();
  for (const id of [old, other]) s.world.interrupt(id, { withoutReclaim: true });
  await s.until(() => s.openClaims().length === 2, 60);
  await s.seconds(1);
  const claims = s.openClaims().sort();
  const orders = () => claims.map((id) => s.world.instance(id).tags.get("spotmax:order"));
  expect(orders()).toEqual([claims.join(" "), claims.join(" ")]);
  daemon.kill();
  // As a describe that lags shows the one of them.
  s.world.instance(claims[1] ?? "").tags.delete("spotmax:order");
  await s.seconds(40);
  await s.start();
  await s.quiet();
  expect(orders()).toEqual([claims.join(" "), claims.join(" ")]);
});

test("one that is in service long after its replacement was settled is owed one of its own at its next notice", async () => {
  for (const why of ["the minimum kept it", "it was attached once more"]) {
    const s = new Stage();
    const delays = { preaction_detach_delay_seconds: 60, preaction_termination_delay_seconds: 3_600 };
    const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { is_to_handle_rebalance_event: true, ...delays }));
    await s.start();
    s.world.rebalance(old);
    const claim = await inService(s);
    const setMinimum = (MinSize: number) =>
      s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize });
    if (why === "the minimum kept it") await setMinimum(4);
    await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 3_600);
    if (why === "the minimum kept it") await setMinimum(1);
    else {
      await s.until(() => s.world.instance(old).group === undefined, 60);
      await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [old] });
    }
    await s.seconds(900);
    expect([why, sizes(s)]).toEqual([why, [1, 9, 4]]);
    s.world.interrupt(old);
    await s.quiet(3_600);
    expect([why, sizes(s), s.least("web") >= 3]).toEqual([why, [1, 9, 4], true]);
    expect(s.world.autoscaling.groups.get("web")?.members.size).toBe(4);
  }
});

test("one that is let go without decrement, while its group's activities lag, does not take its replacement along", async () => {
  const s = new Stage({ pendingMs: [116_000, 116_000] });
  const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }));
  await s.start();
  lagActivities(s, 8_000);
  s.world.interrupt(old);
  const [claim] = await s.until(() => s.openClaims().length > 0, 60).then(() => s.openClaims());
  await s.until(() => s.world.audit.some((a) => a.what === "attach" && a.ids.includes(claim ?? "")), 180);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([1, 6, 3]);
});

test("a notice of a replacement just settled, which its group does not show yet as a member, is not dropped", async () => {
  for (let seed = 1; seed <= 12; seed++) {
    const s = new Stage({ seed, staleMs: 12_000, attachMs: [1_000, 1_000] });
    const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 0 }));
    await s.start();
    s.world.interrupt(old);
    const settled = () => [...s.world.ec2.instances.values()].find((i) => i.tags.has("spotmax:attached"))?.id;
    await s.until(() => settled() !== undefined, 120);
    const claim = settled() ?? "";
    s.world.interrupt(claim);
    await s.quiet(3_600);
    const next = [...s.world.ec2.instances.values()].filter((i) => i.tags.get("spotmax:replaces") === claim);
    expect([seed, next.length, s.least("web")]).toEqual([seed, 1, 3]);
  }
});

test("a weighted replacement whose old one has left meanwhile finds room below a maximum that is no multiple", async () => {
  const s = new Stage();
  const weights = { "m5.large": 2, "m5a.large": 2, "m4.large": 2 };
  const old = first(s.group({ name: "web", min: 2, max: 7, desired: 6, weights }));
  const daemon = await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 60);
  daemon.kill();
  const [claim = ""] = s.openClaims();
  await s.call("ec2", "TerminateInstances", { InstanceIds: [old] });
  await s.until(() => s.world.instance(old).group === undefined, 120);
  await s.start();
  const attached = () => s.world.audit.some((a) => a.what === "attach" && a.ids.includes(claim));
  await s.until(attached, 120);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([2, 7, 6]);
});

test("one that EC2 does not show for a moment is neither taken for gone nor left running", async () => {
  for (const notice of ["interrupt", "rebalance"] as const) {
    const s = new Stage();
    const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
    await s.start();
    let hiddenUntilMs = s.clock.now() + 5_000;
    const { DescribeInstances: describe } = s.world.ec2.operations;
    const lagging = (input: never) => {
      const answer = describe?.(input, {}) as { Reservations: { Instances: { InstanceId: string }[] }[] };
      if (s.clock.now() > hiddenUntilMs) return answer;
      const Reservations = answer.Reservations.filter((r) => !r.Instances.some((i) => i.InstanceId === old));
      return { ...answer, Reservations };
    };
    Object.assign(s.world.ec2.operations, { DescribeInstances: lagging });
    s.world[notice](old, { withoutReclaim: true });
    await s.until(() => s.world.audit.some((a) => a.what === "detach"), 600);
    await s.until(() => s.world.queueDepth(s.queues.termination).delayed > 0, 60);
    await s.until(() => s.world.queueDepth(s.queues.termination).delayed === 0, 600);
    hiddenUntilMs = s.clock.now() + 5_000;
    await s.quiet();
    s.check([old], { web: [3, 5, 3] });
    expect([notice, s.world.instance(old).state]).not.toEqual([notice, "running"]);
  }
});

test("where the last of a chain has died, its group's substitute is to serve before the first old one goes", async () => {
  const s = new Stage({ pendingMs: [6_000, 6_000] });
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { detaching_delay_seconds: 0 }));
  await s.start();
  let isHeld = true;
  s.world.intercept = ({ operation, input }) =>
    isHeld && operation === "DetachInstances" && (input as { InstanceIds: string[] }).InstanceIds.includes(old)
      ? { before: new AwsError("ResourceContention", "busy", 500) }
      : undefined;
  s.world.interrupt(old, { withoutReclaim: true });
  const one = await inService(s);
  s.world.interrupt(one, { withoutReclaim: true });
  const members = s.world.autoscaling.groups.get("web")?.members;
  await s.until(() => !members?.has(one), 90);
  const two = await inService(s, [one]);
  s.world.delays.pendingMs = [25_000, 25_000];
  await s.call("ec2", "TerminateInstances", { InstanceIds: [two] });
  await s.until(() => !members?.has(two), 60);
  isHeld = false;
  await s.until(() => !members?.has(old), 90);
  const inServiceNow = [...(members?.values() ?? [])].filter(({ state }) => state === "InService");
  expect(inServiceNow).toHaveLength(3);
});

test("a maximum that somebody has just lowered, and that a describe shows as it was, ends no replacement", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 3, max: 9, desired: 3 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().some((id) => s.world.instance(id).state === "running"), 60);
  const [claim = ""] = s.openClaims();
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MaxSize: 3 });
  const untilMs = s.clock.now() + 5_000;
  const { DescribeAutoScalingGroups: describe } = s.world.autoscaling.operations;
  const lagging = (input: never) => {
    const answer = describe?.(input, {}) as { AutoScalingGroups: { MaxSize: number }[] };
    if (s.clock.now() < untilMs) for (const g of answer.AutoScalingGroups) g.MaxSize = 9;
    return answer;
  };
  Object.assign(s.world.autoscaling.operations, { DescribeAutoScalingGroups: lagging });
  await s.quiet(3_600);
  expect(s.world.instance(claim).group).toBe("web");
  s.check([old], { web: [3, 3, 3] });
});

test("a notice in hand goes up the ladder again, though its group has left the configuration since", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  s.group({ name: "api", ...three });
  const daemon = await s.start();
  let deaths = 0;
  s.world.ec2.dieWhilePending = () =>
    ++deaths === 1 ? { Code: "Client.InternalError", Message: "Client error on launch" } : undefined;
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 30);
  delete s.groups.web;
  daemon.ctx.state.config = s.config();
  void maxgroup.checkGroups(daemon.ctx);
  await s.quiet(3_600);
  s.check([old], { web: [3, 5, 3] }, { launches: 2 });
});

test("what a daemon that died has begun without a deadline is finished by the next one, though its group is out by then", async () => {
  const on = { is_to_handle_rebalance_event: true, is_to_handle_maintenance_event: true };
  for (const kind of ["rebalance", "maintenance"])
    for (const last of ["launch", "attach"]) {
      const s = new Stage();
      const old = first(s.group({ name: "web", ...three }, on));
      s.group({ name: "api", ...three });
      const daemon = await s.start();
      if (kind === "rebalance") s.world.rebalance(old);
      else s.world.healthEvent([old]);
      await s.until(() => s.world.audit.some((a) => a.what === last), 60);
      daemon.kill();
      delete s.groups.web;
      await s.start();
      await s.quiet(3_600);
      s.check([old], { web: [3, 5, 3] }, { launches: 1 });
    }
});

test("a daemon that dies right after its detach leaves it to the message, which knows that the old one was protected", async () => {
  for (const visibility_timeout_seconds of [61, 200]) {
    const s = new Stage();
    const old = first(s.group({ name: "web", ...three }));
    await protect(s, old);
    const config = s.config();
    config.global.detach_evt_sqs.visibility_timeout_seconds = visibility_timeout_seconds;
    const daemon = await s.start({ config });
    s.world.intercept = ({ operation }) => {
      if (operation === "DetachInstances") daemon.kill();
      return undefined;
    };
    s.world.interrupt(old);
    await s.until(() => s.world.audit.some((a) => a.what === "detach"), 300);
    s.world.intercept = undefined;
    const claim = first(s.openClaims());
    await s.start({ config });
    await s.quiet(3_600);
    const isProtected = s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected;
    expect([visibility_timeout_seconds, isProtected]).toEqual([visibility_timeout_seconds, true]);
  }
});

test("one protected by hand hands that on, though its replacement is never protected beside it", async () => {
  const s = new Stage();
  const [old = "", other = ""] = s.group({ name: "web", ...three }, { detaching_delay_seconds: 0 });
  await protect(s, old);
  await s.start();
  for (const id of [old, other]) s.world.interrupt(id);
  await s.quiet();
  const members = s.world.autoscaling.groups.get("web")?.members;
  expect([old, other].map((id) => members?.get(claimOf(s, id))?.protected)).toEqual([true, false]);
});

test("how an old one left once is not how it leaves after somebody has attached it again", async () => {
  const s = new Stage();
  const delays = { preaction_detach_delay_seconds: 60, preaction_termination_delay_seconds: 3_600 };
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { is_to_handle_rebalance_event: true, ...delays }));
  await s.start();
  // The first claim is settled late: so it is asked how the old one has left.
  let isRefused = true;
  s.world.intercept = ({ operation, input }) =>
    isRefused && operation === "CreateTags" && JSON.stringify(input).includes("spotmax:attached")
      ? { before: new AwsError("InternalError", "internal", 500) }
      : undefined;
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "detach"), 300);
  await s.seconds(60);
  isRefused = false;
  await s.until(() => s.openClaims().length === 0, 300);
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [old] });
  await s.seconds(900);
  expect(sizes(s)).toEqual([1, 9, 4]);
  s.world.rebalance(old);
  await inService(s);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [old] });
  await s.quiet(3 * 3_600);
  expect([sizes(s), s.world.autoscaling.groups.get("web")?.members.size]).toEqual([[1, 9, 4], 4]);
});

test("a detach message that is lost is sent once more, and knows that the old one was protected", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  await protect(s, old);
  await s.start();
  s.world.rebalance(old);
  // Its message is answered, and lost.
  const { SendMessageBatch: send } = s.world.sqs.operations;
  s.world.sqs.operations.SendMessageBatch = (input: { QueueUrl: string; Entries: { Id: string }[] }, context) =>
    input.QueueUrl === s.queues.detach
      ? { Successful: input.Entries.map(({ Id }) => ({ Id, MessageId: Id, MD5OfMessageBody: "" })), Failed: [] }
      : (send?.(input as never, context) ?? {});
  await s.seconds(60);
  Object.assign(s.world.sqs.operations, { SendMessageBatch: send });
  await s.quiet(3_600);
  const members = s.world.autoscaling.groups.get("web")?.members;
  expect([sizes(s), members?.has(old)]).toEqual([[3, 5, 3], false]);
  expect([...(members?.values() ?? [])].filter((m) => m.protected).length).toBe(1);
});

test("a daemon dies after its attach, and the replacement before the next one comes: the old one goes all the same", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }, { is_to_handle_rebalance_event: true }));
  const daemon = await s.start();
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  daemon.kill();
  const claim = first(s.openClaims());
  await s.until(() => s.world.autoscaling.groups.get("web")?.members.get(claim)?.state === "InService", 60);
  s.world.ec2.terminate(s.world.instance(claim), "Client.UserInitiatedShutdown: by hand");
  await s.seconds(5);
  await s.start();
  await s.until(() => s.world.instance(old).group === undefined, 240);
  await s.quiet(3_600);
  await s.seconds(900);
  expect(sizes(s)).toEqual([1, 6, 3]);
});

test("a settled replacement that died, and was substituted, stands for nobody beside whom it stayed", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { is_to_handle_rebalance_event: true }));
  await s.start();
  s.world.rebalance(old);
  const claim = await inService(s);
  const setMinimum = (MinSize: number) =>
    s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize });
  await setMinimum(4);
  await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 3_600);
  s.world.ec2.terminate(s.world.instance(claim), "Client.UserInitiatedShutdown: by hand");
  await s.seconds(300);
  await setMinimum(1);
  s.world.interrupt(old);
  await s.quiet(3_600);
  expect([sizes(s), s.world.autoscaling.groups.get("web")?.members.size]).toEqual([[1, 9, 4], 4]);
});

test("a replacement that is gone is made up for though AWS forgets it long before the first one is let go", async () => {
  for (const end of ["interrupted", "ended", "ended, and its tags are soon gone"]) {
    const s = new Stage();
    const delays = { preaction_detach_delay_seconds: 7_200 };
    const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }, { is_to_handle_rebalance_event: true, ...delays }));
    await s.start();
    s.world.rebalance(old);
    const claim = await inService(s);
    await s.seconds(120);
    if (end === "interrupted") s.world.interrupt(claim);
    else s.world.ec2.terminate(s.world.instance(claim), "Client.UserInitiatedShutdown: by hand");
    if (end.includes("tags")) s.world.after(600_000, () => s.world.instance(claim).tags.clear());
    await s.seconds(7_500);
    await s.quiet(3_600);
    expect([end, s.world.instance(old).group, sizes(s), s.least("web")]).toEqual([end, undefined, [1, 6, 3], 3]);
  }
});

test("one that was let go, attached once more, and taken out by its owner is his own, and uses up no limit", async () => {
  const s = new Stage();
  const delays = { preaction_detach_delay_seconds: 60, preaction_termination_delay_seconds: 60 };
  const [old = "", other = ""] = s.group(
    { name: "web", min: 1, max: 9, desired: 3 },
    { is_to_handle_rebalance_event: true, ...delays },
  );
  await s.start();
  s.world.rebalance(old);
  await s.until(() => s.world.instance(old).tags.has("spotmax:detached"), 300);
  await s.until(() => s.world.instance(old).group === undefined, 60);
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [old] });
  await s.seconds(1_800);
  // At its next notice its owner takes it out, to look at it.
  s.world.rebalance(old);
  await s.until(() => s.openClaims().length > 0, 60);
  await s.seconds(30);
  const out = { AutoScalingGroupName: "web", InstanceIds: [old], ShouldDecrementDesiredCapacity: true };
  await s.call("autoscaling", "DetachInstances", out);
  await s.quiet(3_600);
  await s.seconds(600);
  s.world.rebalance(other);
  await s.quiet(3_600);
  expect([s.world.instance(old).state, s.world.instance(other).group]).toEqual(["running", undefined]);
});

test("members of somebody else's group are nobody's rivals, whatever their tags say", async () => {
  const s = new Stage();
  s.group({ name: "web", min: 3, max: 5, desired: 3 });
  const { instanceIds } = s.world.createGroup({ name: "other", min: 1, max: 4, desired: 3 });
  for (const id of instanceIds)
    s.world.instance(id).tags.set("spotmax:replaces", "i-0123456789abcdef0").set("spotmax:group", "web");
  await s.start();
  await s.seconds(1_800);
  const other = s.world.autoscaling.groups.get("other");
  expect([other?.desired, [...(other?.members.keys() ?? [])]]).toEqual([3, instanceIds]);
});

test("without a hard deadline a replacement that never gets healthy is told, and the old one stays until it is", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three, targetGroups: ["web-a"] }, { is_to_handle_rebalance_event: true }));
  const web = s.world.autoscaling.groups.get("web");
  web?.suspended.add("AddToLoadBalancer");
  await s.start();
  s.world.rebalance(old);
  await s.seconds(1_800);
  const told = s.lines.filter((line) => /^WARN.*AddToLoadBalancer.*registered by hand/.test(line));
  expect(told.length).toBeWithin(2, 6);
  expect(web?.members.get(old)?.state).toBe("InService");
  for (const arn of web?.targetGroupArns ?? []) s.world.elbv2.register(arn, first(s.openClaims()));
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a replacement that is one too many goes within half a minute, before anything else can take it", async () => {
  const s = new Stage({ replaceMs: [2_000, 2_000], pendingMs: [5_000, 5_000], attachMs: [1_000, 1_000] });
  const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [old] }); // its group substitutes it
  const web = s.world.autoscaling.groups.get("web");
  const serving = () => [...(web?.members.values() ?? [])].filter(({ state }) => state === "InService").length;
  await s.until(() => web?.members.get(old)?.state !== "InService", 60);
  await s.until(() => serving() > 3, 60);
  await s.until(() => serving() === 3, 30);
  expect(web?.members.get(claim)?.state).not.toBe("InService");
  await s.quiet();
  s.check([old], { web: [3, 5, 3] }, { dips: true });
});

test("whom AZRebalance takes, old one or replacement, its group has substituted, though AWS says that it shrinks", async () => {
  for (const who of ["old", "replacement"]) {
    const s = new Stage();
    const on = { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 600 };
    const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3, suspended: ["AZRebalance"] }, on));
    await s.start();
    s.world.rebalance(old);
    const claim = await inService(s);
    await s.until(() => s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected === true, 60);
    const taken = who === "old" ? old : claim;
    const members = s.world.autoscaling.groups.get("web")?.members ?? new Map<string, { protected: boolean }>();
    // Its zone gets two more than the others have, for as long as that takes.
    const web = { AutoScalingGroupName: "web" };
    const InstanceIds = [1, 2].map(() => s.world.createInstance({ zone: s.world.instance(taken).zone }).id);
    await s.call("autoscaling", "AttachInstances", { ...web, InstanceIds });
    for (const [id, member] of members) member.protected = id !== taken;
    await s.call("autoscaling", "ResumeProcesses", { ...web, ScalingProcesses: ["AZRebalance"] });
    await s.until(() => !members.has(taken), 300);
    await s.call("autoscaling", "DetachInstances", { ...web, InstanceIds, ShouldDecrementDesiredCapacity: true });
    await s.quiet(3_600);
    expect([who, sizes(s), members.size, s.least("web")]).toEqual([who, [1, 9, 3], 3, 3]);
  }
});

test("a notice whose first message is slow to be deleted uses up its group's limit all the same", async () => {
  const s = new Stage();
  const on = { is_to_handle_rebalance_event: true };
  const [one = "", two = ""] = s.group({ name: "web", min: 3, max: 9, desired: 3 }, on);
  await s.start();
  const slow: Record<string, number> = { CreateFleet: 8_000, DeleteMessageBatch: 2_000 };
  s.world.intercept = ({ operation }) => ({ delayMs: slow[operation] ?? 0 });
  s.world.rebalance(one);
  await s.seconds(3);
  s.world.rebalance(two);
  await s.seconds(16);
  const replaced = [...s.world.ec2.instances.values()].flatMap((i) => i.tags.get("spotmax:replaces") ?? []);
  expect(replaced).toEqual([one]);
});

test("a replacement stays protected as its old one was, however near the detach is when it comes", async () => {
  for (const attach of ["after the detach message", "seconds before the deadline"]) {
    const isLast = attach === "seconds before the deadline";
    const s = new Stage(isLast ? { pendingMs: [111_500, 111_500], attachMs: [5_000, 5_000] } : {});
    const old = first(s.group({ name: "web", ...three }, { detaching_delay_seconds: 0 }));
    await protect(s, old);
    await s.start();
    s.world.interrupt(old);
    await s.until(() => s.openClaims().length === 1, 60);
    const claim = first(s.openClaims());
    await s.quiet();
    expect([attach, s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected]).toEqual([attach, true]);
  }
});

test("a replacement that is attached as it grows too old to be left outside is not ended as a leak", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }));
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length === 1, 60);
  const claim = first(s.openClaims());
  const web = { AutoScalingGroupName: "web", ScalingProcesses: ["Launch"] };
  await s.call("autoscaling", "SuspendProcesses", web);
  await s.until(() => s.clock.now() > s.world.instance(claim).launchedAtMs + 590_000, 700);
  hide(s, claim, 20_000);
  await s.call("autoscaling", "ResumeProcesses", web);
  await s.until(() => s.world.audit.some((a) => a.what === "attach" && a.ids.includes(claim)), 60);
  await s.seconds(20);
  expect([s.world.instance(claim).state, s.world.instance(claim).group]).toEqual(["running", "web"]);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([1, 6, 3]);
});

test("a replacement that has a notice before it is settled hands on what it is left with", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  await protect(s, old);
  await s.start();
  s.world.interrupt(old);
  const one = await inService(s);
  s.world.rebalance(one); // and is too young for another ten minutes
  await s.until(() => s.openClaims().some((id) => id !== one), 1_200);
  const two = first(s.openClaims());
  await s.quiet();
  expect(s.world.autoscaling.groups.get("web")?.members.get(two)?.protected).toBe(true);
});

test("a member that its group does not show for a moment is no stranger", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  hide(s, old, 6_000);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a replacement that protects itself, minutes after it was settled, stays so", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }));
  await s.start();
  s.world.interrupt(old);
  const claim = await inService(s);
  await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 300);
  await s.seconds(150);
  await protect(s, claim);
  await s.quiet();
  await s.seconds(600);
  expect(s.world.autoscaling.groups.get("web")?.members.get(claim)?.protected).toBe(true);
});

test("a notice that waits for its turn is judged afresh: its group may be out by then, or the option off", async () => {
  for (const change of ["out", "off"]) {
    const s = new Stage();
    const on = { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 600 };
    const [one = "", two = ""] = s.group({ name: "web", min: 1, max: 9, desired: 3 }, on);
    s.group({ name: "api", ...three });
    const daemon = await s.start();
    s.world.rebalance(one);
    await inService(s);
    s.world.rebalance(two);
    await s.seconds(30);
    if (change === "out") delete s.groups.web;
    else s.groups.web = { ...on, is_to_handle_rebalance_event: false };
    daemon.ctx.state.config = s.config();
    void maxgroup.checkGroups(daemon.ctx);
    await s.quiet(3_600);
    const replaced = [...s.world.ec2.instances.values()].flatMap((i) => i.tags.get("spotmax:replaces") ?? []);
    expect([change, replaced, s.world.instance(one).group]).toEqual([change, [one], undefined]);
  }
});

test("a replacement whose own notice comes as it is attached is ended by nobody, though it does not show as a member", async () => {
  for (const daemons of [1, 2]) {
    const s = new Stage();
    const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }));
    for (let n = 0; n < daemons; n++) await s.start();
    s.world.interrupt(old);
    await s.until(() => s.openClaims().length === 1, 60);
    const claim = first(s.openClaims());
    hide(s, claim, 70_000);
    await s.until(() => s.world.audit.some((a) => a.what === "attach" && a.ids.includes(claim)), 60);
    s.world.interrupt(claim, { duplicates: 3 });
    await s.seconds(75);
    expect([daemons, s.world.instance(claim).state, s.world.instance(claim).group]).toEqual([daemons, "running", "web"]);
    await s.quiet(3_600);
    expect([daemons, sizes(s)]).toEqual([daemons, [1, 6, 3]]);
  }
});

test("a replacement that is one too many, and has none of its own, takes one from desired as it goes", async () => {
  const s = new Stage({ replaceMs: [2_000, 2_000] });
  const delays = { detaching_delay_seconds: 90 };
  const old = first(s.group({ name: "web", min: 1, max: 5, desired: 3 }, { is_enable_od_fallback: false, ...delays }));
  const pools = ["m5.large", "m5a.large", "m4.large"].flatMap((type) =>
    [..."abc"].map((zone) => s.world.pool("spot", type, `us-east-1${zone}`)),
  );
  await s.start();
  s.world.interrupt(old, { keepCapacity: true });
  const claim = await inService(s);
  // From here on there is nothing to be had, not for its group either, which is to substitute the old one.
  const offer = (capacity: number) => pools.map((pool) => Object.assign(pool, { capacity }));
  offer(0);
  await s.call("ec2", "TerminateInstances", { InstanceIds: [old] });
  await s.until(() => s.world.instance(old).group === undefined, 60);
  offer(0); // not even its own place
  s.world.interrupt(claim, { keepCapacity: true });
  await s.until(() => s.world.instance(claim).group === undefined, 130);
  offer(9);
  await s.seconds(120);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([1, 5, 3]);
});

test("without a hard deadline a replacement that has just died as a member is waited for, until its group substitutes it", async () => {
  const s = new Stage({ healthyMs: [1e9, 1e9], replaceMs: [60_000, 60_000] });
  const on = { is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 60 };
  const old = first(s.group({ name: "web", min: 1, max: 5, desired: 3, targetGroups: ["tg"] }, on));
  await s.start();
  s.world.rebalance(old);
  const claim = await inService(s);
  await s.seconds(480);
  expect(s.world.instance(old).group).toBe("web");
  await s.call("ec2", "TerminateInstances", { InstanceIds: [claim] });
  await s.until(() => s.world.instance(old).group === undefined, 180);
  await s.quiet(3_600);
  expect(sizes(s)).toEqual([1, 5, 3]);
});

test("an old one that its group takes in the second of its detach, while its activities lag, is known as substituted", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", min: 1, max: 6, desired: 3 }));
  await s.start();
  lagActivities(s, 8_000);
  // As AZRebalance does: another one comes in its place.
  const taken = { InstanceId: old, ShouldDecrementDesiredCapacity: false };
  let isTaken = false;
  s.world.intercept = ({ operation }) => {
    if (operation !== "DetachInstances" || isTaken) return undefined;
    isTaken = true;
    void s.world.call("autoscaling", "TerminateInstanceInAutoScalingGroup", taken);
    return { delayMs: 1_000 };
  };
  s.world.interrupt(old);
  await s.quiet(3_600);
  expect([isTaken, sizes(s)]).toEqual([true, [1, 6, 3]]);
});

test("a notice that waits for its turn goes when its group is deleted", async () => {
  const s = new Stage();
  const old = first(s.group({ name: "web", ...three }, { is_to_handle_rebalance_event: true }));
  s.group({ name: "api", ...three });
  const daemon = await s.start();
  s.world.instance(old).launchedAtMs = s.clock.now();
  s.world.rebalance(old);
  await s.seconds(30);
  await s.call("autoscaling", "DeleteAutoScalingGroup", { AutoScalingGroupName: "web", ForceDelete: true });
  await s.until(() => !s.world.autoscaling.groups.has("web"), 300);
  void maxgroup.checkGroups(daemon.ctx);
  await s.quiet();
});

test("the replacement of a rival that went is one too many beside the other one", async () => {
  const s = new Stage({ pendingMs: [6_000, 6_000] });
  const old = first(s.group({ name: "web", min: 1, max: 9, desired: 3 }, { detaching_delay_seconds: 60 }));
  await s.start();
  s.world.interrupt(old);
  const one = await inService(s);
  // Another daemon has launched one as well, and taken the first for lost before it saw it as a member.
  const tags = { "spotmax:group": "web", "spotmax:replaces": old };
  const rival = s.world.createInstance({ tags, ageSeconds: 10 });
  s.world.instance(one).tags.set("spotmax:lost", "2026-01-01T00:00:10.000Z");
  s.world.interrupt(one, { withoutReclaim: true });
  await s.until(() => s.openClaims().length === 3, 60);
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [rival.id] });
  await s.quiet(3_600);
  expect([sizes(s), rival.group]).toEqual([[1, 9, 3], "web"]);
});

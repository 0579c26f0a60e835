// Stories of groups whose nodes are drained: what a cluster does, or fails to do, and what must hold all the same.
import { expect, test } from "bun:test";
import { checkGroups, MARK } from "../../maxgroup.ts";
import { EPOCH_MS } from "../aws/clock.ts";
import { type DaemonOptions, Stage } from "./harness.ts";
import { FakeKube, KUBECONFIG } from "./kube.ts";

const three = { name: "web", min: 3, max: 5, desired: 3 };
const PODS = 8;

function scene(options: object = {}, spec: object = {}) {
  const s = new Stage();
  const drained = { k8s_node_drain_option: true, k8s_config_file_path: KUBECONFIG, ...options };
  const ids = s.group({ ...three, ...spec }, drained);
  const [old = ""] = ids;
  const kube = new FakeKube(s);
  kube.populate(ids, PODS);
  /** When the audit first says so of this instance, in seconds from the notice; NaN: never. */
  const at = (what: string, id: string) => {
    const find = (w: string) =>
      s.world.audit.find((a) => a.what === w && a.ids.includes(w === "notice" ? old : id))?.atMs ?? Number.NaN;
    return (find(what) - find("notice")) / 1000;
  };
  const noticeMs = () => s.world.audit.find((a) => a.what === "notice")?.atMs ?? Number.NaN;
  const kubeAt = (what: string) => (kube.when(what) - noticeMs()) / 1000;
  const claim = () => [...s.world.ec2.instances.values()].find((i) => i.tags.has("spotmax:replaces"))?.id ?? "";
  return { s, kube, old, ids, at, kubeAt, claim };
}

test("a node is cordoned at once, and its pods go when the replacement's node is Ready and before the detach", async () => {
  const { s, kube, old, at, kubeAt, claim } = scene();
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kubeAt(`cordon ${old}`)).toBeLessThan(2);
  const launched = (s.world.instance(claim()).launchedAtMs - (s.world.audit.find((a) => a.what === "notice")?.atMs ?? 0)) / 1000;
  const [evicted, detached] = [kubeAt(`evict ${old}`), at("detach", old)];
  expect(evicted).toBeGreaterThanOrEqual(launched + kube.joinSeconds);
  expect(detached).toBeGreaterThanOrEqual(evicted + 5);
  expect(detached).toBeLessThan(90);
  expect(kube.podsOn(old)).toEqual([]);
  expect(kube.pods.length).toBe(2 * PODS);
});

test("a replacement that its target group takes for unhealthy until pods come does not block the drain", async () => {
  const { s, kube, old, at, kubeAt } = scene({}, { targetGroups: ["tg"] });
  for (const group of s.world.elbv2.groups.values()) group.broken = true;
  await s.start();
  s.world.interrupt(old);
  await s.until(() => kube.podsOn(old).length === 0, 115);
  expect(kubeAt(`evict ${old}`)).toBeLessThan(60);
  await s.until(() => !Number.isNaN(at("detach", old)), 115);
  expect(at("detach", old)).toBeLessThanOrEqual(115.5);
});

test("a replacement whose node never joins: the drain begins a minute before the deadline", async () => {
  const { s, kube, old, at, kubeAt } = scene();
  await s.start();
  kube.joinSeconds = 3_600;
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kubeAt(`evict ${old}`)).toBeWithin(58, 63);
  expect(at("detach", old)).toBeLessThan(80);
});

test("no replacement anywhere: its pods go a minute before the deadline, and it is detached in time", async () => {
  const { s, kube, old, at, kubeAt } = scene({ detaching_delay_seconds: 900 }, { types: ["m5.large"] });
  for (const zone of "abc")
    for (const lifecycle of ["spot", "on-demand"] as const) s.world.pool(lifecycle, "m5.large", `us-east-1${zone}`).capacity = 0;
  await s.start();
  s.world.interrupt(old);
  await s.seconds(130);
  expect(kubeAt(`evict ${old}`)).toBeWithin(58, 63);
  expect(at("detach", old)).toBeWithin(110, 115.5);
  expect(kube.podsOn(old)).toEqual([]);
});

test.each(["down", "frozen"] as const)(
  "a cluster that is %s delays neither the launch nor the detach beyond the deadline",
  async (state) => {
    const { s, kube, old, at, claim } = scene();
    await s.start();
    kube.state = state;
    s.world.interrupt(old);
    await s.quiet();
    s.check([old], { web: [3, 5, 3] });
    const sentMs = s.world.audit.find((a) => a.what === "notice")?.atMs ?? 0;
    expect((s.world.instance(claim()).launchedAtMs - sentMs) / 1000).toBeLessThan(3);
    expect(at("detach", old)).toBeLessThanOrEqual(115.5);
    expect(s.lines.some((line) => line.includes("could not be drained"))).toBe(true);
  },
);

test.each([
  ["while its replacement's node is waited for", 40, 3_600],
  ["while a budget holds its pods", 70, 20],
])(
  "an old one that AWS takes early, %s, is detached at once, before its group substitutes it",
  async (_, noticeSeconds, join) => {
    const { s, kube, old, at } = scene();
    kube.joinSeconds = join;
    for (const pod of kube.podsOn(old)) pod.isHeld = true;
    await s.start();
    s.world.interrupt(old, { noticeSeconds });
    await s.quiet();
    s.check([old], { web: [3, 5, 3] }, { dips: true });
    expect(at("detach", old)).toBeWithin(noticeSeconds, noticeSeconds + 9);
    expect(s.world.audit.filter((a) => a.what === "group launch")).toEqual([]);
  },
);

test("a cluster that comes back while there is time is drained then", async () => {
  const { s, kube, old, at } = scene();
  await s.start();
  kube.state = "down";
  s.world.interrupt(old);
  await s.seconds(90);
  kube.state = "up";
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kube.podsOn(old)).toEqual([]);
  expect(at("detach", old)).toBeLessThanOrEqual(115.5);
});

test("pods that a budget holds are not gone round, and the old one is detached five seconds before its deadline at the latest", async () => {
  const { s, kube, old, at } = scene();
  for (const pod of kube.podsOn(old).slice(0, 2)) pod.isHeld = true;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(at("detach", old)).toBeWithin(108, 115.5);
  expect(kube.podsOn(old).filter((pod) => pod.isEnding)).toEqual([]);
  expect(s.lines.some((line) => /these pods go down with .*\(a budget\)/.test(line))).toBe(true);
});

test("without a hard deadline the node is cordoned once the replacement is attached, and the drain has its grace seconds", async () => {
  const { s, kube, old, at, kubeAt, claim } = scene({ is_to_handle_rebalance_event: true, k8s_node_drain_grace_second: 60 });
  for (const pod of kube.podsOn(old).slice(0, 1)) pod.isHeld = true;
  await s.start();
  s.world.record("notice", [old]);
  s.world.rebalance(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kubeAt(`cordon ${old}`)).toBeGreaterThan(at("attach", claim()));
  const evicted = kubeAt(`evict ${old}`);
  expect(at("detach", old)).toBeWithin(evicted + 58, evicted + 75);
  // Copies take the message's place: it is never delivered so often that it would be a dead letter.
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(0);
});

test("without a hard deadline and without a cluster that answers it is detached after all that patience", async () => {
  const { s, kube, old, at } = scene({ is_to_handle_rebalance_event: true, k8s_node_drain_grace_second: 60 });
  await s.start();
  kube.state = "down";
  s.world.record("notice", [old]);
  s.world.rebalance(old);
  await s.quiet(3_600);
  s.check([old], { web: [3, 5, 3] });
  expect(at("detach", old)).toBeWithin(300, 480);
});

test("a notice that did not come true: its node is given back, unless somebody else had cordoned it", async () => {
  for (const theirs of [false, true]) {
    const { s, kube, old } = scene({ is_to_handle_rebalance_event: true });
    if (theirs) kube.node(old).spec.unschedulable = true;
    await s.start();
    s.world.rebalance(old);
    await s.until(() => MARK in kube.node(old).annotations, 120);
    // Its owner wants one more meanwhile, and so it stays beside its replacement.
    await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
    await s.seconds(1_500);
    expect(s.world.instance(old).group).toBe("web");
    expect(kube.podsOn(old).length).toBe(PODS);
    expect(kube.node(old).spec.unschedulable).toBe(theirs ? true : undefined);
    expect(kube.node(old).spec.taints).toBeUndefined();
    expect(kube.node(old).labels).toEqual({});
  }
});

test("a notice that did not come true while its group's option was switched off: its node is given back all the same", async () => {
  const { s, kube, old } = scene({ is_to_handle_rebalance_event: true });
  const d = await s.start();
  s.world.rebalance(old);
  await s.until(() => MARK in kube.node(old).annotations, 120);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  s.groups = { web: {} };
  d.ctx.state.config = s.config();
  void checkGroups(d.ctx);
  await s.seconds(1_500);
  expect(s.world.instance(old).group).toBe("web");
  expect(kube.node(old).spec.unschedulable).toBeUndefined();
});

test("a later notice for a member that stayed has a drain's time of its own", async () => {
  const { s, kube, old } = scene({ is_to_handle_rebalance_event: true, k8s_node_drain_grace_second: 60 });
  for (const pod of kube.podsOn(old).slice(0, 1)) pod.isHeld = true;
  await s.start();
  s.world.rebalance(old);
  await s.until(() => kube.when(`evict ${old}`) > 0, 200);
  const lost = { InstanceIds: s.openClaims() };
  const detach = { AutoScalingGroupName: "web", ShouldDecrementDesiredCapacity: true, ...lost };
  await s.call("autoscaling", "DetachInstances", detach);
  await s.call("ec2", "TerminateInstances", lost);
  await s.until(() => s.lines.some((line) => line.includes("the old one stays")), 500);
  expect(s.world.instance(old).group).toBe("web");
  kube.populate([old], PODS);
  const againMs = s.clock.now();
  s.world.rebalance(old);
  await s.quiet();
  const evicted = kube.changes.filter((c) => c.what.startsWith(`evict ${old}`) && c.atMs > againMs);
  const detachedMs = s.world.audit.find((a) => a.what === "detach" && a.ids.includes(old))?.atMs ?? 0;
  expect((detachedMs - (evicted[0]?.atMs ?? 0)) / 1000).toBeWithin(55, 80);
});

test("a rehearsal that ended with the old one back in its group: another daemon gives its node back when it starts", async () => {
  const { s, kube, old, at } = scene();
  const first = await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.until(() => !Number.isNaN(at("detached", old)), 130);
  first.kill();
  await s.call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web", InstanceIds: [old] });
  await s.seconds(300);
  expect(kube.node(old).spec.unschedulable).toBe(true);
  await s.start();
  await s.seconds(130);
  expect(kube.node(old).spec.unschedulable).toBeUndefined();
});

test("a group that is not drained asks no cluster for anything", async () => {
  const { s, kube, old } = scene({ k8s_node_drain_option: false });
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  expect(kube.asked).toBe(0);
});

test("while nothing is drained a cluster is asked once a minute", async () => {
  const { s, kube } = scene();
  await s.start();
  await s.seconds(60);
  kube.asked = 0;
  await s.seconds(600);
  expect(kube.asked).toBeLessThanOrEqual(11);
});

test("where no cluster is known it is said at the start, and machines are replaced all the same", async () => {
  const { s, kube, old } = scene({ k8s_config_file_path: undefined });
  await s.start();
  expect(s.lines.filter((line) => /WARN.*no cluster is known.*-K FILE/.test(line)).length).toBe(1);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kube.asked).toBe(0);
});

test.each(["interruption", "rebalance"] as const)(
  "killed at any await after the notice (%s), its successor has the pods moved, and the old one detached in time",
  async (kind) => {
    const story = async (killAt: number | undefined) => {
      const { s, kube, old, at } = scene({ is_to_handle_rebalance_event: true });
      let awaits = 0;
      let isOut = false;
      let daemon: Awaited<ReturnType<Stage["start"]>> | undefined;
      const options: DaemonOptions = {
        level: "error",
        onAwait: () => {
          if (Number.isNaN(at("notice", old)) || !daemon || isOut) return;
          if (awaits++ !== killAt) return;
          daemon.kill();
          s.world.after(2_000, () => void s.spawn({ level: "error" }));
        },
      };
      daemon = await s.start(options);
      if (kind === "interruption") s.world.interrupt(old);
      else {
        s.world.record("notice", [old]);
        s.world.rebalance(old);
      }
      await s.until(() => !Number.isNaN(at("detach", old)), kind === "interruption" ? 125 : 900);
      isOut = true;
      const [detached, left] = [at("detach", old), kube.podsOn(old).length];
      await s.quiet();
      s.check([old], { web: [3, 5, 3] });
      const isInTime = kind === "rebalance" || detached <= 115.5;
      expect([killAt, kube.when(`cordon ${old}`) > EPOCH_MS, left, isInTime]).toEqual([killAt, true, 0, true]);
      return awaits;
    };
    const awaits = await story(undefined);
    for (let killAt = 0; killAt < awaits; killAt += Math.ceil(awaits / 250)) await story(killAt);
  },
);

test("two daemons that both hear of it move each pod once and lose none", async () => {
  const { s, kube, old, at } = scene();
  await s.start();
  await s.start({ skewMs: 1_500 });
  s.world.interrupt(old, { duplicates: 4 });
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kube.changes.filter((change) => change.what.startsWith("evict")).length).toBe(PODS);
  expect(kube.changes.filter((change) => change.what.startsWith("cordon")).length).toBe(1);
  expect(at("detach", old)).toBeLessThan(90);
});

test("a notice with a hard deadline that follows one without: the pods' time is the deadline's", async () => {
  const { s, kube, old, at } = scene({ is_to_handle_rebalance_event: true, k8s_node_drain_grace_second: 600 });
  for (const pod of kube.podsOn(old).slice(0, 1)) pod.isHeld = true;
  await s.start();
  s.world.rebalance(old);
  await s.seconds(90);
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(at("detach", old)).toBeLessThanOrEqual(115.5);
});

test("a list whose first page is empty is read to its end", async () => {
  const { s, kube, old } = scene();
  kube.emptyFirstPages = true;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect([kube.podsOn(old).length, kube.pods.length]).toEqual([0, 2 * PODS]);
});

test("a pod that may take longer than its node has left is given no more than that", async () => {
  const { s, kube, old, at, claim } = scene();
  const [slow] = kube.podsOn(old);
  if (slow) slow.graceSeconds = 600;
  kube.schedule = () => claim();
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kube.podsOn(claim()).length).toBe(PODS);
  expect(at("detach", old)).toBeLessThanOrEqual(115.5);
});

test("a replacement whose node somebody has cordoned is no place for pods", async () => {
  const { s, kube, old, kubeAt, claim } = scene();
  await s.start();
  s.world.interrupt(old);
  await s.until(() => claim() !== "", 30);
  kube.node(claim()).spec.unschedulable = true;
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(kubeAt(`evict ${old}`)).toBeWithin(58, 63);
});

test("a replacement whose node never joins is waited for five minutes after the detach delay, not after twice that", async () => {
  const { s, kube, old } = scene({ is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 900 });
  await s.start();
  kube.joinSeconds = 86_400;
  s.world.rebalance(old);
  await s.seconds(900 + 420);
  const attachedMs = s.world.audit.find((a) => a.what === "attach")?.atMs ?? 0;
  expect((kube.when(`evict ${old}`) - attachedMs) / 1000).toBeWithin(1_190, 1_230);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
});

test("a node that waits for its drain stays cordoned while its replacement's own replacement stands for it", async () => {
  const { s, kube, old, claim } = scene({ is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 1_800 });
  await s.start();
  s.world.rebalance(old);
  await s.until(() => MARK in kube.node(old).annotations, 120);
  // Its replacement goes, and is long about it.
  s.world.delays.shuttingDownMs = [400_000, 400_000];
  await s.seconds(300);
  s.world.interrupt(claim());
  await s.seconds(1_200);
  expect([s.world.instance(old).group, kube.node(old).spec.unschedulable]).toEqual(["web", true]);
  expect(kube.changes.filter(({ what }) => what.startsWith("uncordon"))).toEqual([]);
  await s.quiet(3_600);
  s.check([], { web: [3, 5, 3] }, { launches: 2 });
});

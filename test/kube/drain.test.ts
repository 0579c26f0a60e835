// The drain against a real API server: which pods go, in whose time, and what stays.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { MARK, releaseNodes } from "../../maxgroup.ts";
import { type Cluster, startCluster } from "./cluster.ts";
import { leastMs, until } from "./servers.ts";
import { KubeStage, RBAC } from "./stage.ts";

const started = await startCluster();
const cluster = started as Cluster; // not touched where it is undefined
let stage: KubeStage;
beforeAll(async () => {
  if (!started) return;
  await cluster.apply(RBAC);
  stage = new KubeStage(cluster, cluster.tokenKubeconfig("max_group", ["max-group"]));
});
afterAll(async () => {
  stage?.end();
  await started?.stop();
});
/** More than is needed: these drains end with their last pod. */
const ample = { seconds: 60 };

describe.skipIf(started === undefined)("which pods go", () => {
  test("those that kubectl drain would evict go, and DaemonSet and mirror pods stay", async () => {
    const { id, name } = await stage.node();
    const pods = await cluster.makePodOfEveryKind(name, "kind");
    const draining = stage.step("drain", stage.work(id, ample));
    await until("the finalizer's pod is ending", async () => (await cluster.read(pods.finalizer))?.metadata.deletionTimestamp);
    await cluster.patch(pods.finalizer, { metadata: { finalizers: null } });
    expect((await draining).is).toBe("done");
    expect(await cluster.podsOn(name)).toEqual(["kind-daemonset", "kind-mirror"]);
    const evicted = cluster.calls().filter((call) => /pods\/kind-(daemonset|mirror)\/eviction/.test(call.uri));
    expect(evicted).toEqual([]);
    expect(stage.said(`drained ${name}`)).toBe(true);
  });

  test("a StatefulSet's pod that came back under its name on another node is left alone, also if that was a moment ago", async () => {
    const [old, other] = [await stage.node(), await stage.node()];
    const pod = { name: "db-0", owner: "StatefulSet", ownerName: "db" } as const;
    const first = await cluster.makePod({ ...pod, node: old.name });
    const { fetch } = stage.ctx.deps;
    let second = first;
    // Between the list and the eviction.
    stage.ctx.deps.fetch = async (url, init) => {
      if (url.endsWith("/db-0/eviction") && second === first) {
        await cluster.remove(first);
        second = await cluster.makePod({ ...pod, node: other.name });
      }
      return fetch(url, init);
    };
    expect((await stage.step("drain", stage.work(old.id, ample))).is).toBe("done");
    stage.ctx.deps.fetch = fetch;
    await Bun.sleep(500);
    expect(second.metadata.uid).not.toBe(first.metadata.uid);
    expect((await cluster.read(second))?.metadata).toMatchObject({ uid: second.metadata.uid });
    expect(stage.said(`drained ${old.name}`)).toBe(true);
  });

  test("a grace period longer than the instance lives is shortened to what is left", async () => {
    const { id, name } = await stage.node();
    const slow = await cluster.makePod({ name: "slow", node: name, graceSeconds: 600, endsAfterSeconds: 600 });
    const quick = await cluster.makePod({ name: "quick", node: name, graceSeconds: 2, endsAfterSeconds: 600 });
    await stage.step("drain", stage.work(id, { seconds: 20 }));
    const seconds = async (pod: typeof slow) => {
      const { metadata } = (await cluster.read(pod)) ?? pod;
      return (metadata as { deletionGracePeriodSeconds?: number }).deletionGracePeriodSeconds;
    };
    // Five seconds before the end, less the time until the eviction.
    expect(await seconds(slow)).toBeWithin(5, 16);
    expect(await seconds(quick)).toBe(2);
  });
});

describe.skipIf(started === undefined)("budgets", () => {
  test("a budget that allows one at a time is passed one at a time", async () => {
    const { id, name } = await stage.node();
    const labels = { budget: "one" };
    await Promise.all(["one-0", "one-1", "one-2"].map((pod) => cluster.makePod({ name: pod, node: name, labels })));
    await cluster.setBudget("one", labels, 1);
    const draining = stage.step("drain", stage.work(id, { seconds: 40 }));
    for (const left of [2, 1, 0]) {
      await until(`${left} are left`, async () => (await cluster.podsOn(name)).length === left);
      await Bun.sleep(500);
      expect((await cluster.podsOn(name)).length).toBe(left);
      await cluster.setBudget("one", labels, 1);
    }
    expect((await draining).is).toBe("done");
  });

  test("a budget that never allows is not gone round: its pod stays, is named, and holds up no other node", async () => {
    const [blocked, free] = [await stage.node(), await stage.node()];
    const labels = { budget: "never" };
    const pod = await cluster.makePod({ name: "never", node: blocked.name, labels });
    await cluster.makePod({ name: "free", node: free.name });
    await cluster.setBudget("never", labels, 0);
    const work = stage.work(blocked.id, { seconds: 30 });
    const ends = stage.drainEnds(work);
    let isOver = false;
    const stuck = stage.step("drain", work).finally(() => {
      isOver = true;
    });
    expect((await stage.step("drain", stage.work(free.id, { seconds: 30 }))).is).toBe("done");
    expect(isOver).toBe(false);
    expect((await stuck).is).toBe("done");
    // In time for a detach five seconds before the deadline.
    expect(Date.now() - (await ends)).toBeWithin(-1_000, 5_000);
    expect((await cluster.read(pod))?.metadata.deletionTimestamp).toBeUndefined();
    expect(stage.said(/these pods go down with .*default\/never \(.*budget/)).toBe(true);
  });

  test("two budgets on one pod are a fault of that pod only", async () => {
    const { id, name } = await stage.node();
    const labels = { budget: "twice" };
    await cluster.makePod({ name: "twice", node: name, labels });
    await cluster.makePod({ name: "once", node: name });
    for (const budget of ["twice-0", "twice-1"]) await cluster.setBudget(budget, labels, 1);
    await stage.step("drain", stage.work(id, { seconds: 25 }));
    expect(await cluster.podsOn(name)).toEqual(["twice"]);
    expect(stage.said(/default\/twice \(.*more than one PodDisruptionBudget/)).toBe(true);
  });

  test("without a hard deadline a drain takes its grace seconds, counted from the mark on the node, and then gives up", async () => {
    const options = { k8s_node_drain_grace_second: 4 };
    const patient = new KubeStage(cluster, cluster.tokenKubeconfig("max_group", ["max-group"]), options);
    const { id, name } = await stage.node();
    const labels = { budget: "patient" };
    await cluster.makePod({ name: "patient", node: name, labels });
    await cluster.setBudget("patient", labels, 0);
    const startMs = Date.now();
    // Its world has the same instances.
    const work = patient.work(id);
    expect((await patient.step("drain", work)).is).toBe("done");
    expect(Date.now() - startMs).toBeWithin(3_500, 20_000);
    expect(patient.said(/these pods go down with .*default\/patient/)).toBe(true);
    // After a crash the same message comes again, and the time does not begin anew.
    const again = async () => {
      const againMs = Date.now();
      expect((await patient.step("drain", { ...patient.work(id), notice: work.notice })).is).toBe("done");
      return Date.now() - againMs;
    };
    expect(await leastMs(3_500, again)).toBeLessThan(3_500);
    patient.end();
  });
});

describe.skipIf(started === undefined)("nodes", () => {
  const nodeOf = async (name: string) => (await cluster.read({ kind: "Node", metadata: { name } })) ?? { metadata: { name } };

  test("a cordon shows: unschedulable, our taint, the notice's ID, and an event", async () => {
    const { id, name } = await stage.node();
    expect((await stage.step("cordon", stage.work(id, { notice: "7bf73129-1428-4cd3-a780-95db273d1602" }))).is).toBe("done");
    const { spec, metadata } = await nodeOf(name);
    expect(spec?.unschedulable).toBe(true);
    const value = "7bf73129-1428-4cd3-a780-95db273d1602";
    expect(spec?.taints).toContainEqual({ key: MARK, value, effect: "NoSchedule" } as never);
    expect(metadata.labels?.[MARK]).toBe(value);
    const events = await until("the event", async () => {
      const { body } = await cluster.must("GET", `/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3D${name}`);
      return body.items?.length ? (body.items as unknown as { reason: string; message: string }[]) : undefined;
    });
    expect(events).toEqual([expect.objectContaining({ reason: "SpotInterruption", message: expect.stringContaining(id) })]);
    const before = metadata.resourceVersion;
    await stage.step("cordon", stage.work(id, { notice: value }));
    expect((await nodeOf(name)).metadata.resourceVersion).toBe(before);
  });

  test("a node is found by its private DNS name where it has no provider ID, and never where that is another instance's", async () => {
    const named = await stage.node({ byName: true });
    await stage.step("cordon", stage.work(named.id));
    expect((await nodeOf(named.name)).spec?.unschedulable).toBe(true);
    const stranger = stage.instance();
    const name = stage.world.instance(stranger).privateDns;
    await cluster.makeNode({ name, instanceId: "i-0fedcba9876543210" });
    await stage.step("cordon", stage.work(stranger));
    expect((await nodeOf(name)).spec?.unschedulable).toBeUndefined();
  });

  test("a node is found by its provider ID whatever its name", async () => {
    const id = stage.instance();
    await cluster.makeNode({ name: "worker-7", instanceId: id });
    await stage.step("cordon", stage.work(id));
    expect((await nodeOf("worker-7")).spec?.unschedulable).toBe(true);
  });

  test("an instance without a node needs no drain, and waits for nobody's", async () => {
    const id = stage.instance();
    const startMs = Date.now();
    expect((await stage.step("wait for the replacement's node", stage.work(id, { seconds: 110 }))).is).toBe("done");
    expect((await stage.step("drain", stage.work(id, { seconds: 110 }))).is).toBe("done");
    expect(Date.now() - startMs).toBeLessThan(10_000);
  });

  test("a node whose notice did not come true is given back; one that somebody else had cordoned stays cordoned", async () => {
    const [mine, theirs] = [await stage.node(), await stage.node()];
    await cluster.patch(theirs.node, { spec: { unschedulable: true, taints: [{ key: "theirs", effect: "NoExecute" }] } });
    for (const { id, name } of [mine, theirs]) {
      await stage.step("cordon", stage.work(id, { seconds: 10 })); // which the launch does not wait for
      await until("the mark", async () => MARK in ((await nodeOf(name)).metadata.labels ?? {}));
    }
    const look = async () => {
      stage.ctx.state.groups = new Map([["web", { options: stage.work(mine.id).options }]]);
      stage.ctx.state.nodesLookedMs = Number.NEGATIVE_INFINITY;
      await releaseNodes(stage.ctx);
    };
    await look();
    expect((await nodeOf(mine.name)).spec?.unschedulable).toBe(true);
    // Three minutes later.
    const { now } = stage.ctx.deps;
    stage.ctx.deps.now = () => now() + 180_000;
    await look();
    stage.ctx.deps.now = now;
    const [free, cordoned] = [await nodeOf(mine.name), await nodeOf(theirs.name)];
    expect([free.spec?.unschedulable, free.spec?.taints, free.metadata.labels?.[MARK]]).toEqual([
      undefined,
      undefined,
      undefined,
    ]);
    expect(cordoned.spec).toMatchObject({ unschedulable: true, taints: [{ key: "theirs", effect: "NoExecute" }] });
    expect(cordoned.metadata.annotations?.[MARK]).toBeUndefined();
  });

  test("a node that has no instance is never looked at", async () => {
    await cluster.makeNode({ name: "orphan", instanceId: "i-0aaaaaaaaaaaaaaaa" });
    const before = (await nodeOf("orphan")).metadata.resourceVersion;
    stage.ctx.state.nodesLookedMs = Number.NEGATIVE_INFINITY;
    await releaseNodes(stage.ctx);
    expect((await nodeOf("orphan")).metadata.resourceVersion).toBe(before);
  });
});

describe.skipIf(started === undefined)("a cluster that fails", () => {
  test("the API server goes in mid-drain and comes back: the drain goes on", async () => {
    const { id, name } = await stage.node();
    const labels = { budget: "outage" };
    await cluster.makePod({ name: "outage", node: name, labels });
    await cluster.setBudget("outage", labels, 0);
    const draining = stage.step("drain", stage.work(id, { seconds: 150 }));
    await until("a first refusal", async () => cluster.calls().some((c) => c.uri.includes("/outage/eviction") && c.code === 429));
    await cluster.stopApiserver();
    await Bun.sleep(2_000);
    await cluster.startApiserver();
    await cluster.setBudget("outage", labels, 1);
    expect((await draining).is).toBe("done");
    expect(await cluster.podsOn(name)).toEqual([]);
  }, 200_000);

  test("an API server that answers nothing is waited for no longer than there is time", async () => {
    const { id, name } = await stage.node();
    await cluster.makePod({ name: "frozen", node: name });
    cluster.freezeApiserver();
    try {
      const work = stage.work(id, { seconds: 16 });
      const ends = stage.drainEnds(work);
      const startMs = Date.now();
      expect((await stage.step("cordon", work)).is).toBe("done");
      expect(Date.now() - startMs).toBeLessThan(9_000); // a call gives up after twice five seconds
      expect((await stage.step("drain", work)).is).toBe("done");
      expect(Date.now() - (await ends)).toBeWithin(-1_000, 5_000);
      expect(stage.said(`the node of ${id} could not be drained`)).toBe(true);
    } finally {
      cluster.thawApiserver();
    }
  });
});

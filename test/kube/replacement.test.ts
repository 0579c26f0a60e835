// The compiled binary between the simulated AWS and a real API server that takes client certificates only, under the
// role that ships: one interruption, from the event to the detach.
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { first, only, onStage } from "../e2e/harness.ts";
import { type Cluster, startCluster } from "./cluster.ts";
import { until } from "./servers.ts";
import { certificateKubeconfig, nodeFor, RBAC } from "./stage.ts";

const started = await startCluster();
const cluster = started as Cluster; // not touched where it is undefined
beforeAll(async () => {
  if (started) await cluster.apply(RBAC);
});
beforeEach(async () => {
  // Each scene's world gives out the same addresses, and so the same names.
  if (started) await cluster.must("DELETE", "/api/v1/nodes");
});
afterAll(() => started?.stop());

const spot = (name: string) => ({ name, min: 1, max: 4, desired: 2 });

describe.skipIf(started === undefined)("the compiled program", () => {
  test("cordons at once, evicts when the new node is Ready, and detaches when the pods are gone", async () => {
    await onStage(async (scene) => {
      const ids = scene.group(spot("drained"), { k8s_node_drain_option: true });
      const [old = ""] = ids;
      const nodes = await Promise.all(ids.map((id) => nodeFor(cluster, scene.world, id)));
      const { name } = first(nodes).metadata;
      const made = ["ReplicaSet", "StatefulSet", undefined] as const;
      await Promise.all(made.map((owner, n) => cluster.makePod({ name: `app-${n}`, node: name, owner, endsAfterSeconds: 1 })));
      await cluster.makePod({ name: "agent", node: name, owner: "DaemonSet" });
      const { daemon } = await scene.start("-K", certificateKubeconfig(cluster, "compiled"));
      await until("its rights are looked at", async () => daemon.has("pods of drained are moved by way of"));

      const detaching = scene.reached("autoscaling:DetachInstances");
      scene.interrupt(old, { seconds: 100 });
      const cordoned = await until("the cordon", async () => {
        const node = await cluster.read({ kind: "Node", metadata: { name } });
        return node?.spec?.unschedulable ? node : undefined;
      });
      expect(cordoned.spec?.taints?.map((taint) => taint.key)).toContain("spotmax/interruption");
      await scene.until("the replacement is in service", 60, () => scene.claims().some((i) => i.group !== undefined));
      const fresh = await nodeFor(cluster, scene.world, only(scene.claims()).id, false);
      await Bun.sleep(3_000);
      expect((await cluster.podsOn(name)).length).toBe(4); // nobody is sent to a node that is not there
      await cluster.setNodeReady(fresh, true);
      await detaching;
      expect(await cluster.podsOn(name)).toEqual(["agent"]);

      const calls = cluster.calls().filter((call) => call.user === "compiled");
      const place = (verb: string, uri: RegExp) => calls.findIndex((call) => call.verb === verb && uri.test(call.uri));
      const order = [place("patch", /\/nodes\//), place("create", /\/events/), place("create", /\/eviction/)];
      expect(order).toEqual(order.toSorted((a, b) => a - b));
      expect(order).not.toContain(-1);
      expect(calls.filter((call) => call.code === 403)).toEqual([]);
      await scene.finish([old]);
    });
  }, 120_000);

  test("an API server that answers nothing, and then is gone, delays nothing beyond the deadline", async () => {
    await onStage(async (scene) => {
      const ids = scene.group(spot("alone"), {
        k8s_node_drain_option: true,
        k8s_config_file_path: certificateKubeconfig(cluster, "alone"),
      });
      const [old = ""] = ids;
      await nodeFor(cluster, scene.world, old);
      await scene.start();
      cluster.freezeApiserver();
      try {
        const launching = scene.reached("ec2:CreateFleet");
        const sentMs = Date.now();
        scene.interrupt(old, { seconds: 25 });
        await launching;
        const launchedMs = Date.now();
        await cluster.stopApiserver();
        expect(launchedMs - sentMs).toBeLessThan(9_000); // a call to the API server gives up after twice five seconds
        await scene.until("the old one is out", 25, () => scene.world.instance(old).group === undefined);
        expect(Date.now()).toBeLessThan(scene.deadlineMs(old));
        await scene.finish([old]);
      } finally {
        await cluster.startApiserver();
      }
    });
  }, 120_000);
});

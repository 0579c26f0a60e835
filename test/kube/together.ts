// All of it at once: the compiled binary, a real API server that takes client certificates only and the role that
// ships, real Consul agents at the instances' own addresses, and the simulated AWS over HTTP. One replacement from
// event to detach, with and without a hard deadline, and with the program killed on the way.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { type Agents, type Registration, startAgents } from "../consul/agent.ts";
import { isHeldUp } from "../consul/deregister.ts";
import { type Daemon, only, onStage, type Scene } from "../e2e/harness.ts";
import { type Call, type Cluster, startCluster } from "./cluster.ts";
import { until } from "./servers.ts";
import { certificateKubeconfig, nodeFor, RBAC } from "./stage.ts";

const LIMIT_MS = 400_000;
const SERVICES = ["api", "web-1"];

/** What the cluster and Consul looked like when a call to AWS came in, before its effect. */
type Look = { calls: Call[]; pods: string[]; catalogue: Registration[] };
/** The place in a story at which it may be disturbed. */
type Stop = { scene: Scene; daemon: Daemon; flags: string[]; calls: () => Call[] };
type Kind = "interruption" | "rebalance";

const isEviction = ({ uri, code }: Call) => uri.includes("/eviction") && code === 201;
const isCordon = ({ verb, uri }: Call) => verb === "patch" && uri.includes("/nodes/");

/** The tests of one kind of notice, on a cluster and on agents of their own, which have addresses in `network` (127.0.N). */
export async function tellTogether(kind: Kind, network: string): Promise<void> {
  /** The old instance's, its replacement's, and its neighbour's. */
  const [OLD, NEW, OTHER] = [`${network}.11`, `${network}.12`, `${network}.13`] as const;
  const ADDRESSES = [OLD, NEW, OTHER] as const;

  const [kube, consul] = await Promise.all([
    startCluster(),
    startAgents({ addresses: [...ADDRESSES], server: `${network}.100` }),
  ]);
  const [cluster, agents] = [kube as Cluster, consul as Agents]; // not touched where one is undefined
  beforeAll(async () => {
    if (kube) await cluster.apply(RBAC);
  });
  async function clear(): Promise<void> {
    // Each scene's world gives out the same addresses, and so the same names.
    await cluster.must("DELETE", "/api/v1/namespaces/default/pods?gracePeriodSeconds=0");
    await cluster.must("DELETE", "/api/v1/nodes");
    for (const address of ADDRESSES) {
      await agents.request(address, "PUT", "/v1/agent/maintenance?enable=false");
      for (const id of SERVICES) await agents.register(address, { name: id.replace("-1", ""), id });
      await agents.waitForCatalogue(address, SERVICES);
    }
  }
  afterAll(() => Promise.all([kube?.stop(), consul?.stop()]));

  const maintained = async (address: string) =>
    Object.keys((await agents.request(address, "GET", "/v1/agent/checks")).body as object).includes("_node_maintenance");

  /** Looks around at the first attach and at the last detach, which wait for it. */
  function lookAround(scene: Scene, calls: () => Call[], node: string): Map<string, Promise<Look>> {
    const looks = new Map<string, Promise<Look>>();
    scene.world.intercept = ({ operation }) => {
      for (const claim of scene.claims()) claim.privateIp = NEW;
      if (operation !== "DetachInstances" && (operation !== "AttachInstances" || looks.has(operation))) return undefined;
      const look = async () => {
        // The agent answers a deregistration first, and tells the catalogue then.
        if (operation === "DetachInstances" && !isHeldUp(scene))
          await agents.waitForCatalogue(OLD, [], 25).catch(() => undefined); // the look will tell
        return { calls: calls(), pods: await cluster.podsOn(node), catalogue: await agents.catalogue() };
      };
      const seen = look();
      looks.set(operation, seen);
      return { wait: seen };
    };
    return looks;
  }

  /**
   * One replacement; `disturb` is called once the program runs, and awaited once the new node is Ready. Told again where
   * Consul's agent took over three seconds on a busy machine, and rightly was not waited for.
   */
  async function replacement(user: string, disturb?: (stop: Stop) => Promise<void>): Promise<void> {
    for (let tries = 0; tries < 3; tries++) if (await isTold(`${user}-${tries}`, disturb)) return;
    throw new Error("Consul's agent took over three seconds three times");
  }
  /** False where Consul's agent was not waited for. */
  async function isTold(user: string, disturb?: (stop: Stop) => Promise<void>): Promise<boolean> {
    await clear();
    let isWhole = false;
    const flags = ["-K", certificateKubeconfig(cluster, user)];
    const calls = () => cluster.calls().filter((call) => call.user === user);
    await onStage(async (scene) => {
      const options = { k8s_node_drain_option: true, consul_port: agents.port, is_to_handle_rebalance_event: true };
      const delays = { preaction_detach_delay_seconds: 1, preaction_termination_delay_seconds: 1 };
      const [old = "", other = ""] = scene.group({ name: "web", min: 2, max: 4, desired: 2 }, { ...options, ...delays });
      Object.assign(scene.world.instance(old), { privateIp: OLD, launchedAtMs: Date.now() - 601_000 });
      scene.world.instance(other).privateIp = OTHER;
      const [node, neighbour] = await Promise.all([old, other].map((id) => nodeFor(cluster, scene.world, id)));
      if (!node || !neighbour) throw new Error("two nodes were made");
      const { name } = node.metadata;
      for (const [n, owner] of (["ReplicaSet", "StatefulSet", undefined] as const).entries())
        await cluster.makePod({ name: `app-${n}`, node: name, owner, endsAfterSeconds: 3 });
      await cluster.makePod({ name: "agent", node: name, owner: "DaemonSet" });
      await cluster.makePod({ name: "next-door", node: neighbour.metadata.name, owner: "ReplicaSet" });
      scene.configure({ queue: { visibility_timeout_seconds: 10 } }); // so long a death costs without a hard deadline
      const looks = lookAround(scene, calls, name);
      const { daemon } = await scene.start(...flags);
      await until("its rights are looked at", async () => daemon.has("pods of web are moved by way of"));
      const disturbed = disturb?.({ scene, daemon, flags, calls });

      if (kind === "interruption") scene.interrupt(old, { seconds: 100 });
      else scene.world.rebalance(old);
      const readNode = () => cluster.read({ kind: "Node", metadata: { name } });
      await until("the cordon", async () => (await readNode())?.spec?.unschedulable);
      await scene.until("the replacement is in service", 60, () => scene.claims().some((i) => i.group !== undefined));
      const fresh = await nodeFor(cluster, scene.world, only(scene.claims()).id, false);
      await Bun.sleep(3_000);
      expect(calls().filter(isEviction)).toEqual([]); // nobody is sent to a node that is not there
      await cluster.setNodeReady(fresh, true);
      scene.hurry(scene.queues.detach);
      await disturbed;
      await scene.finish([old]);
      isWhole = !isHeldUp(scene);
      if (!isWhole) return;

      const [attach, detach] = [await looks.get("AttachInstances"), await looks.get("DetachInstances")];
      // With a hard deadline the cordon comes at once, without one only when there is a replacement.
      if (kind === "rebalance") expect(attach?.calls.filter(isCordon)).toEqual([]);
      expect(detach?.calls.some(isCordon)).toBe(true);
      expect(detach?.calls.findIndex(isCordon)).toBeLessThan(detach?.calls.findIndex(isEviction) ?? -1);
      expect(detach?.pods).toEqual(["agent"]);
      const at = (address: string) => detach?.catalogue.flatMap((entry) => (entry.address === address ? [entry.id] : []));
      expect(ADDRESSES.map(at)).toEqual([[], SERVICES, SERVICES]);
      // Each pod once, and nobody else's; no node but the old one's.
      const evicted = calls()
        .filter(isEviction)
        .map(({ uri }) => /pods\/([^/]+)\/eviction/.exec(uri)?.[1] ?? "");
      expect(evicted.toSorted()).toEqual(["app-0", "app-1", "app-2"]);
      expect(calls().filter((call) => isCordon(call) && !call.uri.includes(name))).toEqual([]);
      expect(calls().filter((call) => call.code === 403)).toEqual([]);
      expect(await cluster.podsOn(neighbour.metadata.name)).toEqual(["next-door"]);
      expect(await Promise.all(ADDRESSES.map((address) => agents.services(address)))).toEqual([[], SERVICES, SERVICES]);
      expect(await Promise.all(ADDRESSES.map(maintained))).toEqual([true, false, false]);
    });
    return isWhole;
  }

  /** Kill -9 while the first pods are ending, and a restart. */
  async function dieWhileEvicting({ scene, daemon, flags, calls }: Stop): Promise<void> {
    await until("evictions began", async () => calls().some(isEviction), 150);
    await daemon.end("SIGKILL");
    await scene.start(...flags);
  }
  /** Kill -9 between the deregistration and the detach, and a restart. */
  async function dieDeregistered({ scene, daemon, flags }: Stop): Promise<void> {
    const isMark = (input: object) => JSON.stringify(input).includes('"spotmax:detached"');
    let left: string[] = [];
    await scene.at({ call: "ec2:CreateTags", when: "before", matches: isMark }, async () => {
      left = await agents.services(OLD);
      await daemon.end("SIGKILL");
    });
    if (!isHeldUp(scene)) expect(left).toEqual([]);
    await scene.start(...flags);
  }

  describe.skipIf(!kube || !consul)(`nodes, services and instances of one replacement go in order: ${kind}`, () => {
    test("cordon, new node, evictions, services, detach", () => replacement(`${kind}-0`), LIMIT_MS);
    test("killed after evictions began, it ends the same way", () => replacement(`${kind}-1`, dieWhileEvicting), LIMIT_MS);
    test("killed after deregistration, it ends the same way", () => replacement(`${kind}-2`, dieDeregistered), LIMIT_MS);
  });
}

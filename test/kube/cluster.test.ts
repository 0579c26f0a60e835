// That the cluster of test/kube does what its tests rely on.
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { type Cluster, type PodKind, podKinds, startCluster } from "./cluster.ts";
import { Authority, temporaryFolder, until } from "./servers.ts";

const NODE = "ip-10-0-0-1.us-east-2.compute.internal";
const started = await startCluster({
  authenticate: (token) => (token === "k8s-aws-v1.good" ? { user: "eks", groups: ["system:masters"] } : undefined),
});
const cluster = started as Cluster; // not touched where it is undefined
afterAll(() => started?.stop());

const isReady = (object: { status?: { conditions?: { type: string; status: string }[] } } | undefined) =>
  object?.status?.conditions?.find(({ type }) => type === "Ready")?.status === "True";
const tokenOf = (kubeconfig: string) => {
  const { users } = Bun.YAML.parse(readFileSync(kubeconfig, "utf8")) as { users: { user: { token: string } }[] };
  return { token: users[0]?.user.token ?? "" };
};

describe.skipIf(started === undefined)("nodes and pods", () => {
  test("a node has its provider ID, its private DNS name and the readiness that it was given", async () => {
    const node = await cluster.makeNode({ name: NODE, instanceId: "i-0123456789abcdef0", zone: "us-east-2b" });
    expect(node.spec?.providerID).toBe("aws:///us-east-2b/i-0123456789abcdef0");
    expect(node.status?.addresses).toContainEqual({ type: "InternalDNS", address: NODE });
    expect(isReady(node)).toBe(true);
    expect(isReady(await cluster.setNodeReady(node, false))).toBe(false);
    expect(isReady(await cluster.setNodeReady(node, true))).toBe(true);
    expect((await cluster.makeNode({ name: "joining", isReady: false })).spec?.providerID).toBeUndefined();
  });

  test("a pod of every kind stands on its node as it was asked for", async () => {
    await cluster.makeNode({ name: "all" });
    const pods = await cluster.makePodOfEveryKind("all");
    const phase = (kind: PodKind) => `${pods[kind].status?.phase}${isReady(pods[kind]) ? ", ready" : ""}`;
    expect(phase("bare")).toBe("Running, ready");
    expect(phase("mirror")).toBe("Running, ready");
    expect(phase("notReady")).toBe("Running");
    expect(phase("pending")).toBe("Pending");
    expect(phase("finished")).toBe("Succeeded");
    expect(phase("failed")).toBe("Failed");
    expect(pods.daemonSet.metadata.ownerReferences?.[0]).toMatchObject({ kind: "DaemonSet", controller: true });
    expect(pods.mirror.metadata.annotations).toHaveProperty(["kubernetes.io/config.mirror"]);
    expect(await cluster.podsOn("all")).toEqual(
      Object.keys(podKinds)
        .map((kind) => `pod-${kind.toLowerCase()}`)
        .sort(),
    );
    const daemonSet = (name: string) => cluster.read({ apiVersion: "apps/v1", kind: "DaemonSet", metadata: { name } });
    expect((await daemonSet("pod-daemonset"))?.metadata.uid).toBe(pods.daemonSet.metadata.ownerReferences?.[0]?.uid ?? "");
    expect(await daemonSet("pod-daemonsetgone")).toBeUndefined();
  });
});

describe.skipIf(started === undefined)("evictions", () => {
  test("an evicted pod goes at once, and is not found then", async () => {
    const pod = await cluster.makePod({ name: "plain", node: NODE });
    const startMs = performance.now();
    expect((await cluster.evict(pod)).status).toBe(201);
    await cluster.waitUntilGone(pod);
    expect(performance.now() - startMs).toBeLessThan(15_000); // of a grace period of 30 s
    expect((await cluster.evict(pod)).status).toBe(404);
  });

  test("a pod that takes time to end takes that time, and can be evicted again meanwhile", async () => {
    const pod = await cluster.makePod({ name: "slow", node: NODE, endsAfterSeconds: 8 });
    const startMs = performance.now();
    expect((await cluster.evict(pod)).status).toBe(201);
    expect((await cluster.read(pod))?.metadata.deletionTimestamp).toBeString();
    expect((await cluster.evict(pod)).status).toBe(201);
    await cluster.waitUntilGone(pod);
    expect(performance.now() - startMs).toBeWithin(7_500, 30_000);
  });

  test("a pod with a finalizer stays until the finalizer goes", async () => {
    const pod = await cluster.makePod({ name: "kept", node: NODE, finalizer: "max-group.test/keep" });
    expect((await cluster.evict(pod)).status).toBe(201);
    await Bun.sleep(500);
    expect((await cluster.read(pod))?.metadata.deletionTimestamp).toBeString();
    await cluster.patch(pod, { metadata: { finalizers: null } });
    await cluster.waitUntilGone(pod);
  });

  test("a budget refuses with 429 and its cause, lets as many pass as it says, and counts them", async () => {
    const labels = { set: "budgeted" };
    const pods = await Promise.all(["b-0", "b-1"].map((name) => cluster.makePod({ name, node: NODE, labels })));
    const [first, second] = pods;
    if (!first || !second) throw new Error("two pods were made");
    const budget = await cluster.setBudget("budget", labels, 0);
    const refused = await cluster.evict(first);
    expect(refused.status).toBe(429);
    expect(refused.body.details?.causes?.[0]?.reason).toBe("DisruptionBudget");
    expect(refused.headers.get("retry-after")).toBeNull();

    await cluster.setBudget("budget", labels, 1);
    expect((await cluster.evict(first)).status).toBe(201);
    expect((await cluster.read(budget))?.status?.disruptionsAllowed).toBe(0);
    expect((await cluster.evict(second)).status).toBe(429);

    await cluster.setBudget("budget", labels, 1, { isStale: true });
    const stale = await cluster.evict(second);
    expect([stale.status, stale.headers.get("retry-after")]).toEqual([429, "10"]);
  });

  test("two budgets on one pod are an error of the server's", async () => {
    const labels = { set: "twice" };
    const pod = await cluster.makePod({ name: "twice", node: NODE, labels });
    for (const name of ["twice-0", "twice-1"]) await cluster.setBudget(name, labels, 1);
    const { status, body } = await cluster.evict(pod);
    expect([status, body.message]).toEqual([500, expect.stringContaining("more than one PodDisruptionBudget")]);
  });

  test("an eviction for another UID is a conflict: the pod's namesake is left alone", async () => {
    const old = await cluster.makePod({ name: "db-0", node: NODE, owner: "StatefulSet", ownerName: "db" });
    await cluster.remove(old);
    await cluster.makeNode({ name: "other" });
    const namesake = await cluster.makePod({ name: "db-0", node: "other", owner: "StatefulSet", ownerName: "db" });
    const uid = old.metadata.uid;
    expect((await cluster.evict(namesake, { uid })).status).toBe(409);
    expect(await cluster.podsOn("other")).toEqual(["db-0"]);
    expect((await cluster.evict(namesake, { uid: namesake.metadata.uid })).status).toBe(201);
  });
});

describe.skipIf(started === undefined)("who may come in", () => {
  test("nobody is refused, and so is a certificate of another authority", async () => {
    expect((await cluster.request("GET", "/api/v1/nodes", undefined, "nobody")).status).toBe(401);
    const elsewhere = temporaryFolder("stranger");
    const stranger = new Authority(elsewhere.folder).issue("admin", { organization: "system:masters" });
    const refused = await cluster.request("GET", "/api/v1/nodes", undefined, stranger).then(
      ({ status }) => status,
      () => "no TLS",
    );
    expect([401, "no TLS"]).toContain(refused);
    elsewhere.remove();
    const ours = cluster.clientCertificate("boss", "system:masters");
    expect((await cluster.request("GET", "/api/v1/nodes", undefined, ours)).status).toBe(200);
  });

  test("the server's certificate is its own authority's, and so unknown without it", async () => {
    await expect(fetch(`${cluster.url}/readyz`, { keepalive: false })).rejects.toThrow();
  });

  test("each caller is who it says, whatever was asked before", async () => {
    const review = { apiVersion: "authentication.k8s.io/v1", kind: "SelfSubjectReview" };
    const callers = [
      ["ann", cluster.clientCertificate("ann")],
      ["bob", { token: cluster.token("bob") }],
      ["cid", cluster.clientCertificate("cid")],
      ["ann", cluster.clientCertificate("ann")],
    ] as const;
    for (const [name, caller] of callers) {
      const { body } = await cluster.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review, caller);
      expect(body.status?.userInfo?.username).toBe(name);
    }
  });

  test("RBAC forbids what no role allows, and takes roles from a manifest", async () => {
    const caller = tokenOf(cluster.tokenKubeconfig("drainer"));
    const list = () => cluster.request("GET", "/api/v1/pods", undefined, caller);
    expect(await list()).toMatchObject({ status: 403, body: { reason: "Forbidden" } });
    await cluster.apply(`# two documents
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: drainer
rules:
  - { apiGroups: [""], resources: [pods], verbs: [list] }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: drainer
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: drainer }
subjects:
  - { kind: User, name: drainer, apiGroup: rbac.authorization.k8s.io }
  - { kind: ServiceAccount, name: drainer, namespace: kube-system }
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: drainer
  namespace: kube-system
`);
    await until("the role holds", async () => (await list()).status === 200);
    const pod = await cluster.makePod({ name: "forbidden", node: NODE });
    expect((await cluster.evict(pod, { as: caller })).status).toBe(403);
    const token = await cluster.serviceAccountToken("kube-system", "drainer");
    expect((await cluster.request("GET", "/api/v1/pods", undefined, { token })).status).toBe(200);
  });

  test("a token is whom the test says it is, and an unknown one is refused", async () => {
    const list = (token: string) => cluster.request("GET", "/api/v1/nodes", undefined, { token });
    expect((await list("k8s-aws-v1.good")).status).toBe(200);
    expect((await list("k8s-aws-v1.bad")).status).toBe(401);
  });

  test("the administrator's kubeconfig names the certificate that lets it in", async () => {
    const config = Bun.YAML.parse(readFileSync(cluster.adminKubeconfig, "utf8")) as {
      clusters: { cluster: { server: string; "certificate-authority": string } }[];
      users: { user: { "client-certificate": string; "client-key": string } }[];
    };
    expect(config.clusters[0]?.cluster).toEqual({ server: cluster.url, "certificate-authority": cluster.caFile });
    const { "client-certificate": certFile = "", "client-key": keyFile = "" } = config.users[0]?.user ?? {};
    const asked = await cluster.request("GET", "/api/v1/nodes?limit=1", undefined, { certFile, keyFile });
    expect(asked.status).toBe(200);
    expect(cluster.calls()).toContainEqual({ user: "admin", verb: "list", uri: "/api/v1/nodes?limit=1", code: 200 });
  });
});

describe.skipIf(started === undefined)("faults", () => {
  test("frozen, the API server takes connections and answers nothing until it is thawed", async () => {
    cluster.freezeApiserver();
    const answer = cluster.request("GET", "/version");
    expect(await Promise.race([answer, Bun.sleep(1_000).then(() => "nothing")])).toBe("nothing");
    cluster.thawApiserver();
    expect((await answer).status).toBe(200);
  });

  test("stopped, it refuses connections; started again, it knows what it knew, and pods end as before", async () => {
    const pod = await cluster.makePod({ name: "survivor", node: NODE });
    const { url } = cluster;
    await cluster.stopApiserver();
    await expect(cluster.request("GET", "/version")).rejects.toThrow();
    await cluster.startApiserver();
    expect(cluster.url).toBe(url);
    expect((await cluster.evict(pod, { uid: pod.metadata.uid })).status).toBe(201);
    await cluster.waitUntilGone(pod, 120); // kwok comes back the later the longer it found nobody
  }, 200_000);
});

describe.skipIf(started === undefined)("without RBAC", () => {
  test("whoever is known may do everything, in a cluster beside the first", async () => {
    const other = await startCluster({ rbac: false });
    try {
      const token = other?.token("anyone") ?? "";
      expect(other?.url).not.toBe(cluster.url);
      expect((await other?.request("GET", "/api/v1/secrets", undefined, { token }))?.status).toBe(200);
    } finally {
      await other?.stop();
    }
  }, 180_000);
});

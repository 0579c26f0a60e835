// A small Kubernetes API for scenarios under virtual time: the few paths that the program asks for, nodes that join as
// their instances run, pods that end in their grace period. The real API server is in test/kube.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { MARK } from "../../maxgroup.ts";
import { temporaryFolder } from "../kube/servers.ts";
import type { Stage } from "./harness.ts";

// Loaded now: under virtual time there is no waiting for a real file.
await import("@kubernetes/client-node");

const { folder } = temporaryFolder("kubeconfig");
const SERVER = "https://kube.test";
export const KUBECONFIG = join(folder, "kubeconfig");
writeFileSync(
  KUBECONFIG,
  JSON.stringify({
    clusters: [{ name: "test", cluster: { server: SERVER } }],
    users: [{ name: "test", user: { token: "token" } }],
    contexts: [{ name: "test", context: { cluster: "test", user: "test" } }],
    "current-context": "test",
  }),
);

type FakePod = { name: string; uid: string; node: string; isHeld: boolean; graceSeconds: number; isEnding: boolean };
type FakeNode = {
  version: number;
  spec: { providerID: string; unschedulable?: boolean; taints?: { key: string; value?: string; effect: string }[] };
  labels: Record<string, string>;
  annotations: Record<string, string>;
};
/** A merge patch on a flat record. */
const merge = <T extends object>(target: T, patch: object): T =>
  Object.fromEntries(Object.entries({ ...target, ...patch }).filter(([, value]) => value !== null)) as T;

export class FakeKube {
  readonly #stage: Stage;
  readonly #nodes = new Map<string, FakeNode>();
  readonly pods: FakePod[] = [];
  /** From an instance's launch to its node. */
  joinSeconds = 30;
  state: "up" | "down" | "frozen" = "up";
  /** What it was asked to change, by virtual time. */
  readonly changes: { atMs: number; what: string }[] = [];
  asked = 0;

  constructor(stage: Stage) {
    this.#stage = stage;
    stage.http = (url, init) => this.#answer(url, init);
  }

  /** So many pods on each of these instances' nodes. */
  populate(instances: string[], count: number, more: Partial<FakePod> = {}): void {
    for (const id of instances)
      for (let n = 0; n < count; n++) {
        const uid = `${id}-${n}`;
        this.pods.push({ name: uid, uid, node: this.#nameOf(id), isHeld: false, graceSeconds: 5, isEnding: false, ...more });
      }
  }
  #nameOf = (id: string) => this.#stage.world.instance(id).privateDns;
  podsOn(instance: string): FakePod[] {
    return this.pods.filter((pod) => pod.node === this.#nameOf(instance));
  }
  node(instance: string): FakeNode {
    const name = this.#nameOf(instance);
    const known = this.#nodes.get(name);
    if (known) return known;
    const made = { version: 1, spec: { providerID: `aws:///zone/${instance}` }, labels: {}, annotations: {} };
    this.#nodes.set(name, made);
    return made;
  }
  /** When something was first changed, in ms; NaN: never. */
  when(what: string): number {
    return this.changes.find((change) => change.what.startsWith(what))?.atMs ?? Number.NaN;
  }

  #instances(): string[] {
    const { world, clock } = this.#stage;
    return [...world.ec2.instances.values()]
      .filter((i) => i.state === "running" && clock.now() - i.launchedAtMs >= this.joinSeconds * 1000)
      .map((i) => i.id);
  }
  #show(instance: string): object {
    const { version, spec, labels, annotations } = this.node(instance);
    const name = this.#nameOf(instance);
    return {
      metadata: { name, uid: name, resourceVersion: `${version}`, labels, annotations },
      spec,
      status: { conditions: [{ type: "Ready", status: "True" }], addresses: [{ type: "InternalDNS", address: name }] },
    };
  }

  async #answer(url: string, { method = "GET", body }: BunFetchRequestInit = {}): Promise<Response> {
    const { world, clock } = this.#stage;
    if (this.state === "frozen") return new Promise(() => undefined);
    await clock.sleep(world.random.between([5, 20]));
    if (this.state === "down") throw Object.assign(new Error("connection refused"), { code: "ECONNREFUSED" });
    this.asked++;
    const { pathname, searchParams } = new URL(url);
    return this.#handle(method, pathname, searchParams, body ? JSON.parse(String(body)) : undefined);
  }

  #handle(method: string, path: string, query: URLSearchParams, body: unknown): Response {
    const change = (what: string) => this.changes.push({ atMs: this.#stage.clock.now(), what });
    const [, name = ""] = /^\/api\/v1\/nodes\/([^/]+)$/.exec(path) ?? [];
    const instances = this.#instances();
    const instance = instances.find((id) => this.#nameOf(id) === name);
    if (path === "/api/v1/nodes") {
      const marked = query.get("labelSelector") === MARK;
      return Response.json({
        items: instances.filter((id) => !marked || MARK in this.node(id).labels).map((id) => this.#show(id)),
      });
    }
    if (name && !instance) return Response.json({ reason: "NotFound" }, { status: 404 });
    if (name && instance && method === "GET") return Response.json(this.#show(instance));
    if (name && instance) return this.#patch(instance, body as Patch, change);
    if (path === "/api/v1/pods") {
      const node = query.get("fieldSelector")?.replace("spec.nodeName=", "");
      const items = this.pods.filter((pod) => pod.node === node).map(show);
      return Response.json({ items });
    }
    if (path.endsWith("/eviction")) return this.#evict(path, body as Eviction, change);
    if (path.endsWith("/events")) return Response.json({}, { status: 201 });
    if (path.endsWith("/selfsubjectaccessreviews")) return Response.json({ status: { allowed: true } }, { status: 201 });
    throw new Error(`the fake knows no ${method} ${path}`);
  }

  #patch(instance: string, { metadata, spec = {} }: Patch, change: (what: string) => void): Response {
    const node = this.node(instance);
    if (metadata.resourceVersion !== `${node.version}`) return Response.json({ reason: "Conflict" }, { status: 409 });
    const wasFree = !node.spec.unschedulable;
    node.spec = merge(node.spec, spec);
    node.labels = merge(node.labels, metadata.labels ?? {});
    node.annotations = merge(node.annotations, metadata.annotations ?? {});
    node.version++;
    if (wasFree && node.spec.unschedulable) change(`cordon ${instance}`);
    if (!wasFree && !node.spec.unschedulable) change(`uncordon ${instance}`);
    return Response.json(this.#show(instance));
  }

  #evict(path: string, { deleteOptions }: Eviction, change: (what: string) => void): Response {
    const pod = this.pods.find((p) => path === `/api/v1/namespaces/default/pods/${p.name}/eviction`);
    if (!pod) return Response.json({ reason: "NotFound" }, { status: 404 });
    if (pod.uid !== deleteOptions.preconditions.uid) return Response.json({ reason: "Conflict" }, { status: 409 });
    if (pod.isHeld) return Response.json({ message: "a budget" }, { status: 429 });
    if (!pod.isEnding) {
      pod.isEnding = true;
      change(`evict ${pod.name}`);
      this.#stage.world.after(pod.graceSeconds * 1000, () => this.pods.splice(this.pods.indexOf(pod), 1));
    }
    return Response.json({}, { status: 201 });
  }
}
type Patch = {
  metadata: { resourceVersion: string; labels?: Record<string, string>; annotations?: Record<string, string> };
  spec?: object;
};
type Eviction = { deleteOptions: { preconditions: { uid: string } } };
const show = ({ name, uid, isEnding, graceSeconds }: FakePod) => ({
  metadata: { name, namespace: "default", uid, ...(isEnding && { deletionTimestamp: "2026-01-01T00:00:00Z" }) },
  spec: { terminationGracePeriodSeconds: graceSeconds },
  status: { phase: "Running" },
});

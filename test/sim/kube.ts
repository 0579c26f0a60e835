// A small Kubernetes API for scenarios under virtual time: the few paths that the program asks for, nodes that join as
// their instances run, pods that end in their grace period. The real API server is in test/kube.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { MARK, type Mark } from "../../maxgroup.ts";
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

/** The notice of long ago that some nodes are still marked for. */
export const OF_OLD = "of-old";

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

/** What becomes of a request: nobody listens, nobody answers, or this status, with the effect or without it. */
export type KubeFault = { delayMs?: number; is: "slow" | "down" | "frozen" | { status: number; isDone?: boolean } };

export class FakeKube {
  readonly #stage: Stage;
  readonly #nodes = new Map<string, FakeNode>();
  /** Instances, by the name of their node. */
  readonly #named = new Map<string, string>();
  readonly pods: FakePod[] = [];
  /** From an instance's launch to its node. */
  joinSeconds = 30;
  state: "up" | "down" | "frozen" = "up";
  /** What it was asked to change, by virtual time. */
  readonly changes: { atMs: number; what: string }[] = [];
  asked = 0;
  /** What is wrong with the next request. */
  fault: (() => KubeFault | undefined) | undefined;
  /** Hears of each change of a node as it takes effect; `notice`: the one that it was marked for before. */
  onChange: ((what: "cordon" | "uncordon" | "evict", instance: string, notice?: string) => void) | undefined;
  /** As the API allows where a selector leaves something out: the first page of a list is empty, with more behind it. */
  emptyFirstPages = false;
  /** Where a pod that has gone appears again, as its controller and a scheduler would have it; undefined: nowhere. */
  schedule: ((candidates: string[]) => string | undefined) | undefined;
  #made = 0;

  constructor(stage: Stage) {
    this.#stage = stage;
    const other = stage.http;
    stage.http = (url, init) => (url.startsWith(SERVER) ? this.#answer(url, init) : other(url, init));
  }

  /** So many pods on each of these instances' nodes. */
  populate(instances: string[], count: number, more: Partial<FakePod> = {}): void {
    for (const id of instances)
      for (let n = 0; n < count; n++) {
        const uid = `${id}-${n}`;
        this.pods.push({ name: uid, uid, node: this.#nameOf(id), isHeld: false, graceSeconds: 5, isEnding: false, ...more });
      }
  }
  #nameOf(id: string): string {
    const name = this.#stage.world.instance(id).privateDns;
    this.#named.set(name, id);
    return name;
  }
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
  /** What a notice of an hour ago, which did not come true, has left on a node. */
  leave(instance: string, more: Partial<Mark>): void {
    const node = this.node(instance);
    const markedMs = this.#stage.clock.now() - 3_600_000;
    const mark: Mark = {
      instance,
      notice: OF_OLD,
      deadlineMs: null,
      markedMs,
      wasCordoned: node.spec.unschedulable === true,
      ...more,
    };
    node.spec = { ...node.spec, unschedulable: true, taints: [{ key: MARK, value: mark.notice, effect: "NoSchedule" }] };
    node.labels = { [MARK]: mark.notice };
    node.annotations = { [MARK]: JSON.stringify(mark) };
  }
  /** Others change all nodes, as kubelets do all the time. */
  touch(): void {
    for (const node of this.#nodes.values()) node.version++;
  }
  /** When something was first changed, in ms; NaN: never. */
  when(what: string): number {
    return this.changes.find((change) => change.what.startsWith(what))?.atMs ?? Number.NaN;
  }

  /** Its node is there, and was so this long ago. */
  hasJoined(instance: string, agoMs = 0): boolean {
    const { state, launchedAtMs } = this.#stage.world.instance(instance);
    return state === "running" && this.#stage.clock.now() - launchedAtMs >= this.joinSeconds * 1000 + agoMs;
  }
  #instances(): string[] {
    return [...this.#stage.world.ec2.instances.keys()].filter((id) => this.hasJoined(id));
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
    const { is = "slow", delayMs = 0 } = this.fault?.() ?? {};
    if (is === "frozen") return new Promise(() => undefined);
    if (this.state === "down" || is === "down") throw Object.assign(new Error("connection refused"), { code: "ECONNREFUSED" });
    this.asked++;
    if (delayMs) await clock.sleep(delayMs);
    const { pathname, searchParams } = new URL(url);
    const handle = () => this.#handle(method, pathname, searchParams, body ? JSON.parse(String(body)) : undefined);
    if (is === "slow") return handle();
    if (is.isDone) handle();
    const headers: Record<string, string> = is.status === 429 ? { "retry-after": "1" } : {};
    return Response.json({ message: "a fault" }, { status: is.status, headers });
  }

  #handle(method: string, path: string, query: URLSearchParams, body: unknown): Response {
    const change = (what: "cordon" | "uncordon" | "evict", instance: string, more = instance, notice?: string) => {
      this.changes.push({ atMs: this.#stage.clock.now(), what: `${what} ${more}` });
      this.onChange?.(what, instance, notice);
    };
    const [, name = ""] = /^\/api\/v1\/nodes\/([^/]+)$/.exec(path) ?? [];
    const instance = name ? this.#instanceOf(name) : undefined;
    if (path === "/api/v1/nodes") {
      const instances = this.#instances();
      const marked = query.get("labelSelector") === MARK;
      return this.#list(
        query,
        instances.filter((id) => !marked || MARK in this.node(id).labels).map((id) => this.#show(id)),
      );
    }
    if (name && !instance) return Response.json({ reason: "NotFound" }, { status: 404 });
    if (name && instance && method === "GET") return Response.json(this.#show(instance));
    if (name && instance) return this.#patch(instance, body as Patch, change);
    if (path === "/api/v1/pods") {
      const node = query.get("fieldSelector")?.replace("spec.nodeName=", "");
      return this.#list(query, this.pods.filter((pod) => pod.node === node).map(show));
    }
    if (path.endsWith("/eviction")) return this.#evict(path, body as Eviction, change);
    if (path.endsWith("/events")) return Response.json({}, { status: 201 });
    if (path.endsWith("/selfsubjectaccessreviews")) return Response.json({ status: { allowed: true } }, { status: 201 });
    throw new Error(`the fake knows no ${method} ${path}`);
  }

  #list(query: URLSearchParams, items: object[]): Response {
    if (this.emptyFirstPages && !query.has("continue")) return Response.json({ items: [], metadata: { continue: "the rest" } });
    return Response.json({ items, metadata: {} });
  }

  /** Whose node this is, if it has joined. */
  #instanceOf(name: string): string | undefined {
    if (!this.#named.has(name)) for (const id of this.#stage.world.ec2.instances.keys()) this.#nameOf(id);
    const id = this.#named.get(name);
    return id !== undefined && this.hasJoined(id) ? id : undefined;
  }

  #patch(instance: string, { metadata, spec = {} }: Patch, change: Change): Response {
    const node = this.node(instance);
    if (metadata.resourceVersion !== `${node.version}`) return Response.json({ reason: "Conflict" }, { status: 409 });
    const wasFree = !node.spec.unschedulable;
    const notice = node.labels[MARK];
    node.spec = merge(node.spec, spec);
    node.labels = merge(node.labels, metadata.labels ?? {});
    node.annotations = merge(node.annotations, metadata.annotations ?? {});
    node.version++;
    if (wasFree && node.spec.unschedulable) change("cordon", instance);
    if (!wasFree && !node.spec.unschedulable) change("uncordon", instance, instance, notice);
    return Response.json(this.#show(instance));
  }

  #evict(path: string, { deleteOptions }: Eviction, change: Change): Response {
    const pod = this.pods.find((p) => path === `/api/v1/namespaces/default/pods/${p.name}/eviction`);
    if (!pod) return Response.json({ reason: "NotFound" }, { status: 404 });
    if (pod.uid !== deleteOptions.preconditions.uid) return Response.json({ reason: "Conflict" }, { status: 409 });
    if (pod.isHeld) return Response.json({ message: "a budget" }, { status: 429 });
    if (!pod.isEnding) {
      pod.isEnding = true;
      change("evict", this.#named.get(pod.node) ?? "", pod.name);
      const graceSeconds = Math.min(pod.graceSeconds, deleteOptions.gracePeriodSeconds ?? pod.graceSeconds);
      this.#stage.world.after(graceSeconds * 1000, () => this.#end(pod));
    }
    return Response.json({}, { status: 201 });
  }
  #end(pod: FakePod): void {
    this.pods.splice(this.pods.indexOf(pod), 1);
    const free = this.schedule ? this.#instances().filter((id) => !this.node(id).spec.unschedulable) : [];
    const next = this.schedule?.(free);
    // Under its name, as a StatefulSet's.
    if (next) this.pods.push({ ...pod, uid: `${pod.name}-${++this.#made}`, node: this.#nameOf(next), isEnding: false });
  }
}
type Change = (what: "cordon" | "uncordon" | "evict", instance: string, more?: string, notice?: string) => void;
type Patch = {
  metadata: { resourceVersion: string; labels?: Record<string, string>; annotations?: Record<string, string> };
  spec?: object;
};
type Eviction = { deleteOptions: { preconditions: { uid: string }; gracePeriodSeconds?: number } };
const show = ({ name, uid, isEnding, graceSeconds }: FakePod) => ({
  metadata: { name, namespace: "default", uid, ...(isEnding && { deletionTimestamp: "2026-01-01T00:00:00Z" }) },
  spec: { terminationGracePeriodSeconds: graceSeconds },
  status: { phase: "Running" },
});

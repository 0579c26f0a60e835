// A real Kubernetes for tests: kube-apiserver and etcd, with kwok in the kubelet's place, on loopback. `make` builds
// them (test/kube/build.sh); nothing is installed here.
//
// What it lacks: no controllers and no scheduler run. So a pod that was evicted is not replaced, a DaemonSet makes no
// pods, and a disruption budget's status is what a test writes into it (the API itself counts evictions off it). Every
// admission plugin but NamespaceLifecycle is off: a mirror pod or a pod without service account can simply be made.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Authority, areInstalled, CACHE, type Certificate, freePorts, ServerProcess, temporaryFolder, until } from "./servers.ts";

/** As pinned in go.mod, which is what was built. */
const KUBE_VERSION = /\sk8s\.io\/kubernetes v(\S+)/.exec(readFileSync(join(import.meta.dir, "go.mod"), "utf8"))?.[1] ?? "?";
const BUILT = join(CACHE, `kube-${KUBE_VERSION}`, "bin");
const KUBE_APISERVER = join(process.env.KUBEBUILDER_ASSETS || BUILT, "kube-apiserver");
const ETCD = join(process.env.KUBEBUILDER_ASSETS || BUILT, "etcd");
const KWOK = join(BUILT, "kwok");

// --- Objects ---------------------------------------------------------------------------------------------------

/** An object as the API answers it, with the fields that tests look at. */
export interface KubeObject {
  apiVersion?: string;
  kind?: string;
  metadata: {
    name: string;
    namespace?: string;
    uid?: string;
    generation?: number;
    resourceVersion?: string;
    deletionTimestamp?: string;
    labels?: Record<string, string>;
    annotations?: Record<string, string>;
    finalizers?: string[];
    ownerReferences?: { kind: string; name: string; uid: string; controller?: boolean }[];
  };
  spec?: {
    nodeName?: string;
    providerID?: string;
    unschedulable?: boolean;
    taints?: { key: string; effect: string }[];
  };
  status?: {
    phase?: string;
    conditions?: { type: string; status: string; reason?: string }[];
    addresses?: { type: string; address: string }[];
    disruptionsAllowed?: number;
  };
}

/** What the API answers: an object, a list of them, or, where `reason` stands, why not. */
export interface Body extends Partial<Omit<KubeObject, "status">> {
  items?: KubeObject[];
  status?: KubeObject["status"] & { token?: string; userInfo?: { username: string } };
  code?: number;
  reason?: string;
  message?: string;
  details?: { causes?: { reason: string; message: string }[]; retryAfterSeconds?: number };
}

export interface Answer {
  status: number;
  headers: Headers;
  body: Body;
}

/** Who asks: a bearer token, a client certificate, or nobody. */
export type Caller = { token: string } | Certificate | "nobody";

/** A request that a client made, from the audit log; those of `cluster.request` and of kwok are left out. */
export interface Call {
  user: string;
  /** As in RBAC: `get`, `list`, `watch`, `create`, `patch`, `delete`, ... */
  verb: string;
  uri: string;
  code: number;
}

const plurals: Record<string, { plural: string; isClusterWide?: boolean }> = {
  ClusterRole: { plural: "clusterroles", isClusterWide: true },
  ClusterRoleBinding: { plural: "clusterrolebindings", isClusterWide: true },
  DaemonSet: { plural: "daemonsets" },
  Job: { plural: "jobs" },
  Node: { plural: "nodes", isClusterWide: true },
  Pod: { plural: "pods" },
  PodDisruptionBudget: { plural: "poddisruptionbudgets" },
  ReplicaSet: { plural: "replicasets" },
  Role: { plural: "roles" },
  RoleBinding: { plural: "rolebindings" },
  ServiceAccount: { plural: "serviceaccounts" },
  StatefulSet: { plural: "statefulsets" },
};

/** The path of an object's collection, from its apiVersion, kind and namespace. */
function collectionOf({ apiVersion = "v1", kind = "", metadata: { namespace = "default" } }: KubeObject): string {
  const resource = plurals[kind];
  if (resource === undefined) throw new Error(`test/kube/cluster.ts knows no path for ${kind}`);
  const root = apiVersion === "v1" ? "/api/v1" : `/apis/${apiVersion}`;
  return resource.isClusterWide ? `${root}/${resource.plural}` : `${root}/namespaces/${namespace}/${resource.plural}`;
}
/** The path of an object. */
const pathOf = (object: KubeObject) => `${collectionOf(object)}/${object.metadata.name}`;

export interface NodeOptions {
  /** Also the private DNS name, as on EKS. */
  name: string;
  /** Makes `spec.providerID` aws:///ZONE/ID; without it the node has none, as where no cloud provider set it. */
  instanceId?: string;
  zone?: string;
  address?: string;
  labels?: Record<string, string>;
  /** Default true. `setNodeReady` changes it. */
  isReady?: boolean;
}

export interface PodOptions {
  name: string;
  node: string;
  namespace?: string;
  labels?: Record<string, string>;
  /** Its controller, made where it is absent; with `isOwnerGone` only named. Default: none. */
  owner?: "DaemonSet" | "Job" | "ReplicaSet" | "StatefulSet";
  ownerName?: string;
  isOwnerGone?: boolean;
  /** A static pod's shadow: annotated and owned by its node. */
  isMirror?: boolean;
  hasEmptyDir?: boolean;
  finalizer?: string;
  /** Default Running, and ready. */
  phase?: "Running" | "Pending" | "NotReady" | "Succeeded" | "Failed";
  /** How long it takes to end once deleted or evicted. Default: no time. */
  endsAfterSeconds?: number;
  graceSeconds?: number;
}

/** One pod of every kind in kubectl drain's table. */
export const podKinds = {
  replicaSet: { owner: "ReplicaSet" },
  statefulSet: { owner: "StatefulSet" },
  job: { owner: "Job" },
  bare: {},
  emptyDir: { owner: "ReplicaSet", hasEmptyDir: true },
  daemonSet: { owner: "DaemonSet" },
  daemonSetFinished: { owner: "DaemonSet", phase: "Succeeded" },
  daemonSetGone: { owner: "DaemonSet", isOwnerGone: true },
  mirror: { isMirror: true },
  finished: { owner: "Job", phase: "Succeeded" },
  failed: { phase: "Failed" },
  pending: { owner: "ReplicaSet", phase: "Pending" },
  notReady: { owner: "ReplicaSet", phase: "NotReady" },
  finalizer: { owner: "ReplicaSet", finalizer: "max-group.test/keep" },
} as const satisfies Record<string, Partial<PodOptions>>;
export type PodKind = keyof typeof podKinds;

// --- The cluster -----------------------------------------------------------------------------------------------

export interface ClusterOptions {
  /** Default true. False: whoever is known may do everything. */
  rbac?: boolean;
  /**
   * Who a bearer token is that `tokenKubeconfig` did not make, as EKS asks its own authenticator; undefined is 401.
   * A token once good is taken for ten more seconds, unasked.
   */
  authenticate?: (token: string) => { user: string; groups?: string[] } | undefined;
}

/** Starts a cluster and waits until it serves. Undefined, with a warning, where it is not built; in CI that throws. */
export async function startCluster(options: ClusterOptions = {}): Promise<Cluster | undefined> {
  const programs = [KUBE_APISERVER, ETCD, KWOK, "openssl", "setpriv"];
  if (!areInstalled(`Kubernetes ${KUBE_VERSION}`, programs, "test/kube/build.sh builds it")) return undefined;
  for (let tries = 1; ; tries++) {
    const cluster = new Cluster(options);
    try {
      await cluster.start();
      return cluster;
    } catch (cause) {
      await cluster.stop();
      // Somebody took the port between our look and the server's.
      if (tries === 3 || !`${cause}`.includes("address already in use")) throw new Error("starting Kubernetes", { cause });
    }
  }
}

export class Cluster {
  /** A kubeconfig file that names a client certificate's files, of a user in system:masters. */
  readonly adminKubeconfig: string;
  readonly caFile: string;
  readonly folder: string;
  readonly #removeFolder: () => void;
  readonly #authority: Authority;
  readonly #helper: Certificate;
  readonly #options: ClusterOptions;
  readonly #users = new Map<string, { user: string; groups?: string[] }>();
  readonly #authenticator: Bun.Server<undefined>;
  #port = 0;
  #etcd: ServerProcess | undefined;
  #apiserver: ServerProcess | undefined;
  #kwok: ServerProcess | undefined;

  /** Takes no time; `start` does. */
  constructor(options: ClusterOptions) {
    const { folder, remove } = temporaryFolder("kube");
    this.folder = folder;
    this.#removeFolder = remove;
    this.#options = options;
    this.#authority = new Authority(folder);
    this.caFile = this.#authority.certFile;
    this.#helper = this.#authority.issue("helper", { organization: "system:masters" });
    this.adminKubeconfig = join(folder, "admin.kubeconfig");
    this.#authenticator = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: (request) => this.#review(request) });
  }

  get url(): string {
    return `https://127.0.0.1:${this.#port}`;
  }
  /** For messages and memory: undefined before `start`. */
  get processes(): Record<"etcd" | "apiserver" | "kwok", ServerProcess | undefined> {
    return { etcd: this.#etcd, apiserver: this.#apiserver, kwok: this.#kwok };
  }

  async start(): Promise<void> {
    const { folder } = this;
    [this.#port = 0] = await freePorts(1);
    writeFileSync(
      this.adminKubeconfig,
      this.#kubeconfig("admin", this.#certificateStanza(this.clientCertificate("admin", "system:masters"))),
    );
    this.#writeServerFiles();
    // Sockets, named relative to the folder, need no ports.
    this.#etcd = new ServerProcess(
      "etcd",
      [
        ...[ETCD, "--data-dir=etcd", "--unsafe-no-fsync", "--log-level=warn"],
        ...["--listen-client-urls=unix://client:0", "--advertise-client-urls=unix://client:0"],
        ...["--listen-peer-urls=unix://peer:0", "--initial-advertise-peer-urls=unix://peer:0"],
        "--initial-cluster=default=unix://peer:0",
      ],
      { folder },
    );
    await this.startApiserver();
    writeFileSync(
      join(folder, "kwok.kubeconfig"),
      this.#kubeconfig("kwok", this.#certificateStanza(this.clientCertificate("kwok", "system:masters"))),
    );
    this.#kwok = new ServerProcess(
      "kwok",
      [
        ...[KWOK, "--kubeconfig=kwok.kubeconfig", `--config=${join(import.meta.dir, "kwok.yaml")}`, "--manage-all-nodes"],
        ...["--node-lease-duration-seconds=0", "--node-port=0"],
      ],
      { folder },
    );
    const kwok = this.#kwok;
    await kwok.waitUntil(async () => kwok.log.includes("Watch all nodes"));
  }

  /** Starts it again after `stopApiserver`, on the same port and with the same objects. */
  async startApiserver(): Promise<void> {
    const apiserver = new ServerProcess(
      "apiserver",
      [
        // Without an address of its own it looks for a network, which a test needs not have.
        ...[KUBE_APISERVER, "--advertise-address=127.0.0.1", "--external-hostname=127.0.0.1"],
        ...["--bind-address=127.0.0.1", `--secure-port=${this.#port}`, "--etcd-servers=unix://client:0"],
        ...["--tls-cert-file=apiserver.crt", "--tls-private-key-file=apiserver.key", "--client-ca-file=ca.crt"],
        ...["--anonymous-auth=false", `--authorization-mode=${this.#options.rbac === false ? "AlwaysAllow" : "RBAC"}`],
        ...["--authentication-token-webhook-config-file=authenticator.kubeconfig", "--authentication-token-webhook-version=v1"],
        "--authentication-token-webhook-cache-ttl=0s",
        ...["--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=apiserver.crt"],
        ...["--service-account-signing-key-file=apiserver.key", "--service-cluster-ip-range=10.96.0.0/16"],
        ...["--admission-control=NamespaceLifecycle", "--endpoint-reconciler-type=none", "--enable-priority-and-fairness=false"],
        ...["--audit-policy-file=audit-policy.json", "--audit-log-path=audit.log", "--profiling=false"],
      ],
      { folder: this.folder },
    );
    this.#apiserver = apiserver;
    await apiserver.waitUntil(() => this.#isReady());
  }
  async stopApiserver(): Promise<void> {
    await this.#apiserver?.stop();
  }
  /** Connections are taken and nothing is answered, until `thawApiserver`. */
  freezeApiserver(): void {
    this.#apiserver?.freeze();
  }
  thawApiserver(): void {
    this.#apiserver?.thaw();
  }

  async stop(): Promise<void> {
    await Promise.all([this.#kwok?.stop(), this.#apiserver?.stop(), this.#etcd?.stop()]);
    await this.#authenticator.stop(true);
    this.#removeFolder();
  }

  async #isReady(): Promise<boolean> {
    try {
      // The default namespace is made after the server is ready.
      for (const path of ["/readyz", "/api/v1/namespaces/default"])
        if ((await this.request("GET", path)).status !== 200) return false;
      return true;
    } catch (error) {
      if (error instanceof Error) return false; // nobody listens yet
      throw error;
    }
  }

  #writeServerFiles(): void {
    this.#authority.issue("apiserver", { addresses: ["127.0.0.1"] });
    const authenticator = {
      clusters: [{ name: "test", cluster: { server: `http://127.0.0.1:${this.#authenticator.port}/` } }],
      users: [{ name: "apiserver", user: {} }],
      contexts: [{ name: "test", context: { cluster: "test", user: "apiserver" } }],
      "current-context": "test",
    };
    writeFileSync(join(this.folder, "authenticator.kubeconfig"), JSON.stringify(authenticator));
    const policy = {
      apiVersion: "audit.k8s.io/v1",
      kind: "Policy",
      omitStages: ["RequestReceived"],
      rules: [{ level: "None", users: ["helper", "kwok", "system:apiserver"] }, { level: "Metadata" }],
    };
    writeFileSync(join(this.folder, "audit-policy.json"), JSON.stringify(policy));
  }

  // --- Who may come in

  /** Answers kube-apiserver, which asks who a token is. */
  async #review(request: Request): Promise<Response> {
    const review = (await request.json()) as { apiVersion: string; spec: { token: string } };
    const { token } = review.spec;
    const known = this.#users.get(token) ?? this.#options.authenticate?.(token);
    const status = known
      ? { authenticated: true, user: { username: known.user, groups: known.groups ?? [] } }
      : { authenticated: false };
    return Response.json({ apiVersion: review.apiVersion, kind: "TokenReview", status });
  }

  /** A token that is this user's. */
  token(user: string, groups?: string[]): string {
    const token = `${user}-${crypto.randomUUID()}`;
    this.#users.set(token, { user, groups });
    return token;
  }
  /** Refused from now on, but for ten seconds after it was last good. */
  revoke(token: string): void {
    this.#users.delete(token);
  }

  clientCertificate(user: string, group?: string): Certificate {
    return this.#authority.issue(user, { organization: group });
  }

  /** A service account's token, as a pod has it. The account has to be there. */
  async serviceAccountToken(namespace: string, name: string, seconds = 3600): Promise<string> {
    const path = `/api/v1/namespaces/${namespace}/serviceaccounts/${name}/token`;
    const { body } = await this.must("POST", path, {
      apiVersion: "authentication.k8s.io/v1",
      kind: "TokenRequest",
      spec: { audiences: [], expirationSeconds: seconds },
    });
    if (body.status?.token === undefined) throw new Error(`no token for ${namespace}/${name}`);
    return body.status.token;
  }

  /** A kubeconfig file with everything in it, and a token of this user. */
  tokenKubeconfig(user: string, groups?: string[]): string {
    return this.writeKubeconfig(user, `token: ${this.token(user, groups)}`);
  }

  /**
   * A kubeconfig file for anything else: `user` is what stands under `users[].user`, as YAML or JSON, e.g. an `exec` stanza.
   * Answers its path.
   */
  writeKubeconfig(name: string, user: string): string {
    const path = join(this.folder, `${name.replace(/[^\w.-]/g, "_")}-${crypto.randomUUID().slice(0, 8)}.kubeconfig`);
    const ca = `certificate-authority-data: ${Buffer.from(readFileSync(this.caFile)).toString("base64")}`;
    writeFileSync(path, this.#kubeconfig(name, user, ca), { mode: 0o600 });
    return path;
  }
  #certificateStanza({ certFile, keyFile }: Certificate): string {
    return `client-certificate: ${certFile}\nclient-key: ${keyFile}`;
  }
  #kubeconfig(name: string, user: string, ca = `certificate-authority: ${this.caFile}`): string {
    return `apiVersion: v1
kind: Config
clusters:
  - name: test
    cluster:
      server: ${this.url}
      ${ca}
users:
  - name: ${JSON.stringify(name)}
    user:
      ${user.replaceAll("\n", "\n      ")}
contexts:
  - name: test
    context:
      cluster: test
      user: ${JSON.stringify(name)}
current-context: test
`;
  }

  // --- Talking to it

  /** As an administrator of the tests' own, unless `as` says otherwise. PATCH is a merge patch; a string goes as YAML to apply. */
  async request(method: string, path: string, body?: object | string, as: Caller = this.#helper): Promise<Answer> {
    const headers: Record<string, string> = { accept: "application/json" };
    if (body !== undefined) {
      headers["content-type"] =
        typeof body === "string"
          ? "application/apply-patch+yaml"
          : method === "PATCH"
            ? "application/merge-patch+json"
            : "application/json";
    }
    if (as !== "nobody" && "token" in as) headers.authorization = `Bearer ${as.token}`;
    const response = await fetch(`${this.url}${path}`, {
      method,
      headers,
      body: typeof body === "object" ? JSON.stringify(body) : body,
      // A kept connection would be one to a server that was stopped or frozen since.
      keepalive: false,
      tls: {
        ca: readFileSync(this.caFile, "utf8"),
        ...(as !== "nobody" && "certFile" in as
          ? { cert: readFileSync(as.certFile, "utf8"), key: readFileSync(as.keyFile, "utf8") }
          : {}),
      },
    });
    const text = await response.text();
    const isJson = response.headers.get("content-type")?.startsWith("application/json") ?? false;
    return { status: response.status, headers: response.headers, body: isJson ? (JSON.parse(text) as Body) : { message: text } };
  }

  /** The same, where anything but a 2xx is a fault of the test's. */
  async must(method: string, path: string, body?: object | string): Promise<Answer> {
    const answer = await this.request(method, path, body);
    if (answer.status >= 300) throw new Error(`${method} ${path}: ${answer.status} ${answer.body.message}`);
    return answer;
  }

  async create(object: KubeObject): Promise<KubeObject> {
    return asObject(await this.must("POST", collectionOf(object), object));
  }
  /** Undefined where it is gone. */
  async read(object: KubeObject): Promise<KubeObject | undefined> {
    const answer = await this.request("GET", pathOf(object));
    if (answer.status === 404) return undefined;
    if (answer.status !== 200) throw new Error(`reading ${pathOf(object)}: ${answer.status} ${answer.body.message}`);
    return asObject(answer);
  }
  /** Without a grace period, and waits until it is gone; a finalizer keeps it. */
  async remove(object: KubeObject): Promise<void> {
    await this.must("DELETE", `${pathOf(object)}?gracePeriodSeconds=0`);
    await until(`${object.metadata.name} is gone`, async () => (await this.read(object))?.metadata.uid !== object.metadata.uid);
  }
  async patch(object: KubeObject, patch: object): Promise<KubeObject> {
    return asObject(await this.must("PATCH", pathOf(object), patch));
  }
  async patchStatus(object: KubeObject, status: object): Promise<KubeObject> {
    return asObject(await this.must("PATCH", `${pathOf(object)}/status`, { status }));
  }

  /** As `kubectl apply --server-side -f` does: a manifest of any number of documents. */
  async apply(manifest: string): Promise<void> {
    const documents = manifest.split(/^---\s*$/m).filter((document) => Bun.YAML.parse(document));
    for (const document of documents) {
      const object = Bun.YAML.parse(document) as KubeObject;
      await this.must("PATCH", `${pathOf(object)}?fieldManager=test&force=true`, document);
    }
  }

  // --- What tests put into it

  async makeNode({
    name,
    instanceId,
    zone = "us-east-2a",
    address = "10.0.0.1",
    labels,
    isReady = true,
  }: NodeOptions): Promise<KubeObject> {
    const node = await this.create({
      apiVersion: "v1",
      kind: "Node",
      metadata: { name, labels: { "kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone, ...labels } },
      spec: instanceId === undefined ? {} : { providerID: `aws:///${zone}/${instanceId}` },
    });
    await this.patchStatus(node, {
      addresses: [
        { type: "InternalIP", address },
        { type: "InternalDNS", address: name },
        { type: "Hostname", address: name },
      ],
    });
    return this.setNodeReady(node, isReady);
  }

  async setNodeReady(node: KubeObject, isReady: boolean): Promise<KubeObject> {
    const lastTransitionTime = new Date().toISOString();
    const ready = isReady ? { status: "True", reason: "KubeletReady" } : { status: "Unknown", reason: "NodeStatusUnknown" };
    return this.patchStatus(node, {
      conditions: [{ type: "Ready", lastTransitionTime, lastHeartbeatTime: lastTransitionTime, ...ready }],
    });
  }

  /** A pod on a node, in the phase that was asked for when this answers. */
  async makePod(options: PodOptions): Promise<KubeObject> {
    const { name, node, namespace = "default", phase = "Running" } = options;
    const annotations: Record<string, string> = {};
    if (phase !== "Running") annotations["max-group.test/held"] = "true";
    if (options.endsAfterSeconds !== undefined) annotations["max-group.test/ends-after"] = `${options.endsAfterSeconds}s`;
    if (options.isMirror) {
      annotations["kubernetes.io/config.mirror"] = "0123456789abcdef";
      annotations["kubernetes.io/config.source"] = "file";
    }
    const owner = await this.#ownerReference(options, namespace);
    const spec = {
      nodeName: node,
      containers: [{ name: "main", image: "registry.example/main:1" }],
      ...(options.hasEmptyDir ? { volumes: [{ name: "scratch", emptyDir: {} }] } : {}),
      ...(options.graceSeconds === undefined ? {} : { terminationGracePeriodSeconds: options.graceSeconds }),
    };
    const made = await this.create({
      apiVersion: "v1",
      kind: "Pod",
      metadata: {
        ...{ name, namespace, labels: { app: name, ...options.labels }, annotations },
        ...(owner ? { ownerReferences: [owner] } : {}),
        ...(options.finalizer === undefined ? {} : { finalizers: [options.finalizer] }),
      },
      spec,
    });
    if (phase === "Pending") return made;
    if (phase === "Running") {
      return until(`${name} runs`, async () => {
        const pod = await this.read(made);
        return pod?.status?.phase === "Running" ? pod : undefined;
      });
    }
    const ready = { type: "Ready", status: "False", lastTransitionTime: new Date().toISOString() };
    return this.patchStatus(made, { phase: phase === "NotReady" ? "Running" : phase, conditions: [ready] });
  }

  async #ownerReference({ name, node, owner, ownerName = name, isOwnerGone, isMirror }: PodOptions, namespace: string) {
    if (isMirror) {
      const found = await this.read({ kind: "Node", metadata: { name: node } });
      return { apiVersion: "v1", kind: "Node", name: node, uid: found?.metadata.uid ?? "", controller: true };
    }
    if (owner === undefined) return undefined;
    const apiVersion = owner === "Job" ? "batch/v1" : "apps/v1";
    const metadata = { name: ownerName, namespace };
    const reference = { apiVersion, kind: owner, name: ownerName, controller: true, blockOwnerDeletion: true };
    if (isOwnerGone) return { ...reference, uid: crypto.randomUUID() };
    const labels = { owner: ownerName };
    const template = {
      metadata: { labels },
      spec: {
        containers: [{ name: "main", image: "registry.example/main:1" }],
        ...(owner === "Job" ? { restartPolicy: "Never" } : {}),
      },
    };
    const spec = { template, ...(owner === "Job" ? {} : { selector: { matchLabels: labels } }) };
    const wanted = { apiVersion, kind: owner, metadata };
    const answer = await this.request("POST", collectionOf(wanted), { ...wanted, spec });
    if (answer.status !== 201 && answer.status !== 409) throw new Error(`making ${owner} ${ownerName}: ${answer.body.message}`);
    const found = answer.status === 201 ? asObject(answer) : await this.read(wanted);
    return { ...reference, uid: found?.metadata.uid ?? "" };
  }

  /** A pod of every kind on one node, each named PREFIX-KIND in lower case. */
  async makePodOfEveryKind(node: string, prefix = "pod"): Promise<Record<PodKind, KubeObject>> {
    const made = Object.entries(podKinds).map(async ([kind, options]) => {
      return [kind, await this.makePod({ name: `${prefix}-${kind.toLowerCase()}`, node, ...options })] as const;
    });
    return Object.fromEntries(await Promise.all(made)) as Record<PodKind, KubeObject>;
  }

  /**
   * A budget for the pods with these labels that lets `allowed` more evictions pass; made, or changed where it is there.
   * The API counts down by itself; no controller counts up again. `isStale`: its status is older than its spec.
   */
  async setBudget(
    name: string,
    matchLabels: Record<string, string>,
    allowed: number,
    { isStale = false, namespace = "default" } = {},
  ): Promise<KubeObject> {
    const wanted: KubeObject = { apiVersion: "policy/v1", kind: "PodDisruptionBudget", metadata: { name, namespace } };
    const budget =
      (await this.read(wanted)) ??
      asObject(
        await this.must("POST", collectionOf(wanted), { ...wanted, spec: { minAvailable: 1, selector: { matchLabels } } }),
      );
    return this.patchStatus(budget, {
      observedGeneration: (budget.metadata.generation ?? 1) - (isStale ? 1 : 0),
      ...{ disruptionsAllowed: allowed, currentHealthy: allowed + 1, desiredHealthy: 1, expectedPods: allowed + 1 },
    });
  }

  /** Through policy/v1; 201 is yes. */
  evict(pod: KubeObject, { uid, as }: { uid?: string; as?: Caller } = {}): Promise<Answer> {
    const { name, namespace = "default" } = pod.metadata;
    const eviction = {
      apiVersion: "policy/v1",
      kind: "Eviction",
      metadata: { name, namespace },
      ...(uid === undefined ? {} : { deleteOptions: { preconditions: { uid } } }),
    };
    return this.request("POST", `/api/v1/namespaces/${namespace}/pods/${name}/eviction`, eviction, as);
  }

  /** The names of the pods on a node; by a list, so that those that are ending are named, too. */
  async podsOn(node: string): Promise<string[]> {
    const { body } = await this.must("GET", `/api/v1/pods?fieldSelector=spec.nodeName%3D${node}`);
    return (body.items ?? []).map((pod) => pod.metadata.name).sort();
  }

  async waitUntilGone(object: KubeObject, seconds?: number): Promise<void> {
    const { name, uid } = object.metadata;
    await until(`${name} is gone`, async () => (await this.read(object))?.metadata.uid !== uid, seconds);
  }

  /** What clients asked for so far, in order of the answers. */
  calls(): Call[] {
    const file = join(this.folder, "audit.log");
    if (!existsSync(file)) return [];
    const lines = readFileSync(file, "utf8").split("\n").slice(0, -1);
    return lines.map((line) => {
      const event = JSON.parse(line) as {
        user: { username?: string };
        verb: string;
        requestURI: string;
        responseStatus?: { code?: number };
      };
      return { user: event.user.username ?? "", verb: event.verb, uri: event.requestURI, code: event.responseStatus?.code ?? 0 };
    });
  }
}

/** An answer that is known to be an object. */
function asObject({ body }: Answer): KubeObject {
  const { metadata, apiVersion, kind, spec, status } = body;
  if (metadata === undefined) throw new Error(`no object: ${JSON.stringify(body)}`);
  return { apiVersion, kind, metadata, spec, status };
}

// A real Consul for tests: one server and a client agent for each "instance", every one on a loopback address of its
// own with the same HTTP port, as on instances with their own private addresses. `make` builds it
// (test/consul/build.sh); nothing is installed here.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  Authority,
  areInstalled,
  CACHE,
  type Certificate,
  freePorts,
  ServerProcess,
  temporaryFolder,
  until,
} from "../kube/servers.ts";

/** As pinned in go.mod, which is what was built. */
const CONSUL_VERSION =
  /\sgithub\.com\/hashicorp\/consul v(\S+)/.exec(readFileSync(join(import.meta.dir, "go.mod"), "utf8"))?.[1] ?? "?";
const CONSUL = join(CACHE, `consul-${CONSUL_VERSION}`, "bin", "consul");

export interface AgentsOptions {
  /** One client agent each, all in 127.0.0.0/8, not 127.0.0.1 where anything else may listen. */
  addresses: string[];
  /** The server's own. Default 127.0.0.10. */
  server?: string;
  /** Deny what no token allows; default: no ACLs. */
  acl?: boolean;
  /** HTTPS, and no HTTP, on the agents' port; the certificates are by `caFile`. */
  tls?: boolean;
  /** The certificates are for this name and no address, as those of `consul tls cert create` are. */
  serverName?: string;
  /** The agents take only clients with a certificate: `client`. */
  mutual?: boolean;
}

export interface Service {
  /** Default: the name. Unique on its agent only. */
  id?: string;
  name: string;
  port?: number;
  tags?: string[];
}

/** A service in the catalogue, which is what clients of Consul see. */
export interface Registration {
  address: string;
  id: string;
  name: string;
}

export interface Answer {
  status: number;
  /** JSON where it was JSON, else text, as Consul's errors are. */
  body: unknown;
}

/** False, with a warning, where Consul is not built; in CI that throws. */
export const isConsulInstalled = () =>
  areInstalled(`Consul ${CONSUL_VERSION}`, [CONSUL, "openssl", "setpriv"], "test/consul/build.sh builds it");

/** Starts them, and waits until every agent has joined. Undefined where Consul is not built. */
export async function startAgents(options: AgentsOptions): Promise<Agents | undefined> {
  if (!isConsulInstalled()) return undefined;
  for (let tries = 1; ; tries++) {
    const agents = new Agents(options);
    try {
      await agents.start();
      return agents;
    } catch (cause) {
      await agents.stop();
      // Somebody took a port between our look and the agent's.
      if (tries === 3 || !`${cause}`.includes("address already in use")) throw new Error("starting Consul", { cause });
    }
  }
}

export class Agents {
  /** The same on every address: what goes into `consul_port`. 0 before `start`. */
  port = 0;
  /** May do everything; undefined without ACLs. */
  readonly bootstrapToken: string | undefined;
  /** Undefined without TLS. */
  readonly caFile: string | undefined;
  readonly folder: string;
  readonly addresses: string[];
  readonly #server: string;
  readonly #authority: Authority | undefined;
  readonly #serverName: string | undefined;
  /** With `mutual`. */
  readonly client: Certificate | undefined;
  readonly #processes = new Map<string, ServerProcess>();
  readonly #removeFolder: () => void;
  #ports = { server: 0, gossip: 0 };

  /** Takes no time; `start` does. */
  constructor({ addresses, server = "127.0.0.10", acl = false, tls = false, serverName, mutual = false }: AgentsOptions) {
    const { folder, remove } = temporaryFolder("consul");
    this.folder = folder;
    this.#removeFolder = remove;
    this.addresses = addresses;
    this.#server = server;
    this.bootstrapToken = acl ? crypto.randomUUID() : undefined;
    this.#authority = tls ? new Authority(folder) : undefined;
    this.caFile = this.#authority?.certFile;
    this.#serverName = serverName;
    this.client = mutual ? this.#authority?.issue("client") : undefined;
  }

  async start(): Promise<void> {
    const all = [this.#server, ...this.addresses];
    const [http = 0, server = 0, gossip = 0] = await freePorts(3, all);
    this.port = http;
    this.#ports = { server, gossip };
    await this.startAgent(this.#server);
    await Promise.all(this.addresses.map((address) => this.startAgent(address)));
  }

  /** Starts one again after `stopAgent`, with what it had registered. */
  async startAgent(address: string): Promise<void> {
    const isServer = address === this.#server;
    const config = join(this.folder, `${address}.json`);
    writeFileSync(config, JSON.stringify(this.#configOf(address, isServer)));
    const command = [CONSUL, "agent", `-config-file=${config}`, `-data-dir=${join(this.folder, address)}`];
    const agent = new ServerProcess(address, command, { folder: this.folder });
    this.#processes.set(address, agent);
    await agent.waitUntil(() => this.#isReady(address));
  }

  #configOf(address: string, isServer: boolean): object {
    const { port, bootstrapToken } = this;
    const { server, gossip } = this.#ports;
    const names = this.#serverName === undefined ? { addresses: [address] } : { names: [this.#serverName] };
    const certificate = this.#authority?.issue(address, names);
    return {
      node_name: `node-${address}`,
      ...{ bind_addr: address, client_addr: address, advertise_addr: address },
      ...(isServer ? { server: true, bootstrap: true } : { server: false, retry_join: [`${this.#server}:${gossip}`] }),
      retry_interval: "250ms",
      ports: {
        ...(certificate ? { http: -1, https: port } : { http: port, https: -1 }),
        ...{ server, serf_lan: gossip, serf_wan: -1, dns: -1, grpc: -1, grpc_tls: -1 },
      },
      ...(certificate
        ? {
            tls: {
              https: {
                ...{ ca_file: this.caFile, cert_file: certificate.certFile, key_file: certificate.keyFile },
                verify_incoming: this.client !== undefined,
              },
            },
          }
        : {}),
      ...(bootstrapToken === undefined
        ? {}
        : {
            acl: {
              enabled: true,
              default_policy: "deny",
              tokens: { initial_management: bootstrapToken, agent: bootstrapToken },
            },
          }),
      // As fast as on one host it can be: else an election takes ten seconds, and a death twenty to be noticed.
      performance: { raft_multiplier: 1 },
      gossip_lan: { gossip_interval: "100ms", probe_interval: "200ms", probe_timeout: "100ms", suspicion_mult: 2 },
      ...{ connect: { enabled: false }, peering: { enabled: false } },
      ...{ disable_update_check: true, disable_anonymous_signature: true, disable_remote_exec: true },
      ...{ log_level: "warn", limits: { http_max_conns_per_client: 1000 } },
    };
  }

  /** Once the agent can write through the server, and has told the catalogue of itself. */
  async #isReady(address: string): Promise<boolean> {
    try {
      const { status, body } = await this.request(address, "GET", `/v1/catalog/node/node-${address}`);
      return status === 200 && body !== null;
    } catch (error) {
      if (error instanceof Error) return false; // nobody listens yet
      throw error;
    }
  }

  /** `http://ADDRESS:PORT`, or https. */
  url(address: string): string {
    return `${this.#authority ? "https" : "http"}://${address}:${this.port}`;
  }

  /** With the bootstrap token, unless `token` is another one, or null for none. */
  async request(
    address: string,
    method: string,
    path: string,
    {
      body,
      token = this.bootstrapToken ?? null,
      timeoutMs = 10_000,
    }: { body?: object; token?: string | null; timeoutMs?: number } = {},
  ): Promise<Answer> {
    const response = await fetch(`${this.url(address)}${path}`, {
      method,
      headers: token === null ? {} : { "x-consul-token": token },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(timeoutMs),
      keepalive: false, // else a connection of before a freeze or a stop
      tls: this.#tls(),
    });
    const text = await response.text();
    const isJson = response.headers.get("content-type")?.startsWith("application/json") ?? false;
    return { status: response.status, body: isJson ? JSON.parse(text) : text };
  }
  #tls(): BunFetchRequestInit["tls"] {
    const read = (file: string) => readFileSync(file, "utf8");
    if (this.caFile === undefined) return undefined;
    return {
      ca: read(this.caFile),
      ...(this.client && { cert: read(this.client.certFile), key: read(this.client.keyFile) }),
      ...(this.#serverName !== undefined && { serverName: this.#serverName }),
    };
  }
  async #must(address: string, method: string, path: string, body?: object): Promise<unknown> {
    const answer = await this.request(address, method, path, { body });
    if (answer.status !== 200) throw new Error(`${method} ${path} at ${address}: ${answer.status} ${answer.body}`);
    return answer.body;
  }

  /** At one agent. It is in the catalogue a moment later: `waitForCatalogue`. */
  async register(address: string, { id, name, port = 80, tags = [] }: Service): Promise<void> {
    await this.#must(address, "PUT", "/v1/agent/service/register", { ID: id ?? name, Name: name, Port: port, Tags: tags });
  }
  /** The IDs at one agent, sorted. */
  async services(address: string): Promise<string[]> {
    return Object.keys((await this.#must(address, "GET", "/v1/agent/services")) as Record<string, unknown>).sort();
  }

  /** All that the server knows of, but Consul itself; sorted by address and ID. */
  async catalogue(): Promise<Registration[]> {
    const names = (await this.#must(this.#server, "GET", "/v1/catalog/services")) as Record<string, string[]>;
    const found = Object.keys(names).filter((name) => name !== "consul");
    const lists = found.map((name) => this.#must(this.#server, "GET", `/v1/catalog/service/${encodeURIComponent(name)}`));
    const entries = (await Promise.all(lists)).flat() as { Address: string; ServiceID: string; ServiceName: string }[];
    return entries
      .map((entry) => ({ address: entry.Address, id: entry.ServiceID, name: entry.ServiceName }))
      .sort((a, b) => a.address.localeCompare(b.address) || a.id.localeCompare(b.id));
  }
  /** Until the services of an address are these IDs, sorted, in the catalogue. */
  async waitForCatalogue(address: string, ids: string[], seconds = 40): Promise<void> {
    const wanted = ids.join(" ");
    await until(
      `the catalogue has "${wanted}" at ${address}`,
      async () => (await this.catalogue()).flatMap((entry) => (entry.address === address ? [entry.id] : [])).join(" ") === wanted,
      seconds,
    );
  }
  /** What other nodes know of an agent's node, once it died, left or came back. */
  async isInCatalogue(address: string): Promise<boolean> {
    const nodes = (await this.#must(this.#server, "GET", "/v1/catalog/nodes")) as { Address: string }[];
    return nodes.some((node) => node.Address === address);
  }

  /** A token that may do what the rules say, in Consul's policy language; it is known to every agent at once. */
  async token(rules: string): Promise<string> {
    const policy = (await this.#must(this.#server, "PUT", "/v1/acl/policy", {
      Name: `test-${crypto.randomUUID()}`,
      Rules: rules,
    })) as { ID: string };
    const token = (await this.#must(this.#server, "PUT", "/v1/acl/token", { Policies: [{ ID: policy.ID }] })) as {
      SecretID: string;
    };
    return token.SecretID;
  }

  /** It takes connections and answers nothing, until `thaw`. Others take it for dead after a second or two. */
  freeze(address: string): void {
    this.#processes.get(address)?.freeze();
  }
  thaw(address: string): void {
    this.#processes.get(address)?.thaw();
  }
  /** Killed: connections are refused. Its services stay in the catalogue, as critical. */
  async stopAgent(address: string): Promise<void> {
    await this.#processes.get(address)?.stop();
  }

  async stop(): Promise<void> {
    await Promise.all([...this.#processes.values()].map((agent) => agent.stop()));
    this.#removeFolder();
  }
}

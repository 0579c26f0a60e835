// A small Consul for scenarios under virtual time: an agent at every address. Real agents are in test/consul.
import type { Stage } from "./harness.ts";

// What stands in the environment here is nobody's in a scenario.
for (const name of Object.keys(process.env).filter((variable) => variable.startsWith("CONSUL_"))) delete process.env[name];

export const CONSUL_PORT = 8500;

/** One agent for every address: what each was asked, and what it has left. */
export class Agents {
  readonly services = new Map<string, Set<string>>();
  readonly maintained = new Set<string>();
  readonly asked: string[] = [];
  self: object = {};
  /** Answers in the agent's place. */
  instead: ((path: string, init: BunFetchRequestInit, address: string) => Promise<Response | undefined> | undefined) | undefined;

  constructor(s: Stage, members: string[]) {
    for (const id of members) this.services.set(s.world.instance(id).privateIp, new Set(["web", "api 1/a"]));
    const other = s.http;
    s.http = async (url, init = {}) => {
      const { hostname, port, pathname, search } = new URL(url);
      if (!pathname.startsWith("/v1/agent/")) return other(url, init);
      if (port !== `${CONSUL_PORT}`) throw new Error(`an agent was asked at port ${port}`);
      this.asked.push(`${init.method} ${hostname} ${pathname}`);
      return (await this.instead?.(pathname, init, hostname)) ?? this.#answer(hostname, pathname, search);
    };
  }
  #answer(address: string, path: string, query: string): Response {
    const services = this.services.get(address) ?? new Set();
    if (path === "/v1/agent/self") return Response.json(this.self);
    if (path === "/v1/agent/services") return Response.json(Object.fromEntries([...services].map((id) => [id, { ID: id }])));
    if (path === "/v1/agent/maintenance" && query.startsWith("?enable=true&reason=")) {
      this.maintained.add(address);
      return new Response("");
    }
    const id = /^\/v1\/agent\/service\/deregister\/([^/]+)$/.exec(path)?.[1];
    if (id && services.delete(decodeURIComponent(id))) return new Response("");
    return new Response("Unknown service ID. Ensure that the service ID is passed, not the service name.", { status: 404 });
  }
}

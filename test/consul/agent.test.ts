// That the agents of test/consul do what its tests rely on.
import { afterAll, describe, expect, test } from "bun:test";
import { until } from "../kube/servers.ts";
import { type Agents, startAgents } from "./agent.ts";

const [A, B] = ["127.0.0.11", "127.0.0.12"];
const started = await startAgents({ addresses: [A, B] });
const secured = await startAgents({ addresses: ["127.0.0.21"], server: "127.0.0.20", acl: true, tls: true });
const agents = started as Agents; // neither is touched where they are undefined
const locked = secured as Agents;
afterAll(() => Promise.all([started?.stop(), secured?.stop()]));

describe.skipIf(started === undefined)("agents", () => {
  test("a service is registered at its own agent, and in the catalogue of all", async () => {
    await agents.register(A, { name: "web", id: "web-1", port: 80 });
    await agents.register(A, { name: "web", id: "web-2", port: 81 });
    await agents.register(B, { name: "web", id: "web-1", port: 80 });
    expect(await agents.services(A)).toEqual(["web-1", "web-2"]);
    await agents.waitForCatalogue(A, ["web-1", "web-2"]);
    await agents.waitForCatalogue(B, ["web-1"]);
    expect(await agents.catalogue()).toContainEqual({ address: B, id: "web-1", name: "web" });
  });

  test("a service that was deregistered is gone from the catalogue, and deregistering it again is 404", async () => {
    const deregister = () => agents.request(A, "PUT", "/v1/agent/service/deregister/web-2");
    expect((await deregister()).status).toBe(200);
    await agents.waitForCatalogue(A, ["web-1"]);
    expect(await deregister()).toMatchObject({ status: 404, body: expect.stringContaining("Unknown service ID") });
    expect(await agents.services(B)).toEqual(["web-1"]);
  });

  test("a frozen agent takes the connection and answers nothing, then all that it missed", async () => {
    agents.freeze(B);
    await expect(agents.request(B, "GET", "/v1/agent/services", { timeoutMs: 1_000 })).rejects.toThrow("timed out");
    await Bun.sleep(1_200);
    agents.thaw(B);
    await until("it answers", async () => (await agents.services(B)).includes("web-1"));
  });

  test("a stopped agent refuses the connection, and knows its services when it is started again", async () => {
    await agents.stopAgent(B);
    await expect(agents.request(B, "GET", "/v1/agent/services")).rejects.toThrow();
    expect(await agents.isInCatalogue(B)).toBe(true);
    await agents.startAgent(B);
    expect(await agents.services(B)).toEqual(["web-1"]);
  });
});

describe.skipIf(secured === undefined)("with ACLs and TLS", () => {
  const address = "127.0.0.21";
  const deregister = (token?: string | null) => locked.request(address, "PUT", "/v1/agent/service/deregister/web", { token });

  test("without a token the list is empty and a deregistration is 403", async () => {
    await locked.register(address, { name: "web" });
    expect(await locked.request(address, "GET", "/v1/agent/services", { token: null })).toEqual({ status: 200, body: {} });
    expect((await deregister(null)).status).toBe(403);
    expect(await locked.services(address)).toEqual(["web"]);
  });

  test("a token that may only read sees the service and may not deregister it; one that may write may", async () => {
    const reader = await locked.token(`service_prefix "" { policy = "read" }`);
    const list = await locked.request(address, "GET", "/v1/agent/services", { token: reader });
    expect(Object.keys(list.body as object)).toEqual(["web"]);
    expect((await deregister(reader)).status).toBe(403);
    const writer = await locked.token(`service_prefix "" { policy = "write" }`);
    expect((await deregister(writer)).status).toBe(200);
    await locked.waitForCatalogue(address, []);
  });

  test("the agent speaks HTTPS only, by a certificate of its own authority", async () => {
    expect(locked.url(address)).toBe(`https://${address}:${locked.port}`);
    await expect(fetch(`${locked.url(address)}/v1/agent/self`, { keepalive: false })).rejects.toThrow();
    const plain = await fetch(`http://${address}:${locked.port}/v1/agent/self`).then(
      ({ status }) => status,
      () => "nothing",
    );
    expect([400, "nothing"]).toContain(plain);
  });
});

// The compiled binary, the simulated AWS over HTTP, and real Consul agents at the instances' own addresses: one
// interruption from event to detach, with the services gone from the catalogue before the detach, or not, and why.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { only, onStage, type Scene } from "../e2e/harness.ts";
import { type Agents, type AgentsOptions, type Registration, startAgents } from "./agent.ts";

const LIMIT_MS = 120_000;
/** The old instance's, its replacement's, and another member's. */
const [OLD, NEW, OTHER] = ["127.0.77.11", "127.0.77.12", "127.0.77.13"];
const addresses = [OLD, NEW, OTHER];
const options = (n: number, more: Partial<AgentsOptions>): AgentsOptions => ({ addresses, server: `127.0.77.${n}`, ...more });

const plain = await startAgents(options(100, {}));
const started = [plain];
afterAll(() => Promise.all(started.map((agents) => agents?.stop())));
/** Started one after another, and only where the first could be: each takes seconds of a core. */
function describeWith(title: string, more: Partial<AgentsOptions>, n: number, tests: (agents: () => Agents) => void): void {
  describe.skipIf(plain === undefined)(title, () => {
    let agents: Agents | undefined;
    beforeAll(async () => {
      agents = await startAgents(options(n, more));
      started.push(agents);
    }, LIMIT_MS);
    afterAll(() => agents?.stop());
    tests(() => agents as Agents);
  });
}

type Story = {
  /** How long the detach was asked for after the replacement was in service and the old one's time to go had come. */
  detachAtMs: number;
  /** The catalogue at that moment, before the effect. */
  catalogue: Registration[];
  warnings: string[];
  lines: string[];
};
/** One interruption; the old instance, its replacement and another member have the agents' addresses. */
async function interruption(
  agents: Agents,
  env: Record<string, string>,
  before?: () => Promise<unknown> | undefined,
): Promise<Story> {
  for (const address of addresses) {
    await agents.register(address, { name: "web", id: "web-1" });
    await agents.register(address, { name: "api", id: "api/v1 a" });
    await agents.waitForCatalogue(address, ["api/v1 a", "web-1"]);
  }
  let story: Story | undefined;
  await onStage(async (s: Scene) => {
    Object.assign(s.env, env);
    const [old = "", other = ""] = s.group(
      { name: "web", min: 2, max: 6, desired: 3 },
      { consul_port: agents.port, detaching_delay_seconds: 4 },
    );
    s.world.instance(old).privateIp = OLD;
    s.world.instance(other).privateIp = OTHER;
    const catalogue = Promise.withResolvers<Registration[]>();
    let detachAtMs = Number.NaN;
    s.world.intercept = ({ operation }) => {
      for (const claim of s.claims()) claim.privateIp = NEW;
      if (operation !== "DetachInstances") return undefined;
      detachAtMs = Date.now();
      catalogue.resolve(agents.catalogue());
      return { delayMs: 500 }; // time to look before the effect
    };
    const { daemon } = await s.start();
    await before?.();
    const noticedMs = Date.now();
    s.interrupt(old);
    await s.finish([old]);
    const inServiceMs =
      s.world.audit.find((a) => a.what === "in service" && a.ids.includes(only(s.claims()).id))?.atMs ?? Number.NaN;
    story = {
      detachAtMs: detachAtMs - Math.max(inServiceMs, noticedMs + 4_000),
      catalogue: await catalogue.promise,
      warnings: daemon.lines.filter((line) => /level=warning/.test(line) && /Consul|agent/.test(line)),
      lines: daemon.lines,
    };
  });
  if (!story) throw new Error("the story has no end");
  return story;
}
const at = (catalogue: Registration[], address: string) =>
  catalogue.flatMap((entry) => (entry.address === address ? [entry.id] : []));
const both = ["api/v1 a", "web-1"];
/** Gone where they were to go, and there where they were to stay. */
async function expectGone(agents: Agents, { catalogue, warnings, lines }: Story): Promise<void> {
  expect(warnings).toEqual([]);
  expect(addresses.map((address) => at(catalogue, address))).toEqual([[], both, both]);
  expect(await agents.services(OLD)).toEqual([]);
  for (const address of [NEW, OTHER]) expect(await agents.services(address)).toEqual(both);
  expect(lines.filter((line) => /deregistered 2 services/.test(line))).toHaveLength(1);
  const checks = async (address: string) =>
    Object.keys((await agents.request(address, "GET", "/v1/agent/checks")).body as object).filter((id) =>
      id.includes("maintenance"),
    );
  expect(await Promise.all(addresses.map(checks))).toEqual([["_node_maintenance"], [], []]);
  await agents.request(OLD, "PUT", "/v1/agent/maintenance?enable=false");
}
/** Still there, at the cost of one warning and a few seconds. */
function expectGoneOn({ catalogue, warnings, detachAtMs }: Story, text: RegExp): void {
  expect(at(catalogue, OLD)).toEqual(both);
  expect(warnings).toEqual([expect.stringMatching(text)]);
  expect(detachAtMs).toBeLessThan(3_000 + 2_500); // the loop looks once a second, and the detach takes a call or two
}

describe.skipIf(plain === undefined)("an agent as it is installed", () => {
  const agents = plain as Agents;

  test(
    "its services are gone from the catalogue before the detach, and nobody else's are",
    async () => {
      await expectGone(agents, await interruption(agents, {}));
    },
    LIMIT_MS,
  );

  test(
    "frozen, it costs three seconds and a warning",
    async () => {
      const story = await interruption(agents, {}, async () => agents.freeze(OLD));
      agents.thaw(OLD);
      expectGoneOn(story, /no answer in 3 s/);
      expect(story.detachAtMs).toBeGreaterThan(2_500);
    },
    LIMIT_MS,
  );

  test(
    "gone, it costs a warning",
    async () => {
      const story = await interruption(agents, {}, () => agents.stopAgent(OLD));
      expectGoneOn(story, /ConnectionRefused|Unable to connect/);
      expect(story.detachAtMs).toBeLessThan(2_500);
      await agents.startAgent(OLD);
    },
    LIMIT_MS,
  );
});

describeWith("ACLs", { acl: true }, 101, (agents) => {
  test(
    "without a token the list is empty, and that is said",
    async () => {
      expectGoneOn(await interruption(agents(), {}), /maintenance mode: 403 .*none without CONSUL_HTTP_TOKEN/);
    },
    LIMIT_MS,
  );

  test(
    "a token that may only read gets no further",
    async () => {
      const token = await agents().token(`service_prefix "" { policy = "read" }`);
      expectGoneOn(await interruption(agents(), { CONSUL_HTTP_TOKEN: token }), /deregistering .*403/);
    },
    LIMIT_MS,
  );

  test(
    "the least that is needed, from a file",
    async () => {
      const token = await agents().token(
        `service_prefix "" { policy = "write" } node_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }`,
      );
      const file = join(agents().folder, "token");
      writeFileSync(file, `${token}\n`);
      await expectGone(agents(), await interruption(agents(), { CONSUL_HTTP_TOKEN_FILE: file, CONSUL_HTTP_TOKEN: "wrong" }));
    },
    LIMIT_MS,
  );
});

describeWith(
  "TLS, by certificates for a name as Consul makes them, for clients with one only",
  { tls: true, mutual: true, serverName: "client.dc1.consul" },
  102,
  (agents) => {
    const env = (without: string[] = []) => {
      const { caFile = "", client } = agents();
      const all = {
        CONSUL_HTTP_SSL: "true",
        CONSUL_CACERT: caFile,
        CONSUL_CLIENT_CERT: client?.certFile ?? "",
        CONSUL_CLIENT_KEY: client?.keyFile ?? "",
        CONSUL_TLS_SERVER_NAME: "client.dc1.consul",
      };
      return Object.fromEntries(Object.entries(all).filter(([name]) => !without.includes(name)));
    };

    test(
      "with authority, certificate and server name all services leave",
      async () => {
        await expectGone(agents(), await interruption(agents(), env()));
      },
      LIMIT_MS,
    );

    test(
      "without the check of the server's certificate too",
      async () => {
        const story = await interruption(agents(), {
          ...env(["CONSUL_CACERT", "CONSUL_TLS_SERVER_NAME"]),
          CONSUL_HTTP_SSL_VERIFY: "false",
        });
        await expectGone(agents(), story);
      },
      LIMIT_MS,
    );

    test.each([
      ["its authority", ["CONSUL_CACERT"], /certificate/i],
      ["the server's name", ["CONSUL_TLS_SERVER_NAME"], /ERR_TLS_CERT_ALTNAME_INVALID|altname|certificate/i],
      ["a certificate of our own", ["CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"], /./],
      ["HTTPS", ["CONSUL_HTTP_SSL"], /400|HTTP/],
    ])(
      "without %s it costs a warning",
      async (_, without, text) => {
        expectGoneOn(await interruption(agents(), env(without)), text);
      },
      LIMIT_MS,
    );
  },
);

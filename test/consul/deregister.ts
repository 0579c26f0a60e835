// One interruption from event to detach, by the compiled binary, the simulated AWS over HTTP, and real Consul agents at the
// instances' own addresses: with the services gone from the catalogue before the detach, or not, and why.
import { afterAll, beforeAll, describe, expect } from "bun:test";
import { only, onStage, type Scene } from "../e2e/harness.ts";
import { leastMs } from "../kube/servers.ts";
import { type Agents, type AgentsOptions, isConsulInstalled, type Registration, startAgents } from "./agent.ts";

export const LIMIT_MS = 180_000;

/** Agents of its own at 127.0.NETWORK.x: the old instance's, its replacement's, and another member's. */
export function describeWith(
  title: string,
  more: Partial<AgentsOptions>,
  network: number,
  tests: (agents: () => Agents) => void,
): void {
  const on = (host: number) => `127.0.${network}.${host}`;
  describe.skipIf(!isConsulInstalled())(title, () => {
    let agents: Agents | undefined;
    beforeAll(async () => {
      agents = await startAgents({ addresses: [11, 12, 13].map(on), server: on(100), ...more });
    }, LIMIT_MS);
    afterAll(() => agents?.stop());
    tests(() => agents as Agents);
  });
}

/** On a busy machine an answer may take longer, and is rightly not waited for: such a story is told again. */
export const isHeldUp = (scene: Scene) => scene.daemons.some((daemon) => daemon.has("no answer in 3 s"));

type Story = {
  /** How long the detach was asked for after the replacement was in service and the old one's time to go had come. */
  detachAtMs: number;
  /** The catalogue at that moment, before the effect. */
  catalogue: Registration[];
  isHeldUp: boolean;
  warnings: string[];
  lines: string[];
};
/**
 * One interruption; the old instance, its replacement and another member have the agents' addresses. `isGoing`: the old
 * one's services are to be gone, and the detach waits a while for that.
 */
async function interruption(
  agents: Agents,
  env: Record<string, string>,
  { isGoing = false, before }: { isGoing?: boolean; before?: () => Promise<unknown> | undefined } = {},
): Promise<Story> {
  const [OLD = "", NEW = "", OTHER = ""] = agents.addresses;
  for (const address of agents.addresses) {
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
      const look = async () => {
        // The agent answers a deregistration first, and tells the catalogue then.
        if (isGoing && !isHeldUp(s)) await agents.waitForCatalogue(OLD, [], 25).catch(() => undefined); // the look will tell
        return agents.catalogue();
      };
      const seen = look();
      catalogue.resolve(seen);
      return { wait: seen };
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
      isHeldUp: isHeldUp(s),
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
/** With this environment they are gone where they were to go, and there where they were to stay. */
export async function expectGone(agents: Agents, env: Record<string, string>): Promise<void> {
  const { addresses } = agents;
  const [OLD = "", NEW = "", OTHER = ""] = addresses;
  const tell = () => interruption(agents, env, { isGoing: true });
  let story = await tell();
  for (let tries = 1; tries < 3 && story.isHeldUp; tries++) {
    await agents.request(OLD, "PUT", "/v1/agent/maintenance?enable=false");
    story = await tell();
  }
  const { catalogue, warnings, lines } = story;
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
/**
 * With this environment they are still there, at the cost of one warning and of so many milliseconds: below `limitMs`, as
 * often as it takes where the machine is busy, and returned.
 */
export async function expectGoneOn(
  agents: Agents,
  env: Record<string, string>,
  text: RegExp,
  {
    limitMs = 3_000 + 4_000, // the loop looks once a second, and the detach takes a call or two
    before,
    after,
  }: { limitMs?: number; before?: () => Promise<unknown> | undefined; after?: () => Promise<unknown> | undefined } = {},
): Promise<number> {
  const tookMs = await leastMs(limitMs, async () => {
    try {
      const { catalogue, warnings, detachAtMs, isHeldUp } = await interruption(agents, env, { before });
      if (isHeldUp && !text.test("no answer in 3 s")) return Number.POSITIVE_INFINITY;
      expect(at(catalogue, agents.addresses[0] ?? "")).toEqual(both);
      expect(warnings).toEqual([expect.stringMatching(text)]);
      return detachAtMs;
    } finally {
      await after?.();
    }
  });
  expect(tookMs).toBeLessThan(limitMs);
  return tookMs;
}

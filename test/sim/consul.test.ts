// Services leave Consul before their instance leaves its group, at whatever the agent does; time is virtual, the agents
// are a few lines. Real ones: test/consul.
import { afterEach, expect, test } from "bun:test";
import { AwsError } from "../aws/world.ts";
import { Agents } from "./consul.ts";
import { Stage } from "./harness.ts";

const three = { min: 3, max: 5, desired: 3 };
const options = { consul_port: 8500 };
const first = <T>(list: readonly T[]): T => {
  const [one] = list;
  if (one === undefined) throw new Error("nothing there");
  return one;
};

function fleet(more: object = {}, groupOptions: object = options) {
  const s = new Stage();
  const members = s.group({ name: "web", ...three, ...more }, groupOptions);
  const old = first(members);
  const agents = new Agents(s, members);
  return { s, members, old, agents, address: s.world.instance(old).privateIp };
}
/** Calls `look` at each detach, before its effect. */
function atDetach(s: Stage, look: () => void): void {
  s.world.intercept = ({ operation }) => {
    if (operation === "DetachInstances") look();
    return undefined;
  };
}
const warnings = (s: Stage) => s.lines.filter((line) => line.startsWith("WARN") && /Consul|agent/.test(line));
afterEach(() => {
  delete process.env.CONSUL_HTTP_TOKEN;
});

test("all services of the old instance are deregistered before it is detached, and those of others stay", async () => {
  const { s, members, old, agents, address } = fleet();
  await s.start();
  let [left, maintained] = [Number.NaN, false];
  atDetach(s, () => {
    left = agents.services.get(address)?.size ?? Number.NaN;
    maintained = agents.maintained.has(address);
  });
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect([left, maintained]).toEqual([0, true]);
  expect([...agents.maintained]).toEqual([address]);
  for (const id of members.slice(1)) expect(agents.services.get(s.world.instance(id).privateIp)?.size).toBe(2);
  expect(agents.asked.filter((line) => !line.includes(` ${address} `))).toEqual([]);
  const order = agents.asked.map((line) => line.split("/v1/agent/")[1]?.split("/")[0]);
  expect(order.indexOf("maintenance")).toBeLessThan(order.indexOf("services"));
  expect(warnings(s)).toEqual([]);
});

test("a slow agent is waited for", async () => {
  const { s, old, agents, address } = fleet();
  await s.start();
  const answer = s.http;
  s.http = (url, init) => s.clock.sleep(500).then(() => answer(url, init));
  let left = Number.NaN;
  atDetach(s, () => {
    left = agents.services.get(address)?.size ?? Number.NaN;
  });
  s.world.interrupt(old);
  await s.quiet();
  expect(left).toBe(0);
});

test("of several detach messages for one instance none goes on to the detach while another one asks its agent", async () => {
  const { s, old, agents, address } = fleet({}, { ...options, detaching_delay_seconds: 60 });
  await s.start();
  const answer = s.http;
  s.http = (url, init) => s.clock.sleep(500).then(() => answer(url, init));
  const left: unknown[] = [];
  atDetach(s, () => left.push(agents.services.get(address)?.size));
  s.world.interrupt(old);
  await s.seconds(30);
  // Two more, as notices that came twice leave them, due a moment later.
  const message = first([...(s.world.sqs.queues.get(s.queues.detach)?.messages.values() ?? [])]);
  await s.clock.advance(message.visibleAtMs - s.clock.now());
  for (let n = 0; n < 2; n++) {
    await s.clock.advance(300);
    s.world.sendRaw(s.queues.detach, message.body);
  }
  await s.quiet();
  expect(left).toEqual([0]);
});

test("an instance that somebody else took out of its group is none of ours", async () => {
  const { s, old, agents } = fleet({}, { ...options, detaching_delay_seconds: 60 });
  await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.until(() => s.world.audit.some((a) => a.what === "in service"), 60);
  const input = { AutoScalingGroupName: "web", InstanceIds: [old], ShouldDecrementDesiredCapacity: true };
  await s.call("autoscaling", "DetachInstances", input);
  await s.quiet();
  expect(agents.asked).toEqual([]);
});

test("without consul_port nothing is asked", async () => {
  const { s, old, agents } = fleet({}, {});
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  expect(agents.asked).toEqual([]);
});

test("a replacement without a hard deadline deregisters too", async () => {
  const { s, old, agents, address } = fleet({}, { ...options, is_to_handle_rebalance_event: true });
  await s.start();
  s.world.rebalance(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(agents.services.get(address)?.size).toBe(0);
});

test("one that stays beside its replacement, for the minimum refuses the decrement, keeps its services", async () => {
  const { s, old, agents, address } = fleet({}, { ...options, is_to_handle_rebalance_event: true });
  await s.start();
  s.world.rebalance(old);
  await s.until(() => s.world.audit.some((a) => a.what === "attach"), 60);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "web", MinSize: 4 });
  await s.quiet();
  expect(s.world.instance(old).group).toBe("web");
  expect([agents.services.get(address)?.size, agents.maintained.has(address)]).toEqual([2, false]);
});

const hang = () => new Promise<never>(() => undefined);
const refusing = async (): Promise<never> => {
  throw Object.assign(new Error("Unable to connect"), { code: "ConnectionRefused" });
};
test.each<[string, Agents["instead"], RegExp]>([
  ["is not there", refusing, /Unable to connect/],
  ["hangs", hang, /no answer in 3 s/],
  ["hangs in mid-way", (path) => (path.includes("deregister") ? hang() : undefined), /no answer in 3 s/],
  ["fails", async () => new Response("rpc error", { status: 500 }), /500 rpc error/],
  ["is no Consul", async () => new Response("<html>", { status: 404 }), /404 <html>/],
  ["is no Consul and says yes", async () => new Response("<html>"), /JSON/],
  [
    "forbids to deregister",
    (path) => (/deregister|maint/.test(path) ? Promise.resolve(new Response("Permission denied", { status: 403 })) : undefined),
    /deregistering web: 403 Permission denied/,
  ],
  ["sends elsewhere", async () => new Response("", { status: 301, headers: { location: "http://10.0.0.1/" } }), /301/],
])("an agent that %s costs three seconds at most, and one warning", async (_, instead, text) => {
  const { s, old, agents } = fleet();
  await s.start();
  agents.instead = instead;
  // The minimum has the last word, so that the way out is gone through again and again.
  let refusals = 2;
  s.world.intercept = ({ operation }) =>
    operation === "DetachInstances" && refusals-- > 0
      ? { before: new AwsError("ValidationError", `The instance ${old} is not in InService or Standby.`) }
      : undefined;
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(warnings(s)).toHaveLength(1);
  expect(warnings(s)[0]).toMatch(text);
  const asked = s.world.audit.find((a) => a.what === "tags" && a.detail?.startsWith("spotmax:detached"));
  const inService = s.world.audit.find((a) => a.what === "in service");
  // Twenty seconds after the notice the way out begins; a second is the loop's own.
  const ready = Math.max(inService?.atMs ?? 0, (s.world.audit.find((a) => a.what === "notice")?.atMs ?? 0) + 20_000);
  expect((asked?.atMs ?? Number.NaN) - ready).toBeLessThan(3_000 + 2_500);
});

test("one that hangs does not delay what the deadline forces", async () => {
  const { s, old, agents } = fleet({ types: ["m5.large"], template: { InstanceMarketOptions: { MarketType: "spot" } } });
  for (const zone of ["a", "b", "c"])
    for (const lifecycle of ["spot", "on-demand"] as const) s.world.pool(lifecycle, "m5.large", `us-east-1${zone}`).capacity = 0;
  agents.instead = hang;
  await s.start();
  let detachedMs = Number.NaN;
  atDetach(s, () => {
    detachedMs = s.clock.now();
  });
  s.world.interrupt(old);
  const noticedMs = s.clock.now();
  await s.seconds(130);
  expect(agents.asked.length).toBeGreaterThan(0);
  expect(detachedMs - noticedMs).toBeGreaterThanOrEqual(114_000);
  expect(detachedMs - noticedMs).toBeLessThan(117_500);
});

test("a service that is gone already is done", async () => {
  const { s, old, agents, address } = fleet();
  await s.start();
  agents.instead = (path) => {
    if (path.includes("deregister")) agents.services.get(address)?.clear();
    return undefined;
  };
  s.world.interrupt(old);
  await s.quiet();
  expect(agents.asked.filter((line) => line.includes("deregister"))).toHaveLength(2);
  expect(warnings(s)).toEqual([]);
});

test("an empty list is said aloud where there is no token, for that is what ACLs look like", async () => {
  for (const token of [undefined, "secret"]) {
    if (token) process.env.CONSUL_HTTP_TOKEN = token;
    const { s, old, agents, address } = fleet();
    agents.services.get(address)?.clear();
    const tokens = new Set<unknown>();
    agents.instead = (_, { headers }) => {
      tokens.add(new Headers(headers as Record<string, string>).get("x-consul-token"));
      return undefined;
    };
    await s.start();
    s.world.interrupt(old);
    await s.quiet();
    expect(warnings(s)).toEqual(token ? [] : [expect.stringContaining("without CONSUL_HTTP_TOKEN")]);
    expect([...tokens]).toEqual([token ?? null]);
  }
});

test("a token that sees not all of the services is said aloud", async () => {
  process.env.CONSUL_HTTP_TOKEN = "half";
  const { s, old, agents } = fleet();
  agents.instead = (path) =>
    path.endsWith("/services")
      ? Promise.resolve(Response.json({}, { headers: { "X-Consul-Results-Filtered-By-ACLs": "true" } }))
      : undefined;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  expect(warnings(s)).toEqual([expect.stringContaining("may not see all")]);
});

test("the replacement's own agent is never asked, though it may have the old one's address by now", async () => {
  const { s, old, agents, address } = fleet();
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.openClaims().length > 0, 60);
  s.world.instance(first(s.openClaims())).privateIp = address;
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(agents.asked).toEqual([]);
});

test.each([
  ["node name", { Config: { NodeName: "i-0aaaaaaaaaaaaaaaa" } }],
  ["metadata", { Config: { NodeName: "ip-127-0-0-5" }, Meta: { "instance-id": "i-0aaaaaaaaaaaaaaaa" } }],
])("an agent that calls itself another instance by its %s is left alone", async (_, self) => {
  const { s, old, agents, address } = fleet();
  agents.self = self;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(agents.asked.filter((line) => line.startsWith("PUT"))).toEqual([]);
  expect(agents.services.get(address)?.size).toBe(2);
});

test("an instance that has gone is not asked for: its address may be anybody's", async () => {
  const { s, old, agents } = fleet();
  await s.start();
  s.world.interrupt(old, { noticeSeconds: 15 });
  await s.quiet();
  expect(agents.asked).toEqual([]);
});

test("two daemons, and every notice twice: all the same", async () => {
  const { s, members, old, agents, address } = fleet();
  await s.start();
  await s.start();
  s.world.interrupt(old, { duplicates: 2 });
  await s.quiet();
  s.check([old], { web: [3, 5, 3] });
  expect(agents.services.get(address)?.size).toBe(0);
  for (const id of members.slice(1)) expect(agents.services.get(s.world.instance(id).privateIp)?.size).toBe(2);
  expect(warnings(s)).toEqual([]);
});

test("killed at every step of it, the next daemon ends what was begun", async () => {
  let asks = 1;
  for (let n = 0; n < asks; n++) {
    const { s, old, agents, address } = fleet();
    const daemon = await s.start();
    // Not before the agent is asked: what comes before has tests of its own.
    agents.instead = () => {
      if (agents.asked.length === n + 1) {
        daemon.kill();
        s.spawn();
      }
      return undefined;
    };
    s.world.interrupt(old);
    await s.quiet();
    s.check([old], { web: [3, 5, 3] });
    expect([n, agents.services.get(address)?.size]).toEqual([n, 0]);
    if (n === 0) asks = agents.asked.length;
  }
  expect(asks).toBeGreaterThan(4);
});

test("one that stays although its services have left Consul already is named, for nobody else will bring them back", async () => {
  const { s, old, agents, address } = fleet({}, { ...options, is_to_handle_rebalance_event: true });
  await s.start();
  s.world.rebalance(old);
  // Its owner raises the minimum in the second of the detach.
  atDetach(s, () => Object.assign(s.world.autoscaling.groups.get("web") ?? {}, { min: 4 }));
  await s.quiet();
  expect([s.world.instance(old).group, agents.services.get(address)?.size]).toEqual(["web", 0]);
  expect(warnings(s)).toEqual([expect.stringContaining(`the services of ${old} have left Consul`)]);
  // He does as he is told, and its next notice takes them out once more.
  agents.services.set(address, new Set(["web"]));
  Object.assign(s.world.autoscaling.groups.get("web") ?? {}, { min: 3 });
  await s.seconds(1_200);
  s.world.interrupt(old);
  await s.quiet();
  expect([s.world.instance(old).group, agents.services.get(address)?.size]).toEqual([undefined, 0]);
});

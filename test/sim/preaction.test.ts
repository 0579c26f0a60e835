// Preaction: members in a worse band than need be go before they are taken, and on-demand fallbacks go back to spot.
// One at a time, never below the start, and in a steady market nothing happens at all.
import { describe, expect, test } from "bun:test";
import { type Bands, SpotAdvisor } from "../aws/advisor.ts";
import { EPOCH_MS } from "../aws/clock.ts";
import type { GroupSpec } from "../aws/world.ts";
import { type Daemon, Stage } from "./harness.ts";

const PUBLIC = "https://spot-bid-advisor.s3.amazonaws.com/spot-advisor-data.json";
const BANDS = { "m4.large": 4, "m5.large": 1, "m5a.large": 1, "m6i.large": 0, "m6a.large": 0 };
const TYPES = ["m4.large", "m5.large", "m6i.large"];
const MINUTE = 60;
const HOUR = 3_600;
const on = { is_enable_preaction: true };

/** A group all of m4.large, which is taken back often, where m5.large and m6i.large would do as well. */
function stage(
  options: object = {},
  spec: Partial<GroupSpec> = {},
  bands: Bands = BANDS,
): { s: Stage; advisor: SpotAdvisor; olds: string[] } {
  const s = new Stage();
  const advisor = new SpotAdvisor(bands);
  s.http = async (url, init) => {
    if (url !== PUBLIC) throw new Error(`nobody listens at ${url}`);
    return advisor.answer(new Headers(init?.headers).get("if-none-match"));
  };
  const olds = s.group({ name: "web", min: 3, max: 5, desired: 3, types: TYPES, ...spec }, { ...on, ...options });
  for (const id of olds) s.world.instance(id).type = "m4.large";
  return { s, advisor, olds };
}
const start = (s: Stage, intervalMinutes = 10): Promise<Daemon> =>
  s.start({ config: s.config({ preaction_snapshot_interval_minutes: intervalMinutes }) });

const membersOf = (s: Stage, name = "web") =>
  [...(s.world.autoscaling.groups.get(name)?.members.values() ?? [])].map((m) => m.instance);
const typesOf = (s: Stage, name = "web") =>
  membersOf(s, name)
    .map((i) => i.type)
    .sort();
const claimsOf = (s: Stage) => [...s.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces"));
const claimOn = (s: Stage, old: string) => {
  const [claim] = claimsOf(s).filter((i) => i.tags.get("spotmax:replaces") === old);
  if (!claim) throw new Error(`nothing was launched for ${old}\n${s.lines.join("")}`);
  return claim;
};
const log = (s: Stage) => s.lines.join("");
const said = (s: Stage, text: string | RegExp) => s.lines.filter((line) => line.match(text)).length;
const tagOf = (s: Stage, key: string, name = "web") => s.world.autoscaling.groups.get(name)?.tags.get(key)?.value;
const instantOf = (s: Stage, what: string, id: string) => {
  const entry = s.world.audit.find((e) => e.what === what && e.ids.includes(id));
  if (!entry) throw new Error(`no "${what}" of ${id}\n${log(s)}`);
  return (entry.atMs - EPOCH_MS) / 1000;
};
const dry = (s: Stage, types: string[], capacity = 0) => {
  for (const type of types) for (const zone of "abc") s.world.pool("spot", type, `us-east-1${zone}`).capacity = capacity;
};
/** Old instances that are being replaced, or on their way out, as the world has it. */
const inHand = (s: Stage) =>
  new Set([
    ...claimsOf(s).flatMap((i) =>
      (i.state === "pending" || i.state === "running") && !i.tags.has("spotmax:attached") ? [i.tags.get("spotmax:replaces")] : [],
    ),
    ...[...s.world.ec2.instances.values()].flatMap((i) =>
      i.state === "running" && i.tags.has("spotmax:detached") && !i.group ? [i.id] : [],
    ),
  ]).size;
/** The largest number in hand during so many seconds. */
async function mostInHand(s: Stage, seconds: number): Promise<number> {
  let most = 0;
  for (let n = 0; n < seconds; n++) {
    await s.seconds(1);
    most = Math.max(most, inHand(s));
  }
  return most;
}

describe("members in a worse band", () => {
  test("go to the best band one by one, capacity never below the start, and then nothing moves", async () => {
    const { s, advisor, olds } = stage();
    await start(s);
    expect(await mostInHand(s, HOUR)).toBe(1);
    s.check(olds, { web: [3, 5, 3] });
    expect(typesOf(s)).toEqual(["m6i.large", "m6i.large", "m6i.large"]);
    expect(membersOf(s).every((i) => i.lifecycle === "spot")).toBe(true);
    // Old ones are ended, not left running.
    expect(olds.map((id) => s.world.instance(id).state)).toEqual(["terminated", "terminated", "terminated"]);
    // A day of further looks: nothing is launched, and the file is not sent again.
    await s.seconds(24 * HOUR);
    s.check(olds, { web: [3, 5, 3] });
    expect(advisor.served).toBe(1);
    expect(advisor.unchanged).toBeGreaterThan(140);
  });

  test("at minimum = maximum the maximum is raised and put back", async () => {
    const { s, olds } = stage({}, { min: 3, max: 3, desired: 3 });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 3, 3] });
    expect(typesOf(s)).toEqual(["m6i.large", "m6i.large", "m6i.large"]);
  });

  test("two at a time where the limit is two", async () => {
    const { s, olds } = stage({ max_num_of_terminated_one_time: 2 }, { min: 4, max: 8, desired: 4 });
    await start(s);
    expect(await mostInHand(s, 40 * MINUTE)).toBe(2);
    s.check(olds, { web: [4, 8, 4] });
  });

  test("the worst goes first", async () => {
    const { s, olds } = stage();
    const [first = "", second = "", third = ""] = olds;
    s.world.instance(first).type = "m5.large";
    s.world.instance(third).type = "m6i.large";
    await start(s);
    await s.seconds(HOUR);
    s.check([first, second], { web: [3, 5, 3] });
    expect(instantOf(s, "launch", claimOn(s, second).id)).toBeLessThan(instantOf(s, "launch", claimOn(s, first).id));
  });

  test("without the option nothing happens, nor without an interval, which is said", async () => {
    const { s, advisor } = stage({ is_enable_preaction: false });
    s.group({ name: "other", min: 1, max: 2, desired: 1, types: TYPES });
    await start(s);
    await s.seconds(HOUR);
    expect(advisor.served).toBe(0);
    const { s: never, advisor: unread } = stage();
    await start(never, 0);
    await never.seconds(HOUR);
    expect(unread.served).toBe(0);
    expect(said(never, /is_enable_preaction is set, and preaction_snapshot_interval_minutes is 0/)).toBe(1);
    expect([...claimsOf(s), ...claimsOf(never)]).toEqual([]);
  });

  test("a better band has no capacity: the old one stays, quietly, and is left alone for six hours", async () => {
    const { s, olds } = stage({}, { zones: ["us-east-1a"] });
    dry(s, ["m5.large", "m6i.large"]);
    await start(s);
    await s.seconds(5 * HOUR);
    expect(claimsOf(s)).toEqual([]);
    expect(s.isQuiet()).toBe(true);
    // A call for each band, once.
    expect(s.world.calls["ec2:CreateFleet"]).toBe(2);
    expect(tagOf(s, "spotmax:cooldown")).toBe("m4.large/a=2026-01-01T06:01Z");
    expect(said(s, /^(ERRO|WARN)/)).toBe(0);
    dry(s, ["m5.large", "m6i.large"], 100);
    await s.seconds(2 * HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });

  test("places without better capacity are remembered side by side", async () => {
    const { s } = stage({}, { zones: ["us-east-1a", "us-east-1b"] });
    dry(s, ["m5.large", "m6i.large"]);
    await start(s);
    await s.seconds(5 * HOUR);
    // A call for each band and zone, once.
    expect(s.world.calls["ec2:CreateFleet"]).toBe(4);
    expect(tagOf(s, "spotmax:cooldown")).toMatch(/^m4\.large\/[ab]=\S+ m4\.large\/[ab]=\S+$/);
  });

  test("the best band has no capacity: the next better one is taken, and is no reason to cool down", async () => {
    const { s, olds } = stage();
    dry(s, ["m6i.large"]);
    await start(s);
    await s.seconds(50 * MINUTE);
    s.check(olds, { web: [3, 5, 3] });
    expect(typesOf(s)).toEqual(["m5.large", "m5.large", "m5.large"]);
    expect(tagOf(s, "spotmax:cooldown")).toBeUndefined();
  });

  test("nobody younger than an hour, and none that was replaced a moment ago", async () => {
    const { s, advisor, olds } = stage();
    for (const id of olds) s.world.instance(id).launchedAtMs = s.clock.now() - 600_000;
    await start(s);
    await s.seconds(49 * MINUTE);
    expect(claimsOf(s)).toEqual([]);
    await s.seconds(50 * MINUTE);
    s.check(olds, { web: [3, 5, 3] });
    // The data turns about: for an hour the fresh ones stay.
    advisor.regions = { "us-east-1": { Linux: { "m4.large": 1, "m5.large": 0, "m6i.large": 4 } } };
    await s.seconds(10 * MINUTE);
    expect(claimsOf(s).length).toBe(3);
    // And then go, once: what replaced them was in a better band by what is known now.
    await s.seconds(6 * HOUR);
    expect(claimsOf(s).length).toBe(6);
    expect(typesOf(s)).toEqual(["m5.large", "m5.large", "m5.large"]);
  });

  test("a group that is scaling is left alone", async () => {
    const { s } = stage({}, { suspended: ["Terminate"] });
    await start(s);
    const group = s.world.autoscaling.groups.get("web");
    dry(s, TYPES);
    // It wants one more and gets none.
    await s.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 4 });
    await s.seconds(30 * MINUTE);
    expect(group?.members.size).toBe(3);
    expect(s.world.calls["ec2:CreateFleet"]).toBeUndefined();
    dry(s, TYPES, 100);
    await s.seconds(20 * MINUTE);
    expect(claimsOf(s).length).toBeGreaterThan(0);
  });

  test("a better type that only another zone has: nobody moves, for AZRebalance would move him back", async () => {
    const { s } = stage();
    for (const type of ["m5.large", "m6i.large"]) s.world.pool("spot", type, "us-east-1a").capacity = 0;
    await start(s);
    await s.seconds(12 * HOUR);
    expect(typesOf(s)).toEqual(["m4.large", "m6i.large", "m6i.large"]);
    expect(
      membersOf(s)
        .map((i) => i.zone)
        .sort(),
    ).toEqual(["us-east-1a", "us-east-1b", "us-east-1c"]);
    expect(claimsOf(s).length).toBe(2);
  });
});

describe("what the group itself allows", () => {
  const abr = { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 8192, Max: 8192 }, CpuManufacturers: ["intel" as const] };

  test("attributes are resolved by EC2, and the launch is restricted to the better types", async () => {
    const { s, olds } = stage({}, { overrides: [{ InstanceRequirements: abr }] }, { ...BANDS, "m6g.large": 0, "m7i.large": 0 });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
    for (const type of typesOf(s)) expect(["m6i.large", "m7i.large"]).toContain(type);
    expect(s.world.calls["ec2:GetInstanceTypesFromInstanceRequirements"]).toBeGreaterThan(0);
  });

  test("so are those of the launch template itself", async () => {
    const template = { InstanceRequirements: abr, InstanceType: undefined };
    const { s, olds } = stage({}, { overrides: [], template });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
    expect(typesOf(s)).toEqual(["m6i.large", "m6i.large", "m6i.large"]);
  });

  test("a type that the attributes exclude, or that is not among the allowed ones, is not taken", async () => {
    const overrides = [
      { InstanceRequirements: { ...abr, ExcludedInstanceTypes: ["m6*"] } },
      { InstanceRequirements: { ...abr, AllowedInstanceTypes: ["m4*", "m5.*"] } },
    ];
    const { s, olds } = stage({}, { overrides });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
    expect(typesOf(s)).toEqual(["m5.large", "m5.large", "m5.large"]);
  });

  test("`alt` types count as the group's own", async () => {
    const { s, olds } = stage({ alt1: "m6a.large" }, { types: ["m4.large", "c4.large"] });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
    expect(typesOf(s)).toEqual(["m6a.large", "m6a.large", "m6a.large"]);
  });

  test("with weights only a type of the same weight will do", async () => {
    const weights = { "m4.xlarge": 2, "m5.xlarge": 2, "m6i.large": 1 };
    const { s, olds } = stage(
      {},
      { types: Object.keys(weights), weights, min: 4, max: 8, desired: 4 },
      { "m4.xlarge": 4, "m5.xlarge": 2, "m6i.large": 0 },
    );
    for (const id of olds) s.world.instance(id).type = "m4.xlarge";
    const heavy = olds.filter((id) => s.world.autoscaling.groups.get("web")?.members.get(id)?.weight === 2);
    for (const id of olds) if (!heavy.includes(id)) s.world.instance(id).type = "m6i.large";
    await start(s);
    await s.seconds(HOUR);
    expect(heavy.length).toBeGreaterThan(0);
    expect(claimsOf(s).map((i) => i.type)).toEqual(heavy.map(() => "m5.xlarge"));
    expect(s.world.autoscaling.groups.get("web")?.desired).toBe(4);
  });

  test("a group of one type, and on-demand members, stay as they are", async () => {
    const { s } = stage({}, { types: ["m4.large"], template: { InstanceMarketOptions: { MarketType: "spot" } } });
    s.group({ name: "fixed", min: 2, max: 3, desired: 2, types: TYPES, onDemandBase: 2 }, on);
    for (const i of membersOf(s, "fixed")) i.type = "m4.large";
    await start(s);
    await s.seconds(HOUR);
    expect(claimsOf(s)).toEqual([]);
    expect(s.world.calls["ec2:CreateFleet"]).toBeUndefined();
  });

  test("Windows members are judged by Windows' own bands", async () => {
    const { s, advisor } = stage();
    s.world.ec2.windowsImages.add("ami-0123456789abcdef0");
    advisor.regions = { "us-east-1": { Linux: BANDS, Windows: { "m4.large": 1, "m5.large": 0, "m6i.large": 4 } } };
    await start(s);
    await s.seconds(HOUR);
    expect(typesOf(s)).toEqual(["m5.large", "m5.large", "m5.large"]);
  });
});

describe("the Spot Advisor's data", () => {
  test("away from the start: one warning, and nothing is replaced on a guess", async () => {
    const { s, advisor, olds } = stage();
    advisor.fault = { status: 503 };
    await start(s);
    await s.seconds(3 * HOUR);
    expect(said(s, /^WARN.*Spot Advisor/)).toBe(1);
    expect(claimsOf(s)).toEqual([]);
    advisor.fault = undefined;
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });

  test.each([
    ["away", { status: 404 }],
    ["broken", { status: 200, body: "<html>moved</html>" }],
    ["in another form", { status: 200, body: '{"ranges":[],"spot_advisor":{}}' }],
  ])("%s later: one warning each time, and the last good copy stays", async (_, fault) => {
    const { s, advisor, olds } = stage();
    await start(s);
    await s.seconds(2 * MINUTE);
    advisor.fault = fault;
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
    expect(said(s, /^WARN.*last good copy/)).toBe(1);
    advisor.fault = undefined;
    await s.seconds(20 * MINUTE);
    advisor.fault = fault;
    await s.seconds(HOUR);
    expect(said(s, /^WARN.*last good copy/)).toBe(2);
    expect(said(s, /^ERRO/)).toBe(0);
  });

  test("hanging for ever holds up nothing else: fallbacks and interruptions go on", async () => {
    const { s, olds } = stage();
    s.http = (_, init) => new Promise((__, reject) => init?.signal?.addEventListener("abort", () => reject(init.signal?.reason)));
    await start(s);
    await s.seconds(HOUR);
    const [old = ""] = olds;
    s.world.interrupt(old);
    await s.quiet();
    s.check([old], { web: [3, 5, 3] });
    expect(said(s, /^WARN.*Spot Advisor/)).toBe(1);
  });

  test("a region without data: said once, and nothing is done", async () => {
    const { s, advisor } = stage();
    advisor.regions = { "eu-west-1": { Linux: BANDS } };
    await start(s);
    await s.seconds(6 * HOUR);
    expect(said(s, "no data on us-east-1")).toBe(1);
    expect(claimsOf(s)).toEqual([]);
  });

  test("a platform without data: said once, and its members stay", async () => {
    const { s } = stage();
    s.world.ec2.windowsImages.add("ami-0123456789abcdef0");
    await start(s);
    await s.seconds(6 * HOUR);
    expect(said(s, "no data on Windows in us-east-1")).toBe(1);
    expect(claimsOf(s)).toEqual([]);
  });

  test("from another place, where the configuration names one", async () => {
    const { s, advisor, olds } = stage();
    const { http } = s;
    s.http = (url, init) => http(url.replace("https://data.example/advisor.json", PUBLIC), init);
    const config = s.config({ preaction_snapshot_interval_minutes: 10 });
    await s.start({ config: { ...config, system: { ...config.system, spot_advisor_url: "https://data.example/advisor.json" } } });
    s.http = async (url, init) => {
      expect(url).toBe("https://data.example/advisor.json");
      return http(PUBLIC, init);
    };
    await s.seconds(HOUR);
    expect(advisor.served).toBe(1);
    s.check(olds, { web: [3, 5, 3] });
  });
});

describe("counted from the cloud", () => {
  test("two daemons replace one at a time between them, and each member once", async () => {
    const { s, olds } = stage();
    await start(s);
    await start(s);
    expect(await mostInHand(s, HOUR)).toBe(1);
    s.check(olds, { web: [3, 5, 3] });
  });

  test("a daemon that is killed every few minutes: nothing is replaced twice, and all are in the end", async () => {
    const { s, olds } = stage();
    for (let n = 0; n < 30; n++) {
      const daemon = await start(s);
      expect(await mostInHand(s, 63 + 7 * n)).toBeLessThanOrEqual(1);
      daemon.kill();
    }
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });

  test("while the limit is taken, no look adds a message", async () => {
    const { s, olds } = stage({ preaction_termination_delay_seconds: 4 * HOUR });
    await start(s, 1);
    await start(s, 1);
    await s.seconds(3 * HOUR);
    expect(said(s, "is to be replaced")).toBeLessThanOrEqual(2);
    // One has been let go and runs on for hours: it counts.
    expect(claimsOf(s).length).toBe(1);
    const { visible, delayed, inFlight } = s.world.queueDepth(s.queues.interruption);
    expect(visible + delayed + inFlight).toBe(0);
    await s.seconds(12 * HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });

  test("messages for more than the limit are not kept: the next look judges afresh", async () => {
    const { s, olds } = stage({ is_enable_preaction: false });
    await start(s);
    for (const old of olds) {
      const maxgroup = { group: "web", kind: "preaction", notice: old, options: {}, better: [["m6i.large"]] };
      const body = { "detail-type": "MaxGroup Preaction", id: old, detail: { "instance-id": old }, maxgroup };
      s.world.sendRaw(s.queues.interruption, JSON.stringify(body));
    }
    await s.seconds(5);
    const { visible, delayed, inFlight } = s.world.queueDepth(s.queues.interruption);
    expect([visible + delayed + inFlight, claimsOf(s).length]).toEqual([1, 1]);
    await s.quiet();
    expect(claimsOf(s).length).toBe(1);
  });

  test("a replacement that still stands beside its old one is not replaced itself, whatever the data says by then", async () => {
    const { s, advisor, olds } = stage({ max_num_of_terminated_one_time: 2, preaction_detach_delay_seconds: 3 * HOUR });
    const [old = ""] = olds;
    for (const id of olds.slice(1)) s.world.instance(id).type = "m6i.large";
    dry(s, ["m6i.large"]);
    await start(s);
    await s.seconds(10 * MINUTE);
    expect(claimOn(s, old).type).toBe("m5.large");
    dry(s, ["m6i.large"], 100);
    advisor.regions = { "us-east-1": { Linux: { ...BANDS, "m5.large": 4 } } };
    await s.seconds(2.7 * HOUR);
    expect(claimsOf(s).length).toBe(1);
    await s.seconds(4 * HOUR);
    expect(claimsOf(s).length).toBe(2);
    await s.seconds(3 * HOUR);
    expect(typesOf(s)).toEqual(["m6i.large", "m6i.large", "m6i.large"]);
  });

  test("messages that nobody handles do not pile up without bound, and are one replacement each when they are", async () => {
    const { s, olds } = stage();
    let deaf = true;
    s.world.intercept = ({ operation, input }) =>
      deaf && operation === "ReceiveMessage" && (input as { QueueUrl: string }).QueueUrl === s.queues.interruption
        ? { hang: true }
        : undefined;
    await start(s, 1);
    await s.seconds(2 * HOUR);
    const { visible } = s.world.queueDepth(s.queues.interruption);
    expect(visible).toBeGreaterThan(0);
    expect(visible).toBeLessThanOrEqual(2 * 12);
    deaf = false;
    await s.seconds(2 * HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });
});

describe("the road of the table", () => {
  test("long delays: detached and ended no sooner than asked for, over what SQS can carry at once", async () => {
    const { s, olds } = stage({ preaction_detach_delay_seconds: 2_000, preaction_termination_delay_seconds: 5_000 });
    const [old = ""] = olds;
    for (const id of olds.slice(1)) s.world.instance(id).type = "m6i.large";
    await start(s);
    await s.seconds(2.5 * HOUR);
    s.check([old], { web: [3, 5, 3] });
    const attached = instantOf(s, "attach", claimOn(s, old).id);
    const detached = instantOf(s, "detach", old);
    expect(detached - attached).toBeGreaterThan(1_995);
    expect(detached - attached).toBeLessThan(2_060);
    const ended = instantOf(s, "shutting-down", old);
    expect(ended - detached).toBeGreaterThan(4_995);
    expect(ended - detached).toBeLessThan(5_060);
  });

  test("the data volume goes along, in its own zone, at once even after a long termination delay", async () => {
    const volumes = [{ device: "/dev/sdf", sizeGiB: 100 }];
    const options = { persistence_dev: "/dev/sdf", preaction_termination_delay_seconds: 1_200 };
    const { s, olds } = stage(options, { volumes });
    const [old = ""] = olds;
    for (const id of olds.slice(1)) s.world.instance(id).type = "m6i.large";
    const data = [...s.world.ec2.ebs.volumes.values()].find(
      (v) => v.attachment?.instanceId === old && v.attachment.device === "/dev/sdf",
    );
    const zone = s.world.instance(old).zone;
    await start(s);
    await s.seconds(HOUR);
    s.check([old], { web: [3, 5, 3] });
    const claim = claimOn(s, old);
    expect([claim.type, claim.zone]).toEqual(["m6i.large", zone]);
    expect([data?.attachment?.instanceId, data?.attachment?.device]).toEqual([claim.id, "/dev/sdz"]);
    // Nobody had to warn that the volume was still busy: it was asked for as soon as it was free.
    expect(s.lines.filter((line) => /^(WARN|ERRO)/.test(line))).toEqual([]);
    const moved = s.world.audit.findLast((e) => e.what === "volume attached" && e.ids.includes(data?.id ?? ""));
    expect(moved?.ids).toContain(claim.id);
    expect(((moved?.atMs ?? 0) - EPOCH_MS) / 1000 - instantOf(s, "terminated", old)).toBeLessThan(30);
  });

  test.each([
    ["while it is pending", 61],
    ["right after the attach", 75],
    ["long before its detach is due", 600],
  ])("an interruption of the same instance %s makes it the fast road, with the same replacement", async (_, second) => {
    const { s, olds } = stage({ preaction_detach_delay_seconds: 3_000, preaction_termination_delay_seconds: 3_000 });
    const [old = ""] = olds;
    for (const id of olds.slice(1)) s.world.instance(id).type = "m6i.large";
    await start(s);
    await s.until(() => claimsOf(s).length > 0, 100);
    await s.seconds(second - 61);
    const noticeAt = (s.clock.now() - EPOCH_MS) / 1000;
    s.world.interrupt(old);
    await s.seconds(3 * HOUR);
    s.check([old], { web: [3, 5, 3] });
    expect(instantOf(s, "detach", old) - noticeAt).toBeLessThan(95);
  });

  test("an interruption after it was let go changes nothing", async () => {
    const { s, olds } = stage({ preaction_termination_delay_seconds: 3_000 });
    const [old = ""] = olds;
    for (const id of olds.slice(1)) s.world.instance(id).type = "m6i.large";
    await start(s);
    await s.until(() => s.world.instance(old).group === undefined, 300);
    s.world.interrupt(old);
    await s.seconds(2 * HOUR);
    s.check([old], { web: [3, 5, 3] });
  });

  test("a replacement that came out in no better band is a failure to remember, for the whole type in that zone", async () => {
    const { s, olds } = stage({ od_least_live_mins: 0 }, { zones: ["us-east-1a"] });
    const [old = ""] = olds;
    const detail = { "instance-id": old };
    const maxgroup = { group: "web", kind: "preaction", notice: "p", options: {}, better: [["m6i.large"]] };
    await start(s);
    // Its interruption was faster, and found no spot: what it launched is what there is.
    dry(s, TYPES);
    s.world.interrupt(old);
    await s.until(() => claimsOf(s).length > 0, 30);
    s.world.sendRaw(s.queues.interruption, JSON.stringify({ "detail-type": "MaxGroup Preaction", id: "p", detail, maxgroup }));
    await s.seconds(50);
    dry(s, TYPES, 100);
    expect([claimOn(s, old).lifecycle, claimOn(s, old).type]).toEqual(["on-demand", "m4.large"]);
    expect(tagOf(s, "spotmax:cooldown")).toBe("m4.large/a=2026-01-01T06:00Z");
    await s.seconds(5.9 * HOUR);
    s.check([old], { web: [3, 5, 3] });
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });

  test("a message without better types launches nothing for a spot member", async () => {
    const { s, olds } = stage({ is_enable_preaction: false });
    const detail = { "instance-id": olds[0] };
    const maxgroup = { group: "web", kind: "preaction", notice: "p", options: {} };
    await start(s);
    s.world.sendRaw(s.queues.interruption, JSON.stringify({ "detail-type": "MaxGroup Preaction", id: "p", detail, maxgroup }));
    await s.seconds(10 * MINUTE);
    expect(claimsOf(s)).toEqual([]);
    expect(s.isQuiet()).toBe(true);
  });

  test("a replacement that dies while pending is followed by the next one, in a better band still", async () => {
    const { s, olds } = stage();
    let deaths = 0;
    s.world.ec2.dieWhilePending = () =>
      deaths++ === 0 ? { Code: "Client.InternalError", Message: "Client error on launch" } : undefined;
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] }, { launches: 4 });
    for (const type of typesOf(s)) expect(["m5.large", "m6i.large"]).toContain(type);
  });

  test("where Launch is suspended nothing is asked for", async () => {
    const { s } = stage({}, { suspended: ["Launch"] });
    await start(s);
    await s.seconds(HOUR);
    expect(claimsOf(s)).toEqual([]);
    expect(s.isQuiet()).toBe(true);
  });

  test("protection from scale-in goes over to the replacement", async () => {
    const { s, olds } = stage({}, { protected: true });
    await start(s);
    await s.seconds(HOUR);
    s.check(olds, { web: [3, 5, 3] });
  });
});

describe("an on-demand fallback", () => {
  /** A group that had to turn to on-demand for its first member. */
  async function fallen(options: object = {}, intervalMinutes = 0): Promise<{ s: Stage; old: string; fallback: string }> {
    const { s, olds } = stage({ is_enable_preaction: false, ...options });
    for (const id of olds) s.world.instance(id).type = "m6i.large";
    dry(s, TYPES);
    await start(s, intervalMinutes);
    const [old = ""] = olds;
    s.world.interrupt(old);
    await s.quiet();
    const fallback = claimOn(s, old);
    expect([fallback.lifecycle, fallback.tags.get("spotmax:fallback")]).toEqual(["on-demand", "on-demand"]);
    return { s, old, fallback: fallback.id };
  }
  const ageMinutes = (s: Stage, id: string) => (s.clock.now() - s.world.instance(id).launchedAtMs) / 60_000;

  test("goes back to spot after 15 minutes, preaction or not", async () => {
    for (const isOn of [false, true]) {
      const { s, old, fallback } = await fallen({ is_enable_preaction: isOn }, isOn ? 10 : 0);
      dry(s, TYPES, 100);
      await s.until(() => claimsOf(s).length > 1, HOUR);
      expect(ageMinutes(s, fallback)).toBeGreaterThanOrEqual(15);
      expect(ageMinutes(s, fallback)).toBeLessThan(17);
      await s.seconds(20 * MINUTE);
      s.check([fallback], { web: [3, 5, 3] }, { launches: 2 });
      expect(membersOf(s).map((i) => i.lifecycle)).toEqual(["spot", "spot", "spot"]);
      expect([old, fallback].map((id) => s.world.instance(id).state)).toEqual(["terminated", "terminated"]);
    }
  });

  test("tries with growing pauses until a spot pool has capacity, and never turns to on-demand again", async () => {
    const { s, fallback } = await fallen();
    const before = s.world.calls["ec2:CreateFleet"] ?? 0;
    await s.seconds(6 * HOUR);
    expect(claimsOf(s).length).toBe(1);
    const tried = s.world.instance(fallback).tags.get("spotmax:tried") ?? "";
    expect(Number(tried.split(" ")[0])).toBeGreaterThan(5);
    expect(Number(tried.split(" ")[0])).toBeLessThan(12);
    expect((s.world.calls["ec2:CreateFleet"] ?? 0) - before).toBeLessThan(25);
    expect(said(s, /^ERRO/)).toBe(0);
    dry(s, TYPES, 100);
    await s.seconds(70 * MINUTE);
    s.check([fallback], { web: [3, 5, 3] }, { launches: 2 });
  });

  test("stays for good where od_least_live_mins is 0, and goes earlier or later as it says", async () => {
    const { s } = await fallen({ od_least_live_mins: 0 });
    dry(s, TYPES, 100);
    await s.seconds(24 * HOUR);
    expect(claimsOf(s).length).toBe(1);
    const { s: late, fallback } = await fallen({ od_least_live_mins: 90 });
    dry(late, TYPES, 100);
    await late.until(() => claimsOf(late).length > 1, 3 * HOUR);
    expect(ageMinutes(late, fallback)).toBeGreaterThanOrEqual(90);
  });

  test("many of them go back one by one", async () => {
    const { s, olds } = stage({ is_enable_preaction: false }, { min: 6, max: 9, desired: 6, zones: ["us-east-1a"] });
    dry(s, TYPES);
    await start(s, 0);
    for (const old of olds) s.world.interrupt(old);
    await s.quiet();
    const fallbacks = claimsOf(s).map((i) => i.id);
    expect(fallbacks.length).toBe(6);
    dry(s, TYPES, 100);
    expect(await mostInHand(s, 2 * HOUR)).toBe(1);
    s.check(fallbacks, { web: [6, 9, 6] }, { launches: 12 });
  });

  test("after a restart its age and its pauses are known", async () => {
    const { s, fallback } = await fallen();
    await s.seconds(2 * HOUR);
    const tries = () => Number(s.world.instance(fallback).tags.get("spotmax:tried")?.split(" ")[0]);
    const before = tries();
    for (let n = 0; n < 10; n++) {
      const daemon = await start(s, 0);
      await s.seconds(2 * MINUTE);
      daemon.kill();
    }
    expect(tries() - before).toBeLessThanOrEqual(1);
  });
});

// Preaction's decisions: whom to replace, what the Spot Advisor's file says, what the tags remember. The last part
// is a property: whatever the data and the fleet, the sequence of replacements ends.
import { describe, expect, test } from "bun:test";
import {
  addCooldown,
  nextTryMs,
  parseAdvisor,
  readCooldown,
  readNotice,
  type Snapshot,
  type Victim,
  victims,
} from "../../maxgroup.ts";
import { Random } from "../aws/basics.ts";

const HOUR = 3_600_000;
const MINUTE = 60_000;
const NOW = Date.parse("2026-03-01T12:00:00Z");
type Member = Snapshot["members"][number];

const BANDS = new Map([
  ["best.large", 0],
  ["good.large", 1],
  ["poor.large", 3],
  ["worst.large", 4],
]);
const OFFERS = ["worst.large", "poor.large", "good.large", "best.large", "unknown.large"];
const member = (id: string, type: string, over: Partial<Member> = {}): Member => ({
  id,
  type,
  lifecycle: "spot",
  isInService: true,
  launchedMs: NOW - 24 * HOUR,
  notBeforeMs: 0,
  offers: OFFERS,
  bands: BANDS,
  ...over,
});
const fallback = (id: string, ageMinutes: number, over: Partial<Member> = {}) =>
  member(id, "best.large", { lifecycle: "fallback", launchedMs: NOW - ageMinutes * MINUTE, ...over });
const snapshot = (members: Member[], over: Partial<Snapshot> = {}): Snapshot => ({
  nowMs: NOW,
  limit: 10,
  inHand: [],
  isSteady: true,
  leastLiveMs: 15 * MINUTE,
  members,
  ...over,
});

describe("whom to replace", () => {
  const worst = member("i-worst", "worst.large");
  const poor = member("i-poor", "poor.large");
  const cases: [rule: string, x: Snapshot, ids: string[]][] = [
    ["a member in a worse band than the best one", snapshot([poor]), ["i-poor"]],
    ["the worst first", snapshot([member("i-good", "good.large"), worst, poor]), ["i-worst", "i-poor", "i-good"]],
    ["among equals the oldest first", snapshot([poor, member("i-old", "poor.large", { launchedMs: 0 })]), ["i-old", "i-poor"]],
    ["nobody in the best band", snapshot([member("i-best", "best.large")]), []],
    [
      "nobody where the group allows nothing better",
      snapshot([member("i-poor", "poor.large", { offers: ["poor.large", "worst.large"] })]),
      [],
    ],
    [
      "nobody for another type in the same band",
      snapshot([member("i-1", "poor.large", { offers: ["other.large"], bands: new Map([...BANDS, ["other.large", 3]]) })]),
      [],
    ],
    ["nobody whose own band is not known", snapshot([member("i-1", "unknown.large")]), []],
    ["nobody where no band is known", snapshot([member("i-1", "poor.large", { bands: undefined })]), []],
    ["nobody that is not spot", snapshot([member("i-1", "worst.large", { lifecycle: "on-demand" })]), []],
    ["nobody that is not in service", snapshot([member("i-1", "worst.large", { isInService: false })]), []],
    ["nobody younger than an hour", snapshot([member("i-1", "worst.large", { launchedMs: NOW - HOUR + 1 })]), []],
    ["whoever is an hour old", snapshot([member("i-1", "worst.large", { launchedMs: NOW - HOUR })]), ["i-1"]],
    ["nobody of a type that cools down", snapshot([member("i-1", "worst.large", { notBeforeMs: NOW + 1 }), poor]), ["i-poor"]],
    ["nobody in a group that is scaling", snapshot([worst, poor], { isSteady: false }), []],
    ["no more than the limit", snapshot([poor, worst], { limit: 1 }), ["i-worst"]],
    ["no more than the limit, those in hand included", snapshot([poor, worst], { limit: 2, inHand: ["i-x"] }), ["i-worst"]],
    ["nobody where the limit is taken", snapshot([poor, worst], { limit: 1, inHand: ["i-x"] }), []],
    ["nobody who is in hand already", snapshot([poor, worst], { limit: 2, inHand: ["i-worst"] }), ["i-poor"]],
    ["nobody where more are in hand than allowed", snapshot([poor], { limit: 1, inHand: ["a", "b", "c"] }), []],
    ["a fallback that is old enough, before all others", snapshot([worst, fallback("i-f", 15)]), ["i-f", "i-worst"]],
    ["no fallback that is younger", snapshot([fallback("i-f", 14.9)]), []],
    ["no fallback younger than ten minutes, whatever the option", snapshot([fallback("i-f", 9)], { leastLiveMs: MINUTE }), []],
    ["a fallback without any data", snapshot([fallback("i-f", 20, { bands: undefined, offers: [] })]), ["i-f"]],
    ["no fallback where the option is 0", snapshot([fallback("i-f", 9_999)], { leastLiveMs: 0 }), []],
    ["no fallback that was tried a moment ago", snapshot([fallback("i-f", 60, { notBeforeMs: NOW + MINUTE })]), []],
  ];
  test.each(cases)("%s", (_, x, ids) => {
    const before = structuredClone({ ...x, members: x.members.map((m) => m.id) });
    expect(victims(x).map((found) => found.id)).toEqual(ids);
    expect({ ...x, members: x.members.map((m) => m.id) }).toEqual(before);
  });

  test("the types that will do come by band, the best first, and none as bad as its own", () => {
    expect(victims(snapshot([worst]))[0]?.better).toEqual([["best.large"], ["good.large"], ["poor.large"]]);
    expect(victims(snapshot([poor]))[0]?.better).toEqual([["best.large"], ["good.large"]]);
    expect(victims(snapshot([fallback("i-f", 20)]))).toEqual([{ id: "i-f", band: Number.POSITIVE_INFINITY }]);
  });
});

const file = (over: object = {}) => ({
  global_rate: "<10%",
  ranges: [
    { index: 4, label: ">20%", dots: 4, max: 100 },
    { index: 0, label: "<5%", dots: 0, max: 5 },
    { index: 1, label: "5-10%", dots: 1, max: 11 },
  ],
  instance_types: { "m5.large": { cores: 2, ram_gb: 8, emr: true } },
  spot_advisor: {
    "us-east-1": {
      Linux: { "m5.large": { s: 60, r: 4 }, "m6i.large": { s: -3, r: 0 }, "x.large": { s: 1, r: 9 } },
      Windows: { "m5.large": { s: 40, r: 1 } },
    },
    "eu-west-1": { Linux: { "m5.large": { s: 60, r: 1 } } },
    "eu-west-9": { Linux: { "m5.large": "a lot" } },
  },
  ...over,
});

describe("of many types", () => {
  test("as many as a launch can name come along, and the best ones are among them", () => {
    const types = Array.from({ length: 500 }, (_, n) => `t${n}.large`);
    const bands = new Map(types.map((type, n) => [type, n < 250 ? 3 : n < 490 ? 2 : 0] as const));
    const x = snapshot([member("i-1", "worst.large", { offers: types, bands: new Map([...BANDS, ...bands]) })]);
    const better = victims(x)[0]?.better ?? [];
    expect(better.map((list) => list.length)).toEqual([10, 90]);
    expect(better[0]).toEqual(types.slice(490));
    expect(x.members[0]?.offers).toEqual(types);
  });
});

describe("the Spot Advisor's file", () => {
  const read = (region: string, over: object = {}) => parseAdvisor(JSON.stringify(file(over)), region);

  test("is reduced to one region's bands, which are places in the row of ranges by what they mean", () => {
    const { labels, bands } = read("us-east-1");
    expect(labels).toEqual(["<5%", "5-10%", ">20%"]);
    // A range that the file does not name is no band.
    expect(Object.fromEntries(bands.Linux)).toEqual({ "m5.large": 2, "m6i.large": 0 });
    expect(Object.fromEntries(bands.Windows)).toEqual({ "m5.large": 1 });
  });

  test("may say nothing about a region or a platform", () => {
    expect(read("eu-west-1").bands).toEqual({ Linux: new Map([["m5.large", 1]]), Windows: new Map() });
    expect(read("cn-north-1").bands).toEqual({ Linux: new Map(), Windows: new Map() });
  });

  test.each([
    ["no JSON", "<html>"],
    ["no object", "[]"],
    ["no ranges", JSON.stringify(file({ ranges: [] }))],
    ["ranges without a limit", JSON.stringify(file({ ranges: [{ index: 0, label: "<5%" }] }))],
    ["no regions", JSON.stringify(file({ spot_advisor: undefined }))],
  ])("is refused as a whole: %s", (_, json) => {
    expect(() => parseAdvisor(json, "us-east-1")).toThrow();
  });

  test("is refused where this region's part is broken, and only there", () => {
    expect(() => read("eu-west-9")).toThrow(/eu-west-9.*m5\.large/);
  });
});

describe("what the tags remember", () => {
  test("a place cools down until its time, whatever else the tag says", () => {
    const tag = addCooldown(undefined, "m5.large/a", NOW + 6 * HOUR, NOW);
    expect(tag).toBe("m5.large/a=2026-03-01T18:00Z");
    expect(readCooldown(`${tag} what?= x=y`)).toEqual(new Map([["m5.large/a", NOW + 6 * HOUR]]));
    expect(readCooldown(undefined)).toEqual(new Map());
    expect(readCooldown("nonsense")).toEqual(new Map());
  });

  test("what is over goes, and a place has one time", () => {
    const first = addCooldown("m4.large/b=2026-03-01T11:59Z m5.large/a=2026-03-01T13:00Z", "m5.large/a", NOW + 6 * HOUR, NOW);
    expect(first).toBe("m5.large/a=2026-03-01T18:00Z");
  });

  test("the tag never grows beyond what AWS takes: what ends first goes first", () => {
    let tag: string | undefined;
    for (let n = 0; n < 40; n++) {
      tag = addCooldown(tag, `m${n}gd.metal-24xl/-lax-1a`, NOW + HOUR + n * MINUTE, NOW);
      expect(tag.length).toBeLessThanOrEqual(256);
      expect(tag).toMatch(/^[\w .:/=+@-]+$/);
      expect(readCooldown(tag).has(`m${n}gd.metal-24xl/-lax-1a`)).toBe(true);
    }
    expect(readCooldown(tag).size).toBeGreaterThan(4);
  });

  test("pauses between tries for a fallback grow, up to an hour", () => {
    const pause = (times: number) => (nextTryMs(`${times} ${new Date(NOW).toISOString()}`) - NOW) / MINUTE;
    expect([1, 2, 3, 4, 5, 6, 60, 6_000].map(pause)).toEqual([5, 10, 20, 40, 60, 60, 60, 60]);
    expect([undefined, "", "x", "3 tomorrow"].map(nextTryMs)).toEqual([0, 0, 0, 0]);
  });
});

describe("a preaction message", () => {
  const detail = { "instance-id": "i-0b662ef9931388ba0" };
  const maxgroup = { group: "web", kind: "preaction", notice: "n", options: {}, better: [["m6i.large"], ["m5.large"]] };
  const body = (over: object) => JSON.stringify({ "detail-type": "MaxGroup Preaction", id: "n", detail, maxgroup, ...over });

  test("carries the types that will do", () => {
    const notice = readNotice(body({}), "interruption_evt_sqs");
    expect(notice).toMatchObject({ kind: "preaction", instances: ["i-0b662ef9931388ba0"], carried: { better: maxgroup.better } });
  });
  test("without its own part is refused, for it would say of nothing that it is better", () => {
    expect(() => readNotice(body({ maxgroup: undefined }), "interruption_evt_sqs")).toThrow(/maxgroup/);
  });
  test("on another queue is sent to its own", () => {
    expect(readNotice(body({}), "detach_evt_sqs")).toMatchObject({ belongsOn: "interruption_evt_sqs" });
  });
});

// --- The sequence ends ---------------------------------------------------------------------------------------------

/** A fleet and its advisor's data, drawn from a seed, and what becomes of it, look by look. */
class Fleet {
  readonly random: Random;
  readonly bands = new Map<string, number>();
  readonly offers: string[];
  members: (Member & { zone: string })[];
  readonly limit: number;
  tag = "";
  nowMs = NOW;
  replacements = 0;
  attempts = 0;
  #ids = 0;

  constructor(seed: number) {
    this.random = new Random(seed);
    const types = Array.from({ length: this.random.between([1, 12]) }, (_, n) => `t${n}.large`);
    for (const type of types) if (this.random.chance(0.9)) this.bands.set(type, this.random.between([0, 4]));
    this.offers = types.filter(() => this.random.chance(0.8));
    this.limit = this.random.between([1, 4]);
    this.members = Array.from({ length: this.random.between([1, 25]) }, () =>
      this.#member(types[this.random.between([0, types.length - 1])] ?? "", NOW - this.random.between([0, 48 * HOUR])),
    );
  }
  #member(type: string, launchedMs: number): Member & { zone: string } {
    const lifecycle = this.random.chance(0.8) ? "spot" : this.random.chance(0.5) ? "fallback" : "on-demand";
    const zone = ["a", "b", "c"][this.random.between([0, 2])] ?? "a";
    const { offers, bands } = this;
    return { ...member(`i-${this.#ids++}`, type, { lifecycle, launchedMs, offers, bands }), zone };
  }
  /** What the replacements may still come to, if each is better than the last: the sum of all bands, and the fallbacks. */
  potential(): number {
    return this.members.reduce((sum, m) => sum + (m.lifecycle === "fallback" ? 5 : (this.bands.get(m.type) ?? 0)), 0);
  }
  look(): Victim[] {
    const cooldown = readCooldown(this.tag);
    const members = this.members.map((m) => ({ ...m, notBeforeMs: cooldown.get(`${m.type}/${m.zone}`) ?? 0 }));
    return victims({ nowMs: this.nowMs, limit: this.limit, inHand: [], isSteady: true, leastLiveMs: 15 * MINUTE, members });
  }
  /** `to` undefined: nothing was to be had. */
  settle({ id, better }: Victim, to: string | undefined): void {
    const old = this.members.find((m) => m.id === id);
    if (!old) throw new Error(`${id} is no member`);
    this.attempts++;
    if (to === undefined || !(better?.some((types) => types.includes(to)) ?? true))
      this.tag = addCooldown(this.tag, `${old.type}/${old.zone}`, this.nowMs + 6 * HOUR, this.nowMs);
    if (to === undefined) return;
    this.replacements++;
    const fresh = this.#member(to, this.nowMs);
    this.members = this.members.map((m) => (m === old ? { ...fresh, lifecycle: "spot", zone: old.zone } : m));
  }
}

describe("for any data and any fleet", () => {
  const SEEDS = 400;

  test(`the sequence of replacements ends, each of them in a better band (${SEEDS} seeds)`, () => {
    let all = 0;
    for (let seed = 1; seed <= SEEDS; seed++) {
      const fleet = new Fleet(seed);
      const bound = fleet.potential();
      // Eight idle hours are more than any cooldown and any youth: after them nothing can come.
      for (let [hour, idle] = [0, 0]; hour < 2_000 && idle < 8; hour++) {
        const found = fleet.look();
        idle = found.length ? 0 : idle + 1;
        for (const victim of found) {
          const choices = victim.better?.flat() ?? (fleet.offers.length ? fleet.offers : ["t0.large"]);
          const to = fleet.random.chance(0.3) ? undefined : choices[fleet.random.between([0, choices.length - 1])];
          if (to && victim.better) expect([seed, (fleet.bands.get(to) ?? 9) < victim.band]).toEqual([seed, true]);
          fleet.settle(victim, to);
        }
        fleet.nowMs += HOUR;
      }
      expect([seed, fleet.replacements <= bound]).toEqual([seed, true]);
      expect([seed, fleet.look()]).toEqual([seed, []]);
      const best = Math.min(...fleet.offers.map((type) => fleet.bands.get(type) ?? 9));
      for (const m of fleet.members)
        if (m.lifecycle === "spot" && fleet.bands.has(m.type))
          expect([seed, (fleet.bands.get(m.type) ?? 0) <= best]).toEqual([seed, true]);
      all += fleet.replacements;
    }
    expect(all).toBeGreaterThan(SEEDS);
  });

  test("where each replacement comes out no better, a type and zone is tried at most four times a day", () => {
    for (let seed = 1; seed <= 100; seed++) {
      const fleet = new Fleet(seed);
      fleet.members = fleet.members.filter((m) => m.lifecycle === "spot");
      const places = new Set(fleet.members.map((m) => `${m.type}/${m.zone}`)).size;
      if (places > 5) continue; // more than the tag holds
      const days = 10;
      for (let tenMinutes = 0; tenMinutes < days * 144; tenMinutes++) {
        for (const victim of fleet.look()) fleet.settle(victim, fleet.members.find((m) => m.id === victim.id)?.type);
        fleet.nowMs += 10 * MINUTE;
      }
      // All of a place that one look chooses together fail together.
      expect([seed, fleet.attempts <= places * fleet.limit * 4 * (days + 1)]).toEqual([seed, true]);
    }
  });
});

import { describe, expect, test } from "bun:test";
import type { InstanceRequirementsRequest } from "@aws-sdk/client-ec2";
import { balancedZones, fleetRequest, type Override, type Pool, planLaunch, rungsFor } from "../../maxgroup.ts";
import { group } from "./fixtures/index.ts";

type Plan = Parameters<typeof planLaunch>[0];
const offer = (type: string, over: Partial<Override> = {}): Override => ({ type, weight: 1, ...over });
/** A pool's memory from a literal: "spot m5.large a" -> why it is avoided. */
const remembering =
  (known: Record<string, "failed" | "reclaimed">): Plan["memory"] =>
  (lifecycle, type, zone) =>
    known[`${lifecycle} ${type} ${zone}`];
/** A plan for one m5.large in zone a of a group with one member a zone and types m5.large and c5.large. */
const plan = (over: Partial<Plan> = {}) =>
  planLaunch({
    group: group({ overrides: [offer("m5.large"), offer("c5.large")] }, [["a"], ["b"], ["c"]]),
    old: { type: "m5.large", zone: "a", weight: 1 },
    rung: "any spot",
    alone: true,
    desperate: false,
    alt: [],
    subnets: new Map(["a", "b", "c"].map((zone) => [zone, `subnet-${zone}`])),
    templateType: "t3.large",
    memory: () => undefined,
    ...over,
  });
const names = (pools: Pool[]) => pools.map((p) => `${p.type} ${p.zone}`).sort();

describe("the rungs", () => {
  test.each([
    ["a spot member in a hurry", true, true, true, ["balanced spot", "any spot", "on-demand"]],
    ["a spot member in a hurry, without fallback", true, true, false, ["balanced spot", "any spot"]],
    ["a spot member without a hard deadline", true, false, true, ["balanced spot", "any spot"]],
    ["an on-demand member", false, true, true, ["on-demand"]],
    ["an on-demand member, fallback or not", false, true, false, ["on-demand"]],
    ["an on-demand member without a hard deadline", false, false, true, ["on-demand"]],
  ] as const)("%s climbs its own", (_, spot, deadline, fallback, rungs) => {
    expect(rungsFor(spot, deadline, fallback)).toEqual([...rungs]);
  });
});

describe("a replacement leaves the group balanced", () => {
  test.each([
    ["one a zone: back to its own", "a", [["a"], ["b"], ["c"]], ["a"]],
    ["its zone is the fullest: any of the others", "a", [["a"], ["a"], ["b"], ["c"]], ["a", "b", "c"]],
    ["far fuller: not there", "a", [["a"], ["a"], ["a"], ["b"], ["c"]], ["b", "c"]],
    ["an empty zone comes first", "a", [["a"], ["b"]], ["a", "c"]],
    ["two empty beside a full one", "a", [["a"], ["a"], ["a"]], ["b", "c"]],
    ["members on their way out do not count", "a", [["a"], ["b"], ["c", "Terminating"]], ["a", "c"]],
    ["members on their way in do", "a", [["a"], ["b", "Pending"], ["c", "Pending:Wait"]], ["a"]],
  ] as [string, string, [string, string?][], string[]][])("%s", (_, zone, members, zones) => {
    expect(balancedZones(group({}, members), zone, true).sort()).toEqual(zones);
  });

  test("in a wave each goes back to its own zone, for a fleet may put all of a call into one", () => {
    expect(balancedZones(group({}, [["a"], ["a"], ["a"], ["b"]]), "a", false)).toEqual(["a"]);
  });

  test("where the group has left that zone, to the emptiest of those it has", () => {
    for (const alone of [true, false])
      expect(balancedZones(group({ zones: ["b", "c"] }, [["a"], ["b"]]), "a", alone)).toEqual(["c"]);
  });
});

describe("what a rung asks for", () => {
  test("the first: the group's own types in the zones that keep it balanced", () => {
    expect(names(plan({ rung: "balanced spot", alt: ["r5.large"] }))).toEqual(["c5.large a", "m5.large a"]);
  });

  test("the second: every zone, and the extra types after the group's own", () => {
    const pools = plan({ rung: "any spot", alt: ["r5.large"] });
    expect(names(pools)).toEqual(["c5.large", "m5.large", "r5.large"].flatMap((t) => ["a", "b", "c"].map((z) => `${t} ${z}`)));
    const priority = (type: string) => pools.find((p) => p.type === type)?.priority ?? Number.NaN;
    expect(priority("m5.large")).toBeLessThan(priority("c5.large"));
    expect(priority("c5.large")).toBeLessThan(priority("r5.large"));
  });

  test("the third: the group's own types in every zone", () => {
    expect(names(plan({ rung: "on-demand" }))).toEqual(
      ["c5.large", "m5.large"].flatMap((t) => ["a", "b", "c"].map((z) => `${t} ${z}`)),
    );
  });

  test("no pool twice, whatever is named twice", () => {
    const pools = names(plan({ alt: ["m5.large", "r5.large", "r5.large"] }));
    expect(pools).toEqual([...new Set(pools)]);
    expect(pools).toHaveLength(9);
  });

  test("one subnet a zone, and no zone without one", () => {
    const pools = plan({
      subnets: new Map([
        ["a", "subnet-a2"],
        ["c", "subnet-c"],
      ]),
    });
    expect(new Set(pools.map((p) => `${p.zone} ${p.subnet}`))).toEqual(new Set(["a subnet-a2", "c subnet-c"]));
  });

  test("no subnet where the template names it", () => {
    const pools = plan({ subnets: new Map([["a", undefined]]) });
    expect(names(pools)).toEqual(["c5.large a", "m5.large a"]);
    for (const p of pools) expect(p.subnet).toBeUndefined();
  });

  test("the template's own type where the group names none", () => {
    expect(names(plan({ group: group({}, [["a"]]), rung: "on-demand" }))).toEqual(["t3.large a", "t3.large b", "t3.large c"]);
  });

  test("an override's own template, and the group's for the others", () => {
    const arm = { LaunchTemplateName: "arm", Version: "3" };
    const pools = plan({ group: group({ overrides: [offer("m5.large"), offer("m6g.large", { template: arm })] }) });
    for (const p of pools) expect(p.template).toEqual(p.type === "m6g.large" ? arm : { LaunchTemplateId: "lt-1", Version: "7" });
  });

  test("nothing from a group without a launch template", () => {
    expect(plan({ group: group({ template: undefined }) })).toEqual([]);
  });
});

describe("pools that failed or are being reclaimed", () => {
  const memory = remembering({ "spot m5.large a": "reclaimed", "spot c5.large b": "failed" });

  test("are left out as long as others remain", () => {
    expect(names(plan({ memory }))).toEqual(["c5.large a", "c5.large c", "m5.large b", "m5.large c"]);
    expect(names(plan({ memory, rung: "balanced spot" }))).toEqual(["c5.large a"]);
  });

  test("are still asked for where the group has no other, before the ladder is given up", () => {
    const only = group({ zones: ["a"], overrides: [offer("m5.large")] }, [["a"]]);
    for (const why of ["reclaimed", "failed"] as const) {
      const x = { group: only, memory: remembering({ "spot m5.large a": why }), desperate: true };
      expect([...plan({ ...x, rung: "balanced spot" }), ...plan({ ...x, rung: "any spot" })].map((p) => p.type)).toContain(
        "m5.large",
      );
    }
  });

  test("one that is being reclaimed is a better hope than one that had nothing", () => {
    const all = { "spot m5.large a": "reclaimed", "spot c5.large a": "failed" } as const;
    const x = { memory: remembering(all), subnets: new Map([["a", "subnet-a"]]) };
    expect(names(plan(x))).toEqual(["m5.large a"]);
  });

  test("of spot say nothing about on-demand, nor on-demand's about spot", () => {
    expect(plan({ memory, rung: "on-demand" })).toHaveLength(6);
    expect(plan({ memory: remembering({ "on-demand m5.large a": "failed" }) })).toHaveLength(6);
    expect(plan({ memory: remembering({ "on-demand m5.large a": "failed" }), rung: "on-demand" })).toHaveLength(5);
  });
});

describe("desired comes out even", () => {
  const weighted = group({
    overrides: [
      offer("m5.large", { weight: 2 }),
      offer("c5.large", { weight: 2 }),
      offer("m5.xlarge", { weight: 4 }),
      offer("r5.xlarge", { weight: 4 }),
    ],
  });

  test.each(["balanced spot", "any spot", "on-demand"] as const)(
    "a weighted group offers types of one weight only: %s",
    (rung) => {
      const pools = plan({ group: weighted, old: { type: "m5.xlarge", zone: "a", weight: 4 }, rung, alt: ["t3.large"] });
      expect([...new Set(pools.map((p) => p.type))]).toEqual(["m5.xlarge", "r5.xlarge"]);
    },
  );

  test("where no type has that weight any more, it is the old one's", () => {
    const pools = plan({ group: weighted, old: { type: "m5.2xlarge", zone: "a", weight: 8 } });
    expect([...new Set(pools.map((p) => p.type))]).toEqual(["m5.2xlarge"]);
  });

  test.each([
    ["vcpu", { VCpuCount: { Min: 4, Max: 4 }, MemoryMiB: { Min: 1 } }],
    ["memory-mib", { VCpuCount: { Min: 1, Max: 64 }, MemoryMiB: { Min: 4, Max: 4 } }],
  ])("a group that counts in %s asks for as much as the old one had", (desiredType, requirements) => {
    const asked = { VCpuCount: { Min: 1, Max: 64 }, MemoryMiB: { Min: 1 } };
    const overrides = [{ requirements: asked, weight: 1 }];
    const pools = plan({ group: group({ overrides, desiredType }), old: { type: "m5.xlarge", zone: "a", weight: 4 } });
    expect(pools).toHaveLength(3);
    for (const p of pools) expect(p.requirements).toEqual(requirements);
  });
});

describe("attribute-based groups", () => {
  const base: InstanceRequirementsRequest = { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 4096 } };
  const memory = remembering({ "spot m5.large a": "reclaimed" });
  const asked = (requirements: InstanceRequirementsRequest, over: Partial<Plan> = {}) =>
    Object.fromEntries(
      plan({ group: group({ overrides: [{ requirements, weight: 1 }] }, [["a"]]), memory, ...over }).map((p) => {
        expect(p.type).toBeUndefined();
        return [p.zone, p.requirements];
      }),
    );

  test("ask by their own requirements, without the type that is reclaimed", () => {
    const without = { ...base, ExcludedInstanceTypes: ["m5.large"] };
    expect(asked(base)).toEqual({ a: without, b: without, c: without });
  });

  test("keep what they exclude themselves, and exclude nothing twice", () => {
    expect(asked({ ...base, ExcludedInstanceTypes: ["t*"] }).a?.ExcludedInstanceTypes).toEqual(["t*", "m5.large"]);
    expect(asked({ ...base, ExcludedInstanceTypes: ["m5.large"] }).a?.ExcludedInstanceTypes).toEqual(["m5.large"]);
  });

  test("with a list of allowed types get no list of excluded ones, which AWS refuses beside it", () => {
    for (const r of Object.values(asked({ ...base, AllowedInstanceTypes: ["m5.*", "c5.*"] })))
      expect(r).not.toHaveProperty("ExcludedInstanceTypes");
  });

  test("with a list of allowed types leave the reclaimed one off it as long as others remain", () => {
    const allowed = asked({ ...base, AllowedInstanceTypes: ["m5.large", "c5.large"] });
    expect(allowed.a?.AllowedInstanceTypes).toEqual(["c5.large"]);
    expect(allowed.b?.AllowedInstanceTypes).toEqual(["c5.large"]);
  });

  test("leave out the same in every zone, for sets that overlap and differ are refused", () => {
    const x = { group: group({ overrides: [{ requirements: base, weight: 1 }] }), memory };
    const all = plan({ ...x, rung: "any spot" }).map((p) => p.requirements);
    expect(all).toEqual([1, 2, 3].map(() => ({ ...base, ExcludedInstanceTypes: ["m5.large"] })));
    expect(plan({ ...x, subnets: new Map([["b", "subnet-b"]]) }).map((p) => p.requirements)).toEqual([base]);
  });

  test("ask for four sets at most, the emptiest zones first, and for the others in the next rounds", () => {
    const zones = [..."abcdef"];
    const subnets = new Map(zones.map((zone) => [zone, `subnet-${zone}`]));
    const members: [string][] = [["a"], ["b"], ["c"], ["c"], ["e"], ["f"]];
    const asked = (overrides: Override[], pass: number) =>
      plan({ group: group({ zones, overrides }, members), subnets, pass })
        .map((p) => `${p.priority}${p.zone}`)
        .join(" ");
    const one = { requirements: base, weight: 1 };
    expect([0, 1, 2].map((pass) => asked([one], pass))).toEqual(["0a 0d 0b 0e", "0f 0c 0a 0d", "0b 0e 0f 0c"]);
    expect([0, 1].map((pass) => asked([one, { ...one }], pass))).toEqual(["0a 0d 1b 1e", "0b 0e 1f 1c"]);
    expect(asked([one, offer("m5.large")], 0).split(" ")).toHaveLength(10);
    // The template's own attributes count as well.
    const own = { templateType: undefined, templateRequirements: base };
    expect(plan({ group: group({ zones }, members), subnets, ...own })).toHaveLength(4);
  });

  test("are not changed themselves", () => {
    const own = { ...base, ExcludedInstanceTypes: ["t*"] };
    asked(own);
    expect(own).toEqual({ ...base, ExcludedInstanceTypes: ["t*"] });
  });

  test("on-demand is asked for without regard to spot", () => {
    expect(asked(base, { rung: "on-demand" })).toEqual({ a: base, b: base, c: base });
  });
});

describe("the fleet request", () => {
  const tags = [{ Key: "spotmax:group", Value: "web" }];
  const pool = (over: Partial<Pool> = {}): Pool => ({
    type: "m5.large",
    zone: "a",
    subnet: "subnet-a",
    template: { LaunchTemplateId: "lt-1", LaunchTemplateName: "web", Version: "7" },
    priority: 0,
    ...over,
  });
  const overrides = (input: ReturnType<typeof fleetRequest>) =>
    (input.LaunchTemplateConfigs ?? []).flatMap((c) => c.Overrides ?? []);

  test("is one synchronous attempt at spot, where price and capacity are best, tagged as launched", () => {
    expect(fleetRequest(group(), [pool()], "spot", tags, 3)).toMatchObject({
      Type: "instant",
      TargetCapacitySpecification: { TotalTargetCapacity: 3, DefaultTargetCapacityType: "spot" },
      SpotOptions: { AllocationStrategy: "price-capacity-optimized" },
      TagSpecifications: [{ ResourceType: "instance", Tags: tags }],
    });
  });

  test("for on-demand says nothing of spot", () => {
    const input = fleetRequest(group({ spotMaxPrice: "0.05" }), [pool()], "on-demand", tags, 1);
    expect(input.TargetCapacitySpecification).toMatchObject({ TotalTargetCapacity: 1, DefaultTargetCapacityType: "on-demand" });
    expect(input.SpotOptions).toBeUndefined();
    expect(overrides(input)).toEqual([{ InstanceType: "m5.large", SubnetId: "subnet-a" }]);
  });

  test("names a template by its ID or its name, never by both", () => {
    const by = (template: Pool["template"]) =>
      fleetRequest(group(), [pool({ template })], "spot", tags, 1).LaunchTemplateConfigs?.[0]?.LaunchTemplateSpecification;
    expect(by({ LaunchTemplateId: "lt-1", LaunchTemplateName: "web", Version: "7" })).toEqual({
      LaunchTemplateId: "lt-1",
      Version: "7",
    });
    expect(by({ LaunchTemplateName: "web", Version: "$Latest" })).toEqual({ LaunchTemplateName: "web", Version: "$Latest" });
    expect(by({ LaunchTemplateId: "lt-1" })).toEqual({ LaunchTemplateId: "lt-1", Version: "$Default" });
  });

  test("has one part a template", () => {
    const pools = [pool(), pool({ type: "m6g.large", template: { LaunchTemplateName: "arm" } }), pool({ zone: "b" })];
    const configs = fleetRequest(group(), pools, "spot", tags, 1).LaunchTemplateConfigs ?? [];
    expect(configs.map((c) => [c.LaunchTemplateSpecification?.Version, c.Overrides?.length])).toEqual([
      ["7", 2],
      ["$Default", 1],
    ]);
  });

  test("has at most the 300 overrides that AWS takes, the first ones", () => {
    const pools = Array.from({ length: 301 }, (_, n) =>
      pool({ type: `m5.t${n}`, template: { LaunchTemplateId: `lt-${n % 2}` } }),
    );
    const asked = overrides(fleetRequest(group(), pools, "spot", tags, 1)).map((o) => o.InstanceType);
    expect(new Set<string | undefined>(asked)).toEqual(new Set(pools.slice(0, 300).map((p) => p.type)));
    expect(asked).toHaveLength(300);
  });

  test("keeps to the group's own maximum price", () => {
    const input = fleetRequest(group({ spotMaxPrice: "0.05" }), [pool(), pool({ subnet: "subnet-b" })], "spot", tags, 1);
    expect(overrides(input).map((o) => o.MaxPrice)).toEqual(["0.05", "0.05"]);
    expect(overrides(fleetRequest(group(), [pool()], "spot", tags, 1))[0]?.MaxPrice).toBeUndefined();
  });

  test("for on-demand keeps the group's order of types where it is prioritized", () => {
    const pools = [pool(), pool({ type: "c5.large", priority: 1 })];
    const input = fleetRequest(group({ prioritized: true }), pools, "on-demand", tags, 1);
    expect(input.OnDemandOptions?.AllocationStrategy).toBe("prioritized");
    expect(overrides(input).map((o) => [String(o.InstanceType), o.Priority])).toEqual([
      ["m5.large", 0],
      ["c5.large", 1],
    ]);
    const cheapest = fleetRequest(group(), pools, "on-demand", tags, 1);
    expect(cheapest.OnDemandOptions?.AllocationStrategy).toBe("lowest-price");
    for (const o of overrides(cheapest)) expect(o.Priority).toBeUndefined();
  });

  test("names no subnet that the template names, and no type beside requirements", () => {
    const requirements = { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 4096 } };
    const pools = [pool({ subnet: undefined }), pool({ type: undefined, requirements }), pool({ type: undefined })];
    expect(overrides(fleetRequest(group(), pools, "spot", tags, 1))).toEqual([
      { InstanceType: "m5.large" },
      { InstanceRequirements: requirements, SubnetId: "subnet-a" },
      { SubnetId: "subnet-a" },
    ]);
  });

  test("has no priority beside requirements, which AWS refuses", () => {
    const requirements = { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 4096 } };
    const input = fleetRequest(group({ prioritized: true }), [pool({ type: undefined, requirements })], "on-demand", tags, 1);
    expect(overrides(input)[0]?.Priority).toBeUndefined();
  });

  test("is the same for the same question, so that its token is", () => {
    const ask = () => JSON.stringify(fleetRequest(group(), [pool()], "spot", tags, 1));
    expect(ask()).toBe(ask());
    expect(JSON.parse(ask())).not.toHaveProperty("ClientToken");
  });
});

describe("where only some types will do", () => {
  const requirements = { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 4096 } };
  const abr = (more: InstanceRequirementsRequest | object): Override => ({
    requirements: { ...requirements, ...more },
    weight: 1,
  });
  const only = ["m6i.large", "c5.large"];
  const allowed = (overrides: Override[], over: Partial<Plan> = {}) =>
    plan({ group: group({ overrides }, [["a"], ["b"], ["c"]]), only, ...over }).map(
      ({ type, zone, requirements: r }) => [type ?? r?.AllowedInstanceTypes, r?.ExcludedInstanceTypes, zone] as const,
    );

  test("they are asked for, in the zones that keep the group balanced, on either rung", () => {
    for (const rung of ["balanced spot", "any spot"] as const) expect(names(plan({ only, rung }))).toEqual(["c5.large a"]);
    expect(names(plan({ only, alt: ["m6i.large", "r5.large"] }))).toEqual(["c5.large a", "m6i.large a"]);
  });

  test("every zone will do where AZRebalance is suspended", () => {
    const suspended = new Set(["AZRebalance"]);
    const overrides = [offer("c5.large")];
    expect(names(plan({ only, group: group({ overrides, suspended }, [["a"], ["b"], ["c"]]) })).length).toBe(3);
  });

  test("attributes are narrowed to them, and never widened", () => {
    expect(allowed([abr({})])).toEqual([[only, undefined, "a"]]);
    expect(allowed([abr({ AllowedInstanceTypes: ["m6*", "m5.large"] })])).toEqual([[["m6i.large"], undefined, "a"]]);
    expect(allowed([abr({ ExcludedInstanceTypes: ["c5.*"] })])).toEqual([[["m6i.large"], undefined, "a"]]);
    expect(allowed([abr({ AllowedInstanceTypes: ["r*"] }), offer("m5.large")])).toEqual([]);
  });

  test("so are the template's own attributes, and a template without any offers nothing", () => {
    const bare = { templateType: undefined };
    expect(allowed([], { ...bare, templateRequirements: requirements })).toEqual([[only, undefined, "a"]]);
    expect(allowed([], bare)).toEqual([]);
  });

  test("a pool that failed or is being taken back is no better place, even if nothing else remains", () => {
    for (const why of ["failed", "reclaimed"] as const)
      expect(plan({ only, desperate: true, memory: remembering({ "spot c5.large a": why }) })).toEqual([]);
  });
});

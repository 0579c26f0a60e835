// A month of a simulated spot market: pools come and go, and AWS takes instances back, the more often the worse their
// band. For ten days the advisor's data stands still, then it moves. What is counted is how many replacements preaction
// makes of its own accord.
import { expect, test } from "bun:test";
import { SpotAdvisor } from "../aws/advisor.ts";
import { Random } from "../aws/basics.ts";
import type { GroupSpec } from "../aws/world.ts";
import { Stage } from "./harness.ts";

const DAYS = 30;
const TYPES = ["m4.large", "m5.large", "m5a.large", "m6i.large", "m6a.large", "c5.large", "c5a.large", "r5.large"];
const ZONES = ["us-east-1a", "us-east-1b", "us-east-1c"];
const STEADY_DAYS = 10;
/** Of a hundred instances, so many are taken back in a month, by band: eight times what the Spot Advisor says. */
const TAKEN_BACK = [25, 64, 104, 144, 240];

const GROUPS: { spec: GroupSpec; options: object }[] = [
  { spec: { name: "three-types", min: 3, max: 6, desired: 3, types: ["m4.large", "m5.large", "m6i.large"] }, options: {} },
  { spec: { name: "all-types", min: 6, max: 6, desired: 6, types: TYPES }, options: { max_num_of_terminated_one_time: 2 } },
  { spec: { name: "two-types", min: 2, max: 4, desired: 2, types: ["c5.large", "c5a.large"] }, options: {} },
  {
    spec: {
      name: "attributes",
      min: 4,
      max: 8,
      desired: 4,
      overrides: [{ InstanceRequirements: { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 8_192, Max: 8_192 } } }],
    },
    options: {},
  },
  { spec: { name: "one-zone", min: 3, max: 6, desired: 3, zones: ["us-east-1b"], types: TYPES.slice(2, 6) }, options: {} },
];

interface Day {
  /** Replacements that preaction launched, by group. */
  replaced: Map<string, number>;
  /** Of them, those that found the best pools dry, and so came out in a better band, but not in the best one. */
  between: Map<string, number>;
  interruptions: number;
}

/** A month from a seed, day by day. */
async function month(seed: number): Promise<{ s: Stage; days: Day[] }> {
  const s = new Stage({ seed, checkOutputs: false, staleMs: 2_000 });
  const random = new Random(seed);
  const bands = Object.fromEntries([...TYPES, "m5d.large", "m5n.large"].map((type) => [type, random.between([0, 4])]));
  const advisor = new SpotAdvisor(bands);
  s.http = async (_, init) => advisor.answer(new Headers(init?.headers).get("if-none-match"));
  for (const { spec, options } of GROUPS) s.group(spec, { is_enable_preaction: true, ...options });
  await s.start({ level: "info", config: s.config({ preaction_snapshot_interval_minutes: 20 }) });

  const dryOut = () => {
    for (const type of TYPES)
      for (const zone of ZONES) {
        if (!random.chance(0.01)) continue;
        const pool = s.world.pool("spot", type, zone);
        pool.capacity = 0;
        s.world.after(random.between([1, 24]) * 3_600_000, () => {
          pool.capacity = Number.POSITIVE_INFINITY;
        });
      }
  };
  const takeBack = (day: Day) => {
    for (const group of s.world.autoscaling.groups.values())
      for (const { instance, state } of [...group.members.values()]) {
        const share = (TAKEN_BACK[bands[instance.type] ?? 2] ?? 0) / 100;
        if (state !== "InService" || instance.lifecycle !== "spot" || !random.chance(share / (DAYS * 24))) continue;
        s.world.interrupt(instance.id, { keepCapacity: random.chance(0.5) });
        day.interruptions++;
      }
  };
  const days: Day[] = [];
  for (let n = 0; n < DAYS; n++) {
    const day: Day = { replaced: new Map(), between: new Map(), interruptions: 0 };
    days.push(day);
    for (const [type, band] of n < STEADY_DAYS ? [] : Object.entries(bands))
      if (random.chance(0.05)) bands[type] = Math.max(0, Math.min(4, band + (random.chance(0.5) ? 1 : -1)));
    const from = s.lines.length;
    for (let hour = 0; hour < 24; hour++) {
      dryOut();
      takeBack(day);
      await s.seconds(3_600);
    }
    for (const line of s.lines.slice(from)) {
      const [, id = "", name] = / launched (i-\S+) for .* group=(\S+) .*notice=preaction-/.exec(line) ?? [];
      if (!name) continue;
      day.replaced.set(name, (day.replaced.get(name) ?? 0) + 1);
      const types = GROUPS.find(({ spec }) => spec.name === name)?.spec.types ?? TYPES;
      const best = Math.min(...types.map((type) => bands[type] ?? 4));
      if ((bands[s.world.instance(id).type] ?? 4) > best) day.between.set(name, (day.between.get(name) ?? 0) + 1);
    }
  }
  return { s, days };
}

test("preaction replaces few: each member once at first, hardly anything while the data stands still, and little after", async () => {
  const { s, days } = await month(1);
  const count = (name: string, from: number, to: number) =>
    days.slice(from, to).reduce((sum, day) => sum + (day.replaced.get(name) ?? 0), 0);
  const interruptions = (from: number, to: number) => days.slice(from, to).reduce((sum, day) => sum + day.interruptions, 0);
  console.log(`${interruptions(0, DAYS)} interruptions in ${DAYS} days, and replaced by preaction:`);
  for (const { spec } of GROUPS) {
    const [first, steady, moving] = [
      count(spec.name, 0, 2),
      count(spec.name, 2, STEADY_DAYS),
      count(spec.name, STEADY_DAYS, DAYS),
    ];
    console.log(
      `  ${spec.name} (${spec.desired}): ${first} in two days, ${steady} until day ${STEADY_DAYS}, ${moving} from then on`,
    );
    const between = days.slice(0, 2).reduce((sum, day) => sum + (day.between.get(spec.name) ?? 0), 0);
    const isFew = first <= spec.desired + interruptions(0, 2) + between;
    expect([spec.name, "at first", isFew]).toEqual([spec.name, "at first", true]);
    // Whoever was interrupted, or found the best pools dry, may end in a worse band, and go from there once more.
    expect([spec.name, "steady", steady <= interruptions(0, STEADY_DAYS)]).toEqual([spec.name, "steady", true]);
    expect([spec.name, "moving", moving <= 3 * spec.desired]).toEqual([spec.name, "moving", true]);
    const group = s.world.autoscaling.groups.get(spec.name);
    expect([spec.name, group?.min, group?.max, group?.desired]).toEqual([spec.name, spec.min, spec.max, spec.desired]);
    expect([spec.name, group?.members.size]).toEqual([spec.name, spec.desired]);
  }
  expect(interruptions(0, DAYS)).toBeGreaterThan(3);
  expect(s.world.queueDepth(s.queues.deadLetter).visible).toBe(0);
  expect(s.lines.filter((line) => line.startsWith("ERRO"))).toEqual([]);
});

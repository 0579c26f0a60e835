// Thousands of lives from seeds, and a check on the checks: bugs put in on purpose must be found by them.
import { expect, test } from "bun:test";
import { MUTATIONS } from "./mutations.ts";
import { runMutations, runSeeds } from "./run.ts";

const SEEDS = Number(process.env.SIM_SEEDS ?? 2000);

test(
  `${SEEDS} lives break no invariant`,
  async () => {
    const failures = await runSeeds(SEEDS);
    expect(failures.map(({ seed, text, replay }) => `seed ${seed}: ${text}\n  ${replay}`)).toEqual([]);
  },
  60_000 + SEEDS * 1_000,
);

test(
  "every bug put in on purpose is found within 500 lives",
  async () => {
    const found = await runMutations(500);
    expect([...found].filter(([, seed]) => !(Number(seed) <= 500))).toEqual([]); // in words, where none has found it
    expect(found.size).toBe(MUTATIONS.length);
  },
  15 * 60_000,
);

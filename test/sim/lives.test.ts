// Thousands of lives from seeds, and a check on the checks: bugs put in on purpose must be found by them.
import { expect, test } from "bun:test";
import { Glob } from "bun";
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

test("every bug of the list names a test that is there", async () => {
  const files = await Array.fromAsync(new Glob("../*/*.test.ts").scan(import.meta.dir));
  const rows = (await Bun.file(`${import.meta.dir}/BUGS.md`).text()).match(/^\| (?!found by).*$/gm) ?? [];
  expect(rows.length).toBeGreaterThan(90);
  const missing = rows.map(async (row) => {
    const [, file = "", title = ""] = / `([\w.-]+)`: (.*) \|$/.exec(row) ?? [];
    const path = files.find((name) => name.endsWith(`/${file}`));
    const source = path ? await Bun.file(`${import.meta.dir}/${path}`).text() : "";
    return source.includes(`"${title.replaceAll('"', '\\"')}"`) ? [] : [`${file}: ${title}`];
  });
  expect((await Promise.all(missing)).flat()).toEqual([]);
});

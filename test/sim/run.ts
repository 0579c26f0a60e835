import { featureNames, live, type Feature } from "./life.ts";
const arg = (name: string) => { const i = process.argv.indexOf(name); return i < 0 ? undefined : process.argv[i + 1]; };
const without = (arg("--without") ?? "").split(",").filter(Boolean) as Feature[];
const seed = arg("--seed");
if (seed !== undefined) {
  const o = await live(Number(seed), { log: process.argv.includes("--log"), without });
  if (process.argv.includes("--log")) process.stdout.write(o.lines.join(""));
  console.log(o.features.join(","), o.isQuiet, o.minutes, o.calls);
  for (const f of o.findings) console.log(f.rule, (f.atMs - 1_767_225_600_000) / 1000, f.text);
} else {
  const from = Number(arg("--from") ?? 1); const n = Number(process.argv[2] ?? 100);
  const t0 = performance.now(); let calls = 0, min = 0, rest = 0, launches = 0; let bad = 0;
  for (let s = from; s < from + n; s++) {
    const t = performance.now();
    const o = await live(s, { without });
    calls += o.calls; min += o.minutes; rest += o.restMinutes; launches += o.launches;
    const ms = performance.now() - t;
    if (o.findings.length) { bad++; const f = o.findings[0]; console.log(s, o.isQuiet ? "QUIET" : "", `${ms.toFixed(0)}ms`, f?.rule, ((f?.atMs ?? 0) - 1_767_225_600_000) / 1000, f?.text.slice(0, 200)); }
    else if (ms > 1500) console.log(s, `slow ${ms.toFixed(0)}ms`, o.minutes, o.calls);
  }
  console.log({ bad, ms: (performance.now() - t0) / n, calls: calls / n, min: min / n, rest: rest / n, launches: launches / n });
}
void featureNames;

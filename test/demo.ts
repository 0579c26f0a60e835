/**
 * `make demo`: the program, as it is shipped, handles three spot interruptions in a simulated AWS.
 *
 * The daemon is the compiled binary in its local test mode (-t); the AWS is test/aws over HTTP on a loopback port.
 * Every line of the timeline is something that the simulator saw happen, and the list at the end is checked, not told:
 * the exit code is 1 where one of its points does not hold.
 */
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative, resolve } from "node:path";
import { RealClock } from "./aws/clock.ts";
import type { Instance } from "./aws/ec2.ts";
import { serve } from "./aws/server.ts";
import { type AuditEntry, type CapacitySample, type Service, World } from "./aws/world.ts";

const REGION = "us-east-2";
const LIMIT_MS = 58_000;
const BINARY = resolve(process.env.MAX_GROUP_BINARY ?? join(import.meta.dir, "../dist/max_group"));

// ─── Terminal ────────────────────────────────────────────────────────────────────────────────────────────

const live = process.stdout.isTTY ?? false;
type Paint = (text: string) => string;
const paint =
  (code: number): Paint =>
  (text) =>
    live && !process.env.NO_COLOR ? `\x1b[${code}m${text}\x1b[0m` : text;
const [bold, dim, red, green, yellow] = [paint(1), paint(2), paint(31), paint(32), paint(33)] as const;
const [blue, magenta, cyan] = [paint(34), paint(35), paint(36)] as const;

/** What stands below the timeline and moves down with it; only on a terminal. */
let footer: string[] = [];
function draw(lines: string[], below: string[]): void {
  const up = footer.length ? `\x1b[${footer.length}A\x1b[J` : "";
  footer = live ? below : [];
  process.stdout.write(up + [...lines, ...footer].map((line) => `${line}\n`).join(""));
}
const say = (...lines: string[]) => draw(lines, []);
const heading = (text: string) => say("", bold(text));

// ─── The stage ───────────────────────────────────────────────────────────────────────────────────────────

type Scene = { name: string; color: Paint; title: string; old: Instance; startedWith: number; before: Snapshot };
type Snapshot = { sizes: string; policy: string; members: Instance[] };

const startMs = performance.now();
const folder = mkdtempSync(join(tmpdir(), "max_group-demo-"));
const calls = new Map<string, number>();
/** When the first launch call for an old instance arrived, ms since 1970. */
const launchCallMs = new Map<string, number>();
const samples: CapacitySample[] = [];
const scenes: Scene[] = [];
let receivedMs: number | undefined;
let noticeMs = 0;

const served = serve({ call: answer });
const world = new World({
  clock: new RealClock(),
  seed: 3,
  region: REGION,
  origin: served.url,
  pendingMs: [2_000, 4_000],
  attachMs: [400, 900],
  detachMs: [400, 900],
  healthyMs: [1_000, 2_000],
  drainMs: 1_500,
  shuttingDownMs: [500, 900],
});
world.onCapacity((sample) => samples.push(sample));

/** One request of the daemon: counted, and where it launches something, told. */
async function answer(service: Service, operation: string, input: object, options?: { signal?: AbortSignal }): Promise<object> {
  calls.set(operation, (calls.get(operation) ?? 0) + 1);
  if (operation === "ReceiveMessage") receivedMs ??= performance.now();
  const launches = (operation === "CreateFleet" || operation === "RunInstances") && !("DryRun" in input && input.DryRun);
  if (!launches) return world.call(service, operation, input, options);
  const atMs = Date.now();
  const scene = scenes.find((s) => JSON.stringify(input).includes(s.old.id));
  const known = world.ec2.instances.size;
  try {
    return await world.call(service, operation, input, options);
  } finally {
    if (scene) {
      if (!launchCallMs.has(scene.old.id)) launchCallMs.set(scene.old.id, atMs);
      const got = [...world.ec2.instances.values()].slice(known).find((i) => i.tags.get("spotmax:replaces") === scene.old.id);
      const text = JSON.stringify(input);
      const kind = /"DefaultTargetCapacityType":"on-demand"/.test(text) ? "on-demand" : "spot";
      const pools = (text.match(/"SubnetId"/g) ?? []).length;
      const asked = `wants ${kind === "spot" ? kind : magenta(kind)}, ${pools} pool${pools === 1 ? "" : "s"}`;
      tell(atMs, scene, operation, got ? `${asked}: ${describe(got)}` : `${asked}: ${yellow("nothing to be had")}`);
    }
  }
}

const zone = (i: Instance) => i.zone.replace(REGION, "2");
const describe = (i: Instance) => `${bold(i.id)} ${i.type} ${zone(i)}`;
const groupOf = (name: string) => {
  const group = world.autoscaling.groups.get(name);
  if (!group) throw new Error(`the world has no group ${name}`);
  return group;
};
function snapshot(name: string): Snapshot {
  const { min, max, desired, mixed, template, tags, suspended, members } = groupOf(name);
  return {
    sizes: `minimum ${min}, desired ${desired}, maximum ${max}`,
    policy: JSON.stringify([mixed, template, [...tags], [...suspended]]),
    members: [...members.values()].map((m) => m.instance),
  };
}
function addScene(color: Paint, title: string, which: number, spec: Parameters<World["createGroup"]>[0]): void {
  const { name, instanceIds } = world.createGroup(spec);
  const old = world.instance(instanceIds[which] ?? "");
  scenes.push({ name, color, title, old, startedWith: spec.desired, before: snapshot(name) });
}

// ─── The timeline ────────────────────────────────────────────────────────────────────────────────────────

/** The width that a text takes, its colours aside. */
const ESCAPE = new RegExp(`${String.fromCharCode(27)}\\[\\d+m`, "g");
const width = (text: string) => text.replace(ESCAPE, "").length;
const pad = (text: string, columns: number) => text + " ".repeat(Math.max(0, columns - width(text)));
const inService = (name: string) => world.autoscaling.sample(name)?.inService ?? 0;

/** One block a member in service; those beyond what the group had at its start are lighter. */
function blocks({ name, startedWith, color }: Scene): string {
  const now = inService(name);
  const short = startedWith - now;
  return short > 0
    ? color("■".repeat(now)) + red("□".repeat(short))
    : color("■".repeat(startedWith)) + dim(color("■".repeat(now - startedWith)));
}
const pending: { atMs: number; line: string }[] = [];
function tell(atMs: number, scene: Scene, what: string, text: string): void {
  const seconds = ((atMs - noticeMs) / 1000).toFixed(1).padStart(5);
  pending.push({
    atMs,
    line: `${seconds} s  ${scene.color(scene.name.padEnd(6))} ${pad(what.padEnd(13) + text, 72)} ${blocks(scene)}`,
  });
}

/** The least capacity of a group in each fifth of a second (or what fits) since the notice. */
function chart({ name, color, startedWith }: Scene, endMs: number, columns = 56): string {
  const own = samples.filter((s) => s.group === name);
  const stepMs = Math.max(200, Math.ceil((endMs - noticeMs) / columns / 100) * 100);
  const bars = Array.from({ length: Math.max(1, Math.ceil((endMs - noticeMs) / stepMs)) }, (_, n) => {
    const [fromMs, toMs] = [noticeMs + n * stepMs, noticeMs + (n + 1) * stepMs];
    const first = own.findLast((s) => s.atMs <= fromMs)?.inService ?? startedWith;
    return Math.min(first, ...own.filter((s) => s.atMs > fromMs && s.atMs <= toMs).map((s) => s.inService));
  });
  const top = startedWith + 1;
  const line = bars
    .map((n) => {
      const bar = "▁▂▃▄▅▆▇█"[Math.max(0, Math.round((8 * n) / top) - 1)] ?? "█";
      return n < startedWith ? red(bar) : color(bar);
    })
    .join("");
  const { desired, max } = groupOf(name);
  const sizes = `${inService(name)} in service, desired ${desired}, maximum ${max}`;
  return `  ${color(name.padEnd(6))} ${pad(line, columns)} ${dim(sizes)}`;
}

/** What a line of the simulator's record means to the reader; undefined: nothing new. */
function explain(entry: AuditEntry): { scene: Scene; what: string; text: string } | undefined {
  const { what, ids, detail = "" } = entry;
  const id = ids[0] ?? "";
  const replaced = world.ec2.instances.get(id)?.tags.get("spotmax:replaces");
  const scene = scenes.find((s) => s.old.id === (replaced ?? id) || s.name === entry.group);
  if (!scene) return undefined;
  const made = (text: string, label = what) => ({ scene, what: label, text });
  switch (what) {
    case "notice":
      return made(`AWS will take ${bold(id)} ${scene.old.type} ${zone(scene.old)} in 120 s`);
    case "running":
      return replaced ? made(`${id} runs`) : undefined;
    case "sizes": {
      const maximum = Number(detail.split("/")[2]);
      const usual = Number(/maximum (\d+)/.exec(scene.before.sizes)?.[1]);
      return made(maximum > usual ? `raised from ${usual} to ${maximum} to make room` : `back to ${maximum}`, "maximum");
    }
    case "attach":
      return made(`${id} joins the group`);
    case "in service":
      return made(`${id} ${green("takes its place")}`);
    case "target healthy":
      return made(`${id} answers the health checks`, "healthy");
    case "detach":
      return made(`${id} leaves, ${detail}`);
    case "detached":
      return made(`${id} is out of the group`);
    default:
      return undefined;
  }
}

let told = 0;
let waiting = "";
/** The chart stops when all are replaced: a flat line says no more. */
let chartEndMs = Number.POSITIVE_INFINITY;
function tick(): void {
  for (const entry of world.audit.slice(told)) {
    const line = noticeMs && entry.atMs >= noticeMs ? explain(entry) : undefined;
    if (line) tell(entry.atMs, line.scene, line.what, line.text);
  }
  told = world.audit.length;
  const nowMs = Date.now();
  const lines = pending.splice(0).toSorted((a, b) => a.atMs - b.atMs);
  const below = [
    "",
    ...scenes.map((s) => chart(s, Math.min(nowMs, chartEndMs))),
    dim(`  ${((nowMs - noticeMs) / 1000).toFixed(0)} s  ${waiting}`),
  ];
  if (lines.length || live)
    draw(
      lines.map((l) => l.line),
      noticeMs ? below : [],
    );
}

async function until(what: string, done: () => boolean): Promise<void> {
  waiting = `waiting: ${what}`;
  while (!done()) {
    if (performance.now() - startMs > LIMIT_MS) throw new Error(`after ${LIMIT_MS / 1000} s still not: ${what}`);
    if (daemon && daemon.exitCode !== null) throw new Error(`the daemon ended with exit code ${daemon.exitCode}`);
    tick();
    await Bun.sleep(100);
  }
  tick();
}

// ─── The story ───────────────────────────────────────────────────────────────────────────────────────────

let daemon: Bun.Subprocess<"ignore", "ignore", "ignore"> | undefined;
const logFile = join(folder, "max_group.log");
const claimsOf = (old: Instance) => [...world.ec2.instances.values()].filter((i) => i.tags.get("spotmax:replaces") === old.id);
const depth = (url: string) => Object.values(world.queueDepth(url)).reduce((a, b) => a + b, 0);
const rssMb = (pid: number) =>
  Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? Number.NaN) / 1024;

async function main(): Promise<number> {
  if (!existsSync(BINARY)) {
    console.error(`${relative(process.cwd(), BINARY)} is missing: \`make build\` makes it, \`make demo\` does so by itself`);
    return 1;
  }
  const queues = world.createQueues();
  const spot = { InstanceMarketOptions: { MarketType: "spot" as const } };
  addScene(cyan, "a plain group at minimum = desired = maximum", 0, {
    ...{ name: "web", min: 3, desired: 3, max: 3, types: ["m5.large"], template: spot },
  });
  addScene(blue, "a mixed instances policy behind a load balancer", 1, {
    ...{ name: "api", min: 2, desired: 4, max: 8, types: ["c5.large", "c5a.large", "c6i.large"], targetGroups: ["api"] },
  });
  addScene(magenta, "its spot pools are all empty: on-demand has to do", 2, {
    ...{ name: "batch", min: 0, desired: 3, max: 6, types: ["r5.large", "r5a.large"] },
  });
  for (const type of ["r5.large", "r5a.large"])
    for (const letter of "abc") world.pool("spot", type, REGION + letter).capacity = 0;

  const queue = (queue_url: string) => ({ queue_url });
  const config = {
    global: {
      interruption_evt_sqs: queue(queues.interruption),
      detach_evt_sqs: queue(queues.detach),
      termination_evt_sqs: queue(queues.termination),
    },
    groups: Object.fromEntries(scenes.map(({ name }) => [name, { detaching_delay_seconds: 5 }])),
  };
  mkdirSync(join(folder, "conf"));
  writeFileSync(join(folder, "conf/service_config.json"), JSON.stringify(config, null, 2));

  say(bold("max_group: three spot interruptions, from notice to end"), "");
  for (const { name, title, before, color } of scenes) say(`  ${color(name.padEnd(6))} ${pad(title, 52)} ${dim(before.sizes)}`);
  say(
    "",
    dim("The daemon is the compiled binary. AWS is simulated, over HTTP on a loopback port: launch to running"),
    dim("is shortened to 2–4 s (AWS: 5–17 s), a load balancer's drain to 1.5 s; the rest takes its real time."),
  );

  const spawnedMs = performance.now();
  daemon = Bun.spawn([BINARY, "-t", "-r", REGION, "-l", logFile], {
    cwd: folder,
    env: {
      PATH: "/usr/bin:/bin",
      HOME: folder,
      AWS_ENDPOINT_URL: served.url,
      AWS_ACCESS_KEY_ID: "demo",
      AWS_SECRET_ACCESS_KEY: "demo",
      AWS_EC2_METADATA_DISABLED: "true",
    },
    stdin: "ignore",
    stdout: "ignore",
    stderr: "ignore",
  });
  await until("the daemon's first receive", () => receivedMs !== undefined);
  await Bun.sleep(500);

  heading(`${"since notice".padEnd(16)}${"what happened".padEnd(73)}in service`);
  noticeMs = Date.now();
  for (const { old } of scenes) world.interrupt(old.id, { noticeSeconds: 600 }); // AWS takes them when we skip ahead, below
  await until("the three replaced", () => scenes.every((s) => s.old.group === undefined));
  const replacedMs = Date.now();
  chartEndMs = replacedMs + 1_500;
  if (!live)
    say(dim("         all three are replaced; the instance manager puts the maximum back, then removes its record of it"));
  await until("the instance manager puts the maximum of web back, then removes its record of it", () =>
    scenes.every((s) => groupOf(s.name).tags.size === 0 && claimsOf(s.old).every((i) => i.tags.has("spotmax:attached"))),
  );
  const pid = daemon.pid;
  const rss = rssMb(pid);

  const owed = world.queueDepth(queues.termination).delayed;
  for (const { old } of scenes) world.ec2.reclaim(old, "terminate");
  hurry(queues.termination);
  await until(
    "the last messages handled",
    () => depth(queues.termination) === 0 && scenes.every((s) => s.old.state === "terminated"),
  );
  draw([dim(`         skipped ahead past the deadline: AWS takes the three, the ${owed} last messages find nothing to do`)], []);

  const stopMs = performance.now();
  daemon.kill("SIGTERM");
  const code = await daemon.exited;
  const stopTookMs = performance.now() - stopMs;

  heading(`Capacity in service, from the notice until ${((chartEndMs - noticeMs) / 1000).toFixed(0)} s after it`);
  say(...scenes.map((s) => chart(s, chartEndMs)));

  heading(`${pad("  Before", 52)}After`);
  for (const scene of scenes) compare(scene);

  heading("Totals");
  const total = [...calls.values()].reduce((a, b) => a + b, 0);
  const most = [...calls].toSorted((a, b) => b[1] - a[1]).slice(0, 3);
  const at = (what: string, id: string) => world.audit.find((a) => a.what === what && a.ids.includes(id))?.atMs ?? Number.NaN;
  const since = (ms: number) => `${((ms - noticeMs) / 1000).toFixed(2)} s`;
  for (const { name, color, old } of scenes) {
    const [claim] = claimsOf(old);
    say(
      `  ${color(name.padEnd(6))} notice to launch call ${bold(since(launchCallMs.get(old.id) ?? Number.NaN))}, to in service ${bold(since(at("in service", claim?.id ?? "")))}, to old one detached ${bold(since(at("detach", old.id)))}`,
    );
  }
  say(
    `  calls to AWS ${bold(String(total))} (${most.map(([name, n]) => `${name} ${n}`).join(", ")}, …)`,
    `  daemon: start to first receive ${bold(`${((receivedMs ?? Number.NaN) - spawnedMs).toFixed(0)} ms`)}, memory ${bold(`${rss.toFixed(0)} MB`)}, SIGTERM to exit ${bold(`${stopTookMs.toFixed(0)} ms`)}`,
  );

  heading("What must hold whatever happens");
  const points = verdicts({ code, replacedMs, queues });
  for (const { holds, text } of points) say(`  ${holds ? green("✓") : red("✗")} ${holds ? text : red(text)}`);
  const broken = points.filter((p) => !p.holds).length;
  say("", broken ? red(bold(`${broken} of these ${points.length} did not hold.`)) : green(bold("All of it held.")));
  return broken ? 1 : 0;
}

/** The delayed messages now: the simulated queue's clock jumps. */
function hurry(url: string): void {
  const queue = world.sqs.queues.get(url);
  for (const message of queue?.messages.values() ?? []) {
    message.visibleAtMs = Date.now();
    message.version++; // its entry among the delayed is void
    queue?.ready.push(message);
  }
  for (const wake of [...(queue?.pollers ?? [])]) wake();
}

/** A group before and after, side by side; the new one stands where the old one stood. */
function compare(scene: Scene): void {
  const { name, color, before, old } = scene;
  const after = snapshot(name);
  const row = (i: Instance | undefined) => (i ? `${i.id}  ${i.type.padEnd(10)} ${zone(i)}  ${i.lifecycle}` : red("nobody"));
  say(`  ${color(name.padEnd(6))}${pad(dim(before.sizes), 44)}${dim(after.sizes)}`);
  const rest = after.members.filter((i) => !before.members.includes(i));
  for (const was of before.members) {
    const is = after.members.includes(was) ? was : rest.shift();
    const left = was === old ? yellow(row(was)) : row(was);
    say(`    ${pad(left, 44)}${is === was ? "  " : "→ "}${is === was ? dim(row(is)) : green(row(is))}`);
  }
  for (const more of rest) say(`    ${pad("", 44)}+ ${red(row(more))}`);
}

function verdicts(x: { code: number; replacedMs: number; queues: ReturnType<World["createQueues"]> }) {
  const least = (s: Scene) => Math.min(s.startedWith, ...samples.filter((c) => c.group === s.name).map((c) => c.serving));
  const after = new Map(scenes.map((s) => [s.name, snapshot(s.name)]));
  const living = [...world.ec2.instances.values()].filter((i) => i.state === "running" || i.state === "pending");
  const audit = (what: string, id: string) => world.audit.find((a) => a.what === what && a.ids.includes(id));
  const untouched = (s: Scene) =>
    s.before.members.filter((i) => i !== s.old).every((i) => i.group === s.name && i.state === "running");
  return [
    {
      text: "each interrupted instance got exactly one replacement, and it is in its group",
      holds: scenes.every((s) => claimsOf(s.old).length === 1 && claimsOf(s.old)[0]?.group === s.name),
    },
    {
      text: `capacity in service never fell below its start (${scenes.map((s) => `${s.name} ${least(s)} of ${s.startedWith}`).join(", ")})`,
      holds: scenes.every((s) => least(s) >= s.startedWith),
    },
    {
      text: "no old one left before its replacement was in service, and each left with decrement",
      holds: scenes.every((s) => {
        const detach = audit("detach", s.old.id);
        const joined = audit("in service", claimsOf(s.old)[0]?.id ?? "");
        return detach?.detail === "with decrement" && joined !== undefined && joined.atMs <= detach.atMs;
      }),
    },
    {
      text: `all three were replaced with more than a minute of the two to spare (after ${((x.replacedMs - noticeMs) / 1000).toFixed(1)} s)`,
      holds: x.replacedMs - noticeMs < 60_000,
    },
    {
      text: "minimum, desired, maximum, policy and tags of every group are what they were",
      holds: scenes.every((s) => after.get(s.name)?.sizes === s.before.sizes && after.get(s.name)?.policy === s.before.policy),
    },
    {
      text: "only the group without spot capacity went on-demand, and its replacement says so in a tag",
      holds: scenes.every((s) =>
        claimsOf(s.old).every(
          (i) =>
            i.tags.has("spotmax:fallback") === (s.name === "batch") && (i.lifecycle === "on-demand") === (s.name === "batch"),
        ),
      ),
    },
    {
      text: "nobody else was touched, and nothing is left running outside its group",
      holds: scenes.every(untouched) && living.every((i) => i.group !== undefined),
    },
    {
      text: "the queues are empty, and so is the dead-letter queue",
      holds: Object.values(x.queues).every((url) => depth(url) === 0),
    },
    { text: "the daemon ended on SIGTERM with exit code 0", holds: x.code === 0 },
  ];
}

async function clear(): Promise<void> {
  if (daemon?.exitCode === null) daemon.kill("SIGKILL");
  await served.stop();
  rmSync(folder, { recursive: true, force: true });
}
process.on("SIGINT", () => void clear().then(() => process.exit(130)));

let exitCode = 1;
try {
  exitCode = await main();
} catch (error) {
  draw([], []);
  console.error(red(`✗ ${error instanceof Error ? error.message : String(error)}`));
  if (existsSync(logFile))
    console.error(`The daemon's last words:\n${readFileSync(logFile, "utf8").split("\n").slice(-15).join("\n")}`);
} finally {
  await clear();
}
process.exit(exitCode);

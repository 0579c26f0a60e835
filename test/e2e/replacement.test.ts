// The compiled binary replaces interrupted instances over HTTP. Every story is its own world, port and process, and
// all run at once; `finish` checks at each end what must hold whatever happens.
import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { Delays } from "../aws/world.ts";
import { first, only, onStage, type Scene, sleep } from "./harness.ts";

const LIMIT_MS = 300_000;
const story = (title: string, tell: (s: Scene) => Promise<void>, delays: Partial<Delays> = {}) =>
  test.concurrent(title, () => onStage(tell, delays), LIMIT_MS);

const roomy = { min: 2, max: 6, desired: 3 };
const tight = { min: 3, max: 3, desired: 3 };
/** One type in a plain launch template that asks for spot itself; two zones keep it simple. */
const plain = { types: ["m5.large"], template: { InstanceMarketOptions: { MarketType: "spot" as const } } };

// Alone, for others would make it slow; and as often as it takes, for other programs may.
test(
  "from start to first receive, and idle from SIGTERM to exit 0, it takes less than two seconds",
  () =>
    onStage(async (s) => {
      s.group({ name: "web", ...tight });
      let [startMs, endMs] = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY];
      for (let tries = 0; tries < 20 && Math.max(startMs, endMs) > 2_000; tries++) {
        const { daemon, firstReceiveMs } = await s.start();
        await sleep(1_000); // into the long polls
        const { code, tookMs } = await daemon.end("SIGTERM");
        expect(code).toBe(0);
        expect(daemon.lines.at(-1)).toMatch(/msg="?stopped/);
        [startMs, endMs] = [Math.min(startMs, firstReceiveMs), Math.min(endMs, tookMs)];
      }
      console.log(`start to first receive ${startMs.toFixed(0)} ms, SIGTERM to exit ${endMs.toFixed(0)} ms`);
      expect(Math.max(startMs, endMs)).toBeLessThan(2_000);
    }),
  LIMIT_MS,
);

// ─── The main path ───────────────────────────────────────────────────────────────────────────────────────

story("an interrupted instance of a plain group is replaced before it goes", async (s) => {
  const old = first(s.group({ name: "web", ...roomy, ...plain }));
  const { daemon } = await s.start();
  s.interrupt(old);
  await s.until("the replacement is in service and the old one detached", 60, () => s.world.instance(old).group === undefined);
  const rssMb = daemon.rssMb ?? Number.NaN;
  await s.finish([old]);
  console.log(`RSS ${rssMb.toFixed(0)} MB`);
  expect(rssMb).toBeLessThan(150);
  expect(s.world.calls["autoscaling:UpdateAutoScalingGroup"]).toBeUndefined();
});

story("a mixed group keeps its policy, and its replacement is spot of one of its types", async (s) => {
  const old = first(s.group({ name: "mixed", ...roomy, targetGroups: ["front"] }));
  await s.start();
  s.interrupt(old);
  await s.finish([old]);
  const claim = only(s.claims());
  expect([claim.lifecycle, claim.tags.has("spotmax:fallback")]).toEqual(["spot", false]);
  expect(["m5.large", "m5a.large", "m4.large"]).toContain(claim.type);
  expect(claim.zone).toBe(s.world.instance(old).zone);
});

story(
  "a replacement that is slow to join and slower to answer is waited for: nothing dips, in service or behind the load balancer",
  async (s) => {
    const old = first(s.group({ name: "web", ...roomy, targetGroups: ["front"] }));
    await s.start();
    s.interrupt(old);
    await s.finish([old]);
    const { id } = only(s.claims());
    const atMs = (what: string, of: string) =>
      s.world.audit.find((a) => a.what === what && a.ids.includes(of))?.atMs ?? Number.NaN;
    expect(atMs("detach", old)).toBeGreaterThan(atMs("target healthy", id));
  },
  { attachMs: [3_000, 3_000], healthyMs: [4_000, 4_000] },
);

story("at minimum = maximum the maximum is raised and put back", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  await s.start();
  s.interrupt(old);
  await s.finish([old]);
  expect(Math.max(...s.samples.map((x) => x.max))).toBeGreaterThan(3);
});

story("five copies of one notice lead to one launch", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  await s.start();
  s.interrupt(old, { copies: 5 });
  await s.finish([old]);
});

story("two interruptions at once in one group share one launch call", async (s) => {
  const olds = s.group({ name: "web", ...tight, zones: ["us-east-2a"] }).slice(0, 2);
  await s.start();
  for (const old of olds) s.interrupt(old, { keepCapacity: true });
  await s.finish(olds);
  expect(s.launchCalls.length).toBe(1);
  expect(s.claims().map((i) => i.tags.get("spotmax:replaces"))).toEqual(Array(2).fill(olds.toSorted().join(" ")));
});

story("in real time to the very end: the last message, a minute after the deadline, finds nothing left to end", async (s) => {
  const old = first(s.group({ name: "web", ...roomy }));
  const { daemon } = await s.start();
  s.interrupt(old, { seconds: 25 });
  await s.finish([old], { toTheVeryEnd: true });
  expect(Date.now() - s.deadlineMs(old)).toBeWithin(59_000, 100_000);
  expect(daemon.has(`${old} is terminated`)).toBe(true);
});

story("a rehearsal: what AWS does not take back is ended by the last message", async (s) => {
  const old = first(s.group({ name: "web", ...roomy }));
  await s.start();
  s.interrupt(old);
  await s.finish([old]);
  expect(s.world.instance(old).stateReason?.Code).toBe("Client.UserInitiatedShutdown");
});

// ─── Capacity ────────────────────────────────────────────────────────────────────────────────────────────

const TYPES = ["m5.large", "m4.large"];

story("no spot anywhere: an on-demand instance takes the place, tagged as a fallback", async (s) => {
  const old = first(s.group({ name: "web", ...tight, types: TYPES }));
  for (const pool of s.pools(TYPES, "spot")) pool.capacity = 0;
  await s.start();
  s.interrupt(old);
  await s.finish([old]);
  const claim = only(s.claims());
  expect([claim.lifecycle, claim.tags.get("spotmax:fallback")]).toEqual(["on-demand", "on-demand"]);
});

story("nothing to be had anywhere: detached without decrement five seconds before the deadline", async (s) => {
  const old = first(s.group({ name: "web", ...roomy, types: TYPES }));
  const pools = s.pools(TYPES, "spot", "on-demand");
  for (const pool of pools) pool.capacity = 0;
  await s.start();
  s.interrupt(old, { seconds: 20 });
  await s.until("detached", 60, () => s.world.audit.some((a) => a.what === "detach"));
  const detach = only(s.world.audit.filter((a) => a.what === "detach"));
  expect(detach.detail).toBe("without decrement");
  // How much less than five seconds is a matter of the machine's load.
  expect((s.deadlineMs(old) - detach.atMs) / 1000).toBeWithin(0, 5.01);
  await s.until(
    "the deadline has passed, and the notice is given up",
    20,
    () => Date.now() > s.deadlineMs(old) && s.depth(s.queues.interruption) === 0,
  );
  for (const pool of pools) pool.capacity = 5;
  await s.finish([old], { dips: true, launches: 0, replaced: false });
});

story(
  "a replacement that runs only when the old one is detached already: it joins all the same, and goes as surplus",
  async (s) => {
    const old = first(s.group({ name: "web", ...roomy, types: TYPES }));
    s.world.delays.pendingMs = [18_000, 18_000];
    await s.start();
    s.interrupt(old, { seconds: 16 });
    await s.until("detached", 60, () => s.world.audit.some((a) => a.what === "detach"));
    s.world.delays.pendingMs = [1_000, 2_000];
    await s.finish([old], { dips: true, launches: 1, replaced: false });
  },
);

// ─── Other notices, bad messages ─────────────────────────────────────────────────────────────────────────

story("a rebalance recommendation is acted on where the option is on, once the member is ten minutes old", async (s) => {
  const calm = {
    is_to_handle_rebalance_event: true,
    preaction_detach_delay_seconds: 1,
    preaction_termination_delay_seconds: 1,
  };
  const old = first(s.group({ name: "web", ...tight }, calm));
  const ignored = first(s.group({ name: "other", ...tight }));
  s.world.instance(old).launchedAtMs = Date.now() - 60_000;
  await s.start();
  s.world.rebalance(old);
  s.world.rebalance(ignored);
  const depth = () => s.world.queueDepth(s.queues.interruption);
  await s.until("the young one waits as a delayed copy", 60, () => depth().delayed === 1 && depth().inFlight === 0);
  expect(s.claims()).toEqual([]);
  s.world.instance(old).launchedAtMs = Date.now() - 700_000;
  s.hurry(s.queues.interruption);
  await s.until("replaced", 120, () => s.world.instance(old).state === "terminated");
  await s.finish([old]);
  expect(s.world.instance(ignored).group).toBe("other");
});

story("bad messages harm nobody: broken ones end as dead letters, strangers' are deleted, the good one is handled", async (s) => {
  const old = first(s.group({ name: "web", ...roomy }));
  const foreign = s.world.createInstance({});
  s.configure({ queue: { visibility_timeout_seconds: 10 } });
  const { daemon } = await s.start();
  const warning = (detail: object) => s.world.event("EC2 Spot Instance Interruption Warning", "aws.ec2", [], detail);
  const poison = ["this is no JSON", warning({ "instance-id": "i-nonsense" }), warning({}), "null"];
  const others = [
    warning({ "instance-id": foreign.id, "instance-action": "terminate" }),
    s.world.event("EC2 Instance State-change Notification", "aws.ec2", [], { "instance-id": old, state: "running" }),
    s.world.event("Scheduled Event", "aws.events", [], {}),
  ];
  for (const body of poison) s.world.sqs.deliver(s.queues.interruption, body).receiveCount = 9;
  for (const body of others) s.world.sendRaw(s.queues.interruption, body);
  s.interrupt(old);
  // Or none of it any more: it is on its way to the dead letters.
  await s.until("only the poison is left", 60, () =>
    s.world.sqs.bodies(s.queues.interruption).every((body) => poison.includes(body)),
  );
  await s.finish([old], { deadLetters: poison.length });
  expect(s.world.sqs.bodies(s.queues.deadLetter).toSorted()).toEqual(poison.toSorted());
  expect(daemon.lines.filter((line) => line.includes("left to the dead-letter queue")).length).toBe(poison.length);
  expect(foreign.state).toBe("running");
});

// ─── Death and restart ───────────────────────────────────────────────────────────────────────────────────

const touches = (url: string) => (input: object) => "QueueUrl" in input && input.QueueUrl === url;
const real = (input: object) => !("DryRun" in input && input.DryRun);
const DEATHS: { title: string; at: (s: Scene) => Parameters<Scene["killAt"]>[1] }[] = [
  {
    title: "after the detach message went out",
    at: (s) => ({ call: "sqs:SendMessageBatch", when: "after", matches: touches(s.queues.detach) }),
  },
  {
    title: "when CreateFleet has launched, before its answer comes",
    at: () => ({ call: "ec2:CreateFleet", when: "after", matches: real }),
  },
  {
    title: "between the raised maximum and the attach",
    at: () => ({ call: "autoscaling:AttachInstances", when: "before" }),
  },
  {
    title: "when attached, before the answer comes",
    at: () => ({ call: "autoscaling:AttachInstances", when: "after" }),
  },
  {
    title: "between the attach and the deletion of the message",
    at: (s) => ({ call: "sqs:DeleteMessageBatch", when: "before", matches: touches(s.queues.interruption) }),
  },
  {
    title: "between the tag spotmax:detached and the detach",
    at: () => ({ call: "autoscaling:DetachInstances", when: "before" }),
  },
  {
    title: "when detached, before the answer comes",
    at: () => ({ call: "autoscaling:DetachInstances", when: "after" }),
  },
];
for (const { title, at } of DEATHS)
  story(`kill -9 ${title}, and a restart`, async (s) => {
    const old = first(s.group({ name: "web", ...tight }));
    const { daemon } = await s.start();
    const dead = s.killAt(daemon, at(s));
    s.interrupt(old);
    await dead;
    await s.start();
    await s.finish([old]);
  });

story("kill -9 right after the answer of CreateFleet, and a restart", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  const { daemon } = await s.start();
  const dead = s.killAt(daemon, { call: "ec2:DescribeInstances", when: "before", matches: () => s.claims().length === 1 });
  s.interrupt(old);
  await dead;
  await s.start();
  await s.finish([old]);
});

story(
  "SIGTERM with messages in hand: exit 0, and they are there for the next daemon at once",
  async (s) => {
    const old = first(s.group({ name: "web", ...tight }));
    const { daemon } = await s.start();
    const held = { call: "sqs:ChangeMessageVisibilityBatch", when: "after", matches: touches(s.queues.detach) } as const;
    const isDetachInHand = s.at(held, async () => undefined);
    s.interrupt(old);
    await s.until("launched", 60, () => s.claims().length === 1);
    await isDetachInHand;
    const { code, tookMs } = await daemon.end("SIGTERM");
    expect(code).toBe(0);
    expect(tookMs).toBeLessThan(10_000);
    for (const url of [s.queues.interruption, s.queues.detach])
      expect(s.world.queueDepth(url)).toEqual({ visible: 1, delayed: 0, inFlight: 0 });
    await s.start();
    await s.finish([old]);
  },
  { pendingMs: [8_000, 8_000] },
);

story("SIGTERM while a launch call is out: it waits for the answer, then gives the message back", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  const { daemon } = await s.start();
  const out = Promise.withResolvers<void>();
  s.world.intercept = ({ operation, input }) => {
    if (operation !== "CreateFleet" || !real(input)) return undefined;
    out.resolve();
    return { delayMs: 3_000 };
  };
  s.interrupt(old);
  await out.promise;
  const { code, tookMs } = await daemon.end("SIGTERM");
  expect(code).toBe(0);
  expect(tookMs).toBeWithin(2_500, 10_000);
  expect(s.claims().length).toBe(1);
  expect(s.world.queueDepth(s.queues.interruption)).toEqual({ visible: 1, delayed: 0, inFlight: 0 });
  s.world.intercept = undefined;
  await s.start();
  await s.finish([old]);
});

story("two daemons on the same queues: one replacement in the group for each, nothing left over", async (s) => {
  const web = s.group({ name: "web", min: 5, max: 5, desired: 5 }).slice(0, 3);
  const api = s.group({ name: "api", min: 2, max: 8, desired: 4 }).slice(0, 2);
  await s.start();
  await s.start();
  for (const old of [...web, ...api]) s.interrupt(old, { copies: 3 });
  await s.finish([...web, ...api], { launches: "any" });
});

// The moment at which nobody but the cloud knows what was launched, and for longer than the retries last.
story(
  "AWS out of reach for nine seconds from the answer of CreateFleet on: what was launched is found, not launched again",
  async (s) => {
    const old = first(s.group({ name: "web", ...tight }));
    await s.start();
    const over = s.at({ call: "ec2:CreateFleet", when: "after", matches: real }, () => s.outage(9_000));
    s.interrupt(old);
    await over;
    await s.finish([old]);
  },
);

story("AWS out of reach for nine seconds between launch and attach: it goes on by itself", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  await s.start();
  const over = s.at({ call: "autoscaling:AttachInstances", when: "before" }, () => s.outage(9_000));
  s.interrupt(old);
  await over;
  await s.finish([old]);
});

story("protected members stay protected, and nobody else becomes so", async (s) => {
  const old = first(s.group({ name: "web", ...roomy, protected: true }));
  const other = first(
    s.group({ name: "api", ...roomy, weights: { "m5.large": 1, "m5.xlarge": 2 }, types: ["m5.large", "m5.xlarge"] }),
  );
  await s.start();
  s.interrupt(old);
  s.interrupt(other);
  await s.finish([old, other]);
});

// ─── The log, SIGHUP ─────────────────────────────────────────────────────────────────────────────────────

story("SIGHUP opens the log file anew and refreshes the configuration", async (s) => {
  s.group({ name: "web", ...roomy });
  const { daemon } = await s.start("-l", "max_group.log");
  const [log, rotated] = [join(s.folder, "max_group.log"), join(s.folder, "max_group.log.1")];
  await s.until("the group is loaded", 60, () => readFileSync(log, "utf8").includes("Loaded maxgroup web"));
  renameSync(log, rotated);
  s.world.createGroup({ name: "late", ...roomy });
  s.configure({ groups: { late: {} } });
  daemon.signal("SIGHUP");
  await s.until(
    "the new group is loaded, and the new file says so",
    60,
    () => existsSync(log) && readFileSync(log, "utf8").includes("Loaded maxgroup late"),
  );
  expect(readFileSync(rotated, "utf8")).not.toContain("Loaded maxgroup late");
  expect(daemon.isAlive).toBe(true);
  expect(daemon.lines).toEqual([]);
});

story("SIGHUP when the log's folder is gone: it says so where it still can, and goes on", async (s) => {
  const old = first(s.group({ name: "web", ...roomy }));
  mkdirSync(join(s.folder, "logs"));
  const { daemon } = await s.start("-l", "logs/max_group.log");
  await s.until("it runs", 60, () => readFileSync(join(s.folder, "logs/max_group.log"), "utf8").includes("start termination"));
  rmSync(join(s.folder, "logs"), { recursive: true });
  s.world.createGroup({ name: "late", ...roomy });
  s.configure({ groups: { late: {} } });
  const reads = () => s.world.calls["s3:GetObject"] ?? 0;
  const before = reads();
  daemon.signal("SIGHUP");
  await s.until("it has read the configuration again", 60, () => reads() > before);
  await sleep(500); // for what it should not do
  expect(daemon.isAlive).toBe(true);
  expect(daemon.lines.filter((line) => /^\s+at /.test(line))).toEqual([]); // no stack trace
  expect(reads()).toBe(before + 1);
  // The number of a closed descriptor would soon be a connection's, with the log going into it.
  const open = Bun.spawnSync(["ls", "-l", `/proc/${daemon.pid}/fd`]).stdout.toString();
  expect(daemon.has("level=") || open.includes("max_group.log")).toBe(true);
  s.interrupt(old);
  await s.finish([old]);
});

story("SIGHUP with a broken configuration keeps the last good one, and says what is wrong", async (s) => {
  const old = first(s.group({ name: "web", ...tight }));
  const { daemon } = await s.start();
  s.world.s3.put("max-group-conf", "service_config.json", '{"global": ');
  daemon.signal("SIGHUP");
  await s.until("it says so", 60, () => daemon.has(/could not be refreshed.*not valid JSON/));
  s.interrupt(old);
  await s.finish([old]);
});

story("the log is logfmt with the manual's milestones, in order", async (s) => {
  s.group({ name: "web", ...roomy });
  const { daemon } = await s.start();
  await daemon.end("SIGTERM");
  const milestones = [
    "group web is suitable for max group",
    "Loaded maxgroup web",
    `interruption sqs:${s.queues.interruption}`,
    `Detach sqs:${s.queues.detach}`,
    "start instance manager...",
    "start interruption handler...",
    "start dettach handler...",
    "start termination handler...",
  ];
  const places = milestones.map((text) => daemon.lines.findIndex((line) => line.includes(`msg="${text}"`)));
  expect(places).not.toContain(-1);
  expect(places).toEqual(places.toSorted((a, b) => a - b));
  for (const line of daemon.lines)
    expect(line).toMatch(/^time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ" level=(debug|info|warning|error) msg="/);
});

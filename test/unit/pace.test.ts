import { describe, expect, test } from "bun:test";
import { makePace } from "../../maxgroup.ts";
import { VirtualClock } from "../aws/clock.ts";

function stage(limits?: { burst: number; perSecond: number }) {
  const clock = new VirtualClock();
  const stop = new AbortController();
  const deps = { now: () => clock.now(), sleep: (ms: number, signal?: AbortSignal) => clock.sleep(ms, signal) };
  return { clock, stop, pace: makePace(deps, stop.signal, limits) };
}

/** A service with a token bucket, asked as fast as the pace lets us; how many a second it granted and refused. */
async function drive(seconds: number, capacity: number, perSecond: number) {
  const { clock, stop, pace } = stage();
  let [tokens, atMs] = [capacity, clock.now()];
  const granted = Array.from({ length: seconds }, () => 0);
  const refused = Array.from({ length: seconds }, () => 0);
  const startMs = clock.now();
  const caller = async () => {
    for (;;) {
      await pace.take(0);
      await clock.sleep(40);
      tokens = Math.min(capacity, tokens + ((clock.now() - atMs) / 1000) * perSecond);
      atMs = clock.now();
      const isGranted = tokens >= 1;
      if (isGranted) tokens--;
      const counts = isGranted ? granted : refused;
      const second = Math.floor((clock.now() - startMs) / 1000);
      counts[second] = (counts[second] ?? 0) + 1;
      await clock.sleep(40);
      if (isGranted) pace.granted();
      else pace.refused();
    }
  };
  for (let n = 0; n < 30; n++) caller().catch(() => undefined); // ends with the test
  await clock.advance(seconds * 1000);
  stop.abort(new Error("over"));
  const sum = (counts: number[], from: number) => counts.slice(from, seconds).reduce((a, b) => a + b, 0);
  return { granted: (from: number) => sum(granted, from), refused: (from: number) => sum(refused, from) };
}

describe("the pace of a request bucket", () => {
  test("nothing waits until something was refused", async () => {
    const { clock, pace } = stage();
    const startMs = clock.now();
    for (let n = 0; n < 1_000; n++) await pace.take(0);
    expect(clock.now()).toBe(startMs);
  });

  test("once refused, it settles at what the service grants: most of it is used, little is refused", async () => {
    const { granted, refused } = await drive(60, 100, 10);
    expect(granted(10)).toBeGreaterThan(50 * 10 * 0.8);
    expect(refused(10)).toBeLessThan(50 * 10 * 0.15);
  });

  test("a slower service is found as well", async () => {
    const { granted, refused } = await drive(60, 5, 2);
    expect(granted(10)).toBeGreaterThan(50 * 2 * 0.7);
    expect(refused(10)).toBeLessThan(50 * 2 * 0.5);
  });

  test("what changes something goes before what only reads", async () => {
    const { clock, pace } = stage({ burst: 1, perSecond: 1 });
    const order: string[] = [];
    const add = (name: string, rank: number) => void pace.take(rank).then(() => order.push(name));
    for (const name of ["first", "read 1", "read 2"]) add(name, 1);
    add("attach", 0);
    await clock.advance(5_000);
    expect(order).toEqual(["first", "attach", "read 1", "read 2"]);
  });

  test("waiting for room takes none of it", async () => {
    const { clock, pace } = stage({ burst: 1, perSecond: 1 });
    await pace.take(0);
    let turns = 0;
    for (let n = 0; n < 5; n++) void pace.room().then(() => turns++);
    await clock.advance(1_100);
    expect(turns).toBe(5);
    const startMs = clock.now();
    await pace.take(0);
    expect(clock.now()).toBe(startMs);
  });

  test("whose caller has given up takes no turn, and holds up nobody", async () => {
    const { clock, pace } = stage({ burst: 1, perSecond: 1 });
    await pace.take(0);
    const given = new AbortController();
    const order: string[] = [];
    const add = (name: string, signal?: AbortSignal) =>
      void pace.take(0, signal).then(
        () => order.push(name),
        () => order.push(`${name} gave up`),
      );
    add("detach", given.signal);
    add("attach");
    await clock.advance(500);
    given.abort(new Error("no answer in 15 s"));
    await clock.advance(600);
    expect(order).toEqual(["detach gave up", "attach"]);
  });

  test("a clock that is set back takes no turns away", async () => {
    const clock = new VirtualClock();
    let aheadMs = 600_000;
    const deps = { now: () => clock.now() + aheadMs, sleep: (ms: number, signal?: AbortSignal) => clock.sleep(ms, signal) };
    const pace = makePace(deps, new AbortController().signal, { burst: 20, perSecond: 20 });
    await pace.take(0);
    aheadMs = 0;
    let turns = 0;
    for (let n = 0; n < 20; n++) void pace.take(0).then(() => turns++);
    await clock.advance(1_000);
    expect(turns).toBe(20);
  });

  test("who waits is told when the program stops", async () => {
    const { clock, stop, pace } = stage({ burst: 1, perSecond: 0.001 });
    await pace.take(0);
    const waiting = pace.take(0).then(
      () => "went on",
      () => "stopped",
    );
    await clock.advance(10);
    stop.abort(new Error("SIGTERM"));
    await clock.advance(10);
    expect(await waiting).toBe("stopped");
  });
});

import { describe, expect, test } from "bun:test";
import { batcher } from "../../maxgroup.ts";

type Options = Partial<Parameters<typeof batcher<string, string>>[1]>;
/** A batcher whose calls end only when the test says so. */
function stage(options: Options = {}) {
  const calls: { items: string[]; answer: (values?: (string | Error)[]) => void; fail: (error: Error) => void }[] = [];
  const add = batcher<string, string>({ sleep: () => Promise.resolve() }, { limit: 3, ...options }, (items) => {
    const { promise, resolve, reject } = Promise.withResolvers<(string | Error)[]>();
    calls.push({ items, answer: (values = items.map((i) => i.toUpperCase())) => resolve(values), fail: reject });
    return promise;
  });
  return { add, calls, shares: () => calls.map((c) => c.items.join("")), call: (n: number) => calls[n] ?? fault(n) };
}
function fault(n: number): never {
  throw new Error(`there was no call ${n}`);
}
/** Long enough for every promise that can go on to do so. */
const settle = () => new Promise<void>((resolve) => setImmediate(resolve));

describe("sharing", () => {
  test("what is asked for in the same turn shares a call, and each gets its own answer", async () => {
    const { add, call, shares } = stage();
    const answers = Promise.all([add("a"), add("b"), add("c")]);
    await settle();
    expect(shares()).toEqual(["abc"]);
    call(0).answer();
    expect(await answers).toEqual(["A", "B", "C"]);
  });

  test("a lone item waits for nobody", async () => {
    const { add, call, shares } = stage();
    const answer = add("a");
    await settle();
    expect(shares()).toEqual(["a"]);
    call(0).answer();
    expect(await answer).toBe("A");
  });

  test("what comes while a call is under way shares the next one", async () => {
    const { add, call, shares } = stage();
    void add("a");
    await settle();
    void add("b");
    await settle();
    void add("c");
    await settle();
    expect(shares()).toEqual(["a"]);
    call(0).answer();
    await settle();
    expect(shares()).toEqual(["a", "bc"]);
  });

  test("no call has more items than its limit, and they leave in order", async () => {
    const { add, call, shares } = stage();
    for (const item of "abcdefg") void add(item);
    for (let n = 0; n < 3; n++) {
      await settle();
      call(n).answer();
    }
    await settle();
    expect(shares()).toEqual(["abc", "def", "g"]);
  });
});

describe("in parallel", () => {
  test("no more calls are under way than allowed", async () => {
    const { add, call, shares } = stage({ limit: 1, parallel: 2 });
    for (const item of "abcd") void add(item);
    await settle();
    expect(shares()).toEqual(["a", "b"]);
    call(1).answer();
    await settle();
    expect(shares()).toEqual(["a", "b", "c"]);
  });

  test("a further call leaves when it is full", async () => {
    const { add, shares } = stage({ parallel: 2 });
    void add("a");
    await settle();
    for (const item of "bc") void add(item);
    await settle();
    expect(shares()).toEqual(["a"]);
    void add("d");
    await settle();
    expect(shares()).toEqual(["a", "bcd"]);
  });

  test("or at once where it is eager", async () => {
    const { add, shares } = stage({ parallel: 2, eager: true });
    for (const item of "abc") {
      void add(item);
      await settle();
    }
    expect(shares()).toEqual(["a", "b"]);
  });
});

describe("alike", () => {
  const alike = (item: string) => item.slice(0, 1);

  test("only items that are alike share a call", async () => {
    const { add, calls } = stage({ parallel: 8, alike });
    const answers = Promise.all(["a1", "b1", "a2", "b2"].map((item) => add(item)));
    await settle();
    expect(calls.map((c) => c.items)).toEqual([
      ["a1", "a2"],
      ["b1", "b2"],
    ]);
    for (const c of calls) c.answer();
    expect(await answers).toEqual(["A1", "B1", "A2", "B2"]);
  });

  test("a kind that fills its calls does not keep another from its turn", async () => {
    const { add, calls } = stage({ limit: 1, alike });
    for (const item of ["a1", "a2", "a3", "b1"]) void add(item);
    for (let n = 0; n < 4; n++) {
      await settle();
      calls[n]?.answer();
    }
    await settle();
    expect(calls.map((c) => c.items.join()).sort()).toEqual(["a1", "a2", "a3", "b1"]);
  });
});

describe("failures", () => {
  test("one item's error is its own", async () => {
    const { add, call } = stage();
    const answers = Promise.allSettled([add("a"), add("b"), add("c")]);
    await settle();
    const error = new Error("b is refused");
    call(0).answer(["A", error, "C"]);
    expect(await answers).toEqual([
      { status: "fulfilled", value: "A" },
      { status: "rejected", reason: error },
      { status: "fulfilled", value: "C" },
    ]);
  });

  test("a call's failure is that of all its items, and of no others", async () => {
    const { add, call } = stage({ limit: 2 });
    const answers = Promise.allSettled(["a", "b", "c"].map((item) => add(item)));
    await settle();
    const error = new Error("throttled");
    call(0).fail(error);
    await settle();
    call(1).answer();
    expect(await answers).toEqual([
      { status: "rejected", reason: error },
      { status: "rejected", reason: error },
      { status: "fulfilled", value: "C" },
    ]);
  });

  test("a batcher goes on after a failure", async () => {
    const { add, call } = stage();
    const first = add("a").catch((error: unknown) => error);
    await settle();
    call(0).fail(new Error("once"));
    await first;
    const second = add("b");
    await settle();
    call(1).answer();
    expect(await second).toBe("B");
  });
});

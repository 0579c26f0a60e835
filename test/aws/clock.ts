// Real and virtual time behind one interface. Under virtual time nothing waits: the clock jumps from timer to
// timer once every promise that could run has run.

export interface Clock {
  /** Milliseconds since the epoch. */
  now(): number;
  /** Resolves after `ms`; rejects with `signal.reason` when aborted. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
}

/** A binary heap; `before` says which of two comes first. */
export class Heap<T> {
  readonly #items: T[] = [];
  readonly #before: (a: T, b: T) => boolean;
  constructor(before: (a: T, b: T) => boolean) {
    this.#before = before;
  }
  get size(): number {
    return this.#items.length;
  }
  peek(): T | undefined {
    return this.#items[0];
  }
  clear(): void {
    this.#items.length = 0;
  }
  push(item: T): void {
    const items = this.#items;
    let at = items.length;
    items.push(item);
    while (at > 0) {
      const up = (at - 1) >> 1;
      const parent = items[up] as T;
      if (!this.#before(item, parent)) break;
      items[at] = parent;
      at = up;
    }
    items[at] = item;
  }
  pop(): T | undefined {
    const items = this.#items;
    const top = items[0];
    const last = items.pop();
    if (last === undefined || items.length === 0) return top;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= items.length) break;
      if (child + 1 < items.length && this.#before(items[child + 1] as T, items[child] as T)) child++;
      const lower = items[child] as T;
      if (!this.#before(lower, last)) break;
      items[at] = lower;
      at = child;
    }
    items[at] = last;
    return top;
  }
}

/** The host's time, `speed` times as fast (10: a second of the world takes 100 ms). */
export class RealClock implements Clock {
  readonly #speed: number;
  readonly #startMs = Date.now();
  constructor(speed = 1) {
    this.#speed = speed;
  }
  now(): number {
    return this.#startMs + (Date.now() - this.#startMs) * this.#speed;
  }
  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(signal.reason);
      const abort = () => {
        clearTimeout(timer);
        reject(signal?.reason);
      };
      const timer = setTimeout(() => {
        signal?.removeEventListener("abort", abort);
        resolve();
      }, ms / this.#speed);
      signal?.addEventListener("abort", abort, { once: true });
    });
  }
}

interface Timer {
  atMs: number;
  order: number;
  /** Undefined once fired or aborted: a dead timer never moves the clock. */
  fire: (() => void) | undefined;
}

/** 2026-01-01T00:00:00Z, so that a run never depends on the day it is made. */
export const EPOCH_MS = 1_767_225_600_000;

export class VirtualClock implements Clock {
  #nowMs: number;
  #order = 0;
  readonly #timers = new Heap<Timer>((a, b) => a.atMs < b.atMs || (a.atMs === b.atMs && a.order < b.order));

  constructor(startMs = EPOCH_MS) {
    this.#nowMs = startMs;
  }

  now(): number {
    return this.#nowMs;
  }

  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(signal.reason);
      if (Number.isNaN(ms)) return reject(new RangeError("sleep: the time is not a number"));
      const timer: Timer = { atMs: this.#nowMs + Math.max(0, ms), order: this.#order++, fire: resolve };
      if (signal) {
        const abort = () => {
          timer.fire = undefined;
          reject(signal.reason);
        };
        signal.addEventListener("abort", abort, { once: true });
        timer.fire = () => {
          signal.removeEventListener("abort", abort);
          resolve();
        };
      }
      this.#timers.push(timer);
    });
  }

  /** Lets `ms` pass; everything due within it runs, in order. */
  async advance(ms: number): Promise<void> {
    const endMs = this.#nowMs + ms;
    await settle();
    while (this.#fireNext(endMs)) await settle();
    this.#nowMs = endMs;
  }

  /** Lets time pass until `done()`. Throws when `limitMs` pass without it, or nothing is left that could happen. */
  async runUntil(done: () => boolean, limitMs: number): Promise<void> {
    const endMs = this.#nowMs + limitMs;
    await settle();
    while (!done()) {
      if (!this.#fireNext(endMs))
        throw new Error(
          this.#timers.size === 0 ? "runUntil: nothing is left that could happen" : `runUntil: not done after ${limitMs} ms`,
        );
      await settle();
    }
  }

  /** Fires the next timer if it is due by `endMs`. */
  #fireNext(endMs: number): boolean {
    for (;;) {
      const next = this.#timers.peek();
      if (!next || next.atMs > endMs) return false;
      this.#timers.pop();
      if (!next.fire) continue;
      this.#nowMs = next.atMs;
      next.fire();
      next.fire = undefined;
      return true;
    }
  }
}

/** A turn of the event loop: promise chains of any length have run to their end after it. */
function settle(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

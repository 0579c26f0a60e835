// Calls to the simulator, for the tests of its rules.
import { expect } from "bun:test";
import type { VirtualClock } from "../aws/clock.ts";
import { AwsError } from "../aws/world.ts";

/** A call to its end: the time that it takes passes. */
export async function run<T>(clock: VirtualClock, promise: Promise<T>): Promise<T> {
  let over = false;
  const done = promise.finally(() => {
    over = true;
  });
  done.catch(() => undefined);
  await clock.runUntil(() => over, 3_600_000);
  return done;
}

/** It is refused, with this name and text. */
export async function fails(promise: Promise<unknown>, name: string, text?: string | RegExp): Promise<AwsError> {
  const error: unknown = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(AwsError);
  const refusal = error as AwsError;
  expect(`${refusal.name}: ${refusal.message}`).toStartWith(`${name}:`);
  if (typeof text === "string") expect(refusal.message).toBe(text);
  else if (text) expect(refusal.message).toMatch(text);
  return refusal;
}

// What is asked the same questions: the simulator's server and moto, each with a world of its own for every case.
import { test } from "bun:test";
import { RealClock } from "../aws/clock.ts";
import { serve } from "../aws/server.ts";
import { type Delays, World } from "../aws/world.ts";
import { destroyClients, isMotoInstalled, REGION, type SdkClients, sdkClients, startMoto } from "./moto.ts";

export interface Target<Scene> {
  url: string;
  /** A world of its own for the case. */
  scene(): Promise<Scene>;
  stop(): Promise<void>;
}

/** The targets, named; `inWorld` and `atMoto` make a case's scene there. A world without delays near nothing tells nothing. */
export async function startTargets<Scene>(
  delays: Partial<Delays>,
  inWorld: (world: World) => Scene,
  atMoto: (clients: SdkClients) => Promise<Scene>,
): Promise<[string, Target<Scene>][]> {
  const simulator = ["simulator", simulatorTarget(delays, inWorld)] satisfies [string, Target<Scene>];
  if (isMotoInstalled()) return [simulator, ["moto", await motoTarget(atMoto)]];
  test.skip("moto", () => undefined);
  return [simulator];
}

function simulatorTarget<Scene>(delays: Partial<Delays>, inWorld: (world: World) => Scene): Target<Scene> {
  let world: World | undefined;
  const served = serve({
    call: (...request) => {
      if (!world) throw new Error("a case without a scene");
      return world.call(...request);
    },
  });
  return {
    url: served.url,
    async scene() {
      world = new World({
        ...{ clock: new RealClock(), region: REGION, origin: served.url, checkOutputs: true, latencyMs: [0, 0] },
        ...delays,
      });
      return inWorld(world);
    },
    stop: served.stop,
  };
}

async function motoTarget<Scene>(atMoto: (clients: SdkClients) => Promise<Scene>): Promise<Target<Scene>> {
  const moto = await startMoto();
  const clients = sdkClients(moto.url);
  return {
    url: moto.url,
    async scene() {
      await moto.reset();
      return atMoto(clients);
    },
    async stop() {
      destroyClients(clients);
      await moto.stop();
    },
  };
}

/** The error that `promise` ends in: its name and status. */
export async function refusal(promise: Promise<unknown>): Promise<{ name: string; status: number | undefined }> {
  const thrown = await promise.then(
    () => undefined,
    (error: unknown) => error,
  );
  if (!(thrown instanceof Error)) throw new Error("the call was not refused");
  const metadata: unknown = Reflect.get(thrown, "$metadata");
  const status: unknown = Reflect.get(Object(metadata), "httpStatusCode");
  return { name: thrown.name, status: typeof status === "number" ? status : undefined };
}

/** Reads again until that holds, and answers what was read. */
export async function until<T>(read: () => Promise<T>, holds: (value: T) => boolean, limitMs = 20_000): Promise<T> {
  const endMs = Date.now() + limitMs;
  for (;;) {
    const value = await read();
    if (holds(value)) return value;
    if (Date.now() > endMs) throw new Error(`still not so: ${JSON.stringify(value)}`);
    await Bun.sleep(20);
  }
}

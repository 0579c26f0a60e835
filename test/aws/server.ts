// The simulator over HTTP, for the compiled binary, the demo and curl: one loopback port for all five services.
//
//   bun test/aws/server.ts --port 4566 [--speed 10]
//
// serves a small world (one group, three queues, a bucket with a configuration) until Ctrl-C and prints the
// environment to use. A line on standard input acts on it: `interrupt` or `rebalance`, and an instance ID or
// nothing for the group's oldest member.
//
// wire.ts knows the formats, world.ts the rules; here is only what HTTP adds: sockets, hang-ups, a request log.
import { parseArgs } from "node:util";
import { AwsError, type Service } from "./basics.ts";
import { RealClock } from "./clock.ts";
import { decode, encode, type WireCall, type WireResponse } from "./wire.ts";
import { World } from "./world.ts";

/** What the server needs of a world. */
export interface Callable {
  call(service: Service, operation: string, input: object, options?: { signal?: AbortSignal }): Promise<object>;
}

export interface ServeOptions {
  /** 0, the default: a free one. */
  port?: number;
  /** Default 127.0.0.1. */
  hostname?: string;
  /** Called after every answer. Nothing is kept without it. */
  log?: (request: LoggedRequest) => void;
}

export interface LoggedRequest {
  /** Undefined where the request could not be understood. */
  call: WireCall | undefined;
  status: number;
  /** The error's name, undefined after success. */
  error: string | undefined;
  /** Real milliseconds from arrival to answer. */
  tookMs: number;
}

export interface Served {
  /** `http://127.0.0.1:PORT`, without a slash at the end. */
  url: string;
  /** Hangs up on everybody: long polls end, their signals are aborted. */
  stop(): Promise<void>;
}

/** The most that Bun takes. Bun 1.4.5 does not count the silence of a pending answer; others have. */
const IDLE_TIMEOUT_SECONDS = 255;

export function serve(world: Callable, options: ServeOptions = {}): Served {
  const server = Bun.serve({
    port: options.port ?? 0,
    hostname: options.hostname ?? "127.0.0.1",
    idleTimeout: IDLE_TIMEOUT_SECONDS,
    async fetch(request) {
      const startMs = performance.now();
      const requestId = crypto.randomUUID();
      const { call, answer, response } = await handle(world, request, requestId);
      options.log?.({
        call,
        status: response.status,
        error: answer instanceof Error ? answer.name : undefined,
        tookMs: performance.now() - startMs,
      });
      const { status, headers, body } = response;
      const bare = status === 204 || status === 304; // which the Fetch standard forbids a body
      return new Response(bare ? null : body, { status, headers });
    },
  });
  return {
    url: `http://${server.hostname}:${server.port}`,
    stop: () => server.stop(true),
  };
}

interface Handled {
  call: WireCall | undefined;
  answer: object;
  response: WireResponse;
}

async function handle(world: Callable, request: Request, requestId: string): Promise<Handled> {
  let call: WireCall | undefined;
  try {
    const body = new Uint8Array(await request.arrayBuffer());
    call = decode({ method: request.method, url: request.url, headers: request.headers, body });
    const { service, operation, input } = call;
    const answer = await plainBody(await world.call(service, operation, input, { signal: request.signal }));
    return { call, answer, response: encode(service, operation, answer, requestId) };
  } catch (thrown) {
    const error = asError(thrown, request.signal);
    const service = call?.service ?? (error instanceof AwsError ? error.$service : undefined) ?? "s3";
    return { call, answer: error, response: encode(service, "", error, requestId) };
  }
}

/**
 * Errors of the services pass. One that the world did not mean to throw is a fault of the simulator: said aloud,
 * and answered as AWS answers its own faults. After a hang-up nobody reads the answer.
 */
function asError(thrown: unknown, signal: AbortSignal): Error {
  if (thrown instanceof AwsError || (thrown instanceof Error && "$metadata" in thrown)) return thrown;
  if (signal.aborted) return new AwsError("RequestAborted", "The client hung up", 500);
  console.error("simulator:", thrown);
  return new AwsError("InternalFailure", `simulator: ${Bun.inspect(thrown)}`, 500);
}

/** S3's `Body`, which the SDK gives as a stream with helpers, as bytes. */
async function plainBody(output: object): Promise<object> {
  const body: unknown = Reflect.get(output, "Body");
  if (typeof body !== "object" || body === null || body instanceof Uint8Array) return output;
  if ("transformToByteArray" in body && typeof body.transformToByteArray === "function")
    return { ...output, Body: await body.transformToByteArray() };
  if ("transformToString" in body && typeof body.transformToString === "function")
    return { ...output, Body: await body.transformToString() };
  return output;
}

// --- By hand ---------------------------------------------------------------------------------------------------

const REGION = "us-east-2";
const BUCKET = "max-group-conf";
const GROUP = "web";

/** One group of three in three zones, the queues and the configuration that names them. */
function smallWorld(url: string, speed: number): World {
  const world = new World({ clock: new RealClock(speed), seed: Date.now(), region: REGION, origin: url });
  const queues = world.createQueues();
  world.createGroup({ name: GROUP, min: 2, max: 6, desired: 3 });
  const queue = (queue_url: string) => ({
    queue_url,
    visibility_timeout_seconds: 61,
    max_number_of_messages: 10,
    wait_time_seconds: 20,
  });
  const config = {
    system: {},
    global: {
      interruption_evt_sqs: queue(queues.interruption),
      detach_evt_sqs: queue(queues.detach),
      termination_evt_sqs: queue(queues.termination),
    },
    groups: { [GROUP]: { detaching_delay_seconds: 20 } },
  };
  world.s3.put(BUCKET, "service_config.json", JSON.stringify(config, null, 2));
  return world;
}

function oldestMember(world: World): string | undefined {
  for (const { id, group, state } of world.ec2.instances.values()) if (group === GROUP && state === "running") return id;
  return undefined;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: { port: { type: "string", default: "4566" }, speed: { type: "string", default: "1" } },
  });
  // The queues' URLs need the server's, and the server needs a world: it asks for it with every request.
  let world: World | undefined;
  const served = serve(
    {
      call: (...request) => {
        if (!world) throw new AwsError("ServiceUnavailable", "The simulator is starting", 503);
        return world.call(...request);
      },
    },
    {
      port: Number(values.port),
      log: ({ call, status, error, tookMs }) =>
        console.error(`${call?.service ?? "?"} ${call?.operation ?? "?"} ${status} ${error ?? ""} ${Math.round(tookMs)} ms`),
    },
  );
  world = smallWorld(served.url, Number(values.speed));
  console.log(`export AWS_ENDPOINT_URL=${served.url}
export AWS_REGION=${REGION} AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
# max_group -r ${REGION} -b ${BUCKET}`);
  for await (const line of console) {
    const [command, id = oldestMember(world)] = line.trim().split(/\s+/);
    try {
      if (command === "interrupt" && id) world.interrupt(id);
      else if (command === "rebalance" && id) world.rebalance(id);
      else if (command) console.error("interrupt [ID] | rebalance [ID]");
    } catch (error) {
      console.error(String(error)); // an ID that is not there
    }
  }
}

if (import.meta.main) await main();

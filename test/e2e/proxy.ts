// A proxy before the simulator that does what networks and AWS's front doors do: it refuses and resets connections before
// the effect and after it, cuts answers short, hangs, dawdles, and answers with errors, AWS's own and those of whatever
// stands before AWS. What happens to the n-th call of an operation is a matter of the seed alone.
import type { Socket } from "bun";
import { AwsError, Random, type Service } from "../aws/basics.ts";
import { decode, encode, type WireCall } from "../aws/wire.ts";
import { listenBelow } from "./harness.ts";

const FAULTS = [
  "reset before",
  "reset after",
  "cut short",
  "cut short, chunked",
  "hang before",
  "hang after",
  "slow",
  "HTML 500",
  "HTML 503",
  "empty 503",
  "HTML 502 after",
  "AWS error",
  "AWS error after",
  "throttle",
] as const;
type Fault = (typeof FAULTS)[number];
/** The effect is there, and its caller cannot know. */
const AFTER: readonly Fault[] = [
  "reset after",
  "cut short",
  "cut short, chunked",
  "hang after",
  "HTML 502 after",
  "AWS error after",
];

/** An error of each service in its own words: [name, message, status]. */
type Words = [name: string, message: string, status: number];
const ERRORS: Record<Service, Words[]> = {
  ec2: [
    ["InternalError", "An internal error has occurred", 500],
    ["Unavailable", "The server is overloaded and can't handle the request.", 503],
    ["ServiceUnavailable", "The request has failed due to a temporary failure of the server.", 503],
  ],
  autoscaling: [
    ["InternalFailure", "We encountered an internal error. Please try again.", 500],
    ["ServiceUnavailable", "Service is unable to handle request.", 503],
    ["ResourceContention", "You already have a pending update to an Amazon EC2 Auto Scaling resource.", 500],
  ],
  elbv2: [
    ["InternalFailure", "The request processing has failed because of an unknown error.", 500],
    ["ServiceUnavailable", "Service unavailable", 503],
  ],
  sqs: [
    ["InternalError", "We encountered an internal error. Please try again.", 500],
    ["ServiceUnavailable", "Service Unavailable", 503],
  ],
  s3: [
    ["InternalError", "We encountered an internal error. Please try again.", 500],
    ["ServiceUnavailable", "Please reduce your request rate.", 503],
  ],
};
const THROTTLES: Record<Service, Words> = {
  ec2: ["RequestLimitExceeded", "Request limit exceeded.", 503],
  autoscaling: ["Throttling", "Rate exceeded", 400],
  elbv2: ["Throttling", "Rate exceeded", 400],
  sqs: ["RequestThrottled", "The request was denied due to request throttling.", 400],
  s3: ["SlowDown", "Please reduce your request rate.", 503],
};
const html = (status: string) =>
  `<html>\r\n<head><title>${status}</title></head>\r\n<body>\r\n<center><h1>${status}</h1></center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n`;

type Answer = { status: number; headers: Record<string, string>; body: Uint8Array };
type Connection = { received: Uint8Array; queue: Promise<unknown>; closed: AbortController };

export class FaultyProxy {
  /** How many of each were done, by `FAULT OPERATION`. */
  readonly done = new Map<string, number>();
  /** What happens to a call, where the seed is not to decide. */
  choose: (call: WireCall) => Fault | undefined;
  readonly #upstream: string;
  readonly #port: number;
  readonly #counts = new Map<string, number>();
  #listener: ReturnType<typeof this.listen>;
  #stopped = false;

  /** `share` of all calls go wrong, and twice as many of those that change something. */
  constructor(upstream: string, { seed, share }: { seed: number; share: number }) {
    this.#upstream = upstream;
    this.choose = ({ service, operation }) => {
      const name = `${service}:${operation}`;
      const n = (this.#counts.get(name) ?? 0) + 1;
      this.#counts.set(name, n);
      const random = new Random(seed ^ Number(Bun.hash.crc32(`${name} ${n}`)));
      // What changes something is seldom called, and what hurts is the answer that is lost.
      const isChange = !/^(Describe|Receive|Get)/.test(operation);
      if (!random.chance(isChange ? 2 * share : share)) return undefined;
      const kinds = isChange && random.chance(0.5) ? AFTER : FAULTS;
      return kinds[random.between([0, kinds.length - 1])];
    };
    this.#listener = listenBelow((port) => this.listen(port));
    this.#port = this.#listener.port;
  }
  get url(): string {
    return `http://127.0.0.1:${this.#port}`;
  }
  /** From now on all goes well. */
  calm(): void {
    this.choose = () => undefined;
  }
  /** Connections are cut, and new ones refused, for so long. */
  async outage(ms: number): Promise<void> {
    this.#listener.stop(true);
    await Bun.sleep(ms);
    if (!this.#stopped) this.#listener = this.listen(this.#port);
  }
  stop(): void {
    this.#stopped = true;
    this.#listener.stop(true);
  }

  listen(port: number) {
    return Bun.listen<Connection>({
      hostname: "127.0.0.1",
      port,
      socket: {
        open: (socket) => {
          socket.data = { received: new Uint8Array(), queue: Promise.resolve(), closed: new AbortController() };
        },
        data: (socket, chunk) => this.#receive(socket, chunk),
        close: (socket) => socket.data.closed.abort(),
        error: () => undefined, // its caller hears of it
      },
    });
  }

  /** Requests follow one another on a connection; each is handled once it is there as a whole. */
  #receive(socket: Socket<Connection>, chunk: Uint8Array): void {
    const { data } = socket;
    data.received = Buffer.concat([data.received, chunk]);
    for (;;) {
      const end = Buffer.from(data.received).indexOf("\r\n\r\n");
      if (end < 0) return;
      const [first = "", ...lines] = Buffer.from(data.received.subarray(0, end)).toString().split("\r\n");
      const headers = new Headers(
        lines.map((line): [string, string] => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]),
      );
      const length = Number(headers.get("content-length") ?? 0);
      if (data.received.length < end + 4 + length) return;
      const body = data.received.slice(end + 4, end + 4 + length);
      data.received = data.received.slice(end + 4 + length);
      const [method = "GET", path = "/"] = first.split(" ");
      data.queue = data.queue.then(() => this.#handle(socket, method, path, headers, body));
    }
  }

  async #handle(
    socket: Socket<Connection>,
    method: string,
    path: string,
    headers: Headers,
    body: Uint8Array<ArrayBuffer>,
  ): Promise<void> {
    const call = decode({ method, url: `${this.#upstream}${path}`, headers, body });
    const fault = this.choose(call);
    if (fault) {
      const name = `${fault} ${call.operation}`;
      this.done.set(name, (this.done.get(name) ?? 0) + 1);
    }
    const { signal } = socket.data.closed;
    const pass = async (): Promise<Answer> => {
      const own = new Headers(headers);
      for (const name of ["connection", "content-length", "accept-encoding"]) own.delete(name);
      const answer = await fetch(`${this.#upstream}${path}`, {
        method,
        headers: own,
        body: method === "GET" ? undefined : body,
        signal,
        keepalive: false,
      });
      const kept = [...answer.headers].filter(([name]) => !/^(connection|content-length|transfer-encoding|date)$/.test(name));
      return { status: answer.status, headers: Object.fromEntries(kept), body: await answer.bytes() };
    };
    try {
      await this.#act(socket, fault, call, pass);
    } catch (error) {
      if (!signal.aborted && !this.#stopped) throw error; // else the client hung up
    }
  }

  async #act(
    socket: Socket<Connection>,
    fault: Fault | undefined,
    { service }: WireCall,
    pass: () => Promise<Answer>,
  ): Promise<void> {
    const say = ([name, message, status]: Words) => {
      const { body, ...answer } = encode(service, "", new AwsError(name, message, status));
      this.#write(socket, { ...answer, body: Buffer.from(body) });
    };
    const front = (status: number, text: string) =>
      this.#write(socket, { status, headers: { "content-type": "text/html" }, body: Buffer.from(text) });
    const errors = ERRORS[service];
    const error = errors[this.done.size % errors.length] ?? THROTTLES[service];
    switch (fault) {
      case undefined:
        return this.#write(socket, await pass());
      case "reset before":
        return void socket.terminate();
      case "reset after":
        await pass();
        return void socket.terminate();
      case "cut short":
      case "cut short, chunked":
        return this.#cut(socket, await pass(), fault === "cut short");
      case "hang before":
        return new Promise((resolve) => socket.data.closed.signal.addEventListener("abort", () => resolve()));
      case "hang after":
        await pass();
        return new Promise((resolve) => socket.data.closed.signal.addEventListener("abort", () => resolve()));
      case "slow":
        await Bun.sleep(1_500);
        return this.#write(socket, await pass());
      case "HTML 500":
        return front(500, html("500 Internal Server Error"));
      case "HTML 503":
        return front(503, html("503 Service Temporarily Unavailable"));
      case "empty 503":
        return front(503, "");
      case "HTML 502 after":
        await pass();
        return front(502, html("502 Bad Gateway"));
      case "AWS error":
        return say(error);
      case "AWS error after":
        await pass();
        return say(error);
      case "throttle":
        return say(THROTTLES[service]);
    }
  }

  #head({ status, headers }: Answer, more: Record<string, string>): string {
    const lines = Object.entries({ ...headers, ...more }).map(([name, value]) => `${name}: ${value}\r\n`);
    return `HTTP/1.1 ${status} X\r\n${lines.join("")}\r\n`;
  }
  #write(socket: Socket<Connection>, answer: Answer): void {
    const bare = answer.status === 204 || answer.status === 304;
    const head = this.#head(answer, bare ? {} : { "content-length": String(answer.body.length) });
    send(socket, Buffer.concat([Buffer.from(head), answer.body]));
  }
  /** Half of the answer, and the connection's end. */
  #cut(socket: Socket<Connection>, answer: Answer, hasLength: boolean): void {
    const half = answer.body.subarray(0, Math.floor(answer.body.length / 2));
    const head = hasLength
      ? this.#head(answer, { "content-length": String(answer.body.length) })
      : this.#head(answer, { "transfer-encoding": "chunked" });
    const body =
      hasLength || !half.length
        ? half
        : Buffer.concat([Buffer.from(`${half.length.toString(16)}\r\n`), half, Buffer.from("\r\n")]);
    send(socket, Buffer.concat([Buffer.from(head), body]));
    socket.end();
  }
}

/** The kernel may take a part only; what is left goes when there is room. */
function send(socket: Socket<Connection>, bytes: Uint8Array): void {
  const written = Math.max(0, socket.write(bytes));
  if (written < bytes.length && socket.readyState > 0) setTimeout(() => send(socket, bytes.subarray(written)), 5);
}

// What every service of the simulator needs: errors in AWS's shape, a seeded generator, and the SDK's own
// schemas as the judge of what a request may contain.
import * as autoscaling from "@aws-sdk/client-auto-scaling";
import * as ec2 from "@aws-sdk/client-ec2";
import * as elbv2 from "@aws-sdk/client-elastic-load-balancing-v2";
import * as s3 from "@aws-sdk/client-s3";
import * as sqs from "@aws-sdk/client-sqs";

export type Service = "ec2" | "autoscaling" | "elbv2" | "sqs" | "s3";

/** [least, most], both included. */
export type Range = [number, number];

/** An error as the SDK throws it. `Code` differs from `name` only for SQS, whose query codes are longer. */
export class AwsError extends Error {
  readonly $metadata: { httpStatusCode: number; requestId: string };
  readonly $fault: "client" | "server";
  $service: Service | undefined;
  readonly Code: string;
  constructor(name: string, message: string, httpStatusCode = 400, code = name) {
    super(message);
    this.name = name;
    this.Code = code;
    this.$fault = httpStatusCode >= 500 ? "server" : "client";
    this.$metadata = { httpStatusCode, requestId: "00000000-0000-4000-8000-000000000000" };
  }
}

/** mulberry32: small, fast, and the same everywhere. */
export class Random {
  #state: number;
  constructor(seed: number) {
    this.#state = seed >>> 0;
  }
  /** [0, 1) */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }
  /** A whole number, both ends included. */
  between([least, most]: Range): number {
    return least + Math.floor(this.next() * (most - least + 1));
  }
  chance(probability: number): boolean {
    return probability > 0 && this.next() < probability;
  }
  hex(digits: number): string {
    let text = "";
    for (let i = 0; i < digits; i++) text += Math.floor(this.next() * 16).toString(16);
    return text;
  }
  uuid(): string {
    return `${this.hex(8)}-${this.hex(4)}-4${this.hex(3)}-8${this.hex(3)}-${this.hex(12)}`;
  }
}

/** AWS filter patterns: `*` any text, `?` one character, `\` takes the next literally; case counts. */
export function wildcard(pattern: string): (text: string) => boolean {
  if (!/[*?\\]/.test(pattern)) return (text) => text === pattern;
  let source = "";
  for (let i = 0; i < pattern.length; i++) {
    let character = pattern.charAt(i);
    if (character === "*") source += "[^]*";
    else if (character === "?") source += "[^]";
    else {
      if (character === "\\" && i + 1 < pattern.length) character = pattern.charAt(++i);
      source += character.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    }
  }
  const expression = new RegExp(`^${source}$`);
  return (text) => expression.test(text);
}

/**
 * A page of `items`, or `isEmpty`: none of them yet. The token is opaque to callers; a made-up one is refused through
 * `invalid`.
 */
export function page<T>(
  items: T[],
  size: number,
  token: string | undefined,
  invalid: () => AwsError,
  isEmpty = false,
): { items: T[]; next: string | undefined } {
  if (isEmpty && token === undefined) return { items: [], next: "page-0" };
  let start = 0;
  if (token !== undefined) {
    const match = /^page-(\d+)$/.exec(token);
    if (!match) throw invalid();
    start = Number(match[1]);
  }
  const end = start + size;
  return { items: items.slice(start, end), next: end < items.length ? `page-${end}` : undefined };
}

// --- The SDK's schemas -----------------------------------------------------------------------------------------
// Smithy's compact form: a number (type, list-of or map-of), or [kind, namespace, name, traits, ...].

const packages: Record<Service, object> = { ec2, autoscaling, elbv2, sqs, s3 };

const Kind = { simple: 0, list: 1, map: 2, structure: 3, union: 4, operation: 9, error: -3 } as const;

type Fault =
  | { kind: "unknown"; path: string }
  | { kind: "missing"; path: string }
  | { kind: "type"; path: string; value: unknown; expected: string };

interface OperationSchema {
  input: unknown;
  output: unknown;
}

/** The schema of an operation of the SDK's, undefined where AWS has none of that name. */
export function operationSchema(service: Service, operation: string): OperationSchema | undefined {
  const found: unknown = Reflect.get(packages[service], `${operation}$`);
  return Array.isArray(found) && found[0] === Kind.operation ? { input: found[4], output: found[5] } : undefined;
}

/** A copy of what an answer is made of: lists, structures, and values that nobody changes. Much faster than structuredClone. */
export function copyOf<T>(value: T): T {
  if (Array.isArray(value)) return value.map(copyOf) as T;
  if (!isPlain(value)) return value;
  return Object.fromEntries(Object.entries(value).map(([key, member]) => [key, copyOf(member)])) as T;
}

/** By service and code on the wire: the names under which the SDK throws what has another name there (ResourceContentionFault). */
const exceptionNames = new Map(
  Object.entries(packages).map(([service, exports]) => {
    const errors = Object.values<unknown>({ ...exports }).filter((e) => Array.isArray(e) && e[0] === Kind.error) as unknown[][];
    const names = errors.flatMap(([, , name, traits]) => {
      const onWire: unknown = Reflect.get(Object(traits), "awsQueryError");
      return Array.isArray(onWire) ? [[String(onWire[0]), String(name)] as const] : [];
    });
    return [service, new Map(names)] as const;
  }),
);

/** The name under which the SDK throws an error: its shape's, which may not be the code on the wire. */
export const exceptionName = (service: Service, code: string): string => exceptionNames.get(service)?.get(code) ?? code;

/** A copy of `value` with undefined members left out; what the schema does not know is reported by `fault`. */
export function parse(schema: unknown, value: unknown, path: string, fault: (fault: Fault) => void): unknown {
  let at: unknown = schema;
  while (typeof at === "function") at = at();
  if (typeof at === "string") return {}; // "unit": an operation without input or output
  if (Array.isArray(at) && at.length === 2) return parse(at[0], value, path, fault); // [schema, traits]
  if (typeof at === "number") return parseNumbered(at, value, path, fault);
  if (!Array.isArray(at)) throw new Error(`a schema of unknown form at ${path}`);
  const wrong = (expected: string): unknown => {
    fault({ kind: "type", path, value, expected });
    return value;
  };
  switch (at[0]) {
    case Kind.simple:
      return parse(at[4], value, path, fault);
    case Kind.list:
      if (!Array.isArray(value)) return wrong("list");
      return value.map((item, i) => parse(at[4], item, `${path}.${i + 1}`, fault));
    case Kind.map: {
      if (!isPlain(value)) return wrong("map");
      const copy: Record<string, unknown> = {};
      for (const [key, item] of Object.entries(value))
        if (item !== undefined) copy[key] = parse(at[5], item, `${path}.${key}`, fault);
      return copy;
    }
    case Kind.structure:
    case Kind.union: {
      if (!isPlain(value)) return wrong("structure");
      const names = at[4] as string[];
      const members = at[5] as unknown[];
      const required = typeof at[6] === "number" ? at[6] : 0;
      const copy: Record<string, unknown> = {};
      for (const [key, item] of Object.entries(value)) {
        if (item === undefined) continue;
        const index = names.indexOf(key);
        const inner = path === "" ? key : `${path}.${key}`;
        if (index < 0) fault({ kind: "unknown", path: inner });
        else copy[key] = parse(members[index], item, inner, fault);
      }
      for (const name of names.slice(0, required))
        if (!(name in copy)) fault({ kind: "missing", path: path === "" ? name : `${path}.${name}` });
      return copy;
    }
    default:
      throw new Error(`a schema of unknown kind ${String(at[0])} at ${path}`);
  }
}

const LIST_OF = 64;
const MAP_OF = 128;

function parseNumbered(schema: number, value: unknown, path: string, fault: (fault: Fault) => void): unknown {
  const wrong = (expected: string): unknown => {
    fault({ kind: "type", path, value, expected });
    return value;
  };
  if (schema & MAP_OF) {
    if (!isPlain(value)) return wrong("map");
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [key, parseNumbered(schema & ~MAP_OF, item, `${path}.${key}`, fault)]),
    );
  }
  if (schema & LIST_OF) {
    if (!Array.isArray(value)) return wrong("list");
    return value.map((item, i) => parseNumbered(schema & ~LIST_OF, item, `${path}.${i + 1}`, fault));
  }
  if (schema === 0) return typeof value === "string" ? value : wrong("string");
  if (schema === 1) return typeof value === "number" && Number.isFinite(value) ? value : wrong("number");
  if (schema === 2) return typeof value === "boolean" ? value : wrong("boolean");
  if (schema >= 4 && schema <= 7) return value instanceof Date && !Number.isNaN(value.getTime()) ? value : wrong("timestamp");
  return value; // blobs and documents
}

function isPlain(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);
}

/** What each service answers to a request that does not fit its model. */
export function faultError(service: Service, fault: Fault): AwsError {
  const { path } = fault;
  if (service === "autoscaling" || service === "elbv2") {
    const name = path.charAt(0).toLowerCase() + path.slice(1);
    if (fault.kind === "missing")
      return new AwsError(
        "ValidationError",
        `1 validation error detected: Value null at '${name}' failed to satisfy constraint: Member must not be null`,
      );
    if (fault.kind === "type")
      return new AwsError("MalformedInput", `${String(fault.value)} at '${name}' is not a ${fault.expected}`);
    // The real service ignores what it does not know; a typing error would go unseen for ever.
    return new AwsError("ValidationError", `The parameter ${path} is not recognized`);
  }
  if (fault.kind === "missing") return new AwsError("MissingParameter", `The request must contain the parameter ${path}`);
  if (fault.kind === "type")
    return new AwsError(
      "InvalidParameterValue",
      `Value (${String(fault.value)}) for parameter ${path} is invalid: it must be a ${fault.expected}`,
    );
  return new AwsError("UnknownParameter", `The parameter ${path} is not recognized`);
}

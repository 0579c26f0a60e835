// AWS's wire formats, seen from the server: an HTTP request becomes a call, and a call's output or error becomes
// an HTTP answer. EC2 speaks ec2Query, Auto Scaling and Elastic Load Balancing speak awsQuery, SQS speaks AWS
// JSON 1.0, S3 speaks restXml. No shape is written down here: the SDK's packages export the schemas that their
// own clients serialize with, and one reader and one writer per format walk them. What the members mean, which of
// them are required and how much is too much, is the world's affair.
import * as autoscaling from "@aws-sdk/client-auto-scaling";
import * as ec2 from "@aws-sdk/client-ec2";
import * as elbv2 from "@aws-sdk/client-elastic-load-balancing-v2";
import * as s3 from "@aws-sdk/client-s3";
import * as sqs from "@aws-sdk/client-sqs";
import { NormalizedSchema as Schema } from "@smithy/core/schema";
import { AwsError, faultError, type Service } from "./basics.ts";

export interface WireRequest {
  method: string;
  url: string;
  headers: Headers;
  body: Uint8Array;
}

export interface WireCall {
  service: Service;
  operation: string;
  input: Record<string, unknown>;
}

export interface WireResponse {
  status: number;
  headers: Record<string, string>;
  body: string | Uint8Array<ArrayBuffer>;
}

// --- Services --------------------------------------------------------------------------------------------------

type Query = "ec2" | "autoscaling" | "elbv2";

/** Versions and namespaces as the SDK's clients and AWS's answers have them. */
const queryServices: Record<Query, { version: string; namespace: string }> = {
  ec2: { version: "2016-11-15", namespace: "http://ec2.amazonaws.com/doc/2016-11-15/" },
  autoscaling: { version: "2011-01-01", namespace: "http://autoscaling.amazonaws.com/doc/2011-01-01/" },
  elbv2: { version: "2015-12-01", namespace: "http://elasticloadbalancing.amazonaws.com/doc/2015-12-01/" },
};

const S3_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/";
const SQS_NAMESPACE = "com.amazonaws.sqs";

/** The service names that clients sign for: the fourth part of a SigV4 credential scope. */
const scopes: Record<string, Service | undefined> = {
  ec2: "ec2",
  autoscaling: "autoscaling",
  elasticloadbalancing: "elbv2",
  sqs: "sqs",
  s3: "s3",
};

interface Operation {
  name: string;
  /** S3 only: method, path pattern, status. */
  http: [string, string, number] | undefined;
  input: Schema;
  output: Schema;
}

interface Shapes {
  operations: Map<string, Operation>;
  /** By the exception's name and by the code that stands on the wire, which may differ (ResourceContentionFault). */
  errors: Map<string, Schema>;
}

const packages = { ec2, autoscaling, elbv2, sqs, s3 };
const shapes = new Map<Service, Shapes>();

type SchemaRef = Parameters<typeof Schema.of>[0];
/** The SDK's static form: 9 is an operation (then input and output follow), -3 an error. */
type StaticShape = [kind: number, namespace: string, name: string, traits: unknown, SchemaRef, SchemaRef];

/** Sorts a package's exported schemas, once. */
function shapesOf(service: Service): Shapes {
  const known = shapes.get(service);
  if (known) return known;
  const found: Shapes = { operations: new Map(), errors: new Map() };
  for (const exported of Object.values<unknown>(packages[service])) {
    if (!Array.isArray(exported)) continue;
    const [kind, , name, traits, input, output] = exported as StaticShape;
    if (kind === 9) {
      const http: unknown = Reflect.get(Object(traits), "http");
      found.operations.set(name, {
        name,
        http: Array.isArray(http) ? (http as [string, string, number]) : undefined,
        input: Schema.of(input),
        output: Schema.of(output),
      });
    } else if (kind === -3) {
      const schema = Schema.of(exported as SchemaRef);
      found.errors.set(name, schema);
      const code = queryCode(schema);
      if (code !== undefined && !found.errors.has(code)) found.errors.set(code, schema);
    }
  }
  shapes.set(service, found);
  return found;
}

function queryCode(error: Schema): string | undefined {
  const trait = error.getMergedTraits().awsQueryError;
  return Array.isArray(trait) ? String(trait[0]) : undefined;
}

// --- Requests --------------------------------------------------------------------------------------------------
// The signature says which service is meant and is not checked. Unsigned requests (curl) are told apart by what
// they carry; what carries nothing is a path, and so S3's.

/**
 * The call that a request asks for. Throws an AwsError with `$service` set, as the service itself would answer,
 * where the request is malformed.
 */
export function decode(request: WireRequest): WireCall {
  const url = new URL(request.url);
  const target = request.headers.get("x-amz-target");
  const scope = /Credential=[^/]+\/[^/]*\/[^/]*\/([^/]+)\/aws4_request/.exec(request.headers.get("authorization") ?? "")?.[1];
  if (scope !== undefined && !scopes[scope])
    throw refusal("autoscaling", "InvalidAction", `The simulator has no service "${scope}"`);
  if (scope === "sqs" || target?.startsWith("AmazonSQS.")) return decodeJson(request, target);
  if (scope === "s3") return decodeRest(request, url);

  const form = new URLSearchParams(request.method === "GET" ? url.search : textOf(request.body));
  const service = scope === undefined ? serviceOfForm(form) : (scopes[scope] as Query);
  return service ? decodeQuery(service, form) : decodeRest(request, url);
}

function serviceOfForm(form: URLSearchParams): Query | undefined {
  const action = form.get("Action");
  if (action === null) return undefined;
  const services = Object.keys(queryServices) as Query[];
  return (
    services.find((service) => queryServices[service].version === form.get("Version")) ??
    services.find((service) => shapesOf(service).operations.has(action)) ??
    "ec2"
  );
}

function refusal(service: Service, name: string, message: string, status = 400): AwsError {
  const error = new AwsError(name, message, status);
  error.$service = service;
  return error;
}

const decoder = new TextDecoder();
const encoder = new TextEncoder();

function textOf(bytes: Uint8Array): string {
  return decoder.decode(bytes);
}

/** A scalar from text, in a form parameter or a header. Undefined: the text is not one of its type. */
function readText(schema: Schema, text: string): unknown {
  if (schema.isNumericSchema()) return /^[-+]?\d+(\.\d+)?([eE][-+]?\d+)?$/.test(text) ? Number(text) : undefined;
  if (schema.isBooleanSchema()) return /^true$/i.test(text) || (/^false$/i.test(text) ? false : undefined);
  if (schema.isBlobSchema()) return bytesFromBase64(text);
  if (schema.isTimestampSchema()) {
    const date = /^\d+(\.\d+)?$/.test(text) ? new Date(Number(text) * 1000) : new Date(text);
    return Number.isNaN(date.getTime()) ? undefined : date;
  }
  return text;
}

function bytesFromBase64(text: string): Uint8Array | undefined {
  return /^[A-Za-z0-9+/]*={0,2}$/.test(text) ? new Uint8Array(Buffer.from(text, "base64")) : undefined;
}

function typeName(schema: Schema): string {
  if (schema.isNumericSchema()) return "number";
  if (schema.isBooleanSchema()) return "boolean";
  if (schema.isBlobSchema()) return "blob";
  if (schema.isTimestampSchema()) return "timestamp";
  if (schema.isListSchema()) return "list";
  if (schema.isMapSchema()) return "map";
  return schema.isStructSchema() ? "structure" : "string";
}

function malformed(service: Service, schema: Schema, path: string, value: unknown): AwsError {
  const expected = typeName(schema);
  if (service === "sqs") return refusal(service, "SerializationException", `${path} is not a ${expected}`);
  if (service === "s3") return refusal(service, "InvalidArgument", `${path} is not a ${expected}`);
  return Object.assign(faultError(service, { kind: "type", path, value, expected }), { $service: service });
}

// --- Query requests --------------------------------------------------------------------------------------------
// `Filter.1.Value.2=x` is a path in a tree. EC2 numbers its lists directly, the others under `member`.

interface Parameter {
  text: string | undefined;
  children: Map<string, Parameter>;
}

function decodeQuery(service: Query, form: URLSearchParams): WireCall {
  const action = form.get("Action");
  if (!action) throw refusal(service, "MissingAction", "The request must contain the parameter Action");
  const operation = shapesOf(service).operations.get(action);
  if (!operation) {
    const message =
      service === "ec2"
        ? `The action ${action} is not valid for this web service.`
        : `Could not find operation ${action} for version ${queryServices[service].version}`;
    throw refusal(service, "InvalidAction", message);
  }
  const root: Parameter = { text: undefined, children: new Map() };
  for (const [path, text] of form) {
    if (path === "Action" || path === "Version") continue;
    let at = root;
    for (const part of path.split(".")) {
      const next = at.children.get(part) ?? { text: undefined, children: new Map() };
      at.children.set(part, next);
      at = next;
    }
    at.text = text;
  }
  // An operation without input has nothing to read; whatever was sent is not recognized.
  const input = operation.input.isUnitSchema()
    ? readMembers(service, [], root, "")
    : readMembers(service, operation.input.structIterator(), root, "");
  return { service, operation: action, input };
}

function readMembers(
  service: Query,
  members: Iterable<[string, Schema]>,
  parameter: Parameter,
  path: string,
): Record<string, unknown> {
  const value: Record<string, unknown> = {};
  const unread = new Map(parameter.children);
  for (const [name, schema] of members) {
    const traits = schema.getMergedTraits();
    const xmlName = traits.xmlName ?? name;
    const key = service === "ec2" ? String(traits.ec2QueryName ?? xmlName.charAt(0).toUpperCase() + xmlName.slice(1)) : xmlName;
    const child = unread.get(key);
    if (!child) continue;
    unread.delete(key);
    value[name] = readParameter(service, schema, child, path ? `${path}.${key}` : key);
  }
  for (const key of unread.keys()) throw unknown(service, path ? `${path}.${key}` : key);
  return value;
}

function unknown(service: Query, path: string): AwsError {
  return Object.assign(faultError(service, { kind: "unknown", path }), { $service: service });
}

function readParameter(service: Query, schema: Schema, parameter: Parameter, path: string): unknown {
  if (schema.isStructSchema()) return readMembers(service, schema.structIterator(), parameter, path);
  if (schema.isListSchema()) return readList(service, schema, parameter, path);
  const [stray] = parameter.children.keys();
  if (stray !== undefined) throw unknown(service, `${path}.${stray}`);
  const value = readText(schema, parameter.text ?? "");
  if (value === undefined || schema.isMapSchema()) throw malformed(service, schema, path, parameter.text);
  return value;
}

function readList(service: Query, schema: Schema, parameter: Parameter, path: string): unknown[] {
  const member = schema.getValueSchema();
  const flat = service === "ec2" || schema.getMergedTraits().xmlFlattened !== undefined;
  const name = member.getMergedTraits().xmlName ?? "member";
  // awsQuery writes an empty list as `Name=`.
  const items = flat ? parameter : (parameter.children.get(name) ?? { text: undefined, children: new Map() });
  for (const key of parameter.children.keys())
    if (flat ? !/^\d+$/.test(key) : key !== name) throw unknown(service, `${path}.${key}`);
  if (items.children.size === 0 && parameter.text) throw malformed(service, schema, path, parameter.text);
  return [...items.children.entries()]
    .sort(([a], [b]) => Number(a) - Number(b))
    .map(([index, item]) => readParameter(service, member, item, `${path}.${flat ? "" : `${name}.`}${index}`));
}

// --- JSON requests ---------------------------------------------------------------------------------------------
// Queues have no timestamps, so neither has this format here.

function decodeJson(request: WireRequest, target: string | null): WireCall {
  const name = target?.replace(/^AmazonSQS\./, "") ?? "";
  const operation = shapesOf("sqs").operations.get(name);
  if (!operation)
    throw name === ""
      ? refusal("sqs", "MissingAction", "The request must contain the header X-Amz-Target")
      : refusal("sqs", "UnknownOperationException", `The operation ${name} is not known`, 404);
  let body: unknown;
  try {
    body = JSON.parse(textOf(request.body) || "{}");
  } catch (cause) {
    throw refusal("sqs", "SerializationException", `The body is not JSON: ${String(cause)}`);
  }
  const input = operation.input.isUnitSchema() ? {} : readJson(operation.input, body, "");
  return { service: "sqs", operation: name, input: input as Record<string, unknown> };
}

/** A member that the schema does not know is passed over, as the service does. */
function readJson(schema: Schema, value: unknown, path: string): unknown {
  const wrong = () => malformed("sqs", schema, path || "The body", value);
  if (schema.isListSchema()) {
    if (!Array.isArray(value)) throw wrong();
    return value.map((item, i) => readJson(schema.getValueSchema(), item, `${path}.${i + 1}`));
  }
  if (schema.isStructSchema() || schema.isMapSchema()) {
    if (typeof value !== "object" || value === null || Array.isArray(value)) throw wrong();
    const members: [string, Schema][] = schema.isMapSchema()
      ? Object.keys(value).map((key) => [key, schema.getValueSchema()])
      : [...schema.structIterator()];
    const read: Record<string, unknown> = {};
    for (const [name, member] of members) {
      const item: unknown = Reflect.get(value, name);
      if (item === undefined || item === null) continue;
      // Defined, not assigned: a queue may have a tag named __proto__.
      Object.defineProperty(read, name, {
        value: readJson(member, item, path ? `${path}.${name}` : name),
        enumerable: true,
        configurable: true,
        writable: true,
      });
    }
    return read;
  }
  if (schema.isBlobSchema() && typeof value === "string") {
    const bytes = bytesFromBase64(value);
    if (bytes) return bytes;
  }
  if (!schema.isBlobSchema() && typeof value === typeName(schema)) return value;
  throw wrong();
}

// --- REST requests ---------------------------------------------------------------------------------------------
// S3, addressed by path: /bucket/key. Several operations share a method and a path; the SDK tells them apart with
// `x-id`, other clients by the parameters that only one of them requires. XML bodies of requests are not read:
// none of the operations that the world serves needs one.

function decodeRest(request: WireRequest, url: URL): WireCall {
  const [, bucket = "", key = ""] = (/^\/([^/]*)\/?(.*)$/s.exec(url.pathname) ?? []).map(unescapePath);
  const xId = url.searchParams.get("x-id");
  let best: { operation: Operation; score: number } | undefined;
  for (const operation of shapesOf("s3").operations.values()) {
    const [method, pattern] = operation.http ?? ["", ""];
    const [path, query = ""] = pattern.split("?");
    if (method !== request.method || path !== (key === "" ? "/" : "/{Key+}")) continue;
    const literals = [...new URLSearchParams(query)].filter(([name]) => name !== "x-id");
    if (!literals.every(([name, value]) => url.searchParams.get(name) === value)) continue;
    const required = requiredOf(operation.input);
    if (required.some(([name]) => name === "Bucket") !== (bucket !== "")) continue;
    if (!required.every((member) => isBound(member, request.headers, url))) continue;
    const score = literals.length + required.length + (xId === operation.name ? 100 : 0);
    if (!best || score > best.score) best = { operation, score };
  }
  if (!best) throw refusal("s3", "MethodNotAllowed", "The specified method is not allowed against this resource.", 405);
  const { name, input } = best.operation;
  const members = input.isUnitSchema() ? [] : input.structIterator();
  return { service: "s3", operation: name, input: readBindings(members, request, url, bucket, key) };
}

function unescapePath(path: string): string {
  try {
    return decodeURIComponent(path);
  } catch (cause) {
    throw refusal("s3", "InvalidURI", `Couldn't parse the specified URI: ${String(cause)}`);
  }
}

/** The seventh part of a structure's schema counts its required members, which come first. */
function requiredOf(schema: Schema): [string, Schema][] {
  if (schema.isUnitSchema()) return [];
  const count: unknown = Reflect.get(Object(schema.getSchema()), 6);
  return [...schema.structIterator()].slice(0, typeof count === "number" ? count : 0);
}

function isBound([, schema]: [string, Schema], headers: Headers, url: URL): boolean {
  const { httpHeader, httpQuery } = schema.getMergedTraits();
  if (httpHeader !== undefined) return headers.has(httpHeader);
  return httpQuery === undefined || url.searchParams.has(httpQuery);
}

function readBindings(
  members: Iterable<[string, Schema]>,
  request: WireRequest,
  url: URL,
  bucket: string,
  key: string,
): Record<string, unknown> {
  const input: Record<string, unknown> = {};
  for (const [name, schema] of members) {
    const { httpLabel, httpQuery, httpHeader, httpPrefixHeaders, httpPayload } = schema.getMergedTraits();
    if (httpLabel !== undefined) input[name] = name === "Bucket" ? bucket : key;
    else if (httpPayload !== undefined && schema.isBlobSchema()) input[name] = payload(request);
    else if (httpPrefixHeaders !== undefined) {
      const found = [...request.headers].filter(([header]) => header.startsWith(httpPrefixHeaders));
      if (found.length === 0) continue;
      input[name] = Object.fromEntries(found.map(([header, text]) => [header.slice(httpPrefixHeaders.length), text]));
    } else {
      const text = httpQuery !== undefined ? url.searchParams.get(httpQuery) : request.headers.get(httpHeader ?? "-");
      if (text === null) continue;
      const read = (item: Schema, part: string) => {
        const value = readText(item, part);
        if (value === undefined) throw malformed("s3", item, name, part);
        return value;
      };
      input[name] = schema.isListSchema()
        ? text.split(",").map((part) => read(schema.getValueSchema(), part.trim()))
        : read(schema, text);
    }
  }
  return input;
}

/** The body, out of its `aws-chunked` frames where the client streamed it with a trailing checksum. */
function payload(request: WireRequest): Uint8Array {
  const sha = request.headers.get("x-amz-content-sha256") ?? "";
  if (!sha.startsWith("STREAMING-")) return request.body;
  const parts: Uint8Array[] = [];
  for (let at = 0; at < request.body.length; ) {
    const end = request.body.indexOf(10, at);
    const size = Number.parseInt(textOf(request.body.subarray(at, end)), 16);
    if (end < 0 || Number.isNaN(size)) throw refusal("s3", "IncompleteBody", "The chunked body is malformed.");
    if (size === 0) break;
    parts.push(request.body.subarray(end + 1, end + 1 + size));
    at = end + 1 + size + 2; // the chunk's own CR LF
  }
  return new Uint8Array(Buffer.concat(parts));
}

// --- Answers ---------------------------------------------------------------------------------------------------

/**
 * The answer to a call, from its output, or from the error that it threw. A member that the operation's schema
 * does not know, or of another type, throws: the simulator is wrong then, not the client.
 *
 * An error is found in the SDK's model by the exception's name or by its code, and the client sees the exception's
 * name (`ResourceContentionFault`), as with AWS. `operation` may be empty for an error.
 */
export function encode(
  service: Service,
  operation: string,
  answer: object | Error,
  requestId = "00000000-0000-4000-8000-000000000000",
): WireResponse {
  if (answer instanceof Error) return encodeError(service, answer, requestId);
  const shape = shapesOf(service).operations.get(operation);
  if (!shape) throw new Error(`encoding an answer: ${service} has no operation ${operation}`);
  const { $metadata: _, ...output } = answer as Record<string, unknown>;
  try {
    if (service === "sqs") return encodeJson(shape, output, requestId);
    if (service === "s3") return encodeRest(shape, output, requestId);
    return encodeQuery(service, shape, output, requestId);
  } catch (cause) {
    throw new Error(`encoding the answer of ${service} ${operation}`, { cause });
  }
}

function encodeError(service: Service, error: Error, requestId: string): WireResponse {
  const metadata: unknown = Reflect.get(error, "$metadata");
  const given: unknown = metadata ? Reflect.get(Object(metadata), "httpStatusCode") : undefined;
  const status = typeof given === "number" ? given : 500;
  const ownCode: unknown = Reflect.get(error, "Code");
  const schema = shapesOf(service).errors.get(error.name);
  const name = schema?.getName() ?? error.name;
  const code = (schema && queryCode(schema)) ?? (typeof ownCode === "string" ? ownCode : error.name);
  const type = status < 500 ? "Sender" : "Receiver";
  const message = error.message;
  switch (service) {
    case "sqs":
      return {
        status,
        headers: {
          "content-type": "application/x-amz-json-1.0",
          "x-amzn-requestid": requestId,
          "x-amzn-query-error": `${code};${type}`,
        },
        body: JSON.stringify({ __type: `${SQS_NAMESPACE}#${name}`, message }),
      };
    case "ec2":
      return xml(status, requestId, [
        `<Response><Errors><Error>${element("Code", code)}${element("Message", message)}</Error></Errors>`,
        `${element("RequestID", requestId)}</Response>`,
      ]);
    case "s3":
      return xml(status, requestId, [
        `<Error>${element("Code", code)}${element("Message", message)}${element("RequestId", requestId)}</Error>`,
      ]);
    default:
      return xml(status, requestId, [
        `<ErrorResponse xmlns="${queryServices[service].namespace}"><Error>${element("Type", type)}`,
        `${element("Code", code)}${element("Message", message)}</Error>`,
        `${element("RequestId", requestId)}</ErrorResponse>`,
      ]);
  }
}

/** A scalar as text, `httpDate` where it goes into a header. */
function writeText(schema: Schema, value: unknown, path: string, httpDate = false): string {
  if (schema.isTimestampSchema() && value instanceof Date) {
    const kind = schema.getSchema();
    if (kind === 7) return String(value.getTime() / 1000);
    return kind === 6 || (httpDate && kind === 4) ? value.toUTCString() : value.toISOString();
  }
  if (schema.isBlobSchema() && value instanceof Uint8Array) return Buffer.from(value).toString("base64");
  if (schema.isNumericSchema() && typeof value === "number") return String(value);
  if (schema.isBooleanSchema() && typeof value === "boolean") return String(value);
  if (schema.isStringSchema() && typeof value === "string") return value;
  throw new TypeError(`${path} is not a ${typeName(schema)}: ${String(value)}`);
}

/** The members of an output that are there, with their schemas. */
function membersOf(schema: Schema, value: unknown, path: string): [string, Schema, unknown][] {
  if (typeof value !== "object" || value === null || Array.isArray(value))
    throw new TypeError(`${path || "the output"} is not a structure: ${String(value)}`);
  const names = new Set<string>();
  const present: [string, Schema, unknown][] = [];
  for (const [name, member] of schema.isUnitSchema() ? [] : schema.structIterator()) {
    names.add(name);
    const item: unknown = Reflect.get(value, name);
    if (item !== undefined && item !== null) present.push([name, member, item]);
  }
  for (const name of Object.keys(value))
    if (!names.has(name)) throw new TypeError(`${path ? `${path}.` : ""}${name} is no member of the shape`);
  return present;
}

function listOf(value: unknown, path: string): unknown[] {
  if (!Array.isArray(value)) throw new TypeError(`${path} is not a list: ${String(value)}`);
  return value;
}

// --- XML answers -----------------------------------------------------------------------------------------------

/**
 * Text for an XML element. Control characters become references (XML 1.0 has none for most of them, but AWS and
 * its clients do so), line ends too, because a parser may turn CR LF into LF; U+FFFE and lone surrogates likewise.
 */
export function escapeXml(text: string): string {
  return text.replace(
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is being escaped
    /[&<>"'\u0000-\u001f\u007f-\u009f\u2028\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
    (character) => entities[character] ?? `&#x${character.charCodeAt(0).toString(16).toUpperCase()};`,
  );
}

const entities: Record<string, string | undefined> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

function element(name: string, text: string): string {
  return `<${name}>${escapeXml(text)}</${name}>`;
}

function xml(status: number, requestId: string, parts: string[]): WireResponse {
  return {
    status,
    headers: {
      "content-type": "text/xml;charset=UTF-8",
      "x-amzn-requestid": requestId,
      "x-amz-request-id": requestId,
    },
    body: `<?xml version="1.0" encoding="UTF-8"?>\n${parts.join("")}`,
  };
}

function writeXml(name: string, schema: Schema, value: unknown, path: string): string {
  if (schema.isListSchema()) {
    const member = schema.getValueSchema();
    const flat = schema.getMergedTraits().xmlFlattened !== undefined;
    const itemName = flat ? name : (member.getMergedTraits().xmlName ?? "member");
    const items = listOf(value, path).map((item, i) => writeXml(itemName, member, item, `${path}.${i + 1}`));
    return flat ? items.join("") : `<${name}>${items.join("")}</${name}>`;
  }
  if (schema.isStructSchema()) return `<${name}>${writeXmlMembers(schema, value, path)}</${name}>`;
  return element(name, writeText(schema, value, path));
}

function writeXmlMembers(schema: Schema, value: unknown, path: string): string {
  return membersOf(schema, value, path)
    .map(([name, member, item]) =>
      writeXml(member.getMemberTraits().xmlName ?? name, member, item, path ? `${path}.${name}` : name),
    )
    .join("");
}

function encodeQuery(service: Query, shape: Operation, output: object, requestId: string): WireResponse {
  const { name } = shape;
  const open = `<${name}Response xmlns="${queryServices[service].namespace}">`;
  const members = writeXmlMembers(shape.output, output, "");
  if (service === "ec2") {
    const body = shape.output.isUnitSchema() ? "<return>true</return>" : members;
    return xml(200, requestId, [open, element("requestId", requestId), body, `</${name}Response>`]);
  }
  return xml(200, requestId, [
    open,
    shape.output.isUnitSchema() ? "" : `<${name}Result>${members}</${name}Result>`,
    `<ResponseMetadata>${element("RequestId", requestId)}</ResponseMetadata></${name}Response>`,
  ]);
}

// --- JSON answers ----------------------------------------------------------------------------------------------

function encodeJson(shape: Operation, output: object, requestId: string): WireResponse {
  const members = writeJson(shape.output, output, "");
  return {
    status: 200,
    headers: { "content-type": "application/x-amz-json-1.0", "x-amzn-requestid": requestId },
    body: shape.output.isUnitSchema() ? "" : JSON.stringify(members),
  };
}

function writeJson(schema: Schema, value: unknown, path: string): unknown {
  if (schema.isListSchema()) {
    const member = schema.getValueSchema();
    return listOf(value, path).map((item, i) => writeJson(member, item, `${path}.${i + 1}`));
  }
  if (schema.isMapSchema()) {
    if (typeof value !== "object" || value === null) throw new TypeError(`${path} is not a map: ${String(value)}`);
    const member = schema.getValueSchema();
    return Object.fromEntries(
      Object.entries(value)
        .filter(([, item]) => item !== undefined)
        .map(([key, item]) => [key, writeJson(member, item, `${path}.${key}`)]),
    );
  }
  if (schema.isStructSchema() || schema.isUnitSchema())
    return Object.fromEntries(
      membersOf(schema, value, path).map(([name, member, item]) => [
        name,
        writeJson(member, item, path ? `${path}.${name}` : name),
      ]),
    );
  const text = writeText(schema, value, path); // judges the type
  return schema.isBlobSchema() ? text : value;
}

// --- REST answers ----------------------------------------------------------------------------------------------

function encodeRest(shape: Operation, output: object, requestId: string): WireResponse {
  const headers: Record<string, string> = { "x-amz-request-id": requestId, "x-amz-id-2": requestId };
  let status = shape.http?.[2] ?? 200;
  let body: WireResponse["body"] = "";
  let members = "";
  for (const [name, schema, value] of membersOf(shape.output, output, "")) {
    const traits = schema.getMergedTraits();
    if (traits.httpHeader !== undefined) headers[traits.httpHeader] = headerText(schema, value, name);
    else if (traits.httpPrefixHeaders !== undefined)
      for (const [key, text] of Object.entries(Object(value)))
        headers[traits.httpPrefixHeaders + key] = headerText(schema.getValueSchema(), text, `${name}.${key}`);
    else if (traits.httpResponseCode !== undefined) status = Number(value);
    else if (traits.httpPayload === undefined) members += writeXml(schema.getMemberTraits().xmlName ?? name, schema, value, name);
    else if (schema.isBlobSchema()) body = blob(value, name);
    else body = writeXml(traits.xmlName ?? name, schema, value, name);
  }
  if (status === 200 && headers["Content-Range"] !== undefined) status = 206;
  const isXml = members !== "" || hasXmlBody(shape.output);
  if (isXml) {
    const root = shape.output.getMergedTraits().xmlName ?? shape.output.getName() ?? shape.name;
    headers["content-type"] = "application/xml";
    body = `<?xml version="1.0" encoding="UTF-8"?>\n<${root} xmlns="${S3_NAMESPACE}">${members}</${root}>`;
  }
  return { status, headers, body };
}

function hasXmlBody(output: Schema): boolean {
  if (output.isUnitSchema()) return false;
  return [...output.structIterator()].some(([, schema]) => {
    const { httpHeader, httpPrefixHeaders, httpResponseCode, httpPayload } = schema.getMergedTraits();
    return !(httpHeader ?? httpPrefixHeaders ?? httpResponseCode ?? httpPayload);
  });
}

function headerText(schema: Schema, value: unknown, path: string): string {
  if (!schema.isListSchema()) return writeText(schema, value, path, true);
  return listOf(value, path)
    .map((item) => writeText(schema.getValueSchema(), item, path, true))
    .join(", ");
}

function blob(value: unknown, path: string): Uint8Array<ArrayBuffer> {
  if (typeof value === "string") return encoder.encode(value);
  if (value instanceof Uint8Array) return new Uint8Array(value);
  throw new TypeError(`${path} is neither text nor bytes`);
}

// The real SDK clients against test/aws/server.ts, with an echo where the world would stand: what a client sends
// must arrive at World.call member by member, and what World.call answers must arrive at the client. Inputs and
// outputs are made from the SDK's schemas, every member filled, so an operation is tested by being named.
import { afterAll, beforeEach, describe, expect, test } from "bun:test";
import { Readable } from "node:stream";
import * as autoscaling from "@aws-sdk/client-auto-scaling";
import * as ec2 from "@aws-sdk/client-ec2";
import * as elbv2 from "@aws-sdk/client-elastic-load-balancing-v2";
import * as s3 from "@aws-sdk/client-s3";
import * as sqs from "@aws-sdk/client-sqs";
import { NormalizedSchema as Schema } from "@smithy/core/schema";
import { AwsError, Random, type Service } from "../aws/basics.ts";
import { serve } from "../aws/server.ts";
import { encode, escapeXml } from "../aws/wire.ts";

interface Call {
  service: Service;
  operation: string;
  input: Record<string, unknown>;
  signal: AbortSignal | undefined;
}

const calls: Call[] = [];
let answer: (call: Call) => object | Promise<object> = () => ({});
const server = serve({
  async call(service, operation, input, options) {
    const call = { service, operation, input: input as Record<string, unknown>, signal: options?.signal };
    calls.push(call);
    return answer(call);
  },
});

const settings = {
  endpoint: server.url,
  region: "us-east-2",
  credentials: { accessKeyId: "AKIAEXAMPLE", secretAccessKey: "secret" },
  maxAttempts: 1,
};

const clients = {
  ec2: new ec2.EC2Client(settings),
  autoscaling: new autoscaling.AutoScalingClient(settings),
  elbv2: new elbv2.ElasticLoadBalancingV2Client(settings),
  sqs: new sqs.SQSClient({ ...settings, md5: false }), // made-up messages have made-up digests
  s3: new s3.S3Client({ ...settings, forcePathStyle: true }),
};
const packages: Record<Service, object> = { ec2, autoscaling, elbv2, sqs, s3 };

/** The client's `send`, for an operation known by its name only. */
async function send(service: Service, operation: string, input: object): Promise<Record<string, unknown>> {
  const Command: new (input: object) => unknown = Reflect.get(packages[service], `${operation}Command`);
  const client = clients[service] as unknown as { send(command: unknown): Promise<Record<string, unknown>> };
  return client.send(new Command(input));
}

beforeEach(() => {
  calls.length = 0;
  answer = () => ({});
});

afterAll(async () => {
  for (const client of Object.values(clients)) client.destroy();
  await server.stop();
});

const operations: Record<Exclude<Service, "s3">, string[]> = {
  ec2: [
    ...["DescribeInstances", "CreateFleet", "RunInstances", "CreateTags", "DeleteTags", "TerminateInstances"],
    ...["DescribeSubnets", "DescribeLaunchTemplateVersions", "DescribeInstanceTypeOfferings"],
    ...["DescribeInstanceTypes", "GetInstanceTypesFromInstanceRequirements", "ModifyInstanceAttribute"],
    ...["DescribeVolumes", "AttachVolume", "DetachVolume", "CreateVolume", "CreateSnapshot"],
    ...["DescribeSnapshots", "DescribeImages", "DescribeTags", "CreateLaunchTemplate", "DescribeVpcs"],
  ],
  autoscaling: [
    ...["DescribeAutoScalingGroups", "DescribeAutoScalingInstances", "AttachInstances", "DetachInstances"],
    ...["CreateAutoScalingGroup", "UpdateAutoScalingGroup", "DeleteAutoScalingGroup", "CreateOrUpdateTags"],
    ...["DeleteTags", "DescribeTags", "SetInstanceProtection", "TerminateInstanceInAutoScalingGroup"],
    ...["DescribeScalingActivities", "DescribeLifecycleHooks", "SuspendProcesses", "ResumeProcesses"],
    ...["SetDesiredCapacity", "EnterStandby", "ExitStandby", "DescribePolicies"],
  ],
  elbv2: ["DescribeTargetHealth", "DescribeTargetGroups", "RegisterTargets", "DeregisterTargets"],
  sqs: Object.keys(sqs).flatMap((name) => /^([A-Z]\w*)Command$/.exec(name)?.[1] ?? []),
};

// --- Samples ---------------------------------------------------------------------------------------------------

/** Text that breaks a careless escape: markup, quotes, separators of forms, line ends, control characters. */
const HARD = `<a href="x">&amp;'</a> é😀 %+=&; \t\r\n\u0001\u007f`;
const DEPTH = 8;

type SchemaRef = Parameters<typeof Schema.of>[0];

/** A value with every member filled and nothing equal to anything else, so that no two members can be mixed up. */
class Samples {
  #count = 0;

  of(schema: Schema, path: string, outer: string[] = []): unknown {
    const n = ++this.#count;
    if (schema.isUnitSchema()) return {};
    if (schema.isStructSchema()) {
      const name = schema.getName() ?? "";
      if (outer.includes(name) || outer.length === DEPTH) return undefined; // shapes may contain themselves
      const value: Record<string, unknown> = {};
      for (const [key, member] of schema.structIterator()) {
        const item = this.of(member, `${path}.${key}`, [...outer, name]);
        if (item !== undefined) value[key] = item;
      }
      return Object.keys(value).length > 0 ? value : undefined;
    }
    if (schema.isListSchema() || schema.isMapSchema()) {
      const items = [1, 2].map((i) => this.of(schema.getValueSchema(), `${path}.${i}`, outer));
      if (items.includes(undefined)) return undefined;
      return schema.isListSchema() ? items : Object.fromEntries(items.map((item, i) => [`${HARD}${i}`, item]));
    }
    if (schema.isNumericSchema()) return n;
    if (schema.isBooleanSchema()) return n % 2 === 0;
    if (schema.isTimestampSchema()) return new Date(1_767_225_600_000 + n * 1001);
    if (schema.isBlobSchema()) return new Uint8Array([0, 10, 13, 255, n % 256, n >> 8]);
    return `${path} ${n} ${HARD}`;
  }
}

/** [input, output] of an operation, and how many scalars each holds (none: the schema was not understood). */
function samplesOf(service: Service, operation: string): { input: object; output: object } {
  const shape: [number, string, string, unknown, SchemaRef, SchemaRef] = Reflect.get(packages[service], `${operation}$`);
  const samples = new Samples();
  return {
    input: Object(samples.of(Schema.of(shape[4]), "in")),
    output: Object(samples.of(Schema.of(shape[5]), "out")),
  };
}

describe.each(Object.keys(operations) as Exclude<Service, "s3">[])("%s", (service) => {
  test.each(operations[service])("%s: every member arrives, both ways", async (operation) => {
    const { input, output } = samplesOf(service, operation);
    answer = () => output;
    const { $metadata, ...received } = await send(service, operation, input);
    expect(calls).toEqual([{ service, operation, input: expect.anything(), signal: expect.anything() }]);
    expect(calls[0]?.input).toStrictEqual(input as Record<string, unknown>);
    expect(received).toStrictEqual(output as Record<string, unknown>);
    expect($metadata).toMatchObject({ httpStatusCode: 200 });
  });

  test.each(operations[service])("%s: what is left out stays out", async (operation) => {
    answer = () => ({});
    const { $metadata: _, ...received } = await send(service, operation, {});
    const token = calls[0]?.input.ClientToken; // the SDK makes one up
    expect(calls[0]?.input).toStrictEqual(token === undefined ? {} : { ClientToken: token });
    expect(received).toStrictEqual({});
  });
});

test("the samples fill nested lists, maps, dates, blobs and numbers", () => {
  expect(samplesOf("ec2", "CreateFleet").input).toMatchObject({
    LaunchTemplateConfigs: [
      { Overrides: [{ WeightedCapacity: expect.any(Number) }, { InstanceRequirements: expect.any(Object) }] },
      expect.any(Object),
    ],
    ValidUntil: expect.any(Date),
  });
  expect(samplesOf("sqs", "SendMessage").input).toMatchObject({
    MessageAttributes: { [`${HARD}0`]: { BinaryValue: expect.any(Uint8Array) } },
  });
});

test("empty lists and empty texts are not nothing", async () => {
  answer = () => ({ Reservations: [{ Instances: [], OwnerId: "" }] });
  expect(await send("ec2", "DescribeInstances", {})).toMatchObject({
    Reservations: [{ Instances: [], OwnerId: "" }],
  });
  answer = () => ({ AutoScalingGroups: [], NextToken: "" });
  const groups = await send("autoscaling", "DescribeAutoScalingGroups", { AutoScalingGroupNames: [] });
  expect(groups).toMatchObject({ AutoScalingGroups: [], NextToken: "" });
  // awsQuery sends an empty list, ec2Query cannot.
  expect(calls[1]?.input).toStrictEqual({ AutoScalingGroupNames: [] });
});

test("a list of twelve keeps its order", async () => {
  const ids = Array.from({ length: 12 }, (_, i) => `i-${11 - i}`);
  await send("ec2", "TerminateInstances", { InstanceIds: ids });
  await send("autoscaling", "AttachInstances", { InstanceIds: ids, AutoScalingGroupName: "web" });
  expect(calls.map((call) => call.input.InstanceIds)).toEqual([ids, ids]);
});

test("any text survives an XML answer", async () => {
  const random = new Random(7);
  const texts = Array.from({ length: 200 }, () =>
    // The parser of the SDK takes text of white space only for no text, so each has a letter.
    Array.from({ length: 12 }, () => String.fromCharCode(Math.floor(random.next() ** 4 * 0xd7ff))).join("x"),
  );
  answer = () => ({ Tags: texts.map((Value) => ({ Value })) });
  const { Tags } = await send("ec2", "DescribeTags", {});
  expect(Tags).toStrictEqual(texts.map((Value) => ({ Value })));
});

test("text without XML's own characters is left alone", () => {
  expect(escapeXml("a<b>&\"'\r\n\u0000")).toBe("a&lt;b&gt;&amp;&quot;&#39;&#xD;&#xA;&#x0;");
  expect(escapeXml("web-1 é 😀 /#%")).toBe("web-1 é 😀 /#%");
  expect(escapeXml("\ud83d")).toBe("&#xD83D;");
});

// --- S3 --------------------------------------------------------------------------------------------------------

/** What the SDK itself sets or rewrites on the way (lengths, checksums, keys, where a bucket is). */
const ownToTheSdk =
  /^(Body|Bucket|Key|ContentLength|ContentMD5|Checksum.*|SSECustomerKey|SSECustomerKeyMD5|CopySourceSSE.*|Expires\w*|SSEKMSEncryptionContext)$/;

/** Texts a header can carry: ASCII without line ends. */
function headerSamples(schema: Schema, seed: number): Record<string, unknown> {
  const value: Record<string, unknown> = {};
  let n = seed;
  for (const [name, member] of schema.isUnitSchema() ? [] : schema.structIterator()) {
    n++;
    if (ownToTheSdk.test(name)) continue;
    if (member.isStructSchema()) continue;
    if (member.isNumericSchema()) value[name] = n;
    else if (member.isBooleanSchema()) value[name] = n % 2 === 0;
    // A date in a header has no milliseconds.
    else if (member.isTimestampSchema()) value[name] = new Date(1_767_225_600_000 + n * 1000);
    else if (member.isMapSchema()) value[name] = { one: `1 ${n} <&>`, "two-2": `2 ${n}` };
    else if (member.isListSchema()) value[name] = [`a${n}`, `b${n}`];
    else value[name] = `${name} ${n} <&>"'`;
  }
  return value;
}

const objectOperations = ["GetObject", "PutObject", "HeadObject", "DeleteObject", "HeadBucket"];

describe("s3", () => {
  test.each(objectOperations)("%s: every header arrives, both ways", async (operation) => {
    const shape: [number, string, string, unknown, SchemaRef, SchemaRef] = Reflect.get(s3, `${operation}$`);
    const label = operation.endsWith("Object") ? { Bucket: "conf-1", Key: "a/b c+d&é/x%20.json" } : { Bucket: "conf-1" };
    const input = { ...headerSamples(Schema.of(shape[4]), 0), ...label };
    const output = headerSamples(Schema.of(shape[5]), 100);
    delete output.ContentRange; // would make it a 206: tested below
    answer = () => output;
    const { $metadata, Body: _, ...received } = await send("s3", operation, input);
    expect(calls).toMatchObject([{ service: "s3", operation }]);
    expect(calls[0]?.input).toMatchObject(input);
    expect(received).toMatchObject(output);
    expect($metadata).toMatchObject({ httpStatusCode: operation === "DeleteObject" ? 204 : 200 });
  });

  test("bodies pass byte by byte, and their length with them", async () => {
    const bytes = Uint8Array.from({ length: 70_000 }, (_, i) => (i * 7) % 256);
    await send("s3", "PutObject", { Bucket: "b", Key: "k", Body: bytes });
    expect(calls[0]?.input.Body).toStrictEqual(bytes);
    answer = () => ({ Body: bytes, ContentType: "application/octet-stream" });
    const got = await clients.s3.send(new s3.GetObjectCommand({ Bucket: "b", Key: "k" }));
    expect(await got.Body?.transformToByteArray()).toEqual(bytes);
    expect(got.ContentLength).toBe(70_000);
  });

  test("a streamed upload comes out of its chunks", async () => {
    const text = "0123456789\r\n".repeat(20_000);
    const stream = Readable.from([Buffer.from(text)]);
    await clients.s3.send(new s3.PutObjectCommand({ Bucket: "b", Key: "k", Body: stream, ContentLength: text.length }));
    expect(new TextDecoder().decode(calls[0]?.input.Body as Uint8Array)).toBe(text);
  });

  test("a body may be text, or the SDK's stream with its helpers", async () => {
    for (const Body of ["hé", { transformToString: async () => "hé" }]) {
      answer = () => ({ Body });
      const got = await clients.s3.send(new s3.GetObjectCommand({ Bucket: "b", Key: "k" }));
      expect(await got.Body?.transformToString()).toBe("hé");
    }
  });

  test("a part of an object is a 206", async () => {
    answer = () => ({ Body: "bc", ContentRange: "bytes 1-2/4" });
    const got = await send("s3", "GetObject", { Bucket: "b", Key: "k", Range: "bytes=1-2" });
    expect(got).toMatchObject({ $metadata: { httpStatusCode: 206 }, ContentRange: "bytes 1-2/4" });
    expect(calls[0]?.input.Range).toBe("bytes=1-2");
  });

  test("a list of objects is XML, its Contents flattened", async () => {
    const Contents = [1, 2].map((Size) => ({ Key: `k<${Size}>`, Size, LastModified: new Date(Size) }));
    answer = () => ({ Name: "b", KeyCount: 2, IsTruncated: false, Contents });
    expect(await send("s3", "ListObjectsV2", { Bucket: "b", Prefix: "k" })).toMatchObject({
      KeyCount: 2,
      Contents,
    });
    expect(calls).toMatchObject([{ operation: "ListObjectsV2", input: { Bucket: "b", Prefix: "k" } }]);
  });

  test.each([
    ["GET", "/b/k", "GetObject"],
    ["PUT", "/b/k", "PutObject"],
    ["HEAD", "/b/k", "HeadObject"],
    ["DELETE", "/b/k", "DeleteObject"],
    ["GET", "/b/k?uploadId=1", "ListParts"],
    ["GET", "/b/k?acl", "GetObjectAcl"],
    ["HEAD", "/b", "HeadBucket"],
    ["PUT", "/b/", "CreateBucket"],
    ["DELETE", "/b", "DeleteBucket"],
    ["GET", "/b?list-type=2", "ListObjectsV2"],
    ["GET", "/b", "ListObjects"],
    ["GET", "/", "ListBuckets"],
  ])("without a signature, %s %s is %s", async (method, path, operation) => {
    await fetch(server.url + path, { method });
    expect(calls).toMatchObject([{ service: "s3", operation }]);
  });
});

// --- Errors ----------------------------------------------------------------------------------------------------

/** Every error of the service's model, with the status that it declares. */
function modelledErrors(service: Service): [string, number][] {
  return Object.values<unknown>({ ...packages[service] }).flatMap((shape) => {
    if (!Array.isArray(shape) || shape[0] !== -3 || String(shape[2]).endsWith("ServiceException")) return [];
    const status: unknown = Reflect.get(Object(shape[3]), "httpError");
    return [[String(shape[2]), typeof status === "number" ? status : 400] as [string, number]];
  });
}

const callOf: Record<Service, [string, object]> = {
  ec2: ["DescribeInstances", {}],
  autoscaling: ["AttachInstances", { AutoScalingGroupName: "web" }],
  elbv2: ["DescribeTargetGroups", {}],
  sqs: ["ReceiveMessage", { QueueUrl: `${server.url}/1/q` }],
  s3: ["GetObject", { Bucket: "b", Key: "k" }],
};
const unmodelled: Record<Service, [string, number][]> = {
  ec2: [
    ["InvalidInstanceID.NotFound", 400],
    ["InsufficientInstanceCapacity", 500],
    ["RequestLimitExceeded", 503],
  ],
  autoscaling: [
    ["ValidationError", 400],
    ["Throttling", 400],
  ],
  elbv2: [["ValidationError", 400]],
  sqs: [["InvalidParameterValue", 400]],
  s3: [
    ["AccessDenied", 403],
    ["SlowDown", 503],
  ],
};

describe("errors", () => {
  const services = Object.keys(callOf) as Service[];
  test.each(services)("%s: name, message, status and fault arrive", async (service) => {
    const [operation, input] = callOf[service];
    const message = `no <such> "thing" & 'more': é`;
    for (const [name, status] of [...modelledErrors(service), ...unmodelled[service]]) {
      answer = () => {
        throw new AwsError(name, message, status);
      };
      const error = await send(service, operation, input).catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(Error);
      expect(error).toMatchObject({ name, message, $metadata: { httpStatusCode: status } });
      if (!modelledErrors(service).some(([modelled]) => modelled === name))
        expect(error).toMatchObject({ $fault: status < 500 ? "client" : "server" });
    }
  });

  test("an error known by its wire code arrives under the exception's name", async () => {
    const cases: [Service, string, string][] = [
      ["autoscaling", "ResourceContention", "ResourceContentionFault"],
      ["elbv2", "TargetGroupNotFound", "TargetGroupNotFoundException"],
      ["sqs", "AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"],
    ];
    for (const [service, code, name] of cases) {
      answer = () => {
        throw new AwsError(code, "why");
      };
      const [operation, input] = callOf[service];
      const error = await send(service, operation, input).catch((thrown: unknown) => thrown);
      expect(error).toMatchObject({ name, message: "why" });
    }
  });

  test("SQS names its query codes beside the new ones", () => {
    const { headers, body } = encode("sqs", "", new AwsError("QueueDoesNotExist", "gone"));
    expect(headers["x-amzn-query-error"]).toBe("AWS.SimpleQueueService.NonExistentQueue;Sender");
    expect(JSON.parse(String(body))).toEqual({
      __type: "com.amazonaws.sqs#QueueDoesNotExist",
      message: "gone",
    });
  });

  test("a fault of the service's own is the receiver's", () => {
    const encoded = (name: string, status: number) => String(encode("autoscaling", "", new AwsError(name, "", status)).body);
    expect(encoded("ResourceContentionFault", 500)).toContain("<Type>Receiver</Type><Code>ResourceContention</Code>");
    expect(encoded("ValidationError", 400)).toContain("<Type>Sender</Type><Code>ValidationError</Code>");
  });

  test("a HEAD that fails has a status and no body", async () => {
    answer = () => {
      throw new AwsError("NotFound", "Not Found", 404);
    };
    for (const [operation, input] of [
      ["HeadBucket", { Bucket: "b" }],
      ["HeadObject", { Bucket: "b", Key: "k" }],
    ] as const) {
      const error = await send("s3", operation, input).catch((thrown: unknown) => thrown);
      expect(error).toMatchObject({ name: "NotFound", $metadata: { httpStatusCode: 404 } });
    }
    const bare = await fetch(`${server.url}/b`, { method: "HEAD" });
    expect(await bare.text()).toBe("");
  });

  test("what has not changed is a 304 without a body", async () => {
    answer = () => {
      throw new AwsError("NotModified", "Not Modified", 304);
    };
    const input = { Bucket: "b", Key: "k", IfNoneMatch: '"1"' };
    const error = await send("s3", "GetObject", input).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ $metadata: { httpStatusCode: 304 } });
    const bare = await fetch(`${server.url}/b/k`, { headers: { "if-none-match": '"1"' } });
    expect(bare.status).toBe(304);
    expect(await bare.text()).toBe("");
  });

  test("an output that AWS could not have given is the simulator's fault, not an answer", async () => {
    const wrong: object[] = [
      { Reservation: [] },
      { Reservations: {} },
      { Reservations: [{ OwnerId: 1 }] },
      { Reservations: [{ Instances: [{ LaunchTime: "2026-01-01" }] }] },
    ];
    const complain = console.error;
    console.error = () => undefined;
    try {
      for (const output of wrong) {
        answer = () => output;
        const error = await send("ec2", "DescribeInstances", {}).catch((thrown: unknown) => thrown);
        expect(error).toMatchObject({ name: "InternalFailure", $metadata: { httpStatusCode: 500 } });
      }
    } finally {
      console.error = complain;
    }
  });
});

// --- Requests that no SDK would send ---------------------------------------------------------------------------

const EC2 = "Version=2016-11-15";
const AUTO_SCALING = "Version=2011-01-01";

describe("malformed requests", () => {
  test.each([
    [EC2, 400, "<Code>MissingAction</Code>"],
    [`Action=Nonsense&${EC2}`, 400, "<Code>InvalidAction</Code>"],
    [`Action=DescribeInstances&${EC2}&InstanceIds.1=i-1`, 400, "<Code>UnknownParameter</Code>"],
    [`Action=DescribeInstances&${EC2}&Filter.1.Valu.1=x`, 400, "Filter.1.Valu "],
    [`Action=DescribeInstances&${EC2}&MaxResults=ten`, 400, "<Code>InvalidParameterValue</Code>"],
    [`Action=DescribeInstances&${EC2}&DryRun=maybe`, 400, "DryRun"],
    [`Action=CreateFleet&${EC2}&ValidUntil=tomorrow`, 400, "ValidUntil"],
    [`Action=DescribeInstances&${EC2}&InstanceId=i-1`, 400, "InstanceId"],
    [`Action=Nonsense&${AUTO_SCALING}`, 400, "<Code>InvalidAction</Code>"],
    [`Action=SetDesiredCapacity&${AUTO_SCALING}&DesiredCapacity=1.x`, 400, "<Code>MalformedInput</Code>"],
    [`Action=AttachInstances&${AUTO_SCALING}&InstanceIds.1=i-1`, 400, "<Type>Sender</Type>"],
  ])("%s", async (body, status, code) => {
    const headers = { "content-type": "application/x-www-form-urlencoded", ...signedFor(body) };
    const response = await fetch(server.url, { method: "POST", headers, body });
    expect(await response.text()).toContain(code);
    expect(response.status).toBe(status);
    expect(calls).toEqual([]);
  });

  /** Only the request without an action needs a signature to be told from S3's. */
  function signedFor(body: string): Record<string, string> {
    if (body !== EC2) return {};
    return {
      authorization: "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-2/ec2/aws4_request, Signature=0",
    };
  }

  test.each([
    ["AmazonSQS.ReceiveMessage", "{", "SerializationException", 400],
    ["AmazonSQS.ReceiveMessage", '{"QueueUrl":1}', "SerializationException", 400],
    ["AmazonSQS.ReceiveMessage", '{"AttributeNames":"All"}', "SerializationException", 400],
    ["AmazonSQS.Nonsense", "{}", "UnknownOperationException", 404],
  ])("%s %s", async (target, body, type, status) => {
    const headers = { "x-amz-target": target, "content-type": "application/x-amz-json-1.0" };
    const response = await fetch(server.url, { method: "POST", headers, body });
    expect(await response.json()).toMatchObject({ __type: `com.amazonaws.sqs#${type}` });
    expect(response.status).toBe(status);
  });

  test("a method that nothing answers to", async () => {
    const response = await fetch(`${server.url}/b/k`, { method: "PATCH" });
    expect(response.status).toBe(405);
    expect(await response.text()).toContain("<Code>MethodNotAllowed</Code>");
  });

  test("a service that the simulator lacks is named", async () => {
    const authorization = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-2/sts/aws4_request, Signature=0";
    const response = await fetch(server.url, {
      method: "POST",
      headers: { authorization },
      body: "Action=X",
    });
    expect(await response.text()).toContain("&quot;sts&quot;");
  });
});

test("DescribeTags is EC2's or Auto Scaling's by its signature, or its version", async () => {
  await send("ec2", "DescribeTags", {});
  await send("autoscaling", "DescribeTags", {});
  for (const version of [EC2, AUTO_SCALING]) await fetch(`${server.url}/?Action=DescribeTags&${version}`, { method: "GET" });
  expect(calls.map((call) => call.service)).toEqual(["ec2", "autoscaling", "ec2", "autoscaling"]);
});

test("an operation without output answers as its protocol has it", () => {
  expect(encode("sqs", "DeleteMessage", {}).body).toBe("");
  expect(encode("ec2", "CreateTags", {}).body).toContain("<return>true</return></CreateTagsResponse>");
  expect(encode("autoscaling", "UpdateAutoScalingGroup", {}).body).not.toContain("Result");
});

// --- The server ------------------------------------------------------------------------------------------------

test("a long poll ends in the world when its client hangs up", async () => {
  const ended = Promise.withResolvers<string>();
  answer = ({ signal }) =>
    new Promise((_, reject) => {
      signal?.addEventListener("abort", () => {
        ended.resolve("hung up");
        reject(signal.reason);
      });
    });
  const controller = new AbortController();
  const poll = clients.sqs
    .send(new sqs.ReceiveMessageCommand({ QueueUrl: "http://q/1/q", WaitTimeSeconds: 20 }), {
      abortSignal: controller.signal,
    })
    .catch((thrown: unknown) => thrown);
  while (calls.length === 0) await Bun.sleep(5);
  controller.abort();
  expect(await poll).toMatchObject({ name: "AbortError" });
  expect(await Promise.race([ended.promise, Bun.sleep(3000)])).toBe("hung up");
});

test("the log names every request, also those that failed", async () => {
  const lines: unknown[] = [];
  const logged = serve(
    {
      async call(_service, operation) {
        if (operation === "DescribeVolumes") throw new AwsError("InvalidVolume.NotFound", "no");
        return {};
      },
    },
    { log: ({ call, status, error }) => lines.push([call?.operation, status, error]) },
  );
  const client = new ec2.EC2Client({ ...settings, endpoint: logged.url });
  await client.send(new ec2.DescribeSubnetsCommand({}));
  await client.send(new ec2.DescribeVolumesCommand({})).catch(() => "expected");
  await fetch(`${logged.url}/?Action=Nonsense`);
  client.destroy();
  await logged.stop();
  expect(lines).toEqual([
    ["DescribeSubnets", 200, undefined],
    ["DescribeVolumes", 400, "InvalidVolume.NotFound"],
    [undefined, 400, "InvalidAction"],
  ]);
});

// The simulator's own rules: what AWS refuses, it must refuse. Each test names one.
import { describe, expect, test } from "bun:test";
import { DescribeInstancesCommand, type Instance as Ec2Instance, RunInstancesCommand } from "@aws-sdk/client-ec2";
import { client } from "../aws/clients.ts";
import { RealClock, VirtualClock } from "../aws/clock.ts";
import { AwsError, type GroupSpec, type Service, World, type WorldOptions } from "../aws/world.ts";
import { fails, run } from "./calls.ts";

function setUp(options: Partial<WorldOptions> = {}) {
  const clock = new VirtualClock();
  const world = new World({ clock, checkOutputs: true, ...options });
  /** One call to its end: the time that it takes passes. */
  const call = <T = Record<string, unknown>>(service: Service, operation: string, input: object): Promise<T> =>
    run(clock, world.call(service, operation, input)) as Promise<T>;
  return { clock, world, call };
}

const GROUP: GroupSpec = { name: "web", min: 3, max: 4, desired: 3 };

function withGroup(spec: Partial<GroupSpec> = {}, options: Partial<WorldOptions> = {}) {
  const set = setUp(options);
  const group = set.world.createGroup({ ...GROUP, ...spec });
  const ids = group.instanceIds as [string, string, string];
  return { ...set, group, ids };
}

interface Described {
  Reservations: { Instances: Ec2Instance[] }[];
  NextToken?: string;
}
const instancesOf = (answer: Described) => answer.Reservations.flatMap((reservation) => reservation.Instances);

interface FleetAnswer {
  FleetId: string;
  Errors: { ErrorCode: string; Lifecycle: string; LaunchTemplateAndOverrides?: { Overrides: { SubnetId?: string } } }[];
  Instances: { InstanceIds: string[]; InstanceType: string; Lifecycle: string }[];
}

interface GroupAnswer {
  AutoScalingGroups: {
    MinSize: number;
    MaxSize: number;
    DesiredCapacity: number;
    Status?: string;
    Instances: {
      InstanceId: string;
      LifecycleState: string;
      HealthStatus: string;
      ProtectedFromScaleIn: boolean;
      AvailabilityZone: string;
      LaunchTemplate?: object;
      WeightedCapacity?: string;
    }[];
  }[];
}

interface ActivitiesAnswer {
  Activities: { Description: string; Cause: string; StatusCode: string; StatusMessage?: string }[];
}

describe("clock", () => {
  test("timers fire in order of time, then of creation, after every promise that could run has run", async () => {
    const clock = new VirtualClock(0);
    const seen: string[] = [];
    const note = (text: string) => () => void seen.push(`${text}@${clock.now()}`);
    void clock.sleep(20).then(note("c"));
    void clock.sleep(10).then(note("a"));
    void clock.sleep(10).then(note("b"));
    void (async () => {
      for (let i = 0; i < 50; i++) await Promise.resolve();
      note("promises")();
    })();
    await clock.advance(15);
    expect(seen).toEqual(["promises@0", "a@10", "b@10"]);
    expect(clock.now()).toBe(15);
    await clock.advance(5);
    expect(seen.at(-1)).toBe("c@20");
  });

  test("an aborted sleep rejects with the signal's reason, and moves no time", async () => {
    const clock = new VirtualClock(0);
    const controller = new AbortController();
    const sleep = clock.sleep(1000, controller.signal);
    controller.abort(new Error("enough"));
    await expect(sleep).rejects.toThrow("enough");
    await expect(clock.runUntil(() => false, 10_000)).rejects.toThrow("nothing is left");
    expect(clock.now()).toBe(0);
    await expect(clock.sleep(1, controller.signal)).rejects.toThrow("enough");
  });

  test("runUntil throws when its limit has passed", async () => {
    const clock = new VirtualClock(0);
    void clock.sleep(60_000);
    await expect(clock.runUntil(() => false, 1000)).rejects.toThrow("not done after 1000 ms");
  });

  test("a hundred thousand timers take about a second", async () => {
    const clock = new VirtualClock(0);
    let fired = 0;
    const loop = async () => {
      for (let i = 0; i < 1000; i++) {
        await clock.sleep(1 + (i % 7));
        fired++;
      }
    };
    const loops = Array.from({ length: 100 }, loop);
    const start = performance.now();
    await clock.runUntil(() => fired === 100_000, 1e9);
    expect(performance.now() - start).toBeLessThan(3000);
    await Promise.all(loops);
  });

  test("real time runs at its speed and can be aborted", async () => {
    const clock = new RealClock(100);
    const before = clock.now();
    await clock.sleep(1000);
    expect(clock.now() - before).toBeGreaterThanOrEqual(900);
    await expect(clock.sleep(60_000, AbortSignal.timeout(5))).rejects.toThrow();
  });
});

describe("calls", () => {
  test("a call takes its latency, and its effect comes in the middle", async () => {
    const { world, clock } = setUp({ latencyMs: [100, 100] });
    const { interruption } = world.createQueues();
    const start = clock.now();
    const sent = world.call("sqs", "SendMessage", { QueueUrl: interruption, MessageBody: "x" });
    await clock.advance(49);
    expect(world.queueDepth(interruption).visible).toBe(0);
    await clock.advance(1);
    expect(world.queueDepth(interruption).visible).toBe(1);
    await run(clock, sent);
    expect(clock.now() - start).toBe(100);
  });

  test("unknown, missing and malformed parameters are refused", async () => {
    const { call } = withGroup();
    await fails(call("ec2", "DescribeInstances", { InstanceID: ["i-1"] }), "UnknownParameter");
    await fails(call("ec2", "DescribeInstances", { InstanceIds: "i-1" }), "InvalidParameterValue");
    await fails(call("ec2", "CreateFleet", { Type: "instant" }), "MissingParameter");
    await fails(
      call("autoscaling", "AttachInstances", {}),
      "ValidationError",
      "1 validation error detected: Value null at 'autoScalingGroupName' failed to satisfy constraint: Member must not be null",
    );
    await fails(
      call("autoscaling", "DetachInstances", { AutoScalingGroupName: "web", InstanceIds: ["i-1"] }),
      "ValidationError",
      /shouldDecrementDesiredCapacity/,
    );
    await fails(call("sqs", "SendMessage", { MessageBody: "x" }), "MissingParameter");
    await fails(call("ec2", "NoSuchThing", {}), "InvalidAction");
  });

  test("members that are undefined count as absent", async () => {
    const { call } = withGroup();
    const answer = await call<Described>("ec2", "DescribeInstances", { InstanceIds: undefined, Filters: undefined });
    expect(instancesOf(answer)).toHaveLength(3);
  });

  test("a fault before the effect leaves nothing, one after it leaves the effect", async () => {
    const { world, call } = setUp();
    const { interruption } = world.createQueues();
    const fault = new AwsError("InternalError", "oops", 500);
    world.intercept = ({ operation }) => (operation === "SendMessage" ? { before: fault } : undefined);
    await fails(call("sqs", "SendMessage", { QueueUrl: interruption, MessageBody: "x" }), "InternalError");
    expect(world.queueDepth(interruption).visible).toBe(0);
    world.intercept = () => ({ after: fault });
    const error = await fails(call("sqs", "SendMessage", { QueueUrl: interruption, MessageBody: "x" }), "InternalError");
    expect(world.queueDepth(interruption).visible).toBe(1);
    expect(error.$service).toBe("sqs");
    expect(error.$fault).toBe("server");
  });

  test("a call that hangs ends only by an abort, with an AbortError", async () => {
    const { world, clock } = setUp();
    world.intercept = () => ({ hang: true });
    const controller = new AbortController();
    const hung = world.call("ec2", "DescribeInstances", {}, { signal: controller.signal });
    world.after(60_000, () => controller.abort());
    const error: unknown = await run(clock, hung).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ name: "AbortError" });
    await expect(world.call("ec2", "DescribeInstances", {}, { signal: controller.signal })).rejects.toThrow("aborted");
  });

  test("what the role may not do is UnauthorizedOperation in EC2 and AccessDenied elsewhere", async () => {
    const { world, call } = withGroup();
    world.denied.add("ec2:CreateTags").add("autoscaling:AttachInstances");
    await fails(call("ec2", "CreateTags", { Resources: ["i-1"], Tags: [{ Key: "a" }], DryRun: true }), "UnauthorizedOperation");
    await fails(call("autoscaling", "AttachInstances", { AutoScalingGroupName: "web" }), "AccessDenied");
  });

  test("with buckets on, a burst is throttled and tokens come back", async () => {
    const { world, clock, call } = withGroup({}, { latencyMs: [0, 0] });
    world.buckets = true;
    for (let i = 0; i < 50; i++) await call("ec2", "DescribeInstances", {});
    const error = await fails(call("ec2", "DescribeInstances", {}), "RequestLimitExceeded");
    expect(error.$metadata.httpStatusCode).toBe(503);
    // Narrowed reads have a bucket of their own.
    await call("ec2", "DescribeInstances", { Filters: [{ Name: "tag-key", Values: ["*"] }] });
    await clock.advance(100);
    await call("ec2", "DescribeInstances", {});
    await fails(call("ec2", "DescribeInstances", {}), "RequestLimitExceeded");
    for (let i = 0; i < 100; i++) await call("autoscaling", "DescribeAutoScalingGroups", {});
    await fails(call("autoscaling", "DescribeTags", {}), "Throttling", "Rate exceeded");
  });

  test("the SDK's commands go in, the SDK's shapes come out", async () => {
    const { world, clock, ids } = withGroup();
    const ec2 = client(world, "ec2");
    const answer = await run(clock, ec2.send(new DescribeInstancesCommand({ InstanceIds: [ids[0]] })));
    expect(answer.Reservations?.[0]?.Instances?.[0]).toMatchObject({
      InstanceId: ids[0],
      InstanceLifecycle: "spot",
      State: { Code: 16, Name: "running" },
      Placement: { AvailabilityZone: "us-east-1a" },
      PrivateIpAddress: "127.0.0.10",
      PrivateDnsName: "ip-127-0-0-10.ec2.internal",
    });
    const controller = new AbortController();
    controller.abort();
    const run1 = ec2.send(new RunInstancesCommand({ MinCount: 1, MaxCount: 1 }), { abortSignal: controller.signal });
    await expect(run1).rejects.toThrow("aborted");
    expect(world.calls["ec2:DescribeInstances"]).toBe(1);
  });

  test("one seed, one run, byte for byte; another seed, another run", async () => {
    const story = async (seed: number) => {
      const { world, clock } = withGroup({ targetGroups: ["web"] }, { seed });
      world.createQueues();
      world.interrupt(world.createInstance({}).id);
      world.interrupt([...world.ec2.instances.keys()][0] ?? "", { duplicates: 2 });
      await clock.advance(600_000);
      return JSON.stringify([world.snapshot(), world.audit]);
    };
    const first = await story(7);
    expect(await story(7)).toBe(first);
    expect(await story(8)).not.toBe(first);
  });
});

describe("s3", () => {
  test("objects come back with ETag, and what is not there is NoSuchKey or NoSuchBucket", async () => {
    const { world, call } = setUp();
    world.s3.put("config", "a.json", "{}");
    const answer = await call<{ ETag: string; Body: { transformToString(): Promise<string> } }>("s3", "GetObject", {
      Bucket: "config",
      Key: "a.json",
    });
    expect(answer.ETag).toBe('"99914b932bd37a50b983c5e7c90ae93b"');
    expect(await answer.Body.transformToString()).toBe("{}");
    await fails(call("s3", "GetObject", { Bucket: "config", Key: "b" }), "NoSuchKey");
    const error = await fails(call("s3", "GetObject", { Bucket: "other", Key: "b" }), "NoSuchBucket");
    expect(error.$metadata.httpStatusCode).toBe(404);
    await call("s3", "HeadBucket", { Bucket: "config" });
    await fails(call("s3", "HeadBucket", { Bucket: "other" }), "NotFound");
    await call("s3", "PutObject", { Bucket: "config", Key: "b", Body: "x" });
    await call("s3", "GetObject", { Bucket: "config", Key: "b" });
  });

  test("a bucket can be denied", async () => {
    const { world, call } = setUp();
    world.s3.put("config", "a.json", "{}");
    world.s3.createBucket("locked").denied = true;
    const error = await fails(call("s3", "GetObject", { Bucket: "locked", Key: "a" }), "AccessDenied");
    expect(error.$metadata.httpStatusCode).toBe(403);
  });
});

interface Received {
  Messages?: { MessageId: string; Body: string; ReceiptHandle: string; Attributes?: Record<string, string> }[];
}

describe("sqs", () => {
  function withQueue(options: Partial<WorldOptions> = {}) {
    const set = setUp({ latencyMs: [0, 0], ...options });
    const queues = set.world.createQueues();
    const url = queues.interruption;
    const receive = async (input: object = {}) =>
      (await set.call<Received>("sqs", "ReceiveMessage", { QueueUrl: url, ...input })).Messages ?? [];
    const send = (body: string, input: object = {}) =>
      set.call("sqs", "SendMessage", { QueueUrl: url, MessageBody: body, ...input });
    return { ...set, queues, url, receive, send };
  }

  test("a received message is invisible for its timeout, then comes again with another receipt handle", async () => {
    const { clock, receive, send } = withQueue();
    await send("a");
    const [first] = await receive({ VisibilityTimeout: 10 });
    expect(await receive()).toEqual([]);
    await clock.advance(9_999);
    expect(await receive()).toEqual([]);
    await clock.advance(1);
    const [second] = await receive();
    expect(second?.MessageId).toBe(first?.MessageId ?? "");
    expect(second?.ReceiptHandle).not.toBe(first?.ReceiptHandle ?? "");
  });

  test("deleting with an old receipt handle succeeds and deletes nothing", async () => {
    const { world, clock, call, url, receive, send } = withQueue();
    await send("a");
    const [first] = await receive({ VisibilityTimeout: 1 });
    await clock.advance(1000);
    const [second] = await receive({ VisibilityTimeout: 1 });
    await call("sqs", "DeleteMessage", { QueueUrl: url, ReceiptHandle: first?.ReceiptHandle });
    expect(world.queueDepth(url).inFlight).toBe(1);
    await call("sqs", "DeleteMessage", { QueueUrl: url, ReceiptHandle: second?.ReceiptHandle });
    expect(world.queueDepth(url)).toEqual({ visible: 0, delayed: 0, inFlight: 0 });
    await call("sqs", "DeleteMessage", { QueueUrl: url, ReceiptHandle: second?.ReceiptHandle });
    await fails(call("sqs", "DeleteMessage", { QueueUrl: url, ReceiptHandle: "rubbish" }), "ReceiptHandleIsInvalid");
  });

  test("visibility can be changed in flight only; in a batch the entry fails, not the call", async () => {
    const { clock, call, url, receive, send } = withQueue();
    await send("a");
    await send("b");
    const [one, two] = await receive({ MaxNumberOfMessages: 10, VisibilityTimeout: 5 });
    await clock.advance(4_000);
    const extend = (handle: string | undefined, VisibilityTimeout: number) =>
      call("sqs", "ChangeMessageVisibility", { QueueUrl: url, ReceiptHandle: handle, VisibilityTimeout });
    await extend(one?.ReceiptHandle, 60);
    await clock.advance(2_000);
    const answer = await call<{ Successful: object[]; Failed: { Id: string; Code: string; SenderFault: boolean }[] }>(
      "sqs",
      "ChangeMessageVisibilityBatch",
      {
        QueueUrl: url,
        Entries: [one, two].map((message, i) => ({
          Id: String(i),
          ReceiptHandle: message?.ReceiptHandle,
          VisibilityTimeout: 0,
        })),
      },
    );
    expect(answer.Successful).toEqual([{ Id: "0" }]);
    expect(answer.Failed).toMatchObject([{ Id: "1", Code: "AWS.SimpleQueueService.MessageNotInflight", SenderFault: true }]);
    expect(await receive({ MaxNumberOfMessages: 10 })).toHaveLength(2);
    await call("sqs", "DeleteMessage", { QueueUrl: url, ReceiptHandle: one?.ReceiptHandle });
    await fails(extend(one?.ReceiptHandle, 10), "InvalidParameterValue", /not available for visibility timeout change/);
    await fails(extend(one?.ReceiptHandle, 43_201), "InvalidParameterValue");
  });

  test("delays are at most 900 s, and a queue may have one of its own", async () => {
    const { clock, world, call, url, receive, send } = withQueue();
    await fails(send("a", { DelaySeconds: 901 }), "InvalidParameterValue", /DelaySeconds must be >= 0 and <= 900/);
    await send("a", { DelaySeconds: 900 });
    expect(world.queueDepth(url)).toEqual({ visible: 0, delayed: 1, inFlight: 0 });
    await clock.advance(899_999);
    expect(await receive()).toEqual([]);
    await clock.advance(1);
    expect(await receive()).toHaveLength(1);
    await call("sqs", "SetQueueAttributes", { QueueUrl: url, Attributes: { DelaySeconds: "7" } });
    await send("b");
    expect(world.queueDepth(url).delayed).toBe(1);
    await fails(
      call("sqs", "SetQueueAttributes", { QueueUrl: url, Attributes: { DelaySeconds: "901" } }),
      "InvalidAttributeValue",
    );
  });

  test("batches have one to ten entries with distinct, well-formed IDs and 256 KiB in all", async () => {
    const { call, url } = withQueue();
    const batch = (Entries: object[]) => call("sqs", "SendMessageBatch", { QueueUrl: url, Entries });
    const entries = (n: number) => Array.from({ length: n }, (_, i) => ({ Id: `m${i}`, MessageBody: "x" }));
    expect((await fails(batch([]), "EmptyBatchRequest")).Code).toBe("AWS.SimpleQueueService.EmptyBatchRequest");
    expect((await fails(batch(entries(11)), "TooManyEntriesInBatchRequest")).Code).toBe(
      "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    );
    await fails(batch([...entries(1), ...entries(1)]), "BatchEntryIdsNotDistinct");
    await fails(batch([{ Id: "a b", MessageBody: "x" }]), "InvalidBatchEntryId");
    const big = "x".repeat(131_073);
    await fails(
      batch([
        { Id: "a", MessageBody: big },
        { Id: "b", MessageBody: big },
      ]),
      "BatchRequestTooLong",
    );
    await batch(entries(10));
    const mixed = await call<{ Successful: object[]; Failed: { Id: string; Code: string }[] }>("sqs", "SendMessageBatch", {
      QueueUrl: url,
      Entries: [...entries(1), { Id: "late", MessageBody: "x", DelaySeconds: 901 }],
    });
    expect(mixed.Successful).toHaveLength(1);
    expect(mixed.Failed).toMatchObject([{ Id: "late", Code: "InvalidParameterValue" }]);
  });

  test("a message has at most 256 KiB, at least one character, and no forbidden ones", async () => {
    const { send } = withQueue();
    await send("x".repeat(262_144));
    await fails(send("x".repeat(262_145)), "InvalidParameterValue", /shorter than 262144 bytes/);
    await fails(send("é".repeat(131_073)), "InvalidParameterValue");
    await fails(send(""), "MissingParameter");
    await fails(send("\u0000"), "InvalidMessageContents");
  });

  test("a long poll returns the moment a message is there, or empty after its time", async () => {
    const { world, clock, url, receive } = withQueue();
    const start = clock.now();
    world.after(3_000, () => world.sendRaw(url, "a"));
    expect(await receive({ WaitTimeSeconds: 20 })).toHaveLength(1);
    expect(clock.now() - start).toBe(3_000);
    expect(await receive({ WaitTimeSeconds: 20 })).toEqual([]);
    expect(clock.now() - start).toBe(23_000);
    // The message in flight becomes visible at 33 s.
    expect(await receive({ WaitTimeSeconds: 20 })).toHaveLength(1);
    expect(clock.now() - start).toBe(33_000);
  });

  test("one message wakes many polls and goes to one of them", async () => {
    const { world, clock, url } = withQueue();
    const polls = [1, 2, 3].map(() => world.call("sqs", "ReceiveMessage", { QueueUrl: url, WaitTimeSeconds: 20 }));
    world.after(1_000, () => world.sendRaw(url, "a"));
    const answers = (await run(clock, Promise.all(polls))) as Received[];
    expect(answers.filter((answer) => answer.Messages)).toHaveLength(1);
  });

  test("an abort ends a long poll with an AbortError, and takes no message", async () => {
    const { world, clock, url } = withQueue();
    const controller = new AbortController();
    const poll = world.call("sqs", "ReceiveMessage", { QueueUrl: url, WaitTimeSeconds: 20 }, { signal: controller.signal });
    world.after(1_000, () => controller.abort());
    const error: unknown = await run(clock, poll).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ name: "AbortError" });
    world.sendRaw(url, "a");
    expect(world.queueDepth(url).visible).toBe(1);
  });

  test("receives ask for one to ten messages and wait at most 20 s", async () => {
    const { receive } = withQueue();
    await fails(receive({ MaxNumberOfMessages: 11 }), "InvalidParameterValue", /Must be between 1 and 10/);
    await fails(receive({ MaxNumberOfMessages: 0 }), "InvalidParameterValue");
    await fails(receive({ WaitTimeSeconds: 21 }), "InvalidParameterValue", /<= 20/);
    await fails(receive({ AttributeNames: ["Nonsense"] }), "InvalidAttributeName");
  });

  test("system attributes come only if asked for, and the first receipt is remembered", async () => {
    const { clock, receive, send } = withQueue();
    const sentMs = clock.now();
    await send("a");
    const [plain] = await receive({ VisibilityTimeout: 0 });
    expect(plain?.Attributes).toBeUndefined();
    await clock.advance(5_000);
    const [full] = await receive({ MessageSystemAttributeNames: ["All"], VisibilityTimeout: 0 });
    expect(full?.Attributes).toMatchObject({
      ApproximateReceiveCount: "2",
      ApproximateFirstReceiveTimestamp: String(sentMs),
      SentTimestamp: String(sentMs),
    });
    const [some] = await receive({ AttributeNames: ["SentTimestamp"] });
    expect(Object.keys(some?.Attributes ?? {})).toEqual(["SentTimestamp"]);
  });

  test("the receive that would exceed maxReceiveCount moves the message to the dead-letter queue", async () => {
    const { world, queues, receive, send, url } = withQueue();
    await send("poison");
    for (let i = 0; i < 10; i++) expect(await receive({ VisibilityTimeout: 0 })).toHaveLength(1);
    expect(world.queueDepth(url).visible).toBe(1);
    expect(await receive({ VisibilityTimeout: 0 })).toEqual([]);
    expect(world.queueDepth(url).visible).toBe(0);
    expect(world.sqs.bodies(queues.deadLetter)).toEqual(["poison"]);
  });

  test("no more than the limit of messages can be in flight", async () => {
    const { world, receive, send } = withQueue();
    world.sqs.maxInFlight = 2;
    for (const body of ["a", "b", "c"]) await send(body);
    await receive({ MaxNumberOfMessages: 2 });
    await fails(receive(), "OverLimit");
  });

  test("unreliability is switchable: duplicates, reordering, partial receives", async () => {
    const { world, receive, send } = withQueue();
    world.sqs.unreliability.duplicates = 1;
    await send("a");
    expect(await receive()).toHaveLength(1);
    expect(await receive()).toHaveLength(1);
    Object.assign(world.sqs.unreliability, { duplicates: 0, partialReceives: 1, reorder: 1 });
    for (let i = 0; i < 9; i++) await send(`m${i}`);
    const bodies: string[] = [];
    let receives = 0;
    while (bodies.length < 10) {
      const batch = await receive({ MaxNumberOfMessages: 10 });
      receives++;
      for (const message of batch) bodies.push(message.Body);
    }
    expect(receives).toBeGreaterThan(1);
    expect(bodies).not.toEqual([...bodies].sort());
  });

  test("a queue that is not there is QueueDoesNotExist", async () => {
    const { call } = withQueue();
    const error = await fails(call("sqs", "GetQueueUrl", { QueueName: "nope" }), "QueueDoesNotExist");
    expect(error.Code).toBe("AWS.SimpleQueueService.NonExistentQueue");
  });

  test("queues are created once, described, and purged once a minute", async () => {
    const { world, call, url, send } = withQueue();
    const made = await call<{ QueueUrl: string }>("sqs", "CreateQueue", { QueueName: "interruption" });
    expect(made.QueueUrl).toBe(url);
    await fails(
      call("sqs", "CreateQueue", { QueueName: "interruption", Attributes: { VisibilityTimeout: "99" } }),
      "QueueNameExists",
    );
    await send("a");
    const { Attributes } = await call<{ Attributes: Record<string, string> }>("sqs", "GetQueueAttributes", {
      QueueUrl: url,
      AttributeNames: ["All"],
    });
    expect(Attributes.ApproximateNumberOfMessages).toBe("1");
    expect(Attributes.VisibilityTimeout).toBe("30");
    expect(JSON.parse(Attributes.RedrivePolicy ?? "")).toMatchObject({ maxReceiveCount: 10 });
    await call("sqs", "PurgeQueue", { QueueUrl: url });
    expect(world.queueDepth(url).visible).toBe(0);
    await fails(call("sqs", "PurgeQueue", { QueueUrl: url }), "PurgeQueueInProgress");
  });
});

describe("ec2 instances", () => {
  test("unknown IDs are named, malformed ones refused, and one bad ID refuses the call", async () => {
    const { call, ids } = withGroup();
    const ask = (InstanceIds: string[]) => call("ec2", "DescribeInstances", { InstanceIds });
    const [a, b] = ["i-0aaaaaaaaaaaaaaaa", "i-0bbbbbbbbbbbbbbbb"];
    await fails(ask([ids[0], a]), "InvalidInstanceID.NotFound", `The instance ID '${a}' does not exist`);
    await fails(ask([a, b]), "InvalidInstanceID.NotFound", `The instance IDs '${a}, ${b}' do not exist`);
    await fails(ask(["i-xyz"]), "InvalidInstanceID.Malformed", 'Invalid id: "i-xyz"');
  });

  test("filters know tags, states and wildcards; unknown ones are refused", async () => {
    const { world, call, ids } = withGroup();
    const lone = world.createInstance({ tags: { "spotmax:replaces": "i-1 i-2" }, lifecycle: "on-demand" });
    const ask = async (Name: string, Values: string[]) =>
      instancesOf(await call<Described>("ec2", "DescribeInstances", { Filters: [{ Name, Values }] }))
        .map((instance) => instance.InstanceId)
        .sort();
    expect(await ask("tag:spotmax:replaces", ["*i-2*"])).toEqual([lone.id]);
    expect(await ask("tag:spotmax:replaces", ["i-2"])).toEqual([]);
    expect(await ask("tag-key", ["spotmax:?eplaces"])).toEqual([lone.id]);
    expect(await ask("instance-state-name", ["running", "pending"])).toHaveLength(4);
    expect(await ask("instance-id", [ids[0], "i-0aaaaaaaaaaaaaaaa"])).toEqual([ids[0]]);
    expect(await ask("instance-lifecycle", ["spot"])).toEqual([...ids].sort());
    await fails(ask("tag:spotmax.replaces", []), "InvalidParameterValue");
    await fails(ask("colour", ["red"]), "InvalidParameterValue", "The filter 'colour' is invalid");
    await fails(
      ask(
        "instance-id",
        Array.from({ length: 201 }, () => ids[0]),
      ),
      "FilterLimitExceeded",
    );
  });

  test("pages have 5 to 1000 instances, and exclude IDs", async () => {
    const { world, call, ids } = withGroup();
    for (let i = 0; i < 4; i++) world.createInstance({});
    const ask = (input: object) => call<Described>("ec2", "DescribeInstances", input);
    await fails(ask({ MaxResults: 4 }), "InvalidParameterValue");
    await fails(ask({ MaxResults: 1001 }), "InvalidParameterValue");
    await fails(ask({ MaxResults: 5, InstanceIds: [ids[0]] }), "InvalidParameterCombination");
    await fails(ask({ MaxResults: 5, NextToken: "made up" }), "InvalidParameterValue");
    const first = await ask({ MaxResults: 5 });
    expect(instancesOf(first)).toHaveLength(5);
    const second = await ask({ MaxResults: 5, NextToken: first.NextToken });
    expect(instancesOf(second)).toHaveLength(2);
    expect(second.NextToken).toBeUndefined();
  });

  test("terminating is idempotent, takes about 30 s, and stays visible for an hour", async () => {
    const { world, clock, call } = setUp();
    const { id } = world.createInstance({});
    const ask = async () => instancesOf(await call<Described>("ec2", "DescribeInstances", { InstanceIds: [id] }))[0];
    await fails(call("ec2", "TerminateInstances", { InstanceIds: [id], DryRun: true }), "DryRunOperation");
    await call("ec2", "TerminateInstances", { InstanceIds: [id] });
    expect((await ask())?.State?.Name).toBe("shutting-down");
    const again = await call<{ TerminatingInstances: { PreviousState: { Name: string } }[] }>("ec2", "TerminateInstances", {
      InstanceIds: [id],
    });
    expect(again.TerminatingInstances[0]?.PreviousState.Name).toBe("shutting-down");
    await clock.advance(36_000);
    const gone = await ask();
    expect(gone?.State?.Name).toBe("terminated");
    expect(gone?.StateReason?.Code).toBe("Client.UserInitiatedShutdown");
    expect(gone?.PrivateIpAddress).toBeUndefined();
    await clock.advance(3_600_000);
    await fails(ask(), "InvalidInstanceID.NotFound");
    await fails(call("ec2", "TerminateInstances", { InstanceIds: ["i-0aaaaaaaaaaaaaaaa"] }), "InvalidInstanceID.NotFound");
  });

  test("tags: keys to 128 characters, values to 256, none of AWS's own, 50 to a resource", async () => {
    const { world, call } = setUp();
    const { id, volumeId } = world.createInstance({});
    const tag = (Tags: object[], input: object = {}) => call("ec2", "CreateTags", { Resources: [id], Tags, ...input });
    await tag([{ Key: "k".repeat(128), Value: "v".repeat(256) }]);
    await fails(tag([{ Key: "k".repeat(129), Value: "" }]), "InvalidParameterValue");
    await fails(tag([{ Key: "k", Value: "v".repeat(257) }]), "InvalidParameterValue");
    await fails(tag([{ Key: "aws:x", Value: "" }]), "InvalidParameterValue");
    await fails(
      tag([
        { Key: "a", Value: "" },
        { Key: "a", Value: "" },
      ]),
      "InvalidParameterValue",
    );
    await tag(Array.from({ length: 49 }, (_, i) => ({ Key: `k${i}`, Value: "" })));
    await fails(tag([{ Key: "one more", Value: "" }]), "TagLimitExceeded");
    await tag([{ Key: "k0", Value: "changed" }]);
    expect(world.instance(id).tags.get("k0")).toBe("changed");
    await fails(tag([{ Key: "k0", Value: "again" }], { DryRun: true }), "DryRunOperation");
    expect(world.instance(id).tags.get("k0")).toBe("changed");
    await tag([{ Key: "v", Value: "" }], { Resources: [volumeId] });
    await fails(tag([{ Key: "v", Value: "" }], { Resources: ["vol-0aaaaaaaaaaaaaaaa"] }), "InvalidVolume.NotFound");
    await fails(tag([{ Key: "v", Value: "" }], { Resources: [volumeId, "i-0aaaaaaaaaaaaaaaa"] }), "InvalidInstanceID.NotFound");
    await call("ec2", "DeleteTags", { Resources: [id], Tags: [{ Key: "k0", Value: "other" }, { Key: "k1" }] });
    expect(world.instance(id).tags.has("k0")).toBe(true);
    expect(world.instance(id).tags.has("k1")).toBe(false);
  });

  test("with staleMs, a fresh instance may be unknown, and a change unseen, for that long and no longer", async () => {
    const { world, clock, call, group } = withGroup({}, { staleMs: 4_000, latencyMs: [0, 0], pendingMs: [9_000, 9_000] });
    await call("ec2", "RunInstances", {
      MinCount: 1,
      MaxCount: 1,
      LaunchTemplate: { LaunchTemplateId: group.templateId },
      InstanceType: "m5.large",
    });
    const { id } = [...world.ec2.instances.values()].at(-1) ?? { id: "" };
    const tag = () => call("ec2", "CreateTags", { Resources: [id], Tags: [{ Key: "a", Value: "b" }] });
    await fails(tag(), "InvalidInstanceID.NotFound");
    await clock.advance(4_000);
    await tag();
    await clock.advance(5_000);
    const states = new Set<string>();
    for (let i = 0; i < 20; i++) {
      const [seen] = instancesOf(await call<Described>("ec2", "DescribeInstances", { InstanceIds: [id] }));
      states.add(seen?.State?.Name ?? "");
      await clock.advance(100);
    }
    expect([...states].sort()).toEqual(["pending", "running"]);
    await clock.advance(4_000);
    const [seen] = instancesOf(await call<Described>("ec2", "DescribeInstances", { InstanceIds: [id] }));
    expect(seen?.State?.Name).toBe("running");
  });

  test("subnets, templates, types and offerings are described; what is unknown is refused", async () => {
    const { world, call, group } = withGroup();
    const subnets = await call<{ Subnets: { AvailabilityZone: string }[] }>("ec2", "DescribeSubnets", {
      SubnetIds: group.subnetIds,
    });
    expect(subnets.Subnets.map((subnet) => subnet.AvailabilityZone)).toEqual(["us-east-1a", "us-east-1b", "us-east-1c"]);
    await fails(call("ec2", "DescribeSubnets", { SubnetIds: ["subnet-1"] }), "InvalidSubnetID.NotFound");
    const template = world.ec2.templates.get(group.templateId);
    template?.versions.push({ data: { ImageId: "ami-2" }, createdAtMs: 0 });
    const versions = async (Versions: string[]) =>
      (
        await call<{ LaunchTemplateVersions: { VersionNumber: number; LaunchTemplateData: { ImageId: string } }[] }>(
          "ec2",
          "DescribeLaunchTemplateVersions",
          { LaunchTemplateId: group.templateId, Versions },
        )
      ).LaunchTemplateVersions.map((version) => version.VersionNumber);
    expect(await versions(["$Default"])).toEqual([1]);
    expect(await versions(["$Latest"])).toEqual([2]);
    expect(await versions(["1", "2"])).toEqual([2, 1]);
    await fails(versions(["3"]), "InvalidLaunchTemplateId.VersionNotFound");
    await fails(
      call("ec2", "DescribeLaunchTemplateVersions", { LaunchTemplateId: "lt-0aaaaaaaaaaaaaaaa" }),
      "InvalidLaunchTemplateId.NotFound",
    );
    await fails(
      call("ec2", "DescribeLaunchTemplateVersions", { LaunchTemplateName: "nope" }),
      "InvalidLaunchTemplateName.NotFoundException",
    );
    world.ec2.notOffered.add("m5.large/us-east-1b");
    const offers = await call<{ InstanceTypeOfferings: { Location: string }[] }>("ec2", "DescribeInstanceTypeOfferings", {
      LocationType: "availability-zone",
      Filters: [{ Name: "instance-type", Values: ["m5.large"] }],
    });
    expect(offers.InstanceTypeOfferings.map((offer) => offer.Location)).toEqual(["us-east-1a", "us-east-1c"]);
    const types = await call<{ InstanceTypes: { VCpuInfo: { DefaultVCpus: number } }[] }>("ec2", "DescribeInstanceTypes", {
      InstanceTypes: ["m5.xlarge"],
    });
    expect(types.InstanceTypes[0]?.VCpuInfo.DefaultVCpus).toBe(4);
    await fails(call("ec2", "DescribeInstanceTypes", { InstanceTypes: ["m5.huge"] }), "InvalidInstanceType");
  });
});

describe("launching", () => {
  function withFleet(spec: Partial<GroupSpec> = {}, options: Partial<WorldOptions> = {}) {
    const set = withGroup(spec, { latencyMs: [0, 0], ...options });
    const [subnetA = "", subnetB = ""] = set.group.subnetIds;
    const specification = { LaunchTemplateId: set.group.templateId, Version: "$Default" };
    const base = {
      Type: "instant",
      TargetCapacitySpecification: { TotalTargetCapacity: 1, DefaultTargetCapacityType: "spot" },
      SpotOptions: { AllocationStrategy: "price-capacity-optimized" },
    };
    /** A spot fleet over these overrides. */
    const fleet = (Overrides: object[], input: object = {}, named: object = specification) =>
      set.call<FleetAnswer>("ec2", "CreateFleet", {
        ...base,
        LaunchTemplateConfigs: [{ LaunchTemplateSpecification: named, Overrides }],
        ...input,
      });
    const m5a = { InstanceType: "m5.large", SubnetId: subnetA };
    const m5b = { InstanceType: "m5.large", SubnetId: subnetB };
    const data = set.world.ec2.templates.get(set.group.templateId)?.versions[0]?.data ?? {};
    return { ...set, subnetA, subnetB, specification, base, fleet, m5a, m5b, data };
  }
  const capacity = (n: number, type = "spot") => ({
    TargetCapacitySpecification: { TotalTargetCapacity: n, DefaultTargetCapacityType: type },
  });
  const idsOf = (answer: FleetAnswer) => answer.Instances.flatMap((launched) => launched.InstanceIds);

  test("a fleet launches pending spot instances that run after 5 to 17 s and carry the fleet's tag", async () => {
    const { world, clock, call, fleet, m5a } = withFleet();
    const answer = await fleet([m5a], {
      TagSpecifications: [{ ResourceType: "instance", Tags: [{ Key: "spotmax:replaces", Value: "i-1" }] }],
    });
    const [id = ""] = idsOf(answer);
    expect(answer.Errors).toEqual([]);
    expect(answer.Instances[0]).toMatchObject({ InstanceType: "m5.large", Lifecycle: "spot" });
    const described = instancesOf(await call<Described>("ec2", "DescribeInstances", { InstanceIds: [id] }))[0];
    expect(described).toMatchObject({ State: { Name: "pending" }, InstanceLifecycle: "spot" });
    expect(described?.Tags).toContainEqual({ Key: "aws:ec2:fleet-id", Value: answer.FleetId });
    expect(described?.Tags).toContainEqual({ Key: "spotmax:replaces", Value: "i-1" });
    const start = clock.now();
    await clock.runUntil(() => world.instance(id).state === "running", 60_000);
    expect(clock.now() - start).toBeWithin(5_000, 17_001);
  });

  test("an override names one subnet, and a fleet one subnet of each zone", async () => {
    const { world, fleet, m5a, subnetA, subnetB } = withFleet();
    await fails(
      fleet([{ InstanceType: "m5.large", SubnetId: `${subnetA},${subnetB}` }]),
      "InvalidParameterValue",
      /one SubnetId/,
    );
    const second = world.ec2.createSubnet("us-east-1a");
    await fails(fleet([m5a, { InstanceType: "m5a.large", SubnetId: second.id }]), "InvalidFleetConfig");
    await fails(fleet([m5a, m5a]), "InvalidFleetConfig", /Duplicate/);
    await fails(fleet([{ ...m5a, SubnetId: "subnet-1" }]), "InvalidSubnetID.NotFound");
    await fails(fleet([{ ...m5a, InstanceType: "m5.huge" }]), "InvalidParameterValue");
  });

  test("the template is named by ID or by name, with its version", async () => {
    const { fleet, m5a, specification } = withFleet();
    const named = (change: object) => fleet([m5a], {}, { ...specification, ...change });
    await named({ LaunchTemplateId: undefined, LaunchTemplateName: "web-template" });
    await fails(named({ LaunchTemplateName: "web-template" }), "InvalidParameterCombination");
    await fails(named({ Version: undefined }), "InvalidParameterValue", /version must be specified/);
    await fails(named({ Version: "9" }), "InvalidLaunchTemplateId.VersionNotFound");
    await fails(named({ LaunchTemplateId: "lt-0aaaaaaaaaaaaaaaa" }), "InvalidLaunchTemplateId.NotFound");
    await fails(
      named({ LaunchTemplateId: undefined, LaunchTemplateName: "nope" }),
      "InvalidLaunchTemplateName.NotFoundException",
    );
  });

  test("a template that asks for spot itself is refused by CreateFleet and honoured by RunInstances", async () => {
    const { fleet, m5a, call, subnetA, group, world } = withFleet({
      template: { InstanceMarketOptions: { MarketType: "spot" } },
    });
    await fails(fleet([m5a]), "InvalidParameterCombination", /InstanceMarketOptions/);
    const answer = await call<{ Instances: Ec2Instance[] }>("ec2", "RunInstances", {
      LaunchTemplate: { LaunchTemplateId: group.templateId },
      InstanceType: "m5.large",
      SubnetId: subnetA,
      MinCount: 1,
      MaxCount: 1,
    });
    expect(answer.Instances[0]?.InstanceLifecycle).toBe("spot");
    expect(world.instance(answer.Instances[0]?.InstanceId ?? "").lifecycle).toBe("spot");
  });

  test("lowest-price takes the cheapest pool, price-capacity-optimized the fullest, prioritized the first", async () => {
    const { world, fleet, m5a, m5b, subnetA } = withFleet();
    const cheap = { InstanceType: "m6a.large", SubnetId: subnetA };
    world.pool("spot", "m6a.large", "us-east-1a").capacity = 1;
    world.pool("spot", "m5.large", "us-east-1a").capacity = 5;
    world.pool("spot", "m5.large", "us-east-1b").capacity = 50;
    const zoneOf = (answer: FleetAnswer) => world.instance(idsOf(answer)[0] ?? "");
    const pco = zoneOf(await fleet([cheap, m5a, m5b]));
    expect([pco.type, pco.zone]).toEqual(["m5.large", "us-east-1b"]);
    // The default is lowest-price, whatever room a pool has.
    expect(zoneOf(await fleet([m5a, m5b, cheap], { SpotOptions: undefined })).type).toBe("m6a.large");
    const onDemand = { ...capacity(1, "on-demand"), OnDemandOptions: { AllocationStrategy: "prioritized" } };
    const first = await fleet(
      [
        { ...m5a, Priority: 2 },
        { ...m5b, Priority: 1 },
      ],
      onDemand,
    );
    expect(zoneOf(first)).toMatchObject({ zone: "us-east-1b", lifecycle: "on-demand" });
    await fails(fleet([m5a], { SpotOptions: { AllocationStrategy: "best" } }), "InvalidParameterValue");
  });

  test("a fleet is fulfilled in part: instances and errors in one answer", async () => {
    const { world, fleet, m5a, m5b } = withFleet();
    world.pool("spot", "m5.large", "us-east-1a").capacity = 2;
    world.pool("spot", "m5.large", "us-east-1b").capacity = 0;
    const answer = await fleet([m5a, m5b], capacity(3));
    expect(idsOf(answer)).toHaveLength(2);
    expect(answer.Errors.map((error) => error.ErrorCode)).toEqual([
      "InsufficientInstanceCapacity",
      "InsufficientInstanceCapacity",
    ]);
    const nothing = await fleet([m5a, m5b]);
    expect(nothing.Instances).toEqual([]);
    expect(nothing.Errors).toHaveLength(2);
    expect(nothing.Errors[0]?.LaunchTemplateAndOverrides?.Overrides.SubnetId).toBe(m5a.SubnetId);
    world.ec2.capacityErrorsAsCall = true;
    await fails(fleet([m5a]), "InsufficientInstanceCapacity");
    world.pool("spot", "m5.large", "us-east-1a").error = "MaxSpotInstanceCountExceeded";
    await fails(fleet([m5a]), "MaxSpotInstanceCountExceeded");
  });

  test("pools give capacity away and get it back at the end of an instance", async () => {
    const { world, clock, call, fleet, m5a } = withFleet();
    const pool = world.pool("spot", "m5.large", "us-east-1a");
    pool.capacity = 1;
    const [id = ""] = idsOf(await fleet([m5a]));
    expect(pool.capacity).toBe(0);
    await call("ec2", "TerminateInstances", { InstanceIds: [id] });
    expect(pool.capacity).toBe(0);
    await clock.advance(40_000);
    expect(pool.capacity).toBe(1);
  });

  test("weights count towards the target, and a maximum price excludes dearer pools", async () => {
    const { fleet, m5a, subnetA, m5b } = withFleet();
    const xlarge = { InstanceType: "m5.xlarge", SubnetId: subnetA, WeightedCapacity: 2 };
    expect(idsOf(await fleet([xlarge], capacity(4)))).toHaveLength(2);
    expect(idsOf(await fleet([xlarge], capacity(3)))).toHaveLength(2);
    const answer = await fleet([{ ...m5a, MaxPrice: "0.01" }, m5b]);
    expect(idsOf(answer)).toHaveLength(1);
    const dear = await fleet([{ ...m5a, MaxPrice: "0.01" }]);
    expect(dear.Errors[0]?.ErrorCode).toBe("SpotMaxPriceTooLow");
  });

  test("attribute-based overrides choose from the catalogue", async () => {
    const { world, call, fleet, subnetA } = withFleet();
    const abr = (requirements: object) => [
      {
        SubnetId: subnetA,
        InstanceRequirements: { VCpuCount: { Min: 4, Max: 4 }, MemoryMiB: { Min: 16_384, Max: 16_384 }, ...requirements },
      },
    ];
    const [id = ""] = idsOf(await fleet(abr({ AllowedInstanceTypes: ["m5*"], ExcludedInstanceTypes: [] })));
    expect(world.instance(id).type).toBe("m5a.xlarge");
    await fails(fleet(abr({ AllowedInstanceTypes: ["m5*"], ExcludedInstanceTypes: ["m4*"] })), "InvalidParameterCombination");
    const both = [{ ...abr({})[0], InstanceType: "m5.large" }];
    await fails(fleet(both), "InvalidParameterCombination");
    const none = await fleet(abr({ AllowedInstanceTypes: ["z*"] }));
    expect(none.Errors[0]?.ErrorCode).toBe("UnfulfillableCapacity");
    const types = await call<{ InstanceTypes: { InstanceType: string }[] }>("ec2", "GetInstanceTypesFromInstanceRequirements", {
      ArchitectureTypes: ["arm64"],
      VirtualizationTypes: ["hvm"],
      InstanceRequirements: { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 8_192, Max: 8_192 } },
    });
    // t4g.large would fit too, but burstable types come only if asked for.
    expect(types.InstanceTypes.map((type) => type.InstanceType)).toEqual(["m6g.large", "m7g.large"]);
    const InstanceRequirements = { VCpuCount: { Min: 2 }, MemoryMiB: { Min: 4096 } };
    const ask = (input: object) => call("ec2", "GetInstanceTypesFromInstanceRequirements", input);
    await fails(ask({ VirtualizationTypes: ["hvm"], InstanceRequirements }), "MissingParameter");
    await fails(ask({ ArchitectureTypes: ["x86_64"], InstanceRequirements }), "MissingParameter");
    await fails(ask({ ArchitectureTypes: ["x86_64"], VirtualizationTypes: ["hvm"] }), "MissingParameter");
    await fails(ask({ ArchitectureTypes: ["x86"], VirtualizationTypes: ["hvm"], InstanceRequirements }), "InvalidParameterValue");
  });

  test("of attributes a request takes four sets, the template's counted too, none that overlap, and no priority beside", async () => {
    const { world, fleet, data, m5a } = withFleet();
    const zones = ["a", "b", "c", "d", "e"].map((z) => world.ec2.subnetIn(`us-east-1${z}`).id);
    const set = (vcpus: number, more: object = {}) => ({
      InstanceRequirements: { VCpuCount: { Min: vcpus, Max: vcpus }, MemoryMiB: { Min: 1024 }, ...more },
    });
    const inZones = (n: number, more: object) => zones.slice(0, n).map((SubnetId) => ({ SubnetId, ...more }));
    expect(idsOf(await fleet(inZones(4, set(2))))).toHaveLength(1);
    await fails(fleet(inZones(5, set(2))), "InvalidParameterValue", /more than the maximum allowed number of InstanceReq/);
    await fails(fleet([{ ...m5a, InstanceType: undefined, ...set(2), Priority: 1 }]), "InvalidParameterCombination");
    const [a = {}, b = {}] = inZones(2, {});
    expect(idsOf(await fleet([a, b].map((one, n) => ({ ...one, ...set(n ? 4 : 2) }))))).toHaveLength(1);
    const without = set(2, { ExcludedInstanceTypes: ["m5.large"] });
    await fails(
      fleet([
        { ...a, ...set(2) },
        { ...b, ...without },
      ]),
      "InvalidParameterValue",
      /overlapping/,
    );
    data.InstanceType = undefined;
    data.InstanceRequirements = set(2).InstanceRequirements;
    await fails(fleet(inZones(5, {})), "InvalidParameterValue", /more than the maximum/);
  });

  test("tags at launch obey the rules, and only fit resource types", async () => {
    const { fleet, m5a } = withFleet();
    const tagged = (ResourceType: string, Key: string, Value = "") =>
      fleet([m5a], { TagSpecifications: [{ ResourceType, Tags: [{ Key, Value }] }] });
    await tagged("volume", "a");
    await tagged("fleet", "a");
    await fails(tagged("snapshot", "a"), "InvalidParameterValue", /not a valid taggable resource type/);
    await fails(tagged("instance", "aws:a"), "InvalidParameterValue");
    await fails(tagged("instance", "a", "v".repeat(257)), "InvalidParameterValue");
  });

  test("a client token replays the answer for the same request and refuses another one, for an hour", async () => {
    const { world, clock, fleet, m5a, m5b } = withFleet();
    const first = await fleet([m5a], { ClientToken: "t" });
    expect(await fleet([m5a], { ClientToken: "t" })).toEqual(first);
    expect(world.ec2.instances.size).toBe(4);
    await fails(fleet([m5b], { ClientToken: "t" }), "IdempotentParameterMismatch");
    await fails(fleet([m5a], { ClientToken: "t", ...capacity(1, "on-demand") }), "IdempotentParameterMismatch");
    await fails(fleet([m5a], { ClientToken: "t".repeat(65) }), "InvalidParameterValue");
    await fails(fleet([m5a], { ClientToken: "é" }), "InvalidParameterValue");
    await clock.advance(3_600_000);
    expect(idsOf(await fleet([m5a], { ClientToken: "t" }))).not.toEqual(idsOf(first));
  });

  test("a dry run launches nothing", async () => {
    const { world, fleet, m5a } = withFleet();
    const error = await fails(fleet([m5a], { DryRun: true }), "DryRunOperation");
    expect(error.$metadata.httpStatusCode).toBe(412);
    world.denied.add("ec2:CreateFleet");
    await fails(fleet([m5a], { DryRun: true }), "UnauthorizedOperation");
    expect(world.ec2.instances.size).toBe(3);
  });

  test("a template's subnet conflicts with the override's, its spot request tags with on-demand", async () => {
    const { fleet, m5a, data, subnetA } = withFleet();
    data.NetworkInterfaces = [{ DeviceIndex: 0, SubnetId: subnetA }];
    expect((await fleet([m5a])).Errors[0]?.ErrorCode).toBe("InvalidParameterCombination");
    data.NetworkInterfaces = undefined;
    data.TagSpecifications = [{ ResourceType: "spot-instances-request", Tags: [{ Key: "a", Value: "b" }] }];
    expect(idsOf(await fleet([m5a]))).toHaveLength(1);
    expect((await fleet([m5a], capacity(1, "on-demand"))).Instances).toEqual([]);
  });

  test("an instance may die while pending, with a state reason", async () => {
    const { world, clock, call, fleet, m5a } = withFleet();
    world.ec2.dieWhilePending = () => ({ Code: "Client.InternalError", Message: "Client.InternalError: key" });
    const [id = ""] = idsOf(await fleet([m5a]));
    await clock.advance(18_000);
    const [dead] = instancesOf(await call<Described>("ec2", "DescribeInstances", { InstanceIds: [id] }));
    expect(dead).toMatchObject({ State: { Name: "terminated" }, StateReason: { Code: "Client.InternalError" } });
  });

  test("RunInstances launches between its counts or nothing, and its token is good for one zone", async () => {
    const { world, call, group, subnetA, subnetB } = withFleet();
    const runInstances = (input: object) =>
      call<{ Instances: Ec2Instance[] }>("ec2", "RunInstances", {
        LaunchTemplate: { LaunchTemplateName: `${group.name}-template` },
        InstanceType: "m5.large",
        SubnetId: subnetA,
        MinCount: 1,
        MaxCount: 1,
        ...input,
      });
    world.pool("on-demand", "m5.large", "us-east-1a").capacity = 3;
    await fails(runInstances({ MinCount: 4, MaxCount: 5 }), "InsufficientInstanceCapacity");
    expect((await runInstances({ MaxCount: 2 })).Instances).toHaveLength(2);
    const first = await runInstances({ ClientToken: "t" });
    const again = await runInstances({ ClientToken: "t" });
    expect(again.Instances[0]?.InstanceId).toBe(first.Instances[0]?.InstanceId ?? "");
    await fails(runInstances({ ClientToken: "t", InstanceType: "m5.xlarge" }), "IdempotentParameterMismatch");
    const other = await runInstances({ ClientToken: "t", SubnetId: subnetB });
    expect(other.Instances[0]?.InstanceId).not.toBe(first.Instances[0]?.InstanceId ?? "");
    await fails(runInstances({}), "InsufficientInstanceCapacity");
    await fails(runInstances({ MinCount: 2 }), "InvalidParameterValue");
    await fails(runInstances({ DryRun: true, SubnetId: subnetB }), "DryRunOperation");
  });
});

describe("auto scaling", () => {
  function withMembers(spec: Partial<GroupSpec> = {}, options: Partial<WorldOptions> = {}) {
    const set = withGroup(spec, { latencyMs: [0, 0], ...options });
    const asg = <T = Record<string, unknown>>(operation: string, input: object = {}) =>
      set.call<T>("autoscaling", operation, { AutoScalingGroupName: "web", ...input });
    const describeGroup = async () => {
      const answer = await set.call<GroupAnswer>("autoscaling", "DescribeAutoScalingGroups", {
        AutoScalingGroupNames: ["web"],
      });
      const group = answer.AutoScalingGroups[0];
      if (!group) throw new Error("the group is gone");
      return group;
    };
    const member = async (id: string) => (await describeGroup()).Instances.find((one) => one.InstanceId === id);
    const activities = async () => (await asg<ActivitiesAnswer>("DescribeScalingActivities")).Activities;
    const attach = (...InstanceIds: string[]) => asg("AttachInstances", { InstanceIds });
    const detach = (decrement: boolean, ...InstanceIds: string[]) =>
      asg("DetachInstances", { InstanceIds, ShouldDecrementDesiredCapacity: decrement });
    return { ...set, asg, describeGroup, member, activities, attach, detach };
  }

  test("attach raises desired at once, and Pending becomes InService", async () => {
    const { world, clock, attach, describeGroup, member, activities } = withMembers({
      tags: { team: "blue" },
      protected: true,
    });
    const { id } = world.createInstance({ tags: { team: "red" } });
    await attach(id);
    expect((await describeGroup()).DesiredCapacity).toBe(4);
    expect(await member(id)).toMatchObject({ LifecycleState: "Pending", ProtectedFromScaleIn: true });
    expect((await member(id))?.LaunchTemplate).toBeUndefined();
    // The group's tags overwrite the instance's.
    expect(world.instance(id).tags.get("team")).toBe("blue");
    expect(world.instance(id).tags.get("aws:autoscaling:groupName")).toBe("web");
    await clock.advance(6_000);
    expect((await member(id))?.LifecycleState).toBe("InService");
    const [activity] = await activities();
    expect(activity?.Description).toBe(`Attaching an existing EC2 instance: ${id}`);
    expect(activity?.Cause).toMatch(
      /^At \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ an instance was attached in response to user request, increasing the capacity from 3 to 4\.$/,
    );
    expect(activity?.StatusCode).toBe("Successful");
  });

  test("attach over the maximum is refused word for word, and changes nothing", async () => {
    const { world, attach, describeGroup } = withMembers();
    const ids = [world.createInstance({}).id, world.createInstance({}).id] as const;
    await fails(
      attach(...ids),
      "ValidationError",
      "AutoScalingGroup web has min-size=3, max-size=4, and desired-size=3. To attach 2 instances, please update the AutoScalingGroup sizes appropriately.",
    );
    await attach(ids[0]);
    await fails(
      attach(ids[1]),
      "ValidationError",
      "AutoScalingGroup web has min-size=3, max-size=4, and desired-size=4. To attach 1 instance, please update the AutoScalingGroup sizes appropriately.",
    );
    expect((await describeGroup()).Instances).toHaveLength(4);
  });

  test("attach refuses the whole call for one bad instance", async () => {
    const { world, call, clock, group, attach, describeGroup, ids } = withMembers({ max: 40 });
    const good = world.createInstance({}).id;
    const refused = async (id: string, text: string | RegExp) => {
      await fails(attach(good, id), "ValidationError", text);
      expect((await describeGroup()).DesiredCapacity).toBe(3);
    };
    await refused(ids[0], `Instance ${ids[0]} is already part of AutoScalingGroup:web`);
    world.createGroup({ name: "other", min: 0, max: 1, desired: 1 });
    const foreign = [...world.ec2.instances.values()].find((one) => one.group === "other")?.id ?? "";
    await refused(foreign, /is already part of AutoScalingGroup:other/);
    await refused("i-0aaaaaaaaaaaaaaaa", /does not exist/);
    await refused(world.createInstance({ zone: "us-east-1f" }).id, /Availability Zone us-east-1f/);
    await call("ec2", "RunInstances", {
      LaunchTemplate: { LaunchTemplateId: group.templateId },
      InstanceType: "m5.large",
      MinCount: 1,
      MaxCount: 1,
    });
    const pending = [...world.ec2.instances.values()].at(-1)?.id ?? "";
    await refused(pending, /not in the running state/);
    await clock.advance(20_000);
    await attach(pending);
    const many = Array.from({ length: 21 }, () => world.createInstance({}).id);
    await fails(attach(...many), "ValidationError", /length less than or equal to 20/);
    await attach(...many.slice(0, 20));
    world.ec2.missingImages.add("ami-0123456789abcdef0");
    await fails(attach(good), "ValidationError", /AMI/);
  });

  test("attach is impossible while Launch is suspended; detach is not", async () => {
    const { world, asg, attach, detach, ids } = withMembers({ min: 2 });
    await asg("SuspendProcesses", { ScalingProcesses: ["Launch"] });
    await fails(attach(world.createInstance({}).id), "ValidationError", /Launch/);
    await detach(true, ids[0]);
    await fails(asg("SuspendProcesses", { ScalingProcesses: ["Lunch"] }), "ValidationError");
  });

  test("detach with decrement shrinks the group for good", async () => {
    const { world, clock, detach, describeGroup, member, activities, ids } = withMembers({ min: 2 });
    const answer = (await detach(true, ids[0])) as unknown as ActivitiesAnswer;
    expect(answer.Activities[0]?.Description).toBe(`Detaching EC2 instance: ${ids[0]}`);
    expect((await describeGroup()).DesiredCapacity).toBe(2);
    expect((await member(ids[0]))?.LifecycleState).toBe("Detaching");
    await clock.advance(300_000);
    expect(await member(ids[0])).toBeUndefined();
    expect((await describeGroup()).Instances).toHaveLength(2);
    expect(world.instance(ids[0]).state).toBe("running");
    expect(world.instance(ids[0]).tags.has("aws:autoscaling:groupName")).toBe(false);
    expect((await activities())[0]?.Cause).toMatch(
      new RegExp(
        `^At \\S+Z instance ${ids[0]} was detached in response to a user request, shrinking the capacity from 3 to 2\\.$`,
      ),
    );
  });

  test("detach without decrement makes the group launch its own substitute", async () => {
    const { clock, detach, describeGroup, activities, ids } = withMembers();
    await detach(false, ids[0]);
    expect((await activities())[0]?.Cause).toEndWith(`instance ${ids[0]} was detached in response to a user request.`);
    await clock.advance(60_000);
    const group = await describeGroup();
    expect(group.DesiredCapacity).toBe(3);
    expect(group.Instances).toHaveLength(3);
    expect(group.Instances.every((one) => one.LifecycleState === "InService" && one.LaunchTemplate)).toBe(true);
    expect((await activities())[0]?.Description).toMatch(/^Launching a new EC2 instance: i-/);
  });

  test("detach may not go below the minimum, nor touch what is no member or on its way out", async () => {
    const { world, detach, ids, describeGroup } = withMembers();
    await fails(
      detach(true, ids[0]),
      "ValidationError",
      "AutoScalingGroup web has min-size=3, max-size=4, and desired-size=3. To detach 1 instance, please update the AutoScalingGroup sizes appropriately.",
    );
    const { id } = world.createInstance({});
    await fails(detach(false, ids[0], id), "ValidationError", `The instance ${id} is not part of Auto Scaling group web.`);
    expect((await describeGroup()).Instances.every((one) => one.LifecycleState === "InService")).toBe(true);
    await detach(false, ids[0]);
    await fails(detach(false, ids[0]), "ValidationError", `The instance ${ids[0]} is not in InService or Standby.`);
  });

  test("a maximum below desired takes desired along and ends members, a minimum above it launches", async () => {
    const { clock, asg, describeGroup, activities } = withMembers({ min: 1 });
    await asg("UpdateAutoScalingGroup", { MaxSize: 2 });
    expect(await describeGroup()).toMatchObject({ MinSize: 1, DesiredCapacity: 2, MaxSize: 2 });
    await clock.advance(60_000);
    expect((await describeGroup()).Instances).toHaveLength(2);
    const [activity] = await activities();
    expect(activity?.Description).toMatch(/^Terminating EC2 instance: i-/);
    expect(activity?.Cause).toMatch(
      /an instance was taken out of service in response to a difference between desired and actual capacity, shrinking the capacity from 3 to 2\. {2}At \S+Z instance i-\w+ was selected for termination\.$/,
    );
    await asg("UpdateAutoScalingGroup", { MinSize: 4, MaxSize: 5 });
    expect((await describeGroup()).DesiredCapacity).toBe(4);
    await clock.advance(60_000);
    expect((await describeGroup()).Instances).toHaveLength(4);
    await fails(asg("UpdateAutoScalingGroup", { MinSize: 6 }), "ValidationError", /Max bound, 5/);
    await fails(asg("UpdateAutoScalingGroup", { DesiredCapacity: 9 }), "ValidationError", /must be between/);
    await fails(asg("SetDesiredCapacity", { DesiredCapacity: 6 }), "ValidationError", /above max value 5/);
    await fails(asg("SetDesiredCapacity", { DesiredCapacity: 3 }), "ValidationError", /below min value 4/);
  });

  test("scale-in never takes a protected member", async () => {
    const { clock, asg, describeGroup, ids } = withMembers({ min: 0 });
    await asg("SetInstanceProtection", { InstanceIds: [ids[0], ids[1]], ProtectedFromScaleIn: true });
    await asg("SetDesiredCapacity", { DesiredCapacity: 0 });
    await clock.advance(300_000);
    expect((await describeGroup()).Instances.map((one) => one.InstanceId)).toEqual([ids[0], ids[1]]);
    await asg("SetInstanceProtection", { InstanceIds: [ids[0]], ProtectedFromScaleIn: false });
    await clock.advance(300_000);
    expect((await describeGroup()).Instances.map((one) => one.InstanceId)).toEqual([ids[1]]);
    const tooMany = Array.from({ length: 51 }, () => ids[1]);
    await fails(asg("SetInstanceProtection", { InstanceIds: tooMany, ProtectedFromScaleIn: true }), "ValidationError");
    await fails(
      asg("SetInstanceProtection", { InstanceIds: [ids[0]], ProtectedFromScaleIn: true }),
      "ValidationError",
      /is not part of/,
    );
  });

  test("a member that no longer runs is replaced after a while, desired unchanged", async () => {
    const { clock, call, describeGroup, activities, ids } = withMembers();
    await call("ec2", "TerminateInstances", { InstanceIds: [ids[0]] });
    await clock.advance(9_000);
    expect((await describeGroup()).Instances.map((one) => one.LifecycleState)).not.toContain("Terminating");
    await clock.advance(120_000);
    const group = await describeGroup();
    expect(group.DesiredCapacity).toBe(3);
    expect(group.Instances).toHaveLength(3);
    expect(group.Instances.map((one) => one.InstanceId)).not.toContain(ids[0]);
    const causes = (await activities()).map((activity) => activity.Cause);
    expect(causes[1]).toMatch(
      /^At \S+Z an instance was taken out of service in response to an EC2 health check indicating it has been terminated or stopped\.$/,
    );
    expect(causes[0]).toMatch(/launched in response to an unhealthy instance needing to be replaced\.$/);
  });

  test.each(["ReplaceUnhealthy", "Launch", "Terminate"])(
    "suspending %s suppresses what a group does by itself",
    async (process) => {
      const { world, clock, call, asg, describeGroup, ids } = withMembers({ suspended: [process] });
      await call("ec2", "TerminateInstances", { InstanceIds: [ids[0]] });
      await clock.advance(600_000);
      const launched = world.audit.filter((entry) => entry.what === "group launch");
      expect(launched).toEqual([]);
      const states = (await describeGroup()).Instances.map((one) => one.HealthStatus);
      // With Launch suspended the dead member goes, and nothing comes.
      expect(states).toHaveLength(process === "Launch" ? 2 : 3);
      await asg("ResumeProcesses", { ScalingProcesses: [process] });
      await clock.advance(600_000);
      expect((await describeGroup()).Instances.map((one) => one.LifecycleState)).toEqual(Array(3).fill("InService"));
    },
  );

  test("a group without capacity tries again until there is some", async () => {
    const { world, clock, asg, describeGroup, activities } = withMembers({ types: ["m5.large"], zones: ["us-east-1a"] });
    const pool = world.pool("on-demand", "m5.large", "us-east-1a");
    pool.capacity = 0;
    await asg("SetDesiredCapacity", { DesiredCapacity: 4 });
    await clock.advance(90_000);
    const [failed] = await activities();
    expect(failed?.StatusCode).toBe("Failed");
    expect(failed?.StatusMessage).toMatch(/^InsufficientInstanceCapacity - .*Launching EC2 instance failed\.$/);
    pool.capacity = 1;
    await clock.advance(120_000);
    expect((await describeGroup()).Instances).toHaveLength(4);
  });

  test("TerminateInstanceInAutoScalingGroup needs to know about desired, and stays above the minimum", async () => {
    const { world, clock, call, describeGroup, activities, ids } = withMembers({ min: 2 });
    const end = (InstanceId: string, ShouldDecrementDesiredCapacity?: boolean) =>
      call("autoscaling", "TerminateInstanceInAutoScalingGroup", { InstanceId, ShouldDecrementDesiredCapacity });
    await fails(end(ids[0]), "ValidationError", /shouldDecrementDesiredCapacity/);
    await end(ids[0], true);
    expect((await describeGroup()).DesiredCapacity).toBe(2);
    expect((await activities())[0]?.Cause).toEndWith(
      `instance ${ids[0]} was taken out of service in response to a user request, shrinking the capacity from 3 to 2.`,
    );
    await fails(end(ids[0], true), "ScalingActivityInProgress");
    await fails(end(ids[1], true), "ValidationError", /^Currently, desiredSize equals minSize \(2\)\./);
    await end(ids[1], false);
    expect((await activities())[0]?.Cause).toEndWith(
      `instance ${ids[1]} was taken out of service in response to a user request.`,
    );
    await clock.advance(120_000);
    expect(world.instance(ids[0]).state).toBe("terminated");
    expect((await describeGroup()).Instances).toHaveLength(2);
    await fails(end(world.createInstance({}).id, true), "ValidationError", /No managed instance found/);
  });

  test("Standby is out of desired, of service and of health checks", async () => {
    const { world, clock, asg, member, describeGroup, ids } = withMembers({ min: 2 });
    const standby = (id: string, ShouldDecrementDesiredCapacity: boolean) =>
      asg("EnterStandby", { InstanceIds: [id], ShouldDecrementDesiredCapacity });
    await standby(ids[0], true);
    expect(await member(ids[0])).toMatchObject({ LifecycleState: "Standby" });
    expect((await describeGroup()).DesiredCapacity).toBe(2);
    await fails(standby(ids[1], true), "ValidationError", /min-size=2/);
    await fails(standby(ids[0], false), "ValidationError", `The instance ${ids[0]} is not in InService.`);
    await clock.advance(120_000);
    expect((await describeGroup()).Instances).toHaveLength(3);
    world.ec2.terminate(world.instance(ids[0]), "Client.UserInitiatedShutdown: x");
    await clock.advance(120_000);
    expect((await describeGroup()).DesiredCapacity).toBe(2);
  });

  test("uneven zones are evened out after a minute, over the maximum if need be, unless suspended", async () => {
    for (const suspended of [[], ["AZRebalance"]]) {
      const { world, clock, describeGroup, attach, detach, ids } = withMembers({ min: 2, max: 3, suspended });
      const most: number[] = [];
      world.onCapacity((sample) => void most.push(sample.inService));
      await detach(true, ids[2]);
      await attach(world.createInstance({ zone: "us-east-1a" }).id);
      await clock.advance(50_000);
      const zones = async () =>
        (await describeGroup()).Instances.filter((one) => one.LifecycleState === "InService")
          .map((one) => one.AvailabilityZone.slice(-1))
          .sort()
          .join("");
      expect(await zones()).toBe("aab");
      await clock.advance(600_000);
      expect(await zones()).toBe(suspended.length > 0 ? "aab" : "abc");
      expect(Math.max(...most)).toBe(suspended.length > 0 ? 3 : 4);
      expect((await describeGroup()).DesiredCapacity).toBe(3);
    }
  });

  test("in a weighted group members count by weight", async () => {
    const { world, clock, attach, describeGroup, member, detach } = withMembers({
      types: ["m5.large", "m5.xlarge"],
      weights: { "m5.large": 1, "m5.xlarge": 2 },
      min: 2,
      max: 6,
    });
    const { id } = world.createInstance({ type: "m5.xlarge" });
    await attach(id);
    expect((await describeGroup()).DesiredCapacity).toBe(5);
    expect((await member(id))?.WeightedCapacity).toBe("2");
    await fails(attach(world.createInstance({ type: "m5.xlarge" }).id), "ValidationError", /desired-size=5/);
    await clock.advance(10_000);
    await detach(true, id);
    expect((await describeGroup()).DesiredCapacity).toBe(3);
  });

  test("tags of groups are written, listed and deleted; AWS's own keys are refused", async () => {
    const { call, describeGroup } = withMembers();
    const tag = (Key: string, Value: string, input: object = {}) =>
      call("autoscaling", "CreateOrUpdateTags", {
        Tags: [{ ResourceId: "web", ResourceType: "auto-scaling-group", Key, Value, PropagateAtLaunch: false, ...input }],
      });
    await tag("spotmax:max_size", "4/5");
    const listed = await call<{ Tags: object[] }>("autoscaling", "DescribeTags", {
      Filters: [
        { Name: "auto-scaling-group", Values: ["web"] },
        { Name: "key", Values: ["spotmax:max_size"] },
      ],
    });
    expect(listed.Tags).toMatchObject([{ Key: "spotmax:max_size", Value: "4/5", PropagateAtLaunch: false }]);
    expect((await describeGroup()) as object).toMatchObject({ Tags: listed.Tags });
    await fails(tag("aws:x", ""), "ValidationError");
    await fails(tag("x", "v".repeat(257)), "ValidationError");
    await fails(tag("x", "", { ResourceId: "nope" }), "ValidationError", /not found/);
    await fails(tag("x", "", { ResourceType: "instance" }), "ValidationError");
    const drop = (Value?: string) =>
      call("autoscaling", "DeleteTags", {
        Tags: [{ ResourceId: "web", ResourceType: "auto-scaling-group", Key: "spotmax:max_size", Value }],
      });
    await drop("other");
    expect((await describeGroup()) as object).toMatchObject({ Tags: listed.Tags });
    await drop();
    expect((await describeGroup()) as object).toMatchObject({ Tags: [] });
  });

  test("unknown groups and instances are silently absent, and lists have their limits", async () => {
    const { call, asg, ids, world } = withMembers();
    const groups = await call<GroupAnswer>("autoscaling", "DescribeAutoScalingGroups", {
      AutoScalingGroupNames: ["web", "nope"],
    });
    expect(groups.AutoScalingGroups).toHaveLength(1);
    const known = await call<{ AutoScalingInstances: object[] }>("autoscaling", "DescribeAutoScalingInstances", {
      InstanceIds: [ids[0], "i-0aaaaaaaaaaaaaaaa", world.createInstance({}).id],
    });
    expect(known.AutoScalingInstances).toMatchObject([
      { InstanceId: ids[0], AutoScalingGroupName: "web", LifecycleState: "InService", HealthStatus: "HEALTHY" },
    ]);
    await fails(
      call("autoscaling", "DescribeAutoScalingInstances", { InstanceIds: Array.from({ length: 51 }, () => ids[0]) }),
      "ValidationError",
    );
    await fails(call("autoscaling", "DescribeAutoScalingGroups", { MaxRecords: 101 }), "ValidationError");
    await fails(asg("AttachInstances", { AutoScalingGroupName: "nope", InstanceIds: [ids[0]] }), "ValidationError");
    const first = await call<{ AutoScalingInstances: object[]; NextToken: string }>(
      "autoscaling",
      "DescribeAutoScalingInstances",
      { MaxRecords: 2 },
    );
    expect(first.AutoScalingInstances).toHaveLength(2);
    const rest = await call<{ AutoScalingInstances: object[] }>("autoscaling", "DescribeAutoScalingInstances", {
      MaxRecords: 2,
      NextToken: first.NextToken,
    });
    expect(rest.AutoScalingInstances).toHaveLength(1);
  });

  test("a group with members is deleted by force only, and says so until it is gone", async () => {
    const { world, clock, asg, attach, describeGroup } = withMembers();
    await fails(asg("DeleteAutoScalingGroup"), "ResourceInUse");
    await asg("DeleteAutoScalingGroup", { ForceDelete: true });
    expect((await describeGroup()).Status).toBe("Delete in progress");
    await fails(attach(world.createInstance({}).id), "ValidationError", /pending delete/);
    await clock.advance(120_000);
    expect(world.autoscaling.groups.size).toBe(0);
    expect([...world.ec2.instances.values()].filter((one) => one.state === "running")).toHaveLength(1);
  });

  test("groups can be made by call, and then launch their members", async () => {
    const { clock, call, group } = withMembers();
    const create = (input: object) =>
      call("autoscaling", "CreateAutoScalingGroup", {
        AutoScalingGroupName: "new",
        MinSize: 1,
        MaxSize: 2,
        VPCZoneIdentifier: group.subnetIds.join(","),
        LaunchTemplate: { LaunchTemplateId: group.templateId, Version: "$Latest" },
        ...input,
      });
    await fails(create({ AutoScalingGroupName: "web" }), "AlreadyExists");
    await fails(create({ LaunchTemplate: undefined }), "ValidationError", /must contain either/);
    await fails(create({ VPCZoneIdentifier: "subnet-1" }), "ValidationError");
    await fails(create({ DesiredCapacity: 3 }), "ValidationError", /must be between/);
    await create({});
    await clock.advance(60_000);
    const answer = await call<GroupAnswer>("autoscaling", "DescribeAutoScalingGroups", { AutoScalingGroupNames: ["new"] });
    expect(answer.AutoScalingGroups[0]?.Instances).toMatchObject([{ LifecycleState: "InService" }]);
  });

  test("target groups: initial, healthy, then draining as long as the member is Detaching", async () => {
    const { world, clock, call, attach, detach, member, group } = withMembers({ targetGroups: ["web"], min: 0 });
    const [arn = ""] = [...world.elbv2.groups.keys()];
    const health = async (id: string) => {
      const answer = await call<{ TargetHealthDescriptions: { TargetHealth: { State: string } }[] }>(
        "elbv2",
        "DescribeTargetHealth",
        { TargetGroupArn: arn, Targets: [{ Id: id }] },
      );
      return answer.TargetHealthDescriptions[0]?.TargetHealth.State;
    };
    const { id } = world.createInstance({});
    expect(await health(group.instanceIds[0] ?? "")).toBe("healthy");
    expect(await health(id)).toBe("unused");
    await attach(id);
    await clock.runUntil(() => world.autoscaling.groups.get("web")?.members.get(id)?.state === "InService", 10_000);
    // InService does not wait for the target group.
    expect(await health(id)).toBe("initial");
    expect(world.autoscaling.sample("web")).toMatchObject({ inService: 4, serving: 3 });
    await clock.advance(16_000);
    expect(await health(id)).toBe("healthy");
    await detach(true, id);
    expect(await health(id)).toBe("draining");
    await clock.advance(29_000);
    expect((await member(id))?.LifecycleState).toBe("Detaching");
    await clock.advance(6_000);
    expect(await member(id)).toBeUndefined();
    expect(await health(id)).toBe("unused");
    await fails(call("elbv2", "DescribeTargetHealth", { TargetGroupArn: `${arn}0` }), "TargetGroupNotFound");
  });

  test("with staleMs, a group may be seen as it was, but no older", async () => {
    const { world, clock, attach, describeGroup } = withMembers({}, { staleMs: 3_000 });
    await attach(world.createInstance({}).id);
    const seen = new Set<number>();
    for (let i = 0; i < 20; i++) {
      seen.add((await describeGroup()).DesiredCapacity);
      await clock.advance(50);
    }
    expect([...seen].sort()).toEqual([3, 4]);
    await clock.advance(3_000);
    for (let i = 0; i < 20; i++) expect((await describeGroup()).DesiredCapacity).toBe(4);
  });
});

describe("scenarios", () => {
  test("an interruption sends the event as EventBridge does, and takes the instance at the deadline", async () => {
    const { world, clock, ids } = withGroup({}, { latencyMs: [0, 0] });
    const { interruption } = world.createQueues();
    world.interrupt(ids[0], { duplicates: 2, eventDelayMs: 1_500 });
    expect(world.queueDepth(interruption).visible).toBe(0);
    await clock.advance(1_500);
    const bodies = world.sqs.bodies(interruption);
    expect(bodies).toHaveLength(2);
    expect(bodies[0]).toMatch(
      new RegExp(
        `^\\{"version":"0","id":"[0-9a-f-]{36}","detail-type":"EC2 Spot Instance Interruption Warning","source":"aws\\.ec2","account":"123456789012","time":"2026-01-01T00:00:00Z","region":"us-east-1","resources":\\["arn:aws:ec2:us-east-1a:instance/${ids[0]}"\\],"detail":\\{"instance-id":"${ids[0]}","instance-action":"terminate"\\}\\}$`,
      ),
    );
    expect(world.pool("spot", world.instance(ids[0]).type, "us-east-1a").capacity).toBe(0);
    await clock.advance(118_499);
    expect(world.instance(ids[0]).state).toBe("running");
    await clock.advance(1);
    expect(world.instance(ids[0])).toMatchObject({
      state: "shutting-down",
      stateReason: { Code: "Server.SpotInstanceTermination" },
    });
    await clock.advance(60_000);
    expect(world.instance(ids[0]).state).toBe("terminated");
    // What AWS took does not come back to the pool.
    expect(world.pool("spot", world.instance(ids[0]).type, "us-east-1a").capacity).toBe(0);
  });

  test("stop stops, a rehearsal does nothing, and other notices are only events", async () => {
    const { world, clock, ids } = withGroup();
    const { interruption } = world.createQueues();
    world.interrupt(ids[0], { action: "stop", noticeSeconds: 10 });
    world.interrupt(ids[1], { withoutReclaim: true });
    world.rebalance(ids[2]);
    world.healthEvent([ids[2]], { statusCode: "open" });
    world.sendRaw(interruption, "not JSON");
    const types = world.sqs
      .bodies(interruption)
      .slice(0, 4)
      .map((body) => (JSON.parse(body) as { "detail-type": string })["detail-type"]);
    expect(types).toEqual([
      "EC2 Spot Instance Interruption Warning",
      "EC2 Spot Instance Interruption Warning",
      "EC2 Instance Rebalance Recommendation",
      "AWS Health Event",
    ]);
    await clock.advance(11_000);
    expect(world.instance(ids[0]).state).toBe("stopping");
    await clock.advance(3_000_000);
    expect(world.instance(ids[1]).state).toBe("running");
    expect(world.instance(ids[2]).state).toBe("running");
  });

  test("samplers see capacity fall the moment a member dies", async () => {
    const { world, clock, ids } = withGroup();
    const seen: number[] = [];
    world.onCapacity((sample) => void seen.push(sample.inService));
    world.createQueues();
    world.interrupt(ids[0]);
    await clock.advance(120_000);
    expect(seen.at(-1)).toBe(2);
    await clock.advance(600_000);
    expect(seen.at(-1)).toBe(3);
    expect(world.audit.map((entry) => entry.what)).toContain("group launch");
  });
});

// SQS standard queues: at least once, in no promised order.
import { createHash } from "node:crypto";
import type {
  ChangeMessageVisibilityBatchRequest,
  ChangeMessageVisibilityRequest,
  CreateQueueRequest,
  DeleteMessageBatchRequest,
  DeleteMessageRequest,
  GetQueueAttributesRequest,
  GetQueueUrlRequest,
  MessageAttributeValue,
  PurgeQueueRequest,
  ReceiveMessageRequest,
  SendMessageBatchRequest,
  SendMessageRequest,
  SetQueueAttributesRequest,
} from "@aws-sdk/client-sqs";
import { AwsError } from "./basics.ts";
import { Heap } from "./clock.ts";
import type { Handlers, World } from "./world.ts";

export interface Message {
  id: string;
  body: string;
  attributes: Record<string, MessageAttributeValue>;
  sentAtMs: number;
  /** Delayed or in flight until then. */
  visibleAtMs: number;
  /** Raised by whatever moves `visibleAtMs`, so that older entries of the heap are void. */
  version: number;
  receiveCount: number;
  firstReceivedAtMs: number;
  /** Of the last receive; the only one that deletes. */
  receiptHandle: string | undefined;
  deleted: boolean;
}

interface Waiting {
  message: Message;
  version: number;
  atMs: number;
  order: number;
}

export interface Queue {
  name: string;
  url: string;
  arn: string;
  attributes: Record<string, string>;
  createdAtMs: number;
  messages: Map<string, Message>;
  waiting: Heap<Waiting>;
  ready: Message[];
  pollers: Set<() => void>;
  receipts: Map<string, Message>;
  purgedAtMs: number;
}

export interface Unreliability {
  /** The probability that a message received stays visible for another receiver. */
  duplicates: number;
  /** The probability that a receive takes messages out of order. */
  reorder: number;
  /** The probability that a receive sees only some of the servers, and so only some of the messages. */
  partialReceives: number;
}

/** Attributes that may be set: default, least, most. */
const NUMBERS: Record<string, [number, number, number]> = {
  DelaySeconds: [0, 0, 900],
  MaximumMessageSize: [262_144, 1_024, 1_048_576],
  MessageRetentionPeriod: [345_600, 60, 1_209_600],
  ReceiveMessageWaitTimeSeconds: [0, 0, 20],
  VisibilityTimeout: [30, 0, 43_200],
};
const TEXTS = new Set(["Policy", "RedrivePolicy", "RedriveAllowPolicy", "SqsManagedSseEnabled", "KmsMasterKeyId"]);
const READ_ONLY = [
  "ApproximateNumberOfMessages",
  "ApproximateNumberOfMessagesDelayed",
  "ApproximateNumberOfMessagesNotVisible",
  "CreatedTimestamp",
  "LastModifiedTimestamp",
  "QueueArn",
];
const SYSTEM_ATTRIBUTES = new Set([
  "All",
  "SenderId",
  "SentTimestamp",
  "ApproximateReceiveCount",
  "ApproximateFirstReceiveTimestamp",
  "SequenceNumber",
  "MessageDeduplicationId",
  "MessageGroupId",
  "AWSTraceHeader",
  "DeadLetterQueueSourceArn",
]);
/** Standard queues hold about this many messages in flight; a short poll beyond it is refused with OverLimit. */
const MAX_IN_FLIGHT = 120_000;
const MAX_BYTES = 262_144;

type Failure = { Id: string; SenderFault: boolean; Code: string; Message: string };

export class Sqs {
  readonly #world: World;
  readonly queues = new Map<string, Queue>();
  readonly unreliability: Unreliability = { duplicates: 0, reorder: 0, partialReceives: 0 };
  maxInFlight = MAX_IN_FLIGHT;
  #order = 0;

  constructor(world: World) {
    this.#world = world;
  }

  readonly operations: Handlers = {
    CreateQueue: (input: CreateQueueRequest) => {
      const name = input.QueueName ?? "";
      const attributes = { ...input.Attributes };
      for (const [key, value] of Object.entries(attributes)) checkAttribute(key, value);
      for (const queue of this.queues.values()) {
        if (queue.name !== name) continue;
        const differs = Object.entries(attributes).some(([key, value]) => queue.attributes[key] !== value);
        if (differs)
          throw new AwsError(
            "QueueNameExists",
            "A queue already exists with the same name and a different value for attribute",
            400,
            "QueueAlreadyExists",
          );
        return { QueueUrl: queue.url };
      }
      return { QueueUrl: this.create(name, attributes).url };
    },

    GetQueueUrl: (input: GetQueueUrlRequest) => {
      for (const queue of this.queues.values()) if (queue.name === input.QueueName) return { QueueUrl: queue.url };
      throw nonExistent();
    },

    GetQueueAttributes: (input: GetQueueAttributesRequest) => {
      const queue = this.#queue(input.QueueUrl);
      const depth = this.depth(queue.url);
      const all: Record<string, string> = {
        ...queue.attributes,
        ApproximateNumberOfMessages: String(depth.visible),
        ApproximateNumberOfMessagesDelayed: String(depth.delayed),
        ApproximateNumberOfMessagesNotVisible: String(depth.inFlight),
        CreatedTimestamp: String(Math.floor(queue.createdAtMs / 1000)),
        LastModifiedTimestamp: String(Math.floor(queue.createdAtMs / 1000)),
        QueueArn: queue.arn,
      };
      const names: string[] = input.AttributeNames ?? [];
      for (const name of names)
        if (name !== "All" && !(name in NUMBERS) && !TEXTS.has(name) && !READ_ONLY.includes(name))
          throw new AwsError("InvalidAttributeName", `Unknown Attribute ${name}.`);
      const chosen = Object.entries(all).filter(([key]) => names.includes("All") || names.includes(key));
      return chosen.length > 0 ? { Attributes: Object.fromEntries(chosen) } : {};
    },

    SetQueueAttributes: (input: SetQueueAttributesRequest) => {
      const queue = this.#queue(input.QueueUrl);
      for (const [key, value] of Object.entries(input.Attributes ?? {})) checkAttribute(key, value);
      Object.assign(queue.attributes, input.Attributes);
      return {};
    },

    PurgeQueue: (input: PurgeQueueRequest) => {
      const queue = this.#queue(input.QueueUrl);
      if (this.#world.now() - queue.purgedAtMs < 60_000)
        throw new AwsError(
          "PurgeQueueInProgress",
          `Only one PurgeQueue operation on ${queue.name} is allowed every 60 seconds.`,
          403,
          "AWS.SimpleQueueService.PurgeQueueInProgress",
        );
      queue.purgedAtMs = this.#world.now();
      for (const message of [...queue.messages.values()]) this.#remove(queue, message);
      return {};
    },

    SendMessage: (input: SendMessageRequest) => {
      const queue = this.#queue(input.QueueUrl);
      const body = checkMessage(input);
      const message = this.#add(queue, body, input.DelaySeconds, input.MessageAttributes);
      return { MessageId: message.id, MD5OfMessageBody: md5(body) };
    },

    SendMessageBatch: (input: SendMessageBatchRequest) => {
      const queue = this.#queue(input.QueueUrl);
      const entries = checkBatch(input.Entries, "SendMessageBatchRequestEntry");
      const bytes = entries.reduce((sum, entry) => sum + sizeOf(entry), 0);
      if (bytes > MAX_BYTES)
        throw new AwsError(
          "BatchRequestTooLong",
          `Batch requests cannot be longer than ${MAX_BYTES} bytes. You have sent ${bytes} bytes.`,
          400,
          "AWS.SimpleQueueService.BatchRequestTooLong",
        );
      return eachEntry(entries, (entry) => {
        const body = checkMessage(entry);
        const message = this.#add(queue, body, entry.DelaySeconds, entry.MessageAttributes);
        return { Id: entry.Id, MessageId: message.id, MD5OfMessageBody: md5(body) };
      });
    },

    ReceiveMessage: (input: ReceiveMessageRequest, { signal }: { signal?: AbortSignal }) => this.#receive(input, signal),

    DeleteMessage: (input: DeleteMessageRequest) => {
      this.#delete(this.#queue(input.QueueUrl), input.ReceiptHandle ?? "");
      return {};
    },

    DeleteMessageBatch: (input: DeleteMessageBatchRequest) => {
      const queue = this.#queue(input.QueueUrl);
      return eachEntry(checkBatch(input.Entries, "DeleteMessageBatchRequestEntry"), (entry) => {
        this.#delete(queue, entry.ReceiptHandle ?? "");
        return { Id: entry.Id };
      });
    },

    ChangeMessageVisibility: (input: ChangeMessageVisibilityRequest) => {
      this.#changeVisibility(this.#queue(input.QueueUrl), input.ReceiptHandle ?? "", input.VisibilityTimeout);
      return {};
    },

    ChangeMessageVisibilityBatch: (input: ChangeMessageVisibilityBatchRequest) => {
      const queue = this.#queue(input.QueueUrl);
      return eachEntry(checkBatch(input.Entries, "ChangeMessageVisibilityBatchRequestEntry"), (entry) => {
        this.#changeVisibility(queue, entry.ReceiptHandle ?? "", entry.VisibilityTimeout);
        return { Id: entry.Id };
      });
    },
  };

  create(name: string, attributes: Record<string, string> = {}): Queue {
    if (!/^[A-Za-z0-9_-]{1,80}$/.test(name))
      throw new AwsError(
        "InvalidParameterValue",
        "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
      );
    const { origin, account, region } = this.#world;
    const defaults = Object.entries(NUMBERS).map(([key, [value]]) => [key, String(value)]);
    const queue: Queue = {
      name,
      url: `${origin}/${account}/${name}`,
      arn: `arn:aws:sqs:${region}:${account}:${name}`,
      attributes: { ...Object.fromEntries(defaults), ...attributes },
      createdAtMs: this.#world.now(),
      messages: new Map(),
      waiting: new Heap((a, b) => a.atMs < b.atMs || (a.atMs === b.atMs && a.order < b.order)),
      ready: [],
      pollers: new Set(),
      receipts: new Map(),
      purgedAtMs: Number.NEGATIVE_INFINITY,
    };
    this.queues.set(queue.url, queue);
    return queue;
  }

  /** A message from outside (EventBridge, a test): no size or batch rule applies. */
  deliver(url: string, body: string): Message {
    return this.#add(this.#queue(url), body, undefined, undefined);
  }

  depth(url: string): { visible: number; delayed: number; inFlight: number } {
    const queue = this.#queue(url);
    this.#surface(queue);
    let [visible, delayed, inFlight] = [0, 0, 0];
    for (const message of queue.messages.values()) {
      if (message.visibleAtMs <= this.#world.now()) visible++;
      else if (message.receiptHandle) inFlight++;
      else delayed++;
    }
    return { visible, delayed, inFlight };
  }

  /** The bodies of what a queue holds, visible or not. */
  bodies(url: string): string[] {
    return [...this.#queue(url).messages.values()].map((message) => message.body);
  }

  snapshot(): object {
    return [...this.queues.values()].map((queue) => ({
      name: queue.name,
      ...this.depth(queue.url),
      messages: [...queue.messages.values()].map(({ id, body, receiveCount, visibleAtMs }) => ({
        id,
        body,
        receiveCount,
        visibleAtMs,
      })),
    }));
  }

  // --- Sending ---------------------------------------------------------------------------------------------------

  #add(
    queue: Queue,
    body: string,
    delaySeconds: number | undefined,
    attributes: Record<string, MessageAttributeValue> | undefined,
  ): Message {
    const now = this.#world.now();
    const message: Message = {
      id: this.#world.random.uuid(),
      body,
      attributes: attributes ?? {},
      sentAtMs: now,
      visibleAtMs: now + 1000 * (delaySeconds ?? Number(queue.attributes.DelaySeconds)),
      version: 0,
      receiveCount: 0,
      firstReceivedAtMs: 0,
      receiptHandle: undefined,
      deleted: false,
    };
    queue.messages.set(message.id, message);
    this.#schedule(queue, message);
    return message;
  }

  /** Puts a message where its `visibleAtMs` says, and wakes the long polls. */
  #schedule(queue: Queue, message: Message): void {
    message.version++;
    if (message.visibleAtMs <= this.#world.now()) queue.ready.push(message);
    else
      queue.waiting.push({
        message,
        version: message.version,
        atMs: message.visibleAtMs,
        order: this.#order++,
      });
    for (const wake of [...queue.pollers]) wake();
  }

  /** Moves what has become visible to `ready`, and drops what is older than the retention period. */
  #surface(queue: Queue): void {
    const now = this.#world.now();
    for (let top = queue.waiting.peek(); top && top.atMs <= now; top = queue.waiting.peek()) {
      queue.waiting.pop();
      if (!top.message.deleted && top.version === top.message.version) queue.ready.push(top.message);
    }
    const retentionMs = 1000 * Number(queue.attributes.MessageRetentionPeriod);
    for (const message of queue.messages.values()) {
      if (message.sentAtMs + retentionMs > now) break; // oldest first, but for what a redrive has moved
      this.#remove(queue, message);
    }
  }

  // --- Receiving -------------------------------------------------------------------------------------------------

  async #receive(input: ReceiveMessageRequest, signal: AbortSignal | undefined): Promise<object> {
    const queue = this.#queue(input.QueueUrl);
    const max = input.MaxNumberOfMessages ?? 1;
    if (!Number.isInteger(max) || max < 1 || max > 10)
      throw invalid(max, "MaxNumberOfMessages", "Must be between 1 and 10, if provided.");
    const waitSeconds = input.WaitTimeSeconds ?? Number(queue.attributes.ReceiveMessageWaitTimeSeconds);
    if (waitSeconds < 0 || waitSeconds > 20)
      throw invalid(waitSeconds, "WaitTimeSeconds", "Must be >= 0 and <= 20, if provided.");
    const visibilitySeconds = input.VisibilityTimeout ?? Number(queue.attributes.VisibilityTimeout);
    checkVisibility(visibilitySeconds);
    const wanted: string[] = [...(input.MessageSystemAttributeNames ?? []), ...(input.AttributeNames ?? [])];
    for (const name of wanted)
      if (!SYSTEM_ATTRIBUTES.has(name)) throw new AwsError("InvalidAttributeName", `Unknown Attribute ${name}.`);

    const endMs = this.#world.now() + 1000 * waitSeconds;
    for (;;) {
      const messages = this.#take(queue, max, visibilitySeconds);
      if (messages.length > 0)
        return { Messages: messages.map((message) => describe(message, wanted, input.MessageAttributeNames)) };
      if (this.#world.now() >= endMs) return {};
      await this.#wait(queue, endMs, signal);
    }
  }

  /** Until a message comes or becomes visible, `endMs`, or the caller gives up. */
  async #wait(queue: Queue, endMs: number, signal: AbortSignal | undefined): Promise<void> {
    if (signal?.aborted) throw signal.reason;
    const untilMs = Math.min(endMs, queue.waiting.peek()?.atMs ?? endMs);
    const timer = new AbortController();
    const woken = Promise.withResolvers<void>();
    const abort = () => woken.reject(signal?.reason);
    queue.pollers.add(woken.resolve);
    signal?.addEventListener("abort", abort, { once: true });
    // The sleep's own rejection is the wake-up's doing, and says nothing.
    this.#world.clock.sleep(Math.max(0, untilMs - this.#world.now()), timer.signal).then(woken.resolve, () => undefined);
    try {
      await woken.promise;
    } finally {
      queue.pollers.delete(woken.resolve);
      signal?.removeEventListener("abort", abort);
      timer.abort();
    }
  }

  #take(queue: Queue, max: number, visibilitySeconds: number): Message[] {
    this.#surface(queue);
    const { random, account } = this.#world;
    const { duplicates, reorder, partialReceives } = this.unreliability;
    const now = this.#world.now();
    const ready = [...new Set(queue.ready)].filter((message) => !message.deleted && message.visibleAtMs <= now);
    queue.ready = [];
    if (ready.length === 0) return [];
    if (this.#inFlight(queue) >= this.maxInFlight) {
      queue.ready = ready;
      throw new AwsError("OverLimit", `The queue ${queue.name} has too many messages in flight (account ${account})`, 403);
    }
    if (random.chance(reorder)) shuffle(ready, () => random.next());
    const limit = random.chance(partialReceives) ? random.between([1, Math.max(1, Math.min(max, ready.length) - 1)]) : max;
    const taken: Message[] = [];
    for (const message of ready) {
      if (taken.length >= limit) {
        queue.ready.push(message);
        continue;
      }
      if (this.#redrive(queue, message)) continue;
      message.receiveCount++;
      if (message.receiveCount === 1) message.firstReceivedAtMs = now;
      message.receiptHandle = `AQEB${random.hex(32)}-${message.id}-${message.receiveCount}`;
      queue.receipts.set(message.receiptHandle, message);
      taken.push({ ...message });
      if (!random.chance(duplicates)) message.visibleAtMs = now + 1000 * visibilitySeconds;
      this.#schedule(queue, message);
    }
    return taken;
  }

  #inFlight(queue: Queue): number {
    if (queue.messages.size < this.maxInFlight) return 0;
    return this.depth(queue.url).inFlight;
  }

  /** At the receive that would exceed maxReceiveCount, the message goes to the dead-letter queue instead. */
  #redrive(queue: Queue, message: Message): boolean {
    const policy = queue.attributes.RedrivePolicy;
    if (!policy) return false;
    const { deadLetterTargetArn, maxReceiveCount } = JSON.parse(policy) as Record<string, string>;
    if (message.receiveCount < Number(maxReceiveCount)) return false;
    const target = [...this.queues.values()].find((candidate) => candidate.arn === deadLetterTargetArn);
    if (!target) return false;
    queue.messages.delete(message.id);
    message.deleted = true;
    // Its ID, its age and its count of receives go with it.
    const moved: Message = {
      ...message,
      deleted: false,
      receiptHandle: undefined,
      visibleAtMs: this.#world.now(),
      version: 0,
    };
    target.messages.set(moved.id, moved);
    this.#schedule(target, moved);
    this.#world.record("dead letter", [message.id], undefined, queue.name);
    return true;
  }

  // --- Deleting, leases ------------------------------------------------------------------------------------------

  /** A receipt handle of an earlier receive is accepted, and deletes nothing. */
  #delete(queue: Queue, handle: string): void {
    const message = this.#byReceipt(queue, handle);
    if (message.receiptHandle === handle) this.#remove(queue, message);
  }

  #remove(queue: Queue, message: Message): void {
    message.deleted = true;
    queue.messages.delete(message.id);
  }

  #changeVisibility(queue: Queue, handle: string, seconds: number | undefined): void {
    if (seconds === undefined)
      throw new AwsError("MissingParameter", "The request must contain the parameter VisibilityTimeout.");
    checkVisibility(seconds);
    const message = this.#byReceipt(queue, handle);
    if (message.deleted || message.receiptHandle !== handle)
      throw new AwsError(
        "InvalidParameterValue",
        `Value ${handle} for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not available for visibility timeout change.`,
      );
    const now = this.#world.now();
    if (message.visibleAtMs <= now)
      throw new AwsError(
        "MessageNotInflight",
        "The specified message isn't in flight.",
        400,
        "AWS.SimpleQueueService.MessageNotInflight",
      );
    // The sum of all extensions of one receive is bounded by 12 hours from it; nothing here holds on that long.
    message.visibleAtMs = now + 1000 * seconds;
    this.#schedule(queue, message);
  }

  #byReceipt(queue: Queue, handle: string): Message {
    if (!/^AQEB[0-9a-f]{32}-[0-9a-f-]{36}-\d+$/.test(handle))
      throw new AwsError("ReceiptHandleIsInvalid", "The input receipt handle is invalid.", 404);
    const message = queue.receipts.get(handle);
    if (!message) throw new AwsError("ReceiptHandleIsInvalid", "The input receipt handle is invalid.", 404);
    return message;
  }

  #queue(url: string | undefined): Queue {
    const queue = this.queues.get(url ?? "");
    if (!queue) throw nonExistent();
    return queue;
  }
}

// --- Rules of single requests --------------------------------------------------------------------------------------

function nonExistent(): AwsError {
  return new AwsError("QueueDoesNotExist", "The specified queue does not exist.", 400, "AWS.SimpleQueueService.NonExistentQueue");
}

function invalid(value: unknown, parameter: string, reason: string): AwsError {
  return new AwsError("InvalidParameterValue", `Value ${String(value)} for parameter ${parameter} is invalid. Reason: ${reason}`);
}

function checkAttribute(key: string, value: string): void {
  const numeric = NUMBERS[key];
  if (!numeric && !TEXTS.has(key)) throw new AwsError("InvalidAttributeName", `Unknown Attribute ${key}.`);
  const refuse = () => new AwsError("InvalidAttributeValue", `Invalid value for the parameter ${key}.`);
  if (numeric) {
    const [, least, most] = numeric;
    if (!/^\d+$/.test(value) || Number(value) < least || Number(value) > most) throw refuse();
  }
  if (key === "RedrivePolicy" && value !== "") {
    const policy: unknown = JSON.parse(value);
    if (typeof policy !== "object" || policy === null) throw refuse();
    const { deadLetterTargetArn, maxReceiveCount } = policy as Record<string, unknown>;
    const count = Number(maxReceiveCount);
    if (typeof deadLetterTargetArn !== "string" || !(count >= 1 && count <= 1000)) throw refuse();
  }
}

function checkVisibility(seconds: number): void {
  if (!Number.isInteger(seconds) || seconds < 0 || seconds > 43_200)
    throw invalid(seconds, "VisibilityTimeout", "VisibilityTimeout must be an integer between 0 and 43200.");
}

interface Sendable {
  MessageBody?: string;
  DelaySeconds?: number;
  MessageAttributes?: Record<string, MessageAttributeValue>;
}

function sizeOf(entry: Sendable): number {
  let bytes = Buffer.byteLength(entry.MessageBody ?? "");
  for (const [name, value] of Object.entries(entry.MessageAttributes ?? {}))
    bytes += Buffer.byteLength(name + (value.DataType ?? "") + (value.StringValue ?? ""));
  return bytes;
}

/** The body; throws where SendMessage is refused. */
function checkMessage(entry: Sendable): string {
  const body = entry.MessageBody ?? "";
  if (body.length === 0) throw new AwsError("MissingParameter", "The request must contain the parameter MessageBody.");
  if (!/^[\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]*$/u.test(body))
    throw new AwsError(
      "InvalidMessageContents",
      "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF",
    );
  if (sizeOf(entry) > MAX_BYTES)
    throw new AwsError(
      "InvalidParameterValue",
      `One or more parameters are invalid. Reason: Message must be shorter than ${MAX_BYTES} bytes.`,
    );
  const delay = entry.DelaySeconds ?? 0;
  if (!Number.isInteger(delay) || delay < 0 || delay > 900)
    throw invalid(delay, "DelaySeconds", "DelaySeconds must be >= 0 and <= 900.");
  const attributes = Object.entries(entry.MessageAttributes ?? {});
  if (attributes.length > 10)
    throw new AwsError("InvalidParameterValue", "Number of message attributes [11] exceeds the allowed maximum [10].");
  for (const [name, value] of attributes)
    if (!value.DataType || !/^(String|Number|Binary)(\..+)?$/.test(value.DataType))
      throw new AwsError(
        "InvalidParameterValue",
        `The message attribute '${name}' has an invalid message attribute type, the set of supported type prefixes is Binary, Number, and String.`,
      );
  return body;
}

function checkBatch<T extends { Id: string | undefined }>(entries: T[] | undefined, name: string): (T & { Id: string })[] {
  const batch = (entries ?? []) as (T & { Id: string })[];
  if (batch.length === 0)
    throw new AwsError(
      "EmptyBatchRequest",
      `There should be at least one ${name} in the request.`,
      400,
      "AWS.SimpleQueueService.EmptyBatchRequest",
    );
  if (batch.length > 10)
    throw new AwsError(
      "TooManyEntriesInBatchRequest",
      `Maximum number of entries per request are 10. You have sent ${batch.length}.`,
      400,
      "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    );
  const seen = new Set<string>();
  for (const { Id } of batch) {
    if (!/^[A-Za-z0-9_-]{1,80}$/.test(Id))
      throw new AwsError(
        "InvalidBatchEntryId",
        "A batch entry id can only contain alphanumeric characters, hyphens and underscores. It can be at most 80 letters long.",
        400,
        "AWS.SimpleQueueService.InvalidBatchEntryId",
      );
    if (seen.has(Id))
      throw new AwsError(
        "BatchEntryIdsNotDistinct",
        `Id ${Id} repeated.`,
        400,
        "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
      );
    seen.add(Id);
  }
  return batch;
}

/** In a batch each entry stands for itself: what a single request would throw is an entry of Failed. */
function eachEntry<T extends { Id: string }>(
  entries: T[],
  act: (entry: T) => object,
): { Successful: object[]; Failed: Failure[] } {
  const Successful: object[] = [];
  const Failed: Failure[] = [];
  for (const entry of entries) {
    try {
      Successful.push(act(entry));
    } catch (error) {
      if (!(error instanceof AwsError)) throw error;
      Failed.push({ Id: entry.Id, SenderFault: true, Code: error.Code, Message: error.message });
    }
  }
  return { Successful, Failed };
}

function describe(message: Message, wanted: string[], attributeNames: string[] | undefined): object {
  const system: Record<string, string> = {
    SenderId: "AIDAEXAMPLE",
    SentTimestamp: String(message.sentAtMs),
    ApproximateReceiveCount: String(message.receiveCount),
    ApproximateFirstReceiveTimestamp: String(message.firstReceivedAtMs),
  };
  const chosen = Object.entries(system).filter(([key]) => wanted.includes("All") || wanted.includes(key));
  const names = attributeNames ?? [];
  const own = Object.entries(message.attributes).filter(
    ([key]) =>
      names.includes("All") ||
      names.includes(key) ||
      names.some((name) => name.endsWith(".*") && key.startsWith(name.slice(0, -1))),
  );
  return {
    MessageId: message.id,
    ReceiptHandle: message.receiptHandle,
    MD5OfBody: md5(message.body),
    Body: message.body,
    ...(chosen.length > 0 && { Attributes: Object.fromEntries(chosen) }),
    ...(own.length > 0 && { MessageAttributes: Object.fromEntries(own) }),
  };
}

function md5(text: string): string {
  return createHash("md5").update(text).digest("hex");
}

function shuffle<T>(items: T[], next: () => number): void {
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(next() * (i + 1));
    const [a, b] = [items[i] as T, items[j] as T];
    items[i] = b;
    items[j] = a;
  }
}

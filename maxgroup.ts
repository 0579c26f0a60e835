/*
 * max_group replaces the interrupted spot instances of Auto Scaling groups before they die.
 *
 *   max_group -b BUCKET -r REGION          configuration and license from s3://BUCKET/
 *   max_group -t -r REGION                 from ./conf, against a loopback AWS_ENDPOINT_URL only
 *
 * AWS gives two minutes' notice. In them max_group launches a replacement from the group's own launch
 * template, attaches it, and detaches the old instance once the new one is in service, so that the group's
 * capacity never dips. It keeps no state of its own: what is to be done lives in three SQS queues, what was
 * done in tags, so it can be killed at any point, started again, and run twice.
 *
 * The file reads top to bottom as data flows: flags, config, log, effects, pacing and batching, the cloud as
 * we see it, notices, the handler table, the loop, the steps (with volumes, Kubernetes and Consul), the
 * instance manager, preaction, start-up checks, main.
 */
import { createHash, createPublicKey, verify } from "node:crypto";
import { closeSync, existsSync, openSync, readdirSync, readFileSync, statSync, writeSync } from "node:fs";
import type { RequestOptions } from "node:https";
import { dirname, resolve } from "node:path";
import { setTimeout as setTimer } from "node:timers/promises";
import {
  type Activity,
  AttachInstancesCommand,
  AutoScalingClient,
  type AutoScalingGroup,
  type AutoScalingInstanceDetails,
  CreateOrUpdateTagsCommand,
  DeleteTagsCommand,
  DescribeAutoScalingGroupsCommand,
  DescribeAutoScalingInstancesCommand,
  DescribeLifecycleHooksCommand,
  DescribeScalingActivitiesCommand,
  DetachInstancesCommand,
  type LaunchTemplateSpecification,
  SetInstanceProtectionCommand,
  TerminateInstanceInAutoScalingGroupCommand,
  UpdateAutoScalingGroupCommand,
} from "@aws-sdk/client-auto-scaling";
import {
  type _InstanceType,
  AttachVolumeCommand,
  CreateFleetCommand,
  type CreateFleetCommandInput,
  CreateSnapshotCommand,
  CreateTagsCommand,
  CreateVolumeCommand,
  DescribeInstancesCommand,
  DescribeInstanceTypeOfferingsCommand,
  DescribeLaunchTemplateVersionsCommand,
  DescribeSnapshotsCommand,
  DescribeSubnetsCommand,
  DescribeVolumesCommand,
  type Snapshot as EbsSnapshot,
  EC2Client,
  type Volume as Ec2Volume,
  type Filter,
  type FleetLaunchTemplateOverridesRequest,
  GetInstanceTypesFromInstanceRequirementsCommand,
  type GetInstanceTypesFromInstanceRequirementsCommandInput,
  type Instance,
  type InstanceNetworkInterfaceSpecification,
  type InstanceRequirementsRequest,
  ModifyInstanceAttributeCommand,
  RunInstancesCommand,
  type RunInstancesCommandInput,
  TerminateInstancesCommand,
} from "@aws-sdk/client-ec2";
import { DescribeTargetHealthCommand, ElasticLoadBalancingV2Client } from "@aws-sdk/client-elastic-load-balancing-v2";
import { GetObjectCommand, S3Client } from "@aws-sdk/client-s3";
import {
  ChangeMessageVisibilityBatchCommand,
  DeleteMessageBatchCommand,
  GetQueueAttributesCommand,
  type Message,
  ReceiveMessageCommand,
  SendMessageBatchCommand,
  SQSClient,
} from "@aws-sdk/client-sqs";
import { partition } from "@aws-sdk/core/client";
import type { KubeConfig } from "@kubernetes/client-node";
import { Hash } from "@smithy/core/serde";
import { SignatureV4 } from "@smithy/signature-v4";
import { findNodeAtLocation, type Node, type ParseError, parseTree, printParseErrorCode } from "jsonc-parser";
import * as v from "valibot";
import pkg from "./package.json" with { type: "json" };

// ─── Flags ───────────────────────────────────────────────────────────────────────────────────────────────
// The manual's flags, spelled as Go spells them: -r x, -r=x, --r x. What is missing or unknown is named,
// followed by the usage text on standard error, and the exit code is 2.

export const USAGE = `  -K string
    \tk8s config file path
  -b string
    \tS3 bucket for storing the MaxGroup config
  -k string
    \t[optional] the key of your credential
  -l string
    \t[optional] the log file
  -p string
    \t[optional] the password of your credential
  -r string
    \tthe region name
  -t\t[optional] local test mode
  -v\tcurrent version
`;

export type Flags = {
  K?: string;
  b?: string;
  k?: string;
  l?: string;
  p?: string;
  r?: string;
  t: boolean;
  v: boolean;
};

/** Reads the arguments after the program's name; a string is what is wrong with them, an empty one asks for help. */
export function parseFlags(args: string[]): Flags | string {
  const flags: Flags = { t: false, v: false };
  for (let i = 0; i < args.length; i++) {
    const arg = args[i] ?? "";
    if (arg === "--" && i === args.length - 1) break;
    const [, name, given] = /^--?([^-=][^=]*)(?:=(.*))?$/s.exec(arg) ?? [];
    if (name === undefined) return `unexpected argument "${arg}"`;
    if (name === "h" || name === "help") return "";
    if (name === "t" || name === "v") {
      const value = /^(?:(1|t|true)|(0|f|false))$/i.exec(given ?? "true");
      if (!value) return `invalid boolean value "${given}" for -${name}`;
      flags[name] = value[1] !== undefined;
    } else if (name === "K" || name === "b" || name === "k" || name === "l" || name === "p" || name === "r") {
      const value = given ?? args[++i];
      if (value === undefined) return `flag needs an argument: -${name}`;
      flags[name] = value;
    } else return `flag provided but not defined: -${name}`;
  }
  if (flags.v) return flags;
  if (!flags.r) return "region is required.";
  if (!flags.b && !flags.t) return "S3 bucket is required.";
  if (!flags.k !== !flags.p) return "-k and -p go together: an access key and its secret.";
  return flags;
}

// ─── Config ──────────────────────────────────────────────────────────────────────────────────────────────
// service_config.json crosses the border here, once. Every fault is reported, not the first: path, line,
// what was found, what is allowed; an unknown key gets the nearest known name, because a misspelt option
// that is silently ignored costs machines.

const wholeNumber = (min: number, max: number) =>
  v.custom<number>(
    (x) => typeof x === "number" && Number.isInteger(x) && x >= min && x <= max,
    `a whole number from ${min} to ${max}`,
  );
const flag = () => v.custom<boolean>((x) => typeof x === "boolean", "true or false");
const text = (allowed: string, pattern = /./) => v.custom<string>((x) => typeof x === "string" && pattern.test(x), allowed);
const port = v.pipe(
  v.custom<number | string>(
    (x) =>
      (typeof x === "number" || (typeof x === "string" && /^\d+$/.test(x))) &&
      Number.isInteger(Number(x)) &&
      Number(x) >= 1 &&
      Number(x) <= 65535,
    'a port from 1 to 65535, as a number or in quotes ("8500")',
  ),
  v.transform(Number),
);
const WEEK_SECONDS = 7 * 24 * 3600;

/** Options of a group, as in the README's table; each may also stand on the group as a tag spotmax:OPTION. */
const GROUP_OPTIONS = {
  detaching_delay_seconds: v.optional(wholeNumber(0, 900), 20),
  max_num_of_terminated_one_time: v.optional(wholeNumber(1, 10_000), 1),
  preaction_termination_delay_seconds: v.optional(wholeNumber(0, WEEK_SECONDS), 10),
  preaction_detach_delay_seconds: v.optional(wholeNumber(0, WEEK_SECONDS), 10),
  is_enable_preaction: v.optional(flag(), false),
  persistence_dev: v.optional(
    text("a device name such as /dev/sdf, and not /dev/sdz, where moved data goes", /^\/dev\/(?!sdz$|xvdz$)\w+$/),
  ),
  consul_port: v.optional(port),
  k8s_node_drain_option: v.optional(flag(), false),
  is_enable_od_fallback: v.optional(flag(), true),
  od_least_live_mins: v.optional(wholeNumber(0, 60 * 24 * 365), 15),
  k8s_node_drain_grace_second: v.optional(wholeNumber(0, WEEK_SECONDS), 300),
  k8s_config_file_path: v.optional(text("the path of a kubeconfig file")),
  is_to_handle_rebalance_event: v.optional(flag(), false),
  is_to_handle_maintenance_event: v.optional(flag(), false),
  ignore_tag: v.optional(flag(), false),
};
const ALT = /^alt[1-9]\d*$/;
const INSTANCE_TYPE = /^[a-z][a-z0-9-]*\.[a-z0-9-]+$/;

/** The known name that is fewest edits away, if it is near enough to be what was meant. */
export function nearest(name: string, known: string[]): string | undefined {
  const distance = (a: string, b: string) => {
    let row = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i++) {
      const above = row;
      row = [i];
      for (let j = 1; j <= b.length; j++)
        row[j] = Math.min((above[j] ?? 0) + 1, (row[j - 1] ?? 0) + 1, (above[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    return row[b.length] ?? 0;
  };
  const longer = known.find((k) => name.length > 3 && k.startsWith(name));
  if (longer) return longer;
  const [best] = known.map((k) => ({ k, d: distance(name, k) })).sort((x, y) => x.d - y.d);
  return best && best.d <= Math.max(2, name.length / 3) ? best.k : undefined;
}

const isObject = (x: unknown): x is Record<string, unknown> => typeof x === "object" && x !== null && !Array.isArray(x);

/** An object that refuses keys it does not know; valibot's own strictObject stops at the first of them. */
function closed<E extends v.ObjectEntries>(entries: E, also?: { key: RegExp; value: RegExp; allowed: string }) {
  return v.pipe(
    v.custom<Record<string, unknown>>(isObject, "an object"),
    v.looseObject(entries, "an object"),
    v.rawCheck(({ dataset, addIssue }) => {
      const input: unknown = dataset.value;
      if (!isObject(input)) return;
      for (const [key, value] of Object.entries(input)) {
        if (Object.hasOwn(entries, key)) continue;
        const near = nearest(key, Object.keys(entries));
        let message = `no such key${near ? `; did you mean "${near}"?` : `; known here: ${Object.keys(entries).join(", ")}`}`;
        if (also?.key.test(key)) {
          if (typeof value === "string" && also.value.test(value)) continue;
          message = also.allowed;
        }
        addIssue({
          message,
          input: value,
          path: [{ type: "object", origin: "key", input, key, value }],
        });
      }
    }),
  );
}

const intervalMinutes = wholeNumber(0, 60 * 24 * 7);
const queueKeys = {
  // A FIFO queue delays no single message.
  queue_url: text("a standard queue's URL, as `aws sqs get-queue-url` prints it", /^https?:\/\/[^/]+\/.+(?<!\.fifo)$/),
  visibility_timeout_seconds: v.optional(wholeNumber(10, 43_200), 61),
  max_number_of_messages: v.optional(wholeNumber(1, 10), 10),
  wait_time_seconds: v.optional(wholeNumber(0, 20), 20),
};
const groupSchema = v.pipe(
  v.custom<Record<string, unknown>>(isObject, "an object"),
  v.transform((x) => {
    // The manual spells this option both ways; two spellings at once would hide one of the values.
    const { dettaching_delay_seconds: twice, ...rest } = x;
    return twice === undefined || "detaching_delay_seconds" in rest ? x : { ...rest, detaching_delay_seconds: twice };
  }),
  closed({ ...GROUP_OPTIONS }, { key: ALT, value: INSTANCE_TYPE, allowed: "an instance type such as m5.large" }),
  v.transform((options) => {
    const alts = Object.entries(options).filter(([key]) => ALT.test(key));
    return { ...options, alt: alts.sort(([a], [b]) => Number(a.slice(3)) - Number(b.slice(3))).map(([, type]) => String(type)) };
  }),
);
// Others are refused by AWS, and with them the call that asks for many groups at once.
const groupName = text("the name of an Auto Scaling group, of 1 to 255 characters", /^.{1,255}$/s);
const ServiceConfig = closed({
  system: v.optional(
    closed({
      log_level: v.optional(v.picklist(["debug", "info", "warn", "warning", "error"], "one of debug, info, warn, error")),
      listen: v.optional(
        v.custom<string>((x) => typeof x === "string" && Number(/:(\d+)$/.exec(x)?.[1] ?? 65536) < 65536, "HOST:PORT"),
      ),
      config_refresh_seconds: v.optional(wholeNumber(0, 86_400), 60),
      webhook_url: v.optional(text("an http(s) URL", /^https?:\/\//)),
      spot_advisor_url: v.optional(text("an http(s) URL", /^https?:\/\//)),
    }),
    {},
  ),
  global: closed({
    interruption_evt_sqs: closed({ ...queueKeys, preaction_snapshot_interval_minutes: v.optional(intervalMinutes) }),
    detach_evt_sqs: closed(queueKeys),
    termination_evt_sqs: closed(queueKeys),
    preaction_snapshot_interval_minutes: v.optional(intervalMinutes),
  }),
  groups: v.record(groupName, groupSchema, "an object that names at least one Auto Scaling group"),
});

export type QueueName = "interruption_evt_sqs" | "detach_evt_sqs" | "termination_evt_sqs";
export const QUEUES: QueueName[] = ["interruption_evt_sqs", "detach_evt_sqs", "termination_evt_sqs"];
export type Config = v.InferOutput<typeof ServiceConfig>;
export type GroupOptions = v.InferOutput<typeof groupSchema>;

/** Every fault of a file at once; the message is for people and ends the program. */
export class ConfigError extends Error {}

/**
 * service_config.json as text to the checked configuration with its defaults.
 * Throws ConfigError with one line a fault.
 */
export function parseConfig(json: string, file = "service_config.json"): Config {
  const errors: ParseError[] = [];
  const clean = json.replace(/^\uFEFF/, "");
  // Each level is a call within a call in whatever reads it below.
  if (depthOf(clean) > 100) throw new ConfigError(`${file} is nested too deeply: more than 100 levels`);
  const tree = parseTree(clean, errors, { disallowComments: true });
  const lineOf = (offset: number) => clean.slice(0, offset).split("\n").length;
  const columnOf = (offset: number) => offset - clean.lastIndexOf("\n", offset - 1);
  const [first] = errors;
  if (first || !tree) {
    const what = printParseErrorCode(first?.error ?? 4)
      .replace(/([a-z])([A-Z])/g, "$1 $2")
      .toLowerCase();
    throw new ConfigError(
      `${file} is not valid JSON: ${what} at line ${lineOf(first?.offset ?? 0)}, column ${columnOf(first?.offset ?? 0)}`,
    );
  }
  const parsed = v.safeParse(ServiceConfig, JSON.parse(clean));
  const fault = (path: string[], rule: string) => {
    const node = findNodeAtLocation(tree, path);
    const found = node ? `is ${clean.slice(node.offset, node.offset + node.length).slice(0, 80)}` : "is missing";
    return `${path.join(".") || "the file"}${node ? ` (line ${lineOf(node.offset)})` : ""} ${found}${rule}`;
  };
  const faults = (parsed.issues ?? []).map((issue) => {
    const path = (issue.path ?? []).map((p) => String(p.key));
    // Under the spelling that stands in the file.
    const spelled = path.map((key) => (key === "detaching_delay_seconds" ? "dettaching_delay_seconds" : key));
    const known = !findNodeAtLocation(tree, path) && findNodeAtLocation(tree, spelled) ? spelled : path;
    if (issue.message.startsWith("no such key")) return fault(known, `: ${issue.message}`);
    const isBare = issue.input === undefined && issue.message === "an object";
    return fault(known, isBare ? "" : `: must be ${issue.message}`);
  });
  faults.push(...hidden(tree).map(([path, rule]) => fault(path, rule)));
  const valueAt = (path: string[]): unknown => findNodeAtLocation(tree, path)?.value;
  const urls = QUEUES.map((name) => valueAt(["global", name, "queue_url"])).filter((url) => url !== undefined);
  if (new Set(urls).size < urls.length) faults.push("global: the three queues must be three different queues");
  if (findNodeAtLocation(tree, ["groups"])?.children?.length === 0)
    faults.push('groups is empty: name at least one Auto Scaling group, such as "web": {}');
  if (!parsed.success || faults.length) {
    const more = faults.length > 100 ? [`and ${faults.length - 100} more`] : [];
    const lines = [...faults.slice(0, 100), ...more].map((f) => `  ${f}`);
    throw new ConfigError(`${file} has ${faults.length} fault${faults.length === 1 ? "" : "s"}:\n${lines.join("\n")}`);
  }
  return parsed.output;
}
/** How deeply brackets stand in brackets, strings left out; at least that where it is no JSON. */
function depthOf(json: string): number {
  let [depth, most] = [0, 0];
  for (const c of json.replace(/"(?:\\.|[^"\\])*"?/gs, "")) {
    if (c === "[" || c === "{") most = Math.max(most, ++depth);
    else if (c === "]" || c === "}") depth--;
  }
  return most;
}
/** Keys that valibot and JSON.parse pass over in silence, wherever they stand, and what is wrong with them. */
function hidden(node: Node, path: string[] = []): [path: string[], rule: string][] {
  const names = new Set<unknown>();
  return (node.children ?? []).flatMap((child, i) => {
    const [key, value] = child.type === "property" ? (child.children ?? []) : [undefined, child];
    const here = key ? [...path, String(key.value)] : node.type === "array" ? [...path, String(i)] : path;
    const found: [string[], string][] = [];
    if (key && /^(__proto__|prototype|constructor)$/.test(String(key.value))) found.push([here, ": no such key"]);
    else if (key && names.has(key.value)) found.push([here, ": this key stands twice in one object"]);
    names.add(key?.value);
    return [...found, ...(value ? hidden(value, here) : [])];
  });
}

/** The interval for preaction snapshots, from the two places in which the manual shows it; the one in `global` wins. */
export function snapshotIntervalMinutes({ global }: Config): number {
  return global.preaction_snapshot_interval_minutes ?? global.interruption_evt_sqs.preaction_snapshot_interval_minutes ?? 0;
}

/** A group's options with the group's own spotmax:OPTION tags laid over them; faults come back as text and change nothing. */
export function withTags(options: GroupOptions, tags: Record<string, string>): { options: GroupOptions; faults: string[] } {
  if (options.ignore_tag) return { options, faults: [] };
  const faults: string[] = [];
  const result: Record<string, unknown> = { ...options };
  const alts = new Map(options.alt.map((type, i) => [i + 1, type]));
  for (const [key, value] of Object.entries(tags)) {
    const spelled = /^spotmax:([a-z0-9_]+)$/.exec(key)?.[1];
    const name = spelled === "dettaching_delay_seconds" ? "detaching_delay_seconds" : spelled;
    // Whoever may tag a group must not point the daemon at a file of its own host.
    if (!name || RESERVED_TAGS.has(key) || name === "k8s_config_file_path" || name === "ignore_tag") continue;
    if (ALT.test(name)) {
      if (INSTANCE_TYPE.test(value)) alts.set(Number(name.slice(3)), value);
      else faults.push(`tag ${key} is "${value}": must be an instance type such as m5.large`);
      continue;
    }
    if (!Object.hasOwn(GROUP_OPTIONS, name)) {
      faults.push(`tag ${key} is no option of a group`);
      continue;
    }
    const plain = /^\d+$/.test(value) ? Number(value) : value === "true" ? true : value === "false" ? false : value;
    const checked = v.safeParse(GROUP_OPTIONS[name as keyof typeof GROUP_OPTIONS], plain);
    if (checked.success) result[name] = checked.output;
    else faults.push(`tag ${key} is "${value}": must be ${checked.issues[0].message}`);
  }
  const alt = [...alts].sort(([a], [b]) => a - b).map(([, type]) => type);
  return { options: { ...(result as GroupOptions), alt }, faults };
}

/**
 * Checks license.txt against the build's public key (32 raw bytes, base64). `License:` is an Ed25519 signature
 * (base64) over the other `Key:Value` lines, sorted and joined by newlines. Returns what is wrong, if anything.
 */
export function licenseFault(license: string, publicKey: string, now: number): string | undefined {
  const lines = license
    .split(/\r?\n/)
    .map((line) => line.trim())
    .filter(Boolean);
  const signature = lines
    .find((line) => line.startsWith("License:"))
    ?.slice("License:".length)
    .trim();
  if (!signature) return "license.txt has no line License:SIGNATURE; ask your distributor for a signed one";
  const signed = lines
    .filter((line) => !line.startsWith("License:"))
    .sort()
    .join("\n");
  const key = createPublicKey({
    key: { kty: "OKP", crv: "Ed25519", x: Buffer.from(publicKey, "base64").toString("base64url") },
    format: "jwk",
  });
  if (!verify(null, Buffer.from(signed), key, Buffer.from(signature, "base64")))
    return "the signature in license.txt does not fit its lines: it was changed, or signed for another build";
  const expires = /^Expires:\s*(\d{4}-\d\d-\d\d)\s*$/m.exec(signed)?.[1];
  if (expires && now >= Date.parse(expires) + 86_400_000)
    return `the license ended on ${expires}; ask your distributor for a new one`;
}

// ─── Log ─────────────────────────────────────────────────────────────────────────────────────────────────
// One line an event: `INFO[0001] message key=value` for people at a terminal, logfmt for machines. Every line
// of a replacement carries group, instance and notice, so that one grep tells its story.

const LEVELS = ["debug", "info", "warn", "error"] as const;
export type Level = (typeof LEVELS)[number];
type Fields = Record<string, string | number | boolean | undefined>;
export type Log = Record<Level, (message: string, fields?: Fields) => void> & {
  with: (fields: Fields) => Log;
};

export function formatLine(level: Level, message: string, fields: Fields, nowMs: number, startMs: number, tty: boolean): string {
  const quote = (x: unknown) => (/^[\w.:/@*+,-]+$/.test(String(x)) ? String(x) : JSON.stringify(String(x)));
  const pairs = Object.entries(fields)
    .filter(([, x]) => x !== undefined)
    .map(([k, x]) => ` ${k}=${quote(x)}`)
    .join("");
  if (tty) {
    const seconds = String(Math.floor((nowMs - startMs) / 1000)).padStart(4, "0");
    return `${level.slice(0, 4).toUpperCase().padEnd(4, "U")}[${seconds}] ${message}${pairs}\n`;
  }
  const time = new Date(nowMs).toISOString().replace(/\.\d+Z$/, "Z");
  return `time=${JSON.stringify(time)} level=${level === "warn" ? "warning" : level} msg=${JSON.stringify(message)}${pairs}\n`;
}

/** `write` takes finished lines; `level` is read at every line, so that a refreshed configuration takes effect. */
export function makeLog(write: (line: string) => void, now: () => number, tty: boolean, level: () => Level): Log {
  const startMs = now();
  const bound = (context: Fields): Log => {
    const at =
      (name: Level) =>
      (message: string, fields: Fields = {}) => {
        if (LEVELS.indexOf(name) >= LEVELS.indexOf(level()))
          write(formatLine(name, message, { ...context, ...fields }, now(), startMs, tty));
      };
    return {
      debug: at("debug"),
      info: at("info"),
      warn: at("warn"),
      error: at("error"),
      with: (more) => bound({ ...context, ...more }),
    };
  };
  return bound({});
}

/** `minlevel` of conf/seelog.xml, the manual's file; it counts where `system.log_level` is absent. */
export function seelogLevel(xml: string): Level | undefined {
  const name = /\bminlevel\s*=\s*["'](\w+)["']/.exec(xml.replace(/<!--.*?-->/gs, ""))?.[1]?.toLowerCase();
  if (name === "trace") return "debug";
  return name === "critical" || name === "off" ? "error" : LEVELS.find((level) => level === name);
}

// ─── Effects ─────────────────────────────────────────────────────────────────────────────────────────────
// Everything that reaches outside stands in one object, made in main and faked nowhere but in the simulator.
// The SDK's own retries are off: they sleep on a clock of their own and know nothing of our deadlines.

export type Credentials = Awaited<ReturnType<EC2Client["config"]["credentials"]>>;
export type Sender<Client extends { send: unknown }> = Pick<Client, "send">;
export type Deps = {
  ec2: Sender<EC2Client>;
  autoScaling: Sender<AutoScalingClient>;
  elb: Sender<ElasticLoadBalancingV2Client>;
  s3: Sender<S3Client>;
  /** SQS v3 sends to the queue's own host and warns where that is not the client's: one client a host. */
  sqs: (queueUrl: string) => Sender<SQSClient>;
  /** HTTP to whatever is no AWS service. */
  fetch: (url: string, init?: BunFetchRequestInit) => Promise<Response>;
  /** What a URL is signed with that somebody else is to send; and the region that we work in. */
  credentials: () => Promise<Credentials>;
  region: string;
  /** Milliseconds since 1970. */
  now: () => number;
  /** Rejects when the signal is aborted. */
  sleep: (ms: number, signal?: AbortSignal) => Promise<void>;
  /** 0 <= x < 1 */
  random: () => number;
  log: Log;
};

/** Try the same call again: the service asks for patience, or nobody knows what became of it. */
const RETRYABLE = new Set(
  `Throttling ThrottlingException ThrottledException RequestThrottled RequestThrottledException RequestLimitExceeded
   TooManyRequestsException KmsThrottled SlowDown EC2ThrottledException PriorRequestNotComplete ResourceContention
   ScalingActivityInProgress SnapshotCreationPerVolumeRateExceeded ConcurrentSnapshotLimitExceeded ServiceUnavailable Unavailable InternalError InternalFailure InternalServerError
   ServiceFailure TimeoutError RequestTimeout RequestTimeoutException RequestExpired RequestInTheFuture
   RequestTimeTooSkewed NetworkingError ECONNREFUSED ECONNRESET EPIPE ETIMEDOUT ENOTFOUND EAI_AGAIN ConnectionRefused
   ConnectionClosed FailedToOpenSocket UND_ERR_SOCKET`.split(/\s+/),
);
/** Too fast: nothing of it was done. */
const THROTTLED = /Throttl|RequestLimitExceeded|TooManyRequests/;
/** This choice of pools has nothing for us now: go on with the next one. */
const CAPACITY = new Set(
  `InsufficientInstanceCapacity InsufficientHostCapacity InsufficientReservedInstanceCapacity InsufficientCapacity
   MaxSpotInstanceCountExceeded SpotMaxPriceTooLow VcpuLimitExceeded InstanceLimitExceeded UnfulfillableCapacity
   Unsupported UnsupportedOperation InsufficientFreeAddressesInSubnet MaxFleetCountExceeded`.split(/\s+/),
);
/** Not there: success where absence was wanted, patience just after a launch. */
const NOT_FOUND = new Set(["InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed", "InvalidID"]);

/** The error itself, under whatever it was wrapped in. */
const root = (error: unknown): unknown => (error instanceof Error && error.cause instanceof Error ? root(error.cause) : error);
/** Its name, without the "Fault" that the SDK puts behind some. */
export function errorName(error: unknown): string {
  const at = root(error);
  if (!(at instanceof Error)) return String(at);
  return at.name === "Error" && "code" in at && typeof at.code === "string" ? at.code : at.name.replace(/Fault$/, "");
}
function errorText(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.cause instanceof Error ? `${error.message}: ${errorText(error.cause)}` : error.message || error.name;
}
const status = (error: unknown): number =>
  error instanceof Error
    ? ((error as { $metadata?: { httpStatusCode?: number } }).$metadata?.httpStatusCode ?? status(error.cause))
    : 0;
const isRetryable = (error: unknown) =>
  !CAPACITY.has(errorName(error)) && // some of which come as HTTP 500
  (RETRYABLE.has(errorName(error)) || status(error) >= 500);
/** The instance IDs that an error's own text names, whatever was being done. */
const named = (error: unknown) => errorText(root(error)).match(/\bi-[0-9a-f]{8,17}\b/g) ?? [];

/**
 * AWS's time, ms since 1970, as the first receipts of messages tell it: deadlines and ages are counted in it, for this
 * machine's clock and another daemon's may be apart.
 */
const cloudNow = (ctx: Ctx) => ctx.deps.now() + ctx.state.clockOffsetMs;

/** A receipt is stamped before it arrives, so samples err backwards only: the largest of the last minutes is the best. */
function tellTime({ deps, state }: Ctx, offsetMs: number): void {
  if (offsetMs < state.clockOffsetMs && deps.now() - state.clockToldMs < 300_000) return;
  state.clockOffsetMs = offsetMs;
  state.clockToldMs = deps.now();
}

/** The program is being stopped; what was waiting gives way. */
class Stopped extends Error {}
/** Likewise, and what it was about to ask of AWS has had no effect. */
class Unsent extends Stopped {}

/** Waits, but not beyond the program's own end. */
async function pause(ctx: Ctx, ms: number): Promise<void> {
  try {
    await ctx.deps.sleep(ms, ctx.signal);
  } catch (cause) {
    if (ctx.signal.aborted) throw new Stopped("stopping", { cause });
    throw cause;
  }
}
/**
 * Waits for the next full multiple of a second, so that all who wait wake together and share their reads; in a wave of
 * three, for AWS's request rates are what is short then, except in the last seconds before a deadline. Never beyond the
 * moment at which the old one is let go, whatever its replacement does.
 */
const tick = (ctx: Ctx, deadlineMs = Number.POSITIVE_INFINITY) => {
  const leftMs = deadlineMs - cloudNow(ctx);
  const ms = ctx.state.inHand.size > WAVE && leftMs > 15_000 ? 3_000 : 1_000;
  const nextMs = ms - (ctx.deps.now() % ms);
  return pause(ctx, leftMs > FORCED_MS ? Math.min(nextMs, leftMs - FORCED_MS) : nextMs);
};
/** So long before the deadline the old one is detached whatever its replacement does. */
const FORCED_MS = 5_000;
/** More messages in hand than this are a wave. */
const WAVE = 100;

/** What `run` comes to, or `otherwise` where it fails, which `say` hears of. Only a stop goes through. */
async function orElse<T, O>(run: () => Promise<T>, otherwise: O, say: Log[Level]): Promise<T | O> {
  try {
    return await run();
  } catch (error) {
    if (error instanceof Stopped) throw error;
    say(errorText(error), { error: errorName(error) });
    return otherwise;
  }
}

/** `sent` hears when a call has had its turn and goes out. */
type SendOptions = { abortSignal: AbortSignal; sent: () => void };
/**
 * One AWS call with its own time limit and, unless `tries` is 1, retries with jittered backoff on what RETRYABLE
 * names and on 5xx. Only what may be repeated is repeated: every call here is idempotent by ID, token or state.
 * What has had no effect yet is not tried again once it `isLate`.
 * Throws the last error, wrapped once, beginning with what was being done.
 */
async function aws<T>(
  ctx: Ctx,
  doing: string,
  send: (options: { abortSignal: AbortSignal }) => Promise<T>,
  { tries = 6, timeoutMs = 15_000, isLate = () => false }: { tries?: number; timeoutMs?: number; isLate?: () => boolean } = {},
): Promise<T> {
  let mayBeOut = false;
  for (let attempt = 1; ; attempt++) {
    const limit = new AbortController();
    const done = new AbortController();
    let sentMs: number | undefined;
    const options: SendOptions = {
      abortSignal: limit.signal,
      sent: () => {
        sentMs = ctx.deps.now();
      },
    };
    // An answer that does not come in five seconds mostly does not come at all; the next tries have more patience.
    const patienceMs = tries === 1 ? timeoutMs : Math.min(timeoutMs, timeoutMs > 15_000 ? timeoutMs : 5_000 * attempt);
    const expire = async () => {
      const startMs = ctx.deps.now();
      for (;;) {
        // What waits for its turn has that time still before it.
        const leftMs = (sentMs === undefined ? startMs + timeoutMs : sentMs + patienceMs) - ctx.deps.now();
        if (leftMs <= 0) break;
        await ctx.deps.sleep(Math.min(leftMs, patienceMs), done.signal);
      }
      const late = Object.assign(new Error("no answer in time"), { name: "TimeoutError" });
      limit.abort(late);
      throw late;
    };
    try {
      if (attempt > 1) await pause(ctx, ctx.deps.random() * Math.min(4_000, 75 * 2 ** attempt));
      return await Promise.race([send(options), expire()]);
    } catch (cause) {
      if (cause instanceof Stopped) throw mayBeOut ? cause : new Unsent("stopping", { cause });
      mayBeOut ||= sentMs !== undefined && !THROTTLED.test(errorName(cause));
      if (attempt >= tries || !isRetryable(cause) || (!mayBeOut && isLate())) throw new Error(doing, { cause });
      ctx.deps.log.debug(`${doing}: ${errorText(cause)}; trying again`, { error: errorName(cause), attempt });
    } finally {
      // The loser of the race has no listener left.
      done.abort(new Stopped("answered"));
    }
  }
}

/** All pages: a short one, or an empty one, may have more behind it. */
async function allPages<P extends { NextToken?: string }>(read: (NextToken?: string) => Promise<P>): Promise<P[]> {
  const pages: P[] = [];
  do pages.push(await read(pages.at(-1)?.NextToken));
  while (pages.at(-1)?.NextToken);
  return pages;
}

// ─── Pacing ──────────────────────────────────────────────────────────────────────────────────────────────
// AWS gives an account so many requests a second, for all who live in it, and says how many only by refusing. So
// each of its buckets is free until it refuses: then it goes on at the pace of what was granted in the last second,
// and faster again as long as nothing is refused. What changes something goes before what only reads.

type Pace = {
  /** Waits for its turn and uses it; `rank` 0 goes first. Rejects when the program stops, or its own caller gives up. */
  take: (rank: number, signal?: AbortSignal) => Promise<void>;
  /** Waits until a turn is free, and leaves it there. */
  room: () => Promise<void>;
  granted: () => void;
  refused: () => void;
};

/** `burst` at once and `perSecond` after that; both without limit until `refused` says otherwise. */
export function makePace(
  deps: Pick<Deps, "now" | "sleep">,
  signal: AbortSignal,
  { burst = Number.POSITIVE_INFINITY, perSecond = Number.POSITIVE_INFINITY } = {},
): Pace {
  type Waiting = { rank: number; uses: number; go: () => void; stop: (reason: unknown) => void };
  let waiting: Waiting[] = [];
  const grants: number[] = [];
  let [tokens, rate, atMs, cutMs, isPumping] = [burst, perSecond, deps.now(), Number.NEGATIVE_INFINITY, false];
  const lastSecond = () => {
    while (grants.length && deps.now() - (grants[0] ?? 0) > 1_000) grants.shift();
    return grants.length;
  };
  const refill = () => {
    const seconds = Math.max(0, deps.now() - atMs) / 1000; // the clock may be set back
    atMs = deps.now();
    if (cutMs > 0) rate *= 1.2 ** seconds;
    if (rate > 1_000) [rate, cutMs] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
    const most = cutMs > 0 ? Math.max(1, rate) : burst;
    tokens = Number.isFinite(rate) ? Math.min(most, tokens + seconds * rate) : most;
  };
  const pump = async () => {
    isPumping = true;
    try {
      for (;;) {
        refill();
        for (let next = waiting[0]; next && tokens >= 1; next = waiting[0]) {
          waiting.shift();
          tokens -= next.uses;
          next.go();
        }
        if (!waiting.length) break;
        await deps.sleep(Math.max(1, Math.ceil((1000 * (1 - tokens)) / rate)), signal);
      }
    } catch {
      for (const { stop } of waiting.splice(0)) stop(new Stopped("stopping")); // sleep rejects for that alone
    }
    isPumping = false;
  };
  const wait = (rank: number, uses: number, caller?: AbortSignal) => {
    if (!isPumping) refill();
    if (!waiting.length && tokens >= 1) {
      tokens -= uses;
      return Promise.resolve();
    }
    return new Promise<void>((go, stop) => {
      const place = waiting.findIndex((w) => w.rank > rank);
      const mine = { rank, uses, go, stop };
      waiting.splice(place < 0 ? waiting.length : place, 0, mine);
      // Late, it would be sent beside the next try, or against what was decided since.
      caller?.addEventListener("abort", () => {
        waiting = waiting.filter((w) => w !== mine);
        stop(caller.reason);
      });
      if (!isPumping) void pump();
    });
  };
  return {
    take: (rank, caller) => wait(rank, 1, caller),
    room: () => wait(1, 0),
    granted: () => {
      grants.push(deps.now());
      if (grants.length > 100) lastSecond();
    },
    refused: () => {
      tokens = Math.min(tokens, 0);
      if (deps.now() - cutMs < 1_000) return; // one lesson from what was under way together
      const known = Number.isFinite(rate) ? rate : 10;
      [rate, cutMs, atMs] = [Math.max(0.5, Math.min(known, lastSecond()) * 0.8), deps.now(), deps.now()];
    },
  };
}

function paceOf(ctx: Ctx, bucket: string, limits?: { burst: number; perSecond: number }): Pace {
  const known = ctx.state.paces.get(bucket);
  if (known) return known;
  const made = makePace(ctx.deps, ctx.signal, limits);
  ctx.state.paces.set(bucket, made);
  return made;
}

/** EC2 counts these apart; all other changes share one bucket, and so do reads. Auto Scaling has one for all. */
const OWN_BUCKET = new Set(["RunInstances", "TerminateInstances", "CreateTags", "CreateSnapshot", "CreateVolume"]);
const isRead = (operation: string) => /^(Describe|Get)/.test(operation);
function bucketOf(service: "ec2" | "autoscaling" | "elb", operation: string): string {
  if (service !== "ec2") return service;
  return OWN_BUCKET.has(operation) ? `ec2 ${operation}` : isRead(operation) ? "ec2 reads" : "ec2 changes";
}

/** The same client, at AWS's pace. */
function paced<C extends { send: unknown }>(ctx: Ctx, service: "ec2" | "autoscaling" | "elb", client: C): C {
  type Send = (command: { schema?: unknown }, options?: Partial<SendOptions>) => Promise<unknown>;
  const inner = client.send as Send;
  const send: Send = async (command, options) => {
    // [kind, namespace, name, ...]: a class's own name does not outlive the minifier.
    const operation = Array.isArray(command.schema) ? String(command.schema[2]) : "";
    const pace = paceOf(ctx, bucketOf(service, operation));
    await pace.take(isRead(operation) ? 1 : 0, options?.abortSignal);
    options?.sent?.();
    try {
      const answer = await inner.call(client, command, options);
      pace.granted();
      return answer;
    } catch (error) {
      if (THROTTLED.test(errorName(error))) pace.refused();
      throw error;
    }
  };
  return { ...client, send };
}

// ─── Natural batching ────────────────────────────────────────────────────────────────────────────────────
// What is asked for in the same turn, or while earlier calls are under way, shares the next call. Nobody waits
// for a timer: an idle batcher sends a lone item at once, a busy one fills its calls by itself.

type Batcher<K, V> = (item: K) => Promise<V>;

/**
 * `run` gets up to `limit` items that are `alike` and answers with one value or Error for each, in order. While a
 * call is under way, a second one (at most `parallel` in all) leaves only when it is full, or at once if `eager`.
 */
export function batcher<K, V>(
  deps: Pick<Deps, "sleep">,
  {
    limit,
    parallel = 1,
    eager = false,
    alike = () => "",
    room,
  }: { limit: number; parallel?: number; eager?: boolean; alike?: (item: K) => string; room?: () => Promise<void> },
  run: (items: K[]) => Promise<(V | Error)[]>,
): Batcher<K, V> {
  type Waiting = { item: K; resolve: (value: V) => void; reject: (reason: unknown) => void };
  const queues = new Map<string, Waiting[]>();
  const running = new Map<string, number>();
  /** Calls that wait for room: whatever comes meanwhile goes with them. */
  const starting = new Map<string, number>();
  let all = 0;
  let turn = false;
  const flush = async (kind: string, queued: Waiting[]) => {
    const count = (by: number) => {
      running.set(kind, (running.get(kind) ?? 0) + by);
      all += by;
    };
    count(1);
    let batch: Waiting[] = [];
    try {
      if (room) {
        starting.set(kind, (starting.get(kind) ?? 0) + 1);
        await room().finally(() => {
          starting.set(kind, (starting.get(kind) ?? 1) - 1);
          batch = queued.splice(0, limit);
        });
      } else batch = queued.splice(0, limit);
      if (!batch.length) return;
      const answers = await run(batch.map((w) => w.item));
      batch.forEach(({ resolve, reject }, i) => {
        const answer = answers[i];
        if (answer instanceof Error) reject(answer);
        else resolve(answer as V);
      });
    } catch (error) {
      for (const { reject } of batch) reject(error);
    } finally {
      count(-1);
      if (!running.get(kind)) {
        running.delete(kind);
        starting.delete(kind);
        if (!queued.length && queues.get(kind) === queued) queues.delete(kind);
      }
      pump();
    }
  };
  const pump = () => {
    for (const [kind, queued] of queues) {
      const left = () => queued.length - limit * (starting.get(kind) ?? 0);
      const ready = () => left() > 0 && all < parallel && (eager || !running.get(kind) || left() >= limit);
      while (ready()) void flush(kind, queued);
    }
  };
  return (item) =>
    new Promise<V>((resolve, reject) => {
      const kind = alike(item);
      const queued = queues.get(kind);
      if (queued) queued.push({ item, resolve, reject });
      else queues.set(kind, [{ item, resolve, reject }]);
      if (turn) return;
      turn = true;
      void deps.sleep(0).then(() => {
        turn = false;
        pump();
      });
    });
}

/** In a wave so many calls of one kind in so long leave at once; then one waits for company, half a second or until it is full. */
const FREE_READS = 30;
const FREE_READS_MS = 15_000;
const COMPANY_MS = 500;

/** A batched read by key: who asks for what is not under way yet shares its place; what is absent comes back undefined. */
function reader<V>(
  ctx: Ctx,
  { limit, parallel }: { limit: number; parallel: number },
  read: (keys: string[]) => Promise<Map<string, V>>,
) {
  const { now } = ctx.deps;
  const recent: number[] = [];
  const waiting = new Map<string, Promise<V | undefined>>();
  const room = async () => {
    const sinceMs = now();
    const isBusy = () => ctx.state.inHand.size > WAVE && recent.length >= FREE_READS && now() - (recent[0] ?? 0) < FREE_READS_MS;
    while (isBusy() && waiting.size < limit && now() - sinceMs < COMPANY_MS) await pause(ctx, 50);
    recent.push(now());
    if (recent.length > FREE_READS) recent.shift();
  };
  const ask = batcher<string, V | undefined>(ctx.deps, { limit, parallel, room }, async (keys) => {
    for (const key of keys) waiting.delete(key);
    const found = await read(keys);
    return keys.map((key) => found.get(key));
  });
  return (key: string) => {
    const asked = waiting.get(key) ?? ask(key);
    waiting.set(key, asked);
    return asked;
  };
}

/** Runs one after another what must not overlap. */
function mutex() {
  let tail: Promise<unknown> = Promise.resolve();
  return <T>(run: () => Promise<T>): Promise<T> => {
    const result = tail.then(run);
    tail = result.catch(() => undefined); // its caller hears of the failure; the next in line must not
    return result;
  };
}

// ─── The cloud as we see it ──────────────────────────────────────────────────────────────────────────────
// AWS's answers become plain records here, once; a member without an ID or a group without a name is left out.

export const TAG = {
  group: "spotmax:group",
  replaces: "spotmax:replaces",
  order: "spotmax:order",
  attached: "spotmax:attached",
  detached: "spotmax:detached",
  /** On a claim that is being reclaimed before it was attached: the next choice is to follow. */
  lost: "spotmax:lost",
  fallback: "spotmax:fallback",
  /** On an on-demand fallback: how often spot was sought for it in vain, and when last. */
  tried: "spotmax:tried",
  /** On a group: from which types and zones preaction found no better place, and until when it does not look again. */
  cooldown: "spotmax:cooldown",
  maxSize: "spotmax:max_size",
  /** On a volume: the instance whose data it is; on an instance: its data's volume; on a snapshot: what it copies. */
  volume: "spotmax:volume",
  /** On a data volume: the one in which its data goes on, in another zone or already on the replacement. */
  copied: "spotmax:copied",
} as const;
export const RESERVED_TAGS = new Set<string>(Object.values(TAG));

export type Ec2Instance = {
  id: string;
  type: string;
  zone: string;
  state: string;
  stateReason: string;
  spot: boolean;
  platform: Platform;
  architecture: string;
  virtualization: string;
  launchedMs: number;
  /** Its private address, IPv4 where it has one. */
  address?: string;
  tags: Record<string, string>;
  /** Empty once it is terminated. */
  privateDns?: string;
  /** By device name; `ends`: goes with the instance. */
  volumes: Record<string, { id: string; ends: boolean }>;
};
export type Member = {
  id: string;
  group: string;
  lifecycleState: string;
  zone: string;
  type: string;
  isProtected: boolean;
  weight: number;
};
export type Override = {
  type?: string;
  requirements?: InstanceRequirementsRequest;
  weight: number;
  template?: LaunchTemplateSpecification;
};
export type Group = {
  name: string;
  min: number;
  max: number;
  desired: number;
  zones: string[];
  subnets: string[];
  members: Map<string, Member>;
  suspended: Set<string>;
  /** Set while the group is being deleted. */
  status: string | undefined;
  targetGroups: string[];
  tags: Record<string, string>;
  propagatedTags: { Key: string; Value: string }[];
  template: LaunchTemplateSpecification | undefined;
  overrides: Override[];
  spotMaxPrice: string | undefined;
  prioritized: boolean;
  /** units, vcpu or memory-mib: what desired counts in. */
  desiredType: string;
  capacityRebalance: boolean;
  protectsNew: boolean;
  healthCheck: { type: string; graceSeconds: number };
  /** It has a warm pool, of as many as the maximum is above desired. */
  warmsToMax?: boolean;
};

/**
 * What is acted on must be in AWS's answer: a size or a state that is made up would end machines, and a name that is
 * missing would look like absence. Throws what is worth another try.
 */
function mustHave<T extends object>(what: string, record: T, ...keys: (keyof T)[]): void {
  const missing = keys.filter((key) => record[key] === undefined || record[key] === "");
  if (missing.length)
    throw Object.assign(new Error(`AWS's answer for ${what} lacks ${missing.join(", ")}`), { name: "InternalError" });
}

const tagsOf = (tags: { Key?: string; Value?: string }[] | undefined) =>
  Object.fromEntries((tags ?? []).flatMap(({ Key, Value }) => (Key === undefined ? [] : [[Key, Value ?? ""]])));

export function toInstance(i: Instance): Ec2Instance | undefined {
  if (!i.InstanceId) return undefined;
  return {
    id: i.InstanceId,
    type: i.InstanceType ?? "",
    zone: i.Placement?.AvailabilityZone ?? "",
    state: i.State?.Name ?? "",
    stateReason: [i.StateReason?.Code, i.StateReason?.Message].filter(Boolean).join(": "),
    spot: i.InstanceLifecycle === "spot",
    // Red Hat and SUSE are priced apart, and are taken back as Linux is.
    platform: /windows/i.test(i.PlatformDetails ?? i.Platform ?? "") ? "Windows" : "Linux",
    architecture: i.Architecture ?? "",
    virtualization: i.VirtualizationType ?? "",
    launchedMs: i.LaunchTime?.getTime() ?? 0,
    address: i.PrivateIpAddress || i.Ipv6Address || i.NetworkInterfaces?.flatMap((n) => n.Ipv6Addresses ?? [])[0]?.Ipv6Address,
    tags: tagsOf(i.Tags),
    privateDns: i.PrivateDnsName,
    volumes: Object.fromEntries(
      (i.BlockDeviceMappings ?? []).flatMap(({ DeviceName, Ebs }) =>
        DeviceName && Ebs?.VolumeId ? [[DeviceName, { id: Ebs.VolumeId, ends: Ebs.DeleteOnTermination ?? true }]] : [],
      ),
    ),
  };
}
const isLiving = (i: Ec2Instance | undefined): boolean => i?.state === "pending" || i?.state === "running";
const isGone = (i: Ec2Instance | undefined) => !i || i.state === "terminated" || i.state === "shutting-down";

const toMember = (i: Omit<AutoScalingInstanceDetails, "AutoScalingGroupName">, group: string): Member => ({
  id: i.InstanceId ?? "",
  group,
  lifecycleState: i.LifecycleState ?? "",
  zone: i.AvailabilityZone ?? "",
  type: i.InstanceType ?? "",
  isProtected: i.ProtectedFromScaleIn ?? false,
  weight: Number(i.WeightedCapacity ?? 1) || 1,
});

export function toGroup(g: AutoScalingGroup): Group | undefined {
  if (!g.AutoScalingGroupName) return undefined;
  const name = g.AutoScalingGroupName;
  mustHave(name, g, "MinSize", "MaxSize", "DesiredCapacity");
  for (const i of g.Instances ?? []) mustHave(`a member of ${name}`, i, "InstanceId", "LifecycleState");
  const policy = g.MixedInstancesPolicy;
  const members = (g.Instances ?? []).map((i) => toMember(i, name));
  return {
    name,
    min: g.MinSize ?? 0,
    max: g.MaxSize ?? 0,
    desired: g.DesiredCapacity ?? 0,
    zones: g.AvailabilityZones ?? [],
    subnets: (g.VPCZoneIdentifier ?? "")
      .split(",")
      .map((s) => s.trim())
      .filter(Boolean),
    members: new Map(members.map((m) => [m.id, m])),
    suspended: new Set((g.SuspendedProcesses ?? []).map((p) => p.ProcessName ?? "")),
    status: g.Status,
    targetGroups: [
      ...new Set([
        ...(g.TargetGroupARNs ?? []),
        ...(g.TrafficSources ?? []).flatMap((t) => (t.Type === "elbv2" && t.Identifier ? [t.Identifier] : [])),
      ]),
    ],
    tags: tagsOf(g.Tags),
    // CloudFormation puts tags of AWS's own on groups; a caller may not set those.
    propagatedTags: (g.Tags ?? []).flatMap((t) =>
      t.PropagateAtLaunch && t.Key && !t.Key.startsWith("aws:") && !RESERVED_TAGS.has(t.Key)
        ? [{ Key: t.Key, Value: t.Value ?? "" }]
        : [],
    ),
    template: g.LaunchTemplate ?? policy?.LaunchTemplate?.LaunchTemplateSpecification,
    overrides: (policy?.LaunchTemplate?.Overrides ?? []).map((o) => ({
      type: o.InstanceType,
      requirements: o.InstanceRequirements as InstanceRequirementsRequest | undefined,
      weight: Number(o.WeightedCapacity ?? 1) || 1,
      template: o.LaunchTemplateSpecification,
    })),
    spotMaxPrice: policy?.InstancesDistribution?.SpotMaxPrice || undefined,
    prioritized: policy?.InstancesDistribution?.OnDemandAllocationStrategy === "prioritized",
    desiredType: g.DesiredCapacityType ?? "units",
    capacityRebalance: g.CapacityRebalance ?? false,
    protectsNew: g.NewInstancesProtectedFromScaleIn ?? false,
    healthCheck: { type: g.HealthCheckType ?? "EC2", graceSeconds: g.HealthCheckGracePeriod ?? 0 },
    warmsToMax: (g.WarmPoolConfiguration?.MaxGroupPreparedCapacity ?? -1) < 0 && g.WarmPoolConfiguration !== undefined,
  };
}

/**
 * The old instance that a claim (an instance of ours) replaces. A batch names several, and `spotmax:order` says
 * which is whose: the n-th replaces the n-th. Undefined where the order is not written yet or does not reach.
 */
export function replacedBy(claim: Ec2Instance): string | undefined {
  const olds = (claim.tags[TAG.replaces] ?? "").split(" ").filter(Boolean);
  if (olds.length < 2) return olds[0];
  const place = claim.tags[TAG.order]?.split(" ").indexOf(claim.id) ?? -1;
  return place < 0 ? undefined : olds[place];
}
/** Both tags are there from the launch on; what says less was tagged by somebody else. */
const isClaim = ({ tags }: Ec2Instance) => /^i-[0-9a-f]+( i-[0-9a-f]+)*$/.test(tags[TAG.replaces] ?? "") && TAG.group in tags;
const isSettled = (claim: Ec2Instance) => TAG.attached in claim.tags;
/** Who wins where two claims live for one old instance: a settled one, then what is not lost, then the lowest ID, whatever is attached. */
export function winner(claims: Ec2Instance[]): Ec2Instance | undefined {
  const rank = (c: Ec2Instance) => (isSettled(c) ? 0 : TAG.lost in c.tags ? 2 : 1);
  return claims.filter(isLiving).sort((a, b) => rank(a) - rank(b) || (a.id < b.id ? -1 : 1))[0];
}

type HowLeft = "decremented" | "substituted" | "unknown";
const isLeaving = ({ Description = "" }: Activity) => /^(Detaching|Terminating|Moving .*to Standby)/.test(Description);

/** AZRebalance launches first and takes one out then: the group shrinks, and desired stays as it was. */
const isBalanced = (cause: string) => /to balance instances in zones/.test(cause) && !/changing the desired capacity/.test(cause);

/**
 * How an instance left its group: with decrement or by scale-in nothing is owed; else the group substitutes by itself.
 * The newest activity that names it tells; one without its cause does not say how.
 */
export function howItLeft(activities: Activity[], instance: string): HowLeft {
  for (const activity of activities) {
    if (activity.Cause === undefined || !`${activity.Description} `.includes(`${instance} `)) continue;
    if (!isLeaving(activity)) break; // it came back after whatever stands behind this
    return /shrinking the capacity/.test(activity.Cause) && !isBalanced(activity.Cause) ? "decremented" : "substituted";
  }
  return "unknown";
}

async function tagAll(ctx: Ctx, ids: string[], tags: Record<string, string>, patienceMs: number): Promise<void> {
  const until = ctx.deps.now() + patienceMs;
  const Tags = Object.entries(tags).map(([Key, Value]) => ({ Key, Value }));
  for (let left = ids; left.length; ) {
    const Resources = left;
    try {
      await aws(ctx, `tagging ${left.join(" ")}`, (o) => ctx.deps.ec2.send(new CreateTagsCommand({ Resources, Tags }), o));
      return;
    } catch (error) {
      if (!NOT_FOUND.has(errorName(error))) throw error;
      if (ctx.deps.now() < until) {
        await pause(ctx, 1_000);
        continue;
      }
      const unknown = new Set(named(error));
      left = left.filter((id) => !unknown.has(id));
      if (left.length === Resources.length) throw error;
    }
  }
}

async function readVolumes(ctx: Ctx, doing: string, Filters: Filter[]): Promise<Volume[]> {
  const pages = await allPages((NextToken) =>
    aws(ctx, doing, (o) => ctx.deps.ec2.send(new DescribeVolumesCommand({ Filters, MaxResults: 500, NextToken }), o)),
  );
  return pages.flatMap((p) => p.Volumes ?? []).flatMap((v) => toVolume(v) ?? []);
}

async function describeInstances(ctx: Ctx, doing: string, Filters: Filter[]): Promise<Ec2Instance[]> {
  const pages = await allPages((NextToken) =>
    aws(ctx, doing, (o) => ctx.deps.ec2.send(new DescribeInstancesCommand({ Filters, MaxResults: 1000, NextToken }), o)),
  );
  const instances = pages.flatMap((p) => p.Reservations ?? []).flatMap((r) => r.Instances ?? []);
  for (const i of instances) mustHave(i.InstanceId ?? "an instance", i, "InstanceId", "State", "LaunchTime");
  return instances.flatMap((i) => toInstance(i) ?? []);
}

function queueWriter<T extends { queue: string }>(
  ctx: Ctx,
  doing: string,
  write: (
    client: Sender<SQSClient>,
    QueueUrl: string,
    items: T[],
    o: { abortSignal: AbortSignal },
  ) => Promise<{ Failed?: { Id?: string; Code?: string; Message?: string; SenderFault?: boolean }[] }>,
) {
  return batcher<T, void>(ctx.deps, { limit: 10, parallel: 8, alike: (item) => item.queue }, async (items) => {
    const url = items[0]?.queue ?? "";
    const faults = new Map<T, Error>();
    // AWS may refuse some of a batch; what is not the sender's fault is tried again.
    for (let left = items, tries = 1; left.length; tries++) {
      const { Failed = [] } = await aws(ctx, doing, (o) => write(ctx.deps.sqs(url), url, left, o));
      const again = Failed.flatMap(({ Id, Code = "Failed", Message = "", SenderFault }) => {
        const item = left[Number(Id)];
        if (!item) return [];
        if (SenderFault === false && tries < 5) return [item];
        faults.set(
          item,
          Object.assign(new Error(`${doing}: ${Code}: ${Message}`), { name: SenderFault === false ? "InternalError" : Code }),
        );
        return [];
      });
      left = again;
      if (left.length) await pause(ctx, 200 * 2 ** tries * ctx.deps.random());
    }
    return items.map((item) => faults.get(item));
  });
}

type Tagging = { ids: string[]; tags: Record<string, string>; patienceMs: number };
/** The same tags for several share a call. */
function tagger(ctx: Ctx) {
  return batcher<Tagging, void>(
    ctx.deps,
    {
      limit: 40,
      parallel: 8,
      alike: ({ tags, patienceMs }) => JSON.stringify([tags, patienceMs]),
      room: paceOf(ctx, "ec2 CreateTags").room,
    },
    async (items) => {
      await tagAll(ctx, [...new Set(items.flatMap((i) => i.ids))], items[0]?.tags ?? {}, items[0]?.patienceMs ?? 0);
      return items.map(() => undefined);
    },
  );
}

/** Keys: group, space, instance. One reading a group. */
async function readActivities(ctx: Ctx, keys: string[]): Promise<Map<string, Activity[]>> {
  const found = new Map<string, Activity[]>(keys.map((key) => [key, []]));
  for (const [name, wanted] of Map.groupBy(keys, (key) => key.slice(0, key.lastIndexOf(" ")))) {
    const missing = new Map(wanted.map((key) => [key.slice(name.length + 1), key]));
    let NextToken: string | undefined;
    // What left longer ago is not looked for: a busy group has thousands of activities in the six weeks that AWS keeps them.
    const open = [...ctx.state.claims.values()].filter((c) => c.tags[TAG.group] === name && !isSettled(c));
    const oldestMs = Math.min(cloudNow(ctx) - 12 * 3_600_000, ...open.map((c) => c.launchedMs));
    for (let page = 0; missing.size && page < 20; page++) {
      const input = { AutoScalingGroupName: name, MaxRecords: 100, NextToken };
      const answer = await aws(ctx, `reading the activities of ${name}`, (o) =>
        ctx.deps.autoScaling.send(new DescribeScalingActivitiesCommand(input), o),
      );
      for (const activity of answer.Activities ?? []) {
        const id = named(new Error(activity.Description))[0] ?? "";
        found.get(`${name} ${id}`)?.push(activity);
        if (activity.Cause !== undefined) missing.delete(id);
      }
      NextToken = answer.NextToken;
      const startMs = answer.Activities?.at(-1)?.StartTime?.getTime();
      if (!NextToken || (startMs !== undefined && startMs < oldestMs)) break;
    }
  }
  return found;
}

async function readHealth(ctx: Ctx, targets: { arn: string; id: string }[]): Promise<boolean[]> {
  const arn = targets[0]?.arn ?? "";
  const Targets = [...new Set(targets.map((t) => t.id))].map((Id) => ({ Id }));
  try {
    const command = new DescribeTargetHealthCommand({ TargetGroupArn: arn, Targets });
    // Who waits asks again every second; a last mark before the deadline may not be missed for it.
    const brief = { tries: 1, timeoutMs: 3_000 };
    const answer = await aws(ctx, `reading target health in ${arn}`, (o) => ctx.deps.elb.send(command, o), brief);
    // `unused`: no load balancer sends to this target group, so nothing can become healthy in it.
    const good = new Set(
      (answer.TargetHealthDescriptions ?? []).flatMap(({ Target, TargetHealth: { State, Reason } = {} }) =>
        State === "healthy" || (State === "unused" && Reason === "Target.NotInUse") ? [Target?.Id] : [],
      ),
    );
    return targets.map((t) => good.has(t.id));
  } catch (error) {
    if (error instanceof Stopped) throw error;
    if (isRetryable(error)) ctx.deps.log.debug(`${errorText(error)}: not healthy as far as is known`);
    else sayOnce(ctx, "warn", `health ${arn} ${errorName(error)}`, `${explain(error)}: target health in ${arn} cannot be read`);
    // Nothing can become healthy in one that is gone.
    return targets.map(() => errorName(error).startsWith("TargetGroupNotFound"));
  }
}

/** All batched reads and queue writes; the numbers are AWS's own limits a call. */
function makeCloud(ctx: Ctx) {
  const { deps } = ctx;
  const describe = (doing: string, Filters: Filter[]) => describeInstances(ctx, doing, Filters);
  const tagBatch = tagger(ctx);
  return {
    describe,
    /** By filter, not by ID: an unknown ID is then absent instead of failing the whole call. */
    instance: reader<Ec2Instance>(ctx, { limit: 200, parallel: 4 }, async (ids) => {
      const found = await describe("reading instances", [{ Name: "instance-id", Values: ids }]);
      return new Map(found.map((i) => [i.id, i]));
    }),
    /** Every instance, dead ones included, whose spotmax:replaces names this one. AWS allows 200 values a filter. */
    naming: reader<Ec2Instance[]>(ctx, { limit: 200, parallel: 4 }, async (olds) => {
      const found = await describe("looking for claims", [{ Name: `tag:${TAG.replaces}`, Values: olds.map((id) => `*${id}*`) }]);
      return new Map(olds.map((id) => [id, found.filter((i) => (i.tags[TAG.replaces] ?? "").split(" ").includes(id))]));
    }),
    /** Every volume whose data is this instance's. */
    volumesOf: reader<Volume[]>(ctx, { limit: 100, parallel: 4 }, async (owners) => {
      const Filters = [{ Name: `tag:${TAG.volume}`, Values: owners }];
      return Map.groupBy(await readVolumes(ctx, "reading volumes", Filters), (v) => v.tags[TAG.volume] ?? "");
    }),
    /** Every snapshot of this volume that we made. */
    snapshotsOf: reader<EbsSnapshot[]>(ctx, { limit: 100, parallel: 4 }, async (volumes) => {
      const Filters = [{ Name: `tag:${TAG.volume}`, Values: volumes }];
      const pages = await allPages((NextToken) =>
        aws(ctx, "reading snapshots", (o) =>
          deps.ec2.send(new DescribeSnapshotsCommand({ OwnerIds: ["self"], Filters, MaxResults: 500, NextToken }), o),
        ),
      );
      return Map.groupBy(
        pages.flatMap((p) => p.Snapshots ?? []),
        (snapshot) => tagsOf(snapshot.Tags)[TAG.volume] ?? "",
      );
    }),
    member: reader<Member>(ctx, { limit: 50, parallel: 4 }, async (ids) => {
      const { AutoScalingInstances = [] } = await aws(ctx, "finding groups", (o) =>
        deps.autoScaling.send(new DescribeAutoScalingInstancesCommand({ InstanceIds: ids }), o),
      );
      for (const m of AutoScalingInstances)
        mustHave(m.InstanceId ?? "a member", m, "InstanceId", "AutoScalingGroupName", "LifecycleState");
      const members = AutoScalingInstances.map((m) => toMember(m, m.AutoScalingGroupName ?? ""));
      return new Map(members.map((m) => [m.id, m]));
    }),
    group: reader<Group>(ctx, { limit: 50, parallel: 4 }, async (names) => {
      const { AutoScalingGroups = [] } = await aws(ctx, "reading groups", (o) =>
        deps.autoScaling.send(new DescribeAutoScalingGroupsCommand({ AutoScalingGroupNames: names, MaxRecords: 100 }), o),
      );
      for (const g of AutoScalingGroups) mustHave("a group", g, "AutoScalingGroupName");
      return new Map(AutoScalingGroups.flatMap((g) => toGroup(g) ?? []).map((g) => [g.name, g]));
    }),
    /** The scaling activities that name an instance, newest first. */
    activities: reader<Activity[]>(ctx, { limit: 100, parallel: 2 }, (keys) => readActivities(ctx, keys)),
    /** Healthy in one target group. Where that cannot be read it is not, unless there is no such group any more. */
    isHealthy: batcher<{ arn: string; id: string }, boolean>(deps, { limit: 100, parallel: 4, alike: (t) => t.arn }, (targets) =>
      readHealth(ctx, targets),
    ),
    send: queueWriter<{ queue: string; body: string; delaySeconds: number }>(
      ctx,
      "sending messages",
      (client, QueueUrl, items, o) =>
        client.send(
          new SendMessageBatchCommand({
            QueueUrl,
            Entries: items.map((m, i) => ({
              Id: String(i),
              MessageBody: m.body,
              DelaySeconds: Math.max(0, Math.min(900, Math.round(m.delaySeconds))),
            })),
          }),
          o,
        ),
    ),
    remove: queueWriter<{ queue: string; receipt: string }>(ctx, "deleting messages", (client, QueueUrl, items, o) =>
      client.send(
        new DeleteMessageBatchCommand({ QueueUrl, Entries: items.map((m, i) => ({ Id: String(i), ReceiptHandle: m.receipt })) }),
        o,
      ),
    ),
    lease: queueWriter<{ queue: string; receipt: string; seconds: number }>(
      ctx,
      "holding messages",
      (client, QueueUrl, items, o) =>
        client.send(
          new ChangeMessageVisibilityBatchCommand({
            QueueUrl,
            Entries: items.map((m, i) => ({ Id: String(i), ReceiptHandle: m.receipt, VisibilityTimeout: m.seconds })),
          }),
          o,
        ),
    ),
    /** Just after a launch AWS may not know an ID yet: patience, `patienceMs` long; then those unknown are left out. */
    tag: (ids: string[], tags: Record<string, string>, patienceMs = 0) =>
      ids.length ? tagBatch({ ids, tags, patienceMs }) : Promise.resolve(),
    terminate: async (id: string) => {
      const command = new TerminateInstancesCommand({ InstanceIds: [id] });
      try {
        await aws(ctx, `terminating ${id}`, (o) => deps.ec2.send(command, o));
      } catch (error) {
        if (!NOT_FOUND.has(errorName(error))) throw error; // gone already is what was wanted
      }
    },
  };
}
type Cloud = ReturnType<typeof makeCloud>;

/** A group of the configuration, as the last look at it left it: why it is left out, and the faults of its tags. */
type LookedAfter = { options: GroupOptions; broken?: string; faults?: string };

/** What the process remembers. All of it may be lost at any moment: it saves calls and says what is in hand. */
const newState = (config: Config) => ({
  config,
  /** Groups looked after, and those of the configuration that are left out at the moment. */
  groups: new Map<string, LookedAfter>(),
  /** AWS's clock less this machine's. */
  clockOffsetMs: 0,
  clockToldMs: Number.NEGATIVE_INFINITY,
  /** When a receive last came back full: there is more where that came from. */
  fullReceiveMs: Number.NEGATIVE_INFINITY,
  /** Messages in hand, by queue and message ID. */
  inHand: new Map<string, Work>(),
  /** Our living instances as the instance manager last saw them, with those launched since. */
  claims: new Map<string, Ec2Instance>(),
  /** Launches under way, by old instance: one daemon never launches two. */
  launching: new Map<string, Promise<string | Result | undefined>>(),
  /** Pools that failed or are being reclaimed, until when (ms); a hint only. */
  failedPools: new Map<string, number>(),
  lanes: new Map<string, Lane>(),
  /** How fast AWS's request buckets, and our own limit on launch calls, let us go. */
  paces: new Map<string, Pace>(),
  /** Reads that change seldom, a minute each (see `cached`). */
  cache: new Map<string, { atMs: number; value: Promise<unknown> }>(),
  /** When the manager first saw a claim outside every group. */
  outsideSince: new Map<string, number>(),
  /** Claims that this process has attached, or tried to without a clear answer, and when. */
  joined: new Map<string, number>(),
  /** How instances left, where their group's activities told. */
  left: new Map<string, HowLeft>(),
  /** Since when they do not tell of one that we let go. */
  untoldMs: new Map<string, number>(),
  /** When a detach message for an old instance was last in hand here, or sent by the instance manager. */
  detachSeenMs: new Map<string, number>(),
  /** The agents of old instances are asked once to let their services go: when, and until when that may take. */
  deregistered: new Map<string, { atMs: number; over: Promise<void> }>(),
  /** Messages whose work is done and whose deletion failed: seen again, they are only deleted. */
  finishedMs: new Map<string, number>(),
  /** Since when a claim is seen as it is, and when it was last acted on, by claim and matter. */
  actedMs: new Map<string, number>(),
  /** Resolves once the instance manager has had its first look. */
  firstPass: Promise.resolve() as Promise<unknown>,
  /** -K: the kubeconfig file of groups that name none. */
  kubeconfig: undefined as string | undefined,
  /** By kubeconfig file; empty: the cluster that we run in. */
  clusters: new Map<string, Cluster>(),
  /** When nodes were last looked at for notices that did not come true. */
  nodesLookedMs: Number.NEGATIVE_INFINITY,
  /** Raised maximums that may go back: since when, and since when desired stands above. */
  restoring: new Map<string, { calmSinceMs?: number; aboveSinceMs?: number }>(),
  /** Since when a data volume lies available, or that it has been asked after. */
  leftMs: new Map<string, number>(),
  /** When they were last looked for. */
  volumesSweptMs: Number.NEGATIVE_INFINITY,
  /** Old instances whose data could not be kept or tagged yet. */
  atRisk: new Set<string>(),
  /** The last good copy of the Spot Advisor's data, reduced to this region. */
  advisor: undefined as Advisor | undefined,
  /** What has been said and need not be said again. */
  said: new Set<string>(),
  /** Members that this process asked to have replaced, their group, and when: the message may not be seen yet. */
  asked: new Map<string, { group: string; atMs: number }>(),
});
export type State = ReturnType<typeof newState>;
export type Ctx = { deps: Deps; state: State; cloud: Cloud; signal: AbortSignal };
/** One group's changes: launches share calls, attaches and detaches are made one after another. */
type Lane = {
  /** How many others are in hand; below the limit it is let in. */
  admit: Batcher<Work, number>;
  exclusive: <T>(run: () => Promise<T>) => Promise<T>;
  launch: Batcher<LaunchItem, string | undefined>;
  attach: Batcher<AttachItem, AttachVerdict>;
  protect: Batcher<string, void>;
  release: Batcher<string, void>;
  detach: Batcher<DetachItem, DetachVerdict>;
};

export function makeContext(deps: Deps, config: Config, signal: AbortSignal): Ctx {
  const ctx = { deps, state: newState(config), signal } as Ctx;
  ctx.deps = {
    ...deps,
    ec2: paced(ctx, "ec2", deps.ec2),
    autoScaling: paced(ctx, "autoscaling", deps.autoScaling),
    elb: paced(ctx, "elb", deps.elb),
  };
  ctx.cloud = makeCloud(ctx);
  return ctx;
}

function lane(ctx: Ctx, group: string): Lane {
  const known = ctx.state.lanes.get(group);
  if (known) return known;
  const exclusive = mutex();
  const { room } = paceOf(ctx, "autoscaling");
  // Few calls a second are granted: after the first ones they wait until the wave has come in, and leave full.
  const launchRoom = async () => {
    const sinceMs = ctx.deps.now();
    await paceOf(ctx, "launch calls", { burst: 20, perSecond: 20 }).take(0);
    const isIn = () => ctx.deps.now() - ctx.state.fullReceiveMs > 250 || ctx.deps.now() - sinceMs > 2_000;
    while (ctx.deps.now() > sinceMs && !isIn()) await pause(ctx, 50);
    await paceOf(ctx, "ec2 changes").room();
  };
  const setProtection = (isProtected: boolean) =>
    batcher<string, void>(ctx.deps, { limit: 50, room }, async (ids) => {
      await protect(ctx, group, ids, isProtected);
      return ids.map(() => undefined);
    });
  const made: Lane = {
    // Never under `exclusive`: hundreds may wait for their turn, and no attach behind them.
    admit: batcher(ctx.deps, { limit: 1_000 }, (works) => admitBatch(ctx, group, works)),
    exclusive,
    launch: batcher(ctx.deps, { limit: 10, parallel: 8, eager: true, alike: (item) => item.ask, room: launchRoom }, (items) =>
      launchBatch(ctx, group, items),
    ),
    attach: batcher(ctx.deps, { limit: 20, room }, (items) => exclusive(() => attachBatch(ctx, group, items))),
    protect: setProtection(true),
    release: setProtection(false),
    detach: batcher(ctx.deps, { limit: 20, alike: (item) => String(item.decrement), room }, (items) =>
      exclusive(() => detachBatch(ctx, group, items)),
    ),
  };
  ctx.state.lanes.set(group, made);
  return made;
}

// ─── Notices ─────────────────────────────────────────────────────────────────────────────────────────────
// A kind of event is one row: which option switches it on, how to read the instance IDs, whether it has a hard
// deadline. Events are account-wide, best effort and at least once: most name strangers, some come twice.

const INSTANCE_ID = /^i-(?:[0-9a-f]{8}|[0-9a-f]{17})$/;
const instanceId = text("an instance ID", INSTANCE_ID);

type NoticeKind = {
  kind: "interruption" | "rebalance" | "maintenance" | "preaction";
  /** The group option that switches this kind on; without one it is always on. */
  option?: "is_to_handle_rebalance_event" | "is_to_handle_maintenance_event";
  /** From the event's time until the instance goes; absent: it may stay. */
  deadlineSeconds?: number;
  /** The IDs in the event's detail, by default its one; an empty list: not for us. Throws where the detail is broken. */
  read?: (detail: unknown) => string[];
  /** The detail of a copy for one of them: what `read` needs and no more, for ten copies share 256 KiB. */
  write?: (instance: string) => object;
};
const oneInstance = v.object({ "instance-id": instanceId });
const readOne = (detail: unknown) => [v.parse(oneInstance, detail)["instance-id"]];
const healthEvent = v.object({
  service: v.string(),
  eventTypeCategory: v.string(),
  statusCode: v.optional(v.string()),
  affectedEntities: v.optional(v.array(v.object({ entityValue: v.optional(v.string()) })), []),
});

const NOTICES: Record<string, NoticeKind> = {
  "EC2 Spot Instance Interruption Warning": {
    kind: "interruption",
    deadlineSeconds: 120,
  },
  "EC2 Instance Rebalance Recommendation": {
    kind: "rebalance",
    option: "is_to_handle_rebalance_event",
  },
  "AWS Health Event": {
    kind: "maintenance",
    option: "is_to_handle_maintenance_event",
    read: (detail) => {
      const { service, eventTypeCategory, statusCode, affectedEntities } = v.parse(healthEvent, detail);
      if (service !== "EC2" || eventTypeCategory !== "scheduledChange" || statusCode === "closed") return [];
      return [
        ...new Set(affectedEntities.flatMap(({ entityValue = "" }) => (INSTANCE_ID.test(entityValue) ? [entityValue] : []))),
      ];
    },
    write: (entityValue) => ({ service: "EC2", eventTypeCategory: "scheduledChange", affectedEntities: [{ entityValue }] }),
  },
  "MaxGroup Preaction": { kind: "preaction" },
};
const PREACTION = "MaxGroup Preaction";
const DETACH = "MaxGroup Detach";
const TERMINATION = "MaxGroup Termination";

/** Until the year 2100: what lies beyond is no time that anybody meant, and a Date may not hold it. */
const momentMs = v.pipe(v.number(), v.minValue(0), v.maxValue(Date.UTC(2100)));
/** What travels in every copy and follow-up, so that what is begun is finished with the options it began with. */
const carriedSchema = v.object({
  group: groupName,
  kind: v.picklist(["interruption", "rebalance", "maintenance", "preaction"]),
  notice: v.string(),
  /** Milliseconds since 1970; absent: no hard deadline. */
  deadlineMs: v.optional(momentMs),
  /** Not before this time: SQS carries a delay of 900 s at most, so a longer one is sent on again. */
  dueMs: v.optional(momentMs),
  oldProtected: v.optional(v.boolean(), false),
  detachSent: v.optional(v.boolean(), false),
  /** Preaction: the types that will do instead, a list for each band, the best one first. */
  better: v.optional(v.array(v.array(v.string()))),
  drained: v.optional(v.boolean(), false),
  // Another version's options are left out, so that two versions can share the queues while one is replaced.
  options: v.pipe(
    v.record(v.string(), v.unknown()),
    v.transform(({ alt, ...rest }) => {
      const known = Object.entries(rest).filter(([name]) => Object.hasOwn(GROUP_OPTIONS, name));
      const alts = Array.isArray(alt) ? alt.map((type, i) => [`alt${i + 1}`, type]) : [];
      return Object.fromEntries([...known, ...alts]);
    }),
    groupSchema,
  ),
});
type Carried = v.InferOutput<typeof carriedSchema>;
const envelope = v.looseObject({
  "detail-type": v.string(),
  id: v.optional(v.string(), ""),
  time: v.optional(v.unknown()),
  detail: v.optional(v.unknown()),
  maxgroup: v.optional(carriedSchema),
});

export type Notice = {
  type: string;
  kind: NoticeKind["kind"];
  id: string;
  instances: string[];
  /** The event's own time, ms since 1970. */
  timeMs: number | undefined;
  carried: Carried | undefined;
};
/** What a message's body says; "not ours" is well formed and somebody else's. Throws where it cannot be understood. */
export function readNotice(
  body: string,
  queue: QueueName,
): Notice | { notOurs: string } | { belongsOn: QueueName; type: string } {
  let json: unknown;
  try {
    json = JSON.parse(body);
  } catch (cause) {
    throw new Error("the message is not JSON", { cause });
  }
  const parsed = v.safeParse(envelope, json);
  if (!parsed.success) throw new Error(`the message is no EventBridge event: ${faultsOf(parsed.issues)}`);
  const event = parsed.output;
  const type = event["detail-type"];
  const timeMs = typeof event.time === "string" ? Date.parse(event.time) : Number.NaN;
  const common = {
    type,
    id: event.maxgroup?.notice ?? event.id,
    timeMs: Number.isNaN(timeMs) ? undefined : timeMs,
    carried: event.maxgroup,
  };
  if (type === DETACH || type === TERMINATION) {
    if (!event.maxgroup) throw new Error(`a ${type} message without its "maxgroup" part`);
    const wanted = type === DETACH ? "detach_evt_sqs" : "termination_evt_sqs";
    if (queue !== wanted) return { belongsOn: wanted, type };
    return {
      ...common,
      kind: event.maxgroup.kind,
      instances: parseDetail(type, () => readOne(event.detail)),
    };
  }
  const row = Object.hasOwn(NOTICES, type) ? NOTICES[type] : undefined;
  if (!row) return { notOurs: `events of type "${type}" are not for max_group` };
  if (type === PREACTION && !event.maxgroup) throw new Error(`a ${type} message without its "maxgroup" part`);
  const instances = parseDetail(type, () => (row.read ?? readOne)(event.detail));
  if (queue !== "interruption_evt_sqs") return { belongsOn: "interruption_evt_sqs", type };
  if (!instances.length) return { notOurs: `this "${type}" names no EC2 instance to be moved` };
  return { ...common, kind: row.kind, instances };
}
const faultsOf = (issues: v.BaseIssue<unknown>[]) =>
  issues.map((i) => `${v.getDotPath(i) ?? "the whole"}: ${i.message}`).join("; ");
function parseDetail<T>(type: string, read: () => T): T {
  try {
    return read();
  } catch (error) {
    throw new Error(
      `the detail of "${type}" is broken: ${error instanceof v.ValiError ? faultsOf(error.issues) : errorText(error)}`,
    );
  }
}

/**
 * When an interrupted instance goes, ms since 1970: two minutes after the event's time. Clocks may be apart and
 * people rehearse with old samples, so a time that is missing, or past while the instance lives on in service,
 * counts from the message's first receipt; and never is it more than two minutes away.
 */
export function deadlineOf(timeMs: number | undefined, firstReceivedMs: number, nowMs: number, lengthMs = 120_000): number {
  const [stated, received] = [(timeMs ?? firstReceivedMs) + lengthMs, firstReceivedMs + lengthMs];
  const deadline = stated > nowMs ? stated : received > nowMs ? received : nowMs + lengthMs;
  return Math.min(deadline, nowMs + lengthMs);
}

// ─── The handler table ───────────────────────────────────────────────────────────────────────────────────
// What a message on each queue leads to: the steps, in order. To add a capability, add a row: a name, the step,
// and, if it is not for every message, `when`: a group option, or a question about the work. Steps repeat safely:
// a message may be seen again at any point. A step answers done, skip, retry or again, or throws; the loop alone
// decides what that does to the message.

export type Result =
  | { is: "done" }
  /** Nothing (more) to do for this message: it is deleted. */
  | { is: "skip"; reason: string; level: Level }
  /** Later: a fresh delayed copy takes the message's place. */
  | { is: "retry"; reason: string; afterSeconds: number }
  /** From the first step once more, with the message still in hand. */
  | { is: "again"; reason: string; afterMs: number };
const done: Result = { is: "done" };
const skip = (reason: string, level: Level = "debug"): Result => ({ is: "skip", reason, level });
const retry = (reason: string, afterSeconds: number): Result => ({ is: "retry", reason, afterSeconds });
const again = (reason: string, afterMs = 1_000): Result => ({ is: "again", reason, afterMs });

type Step = {
  name: string;
  when?: keyof GroupOptions | ((work: Work) => boolean);
  run: (ctx: Ctx, work: Work) => Promise<Result>;
};

/** Of these last minutes; a time far ahead is wrong, and waiting for it would never end. */
const isFresh = (ctx: Ctx, { notice }: Work, ms: number) => Math.abs(cloudNow(ctx) - (notice.timeMs ?? 0)) < ms;
const hasDeadline = (work: Work) => work.deadlineMs !== undefined;
const hasVolume = (work: Work) => work.options.persistence_dev !== undefined;
const hasPods = (work: Work) => work.options.k8s_node_drain_option;
const hasNoDeadline = (work: Work) => work.deadlineMs === undefined;
const isPreaction = (work: Work) => work.notice.kind === "preaction";

export const TABLE: Record<QueueName, Step[]> = {
  interruption_evt_sqs: [
    { name: "find group", run: findGroup },
    { name: "send detach message", when: hasDeadline, run: sendDetachMessage },
    { name: "protect volume", when: (work) => hasVolume(work) && hasDeadline(work), run: protectVolume },
    { name: "cordon", when: (work) => hasPods(work) && hasDeadline(work), run: cordon },
    { name: "launch", run: launch },
    { name: "wait until running", run: waitUntilRunning },
    { name: "attach", run: attach },
    { name: "send detach message", when: hasNoDeadline, run: sendDetachMessage },
    { name: "protect volume", when: (work) => hasVolume(work) && hasNoDeadline(work), run: protectVolume },
    { name: "cordon", when: (work) => hasPods(work) && hasNoDeadline(work), run: cordon },
    { name: "remember how it came out", when: isPreaction, run: rememberOutcome },
  ],
  detach_evt_sqs: [
    { name: "protect volume", when: "persistence_dev", run: protectVolume },
    { name: "wait for the replacement's node", when: "k8s_node_drain_option", run: waitForNode },
    { name: "drain", when: "k8s_node_drain_option", run: drain },
    { name: "wait for the replacement", run: waitForReplacement },
    { name: "deregister", when: "consul_port", run: deregister },
    { name: "detach", run: detach },
    { name: "send termination message", run: sendTerminationMessage },
  ],
  termination_evt_sqs: [
    { name: "terminate", run: terminate },
    { name: "move volume", when: "persistence_dev", run: moveVolume },
  ],
};

/** A message as it came. */
type Received = {
  queue: QueueName;
  queueUrl: string;
  body: string;
  receipt: string;
  firstReceivedMs: number;
  /** How often the queue has delivered it. */
  received: number;
  notice: Notice;
};
/** One message in hand, for one old instance, and what its steps have found out so far. */
export type Work = Received & {
  instance: string;
  group: string;
  options: GroupOptions;
  deadlineMs: number | undefined;
  oldProtected: boolean;
  detachSent: boolean;
  /** Preaction: the types that will do instead, the best band first; absent for a fallback that goes back to spot. */
  better: string[][] | undefined;
  /** Its node has been drained, as far as there was time. */
  drained: boolean;
  /** Without a hard deadline: let in, and perhaps not visible as a claim yet. */
  isAdmitted: boolean;
  /** A launch call is out and unanswered: the message may not be given back, for the next one would launch again. */
  launchOut: boolean;
  /** How long each hold on the message lasts, and when the present one began. */
  leaseSeconds: number;
  leasedMs: number;
  old?: Ec2Instance;
  member?: Member;
  claim?: string;
  /** Where on the ladder to go on, and the number in the launch token. */
  rung: number;
  attempt: number;
  /** On the way out: the old one has left already; with which decrement to detach it; the minimum refused one. */
  left: boolean;
  decrement: boolean;
  refused: boolean;
  log: Log;
};

// ─── The loop ────────────────────────────────────────────────────────────────────────────────────────────
// Receive, hand over, receive again: receiving never waits for handlers, only for room. A message is deleted in
// one place, after its last step. With a hard deadline it is held in leases of 15 s, so that a crash costs
// seconds of the two minutes; else for the queue's visibility_timeout_seconds.

const MAX_IN_HAND = 10_000;
const LEASE_SECONDS = 15;
const LEASE_TICK_MS = 5_000;
/** Receives at a time on one queue while they come back full; one long poll when they do not. */
const MAX_RECEIVES = 8;

/** Receives from one queue until the program stops; a failing queue is tried again with backoff, for ever. */
async function receiveLoop(ctx: Ctx, name: QueueName): Promise<void> {
  let failures = 0;
  let extras = 0;
  const receive = async (waitSeconds: number): Promise<boolean> => {
    const { queue_url, visibility_timeout_seconds, max_number_of_messages } = ctx.state.config.global[name];
    const command = new ReceiveMessageCommand({
      QueueUrl: queue_url,
      MaxNumberOfMessages: max_number_of_messages,
      WaitTimeSeconds: waitSeconds,
      VisibilityTimeout: visibility_timeout_seconds,
      MessageSystemAttributeNames: ["ApproximateFirstReceiveTimestamp", "ApproximateReceiveCount"],
    });
    const { Messages = [] } = await aws(
      ctx,
      `receiving from ${name}`,
      ({ abortSignal }) => ctx.deps.sqs(queue_url).send(command, { abortSignal: AbortSignal.any([abortSignal, ctx.signal]) }),
      { tries: 1, timeoutMs: waitSeconds * 1000 + 10_000 },
    );
    failures = 0;
    for (const message of Messages) void take(ctx, name, queue_url, message);
    const isFull = Messages.length === max_number_of_messages;
    if (isFull) ctx.state.fullReceiveMs = ctx.deps.now();
    return isFull;
  };
  const extra = async () => {
    extras++;
    try {
      while (!ctx.signal.aborted && ctx.state.inHand.size < MAX_IN_HAND && (await receive(0)));
    } catch (error) {
      if (!ctx.signal.aborted) ctx.deps.log.debug(`receiving from ${name}: ${errorText(error)}`); // the main receive says so aloud
    } finally {
      extras--;
    }
  };
  while (!ctx.signal.aborted) {
    try {
      if (ctx.state.inHand.size >= MAX_IN_HAND) await pause(ctx, 100);
      // A long poll returns the moment that a message is there: a short one only asks more often.
      else if (await receive(Math.max(1, ctx.state.config.global[name].wait_time_seconds)))
        for (let n = extras; n < MAX_RECEIVES - 1; n++) void extra();
    } catch (error) {
      if (ctx.signal.aborted) return;
      if (failures++ % 20 === 0)
        ctx.deps.log.error(`receiving from ${name} failed, trying again: ${errorText(error)}`, {
          error: errorName(error),
          failures,
        });
      await pause(ctx, Math.min(20_000, 250 * 2 ** Math.min(failures, 8)) * (0.5 + ctx.deps.random() / 2)).catch(() => undefined); // only ever Stopped
    }
  }
}

/** Renews what is in hand, ten messages a call. */
async function leaseLoop(ctx: Ctx): Promise<void> {
  while (!ctx.signal.aborted) {
    try {
      await pause(ctx, LEASE_TICK_MS);
    } catch {
      return; // stopping
    }
    for (const work of ctx.state.inHand.values()) {
      const dueMs = work.leaseSeconds === LEASE_SECONDS ? LEASE_TICK_MS - 500 : work.leaseSeconds * 500;
      if (ctx.deps.now() - work.leasedMs >= dueMs) void hold(ctx, work, work.leaseSeconds);
    }
  }
}
async function hold(ctx: Ctx, work: Work, seconds: number): Promise<void> {
  work.leasedMs = ctx.deps.now();
  try {
    await ctx.cloud.lease({ queue: work.queueUrl, receipt: work.receipt, seconds });
  } catch (error) {
    // It comes again, which every step allows for; where the right is missing it does so all the time.
    work.log[/Denied|Unauthorized/.test(errorName(error)) ? "warn" : "debug"](`holding the message: ${errorText(error)}`);
  }
}

/** Short leases from now on, where there is a hard deadline. */
function shorten(ctx: Ctx, work: Work): void {
  if (work.deadlineMs === undefined || work.leaseSeconds === LEASE_SECONDS) return;
  work.leaseSeconds = LEASE_SECONDS;
  void hold(ctx, work, LEASE_SECONDS);
}

/** A received message: read, handled, and then deleted, replaced by a copy, or left to come again. Never throws. */
async function take(ctx: Ctx, queue: QueueName, queueUrl: string, message: Message): Promise<void> {
  const { Body: body = "", ReceiptHandle: receipt = "", MessageId = receipt, Attributes = {} } = message;
  const received = Number(Attributes.ApproximateReceiveCount ?? 1);
  const stamp = Number(Attributes.ApproximateFirstReceiveTimestamp);
  if (received === 1 && stamp) tellTime(ctx, stamp - ctx.deps.now());
  const firstReceivedMs = stamp || cloudNow(ctx);
  const log = ctx.deps.log.with({ message: MessageId });
  const key = `${queue} ${MessageId}`;
  try {
    const mine = ctx.state.inHand.get(key);
    if (mine) {
      mine.receipt = receipt; // delivered again while in hand: only the newest receipt deletes it
      return;
    }
    if (ctx.state.finishedMs.has(key)) {
      await ctx.cloud.remove({ queue: queueUrl, receipt });
      return void ctx.state.finishedMs.delete(key);
    }
    let notice: ReturnType<typeof readNotice>;
    try {
      notice = readNotice(body, queue);
    } catch (error) {
      // Neither deleted nor hurried: the queue's redrive policy takes it to the dead-letter queue.
      log[received > 1 ? "debug" : "warn"](`left to the dead-letter queue: ${errorText(error)}`, {
        queue,
        received,
        body: body.slice(0, 200),
      });
      return;
    }
    if ("notOurs" in notice || "belongsOn" in notice) {
      if ("notOurs" in notice) log.debug(notice.notOurs);
      else {
        log.warn(`a "${notice.type}" belongs on ${notice.belongsOn}: sent there; check the EventBridge rule's target`, { queue });
        await ctx.cloud.send({ queue: ctx.state.config.global[notice.belongsOn].queue_url, body, delaySeconds: 0 });
      }
      await ctx.cloud.remove({ queue: queueUrl, receipt });
      return;
    }
    if (notice.instances.length > 1) await split(ctx, queueUrl, receipt, body, notice, log);
    else await handle(ctx, key, newWork(ctx, { queue, queueUrl, body, receipt, firstReceivedMs, received, notice }));
  } catch (error) {
    if (!(error instanceof Stopped))
      log.error(`handling a message of ${queue}: ${errorText(error)}`, { error: errorName(error) });
  }
}

function newWork(ctx: Ctx, received: Received): Work {
  const { queue, notice } = received;
  const [instance = ""] = notice.instances;
  const { carried } = notice;
  return {
    ...received,
    instance,
    group: carried?.group ?? "",
    options: carried?.options ?? v.parse(groupSchema, {}),
    deadlineMs: carried?.deadlineMs,
    oldProtected: carried?.oldProtected ?? false,
    detachSent: carried?.detachSent ?? false,
    better: carried?.better,
    drained: carried?.drained ?? false,
    leaseSeconds: ctx.state.config.global[queue].visibility_timeout_seconds,
    leasedMs: ctx.deps.now(),
    isAdmitted: false,
    launchOut: false,
    rung: 0,
    attempt: 0,
    left: false,
    decrement: true,
    refused: false,
    log: ctx.deps.log.with({ group: carried?.group, instance, notice: notice.id }),
  };
}

/** An event that names several instances becomes one message each for those that are ours. */
async function split(ctx: Ctx, queueUrl: string, receipt: string, body: string, notice: Notice, log: Log): Promise<void> {
  const members = await Promise.all(notice.instances.map((id) => ctx.cloud.member(id)));
  const ours = members.flatMap((m) => (m && ctx.state.groups.has(m.group) ? [m.id] : []));
  await Promise.all(ours.map((id) => ctx.cloud.send({ queue: queueUrl, body: copyOf(body, notice, id), delaySeconds: 0 })));
  log.debug(`${notice.type} names ${notice.instances.length} instances, ${ours.length} of them ours`);
  await ctx.cloud.remove({ queue: queueUrl, receipt });
}
/** The event once more, for one instance. */
function copyOf(body: string, notice: Notice, instance: string, maxgroup?: Carried): string {
  const { version, id, time, source } = JSON.parse(body) as Record<string, unknown>;
  const detail = NOTICES[notice.type]?.write?.(instance) ?? { "instance-id": instance };
  return JSON.stringify({ version, id, "detail-type": notice.type, source, time, detail, maxgroup });
}

async function handle(ctx: Ctx, key: string, work: Work): Promise<void> {
  const remove = () => ctx.cloud.remove({ queue: work.queueUrl, receipt: work.receipt });
  ctx.state.inHand.set(key, work);
  try {
    const result = await runSteps(ctx, work);
    if (result.is === "retry") {
      work.log.debug(`later: ${result.reason}`, { afterSeconds: result.afterSeconds });
      while (!(await sendCopy(ctx, work, result.afterSeconds))) await pause(ctx, 1_000);
    } else if (result.is === "skip") work.log[result.level](result.reason);
    await remove().catch((error: unknown) => {
      work.log.debug(`deleting a finished message: ${errorText(error)}`); // it comes again, and is deleted then
      ctx.state.finishedMs.set(key, ctx.deps.now());
    });
  } catch (error) {
    if (error instanceof Stopped) return work.launchOut ? undefined : await hold(ctx, work, 0);
    work.log.error(`${errorText(error)}; the message comes again`, { error: errorName(error) });
    // Ten receives and it is a dead letter: with a hard deadline they are spread over its two minutes.
    await hold(ctx, work, work.deadlineMs === undefined ? 60 : Math.min(15, 3 * work.received));
  } finally {
    ctx.state.inHand.delete(key);
  }
}

/** The table's steps in order; `again` starts over with the message in hand. */
async function runSteps(ctx: Ctx, work: Work): Promise<Result> {
  const dueMs = work.notice.carried?.dueMs;
  if (dueMs !== undefined && dueMs - cloudNow(ctx) > 1_000) return retry("not due yet", (dueMs - cloudNow(ctx)) / 1000);
  for (;;) {
    const result = await runOnce(ctx, work);
    if (result.is !== "again") return result;
    work.log.debug(`again: ${result.reason}`);
    await pause(ctx, result.afterMs);
  }
}
async function runOnce(ctx: Ctx, work: Work): Promise<Result> {
  for (const { name, when, run } of TABLE[work.queue]) {
    if (typeof when === "function" ? !when(work) : when && !work.options[when]) continue;
    if (ctx.signal.aborted) throw new Stopped("stopping");
    let result: Result;
    try {
      result = await run(ctx, work);
    } catch (cause) {
      if (cause instanceof Stopped) throw cause;
      // A service that asks for patience is no fault of the message: a fresh copy keeps its receive count for crashes and poison.
      if (isRetryable(cause)) return retry(`${name}: ${errorText(cause)}`, work.deadlineMs === undefined ? 30 : 1);
      throw new Error(name, { cause });
    }
    if (result.is !== "done") return result;
  }
  return done;
}

function carriedBy(work: Work, dueMs?: number): Carried {
  const { group, options, deadlineMs, oldProtected, detachSent, better, drained, notice } = work;
  return { group, options, deadlineMs, dueMs, oldProtected, detachSent, better, drained, kind: notice.kind, notice: notice.id };
}
/**
 * The message once more, later, with what is known by now. False where the queue takes none at the moment: the message
 * stays in hand, for given back it would come nearer to the dead letters with every receive.
 */
async function sendCopy(ctx: Ctx, work: Work, afterSeconds: number): Promise<boolean> {
  const dueMs = cloudNow(ctx) + afterSeconds * 1000;
  const maxgroup = work.group ? carriedBy(work, afterSeconds > 900 ? dueMs : undefined) : undefined;
  const body = copyOf(work.body, work.notice, work.instance, maxgroup);
  try {
    await ctx.cloud.send({ queue: work.queueUrl, body, delaySeconds: afterSeconds });
    return true;
  } catch (error) {
    if (!isRetryable(error)) throw error;
    work.log.warn(`${errorText(error)}; trying on`, { error: errorName(error) });
    return false;
  }
}
/** A message of our own to the next queue. */
async function sendFollowUp(ctx: Ctx, work: Work, to: QueueName, type: string, delaySeconds: number): Promise<void> {
  const nowMs = cloudNow(ctx);
  const body = {
    version: "0",
    id: work.notice.id,
    "detail-type": type,
    source: "spotmax.maxgroup",
    // When it is due: how long a step is patient counts from there.
    time: new Date(nowMs + delaySeconds * 1000).toISOString(),
    detail: { "instance-id": work.instance },
    maxgroup: carriedBy(work, delaySeconds > 900 ? nowMs + delaySeconds * 1000 : undefined),
  };
  await ctx.cloud.send({ queue: ctx.state.config.global[to].queue_url, body: JSON.stringify(body), delaySeconds });
}

/** A message that no other led to. */
async function sendOwn(
  ctx: Ctx,
  to: QueueName,
  what: Pick<Notice, "type" | "kind" | "id" | "instances">,
  carried: Pick<Work, "group"> & Partial<Work>,
): Promise<void> {
  const notice: Notice = { ...what, timeMs: undefined, carried: undefined };
  const received = { queue: to, queueUrl: "", body: "", receipt: "", firstReceivedMs: ctx.deps.now(), received: 1, notice };
  const work = newWork(ctx, received);
  const options = ctx.state.groups.get(carried.group)?.options ?? work.options;
  await sendFollowUp(ctx, { ...work, options, ...carried }, to, what.type, 0);
}

// ─── Steps: find group, detach message ───────────────────────────────────────────────────────────────────
// One table of states decides what becomes of a notice. The detach message goes out before the launch, so that
// somebody owns the deadline whatever becomes of the launch.

const YOUNG_MS = 10 * 60_000;

/** What a member's lifecycle state means for a notice. */
export function judgeState(lifecycleState: string): "go on" | "later" | "leaving" | "not in service" {
  if (lifecycleState === "InService") return "go on";
  if (lifecycleState.startsWith("Pending")) return "later";
  if (/^(Terminating|Terminated|Detaching|Detached)/.test(lifecycleState)) return "leaving";
  return "not in service"; // Standby, EnteringStandby, Warmed:*, Quarantined
}

async function findGroup(ctx: Ctx, work: Work): Promise<Result> {
  const { instance, notice } = work;
  const member = await ctx.cloud.member(instance);
  if (!member) await ctx.state.firstPass; // only now is it known what was begun before a restart
  // After a restart a replacement of ours may not be known as one yet, and is protected by us.
  const shown = member?.isProtected ? await ctx.cloud.instance(instance) : undefined;
  const claim = ctx.state.claims.get(instance) ?? (shown && TAG.replaces in shown.tags ? shown : undefined);
  const name = member?.group ?? (notice.carried?.group || claimGroup(ctx, instance));
  const known = name ? ctx.state.groups.get(name) : undefined;
  const row = NOTICES[notice.type];
  // What was begun is finished in its own group, and nowhere else; what only waits for its turn is judged afresh.
  const isBegun = work.group === name && (row?.deadlineSeconds !== undefined || Boolean(await standsFor(ctx, instance)));
  if (!name || !(known || isBegun)) return foreign(ctx, work, member);
  work.options = (isBegun ? notice.carried?.options : undefined) ?? known?.options ?? work.options;
  work.log = ctx.deps.log.with({ group: name, instance, notice: notice.id });
  if (row?.option && !work.options[row.option]) return skip(`${notice.type}: ${row.option} is off`);
  // Whatever stands in the way of a launch, the data is kept as long as its instance goes.
  const isAtRisk = row?.deadlineSeconds !== undefined && hasVolume(work);
  const leftOut = isBegun || !member ? undefined : known?.broken;
  if (leftOut && isAtRisk) await protectVolume(ctx, { ...work, group: name });
  if (leftOut) return retry(`group ${name} is left out at the moment: ${leftOut}`, row?.deadlineSeconds ? 10 : 300);
  work.group = name;
  work.member = member;

  // Before anything can fail, for it travels in every copy. A replacement that is itself replaced is protected by us: it
  // is as the first of its line.
  const isOurs = member && claim && !isSettled(claim);
  const origin = isOurs ? await originOf(ctx, instance) : member;
  if (origin) work.oldProtected = (claim && keptSince(ctx, claim)) ?? origin.isProtected;
  const isUnknown = !origin && !work.old && !notice.carried;
  const [group, old] = await Promise.all([ctx.cloud.group(name), ctx.cloud.instance(instance)]);
  work.old = old;
  // Where nobody can tell any more (it has just left), it was as its group has them.
  if (isUnknown) work.oldProtected = group?.protectsNew ?? false;
  const fault = await judge(ctx, work, group);
  if (fault?.is === "skip" && isAtRisk) return keepData(ctx, work, fault);
  if (fault && isAtRisk) await protectVolume(ctx, work);
  if (fault) return fault;

  if (row?.deadlineSeconds === undefined) {
    // No detach message goes ahead: the notice itself must know its group and options before anything is launched.
    if (!notice.carried) return retry("from here on it knows its group", 0);
    return admit(ctx, work, old);
  }
  const first = work.deadlineMs === undefined;
  work.deadlineMs ??= deadlineOf(notice.timeMs, work.firstReceivedMs, cloudNow(ctx), row.deadlineSeconds * 1000);
  shorten(ctx, work);
  const left = Math.round((work.deadlineMs - cloudNow(ctx)) / 1000);
  if (first) work.log.info(`${notice.kind} notice: replacing ${instance} within ${left} s`, { type: old?.type, zone: old?.zone });
  if (old?.spot) remember(ctx, "spot", old.type, old.zone, "reclaimed");
  return done;
}

/** Whom a line of replacements began with, none of which is settled yet, if that one is still a member. */
async function originOf(ctx: Ctx, claim: string): Promise<Member | undefined> {
  const before = await openClaimOn(ctx, claim);
  if (!before) return undefined;
  return (await openClaimOn(ctx, before)) ? originOf(ctx, before) : ctx.cloud.member(before);
}

/** The table of states: why nothing is (or not yet) to be launched for this member. */
async function judge(ctx: Ctx, work: Work, group: Group | undefined): Promise<Result | undefined> {
  const { member, old, group: name } = work;
  const verdict = member ? judgeState(member.lifecycleState) : "leaving";
  if (verdict === "later") return retry(`still ${member?.lifecycleState}`, 5);
  if (verdict === "go on" && !old && isFresh(ctx, work, BELIEVED_MS)) return retry("EC2 does not show it at the moment", 1);
  if (verdict === "not in service") return skip(`not in service but ${member?.lifecycleState}: nothing to replace`, "info");
  if (verdict === "leaving" || isGone(old)) {
    // What was launched for it is still to be brought to its end.
    const { claim: begun } = await claimOn(ctx, work.instance);
    if (begun && !isSettled(begun)) return undefined;
    if (verdict === "leaving") return skip(member ? `already leaving (${member.lifecycleState})` : `has left ${name}`, "info");
    return skip(`already ${old?.state ?? "gone"}: ${name} substitutes it by itself`, "info");
  }
  if (!group || group.status) return skip(`group ${name} is being deleted: nothing is launched`, "warn");
  if (group.suspended.has("Launch")) {
    // What was launched before is attached once the process is resumed, or swept up.
    const { claim: begun } = await claimOn(ctx, work.instance);
    if (begun && !isSettled(begun)) return retry(`the Launch process of ${name} is suspended: ${begun.id} waits`, 5);
    return skip(`the Launch process of ${name} is suspended: AWS would refuse the replacement, so none is launched`, "warn");
  }
  return undefined;
}

const claimGroup = (ctx: Ctx, old: string) =>
  [...ctx.state.claims.values()].find((c) => replacedBy(c) === old && isLiving(c))?.tags[TAG.group];

/** A stranger, or a replacement of our own that is reclaimed before it was attached: then its rung has failed. */
async function foreign(ctx: Ctx, work: Work, member: Member | undefined): Promise<Result> {
  if (member) return skip(`member of ${member.group}, which is not configured`);
  if (work.notice.kind !== "interruption") return skip("in no group: not ours");
  // Another daemon may have launched it a moment ago.
  const claim = ctx.state.claims.get(work.instance) ?? (await ctx.cloud.instance(work.instance));
  if (!claim && isFresh(ctx, work, 30_000)) return retry("EC2 does not show it yet", 5);
  const isMember = claim && (isSettled(claim) || ctx.state.groups.has(claim.tags["aws:autoscaling:groupName"] ?? ""));
  if (isMember && isFresh(ctx, work, 30_000)) return retry("its group does not show it at the moment", 2);
  if (!claim || !(TAG.replaces in claim.tags) || isSettled(claim) || !isLiving(claim)) return skip("in no group: not ours");
  if (!(TAG.lost in claim.tags)) {
    remember(ctx, "spot", claim.type, claim.zone, "reclaimed");
    const tags = { [TAG.lost]: new Date(cloudNow(ctx)).toISOString() };
    await ctx.cloud.tag([claim.id], tags);
    ctx.state.claims.set(claim.id, { ...claim, tags: { ...claim.tags, ...tags } });
    work.log.warn(
      `our replacement for ${replacedBy(claim)} is itself being reclaimed before it was attached: the next choice follows`,
    );
  }
  // It may be attached at this very moment, and is then a member with a notice of its own; it is not ended here.
  return retry(`our replacement ${claim.id} is being reclaimed`, 10);
}
/** A claim that is not worth waiting for; one that was attached all the same counts like any member. */
const isLost = async (ctx: Ctx, claim: Ec2Instance) => TAG.lost in claim.tags && !(await ctx.cloud.member(claim.id));

/**
 * Old instances that are being replaced, or on their way out and running, by what the cloud shows; `leaving` ones that
 * somebody has attached again are members like any other.
 */
async function inHandOf(ctx: Ctx, group: string): Promise<Set<string>> {
  const [tagged, detached] = await Promise.all([
    ctx.cloud.describe("counting what is in hand", [
      { Name: `tag:${TAG.group}`, Values: [group] },
      { Name: "instance-state-name", Values: ["pending", "running"] },
    ]),
    ctx.cloud.describe("counting what is on its way out", [
      { Name: `tag:${TAG.detached}`, Values: [group] },
      { Name: "instance-state-name", Values: ["running"] },
    ]),
  ]);
  const members = await Promise.all(detached.map((i) => ctx.cloud.member(i.id)));
  return new Set([
    ...tagged.flatMap((c) => (isSettled(c) ? [] : [replacedBy(c) ?? c.id])),
    ...detached.flatMap((i, n) => (members[n] ? [] : [i.id])),
  ]);
}

/** One count for all that wait; the caller runs one at a time for a group. */
async function admitBatch(ctx: Ctx, group: string, works: Work[]): Promise<number[]> {
  // As they were before the look: what ends meanwhile may not be in it yet.
  const admitted = [...ctx.state.inHand.values()].flatMap((w) => (w.isAdmitted && w.group === group ? [w.instance] : []));
  const olds = new Set([...admitted, ...(await inHandOf(ctx, group))]);
  return works.map((work) => {
    const isBegun = olds.has(work.instance);
    const inHand = isBegun ? 0 : olds.size;
    work.isAdmitted = isBegun || inHand < work.options.max_num_of_terminated_one_time;
    if (work.isAdmitted) olds.add(work.instance);
    return inHand;
  });
}

/** Without a hard deadline: so many at a time in a group, counted from the cloud, and none that is young. */
async function admit(ctx: Ctx, work: Work, old: Ec2Instance | undefined): Promise<Result> {
  // Preaction does not wait: the next look judges afresh, and messages that wait would pile up. After a crash a launch may not be visible yet.
  const later = (reason: string, seconds: number) =>
    isPreaction(work) && work.received === 1 ? skip(reason) : retry(reason, seconds);
  if (old && cloudNow(ctx) - old.launchedMs < YOUNG_MS) return later("younger than ten minutes", 120);
  if (work.isAdmitted) return done;
  const { max_num_of_terminated_one_time: limit } = work.options;
  const inHand = await lane(ctx, work.group).admit(work);
  if (inHand >= limit) return later(`${inHand} of at most ${limit} in hand in ${work.group}`, 60);
  work.log.info(`${work.notice.kind} notice: replacing ${work.instance}, no hurry`, { type: old?.type, zone: old?.zone });
  return done;
}

async function sendDetachMessage(ctx: Ctx, work: Work): Promise<Result> {
  if (work.detachSent) return done;
  const { detaching_delay_seconds, preaction_detach_delay_seconds } = work.options;
  // The way out begins 30 s before the deadline at the latest; pods take longer.
  const latestMs = work.options.k8s_node_drain_option ? DRAIN_BEGINS_MS : 30_000;
  const delay =
    work.deadlineMs === undefined
      ? preaction_detach_delay_seconds
      : Math.min(detaching_delay_seconds, (work.deadlineMs - latestMs - cloudNow(ctx)) / 1000);
  await sendFollowUp(ctx, work, "detach_evt_sqs", DETACH, Math.max(0, delay));
  work.detachSent = true;
  return done;
}

// ─── Steps: the launch ladder ────────────────────────────────────────────────────────────────────────────
// Rung 1 asks for spot where the group stays balanced, rung 2 for spot anywhere, rung 3 for on-demand. The
// first rung that yields an instance ends the climb. Pools that are being reclaimed or failed lately are left
// out as long as others remain. What is asked for is decided by planLaunch alone, from plain data.

export type Rung = "balanced spot" | "any spot" | "on-demand";
export type Pool = {
  type: string | undefined;
  requirements?: InstanceRequirementsRequest;
  zone: string;
  subnet: string | undefined;
  template: LaunchTemplateSpecification;
  priority: number;
};
/** Why a pool is avoided: its instances are being taken back, or it had nothing lately. */
type PoolMemory = (lifecycle: string, type: string, zone: string) => "failed" | "reclaimed" | undefined;
type LaunchItem = {
  work: Work;
  rung: Rung;
  home: boolean;
  pass: number;
  desperate: boolean;
  only: string[] | undefined;
  ask: string;
};

/** Which rungs a notice may climb: an on-demand member stays on-demand; without a hard deadline nothing turns on-demand. */
export function rungsFor(spotMember: boolean, hardDeadline: boolean, fallback: boolean): Rung[] {
  if (!spotMember) return ["on-demand"];
  return hardDeadline && fallback ? ["balanced spot", "any spot", "on-demand"] : ["balanced spot", "any spot"];
}

/**
 * The zones in which a replacement leaves the group balanced, so that AZRebalance has nothing to undo. One at a
 * time: the least filled zones once the old one is gone. In a wave each goes back to its own zone, for a fleet may
 * put all of one call into one zone.
 */
export function balancedZones(group: Group, zone: string, alone: boolean): string[] {
  if (!alone && group.zones.includes(zone)) return [zone];
  const count = membersWithout(group, zone);
  const least = Math.min(...group.zones.map(count));
  return group.zones.filter((z) => count(z) <= least);
}
/** How many members a zone has once the old one, in this zone, is gone. */
function membersWithout(group: Group, zone: string): (z: string) => number {
  const staying = [...group.members.values()].filter((m) => judgeState(m.lifecycleState) !== "leaving");
  return (z) => staying.filter((m) => m.zone === z).length - Number(z === zone);
}

/** The pools one rung asks for; none: the rung has nothing to offer. Pure. */
export function planLaunch(x: {
  group: Group;
  old: { type: string; zone: string; weight: number };
  rung: Rung;
  /** Only the old one's zone, where its volume is. */
  home?: boolean;
  alone: boolean;
  /** How often the ladder has been climbed in vain. */
  pass?: number;
  /** Try pools that failed a moment ago as well: nothing else is left to try. */
  desperate: boolean;
  alt: string[];
  /** Nothing but these types will do: then only where the group stays balanced, else AZRebalance would move it back. */
  only?: string[];
  /** One subnet a zone (a fleet cannot name two of one zone); undefined: the template names it. */
  subnets: Map<string, string | undefined>;
  templateType: string | undefined;
  templateRequirements?: InstanceRequirementsRequest;
  /** Whether a type can be had in a zone at all; absent: not asked. */
  isOffered?: (type: string, zone: string) => boolean;
  memory: PoolMemory;
}): Pool[] {
  const { group, old, rung, memory } = x;
  const template = group.template;
  if (!template) return [];
  const lifecycle = rung === "on-demand" ? "on-demand" : "spot";
  const staysBalanced = rung === "balanced spot" || (x.only !== undefined && !group.suspended.has("AZRebalance"));
  const wanted = x.home ? [old.zone] : staysBalanced ? balancedZones(group, old.zone, x.alone) : group.zones;
  const zones = wanted.filter((z) => x.subnets.has(z));
  const all = offersFor({ ...x, alt: rung === "any spot" ? x.alt : [] });
  const offers = x.only ? restricted(all, x.only) : all;

  // A type may be named twice, for two templates; a pool asked for twice is refused.
  const distinct = offers.filter((o, i) => !o.type || offers.findIndex((other) => other.type === o.type) === i);
  const sets = distinct.filter((o) => !o.type);
  const most = Math.max(1, Math.floor(MOST_SETS / sets.length));
  const zonesFor = (offer: Override) => {
    if (offer.type || zones.length <= most) return zones;
    const count = membersWithout(group, old.zone);
    const emptiest = zones.toSorted((a, b) => count(a) - count(b));
    const from = (((x.pass ?? 0) + sets.indexOf(offer)) * most) % zones.length;
    return [...emptiest, ...emptiest].slice(from, from + most);
  };
  const pools = distinct.flatMap((offer, priority) =>
    zonesFor(offer).map((zone): Pool => {
      const { type, requirements } = offer;
      return { type, requirements, zone, subnet: x.subnets.get(zone), template: offer.template ?? template, priority };
    }),
  );
  const offered = pools.filter((p) => !p.type || (x.isOffered?.(p.type, p.zone) ?? true));
  const state = (p: Pool) => (p.type ? memory(lifecycle, p.type, p.zone) : undefined);
  // Attribute-based: alike in all zones, for sets that overlap and differ are refused.
  const isAvoided = old.type !== "" && pools.some((p) => !p.type && memory(lifecycle, old.type, p.zone));
  const without = (avoid: (p: Pool) => boolean) =>
    offered.filter((p) => !avoid(p)).map((p) => (isAvoided ? excluding(p, old.type) : p));
  const fresh = without((p) => state(p) !== undefined);
  if (fresh.length || rung === "balanced spot" || x.only) return fresh;
  const untried = without((p) => state(p) === "failed");
  return untried.length || !x.desperate ? untried : offered;
}

/**
 * EC2 User Guide, "Specify attributes for instance type selection": at most four InstanceRequirements structures in a
 * request. Each override counts as one, even where several say the same or leave it to the template.
 */
const MOST_SETS = 4;

/** What a group allows in the place of an instance of this type and weight. */
function offersFor(x: {
  group: Group;
  old: { type: string; weight: number };
  alt: string[];
  templateType: string | undefined;
  templateRequirements?: InstanceRequirementsRequest;
}): Override[] {
  const { group, old } = x;
  const offers: Override[] = group.overrides.length
    ? group.overrides
    : [{ type: x.templateType, requirements: x.templateRequirements, weight: 1 }];
  if (group.desiredType !== "units")
    return offers.map((o) => ({ ...o, requirements: ofWeight(o.requirements, group.desiredType, old.weight) }));
  if (group.overrides.some((o) => o.weight !== 1)) {
    const same = offers.filter((o) => o.weight === old.weight);
    return same.length ? same : [{ type: old.type, weight: old.weight }];
  }
  return [...offers, ...x.alt.filter((type) => !offers.some((o) => o.type === type)).map((type) => ({ type, weight: 1 }))];
}

/** Of these offers, what is one of `only`; AWS takes lists of allowed types with wildcards. */
function restricted(offers: Override[], only: string[]): Override[] {
  const fits = (patterns: string[], type: string) =>
    patterns.some((p) => new RegExp(`^${p.replaceAll(".", "\\.").replaceAll("*", ".*")}$`).test(type));
  return offers.flatMap((o) => {
    if (o.type) return only.includes(o.type) ? [o] : [];
    if (!o.requirements) return [];
    const { AllowedInstanceTypes: allowed = [], ExcludedInstanceTypes: excluded = [], ...rest } = o.requirements;
    const types = only.filter((type) => (!allowed.length || fits(allowed, type)) && !fits(excluded, type));
    return types.length ? [{ ...o, requirements: { ...rest, AllowedInstanceTypes: types } }] : [];
  });
}

/** Attribute-based: the old one's type, which is being reclaimed or had nothing lately, is left out by name. */
function excluding(pool: Pool, type: string): Pool {
  const { requirements } = pool;
  if (!requirements) return pool;
  const { AllowedInstanceTypes: allowed = [], ExcludedInstanceTypes: excluded = [], ...rest } = requirements;
  // AWS takes one of the two lists only.
  if (!allowed.length) return { ...pool, requirements: { ...rest, ExcludedInstanceTypes: [...new Set([...excluded, type])] } };
  const others = allowed.filter((t) => t !== type);
  return others.length ? { ...pool, requirements: { ...rest, AllowedInstanceTypes: others } } : pool;
}
/** Where desired counts vCPUs or memory, the replacement must have as much as the old one, so that desired comes out even. */
function ofWeight(
  r: InstanceRequirementsRequest | undefined,
  desiredType: string,
  weight: number,
): InstanceRequirementsRequest | undefined {
  if (!r) return undefined;
  return desiredType === "vcpu"
    ? { ...r, VCpuCount: { Min: weight, Max: weight } }
    : { ...r, MemoryMiB: { Min: weight, Max: weight } };
}

const REMEMBERED_MS = { failed: 3 * 60_000, reclaimed: 5 * 60_000 };
function remember(ctx: Ctx, lifecycle: string, type: string, zone: string, why: keyof typeof REMEMBERED_MS): void {
  ctx.state.failedPools.set(`${why} ${lifecycle} ${type} ${zone}`, ctx.deps.now() + REMEMBERED_MS[why]);
}
const poolMemory =
  (ctx: Ctx): PoolMemory =>
  (...pool) =>
    (["failed", "reclaimed"] as const).find(
      (why) => (ctx.state.failedPools.get(`${why} ${pool.join(" ")}`) ?? 0) > ctx.deps.now(),
    );

/** Every claim on an old instance, dead ones included: as AWS shows them, and those this process launched a moment ago. */
async function claimsOf(ctx: Ctx, old: string): Promise<Ec2Instance[]> {
  for (;;) {
    const seen = new Map(((await ctx.cloud.naming(old)) ?? []).map((c) => [c.id, c]));
    for (const c of ctx.state.claims.values()) {
      const olds = c.tags[TAG.replaces] ?? "";
      if (!olds.includes(old) || !olds.split(" ").includes(old)) continue; // the first look is the fast one
      const shown = seen.get(c.id);
      seen.set(c.id, shown ? { ...shown, tags: { ...c.tags, ...shown.tags } } : c);
    }
    const unordered = [...seen.values()].filter((c) => c.tags[TAG.replaces]?.includes(" ") && !c.tags[TAG.order]);
    if (!unordered.length) return [...seen.values()].filter((c) => replacedBy(c) === old);
    if (unordered.some((c) => isUnderWay(ctx, c))) await tick(ctx);
    else await writeOrders(ctx, [...seen.values()]);
  }
}

/**
 * The living claim on an old instance that wins; and those that are gone: dead, or let go in their turn, and so leaving
 * or members no more. To one that is about to be let go no data goes either (`forData`).
 */
async function claimOn(ctx: Ctx, old: string, forData = false) {
  const claims = await claimsOf(ctx, old);
  const isLetGo = await Promise.all(
    claims.map(async (c) => {
      if (!isLiving(c) || !c.tags[TAG.detached]) return false;
      const member = forData ? undefined : await ctx.cloud.member(c.id);
      return !member || judgeState(member.lifecycleState) === "leaving";
    }),
  );
  return { claim: winner(claims.filter((_, n) => !isLetGo[n])), gone: claims.filter((c, n) => isLetGo[n] || !isLiving(c)) };
}

/** Who stands for an old instance: its claim; where that is gone, the claim on that one, until it is settled. Data goes on to the last. */
async function standsFor(ctx: Ctx, old: string, forData = false, depth = 0): Promise<Ec2Instance | undefined> {
  const { claim, gone } = await claimOn(ctx, old, forData);
  if (claim) return forData || depth === 0 || !isSettled(claim) ? claim : undefined;
  for (const { id } of depth < 6 ? gone : []) {
    const next = await standsFor(ctx, id, forData, depth + 1);
    if (next) return next;
  }
  return undefined;
}

/**
 * Gives batches that lack it their order: each launch call's instances, dead ones included, by ID. Where one of them
 * shows it, that is the order of all, for a describe may lag behind the rest.
 */
async function writeOrders(ctx: Ctx, shown: Ec2Instance[]): Promise<void> {
  const inBatches = shown.filter((c) => c.tags[TAG.replaces]?.includes(" "));
  const batches = Map.groupBy(inBatches, (c) => `${c.tags["aws:ec2:fleet-id"] ?? ""} ${c.tags[TAG.replaces]}`);
  for (const batch of batches.values()) {
    const lacking = batch.filter((c) => !c.tags[TAG.order]);
    if (!lacking.length || lacking.some((c) => isUnderWay(ctx, c))) continue;
    const ids = batch.map((c) => c.id).sort();
    const order = { [TAG.order]: batch.find((c) => c.tags[TAG.order])?.tags[TAG.order] ?? ids.join(" ") };
    await ctx.cloud.tag(
      lacking.map((c) => c.id),
      order,
    );
    for (const c of lacking) ctx.state.claims.set(c.id, { ...c, tags: { ...c.tags, ...order } });
  }
}
/** Whoever launched a batch writes its order in a moment; after 30 s it is taken to be dead. */
const isUnderWay = (ctx: Ctx, claim: Ec2Instance) => cloudNow(ctx) - claim.launchedMs < 30_000;

async function launch(ctx: Ctx, work: Work): Promise<Result> {
  const flying = ctx.state.launching.get(work.instance);
  let climbing = flying;
  if (!climbing) {
    climbing = climb(ctx, work).finally(() => ctx.state.launching.delete(work.instance));
    ctx.state.launching.set(work.instance, climbing);
  }
  const claim = await climbing;
  if (typeof claim === "object") return claim;
  if (claim) {
    work.claim = claim;
    return done;
  }
  if (flying) return again("the other notice's launch came to nothing"); // that one may have had fewer rungs, or no deadline
  if (work.deadlineMs === undefined) {
    if (isPreaction(work)) await rememberFailure(ctx, work, "no capacity");
    return skip("no capacity for a better place now: the old one stays", "info");
  }
  const { broken } = ctx.state.groups.get(work.group) ?? {};
  return skip(broken ?? "no capacity anywhere until the deadline: the group substitutes when the old one goes", "error");
}

/** A dead one that its group still has as a member; one that we let go may drain for minutes, and is substituted by nobody. */
const isUnnoticed = (member: Member | undefined) => member !== undefined && !/^Detach/.test(member.lifecycleState);
/**
 * Desired counts a claim that died as a member, so the group's own substitute for it stands in for the old one as well;
 * unless it was settled: then each is a member in its own right.
 */
async function isSubstituted(ctx: Ctx, { instance, group: name }: Work): Promise<boolean> {
  const { claim, gone } = await claimOn(ctx, instance);
  const open = claim ? [] : gone.filter((c) => !isSettled(c));
  const group = open.length ? await ctx.cloud.group(name) : undefined;
  for (const { id } of group ? open : [])
    if (isUnnoticed(group?.members.get(id)) || (await howOldLeft(ctx, name, id)) === "substituted") return true;
  return false;
}

/** Climbs the ladder until an instance comes of it; without a hard deadline once, else until the deadline. */
async function climb(ctx: Ctx, work: Work): Promise<string | Result | undefined> {
  const { old, member, deadlineMs, options } = work;
  const spotMember = old !== undefined && (old.spot || TAG.fallback in old.tags);
  const rungs = rungsFor(spotMember, deadlineMs !== undefined, options.is_enable_od_fallback);
  // Preaction takes better bands only, the best one first; a fallback that goes back to spot takes any.
  const lists = !isPreaction(work) || (old && TAG.fallback in old.tags) ? [undefined] : old?.spot ? (work.better ?? []) : [];
  // A volume cannot leave its zone: its owner tries every rung there first.
  const ladder = lists.flatMap((only) =>
    rungs.flatMap((rung) => [...(options.persistence_dev ? [{ rung, home: true, only }] : []), { rung, home: false, only }]),
  );
  for (let pass = 0; ; pass++) {
    const desperate = pass > 0 || rungs.at(-1) !== "on-demand";
    const isHere = pass === 0 || isStaying((await ctx.cloud.group(work.group))?.members.get(work.instance));
    for (; ; work.rung++) {
      // Before a crash, by another daemon, or under a token that came back as a mismatch.
      if (await isSubstituted(ctx, work)) {
        await sendDetachMessage(ctx, work); // whoever attached it may have died before that
        return skip("its replacement died as a member, and the group substitutes that one by itself: none is launched", "info");
      }
      const claim = await standsFor(ctx, work.instance);
      if (claim && !(await isLost(ctx, claim))) {
        work.log.info(`${claim.id} was launched before for ${replacedBy(claim)}: going on with it`);
        return claim.id;
      }
      if (work.rung >= ladder.length) break;
      // An old one that has left meanwhile needs no new replacement: its group sees to that.
      if (!old || !member || !isHere) return skip(`it has left ${work.group} meanwhile: none is launched`, "info");
      const { rung, home, only } = ladder[work.rung] ?? { rung: "any spot", home: false };
      // Notices that ask for the same share one call; a volume's owner shares none.
      const place = rung === "balanced spot" || only ? member.zone : "";
      const alone = options.persistence_dev ? work.instance : "";
      const ask = JSON.stringify([rung, home, spotMember, member.weight, place, desperate, options.alt, alone, only]);
      const id = await lane(ctx, work.group).launch({ work, rung, home, pass, desperate, only, ask });
      if (id) return id;
    }
    work.rung = 0;
    if (deadlineMs === undefined || cloudNow(ctx) >= deadlineMs) return undefined;
    const waitMs = Math.min(10_000, 500 * 2 ** pass) * (0.5 + ctx.deps.random() / 2);
    work.log.warn("no capacity on any rung, trying again", { pass: pass + 1 });
    await pause(ctx, Math.min(waitMs, Math.max(0, deadlineMs - cloudNow(ctx))));
  }
}

/** One launch call, decided: what to ask for, how it is tagged, what its token is made of, and for how long it is of use. */
type Launch = {
  group: Group;
  pools: Pool[];
  lifecycle: "spot" | "on-demand";
  tags: { Key: string; Value: string }[];
  count: number;
  salt: string;
  asksForSpot: boolean;
  /** AWS's requests were short until the deadline: what is still in time needs them, and the group substitutes these. */
  isLate: () => boolean;
};

/** One launch call for up to ten notices; answers each with its instance, or undefined. */
async function launchBatch(ctx: Ctx, name: string, items: LaunchItem[]): Promise<(string | undefined)[]> {
  const olds = items.map((i) => i.work.instance).sort();
  const attempt = Math.max(...items.map((i) => i.work.attempt));
  const call = await planBatch(ctx, name, items, olds, attempt);
  if (!call) return items.map(() => undefined);
  const { lifecycle, pools, count } = call;
  const rung = items[0]?.rung;
  for (const { work } of items) {
    work.launchOut = true;
    work.log.debug(`asking for ${lifecycle}`, { rung, pools: pools.length, with: count > 1 ? count : undefined, attempt });
  }
  let ids: string[] = [];
  try {
    ids = call.asksForSpot ? await runInstances(ctx, call) : await createFleet(ctx, call);
  } catch (error) {
    if (error instanceof Unsent) for (const { work } of items) work.launchOut = false;
    // Nobody knows what became of the call: going on with other parameters could launch twice.
    if (error instanceof Stopped || isRetryable(error)) throw error;
    refused(ctx, call, error);
  }
  for (const { work } of items) work.launchOut = false;
  ids.sort();
  await noteClaims(ctx, call, ids);
  for (const { work } of items) {
    const replacement = ids[olds.indexOf(work.instance)];
    if (replacement) work.log.info(`launched ${replacement} for ${work.instance}`, { replacement, lifecycle, rung });
    else work.attempt = attempt + 1;
  }
  return items.map((i) => ids[olds.indexOf(i.work.instance)]);
}

async function planBatch(
  ctx: Ctx,
  name: string,
  items: LaunchItem[],
  olds: string[],
  attempt: number,
): Promise<Launch | undefined> {
  const [first] = items;
  const isLate = () => items.every(({ work }) => work.deadlineMs !== undefined && cloudNow(ctx) >= work.deadlineMs);
  if (isLate()) return undefined;
  const group = await ctx.cloud.group(name);
  if (!first || !group?.template || group.suspended.has("Launch") || group.status) return undefined;
  const { old, member, options } = first.work;
  if (!old || !member) return undefined;
  const data = await templateOf(ctx, group.template);
  const all = [data, ...(await Promise.all(group.overrides.flatMap((o) => (o.template ? [templateOf(ctx, o.template)] : []))))];
  const fault = all.find((t) => t.fault)?.fault;
  if (fault) {
    const known = ctx.state.groups.get(name);
    if (known?.broken !== fault) ctx.deps.log.error(`nothing is launched: ${fault}`, { group: name });
    if (known) ctx.state.groups.set(name, { ...known, broken: fault }); // until a refresh finds it mended
    return undefined;
  }
  const inHand = [...ctx.state.inHand.values()].filter((w) => w.group === name && w.queue === "interruption_evt_sqs");
  const pools = planLaunch({
    group,
    old: { type: old.type, zone: member.zone, weight: member.weight },
    rung: first.rung,
    home: first.home,
    isOffered: options.persistence_dev ? await offerings(ctx, group.zones) : undefined,
    alone: inHand.length < 2,
    pass: first.pass,
    desperate: first.desperate,
    alt: options.alt,
    only: first.only,
    subnets: await subnetsByZone(ctx, group, data.namesSubnet),
    templateType: data.type,
    templateRequirements: data.requirements,
    memory: poolMemory(ctx),
  });
  if (!pools.length) return undefined;
  const lifecycle = first.rung === "on-demand" ? "on-demand" : "spot";
  const isFallback = lifecycle === "on-demand" && (old.spot || TAG.fallback in old.tags);
  const tags = [
    ...group.propagatedTags,
    { Key: TAG.group, Value: name },
    { Key: TAG.replaces, Value: olds.join(" ") },
    ...(isFallback ? [{ Key: TAG.fallback, Value: "on-demand" }] : []),
  ];
  // Half a minute later the tag shows what was launched, so it is asked anew: AWS would repeat its "nothing to be had".
  const since = (w: Work) => Math.floor((cloudNow(ctx) - w.firstReceivedMs) / 30_000);
  const salt = `${attempt} ${items.map((i) => `${i.work.notice.id} ${since(i.work)}`).sort()}`;
  return {
    group,
    pools,
    lifecycle,
    tags,
    count: items.length,
    salt,
    asksForSpot: all.some((t) => t.asksForSpot),
    isLate,
  };
}

/** Which types the zones offer; asked only where a zone matters, and taken as all where AWS does not say. */
async function offerings(ctx: Ctx, zones: string[]): Promise<(type: string, zone: string) => boolean> {
  const input = {
    LocationType: "availability-zone" as const,
    Filters: [{ Name: "location", Values: zones }],
    MaxResults: 1000,
  };
  const read = async () => {
    const pages = await allPages((NextToken) =>
      aws(ctx, "reading what the zones offer", (o) =>
        ctx.deps.ec2.send(new DescribeInstanceTypeOfferingsCommand({ ...input, NextToken }), o),
      ),
    );
    const found = pages.flatMap((p) => p.InstanceTypeOfferings ?? []);
    return new Set(found.map(({ InstanceType, Location }) => `${InstanceType} ${Location}`));
  };
  try {
    const found = await cached(ctx, `offerings ${zones.join()}`, read);
    return (type, zone) => found.size === 0 || found.has(`${type} ${zone}`);
  } catch (error) {
    if (error instanceof Stopped) throw error;
    ctx.deps.log.warn(`${errorText(error)}: taking it that every type is there`);
    return () => true;
  }
}

/** A launch call that AWS answered with a refusal. */
function refused(ctx: Ctx, { group, pools, lifecycle }: Launch, error: unknown): void {
  const name = errorName(error);
  const log = ctx.deps.log.with({ group: group.name, error: name });
  if (name === "IdempotentParameterMismatch") log.debug(`${errorText(error)}: looking for what was launched before`);
  else log[CAPACITY.has(name) ? "warn" : "error"](`${errorText(error)}`);
  if (CAPACITY.has(name)) for (const p of pools) if (p.type) remember(ctx, lifecycle, p.type, p.zone, "failed");
}

/** Remembers what was launched, and gives a batch its order. */
async function noteClaims(ctx: Ctx, { tags, count, lifecycle }: Launch, ids: string[]): Promise<void> {
  const order: Record<string, string> = count > 1 ? { [TAG.order]: ids.join(" ") } : {};
  const Tags = [...tags, ...Object.entries(order).map(([Key, Value]) => ({ Key, Value }))];
  const InstanceLifecycle = lifecycle === "spot" ? lifecycle : undefined;
  const LaunchTime = new Date(cloudNow(ctx));
  for (const id of ids) {
    const claim = toInstance({ InstanceId: id, State: { Name: "pending" }, LaunchTime, InstanceLifecycle, Tags });
    if (claim) ctx.state.claims.set(id, claim);
  }
  if (count > 1 && ids.length) await ctx.cloud.tag(ids, order, 10_000);
}

/** The same call with the same token until there is an answer: for a minute where it is refused, for ten where none comes. */
const LAUNCH_CALL = { tries: 30, timeoutMs: 20_000 };

/**
 * The token covers all that the request says, the notices and the attempt: AWS may repeat its answer, "nothing" too,
 * for an hour, and refuses a second try with other types under the first one's token.
 */
const tokenOf = (request: object, salt: string) =>
  createHash("sha256")
    .update(JSON.stringify([request, salt]))
    .digest("hex");

/** A fleet names a template by ID or by name, never by both. */
const fleetTemplate = ({ LaunchTemplateId, LaunchTemplateName, Version }: LaunchTemplateSpecification) => ({
  ...(LaunchTemplateId ? { LaunchTemplateId } : { LaunchTemplateName }),
  Version: Version ?? "$Default",
});

/** The request for `count` instances from these pools, without its token. AWS allows 300 overrides. */
export function fleetRequest(
  group: Group,
  pools: Pool[],
  lifecycle: "spot" | "on-demand",
  tags: { Key: string; Value: string }[],
  count: number,
): CreateFleetCommandInput {
  const spot = lifecycle === "spot";
  const override = (p: Pool): FleetLaunchTemplateOverridesRequest => ({
    InstanceType: p.type as _InstanceType | undefined,
    InstanceRequirements: p.requirements,
    SubnetId: p.subnet,
    MaxPrice: spot ? group.spotMaxPrice : undefined,
    // AWS refuses it beside requirements.
    Priority: !spot && group.prioritized && p.type ? p.priority : undefined,
  });
  const byTemplate = Map.groupBy(pools.slice(0, 300), (p) => JSON.stringify(fleetTemplate(p.template)));
  return {
    Type: "instant",
    TargetCapacitySpecification: {
      TotalTargetCapacity: count,
      DefaultTargetCapacityType: lifecycle,
      SpotTargetCapacity: spot ? count : 0,
      OnDemandTargetCapacity: spot ? 0 : count,
    },
    ...(spot
      ? { SpotOptions: { AllocationStrategy: "price-capacity-optimized" } }
      : { OnDemandOptions: { AllocationStrategy: group.prioritized ? "prioritized" : "lowest-price" } }),
    LaunchTemplateConfigs: [...byTemplate].map(([template, of]) => ({
      LaunchTemplateSpecification: JSON.parse(template),
      Overrides: of.map(override),
    })),
    TagSpecifications: [{ ResourceType: "instance", Tags: tags }],
  };
}

async function createFleet(ctx: Ctx, { group, pools, lifecycle, tags, count, salt, isLate }: Launch): Promise<string[]> {
  const request = fleetRequest(group, pools, lifecycle, tags, count);
  const command = new CreateFleetCommand({ ...request, ClientToken: tokenOf(request, salt) });
  const { Instances = [], Errors = [] } = await aws(
    ctx,
    `launching ${count} ${lifecycle}`,
    (o) => ctx.deps.ec2.send(command, o),
    { ...LAUNCH_CALL, isLate },
  );
  const zoneOf = new Map(pools.map((p) => [p.subnet, p.zone]));
  const said = new Set<string>();
  const had = new Map<string, number>();
  for (const { ErrorCode = "", ErrorMessage = "", LaunchTemplateAndOverrides: { Overrides: o = {} } = {} } of Errors) {
    const zone = o.AvailabilityZone ?? zoneOf.get(o.SubnetId) ?? "";
    if (ErrorCode === "InsufficientFreeAddressesInSubnet" && o.SubnetId) remember(ctx, "subnet", o.SubnetId, "", "failed");
    else if (o.InstanceType) remember(ctx, lifecycle, o.InstanceType, zone, "failed");
    if (CAPACITY.has(ErrorCode)) had.set(ErrorCode, (had.get(ErrorCode) ?? 0) + 1);
    else if (!said.has(ErrorCode))
      ctx.deps.log.error(`launching ${o.InstanceType ?? ""} in ${zone}: ${ErrorCode}: ${ErrorMessage}`, { group: group.name });
    said.add(ErrorCode);
  }
  // One line a call: in an outage each of its pools says so, at each rung of each notice.
  const counts = [...had].map(([code, times]) => `${code} (${times})`);
  if (counts.length) ctx.deps.log.debug(`no ${lifecycle}: ${counts.join(", ")}`, { group: group.name });
  return Instances.flatMap((i) => i.InstanceIds ?? []);
}

/** For instances of one pool. Beside a template's own interfaces AWS refuses a subnet: it goes into them. */
async function poolRequest(
  ctx: Ctx,
  { template, type, subnet }: Pool,
  tags: { Key: string; Value: string }[],
  count: number,
): Promise<RunInstancesCommandInput> {
  const { interfaces } = await templateOf(ctx, template);
  return {
    LaunchTemplate: fleetTemplate(template),
    InstanceType: type as _InstanceType | undefined,
    ...(subnet && interfaces.length
      ? { NetworkInterfaces: interfaces.map((n) => ({ ...n, SubnetId: n.SubnetId ?? subnet })) }
      : { SubnetId: subnet }),
    MinCount: 1,
    MaxCount: count,
    TagSpecifications: [{ ResourceType: "instance", Tags: tags }],
  };
}

/** A template that itself asks for spot, which CreateFleet may refuse: one pool after the other. */
async function runInstances(ctx: Ctx, { pools, lifecycle, tags, count, salt, isLate }: Launch): Promise<string[]> {
  if (lifecycle === "on-demand")
    throw Object.assign(new Error("the launch template asks for spot itself: on-demand cannot be had from it"), {
      name: "Unsupported",
    });
  for (const p of pools) {
    const request = await poolRequest(ctx, p, tags, count);
    try {
      const command = new RunInstancesCommand({ ...request, ClientToken: tokenOf(request, salt) });
      const { Instances = [] } = await aws(ctx, `launching ${p.type} in ${p.zone}`, (o) => ctx.deps.ec2.send(command, o), {
        ...LAUNCH_CALL,
        isLate,
      });
      const ids = Instances.flatMap((i) => (i.InstanceId ? [i.InstanceId] : []));
      if (ids.length) return ids;
    } catch (error) {
      if (!CAPACITY.has(errorName(error))) throw error;
      if (p.type) remember(ctx, lifecycle, p.type, p.zone, "failed");
    }
  }
  return [];
}

/** A read that changes seldom: at most once a minute, shared by all who ask meanwhile. */
async function cached<T>(ctx: Ctx, key: string, read: () => Promise<T>): Promise<T> {
  const known = ctx.state.cache.get(key);
  if (known && ctx.deps.now() - known.atMs < 60_000) return known.value as Promise<T>;
  const value = read();
  ctx.state.cache.set(key, { atMs: ctx.deps.now(), value });
  value.catch(() => ctx.state.cache.delete(key)); // whoever asked hears of it; the next one asks anew
  return value;
}

type TemplateData = {
  type: string | undefined;
  requirements: InstanceRequirementsRequest | undefined;
  asksForSpot: boolean;
  interfaces: InstanceNetworkInterfaceSpecification[];
  namesSubnet: string | undefined;
  volumes: Record<string, { VolumeType?: string; VolumeSize?: number }>;
  /** Why nothing may be launched from it. */
  fault: string | undefined;
};
const templateOf = (ctx: Ctx, spec: LaunchTemplateSpecification): Promise<TemplateData> =>
  cached(ctx, JSON.stringify(spec), async () => {
    const { LaunchTemplateId, LaunchTemplateName, Version = "$Default" } = fleetTemplate(spec) as LaunchTemplateSpecification;
    const input = { LaunchTemplateId, LaunchTemplateName, Versions: [Version] };
    const name = LaunchTemplateName ?? LaunchTemplateId;
    const { LaunchTemplateVersions: [version] = [] } = await aws(ctx, `reading launch template ${name}`, (o) =>
      ctx.deps.ec2.send(new DescribeLaunchTemplateVersionsCommand(input), o),
    );
    const data = version?.LaunchTemplateData;
    const tags = (data?.TagSpecifications ?? []).flatMap((t) => (t.ResourceType === "instance" ? (t.Tags ?? []) : []));
    const reserved = tags.flatMap(({ Key = "" }) => (RESERVED_TAGS.has(Key) ? [Key] : []));
    return {
      type: data?.InstanceType,
      requirements: data?.InstanceRequirements as InstanceRequirementsRequest | undefined,
      asksForSpot: data?.InstanceMarketOptions?.MarketType === "spot",
      interfaces: (data?.NetworkInterfaces ?? []) as InstanceNetworkInterfaceSpecification[],
      namesSubnet: data?.NetworkInterfaces?.find((n) => n.SubnetId)?.SubnetId,
      volumes: Object.fromEntries(
        (data?.BlockDeviceMappings ?? []).flatMap((m) => (m.DeviceName && m.Ebs ? [[m.DeviceName, m.Ebs]] : [])),
      ),
      fault: reserved.length
        ? `launch template ${name} tags instances with ${reserved.join(" ")}, as if they were replacements already; remove these tags from it`
        : undefined,
    };
  });

/** One subnet for each zone, the one with the most free addresses; where the template names a subnet, an override must not. */
async function subnetsByZone(ctx: Ctx, group: Group, named: string | undefined): Promise<Map<string, string | undefined>> {
  const ids = named ? [named] : group.subnets;
  if (!ids.length) return new Map(group.zones.map((zone) => [zone, undefined]));
  const subnets = await cached(ctx, ids.join(), async () => {
    // By filter: one of them that has been deleted is absent, and no reason to refuse the call.
    const Filters = [{ Name: "subnet-id", Values: ids }];
    const { Subnets = [] } = await aws(ctx, "reading subnets", (o) =>
      ctx.deps.ec2.send(new DescribeSubnetsCommand({ Filters }), o),
    );
    return Subnets.flatMap(({ SubnetId: id, AvailabilityZone: zone, AvailableIpAddressCount: free = 0 }) =>
      id && zone ? [{ id, zone, free }] : [],
    );
  });
  const full = (id: string) => Number(poolMemory(ctx)("subnet", id, "") !== undefined);
  const best = subnets.toSorted((a, b) => full(a.id) - full(b.id) || b.free - a.free);
  return new Map(best.reverse().map((s) => [s.zone, named ? undefined : s.id]));
}

async function waitUntilRunning(ctx: Ctx, work: Work): Promise<Result> {
  const sinceMs = ctx.deps.now();
  const id = work.claim ?? "";
  for (;;) {
    const claim = await ctx.cloud.instance(id);
    if (claim && isLiving(claim) && (await isLost(ctx, claim))) return lostClaim(ctx, work, claim);
    if (claim?.state === "running") return done;
    // A launch may take seconds to show up at all.
    if (claim ? !isLiving(claim) : ctx.deps.now() - sinceMs > 60_000) return lostClaim(ctx, work, claim);
    await tick(ctx);
  }
}

/** A replacement that dies while pending is a failed rung: the ladder goes on with the next one. */
function lostClaim(ctx: Ctx, work: Work, claim: Ec2Instance | undefined): Result {
  const id = work.claim ?? "";
  if (claim?.zone) remember(ctx, claim.spot ? "spot" : "on-demand", claim.type, claim.zone, "failed");
  if (!isLiving(claim)) ctx.state.claims.delete(id);
  work.log.warn(`replacement ${id} died before it was attached: ${claim?.stateReason || (claim?.state ?? "gone")}`, {
    replacement: id,
  });
  work.claim = undefined;
  work.rung++;
  work.attempt++;
  return again(`${id} was lost`, 0);
}

// ─── Steps: attach ───────────────────────────────────────────────────────────────────────────────────────
// Attach before detach, so desired passes through one more. Where the maximum is in the way it is recorded in a
// tag on the group and raised; the instance manager puts it back. Old and new are read once more right before.

/** Nobody knows the weight for which an old one stood that has left. */
type AttachItem = { claim: string; old: string; weight: number | undefined };
type AttachVerdict =
  | { is: "attached" }
  | { is: "lost" }
  | { is: "not owed"; reason: string }
  | { is: "later"; reason: string }
  | { is: "refused"; reason: string };

/** `spotmax:max_size` = ORIGINAL/RAISED. */
export function readMaxTag(tag: string | undefined): { original: number; raised: number } | undefined {
  const [, original, raised] = /^(\d+)\/(\d+)$/.exec(tag ?? "") ?? [];
  return original && raised ? { original: Number(original), raised: Number(raised) } : undefined;
}
/**
 * The maximum and tag that make room for `units` more, or undefined where there is room. It is a multiple of the
 * original one, mostly twice that, whatever is needed now: two daemons may raise at once, AWS has no conditional
 * update, and of two different values the lower one, coming last, would end members.
 */
export function raisedMax(
  group: Pick<Group, "desired" | "max" | "tags">,
  units: number,
): { max: number; tag: string } | undefined {
  const need = group.desired + units;
  if (need <= group.max) return undefined;
  const ours = readMaxTag(group.tags[TAG.maxSize]);
  const original = ours && isRaised(group.max, ours) ? ours.original : group.max;
  const max = original > 0 ? original * Math.ceil(need / original) : need;
  return { max, tag: `${original}/${max}` };
}
/** Whether we set this maximum: only multiples of the original are ours, any other is somebody else's word. */
export function isRaised(max: number, { original, raised }: { original: number; raised: number }): boolean {
  return max > original && max <= raised && (original === 0 || max % original === 0);
}

const groupTag = (name: string, Key: string, Value?: string) => ({
  ResourceId: name,
  ResourceType: "auto-scaling-group",
  Key,
  Value,
  PropagateAtLaunch: false,
});
const OVER_LIMIT = /update the AutoScalingGroup sizes|desiredSize equals minSize/;
// A name may have dots in it.
const ALREADY_IN = /already part of AutoScalingGroup:\s*(\S+?)[.,]?(?:\s|$)/;
const isStaying = (m: Member | undefined): m is Member =>
  m !== undefined && (m.lifecycleState === "InService" || m.lifecycleState.startsWith("Pending"));

async function howOldLeft(ctx: Ctx, group: string, old: string): Promise<HowLeft> {
  const known = ctx.state.left.get(old);
  if (known) return known;
  const [activities, instance] = await Promise.all([ctx.cloud.activities(`${group} ${old}`), ctx.cloud.instance(old)]);
  const told = howItLeft(activities ?? [], old);
  if (told !== "unknown") ctx.state.left.set(old, told); // that will never change
  if (told !== "unknown" || instance?.tags[TAG.detached] !== group) return told;
  // Activities lag: until they tell, the tag is an intention, and its group may have ended the old one by itself.
  const sinceMs = ctx.state.untoldMs.get(old) ?? ctx.deps.now();
  ctx.state.untoldMs.set(old, sinceMs);
  return ctx.deps.now() - sinceMs < TOLD_MS ? "unknown" : "decremented";
}
const TOLD_MS = 10_000;
/** It was let go, and how it left will be known in seconds. */
const isUntold = async (ctx: Ctx, group: string, old: string) =>
  (await howOldLeft(ctx, group, old)) === "unknown" && ctx.state.untoldMs.has(old);

/**
 * What became of the one that a claim stands for in the end: where that was itself a claim nobody had settled yet, its
 * own old one decides, for each attach in the chain has added one to desired.
 */
async function fateOf(ctx: Ctx, group: Group, claim: string, old: string, depth = 0): Promise<"staying" | HowLeft> {
  if (isStaying(group.members.get(old))) return "staying";
  const how = await howOldLeft(ctx, group.name, old);
  if (how !== "decremented" || depth > 6) return how;
  const before = await openClaimOn(ctx, old);
  if (!before) return how;
  // Of two that were launched for it one went: whoever replaced that one is too many as long as the other is there.
  const { claim: other } = await claimOn(ctx, before);
  if (other && other.id !== claim && group.members.has(other.id)) return "substituted";
  return fateOf(ctx, group, claim, before, depth + 1);
}
/** Whom this instance was to replace, if it is a claim of ours that was never settled. */
async function openClaimOn(ctx: Ctx, id: string): Promise<string | undefined> {
  const claim = ctx.state.claims.get(id) ?? (await ctx.cloud.instance(id));
  return claim && TAG.replaces in claim.tags && !isSettled(claim) ? replacedBy(claim) : undefined;
}

async function raiseMaximum(ctx: Ctx, group: Group, units: number): Promise<void> {
  const raised = raisedMax(group, units);
  if (!raised) return;
  const { name } = group;
  ctx.state.restoring.set(name, {});
  // The tag first: a maximum raised without a record would never be put back.
  await aws(ctx, `recording the maximum of ${name}`, (o) =>
    ctx.deps.autoScaling.send(new CreateOrUpdateTagsCommand({ Tags: [groupTag(name, TAG.maxSize, raised.tag)] }), o),
  );
  await aws(ctx, `raising the maximum of ${name}`, (o) =>
    ctx.deps.autoScaling.send(new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: name, MaxSize: raised.max }), o),
  );
  ctx.deps.log.info(`raised the maximum of ${name} from ${group.max} to ${raised.max} for the replacement`, { group: name });
}

async function protect(ctx: Ctx, name: string, all: string[], ProtectedFromScaleIn: boolean): Promise<void> {
  const ids = [...new Set(all)];
  if (!ids.length) return;
  try {
    await aws(ctx, `${ProtectedFromScaleIn ? "protecting" : "releasing"} ${ids.join(" ")}`, (o) =>
      ctx.deps.autoScaling.send(
        new SetInstanceProtectionCommand({ AutoScalingGroupName: name, InstanceIds: ids, ProtectedFromScaleIn }),
        o,
      ),
    );
  } catch (error) {
    if (isRetryable(error)) throw error;
    // One that has left refuses the call for all.
    if (ids.length > 1) for (const id of ids) await protect(ctx, name, [id], ProtectedFromScaleIn);
    else ctx.deps.log.debug(errorText(error), { group: name });
  }
}

/** Attaches up to 20 claims of one group; runs alone on the group. */
async function attachBatch(ctx: Ctx, name: string, items: AttachItem[]): Promise<AttachVerdict[]> {
  const verdicts = new Map<string, AttachVerdict>();
  const [first, claims] = await Promise.all([ctx.cloud.group(name), Promise.all(items.map((i) => ctx.cloud.instance(i.claim)))]);
  let group = first;
  const wanted: AttachItem[] = [];
  for (const [n, item] of items.entries()) {
    if (!group || group.status) verdicts.set(item.claim, { is: "not owed", reason: `group ${name} is being deleted` });
    else if (group.members.has(item.claim)) verdicts.set(item.claim, { is: "attached" });
    else if (claims[n] && !isLiving(claims[n])) verdicts.set(item.claim, { is: "lost" });
    else if (claims[n]?.state !== "running") verdicts.set(item.claim, { is: "later", reason: `${item.claim} is not running` });
    else if (group.suspended.has("Launch"))
      verdicts.set(item.claim, { is: "later", reason: `the Launch process of ${name} is suspended` });
    else if (!isStaying(group.members.get(item.old)) && (await isUntold(ctx, name, item.old)))
      verdicts.set(item.claim, { is: "later", reason: `${name} does not tell yet how ${item.old} left` });
    else if (!isStaying(group.members.get(item.old)) && (await howOldLeft(ctx, name, item.old)) === "decremented")
      verdicts.set(item.claim, { is: "not owed", reason: `${item.old} left with decrement` });
    else if (!wanted.some((w) => w.claim === item.claim)) wanted.push(item); // two messages may wait for one claim
  }
  // Whatever the answer: from here on it may be a member.
  for (const i of wanted) ctx.state.joined.set(i.claim, ctx.deps.now());
  for (let rounds = 0; group && wanted.length; rounds++) {
    const ids = wanted.map((i) => i.claim);
    const attached = (id: string) => verdicts.set(id, { is: "attached" });
    const most = Math.max(1, ...[...group.overrides, ...group.members.values()].map((w) => w.weight));
    try {
      await raiseMaximum(
        ctx,
        group,
        wanted.reduce((sum, i) => sum + (i.weight ?? most), 0),
      );
      await aws(ctx, `attaching ${ids.join(" ")} to ${name}`, (o) =>
        ctx.deps.autoScaling.send(new AttachInstancesCommand({ AutoScalingGroupName: name, InstanceIds: ids }), o),
      );
      ids.forEach(attached);
      wanted.length = 0;
    } catch (error) {
      const text = errorText(error);
      if (isRetryable(error) || errorName(error) !== "ValidationError") throw error;
      group = await ctx.cloud.group(name);
      if (OVER_LIMIT.test(text) && rounds < 5) continue; // somebody else took the room: read again, raise again
      for (const i of wanted) if (group?.members.has(i.claim)) attached(i.claim);
      const blamed = named(error).filter((id) => ids.includes(id));
      // An answer was lost: AWS knows it as a member, whatever a describe that lags behind says.
      if (ALREADY_IN.exec(text)?.[1] === name) for (const id of ids.length === 1 ? ids : blamed) attached(id);
      // A describe that lags may show room for as long: that is no fault of the instances.
      if (OVER_LIMIT.test(text)) for (const id of ids) if (!verdicts.has(id)) verdicts.set(id, { is: "later", reason: text });
      const refused = ids.length === 1 ? ids : blamed.length < ids.length ? blamed : [];
      for (const id of refused) ctx.state.joined.delete(id);
      for (const id of refused) if (!verdicts.has(id)) verdicts.set(id, { is: "refused", reason: text });
      if (!refused.length && !ids.some((id) => verdicts.has(id))) {
        // The refusal names nobody: one by one.
        for (const item of wanted.splice(0))
          verdicts.set(item.claim, (await attachBatch(ctx, name, [item]))[0] ?? { is: "lost" });
      }
      wanted.splice(0, wanted.length, ...wanted.filter((i) => !verdicts.has(i.claim)));
    }
  }
  return items.map((i) => verdicts.get(i.claim) ?? { is: "later", reason: "no verdict" });
}

/** Ends a claim that two reads, ten seconds apart, show outside every group: describes may lag that far behind an attach. */
async function endOutside(ctx: Ctx, claim: string, group: string): Promise<boolean> {
  if (await ctx.cloud.member(claim)) return false;
  await pause(ctx, 10_000);
  return endStray(ctx, claim, group);
}
/** The second read of one that is in no group, and its end; it may be attached at this moment, or have been and not show it yet. */
async function endStray(ctx: Ctx, claim: string, group: string): Promise<boolean> {
  return lane(ctx, group).exclusive(async () => {
    const [member, shown] = await Promise.all([ctx.cloud.member(claim), ctx.cloud.instance(claim)]);
    // Settled by another daemon meanwhile, it has had its place; and who is let go has a termination message.
    if (member || (shown && (isSettled(shown) || TAG.detached in shown.tags))) return false;
    if (ctx.deps.now() - (ctx.state.joined.get(claim) ?? 0) < BELIEVED_MS) return false;
    await ctx.cloud.terminate(claim);
    ctx.state.claims.delete(claim);
    return true;
  });
}

async function attach(ctx: Ctx, work: Work): Promise<Result> {
  const claim = work.claim ?? "";
  const best = await standsFor(ctx, work.instance);
  if (best && best.id !== claim) {
    work.claim = best.id;
    return again(`${best.id} wins over ${claim}`, 0);
  }
  if (best && isSettled(best)) return done;
  const verdict = await lane(ctx, work.group).attach({ claim, old: work.instance, weight: work.member?.weight });
  switch (verdict.is) {
    case "attached":
      work.log.info(`attached ${claim} to ${work.group}`, { replacement: claim });
      return guard(ctx, work, claim);
    case "lost":
      return lostClaim(ctx, work, await ctx.cloud.instance(claim));
    case "later":
      return again(verdict.reason, 2_000);
    case "not owed":
      if (!(await endOutside(ctx, claim, work.group))) return again(`${claim} is a member after all`, 0);
      return skip(`${verdict.reason}: no replacement is owed, ${claim} is ended`, "info");
    case "refused":
      if (!(await endOutside(ctx, claim, work.group))) return again(`${claim} is a member after all`, 0);
      work.log.error(`${verdict.reason}; ${claim} is ended`, { replacement: claim });
      return lostClaim(ctx, work, undefined);
  }
}

/** The detach is in hand and waits for nothing but this replacement's service: there is no "beside" to be protected in. */
const isDetachNear = (ctx: Ctx, work: Work, group: Group): boolean =>
  !group.targetGroups.length &&
  !work.options.k8s_node_drain_option &&
  ctx.state.inHand.values().some((w) => w.queue === "detach_evt_sqs" && w.instance === work.instance);

/** Protects a replacement from scale-in while it stands beside its old one; AWS refuses that before it is in service. */
async function guard(ctx: Ctx, work: Work, claim: string): Promise<Result> {
  for (let round = 0; round < 60; round++) {
    const group = await ctx.cloud.group(work.group);
    const member = group?.members.get(claim);
    const known = ctx.state.claims.get(claim);
    if (!isStaying(group?.members.get(work.instance)) || member?.isProtected || (known && isSettled(known))) break;
    if (group && isDetachNear(ctx, work, group)) break;
    if (member?.lifecycleState === "InService") {
      await lane(ctx, work.group).protect(claim);
      // Whoever detached the old one meanwhile took the protection off before it was put on.
      const left = !isStaying((await ctx.cloud.group(work.group))?.members.get(work.instance));
      if (left && !work.oldProtected) await lane(ctx, work.group).release(claim);
      break;
    }
    if (!member && round > 10) break;
    await tick(ctx);
  }
  return done;
}

// ─── Steps: detach and terminate ─────────────────────────────────────────────────────────────────────────
// The old one goes when its replacement is in service, or when its time is up. What we let go carries
// spotmax:detached before it goes, and only what carries that is ever ended here.

type DetachItem = {
  old: string;
  claim: string | undefined;
  decrement: boolean;
  forced: boolean;
  oldProtected: boolean;
};
type DetachVerdict = "detached" | "left" | "refused" | "not ready";

/** How far a replacement is: none living, launched, a member that is not in service, in service, in service and healthy in its target groups. */
export type Standing = "none" | "outside" | "joining" | "in service" | "healthy";

/** When and how an old instance is detached. Pure; times in ms. */
export function whenToDetach(x: {
  nowMs: number;
  deadlineMs: number | undefined;
  standing: Standing;
  refused: boolean;
}): "wait" | "decrement" | "substitute" {
  const { nowMs, deadlineMs, standing, refused } = x;
  if (standing === "healthy" && !refused) return "decrement";
  if (deadlineMs === undefined) return "wait";
  // Its time is up: without decrement where nobody takes its place, so that the group launches its own substitute.
  if (nowMs >= deadlineMs - FORCED_MS)
    return refused || standing === "none" || standing === "outside" ? "substitute" : "decrement";
  // Connections need time to drain, whatever the target groups think of the new one.
  return nowMs >= deadlineMs - 30_000 && standing === "in service" && !refused ? "decrement" : "wait";
}

async function standingOf(ctx: Ctx, group: Group, claim: Ec2Instance): Promise<Standing> {
  const member = group.members.get(claim.id);
  // In Standby it serves nobody, and whoever put it there has taken it out of desired.
  if (!member || /leaving|not in service/.test(judgeState(member.lifecycleState))) return "outside";
  if (member.lifecycleState !== "InService") return "joining";
  const healthy = await Promise.all(group.targetGroups.map((arn) => ctx.cloud.isHealthy({ arn, id: claim.id })));
  return healthy.every(Boolean) ? "healthy" : "in service";
}

/**
 * Who takes an old instance's place: its living claim; where that one has died, the claim's own replacement, or
 * the substitute that the group launched for it (desired still counts the dead one).
 */
async function standIn(
  ctx: Ctx,
  group: Group,
  old: string,
  { of = old, depth = 0 } = {},
): Promise<{ claim?: Ec2Instance; standing: Standing }> {
  const { claim, gone } = await claimOn(ctx, of);
  if (claim) return { claim, standing: await standingOf(ctx, group, claim) };
  for (const dead of depth < 5 ? gone.filter((c) => !isSettled(c)) : []) {
    if (isUnnoticed(group.members.get(dead.id))) return { standing: "joining" }; // the group has not noticed yet that it is to substitute it
    if ((await howOldLeft(ctx, group.name, dead.id)) === "substituted") {
      const others = [...group.members.values()].filter((m) => m.id !== old && m.lifecycleState === "InService");
      const weight = group.members.get(old)?.weight ?? 1;
      return { standing: others.reduce((sum, m) => sum + m.weight, 0) >= group.desired - weight ? "healthy" : "joining" };
    }
    const { standing } = await standIn(ctx, group, old, { of: dead.id, depth: depth + 1 });
    if (standing !== "none") return { standing };
  }
  return { standing: "none" };
}

/** On the way out: short leases where there is a hard deadline, and a note for the instance manager. */
function hurry(ctx: Ctx, work: Work): void {
  shorten(ctx, work);
  ctx.state.detachSeenMs.set(work.instance, ctx.deps.now());
}
/** A minute past its deadline and still in service: the notice did not come true, and there is no hurry any more. */
function lapse(ctx: Ctx, work: Work): void {
  if (work.deadlineMs !== undefined && cloudNow(ctx) > work.deadlineMs + 60_000) work.deadlineMs = undefined;
}
/** Without a hard deadline, and without a replacement. */
function claimGone(ctx: Ctx, work: Work): Result {
  if (isFresh(ctx, work, BELIEVED_MS)) return retry("its replacement is gone, or not to be seen yet", 30);
  sayConsulLeft(ctx, work);
  return skip("its replacement is gone: the old one stays", "warn");
}

/** The minimum will refuse the decrement: without a hard deadline nothing is taken from one that stays. */
async function staysBeside(ctx: Ctx, work: Work): Promise<boolean> {
  const group = work.deadlineMs === undefined ? await ctx.cloud.group(work.group) : undefined;
  const old = group?.members.get(work.instance);
  return group !== undefined && old !== undefined && group.desired - old.weight < group.min;
}

async function waitForReplacement(ctx: Ctx, work: Work): Promise<Result> {
  hurry(ctx, work);
  let known: Ec2Instance | undefined;
  for (let round = 0; ; round++) {
    const group = await ctx.cloud.group(work.group);
    work.left = !isStaying(group?.members.get(work.instance));
    // Claims change seldom, groups often: the claim is looked for anew only now and then, and when it is missing.
    const isKnown = known !== undefined && group?.members.has(known.id) && round % 10 !== 0;
    const now = !group
      ? { standing: "none" as const }
      : known && isKnown
        ? { claim: known, standing: await standingOf(ctx, group, known) }
        : await standIn(ctx, group, work.instance);
    known = now.claim;
    work.claim = known?.id;
    if (work.left) return done;
    const { standing } = now;
    lapse(ctx, work);
    const what = whenToDetach({ nowMs: cloudNow(ctx), deadlineMs: work.deadlineMs, standing, refused: work.refused });
    if (what !== "wait" && group) {
      // A replacement that stood for one whom the group has substituted already is one too many as it is.
      const before = what === "substitute" && !work.refused ? await openClaimOn(ctx, work.instance) : undefined;
      work.decrement =
        what === "decrement" || (before !== undefined && (await fateOf(ctx, group, work.instance, before)) === "substituted");
      return done;
    }
    if (work.deadlineMs === undefined) {
      if (standing === "none") return claimGone(ctx, work);
      if (standing !== "in service" || isFresh(ctx, work, LEAK_MS))
        return retry(`replacement ${work.claim ?? ""} is ${standing}`, work.refused || standing === "outside" ? 60 : 15);
      work.log.warn(
        `replacement ${work.claim ?? ""} is in service, but not healthy in its target groups: ${work.instance} stays until it is; what was attached while AddToLoadBalancer was suspended must be registered by hand`,
      );
      return retry("its replacement does not get healthy", 300);
    }
    await tick(ctx, work.deadlineMs);
  }
}

/** Settles claims: scale-in may choose them as it could their old ones, and nobody looks at them as claims any more. */
async function settle(
  ctx: Ctx,
  name: string,
  claims: { id: string; keepProtected: boolean; isProtected?: boolean }[],
): Promise<void> {
  const { protect, release } = lane(ctx, name);
  // Where its detach was near, or its old one gone, nobody has protected it yet.
  const uneven = claims.filter((c) => c.isProtected !== c.keepProtected);
  await Promise.all(uneven.map((c) => (c.keepProtected ? protect : release)(c.id)));
  const time = new Date(Math.floor(cloudNow(ctx) / 10_000) * 10_000).toISOString(); // alike, so that groups share a call
  for (const [kept, alike] of Map.groupBy(claims, (c) => c.keepProtected)) {
    const ids = alike.map((c) => c.id);
    const value = kept ? `${time} ${KEPT}` : time;
    await ctx.cloud.tag(ids, { [TAG.attached]: value });
    for (const id of ids) {
      const known = ctx.state.claims.get(id);
      if (known) ctx.state.claims.set(id, { ...known, tags: { ...known.tags, [TAG.attached]: value } });
    }
  }
}
/** In `spotmax:attached`, after the time: the old one was protected from scale-in, and so its replacement stays. */
const KEPT = "protected";

/** Whether a claim that was settled in the last minutes stays protected: what its group shows of that may be older. */
function keptSince(ctx: Ctx, claim: Ec2Instance, ms = 600_000): boolean | undefined {
  const [time = "", kept] = claim.tags[TAG.attached]?.split(" ") ?? [];
  return cloudNow(ctx) - Date.parse(time) < ms ? kept === KEPT : undefined;
}

/**
 * A call that protects may arrive after the one that releases: what is settled is released again for as long as all tries
 * of one may take, and no longer, for whoever works on an instance may want to protect it.
 */
async function release(ctx: Ctx, group: Group): Promise<void> {
  if (group.protectsNew) return;
  const isLate = (c: Ec2Instance) => keptSince(ctx, c, 120_000) === false && group.members.get(c.id)?.isProtected;
  const late = [...ctx.state.claims.values()].filter(isLate);
  await Promise.all(late.map((c) => lane(ctx, group.name).release(c.id)));
}

/**
 * Long after a claim was settled its old one is in service: the minimum kept it, or somebody has brought it back. The
 * claim is a member like any other by then, and stands for nobody: that one's next notice is owed a launch of its own.
 * Nor is the old one let go any more: should its owner take it out, it is not ours to end.
 */
async function untie(ctx: Ctx, group: Group): Promise<void> {
  const tags = { [TAG.replaces]: "" };
  for (const c of ctx.state.claims.values()) {
    const old = replacedBy(c);
    const isOver = isSettled(c) && keptSince(ctx, c) === undefined && c.tags[TAG.group] === group.name;
    if (!isOver || !old || !isStaying(group.members.get(old))) continue;
    if (ctx.deps.now() - (ctx.state.detachSeenMs.get(old) ?? 0) < LEAK_MS) continue; // it may be let go at this moment
    if ((await ctx.cloud.instance(old))?.tags[TAG.detached]) await ctx.cloud.tag([old], { [TAG.detached]: "" });
    await ctx.cloud.tag([c.id], tags);
    ctx.state.claims.set(c.id, { ...c, tags: { ...c.tags, ...tags } });
    ctx.deps.log.info(`${old} is in service beside ${c.id}, which replaces nobody any more`, { group: group.name });
  }
}

/** Detaches up to 20 old instances of one group, all with or all without decrement; runs alone on the group. */
async function detachBatch(ctx: Ctx, name: string, items: DetachItem[]): Promise<DetachVerdict[]> {
  const verdicts = new Map<string, DetachVerdict>();
  const decrement = items[0]?.decrement ?? true;
  let group = await ctx.cloud.group(name);
  const inService = (id: string | undefined) => id !== undefined && group?.members.get(id)?.lifecycleState === "InService";
  const ready: DetachItem[] = [];
  for (const item of items) {
    if (!isStaying(group?.members.get(item.old))) verdicts.set(item.old, "left");
    else if (decrement && !item.forced && item.claim && !inService(item.claim)) verdicts.set(item.old, "not ready");
    else if (!ready.some((r) => r.old === item.old)) ready.push(item);
  }
  // An intention, not a fact: what is not detached after all is a member, and members are never ended.
  await ctx.cloud.tag(
    ready.map((i) => i.old),
    { [TAG.detached]: name },
  );
  const wanted = [...ready];
  while (wanted.length) {
    const ids = wanted.map((i) => i.old);
    try {
      await aws(ctx, `detaching ${ids.join(" ")} from ${name}`, (o) =>
        ctx.deps.autoScaling.send(
          new DetachInstancesCommand({ AutoScalingGroupName: name, InstanceIds: ids, ShouldDecrementDesiredCapacity: decrement }),
          o,
        ),
      );
      for (const id of ids) verdicts.set(id, "detached");
      break;
    } catch (error) {
      const text = errorText(error);
      if (isRetryable(error) || errorName(error) !== "ValidationError") throw error;
      group = await ctx.cloud.group(name);
      for (const id of ids) if (!isStaying(group?.members.get(id))) verdicts.set(id, "left");
      const blamed = named(error).filter((id) => ids.includes(id));
      if (ids.length === 1)
        for (const id of ids) verdicts.set(id, verdicts.get(id) ?? (OVER_LIMIT.test(text) ? "refused" : "not ready"));
      else if (blamed.length && blamed.length < ids.length)
        for (const id of blamed) verdicts.set(id, verdicts.get(id) ?? "not ready");
      else if (!ids.some((id) => verdicts.has(id))) {
        for (const item of wanted.splice(0)) verdicts.set(item.old, (await detachBatch(ctx, name, [item]))[0] ?? "not ready");
        return items.map((i) => verdicts.get(i.old) ?? "not ready");
      }
      ctx.deps.log.debug(text, { group: name });
      wanted.splice(0, wanted.length, ...wanted.filter((i) => !verdicts.has(i.old)));
    }
  }
  // Where the old one was an unsettled claim itself, the instance manager looks at the whole chain first.
  const chained = await Promise.all(ready.map((i) => openClaimOn(ctx, i.old)));
  const settled = ready.flatMap((i, n) =>
    decrement && i.claim && !chained[n] && verdicts.get(i.old) === "detached" && inService(i.claim)
      ? [{ id: i.claim, keepProtected: i.oldProtected, isProtected: group?.members.get(i.claim)?.isProtected }]
      : [],
  );
  await settle(ctx, name, settled);
  return items.map((i) => verdicts.get(i.old) ?? "not ready");
}

async function detach(ctx: Ctx, work: Work): Promise<Result> {
  const { instance, claim, decrement, group } = work;
  if (work.left) {
    const now = await ctx.cloud.group(group);
    if (now && (await isUntold(ctx, group, instance))) return again("its group does not tell yet how it left", 2_000);
    work.log.info(`${instance} has left ${group} already`);
    // Between detach and settling, also after a crash: finish it here, where it is known whether the old one was protected.
    // A later notice knows less: the old one was no member any more when it came.
    if (
      now &&
      claim &&
      (await openClaimOn(ctx, claim)) &&
      isStaying(now.members.get(claim)) &&
      (await fateOf(ctx, now, claim, instance)) === "decremented"
    ) {
      if (now.members.get(claim)?.lifecycleState !== "InService") return again(`${claim} is not in service yet`);
      // Another daemon may have settled a rival meanwhile.
      if ((await claimOn(ctx, instance)).claim?.id !== claim) return again(`${claim} is not the only one for ${instance}`);
      await settle(ctx, group, [{ id: claim, keepProtected: work.oldProtected }]);
    }
    return done;
  }
  const forced = work.deadlineMs !== undefined && cloudNow(ctx) >= work.deadlineMs - FORCED_MS;
  const verdict = await lane(ctx, group).detach({ old: instance, claim, decrement, forced, oldProtected: work.oldProtected });
  switch (verdict) {
    case "detached":
      if (decrement)
        work.log.info(`detached ${instance} from ${group}; ${claim ?? "the group's own substitute"} has taken its place`, {
          replacement: claim,
        });
      else
        work.log.warn(`detached ${instance} from ${group} without a replacement in service: the group substitutes it by itself`);
      // Only this message knows whether the old one was protected, and so waits until its replacement can be settled.
      return decrement && claim && (await openClaimOn(ctx, claim)) ? again(`${claim} is not settled yet`) : done;
    case "left":
      return again(`${instance} has just left ${group}`, 0);
    case "refused":
      if (work.deadlineMs === undefined) {
        // Its owner wants as many as there are: both stay.
        if (claim) await settle(ctx, group, [{ id: claim, keepProtected: work.oldProtected }]);
        sayConsulLeft(ctx, work);
        return skip(`the minimum of ${group} refuses the decrement: ${instance} stays beside its replacement`, "warn");
      }
      work.refused = true;
      return again(`the minimum of ${group} refuses the decrement`);
    case "not ready":
      return again("old or new is not as it was a moment ago");
  }
}

async function sendTerminationMessage(ctx: Ctx, work: Work): Promise<Result> {
  // A volume waits for the end of its instance, whose system unmounts it cleanly. Else, with a hard deadline AWS ends it; a minute later it is looked at all the same, for a rehearsal must not leave a machine running.
  const { persistence_dev, preaction_termination_delay_seconds } = work.options;
  const atDeadline = persistence_dev ? 0 : ((work.deadlineMs ?? 0) + 60_000 - cloudNow(ctx)) / 1000;
  const delay = work.deadlineMs === undefined ? preaction_termination_delay_seconds : atDeadline;
  await sendFollowUp(ctx, work, "termination_evt_sqs", TERMINATION, Math.max(0, delay));
  return done;
}

const BELIEVED_MS = 5 * 60_000;

async function terminate(ctx: Ctx, work: Work): Promise<Result> {
  const { instance, group } = work;
  const [old, member] = await Promise.all([ctx.cloud.instance(instance), ctx.cloud.member(instance)]);
  if (!old && isFresh(ctx, work, BELIEVED_MS)) return retry("EC2 does not show it at the moment", 30);
  if (isGone(old)) {
    work.log.info(`${instance} is ${old?.state ?? "gone"}`);
    return done;
  }
  const isLeaving = member && judgeState(member.lifecycleState) === "leaving";
  const isMarked = old?.tags[TAG.detached] === group;
  // Describes lag: what speaks against the message is believed once it has had minutes to show.
  const isNew = isFresh(ctx, work, BELIEVED_MS);
  if (member && (isLeaving || isNew)) return retry(`still ${member.lifecycleState} in ${member.group}`, 5);
  const alone = hasVolume(work) ? "left alone, and its data volume with it" : "left alone";
  if (member) return skip(`${instance} is a member of ${member.group}: ${alone}`, hasVolume(work) ? "warn" : "info");
  if (!isMarked && isNew) return retry(`carries no ${TAG.detached} yet`, 5);
  if (!isMarked) return skip(`${instance} carries no ${TAG.detached}=${group}: ${alone}`, "warn");
  // The last chance to save its data: nothing is ended while that fails.
  if (old && hasVolume(work)) await protectData(ctx, work, old);
  if (work.deadlineMs === undefined) {
    const { max_num_of_terminated_one_time: limit } = work.options;
    const room = await lane(ctx, group).exclusive(async () => {
      const ending = await ctx.cloud.describe("counting what is ending", [
        { Name: `tag:${TAG.detached}`, Values: [group] },
        { Name: "instance-state-name", Values: ["shutting-down"] },
      ]);
      if (ending.length >= limit) return false;
      await ctx.cloud.terminate(instance);
      return true;
    });
    if (!room) return retry(`${limit} of ${group} are ending already`, 10);
  } else await ctx.cloud.terminate(instance);
  work.log.info(`terminated ${instance}`);
  return done;
}

// ─── Steps: volumes ──────────────────────────────────────────────────────────────────────────────────────
// The data volume outlives its instance and goes to the replacement, at /dev/sdz. Whose it is stands in tags, so
// that any daemon finds it at any point. A busy volume is waited for and never forced; no volume and no snapshot is
// ever deleted.

const DATA_DEVICE = "/dev/sdz";
/** A copy is attached so long after it was made: another daemon that has not seen it, and attaches the original, has done so by then. */
const COPY_REST_MS = 20_000;
const VOLUME_PATIENCE_MS = 10 * 60_000;

export type Volume = {
  id: string;
  state: string;
  zone: string;
  attachedTo: string | undefined;
  createdMs: number;
  tags: Record<string, string>;
  /** What a copy in another zone must have, too. */
  like: {
    VolumeType: Ec2Volume["VolumeType"];
    Size?: number;
    Iops?: number;
    Throughput?: number;
    Encrypted?: boolean;
    KmsKeyId?: string;
  };
};
export function toVolume(v: Ec2Volume): Volume | undefined {
  if (!v.VolumeId) return undefined;
  const { VolumeType, Size, Iops, Throughput, KmsKeyId } = v;
  // AWS shows IOPS for every type, and takes them only for these.
  const takesIops = VolumeType === "gp3" || VolumeType === "io1" || VolumeType === "io2";
  return {
    id: v.VolumeId,
    state: v.State ?? "",
    zone: v.AvailabilityZone ?? "",
    attachedTo: v.Attachments?.find((a) => a.State !== "detached")?.InstanceId,
    createdMs: v.CreateTime?.getTime() ?? 0,
    tags: tagsOf(v.Tags),
    like: {
      VolumeType,
      Size,
      ...(takesIops && { Iops }),
      ...(VolumeType === "gp3" && { Throughput }),
      ...(v.Encrypted && { Encrypted: true, KmsKeyId }),
    },
  };
}

/**
 * The device that holds an instance's data: what was moved to it, else the template's own; none for a replacement
 * whose data is still on its way, or has gone past it, for what the template made for it is empty.
 */
export function dataDevice(i: Ec2Instance, device: string, isElsewhere: boolean): string | undefined {
  if (i.volumes[DATA_DEVICE]) return DATA_DEVICE;
  return i.volumes[device] && !isElsewhere ? device : undefined;
}

/** The whole line of a replacement: whom it stands for in the end, and all that was launched in that one's place. */
async function lineOf(ctx: Ctx, i: Ec2Instance): Promise<string[]> {
  let first = replacedBy(i);
  for (let depth = 0; first && depth < 6; depth++) {
    const earlier = await ctx.cloud.instance(first);
    const before = earlier && replacedBy(earlier);
    if (!before) break;
    first = before;
  }
  const line = first ? [first] : [];
  for (let n = 0; n < line.length && n < 50; n++) line.push(...(await claimsOf(ctx, line[n] ?? "")).map((c) => c.id));
  return line;
}

/**
 * Whether the data of a replacement's line is on none of the volumes it was launched with: yet to come from an earlier
 * one, gone past it to a later one, or just moved to it. All in one reading, for what moves between two is in neither.
 */
async function isDataElsewhere(ctx: Ctx, i: Ec2Instance, device: string): Promise<boolean> {
  const line = await lineOf(ctx, i);
  // Without a hard deadline the first one's data is kept and tagged only after the attach.
  const first = line[0] ? await ctx.cloud.instance(line[0]) : undefined;
  const shown = first?.volumes[DATA_DEVICE] ?? first?.volumes[device];
  if (shown && !(shown.ends && isGone(first))) return true;
  const volumes = (await Promise.all([...new Set(line)].map((id) => ctx.cloud.volumesOf(id)))).flatMap((found) => found ?? []);
  const own = new Set(Object.values(i.volumes).map(({ id }) => id));
  return volumes.some(({ id }) => !own.has(id));
}

/**
 * Keeps the data volume beyond its instance and writes down whose it is; returns its ID. Neither waits for the other.
 * Of an instance that is shutting down only what was kept before is left: that is told from the rest as long as it shows.
 */
async function protectData(ctx: Ctx, work: Work, i: Ec2Instance): Promise<string | undefined> {
  if (!Object.keys(i.volumes).length) return undefined; // it has ended
  const { persistence_dev = "" } = work.options;
  const isElsewhere = !i.volumes[DATA_DEVICE] && (await isDataElsewhere(ctx, i, persistence_dev));
  const device = dataDevice(i, persistence_dev, isElsewhere);
  const volume = device ? i.volumes[device] : undefined;
  if (!device || !volume || (volume.ends && isGone(i))) return undefined;
  const keep = async () => {
    if (!volume.ends) return;
    const input = {
      InstanceId: i.id,
      BlockDeviceMappings: [{ DeviceName: device, Ebs: { VolumeId: volume.id, DeleteOnTermination: false } }],
    };
    await aws(ctx, `keeping ${volume.id} beyond ${i.id}`, (o) => ctx.deps.ec2.send(new ModifyInstanceAttributeCommand(input), o));
    work.log.info(`${volume.id} at ${device} stays when ${i.id} goes`, { volume: volume.id });
  };
  const tag = ctx.cloud.tag([volume.id], { [TAG.group]: work.group, [TAG.volume]: i.id });
  const failed = (await Promise.allSettled([keep(), tag])).flatMap((r) => (r.status === "rejected" ? [r.reason as unknown] : []));
  if (failed.length) throw failed.find(isRetryable) ?? failed[0];
  return volume.id;
}

/** Of an instance that goes and for which nothing is launched: its data is kept all the same. */
async function keepData(ctx: Ctx, work: Work, fault: Result): Promise<Result> {
  const { old, instance } = work;
  if (!old) return fault;
  try {
    const volume = await protectData(ctx, work, old);
    if (volume)
      work.log.warn(`${volume} stays available when ${instance} goes; to attach it: ${attachCommand(volume, "INSTANCE")}`);
  } catch (error) {
    if (error instanceof Stopped) throw error;
    work.log.error(`${errorText(error)}; its data is at risk`, { error: errorName(error) });
    if (isRetryable(error)) return retry("its data is not safe yet", 5); // until it is, or the instance is gone
  }
  return fault;
}

async function protectVolume(ctx: Ctx, work: Work): Promise<Result> {
  const old = await ctx.cloud.instance(work.instance);
  if (!old) return done;
  try {
    await protectData(ctx, work, old);
  } catch (error) {
    if (error instanceof Stopped) throw error;
    // Capacity comes first, and nothing of ours ends the instance before this has worked.
    work.log.error(`${errorText(error)}; its data is at risk, trying on`, { error: errorName(error) });
    if (!ctx.state.atRisk.has(old.id)) void protectOn(ctx, work, old);
  }
  return done;
}

/** Tries on beside everything else, for as long as there may be something to save or to tag. */
async function protectOn(ctx: Ctx, work: Work, old: Ec2Instance): Promise<void> {
  ctx.state.atRisk.add(old.id);
  const untilMs = ctx.deps.now() + VOLUME_PATIENCE_MS;
  try {
    for (let isSafe = false; !isSafe && ctx.deps.now() < untilMs; ) {
      await pause(ctx, 2_000);
      isSafe = await protectData(ctx, work, old).then(
        () => true,
        (error: unknown) => !isRetryable(error), // another refusal is final, and the step has said so
      );
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
  } finally {
    ctx.state.atRisk.delete(old.id);
  }
}

const attachCommand = (volume: string, instance: string) =>
  `aws ec2 attach-volume --volume-id ${volume} --instance-id ${instance} --device ${DATA_DEVICE}`;

async function moveVolume(ctx: Ctx, work: Work): Promise<Result> {
  const waiting = ((await ctx.cloud.volumesOf(work.instance)) ?? []).filter((v) => !(TAG.copied in v.tags));
  // Of several the one that the instance was told of; another is a copy that was never attached to it.
  const told = waiting.length > 1 ? (await ctx.cloud.instance(work.instance))?.tags[TAG.volume] : undefined;
  const source = waiting.find((v) => v.id === told) ?? waiting[0];
  if (!source) {
    // It may have been kept by a daemon that died before it could write down whose it is.
    const old = await ctx.cloud.instance(work.instance);
    const kept = old && isGone(old) ? await protectData(ctx, work, old) : undefined;
    return kept ? retry(`${kept} has just been tagged`, 3) : skip(`no volume of ${work.instance} waits to be moved`, "info");
  }
  const log = work.log.with({ volume: source.id });
  const isPatient = isFresh(ctx, work, VOLUME_PATIENCE_MS);
  const target = await standsFor(ctx, work.instance, true);
  const member = target && (await ctx.cloud.member(target.id));
  if (!target || !member) {
    if (isPatient) return retry(`${source.id} waits for a replacement in the group`, 10);
    log.error(
      `no replacement for ${work.instance} in ${work.group}: its data volume ${source.id} in ${source.zone} stays available; to attach it: ${attachCommand(source.id, target?.id ?? "INSTANCE")}`,
    );
    return done;
  }
  // Somebody has put one in Standby aside for a while, and it is still the one to have the data.
  if (!/^(InService|Standby)$/.test(member.lifecycleState))
    return retry(`${source.id} waits for ${target.id}, which is ${member.lifecycleState}`, 10);
  const there = target.volumes[DATA_DEVICE];
  const [data, ...before] = there || source.state === "available" ? await trailOf(ctx, source) : [source];
  if (there) {
    // The volume itself, or the copy that was made for this one; another disk there is none of ours.
    const isData = there.id === data.id || (await ctx.cloud.volumesOf(target.id))?.some((v) => v.id === there.id);
    if (isData) return own(ctx, work, target, there.id, [data, ...before]);
    log.error(
      `${DATA_DEVICE} of ${target.id} is taken by ${there.id}: ${data.id} stays available; free the device, then ${attachCommand(data.id, target.id)}`,
    );
    return done;
  }
  if (data.attachedTo === target.id) return retry(`${data.id} is being attached`, 2);
  if (data.state !== "available") {
    // A volume that stays busy may be mounted still: forcing it off would risk the data.
    if (!isPatient)
      log.warn(`${data.id} is still ${data.state}${data.attachedTo ? ` at ${data.attachedTo}` : ""}: waiting on, never forced`);
    return retry(`${data.id} is ${data.state}`, isFresh(ctx, work, 120_000) ? 3 : isPatient ? 15 : 60);
  }
  if (data.zone !== target.zone) return copyTo(ctx, work, data, target);
  if (data !== source && cloudNow(ctx) - data.createdMs < COPY_REST_MS) return retry(`${data.id} is a new copy`, 5);
  const input = { VolumeId: data.id, InstanceId: target.id, Device: DATA_DEVICE };
  try {
    // Not idempotent: what a lost answer did is seen in the next look at both.
    await aws(ctx, `attaching ${data.id} to ${target.id}`, (o) => ctx.deps.ec2.send(new AttachVolumeCommand(input), o), {
      tries: 1,
    });
  } catch (error) {
    if (error instanceof Stopped) throw error;
    if (!isPatient)
      log.error(`${errorText(error)}; trying on. By hand: ${attachCommand(data.id, target.id)}`, { error: errorName(error) });
    return retry(errorText(error), isPatient ? 3 : 60);
  }
  log.info(`attached ${data.id} to ${target.id} as ${DATA_DEVICE}`, { replacement: target.id });
  return own(ctx, work, target, data.id, before);
}

/** A snapshot says at whose end it was made: one of an earlier end is older than the data. */
const snapshotText = (volume: Volume) => `max_group: ${volume.tags[TAG.group]}, from ${volume.tags[TAG.volume]}`;

/** The snapshot of a volume at its present owner's end: of several the first, so that all who ask use the same one. */
async function endSnapshotOf(ctx: Ctx, volume: Volume): Promise<EbsSnapshot | undefined> {
  const all = ((await ctx.cloud.snapshotsOf(volume.id)) ?? []).filter((s) => s.Description === snapshotText(volume));
  const age = (s: EbsSnapshot) => s.StartTime?.getTime() ?? 0;
  return all.filter((s) => s.State !== "error").sort((a, b) => age(a) - age(b))[0];
}

async function copiesFrom(ctx: Ctx, snapshot: EbsSnapshot | undefined): Promise<Volume[]> {
  if (snapshot?.State !== "completed" || !snapshot.SnapshotId) return [];
  const Filters = [{ Name: "snapshot-id", Values: [snapshot.SnapshotId] }];
  const found = await readVolumes(ctx, `looking for copies from ${snapshot.SnapshotId}`, Filters);
  return found.filter((v) => TAG.volume in v.tags).sort((a, b) => a.createdMs - b.createdMs || (a.id < b.id ? -1 : 1));
}

/**
 * Where the data of a volume is now, and before that what it has gone on from. Once there is a copy the data goes on in
 * that alone, whoever it was made for, for somebody may have written to it; unless the original was attached before.
 */
async function trailOf(ctx: Ctx, source: Volume): Promise<[Volume, ...Volume[]]> {
  const trail: [Volume, ...Volume[]] = [source];
  while (trail.length < 8) {
    const copies = await copiesFrom(ctx, await endSnapshotOf(ctx, trail[0]));
    const [copy, ...more] = copies.filter((v) => v.state !== "error");
    if (!copy) break;
    // In two zones there may be two copies: the first counts, and the other is told that it does not.
    trail.push(...more.filter((v) => v.state === "available"));
    if (trail[0].state !== "available") {
      trail.push(copy);
      break;
    }
    trail.unshift(copy);
  }
  return trail;
}

/**
 * Writes down whose data a volume is, the instance's own tag first: its guest waits for that. What the data has gone on
 * from says so for good: a message that comes again later must not put what is older in the place of what is newer.
 */
async function own(ctx: Ctx, work: Work, target: Ec2Instance, volume: string, trail: Volume[]): Promise<Result> {
  await ctx.cloud.tag([target.id], { [TAG.volume]: volume });
  await ctx.cloud.tag([volume], { [TAG.group]: work.group, [TAG.volume]: target.id });
  const others = trail.filter((v) => v.id !== volume && !(TAG.copied in v.tags)).map((v) => v.id);
  await ctx.cloud.tag(others, { [TAG.group]: work.group, [TAG.copied]: volume });
  for (const id of others) work.log.warn(copiedText(id, volume), { volume: id });
  return done;
}
const copiedText = (source: string, copy: string) =>
  `${source} stays available, and its data goes on in ${copy}: it costs money until you delete it`;

/** One step on the way to a copy of a volume in the target's zone: a snapshot, its completion, a volume from it. */
async function copyTo(ctx: Ctx, work: Work, source: Volume, target: Ec2Instance): Promise<Result> {
  const mine = Object.entries(source.tags).flatMap(([Key, Value]) => (/^(aws|spotmax):/.test(Key) ? [] : [{ Key, Value }]));
  const tags = (owner: string) => [...mine, { Key: TAG.group, Value: work.group }, { Key: TAG.volume, Value: owner }];
  const snapshot = await endSnapshotOf(ctx, source);
  if (!snapshot?.SnapshotId) {
    // Describes lag: a volume that shows as available may have been attached meanwhile, and be written to until the end.
    const owner = source.tags[TAG.volume] ?? "";
    const ended = await ctx.cloud.instance(owner);
    if (ended && ended.state !== "terminated")
      return retry(`${owner} has not ended yet`, isFresh(ctx, work, VOLUME_PATIENCE_MS) ? 3 : 60);
    const TagSpecifications = [{ ResourceType: "snapshot" as const, Tags: tags(source.id) }];
    const input = { VolumeId: source.id, Description: snapshotText(source), TagSpecifications };
    const made = await aws(ctx, `copying ${source.id}`, (o) => ctx.deps.ec2.send(new CreateSnapshotCommand(input), o), {
      tries: 1,
    });
    work.log.warn(
      `${source.id} cannot leave ${source.zone}: snapshot ${made.SnapshotId} is made for a copy in ${target.zone}; both stay and cost money until you delete them`,
    );
    return retry("the snapshot has begun", 15);
  }
  if (snapshot.State !== "completed")
    return retry(`snapshot ${snapshot.SnapshotId} is ${snapshot.Progress || snapshot.State}`, 15);
  const failed = await copiesFrom(ctx, snapshot);
  if (failed.some((v) => v.state !== "error")) return retry("a copy has just been made", 3);
  const TagSpecifications = [{ ResourceType: "volume" as const, Tags: tags(target.id) }];
  const input = { ...source.like, AvailabilityZone: target.zone, SnapshotId: snapshot.SnapshotId, TagSpecifications };
  // One copy of a snapshot, whoever asks, and for whom: AWS refuses a second one in the zone under the token of the first,
  // unless that has gone (nobody may use its key, or somebody deleted it): then the next token is tried.
  for (let n = failed.length; n < failed.length + 4; n++) {
    const ClientToken = tokenOf({ SnapshotId: snapshot.SnapshotId }, `${n}`);
    try {
      await aws(ctx, `making a volume from ${snapshot.SnapshotId}`, (o) =>
        ctx.deps.ec2.send(new CreateVolumeCommand({ ...input, ClientToken }), o),
      );
      return retry("the copy is being made", 3);
    } catch (error) {
      if (errorName(error) !== "IdempotentParameterMismatch") throw error;
      if (!/already deleted/.test(errorText(error))) return retry("a copy is being made already", 3);
    }
  }
  work.log.error(
    `no copy of ${source.id} comes of ${snapshot.SnapshotId}: may the role use its key? ${source.id} stays available; to make one by hand: aws ec2 create-volume --snapshot-id ${snapshot.SnapshotId} --availability-zone ${target.zone}`,
  );
  return retry(`copies of ${source.id} go as soon as they are made`, 60);
}

/**
 * Volumes that lie available while their instance is gone: the message about one may be lost, or a member was ended
 * that carried one, and nobody has been told. Each is asked after once, ten minutes on, as if its instance had just ended.
 */
async function sweepVolumes(ctx: Ctx): Promise<void> {
  const { state } = ctx;
  const nowMs = ctx.deps.now();
  const owners = [...state.groups].flatMap(([name, { options }]) => (options.persistence_dev ? [name] : []));
  if (!owners.length || nowMs - state.volumesSweptMs < 60_000) return;
  state.volumesSweptMs = nowMs;
  const Filters = [
    { Name: "tag-key", Values: [TAG.volume] },
    { Name: "status", Values: ["available"] },
  ];
  const found = await readVolumes(ctx, "looking for volumes that are left", Filters);
  const left = new Map(found.filter((v) => owners.includes(v.tags[TAG.group] ?? "")).map((v) => [v.id, v]));
  for (const id of state.leftMs.keys()) if (!left.has(id)) state.leftMs.delete(id);
  for (const volume of left.values()) {
    const sinceMs = state.leftMs.get(volume.id) ?? nowMs;
    state.leftMs.set(volume.id, sinceMs);
    if (nowMs - sinceMs < VOLUME_PATIENCE_MS) continue;
    const owner = volume.tags[TAG.volume] ?? "";
    const living = await ctx.cloud.instance(owner);
    const there = isLiving(living) ? living?.volumes[DATA_DEVICE]?.id : undefined;
    if (isLiving(living) && !there) continue; // on its way to it, or taken off it by hand
    const copy = volume.tags[TAG.copied] ?? there;
    if (copy) ctx.deps.log.warn(copiedText(volume.id, copy), { volume: volume.id });
    else {
      const notice = { type: TERMINATION, kind: "rebalance" as const, id: owner, instances: [owner] };
      await sendOwn(ctx, "termination_evt_sqs", notice, { group: volume.tags[TAG.group] ?? "" });
    }
    state.leftMs.set(volume.id, Number.POSITIVE_INFINITY); // only now: a message that could not be sent is sent again
  }
}

// ─── Kubernetes ──────────────────────────────────────────────────────────────────────────────────────────
// Pods move before their node goes: it is cordoned on notice, and drained once the replacement's node is Ready or
// time runs short. Budgets are respected as long as there is time, and never gone round. What has been begun stands
// on the node itself. A cluster that is down or slow costs the pods their notice, never the group its replacement:
// the drain ends in time for the detach.

/** The key of our taint, of the label that nodes are found by, and of the annotation with the rest. */
export const MARK = "spotmax/interruption";
/** With a hard deadline the drain begins at the latest so long before it, and ends so long before it. */
const DRAIN_BEGINS_MS = 60_000;
const DRAIN_ENDS_MS = 10_000;
/** Without one: how long a replacement's node is waited for, and how long a message is held while pods end. */
const NODE_PATIENCE_MS = 5 * 60_000;
const HELD_MS = 20_000;
const POLL_MS = 1_500;
/** What a node may be marked for without its instance going: then the notice did not come true. */
const UNTRUE_MS = 2 * 60_000;
const FORGOTTEN_MS = 10 * 60_000;
const LOOK_MS = 60_000;

type Ask = { method: string; path: string; body?: object; signal: AbortSignal };
type Answer = { status: number; json: unknown; retryAfterMs: number | undefined };
/** Who we are to a cluster: its address, and what each request carries. */
type Access = { server: string; init: { headers: Record<string, string>; tls: object; proxy?: string } };
/** A cluster, by its kubeconfig file (undefined: the one that we run in). */
export type Cluster = {
  path: string | undefined;
  /** As last read; read anew when the file has changed or its credentials were refused. */
  config?: { kube: KubeConfig; token: (() => Promise<string>) | undefined; changedMs: number };
  access?: Access;
  /** The names of nodes found so far, by instance. */
  names: Map<string, string>;
  /** All nodes: by instance, or, where a node's is not known, by private DNS name. */
  listed: (key: string) => Promise<KubeNode | undefined>;
  /** So many requests at once and no more; a crowd of evictions holds up nothing else. */
  ask: Batcher<Ask, Answer>;
  evict: Batcher<Ask, Answer>;
};

const optional = <T>(schema: v.GenericSchema<unknown, T>) => v.optional(v.nullable(schema));
const strings = v.record(v.string(), v.string());
const metadata = {
  name: v.string(),
  namespace: v.optional(v.string(), ""),
  uid: v.optional(v.string(), ""),
  resourceVersion: v.optional(v.string(), ""),
  deletionTimestamp: optional(v.string()),
  annotations: optional(strings),
  ownerReferences: optional(v.array(v.object({ kind: v.string(), name: v.string(), controller: optional(v.boolean()) }))),
};
const taint = v.looseObject({ key: v.string(), effect: v.string() });
const nodeSchema = v.object({
  metadata: v.object(metadata),
  spec: v.optional(
    v.object({ providerID: optional(v.string()), unschedulable: optional(v.boolean()), taints: optional(v.array(taint)) }),
    {},
  ),
  status: v.optional(
    v.object({
      conditions: optional(v.array(v.object({ type: v.string(), status: v.string() }))),
      addresses: optional(v.array(v.object({ type: v.string(), address: v.string() }))),
    }),
    {},
  ),
});
const podSchema = v.object({
  metadata: v.object(metadata),
  spec: v.optional(v.object({ terminationGracePeriodSeconds: optional(v.number()) }), {}),
  status: v.optional(v.object({ phase: optional(v.string()) }), {}),
});
const listOf = <T>(item: v.GenericSchema<unknown, T>) =>
  v.object({ items: optional(v.array(item)), metadata: v.optional(v.object({ continue: optional(v.string()) }), {}) });
const markSchema = v.object({
  instance: v.string(),
  notice: v.string(),
  /** Milliseconds since 1970, as all here; null: no hard deadline. */
  deadlineMs: v.nullable(v.number()),
  markedMs: v.number(),
  /** Somebody else had cordoned the node before us, and so it stays. */
  wasCordoned: v.boolean(),
  /** When a drain without a hard deadline began. */
  drainMs: v.optional(v.number()),
});
export type Mark = v.InferOutput<typeof markSchema>;
export type KubeNode = {
  name: string;
  uid: string;
  version: string;
  /** From its provider ID. */
  instance: string | undefined;
  dnsNames: string[];
  isReady: boolean;
  isCordoned: boolean;
  taints: v.InferOutput<typeof taint>[];
  mark: Mark | undefined;
};
export type Pod = {
  name: string;
  namespace: string;
  uid: string;
  phase: string;
  isEnding: boolean;
  isMirror: boolean;
  daemonSet: string | undefined;
  graceSeconds: number;
};

function toNode(json: unknown): KubeNode {
  const { metadata: meta, spec, status: state } = v.parse(nodeSchema, json);
  const mark = v.safeParse(v.pipe(v.string(), v.parseJson(), markSchema), meta.annotations?.[MARK]);
  return {
    name: meta.name,
    uid: meta.uid,
    version: meta.resourceVersion,
    instance: /\/(i-[0-9a-f]+)$/.exec(spec.providerID ?? "")?.[1],
    dnsNames: (state.addresses ?? []).flatMap((a) => (a.type === "InternalDNS" ? [a.address] : [])),
    isReady: state.conditions?.some((c) => c.type === "Ready" && c.status === "True") ?? false,
    isCordoned: spec.unschedulable ?? false,
    taints: spec.taints ?? [],
    mark: mark.success ? mark.output : undefined,
  };
}
function toPod(json: unknown): Pod {
  const { metadata: meta, spec, status: state } = v.parse(podSchema, json);
  const owner = meta.ownerReferences?.find((o) => o.controller);
  return {
    name: meta.name,
    namespace: meta.namespace,
    uid: meta.uid,
    phase: state.phase ?? "",
    isEnding: typeof meta.deletionTimestamp === "string",
    isMirror: meta.annotations?.["kubernetes.io/config.mirror"] !== undefined,
    daemonSet: owner?.kind === "DaemonSet" ? owner.name : undefined,
    graceSeconds: spec.terminationGracePeriodSeconds ?? 30,
  };
}

// Credentials: the library reads the file and runs plugins; EKS's own plugins are not needed, for what they do is to
// sign one URL.

type Exec = {
  apiVersion?: string;
  command?: string;
  args?: string[] | null;
  env?: { name: string; value: string }[] | null;
  provideClusterInfo?: boolean;
};

/** What an EKS user's plugin would be asked for; undefined: another plugin. */
export function eksUser({ command = "", args, env }: Exec): { cluster: string; region?: string; role?: string } | undefined {
  const words = (args ?? []).flatMap((arg) =>
    /^--[\w-]+=/.test(arg) ? [arg.replace(/=.*/s, ""), arg.replace(/^[^=]*=/, "")] : [arg],
  );
  const value = (...names: string[]) => words.flatMap((word, n) => (names.includes(word) ? [words[n + 1]] : [])).at(-1);
  const program = command.replace(/^.*[\\/]/, "").replace(/\.exe$/, "");
  const isEks = program === "aws" ? words.includes("get-token") && words.includes("eks") : words.includes("token");
  const cluster = value("--cluster-name", "--cluster-id", "-i");
  if (!/^aws(-iam-authenticator)?$/.test(program) || !isEks || !cluster) return undefined;
  const variable = (name: string) => env?.find((e) => e.name === name)?.value;
  return {
    cluster,
    region: value("--region") ?? variable("AWS_REGION") ?? variable("AWS_DEFAULT_REGION"),
    role: value("--role-arn", "--role", "-r"),
  };
}

/** A URL of STS with this query, signed for a minute, in the partition of its region. */
async function stsUrl(
  ctx: Ctx,
  region: string,
  query: Record<string, string>,
  headers: Record<string, string>,
  credentials: Credentials,
): Promise<string> {
  const hostname = `sts.${region}.${partition(region).dnsSuffix}`;
  const signer = new SignatureV4({ service: "sts", region, credentials, sha256: Hash.bind(null, "sha256") });
  const { query: signed = {} } = await signer.presign(
    {
      method: "GET",
      protocol: "https:",
      hostname,
      path: "/",
      query: { ...query, Version: "2011-06-15" },
      headers: { host: hostname, ...headers },
    },
    { expiresIn: 60, signingDate: new Date(cloudNow(ctx)) },
  );
  return `https://${hostname}/?${new URLSearchParams(Object.entries(signed).map(([k, x]): [string, string] => [k, String(x)]))}`;
}

/** The credentials of another role, as a kubeconfig may ask for. */
async function assume(ctx: Ctx, region: string, role: string, own: Credentials): Promise<Credentials> {
  const url = await stsUrl(ctx, region, { Action: "AssumeRole", RoleArn: role, RoleSessionName: "max_group" }, {}, own);
  const { AWS_ENDPOINT_URL: endpoint } = process.env; // then nothing of ours goes to AWS itself
  const answer = await ctx.deps.fetch(endpoint ? url.replace(/^https:\/\/[^/]+\//, `${new URL(endpoint).origin}/`) : url);
  const xml = await answer.text();
  const field = (name: string) => new RegExp(`<${name}>([^<]+)</${name}>`).exec(xml)?.[1] ?? "";
  if (!answer.ok) throw new Error(`assuming ${role}: ${field("Code")}: ${field("Message")}`);
  return { accessKeyId: field("AccessKeyId"), secretAccessKey: field("SecretAccessKey"), sessionToken: field("SessionToken") };
}

/** A bearer token for an EKS cluster; good for 15 minutes. */
export async function eksToken(ctx: Ctx, user: { cluster: string; region: string; role?: string }): Promise<string> {
  const own = await ctx.deps.credentials();
  const credentials = user.role ? await assume(ctx, user.region, user.role, own) : own;
  const headers = { "x-k8s-aws-id": user.cluster };
  const url = await stsUrl(ctx, user.region, { Action: "GetCallerIdentity" }, headers, credentials);
  return `k8s-aws-v1.${Buffer.from(url).toString("base64url")}`;
}

const inCluster = () =>
  process.env.KUBERNETES_SERVICE_HOST !== undefined && existsSync("/var/run/secrets/kubernetes.io/serviceaccount/token");

/** Rejects when the signal is aborted: a plugin that hangs knows no signal, and may keep no place from others. */
const aborted = (signal: AbortSignal) =>
  new Promise<never>((_, reject) => signal.addEventListener("abort", () => reject(signal.reason), { once: true }));

/** The cluster of a group: its own kubeconfig, else -K, else the one that we run in; undefined where there is none of these. */
function clusterOf(ctx: Ctx, options: GroupOptions): Cluster | undefined {
  const path = options.k8s_config_file_path ?? ctx.state.kubeconfig;
  if (path === undefined && !inCluster()) return undefined;
  const known = ctx.state.clusters.get(path ?? "");
  if (known) return known;
  const bounded = () =>
    batcher<Ask, Answer>(ctx.deps, { limit: 1, parallel: 32, eager: true }, ([ask]) =>
      Promise.all(ask ? [Promise.race([send(ctx, cluster, ask), aborted(ask.signal)])] : []),
    );
  const cluster: Cluster = {
    path,
    names: new Map(),
    listed: reader(ctx, { limit: 10_000, parallel: 1 }, () => listNodes(ctx, cluster)),
    ask: bounded(),
    evict: bounded(),
  };
  ctx.state.clusters.set(path ?? "", cluster);
  return cluster;
}

/** Reads a kubeconfig; the library is loaded only here, for it would cost every start its time. Throws what is wrong with it. */
async function readKubeconfig(
  ctx: Ctx,
  path: string | undefined,
): Promise<Pick<NonNullable<Cluster["config"]>, "kube" | "token">> {
  const { KubeConfig } = await import("@kubernetes/client-node");
  const kube = new KubeConfig();
  if (path === undefined) kube.loadFromCluster();
  else kube.loadFromFile(path);
  const [cluster, user] = [kube.getCurrentCluster(), kube.getCurrentUser()];
  if (!cluster || !user) throw new Error(`${path}: its current-context names no cluster and user that are there`);
  if (path === undefined) return { kube, token: undefined };
  const change = (fields: Partial<typeof user>) => {
    kube.users = kube.users.map((u) => (u.name === user.name ? { ...u, ...fields } : u));
  };
  const raw = v.parse(usersSchema, Bun.YAML.parse(readFileSync(path, "utf8")));
  const tokenFile = raw.users.find((u) => u.name === user.name)?.user?.tokenFile;
  // The library knows this field by another name only, and reads the file once.
  if (tokenFile)
    change({ token: undefined, authProvider: { name: "tokenFile", config: { tokenFile: resolve(dirname(path), tokenFile) } } });
  const exec: Exec | undefined = user.exec ?? undefined;
  const eks = exec && eksUser(exec);
  if (eks) {
    change({ exec: undefined });
    const region = eks.region ?? /\.([a-z0-9-]+)\.eks\.amazonaws\./.exec(cluster.server)?.[1] ?? ctx.deps.region;
    return { kube, token: () => eksToken(ctx, { ...eks, region }) };
  }
  if (exec) {
    const { server, caData, tlsServerName } = cluster;
    const told = { server, "certificate-authority-data": caData, "tls-server-name": tlsServerName };
    const spec = { interactive: false, ...(exec.provideClusterInfo && { cluster: told }) };
    const value = JSON.stringify({ apiVersion: exec.apiVersion, kind: "ExecCredential", spec });
    // As kubectl does: relative to the file, and with what the plugin is to know.
    const command = exec.command?.includes("/") ? resolve(dirname(path), exec.command) : exec.command;
    change({ exec: { ...exec, command, env: [...(exec.env ?? []), { name: "KUBERNETES_EXEC_INFO", value }] } });
  }
  return { kube, token: undefined };
}
const usersSchema = v.object({
  users: v.array(v.object({ name: v.string(), user: v.optional(v.nullable(v.object({ tokenFile: v.optional(v.string()) }))) })),
});

/** How to reach a cluster and as whom, asked once a minute: so no token of EKS comes near the end of its quarter of an hour. */
async function accessTo(ctx: Ctx, cluster: Cluster): Promise<Access> {
  const { path } = cluster;
  return cached(ctx, `access to ${path}`, async () => {
    const changedMs = path === undefined ? 0 : statSync(path).mtimeMs;
    if (cluster.config?.changedMs !== changedMs) {
      cluster.config = { ...(await readKubeconfig(ctx, path)), changedMs };
    }
    const { kube, token } = cluster.config;
    const options: RequestOptions = { headers: {} };
    await kube.applyToHTTPSOptions(options);
    const { ca, cert, key, servername, rejectUnauthorized, auth } = options;
    const headers: Record<string, string> = {
      "user-agent": `max_group/${pkg.version}`,
      ...(options.headers as Record<string, string>),
    };
    if (auth) headers.Authorization = `Basic ${Buffer.from(auth).toString("base64")}`;
    if (token) headers.Authorization = `Bearer ${await token()}`;
    const { server = "", proxyUrl: proxy } = kube.getCurrentCluster() ?? {};
    const given = Object.entries({ ca, cert, key, serverName: servername, rejectUnauthorized }).filter(
      ([, x]) => x !== undefined,
    );
    cluster.access = { server, init: { headers, tls: Object.fromEntries(given), ...(proxy && { proxy }) } };
    return cluster.access;
  });
}

/** One request; credentials that are refused are got anew, once. */
async function send(ctx: Ctx, cluster: Cluster, { method, path, body, signal }: Ask, isSecond = false): Promise<Answer> {
  signal.throwIfAborted();
  const access = await accessTo(ctx, cluster);
  const { server, init } = access;
  const type = method === "PATCH" ? "application/merge-patch+json" : "application/json";
  const answer = await ctx.deps.fetch(`${server}${path}`, {
    ...init,
    method,
    headers: { ...init.headers, accept: "application/json", ...(body && { "content-type": type }) },
    body: body && JSON.stringify(body),
    signal,
  });
  const text = await answer.text();
  if (answer.status === 401 && !isSecond) {
    // Of many that are refused at once the first one clears the way for all.
    if (cluster.access === access) {
      ctx.state.cache.delete(`access to ${cluster.path}`);
      cluster.config = undefined;
    }
    return send(ctx, cluster, { method, path, body, signal }, true);
  }
  let json: unknown = { message: text };
  if (text.startsWith("{")) json = JSON.parse(text);
  const after = Number(answer.headers.get("retry-after") ?? Number.NaN);
  return { status: answer.status, json, retryAfterMs: Number.isNaN(after) ? undefined : after * 1000 };
}

const refusal = v.fallback(v.object({ message: v.optional(v.string(), ""), reason: v.optional(v.string(), "") }), {
  message: "",
  reason: "",
});
function kubeError({ status: code, json }: Answer): Error {
  const { message, reason } = v.parse(refusal, json);
  const name = code === 429 ? "TooManyRequestsException" : reason || `HTTP ${code}`;
  return Object.assign(new Error(message || `HTTP ${code}`), { name, $metadata: { httpStatusCode: code } });
}

/** One call to a cluster with a time limit of its own; throws for what is no success and not among `also`. */
async function kube(
  ctx: Ctx,
  cluster: Cluster,
  doing: string,
  ask: Omit<Ask, "signal">,
  { also = [], tries = 2, timeoutMs = 5_000 }: { also?: number[]; tries?: number; timeoutMs?: number } = {},
): Promise<Answer> {
  const once = async ({ abortSignal: signal }: { abortSignal: AbortSignal }) => {
    const answer = await cluster.ask({ ...ask, signal });
    if (answer.status >= 300 && !also.includes(answer.status)) throw kubeError(answer);
    return answer;
  };
  return aws(ctx, doing, once, { tries, timeoutMs });
}

/** All pages of a list. */
async function kubeList<T>(ctx: Ctx, cluster: Cluster, doing: string, path: string, read: (json: unknown) => T): Promise<T[]> {
  const found: T[] = [];
  let next: string | null | undefined;
  do {
    const page = `${path}${path.includes("?") ? "&" : "?"}limit=500${next ? `&continue=${encodeURIComponent(next)}` : ""}`;
    const { json } = await kube(ctx, cluster, doing, { method: "GET", path: page });
    const { items, metadata: meta } = v.parse(listOf(v.unknown()), json);
    found.push(...(items ?? []).map(read));
    next = meta.continue;
  } while (next);
  return found;
}

// Nodes.

async function listNodes(ctx: Ctx, cluster: Cluster): Promise<Map<string, KubeNode>> {
  const nodes = await kubeList(ctx, cluster, "listing nodes", "/api/v1/nodes", toNode);
  return new Map(nodes.flatMap((node) => (node.instance ? [node.instance] : node.dnsNames).map((key) => [key, node] as const)));
}

/**
 * An instance's node: by its provider ID, else by the private DNS name, if that node has no provider ID: addresses
 * are given out again. Names are tried first, for a list of all nodes is long; `isThorough` asks for that, too.
 */
async function nodeOf(ctx: Ctx, cluster: Cluster, instance: string, isThorough: boolean): Promise<KubeNode | undefined> {
  const known = cluster.names.get(instance);
  const seen = known ? undefined : ctx.state.claims.get(instance);
  const dns = known ? "" : seen?.privateDns || (await ctx.cloud.instance(instance))?.privateDns || "";
  const name = known ?? dns;
  if (name) {
    const path = `/api/v1/nodes/${name}`;
    const { status: code, json } = await kube(ctx, cluster, `reading node ${name}`, { method: "GET", path }, { also: [404] });
    const node = code === 404 ? undefined : toNode(json);
    if (node && (node.instance ?? instance) === instance) {
      cluster.names.set(instance, name);
      return node;
    }
    cluster.names.delete(instance);
  }
  const [byId, byName] = isThorough ? await Promise.all([cluster.listed(instance), cluster.listed(dns)]) : [];
  const node = byId ?? byName;
  if (node) cluster.names.set(instance, node.name);
  return node;
}

/** The nearest legal label value: at most 63 of letters, digits, -, _ and ., the first and last a letter or digit. */
export function labelValue(text: string): string {
  return text
    .replace(/[^A-Za-z0-9_.-]/g, "-")
    .replace(/^[^A-Za-z0-9]+/, "")
    .slice(0, 63)
    .replace(/[^A-Za-z0-9]+$/, "");
}

/** The merge patch that cordons a node for a notice; undefined where it is cordoned for that already. */
export function cordonPatch(node: KubeNode, wanted: Omit<Mark, "wasCordoned" | "drainMs">): object | undefined {
  const ours = node.taints.some((t) => t.key === MARK) ? node.mark : undefined;
  // Of several notices the one with a hard deadline tells when the node goes.
  const isCovered = ours && (wanted.deadlineMs === null || ours.deadlineMs === wanted.deadlineMs);
  if (isCovered && node.isCordoned) return undefined;
  const mark: Mark = { ...(isCovered ? ours : wanted), wasCordoned: ours?.wasCordoned ?? node.isCordoned };
  const value = labelValue(mark.notice);
  return {
    metadata: { resourceVersion: node.version, labels: { [MARK]: value }, annotations: { [MARK]: JSON.stringify(mark) } },
    // A merge patch replaces the whole list: the version guards what others put there meanwhile.
    spec: {
      unschedulable: true,
      taints: [...node.taints.filter((t) => t.key !== MARK), { key: MARK, value, effect: "NoSchedule" }],
    },
  };
}
/** The merge patch that takes off what we put on a node, and uncordons it where that was ours. */
export function uncordonPatch(node: KubeNode): object {
  const isOurs = node.taints.some((t) => t.key === MARK) && node.mark?.wasCordoned === false;
  const taints = node.taints.filter((t) => t.key !== MARK);
  return {
    metadata: { resourceVersion: node.version, labels: { [MARK]: null }, annotations: { [MARK]: null } },
    spec: { ...(isOurs && { unschedulable: null }), taints: taints.length ? taints : null },
  };
}

/** Whether a notice did not come true: its instance serves on, long after, and nothing of it is in hand. */
export function isUntrue(x: {
  nowMs: number;
  mark: Pick<Mark, "deadlineMs" | "markedMs">;
  lifecycleState: string | undefined;
  isInHand: boolean;
  hasOpenClaim: boolean;
}): boolean {
  if (x.lifecycleState !== "InService" || x.isInHand || x.hasOpenClaim) return false;
  const { deadlineMs, markedMs } = x.mark;
  return x.nowMs > (deadlineMs === null ? markedMs + FORGOTTEN_MS : deadlineMs + UNTRUE_MS);
}

/** Patches a node as it is at the moment; `plan` may find nothing to do. Answers the node as it was before. */
async function patchNode(
  ctx: Ctx,
  cluster: Cluster,
  doing: string,
  instance: string,
  plan: (node: KubeNode) => object | undefined,
): Promise<{ node: KubeNode; isChanged: boolean } | undefined> {
  for (let tries = 1; ; tries++) {
    const node = await nodeOf(ctx, cluster, instance, true);
    if (!node) return undefined;
    const body = plan(node);
    if (!body) return { node, isChanged: false };
    const path = `/api/v1/nodes/${node.name}`;
    const { status: code, json } = await kube(ctx, cluster, doing, { method: "PATCH", path, body }, { also: [409] });
    if (code !== 409) return { node: toNode(json), isChanged: true };
    if (tries === 5) throw new Error(`${doing}: it changes all the time`); // somebody else's patches come first
  }
}

/** An event on a node, for `kubectl describe node`; a repetition is refused by its name. */
async function tell(ctx: Ctx, cluster: Cluster, node: KubeNode, notice: string, reason: string, message: string): Promise<void> {
  const digest = createHash("sha256").update(`${node.uid} ${notice} ${reason}`).digest("hex").slice(0, 16);
  const time = new Date(ctx.deps.now()).toISOString().replace(/\.\d+Z$/, "Z");
  const body = {
    metadata: { name: `${node.name}.${digest}`, namespace: "default" },
    involvedObject: { apiVersion: "v1", kind: "Node", name: node.name, uid: node.uid },
    ...{ type: "Warning", reason, message, count: 1, firstTimestamp: time, lastTimestamp: time },
    ...{ source: { component: "max_group" }, reportingComponent: "max_group", reportingInstance: "max_group" },
  };
  const ask = { method: "POST", path: "/api/v1/namespaces/default/events", body };
  const post = () => kube(ctx, cluster, `an event on ${node.name}`, ask, { also: [409] });
  await orElse(post, undefined, ctx.deps.log.debug); // it only informs
}

/** Cordons the node of a notice's instance; undefined where it has none. */
async function cordonNode(ctx: Ctx, cluster: Cluster, work: Work): Promise<KubeNode | undefined> {
  const { instance, notice } = work;
  const deadlineMs = work.deadlineMs ?? null;
  const wanted = { instance, notice: notice.id, deadlineMs, markedMs: cloudNow(ctx) };
  const found = await patchNode(ctx, cluster, `cordoning the node of ${instance}`, instance, (node) => cordonPatch(node, wanted));
  if (found?.isChanged) {
    const { node } = found;
    work.log.info(`cordoned ${node.name}`, { node: node.name });
    const until = deadlineMs === null ? "and is replaced" : `and goes at ${new Date(deadlineMs).toISOString()}`;
    const what = `${notice.kind} notice ${notice.id}: ${instance} is cordoned ${until}`;
    void tell(ctx, cluster, node, notice.id, "SpotInterruption", what).catch(() => undefined); // only ever Stopped
  }
  return found?.node;
}

async function cordon(ctx: Ctx, work: Work): Promise<Result> {
  const cluster = clusterOf(ctx, work.options);
  if (!cluster) return done;
  const attempt = cordonNode(ctx, cluster, work).then(
    (node) => {
      if (!node) work.log.debug(`${work.instance} has no node in the cluster`);
    },
    (error: unknown) => {
      if (!(error instanceof Stopped))
        work.log.warn(`${errorText(error)}; it is tried again before the drain`, { error: errorName(error) });
    },
  );
  // The launch waits for no cluster.
  if (work.deadlineMs === undefined) await attempt;
  return done;
}

/** When nobody waits any longer for the replacement's node, and for the cluster itself, ms since 1970: a message's time is when it was due. */
const patienceEndsMs = (ctx: Ctx, work: Work) => (work.notice.timeMs ?? cloudNow(ctx)) + NODE_PATIENCE_MS;

/**
 * Until the pods have somewhere to go, or time runs short. What the target groups think of the new one does not matter
 * here: they may be waiting for the pods.
 */
async function waitForNode(ctx: Ctx, work: Work): Promise<Result> {
  const cluster = clusterOf(ctx, work.options);
  if (!cluster || work.drained) return done;
  hurry(ctx, work);
  let now: Awaited<ReturnType<typeof standIn>> = { standing: "none" };
  for (let round = 0; ; round++) {
    const group = await ctx.cloud.group(work.group);
    work.left = !isStaying(group?.members.get(work.instance));
    if (!group || work.left) return done;
    if (round % 5 === 0) now = await standIn(ctx, group, work.instance);
    if (round % 5 === 0 && (await isDead(ctx, work))) return done;
    const { claim, standing } = now;
    lapse(ctx, work);
    const { deadlineMs } = work;
    if (deadlineMs !== undefined && cloudNow(ctx) >= deadlineMs - DRAIN_BEGINS_MS) return done;
    if (deadlineMs === undefined && standing === "none") return claimGone(ctx, work);
    // Where it is the group's own substitute nobody knows which node to wait for.
    const isIn = claim ? group.members.get(claim.id)?.lifecycleState === "InService" : standing === "healthy";
    if (round === 0 && (await isNode(ctx, cluster, work, work.instance, true, (node) => !node))) return done;
    const isReady = (node?: KubeNode) => node?.isReady === true && !node.isCordoned;
    // A list of all nodes only now and then.
    if (isIn && (!claim || (await isNode(ctx, cluster, work, claim.id, round % 10 === 0, isReady)))) return done;
    if (deadlineMs !== undefined) await tick(ctx, deadlineMs);
    else if (!isIn) return retry(`replacement ${claim?.id ?? ""} is ${standing}`, standing === "outside" ? 60 : 15);
    else if (cloudNow(ctx) < patienceEndsMs(ctx, work)) return retry(`the node of ${claim?.id} is not Ready`, 15);
    else {
      work.log.warn(`the node of ${claim?.id} is still not Ready: the pods are moved all the same`);
      return done;
    }
  }
}
/** AWS took it early: its pods are gone, and it is to leave its group before that notices and substitutes it. */
async function isDead(ctx: Ctx, work: Work): Promise<boolean> {
  const old = await ctx.cloud.instance(work.instance);
  if (!old || isLiving(old)) return false;
  work.log.info(`${old.id} is ${old.state}: its pods are not waited for`);
  work.drained = true;
  return true;
}
/** Whether an instance's node, if it has one, is so; a cluster that does not answer says no such thing. */
const isNode = (ctx: Ctx, cluster: Cluster, { log }: Work, id: string, isThorough: boolean, so: (node?: KubeNode) => boolean) =>
  orElse(async () => so(await nodeOf(ctx, cluster, id, isThorough)), false, log.debug);

/** What a drain does with a pod: as `kubectl drain --ignore-daemonsets --delete-emptydir-data --force` would. */
export function judgePod(pod: Pod, isDaemonSetThere: boolean): "leave" | "evict" | "wait" {
  if (pod.isMirror) return "leave";
  const isFinished = pod.phase === "Succeeded" || pod.phase === "Failed";
  if (pod.daemonSet !== undefined && isDaemonSetThere && !isFinished) return "leave";
  return pod.isEnding ? "wait" : "evict";
}

/** A grace period that ends before the instance does, in seconds; undefined: the pod's own is short enough. */
export function shortenedGrace(graceSeconds: number, nowMs: number, deadlineMs: number | undefined): number | undefined {
  if (deadlineMs === undefined) return undefined;
  const left = Math.max(1, Math.floor((deadlineMs - 5_000 - nowMs) / 1000));
  return graceSeconds > left ? left : undefined;
}

/** Why a pod is still there, and when it is asked to go again. */
type Held = { reason: string; againMs: number };

async function evictPod(ctx: Ctx, cluster: Cluster, work: Work, pod: Pod): Promise<Held | undefined> {
  const { name, namespace, uid } = pod;
  const gracePeriodSeconds = shortenedGrace(pod.graceSeconds, cloudNow(ctx), work.deadlineMs);
  const body = {
    ...{ apiVersion: "policy/v1", kind: "Eviction", metadata: { name, namespace } },
    // Only this very pod: its namesake on another node is none of ours.
    deleteOptions: { preconditions: { uid }, ...(gracePeriodSeconds !== undefined && { gracePeriodSeconds }) },
  };
  const path = `/api/v1/namespaces/${namespace}/pods/${name}/eviction`;
  const held = (reason: string, ms: number): Held => ({ reason, againMs: ctx.deps.now() + ms });
  try {
    const answer = await aws(
      ctx,
      `evicting ${namespace}/${name}`,
      (o) => cluster.evict({ method: "POST", path, body, signal: o.abortSignal }),
      {
        tries: 1,
        timeoutMs: 10_000,
      },
    );
    if (answer.status < 300) work.log.debug(`evicted ${namespace}/${name}`);
    if (answer.status < 300 || answer.status === 404 || answer.status === 409) return undefined;
    const { message } = kubeError(answer);
    if (answer.status === 429) return held(message, answer.retryAfterMs ?? (work.deadlineMs === undefined ? 5_000 : 2_000));
    return held(message, 10_000);
  } catch (error) {
    if (error instanceof Stopped) throw error;
    return held(errorText(error), 2_000);
  }
}

/** One look at a node's pods, and an eviction for each that may be asked for now; `see` hears which are still to go. */
async function evictAll(
  ctx: Ctx,
  cluster: Cluster,
  work: Work,
  node: string,
  held: Map<string, Held>,
  see: (pods: Pod[]) => void,
): Promise<void> {
  const list = `/api/v1/pods?fieldSelector=${encodeURIComponent(`spec.nodeName=${node}`)}`;
  const pods = await kubeList(ctx, cluster, `listing the pods of ${node}`, list, toPod);
  const isThere = await Promise.all(pods.map((pod) => isDaemonSetThere(ctx, cluster, pod)));
  const moving = pods.filter((pod, n) => judgePod(pod, isThere[n] ?? true) !== "leave");
  see(moving);
  await Promise.all(
    moving.map(async (pod) => {
      if (pod.isEnding || (held.get(pod.uid)?.againMs ?? 0) > ctx.deps.now()) return;
      const refused = await evictPod(ctx, cluster, work, pod);
      if (refused) held.set(pod.uid, refused);
      else held.delete(pod.uid);
    }),
  );
}

/** A DaemonSet that is gone makes no more pods: those that it left behind may go. */
async function isDaemonSetThere(ctx: Ctx, cluster: Cluster, { namespace, daemonSet }: Pod): Promise<boolean> {
  if (daemonSet === undefined) return false;
  const path = `/apis/apps/v1/namespaces/${namespace}/daemonsets/${daemonSet}`;
  const read = async () => {
    const doing = `reading DaemonSet ${namespace}/${daemonSet}`;
    const answer = await kube(ctx, cluster, doing, { method: "GET", path }, { also: [404] });
    return answer.status !== 404;
  };
  // Where nobody knows, its pods are left alone.
  return orElse(() => cached(ctx, `${cluster.path} ${path}`, read), true, ctx.deps.log.debug);
}

/** One drain under way. */
type Drain = {
  cluster: Cluster;
  /** When it is over, ms since 1970. */
  overMs: number;
  node: KubeNode | undefined;
  /** The pods that were still to go at the last look. */
  left: Pod[] | undefined;
  /** By UID: those that were refused. */
  held: Map<string, Held>;
  fault: string;
};

/** Evicts a node's pods side by side, and waits until they are gone or time is up. */
async function drain(ctx: Ctx, work: Work): Promise<Result> {
  const cluster = clusterOf(ctx, work.options);
  if (!cluster || work.left || work.drained || (await staysBeside(ctx, work))) return done;
  const beganMs = cloudNow(ctx);
  const { deadlineMs, options } = work;
  const d: Drain = { cluster, overMs: 0, node: undefined, left: undefined, held: new Map(), fault: "" };
  // Without a hard deadline the time counts from what stands on the node; while that cannot be read, from the message.
  d.overMs =
    deadlineMs === undefined
      ? patienceEndsMs(ctx, work) + options.k8s_node_drain_grace_second * 1000
      : deadlineMs - DRAIN_ENDS_MS;
  const leftMs = () => (deadlineMs === undefined ? Math.min(d.overMs, beganMs + HELD_MS) : d.overMs) - cloudNow(ctx);
  for (let round = 0; round === 0 || leftMs() > 0; round++) {
    if (round % 3 === 0 && (await isDead(ctx, work))) return done;
    await drainRound(ctx, work, d, Math.max(leftMs(), deadlineMs === undefined ? 5_000 : 1));
    if (d.left?.length === 0) break;
    if (leftMs() > 0) await pause(ctx, Math.min(POLL_MS, leftMs()));
  }
  const name = d.node?.name ?? `the node of ${work.instance}`;
  if (d.left?.length !== 0 && cloudNow(ctx) < d.overMs) return retry(`${d.left?.length ?? "all"} pods are still on ${name}`, 5);
  work.drained = true;
  if (d.left?.length) {
    const pods = d.left.map((pod) => `${pod.namespace}/${pod.name} (${d.held.get(pod.uid)?.reason ?? "still ending"})`);
    work.log.warn(`time is up, and these pods go down with ${name}: ${pods.join(", ")}`, {
      node: d.node?.name,
      pods: pods.length,
    });
  } else if (!d.left) work.log.warn(`${name} could not be drained: ${d.fault}; its pods go down with it`);
  else if (d.node) work.log.info(`drained ${name}`, { node: name, seconds: Math.round((cloudNow(ctx) - beganMs) / 1000) });
  return done;
}

async function drainRound(ctx: Ctx, work: Work, d: Drain, timeoutMs: number): Promise<void> {
  const isFirst = d.left === undefined;
  const round = async () => {
    d.node ??= await cordonNode(ctx, d.cluster, work);
    if (!d.node) d.left = [];
    if (!d.node) return;
    if (work.deadlineMs === undefined)
      d.overMs = (await drainBegan(ctx, d.cluster, work, d.node)) + work.options.k8s_node_drain_grace_second * 1000;
    return evictAll(ctx, d.cluster, work, d.node.name, d.held, (pods) => {
      d.left = pods;
      if (isFirst && pods.length) work.log.info(`draining ${d.node?.name}`, { node: d.node?.name, pods: pods.length });
    });
  };
  try {
    // The limit holds for the round as a whole, whatever its calls do.
    await aws(ctx, `draining the node of ${work.instance}`, round, { tries: 1, timeoutMs });
  } catch (error) {
    if (error instanceof Stopped) throw error;
    if (d.fault === "" && !d.left)
      work.log.warn(`${errorText(error)}; trying on while there is time`, { error: errorName(error) });
    d.fault = errorText(error);
  }
}

/** When this drain began, as written on the node, where it is written if need be: that survives us. */
async function drainBegan(ctx: Ctx, cluster: Cluster, work: Work, node: KubeNode): Promise<number> {
  // What was over before this message was due belongs to an earlier notice, after which the instance stayed.
  const dueMs = (work.notice.timeMs ?? 0) - work.options.k8s_node_drain_grace_second * 1000;
  const isBegun = (mark: Mark | undefined) => mark?.drainMs !== undefined && mark.drainMs >= dueMs;
  if (node.mark?.drainMs !== undefined && isBegun(node.mark)) return node.mark.drainMs;
  const drainMs = cloudNow(ctx);
  const begun = ({ mark, version }: KubeNode) =>
    mark && !isBegun(mark)
      ? { metadata: { resourceVersion: version, annotations: { [MARK]: JSON.stringify({ ...mark, drainMs }) } } }
      : undefined;
  const found = await patchNode(ctx, cluster, `marking ${node.name}`, work.instance, begun);
  node.mark = found?.node.mark ?? node.mark;
  return node.mark?.drainMs ?? drainMs;
}

// Notices that did not come true.

/** The clusters in use, and those that were: what was marked there is still to be given back. */
function clustersInUse(ctx: Ctx): Cluster[] {
  for (const { options } of ctx.state.groups.values()) if (options.k8s_node_drain_option) clusterOf(ctx, options);
  return [...ctx.state.clusters.values()];
}

/** Gives back the nodes whose notice did not come true. Only our own taint entitles us to. */
export async function releaseNodes(ctx: Ctx): Promise<void> {
  const { state } = ctx;
  if (ctx.deps.now() - state.nodesLookedMs < LOOK_MS) return;
  state.nodesLookedMs = ctx.deps.now();
  const look = async (cluster: Cluster) => {
    const path = `/api/v1/nodes?labelSelector=${encodeURIComponent(MARK)}`;
    const nodes = await kubeList(ctx, cluster, "looking for nodes of notices that did not come true", path, toNode);
    await Promise.all(nodes.map((node) => releaseNode(ctx, cluster, node)));
  };
  // The next look is a minute away.
  for (const cluster of clustersInUse(ctx)) await orElse(() => look(cluster), undefined, ctx.deps.log.debug);
}

async function releaseNode(ctx: Ctx, cluster: Cluster, node: KubeNode): Promise<void> {
  const { mark } = node;
  if (!mark) return;
  const { instance } = mark;
  const isDue = (lifecycleState: string | undefined, hasOpenClaim: boolean) =>
    isUntrue({
      nowMs: cloudNow(ctx),
      mark,
      lifecycleState,
      isInHand: [...ctx.state.inHand.values()].some((w) => w.instance === instance),
      hasOpenClaim,
    });
  if (!isDue("InService", false)) return;
  const [member, claim] = await Promise.all([ctx.cloud.member(instance), standsFor(ctx, instance)]);
  if (!isDue(member?.lifecycleState, claim !== undefined && !isSettled(claim))) return;
  // As it was listed: whoever has marked it anew since is not undone.
  const ask = { method: "PATCH", path: `/api/v1/nodes/${node.name}`, body: uncordonPatch(node) };
  const { status: code } = await kube(ctx, cluster, `uncordoning ${node.name}`, ask, { also: [404, 409] });
  if (code >= 300) return;
  ctx.deps.log.info(`uncordoned ${node.name}: the notice for ${instance} did not come true`, {
    instance,
    notice: mark.notice,
    node: node.name,
  });
  await tell(ctx, cluster, node, mark.notice, "SpotInterruptionOver", `${instance} stays: ${node.name} is given back`);
}

// At start.

/** What conf/k8s-rbac.yml allows, in SelfSubjectAccessReview's words. */
const RIGHTS: { verb: string; group?: string; resource: string; subresource?: string; namespace?: string }[] = [
  { verb: "get", resource: "nodes" },
  { verb: "list", resource: "nodes" },
  { verb: "patch", resource: "nodes" },
  { verb: "list", resource: "pods" },
  { verb: "create", resource: "pods", subresource: "eviction" },
  { verb: "get", group: "apps", resource: "daemonsets" },
  { verb: "create", resource: "events", namespace: "default" },
];
const reviewSchema = v.object({ status: v.object({ allowed: v.boolean() }) });

async function missingRights(ctx: Ctx, cluster: Cluster): Promise<string[]> {
  const path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
  const answers = RIGHTS.map(async (resourceAttributes) => {
    const body = { apiVersion: "authorization.k8s.io/v1", kind: "SelfSubjectAccessReview", spec: { resourceAttributes } };
    const { json } = await kube(ctx, cluster, "asking for our rights", { method: "POST", path, body });
    const { verb, resource, subresource } = resourceAttributes;
    return v.parse(reviewSchema, json).status.allowed ? [] : [`${verb} ${resource}${subresource ? `/${subresource}` : ""}`];
  });
  return (await Promise.all(answers)).flat();
}

/** Says what would stand in the way of a group's drains; only ever warns. */
async function checkCluster(ctx: Ctx, name: string, options: GroupOptions, log: Log): Promise<void> {
  const cluster = clusterOf(ctx, options);
  if (!cluster)
    return log.warn(
      `k8s_node_drain_option is on, and no cluster is known: set k8s_config_file_path, pass -K FILE, or run max_group in a pod of the cluster; until then no pod of ${name} is moved`,
    );
  try {
    const missing = await cached(ctx, `rights at ${cluster.path}`, () => missingRights(ctx, cluster));
    if (missing.length)
      log.warn(
        `the cluster of ${name} does not allow: ${missing.join(", ")}; bind max_group's user to the roles of conf/k8s-rbac.yml`,
      );
    else log.debug(`pods of ${name} are moved by way of ${cluster.access?.server}`);
  } catch (error) {
    const why = errorName(error) === "Unauthorized" ? "it does not know max_group's user (401)" : errorText(error);
    log.warn(
      `the cluster of ${name} cannot be used: ${why}; check ${cluster.path ?? "the pod's service account"}; until then no pod is moved`,
    );
  }
}

// ─── Steps: Consul ───────────────────────────────────────────────────────────────────────────────────────
// Before an instance is detached its services leave Consul, at its own agent: maintenance mode first, so that whoever
// watches sees it at once. That agent is on a machine that is about to go: it is asked once, has three seconds in all
// and no more than the detach can spare, and whatever it does, the replacement goes on.

const CONSUL_MS = 3_000;

type ConsulAccess = { scheme: "http" | "https"; token: string | undefined; tls: NonNullable<BunFetchRequestInit["tls"]> };

/**
 * Consul's environment variables, as its own tools read them (api.go: a token file wins over a token), but for the
 * address, which is each agent's own, and a CONSUL_HTTP_SSL_VERIFY that is no boolean, which there means "no".
 * `read` gives a file's text, `list` the files of a folder; both throw where that cannot be read.
 */
export function consulAccess(
  env: Record<string, string | undefined>,
  read: (path: string) => string,
  list: (folder: string) => string[],
): ConsulAccess {
  const { CONSUL_HTTP_TOKEN_FILE: tokenFile, CONSUL_CACERT: ca, CONSUL_CAPATH: caFolder } = env;
  const { CONSUL_CLIENT_CERT: cert, CONSUL_CLIENT_KEY: key, CONSUL_TLS_SERVER_NAME: name } = env;
  if (!cert !== !key) throw new Error("CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY go together");
  // Where both are set, the file counts.
  const authorities = ca ? [read(ca)] : caFolder ? list(caFolder).map(read) : [];
  return {
    // The words of Go's strconv.ParseBool.
    scheme: /^(1|[tT]|TRUE|[tT]rue)$/.test(env.CONSUL_HTTP_SSL ?? "") ? "https" : "http",
    token: (tokenFile ? read(tokenFile).trim() : "") || env.CONSUL_HTTP_TOKEN || undefined,
    tls: {
      ...(authorities.length && { ca: authorities }),
      ...(cert && key && { cert: read(cert), key: read(key) }),
      ...(name && { serverName: name.replace(/:\d+$/, "") }),
      ...(/^(0|[fF]|FALSE|[fF]alse)$/.test(env.CONSUL_HTTP_SSL_VERIFY ?? "") && { rejectUnauthorized: false }),
    },
  };
}

const agentSelf = v.object({
  Config: v.optional(v.object({ NodeName: v.optional(v.string(), "") }), {}),
  Member: v.optional(v.object({ Addr: v.optional(v.string(), "") }), {}),
  Meta: v.optional(v.nullable(v.record(v.string(), v.string())), {}),
});

/** Why this agent is another instance's, as far as it tells: addresses are used again once their instance is gone. */
export function whoseAgent(self: unknown, old: string, replacementAddress: string | undefined): string | undefined {
  const known = v.safeParse(agentSelf, self);
  if (!known.success) return undefined;
  const { Config, Member, Meta } = known.output;
  if (replacementAddress && Member.Addr === replacementAddress) return "it is the replacement's";
  const ids: string[] = named(new Error([Config.NodeName, ...Object.values(Meta ?? {})].join(" ")));
  return ids.length && !ids.includes(old) ? `it calls itself ${ids[0]}` : undefined;
}

async function deregister(ctx: Ctx, work: Work): Promise<Result> {
  const { deregistered } = ctx.state;
  if (work.left || (!deregistered.has(work.instance) && (await staysBeside(ctx, work)))) return done;
  // Whichever of its messages has begun it, none goes on to the detach before.
  const begun = deregistered.get(work.instance) ?? { atMs: ctx.deps.now(), over: askAgent(ctx, work) };
  deregistered.set(work.instance, begun);
  // Five seconds before the deadline nothing is waited for: the agent is asked beside the detach.
  const spareMs = work.deadlineMs === undefined ? CONSUL_MS : work.deadlineMs - 5_000 - cloudNow(ctx);
  if (spareMs > 0) await Promise.race([begun.over, pause(ctx, Math.min(CONSUL_MS, spareMs))]);
  return done;
}
/** Resolves once the agent has answered, or has had its time. */
async function askAgent(ctx: Ctx, work: Work): Promise<void> {
  const limit = new AbortController();
  const late = ctx.deps.sleep(CONSUL_MS, limit.signal).then(() => {
    throw new Error(`no answer in ${CONSUL_MS / 1000} s`);
  });
  await Promise.race([leaveConsul(ctx, work, limit.signal), late])
    .catch((error: unknown) => work.log.warn(`Consul on ${work.instance}: ${errorText(error)}; going on`))
    .finally(() => limit.abort(new Stopped("enough")));
}

/** Of one that stays after all, and is asked anew at its next notice. */
function sayConsulLeft({ state }: Ctx, { instance, log }: Work): void {
  if (state.deregistered.delete(instance))
    log.warn(`the services of ${instance} have left Consul, and it stays: end its agent's maintenance mode, register them again`);
}

/** Takes all services of the old instance's agent out of Consul. Throws what went wrong, as one line. */
async function leaveConsul(ctx: Ctx, work: Work, signal: AbortSignal): Promise<void> {
  const { instance, claim, log } = work;
  const [old, replacement] = await Promise.all([instance, claim ?? instance].map((id) => ctx.cloud.instance(id)));
  const address = old?.address;
  if (old?.state !== "running" || !address) return log.info(`${instance} is ${old?.state ?? "gone"}: nothing asked of Consul`);
  const other = replacement?.id === instance ? undefined : replacement?.address;
  if (address === other) return log.warn(`${address} is the replacement's by now: nothing asked of Consul`);
  const { scheme, token, tls } = consulAccess(
    process.env,
    (path) => readFileSync(path, "utf8"),
    (folder) => readdirSync(folder).map((name) => `${folder}/${name}`),
  );
  const agent = `${scheme}://${address.includes(":") ? `[${address}]` : address}:${work.options.consul_port}`;
  const ask = async (method: string, path: string) => {
    const answer = await ctx.deps.fetch(`${agent}/v1/agent/${path}`, {
      method,
      signal,
      headers: token ? { "X-Consul-Token": token } : {},
      redirect: "manual",
      keepalive: false, // the address may be another machine's the next time
      ...(scheme === "https" && { tls }),
    });
    return {
      status: answer.status,
      text: await answer.text(),
      isFiltered: answer.headers.has("X-Consul-Results-Filtered-By-ACLs"),
    };
  };
  const refusal = (what: string, { status, text }: { status: number; text: string }) =>
    `${what}: ${status} ${text.slice(0, 200).trim()}`;

  // Without the right to read it nothing is known of whose it is.
  const self = await ask("GET", "self");
  const whose = self.status === 200 ? whoseAgent(JSON.parse(self.text), instance, other) : undefined;
  if (whose) return log.warn(`the agent at ${address} is not ${instance}'s (${whose}): left alone`);
  const reason = encodeURIComponent(`max_group: ${instance} is being replaced`);
  const maintenance = await ask("PUT", `maintenance?enable=true&reason=${reason}`);
  const list = await ask("GET", "services");
  if (list.status !== 200) throw new Error(refusal("reading its services", list));
  const ids = Object.keys(v.parse(v.record(v.string(), v.unknown()), JSON.parse(list.text)));
  const faults: string[] = [];
  const leave = async (id: string) => {
    const answer = await ask("PUT", `service/deregister/${encodeURIComponent(id)}`);
    // Gone already, such as a sidecar with its service.
    const isGone = answer.status === 200 || (answer.status === 404 && /Unknown service/.test(answer.text));
    if (!isGone) faults.push(refusal(`deregistering ${id}`, answer));
  };
  // An agent allows 200 connections from one address.
  for (let n = 0; n < ids.length; n += 50) await Promise.all(ids.slice(n, n + 50).map(leave));
  log.info(`deregistered ${ids.length - faults.length} services of ${instance} from Consul`);
  if (maintenance.status !== 200) faults.push(refusal("maintenance mode", maintenance));
  if (list.isFiltered) faults.push("the token may not see all of its services");
  if (!ids.length && !token) faults.push("it shows no services, and with ACLs on it shows none without CONSUL_HTTP_TOKEN");
  if (faults.length) throw new Error(faults.slice(0, 5).join("; "));
}

// ─── Instance manager ────────────────────────────────────────────────────────────────────────────────────
// One loop over everything that carries our tag: it settles claims whose message was lost, ends the surplus and
// the losers, puts maximums back and sweeps leaks. It reads before it acts, twice where an act cannot be undone,
// and never attaches anything.

const BUSY_MS = 5_000;
const IDLE_MS = 30_000;
const LEAK_MS = 10 * 60_000;
const SECOND_READ_MS = 30_000;

async function managerLoop(ctx: Ctx): Promise<void> {
  while (!ctx.signal.aborted) {
    let busy = false;
    try {
      busy = await managerPass(ctx);
    } catch (error) {
      if (error instanceof Stopped) return;
      ctx.deps.log.error(`instance manager: ${errorText(error)}; trying again`, { error: errorName(error) });
    }
    // Whatever is begun meanwhile ends the long pause.
    for (let pausedMs = 0; pausedMs === 0 || (pausedMs < IDLE_MS && !busy); pausedMs += BUSY_MS) {
      await pause(ctx, BUSY_MS).catch(() => undefined); // only ever Stopped
      busy ||= ctx.signal.aborted || ctx.state.restoring.size > 0 || [...ctx.state.claims.values()].some((c) => !isSettled(c));
    }
  }
}

/** One look at all claims and maximums; true while something is unsettled. */
async function managerPass(ctx: Ctx): Promise<boolean> {
  const { state } = ctx;
  const tagged = await ctx.cloud.describe("reading claims", [{ Name: "tag-key", Values: [TAG.replaces] }]);
  const shown = tagged.filter(isClaim);
  // What fails is tried again with the next pass, holds up nothing else, and is said once.
  const part = async <T>(what: string, run: () => Promise<T>, otherwise: T) => {
    let failed = false;
    const levels = ["warn", "error"] as const;
    const answer = await orElse(run, otherwise, (text, fields) => {
      failed = true;
      const level = RETRYABLE.has(String(fields?.error)) ? "warn" : "error";
      sayOnce(ctx, level, `manager ${level} ${what}`, `instance manager: ${text}; trying again`);
    });
    if (!failed) for (const level of levels) state.said.delete(`manager ${level} ${what}`);
    return answer;
  };
  await part("orders", () => writeOrders(ctx, shown), undefined);
  const seen = new Map(shown.map((c) => [c.id, c]));
  for (const [id, c] of state.claims) {
    const now = seen.get(id);
    if (now) state.claims.set(id, { ...now, tags: { ...c.tags, ...now.tags } });
    else if (cloudNow(ctx) - c.launchedMs > 120_000) state.claims.delete(id); // long enough for the slowest describe
  }
  for (const c of shown) {
    if (!state.claims.has(c.id)) state.claims.set(c.id, c);
    if (!isLiving(c)) state.claims.delete(c.id);
  }
  const open = [...state.claims.values()].filter((c) => !isSettled(c));
  await part("heirs", () => inherit(ctx, shown), undefined);
  await part("claims", () => settleClaims(ctx, open), undefined);
  // Of groups that have left the configuration as well: what was raised is put back.
  const names = new Set([...state.groups.keys(), ...shown.map((c) => c.tags[TAG.group] ?? "")]);
  // One that is being deleted takes no change.
  const groups = (await Promise.all([...names].map((name) => groupOf(ctx, name)))).flatMap((g) => (g && !g.status ? g : []));
  for (const name of state.restoring.keys()) if (!groups.some((g) => g.name === name)) state.restoring.delete(name);
  let raised = false;
  for (const g of groups) {
    await part(`protection ${g.name}`, () => release(ctx, g), undefined);
    await part(`ties ${g.name}`, () => untie(ctx, g), undefined);
    raised = (await part(`maximum ${g.name}`, () => restoreMaximum(ctx, g, open), true)) || raised;
  }
  await part("volumes", () => sweepVolumes(ctx), undefined);
  void releaseNodes(ctx).catch((error: unknown) => ctx.deps.log.debug(errorText(error))); // a slow cluster holds up nothing here
  forget(ctx, open);
  return open.length > 0 || raised;
}

/** A claim's tag may say anything, and a name that AWS refuses fails the call for all groups in it. */
const groupOf = async (ctx: Ctx, name: string) => (v.is(groupName, name) ? ctx.cloud.group(name) : undefined);

function forget(ctx: Ctx, open: Ec2Instance[]): void {
  const alive = new Set(open.map((c) => c.id));
  for (const map of [ctx.state.outsideSince, ctx.state.actedMs])
    for (const key of map.keys()) if (!alive.has(key.split(" ")[0] ?? "")) map.delete(key);
  for (const map of [ctx.state.detachSeenMs, ctx.state.finishedMs, ctx.state.untoldMs])
    for (const [key, atMs] of map) if (ctx.deps.now() - atMs > 3_600_000) map.delete(key);
  for (const id of ctx.state.joined.keys()) if (!ctx.state.claims.has(id)) ctx.state.joined.delete(id);
  if (ctx.state.left.size > 10_000) ctx.state.left.clear(); // a memory to save calls, no more
  for (const { names } of ctx.state.clusters.values()) if (names.size > 10_000) names.clear(); // likewise
  for (const [id, { atMs }] of ctx.state.deregistered) if (ctx.deps.now() - atMs > 3_600_000) ctx.state.deregistered.delete(id);
  for (const [key, { atMs }] of ctx.state.cache) if (ctx.deps.now() - atMs > 60_000) ctx.state.cache.delete(key);
  for (const [key, untilMs] of ctx.state.failedPools) if (untilMs < ctx.deps.now()) ctx.state.failedPools.delete(key);
}

/** What is to become of one unsettled claim. `since` is how long it was seen this way, in ms. */
export function judgeClaim(x: {
  isWinner: boolean;
  winnerInService: boolean;
  member: Member | undefined;
  /** Carries spotmax:detached: outside its group its termination message ends it, when its time has come. */
  isLetGo: boolean;
  outsideMs: number;
  ageMs: number;
  old: "staying" | HowLeft;
  watchedMs: number;
  /** So long the detach message may be with a daemon that has died. */
  messageMs: number;
  membersInService: number;
  desired: number;
  patienceMs: number;
}): "leave" | "settle" | "end outside" | "end member" | "remind" {
  if (!x.member) {
    if (x.isLetGo || x.outsideMs < SECOND_READ_MS) return "leave";
    if (!x.isWinner && x.winnerInService) return "end outside";
    if (x.old === "decremented") return "end outside";
    return x.ageMs > LEAK_MS ? "end outside" : "leave";
  }
  if (!x.isWinner) return x.winnerInService ? "end member" : "leave";
  if (/Standby/.test(x.member.lifecycleState) && x.old !== "staying") return x.watchedMs < x.messageMs ? "leave" : "settle";
  if (x.member.lifecycleState !== "InService") return "leave";
  if (x.old === "staying") return x.ageMs > LEAK_MS + x.patienceMs ? "remind" : "leave";
  // A surplus that is itself lost meanwhile leaves desired one too high: it goes as soon as a second look confirms it.
  if (x.old === "substituted") return x.watchedMs >= 10_000 && x.membersInService >= x.desired ? "end member" : "leave";
  // The detach message settles its own claim, and knows whether the old one was protected: it comes first.
  if (x.watchedMs < x.messageMs) return "leave";
  if (x.old === "decremented") return "settle";
  return x.watchedMs > LEAK_MS ? "settle" : "leave"; // nobody knows how it left: what is there stays
}

/**
 * AWS forgets an instance an hour after its end, its tags perhaps sooner, and with them whom that one was to replace; but
 * the first one's way out may be a matter of days. Once that is none of minutes, its own replacement takes it over, as
 * long as no data of it is to be moved; where its group has substituted it, nobody can, and the first one goes at once.
 */
async function inherit(ctx: Ctx, shown: Ec2Instance[]): Promise<void> {
  for (const ended of shown) {
    const first = replacedBy(ended);
    const isOver = ended.state === "terminated" && !isSettled(ended) && cloudNow(ctx) - ended.launchedMs > INHERIT_MS;
    const group = isOver && first ? await groupOf(ctx, ended.tags[TAG.group] ?? "") : undefined;
    if (!group || !first) continue;
    const [heir, other] = [ended.id, first].map((old) =>
      [...ctx.state.claims.values()].find((c) => replacedBy(c) === old && isLiving(c) && !isSettled(c)),
    );
    const isAlone = !other && isStaying(group.members.get(first)) && ctx.state.groups.has(group.name);
    if (!heir && !isAlone) continue;
    const how = await cached(ctx, `how ${ended.id} left`, () => howOldLeft(ctx, group.name, ended.id));
    if (how === "decremented" && heir && !(await ctx.cloud.volumesOf(ended.id))?.length) {
      const tags = { [TAG.replaces]: first };
      await ctx.cloud.tag([heir.id], tags);
      ctx.state.claims.set(heir.id, { ...heir, tags: { ...heir.tags, ...tags } });
    }
    if (how === "substituted" && isAlone) await remind(ctx, ended.id, first, group.name);
  }
}
const INHERIT_MS = 5 * 60_000;

async function settleClaims(ctx: Ctx, open: Ec2Instance[]): Promise<void> {
  const nowMs = ctx.deps.now();
  const { visibility_timeout_seconds } = ctx.state.config.global.detach_evt_sqs;
  const seen = await Promise.all(
    open.map(async (claim) => {
      // Nearly all are members of their own group, which shows them: one call for fifty groups.
      const own = await groupOf(ctx, claim.tags[TAG.group] ?? "");
      const member = own?.members.get(claim.id) ?? (await ctx.cloud.member(claim.id));
      const name = member?.group ?? claim.tags[TAG.group] ?? "";
      const group = await groupOf(ctx, name);
      const old = replacedBy(claim);
      const fate = old && group ? await fateOf(ctx, group, claim.id, old) : ("unknown" as const);
      return { claim, member, name, group, old, fate };
    }),
  );
  const rivals = Map.groupBy(ctx.state.claims.values(), (c) => replacedBy(c) ?? "");
  const ended = new Map<string, number>(); // so many surplus ones of a group
  for (const { claim, member, name, group, old, fate } of seen) {
    if (!member && !ctx.state.outsideSince.has(claim.id)) ctx.state.outsideSince.set(claim.id, nowMs);
    if (member) ctx.state.outsideSince.delete(claim.id);
    const best = old ? winner(rivals.get(old) ?? []) : undefined;
    const stays = old !== undefined && isStaying(group?.members.get(old));
    const inService = group ? [...group.members.values()].filter((m) => m.lifecycleState === "InService") : [];
    if (stays) for (const memory of [ctx.state.left, ctx.state.untoldMs]) memory.delete(old); // attached once more
    const watch = `${claim.id} ${stays}`;
    if (!ctx.state.actedMs.has(watch)) ctx.state.actedMs.set(watch, nowMs);
    const options = ctx.state.groups.get(name)?.options;
    const what = judgeClaim({
      isWinner: best?.id === claim.id,
      winnerInService: best !== undefined && group?.members.get(best.id)?.lifecycleState === "InService",
      member,
      isLetGo: Boolean(claim.tags[TAG.detached]),
      outsideMs: nowMs - (ctx.state.outsideSince.get(claim.id) ?? nowMs),
      ageMs: cloudNow(ctx) - claim.launchedMs,
      old: fate,
      watchedMs: nowMs - (ctx.state.actedMs.get(watch) ?? nowMs),
      messageMs: Math.min(LEAK_MS, (visibility_timeout_seconds + 2 * LEASE_SECONDS) * 1000),
      membersInService: inService.reduce((sum, m) => sum + m.weight, 0),
      desired: group?.desired ?? 0,
      patienceMs: options ? patienceMsOf(options) : Number.POSITIVE_INFINITY,
    });
    // In a group that it does not name it is somebody else's, whatever the rest of its tags says.
    const isTheirs = member !== undefined && member.group !== claim.tags[TAG.group];
    if (what === "leave" || (isTheirs && what !== "settle")) continue;
    if (what === "end member") {
      const count = (ended.get(name) ?? 0) + 1;
      if (count > MAX_ENDED) continue;
      ended.set(name, count);
    }
    const log = ctx.deps.log.with({ group: name, instance: old, replacement: claim.id });
    const act = () => actOnClaim(ctx, what, { claim, old: old ?? "", name, log });
    await orElse(act, undefined, (text, fields) =>
      log[RETRYABLE.has(String(fields?.error)) ? "warn" : "error"](`instance manager: ${text}`, fields),
    );
  }
}

/**
 * How long the way out may take by itself. Of a group that is not in this configuration nobody here knows: another
 * installation's daemons may look after it, and what was begun under earlier options has them in its message.
 */
const patienceMsOf = (o: GroupOptions) =>
  1000 *
  (o.detaching_delay_seconds + o.preaction_detach_delay_seconds + (o.k8s_node_drain_option ? o.k8s_node_drain_grace_second : 0));

/**
 * Surplus members of a group that go in one pass: each takes one from desired and from what is in service, so the
 * numbers that they were judged on stay true; but those may be old, and what waits may be lost to AZRebalance.
 */
const MAX_ENDED = 10;

async function actOnClaim(
  ctx: Ctx,
  what: "settle" | "end outside" | "end member" | "remind",
  on: { claim: Ec2Instance; old: string; name: string; log: Log },
): Promise<void> {
  const { claim, old, name, log } = on;
  switch (what) {
    case "settle": {
      const keepProtected = (await ctx.cloud.group(name))?.protectsNew ?? false;
      await settle(ctx, name, [{ id: claim.id, keepProtected }]);
      return log.info(`settled ${claim.id}: ${old} has left ${name}`);
    }
    case "remind":
      if (await remind(ctx, claim.id, old, name))
        log.warn(`${old} is still beside its replacement ${claim.id}: sent a fresh detach message`);
      return;
    case "end outside":
      if (await endStray(ctx, claim.id, name)) log.warn(`ended ${claim.id}: launched for ${old || "nobody"} and in no group`);
      return;
  }
  const input = { InstanceId: claim.id, ShouldDecrementDesiredCapacity: true };
  const end = async () => {
    // Another daemon may have settled it a moment ago, also while this one waited for its turn.
    const shown = await ctx.cloud.instance(claim.id);
    if (shown && isSettled(shown)) return;
    const data = claim.volumes[DATA_DEVICE];
    if (data?.ends)
      return log.error(`${claim.id} is one too many, but ${data.id} at ${DATA_DEVICE} would go with it: left alone`);
    if (data) log.warn(`${data.id} stays available when ${claim.id} goes; to attach it: ${attachCommand(data.id, "INSTANCE")}`);
    await aws(
      ctx,
      `ending the surplus ${claim.id}`,
      (o) => ctx.deps.autoScaling.send(new TerminateInstanceInAutoScalingGroupCommand(input), o),
      { tries: 1, timeoutMs: 5_000 }, // attaches wait meanwhile, and the next pass looks anew
    );
    ctx.state.claims.delete(claim.id);
    log.info(`ended ${claim.id} in ${name}: it was one too many`);
  };
  try {
    await lane(ctx, name).exclusive(end);
  } catch (error) {
    if (!OVER_LIMIT.test(errorText(error))) throw error;
    // The minimum has been raised meanwhile: its owner wants as many as there are.
    return actOnClaim(ctx, "settle", on);
  }
}

/** Sends a fresh detach message, unless one is on its way. */
async function remind(ctx: Ctx, claim: string, old: string, group: string): Promise<boolean> {
  const { detachSeenMs } = ctx.state;
  if (ctx.deps.now() - (detachSeenMs.get(old) ?? 0) < LEAK_MS) return false;
  detachSeenMs.set(old, ctx.deps.now());
  const oldProtected = (await ctx.cloud.group(group))?.members.get(old)?.isProtected ?? false;
  const notice = { type: DETACH, kind: "rebalance" as const, id: claim, instances: [old] };
  await sendOwn(ctx, "detach_evt_sqs", notice, { group, oldProtected });
  return true;
}

/** Puts a maximum that we raised back, once nothing needs it; true while that is to come. */
async function restoreMaximum(ctx: Ctx, group: Group, open: Ec2Instance[]): Promise<boolean> {
  const { name } = group;
  const ours = readMaxTag(group.tags[TAG.maxSize]);
  if (!ours) {
    ctx.state.restoring.delete(name);
    return false;
  }
  // Never again blindly: the next try may take away what another daemon has recorded meanwhile.
  const dropTag = () =>
    aws(
      ctx,
      `removing ${TAG.maxSize} from ${name}`,
      (o) => ctx.deps.autoScaling.send(new DeleteTagsCommand({ Tags: [groupTag(name, TAG.maxSize)] }), o),
      { tries: 1 },
    );
  const isOurs = (max: number) => isRaised(max, ours);
  const isBusy = (claims: Ec2Instance[]) =>
    claims.some((c) => c.tags[TAG.group] === name && isLiving(c) && !isSettled(c)) ||
    [...ctx.state.inHand.values()].some((w) => w.group === name && w.queue === "interruption_evt_sqs");
  const known = ctx.state.restoring.get(name) ?? {};
  const nowMs = ctx.deps.now();
  const busy = isBusy(open);
  const calmSinceMs = !busy && group.desired <= ours.original ? (known.calmSinceMs ?? nowMs) : undefined;
  const aboveSinceMs = !busy && group.desired > ours.original ? (known.aboveSinceMs ?? nowMs) : undefined;
  ctx.state.restoring.set(name, { calmSinceMs, aboveSinceMs });
  const isDue = (sinceMs: number | undefined, ms: number) => sinceMs !== undefined && nowMs - sinceMs >= ms;
  if (isOurs(group.max) && !isDue(calmSinceMs, 10_000) && !isDue(aboveSinceMs, LEAK_MS)) return true;
  return lane(ctx, name).exclusive(async () => {
    const claims = await ctx.cloud.describe("reading claims once more", [{ Name: `tag:${TAG.group}`, Values: [name] }]);
    const now = await ctx.cloud.group(name);
    if (!now) return false;
    const tag = now.tags[TAG.maxSize];
    if (tag !== group.tags[TAG.maxSize] || now.max !== group.max) return true; // changed under our eyes: look again
    if (!isOurs(now.max)) {
      // The original one: recorded and not raised yet, or just put back, and a slow call may raise it once more.
      if (now.max === ours.original && !isDue(calmSinceMs, 20_000)) return true;
      await dropTag();
      ctx.state.restoring.delete(name);
      return false;
    }
    if (isBusy(claims) || (now.desired > ours.original && !isDue(aboveSinceMs, LEAK_MS))) return true;
    // Directly after the second read and never again blindly: AWS has no conditional update.
    await aws(
      ctx,
      `putting the maximum of ${name} back`,
      (o) =>
        ctx.deps.autoScaling.send(
          new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: name, MaxSize: Math.max(ours.original, now.min) }),
          o,
        ),
      { tries: 1, timeoutMs: 5_000 }, // what waits longer for its pace is not sent
    );
    ctx.deps.log.info(`put the maximum of ${name} back to ${ours.original}`, { group: name });
    ctx.state.restoring.set(name, {});
    return true;
  });
}

// ─── Preaction ───────────────────────────────────────────────────────────────────────────────────────────
// Spot types differ in how often AWS takes them back; the public Spot Advisor says how often, by region. Now and
// then a member in a worse band than need be is asked to be replaced, and an on-demand fallback to go back to spot:
// a message like any other notice, which takes the table's road. Nothing is replaced on a guess, for a better place
// only, and what was sought in vain is remembered in tags, so that a steady market sees no churn.

const SPOT_ADVISOR_URL = "https://spot-bid-advisor.s3.amazonaws.com/spot-advisor-data.json";
const GROWN_MS = 3_600_000;
/** For so long a message may be on its way; then its instance may be asked for again. */
const ASKED_MS = 5 * 60_000;
const COOLDOWN_MS = 6 * 3_600_000;
const LONGEST_PAUSE_MS = 3_600_000;
/** AWS takes 300 overrides, type by zone. */
const MAX_BETTER = 100;
const TAG_LENGTH = 256;

export type Platform = "Linux" | "Windows";
/** Bands are places in a row, 0 the best; `labels` says for each how often instances are taken back in a month. */
export type Bands = { labels: string[]; bands: Record<Platform, Map<string, number>> };
type Advisor = Bands & { url: string; etag: string | undefined };

const advisorFile = v.object({
  ranges: v.pipe(v.array(v.object({ index: v.number(), label: v.string(), max: v.number() })), v.minLength(1)),
  spot_advisor: v.record(v.string(), v.unknown()),
});
const advisorTypes = v.optional(v.record(v.string(), v.object({ r: v.number() })), {});
const advisorRegion = v.optional(v.object({ Linux: advisorTypes, Windows: advisorTypes }), {});

/** The Spot Advisor's file, 5 MB of it, to what it says about one region; no bands where it says nothing. Throws. */
export function parseAdvisor(json: string, region: string): Bands {
  const file = v.safeParse(advisorFile, JSON.parse(json));
  if (!file.success) throw new Error(`not the Spot Advisor's form: ${faultsOf(file.issues)}`);
  const part = v.safeParse(advisorRegion, file.output.spot_advisor[region]);
  if (!part.success) throw new Error(`not the Spot Advisor's form, in ${region}: ${faultsOf(part.issues.slice(0, 3))}`);
  const ranges = file.output.ranges.toSorted((a, b) => a.max - b.max);
  const place = new Map(ranges.map(({ index }, n) => [index, n]));
  const bandsOf = (types: Record<string, { r: number }>) =>
    new Map(
      Object.entries(types).flatMap(([type, { r }]): [string, number][] => {
        const band = place.get(r);
        return band === undefined ? [] : [[type, band]];
      }),
    );
  return {
    labels: ranges.map(({ label }) => label),
    bands: { Linux: bandsOf(part.output.Linux), Windows: bandsOf(part.output.Windows) },
  };
}

/** What a look at a group shows; times in ms. */
export type Snapshot = {
  nowMs: number;
  limit: number;
  /** Members that are being replaced or asked to be, and those on their way out. */
  inHand: string[];
  /** As many in service as desired, and nobody on the way in or out. */
  isSteady: boolean;
  /** So old an on-demand fallback goes back to spot; 0: never. */
  leastLiveMs: number;
  members: {
    id: string;
    type: string;
    lifecycle: "spot" | "fallback" | "on-demand";
    isInService: boolean;
    launchedMs: number;
    /** Nothing was to be had for it lately: not before this time. */
    notBeforeMs: number;
    /** The types that the group allows in its place. */
    offers: string[];
    /** By type; absent: preaction is off, or nobody knows. */
    bands?: ReadonlyMap<string, number>;
  }[];
};
/** Absent `better`: a fallback, for which any spot will do. */
export type Victim = { id: string; band: number; better?: string[][] };

/** Whom to replace now, the worst first. Pure. */
export function victims(x: Snapshot): Victim[] {
  const room = x.limit - x.inHand.length;
  if (!x.isSteady || room <= 0) return [];
  const found = x.members.flatMap((m): (Victim & { launchedMs: number })[] => {
    const { id, launchedMs, bands } = m;
    if (!m.isInService || x.inHand.includes(id) || x.nowMs < m.notBeforeMs) return [];
    const ageMs = x.nowMs - launchedMs;
    if (m.lifecycle === "fallback") {
      const isDue = x.leastLiveMs > 0 && ageMs >= Math.max(x.leastLiveMs, YOUNG_MS);
      return isDue ? [{ id, launchedMs, band: Number.POSITIVE_INFINITY }] : [];
    }
    const band = bands?.get(m.type);
    if (m.lifecycle !== "spot" || !bands || band === undefined || ageMs < GROWN_MS) return [];
    const bandOf = (type: string) => bands.get(type) ?? band; // what is not known is no better
    const ranked = m.offers.filter((type) => bandOf(type) < band).sort((a, b) => bandOf(a) - bandOf(b));
    const better = [...Map.groupBy(ranked.slice(0, MAX_BETTER), bandOf).values()];
    return better.length ? [{ id, launchedMs, band, better }] : [];
  });
  found.sort((a, b) => (a.band === b.band ? a.launchedMs - b.launchedMs || (a.id < b.id ? -1 : 1) : b.band > a.band ? 1 : -1));
  return found.slice(0, room).map(({ id, band, better }) => (better ? { id, band, better } : { id, band }));
}

/** `spotmax:cooldown` = TYPE/ZONE=TIME ..., to the minute: where there was nothing better, and until when. */
export function readCooldown(tag: string | undefined): Map<string, number> {
  return new Map(
    [...(tag ?? "").matchAll(/(\S+)=(\d{4}-\d\d-\d\dT\d\d:\d\dZ)/g)].map(([, place = "", time = ""]) => [
      place,
      Date.parse(time),
    ]),
  );
}
/** The tag with one place more; what is over goes, and where there is no room, what ends first. */
export function addCooldown(tag: string | undefined, place: string, untilMs: number, nowMs: number): string {
  const known = [...readCooldown(tag).set(place, untilMs)].filter(([, ms]) => ms > nowMs).sort(([, a], [, b]) => b - a);
  let text = "";
  for (const [name, ms] of known) {
    const next = `${text} ${name}=${new Date(ms).toISOString().slice(0, 16)}Z`.trim();
    if (next.length <= TAG_LENGTH) text = next;
  }
  return text;
}

/** `spotmax:tried` = TIMES TIME: when to seek spot for a fallback again, after 5 minutes, 10, 20, up to an hour. */
export function nextTryMs(tag: string | undefined): number {
  const [times, time = ""] = tag?.split(" ") ?? [];
  const lastMs = Date.parse(time);
  return Number.isNaN(lastMs) ? 0 : lastMs + Math.min(LONGEST_PAUSE_MS, ASKED_MS * 2 ** (Number(times) - 1));
}

/** A type in a zone, which stands without its region's name: a tag has little room. */
const placeOf = (ctx: Ctx, type: string, zone: string) =>
  `${type}/${zone.startsWith(ctx.deps.region) ? zone.slice(ctx.deps.region.length) : zone}`;

function sayOnce(ctx: Ctx, level: Level, matter: string, message: string): void {
  if (!ctx.state.said.has(matter)) ctx.deps.log[level](message);
  ctx.state.said.add(matter);
}

/** Looks every minute for fallbacks that are old enough, and in its own interval at all members. */
async function preactionLoop(ctx: Ctx): Promise<void> {
  let snapshotMs = Number.NEGATIVE_INFINITY;
  while (!ctx.signal.aborted) {
    try {
      await pause(ctx, LOOK_MS);
      const intervalMs = snapshotIntervalMinutes(ctx.state.config) * 60_000;
      // A timer may come a moment early: then it is not to be another minute.
      const isSnapshot = intervalMs > 0 && ctx.deps.now() - snapshotMs > intervalMs - LOOK_MS / 2;
      if (isSnapshot) snapshotMs = ctx.deps.now();
      await look(ctx, isSnapshot);
    } catch (error) {
      if (error instanceof Stopped) return;
      ctx.deps.log.error(`preaction: ${errorText(error)}; trying again`, { error: errorName(error) });
    }
  }
}

async function look(ctx: Ctx, isSnapshot: boolean): Promise<void> {
  const { state, deps } = ctx;
  for (const [id, { atMs }] of state.asked) if (deps.now() - atMs >= ASKED_MS) state.asked.delete(id);
  const groups = [...state.groups].filter(([, { broken }]) => !broken);
  const isWanted = isSnapshot && groups.some(([, { options }]) => options.is_enable_preaction);
  const advisor = isWanted ? await readAdvisor(ctx) : undefined;
  await Promise.all(
    groups.map(async ([name, { options }]) => {
      const run = () => lookAt(ctx, name, options, options.is_enable_preaction ? advisor : undefined);
      const log = deps.log.with({ group: name });
      await orElse(run, undefined, (text, fields) => log.error(`preaction: ${text}; trying again`, fields));
    }),
  );
}

/** The public data, or its last good copy; undefined: nobody knows. Asked for again only where it has changed. */
async function readAdvisor(ctx: Ctx): Promise<Advisor | undefined> {
  const { state, deps } = ctx;
  const url = state.config.system.spot_advisor_url ?? SPOT_ADVISOR_URL;
  const etag = state.advisor?.url === url ? state.advisor.etag : undefined;
  try {
    const fresh = await aws(
      ctx,
      `reading ${url}`,
      async ({ abortSignal }) => {
        const answer = await deps.fetch(url, { signal: abortSignal, headers: etag ? { "if-none-match": etag } : {} });
        if (answer.status === 304 && etag) return undefined;
        const name = answer.status >= 500 ? "ServiceUnavailable" : "HttpError";
        if (answer.status !== 200) throw Object.assign(new Error(`HTTP ${answer.status}`), { name });
        return { json: await answer.text(), etag: answer.headers.get("etag") ?? undefined };
      },
      { tries: 3, timeoutMs: 60_000 },
    );
    if (fresh) state.advisor = { url, etag: fresh.etag, ...parseAdvisor(fresh.json, deps.region) };
    state.said.delete("advisor");
  } catch (error) {
    if (error instanceof Stopped) throw error;
    const then = state.advisor ? "the last good copy stays" : "nothing is replaced before its time";
    sayOnce(ctx, "warn", "advisor", `the Spot Advisor's data cannot be had, ${then}: ${errorText(error)}`);
  }
  const { bands } = state.advisor ?? {};
  if (bands?.Linux.size || bands?.Windows.size) return state.advisor;
  if (bands)
    sayOnce(ctx, "warn", "region", `the Spot Advisor has no data on ${deps.region}: is_enable_preaction does nothing here`);
  return undefined;
}

/** Asks for the replacement of those who should go; without the advisor's data only fallbacks are looked at. */
async function lookAt(ctx: Ctx, name: string, options: GroupOptions, advisor: Advisor | undefined): Promise<void> {
  const isOurs = (id: string) => TAG.fallback in (ctx.state.claims.get(id)?.tags ?? {});
  const hasFallback = ctx.state.claims.values().some((c) => c.tags[TAG.group] === name && isOurs(c.id));
  if (!advisor && !(hasFallback && options.od_least_live_mins)) return;
  const group = await ctx.cloud.group(name);
  if (!group) return;
  const looked = [...group.members.values()].filter((m) => advisor || isOurs(m.id));
  const instances = (await Promise.all(looked.map((m) => ctx.cloud.instance(m.id)))).flatMap((i) => i ?? []);
  const snapshot = await snapshotOf(ctx, group, options, instances, advisor);
  const log = ctx.deps.log.with({ group: name });
  if (!victims({ ...snapshot, inHand: [] }).length)
    return log.debug(`preaction: ${snapshot.isSteady ? "nobody has a better place" : "not while the group is changing"}`);
  const asked = [...ctx.state.asked].flatMap(([id, a]) => (a.group === name && group.members.has(id) ? [id] : []));
  const inHand = [...new Set([...(await inHandOf(ctx, name)), ...asked])];
  const chosen = victims({ ...snapshot, inHand });
  if (!chosen.length) log.debug("preaction: not now", { inHand: inHand.join(" ") });
  for (const victim of chosen) {
    const { type = "", platform = "Linux" } = instances.find((i) => i.id === victim.id) ?? {};
    const label = (of: string) => advisor?.labels[advisor.bands[platform].get(of) ?? 0];
    const [best = ""] = victim.better?.[0] ?? [];
    const why = victim.better
      ? `of ${type} AWS takes back ${label(type)} a month, of ${best} ${label(best)}`
      : "an on-demand fallback goes back to spot";
    log.info(`preaction: ${victim.id} is to be replaced: ${why}`, { instance: victim.id });
    await ask(ctx, group, options, victim);
  }
}

async function ask(ctx: Ctx, group: Group, options: GroupOptions, { id: instance, better }: Victim): Promise<void> {
  ctx.state.asked.set(instance, { group: group.name, atMs: ctx.deps.now() });
  // One ID for some minutes: where two daemons ask for the same, both launch under one token.
  const id = `preaction-${instance}-${Math.floor(cloudNow(ctx) / ASKED_MS)}`;
  const oldProtected = group.members.get(instance)?.isProtected ?? false;
  const notice = { type: PREACTION, kind: "preaction" as const, id, instances: [instance] };
  await sendOwn(ctx, "interruption_evt_sqs", notice, { group: group.name, options, oldProtected, better });
}

async function snapshotOf(
  ctx: Ctx,
  group: Group,
  options: GroupOptions,
  instances: Ec2Instance[],
  advisor: Advisor | undefined,
): Promise<Omit<Snapshot, "inHand">> {
  const members = [...group.members.values()];
  const inService = members.filter((m) => m.lifecycleState === "InService");
  const surplus = inService.reduce((sum, m) => sum + m.weight, 0) - group.desired;
  // With weights a group may stand above desired for good, by less than its largest.
  const isEven = surplus >= 0 && surplus < Math.max(1, ...members.map((m) => m.weight));
  const isMoving = members.some((m) => judgeState(m.lifecycleState) === "later" || judgeState(m.lifecycleState) === "leaving");
  const cooldown = readCooldown(group.tags[TAG.cooldown]);
  const weights = [...new Set(members.map((m) => m.weight))];
  const offers = new Map(
    await Promise.all(
      weights.map(async (w) => [w, advisor ? await typesFor(ctx, group, w, options.alt, instances) : []] as const),
    ),
  );
  for (const { platform } of advisor ? instances : [])
    if (!advisor?.bands[platform].size)
      sayOnce(ctx, "warn", platform, `the Spot Advisor has no data on ${platform} in ${ctx.deps.region}: its members stay`);
  return {
    nowMs: cloudNow(ctx),
    limit: options.max_num_of_terminated_one_time,
    isSteady: !group.status && !group.suspended.has("Launch") && isEven && !isMoving,
    leastLiveMs: options.od_least_live_mins * 60_000,
    members: instances.map((i) => {
      const { id, type, launchedMs, tags } = i;
      const isFallback = !i.spot && TAG.fallback in tags;
      const isOpen = TAG.replaces in tags && !isSettled(i);
      return {
        id,
        type,
        launchedMs,
        lifecycle: i.spot ? "spot" : isFallback ? "fallback" : "on-demand",
        isInService: group.members.get(id)?.lifecycleState === "InService" && i.state === "running" && !isOpen,
        notBeforeMs: isFallback ? nextTryMs(tags[TAG.tried]) : (cooldown.get(placeOf(ctx, type, i.zone)) ?? 0),
        offers: offers.get(group.members.get(id)?.weight ?? 1) ?? [],
        bands: advisor?.bands[i.platform],
      };
    }),
  };
}

/** The types that a group allows for this weight; attributes are resolved by EC2, for machines like those it has. */
async function typesFor(ctx: Ctx, group: Group, weight: number, alt: string[], like: Ec2Instance[]): Promise<string[]> {
  const { type: templateType, requirements: templateRequirements } = await templateOf(ctx, group.template ?? {});
  const offers = offersFor({ group, old: { type: "", weight }, alt, templateType, templateRequirements });
  const distinct = (values: string[]) => [...new Set(values.filter(Boolean))].sort();
  const kinds = {
    ArchitectureTypes: distinct(like.map((i) => i.architecture)),
    VirtualizationTypes: distinct(like.map((i) => i.virtualization)),
  } as Pick<GetInstanceTypesFromInstanceRequirementsCommandInput, "ArchitectureTypes" | "VirtualizationTypes">;
  const types = await Promise.all(
    offers.map(async ({ type, requirements }) => {
      if (type || !requirements) return [type ?? ""];
      const input = { ...kinds, InstanceRequirements: requirements };
      return await cached(ctx, `types ${JSON.stringify(input)}`, () => readTypes(ctx, input));
    }),
  );
  return [...new Set(types.flat().filter(Boolean))];
}

async function readTypes(ctx: Ctx, input: GetInstanceTypesFromInstanceRequirementsCommandInput): Promise<string[]> {
  const pages = await allPages((NextToken) =>
    aws(ctx, "reading which types meet the group's requirements", (o) =>
      ctx.deps.ec2.send(new GetInstanceTypesFromInstanceRequirementsCommand({ ...input, MaxResults: 1000, NextToken }), o),
    ),
  );
  return pages.flatMap((p) => p.InstanceTypes ?? []).flatMap(({ InstanceType }) => InstanceType ?? []);
}

/** What was sought in vain is not sought again at once: for a fallback, or for all of a type and zone. */
async function rememberFailure(ctx: Ctx, work: Work, why: string): Promise<void> {
  const { old, group } = work;
  if (!old) return;
  const nowMs = cloudNow(ctx);
  if (TAG.fallback in old.tags) {
    const times = Number(old.tags[TAG.tried]?.split(" ")[0] ?? 0) || 0;
    const tags = { [TAG.tried]: `${times + 1} ${new Date(nowMs).toISOString()}` };
    await ctx.cloud.tag([old.id], tags);
    return;
  }
  await lane(ctx, group).exclusive(async () => {
    const known = (await ctx.cloud.group(group))?.tags[TAG.cooldown];
    const tag = addCooldown(known, placeOf(ctx, old.type, old.zone), nowMs + COOLDOWN_MS, nowMs);
    await aws(ctx, `recording a cooldown of ${group}`, (o) =>
      ctx.deps.autoScaling.send(new CreateOrUpdateTagsCommand({ Tags: [groupTag(group, TAG.cooldown, tag)] }), o),
    );
  });
  work.log.info(`${why}: ${old.type} in ${old.zone} is left alone for ${COOLDOWN_MS / 3_600_000} hours`);
}

/** A replacement of none of the better types, as an interruption may bring it: no reason to try again at once. */
async function rememberOutcome(ctx: Ctx, work: Work): Promise<Result> {
  const claim = work.better && work.claim ? await ctx.cloud.instance(work.claim) : undefined;
  if (claim && !work.better?.some((types) => types.includes(claim.type)))
    await rememberFailure(ctx, work, `its replacement came out as ${claim.type}, which is no better`);
  return done;
}

// ─── Start-up checks and refresh ─────────────────────────────────────────────────────────────────────────
// What cannot work is said at start, not at the first notice. A broken group is left out and looked at again
// with every refresh; the others run.

/** Reads all groups; fills state.groups, says what is wrong with each. */
export async function checkGroups(ctx: Ctx): Promise<void> {
  const { state, deps } = ctx;
  const before = state.groups;
  const entries = Object.entries(state.config.groups);
  const groups = await Promise.all(entries.map(([name]) => ctx.cloud.group(name)));
  state.groups = new Map(
    await Promise.all(
      entries.map(async ([name, fromFile], n): Promise<[string, LookedAfter]> => {
        const group = groups[n];
        const { options, faults } = withTags(fromFile, group?.tags ?? {});
        const known = before.get(name);
        // Templates are read once, and again before each launch, which looks for the same faults.
        const isFine = known !== undefined && !known.broken;
        const broken = groupFault(name, group) ?? (isFine ? undefined : await templateFault(ctx, group));
        const log = deps.log.with({ group: name });
        if (broken) {
          log[known?.broken === broken ? "debug" : "error"](`group ${name} is left out: ${broken}`);
          return [name, { options, broken }];
        }
        if (known?.faults !== faults.join()) for (const fault of faults) log.warn(`${fault}; ignored`);
        const found = { options, faults: faults.join() };
        if (known && !known.broken && JSON.stringify(known.options) === JSON.stringify(options)) return [name, found];
        log.debug(`group ${name} is suitable for max group`);
        if (group)
          await warnings(ctx, group, options, log).catch((error: unknown) => log.debug(`checking ${name}: ${errorText(error)}`)); // only hints
        log.info(`Loaded maxgroup ${name}`);
        return [name, found];
      }),
    ),
  );
}

/** Why max_group cannot look after a group at all. */
function groupFault(name: string, group: Group | undefined): string | undefined {
  if (!group) return `there is no Auto Scaling group "${name}" in this region and account; group names are case-sensitive`;
  if (group.status) return `it is being deleted (${group.status})`;
  if (!group.template)
    return "it uses a launch configuration; move it to a launch template (Auto Scaling console: Edit, Launch configuration, Switch to launch template)";
  return undefined;
}

/** Whether its templates may be launched from; where they cannot be read, the launch will say so. */
async function templateFault(ctx: Ctx, group: Group | undefined): Promise<string | undefined> {
  const templates = [group?.template, ...(group?.overrides ?? []).map((o) => o.template)].filter((t) => t !== undefined);
  try {
    return (await Promise.all(templates.map((t) => templateOf(ctx, t)))).find((t) => t.fault)?.fault;
  } catch (error) {
    if (error instanceof Stopped) throw error;
    ctx.deps.log.debug(errorText(error), { group: group?.name });
    return undefined;
  }
}

async function warnings(ctx: Ctx, group: Group, options: GroupOptions, log: Log): Promise<void> {
  const { name } = group;
  if (options.is_enable_preaction && !snapshotIntervalMinutes(ctx.state.config))
    log.warn("is_enable_preaction is set, and preaction_snapshot_interval_minutes is 0: no snapshot is ever taken");
  if (group.capacityRebalance)
    log.warn(`Capacity Rebalancing of ${name} is on: both would replace the same instance; switch it off`);
  // AWS's own do not count towards its limit, and two are ours now and then.
  const tags = Object.keys(group.tags).filter((key) => !/^aws:|^spotmax:(max_size|cooldown)$/.test(key)).length;
  if (tags > 48)
    log.warn(`${name} has ${tags} tags, and AWS allows 50: leave room for two, else nothing is attached while it is full`);
  if (group.warmsToMax)
    log.warn(
      `the warm pool of ${name} follows its maximum: it grows while that is raised for a replacement; set its MaxGroupPreparedCapacity`,
    );
  if (group.suspended.has("Launch"))
    log.warn(`the Launch process of ${name} is suspended: nothing can be attached until it is resumed`);
  if (group.healthCheck.type.includes("ELB") && !group.healthCheck.graceSeconds)
    log.warn(`${name} uses load-balancer health checks without a grace period: new members may be ended before they answer`);
  const [id] = group.members.keys();
  if (id) for (const arn of group.targetGroups) void ctx.cloud.isHealthy({ arn, id }).catch(() => undefined); // says by itself
  if (options.k8s_node_drain_option) void checkCluster(ctx, name, options, log);
  if (options.persistence_dev) await volumeWarnings(ctx, group, options.persistence_dev, log);
  const { LifecycleHooks = [] } = await aws(ctx, `reading the lifecycle hooks of ${name}`, (o) =>
    ctx.deps.autoScaling.send(new DescribeLifecycleHooksCommand({ AutoScalingGroupName: name }), o),
  );
  if (LifecycleHooks.length)
    log.warn(
      `${name} has lifecycle hooks (${LifecycleHooks.map((h) => h.LifecycleHookName).join(", ")}): AWS runs them for neither attach nor detach`,
    );
}

/** GiB, smallest and largest, by type. */
const VOLUME_SIZES: Record<string, [number, number]> = {
  gp2: [1, 16_384],
  gp3: [1, 65_536],
  io1: [4, 16_384],
  io2: [4, 65_536],
  st1: [125, 16_384],
  sc1: [125, 16_384],
  standard: [1, 1024],
};

async function volumeWarnings(ctx: Ctx, group: Group, device: string, log: Log): Promise<void> {
  log.info("Has persistence volume.");
  const members = await Promise.all([...group.members.keys()].map((id) => ctx.cloud.instance(id)));
  const without = members.flatMap((i) => (i && isLiving(i) && !i.volumes[device] && !i.volumes[DATA_DEVICE] ? [i.id] : []));
  if (without.length)
    log.warn(
      `no volume at ${device} on ${without.slice(0, 5).join(" ")}${without.length > 5 ? " ..." : ""}: nothing to move when they go; persistence_dev must be the name in the template or image`,
    );
  const { volumes } = await templateOf(ctx, group.template ?? {});
  const { VolumeType = "gp3", VolumeSize } = volumes[device] ?? {};
  const [least, most] = VOLUME_SIZES[VolumeType] ?? [1, 65_536];
  if (VolumeSize !== undefined && (VolumeSize < least || VolumeSize > most))
    log.warn(`the template's ${device} is ${VolumeSize} GiB of ${VolumeType}, which takes ${least} to ${most}`);
}

/** Every queue is there and has a dead-letter queue; throws with one clear line where one cannot be read. */
async function checkQueues(ctx: Ctx): Promise<void> {
  await Promise.all(
    QUEUES.map(async (name) => {
      const { queue_url } = ctx.state.config.global[name];
      try {
        const { Attributes = {} } = await aws(
          ctx,
          `reading ${name}`,
          (o) =>
            ctx.deps
              .sqs(queue_url)
              .send(new GetQueueAttributesCommand({ QueueUrl: queue_url, AttributeNames: ["RedrivePolicy"] }), o),
          { tries: 3 },
        );
        if (!Attributes.RedrivePolicy)
          ctx.deps.log.warn(
            `${name} has no dead-letter queue: a message that cannot be understood comes back until it expires; set a redrive policy with maxReceiveCount 10`,
          );
      } catch (cause) {
        throw new ConfigError(
          `global.${name}.queue_url ${queue_url}: ${explain(cause, { QueueDoesNotExist: "there is no such queue; check account and region in the URL" })}`,
          { cause },
        );
      }
    }),
  );
}

/** Asks AWS by dry runs whether the role may launch; only ever warns. They use up the same budget as launches do, which go first. */
export async function checkPermissions(ctx: Ctx): Promise<void> {
  for (const [name, { broken }] of ctx.state.groups) {
    if (broken) continue;
    do await pause(ctx, 1_000);
    while (ctx.state.inHand.size);
    await orElse(
      () => checkPermission(ctx, name),
      undefined,
      (text) => ctx.deps.log.warn(`whether ${name} can be launched from is not known: ${text}`),
    );
  }
}

async function checkPermission(ctx: Ctx, name: string): Promise<void> {
  const ask = async (what: string, send: (o: { abortSignal: AbortSignal }) => Promise<unknown>) => {
    try {
      await aws(ctx, what, send, { tries: 2 });
    } catch (error) {
      if (/^(UnauthorizedOperation|AccessDenied|AccessDeniedException)$/.test(errorName(error)))
        ctx.deps.log.error(`the role may not do this: ${what}; add the action to it (see conf/spotmax_init.yml)`, {
          error: errorName(error),
        });
      else if (/^Invalid/.test(errorName(error))) ctx.deps.log.warn(`the launch template cannot launch: ${errorText(error)}`);
      else if (errorName(error) !== "DryRunOperation") ctx.deps.log.debug(`dry run: ${errorText(error)}`);
    }
  };
  const group = await ctx.cloud.group(name);
  if (!group?.template) return;
  const [offer] = group.overrides;
  const { template = group.template, requirements } = offer ?? {};
  const data = await templateOf(ctx, group.template);
  if (data.asksForSpot) return;
  const [[zone, subnet] = ["", undefined]] = await subnetsByZone(ctx, group, data.namesSubnet);
  const pool: Pool = { type: offer?.type, requirements, zone, subnet, template, priority: 0 };
  const offered = new Set([data.type, ...group.overrides.map((o) => o.type)]);
  const isWeighted = group.desiredType !== "units" || group.overrides.some((o) => o.weight !== 1);
  const more = requirements || isWeighted ? [] : (ctx.state.groups.get(name)?.options.alt ?? []);
  const alts = more.filter((type) => !offered.has(type)).map((type) => ({ ...pool, type }));
  const tags = [{ Key: TAG.group, Value: name }];
  const one = { ...(await poolRequest(ctx, pool, tags, 1)), DryRun: true };
  const fleet = { ...fleetRequest(group, [pool, ...alts], "spot", tags, 1), DryRun: true };
  await ask(`ec2:RunInstances for ${name}, with iam:PassRole`, (o) => ctx.deps.ec2.send(new RunInstancesCommand(one), o));
  await ask(`ec2:CreateFleet for ${name}`, (o) => ctx.deps.ec2.send(new CreateFleetCommand(fleet), o));
}

/** AWS's names for a fault, the first of them for all, and what to do. */
const EXPLAINED: [names: string, text: string][] = [
  [
    "AccessDenied AccessDeniedException AllAccessDisabled Forbidden 403 UnauthorizedOperation",
    "access is denied; give the role the rights of conf/spotmax_init.yml",
  ],
  ["ExpiredToken ExpiredTokenException TokenRefreshRequired", "the credentials have expired; renew them and start again"],
  [
    "InvalidAccessKeyId InvalidClientTokenId UnrecognizedClientException InvalidToken",
    "the access key is not known to AWS; check -k, or the environment's AWS_ACCESS_KEY_ID",
  ],
  [
    "SignatureDoesNotMatch InvalidSignatureException AuthFailure",
    "the secret does not fit the access key; check -p, or the environment's AWS_SECRET_ACCESS_KEY",
  ],
  // EC2's word for both.
  ["RequestExpired", "the credentials have expired, renew them and start again; or this machine's clock is off"],
  ["RequestTimeTooSkewed RequestInTheFuture", "this machine's clock is off; set it, and keep it set (chrony)"],
  [
    "CredentialsProviderError",
    "no credentials were found; attach the role spotmax_max_group_role to this instance, or pass -k and -p",
  ],
  ["QueueDoesNotExist AWS.SimpleQueueService.NonExistentQueue", ""],
];

/** An AWS error in one line that says what to do; `special` knows better. */
export function explain(error: unknown, special: Record<string, string> = {}): string {
  const name = errorName(error);
  const code = status(error);
  const rowOf = (word: string) => EXPLAINED.find(([names]) => names.split(" ").includes(word));
  const [names = "", known] = rowOf(name) ?? rowOf(String(code)) ?? [];
  const text = special[name] ?? special[names.split(" ")[0] ?? ""] ?? known;
  if (text) return text;
  if (
    /ECONN|ENOTFOUND|EAI_AGAIN|ConnectionRefused|FailedToOpenSocket|ConnectionClosed|TimeoutError|ETIMEDOUT|Unable to connect/.test(
      `${name} ${errorText(error)}`,
    )
  )
    return `the endpoint cannot be reached (${name}); check the network, -r and AWS_ENDPOINT_URL`;
  return `${name}: ${errorText(error)}`;
}

/** One file of the configuration, from the bucket or, in local test mode, from conf/. Throws ConfigError. */
async function readFile(ctx: Pick<Ctx, "deps" | "signal">, flags: Flags, name: string): Promise<string> {
  if (flags.t) {
    if (!existsSync(`conf/${name}`))
      throw new ConfigError(`conf/${name} is not in the working folder; -t reads the configuration from there`);
    return readFileSync(`conf/${name}`, "utf8");
  }
  const where = `s3://${flags.b}/${name}`;
  try {
    const read = async (o: { abortSignal: AbortSignal }) => {
      const { Body } = await ctx.deps.s3.send(new GetObjectCommand({ Bucket: flags.b, Key: name }), o);
      return (await Body?.transformToString()) ?? "";
    };
    return await aws(ctx as Ctx, `reading ${where}`, read, { tries: 3 });
  } catch (cause) {
    const elsewhere = `the bucket is in another region than ${flags.r}; pass its region with -r, or use a bucket of this region`;
    throw new ConfigError(
      `${where}: ${explain(cause, {
        NoSuchBucket: "there is no such bucket; check -b",
        NoSuchKey: `there is no such object; upload it: aws s3 cp ${name} s3://${flags.b}/`,
        AccessDenied:
          "access is denied; the role needs s3:GetObject on it, and s3:ListBucket, without which a missing object looks like this too",
        PermanentRedirect: elsewhere,
        AuthorizationHeaderMalformed: elsewhere,
        IllegalLocationConstraintException: elsewhere,
        InvalidBucketName: "that is no bucket name; check -b",
      })}`,
      { cause },
    );
  }
}

async function readConfig(source: Pick<Ctx, "deps" | "signal">, flags: Flags): Promise<Config> {
  const config = parseConfig(await readFile(source, flags, "service_config.json"));
  if (flags.t) refuseRealAws(config);
  return config;
}

/** Reads configuration and groups again; what fails leaves the last good ones in force. */
export async function refresh(ctx: Ctx, flags: Flags): Promise<void> {
  try {
    const config = await readConfig(ctx, flags);
    if (JSON.stringify(config) !== JSON.stringify(ctx.state.config))
      ctx.deps.log.info("the configuration has changed: using the new one");
    ctx.state.config = config;
    await checkGroups(ctx);
  } catch (error) {
    if (error instanceof Stopped) return;
    ctx.deps.log.error(`the configuration could not be refreshed, the last good one stays: ${errorText(error)}`);
  }
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────

const isLoopback = (url: string | undefined) =>
  URL.canParse(url ?? "") && /^(localhost|127(\.\d+){3}|\[::1\])$/.test(new URL(url ?? "").hostname);
/** Local test mode never touches real AWS: not by an endpoint, and not by a queue's URL either. */
function refuseRealAws(config: Config): void {
  for (const name of QUEUES) {
    const { queue_url } = config.global[name];
    if (!isLoopback(queue_url))
      throw new ConfigError(`-t works with loopback addresses only, and global.${name}.queue_url is ${queue_url}`);
  }
}

/** Runs the program on these effects until the signal aborts; resolves when all is finished or given back. */
export async function run(ctx: Ctx): Promise<void> {
  const { log } = ctx.deps;
  log.info("start instance manager...");
  const look = managerPass(ctx).catch((error: unknown) => log.error(`instance manager: ${errorText(error)}`));
  ctx.state.firstPass = Promise.race([look, ctx.deps.sleep(5_000)]);
  const manager = look.then(() => managerLoop(ctx));
  log.info("start interruption handler...");
  log.info("start dettach handler...");
  log.info("start termination handler...");
  const loops = [...QUEUES.map((name) => receiveLoop(ctx, name)), leaseLoop(ctx), manager, preactionLoop(ctx)];
  await Promise.all(loops);
  // Handlers end at their next wait and give their messages back; a launch call that is out is waited for.
  for (let waited = 0; ctx.state.inHand.size && waited < 80; waited++) await ctx.deps.sleep(100);
}

export function realDeps(flags: Flags, log: Log): Deps {
  const endpoint = process.env.AWS_ENDPOINT_URL;
  const credentials = flags.k && flags.p ? { accessKeyId: flags.k, secretAccessKey: flags.p } : undefined;
  const shared = {
    region: flags.r,
    maxAttempts: 1,
    ...(credentials && { credentials }),
    ...(flags.t && endpoint ? { endpoint } : {}),
  };
  const clients = new Map<string, SQSClient>();
  // The URL says which host is meant; beside one the SDK refuses what the environment says of these.
  const ownHost = { useFipsEndpoint: false, useDualstackEndpoint: false };
  const ec2 = new EC2Client(shared);
  return {
    ec2,
    autoScaling: new AutoScalingClient(shared),
    elb: new ElasticLoadBalancingV2Client(shared),
    s3: new S3Client({ ...shared, forcePathStyle: endpoint !== undefined }),
    sqs: (queueUrl) => {
      const { origin } = new URL(queueUrl);
      const client = clients.get(origin) ?? new SQSClient({ ...shared, ...ownHost, endpoint: origin });
      clients.set(origin, client);
      return client;
    },
    fetch: async (url, init) => {
      if (flags.t && !isLoopback(url)) throw new Error(`-t works with loopback addresses only, and this is ${url}`);
      return await fetch(url, init);
    },
    credentials: () => ec2.config.credentials(),
    region: flags.r ?? "",
    now: Date.now,
    sleep: (ms, signal) => setTimer(ms, undefined, { signal }),
    random: Math.random,
    log,
  };
}

/** Where the log goes: standard error, or a file that SIGHUP opens anew for logrotate. */
function logTarget(path: string | undefined): {
  write: (line: string) => void;
  reopen: () => void;
  tty: boolean;
} {
  let fd = path ? openSync(path, "a") : 2;
  return {
    tty: !path && (process.stderr.isTTY ?? false),
    write: (line) => {
      try {
        writeSync(fd, line);
      } catch {
        // A full disk or a closed pipe must not stop the replacement of machines.
      }
    },
    reopen: () => {
      if (!path) return;
      const old = fd;
      fd = openSync(path, "a");
      closeSync(old);
    },
  };
}

/** Signals and stray faults, before anything else: a hangup before the program is up must not end it either. */
function listen(log: Log, target: ReturnType<typeof logTarget>) {
  const stop = new AbortController();
  const up: { isUp: boolean; refresh: () => Promise<void> } = { isUp: false, refresh: async () => undefined };
  process.on("SIGHUP", () => {
    try {
      target.reopen();
    } catch (error) {
      log.error(`the log file cannot be opened anew, the old one stays: ${errorText(error)}`);
    }
    void up.refresh();
  });
  for (const signal of ["SIGTERM", "SIGINT"] as const)
    process.on(signal, () => {
      log.info(`${signal}: stopping`);
      stop.abort(new Stopped(signal));
      if (!up.isUp) process.exit(0); // nothing is in hand yet
      // Whatever still hangs by then comes again when its lease ends.
      setTimeout(() => process.exit(0), 9_500).unref();
    });
  // A fault in one corner must not take down what guards the fleet.
  for (const event of ["uncaughtException", "unhandledRejection"] as const)
    process.on(event, (error: unknown) =>
      log.error(`${event}: ${errorText(error)}`, { stack: error instanceof Error ? error.stack : undefined }),
    );
  return { stop, up };
}

/** The configuration and, where the build asks for one, the license; throws ConfigError. */
async function load(source: Pick<Ctx, "deps" | "signal">, flags: Flags): Promise<Config> {
  const endpoint = process.env.AWS_ENDPOINT_URL;
  if (endpoint && !URL.canParse(endpoint))
    throw new ConfigError(`AWS_ENDPOINT_URL is no URL: "${endpoint}"; unset it, or give one such as http://127.0.0.1:4566`);
  if (flags.t && !isLoopback(endpoint))
    throw new ConfigError("-t is for local tests: set AWS_ENDPOINT_URL to a loopback address, such as http://127.0.0.1:4566");
  const config = await readConfig(source, flags);
  const publicKey = process.env.MAXGROUP_LICENSE_PUBLIC_KEY;
  const fault = publicKey ? licenseFault(await readFile(source, flags, "license.txt"), publicKey, Date.now()) : undefined;
  if (fault) throw new ConfigError(fault);
  const asked = { "system.listen": config.system.listen, "system.webhook_url": config.system.webhook_url };
  for (const [name, value] of Object.entries(asked))
    if (value) source.deps.log.warn(`${name} is set, but this version does not act on it`);
  return config;
}

async function refreshLoop(ctx: Ctx, refreshNow: () => Promise<void>): Promise<void> {
  const seconds = () => ctx.state.config.system.config_refresh_seconds;
  while (!ctx.signal.aborted) {
    await pause(ctx, (seconds() || 60) * 1000).catch(() => undefined); // only ever Stopped
    if (!ctx.signal.aborted && seconds()) await refreshNow();
  }
}

async function main(): Promise<number> {
  const flags = parseFlags(process.argv.slice(2));
  if (typeof flags === "string") {
    process.stderr.write(flags ? `${flags}\n${USAGE}` : USAGE);
    return flags ? 2 : 0;
  }
  if (flags.v) {
    process.stdout.write(`${pkg.version}\n`);
    return 0;
  }
  let target: ReturnType<typeof logTarget>;
  try {
    target = logTarget(flags.l);
  } catch (error) {
    process.stderr.write(`the log file ${flags.l} cannot be opened: ${errorText(error)}\n`);
    return 1;
  }
  const seelog = existsSync("conf/seelog.xml") ? seelogLevel(readFileSync("conf/seelog.xml", "utf8")) : undefined;
  let level: Level = seelog ?? "debug";
  const log = makeLog(target.write, Date.now, target.tty, () => level);
  const { stop, up } = listen(log, target);
  try {
    const deps = realDeps(flags, log);
    const ctx = makeContext(deps, await load({ deps, signal: stop.signal }, flags), stop.signal);
    ctx.state.kubeconfig = flags.K;
    const setLevel = ({ log_level }: Config["system"]) => {
      level = log_level === "warning" ? "warn" : (log_level ?? seelog ?? "debug");
    };
    setLevel(ctx.state.config.system);
    const { interruption_evt_sqs, detach_evt_sqs } = ctx.state.config.global;
    log.info(`max_group ${pkg.version}`, {
      region: flags.r,
      config: flags.t ? "conf/service_config.json" : `s3://${flags.b}/service_config.json`,
    });
    await Promise.all([checkQueues(ctx), checkGroups(ctx)]);
    if (![...ctx.state.groups.values()].some((g) => !g.broken))
      throw new ConfigError("no group can be looked after; see the errors above");
    log.debug(`interruption sqs:${interruption_evt_sqs.queue_url}`);
    log.debug(`Detach sqs:${detach_evt_sqs.queue_url}`);
    up.refresh = async () => {
      await refresh(ctx, flags);
      setLevel(ctx.state.config.system);
    };
    up.isUp = true;
    void checkPermissions(ctx).catch((error: unknown) => log.debug(`dry runs: ${errorText(error)}`));
    await Promise.all([run(ctx), refreshLoop(ctx, up.refresh)]);
    log.info("stopped");
    return 0;
  } catch (error) {
    if (error instanceof Stopped) return 0;
    const text =
      error instanceof ConfigError ? error.message : `${error instanceof Error ? error.message : ""}: ${explain(error)}`;
    for (const line of text.split("\n")) log.error(line);
    return 1;
  }
}

if (import.meta.main) process.exit(await main());

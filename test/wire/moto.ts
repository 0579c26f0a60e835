// moto, the second opinion on what AWS answers: Python's own model of the services, over HTTP. `make` puts it into
// a virtual environment of its own (MOTO_HOME); nothing is installed here.
//
// moto is laxer than AWS: it never lacks capacity, drops a mixed instances policy on update, ignores client
// tokens, lets a detach go below the minimum, replaces a terminated member at once, and answers an attach over
// the maximum with another error. It judges formats and ordinary answers, never those rules.
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { AutoScalingClient, CreateAutoScalingGroupCommand, DescribeAutoScalingGroupsCommand } from "@aws-sdk/client-auto-scaling";
import {
  type _InstanceType,
  CreateLaunchTemplateCommand,
  CreateSubnetCommand,
  CreateVpcCommand,
  EC2Client,
  RunInstancesCommand,
} from "@aws-sdk/client-ec2";
import { ElasticLoadBalancingV2Client } from "@aws-sdk/client-elastic-load-balancing-v2";
import { CreateBucketCommand, S3Client } from "@aws-sdk/client-s3";
import { CreateQueueCommand, GetQueueAttributesCommand, SQSClient } from "@aws-sdk/client-sqs";

const MOTO_VERSION = "5.2.5";
const MOTO_HOME = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "max_group", `moto-${MOTO_VERSION}`);
/** That moto and botocore are installed for. */
export const PYTHON = join(MOTO_HOME, "bin", "python");
export const REGION = "us-east-2";

// --- The server ------------------------------------------------------------------------------------------------

export interface Moto {
  /** `http://127.0.0.1:PORT`; also what its queue URLs begin with. */
  url: string;
  /** Forgets everything. Takes a few milliseconds, so that every test can have its own world. */
  reset(): Promise<void>;
  /** What is launched from now on was launched so many seconds ago. */
  age(seconds: number): Promise<void>;
  /** Messages in its queues that are delayed come now. */
  hurry(): Promise<void>;
  stop(): Promise<void>;
}

/**
 * `moto_server -p 0` takes a free port and names it on standard error; it serves every request on a thread of its
 * own. Started through -c, so that it also ends when its standard input does: with the process that started it,
 * however that one died. A line there says how old new instances are to look, or "hurry"; what is done is answered
 * with one byte.
 */
const LAUNCH = `
import datetime, os, sys, threading
from moto.ec2.models import instances
from moto.sqs.models import sqs_backends
now, age = instances.utcnow, 0.0
instances.utcnow = lambda: now() - datetime.timedelta(seconds=age)
def hurry():
    for account in list(sqs_backends.values()):
        for backend in list(account.values()):
            for queue in list(backend.queues.values()):
                for message in list(queue._messages): message.delayed_until = 0
def listen():
    global age
    for line in sys.stdin:
        if line.strip() == "hurry": hurry()
        else: age = float(line)
        print("\\x06", end="", flush=True)
    os._exit(0)
threading.Thread(target=listen, daemon=True).start()
from moto.server import main
main(["-H", "127.0.0.1", "-p", "0"])
`;
const START_TIMEOUT_MS = 120_000;

/** False, with a warning, where moto, and botocore with it, is not installed; in CI that throws. */
export function isMotoInstalled(): boolean {
  if (existsSync(PYTHON)) return true;
  const complaint = `moto ${MOTO_VERSION} is not installed in ${MOTO_HOME}`;
  if (process.env.CI) throw new Error(complaint);
  console.warn(`\n*** ${complaint}: its tests are SKIPPED ***\n`);
  return false;
}

/** Starts a moto server on a free loopback port and waits until it answers. It has to be installed. */
export async function startMoto(): Promise<Moto> {
  const child = Bun.spawn([PYTHON, "-c", LAUNCH], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
    // Making up the public images costs a second after every reset, and moto launches any image ID.
    env: { ...process.env, MOTO_EC2_LOAD_DEFAULT_AMIS: "false" },
  });
  const started = Promise.withResolvers<string>();
  void readLines(child.stderr, started);
  const timer = setTimeout(() => started.reject(new Error("moto did not start in time")), START_TIMEOUT_MS);
  try {
    const url = await started.promise;
    const reset = async () => {
      const answer = await fetch(`${url}/moto-api/reset`, { method: "POST" });
      if (!answer.ok) throw new Error(`resetting moto: HTTP ${answer.status}`);
    };
    await reset();
    const stop = async () => {
      child.kill();
      await child.exited;
    };
    const asked: (() => void)[] = [];
    void (async () => {
      for await (const chunk of child.stdout) for (const byte of chunk) if (byte === 6) asked.shift()?.();
    })();
    const say = (line: string) =>
      new Promise<void>((resolve) => {
        asked.push(resolve);
        child.stdin.write(`${line}\n`);
        void child.stdin.flush();
      });
    return { url, reset, age: (seconds) => say(`${seconds}`), hurry: () => say("hurry"), stop };
  } catch (cause) {
    child.kill();
    throw new Error("starting moto", { cause });
  } finally {
    clearTimeout(timer);
  }
}

/** Reads moto's log to its end, since a full pipe would stop it; what came before a failed start is its reason. */
async function readLines(
  log: ReadableStream<Uint8Array>,
  started: { resolve(url: string): void; reject(reason: Error): void },
): Promise<void> {
  const decoder = new TextDecoder();
  let head = "";
  let known = false;
  for await (const chunk of log) {
    if (known) continue;
    head += decoder.decode(chunk, { stream: true });
    const port = /Running on http:\/\/127\.0\.0\.1:(\d+)/.exec(head)?.[1];
    if (!port) continue;
    known = true;
    started.resolve(`http://127.0.0.1:${port}`);
  }
  if (!known) started.reject(new Error(`moto ended at once:\n${head}`));
}

// --- Clients ---------------------------------------------------------------------------------------------------

export interface SdkClients {
  ec2: EC2Client;
  autoscaling: AutoScalingClient;
  elbv2: ElasticLoadBalancingV2Client;
  sqs: SQSClient;
  s3: S3Client;
}

/** The SDK's own clients, for moto, the simulator's server or anything else with one endpoint. No retries, unless told: a refusal is to be seen. */
export function sdkClients(endpoint: string, { maxAttempts = 1 } = {}): SdkClients {
  const settings = {
    endpoint,
    region: REGION,
    credentials: { accessKeyId: "test", secretAccessKey: "test" },
    maxAttempts,
  };
  return {
    ec2: new EC2Client(settings),
    autoscaling: new AutoScalingClient(settings),
    elbv2: new ElasticLoadBalancingV2Client(settings),
    sqs: new SQSClient(settings),
    s3: new S3Client({ ...settings, forcePathStyle: true }),
  };
}

export function destroyClients(clients: SdkClients): void {
  for (const client of Object.values(clients)) client.destroy();
}

// --- Set-up ----------------------------------------------------------------------------------------------------

export interface SetUpOptions {
  group?: string;
  min?: number;
  max?: number;
  desired?: number;
  /** Default a, b and c of the region; each gets a subnet. */
  zones?: string[];
  /** More than one: a mixed instances policy, all spot. Default: three types. */
  types?: string[];
  /** Of the group, propagated to its instances. */
  tags?: Record<string, string>;
  /** Running instances outside of the group, in its first subnet. */
  strangers?: number;
  bucket?: string;
}

/** Of nothing that exists: moto takes any. */
export const IMAGE_ID = "ami-0123456789abcdef0";

export interface Queue {
  url: string;
  arn: string;
}

export interface SetUp {
  vpcId: string;
  subnetIds: string[];
  templateId: string;
  group: string;
  /** In service, in order of launch. */
  memberIds: string[];
  strangerIds: string[];
  bucket: string;
  queues: { interruption: Queue; detach: Queue; termination: Queue; deadLetter: Queue };
}

/**
 * A network, a launch template, a group with its members, three queues with a dead-letter queue (redrive after 10)
 * and an empty bucket. The VPC is 127.0.0.0/16, so that an instance's private address is one of this host's own.
 */
export async function setUp(clients: SdkClients, options: SetUpOptions = {}): Promise<SetUp> {
  const { ec2, autoscaling, sqs, s3 } = clients;
  const { group = "web", min = 1, max = 4, desired = 2, bucket = "max-group-conf" } = options;
  const zones = options.zones ?? [`${REGION}a`, `${REGION}b`, `${REGION}c`];
  const types = options.types ?? ["m5.large", "m5a.large", "m4.large"];

  const vpc = await ec2.send(new CreateVpcCommand({ CidrBlock: "127.0.0.0/16" }));
  const vpcId = must(vpc.Vpc?.VpcId, "a VPC");
  const subnetIds: string[] = [];
  for (const [i, zone] of zones.entries()) {
    const subnet = await ec2.send(
      new CreateSubnetCommand({ VpcId: vpcId, CidrBlock: `127.0.${i + 1}.0/24`, AvailabilityZone: zone }),
    );
    subnetIds.push(must(subnet.Subnet?.SubnetId, "a subnet"));
  }

  const template = await ec2.send(
    new CreateLaunchTemplateCommand({
      LaunchTemplateName: `${group}-template`,
      LaunchTemplateData: { ImageId: IMAGE_ID, InstanceType: types[0] as _InstanceType },
    }),
  );
  const templateId = must(template.LaunchTemplate?.LaunchTemplateId, "a launch template");
  const specification = { LaunchTemplateId: templateId, Version: "$Default" };

  await autoscaling.send(
    new CreateAutoScalingGroupCommand({
      AutoScalingGroupName: group,
      MinSize: min,
      MaxSize: max,
      DesiredCapacity: desired,
      VPCZoneIdentifier: subnetIds.join(","),
      Tags: Object.entries(options.tags ?? {}).map(([Key, Value]) => ({
        Key,
        Value,
        PropagateAtLaunch: true,
      })),
      ...(types.length === 1
        ? { LaunchTemplate: specification }
        : {
            MixedInstancesPolicy: {
              LaunchTemplate: {
                LaunchTemplateSpecification: specification,
                Overrides: types.map((InstanceType) => ({ InstanceType })),
              },
              InstancesDistribution: {
                OnDemandBaseCapacity: 0,
                OnDemandPercentageAboveBaseCapacity: 0,
                SpotAllocationStrategy: "price-capacity-optimized",
              },
            },
          }),
    }),
  );
  const groups = await autoscaling.send(new DescribeAutoScalingGroupsCommand({ AutoScalingGroupNames: [group] }));
  const memberIds = (groups.AutoScalingGroups?.[0]?.Instances ?? []).map((member) => must(member.InstanceId, "a member's ID"));

  const strangerIds: string[] = [];
  if (options.strangers) {
    const count = options.strangers;
    const run = await ec2.send(
      new RunInstancesCommand({
        LaunchTemplate: specification,
        SubnetId: subnetIds[0],
        MinCount: count,
        MaxCount: count,
      }),
    );
    for (const instance of run.Instances ?? []) strangerIds.push(must(instance.InstanceId, "an instance's ID"));
  }

  const deadLetter = await createQueue(sqs, "dead-letter");
  const RedrivePolicy = JSON.stringify({ deadLetterTargetArn: deadLetter.arn, maxReceiveCount: 10 });
  const queues = {
    interruption: await createQueue(sqs, "interruption", { RedrivePolicy }),
    detach: await createQueue(sqs, "detach", { RedrivePolicy }),
    termination: await createQueue(sqs, "termination", { RedrivePolicy }),
    deadLetter,
  };
  await s3.send(new CreateBucketCommand({ Bucket: bucket, CreateBucketConfiguration: { LocationConstraint: REGION } }));
  return { vpcId, subnetIds, templateId, group, memberIds, strangerIds, bucket, queues };
}

/** A queue by that name, made if absent. */
export async function createQueue(sqs: SQSClient, name: string, attributes: Record<string, string> = {}): Promise<Queue> {
  const made = await sqs.send(new CreateQueueCommand({ QueueName: name, Attributes: attributes }));
  const url = must(made.QueueUrl, "a queue's URL");
  const got = await sqs.send(new GetQueueAttributesCommand({ QueueUrl: url, AttributeNames: ["QueueArn"] }));
  return { url, arn: must(got.Attributes?.QueueArn, "a queue's ARN") };
}

function must<T>(value: T | undefined, what: string): T {
  if (value === undefined) throw new Error(`setting up: the answer lacks ${what}`);
  return value;
}

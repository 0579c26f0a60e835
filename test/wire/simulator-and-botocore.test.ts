// The simulator's answers as Python's SDK reads them. botocore has its own models, parsers and error rules, so
// what it and the JavaScript SDK both understand is AWS's format and not one SDK's idea of it. It comes with moto.
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { DescribeAutoScalingGroupsCommand } from "@aws-sdk/client-auto-scaling";
import { DescribeInstancesCommand, DescribeLaunchTemplateVersionsCommand } from "@aws-sdk/client-ec2";
import { DescribeTargetGroupsCommand } from "@aws-sdk/client-elastic-load-balancing-v2";
import { RealClock } from "../aws/clock.ts";
import { serve } from "../aws/server.ts";
import { World } from "../aws/world.ts";
import { destroyClients, isMotoInstalled, PYTHON, REGION, sdkClients } from "./moto.ts";

const isInstalled = isMotoInstalled();

let world: World | undefined;
const served = serve({
  call: (...request) => {
    if (!world) throw new Error("a call before the world");
    return world.call(...request);
  },
});
world = new World({
  clock: new RealClock(),
  region: REGION,
  origin: served.url,
  latencyMs: [0, 0],
});
const queues = world.createQueues();
const { templateId, instanceIds } = world.createGroup({
  name: "web",
  min: 1,
  max: 4,
  desired: 3,
  tags: { "a<&>b": `"quoted" é` },
  targetGroups: ["tg"],
});
world.s3.put("max-group-conf", "service_config.json", `{"é":"<&>"}`);
const clients = sdkClients(served.url);
afterAll(async () => {
  destroyClients(clients);
  await served.stop();
});

type PythonCall = [service: string, operation: string, params: object];
interface PythonAnswer {
  output?: Record<string, unknown>;
  error?: { Code: string; Message: string; status: number };
}

async function fromPython(...calls: PythonCall[]): Promise<PythonAnswer[]> {
  const child = Bun.spawn([PYTHON, join(import.meta.dir, "python-client.py"), served.url, REGION], {
    stdin: new Blob([JSON.stringify(calls)]),
    stderr: "pipe",
  });
  const [text, complaint] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  if ((await child.exited) !== 0) throw new Error(complaint);
  return JSON.parse(text) as PythonAnswer[];
}

/** An answer as JSON has it: dates as text, nothing where nothing was said. */
function plain(answer: object): unknown {
  const { $metadata: _, ...output } = answer as Record<string, unknown>;
  return JSON.parse(JSON.stringify(output));
}

describe.skipIf(!isInstalled)("botocore", () => {
  test("reads the same answers as the JavaScript SDK", async () => {
    const expected = [
      await clients.autoscaling.send(new DescribeAutoScalingGroupsCommand({})),
      await clients.ec2.send(new DescribeInstancesCommand({ InstanceIds: instanceIds })),
      await clients.ec2.send(new DescribeLaunchTemplateVersionsCommand({ LaunchTemplateId: templateId })),
      await clients.elbv2.send(new DescribeTargetGroupsCommand({})),
    ].map(plain);
    const answers = await fromPython(
      ["autoscaling", "describe_auto_scaling_groups", {}],
      ["ec2", "describe_instances", { InstanceIds: instanceIds }],
      ["ec2", "describe_launch_template_versions", { LaunchTemplateId: templateId }],
      ["elbv2", "describe_target_groups", {}],
    );
    expect(answers.map((answer) => answer.output)).toEqual(expected as Record<string, unknown>[]);
  });

  test("its requests are understood: filters, batches, tags, bodies", async () => {
    const hard = `<a> & "b" é\r\n`;
    const QueueUrl = queues.detach;
    const answers = await fromPython(
      ["ec2", "create_tags", { Resources: instanceIds.slice(0, 1), Tags: [{ Key: "k<&>", Value: hard }] }],
      ["ec2", "describe_instances", { Filters: [{ Name: "tag:k<&>", Values: ["<a>*"] }] }],
      [
        "autoscaling",
        "detach_instances",
        {
          AutoScalingGroupName: "web",
          InstanceIds: instanceIds.slice(2),
          ShouldDecrementDesiredCapacity: true,
        },
      ],
      ["sqs", "send_message_batch", { QueueUrl, Entries: [{ Id: "a", MessageBody: hard, DelaySeconds: 0 }] }],
      ["sqs", "receive_message", { QueueUrl, MaxNumberOfMessages: 10 }],
      ["s3", "put_object", { Bucket: "max-group-conf", Key: "a b/é", Body: hard }],
      ["s3", "get_object", { Bucket: "max-group-conf", Key: "a b/é" }],
      ["s3", "get_object", { Bucket: "max-group-conf", Key: "service_config.json" }],
    );
    expect(answers.filter((answer) => answer.error)).toEqual([]);
    const [, found, detached, , received, , text, config] = answers.map((answer) => answer.output);
    expect(found).toMatchObject({ Reservations: [{ Instances: [{ InstanceId: instanceIds[0] }] }] });
    expect(detached).toMatchObject({ Activities: [{ AutoScalingGroupName: "web" }] });
    expect(received).toMatchObject({ Messages: [{ Body: hard }] });
    expect(text).toMatchObject({ Body: hard });
    expect(config).toMatchObject({ Body: `{"é":"<&>"}`, ContentLength: 12 });
  });

  test("asks which types meet attributes, and what it leaves out is missed", async () => {
    const InstanceRequirements = { VCpuCount: { Min: 2, Max: 2 }, MemoryMiB: { Min: 8192, Max: 8192 } };
    const kinds = { ArchitectureTypes: ["arm64"], VirtualizationTypes: ["hvm"] };
    const [found, refused] = await fromPython(
      ["ec2", "get_instance_types_from_instance_requirements", { ...kinds, InstanceRequirements }],
      ["ec2", "get_instance_types_from_instance_requirements", { ...kinds, ArchitectureTypes: [], InstanceRequirements }],
    );
    expect(found?.output).toEqual({ InstanceTypes: [{ InstanceType: "m6g.large" }, { InstanceType: "m7g.large" }] });
    expect(refused?.error?.Code).toBe("MissingParameter");
  });

  test("its errors carry AWS's codes", async () => {
    const answers = await fromPython(
      ["ec2", "describe_instances", { InstanceIds: ["i-0123456789abcdef0"] }],
      ["autoscaling", "update_auto_scaling_group", { AutoScalingGroupName: "nobody", MaxSize: 1 }],
      ["sqs", "receive_message", { QueueUrl: `${queues.detach}-not` }],
      ["s3", "get_object", { Bucket: "max-group-conf", Key: "nothing" }],
      ["s3", "head_bucket", { Bucket: "no-such-bucket" }],
      ["elbv2", "describe_target_groups", { Names: ["nobody"] }],
    );
    expect(answers.map(({ error }) => [error?.Code, error?.status])).toEqual([
      ["InvalidInstanceID.NotFound", 400],
      ["ValidationError", 400],
      ["AWS.SimpleQueueService.NonExistentQueue", 400],
      ["NoSuchKey", 404],
      ["404", 404],
      ["TargetGroupNotFound", 400],
    ]);
    for (const { error } of answers) expect(error?.Message).not.toBe("");
  });
});

// The compiled program against moto, the second opinion on the wire formats, each story on a server of its own: notices in
// a group at minimum = maximum and in a mixed one, followed to the end of the last message; volumes; the advisor's data.
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  AttachInstancesCommand,
  type AutoScalingGroup,
  DescribeAutoScalingGroupsCommand,
  UpdateAutoScalingGroupCommand,
} from "@aws-sdk/client-auto-scaling";
import {
  AttachVolumeCommand,
  CreateVolumeCommand,
  DescribeInstancesCommand,
  DescribeVolumesCommand,
  type Instance,
  RunInstancesCommand,
  type Volume,
} from "@aws-sdk/client-ec2";
import { PutObjectCommand } from "@aws-sdk/client-s3";
import { GetQueueAttributesCommand, SendMessageCommand } from "@aws-sdk/client-sqs";
import { SpotAdvisor } from "../aws/advisor.ts";
import {
  destroyClients,
  isMotoInstalled,
  type Moto,
  REGION,
  type SdkClients,
  type SetUp,
  sdkClients,
  setUp,
  startMoto,
} from "./moto.ts";

const binary = process.env.MAX_GROUP_BINARY ?? join(import.meta.dir, "../../dist/max_group");
if (!existsSync(binary)) throw new Error(`${binary} is missing: run make build`);

const isInstalled = isMotoInstalled();
/** Most of their time they wait, for minutes. */
const story = (title: string, limitMs: number, tell: (moto: Moto, clients: SdkClients) => Promise<void>) =>
  (isInstalled ? test.concurrent : test.skip)(
    title,
    async () => {
      const moto = await startMoto();
      // moto has threads and no locks: now and then it answers 500, as AWS does, and the call goes out again.
      const clients = sdkClients(moto.url, { maxAttempts: 3 });
      try {
        await tell(moto, clients);
      } finally {
        destroyClients(clients);
        await moto.stop();
      }
    },
    limitMs,
  );

async function groupOf({ autoscaling }: SdkClients, name: string): Promise<AutoScalingGroup> {
  const { AutoScalingGroups: [group] = [] } = await autoscaling.send(
    new DescribeAutoScalingGroupsCommand({ AutoScalingGroupNames: [name] }),
  );
  if (!group) throw new Error(`no group ${name}`);
  return group;
}
const sizesOf = ({ MinSize, MaxSize, DesiredCapacity, MixedInstancesPolicy }: AutoScalingGroup) => ({
  MinSize,
  MaxSize,
  DesiredCapacity,
  MixedInstancesPolicy,
});
const inService = (group: AutoScalingGroup) =>
  (group.Instances ?? []).filter((i) => i.LifecycleState === "InService").map((i) => i.InstanceId ?? "");

async function claims({ ec2 }: SdkClients): Promise<Instance[]> {
  const { Reservations = [] } = await ec2.send(
    new DescribeInstancesCommand({ Filters: [{ Name: "tag-key", Values: ["spotmax:replaces"] }] }),
  );
  return Reservations.flatMap((r) => r.Instances ?? []);
}
const tag = (i: Instance, key: string) => i.Tags?.find((t) => t.Key === key)?.Value;

async function depth({ sqs }: SdkClients, url: string): Promise<number> {
  const { Attributes = {} } = await sqs.send(new GetQueueAttributesCommand({ QueueUrl: url, AttributeNames: ["All"] }));
  const counts: Record<string, string | undefined> = Attributes;
  return ["", "NotVisible", "Delayed"].reduce((sum, kind) => sum + Number(counts[`ApproximateNumberOfMessages${kind}`] ?? 0), 0);
}

async function until(what: string, seconds: number, done: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + seconds * 1000; Date.now() < end; await Bun.sleep(250)) if (await done()) return;
  throw new Error(`not within ${seconds} s: ${what}`);
}

/** Two minutes' notice of which 20 s have passed. */
const notice = (instance: string) => ({
  version: "0",
  id: crypto.randomUUID(),
  "detail-type": "EC2 Spot Instance Interruption Warning",
  source: "aws.ec2",
  account: "123456789012",
  time: new Date(Date.now() - 20_000).toISOString(),
  region: REGION,
  resources: [`arn:aws:ec2:${REGION}a:instance/${instance}`],
  detail: { "instance-id": instance, "instance-action": "terminate" },
});

/** The program on this set-up, with these groups, once it is up. */
async function start(set: SetUp, groups: object, url: string, { s3 }: SdkClients, system = {}, intervalMinutes = 0) {
  const queue = ({ url: queue_url }: { url: string }) => ({ queue_url });
  const global = {
    interruption_evt_sqs: queue(set.queues.interruption),
    detach_evt_sqs: queue(set.queues.detach),
    termination_evt_sqs: queue(set.queues.termination),
    preaction_snapshot_interval_minutes: intervalMinutes,
  };
  const Body = JSON.stringify({ system, global, groups });
  await s3.send(new PutObjectCommand({ Bucket: set.bucket, Key: "service_config.json", Body }));
  const env = { AWS_ENDPOINT_URL: url, AWS_ACCESS_KEY_ID: "test", AWS_SECRET_ACCESS_KEY: "test", PATH: process.env.PATH ?? "" };
  const child = Bun.spawn([binary, "-b", set.bucket, "-r", REGION], { env, stderr: "pipe", stdout: "ignore" });
  let log = "";
  const read = (async () => {
    for await (const chunk of child.stderr.pipeThrough(new TextDecoderStream())) log += chunk;
  })();
  /** Tells what goes wrong with the program's log. At the end the program is ended: killed, or by SIGTERM with exit code 0. */
  async function during(tell: () => Promise<void>): Promise<void> {
    try {
      await until("the program is up", 60, async () => log.includes("start termination handler"));
      const end = await Promise.race([tell(), child.exited]);
      if (end !== undefined) throw new Error(`the program ended by itself: ${child.signalCode ?? `exit ${end}`}`);
    } catch (cause) {
      child.kill("SIGKILL");
      await read;
      throw new Error(`the program's log:\n${log}`, { cause });
    }
    child.kill("SIGTERM");
    expect(await child.exited).toBe(0);
  }
  return during;
}
async function send({ sqs }: SdkClients, set: SetUp, ...instances: string[]): Promise<void> {
  for (const id of instances)
    await sqs.send(new SendMessageCommand({ QueueUrl: set.queues.interruption.url, MessageBody: JSON.stringify(notice(id)) }));
}

story(
  "the compiled program replaces interrupted instances at moto: at minimum = maximum and in a mixed group",
  400_000,
  async (moto, clients) => {
    const fixed = await setUp(clients, { group: "fixed", min: 2, max: 2, desired: 2, types: ["m5.large"] });
    const mixed = await setUp(clients, { group: "mixed", min: 1, max: 5, desired: 3, bucket: "other-bucket" });
    const { queues } = fixed;
    const before = { fixed: sizesOf(await groupOf(clients, "fixed")), mixed: sizesOf(await groupOf(clients, "mixed")) };
    const olds = [fixed.memberIds[0] ?? "", mixed.memberIds[0] ?? ""];

    const options = { detaching_delay_seconds: 1 };
    const during = await start(fixed, { fixed: options, mixed: options }, moto.url, clients);
    await during(async () => {
      const least = { fixed: 2, mixed: 3 };
      await send(clients, fixed, ...olds);
      await until("both are replaced and every queue is empty", 110, async () => {
        for (const name of ["fixed", "mixed"] as const)
          least[name] = Math.min(least[name], inService(await groupOf(clients, name)).length);
        const left = await Promise.all(
          [queues.interruption, queues.detach, queues.termination].map((q) => depth(clients, q.url)),
        );
        // What is left is due a minute after the deadline.
        const [interruption, detach] = left;
        if (interruption === 0 && detach === 0) await moto.hurry();
        return (await claims(clients)).filter((c) => tag(c, "spotmax:attached")).length === 2 && left.every((n) => n === 0);
      });
      await until("the maximum is put back, and its tag gone", 150, async () => {
        const { MaxSize, Tags = [] } = await groupOf(clients, "fixed");
        return MaxSize === 2 && !Tags.some((t) => t.Key?.startsWith("spotmax:"));
      });
      expect(least).toEqual({ fixed: 2, mixed: 3 });
      expect((await claims(clients)).map((c) => tag(c, "spotmax:replaces")).sort()).toEqual(olds.toSorted());
      for (const [name, sizes] of Object.entries(before)) {
        const group = await groupOf(clients, name);
        expect(sizesOf(group)).toEqual(sizes);
        expect(inService(group).length).toBe(sizes.DesiredCapacity ?? 0);
        expect(inService(group).filter((id) => olds.includes(id))).toEqual([]);
        expect((group.Tags ?? []).filter((t) => t.Key?.startsWith("spotmax:"))).toEqual([]);
      }
      const { Reservations = [] } = await clients.ec2.send(new DescribeInstancesCommand({ InstanceIds: olds }));
      for (const i of Reservations.flatMap((r) => r.Instances ?? [])) expect(i.State?.Name).toBe("terminated");
      expect(await depth(clients, queues.deadLetter.url)).toBe(0);
    });
  },
);

/** A data volume at /dev/sdf, which goes with its instance, as the template's own would. */
async function dataVolume({ ec2 }: SdkClients, instance: string): Promise<string> {
  const { Reservations = [] } = await ec2.send(new DescribeInstancesCommand({ InstanceIds: [instance] }));
  const AvailabilityZone = Reservations[0]?.Instances?.[0]?.Placement?.AvailabilityZone ?? "";
  const { VolumeId = "" } = await ec2.send(new CreateVolumeCommand({ AvailabilityZone, Size: 8, VolumeType: "gp3" }));
  await ec2.send(new AttachVolumeCommand({ VolumeId, InstanceId: instance, Device: "/dev/sdf" }));
  return VolumeId;
}
async function volume({ ec2 }: SdkClients, id: string): Promise<Volume> {
  const { Volumes: [found] = [] } = await ec2.send(new DescribeVolumesCommand({ VolumeIds: [id] }));
  if (!found) throw new Error(`volume ${id} is gone`);
  return found;
}

story(
  "the compiled program moves a volume over two generations, and copies it where no zone fits",
  300_000,
  async (moto, clients) => {
    const { ec2, autoscaling } = clients;
    const set = await setUp(clients, { group: "db", min: 1, max: 3, desired: 1, types: ["m5.large"], zones: ["us-east-2a"] });
    const away = await setUp(clients, { group: "away", min: 1, max: 3, desired: 1, types: ["m5.large"], bucket: "other-bucket" });
    const [old = "", far = ""] = [set.memberIds[0], away.memberIds[0]];
    const [data, original] = [await dataVolume(clients, old), await dataVolume(clients, far)];
    const from = (await volume(clients, original)).AvailabilityZone;
    // The old one's zone leaves the group: its replacement can only be elsewhere.
    const others = away.subnetIds.filter((_, i) => `${REGION}${"abc"[i]}` !== from);
    await autoscaling.send(
      new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: "away", VPCZoneIdentifier: others.join(",") }),
    );
    const options = { persistence_dev: "/dev/sdf", detaching_delay_seconds: 1 };
    const during = await start(set, { db: options, away: options }, moto.url, clients);
    const claimOn = async (id: string) =>
      (await claims(clients)).find((c) => tag(c, "spotmax:replaces") === id && c.State?.Name === "running")?.InstanceId ?? "";
    const holder = async (id: string) =>
      (await volume(clients, id)).Attachments?.map((a) => `${a.InstanceId} ${a.Device}`).join();
    await during(async () => {
      await send(clients, set, old, far);
      await until(
        "the first replacement has the volume",
        100,
        async () => (await holder(data)) === `${await claimOn(old)} /dev/sdz`,
      );
      const second = await claimOn(old);
      await send(clients, set, second);
      await until("the second one has it", 100, async () => (await holder(data)) === `${await claimOn(second)} /dev/sdz`);
      await until("elsewhere a copy is attached", 100, async () => {
        const claim = await claimOn(far);
        const { Reservations = [] } = await ec2.send(new DescribeInstancesCommand({ InstanceIds: claim ? [claim] : [far] }));
        const mapped = Reservations[0]?.Instances?.[0]?.BlockDeviceMappings?.find((m) => m.DeviceName === "/dev/sdz")?.Ebs
          ?.VolumeId;
        return mapped !== undefined && mapped !== original;
      });
      expect((await volume(clients, original)).State).toBe("available");
    });
  },
);

story(
  "the compiled program moves members out of a worse band at moto, one by one, by the advisor's data",
  450_000,
  async (moto, clients) => {
    const { ec2, autoscaling } = clients;
    const advisor = new SpotAdvisor({ "m4.large": 4, "m5.large": 1, "m5a.large": 0 }, REGION);
    const served = Bun.serve({
      hostname: "127.0.0.1",
      port: 0,
      fetch: (request) => advisor.answer(request.headers.get("if-none-match")),
    });
    const set = await setUp(clients, {
      group: "web",
      min: 0,
      max: 4,
      desired: 0,
      zones: [`${REGION}a`, `${REGION}b`],
      types: ["m4.large", "m5.large", "m5a.large"],
    });
    // moto's own members are on-demand, whatever the policy says; and an hour must have passed.
    await moto.age(7_200);
    const olds: string[] = [];
    for (const SubnetId of set.subnetIds) {
      const { Instances: [one] = [] } = await ec2.send(
        new RunInstancesCommand({
          LaunchTemplate: { LaunchTemplateId: set.templateId },
          InstanceMarketOptions: { MarketType: "spot" },
          InstanceType: "m4.large",
          SubnetId,
          MinCount: 1,
          MaxCount: 1,
        }),
      );
      olds.push(one?.InstanceId ?? "");
    }
    await moto.age(0);
    await autoscaling.send(new AttachInstancesCommand({ AutoScalingGroupName: "web", InstanceIds: olds }));
    const system = { spot_advisor_url: `http://127.0.0.1:${served.port}/spot-advisor-data.json` };
    const options = { is_enable_preaction: true, preaction_detach_delay_seconds: 5, preaction_termination_delay_seconds: 1 };
    const during = await start(set, { web: options }, moto.url, clients, system, 1);
    let [least, most] = [2, 2];
    await during(async () => {
      await until("both are replaced and ended", 260, async () => {
        const now = inService(await groupOf(clients, "web")).length;
        [least, most] = [Math.min(least, now), Math.max(most, now)];
        const settled = (await claims(clients)).filter((c) => tag(c, "spotmax:attached"));
        const { Reservations = [] } = await ec2.send(new DescribeInstancesCommand({ InstanceIds: olds }));
        const states = Reservations.flatMap((r) => r.Instances ?? []).map((i) => i.State?.Name);
        return settled.length === 2 && states.every((state) => state === "terminated");
      });
      expect([least, most]).toEqual([2, 3]);
      const replacements = await claims(clients);
      expect(replacements.map((c) => tag(c, "spotmax:replaces")).sort()).toEqual(olds.toSorted());
      expect(replacements.map((c) => [c.InstanceType, c.InstanceLifecycle])).toEqual([
        ["m5a.large", "spot"],
        ["m5a.large", "spot"],
      ]);
      // One more look: a steady market sees no churn.
      const before = advisor.unchanged;
      await until("it has looked again", 90, async () => advisor.unchanged > before);
      await Bun.sleep(2_000);
      expect((await claims(clients)).length).toBe(2);
      expect(advisor.served).toBe(1);
      expect(sizesOf(await groupOf(clients, "web"))).toMatchObject({ MinSize: 0, MaxSize: 4, DesiredCapacity: 2 });
      expect(await depth(clients, set.queues.deadLetter.url)).toBe(0);
    }).finally(() => served.stop(true));
  },
);

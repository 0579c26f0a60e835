// The compiled program against moto, the second opinion on the wire formats: one notice in a group at minimum =
// maximum, one in a mixed group, followed to the end of the last message.
import { afterAll, expect, test } from "bun:test";
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
import { destroyClients, REGION, type SdkClients, type SetUp, sdkClients, setUp, startMoto } from "./moto.ts";

const binary = process.env.MAX_GROUP_BINARY ?? join(import.meta.dir, "../../dist/max_group");
const moto = await startMoto();
const clients: SdkClients | undefined = moto && sdkClients(moto.url);
afterAll(async () => {
  if (clients) destroyClients(clients);
  await moto?.stop();
});

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

/** Two minutes' notice of which 110 s have passed: the rest of the story fits into a test. */
const lateNotice = (instance: string) => ({
  version: "0",
  id: crypto.randomUUID(),
  "detail-type": "EC2 Spot Instance Interruption Warning",
  source: "aws.ec2",
  account: "123456789012",
  time: new Date(Date.now() - 100_000).toISOString(),
  region: REGION,
  resources: [`arn:aws:ec2:${REGION}a:instance/${instance}`],
  detail: { "instance-id": instance, "instance-action": "terminate" },
});

test.skipIf(!moto)(
  "the compiled program replaces interrupted instances at moto: at minimum = maximum and in a mixed group",
  async () => {
    if (!moto || !clients) return;
    if (!existsSync(binary)) throw new Error(`${binary} is missing: run make build`);
    const fixed = await setUp(clients, { group: "fixed", min: 2, max: 2, desired: 2, types: ["m5.large"] });
    const mixed = await setUp(clients, { group: "mixed", min: 1, max: 5, desired: 3, bucket: "other-bucket" });
    const queue = (q: { url: string }) => ({ queue_url: q.url });
    const { queues } = fixed;
    const config = {
      global: {
        interruption_evt_sqs: queue(queues.interruption),
        detach_evt_sqs: queue(queues.detach),
        termination_evt_sqs: queue(queues.termination),
      },
      groups: { fixed: {}, mixed: {} },
    };
    await clients.s3.send(
      new PutObjectCommand({ Bucket: fixed.bucket, Key: "service_config.json", Body: JSON.stringify(config) }),
    );
    const before = { fixed: sizesOf(await groupOf(clients, "fixed")), mixed: sizesOf(await groupOf(clients, "mixed")) };
    const olds = [fixed.memberIds[0] ?? "", mixed.memberIds[0] ?? ""];

    const daemon = Bun.spawn([binary, "-b", fixed.bucket, "-r", REGION], {
      env: { AWS_ENDPOINT_URL: moto.url, AWS_ACCESS_KEY_ID: "test", AWS_SECRET_ACCESS_KEY: "test", PATH: process.env.PATH ?? "" },
      stderr: "pipe",
      stdout: "ignore",
    });
    const log = new Response(daemon.stderr).text();
    try {
      for (const old of olds)
        await clients.sqs.send(
          new SendMessageCommand({ QueueUrl: queues.interruption.url, MessageBody: JSON.stringify(lateNotice(old)) }),
        );
      const least = { fixed: 2, mixed: 3 };
      await until("both are replaced and every queue is empty", 110, async () => {
        for (const name of ["fixed", "mixed"] as const)
          least[name] = Math.min(least[name], inService(await groupOf(clients, name)).length);
        const left = await Promise.all(
          [queues.interruption, queues.detach, queues.termination].map((q) => depth(clients, q.url)),
        );
        return (await claims(clients)).filter((c) => tag(c, "spotmax:attached")).length === 2 && left.every((n) => n === 0);
      });
      await until("the maximum is put back", 30, async () => (await groupOf(clients, "fixed")).MaxSize === 2);
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
    } catch (cause) {
      daemon.kill();
      throw new Error(`the program's log:\n${await log}`, { cause });
    }
    daemon.kill("SIGTERM");
    expect(await daemon.exited).toBe(0);
  },
  180_000,
);

/** The program on this set-up, with these groups. */
async function start(set: SetUp, groups: object, url: string, { s3 }: SdkClients, system = {}, intervalMinutes = 0) {
  const [interruption_evt_sqs, detach_evt_sqs, termination_evt_sqs] = [
    set.queues.interruption,
    set.queues.detach,
    set.queues.termination,
  ].map((q) => ({
    queue_url: q.url,
  }));
  const global = {
    interruption_evt_sqs,
    detach_evt_sqs,
    termination_evt_sqs,
    preaction_snapshot_interval_minutes: intervalMinutes,
  };
  const Body = JSON.stringify({ system, global, groups });
  await s3.send(new PutObjectCommand({ Bucket: set.bucket, Key: "service_config.json", Body }));
  const daemon = Bun.spawn([binary, "-b", set.bucket, "-r", REGION], {
    env: { AWS_ENDPOINT_URL: url, AWS_ACCESS_KEY_ID: "test", AWS_SECRET_ACCESS_KEY: "test", PATH: process.env.PATH ?? "" },
    stderr: "pipe",
    stdout: "ignore",
  });
  return { daemon, log: new Response(daemon.stderr).text() };
}

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

test.skipIf(!moto)(
  "the compiled program moves a volume over two generations, and copies it where no zone fits",
  async () => {
    if (!moto || !clients) return;
    const { ec2, autoscaling, sqs } = clients;
    await moto.reset();
    const set = await setUp(clients, { group: "db", min: 1, max: 3, desired: 1, types: ["m5.large"], zones: ["us-east-2a"] });
    const away = await setUp(clients, { group: "away", min: 1, max: 3, desired: 1, types: ["m5.large"], bucket: "other-bucket" });
    const [old = "", far = ""] = [set.memberIds[0], away.memberIds[0]];
    const [data, original] = [await dataVolume(clients, old), await dataVolume(clients, far)];
    const from = (await volume(clients, original)).AvailabilityZone;
    // The old one's zone leaves the group: its replacement can only be elsewhere.
    const { Subnets } = { Subnets: away.subnetIds.filter((_, i) => `${REGION}${"abc"[i]}` !== from) };
    await autoscaling.send(
      new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: "away", VPCZoneIdentifier: Subnets.join(",") }),
    );
    const options = { persistence_dev: "/dev/sdf" };
    const { daemon, log } = await start(set, { db: options, away: options }, moto.url, clients);
    const notice = (id: string) =>
      sqs.send(new SendMessageCommand({ QueueUrl: set.queues.interruption.url, MessageBody: JSON.stringify(lateNotice(id)) }));
    const claimOn = async (id: string) =>
      (await claims(clients)).find((c) => tag(c, "spotmax:replaces") === id && c.State?.Name === "running")?.InstanceId ?? "";
    const holder = async (id: string) =>
      (await volume(clients, id)).Attachments?.map((a) => `${a.InstanceId} ${a.Device}`).join();
    try {
      await Promise.all([notice(old), notice(far)]);
      await until(
        "the first replacement has the volume",
        60,
        async () => (await holder(data)) === `${await claimOn(old)} /dev/sdz`,
      );
      const second = await claimOn(old);
      await notice(second);
      await until("the second one has it", 60, async () => (await holder(data)) === `${await claimOn(second)} /dev/sdz`);
      await until("elsewhere a copy is attached", 60, async () => {
        const claim = await claimOn(far);
        const { Reservations = [] } = await ec2.send(new DescribeInstancesCommand({ InstanceIds: claim ? [claim] : [far] }));
        const mapped = Reservations[0]?.Instances?.[0]?.BlockDeviceMappings?.find((m) => m.DeviceName === "/dev/sdz")?.Ebs
          ?.VolumeId;
        return mapped !== undefined && mapped !== original;
      });
      expect((await volume(clients, original)).State).toBe("available");
    } catch (cause) {
      daemon.kill();
      throw new Error(`the program's log:\n${await log}`, { cause });
    }
    daemon.kill("SIGTERM");
    expect(await daemon.exited).toBe(0);
  },
  240_000,
);

test.skipIf(!moto)(
  "the compiled program moves members out of a worse band at moto, one by one, by the advisor's data",
  async () => {
    if (!moto || !clients) return;
    const { ec2, autoscaling } = clients;
    await moto.reset();
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
    moto.age(7_200);
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
    moto.age(0);
    await autoscaling.send(new AttachInstancesCommand({ AutoScalingGroupName: "web", InstanceIds: olds }));
    const system = { spot_advisor_url: `http://127.0.0.1:${served.port}/spot-advisor-data.json` };
    const options = { is_enable_preaction: true, preaction_detach_delay_seconds: 1, preaction_termination_delay_seconds: 1 };
    const { daemon, log } = await start(set, { web: options }, moto.url, clients, system, 1);
    let [least, most] = [2, 2];
    try {
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
    } catch (cause) {
      daemon.kill();
      throw new Error(`the program's log:\n${await log}`, { cause });
    } finally {
      await served.stop(true);
    }
    daemon.kill("SIGTERM");
    expect(await daemon.exited).toBe(0);
  },
  450_000,
);

// The same questions to moto and to the simulator, over HTTP, through the SDK's clients. Where moto agrees with AWS,
// the simulator has to agree with moto; where it is known to be laxer (see moto.ts), nothing is asked here.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  AttachInstancesCommand,
  type AutoScalingGroup,
  CreateOrUpdateTagsCommand,
  DeleteTagsCommand as DeleteGroupTagsCommand,
  DescribeAutoScalingGroupsCommand,
  DescribeAutoScalingInstancesCommand,
  DescribeTagsCommand as DescribeGroupTagsCommand,
  DescribeLifecycleHooksCommand,
  DetachInstancesCommand,
  ResumeProcessesCommand,
  SetInstanceProtectionCommand,
  SuspendProcessesCommand,
  TerminateInstanceInAutoScalingGroupCommand,
  UpdateAutoScalingGroupCommand,
} from "@aws-sdk/client-auto-scaling";
import {
  CreateFleetCommand,
  CreateTagsCommand,
  DeleteTagsCommand,
  DescribeInstancesCommand,
  DescribeInstanceTypeOfferingsCommand,
  DescribeInstanceTypesCommand,
  DescribeLaunchTemplateVersionsCommand,
  DescribeSubnetsCommand,
  type Filter,
  type Instance,
  RunInstancesCommand,
  TerminateInstancesCommand,
} from "@aws-sdk/client-ec2";
import { GetObjectCommand, HeadBucketCommand, PutObjectCommand } from "@aws-sdk/client-s3";
import {
  ChangeMessageVisibilityBatchCommand,
  ChangeMessageVisibilityCommand,
  CreateQueueCommand,
  DeleteMessageBatchCommand,
  DeleteMessageCommand,
  GetQueueAttributesCommand,
  GetQueueUrlCommand,
  type Message,
  type QueueAttributeName,
  ReceiveMessageCommand,
  SendMessageBatchCommand,
  SendMessageCommand,
} from "@aws-sdk/client-sqs";
import { createQueue, destroyClients, REGION, type SdkClients, sdkClients, setUp } from "./moto.ts";
import { refusal, startTargets, until } from "./targets.ts";

/** What a case starts from: a group "web" of two (1 to 4) and three running instances of none. */
interface Scene {
  group: string;
  templateId: string;
  subnetIds: string[];
  memberIds: string[];
  strangerIds: string[];
  bucket: string;
}

const GROUP = "web";
const BUCKET = "max-group-conf";
const SIZES = { min: 1, max: 4, desired: 2 };
const ZONES = ["a", "b", "c"].map((letter) => REGION + letter);
const NO_INSTANCE = "i-0123456789abcdef0";

/** Delays near nothing: the rules are the matter here, and moto has no delays at all. */
const SOON: [number, number] = [5, 20];
const targets = await startTargets(
  {
    ...{ pendingMs: SOON, shuttingDownMs: SOON, attachMs: SOON, detachMs: SOON, replaceMs: SOON, reactionMs: SOON },
    rebalanceMs: 3_600_000,
  },
  (world): Scene => {
    const { templateId, subnetIds, instanceIds } = world.createGroup({ name: GROUP, ...SIZES });
    const strangerIds = [1, 2, 3].map(() => world.createInstance({ zone: ZONES[0] }).id);
    world.s3.createBucket(BUCKET);
    return { group: GROUP, templateId, subnetIds, memberIds: instanceIds, strangerIds, bucket: BUCKET };
  },
  (clients) => setUp(clients, { group: GROUP, ...SIZES, zones: ZONES, strangers: 3, bucket: BUCKET }),
);

describe.each(targets)("%s", (_name, target) => {
  let clients: SdkClients;
  beforeAll(() => {
    clients = sdkClients(target.url);
  });
  afterAll(async () => {
    destroyClients(clients);
    await target.stop();
  });

  // --- Auto Scaling --------------------------------------------------------------------------------------------

  async function readGroup(name = GROUP): Promise<AutoScalingGroup> {
    const answer = await clients.autoscaling.send(new DescribeAutoScalingGroupsCommand({ AutoScalingGroupNames: [name] }));
    const [found] = answer.AutoScalingGroups ?? [];
    if (!found) throw new Error(`there is no group ${name}`);
    return found;
  }

  const memberIdsOf = (group: AutoScalingGroup) => (group.Instances ?? []).map((member) => member.InstanceId ?? "");
  const inService = (group: AutoScalingGroup) =>
    (group.Instances ?? []).filter((member) => member.LifecycleState === "InService").length;

  async function instancesWhere(Filters: Filter[]): Promise<Instance[]> {
    const answer = await clients.ec2.send(new DescribeInstancesCommand({ Filters }));
    return (answer.Reservations ?? []).flatMap((reservation) => reservation.Instances ?? []);
  }

  async function stateOf(instanceId: string): Promise<string | undefined> {
    const answer = await clients.ec2.send(new DescribeInstancesCommand({ InstanceIds: [instanceId] }));
    return answer.Reservations?.[0]?.Instances?.[0]?.State?.Name;
  }

  const tagsOf = (tags: { Key?: string; Value?: string }[] | undefined) =>
    Object.fromEntries((tags ?? []).map(({ Key, Value }) => [Key, Value]));

  describe("Auto Scaling", () => {
    test("a group that does not exist is an empty answer, not an error", async () => {
      await target.scene();
      const answer = await clients.autoscaling.send(new DescribeAutoScalingGroupsCommand({ AutoScalingGroupNames: ["nobody"] }));
      expect(answer.AutoScalingGroups).toEqual([]);
    });

    test("a group shows its sizes, its members in service, its subnets and its policy", async () => {
      const scene = await target.scene();
      const group = await readGroup();
      expect(group).toMatchObject({ MinSize: 1, MaxSize: 4, DesiredCapacity: 2 });
      expect(memberIdsOf(group).sort()).toEqual(scene.memberIds.toSorted());
      expect(group.AvailabilityZones?.toSorted()).toEqual(ZONES);
      expect(group.VPCZoneIdentifier?.split(",").sort()).toEqual(scene.subnetIds.toSorted());
      for (const member of group.Instances ?? [])
        expect(member).toMatchObject({ LifecycleState: "InService", HealthStatus: "Healthy" });
      const { LaunchTemplate } = group.MixedInstancesPolicy ?? {};
      expect(LaunchTemplate?.LaunchTemplateSpecification?.LaunchTemplateId).toBe(scene.templateId);
      expect(LaunchTemplate?.Overrides?.map((override) => override.InstanceType)).toEqual(["m5.large", "m5a.large", "m4.large"]);
    });

    test("an attach raises desired, and what is attached comes into service", async () => {
      const { strangerIds } = await target.scene();
      await clients.autoscaling.send(
        new AttachInstancesCommand({ AutoScalingGroupName: GROUP, InstanceIds: strangerIds.slice(0, 2) }),
      );
      const group = await until(readGroup, (now) => inService(now) === 4);
      expect(group.DesiredCapacity).toBe(4);
      expect(memberIdsOf(group)).toEqual(expect.arrayContaining(strangerIds.slice(0, 2)));
    });

    test("an attach of an instance that does not exist is refused", async () => {
      await target.scene();
      const attach = new AttachInstancesCommand({ AutoScalingGroupName: GROUP, InstanceIds: [NO_INSTANCE] });
      expect(await refusal(clients.autoscaling.send(attach))).toMatchObject({ status: 400 });
      expect(memberIdsOf(await readGroup())).not.toContain(NO_INSTANCE);
    });

    test("DescribeAutoScalingInstances leaves out who is in no group", async () => {
      const { memberIds, strangerIds } = await target.scene();
      const { AutoScalingInstances } = await clients.autoscaling.send(
        new DescribeAutoScalingInstancesCommand({ InstanceIds: [...memberIds, ...strangerIds] }),
      );
      expect(AutoScalingInstances?.map((member) => member.InstanceId).sort()).toEqual(memberIds.toSorted());
      expect(AutoScalingInstances?.[0]).toMatchObject({
        AutoScalingGroupName: GROUP,
        LifecycleState: "InService",
        ProtectedFromScaleIn: false,
      });
    });

    test("a detach with decrement lowers desired by one, and the instance runs on", async () => {
      const { memberIds } = await target.scene();
      const [id = ""] = memberIds;
      const { Activities } = await clients.autoscaling.send(
        new DetachInstancesCommand({
          AutoScalingGroupName: GROUP,
          InstanceIds: [id],
          ShouldDecrementDesiredCapacity: true,
        }),
      );
      expect(Activities?.map((activity) => activity.Description)).toEqual([`Detaching EC2 instance: ${id}`]);
      const group = await until(readGroup, (now) => !memberIdsOf(now).includes(id));
      expect(group.DesiredCapacity).toBe(1);
      expect(await stateOf(id)).toBe("running");
    });

    test("a detach without decrement leaves desired, and the group launches a substitute", async () => {
      const { memberIds } = await target.scene();
      const [id = ""] = memberIds;
      await clients.autoscaling.send(
        new DetachInstancesCommand({
          AutoScalingGroupName: GROUP,
          InstanceIds: [id],
          ShouldDecrementDesiredCapacity: false,
        }),
      );
      const group = await until(readGroup, (now) => !memberIdsOf(now).includes(id) && inService(now) === 2);
      expect(group.DesiredCapacity).toBe(2);
      expect(await stateOf(id)).toBe("running");
    });

    test("a termination with decrement lowers desired and ends the instance", async () => {
      const { memberIds } = await target.scene();
      const [id = ""] = memberIds;
      const { Activity } = await clients.autoscaling.send(
        new TerminateInstanceInAutoScalingGroupCommand({ InstanceId: id, ShouldDecrementDesiredCapacity: true }),
      );
      expect(Activity?.Cause).toContain("shrinking the capacity from 2 to 1");
      const group = await until(readGroup, (now) => !memberIdsOf(now).includes(id));
      expect(group.DesiredCapacity).toBe(1);
      expect(
        await until(
          () => stateOf(id),
          (state) => state !== "running",
        ),
      ).toMatch(/shutting-down|terminated/);
    });

    test("protection from scale-in is shown on the member, and can be taken back", async () => {
      const { memberIds } = await target.scene();
      const [id = ""] = memberIds;
      for (const protect of [true, false]) {
        await clients.autoscaling.send(
          new SetInstanceProtectionCommand({
            AutoScalingGroupName: GROUP,
            InstanceIds: [id],
            ProtectedFromScaleIn: protect,
          }),
        );
        const { Instances } = await readGroup();
        expect(Instances?.find((member) => member.InstanceId === id)?.ProtectedFromScaleIn).toBe(protect);
        expect(Instances?.filter((member) => member.ProtectedFromScaleIn).length).toBe(protect ? 1 : 0);
      }
    });

    test("an update of the maximum leaves the other sizes", async () => {
      await target.scene();
      await clients.autoscaling.send(new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: GROUP, MaxSize: 9 }));
      expect(await readGroup()).toMatchObject({ MinSize: 1, MaxSize: 9, DesiredCapacity: 2 });
    });

    test("a maximum below desired lowers desired, and ends members", async () => {
      await target.scene();
      await clients.autoscaling.send(new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: GROUP, MaxSize: 1 }));
      const group = await until(readGroup, (now) => now.Instances?.length === 1);
      expect(group).toMatchObject({ MaxSize: 1, DesiredCapacity: 1 });
    });

    test("an update of a group that does not exist is a ValidationError", async () => {
      await target.scene();
      const update = new UpdateAutoScalingGroupCommand({ AutoScalingGroupName: "nobody", MaxSize: 9 });
      expect(await refusal(clients.autoscaling.send(update))).toEqual({ name: "ValidationError", status: 400 });
    });

    test("tags of a group are set, overwritten, listed and removed, whatever they say", async () => {
      await target.scene();
      const key = { ResourceId: GROUP, ResourceType: "auto-scaling-group", Key: "spotmax:max_size" };
      const set = (Value: string) =>
        clients.autoscaling.send(new CreateOrUpdateTagsCommand({ Tags: [{ ...key, Value, PropagateAtLaunch: false }] }));
      await set("4/5");
      await set(`<4> & "5"`);
      expect(tagsOf((await readGroup()).Tags)).toMatchObject({ "spotmax:max_size": `<4> & "5"` });
      const { Tags } = await clients.autoscaling.send(
        new DescribeGroupTagsCommand({ Filters: [{ Name: "auto-scaling-group", Values: [GROUP] }] }),
      );
      expect(Tags).toContainEqual({ ...key, Value: `<4> & "5"`, PropagateAtLaunch: false });
      await clients.autoscaling.send(new DeleteGroupTagsCommand({ Tags: [key] }));
      expect(tagsOf((await readGroup()).Tags)).not.toHaveProperty("spotmax:max_size");
    });

    test("suspended processes are shown until they are resumed", async () => {
      await target.scene();
      const processes = { AutoScalingGroupName: GROUP, ScalingProcesses: ["Launch", "AZRebalance"] };
      const names = async () => (await readGroup()).SuspendedProcesses?.map((one) => one.ProcessName).sort();
      await clients.autoscaling.send(new SuspendProcessesCommand(processes));
      expect(await names()).toEqual(["AZRebalance", "Launch"]);
      await clients.autoscaling.send(new ResumeProcessesCommand({ ...processes, ScalingProcesses: ["Launch"] }));
      expect(await names()).toEqual(["AZRebalance"]);
    });

    test("a group without lifecycle hooks has an empty list of them", async () => {
      await target.scene();
      const hooks = await clients.autoscaling.send(new DescribeLifecycleHooksCommand({ AutoScalingGroupName: GROUP }));
      expect(hooks.LifecycleHooks).toEqual([]);
    });
  });

  // --- EC2 -----------------------------------------------------------------------------------------------------

  describe("EC2", () => {
    test("an instance that does not exist is InvalidInstanceID.NotFound", async () => {
      await target.scene();
      const InstanceIds = [NO_INSTANCE];
      const notFound = { name: "InvalidInstanceID.NotFound", status: 400 };
      expect(await refusal(clients.ec2.send(new DescribeInstancesCommand({ InstanceIds })))).toEqual(notFound);
      expect(await refusal(clients.ec2.send(new TerminateInstancesCommand({ InstanceIds })))).toEqual(notFound);
    });

    test("tags are set on several at once, found by wildcards, and removed by key", async () => {
      const { strangerIds } = await target.scene();
      const Resources = strangerIds.slice(0, 2);
      await clients.ec2.send(new CreateTagsCommand({ Resources, Tags: [{ Key: "spotmax:replaces", Value: "i-1 i-2" }] }));
      const found = async (Name: string, ...Values: string[]) =>
        (await instancesWhere([{ Name, Values }])).map((instance) => instance.InstanceId ?? "").sort();
      const both = Resources.toSorted();
      expect(await found("tag:spotmax:replaces", "i-1 i-2")).toEqual(both);
      expect(await found("tag:spotmax:replaces", "*i-2")).toEqual(both);
      expect(await found("tag:spotmax:replaces", "*i-1*", "nothing")).toEqual(both);
      expect(await found("tag:spotmax:replaces", "i-? i-?")).toEqual(both);
      expect(await found("tag:spotmax:replaces", "i-?")).toEqual([]);
      expect(await found("tag:spotmax:replaces", "I-1 I-2")).toEqual([]);
      expect(await found("tag-key", "spotmax:replaces")).toEqual(both);
      await clients.ec2.send(new DeleteTagsCommand({ Resources: Resources.slice(0, 1), Tags: [{ Key: "spotmax:replaces" }] }));
      expect(await found("tag-key", "spotmax:replaces")).toEqual(Resources.slice(1));
    });

    test("several filters all have to hold, several values of one are alternatives", async () => {
      const { memberIds, strangerIds, subnetIds } = await target.scene();
      const running = { Name: "instance-state-name", Values: ["pending", "running"] };
      const all = [...memberIds, ...strangerIds].sort();
      const ids = (instances: Instance[]) => instances.map((instance) => instance.InstanceId ?? "").sort();
      expect(ids(await instancesWhere([running]))).toEqual(all);
      expect(ids(await instancesWhere([{ Name: "instance-state-name", Values: ["stopped"] }]))).toEqual([]);
      const inFirst = await instancesWhere([running, { Name: "subnet-id", Values: subnetIds.slice(0, 1) }]);
      expect(ids(inFirst)).toEqual(expect.arrayContaining(strangerIds.toSorted()));
      for (const instance of inFirst)
        expect(instance).toMatchObject({ SubnetId: subnetIds[0], Placement: { AvailabilityZone: ZONES[0] } });
    });

    test("the members of a group carry its name as a tag, and have addresses of the network", async () => {
      const { memberIds } = await target.scene();
      const members = await instancesWhere([{ Name: "tag:aws:autoscaling:groupName", Values: [GROUP] }]);
      expect(members.map((member) => member.InstanceId).sort()).toEqual(memberIds.toSorted());
      for (const member of members) expect(member.PrivateIpAddress).toMatch(/^127\.0\.\d+\.\d+$/);
    });

    test("an instance is terminated once, and the call is answered every time", async () => {
      const { strangerIds } = await target.scene();
      const [id = ""] = strangerIds;
      const terminate = () => clients.ec2.send(new TerminateInstancesCommand({ InstanceIds: [id] }));
      expect((await terminate()).TerminatingInstances).toMatchObject([
        { InstanceId: id, PreviousState: { Name: "running", Code: 16 }, CurrentState: { Name: "shutting-down" } },
      ]);
      await until(
        () => stateOf(id),
        (state) => state === "terminated",
      );
      expect((await terminate()).TerminatingInstances).toMatchObject([
        { InstanceId: id, PreviousState: { Name: "terminated", Code: 48 } },
      ]);
    });

    test("a template's version is found by number, $Default and $Latest", async () => {
      const { templateId } = await target.scene();
      for (const version of ["1", "$Default", "$Latest"]) {
        const { LaunchTemplateVersions } = await clients.ec2.send(
          new DescribeLaunchTemplateVersionsCommand({ LaunchTemplateId: templateId, Versions: [version] }),
        );
        expect(LaunchTemplateVersions).toMatchObject([{ LaunchTemplateId: templateId, VersionNumber: 1, DefaultVersion: true }]);
        expect(LaunchTemplateVersions?.[0]?.LaunchTemplateData?.ImageId).toMatch(/^ami-/);
      }
    });

    test("a template that does not exist is InvalidLaunchTemplateId.NotFound", async () => {
      await target.scene();
      const describeVersions = new DescribeLaunchTemplateVersionsCommand({
        LaunchTemplateId: "lt-0123456789abcdef0",
        Versions: ["$Default"],
      });
      expect(await refusal(clients.ec2.send(describeVersions))).toEqual({
        name: "InvalidLaunchTemplateId.NotFound",
        status: 400,
      });
    });

    test("subnets tell their zones and their network", async () => {
      const { subnetIds } = await target.scene();
      const { Subnets } = await clients.ec2.send(new DescribeSubnetsCommand({ SubnetIds: subnetIds }));
      expect(Subnets?.map((subnet) => subnet.AvailabilityZone).sort()).toEqual(ZONES);
      expect(new Set(Subnets?.map((subnet) => subnet.VpcId)).size).toBe(1);
      for (const subnet of Subnets ?? []) {
        expect(subnet.State).toBe("available");
        expect(subnet.AvailableIpAddressCount).toBeGreaterThan(0);
      }
      const unknown = new DescribeSubnetsCommand({ SubnetIds: ["subnet-0123456789abcdef0"] });
      expect(await refusal(clients.ec2.send(unknown))).toEqual({ name: "InvalidSubnetID.NotFound", status: 400 });
    });

    test("a type is offered zone by zone", async () => {
      await target.scene();
      const { InstanceTypeOfferings } = await clients.ec2.send(
        new DescribeInstanceTypeOfferingsCommand({
          LocationType: "availability-zone",
          Filters: [{ Name: "instance-type", Values: ["m5.large"] }],
        }),
      );
      expect(InstanceTypeOfferings?.map(({ Location }) => Location).sort()).toEqual(ZONES);
      expect(new Set(InstanceTypeOfferings?.map(({ InstanceType }) => InstanceType))).toEqual(new Set(["m5.large"]));
    });

    test("a type tells its processors and memory", async () => {
      await target.scene();
      const { InstanceTypes } = await clients.ec2.send(new DescribeInstanceTypesCommand({ InstanceTypes: ["m5.large"] }));
      expect(InstanceTypes).toMatchObject([
        { InstanceType: "m5.large", VCpuInfo: { DefaultVCpus: 2 }, MemoryInfo: { SizeInMiB: 8192 } },
      ]);
    });

    test("an instant fleet launches what was asked, where it was asked, with its tags", async () => {
      const { templateId, subnetIds } = await target.scene();
      const fleet = await clients.ec2.send(
        new CreateFleetCommand({
          Type: "instant",
          LaunchTemplateConfigs: [
            {
              LaunchTemplateSpecification: { LaunchTemplateId: templateId, Version: "$Default" },
              Overrides: [{ InstanceType: "m5.large", SubnetId: subnetIds[1] }],
            },
          ],
          TargetCapacitySpecification: { TotalTargetCapacity: 2, DefaultTargetCapacityType: "spot" },
          TagSpecifications: [{ ResourceType: "instance", Tags: [{ Key: "spotmax:replaces", Value: "i-1" }] }],
        }),
      );
      const ids = (fleet.Instances ?? []).flatMap((one) => one.InstanceIds ?? []);
      expect(ids.length).toBe(2);
      expect(fleet.Errors ?? []).toEqual([]);
      for (const one of fleet.Instances ?? []) expect(one).toMatchObject({ Lifecycle: "spot", InstanceType: "m5.large" });
      const found = await until(
        () =>
          instancesWhere([
            { Name: "tag:spotmax:replaces", Values: ["i-1"] },
            { Name: "instance-state-name", Values: ["running"] },
          ]),
        (instances) => instances.length === 2,
      );
      expect(found.map((instance) => instance.InstanceId).sort()).toEqual(ids.sort());
      for (const instance of found)
        expect(instance).toMatchObject({
          InstanceLifecycle: "spot",
          InstanceType: "m5.large",
          SubnetId: subnetIds[1],
          Placement: { AvailabilityZone: ZONES[1] },
        });
    });

    test("RunInstances launches from a template into a subnet, pending first", async () => {
      const { templateId, subnetIds } = await target.scene();
      const { Instances } = await clients.ec2.send(
        new RunInstancesCommand({
          LaunchTemplate: { LaunchTemplateId: templateId, Version: "$Default" },
          SubnetId: subnetIds[2],
          InstanceType: "m4.large",
          MinCount: 1,
          MaxCount: 1,
          TagSpecifications: [{ ResourceType: "instance", Tags: [{ Key: "a", Value: "b c" }] }],
        }),
      );
      expect(Instances).toMatchObject([{ InstanceType: "m4.large", SubnetId: subnetIds[2], State: { Name: "pending" } }]);
      expect(tagsOf(Instances?.[0]?.Tags)).toMatchObject({ a: "b c" });
      const id = Instances?.[0]?.InstanceId ?? "";
      expect(
        await until(
          () => stateOf(id),
          (state) => state !== "pending",
        ),
      ).toBe("running");
    });

    test("a dry run that would have worked is an error, and does nothing", async () => {
      const { strangerIds } = await target.scene();
      const terminate = new TerminateInstancesCommand({ InstanceIds: strangerIds, DryRun: true });
      expect(await refusal(clients.ec2.send(terminate))).toEqual({ name: "DryRunOperation", status: 412 });
      expect(await stateOf(strangerIds[0] ?? "")).toBe("running");
    });
  });

  // --- SQS -----------------------------------------------------------------------------------------------------

  describe("SQS", () => {
    let queues = 0;
    /** A queue of its own for every case: no scene needs to be made anew. */
    async function freshQueue(attributes: Record<string, string> = {}): Promise<string> {
      if (queues++ === 0) await target.scene();
      return (await createQueue(clients.sqs, `q-${queues}`, attributes)).url;
    }

    const send = (QueueUrl: string, MessageBody: string, DelaySeconds?: number) =>
      clients.sqs.send(new SendMessageCommand({ QueueUrl, MessageBody, DelaySeconds }));

    async function receive(
      QueueUrl: string,
      options: { max?: number; visibility?: number; wait?: number } = {},
    ): Promise<Message[]> {
      const answer = await clients.sqs.send(
        new ReceiveMessageCommand({
          QueueUrl,
          MaxNumberOfMessages: options.max ?? 10,
          VisibilityTimeout: options.visibility,
          WaitTimeSeconds: options.wait ?? 0,
          MessageSystemAttributeNames: ["All"],
        }),
      );
      return answer.Messages ?? [];
    }

    const bodies = (messages: Message[]) => messages.map((message) => message.Body).sort();

    test("what is sent comes back unchanged, with its digest and counts", async () => {
      const url = await freshQueue();
      const body = `{"a":"<é> & \\"b\\" 😀"}\r\n\t`;
      const { MessageId } = await send(url, body); // the SDK checks both digests
      const [message] = await receive(url);
      expect(message).toMatchObject({ MessageId, Body: body, Attributes: { ApproximateReceiveCount: "1" } });
      const { SentTimestamp, ApproximateFirstReceiveTimestamp } = message?.Attributes ?? {};
      expect(Math.abs(Number(SentTimestamp) - Date.now())).toBeLessThan(60_000);
      expect(Number(ApproximateFirstReceiveTimestamp)).toBeGreaterThanOrEqual(Number(SentTimestamp));
    });

    test("an empty queue answers without a list of messages", async () => {
      const url = await freshQueue();
      const answer = await clients.sqs.send(new ReceiveMessageCommand({ QueueUrl: url }));
      expect(answer.Messages).toBeUndefined();
    });

    test("a received message is hidden for the visibility timeout, then comes again, counted", async () => {
      const url = await freshQueue();
      await send(url, "long");
      expect(bodies(await receive(url, { visibility: 600 }))).toEqual(["long"]);
      expect(await receive(url)).toEqual([]);
      await send(url, "short");
      const startMs = performance.now();
      expect(bodies(await receive(url, { visibility: 3 }))).toEqual(["short"]);
      const again = await receive(url, { wait: 20 });
      expect(performance.now() - startMs).toBeGreaterThan(2_900);
      expect(again).toMatchObject([{ Body: "short", Attributes: { ApproximateReceiveCount: "2" } }]);
    });

    test("visibility zero gives a message back at once", async () => {
      const url = await freshQueue();
      await send(url, "a");
      const [message] = await receive(url, { visibility: 30 });
      await clients.sqs.send(
        new ChangeMessageVisibilityCommand({
          QueueUrl: url,
          ReceiptHandle: message?.ReceiptHandle,
          VisibilityTimeout: 0,
        }),
      );
      expect(bodies(await receive(url))).toEqual(["a"]);
    });

    test("a delayed message is hidden until its time", async () => {
      const url = await freshQueue();
      await send(url, "late", 600);
      expect(await receive(url)).toEqual([]);
      const { Attributes } = await clients.sqs.send(
        new GetQueueAttributesCommand({ QueueUrl: url, AttributeNames: ["ApproximateNumberOfMessagesDelayed"] }),
      );
      expect(Attributes).toEqual({ ApproximateNumberOfMessagesDelayed: "1" });
      const startMs = performance.now();
      await send(url, "soon", 3);
      expect(bodies(await receive(url, { wait: 20 }))).toEqual(["soon"]);
      expect(performance.now() - startMs).toBeGreaterThan(2_900);
    });

    test("a long poll is answered when a message comes", async () => {
      const url = await freshQueue();
      const startMs = performance.now();
      const polled = receive(url, { wait: 20 });
      await Bun.sleep(300);
      await send(url, "a");
      expect(bodies(await polled)).toEqual(["a"]);
      expect(performance.now() - startMs).toBeLessThan(15_000);
    });

    test("after the receives that a redrive policy allows, a message goes to the dead letters", async () => {
      const dead = await createQueue(clients.sqs, `${(await freshQueue()).split("/").pop()}-dead`);
      const url = await freshQueue({
        RedrivePolicy: JSON.stringify({ deadLetterTargetArn: dead.arn, maxReceiveCount: 2 }),
      });
      await send(url, "poison");
      for (let i = 0; i < 2; i++) expect(bodies(await receive(url, { visibility: 0 }))).toEqual(["poison"]);
      expect(await receive(url, { visibility: 0 })).toEqual([]);
      expect(bodies(await receive(dead.url, { wait: 10 }))).toEqual(["poison"]);
    });

    test("a deleted message does not come again, and may be deleted twice", async () => {
      const url = await freshQueue();
      await send(url, "a");
      const [message] = await receive(url, { visibility: 0 });
      const remove = new DeleteMessageCommand({ QueueUrl: url, ReceiptHandle: message?.ReceiptHandle });
      await clients.sqs.send(remove);
      expect(await receive(url)).toEqual([]);
      await clients.sqs.send(remove);
    });

    test("batches: ten entries pass, and each is answered", async () => {
      const url = await freshQueue();
      const Entries = Array.from({ length: 10 }, (_, i) => ({ Id: `m${i}`, MessageBody: `body ${i}` }));
      const sent = await clients.sqs.send(new SendMessageBatchCommand({ QueueUrl: url, Entries }));
      expect(sent.Successful?.map((entry) => entry.Id).sort()).toEqual(Entries.map((entry) => entry.Id));
      const messages = await receive(url, { visibility: 30 });
      expect(bodies(messages)).toEqual(Entries.map((entry) => entry.MessageBody));
      const deleted = await clients.sqs.send(
        new DeleteMessageBatchCommand({
          QueueUrl: url,
          Entries: messages.map(({ ReceiptHandle }, i) => ({ Id: `${i}`, ReceiptHandle })),
        }),
      );
      expect(deleted.Successful?.length).toBe(10);
      expect(await receive(url)).toEqual([]);
    });

    test("batches: more than ten, none, and the same ID twice are refused", async () => {
      const url = await freshQueue();
      const entries = (ids: string[]) => ids.map((Id) => ({ Id, MessageBody: "a" }));
      const sendAll = (ids: string[]) =>
        refusal(clients.sqs.send(new SendMessageBatchCommand({ QueueUrl: url, Entries: entries(ids) })));
      const eleven = Array.from({ length: 11 }, (_, i) => String(i));
      expect(await sendAll(eleven)).toEqual({ name: "TooManyEntriesInBatchRequest", status: 400 });
      expect(await sendAll([])).toEqual({ name: "EmptyBatchRequest", status: 400 });
      expect(await sendAll(["a", "a"])).toEqual({ name: "BatchEntryIdsNotDistinct", status: 400 });
      expect(await receive(url)).toEqual([]);
    });

    test("batches: one entry may fail alone", async () => {
      const url = await freshQueue();
      const sent = await clients.sqs.send(
        new SendMessageBatchCommand({
          QueueUrl: url,
          Entries: [
            { Id: "too-late", MessageBody: "a", DelaySeconds: 901 },
            { Id: "fine", MessageBody: "b" },
          ],
        }),
      );
      expect(sent.Successful?.map((entry) => entry.Id)).toEqual(["fine"]);
      expect(sent.Failed).toMatchObject([{ Id: "too-late", SenderFault: true, Code: "InvalidParameterValue" }]);
      const [message] = await receive(url, { visibility: 30 });
      const changed = await clients.sqs.send(
        new ChangeMessageVisibilityBatchCommand({
          QueueUrl: url,
          Entries: [
            { Id: "bad", ReceiptHandle: "nonsense", VisibilityTimeout: 0 },
            { Id: "good", ReceiptHandle: message?.ReceiptHandle, VisibilityTimeout: 0 },
          ],
        }),
      );
      expect(changed.Successful?.map((entry) => entry.Id)).toEqual(["good"]);
      expect(changed.Failed).toMatchObject([{ Id: "bad", SenderFault: true, Code: "ReceiptHandleIsInvalid" }]);
    });

    test("numbers beyond their limits are InvalidParameterValue", async () => {
      const url = await freshQueue();
      const invalid = { name: "InvalidParameterValue", status: 400 };
      expect(await refusal(send(url, "a", 901))).toEqual(invalid);
      expect(await refusal(receive(url, { max: 11 }))).toEqual(invalid);
      expect(await refusal(receive(url, { wait: 21 }))).toEqual(invalid);
      await send(url, "a");
      const [message] = await receive(url);
      const change = new ChangeMessageVisibilityCommand({
        QueueUrl: url,
        ReceiptHandle: message?.ReceiptHandle,
        VisibilityTimeout: 43_201,
      });
      expect(await refusal(clients.sqs.send(change))).toEqual(invalid);
    });

    test("a receipt handle that is none is ReceiptHandleIsInvalid", async () => {
      const url = await freshQueue();
      const remove = new DeleteMessageCommand({ QueueUrl: url, ReceiptHandle: "nonsense" });
      expect((await refusal(clients.sqs.send(remove))).name).toBe("ReceiptHandleIsInvalid");
    });

    test("a queue that does not exist is QueueDoesNotExist", async () => {
      const url = `${await freshQueue()}-not`;
      const gone = { name: "QueueDoesNotExist", status: 400 };
      expect(await refusal(receive(url))).toEqual(gone);
      expect(await refusal(send(url, "a"))).toEqual(gone);
      expect(await refusal(clients.sqs.send(new GetQueueUrlCommand({ QueueName: "nobody" })))).toEqual(gone);
    });

    test("a queue is made once; with other attributes it is QueueNameExists", async () => {
      const url = await freshQueue({ VisibilityTimeout: "40" });
      const QueueName = url.split("/").pop();
      const make = (VisibilityTimeout: string) =>
        clients.sqs.send(new CreateQueueCommand({ QueueName, Attributes: { VisibilityTimeout } }));
      expect((await make("40")).QueueUrl).toBe(url);
      expect(await refusal(make("41"))).toEqual({ name: "QueueNameExists", status: 400 });
    });

    test("attributes: what was set, what it holds, its ARN; an unknown one is refused", async () => {
      const url = await freshQueue({ VisibilityTimeout: "40" });
      await send(url, "a");
      await send(url, "b");
      await receive(url, { max: 1, visibility: 30 });
      const { Attributes } = await clients.sqs.send(new GetQueueAttributesCommand({ QueueUrl: url, AttributeNames: ["All"] }));
      expect(Attributes).toMatchObject({
        VisibilityTimeout: "40",
        ApproximateNumberOfMessages: "1",
        ApproximateNumberOfMessagesNotVisible: "1",
        QueueArn: expect.stringMatching(/^arn:aws:sqs:us-east-2:\d{12}:q-\d+$/),
      });
      const unknown = new GetQueueAttributesCommand({
        QueueUrl: url,
        AttributeNames: ["Colour" as QueueAttributeName],
      });
      expect(await refusal(clients.sqs.send(unknown))).toEqual({ name: "InvalidAttributeName", status: 400 });
    });
  });

  // --- S3 ------------------------------------------------------------------------------------------------------

  describe("S3", () => {
    test("an object comes back as it was put, with a digest for an ETag", async () => {
      const { bucket } = await target.scene();
      const Key = "conf/service config+1.json";
      const put = await clients.s3.send(new PutObjectCommand({ Bucket: bucket, Key, Body: `{"é":"<&>"}` }));
      const got = await clients.s3.send(new GetObjectCommand({ Bucket: bucket, Key }));
      expect(await got.Body?.transformToString()).toBe(`{"é":"<&>"}`);
      expect(got).toMatchObject({ ETag: put.ETag, ContentLength: 12 });
      expect(put.ETag).toMatch(/^"[0-9a-f]{32}"$/);
      expect(got.LastModified).toBeInstanceOf(Date);
    });

    test("what has not changed since an ETag is a 304", async () => {
      const { bucket } = await target.scene();
      const put = await clients.s3.send(new PutObjectCommand({ Bucket: bucket, Key: "k", Body: "a" }));
      const get = new GetObjectCommand({ Bucket: bucket, Key: "k", IfNoneMatch: put.ETag });
      expect((await refusal(clients.s3.send(get))).status).toBe(304);
    });

    test("a missing key, a missing bucket", async () => {
      const { bucket } = await target.scene();
      const get = (Bucket: string) => refusal(clients.s3.send(new GetObjectCommand({ Bucket, Key: "nothing" })));
      expect(await get(bucket)).toEqual({ name: "NoSuchKey", status: 404 });
      expect(await get("no-such-bucket")).toEqual({ name: "NoSuchBucket", status: 404 });
    });

    test("HeadBucket says where a bucket is, and is NotFound without one", async () => {
      const { bucket } = await target.scene();
      const { BucketRegion } = await clients.s3.send(new HeadBucketCommand({ Bucket: bucket }));
      expect(BucketRegion).toBe(REGION);
      const none = new HeadBucketCommand({ Bucket: "no-such-bucket" });
      expect(await refusal(clients.s3.send(none))).toEqual({ name: "NotFound", status: 404 });
    });
  });
});

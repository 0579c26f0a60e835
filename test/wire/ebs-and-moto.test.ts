// The same questions about volumes to moto and to the simulator, over HTTP, through the SDK's client. Where moto agrees
// with AWS, the simulator has to agree with moto.
//
// moto is laxer than AWS: it attaches any volume anywhere (in use, another zone, a taken device, an instance of any
// state), knows no limits of size and IOPS and no client token, takes DeleteOnTermination for false where it is left
// out, has no state between two, answers an unknown device with HTTP 500, and has other names for a detach of what is
// not attached and for IOPS that a type does not take. Nothing is asked about these.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  AttachVolumeCommand,
  CreateSnapshotCommand,
  CreateTagsCommand,
  CreateVolumeCommand,
  type CreateVolumeCommandInput,
  DeleteSnapshotCommand,
  DeleteTagsCommand,
  DeleteVolumeCommand,
  DescribeInstancesCommand,
  DescribeSnapshotsCommand,
  DescribeVolumesCommand,
  DetachVolumeCommand,
  type Filter,
  ModifyInstanceAttributeCommand,
  RunInstancesCommand,
  type Snapshot,
  TerminateInstancesCommand,
  type Volume,
} from "@aws-sdk/client-ec2";
import { destroyClients, IMAGE_ID, REGION, type SdkClients, sdkClients, setUp } from "./moto.ts";
import { refusal, startTargets, until } from "./targets.ts";

const GROUP = { name: "web", min: 1, max: 4, desired: 1 };
const ZONES = [`${REGION}a`, `${REGION}b`] as const;
const [ZONE] = ZONES;
const DEVICE = "/dev/sdf";
const NO_VOLUME = "vol-0123456789abcdef0";
const NO_SNAPSHOT = "snap-0123456789abcdef0";
const NO_INSTANCE = "i-0123456789abcdef0";
const SOON: [number, number] = [5, 20];

const targets = await startTargets(
  {
    ...{ pendingMs: SOON, shuttingDownMs: SOON, volumeCreatingMs: SOON, volumeAttachingMs: SOON },
    ...{ volumeDetachingMs: SOON, volumeReleaseMs: SOON, volumeDeletingMs: SOON, snapshotMs: SOON },
  },
  // A subnet of the first zone.
  (world) => world.createGroup({ ...GROUP, zones: [...ZONES] }).subnetIds[0] ?? "",
  async (clients) => {
    const { name: group, ...sizes } = GROUP;
    return (await setUp(clients, { group, ...sizes, zones: [...ZONES] })).subnetIds[0] ?? "";
  },
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

  /** A running instance with a data volume. */
  async function withData(DeleteOnTermination: boolean): Promise<{ instanceId: string; volumeId: string }> {
    const SubnetId = await target.scene();
    const { Instances } = await clients.ec2.send(
      new RunInstancesCommand({
        ImageId: IMAGE_ID,
        InstanceType: "m5.large",
        SubnetId,
        MinCount: 1,
        MaxCount: 1,
        BlockDeviceMappings: [{ DeviceName: DEVICE, Ebs: { VolumeSize: 7, VolumeType: "gp3", DeleteOnTermination } }],
      }),
    );
    const instanceId = Instances?.[0]?.InstanceId ?? "";
    await until(
      () => stateOf(instanceId),
      (state) => state === "running",
    );
    const [volume] = await volumesOf(instanceId);
    return { instanceId, volumeId: volume?.VolumeId ?? "" };
  }

  async function describeInstance(id: string) {
    const { Reservations } = await clients.ec2.send(new DescribeInstancesCommand({ InstanceIds: [id] }));
    return Reservations?.[0]?.Instances?.[0];
  }
  const stateOf = async (id: string) => (await describeInstance(id))?.State?.Name;
  const mappingOf = async (id: string, device = DEVICE) =>
    (await describeInstance(id))?.BlockDeviceMappings?.find(({ DeviceName }) => DeviceName === device)?.Ebs;

  const volumesWhere = async (Filters: Filter[]): Promise<Volume[]> =>
    (await clients.ec2.send(new DescribeVolumesCommand({ Filters }))).Volumes ?? [];
  const volumesOf = (instanceId: string, device = DEVICE) =>
    volumesWhere([
      { Name: "attachment.instance-id", Values: [instanceId] },
      { Name: "attachment.device", Values: [device] },
    ]);
  async function volume(id: string): Promise<Volume | undefined> {
    return (await clients.ec2.send(new DescribeVolumesCommand({ VolumeIds: [id] }))).Volumes?.[0];
  }
  const available = (id: string) =>
    until(
      () => volume(id),
      (found) => found?.State === "available",
    );

  const create = (input: Partial<CreateVolumeCommandInput> = {}) =>
    clients.ec2.send(new CreateVolumeCommand({ AvailabilityZone: ZONE, Size: 9, VolumeType: "gp3", ...input }));
  async function freeVolume(): Promise<string> {
    const { VolumeId = "" } = await create();
    await available(VolumeId);
    return VolumeId;
  }
  const attach = (VolumeId: string, InstanceId: string) =>
    clients.ec2.send(new AttachVolumeCommand({ VolumeId, InstanceId, Device: "/dev/sdz" }));
  async function completed(id: string): Promise<Snapshot | undefined> {
    const read = async () => (await clients.ec2.send(new DescribeSnapshotsCommand({ SnapshotIds: [id] }))).Snapshots?.[0];
    return until(read, (snapshot) => snapshot?.State === "completed");
  }

  const notFound = { name: "InvalidVolume.NotFound", status: 400 };

  test("a volume of the launch stands in the instance's mappings and has an attachment", async () => {
    const { instanceId, volumeId } = await withData(false);
    expect(await mappingOf(instanceId)).toMatchObject({
      ...{ VolumeId: volumeId, Status: "attached", DeleteOnTermination: false, AttachTime: expect.any(Date) },
    });
    expect(await volume(volumeId)).toMatchObject({
      ...{ Size: 7, VolumeType: "gp3", State: "in-use", AvailabilityZone: ZONE, Encrypted: false, Iops: 3000 },
      Attachments: [{ VolumeId: volumeId, InstanceId: instanceId, Device: DEVICE, State: "attached" }],
    });
  });

  test("DeleteOnTermination is changed on a running instance", async () => {
    const { instanceId } = await withData(true);
    expect((await mappingOf(instanceId))?.DeleteOnTermination).toBe(true);
    const change = (DryRun: boolean, InstanceId = instanceId) =>
      clients.ec2.send(
        new ModifyInstanceAttributeCommand({
          InstanceId,
          BlockDeviceMappings: [{ DeviceName: DEVICE, Ebs: { DeleteOnTermination: false } }],
          DryRun,
        }),
      );
    expect(await refusal(change(true))).toEqual({ name: "DryRunOperation", status: 412 });
    expect((await mappingOf(instanceId))?.DeleteOnTermination).toBe(true);
    await change(false);
    expect((await mappingOf(instanceId))?.DeleteOnTermination).toBe(false);
    expect(await refusal(change(false, NO_INSTANCE))).toEqual({ name: "InvalidInstanceID.NotFound", status: 400 });
  });

  test.each([true, false])("at the end of the instance, with DeleteOnTermination %p", async (ends) => {
    const { instanceId, volumeId } = await withData(ends);
    await clients.ec2.send(new TerminateInstancesCommand({ InstanceIds: [instanceId] }));
    await until(
      () => stateOf(instanceId),
      (state) => state === "terminated",
    );
    if (ends) expect(await refusal(volume(volumeId))).toEqual(notFound);
    else expect((await available(volumeId))?.Attachments ?? []).toEqual([]);
  });

  test("a volume is made with what was asked for, tags and all", async () => {
    await target.scene();
    const made = await create({
      Iops: 4000,
      Throughput: 250,
      TagSpecifications: [{ ResourceType: "volume", Tags: [{ Key: "a&b", Value: "<é>" }] }],
    });
    const found = await available(made.VolumeId ?? "");
    expect(found).toMatchObject({
      Size: 9,
      VolumeType: "gp3",
      Iops: 4000,
      Throughput: 250,
      AvailabilityZone: ZONE,
      Encrypted: false,
    });
    expect(found?.CreateTime).toBeInstanceOf(Date);
    expect(found?.Tags).toEqual([{ Key: "a&b", Value: "<é>" }]);
    expect(made.Tags).toEqual([{ Key: "a&b", Value: "<é>" }]);
  });

  test("without size and snapshot, with a key but unencrypted, in a dry run no volume is made", async () => {
    await target.scene();
    const before = (await volumesWhere([])).length;
    expect(await refusal(create({ Size: undefined }))).toEqual({ name: "MissingParameter", status: 400 });
    expect(await refusal(create({ KmsKeyId: "alias/x" }))).toEqual({ name: "InvalidParameterDependency", status: 400 });
    expect(await refusal(create({ DryRun: true }))).toEqual({ name: "DryRunOperation", status: 412 });
    expect((await volumesWhere([])).length).toBe(before);
  });

  test("a volume is attached, seen from both sides, and detached", async () => {
    const { instanceId } = await withData(true);
    const id = await freeVolume();
    expect(await attach(id, instanceId)).toMatchObject({
      VolumeId: id,
      InstanceId: instanceId,
      Device: "/dev/sdz",
      State: "attaching",
    });
    await until(
      () => volume(id),
      (found) => found?.Attachments?.[0]?.State === "attached",
    );
    expect((await volume(id))?.State).toBe("in-use");
    expect(await mappingOf(instanceId, "/dev/sdz")).toMatchObject({
      VolumeId: id,
      Status: "attached",
      DeleteOnTermination: false,
    });
    expect((await volumesOf(instanceId, "/dev/sd*")).length).toBeGreaterThanOrEqual(2);
    const detach = new DetachVolumeCommand({ VolumeId: id, InstanceId: instanceId });
    expect(await clients.ec2.send(detach)).toMatchObject({ VolumeId: id, State: expect.stringMatching(/^detach/) });
    await available(id);
    expect(await mappingOf(instanceId, "/dev/sdz")).toBeUndefined();
    expect(await volumesOf(instanceId, "/dev/sdz")).toEqual([]);
  });

  test("what does not exist is NotFound, by its kind", async () => {
    const { instanceId } = await withData(true);
    const id = await freeVolume();
    const send = clients.ec2;
    expect(await refusal(volume(NO_VOLUME))).toEqual(notFound);
    expect(await refusal(attach(NO_VOLUME, instanceId))).toEqual(notFound);
    expect(await refusal(attach(id, NO_INSTANCE))).toEqual({ name: "InvalidInstanceID.NotFound", status: 400 });
    expect(await refusal(send.send(new DetachVolumeCommand({ VolumeId: NO_VOLUME, InstanceId: instanceId })))).toEqual(notFound);
    expect(await refusal(send.send(new DeleteVolumeCommand({ VolumeId: NO_VOLUME })))).toEqual(notFound);
    expect(await refusal(send.send(new CreateSnapshotCommand({ VolumeId: NO_VOLUME })))).toEqual(notFound);
    const noSnapshot = { name: "InvalidSnapshot.NotFound", status: 400 };
    expect(await refusal(create({ SnapshotId: NO_SNAPSHOT }))).toEqual(noSnapshot);
    expect(await refusal(send.send(new DescribeSnapshotsCommand({ SnapshotIds: [NO_SNAPSHOT] })))).toEqual(noSnapshot);
    expect(await refusal(send.send(new DeleteSnapshotCommand({ SnapshotId: NO_SNAPSHOT })))).toEqual(noSnapshot);
  });

  test("an attached volume cannot be deleted; a free one is gone", async () => {
    const { volumeId } = await withData(true);
    const remove = (VolumeId: string, DryRun = false) => clients.ec2.send(new DeleteVolumeCommand({ VolumeId, DryRun }));
    expect(await refusal(remove(volumeId))).toEqual({ name: "VolumeInUse", status: 400 });
    const id = await freeVolume();
    expect(await refusal(remove(id, true))).toEqual({ name: "DryRunOperation", status: 412 });
    await remove(id);
    const gone = await until(
      () =>
        volume(id).then(
          () => undefined,
          (error: unknown) => error,
        ),
      (error) => error instanceof Error,
    );
    expect(gone).toMatchObject({ name: "InvalidVolume.NotFound" });
  });

  test("a snapshot of a volume in use, and a volume made from it in another zone", async () => {
    const { volumeId } = await withData(true);
    const made = await clients.ec2.send(
      new CreateSnapshotCommand({
        VolumeId: volumeId,
        Description: "of a & b",
        TagSpecifications: [{ ResourceType: "snapshot", Tags: [{ Key: "k", Value: "v" }] }],
      }),
    );
    expect(made).toMatchObject({ VolumeId: volumeId, VolumeSize: 7, Description: "of a & b", Encrypted: false });
    expect(made.StartTime).toBeInstanceOf(Date);
    const id = made.SnapshotId ?? "";
    expect(await completed(id)).toMatchObject({
      VolumeId: volumeId,
      VolumeSize: 7,
      Progress: "100%",
      Tags: [{ Key: "k", Value: "v" }],
    });
    const copy = await create({ SnapshotId: id, Size: undefined, AvailabilityZone: ZONES[1] });
    expect(await available(copy.VolumeId ?? "")).toMatchObject({ SnapshotId: id, Size: 7, AvailabilityZone: ZONES[1] });
    await clients.ec2.send(new DeleteSnapshotCommand({ SnapshotId: id }));
    const again = new DescribeSnapshotsCommand({ SnapshotIds: [id] });
    expect(await refusal(clients.ec2.send(again))).toEqual({ name: "InvalidSnapshot.NotFound", status: 400 });
  });

  test("filters: each must match, by any value, with wildcards", async () => {
    await target.scene();
    const [a, b] = [await freeVolume(), await freeVolume()];
    const { SnapshotId: snapshot = "" } = await clients.ec2.send(new CreateSnapshotCommand({ VolumeId: a }));
    await clients.ec2.send(
      new CreateTagsCommand({ Resources: [a, snapshot], Tags: [{ Key: "spotmax:of", Value: "i-1 /dev/sdf" }] }),
    );
    const found = async (...filters: [string, ...string[]][]) =>
      (await volumesWhere(filters.map(([Name, ...Values]) => ({ Name, Values })))).map(({ VolumeId = "" }) => VolumeId).sort();
    expect(await found(["volume-id", a, b])).toEqual([a, b].sort());
    expect(await found(["volume-id", a, b], ["tag-key", "spotmax:of"])).toEqual([a]);
    expect(await found(["tag:spotmax:of", "i-1 *"])).toEqual([a]);
    expect(await found(["status", "available"], ["tag:spotmax:of", "i-1 /dev/sd?"])).toEqual([a]);
    expect(await found(["status", "in-use"], ["volume-id", a])).toEqual([]);
    const snapshots = async (Name: string, Value: string) => {
      const input = { OwnerIds: ["self"], Filters: [{ Name, Values: [Value] }] };
      return ((await clients.ec2.send(new DescribeSnapshotsCommand(input))).Snapshots ?? []).map(
        ({ SnapshotId = "" }) => SnapshotId,
      );
    };
    expect(await snapshots("volume-id", a)).toEqual([snapshot]);
    expect(await snapshots("volume-id", b)).toEqual([]);
    expect(await snapshots("tag:spotmax:of", "i-1*")).toEqual([snapshot]);
    await completed(snapshot);
    expect(await snapshots("status", "completed")).toEqual([snapshot]);
    await clients.ec2.send(new DeleteTagsCommand({ Resources: [a, snapshot], Tags: [{ Key: "spotmax:of" }] }));
    expect(await found(["tag-key", "spotmax:of"])).toEqual([]);
    expect(await snapshots("tag-key", "spotmax:of")).toEqual([]);
  });
});

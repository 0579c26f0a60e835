// The simulator's rules of EBS: what AWS refuses, it must refuse; what AWS keeps, it must keep. Each test names one.
import { afterAll, describe, expect, test } from "bun:test";
import {
  AttachVolumeCommand,
  CreateSnapshotCommand,
  CreateTagsCommand,
  CreateVolumeCommand,
  DeleteSnapshotCommand,
  DeleteVolumeCommand,
  DescribeInstancesCommand,
  DescribeSnapshotsCommand,
  DescribeVolumesCommand,
  DetachVolumeCommand,
  EC2Client,
  type Instance as Ec2Instance,
  type Snapshot as Ec2Snapshot,
  type Volume as Ec2Volume,
  ModifyInstanceAttributeCommand,
} from "@aws-sdk/client-ec2";
import { RealClock, VirtualClock } from "../aws/clock.ts";
import type { VolumeSpec } from "../aws/ebs.ts";
import { serve } from "../aws/server.ts";
import { AwsError, type GroupSpec, World, type WorldOptions } from "../aws/world.ts";
import { fails, run } from "./calls.ts";

const DATA: VolumeSpec = { device: "/dev/sdf", sizeGiB: 100, type: "gp3" };
const ZONE = "us-east-1a";

function setUp(options: Partial<WorldOptions> = {}) {
  const clock = new VirtualClock();
  const world = new World({ clock, checkOutputs: true, ...options });
  const { ec2 } = world;
  /** One call to EC2 to its end: the time that it takes passes. */
  const call = <T = Record<string, unknown>>(operation: string, input: object): Promise<T> =>
    run(clock, world.call("ec2", operation, input)) as Promise<T>;
  const describeVolumes = async (input: object = {}) => (await call<{ Volumes: Ec2Volume[] }>("DescribeVolumes", input)).Volumes;
  const describeVolume = async (id: string) => only(await describeVolumes({ VolumeIds: [id] }));
  const describeSnapshots = async (input: object = {}) =>
    (await call<{ Snapshots: Ec2Snapshot[] }>("DescribeSnapshots", input)).Snapshots;
  const describeInstance = async (id: string) => {
    type Answer = { Reservations: { Instances: Ec2Instance[] }[] };
    const { Reservations } = await call<Answer>("DescribeInstances", { InstanceIds: [id] });
    return only(Reservations.flatMap(({ Instances }) => Instances));
  };
  const createVolume = (input: object = {}) =>
    call<Ec2Volume & { VolumeId: string }>("CreateVolume", { AvailabilityZone: ZONE, Size: 10, ...input });
  const createSnapshot = (VolumeId: string, input: object = {}) =>
    call<Ec2Snapshot & { SnapshotId: string }>("CreateSnapshot", { VolumeId, ...input });
  const attach = (VolumeId: string, InstanceId: string, Device = "/dev/sdz", input: object = {}) =>
    call("AttachVolume", { VolumeId, InstanceId, Device, ...input });
  const detach = (VolumeId: string, input: object = {}) => call("DetachVolume", { VolumeId, ...input });
  const keep = (InstanceId: string, DeviceName = "/dev/sdf", DeleteOnTermination: boolean | undefined = false) =>
    call("ModifyInstanceAttribute", { InstanceId, BlockDeviceMappings: [{ DeviceName, Ebs: { DeleteOnTermination } }] });
  const state = (id: string) => ec2.volumes.get(id)?.state;
  /** A running instance with a data volume. */
  const withData = (volume: Partial<VolumeSpec> = {}) => {
    const { id } = world.createInstance({ volumes: [{ ...DATA, ...volume }] });
    return { id, dataId: only(ec2.ebs.attachedTo(id, volume.device ?? DATA.device)).id };
  };
  const whats = () => world.audit.filter(({ what }) => /^(?:volume|snapshot) /.test(what)).map(({ what }) => what);
  const calls = { call, describeVolumes, describeVolume, describeSnapshots, describeInstance, createVolume, createSnapshot };
  return { clock, world, ec2, ebs: ec2.ebs, ...calls, attach, detach, keep, state, withData, whats };
}

function only<T>(items: T[]): T {
  expect(items).toHaveLength(1);
  return items[0] as T;
}

const GROUP: GroupSpec = { name: "web", min: 1, max: 4, desired: 1, zones: [ZONE] };
const NO_VOLUME = "vol-0aaaaaaaaaaaaaaaa";
const NO_SNAPSHOT = "snap-0aaaaaaaaaaaaaaaa";
const NO_INSTANCE = "i-0aaaaaaaaaaaaaaaa";

describe("volumes of instances", () => {
  test("an instance has a root volume, and one for each mapping of its group's template", async () => {
    const { world, describeInstance, describeVolumes } = setUp();
    const { instanceIds } = world.createGroup({
      ...GROUP,
      volumes: [DATA, { device: "/dev/sdg", sizeGiB: 5, deleteOnTermination: false }],
    });
    const id = only(instanceIds);
    const { RootDeviceName, BlockDeviceMappings: mappings = [] } = await describeInstance(id);
    expect(RootDeviceName).toBe("/dev/xvda");
    expect(mappings.map(({ DeviceName, Ebs }) => [DeviceName, Ebs?.Status, Ebs?.DeleteOnTermination])).toEqual([
      ["/dev/xvda", "attached", true],
      ["/dev/sdf", "attached", true],
      ["/dev/sdg", "attached", false],
    ]);
    expect(mappings[0]?.Ebs?.VolumeId).toBe(world.instance(id).volumeId);
    expect(mappings[1]?.Ebs?.AttachTime).toEqual(new Date(world.instance(id).launchedAtMs));
    const volumes = await describeVolumes({ Filters: [{ Name: "attachment.instance-id", Values: [id] }] });
    expect(
      volumes.map(({ VolumeId, Size, VolumeType, State, AvailabilityZone }) => [
        VolumeId,
        Size,
        VolumeType,
        State,
        AvailabilityZone,
      ]),
    ).toEqual([
      [mappings[0]?.Ebs?.VolumeId, 8, "gp3", "in-use", ZONE],
      [mappings[1]?.Ebs?.VolumeId, 100, "gp3", "in-use", ZONE],
      [mappings[2]?.Ebs?.VolumeId, 5, "gp2", "in-use", ZONE],
    ]);
    expect(volumes[1]?.Attachments).toEqual([
      {
        VolumeId: mappings[1]?.Ebs?.VolumeId,
        InstanceId: id,
        Device: "/dev/sdf",
        State: "attached",
        AttachTime: new Date(world.instance(id).launchedAtMs),
        DeleteOnTermination: true,
      },
    ]);
  });

  test("what the group, RunInstances and CreateFleet launch gets the template's volumes, with its tags for volumes", async () => {
    const { world, clock, call, ebs } = setUp({ reactionMs: [0, 0] });
    const template = {
      TagSpecifications: [{ ResourceType: "volume" as const, Tags: [{ Key: "for", Value: "data" }] }],
    };
    const { templateId, subnetIds, instanceIds } = world.createGroup({ ...GROUP, volumes: [DATA], template });
    const named = { LaunchTemplateId: templateId, Version: "$Default" };
    await run(clock, world.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 2 }));
    const ran = await call<{ Instances: Ec2Instance[] }>("RunInstances", {
      LaunchTemplate: named,
      InstanceType: "m5.large",
      SubnetId: subnetIds[0],
      MinCount: 1,
      MaxCount: 1,
      BlockDeviceMappings: [{ DeviceName: "/dev/sdf", Ebs: { VolumeSize: 200 } }],
    });
    // As AWS: nothing is attached when it answers.
    expect(only(ran.Instances).BlockDeviceMappings).toEqual([]);
    await call("CreateFleet", {
      Type: "instant",
      LaunchTemplateConfigs: [
        { LaunchTemplateSpecification: named, Overrides: [{ InstanceType: "m5.large", SubnetId: subnetIds[0] }] },
      ],
      TargetCapacitySpecification: { TotalTargetCapacity: 1, DefaultTargetCapacityType: "spot" },
      TagSpecifications: [{ ResourceType: "volume", Tags: [{ Key: "by", Value: "fleet" }] }],
    });
    await clock.advance(20_000);
    const data = [...world.ec2.instances.keys()].map((id) => only(ebs.attachedTo(id, "/dev/sdf")));
    expect(data).toHaveLength(4);
    expect(data.map(({ sizeGiB }) => sizeGiB).sort()).toEqual([100, 100, 100, 200]);
    for (const { type, tags } of data) expect([type, tags.get("for")]).toEqual(["gp3", "data"]);
    expect(data.filter(({ tags }) => tags.get("by") === "fleet")).toHaveLength(1);
    expect(data[0]?.attachment?.instanceId).toBe(instanceIds[0]);
  });

  test("a mapping may shape the root, and one with NoDevice takes a template's volume away", async () => {
    const { world, call, ec2, ebs } = setUp();
    const { templateId, subnetIds } = world.createGroup({ ...GROUP, types: ["m5.large"], volumes: [DATA] });
    const { Instances } = await call<{ Instances: Ec2Instance[] }>("RunInstances", {
      LaunchTemplate: { LaunchTemplateId: templateId },
      SubnetId: subnetIds[0],
      MinCount: 1,
      MaxCount: 1,
      BlockDeviceMappings: [
        { DeviceName: "/dev/xvda", Ebs: { VolumeSize: 30, DeleteOnTermination: false } },
        { DeviceName: "/dev/sdf", NoDevice: "" },
      ],
    });
    const id = only(Instances).InstanceId ?? "";
    const root = only(ebs.attachedTo(id));
    expect([root.id, root.sizeGiB, root.type]).toEqual([ec2.instances.get(id)?.volumeId ?? "", 30, "gp3"]);
    expect(root.attachment?.deleteOnTermination).toBe(false);
  });

  test("a template whose volumes EC2 refuses launches nothing: an error of the call, of the override, of the activity", async () => {
    const { world, clock, call } = setUp({ reactionMs: [0, 0] });
    const { templateId, subnetIds } = world.createGroup({
      ...GROUP,
      desired: 0,
      min: 0,
      types: ["m5.large"],
      template: { BlockDeviceMappings: [{ DeviceName: "/dev/sdf", Ebs: { VolumeSize: 10, VolumeType: "st1" } }] },
    });
    const named = { LaunchTemplateId: templateId, Version: "$Default" };
    const launch = (BlockDeviceMappings: object[] = []) =>
      call("RunInstances", { LaunchTemplate: named, SubnetId: subnetIds[0], MinCount: 1, MaxCount: 1, BlockDeviceMappings });
    await fails(launch(), "InvalidParameterValue", "Volume of 10GiB is too small; minimum is 125GiB.");
    const fleet = await call<{ Errors: { ErrorCode: string }[]; Instances: object[] }>("CreateFleet", {
      Type: "instant",
      LaunchTemplateConfigs: [
        { LaunchTemplateSpecification: named, Overrides: [{ InstanceType: "m5.large", SubnetId: subnetIds[0] }] },
      ],
      TargetCapacitySpecification: { TotalTargetCapacity: 1, DefaultTargetCapacityType: "on-demand" },
    });
    expect(fleet).toMatchObject({ Instances: [], Errors: [{ ErrorCode: "InvalidParameterValue" }] });
    await run(clock, world.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 1 }));
    await clock.advance(1000);
    expect(world.audit.filter(({ what }) => what === "group launch failed").length).toBeGreaterThan(0);
    expect(world.ec2.instances.size).toBe(0);
    expect(world.ec2.volumes.size).toBe(0);
    const fixed = { DeviceName: "/dev/sdf", Ebs: { VolumeSize: 125 } };
    await fails(
      launch([fixed, { DeviceName: "/dev/xvdf", Ebs: { VolumeSize: 1 } }]),
      "InvalidBlockDeviceMapping",
      /more than one/,
    );
    await fails(launch([fixed, { DeviceName: "/dev/sdf1", Ebs: { VolumeSize: 1 } }]), "InvalidBlockDeviceMapping");
    await fails(launch([fixed, { DeviceName: "/dev/sdg" }]), "MissingParameter");
    await fails(launch([fixed, { DeviceName: "/dev/sdg", Ebs: {} }]), "MissingParameter");
    await fails(launch([fixed, { DeviceName: "/dev/sdg", Ebs: { SnapshotId: NO_SNAPSHOT } }]), "InvalidSnapshot.NotFound");
    await launch([fixed]);
  });

  test("with a KMS key that the caller may not use, an instance dies while pending and a volume is gone without a word", async () => {
    const { world, clock, call, ebs, ec2, createVolume, describeVolume, describeInstance } = setUp();
    const kmsKeyId = "arn:aws:kms:us-east-1:1:key/x";
    ebs.unusableKeys.add(kmsKeyId);
    const { templateId, subnetIds } = world.createGroup({
      ...GROUP,
      desired: 0,
      min: 0,
      types: ["m5.large"],
      volumes: [{ ...DATA, encrypted: true, kmsKeyId }],
    });
    const { Instances } = await call<{ Instances: Ec2Instance[] }>("RunInstances", {
      LaunchTemplate: { LaunchTemplateId: templateId },
      SubnetId: subnetIds[0],
      MinCount: 1,
      MaxCount: 1,
    });
    const { VolumeId } = await createVolume({ Encrypted: true, KmsKeyId: kmsKeyId });
    expect((await describeVolume(VolumeId)).State).toBe("creating");
    await clock.advance(20_000);
    const { State, StateReason } = await describeInstance(only(Instances).InstanceId ?? "");
    expect([State?.Name, StateReason?.Code]).toEqual(["terminated", "Client.InternalError"]);
    await fails(describeVolume(VolumeId), "InvalidVolume.NotFound");
    for (const { state } of ec2.volumes.values()) expect(state).toBe("deleted");
  });

  test("at its end an instance takes its volumes with it; one that outlives it is available seconds after terminated", async () => {
    const { world, clock, ec2, ebs, keep, state, withData, describeVolume, describeVolumes, describeInstance, whats } = setUp();
    const { id, dataId } = withData();
    const { dataId: otherId, id: other } = withData();
    const rootId = world.instance(id).volumeId;
    ec2.write(dataId, "precious");
    await keep(id);
    ec2.terminate(world.instance(id), "Client.x: x");
    ec2.terminate(world.instance(other), "Client.x: x");
    expect([state(dataId), state(otherId)]).toEqual(["in-use", "in-use"]);
    await clock.runUntil(() => world.instance(id).state === "terminated" && world.instance(other).state === "terminated", 60_000);
    const terminatedMs = world.instance(id).terminatedAtMs ?? 0;
    expect([state(rootId), state(otherId), state(dataId)]).toEqual(["deleted", "deleted", "in-use"]);
    expect((await describeInstance(id)).BlockDeviceMappings).toEqual([]);
    await clock.runUntil(() => state(dataId) === "available", 10_000);
    expect(clock.now() - terminatedMs).toBeGreaterThanOrEqual(1000);
    expect(clock.now() - terminatedMs).toBeLessThanOrEqual(10_000);
    expect(await describeVolume(dataId)).toMatchObject({ State: "available", Attachments: [] });
    expect(await describeVolumes()).toHaveLength(1);
    await fails(describeVolume(rootId), "InvalidVolume.NotFound", `The volume '${rootId}' does not exist.`);
    expect(ec2.dataOf(dataId)).toEqual({ lineage: [ec2.dataOf(dataId).lineage[0] ?? ""], writes: ["precious"], clean: true });
    expect(() => ec2.dataOf(otherId)).toThrow(otherId);
    expect(ebs.attachedTo(id)).toEqual([]);
    expect(whats().slice(-3)).toEqual(["volume attribute", "volume delete", "volume detached"]);
  });

  test("the time from terminated to available can be set", async () => {
    const { world, clock, ec2, state, withData } = setUp({ volumeReleaseMs: [90_000, 90_000], shuttingDownMs: [0, 0] });
    const { id, dataId } = withData({ deleteOnTermination: false });
    ec2.terminate(world.instance(id), "Client.x: x");
    await clock.advance(89_999);
    expect(state(dataId)).toBe("in-use");
    await clock.advance(1);
    expect(state(dataId)).toBe("available");
  });

  test("a reclaimed instance that is stopped keeps its volumes, and has none mounted", async () => {
    const { world, clock, ec2, ebs, state, withData } = setUp();
    const { id, dataId } = withData();
    ebs.mount(dataId);
    ec2.reclaim(world.instance(id), "stop");
    await clock.advance(40_000);
    expect([world.instance(id).state, state(dataId), ec2.volumes.get(dataId)?.mounted]).toEqual(["stopped", "in-use", false]);
  });
});

describe("ModifyInstanceAttribute", () => {
  test("DeleteOnTermination is set, and true where the value is left out", async () => {
    const { call, keep, withData, describeInstance, describeVolume } = setUp();
    const { id, dataId } = withData();
    const flag = async () => (await describeInstance(id)).BlockDeviceMappings?.[1]?.Ebs?.DeleteOnTermination;
    await keep(id);
    expect(await flag()).toBe(false);
    expect((await describeVolume(dataId)).Attachments?.[0]?.DeleteOnTermination).toBe(false);
    await call("ModifyInstanceAttribute", { InstanceId: id, BlockDeviceMappings: [{ DeviceName: "/dev/sdf" }] });
    expect(await flag()).toBe(true);
    await keep(id);
    const BlockDeviceMappings = [{ DeviceName: "/dev/sdf", Ebs: { VolumeId: dataId } }];
    await call("ModifyInstanceAttribute", { InstanceId: id, BlockDeviceMappings });
    expect(await flag()).toBe(true);
  });

  test("an unknown device is InvalidInstanceAttributeValue, and nothing of the call is done", async () => {
    const { call, ec2, keep, withData } = setUp();
    const { id, dataId } = withData();
    await fails(keep(id, "/dev/sdg"), "InvalidInstanceAttributeValue", "No device is currently mapped at /dev/sdg");
    const BlockDeviceMappings = ["/dev/sdf", "/dev/sdg"].map((DeviceName) => ({
      DeviceName,
      Ebs: { DeleteOnTermination: false },
    }));
    await fails(call("ModifyInstanceAttribute", { InstanceId: id, BlockDeviceMappings }), "InvalidInstanceAttributeValue");
    const wrong = [{ DeviceName: "/dev/sdf", Ebs: { VolumeId: NO_VOLUME, DeleteOnTermination: false } }];
    await fails(call("ModifyInstanceAttribute", { InstanceId: id, BlockDeviceMappings: wrong }), "InvalidInstanceAttributeValue");
    const dry = { InstanceId: id, BlockDeviceMappings: BlockDeviceMappings.slice(0, 1), DryRun: true };
    await fails(call("ModifyInstanceAttribute", dry), "DryRunOperation");
    expect(ec2.volumes.get(dataId)?.attachment?.deleteOnTermination).toBe(true);
  });

  test("an instance that is ending cannot be changed any more, one that is stopped can; an unknown one is NotFound", async () => {
    const { world, clock, ec2, call, keep, withData } = setUp();
    const { id } = withData();
    await fails(keep(NO_INSTANCE), "InvalidInstanceID.NotFound");
    await fails(keep("x"), "InvalidInstanceID.Malformed");
    await fails(call("ModifyInstanceAttribute", { InstanceId: id }), "InvalidParameterCombination", "No attributes specified.");
    ec2.terminate(world.instance(id), "Client.x: x");
    await fails(keep(id), "IncorrectInstanceState");
    await clock.advance(60_000);
    await fails(keep(id), "IncorrectInstanceState");
    const stopped = withData();
    ec2.reclaim(world.instance(stopped.id), "stop");
    await clock.advance(60_000);
    await keep(stopped.id);
  });
});

describe("attaching", () => {
  test("a volume is attaching, then attached, and does not end with its instance", async () => {
    const { world, clock, ec2, ebs, state, attach, describeVolume, describeInstance, whats } = setUp();
    const { id } = world.createInstance({});
    const volume = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    ec2.write(volume.id, "x");
    expect(await attach(volume.id, id)).toMatchObject({ State: "attaching", Device: "/dev/sdz", DeleteOnTermination: false });
    expect(await describeVolume(volume.id)).toMatchObject({ State: "in-use", Attachments: [{ State: "attaching" }] });
    await clock.advance(4_000);
    expect(await describeVolume(volume.id)).toMatchObject({ State: "in-use", Attachments: [{ State: "attached" }] });
    const [, mapping] = (await describeInstance(id)).BlockDeviceMappings ?? [];
    expect(mapping).toMatchObject({ DeviceName: "/dev/sdz", Ebs: { Status: "attached", DeleteOnTermination: false } });
    expect(whats()).toEqual(["volume create", "volume attach", "volume attached"]);
    ec2.terminate(world.instance(id), "Client.x: x");
    await clock.advance(60_000);
    expect([state(volume.id), ec2.dataOf(volume.id).writes]).toEqual(["available", ["x"]]);
  });

  test("it is not idempotent: an attached volume is VolumeInUse, whoever has it, and a fresh one is not available yet", async () => {
    const { world, ebs, attach, withData, createVolume } = setUp();
    const { id, dataId } = withData();
    await fails(attach(dataId, id, "/dev/sdf"), "VolumeInUse", `${dataId} is already attached to an instance`);
    const volume = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    await attach(volume.id, id);
    await fails(attach(volume.id, id), "VolumeInUse");
    await fails(attach(volume.id, world.createInstance({}).id), "VolumeInUse");
    const { VolumeId } = await createVolume();
    await fails(attach(VolumeId, id, "/dev/sdy"), "IncorrectState", `${VolumeId} is not 'available'.`);
  });

  test("the volume is in the instance's zone, the device is free and well named, both exist", async () => {
    const { world, ebs, attach, withData } = setUp();
    const { id } = withData();
    const far = ebs.createVolume({ zone: "us-east-1b", sizeGiB: 1 });
    const text = `The volume '${far.id}' is not in the same availability zone as instance '${id}'`;
    await fails(attach(far.id, id), "InvalidVolume.ZoneMismatch", text);
    const near = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    const inUse = "Invalid value '/dev/sdf' for unixDevice. Attachment point /dev/sdf is already in use";
    await fails(attach(near.id, id, "/dev/sdf"), "InvalidParameterValue", inUse);
    await fails(attach(near.id, id, "/dev/xvdf"), "InvalidParameterValue", /already in use/);
    await fails(attach(near.id, id, "/dev/xvda"), "InvalidParameterValue", /already in use/);
    await fails(attach(near.id, id, "/dev/sdz1"), "InvalidParameterValue", /is not a valid EBS device name/);
    await fails(attach(near.id, id, ""), "MissingParameter");
    await fails(attach(NO_VOLUME, id), "InvalidVolume.NotFound");
    await fails(
      attach("vol-x", id),
      "InvalidParameterValue",
      "Value (vol-x) for parameter volumeId is invalid. Expected: 'vol-...'.",
    );
    await fails(attach(near.id, NO_INSTANCE), "InvalidInstanceID.NotFound");
    await fails(attach(near.id, id, "/dev/sdz", { DryRun: true }), "DryRunOperation");
    expect(near.state).toBe("available");
    await attach(near.id, id);
    expect(world.audit.filter(({ what }) => what === "volume attach")).toHaveLength(1);
  });

  test("only a running or stopped instance takes a volume; a switch lets a pending one", async () => {
    const { world, clock, ec2, ebs, call, attach } = setUp({ shuttingDownMs: [30_000, 30_000], pendingMs: [60_000, 60_000] });
    const { templateId, subnetIds } = world.createGroup({ ...GROUP, types: ["m5.large"] });
    const launch = async () => {
      const LaunchTemplate = { LaunchTemplateId: templateId };
      const input = { LaunchTemplate, SubnetId: subnetIds[0], MinCount: 1, MaxCount: 1 };
      const { Instances } = await call<{ Instances: Ec2Instance[] }>("RunInstances", input);
      return only(Instances).InstanceId ?? "";
    };
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    const pending = await launch();
    await fails(attach(id, pending), "IncorrectState", `Instance '${pending}' is not 'running'.`);
    const ending = world.createInstance({});
    ec2.terminate(ending, "Client.x: x");
    await fails(attach(id, ending.id), "IncorrectState");
    await clock.advance(30_000);
    await fails(attach(id, ending.id), "IncorrectState");
    const stopped = world.createInstance({});
    ec2.reclaim(stopped, "stop");
    await fails(attach(id, stopped.id), "IncorrectState");
    await clock.advance(30_000);
    await attach(id, stopped.id);
    ebs.attachWhilePending = true;
    await attach(ebs.createVolume({ zone: ZONE, sizeGiB: 1 }).id, await launch());
  });

  test("a volume whose instance dies while it is attaching becomes available", async () => {
    const { world, clock, ec2, ebs, state, attach } = setUp({ volumeAttachingMs: [60_000, 60_000], shuttingDownMs: [0, 0] });
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    const instance = world.createInstance({});
    await attach(id, instance.id);
    ec2.terminate(instance, "Client.x: x");
    await clock.advance(20_000);
    expect(state(id)).toBe("available");
    await attach(id, world.createInstance({}).id);
    await clock.advance(45_000);
    expect(ec2.volumes.get(id)?.attachment?.state).toBe("attaching"); // the first attachment's time means nothing to it
    await clock.advance(15_000);
    expect(ec2.volumes.get(id)?.attachment?.state).toBe("attached");
  });
});

describe("detaching", () => {
  test("a volume that nobody has mounted is detaching, then available", async () => {
    const { clock, state, detach, withData, describeVolume, describeInstance, whats } = setUp();
    const { id, dataId } = withData();
    expect(await detach(dataId)).toMatchObject({ State: "detaching", InstanceId: id, Device: "/dev/sdf" });
    expect(await describeVolume(dataId)).toMatchObject({ State: "in-use", Attachments: [{ State: "detaching" }] });
    await clock.advance(5_000);
    expect(state(dataId)).toBe("available");
    expect((await describeInstance(id)).BlockDeviceMappings).toHaveLength(1);
    await fails(detach(dataId), "IncorrectState", `Volume '${dataId}' is in the 'available' state.`);
    expect(whats().slice(-2)).toEqual(["volume detach", "volume detached"]);
  });

  test("a mounted one gets busy and stays so, until the guest lets go", async () => {
    const { clock, ec2, ebs, state, detach, withData, describeVolume, describeInstance } = setUp();
    const { id, dataId } = withData();
    ebs.mount(dataId);
    await detach(dataId);
    await clock.advance(86_400_000);
    expect(await describeVolume(dataId)).toMatchObject({ State: "in-use", Attachments: [{ State: "busy" }] });
    expect((await describeInstance(id)).BlockDeviceMappings?.[1]?.Ebs?.Status).toBe("detaching");
    await fails(detach(dataId), "IncorrectState", /detaching/);
    ebs.unmount(dataId);
    await clock.advance(5_000);
    expect([state(dataId), ec2.dataOf(dataId).clean]).toEqual(["available", true]);
    expect(() => ebs.mount(dataId)).toThrow("not attached");
  });

  test("force ends it, and the data is no longer what the guest meant it to be", async () => {
    const { clock, ec2, ebs, state, detach, withData } = setUp();
    ebs.guestMounts = true;
    const { dataId } = withData();
    const unmounted = withData();
    ebs.unmount(unmounted.dataId);
    await detach(dataId);
    await clock.advance(60_000);
    expect(state(dataId)).toBe("in-use");
    await detach(dataId, { Force: true });
    await detach(unmounted.dataId, { Force: true });
    await clock.advance(5_000);
    expect([state(dataId), ec2.dataOf(dataId).clean]).toEqual(["available", false]);
    expect([state(unmounted.dataId), ec2.dataOf(unmounted.dataId).clean]).toEqual(["available", true]);
  });

  test("the end of the instance ends a detach that hangs, or deletes the volume", async () => {
    const { world, clock, ec2, ebs, state, detach, withData } = setUp();
    const kept = withData({ deleteOnTermination: false });
    const lost = withData();
    for (const { id, dataId } of [kept, lost]) {
      ebs.mount(dataId);
      await detach(dataId);
      await clock.advance(60_000);
      ec2.terminate(world.instance(id), "Client.x: x");
    }
    await clock.advance(60_000);
    expect([state(kept.dataId), state(lost.dataId)]).toEqual(["available", "deleted"]);
    expect(ec2.dataOf(kept.dataId).clean).toBe(true);
  });

  test("a root volume of an instance that is not stopped, another instance, another device are refused", async () => {
    const { world, ebs, detach, withData } = setUp();
    const { id, dataId } = withData();
    const rootId = world.instance(id).volumeId;
    await fails(detach(rootId), "IncorrectState", `Unable to detach root volume '${rootId}' from instance '${id}'`);
    await fails(detach(dataId, { InstanceId: world.createInstance({}).id }), "InvalidAttachment.NotFound");
    await fails(detach(dataId, { Device: "/dev/sdg" }), "InvalidAttachment.NotFound");
    await fails(detach(dataId, { InstanceId: NO_INSTANCE }), "InvalidInstanceID.NotFound");
    await fails(detach(NO_VOLUME), "InvalidVolume.NotFound");
    await fails(detach(dataId, { DryRun: true }), "DryRunOperation");
    await detach(dataId, { InstanceId: id, Device: "/dev/sdf" });
    expect(only(ebs.attachedTo(id, "/dev/sdf")).attachment?.state).toBe("detaching");
  });

  test("guests mount what they get while they run, if the scenario says so", async () => {
    const { world, clock, ec2, ebs, attach } = setUp();
    ebs.guestMounts = true;
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    await attach(id, world.createInstance({}).id);
    expect(ec2.volumes.get(id)?.mounted).toBe(false);
    await clock.advance(4_000);
    expect(ec2.volumes.get(id)?.mounted).toBe(true);
    const { instanceIds } = world.createGroup({ ...GROUP, volumes: [DATA] });
    const [root, data] = ebs.attachedTo(only(instanceIds));
    expect([root?.mounted, data?.mounted]).toEqual([false, true]);
    await run(clock, world.call("autoscaling", "SetDesiredCapacity", { AutoScalingGroupName: "web", DesiredCapacity: 2 }));
    await clock.advance(30_000);
    expect([...ec2.volumes.values()].filter(({ mounted }) => mounted)).toHaveLength(3);
  });
});

describe("making volumes", () => {
  test("a volume is creating, then available; it needs a zone, and a size or a snapshot", async () => {
    const { clock, call, createVolume, describeVolume } = setUp();
    const made = await createVolume({ Size: 100 });
    expect(made).toMatchObject({ State: "creating", Size: 100, VolumeType: "gp2", Iops: 300, SnapshotId: "", Encrypted: false });
    expect(made.Attachments).toBeUndefined();
    await clock.advance(3_000);
    expect(await describeVolume(made.VolumeId)).toMatchObject({ State: "available", Attachments: [] });
    await fails(call("CreateVolume", { Size: 1 }), "MissingParameter", /AvailabilityZone/);
    await fails(createVolume({ Size: undefined }), "MissingParameter", "The request must contain the parameter size/snapshot");
    await fails(
      createVolume({ AvailabilityZone: "us-east-2a" }),
      "InvalidZone.NotFound",
      "The zone 'us-east-2a' does not exist.",
    );
    await fails(createVolume({ AvailabilityZone: "us-east-1" }), "InvalidZone.NotFound");
    await fails(createVolume({ MultiAttachEnabled: true }), "UnsupportedOperation");
  });

  test.each([
    ["gp3", 1, 65_536],
    ["gp2", 1, 16_384],
    ["io1", 4, 16_384],
    ["io2", 4, 65_536],
    ["st1", 125, 16_384],
    ["sc1", 125, 16_384],
    ["standard", 1, 1_024],
  ])("%s has %i to %i GiB", async (VolumeType, least, most) => {
    const { createVolume } = setUp();
    const Iops = VolumeType.startsWith("io") ? 100 : undefined;
    const make = (Size: number) => createVolume({ VolumeType, Size, Iops });
    await make(least);
    await make(most);
    await fails(make(least - 1), "InvalidParameterValue", `Volume of ${least - 1}GiB is too small; minimum is ${least}GiB.`);
    await fails(make(most + 1), "InvalidParameterValue", /is too large/);
  });

  test("IOPS: what each type grants, takes and needs", async () => {
    const { createVolume } = setUp();
    const make = (VolumeType: string, Iops: number | undefined, Size = 100) => createVolume({ VolumeType, Iops, Size });
    const iopsOf = async (...args: Parameters<typeof make>) => (await make(...args)).Iops;
    expect(await iopsOf("gp2", undefined, 10)).toBe(100);
    expect(await iopsOf("gp2", undefined, 16_384)).toBe(16_000);
    expect(await iopsOf("gp3", undefined)).toBe(3_000);
    expect(await iopsOf("gp3", 3_000, 1)).toBe(3_000);
    expect(await iopsOf("gp3", 50_000)).toBe(50_000);
    expect(await iopsOf("io1", 5_000)).toBe(5_000);
    expect(await iopsOf("io2", 100_000)).toBe(100_000);
    expect(await iopsOf("st1", undefined, 125)).toBeUndefined();
    await fails(make("gp3", 2_999), "InvalidParameterValue", "Volume iops of 2999 is too low; minimum is 3000.");
    await fails(make("gp3", 80_001, 65_536), "InvalidParameterValue", "Volume iops of 80001 is too high; maximum is 80000.");
    const ratio = "Iops to volume size ratio of 750.000000 is too high; maximum is 500";
    await fails(make("gp3", 15_000, 20), "InvalidParameterValue", ratio);
    await fails(make("io1", 5_001), "InvalidParameterValue", /ratio/);
    await fails(make("io2", 100_001), "InvalidParameterValue", /ratio/);
    await fails(make("io1", undefined), "MissingParameter", "The parameter iops must be specified for io1 volumes.");
    await fails(make("gp2", 300), "InvalidParameterCombination", "The parameter iops is not supported for gp2 volumes.");
    await fails(make("gp4", undefined), "UnknownVolumeType");
  });

  test("throughput is gp3's, 125 to 2000, and a quarter MiB/s for each of the IOPS", async () => {
    const { createVolume } = setUp();
    const make = (Throughput: number | undefined, input: object = {}) =>
      createVolume({ VolumeType: "gp3", Size: 1000, Throughput, ...input });
    expect((await make(undefined)).Throughput).toBe(125);
    expect((await make(750)).Throughput).toBe(750);
    expect((await make(2_000, { Iops: 8_000 })).Throughput).toBe(2_000);
    await fails(make(751), "InvalidParameterValue", /ratio of 0.250333 is too high/);
    await fails(make(124), "InvalidParameterValue");
    await fails(make(2_001, { Iops: 80_000 }), "InvalidParameterValue");
    await fails(make(125, { VolumeType: "gp2" }), "InvalidParameterCombination");
  });

  test("encryption: a key needs it, without a key it is AWS's own, and what is encrypted stays so", async () => {
    const { clock, createVolume, createSnapshot } = setUp();
    const KmsKeyId = "alias/mine";
    await fails(createVolume({ KmsKeyId }), "InvalidParameterDependency", /KmsKeyId/);
    expect((await createVolume({ Encrypted: true })).KmsKeyId).toEndWith("alias/aws/ebs");
    const { VolumeId } = await createVolume({ Encrypted: true, KmsKeyId });
    const { SnapshotId, Encrypted } = await createSnapshot(VolumeId);
    expect(Encrypted).toBe(true);
    await clock.advance(120_000);
    expect(await createVolume({ SnapshotId })).toMatchObject({ Encrypted: true, KmsKeyId });
    await fails(createVolume({ SnapshotId, Encrypted: false }), "InvalidParameterCombination");
  });

  test("tags at birth are for volumes, under the rules of tags", async () => {
    const { ec2, createVolume } = setUp();
    const tagged = (ResourceType: string, Key: string) =>
      createVolume({ TagSpecifications: [{ ResourceType, Tags: [{ Key, Value: "v" }] }] });
    const { VolumeId, Tags } = await tagged("volume", "k");
    expect(Tags).toEqual([{ Key: "k", Value: "v" }]);
    expect(ec2.volumes.get(VolumeId)?.tags.get("k")).toBe("v");
    await fails(tagged("instance", "k"), "InvalidParameterValue", /not a valid taggable resource type/);
    await fails(tagged("volume", "aws:k"), "InvalidParameterValue");
  });

  test("a client token makes one volume, and refuses another request", async () => {
    const { clock, ec2, createVolume } = setUp();
    const first = await createVolume({ ClientToken: "t" });
    await clock.advance(10_000);
    const again = await createVolume({ ClientToken: "t" });
    expect([again.VolumeId, again.State]).toEqual([first.VolumeId, "available"]);
    await fails(createVolume({ ClientToken: "t", Size: 11 }), "IdempotentParameterMismatch");
    expect((await createVolume()).VolumeId).not.toBe(first.VolumeId);
    expect(ec2.volumes.size).toBe(2);
  });

  test("a dry run makes nothing, and says what would be refused", async () => {
    const { ec2, createVolume } = setUp();
    await fails(createVolume({ DryRun: true, ClientToken: "t" }), "DryRunOperation");
    await fails(createVolume({ DryRun: true, Size: 0 }), "InvalidParameterValue");
    expect(ec2.volumes.size).toBe(0);
    await createVolume({ ClientToken: "t" });
  });

  test("a volume that is attached or not there cannot be deleted; another is deleting, then gone", async () => {
    const { clock, call, withData, createVolume, describeVolumes, describeVolume, whats } = setUp();
    const remove = (VolumeId: string, input: object = {}) => call("DeleteVolume", { VolumeId, ...input });
    const { id, dataId } = withData();
    await fails(remove(dataId), "VolumeInUse", `Volume ${dataId} is currently attached to ${id}`);
    const { VolumeId } = await createVolume();
    await fails(remove(VolumeId), "IncorrectState");
    await clock.advance(3_000);
    await fails(remove(VolumeId, { DryRun: true }), "DryRunOperation");
    await remove(VolumeId);
    expect((await describeVolume(VolumeId)).State).toBe("deleting");
    await clock.advance(3_000);
    expect((await describeVolumes()).map((volume) => volume.VolumeId)).not.toContain(VolumeId);
    await fails(remove(VolumeId), "InvalidVolume.NotFound");
    expect(whats().slice(-2)).toEqual(["volume create", "volume delete"]);
  });
});

describe("snapshots", () => {
  test("a snapshot is pending, then completed; it has its volume's point in time, whatever is written later", async () => {
    const { world, clock, ec2, attach, withData, createVolume, createSnapshot, describeSnapshots, whats } = setUp();
    const { dataId } = withData();
    ec2.write(dataId, "before");
    const made = await createSnapshot(dataId, { Description: "d" });
    const { SnapshotId } = made;
    ec2.write(dataId, "after");
    expect(made).toMatchObject({ State: "pending", VolumeId: dataId, VolumeSize: 100, Description: "d", OwnerId: world.account });
    const only1 = async () => only(await describeSnapshots({ SnapshotIds: [SnapshotId] }));
    const { State, Progress = "" } = await only1();
    expect(State).toBe("pending");
    expect(Number(Progress.replace("%", ""))).toBeLessThan(10);
    await fails(createVolume({ SnapshotId, Size: undefined }), "IncorrectState", "Snapshot is in invalid state - pending");
    await clock.advance(120_000);
    expect(await only1()).toMatchObject({ State: "completed", Progress: "100%" });
    const copy = await createVolume({ SnapshotId, Size: undefined, AvailabilityZone: "us-east-1b" });
    expect(copy).toMatchObject({ Size: 100, SnapshotId, AvailabilityZone: "us-east-1b" });
    expect(ec2.dataOf(copy.VolumeId).writes).toEqual(["before"]);
    expect(ec2.dataOf(dataId).writes).toEqual(["before", "after"]);
    const [origin = ""] = ec2.dataOf(dataId).lineage;
    expect(ec2.dataOf(SnapshotId).lineage).toHaveLength(2);
    expect(ec2.dataOf(copy.VolumeId).lineage.slice(0, 2)).toEqual([...ec2.dataOf(SnapshotId).lineage]);
    expect(ec2.dataOf(copy.VolumeId).lineage[0]).toBe(origin);
    const blank = await createVolume();
    expect(ec2.dataOf(blank.VolumeId).lineage).not.toContain(origin);
    await clock.advance(3_000);
    await attach(copy.VolumeId, world.createInstance({ zone: "us-east-1b" }).id);
    expect(whats()).toContain("snapshot create");
    expect(whats()).toContain("snapshot completed");
  });

  test("it may be taken of a volume in any state; one that is mounted gives what its disk happens to hold", async () => {
    const { clock, ec2, ebs, withData, createVolume, createSnapshot } = setUp();
    const { VolumeId } = await createVolume();
    await createSnapshot(VolumeId);
    const { dataId } = withData();
    ebs.mount(dataId);
    const dirty = await createSnapshot(dataId);
    expect([ec2.dataOf(dirty.SnapshotId).clean, ec2.dataOf(dataId).clean]).toEqual([false, true]);
    ebs.unmount(dataId);
    await clock.advance(120_000);
    expect(ec2.dataOf((await createSnapshot(dataId)).SnapshotId).clean).toBe(true);
    const { VolumeId: copy } = await createVolume({ SnapshotId: dirty.SnapshotId, Size: 100 });
    expect(ec2.dataOf(copy).clean).toBe(false);
  });

  test("it is not idempotent, but a volume has at most one in 15 s and five pending", async () => {
    const { clock, ec2, withData, createSnapshot } = setUp({ snapshotMs: [600_000, 600_000] });
    const { dataId } = withData();
    await createSnapshot(dataId);
    const error = await fails(createSnapshot(dataId), "SnapshotCreationPerVolumeRateExceeded");
    expect(error.message).toStartWith("The maximum per volume CreateSnapshot request rate has been exceeded.");
    for (let i = 1; i < 5; i++) {
      await clock.advance(15_000);
      await createSnapshot(dataId);
    }
    expect(ec2.ebs.snapshots.size).toBe(5);
    await clock.advance(15_000);
    await fails(createSnapshot(dataId), "ConcurrentSnapshotLimitExceeded");
    await clock.advance(600_000);
    await createSnapshot(dataId);
  });

  test("a volume made from one is not smaller", async () => {
    const { clock, withData, createVolume, createSnapshot } = setUp();
    const { SnapshotId } = await createSnapshot(withData().dataId);
    await clock.advance(120_000);
    await fails(createVolume({ SnapshotId, Size: 99 }), "InvalidParameterValue", /smaller than snapshot/);
    expect((await createVolume({ SnapshotId, Size: 101 })).Size).toBe(101);
    await fails(createVolume({ SnapshotId: NO_SNAPSHOT }), "InvalidSnapshot.NotFound");
    await fails(createVolume({ SnapshotId: "snap-x" }), "InvalidParameterValue", /Expected: 'snap-\.\.\.'/);
  });

  test("a snapshot outlives its volume; deleted, it is gone; one that failed makes no volume", async () => {
    const { clock, ec2, ebs, call, createVolume, createSnapshot, describeSnapshots } = setUp();
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    ec2.write(id, "x");
    const { SnapshotId } = await createSnapshot(id);
    await call("DeleteVolume", { VolumeId: id });
    await clock.advance(120_000);
    expect(ec2.dataOf((await createVolume({ SnapshotId })).VolumeId).writes).toEqual(["x"]);
    await fails(call("DeleteSnapshot", { SnapshotId, DryRun: true }), "DryRunOperation");
    await call("DeleteSnapshot", { SnapshotId });
    expect(await describeSnapshots()).toEqual([]);
    const text = `The snapshot '${SnapshotId}' does not exist.`;
    await fails(describeSnapshots({ SnapshotIds: [SnapshotId] }), "InvalidSnapshot.NotFound", text);
    await fails(call("DeleteSnapshot", { SnapshotId }), "InvalidSnapshot.NotFound");
    await fails(createVolume({ SnapshotId }), "InvalidSnapshot.NotFound");
    ebs.failSnapshot = () => "Given key ID is not accessible";
    const failed = await createSnapshot(ebs.createVolume({ zone: ZONE, sizeGiB: 1 }).id);
    await clock.advance(120_000);
    expect(only(await describeSnapshots())).toMatchObject({ State: "error", StateMessage: "Given key ID is not accessible" });
    await fails(createVolume({ SnapshotId: failed.SnapshotId }), "IncorrectState");
  });

  test("they are found by ID, state, volume, tag and owner, and carry tags from birth", async () => {
    const { clock, ebs, createSnapshot, describeSnapshots } = setUp();
    const [a, b] = [1, 2].map((sizeGiB) => ebs.createVolume({ zone: ZONE, sizeGiB }).id) as [string, string];
    const TagSpecifications = [{ ResourceType: "snapshot", Tags: [{ Key: "for", Value: "i-1" }] }];
    const first = (await createSnapshot(a, { TagSpecifications })).SnapshotId;
    await clock.advance(120_000);
    const second = (await createSnapshot(b)).SnapshotId;
    const found = async (Name: string, Value: string) =>
      (await describeSnapshots({ Filters: [{ Name, Values: [Value] }] })).map(({ SnapshotId }) => SnapshotId ?? "");
    expect(await found("status", "completed")).toEqual([first]);
    expect(await found("status", "pending")).toEqual([second]);
    expect(await found("volume-id", b)).toEqual([second]);
    expect(await found("tag:for", "i-*")).toEqual([first]);
    expect(await found("tag-key", "f?r")).toEqual([first]);
    await fails(found("colour", "red"), "InvalidParameterValue");
    expect(await describeSnapshots({ OwnerIds: ["self"] })).toHaveLength(2);
    expect(await describeSnapshots({ OwnerIds: ["amazon"] })).toEqual([]);
    await fails(createSnapshot(a, { TagSpecifications: [{ ResourceType: "volume" }] }), "InvalidParameterValue");
    await fails(createSnapshot(a, { DryRun: true }), "DryRunOperation");
    await fails(createSnapshot(NO_VOLUME), "InvalidVolume.NotFound");
    expect(await describeSnapshots()).toHaveLength(2);
  });
});

describe("describing volumes", () => {
  test("they are found by attachment, state, tag and ID, with wildcards", async () => {
    const { world, ebs, call, withData, describeVolumes } = setUp();
    const { id, dataId } = withData();
    const rootId = world.instance(id).volumeId;
    const free = ebs.createVolume({
      zone: "us-east-1b",
      sizeGiB: 7,
      type: "gp3",
      tags: { "spotmax:x": "i-1 data" },
    });
    const found = async (Name: string, ...Values: string[]) =>
      (await describeVolumes({ Filters: [{ Name, Values }] })).map(({ VolumeId }) => VolumeId ?? "");
    expect(await found("attachment.instance-id", id)).toEqual([rootId, dataId]);
    expect(await found("attachment.device", "/dev/sd*")).toEqual([dataId]);
    expect(await found("attachment.status", "attached")).toEqual([rootId, dataId]);
    expect(await found("attachment.delete-on-termination", "false")).toEqual([]);
    expect(await found("status", "available", "creating")).toEqual([free.id]);
    expect(await found("tag:spotmax:x", "i-? *")).toEqual([free.id]);
    expect(await found("tag-key", "spotmax:*")).toEqual([free.id]);
    expect(await found("volume-id", dataId)).toEqual([dataId]);
    expect(await found("availability-zone", "us-east-1b")).toEqual([free.id]);
    await fails(found("colour", "red"), "InvalidParameterValue", "The filter 'colour' is invalid");
    const both = [
      { Name: "attachment.instance-id", Values: [id] },
      { Name: "attachment.device", Values: ["/dev/sdf"] },
    ];
    expect(only(await describeVolumes({ Filters: both })).VolumeId).toBe(dataId);
    type Answer = { Reservations: { Instances: Ec2Instance[] }[] };
    const Filters = [{ Name: "block-device-mapping.volume-id", Values: [dataId] }];
    const { Reservations } = await call<Answer>("DescribeInstances", { Filters });
    expect(only(Reservations.flatMap(({ Instances }) => Instances)).InstanceId).toBe(id);
  });

  test("one unknown ID refuses the call, and IDs do not go with MaxResults", async () => {
    const { withData, describeVolumes } = setUp();
    const { dataId } = withData();
    await fails(
      describeVolumes({ VolumeIds: [dataId, NO_VOLUME] }),
      "InvalidVolume.NotFound",
      `The volume '${NO_VOLUME}' does not exist.`,
    );
    await fails(describeVolumes({ VolumeIds: ["x"] }), "InvalidParameterValue", /for parameter volumes is invalid/);
    await fails(describeVolumes({ VolumeIds: [dataId], MaxResults: 5 }), "InvalidParameterCombination");
    await fails(describeVolumes({ VolumeIds: [dataId], DryRun: true }), "DryRunOperation");
  });

  test("pages have 5 to 1000", async () => {
    const { ebs, call, describeVolumes } = setUp();
    for (let i = 0; i < 12; i++) ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    await fails(describeVolumes({ MaxResults: 4 }), "InvalidParameterValue");
    await fails(describeVolumes({ MaxResults: 1001 }), "InvalidParameterValue");
    await fails(describeVolumes({ NextToken: "rubbish" }), "InvalidParameterValue");
    const sizes: number[] = [];
    let NextToken: string | undefined;
    do {
      const answer = await call<{ Volumes: object[]; NextToken?: string }>("DescribeVolumes", { MaxResults: 5, NextToken });
      sizes.push(answer.Volumes.length);
      NextToken = answer.NextToken;
    } while (NextToken);
    expect(sizes).toEqual([5, 5, 2]);
  });

  test("with staleMs, a fresh volume may be unknown and a change unseen, for that long and no longer", async () => {
    const { clock, ec2, call, keep, createVolume, describeVolume, describeInstance, withData } = setUp({
      ...{ staleMs: 5_000, latencyMs: [0, 0], volumeCreatingMs: [0, 0] },
    });
    const seen = new Set<string>();
    const look = async (id: string, shown: (volume: Ec2Volume) => string) => {
      for (let i = 0; i < 60; i++) seen.add(await describeVolume(id).then(shown, ({ name }: AwsError) => name));
    };
    const { id, dataId } = withData();
    const flagOf = ({ Attachments }: Ec2Volume) => `${Attachments?.[0]?.DeleteOnTermination}`;
    await look(dataId, flagOf);
    expect([...seen.keys()]).toEqual(["true"]); // a scenario's past was never otherwise
    await keep(id);
    await clock.advance(2_500);
    await look(dataId, flagOf);
    expect([...seen].sort()).toEqual(["false", "true"]);
    const flags = new Set<unknown>();
    for (let i = 0; i < 60; i++) flags.add((await describeInstance(id)).BlockDeviceMappings?.[1]?.Ebs?.DeleteOnTermination);
    expect([...flags].sort()).toEqual([false, true]);
    seen.clear();
    const { VolumeId } = await createVolume();
    await clock.advance(2_500);
    await look(VolumeId, ({ State }) => State ?? "");
    expect([...seen].sort()).toEqual(["InvalidVolume.NotFound", "available"]);
    await clock.advance(5_000);
    await call("DeleteVolume", { VolumeId });
    await clock.advance(4_000);
    seen.clear();
    await look(VolumeId, ({ State }) => State ?? "");
    expect([...seen]).toContain("deleting");
    await clock.advance(5_000);
    seen.clear();
    await look(VolumeId, ({ State }) => State ?? "");
    await look(dataId, flagOf);
    expect([...seen].sort()).toEqual(["InvalidVolume.NotFound", "false"]);
    expect(ec2.volumes.get(dataId)?.attachment?.deleteOnTermination).toBe(false);
  });
});

describe("calls", () => {
  test("tags are set on and taken from volumes and snapshots", async () => {
    const { call, ebs, createSnapshot, describeVolume, describeSnapshots } = setUp();
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    const { SnapshotId } = await createSnapshot(id);
    const Resources = [id, SnapshotId];
    await call("CreateTags", { Resources, Tags: [{ Key: "k", Value: "v" }] });
    expect((await describeVolume(id)).Tags).toEqual([{ Key: "k", Value: "v" }]);
    expect(only(await describeSnapshots()).Tags).toEqual([{ Key: "k", Value: "v" }]);
    await call("DeleteTags", { Resources, Tags: [{ Key: "k" }] });
    expect((await describeVolume(id)).Tags).toEqual([]);
    expect(only(await describeSnapshots()).Tags).toEqual([]);
    const tag = (resource: string) => call("CreateTags", { Resources: [resource], Tags: [{ Key: "k", Value: "" }] });
    await fails(tag(NO_VOLUME), "InvalidVolume.NotFound");
    await fails(tag(NO_SNAPSHOT), "InvalidSnapshot.NotFound");
    await fails(tag("eni-1"), "InvalidID");
  });

  test("CreateVolume and CreateSnapshot have a bucket each, 100 and 5 a second", async () => {
    const { world, clock, ebs, createVolume, createSnapshot } = setUp({ latencyMs: [0, 0], snapshotMs: [0, 0] });
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    ebs.snapshotIntervalMs = 0;
    world.buckets = true;
    for (let i = 0; i < 100; i++) await createVolume();
    await fails(createVolume(), "RequestLimitExceeded");
    for (let i = 0; i < 100; i++) {
      await createSnapshot(id);
      await clock.advance(0);
    }
    await fails(createSnapshot(id), "RequestLimitExceeded");
    await clock.advance(200);
    await createVolume();
    await fails(createVolume(), "RequestLimitExceeded");
  });

  test("an answer that is lost leaves the effect, and rights are asked before all else", async () => {
    const { world, ebs, attach, createVolume } = setUp();
    const fault = new AwsError("InternalError", "oops", 500);
    const { id } = ebs.createVolume({ zone: ZONE, sizeGiB: 1 });
    const instance = world.createInstance({});
    world.intercept = () => ({ before: fault });
    await fails(attach(id, instance.id), "InternalError");
    expect(ebs.volume(id).state).toBe("available");
    world.intercept = () => ({ after: fault });
    await fails(attach(id, instance.id), "InternalError");
    world.intercept = undefined;
    await fails(attach(id, instance.id), "VolumeInUse");
    world.denied.add("ec2:CreateVolume");
    await fails(createVolume({ DryRun: true }), "UnauthorizedOperation");
  });

  test("one seed, one run, with volumes too", async () => {
    const story = async (seed: number) => {
      const { world, clock, keep } = setUp({ seed });
      world.createQueues();
      const { instanceIds } = world.createGroup({ ...GROUP, volumes: [DATA] });
      await keep(only(instanceIds));
      world.interrupt(only(instanceIds));
      await clock.advance(600_000);
      return JSON.stringify([world.snapshot(), world.audit]);
    };
    const first = await story(7);
    expect(await story(7)).toBe(first);
    expect(first).toContain('"state":"available"');
    expect(await story(8)).not.toBe(first);
  });
});

describe("over the wire", () => {
  let world: World | undefined;
  const served = serve({
    call: (...request) => {
      if (!world) throw new Error("a call before the world");
      return world.call(...request);
    },
  });
  const none = [0, 0] as [number, number];
  world = new World({
    ...{ clock: new RealClock(), checkOutputs: true, latencyMs: none, volumeCreatingMs: none, volumeAttachingMs: none },
    ...{ volumeDetachingMs: none, volumeDeletingMs: none, snapshotMs: none },
  });
  const { ebs } = world.ec2;
  const { id: instanceId } = world.createInstance({ volumes: [DATA] });
  const client = new EC2Client({
    endpoint: served.url,
    region: world.region,
    credentials: { accessKeyId: "test", secretAccessKey: "test" },
    maxAttempts: 1,
  });
  afterAll(async () => {
    client.destroy();
    await served.stop();
  });

  test("the SDK's client makes, attaches, keeps, detaches, copies and deletes a volume", async () => {
    const tags = (ResourceType: "volume" | "snapshot") => [{ ResourceType, Tags: [{ Key: "a&b", Value: "<é>" }] }];
    const VolumeType = "gp3";
    const made = await client.send(
      new CreateVolumeCommand({
        AvailabilityZone: ZONE,
        Size: 8,
        VolumeType,
        Iops: 4000,
        Throughput: 200,
        TagSpecifications: tags("volume"),
      }),
    );
    expect(made).toMatchObject({ State: "creating", Iops: 4000, Throughput: 200, Encrypted: false, SnapshotId: "" });
    expect(made.Tags).toEqual([{ Key: "a&b", Value: "<é>" }]);
    const VolumeId = made.VolumeId ?? "";
    await Bun.sleep(10);
    const attached = await client.send(new AttachVolumeCommand({ VolumeId, InstanceId: instanceId, Device: "/dev/sdz" }));
    expect(attached).toMatchObject({ State: "attaching", DeleteOnTermination: false, AttachTime: expect.any(Date) });
    await Bun.sleep(10);
    const BlockDeviceMappings = [{ DeviceName: "/dev/sdz", Ebs: { DeleteOnTermination: true } }];
    await client.send(new ModifyInstanceAttributeCommand({ InstanceId: instanceId, BlockDeviceMappings }));
    const { Reservations } = await client.send(new DescribeInstancesCommand({ InstanceIds: [instanceId] }));
    const mappings = Reservations?.[0]?.Instances?.[0]?.BlockDeviceMappings ?? [];
    expect(mappings.map(({ DeviceName, Ebs }) => [DeviceName, Ebs?.Status, Ebs?.DeleteOnTermination])).toEqual([
      ["/dev/xvda", "attached", true],
      ["/dev/sdf", "attached", true],
      ["/dev/sdz", "attached", true],
    ]);
    const Filters = [
      { Name: "attachment.instance-id", Values: [instanceId] },
      { Name: "attachment.device", Values: ["/dev/sdz"] },
    ];
    const { Volumes } = await client.send(new DescribeVolumesCommand({ Filters }));
    expect(only(Volumes ?? [])).toMatchObject({
      ...{ VolumeId, State: "in-use", Size: 8, CreateTime: expect.any(Date) },
      Attachments: [{ VolumeId, InstanceId: instanceId, Device: "/dev/sdz", State: "attached", DeleteOnTermination: true }],
    });
    expect(await client.send(new DetachVolumeCommand({ VolumeId }))).toMatchObject({ State: "detaching" });
    await Bun.sleep(10);
    ebs.write(VolumeId, "x");
    const snapshot = await client.send(new CreateSnapshotCommand({ VolumeId, TagSpecifications: tags("snapshot") }));
    const SnapshotId = snapshot.SnapshotId ?? "";
    expect(snapshot).toMatchObject({ State: "pending", VolumeId, VolumeSize: 8, StartTime: expect.any(Date) });
    await client.send(new CreateTagsCommand({ Resources: [SnapshotId, VolumeId], Tags: [{ Key: "k", Value: "" }] }));
    await Bun.sleep(10);
    const { Snapshots } = await client.send(
      new DescribeSnapshotsCommand({ OwnerIds: ["self"], Filters: [{ Name: "status", Values: ["completed"] }] }),
    );
    expect(only(Snapshots ?? [])).toMatchObject({ SnapshotId, Progress: "100%" });
    expect(Snapshots?.[0]?.Tags).toHaveLength(2);
    const copy = await client.send(new CreateVolumeCommand({ AvailabilityZone: "us-east-1b", SnapshotId }));
    expect(copy).toMatchObject({ Size: 8, SnapshotId });
    expect(ebs.dataOf(copy.VolumeId ?? "").writes).toEqual(["x"]);
    await client.send(new DeleteVolumeCommand({ VolumeId }));
    await client.send(new DeleteSnapshotCommand({ SnapshotId }));
    await Bun.sleep(10);
    const gone = client.send(new DescribeVolumesCommand({ VolumeIds: [VolumeId] }));
    await expect(gone).rejects.toMatchObject({ name: "InvalidVolume.NotFound", $metadata: { httpStatusCode: 400 } });
  });
});

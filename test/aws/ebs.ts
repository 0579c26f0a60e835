// EBS: volumes, attachments and snapshots, as far as EC2's calls show them, and what the volumes hold.
//
// Sources: the EC2 API reference (limits, defaults, filters); what users of the real service report (texts of the
// errors, `busy`). "Unconfirmed" marks what no source settled: the stricter reading is taken.
import type {
  AttachVolumeRequest,
  CreateSnapshotRequest,
  CreateVolumeRequest,
  DeleteSnapshotRequest,
  DeleteVolumeRequest,
  DescribeSnapshotsRequest,
  DescribeVolumesRequest,
  DetachVolumeRequest,
  LaunchTemplateBlockDeviceMapping,
  ModifyInstanceAttributeRequest,
  TagSpecification,
} from "@aws-sdk/client-ec2";
import { AwsError, page } from "./basics.ts";
import {
  badToken,
  checkTags,
  dryRun,
  type Ec2,
  type Facts,
  filter,
  type Instance,
  invalidValue,
  maxResults,
  mergeTags,
  missing,
  notTogether,
} from "./ec2.ts";
import type { Handlers, World } from "./world.ts";

export type VolumeState = "creating" | "available" | "in-use" | "deleting" | "deleted";

export interface Attachment {
  readonly instanceId: string;
  readonly device: string;
  /** `busy`: asked to be detached, but the guest has it mounted. */
  readonly state: "attaching" | "attached" | "detaching" | "busy";
  readonly attachedAtMs: number;
  readonly deleteOnTermination: boolean;
  /** Of this attachment, whatever becomes of it: a volume may come back to the same instance. */
  readonly serial: number;
}

/** What a volume or a snapshot holds; never changed in place, so that a copy is fixed at its time. */
export interface Content {
  /** One ID for each copy: a blank volume has one of its own; a snapshot, or a volume made from one, adds its own. */
  readonly lineage: readonly string[];
  /** What scenarios wrote, oldest first. */
  readonly writes: readonly string[];
  /** False once it was taken from under a guest that had it mounted: by force, or as a snapshot. Caches may be lost. */
  readonly clean: boolean;
}

interface VisibleVolume {
  state: VolumeState;
  attachment: Attachment | undefined;
  tags: Map<string, string>;
}

interface VisibleSnapshot {
  state: "pending" | "completed" | "error";
  tags: Map<string, string>;
}

interface Aging<V> {
  createdAtMs: number;
  /** From then on nothing shows it. */
  goneAtMs: number | undefined;
  /** Older states, for describes that lag behind. */
  past: (V & { untilMs: number })[];
}

interface Disk {
  sizeGiB: number;
  type: string;
  iops: number | undefined;
  throughput: number | undefined;
  encrypted: boolean;
  kmsKeyId: string | undefined;
  snapshot: Snapshot | undefined;
}

export interface Volume extends VisibleVolume, Aging<VisibleVolume>, Omit<Disk, "snapshot"> {
  id: string;
  zone: string;
  snapshotId: string | undefined;
  /** Made at launch as an instance's root: the audit says nothing of its making and of its end with the instance. */
  root: boolean;
  content: Content;
  /** The guest has it mounted: a detach without force waits until it has not. See `mount`. */
  mounted: boolean;
  lastSnapshotAtMs: number;
}

export interface Snapshot extends VisibleSnapshot, Aging<VisibleSnapshot> {
  id: string;
  volumeId: string;
  sizeGiB: number;
  encrypted: boolean;
  kmsKeyId: string | undefined;
  description: string;
  /** When it will be completed. */
  doneAtMs: number;
  failure: string | undefined;
  content: Content;
}

/** A volume of a group's launch template, or of an instance. */
export interface VolumeSpec {
  device: string;
  sizeGiB: number;
  /** Default gp2, as EC2's. */
  type?: string;
  iops?: number;
  throughput?: number;
  encrypted?: boolean;
  kmsKeyId?: string;
  snapshotId?: string;
  /** Default true. */
  deleteOnTermination?: boolean;
}

/** What launch templates, RunInstances and fleet overrides have in common. */
export interface DeviceMapping {
  DeviceName?: string;
  VirtualName?: string;
  NoDevice?: string;
  Ebs?: {
    VolumeSize?: number;
    VolumeType?: string;
    Iops?: number;
    Throughput?: number;
    Encrypted?: boolean;
    KmsKeyId?: string;
    SnapshotId?: string;
    DeleteOnTermination?: boolean;
  };
}

interface PlannedDevice {
  device: string;
  disk: Disk;
  deleteOnTermination: boolean;
}

export const ROOT_DEVICE = "/dev/xvda";
const ROOT_GIB = 8;
const VOLUME_ID = /^vol-(?:[0-9a-f]{8}|[0-9a-f]{17})$/;
const SNAPSHOT_ID = /^snap-(?:[0-9a-f]{8}|[0-9a-f]{17})$/;
/** `/dev/sdf1` is refused, `sdf` is not. */
const DEVICE = /^(?:\/dev\/)?(?:sda1|sd[a-z]|xvd[a-z]|xvd[a-d][a-z])$/;

interface TypeLimits {
  sizeGiB: [number, number];
  iops?: [number, number];
  iopsPerGiB?: number;
  /** IOPS have no default. */
  provisioned?: boolean;
  throughput?: [number, number];
}

/** As the SDK's API reference has them; gp3's used to be lower, and io2's 1,000 a GiB is unconfirmed. */
const TYPES: Record<string, TypeLimits> = {
  gp3: { sizeGiB: [1, 65_536], iops: [3_000, 80_000], iopsPerGiB: 500, throughput: [125, 2_000] },
  gp2: { sizeGiB: [1, 16_384] },
  io1: { sizeGiB: [4, 16_384], iops: [100, 64_000], iopsPerGiB: 50, provisioned: true },
  io2: { sizeGiB: [4, 65_536], iops: [100, 256_000], iopsPerGiB: 1_000, provisioned: true },
  st1: { sizeGiB: [125, 16_384] },
  sc1: { sizeGiB: [125, 16_384] },
  standard: { sizeGiB: [1, 1_024] },
};
const GP3_MIBPS_PER_IOPS = 0.25;

export class Ebs {
  readonly #world: World;
  readonly #ec2: Ec2;
  /** Those that are gone too, as `deleted`. */
  readonly volumes = new Map<string, Volume>();
  readonly snapshots = new Map<string, Snapshot>();
  /** Guests mount every volume but the root as soon as it is attached; see `mount` for a single one. */
  guestMounts = false;
  /** AttachVolume to a pending instance. The real service refuses it: "Instance 'i-…' is not 'running'". */
  attachWhilePending = false;
  /** KMS keys that the caller has no right to use: what is launched or created with one goes away without an error. */
  readonly unusableKeys = new Set<string>();
  /** A text: the snapshot ends in `error`, with this for its StateMessage. */
  failSnapshot: ((volume: Volume) => string | undefined) | undefined;
  /** Least time between two snapshots of one volume. */
  snapshotIntervalMs = 15_000;
  /** All that were ever attached to an instance: describes may lag behind. */
  readonly #ofInstance = new Map<string, Set<Volume>>();
  #contents = 0;
  #attachments = 0;

  constructor(world: World, ec2: Ec2) {
    this.#world = world;
    this.#ec2 = ec2;
  }

  readonly operations: Handlers = {
    DescribeVolumes: (input: DescribeVolumesRequest) => this.#describeVolumes(input),
    DescribeSnapshots: (input: DescribeSnapshotsRequest) => this.#describeSnapshots(input),
    ModifyInstanceAttribute: (input: ModifyInstanceAttributeRequest) => this.#modifyInstanceAttribute(input),
    AttachVolume: (input: AttachVolumeRequest) => this.#attachVolume(input),
    DetachVolume: (input: DetachVolumeRequest) => this.#detachVolume(input),
    CreateVolume: (input: CreateVolumeRequest) => this.#createVolume(input),
    CreateSnapshot: (input: CreateSnapshotRequest) => this.#createSnapshot(input),

    DeleteVolume: (input: DeleteVolumeRequest) => {
      const volume = this.#volume(input.VolumeId, this.#world.viewMs());
      if (volume.attachment)
        throw new AwsError("VolumeInUse", `Volume ${volume.id} is currently attached to ${volume.attachment.instanceId}`);
      if (volume.state !== "available") throw notAvailable(volume);
      dryRun(input.DryRun);
      this.#change(volume, { state: "deleting" });
      this.#world.record("volume delete", [volume.id]);
      this.#world.after(this.#world.random.between(this.#world.delays.volumeDeletingMs), () => this.#vanish(volume));
      return {};
    },

    DeleteSnapshot: (input: DeleteSnapshotRequest) => {
      const snapshot = this.#snapshot(input.SnapshotId, this.#world.viewMs());
      dryRun(input.DryRun);
      snapshot.goneAtMs = this.#world.now();
      this.#world.record("snapshot delete", [snapshot.id]);
      return {};
    },
  };

  // --- Scenarios -------------------------------------------------------------------------------------------------

  /** A volume of nobody, available at once. */
  createVolume(
    spec: Omit<VolumeSpec, "device" | "deleteOnTermination"> & { zone: string; tags?: Record<string, string> },
  ): Volume {
    const { sizeGiB, type, iops, throughput, encrypted, kmsKeyId, snapshotId } = spec;
    const disk = this.#disk({
      ...{ VolumeSize: sizeGiB, VolumeType: type, Iops: iops, Throughput: throughput },
      ...{ Encrypted: encrypted, KmsKeyId: kmsKeyId, SnapshotId: snapshotId },
    });
    return this.#make(this.#newId("vol"), spec.zone, disk, { state: "available", tags: Object.entries(spec.tags ?? {}) });
  }

  volume(id: string): Volume {
    const volume = this.volumes.get(id);
    if (!volume || volume.goneAtMs !== undefined) throw new Error(`the world has no volume ${id}`);
    return volume;
  }

  /** The volumes that an instance has now, its root first; `device` names one of them. */
  attachedTo(instanceId: string, device?: string): Volume[] {
    return [...(this.#ofInstance.get(instanceId) ?? [])].filter(
      ({ attachment }) => attachment?.instanceId === instanceId && (device === undefined || attachment.device === device),
    );
  }

  /** What a volume or snapshot holds. */
  dataOf(id: string): Content {
    const snapshot = this.snapshots.get(id);
    return (snapshot && snapshot.goneAtMs === undefined ? snapshot : this.volume(id)).content;
  }

  write(volumeId: string, text: string): void {
    const volume = this.volume(volumeId);
    volume.content = { ...volume.content, writes: [...volume.content.writes, text] };
  }

  mount(volumeId: string): void {
    const volume = this.volume(volumeId);
    if (!volume.attachment) throw new Error(`${volumeId} is not attached: nobody can mount it`);
    volume.mounted = true;
  }

  /** The guest lets go; a detach that waits for it goes on. */
  unmount(volumeId: string): void {
    const volume = this.volume(volumeId);
    volume.mounted = false;
    if (volume.attachment?.state === "busy") this.#finishDetaching(volume);
  }

  snapshot(): object {
    return {
      volumes: [...this.volumes.values()]
        .filter(({ goneAtMs }) => goneAtMs === undefined)
        .map(({ id, zone, sizeGiB, type, state, attachment, tags, content, mounted }) => ({
          ...{ id, zone, sizeGiB, type, state, content, mounted },
          attachment: attachment ?? null,
          tags: Object.fromEntries(tags),
        })),
      snapshots: [...this.snapshots.values()]
        .filter(({ goneAtMs }) => goneAtMs === undefined)
        .map(({ id, volumeId, state, tags, content }) => ({ id, volumeId, state, content, tags: Object.fromEntries(tags) })),
    };
  }

  // --- Instances -------------------------------------------------------------------------------------------------
  // What EC2 asks at launch, at the end and for describes.

  /** Why a launch with these devices must fail, or undefined. */
  refusal(mappings: DeviceMapping[] | undefined): AwsError | undefined {
    try {
      this.#plan(mappings);
      return undefined;
    } catch (error) {
      if (error instanceof AwsError) return error;
      throw error;
    }
  }

  /** The volumes of a fresh instance: its root, and one for each mapping. */
  launched(instance: Instance, mappings: DeviceMapping[] | undefined, tags: Iterable<[string, string]>): void {
    const given = [...tags];
    for (const { device, disk, deleteOnTermination } of this.#plan(mappings)) {
      const root = device === ROOT_DEVICE;
      const id = root ? instance.volumeId : this.#newId("vol");
      const volume = this.#make(id, instance.zone, disk, { state: "in-use", tags: given, root, atMs: instance.launchedAtMs });
      this.#attach(volume, instance, { device, deleteOnTermination, state: "attached", atMs: instance.launchedAtMs });
    }
  }

  /** Why an instance must die before it runs, or undefined: EC2 notices a key that it may not use no earlier. */
  launchFailure(instance: Instance): { Code: string; Message: string } | undefined {
    const isLocked = this.attachedTo(instance.id).some(({ kmsKeyId }) => kmsKeyId && this.unusableKeys.has(kmsKeyId));
    return isLocked ? { Code: "Client.InternalError", Message: "Client.InternalError: Client error on launch" } : undefined;
  }

  #isMountedBy({ state }: Instance, { root }: Volume): boolean {
    return this.guestMounts && state === "running" && !root;
  }

  /** A guest that is down has nothing mounted; a terminated one lets its volumes go. */
  instanceChanged(instance: Instance): void {
    if (instance.state === "running")
      for (const volume of this.attachedTo(instance.id)) volume.mounted ||= this.#isMountedBy(instance, volume);
    if (instance.state !== "terminated" && instance.state !== "stopped") return;
    for (const volume of this.attachedTo(instance.id)) {
      this.unmount(volume.id);
      const { attachment } = volume;
      if (!attachment || instance.state === "stopped") continue;
      if (attachment.deleteOnTermination) {
        if (!volume.root) this.#world.record("volume delete", [volume.id, instance.id]);
        this.#vanish(volume);
      } else this.#finishDetaching(volume, this.#world.delays.volumeReleaseMs);
    }
  }

  /** An instance's BlockDeviceMappings in a describe of the moment `viewMs`. */
  mappings(instance: Instance, viewMs: number): object[] {
    return this.#viewedMappings(instance, viewMs).map(({ volume, attachment }) => ({
      DeviceName: attachment.device,
      Ebs: {
        VolumeId: volume.id,
        // Instances have no word for busy.
        Status: attachment.state === "busy" ? "detaching" : attachment.state,
        AttachTime: wholeSeconds(attachment.attachedAtMs),
        DeleteOnTermination: attachment.deleteOnTermination,
      },
    }));
  }

  /** DescribeInstances' filters on devices. */
  instanceFacts(viewMs: number): Facts<Instance> {
    const each = (fact: (attachment: Attachment, volume: Volume) => string) => (instance: Instance) =>
      this.#viewedMappings(instance, viewMs).map(({ volume, attachment }) => fact(attachment, volume));
    return {
      "block-device-mapping.device-name": each(({ device }) => device),
      "block-device-mapping.volume-id": each((_, { id }) => id),
      "block-device-mapping.status": each(({ state }) => (state === "busy" ? "detaching" : state)),
      "block-device-mapping.delete-on-termination": each(({ deleteOnTermination }) => String(deleteOnTermination)),
    };
  }

  #viewedMappings(instance: Instance, viewMs: number): { volume: Volume; attachment: Attachment }[] {
    return [...(this.#ofInstance.get(instance.id) ?? [])].flatMap((volume) => {
      const attachment = viewOf<VisibleVolume>(volume, viewMs)?.attachment;
      return attachment?.instanceId === instance.id ? [{ volume, attachment }] : [];
    });
  }

  /** For CreateTags and DeleteTags; undefined: the ID is of neither kind. */
  taggable(id: string, viewMs: number): { id: string; tags: Map<string, string>; touch: () => void } | undefined {
    if (id.startsWith("snap-")) {
      const snapshot = this.#snapshot(id, viewMs);
      return { id, tags: snapshot.tags, touch: () => this.#touchSnapshot(snapshot) };
    }
    if (!id.startsWith("vol-")) return undefined;
    const volume = this.#volume(id, viewMs);
    return { id, tags: volume.tags, touch: () => this.#touch(volume) };
  }

  #modifyInstanceAttribute(input: ModifyInstanceAttributeRequest): object {
    const { InstanceId, BlockDeviceMappings: mappings, DryRun, Attribute, ...others } = input;
    if (!InstanceId) throw missing("InstanceId");
    if (Object.keys(others).length > 0 || (Attribute !== undefined && Attribute !== "blockDeviceMapping"))
      throw unsupported("attributes of instances other than BlockDeviceMappings");
    const instance = this.#instance(InstanceId);
    if (!mappings || mappings.length === 0) throw new AwsError("InvalidParameterCombination", "No attributes specified.");
    // For `shutting-down` unconfirmed.
    if (instance.state === "terminated" || instance.state === "shutting-down")
      throw new AwsError(
        "IncorrectInstanceState",
        `The instance '${instance.id}' is not in a state from which it can be modified: ${instance.state}`,
      );
    const changes = mappings.map(({ DeviceName, Ebs, VirtualName, NoDevice }) => {
      if (VirtualName !== undefined || NoDevice !== undefined) throw unsupported("VirtualName and NoDevice");
      if (!DeviceName) throw missing("BlockDeviceMapping.DeviceName");
      const [volume] = this.attachedTo(instance.id, DeviceName);
      if (!volume?.attachment || (Ebs?.VolumeId !== undefined && Ebs.VolumeId !== volume.id))
        throw new AwsError("InvalidInstanceAttributeValue", `No device is currently mapped at ${DeviceName}`);
      // "If no value is specified for DeleteOnTermination, the default is true."
      const deleteOnTermination = Ebs?.DeleteOnTermination ?? true;
      return { volume, attachment: { ...volume.attachment, deleteOnTermination } };
    });
    dryRun(DryRun);
    for (const { volume, attachment } of changes) {
      this.#change(volume, { attachment });
      this.#world.record("volume attribute", [volume.id, instance.id], undefined, `delete=${attachment.deleteOnTermination}`);
    }
    return {};
  }

  // --- Attaching, detaching --------------------------------------------------------------------------------------
  // Neither is idempotent: a second AttachVolume is VolumeInUse, a second DetachVolume is IncorrectState.

  #attachVolume(input: AttachVolumeRequest): object {
    const { Device: device, InstanceId, VolumeId, EbsCardIndex } = input;
    if (!InstanceId) throw missing("InstanceId");
    if (!device) throw missing("Device");
    if (EbsCardIndex) throw unsupported("EbsCardIndex");
    const viewMs = this.#world.viewMs();
    const volume = this.#volume(VolumeId, viewMs);
    const instance = this.#instance(InstanceId, viewMs);
    if (!DEVICE.test(device))
      throw new AwsError(
        "InvalidParameterValue",
        `Value (${device}) for parameter device is invalid. ${device} is not a valid EBS device name.`,
      );
    if (volume.attachment) throw new AwsError("VolumeInUse", `${volume.id} is already attached to an instance`);
    if (volume.state !== "available") throw notAvailable(volume);
    if (volume.zone !== instance.zone)
      throw new AwsError(
        "InvalidVolume.ZoneMismatch",
        `The volume '${volume.id}' is not in the same availability zone as instance '${instance.id}'`,
      );
    const states = ["running", "stopped", ...(this.attachWhilePending ? ["pending"] : [])];
    if (!states.includes(instance.state)) throw new AwsError("IncorrectState", `Instance '${instance.id}' is not 'running'.`);
    // /dev/sdf and /dev/xvdf are one device.
    if (this.attachedTo(instance.id).some(({ attachment }) => attachment && bare(attachment.device) === bare(device)))
      throw new AwsError(
        "InvalidParameterValue",
        `Invalid value '${device}' for unixDevice. Attachment point ${device} is already in use`,
      );
    dryRun(input.DryRun);
    const attachment = this.#attach(volume, instance, { device, deleteOnTermination: false, state: "attaching" });
    this.#world.after(this.#world.random.between(this.#world.delays.volumeAttachingMs), () => {
      const now = volume.attachment;
      if (now?.serial !== attachment.serial || now.state !== "attaching") return;
      this.#change(volume, { attachment: { ...now, state: "attached" } });
      volume.mounted = this.#isMountedBy(instance, volume);
      this.#world.record("volume attached", [volume.id, instance.id], undefined, device);
    });
    return describeAttachment(volume.id, attachment);
  }

  #attach(
    volume: Volume,
    instance: Instance,
    given: Pick<Attachment, "device" | "deleteOnTermination" | "state"> & { atMs?: number },
  ): Attachment {
    const { atMs = this.#world.now(), ...rest } = given;
    const attachment: Attachment = { ...rest, instanceId: instance.id, attachedAtMs: atMs, serial: ++this.#attachments };
    // What a scenario says of the past was never otherwise.
    if (given.atMs === undefined) this.#change(volume, { state: "in-use", attachment });
    else volume.attachment = attachment;
    const known = this.#ofInstance.get(instance.id) ?? new Set();
    this.#ofInstance.set(instance.id, known.add(volume));
    const isAttached = given.state === "attached";
    volume.mounted = isAttached && this.#isMountedBy(instance, volume);
    if (!volume.root)
      this.#world.record(isAttached ? "volume attached" : "volume attach", [volume.id, instance.id], undefined, given.device);
    return attachment;
  }

  #detachVolume(input: DetachVolumeRequest): object {
    const viewMs = this.#world.viewMs();
    const volume = this.#volume(input.VolumeId, viewMs);
    const instance = input.InstanceId ? this.#instance(input.InstanceId, viewMs) : undefined;
    const { attachment } = volume;
    if (!attachment) throw new AwsError("IncorrectState", `Volume '${volume.id}' is in the '${volume.state}' state.`);
    if (instance && instance.id !== attachment.instanceId)
      throw new AwsError(
        "InvalidAttachment.NotFound",
        `Volume ${volume.id} can not be detached from ${instance.id} because it is not attached`,
      );
    if (input.Device !== undefined && input.Device !== attachment.device)
      throw new AwsError(
        "InvalidAttachment.NotFound",
        `The volume ${volume.id} is not attached to instance ${attachment.instanceId} as device ${input.Device}`,
      );
    const owner = this.#ec2.instances.get(attachment.instanceId);
    if (attachment.device === ROOT_DEVICE && owner?.state !== "stopped")
      throw new AwsError(
        "IncorrectState",
        `Unable to detach root volume '${volume.id}' from instance '${attachment.instanceId}'`,
      );
    // Unconfirmed.
    if (!input.Force && (attachment.state === "detaching" || attachment.state === "busy"))
      throw new AwsError("IncorrectState", `Volume '${volume.id}' is in the 'detaching' state.`);
    dryRun(input.DryRun);
    this.#world.record(
      "volume detach",
      [volume.id, attachment.instanceId],
      undefined,
      input.Force ? `${attachment.device} by force` : attachment.device,
    );
    if (input.Force && volume.mounted) {
      volume.content = { ...volume.content, clean: false };
      volume.mounted = false;
    }
    return describeAttachment(volume.id, this.#finishDetaching(volume));
  }

  /** `detaching`, then available; or `busy`, where the guest has it mounted. */
  #finishDetaching(volume: Volume, delayMs = this.#world.delays.volumeDetachingMs): Attachment {
    if (!volume.attachment) throw new Error(`${volume.id} is not attached`);
    const attachment: Attachment = { ...volume.attachment, state: "detaching" };
    this.#change(volume, { attachment });
    this.#world.after(this.#world.random.between(delayMs), () => {
      const now = volume.attachment;
      if (now?.serial !== attachment.serial || now.state !== "detaching") return;
      if (volume.mounted) {
        this.#change(volume, { attachment: { ...now, state: "busy" } });
        return;
      }
      this.#change(volume, { state: "available", attachment: undefined });
      this.#world.record("volume detached", [volume.id, attachment.instanceId], undefined, attachment.device);
    });
    return attachment;
  }

  // --- Making ----------------------------------------------------------------------------------------------------

  #createVolume(input: CreateVolumeRequest): object {
    const { AvailabilityZone: zone, OutpostArn, MultiAttachEnabled, VolumeInitializationRate, Operator } = input;
    if (input.AvailabilityZoneId !== undefined) throw unsupported("AvailabilityZoneId");
    if (OutpostArn !== undefined || MultiAttachEnabled || VolumeInitializationRate !== undefined || Operator !== undefined)
      throw unsupported("Outposts, Multi-Attach, initialization rates and managed volumes");
    if (!zone) throw missing("AvailabilityZone");
    // A volume needs no subnet in its zone.
    if (!zone.startsWith(this.#world.region) || !/^[a-f]$/.test(zone.slice(this.#world.region.length)))
      throw new AwsError("InvalidZone.NotFound", `The zone '${zone}' does not exist.`);
    const tags = tagsAtBirth(input.TagSpecifications, "volume");
    const disk = () => this.#disk({ ...input, VolumeSize: input.Size });
    if (input.DryRun) disk();
    dryRun(input.DryRun);
    // Within one zone, for all that EC2's guide says of such actions.
    return this.#ec2.idempotent(`CreateVolume ${zone} `, input.ClientToken, input, () => {
      const volume = this.#make(this.#newId("vol"), zone, disk(), { state: "creating", tags });
      this.#world.after(this.#world.random.between(this.#world.delays.volumeCreatingMs), () => {
        // A key is looked at after the answer: such a volume is gone without a word.
        if (volume.kmsKeyId && this.unusableKeys.has(volume.kmsKeyId)) this.#vanish(volume);
        else this.#change(volume, { state: "available" });
      });
      return () => {
        if (volume.goneAtMs !== undefined)
          throw new AwsError(
            "IdempotentParameterMismatch",
            "The client token you have provided is associated with a resource that is already deleted. Please use a different client token.",
          );
        return this.#describe(volume, volume, false);
      };
    });
  }

  #make(
    id: string,
    zone: string,
    { snapshot, ...disk }: Disk,
    given: { state: VolumeState; tags: Iterable<[string, string]>; root?: boolean; atMs?: number },
  ): Volume {
    const { state, tags, root = false, atMs = this.#world.now() } = given;
    const volume: Volume = {
      ...disk,
      ...{ id, zone, state, root },
      snapshotId: snapshot?.id,
      createdAtMs: atMs,
      goneAtMs: undefined,
      attachment: undefined,
      tags: new Map(tags),
      content: this.#copyOf(snapshot?.content),
      mounted: false,
      lastSnapshotAtMs: Number.NEGATIVE_INFINITY,
      past: [],
    };
    this.volumes.set(id, volume);
    const from = snapshot ? ` from ${snapshot.id}` : "";
    if (!root) this.#world.record("volume create", [id], undefined, `${disk.sizeGiB} GiB ${disk.type} ${zone}${from}`);
    return volume;
  }

  #copyOf(content: Content | undefined): Content {
    const id = `data-${++this.#contents}`;
    return { lineage: [...(content?.lineage ?? []), id], writes: content?.writes ?? [], clean: content?.clean ?? true };
  }

  #createSnapshot(input: CreateSnapshotRequest): object {
    if (input.OutpostArn !== undefined || input.Location !== undefined) throw unsupported("snapshots outside of the region");
    const volume = this.#volume(input.VolumeId, this.#world.viewMs());
    const tags = tagsAtBirth(input.TagSpecifications, "snapshot");
    if (volume.state === "deleting") throw notAvailable(volume);
    const now = this.#world.now();
    if (now < volume.lastSnapshotAtMs + this.snapshotIntervalMs)
      throw new AwsError(
        "SnapshotCreationPerVolumeRateExceeded",
        "The maximum per volume CreateSnapshot request rate has been exceeded. Use an increasing or variable sleep interval between requests.",
      );
    const pending = [...this.snapshots.values()].filter((one) => one.volumeId === volume.id && one.state === "pending");
    if (pending.length >= (volume.type === "st1" || volume.type === "sc1" ? 1 : 5))
      throw new AwsError(
        "ConcurrentSnapshotLimitExceeded",
        "Maximum allowed in-progress snapshots for a single volume exceeded.",
      );
    dryRun(input.DryRun);
    volume.lastSnapshotAtMs = now;
    const { sizeGiB, encrypted, kmsKeyId, mounted } = volume;
    const content = this.#copyOf(volume.content);
    const snapshot: Snapshot = {
      id: this.#newId("snap"),
      volumeId: volume.id,
      ...{ sizeGiB, encrypted, kmsKeyId },
      description: input.Description ?? "",
      state: "pending",
      createdAtMs: now,
      doneAtMs: now + this.#world.random.between(this.#world.delays.snapshotMs),
      goneAtMs: undefined,
      failure: undefined,
      tags: new Map(tags),
      content: mounted ? { ...content, clean: false } : content,
      past: [],
    };
    this.snapshots.set(snapshot.id, snapshot);
    this.#world.record("snapshot create", [snapshot.id, volume.id]);
    this.#world.at(snapshot.doneAtMs, () => {
      if (snapshot.goneAtMs !== undefined) return;
      this.#touchSnapshot(snapshot);
      snapshot.failure = this.failSnapshot?.(volume);
      snapshot.state = snapshot.failure === undefined ? "completed" : "error";
      this.#world.record(`snapshot ${snapshot.state}`, [snapshot.id, volume.id]);
    });
    return this.#describeSnapshot(snapshot, snapshot, now);
  }

  // --- Describing ------------------------------------------------------------------------------------------------

  #describeVolumes(input: DescribeVolumesRequest): object {
    const viewMs = this.#world.viewMs();
    const ids = [...new Set(input.VolumeIds ?? [])];
    if (ids.length > 0 && input.MaxResults !== undefined) throw notTogether("volumeSet", "maxResults");
    const size = maxResults(input.MaxResults);
    const viewed = (volume: Volume): VisibleVolume => viewOf<VisibleVolume>(volume, viewMs) ?? volume;
    const attached = (fact: (attachment: Attachment) => string) => (volume: Volume) => {
      const { attachment } = viewed(volume);
      return attachment ? fact(attachment) : [];
    };
    const matches = filter<Volume>(
      input.Filters,
      {
        "attachment.delete-on-termination": attached(({ deleteOnTermination }) => String(deleteOnTermination)),
        "attachment.device": attached(({ device }) => device),
        "attachment.instance-id": attached(({ instanceId }) => instanceId),
        "attachment.status": attached(({ state }) => state),
        "availability-zone": ({ zone }) => zone,
        encrypted: ({ encrypted }) => String(encrypted),
        size: ({ sizeGiB }) => String(sizeGiB),
        "snapshot-id": ({ snapshotId }) => snapshotId ?? [],
        status: (volume) => viewed(volume).state,
        "tag-key": (volume) => [...viewed(volume).tags.keys()],
        "volume-id": ({ id }) => id,
        "volume-type": ({ type }) => type,
      },
      (volume) => viewed(volume).tags,
    );
    const candidates = ids.length > 0 ? this.#knownVolumes(ids, viewMs, "volumes") : [...this.volumes.values()];
    dryRun(input.DryRun);
    const found = candidates.filter((volume) => viewOf<VisibleVolume>(volume, viewMs) && matches(volume));
    const isEmpty = size !== undefined && this.#world.emptyFirstPages;
    const { items, next } = page(found, size ?? 1000, input.NextToken, badToken, isEmpty);
    return { Volumes: items.map((volume) => this.#describe(volume, viewed(volume), true)), NextToken: next };
  }

  #describe(volume: Volume, { state, attachment, tags }: VisibleVolume, withAttachments: boolean): object {
    return {
      VolumeId: volume.id,
      AvailabilityZone: volume.zone,
      CreateTime: wholeSeconds(volume.createdAtMs),
      Size: volume.sizeGiB,
      SnapshotId: volume.snapshotId ?? "",
      State: state,
      VolumeType: volume.type,
      Iops: volume.iops,
      Throughput: volume.throughput,
      Encrypted: volume.encrypted,
      KmsKeyId: volume.kmsKeyId,
      MultiAttachEnabled: false,
      ...(withAttachments && { Attachments: attachment ? [describeAttachment(volume.id, attachment)] : [] }),
      Tags: [...tags].map(([Key, Value]) => ({ Key, Value })),
    };
  }

  /** Only the account's own; the real service adds all public ones where no owner is named. */
  #describeSnapshots(input: DescribeSnapshotsRequest): object {
    const viewMs = this.#world.viewMs();
    const ids = [...new Set(input.SnapshotIds ?? [])];
    if (ids.length > 0 && input.MaxResults !== undefined) throw notTogether("snapshotSet", "maxResults");
    const size = maxResults(input.MaxResults);
    const viewed = (snapshot: Snapshot): VisibleSnapshot => viewOf<VisibleSnapshot>(snapshot, viewMs) ?? snapshot;
    const { account } = this.#world;
    const owners = [input.OwnerIds, input.RestorableByUserIds].every(
      (given) => !given || given.length === 0 || given.includes("self") || given.includes(account),
    );
    const matches = filter<Snapshot>(
      input.Filters,
      {
        description: ({ description }) => description,
        encrypted: ({ encrypted }) => String(encrypted),
        "owner-id": () => account,
        "snapshot-id": ({ id }) => id,
        status: (snapshot) => viewed(snapshot).state,
        "tag-key": (snapshot) => [...viewed(snapshot).tags.keys()],
        "volume-id": ({ volumeId }) => volumeId,
        "volume-size": ({ sizeGiB }) => String(sizeGiB),
      },
      (snapshot) => viewed(snapshot).tags,
    );
    const candidates = ids.length > 0 ? ids.map((id) => this.#snapshot(id, viewMs)) : [...this.snapshots.values()];
    dryRun(input.DryRun);
    const found = candidates.filter(
      (snapshot) => owners && viewOf<VisibleSnapshot>(snapshot, viewMs) !== undefined && matches(snapshot),
    );
    const { items, next } = page(found, size ?? 1000, input.NextToken, badToken);
    return {
      Snapshots: items.map((snapshot) => this.#describeSnapshot(snapshot, viewed(snapshot), viewMs)),
      NextToken: next,
    };
  }

  #describeSnapshot(snapshot: Snapshot, { state, tags }: VisibleSnapshot, viewMs: number): object {
    const { createdAtMs, doneAtMs } = snapshot;
    const part = doneAtMs > createdAtMs ? (viewMs - createdAtMs) / (doneAtMs - createdAtMs) : 1;
    return {
      SnapshotId: snapshot.id,
      VolumeId: snapshot.volumeId,
      VolumeSize: snapshot.sizeGiB,
      State: state,
      ...(state === "error" && { StateMessage: snapshot.failure }),
      Progress: state === "completed" ? "100%" : `${Math.min(99, Math.max(0, Math.floor(part * 100)))}%`,
      StartTime: new Date(createdAtMs),
      OwnerId: this.#world.account,
      Description: snapshot.description,
      Encrypted: snapshot.encrypted,
      KmsKeyId: snapshot.kmsKeyId,
      StorageTier: "standard",
      Tags: [...tags].map(([Key, Value]) => ({ Key, Value })),
    };
  }

  // --- Looking up, changing --------------------------------------------------------------------------------------

  #instance(id: string, viewMs = this.#world.viewMs()): Instance {
    const [instance] = this.#ec2.known([id], viewMs);
    if (!instance) throw new Error(`the instance ${id} was known a moment ago`);
    return instance;
  }

  #volume(id: string | undefined, viewMs: number): Volume {
    if (!id) throw missing("VolumeId");
    const [volume] = this.#knownVolumes([id], viewMs, "volumeId");
    if (!volume) throw new Error(`the volume ${id} was known a moment ago`);
    return volume;
  }

  #knownVolumes(ids: string[], viewMs: number, parameter: string): Volume[] {
    for (const id of ids)
      if (!VOLUME_ID.test(id))
        throw new AwsError("InvalidParameterValue", `Value (${id}) for parameter ${parameter} is invalid. Expected: 'vol-...'.`);
    const found = ids.flatMap((id) => {
      const volume = this.volumes.get(id);
      // What is gone cannot be acted upon, whatever a describe still shows.
      const isThere =
        volume && viewOf<VisibleVolume>(volume, viewMs) && (parameter === "volumes" || volume.goneAtMs === undefined);
      return isThere ? [volume] : [];
    });
    const absent = ids.filter((id) => !found.some((volume) => volume.id === id));
    if (absent.length > 0)
      throw new AwsError(
        "InvalidVolume.NotFound",
        absent.length === 1 ? `The volume '${absent[0]}' does not exist.` : `The volumes '${absent.join(", ")}' do not exist.`,
      );
    return found;
  }

  #snapshot(id: string | undefined, viewMs: number): Snapshot {
    if (!id) throw missing("SnapshotId");
    if (!SNAPSHOT_ID.test(id))
      throw new AwsError("InvalidParameterValue", `Value (${id}) for parameter snapshotId is invalid. Expected: 'snap-...'.`);
    const snapshot = this.snapshots.get(id);
    if (!snapshot || snapshot.goneAtMs !== undefined || !viewOf<VisibleSnapshot>(snapshot, viewMs))
      throw new AwsError("InvalidSnapshot.NotFound", `The snapshot '${id}' does not exist.`);
    return snapshot;
  }

  #newId(prefix: "vol" | "snap"): string {
    return `${prefix}-0${this.#world.random.hex(16)}`;
  }

  #change(volume: Volume, change: { state?: VolumeState; attachment?: Attachment | undefined }): void {
    this.#touch(volume);
    Object.assign(volume, change);
    if (!volume.attachment) volume.mounted = false;
  }

  #vanish(volume: Volume): void {
    this.#change(volume, { state: "deleted", attachment: undefined });
    volume.goneAtMs = this.#world.now();
  }

  /** To be called before what describes show of a volume changes. */
  #touch({ state, attachment, tags, ...volume }: Volume): void {
    this.#remember<VisibleVolume>(volume.past, { state, attachment, tags: new Map(tags) });
  }

  #touchSnapshot({ state, tags, past }: Snapshot): void {
    this.#remember<VisibleSnapshot>(past, { state, tags: new Map(tags) });
  }

  #remember<V>(past: (V & { untilMs: number })[], shown: V): void {
    const { staleMs } = this.#world.delays;
    if (staleMs === 0) return;
    const now = this.#world.now();
    while (past[0] && past[0].untilMs <= now - staleMs) past.shift();
    past.push({ ...shown, untilMs: now });
  }

  // --- Disks -----------------------------------------------------------------------------------------------------

  /** Every device of a launch, the root first; throws where EC2 refuses the launch. */
  #plan(mappings: DeviceMapping[] | undefined): PlannedDevice[] {
    const planned: PlannedDevice[] = [];
    let root: DeviceMapping["Ebs"] = {};
    const seen = new Set<string>();
    for (const { DeviceName: device, VirtualName, NoDevice, Ebs } of mappings ?? []) {
      if (!device) throw missing("DeviceName");
      const bad = (text: string) => new AwsError("InvalidBlockDeviceMapping", text);
      if (!DEVICE.test(device)) throw bad(`${device} is not a valid EBS device name.`);
      if (seen.has(bare(device))) throw bad(`The device '${device}' is used in more than one block-device mapping`);
      seen.add(bare(device));
      if (NoDevice !== undefined || VirtualName !== undefined) continue;
      if (!Ebs) throw missing("ebs");
      if (bare(device) === bare(ROOT_DEVICE)) root = Ebs;
      else planned.push({ device, disk: this.#disk(Ebs), deleteOnTermination: Ebs.DeleteOnTermination ?? true });
    }
    // The image says what the root is where the mapping does not.
    const disk = this.#disk({ VolumeSize: ROOT_GIB, VolumeType: "gp3", ...root });
    return [{ device: ROOT_DEVICE, disk, deleteOnTermination: root?.DeleteOnTermination ?? true }, ...planned];
  }

  /** Throws where EC2 refuses such a volume. */
  #disk(asked: NonNullable<DeviceMapping["Ebs"]>): Disk {
    const { VolumeSize, VolumeType: type = "gp2", Iops: iops, Throughput: throughput, Encrypted, KmsKeyId } = asked;
    const refuse = (text: string) => new AwsError("InvalidParameterValue", text);
    const limits = TYPES[type];
    if (!limits) throw new AwsError("UnknownVolumeType", `Unsupported volume type '${type}' for volume creation.`);
    if (asked.SnapshotId === undefined && VolumeSize === undefined) throw missing("size/snapshot");
    const snapshot = asked.SnapshotId === undefined ? undefined : this.#snapshot(asked.SnapshotId, this.#world.now());
    if (snapshot && snapshot.state !== "completed")
      throw new AwsError("IncorrectState", `Snapshot is in invalid state - ${snapshot.state}`);
    const sizeGiB = VolumeSize ?? snapshot?.sizeGiB ?? 0;
    if (!Number.isInteger(sizeGiB)) throw invalidValue(sizeGiB, "size");
    if (snapshot && sizeGiB < snapshot.sizeGiB)
      throw refuse(`Volume of ${sizeGiB}GiB is smaller than snapshot '${snapshot.id}', expect size >= ${snapshot.sizeGiB}GiB`);
    const [leastGiB, mostGiB] = limits.sizeGiB;
    if (sizeGiB < leastGiB) throw refuse(`Volume of ${sizeGiB}GiB is too small; minimum is ${leastGiB}GiB.`);
    if (sizeGiB > mostGiB)
      throw refuse(`Volume of ${sizeGiB}GiB is too large for volume type ${type}; maximum is ${mostGiB}GiB.`);
    if (iops !== undefined) {
      if (!limits.iops)
        throw new AwsError("InvalidParameterCombination", `The parameter iops is not supported for ${type} volumes.`);
      const [least, most] = limits.iops;
      if (iops < least) throw refuse(`Volume iops of ${iops} is too low; minimum is ${least}.`);
      if (iops > most) throw refuse(`Volume iops of ${iops} is too high; maximum is ${most}.`);
      const ratio = iops / sizeGiB;
      const perGiB = limits.iopsPerGiB ?? 0;
      // The least is granted to a disk of any size.
      if (iops > least && ratio > perGiB)
        throw refuse(`Iops to volume size ratio of ${ratio.toFixed(6)} is too high; maximum is ${perGiB}`);
    } else if (limits.provisioned)
      throw new AwsError("MissingParameter", `The parameter iops must be specified for ${type} volumes.`);
    if (throughput !== undefined) {
      if (!limits.throughput)
        throw new AwsError("InvalidParameterCombination", `The parameter throughput is not supported for ${type} volumes.`);
      const [least, most] = limits.throughput;
      if (throughput < least) throw refuse(`Throughput (MiBps) of ${throughput} is too low; minimum is ${least}.`);
      if (throughput > most) throw refuse(`Throughput (MiBps) of ${throughput} is too high; maximum is ${most}.`);
      const ratio = throughput / (iops ?? limits.iops?.[0] ?? 1);
      if (ratio > GP3_MIBPS_PER_IOPS)
        throw refuse(
          `Throughput (MiBps) to iops ratio of ${ratio.toFixed(6)} is too high; maximum is ${GP3_MIBPS_PER_IOPS} MiBps per iops.`,
        );
    }
    const encrypted = Encrypted ?? snapshot?.encrypted ?? false;
    if (KmsKeyId !== undefined && !encrypted)
      throw new AwsError("InvalidParameterDependency", "The parameter [KmsKeyId] requires the parameter Encrypted to be set.");
    if (snapshot?.encrypted && !encrypted)
      throw new AwsError("InvalidParameterCombination", "An encrypted snapshot cannot become an unencrypted volume.");
    const { region, account } = this.#world;
    return {
      sizeGiB,
      type,
      iops: iops ?? (type === "gp2" ? Math.min(16_000, Math.max(100, 3 * sizeGiB)) : limits.iops?.[0]),
      throughput: throughput ?? limits.throughput?.[0],
      encrypted,
      kmsKeyId: encrypted ? (KmsKeyId ?? snapshot?.kmsKeyId ?? `arn:aws:kms:${region}:${account}:alias/aws/ebs`) : undefined,
      snapshot,
    };
  }
}

/** What a describe of the moment `viewMs` shows; undefined: nothing (not yet, or no more). */
function viewOf<V>(item: V & Aging<V>, viewMs: number): V | undefined {
  if (item.createdAtMs > viewMs || (item.goneAtMs !== undefined && viewMs >= item.goneAtMs)) return undefined;
  return item.past.find((past) => past.untilMs > viewMs) ?? item;
}

/** A group's volumes as a launch template has them. */
export function mappingsOf(specs: VolumeSpec[]): LaunchTemplateBlockDeviceMapping[] {
  return specs.map((spec) => ({
    DeviceName: spec.device,
    Ebs: {
      VolumeSize: spec.sizeGiB,
      ...(spec.type && { VolumeType: spec.type as never }),
      ...(spec.iops && { Iops: spec.iops }),
      ...(spec.throughput && { Throughput: spec.throughput }),
      ...(spec.encrypted && { Encrypted: spec.encrypted }),
      ...(spec.kmsKeyId && { KmsKeyId: spec.kmsKeyId }),
      ...(spec.snapshotId && { SnapshotId: spec.snapshotId }),
      ...(spec.deleteOnTermination !== undefined && { DeleteOnTermination: spec.deleteOnTermination }),
    },
  }));
}

/** The request's devices over the template's, member by member. */
export function mergeDevices(template: DeviceMapping[] | undefined, request: DeviceMapping[] | undefined): DeviceMapping[] {
  const merged = new Map((template ?? []).map((mapping) => [mapping.DeviceName, mapping]));
  for (const mapping of request ?? []) {
    const under = merged.get(mapping.DeviceName);
    merged.set(mapping.DeviceName, {
      ...under,
      ...mapping,
      ...((under?.Ebs || mapping.Ebs) && { Ebs: { ...under?.Ebs, ...mapping.Ebs } }),
    });
  }
  return [...merged.values()];
}

const bare = (device: string) => device.replace(/^(?:\/dev\/)?(?:sd|xvd)/, "");
const wholeSeconds = (ms: number) => new Date(Math.floor(ms / 1000) * 1000);

function describeAttachment(volumeId: string, attachment: Attachment): object {
  return {
    VolumeId: volumeId,
    InstanceId: attachment.instanceId,
    Device: attachment.device,
    State: attachment.state,
    AttachTime: wholeSeconds(attachment.attachedAtMs),
    DeleteOnTermination: attachment.deleteOnTermination,
  };
}

function tagsAtBirth(specifications: TagSpecification[] | undefined, resource: string): [string, string][] {
  for (const { ResourceType, Tags } of specifications ?? []) {
    if (ResourceType !== resource)
      throw new AwsError("InvalidParameterValue", `'${ResourceType}' is not a valid taggable resource type for this operation.`);
    checkTags(Tags);
  }
  return mergeTags(undefined, specifications, resource);
}

function notAvailable(volume: Volume): AwsError {
  return new AwsError("IncorrectState", `${volume.id} is not 'available'.`);
}

function unsupported(what: string): AwsError {
  return new AwsError("UnsupportedOperation", `The simulator does not know ${what}`);
}

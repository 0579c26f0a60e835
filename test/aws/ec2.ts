// EC2: instances, pools of capacity, launch templates, CreateFleet (type instant) and RunInstances.
import type {
  CreateFleetRequest,
  CreateTagsRequest,
  DeleteTagsRequest,
  DescribeInstancesRequest,
  DescribeInstanceTypeOfferingsRequest,
  DescribeInstanceTypesRequest,
  DescribeLaunchTemplateVersionsRequest,
  DescribeSubnetsRequest,
  Filter,
  FleetLaunchTemplateOverridesRequest,
  GetInstanceTypesFromInstanceRequirementsRequest,
  InstanceRequirementsRequest,
  ResponseLaunchTemplateData,
  RunInstancesRequest,
  Tag,
  TagSpecification,
  TerminateInstancesRequest,
} from "@aws-sdk/client-ec2";
import { AwsError, copyOf, page, wildcard } from "./basics.ts";
import { INSTANCE_TYPES, type InstanceTypeFacts } from "./catalogue.ts";
import { type Content, type DeviceMapping, Ebs, mergeDevices, ROOT_DEVICE, type Volume } from "./ebs.ts";
import { type Handlers, isoSeconds, type World } from "./world.ts";

export type Lifecycle = "spot" | "on-demand";
export type StateName = "pending" | "running" | "shutting-down" | "terminated" | "stopping" | "stopped";

const STATE_CODES: Record<StateName, number> = {
  pending: 0,
  running: 16,
  "shutting-down": 32,
  terminated: 48,
  stopping: 64,
  stopped: 80,
};

interface Visible {
  state: StateName;
  stateReason: { Code: string; Message: string } | undefined;
  transitionReason: string;
  tags: Map<string, string>;
}

export interface Instance extends Visible {
  id: string;
  type: string;
  zone: string;
  lifecycle: Lifecycle;
  subnet: Subnet;
  imageId: string;
  privateIp: string;
  privateDns: string;
  launchedAtMs: number;
  terminatedAtMs: number | undefined;
  /** The Auto Scaling group that it is a member of. */
  group: string | undefined;
  reservationId: string;
  clientToken: string | undefined;
  /** Of its root. */
  volumeId: string;
  /** The pool gets nothing back from an instance that AWS took for itself. */
  reclaimed: boolean;
  /** Older states, for describes that lag behind. */
  past: (Visible & { untilMs: number })[];
}

export interface Subnet {
  id: string;
  zone: string;
  vpcId: string;
  freeAddresses: number;
}

export interface Pool {
  lifecycle: Lifecycle;
  type: string;
  zone: string;
  /** How many more can be launched. */
  capacity: number;
  /** Dollars an hour. */
  price: number;
  /** The pool's launches fail with this code, whatever its capacity. */
  error: string | undefined;
}

export interface LaunchTemplate {
  id: string;
  name: string;
  defaultVersion: number;
  /** The n-th is version n + 1. */
  versions: { data: ResponseLaunchTemplateData; createdAtMs: number }[];
}

export interface LaunchSpec {
  type: string;
  subnet: Subnet;
  lifecycle: Lifecycle;
  imageId: string;
  tags: Iterable<[string, string]>;
  volumeTags?: Iterable<[string, string]>;
  /** Beside the root, or what the root is to be. */
  blockDevices?: DeviceMapping[];
  clientToken?: string;
  reservationId?: string;
  /** Running from the start, and taken from no pool: the past of a scenario. */
  atOnce?: boolean;
  /** How long ago the launch was; only with `atOnce`. */
  ageMs?: number;
}

interface Remembered {
  request: string;
  answer: () => object;
  untilMs: number;
}

const INSTANCE_ID = /^i-(?:[0-9a-f]{8}|[0-9a-f]{17})$/;
const TOKEN_MEMORY_MS = 3_600_000;

const MESSAGES: Record<string, (pool: Pool) => string> = {
  InsufficientInstanceCapacity: ({ lifecycle, type, zone }) =>
    lifecycle === "spot"
      ? "There is no Spot capacity available that matches your request."
      : `We currently do not have sufficient ${type} capacity in the Availability Zone you requested (${zone}). Our system will be working on provisioning additional capacity.`,
  MaxSpotInstanceCountExceeded: () => "Max spot instance count exceeded",
  VcpuLimitExceeded: () =>
    "You have requested more vCPU capacity than your current vCPU limit allows for the instance bucket that the specified instance type belongs to.",
  UnfulfillableCapacity: () =>
    "Unable to fulfill capacity due to your request configuration. Please adjust your request and try again.",
  Unsupported: ({ type, zone }) =>
    `Your requested instance type (${type}) is not supported in your requested Availability Zone (${zone}).`,
};

export class Ec2 {
  readonly #world: World;
  readonly instances = new Map<string, Instance>();
  readonly subnets = new Map<string, Subnet>();
  readonly templates = new Map<string, LaunchTemplate>();
  readonly ebs: Ebs;
  /** Images that exist no more: their instances cannot be attached, nor launched. */
  readonly missingImages = new Set<string>();
  readonly windowsImages = new Set<string>();
  /** "TYPE/ZONE" that EC2 does not offer. */
  readonly notOffered = new Set<string>();
  /** Where a fleet launches nothing, throw its first error as the call's own, as AWS at times does. */
  capacityErrorsAsCall = false;
  /** Asked when an instance would become running; a reason makes it terminated instead. */
  dieWhilePending: ((instance: Instance) => { Code: string; Message: string } | undefined) | undefined;
  readonly #pools = new Map<string, Pool>();
  readonly #remembered = new Map<string, Remembered>();
  readonly #vpcId: string;
  #addresses = 9;

  constructor(world: World) {
    this.#world = world;
    this.#vpcId = `vpc-${world.random.hex(17)}`;
    this.ebs = new Ebs(world, this);
    Object.assign(this.operations, this.ebs.operations);
  }

  readonly operations: Handlers = {
    DescribeInstances: (input: DescribeInstancesRequest) => this.#describeInstances(input),
    CreateFleet: (input: CreateFleetRequest) => this.#createFleet(input),
    RunInstances: (input: RunInstancesRequest) => this.#runInstances(input),

    CreateTags: (input: CreateTagsRequest) => {
      const tags = checkTags(input.Tags);
      if (tags.length === 0) throw missing("Tag");
      const resources = this.#taggable(input.Resources);
      for (const resource of resources) {
        const own = [...resource.tags.keys()].filter((key) => !key.startsWith("aws:"));
        if (new Set([...own, ...tags.map(([key]) => key)]).size > 50)
          throw new AwsError("TagLimitExceeded", `The maximum number of Tags for resource ${resource.id} has been reached.`);
      }
      dryRun(input.DryRun);
      for (const resource of resources) {
        resource.touch();
        for (const [key, value] of tags) resource.tags.set(key, value);
      }
      this.#world.record(
        "tags",
        resources.map(({ id }) => id),
        undefined,
        tags.map(([key, value]) => `${key}=${value}`).join(" "),
      );
      return {};
    },

    DeleteTags: (input: DeleteTagsRequest) => {
      const resources = this.#taggable(input.Resources);
      for (const { Key } of input.Tags ?? []) if (Key?.startsWith("aws:")) throw reservedKey(Key);
      dryRun(input.DryRun);
      for (const resource of resources) {
        resource.touch();
        for (const key of [...resource.tags.keys()]) {
          const given = input.Tags?.find((tag) => tag.Key === key);
          const named = given && (given.Value === undefined || given.Value === resource.tags.get(key));
          // Without Tags, all user tags go.
          if (named || (!input.Tags && !key.startsWith("aws:"))) resource.tags.delete(key);
        }
      }
      return {};
    },

    TerminateInstances: (input: TerminateInstancesRequest) => {
      const ids = [...new Set(input.InstanceIds ?? [])];
      if (ids.length === 0) throw missing("InstanceId");
      const instances = this.known(ids, this.#world.viewMs());
      dryRun(input.DryRun);
      return {
        TerminatingInstances: instances.map((instance) => {
          const previous = instance.state;
          this.terminate(instance, "Client.UserInitiatedShutdown: User initiated shutdown", true);
          return {
            InstanceId: instance.id,
            PreviousState: stateOf(previous),
            CurrentState: stateOf(instance.state),
          };
        }),
      };
    },

    DescribeSubnets: (input: DescribeSubnetsRequest) => {
      for (const id of input.SubnetIds ?? []) this.#subnet(id);
      const matches = filter<Subnet>(input.Filters, {
        "subnet-id": (subnet) => subnet.id,
        "availability-zone": (subnet) => subnet.zone,
        "vpc-id": (subnet) => subnet.vpcId,
        state: () => "available",
      });
      const found = [...this.subnets.values()].filter(
        (subnet) => (!input.SubnetIds || input.SubnetIds.includes(subnet.id)) && matches(subnet),
      );
      const { items, next } = page(found, maxResults(input.MaxResults) ?? 1000, input.NextToken, badToken);
      return {
        Subnets: items.map((subnet) => ({
          SubnetId: subnet.id,
          VpcId: subnet.vpcId,
          AvailabilityZone: subnet.zone,
          AvailableIpAddressCount: subnet.freeAddresses,
          CidrBlock: this.#world.cidr,
          State: "available",
          OwnerId: this.#world.account,
        })),
        NextToken: next,
      };
    },

    DescribeLaunchTemplateVersions: (input: DescribeLaunchTemplateVersionsRequest) => {
      const template = this.template(input.LaunchTemplateId, input.LaunchTemplateName);
      const asked = input.Versions?.map((version) => this.version(template, version).number);
      const numbers = template.versions.map((_, i) => i + 1).filter((n) => !asked || asked.includes(n));
      const size = input.MaxResults ?? 200;
      if (size < 1 || size > 200) throw invalidValue(size, "maxResults");
      const { items, next } = page(numbers.reverse(), size, input.NextToken, badToken);
      return {
        LaunchTemplateVersions: items.map((number) => ({
          LaunchTemplateId: template.id,
          LaunchTemplateName: template.name,
          VersionNumber: number,
          DefaultVersion: number === template.defaultVersion,
          CreateTime: new Date(template.versions[number - 1]?.createdAtMs ?? 0),
          LaunchTemplateData: copyOf(template.versions[number - 1]?.data ?? {}),
        })),
        NextToken: next,
      };
    },

    DescribeInstanceTypeOfferings: (input: DescribeInstanceTypeOfferingsRequest) => {
      const byZone = input.LocationType === "availability-zone";
      if (input.LocationType && !byZone && input.LocationType !== "region")
        throw invalidValue(input.LocationType, "LocationType");
      const zones = [...new Set([...this.subnets.values()].map((subnet) => subnet.zone))];
      const all = [...INSTANCE_TYPES.keys()].flatMap((type) =>
        (byZone ? zones : [this.#world.region])
          .filter((zone) => !this.notOffered.has(`${type}/${zone}`))
          .map((location) => ({ type, location })),
      );
      const matches = filter<{ type: string; location: string }>(input.Filters, {
        "instance-type": (offer) => offer.type,
        location: (offer) => offer.location,
      });
      const size = maxResults(input.MaxResults) ?? 1000;
      const { items, next } = page(all.filter(matches), size, input.NextToken, badToken);
      return {
        InstanceTypeOfferings: items.map(({ type, location }) => ({
          InstanceType: type,
          LocationType: byZone ? "availability-zone" : "region",
          Location: location,
        })),
        NextToken: next,
      };
    },

    DescribeInstanceTypes: (input: DescribeInstanceTypesRequest) => {
      const asked: string[] = input.InstanceTypes ?? [];
      const unknown = asked.filter((type) => !INSTANCE_TYPES.has(type));
      if (unknown.length > 0)
        throw new AwsError("InvalidInstanceType", `The following supplied instance types do not exist: [${unknown.join(", ")}]`);
      if (asked.length > 0 && input.MaxResults !== undefined) throw notTogether("instanceTypes", "maxResults");
      const found = [...INSTANCE_TYPES].filter(([type]) => asked.length === 0 || asked.includes(type));
      const { items, next } = page(found, maxResults(input.MaxResults, 100) ?? 100, input.NextToken, badToken);
      return {
        InstanceTypes: items.map(([type, facts]) => ({
          InstanceType: type,
          CurrentGeneration: facts.generation === "current",
          BareMetal: false,
          BurstablePerformanceSupported: facts.burstable,
          ProcessorInfo: { SupportedArchitectures: [facts.architecture] },
          VCpuInfo: { DefaultVCpus: facts.vcpus },
          MemoryInfo: { SizeInMiB: facts.memoryMib },
          SupportedUsageClasses: ["on-demand", "spot"],
        })),
        NextToken: next,
      };
    },

    GetInstanceTypesFromInstanceRequirements: (input: GetInstanceTypesFromInstanceRequirementsRequest) => {
      dryRun(input.DryRun);
      const architectures: string[] = input.ArchitectureTypes ?? [];
      const virtualizations: string[] = input.VirtualizationTypes ?? [];
      if (!architectures.length) throw missing("ArchitectureType");
      if (!virtualizations.length) throw missing("VirtualizationType");
      if (!input.InstanceRequirements) throw missing("InstanceRequirements");
      for (const name of architectures)
        if (!/^(i386|x86_64|arm64|x86_64_mac|arm64_mac)$/.test(name)) throw invalidValue(name, "ArchitectureType");
      for (const name of virtualizations) if (!/^(hvm|paravirtual)$/.test(name)) throw invalidValue(name, "VirtualizationType");
      // Every type of the catalogue is of a generation that runs hvm only.
      if (!virtualizations.includes("hvm")) return { InstanceTypes: [] };
      const types = matchingTypes(input.InstanceRequirements).filter(([, facts]) => architectures.includes(facts.architecture));
      const size = input.MaxResults ?? 1000;
      const { items, next } = page(types, size, input.NextToken, badToken);
      return { InstanceTypes: items.map(([InstanceType]) => ({ InstanceType })), NextToken: next };
    },
  };

  // --- State -----------------------------------------------------------------------------------------------------

  pool(lifecycle: Lifecycle, type: string, zone: string): Pool {
    const key = `${lifecycle}/${type}/${zone}`;
    const known = this.#pools.get(key);
    if (known) return known;
    const facts = INSTANCE_TYPES.get(type);
    const price = (lifecycle === "spot" ? facts?.spotPrice : facts?.onDemandPrice) ?? 0;
    const pool: Pool = { lifecycle, type, zone, capacity: Number.POSITIVE_INFINITY, price, error: undefined };
    this.#pools.set(key, pool);
    return pool;
  }

  /** The subnet of a zone, made if absent; one VPC holds them all. */
  subnetIn(zone: string): Subnet {
    for (const subnet of this.subnets.values()) if (subnet.zone === zone && subnet.vpcId === this.#vpcId) return subnet;
    return this.createSubnet(zone, this.#vpcId);
  }

  createSubnet(zone: string, vpcId = `vpc-${this.#world.random.hex(17)}`): Subnet {
    const subnet = { id: `subnet-${this.#world.random.hex(17)}`, zone, vpcId, freeAddresses: 4091 };
    this.subnets.set(subnet.id, subnet);
    return subnet;
  }

  createTemplate(name: string, data: ResponseLaunchTemplateData): LaunchTemplate {
    const template: LaunchTemplate = {
      id: `lt-${this.#world.random.hex(17)}`,
      name,
      defaultVersion: 1,
      versions: [{ data, createdAtMs: this.#world.now() }],
    };
    this.templates.set(template.id, template);
    return template;
  }

  /** Throws as AWS does for a template that is unknown, or named twice. */
  template(id: string | undefined, name: string | undefined): LaunchTemplate {
    if (id !== undefined && name !== undefined)
      throw new AwsError("InvalidParameterCombination", "Only one of LaunchTemplateId and LaunchTemplateName may be specified.");
    if (id !== undefined) {
      if (!/^lt-[0-9a-f]{17}$/.test(id))
        throw new AwsError("InvalidLaunchTemplateId.Malformed", `Invalid launch template ID '${id}'`);
      const template = this.templates.get(id);
      if (template) return template;
      throw new AwsError(
        "InvalidLaunchTemplateId.NotFound",
        `The specified launch template, with template ID ${id}, does not exist.`,
      );
    }
    if (name === undefined)
      throw new AwsError("MissingParameter", "Either a launch template ID or a launch template name is needed.");
    for (const template of this.templates.values()) if (template.name === name) return template;
    throw new AwsError(
      "InvalidLaunchTemplateName.NotFoundException",
      `The specified launch template, with template name ${name}, does not exist.`,
    );
  }

  version(template: LaunchTemplate, text: string): { number: number; data: ResponseLaunchTemplateData } {
    const number = text === "$Default" ? template.defaultVersion : text === "$Latest" ? template.versions.length : Number(text);
    if (!/^(\$Default|\$Latest|\d+)$/.test(text)) throw invalidValue(text, "version");
    const found = template.versions[number - 1];
    if (!found)
      throw new AwsError(
        "InvalidLaunchTemplateId.VersionNotFound",
        `Could not find the specified version ${text} for the launch template with ID ${template.id}.`,
      );
    return { number, data: found.data };
  }

  /** Why a launch from this pool must fail now, or undefined. */
  refusal(pool: Pool, subnet: Subnet, imageId: string, blockDevices?: DeviceMapping[]): AwsError | undefined {
    const fail = (code: string) =>
      new AwsError(code, MESSAGES[code]?.(pool) ?? code, code.startsWith("Insufficient") ? 500 : 400);
    if (this.missingImages.has(imageId))
      return new AwsError("InvalidAMIID.NotFound", `The image id '[${imageId}]' does not exist`);
    if (pool.error) return fail(pool.error);
    if (this.notOffered.has(`${pool.type}/${pool.zone}`)) return fail("Unsupported");
    if (pool.capacity < 1) return fail("InsufficientInstanceCapacity");
    if (subnet.freeAddresses < 1)
      return new AwsError(
        "InsufficientFreeAddressesInSubnet",
        `There are not enough free addresses in subnet '${subnet.id}' to satisfy the requested number of instances.`,
      );
    return this.ebs.refusal(blockDevices);
  }

  /** One instance, from its pool (the caller has asked `refusal`). */
  launch(spec: LaunchSpec): Instance {
    const world = this.#world;
    const { type, subnet, lifecycle } = spec;
    const privateIp = this.#address();
    const domain = world.region === "us-east-1" ? "ec2.internal" : `${world.region}.compute.internal`;
    const volumeId = `vol-0${world.random.hex(16)}`;
    const instance: Instance = {
      id: `i-0${world.random.hex(16)}`,
      type,
      zone: subnet.zone,
      lifecycle,
      subnet,
      imageId: spec.imageId,
      privateIp,
      privateDns: `ip-${privateIp.replaceAll(".", "-")}.${domain}`,
      launchedAtMs: world.now() - (spec.ageMs ?? 0),
      terminatedAtMs: undefined,
      group: undefined,
      reservationId: spec.reservationId ?? `r-0${world.random.hex(16)}`,
      clientToken: spec.clientToken,
      volumeId,
      reclaimed: false,
      past: [],
      state: spec.atOnce ? "running" : "pending",
      stateReason: spec.atOnce ? undefined : { Code: "pending", Message: "pending" },
      transitionReason: "",
      tags: new Map(spec.tags),
    };
    this.instances.set(instance.id, instance);
    subnet.freeAddresses--;
    const addVolumes = () => this.ebs.launched(instance, spec.blockDevices, spec.volumeTags ?? []);
    if (spec.atOnce) {
      addVolumes();
      return instance;
    }
    this.pool(lifecycle, type, subnet.zone).capacity--;
    world.record("launch", [instance.id], undefined, `${lifecycle} ${type} ${subnet.zone}`);
    addVolumes();
    world.after(world.random.between(world.delays.pendingMs), () => {
      if (instance.state !== "pending") return;
      const reason = this.dieWhilePending?.(instance) ?? this.ebs.launchFailure(instance);
      if (reason) {
        this.#change(instance, "terminated", reason, reason.Code);
        return;
      }
      this.#change(instance, "running", undefined, "");
    });
    return instance;
  }

  /** Ends an instance the ordinary way. `reason` is "CODE: text". Nothing happens to one already ending. */
  terminate(instance: Instance, reason: string, byUser = false): void {
    if (instance.state === "terminated" || instance.state === "shutting-down") return;
    const Code = reason.split(":")[0] ?? "";
    const when = isoSeconds(this.#world.now()).replace("T", " ").replace("Z", " GMT");
    this.#change(instance, "shutting-down", { Code, Message: reason }, byUser ? `User initiated (${when})` : Code);
    this.#world.after(this.#world.random.between(this.#world.delays.shuttingDownMs), () =>
      this.#change(instance, "terminated", instance.stateReason, instance.transitionReason),
    );
  }

  /** AWS takes a spot instance for itself. */
  reclaim(instance: Instance, action: string): void {
    if (instance.state !== "running" && instance.state !== "pending") return;
    instance.reclaimed = true;
    if (action === "terminate") {
      this.terminate(instance, "Server.SpotInstanceTermination: Spot instance termination");
      return;
    }
    const reason = {
      Code: "Server.SpotInstanceShutdown",
      Message: "Server.SpotInstanceShutdown: Instance stopped because the Spot capacity was reclaimed",
    };
    this.#change(instance, "stopping", reason, "Server.SpotInstanceShutdown");
    this.#world.after(this.#world.random.between(this.#world.delays.shuttingDownMs), () => {
      if (instance.state === "stopping") this.#change(instance, "stopped", reason, instance.transitionReason);
    });
  }

  get volumes(): ReadonlyMap<string, Volume> {
    return this.ebs.volumes;
  }

  /** What a volume or snapshot holds: for asking whether the data survived. */
  dataOf(id: string): Content {
    return this.ebs.dataOf(id);
  }

  /** The guest (or the scenario) writes something onto a volume. */
  write(volumeId: string, text: string): void {
    this.ebs.write(volumeId, text);
  }

  snapshot(): object {
    return [...this.instances.values()].map((instance) => ({
      id: instance.id,
      type: instance.type,
      zone: instance.zone,
      lifecycle: instance.lifecycle,
      state: instance.state,
      group: instance.group ?? null,
      launchedAtMs: instance.launchedAtMs,
      tags: Object.fromEntries(instance.tags),
    }));
  }

  /** To be called before what describes show of an instance changes. */
  touch(instance: Instance): void {
    const { staleMs } = this.#world.delays;
    if (staleMs === 0) return;
    const now = this.#world.now();
    instance.past = instance.past.filter((past) => past.untilMs > now - staleMs);
    const { state, stateReason, transitionReason, tags } = instance;
    instance.past.push({ state, stateReason, transitionReason, tags: new Map(tags), untilMs: now });
  }

  #change(
    instance: Instance,
    state: StateName,
    stateReason: { Code: string; Message: string } | undefined,
    transitionReason: string,
  ): void {
    this.touch(instance);
    instance.state = state;
    instance.stateReason = stateReason;
    instance.transitionReason = transitionReason;
    if (state === "terminated") {
      instance.terminatedAtMs = this.#world.now();
      instance.subnet.freeAddresses++;
      if (!instance.reclaimed) this.pool(instance.lifecycle, instance.type, instance.zone).capacity++;
    }
    this.#world.record(state, [instance.id], instance.group, stateReason?.Code);
    this.ebs.instanceChanged(instance);
    if (state !== "running" && state !== "pending") this.#world.elbv2.instanceGone(instance.id);
    this.#world.autoscaling.instanceChanged(instance);
  }

  #address(): string {
    const [base = "", bits = "16"] = this.#world.cidr.split("/");
    const start = base.split(".").reduce((sum, part) => sum * 256 + Number(part), 0);
    do this.#addresses++;
    while (this.#addresses % 256 === 0 || this.#addresses % 256 === 255);
    if (this.#addresses >= 2 ** (32 - Number(bits))) throw new Error(`no addresses are left in ${this.#world.cidr}`);
    const address = start + this.#addresses;
    return [address / 2 ** 24, address / 2 ** 16, address / 2 ** 8, address].map((part) => Math.floor(part) % 256).join(".");
  }

  #subnet(id: string): Subnet {
    const subnet = this.subnets.get(id);
    if (!subnet) throw new AwsError("InvalidSubnetID.NotFound", `The subnet ID '${id}' does not exist`);
    return subnet;
  }

  // --- Describing ------------------------------------------------------------------------------------------------

  /** What a describe of the moment `viewMs` shows of an instance; undefined: nothing (not yet, or no more). */
  view(instance: Instance, viewMs: number): Visible | undefined {
    if (instance.launchedAtMs > viewMs) return undefined;
    const { terminatedAtMs } = instance;
    if (terminatedAtMs !== undefined && viewMs >= terminatedAtMs + this.#world.delays.terminatedVisibleMs) return undefined;
    return instance.past.find((past) => past.untilMs > viewMs) ?? instance;
  }

  /** The instances of these IDs, or AWS's refusal of the whole call. */
  known(ids: string[], viewMs: number): Instance[] {
    for (const id of ids) if (!INSTANCE_ID.test(id)) throw new AwsError("InvalidInstanceID.Malformed", `Invalid id: "${id}"`);
    const found: Instance[] = [];
    const absent: string[] = [];
    for (const id of ids) {
      const instance = this.instances.get(id);
      if (instance && this.view(instance, viewMs)) found.push(instance);
      else absent.push(id);
    }
    if (absent.length > 0)
      throw new AwsError(
        "InvalidInstanceID.NotFound",
        absent.length === 1
          ? `The instance ID '${absent[0]}' does not exist`
          : `The instance IDs '${absent.join(", ")}' do not exist`,
      );
    return found;
  }

  #describeInstances(input: DescribeInstancesRequest): object {
    const viewMs = this.#world.viewMs();
    const ids = input.InstanceIds ?? [];
    if (ids.length > 0 && input.MaxResults !== undefined) throw notTogether("instancesSet", "maxResults");
    const size = maxResults(input.MaxResults);
    const viewed = (instance: Instance) => this.view(instance, viewMs) ?? instance;
    const alive = (value: (instance: Instance) => string) => (instance: Instance) =>
      viewed(instance).state === "terminated" ? [] : value(instance);
    const matches = filter<Instance>(
      input.Filters,
      {
        "instance-id": (instance) => instance.id,
        "instance-state-name": (instance) => viewed(instance).state,
        "instance-state-code": (instance) => String(STATE_CODES[viewed(instance).state]),
        "instance-lifecycle": (instance) => (instance.lifecycle === "spot" ? "spot" : []),
        "instance-type": (instance) => instance.type,
        "availability-zone": (instance) => instance.zone,
        "subnet-id": alive((instance) => instance.subnet.id),
        "vpc-id": alive((instance) => instance.subnet.vpcId),
        "private-ip-address": alive((instance) => instance.privateIp),
        "private-dns-name": alive((instance) => instance.privateDns),
        "image-id": (instance) => instance.imageId,
        "client-token": (instance) => instance.clientToken ?? [],
        "reservation-id": (instance) => instance.reservationId,
        "tag-key": (instance) => [...viewed(instance).tags.keys()],
        "tag-value": (instance) => [...viewed(instance).tags.values()],
        ...this.ebs.instanceFacts(viewMs),
      },
      (instance) => viewed(instance).tags,
    );
    const candidates = ids.length > 0 ? this.known([...new Set(ids)], viewMs) : [...this.instances.values()];
    dryRun(input.DryRun);
    const found = candidates.filter((instance) => this.view(instance, viewMs) && matches(instance));
    const isEmpty = size !== undefined && this.#world.emptyFirstPages;
    const { items, next } = page(found, size ?? 1000, input.NextToken, badToken, isEmpty);
    const reservations = Map.groupBy(items, (instance) => instance.reservationId);
    return {
      Reservations: [...reservations].map(([ReservationId, instances]) => ({
        ReservationId,
        OwnerId: this.#world.account,
        Groups: [],
        Instances: instances.map((instance) => this.#describe(instance, viewMs)),
      })),
      NextToken: next,
    };
  }

  #describe(instance: Instance, viewMs: number): object {
    const view = this.view(instance, viewMs) ?? instance;
    const gone = view.state === "terminated";
    return {
      InstanceId: instance.id,
      InstanceType: instance.type,
      ImageId: instance.imageId,
      ...(instance.lifecycle === "spot" && { InstanceLifecycle: "spot" }),
      State: stateOf(view.state),
      ...(view.stateReason && { StateReason: { ...view.stateReason } }),
      StateTransitionReason: view.transitionReason,
      LaunchTime: new Date(Math.floor(instance.launchedAtMs / 1000) * 1000),
      Placement: { AvailabilityZone: instance.zone, GroupName: "", Tenancy: "default" },
      Architecture: INSTANCE_TYPES.get(instance.type)?.architecture ?? "x86_64",
      VirtualizationType: "hvm",
      ...(this.windowsImages.has(instance.imageId) && { Platform: "windows" }),
      PlatformDetails: this.windowsImages.has(instance.imageId) ? "Windows" : "Linux/UNIX",
      RootDeviceName: ROOT_DEVICE,
      RootDeviceType: "ebs",
      // AWS no longer shows an address, subnet or volume of a terminated instance.
      PrivateDnsName: gone ? "" : instance.privateDns,
      ...(!gone && {
        PrivateIpAddress: instance.privateIp,
        SubnetId: instance.subnet.id,
        VpcId: instance.subnet.vpcId,
      }),
      BlockDeviceMappings: gone ? [] : this.ebs.mappings(instance, viewMs),
      ...(instance.clientToken && { ClientToken: instance.clientToken }),
      Tags: [...view.tags].map(([Key, Value]) => ({ Key, Value })),
    };
  }

  #taggable(ids: string[] | undefined): { id: string; tags: Map<string, string>; touch: () => void }[] {
    const viewMs = this.#world.viewMs();
    if (!ids || ids.length === 0) throw missing("ResourceId");
    if (ids.length > 1000) throw invalidValue(ids.length, "ResourceId");
    const instances = this.known(
      ids.filter((id) => id.startsWith("i-")),
      viewMs,
    );
    return ids.map((id) => {
      const instance = instances.find((known) => known.id === id);
      if (instance) return { id, tags: instance.tags, touch: () => this.touch(instance) };
      const resource = this.ebs.taggable(id, viewMs);
      if (!resource) throw new AwsError("InvalidID", `The ID '${id}' is not valid`);
      return resource;
    });
  }

  // --- Launching -------------------------------------------------------------------------------------------------

  /** The same answer for the same request under one token, a refusal for another request under it. */
  idempotent(scope: string, token: string | undefined, request: object, perform: () => () => object): object {
    if (token === undefined || token === "") return perform()();
    // biome-ignore lint/suspicious/noControlCharactersInRegex: ASCII is the rule
    if (token.length > 64 || !/^[\x00-\x7f]*$/.test(token))
      throw new AwsError("InvalidParameterValue", `Value (${token}) for parameter clientToken is invalid.`);
    const text = stable(request);
    const known = this.#remembered.get(scope + token);
    if (known && known.untilMs > this.#world.now()) {
      if (known.request !== text)
        throw new AwsError(
          "IdempotentParameterMismatch",
          "The request uses the same client token as a previous, but non-identical request. Do not reuse a client token with different requests, unless the requests are identical",
        );
      return known.answer();
    }
    const answer = perform();
    this.#remembered.set(scope + token, {
      request: text,
      answer,
      untilMs: this.#world.now() + TOKEN_MEMORY_MS,
    });
    return answer();
  }

  #runInstances(input: RunInstancesRequest): object {
    const { MinCount: least = 0, MaxCount: most = 0 } = input;
    if (least < 1 || most < least)
      throw new AwsError(
        "InvalidParameterValue",
        `Value (${least}) for parameter minCount is invalid. It must be at least 1 and at most maxCount.`,
      );
    const { LaunchTemplate: named } = input;
    const data = named
      ? this.version(this.template(named.LaunchTemplateId, named.LaunchTemplateName), named.Version ?? "$Default").data
      : {};
    const type = input.InstanceType ?? data.InstanceType ?? "m1.small";
    checkType(type);
    const imageId = input.ImageId ?? data.ImageId;
    if (!imageId) throw missing("ImageId");
    const interfaces = input.NetworkInterfaces ?? data.NetworkInterfaces ?? [];
    if (interfaces.length > 0 && input.SubnetId !== undefined)
      throw new AwsError(
        "InvalidParameterCombination",
        "Network interfaces and an instance-level subnet ID may not be specified on the same request",
      );
    const subnetId = input.SubnetId ?? interfaces.find((one) => one.SubnetId)?.SubnetId;
    const zone = input.Placement?.AvailabilityZone ?? data.Placement?.AvailabilityZone;
    const subnet = subnetId ? this.#subnet(subnetId) : this.subnetIn(zone ?? this.#anyZone());
    if (zone !== undefined && subnet.zone !== zone)
      throw new AwsError("InvalidParameterValue", "The availability zones of the subnet and the placement differ.");
    const market = input.InstanceMarketOptions ?? data.InstanceMarketOptions;
    const lifecycle = market?.MarketType === "spot" ? "spot" : "on-demand";
    const specifications = [...(input.TagSpecifications ?? []), ...(data.TagSpecifications ?? [])];
    checkSpotRequestTags(specifications, lifecycle);
    const tags = mergeTags(data.TagSpecifications, input.TagSpecifications, "instance");
    const volumeTags = mergeTags(data.TagSpecifications, input.TagSpecifications, "volume");
    const blockDevices = mergeDevices(data.BlockDeviceMappings, input.BlockDeviceMappings);
    dryRun(input.DryRun);
    // Idempotent within one zone only: the same token in another zone launches again.
    return this.idempotent(`RunInstances ${subnet.zone} `, input.ClientToken, input, () => {
      const pool = this.pool(lifecycle, type, subnet.zone);
      const refusal = this.refusal(pool, subnet, imageId, blockDevices);
      if (refusal) throw refusal;
      const count = Math.min(most, pool.capacity, subnet.freeAddresses);
      if (count < least)
        throw new AwsError("InsufficientInstanceCapacity", MESSAGES.InsufficientInstanceCapacity?.(pool) ?? "", 500);
      const reservationId = `r-0${this.#world.random.hex(16)}`;
      const instances = Array.from({ length: count }, () =>
        this.launch({
          type,
          subnet,
          lifecycle,
          imageId,
          tags,
          volumeTags,
          blockDevices,
          clientToken: input.ClientToken,
          reservationId,
        }),
      );
      return () => ({
        ReservationId: reservationId,
        OwnerId: this.#world.account,
        Groups: [],
        // The volumes are not attached yet: AWS's answer names none.
        Instances: instances.map((instance) => ({ ...this.#describe(instance, this.#world.now()), BlockDeviceMappings: [] })),
      });
    });
  }

  #anyZone(): string {
    for (const subnet of this.subnets.values()) return subnet.zone;
    throw new AwsError("VPCIdNotSpecified", "No default VPC for this user");
  }

  #createFleet(input: CreateFleetRequest): object {
    const plan = this.#planFleet(input);
    dryRun(input.DryRun);
    return this.idempotent("CreateFleet ", input.ClientToken, input, () => {
      const answer = this.#fulfil(plan, input);
      return () => copyOf(answer);
    });
  }

  /** Checks a fleet request as a whole; what only concerns one override becomes an entry of Errors later. */
  #planFleet(input: CreateFleetRequest): FleetPlan {
    if (input.Type !== "instant") throw new AwsError("UnsupportedOperation", "The simulator knows fleets of type instant only");
    const target = input.TargetCapacitySpecification;
    const total = target?.TotalTargetCapacity ?? 0;
    if (!Number.isInteger(total) || total < 1) throw invalidValue(total, "TotalTargetCapacity");
    const spotDefault = (target?.DefaultTargetCapacityType ?? "on-demand") === "spot";
    if (!["spot", "on-demand", undefined].includes(target?.DefaultTargetCapacityType))
      throw invalidValue(target?.DefaultTargetCapacityType, "DefaultTargetCapacityType");
    let spot = target?.SpotTargetCapacity ?? 0;
    let onDemand = target?.OnDemandTargetCapacity ?? 0;
    if (spot + onDemand > total)
      throw new AwsError(
        "InvalidParameterCombination",
        "The sum of OnDemandTargetCapacity and SpotTargetCapacity exceeds TotalTargetCapacity.",
      );
    if (spotDefault) spot = total - onDemand;
    else onDemand = total - spot;

    const spotStrategy = input.SpotOptions?.AllocationStrategy ?? "lowest-price";
    const onDemandStrategy = input.OnDemandOptions?.AllocationStrategy ?? "lowest-price";
    if (!(spotStrategy in SPOT_ORDERS) && spotStrategy !== "diversified")
      throw invalidValue(spotStrategy, "SpotOptions.AllocationStrategy");
    if (!(onDemandStrategy in ON_DEMAND_ORDERS)) throw invalidValue(onDemandStrategy, "OnDemandOptions.AllocationStrategy");
    if (
      input.SpotOptions?.MinTargetCapacity !== undefined &&
      !input.SpotOptions.SingleInstanceType &&
      !input.SpotOptions.SingleAvailabilityZone
    )
      throw new AwsError(
        "InvalidParameterCombination",
        "MinTargetCapacity requires SingleAvailabilityZone or SingleInstanceType.",
      );

    const tagged = input.TagSpecifications ?? [];
    for (const { ResourceType } of tagged)
      if (!["instance", "volume", "fleet", "network-interface", "spot-instances-request"].includes(String(ResourceType)))
        throw new AwsError(
          "InvalidParameterValue",
          `'${ResourceType}' is not a valid taggable resource type for this operation.`,
        );
    for (const { Tags } of tagged) checkTags(Tags);

    const configs = input.LaunchTemplateConfigs ?? [];
    if (configs.length === 0) throw missing("LaunchTemplateConfigs");
    if (configs.length > 50) throw invalidValue(configs.length, "LaunchTemplateConfigs");
    if (configs.reduce((sum, config) => sum + (config.Overrides?.length ?? 0), 0) > 300)
      throw new AwsError("InvalidParameterValue", "A fleet can have at most 300 overrides.");
    const options: FleetOption[] = [];
    let order = 0;
    const subnetOfZone = new Map<string, string>();
    const sets: InstanceRequirementsRequest[] = [];
    for (const config of configs) {
      const named = config.LaunchTemplateSpecification;
      if (!named) throw missing("LaunchTemplateSpecification");
      if (named.Version === undefined || named.Version === "")
        throw new AwsError("InvalidParameterValue", "The launch template version must be specified.");
      const template = this.template(named.LaunchTemplateId, named.LaunchTemplateName);
      const { number, data } = this.version(template, named.Version);
      if (data.InstanceMarketOptions)
        // Unconfirmed, and the reason why such a template goes through RunInstances.
        throw new AwsError(
          "InvalidParameterCombination",
          "InstanceMarketOptions in a launch template cannot be used with EC2 Fleet.",
        );
      const overrides: FleetLaunchTemplateOverridesRequest[] = config.Overrides?.length ? config.Overrides : [{}];
      for (const override of overrides) {
        const subnet = this.#fleetSubnet(override, data);
        const taken = subnetOfZone.get(subnet.zone);
        if (taken !== undefined && taken !== subnet.id)
          throw new AwsError(
            "InvalidFleetConfig",
            `The fleet configuration names more than one subnet of the Availability Zone ${subnet.zone}: ${taken}, ${subnet.id}`,
          );
        subnetOfZone.set(subnet.zone, subnet.id);
        if (override.InstanceType !== undefined && override.InstanceRequirements)
          throw new AwsError(
            "InvalidParameterCombination",
            "InstanceType and InstanceRequirements cannot be specified in one override.",
          );
        const requirements =
          override.InstanceRequirements ??
          (override.InstanceType ? undefined : (data.InstanceRequirements as InstanceRequirementsRequest));
        if (requirements) sets.push(requirements);
        if (override.InstanceRequirements && (override.Priority ?? override.WeightedCapacity) !== undefined)
          throw new AwsError(
            "InvalidParameterCombination",
            "InstanceRequirements cannot be specified with a priority or a weighted capacity.",
          );
        let types: string[];
        if (requirements) types = matchingTypes(requirements, "x86_64").map(([type]) => type);
        else {
          const type = override.InstanceType ?? data.InstanceType;
          if (!type) throw missing("InstanceType");
          checkType(type);
          types = [type];
        }
        const weight = override.WeightedCapacity ?? 1;
        if (!(weight > 0 && weight <= 999)) throw invalidValue(weight, "WeightedCapacity");
        const maxPrice = override.MaxPrice === undefined ? Number.POSITIVE_INFINITY : Number(override.MaxPrice);
        if (!(maxPrice > 0)) throw invalidValue(override.MaxPrice, "MaxPrice");
        for (const type of types) {
          if (!requirements && options.some((one) => one.type === type && one.subnet.id === subnet.id))
            throw new AwsError(
              "InvalidFleetConfig",
              `Duplicate instance pools (${type}, ${subnet.zone}) in the launch template configs.`,
            );
          options.push({
            type,
            subnet,
            weight,
            maxPrice,
            priority: override.Priority ?? Number.POSITIVE_INFINITY,
            order: order++,
            data,
            named: { LaunchTemplateId: template.id, Version: String(number) },
            override,
          });
        }
      }
    }
    checkSets(sets);
    return { options, spot, onDemand, spotStrategy, onDemandStrategy };
  }

  #fleetSubnet(override: FleetLaunchTemplateOverridesRequest, data: ResponseLaunchTemplateData): Subnet {
    const zone = override.AvailabilityZone ?? override.Placement?.AvailabilityZone;
    const own = data.NetworkInterfaces?.find((one) => one.SubnetId)?.SubnetId;
    const id = override.SubnetId ?? own;
    if (id === undefined) return this.subnetIn(zone ?? this.#anyZone());
    if (id.includes(","))
      throw new AwsError("InvalidParameterValue", "For fleets of type instant, an override can name one SubnetId only.");
    if (zone !== undefined && override.SubnetId !== undefined)
      throw new AwsError("InvalidParameterCombination", "SubnetId and AvailabilityZone cannot be specified in one override.");
    return this.#subnet(id);
  }

  #fulfil(plan: FleetPlan, input: CreateFleetRequest): object {
    const fleetId = `fleet-${this.#world.random.uuid()}`;
    const launched: { option: FleetOption; lifecycle: Lifecycle; instances: Instance[] }[] = [];
    const failed: { option: FleetOption | undefined; lifecycle: Lifecycle; error: AwsError }[] = [];
    const fill = (lifecycle: Lifecycle, units: number, strategy: string) => {
      if (units <= 0) return;
      const chosen: { option: FleetOption; count: number }[] = [];
      let missingUnits = units;
      let options = this.#ordered(plan.options, lifecycle, strategy);
      if (options.length === 0)
        failed.push({
          option: undefined,
          lifecycle,
          error: new AwsError("UnfulfillableCapacity", MESSAGES.UnfulfillableCapacity?.({} as Pool) ?? ""),
        });
      const single = lifecycle === "spot" ? input.SpotOptions : input.OnDemandOptions;
      while (missingUnits > 0 && options.length > 0) {
        const [option, ...rest] = options as [FleetOption, ...FleetOption[]];
        options = rest;
        const pool = this.pool(lifecycle, option.type, option.subnet.zone);
        const refusal = this.#optionRefusal(option, pool, lifecycle);
        if (refusal) {
          failed.push({ option, lifecycle, error: refusal });
          continue;
        }
        const wanted = strategy === "diversified" ? 1 : Math.ceil(missingUnits / option.weight);
        const taken = chosen.filter((one) => one.option === option).reduce((sum, one) => sum + one.count, 0);
        const count = Math.min(wanted, pool.capacity - taken, option.subnet.freeAddresses - taken);
        if (count > 0) chosen.push({ option, count });
        missingUnits -= count * option.weight;
        if (count > 0 && strategy === "diversified") options.push(option);
        if (count < wanted && missingUnits > 0)
          failed.push({
            option,
            lifecycle,
            error: new AwsError("InsufficientInstanceCapacity", MESSAGES.InsufficientInstanceCapacity?.(pool) ?? "", 500),
          });
        if (single?.SingleInstanceType) options = options.filter((one) => one.type === option.type);
        if (single?.SingleAvailabilityZone) options = options.filter((one) => one.subnet.zone === option.subnet.zone);
      }
      const least = single?.MinTargetCapacity ?? 0;
      if (units - missingUnits < least) return;
      for (const { option, count } of chosen) {
        const tags = mergeTags(option.data.TagSpecifications, input.TagSpecifications, "instance");
        const instances = Array.from({ length: count }, () =>
          this.launch({
            type: option.type,
            subnet: option.subnet,
            lifecycle,
            imageId: option.override.ImageId ?? option.data.ImageId ?? "",
            tags: [...tags, ["aws:ec2:fleet-id", fleetId]],
            volumeTags: mergeTags(option.data.TagSpecifications, input.TagSpecifications, "volume"),
            blockDevices: mergeDevices(option.data.BlockDeviceMappings, option.override.BlockDeviceMappings),
            clientToken: input.ClientToken,
          }),
        );
        launched.push({ option, lifecycle, instances });
      }
    };
    fill("on-demand", plan.onDemand, plan.onDemandStrategy);
    fill("spot", plan.spot, plan.spotStrategy);
    const first = failed[0]?.error;
    if (launched.length === 0 && first && this.capacityErrorsAsCall) throw first;
    return {
      FleetId: fleetId,
      Errors: failed.map(({ option, lifecycle, error }) => ({
        ...(option && { LaunchTemplateAndOverrides: describeOption(option) }),
        Lifecycle: lifecycle,
        ErrorCode: error.name,
        ErrorMessage: error.message,
      })),
      Instances: launched.map(({ option, lifecycle, instances }) => ({
        LaunchTemplateAndOverrides: describeOption(option),
        Lifecycle: lifecycle,
        InstanceIds: instances.map((instance) => instance.id),
        InstanceType: option.type,
      })),
    };
  }

  #optionRefusal(option: FleetOption, pool: Pool, lifecycle: Lifecycle): AwsError | undefined {
    const { data, override, subnet } = option;
    if (override.SubnetId !== undefined && data.NetworkInterfaces?.some((one) => one.SubnetId !== undefined))
      return new AwsError(
        "InvalidParameterCombination",
        "Network interfaces and an instance-level subnet ID may not be specified on the same request",
      );
    const imageId = override.ImageId ?? data.ImageId;
    if (!imageId) return missing("ImageId");
    if (lifecycle === "on-demand" && data.TagSpecifications?.some(isSpotRequest)) return spotRequestTags();
    if (lifecycle === "spot" && option.maxPrice < pool.price)
      return new AwsError(
        "SpotMaxPriceTooLow",
        `Your Spot request price of ${option.maxPrice} is lower than the minimum required Spot request fulfillment price of ${pool.price}.`,
      );
    return this.refusal(pool, subnet, imageId, mergeDevices(data.BlockDeviceMappings, override.BlockDeviceMappings));
  }

  /** The order in which a strategy tries the pools; ties go by price, then by place in the request. */
  #ordered(options: FleetOption[], lifecycle: Lifecycle, strategy: string): FleetOption[] {
    const keys = (lifecycle === "spot" ? SPOT_ORDERS : ON_DEMAND_ORDERS)[strategy] ?? SPOT_ORDERS["lowest-price"] ?? [];
    const facts = new Map(
      options.map((option) => {
        const pool = this.pool(lifecycle, option.type, option.subnet.zone);
        const usable = pool.error || this.notOffered.has(`${pool.type}/${pool.zone}`) ? 0 : pool.capacity;
        return [option, { capacity: -usable, price: pool.price / option.weight, priority: option.priority }];
      }),
    );
    return [...options].sort((a, b) => {
      for (const key of [...keys, "price" as const]) {
        const [x, y] = [facts.get(a)?.[key] ?? 0, facts.get(b)?.[key] ?? 0];
        if (x !== y) return x < y ? -1 : 1;
      }
      return a.order - b.order;
    });
  }
}

/**
 * EC2 User Guide, attribute-based instance type selection, considerations: at most four InstanceRequirements structures
 * in a request. One counts for each override, and the template's own where it has several overrides, too: so reported in
 * osbuild-composer #3946, with the words below. Structures that overlap are refused (runs-on #476); where only the subnet
 * differs they are sent by others without complaint.
 */
function checkSets(sets: InstanceRequirementsRequest[]): void {
  if (sets.length > 4)
    throw new AwsError(
      "InvalidParameterValue",
      "Your request contains more than the maximum allowed number of InstanceRequirements (4)",
    );
  const different = [...new Map(sets.map((one) => [stable(one), one])).values()];
  const types = different.flatMap((one) => matchingTypes(one).map(([type]) => type));
  if (new Set(types).size < types.length)
    throw new AwsError(
      "InvalidParameterValue",
      "Two or more of your InstanceRequirements structures include overlapping values. Ensure that there is no overlap, and try again.",
    );
}

interface FleetOption {
  type: string;
  subnet: Subnet;
  weight: number;
  maxPrice: number;
  priority: number;
  order: number;
  data: ResponseLaunchTemplateData;
  named: { LaunchTemplateId: string; Version: string };
  override: FleetLaunchTemplateOverridesRequest;
}

interface FleetPlan {
  options: FleetOption[];
  spot: number;
  onDemand: number;
  spotStrategy: string;
  onDemandStrategy: string;
}

type Key = "capacity" | "price" | "priority";
const SPOT_ORDERS: Record<string, Key[]> = {
  "lowest-price": ["price"],
  diversified: ["price"],
  "capacity-optimized": ["capacity"],
  "capacity-optimized-prioritized": ["capacity", "priority"],
  "price-capacity-optimized": ["capacity", "price"],
};
const ON_DEMAND_ORDERS: Record<string, Key[]> = { "lowest-price": ["price"], prioritized: ["priority"] };

function describeOption({ named, override, type }: FleetOption): object {
  const { Placement: _, ...rest } = override;
  return { LaunchTemplateSpecification: { ...named }, Overrides: { ...rest, InstanceType: type } };
}

// --- Rules of single parameters ------------------------------------------------------------------------------------

function stateOf(state: StateName): { Code: number; Name: StateName } {
  return { Code: STATE_CODES[state], Name: state };
}

export function missing(parameter: string): AwsError {
  return new AwsError("MissingParameter", `The request must contain the parameter ${parameter}`);
}

export function invalidValue(value: unknown, parameter: string): AwsError {
  return new AwsError("InvalidParameterValue", `Value (${String(value)}) for parameter ${parameter} is invalid.`);
}

export function notTogether(one: string, other: string): AwsError {
  return new AwsError("InvalidParameterCombination", `The parameter ${one} cannot be used with the parameter ${other}`);
}

export const badToken = () => new AwsError("InvalidParameterValue", "Unable to parse pagination token");

export function maxResults(value: number | undefined, most = 1000): number | undefined {
  if (value === undefined) return undefined;
  if (value < 5)
    throw new AwsError(
      "InvalidParameterValue",
      `Value ( ${value} ) for parameter maxResults is invalid. Expecting a value greater than 5.`,
    );
  if (value > most)
    throw new AwsError(
      "InvalidParameterValue",
      `Value ( ${value} ) for parameter maxResults is invalid. Expecting a value less than or equal to ${most}.`,
    );
  return value;
}

export function dryRun(asked: boolean | undefined): void {
  if (asked) throw new AwsError("DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412);
}

function checkType(type: string): void {
  if (!INSTANCE_TYPES.has(type)) throw new AwsError("InvalidParameterValue", `Invalid value '${type}' for InstanceType.`);
}

function reservedKey(key: string): AwsError {
  return new AwsError("InvalidParameterValue", `Tag keys starting with 'aws:' are reserved for internal use: ${key}`);
}

/** The tags as pairs; throws where AWS refuses them. */
export function checkTags(tags: Tag[] | undefined): [string, string][] {
  const seen = new Map<string, string>();
  for (const { Key: key, Value: value = "" } of tags ?? []) {
    if (!key) throw new AwsError("InvalidParameterValue", "Tag keys cannot be empty.");
    if (key.toLowerCase().startsWith("aws:")) throw reservedKey(key);
    if (key.length > 128) throw new AwsError("InvalidParameterValue", "Tag key exceeds the maximum length of 128 characters");
    if (value.length > 256) throw new AwsError("InvalidParameterValue", "Tag value exceeds the maximum length of 256 characters");
    if (seen.has(key)) throw new AwsError("InvalidParameterValue", `Duplicate tag key '${key}' specified.`);
    seen.set(key, value);
  }
  if (seen.size > 50) throw new AwsError("TagLimitExceeded", "More than 50 tags specified.");
  return [...seen];
}

interface AnyTagSpecification {
  ResourceType?: string;
  Tags?: Tag[];
}

const isSpotRequest = (tagged: AnyTagSpecification) => tagged.ResourceType === "spot-instances-request";

function spotRequestTags(): AwsError {
  return new AwsError(
    "InvalidParameterValue",
    "You cannot specify tags for Spot instances requests if there are no Spot instances requests being created by the request.",
  );
}

function checkSpotRequestTags(specifications: AnyTagSpecification[], lifecycle: Lifecycle): void {
  if (lifecycle === "on-demand" && specifications.some(isSpotRequest)) throw spotRequestTags();
}

/** The request's tags win over the template's. */
export function mergeTags(
  template: AnyTagSpecification[] | undefined,
  request: TagSpecification[] | undefined,
  resource: string,
): [string, string][] {
  const merged = new Map<string, string>();
  for (const specifications of [template ?? [], request ?? []])
    for (const { ResourceType, Tags } of specifications)
      if (ResourceType === resource) for (const [key, value] of checkTags(Tags)) merged.set(key, value);
  if (merged.size > 50) throw new AwsError("TagLimitExceeded", "More than 50 tags specified.");
  return [...merged];
}

export type Facts<T> = Record<string, (item: T) => string | string[]>;

/** A test of the filters: all must match, each by any of its values. */
export function filter<T>(
  filters: Filter[] | undefined,
  facts: Facts<T>,
  tagsOf?: (item: T) => Map<string, string>,
): (item: T) => boolean {
  const rules = (filters ?? []).map(({ Name: name = "", Values: values = [] }) => {
    const key = name.slice("tag:".length);
    const fact = tagsOf && name.startsWith("tag:") && key !== "" ? (item: T) => tagsOf(item).get(key) ?? [] : facts[name];
    if (!fact) throw new AwsError("InvalidParameterValue", `The filter '${name}' is invalid`);
    if (values.length === 0) throw new AwsError("InvalidParameterValue", `The filter '${name}' must have at least one value`);
    if (values.length > 200)
      throw new AwsError("FilterLimitExceeded", "The maximum number of filter values specified on a single call is 200");
    return { fact, matchers: values.map(wildcard) };
  });
  return (item) =>
    rules.every(({ fact, matchers }) => [fact(item)].flat().some((text) => matchers.some((matches) => matches(text))));
}

const KNOWN_REQUIREMENTS = new Set([
  "VCpuCount",
  "MemoryMiB",
  "AllowedInstanceTypes",
  "ExcludedInstanceTypes",
  "BurstablePerformance",
  "BareMetal",
  "CpuManufacturers",
  "InstanceGenerations",
  "MemoryGiBPerVCpu",
  "SpotMaxPricePercentageOverLowestPrice",
  "OnDemandMaxPricePercentageOverLowestPrice",
  "LocalStorage",
]);

/** The types of the catalogue that meet attribute-based requirements. Burstable ones only if asked for. */
export function matchingTypes(
  requirements: InstanceRequirementsRequest | undefined,
  architecture?: string,
): [string, InstanceTypeFacts][] {
  const { VCpuCount, MemoryMiB, AllowedInstanceTypes, ExcludedInstanceTypes } = requirements ?? {};
  if (VCpuCount?.Min === undefined) throw missing("InstanceRequirements.VCpuCount.Min");
  if (MemoryMiB?.Min === undefined) throw missing("InstanceRequirements.MemoryMiB.Min");
  if (AllowedInstanceTypes?.length && ExcludedInstanceTypes?.length)
    throw new AwsError(
      "InvalidParameterCombination",
      "AllowedInstanceTypes and ExcludedInstanceTypes cannot be specified together.",
    );
  for (const name of Object.keys(requirements ?? {}))
    if (!KNOWN_REQUIREMENTS.has(name)) throw new Error(`the simulator does not know the requirement ${name}`);
  const allowed = AllowedInstanceTypes?.map(wildcard);
  const excluded = ExcludedInstanceTypes?.map(wildcard) ?? [];
  const within = (value: number, range: { Min?: number; Max?: number } | undefined) =>
    value >= (range?.Min ?? 0) && value <= (range?.Max ?? Number.POSITIVE_INFINITY);
  const makers: string[] | undefined = requirements?.CpuManufacturers;
  const generations: string[] | undefined = requirements?.InstanceGenerations;
  const burstable = requirements?.BurstablePerformance ?? "excluded";
  return [...INSTANCE_TYPES].filter(
    ([type, facts]) =>
      (!architecture || facts.architecture === architecture) &&
      within(facts.vcpus, VCpuCount) &&
      within(facts.memoryMib, MemoryMiB) &&
      within(facts.memoryMib / 1024 / facts.vcpus, requirements?.MemoryGiBPerVCpu) &&
      (!allowed || allowed.some((matches) => matches(type))) &&
      !excluded.some((matches) => matches(type)) &&
      (burstable === "included" || facts.burstable === (burstable === "required")) &&
      requirements?.BareMetal !== "required" &&
      (!makers || makers.includes(facts.manufacturer)) &&
      (!generations || generations.includes(facts.generation)),
  );
}

/** JSON with sorted keys: equal requests give equal texts. */
function stable(value: unknown): string {
  return JSON.stringify(value, (_, inner: unknown) =>
    typeof inner === "object" && inner !== null && !Array.isArray(inner)
      ? Object.fromEntries(Object.entries(inner).sort(([a], [b]) => (a < b ? -1 : 1)))
      : inner,
  );
}

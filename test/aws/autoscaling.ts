// EC2 Auto Scaling: the calls, and what groups do by themselves.
import type {
  AttachInstancesQuery,
  AutoScalingGroupNamesType,
  CreateAutoScalingGroupType,
  CreateOrUpdateTagsType,
  DeleteAutoScalingGroupType,
  DeleteTagsType,
  DescribeAutoScalingInstancesType,
  DescribeLifecycleHooksType,
  DescribeScalingActivitiesType,
  DescribeTagsType,
  DetachInstancesQuery,
  EnterStandbyQuery,
  ExitStandbyQuery,
  LaunchTemplateOverrides,
  LaunchTemplateSpecification,
  MixedInstancesPolicy,
  ScalingProcessQuery,
  SetDesiredCapacityType,
  SetInstanceProtectionQuery,
  TerminateInstanceInAutoScalingGroupType,
  UpdateAutoScalingGroupType,
  WarmPoolConfiguration,
} from "@aws-sdk/client-auto-scaling";
import type { InstanceRequirementsRequest, ResponseLaunchTemplateData } from "@aws-sdk/client-ec2";
import { AwsError, copyOf, page, wildcard } from "./basics.ts";
import { mappingsOf } from "./ebs.ts";
import { type Instance, type Lifecycle, matchingTypes, mergeTags, type Subnet } from "./ec2.ts";
import { type CapacitySample, type GroupSpec, type Handlers, isoSeconds, type World } from "./world.ts";

type LifecycleState = "Pending" | "InService" | "Standby" | "Terminating" | "Detaching";

export interface Member {
  instance: Instance;
  state: LifecycleState;
  healthy: boolean;
  protected: boolean;
  weight: number;
  /** Only members that the group itself launched show their launch template (unconfirmed, but likely). */
  byGroup: boolean;
  /** The group has seen that it no longer runs. */
  seenDead: boolean;
  /** The activity under way on it. */
  activity: Activity | undefined;
  /** Launched beyond desired by AZRebalance; the zone that gives one up in return. */
  rebalanceFrom: string | undefined;
}

interface Activity {
  id: string;
  group: string;
  description: string;
  cause: string;
  startMs: number;
  endMs: number | undefined;
  statusCode: "InProgress" | "Successful" | "Failed";
  statusMessage: string | undefined;
}

export interface Group {
  name: string;
  arn: string;
  min: number;
  max: number;
  desired: number;
  subnets: Subnet[];
  template: LaunchTemplateSpecification | undefined;
  mixed: MixedInstancesPolicy | undefined;
  launchConfiguration: string | undefined;
  /** What instances of a launch configuration are made of. */
  configurationData: ResponseLaunchTemplateData;
  members: Map<string, Member>;
  targetGroupArns: string[];
  tags: Map<string, { value: string; propagate: boolean }>;
  suspended: Set<string>;
  status: string | undefined;
  capacityRebalance: boolean;
  newProtected: boolean;
  healthCheckType: string;
  healthCheckGraceSeconds: number;
  activities: Activity[];
  hooks: string[];
  warmPool?: WarmPoolConfiguration;
  createdAtMs: number;
  /** The request that last changed desired, as activities tell it. */
  lastRequest: string;
  /** How many launches replace unhealthy members. */
  replacing: number;
  reconcileAtMs: number | undefined;
  rebalanceDue: boolean;
  past: { untilMs: number; view: ReturnType<AutoScaling["describe"]> }[];
}

const PROCESSES = [
  "Launch",
  "Terminate",
  "AddToLoadBalancer",
  "AlarmNotification",
  "AZRebalance",
  "HealthCheck",
  "InstanceRefresh",
  "ReplaceUnhealthy",
  "ScheduledActions",
];
const MAX_IDS = 20;
const GROUP_NAME_TAG = "aws:autoscaling:groupName";

const refuse = (message: string) => new AwsError("ValidationError", message);
const badToken = () => new AwsError("InvalidNextToken", "The NextToken value is not valid.");

export class AutoScaling {
  readonly #world: World;
  readonly groups = new Map<string, Group>();

  constructor(world: World) {
    this.#world = world;
  }

  readonly operations: Handlers = {
    DescribeAutoScalingGroups: (input: AutoScalingGroupNamesType) => {
      const viewMs = this.#world.viewMs();
      const names = input.AutoScalingGroupNames;
      if (input.Filters) throw new Error("the simulator's DescribeAutoScalingGroups knows no filters");
      if (names?.some((name) => name.length < 1 || name.length > 255))
        throw refuse(
          "1 validation error detected: Value at 'autoScalingGroupNames' failed to satisfy constraint: Member must satisfy constraint: [Member must have length less than or equal to 255, Member must have length greater than or equal to 1]",
        );
      // Unknown names are silently absent.
      const found = [...this.groups.values()].filter((group) => !names?.length || names.includes(group.name));
      const { items, next } = page(found, maxRecords(input.MaxRecords, 50, 100), input.NextToken, badToken);
      return { AutoScalingGroups: items.map((group) => this.#view(group, viewMs)), NextToken: next };
    },

    DescribeAutoScalingInstances: (input: DescribeAutoScalingInstancesType) => {
      const viewMs = this.#world.viewMs();
      const ids = input.InstanceIds;
      if (ids && ids.length > 50) throw refuse("The number of instance ids that may be passed in is limited to 50");
      const wanted = ids?.length ? new Set(ids) : undefined;
      // A group without past holds nobody but its members: no need to describe those that none of the IDs is in.
      const concerned = [...this.groups.values()].filter(
        (group) => !wanted || group.past.length > 0 || [...wanted].some((id) => group.members.has(id)),
      );
      const found = concerned.flatMap((group) =>
        this.#view(group, viewMs)
          .Instances.filter((member) => !wanted || wanted.has(member.InstanceId))
          .map((member) => ({ ...member, AutoScalingGroupName: group.name, HealthStatus: member.HealthStatus.toUpperCase() })),
      );
      const { items, next } = page(found, maxRecords(input.MaxRecords, 50, 50), input.NextToken, badToken);
      return { AutoScalingInstances: items, NextToken: next };
    },

    AttachInstances: (input: AttachInstancesQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      const ids = idList(input.InstanceIds, MAX_IDS);
      if (group.status) throw pendingDelete(group);
      if (group.suspended.has("Launch")) throw refuse(`The Launch process of AutoScalingGroup ${group.name} is suspended.`);
      const instances = ids.map((id) => this.#attachable(group, id));
      const weights = instances.map((instance) => this.#weightOf(group, instance.type));
      if (group.desired + sum(weights) > group.max) throw sizes(group, "attach", ids.length);
      this.touch(group);
      instances.forEach((instance, i) => {
        this.#attach(group, instance, weights[i] ?? 1);
      });
      return {};
    },

    DetachInstances: (input: DetachInstancesQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      const ids = idList(input.InstanceIds, MAX_IDS);
      const members = ids.map((id) => memberOf(group, id));
      for (const { state, instance } of members)
        if (state !== "InService" && state !== "Standby")
          throw refuse(`The instance ${instance.id} is not in InService or Standby.`);
      const decrement = input.ShouldDecrementDesiredCapacity === true;
      const units = decrement ? sum(members.map((member) => member.weight)) : 0;
      if (group.desired - units < group.min) throw sizes(group, "detach", ids.length);
      this.touch(group);
      const activities = members.map((member) => this.#detach(group, member, decrement));
      this.#poke(group);
      return { Activities: activities.map(describeActivity) };
    },

    UpdateAutoScalingGroup: (input: UpdateAutoScalingGroupType) => this.#update(input),

    SetDesiredCapacity: (input: SetDesiredCapacityType) => {
      const group = this.#group(input.AutoScalingGroupName);
      const wanted = input.DesiredCapacity ?? 0;
      if (group.status) throw pendingDelete(group);
      if (wanted > group.max)
        throw refuse(`New SetDesiredCapacity value ${wanted} is above max value ${group.max} for the AutoScalingGroup.`);
      if (wanted < group.min)
        throw refuse(`New SetDesiredCapacity value ${wanted} is below min value ${group.min} for the AutoScalingGroup.`);
      this.touch(group);
      const when = isoSeconds(this.#world.now());
      group.lastRequest = `At ${when} a user request explicitly set group desired capacity changing the desired capacity from ${group.desired} to ${wanted}. `;
      group.desired = wanted;
      this.#world.record("desired", [], group.name, String(wanted));
      this.#poke(group);
      return {};
    },

    CreateOrUpdateTags: (input: CreateOrUpdateTagsType) => {
      const changes = (input.Tags ?? []).map((tag) => {
        if (tag.ResourceType !== undefined && tag.ResourceType !== "auto-scaling-group")
          throw refuse(`${tag.ResourceType} is not a valid resource type: it must be auto-scaling-group`);
        const { Key: key = "", Value: value = "" } = tag;
        if (key.length < 1 || key.length > 128) throw refuse("Tag keys must have 1 to 128 characters");
        if (value.length > 256) throw refuse("Tag values must have at most 256 characters");
        if (key.toLowerCase().startsWith("aws:")) throw refuse("Tag keys that start with 'aws:' are reserved for internal use");
        const group = this.#group(tag.ResourceId);
        return { group, key, value, propagate: tag.PropagateAtLaunch ?? false };
      });
      for (const { group, key } of changes)
        if (!group.tags.has(key) && group.tags.size >= 50)
          throw new AwsError("LimitExceeded", "More than 50 tags for the AutoScalingGroup");
      for (const { group, key, value, propagate } of changes) {
        this.touch(group);
        group.tags.set(key, { value, propagate });
        this.#world.record("group tag", [], group.name, `${key}=${value}`);
      }
      return {};
    },

    DeleteTags: (input: DeleteTagsType) => {
      for (const tag of input.Tags ?? []) {
        const group = this.#group(tag.ResourceId);
        this.touch(group);
        // A tag of another value, or none: no error, nothing done.
        const known = group.tags.get(tag.Key ?? "");
        if (known && (tag.Value === undefined || tag.Value === known.value)) {
          group.tags.delete(tag.Key ?? "");
          this.#world.record("group tag deleted", [], group.name, tag.Key);
        }
      }
      return {};
    },

    DescribeTags: (input: DescribeTagsType) => {
      const all = [...this.groups.values()].flatMap((group) => describeTags(group));
      const rules = (input.Filters ?? []).map(({ Name = "", Values = [] }) => {
        const read = TAG_FILTERS[Name];
        if (!read) throw refuse(`The filter '${Name}' is not valid`);
        const matchers = Values.map(wildcard);
        return (tag: GroupTag) => matchers.some((matches) => matches(read(tag)));
      });
      const found = all.filter((tag) => rules.every((rule) => rule(tag)));
      const { items, next } = page(found, maxRecords(input.MaxRecords, 50, 100), input.NextToken, badToken);
      return { Tags: items, NextToken: next };
    },

    SetInstanceProtection: (input: SetInstanceProtectionQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      const members = idList(input.InstanceIds, 50).map((id) => memberOf(group, id));
      for (const { state, instance } of members)
        if (state !== "InService" && state !== "Standby")
          throw refuse(`The instance ${instance.id} is not in InService or EnteringStandby or Standby.`);
      this.touch(group);
      for (const member of members) member.protected = input.ProtectedFromScaleIn === true;
      this.#poke(group);
      return {};
    },

    TerminateInstanceInAutoScalingGroup: (input: TerminateInstanceInAutoScalingGroupType) => {
      const id = input.InstanceId ?? "";
      const group = this.#groupOf(id);
      const member = group?.members.get(id);
      if (!group || !member) throw refuse(`Instance Id not found - No managed instance found for instance ID: ${id}`);
      if (member.state === "Terminating" || member.state === "Detaching")
        throw new AwsError("ScalingActivityInProgress", `Activity ${member.activity?.id} is in progress on instance ${id}.`);
      const decrement = input.ShouldDecrementDesiredCapacity === true;
      if (decrement && group.desired - member.weight < group.min)
        throw refuse(
          `Currently, desiredSize equals minSize (${group.min}). Terminating instance without replacement will violate group's min size constraint. Either set shouldDecrementDesiredCapacity flag to false or lower group's min size.`,
        );
      this.touch(group);
      let cause = `At ${isoSeconds(this.#world.now())} instance ${id} was taken out of service in response to a user request`;
      if (decrement) cause += `, shrinking the capacity from ${group.desired} to ${group.desired - member.weight}`;
      if (decrement) group.desired -= member.weight;
      const activity = this.#terminate(group, member, `${cause}.`);
      this.#poke(group);
      return { Activity: describeActivity(activity) };
    },

    DescribeScalingActivities: (input: DescribeScalingActivitiesType) => {
      const viewMs = this.#world.viewMs();
      const groups = input.AutoScalingGroupName ? [this.#group(input.AutoScalingGroupName)] : [...this.groups.values()];
      const found = groups
        .flatMap((group) => group.activities)
        .filter((activity) => activity.startMs <= viewMs)
        .filter((activity) => !input.ActivityIds || input.ActivityIds.includes(activity.id));
      // Newest first; of equal times the later record first.
      const sorted = found.reverse().sort((a, b) => b.startMs - a.startMs);
      const { items, next } = page(sorted, maxRecords(input.MaxRecords, 100, 100), input.NextToken, badToken);
      return { Activities: items.map(describeActivity), NextToken: next };
    },

    DescribeLifecycleHooks: (input: DescribeLifecycleHooksType) => {
      const group = this.#group(input.AutoScalingGroupName);
      return {
        LifecycleHooks: group.hooks
          .filter((name) => !input.LifecycleHookNames || input.LifecycleHookNames.includes(name))
          .map((name) => ({
            LifecycleHookName: name,
            AutoScalingGroupName: group.name,
            LifecycleTransition: "autoscaling:EC2_INSTANCE_TERMINATING",
            HeartbeatTimeout: 3600,
            GlobalTimeout: 172_800,
            DefaultResult: "ABANDON",
          })),
      };
    },

    SuspendProcesses: (input: ScalingProcessQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      if (group.status) throw refuse("Processes may not be suspended while the AutoScaling group is pending delete");
      this.touch(group);
      for (const name of processes(input.ScalingProcesses)) group.suspended.add(name);
      return {};
    },

    ResumeProcesses: (input: ScalingProcessQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      this.touch(group);
      for (const name of processes(input.ScalingProcesses)) group.suspended.delete(name);
      // What died while HealthCheck was suspended is found out now.
      for (const member of group.members.values()) {
        if (!member.seenDead || !member.healthy) continue;
        member.seenDead = false;
        this.instanceChanged(member.instance);
      }
      this.#poke(group);
      return {};
    },

    EnterStandby: (input: EnterStandbyQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      const members = idList(input.InstanceIds, MAX_IDS).map((id) => memberOf(group, id));
      for (const { state, instance } of members)
        if (state !== "InService") throw refuse(`The instance ${instance.id} is not in InService.`);
      const decrement = input.ShouldDecrementDesiredCapacity === true;
      const units = decrement ? sum(members.map((member) => member.weight)) : 0;
      if (group.desired - units < group.min)
        throw refuse(
          `AutoScalingGroup ${group.name} has min-size=${group.min}, max-size=${group.max}, and desired-size=${group.desired}. To place into standby ${count(members.length)}, please update the AutoScalingGroup sizes appropriately.`,
        );
      this.touch(group);
      const activities = members.map((member) => {
        const { id } = member.instance;
        let cause = `At ${isoSeconds(this.#world.now())} instance ${id} was moved to standby in response to a user request`;
        if (decrement) cause += `, shrinking the capacity from ${group.desired} to ${group.desired - member.weight}`;
        if (decrement) group.desired -= member.weight;
        member.state = "Standby";
        for (const arn of group.targetGroupArns) this.#world.elbv2.deregister(arn, id);
        this.#world.record("standby", [id], group.name);
        const activity = this.#begin(group, `Moving EC2 instance to Standby: ${id}`, `${cause}.`);
        this.#end(activity);
        return activity;
      });
      this.#poke(group);
      return { Activities: activities.map(describeActivity) };
    },

    ExitStandby: (input: ExitStandbyQuery) => {
      const group = this.#group(input.AutoScalingGroupName);
      const members = idList(input.InstanceIds, MAX_IDS).map((id) => memberOf(group, id));
      for (const { state, instance } of members)
        if (state !== "Standby") throw refuse(`The instance ${instance.id} is not in Standby.`);
      if (group.desired + sum(members.map((member) => member.weight)) > group.max)
        throw refuse(
          `AutoScalingGroup ${group.name} has min-size=${group.min}, max-size=${group.max}, and desired-size=${group.desired}. To remove from standby ${count(members.length)}, please update the AutoScalingGroup sizes appropriately.`,
        );
      this.touch(group);
      const activities = members.map((member) => {
        const { id } = member.instance;
        const cause = `At ${isoSeconds(this.#world.now())} instance ${id} was moved out of standby in response to a user request, increasing the capacity from ${group.desired} to ${group.desired + member.weight}.`;
        group.desired += member.weight;
        member.state = "Pending";
        member.activity = this.#begin(group, `Moving EC2 instance out of Standby: ${id}`, cause);
        this.#world.record("out of standby", [id], group.name);
        this.#settleIn(group, member);
        return member.activity;
      });
      this.#poke(group);
      return { Activities: activities.map(describeActivity) };
    },

    CreateAutoScalingGroup: (input: CreateAutoScalingGroupType) => {
      const name = input.AutoScalingGroupName ?? "";
      if (this.groups.has(name))
        throw new AwsError(
          "AlreadyExists",
          `AutoScalingGroup by this name already exists - A group with the name ${name} already exists`,
        );
      const sources = [input.LaunchTemplate, input.MixedInstancesPolicy, input.LaunchConfigurationName, input.InstanceId];
      if (sources.filter((source) => source !== undefined).length !== 1)
        throw refuse(
          "Valid requests must contain either LaunchTemplate, LaunchConfigurationName, InstanceId or MixedInstancesPolicy parameter.",
        );
      const { MinSize: min = 0, MaxSize: max = 0 } = input;
      const desired = input.DesiredCapacity ?? min;
      checkSizes(min, max, desired);
      const subnets = this.#subnets(input.VPCZoneIdentifier, input.AvailabilityZones);
      const group = this.#create(name, min, max, desired, subnets);
      group.template = this.#checkedTemplate(input.LaunchTemplate);
      group.mixed = input.MixedInstancesPolicy;
      group.launchConfiguration = input.LaunchConfigurationName;
      group.newProtected = input.NewInstancesProtectedFromScaleIn ?? false;
      group.capacityRebalance = input.CapacityRebalance ?? false;
      group.healthCheckType = input.HealthCheckType ?? "EC2";
      group.healthCheckGraceSeconds = input.HealthCheckGracePeriod ?? 0;
      group.targetGroupArns = input.TargetGroupARNs ?? [];
      for (const { Key = "", Value = "", PropagateAtLaunch } of input.Tags ?? [])
        group.tags.set(Key, { value: Value, propagate: PropagateAtLaunch ?? false });
      const when = isoSeconds(this.#world.now());
      group.lastRequest = `At ${when} a user request created an AutoScalingGroup changing the desired capacity from 0 to ${desired}. `;
      this.#poke(group);
      return {};
    },

    DeleteAutoScalingGroup: (input: DeleteAutoScalingGroupType) => {
      const group = this.#group(input.AutoScalingGroupName);
      if (group.members.size > 0 && !input.ForceDelete)
        throw new AwsError(
          "ResourceInUse",
          "You cannot delete an AutoScalingGroup while there are instances or pending Spot instance request(s) still in the group.",
        );
      this.touch(group);
      group.status = "Delete in progress";
      [group.min, group.max, group.desired] = [0, 0, 0];
      this.#world.record("group deleted", [], group.name);
      const cause = `At ${isoSeconds(this.#world.now())} a user request force deleted AutoScalingGroup.`;
      for (const member of group.members.values())
        if (member.state !== "Terminating" && member.state !== "Detaching") this.#terminate(group, member, cause);
      if (group.members.size === 0) this.groups.delete(group.name);
      return {};
    },
  };

  // --- Describing ------------------------------------------------------------------------------------------------

  describe(group: Group) {
    const zones = [...new Set(group.subnets.map((subnet) => subnet.zone))];
    const ownTemplate = group.template ?? group.mixed?.LaunchTemplate?.LaunchTemplateSpecification;
    return {
      AutoScalingGroupName: group.name,
      AutoScalingGroupARN: group.arn,
      ...(group.template && { LaunchTemplate: { ...group.template } }),
      ...(group.mixed && { MixedInstancesPolicy: copyOf(group.mixed) }),
      ...(group.launchConfiguration && { LaunchConfigurationName: group.launchConfiguration }),
      ...(group.warmPool && { WarmPoolConfiguration: group.warmPool }),
      MinSize: group.min,
      MaxSize: group.max,
      DesiredCapacity: group.desired,
      DesiredCapacityType: "units",
      DefaultCooldown: 300,
      AvailabilityZones: zones,
      LoadBalancerNames: [],
      TargetGroupARNs: [...group.targetGroupArns],
      HealthCheckType: group.healthCheckType,
      HealthCheckGracePeriod: group.healthCheckGraceSeconds,
      Instances: [...group.members.values()].map((member) => ({
        InstanceId: member.instance.id,
        InstanceType: member.instance.type,
        AvailabilityZone: member.instance.zone,
        LifecycleState: member.state,
        HealthStatus: member.healthy ? "Healthy" : "Unhealthy",
        ProtectedFromScaleIn: member.protected,
        ...(this.#isWeighted(group) && { WeightedCapacity: String(member.weight) }),
        ...(member.byGroup && ownTemplate && { LaunchTemplate: { ...ownTemplate } }),
        ...(group.launchConfiguration && member.byGroup && { LaunchConfigurationName: group.launchConfiguration }),
      })),
      CreatedTime: new Date(group.createdAtMs),
      SuspendedProcesses: [...group.suspended].map((ProcessName) => ({
        ProcessName,
        SuspensionReason: `User suspended at ${isoSeconds(group.createdAtMs)}`,
      })),
      VPCZoneIdentifier: group.subnets.map((subnet) => subnet.id).join(","),
      EnabledMetrics: [],
      ...(group.status && { Status: group.status }),
      Tags: describeTags(group),
      TerminationPolicies: ["Default"],
      NewInstancesProtectedFromScaleIn: group.newProtected,
      ServiceLinkedRoleARN: `arn:aws:iam::${this.#world.account}:role/aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling`,
      CapacityRebalance: group.capacityRebalance,
      TrafficSources: [],
    };
  }

  #view(group: Group, viewMs: number): ReturnType<AutoScaling["describe"]> {
    const past = group.past.find(({ untilMs }) => untilMs > viewMs);
    return past ? copyOf(past.view) : this.describe(group);
  }

  /** To be called before what describes show of a group changes. */
  touch(group: Group): void {
    const { staleMs } = this.#world.delays;
    if (staleMs === 0) return;
    const now = this.#world.now();
    group.past = group.past.filter(({ untilMs }) => untilMs > now - staleMs);
    group.past.push({ untilMs: now, view: this.describe(group) });
  }

  sample(name: string): CapacitySample | undefined {
    const group = this.groups.get(name);
    if (!group) return undefined;
    const inService = [...group.members.values()].filter(
      ({ state, instance }) => state === "InService" && instance.state === "running",
    );
    const serving = inService.filter(({ instance }) =>
      group.targetGroupArns.every((arn) => this.#world.elbv2.health(arn, instance.id) === "healthy"),
    );
    return {
      atMs: this.#world.now(),
      group: name,
      inService: sum(inService.map((member) => member.weight)),
      serving: sum(serving.map((member) => member.weight)),
      desired: group.desired,
      min: group.min,
      max: group.max,
    };
  }

  snapshot(): object {
    return [...this.groups.values()].map((group) => ({
      name: group.name,
      min: group.min,
      max: group.max,
      desired: group.desired,
      status: group.status ?? null,
      tags: Object.fromEntries([...group.tags].map(([key, { value }]) => [key, value])),
      members: [...group.members.values()].map((member) => ({
        id: member.instance.id,
        state: member.state,
        healthy: member.healthy,
        protected: member.protected,
      })),
    }));
  }

  // --- Attach and detach -----------------------------------------------------------------------------------------

  /** One bad ID refuses the whole call, so every one is looked at before anything is done. */
  #attachable(group: Group, id: string): Instance {
    const instance = this.#world.ec2.instances.get(id);
    if (!instance) throw refuse(`Invalid Instance ID(s): [${id}]. The instance does not exist.`);
    if (instance.group !== undefined) throw refuse(`Instance ${id} is already part of AutoScalingGroup:${instance.group}`);
    if (instance.state !== "running") throw refuse(`The instance ${id} is not in the running state. It is ${instance.state}.`);
    if (this.#world.ec2.missingImages.has(instance.imageId))
      throw refuse(`The AMI ${instance.imageId} of instance ${id} does not exist.`);
    if (!group.subnets.some((subnet) => subnet.zone === instance.zone))
      throw refuse(
        `The instance ${id} is in Availability Zone ${instance.zone}, which is not one of AutoScalingGroup ${group.name}.`,
      );
    for (const arn of group.targetGroupArns) {
      const targets = this.#world.elbv2.groups.get(arn);
      if (targets && targets.vpcId !== instance.subnet.vpcId)
        throw refuse(`The instance ${id} is not in the VPC of target group ${arn}.`);
    }
    return instance;
  }

  #attach(group: Group, instance: Instance, weight: number): void {
    const { id } = instance;
    const cause = `At ${isoSeconds(this.#world.now())} an instance was attached in response to user request, increasing the capacity from ${group.desired} to ${group.desired + weight}.`;
    group.desired += weight;
    const member = this.#join(group, instance, weight, false);
    member.activity = this.#begin(group, `Attaching an existing EC2 instance: ${id}`, cause);
    this.#world.record("attach", [id], group.name);
    this.#settleIn(group, member);
  }

  #join(group: Group, instance: Instance, weight: number, byGroup: boolean): Member {
    const member: Member = {
      instance,
      state: "Pending",
      healthy: true,
      protected: group.newProtected,
      weight,
      byGroup,
      seenDead: false,
      activity: undefined,
      rebalanceFrom: undefined,
    };
    group.members.set(instance.id, member);
    this.#world.ec2.touch(instance);
    instance.group = group.name;
    for (const [key, { value, propagate }] of group.tags) if (propagate) instance.tags.set(key, value);
    instance.tags.set(GROUP_NAME_TAG, group.name);
    return member;
  }

  /** Pending to InService, which does not wait for target groups. */
  #settleIn(group: Group, member: Member): void {
    this.#world.after(this.#world.random.between(this.#world.delays.attachMs), () => {
      if (member.state !== "Pending" || group.members.get(member.instance.id) !== member) return;
      if (member.instance.state !== "running") return;
      this.touch(group);
      member.state = "InService";
      if (!group.suspended.has("AddToLoadBalancer"))
        for (const arn of group.targetGroupArns) this.#world.elbv2.register(arn, member.instance.id);
      this.#end(member.activity);
      this.#world.record("in service", [member.instance.id], group.name);
      this.#poke(group);
    });
  }

  #detach(group: Group, member: Member, decrement: boolean): Activity {
    const { id } = member.instance;
    let cause = `At ${isoSeconds(this.#world.now())} instance ${id} was detached in response to a user request`;
    if (decrement) cause += `, shrinking the capacity from ${group.desired} to ${group.desired - member.weight}`;
    if (decrement) group.desired -= member.weight;
    member.state = "Detaching";
    member.activity = this.#begin(group, `Detaching EC2 instance: ${id}`, `${cause}.`);
    for (const arn of group.targetGroupArns) this.#world.elbv2.deregister(arn, id);
    this.#world.record("detach", [id], group.name, decrement ? "with decrement" : "without decrement");
    // A group with target groups waits for their connections to drain.
    const drainMs = group.targetGroupArns.length > 0 ? this.#world.delays.drainMs : 0;
    this.#world.after(drainMs + this.#world.random.between(this.#world.delays.detachMs), () => {
      this.#leave(group, member, "detached");
    });
    return member.activity;
  }

  #leave(group: Group, member: Member, what: string): void {
    const { instance } = member;
    if (group.members.get(instance.id) !== member) return;
    this.touch(group);
    this.#world.ec2.touch(instance);
    group.members.delete(instance.id);
    instance.group = undefined;
    // The propagated tags stay on the instance; only the group's own goes.
    instance.tags.delete(GROUP_NAME_TAG);
    this.#end(member.activity);
    this.#world.record(what, [instance.id], group.name);
    if (group.status && group.members.size === 0) this.groups.delete(group.name);
    else this.#poke(group);
  }

  /** Takes a member out of service and ends its instance, after its connections have drained. */
  #terminate(group: Group, member: Member, cause: string): Activity {
    const { instance } = member;
    member.state = "Terminating";
    member.activity = this.#begin(group, `Terminating EC2 instance: ${instance.id}`, cause);
    this.#world.record("terminating", [instance.id], group.name, cause);
    for (const arn of group.targetGroupArns) this.#world.elbv2.deregister(arn, instance.id);
    const end = () => {
      this.#world.ec2.terminate(instance, "Client.UserInitiatedShutdown: User initiated shutdown", true);
      if (instance.state === "terminated")
        this.#world.after(this.#world.random.between(this.#world.delays.detachMs), () => this.#leave(group, member, "left"));
    };
    const drains = group.targetGroupArns.length > 0 && instance.state === "running";
    if (drains) this.#world.after(this.#world.delays.drainMs, end);
    else end();
    return member.activity;
  }

  // --- Sizes -----------------------------------------------------------------------------------------------------

  #update(input: UpdateAutoScalingGroupType): object {
    const group = this.#group(input.AutoScalingGroupName);
    if (group.status) throw pendingDelete(group);
    const min = input.MinSize ?? group.min;
    const max = input.MaxSize ?? group.max;
    // A bound that passes desired takes it along, unless the request sets desired itself.
    const desired = input.DesiredCapacity ?? Math.max(min, Math.min(max, group.desired));
    checkSizes(min, max, desired);
    const subnets =
      input.VPCZoneIdentifier !== undefined || input.AvailabilityZones !== undefined
        ? this.#subnets(input.VPCZoneIdentifier, input.AvailabilityZones)
        : group.subnets;
    const template = this.#checkedTemplate(input.LaunchTemplate);
    this.touch(group);
    if (desired !== group.desired)
      group.lastRequest = `At ${isoSeconds(this.#world.now())} a user request update of AutoScalingGroup constraints to min: ${min}, max: ${max}, desired: ${desired} changing the desired capacity from ${group.desired} to ${desired}. `;
    Object.assign(group, { min, max, desired, subnets });
    if (template) Object.assign(group, { template, mixed: undefined, launchConfiguration: undefined });
    if (input.MixedInstancesPolicy)
      Object.assign(group, { mixed: input.MixedInstancesPolicy, template: undefined, launchConfiguration: undefined });
    group.newProtected = input.NewInstancesProtectedFromScaleIn ?? group.newProtected;
    group.capacityRebalance = input.CapacityRebalance ?? group.capacityRebalance;
    group.healthCheckType = input.HealthCheckType ?? group.healthCheckType;
    group.healthCheckGraceSeconds = input.HealthCheckGracePeriod ?? group.healthCheckGraceSeconds;
    this.#world.record("sizes", [], group.name, `${min}/${desired}/${max}`);
    this.#poke(group);
    return {};
  }

  #isWeighted(group: Group): boolean {
    return group.mixed?.LaunchTemplate?.Overrides?.some((one) => one.WeightedCapacity !== undefined) ?? false;
  }

  #weightOf(group: Group, type: string): number {
    const override = group.mixed?.LaunchTemplate?.Overrides?.find((one) => one.InstanceType === type);
    return Number(override?.WeightedCapacity ?? 1);
  }

  // --- What groups do by themselves ------------------------------------------------------------------------------

  /** EC2 says that an instance has changed its state. */
  instanceChanged(instance: Instance): void {
    const group = instance.group === undefined ? undefined : this.groups.get(instance.group);
    const member = group?.members.get(instance.id);
    if (!group || !member) return;
    if (instance.state === "running") {
      if (member.state === "Pending") this.#settleIn(group, member);
      return;
    }
    if (instance.state === "pending") return;
    if (member.state === "Terminating") {
      if (instance.state === "terminated") this.#leave(group, member, "left");
      return;
    }
    if (member.seenDead || member.state === "Detaching") return;
    member.seenDead = true;
    this.#world.after(this.#world.random.between(this.#world.delays.replaceMs), () => {
      if (group.members.get(instance.id) !== member || group.suspended.has("HealthCheck")) return;
      this.touch(group);
      member.healthy = false;
      this.#replaceUnhealthy(group);
    });
  }

  #replaceUnhealthy(group: Group): void {
    if (group.suspended.has("ReplaceUnhealthy") || group.suspended.has("Terminate")) return;
    for (const member of group.members.values()) {
      // Members in Standby are not health-checked, and those on their way out are on it already.
      if (member.healthy || (member.state !== "InService" && member.state !== "Pending")) continue;
      this.touch(group);
      group.replacing++;
      const when = isoSeconds(this.#world.now());
      this.#terminate(
        group,
        member,
        `At ${when} an instance was taken out of service in response to an EC2 health check indicating it has been terminated or stopped.`,
      );
      this.#poke(group);
    }
  }

  /** Looks at a group again in a moment. */
  #poke(group: Group, ms = this.#world.random.between(this.#world.delays.reactionMs)): void {
    const atMs = this.#world.now() + ms;
    if (group.reconcileAtMs !== undefined && group.reconcileAtMs <= atMs) return;
    group.reconcileAtMs = atMs;
    this.#world.after(ms, () => {
      if (group.reconcileAtMs !== atMs || this.groups.get(group.name) !== group) return;
      group.reconcileAtMs = undefined;
      this.#reconcile(group);
    });
  }

  #reconcile(group: Group): void {
    if (group.status) return;
    this.#replaceUnhealthy(group);
    while (capacity(group) < group.desired && !group.suspended.has("Launch")) {
      if (!this.#launchOne(group)) {
        this.#poke(group, this.#world.delays.launchRetryMs);
        return;
      }
    }
    if (!group.suspended.has("Terminate")) this.#scaleIn(group);
    this.#rebalance(group);
  }

  #scaleIn(group: Group): void {
    for (;;) {
      const units = capacity(group) - surplus(group);
      const victim = this.#victim(group, undefined);
      // Weights may leave a group a little above desired: never below it.
      if (!victim || units - victim.weight < group.desired) return;
      this.touch(group);
      const when = isoSeconds(this.#world.now());
      this.#terminate(
        group,
        victim,
        `${group.lastRequest}At ${when} an instance was taken out of service in response to a difference between desired and actual capacity, shrinking the capacity from ${units} to ${units - victim.weight}.  At ${when} instance ${victim.instance.id} was selected for termination.`,
      );
    }
  }

  /** Never a protected one; of the fullest zone (or of `zone`), the oldest. */
  #victim(group: Group, zone: string | undefined): Member | undefined {
    const zones = zoneCounts(group);
    const candidates = [...group.members.values()].filter(
      (member) =>
        member.state === "InService" &&
        !member.protected &&
        member.rebalanceFrom === undefined &&
        (zone === undefined || member.instance.zone === zone),
    );
    candidates.sort(
      (a, b) =>
        (zones.get(b.instance.zone) ?? 0) - (zones.get(a.instance.zone) ?? 0) ||
        a.instance.launchedAtMs - b.instance.launchedAtMs ||
        (a.instance.id < b.instance.id ? -1 : 1),
    );
    return candidates[0];
  }

  /** Launches one instance for the group, in the emptiest zone that has capacity. */
  #launchOne(group: Group, onlyZone?: string): Member | undefined {
    const counts = zoneCounts(group);
    const subnets = group.subnets
      .filter((subnet) => onlyZone === undefined || subnet.zone === onlyZone)
      .sort((a, b) => (counts.get(a.zone) ?? 0) - (counts.get(b.zone) ?? 0));
    const lifecycle = this.#nextLifecycle(group);
    const units = capacity(group);
    const when = isoSeconds(this.#world.now());
    let cause = `${group.lastRequest}At ${when} an instance was started in response to a difference between desired and actual capacity, increasing the capacity from ${units} to `;
    let failure: AwsError | undefined;
    this.touch(group);
    for (const subnet of subnets) {
      const choices = this.#choices(group)
        .map((choice) => ({ ...choice, pool: this.#world.ec2.pool(lifecycle, choice.type, subnet.zone) }))
        .sort((a, b) => (a.pool.capacity === b.pool.capacity ? a.pool.price - b.pool.price : b.pool.capacity - a.pool.capacity));
      for (const { type, weight, data, pool } of choices) {
        const imageId = data.ImageId ?? "";
        const refusal = this.#world.ec2.refusal(pool, subnet, imageId, data.BlockDeviceMappings);
        if (refusal) {
          failure = refusal;
          continue;
        }
        const instance = this.#world.ec2.launch({
          type,
          subnet,
          lifecycle,
          imageId,
          tags: mergeTags(data.TagSpecifications, undefined, "instance"),
          volumeTags: mergeTags(data.TagSpecifications, undefined, "volume"),
          blockDevices: data.BlockDeviceMappings,
        });
        const member = this.#join(group, instance, weight, true);
        cause += `${units + weight}.`;
        if (group.replacing > 0) {
          group.replacing--;
          cause = `At ${when} an instance was launched in response to an unhealthy instance needing to be replaced.`;
        }
        if (onlyZone) cause = `At ${when} an instance was launched to aid in balancing the group's zones.`;
        member.activity = this.#begin(group, `Launching a new EC2 instance: ${instance.id}`, cause);
        this.#world.record("group launch", [instance.id], group.name, cause);
        return member;
      }
    }
    const activity = this.#begin(group, "Launching a new EC2 instance", `${cause}${units + 1}.`);
    const what = lifecycle === "spot" ? "Could not launch Spot Instances. " : "";
    this.#end(activity, `${what}${failure?.name} - ${failure?.message} Launching EC2 instance failed.`);
    this.#world.record("group launch failed", [], group.name, failure?.name);
    return undefined;
  }

  #nextLifecycle(group: Group): Lifecycle {
    if (!group.mixed) {
      const market = this.#templateData(group).InstanceMarketOptions?.MarketType;
      return market === "spot" ? "spot" : "on-demand";
    }
    const distribution = group.mixed.InstancesDistribution;
    const base = distribution?.OnDemandBaseCapacity ?? 0;
    const percentage = distribution?.OnDemandPercentageAboveBaseCapacity ?? 100;
    const counted = [...group.members.values()].filter(isCounted);
    const onDemand = sum(counted.filter(({ instance }) => instance.lifecycle === "on-demand").map((m) => m.weight));
    const wanted = base + Math.ceil((Math.max(0, group.desired - base) * percentage) / 100);
    return onDemand < wanted ? "on-demand" : "spot";
  }

  /** The types that the group may launch, with their weights and template data. */
  #choices(group: Group): { type: string; weight: number; data: ResponseLaunchTemplateData }[] {
    const data = this.#templateData(group);
    const overrides: LaunchTemplateOverrides[] = group.mixed?.LaunchTemplate?.Overrides ?? [];
    if (overrides.length === 0) {
      if (data.InstanceRequirements)
        return matchingTypes(data.InstanceRequirements as InstanceRequirementsRequest, "x86_64").map(([type]) => ({
          type,
          weight: 1,
          data,
        }));
      return [{ type: data.InstanceType ?? "m1.small", weight: 1, data }];
    }
    return overrides.flatMap((override) => {
      const own = override.LaunchTemplateSpecification ? this.#dataOf(override.LaunchTemplateSpecification) : data;
      const weight = Number(override.WeightedCapacity ?? 1);
      if (override.InstanceType) return [{ type: override.InstanceType, weight, data: own }];
      const requirements = override.InstanceRequirements as InstanceRequirementsRequest | undefined;
      return matchingTypes(requirements, "x86_64").map(([type]) => ({ type, weight, data: own }));
    });
  }

  #templateData(group: Group): ResponseLaunchTemplateData {
    const named = group.template ?? group.mixed?.LaunchTemplate?.LaunchTemplateSpecification;
    return named ? this.#dataOf(named) : group.configurationData;
  }

  #dataOf(named: LaunchTemplateSpecification): ResponseLaunchTemplateData {
    const { ec2 } = this.#world;
    // Descriptions carry both ID and name; a template is looked up by one of them.
    const template = ec2.template(named.LaunchTemplateId, named.LaunchTemplateId ? undefined : named.LaunchTemplateName);
    return ec2.version(template, named.Version ?? "$Default").data;
  }

  /** Zones more than one apart get evened out: first a launch (even over the maximum), then a termination. */
  #rebalance(group: Group): void {
    for (const member of group.members.values()) {
      if (member.rebalanceFrom === undefined || member.state !== "InService") continue;
      const victim = this.#victim(group, member.rebalanceFrom);
      member.rebalanceFrom = undefined;
      if (!victim || group.suspended.has("Terminate")) continue;
      const [when, units] = [isoSeconds(this.#world.now()), capacity(group)];
      this.touch(group);
      // As AWS words it: it shrinks, and desired stays as it is.
      this.#terminate(
        group,
        victim,
        `At ${when} instances were launched to balance instances in zones ${member.instance.zone} with other zones resulting in more than desired number of instances in the group.  At ${when} an instance was taken out of service in response to a difference between desired and actual capacity, shrinking the capacity from ${units} to ${units - victim.weight}.  At ${when} instance ${victim.instance.id} was selected for termination.`,
      );
    }
    if (group.rebalanceDue || !this.#uneven(group)) return;
    group.rebalanceDue = true;
    this.#world.after(this.#world.delays.rebalanceMs, () => {
      group.rebalanceDue = false;
      const zones = this.groups.get(group.name) === group ? this.#uneven(group) : undefined;
      if (!zones) return;
      const limit = group.max + Math.max(1, Math.floor(group.max / 10));
      if (capacity(group) + 1 > limit) return;
      const member = this.#launchOne(group, zones.emptiest);
      if (member) member.rebalanceFrom = zones.fullest;
      else this.#poke(group, this.#world.delays.launchRetryMs);
    });
  }

  #uneven(group: Group): { fullest: string; emptiest: string } | undefined {
    if (["AZRebalance", "Launch", "Terminate"].some((name) => group.suspended.has(name))) return undefined;
    if (surplus(group) > 0) return undefined;
    const counts = [...zoneCounts(group)].sort((a, b) => a[1] - b[1]);
    const [emptiest, fullest] = [counts[0], counts.at(-1)];
    if (!emptiest || !fullest || fullest[1] - emptiest[1] < 2) return undefined;
    return this.#victim(group, fullest[0]) ? { fullest: fullest[0], emptiest: emptiest[0] } : undefined;
  }

  // --- Making groups ---------------------------------------------------------------------------------------------

  createFromSpec(spec: GroupSpec): {
    name: string;
    templateId: string;
    subnetIds: string[];
    instanceIds: string[];
  } {
    const { ec2, elbv2, region } = this.#world;
    const zones = spec.zones ?? ["a", "b", "c"].map((letter) => region + letter);
    const types = spec.types ?? ["m5.large", "m5a.large", "m4.large"];
    const subnets = zones.map((zone) => ec2.subnetIn(zone));
    const plain = types.length === 1 && !spec.overrides && !spec.weights;
    const data: ResponseLaunchTemplateData = {
      ImageId: "ami-0123456789abcdef0",
      ...((plain || spec.launchConfiguration) && { InstanceType: types[0] as never }),
      ...(spec.volumes && { BlockDeviceMappings: mappingsOf(spec.volumes) }),
      ...spec.template,
    };
    const template = ec2.createTemplate(`${spec.name}-template`, data);
    const named = {
      LaunchTemplateId: template.id,
      LaunchTemplateName: template.name,
      Version: spec.templateVersion ?? "$Default",
    };
    const group = this.#create(spec.name, spec.min, spec.max, spec.desired, subnets);
    if (spec.launchConfiguration) {
      group.launchConfiguration = `${spec.name}-configuration`;
      group.configurationData = data;
    } else if (plain) group.template = named;
    else
      group.mixed = {
        LaunchTemplate: {
          LaunchTemplateSpecification: named,
          Overrides:
            spec.overrides ??
            types.map((type) => ({
              InstanceType: type,
              ...(spec.weights && { WeightedCapacity: String(spec.weights[type] ?? 1) }),
            })),
        },
        InstancesDistribution: {
          OnDemandAllocationStrategy: "prioritized",
          OnDemandBaseCapacity: spec.onDemandBase ?? 0,
          OnDemandPercentageAboveBaseCapacity: spec.onDemandPercentage ?? 0,
          SpotAllocationStrategy: "price-capacity-optimized",
        },
      };
    group.newProtected = spec.protected ?? false;
    group.capacityRebalance = spec.capacityRebalance ?? false;
    group.healthCheckType = spec.healthCheckType ?? "EC2";
    group.healthCheckGraceSeconds = spec.healthCheckGraceSeconds ?? 0;
    group.hooks = [...(spec.lifecycleHooks ?? [])];
    for (const name of processes(spec.suspended ?? [], true)) group.suspended.add(name);
    const vpcId = subnets[0]?.vpcId ?? "";
    group.targetGroupArns = (spec.targetGroups ?? []).map((name) => elbv2.create(name, vpcId).arn);
    for (const [key, value] of Object.entries(spec.tags ?? {})) group.tags.set(key, { value, propagate: true });
    const choices = this.#choices(group);
    for (let n = 0; capacity(group) < spec.desired; n++) {
      const choice = choices[n % choices.length];
      const subnet = subnets[n % subnets.length];
      if (!choice || !subnet) throw new Error("createGroup: a group needs types and zones");
      const instance = ec2.launch({
        type: choice.type,
        subnet,
        lifecycle: this.#nextLifecycle(group),
        imageId: choice.data.ImageId ?? "",
        tags: mergeTags(choice.data.TagSpecifications, undefined, "instance"),
        volumeTags: mergeTags(choice.data.TagSpecifications, undefined, "volume"),
        blockDevices: choice.data.BlockDeviceMappings,
        atOnce: true,
        ageMs: 1000 * (spec.ageSeconds ?? 86_400),
      });
      this.#join(group, instance, choice.weight, true).state = "InService";
      for (const arn of group.targetGroupArns) elbv2.register(arn, instance.id, true);
    }
    this.#world.record("group created", [...group.members.keys()], group.name);
    return {
      name: group.name,
      templateId: template.id,
      subnetIds: subnets.map((subnet) => subnet.id),
      instanceIds: [...group.members.keys()],
    };
  }

  #create(name: string, min: number, max: number, desired: number, subnets: Subnet[]): Group {
    const { region, account, random } = this.#world;
    const group: Group = {
      name,
      arn: `arn:aws:autoscaling:${region}:${account}:autoScalingGroup:${random.uuid()}:autoScalingGroupName/${name}`,
      min,
      max,
      desired,
      subnets,
      template: undefined,
      mixed: undefined,
      launchConfiguration: undefined,
      configurationData: {},
      members: new Map(),
      targetGroupArns: [],
      tags: new Map(),
      suspended: new Set(),
      status: undefined,
      capacityRebalance: false,
      newProtected: false,
      healthCheckType: "EC2",
      healthCheckGraceSeconds: 0,
      activities: [],
      hooks: [],
      createdAtMs: this.#world.now(),
      lastRequest: "",
      replacing: 0,
      reconcileAtMs: undefined,
      rebalanceDue: false,
      past: [],
    };
    this.groups.set(name, group);
    return group;
  }

  #subnets(ids: string | undefined, zones: string[] | undefined): Subnet[] {
    if (ids)
      return ids.split(",").map((id) => {
        const subnet = this.#world.ec2.subnets.get(id.trim());
        if (!subnet) throw refuse(`The subnet ID '${id.trim()}' does not exist`);
        if (zones?.length && !zones.includes(subnet.zone))
          throw refuse("The availability zones of the specified subnets and the Auto Scaling group do not match");
        return subnet;
      });
    if (!zones?.length) throw refuse("At least one Availability Zone or VPC Subnet is required.");
    return zones.map((zone) => this.#world.ec2.subnetIn(zone));
  }

  #checkedTemplate(named: LaunchTemplateSpecification | undefined): LaunchTemplateSpecification | undefined {
    if (!named) return undefined;
    if (named.LaunchTemplateId !== undefined && named.LaunchTemplateName !== undefined)
      throw refuse("Valid requests must contain either launchTemplateId or LaunchTemplateName");
    const template = this.#world.ec2.template(named.LaunchTemplateId, named.LaunchTemplateName);
    return {
      LaunchTemplateId: template.id,
      LaunchTemplateName: template.name,
      ...(named.Version !== undefined && { Version: named.Version }),
    };
  }

  #begin(group: Group, description: string, cause: string): Activity {
    const activity: Activity = {
      id: this.#world.random.uuid(),
      group: group.name,
      description,
      cause,
      startMs: this.#world.now(),
      endMs: undefined,
      statusCode: "InProgress",
      statusMessage: undefined,
    };
    group.activities.push(activity);
    return activity;
  }

  #end(activity: Activity | undefined, failure?: string): void {
    if (!activity || activity.endMs !== undefined) return;
    activity.endMs = this.#world.now();
    activity.statusCode = failure ? "Failed" : "Successful";
    activity.statusMessage = failure;
  }

  #group(name: string | undefined): Group {
    const group = this.groups.get(name ?? "");
    if (!group) throw refuse(`AutoScalingGroup name not found - AutoScalingGroup ${name} not found`);
    return group;
  }

  #groupOf(id: string): Group | undefined {
    const name = this.#world.ec2.instances.get(id)?.group;
    return name === undefined ? undefined : this.groups.get(name);
  }
}

// --- Plain functions -----------------------------------------------------------------------------------------------

/** Standby members, and those on their way out, are out of desired. */
function isCounted({ state }: Member): boolean {
  return state === "InService" || state === "Pending";
}

function capacity(group: Group): number {
  return sum([...group.members.values()].filter(isCounted).map((member) => member.weight));
}

/** What AZRebalance has launched beyond desired and not yet paid for with a termination. */
function surplus(group: Group): number {
  const extra = [...group.members.values()].filter((member) => member.rebalanceFrom !== undefined);
  return sum(extra.filter(isCounted).map((member) => member.weight));
}

function zoneCounts(group: Group): Map<string, number> {
  const counts = new Map(group.subnets.map((subnet) => [subnet.zone, 0]));
  for (const member of group.members.values())
    if (isCounted(member)) counts.set(member.instance.zone, (counts.get(member.instance.zone) ?? 0) + member.weight);
  return counts;
}

function sum(numbers: number[]): number {
  return numbers.reduce((total, number) => total + number, 0);
}

function count(instances: number): string {
  return instances === 1 ? "1 instance" : `${instances} instances`;
}

function sizes(group: Group, what: "attach" | "detach", instances: number): AwsError {
  return refuse(
    `AutoScalingGroup ${group.name} has min-size=${group.min}, max-size=${group.max}, and desired-size=${group.desired}. To ${what} ${count(instances)}, please update the AutoScalingGroup sizes appropriately.`,
  );
}

function checkSizes(min: number, max: number, desired: number): void {
  for (const size of [min, max, desired])
    if (!Number.isInteger(size) || size < 0) throw refuse("Sizes must be whole numbers of at least 0");
  if (max < min) throw refuse(`Max bound, ${max}, must be greater than or equal to min bound, ${min}`);
  if (desired < min || desired > max)
    throw refuse(`Desired capacity:${desired} must be between the specified min size:${min} and max size:${max}`);
}

function pendingDelete(group: Group): AwsError {
  return refuse(`AutoScalingGroup ${group.name} is pending delete.`);
}

function memberOf(group: Group, id: string): Member {
  const member = group.members.get(id);
  if (!member) throw refuse(`The instance ${id} is not part of Auto Scaling group ${group.name}.`);
  return member;
}

function idList(ids: string[] | undefined, most: number): string[] {
  if (!ids || ids.length === 0)
    throw refuse(
      "1 validation error detected: Value null at 'instanceIds' failed to satisfy constraint: Member must not be null",
    );
  if (ids.length > most)
    throw refuse(
      `1 validation error detected: Value '[${ids.join(", ")}]' at 'instanceIds' failed to satisfy constraint: Member must have length less than or equal to ${most}`,
    );
  return [...new Set(ids)];
}

function maxRecords(value: number | undefined, usual: number, most: number): number {
  if (value === undefined) return usual;
  if (!Number.isInteger(value) || value < 1 || value > most)
    throw refuse(`The MaxRecords value ${value} is not valid: it must be from 1 to ${most}`);
  return value;
}

/** The names as given; none means all of them, where the caller may leave them out. */
function processes(names: string[] | undefined, listed = false): string[] {
  for (const name of names ?? [])
    if (!PROCESSES.includes(name)) throw refuse(`The process ${name} is not a valid scaling process`);
  return names?.length || listed ? (names ?? []) : PROCESSES;
}

interface GroupTag {
  Key: string;
  Value: string;
  ResourceId: string;
  ResourceType: string;
  PropagateAtLaunch: boolean;
}

const TAG_FILTERS: Record<string, (tag: GroupTag) => string> = {
  "auto-scaling-group": (tag) => tag.ResourceId,
  key: (tag) => tag.Key,
  value: (tag) => tag.Value,
  "propagate-at-launch": (tag) => String(tag.PropagateAtLaunch),
};

function describeTags(group: Group): GroupTag[] {
  return [...group.tags].map(([Key, { value, propagate }]) => ({
    Key,
    Value: value,
    ResourceId: group.name,
    ResourceType: "auto-scaling-group",
    PropagateAtLaunch: propagate,
  }));
}

function describeActivity(activity: Activity): object {
  return {
    ActivityId: activity.id,
    AutoScalingGroupName: activity.group,
    Description: activity.description,
    Cause: activity.cause,
    StartTime: new Date(activity.startMs),
    ...(activity.endMs !== undefined && { EndTime: new Date(activity.endMs) }),
    StatusCode: activity.statusCode,
    ...(activity.statusMessage && { StatusMessage: activity.statusMessage }),
    Progress: activity.endMs === undefined ? 50 : 100,
    Details: "{}",
  };
}

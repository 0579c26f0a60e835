// Elastic Load Balancing v2: target groups and the health of their targets.
import type { DescribeTargetGroupsInput, DescribeTargetHealthInput } from "@aws-sdk/client-elastic-load-balancing-v2";
import { AwsError, page } from "./basics.ts";
import type { Handlers, World } from "./world.ts";

type TargetState = "initial" | "healthy" | "unhealthy" | "draining";

interface Target {
  state: TargetState;
  /** Of a registration: a timer of an earlier one must not touch a later one. */
  generation: number;
}

export interface TargetGroup {
  arn: string;
  name: string;
  vpcId: string;
  targets: Map<string, Target>;
  /** Targets of this group never get healthy: for scenarios. */
  broken: boolean;
}

const REASONS: Record<TargetState, { Reason?: string; Description?: string }> = {
  initial: { Reason: "Elb.RegistrationInProgress", Description: "Target registration is in progress" },
  healthy: {},
  unhealthy: { Reason: "Target.FailedHealthChecks", Description: "Health checks failed" },
  draining: { Reason: "Target.DeregistrationInProgress", Description: "Target deregistration is in progress" },
};

export class Elbv2 {
  readonly #world: World;
  readonly groups = new Map<string, TargetGroup>();
  #generation = 0;

  constructor(world: World) {
    this.#world = world;
  }

  readonly operations: Handlers = {
    DescribeTargetGroups: (input: DescribeTargetGroupsInput) => {
      for (const arn of input.TargetGroupArns ?? []) this.#group(arn);
      const found = [...this.groups.values()].filter(
        (group) =>
          (!input.TargetGroupArns || input.TargetGroupArns.includes(group.arn)) &&
          (!input.Names || input.Names.includes(group.name)),
      );
      for (const name of input.Names ?? [])
        if (!found.some((group) => group.name === name))
          throw new AwsError("TargetGroupNotFound", "One or more target groups not found");
      const { items, next } = page(found, pageSize(input.PageSize), input.Marker, invalidMarker);
      return {
        TargetGroups: items.map((group) => ({
          TargetGroupArn: group.arn,
          TargetGroupName: group.name,
          Protocol: "HTTP",
          Port: 80,
          VpcId: group.vpcId,
          TargetType: "instance",
          HealthCheckEnabled: true,
          LoadBalancerArns: [group.arn.replace("targetgroup", "loadbalancer/app")],
        })),
        NextMarker: next,
      };
    },

    DescribeTargetHealth: (input: DescribeTargetHealthInput) => {
      const group = this.#group(input.TargetGroupArn ?? "");
      const asked = input.Targets?.map((target) => target.Id ?? "") ?? [...group.targets.keys()];
      return {
        TargetHealthDescriptions: asked.map((id) => ({
          Target: { Id: id, Port: 80 },
          HealthCheckPort: "80",
          TargetHealth: this.#health(group, id),
        })),
      };
    },
  };

  /** The target group of this name, made if absent. */
  create(name: string, vpcId: string): TargetGroup {
    for (const group of this.groups.values()) if (group.name === name) return group;
    const { region, account, random } = this.#world;
    const arn = `arn:aws:elasticloadbalancing:${region}:${account}:targetgroup/${name}/${random.hex(16)}`;
    const group = { arn, name, vpcId, targets: new Map<string, Target>(), broken: false };
    this.groups.set(arn, group);
    return group;
  }

  register(arn: string, instanceId: string, atOnce = false): void {
    const group = this.#group(arn);
    const target: Target = { state: atOnce ? "healthy" : "initial", generation: ++this.#generation };
    group.targets.set(instanceId, target);
    if (atOnce) return;
    this.#world.after(this.#world.random.between(this.#world.delays.healthyMs), () => {
      if (group.targets.get(instanceId) !== target || target.state !== "initial") return;
      const running = this.#world.ec2.instances.get(instanceId)?.state === "running";
      target.state = running && !group.broken ? "healthy" : "unhealthy";
      this.#world.record(`target ${target.state}`, [instanceId]);
    });
  }

  /** Draining for the deregistration delay, then unused. */
  deregister(arn: string, instanceId: string): void {
    const group = this.#group(arn);
    const target = group.targets.get(instanceId);
    if (!target || target.state === "draining") return;
    target.state = "draining";
    this.#world.after(this.#world.delays.drainMs, () => {
      if (group.targets.get(instanceId) === target) group.targets.delete(instanceId);
    });
  }

  /** Called when an instance is no longer running: EC2 tells the load balancer. */
  instanceGone(instanceId: string): void {
    for (const group of this.groups.values()) {
      const target = group.targets.get(instanceId);
      if (target && target.state !== "draining") target.state = "unhealthy";
    }
  }

  setHealth(arn: string, instanceId: string, state: "healthy" | "unhealthy"): void {
    const target = this.#group(arn).targets.get(instanceId);
    if (!target) throw new Error(`${instanceId} is not registered in ${arn}`);
    target.state = state;
  }

  health(arn: string, instanceId: string): string {
    return this.#health(this.#group(arn), instanceId).State;
  }

  snapshot(): object {
    return [...this.groups.values()].map((group) => ({
      name: group.name,
      targets: Object.fromEntries([...group.targets].map(([id, target]) => [id, target.state])),
    }));
  }

  #health(group: TargetGroup, id: string): { State: string; Reason?: string; Description?: string } {
    if (!/^i-[0-9a-f]{8,17}$/.test(id)) throw new AwsError("ValidationError", `Instance ID '${id}' is not valid`);
    const target = group.targets.get(id);
    if (target) return { State: target.state, ...REASONS[target.state] };
    return {
      State: "unused",
      Reason: "Target.NotRegistered",
      Description: "Target is not registered to the target group",
    };
  }

  #group(arn: string): TargetGroup {
    if (!/^arn:aws[a-z-]*:elasticloadbalancing:/.test(arn))
      throw new AwsError("ValidationError", `'${arn}' is not a valid target group ARN`);
    const group = this.groups.get(arn);
    if (!group) throw new AwsError("TargetGroupNotFound", "One or more target groups not found");
    return group;
  }
}

function pageSize(size: number | undefined): number {
  if (size === undefined) return 400;
  if (size < 1 || size > 400) throw new AwsError("ValidationError", "The page size must be between 1 and 400");
  return size;
}

const invalidMarker = () => new AwsError("ValidationError", "The marker is not valid");

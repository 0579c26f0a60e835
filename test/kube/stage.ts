// The steps of the program in this process, between a real cluster and a simulated AWS in real time.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type Ctx, type Deps, makeContext, makeLog, parseConfig, type Result, TABLE, type Work } from "../../maxgroup.ts";
import { client } from "../aws/clients.ts";
import { RealClock } from "../aws/clock.ts";
import { World } from "../aws/world.ts";
import type { Cluster, KubeObject } from "./cluster.ts";

/** The role that ships, which the program runs under in all tests here. */
export const RBAC = readFileSync(join(import.meta.dir, "../../conf/k8s-rbac.yml"), "utf8");

/** The kubeconfig of a client certificate and a private authority, whose user is in the role's group. */
export function certificateKubeconfig(cluster: Cluster, user: string): string {
  const { certFile, keyFile } = cluster.clientCertificate(user, "max-group");
  return cluster.writeKubeconfig(user, `client-certificate: ${certFile}\nclient-key: ${keyFile}`);
}

/** The node that an instance of this world is. */
export function nodeFor(cluster: Cluster, world: World, id: string, isReady = true): Promise<KubeObject> {
  const { privateDns: name, privateIp: address } = world.instance(id);
  return cluster.makeNode({ name, address, instanceId: id, isReady });
}

export class KubeStage {
  readonly cluster: Cluster;
  readonly clock = new RealClock();
  readonly world: World;
  readonly ctx: Ctx;
  readonly lines: string[] = [];
  readonly #members: string[];
  readonly #stop = new AbortController();

  /** `kubeconfig` goes to the one group, "web"; undefined: it names none. */
  constructor(cluster: Cluster, kubeconfig: string | undefined, options: object = {}) {
    this.cluster = cluster;
    this.world = new World({ clock: this.clock, seed: 3, region: "us-east-2", latencyMs: [0, 0] });
    const queues = this.world.createQueues();
    this.#members = this.world.createGroup({ name: "web", min: 1, max: 60, desired: 30 }).instanceIds;
    const queue = (queue_url: string) => ({ queue_url });
    const file = kubeconfig === undefined ? {} : { k8s_config_file_path: kubeconfig };
    const config = {
      global: {
        interruption_evt_sqs: queue(queues.interruption),
        detach_evt_sqs: queue(queues.detach),
        termination_evt_sqs: queue(queues.termination),
      },
      groups: { web: { k8s_node_drain_option: true, ...file, ...options } },
    };
    const sqs = client(this.world, "sqs");
    const deps: Deps = {
      ec2: client(this.world, "ec2"),
      autoScaling: client(this.world, "autoscaling"),
      elb: client(this.world, "elbv2"),
      s3: client(this.world, "s3"),
      sqs: () => sqs,
      fetch: (url, init) => fetch(url, init),
      credentials: async () => ({ accessKeyId: "AKIATEST", secretAccessKey: "secret" }),
      region: "us-east-2",
      now: Date.now,
      sleep: (ms, signal) => this.clock.sleep(ms, signal),
      random: Math.random,
      log: makeLog(
        (line) => this.lines.push(line),
        Date.now,
        true,
        () => "debug",
      ),
    };
    this.ctx = makeContext(deps, parseConfig(JSON.stringify(config)), this.#stop.signal);
  }

  /** A member of the group that is nobody's yet, with a node of its own. */
  async node(more: { isReady?: boolean; byName?: boolean } = {}): Promise<{ id: string; node: KubeObject; name: string }> {
    const id = this.#members.shift() ?? "";
    const { privateDns: name, privateIp: address } = this.world.instance(id);
    const { byName, ...rest } = more;
    const node = await this.cluster.makeNode({ name, address, ...(byName ? {} : { instanceId: id }), ...rest });
    return { id, node, name };
  }
  /** A member without a node. */
  instance(): string {
    return this.#members.shift() ?? "";
  }

  /** A message in hand for this instance; `seconds` until its hard deadline. */
  work(instance: string, { seconds, notice = "notice-1" }: { seconds?: number; notice?: string } = {}): Work {
    const options = this.ctx.state.config.groups.web;
    if (!options) throw new Error("there is no group web");
    return {
      queue: "detach_evt_sqs",
      queueUrl: "",
      body: "{}",
      receipt: "",
      firstReceivedMs: Date.now(),
      received: 1,
      notice: {
        type: "MaxGroup Detach",
        kind: "interruption",
        id: notice,
        instances: [instance],
        timeMs: Date.now(),
        carried: undefined,
      },
      instance,
      group: "web",
      options,
      deadlineMs: seconds === undefined ? undefined : Date.now() + seconds * 1000,
      oldProtected: false,
      detachSent: true,
      better: undefined,
      drained: false,
      isAdmitted: false,
      launchOut: false,
      leaseSeconds: 15,
      leasedMs: Date.now(),
      rung: 0,
      attempt: 0,
      left: false,
      decrement: true,
      refused: false,
      log: this.ctx.deps.log,
    };
  }
  step(name: string, work: Work): Promise<Result> {
    const step = [...TABLE.interruption_evt_sqs, ...TABLE.detach_evt_sqs].find((s) => s.name === name);
    if (!step) throw new Error(`no step is called ${name}`);
    return step.run(this.ctx, work);
  }
  /** When a timer went off, ms since 1970, that was set for the end of this message's drain: late where all in this process is. */
  async drainEnds({ deadlineMs = 0 }: Work): Promise<number> {
    await Bun.sleep(deadlineMs - 10_000 - Date.now());
    return Date.now();
  }
  said(text: string | RegExp): boolean {
    return this.lines.some((line) => (typeof text === "string" ? line.includes(text) : text.test(line)));
  }
  end(): void {
    this.#stop.abort(new Error("the test is over"));
  }
}

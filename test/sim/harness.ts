import { expect } from "bun:test";
// A scenario's stage: the simulated AWS under virtual time, and one or more daemons, each the real program on
// effects that lead into it. `kill` drops a daemon where it stands: none of its promises goes on.
import * as maxgroup from "../../maxgroup.ts";
import { type Config, type Ctx, type Deps, type Ec2Instance, type Level, type Log, replacedBy } from "../../maxgroup.ts";
import { client } from "../aws/clients.ts";
import { EPOCH_MS, VirtualClock } from "../aws/clock.ts";
import type { Instance } from "../aws/ec2.ts";
import { type CapacitySample, type GroupSpec, type Queues, type Service, World, type WorldOptions } from "../aws/world.ts";

export type Daemon = {
  ctx: Ctx;
  /** As SIGTERM; `running` resolves when the program has ended. */
  sigterm: () => void;
  /** As kill -9: nothing that it had begun goes on. */
  kill: () => void;
  running: Promise<void>;
};

/** What a stage needs of the program: the real one, or a copy with a bug in it. */
export type Program = Pick<typeof maxgroup, "checkGroups" | "makeContext" | "makeLog" | "parseConfig" | "refresh" | "run">;

export type DaemonOptions = {
  /** Sets its clock apart from the world's. */
  skewMs?: number;
  config?: Config;
  level?: Level;
  /** Hears of every await point, a call of the world or of the clock, before it begins: a place to kill at. */
  onAwait?: (input?: object, operation?: string) => void;
};

/** What a configuration says beside its groups; all but the interval for each of the three queues. */
type ConfigOptions = { preaction_snapshot_interval_minutes?: number; wait_time_seconds?: number };

export class Stage {
  readonly clock = new VirtualClock();
  readonly world: World;
  readonly queues: Queues;
  /** What the daemons logged, a line each, with virtual seconds. */
  readonly lines: string[] = [];
  readonly samples: CapacitySample[] = [];
  readonly #startedWith = new Map<string, number>();
  readonly #sizesAtStart = new Map<string, number>();
  readonly #protected = new Set<string>();
  #daemons = 0;
  readonly #program: Program;
  groups: Record<string, object> = {};
  /** Answers what a daemon asks over plain HTTP; by default nobody listens there. */
  http: (url: string, init?: BunFetchRequestInit) => Promise<Response> = async (url) => {
    throw Object.assign(new Error(`nobody listens at ${url}`), { code: "ECONNREFUSED" });
  };

  constructor({ program = maxgroup, ...options }: Partial<WorldOptions> & { program?: Program } = {}) {
    this.#program = program;
    this.world = new World({ clock: this.clock, checkOutputs: true, ...options });
    this.queues = this.world.createQueues();
    this.world.onCapacity((sample) => this.samples.push(sample));
  }

  /** A group of the world that the daemons look after, with these options. Returns its members' IDs. */
  group(spec: GroupSpec, options: object = {}): string[] {
    this.groups[spec.name] = options;
    const { instanceIds } = this.world.createGroup(spec);
    this.#startedWith.set(spec.name, spec.desired);
    this.#sizesAtStart.set(spec.name, instanceIds.length);
    if (spec.protected) this.#protected.add(spec.name);
    for (const id of instanceIds) this.world.instance(id).launchedAtMs -= 3_600_000;
    return instanceIds;
  }

  /** service_config.json. */
  configText({ preaction_snapshot_interval_minutes, ...queueOptions }: ConfigOptions = {}): string {
    const queue = (queue_url: string) => ({ queue_url, ...queueOptions });
    return JSON.stringify({
      global: {
        interruption_evt_sqs: queue(this.queues.interruption),
        detach_evt_sqs: queue(this.queues.detach),
        termination_evt_sqs: queue(this.queues.termination),
        preaction_snapshot_interval_minutes,
      },
      groups: this.groups,
    });
  }
  config(options: ConfigOptions = {}): Config {
    return this.#program.parseConfig(this.configText(options));
  }

  /** Starts a daemon and waits until it has looked at its groups. */
  async start(options: DaemonOptions = {}): Promise<Daemon> {
    const daemon = this.spawn(options);
    await this.until(() => daemon.ctx.state.groups.size > 0, 60);
    return daemon;
  }
  spawn({ skewMs = 0, config = this.config(), level = "debug", onAwait }: DaemonOptions = {}): Daemon {
    const id = ++this.#daemons;
    const stop = new AbortController();
    let dead = false;
    // A killed daemon's calls neither begin nor answer: whatever awaited them waits for ever.
    const never = new Promise<never>(() => undefined);
    const alive = <T>(promise: Promise<T>): Promise<T> =>
      promise.then(
        (value) => (dead ? never : value),
        (error: unknown) => {
          if (dead) return never;
          throw error;
        },
      );
    const wrap = <C extends { send: unknown }>(inner: C): C => {
      const send = (...args: unknown[]) => {
        const command = args[0] as { input: object; constructor: { name: string } };
        if (!dead) onAwait?.(command.input, command.constructor.name.replace(/Command$/, ""));
        return dead ? never : alive((inner.send as (...a: unknown[]) => Promise<unknown>)(...args));
      };
      return { send } as unknown as C;
    };
    const sqs = wrap(client(this.world, "sqs"));
    const random = this.world.random;
    const now = () => this.clock.now() + skewMs;
    const log: Log = this.#program
      .makeLog(
        // A daemon counts from its own start; here all count from the world's.
        (line) =>
          this.lines.push(
            line.replace(/\[\d+\]/, `[${String(Math.floor((this.clock.now() - EPOCH_MS) / 1000)).padStart(4, "0")}]`),
          ),
        () => this.clock.now(),
        true,
        () => level,
      )
      .with(id > 1 ? { daemon: id } : {});
    const deps: Deps = {
      region: this.world.region,
      ec2: wrap(client(this.world, "ec2")),
      autoScaling: wrap(client(this.world, "autoscaling")),
      elb: wrap(client(this.world, "elbv2")),
      s3: wrap(client(this.world, "s3")),
      sqs: () => sqs,
      fetch: (url, init) => {
        if (!dead) onAwait?.();
        return dead ? never : alive(this.http(url, init));
      },
      credentials: async () => ({ accessKeyId: "AKIATEST", secretAccessKey: "secret" }),
      now,
      sleep: (ms, signal) => {
        if (!dead) onAwait?.();
        return dead ? never : alive(this.clock.sleep(ms, signal));
      },
      random: () => random.next(),
      log,
    };
    const ctx = this.#program.makeContext(deps, config, stop.signal);
    const running = (async () => {
      await this.#program.checkGroups(ctx);
      await this.#program.run(ctx);
    })();
    return {
      ctx,
      running,
      sigterm: () => stop.abort(new Error("stop")),
      kill: () => {
        dead = true;
      },
    };
  }

  /** A daemon, and what `begin` brings upon it; it dies at its n-th call from then on, and another one follows. */
  async killAt(n: number, begin: () => void): Promise<void> {
    const daemon = await this.start();
    let calls = 0;
    this.world.intercept = ({ operation }) => {
      if (operation !== "ReceiveMessage" && ++calls === n) daemon.kill();
      return undefined;
    };
    begin();
    await this.until(() => calls >= n || this.isQuiet(), 1_200).catch(() => undefined);
    await this.seconds(2);
    await this.start();
  }

  /** A call by the operator, not by a daemon. */
  async call(service: Service, operation: string, input: object): Promise<object> {
    let answer: object | undefined;
    void this.world.call(service, operation, input).then((a) => {
      answer = a;
    });
    await this.until(() => answer !== undefined, 60);
    return answer ?? {};
  }

  seconds(n: number): Promise<void> {
    return this.clock.advance(n * 1000);
  }
  until(done: () => boolean, seconds: number): Promise<void> {
    return this.clock.runUntil(done, seconds * 1000);
  }

  /** SIGTERM, and the program's own end. */
  async stop(daemon: Daemon): Promise<void> {
    let ended = false;
    void daemon.running.then(() => {
      ended = true;
    });
    daemon.sigterm();
    await this.until(() => ended, 20);
  }

  /** Until nothing is left in the three queues and no raised maximum or unsettled claim remains. */
  async quiet(seconds = 1800): Promise<void> {
    await this.until(() => this.isQuiet(), seconds);
  }
  isQuiet(): boolean {
    const empty = [this.queues.interruption, this.queues.detach, this.queues.termination].every((url) => {
      const { visible, delayed, inFlight } = this.world.queueDepth(url);
      return visible + delayed + inFlight === 0;
    });
    return (
      empty &&
      this.#isStill() &&
      [...this.world.autoscaling.groups.values()].every((g) => !g.tags.has("spotmax:max_size")) &&
      this.openClaims().length === 0
    );
  }
  /** Nothing is on its way into a group or out of it. */
  #isStill(): boolean {
    return [...this.world.autoscaling.groups.values()].every((g) =>
      [...g.members.values()].every((m) => m.state === "InService" || m.state === "Standby"),
    );
  }
  openClaims(): string[] {
    return [...this.world.ec2.instances.values()]
      .filter(
        (i) =>
          (i.state === "pending" || i.state === "running") && i.tags.has("spotmax:replaces") && !i.tags.has("spotmax:attached"),
      )
      .map((i) => i.id);
  }

  /** Events for these are to end in exactly one replacement each; checks all that must hold when all is quiet. */
  check(
    olds: string[],
    sizes: Record<string, [min: number, max: number, desired: number]>,
    { dips = false, launches = olds.length } = {},
  ): void {
    const living = [...this.world.ec2.instances.values()].filter((i) => i.state === "pending" || i.state === "running");
    const all = [...this.world.ec2.instances.values()].filter((i) => i.tags.has("spotmax:replaces"));
    expect(this.isQuiet()).toBe(true);
    expect(this.world.queueDepth(this.queues.deadLetter).visible).toBe(0);
    for (const old of olds) {
      const claims = living.filter((i) => replacedBy(plain(i)) === old);
      expect([old, claims.length]).toEqual([old, dips ? Math.min(1, claims.length) : 1]);
    }
    expect(all.length).toBe(launches);
    for (const i of living) {
      if (i.tags.has("spotmax:replaces")) expect([i.id, "in a group", i.group !== undefined]).toEqual([i.id, "in a group", true]);
      if (i.tags.has("spotmax:detached"))
        expect([i.id, "detached and running outside", i.group === undefined]).toEqual([
          i.id,
          "detached and running outside",
          false,
        ]);
    }
    for (const [name, [min, max, desired]] of Object.entries(sizes)) {
      const group = this.world.autoscaling.groups.get(name);
      expect([name, group?.min, group?.max, group?.desired]).toEqual([name, min, max, desired]);
      expect([name, "members", group?.members.size]).toEqual([name, "members", this.#sizesAtStart.get(name)]);
      if (!dips)
        expect([name, "least in service", this.least(name) >= (this.#startedWith.get(name) ?? 0)]).toEqual([
          name,
          "least in service",
          true,
        ]);
      for (const [id, m] of group?.members ?? []) expect([id, m.protected]).toEqual([id, this.#protected.has(name)]);
    }
  }

  /** The least capacity in service that a group had since the start. */
  least(name: string): number {
    return Math.min(...this.samples.filter((s) => s.group === name).map((s) => s.inService));
  }
}

function plain(i: Instance): Ec2Instance {
  const { id, type, zone, state } = i;
  return {
    id,
    type,
    zone,
    state,
    stateReason: "",
    spot: i.lifecycle === "spot",
    platform: "Linux",
    architecture: "x86_64",
    virtualization: "hvm",
    launchedMs: i.launchedAtMs,
    tags: Object.fromEntries(i.tags),
    volumes: {},
  };
}

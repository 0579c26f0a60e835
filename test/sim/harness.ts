// A scenario's stage: the simulated AWS under virtual time, and one or more daemons, each the real program on
// effects that lead into it. `kill` drops a daemon where it stands: none of its promises goes on.
import { type Config, type Ctx, type Deps, type Level, type Log, checkGroups, makeContext, makeLog, parseConfig, run } from "../../maxgroup.ts";
import { client } from "../aws/clients.ts";
import { VirtualClock } from "../aws/clock.ts";
import { type CapacitySample, type GroupSpec, type Queues, World, type WorldOptions } from "../aws/world.ts";

export type Daemon = {
  ctx: Ctx;
  /** As SIGTERM; resolves when the program has ended. */
  stop: () => Promise<void>;
  /** As kill -9: nothing that it had begun goes on. */
  kill: () => void;
  running: Promise<void>;
};

export class Stage {
  readonly clock = new VirtualClock();
  readonly world: World;
  readonly queues: Queues;
  /** What the daemons logged, a line each, with virtual seconds. */
  readonly lines: string[] = [];
  readonly samples: CapacitySample[] = [];
  #daemons = 0;
  groups: Record<string, object> = {};

  constructor(options: Partial<WorldOptions> = {}) {
    this.world = new World({ clock: this.clock, checkOutputs: true, ...options });
    this.queues = this.world.createQueues();
    this.world.onCapacity((sample) => this.samples.push(sample));
  }

  /** A group of the world that the daemons look after, with these options. Returns its members' IDs. */
  group(spec: GroupSpec, options: object = {}): string[] {
    this.groups[spec.name] = options;
    return this.world.createGroup(spec).instanceIds;
  }

  config(queueOptions: object = {}): Config {
    const queue = (queue_url: string) => ({ queue_url, ...queueOptions });
    return parseConfig(
      JSON.stringify({
        global: {
          interruption_evt_sqs: queue(this.queues.interruption),
          detach_evt_sqs: queue(this.queues.detach),
          termination_evt_sqs: queue(this.queues.termination),
        },
        groups: this.groups,
      }),
    );
  }

  /** Starts a daemon; `skewMs` sets its clock apart from the world's. */
  async start({ skewMs = 0, config = this.config(), level = "debug" as Level } = {}): Promise<Daemon> {
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
      const send = (...args: unknown[]) => (dead ? never : alive((inner.send as (...a: unknown[]) => Promise<unknown>)(...args)));
      return { send } as unknown as C;
    };
    const sqs = wrap(client(this.world, "sqs"));
    const random = this.world.random;
    const now = () => this.clock.now() + skewMs;
    const log: Log = makeLog((line) => this.lines.push(line), () => this.clock.now(), true, () => level).with(id > 1 ? { daemon: id } : {});
    const deps: Deps = {
      ec2: wrap(client(this.world, "ec2")),
      autoScaling: wrap(client(this.world, "autoscaling")),
      elb: wrap(client(this.world, "elbv2")),
      s3: wrap(client(this.world, "s3")),
      sqs: () => sqs,
      now,
      sleep: (ms, signal) => (dead ? never : alive(this.clock.sleep(ms, signal))),
      random: () => random.next(),
      log,
    };
    const ctx = makeContext(deps, config, stop.signal);
    const running = (async () => {
      await checkGroups(ctx);
      await run(ctx);
    })();
    await this.until(() => ctx.state.groups.size > 0, 60);
    return {
      ctx,
      running,
      stop: async () => {
        stop.abort(new Error("stop"));
        await this.clock.runUntil(() => ctx.state.inHand.size === 0, 10_000);
      },
      kill: () => {
        dead = true;
      },
    };
  }

  seconds(n: number): Promise<void> {
    return this.clock.advance(n * 1000);
  }
  until(done: () => boolean, seconds: number): Promise<void> {
    return this.clock.runUntil(done, seconds * 1000);
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
    return empty && [...this.world.autoscaling.groups.values()].every((g) => !g.tags.has("spotmax:max_size")) && this.openClaims().length === 0;
  }
  openClaims(): string[] {
    return [...this.world.ec2.instances.values()]
      .filter((i) => (i.state === "pending" || i.state === "running") && i.tags.has("spotmax:replaces") && !i.tags.has("spotmax:attached"))
      .map((i) => i.id);
  }

  /** The least capacity in service that a group had since the start. */
  least(name: string): number {
    return Math.min(...this.samples.filter((s) => s.group === name).map((s) => s.inService));
  }
}

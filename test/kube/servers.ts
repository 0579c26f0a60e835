// What the helpers that start real servers share, here and in test/consul: child processes that cannot outlive this
// one, ports that stay ours, and certificates of an authority made for the purpose.
import { closeSync, mkdtempSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";

/** Where `make` puts what it fetches and builds. */
export const CACHE = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "max_group");

/**
 * True where every program is there, by path or, without a slash, by name. False, with a warning, where one is
 * missing; in CI that throws.
 */
export function areInstalled(what: string, programs: string[], remedy: string): boolean {
  const missing = programs.filter((program) => Bun.which(program) === null);
  if (missing.length === 0) return true;
  const complaint = `${what}: ${missing.join(", ")} missing (${remedy})`;
  if (process.env.CI) throw new Error(complaint);
  console.warn(`\n*** ${complaint}: its tests are SKIPPED ***\n`);
  return false;
}

/** A folder for keys, sockets and logs. It goes at exit, or earlier by the function beside it. */
export function temporaryFolder(name: string): { folder: string; remove(): void } {
  const folder = mkdtempSync(join(tmpdir(), `max_group-${name}-`));
  const remove = () => rmSync(folder, { recursive: true, force: true });
  process.once("exit", remove);
  return {
    folder,
    remove: () => {
      process.off("exit", remove);
      remove();
    },
  };
}

// --- Processes -------------------------------------------------------------------------------------------------
// A server writes to a file, since nobody reads a pipe while a test waits. It is started through setpriv (util-linux),
// which has the kernel kill it when this process ends, however it does: `bun test` runs no exit handler when killed.

export class ServerProcess {
  readonly #name: string;
  readonly #logFile: string;
  readonly #child: Bun.Subprocess<"ignore", number, number>;

  /** `command` is a program and its arguments; the log goes to FOLDER/NAME.log, after what an earlier one wrote. */
  constructor(name: string, command: string[], { folder, env = {} }: { folder: string; env?: Record<string, string> }) {
    this.#name = name;
    this.#logFile = join(folder, `${name}.log`);
    const log = openSync(this.#logFile, "a");
    try {
      this.#child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", "--", ...command], {
        cwd: folder,
        env: { PATH: process.env.PATH ?? "/usr/bin:/bin", HOME: folder, ...env },
        stdin: "ignore",
        stdout: log,
        stderr: log,
      });
    } finally {
      closeSync(log);
    }
  }

  get pid(): number {
    return this.#child.pid;
  }
  get isAlive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }
  get log(): string {
    return readFileSync(this.#logFile, "utf8");
  }

  /** Waits until `ready` says so. Throws, with the end of the log, when the process ends before or time is up. */
  async waitUntil(ready: () => Promise<boolean>, seconds = 120): Promise<void> {
    for (const end = performance.now() + seconds * 1000; ; await Bun.sleep(20)) {
      if (!this.isAlive) throw new Error(`${this.#name} ended at once:\n${this.log.slice(-2_000)}`);
      if (await ready()) return;
      if (performance.now() > end) throw new Error(`${this.#name} is not ready after ${seconds} s:\n${this.log.slice(-2_000)}`);
    }
  }

  /** Frozen, it neither answers nor refuses: the kernel still takes connections for it. */
  freeze(): void {
    this.#child.kill("SIGSTOP");
    // The signal is on its way: until it has reached every thread, one of them may answer.
    const threads = `/proc/${this.pid}/task`;
    const isStopped = (thread: string) => {
      try {
        return /^State:\s+T/m.test(readFileSync(`${threads}/${thread}/status`, "utf8"));
      } catch {
        return true; // it has ended since it was listed
      }
    };
    while (!readdirSync(threads).every(isStopped)) Bun.sleepSync(1);
  }
  thaw(): void {
    this.#child.kill("SIGCONT");
  }
  /** SIGKILL, which ends a frozen one too: nothing here has state worth saving. */
  async stop(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#child.exited;
  }
}

/** Of this process alone where test files run side by side: none takes the port of another's server that is to come back. */
const FIRST_PORT = 20_000 + 500 * (process.pid % 24);
const givenPorts = new Set<number>();

/**
 * `count` ports that are free on each of the addresses, for TCP, and were never given before. Taken below the range
 * from which the kernel gives ports to outgoing connections, so that a server that was stopped can come back to its
 * own: above, a client that calls a closed loopback port again and again ends up connected to itself.
 */
export async function freePorts(count: number, addresses: string[] = ["127.0.0.1"]): Promise<number[]> {
  const ports: number[] = [];
  for (let tries = 0; ports.length < count && tries < 1_000; tries++) {
    const port = FIRST_PORT + Math.floor(Math.random() * 500);
    if (givenPorts.has(port)) continue;
    givenPorts.add(port); // before the look: another search may be under way
    const free = await Promise.all(addresses.map((address) => canListen(address, port)));
    if (free.every(Boolean)) ports.push(port);
  }
  if (ports.length < count) throw new Error(`no ${count} free ports on ${addresses.join(", ")}`);
  return ports;
}

function canListen(host: string, port: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const server = createServer();
  server.on("error", () => resolve(false)); // taken, or no address of this host
  server.listen({ host, port, exclusive: true }, () => server.close(() => resolve(true)));
  return promise;
}

/** Polls `done` until it is truthy, and answers that; throws when it is not so within `seconds`. */
export async function until<T>(what: string, done: () => Promise<T>, seconds = 20): Promise<NonNullable<T>> {
  for (const end = performance.now() + seconds * 1000; ; await Bun.sleep(25)) {
    const value = await done();
    if (value) return value;
    if (performance.now() > end) throw new Error(`not within ${seconds} s: ${what}`);
  }
}

/**
 * The least of up to three measurements, of which the first below `limitMs` is the last: what the program takes, where
 * the machine may be busy with other things.
 */
export async function leastMs(limitMs: number, measure: () => Promise<number>): Promise<number> {
  let least = Number.POSITIVE_INFINITY;
  for (let tries = 0; tries < 3 && least >= limitMs; tries++) least = Math.min(least, await measure());
  return least;
}

// --- Certificates ----------------------------------------------------------------------------------------------
// By openssl, since node:crypto reads X.509 but does not write it. EC keys, which take no time.

export interface Certificate {
  certFile: string;
  keyFile: string;
}

export class Authority {
  readonly certFile: string;
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
    this.certFile = join(folder, "ca.crt");
    this.#request("ca", "/CN=max_group test CA", ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"], []);
  }

  /** Good for a server at `addresses` or of these names, and for a client; Kubernetes reads a user from `name`, its group from `organization`. */
  issue(
    name: string,
    { organization, addresses = [], names = [] }: { organization?: string; addresses?: string[]; names?: string[] } = {},
  ): Certificate {
    const subject = `${organization === undefined ? "" : `/O=${organization}`}/CN=${name}`;
    const extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth"];
    const alternatives = [...addresses.map((address) => `IP:${address}`), ...names.map((dns) => `DNS:${dns}`)];
    if (alternatives.length > 0) extensions.push(`subjectAltName=${alternatives.join(",")}`);
    const file = name.replace(/[^\w.-]/g, "_");
    return this.#request(file, subject, extensions, ["-CA", this.certFile, "-CAkey", join(this.#folder, "ca.key")]);
  }

  #request(file: string, subject: string, extensions: string[], signer: string[]): Certificate {
    const [certFile, keyFile] = [join(this.#folder, `${file}.crt`), join(this.#folder, `${file}.key`)];
    // A configuration of its own: the system's would add extensions.
    const config = join(this.#folder, "openssl.cnf");
    writeFileSync(config, "[req]\ndistinguished_name = dn\n[dn]\n");
    const { exitCode, stderr } = Bun.spawnSync([
      ...["openssl", "req", "-config", config, "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"],
      ...["-days", "2", "-subj", subject, "-out", certFile, "-keyout", keyFile, ...signer],
      ...extensions.flatMap((extension) => ["-addext", extension]),
    ]);
    if (exitCode !== 0) throw new Error(`making a certificate for ${subject}: ${stderr.toString()}`);
    return { certFile, keyFile };
  }
}

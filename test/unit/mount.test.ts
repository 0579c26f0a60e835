// conf/mount_persistence.sh, run for real against a stand-in metadata service: with real loop devices, ext4 and mount
// where this machine has them (root, in a mount namespace of its own), and always with stand-ins for the commands.
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

setDefaultTimeout(60_000);

const SCRIPT = join(import.meta.dir, "../../conf/mount_persistence.sh");
const VOLUME = "vol-0123456789abcdef0";
const BY_ID = "disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0";
const MOVED = { "spotmax:group": "db", "spotmax:replaces": "i-1", "spotmax:volume": VOLUME };
const WAITING = { "spotmax:group": "db", "spotmax:replaces": "i-1" };
const FIRST = { "aws:autoscaling:groupName": "db" };

/** Runs a command that must work; gives what it printed. */
function must(...command: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(command);
  if (exitCode !== 0) throw new Error(`${command.join(" ")}: ${stderr.toString().trim()}`);
  return stdout.toString().trim();
}

/** What stands in for the commands that a fake disk needs: a file whose first word is its type, its second its owner. */
const STAND_INS: Record<string, string> = {
  id: `echo 0`,
  lsblk: `:`,
  fuser: `printf '  USER PID\\n%s: someone 1234\\n' "$2" >&2`,
  blkid: `for device; do :; done
    read -r type _ <"$device" && [ "$type" != empty ] && echo "$type"`,
  mount: `for dir; do device=\${last:-}; last=$dir; done
    echo "mount $*" >>"$CALLS"
    read -r type whose <"$device"
    [ "$type" != empty ] || { echo "wrong fs type" >&2; exit 32; }
    echo "$device $dir $type rw 0 0" >>"$MOUNTS"
    echo "$whose" >"$dir/whose"`,
  umount: `for dir; do :; done
    echo "umount $*" >>"$CALLS"
    for cwd in /proc/[0-9]*/cwd; do
      [ "$(readlink "$cwd")" != "$dir" ] || { echo "target is busy" >&2; exit 32; }
    done
    awk -v dir="$dir" '{ line[NR] = $0; if ($2 == dir) last = NR } END { for (i = 1; i <= NR; i++) if (i != last) print line[i] }' \\
      "$MOUNTS" >"$MOUNTS.new" && cat "$MOUNTS.new" >"$MOUNTS"
    rm -f "$dir/whose"
    below=$(awk -v dir="$dir" '$2 == dir { d = $1 } END { print d }' "$MOUNTS")
    [ -z "$below" ] || { read -r _ whose <"$below"; echo "$whose" >"$dir/whose"; }`,
};
/** With both kinds of disks: the log, and AWS. */
const ALWAYS: Record<string, string> = {
  logger: `shift 3; echo "$*" >>"$SYSLOG"`,
  aws: `echo "aws $*" >>"$CALLS"
    [ -e "$AWS_ANSWER" ] || { echo "An error occurred (UnauthorizedOperation)" >&2; exit 254; }
    cat "$AWS_ANSWER"`,
};

interface Disk {
  whole: string;
  partition?: string;
}
interface Kind {
  name: string;
  prefix: string[];
  standIns: Record<string, string>;
  /** A disk with a file in it that says whose it is; `empty`: without a filesystem. */
  disk(folder: string, whose: string, shape: "whole" | "partitioned" | "empty"): Disk;
  drop(): void;
}

let disks = 0;
const fake: Kind = {
  name: "stand-ins",
  prefix: [],
  standIns: STAND_INS,
  disk(folder, whose, shape) {
    const whole = join(folder, `disk${++disks}`);
    writeFileSync(whole, shape === "whole" ? `ext4 ${whose}\n` : `empty ${whose}\n`);
    if (shape !== "partitioned") return { whole };
    writeFileSync(`${whole}p1`, `ext4 ${whose}\n`);
    return { whole, partition: `${whole}p1` };
  },
  drop: () => undefined,
};

// Taken down while it is open, a loop device goes with the last who uses it: none is left behind, however a test ends.
const loops: number[] = [];
const loop = (...args: string[]) => {
  const device = must("losetup", "-f", "--show", ...args);
  loops.push(openSync(device, "r"));
  must("losetup", "-d", device);
  return device;
};
const MIB = 1024 * 1024;
const real: Kind = {
  name: "loop devices and ext4",
  // The mounts go with the last process in it.
  prefix: ["unshare", "-m", "--propagation", "private"],
  standIns: {},
  disk(folder, whose, shape) {
    const image = join(folder, `disk${++disks}`);
    const content = join(folder, `content${disks}`);
    mkdirSync(content);
    writeFileSync(join(content, "whose"), `${whose}\n`);
    const filesystem = `${image}.ext4`;
    writeFileSync(filesystem, "");
    must("truncate", "-s", "8M", filesystem);
    if (shape !== "empty") must("mkfs.ext4", "-q", "-d", content, filesystem);
    if (shape !== "partitioned") return { whole: loop(filesystem) };
    // A partition table with one partition, at 1 MiB. The kernel may be without a device for it: a loop of its own is.
    const bytes = Buffer.alloc(9 * MIB);
    bytes.writeUInt8(0x83, 446 + 4);
    bytes.writeUInt32LE(MIB / 512, 446 + 8);
    bytes.writeUInt32LE((8 * MIB) / 512, 446 + 12);
    bytes.writeUInt16LE(0xaa55, 510);
    readFileSync(filesystem).copy(bytes, MIB);
    writeFileSync(image, bytes);
    return { whole: loop(image), partition: loop("-o", String(MIB), "--sizelimit", String(8 * MIB), image) };
  },
  drop() {
    for (const descriptor of loops.splice(0)) closeSync(descriptor);
  },
};

/** Why real disks cannot be had here. */
function withoutDisks(): string | undefined {
  const folder = mkdtempSync(join(tmpdir(), "mount-"));
  try {
    if (process.getuid?.() !== 0) return "not root";
    const { whole } = real.disk(folder, "anyone", "whole");
    must(...real.prefix, "sh", "-c", `mount ${whole} ${folder} && cat ${folder}/whose`);
    return undefined;
  } catch (error) {
    return String(error);
  } finally {
    real.drop();
    rmSync(folder, { recursive: true, force: true });
  }
}
const reason = withoutDisks();
console.warn(
  reason === undefined
    ? "mount.test.ts: with real loop devices, ext4 and mount, and once more with stand-ins"
    : `mount.test.ts: WITH STAND-INS ONLY, no real disk is mounted here: ${reason}`,
);

/** An instance: its metadata, its disks, and the script on it. */
class Guest {
  readonly folder = mkdtempSync(join(tmpdir(), "mount-"));
  readonly dev = join(this.folder, "dev");
  readonly target = join(this.folder, "data");
  /** Undefined: not allowed in the metadata. */
  tags: Record<string, string> | undefined = {};
  hasTokens = true;
  /** How often a token was asked for: once or more a look. */
  looks = 0;
  untokened = 0;
  readonly #metadata = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: (request) => this.#answer(request) });

  constructor(readonly kind: Kind) {
    mkdirSync(join(this.dev, "disk/by-id"), { recursive: true });
    mkdirSync(join(this.dev, "disk/by-label"));
    mkdirSync(this.target);
    mkdirSync(join(this.folder, "bin"));
    writeFileSync(join(this.folder, "mounts"), "/dev/root / ext4 rw 0 0\n");
    for (const [name, body] of Object.entries({ ...ALWAYS, ...kind.standIns })) this.command(name, body);
  }
  command(name: string, body: string) {
    const path = join(this.folder, "bin", name);
    writeFileSync(path, `#!/bin/sh\n${body}\n`);
    chmodSync(path, 0o755);
  }
  #answer(request: Request): Response {
    const path = new URL(request.url).pathname;
    const none = new Response("", { status: 404 });
    if (path === "/latest/api/token") {
      this.looks++;
      if (!this.hasTokens || request.method !== "PUT") return none;
      if (!request.headers.get("x-aws-ec2-metadata-token-ttl-seconds")) return new Response("", { status: 400 });
      return new Response("a-token");
    }
    if (request.headers.get("x-aws-ec2-metadata-token") !== "a-token") {
      this.untokened++;
      return new Response("", { status: 401 });
    }
    if (path === "/latest/meta-data/placement/region") return new Response("us-east-2");
    if (path === "/latest/meta-data/instance-id") return new Response("i-0abc");
    const [, key] = /^\/latest\/meta-data\/tags\/instance\/(.*)$/.exec(path) ?? [];
    if (key === undefined || !this.tags) return none;
    if (key === "") return new Response(Object.keys(this.tags).join("\n"));
    const value = this.tags[decodeURIComponent(key)];
    return value === undefined ? none : new Response(value);
  }

  disk(whose: string, shape: "whole" | "partitioned" | "empty" = "whole"): Disk {
    return this.kind.disk(this.folder, whose, shape);
  }
  /** A disk shows in the device tree. */
  attach(name: string, disk: Disk) {
    symlinkSync(disk.whole, join(this.dev, name));
    if (disk.partition) symlinkSync(disk.partition, join(this.dev, name.startsWith("disk/") ? `${name}-part1` : `${name}1`));
  }
  read(name: string): string {
    const path = join(this.folder, name);
    return existsSync(path) ? readFileSync(path, "utf8") : "";
  }

  /**
   * The script's end, and what is at TARGET_DIR then. `before` is mounted there first, and a shell works in it where
   * `isBusy`, until `free` (its sleeps come and go). `scripts` is a shell command with the script as $SCRIPT.
   */
  async run(env: Record<string, string> = {}, given: { before?: Disk; isBusy?: boolean; scripts?: string } = {}) {
    const { before, isBusy, scripts = '"$SCRIPT"' } = given;
    const [inside, free] = ["inside", "free"].map((name) => join(this.folder, name));
    const outside = `
      ${before ? `mount ${before.partition ?? before.whole} "$TARGET_DIR" || exit 99` : ""}
      ${isBusy ? `(cd "$TARGET_DIR" && : >${inside} && until [ -e ${free} ] || [ ! -e ${inside} ]; do sleep 0.1; done) >/dev/null 2>&1 &` : ""}
      ${isBusy ? `until [ -e ${inside} ]; do sleep 0.05; done` : ""}
      : >"$CALLS"
      ${scripts}
      code=$?
      echo "$code $(awk -v dir="$TARGET_DIR" '$2 == dir' "\${MOUNTS:-/proc/self/mounts}" | grep -c .) $(cat "$TARGET_DIR/whose" 2>/dev/null)"
      : >${free}`;
    const child = Bun.spawn([...this.kind.prefix, "sh", "-c", outside], {
      env: {
        PATH: `${join(this.folder, "bin")}:${process.env.PATH ?? ""}`,
        SCRIPT,
        TARGET_DIR: this.target,
        DEV_ROOT: this.dev,
        LOCK: join(this.folder, "lock"),
        IMDS_URL: this.#metadata.url.origin,
        POLL_SECONDS: "0.1",
        WAIT_SECONDS: "50",
        BUSY_SECONDS: "50",
        CALLS: join(this.folder, "calls"),
        SYSLOG: join(this.folder, "syslog"),
        AWS_ANSWER: join(this.folder, "aws-answer"),
        ...(this.kind === fake && { MOUNTS: join(this.folder, "mounts") }),
        http_proxy: "http://127.0.0.1:9", // the metadata service is never asked through a proxy
        ...env,
      },
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    const [stdout, stderr] = await Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
    await child.exited;
    const [code, mounts, whose = ""] = stdout.trim().split("\n").at(-1)?.split(" ") ?? [];
    return { code: Number(code), mounts: Number(mounts), whose, stderr };
  }
  /** Whoever works in TARGET_DIR leaves. */
  free() {
    writeFileSync(join(this.folder, "free"), "");
  }
  async until(done: () => boolean) {
    for (let left = 2_000; !done(); left--) {
      if (left === 0) throw new Error(`never: ${done}\n${this.read("syslog")}`);
      await Bun.sleep(20);
    }
  }
  async end() {
    await this.#metadata.stop(true);
    this.kind.drop();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

const guests: Guest[] = [];
afterEach(async () => {
  for (const guest of guests.splice(0)) await guest.end();
});
const guestOf = (kind: Kind, tags: Record<string, string> | undefined) => {
  const guest = new Guest(kind);
  guest.tags = tags;
  guests.push(guest);
  return guest;
};

describe.each(reason === undefined ? [real, fake] : [fake])("with $name", (kind) => {
  const start = (tags: Record<string, string> | undefined) => guestOf(kind, tags);

  test.each([
    ["as Xen names it", "xvdz", "whole"],
    ["in the first partition on Xen", "xvdz", "partitioned"],
    ["as it was attached, where udev says so", "sdz", "whole"],
    ["by its ID on Nitro", BY_ID, "whole"],
    ["in the first partition on Nitro", BY_ID, "partitioned"],
  ] as const)("the data is found %s", async (_, name, shape) => {
    const guest = start(MOVED);
    guest.attach(name, guest.disk("data", shape));
    const { code, whose, mounts, stderr } = await guest.run();
    expect([code, whose, mounts, stderr]).toEqual([0, "data", 1, expect.stringContaining(`mounted the data volume ${VOLUME}`)]);
    expect(guest.read("syslog")).toContain(`mounted the data volume ${VOLUME}`);
    expect(guest.untokened).toBe(0);
  });

  test("the data takes the place of the empty disk", async () => {
    const guest = start(MOVED);
    const own = guest.disk("own");
    guest.attach("sdf", own);
    guest.attach("xvdz", guest.disk("data"));
    const { code, whose, mounts, stderr } = await guest.run({}, { before: own });
    expect([code, whose, mounts]).toEqual([0, "data", 1]);
    expect(stderr).toContain(`unmounted ${own.whole} from ${guest.target}`);
  });

  test("another volume than the one in the tag is left alone", async () => {
    const guest = start({ ...MOVED, "spotmax:volume": "vol-0ffffffffffffffff" });
    guest.attach(BY_ID, guest.disk("data"));
    const { code, mounts, stderr } = await guest.run({ WAIT_SECONDS: "1" });
    expect([code, mounts, stderr]).toEqual([1, 0, expect.stringContaining("gave up after 1 s: waiting for the data volume")]);
  });

  test("data that comes after a while is waited for, and meanwhile the empty disk is not mounted", async () => {
    const guest = start(WAITING);
    guest.attach("sdf", guest.disk("own"));
    const data = guest.disk("data");
    const running = guest.run();
    await guest.until(() => guest.read("syslog").includes("waiting for the data volume"));
    guest.attach(BY_ID, data);
    const { looks } = guest;
    await guest.until(() => guest.looks > looks + 4); // which find a disk whose ID nobody told
    guest.tags = MOVED;
    const { code, whose, stderr } = await running;
    expect([code, whose]).toEqual([0, "data"]);
    expect(stderr.match(/waiting for the data volume/g)).toHaveLength(1);
  });

  test("mounted already: nothing is done, however often", async () => {
    const guest = start(MOVED);
    const data = guest.disk("data", "partitioned");
    guest.attach(BY_ID, data);
    const env = { ON_MOUNTED: `echo hook >>"${guest.folder}/hooks"` };
    const { code, whose, mounts, stderr } = await guest.run(env, { before: data, scripts: '"$SCRIPT" && "$SCRIPT"' });
    expect([code, whose, mounts]).toEqual([0, "data", 1]);
    expect(stderr.match(/is mounted at .* already/g)).toHaveLength(2);
    expect([guest.read("calls"), guest.read("hooks")]).toEqual(["", ""]);
  });

  test("two at once mount it once, and the hook runs once", async () => {
    const guest = start(MOVED);
    const own = guest.disk("own");
    guest.attach("xvdz", guest.disk("data"));
    const env = { ON_MOUNTED: `echo "hook $(cat "${guest.target}/whose")" >>"${guest.folder}/hooks"` };
    const scripts = '"$SCRIPT" & first=$!; "$SCRIPT" && wait "$first"';
    const { code, whose, mounts } = await guest.run(env, { before: own, scripts });
    expect([code, whose, mounts, guest.read("hooks")]).toEqual([0, "data", 1, "hook data\n"]);
  });

  test("what the hook leaves running holds nothing up, and a hook that fails is an error", async () => {
    const guest = start(MOVED);
    guest.attach("xvdz", guest.disk("data"));
    const scripts = `ON_MOUNTED='sleep 300 >/dev/null 2>&1 & echo $! >"${guest.folder}/pid"' "$SCRIPT" && timeout 25 "$SCRIPT"
      code=$?; kill "$(cat "${guest.folder}/pid")"; (exit $code)`;
    const first = await guest.run({}, { scripts });
    expect([first.code, first.stderr]).toEqual([0, expect.stringContaining("is mounted at")]);
    const other = start(MOVED);
    other.attach("xvdz", other.disk("data"));
    const { code, whose, stderr } = await other.run({ ON_MOUNTED: "exit 7" });
    expect([code, whose, stderr]).toEqual([1, "data", expect.stringContaining("failed with 7: exit 7")]);
  });

  describe("where nothing was moved", () => {
    test.each([
      ["by its name", "sdf", "/dev/sdf", "whole"],
      ["by its name on Xen", "xvdf", "/dev/sdf", "partitioned"],
      ["by any other path", "disk/by-label/data", "/dev/disk/by-label/data", "whole"],
    ] as const)("the own disk is the data, found %s", async (_, name, device, shape) => {
      const guest = start(FIRST);
      guest.attach(name, guest.disk("own", shape));
      const { code, whose, stderr } = await guest.run({ PERSISTENCE_DEV: device });
      expect([code, whose, stderr]).toEqual([0, "own", expect.stringContaining("mounted its own disk")]);
    });

    test("what is mounted stays", async () => {
      const guest = start(FIRST);
      const own = guest.disk("own");
      guest.attach("sdf", guest.disk("other"));
      const { code, whose, mounts, stderr } = await guest.run({}, { before: own });
      expect([code, whose, mounts]).toEqual([0, "own", 1]);
      expect(stderr).toContain("nothing was moved to this instance");
      expect(guest.read("calls")).toBe("");
    });

    test("and there is no own disk, or an unformatted one, or none is wanted: nothing is mounted, and that is said", async () => {
      for (const [shape, device, said] of [
        [undefined, "/dev/sdf", "it has no /dev/sdf: nothing mounted"],
        ["empty", "/dev/sdf", "holds no filesystem: nothing mounted"],
        ["whole", "", "nothing was moved to this instance\n"],
      ] as const) {
        const guest = start(FIRST);
        if (shape) guest.attach("sdf", guest.disk("own", shape));
        const { code, mounts, stderr } = await guest.run({ PERSISTENCE_DEV: device });
        expect([code, mounts, stderr]).toEqual([0, 0, expect.stringContaining(said)]);
      }
    });

    test("a disk that somebody attached as /dev/sdz by hand is the data", async () => {
      const guest = start(FIRST);
      guest.attach("sdf", guest.disk("own"));
      guest.attach("xvdz", guest.disk("data"));
      const { code, whose } = await guest.run();
      expect([code, whose]).toEqual([0, "data"]);
    });

    test("is not believed as long as no tag shows at all", async () => {
      const guest = start({});
      guest.attach("sdf", guest.disk("own"));
      const { code, mounts, stderr } = await guest.run({ WAIT_SECONDS: "1" });
      expect([code, mounts, stderr]).toEqual([1, 0, expect.stringContaining("no tags yet")]);
      const later = await guest.run({ UNTAGGED_SECONDS: "1" });
      expect([later.code, later.whose]).toEqual([0, "own"]);
    });
  });

  test("a busy target is waited for, and nobody is stopped", async () => {
    const guest = start(MOVED);
    const own = guest.disk("own");
    guest.attach("xvdz", guest.disk("data"));
    const running = guest.run({}, { before: own, isBusy: true });
    await guest.until(() => guest.read("syslog").includes("cannot unmount"));
    guest.free();
    const { code, whose, mounts, stderr } = await running;
    expect([code, whose, mounts]).toEqual([0, "data", 1]);
    expect(stderr).toMatch(/cannot unmount .* from .*: .*busy.*, used by: /);
  });

  test("a target that stays busy is an error that says by whom, and stays as it is", async () => {
    const guest = start(MOVED);
    const own = guest.disk("own");
    guest.attach("xvdz", guest.disk("data"));
    const { code, whose, mounts, stderr } = await guest.run({ BUSY_SECONDS: "1" }, { before: own, isBusy: true });
    expect([code, whose, mounts]).toEqual([1, "own", 1]);
    expect(stderr).toContain("could not be mounted");
    if (kind === fake || Bun.which("fuser")) expect(stderr).toMatch(kind === fake ? /used by: .*1234/ : /used by: .* sh;/);
  });

  test("data that never comes is an error, and what was mounted stays", async () => {
    const guest = start(WAITING);
    const own = guest.disk("own");
    const { code, whose, stderr } = await guest.run({ WAIT_SECONDS: "1" }, { before: own });
    expect([code, whose]).toEqual([1, "own"]);
    expect(stderr).toContain("error: gave up after 1 s: waiting for the data volume of group db");
    expect(guest.read("syslog")).toContain("error: gave up after 1 s");
  });

  test("a disk without a filesystem is an error, and never formatted", async () => {
    const guest = start(MOVED);
    const data = guest.disk("data", "empty");
    guest.attach(BY_ID, data);
    const before = Bun.hash(readFileSync(data.whole));
    const { code, mounts, stderr } = await guest.run({ WAIT_SECONDS: "1" });
    expect([code, mounts, stderr]).toEqual([1, 0, expect.stringContaining("holds a filesystem")]);
    expect(Bun.hash(readFileSync(data.whole))).toBe(before);
    expect(readFileSync(SCRIPT, "utf8")).not.toMatch(/^[^#]*\b(mkfs|mke2fs|kill|fuser -k|umount -[lf])/m);
  });

  describe("where the metadata shows no tags", () => {
    const answer = (guest: Guest, tags: Record<string, string>, name = "aws-answer") =>
      writeFileSync(
        join(guest.folder, name),
        Object.entries(tags)
          .map((tag) => `${tag.join("\t")}\n`)
          .join(""),
      );

    test("AWS is asked, and no more often than said", async () => {
      const guest = start(undefined);
      guest.attach(BY_ID, guest.disk("data"));
      answer(guest, WAITING);
      guest.command(
        "aws",
        `echo "aws $*" >>"$CALLS"; date +%s%3N >>"${guest.folder}/times"; cat "$AWS_ANSWER"; cp "$AWS_ANSWER.next" "$AWS_ANSWER"`,
      );
      answer(guest, MOVED, "aws-answer.next");
      const { code, whose } = await guest.run({ TAG_SECONDS: "5" });
      expect([code, whose]).toEqual([0, "data"]);
      const calls = guest.read("calls").match(/^aws .*/gm) ?? [];
      expect(calls).toHaveLength(2);
      expect(calls[0]).toContain("ec2 describe-tags --region us-east-2 --filters Name=resource-id,Values=i-0abc");
      const [firstMs = 0, secondMs = 0] = guest.read("times").trim().split("\n").map(Number);
      expect(secondMs - firstMs).toBeGreaterThan(2_000); // by a clock of whole seconds
    });

    test("and AWS refuses: that is an error, and not taken for no tag", async () => {
      const guest = start(undefined);
      guest.attach("sdf", guest.disk("own"));
      const { code, mounts, stderr } = await guest.run({ WAIT_SECONDS: "2", UNTAGGED_SECONDS: "0" });
      expect([code, mounts, stderr]).toEqual([1, 0, expect.stringContaining("UnauthorizedOperation")]);
    });

    test("and AWS knows no tag of ours: the own disk is the data", async () => {
      const guest = start(undefined);
      answer(guest, FIRST);
      guest.attach("sdf", guest.disk("own"));
      const { code, whose } = await guest.run();
      expect([code, whose]).toEqual([0, "own"]);
    });
  });

  test("a metadata service without IMDSv2 is not read", async () => {
    const guest = start(FIRST);
    guest.hasTokens = false;
    guest.attach("sdf", guest.disk("own"));
    const { code, mounts, stderr } = await guest.run({ WAIT_SECONDS: "1" });
    expect([code, mounts, guest.untokened]).toEqual([1, 0, 0]);
    expect(stderr).toContain("no IMDSv2 token");
  });
});

describe("the script", () => {
  test("is not for anybody but root, nor for a target that cannot be meant", async () => {
    const guest = guestOf(fake, MOVED);
    for (const [env, said] of [
      [{ TARGET_DIR: "/" }, "must be a folder of its own"],
      [{ TARGET_DIR: "/no such folder" }, "must be a folder of its own"],
      [{ TARGET_DIR: "data" }, "must be an absolute path"],
      [{ WAIT_SECONDS: "soon" }, "must be a whole number, not soon"],
    ] as const)
      expect(await guest.run(env)).toMatchObject({ code: 1, stderr: expect.stringContaining(said) });
    guest.command("id", "echo 1000");
    expect(await guest.run()).toMatchObject({ code: 1, stderr: expect.stringContaining("must be run as root") });
  });

  test("mounts XFS beside a disk of the same UUID, which comes from the same snapshot", async () => {
    const guest = guestOf(fake, MOVED);
    const data = guest.disk("data");
    writeFileSync(data.whole, "xfs data\n");
    guest.attach("xvdz", data);
    await guest.run({ MOUNT_OPTIONS: "noatime" });
    expect(guest.read("calls")).toBe(`mount -o noatime,nouuid ${data.whole} ${guest.target}\n`);
  });

  // The search for curl goes through the whole PATH, so that it is hidden here by another name.
  if (Bun.which("wget"))
    test("does with wget where there is no curl", async () => {
      const guest = guestOf(fake, MOVED);
      guest.attach(BY_ID, guest.disk("data"));
      const script = join(guest.folder, "with-wget.sh");
      writeFileSync(script, readFileSync(SCRIPT, "utf8").replace("command -v curl", "command -v no-curl"), { mode: 0o755 });
      const { code, whose } = await guest.run({ SCRIPT: script });
      expect([code, whose, guest.untokened]).toEqual([0, "data", 0]);
    });

  test("is in the zip's folder, executable", () => {
    expect(must("ls", "-l", dirname(SCRIPT))).toMatch(/-rwxr-xr-x.* mount_persistence\.sh$/m);
  });
});

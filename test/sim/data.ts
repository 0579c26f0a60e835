// The truth about the data volumes of a life, for invariant 5: where each byte is, and that nobody loses it.
//
// What counts as data is what was written. Each member of a group with `persistence_dev` begins with a content of its
// own; each notice and the very end of an instance write once more onto whatever carries its data then. So a volume
// that is a moment too old, a snapshot made before the end, and a volume of another instance all differ. An instance,
// all that was launched in its place and in the place of that are one line, named by its first instance; what the
// template makes for a replacement is empty, and no data as long as the line's data is anywhere.
import type {
  AttachVolumeRequest,
  CreateSnapshotRequest,
  CreateTagsRequest,
  CreateVolumeRequest,
  ModifyInstanceAttributeRequest,
} from "@aws-sdk/client-ec2";
import type { Volume } from "../aws/ebs.ts";
import type { World } from "../aws/world.ts";

export const DATA_DEVICE = "/dev/sdz";

/** What the watch knows of the rest of the world. */
export interface Surroundings {
  world: World;
  find: (text: string) => void;
  /** For whom an instance was launched by a daemon; undefined: by nobody of ours. */
  oldOf: (instance: string) => string | undefined;
  claims: () => Iterable<string>;
  /** Who acts at this moment. */
  actor: () => "daemon" | "operator" | "world";
  lagMs: number;
}

/** What became of the data volumes: every one is counted in one place. */
export interface Account {
  /** On the instance that it was on from the start. */
  home: number;
  moved: number;
  /** On the replacement, by way of a snapshot. */
  copied: number;
  /** Available, tagged and reported. */
  left: number;
  /** Gone with an instance that had no notice, or none in time. */
  excused: number;
}

interface HardNotice {
  atMs: number;
  /** It reached the queue within half a minute, and nothing stood against acting on it. */
  inTime: boolean;
}

const REACH_MS = 30_000;

export class DataWatch {
  readonly #around: Surroundings;
  /** How long an instance with a notice may still have a volume that goes with it, once the notice is in the queue. */
  patienceMs = 20_000;
  /** Which device is the data's, by instance. */
  readonly #deviceOf = new Map<string, string>();
  readonly #deviceOfGroup = new Map<string, string>();
  /** The line that a volume or snapshot with data belongs to. */
  readonly #lineOf = new Map<string, string>();
  /** All that was written in a line, in order; empty once its data is gone. */
  readonly #written = new Map<string, string[]>();
  readonly #notices = new Map<string, HardNotice>();
  /** When it was kept, or made or attached by a daemon. */
  readonly #kept = new Map<string, number>();
  readonly #copies = new Map<string, string>();
  readonly #endedByUs = new Set<string>();
  readonly #takenOut = new Set<string>();
  /** Their guests write no more. */
  readonly #ended = new Set<string>();
  readonly #endMs = new Map<string, number>();
  readonly #deafMs: number[] = [];
  #excused = 0;
  #writes = 0;

  constructor(around: Surroundings) {
    this.#around = around;
  }

  get isUsed(): boolean {
    return this.#deviceOfGroup.size > 0;
  }

  /** A group whose members' data is at this device. */
  enrol(group: string, device: string, members: Iterable<string>): void {
    this.#deviceOfGroup.set(group, device);
    for (const id of members) {
      this.#begin(id, device);
      for (const { tags } of this.#ebs.attachedTo(id, device)) tags.set("owner", "billing");
    }
  }
  /** No batches in such a group: says whether this is one. */
  keepsData(group: string | undefined): boolean {
    return this.#deviceOfGroup.has(group ?? "");
  }
  launched(claim: string, group: string | undefined): void {
    const device = this.#deviceOfGroup.get(group ?? "");
    if (device) this.#deviceOf.set(claim, device);
  }
  noticed(id: string, isHard: boolean, inTime: boolean): void {
    if (!this.#deviceOf.has(id)) return;
    if (isHard && !this.#notices.has(id)) this.#notices.set(id, { atMs: this.#now(), inTime });
    this.#write(id, "noticed");
  }
  /** A daemon has ended, or an answer with messages is lost: these come again only when their lease is over. */
  nobodyListens(): void {
    this.#deafMs.push(this.#now());
  }

  #begin(id: string, device: string): void {
    this.#deviceOf.set(id, device);
    this.#write(id, "begun");
  }
  #now(): number {
    return this.#around.world.now();
  }
  get #ebs() {
    return this.#around.world.ec2.ebs;
  }
  #line(id: string): string {
    let first = id;
    for (let old = this.#around.oldOf(id); old; old = this.#around.oldOf(old)) first = old;
    return first;
  }
  #stateOf(id: string) {
    return this.#around.world.ec2.instances.get(id)?.state;
  }
  #isLiving(id: string): boolean {
    const state = this.#stateOf(id);
    return state === "pending" || state === "running";
  }
  /** One that the operator took out, and that AWS then stopped, is nobody's to end. */
  #isStopped(id: string): boolean {
    const instance = this.#around.world.ec2.instances.get(id);
    return instance?.state === "stopped" && !instance.tags.has("spotmax:detached");
  }
  /** AWS forgets an instance an hour after its end, and with it who came after whom: the data is left, and reported. */
  #isForgotten(id: string): boolean {
    const old = this.#around.oldOf(id);
    if (old === undefined || this.#around.oldOf(old) === undefined) return false;
    return (this.#endMs.get(old) ?? this.#now()) < this.#now() - 60 * 60_000 || this.#isForgotten(old);
  }
  #volumes(line: string): Volume[] {
    return [...this.#lineOf].flatMap(([id, own]) => {
      const volume = own === line ? this.#ebs.volumes.get(id) : undefined;
      return volume && volume.goneAtMs === undefined ? [volume] : [];
    });
  }
  #isComplete({ id, content }: Volume): boolean {
    const written = this.#written.get(this.#lineOf.get(id) ?? "") ?? [];
    return written.length > 0 && written.every((text, n) => content.writes[n] === text);
  }
  /** Where all of a line's data is. */
  #carriers(line: string): Volume[] {
    return this.#volumes(line).filter((volume) => this.#isComplete(volume));
  }
  /** The volume that an instance's guest writes to. */
  #carried(id: string): Volume | undefined {
    const moved = this.#ebs.attachedTo(id, DATA_DEVICE).find((volume) => this.#lineOf.has(volume.id));
    if (moved) return moved;
    const [own] = this.#ebs.attachedTo(id, this.#deviceOf.get(id));
    const line = this.#line(id);
    return own && (line === id || this.#carriers(line).length === 0) ? own : undefined;
  }
  #write(id: string, what: string): void {
    const volume = this.#carried(id);
    if (!volume) return;
    const line = this.#line(id);
    const isOn = this.#lineOf.get(volume.id) === line && this.#isComplete(volume);
    const text = `${id} ${what} ${++this.#writes}`;
    this.#written.set(line, [...(isOn ? (this.#written.get(line) ?? []) : volume.content.writes), text]);
    this.#lineOf.set(volume.id, line);
    this.#ebs.write(volume.id, text);
  }

  // --- What happens ----------------------------------------------------------------------------------------------

  see(what: string, ids: string[], group: string | undefined): void {
    if (!this.isUsed) return;
    const [id = "", owner] = ids;
    const device = this.#deviceOfGroup.get(group ?? "");
    if (what === "group launch" && device) this.#begin(id, device);
    const isEnd = what === "shutting-down" || what === "stopping" || what === "terminated";
    if (isEnd && !this.#endMs.has(id)) this.#endMs.set(id, this.#now());
    if ((isEnd || what === "terminating") && this.#around.actor() === "daemon") this.#endedByUs.add(id);
    // What the operator takes out before anybody could act is his own.
    if ((what === "detach" || what === "terminating" || what === "standby") && this.#around.actor() === "operator") {
      this.#notices.delete(id);
      if (what === "detach") this.#takenOut.add(id);
    }
    // To the very end its guest writes, and a stopped one writes no more.
    if ((what === "terminated" || what === "stopped") && !this.#ended.has(id)) {
      if (this.#lineOf.has(this.#carried(id)?.id ?? "")) this.#write(id, "ended");
      this.#ended.add(id);
    }
    if (what === "volume delete") this.#deleted(id, owner);
  }

  #deleted(volumeId: string, owner: string | undefined): void {
    const volume = this.#ebs.volumes.get(volumeId);
    const line = this.#lineOf.get(volumeId);
    if (!volume || !line) return;
    const isLast = this.#carriers(line).every(({ id }) => id === volumeId);
    this.#lineOf.delete(volumeId);
    const fault = this.#faultOf(volumeId, owner);
    if (fault) this.#around.find(`${volumeId} with the data of ${line} is lost: ${fault}`);
    else this.#excused++;
    if (isLast) this.#written.set(line, []);
  }
  /** Whose fault it is that a volume went; undefined: nobody's. */
  #faultOf(volumeId: string, owner: string | undefined): string | undefined {
    if (owner === undefined) return "it was deleted";
    if (this.#kept.has(volumeId)) return `it had been kept, and went with ${owner} all the same`;
    // A replacement that the operator takes out before it was settled is a leak ten minutes later.
    const isLeak = this.#takenOut.has(owner) && this.#around.oldOf(owner) !== undefined;
    if (this.#endedByUs.has(owner) && !isLeak) return `a daemon ended ${owner}`;
    const notice = this.#notices.get(owner);
    if (!notice?.inTime) return undefined;
    // From then on somebody could have kept it, unless the message was lost for a minute.
    const sinceMs = notice.atMs + REACH_MS;
    const endMs = this.#endMs.get(owner) ?? this.#now();
    if (endMs - sinceMs < this.patienceMs) return undefined;
    if (this.#deafMs.some((ms) => ms >= notice.atMs - 60_000 && ms <= endMs)) return undefined;
    return `${owner} had its notice ${Math.round((endMs - notice.atMs) / 1000)} s before its end`;
  }

  // --- Calls of daemons, at the moment of their effect -----------------------------------------------------------

  /** A volume that is none of the data, while the data is somewhere, and not about to go with an instance that ends. */
  #isEmpty(volumeId: string, line: string): boolean {
    const isDoomed = ({ attachment: at }: Volume) =>
      at?.deleteOnTermination === true && this.#stateOf(at.instanceId) === "shutting-down";
    return this.#lineOf.get(volumeId) === undefined && !this.#carriers(line).every(isDoomed);
  }

  kept({ InstanceId = "", BlockDeviceMappings = [] }: ModifyInstanceAttributeRequest): void {
    for (const { DeviceName = "", Ebs } of BlockDeviceMappings) {
      const [volume] = this.#ebs.attachedTo(InstanceId, DeviceName);
      if (!volume) continue;
      if (Ebs?.DeleteOnTermination !== false) this.#around.find(`${volume.id} is to go with ${InstanceId}`);
      if (!this.#deviceOf.has(InstanceId))
        this.#around.find(`${volume.id} of ${InstanceId}, which is not our business, was kept`);
      else if (this.#isEmpty(volume.id, this.#line(InstanceId)))
        this.#around.find(`${volume.id}, the empty volume at ${DeviceName} of ${InstanceId}, was kept`);
      this.#kept.set(volume.id, this.#kept.get(volume.id) ?? this.#now());
    }
  }

  attached({ InstanceId = "", VolumeId = "", Device }: AttachVolumeRequest): void {
    const volume = this.#ebs.volumes.get(VolumeId);
    const line = this.#line(InstanceId);
    const own = this.#lineOf.get(VolumeId);
    const what = `${VolumeId} was attached to ${InstanceId}`;
    if (!volume) return;
    if (Device !== DATA_DEVICE) this.#around.find(`${what} at ${Device}`);
    if (this.#around.oldOf(InstanceId) === undefined) this.#around.find(`${what}, which we did not launch`);
    else if (own !== undefined && own !== line) this.#around.find(`${what}, and is the data of ${own}, not of ${line}`);
    else if (this.#isEmpty(VolumeId, line)) this.#around.find(`${what}, and is empty`);
    else if (own !== undefined && !this.#isComplete(volume)) this.#around.find(`${what}, and is older than the data of ${line}`);
    if (!volume.content.clean) this.#around.find(`${what}, and was taken from under a running guest`);
    this.#tagged(volume, what);
    this.#kept.set(VolumeId, this.#kept.get(VolumeId) ?? this.#now());
  }
  #tagged({ id, tags }: Pick<Volume, "id" | "tags">, what: string): void {
    for (const key of ["spotmax:group", "spotmax:volume"])
      if (!tags.has(key)) this.#around.find(`${what}, and carries no ${key} (${id})`);
  }

  copied({ VolumeId = "", TagSpecifications = [] }: CreateSnapshotRequest, snapshot: string): void {
    const volume = this.#ebs.volumes.get(VolumeId);
    const line = this.#lineOf.get(VolumeId);
    const what = `the snapshot ${snapshot} of ${VolumeId}`;
    if (!volume || line === undefined) {
      this.#around.find(`${what}, which is nobody's data`);
      return;
    }
    // Another daemon may have attached it since it was read: nobody uses this one, then.
    const sinceMs = this.#now() - (volume.attachment?.attachedAtMs ?? Number.NEGATIVE_INFINITY);
    const isHeld = volume.attachment !== undefined && sinceMs > this.#around.lagMs;
    if (isHeld || !this.#isComplete(volume)) this.#around.find(`${what} was made while its instance may still write`);
    const tags = new Map(TagSpecifications.flatMap((s) => s.Tags ?? []).map(({ Key = "", Value = "" }) => [Key, Value]));
    this.#tagged({ id: snapshot, tags }, what);
    if (tags.get("spotmax:volume") !== VolumeId) this.#around.find(`${what} names ${tags.get("spotmax:volume")}`);
    this.#lineOf.set(snapshot, line);
  }
  made(input: CreateVolumeRequest, id: string): void {
    const copy = this.#ebs.volumes.get(id);
    const snapshot = this.#ebs.snapshots.get(input.SnapshotId ?? "");
    const source = snapshot && this.#ebs.volumes.get(snapshot.volumeId);
    const line = this.#lineOf.get(input.SnapshotId ?? "");
    const what = `the copy ${id}`;
    if (!copy || !source || line === undefined) {
      this.#around.find(`${what} is of nobody's data`);
      return;
    }
    const owner = copy.tags.get("spotmax:volume") ?? "";
    this.#tagged(copy, what);
    if (this.#line(owner) !== line) this.#around.find(`${what} of the data of ${line} is for ${owner}`);
    if (this.#around.world.ec2.instances.get(owner)?.zone !== copy.zone)
      this.#around.find(`${what} is in ${copy.zone}, and ${owner} is not`);
    for (const key of ["type", "sizeGiB", "iops", "throughput", "encrypted", "kmsKeyId"] as const)
      if (copy[key] !== source[key]) this.#around.find(`${what} has ${key} ${copy[key]}, and ${source.id} ${source[key]}`);
    for (const [key, value] of source.tags)
      if (!/^(aws|spotmax):/.test(key) && copy.tags.get(key) !== value) this.#around.find(`${what} has lost the tag ${key}`);
    this.#lineOf.set(id, line);
    this.#copies.set(id, source.id);
    this.#kept.set(id, this.#now());
  }

  /** Returns whether the tags are on a volume or snapshot: who may tag instances is another's matter. */
  tags({ Tags = [] }: CreateTagsRequest, id: string): boolean {
    const value = Tags.find(({ Key }) => Key === "spotmax:volume")?.Value;
    if (id.startsWith("i-")) {
      const line = this.#lineOf.get(value ?? "");
      if (value !== undefined && line !== undefined && line !== this.#line(id))
        this.#around.find(`${id} is said to have ${value}, the data of ${line}`);
      return false;
    }
    const own = this.#lineOf.get(id);
    if (value === undefined || !id.startsWith("vol-")) return own !== undefined;
    const line = this.#line(value);
    if (own !== undefined && own !== line) this.#around.find(`${id}, the data of ${own}, is said to be that of ${value}`);
    if (this.#isEmpty(id, line)) this.#around.find(`${id}, which is empty, is said to be the data of ${value}`);
    return own !== undefined || this.#deviceOf.has(value);
  }

  // --- When all is quiet -----------------------------------------------------------------------------------------

  /** Kept by a daemon that died at that moment, before it was tagged: once its instance has gone nobody can tell whose it is. */
  #isNameless({ id, tags }: Volume): boolean {
    const keptMs = this.#kept.get(id);
    return keptMs !== undefined && !tags.has("spotmax:volume") && this.#deafMs.some((ms) => Math.abs(ms - keptMs) < 30_000);
  }

  /** `lines` is what the daemons have logged. */
  unrest(lines: readonly string[]): string | undefined {
    let said: string | undefined;
    for (const id of this.#lineOf.keys()) {
      const volume = this.#ebs.volumes.get(id);
      if (!volume || volume.goneAtMs !== undefined) continue;
      const at = volume.attachment;
      if (at && (at.state !== "attached" || !(this.#isLiving(at.instanceId) || this.#isStopped(at.instanceId))))
        return `${id} is ${at.state} at ${at.instanceId}`;
      said ??= warningsIn(lines);
      if (!volume.attachment && !said.includes(id) && !this.#isNameless(volume))
        return `${id} is ${volume.state}, and no warning says so`;
    }
    return undefined;
  }

  /** Every data volume by its ID. */
  final(): Account {
    const account: Account = { home: 0, moved: 0, copied: 0, left: 0, excused: this.#excused };
    for (const line of new Set(this.#lineOf.values())) {
      const carriers = this.#carriers(line);
      if (carriers.length === 0 && (this.#written.get(line) ?? []).length > 0)
        this.#around.find(`the data of ${line} is nowhere`);
      const isHeld = carriers.some(({ attachment }) => {
        const owner = attachment?.instanceId ?? "";
        return this.#isLiving(owner) || this.#isStopped(owner);
      });
      const heirs = [...this.#around.claims()].filter(
        (id) =>
          this.#line(id) === line &&
          this.#isLiving(id) &&
          this.#around.world.instance(id).group !== undefined &&
          !this.#isForgotten(id),
      );
      if (!isHeld && heirs.length > 0 && carriers.length > 0)
        this.#around.find(`the data of ${line} is in ${carriers.map(({ id }) => id).join(" ")}, and not on ${heirs.join(" ")}`);
      for (const volume of this.#volumes(line)) account[this.#place(volume, line)]++;
    }
    return account;
  }

  #place(volume: Volume, line: string): keyof Account {
    const { id, attachment, tags, state } = volume;
    const what = `${id}, the data of ${line},`;
    const wrong = (text: string) => this.#around.find(`${what} ${text}`);
    const isOurs = this.#kept.has(id) || tags.has("spotmax:volume");
    if (!attachment) {
      if (state !== "available") wrong(`is ${state}`);
      if (this.#isNameless(volume)) return "left";
      for (const key of ["spotmax:group", "spotmax:volume"]) if (!tags.has(key)) wrong(`is left without ${key}`);
      // Whose data goes on in a copy must not be taken for the newest, by people or by a late message.
      const copies = [...this.#copies].flatMap(([copy, source]) => (source === id ? [copy] : []));
      const goesOn = copies.find((copy) => this.#ebs.volumes.get(copy)?.attachment);
      if (goesOn !== undefined && tags.get("spotmax:copied") !== goesOn) wrong(`goes on in ${goesOn}, and does not say so`);
      return "left";
    }
    const { instanceId, device, deleteOnTermination } = attachment;
    const owner = this.#around.world.instance(instanceId);
    if (this.#line(instanceId) !== line) wrong(`is at ${instanceId}`);
    if (isOurs && deleteOnTermination) wrong(`is to go with ${instanceId}`);
    if (device !== DATA_DEVICE) return "home";
    if (!this.#isComplete(volume)) wrong(`is at ${instanceId}, and is not the newest`);
    if (tags.get("spotmax:volume") !== instanceId) wrong(`is at ${instanceId}, and says ${tags.get("spotmax:volume")}`);
    const told = owner.tags.get("spotmax:volume");
    if (told !== id) wrong(`is at ${instanceId}, whose guest is told of ${told}`);
    return this.#copies.has(id) ? "copied" : "moved";
  }
}

const warningsIn = (lines: readonly string[]) => lines.filter((line) => /^(WARN|ERRO)/.test(line)).join("");

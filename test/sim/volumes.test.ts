// Volumes that move with the instance: not one is lost, whatever happens, and every one is accounted for by its ID.
import { expect, test } from "bun:test";
import { AwsError, type GroupSpec } from "../aws/world.ts";
import { Stage } from "./harness.ts";

const DEVICE = "/dev/sdf";
const volumes = [{ device: DEVICE, sizeGiB: 400, type: "gp3", iops: 4000, throughput: 250 }];
const fleet = (over: Partial<GroupSpec> = {}): GroupSpec => ({ name: "db", min: 3, max: 5, desired: 3, volumes, ...over });
const options = { persistence_dev: DEVICE };

/** The volume at a device of an instance. */
function volumeAt(s: Stage, instance: string, device: string): string {
  for (const v of s.world.ec2.ebs.volumes.values())
    if (v.attachment?.instanceId === instance && v.attachment.device === device) return v.id;
  throw new Error(`${instance} has no volume at ${device}`);
}
const stateOf = (s: Stage, volume: string) => s.world.ec2.ebs.volumes.get(volume)?.state;
const tagOf = (s: Stage, volume: string) => s.world.ec2.ebs.volumes.get(volume)?.tags.get("spotmax:volume");
const ownerOf = (s: Stage, volume: string) => {
  const at = s.world.ec2.ebs.volumes.get(volume)?.attachment;
  return at && `${at.instanceId} ${at.device}`;
};
const claimOf = (s: Stage, old: string) => {
  const found = [...s.world.ec2.instances.values()].filter(
    (i) => i.tags.get("spotmax:replaces") === old && i.state === "running",
  );
  const [claim] = found;
  if (found.length !== 1 || !claim) throw new Error(`${old} has ${found.length} replacements\n${s.lines.join("")}`);
  return claim.id;
};
const first = (list: string[]) => list[0] ?? "";
const spotPools = (s: Stage, zone: string) => ["m5.large", "m5a.large", "m4.large"].map((t) => s.world.pool("spot", t, zone));

test("the data volume goes on with the replacement, as /dev/sdz, and stays for good", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  expect(s.lines.join("")).toContain("Has persistence volume.");
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { db: [3, 5, 3] });
  const claim = claimOf(s, old);
  expect(ownerOf(s, data)).toBe(`${claim} /dev/sdz`);
  expect(s.world.ec2.ebs.volumes.get(data)?.attachment?.deleteOnTermination).toBe(false);
  expect([tagOf(s, data), s.world.instance(claim).tags.get("spotmax:volume")]).toEqual([claim, data]);
});

test("two generations: the third instance has that very volume, not the empty ones between", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  const second = claimOf(s, old);
  const empty = volumeAt(s, second, DEVICE);
  s.world.interrupt(second);
  await s.quiet();
  const third = claimOf(s, second);
  expect(ownerOf(s, data)).toBe(`${third} /dev/sdz`);
  expect(stateOf(s, empty) ?? "deleted").toBe("deleted");
});

test("a replacement interrupted before its data has come: the data goes to the last in the chain", async () => {
  for (const after of [1, 5, 20, 40]) {
    const s = new Stage({ seed: after });
    const old = first(s.group(fleet(), options));
    const data = volumeAt(s, old, DEVICE);
    await s.start();
    s.world.interrupt(old);
    await s.until(() => s.world.audit.some((a) => a.what === "in service"), 100);
    await s.seconds(after);
    const second = claimOf(s, old);
    s.world.interrupt(second);
    await s.seconds(5);
    await s.quiet();
    const third = claimOf(s, second);
    expect([after, ownerOf(s, data)]).toEqual([after, `${third} /dev/sdz`]);
  }
});

test("a first page that is empty is not taken for all there is", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  s.world.emptyFirstPages = true;
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  s.check([old], { db: [3, 5, 3] });
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("the whole group at once: no volume is mixed up", async () => {
  const s = new Stage();
  const olds = s.group(fleet({ min: 6, max: 6, desired: 6 }), options);
  const data = new Map(olds.map((old) => [old, volumeAt(s, old, DEVICE)]));
  await s.start();
  for (const old of olds) s.world.interrupt(old, { keepCapacity: true });
  await s.quiet();
  s.check(olds, { db: [6, 6, 6] });
  for (const [old, volume] of data) expect([old, ownerOf(s, volume)]).toEqual([old, `${claimOf(s, old)} /dev/sdz`]);
});

test("every rung tries the old zone first", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const { zone } = s.world.instance(old);
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = pool.type === "m4.large" ? 1 : 0;
  s.world.interrupt(old, { keepCapacity: true });
  await s.quiet();
  const claim = s.world.instance(claimOf(s, old));
  expect([claim.zone, claim.type]).toEqual([zone, "m4.large"]);
});

test("another type in the old zone comes before the same types elsewhere", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), { ...options, alt1: "c5.large" }));
  const { zone } = s.world.instance(old);
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = 0;
  s.world.interrupt(old);
  await s.quiet();
  const claim = s.world.instance(claimOf(s, old));
  expect([claim.zone, claim.type]).toEqual([zone, "c5.large"]);
});

test("no capacity in the zone: a copy goes on, and the original stays, tagged and reported", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  const { zone } = s.world.instance(old);
  s.world.ec2.ebs.volumes.get(data)?.tags.set("owner", "billing");
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = 0;
  s.world.interrupt(old);
  await s.quiet(7200);
  const claim = claimOf(s, old);
  const copy = s.world.ec2.ebs.volumes.get(volumeAt(s, claim, "/dev/sdz"));
  const source = s.world.ec2.ebs.volumes.get(data);
  expect(s.world.instance(claim).zone).not.toBe(zone);
  expect([source?.state, source?.zone]).toEqual(["available", zone]);
  expect([copy?.type, copy?.sizeGiB, copy?.iops, copy?.throughput]).toEqual(["gp3", 400, 4000, 250]);
  expect([copy?.tags.get("owner"), tagOf(s, data)]).toEqual(["billing", old]);
  expect(s.world.ec2.ebs.snapshots.size).toBe(1);
  expect(s.lines.filter((l) => l.startsWith("WARN")).join("")).toContain("both stay and cost money");
});

test("no replacement at all: the volume stays available, and the log gives the command that attaches it", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), { ...options, is_enable_od_fallback: false }));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  for (const zone of "abc") for (const pool of spotPools(s, `us-east-1${zone}`)) pool.capacity = 0;
  s.world.interrupt(old);
  await s.seconds(3600);
  expect(stateOf(s, data)).toBe("available");
  expect(s.lines.join("")).toContain(`aws ec2 attach-volume --volume-id ${data} --instance-id`);
});

test("a volume that stays busy is reported and never forced", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  const volume = s.world.ec2.ebs.volumes.get(data);
  let stuck = true;
  // The instance hangs in shutting-down: its volume stays in use.
  s.world.delays.shuttingDownMs = [3_000_000, 3_000_000];
  s.world.interrupt(old);
  await s.seconds(1500);
  expect(volume?.state).toBe("in-use");
  expect(s.lines.join("")).toContain("waiting on, never forced");
  expect(s.world.calls["ec2:DetachVolume"]).toBeUndefined();
  stuck = false;
  await s.quiet(7200);
  expect([stuck, ownerOf(s, data)]).toEqual([false, `${claimOf(s, old)} /dev/sdz`]);
});

test("without a hard deadline the volume moves as well", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), { ...options, is_to_handle_rebalance_event: true }));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.rebalance(old);
  await s.quiet();
  s.check([old], { db: [3, 5, 3] });
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("an old one whose data cannot be kept is not ended by us", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  s.world.denied.add("ec2:ModifyInstanceAttribute");
  await s.start();
  s.world.interrupt(old, { withoutReclaim: true });
  await s.seconds(60);
  expect([s.world.instance(old).state, stateOf(s, data)]).toEqual(["running", "in-use"]);
  s.world.denied.clear();
  await s.quiet();
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("killed at any call and started again: that very volume ends on the replacement", async () => {
  for (let at = 2; at <= 150; at += 4) {
    const s = new Stage({ seed: at });
    const old = first(s.group(fleet({ min: 3, max: 3 }), options));
    const data = volumeAt(s, old, DEVICE);
    await s.killAt(at, () => s.world.interrupt(old));
    await s.quiet(7200);
    s.check([old], { db: [3, 3, 3] });
    expect([at, ownerOf(s, data)]).toEqual([at, `${claimOf(s, old)} /dev/sdz`]);
  }
});

test("killed at any call on the way to another zone: one copy attached, the original available", async () => {
  for (let at = 20; at <= 220; at += 8) {
    const s = new Stage({ seed: at });
    const old = first(s.group(fleet(), options));
    const data = volumeAt(s, old, DEVICE);
    for (const pool of spotPools(s, s.world.instance(old).zone)) pool.capacity = 0;
    await s.killAt(at, () => s.world.interrupt(old));
    await s.quiet(7200);
    expect([at, stateOf(s, data)]).toEqual([at, "available"]);
    expect(volumeAt(s, claimOf(s, old), "/dev/sdz")).not.toBe(data);
    const copies = [...s.world.ec2.ebs.volumes.values()].filter((v) => v.tags.get("spotmax:volume") === claimOf(s, old));
    expect([at, copies.length]).toEqual([at, 1]);
  }
});

test("lost answers of the volume calls change nothing", async () => {
  for (const operation of ["ModifyInstanceAttribute", "AttachVolume", "CreateTags", "CreateSnapshot", "CreateVolume"]) {
    for (const zone of ["same", "other"]) {
      const s = new Stage();
      const old = first(s.group(fleet(), options));
      const data = volumeAt(s, old, DEVICE);
      if (zone === "other") for (const pool of spotPools(s, s.world.instance(old).zone)) pool.capacity = 0;
      await s.start();
      let n = 0;
      s.world.intercept = (call) =>
        call.operation === operation && n++ === 0 ? { after: new AwsError("InternalError", "internal", 500) } : undefined;
      s.world.interrupt(old);
      await s.quiet(7200);
      if (zone === "same") expect([operation, ownerOf(s, data)]).toEqual([operation, `${claimOf(s, old)} /dev/sdz`]);
      else
        expect([operation, stateOf(s, data), volumeAt(s, claimOf(s, old), "/dev/sdz") !== data]).toEqual([
          operation,
          "available",
          true,
        ]);
    }
  }
});

test("another disk at /dev/sdz is not taken for the data", async () => {
  const s = new Stage();
  const old = first(s.group(fleet({ volumes: [...volumes, { device: "/dev/sdz", sizeGiB: 1 }] }), options));
  // This one is of before the template had a disk there.
  const wrong = volumeAt(s, old, "/dev/sdz");
  const data = volumeAt(s, old, DEVICE);
  await s.call("ec2", "DetachVolume", { VolumeId: wrong });
  await s.seconds(10);
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  await s.seconds(120);
  expect(stateOf(s, data)).toBe("available");
  expect(s.lines.join("")).toContain(`${data} stays available; free the device`);
});

/** The daemons' warnings and errors that name this. */
const warnings = (s: Stage, what: string) => s.lines.filter((l) => /^(WARN|ERRO)/.test(l) && l.includes(what));
/** Until the first replacement for `old` is in service. */
async function inService(s: Stage, old: string): Promise<string> {
  const members = s.world.autoscaling.groups.get("db")?.members;
  const found = () =>
    [...s.world.ec2.instances.values()].find(
      (i) => i.tags.get("spotmax:replaces") === old && members?.get(i.id)?.state === "InService",
    );
  await s.until(() => found() !== undefined, 120);
  return found()?.id ?? "";
}

test("where nothing may be launched the data is kept all the same, tagged and reported", async () => {
  for (const why of ["Launch suspended", "Standby"]) {
    const s = new Stage();
    const old = first(s.group(fleet({ min: 1, ...(why === "Launch suspended" && { suspended: ["Launch"] }) }), options));
    const data = volumeAt(s, old, DEVICE);
    await s.start();
    if (why === "Standby")
      await s.call("autoscaling", "EnterStandby", {
        AutoScalingGroupName: "db",
        InstanceIds: [old],
        ShouldDecrementDesiredCapacity: true,
      });
    await s.seconds(60);
    s.world.interrupt(old);
    await s.seconds(300);
    expect([why, stateOf(s, data), tagOf(s, data)]).toEqual([why, "available", old]);
    expect(warnings(s, `aws ec2 attach-volume --volume-id ${data}`).length).toBeGreaterThan(0);
  }
});

test("what is left when somebody ends a replacement is tagged and reported, once", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  const claim = claimOf(s, old);
  s.world.ec2.terminate(s.world.instance(claim), "Client.UserInitiatedShutdown: by hand");
  await s.seconds(7200);
  expect([stateOf(s, data), tagOf(s, data)]).toEqual(["available", claim]);
  expect(warnings(s, data).length).toBe(1);
  expect(warnings(s, `aws ec2 attach-volume --volume-id ${data}`).length).toBe(1);
});

test("a message that is lost does not leave the data behind: what lies available is asked after", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.instance(old).state === "shutting-down", 300);
  // Whatever is sent from here on is answered, and lost.
  const { SendMessageBatch: send } = s.world.sqs.operations;
  s.world.sqs.operations.SendMessageBatch = ({ Entries }: { Entries: { Id: string }[] }) => ({
    Successful: Entries.map(({ Id }) => ({ Id, MessageId: Id, MD5OfMessageBody: "" })),
    Failed: [],
  });
  await s.seconds(20);
  expect(s.world.sqs.bodies(s.queues.termination)).toEqual([]);
  Object.assign(s.world.sqs.operations, { SendMessageBatch: send });
  await s.seconds(1800);
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("what lies available is asked after again where the message could not be sent", async () => {
  const s = new Stage();
  const old = first(s.group(fleet({ min: 1 }), options));
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  const second = claimOf(s, old);
  const data = volumeAt(s, second, "/dev/sdz");
  const body = (input: object) => JSON.stringify(input).includes("MaxGroup Termination");
  s.world.intercept = ({ operation, input }) =>
    operation === "SendMessageBatch" && body(input) ? { before: new AwsError("AccessDenied", "denied", 403) } : undefined;
  await s.call("autoscaling", "TerminateInstanceInAutoScalingGroup", {
    InstanceId: second,
    ShouldDecrementDesiredCapacity: true,
  });
  await s.seconds(900);
  s.world.intercept = undefined;
  await s.seconds(900);
  expect(s.lines.filter((line) => line.startsWith("ERRO") && line.includes(`--volume-id ${data} `)).length).toBe(1);
});

test("data that goes past a replacement on its way out leaves that one's empty volume to go with it", async () => {
  const s = new Stage({ shuttingDownMs: [90_000, 90_000] });
  const old = first(s.group(fleet(), { ...options, detaching_delay_seconds: 0 }));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old);
  const second = await inService(s, old);
  const empty = volumeAt(s, second, DEVICE);
  await s.until(() => s.world.instance(old).state === "shutting-down", 60);
  await s.seconds(60);
  s.world.interrupt(second);
  const third = await inService(s, second);
  // The second one has left the group, and is not ended yet, when the first one's data finds its last heir.
  const denied = "ec2:TerminateInstances";
  s.world.denied.add(denied);
  await s.until(() => ownerOf(s, data) === `${third} /dev/sdz`, 300);
  s.world.denied.delete(denied);
  await s.quiet();
  await s.seconds(300);
  expect([stateOf(s, empty) ?? "deleted", ownerOf(s, data)]).toEqual(["deleted", `${third} /dev/sdz`]);
});

test("after a copy has gone on, a message seen again does not bring the original into its place", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  const { zone } = s.world.instance(old);
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = 0;
  s.world.interrupt(old, { keepCapacity: true });
  await s.quiet(7200);
  const second = claimOf(s, old);
  const copy = volumeAt(s, second, "/dev/sdz");
  s.world.ec2.write(copy, "what came later");
  for (const pool of spotPools(s, zone)) pool.capacity = 9;
  for (const pool of spotPools(s, s.world.instance(second).zone)) pool.capacity = 0;
  s.world.interrupt(second, { keepCapacity: true });
  const third = await inService(s, second);
  // As after a delete that was lost.
  const body = s.world.event("MaxGroup Termination", "spotmax.maxgroup", [], { "instance-id": old });
  const maxgroup = { group: "db", kind: "interruption", notice: "n", options: { persistence_dev: DEVICE } };
  s.world.sendRaw(s.queues.termination, JSON.stringify({ ...JSON.parse(body), maxgroup }));
  await s.quiet(7200);
  expect(s.world.ec2.dataOf(volumeAt(s, third, "/dev/sdz")).writes).toEqual(["what came later"]);
  expect([stateOf(s, data), s.world.ec2.ebs.volumes.get(data)?.tags.get("spotmax:copied")]).toEqual(["available", copy]);
});

test("once there is a copy the data goes on in that, though the original cannot say so yet", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), { ...options, is_enable_od_fallback: false }));
  const data = volumeAt(s, old, DEVICE);
  const { zone } = s.world.instance(old);
  const only = (zones: (at: string) => boolean) => {
    for (const at of ["us-east-1a", "us-east-1b", "us-east-1c"])
      for (const pool of spotPools(s, at)) pool.capacity = zones(at) ? Number.POSITIVE_INFINITY : 0;
  };
  await s.start();
  s.world.intercept = ({ operation, input }) =>
    operation === "CreateTags" && JSON.stringify(input).includes("spotmax:copied")
      ? { before: new AwsError("InternalError", "not now", 500) }
      : undefined;
  only((at) => at !== zone);
  s.world.interrupt(old, { keepCapacity: true });
  const second = await inService(s, old);
  await s.until(() => s.world.ec2.ebs.attachedTo(second, "/dev/sdz").length > 0, 900);
  const copy = volumeAt(s, second, "/dev/sdz");
  s.world.ec2.write(copy, "what came later");
  await s.seconds(200); // until no pool counts as failed a moment ago
  // The next one is where the original is, which could be attached to it at once.
  only((at) => at === zone);
  s.world.interrupt(second, { keepCapacity: true });
  const third = await inService(s, second);
  await s.until(() => s.world.instance(second).state === "terminated", 600);
  await s.seconds(60);
  s.world.intercept = undefined;
  await s.quiet(7200);
  const last = volumeAt(s, third, "/dev/sdz");
  expect(s.world.ec2.dataOf(last).writes).toContain("what came later");
  expect(stateOf(s, data)).toBe("available");
  expect([copy, last]).toContain(s.world.ec2.ebs.volumes.get(data)?.tags.get("spotmax:copied") ?? "none");
});

test("copies that go as soon as they are made are said, and the original stays", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  const { ebs } = s.world.ec2;
  Object.assign(ebs.volumes.get(data) ?? {}, { encrypted: true, kmsKeyId: "key" });
  ebs.unusableKeys.add("key");
  const { zone } = s.world.instance(old);
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = 0;
  s.world.interrupt(old, { keepCapacity: true });
  await inService(s, old);
  await s.seconds(1800);
  const copies = [...ebs.volumes.values()].filter((v) => v.snapshotId !== undefined && !v.root);
  expect([copies.length, stateOf(s, data), tagOf(s, data)]).toEqual([4, "available", old]);
  expect(s.lines.some((line) => /^ERRO.*may the role use its key/.test(line))).toBe(true);
  // Once it may, an ordinary copy is made.
  ebs.unusableKeys.clear();
  s.call("ec2", "DeleteSnapshot", { SnapshotId: [...ebs.snapshots.keys()][0] });
  await s.quiet(7200);
  expect(ebs.attachedTo(claimOf(s, old), "/dev/sdz").length).toBe(1);
});

test("a snapshot of an earlier end is not taken for the data of a later one", async () => {
  const s = new Stage({ snapshotMs: [900_000, 900_000] });
  const old = first(s.group(fleet(), { ...options, is_enable_od_fallback: false }));
  const data = volumeAt(s, old, DEVICE);
  const { zone } = s.world.instance(old);
  const only = (zones: (at: string) => boolean) => {
    for (const at of "abc")
      for (const pool of spotPools(s, `us-east-1${at}`)) pool.capacity = zones(`us-east-1${at}`) ? Number.POSITIVE_INFINITY : 0;
  };
  await s.start();
  // The first replacement is elsewhere, so a snapshot is begun; then the next one is back in the old zone.
  only((at) => at !== zone);
  s.world.interrupt(old, { keepCapacity: true });
  const second = await inService(s, old);
  await s.until(() => s.world.ec2.ebs.snapshots.size === 1, 300);
  await s.seconds(200); // until no pool counts as failed a moment ago
  only((at) => at === zone);
  s.world.interrupt(second, { keepCapacity: true });
  await s.until(() => ownerOf(s, data)?.endsWith("/dev/sdz") === true, 600);
  s.world.ec2.write(data, "what came later");
  await s.quiet(7200);
  const third = claimOf(s, second);
  only((at) => at !== zone);
  s.world.interrupt(third, { keepCapacity: true });
  await s.quiet(7200);
  expect(s.world.ec2.dataOf(volumeAt(s, claimOf(s, third), "/dev/sdz")).writes).toEqual(["what came later"]);
});

test("a volume that cannot be tagged at first is tagged later, even when its instance has gone meanwhile", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.intercept = ({ operation, input }) =>
    operation === "CreateTags" && (input as { Resources: string[] }).Resources.includes(data)
      ? { before: new AwsError("RequestLimitExceeded", "Request limit exceeded.", 503) }
      : undefined;
  s.world.interrupt(old, { noticeSeconds: 20 });
  await s.seconds(240);
  s.world.intercept = undefined;
  await s.quiet(7200);
  await s.seconds(1800);
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("an heir that stands in Standby gets its data; one that was taken out of the group is reported", async () => {
  for (const operation of ["EnterStandby", "DetachInstances"]) {
    const s = new Stage({ shuttingDownMs: [60_000, 60_000] });
    const old = first(s.group(fleet({ min: 1 }), options));
    const data = volumeAt(s, old, DEVICE);
    await s.start();
    s.world.interrupt(old);
    const claim = await inService(s, old);
    await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 120);
    await s.call("autoscaling", operation, {
      AutoScalingGroupName: "db",
      InstanceIds: [claim],
      ShouldDecrementDesiredCapacity: true,
    });
    await s.quiet(7200);
    if (operation === "EnterStandby") expect(ownerOf(s, data)).toBe(`${claim} /dev/sdz`);
    else {
      expect([stateOf(s, data), tagOf(s, data)]).toEqual(["available", old]);
      expect(warnings(s, `--volume-id ${data} --instance-id ${claim}`).length).toBeGreaterThan(0);
    }
  }
});

test("data of an old one that stands in Standby and is stopped stays with it, which is said, and goes on once it is ended", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old, { action: "stop" });
  const claim = await inService(s, old);
  await s.call("autoscaling", "EnterStandby", {
    AutoScalingGroupName: "db",
    InstanceIds: [old],
    ShouldDecrementDesiredCapacity: true,
  });
  await s.seconds(900);
  expect([s.world.instance(old).state, ownerOf(s, data)]).toEqual(["stopped", `${old} ${DEVICE}`]);
  expect(warnings(s, `${old} is a member of db: left alone, and its data volume with it`)).toHaveLength(1);
  s.world.ec2.terminate(s.world.instance(old), "Client.UserInitiatedShutdown: by hand");
  await s.seconds(1_800);
  expect(ownerOf(s, data)).toBe(`${claim} /dev/sdz`);
});

function refuseTags(s: Stage, volume: string): void {
  const isAsked = (input: object) => (input as { Resources?: string[] }).Resources?.includes(volume);
  s.world.intercept = ({ operation, input }) =>
    operation === "CreateTags" && isAsked(input) ? { before: new AwsError("RequestLimitExceeded", "busy", 503) } : undefined;
}

test("a volume that was kept, but not tagged before the daemon died, is tagged as long as its instance shows", async () => {
  const s = new Stage({ shuttingDownMs: [40_000, 40_000] });
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  const daemon = await s.start();
  refuseTags(s, data);
  s.world.interrupt(old);
  await s.seconds(1);
  daemon.kill();
  s.world.intercept = undefined;
  await s.until(() => s.world.instance(old).state === "shutting-down", 200);
  expect([tagOf(s, data), s.world.ec2.ebs.volumes.get(data)?.attachment?.deleteOnTermination]).toEqual([undefined, false]);
  await s.start();
  await s.quiet(7200);
  expect([stateOf(s, data), tagOf(s, data)]).toEqual(["available", old]);
  expect(warnings(s, `aws ec2 attach-volume --volume-id ${data}`).length).toBeGreaterThan(0);
});

test("a volume that could not be tagged before its instance went is tagged as long as that shows, and goes on", async () => {
  const s = new Stage({ shuttingDownMs: [120_000, 120_000] });
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  const daemon = await s.start();
  refuseTags(s, data);
  s.world.interrupt(old);
  await s.until(() => s.world.instance(old).state === "shutting-down", 200);
  daemon.kill();
  s.world.intercept = undefined;
  expect([tagOf(s, data), s.world.instance(old).group]).toEqual([undefined, undefined]);
  await s.start();
  await s.quiet(7200);
  expect(ownerOf(s, data)).toBe(`${claimOf(s, old)} /dev/sdz`);
});

test("an old describe of an instance does not make its empty volume the data", async () => {
  for (let seed = 1; seed <= 8; seed++) {
    const s = new Stage({ seed, staleMs: 5_000 });
    const old = first(s.group(fleet(), { ...options, detaching_delay_seconds: 0 }));
    const data = volumeAt(s, old, DEVICE);
    await s.start();
    s.world.interrupt(old);
    const second = await inService(s, old);
    const empty = volumeAt(s, second, DEVICE);
    await s.until(() => ownerOf(s, data) === `${second} /dev/sdz`, 300);
    s.world.interrupt(second);
    await s.quiet(7200);
    expect([seed, stateOf(s, empty) ?? "deleted"]).toEqual([seed, "deleted"]);
    expect([seed, ownerOf(s, data)]).toEqual([seed, `${claimOf(s, second)} /dev/sdz`]);
  }
});

test("messages that meet at the snapshot make one of it, and none of them fails", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  for (const pool of spotPools(s, s.world.instance(old).zone)) pool.capacity = 0;
  await s.start();
  s.world.interrupt(old);
  await s.until(() => s.world.instance(old).state === "shutting-down", 300);
  await s.seconds(5);
  const [body] = s.world.sqs.bodies(s.queues.termination);
  await s.until(() => s.world.audit.some(({ what }) => what === "volume detached"), 300);
  for (let n = 0; n < 4; n++) s.world.sendRaw(s.queues.termination, body ?? "");
  await s.quiet(7200);
  expect(s.world.ec2.ebs.snapshots.size).toBe(1);
  expect(s.lines.filter((l) => l.startsWith("ERRO"))).toEqual([]);
});

test("a replacement beside which the old one stays for good has data of its own, and that goes on", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), { ...options, is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 60 }));
  await s.start();
  s.world.rebalance(old);
  const claim = await inService(s, old);
  await s.call("autoscaling", "UpdateAutoScalingGroup", { AutoScalingGroupName: "db", MinSize: 4 });
  await s.until(() => s.world.instance(claim).tags.has("spotmax:attached"), 3_600);
  await s.seconds(900);
  const [data, olds] = [volumeAt(s, claim, DEVICE), volumeAt(s, old, DEVICE)];
  s.world.interrupt(claim);
  await s.quiet(7_200);
  expect([ownerOf(s, data), ownerOf(s, olds)]).toEqual([`${claimOf(s, claim)} /dev/sdz`, `${old} ${DEVICE}`]);
});

test("a replacement interrupted before its old one's data is kept hands no empty volume on", async () => {
  const s = new Stage({ attachMs: [5_000, 5_000] });
  const old = first(s.group(fleet(), { ...options, is_to_handle_rebalance_event: true, preaction_detach_delay_seconds: 300 }));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.rebalance(old);
  const joined = () => s.openClaims().find((id) => s.world.autoscaling.groups.get("db")?.members.has(id));
  await s.until(() => joined() !== undefined, 60);
  const second = joined() ?? "";
  const empty = volumeAt(s, second, DEVICE);
  expect(tagOf(s, data)).toBeUndefined();
  s.world.interrupt(second);
  await s.seconds(60);
  const third = claimOf(s, second);
  await s.quiet(7_200);
  expect([ownerOf(s, data), stateOf(s, empty) ?? "deleted"]).toEqual([`${third} /dev/sdz`, "deleted"]);
});

test("no snapshot is made of a volume that shows as available while the one that it was attached to is still on its way out", async () => {
  const s = new Stage({ shuttingDownMs: [40_000, 40_000], snapshotMs: [30_000, 30_000] });
  const old = first(s.group(fleet(), { ...options, detaching_delay_seconds: 0, is_enable_od_fallback: false }));
  const { zone } = s.world.instance(old);
  await s.start();
  for (const pool of spotPools(s, zone)) pool.capacity = 0;
  s.world.interrupt(old, { keepCapacity: true });
  const second = await inService(s, old);
  await s.until(() => s.world.audit.some(({ what, ids }) => what === "volume attach" && ids.includes(second)), 900);
  const copy = volumeAt(s, second, "/dev/sdz");
  // From here on for a minute describes show it as it was before.
  const untilMs = s.clock.now() + 60_000;
  const { DescribeVolumes: describe } = s.world.ec2.operations;
  const lagging = (input: never) => {
    const answer = describe?.(input, {}) as { Volumes: { VolumeId: string }[] };
    const before = (v: { VolumeId: string }) => (v.VolumeId === copy ? { ...v, State: "available", Attachments: [] } : v);
    return s.clock.now() < untilMs ? { ...answer, Volumes: answer.Volumes.map(before) } : answer;
  };
  Object.assign(s.world.ec2.operations, { DescribeVolumes: lagging });
  for (const pool of spotPools(s, s.world.instance(second).zone)) pool.capacity = 0;
  s.world.interrupt(second, { keepCapacity: true });
  await s.until(() => s.world.instance(second).state === "shutting-down", 120);
  await s.seconds(25);
  s.world.ec2.write(copy, "the last words");
  await s.quiet(7_200);
  const third = claimOf(s, second);
  expect(s.world.ec2.dataOf(volumeAt(s, third, "/dev/sdz")).writes).toEqual(["the last words"]);
});

test("a copy for one that has its data by now is named, for it costs money", async () => {
  const s = new Stage();
  const old = first(s.group(fleet(), options));
  const data = volumeAt(s, old, DEVICE);
  await s.start();
  s.world.interrupt(old);
  await s.quiet();
  const claim = claimOf(s, old);
  // As two daemons leave it that had each a copy under way.
  const Tags = [
    { Key: "spotmax:group", Value: "db" },
    { Key: "spotmax:volume", Value: claim },
  ];
  const TagSpecifications = [{ ResourceType: "volume", Tags }];
  const copy = { AvailabilityZone: s.world.instance(claim).zone, Size: 400, VolumeType: "gp3", TagSpecifications };
  const { VolumeId = "" } = (await s.call("ec2", "CreateVolume", copy)) as { VolumeId?: string };
  await s.seconds(3_600);
  expect([ownerOf(s, data), stateOf(s, VolumeId)]).toEqual([`${claim} /dev/sdz`, "available"]);
  expect(warnings(s, VolumeId)).toEqual([expect.stringContaining(`its data goes on in ${data}`)]);
});

test("the data is kept in a group that is left out, and where the launch of a replacement waits", async () => {
  for (const why of ["left out", "suspended"]) {
    const s = new Stage();
    const group = fleet({ launchConfiguration: why === "left out" });
    const old = first(s.group(group, { ...options, is_to_handle_rebalance_event: true }));
    const data = volumeAt(s, old, DEVICE);
    s.spawn();
    await s.seconds(10);
    if (why === "suspended") {
      s.world.rebalance(old);
      await s.until(() => s.openClaims().length > 0, 60);
      await s.call("autoscaling", "SuspendProcesses", { AutoScalingGroupName: "db", ScalingProcesses: ["Launch"] });
    }
    s.world.interrupt(old);
    await s.until(() => s.world.instance(old).state === "terminated", 300);
    await s.seconds(60);
    expect([why, stateOf(s, data), tagOf(s, data)]).toEqual([why, "available", old]);
    await s.seconds(2_400);
    expect([why, warnings(s, `aws ec2 attach-volume --volume-id ${data}`).length > 0]).toEqual([why, true]);
  }
});

import { describe, expect, test } from "bun:test";
import { deadlineOf, type Notice, QUEUES, type QueueName, readNotice } from "../../maxgroup.ts";
import { fixture, optionsOf } from "./fixtures/index.ts";

const old = "i-0b662ef9931388ba0";
const atMs = Date.parse("2026-03-01T12:00:00Z");
const read = (body: string, queue: QueueName = "interruption_evt_sqs") => {
  const answer = readNotice(body, queue);
  return "instances" in answer ? { notice: answer } : { answer };
};
function ours(name: string, queue: QueueName = "interruption_evt_sqs"): Notice {
  const { notice, answer } = read(fixture(name), queue);
  if (!notice) throw new Error(`${name} was taken for somebody else's: ${JSON.stringify(answer)}`);
  return notice;
}
const notOurs = { notOurs: expect.any(String) };
/** A fixture with its top level changed. */
const changed = (name: string, over: object) => JSON.stringify({ ...JSON.parse(fixture(name)), ...over });

describe("an event that concerns us", () => {
  test.each([
    ["interruption-terminate", "interruption", [old]],
    ["interruption-stop", "interruption", [old]],
    ["interruption-hibernate", "interruption", [old]],
    ["interruption-short-id", "interruption", ["i-0b662ef9"]],
    ["rebalance", "rebalance", [old]],
    ["health-scheduled-open", "maintenance", [old]],
    ["health-scheduled-upcoming", "maintenance", [old, "i-0aaaaaaaaaaaaaaa1"]],
  ])("%s is a notice of kind %s", (name, kind, instances) => {
    const { "detail-type": type, id } = JSON.parse(fixture(name));
    expect<object>(ours(name)).toEqual({ type, kind, id, instances, timeMs: atMs, carried: undefined });
  });

  test("names its instance in its detail; resource ARNs, of either form, are never read", () => {
    expect(ours("interruption-other-arn").instances).toEqual([old]);
    expect(read(changed("interruption-terminate", { resources: undefined })).notice?.instances).toEqual([old]);
  });

  test("without a time that can be read is understood all the same", () => {
    expect(ours("interruption-sample-without-time")).toMatchObject({
      instances: ["i-1234567890abcdef0"],
      timeMs: undefined,
    });
    for (const time of [undefined, null, 5, ""]) {
      const notice = readNotice(changed("interruption-terminate", { time }), "interruption_evt_sqs");
      expect(notice).toMatchObject({ instances: [old], timeMs: undefined });
    }
  });
});

describe("an event of others is well formed and deleted", () => {
  test.each([
    "state-change",
    "autoscaling-terminate-successful",
    "health-scheduled-closed",
    "health-issue",
    "health-other-service",
    "health-volume",
  ])("%s", (name) => {
    expect<object>(read(fixture(name))).toEqual({ answer: notOurs });
  });

  test.each(["state-change", "autoscaling-terminate-successful"])("%s, on any queue", (name) => {
    for (const queue of QUEUES) expect<object>(read(fixture(name), queue)).toEqual({ answer: notOurs });
  });

  test.each(["toString", "constructor", "__proto__"])("a type that every object has is unknown: %s", (type) => {
    expect<object>(read(changed("rebalance", { "detail-type": type }))).toEqual({ answer: notOurs });
  });
});

describe("a message on the wrong queue is not acted on there, and the answer names the right one", () => {
  test.each([
    ["interruption-terminate", "detach_evt_sqs", "interruption_evt_sqs"],
    ["rebalance", "termination_evt_sqs", "interruption_evt_sqs"],
    ["health-scheduled-open", "detach_evt_sqs", "interruption_evt_sqs"],
    ["detach", "interruption_evt_sqs", "detach_evt_sqs"],
    ["detach", "termination_evt_sqs", "detach_evt_sqs"],
    ["termination", "detach_evt_sqs", "termination_evt_sqs"],
  ] as const)("%s on %s", (name, queue, right) => {
    const { notice, answer } = read(fixture(name), queue);
    expect(notice).toBeUndefined();
    expect(JSON.stringify(answer)).toContain(right);
  });
});

describe("what cannot be understood throws, and so goes to the dead-letter queue", () => {
  const maxgroup = JSON.parse(fixture("detach")).maxgroup;
  test.each([
    ["no JSON", "interruption!"],
    ["nothing", ""],
    ["no object", "[]"],
    ["null", "null"],
    ["a string", '"EC2 Spot Instance Interruption Warning"'],
    ["no detail-type", "{}"],
    ["a detail-type that is no string", '{"detail-type": 5}'],
    ["an SNS envelope", '{"Type": "Notification", "Message": "{}"}'],
    ["no instance", fixture("interruption-without-instance")],
    ["no detail", changed("interruption-terminate", { detail: undefined })],
    ["a detail that is none", changed("rebalance", { detail: "i-0b662ef9931388ba0" })],
    ["no instance ID", changed("rebalance", { detail: { "instance-id": "i-0b662ef9931388ba0; rm" } })],
    ["a filter for an instance ID", changed("rebalance", { detail: { "instance-id": "*" } })],
    ["a Health event without its status", changed("health-scheduled-open", { detail: { affectedEntities: [] } })],
    ["a carried part that is none", changed("interruption-terminate", { maxgroup: "web" })],
    ["a carried part without its group", changed("interruption-carried", { maxgroup: { ...maxgroup, group: undefined } })],
    ["a carried part of no kind", changed("interruption-carried", { maxgroup: { ...maxgroup, kind: "whim" } })],
    ["carried options that are wrong", changed("detach", { maxgroup: { ...maxgroup, options: { consul_port: "x" } } })],
  ])("%s", (_, body) => {
    expect(() => readNotice(body, body.includes("MaxGroup Detach") ? "detach_evt_sqs" : "interruption_evt_sqs")).toThrow();
  });

  test.each([
    ["detach", "detach_evt_sqs"],
    ["termination", "termination_evt_sqs"],
  ] as const)("our own %s message without what it carries, or without its instance", (name, queue) => {
    expect(() => readNotice(changed(name, { maxgroup: undefined }), queue)).toThrow();
    expect(() => readNotice(changed(name, { detail: {} }), queue)).toThrow();
  });
});

describe("what a message carries", () => {
  const maxgroup = { group: "web", kind: "maintenance", notice: "n", options: {} };

  test.each([
    ["interruption-carried", "interruption_evt_sqs"],
    ["detach", "detach_evt_sqs"],
    ["termination", "termination_evt_sqs"],
  ] as const)("%s: group, deadline, protection and options travel along", (name, queue) => {
    const { kind, instances, id, carried } = ours(name, queue);
    expect({ kind, instances, id }).toEqual({
      kind: "interruption",
      instances: [old],
      id: "1e5527d7-bb36-4607-3370-4164db56a40e",
    });
    expect(carried).toMatchObject({
      group: "web",
      deadlineMs: atMs + 120_000,
      oldProtected: true,
      options: optionsOf({ detaching_delay_seconds: 5, consul_port: 8500, alt1: "m5.large", alt2: "c5.large" }),
    });
  });

  test("options written and read again are the same, as often as they are sent on", () => {
    const options = optionsOf({ alt1: "m5.large", alt2: "c5.large", persistence_dev: "/dev/sdf", consul_port: "8500" });
    let sent: object = options;
    for (let copies = 0; copies < 3; copies++) {
      const { notice } = read(changed("detach", { maxgroup: { ...maxgroup, options: sent } }), "detach_evt_sqs");
      sent = notice?.carried?.options ?? {};
      expect(sent).toEqual(options);
    }
  });

  test("extra types keep their order, also where the file left numbers out", () => {
    const options = optionsOf({ alt10: "c5.large", alt2: "m5.large" });
    const notice = readNotice(changed("detach", { maxgroup: { ...maxgroup, options } }), "detach_evt_sqs");
    expect(notice).toMatchObject({ carried: { options: { alt: ["m5.large", "c5.large"] } } });
  });

  test("options of another version are passed over: what is begun is finished", () => {
    const options = { detaching_delay_seconds: 5, of_tomorrow: true };
    const notice = readNotice(changed("detach", { maxgroup: { ...maxgroup, options } }), "detach_evt_sqs");
    expect(notice).toMatchObject({ carried: { options: optionsOf({ detaching_delay_seconds: 5 }) } });
  });

  test("without a hard deadline has none", () => {
    const { notice } = read(changed("detach", { maxgroup }), "detach_evt_sqs");
    expect(notice?.carried).toMatchObject({ group: "web", kind: "maintenance" });
    expect(notice?.carried?.deadlineMs).toBeUndefined();
  });
});

// Times in seconds; 0 is when the handler looks at the notice.
test.each([
  ["two minutes after the event's time", -3, -2, 117],
  ["by the event's time and not by the receipt", -100, -1, 20],
  ["from the first receipt where the event has no time", undefined, -10, 110],
  ["from the first receipt where that time is past while the instance lives on", -3600, -10, 110],
  ["from now where the first receipt is past too, for the instance lives on", -3600, -300, 120],
  ["from now where the first receipt is past and the event has no time", undefined, -300, 120],
  ["never more than the two minutes that AWS gives, however clocks differ", 600, -1, 120],
])("an interruption's deadline counts %s", (_, eventS, receivedS, deadlineS) => {
  const nowMs = atMs;
  const at = (s: number) => nowMs + s * 1000;
  expect(deadlineOf(eventS === undefined ? undefined : at(eventS), at(receivedS), nowMs)).toBe(at(deadlineS));
});

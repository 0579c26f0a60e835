// What is decided about nodes, pods and kubeconfig users, apart from any cluster.
import { describe, expect, test } from "bun:test";
import {
  type Ctx,
  cordonPatch,
  eksToken,
  eksUser,
  isUntrue,
  judgePod,
  type KubeNode,
  labelValue,
  MARK,
  type Mark,
  type Pod,
  shortenedGrace,
  uncordonPatch,
} from "../../maxgroup.ts";

describe("a pod", () => {
  const pod = (more: Partial<Pod> = {}): Pod => ({
    ...{ name: "p", namespace: "default", uid: "u", phase: "Running", isEnding: false, isMirror: false },
    ...{ daemonSet: undefined, graceSeconds: 30, ...more },
  });
  test.each([
    ["that runs is evicted", pod(), false, "evict"],
    ["that has not started is evicted", pod({ phase: "Pending" }), false, "evict"],
    ["that has finished is evicted", pod({ phase: "Succeeded" }), false, "evict"],
    ["that is ending is waited for", pod({ isEnding: true }), false, "wait"],
    ["of the kubelet's own is left", pod({ isMirror: true }), false, "leave"],
    ["of the kubelet's own is left, finished or not", pod({ isMirror: true, phase: "Failed" }), false, "leave"],
    ["of a DaemonSet is left", pod({ daemonSet: "agent" }), true, "leave"],
    ["of a DaemonSet is left, also where it is ending", pod({ daemonSet: "agent", isEnding: true }), true, "leave"],
    ["of a DaemonSet that is gone is evicted", pod({ daemonSet: "agent" }), false, "evict"],
    ["of a DaemonSet that has failed is evicted", pod({ daemonSet: "agent", phase: "Failed" }), true, "evict"],
  ] as const)("%s", (_, it, isThere, what) => expect(judgePod(it, isThere)).toBe(what));

  test.each([
    ["its own where nothing presses", 3600, undefined, undefined],
    ["its own where there is time", 30, 60, undefined],
    ["what is left, less five seconds, where there is not", 300, 60, 55],
    ["a second at least: none would be no warning at all", 300, 3, 1],
  ])("has a grace period: %s", (_, grace, leftSeconds, seconds) =>
    expect(shortenedGrace(grace, 1_000, leftSeconds === undefined ? undefined : 1_000 + leftSeconds * 1000)).toBe(seconds),
  );
});

describe("a notice's ID as a label", () => {
  test.each([
    ["12345678-1234-1234-1234-123456789012", "12345678-1234-1234-1234-123456789012"],
    ["arn:aws:events/x y", "arn-aws-events-x-y"],
    ["--.a_b.--", "a_b"],
    ["", ""],
    ["::", ""],
    [`${"x".repeat(62)}-yz`, "x".repeat(62)],
  ])("%p", (id, label) => {
    expect(labelValue(id)).toBe(label);
    expect(labelValue(id)).toMatch(/^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$/);
  });
});

describe("a node", () => {
  const wanted = { instance: "i-1", notice: "n-1", deadlineMs: 120_000, markedMs: 1_000 };
  const node = (more: Partial<KubeNode> = {}): KubeNode => ({
    ...{ name: "ip-1", uid: "u", version: "7", instance: "i-1", dnsNames: [], isReady: true },
    ...{ isCordoned: false, taints: [], mark: undefined, ...more },
  });
  const theirs = { key: "theirs", value: "x", effect: "NoExecute" };
  const ours = { key: MARK, value: "n-1", effect: "NoSchedule" };
  const mark = (more: Partial<Mark> = {}): Mark => ({ ...wanted, wasCordoned: false, ...more });
  type Patch = { metadata: { annotations: Record<string, string> }; spec: { unschedulable?: null; taints: object[] | null } };
  const noted = (patch: object | undefined): Mark => JSON.parse((patch as Patch).metadata.annotations[MARK] ?? "");

  test("is cordoned and tainted beside what others put on it, at the version that was read", () => {
    expect(cordonPatch(node({ taints: [theirs] }), wanted)).toEqual({
      metadata: { resourceVersion: "7", labels: { [MARK]: "n-1" }, annotations: { [MARK]: JSON.stringify(mark()) } },
      spec: { unschedulable: true, taints: [theirs, ours] },
    });
  });
  test("that was cordoned before us is remembered as such", () => {
    expect(noted(cordonPatch(node({ isCordoned: true }), wanted)).wasCordoned).toBe(true);
  });
  test("that we cordoned is not taken for somebody else's by a second notice", () => {
    const marked = node({ isCordoned: true, taints: [ours], mark: mark({ deadlineMs: null }) });
    expect(noted(cordonPatch(marked, { ...wanted, notice: "n-2" }))).toEqual(mark({ notice: "n-2" }));
  });
  test("is not touched again for the same notice, nor for one without a deadline", () => {
    const marked = node({ isCordoned: true, taints: [ours], mark: mark() });
    expect(cordonPatch(marked, wanted)).toBeUndefined();
    expect(cordonPatch(marked, { ...wanted, notice: "n-2", deadlineMs: null })).toBeUndefined();
  });

  test("is uncordoned where we cordoned it, and only our taint goes", () => {
    const marked = node({ isCordoned: true, taints: [theirs, ours], mark: mark() });
    expect((uncordonPatch(marked) as Patch).spec).toEqual({ unschedulable: null, taints: [theirs] });
    expect((uncordonPatch({ ...marked, taints: [ours] }) as Patch).spec.taints).toBeNull();
  });
  test.each([
    ["somebody else had cordoned it", { taints: [ours], mark: mark({ wasCordoned: true }) }],
    ["our taint is gone", { taints: [], mark: mark() }],
    ["nobody knows who cordoned it", { taints: [ours], mark: undefined }],
  ])("stays cordoned where %s", (_, more) =>
    expect((uncordonPatch(node({ isCordoned: true, ...more })) as Patch).spec).not.toHaveProperty("unschedulable"),
  );

  const untrue = { nowMs: 0, lifecycleState: "InService", isInHand: false, hasOpenClaim: false };
  const hard = { deadlineMs: 120_000, markedMs: 0 };
  const soft = { deadlineMs: null, markedMs: 0 };
  test.each([
    ["before its deadline", { ...untrue, mark: hard, nowMs: 119_000 }, false],
    ["just after it", { ...untrue, mark: hard, nowMs: 239_000 }, false],
    ["well after it", { ...untrue, mark: hard, nowMs: 241_000 }, true],
    ["well after it, but a message is in hand", { ...untrue, mark: hard, nowMs: 241_000, isInHand: true }, false],
    ["well after it, but a replacement stands beside it", { ...untrue, mark: hard, nowMs: 241_000, hasOpenClaim: true }, false],
    ["well after it, but it has left its group", { ...untrue, mark: hard, nowMs: 241_000, lifecycleState: undefined }, false],
    ["well after it, but on its way out", { ...untrue, mark: hard, nowMs: 241_000, lifecycleState: "Detaching" }, false],
    ["without a deadline, minutes later", { ...untrue, mark: soft, nowMs: 599_000 }, false],
    ["without a deadline, ten minutes later", { ...untrue, mark: soft, nowMs: 601_000 }, true],
  ])("is given back: %s", (_, x, is) => expect(isUntrue(x)).toBe(is));
});

describe("a kubeconfig's plugin", () => {
  const aws = (...args: string[]) => ({ command: "aws", args });
  test.each([
    [aws("eks", "get-token", "--cluster-name", "c"), { cluster: "c" }],
    [
      aws("--region", "eu-west-1", "eks", "get-token", "--cluster-name", "c", "--output", "json"),
      { cluster: "c", region: "eu-west-1" },
    ],
    [
      aws("eks", "get-token", "--cluster-name=c", "--role-arn=arn:aws:iam::1:role/r"),
      { cluster: "c", role: "arn:aws:iam::1:role/r" },
    ],
    [
      { command: "/usr/local/bin/aws-iam-authenticator", args: ["token", "-i", "c", "-r", "role"] },
      { cluster: "c", role: "role" },
    ],
    [
      {
        command: "aws-iam-authenticator",
        args: ["token", "--cluster-id", "c"],
        env: [{ name: "AWS_REGION", value: "us-east-1" }],
      },
      { cluster: "c", region: "us-east-1" },
    ],
  ])("of EKS is known by its arguments: %j", (exec, user) =>
    expect(eksUser(exec)).toEqual({ region: undefined, role: undefined, ...user }),
  );
  test.each([
    [aws("sts", "get-caller-identity")],
    [aws("eks", "get-token")],
    [{ command: "gke-gcloud-auth-plugin", args: null }],
    [{ command: "kubelogin", args: ["get-token", "--cluster-name", "c", "eks"] }],
    [{}],
  ])("that is another one is run: %j", (exec) => expect(eksUser(exec)).toBeUndefined());
});

describe("an EKS token", () => {
  const own = { accessKeyId: "AKIAOWN", secretAccessKey: "secret" };
  const ctx = (fetch?: (url: string) => Promise<Response>) =>
    ({
      deps: { now: () => 0, credentials: async () => own, fetch },
      state: { clockOffsetMs: 1_767_225_600_000 },
    }) as unknown as Ctx;
  const urlOf = (token: string) => new URL(Buffer.from(token.replace("k8s-aws-v1.", ""), "base64url").toString());

  test("goes to STS of the cluster's region, in that region's partition", async () => {
    const host = async (region: string) => urlOf(await eksToken(ctx(), { cluster: "c", region })).host;
    expect(await host("eu-central-1")).toBe("sts.eu-central-1.amazonaws.com");
    expect(await host("us-gov-west-1")).toBe("sts.us-gov-west-1.amazonaws.com");
    expect(await host("cn-north-1")).toBe("sts.cn-north-1.amazonaws.com.cn");
    expect(await host("eusc-de-east-1")).toBe("sts.eusc-de-east-1.amazonaws.eu");
    expect(await host("us-iso-east-1")).toBe("sts.us-iso-east-1.c2s.ic.gov");
    expect(await host("xx-new-1")).toBe("sts.xx-new-1.amazonaws.com");
  });
  test("is signed at AWS's time, whatever this machine's clock says", async () => {
    const url = urlOf(await eksToken(ctx(), { cluster: "c", region: "eu-central-1" }));
    expect(url.searchParams.get("X-Amz-Date")).toBe("20260101T000000Z");
  });
  test("is signed as the role that the kubeconfig names", async () => {
    const asked: string[] = [];
    const answer = `<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ASIAROLE</AccessKeyId>
      <SecretAccessKey>other</SecretAccessKey><SessionToken>session+/=</SessionToken></Credentials></AssumeRoleResult></AssumeRoleResponse>`;
    const fetch = async (url: string) => {
      asked.push(url);
      return new Response(answer);
    };
    const role = "arn:aws:iam::123456789012:role/drain";
    const url = urlOf(await eksToken(ctx(fetch), { cluster: "c", region: "eu-central-1", role }));
    expect(url.searchParams.get("X-Amz-Credential")).toStartWith("ASIAROLE/");
    expect(url.searchParams.get("X-Amz-Security-Token")).toBe("session+/=");
    const [assuming = ""] = asked;
    expect(new URL(assuming).searchParams.get("RoleArn")).toBe(role);
    expect(new URL(assuming).searchParams.get("X-Amz-Credential")).toStartWith("AKIAOWN/");
  });
  test("says why the role cannot be had", async () => {
    const fetch = async () => new Response("<Code>AccessDenied</Code><Message>not you</Message>", { status: 403 });
    await expect(eksToken(ctx(fetch), { cluster: "c", region: "eu-central-1", role: "r" })).rejects.toThrow(
      "assuming r: AccessDenied: not you",
    );
  });
});

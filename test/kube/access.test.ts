// Ways into a cluster: certificates, tokens and plugins of every form, under the role that ships.
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash, createHmac } from "node:crypto";
import { accessSync, chmodSync, constants, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { checkGroups } from "../../maxgroup.ts";
import { type Cluster, type KubeObject, startCluster } from "./cluster.ts";
import { until } from "./servers.ts";
import { KubeStage, RBAC } from "./stage.ts";

/** Tokens that the authenticator was asked about and that are no test's own, as AWS's would be. */
const asked: string[] = [];
const started = await startCluster({
  authenticate: (token) => {
    asked.push(token);
    return token.startsWith("k8s-aws-v1.") ? { user: "role", groups: ["max-group"] } : undefined;
  },
});
const cluster = started as Cluster; // not touched where it is undefined
const GROUP = "max-group";
delete process.env.KUBERNETES_SERVICE_HOST; // else this is a pod's cluster where none is named
const stages: KubeStage[] = [];
let base: KubeStage;
beforeAll(async () => {
  if (!started) return;
  await cluster.apply(RBAC);
  base = stageWith(cluster.tokenKubeconfig("base", [GROUP]));
});
afterAll(async () => {
  for (const stage of stages) stage.end();
  await started?.stop();
});

function stageWith(kubeconfig: string | undefined): KubeStage {
  const stage = new KubeStage(cluster, kubeconfig);
  stages.push(stage);
  return stage;
}
const data = (file: string) => readFileSync(file).toString("base64");

/** Drains a node with one pod; the stages' worlds are alike, so that what one has made every one knows. */
async function drains(stage: KubeStage): Promise<KubeObject> {
  const { id, name, node } = await base.node();
  await cluster.makePod({ name: `pod-of-${id}`, node: name });
  expect((await stage.step("drain", stage.work(id, { seconds: 60 }))).is).toBe("done");
  expect([await cluster.podsOn(name), stage.lines.filter((line) => line.startsWith("WARN"))]).toEqual([[], []]);
  return node;
}
/** What is said at the start about the cluster. */
async function checked(stage: KubeStage): Promise<string> {
  await checkGroups(stage.ctx);
  return until("the check", async () =>
    stage.lines.find((line) => /the cluster of web|no cluster is known|pods of web are moved/.test(line)),
  );
}

describe.skipIf(started === undefined)("a kubeconfig with", () => {
  test("a client certificate in files and a private authority", async () => {
    const { certFile, keyFile } = cluster.clientCertificate("by-file", GROUP);
    await drains(stageWith(cluster.writeKubeconfig("by-file", `client-certificate: ${certFile}\nclient-key: ${keyFile}`)));
  });

  test("a client certificate in the file itself", async () => {
    const { certFile, keyFile } = cluster.clientCertificate("inline", GROUP);
    const user = `client-certificate-data: ${data(certFile)}\nclient-key-data: ${data(keyFile)}`;
    await drains(stageWith(cluster.writeKubeconfig("inline", user)));
  });

  test("a token", async () => {
    await drains(stageWith(cluster.tokenKubeconfig("by-token", [GROUP])));
  });

  test("a token file that is written anew: the new token is used once the old one is refused", async () => {
    const first = cluster.token("rotating", [GROUP]);
    const file = join(cluster.folder, "rotating.token");
    writeFileSync(file, `${first}\n`);
    const stage = stageWith(cluster.writeKubeconfig("rotating", `tokenFile: ${basename(file)}`));
    await drains(stage);
    cluster.revoke(first);
    writeFileSync(file, cluster.token("rotating", [GROUP]));
    // Good for ten more seconds, unasked.
    await until(
      "the old one is refused",
      async () => {
        return (await cluster.request("GET", "/api/v1/nodes", undefined, { token: first })).status === 401;
      },
      60,
    );
    await drains(stage);
  }, 120_000);

  test("a token of its own that is written anew", async () => {
    const path = cluster.tokenKubeconfig("old", [GROUP]);
    const stage = stageWith(path);
    await drains(stage);
    writeFileSync(path, readFileSync(cluster.tokenKubeconfig("new", [GROUP]), "utf8"));
    stage.ctx.state.cache.clear(); // a minute later
    await drains(stage);
    expect(cluster.calls().some((call) => call.user === "new")).toBe(true);
  });

  test("a plugin: it is run once for many calls, told what kubectl tells it, and found beside the file", async () => {
    const script = join(cluster.folder, "plugin.sh");
    const token = cluster.token("plugin", [GROUP]);
    const runs = join(cluster.folder, "plugin.runs");
    const credential = JSON.stringify({
      apiVersion: "client.authentication.k8s.io/v1",
      kind: "ExecCredential",
      status: { token },
    });
    writeFileSync(script, `#!/bin/sh\nprintf '%s %s\\n' "$KUBERNETES_EXEC_INFO" "$EXTRA" >>${runs}\necho '${credential}'\n`);
    chmodSync(script, 0o755);
    const exec = {
      apiVersion: "client.authentication.k8s.io/v1",
      command: "./plugin.sh",
      args: ["get"],
      env: [{ name: "EXTRA", value: "more" }],
      interactiveMode: "Never",
      provideClusterInfo: true,
    };
    await drains(stageWith(cluster.writeKubeconfig("plugin", `exec: ${JSON.stringify(exec)}`)));
    const [line = "", ...others] = readFileSync(runs, "utf8").trim().split("\n");
    expect(others).toEqual([]);
    expect(line.endsWith(" more")).toBe(true);
    expect(JSON.parse(line.replace(/ more$/, ""))).toMatchObject({
      apiVersion: "client.authentication.k8s.io/v1",
      kind: "ExecCredential",
      spec: { interactive: false, cluster: { server: cluster.url } },
    });
  });

  test("a plugin that answers a client certificate", async () => {
    const { certFile, keyFile } = cluster.clientCertificate("by-plugin", GROUP);
    const [clientCertificateData, clientKeyData] = [readFileSync(certFile, "utf8"), readFileSync(keyFile, "utf8")];
    const answer = join(cluster.folder, "credential.json");
    const status = { clientCertificateData, clientKeyData };
    writeFileSync(answer, JSON.stringify({ apiVersion: "client.authentication.k8s.io/v1", kind: "ExecCredential", status }));
    const exec = { apiVersion: "client.authentication.k8s.io/v1", command: "cat", args: [answer], interactiveMode: "Never" };
    await drains(stageWith(cluster.writeKubeconfig("by-plugin", `exec: ${JSON.stringify(exec)}`)));
  });

  test("a plugin that hangs costs its cluster's drains their time and nothing else, and one that is mended is used", async () => {
    const script = join(cluster.folder, "hanging.sh");
    const token = cluster.token("hanging", [GROUP]);
    const write = (line: string) => {
      writeFileSync(script, `#!/bin/sh\n${line}\n`);
      chmodSync(script, 0o755);
    };
    write("exec sleep 300");
    const exec = { apiVersion: "client.authentication.k8s.io/v1", command: script, interactiveMode: "Never" };
    const stage = stageWith(cluster.writeKubeconfig("hanging", `exec: ${JSON.stringify(exec)}`));
    const id = stage.instance();
    const works = Array.from({ length: 100 }, (_, n) => stage.work(id, { seconds: 12, notice: `n-${n}` }));
    const ends = Promise.all(works.map((work) => stage.drainEnds(work)));
    const results = await Promise.all(works.map((work) => stage.step("drain", work)));
    const endMs = Date.now();
    expect(results.every((result) => result.is === "done")).toBe(true);
    expect(endMs - Math.max(...(await ends))).toBeLessThan(5_000);
    const credential = JSON.stringify({
      apiVersion: "client.authentication.k8s.io/v1",
      kind: "ExecCredential",
      status: { token },
    });
    write(`echo '${credential}'`);
    stage.ctx.state.cache.clear(); // a minute later
    await Bun.sleep(6_000); // what had begun has given up, after five seconds
    stage.lines.length = 0;
    await drains(stage);
  }, 120_000);

  test("EKS's plugin: the token is signed in the program, as AWS would check it, and made once", async () => {
    const args = ["--region", "us-west-2", "eks", "get-token", "--cluster-name", "prod", "--output", "json"];
    const exec = { apiVersion: "client.authentication.k8s.io/v1beta1", command: "/nowhere/aws", args };
    asked.length = 0;
    await drains(stageWith(cluster.writeKubeconfig("eks", `exec: ${JSON.stringify(exec)}`)));
    const [token = "", ...others] = new Set(asked);
    expect(others).toEqual([]);
    const url = new URL(Buffer.from(token.slice("k8s-aws-v1.".length), "base64url").toString());
    expect(token).not.toMatch(/[+/=]/);
    expect(url.host).toBe("sts.us-west-2.amazonaws.com");
    const value = (name: string) => url.searchParams.get(name);
    expect([value("Action"), value("Version"), value("X-Amz-Expires")]).toEqual(["GetCallerIdentity", "2011-06-15", "60"]);
    expect(value("X-Amz-SignedHeaders")).toBe("host;x-k8s-aws-id");
    expect(value("X-Amz-Signature")).toBe(signatureOf(url, "us-west-2", "secret", { host: url.host, "x-k8s-aws-id": "prod" }));
  });
});

/** AWS Signature Version 4 of a presigned GET, by the book. */
function signatureOf(url: URL, region: string, secret: string, headers: Record<string, string>): string {
  const hmac = (key: string | Buffer, text: string) => createHmac("sha256", key).update(text).digest();
  const hash = (text: string) => createHash("sha256").update(text).digest("hex");
  const encode = (text: string) =>
    encodeURIComponent(text).replace(/[!'()*]/g, (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`);
  const pairs = [...url.searchParams].filter(([name]) => name !== "X-Amz-Signature");
  const query = pairs
    .map(([name, value]) => `${encode(name)}=${encode(value)}`)
    .sort()
    .join("&");
  const names = Object.keys(headers).sort();
  const canonical = ["GET", "/", query, ...names.map((name) => `${name}:${headers[name]}`), "", names.join(";"), hash("")].join(
    "\n",
  );
  const date = url.searchParams.get("X-Amz-Date") ?? "";
  const scope = `${date.slice(0, 8)}/${region}/sts/aws4_request`;
  const key = ["sts", "aws4_request"].reduce(hmac, hmac(hmac(`AWS4${secret}`, date.slice(0, 8)), region) as Buffer);
  return hmac(key, ["AWS4-HMAC-SHA256", date, scope, hash(canonical)].join("\n")).toString("hex");
}

describe.skipIf(started === undefined)("at the start", () => {
  test("the role that ships has all that is asked for", async () => {
    const stage = stageWith(cluster.tokenKubeconfig("entitled", [GROUP]));
    expect(await checked(stage)).toContain(`pods of web are moved by way of ${cluster.url}`);
  });

  test("it has no more than that", async () => {
    const token = cluster.token("entitled", [GROUP]);
    const get = async (path: string) => (await cluster.request("GET", path, undefined, { token })).status;
    expect(await get("/api/v1/nodes")).toBe(200);
    expect(await get("/api/v1/secrets")).toBe(403);
    expect(await get("/api/v1/namespaces/default/pods/x")).toBe(403);
    const pod = await cluster.makePod({ name: "not-deleted", node: "nowhere", phase: "Pending" });
    const deletion = await cluster.request("DELETE", "/api/v1/namespaces/default/pods/not-deleted", undefined, { token });
    expect([deletion.status, (await cluster.read(pod))?.metadata.name]).toEqual([403, "not-deleted"]);
  });

  test("rights that are missing are named, with the file that has them", async () => {
    const stage = stageWith(cluster.tokenKubeconfig("nobody"));
    expect(await checked(stage)).toMatch(/does not allow: get nodes, .*create pods\/eviction.*conf\/k8s-rbac\.yml/);
  });

  test("credentials that are refused, an authority that is unknown, and a file that is not there are each said", async () => {
    expect(await checked(stageWith(cluster.writeKubeconfig("stranger", "token: unknown")))).toContain(
      "does not know max_group's user",
    );
    const path = cluster.tokenKubeconfig("no-ca", [GROUP]);
    writeFileSync(path, readFileSync(path, "utf8").replace(/certificate-authority-data: .*/, ""));
    expect(await checked(stageWith(path))).toMatch(/cannot be used: .*(certificate|CERT)/);
    expect(await checked(stageWith("/nowhere/kubeconfig"))).toMatch(
      /cannot be used: .*no such file.*check \/nowhere\/kubeconfig/,
    );
  });

  test("without any cluster it is said what to do", async () => {
    expect(await checked(stageWith(undefined))).toMatch(/no cluster is known: set k8s_config_file_path, pass -K FILE/);
  });
});

const ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount";
/** Why a pod's own account cannot be put there; no server that is missing, and so no fault in CI either. */
const obstacle = (() => {
  if (existsSync(ACCOUNT)) return "this is a pod, with an account of its own";
  try {
    accessSync("/var/run", constants.W_OK);
    return undefined;
  } catch {
    return "it cannot be made here";
  }
})();
if (obstacle !== undefined) console.warn(`\n*** ${ACCOUNT}: ${obstacle}: the test of a pod's own account is LEFT OUT ***\n`);
const inPod = obstacle === undefined ? test.skipIf(started === undefined) : () => undefined;
inPod("in a pod its own service account is used, and -K wins over it", async () => {
  const made = mkdirSync(ACCOUNT, { recursive: true }) ?? ACCOUNT;
  try {
    writeFileSync(join(ACCOUNT, "token"), await cluster.serviceAccountToken("kube-system", "max-group"));
    writeFileSync(join(ACCOUNT, "ca.crt"), readFileSync(cluster.caFile));
    writeFileSync(join(ACCOUNT, "namespace"), "kube-system");
    const { hostname, port } = new URL(cluster.url);
    Object.assign(process.env, { KUBERNETES_SERVICE_HOST: hostname, KUBERNETES_SERVICE_PORT: port });
    await drains(stageWith(undefined));
    const asAccount = () => cluster.calls().filter((call) => call.user === "system:serviceaccount:kube-system:max-group");
    // Which no drain waits for.
    await until("the cordon's event", async () => asAccount().some((call) => call.uri.includes("/events")));
    const before = asAccount().length;
    const stage = stageWith(undefined);
    stage.ctx.state.kubeconfig = cluster.tokenKubeconfig("by-flag", [GROUP]);
    await drains(stage);
    expect([asAccount().length, cluster.calls().some((call) => call.user === "by-flag")]).toEqual([before, true]);
  } finally {
    delete process.env.KUBERNETES_SERVICE_HOST;
    rmSync(made, { recursive: true });
  }
});

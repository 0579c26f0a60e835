// Consul's environment variables as its own tools read them (its api.go, defaultConfig and NewClient), and whose an
// agent is.
import { describe, expect, test } from "bun:test";
import { consulAccess, toInstance, whoseAgent } from "../../maxgroup.ts";

const files: Record<string, string> = {
  "/token": "from-file\n",
  "/empty": "\n",
  "/ca.pem": "CA",
  "/cas/a.pem": "A",
  "/cas/b.pem": "B",
  "/cert": "CERT",
  "/key": "KEY",
};
const access = (env: Record<string, string>) =>
  consulAccess(
    env,
    (path) => {
      const text = files[path];
      if (text === undefined) throw new Error(`ENOENT: ${path}`);
      return text;
    },
    (folder) => Object.keys(files).filter((path) => path.startsWith(`${folder}/`)),
  );

describe("Consul's environment", () => {
  test("says nothing: plain HTTP, no token", () => {
    expect(access({})).toEqual({ scheme: "http", token: undefined, tls: {} });
    expect(
      access({ CONSUL_HTTP_TOKEN: "", CONSUL_HTTP_TOKEN_FILE: "", CONSUL_HTTP_SSL: "", CONSUL_HTTP_SSL_VERIFY: "" }),
    ).toEqual(access({}));
  });

  test.each([
    [{ CONSUL_HTTP_TOKEN: "t" }, "t"],
    [{ CONSUL_HTTP_TOKEN_FILE: "/token" }, "from-file"],
    [{ CONSUL_HTTP_TOKEN: "t", CONSUL_HTTP_TOKEN_FILE: "/token" }, "from-file"],
    [{ CONSUL_HTTP_TOKEN: "t", CONSUL_HTTP_TOKEN_FILE: "/empty" }, "t"],
    [{ CONSUL_HTTP_TOKEN_FILE: "/empty" }, undefined],
  ])("the token of %j is %s", (env, token) => {
    expect(access(env).token).toBe(token);
  });

  test.each(["1", "t", "T", "TRUE", "true", "True"])("CONSUL_HTTP_SSL=%s is HTTPS", (value) => {
    expect(access({ CONSUL_HTTP_SSL: value }).scheme).toBe("https");
  });
  test.each(["0", "f", "F", "FALSE", "false", "False", "yes", "on", " true"])("CONSUL_HTTP_SSL=%s is not", (value) => {
    expect(access({ CONSUL_HTTP_SSL: value }).scheme).toBe("http");
  });

  test.each(["0", "f", "F", "FALSE", "false", "False"])(
    "CONSUL_HTTP_SSL_VERIFY=%s switches the check of certificates off",
    (value) => {
      expect(access({ CONSUL_HTTP_SSL_VERIFY: value }).tls).toEqual({ rejectUnauthorized: false });
    },
  );
  test.each(["1", "true", "no", "off"])("CONSUL_HTTP_SSL_VERIFY=%s does not", (value) => {
    expect(access({ CONSUL_HTTP_SSL_VERIFY: value }).tls).toEqual({});
  });

  test("certificates come from files, an authority's also from a folder, the server's name without a port", () => {
    expect(access({ CONSUL_CACERT: "/ca.pem", CONSUL_CAPATH: "/cas" }).tls).toEqual({ ca: ["CA"] });
    expect(access({ CONSUL_CAPATH: "/cas" }).tls).toEqual({ ca: ["A", "B"] });
    expect(access({ CONSUL_CLIENT_CERT: "/cert", CONSUL_CLIENT_KEY: "/key" }).tls).toEqual({ cert: "CERT", key: "KEY" });
    for (const name of ["consul.internal", "consul.internal:8501"])
      expect(access({ CONSUL_TLS_SERVER_NAME: name }).tls).toEqual({ serverName: "consul.internal" });
  });

  test.each([
    [{ CONSUL_HTTP_TOKEN_FILE: "/nowhere" }, "/nowhere"],
    [{ CONSUL_CACERT: "/nowhere" }, "/nowhere"],
    [{ CONSUL_CLIENT_CERT: "/cert" }, "go together"],
    [{ CONSUL_CLIENT_KEY: "/key" }, "go together"],
  ])("what cannot be had is an error: %j", (env, text) => {
    expect(() => access(env)).toThrow(text);
  });
});

describe("whose agent it is", () => {
  const [old, other] = ["i-0b662ef9931388ba0", "i-0aaaaaaaaaaaaaaaa"];
  test.each<[string, unknown, boolean]>([
    ["a host name tells nothing", { Config: { NodeName: "ip-10-0-0-5" }, Member: { Addr: "10.0.0.5" } }, true],
    ["nothing tells nothing", {}, true],
    ["nor does no object", null, true],
    ["nor metadata that is null, as Consul sends it", { Config: { NodeName: "x" }, Meta: null }, true],
    ["its own ID", { Config: { NodeName: `web-${old}` } }, true],
    ["its own ID among others", { Config: { NodeName: old }, Meta: { parent: other } }, true],
    ["another's ID as its name", { Config: { NodeName: other } }, false],
    ["another's ID in its metadata", { Config: { NodeName: "x" }, Meta: { "aws-id": other } }, false],
    ["the replacement's address", { Config: { NodeName: "x" }, Member: { Addr: "10.0.0.9" } }, false],
  ])("%s", (_, self, isIts) => {
    expect(whoseAgent(self, old, "10.0.0.9") === undefined).toBe(isIts);
  });
});

test.each([
  ["its IPv4 address", { PrivateIpAddress: "10.0.0.5", Ipv6Address: "2600::5" }, "10.0.0.5"],
  ["IPv6 where that is all it has", { Ipv6Address: "2600::5" }, "2600::5"],
  [
    "also where only its interface says so",
    { NetworkInterfaces: [{}, { Ipv6Addresses: [{ Ipv6Address: "2600::5" }] }] },
    "2600::5",
  ],
  ["none once it is gone", { PrivateIpAddress: "" }, undefined],
])("an instance's address: %s", (_, fields, address) => {
  expect(toInstance({ InstanceId: "i-1", ...fields })?.address).toBe(address);
});

// Agents that speak HTTPS only.
import { test } from "bun:test";
import { describeWith, expectGone, expectGoneOn, LIMIT_MS } from "./deregister.ts";

describeWith(
  "TLS, by certificates for a name as Consul makes them, for clients with one only",
  { tls: true, mutual: true, serverName: "client.dc1.consul" },
  75,
  (agents) => {
    const env = (without: string[] = []) => {
      const { caFile = "", client } = agents();
      const all = {
        CONSUL_HTTP_SSL: "true",
        CONSUL_CACERT: caFile,
        CONSUL_CLIENT_CERT: client?.certFile ?? "",
        CONSUL_CLIENT_KEY: client?.keyFile ?? "",
        CONSUL_TLS_SERVER_NAME: "client.dc1.consul",
      };
      return Object.fromEntries(Object.entries(all).filter(([name]) => !without.includes(name)));
    };

    test(
      "with authority, certificate and server name all services leave",
      async () => {
        await expectGone(agents(), env());
      },
      LIMIT_MS,
    );

    test(
      "without the check of the server's certificate too",
      async () => {
        const unchecked = { ...env(["CONSUL_CACERT", "CONSUL_TLS_SERVER_NAME"]), CONSUL_HTTP_SSL_VERIFY: "false" };
        await expectGone(agents(), unchecked);
      },
      LIMIT_MS,
    );

    test.each([
      ["its authority", ["CONSUL_CACERT"], /certificate/i],
      ["the server's name", ["CONSUL_TLS_SERVER_NAME"], /ERR_TLS_CERT_ALTNAME_INVALID|altname|certificate/i],
      ["a certificate of our own", ["CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"], /./],
      ["HTTPS", ["CONSUL_HTTP_SSL"], /400|HTTP/],
    ])(
      "without %s it costs a warning",
      async (_, without, text) => {
        await expectGoneOn(agents(), env(without), text);
      },
      LIMIT_MS,
    );
  },
);

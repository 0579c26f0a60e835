// Agents that deny what no token allows.
import { test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { describeWith, expectGone, expectGoneOn, LIMIT_MS } from "./deregister.ts";

describeWith("ACLs", { acl: true }, 76, (agents) => {
  test(
    "without a token the list is empty, and that is said",
    async () => {
      await expectGoneOn(agents(), {}, /maintenance mode: 403 .*none without CONSUL_HTTP_TOKEN/);
    },
    LIMIT_MS,
  );

  test(
    "a token that may only read gets no further",
    async () => {
      const token = await agents().token(`service_prefix "" { policy = "read" }`);
      await expectGoneOn(agents(), { CONSUL_HTTP_TOKEN: token }, /deregistering .*403/);
    },
    LIMIT_MS,
  );

  test(
    "the least that is needed, from a file",
    async () => {
      const token = await agents().token(
        `service_prefix "" { policy = "write" } node_prefix "" { policy = "write" } agent_prefix "" { policy = "read" }`,
      );
      const file = join(agents().folder, "token");
      writeFileSync(file, `${token}\n`);
      await expectGone(agents(), { CONSUL_HTTP_TOKEN_FILE: file, CONSUL_HTTP_TOKEN: "wrong" });
    },
    LIMIT_MS,
  );
});

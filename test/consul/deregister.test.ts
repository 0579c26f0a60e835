// Agents as they are installed, without ACLs and TLS; tests of these are beside it.
import { expect, test } from "bun:test";
import { describeWith, expectGone, expectGoneOn, LIMIT_MS } from "./deregister.ts";

describeWith("an agent as it is installed", {}, 77, (agents) => {
  test(
    "its services are gone from the catalogue before the detach, and nobody else's are",
    async () => {
      await expectGone(agents(), {});
    },
    LIMIT_MS,
  );

  test(
    "frozen, it costs three seconds and a warning",
    async () => {
      const [old = ""] = agents().addresses;
      const tookMs = await expectGoneOn(agents(), {}, /no answer in 3 s/, {
        before: async () => agents().freeze(old),
        after: async () => agents().thaw(old),
      });
      expect(tookMs).toBeGreaterThan(2_500);
    },
    LIMIT_MS,
  );

  test(
    "gone, it costs a warning",
    async () => {
      const [old = ""] = agents().addresses;
      await expectGoneOn(agents(), {}, /ConnectionRefused|Unable to connect/, {
        limitMs: 2_500, // no three seconds
        before: () => agents().stopAgent(old),
        after: () => agents().startAgent(old),
      });
    },
    LIMIT_MS,
  );
});

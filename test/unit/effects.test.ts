import { afterEach, expect, test } from "bun:test";
import { GetQueueAttributesCommand } from "@aws-sdk/client-sqs";
import { makeLog, realDeps } from "../../maxgroup.ts";

const VARIABLES = ["AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"];
afterEach(() => {
  for (const name of VARIABLES) delete process.env[name];
});

test.each(VARIABLES)("a queue is asked at its own URL, whatever %s says", async (name) => {
  process.env[name] = "true";
  using server = Bun.serve({ port: 0, fetch: () => Response.json({ Attributes: { QueueArn: "here" } }) });
  const log = makeLog(
    () => undefined,
    Date.now,
    false,
    () => "error",
  );
  const deps = realDeps({ r: "us-east-1", k: "AKIATEST", p: "secret", t: false, v: false }, log);
  const queue = `http://127.0.0.1:${server.port}/1/q`;
  const answer = await deps.sqs(queue).send(new GetQueueAttributesCommand({ QueueUrl: queue }));
  expect(answer.Attributes?.QueueArn).toBe("here");
});

import { describe, expect, test } from "bun:test";
import { errorName, explain } from "../../maxgroup.ts";

/** An AWS error as the SDK throws it. */
const aws = (name: string, message = "AWS's own words", over: object = {}) =>
  Object.assign(new Error(message), { name, ...over });
const forbidden = { $metadata: { httpStatusCode: 403 } };

describe("an error's name", () => {
  test.each([
    ["AWS's own", aws("ValidationError"), "ValidationError"],
    ["wrapped", new Error("attaching i-1 to web", { cause: aws("ResourceContention") }), "ResourceContention"],
    ["wrapped twice", new Error("attach", { cause: new Error("attaching", { cause: aws("Throttling") }) }), "Throttling"],
    ["a socket's code", Object.assign(new Error("refused"), { code: "ECONNREFUSED" }), "ECONNREFUSED"],
    ["AWS's name before a code", aws("ValidationError", "m", { code: "X" }), "ValidationError"],
    ["an error without a name of its own", new Error("m"), "Error"],
    ["an error whose cause is no error", new Error("m", { cause: "x" }), "Error"],
    ["a fault of the SDK's, which adds that word", aws("ScalingActivityInProgressFault"), "ScalingActivityInProgress"],
    ["a subclass", new TypeError("m"), "TypeError"],
    ["no error at all", "boom", "boom"],
    ["nothing", undefined, "undefined"],
  ])("%s", (_, error, name) => {
    expect(errorName(error)).toBe(name);
  });
});

describe("every known error is one line that says what to do", () => {
  test.each([
    ["AccessDenied", /role.*rights/],
    ["AccessDeniedException", /role.*rights/],
    ["UnauthorizedOperation", /role.*rights/],
    ["AllAccessDisabled", /role.*rights/],
    ["Forbidden", /role.*rights/],
    ["403", /role.*rights/],
    ["ExpiredToken", /renew/],
    ["ExpiredTokenException", /renew/],
    ["RequestExpired", /renew/],
    ["TokenRefreshRequired", /renew/],
    ["InvalidAccessKeyId", /check -k.*AWS_ACCESS_KEY_ID/],
    ["InvalidClientTokenId", /check -k.*AWS_ACCESS_KEY_ID/],
    ["UnrecognizedClientException", /check -k.*AWS_ACCESS_KEY_ID/],
    ["SignatureDoesNotMatch", /check -p.*AWS_SECRET_ACCESS_KEY/],
    ["InvalidSignatureException", /check -p.*AWS_SECRET_ACCESS_KEY/],
    ["AuthFailure", /check -p.*AWS_SECRET_ACCESS_KEY/],
    ["CredentialsProviderError", /spotmax_max_group_role.*-k and -p/],
    ["ECONNREFUSED", /network.*-r/],
    ["ENOTFOUND", /network.*-r/],
    ["ConnectionRefused", /network.*-r/],
    ["TimeoutError", /network.*-r/],
  ])("%s", (name, said) => {
    for (const error of [aws(name), new Error("reading s3://b/c", { cause: aws(name) })]) {
      expect(explain(error)).toMatch(said);
      expect(explain(error)).not.toContain("\n");
    }
  });

  test("a refusal without a name is one of access", () => {
    for (const error of [
      aws("UnknownError", "", forbidden),
      new Error("reading", { cause: aws("UnknownError", "", forbidden) }),
      new Error("take", { cause: new Error("reading", { cause: aws("UnknownError", "", forbidden) }) }),
    ])
      expect(explain(error)).toMatch(/role.*rights/);
  });

  test("a refusal with a name keeps its own meaning", () => {
    expect(explain(aws("SignatureDoesNotMatch", "m", forbidden))).toMatch(/check -p/);
    expect(explain(aws("ExpiredToken", "m", forbidden))).toMatch(/renew/);
  });

  test("what the caller knows better wins, also for a name's other spellings", () => {
    const special = { AccessDenied: "ask for s3:GetObject", QueueDoesNotExist: "no such queue", NoSuchKey: "upload it" };
    expect(explain(aws("NoSuchKey"), special)).toBe("upload it");
    expect(explain(aws("AccessDeniedException"), special)).toBe("ask for s3:GetObject");
    expect(explain(aws("UnknownError", "", forbidden), special)).toBe("ask for s3:GetObject");
    expect(explain(aws("AWS.SimpleQueueService.NonExistentQueue"), special)).toBe("no such queue");
  });

  test("an unknown error is told with its name and in AWS's words, what was being done first", () => {
    const said = explain(new Error("reading s3://b/c", { cause: aws("OddError", "the moon is wrong") }));
    expect(said).toMatch(/OddError.*reading s3:\/\/b\/c.*the moon is wrong/);
  });
});

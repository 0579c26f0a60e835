import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

const root = join(import.meta.dir, "../..");
const text = readFileSync(join(root, "conf/spotmax_init.yml"), "utf8");

interface Statement {
  Sid?: string;
  Effect: "Allow" | "Deny";
  Action: string | string[];
  Resource?: string | string[];
  Condition?: Record<string, Record<string, string | string[]>>;
}
interface Resource {
  Type: string;
  DeletionPolicy?: string;
  // biome-ignore lint/suspicious/noExplicitAny: a template is whatever CloudFormation takes
  Properties: Record<string, any>;
}

// CloudFormation's short tags (!Sub, !GetAtt, ...) are dropped by the parser: `!GetAtt Q.Arn` reads "Q.Arn".
const template = Bun.YAML.parse(text) as { Resources: Record<string, Resource> };
const resources = Object.entries(template.Resources);
const resource = (name: string) => {
  const found = template.Resources[name];
  if (found === undefined) throw new Error(`no resource ${name}`);
  return found.Properties;
};
const ofType = (type: string) => resources.filter(([, { Type }]) => Type === type);
/** A parameter inside a !Sub. */
const sub = (name: string) => `\${${name}}`;
const list = <T>(value: T | T[]) => (Array.isArray(value) ? value : [value]);

/** The role's statements; `!If [CONDITION, STATEMENT, AWS::NoValue]` reads as an array of the three. */
const roleStatements: Statement[] = resource("Role").Policies.flatMap(
  (policy: { PolicyDocument: { Statement: (Statement | [string, Statement, string])[] } }) =>
    policy.PolicyDocument.Statement.map((entry) => (Array.isArray(entry) ? entry[1] : entry)),
);
const allowed = roleStatements.filter(({ Effect }) => Effect === "Allow");
const statementsFor = (action: string) => allowed.filter((entry) => list(entry.Action).includes(action));

/** For each statement that allows an action: the kinds of resources, and the tag that limits it. */
const limits = (action: string) =>
  statementsFor(action).map(({ Resource, Condition }) => {
    const kinds = list(Resource ?? []).map((arn) => /:([\w*]+)\/\*$/.exec(arn)?.[1] ?? arn);
    return `${kinds.join(" ")} ${Object.keys(Condition?.StringLike ?? {}).join()}`;
  });

const describeActions = [
  "autoscaling:DescribeAutoScalingGroups",
  "autoscaling:DescribeAutoScalingInstances",
  "autoscaling:DescribeLifecycleHooks",
  "autoscaling:DescribeScalingActivities",
  "ec2:DescribeInstances",
  "ec2:DescribeInstanceTypeOfferings",
  "ec2:DescribeLaunchTemplateVersions",
  "ec2:DescribeSnapshots",
  "ec2:DescribeSubnets",
  "ec2:DescribeVolumes",
  "ec2:GetInstanceTypesFromInstanceRequirements",
  "elasticloadbalancing:DescribeTargetHealth",
];
/** These act on "*", limited by a condition. */
const launchActions = ["ec2:CreateFleet", "ec2:RunInstances"];
const limitedActions = [
  "autoscaling:AttachInstances",
  "autoscaling:CreateOrUpdateTags",
  "autoscaling:DeleteTags",
  "autoscaling:DetachInstances",
  "autoscaling:SetInstanceProtection",
  "autoscaling:TerminateInstanceInAutoScalingGroup",
  "autoscaling:UpdateAutoScalingGroup",
  "ec2:AttachVolume",
  "ec2:CreateSnapshot",
  "ec2:CreateTags",
  "ec2:CreateVolume",
  "ec2:ModifyInstanceAttribute",
  "ec2:TerminateInstances",
  "iam:CreateServiceLinkedRole",
  "iam:PassRole",
  "kms:CreateGrant",
  "kms:Decrypt",
  "kms:DescribeKey",
  "kms:GenerateDataKeyWithoutPlaintext",
  "kms:ReEncryptFrom",
  "kms:ReEncryptTo",
  "s3:GetObject",
  "s3:ListBucket",
  "sqs:ChangeMessageVisibility",
  "sqs:DeleteMessage",
  "sqs:GetQueueAttributes",
  "sqs:ReceiveMessage",
  "sqs:SendMessage",
  "ssm:GetParameters",
];

describe("the role", () => {
  test("has the actions that this version uses, spelled out, and no others", () => {
    const actions = allowed.flatMap(({ Action }) => list(Action));
    expect([...new Set(actions)].sort()).toEqual([...describeActions, ...launchActions, ...limitedActions].sort());
  });

  test("acts on everything only where an action knows no resources, or where a condition limits it", () => {
    const unlimited = allowed.filter(({ Resource }) => list(Resource).includes("*"));
    expect(
      unlimited
        .filter(({ Condition }) => !Condition)
        .flatMap(({ Action }) => list(Action))
        .sort(),
    ).toEqual([...describeActions].sort());
    expect(unlimited.filter(({ Condition }) => Condition).flatMap(({ Action }) => list(Action))).toEqual(launchActions);
  });

  test("writes two keys of its own on groups, and no other", () => {
    expect(statementsFor("autoscaling:CreateOrUpdateTags").map(({ Condition }) => Condition)).toEqual([
      { "ForAllValues:StringEquals": { "aws:TagKeys": ["spotmax:max_size", "spotmax:cooldown"] } },
    ]);
  });

  test("changes only the groups that the parameter names", () => {
    for (const action of limitedActions.filter((name) => name.startsWith("autoscaling:"))) {
      for (const { Resource } of statementsFor(action)) {
        expect(Resource).toEndWith(`:autoScalingGroup:*:autoScalingGroupName/${sub("GroupNamePattern")}`);
      }
    }
  });

  test("ends only instances that carry a tag of ours, and tags only those and members of the groups", () => {
    expect(limits("ec2:TerminateInstances")).toEqual([
      "instance aws:ResourceTag/spotmax:group",
      "instance aws:ResourceTag/spotmax:detached",
    ]);
    expect(limits("ec2:CreateTags")).toEqual([
      "* ", // as part of a launch
      "instance aws:ResourceTag/spotmax:group",
      "instance aws:ResourceTag/aws:autoscaling:groupName",
      "volume aws:RequestTag/spotmax:group",
      "volume snapshot ", // as part of a copy
    ]);
    expect(statementsFor("ec2:CreateTags").map(({ Condition }) => Condition?.StringEquals)).toEqual([
      { "ec2:CreateAction": ["CreateFleet", "RunInstances"] },
      undefined,
      undefined,
      undefined,
      { "ec2:CreateAction": ["CreateSnapshot", "CreateVolume"] },
    ]);
  });

  test("tags volumes with two keys only, and never over the tag of a group outside the pattern", () => {
    const [statement] = statementsFor("ec2:CreateTags").filter(({ Sid }) => Sid === "TagVolumes");
    expect(statement?.Condition).toEqual({
      StringLike: { "aws:RequestTag/spotmax:group": "GroupNamePattern" },
      StringLikeIfExists: { "aws:ResourceTag/spotmax:group": "GroupNamePattern" },
      "ForAllValues:StringEquals": { "aws:TagKeys": ["spotmax:group", "spotmax:volume", "spotmax:copied"] },
    });
  });

  test("attaches and copies only what carries our tag, and makes only what carries it from the start", () => {
    expect(limits("ec2:AttachVolume")).toEqual(["instance volume aws:ResourceTag/spotmax:group"]);
    // A condition on the request holds for each resource of the call: with one on the original too, anything goes.
    expect(limits("ec2:CreateSnapshot")).toEqual([
      "volume aws:ResourceTag/spotmax:group",
      "snapshot aws:RequestTag/spotmax:group",
    ]);
    expect(limits("ec2:CreateVolume")).toEqual(["snapshot aws:ResourceTag/spotmax:group", "volume aws:RequestTag/spotmax:group"]);
  });

  test("changes nothing of an instance but how long its volumes stay, and only of instances it may know", () => {
    expect(limits("ec2:ModifyInstanceAttribute")).toEqual([
      "instance aws:ResourceTag/aws:autoscaling:groupName",
      "instance aws:ResourceTag/spotmax:group",
      "instance aws:ResourceTag/spotmax:detached",
      "volume ", // named in the call; the instance decides
    ]);
    for (const { Condition } of statementsFor("ec2:ModifyInstanceAttribute").slice(0, -1)) {
      expect(Condition?.StringLikeIfExists).toEqual({ "ec2:Attribute": "*lockDeviceMapping*" });
    }
  });

  test("may delete or detach no volume, no snapshot and no tag of either", () => {
    const actions = allowed.flatMap(({ Action }) => list(Action)).filter((action) => action.startsWith("ec2:"));
    expect(actions.filter((action) => /Delete|Detach|ModifyVolume|ModifySnapshot/.test(action))).toEqual([]);
  });

  test("names snapshots without an account, as AWS does", () => {
    const arns = allowed.flatMap(({ Resource }) => list(Resource ?? [])).filter((arn) => arn.includes(":snapshot/"));
    expect(arns).not.toEqual([]);
    for (const arn of arns) expect(arn).toEndWith(`:ec2:${sub("AWS::Region")}:*:snapshot/*`);
  });

  test("launches nothing without our tag", () => {
    const denied = roleStatements.filter(({ Effect }) => Effect === "Deny");
    expect(denied).toHaveLength(1);
    expect(denied[0]?.Action).toBe("ec2:RunInstances");
    expect(denied[0]?.Condition).toEqual({ Null: { "aws:RequestTag/spotmax:group": "true" } });
  });

  test("hands roles to EC2 only", () => {
    for (const { Condition } of statementsFor("iam:PassRole")) {
      expect(Condition?.StringEquals?.["iam:PassedToService"]).toEqual(["ec2.amazonaws.com", `ec2.${sub("AWS::URLSuffix")}`]);
    }
  });

  test("fits into an inline policy: at most 10,240 characters, long names filled in", () => {
    const filled = JSON.stringify(roleStatements)
      .replaceAll(sub("AWS::Partition"), "aws-us-gov")
      .replaceAll(sub("AWS::Region"), "ap-southeast-1")
      .replaceAll(sub("AWS::AccountId"), "1".repeat(12))
      .replaceAll(/"(\w+Queue)\.Arn"/g, JSON.stringify(`arn:aws-us-gov:sqs:ap-southeast-1:${"1".repeat(12)}:${"q".repeat(80)}`))
      .replaceAll(sub("ConfigBucket.Arn"), `arn:aws-us-gov:s3:::${"b".repeat(63)}`)
      .replaceAll("ConfigBucket.Arn", `arn:aws-us-gov:s3:::${"b".repeat(63)}`)
      .replaceAll(/\$\{\w+Pattern\}|GroupNamePattern/g, "p".repeat(64))
      .replaceAll("VolumeKmsKeyArns", `arn:aws-us-gov:kms:ap-southeast-1:${"1".repeat(12)}:key/${"k".repeat(36)}`);
    expect(filled.length).toBeLessThan(10_240);
  });

  // The program and its role say the same thing twice, and would else drift apart.
  test.if(existsSync(join(root, "maxgroup.ts")))("may do every call that the program makes", () => {
    const prefixes: Record<string, string> = {
      "auto-scaling": "autoscaling",
      ec2: "ec2",
      sqs: "sqs",
      s3: "s3",
      "elastic-load-balancing-v2": "elasticloadbalancing",
    };
    /** Calls whose right has another name. */
    const rights: Record<string, string> = {
      "s3:HeadObject": "s3:GetObject",
      "s3:HeadBucket": "s3:ListBucket",
      "s3:ListObjectsV2": "s3:ListBucket",
      "sqs:ChangeMessageVisibilityBatch": "sqs:ChangeMessageVisibility",
      "sqs:DeleteMessageBatch": "sqs:DeleteMessage",
      "sqs:SendMessageBatch": "sqs:SendMessage",
    };
    const program = readFileSync(join(root, "maxgroup.ts"), "utf8");
    const actions = new Set(allowed.flatMap(({ Action }) => list(Action)));
    const missing: string[] = [];
    for (const [, names, client] of program.matchAll(/import\s*\{([^}]*)\}\s*from\s*"@aws-sdk\/client-([\w-]+)"/g)) {
      for (const [, call] of (names ?? "").matchAll(/\b(\w+)Command\b/g)) {
        const action = `${prefixes[client ?? ""] ?? client}:${call}`;
        if (!actions.has(rights[action] ?? action)) missing.push(action);
      }
    }
    expect(missing).toEqual([]);
  });
});

describe("the queues", () => {
  const queues = ofType("AWS::SQS::Queue");

  test("are the manual's three, with one dead-letter queue", () => {
    const parameters = (Bun.YAML.parse(text) as { Parameters: Record<string, { Default: string }> }).Parameters;
    const defaults = queues.map(([, { Properties }]) => parameters[Properties.QueueName]?.Default);
    expect(defaults).toEqual([undefined, "spot-interruption-notice", "dettach-event", "preact-termination"]);
  });

  test("keep messages for 14 days, encrypted, and give up after ten receives", () => {
    for (const [name, { Properties }] of queues) {
      expect(Properties.MessageRetentionPeriod).toBe(1209600);
      expect(Properties.SqsManagedSseEnabled).toBe(true);
      expect(Properties.RedrivePolicy).toEqual(
        name === "DeadLetterQueue" ? undefined : { deadLetterTargetArn: "DeadLetterQueue.Arn", maxReceiveCount: 10 },
      );
    }
  });

  test("each refuse connections without TLS, and let a service in only by the ARNs of the rules", () => {
    const policies = ofType("AWS::SQS::QueuePolicy");
    expect(policies.flatMap(([, { Properties }]) => Properties.Queues).sort()).toEqual(queues.map(([name]) => name).sort());
    const rules = ofType("AWS::Events::Rule").map(([name]) => `${name}.Arn`);
    for (const [, { Properties }] of policies) {
      const statements: Statement[] = Properties.PolicyDocument.Statement;
      expect(statements.filter(({ Effect }) => Effect === "Deny").map(({ Condition }) => Condition)).toEqual([
        { Bool: { "aws:SecureTransport": "false" } },
      ]);
      for (const { Condition } of statements.filter(({ Effect }) => Effect === "Allow")) {
        expect(Condition).toEqual({ ArnEquals: { "aws:SourceArn": rules } });
      }
    }
  });

  test("have an alarm on age each, and on every dead letter", () => {
    const alarms = ofType("AWS::CloudWatch::Alarm").map(([, { Properties }]) => Properties);
    expect(alarms.map(({ Dimensions }) => Dimensions[0].Value).sort()).toEqual(
      queues.map(([name]) => `${name}.QueueName`).sort(),
    );
    expect(alarms.find(({ MetricName }) => MetricName === "ApproximateNumberOfMessagesVisible")).toMatchObject({
      Dimensions: [{ Value: "DeadLetterQueue.QueueName" }],
      Threshold: 0,
      ComparisonOperator: "GreaterThanThreshold",
    });
  });
});

test("every rule feeds the interruption queue, and undelivered events go to the dead-letter queue", () => {
  const rules = ofType("AWS::Events::Rule");
  expect(rules.map(([, { Properties }]) => Properties.EventPattern["detail-type"][0]).sort()).toEqual([
    "AWS Health Event",
    "EC2 Instance Rebalance Recommendation",
    "EC2 Spot Instance Interruption Warning",
  ]);
  for (const [, { Properties }] of rules) {
    expect(Properties.Targets).toMatchObject([
      { Arn: "InterruptionQueue.Arn", DeadLetterConfig: { Arn: "DeadLetterQueue.Arn" } },
    ]);
  }
});

test("the bucket is private, encrypted and versioned, and outlives the stack", () => {
  expect(template.Resources.ConfigBucket?.DeletionPolicy).toBe("Retain");
  const bucket = resource("ConfigBucket");
  expect(Object.values(bucket.PublicAccessBlockConfiguration)).toEqual([true, true, true, true]);
  expect(bucket.VersioningConfiguration).toEqual({ Status: "Enabled" });
  expect(bucket.BucketEncryption).toBeDefined();
});

test("no partition, region or account is written down", () => {
  expect(text).not.toMatch(/arn:aws/);
  expect(text).not.toMatch(/\b(us|eu|ap|cn|sa|ca|me|af|il|mx)-[a-z]+-\d\b/);
  expect(text).not.toMatch(/\b\d{12}\b/);
});

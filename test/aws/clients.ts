// The simulator in the shape of the SDK's clients, without HTTP in between.
import type { AutoScalingClient } from "@aws-sdk/client-auto-scaling";
import type { EC2Client } from "@aws-sdk/client-ec2";
import type { ElasticLoadBalancingV2Client } from "@aws-sdk/client-elastic-load-balancing-v2";
import type { S3Client } from "@aws-sdk/client-s3";
import type { SQSClient } from "@aws-sdk/client-sqs";
import { exceptionName } from "./basics.ts";
import { AwsError, type Service, type World } from "./world.ts";

export interface Clients {
  ec2: Pick<EC2Client, "send">;
  autoscaling: Pick<AutoScalingClient, "send">;
  elbv2: Pick<ElasticLoadBalancingV2Client, "send">;
  sqs: Pick<SQSClient, "send">;
  s3: Pick<S3Client, "send">;
}

interface AnyCommand {
  input: object;
  constructor: { name: string };
}

/** A client of the world's `service`: `send(command, { abortSignal })`, typed as the SDK's own. */
export function client<S extends Service>(world: World, service: S): Clients[S] {
  const send = async (command: AnyCommand, options?: { abortSignal?: AbortSignal }): Promise<object> => {
    const operation = command.constructor.name.replace(/Command$/, "");
    try {
      return await world.call(service, operation, command.input, { signal: options?.abortSignal });
    } catch (error) {
      if (error instanceof AwsError) error.name = exceptionName(service, error.name);
      throw error;
    }
  };
  // One cast, here: the SDK's `send` is generic over some hundred commands, with callback overloads.
  return { send } as unknown as Clients[S];
}

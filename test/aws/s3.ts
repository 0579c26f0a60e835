// S3, as far as a configuration file needs it.
import { createHash } from "node:crypto";
import type { GetObjectRequest, HeadBucketRequest, PutObjectRequest } from "@aws-sdk/client-s3";
import { AwsError } from "./basics.ts";
import type { Handlers, World } from "./world.ts";

interface StoredObject {
  body: string;
  etag: string;
  modifiedMs: number;
}

export interface Bucket {
  name: string;
  objects: Map<string, StoredObject>;
  /** Every request on this bucket answers AccessDenied. */
  denied: boolean;
}

export class S3 {
  readonly #world: World;
  readonly buckets = new Map<string, Bucket>();

  constructor(world: World) {
    this.#world = world;
  }

  readonly operations: Handlers = {
    HeadBucket: (input: HeadBucketRequest) => {
      // A HEAD has no body, and so no code: the SDK names the error by its status.
      const bucket = this.buckets.get(named(input.Bucket));
      if (!bucket) throw new AwsError("NotFound", "UnknownError", 404);
      if (bucket.denied) throw new AwsError("403", "UnknownError", 403);
      return { BucketRegion: this.#world.region };
    },

    GetObject: (input: GetObjectRequest) => {
      const object = this.#bucket(input.Bucket).objects.get(required(input.Key, "Key"));
      if (!object) throw new AwsError("NoSuchKey", "The specified key does not exist.", 404);
      if (input.IfNoneMatch === object.etag) throw new AwsError("304", "UnknownError", 304);
      if (input.IfMatch !== undefined && input.IfMatch !== object.etag)
        throw new AwsError("PreconditionFailed", "At least one of the pre-conditions you specified did not hold", 412);
      const bytes = new TextEncoder().encode(object.body);
      return {
        Body: {
          transformToString: async () => object.body,
          transformToByteArray: async () => bytes,
        },
        ContentLength: bytes.length,
        ContentType: "binary/octet-stream",
        ETag: object.etag,
        LastModified: new Date(Math.floor(object.modifiedMs / 1000) * 1000),
        Metadata: {},
      };
    },

    PutObject: (input: PutObjectRequest) => {
      const bucket = this.#bucket(input.Bucket);
      const body = input.Body ?? "";
      if (typeof body !== "string" && !(body instanceof Uint8Array))
        throw new Error("the simulator's PutObject takes strings and bytes only");
      const text = typeof body === "string" ? body : new TextDecoder().decode(body);
      return { ETag: this.put(bucket.name, required(input.Key, "Key"), text) };
    },
  };

  createBucket(name: string): Bucket {
    const bucket: Bucket = { name, objects: new Map(), denied: false };
    this.buckets.set(name, bucket);
    return bucket;
  }

  /** Stores an object; its bucket is made if absent. Returns the ETag. */
  put(bucketName: string, key: string, body: string): string {
    const bucket = this.buckets.get(bucketName) ?? this.createBucket(bucketName);
    const etag = `"${createHash("md5").update(body).digest("hex")}"`;
    bucket.objects.set(key, { body, etag, modifiedMs: this.#world.now() });
    return etag;
  }

  #bucket(name: string | undefined): Bucket {
    const bucket = this.buckets.get(named(name));
    if (!bucket) throw new AwsError("NoSuchBucket", "The specified bucket does not exist", 404);
    if (bucket.denied) throw new AwsError("AccessDenied", "Access Denied", 403);
    return bucket;
  }
}

function named(name: string | undefined): string {
  const bucket = required(name, "Bucket");
  if (!/^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$/.test(bucket))
    throw new AwsError("InvalidBucketName", "The specified bucket is not valid.");
  return bucket;
}

// The SDK itself refuses a request without its path parameters, before anything is sent.
function required(value: string | undefined, parameter: string): string {
  if (!value) throw new Error(`No value provided for input HTTP label: ${parameter}.`);
  return value;
}

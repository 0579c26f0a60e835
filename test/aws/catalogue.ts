// About forty real instance types, with prices of us-east-1 in dollars an hour (the spot ones of some day).

export interface InstanceTypeFacts {
  vcpus: number;
  memoryMib: number;
  architecture: "x86_64" | "arm64";
  spotPrice: number;
  onDemandPrice: number;
  generation: "current" | "previous";
  burstable: boolean;
  manufacturer: "intel" | "amd" | "amazon-web-services";
}

const ROWS = `
t3.medium 2 4 0.0149 0.0416
t3.large 2 8 0.0301 0.0832
t3a.large 2 8 0.0255 0.0752
t4g.large 2 8 0.0262 0.0672
m4.large 2 8 0.0371 0.1
m4.xlarge 4 16 0.0745 0.2
m5.large 2 8 0.0382 0.096
m5.xlarge 4 16 0.0771 0.192
m5.2xlarge 8 32 0.1523 0.384
m5.4xlarge 16 64 0.3012 0.768
m5a.large 2 8 0.0344 0.086
m5a.xlarge 4 16 0.0699 0.172
m5a.2xlarge 8 32 0.1387 0.344
m5d.large 2 8 0.0411 0.113
m5n.large 2 8 0.0421 0.119
m6i.large 2 8 0.0379 0.096
m6i.xlarge 4 16 0.0762 0.192
m6i.2xlarge 8 32 0.1534 0.384
m6a.large 2 8 0.0341 0.0864
m6a.xlarge 4 16 0.0688 0.1728
m6g.large 2 8 0.0308 0.077
m6g.xlarge 4 16 0.0617 0.154
m7g.large 2 8 0.0327 0.0816
m7i.large 2 8 0.0404 0.1008
c4.large 2 3.75 0.0331 0.1
c5.large 2 4 0.0352 0.085
c5.xlarge 4 8 0.0704 0.17
c5.2xlarge 8 16 0.1411 0.34
c5a.large 2 4 0.0311 0.077
c5a.xlarge 4 8 0.0626 0.154
c6i.large 2 4 0.0349 0.085
c6i.xlarge 4 8 0.0698 0.17
c6a.large 2 4 0.0313 0.0765
c6g.large 2 4 0.0277 0.068
c6g.xlarge 4 8 0.0554 0.136
r4.large 2 15.25 0.0333 0.133
r5.large 2 16 0.0389 0.126
r5.xlarge 4 32 0.0781 0.252
r5a.large 2 16 0.0362 0.113
r6i.large 2 16 0.0392 0.126
r6g.large 2 16 0.0321 0.1008
r6g.xlarge 4 32 0.0644 0.2016
`;

export const INSTANCE_TYPES: ReadonlyMap<string, InstanceTypeFacts> = new Map(
  ROWS.trim()
    .split("\n")
    .map((row): [string, InstanceTypeFacts] => {
      const [type = "", vcpus, gib, spot, onDemand] = row.split(" ");
      const family = type.split(".")[0] ?? "";
      const arm = /^[a-z]+\d+g/.test(family);
      return [
        type,
        {
          vcpus: Number(vcpus),
          memoryMib: Number(gib) * 1024,
          architecture: arm ? "arm64" : "x86_64",
          spotPrice: Number(spot),
          onDemandPrice: Number(onDemand),
          generation: /^[a-z]4$/.test(family) ? "previous" : "current",
          burstable: family.startsWith("t"),
          manufacturer: arm ? "amazon-web-services" : /\da/.test(family) ? "amd" : "intel",
        },
      ];
    }),
);

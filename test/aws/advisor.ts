// The Spot Advisor's public file, served as S3 does it: an ETag, and 304 to whoever has that copy already. It shares
// its form with the file that real AWS publishes, and nothing else with the simulator: no zones, no time stamp.

export const RANGES = [
  { index: 0, label: "<5%", dots: 0, max: 5 },
  { index: 1, label: "5-10%", dots: 1, max: 11 },
  { index: 2, label: "10-15%", dots: 2, max: 16 },
  { index: 3, label: "15-20%", dots: 3, max: 22 },
  { index: 4, label: ">20%", dots: 4, max: 100 },
];

/** Bands (0 to 4) by instance type. */
export type Bands = Record<string, number>;

export class SpotAdvisor {
  /** By region and platform. */
  regions: Record<string, { Linux?: Bands; Windows?: Bands }> = {};
  /** Every answer until this is undefined again: a status, or a body that is not the file. */
  fault: { status: number; body?: string } | undefined;
  /** How often the whole file went out, and how often nothing had changed. */
  served = 0;
  unchanged = 0;

  constructor(linux: Bands = {}, region = "us-east-1") {
    this.regions[region] = { Linux: linux };
  }

  body(): string {
    const facts = (bands: Bands = {}) => Object.fromEntries(Object.entries(bands).map(([type, r]) => [type, { s: 60, r }]));
    const spot_advisor = Object.fromEntries(
      Object.entries(this.regions).map(([region, { Linux, Windows }]) => [
        region,
        { Linux: facts(Linux), Windows: facts(Windows) },
      ]),
    );
    return JSON.stringify({ global_rate: "<10%", instance_types: {}, ranges: RANGES, spot_advisor });
  }

  answer(ifNoneMatch: string | null): Response {
    if (this.fault) return new Response(this.fault.body ?? "Service Unavailable", { status: this.fault.status });
    const body = this.body();
    const etag = `"${Bun.hash(body).toString(16)}"`;
    if (ifNoneMatch === etag) {
      this.unchanged++;
      return new Response(null, { status: 304, headers: { etag } });
    }
    this.served++;
    return new Response(body, { headers: { etag, "content-type": "application/json" } });
  }
}

// Bugs put into the program on purpose, to see that the lives would find them: a check on the checks. Each is a
// change of a few words in a copy of maxgroup.ts, which stays as it is. A change that fits nowhere, or in more than
// one place, is an error: then the program has moved on, and the words here must follow.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Feature } from "./life.ts";

export interface Mutation {
  name: string;
  /** What a life must have for it to matter, where few lives have it all: those that look for it are given it. */
  given?: Feature[];
  /** A life that finds it: the first one, when this was written. It is tried before the others, and saves minutes. */
  seed: number;
  /** What to look for, and what stands there instead. */
  edits: [find: RegExp, put: string][];
}

export const MUTATIONS: Mutation[] = [
  {
    name: "every launch call has a token of its own",
    seed: 33,
    edits: [
      [
        /`launching \$\{count\} \$\{lifecycle\}`,\s*\(o\) => [^\n]*/,
        // biome-ignore lint/suspicious/noTemplateCurlyInString: it is source text
        "`launching ${count}`, (o) => ctx.deps.ec2.send(new CreateFleetCommand({ ...request, ClientToken: crypto.randomUUID() }), o),",
      ],
    ],
  },
  {
    name: "the maximum is never put back",
    seed: 10,
    edits: [[/\(await part\([^\n]*restoreMaximum\([^\n]*, true\)\)/, "false"]],
  },
  {
    name: "the maximum is put back without looking twice",
    seed: 10,
    edits: [
      [/if \(isOurs\(group\.max\) && !isDue\([^\n]*return true;/, ""],
      [/if \(isBusy\(claims\) \|\| [^\n]*return true;/, ""],
    ],
  },
  {
    name: "a message is deleted when it is received",
    seed: 1,
    edits: [[/const result = await runSteps\(ctx, work\);/, "await remove();\n    const result = await runSteps(ctx, work);"]],
  },
  {
    name: "the old one is detached before the new one is attached",
    seed: 4,
    edits: [
      [
        /if \(standing === "healthy" && !refused\) return "decrement";/,
        'if (standing !== "none" && !refused) return "decrement";',
      ],
      [/else if \(decrement && !item\.forced [^\n]*"not ready"\);/, ""],
    ],
  },
  { name: "the deadline is a minute late", seed: 16, edits: [[/deadlineSeconds: 120,/, "deadlineSeconds: 180,"]] },
  {
    name: "what is in no group is never swept up",
    given: ["rebalance", "meddling", "waves"],
    seed: 1,
    edits: [[/return x\.ageMs > LEAK_MS \? "end outside" : "leave";/, 'return "leave";']],
  },
  {
    name: "of two replacements the loser stays",
    given: ["daemons", "stale", "duplicates", "waves"],
    seed: 16,
    edits: [
      [/if \(!x\.isWinner && x\.winnerInService\) return "end outside";/, 'if (!x.isWinner) return "leave";'],
      [/if \(!x\.isWinner\) return x\.winnerInService \? "end member" : "leave";/, 'if (!x.isWinner) return "leave";'],
    ],
  },
  {
    name: "no termination message is sent",
    seed: 10,
    edits: [[/\{ name: "send termination message", run: sendTerminationMessage \},/, ""]],
  },
  {
    name: "whatever a termination message names is ended",
    seed: 11,
    edits: [[/const isMarked = old\?\.tags\[TAG\.detached\] === group;/, "const isMarked = true;"]],
  },
  {
    name: "an old one is tagged after it is detached",
    seed: 1,
    edits: [
      [/await ctx\.cloud\.tag\(\s*ready\.map\(\(i\) => i\.old\),\s*\{ \[TAG\.detached\]: name \},\s*\);/, ""],
      [
        /await settle\(ctx, name, settled\);\n {2}return items/,
        "if (ready.length) await ctx.cloud.tag(ready.map((i) => i.old), { [TAG.detached]: name });\n  await settle(ctx, name, settled);\n  return items",
      ],
    ],
  },
  {
    name: "the replacement stays protected from scale-in",
    seed: 1,
    edits: [
      [/filter\(\(c\) => c\.isProtected !== c\.keepProtected\)/, "filter((c) => c.keepProtected)"],
      [/await part\([^\n]* release\(ctx, g\)[^\n]*/, ""],
    ],
  },
  {
    name: "nobody looks for an earlier launch",
    seed: 9,
    edits: [[/const claim = await standsFor\(ctx, work\.instance\);/, "const claim = winner([]);"]],
  },
  { name: "a batch is tagged in the order of the answer", seed: 111, edits: [[/\n {2}ids\.sort\(\);/, ""]] },
  {
    name: "preaction takes whom it finds, however young",
    seed: 21,
    edits: [[/band === undefined \|\| ageMs < GROWN_MS/, "band === undefined"]],
  },
  {
    name: "preaction takes any type",
    seed: 28,
    edits: [[/\? \[undefined\] : old\?\.spot \? \(work\.better \?\? \[\]\) : \[\];/, "? [undefined] : [undefined];"]],
  },
  {
    name: "preaction turns to on-demand",
    seed: 59,
    edits: [[/rungsFor\(spotMember, deadlineMs !== undefined,/, "rungsFor(spotMember, true,"]],
  },
  {
    name: "preaction does not count what is in hand",
    seed: 61,
    edits: [
      [/work\.isAdmitted = isBegun \|\| [^\n]*;/, "work.isAdmitted = true;"],
      [/const inHand = isBegun \? 0 : olds\.size;/, "const inHand = 0;"],
      [/const room = x\.limit - x\.inHand\.length;/, "const room = x.limit;"],
    ],
  },
  {
    name: "a fallback goes back at once",
    seed: 39,
    edits: [[/ageMs >= Math\.max\(x\.leastLiveMs, YOUNG_MS\)/, "ageMs >= 0"]],
  },
  {
    name: "leases are never renewed",
    seed: 22,
    edits: [[/if \([^\n]*>= dueMs\) void hold\([^\n]*/, ""]],
  },
  { name: "a data volume is not kept beyond its instance", seed: 11, edits: [[/if \(!volume\.ends\) return;/, "return;"]] },
  {
    name: "a data volume does not say whose it is",
    seed: 11,
    edits: [[/const tag = ctx\.cloud\.tag\(\[volume\.id\], [^\n]*/, "const tag = undefined;"]],
  },
  {
    name: "the second generation's data is taken from the template's device",
    seed: 11,
    edits: [[/if \(i\.volumes\[DATA_DEVICE\]\) return DATA_DEVICE;/, ""]],
  },
  {
    name: "a replacement's empty volume counts as its data",
    seed: 15,
    edits: [[/!i\.volumes\[DATA_DEVICE\] && \(await isDataElsewhere\(ctx, i, persistence_dev\)\)/, "false"]],
  },
  {
    name: "the replacement of another notice gets the data",
    seed: 11,
    edits: [
      [
        /await standsFor\(ctx, work\.instance, true\);/,
        "winner([...ctx.state.claims.values()].filter((c) => TAG.attached in c.tags));",
      ],
    ],
  },
  {
    name: "a snapshot is made before the instance has ended",
    seed: 11,
    edits: [
      [/if \(data\.state !== "available"\) \{/, 'if (data.state !== "available" && data.zone === target.zone) {'],
      [/if \(ended && ended\.state !== "terminated"\)[^\n]*/, ""],
    ],
  },
  {
    name: "a snapshot is made without looking for an earlier one",
    seed: 11,
    edits: [[/if \(!snapshot\?\.SnapshotId\) \{/, "if (true) {"]],
  },
  { name: "a copy loses the tags of its volume", seed: 11, edits: [[/=> \[\.\.\.mine, \{/, "=> [{"]] },
  { name: "volumes that are left are not asked after", seed: 67, edits: [[/await part\("volumes", [^\n]*/, ""]] },
  {
    name: "owners of data share a launch",
    seed: 73,
    edits: [[/const alone = options\.persistence_dev \? work\.instance : "";/, 'const alone = "";']],
  },
  { name: "an original that was copied does not say so", seed: 11, edits: [[/await ctx\.cloud\.tag\(others, [^\n]*/, ""]] },
  {
    name: "any number is in hand without a deadline",
    given: ["rebalance", "waves"],
    seed: 16,
    edits: [[/if \(inHand >= limit\) return later/, "if (false) return later"]],
  },
  {
    name: "what is young is replaced",
    seed: 2,
    edits: [[/if \(old && cloudNow\(ctx\) - old\.launchedMs < YOUNG_MS\)/, "if (false)"]],
  },
  {
    name: "a configuration that cannot be read leaves no group",
    seed: 24,
    edits: [[/ctx\.deps\.log\.error\(`the configuration could not be refreshed[^\n]*/, "ctx.state.groups = new Map();"]],
  },
  { name: "the group's tags are not propagated", seed: 23, edits: [[/\.\.\.group\.propagatedTags,/, ""]] },
  {
    name: "a long delay ends with SQS's own",
    seed: 78,
    edits: [[/if \(dueMs !== undefined && dueMs - cloudNow\(ctx\) > 1_000\) return[^\n]*/, ""]],
  },
  {
    name: "one in Standby is replaced",
    seed: 56,
    edits: [
      [/if \(lifecycleState === "InService"\) return "go on";/, 'if (/InService|Standby/.test(lifecycleState)) return "go on";'],
    ],
  },
  {
    name: "pods go before their new node is there",
    seed: 25,
    edits: [[/\(await isNode\([^\n]*, isReady\)\)/, "true"]],
  },
  { name: "a drain knows no deadline", seed: 256, edits: [[/: deadlineMs - DRAIN_ENDS_MS;/, ": deadlineMs + 60_000;"]] },
  {
    name: "pods stay where they are",
    seed: 25,
    edits: [[/\{ name: "drain", when: "k8s_node_drain_option", run: drain \},/, ""]],
  },
  {
    name: "a drain waits for no pod",
    seed: 25,
    edits: [
      [/ {2}if \(d\.left\?\.length !== 0 && cloudNow\(ctx\) < d\.overMs\) return retry[^\n]*/, ""],
      [/round === 0 \|\| leftMs\(\) > 0; round\+\+/, "round === 0; round++"],
    ],
  },
  { name: "a node is never given back", seed: 85, edits: [[/releaseNodes\(ctx\)\.catch/, "Promise.resolve().catch"]] },
  {
    name: "a node is given back while its instance is being replaced",
    seed: 9,
    edits: [
      [
        /if \(x\.lifecycleState !== "InService" \|\| x\.isInHand \|\| x\.hasOpenClaim\) return false;/,
        'if (x.lifecycleState !== "InService") return false;',
      ],
      [/return x\.nowMs > \(deadlineMs === null \? [^;]*;/, "return x.nowMs > markedMs;"],
    ],
  },
  {
    name: "a node that somebody else had cordoned is uncordoned",
    seed: 36,
    edits: [[/ && node\.mark\?\.wasCordoned === false;/, ";"]],
  },
  { name: "services stay in Consul", seed: 20, edits: [[/\{ name: "deregister", when: "consul_port", run: deregister \},/, ""]] },
  {
    name: "the replacement's own agent is asked",
    seed: 15,
    edits: [
      [/const address = old\?\.address;/, "const address = (replacement ?? old)?.address;"],
      [/const other = replacement\?\.id === instance [^;]*;/, "const other = undefined;"],
    ],
  },
  {
    name: "an on-demand fallback does not say so",
    seed: 36,
    edits: [[/const isFallback = lifecycle === "on-demand" && [^;]*;/, "const isFallback = false;"]],
  },
  {
    name: "the pool that is being reclaimed is asked again",
    seed: 22,
    edits: [[/if \(old\?\.spot\) remember\(ctx, "spot", [^;]*;/, ""]],
  },
  {
    name: "protection is taken to be as the group has it",
    seed: 34,
    edits: [[/if \(isUnknown\) work/, "if (!notice.carried) work"]],
  },
  {
    name: "of a cluster's lists only the first page is read",
    given: ["pods", "emptyPages"],
    seed: 96,
    edits: [[/next = meta\.continue;/, "next = undefined;"]],
  },
];

const FOLDER = join(import.meta.dir, "../../node_modules/.cache/mutants");

/** Writes the program with this bug where its imports still resolve, and where git and the linter do not look. */
export async function writeMutant(mutation: Mutation): Promise<string> {
  let source = await Bun.file(join(import.meta.dir, "../../maxgroup.ts")).text();
  for (const [find, put] of mutation.edits) {
    const count = [...source.matchAll(new RegExp(find.source, `g${find.flags}`))].length;
    if (count !== 1) throw new Error(`the mutation "${mutation.name}" fits in ${count} places of maxgroup.ts: ${find.source}`);
    source = source.replace(find, () => put);
  }
  source = source.replaceAll(/ from "\.\//g, ' from "../../../');
  mkdirSync(FOLDER, { recursive: true });
  const path = join(FOLDER, `${mutation.name.replaceAll(/\W+/g, "-")}.${process.pid}.ts`);
  writeFileSync(path, source);
  return path;
}

import { describe, expect, test } from "bun:test";
import { nearest, parseConfig, snapshotIntervalMinutes, withTags } from "../../maxgroup.ts";
import { configOf, faultsOf, fixture, optionsOf, parse } from "./fixtures/index.ts";

const defaults = {
  detaching_delay_seconds: 20,
  max_num_of_terminated_one_time: 1,
  preaction_termination_delay_seconds: 10,
  preaction_detach_delay_seconds: 10,
  is_enable_preaction: false,
  k8s_node_drain_option: false,
  is_enable_od_fallback: true,
  od_least_live_mins: 15,
  k8s_node_drain_grace_second: 300,
  is_to_handle_rebalance_event: false,
  is_to_handle_maintenance_event: false,
  ignore_tag: false,
  alt: [],
};
const faults = (config: unknown) => faultsOf(JSON.stringify(config, null, 2));
const queue = (name: string, over: object) => ({ [name]: { queue_url: `https://sqs.example/1/${name}`, ...over } });

describe("what is read", () => {
  test("the manual's own sample, tabs and all, is accepted as it stands", () => {
    const config = parseConfig(fixture("manual_service_config.txt"));
    const url = "https://sqs.us-east-2.amazonaws.com/111111111111";
    const numbers = { visibility_timeout_seconds: 61, max_number_of_messages: 5, wait_time_seconds: 1 };
    expect(config.global).toEqual({
      interruption_evt_sqs: {
        queue_url: `${url}/spot-interruption-notice`,
        ...numbers,
        preaction_snapshot_interval_minutes: 20,
      },
      detach_evt_sqs: { queue_url: `${url}/dettach-event`, ...numbers },
      termination_evt_sqs: { queue_url: `${url}/preact-termination`, ...numbers },
      preaction_snapshot_interval_minutes: 0,
    });
    expect(config.groups).toEqual({
      spotmax_k8s: { ...defaults, max_num_of_terminated_one_time: 2, preaction_detach_delay_seconds: 5 },
    });
  });

  test("the sample that ships is accepted", async () => {
    expect(faultsOf(await Bun.file(`${import.meta.dir}/../../conf/service_config.json`).text())).toEqual([]);
  });

  test("what is absent gets its default", () => {
    const { groups, global, system } = parse({ ...configOf(), system: undefined });
    expect(groups.web).toEqual(defaults);
    for (const q of [global.interruption_evt_sqs, global.detach_evt_sqs, global.termination_evt_sqs])
      expect(q).toMatchObject({ visibility_timeout_seconds: 61, max_number_of_messages: 10, wait_time_seconds: 20 });
    expect(system).toMatchObject({ config_refresh_seconds: 60 });
    // Off, or left to conf/seelog.xml.
    for (const key of ["log_level", "listen", "webhook_url"] as const) expect(system[key]).toBeUndefined();
  });

  test("the detaching delay may be spelled in both of the manual's ways", () => {
    for (const key of ["detaching_delay_seconds", "dettaching_delay_seconds"])
      expect(optionsOf({ [key]: 7 })).toEqual({ ...defaults, detaching_delay_seconds: 7 });
  });

  test.each([
    [undefined, undefined, 0],
    [20, undefined, 20],
    [undefined, 30, 30],
    [20, 30, 30],
    [20, 0, 0],
  ])("the snapshot interval stands in the queue (%p) or in global (%p), which wins: %p", (inQueue, inGlobal, minutes) => {
    const global = {
      ...queue("interruption_evt_sqs", { preaction_snapshot_interval_minutes: inQueue }),
      preaction_snapshot_interval_minutes: inGlobal,
    };
    expect(snapshotIntervalMinutes(parse(configOf({ web: {} }, { global })))).toBe(minutes);
  });

  test("a port is a number or a string of digits", () => {
    expect(optionsOf({ consul_port: 8500 }).consul_port).toBe(8500);
    expect(optionsOf({ consul_port: "8500" }).consul_port).toBe(8500);
  });

  test("alt1 to altN are taken in the order of their numbers", () => {
    expect(optionsOf({ alt10: "c5.large", alt2: "m5a.large", alt1: "m5.metal-24xl", alt3: "u-6tb1.112xlarge" }).alt).toEqual([
      "m5.metal-24xl",
      "m5a.large",
      "u-6tb1.112xlarge",
      "c5.large",
    ]);
  });

  test("a byte order mark and Windows line ends are no fault", () => {
    expect(faultsOf(`\uFEFF${JSON.stringify(configOf(), null, 2).replaceAll("\n", "\r\n")}`)).toEqual([]);
  });
});

describe("what is refused", () => {
  test("a fault is one line with path, line, the value found and the values allowed", () => {
    const [head, fault, ...more] = faultsOf(`{
  "global": {
    "interruption_evt_sqs": {"queue_url": "https://sqs.example/1/a"},
    "detach_evt_sqs": {"queue_url": "https://sqs.example/1/b"},
    "termination_evt_sqs": {
      "queue_url": "https://sqs.example/1/c",
      "wait_time_seconds": 21
    }
  },
  "groups": {"web": {}}
}`);
    expect(more).toEqual([]);
    expect(head).toContain("service_config.json");
    expect(fault).toMatch(/global\.termination_evt_sqs\.wait_time_seconds .*line 7\b.* 21\b.* 0 to 20\b/);
  });

  test.each([
    ["detaching_delay_seconds", "20", /"20".*whole number/],
    ["detaching_delay_seconds", -1, /-1.*whole number/],
    ["detaching_delay_seconds", 1.5, /1\.5.*whole number/],
    ["dettaching_delay_seconds", "x", /"x".*whole number/],
    ["max_num_of_terminated_one_time", 0, /0.* 1 /],
    ["is_enable_preaction", "true", /"true".*true or false/],
    ["k8s_node_drain_option", 1, /1.*true or false/],
    ["consul_port", 0, /0.*1 to 65535/],
    ["consul_port", "65536", /"65536".*1 to 65535/],
    ["consul_port", "http", /"http".*1 to 65535/],
    ["persistence_dev", "sdf", /"sdf".*\/dev\/sdf/],
    ["persistence_dev", null, /null.*\/dev\/sdf/],
    ["k8s_config_file_path", "", /"".*path/],
    ["alt1", "large", /"large".*instance type/],
    ["alt2", 5, /5.*instance type/],
  ])("a group's %s may not be %j, and the fault says what it may be", (key, value, said) => {
    const [, fault, ...more] = faultsOf(JSON.stringify(configOf({ web: { [key]: value } }), null, 2));
    expect(more).toEqual([]);
    expect(fault).toContain(`groups.web.${key} `);
    expect(fault).toMatch(said);
    expect(fault).toMatch(/\bline 1[67]\b/);
  });

  test("a key that stands twice in one object is named, for JSON keeps the last one in silence", () => {
    const text = JSON.stringify(configOf({ web: { alt1: "c5.large" }, other: {} })).replace('"other"', '"web"');
    const [, fault, ...more] = faultsOf(text);
    expect(more).toEqual([]);
    expect(fault).toMatch(/groups\.web .*twice/);
  });

  test.each(["detach_evt_sqs", "termination_evt_sqs"])("the snapshot interval is no key of %s, where nobody reads it", (name) => {
    const [, fault] = faultsOf(
      JSON.stringify(configOf({ web: {} }, { global: queue(name, { preaction_snapshot_interval_minutes: 5 }) })),
    );
    expect(fault).toContain(`${name}.preaction_snapshot_interval_minutes`);
  });

  test.each([
    ["log_level", "loud", /debug, info, warn, error/],
    ["listen", "9090", /HOST:PORT/],
    ["listen", "127.0.0.1:99999", /HOST:PORT/],
    ["config_refresh_seconds", -1, /whole number/],
    ["webhook_url", "example.com", /URL/],
    ["spot_advisor_url", 1, /URL/],
  ])("system.%s may not be %j", (key, value, allowed) => {
    const [, fault, ...more] = faults(configOf({ web: {} }, { system: { [key]: value } }));
    expect(more).toEqual([]);
    expect(fault).toContain(`system.${key}`);
    expect(fault).toContain(JSON.stringify(value));
    expect(fault).toMatch(allowed);
  });

  test("a queue that delays no single message, a FIFO queue, is refused", () => {
    const global = queue("detach_evt_sqs", { queue_url: "https://sqs.example/1/detach.fifo" });
    const [, fault] = faults(configOf({ web: {} }, { global }));
    expect(fault).toMatch(/global\.detach_evt_sqs\.queue_url .*detach\.fifo.*standard queue/);
  });

  test("what is needed and missing is named", () => {
    const global = { ...queue("interruption_evt_sqs", { queue_url: undefined }), detach_evt_sqs: undefined };
    const said = faults(configOf({ web: {} }, { global })).join("\n");
    expect(said).toMatch(/global\.interruption_evt_sqs\.queue_url is missing/);
    expect(said).toMatch(/global\.detach_evt_sqs is missing/);
    expect(
      faults({})
        .slice(1)
        .map((line) => line.trim()),
    ).toEqual(["global is missing", "groups is missing"]);
  });

  test.each([
    ["", "globl", "global", { ...configOf(), globl: {} }],
    ["system.", "loglevel", "log_level", configOf({ web: {} }, { system: { loglevel: "info" } })],
    ["global.", "terminaton_evt_sqs", "termination_evt_sqs", configOf({ web: {} }, { global: { terminaton_evt_sqs: {} } })],
    [
      "global.detach_evt_sqs.",
      "wait_time_second",
      "wait_time_seconds",
      configOf({ web: {} }, { global: queue("detach_evt_sqs", { wait_time_second: 1 }) }),
    ],
    ["groups.web.", "k8s_node_drain", "k8s_node_drain_option", configOf({ web: { k8s_node_drain: true } })],
    ["groups.web.", "is_enable_od_falback", "is_enable_od_fallback", configOf({ web: { is_enable_od_falback: true } })],
  ])("an unknown key is refused with the nearest known name: %s%s", (path, key, near, config) => {
    const [, fault, ...more] = faults(config);
    expect(more).toEqual([]);
    expect(fault).toContain(`${path}${key} `);
    expect(fault).toContain(`"${near}"`);
    expect(fault).toMatch(/line \d+/);
  });

  test("a key that is like no other is refused with the known ones", () => {
    const [, fault] = faults(configOf({ web: { frobnicate: 1 } }));
    expect(fault).toMatch(/frobnicate.*detaching_delay_seconds/);
    expect(fault).not.toContain("did you mean");
  });

  test.each(["toString", "constructor", "valueOf"])("a key that every object has is unknown too: %s", (key) => {
    expect(faults(configOf({ web: { [key]: 1 } })).join("\n")).toContain(`groups.web.${key}`);
  });

  test("no group is dropped in silence for its name", () => {
    expect(Object.keys(parse(configOf({ web: {}, toString: {} })).groups)).toEqual(["web", "toString"]);
    for (const name of ["constructor", "prototype"])
      expect(faults(configOf({ web: {}, [name]: {} })).join()).toContain(`groups.${name}`);
  });

  test("all faults come at once", () => {
    const config = {
      ...configOf(
        { web: { detaching_delay_seconds: "x", alt1: 5, nonsense: 1 }, db: null },
        { system: { log_level: "loud", config_refresh_seconds: -1 }, global: { detach_evt_sqs: { queue_url: 1 } } },
      ),
      extra: 1,
    };
    const said = faults(config).slice(1);
    for (const path of [
      "system.log_level",
      "system.config_refresh_seconds",
      "global.detach_evt_sqs.queue_url",
      "groups.web.detaching_delay_seconds",
      "groups.web.alt1",
      "groups.web.nonsense",
      "groups.db",
      "extra",
    ])
      expect(said.filter((line) => line.trim().startsWith(`${path} `))).toHaveLength(1);
    expect(said).toHaveLength(8);
  });

  test("faults between keys come with the others", () => {
    const { global } = configOf();
    const config = configOf({}, { system: { log_level: "loud" }, global: { detach_evt_sqs: global.interruption_evt_sqs } });
    const said = faults(config).join("\n");
    expect(said).toContain("system.log_level");
    expect(said).toMatch(/groups/);
    expect(said).toMatch(/three (different )?queues/);
  });

  test.each([["["], ['{"a":']])("nesting without end is a fault like any other: %s", (open) => {
    expect(faultsOf(open.repeat(50_000))).toEqual(["service_config.json is nested too deeply: more than 100 levels"]);
    const inText = JSON.stringify(configOf({ [open.repeat(120).slice(0, 255)]: {} }));
    expect(faultsOf(inText)).toEqual([]);
  });

  test("a hundred faults are named, and the others counted", () => {
    const many = Object.fromEntries(Array.from({ length: 150 }, (_, n) => [`nonsense${n}`, n]));
    const said = faults(configOf({ web: many }));
    expect([said[0], said.length, said.at(-1)]).toEqual(["service_config.json has 150 faults:", 102, "  and 50 more"]);
  });

  test("a group's name that AWS refuses would take the others' calls down with it", () => {
    for (const name of ["", "x".repeat(256)])
      expect(faults(configOf({ web: {}, [name]: {} }))[1]).toContain("1 to 255 characters");
    expect(faults(configOf({ ["x".repeat(255)]: {} }))).toEqual([]);
  });

  test("two queues may not be one", () => {
    const { global } = configOf();
    for (const name of ["detach_evt_sqs", "termination_evt_sqs"])
      expect(faults(configOf({ web: {} }, { global: { [name]: global.interruption_evt_sqs } })).join("\n")).toMatch(/queues/);
  });

  test("at least one group is needed", () => {
    expect(faults(configOf({})).join("\n")).toMatch(/groups/);
  });

  test.each([["null"], ["[]"], ["5"], ['"x"'], ["true"]])("the file is an object and not %s", (json) => {
    expect(faultsOf(json)).not.toEqual([]);
  });

  test.each([
    ["system", { ...configOf(), system: [] }],
    ["global", { ...configOf(), global: [] }],
    ["groups", { ...configOf(), groups: [] }],
    ["groups.web", configOf({ web: [] })],
    ["groups.web", configOf({ web: 5 })],
    ["global.detach_evt_sqs", configOf({ web: {} }, { global: { detach_evt_sqs: "https://sqs.example/1/b" } })],
  ])("what must be an object is refused as anything else: %s", (path, config) => {
    expect(faults(config).join("\n")).toContain(path);
  });
});

// Line and column count from one, and name the first thing that cannot stand where it stands.
test.each([
  ["a comma too many in an object", '{\n  "a": 1,\n}', 3, 1],
  ["a comma too many in a list", '{\n  "a": [1,\n  ]}', 3, 3],
  ["a comma missing", '{\n  "a": 1\n  "b": 2\n}', 3, 3],
  ["a colon missing", '{\n  "a" 1\n}', 2, 7],
  ["a value missing", '{\n  "a": }', 2, 8],
  ["a name without quotes", "{\n  a: 1\n}", 2, 3],
  ["single quotes", "{\n  'a': 1\n}", 2, 3],
  ["a comment", '{\n  // why\n  "a": 1\n}', 2, 3],
  ["a tab within a string", '{\n\t"a": "x\ty"\n}', 2, 7],
  ["a string without an end", '{\n  "a": "b\n}', 2, 8],
  ["a word that is none of JSON's", '{\n  "a": tru\n}', 2, 8],
  ["a placeholder left in", '{\n  "groups": {YOUR-ASG-NAME: {}}\n}', 2, 14],
  ["a number that begins with 0", '{\n  "a": 01\n}', 2, 9],
  ["a brace missing at the end", '{\n  "a": {\n    "b": 1\n  }\n', 5, 1],
  ["a brace too many", '{\n  "a": 1\n}}', 3, 2],
  ["text behind the end", "{}\n\nend", 3, 1],
  ["Windows line ends", '{\r\n  "a": 1,\r\n  x\r\n}', 3, 3],
  ["a byte order mark, which is no column", "\uFEFF{x}", 1, 2],
  ["an empty file", "", 1, 1],
])("a syntax error is named with its line and column: %s", (_, json, line, column) => {
  const [said, ...more] = faultsOf(json);
  expect(more).toEqual([]);
  expect(said).toContain("service_config.json");
  expect(said).toEndWith(`line ${line}, column ${column}`);
});

test.each([
  ["detaching_delay_second", "detaching_delay_seconds"],
  ["consulport", "consul_port"],
  ["IS_ENABLE_PREACTION", undefined],
  ["something_else", undefined],
])("the nearest name to %s is %s", (name, near) => {
  expect(nearest(name, ["detaching_delay_seconds", "consul_port", "is_enable_preaction"])).toBe(near);
});

describe("tags on the group", () => {
  test("win over the file", () => {
    const { options, faults } = withTags(optionsOf({ detaching_delay_seconds: 5, consul_port: 8500 }), {
      "spotmax:detaching_delay_seconds": "30",
      "spotmax:is_enable_od_fallback": "false",
      "spotmax:is_to_handle_rebalance_event": "true",
      "spotmax:consul_port": "8600",
      "spotmax:persistence_dev": "/dev/sdf",
      "spotmax:k8s_node_drain_grace_second": "60",
    });
    expect(faults).toEqual([]);
    expect(options).toEqual({
      ...defaults,
      detaching_delay_seconds: 30,
      is_enable_od_fallback: false,
      is_to_handle_rebalance_event: true,
      consul_port: 8600,
      persistence_dev: "/dev/sdf",
      k8s_node_drain_grace_second: 60,
    });
  });

  test("may spell the detaching delay both ways", () => {
    expect(withTags(optionsOf(), { "spotmax:dettaching_delay_seconds": "30" })).toEqual({
      options: { ...defaults, detaching_delay_seconds: 30 },
      faults: [],
    });
  });

  test("may name extra instance types, one a tag, as the file does", () => {
    const tags = { "spotmax:alt2": "c5.large", "spotmax:alt1": "m5a.large" };
    expect(withTags(optionsOf(), tags)).toEqual({ options: { ...defaults, alt: ["m5a.large", "c5.large"] }, faults: [] });
    expect(withTags(optionsOf({ alt1: "t3.large" }), { "spotmax:alt1": "m5a.large" }).options.alt).toEqual(["m5a.large"]);
  });

  test("count for nothing with ignore_tag", () => {
    const options = optionsOf({ ignore_tag: true });
    expect(withTags(options, { "spotmax:detaching_delay_seconds": "30", "spotmax:consul_port": "x" })).toEqual({
      options,
      faults: [],
    });
  });

  test.each([
    ["spotmax:detaching_delay_seconds", "soon"],
    ["spotmax:detaching_delay_seconds", ""],
    ["spotmax:detaching_delay_seconds", "-5"],
    ["spotmax:max_num_of_terminated_one_time", "0"],
    ["spotmax:is_enable_preaction", "yes"],
    ["spotmax:consul_port", "70000"],
    ["spotmax:alt1", "large"],
    ["spotmax:detaching_delay", "5"],
    ["spotmax:constructor", "1"],
    ["spotmax:__proto__", "1"],
  ])("that are faulty are named and change nothing: %s = %j", (key, value) => {
    const { options, faults } = withTags(optionsOf({ detaching_delay_seconds: 5 }), {
      [key]: value,
      "spotmax:od_least_live_mins": "7",
    });
    expect(faults).toHaveLength(1);
    expect(faults[0]).toContain(key);
    expect(options).toEqual({ ...defaults, detaching_delay_seconds: 5, od_least_live_mins: 7 });
  });

  test("that are reserved, and those of others, are no options and no faults", () => {
    const tags = {
      "spotmax:group": "web",
      "spotmax:replaces": "i-1",
      "spotmax:order": "i-1",
      "spotmax:attached": "2026-03-01T12:00:00Z",
      "spotmax:detached": "web",
      "spotmax:max_size": "4/5",
      Name: "web",
      "aws:cloudformation:stack-name": "s",
      detaching_delay_seconds: "30",
    };
    expect(withTags(optionsOf(), tags)).toEqual({ options: optionsOf(), faults: [] });
  });

  test("never name a path", () => {
    const options = optionsOf({ k8s_config_file_path: "/etc/kube" });
    expect(withTags(options, { "spotmax:k8s_config_file_path": "/root/.aws/credentials" }).options).toEqual(options);
  });
});

// That what the servers of tests are started with keeps its promises.
import { expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Authority, areInstalled, freePorts, ServerProcess, temporaryFolder, until } from "./servers.ts";

const isSkipped = !areInstalled("servers of tests", ["setpriv", "openssl"], "util-linux and openssl have them");

/** A process that has ended may still wait for somebody to take note of it. */
const isRunning = (pid: number) => {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false; // somebody did
  }
};

test.skipIf(isSkipped)(
  "a server ends with the process that started it, killed or not, and its folder with one that was not",
  async () => {
    for (const signal of ["SIGKILL", undefined] as const) {
      const script = `
      const { ServerProcess, temporaryFolder } = await import(${JSON.stringify(join(import.meta.dir, "servers.ts"))});
      const { folder } = temporaryFolder("orphan");
      const { pid } = new ServerProcess("sleep", ["sleep", "300"], { folder });
      while (require("node:fs").readFileSync("/proc/" + pid + "/comm", "utf8") !== "sleep\\n") await Bun.sleep(10);
      console.log(JSON.stringify({ pid, folder }));
      ${signal ? "await Bun.sleep(60_000)" : "process.exit(0)"};`;
      const child = Bun.spawn([process.execPath, "-e", script], { stdout: "pipe", stderr: "inherit" });
      const lines = child.stdout.getReader();
      const { value } = await lines.read();
      const { pid, folder } = JSON.parse(new TextDecoder().decode(value)) as { pid: number; folder: string };
      if (signal) {
        expect(isRunning(pid)).toBe(true);
        child.kill(signal);
      }
      await child.exited;
      await until("the server has ended", async () => !isRunning(pid));
      if (!signal) expect(existsSync(folder)).toBe(false);
      else await Bun.$`rm -r ${folder}`;
    }
  },
);

test.skipIf(isSkipped)("a server that ends before it is ready is an error with the end of its log", async () => {
  const { folder, remove } = temporaryFolder("short");
  const server = new ServerProcess("short", ["sh", "-c", "echo no such luck >&2; exit 3"], { folder });
  await expect(server.waitUntil(async () => false)).rejects.toThrow("short ended at once:\nno such luck");
  remove();
});

test.skipIf(isSkipped)("a certificate is good for its addresses and no others", async () => {
  const { folder, remove } = temporaryFolder("tls");
  const authority = new Authority(folder);
  const { certFile, keyFile } = authority.issue("server", { addresses: ["127.0.0.2"] });
  const tls = { cert: readFileSync(certFile, "utf8"), key: readFileSync(keyFile, "utf8") };
  const server = Bun.serve({ hostname: "0.0.0.0", port: 0, tls, fetch: () => new Response("here") });
  const ask = (address: string) =>
    fetch(`https://${address}:${server.port}/`, { keepalive: false, tls: { ca: readFileSync(authority.certFile, "utf8") } });
  expect(await (await ask("127.0.0.2")).text()).toBe("here");
  await expect(ask("127.0.0.3")).rejects.toThrow();
  await server.stop(true);
  remove();
});

test("free ports are none that the kernel gives to outgoing connections, none that are taken, and none that were given before", async () => {
  const ports = await freePorts(50, ["127.0.0.1", "127.0.0.2"]);
  expect(new Set([...ports, ...(await freePorts(50))]).size).toBe(100);
  expect(Math.max(...ports)).toBeLessThan(32_768);
  await expect(freePorts(1, ["198.51.100.1"])).rejects.toThrow("no 1 free ports");
});

/**
 * Signs a license: `make license`, or `bun test/license.ts`.
 *
 *   make license LICENSE_FIELDS="Customer:ACME Expires:2027-12-31"
 *   make license LICENSE_FILE=acme.txt        # a file of Key:Value lines, for values with spaces
 *
 * Makes dist/license.key (PKCS8 PEM, mode 600) if there is none, prints the public key that
 * `make build LICENSE_PUBLIC_KEY=...` fixes in the program, and writes dist/license.txt. Keep the private key:
 * a program built with its public half accepts licenses signed with it, and no others.
 */
import { createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";

/**
 * The text of a license file: the `Key:Value` lines as given, and last `License:SIGNATURE`, the base64 of the
 * Ed25519 signature over the sorted lines, joined by "\n". Blank lines and an old `License` line are left out,
 * spaces around a line too. Throws where a line is no `Key:Value`, or a key comes twice.
 */
export function signLicense(lines: string[], privateKey: KeyObject): string {
  const fields = lines.map((line) => line.trim()).filter((line) => line !== "" && !line.startsWith("License:"));
  const keys = new Set<string>();
  for (const field of fields) {
    const key = /^([^:]+):\s*\S/.exec(field)?.[1];
    if (key === undefined) throw new Error(`not a Key:Value line: ${JSON.stringify(field)}`);
    if (keys.has(key)) throw new Error(`twice in the license: ${key}`);
    keys.add(key);
  }
  if (fields.length === 0) throw new Error("a license without a single Key:Value line");
  const signature = sign(null, Buffer.from([...fields].sort().join("\n")), privateKey);
  return `${[...fields, `License:${signature.toString("base64")}`].join("\n")}\n`;
}

/** The 32 raw bytes of an Ed25519 public key, in base64: what `LICENSE_PUBLIC_KEY` wants. */
export function rawPublicKey(key: KeyObject): string {
  const { x } = createPublicKey(key).export({ format: "jwk" });
  if (x === undefined) throw new Error("not an Ed25519 key");
  return Buffer.from(x, "base64url").toString("base64");
}

function main() {
  const keyFile = "dist/license.key";
  const licenseFile = "dist/license.txt";
  const fieldsFile = process.env.LICENSE_FILE ?? "";
  const fields = process.env.LICENSE_FIELDS ?? "";

  mkdirSync("dist", { recursive: true });
  if (!existsSync(keyFile)) {
    const pem = generateKeyPairSync("ed25519").privateKey.export({ type: "pkcs8", format: "pem" });
    writeFileSync(keyFile, pem, { mode: 0o600, flag: "wx" });
    console.log(`private key: ${keyFile}, new; keep it`);
  }
  const privateKey = createPrivateKey(readFileSync(keyFile));
  console.log(`public key:  ${rawPublicKey(privateKey)}`);

  const lines = fieldsFile !== "" ? readFileSync(fieldsFile, "utf8").split("\n") : fields.split(/\s+/);
  if (lines.every((line) => line.trim() === "")) {
    console.log(`nothing to sign: give LICENSE_FIELDS="Key:Value ..." or LICENSE_FILE=FILE`);
    return;
  }
  writeFileSync(licenseFile, signLicense(lines, privateKey));
  console.log(`license:     ${licenseFile}`);
}

if (import.meta.main) {
  try {
    main();
  } catch (error) {
    console.error(error instanceof Error ? error.message : error);
    process.exitCode = 1;
  }
}

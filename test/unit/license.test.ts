import { expect, test } from "bun:test";
import { generateKeyPairSync } from "node:crypto";
import { licenseFault } from "../../maxgroup.ts";
import { rawPublicKey, signLicense } from "../license.ts";

const pair = generateKeyPairSync("ed25519");
const key = rawPublicKey(pair.privateKey);
const now = Date.parse("2026-03-01T12:00:00Z");
const lines = ["Customer:ACME", "Expires:2027-12-31", "Note:a b:c"];
const license = signLicense(lines, pair.privateKey);
const fault = (text: string, atMs = now) => licenseFault(text, key, atMs);

test("a license signed for this build is good", () => {
  expect(fault(license)).toBeUndefined();
});

test("the order of its lines does not matter, nor do blank lines and Windows line ends", () => {
  expect(fault(license.trim().split("\n").reverse().join("\r\n\r\n"))).toBeUndefined();
  expect(fault(signLicense(lines.toReversed(), pair.privateKey))).toBeUndefined();
});

test("a license without an end is good for ever", () => {
  expect(fault(signLicense(["Customer:ACME"], pair.privateKey), Date.parse("2199-01-01"))).toBeUndefined();
});

test.each([
  ["a changed line", license.replace("ACME", "ACMF")],
  ["a changed end", license.replace("2027", "2037")],
  ["a line more", `Extra:1\n${license}`],
  ["a line less", license.replace("Note:a b:c\n", "")],
  ["a line twice", `Customer:ACME\n${license}`],
  ["another key's signature", signLicense(lines, generateKeyPairSync("ed25519").privateKey)],
  ["a signature that is none", `${lines.join("\n")}\nLicense:UNSIGNED\n`],
  ["no signature", `${lines.join("\n")}\n`],
  ["an empty signature", `${lines.join("\n")}\nLicense:\n`],
  ["nothing", ""],
])("a license with %s is refused in one line", (_, text) => {
  expect(fault(text)).toMatch(/^[^\n]*license[^\n]*$/i);
});

test("it holds through its last day", () => {
  expect(fault(license, Date.parse("2027-12-31T23:59:59Z"))).toBeUndefined();
  expect(fault(license, Date.parse("2028-01-01T00:00:00Z"))).toContain("2027-12-31");
});

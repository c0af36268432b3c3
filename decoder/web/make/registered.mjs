// Writes src/registered_networks.js from the file that the Python decoder ships: node make/registered.mjs
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";

const source = new URL("../../clric_decoder/weights/registered_networks.json", import.meta.url);
const target = new URL("../src/registered_networks.js", import.meta.url);
const text = readFileSync(source);
const entries = Object.entries(JSON.parse(text)).map(
  ([number, digits]) => `  ${number}: "${Buffer.from(digits, "hex").toString("base64")}",\n`,
);
writeFileSync(
  target,
  `/**
 * Networks segments of registered functions, in Base64. Made by make/registered.mjs from
 * registered_networks.json, sha256 ${createHash("sha256").update(text).digest("hex")}.
 */
export const NETWORKS = {
${entries.join("")}};
`,
);

// Bytes to latent in Node: the conformance suite, the tables of appendix A, and what callers see.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { table } from "../src/entropy.js";
import { fetchStream } from "../src/fetch.js";
import { decodeLatent, readHeader } from "../src/latent.js";
import { makeWasmDecoder } from "../src/wasm_decoder.js";
import { bigEndian, runSuite, sha256 } from "./suite.js";

const repository = new URL("../../../", import.meta.url);
const conformance = new URL("tests/conformance/", repository);
const sample = readFileSync(new URL("valid/worked-example.clric", conformance));

test("all conformance vectors decode, or are refused with their error", async () => {
  const { failures, streams } = await runSuite((path) => readFile(new URL(path, conformance)));
  assert.deepEqual(failures, []);
  assert.ok(streams > 100);
});

test("the probability tables are those of appendix A", async () => {
  const tables = [];
  for (let s = 0; s < 80; s++) for (let f = 0; f < 16; f++) tables.push(table(s, f));
  const stated = readFileSync(new URL("bitstream_spec.md", repository), "utf8").match(/all tables as [^`]*`([0-9a-f]{64})`/);
  assert.equal(await sha256(bigEndian(tables)), stated[1]);
});

test("the embedded networks are those that the Python decoder ships", () => {
  const shipped = readFileSync(new URL("decoder/clric_decoder/weights/registered_networks.json", repository));
  const embedded = readFileSync(new URL("../src/registered_networks.js", import.meta.url), "utf8");
  assert.ok(
    embedded.includes(createHash("sha256").update(shipped).digest("hex")),
    "run: node decoder/web/make/registered.mjs",
  );
});

test("an ArrayBuffer, a Uint8Array and a view into a larger buffer decode alike", () => {
  const larger = new Uint8Array(sample.length + 8);
  larger.set(sample, 5);
  const exact = Uint8Array.from(sample);
  const wanted = decodeLatent(exact).data;
  assert.deepEqual(decodeLatent(exact.buffer).data, wanted);
  assert.deepEqual(decodeLatent(larger.subarray(5, 5 + sample.length)).data, wanted);
  assert.throws(() => decodeLatent("clric"), TypeError);
});

test("the header says size and latent space, also from the first bytes alone", () => {
  const { width, height, space, bytes, bpp } = readHeader(sample);
  assert.deepEqual({ width, height, space }, { width: 16, height: 8, space: "sd1" });
  assert.deepEqual({ bytes, bpp }, { bytes: sample.length, bpp: (8 * sample.length) / 128 });
  assert.equal(readHeader(sample.subarray(0, 25), { partial: true }).width, 16);
  assert.throws(() => readHeader(sample.subarray(0, 25)), { code: "checksum" });
});

test("a file that is not clric is not downloaded to its end", async (context) => {
  let cancelled = false;
  const body = new ReadableStream({
    start: (controller) => controller.enqueue(new TextEncoder().encode("<!doctype html>")),
    cancel: () => (cancelled = true),
  });
  context.mock.method(globalThis, "fetch", async () => new Response(body));
  await assert.rejects(fetchStream("photo.clric", undefined, () => {}), { code: "magic" });
  assert.ok(cancelled);
});

test("the checksum of a download is told before what its header says, as the specification wants", async (context) => {
  const damaged = Uint8Array.from(sample);
  damaged[4] ^= 8; // a latent space that is not known
  const chunks = [damaged.subarray(0, 20), damaged.subarray(20)];
  const body = new ReadableStream({
    pull: (controller) => (chunks.length ? controller.enqueue(chunks.shift()) : controller.close()),
  });
  context.mock.method(globalThis, "fetch", async () => new Response(body));
  const bytes = await fetchStream("photo.clric", undefined, () => assert.fail("it has no header to tell"));
  assert.throws(() => decodeLatent(bytes), { code: "checksum" });
});

test("weights that are cut are refused", async () => {
  const wasm = readFileSync(new URL("../src/image_decoder.wasm", import.meta.url));
  const weights = new Uint8Array(readFileSync(new URL("../weights/small.bin", import.meta.url)));
  assert.equal((await makeWasmDecoder(wasm, weights)).space, "clric");
  await assert.rejects(makeWasmDecoder(wasm, weights.slice(0, -1000)), /its weights have/);
});

test("pages rendered on a server can import the element and the polyfill", async () => {
  await import("../src/element.js");
  await import("../src/polyfill.js");
});

test("the limit of pixels is the caller's", () => {
  assert.throws(() => decodeLatent(sample, { maxPixels: 127 }), { name: "ClricError", code: "limit" });
  assert.equal(decodeLatent(sample, { maxPixels: 128 }).width, 2);
});

test("damaged files end with an error of the specification", () => {
  for (let at = 0; at < sample.length; at++) {
    const damaged = Uint8Array.from(sample);
    damaged[at] ^= 0x55;
    assert.throws(() => decodeLatent(damaged), (error) => ["magic", "version", "checksum"].includes(error.code));
    assert.throws(() => decodeLatent(sample.subarray(0, at)), (error) => error.name === "ClricError");
  }
});

/**
 * The conformance suite against this decoder. Runs in Node and in a browser: `read(path)` gives the bytes of a file
 * whose path is relative to manifest.json. Gives a list of failures, one line each, and the number of streams.
 */
import { decodeGrids, decodeLatent, readHeader } from "../src/latent.js";

export async function runSuite(read) {
  const manifest = JSON.parse(new TextDecoder().decode(await read("manifest.json")));
  const failures = [];
  let streams = 0;
  for (const [path, expected] of Object.entries(manifest.valid)) {
    streams++;
    try {
      const bytes = await read(path);
      const header = await summary(readHeader(bytes));
      for (const [field, value] of Object.entries(header)) {
        if (!same(value, expected.header[field])) failures.push(`${path}: ${field} is ${JSON.stringify(value)}`);
      }
      const digest = await sha256(bigEndian(decodeGrids(bytes)));
      if (digest !== expected.grids_sha256) failures.push(`${path}: other grids`);
      const latent = decodeLatent(bytes);
      const shape = [latent.channels, latent.height, latent.width];
      if (`${shape}` !== `${expected.latent_shape}`) failures.push(`${path}: shape ${shape}`);
      const wanted = await read(expected.latent);
      const values = new DataView(wanted.buffer, wanted.byteOffset, wanted.byteLength);
      let largest = 1;
      let difference = 4 * latent.data.length === wanted.length ? 0 : Infinity;
      for (let i = 0; 4 * i < wanted.length; i++) {
        const value = values.getFloat32(4 * i, true);
        largest = Math.max(largest, Math.abs(value));
        difference = Math.max(difference, Math.abs(value - latent.data[i]));
      }
      if (!(difference <= 1e-4 * largest)) failures.push(`${path}: the latent differs by ${difference}`);
    } catch (error) {
      failures.push(`${path}: ${error.code ?? error.name}: ${error.message}`);
    }
  }
  for (const [path, expected] of Object.entries(manifest.invalid)) {
    streams++;
    try {
      decodeLatent(await read(path));
      failures.push(`${path}: decoded, not refused`);
    } catch (error) {
      if (error.code !== expected.error) failures.push(`${path}: ${error.code ?? error.name}, not ${expected.error}: ${error.message}`);
    }
  }
  return { failures, streams };
}

/** Whether two values, or two flat objects, are equal. */
function same(a, b) {
  if (typeof a !== "object") return a === b;
  return Object.keys({ ...a, ...b }).every((key) => a[key] === b[key]);
}

/** A header in the manifest's words. */
async function summary(header) {
  const { version, width, height, channels, space, imageDecoder } = header;
  const metadata = {};
  for (const [name, bytes] of Object.entries({ icc_profile: header.icc, exif: header.exif, xmp: header.xmp })) {
    if (bytes) metadata[name] = await sha256(bytes);
  }
  return {
    version,
    width,
    height,
    latent_space: space,
    channels,
    function: header.function,
    image_decoder: imageDecoder,
    metadata_sha256: metadata,
  };
}

/** The manifest's form of grids: every value in four bytes, big-endian. */
export function bigEndian(grids) {
  const view = new DataView(new ArrayBuffer(4 * grids.reduce((sum, level) => sum + level.length, 0)));
  let at = 0;
  for (const level of grids) for (const value of level) view.setInt32(4 * at++, value);
  return new Uint8Array(view.buffer);
}

export async function sha256(bytes) {
  const { subtle } = globalThis.crypto ?? (await import("node:crypto")).webcrypto; // Node 18 has no global one
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

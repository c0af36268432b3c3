/**
 * Downloads: files, and streams whose header is told as soon as it has come.
 */
import { ClricError, fail } from "./errors.js";
import { MAX_PIXELS, readHeader } from "./latent.js";

/** The stream at `url`. `onHeader` is called with the header while the rest is on its way. */
export async function fetchStream(url, signal, onHeader) {
  return get(url, { signal }, (response) => readBody(response, onHeader));
}

/** The bytes at `url`. */
export async function download(url) {
  return get(url, {}, async (response) => new Uint8Array(await response.arrayBuffer()));
}

async function get(url, options, read) {
  try {
    const response = await fetch(url, options);
    if (response.ok) return await read(response);
    return fail("network", `${url} cannot be downloaded (status ${response.status})`);
  } catch (error) {
    if (error instanceof ClricError || error.name === "AbortError") throw error;
    return fail("network", `${url} cannot be downloaded (${error.message})`);
  }
}

async function readBody(response, onHeader) {
  const reader = response.body.getReader();
  let bytes = new Uint8Array(0);
  let waiting = true;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return bytes;
    const longer = new Uint8Array(bytes.length + value.length);
    longer.set(bytes);
    longer.set(value, bytes.length);
    bytes = longer;
    if (bytes.length > MAX_PIXELS) {
      reader.cancel().catch(() => {});
      fail("limit", `the file is longer than ${MAX_PIXELS} bytes`);
    }
    if (!waiting) continue;
    try {
      const header = readHeader(bytes, { partial: true });
      waiting = false;
      onHeader(header);
    } catch (error) {
      if (error.code === "truncated") continue; // the header goes on in the next chunk
      waiting = false;
      // Of damage the checksum is told first, which comes last; but such an image would not be shown in any case
      if (!["magic", "version", "limit"].includes(error.code)) continue;
      reader.cancel().catch(() => {});
      throw error;
    }
  }
}

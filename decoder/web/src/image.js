/**
 * From a stream to pixels, in the thread that calls: the latent, then an image decoder.
 */
import { fail } from "./errors.js";
import { download } from "./fetch.js";
import { decodeLatent } from "./latent.js";
import { openDecoder } from "./onnx.js";
import { makeWasmDecoder } from "./wasm_decoder.js";

/** The image decoders that come with this package, by latent space and the number that streams name them by. */
const WEIGHTS = {
  clric: {
    1: () => new URL("../weights/1.0/small.bin", import.meta.url),
    2: () => new URL("../weights/small.bin", import.meta.url),
  },
  sd1: {
    1: () => new URL("../weights/1.0/lite.bin", import.meta.url),
    2: () => new URL("../weights/lite.bin", import.meta.url),
  },
};
const shippedDecoders = new Map();

/**
 * Decodes a stream: {data: RGBA bytes, width, height, timings}, timings in milliseconds.
 *
 * `decoder` and `ort`: see onnx.js. `loadOrt` imports onnxruntime-web where no `ort` is given; workers always get one.
 */
export async function decodeImage(bytes, { decoder, ort, maxPixels } = {}, loadOrt) {
  const start = performance.now();
  const latent = decodeLatent(bytes, { maxPixels });
  const { width, height, space, imageDecoder: number } = latent.header;
  const latentTime = performance.now() - start;
  const imageDecoder = await (decoder ? openDecoder(decoder, ort, loadOrt) : shippedDecoder(space, number));
  if (imageDecoder.space !== space) {
    fail("model", `image decoder ${imageDecoder.name} is of latent space ${imageDecoder.space}, the stream of ${space}`);
  }
  const loaded = performance.now();
  const data = await imageDecoder.decode(latent, width, height);
  const imageTime = performance.now() - loaded;
  return { data, width, height, timings: { latent: latentTime, image: imageTime } };
}

/** The one with this number; for others, and for streams that name none, the newest of the space. */
async function shippedDecoder(space, number) {
  const registered = WEIGHTS[space];
  if (!registered) fail("model", `no image decoder for latent space ${space} comes with clric; give one as "decoder"`);
  const weights = registered[number] ?? registered[Math.max(...Object.keys(registered))];
  if (!shippedDecoders.has(weights)) {
    const wasm = new URL("./image_decoder.wasm", import.meta.url);
    const imageDecoder = startDecoder(wasm, weights());
    shippedDecoders.set(weights, imageDecoder);
    imageDecoder.catch(() => shippedDecoders.delete(weights)); // a failed download is tried again with the next image
  }
  return shippedDecoders.get(weights);
}

async function startDecoder(wasm, weights) {
  const files = await Promise.all([download(wasm), download(weights)]);
  try {
    return await makeWasmDecoder(...files);
  } catch (error) {
    return fail(
      "model",
      `the image decoder at ${wasm} cannot be started (${error.message}); a bundler must copy it as it is, ` +
        "a content security policy must allow 'wasm-unsafe-eval', and the browser must know WebAssembly SIMD",
    );
  }
}

/**
 * From a stream to pixels, in the thread that calls: the latent, then an image decoder.
 */
import { fail } from "./errors.js";
import { download } from "./fetch.js";
import { decodeLatent } from "./latent.js";
import { openDecoder } from "./onnx.js";
import { makePainter } from "./painter.js";

/** The image decoders that come with this package, by latent space. */
const WEIGHTS = {
  clric: () => new URL("../weights/small.bin", import.meta.url),
  sd1: () => new URL("../weights/lite.bin", import.meta.url),
};
const painters = new Map();

/**
 * Decodes a stream: {data: RGBA bytes, width, height, timings}, timings in milliseconds.
 *
 * `decoder` and `ort`: see onnx.js. `loadOrt` imports onnxruntime-web where no `ort` is given.
 */
export async function decodeImage(bytes, { decoder, ort, maxPixels } = {}, loadOrt) {
  const start = performance.now();
  const latent = decodeLatent(bytes, { maxPixels });
  const { width, height, space } = latent.header;
  const latentTime = performance.now() - start;
  const painter = await (decoder ? openDecoder(decoder, ort, loadOrt) : shippedPainter(space));
  if (painter.space !== space) {
    fail("model", `the image decoder ${painter.name} is of latent space ${painter.space}, the stream of ${space}`);
  }
  const loaded = performance.now();
  const data = await painter.paint(latent, width, height);
  const imageTime = performance.now() - loaded;
  return { data, width, height, timings: { latent: latentTime, image: imageTime } };
}

async function shippedPainter(space) {
  const weights = WEIGHTS[space];
  if (!weights) fail("model", `no image decoder for latent space ${space} comes with clric; give one as "decoder"`);
  if (!painters.has(space)) {
    const wasm = new URL("./painter.wasm", import.meta.url);
    const painter = startPainter(wasm, weights());
    painters.set(space, painter);
    painter.catch(() => painters.delete(space)); // a download that failed is tried again with the next image
  }
  return painters.get(space);
}

async function startPainter(wasm, weights) {
  const files = await Promise.all([download(wasm), download(weights)]);
  try {
    return await makePainter(...files);
  } catch (error) {
    return fail(
      "model",
      `the image decoder at ${wasm} cannot be started (${error.message}); a bundler must copy it as it is, ` +
        "a content security policy must allow 'wasm-unsafe-eval', and the browser must know WebAssembly SIMD",
    );
  }
}

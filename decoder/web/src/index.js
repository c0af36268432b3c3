/**
 * Decodes clric images in browsers.
 */
import { decodeAside } from "./client.js";
import { asBytes } from "./header.js";

export { ClricError, MAX_PIXELS, decodeLatent, readHeader } from "./latent.js";

/**
 * The image of a stream, an ImageData. Decodes in a worker.
 *
 * Options: `decoder`, the URL of an .onnx image decoder for another latent space (see README.md), `ort`, the URL of
 * onnxruntime-web's module, `maxPixels`.
 */
export async function decode(data, options) {
  const image = await decodeAside(asBytes(data), options);
  return new ImageData(image.data, image.width, image.height);
}

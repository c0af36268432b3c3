/**
 * Decodes images in a worker: {id, bytes, options} -> {id, image} or {id, error}.
 */
import { decodeImage } from "./image.js";

addEventListener("message", async ({ data: { id, bytes, options } }) => {
  try {
    const image = await decodeImage(bytes, options);
    postMessage({ id, image }, { transfer: [image.data.buffer] });
  } catch ({ name, code, message }) {
    postMessage({ id, error: { name, code, message } });
  }
});
postMessage({ ready: true });

/**
 * Image decoders as ONNX files, by onnxruntime-web's WebAssembly build: for latent spaces and decoders that do not come
 * with this package. onnxruntime-web is imported when the first decoder is opened.
 */
import { fail } from "./errors.js";
import { download } from "./fetch.js";
import { FACTOR, tiling } from "./wasm_decoder.js";

/** Latent positions of a tile; a decoder of the TAESD family takes 67 kB for each. */
const TILE_POSITIONS = 12_288;
const decoders = new Map();

/**
 * Opens an image decoder.
 *
 * `decoder`: the URL of an .onnx file as clric-export makes it, with its manifest (the same name, .json) beside it; or
 * {url, space, halo}, where the manifest is elsewhere (halo: how many latent positions away a value reaches a pixel;
 * null: the image is not cut into tiles). `ort`: the URL of onnxruntime-web's ort.wasm.bundle.min.mjs; without it,
 * `loadOrt` imports the module.
 */
export function openDecoder(decoder, ort, loadOrt) {
  const key = typeof decoder === "object" ? decoder.url : decoder;
  if (!decoders.has(key)) {
    const opened = open(decoder, ort, loadOrt);
    decoders.set(key, opened);
    opened.catch(() => decoders.delete(key));
  }
  return decoders.get(key);
}

async function open(decoder, ort, loadOrt) {
  const { url, space, halo } = typeof decoder === "object" ? decoder : { url: decoder, ...(await readManifest(decoder)) };
  const [module, file] = await Promise.all([ort ? importOrt(ort) : loadOrt(), download(url)]);
  const runtime = module.InferenceSession ? module : module.default;
  let session;
  try {
    session = await runtime.InferenceSession.create(file, { executionProviders: ["wasm"] });
  } catch (error) {
    fail("model", `${url}: onnxruntime-web cannot open it (${error.message})`);
  }
  const decode = (latent, width, height) => decodeTiles(runtime, session, latent, width, height, halo);
  return { name: url, space, decode };
}

async function readManifest(url) {
  const manifestUrl = url.replace(/\.onnx(?=$|[?#])/, ".json");
  if (manifestUrl === url) fail("model", `the decoder ${url} is not the URL of an .onnx file; give {url, space, halo}`);
  try {
    const manifest = JSON.parse(new TextDecoder().decode(await download(manifestUrl)));
    return { space: manifest.latent_space, halo: manifest.halo };
  } catch (error) {
    fail("model", `the decoder ${url} has no manifest (${error.message}); copy it there, or give {url, space, halo}`);
  }
}

async function importOrt(ort) {
  try {
    return await import(/* @vite-ignore */ /* webpackIgnore: true */ ort);
  } catch (error) {
    return fail("model", `onnxruntime-web at ${ort} cannot be loaded (${error.message})`);
  }
}

async function decodeTiles(runtime, session, latent, width, height, halo) {
  const pixels = new Uint8ClampedArray(4 * width * height).fill(255);
  const limit = halo === null ? Infinity : TILE_POSITIONS;
  for (const tile of tiling(latent.height, latent.width, halo ?? 0, limit)) {
    const rows = tile.bottom - tile.top;
    const columns = tile.right - tile.left;
    const values = new Float32Array(latent.channels * rows * columns);
    for (let row = 0; row < latent.channels * rows; row++) {
      const channel = Math.floor(row / rows);
      const from = (channel * latent.height + tile.top + (row % rows)) * latent.width + tile.left;
      values.set(latent.data.subarray(from, from + columns), row * columns);
    }
    const input = new runtime.Tensor("float32", values, [1, latent.channels, rows, columns]);
    const { image } = await run(session, input);
    const expected = [1, 3, FACTOR * rows, FACTOR * columns];
    if (`${image?.dims}` !== `${expected}`) fail("model", `the image decoder made ${image?.dims}, not ${expected}`);
    copyTile(image.data, tile, pixels, width, height);
  }
  return pixels;
}

async function run(session, latent) {
  try {
    return await session.run({ latent });
  } catch (error) {
    return fail("model", `the image decoder failed (${error.message})`);
  }
}

function copyTile(image, tile, pixels, width, height) {
  const columns = FACTOR * (tile.right - tile.left);
  const plane = FACTOR * (tile.bottom - tile.top) * columns;
  const right = Math.min(FACTOR * tile.innerRight, width);
  const bottom = Math.min(FACTOR * tile.innerBottom, height);
  for (let y = FACTOR * tile.innerTop; y < bottom; y++) {
    for (let x = FACTOR * tile.innerLeft; x < right; x++) {
      const from = (y - FACTOR * tile.top) * columns + x - FACTOR * tile.left;
      const to = 4 * (y * width + x);
      for (let c = 0; c < 3; c++) pixels[to + c] = 255 * image[c * plane + from];
    }
  }
}

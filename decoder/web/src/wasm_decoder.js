/**
 * The image decoders that clric ships, in WebAssembly (image_decoder.c): latent -> RGBA.
 *
 * Memory of the module, from __heap_base up: the layers and their transformed kernels, then, while an image is decoded,
 * two tensors, scratch rows and the image's tile.
 */
import { ClricError } from "./errors.js";

/** Image pixels per latent position, in each direction. */
export const FACTOR = 8;
/** Latent positions of a tile: about 48 MB of tensors. */
const TILE_POSITIONS = 24_576;
const LAYER_BYTES = 28;
const FLAGS = { relu: 1, shuffle: 2, image: 4 };

/** Makes an image decoder from the bytes of image_decoder.wasm and of a file of weights (see make/weights.py). */
export async function makeWasmDecoder(wasm, weights) {
  const { instance } = await WebAssembly.instantiate(wasm);
  return new WasmDecoder(instance.exports, weights);
}

class WasmDecoder {
  constructor(exports, weights) {
    this.exports = exports;
    const headerLength = new DataView(weights.buffer, weights.byteOffset).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(weights.subarray(4, 4 + headerLength)));
    this.name = header.name;
    this.space = header.latent_space;
    this.channels = header.channels;
    this.halo = header.halo;
    this.layers = header.layers;
    this.free = exports.__heap_base.value;

    let at = 4 + headerLength;
    const take = (bytes) => weights.subarray(at, (at += bytes));
    for (const layer of this.layers) {
      layer.at = this.allocate(LAYER_BYTES);
      const vectors = this.allocate(8 * layer.outputs);
      const kernels = this.allocate(32 * layer.inputs * layer.outputs);
      const raw = this.free; // needed until `prepare` is done
      this.reserve(raw + 9 * layer.bytes * layer.inputs * layer.outputs);
      const memory = new Uint8Array(exports.memory.buffer);
      memory.set(take(8 * layer.outputs), vectors);
      memory.set(take(9 * layer.bytes * layer.inputs * layer.outputs), raw);
      const flags = Object.keys(FLAGS).reduce((sum, name) => sum + (layer[name] ? FLAGS[name] : 0), 0);
      const fields = [layer.inputs, layer.outputs, flags, vectors, vectors + 4 * layer.outputs, kernels];
      new Int32Array(exports.memory.buffer, layer.at).set(fields);
      exports.prepare(layer.at, raw, layer.bytes);
    }
    if (at !== weights.length) throw new Error(`its weights have ${weights.length} bytes, not ${at}`);
  }

  /** Sixteen-byte aligned memory. */
  allocate(bytes) {
    const at = Math.ceil(this.free / 16) * 16;
    this.free = at + bytes;
    this.reserve(this.free);
    return at;
  }

  reserve(end) {
    const missing = end - this.exports.memory.buffer.byteLength;
    if (missing <= 0) return;
    try {
      this.exports.memory.grow(Math.ceil(missing / 65536));
    } catch (error) {
      throw new ClricError("model", `the image decoder has not enough memory (${error.message})`);
    }
  }

  /** Paints `latent` ({data, channels, height, width}) into an RGBA image of width x height pixels. */
  decode(latent, width, height, tilePositions = TILE_POSITIONS) {
    if (latent.channels !== this.channels) {
      throw new ClricError("model", `${this.name} decodes ${this.channels} channels, the latent has ${latent.channels}`);
    }
    const pixels = new Uint8ClampedArray(4 * width * height);
    for (const tile of tiling(latent.height, latent.width, this.halo, tilePositions)) {
      const image = this.decodeTile(latent, tile);
      const left = FACTOR * tile.innerLeft;
      const right = Math.min(FACTOR * tile.innerRight, width);
      const bottom = Math.min(FACTOR * tile.innerBottom, height);
      for (let y = FACTOR * tile.innerTop; y < bottom; y++) {
        const from = ((y - FACTOR * tile.top) * FACTOR * (tile.right - tile.left) + left - FACTOR * tile.left) * 4;
        pixels.set(image.subarray(from, from + 4 * (right - left)), 4 * (y * width + left));
      }
    }
    return pixels;
  }

  /** All pixels of one tile, as a view of the module's memory. */
  decodeTile(latent, tile) {
    const { exports } = this;
    const { layers } = this;
    let height = tile.bottom - tile.top;
    let width = tile.right - tile.left;
    const bytes = 4 * height * width;
    const start = this.free;
    let positions = 1;
    let scratchBytes = 0;
    let largestTensor = layers[0].inputs;
    for (const layer of layers) {
      scratchBytes = Math.max(scratchBytes, exports.scratch_size(width * Math.sqrt(positions), layer.inputs));
      if (!layer.image) largestTensor = Math.max(largestTensor, positions * layer.outputs);
      if (layer.shuffle) positions *= 4;
    }
    let source, target, scratch, image;
    try {
      source = this.allocate(bytes * largestTensor);
      target = this.allocate(bytes * largestTensor);
      scratch = this.allocate(scratchBytes);
      image = this.allocate(bytes * positions);
    } finally {
      this.free = start;
    }

    let largest = this.loadTile(latent, tile, source);
    for (const layer of layers) {
      const output = layer.image ? image : target;
      const step = 8 * width;
      largest = exports.convolve(layer.at, source, largest, height, width, layer.add ? target : 0, output, step, scratch);
      [source, target] = [target, source];
      if (layer.shuffle) {
        height *= 2;
        width *= 2;
      }
    }
    return new Uint8Array(exports.memory.buffer, image, 4 * height * width);
  }

  /** Copies a tile of the latent, channels last, with zeros up to the first layer's inputs; gives its magnitude. */
  loadTile({ data, height, width, channels }, tile, at) {
    const { inputs } = this.layers[0];
    const rows = tile.bottom - tile.top;
    const columns = tile.right - tile.left;
    const target = new Float32Array(this.exports.memory.buffer, at, rows * columns * inputs).fill(0);
    let largest = 0;
    for (let channel = 0; channel < channels; channel++) {
      for (let y = 0; y < rows; y++) {
        const from = (channel * height + tile.top + y) * width + tile.left;
        for (let x = 0; x < columns; x++) {
          const value = data[from + x];
          target[(y * columns + x) * inputs + channel] = value;
          if (Math.abs(value) > largest) largest = Math.abs(value);
        }
      }
    }
    return largest;
  }
}

/**
 * Tiles of at most `limit` positions that cover height x width, with the least to compute. Each has an inner part; the
 * rest of it, of `halo` positions or more, is what its pixels depend on.
 */
export function tiling(height, width, halo, limit) {
  const smallest = (4 * halo) ** 2; // below, tiles are hardly more than their halos
  let best = { cost: Infinity };
  for (let rows = 1; rows <= height; rows++) {
    const tileHeight = stripLength(height, rows, halo);
    const widest = Math.floor(Math.max(limit, smallest) / tileHeight);
    if (widest < Math.min(width, 2 * halo + 1)) continue;
    const columns = widest >= width ? 1 : Math.ceil((width - 2 * halo) / (widest - 2 * halo));
    const cost = rows * columns * tileHeight * stripLength(width, columns, halo);
    if (cost < best.cost) best = { cost, rows, columns };
    if (columns === 1) break; // more rows only add halos
  }
  const tiles = [];
  for (const [top, bottom, innerTop, innerBottom] of strips(height, best.rows, halo)) {
    for (const [left, right, innerLeft, innerRight] of strips(width, best.columns, halo)) {
      tiles.push({ top, bottom, left, right, innerTop, innerBottom, innerLeft, innerRight });
    }
  }
  return tiles;
}

/** The least length of `count` equal strips that cover `length` with overlaps of two halos. */
function stripLength(length, count, halo) {
  return Math.min(length, Math.ceil((length + (count - 1) * 2 * halo) / count));
}

/** [start, end, inner start, inner end] of each strip; inner parts meet in the middle of an overlap. */
function strips(length, count, halo) {
  const size = stripLength(length, count, halo);
  const starts = Array.from({ length: count }, (_, i) => Math.floor((i * (length - size)) / Math.max(count - 1, 1)));
  const seam = (i) => Math.floor((starts[i] + starts[i - 1] + size) / 2);
  return starts.map((start, i) => [start, start + size, i ? seam(i) : 0, i < count - 1 ? seam(i + 1) : length]);
}

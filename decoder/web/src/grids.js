/**
 * Grids of integers, and the integer ARM that predicts them: specification, section 7.
 */
import { RangeDecoder, escaped, table } from "./entropy.js";
import { atMost } from "./errors.js";

const NEIGHBOURS = [[0, -1], [-1, 0], [-1, -1], [-1, 1], [0, -2], [-2, 0], [-3, 0], [0, -3]];
/** Zeros around a grid, so that neighbours outside of it need no test: no neighbour is farther away. */
const MARGIN = 3;
const MAX_VALUES_PER_BYTE = 1000;
const MAX_VALUE = 32767;

/** Rows and columns of a level's grids. */
export function levelSize(header, level) {
  return { height: Math.ceil(header.latentHeight / 2 ** level), width: Math.ceil(header.latentWidth / 2 ** level) };
}

/** All levels, the finest first: Int32Arrays in the order channel, row, column. The coarsest is decoded first. */
export function decodeGrids(header, architecture, networks, segments) {
  const levels = [];
  for (let level = architecture.levels.length - 1; level >= 0; level--) {
    const channels = architecture.levels[level];
    const first = architecture.levels.slice(0, level).reduce((a, b) => a + b, 0);
    const { height, width } = levelSize(header, level);
    const segment = segments[level];
    const count = channels * height * width;
    if (!segment.length) {
      levels[level] = new Int32Array(count);
      continue;
    }
    atMost(MAX_VALUES_PER_BYTE * segment.length, count, `values of level ${level}`, "payload");
    const scales = networks.scales.subarray(first, first + channels);
    levels[level] = decodeLevel(segment, networks.arm, scales, architecture.neighbours, height, width);
  }
  return levels;
}

function decodeLevel(segment, arm, scales, neighbours, height, width) {
  const decoder = new RangeDecoder(segment);
  const predict = makeArm(arm);
  const channels = scales.length;
  const rowLength = width + 2 * MARGIN;
  const plane = (height + MARGIN) * rowLength;
  const padded = new Int32Array(channels * plane);
  const offsets = NEIGHBOURS.slice(0, neighbours).map(([dy, dx]) => dy * rowLength + dx);
  const context = new Int32Array(neighbours);
  // The escapes of a step come after its symbols: where they belong, and in what way.
  const escapes = [];

  for (let t = 0; t < width + 2 * (height - 1); t++) {
    const top = Math.max(0, (t - width + 2) >> 1);
    const bottom = Math.min(height - 1, t >> 1);
    for (let channel = 0; channel < channels; channel++) {
      for (let y = top; y <= bottom; y++) {
        const at = channel * plane + (y + MARGIN) * rowLength + MARGIN + t - 2 * y;
        for (let i = 0; i < neighbours; i++) context[i] = padded[at + offsets[i]];
        const prediction = predict(context);
        const mean = prediction[0];
        const s = prediction[1] + scales[channel];
        const symbol = decoder.symbol(table(s < 0 ? 0 : s > 79 ? 79 : s, mean & 15));
        padded[at] = (mean >> 4) + symbol - 31;
        if (symbol === 0 || symbol === 63) escapes.push(at, mean >> 4, symbol);
      }
    }
    for (let i = 0; i < escapes.length; i += 3) {
      padded[escapes[i]] = escapes[i + 1] + escaped(escapes[i + 2], decoder);
      atMost(MAX_VALUE, Math.abs(padded[escapes[i]]), "magnitude of a grid value", "payload");
    }
    escapes.length = 0;
  }

  const values = new Int32Array(channels * height * width);
  for (let row = 0; row < channels * height; row++) {
    const channel = Math.floor(row / height);
    const from = channel * plane + (row - channel * height + MARGIN) * rowLength + MARGIN;
    values.set(padded.subarray(from, from + width), row * width);
  }
  return values;
}

/**
 * The ARM as a function: the values of the neighbours -> [mean in sixteenths, scale]. Sums stay below 2^24 (section
 * 7.3), so that doubles and 32-bit shifts are exact. Contexts of -1, 0 and 1 alone, which are most of those of a small
 * file, are computed once.
 */
function makeArm(layers) {
  const buffers = layers.map((layer) => new Int32Array(layer.inputs));
  const result = new Int32Array(2);
  const known = [];
  return (context) => {
    let key = 0;
    for (let i = 0; i < context.length; i++) {
      const digit = context[i] + 1;
      key = digit >>> 0 > 2 ? NaN : 3 * key + digit;
    }
    if (key >= 0) return (known[key] ??= run(layers, buffers, context, new Int32Array(2)));
    return run(layers, buffers, context, result);
  };
}

function run(layers, buffers, context, result) {
  let input = buffers[0];
  for (let i = 0; i < input.length; i++) {
    const value = context[i];
    input[i] = 32 * (value < -63 ? -63 : value > 63 ? 63 : value);
  }
  for (let l = 0; l < layers.length; l++) {
    const { inputs, outputs, weights, biases, exponent: k } = layers[l];
    const hidden = l < layers.length - 1;
    const output = hidden ? buffers[l + 1] : result;
    for (let o = 0, w = 0; o < outputs; o++) {
      let sum = biases[o];
      for (let i = 0; i < inputs; i++) sum += weights[w++] * input[i];
      if (hidden) {
        const residual = o < inputs ? input[o] << k : 0;
        sum = (sum + residual + ((1 << k) >> 1)) >> k;
        output[o] = sum < 0 ? 0 : sum > 2047 ? 2047 : sum;
      } else {
        output[o] = sum;
      }
    }
    input = output;
  }
  const k = layers[layers.length - 1].exponent;
  const mean = (result[0] + (1 << k)) >> (k + 1);
  result[0] = mean < -16368 ? -16368 : mean > 16368 ? 16368 : mean;
  result[1] = (result[1] + (2 << k) + (128 << k)) >> (k + 2);
  return result;
}

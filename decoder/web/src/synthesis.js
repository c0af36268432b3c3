/**
 * From grids to the latent: specification, sections 8 and 9. Values are single precision, sums double.
 */
import { fail } from "./errors.js";
import { levelSize } from "./grids.js";

/** Values that a strip of one layer holds at most, about; it bounds the memory beside the stack and the latent. */
const STRIP_VALUES = 1 << 18;

const NOT_FINITE = "the latent is not finite";

/** All grids at the latent's size: Float32Array, channels of level 0 first. */
export function upsample(header, architecture, networks, grids) {
  let level = grids.length - 1;
  let stack = Float32Array.from(grids[level]);
  let size = levelSize(header, level);
  while (level-- > 0) {
    const next = levelSize(header, level);
    const own = grids[level].length;
    const channels = stack.length / (size.height * size.width);
    const larger = new Float32Array(own + channels * next.height * next.width);
    larger.set(grids[level]);
    double(stack, size, larger.subarray(own), next, channels, networks.upsampler[level]);
    stack = larger;
    size = next;
  }
  return stack;
}

/** Doubles along y, then along x, and crops to `next`. */
function double(from, size, to, next, channels, taps) {
  const tall = new Float32Array(next.height * size.width);
  for (let channel = 0; channel < channels; channel++) {
    const input = from.subarray(channel * size.height * size.width);
    const output = to.subarray(channel * next.height * next.width);
    for (let x = 0; x < size.width; x++) {
      doubleLine(input, x, size.width, size.height, tall, x, size.width, next.height, taps);
    }
    for (let y = 0; y < next.height; y++) {
      doubleLine(tall, y * size.width, 1, size.width, output, y * next.width, 1, next.width, taps);
    }
  }
}

function doubleLine(input, inputAt, inputStep, length, output, outputAt, outputStep, newLength, [u0, u1, u2, u3]) {
  const last = length - 1;
  const sample = (n) => input[inputAt + inputStep * (n < 0 ? 0 : n > last ? last : n)];
  let a = sample(-2), b = sample(-1), c = sample(0), d = sample(1);
  for (let n = 0; 2 * n < newLength; n++) {
    const e = sample(n + 2);
    output[outputAt + 2 * n * outputStep] = u0 * a + u1 * b + u2 * c + u3 * d;
    if (2 * n + 1 < newLength) output[outputAt + (2 * n + 1) * outputStep] = u3 * b + u2 * c + u1 * d + u0 * e;
    a = b;
    b = c;
    c = d;
    d = e;
  }
}

/**
 * The stack -> the latent, C x h x w. Layers run one after another over strips of rows, which overlap by what the 3 x 3
 * layers still to come need.
 */
export function synthesize(header, architecture, networks, stack) {
  const { latentHeight: height, latentWidth: width, channels } = header;
  const { layers } = architecture;
  const latent = new Float32Array(channels * height * width);
  const widest = Math.max(...layers.map((layer) => layer.outputs));
  const rows = Math.max(16, Math.floor(STRIP_VALUES / (widest * width)));
  const reach = layers.reduce((sum, layer) => sum + (layer.kernel >> 1), 0);

  for (let top = 0; top < height; top += rows) {
    const bottom = Math.min(height, top + rows);
    let left = reach;
    // What each layer had as its input: its rows from `top` to `bottom`, and where its first channel begins.
    let input = { values: stack, top: 0, bottom: height };
    const inputs = [];
    layers.forEach((layer, n) => {
      inputs.push(input);
      left -= layer.kernel >> 1;
      const output = { top: Math.max(0, top - left), bottom: Math.min(height, bottom + left) };
      output.values = new Float32Array(layer.outputs * (output.bottom - output.top) * width);
      convolve(input, output, layer, networks.synthesis[n], width);
      if (layer.residual >= 0) add(inputs[n - layer.residual], output, layer.outputs, width);
      if (layer.relu) {
        const { values } = output;
        for (let i = 0; i < values.length; i++) {
          if (values[i] === -Infinity) fail("payload", NOT_FINITE); // which ReLU would hide
          if (values[i] < 0) values[i] = 0;
        }
      }
      input = output;
    });
    for (let channel = 0; channel < channels; channel++) {
      const from = input.values.subarray(channel * (bottom - top) * width, (channel + 1) * (bottom - top) * width);
      latent.set(from, (channel * height + top) * width);
    }
  }
  for (const value of latent) {
    if (!Number.isFinite(value)) fail("payload", NOT_FINITE);
  }
  return latent;
}

/** A 1 x 1 or 3 x 3 correlation with replicated borders. */
function convolve(input, output, layer, { weights, biases }, width) {
  const inputPlane = (input.bottom - input.top) * width;
  const outputPlane = (output.bottom - output.top) * width;
  const reach = layer.kernel >> 1;
  const sums = new Float64Array(width);
  const inputsOfOne = layer.depthwise ? 1 : layer.inputs;
  for (let o = 0; o < layer.outputs; o++) {
    for (let y = output.top; y < output.bottom; y++) {
      sums.fill(biases[o]);
      let w = o * inputsOfOne * layer.kernel ** 2;
      for (let i = 0; i < inputsOfOne; i++) {
        const plane = (layer.depthwise ? o : i) * inputPlane;
        for (let dy = -reach; dy <= reach; dy++) {
          // The strip reaches as far as the image does or as this layer needs: its borders are the image's.
          const row = Math.min(Math.max(y + dy, input.top), input.bottom - 1) - input.top;
          for (let dx = -reach; dx <= reach; dx++) addRow(sums, input.values, plane + row * width, dx, weights[w++], width);
        }
      }
      output.values.set(sums, o * outputPlane + (y - output.top) * width);
    }
  }
}

/** sums[x] += weight * values[at + x + dx], borders replicated. */
function addRow(sums, values, at, dx, weight, width) {
  if (weight === 0) return;
  const first = dx < 0 ? 1 : 0;
  const last = dx > 0 ? width - 1 : width;
  if (dx < 0) sums[0] += weight * values[at];
  for (let x = first; x < last; x++) sums[x] += weight * values[at + x + dx];
  if (dx > 0) sums[width - 1] += weight * values[at + width - 1];
}

function add(input, output, channels, width) {
  const inputPlane = (input.bottom - input.top) * width;
  const outputPlane = (output.bottom - output.top) * width;
  for (let channel = 0; channel < channels; channel++) {
    const from = channel * inputPlane + (output.top - input.top) * width;
    const to = channel * outputPlane;
    for (let i = 0; i < outputPlane; i++) output.values[to + i] += input.values[from + i];
  }
}

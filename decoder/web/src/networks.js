/**
 * The networks segment: specification, section 6.
 */
import { RangeDecoder, escaped, table } from "./entropy.js";
import { atMost } from "./errors.js";

const BICUBIC = [-0.03515625, 0.26171875, 0.87890625, -0.10546875];

/**
 * Decodes the parameters of all networks.
 *
 * Gives `arm`: layers with integer `weights` (outputs x inputs) and `biases`, their exponents and sizes; `scales`: the
 * offset G of each grid; `upsampler`: four taps for each level but the coarsest; `synthesis`: weights and biases as
 * numbers, by layer.
 */
export function decodeNetworks(segment, architecture) {
  const { levels, stack, neighbours, hiddenLayers, width, gridScales, layers } = architecture;
  const decoder = new RangeDecoder(segment);
  const group = (name, count, largestExponent, limit) => readGroup(decoder, name, count, largestExponent, limit);

  const arm = [];
  for (let l = 0; l <= hiddenLayers; l++) {
    const inputs = l ? width : neighbours;
    const outputs = l < hiddenLayers ? width : 2;
    const { integers, exponent } = group(`arm.weight${l}`, outputs * inputs, 8, () => 127);
    arm.push({ inputs, outputs, weights: integers, exponent });
  }
  const outputs = arm.reduce((sum, layer) => sum + layer.outputs, 0);
  const bias = group("arm.bias", outputs, 5, (k) => 2047 >> (5 - k));
  let at = 0;
  for (const layer of arm) {
    // In the units of the layer's sums: B * 2^(5 - kb + k).
    const shift = 5 - bias.exponent + layer.exponent;
    layer.biases = bias.integers.slice(at, (at += layer.outputs)).map((b) => b << shift);
  }

  let scales = new Int32Array(stack);
  if (gridScales) {
    const { integers, exponent } = group("grid_scales", stack, 3, (k) => 127 >> (3 - k));
    scales = integers.map((g) => g << (3 - exponent));
  }

  const wide = (name, count) => {
    const { integers, exponent } = group(name, count, 15, () => 32767);
    return Float64Array.from(integers, (integer) => integer / 2 ** exponent);
  };
  const upsampler = [];
  if (levels.length > 1) {
    const taps = wide("upsampler", 4 * (levels.length - 1));
    for (let row = 0; row < levels.length - 1; row++) {
      upsampler.push(BICUBIC.map((tap, i) => tap + taps[4 * row + i]));
    }
  }

  const synthesis = layers.map(({ inputs, outputs, depthwise, kernel }, n) => ({
    weights: wide(`synthesis.weight${n}`, outputs * (depthwise ? 1 : inputs) * kernel ** 2),
  }));
  const biases = wide("synthesis.bias", layers.reduce((sum, layer) => sum + layer.outputs, 0));
  at = 0;
  layers.forEach((layer, n) => {
    synthesis[n].biases = biases.slice(at, (at += layer.outputs));
  });
  return { arm, scales, upsampler, synthesis };
}

/** One group: its exponent, and its integers, all of which are one batch. */
function readGroup(decoder, name, count, largestExponent, limitFor) {
  const exponent = decoder.bits(4);
  const code = decoder.bits(4);
  atMost(largestExponent, exponent, `exponent of ${name}`, "payload");
  const integers = new Int32Array(count);
  if (code) {
    const cum = table(8 + 4 * (code - 1), 0);
    const symbols = Uint8Array.from(integers, () => decoder.symbol(cum));
    const limit = limitFor(exponent);
    for (let i = 0; i < count; i++) {
      const symbol = symbols[i];
      integers[i] = symbol === 0 || symbol === 63 ? escaped(symbol, decoder) : symbol - 31;
      atMost(limit, Math.abs(integers[i]), `integer of ${name}`, "payload");
    }
  }
  return { integers, exponent };
}

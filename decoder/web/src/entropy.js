/**
 * The range coder and its probability tables: specification, sections 4 and 5.
 *
 * The coder's state is two 64-bit integers. Each is held in two doubles, the upper 40 bits and the lower 24, so that
 * every product and sum below stays under 2^53 and is exact.
 */
import { atMost, fail } from "./errors.js";

const tables = [];
const powers = [];

/** Table T(s, f): cum[0 ... 64] for scale index s and sixteenths f. Made when first asked for. */
export function table(s, f) {
  return (tables[16 * s + f] ??= makeTable((powers[s] ??= makePowers(s)), f));
}

/**
 * P[0 ... 504], P[n] = (P[n - 1] D + 2^30) >> 31. The 62-bit product is taken in two parts of D's bits.
 *
 * D is computed, not listed: of the 80 numbers none comes closer to where rounding turns than 0.007 in 2^31, so that
 * every exponential function that is right to 11 digits gives those of appendix A. A test compares the tables' SHA-256.
 */
function makePowers(s) {
  const d = Math.round(2 ** 31 * Math.exp(-(2 ** ((32 - s) / 8)) / 16));
  const p = new Float64Array(505);
  const high = d >>> 16;
  const low = d & 0xffff;
  p[0] = 2 ** 31;
  for (let n = 1; n < 505; n++) {
    const carry = Math.floor((p[n - 1] * low + 2 ** 30) / 65536);
    p[n] = Math.floor((p[n - 1] * high + carry) / 2 ** 15);
  }
  return p;
}

function makeTable(p, f) {
  const cum = new Uint32Array(65);
  for (let j = 1; j < 64; j++) {
    const z = 16 * (j - 32) + 8 - f;
    const upTo = z >= 0 ? 2 ** 32 - p[z] : p[-z];
    cum[j] = j + Math.floor((upTo * 65472) / 2 ** 32);
  }
  cum[64] = 65536;
  return cum;
}

const BIT = Uint32Array.of(0, 32768, 65536);

/** Decodes the symbols of one segment. */
export class RangeDecoder {
  constructor(segment) {
    this.segment = segment;
    this.at = 0;
    this.rangeHigh = 2 ** 40 - 1;
    this.rangeLow = 2 ** 24 - 1;
    const first = this.word();
    const second = this.word();
    this.valueHigh = first * 256 + (second >>> 24);
    this.valueLow = second & 0xffffff;
  }

  /** The next four bytes; zeros after the segment's end. */
  word() {
    let word = 0;
    for (let i = 0; i < 4; i++) word = word * 256 + (this.segment[this.at++] ?? 0);
    return word;
  }

  /**
   * Decodes one symbol of the table `cum`.
   *
   * unit = 256 u with u = range >> 24, so a product unit * c has the upper 40 bits (u c) >> 16 and the lower 24 bits
   * ((u c) mod 2^16) 2^8. u c may have 56 bits, and is taken in two parts of u.
   */
  symbol(cum) {
    const u = this.rangeHigh;
    if (this.valueHigh >= u) fail("payload", "a segment is damaged: value out of range");
    const high = Math.floor(u / 65536);
    const low = u - high * 65536;
    // The quotient in floating point is right but where it is within 2^-36 of an integer: the remainder decides.
    const q = (this.valueHigh * 65536 + (this.valueLow >>> 8)) / u;
    let first = 0;
    let last = cum.length - 2;
    while (first < last) {
      const middle = (first + last + 1) >> 1;
      if (cum[middle] <= q) first = middle;
      else last = middle - 1;
    }
    let k = first;
    let valueHigh, valueLow;
    for (;;) {
      const c = cum[k];
      valueHigh = this.valueHigh - high * c - Math.floor((low * c) / 65536);
      valueLow = this.valueLow - (((low * c) & 0xffff) << 8);
      if (valueLow < 0) {
        valueLow += 2 ** 24;
        valueHigh--;
      }
      if (valueHigh < 0) {
        k--;
        continue;
      }
      const frequency = cum[k + 1] - c;
      this.rangeHigh = high * frequency + Math.floor((low * frequency) / 65536);
      this.rangeLow = ((low * frequency) & 0xffff) << 8;
      if (valueHigh < this.rangeHigh || (valueHigh === this.rangeHigh && valueLow < this.rangeLow)) break;
      k++;
    }
    if (this.rangeHigh < 256) {
      const word = this.word();
      this.rangeHigh = (this.rangeHigh * 2 ** 24 + this.rangeLow) * 256;
      this.rangeLow = 0;
      valueHigh = (valueHigh * 2 ** 24 + valueLow) * 256 + (word >>> 24);
      valueLow = word & 0xffffff;
    }
    this.valueHigh = valueHigh;
    this.valueLow = valueLow;
    return k;
  }

  /** A number of `count` bits, the most significant first. */
  bits(count) {
    let number = 0;
    while (count-- > 0) number = 2 * number + this.symbol(BIT);
    return number;
  }

  /** The excess of an escaped integer (section 5.2). */
  excess() {
    let n = 0;
    while (this.symbol(BIT) === 0) {
      atMost(15, ++n, "zero bits of an escape", "payload");
    }
    return 2 ** n + this.bits(n) - 1;
  }
}

/** What a symbol stands for, relative to m; an escape's excess is read from the decoder. */
export function escaped(symbol, decoder) {
  return symbol === 0 ? -31 - decoder.excess() : 32 + decoder.excess();
}

/**
 * From bytes to a header: specification, sections 2, 3 and 12.
 */
import { atMost, fail } from "./errors.js";
import { FUNCTIONS, registeredNetworks } from "./functions.js";

/** Pixels that are decoded unless the caller says otherwise: the highest default that section 12 allows. */
export const MAX_PIXELS = 89_478_485;
const MAX_PIXELS_PER_BYTE = 16_384;
const MAX_SYNTHESIS_WEIGHTS = 32_768;
const METADATA_NAMES = { 1: "icc", 2: "exif", 3: "xmp" };

/** Latent spaces by number: name and channels (section 3.1). */
const SPACES = { 1: ["sd1", 4], 2: ["sdxl", 4], 3: ["sd3", 16], 4: ["flux1", 16], 5: ["flux2", 32], 6: ["clric", 8] };

/** An ArrayBuffer, a typed array, or a DataView as a Uint8Array of the same memory. */
export function asBytes(data) {
  if (data instanceof Uint8Array) return data;
  if (ArrayBuffer.isView(data)) return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  // Not instanceof: a buffer of another frame is as good.
  if (Object.prototype.toString.call(data) === "[object ArrayBuffer]") return new Uint8Array(data);
  throw new TypeError("a clric stream is given as an ArrayBuffer or a Uint8Array");
}

/** Reads fields in order, up to `end`; running past it is the error `shortage`. */
class Reader {
  constructor(bytes, end) {
    this.bytes = bytes;
    this.end = end;
    this.at = 0;
    this.shortage = "truncated";
  }

  byte(name) {
    if (this.at >= this.end) fail(this.shortage, `the file ends before the ${name}`);
    return this.bytes[this.at++];
  }

  inRange(name, lowest, highest) {
    const value = this.byte(name);
    if (value < lowest || value > highest) {
      fail("field", `${name}: ${value}, allowed are ${lowest} to ${highest}`);
    }
    return value;
  }

  u16(name) {
    return this.byte(name) * 256 + this.byte(name);
  }

  leb128(name) {
    let value = 0;
    for (let i = 0; i < 5; i++) {
      const byte = this.byte(name);
      value += (byte & 127) * 2 ** (7 * i);
      if (byte < 128) {
        if (byte === 0 && i > 0) fail("field", `${name}: the integer is not in its shortest form`);
        return value;
      }
    }
    fail("field", `${name}: longer than 5 bytes`);
  }
}

/**
 * Reads the header of a stream, checks all of it, and finds its segments.
 *
 * With `partial`, `bytes` may be the beginning of a file, to show its size before the rest has come: the checksum, what
 * goes by the file's length, and the metadata are not checked, and `segments` is null.
 */
export function parse(data, { maxPixels = MAX_PIXELS, partial = false } = {}) {
  const bytes = asBytes(data);
  checkFrame(bytes, partial);
  const reader = new Reader(bytes, partial ? bytes.length : bytes.length - 4);
  reader.at = 4;
  const flags = reader.byte("flags");
  const space = flags & 15;
  if (space > 6) {
    fail("unsupported", unknown("latent space", space));
  }
  const width = size(reader, "width");
  const height = size(reader, "height");
  checkPixels(width, height, maxPixels, partial ? Infinity : bytes.length);

  let [spaceName, channels] = SPACES[space] ?? ["custom-", 0];
  if (space === 0) {
    channels = reader.inRange("channels of the custom latent space", 1, 64);
    for (let i = 0; i < 8; i++) spaceName += reader.byte("fingerprint").toString(16).padStart(2, "0");
  }

  const functionNumber = reader.byte("function");
  let description = reader;
  if (functionNumber) {
    const registered = FUNCTIONS[functionNumber];
    if (!registered) {
      fail("unsupported", unknown("function", functionNumber));
    }
    description = new Reader(Uint8Array.from(registered.match(/../g), (digits) => parseInt(digits, 16)), Infinity);
  }
  const architecture = readArchitecture(description);
  const last = architecture.layers.at(-1).outputs;
  if (last !== channels) {
    fail("field", `the last synthesis layer has ${last} channels, the latent space has ${channels}`);
  }

  const metadataLength = flags & 16 ? reader.leb128("metadata length") : 0;
  const networksLength = reader.leb128("networks length");
  const levelLengths = architecture.levels.map(() => 0);
  for (let level = levelLengths.length - 1; level > 0; level--) {
    if (architecture.levels[level]) levelLengths[level] = reader.leb128(`length of level ${level}`);
  }

  const header = {
    version: 1,
    space: spaceName,
    imageDecoder: flags >> 5,
    width,
    height,
    channels,
    latentWidth: Math.ceil(width / 8),
    latentHeight: Math.ceil(height / 8),
    function: functionNumber,
  };
  if (partial) return { header, architecture, segments: null };
  header.bytes = bytes.length;
  header.bpp = (8 * bytes.length) / (width * height);

  const segment = (name, length) => {
    const left = reader.end - reader.at;
    if (length > left) {
      fail("truncated", `${name}: ${length} bytes, but ${left} are left`);
    }
    reader.at += length;
    return bytes.subarray(reader.at - length, reader.at);
  };
  Object.assign(header, readMetadata(segment("the metadata", metadataLength)));
  const own = segment("the networks segment", networksLength);
  const levels = [];
  for (let level = levelLengths.length - 1; level > 0; level--) {
    levels[level] = segment(`level ${level}`, levelLengths[level]);
  }
  levels[0] = segment("level 0", reader.end - reader.at);
  if (!architecture.levels[0] && levels[0].length) {
    fail("field", "bytes are left for level 0, which has no channels");
  }
  return { header, architecture, segments: { networks: registeredNetworks(functionNumber) ?? own, levels } };
}

const unknown = (what, value) => `${what} ${value} is not known; update clric`;

/** Magic, version and checksum, in this order (section 2). */
function checkFrame(bytes, partial) {
  const magic = [0xc7, 0x4c, 0x52];
  if (bytes.length === 0 || magic.some((byte, i) => i < bytes.length && bytes[i] !== byte)) {
    fail("magic", "not a clric file: it does not begin with C7 4C 52");
  }
  if (bytes.length < 4) fail("truncated", "the file ends before the version");
  if (bytes[3] !== 1) {
    fail("version", `stream version ${bytes[3]}, this decoder reads 1; update it`);
  }
  if (partial) return;
  if (bytes.length < 8) fail("checksum", "the file is too short for a checksum");
  const end = bytes.length - 4;
  const stored = new DataView(bytes.buffer, bytes.byteOffset + end).getUint32(0);
  if (crc32(bytes, end) !== stored) {
    fail("checksum", "wrong checksum: the file is damaged or incomplete");
  }
}

function crc32(bytes, end) {
  let crc = -1;
  for (let i = 0; i < end; i++) {
    crc ^= bytes[i];
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

function size(reader, name) {
  const value = reader.u16(name);
  if (!value) fail("field", `the ${name} is 0`);
  return value;
}

function checkPixels(width, height, maxPixels, fileBytes) {
  atMost(maxPixels, width * height, "pixels (raise maxPixels for more)", "limit");
  atMost(MAX_PIXELS_PER_BYTE * fileBytes, width * height, `pixels for a file of ${fileBytes} bytes`);
}

/** The architecture description (section 3.2). */
function readArchitecture(reader) {
  const levels = new Array(reader.inRange("levels", 1, 16)).fill(0);
  for (let i = 0; i < levels.length; i++) {
    levels[i] = reader.inRange(`channels of level ${i}`, i === levels.length - 1 ? 1 : 0, 64);
  }
  const stack = levels.reduce((a, b) => a + b);
  atMost(128, stack, "channels of all levels");
  const neighbours = reader.inRange("neighbours", 1, 8);
  const arm = reader.byte("hidden layers");
  if (arm >> 5) fail("unsupported", unknown("byte of hidden layers", arm));
  const hiddenLayers = arm & 15;
  atMost(4, hiddenLayers, "hidden layers");
  const width = reader.inRange("width of the ARM", 1, 48);

  const layers = [];
  let weights = 0;
  for (let n = reader.inRange("synthesis layers", 1, 8); n > 0; n--) {
    const inputs = layers.length ? layers.at(-1).outputs : stack;
    const layer = readLayer(reader, layers, inputs);
    weights += layer.outputs * (layer.depthwise ? 1 : inputs) * layer.kernel ** 2;
    layers.push(layer);
  }
  atMost(MAX_SYNTHESIS_WEIGHTS, weights, "synthesis weights");
  return { levels, stack, neighbours, hiddenLayers, width, gridScales: (arm & 16) !== 0, layers };
}

/** One synthesis layer; `residual` is how many layers back its added input is: 0 its own, -1 for none. */
function readLayer(reader, before, inputs) {
  const name = `synthesis layer ${before.length}`;
  const outputs = reader.inRange(`channels of ${name}`, 1, 64);
  const kind = reader.byte(`kind of ${name}`);
  if (kind >> 5) fail("unsupported", unknown(`kind of ${name}`, kind));
  const residual = ((kind >> 1) & 3) - 1;
  const depthwise = (kind & 16) !== 0;
  if (depthwise && outputs !== inputs) {
    fail("field", `${name}: depthwise with ${inputs} inputs and ${outputs} outputs`);
  }
  if (residual > before.length) fail("field", `${name}: the residual refers to a missing layer`);
  const added = residual > 0 ? before[before.length - residual].inputs : inputs;
  if (residual >= 0 && added !== outputs) {
    fail("field", `${name}: ${outputs} channels, what it adds has ${added}`);
  }
  return { inputs, outputs, kernel: kind & 1 ? 3 : 1, residual, relu: (kind & 8) !== 0, depthwise };
}

/** Metadata entries (section 3.4): the first of each type counts. */
function readMetadata(bytes) {
  const found = { icc: null, exif: null, xmp: null };
  for (let at = 0; at < bytes.length; ) {
    const type = bytes[at];
    const reader = new Reader(bytes, bytes.length);
    reader.shortage = "field";
    reader.at = at + 1;
    const length = reader.leb128("length of a metadata entry");
    atMost(bytes.length - reader.at, length, `length of metadata entry ${type}`);
    if (type > 127) {
      fail("unsupported", unknown("critical metadata type", type));
    }
    at = reader.at + length;
    const name = METADATA_NAMES[type];
    if (name) found[name] ??= bytes.slice(reader.at, at);
  }
  return found;
}

/**
 * From the bytes of a stream to its latent, in plain JavaScript and without dependencies. Written from
 * bitstream_spec.md alone.
 */
import { decodeGrids as gridsOf } from "./grids.js";
import { parse } from "./header.js";
import { decodeNetworks } from "./networks.js";
import { synthesize, upsample } from "./synthesis.js";

export { ClricError } from "./errors.js";
export { MAX_PIXELS } from "./header.js";

/** What the header of a stream says. `{partial: true}` reads it from the beginning of a file, unchecked. */
export function readHeader(data, options) {
  return parse(data, options).header;
}

/** The integer grids of all levels, the finest first, each in the order channel, row, column. */
export function decodeGrids(data, options) {
  const { header, architecture, segments } = parse(data, { ...options, partial: false });
  return gridsOf(header, architecture, decodeNetworks(segments.networks, architecture), segments.levels);
}

/** The latent: `data` is a Float32Array of channels x height x width. */
export function decodeLatent(data, options) {
  const { header, architecture, segments } = parse(data, { ...options, partial: false });
  const networks = decodeNetworks(segments.networks, architecture);
  const grids = gridsOf(header, architecture, networks, segments.levels);
  const latent = synthesize(header, architecture, networks, upsample(header, architecture, networks, grids));
  return { data: latent, channels: header.channels, height: header.latentHeight, width: header.latentWidth, header };
}

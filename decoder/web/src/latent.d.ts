/** A stream, an option or an image decoder that cannot be used. */
export class ClricError extends Error {
  constructor(code: ClricError["code"], message: string);
  /** The error's name in the specification of the stream; "model": an image decoder; "network": a download. */
  readonly code:
    | "magic" | "truncated" | "version" | "checksum" | "unsupported" | "field" | "limit" | "payload"
    | "model" | "network";
}

/** What the beginning of a file says. */
export interface PartialHeader {
  version: 1;
  /** "sd1", "sdxl", "sd3", "flux1", "flux2", "clric", or "custom-" and a fingerprint in hexadecimal digits. */
  space: string;
  /** The number of the image decoder that the stream was made for; 0 where it names none. */
  imageDecoder: number;
  /** Pixels. */
  width: number;
  height: number;
  /** Of the latent. */
  channels: number;
  latentWidth: number;
  latentHeight: number;
  /** The number of a registered function, or 0. */
  function: number;
}

export interface Header extends PartialHeader {
  /** Size of the file. */
  bytes: number;
  /** Bits of the file over pixels of the image. */
  bpp: number;
  /** Metadata; null where there is none. */
  icc: Uint8Array | null;
  exif: Uint8Array | null;
  xmp: Uint8Array | null;
}

export interface Latent {
  /** channels x height x width */
  data: Float32Array;
  channels: number;
  height: number;
  width: number;
  header: Header;
}

export interface StreamOptions {
  /** Images of more pixels are refused with the error "limit". */
  maxPixels?: number;
}

export const MAX_PIXELS: number;
/** Reads and checks a header. With `partial`, the beginning of a file is enough, and its checksum is not looked at. */
export function readHeader(data: ArrayBuffer | ArrayBufferView, options: StreamOptions & { partial: true }): PartialHeader;
export function readHeader(data: ArrayBuffer | ArrayBufferView, options?: StreamOptions & { partial?: false }): Header;
/** The integer grids of all levels, the finest first; each in the order channel, row, column. */
export function decodeGrids(data: ArrayBuffer | ArrayBufferView, options?: StreamOptions): Int32Array[];
export function decodeLatent(data: ArrayBuffer | ArrayBufferView, options?: StreamOptions): Latent;

import type { StreamOptions } from "./latent.js";

export { ClricError, MAX_PIXELS, decodeLatent, readHeader } from "./latent.js";
export type { Header, Latent, PartialHeader, StreamOptions } from "./latent.js";

export interface DecodeOptions extends StreamOptions {
  /**
   * An image decoder in ONNX, run by onnxruntime-web: the URL of a file made by clric-export, with its manifest (.json)
   * beside it, or where it is and what it is. `halo`: how many latent positions away a value reaches a pixel; null if
   * it reaches all.
   */
  decoder?: string | { url: string; space: string; halo: number | null };
  /** The URL of onnxruntime-web's ort.wasm.bundle.min.mjs; without it the module "onnxruntime-web/wasm" is imported. */
  ort?: string;
}

/** The image of a stream. Decodes in a worker. Errors are ClricError. */
export function decode(data: ArrayBuffer | ArrayBufferView, options?: DecodeOptions): Promise<ImageData>;

import type { ClricError } from "./latent.js";

/** <clric-image src alt width height loading decoder ort>; fires `load` and `error`. */
export class ClricImage extends HTMLElement {
  src: string;
  alt: string;
  width: number;
  height: number;
  loading: string;
  decoder: string;
  ort: string;
  readonly naturalWidth: number;
  readonly naturalHeight: number;
  readonly complete: boolean;
  readonly error: ClricError | null;
  /** Size of the file; 0 before it has come. */
  readonly bytes: number;
  /** Milliseconds that decoding took: bytes to latent, latent to pixels. */
  readonly timings: { latent: number; image: number } | null;
  /** Downloads and shows `src` now, also where `loading` is "lazy". */
  start(): Promise<void>;
}

declare global {
  interface HTMLElementTagNameMap {
    "clric-image": ClricImage;
  }
}

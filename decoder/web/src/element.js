/**
 * <clric-image src alt width height>: shows a clric image as <img> shows others.
 *
 * It decodes in a worker, has its size as soon as the header is there (at once, with `width` and `height`), and fires
 * `load` and `error`. Other attributes: `loading="lazy"`; `decoder` and `ort` as the options of `decode`.
 */
import { decodeAside } from "./client.js";
import { fetchStream } from "./fetch.js";

const LAYOUT = `
  :host { display: inline-block; max-width: 100%; vertical-align: bottom; overflow: hidden }
  :host([hidden]) { display: none }
  canvas { display: block; width: 100%; height: 100%; object-fit: inherit }
`;

class ClricImage extends HTMLElement {
  static observedAttributes = ["src", "alt", "width", "height", "decoder", "ort", "loading"];

  #canvas = document.createElement("canvas");
  #sheet = new CSSStyleSheet();
  #download = null;
  #header = null;
  #planned = false;

  /** Whether there is nothing more to come: the image is shown, has failed, or there is none. */
  complete = true;
  /** Milliseconds that decoding took, {latent, image}; null before. */
  timings = null;
  /** The size of the file in bytes; 0 before it has come. */
  bytes = 0;
  /** The ClricError, after `error`. */
  error = null;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    const layout = new CSSStyleSheet();
    layout.replaceSync(LAYOUT);
    root.adoptedStyleSheets = [layout, this.#sheet];
    this.#canvas.setAttribute("part", "image");
    root.append(this.#canvas);
  }

  get naturalWidth() {
    return this.#header?.width ?? 0;
  }

  get naturalHeight() {
    return this.#header?.height ?? 0;
  }

  connectedCallback() {
    this.#describe();
    this.#reserve();
    this.#plan();
  }

  disconnectedCallback() {
    lazy?.unobserve(this);
  }

  attributeChangedCallback(name, before, now) {
    if (!this.isConnected || before === now) return;
    if (name === "alt") this.#describe();
    else if (name === "width" || name === "height") this.#reserve();
    else this.#plan();
  }

  /** Starts once the attributes that are being set are all there. */
  #plan() {
    if (this.#planned) return;
    this.#planned = true;
    queueMicrotask(() => {
      this.#planned = false;
      if (!this.isConnected) return;
      if (this.loading === "lazy") lazyObserver().observe(this);
      else this.start();
    });
  }

  /** Downloads and shows `src` now. */
  async start() {
    lazy?.unobserve(this);
    this.#download?.abort();
    this.#download = null;
    const { src, decoder, ort } = this;
    if (!src) return;
    const download = (this.#download = new AbortController());
    this.complete = false;
    this.error = null;
    try {
      const bytes = await fetchStream(src, download.signal, (header) => {
        this.#header = header;
        this.#reserve();
      });
      const image = await decodeAside(bytes, { decoder, ort });
      if (this.#download !== download) return;
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
      this.#canvas.getContext("2d").putImageData(new ImageData(image.data, image.width, image.height), 0, 0);
      this.timings = image.timings;
      this.bytes = bytes.length;
      this.complete = true;
      this.dispatchEvent(new Event("load"));
    } catch (error) {
      if (this.#download !== download) return;
      this.error = error;
      this.complete = true;
      this.dispatchEvent(new ErrorEvent("error", { error, message: error.message }));
    }
  }

  /** Takes the place that the image will need. A page's own rules for the element win over these. */
  #reserve() {
    const width = this.width || (this.height ? (this.height * this.naturalWidth) / this.naturalHeight : this.naturalWidth);
    const height = this.height || (width * this.naturalHeight) / this.naturalWidth;
    const known = width > 0 && height > 0;
    this.#sheet.replaceSync(
      known ? `:host { width: ${width}px; aspect-ratio: ${width} / ${height} }` : width > 0 ? `:host { width: ${width}px }` : "",
    );
  }

  /** For screen readers, what <img> says: alt="" is decoration. */
  #describe() {
    this.#canvas.setAttribute("role", this.getAttribute("alt") === "" ? "presentation" : "img");
    this.#canvas.setAttribute("aria-label", this.alt);
  }
}

/** Properties that reflect attributes: text, URLs and numbers. */
for (const name of ["alt", "loading", "src", "decoder", "ort", "width", "height"]) {
  const isUrl = ["src", "decoder", "ort"].includes(name);
  const isNumber = ["width", "height"].includes(name);
  Object.defineProperty(ClricImage.prototype, name, {
    get() {
      const text = this.getAttribute(name) ?? "";
      if (isNumber) return Math.max(0, Number.parseInt(text, 10) || 0);
      return isUrl && text ? new URL(text, document.baseURI).href : text;
    },
    set(value) {
      this.setAttribute(name, value);
    },
    enumerable: true,
    configurable: true,
  });
}

let lazy = null;

function lazyObserver() {
  lazy ??= new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) if (isIntersecting) target.start();
    },
    { rootMargin: "600px" },
  );
  return lazy;
}

if (!customElements.get("clric-image")) customElements.define("clric-image", ClricImage);

export { ClricImage };

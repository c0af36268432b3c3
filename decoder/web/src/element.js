/**
 * <clric-image src alt width height>: shows a clric image as <img> shows others.
 *
 * It decodes in a worker, has its size as soon as the header is there (at once, with `width` and `height`), and fires
 * `load` and `error`. Other attributes: `loading="lazy"`; `decoder` and `ort` as the options of `decode`. It loads while
 * it is in the document.
 */
import { decodeAside } from "./client.js";
import { fetchStream } from "./fetch.js";
import { stopWaiting, whenNear } from "./lazy.js";

/** Properties that reflect attributes: text, URLs and numbers. */
const REFLECTED = ["alt", "loading", "src", "decoder", "ort", "width", "height"];

const LAYOUT = `
  :host { display: inline-block; max-width: 100%; vertical-align: bottom; overflow: hidden }
  :host([hidden]) { display: none }
  canvas { display: block; width: 100%; height: 100%; object-fit: inherit; object-position: inherit }
`;

// Where a page is rendered on a server there are no elements; the import must not fail there.
class ClricImage extends (globalThis.HTMLElement ?? Object) {
  static observedAttributes = ["src", "alt", "width", "height", "decoder", "ort", "loading"];

  #canvas = document.createElement("canvas");
  #altText = document.createElement("span");
  #sheet = new CSSStyleSheet();
  /** {width, height} of the image, once known. */
  #size = null;
  /** The AbortController of the load under way. */
  #load = null;
  /** Whether the last load has ended, well or not. */
  #ended = false;
  #planned = false;

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
    this.#clear();
    this.#describe();
  }

  /** Whether there is nothing more to come: the image is shown, has failed, or there is none. */
  get complete() {
    return this.#ended || !this.src;
  }

  get naturalWidth() {
    return this.#size?.width ?? 0;
  }

  get naturalHeight() {
    return this.#size?.height ?? 0;
  }

  connectedCallback() {
    for (const name of REFLECTED) {
      if (!Object.hasOwn(this, name)) continue; // set before this script had come
      const value = this[name];
      delete this[name];
      this[name] = value;
    }
    this.#plan();
  }

  disconnectedCallback() {
    this.#plan();
  }

  attributeChangedCallback(name) {
    if (name === "alt") this.#describe();
    else if (name === "width" || name === "height") this.#reserve();
    else {
      if (name !== "loading") this.#stop();
      this.#plan();
    }
  }

  /**
   * Starts or ends the load once the attributes that are being set are all there, and an element that is being moved is
   * at its new place.
   */
  #plan() {
    if (this.#planned) return;
    this.#planned = true;
    queueMicrotask(() => {
      this.#planned = false;
      if (this.#ended) return;
      if (!this.isConnected) this.#stop();
      else if (this.#load) return;
      else if (this.loading === "lazy" && this.src) whenNear(this, () => this.start());
      else this.start();
    });
  }

  #stop() {
    stopWaiting(this);
    this.#load?.abort();
    this.#load = null;
    this.#ended = false;
  }

  /** Downloads and shows `src` now. An image that is shown stays until the new one is there, as in <img>. */
  async start() {
    this.#stop();
    const { src, decoder, ort } = this;
    if (this.error || !src) this.#clear();
    if (!src) return;
    const load = (this.#load = new AbortController());
    try {
      const bytes = await fetchStream(src, load.signal, (header) => {
        if (!this.timings) this.#setSize(header);
      });
      const image = await decodeAside(bytes, { decoder, ort }, load.signal);
      if (this.#load !== load) return;
      this.#setSize(image);
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
      this.#canvas.getContext("2d").putImageData(new ImageData(image.data, image.width, image.height), 0, 0);
      this.timings = image.timings;
      this.bytes = bytes.length;
      this.#end(new Event("load"));
    } catch (error) {
      if (this.#load !== load) return;
      this.#clear(error);
      this.#end(new ErrorEvent("error", { error, message: error.message }));
    }
  }

  #end(event) {
    this.#load = null;
    this.#ended = true;
    this.dispatchEvent(event);
  }

  /** Back to no image; after an error, `alt` is shown. */
  #clear(error = null) {
    this.error = error;
    this.timings = null;
    this.bytes = 0;
    this.#canvas.width = this.#canvas.height = 0; // a canvas begins with 300x150
    this.shadowRoot.replaceChildren(error ? this.#altText : this.#canvas);
    this.#setSize(null);
  }

  #setSize(size) {
    this.#size = size && { width: size.width, height: size.height };
    this.#reserve();
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
    this.#altText.textContent = this.alt;
    for (const part of [this.#canvas, this.#altText]) {
      part.setAttribute("role", this.getAttribute("alt") === "" ? "presentation" : "img");
      part.setAttribute("aria-label", this.alt);
    }
  }
}

for (const name of REFLECTED) {
  const isUrl = ["src", "decoder", "ort"].includes(name);
  const isNumber = ["width", "height"].includes(name);
  Object.defineProperty(ClricImage.prototype, name, {
    get() {
      const text = this.getAttribute(name) ?? "";
      if (isNumber) return Math.max(0, Number.parseInt(text, 10) || 0);
      return isUrl && text ? absolute(text) : text;
    },
    set(value) {
      this.setAttribute(name, value);
    },
    enumerable: true,
    configurable: true,
  });
}

function absolute(url) {
  try {
    return new URL(url, document.baseURI).href;
  } catch {
    return url; // that it cannot be downloaded is an event, not an exception of this property
  }
}

if (globalThis.customElements && !customElements.get("clric-image")) customElements.define("clric-image", ClricImage);

export { ClricImage };

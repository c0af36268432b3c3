/**
 * Shows <img src="photo.clric"> on a page that is already there, also those that are added later:
 *
 *     <script type="module" src="node_modules/clric/src/polyfill.js"></script>
 *
 * The <img> stays, with its style, its `alt` and its listeners; its `src` becomes a blob of what was decoded, and
 * `data-clric-src` keeps the address. Needs `img-src blob:` where a page has a content security policy.
 */
import { decodeAside } from "./client.js";
import { fetchStream } from "./fetch.js";

const SELECTOR = "img[src*='.clric']";
const ADDRESS = /\.clric(?=$|[?#])/i;
/** <img> -> its download, whether its pixels have come, and the blob that it shows. */
const states = new WeakMap();

async function show(img) {
  const address = img.src;
  if (!ADDRESS.test(address)) return;
  states.get(img)?.download.abort();
  const state = { download: new AbortController(), done: false, url: null, placeholder: null, onEvent: () => {} };
  states.set(img, state);
  img.dataset.clricSrc = img.getAttribute("src");
  try {
    const bytes = await fetchStream(address, state.download.signal, ({ width, height }) => {
      const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`;
      put(img, state, new Blob([svg], { type: "image/svg+xml" }));
      state.placeholder = new Promise((resolve) => (state.onEvent = resolve));
    });
    const image = await decodeAside(bytes);
    await state.placeholder; // its event must not be taken for the image's
    state.done = true;
    put(img, state, bitmapFile(image));
  } catch (error) {
    if (states.get(img) !== state) return;
    state.done = true;
    console.warn(`clric: ${address}: ${error.message}`);
    img.dispatchEvent(new ErrorEvent("error", { error, message: error.message }));
  }
}

/** Gives an <img> a file to show, unless its address has changed meanwhile. */
function put(img, state, file) {
  if (states.get(img) !== state) return;
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(file);
  img.src = state.url;
}

/** RGBA pixels as a BMP file of 24 bits: it takes no time to write, and every browser shows it. */
function bitmapFile({ data, width, height }) {
  const step = Math.ceil((3 * width) / 4) * 4;
  const file = new Uint8Array(54 + step * height);
  const view = new DataView(file.buffer);
  file.set([0x42, 0x4d]);
  view.setUint32(2, file.length, true);
  view.setUint32(10, 54, true);
  view.setUint32(14, 40, true);
  view.setInt32(18, width, true);
  view.setInt32(22, -height, true); // rows from the top
  view.setUint16(26, 1, true);
  view.setUint16(28, 24, true);
  for (let y = 0; y < height; y++) {
    let to = 54 + y * step;
    for (let from = 4 * y * width; from < 4 * (y + 1) * width; from += 4) {
      file[to++] = data[from + 2];
      file[to++] = data[from + 1];
      file[to++] = data[from];
    }
  }
  return new Blob([file], { type: "image/bmp" });
}

/** The browser's own events, that it cannot show the file or has the placeholder, are not the image's. */
function hide(event) {
  const img = event.target;
  if (!(img instanceof HTMLImageElement) || !event.isTrusted) return;
  const state = states.get(img);
  if (!ADDRESS.test(img.src) && state?.done !== false) return;
  event.stopImmediatePropagation();
  if (img.src === state?.url) state.onEvent();
}

function showAll(root) {
  if (root.matches?.(SELECTOR)) show(root);
  for (const img of root.querySelectorAll?.(SELECTOR) ?? []) show(img);
}

document.addEventListener("load", hide, true);
document.addEventListener("error", hide, true);
new MutationObserver((changes) => {
  for (const { type, target, addedNodes } of changes) {
    if (type === "attributes") {
      if (target.matches(SELECTOR)) show(target);
      else if (target.src !== states.get(target)?.url) states.delete(target);
    } else {
      addedNodes.forEach(showAll);
    }
  }
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
showAll(document);

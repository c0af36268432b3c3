/**
 * Shows <img src="photo.clric"> on a page that is already there, also those that are added later:
 *
 *     <script type="module" src="node_modules/clric/src/polyfill.js"></script>
 *
 * The <img> stays, with its style, its `alt` and its listeners; its `src` becomes a blob of what was decoded, and
 * `data-clric-src` keeps the address. Needs `img-src blob:`, and `connect-src` for the images, where a page has a
 * content security policy.
 */
import { decodeAside } from "./client.js";
import { fetchStream } from "./fetch.js";
import { stopWaiting, whenNear } from "./lazy.js";

/** <img> -> its address, its download, whether all of it has ended, and the URL of the blob that it shows. */
const states = new WeakMap();

/** Whether an <img> shows the address of a clric image, and no candidates that the browser chooses from. */
function isOurs(img) {
  if (img.srcset || img.parentElement?.tagName === "PICTURE") return false;
  try {
    return /\.clric$/i.test(new URL(img.src).pathname);
  } catch {
    return false; // no address
  }
}

/** Takes an <img> whose `src` is the address of a clric image; decodes it now, or when it is near with loading="lazy". */
function take(img) {
  forget(img);
  const state = {
    address: img.src,
    download: new AbortController(),
    waiting: img.loading === "lazy",
    ended: false,
    url: null,
    putBack: false,
    onEvent: () => {},
  };
  states.set(img, state);
  img.dataset.clricSrc = img.getAttribute("src");
  if (state.waiting) whenNear(img, () => show(img, state));
  else show(img, state);
}

async function show(img, state) {
  state.waiting = false;
  try {
    let placeholder = null;
    const bytes = await fetchStream(state.address, state.download.signal, ({ width, height }) => {
      const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`;
      put(img, state, new Blob([svg], { type: "image/svg+xml" }));
      placeholder = new Promise((resolve) => (state.onEvent = resolve));
    });
    const image = await decodeAside(bytes, {}, state.download.signal);
    await placeholder; // its event must not be taken for the image's
    if (state.download.signal.aborted) return;
    state.ended = true;
    put(img, state, bitmapFile(image));
  } catch (error) {
    if (state.download.signal.aborted) return;
    state.ended = true;
    console.warn(`clric: ${state.address}: ${error.message}`);
    if (state.url) {
      // The browser cannot show the file itself, and so shows `alt`.
      URL.revokeObjectURL(state.url);
      state.url = null;
      state.putBack = true;
      img.src = img.dataset.clricSrc;
    }
    img.dispatchEvent(new ErrorEvent("error", { error, message: error.message }));
  }
}

/** Gives an <img> a file to show. */
function put(img, state, file) {
  URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(file);
  img.src = state.url;
}

/** Ends what was begun for an <img>. What it shows stays: the browser needs no blob any more for that. */
function release(img) {
  const state = states.get(img);
  if (!state) return;
  stopWaiting(img);
  state.download.abort();
  URL.revokeObjectURL(state.url);
}

function forget(img) {
  release(img);
  if (states.delete(img)) delete img.dataset.clricSrc;
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
  if (!isOurs(img) && state?.ended !== false) return;
  event.stopImmediatePropagation();
  if (img.src === state?.url) state.onEvent();
}

function images(node) {
  if (node instanceof HTMLImageElement) return [node];
  return node.querySelectorAll?.("img") ?? [];
}

function onAdded(img) {
  const state = states.get(img);
  if (!state && img.dataset.clricSrc && img.src.startsWith("blob:")) {
    img.src = img.dataset.clricSrc; // a copy of one that was taken, whose blob may be gone
    return;
  }
  if (img.src !== (state?.url ?? state?.address)) onSource(img); // new, or changed while it was not in the document
  else if (state.download.signal.aborted && !state.ended) img.src = img.dataset.clricSrc; // starts again
}

function onRemoved(img) {
  if (!img.isConnected) release(img);
}

function onSource(img) {
  const state = states.get(img);
  if (state?.putBack) state.putBack = false;
  else if (isOurs(img)) take(img);
  else if (state && img.src !== state.url) forget(img);
}

function onLoading(img) {
  if (states.get(img)?.waiting) take(img);
}

// Where a page is rendered on a server there is no document; the import must not fail there.
if (globalThis.document) {
  document.addEventListener("load", hide, true);
  document.addEventListener("error", hide, true);
  new MutationObserver((changes) => {
    for (const { attributeName, target, addedNodes, removedNodes } of changes) {
      if (attributeName && target instanceof HTMLImageElement) (attributeName === "src" ? onSource : onLoading)(target);
      for (const node of removedNodes) images(node).forEach(onRemoved);
      for (const node of addedNodes) images(node).forEach(onAdded);
    }
  }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["src", "loading"] });
  images(document).forEach(onAdded);
}

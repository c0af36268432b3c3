/**
 * Decodes images in workers, as many at a time as the machine has cores to spare; in this thread where there are no
 * workers or a page's policy forbids them.
 */
import { ClricError, fail } from "./errors.js";
import { decodeImage } from "./image.js";

const MOST_WORKERS = Math.max(1, Math.min(4, Math.floor((globalThis.navigator?.hardwareConcurrency ?? 2) / 2)));
const workers = [];
const waiting = [];
let canWork = typeof Worker === "function" && typeof document === "object";

/** Inside `try`, so that bundlers only warn where this optional package is not installed. */
async function importOrt() {
  try {
    return await import("onnxruntime-web/wasm");
  } catch (error) {
    return fail(
      "model",
      `an .onnx decoder needs onnxruntime-web (${error.message}); install it, or give the URL of its ` +
        'ort.wasm.bundle.min.mjs as "ort"',
    );
  }
}

/**
 * What `decodeImage` gives, computed in a worker. Errors are ClricError. `signal`, an AbortSignal, ends it, with its
 * reason; not where this thread decodes.
 */
export function decodeAside(data, { decoder, ort, maxPixels } = {}, signal) {
  const options = { decoder: located(decoder), ort: ort && absolute(ort), maxPixels };
  // Copied now: the caller may change or transfer the buffer while the task waits.
  const bytes = new Uint8Array(data);
  // onnxruntime-web as a module of the page's bundle is only to be had in the page's own thread.
  if (!canWork || (decoder && !ort)) return decodeImage(bytes, options, importOrt);
  if (signal?.aborted) return Promise.reject(signal.reason);
  const task = { bytes, options };
  const result = new Promise((resolve, reject) => Object.assign(task, { resolve, reject }));
  const onAbort = () => drop(task, signal.reason);
  signal?.addEventListener("abort", onAbort);
  waiting.push(task);
  dispatch();
  // The signal may live as long as its image, and would keep all pixels with it
  return result.finally(() => signal?.removeEventListener("abort", onAbort));
}

/** An image decoder with its address as the page means it: a worker has an address of its own. */
function located(decoder) {
  if (typeof decoder !== "object" || !decoder) return decoder && absolute(decoder);
  return { url: absolute(decoder.url), space: decoder.space, halo: decoder.halo };
}

function absolute(url) {
  try {
    return new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href).href;
  } catch {
    return fail("model", `${url} is not an address`);
  }
}

/** Ends a task whose result nobody waits for any more. */
function drop(task, reason) {
  const worker = workers.find((one) => one.task === task);
  if (worker) {
    worker.port.terminate();
    workers.splice(workers.indexOf(worker), 1);
  } else if (waiting.includes(task)) {
    waiting.splice(waiting.indexOf(task), 1);
  }
  task.reject(reason);
  dispatch();
}

function dispatch() {
  while (waiting.length) {
    let worker = workers.find((one) => !one.task);
    if (!worker) {
      if (workers.length >= MOST_WORKERS) return;
      worker = start();
      if (!worker) return;
    }
    worker.task = waiting.shift();
    const { bytes, options } = worker.task; // not transferred: the task may have to be decoded here after all
    worker.port.postMessage({ id: 0, bytes, options });
  }
}

function start() {
  let port;
  try {
    port = makeWorker();
  } catch {
    withoutWorkers();
    return null;
  }
  const worker = { port, task: null, ready: false };
  workers.push(worker);
  port.addEventListener("message", ({ data }) => {
    worker.ready = true;
    if (data.ready) return;
    const { task } = worker;
    worker.task = null;
    if (data.image) task.resolve(data.image);
    else task.reject(revive(data.error));
    dispatch();
  });
  port.addEventListener("error", (event) => {
    event.preventDefault();
    port.terminate();
    workers.splice(workers.indexOf(worker), 1);
    const { task } = worker;
    if (!worker.ready) {
      // It could not be loaded: a policy forbids workers, or the file is elsewhere.
      if (task) waiting.unshift(task);
      withoutWorkers();
    } else {
      task?.reject(new ClricError("model", `the worker failed (${event.message})`));
      dispatch();
    }
  });
  return worker;
}

/** Browsers start workers of the page's own origin only; a package on another one is imported by a small script. */
function makeWorker() {
  const url = new URL(/* @vite-ignore */ "./worker.js", import.meta.url); // which it would make a data: URL of
  if (url.origin === location.origin) {
    // Bundlers know a worker by these very words.
    return new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  }
  const script = URL.createObjectURL(new Blob([`import ${JSON.stringify(url.href)};`], { type: "text/javascript" }));
  return new Worker(script, { type: "module" });
}

function withoutWorkers() {
  if (canWork) console.warn("clric: no worker starts here; images are decoded in the page's own thread");
  canWork = false;
  for (const { bytes, options, resolve, reject } of waiting.splice(0)) {
    decodeImage(bytes, options, importOrt).then(resolve, reject);
  }
}

function revive({ name, code, message }) {
  if (code) return new ClricError(code, message);
  return name === "TypeError" ? new TypeError(message) : new Error(message);
}

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

/** What `decodeImage` gives, computed in a worker. Errors are ClricError. */
export function decodeAside(bytes, options = {}) {
  // onnxruntime-web as a module of the page's bundle is only to be had in the page's own thread.
  if (!canWork || (options.decoder && !options.ort)) return decodeImage(bytes, options, importOrt);
  return new Promise((resolve, reject) => {
    waiting.push({ bytes, options, resolve, reject });
    dispatch();
  });
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
    // A copy: a view would be sent with all of the buffer it lies in, and the task may have to be decoded here after all.
    const bytes = new Uint8Array(worker.task.bytes);
    worker.port.postMessage({ id: 0, bytes, options: worker.task.options }, [bytes.buffer]);
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
  const url = new URL("./worker.js", import.meta.url);
  if (url.origin === location.origin) {
    // Bundlers know a worker by these very words.
    return new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  }
  const script = URL.createObjectURL(new Blob([`import ${JSON.stringify(url.href)};`], { type: "text/javascript" }));
  return new Worker(script, { type: "module" });
}

function withoutWorkers() {
  canWork = false;
  for (const { bytes, options, resolve, reject } of waiting.splice(0)) {
    decodeImage(bytes, options, importOrt).then(resolve, reject);
  }
}

function revive({ name, code, message }) {
  if (code) return new ClricError(code, message);
  return name === "TypeError" ? new TypeError(message) : new Error(message);
}

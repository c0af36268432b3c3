/**
 * Measures the package in Chromium: node make/measure.mjs PHOTO.clric [more files]
 *
 * For each file, medians of 15 in milliseconds after loading: bytes to latent, latent to pixels (our WebAssembly and
 * onnxruntime-web), and what a page waits for the first image. Then what a first visit downloads.
 */
import { readFileSync, readdirSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";
import { brotliCompressSync, gzipSync } from "node:zlib";
import { buildSync } from "esbuild";
import { chromium } from "playwright-core";
import { serve } from "../test/server.mjs";

const root = new URL("../", import.meta.url);
const files = process.argv.slice(2).map((file) => resolve(file));
const server = await serve(
  { "/package/": root, "/shipped/": new URL("../clric_decoder/weights/", root), "/files/": dirname(files[0] ?? "") },
  { pages: { "/": "<!doctype html><title>measure</title>" } },
);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });

for (const file of files) {
  for (const decoder of [null, "onnx"]) {
    const page = await browser.newPage();
    await page.goto(server.address);
    const times = await page.evaluate(async ([address, decoder]) => {
      const bytes = await (await fetch(address)).arrayBuffer();
      const start = performance.now();
      const { decodeAside } = await import("/package/src/client.js");
      const { readHeader } = await import("/package/src/latent.js");
      const name = { clric: "small", sd1: "lite" }[readHeader(bytes).space];
      const ort = `${location.origin}/package/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs`;
      const options = decoder ? { decoder: `${location.origin}/shipped/${name}.onnx`, ort } : {};
      const times = { latent: [], image: [], all: [] };
      for (let i = 0; i < 16; i++) {
        const before = performance.now();
        const { data, width, height, timings } = await decodeAside(new Uint8Array(bytes), options);
        new ImageData(data, width, height);
        if (i === 0) times.first = performance.now() - start;
        else times.all.push(performance.now() - before);
        for (const part of ["latent", "image"]) if (i) times[part].push(timings[part]);
      }
      const median = (list) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)];
      return { first: times.first, latent: median(times.latent), image: median(times.image), all: median(times.all) };
    }, [`/files/${basename(file)}`, decoder]);
    const text = Object.entries(times).map(([part, time]) => `${part} ${time.toFixed(0)}`);
    console.log(`${basename(file)}, ${decoder ? "onnxruntime-web" : "WebAssembly"}: ${text.join(", ")} ms`);
    await page.close();
  }
}
await browser.close();
server.close();

const sizes = (name, bytes) =>
  console.log(`${name}: ${bytes.length} bytes, gzip ${gzipSync(bytes, { level: 9 }).length}, brotli ${brotliCompressSync(bytes).length}`);
const bundle = (entry) =>
  Buffer.concat(
    buildSync({
      entryPoints: [new URL(entry, root).pathname],
      bundle: true,
      minify: true,
      format: "esm",
      external: ["onnxruntime-web/wasm"],
      write: false,
    }).outputFiles.map(({ contents }) => contents),
  );
sizes("bytes to latent, minified", bundle("src/latent.js"));
sizes("element with all its code, minified", bundle("src/element.js"));
sizes("the worker, minified", bundle("src/worker.js"));
for (const file of ["src/image_decoder.wasm", "weights/small.bin", "weights/lite.bin"]) sizes(file, readFileSync(new URL(file, root)));
const plain = readdirSync(new URL("src", root)).filter((file) => file.endsWith(".js"));
const modules = plain.map((file) => gzipSync(readFileSync(new URL(`src/${file}`, root))).length);
console.log(`all modules as they are, gzip each: ${modules.reduce((a, b) => a + b)} bytes`);

// The package as a user's tools see it: a bundler, and TypeScript.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import * as vite from "vite";

const root = fileURLToPath(new URL("../", import.meta.url));
const project = mkdtempSync(join(tmpdir(), "clric-"));
after(() => rmSync(project, { recursive: true }));
// Installed as npm does it, without onnxruntime-web
for (const part of ["src", "package.json"]) cpSync(join(root, part), join(project, "node_modules", "clric", part), { recursive: true });

test("esbuild bundles every entry without onnxruntime-web", async () => {
  const contents = `import "clric/element"; import "clric/polyfill"; export * from "clric"; export * from "clric/latent"`;
  const { outputFiles } = await build({
    stdin: { contents, resolveDir: project },
    bundle: true,
    format: "esm",
    write: false,
  });
  assert.match(outputFiles[0].text, /clric-image/);
});

test("Vite builds the worker as a file that a page can start", async () => {
  const input = join(project, "main.js");
  writeFileSync(input, `import { decode } from "clric"; window.decode = decode;`);
  const { output } = await vite.build({ root: project, logLevel: "error", build: { write: false, rollupOptions: { input } } });
  const worker = output.find(({ fileName }) => /worker-[^/]*\.js$/.test(fileName));
  assert.ok(output.some(({ code }) => code?.includes(worker.fileName)), "nothing refers to the worker");
  assert.ok(output.every(({ code }) => !code?.includes("data:text/javascript")), "a worker in a data: address cannot import");
});

test("the types are those of a strict project", () => {
  const source = `
    import { ClricError, decode, readHeader, type Header } from "clric";
    import { decodeLatent } from "clric/latent";
    import { ClricImage } from "clric/element";
    import "clric/polyfill";
    export const bpp: number = readHeader(new Uint8Array()).bpp;
    export const width: number = readHeader(new Uint8Array(), { partial: true }).width;
    // @ts-expect-error: the beginning of a file does not say its size
    readHeader(new Uint8Array(), { partial: true }).bytes;
    export const header: Header = decodeLatent(new ArrayBuffer(8)).header;
    export const error: Error = new ClricError("network", "no answer");
    // @ts-expect-error: the code comes first
    new ClricError("no answer");
    const image: ClricImage = document.createElement("clric-image");
    image.src = "photo.clric";
    export const pixels: Promise<ImageData> = decode(new Uint8Array(), { maxPixels: 1e6 });
  `;
  writeFileSync(join(project, "page.ts"), source);
  const options = "--noEmit --strict --target es2022 --module esnext --moduleResolution bundler".split(" ");
  const done = spawnSync(process.execPath, [join(root, "node_modules/typescript/bin/tsc"), ...options, "page.ts"], { cwd: project });
  assert.equal(`${done.stdout}${done.stderr}`, "");
});

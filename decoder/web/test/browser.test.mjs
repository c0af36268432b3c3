// The package in Chromium: decoding, the element, the polyfill, under a content security policy.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";
import { serve } from "./server.mjs";

const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const skip = existsSync(executablePath) ? false : `${executablePath} is missing: apt-get install chromium, or set CHROMIUM`;

const here = new URL("./", import.meta.url);
const folders = {
  "/package/": new URL("../", here),
  "/conformance/": new URL("../../../tests/conformance/", here),
  "/shipped/": new URL("../../clric_decoder/weights/", here),
};
const ORT = "/package/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
const PHOTO = "/conformance/valid/image-decoder-clric-1.clric"; // made for the image decoder of 1.0
const NEW = "/conformance/valid/function-12.clric";
const PHOTO_SD1 = "/conformance/valid/size-odd-131x77.clric";
// Latents of usual magnitude, which those of some vectors are not.
const USUAL_SD1 = "/conformance/valid/size-portrait-40x200.clric";
const OLD_SD1 = "/conformance/valid/image-decoder-sd1-1.clric"; // made for the image decoder of 1.0
const OTHER_SPACE = "/conformance/valid/space-flux1.clric";
const DAMAGED = "/conformance/invalid/checksum-cut.clric";
// No script but those of the origin, no eval; WebAssembly must be allowed by name. Workers and blobs as the README says.
const POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob:; object-src 'none'";

const pages = {
  "/conformance/valid/PHOTO.CLRIC": readFileSync(new URL("valid/size-odd-131x77.clric", folders["/conformance/"])),
  "/empty": "<!doctype html><title>test</title>",
  "/element": `<!doctype html><title>element</title><script type="module" src="/package/src/element.js"></script>
    <p><clric-image id="sized" src="${PHOTO_SD1}?slow" alt="A photo" width="131" height="77"></clric-image>
    <p><clric-image id="unsized" src="${PHOTO}?slow" alt=""></clric-image><p id="after">after</p>`,
  "/polyfill": `<!doctype html><title>polyfill</title><img id="first" src="${PHOTO_SD1}" alt="A photo">
    <script type="module" src="/package/src/polyfill.js"></script>`,
};

let server, elsewhere, browser;

before(async () => {
  if (skip) return;
  server = await serve(folders, { policy: POLICY, pages });
  elsewhere = await serve(folders, { pages });
  browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
});

after(async () => {
  await browser?.close();
  server?.close();
  elsewhere?.close();
});

/** Runs `body` with a fresh page at `path`; what the console calls an error fails the test, but for those `expected`. */
async function withPage(path, body, { address = server.address, expected } = {}) {
  const context = await browser.newContext();
  const page = await context.newPage();
  const errors = [];
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(error.message));
  await page.goto(address + path, { waitUntil: "commit" });
  try {
    await body(page);
  } finally {
    await context.close();
  }
  assert.deepEqual(errors.filter((error) => !expected?.test(error)), []);
}

test("all conformance vectors in Chromium", { skip }, () =>
  withPage("/empty", async (page) => {
    const result = await page.evaluate(async () => {
      const { runSuite } = await import("/package/test/suite.js");
      return runSuite(async (path) => new Uint8Array(await (await fetch(`/conformance/${path}`)).arrayBuffer()));
    });
    assert.deepEqual(result.failures, []);
    assert.ok(result.streams > 100);
  }));

for (const [name, photo] of [["small", NEW], ["1.0/small", PHOTO], ["lite", USUAL_SD1], ["1.0/lite", OLD_SD1]]) {
  test(`the WebAssembly decoder ${name} is within one grey level of onnxruntime-web`, { skip }, () =>
    withPage("/empty", async (page) => {
      const result = await page.evaluate(async ([photo, decoder, ort]) => {
        const { decode } = await import("/package/src/index.js");
        const bytes = await (await fetch(photo)).arrayBuffer();
        const ours = await decode(bytes);
        const theirs = await decode(new Uint8Array(bytes), { decoder: location.origin + decoder, ort: location.origin + ort });
        const differences = ours.data.map((value, i) => Math.abs(value - theirs.data[i]));
        return { size: [ours.width, ours.height], largest: Math.max(...differences), alpha: Math.min(...ours.data.filter((_, i) => i % 4 === 3)) };
      }, [photo, `/shipped/${name}.onnx`, ORT]);
      assert.ok(result.largest <= 1, `${result.largest} grey levels`);
      assert.equal(result.alpha, 255);
    }));
}

test("a worker gets a view's bytes, not the buffer that they lie in, which stays the caller's", { skip }, () =>
  withPage("/empty", async (page) => {
    const result = await page.evaluate(async (photo) => {
      const { decode } = await import("/package/src/index.js");
      const bytes = new Uint8Array(await (await fetch(photo)).arrayBuffer());
      const larger = new Uint8Array(1e6);
      larger.set(bytes, 5);
      const sent = [];
      const post = Worker.prototype.postMessage;
      Worker.prototype.postMessage = function (message, ...rest) {
        sent.push(message.bytes.buffer.byteLength);
        return post.call(this, message, ...rest);
      };
      const { width } = await decode(larger.subarray(5, 5 + bytes.length));
      return { width, sent: sent[0] === bytes.length, kept: larger[5] === bytes[0] };
    }, PHOTO_SD1);
    assert.deepEqual(result, { width: 131, sent: true, kept: true });
  }));

test("a caller may transfer a buffer at once, and an option that workers do not know stops nothing", { skip }, () =>
  withPage("/empty", async (page) => {
    const widths = await page.evaluate(async (photo) => {
      const { decode } = await import("/package/src/index.js");
      const file = await (await fetch(photo)).arrayBuffer();
      const widths = Array.from({ length: 9 }, async () => {
        const own = file.slice();
        const image = decode(own, { signal: new AbortController().signal });
        structuredClone(own, { transfer: [own] });
        return (await image).width;
      });
      return Promise.all(widths);
    }, PHOTO_SD1);
    assert.deepEqual(widths, Array(9).fill(131));
  }));

test("addresses of decoders are relative to the page", { skip }, () =>
  withPage("/empty", async (page) => {
    const width = await page.evaluate(async ([photo, ort]) => {
      const { decode } = await import("/package/src/index.js");
      const bytes = await (await fetch(photo)).arrayBuffer();
      return (await decode(bytes, { decoder: "shipped/lite.onnx", ort: ort.slice(1) })).width;
    }, [USUAL_SD1, ORT]);
    assert.equal(width, 40);
  }));

test("decoding that nobody waits for any more ends, and later images are decoded", { skip }, () =>
  withPage("/empty", async (page) => {
    const result = await page.evaluate(async (photo) => {
      const { decodeAside } = await import("/package/src/client.js");
      const bytes = new Uint8Array(await (await fetch(photo)).arrayBuffer());
      let ended = 0;
      const { terminate } = Worker.prototype;
      Worker.prototype.terminate = function () {
        ended++;
        return terminate.call(this);
      };
      const controllers = Array.from({ length: 6 }, () => new AbortController());
      const tasks = controllers.map(({ signal }) => decodeAside(bytes, {}, signal).catch((error) => error.name));
      for (const controller of controllers) controller.abort();
      const { width } = await decodeAside(bytes);
      return { names: await Promise.all(tasks), ended: ended > 0, width };
    }, PHOTO_SD1);
    assert.deepEqual(result, { names: Array(6).fill("AbortError"), ended: true, width: 131 });
  }));

test("tiles of a large image meet without a seam", { skip }, () =>
  withPage("/empty", async (page) => {
    const largest = await page.evaluate(async () => {
      const { makeWasmDecoder } = await import("/package/src/wasm_decoder.js");
      const file = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
      const imageDecoder = await makeWasmDecoder(await file("/package/src/image_decoder.wasm"), await file("/package/weights/small.bin"));
      const [channels, height, width] = [8, 75, 131];
      const data = Float32Array.from({ length: channels * height * width }, (_, i) => Math.sin(i * 0.37) + Math.cos(i * i));
      const whole = imageDecoder.decode({ data, channels, height, width }, 1045, 599);
      const tiles = imageDecoder.decode({ data, channels, height, width }, 1045, 599, 3136);
      return whole.reduce((most, value, i) => Math.max(most, Math.abs(value - tiles[i])), 0);
    });
    assert.ok(largest <= 1, `${largest} grey levels`);
  }));

test("errors have the specification's names; a latent space without a decoder says what to give", { skip }, () =>
  withPage("/empty", async (page) => {
    const codes = await page.evaluate(async (paths) => {
      const { ClricError, decode } = await import("/package/src/index.js");
      const codes = [];
      for (const path of paths) {
        const bytes = await (await fetch(path)).arrayBuffer();
        await decode(bytes).catch((error) => codes.push(error instanceof ClricError && error.code));
      }
      await decode("text").catch((error) => codes.push(error.name));
      const wrong = { decoder: { url: `${location.origin}/shipped/lite.onnx`, space: "sd1", halo: 14 } };
      const bytes = await (await fetch(paths[1])).arrayBuffer();
      const ort = `${location.origin}/package/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs`;
      await decode(bytes, { ...wrong, ort }).catch((error) => codes.push(error.message));
      return codes;
    }, [DAMAGED, OTHER_SPACE]);
    assert.deepEqual(codes.slice(0, 3), ["checksum", "model", "TypeError"]);
    assert.match(codes[3], /lite.onnx is of latent space sd1, the stream of flux1/);
  }));

test("the element takes its place before its pixels come, and nothing moves", { skip }, () =>
  withPage("/element", async (page) => {
    await page.waitForFunction(() => document.querySelector("#unsized")?.naturalWidth > 0);
    const early = await page.evaluate(() => {
      const box = (id) => document.getElementById(id).getBoundingClientRect();
      return { complete: sized.complete, sized: [box("sized").width, box("sized").height], natural: unsized.naturalWidth, unsized: box("unsized").width, after: box("after").top };
    });
    assert.equal(early.complete, false);
    assert.deepEqual(early.sized, [131, 77]);
    assert.equal(early.unsized, early.natural);
    await page.waitForFunction(() => sized.complete && unsized.complete);
    const late = await page.evaluate(() => ({
      after: document.getElementById("after").getBoundingClientRect().top,
      natural: [sized.naturalWidth, sized.naturalHeight],
      colours: new Set(sized.shadowRoot.querySelector("canvas").getContext("2d").getImageData(0, 0, 131, 77).data).size,
      timed: sized.timings.latent > 0 && sized.timings.image > 0,
      bytes: sized.bytes,
    }));
    assert.equal(late.after, early.after);
    assert.deepEqual(late.natural, [131, 77]);
    assert.ok(late.colours > 10 && late.timed && late.bytes > 0);
    assert.equal(await page.getByRole("img", { name: "A photo" }).count(), 1);
    assert.equal(await page.getByRole("img").count(), 1, "an empty alt is decoration");
  }));

test("the element fires load and error, follows src, and uses the browser's cache", { skip }, () =>
  withPage("/empty", async (page) => {
    const result = await page.evaluate(async ([photo, other, damaged]) => {
      await import("/package/src/element.js");
      const image = document.createElement("clric-image");
      const outcome = () =>
        new Promise((resolve) => {
          image.onload = null;
          image.addEventListener("load", () => resolve(`${image.naturalWidth}x${image.naturalHeight}`), { once: true });
          image.addEventListener("error", (event) => resolve(event.error.code), { once: true });
        });
      document.body.append(image);
      const outcomes = [];
      for (const src of [photo, damaged, "/nowhere.clric", other, photo]) {
        image.src = src;
        outcomes.push(await outcome());
      }
      image.src = damaged;
      image.src = other; // the last one counts
      outcomes.push(await outcome());
      return outcomes;
    }, [PHOTO_SD1, PHOTO, DAMAGED]);
    const size = result[3];
    assert.deepEqual(result, ["131x77", "checksum", "network", size, "131x77", size]);
    const asked = (path) => server.requests.filter((one) => one === path).length;
    assert.ok(asked("/package/src/image_decoder.wasm") > 0);
  }, { expected: /404/ }));

test("properties that were set before the script had come count", { skip }, () =>
  withPage("/empty", async (page) => {
    const width = await page.evaluate(async (photo) => {
      const element = document.body.appendChild(document.createElement("clric-image"));
      element.src = photo;
      const loaded = new Promise((resolve) => element.addEventListener("load", resolve));
      await import("/package/src/element.js");
      await loaded;
      return element.naturalWidth;
    }, PHOTO_SD1);
    assert.equal(width, 131);
  }));

test("the element has no size before one is known, and after an error its alt text", { skip }, () =>
  withPage("/empty", async (page) => {
    const result = await page.evaluate(async ([photo, damaged]) => {
      await import("/package/src/element.js");
      const make = (attributes) => {
        const image = Object.assign(document.createElement("clric-image"), attributes);
        document.body.append(image);
        return image;
      };
      const box = (image) => [image.offsetWidth, image.offsetHeight];
      const ended = (image) => new Promise((resolve) => ["load", "error"].forEach((type) => image.addEventListener(type, resolve, { once: true })));
      const unsized = make({ src: photo, alt: "A lighthouse" });
      const sized = make({ src: damaged, alt: "A damaged photo", width: 131, height: 77 });
      const decoration = make({ src: damaged, alt: "" });
      const early = [unsized, sized, decoration].map(box);
      await Promise.all([unsized, sized, decoration].map(ended));
      const late = [unsized, sized, decoration].map(box);
      unsized.src = damaged;
      await ended(unsized);
      const { naturalWidth, bytes, timings } = unsized;
      const [width, height] = box(unsized);
      const failed = { naturalWidth, bytes, timings, pixels: unsized.shadowRoot.querySelector("canvas"), small: width < 131 && height < 77 };
      unsized.src = photo;
      await ended(unsized);
      return { early, late, failed, again: [unsized.error, ...box(unsized)], text: sized.shadowRoot.textContent };
    }, [PHOTO_SD1, DAMAGED]);
    assert.deepEqual(result.early, [[0, 0], [131, 77], [0, 0]]);
    assert.deepEqual(result.late, [[131, 77], [131, 77], [0, 0]]);
    assert.deepEqual(result.failed, { naturalWidth: 0, bytes: 0, timings: null, pixels: null, small: true });
    assert.deepEqual(result.again, [null, 131, 77]);
    assert.equal(result.text, "A damaged photo");
    assert.equal(await page.getByRole("img", { name: "A damaged photo" }).count(), 1);
  }));

test("the element's states are those of <img>, and moving it loads nothing", { skip }, () =>
  withPage("/empty", async (page) => {
    const before = server.requests.length;
    const result = await page.evaluate(async (photo) => {
      await import("/package/src/element.js");
      const image = document.createElement("clric-image");
      const events = [];
      for (const type of ["load", "error"]) image.addEventListener(type, () => events.push(type));
      const wait = () => new Promise((resolve) => setTimeout(resolve, 600));
      const complete = [image.complete];
      image.src = `${photo}?slow`;
      document.body.append(image);
      complete.push(image.complete);
      await Promise.resolve();
      image.removeAttribute("src");
      complete.push(image.complete);
      await wait();
      const withoutSource = [...events];
      image.src = `${photo}?removed`;
      await Promise.resolve();
      image.remove();
      await wait();
      const removed = [...events, image.complete];
      image.src = photo;
      document.body.append(image);
      document.body.prepend(image); // moved while it loads
      await new Promise((resolve) => image.addEventListener("load", resolve));
      complete.push(image.complete);
      document.body.append(image); // and when it is shown
      await wait();
      return { complete, withoutSource, removed, events, shown: image.shadowRoot.querySelector("canvas").width };
    }, PHOTO_SD1);
    assert.deepEqual(result.complete, [true, false, true, true]);
    assert.deepEqual(result.withoutSource, []);
    assert.deepEqual(result.removed, [false]);
    assert.deepEqual(result.events, ["load"]);
    assert.equal(result.shown, 131);
    assert.ok(server.requests.slice(before).filter((path) => path === PHOTO_SD1).length <= 3); // two that were given up, and one
  }));

test("a second element of the same address takes it from the cache", { skip }, () =>
  withPage("/empty", async (page) => {
    const address = `${PHOTO}?cached`;
    const before = server.requests.length;
    await page.evaluate(async (address) => {
      await import("/package/src/element.js");
      for (let i = 0; i < 2; i++) {
        const image = document.createElement("clric-image");
        image.src = address;
        document.body.append(image);
        await new Promise((resolve) => image.addEventListener("load", resolve));
      }
    }, address);
    assert.equal(server.requests.slice(before).filter((path) => path === PHOTO).length, 1);
  }));

test("a lazy element below waits until it is scrolled to", { skip }, () =>
  withPage("/empty", async (page) => {
    await page.evaluate(async (photo) => {
      await import("/package/src/element.js");
      document.body.innerHTML = `<div></div><clric-image id="low" loading="lazy" width="9" height="9" src="${photo}"></clric-image>`;
      document.querySelector("div").style.height = "9000px";
    }, PHOTO);
    await page.waitForTimeout(300);
    assert.equal(await page.evaluate(() => low.naturalWidth), 0);
    await page.evaluate(() => low.scrollIntoView());
    await page.waitForFunction(() => low.naturalWidth > 0 && low.complete);
  }));

for (const origin of ["own", "another"]) {
  test(`the polyfill shows <img> that are there and that are added, from ${origin} origin`, { skip }, async () => {
    const source = origin === "own" ? server : elsewhere;
    const host = await serve(folders, {
      policy: origin === "own" ? POLICY : undefined,
      pages: { "/polyfill": pages["/polyfill"].replace("/package", `${source === server ? "" : source.address}/package`) },
    });
    await withPage("/polyfill", async (page) => {
      await page.waitForFunction(() => first.naturalWidth === 131 && first.complete);
      const result = await page.evaluate(async (photo) => {
        const events = [];
        const added = new Image();
        added.alt = "Added";
        added.addEventListener("error", () => events.push("error"));
        const loaded = new Promise((resolve) => added.addEventListener("load", () => resolve(events.push("load"))));
        added.src = photo;
        document.body.append(added);
        await loaded;
        const canvas = new OffscreenCanvas(added.naturalWidth, added.naturalHeight).getContext("2d");
        canvas.drawImage(added, 0, 0);
        const shown = canvas.getImageData(0, 0, added.naturalWidth, added.naturalHeight).data;
        const { decode } = await import(document.querySelector("script").src.replace("polyfill", "index"));
        const image = await decode(await (await fetch(photo)).arrayBuffer());
        return { events, difference: image.data.reduce((most, value, i) => Math.max(most, Math.abs(value - shown[i])), 0), kept: added.dataset.clricSrc === photo };
      }, PHOTO);
      assert.deepEqual(result, { events: ["load"], difference: 0, kept: true });
      assert.equal(await page.getByRole("img", { name: "A photo" }).count(), 1);
    }, { address: host.address });
    host.close();
  });
}

test("the polyfill waits with loading=lazy, and finds addresses in capitals", { skip }, () =>
  withPage("/polyfill", async (page) => {
    const before = server.requests.length;
    const asked = () => server.requests.slice(before).filter((path) => path === PHOTO).length;
    await page.evaluate((photo) => {
      const space = document.body.appendChild(document.createElement("div"));
      space.style.height = "9000px";
      space.insertAdjacentHTML("afterend", `<img id="low" loading="lazy" src="${photo}">`);
      document.body.insertAdjacentHTML("afterbegin", `<img id="capitals" src="/conformance/valid/PHOTO.CLRIC">`);
    }, PHOTO);
    await page.waitForFunction(() => first.naturalWidth === 131 && capitals.naturalWidth === 131);
    await page.waitForTimeout(300);
    assert.equal(asked(), 0);
    await page.evaluate(() => low.scrollIntoView());
    await page.waitForFunction(() => low.complete && low.src.startsWith("blob:") && low.naturalWidth > 0);
  }));

test("the polyfill shows copies of images that are gone, and leaves those of others alone", { skip }, () =>
  withPage("/polyfill", async (page) => {
    await page.waitForFunction(() => first.naturalWidth === 131 && first.complete);
    const result = await page.evaluate(async () => {
      const copy = first.cloneNode();
      first.remove();
      await new Promise((resolve) => setTimeout(resolve, 50));
      const loaded = new Promise((resolve) => copy.addEventListener("load", resolve));
      document.body.append(copy);
      await loaded;
      const other = new Image();
      const failed = new Promise((resolve) => other.addEventListener("error", resolve));
      other.src = "/nothing.png?next=photo.clric";
      document.body.append(other);
      await failed;
      return { width: copy.naturalWidth, taken: "clricSrc" in other.dataset };
    });
    assert.deepEqual(result, { width: 131, taken: false });
  }, { expected: /404/ }));

test("the polyfill shows alt after an error, and keeps no blob that nobody needs", { skip }, () =>
  withPage("/polyfill", async (page) => {
    await page.waitForFunction(() => first.naturalWidth === 131 && first.complete);
    const result = await page.evaluate(async ([photo, damaged]) => {
      const after = (image, type) => new Promise((resolve) => image.addEventListener(type, resolve, { once: true }));
      const pixels = (image) => {
        const canvas = new OffscreenCanvas(9, 9).getContext("2d");
        canvas.drawImage(image, 0, 0);
        return new Set(canvas.getImageData(0, 0, 9, 9).data).size > 2;
      };
      const isRevoked = (url) => fetch(url).then(() => false, () => true);
      const events = [];
      const broken = Object.assign(new Image(), { alt: "A damaged photo", src: damaged });
      for (const type of ["load", "error"]) broken.addEventListener(type, () => events.push(type));
      document.body.append(broken);
      await after(broken, "error");
      while (!broken.complete) await new Promise((resolve) => setTimeout(resolve, 10));
      await new Promise((resolve) => setTimeout(resolve, 200));
      const failed = { events: [...events], src: broken.getAttribute("src"), width: broken.naturalWidth };
      broken.src = photo;
      await after(broken, "load");
      const shown = broken.naturalWidth;

      const first = document.getElementById("first");
      const url = first.src;
      const before = await isRevoked(url);
      const parent = first.parentNode;
      first.remove();
      await Promise.resolve();
      const removed = await isRevoked(url);
      parent.append(first);
      await new Promise((resolve) => setTimeout(resolve, 100));
      const kept = first.src === url && pixels(first);

      const slow = new Image();
      slow.src = `${photo}?slow`;
      document.body.append(slow);
      await new Promise((resolve) => setTimeout(resolve, 200));
      slow.remove();
      await new Promise((resolve) => setTimeout(resolve, 50));
      document.body.append(slow);
      await after(slow, "load");
      const again = pixels(slow);

      const last = slow.src;
      slow.src = "data:,";
      await Promise.resolve();
      return { failed, shown, before, removed, kept, again, changed: await isRevoked(last), attribute: "clricSrc" in slow.dataset };
    }, [PHOTO_SD1, DAMAGED]);
    assert.deepEqual(result, {
      failed: { events: ["error"], src: DAMAGED, width: 0 },
      shown: 131,
      before: false,
      removed: true,
      kept: true,
      again: true,
      changed: true,
      attribute: false,
    });
  }, { address: elsewhere.address, expected: /ERR_FILE_NOT_FOUND/ })); // a policy would forbid to ask for the blobs that are gone

test("a policy without WebAssembly is an error that says what to allow", { skip }, async () => {
  const strict = await serve(folders, { policy: "default-src 'self'", pages });
  await withPage("/empty", async (page) => {
    const error = await page.evaluate(async (photo) => {
      const { decode } = await import("/package/src/index.js");
      return decode(await (await fetch(photo)).arrayBuffer()).catch(({ code, message }) => ({ code, message }));
    }, PHOTO);
    assert.equal(error.code, "model");
    assert.match(error.message, /'wasm-unsafe-eval'/);
  }, { address: strict.address, expected: /Content Security Policy/ });
  strict.close();
});

test("the page of `make web` compares by keyboard, and decodes a visitor's file", { skip }, async () => {
  const photo = {
    name: "photo",
    width: 131,
    height: 77,
    original: { file: "side-by-side.jpg", bytes: 1 },
    clric: { file: "vectors/size-odd-131x77.clric", bytes: 600 },
    preview: { file: "vectors/size-odd-131x77.clric", bytes: 600 },
  };
  // Its files are missing: that must not take the page.
  const missing = { file: "missing", bytes: 1 };
  const broken = { ...photo, name: "broken", original: missing, clric: missing, avif: missing, preview: missing };
  const gallery = await serve(
    {
      "/made/vectors/": new URL("valid/", folders["/conformance/"]),
      "/made/": new URL("../../../docs/", here),
      "/src/": new URL("../src/", here),
      "/weights/": new URL("../weights/", here),
      "/thumbhash/": new URL("../node_modules/thumbhash/", here),
      "/": new URL("../gallery/", here),
    },
    {
      policy: "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:",
      pages: { "/": readFileSync(new URL("../gallery/index.html", here)), "/made/photos.json": JSON.stringify([broken, photo]) },
    },
  );
  await withPage("/", async (page) => {
    await page.waitForFunction(() => document.documentElement.dataset.ready === "");
    const slider = page.getByRole("slider", { name: /photo/ });
    await page.getByText("ThumbHash, ").waitFor();
    await slider.focus();
    for (let i = 0; i < 5; i++) await page.keyboard.press("ArrowRight");
    assert.equal(await slider.inputValue(), "55");
    assert.equal(await page.evaluate(() => getComputedStyle(document.querySelector(".seam")).left !== "0px"), true);
    const bytes = readFileSync(new URL("valid/size-odd-131x77.clric", folders["/conformance/"]));
    await page.getByLabel(/Drop a/).setInputFiles({ name: "mine.clric", mimeType: "", buffer: bytes });
    await page.getByText(/mine.clric: 131 x 77/).waitFor();
    await page.getByLabel(/Drop a/).setInputFiles({ name: "cut.clric", mimeType: "", buffer: bytes.subarray(0, 50) });
    await page.getByText(/cut.clric: wrong checksum/).waitFor();
  }, { address: gallery.address, expected: /404/ });
  gallery.close();
});

test("the weights are those of the ONNX files that are shipped", () => {
  for (const name of ["small", "1.0/small", "lite", "1.0/lite"]) {
    const manifest = JSON.parse(readFileSync(new URL(`../../clric_decoder/weights/${name}.json`, here)));
    const weights = readFileSync(new URL(`../weights/${name}.bin`, here));
    const header = JSON.parse(weights.subarray(4, 4 + weights.readUInt32LE(0)));
    assert.equal(header.sha256, manifest.sha256, "run: python decoder/web/make/weights.py");
  }
});

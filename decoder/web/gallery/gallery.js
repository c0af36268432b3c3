/**
 * The page of `make web`: comparisons, previews, and a visitor's own files.
 */
import { rgbaToThumbHash, thumbHashToDataURL } from "./thumbhash/thumbhash.js";
import "./src/element.js";
import { decode, readHeader } from "./src/index.js";

const number = (value) => value.toLocaleString("en");
const fill = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

/** Waits until an image or a clric-image is shown; rejects where it cannot be. */
async function shown(image) {
  if (!image.complete) {
    await new Promise((resolve) => ["load", "error"].forEach((type) => image.addEventListener(type, resolve, { once: true })));
  }
  if (!image.naturalWidth) throw image.error ?? new Error("the image cannot be shown");
}

/** One photo with its slider. */
function comparison(photo) {
  const figure = fill("comparison");
  const find = (selector) => figure.querySelector(selector);
  const other = find("img");
  const clric = find("clric-image");
  const slider = find("input");
  const tag = find(".tag.right");
  const facts = find("dl");
  const sources = { original: photo.original.file, avif: photo.avif?.file };

  for (const image of [other, clric]) {
    image.width = photo.width;
    image.height = photo.height;
  }
  clric.alt = `${photo.name}, decoded from clric`;
  clric.src = `made/${photo.clric.file}`;
  slider.setAttribute("aria-label", `${photo.name}: share of the picture that shows clric, in per cent`);
  slider.addEventListener("input", () => find(".stage").style.setProperty("--share", `${slider.value}%`));

  const choose = (name) => {
    other.src = `made/${sources[name]}`;
    other.alt = name === "avif" ? `${photo.name}, as AVIF` : `${photo.name}, the original`;
    tag.textContent = name === "avif" ? "AVIF" : name;
    for (const button of figure.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.other === name));
    }
  };
  find(".choice").setAttribute("aria-label", `What ${photo.name} is compared with`);
  for (const button of figure.querySelectorAll("button")) {
    button.hidden = !sources[button.dataset.other];
    button.addEventListener("click", () => choose(button.dataset.other));
  }
  choose("original");

  const fact = (term, text) => {
    const [dt, dd] = ["dt", "dd"].map((name) => facts.appendChild(document.createElement(name)));
    dt.textContent = term;
    dd.textContent = text;
  };
  const describeClric = async () => {
    await shown(clric);
    const { latent, image } = clric.timings;
    const bpp = ((8 * photo.clric.bytes) / (photo.width * photo.height)).toFixed(3);
    fact("clric", `${number(photo.clric.bytes)} bytes, ${bpp} bpp; ${latent.toFixed(0)} + ${image.toFixed(0)} ms`);
  };
  const describeAvif = async () => {
    const file = await (await fetch(`made/${photo.avif.file}`)).blob();
    const start = performance.now();
    (await createImageBitmap(file)).close();
    const time = (performance.now() - start).toFixed(0);
    const smallest = photo.avif.bytes > photo.clric.bytes ? ", the smallest there is" : "";
    fact("AVIF", `${number(photo.avif.bytes)} bytes${smallest}; ${time} ms`);
  };
  const describe = async () => {
    await describeClric().catch((error) => fact("clric", error.message));
    if (photo.avif) await describeAvif().catch((error) => fact("AVIF", error.message));
  };
  return { figure, describe };
}

/** A photo, its 500 bytes, and its ThumbHash. */
function preview(photo) {
  const figure = fill("preview");
  const [original, blurred] = figure.querySelectorAll("img");
  const clric = figure.querySelector("clric-image");
  const [, bytes, hashBytes] = figure.querySelectorAll("span");
  for (const image of [original, clric, blurred]) {
    image.width = photo.width;
    image.height = photo.height;
  }
  figure.querySelector("figcaption").textContent = photo.name;
  original.src = `made/${photo.original.file}`;
  original.alt = `${photo.name}, the original`;
  clric.src = `made/${photo.preview.file}`;
  clric.alt = `${photo.name}, clric in ${photo.preview.bytes} bytes`;
  bytes.textContent = `clric, ${photo.preview.bytes} bytes`;
  document.getElementById("previews").append(figure);
  const blur = async () => {
    await shown(original);
    const hash = thumbHash(original);
    blurred.src = thumbHashToDataURL(hash);
    blurred.style.aspectRatio = `${photo.width} / ${photo.height}`; // its own is rounded
    blurred.alt = `${photo.name}, ThumbHash`;
    hashBytes.textContent = `ThumbHash, ${hash.length} bytes`;
  };
  return blur().catch((error) => (hashBytes.textContent = `ThumbHash: ${error.message}`));
}

/** ThumbHash wants at most 100 pixels a side. */
function thumbHash(image) {
  const scale = 100 / Math.max(image.naturalWidth, image.naturalHeight);
  const width = Math.max(1, Math.round(image.naturalWidth * scale));
  const height = Math.max(1, Math.round(image.naturalHeight * scale));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  return rgbaToThumbHash(width, height, context.getImageData(0, 0, width, height).data);
}

/** Shows a visitor's file. */
async function showOwn(file) {
  const status = document.getElementById("own-status");
  const canvas = document.getElementById("own-image");
  canvas.hidden = true;
  status.textContent = `Decoding ${file.name} ...`;
  try {
    const bytes = await file.arrayBuffer();
    const header = readHeader(bytes);
    const start = performance.now();
    const image = await decode(bytes);
    const time = performance.now() - start;
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", `The image of ${file.name}`);
    canvas.hidden = false;
    const bpp = ((8 * bytes.byteLength) / (image.width * image.height)).toFixed(3);
    status.textContent =
      `${file.name}: ${image.width} x ${image.height}, ${number(bytes.byteLength)} bytes, ${bpp} bpp, ` +
      `latent space ${header.space}; decoded in ${time.toFixed(0)} ms`;
  } catch (error) {
    status.textContent = `${file.name}: ${error.message}`;
  }
}

function acceptFiles() {
  const drop = document.getElementById("drop");
  const input = document.getElementById("own-file");
  input.addEventListener("change", () => input.files[0] && showOwn(input.files[0]));
  // Anywhere on the page: a file that misses the field would replace the page.
  addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) showOwn(event.dataTransfer.files[0]);
  });
}

acceptFiles();
const photos = await (await fetch("made/photos.json")).json();
const comparisons = photos.map(comparison);
document.querySelector("main").classList.remove("waiting");
document.getElementById("gallery").append(...comparisons.map(({ figure }) => figure));
await Promise.all(photos.map(preview));
for (const { describe } of comparisons) await describe(); // one after another, so that the times are of quiet moments
document.documentElement.dataset.ready = "";

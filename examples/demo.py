"""A photo through clric at two rates: writes a side-by-side picture into demo-out/ and prints the sizes.

Run by ``make demo``. It takes the weights of TAESD from $CLRIC_MODELS, from ../shared/models, or from Hugging
Face, in this order, and makes the ONNX image decoder that clients use from them.
"""

import io
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
from clric_decoder import ClricError, ModelError, decode, read_header
from clric_decoder.image import read_image, write_image
from clric_decoder.models import find_autoencoder, find_decoder, find_weights
from clric_encoder import encode
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-out"
VAE = "taesd"
QUALITIES = (30, 70)


def main() -> None:
    """Encodes, decodes, compares, and says where the results are."""
    models = weights_folder()
    image_decoders = OUT / "models"
    make_image_decoder(image_decoders, models)

    photo = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    original, _ = read_image(photo)
    height, width = original.shape[:2]
    encoded = io.BytesIO()
    Image.fromarray(original).save(encoded, "png", optimize=True)
    sizes = [("PNG", len(encoded.getvalue()), None), ("JPEG, as it comes", photo.stat().st_size, None)]
    panels = [(original, f"original ({width} x {height})")]

    for quality in QUALITIES:
        print(f"encoding at quality {quality} ...", end=" ", flush=True)
        start = time.perf_counter()
        data = encode(original, vae=VAE, quality=quality, models=models)
        print(f"{time.perf_counter() - start:.0f} s;", end=" ")
        start = time.perf_counter()
        image = decode(data, vae=VAE, models=image_decoders)
        print(f"decoding {time.perf_counter() - start:.1f} s")
        (OUT / f"quality-{quality}.clric").write_bytes(data)
        write_image(OUT / f"quality-{quality}.png", image)
        sizes.append((f"clric, quality {quality}", len(data), psnr(original, image)))
        panels.append((image, f"clric: {len(data):,} bytes, {read_header(data).bpp:.3f} bpp"))

    write_image(OUT / "side-by-side.png", side_by_side(panels))
    print(f"\n{photo.name}, {width} x {height}")
    for name, size, quality_db in sizes:
        decibels = f"{quality_db:8.1f} dB PSNR" if quality_db is not None else ""
        print(f"  {name:<20}{size:>9,} bytes{8 * size / (width * height):8.3f} bpp{decibels}")
    print(f"\nSee {OUT / 'side-by-side.png'}; the streams and images lie beside it.")


def weights_folder() -> Path | None:
    """The folder to look for TAESD's weights in first; prints where they are found."""
    models = ROOT.parent / "shared" / "models"
    folder = models if "CLRIC_MODELS" not in os.environ and models.is_dir() else None
    place = find_weights(find_autoencoder(VAE), "encoder", folder)
    print(f"weights of {VAE}: {place or 'from the Hugging Face hub'}")
    return folder


def make_image_decoder(folder: Path, models: Path | None) -> None:
    """Exports TAESD's decoder to ONNX into ``folder``, unless an earlier run did."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path, _ = find_decoder(VAE, folder)
    except ModelError:
        from clric_export.onnx import write_decoder
        from clric_export.sources import load_decoder

        path = folder / write_decoder(load_decoder(VAE, models), folder, "fp32")["file"]
    print(f"image decoder: {path}")


def psnr(original: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB."""
    return float(10 * np.log10(255**2 / np.mean((original.astype(float) - image) ** 2)))


def side_by_side(panels: list[tuple[np.ndarray, str]]) -> np.ndarray:
    """Images of one size in a row, each with its caption under it: H x W x 3 uint8."""
    height, width = panels[0][0].shape[:2]
    gap, caption = 8, 36
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + caption), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(panels):
        left = i * (width + gap)
        sheet.paste(Image.fromarray(image), (left, 0))
        draw.text((left + width // 2, height + caption // 2), text, "black", ImageFont.load_default(20), "mm")
    return np.asarray(sheet)


if __name__ == "__main__":
    try:
        main()
    except ClricError as error:
        sys.exit(f"demo: {error}")

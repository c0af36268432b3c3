"""A photo through clric at two rates, beside AVIF of the same size: writes a picture into demo-out/ and prints sizes.

Run by ``make demo``. It needs no network and no file but what is installed.
"""

import io
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from clric_decoder import ClricError, decode
from clric_decoder.image import read_image, write_image
from clric_encoder import encode
from clric_encoder.training.distortion import ms_ssim, structure
from PIL import Image, ImageDraw, ImageFont, features

OUT = Path(__file__).resolve().parent.parent / "demo-out"
PHOTO = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own has no dagger
QUALITIES = (30, 70)


def main() -> None:
    """Encodes, decodes, compares, and says where the results are."""
    OUT.mkdir(exist_ok=True)
    original = read_image(PHOTO).pixels
    height, width = original.shape[:2]
    print(f"{PHOTO.name}, {width} x {height}; as PNG {len(as_file(original, 'png')):,} bytes\n")

    top, bottom = [(original, f"original ({width} x {height})")], []
    for quality in QUALITIES:
        print(f"quality {quality}: encoding ...", end=" ", flush=True)
        start = time.perf_counter()
        data = encode(original, quality=quality)
        print(f"{time.perf_counter() - start:.0f} s, decoding", end=" ", flush=True)
        start = time.perf_counter()
        image = decode(data)
        print(f"{time.perf_counter() - start:.2f} s")
        (OUT / f"quality-{quality}.clric").write_bytes(data)
        write_image(OUT / f"quality-{quality}.png", image)
        top.append((image, caption("clric", data, original, image)))
        if features.check("avif"):
            avif = avif_of_size(original, len(data))
            image = read_image(io.BytesIO(avif)).pixels
            bottom.append((image, caption("AVIF", avif, original, image)))
        else:
            print("  no AVIF beside it: the installed Pillow has none (11.3 and later do)")
    for _, text in sorted(top[1:] + bottom, key=lambda panel: panel[1]):
        print(f"  {text}")

    write_image(OUT / "side-by-side.png", side_by_side([top, [None, *bottom]]))
    print("  † a part of the loss that it was made with\n")
    print(f"See {OUT / 'side-by-side.png'}; the streams and images lie beside it.")


def as_file(image: np.ndarray, kind: str, **options: int | bool) -> bytes:
    """A file of Pillow's making."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def avif_of_size(image: np.ndarray, size: int) -> bytes:
    """The best AVIF of at most ``size`` bytes, or the smallest that can be made where none is that small."""
    lowest, highest, best = 0, 100, as_file(image, "avif", quality=0, speed=4)
    while lowest < highest:
        quality = (lowest + highest + 1) // 2
        file = as_file(image, "avif", quality=quality, speed=4)
        if len(file) <= size:
            lowest, best = quality, file
        else:
            highest = quality - 1
    return best


def caption(codec: str, data: bytes, original: np.ndarray, image: np.ndarray) -> str:
    """Bytes, bits per pixel, PSNR and MS-SSIM, marked where the codec was trained on them."""
    psnr = 10 * np.log10(255**2 / np.mean((original.astype(float) - image) ** 2))
    a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 255 for x in (original, image))
    bpp = 8 * len(data) / (original.shape[0] * original.shape[1])
    similarity, mark = ms_ssim(a, structure(b)).item(), "†" if codec == "clric" else ""
    return f"{codec}: {len(data):,} bytes, {bpp:.3f} bpp, {psnr:.1f} dB{mark}, MS-SSIM {similarity:.3f}{mark}"


def side_by_side(rows: list[list[tuple[np.ndarray, str] | None]]) -> np.ndarray:
    """Rows of images of one size, each with its caption under it: H x W x 3 uint8."""
    height, width = next(panel[0].shape[:2] for panel in rows[0] if panel)
    gap, line = 8, 36
    size = max(map(len, rows)) * (width + gap) - gap, len(rows) * (height + line)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(FONT), 15)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel:
                left, top = j * (width + gap), i * (height + line)
                sheet.paste(Image.fromarray(panel[0]), (left, top))
                place = left + width // 2, top + height + line // 2
                draw.text(place, panel[1], "black", font, "mm")
    return np.asarray(sheet)


if __name__ == "__main__":
    try:
        main()
    except ClricError as error:
        sys.exit(f"demo: {error}")

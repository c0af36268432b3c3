"""Crops of photos, untuned and tuned, beside AVIF of the tuned file's size: writes docs/crops.jpg.

Needs ../shared with its photos. usage: python examples/crops.py
"""

from pathlib import Path

import numpy as np
from clric_decoder import decode
from clric_decoder.image import read_image
from clric_encoder import encode
from demo import avif_of_size, side_by_side
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIDE = 224

# Photo, left and top of the crop: a face, letters, foliage, a sky.
CROPS = {"kodim04": (190, 110), "kodim08": (300, 250), "kodim13": (380, 40), "kodim20": (300, 160)}
LAMBDA = 0.15


def main() -> None:
    """Encodes, decodes, and puts the crops side by side."""
    rows = []
    for name, (left, top) in CROPS.items():
        original = read_image(ROOT.parent / f"shared/data/kodak/{name}.png").pixels
        files = [encode(original, lmbda=LAMBDA, tune=tune) for tune in ("none", "auto")]
        avif = avif_of_size(original, len(files[1]))
        pictures = {"original": original}
        for label, file in zip(("untuned", "tuned"), files, strict=True):
            pictures[f"{label}, {len(file):,} bytes"] = decode(file)
        place = ROOT / "demo-out" / f"{name}.avif"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(avif)
        pictures[f"AVIF, {len(avif):,} bytes"] = read_image(place).pixels
        panels = []
        for label, picture in pictures.items():
            crop = Image.fromarray(picture[top : top + SIDE, left : left + SIDE])
            panels.append((np.asarray(crop.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)), label))
        rows.append(panels)
    Image.fromarray(side_by_side(rows)).save(ROOT / "docs/crops.jpg", quality=90)


if __name__ == "__main__":
    main()

"""Makes docs/crops.jpg, crops of photos, untuned and tuned, beside AVIF of the tuned file's size; and
docs/decoders.jpg, one stream shown by two image decoders.

Needs ../shared with its photos and models. usage: python examples/crops.py
"""

from pathlib import Path

import numpy as np
import torch
from clric_decoder import decode, decode_latent
from clric_decoder.image import read_image
from clric_encoder import encode
from clric_encoder.networks import load_decoder_network
from demo import PHOTO, avif_of_size, side_by_side
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIDE = 224

# Photo, left and top of the crop: a face, letters, foliage, a sky.
CROPS = {"kodim04": (190, 110), "kodim08": (300, 250), "kodim13": (380, 40), "kodim20": (300, 160)}
LAMBDA = 0.15


# Of the sample photo: left and top of the crop, its side, and the stream's lambda.
FACE, FACE_SIDE, FACE_LAMBDA = (115, 60), 280, 0.5


def main() -> None:
    """Makes both pictures."""
    write_crops()
    write_decoders()


def write_decoders() -> None:
    """A stream of the space sd1, made for no decoder, as lite and TAESD show it."""
    original = read_image(PHOTO).pixels
    data = encode(original, vae="lite", lmbda=FACE_LAMBDA, tune="none")
    taesd = load_decoder_network("taesd", ROOT.parent / "shared/models").module
    with torch.inference_mode():
        image = taesd(torch.from_numpy(decode_latent(data))[None])[0]
    height, width, _ = original.shape
    by_taesd = (255 * image).round().byte().permute(1, 2, 0).numpy()[:height, :width]
    pictures = {"original": original, f"lite ({len(data):,} bytes)": decode(data), "TAESD (the same file)": by_taesd}
    left, top = FACE
    panels = [
        (enlarged(picture[top : top + FACE_SIDE, left : left + FACE_SIDE]), label)
        for label, picture in pictures.items()
    ]
    Image.fromarray(side_by_side([panels])).save(ROOT / "docs/decoders.jpg", quality=90)


def write_crops() -> None:
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
            panels.append((enlarged(picture[top : top + SIDE, left : left + SIDE]), label))
        rows.append(panels)
    Image.fromarray(side_by_side(rows)).save(ROOT / "docs/crops.jpg", quality=90)


def enlarged(crop: np.ndarray) -> np.ndarray:
    """Twice as large, each pixel as a square."""
    height, width, _ = crop.shape
    return np.asarray(Image.fromarray(crop).resize((2 * width, 2 * height), Image.Resampling.NEAREST))


if __name__ == "__main__":
    main()

"""The file of an encoder that exists as ONNX. Without torch."""

from pathlib import Path
from typing import Any

from clric_decoder.errors import ModelError
from clric_decoder.models import check_manifest, find_autoencoder

# What comes with clric: the encoders of the autoencoders `small` and `lite`.
WEIGHTS = Path(__file__).parent / "weights"


def find_encoder(name: str) -> tuple[Path, dict[str, Any]]:
    """Path and manifest of the encoder of an autoencoder of kind small, or of an .onnx that clric-export train made.

    Raises ModelError for one that is missing or damaged, and for autoencoders of other kinds.
    """
    if name.endswith(".onnx"):
        path = Path(name)
    else:
        autoencoder = find_autoencoder(name)
        if autoencoder.kind != "small":
            raise ModelError("preset instant needs the autoencoder small or an .onnx encoder (--vae)")
        path = WEIGHTS / f"{autoencoder.name}_encoder.onnx"
    if not path.is_file():
        raise ModelError(f"encoder file {path} does not exist")
    return path, check_manifest(path, "encoder")

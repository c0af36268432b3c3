"""Half of an autoencoder becomes an ONNX file with its manifest, compared with torch before it takes its name.

`write_network` gives NAME.onnx (fp32) or NAME.fp16.onnx, with the manifest NAME.json or NAME.fp16.json beside
it, as clric_decoder.models.find_decoder reads them. A network that exists in one precision only has its plain name.
"""

import hashlib
import json
import os
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import torch
from clric_decoder.errors import ModelError
from clric_encoder.networks import Network

Precision = Literal["fp32", "fp16", "int8"]

# 17 is what the exporter writes at best, and what onnxruntime reads from 1.13 on.
OPSET = 17

# Latent sizes at which an exported file is compared with torch; neither is the size that was traced.
PARITY_SIZES = ((8, 8), (13, 21))

# The sides of a network's input and output that may have any length.
_SIDES = {"image": {0: "batch", 2: "8h", 3: "8w"}, "latent": {0: "batch", 2: "h", 3: "w"}}

# The largest difference that is let through, in units of the image's [0, 1]: a quarter of an 8-bit step for
# the same weights, five steps where the weights were rounded to fp16, a few more in single pixels for int8. The
# same numbers for latents, whose deviation is near 1.
PARITY_LIMITS: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}

# Smaller tensors stay float32: biases, constants, and the last layer, whose rounding errors are a mesh in flat areas.
# They weigh nothing.
_LARGE = 2048


def write_network(network: Network, folder: Path, precision: Precision, stem: str | None = None) -> dict[str, Any]:
    """Exports, compares, and writes the ONNX file and its manifest into a folder, which is made if need be.

    ``stem`` is the files' name without suffix: by default the network's, followed by .fp16 or .int8.

    Both are written beside their names and renamed when they are whole. Returns the manifest. Raises
    ModelError where the file does not do what the torch module does, OSError where the folder cannot be
    written.
    """
    stem = stem or (network.name if precision == "fp32" else f"{network.name}.{precision}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder) as scratch:
        file = Path(scratch) / f"{stem}.onnx"
        export_onnx(network, file, precision)
        difference = parity(network, file)
        if not difference <= PARITY_LIMITS[precision]:
            raise ModelError(
                f"{stem}.onnx differs from torch by {difference:.2g}, the limit is"
                f" {PARITY_LIMITS[precision]:.2g}; nothing was written"
            )
        manifest = {
            "name": stem,
            "half": network.half,
            "latent_space": network.space,
            "channels": network.channels,
            "halo": network.halo,
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "licence": network.licence,
            "source": network.source,
            "precision": precision,
            "parity": float(f"{difference:.3g}"),
            "opset": OPSET,
            "versions": {package: _version(package) for package in ("clric", "torch", "diffusers", "onnx")},
        }
        description = Path(scratch) / f"{stem}.json"
        description.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.replace(file, folder / file.name)
        os.replace(description, folder / description.name)
    return manifest


def export_onnx(network: Network, path: Path, precision: Precision) -> None:
    """Writes the ONNX file of a network: ``latent`` to ``image`` or back; batch, height and width dynamic.

    fp16: the weights are stored as float16 and widened by Cast nodes, which onnxruntime folds away when it
    loads the file: half the bytes, the speed of float32. int8: stored as 8-bit integers with a float32 scale for
    each output channel, widened in the same way: a quarter of the bytes. Input, output and arithmetic are float32
    in each.
    """
    (source, result), example = _names(network), _example(network, 12, 10)
    with torch.inference_mode(), warnings.catch_warnings():
        # torch advises its newer exporter (dynamo=True), which needs onnxscript and twenty times as long for
        # the same graph; and its tracer warns of checks of shapes in diffusers' Python, which hold for all.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            network.module,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[source],
            output_names=[result],
            dynamic_axes=_SIDES,
        )
    if precision != "fp32":
        model = onnx.load(path)
        _store_small(model.graph, precision)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def parity(network: Network, path: Path) -> float:
    """The largest absolute difference between an ONNX file and its torch module.

    On random inputs (seeded), latents of normal distribution or pixels of even one, for latents of `PARITY_SIZES`; by
    onnxruntime on the CPU.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    source, result = _names(network)
    worst = 0.0
    for number, (h, w) in enumerate(PARITY_SIZES):
        example = _example(network, h, w, seed=number)
        with torch.inference_mode():
            expected = network.module(example).numpy()
        (values,) = session.run([result], {source: example.numpy()})
        if values.shape != expected.shape or not np.isfinite(values).all():
            return float("inf")
        worst = max(worst, float(np.abs(values - expected).max()))
    return worst


def _names(network: Network) -> tuple[str, str]:
    return ("image", "latent") if network.half == "encoder" else ("latent", "image")


def _example(network: Network, h: int, w: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if network.half == "encoder":
        return torch.rand(1, 3, 8 * h, 8 * w, generator=random)
    return torch.randn(1, network.channels, h, w, generator=random)


def _store_small(graph: Any, precision: Precision) -> None:
    """Turns the large float32 initializers into float16 or int8 ones, with what widens them behind them."""
    to_array, from_array, make_node = onnx.numpy_helper.to_array, onnx.numpy_helper.from_array, onnx.helper.make_node
    widening, scales = [], []
    for tensor in graph.initializer:
        values = to_array(tensor)
        if values.dtype != np.float32 or values.size < _LARGE:
            continue
        name, stored = tensor.name, f"{tensor.name}.{precision}"
        if precision == "fp16":
            tensor.CopyFrom(from_array(values.astype(np.float16), stored))
            widening.append(make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
        else:
            scale = np.abs(values).max(tuple(range(1, values.ndim)), keepdims=True) / np.float32(127)
            scale = np.maximum(scale, np.finfo(np.float32).tiny)
            tensor.CopyFrom(from_array(np.rint(values / scale).astype(np.int8), stored))
            scales.append(from_array(scale, f"{name}.scale"))
            widening.append(make_node("Cast", [stored], [f"{name}.wide"], to=onnx.TensorProto.FLOAT))
            widening.append(make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name]))
    graph.initializer.extend(scales)
    nodes = [*widening, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

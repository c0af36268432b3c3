"""Writes weights/NAME.bin, what the WebAssembly image decoder reads, from the ONNX image decoders that clric ships.

    python decoder/web/make/weights.py

A file: the length of a JSON header (4 bytes, little-endian), the header, spaces up to a multiple of 16 bytes; then for
each layer its scales and biases (float32, one for each output) and its weights (int8 or int16, outputs x inputs x 3
x 3). The header names the decoder, its latent space, the SHA-256 of the ONNX file, and the layers. Each layer's input
is the output of the one before; `add`: to its output, the input of the layer before is added.

The outputs of a layer before a pixel shuffle are put into the order (row, column, channel), so that each pixel's are
neighbours. The last layer gets a fourth channel, opaque, and its values are grey levels.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

NAMES = ("small", "lite", "1.0/small", "1.0/lite")
SHIPPED = Path(__file__).resolve().parents[2] / "clric_decoder" / "weights"
OUT = Path(__file__).resolve().parents[1] / "weights"

# Weights that are shipped in single precision are rounded to these integers: with them a transformed kernel fits int16.
LARGEST_INT16_WEIGHT = 3640


def main() -> None:
    """Converts all decoders."""
    for name in NAMES:
        path = OUT / f"{name}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(convert(name))
        print(f"{path}: {path.stat().st_size:,} bytes")


def convert(name: str) -> bytes:
    """The file of one decoder. Raises ValueError for an ONNX graph that it cannot compute."""
    data = (SHIPPED / f"{name}.onnx").read_bytes()
    manifest = json.loads((SHIPPED / f"{name}.json").read_text())
    layers, arrays = read_layers(onnx.load_from_string(data).graph)
    header = {key: manifest[key] for key in ("name", "latent_space", "channels", "halo")}
    text = json.dumps({**header, "sha256": hashlib.sha256(data).hexdigest(), "layers": layers}).encode()
    text += b" " * (-(len(text) + 4) % 16)
    return len(text).to_bytes(4, "little") + text + b"".join(array.tobytes() for array in arrays)


def read_layers(graph: onnx.GraphProto) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The layers' descriptions, and their scales, biases and weights."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type not in ("Cast", "Mul"):  # int8 weights made wide: see quantized_weights
            nodes.append(node)

    layers: list[dict[str, Any]] = []
    arrays: list[np.ndarray] = []
    previous, current = "", graph.input[0].name
    while nodes:
        conv = nodes.pop(0)
        weights, scales = quantized_weights(conv.input[1], constants)
        biases = constants[conv.input[2]].astype(np.float32)
        expect(conv.op_type == "Conv" and conv.input[0] == current and weights.shape[2:] == (3, 3), conv)
        layer = {"relu": False, "shuffle": False, "image": False, "add": False}
        output = conv.output[0]
        while nodes and nodes[0].op_type != "Conv":
            node = nodes.pop(0)
            expect(output in node.input and not layer["image"], node)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Relu":
                layer["relu"] = True
            elif node.op_type == "DepthToSpace":
                expect(attributes == {"blocksize": 2, "mode": b"CRD"} and not layer["add"] and not layer["relu"], node)
                layer["shuffle"] = True
            elif node.op_type == "Add" and previous in node.input:
                expect(not layer["relu"] and not layer["shuffle"], node)
                layer["add"] = True
            elif node.op_type == "Add":
                expect(any(constants.get(name) == np.float32(0.5) for name in node.input), node)
                biases = biases + np.float32(0.5)
            else:
                bounds = [float(constants[name]) for name in node.input[1:]]
                expect(node.op_type == "Clip" and bounds == [0, 1] and layer["shuffle"], node)
                layer["image"] = True
            output = node.output[0]
        if layer["image"]:
            weights, scales, biases = with_alpha(weights, scales * np.float32(255), biases * np.float32(255))
        if layer["shuffle"]:
            order = np.arange(len(weights)).reshape(-1, 4).T.ravel()
            weights, scales, biases = weights[order], scales[order], biases[order]
        missing = -weights.shape[1] % 8  # WebAssembly takes eight inputs at a time
        weights = np.pad(weights, ((0, 0), (0, missing), (0, 0), (0, 0)))
        layers.append(
            {"inputs": weights.shape[1], "outputs": weights.shape[0], "bytes": weights.itemsize}
            | {key: value for key, value in layer.items() if value}
        )
        arrays += [scales.astype("<f4"), biases.astype("<f4"), np.ascontiguousarray(weights)]
        previous, current = current, output
    expect(bool(layers) and "image" in layers[-1], graph.output[0])
    return layers, arrays


def quantized_weights(name: str, constants: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Integer weights and one scale for each output: those shipped, or int16 for weights in single precision."""
    if f"{name}.int8" in constants:
        return constants[f"{name}.int8"], constants[f"{name}.scale"].ravel()
    weights = constants[name]
    scales = np.abs(weights).max((1, 2, 3)) / LARGEST_INT16_WEIGHT
    return np.round(weights / scales[:, None, None, None]).astype("<i2"), scales


def with_alpha(
    weights: np.ndarray, scales: np.ndarray, biases: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Red, green and blue of 2 x 2 pixels with a constant 255 after them."""
    return (
        np.concatenate([weights, np.zeros_like(weights[:4])]),
        np.concatenate([scales, np.zeros_like(scales[:4])]),
        np.concatenate([biases, np.full(4, 255, biases.dtype)]),
    )


def expect(is_so: bool, node: Any) -> None:
    """Raises ValueError where the graph is not what image_decoder.c computes."""
    if not is_so:
        raise ValueError(f"image_decoder.c cannot compute node {node.name!r}; change it and this script")


if __name__ == "__main__":
    main()

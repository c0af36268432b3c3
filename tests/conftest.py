"""Fixtures that all tests share: streams and decoders that need no download, and the commands."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clric_decoder import bitstream
from clric_decoder.latent import encode_grids
from clric_decoder.models import LATENT_SPACES
from clric_decoder.networks import Parameters, parameter_groups

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
MakeStream = Callable[..., bytes]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``../shared`` with weights and photos; skips where it is not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: it holds the weights and photos that this test needs")
    return folder


@pytest.fixture(scope="session")
def make_stream() -> MakeStream:
    """``make_stream(width, height, space="sd1")``: a valid stream of random or empty grids, made without training."""

    def make(
        width: int = 48, height: int = 40, space: str = "sd1", image_decoder: int = 0, random: bool = True
    ) -> bytes:
        channels = LATENT_SPACES[space].channels
        architecture = replace(
            bitstream.registered_architecture(1),
            channels=(channels, 1, 1),
            synthesis=(bitstream.SynthesisLayer(channels),),
        )
        networks = []
        for group in parameter_groups(architecture):
            integers = np.zeros(group.shape, np.int32)
            if group.name == "synthesis.weight0":
                integers.reshape(channels, -1)[:, :channels] = np.eye(channels)  # the finest grid is the latent
            networks.append(Parameters(group, 0, integers))
        numbers = np.random.default_rng(0)
        most = 2 if random else 0
        shapes = bitstream.grid_shapes(architecture.channels, -(-height // 8), -(-width // 8))
        grids = [numbers.integers(-most, most + 1, shape).astype(np.int32) for shape in shapes]
        return bitstream.write(
            width=width,
            height=height,
            space=space,
            image_decoder=image_decoder,
            channels=channels,
            architecture=architecture,
            segments=encode_grids(networks, grids, architecture),
        )

    return make


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``toy.onnx``: a decoder of the space sd1 with random weights and a reach of 3 latents.

    Three 3 x 3 convolutions, then nearest-neighbour upsampling by 8.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "latent"
    for layer, (inputs, outputs) in enumerate([(4, 8), (8, 8), (8, 3)]):
        kernel = random.normal(0, 0.2, (outputs, inputs, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [value, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        value = f"c{layer}"
    weights.append(numpy_helper.from_array(np.array([1, 1, 8, 8], np.float32), "scales"))
    nodes.append(helper.make_node("Sigmoid", [value], ["colours"]))
    nodes.append(helper.make_node("Resize", ["colours", "", "scales"], ["image"], mode="nearest"))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, [1, 4, "h", "w"])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "H", "W"])],
        weights,
    )
    folder = tmp_path_factory.mktemp("toy_models")
    path = folder / "toy.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    manifest = {
        "name": "toy",
        "latent_space": "sd1",
        "channels": 4,
        "halo": 3,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run("clric-dec", *arguments, input=b"")``: the installed command in ``tmp_path``, its cache empty.

    Keywords are those of subprocess.run; ``env`` is added to the process's own.
    """
    cache = tmp_path_factory.mktemp("cache")

    def call(command: str, *arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        environment = {key: value for key, value in os.environ.items() if key != "CLRIC_MODELS"}
        environment |= {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        settings: dict[str, Any] = {
            "cwd": tmp_path,
            "timeout": 300,
            "stderr": subprocess.PIPE,
        } | options
        settings["env"] = environment | settings.get("env", {})
        settings.setdefault("stdout", subprocess.PIPE)
        script = Path(sys.executable).with_name(command)
        return subprocess.run([script, *arguments], check=False, **settings)

    return call

"""Training of registered networks: seeded, better than its start, and a table that the decoder takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clric_decoder.bitstream import WITH_NETWORKS, registered_architecture
from clric_decoder.networks import decode_networks
from clric_decoder.registered_networks import registered_networks
from clric_encoder.instant import FUNCTIONS, LAMBDAS
from clric_export import network_sets
from clric_export.cli import command
from clric_export.network_sets import _Training
from PIL import Image


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_sets, "SOFT", 150)
    monkeypatch.setattr(network_sets, "HARD", 40)
    monkeypatch.setattr(network_sets, "HARD_BATCHES", 4)


def correlated_latents(count: int) -> list[torch.Tensor]:
    """Smooth latents [8, 40, 48] whose channels are mixtures of fewer."""
    random = torch.Generator().manual_seed(0)
    mixture = torch.randn(8, 3, generator=random) / 2
    result = []
    for _ in range(count):
        coarse = torch.randn(1, 3, 12, 14, generator=random)
        smooth = torch.nn.functional.interpolate(coarse, (40, 48), mode="bicubic")[0]
        result.append(torch.einsum("ij,jyx->iyx", mixture, smooth))
    return result


@pytest.mark.usefixtures("short")
def test_training_lowers_the_loss_of_what_instant_codes() -> None:
    training = _Training(correlated_latents(6), registered_architecture(FUNCTIONS[0]), 0.3, seed=0)
    latents = training.crops()

    def loss() -> float:
        return training.gradients(training.rounded(latents), latents)[0]

    before = loss()
    training.soft()
    soft = loss()
    training.hard()
    assert soft < 0.7 * before
    assert loss() < soft


@pytest.mark.usefixtures("short")
def test_command_writes_a_table_that_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_sets, "LAMBDAS", (1.0, 0.1))
    monkeypatch.setattr(network_sets, "FUNCTIONS", FUNCTIONS[:2])
    monkeypatch.setattr(network_sets, "SOFT", 20)
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        small = Image.fromarray(random.integers(0, 256, (6, 7, 3), np.uint8))
        small.resize((320, 280), Image.Resampling.BICUBIC).save(photos / f"{i}.png")
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        result = CliRunner().invoke(command, ["networks", "--photos", str(photos), "-o", str(file)])
        assert result.exit_code == 0, result.output
    assert files[0].read_bytes() == files[1].read_bytes()
    segments = json.loads(files[0].read_text())
    assert list(segments) == [str(number) for number in FUNCTIONS[:2]]
    for number, segment in segments.items():
        decode_networks(bytes.fromhex(segment), registered_architecture(int(number)))


def test_every_lambda_has_a_function_with_networks() -> None:
    assert len(LAMBDAS) == len(FUNCTIONS)
    assert list(registered_networks()) == list(WITH_NETWORKS) == list(FUNCTIONS)
    for number, segment in registered_networks().items():
        decode_networks(segment, registered_architecture(number))

"""Training of network sets: seeded, better than its start, and a table that the decoder takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clric_decoder import network_sets as table
from clric_decoder.bitstream import registered_architecture
from clric_decoder.networks import decode_networks
from clric_encoder.instant import ARCHITECTURE
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
    training = _Training(correlated_latents(6), registered_architecture(ARCHITECTURE), 0.3, seed=0)
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
    architecture = registered_architecture(ARCHITECTURE)
    segments = json.loads(files[0].read_text())[architecture.to_bytes().hex()]
    assert len(segments) == 2
    for segment in segments:
        decode_networks(bytes.fromhex(segment), architecture)


def test_there_are_as_many_sets_as_lambdas() -> None:
    assert len(table.network_sets(registered_architecture(ARCHITECTURE))) == len(network_sets.LAMBDAS) <= table.MAX_SETS

"""Grids to latents: the tiles in which they are synthesised do not show."""

import numpy as np
import pytest
from clric_decoder import synthesis
from clric_decoder.bitstream import grid_shapes
from clric_decoder.networks import Parameters, parameter_groups
from conformance import make_vectors

CASES = {case.name: case for case in make_vectors.CASES}


@pytest.mark.parametrize("size", [(37, 50), (1, 3000), (3000, 1), (101, 7)])
@pytest.mark.parametrize(
    "name", ["size-7x5", "synthesis-eight-layers", "grids-sixteen-levels", "grids-none-at-finest", "synthesis-linear"]
)
def test_tiles_are_invisible(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = CASES[name].architecture
    random = np.random.default_rng(0)
    networks = []
    for group in parameter_groups(architecture):
        exponent = min(5, group.max_exponent)
        integers = np.clip(np.rint(random.laplace(scale=6, size=group.shape)), -15, 15).astype(np.int32)
        networks.append(Parameters(group, exponent, integers))
    grids = [random.integers(-9, 10, shape).astype(np.int32) for shape in grid_shapes(architecture.channels, *size)]
    monkeypatch.setattr(synthesis, "TILE_VALUES", 1 << 30)
    whole = synthesis.synthesize(grids, networks, architecture)
    assert np.ptp(whole) > 1
    widest = max(sum(architecture.channels), *(layer.channels for layer in architecture.synthesis))
    for positions in (17 * 17, 500):
        monkeypatch.setattr(synthesis, "TILE_VALUES", positions * widest)
        tiled = synthesis.synthesize(grids, networks, architecture)
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * np.abs(whole).max())

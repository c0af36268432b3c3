"""Presets: the architecture of the function and the schedule that trains it, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from clric_decoder.bitstream import Architecture, SynthesisLayer
from clric_decoder.errors import ClricError

from ..instant import INSTANT


@dataclass(frozen=True)
class Stage:
    """Iterations with one surrogate for rounding; learning rates decay along a half cosine.

    Pairs are (first, last) values over the stage. ``temperature`` and ``sigma`` belong to soft rounding. ``fixed``: the
    networks are quantised before, and the grids alone are trained. ``look_every``: iterations between two looks at the
    image, where that is what is trained on.
    """

    iterations: int
    rounding: Literal["uniform", "soft", "hard"]
    network_rate: tuple[float, float]
    grid_rate: tuple[float, float]
    temperature: tuple[float, float] = (0.0, 0.0)
    sigma: tuple[float, float] = (0.0, 0.0)
    fixed: bool = False
    look_every: int = 0

    @property
    def looks(self) -> int:
        """How many times the image is looked at."""
        return -(-self.iterations // self.look_every)


@dataclass(frozen=True)
class WarmUp:
    """A round of candidates: each is trained for some iterations, the best go on."""

    candidates: int
    iterations: int


@dataclass(frozen=True)
class Preset:
    """How a latent becomes a function.

    architecture: the shape for a latent space of so many channels.
    start: ``principal`` computes grids and synthesis from the latent's principal components; ``random`` starts from
    empty grids and random networks (Cool-Chic).
    betas: what Adam and SOAP keep of first and second moments from one iteration to the next.
    network_optimizer: that of the networks; grids have Adam.
    stages: of the training on the latent; the first is also what warm-up candidates are trained with.
    tuning: of the training on the image that may follow it. tuning_through: the same by the name of the image decoder,
    where another one suits it better.
    before_tuning: the share of the iterations of `stages` that are made where it does: the last of them win a percent
    of the rate, and looks at the image win more in their time.
    """

    architecture: Callable[[int], Architecture]
    start: Literal["principal", "random"]
    betas: tuple[float, float]
    network_optimizer: Literal["adam", "soap"]
    warm_up: tuple[WarmUp, ...]
    stages: tuple[Stage, ...]
    tuning: Stage
    tuning_through: dict[str, Stage] = field(default_factory=dict)
    before_tuning: float = 1.0

    def through(self, image_decoder: str) -> Preset:
        """The preset as it is where functions are tuned through this image decoder."""
        return replace(self, tuning=self.tuning_through.get(image_decoder, self.tuning))

    def shortened(self) -> Preset:
        """With the iterations on the latent that are made where tuning follows."""
        stages = tuple(replace(own, iterations=round(self.before_tuning * own.iterations)) for own in self.stages)
        return replace(self, stages=stages, before_tuning=1.0)

    @property
    def iterations(self) -> int:
        """All iterations on the latent, candidates included."""
        return sum(w.candidates * w.iterations for w in self.warm_up) + sum(s.iterations for s in self.stages)


def paper_architecture(channels: int) -> Architecture:
    """The paper's (IV-A2): seven levels of one grid, ARM 8-8-2, four synthesis layers, a residual every two."""
    return Architecture(
        channels=(1,) * 7,
        neighbours=8,
        hidden_layers=2,
        width=8,
        grid_scales=False,
        synthesis=(
            SynthesisLayer(40, relu=True),
            SynthesisLayer(channels),
            SynthesisLayer(channels, kernel=3, relu=True, depthwise=channels > 4),
            SynthesisLayer(channels, kernel=3, residual=2, depthwise=channels > 4),
        ),
    )


def default_architecture(channels: int) -> Architecture:
    """As many grids at the finest level as the latent has channels, and a synthesis of one residual block.

    Measured choices (README, "The function"): fewer grids at the finest level lose at lambda 0.1, where spaces of 16
    and 32 channels are of use; for more than four channels, a depthwise block wins over a dense one through a
    bottleneck.
    """
    if channels <= 4:
        block = (SynthesisLayer(8, kernel=3, relu=True), SynthesisLayer(channels, kernel=3, residual=2))
    else:
        block = (
            SynthesisLayer(channels, kernel=3, relu=True, depthwise=True),
            SynthesisLayer(channels, residual=2),
        )
    return Architecture(
        channels=(channels, 1, 1, 1, 1),
        neighbours=8,
        hidden_layers=2,
        width=8,
        grid_scales=True,
        synthesis=(SynthesisLayer(channels), *block),
    )


def _tuning(looks: int, steps: int) -> Stage:
    """steps: iterations that follow each look."""
    rates = (2e-3, 1e-4), (0.02, 0.0005)
    return Stage(looks * steps, "soft", *rates, (0.25, 0.04), (0.22, 0.15), look_every=steps)


def _default(iterations: int, looks: int, steps: int, before_tuning: float = 1.0) -> Preset:
    return Preset(
        architecture=default_architecture,
        start="principal",
        betas=(0.9, 0.95),
        network_optimizer="soap",
        warm_up=(),
        stages=(Stage(iterations, "soft", (1.5e-2, 2.5e-4), (0.05, 0.001), (0.25, 0.04), (0.22, 0.15)),),
        tuning=_tuning(looks, steps),
        before_tuning=before_tuning,
    )


PRESETS = {
    "fast": _default(300, 5, 24),
    # Targets through small are further off (its curvature is smaller), and reached in more steps
    "default": replace(_default(1500, 56, 20, before_tuning=0.6), tuning_through={"small": _tuning(40, 44)}),
    "slow": _default(4000, 130, 20),
    "paper": Preset(
        architecture=paper_architecture,
        start="random",
        betas=(0.9, 0.99),
        network_optimizer="adam",
        warm_up=(WarmUp(5, 400), WarmUp(2, 400)),
        stages=(
            Stage(10600, "uniform", (1e-2, 1e-4), (0.16, 0.0016)),
            Stage(2500, "hard", (1e-4, 1e-5), (0.0016, 0.00016), fixed=True),
        ),
        tuning=_tuning(32, 25),
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of this name. Raises ClricError for one that is not known."""
    if name not in PRESETS:
        raise ClricError(f"preset {name!r} is not known; use one of {', '.join([INSTANT, *PRESETS])}")
    return PRESETS[name]

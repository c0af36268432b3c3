"""Which measures each codec was trained on: what a reader must know before a number of theirs counts for it.

Tables, plots and crops show `MARK` at every value, curve and BD-rate of a measure that the codec (of a BD-rate: one of
the two) was trained on. What is trained on a measure gains by it more than a viewer does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .compare import codecs, is_clric, vae_of
from .results import Row

MARK = "†"


@dataclass(frozen=True)
class Training:
    """what: was trained, for people. measures: columns of results.csv, and fd_vgg16. applies: to which rows."""

    what: str
    measures: tuple[str, ...]
    applies: Callable[[Row], bool]


# SSIM is one scale of MS-SSIM, and goes with it. DISTS has features of VGG16 too, but nothing was trained on it.
_LOSSES = ("psnr", "ms_ssim", "ssim", "lpips_vgg", "fd_vgg16")

TRAININGS = (
    Training("clric, on the latent", ("latent_mse",), is_clric),
    Training(
        "clric where tuned, on squared error, MS-SSIM and features distilled from LPIPS-VGG",
        _LOSSES,
        lambda row: row["tune"] not in ("", "none"),
    ),
    Training(
        "the image decoder lite, on absolute error, MS-SSIM, LPIPS-SqueezeNet and (not that of 1.0) LPIPS-VGG",
        (*_LOSSES, "lpips_squeeze"),
        lambda row: vae_of(row) == "lite",
    ),
    Training(
        "the autoencoder small, on absolute error, MS-SSIM, LPIPS-VGG, features distilled from it and (not the image"
        " decoder of 1.0) LPIPS-SqueezeNet",
        (*_LOSSES, "lpips_squeeze"),
        lambda row: vae_of(row) == "small",
    ),
    Training("CompressAI's models, on squared error", ("psnr",), lambda row: "metric=mse" in row["version"]),
)


def trained_on_published(codec: str) -> frozenset[str]:
    """Of the curves in published.csv: models and functions trained on squared error, all but VTM."""
    return frozenset() if codec == "VTM" else frozenset(("psnr",))


def trained_on(rows: Iterable[Row]) -> dict[str, frozenset[str]]:
    """Codec -> the measures that it was trained on."""
    result: dict[str, frozenset[str]] = {}
    rows = list(rows)
    for name in codecs(rows):
        mine = [row for row in rows if row["codec"] == name]
        result[name] = frozenset(
            measure
            for training in TRAININGS
            if any(training.applies(row) for row in mine)
            for measure in training.measures
        )
    return result


def mark(trained: Iterable[frozenset[str]], measure: str) -> str:
    """`MARK` if one of them was trained on the measure, or else nothing."""
    return MARK if any(measure in measures for measures in trained) else ""


def explanation(rows: Iterable[Row]) -> str | None:
    """The line that says what marks mean and what they are there for; None where nothing is marked."""
    rows = list(rows)
    whats = [training.what for training in TRAININGS if any(training.applies(row) for row in rows)]
    if not whats:
        return None
    return (
        f"{MARK} marks a measure that the codec (of a BD-rate: one of the two) was trained on, which says less of it "
        f"than the others do. Trained were: {'; '.join(whats)}. SSIM counts as MS-SSIM, and FD-VGG16 as LPIPS-VGG. "
        "Measures that nothing here was trained on come first. What other people's image decoders were trained on is "
        "not all published, and not marked."
    )

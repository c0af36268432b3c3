"""Rows -> what is compared: means over images, BD-rates, nearest rates.

Rate is bpp of real files. Which rows are clric's and which are a VAE's ceiling can be seen from their cells.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bjontegaard
import numpy as np

from .results import Row, number

# Columns that can be averaged over images.
MEASURES = (
    "bytes", "bpp", "psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "lpips_squeeze", "latent_mse",
    "header_bytes", "network_bytes", "grid_bytes", "function_mac", "decoder_mac",
    "encode_s", "decode_s", "encode_mb", "decode_mb",
)  # fmt: skip

# Two curves of which less than this share of the tested codec's range has a counterpart are not compared.
MIN_OVERLAP = 0.25


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows to be shown: of each image, codec and setting the last one, of each codec its last version only."""
    rows = list(rows)
    versions = {row["codec"]: row["version"] for row in rows}
    kept = {
        (row["image_sha256"], row["codec"], row["setting"]): row
        for row in rows
        if row["version"] == versions[row["codec"]]
    }
    return list(kept.values())


def is_clric(row: Row) -> bool:
    return bool(row["function_mac"])


def is_ceiling(row: Row) -> bool:
    """Whether the row is of a VAE whose latent was not coded."""
    return not row["bytes"]


def codecs(rows: Iterable[Row]) -> list[str]:
    """Names in the order in which they are shown: clric's, the ceilings, all others."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["codec"], row)
    return sorted(first, key=lambda name: 0 if is_clric(first[name]) else 1 if is_ceiling(first[name]) else 2)


def lpips_column(rows: Sequence[Row]) -> str | None:
    """The LPIPS that is shown: the first network, in the order of the LPIPS paper, that most rows have."""
    columns = ("lpips_alex", "lpips_vgg", "lpips_squeeze")
    counts = {column: sum(bool(row[column]) for row in rows) for column in columns}
    best = max(counts, key=lambda column: counts[column])
    return best if counts[best] else None


@dataclass(frozen=True)
class Mean:
    """A codec at one setting: arithmetic means of each measure over the images that have it."""

    codec: str
    setting: str
    images: int
    values: dict[str, float]


def means(rows: Iterable[Row]) -> list[Mean]:
    """One for each codec and setting, in the order of `codecs`, then of rising rate."""
    rows = list(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["codec"], row["setting"]), []).append(row)
    result = []
    for (codec, setting), members in groups.items():
        values = {}
        for measure in MEASURES:
            cells = [cell for row in members if (cell := number(row, measure)) is not None]
            if cells:
                values[measure] = float(np.mean(cells))
        result.append(Mean(codec, setting, len(members), values))
    order = codecs(rows)
    return sorted(result, key=lambda mean: (order.index(mean.codec), mean.values.get("bpp", 0.0)))


def nearest(rows: Iterable[Row], bpp: float) -> Row | None:
    """The row of nearest rate, by ratio."""
    coded = [row for row in rows if row["bpp"]]
    return min(coded, key=lambda row: abs(np.log(float(row["bpp"]) / bpp)), default=None)


@dataclass(frozen=True)
class BdRate:
    """How much more rate (percent; less is negative) one codec needs than another for the same quality.

    percent: the mean over ``images`` of the ``of`` images that both were measured on; None where ``images`` is 0, and
    then ``reason`` says why.
    """

    percent: float | None
    images: int
    of: int
    reason: str = ""


def bd_rate(tested: Iterable[Row], anchor: Iterable[Row], measure: str) -> BdRate:
    """Bjontegaard's delta rate for each image that both were measured on, then averaged.

    measure: a column; of lpips_* lower is better. Interpolation is pchip (monotone, piecewise cubic) of log rate over
    the measure, over the range that both curves cover; nothing is extrapolated.
    """
    curves = [_curves(rows, measure) for rows in (tested, anchor)]
    shared = [image for image in curves[0] if image in curves[1]]
    percents, reasons = [], set()
    for image in shared:
        (rate, quality), (anchor_rate, anchor_quality) = curves[0][image], curves[1][image]
        if min(len(rate), len(anchor_rate)) < 2:
            reasons.add("too few points")
            continue
        both = min(quality[-1], anchor_quality[-1]) - max(quality[0], anchor_quality[0])
        if both < MIN_OVERLAP * (quality[-1] - quality[0]):
            reasons.add("no overlap")
            continue
        arguments = (anchor_rate, anchor_quality, rate, quality)
        percents.append(bjontegaard.bd_rate(*arguments, method="pchip", require_matching_points=False, min_overlap=0))
    if not percents:
        return BdRate(None, 0, len(shared), " / ".join(sorted(reasons)) or "no image in common")
    return BdRate(float(np.mean(percents)), len(percents), len(shared))


def _curves(rows: Iterable[Row], measure: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each image (rates, qualities), both rising: a point that costs more and is no better is left out."""
    sign = -1 if measure.startswith("lpips") else 1
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        rate, value = number(row, "bpp"), number(row, measure)
        if rate is not None and value is not None and np.isfinite(value):
            points.setdefault(row["image_sha256"], []).append((rate, sign * value))
    curves = {}
    for image, pairs in points.items():
        rising: list[tuple[float, float]] = []
        for rate, quality in sorted(pairs):
            if not rising or (rate > rising[-1][0] and quality > rising[-1][1]):
                rising.append((rate, quality))
        curves[image] = (np.array([rate for rate, _ in rising]), np.array([quality for _, quality in rising]))
    return curves

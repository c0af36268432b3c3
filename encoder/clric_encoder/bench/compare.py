"""Rows -> what is compared: means over images, BD-rates, nearest rates.

Rate is bpp of real files. Which rows are clric's and which are a VAE's ceiling can be seen from their cells.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import bjontegaard
import numpy as np

from .results import Row, number

# Columns that can be averaged over images.
MEASURES = (
    "bytes", "bpp", "psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "lpips_squeeze", "dists", "ssimulacra2",
    "latent_mse",
    "header_bytes", "network_bytes", "grid_bytes", "function_mac", "decoder_mac",
    "encode_s", "decode_s",
)  # fmt: skip

# Measures of quality, in the order in which they are shown among those that nothing was trained on, and among others.
QUALITIES = (
    "dists", "ssimulacra2", "lpips_alex", "lpips_vgg", "lpips_squeeze", "ms_ssim", "psnr", "ssim",
)  # fmt: skip

LOWER_IS_BETTER = ("dists", "lpips_alex", "lpips_vgg", "lpips_squeeze")

# Two curves of which less than this share of the tested codec's range has a counterpart are not compared.
MIN_OVERLAP = 0.25


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows to be shown: of each image, codec and setting one, of each codec its last version only.

    Of several that is the one with most measures, and the last of those.
    """
    rows = list(rows)
    versions = {row["codec"]: row["version"] for row in rows}
    kept: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row["image_sha256"], row["codec"], row["setting"]
        if row["version"] == versions[row["codec"]] and _measures(row) >= _measures(kept.get(key, {})):
            kept[key] = row
    return list(kept.values())


def _measures(row: Row) -> int:
    return len(row.get("measured", "").split())


def is_clric(row: Row) -> bool:
    return bool(row["function_mac"])


def is_ceiling(row: Row) -> bool:
    """Whether the row is of a VAE whose latent was not coded."""
    return not row["bytes"]


def vae_of(row: Row) -> str | None:
    """The VAE whose image decoder a row shows; None for other codecs than clric and the ceilings."""
    if is_clric(row):
        return row["codec"].split()[1]
    return row["codec"].removesuffix(" ceiling") if is_ceiling(row) else None


def codecs(rows: Iterable[Row]) -> list[str]:
    """Names in the order in which they are shown: clric's, the ceilings, all others."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["codec"], row)
    return sorted(first, key=lambda name: 0 if is_clric(first[name]) else 1 if is_ceiling(first[name]) else 2)


def qualities(rows: Sequence[Row], trained: Mapping[str, frozenset[str]]) -> list[str]:
    """The measures of quality that there are, those first that no codec was trained on (``trained``: by codec).

    Of these, those first that no row lacks, so that what stands first is of all codecs.
    """
    columns = [column for column in QUALITIES if any(row[column] for row in rows)]
    marked = set().union(*trained.values())
    return sorted(columns, key=lambda column: (column in marked, not all(row[column] for row in rows)))


@dataclass(frozen=True)
class Common:
    """What means are taken over, so that no two of them are of different images.

    images: SHA-256 of each -> its name. rows: of these images, and of those settings of codecs that have them all.
    left_out: each codec or setting that has not, with "(n of N images)".
    """

    images: dict[str, str]
    rows: list[Row]
    left_out: list[str]


def common(rows: Sequence[Row]) -> Common:
    """Chooses the largest set of images that at least half of the codecs were measured on.

    A set is a candidate where some codec was measured on it and no other image. Where none has half of the codecs,
    the one that most have is taken. rows: one at most for each image, codec and setting (`latest`).
    """
    measured: dict[str, dict[str, str]] = {}
    for row in rows:
        measured.setdefault(row["codec"], {})[row["image_sha256"]] = row["image"]

    def rank(images: dict[str, str]) -> tuple[int, int]:
        sharing = sum(images.keys() <= other.keys() for other in measured.values())
        return min(2 * sharing, len(measured)), len(images)

    images = max(measured.values(), key=rank)
    kept: list[Row] = []
    left_out = []
    for codec in codecs(rows):
        count = len(images.keys() & measured[codec].keys())
        if count < len(images):
            left_out.append(f"{codec} ({count} of {len(images)} images)")
            continue
        settings: dict[str, list[Row]] = {row["setting"]: [] for row in rows if row["codec"] == codec}
        for row in rows:
            if row["codec"] == codec and row["image_sha256"] in images:
                settings[row["setting"]].append(row)
        for setting, members in settings.items():
            if len(members) == len(images):
                kept += members
            else:
                left_out.append(f"{codec} at {setting} ({len(members)} of {len(images)} images)")
    return Common(images, kept, left_out)


@dataclass(frozen=True)
class Mean:
    """A codec at one setting: arithmetic means over its images of each measure that all of them have."""

    codec: str
    setting: str
    values: dict[str, float]


def means(rows: Iterable[Row]) -> list[Mean]:
    """One for each codec and setting, in the order of `codecs`, then of rising rate. rows: `common`'s."""
    rows = list(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["codec"], row["setting"]), []).append(row)
    result = []
    for (codec, setting), members in groups.items():
        values = {}
        for measure in MEASURES:
            cells = [cell for row in members if (cell := number(row, measure)) is not None]
            if len(cells) == len(members):
                values[measure] = float(np.mean(cells))
        result.append(Mean(codec, setting, values))
    order = codecs(rows)
    return sorted(result, key=lambda mean: (order.index(mean.codec), mean.values.get("bpp", 0.0)))


def nearest(rows: Iterable[Row], bpp: float) -> Row | None:
    """The row of nearest rate, by ratio."""
    coded = [row for row in rows if row["bpp"]]
    return min(coded, key=lambda row: abs(np.log(float(row["bpp"]) / bpp)), default=None)


@dataclass(frozen=True)
class BdRate:
    """How much more rate (percent; less is negative) one codec needs than another for the same quality.

    percent: the mean over ``images`` of the ``of`` images on which both have the measure; None where ``images`` is 0,
    and then ``reason`` says why.
    """

    percent: float | None
    images: int
    of: int
    reason: str = ""


def bd_rate(tested: Iterable[Row], anchor: Iterable[Row], measure: str) -> BdRate:
    """Bjontegaard's delta rate for each image on which both have the measure, then averaged.

    measure: a column; see `LOWER_IS_BETTER`. Interpolation is pchip (monotone, piecewise cubic) of log rate over
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
    sign = -1 if measure in LOWER_IS_BETTER else 1
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

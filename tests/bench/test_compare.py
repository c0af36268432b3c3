"""BD-rates, means and what counts as the latest row, on rows that are written out here."""

import pytest
from clric_encoder.bench import compare
from clric_encoder.bench.results import COLUMNS, Row


def row(codec: str, bpp: float, image: str = "a", **cells: float | str) -> Row:
    named = {"codec": codec, "setting": str(bpp), "version": "1", "image_sha256": image, "bpp": str(bpp), "bytes": "9"}
    return {**dict.fromkeys(COLUMNS, ""), **named, **{key: str(value) for key, value in cells.items()}}


RATES = (0.1, 0.2, 0.4, 0.8)


def test_twice_the_rate_for_the_same_quality_is_a_hundred_percent() -> None:
    anchor = [row("x", rate, psnr=30 + i, lpips_alex=0.5 - i / 10) for i, rate in enumerate(RATES)]
    tested = [row("y", 2 * rate, psnr=30 + i, lpips_alex=0.5 - i / 10) for i, rate in enumerate(RATES)]
    for measure in ("psnr", "lpips_alex"):
        more, less = compare.bd_rate(tested, anchor, measure), compare.bd_rate(anchor, tested, measure)
        assert (more.percent, more.images, more.of) == (pytest.approx(100), 1, 1)
        assert less.percent == pytest.approx(-50)


def test_bd_rates_are_averaged_over_images_that_overlap() -> None:
    anchor, tested = [], []
    for image, factor, shift in (("a", 2, 0), ("b", 4, 0), ("c", 4, 50)):
        for i, rate in enumerate(RATES):
            anchor.append(row("x", rate, image, psnr=30 + i))
            tested.append(row("y", factor * rate, image, psnr=30 + i + shift))
    result = compare.bd_rate(tested, anchor, "psnr")
    assert (result.percent, result.images, result.of) == (pytest.approx((100 + 300) / 2), 2, 3)


def test_no_number_without_overlap_or_points() -> None:
    anchor = [row("x", rate, psnr=30 + i) for i, rate in enumerate(RATES)]
    far = [row("y", rate, psnr=40 + i) for i, rate in enumerate(RATES)]
    hardly = [row("y", rate, psnr=32.5 + i) for i, rate in enumerate(RATES)]  # a sixth of its own range
    flat = [row("y", rate, psnr=31) for rate in RATES]  # costs more and is no better: one point
    assert compare.bd_rate(far, anchor, "psnr").reason == "no overlap"
    assert compare.bd_rate(hardly, anchor, "psnr").reason == "no overlap"
    assert compare.bd_rate(flat, anchor, "psnr").reason == "too few points"
    assert compare.bd_rate([row("y", 1, "other", psnr=3)], anchor, "psnr").reason == "no image in common"
    infinite = [row("y", rate, psnr="inf") for rate in RATES]
    assert compare.bd_rate(infinite, anchor, "psnr").percent is None


def test_rows_of_older_versions_are_not_shown() -> None:
    old = row("x", 0.1, psnr=1, version="0")
    first, again = row("x", 0.2, psnr=2), row("x", 0.2, psnr=3)
    other = row("y", 0.1, psnr=4, version="0")
    assert compare.latest([old, first, again, other]) == [again, other]


def test_means_are_of_the_cells_that_there_are() -> None:
    rows = [row("x", 0.1, "a", psnr=30, ms_ssim=0.9), row("x", 0.1, "b", psnr=40)]
    (mean,) = compare.means(rows)
    assert mean.images == 2
    assert mean.values["psnr"] == 35
    assert mean.values["ms_ssim"] == 0.9
    assert "ssim" not in mean.values


def test_nearest_is_by_ratio() -> None:
    rows = [row("x", 0.1), row("x", 0.35)]
    assert compare.nearest(rows, 0.2) == rows[1]  # 1.75 times is nearer than 2 times
    assert compare.nearest([], 0.2) is None

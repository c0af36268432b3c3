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


def test_a_mean_is_of_all_images_or_there_is_none() -> None:
    rows = [row("x", 0.1, "a", psnr=30, ms_ssim=0.9), row("x", 0.1, "b", psnr=40)]
    (mean,) = compare.means(rows)
    assert mean.values["psnr"] == 35
    assert "ms_ssim" not in mean.values
    assert "ssim" not in mean.values


def test_what_nothing_was_trained_on_comes_first() -> None:
    full = {"psnr": 30, "dists": 0.2, "lpips_squeeze": 0.3}
    rows = [row("x", 0.1, **full, ssimulacra2=10), row("y", 0.1, **full)]
    assert compare.qualities(rows, {}) == ["dists", "lpips_squeeze", "psnr", "ssimulacra2"]
    trained = {"x": frozenset(["dists", "ms_ssim"]), "y": frozenset(["psnr"])}
    assert compare.qualities(rows, trained) == ["lpips_squeeze", "ssimulacra2", "dists", "psnr"]


def test_lower_dists_and_higher_ssimulacra2_are_better() -> None:
    anchor = [row("x", rate, dists=0.5 - i / 10, ssimulacra2=10 * i - 20) for i, rate in enumerate(RATES)]
    tested = [row("y", rate / 2, dists=0.5 - i / 10, ssimulacra2=10 * i - 20) for i, rate in enumerate(RATES)]
    for measure in ("dists", "ssimulacra2"):
        assert compare.bd_rate(tested, anchor, measure).percent == pytest.approx(-50)


def on(codec: str, images: str, setting: float = 0.1) -> list[Row]:
    return [row(codec, setting, image) | {"image": f"{image}.png"} for image in images]


@pytest.mark.parametrize(
    ("measured", "images", "left_out"),
    [
        ({"x": "abc", "y": "abc", "z": "ab"}, "abc", ["z (2 of 3 images)"]),
        ({"x": "abc", "y": "ab", "z": "ab"}, "ab", []),  # x over two of its images
        ({"x": "ab", "y": "abc"}, "abc", ["x (2 of 3 images)"]),  # as many have either: the larger
        ({"x": "ab", "y": "bc", "z": "cde"}, "cde", ["x (0 of 3 images)", "y (1 of 3 images)"]),  # no half has any
    ],
)
def test_means_are_over_the_images_that_most_codecs_share(
    measured: dict[str, str], images: str, left_out: list[str]
) -> None:
    shared = compare.common([one for codec, its in measured.items() for one in on(codec, its)])
    assert shared.images == {image: f"{image}.png" for image in images}
    assert shared.left_out == left_out
    inside = {codec for codec in measured if not any(line.startswith(codec) for line in left_out)}
    assert sorted((one["codec"], one["image_sha256"]) for one in shared.rows) == sorted(
        (codec, image) for codec in inside for image in images
    )


def test_a_setting_that_failed_on_an_image_has_no_mean() -> None:
    rows = [*on("x", "ab"), *on("x", "b", 0.2), *on("y", "ab"), *on("y", "ab", 0.2)]
    shared = compare.common(rows)
    assert shared.left_out == ["x at 0.2 (1 of 2 images)"]
    assert [(mean.codec, mean.setting) for mean in compare.means(shared.rows)] == [
        ("x", "0.1"), ("y", "0.1"), ("y", "0.2"),
    ]  # fmt: skip


def test_nearest_is_by_ratio() -> None:
    rows = [row("x", 0.1), row("x", 0.35)]
    assert compare.nearest(rows, 0.2) == rows[1]  # 1.75 times is nearer than 2 times
    assert compare.nearest([], 0.2) is None

"""Marks of measures that a codec was trained on: which they are, and that the report shows them there alone."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import ClricError
from clric_encoder.bench import marks
from clric_encoder.bench.compare import latest
from clric_encoder.bench.report import _cell, write_report
from clric_encoder.bench.results import COLUMNS, ResultsFile, Row, read_rows

V0 = Path(__file__).resolve().parents[2] / "results/v0/results.csv"

TUNED = {"psnr", "ms_ssim", "ssim", "lpips_vgg", "fd_vgg16"}
SHIPPED = TUNED | {"lpips_squeeze"}
QUALITY = {
    "psnr": 30.0, "ssim": 0.9, "ms_ssim": 0.9, "lpips_alex": 0.3, "lpips_vgg": 0.3, "lpips_squeeze": 0.3,
    "dists": 0.2, "ssimulacra2": 40.0,
}  # fmt: skip


def row(codec: str, step: int, tune: str = "", **cells: str) -> Row:
    """One of a curve: each step has twice the rate, and all measures are better."""
    better = {name: value * (1 + (-0.1 if value < 0.5 else 0.01) * step) for name, value in QUALITY.items()}
    named = {
        "id": f"{codec}{step}", "image": "a.png", "image_sha256": "a", "width": "768", "height": "512",
        "codec": codec, "setting": str(step), "version": "1", "tune": tune, "bytes": "999", "bpp": str(0.1 * 2**step),
        "encode_s": "1", "decode_s": "1",
    }  # fmt: skip
    return {**dict.fromkeys(COLUMNS, ""), **named, **{name: str(value) for name, value in better.items()}, **cells}


CLRIC = {"function_mac": "19", "latent_mse": "0.1", "grid_bytes": "700", "network_bytes": "200", "header_bytes": "99"}
CEILING = {"bytes": "", "bpp": "", "setting": "latent not coded"}
ZOO = {"version": "compressai 1.2, metric=mse"}
CODECS: dict[str, tuple[str, dict[str, str], set[str]]] = {
    "clric lite default tuned": ("lite", CLRIC, SHIPPED | {"latent_mse"}),
    "clric lite default untuned": ("none", CLRIC, SHIPPED | {"latent_mse"}),
    "clric taesd default tuned through lite": ("lite", CLRIC, TUNED | {"latent_mse"}),
    "clric taesd default untuned": ("none", CLRIC, {"latent_mse"}),
    "lite ceiling": ("", CEILING, SHIPPED),
    "small ceiling": ("", CEILING, SHIPPED),
    "taesd ceiling": ("", CEILING, set()),
    "AVIF": ("", {}, set()),
    "mbt2018": ("", ZOO, {"psnr"}),
}
ROWS = [
    row(codec, step, tune, **cells)
    for codec, (tune, cells, _) in CODECS.items()
    for step in range(1 if cells is CEILING else 4)
]
MEASURES = {
    "DISTS": "dists", "SSIMULACRA2": "ssimulacra2", "LPIPS, AlexNet": "lpips_alex", "LPIPS, VGG": "lpips_vgg",
    "LPIPS, SqueezeNet": "lpips_squeeze", "MS-SSIM": "ms_ssim", "PSNR, dB": "psnr", "SSIM": "ssim",
    "latent MSE": "latent_mse", "FD-VGG16": "fd_vgg16",
}  # fmt: skip


def test_what_each_codec_was_trained_on() -> None:
    assert marks.trained_on(ROWS) == {codec: trained for codec, (_, _, trained) in CODECS.items()}
    assert marks.explanation([row("AVIF", 0)]) is None
    text = marks.explanation([row("AVIF", 0), row("mbt2018", 0, **ZOO)])
    assert text is not None
    assert "CompressAI" in text
    assert "clric" not in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ROWS)
    (folder / "run.json").write_text(
        json.dumps({"machines": [], "photos": [], "unavailable": {}, "missing": {}, "failures": []})
    )
    (folder / "fd_vgg16").mkdir()
    random = np.random.default_rng(0)
    for name in ("a", *(row["id"] for row in ROWS)):
        np.save(folder / "fd_vgg16" / f"{name}.npy", random.normal(size=(6, 512)).astype(np.float32))
    write_report(folder)
    return folder


def tables(folder: Path) -> dict[str, list[list[str]]]:
    sections = (folder / "summary.md").read_text().split("\n## ")[1:]
    return {
        section.split("\n")[0]: [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
        for section in sections
    }


def test_every_value_of_the_means_is_marked_where_it_must_be(folder: Path) -> None:
    for title in ("All means", "FD-VGG16 over 256 x 256 patches"):
        header, _, *lines = tables(folder)[title]
        assert len(lines) == len(ROWS)
        seen = set()
        for line in lines:
            for name, cell in zip(header, line, strict=True):
                measure = MEASURES.get(name, name)
                assert ("†" in cell) == (measure in CODECS[line[0]][2] and cell != "–"), (line[0], name, cell)
                seen.add(measure)
        assert seen >= ({"fd_vgg16"} if "FD" in title else {*QUALITY, "latent_mse"})


def test_bd_rates_are_marked_where_one_of_the_two_was_trained(folder: Path) -> None:
    header, _, *lines = tables(folder)["BD-rates"]
    assert len(lines) == 4 * 5
    for codec, anchor, *cells in lines:
        for name, cell in zip(header[2:], cells, strict=True):
            assert "%" in cell
            assert ("†" in cell) == (MEASURES[name] in CODECS[codec][2] | CODECS[anchor][2]), (codec, anchor, name)


def test_ceilings_are_marked(folder: Path) -> None:
    header, _, *lines = tables(folder)["Ceilings"]
    for vae, _, *cells in lines:
        for name, cell in zip(header[2:], cells, strict=True):
            assert ("†" in cell) == (MEASURES[name] in CODECS[f"{vae} ceiling"][2])


def test_plots_mark_the_curves_of_those_that_were_trained(folder: Path) -> None:
    for measure in QUALITY:
        svg = (folder / f"plots/{measure}.svg").read_text()
        for codec, (_, cells, trained) in CODECS.items():
            label = f"{codec}{'†' if measure in trained else ''}{' (latent not coded)' if cells is CEILING else ''}"
            assert f"<!-- {label} -->" in svg
        assert ("† trained on this measure" in svg) == any(measure in trained for _, _, trained in CODECS.values())


def test_what_stands_first_is_unmarked(folder: Path) -> None:
    header = tables(folder)["BD-rates"][0]
    assert header[2:5] == ["DISTS", "SSIMULACRA2", "LPIPS, AlexNet"]
    page = (folder / "report.html").read_text()
    titles = [part.split("</h2>")[0] for part in page.split("<h2>")[1:]]
    assert titles[1:4] == ["DISTS", "SSIMULACRA2", "LPIPS, AlexNet"]
    for text in (page, (folder / "summary.md").read_text()):
        assert text.count("† marks a measure that the codec") == 1
        assert "nothing below is a fair comparison" not in text


def test_a_comparison_by_marked_measures_alone_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "run.json", tmp_path)
    hidden = dict.fromkeys(("dists", "ssimulacra2", "lpips_alex"), "")
    with open(tmp_path / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row | hidden for row in ROWS)
    write_report(tmp_path)
    assert "nothing below is a fair comparison" in (tmp_path / "summary.md").read_text()


def test_crops_say_it_in_words() -> None:
    trained = marks.trained_on(ROWS)
    texts = {row["codec"]: _cell(row, "psnr", Path(), trained)[2] for row in ROWS if row["setting"] == "0"}
    assert texts["AVIF"] == "0.100 bpp, PSNR, dB 30.0"
    assert {codec for codec, text in texts.items() if text.endswith(" (trained on it)")} == {
        "clric lite default tuned", "clric lite default untuned", "clric taesd default tuned through lite", "mbt2018",
    }  # fmt: skip


def test_old_results_are_read_as_untuned_and_can_be_added_to(tmp_path: Path) -> None:
    shutil.copy(V0, tmp_path / "results.csv")
    with open(V0, newline="") as file:
        old = list(csv.DictReader(file))
    rows = read_rows(tmp_path)
    assert [{name: row[name] for name in old[0]} for row in rows] == old
    assert {row["tune"] for row in rows if row["function_mac"]} == {"none"}
    assert {row["tune"] for row in rows if not row["function_mac"]} == {""}
    assert {row["dists"] for row in rows} == {""}
    lite = marks.trained_on(rows)["clric lite default"]
    assert lite == SHIPPED | {"latent_mse"}
    file = ResultsFile(tmp_path)
    file.append(ROWS[0])
    file.close()
    assert read_rows(tmp_path) == [*rows, ROWS[0]]


def test_a_line_that_was_cut_within_a_letter_is_dropped_and_names_may_be_no_utf_8(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path)
    named = {**ROWS[0], "image": "caf\udce9.png"}
    file.append(named)
    file.close()
    with open(tmp_path / "results.csv", "ab") as results:
        results.write("cut,é".encode()[:-1])
    assert read_rows(tmp_path) == [named]
    file = ResultsFile(tmp_path)
    file.append(ROWS[1])
    file.close()
    assert read_rows(tmp_path) == [named, ROWS[1]]


def test_of_rows_of_one_version_the_one_with_most_measures_is_shown() -> None:
    poor, rich = {**ROWS[0], "measured": ""}, {**ROWS[0], "measured": "dists lpips_vgg"}
    for rows in ([poor, rich], [rich, poor]):
        assert latest(rows) == [rich]


def test_columns_in_another_order_are_refused(tmp_path: Path) -> None:
    text = ",".join(["image", *(column for column in COLUMNS if column != "image")]) + "\n"
    (tmp_path / "results.csv").write_text(text)
    for read in (read_rows, ResultsFile):
        with pytest.raises(ClricError, match="columns"):
            read(tmp_path)
    assert (tmp_path / "results.csv").read_text() == text

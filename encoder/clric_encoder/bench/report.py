"""summary.md and report.html from results.csv, run.json and the crops beside them: nothing is measured here.

The tables are made once and written twice. The page holds its pictures in itself, and refers to nothing outside.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from clric_decoder.bitstream import VERSION, Header
from clric_decoder.errors import ClricError
from clric_decoder.files import write_output
from clric_decoder.networks import mac_per_pixel

from ..training.presets import PRESETS
from . import pictures
from .compare import (
    MIN_OVERLAP,
    Common,
    Mean,
    bd_rate,
    codecs,
    common,
    is_ceiling,
    is_clric,
    latest,
    means,
    nearest,
    qualities,
    vae_of,
)
from .fid import FID_PATCH, frechet_distance
from .marks import MARK, explanation, mark, trained_on
from .measure import CROP, FD_VGG16, FID, Photo
from .results import Row, read_rows

_DASH = "–"

# Codec -> the measures that it was trained on.
_Trained = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Run:
    """What a run leaves in run.json: what is true of all its rows, and what did not become one.

    machines: what measured the rows, in words: of the first run and of those that went on where it stopped. photos: all
        that were read. unavailable: codec -> why it could not run. missing: measure -> why it could not be taken.
        failures: "image: what: why" of each.
    """

    machines: list[str]
    photos: list[Photo]
    unavailable: dict[str, str]
    missing: dict[str, str]
    failures: list[str]

    def write(self, folder: Path) -> None:
        write_output(folder / "run.json", json.dumps(asdict(self), indent=1).encode() + b"\n")

    @staticmethod
    def read(folder: Path) -> "Run":
        """Raises ClricError where there is none."""
        try:
            fields = json.loads((folder / "run.json").read_bytes())
            return Run(**{**fields, "photos": [Photo(**photo) for photo in fields["photos"]]})
        except OSError as error:
            raise ClricError(
                f"{folder / 'run.json'}: {error.strerror}; is it the output of clric-bench run?"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ClricError(f"{folder / 'run.json'}: damaged; run clric-bench run again") from error


@dataclass(frozen=True)
class Table:
    """A table, with a line under its title that says what it shows. The first two columns are text."""

    title: str
    about: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Picture:
    """A picture in the page: data of a media type."""

    title: str
    about: str
    kind: str
    data: bytes


def write_report(folder: Path) -> None:
    """Writes summary.md, report.html, plots/ and the sheets of crops into the folder of a run. Raises ClricError."""
    run, rows = Run.read(folder), latest(read_rows(folder))
    if not rows:
        raise ClricError(f"{folder / 'results.csv'}: contains no results")
    shared = common(rows)
    points = means(shared.rows)
    trained = trained_on(rows)
    measures = qualities(rows, trained)
    kodak = all(
        row["image"].startswith("kodim") and {row["width"], row["height"]} == {"768", "512"} for row in shared.rows
    )
    over = f"Means over the same {_images(len(shared.images))}"
    tables = [
        _compared(rows, run),
        _bd_rates(rows, measures, trained),
        _means(points, over, measures, trained),
        _ceilings(rows, points, over, measures, trained),
        _shares(points, over),
        _costs(rows, shared.rows, over),
        _paper_table(),
        _fid(shared, points, folder),
        _fd_vgg16(shared, points, folder, trained),
    ]
    text = [*_introduction(rows, shared, run, measures, trained), *(_markdown(table) for table in tables if table.rows)]
    text.append("## How it was measured\n\n" + "\n".join(f"- {line}" for line in _protocol(rows)))
    text += ["## What failed\n\n" + "\n".join(f"- {line}" for line in run.failures)] if run.failures else []
    write_output(folder / "summary.md", ("\n\n".join(text) + "\n").encode())

    plots = []
    for measure in measures:
        if any(measure in point.values for point in points):
            has_published = kodak and bool(pictures.published(measure))
            about = f"{over}, of rate and of quality, at each setting."
            if has_published:
                about += (
                    " Grey: published for all 24 images of Kodak, not measured here (published.csv has the sources)."
                )
            svg = pictures.plot(rows, points, measure, folder, has_published, trained)
            plots.append(Picture(_label(measure), about, "svg+xml", svg))
    crops = [_sheet(rows, photo, folder, measures, trained) for photo in run.photos]
    strip = [_strip(rows, photo, folder, measures, trained) for photo in run.photos][:1]
    blocks = [
        *("<p>" + html.escape(line) + "</p>" for line in _introduction(rows, shared, run, measures, trained)[1:]),
        *(_html(item) for item in (tables[0], *plots, tables[1], *crops, *strip, *tables[2:]) if item),
        "<h2>How it was measured</h2><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in _protocol(rows))
        + "</ul>",
    ]
    if run.failures:
        blocks.append(
            "<h2>What failed</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in run.failures) + "</ul>"
        )
    page = _PAGE.replace("BODY", "\n".join(block for block in blocks if block))
    write_output(folder / "report.html", page.encode())


# --- Tables ---------------------------------------------------------------------------------------------------------


def _images(count: int) -> str:
    return f"{count} images" if count > 1 else "one image"


def _label(measure: str) -> str:
    return pictures.LABELS[measure].split(" (")[0]


def _is_unmarked(measure: str, trained: _Trained) -> bool:
    return not any(measure in measures for measures in trained.values())


def _about_marks(lines: Iterable[Sequence[str]]) -> str:
    """What a table's own text says of its marks, if it has any."""
    return f" {MARK}: trained on this measure." if any(MARK in cell for line in lines for cell in line) else ""


def _introduction(
    rows: Sequence[Row], shared: Common, run: Run, measures: Sequence[str], trained: _Trained
) -> list[str]:
    names = sorted({row["image_sha256"]: row["image"] for row in rows}.values())
    sizes = sorted({f"{row['width']} x {row['height']}" for row in rows})
    means_of = f"over the {_images(len(names))}"
    if len(shared.images) < len(names):
        means_of = f"over {len(shared.images)} of the {len(names)} images: {', '.join(sorted(shared.images.values()))}"
    lines = [
        "# clric-bench",
        f"{len(rows)} results on {_images(len(names))} ({', '.join(sizes[:6])}{', ...' * (len(sizes) > 6)} pixels): "
        f"{', '.join(names)}.",
        f"Measured on: {', and on: '.join(run.machines)}.",
        f"All means, in tables and plots, are {means_of}.",
    ]
    if shared.left_out:
        lines[-1] += (
            f" Not measured on all of these, and therefore not among the means: {', '.join(shared.left_out)}. BD-rates "
            "and crops go image by image, and take what there is."
        )
    marks = explanation(rows)
    if marks:
        lines.append(marks)
        if not any(_is_unmarked(measure, trained) for measure in measures):
            lines.append(
                "Something here was trained on each of the measures that were taken: nothing below is a fair "
                "comparison of all codecs. Install clric[bench] and give --metrics DIR for others."
            )
    return lines


def _compared(rows: Sequence[Row], run: Run) -> Table:
    versions = {row["codec"]: row["version"] for row in rows}
    lines: list[tuple[str, ...]] = [(name, "measured", versions[name]) for name in codecs(rows)]
    lines += [(name, "not measured", why) for name, why in run.unavailable.items() if name not in versions]
    lines += [(name, "not measured", why) for name, why in run.missing.items()]
    return Table("What was compared", "Version and options of each, or why it is missing.", ("", "", ""), lines)


def _number(value: float | None, digits: int) -> str:
    return _DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _bd_rates(rows: Sequence[Row], measures: Sequence[str], trained: _Trained) -> Table:
    by_codec = {name: [row for row in rows if row["codec"] == name] for name in codecs(rows)}
    clric = [name for name, members in by_codec.items() if is_clric(members[0])]
    lines = []
    for name in clric:
        for anchor, members in by_codec.items():
            if anchor == name or is_ceiling(members[0]):
                continue
            cells = []
            for measure in measures:
                bd = bd_rate(by_codec[name], members, measure)
                percent = bd.reason if bd.percent is None else f"{bd.percent:+,.0f} %"
                percent += mark([trained[name], trained[anchor]], measure) if bd.percent is not None else ""
                cells.append(f"{percent} ({bd.images}/{bd.of})" if bd.of else percent)
            lines.append((name, anchor, *cells))
    return Table(
        "BD-rates",
        "How many percent more rate (less is negative, and better) clric needs for the same quality: computed for each "
        "image, then averaged. In brackets: over how many images, those on which the two curves overlap, of how many "
        "that both were measured on. Averages over different images do not compare with each other."
        + (f" {MARK}: one of the two was trained on this measure." if MARK in str(lines) else ""),
        ("codec", "compared with", *map(_label, measures)),
        lines,
    )


# Digits behind the point.
_DIGITS = {"psnr": 2, "ssimulacra2": 2}


def _value(values: Mapping[str, float], measure: str, digits: int, measures: frozenset[str]) -> str:
    """A mean with its mark. measures: that its codec was trained on."""
    return _number(values.get(measure), digits) + (mark([measures], measure) if measure in values else "")


def _means(points: Sequence[Mean], over: str, measures: Sequence[str], trained: _Trained) -> Table:
    columns = [("bytes", "bytes", 0), ("bpp", "bpp", 4)]
    columns += [(name, _label(name), _DIGITS.get(name, 4)) for name in measures]
    columns += [("latent_mse", "latent MSE", 4), ("encode_s", "encode, s", 2), ("decode_s", "decode, s", 3)]
    lines = [
        (
            point.codec,
            point.setting,
            *(_value(point.values, name, digits, trained[point.codec]) for name, _, digits in columns),
        )
        for point in points
    ]
    return Table(
        "All means",
        f"{over}, at each setting. Rates are sizes of files.{_about_marks(lines)}",
        ("codec", "setting", *(label for _, label, _ in columns)),
        lines,
    )


def _ceilings(
    rows: Sequence[Row], points: Sequence[Mean], over: str, measures: Sequence[str], trained: _Trained
) -> Table:
    by_codec = {point.codec: point.values for point in points}
    lines = []
    for vae in dict.fromkeys(vae for row in rows if (vae := vae_of(row))):
        name = f"{vae} ceiling"
        values, its = by_codec.get(name, {}), trained.get(name, frozenset())
        lines.append(
            (
                vae,
                "latent not coded" if name in by_codec else "not measured on all of them",
                *(_value(values, measure, _DIGITS.get(measure, 4), its) for measure in measures),
            )
        )
    return Table(
        "Ceilings",
        f"{over}, of each VAE alone, its latent not coded: what clric, untuned, comes to as the rate grows."
        + _about_marks(lines),
        ("VAE", "", *map(_label, measures)),
        lines,
    )


def _shares(points: Sequence[Mean], over: str) -> Table:
    lines = []
    for point in points:
        if "grid_bytes" in point.values:
            total = point.values["bytes"]
            parts = [point.values[f"{part}_bytes"] for part in ("grid", "network", "header")]
            cells = [f"{part:,.0f} ({100 * part / total:.1f} %)" for part in parts]
            lines.append((point.codec, point.setting, _number(point.values["bpp"], 4), f"{total:,.0f}", *cells))
    return Table(
        "Where a stream's bytes go",
        f"{over}, for each VAE and preset; in brackets, shares of the mean file. The header includes the checksum and "
        "all lengths.",
        ("codec", "setting", "bpp", "bytes", "grids", "networks", "header"),
        lines,
    )


def _costs(rows: Sequence[Row], shared: Sequence[Row], over: str) -> Table:
    """rows: all, for the memory, which one row of each codec and size has, of whichever image."""

    def pixels(row: Row) -> int:
        return int(row["width"]) * int(row["height"])

    lines: list[tuple[str, ...]] = []
    for name in codecs(shared):
        for size in sorted({pixels(row) for row in shared if row["codec"] == name}):
            cells = [
                _number(_mean((row for row in of if row["codec"] == name and pixels(row) == size), column), digits)
                for of, column, digits in (
                    (shared, "encode_s", 2), (shared, "decode_s", 3), (rows, "encode_mb", 0), (rows, "decode_mb", 0),
                    (shared, "function_mac", 2), (shared, "decoder_mac", 0),
                )
            ]  # fmt: skip
            lines.append((name, f"{size / 1e6:.2f}", *cells))
    return Table(
        "What it costs",
        f"{over}, at all settings of a codec, for each size of image. MAC/pixel: multiply-accumulates per image pixel, "
        "of the overfitted function and of the VAE's decoder.",
        (
            "codec", "megapixels", "encode, s", "decode, s", "encode, peak MB", "decode, peak MB",
            "function, MAC/pixel", "VAE decoder, MAC/pixel",
        ),
        lines,
    )  # fmt: skip


def _mean(rows: Iterable[Row], column: str) -> float | None:
    cells = [float(row[column]) for row in rows if row[column]]
    return float(np.mean(cells)) if cells else None


# Image size (height, width), latent size and MAC/pixel of the paper's Table I.
_PAPER_TABLE = (((512, 768), (64, 96), 25.9), ((1363, 2048), (170, 256), 25.48))


def _paper_table() -> Table:
    lines = []
    for (height, width), latent, published in _PAPER_TABLE:
        cells = []
        for preset in ("paper", "default"):
            architecture = PRESETS[preset].architecture(4)
            header = Header(
                version=VERSION,
                width=width,
                height=height,
                space="sd1",
                channels=4,
                architecture=architecture,
                function=0,
                image_decoder=0,
                metadata={},
                header_bytes=0,
                metadata_bytes=0,
                network_bytes=0,
                level_bytes=(1,) * len(architecture.channels),  # any that say that no level is empty
            )
            cells.append(_number(sum(mac_per_pixel(header).values()), 2))
        ours = f"{math.ceil(height / 8)}, {math.ceil(width / 8)}"
        lines.append((f"{height}, {width}", f"{latent[0]}, {latent[1]}", ours, f"{published:g}", *cells))
    return Table(
        "The paper's Table I: MAC/pixel of the overfitted function",
        "Published beside ours, counted from the architecture with every level in use (4 channels). The paper rounds "
        "the latent's size down, clric up.",
        ("image size", "latent, paper", "latent, clric", "the paper (published)", "preset paper", "preset default"),
        lines,
    )


def _fid(shared: Common, points: Sequence[Mean], folder: Path) -> Table:
    return Table(
        f"FID over {FID_PATCH} x {FID_PATCH} patches",
        f"Patches without overlap (stride {FID_PATCH}) from the top left corner of each of the same "
        f"{_images(len(shared.images))}, decoded against original. With fewer than some thousand patches FID is "
        "biased: compare its values here with each other only.",
        ("codec", "setting", "bpp", "patches", "FID"),
        [
            (point.codec, point.setting, _number(point.values.get("bpp"), 4), str(count), _number(distance, 2))
            for point, count, distance in _frechet(shared, points, folder / FID)
        ],
    )


def _fd_vgg16(shared: Common, points: Sequence[Mean], folder: Path, trained: _Trained) -> Table:
    lines: list[tuple[str, ...]] = [
        (
            point.codec,
            point.setting,
            _number(point.values.get("bpp"), 4),
            str(count),
            _value({"fd_vgg16": distance}, "fd_vgg16", 2, trained[point.codec]),
        )
        for point, count, distance in _frechet(shared, points, folder / FD_VGG16)
    ]
    return Table(
        f"FD-VGG16 over {FID_PATCH} x {FID_PATCH} patches",
        "The Frechet distance of features of VGG16 (relu5_3, averaged over each patch, 512 numbers). It is not FID, "
        "whose features are Inception's: the two do not compare. Patches as FID's, of the same "
        f"{_images(len(shared.images))}, decoded against original. With fewer patches than some times 512 the "
        f"covariances are poorly known and the value is biased: compare within this table only.{_about_marks(lines)}",
        ("codec", "setting", "bpp", "patches", "FD-VGG16"),
        lines,
    )


def _frechet(shared: Common, points: Sequence[Mean], folder: Path) -> Iterator[tuple[Mean, int, float]]:
    """(point, number of patches, distance) of those points of whose images all features are there."""
    for point in points:
        pairs = [
            (folder / f"{row['image_sha256']}.npy", folder / f"{row['id']}.npy")
            for row in shared.rows
            if (row["codec"], row["setting"]) == (point.codec, point.setting)
        ]
        if not all(path.is_file() for pair in pairs for path in pair):
            continue
        originals, decoded = (np.concatenate([np.load(path) for path in paths]) for paths in zip(*pairs, strict=True))
        if len(decoded) >= 2:
            yield point, len(decoded), frechet_distance(originals.astype(np.float64), decoded.astype(np.float64))


def _protocol(rows: Sequence[Row]) -> list[str]:
    return [
        "Means: arithmetic, over the largest set of images that at least half of the codecs were measured on (or else "
        "the one that most of them were). A codec or a setting that lacks one of these images is not among the means, "
        "and a measure that one of its images lacks has none (–).",
        "Rate: bits of the whole file over image pixels. Each peer runs at a fixed list of qualities, from the lowest "
        "that it has to about 2 bpp, and is compared by curves (BD-rate) or at its setting of nearest rate (crops). A "
        "curve of a peer begins at the lowest rate that it has.",
        "PSNR: of all RGB values of 8 bits. SSIM and MS-SSIM: pytorch-msssim, on RGB, over whole windows of 11 x 11, "
        "five scales. LPIPS: version 0.1, on the whole image. DISTS: on the whole image, not reduced to 256 "
        "pixels, with the weights of dists-pytorch. SSIMULACRA2: package ssimulacra2, the original ported to Python. "
        "VGG16's weights are rounded to 16 bits; large images go through it in tiles that see far enough beyond their "
        "edges for the features to be the whole image's. Latent MSE: between the VAE's latent and the stream's.",
        "BD-rate: log rate interpolated over the measure by pchip (package bjontegaard), for each image, then the "
        "arithmetic mean of the percentages, over those of the images that both were measured on where the curves "
        "overlap. Points that cost more and are no better are left out. "
        f"'No overlap' where the curves share less than {100 * MIN_OVERLAP:.0f} % of clric's range of the measure: "
        "nothing is extrapolated. LPIPS and DISTS are negated.",
        "Seconds: wall clock of one call, libraries and networks loaded, one thread for torch and the image formats; "
        "the VAE's decoder runs in onnxruntime on the CPU with as many threads as that takes. Where several jobs ran "
        "at once they slowed each other down.",
        "Peak MB: the most memory that a fresh process held that did this and nothing else, Python and its libraries "
        "included (10^6 bytes, Linux's VmHWM). Taken once for each codec and number of pixels, at the lowest rate.",
        "MAC/pixel of a VAE's decoder: convolutions and matrix products of the ONNX graph for the whole image at once.",
        f"Crops: the {CROP} x {CROP} pixels of each image whose brightness varies most, shown pixel by pixel.",
        *sorted({f"{row['image']}: {row['notes']}." for row in rows if row["notes"]}),
    ]


# --- Crops ----------------------------------------------------------------------------------------------------------


def _cell(row: Row, measure: str, folder: Path, trained: _Trained) -> tuple[Path, str, str]:
    rate = f"{float(row['bpp']):.3f} bpp" if row["bpp"] else row["setting"]
    digits = 1 if measure in _DIGITS else 3
    quality = f"{_label(measure)} {float(row[measure]):.{digits}f}"
    # In words: the font of the sheets has no sign for the mark.
    quality += " (trained on it)" if measure in trained[row["codec"]] else ""
    return folder / "crops" / f"{row['id']}.png", row["codec"], f"{rate}, {quality}"


def _measure_of_crops(rows: Sequence[Row], measures: Sequence[str]) -> str:
    """The first measure that all of the rows have, so that crops side by side have the same."""
    return next(measure for measure in measures if all(row[measure] for row in rows))


def _sheet(
    rows: Sequence[Row], photo: Photo, folder: Path, measures: Sequence[str], trained: _Trained
) -> Picture | None:
    """The original, clric at its middle setting, and all others at the nearest rate; None without crops."""
    original = folder / "crops" / f"{photo.sha256}.png"
    mine = [row for row in rows if row["image_sha256"] == photo.sha256]
    clric = [row for row in mine if is_clric(row)]
    first = sorted((row for row in clric if row["codec"] == clric[0]["codec"]), key=lambda row: float(row["bpp"]))
    coded = [name for name in codecs(mine) if any(row["codec"] == name and row["bpp"] for row in mine)]
    if not original.is_file() or not coded:
        return None
    rate = float(first[len(first) // 2]["bpp"] if first else next(row["bpp"] for row in mine if row["bpp"]))
    nearests = (nearest([row for row in mine if row["codec"] == name], rate) for name in coded)
    chosen = [row for row in nearests if row]
    measure = _measure_of_crops(chosen, measures)
    cells = [(original, "original", photo.name)]
    cells += [_cell(row, measure, folder, trained) for row in chosen]
    place = folder / "crops" / f"sheet-{Path(photo.name).stem}.png"
    about = (
        "clric at the middle of its rates, every other codec at the nearest rate that was measured. Where that is far "
        "off, the codec has hardly any nearer."
    )
    return _picture(f"Crops of {photo.name}", about, cells, place)


def _strip(
    rows: Sequence[Row], photo: Photo, folder: Path, measures: Sequence[str], trained: _Trained
) -> Picture | None:
    """The first clric codec from its lowest to its highest rate, the ceiling, and the original."""
    original = folder / "crops" / f"{photo.sha256}.png"
    mine = [row for row in rows if row["image_sha256"] == photo.sha256]
    clric = [row for row in mine if is_clric(row)]
    if not original.is_file() or not clric:
        return None
    first = sorted((row for row in clric if row["codec"] == clric[0]["codec"]), key=lambda row: float(row["bpp"]))
    ceiling = f"{vae_of(clric[0])} ceiling"
    chosen = [*first, *(row for row in mine if row["codec"] == ceiling)]
    measure = _measure_of_crops(chosen, measures)
    cells = [_cell(row, measure, folder, trained) for row in chosen]
    cells.append((original, "original", photo.name))
    about = "One image at every rate, as in the paper's Figure 8; then the VAE's ceiling."
    return _picture("From the lowest to the highest rate", about, cells, folder / "strip.png")


def _picture(title: str, about: str, cells: Sequence[tuple[Path, str, str]], place: Path) -> Picture | None:
    present = [cell for cell in cells if cell[0].is_file()]
    return Picture(title, about, "png", pictures.sheet(present, place))


# --- Markdown and HTML ----------------------------------------------------------------------------------------------


def _markdown(table: Table) -> str:
    rule = ["---", "---", *("---:" for _ in table.header[2:])]
    lines = [table.header, rule, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    return f"## {table.title}\n\n{table.about}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _html(item: Table | Picture) -> str:
    head = f"<h2>{html.escape(item.title)}</h2><p>{html.escape(item.about)}</p>"
    if isinstance(item, Picture):
        source = f"data:image/{item.kind};base64,{base64.b64encode(item.data).decode()}"
        return f'{head}<img alt="{html.escape(item.title)}" src="{source}">'
    if not item.rows:
        return ""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header = line(item.header, "th") if any(item.header) else ""
    text = "" if any(item.header) else ' class="text"'
    return f"{head}<table{text}>{header}{''.join(line(row, 'td') for row in item.rows)}</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>clric-bench</title>
<style>
body { max-width: 1232px; margin: 24px auto; padding: 0 16px; color: #1a1a1a; background: white;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 28px; margin-bottom: 8px; }
h2 { font-size: 20px; margin: 40px 0 4px; }
p { margin: 4px 0 12px; max-width: 900px; }
img { display: block; max-width: 100%; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; white-space: nowrap; }
.text td { text-align: left; }
</style></head>
<body><h1>clric-bench</h1>
BODY
</body></html>
"""

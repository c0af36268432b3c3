"""What the report shows besides tables: plots of quality over rate, and sheets of crops."""

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import matplotlib
from clric_decoder.files import write_output
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from .compare import Mean, codecs, is_ceiling, is_clric, vae_of
from .marks import MARK, mark, trained_on_published
from .measure import CROP
from .results import Row

LABELS = {
    "psnr": "PSNR, dB (higher is better)",
    "ssim": "SSIM (higher is better)",
    "ms_ssim": "MS-SSIM (higher is better)",
    "lpips_alex": "LPIPS, AlexNet (lower is better)",
    "lpips_vgg": "LPIPS, VGG (lower is better)",
    "lpips_squeeze": "LPIPS, SqueezeNet (lower is better)",
    "dists": "DISTS (lower is better)",
    "ssimulacra2": "SSIMULACRA2 (higher is better)",
}

# clric's curves are warm and bold, a colour for each VAE and a line for each of its presets and ways of tuning; the
# others are not.
_CLRIC_COLOURS = ("#d62728", "#ff7f0e", "#8c1a6a", "#b8860b", "#e377c2", "#7f0000")
_CLRIC_LINES = ("o-", "s:", "^-.", "D:", "v-.")
_OTHER_COLOURS = ("#1f5fa8", "#2a9d5c", "#17a2b8", "#6b7280", "#4b3fa7", "#0b7a75", "#8a9a5b", "#3d5a80", "#9aa5b1")

# Rates that the plots show: a published curve goes on beyond.
_RATES = (0.02, 2.0)


def published(measure: str) -> dict[str, list[tuple[float, float]]]:
    """Published curves (bpp, value) of Kodak's 24 images by codec, from published.csv; none for most measures."""
    text = files(__package__).joinpath("published.csv").read_text()
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        if row.get(measure):
            curves.setdefault(row["codec"], []).append((float(row["bpp"]), float(row[measure])))
    return curves


def plot(
    rows: Sequence[Row],
    points: Sequence[Mean],
    measure: str,
    folder: Path,
    with_published: bool,
    trained: Mapping[str, frozenset[str]],
) -> bytes:
    """Writes plots/MEASURE.png and .svg: the mean measure over the mean rate of each setting. Returns the SVG.

    A VAE's ceiling is a dashed line, a published curve thin and grey. trained: codec -> the measures that it was
    trained on; its curve's label has a mark at these.
    """
    colours = _colours(rows)
    labels = {name: name + mark([measures], measure) for name, measures in trained.items()}
    figure = Figure(figsize=(11.5, 6), layout="constrained")
    axes = figure.subplots()
    markers = iter("ov^<>sPX*dDhp" * 2)
    for name, curve in published(measure).items() if with_published else ():
        axes.plot(
            *zip(*curve, strict=True),
            color="#b0b0b0",
            lw=0.9,
            ms=4,
            marker=next(markers),
            label=f"{name} (published){mark([trained_on_published(name)], measure)}",
        )
    ceilings = {row["codec"] for row in rows if is_ceiling(row)}
    clric = {row["codec"] for row in rows if is_clric(row)}
    drawn: list[str] = []
    for name in codecs(rows):
        mine = [mean for mean in points if mean.codec == name and measure in mean.values]
        values = [mean.values[measure] for mean in mine]
        if name in ceilings and mine:
            axes.axhline(values[0], color=colours[name], lw=1.2, ls="--", label=f"{labels[name]} (latent not coded)")
        elif mine:
            rates = [mean.values["bpp"] for mean in mine]
            bold = name in clric
            presets = drawn.count(colours[name])
            drawn.append(colours[name])
            style = _CLRIC_LINES[presets % len(_CLRIC_LINES)] if bold else "o-"
            (line,) = axes.plot(rates, values, style, color=colours[name], label=labels[name], zorder=3 if bold else 2)
            line.set(linewidth=2.4 if bold else 1.4, markersize=6 if bold else 4)
    axes.set(xscale="log", xlim=_RATES, xlabel="bits per pixel of the file (log scale)", ylabel=LABELS[measure])
    ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    texts = axes.get_legend_handles_labels()[1]
    if any(MARK in text for text in texts):
        axes.set_title(f"{MARK} trained on this measure", loc="left", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, frameon=False)
    for kind in ("png", "svg"):
        file = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "clric"}):  # the same rows give the same file
            figure.savefig(file, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
        (folder / "plots").mkdir(exist_ok=True)
        write_output(folder / "plots" / f"{measure}.{kind}", file.getvalue())
    return file.getvalue()


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each codec; all curves of a VAE and its ceiling have the same."""
    warm, cool = iter(_CLRIC_COLOURS * 9), iter(_OTHER_COLOURS * 9)
    shows = {row["codec"]: vae for row in rows if (vae := vae_of(row))}
    colours: dict[str, str] = {}
    vaes: dict[str, str] = {}
    for name in codecs(rows):
        if name in shows:
            vae = shows[name]
            if vae not in vaes:
                vaes[vae] = next(warm)
            colours[name] = vaes[vae]
        else:
            colours[name] = next(cool)
    return colours


# --- Crops ----------------------------------------------------------------------------------------------------------

_COLUMNS, _GAP, _TEXT = 4, 8, 52


def sheet(cells: Sequence[tuple[Path, str, str]], place: Path) -> bytes:
    """Writes a PNG of crops, all of one size, `_COLUMNS` in a row, each over two lines of text. Returns its bytes.

    cells: path, first line, second line of each.
    """
    with Image.open(cells[0][0]) as first:
        width, height = first.size
    width, height = max(width, CROP), height + _TEXT  # a narrow crop's text needs its room all the same
    rows, columns = -(-len(cells) // _COLUMNS), min(len(cells), _COLUMNS)
    image = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * height), "white")
    draw = ImageDraw.Draw(image)
    for number, (path, title, text) in enumerate(cells):
        left, top = number % _COLUMNS * (width + _GAP), number // _COLUMNS * height
        with Image.open(path) as crop:
            image.paste(crop, (left, top))
        draw.text((left, top + height - _TEXT + 3), title, "black", ImageFont.load_default(17))
        draw.text((left, top + height - _TEXT + 23), text, "#444444", ImageFont.load_default(15))
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    write_output(place, file.getvalue())
    return file.getvalue()

"""results.csv: one row for each image, codec and setting, appended as it is measured.

A row's id is the hash of what decides on it, so that a second run knows what is there already.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from clric_decoder.errors import ClricError
from clric_decoder.files import write_output

# Units: bpp bits of the file over image pixels; psnr dB; *_mac multiply-accumulates per image pixel; *_s seconds;
# *_mb 10^6 bytes. tune: the image decoder that clric trained through, or none; empty for other codecs. A cell is empty
# where there is nothing to measure; notes say why where that may surprise.
COLUMNS = (
    "id", "image", "image_sha256", "width", "height", "codec", "setting", "version", "tune", "measured",
    "bytes", "bpp", "psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "lpips_squeeze", "dists", "ssimulacra2",
    "latent_mse",
    "header_bytes", "network_bytes", "grid_bytes", "function_mac", "decoder_mac",
    "encode_s", "decode_s", "encode_mb", "decode_mb", "notes",
)  # fmt: skip

# What files of clric 0.1's stream version 0 have not.
_ADDED = {"tune", "dists", "ssimulacra2"}

Row = dict[str, str]


def row_id(image_sha256: str, codec: str, setting: str, version: str, measured: str) -> str:
    """16 hexadecimal digits. ``measured`` names the measures that depend on weights that may be there or not."""
    key = "\0".join((image_sha256, codec, setting, version, measured))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def read_rows(folder: Path) -> list[Row]:
    """The rows in a folder's results.csv, in their order; none where there is no such file.

    A line that was cut (the power failed, say) is dropped. In a file of an older clric-bench, what it did not measure
    is empty, and clric was not tuned. Raises ClricError for a file of other columns.
    """
    _, rows = _read(folder / "results.csv")
    return rows


def _read(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """The header of a file and its rows, with all of `COLUMNS`."""
    try:
        data = path.read_bytes()
        text = data[: data.rfind(b"\n") + 1].decode(errors="surrogateescape")  # names of files may be no UTF-8
    except FileNotFoundError:
        return (), []
    except OSError as error:
        raise ClricError(f"{path}: cannot be read ({error.strerror})") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    header = tuple(next(reader, ()))
    if header != tuple(column for column in COLUMNS if column in header or column not in _ADDED):
        raise ClricError(f"{path} is from another version; choose another folder with -o")
    rows = [dict(zip(header, cells, strict=True)) for cells in reader if len(cells) == len(header)]
    if "tune" not in header:
        rows = [row | {"tune": "none" if row["function_mac"] else ""} for row in rows]
    return header, [{column: row.get(column, "") for column in COLUMNS} for row in rows]


class ResultsFile:
    """results.csv, open to be appended to; each row is on its way to the disk before the next one is measured."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.csv"
        _give_all_columns(self._path)
        try:
            self._file = open(self._path, "ab+")  # noqa: SIM115  # open for as long as rows come
            self._file.seek(0)
            whole = self._file.read().rfind(b"\n") + 1
            self._file.truncate(whole)  # what a run that was killed had half written
            if not whole:
                self._write(COLUMNS)
        except OSError as error:
            raise ClricError(f"{self._path}: cannot be written ({error.strerror})") from error

    def append(self, row: Mapping[str, str]) -> None:
        """Raises ClricError where that fails."""
        try:
            self._write(row[column] for column in COLUMNS)
        except OSError as error:
            raise ClricError(f"{self._path}: cannot be written ({error.strerror})") from error

    def _write(self, cells: Iterable[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._file.write(line.getvalue().encode(errors="surrogateescape"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _give_all_columns(path: Path) -> None:
    """Writes a file of an older clric-bench again, with the columns that it has not."""
    if not path.is_file() or b"\n" not in path.read_bytes():
        return
    header, rows = _read(path)
    if header != COLUMNS:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *([row[c] for c in COLUMNS] for row in rows)])
        write_output(path, text.getvalue().encode(errors="surrogateescape"))


def number(row: Row, column: str) -> float | None:
    """A cell as a number; None for an empty one."""
    return float(row[column]) if row[column] else None

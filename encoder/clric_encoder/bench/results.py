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

# Units: bpp bits of the file over image pixels; psnr dB; *_mac multiply-accumulates per image pixel; *_s seconds;
# *_mb 10^6 bytes. A cell is empty where there is nothing to measure; notes say why where that may surprise.
COLUMNS = (
    "id", "image", "image_sha256", "width", "height", "codec", "setting", "version", "measured",
    "bytes", "bpp", "psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg", "lpips_squeeze", "latent_mse",
    "header_bytes", "network_bytes", "grid_bytes", "function_mac", "decoder_mac",
    "encode_s", "decode_s", "encode_mb", "decode_mb", "notes",
)  # fmt: skip

Row = dict[str, str]


def row_id(image_sha256: str, codec: str, setting: str, version: str, measured: str) -> str:
    """16 hexadecimal digits. ``measured`` names the measures that depend on weights that may be there or not."""
    key = "\0".join((image_sha256, codec, setting, version, measured))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def read_rows(folder: Path) -> list[Row]:
    """The rows in a folder's results.csv, in their order; none where there is no such file.

    A line that was cut (the power failed, say) is dropped. Raises ClricError for a file of other columns.
    """
    path = folder / "results.csv"
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ClricError(f"{path}: cannot be read ({error})") from error
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    if tuple(next(reader, ())) != COLUMNS:
        raise ClricError(f"{path}: its columns are not those of this clric-bench; name another folder with -o")
    return [dict(zip(COLUMNS, row, strict=True)) for row in reader if len(row) == len(COLUMNS)]


class ResultsFile:
    """results.csv, open to be appended to; each row is on its way to the disk before the next one is measured."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.csv"
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
        self._file.write(line.getvalue().encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def number(row: Row, column: str) -> float | None:
    """A cell as a number; None for an empty one."""
    return float(row[column]) if row[column] else None

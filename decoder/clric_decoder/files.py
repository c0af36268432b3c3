"""Bytes from and to files, pipes and devices, for everything that a command reads or writes.

``-`` is standard input or output. An output file appears whole or not at all.
"""

import errno
import io
import os
import secrets
import sys
from pathlib import Path

from .errors import ClricError

STANDARD = "-"


def read_input(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file, or of standard input for ``-``.

    Raises ClricError, starting with the path, for what cannot be read or is longer than ``limit`` bytes.
    """
    try:
        if os.fspath(path) == STANDARD:
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(path, "rb") as file:
                data = file.read(limit + 1)
    except OSError as error:
        raise ClricError(f"{os.fspath(path)}: {error.strerror}") from error
    if len(data) > limit:
        raise ClricError(f"{os.fspath(path)}: longer than the limit of {limit} bytes")
    return data


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises the ClricError of `write_output` for a missing or locked folder, before work is done in vain."""
    folder = Path(os.path.realpath(path)).parent
    if os.fspath(path) == STANDARD or os.access(folder / ".", os.W_OK | os.X_OK):
        return
    code = errno.ENOENT if not folder.exists() else errno.EACCES if folder.is_dir() else errno.ENOTDIR
    raise _not_written(path, os.strerror(code))


def write_output(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file, or to standard output for ``-``.

    A regular file is written beside its place and then renamed, so that neither a full disk nor Ctrl-C leaves
    half of one, and an older file stays until the new one is complete. Devices and pipes are written to.
    Raises ClricError, starting with the path, where that fails.
    """
    try:
        if os.fspath(path) == STANDARD:
            # Unbuffered: what a full disk refuses must not be tried again when Python exits.
            with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stream:
                _write_all(stream, data)
        else:
            _replace(Path(os.path.realpath(path)), data)  # a link stays a link: its target is replaced
    except OSError as error:
        raise _not_written(path, error.strerror) from error


def _not_written(path: str | os.PathLike[str], reason: str | None) -> ClricError:
    return ClricError(f"{os.fspath(path)}: cannot be written ({reason})")


def _replace(place: Path, data: bytes) -> None:
    if place.exists() and not place.is_file():
        with open(place, "wb", buffering=0) as stream:
            _write_all(stream, data)
        return
    # Not tempfile, whose files only their owner can read: this one gets permissions as any new file.
    partial = place.with_name(f".{secrets.token_hex(8)}.clric-partial")
    try:
        with open(partial, "xb", buffering=0) as stream:
            _write_all(stream, data)
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_all(stream: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]

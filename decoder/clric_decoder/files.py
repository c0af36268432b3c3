"""Bytes from and to files, pipes and devices, for everything that a command reads or writes.

``-`` is standard input or output. An output file appears whole or not at all.
"""

import errno
import io
import os
import secrets
import sys
from pathlib import Path
from typing import BinaryIO

from .errors import ClricError

STANDARD = "-"

# Longer than any stream of so many pixels can sensibly be; refused before it fills the memory.
MIN_STREAM_LIMIT = 1 << 20


def stream_limit(max_pixels: int) -> int:
    """The most bytes that a stream of up to ``max_pixels`` pixels is read for."""
    return max(max_pixels, MIN_STREAM_LIMIT)


_PIECE = 1 << 20


def read_input(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file, or of standard input for ``-``. Raises ClricError as `read_file` does."""
    if os.fspath(path) != STANDARD:
        return read_file(path, limit)
    if sys.stdin is None:
        raise ClricError("-: standard input is closed")
    return _read_all(sys.stdin.buffer, STANDARD, limit)


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a file.

    Raises ClricError, starting with the path, for what cannot be read or is longer than ``limit`` bytes.
    """
    try:
        with open(path, "rb") as file:
            return _read_all(file, os.fspath(path), limit)
    except OSError as error:
        raise ClricError(f"{os.fspath(path)}: {error.strerror}") from error


def _read_all(file: BinaryIO, name: str, limit: int) -> bytes:
    try:
        data = _read(file, limit + 1)
    except OSError as error:
        raise ClricError(f"{name}: {error.strerror}") from error
    if len(data) > limit:
        raise ClricError(f"{name}: file too large (limit {limit} bytes)")
    return data


def _read(file: BinaryIO, count: int) -> bytes:
    """At most so many bytes. Piece by piece: read(count) reserves the memory for all of them before it reads."""
    pieces = []
    while count and (piece := file.read(min(count, _PIECE))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises the ClricError of `write_output` for what cannot be written to, before work is done in vain."""
    if os.fspath(path) == STANDARD:
        _check_standard_output()
        return
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path):
        code = errno.EISDIR
    elif is_special(path):
        code = 0 if os.access(path, os.W_OK) else errno.EACCES
    elif os.path.isdir(folder):
        code = 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    else:
        code = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
    if code == errno.ENOENT:
        raise ClricError(f"{os.fspath(path)}: the output folder does not exist")
    if code:
        raise _not_written(path, os.strerror(code))


def write_output(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file, or to standard output for ``-``.

    A regular file is written beside its place and then renamed, so that neither a full disk nor Ctrl-C leaves
    half of one, and an older file stays until the new one is complete. Devices and pipes are written to.
    Raises ClricError, starting with the path, where that fails; BrokenPipeError where nobody reads standard
    output any more, which is no error to speak of.
    """
    try:
        if os.fspath(path) == STANDARD:
            _check_standard_output()
            # Unbuffered: what a full disk refuses must not be tried again when Python exits.
            with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stream:
                _write_all(stream, data)
        elif is_special(path):
            with open(path, "wb", buffering=0) as stream:
                _write_all(stream, data)
        else:
            _replace(Path(os.path.realpath(path)), data)  # a link stays a link: its target is replaced
    except OSError as error:
        if isinstance(error, BrokenPipeError) and os.fspath(path) == STANDARD:
            raise
        raise _not_written(path, error.strerror) from error


def _not_written(path: str | os.PathLike[str], reason: str | None) -> ClricError:
    return ClricError(f"{os.fspath(path)}: cannot be written ({reason})")


def _check_standard_output() -> None:
    if sys.stdout is None:
        raise ClricError("standard output is closed")


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether this is a device, a pipe or a folder: by its own path, for /dev/stdout resolves to none."""
    return os.path.exists(path) and not os.path.isfile(path)


def _replace(place: Path, data: bytes) -> None:
    # Not tempfile, whose files only their owner can read: a new file gets the permissions of any new file, and one that
    # replaces another keeps the other's, from its first byte on.
    older = os.stat(place).st_mode & 0o777 if place.exists() else None
    partial = place.with_name(f".{secrets.token_hex(8)}.clric-partial")

    def create(path: str, flags: int) -> int:
        return os.open(path, flags, 0o666 if older is None else older)

    try:
        with open(partial, "xb", buffering=0, opener=create) as stream:
            if older is not None:
                os.chmod(partial, older)  # what the umask has taken
            _write_all(stream, data)
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_all(stream: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]

"""Which streams of a folder are up to date: made of the image as it is, with the settings as they are.

A stream says nothing of its image or of most settings, and is not to grow for it. Folders of streams therefore get a
small file, `FILE`: for each stream's name a digest of the stream, and one of what it was made of. By the first, a file
that something else has put in a stream's place is recognised, and is not overwritten.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from clric_decoder.errors import ClricError
from clric_decoder.files import STANDARD, read_input, write_output

FILE = ".clric-settings.json"

# A million streams'; a file that is longer is none of ours.
_LIMIT = 1 << 27

State = Literal["new", "up to date", "out of date", "unknown"]


class Records:
    """What is known of the streams of folders, for one run of a command with some settings."""

    def __init__(self, settings: Mapping[str, Any], create: bool) -> None:
        """settings: all that decides on a stream beside its image, as JSON knows it. create: whether folders get a
        `FILE` that have none."""
        self._settings = settings
        self._create = create
        self._folders: dict[Path, dict[str, Any]] = {}
        self._made_of: dict[str, str] = {}
        self._new: dict[Path, dict[str, Any]] = {}
        self._due = 0.0
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def state(self, source: str, place: str) -> State:
        """Of the stream of an image file, at `place`: new where there is none, unknown where something else made it."""
        if source == STANDARD:
            return "unknown" if place != STANDARD and os.path.exists(place) else "new"
        try:
            image = os.stat(source)
        except OSError:
            return "new"  # whoever reads the image says what is wrong
        self._made_of[place] = made_of(self._settings, f"{image.st_size} {image.st_mtime_ns}")
        try:
            stream = read_input(place, _LIMIT)
        except ClricError:
            return "unknown" if os.path.exists(place) else "new"
        record = self._folder(place).get(Path(place).name)
        if not isinstance(record, dict) or record.get("stream") != _digest(stream):
            return "unknown"
        return "up to date" if record.get("made_of") == self._made_of[place] else "out of date"

    def add(self, place: str, stream: bytes) -> None:
        """Keeps what a stream that was just written was made of, as `state` found it.

        Now or soon: a long file is not written again for every stream. Raises ClricError.
        """
        if place not in self._made_of or not (self._folder(place) or self._create):
            return
        record = {"stream": _digest(stream), "made_of": self._made_of[place]}
        with self._lock:
            self._new.setdefault(Path(place).parent, {})[Path(place).name] = record
            if time.monotonic() >= self._due:
                self.write()
            elif self._timer is None:
                self._timer = threading.Timer(self._due - time.monotonic(), self.last_write)
                self._timer.daemon = True
                self._timer.start()

    def write(self) -> None:
        """Writes what is kept but not written yet, beside what others have written meanwhile. Raises ClricError."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            begin = time.monotonic()
            for folder, records in list(self._new.items()):
                with _locked(folder):
                    self._folders[folder] = _read(folder) | records
                    write_output(folder / FILE, f"{json.dumps(self._folders[folder], indent=1)}\n".encode())
                del self._new[folder]
            self._due = time.monotonic() + 20 * (time.monotonic() - begin)

    def last_write(self) -> str | None:
        """`write`, which gives what is wrong instead of raising it; the next one tries again."""
        try:
            self.write()
        except ClricError as error:
            return str(error)
        return None

    def _folder(self, place: str) -> dict[str, Any]:
        folder = Path(place).parent
        if folder not in self._folders:
            self._folders[folder] = _read(folder)
        return self._folders[folder]


def _read(folder: Path) -> dict[str, Any]:
    try:
        records = json.loads(read_input(folder / FILE, _LIMIT))
    except (ClricError, ValueError, RecursionError):  # missing or damaged: nothing is known
        return {}
    return records if isinstance(records, dict) else {}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Against other commands that write to this folder, where the system has locks of folders."""
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):  # a folder that nobody may read, a file system without locks
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def made_of(settings: Mapping[str, Any], version: str) -> str:
    """A digest of what a stream is made of: settings as JSON knows them, and its image's version, which tells whether
    that has changed."""
    return _digest(f"{json.dumps(settings, sort_keys=True)} {version}".encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

"""What `farm` reads and writes: lists of image files, streams, and the manifest, on any file system of fsspec.

A path is a local one, or an address such as s3://bucket/folder.
"""

from __future__ import annotations

import contextlib
import glob
import json
import posixpath
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from clric_decoder.errors import ClricError, one_line
from clric_decoder.files import write_output
from clric_decoder.terminal import IMAGE_SUFFIXES, find_clashes

MANIFEST = "manifest.jsonl"

# Seconds after which lines of the manifest are written to storage. What is not in it is encoded again by the next run.
WRITE_EVERY = 20

# File systems whose objects appear whole or not at all. On the others a file is renamed when it is complete.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}

# What tells in a listing whether a file has changed. The first that a file system has counts.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "modified")


def list_files(sources: Sequence[str], output: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Source, output and version of each image file; and what is wrong with those whose output would be another's too.

    Raises ClricError.
    """
    files = []
    output = _address(*open_system(output))
    outputs: dict[str, list[str]] = {}
    for name in sources:
        system, path = open_system(name)
        try:
            found = system.find(path, detail=True) if system.isdir(path) else None
        except Exception as error:  # file systems' errors have no common base class
            raise ClricError(f"{name}: {one_line(error)}") from error
        if found is not None:
            images = {
                place: info for place, info in found.items() if PurePosixPath(place).suffix.lower() in IMAGE_SUFFIXES
            }
            if not images:
                raise ClricError(f"{name}: no image files found")
            folder = path
        else:
            try:
                images = {path: system.info(path)}
            except Exception:  # said of this image, when it is read
                images = {path: {}}
            folder = posixpath.dirname(path)
        for place, info in images.items():
            source = _address(system, place)
            relative = PurePosixPath(posixpath.relpath(place, folder)).with_suffix(".clric")
            own = posixpath.join(output, str(relative))
            writers = outputs.setdefault(own, [])
            if source in writers:  # it was named twice
                continue
            writers.append(source)
            version = f"{info.get('size')} {next((info[key] for key in VERSION_KEYS if info.get(key)), None)}"
            files.append({"source": source, "output": own, "version": version})
    clashes = find_clashes(outputs.items())
    return [file for file in files if file["source"] not in clashes], clashes


def make_folders(files: Sequence[dict[str, Any]]) -> None:
    """The folders of outputs, where folders must be there before their files."""
    for folder in {posixpath.dirname(file["output"]) for file in files}:
        system, path = open_system(folder)
        if not _is_object_store(system):
            system.makedirs(path, exist_ok=True)


class Manifest:
    """manifest.jsonl of a folder. While a run goes on, its lines are in files beside it: objects cannot be appended to.

    Raises ClricError where the folder cannot be written to.
    """

    def __init__(self, output: str) -> None:
        self._system, self._folder = open_system(output)
        self._output = output
        self._lines: dict[str, str] = {}
        self._own: dict[str, str] = {}  # of this run
        self._new: list[str] = []
        self._written = time.monotonic()
        self.close()

    def outdated(self, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that were not encoded as they are now, or whose stream is gone."""
        there = set(self._system.find(self._folder)) if self._lines else set()
        todo = []
        for file in files:
            line = json.loads(self._lines.get(file["source"], "{}"))
            same = line.get("made_of") == file["made_of"] and line["output"] == file["output"]
            if not same or line["error"] is not None or open_system(file["output"])[1] not in there:
                todo.append(file)
        return todo

    def add(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        self._own[line["source"]] = text
        self._new.append(text)
        if time.monotonic() - self._written > WRITE_EVERY:
            self._write(f"manifest-{time.time_ns()}.part.jsonl", self._new)
            self._new, self._written = [], time.monotonic()

    def close(self) -> None:
        """Writes the manifest as one file, with the lines of other runs that go on meanwhile."""
        parts: list[str] = []
        try:
            if not _is_object_store(self._system):
                self._system.makedirs(self._folder, exist_ok=True)
            parts = self._parts()
            for path in [self._path(MANIFEST), *parts]:
                with contextlib.suppress(FileNotFoundError):
                    for line in self._system.cat_file(path).decode().splitlines():
                        self._lines[json.loads(line)["source"]] = line
        except Exception as error:  # as in `list_files`, or of a file that is no manifest
            raise self._error("read", error) from error
        self._lines |= self._own
        self._write(MANIFEST, self._lines.values())
        for part in parts:
            with contextlib.suppress(FileNotFoundError):  # another run has it too
                self._system.rm(part)

    def _write(self, name: str, lines: Iterable[str]) -> None:
        try:
            write(_address(self._system, self._path(name)), "".join(f"{line}\n" for line in lines).encode())
        except Exception as error:
            raise self._error("written", error) from error

    def _error(self, done: str, error: Exception) -> ClricError:
        return ClricError(f"{self._output}: {MANIFEST} cannot be {done} ({one_line(error)})")

    def _parts(self) -> list[str]:
        return sorted(self._system.glob(posixpath.join(glob.escape(self._folder), "manifest-*.part.jsonl")))

    def _path(self, name: str) -> str:
        return posixpath.join(self._folder, name)


def open_system(path: str) -> tuple[Any, str]:
    """The file system of a path, and the path in it. Raises ClricError."""
    try:
        system, own = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # of a protocol that is not known, or whose library is not there
        raise ClricError(f"{path}: {one_line(error)}") from error
    return system, str(own)


def _address(system: Any, path: str) -> str:
    """The path of a file in this file system, as `open_system` takes it, on any node."""
    return path if _is_local(system) else str(system.unstrip_protocol(path))


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _is_local(system: Any) -> bool:
    return "file" in _protocols(system)


def _is_object_store(system: Any) -> bool:
    return bool(_protocols(system) & OBJECT_STORES)


def write(path: str, data: bytes) -> None:
    """Writes a file that appears whole or not at all. Raises OSError, and what a file system may raise beside it."""
    system, own = open_system(path)
    if _is_local(system):
        try:
            write_output(Path(own), data)
        except ClricError as error:
            raise OSError(str(error)) from error  # it may go well another time, unlike what is wrong with an image
    elif _is_object_store(system):
        system.pipe_file(own, data)
    else:
        partial = posixpath.join(posixpath.dirname(own), f".{secrets.token_hex(8)}.clric-partial")
        system.pipe_file(partial, data)
        system.mv(partial, own)

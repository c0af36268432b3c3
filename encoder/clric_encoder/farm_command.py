"""``clric-enc --ray``: what `farm.encode_files` does, as a command shows it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clric_decoder.errors import ClricError
from clric_decoder.terminal import print_error

from .farm import Progress, encode_files
from .farm_storage import MANIFEST


def encode_for_command(
    name: str, sources: Sequence[str], output: str, *, json_lines: bool, quiet: bool, **arguments: Any
) -> int:
    """`encode_files` for a command of this name: a bar on a terminal, or a line each minute; gives the exit code."""
    standard_output = sys.stdout
    progress = Progress(0, 0, 0, 0.0)
    with _without_words_of_ray(), _bar(name, quiet) as show:

        def watch(latest: Progress, line: dict[str, Any]) -> None:
            nonlocal progress
            progress = latest
            if json_lines:
                print(json.dumps(line), file=standard_output, flush=True)
            show(latest)

        try:
            report = encode_files(sources, output, watch=watch, **arguments)
        except ClricError as error:
            print_error(name, str(error))
            return 1
        except BrokenPipeError:  # nobody reads standard output any more, as after `| head`
            return 1
        except KeyboardInterrupt:
            report = None
    if report is None:
        print_error(name, f"stopped after {progress.encoded} images; re-run the same command to resume")
        return 130
    for source, reason in list(report.failed.items())[:20]:
        print_error(name, reason, source)
    if not quiet or report.failed:
        counts = f"{report.encoded} encoded, {report.skipped} skipped (up to date), {len(report.failed)} failed"
        print_error(name, f"{counts}; see {output.rstrip('/')}/{MANIFEST}")
    return 1 if report.failed else 0


@contextlib.contextmanager
def _without_words_of_ray() -> Iterator[None]:
    """Around what Ray does: it prints of lost workers, which the manifest tells, to standard output; and its library
    writes to the file descriptor of standard error. Its log files have all of it."""
    if sys.stderr is None:
        yield
        return
    with (
        open(os.dup(2), "w", buffering=1) as standard_error,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(standard_error),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(standard_error.fileno(), 2)


@contextlib.contextmanager
def _bar(name: str, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows how far a run has come, on standard error."""
    if quiet or sys.stderr is None:
        yield lambda progress: None
        return
    try:
        import rich.progress
        from rich.console import Console

        live = sys.stderr.isatty()
    except ImportError:  # the bar alone needs rich
        live = False
    if not live:
        last = time.monotonic()

        def show_line(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= 60:
                last = time.monotonic()
                print_error(name, _in_words(progress))

        yield show_line
        return
    columns = (rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"))
    with rich.progress.Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            done = progress.encoded + progress.failed
            bar.update(task, description=_in_words(progress), completed=done, total=progress.total)

        yield show


def _in_words(progress: Progress) -> str:
    left = progress.seconds_left
    time_left = f"{left / 3600:.1f} h" if left >= 5400 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return (
        f"{progress.encoded + progress.failed} of {progress.total} images, {progress.failed} failed, "
        f"{progress.per_minute:.3g} a minute, {time_left} left"
    )

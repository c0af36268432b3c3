"""Processes that do tasks, and survive what kills one of them; and a fresh process where memory is measured.

All are started by "spawn": they share nothing with the process that starts them, and hold what they import.
"""

import contextlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from clric_decoder.errors import ClricError, one_line

_SPAWN = multiprocessing.get_context("spawn")


class TaskError(Exception):
    """A task failed; the message is one line."""


def do_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], processes: int, started: Callable[[Any], None]
) -> Generator[tuple[Any, Any], None, None]:
    """(task, function(task)) of each task as they are done, or (task, TaskError).

    ``function`` is one of a module. ``started`` is called with each task as work on it begins. A process that dies
    (killed for its memory, say) costs its task, and another takes its place. Closing the generator ends the processes
    at once.
    """
    waiting = deque(tasks)
    busy: dict[Connection, tuple[Any, Any]] = {}  # connection -> (process, task)
    idle: list[tuple[Any, Connection]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                process, connection = idle.pop() if idle else _start(function)
                task = waiting.popleft()
                busy[connection] = process, task
                with contextlib.suppress(OSError):  # it has died while it had nothing to do: `recv` will say so
                    connection.send(task)
                started(task)
            ready = wait(list(busy))
            for connection in [connection for connection in busy if connection in ready]:
                process, task = busy.pop(connection)
                try:
                    result = connection.recv()
                    idle.append((process, connection))
                except (EOFError, OSError):
                    process.join()
                    result = TaskError(f"its process exited with code {process.exitcode}, possibly out of memory")
                yield task, result
    finally:
        for process in (*(process for process, _ in idle), *(process for process, _ in busy.values())):
            process.terminate()


def _start(function: Callable[[Any], Any]) -> tuple[Any, Connection]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, function))
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: tasks in, results out, until the other side is gone."""
    _leave_interrupts_to_the_parent()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(function, task))


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C goes to all processes of a terminal, and one message about it is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _attempt(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except MemoryError:
        return TaskError("not enough memory")
    except (ClricError, TaskError) as error:
        return TaskError(str(error))
    except Exception as error:  # codecs are other people's libraries, each with errors of its own
        return TaskError(f"{type(error).__name__}: {one_line(error)[:300]}")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """function(*arguments), and the seconds of wall clock that it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def timed_alone(open_half: Callable[[], Callable[..., Any]], *arguments: Any) -> tuple[Any, float, float | None]:
    """open_half()(*arguments) in a fresh process: the result, its seconds without the opening, and the MB (10^6 bytes)
    that the process held at its peak, Python and all libraries included; None where the system does not say (only
    Linux does). Raises TaskError.
    """
    ours, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_alone, args=(theirs, open_half, arguments), daemon=True)
    process.start()
    theirs.close()
    # An orderly end, should this process be told to stop: it takes the other one along.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        outcome = ours.recv()
    except EOFError as error:
        process.join()
        raise TaskError(f"its process exited with code {process.exitcode}, possibly out of memory") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    process.join()
    if isinstance(outcome, TaskError):
        raise outcome
    result, seconds, peak = outcome
    return result, seconds, peak


def _alone(connection: Connection, open_half: Callable[[], Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    _leave_interrupts_to_the_parent()

    def work(_: None) -> tuple[Any, float, float | None]:
        result, seconds = timed(open_half(), *arguments)
        return result, seconds, _peak_memory()

    connection.send(_attempt(work, None))


def _peak_memory() -> float | None:
    """The most MB that this process has held. Not getrusage, whose maximum a child takes over from its parent."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peaks = [int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:")]
    return peaks[0] if peaks else None

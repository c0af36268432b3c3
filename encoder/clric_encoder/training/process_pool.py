"""Parts of a batch, each trained by a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Threads of one process would stand in each other's way: there is but one of them at a time in Python and in the many
# short operations of torch.


def possible() -> bool:
    """Whether this process can have copies. Elsewhere than on Linux libraries do not survive it."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def run(train: Callable[[int, Callable[[], None]], list[Any]], count: int) -> list[Any]:
    """The results of train(part, check) for all parts, joined.

    This process takes the first part, and copies of it the others; `check`, which training calls from time to time,
    raises what another part has failed with. Whatever happens, the copies have ended when this returns; they end
    themselves where this process was killed.
    """
    if count == 1:
        return train(0, _nothing)
    context = multiprocessing.get_context("fork")
    results: list[list[Any] | None] = [None] * count
    copies: list[tuple[Any, Connection]] = []

    def receive(part: int) -> None:
        try:
            message = copies[part - 1][1].recv()
        except EOFError:  # it was killed, as the system does when memory is short
            message = MemoryError("a process that trained a part of the batch was killed")
        if isinstance(message, BaseException):
            raise message
        results[part] = message

    def check() -> None:
        for part in range(1, count):
            if results[part] is None and copies[part - 1][1].poll():
                receive(part)

    try:
        for part in range(1, count):
            receiver, sender = context.Pipe(duplex=False)
            copy = context.Process(target=_train, args=(train, part, sender, os.getpid()), daemon=True)
            copy.start()
            sender.close()
            copies.append((copy, receiver))
        results[0] = train(0, check)
        for part in range(1, count):
            if results[part] is None:
                receive(part)
    finally:
        for copy, receiver in copies:
            copy.kill()
            copy.join()
            receiver.close()
    return [result for part in results for result in part or []]


def _train(train: Callable[[int, Callable[[], None]], list[Any]], part: int, sender: Connection, first: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one

    def check() -> None:
        if os.getppid() != first:
            os._exit(1)  # nobody waits for the result

    try:
        message: Any = train(part, check)
    except BaseException as error:
        message = _picklable(error)
    check()
    sender.send(message)
    os._exit(0)  # nothing of what the first process would clean up is this one's


def _picklable(error: BaseException) -> BaseException:
    """The error, or a RuntimeError with its text where another process could not read it: libraries' own often fail."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the error's own code raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _nothing() -> None:
    pass

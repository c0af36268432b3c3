"""torch's number of threads, changed for the calling thread alone."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork; elsewhere a child must not find it locked
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def settle() -> None:
    """Fixes torch's number of threads for the calling thread, which torch does at the first use in a thread.

    Not while `torch_threads` changes another's: for a moment the number that threads start with is that one's.
    """
    with _lock:
        torch.get_num_threads()


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Lets torch compute on so many threads while it lasts, for what the calling thread does."""
    before = torch.get_num_threads()
    _set(count)
    try:
        yield
    finally:
        _set(before)


def _set(count: int) -> None:
    """torch keeps the number for each thread, and another that threads start with; setting one sets both.

    A thread of its own puts the other back: threads that begin to use torch would keep it for good. That takes
    a fraction of a millisecond, in which threads can only be kept from that by `settle`.
    """
    if count == torch.get_num_threads():
        return
    with _lock, ThreadPoolExecutor(1) as new_thread:
        first = new_thread.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        new_thread.submit(torch.set_num_threads, first).result()

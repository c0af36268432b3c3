"""When numba compiles the loops of the training, which it does once on a machine and takes 16 s and more.

Nothing is loaded here but numba, which the training loads in any case, and that not where it is missing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_compilation(tell: Callable[[], None]) -> Iterator[None]:
    """Calls tell() whenever this process compiles a loop while it lasts; those that are cached are not compiled."""
    try:
        from numba.core import event
    except ImportError:  # the training is then torch's alone
        yield
        return
    process = os.getpid()

    class Listener(event.Listener):
        def on_start(self, event: object) -> None:
            if os.getpid() == process:  # a copy of it, which trains a part of a batch, has no terminal
                tell()

        def on_end(self, event: object) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield

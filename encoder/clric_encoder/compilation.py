"""When numba compiles the loops of the training, which it does once on a machine and takes 16 s and more.

    python -m clric_encoder.compilation

does it at once, as when a container is built. numba keeps the result beside the loops' module or, where that cannot be
written or NUMBA_CACHE_DIR says so, elsewhere; it serves processors of the same kind. Nothing is loaded here but numba,
which the training loads in any case, and that not where it is missing.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def compilation(tell: Callable[[], None]) -> Iterator[None]:
    """Around training: calls tell() whenever this process compiles a loop, and keeps Ctrl-C from crashing it.

    Loops that numba finds in its cache are not compiled.
    """
    try:
        from numba.core import event
    except ImportError:  # the training is then torch's alone
        yield
        return
    process = os.getpid()

    class Teller(event.Listener):
        def on_start(self, event: object) -> None:
            if os.getpid() == process:  # a copy of it, which trains a part of a batch, has no terminal
                tell()

        def on_end(self, event: object) -> None:
            pass

    class Interrupts(event.Listener):
        """Lets Ctrl-C wait while numba is in LLVM, which calls Python back and does not survive an exception there."""

        def __init__(self) -> None:
            self._depth, self._pending = 0, False
            self._before = signal.getsignal(signal.SIGINT)

        def on_start(self, event: object) -> None:
            self._depth += threading.current_thread() is threading.main_thread()

        def on_end(self, event: object) -> None:
            self._depth -= threading.current_thread() is threading.main_thread()
            if self._pending and self._depth == 0:
                self._pending = False
                raise KeyboardInterrupt

        def handle(self, number: int, frame: FrameType | None) -> None:
            if self._depth:
                self._pending = True
            elif callable(self._before):
                self._before(number, frame)

        @contextlib.contextmanager
        def installed(self) -> Iterator[None]:
            # Signals reach the main thread alone; where something else than Python answers them, that goes on.
            if threading.current_thread() is not threading.main_thread() or not callable(self._before):
                yield
                return
            signal.signal(signal.SIGINT, self.handle)
            try:
                with event.install_listener("numba:compiler_lock", self):
                    yield
            finally:
                signal.signal(signal.SIGINT, self._before)

    with Interrupts().installed(), event.install_listener("numba:compile", Teller()):
        yield


def main() -> int:
    """Encodes a small image, for which everything is compiled that any preset uses; gives the exit status."""
    import numpy as np
    from clric_decoder.errors import ClricError
    from clric_decoder.terminal import print_error

    from .libraries import libraries

    try:
        with libraries():
            from .encoding import encode
        encode(np.full((64, 64, 3), 128, np.uint8), preset="fast")
    except (ClricError, OSError) as error:  # OSError: of numba's cache
        print_error("clric_encoder.compilation", str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

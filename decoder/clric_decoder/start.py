"""Where the commands begin. It imports no more than it must, so that Ctrl-C is heard from here on."""

import os
import signal
from importlib import import_module
from types import ModuleType


def start(cli: str) -> None:
    """Imports a command's module and calls its ``main``."""
    load(cli).main()


def load(cli: str) -> ModuleType:
    """Imports a command's module. Ctrl-C meanwhile ends the process with 130 at once.

    Imports take a quarter of a second, in which Python would answer with a traceback; the command has its own answer.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a shell's background job ignores Ctrl-C, and goes on to
        return import_module(cli)
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        return import_module(cli)
    finally:
        signal.signal(signal.SIGINT, before)

"""What the commands of all packages have in common: one-line errors, exit codes, and where outputs go.

Exit codes: 0 for success, 1 where an input failed (the others are still done), 2 for a wrong command line,
130 for Ctrl-C.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from .cpus import thread_count
from .errors import ClricError
from .files import STANDARD

# C0 and C1, line and paragraph separators, what changes the direction of writing, and bytes of C1 as Python has them in
# names that are no UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\udc80-\udc9f]")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if 0x2000 <= code < 0x3000 else f"\\x{code & 0xFF:02x}"


def run_command(command: click.Command, name: str) -> int:
    """Runs the process's command line and gives its exit code, which ``command`` returns.

    An error of usage is one line, as all others are. In a container with fewer CPUs than its host, libraries that are
    loaded from here on take as many threads as it has CPUs.
    """
    if count := thread_count():
        os.environ["OMP_NUM_THREADS"] = str(count)  # read by torch, and by onnxruntime's sessions here
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        print_error(name, f"{error.format_message()} (see {name} --help)")
        return 2
    except click.Abort:  # Ctrl-C
        return 130
    return code if isinstance(code, int) else 0


def for_each(name: str, rows: Iterable[tuple[str, ...]], work: Callable[..., None]) -> int:
    """Calls ``work(*row)`` for each row, whose first item is the input's name; gives the command's exit code.

    An error is one line about that input, and the next input follows.
    """
    failed = False
    for row in rows:
        try:
            work(*row)
        except ClricError as error:
            print_error(name, str(error), row[0])
            failed = True
        except MemoryError:
            print_error(name, "not enough memory", row[0])
            failed = True
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # nobody reads standard output any more, as after `| head`
            return 1
    return 1 if failed else 0


def printable(text: str) -> str:
    """The text with its control characters as escapes such as \\x1b: names of files may hold what terminals obey."""
    return _CONTROL.sub(_escaped, text)


def print_error(name: str, message: str, file: str | None = None) -> None:
    """``name: file: message`` on standard error, the file once where the message starts with it."""
    if sys.stderr is None:  # closed; print would take standard output instead
        return
    where = ""
    if file is not None:
        shown = printable(file)
        message = message.replace(file, shown)
        where = "" if message.startswith(f"{shown}: ") else f"{shown}: "
    print(f"{name}: {where}{printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def choose_outputs(inputs: Sequence[str], output: str | None, suffix: str) -> list[str]:
    """The output of each input: beside it with another suffix, or ``output``, or in the folder ``output``.

    ``output`` is a folder where there is one, where it ends with a slash, or for several inputs; it is made
    if it is missing. Standard input goes to standard output unless ``output`` says otherwise.
    Raises click.UsageError where two inputs would go to one place, where an output would replace an input, or
    where an input or the output has no name.
    """
    for source in inputs:
        if Path(source).name in ("", ".."):
            raise click.UsageError(f"{source!r} names no file")
    if output == "":
        raise click.UsageError("the name of the output is empty")
    folder = None
    if output is None:
        outputs = [STANDARD if source == STANDARD else str(Path(source).with_suffix(suffix)) for source in inputs]
    elif output != STANDARD and (len(inputs) > 1 or output.endswith("/") or os.path.isdir(output)):
        stems = ["stdin" if source == STANDARD else Path(source).stem for source in inputs]
        outputs = [str(Path(output, stem + suffix)) for stem in stems]
        folder = output
    else:
        outputs = [output] * len(inputs)
    if STANDARD in outputs and sys.stdout is not None and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal: name a file with -o")
    taken = {os.path.realpath(source): "is an input" for source in inputs if source != STANDARD}
    for source, place in zip(inputs, outputs, strict=True):
        key = place if place == STANDARD else os.path.realpath(place)
        if key in taken:
            raise click.UsageError(f"the output of {source}, {place}, {taken[key]}: name another with -o")
        taken[key] = f"is the output of {source} already"
    if folder is not None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise click.UsageError(f"{folder}: cannot be made a folder ({error.strerror})") from error
    return outputs

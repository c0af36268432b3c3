"""What the commands of all packages have in common: one-line errors, exit codes, and where outputs go.

Exit codes: 0 for success, 1 where an input failed (the others are still done), 2 for a wrong command line,
130 for Ctrl-C.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import click

from .cpus import thread_count
from .errors import ClricError, one_line
from .files import STANDARD, is_special

# Suffixes of the files that commands take for images, in a folder and as the name of an output.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
)  # fmt: skip

# C0 and C1, line and paragraph separators, what changes the direction of writing, and bytes of C1 as Python has them in
# names that are no UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\udc80-\udc9f]")


_NEEDS_FOLDER = "several inputs need an output folder: -o DIR"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if 0x2000 <= code < 0x3000 else f"\\x{code & 0xFF:02x}"


def run_command(command: click.Command, name: str) -> int:
    """Runs the process's command line and gives its exit code, which ``command`` returns.

    An error is one line; one of usage points to the help, which a group of commands prints where none is named. In a
    container with fewer CPUs than its host, libraries that are loaded from here on take as many threads as it has CPUs.
    """
    if count := thread_count():
        os.environ["OMP_NUM_THREADS"] = str(count)  # read by torch, and by onnxruntime's sessions here
    # torch's threads busy-wait for each other for milliseconds; where other processes want the CPUs too, that is where
    # most of their time goes (an encode took 28 s instead of 19 beside two others). Read by GNU's OpenMP.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    try:
        code = command.main(prog_name=name, standalone_mode=False, help_option_names=["-h", "--help"])
    except getattr(
        click.exceptions, "NoArgsIsHelpError", ()
    ) as error:  # click 8.1 has none, and prints the help itself
        error.show()
        return 2
    except click.UsageError as error:
        print_error(name, f"{error.format_message()} (see {name} --help)")
        return 2
    except ClricError as error:
        print_error(name, str(error))
        return 1
    except click.Abort:  # Ctrl-C
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print_error(name, one_line(error))  # of the help: what is encoded and decoded is written with errors of its own
        return 1
    return code if isinstance(code, int) else 0


def end_process(code: int) -> NoReturn:
    """Ends the process with this exit code, without taking libraries down, which takes torch up to half a second."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:  # nobody reads it any more, or the disk is full
        code = code or 1
    os._exit(code)


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
    if file:
        shown = printable(file)
        message = message.replace(file, shown)
        where = "" if message.startswith(f"{shown}: ") else f"{shown}: "
    print(f"{name}: {where}{printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def list_folder(folder: str | os.PathLike[str], suffixes: Collection[str]) -> list[str]:
    """Paths of the files in a folder whose suffix is one of these, sorted by name. Raises ClricError."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ClricError(f"{os.fspath(folder)}: {error.strerror}") from error
    places = [os.path.join(folder, name) for name in names if Path(name).suffix.lower() in suffixes]
    return [place for place in places if os.path.isfile(place)]


def list_inputs(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The inputs that were named; of a folder, the files in it whose suffix is one of these, sorted by name.

    Raises ClricError for a folder without such files.
    """
    inputs = []
    for name in names:
        if name == STANDARD or not os.path.isdir(name):
            inputs.append(name)
            continue
        files = list_folder(name, suffixes)
        if not files:
            kind = suffixes[0] if len(suffixes) == 1 else "image"
            raise ClricError(f"{name}: no {kind} files found")
        inputs += files
    return inputs


def split_output(
    names: Sequence[str], output: str | None, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[Sequence[str], str | None]:
    """Inputs and output, for ``IN OUT`` those of ``IN -o OUT``.

    OUT has the suffix of an output, ends with a slash, or is a folder without inputs in it; one that has some is a
    second input after a folder. inputs, outputs: the suffixes of both. Raises click.UsageError where the last name can
    be neither, and where a folder after a file could be both.
    """
    if output is not None or len(names) < 2:
        return names, output
    last = names[-1]
    is_folder = os.path.isdir(last)
    is_file = Path(last).suffix.lower() in outputs and not is_folder
    if len(names) > 2:
        if is_file:
            raise click.UsageError(_NEEDS_FOLDER)
        return names, None
    if is_folder and list_folder(last, inputs):
        if not os.path.isdir(names[0]):
            raise click.UsageError(f"{last} contains inputs too; name it with -o {last} to write there")
        return names, None
    if is_file or is_folder or last.endswith("/") or is_special(last):
        return names[:1], last
    if last != STANDARD and not os.path.exists(last):
        ending = outputs[0] if len(outputs) == 1 else "an image suffix such as .png"
        raise click.UsageError(f"{last}: no such file; an output must end in {ending} (or name it with -o)")
    return names, None


class Outputs(NamedTuple):
    """Where each input's output goes.

    named: the user gave the name of the file, which may therefore be replaced. clashes: inputs whose output would be
    that of another input too, with what is wrong.
    """

    places: list[str]
    named: bool
    clashes: dict[str, str]


def choose_outputs(
    inputs: Sequence[str],
    output: str | None,
    suffix: str,
    *,
    to_folder: bool = False,
    any_suffix: bool = False,
) -> Outputs:
    """The output of each input: beside it with another suffix, or ``output``, or in the folder ``output``.

    ``output`` is a folder where there is one, where it ends with a slash, for several inputs, or with ``to_folder``;
    it is made if it is missing. Standard input goes to standard output unless ``output`` says otherwise.
    any_suffix: whether ``output`` may be a file of another suffix.
    Raises click.UsageError where it must not, where a folder would get the name of a file, where two inputs would go to
    standard output, where an output would replace an input, or where an input or the output has no name; ClricError
    where the folder cannot be made.
    """
    for source in inputs:
        if Path(source).name in ("", ".."):
            raise click.UsageError(f"{source!r} is not a file name")
    if output == "":
        raise click.UsageError("the name of the output is empty")
    folder, named = None, False
    if output is None:
        places = [STANDARD if source == STANDARD else str(Path(source).with_suffix(suffix)) for source in inputs]
    elif output != STANDARD and (len(inputs) > 1 or to_folder or output.endswith("/") or os.path.isdir(output)):
        stems = ["stdin" if source == STANDARD else Path(source).stem for source in inputs]
        places = [str(Path(output, stem + suffix)) for stem in stems]
        folder = output
        is_file_name = Path(output).suffix.lower() in (*IMAGE_SUFFIXES, ".clric", ".npy")
        if is_file_name and not (output.endswith("/") or os.path.isdir(output)):
            raise click.UsageError(f"{_NEEDS_FOLDER}, or {output}/ for a folder of this name")
    else:
        if not (any_suffix or output == STANDARD or is_special(output) or Path(output).suffix.lower() == suffix):
            raise click.UsageError(
                f"{output}: the output does not end in {suffix} (use --force to write it anyway, or {output}/ for a"
                " folder)"
            )
        places, named = [output] * len(inputs), True
    if STANDARD in places and sys.stdout is not None and sys.stdout.isatty():
        raise click.UsageError("standard output is a terminal; name a file with -o")
    sources = {os.path.realpath(source) for source in inputs if source != STANDARD}
    writers = dict[str, tuple[str, list[str]]]()  # by the real path of a place: how it is called, and who writes there
    for source, place in zip(inputs, places, strict=True):
        key = place if place == STANDARD else os.path.realpath(place)
        if key in sources and output is None:
            raise click.UsageError(f"{source}: not {'an image' if suffix == '.clric' else 'a .clric'} file")
        if key in sources:
            raise click.UsageError(f"output {place} is also an input; name another with -o")
        if key == STANDARD and key in writers:
            raise click.UsageError(f"{writers[key][1][0]} and {source} would both be written to standard output")
        writers.setdefault(key, (place, []))[1].append(source)
    clashes = {
        source: f"{message}; name its output with -o" for source, message in find_clashes(writers.values()).items()
    }
    if folder is not None and len(clashes) < len(inputs):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ClricError(f"{folder}: the folder cannot be created ({error.strerror})") from error
    return Outputs(places, named, clashes)


def find_clashes(writers: Iterable[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """What is wrong with each input whose output would be another's too. writers: outputs, each with its inputs."""
    return {
        source: f"{' and '.join(other for other in sources if other != source)} would be written to {place} too"
        for place, sources in writers
        if len(sources) > 1
        for source in sources
    }


def print_existing(name: str, existing: Sequence[tuple[str, str]]) -> None:
    """One line about inputs that are left out: their outputs exist, and may be the only copy of something else.

    existing: inputs with their outputs, which the user did not name.
    """
    if len(existing) == 1:
        source, place = existing[0]
        print_error(name, f"{place} exists; overwrite it with --force, or name the output with -o", source)
    elif existing:
        print_error(name, f"{len(existing)} outputs exist; overwrite them with --force, or choose a folder with -o")

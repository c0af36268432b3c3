"""``python -m clric enc|dec``: the commands clric-enc and clric-dec, where they are not on the path."""

import sys

from clric_decoder.start import load, start

from . import ClricError, __version__, encoder_package

USAGE = """\
usage: python -m clric enc IMAGE...     images to streams; the command clric-enc
       python -m clric dec IN...        streams to images; the command clric-dec
       python -m clric enc --help       says more, and so does dec --help
       python -m clric --version"""


def main() -> None:
    """Runs the command that the first argument names, with the arguments that follow it."""
    name, *arguments = sys.argv[1:] or ["--help"]
    sys.argv[1:] = arguments
    if name == "dec":
        start("clric_decoder.cli")
    elif name == "enc":
        try:
            with encoder_package():
                encoder = load("clric_encoder.cli")
        except ClricError as error:
            print(f"clric: {error}", file=sys.stderr)
            sys.exit(1)
        encoder.main()
    elif name == "--version":
        print(f"clric {__version__}")
    elif name in ("-h", "--help"):
        print(USAGE)
    else:
        print(f"clric: unknown command {name!r} (use enc or dec)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The command clric-export."""

from clric_decoder.start import start


def main() -> None:
    """Entry point of clric-export."""
    start("clric_export.cli")


if __name__ == "__main__":
    main()

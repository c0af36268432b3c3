"""The command clric-dec."""

from clric_decoder.start import start


def main() -> None:
    """Entry point of clric-dec."""
    start("clric_decoder.cli")


if __name__ == "__main__":
    main()

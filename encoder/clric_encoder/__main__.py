"""The command clric-enc."""

from clric_decoder.start import start


def main() -> None:
    """Entry point of clric-enc."""
    start("clric_encoder.cli")


if __name__ == "__main__":
    main()

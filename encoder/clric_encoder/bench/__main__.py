"""The command clric-bench."""

from clric_decoder.start import start


def main() -> None:
    """Entry point of clric-bench."""
    start("clric_encoder.bench.cli")


if __name__ == "__main__":
    main()

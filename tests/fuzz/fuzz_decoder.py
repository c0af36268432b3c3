"""Coverage-guided fuzzing of the header's reader and of the whole way from bytes to latent (atheris, libFuzzer).

    pip install atheris && python tests/fuzz/fuzz_decoder.py -max_total_time=1800

It starts from the vectors of the conformance suite; options are those of libFuzzer. A finding is any exception but
StreamError, two range decoders that disagree, more than 10 s, or more than 1 GB: it is printed, and the bytes that led
to it are written to the current folder.
"""

import sys
import zlib
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["clric_decoder"]):
    from clric_decoder import StreamError, decode_latent, entropy, read_header

import numpy as np

SUITE = Path(__file__).resolve().parents[1] / "conformance"
MAX_PIXELS = 1 << 12  # larger images reach hardly any other code, and take long
MAX_BYTES = 4096
HEAD_BYTES = 48  # most headers, and the first of their metadata
CONSTRICTION = entropy.constriction


def outcome(data: bytes, coder: object) -> str | np.ndarray:
    """The latent, or the kind of the error."""
    entropy.constriction = coder
    try:
        return decode_latent(data, max_pixels=MAX_PIXELS)
    except StreamError as error:
        return error.kind


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of all mutations are of the first bytes: the header's fields are few among the payload's bytes."""
    head = HEAD_BYTES if seed % 2 else len(data)
    return atheris.Mutate(data[:head], max_size - len(data[head:])) + data[head:]


def test_one_input(data: bytes) -> None:
    # With a right checksum, or nothing behind it would ever be reached
    body = data[:-4]
    checksum = zlib.crc32(body)
    data = body + checksum.to_bytes(4, "big")
    try:
        header = read_header(data, max_pixels=MAX_PIXELS)
    except StreamError as error:
        header = None
        kind = error.kind
    # Both range decoders for one input in four: they take most of the time
    coders = (CONSTRICTION, None) if checksum % 4 == 0 else (CONSTRICTION,)
    latents = [outcome(data, coder) for coder in coders]
    if header is None:
        assert latents == [kind] * len(coders), (kind, latents)
        return
    assert read_header(body[: header.header_bytes - 4 + header.metadata_bytes], MAX_PIXELS, len(data)) == header
    assert header.total_bytes == len(data)
    for latent in latents:
        if isinstance(latent, str):
            assert latents == ["payload"] * len(coders), latents
        else:
            assert latent.shape == (header.channels, header.latent_height, header.latent_width)
            assert np.array_equal(latent, latents[0])


def main() -> None:
    seeds = [path for path in sorted(SUITE.glob("*/*.clric")) if path.stat().st_size <= MAX_BYTES]
    limits = [f"-max_len={MAX_BYTES}", "-timeout=10", "-rss_limit_mb=1024", f"-seed_inputs={','.join(map(str, seeds))}"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

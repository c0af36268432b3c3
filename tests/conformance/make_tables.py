"""Makes the constants of appendix A of bitstream_spec.md, in decimal arithmetic of 60 digits.

Run it to print them; tests/conformance/test_tables.py compares them with the specification and the decoder.
"""

import hashlib
from decimal import Decimal, getcontext

getcontext().prec = 60


def decay() -> list[int]:
    """D[s] = round(2^31 exp(-1 / (16 b))) with b = 2^((s - 32) / 8), for s = 0 ... 79."""
    octave = Decimal(2).ln()
    scales = [(octave * (s - 32) / 8).exp() for s in range(80)]
    return [int((2**31 * (-1 / (16 * b)).exp()).to_integral_value()) for b in scales]


def tables(constants: list[int]) -> list[list[int]]:
    """T(s, f) of section 4, ordered by s, then f."""
    result = []
    for constant in constants:
        power = [1 << 31]
        for _ in range(520):
            power.append((power[-1] * constant + (1 << 30)) >> 31)
        for fraction in range(16):
            cumulative = [0]
            for j in range(1, 64):
                z = 16 * (j - 32) + 8 - fraction
                below = (1 << 32) - power[z] if z >= 0 else power[-z]
                cumulative.append(j + ((below * 65472) >> 32))
            result.append([*cumulative, 65536])
    return result


def sha256(values: list[int]) -> str:
    """SHA-256 of integers as four bytes each, big-endian."""
    return hashlib.sha256(b"".join(value.to_bytes(4, "big") for value in values)).hexdigest()


if __name__ == "__main__":
    constants = decay()
    for row in range(0, 80, 8):
        print(" ".join(map(str, constants[row : row + 8])))
    print("SHA-256 of D:", sha256(constants))
    print("SHA-256 of all tables:", sha256([value for table in tables(constants) for value in table]))

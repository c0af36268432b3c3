"""How large a file is to become, as a user says it. Without torch: commands answer mistakes at once."""

from __future__ import annotations

from dataclasses import dataclass

from clric_decoder.errors import ClricError

DEFAULT_QUALITY = 75.0
MIN_LAMBDA, MAX_LAMBDA = 1e-6, 1e6
ONE_RATE = "lmbda, quality, size and bpp are mutually exclusive; give one of them"


def quality_to_lambda(quality: float) -> float:
    """Lambda of a quality from 0 to 100: 0.5 at 50, a tenth of it 40 points higher."""
    if not 0 <= quality <= 100:
        raise ClricError(f"quality must be 0 to 100, not {quality:g}")
    return 0.5 * 10 ** ((50 - quality) / 40)


@dataclass(frozen=True)
class Rate:
    """What decides how large a file becomes: lambda, the weight of the rate, or a size. One of the three is given.

    lmbda: of the loss latent MSE + lmbda * bpp. size: bytes. bpp: bits per pixel of the image.
    """

    lmbda: float | None = None
    size: int | None = None
    bpp: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.lmbda, self.size, self.bpp)) != 1:
            raise ClricError(ONE_RATE)
        if self.lmbda is not None and not MIN_LAMBDA <= self.lmbda <= MAX_LAMBDA:
            raise ClricError(f"lambda must be between 1e-6 and 1e6, not {self.lmbda:g}")
        if self.size is not None and self.size < 1:
            raise ClricError(f"the target size must be at least 1 byte, not {self.size}")
        if self.bpp is not None and not 0 < self.bpp <= 100:
            raise ClricError(f"bpp must be above 0 and at most 100, not {self.bpp:g}")

    def bytes(self, pixels: int) -> int | None:
        """The largest file that was asked for, if a size was."""
        return self.size if self.bpp is None else max(1, int(self.bpp * pixels / 8))


def choose_rate(lmbda: float | None, quality: float | None, size: int | None, bpp: float | None) -> Rate:
    """The rate that at most one of these names; raises ClricError for more than one, and for what is out of range."""
    if quality is None and (lmbda, size, bpp) == (None, None, None):
        quality = DEFAULT_QUALITY
    if quality is not None and (lmbda, size, bpp) == (None, None, None):
        return Rate(quality_to_lambda(quality))
    if quality is not None:
        raise ClricError(ONE_RATE)
    return Rate(lmbda, None if size is None else int(size), bpp)

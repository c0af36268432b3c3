"""The errors that clric raises on bad input: one base class, one subclass for each thing that a user can mend.

Every message is one line that names the field or the file, the value, the limit, and what to do next.
"""

import sys
import warnings


class ClricError(Exception):
    """Base class of every error that clric raises on purpose."""


class StreamError(ClricError):
    """A stream that must not be decoded (bitstream_spec.md, "Errors").

    ``kind`` is one of the error classes of the specification, so that programs and the conformance
    suite need not read messages: ``magic``, ``version``, ``truncated``, ``checksum``, ``field``,
    ``unsupported``, ``limit``, ``payload``.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type["StreamError"], tuple[str, str]]:
        # An exception is pickled by its class and ``args``, which are the message alone.
        return type(self), (self.kind, str(self))


class ModelError(ClricError):
    """An autoencoder that is missing, damaged, or of another latent space than the stream's."""


class ImageError(ClricError):
    """An image file that cannot be read or written."""


def warn(message: str) -> None:
    """A UserWarning at the line of the caller's that called clric, through however many functions of it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


# Pillow calls clric.pillow
_PACKAGES = ("clric", "clric_decoder", "clric_encoder", "PIL")


def brief(error: BaseException) -> str:
    """The first sentence of another library's long message; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]


def one_line(error: BaseException) -> str:
    """Another library's message on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

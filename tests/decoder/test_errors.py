"""Errors as programs meet them: they pass from one process to another."""

import multiprocessing

import pytest
from clric_decoder import StreamError, decode_latent


def test_a_bad_stream_in_a_pool_is_that_error_in_its_caller() -> None:
    """An error that cannot be read back ends a pool's thread, and the caller waits for ever: the timeout says so."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply_async(decode_latent, (b"no stream",))
        with pytest.raises(StreamError) as caught:
            result.get(timeout=60)
    with pytest.raises(StreamError) as expected:
        decode_latent(b"no stream")
    assert (caught.value.kind, str(caught.value)) == (expected.value.kind, str(expected.value))

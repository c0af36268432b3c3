"""Tables and range coder: the specification's numbers, two decoders with one result, no waste."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from clric_decoder import entropy
from clric_decoder.errors import StreamError
from conformance import make_tables
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]

DECODERS = [entropy.PythonRangeDecoder]
if entropy.constriction is not None:
    DECODERS.append(entropy.ConstrictionRangeDecoder)


def test_tables_are_those_of_decimal_arithmetic() -> None:
    constants = make_tables.decay()
    assert list(entropy.DECAY) == constants
    assert entropy.cumulative_tables().tolist() == make_tables.tables(constants)


def test_specification_states_the_tables() -> None:
    text = (ROOT / "bitstream_spec.md").read_text()
    printed = text.split("## Appendix A")[1]
    for constant in make_tables.decay():
        assert f"{constant}" in printed
    tables = entropy.cumulative_tables().astype(">u4").tobytes()
    assert hashlib.sha256(tables).hexdigest() in printed


@pytest.fixture
def batches() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(values, means, tables) over all scales, with escapes."""
    rng = np.random.default_rng(0)
    made = []
    for size in (1, 3, 0, 500, 2000):
        scale, fraction = rng.integers(0, 80, size), rng.integers(0, 16, size)
        means = rng.integers(-60, 60, size)
        values = np.rint(means + fraction / 16 + rng.laplace(size=size) * 2.0 ** ((scale - 32) / 8))
        made.append((values.astype(np.int64), means, scale * 16 + fraction))
    return made


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_gives_back_what_was_coded(decoder, batches) -> None:
    coder = entropy.RangeEncoder()
    for values, means, tables in batches:
        entropy.encode_integers(coder, values, means, tables)
    coder.bits(0b1011, 4)
    decoding = decoder(coder.finish())
    for values, means, tables in batches:
        assert np.array_equal(entropy.decode_integers(decoding, means, tables), values)
    assert decoding.bits(4) == 0b1011


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(-33000, 33000), st.integers(-1023, 1022), st.integers(0, 1279)), max_size=40))
def test_any_integer_survives_any_table(coded) -> None:
    values, means, tables = np.array(coded, np.int64).reshape(-1, 3).T
    coder = entropy.RangeEncoder()
    entropy.encode_integers(coder, values, means, tables)
    data = coder.finish()
    for decoder in DECODERS:
        assert entropy.decode_integers(decoder(data), means, tables).tolist() == values.tolist()


def test_coding_costs_the_ideal_length_and_at_most_four_bytes(batches) -> None:
    for values, means, tables in batches:
        coder = entropy.RangeEncoder()
        entropy.encode_integers(coder, values, means, tables)
        ideal = entropy.ideal_bits(values, means, tables).sum() / 8
        assert ideal <= len(coder.finish()) + 1 <= 1.005 * ideal + 5


@pytest.mark.skipif(entropy.constriction is None, reason="constriction has no wheel for this machine")
def test_words_are_those_of_constrictions_own_encoder() -> None:
    rng = np.random.default_rng(1)
    tables = rng.integers(0, 1280, 3000)
    symbols = rng.integers(1, 63, 3000)
    ours, theirs = entropy.RangeEncoder(), entropy.constriction.stream.queue.RangeEncoder()
    models, _ = entropy._constriction_models()
    ours.symbols(tables.tolist(), symbols.tolist())
    for table, symbol in zip(tables.tolist(), symbols.tolist(), strict=True):
        theirs.encode(symbol, models[table])
    words = np.frombuffer(ours.finish().ljust(80000, b"\0"), ">u4")
    # The last two words differ: theirs ends on words, ours on the shortest bytes
    assert np.array_equal(words[: theirs.num_words() - 2], theirs.get_compressed()[:-2])


@pytest.mark.parametrize("decoder", DECODERS)
def test_impossible_data_is_refused(decoder) -> None:
    with pytest.raises(StreamError) as error:
        decoder(b"\xff" * 16).symbols([0])
    assert error.value.kind == "payload"

"""Bytes and decoded values against gguf-py, and what the registry refuses."""

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ramp_jax.formats import LEVELS, format_for, get_format, round_trip

BLOCKS = ["Q4_0", "Q5_0", "Q8_0"]
FLOATS = ["F32", "F16", "BF16"]
ROWS, N_IN = 64, 256


def gaussian(rng):
    return rng.normal(size=(ROWS, N_IN))


def heavy_tailed(rng):
    return rng.standard_t(2, size=(ROWS, N_IN))


def zeros(rng):
    return np.zeros((2, N_IN))


def constant(rng):
    return np.repeat([[0.7], [-0.7], [1e-3]], N_IN, axis=1)


def one_outlier(rng):
    w = rng.normal(0, 0.01, size=(ROWS, N_IN))
    w[:, 17] = rng.choice([-30.0, 30.0], ROWS)
    return w


def denormal_f16_scale(rng):
    return rng.normal(size=(ROWS, N_IN)) * 1e-6


def alternating_signs(rng):
    return np.where(np.arange(N_IN) % 2, 1.0, -1.0) * rng.uniform(0.5, 1, size=(ROWS, 1))


def multiples_of_a_half(rng):
    return rng.integers(-16, 17, size=(ROWS, N_IN)) / 2


def zero_blocks_between(rng):
    w = rng.normal(size=(ROWS, N_IN))
    w[:, 32:64] = 0
    return w


CASES = [
    gaussian,
    heavy_tailed,
    zeros,
    constant,
    one_outlier,
    denormal_f16_scale,
    alternating_signs,
    multiples_of_a_half,
    zero_blocks_between,
]


def assert_bytes_equal(actual, expected, block_bytes):
    """Equal bytes, or an error that shows the first block that differs and how many do."""
    different = (actual != expected).reshape(-1, block_bytes).any(axis=1)
    if different.any():
        i = int(np.argmax(different))
        block = slice(i * block_bytes, (i + 1) * block_bytes)
        first, second = actual.reshape(-1)[block], expected.reshape(-1)[block]
        raise AssertionError(f"{different.sum()} of {different.size} blocks differ, first is {i}: {first} != {second}")


def random_bytes(rng, fmt):
    """Codes of every kind; f16 scales are kept finite."""
    raw = rng.integers(0, 256, (ROWS, fmt.row_bytes(N_IN)), dtype=np.uint8)
    blocks = raw.reshape(-1, fmt.block_bytes)
    blocks[:, 1] &= 0b1011_1111
    return raw


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_bytes_equal_gguf(rng, name, case):
    fmt = get_format(name)
    w = case(rng).astype(np.float32)
    actual = fmt.to_bytes(jax.jit(fmt.encode)(w))
    expected = gguf.quants.quantize(w, fmt.ggml_type).view(np.uint8)
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape == (w.shape[0], fmt.row_bytes(N_IN))
    assert_bytes_equal(actual, expected, fmt.block_bytes)


@settings(max_examples=60)
@given(
    arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)),
    st.sampled_from(BLOCKS),
)
def test_bytes_equal_gguf_on_any_weights(w, name):
    fmt = get_format(name)
    actual = fmt.to_bytes(jax.jit(fmt.encode)(w))
    assert_bytes_equal(actual, gguf.quants.quantize(w, fmt.ggml_type), fmt.block_bytes)


@pytest.mark.parametrize("name", BLOCKS)
def test_denormal_weights_become_zeros(rng, name):
    """The inverse of their scale overflows: C leaves the codes undefined, but the scale is 0 in f16."""
    w = rng.normal(size=(ROWS, N_IN)).astype(np.float32) * np.float32(1e-40)
    np.testing.assert_array_equal(round_trip(w, name), np.zeros_like(w))


@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_equals_gguf_on_random_bytes(rng, name):
    fmt = get_format(name)
    raw = random_bytes(rng, fmt)
    expected = gguf.quants.dequantize(raw, fmt.ggml_type)
    actual = jax.jit(fmt.decode)(fmt.from_bytes(raw))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", FLOATS)
def test_decoding_floats_equals_gguf(rng, name):
    fmt = get_format(name)
    raw = gguf.quants.quantize(gaussian(rng).astype(np.float32), fmt.ggml_type)
    actual = fmt.decode(fmt.from_bytes(raw.view(np.uint8)))
    np.testing.assert_array_equal(actual, gguf.quants.dequantize(raw, fmt.ggml_type))


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_survive_unpacking_and_packing(rng, name):
    fmt = get_format(name)
    raw = random_bytes(rng, fmt)
    np.testing.assert_array_equal(fmt.to_bytes(fmt.from_bytes(raw)), raw)


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_codes_survive_packing_and_unpacking(rng, name):
    fmt = get_format(name)
    codes = fmt.encode(gaussian(rng).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, fmt.from_bytes(fmt.to_bytes(codes)), codes)


@pytest.mark.parametrize("name", BLOCKS + FLOATS)
def test_round_trip_equals_gguf(rng, name):
    fmt = get_format(name)
    w = gaussian(rng).astype(np.float32)
    expected = gguf.quants.dequantize(gguf.quants.quantize(w, fmt.ggml_type), fmt.ggml_type)
    np.testing.assert_array_equal(round_trip(w, name), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_leading_axes_and_vmap_change_nothing(rng, name):
    fmt = get_format(name)
    w = rng.normal(size=(3, 5, 64)).astype(np.float32)
    flat = fmt.to_bytes(fmt.encode(w.reshape(15, 64)))
    np.testing.assert_array_equal(fmt.to_bytes(fmt.encode(w)).reshape(15, -1), flat)
    np.testing.assert_array_equal(fmt.to_bytes(jax.vmap(fmt.encode)(w)).reshape(15, -1), flat)


@pytest.mark.parametrize(
    ("name", "codes"),
    [("Q4_0", [-8, 4, 1, 0]), ("Q5_0", [-16, 8, 2, 0]), ("Q8_0", [-127, 64, 16, 0])],
)
def test_codes_by_hand(name, codes):
    # -2 takes the most negative code (-127 of Q8_0), so d is 1/4, 1/8 and 2/127; 1 is then 63.5 of Q8_0, 1/4 is 15.9.
    w = np.zeros((1, 32), np.float32)
    w[0, :3] = -2, 1, 0.25
    q = np.asarray(get_format(name).encode(w).q)[0, 0]
    np.testing.assert_array_equal(q[:4], codes)


def test_q8_0_rounds_halves_away_from_zero():
    w = np.zeros((1, 32), np.float32)
    w[0, :7] = 127, 0.5, 1.5, 2.5, -0.5, -2.5, 62.5
    np.testing.assert_array_equal(np.asarray(get_format("Q8_0").encode(w).q)[0, 0, :7], [127, 1, 2, 3, -1, -3, 63])


@pytest.mark.parametrize(
    ("name", "ggml_type", "block_size", "block_bytes", "bits", "level"),
    [
        ("F32", 0, 1, 4, 32.0, None),
        ("F16", 1, 1, 2, 16.0, None),
        ("BF16", 30, 1, 2, 16.0, None),
        ("Q4_0", 2, 32, 18, 4.5, 4),
        ("Q5_0", 6, 32, 22, 5.5, 5),
        ("Q8_0", 8, 32, 34, 8.5, 8),
    ],
)
def test_records(name, ggml_type, block_size, block_bytes, bits, level):
    fmt = get_format(name)
    actual = (fmt.name, int(fmt.ggml_type), fmt.block_size, fmt.block_bytes, fmt.bits_per_weight, fmt.level)
    assert actual == (name, ggml_type, block_size, block_bytes, bits, level)
    assert fmt.row_bytes(96) == 96 // block_size * block_bytes


def test_levels_that_blocks_of_32_can_hold():
    assert {4, 5, 8} <= set(LEVELS)
    assert format_for(5, 96).name == "Q5_0"


@pytest.mark.parametrize("n_in", [31, 48, 100])
def test_levels_are_masked_where_rows_are_no_whole_blocks(n_in):
    assert [format_for(level, n_in) for level in LEVELS] == [None] * len(LEVELS)


def test_level_nobody_serves_is_masked():
    assert format_for(7, 256) is None


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown format 'Q9_9'; known formats are F32, .*Q8_0"):
        get_format("Q9_9")


@pytest.mark.parametrize("name", BLOCKS)
def test_row_that_is_no_whole_number_of_blocks(name):
    with pytest.raises(ValueError, match=f"{name} holds rows of a multiple of 32 weights, not 48"):
        get_format(name).row_bytes(48)

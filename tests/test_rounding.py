"""What makes accelerators round as ggml does: divisions that are off by an ulp, conversions that are dropped."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.formats import kquants, legacy, rounding, search
from ramp_jax.formats.registry import get_format
from ramp_jax.formats.rounding import rounded_to_f16, sharpened_quotient, sharpened_root, to_f16

BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def unsharp(x):
    """x with up to two units in the last place added, as accelerators divide."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    off = jnp.clip((bits * jnp.int32(-1640531527)) >> 29, -2, 2)
    moved = jax.lax.bitcast_convert_type(bits + off, jnp.float32)
    return jnp.where(jnp.isfinite(x) & (x != 0), moved, x)


def test_quotients_are_sharpened_to_the_nearest(rng):
    a = rng.normal(size=400_000).astype(np.float32) * 10.0 ** rng.integers(-6, 7, 400_000).astype(np.float32)
    b = rng.standard_t(2, 400_000).astype(np.float32)
    assert (np.asarray(unsharp(a / b)) != a / b).mean() > 0.5
    np.testing.assert_array_equal(jax.jit(sharpened_quotient)(unsharp(a / b), a, b), a / b)
    np.testing.assert_array_equal(sharpened_quotient(a / b, a, b), a / b)


def test_quotients_without_a_nearest_one_stay():
    a, b = np.asarray([[1, -1, 0, 0, 5, np.inf, np.nan], [0, 0, 0, -3, np.inf, 2, 1]], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_array_equal(sharpened_quotient(a / b, a, b), a / b)
        np.testing.assert_array_equal(np.signbit(sharpened_quotient(a / b, a, b)), np.signbit(a / b))


def test_roots_are_sharpened_to_the_nearest(rng):
    a = np.abs(rng.normal(size=400_000)).astype(np.float32) * 10.0 ** rng.integers(-6, 7, 400_000).astype(np.float32)
    np.testing.assert_array_equal(sharpened_root(unsharp(jnp.sqrt(a)), a), np.sqrt(a))
    np.testing.assert_array_equal(sharpened_root(jnp.zeros(1), jnp.zeros(1)), [0])


def test_f16_equals_numpy(rng):
    """Every exponent, ties, subnormal and too large values, zeros and what is no number."""
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)) + np.uint32(
        1 << 12
    )
    x = np.concatenate([bits.view(np.float32), ties.view(np.float32), np.float32([0, -0.0, 65504, 65520, np.inf])])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(to_f16(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(rounded_to_f16(jnp.asarray(x)), expected.astype(np.float32))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_encoder_reads_an_f16(name, weighted):
    """XLA may drop f32 → f16 → f32, and codes would be those of a scale that is not stored."""
    importance = jnp.ones(256) if weighted else None
    traced = jax.make_jaxpr(lambda w: get_format(name).encode(w, importance))(jnp.zeros((2, 256))).jaxpr
    assert any(v.aval.dtype == jnp.float16 for v in traced.outvars)
    read = [eqn for eqn in equations(traced) if any(v.aval.dtype == jnp.float16 for v in eqn.invars)]
    assert not [eqn for eqn in read if any(v.aval.dtype == jnp.float32 for v in eqn.outvars)]


def equations(jaxpr):
    """All equations, those of inner functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_where_divisions_and_roots_are_not_exact(rng, name, weighted, monkeypatch):
    """Some candidates of the searches put peaks between two codes: with divisions off by an ulp many blocks differ."""
    w = jnp.asarray(rng.standard_t(4, (64, 1024)) * 0.02, jnp.float32)
    importance = jnp.asarray(rng.chisquare(1, 1024) + 0.05, jnp.float32) if weighted else None
    fmt = get_format(name)
    expected = fmt.to_bytes(fmt.encode(w, importance))
    for module in (kquants, legacy, search, rounding):
        if hasattr(module, "quotient"):
            monkeypatch.setattr(module, "quotient", lambda a, b: sharpened_quotient(unsharp(a / b), jnp.float32(a), b))
        if hasattr(module, "square_root"):
            monkeypatch.setattr(module, "square_root", lambda a: sharpened_root(unsharp(jnp.sqrt(a)), a))
    np.testing.assert_array_equal(fmt.to_bytes(fmt.encode(w, importance)), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_are_rounded_before_they_are_converted(rng, name):
    w = jnp.asarray(rng.standard_t(2, 10_000) * 10.0 ** rng.integers(-9, 4, 10_000), jnp.float32)
    stored = get_format(name).encode(w)
    np.testing.assert_array_equal(stored, w.astype(stored.dtype))
    rounded = [
        eqn for eqn in jax.make_jaxpr(get_format(name).encode)(w).eqns if eqn.primitive.name == "reduce_precision"
    ]
    assert rounded

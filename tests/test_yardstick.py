"""Normal losses, prices and regrets, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramp_jax.policy.yardstick import price_at, reference_loss, regrets, symlog, yardstick

TENSORS, LEVELS = 6, 3
# one trade per tensor: 3 nats for 2 units, 1.5 nats for 3 units
LOSS = jnp.array([[4.0, 1.0], [2.0, 0.5]], jnp.float32)
COST = jnp.array([[2, 4], [3, 6]], jnp.int32)
YARD = yardstick(LOSS, COST)


def random_table(rng, masked=0.2):
    """Losses that fall with the level, over four orders of magnitude; masked cells hold 0 in both tables."""
    loss = np.sort(np.exp(rng.normal(-4, 2, (TENSORS, LEVELS))), axis=1)[:, ::-1]
    cost = np.sort(rng.integers(1, 300, (TENSORS, LEVELS)) * 4 + np.arange(LEVELS), axis=1)
    valid = rng.random(loss.shape) >= masked
    valid[:, -1] = True
    return jnp.asarray(loss * valid, jnp.float32), jnp.asarray(cost * valid, jnp.int32)


def test_uniform_curve_by_hand():
    np.testing.assert_array_equal(YARD.uniform_units, [5, 10])
    np.testing.assert_array_equal(YARD.uniform_loss, [6, 1.5])


def test_masked_levels_take_the_next_one_above_else_below():
    loss = jnp.array([[9.0, 0.0, 1.0], [0.0, 5.0, 0.0], [8.0, 4.0, 2.0]], jnp.float32)
    cost = jnp.array([[10, 0, 40], [0, 20, 0], [5, 6, 7]], jnp.int32)
    yard = yardstick(loss, cost)
    np.testing.assert_array_equal(yard.uniform_units, [10 + 20 + 5, 40 + 20 + 6, 40 + 20 + 7])
    np.testing.assert_array_equal(yard.uniform_loss, [9 + 5 + 8, 1 + 5 + 4, 1 + 5 + 2])


@pytest.mark.parametrize(("budget", "expected"), [(1, 6), (5, 6), (7, 6 * 0.25**0.4), (10, 1.5), (99, 1.5)])
def test_reference_loss_is_log_linear_between_uniform_levels(budget, expected):
    assert reference_loss(YARD, jnp.int32(budget)) == pytest.approx(expected, rel=1e-6)


def test_price_of_a_unit_by_hand():
    """Below 0.5 both tensors are large (10 units), up to 1.5 only the first (7), above none (5)."""
    assert price_at(YARD, jnp.int32(6)) == pytest.approx(1.5, rel=0.02)
    assert price_at(YARD, jnp.int32(8)) == pytest.approx(0.5, rel=0.02)
    assert price_at(YARD, jnp.int32(9)) == pytest.approx(0.5, rel=0.02)
    assert 0.5 <= price_at(YARD, jnp.int32(7)) <= 1.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_prices_fall_as_solutions_grow(seed):
    yard = jax.jit(yardstick)(*random_table(np.random.default_rng(seed)))
    assert (np.diff(yard.units, axis=0) >= 0).all()
    assert (np.diff(yard.price) < 0).all()


def test_symlog_by_hand():
    x = jnp.array([0.0, np.e - 1, 1 - np.e, -(np.e**2 - 1)], jnp.float32)
    np.testing.assert_allclose(symlog(x), [0, 1, -1, -2], rtol=1e-6)


def test_symlog_is_monotone(rng):
    x = np.sort(np.concatenate([rng.normal(0, 1, 100), rng.normal(0, 1e4, 100)])).astype(np.float32)
    assert (np.diff(symlog(jnp.asarray(x))) > 0).all()


def test_price_of_what_is_left_later():
    """From the second tensor on: 3 units buy the small one, 6 the large one, at 0.5 a unit."""
    np.testing.assert_array_equal(np.asarray(YARD.units)[[0, -1]], [[5, 3, 0], [10, 6, 0]])
    assert price_at(YARD, jnp.int32(5), 1) == pytest.approx(0.5, rel=0.1)
    assert price_at(YARD, jnp.int32(2), 1) > 1.5
    assert price_at(YARD, jnp.int32(7), 1) < 0.5


def test_regrets_by_hand():
    """At 1 a unit: 4 + 2 against 1 + 4; 2 + 3 against 0.5 + 6; a masked level has none."""
    np.testing.assert_allclose(regrets(LOSS, COST, jnp.float32(1.0)), [[1, 0], [0, 1.5]])
    masked = regrets(jnp.array([0.0, 3.0, 1.0]), jnp.array([0, 1, 4]), jnp.float32(1.0))
    np.testing.assert_allclose(masked, [0, 0, 1])

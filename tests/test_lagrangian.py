"""Normal losses, bounds and lookahead, by hand and against the exact knapsack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tables import COST, LOSS, TENSORS, random_table

from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.policy.lagrangian import lagrangian_bound, least_loss, lookahead, symlog, uniform_loss, unit_of_loss

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BOUND = lagrangian_bound(LOSS, COST)


def test_uniform_curve_by_hand():
    np.testing.assert_array_equal(BOUND.uniform_units, [5, 10])
    np.testing.assert_array_equal(BOUND.uniform_loss, [6, 1.5])


def test_masked_levels_take_the_next_one_above_else_below():
    loss = jnp.array([[9.0, 0.0, 1.0], [0.0, 5.0, 0.0], [8.0, 4.0, 2.0]], jnp.float32)
    cost = jnp.array([[10, 0, 40], [0, 20, 0], [5, 6, 7]], jnp.int32)
    bound = lagrangian_bound(loss, cost)
    np.testing.assert_array_equal(bound.uniform_units, [10 + 20 + 5, 40 + 20 + 6, 40 + 20 + 7])
    np.testing.assert_array_equal(bound.uniform_loss, [9 + 5 + 8, 1 + 5 + 4, 1 + 5 + 2])


@pytest.mark.parametrize(("budget", "expected"), [(1, 6), (5, 6), (7, 6 * 0.25**0.4), (10, 1.5), (99, 1.5)])
def test_uniform_loss_is_log_linear_between_uniform_levels(budget, expected):
    assert uniform_loss(BOUND, jnp.int32(budget)) == pytest.approx(expected, rel=1e-6)


def test_least_loss_by_hand():
    """Small and small: 5 units lose 6; 2 more for the first save 3; 3 more for the second 1.5; mixtures between."""
    for units, loss in [(5, 6), (6, 4.5), (7, 3), (8, 2.5), (10, 1.5)]:
        assert least_loss(BOUND, jnp.int32(units), 0) == pytest.approx(loss, rel=1e-5)
    for units, loss in [(3, 2), (4, 1.5), (6, 0.5)]:
        assert least_loss(BOUND, jnp.int32(units), 1) == pytest.approx(loss, rel=1e-5)
    assert least_loss(BOUND, jnp.int32(3), 2) == 0


def test_lookahead_by_hand():
    """With 8 units the first tensor's levels leave 6 and 4; then 0.5 or at best 1.5 is lost."""
    np.testing.assert_allclose(lookahead(BOUND, LOSS[0], COST[0], jnp.int32(8), 0), [4.5, 2.5], rtol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
@example(5902)
def test_least_loss_is_a_bound_and_falls(seed):
    """Below the exact knapsack at every size, but for the chord between two prices λ and rλ: solutions whose loss
    differs by g may have others between them that lie (r − 1) g / 4 below it, with 128 prices over at most 10¹⁰."""
    loss, cost = random_table(np.random.default_rng(seed))
    bound = jax.jit(lagrangian_bound)(loss, cost)
    lowest = np.where(np.asarray(cost) > 0, cost, 2**30).min(axis=1).sum()
    sizes = np.linspace(lowest, np.asarray(cost).max(axis=1).sum(), 6).astype(int)
    bounds = [float(least_loss(bound, jnp.int32(size), 0)) for size in sizes]
    assert (np.diff(bounds) <= 1e-5 * bounds[0]).all()
    units, losses = np.asarray(bound.units[:, 0]), np.asarray(bound.loss[:, 0])
    for size, least in zip(sizes, bounds, strict=True):
        best = knapsack(np.asarray(cost), np.asarray(loss, np.float64), int(size))
        right = np.clip(np.searchsorted(units, size), 1, len(units) - 1)
        above = (1e10 ** (1 / 127) - 1) / 4 * (losses[right - 1] - losses[right])
        assert least <= 1.0001 * np.asarray(loss)[np.arange(TENSORS), best].sum() + above + 1e-6


def test_symlog_by_hand():
    x = jnp.array([0.0, np.e - 1, 1 - np.e, -(np.e**2 - 1)], jnp.float32)
    np.testing.assert_allclose(symlog(x), [0, 1, -1, -2], rtol=1e-6)


def test_symlog_is_monotone(rng):
    x = np.sort(np.concatenate([rng.normal(0, 1, 100), rng.normal(0, 1e4, 100)])).astype(np.float32)
    assert (np.diff(symlog(jnp.asarray(x))) > 0).all()


def test_unit_of_loss_is_never_zero():
    """The highest level loses nothing, as where a model was stored in it: a millionth of the smallest file's loss."""
    bound = lagrangian_bound(LOSS.at[:, 1].set(0.0), COST)
    assert least_loss(bound, jnp.int32(10), 0) == 0
    assert unit_of_loss(bound, jnp.int32(10)) == pytest.approx(6e-6, rel=1e-4)
    assert unit_of_loss(BOUND, jnp.int32(10)) == pytest.approx(1.5)

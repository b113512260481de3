"""Rewards by hand, and what shaping may and may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import COST, LOSS, random_table

from ramp_jax.policy import reward
from ramp_jax.policy.lagrangian import lagrangian_bound, least_loss
from ramp_jax.policy.reward import NO_PENALTY, Penalty

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BOUND = lagrangian_bound(LOSS, COST)
PENALTY = Penalty(cliff=1.0, c_over=10.0, c_under=0.1)


def random_actions(rng, cost):
    return jnp.asarray([rng.choice(np.flatnonzero(row)) for row in np.asarray(cost)], jnp.int32)


def taken(table, action):
    return np.asarray(table)[np.arange(len(action)), action]


bound_of = jax.jit(lagrangian_bound)
rewards = jax.jit(reward.step_rewards, static_argnames="potential")


@pytest.mark.parametrize(("used", "expected"), [(12, 1 + 10 * 0.2), (11, 1 + 10 * 0.1), (10, 0), (5, 0.1 * 0.5)])
def test_penalty_by_hand(used, expected):
    assert reward.penalty(jnp.int32(used), jnp.int32(10), PENALTY) == pytest.approx(expected, rel=1e-6)
    assert reward.penalty(jnp.int32(used), jnp.int32(10), NO_PENALTY) == 0


def test_terminal_reward_by_hand():
    assert reward.terminal_reward(jnp.float32(3), jnp.float32(6), jnp.float32(0.25)) == -0.75


def test_step_rewards_by_hand():
    """Budget 8: 2.5 is the bound, 1 + 2 is lost and one unit left; the evaluator found 0.5 more than the table."""
    q_ref = 2.5
    action = jnp.array([1, 0], jnp.int32)
    plain = reward.step_rewards(LOSS, COST, BOUND, action, jnp.int32(8), potential=False)
    np.testing.assert_allclose(plain, [-1 / q_ref, -2 / q_ref], rtol=1e-6)
    measured = reward.step_rewards(LOSS, COST, BOUND, action, jnp.int32(8), true_loss=jnp.float32(3.5), potential=False)
    np.testing.assert_allclose(measured, [-1 / q_ref, -2.5 / q_ref], rtol=1e-6)
    shaped = reward.step_rewards(LOSS, COST, BOUND, action, jnp.int32(8))
    np.testing.assert_allclose(shaped, [-(1 + 1.5 - 2.5) / q_ref, -(2 - 1.5) / q_ref], atol=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 1.5), st.booleans())
def test_plain_rewards_sum_to_the_terminal_reward(seed, room, measured):
    rng = np.random.default_rng(seed)
    loss, cost = random_table(rng)
    bound, action = bound_of(loss, cost), random_actions(rng, cost)
    used = int(taken(cost, action).sum())
    budget = jnp.int32(max(1, int(room * used)))
    q = float(rng.uniform(0.1, 2) * taken(loss, action).sum()) if measured else float(taken(loss, action).sum())
    true = jnp.float32(q) if measured else None
    steps = rewards(loss, cost, bound, action, budget, true_loss=true, potential=False)
    expected = reward.terminal_reward(q, least_loss(bound, budget, 0), jnp.float32(0.0))
    assert steps.sum() == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_potential_telescopes_and_leaves_regrets(seed, share):
    """Rewards with Φ sum to those without minus Φ₀ = −1, and no step gains but for the chords of the price grid."""
    rng = np.random.default_rng(seed)
    loss, cost = random_table(rng)
    bound, action = bound_of(loss, cost), random_actions(rng, cost)
    lowest = np.where(np.asarray(cost) > 0, cost, 2**30).min(axis=1).sum()
    spent = int(taken(cost, action).sum())
    budget = jnp.int32(max(lowest + share * (np.asarray(cost).max(axis=1).sum() - lowest), spent))
    scale = float(loss.sum() / least_loss(bound, budget, 0))  # what f32 subtracts

    shaped = np.asarray(rewards(loss, cost, bound, action, budget), np.float64)
    plain = np.asarray(rewards(loss, cost, bound, action, budget, potential=False), np.float64)
    assert shaped.sum() == pytest.approx(plain.sum() + 1, abs=1e-5 * scale)
    assert (shaped <= 0.02 + 1e-5 * scale).all()


def test_rewards_can_be_batched(rng):
    """As the trainer does: many episodes at many budgets under one table."""
    loss, cost = random_table(rng)
    bound = bound_of(loss, cost)
    actions = jnp.stack([random_actions(rng, cost) for _ in range(5)])
    budgets = jnp.asarray(rng.integers(500, 3000, 5), jnp.int32)
    together = jax.vmap(functools.partial(reward.step_rewards, loss, cost, bound))(actions, budgets)
    for i in range(5):
        np.testing.assert_allclose(
            together[i], rewards(loss, cost, bound, actions[i], budgets[i]), rtol=1e-4, atol=1e-3
        )

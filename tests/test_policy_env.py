"""The decision process: masks, budgets and observations, by hand and on random problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramp_jax.allocation import ALIGNMENT, Costs
from ramp_jax.allocators.allocator import Problem
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.allocators.simple import greedy
from ramp_jax.policy.env import (
    ACTION,
    CONTEXT,
    budget_range,
    cheapest_completion,
    rollout,
    valid_levels,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TENSORS, BITS = 6, (2, 4, 5, 8)
# two tensors of 256 and 512 weights at 4 and 8 bits; a unit of 32 bytes holds 256 bits
TWO = Problem(
    jnp.array([[0.25, -1.0], [0.75, 2.0]], jnp.float32),
    jnp.array([256.0, 512.0], jnp.float32),
    jnp.array([[4, 8], [8, 16]], jnp.int32),
    jnp.array([[1.0, 1 / 256], [2.0, 2 / 256]], jnp.float32),
)


def random_problem(rng, masked=0.3):
    """Sizes over two orders of magnitude, every level of a tensor masked with the same chance, but never all."""
    weights = 64 * rng.integers(1, 200, TENSORS)
    cost = -(-weights[:, None] * np.array(BITS) // (8 * ALIGNMENT))
    valid = rng.random(cost.shape) >= masked
    valid[np.arange(TENSORS), rng.integers(0, len(BITS), TENSORS)] = True
    return Problem(
        jnp.asarray(rng.normal(size=(TENSORS, 3)), jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(cost * valid, jnp.int32),
        jnp.asarray(weights[:, None] * np.exp(rng.normal(size=(TENSORS, 1))) * 4.0 ** -np.array(BITS), jnp.float32),
    )


def finite(observation):
    return all(np.isfinite(np.asarray(numbers)).all() for numbers in observation)


def at_random(key, observation, mask):
    """A valid action, all equally likely."""
    return jax.random.categorical(key, jnp.where(mask, 0.0, -1e9)).astype(jnp.int32)


play = jax.jit(lambda problem, budget, key: rollout(problem, budget, at_random, key))
play_many = jax.jit(jax.vmap(lambda problem, budget, key: rollout(problem, budget, at_random, key), (None, 0, 0)))


def check(problem, budget, episode):
    """Masks kept, sizes right, budget kept; `episode` may have a leading axis."""
    cost, action = np.asarray(problem.cost), np.asarray(episode.action)
    taken = cost[np.arange(TENSORS), action]
    assert (taken > 0).all()
    assert np.take_along_axis(np.asarray(episode.mask), action[..., None], -1).all()
    assert not (np.asarray(episode.mask) & (cost == 0)).any()
    left = np.asarray(budget) - taken.sum(-1)
    assert (left >= 0).all()
    np.testing.assert_array_equal(episode.left, left)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 0.9))
def test_every_finished_episode_fits_and_keeps_to_the_masks(seed, share, masked):
    problem = random_problem(np.random.default_rng(seed), masked)
    lowest, highest = (int(x) for x in budget_range(problem))
    budget = lowest + int(share * (highest - lowest))
    check(problem, budget, play(problem, jnp.int32(budget), jax.random.key(seed)))


def test_ten_thousand_episodes_side_by_side_fit(rng):
    problem = random_problem(rng)
    lowest, highest = (int(x) for x in budget_range(problem))
    budgets = rng.integers(lowest, highest + 1, 10_000)
    keys = jax.random.split(jax.random.key(0), 10_000)
    episodes = play_many(problem, jnp.asarray(budgets, jnp.int32), keys)
    check(problem, budgets, episodes)
    reached = [np.unique(np.asarray(episodes.action)[:, t]).tolist() for t in range(TENSORS)]
    assert reached == [np.flatnonzero(row).tolist() for row in np.asarray(problem.cost) > 0]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_level_is_masked_exactly_where_the_cheapest_rest_exceeds_the_budget(seed, share):
    problem = random_problem(np.random.default_rng(seed))
    lowest, highest = (int(x) for x in budget_range(problem))
    budget = lowest + int(share * (highest - lowest))
    episode = play(problem, jnp.int32(budget), jax.random.key(seed))
    cost = np.asarray(problem.cost)
    cheapest = [min(c for c in row if c) for row in cost.tolist()]
    left = budget
    for t in range(TENSORS):
        expected = [0 < c <= left - sum(cheapest[t + 1 :]) for c in cost[t].tolist()]
        assert np.asarray(episode.mask[t]).tolist() == expected
        left -= int(cost[t, episode.action[t]])


def test_the_smallest_budget_leaves_one_choice_and_the_largest_all(rng):
    problem = random_problem(rng)
    lowest, highest = budget_range(problem)
    tight = play(problem, lowest, jax.random.key(0))
    assert tight.left == 0
    np.testing.assert_array_equal(tight.mask.sum(axis=1), 1)
    np.testing.assert_array_equal(play(problem, highest, jax.random.key(0)).mask, valid_levels(problem))


def test_cheapest_completion_and_range_by_hand():
    problem = TWO._replace(cost=jnp.array([[0, 7, 9], [3, 0, 5]], jnp.int32))
    np.testing.assert_array_equal(cheapest_completion(problem), [10, 3, 0])
    assert [int(x) for x in budget_range(problem)] == [10, 14]
    np.testing.assert_array_equal(valid_levels(problem), [[False, True, True], [True, False, True]])


def test_observations_by_hand():
    """Budget 20 units: 20 · 256 / 768 bits per weight, shown as (bits − 5) / 2; two thirds of the way from 12 to 24.

    Both tensors gain as much per unit, so nothing is regretted, and the mean loss at the bound is (1 + 2/256) / 2.
    """

    def large_then_small(key, observation, mask):
        return jnp.where(mask[1], 1, 0).astype(jnp.int32)

    episode = rollout(TWO, jnp.int32(20), large_then_small, jax.random.key(0))
    target = (20 * 256 / 768 - 5) / 2
    expected = [
        [0.25, -1.0, target, 1 / 3, target, 1 / 3, 0.0, -1.0],  # embedding, target, left, last action, progress
        [0.75, 2.0, target, 1 / 3, (12 * 256 / 512 - 5) / 2, 0.0, (8 - 5) / 2, 0.0],
    ]
    np.testing.assert_allclose(episode.observation.state, expected, rtol=1e-6)
    assert episode.observation.state.shape == (2, 2 + CONTEXT)
    assert episode.observation.actions.shape == (2, 2, ACTION)
    four, eight, mean = (4 - 5) / 2, (8 - 5) / 2, (1 + 2 / 256) / 2
    first = [[four, np.log1p(1 / mean), 0.0], [eight, np.log1p(1 / 256 / mean), 0.0]]
    second = [[four, np.log1p(2 / mean), 0.0], [0.0, 0.0, 0.0]]  # the last one is masked
    np.testing.assert_allclose(episode.observation.actions, [first, second], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(episode.mask, [[True, True], [True, False]])
    np.testing.assert_array_equal(episode.action, [1, 0])
    assert episode.left == 4


def test_regrets_in_observations_follow_what_is_left():
    """Three tensors of one size at 2 to 8 bits, four times the loss is one bit more: of 15 bits they get 4, 5 and 6.

    Where the first takes more than its share, the price of what is left rises and the others want less.
    """
    bits = np.arange(2, 9)
    loss = np.array([1.0, 4.0, 16.0])[:, None] * 4.0**-bits
    cost = jnp.asarray(np.tile(256 * bits, (3, 1)), jnp.int32)
    known = Problem(jnp.zeros((3, 1)), jnp.full(3, 256.0 * 256), cost, jnp.asarray(loss))

    def without_regret(key, observation, mask):
        return jnp.argmin(jnp.where(mask, observation.actions[:, -1], jnp.inf)).astype(jnp.int32)

    def greedy_first(key, observation, mask):
        first = observation.state[-1] == -1  # progress
        return jnp.where(first, 6, without_regret(key, observation, mask)).astype(jnp.int32)

    fair = rollout(known, jnp.int32(256 * 15), without_regret, jax.random.key(0))
    assert bits[fair.action].tolist() == [4, 5, 6]
    np.testing.assert_array_equal(fair.observation.actions[..., -1].min(axis=1), 0)
    assert bits[rollout(known, jnp.int32(256 * 15), greedy_first, jax.random.key(0)).action].tolist() == [8, 3, 4]


@pytest.mark.parametrize(("budget", "bits", "place"), [(1, -2.0, -1.0), (10_000, 2.0, 1.0)])
def test_budget_in_observations_is_clipped(budget, bits, place):
    episode = rollout(TWO, jnp.int32(budget), lambda *_: jnp.int32(0), jax.random.key(0))
    np.testing.assert_array_equal(episode.observation.state[0, 2:6], [bits, place, bits, place])


def test_files_of_64_gib_are_counted_exactly():
    """Two tensors whose sizes need every bit of an int32."""
    half = 2**36 // ALIGNMENT // 2 - 1
    problem = TWO._replace(cost=jnp.full((2, 2), half, jnp.int32) + jnp.array([[0, 1]], jnp.int32))
    episode = rollout(problem, jnp.int32(2 * half + 1), lambda *_: jnp.int32(0), jax.random.key(0))
    assert episode.left == 1
    assert episode.mask.all()
    assert not rollout(problem, jnp.int32(2 * half), lambda *_: jnp.int32(0), jax.random.key(0)).mask[:, 1].any()


def costs_of(weights, bits):
    """What tensors of so many weights take at so many bits, beside 10 MB of header; padded to 32 bytes."""
    return Costs(10_000_000, -(-np.asarray(weights, np.int64)[:, None] * np.asarray(bits) // 256) * 32)


D, F = 8192, 28672
LAYER = [D * D, D * D // 8, D * D // 8, D * D, D * F, D * F, D * F]
BEYOND_64_GIB = {
    "70B at up to 16 bits": costs_of([128_256 * D, *LAYER * 80, 128_256 * D], (2, 4, 5, 8, 16)),
    "2^52 bytes": costs_of([64, *[2**47] * 15, 2**48], (2, 4, 8, 16)),
}


@pytest.mark.parametrize("table", BEYOND_64_GIB.values(), ids=BEYOND_64_GIB)
def test_files_beyond_64_gib_keep_their_budget_in_bytes(table):
    """Episodes, greedy steps and the knapsack, at budgets over the whole range; no sum leaves int32."""
    weights = table.per_level[:, -1] / 2
    bits = np.array([2, 4, 5, 8, 16][: table.per_level.shape[1]], np.float64)
    loss = weights[:, None] / weights.sum() * 4.0**-bits
    problem = Problem(
        jnp.zeros((len(weights), 1)),
        *(jnp.asarray(values, kind) for values, kind in ((weights, jnp.float32), (table.in_units, jnp.int32))),
        jnp.asarray(loss, jnp.float32),
        unit=float(table.unit),
    )
    lowest, highest = (int(x) for x in budget_range(problem))
    assert 0 < lowest < highest < 2**31
    assert 2 * (highest + len(weights)) > 2**31  # as fine as an int32 allows
    assert (np.asarray(cheapest_completion(problem)) >= 0).all()
    rows = np.arange(len(weights))

    def small_regret(key, observation, mask):
        return jnp.argmin(jnp.where(mask, observation.actions[:, -1], jnp.inf)).astype(jnp.int32)

    for budget in np.linspace(table.smallest, table.largest, 5).astype(int).tolist():
        units = table.units(budget)
        episode = rollout(problem, jnp.int32(units), small_regret, jax.random.key(0))
        assert finite(episode.observation)
        bpw = 8 * (budget - table.fixed) / weights.sum()
        assert episode.observation.state[0, 1] == pytest.approx(np.clip((bpw - 5) / 2, -2, 2), abs=1e-3)
        choices = [choose(table.in_units, loss, units) for choose in (greedy, knapsack)]
        for actions in (np.asarray(episode.action), *choices):
            size = table.fixed + int(table.per_level[rows, actions].sum())
            assert size <= budget
            assert size > 0.9 * budget


def test_smaller_files_are_counted_in_the_alignment():
    table = costs_of([2**34, 2**35], (4, 8))
    assert table.unit == ALIGNMENT
    np.testing.assert_array_equal(table.in_units * ALIGNMENT, table.per_level)
    assert table.smallest == table.fixed + table.per_level[:, 0].sum()


def test_levels_without_loss_leave_observations_finite(rng):
    """As of a model that was stored in its highest level, with a budget that reaches it."""
    problem = random_problem(rng, masked=0.0)
    problem = problem._replace(expected=problem.expected.at[:, -1].set(0.0))
    for budget in budget_range(problem):
        episode = play(problem, budget, jax.random.key(0))
        assert finite(episode.observation)
        check(problem, int(budget), episode)

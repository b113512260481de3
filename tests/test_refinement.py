"""Search by true evaluations: what it asks, and what it finds where tensors lose more together than alone."""

import itertools

import numpy as np
import pytest

from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.policy import refinement
from ramp_jax.policy.refinement import search

pytestmark = pytest.mark.usefixtures("compiled_quickly")

COST = np.tile([3, 4, 6], (7, 1))
LOSS = np.geomspace(1, 20, 7)[:, None] * np.array([1.0, 0.3, 0.02])[None]
BUDGET = 28


def together(actions):
    """The sum, and what neighbours lose beside it."""
    chosen = LOSS[np.arange(7), actions]
    return chosen.sum() + 1.5 * np.sqrt(chosen[1:] * chosen[:-1]).sum()


def searched(evaluations, seed=0):
    asked = []

    def evaluate(actions):
        asked.append(tuple(actions))
        return together(actions)

    start = knapsack(COST, LOSS, BUDGET)
    found = search(COST, LOSS, BUDGET, evaluate=evaluate, evaluations=evaluations, start=[start, start], seed=seed)
    return found, asked


@pytest.mark.parametrize("evaluations", [1, 2, 7, 40])
def test_asks_for_what_fits_never_twice_and_keeps_the_best(evaluations):
    found, asked = searched(evaluations)
    assert len(asked) == len(set(asked)) == evaluations
    assert all(COST[np.arange(7), list(actions)].sum() <= BUDGET for actions in asked)
    assert together(found) == min(together(np.asarray(actions)) for actions in asked)


def test_finds_the_optimum_that_the_table_cannot_see():
    """Of 2,187 allocations the best one, with 100 evaluations; the knapsack of the table loses more."""
    every = (np.asarray(a) for a in itertools.product(range(3), repeat=7))
    best = min(together(a) for a in every if COST[np.arange(7), a].sum() <= BUDGET)
    assert together(knapsack(COST, LOSS, BUDGET)) > 1.01 * best
    assert together(searched(100)[0]) == pytest.approx(best)


def test_a_corrected_table_finds_more_than_one_that_stays(monkeypatch):
    """30 tensors whose losses the table gets wrong by factors of up to ten: 60 evaluations, mean over 5 seeds."""
    rng = np.random.default_rng(0)
    cost = np.tile([3, 4, 6], (30, 1))
    true = np.exp(rng.normal(0, 1.5, 30))[:, None] * np.array([1.0, 0.3, 0.02])[None]
    table = true * np.exp(rng.uniform(-2.3, 2.3, 30))[:, None]

    def evaluate(actions):
        return true[np.arange(30), actions].sum()

    def mean_loss():
        start = [knapsack(cost, table, 120)]
        found = (search(cost, table, 120, evaluate=evaluate, evaluations=60, start=start, seed=s) for s in range(5))
        return np.mean([evaluate(actions) for actions in found])

    corrected = mean_loss()
    monkeypatch.setattr(refinement, "correct_table", lambda table, evidence: table)
    assert corrected < 0.95 * mean_loss()


def test_ends_where_nothing_is_new():
    """Two tensors, nine allocations of which some never come up: the search stops by itself."""
    found = search(
        COST[:2], LOSS[:2], 12, evaluate=lambda a: LOSS[[0, 1], a].sum(), evaluations=1000, start=[np.array([0, 0])]
    )
    assert found.tolist() == [2, 2]

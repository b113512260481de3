"""Allocators against brute force over all allocations of small problems."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from ramp_jax.allocators import knapsack as knapsack_module
from ramp_jax.allocators.evolution import evolution
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.allocators.simple import greedy, random, uniform
from ramp_jax.allocators.tables import _saved, _saved_together, cheapest, exchange, fill, total


def random_problem(seed, tensors=4, levels=3):
    """Costs and losses with no order between levels, a fifth of the cells masked, never a whole row."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 60, (tensors, levels))
    valid = rng.random(cost.shape) >= 0.2
    valid[np.arange(tensors), rng.integers(0, levels, tensors)] = True
    return cost * valid, np.exp(rng.normal(-4, 2, cost.shape)) * valid


def feasible(cost, budget):
    choices = itertools.product(*(np.flatnonzero(row) for row in cost))
    return [actions for actions in choices if total(cost, actions) <= budget]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_knapsack_equals_brute_force(seed, share):
    cost, loss = random_problem(seed)
    smallest = np.where(cost > 0, cost, 10**6).min(axis=1).sum()
    budget = int(smallest + share * (cost.max(axis=1).sum() - smallest))
    actions = knapsack(cost, loss, budget)
    assert (np.take_along_axis(cost, actions[:, None], 1) > 0).all()
    assert total(cost, actions) <= budget
    best = min(total(loss, choice) for choice in feasible(cost, budget))
    assert total(loss, actions) == pytest.approx(best, rel=1e-5)


def test_knapsack_by_hand():
    """Ten units: the first tensor earns 5 for 3 more, the second 4 for 1 more, the third 1 for 3 more."""
    cost = np.array([[2, 5], [2, 3], [1, 4]])
    loss = np.array([[6.0, 1.0], [5.0, 1.0], [2.0, 1.0]])
    assert knapsack(cost, loss, 10).tolist() == [1, 1, 0]
    assert knapsack(cost, loss, 8).tolist() == [1, 0, 0]
    assert knapsack(cost, loss, 12).tolist() == [1, 1, 1]


def test_knapsack_resolves_small_losses_beside_large_ones():
    """As in a real table: one tensor loses 10⁴ times what the others do."""
    cost = np.array([[10, 20], [10, 20], [10, 20]])
    loss = np.array([[1.0, 0.9], [2e-4, 1e-4], [3e-4, 1e-4]])
    assert knapsack(cost, loss, 50).tolist() == [1, 0, 1]


def test_knapsack_that_nothing_fits():
    with pytest.raises(ValueError, match=r"no allocation fits the budget; choose a larger one"):
        knapsack(np.array([[2, 5], [2, 3]]), np.ones((2, 2)), 3)


def test_knapsack_without_time_takes_exchanges_and_says_so(caplog):
    """A budget that has a solution is not called too small where the solver finds none in time."""
    cost, loss = sized_problem(0, tensors=40)
    budget = int(cost[:, 0].sum() * 1.3)
    actions = knapsack(cost, loss, budget, time_limit=0.0)
    assert "is not solved (Time limit reached" in caplog.text
    assert total(cost, actions) <= budget
    assert total(loss, actions) < 1.05 * total(loss, knapsack(cost, loss, budget))


@pytest.mark.parametrize("better", ["incumbent", "exchanges"])
def test_knapsack_takes_the_better_of_a_timed_out_incumbent_and_exchanges(monkeypatch, caplog, better):
    """No incumbent passes as exact: the cheapest levels lose to exchanges, the optimum does not."""
    cost, loss = sized_problem(1, tensors=20)
    budget = int(cost[:, 0].sum() * 1.3)
    optimum = knapsack(cost, loss, budget)
    assert caplog.text == ""
    incumbent = optimum if better == "incumbent" else cheapest(cost, budget)
    late = OptimizeResult(x=np.eye(cost.shape[1])[incumbent].ravel(), status=1, message="Time limit reached.")
    monkeypatch.setattr(knapsack_module, "milp", lambda *_, **__: late)
    actions = knapsack(cost, loss, budget)
    assert "not exact" in caplog.text
    assert total(cost, actions) <= budget
    assert total(loss, actions) < 1.05 * total(loss, optimum) < 0.9 * total(loss, cheapest(cost, budget))


def test_uniform_takes_the_highest_level_that_fits():
    cost, loss = np.array([[2, 5, 8], [2, 3, 9]]), np.zeros((2, 3))
    assert uniform(cost, loss, 17).tolist() == [2, 2]
    assert uniform(cost, loss, 16).tolist() == [1, 1]
    assert uniform(cost, loss, 4).tolist() == [0, 0]
    with pytest.raises(ValueError, match="no uniform level fits the budget"):
        uniform(cost, loss, 3)


def test_uniform_where_levels_are_masked():
    """The next one below, else above."""
    cost = np.array([[2, 0, 8], [0, 3, 9], [4, 5, 0]])
    assert uniform(cost, np.zeros((3, 3)), 22).tolist() == [2, 2, 1]
    assert uniform(cost, np.zeros((3, 3)), 21).tolist() == [0, 1, 1]
    assert uniform(cost, np.zeros((3, 3)), 9).tolist() == [0, 1, 0]


METHODS = {
    "greedy": greedy,
    "random": random,
    "evolution": lambda cost, loss, budget: evolution(
        cost, loss, budget, evaluate=lambda actions: total(loss, actions), evaluations=40
    ),
    "exchange": lambda cost, loss, budget: exchange(cost, loss, budget, cheapest(cost, budget)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_every_method_fits_and_takes_valid_levels(method, seed, share):
    cost, loss = sized_problem(seed)
    smallest, largest = cost[:, 0].sum(), cost[:, -1].sum()
    budget = int(smallest + share * (largest - smallest))
    actions = method(cost, loss, budget)
    assert total(cost, actions) <= budget
    assert (cost[np.arange(len(cost)), actions] > 0).all()


def sized_problem(seed, tensors=8):
    """Levels that cost more and lose less, as formats do."""
    rng = np.random.default_rng(seed)
    size = rng.integers(10, 100, (tensors, 1))
    bits = np.array([4, 5, 6, 8])
    return size * bits, size * np.exp(rng.normal(0, 2, (tensors, 1))) * 4.0**-bits


def test_exchanges_are_close_to_the_optimum_and_never_worse_than_greedy():
    ratios = []
    for seed in range(30):
        cost, loss = sized_problem(seed)
        budget = int(cost[:, 0].sum() * 1.3)
        start = greedy(cost, loss, budget)
        traded = exchange(cost, loss, budget, start)
        assert total(loss, traded) <= total(loss, start)
        ratios.append(total(loss, traded) / total(loss, knapsack(cost, loss, budget)))
    assert min(ratios) > 1 - 1e-5
    assert np.mean(ratios) < 1.02


def test_exchange_by_hand():
    """Nothing more fits; giving up what the second tensor has for the first one's step saves 4 for 1."""
    cost = np.array([[4, 6], [4, 6]])
    loss = np.array([[5.0, 1.0], [2.0, 1.0]])
    assert fill(cost, loss, 10, np.array([0, 1])).tolist() == [0, 1]
    assert exchange(cost, loss, 10, np.array([0, 1])).tolist() == [1, 0]


def test_evolution_asks_as_often_as_it_may_and_improves():
    cost, loss = sized_problem(3, tensors=20)
    budget, asked = int(cost[:, 0].sum() * 1.3), []

    def evaluate(actions):
        asked.append(total(loss, actions))
        return asked[-1]

    found = evolution(cost, loss, budget, evaluate=evaluate, evaluations=203)
    assert len(asked) == 203
    assert total(loss, found) == min(asked) < 0.9 * asked[0]


@pytest.mark.parametrize("seed", range(3))
def test_evolution_leaves_a_uniform_allocation_behind(seed):
    """A large embedding that loses most wants steps that many others pay for; 4 and 4.5 bits hardly differ."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, (40, 1))
    scale = np.exp(rng.normal(0, 1.5, size.shape))
    size[0], scale[0] = 40, 3 * scale[1:].sum()
    cost = (8 * size * np.array([2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5])).astype(int)
    loss = scale * 4.0 ** -np.array([2.2, 3.2, 4.2, 4.21, 5.2, 6.2, 8.2])
    budget = int(1.01 * cost[:, 2].sum())
    found = evolution(cost, loss, budget, evaluate=lambda a: total(loss, a), evaluations=1000)
    assert total(loss, found) < 1.35 * total(loss, knapsack(cost, loss, budget))


def random_pairs(rng, cost):
    """Symmetric, none between levels of one tensor."""
    n_tensors, n_levels = cost.shape
    pairs = rng.normal(0, 0.2, (n_tensors, n_levels, n_tensors, n_levels))
    pairs += pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(n_tensors), :, np.arange(n_tensors)] = 0
    return pairs


def total_of_pairs(loss, pairs, actions):
    rows = np.arange(len(loss))
    return total(loss, actions) + pairs[rows[:, None], actions[:, None], rows[None], actions[None]].sum() / 2


def test_what_moves_save_counts_pairs(rng):
    """One move and two at once, against the difference of whole losses."""
    cost, loss = sized_problem(0, tensors=6)
    pairs = random_pairs(rng, cost)
    actions = rng.integers(0, cost.shape[1], 6)
    before = total_of_pairs(loss, pairs, actions)
    saved = _saved(loss, actions, pairs)
    together = _saved_together(actions, pairs)
    for (t, a), (u, b) in itertools.permutations(np.ndindex(cost.shape), 2):
        if t != u:
            one, two = actions.copy(), actions.copy()
            one[t] = a
            two[[t, u]] = a, b
            assert saved[t, a] == pytest.approx(before - total_of_pairs(loss, pairs, one))
            expected = before - total_of_pairs(loss, pairs, two)
            i, j = t * cost.shape[1] + a, u * cost.shape[1] + b
            assert saved[t, a] + saved[u, b] + together[i, j] == pytest.approx(expected)


def test_exchanges_with_pairs_beat_the_knapsack_without():
    """Nearer to the best of all allocations of six tensors, by half at least on average."""
    over, without = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cost, loss = sized_problem(seed, tensors=6)
        pairs = 0.2 * loss.mean() * random_pairs(rng, cost)
        budget = int(cost[:, 0].sum() * 1.3)
        lowest = min(total_of_pairs(loss, pairs, np.asarray(actions)) for actions in feasible(cost, budget))
        start = knapsack(cost, loss, budget)
        found = exchange(cost, loss, budget, start, pairs)
        assert total(cost, found) <= budget
        assert total_of_pairs(loss, pairs, found) <= total_of_pairs(loss, pairs, start) + 1e-9
        over.append(total_of_pairs(loss, pairs, found) - lowest)
        without.append(total_of_pairs(loss, pairs, start) - lowest)
    assert np.mean(over) < 0.5 * np.mean(without)

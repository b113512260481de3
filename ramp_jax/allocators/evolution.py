"""Search by mutation and selection, which needs true evaluations and no table."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from ramp_jax.allocators.simple import uniform
from ramp_jax.allocators.tables import Actions, Cost, Loss, total


def evolution(
    cost: Cost,
    loss: Loss,
    budget: int,
    *,
    evaluate: Callable[[Actions], float],
    evaluations: int,
    start: Actions | None = None,
    seed: int = 0,
    offspring: int = 8,
) -> Actions:
    """EvoPress (Sieberling et al. 2025): the best by true loss of a parent and its mutants, again and again.

    `evaluate` measures an allocation and is called `evaluations` times at most; the first parent is `start` or else
    `uniform`'s, and `loss` is not looked at. Raises `ValueError` where nothing fits.
    """
    rng = np.random.default_rng(seed)
    best = uniform(cost, loss, budget) if start is None else start
    least, left = evaluate(best), evaluations - 1
    while left > 0:
        mutants = [mutate(cost, budget, best, rng) for _ in range(min(offspring, left))]
        losses = [evaluate(mutant) for mutant in mutants]
        left -= len(mutants)
        if min(losses) < least:
            best, least = mutants[int(np.argmin(losses))], min(losses)
    return best


def mutate(cost: Cost, budget: int, parent: Actions, rng: np.random.Generator) -> Actions:
    """One or two tensors up, others down until it fits, then what is left used.

    Up by one level, with chance ½ by another, and so on: with steps of one level alone, levels that lie close (4 and
    4.5) pay for no step down, and uniform parents stay.
    """
    actions = parent.copy()
    for t in rng.choice(len(cost), size=min(rng.integers(1, 3), len(cost)), replace=False):
        for _ in range(rng.geometric(0.5)):
            actions[t] = _step(cost[t], actions[t], up=True)
    while total(cost, actions) > budget:
        t = rng.integers(len(cost))
        actions[t] = _step(cost[t], actions[t], up=False)
    for t in rng.permutation(len(cost)):
        higher = _step(cost[t], actions[t], up=True)
        if total(cost, actions) - cost[t, actions[t]] + cost[t, higher] <= budget:
            actions[t] = higher
    return actions


def _step(cost: Int[np.ndarray, " A"], action: int, *, up: bool) -> int:
    """The next costlier (cheaper) valid level, or the same one at the end."""
    order = np.argsort(np.where(cost > 0, cost, np.iinfo(cost.dtype).max), kind="stable")[: (cost > 0).sum()]
    place = int(np.flatnonzero(order == action)[0]) + (1 if up else -1)
    return int(order[min(max(place, 0), len(order) - 1)])

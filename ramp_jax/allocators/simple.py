"""Allocations without a search: one level for all, random levels, and the step that saves most, again and again."""

import numpy as np

from ramp_jax.allocators.tables import Actions, Cost, Loss, cheapest, fill, total


def uniform(cost: Cost, loss: Loss, budget: int) -> Actions:
    """One level for all, the highest that fits; a tensor that cannot take it takes the next one below, else above.

    Raises `ValueError` where no level fits.
    """
    for level in reversed(range(cost.shape[1])):
        actions = np.asarray([_nearest(row > 0, level) for row in cost])
        if total(cost, actions) <= budget:
            return actions
    raise ValueError("no uniform level fits the budget; choose a larger one.")


def random(cost: Cost, loss: Loss, budget: int, *, seed: int = 0) -> Actions:
    """Levels drawn tensor by tensor in random order, uniformly among those that leave enough for all others.

    Raises `ValueError` where nothing fits.
    """
    del loss
    rng = np.random.default_rng(seed)
    actions = cheapest(cost, budget)
    left = budget - total(cost, actions)
    for t in rng.permutation(len(cost)):
        extra = cost[t] - cost[t, actions[t]]
        choice = rng.choice(np.flatnonzero((cost[t] > 0) & (extra <= left)))
        actions[t], left = choice, left - extra[choice]
    return actions


def greedy(cost: Cost, loss: Loss, budget: int) -> Actions:
    """From the cheapest levels up: always the step that saves most loss per unit among those that fit.

    Raises `ValueError` where nothing fits.
    """
    return fill(cost, loss, budget, cheapest(cost, budget))


def _nearest(valid: np.ndarray, level: int) -> int:
    levels = np.flatnonzero(valid)
    below = levels[levels <= level]
    return int(below[-1] if below.size else levels[0])

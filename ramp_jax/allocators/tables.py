"""Allocations over tables: what they take and lose, and how what is left of a budget is spent.

T tensors, A levels. `cost` is what each level takes, in any unit, 0 where masked; `loss` what it loses in nats per
token; a `budget` is in the unit of the costs. An allocation is one level index per tensor.
"""

import numpy as np
from jaxtyping import Float, Int

Cost = Int[np.ndarray, "T A"]
Loss = Float[np.ndarray, "T A"]
Pairs = Float[np.ndarray, "T A T A"]
"""What two tensors at two levels lose together beyond their sum: symmetric, 0 between levels of one tensor."""
Actions = Int[np.ndarray, " T"]


def total(table: Cost | Loss, actions: Actions) -> float:
    """The sum of a table's entries that an allocation takes."""
    return table[np.arange(len(table)), actions].sum()


def total_loss(loss: Loss, actions: Actions, pairs: Pairs | None = None) -> float:
    """What an allocation loses by the table, and by pairs where they are known."""
    rows = np.arange(actions.size)
    together = 0.0 if pairs is None else pairs[rows[:, None], actions[:, None], rows[None], actions[None]].sum() / 2
    return total(loss, actions) + together


def cheapest(cost: Cost, budget: int) -> Actions:
    """The smallest allocation; raises `ValueError` where not even that fits."""
    actions = np.where(cost > 0, cost, np.iinfo(cost.dtype).max).argmin(axis=1)
    if total(cost, actions) > budget:
        raise ValueError("no allocation fits the budget; choose a larger one.")
    return actions


def fill(cost: Cost, loss: Loss, budget: int, actions: Actions, pairs: Pairs | None = None) -> Actions:
    """Spend what is left: one tensor at a time takes another level, the one that saves most loss per unit."""
    actions, rows = actions.copy(), np.arange(len(cost))
    while True:
        saved = np.where(cost > 0, _saved(loss, actions, pairs), 0.0)
        extra = cost - cost[rows, actions][:, None]
        rate = np.where((saved > 0) & (extra <= budget - total(cost, actions)), saved / np.maximum(extra, 1e-3), 0.0)
        if not rate.any():
            return actions
        t, a = np.unravel_index(np.argmax(rate), rate.shape)
        actions[t] = a


def exchange(
    cost: Cost, loss: Loss, budget: int, actions: Actions, pairs: Pairs | None = None, *, rounds: int = 1000
) -> Actions:
    """Repair: spend what is left, then let pairs of tensors trade levels while that saves a thousandth and fits."""
    actions, rows = fill(cost, loss, budget, actions, pairs), np.arange(len(cost))
    tensor = np.repeat(rows, cost.shape[1])
    for _ in range(rounds):
        saved = np.where(cost > 0, _saved(loss, actions, pairs), -np.inf).ravel()
        extra = (cost - cost[rows, actions][:, None]).ravel()
        both = saved[:, None] + saved[None, :] + _saved_together(actions, pairs)
        fits = extra[:, None] + extra[None, :] <= budget - total(cost, actions)
        both = np.where(fits & (tensor[:, None] != tensor[None, :]), both, -np.inf)
        i, j = np.unravel_index(np.argmax(both), both.shape)
        if not both[i, j] > 1e-3 * abs(total_loss(loss, actions, pairs)):
            break
        for move in (i, j):
            actions[tensor[move]] = move % cost.shape[1]
        actions = fill(cost, loss, budget, actions, pairs)
    return actions


def _saved(loss: Loss, actions: Actions, pairs: Pairs | None) -> Loss:
    """What each level of one tensor saves, all others unchanged."""
    rows = np.arange(len(loss))
    if pairs is not None:
        loss = loss + pairs[:, :, rows, actions].sum(axis=2)
    return loss[rows, actions][:, None] - loss


def _saved_together(actions: Actions, pairs: Pairs | None) -> Float[np.ndarray, "M M"] | float:
    """What two moves save beyond the sum of what each saves alone, M = T · A."""
    if pairs is None:
        return 0.0
    n_levels = pairs.shape[1]
    products = pairs.reshape(actions.size * n_levels, -1)
    here = np.repeat(np.arange(actions.size) * n_levels + actions, n_levels)  # where each move starts
    return products[:, here] + products[here] - products - products[np.ix_(here, here)]

"""What the policy is compared with. Every method maps (cost, loss, budget) to one level index per tensor.

`cost` is what each level takes, `[T, A]` in any unit, 0 where masked; `loss` the sensitivity table in nats per token,
`[T, A]`; `budget` is in the unit of the costs. llama.cpp's own type mixes are whole files, made by llama.cpp itself:
see `halo/handoff.py`.
"""

import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

Cost = Int[np.ndarray, "T A"]
Loss = Float[np.ndarray, "T A"]
Pairs = Float[np.ndarray, "T A T A"]
Actions = Int[np.ndarray, " T"]

_LOG = logging.getLogger(__name__)
_OPTIMAL = 0  # of `scipy.optimize.milp`


def uniform(cost: Cost, loss: Loss, budget: int) -> Actions:
    """One level for all, the highest that fits; a tensor that cannot take it takes the next one below, else above.

    Raises `ValueError` where no level fits.
    """
    for level in reversed(range(cost.shape[1])):
        actions = np.asarray([_nearest(row > 0, level) for row in cost])
        if _sum(cost, actions) <= budget:
            return actions
    raise ValueError("no uniform level fits the budget; choose a larger one.")


def knapsack(cost: Cost, loss: Loss, budget: int, *, time_limit: float = 60.0) -> Actions:
    """The allocation of least predicted loss that fits, exactly: a multiple-choice knapsack solved by HiGHS.

    Where it is not solved within `time_limit` seconds, a warning says so, and the better of what HiGHS has found and of
    what exchanges reach from the greedy allocation is returned. Raises `ValueError` where nothing fits.
    """
    smallest = cheapest(cost, budget)
    solution = _solve(cost, loss, budget, time_limit)
    found = [] if solution.x is None else [solution.x.reshape(cost.shape).argmax(axis=1)]
    found = [actions for actions in found if _sum(cost, actions) <= budget]  # the solver's tolerance is not ours
    if found and solution.status == _OPTIMAL:
        return found[0]
    _LOG.warning(
        "the knapsack of %d tensors is not solved (%s); what is taken instead may be close to its optimum, not exact.",
        len(cost),
        solution.message,
    )
    return min([exchanged(cost, loss, budget, smallest), *found], key=lambda actions: _sum(loss, actions))


def _solve(cost: Cost, loss: Loss, budget: int, time_limit: float) -> OptimizeResult:
    """HiGHS on one 0-1 variable per tensor and level, within a millionth of the optimum."""
    n_tensors, n_levels = cost.shape
    pick_one = np.kron(np.eye(n_tensors), np.ones((1, n_levels)))
    return milp(
        np.asarray(loss, np.float64).ravel() / max(np.abs(loss).max(), 1e-30),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, (cost > 0).ravel().astype(float)),
        constraints=[LinearConstraint(pick_one, 1, 1), LinearConstraint(cost.reshape(1, -1).astype(float), 0, budget)],
        options={"mip_rel_gap": 1e-6, "time_limit": time_limit},
    )


def greedy(cost: Cost, loss: Loss, budget: int) -> Actions:
    """From the cheapest levels up: always the step that saves most loss per unit among those that fit.

    Raises `ValueError` where nothing fits.
    """
    return filled(cost, loss, budget, cheapest(cost, budget))


def random(cost: Cost, loss: Loss, budget: int, *, seed: int = 0) -> Actions:
    """Levels drawn tensor by tensor in random order, uniformly among those that leave enough for all others.

    Raises `ValueError` where nothing fits.
    """
    del loss
    rng = np.random.default_rng(seed)
    actions = cheapest(cost, budget)
    left = budget - _sum(cost, actions)
    for t in rng.permutation(len(cost)):
        extra = cost[t] - cost[t, actions[t]]
        choice = rng.choice(np.flatnonzero((cost[t] > 0) & (extra <= left)))
        actions[t], left = choice, left - extra[choice]
    return actions


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
        mutants = [mutant(cost, budget, best, rng) for _ in range(min(offspring, left))]
        losses = [evaluate(mutant) for mutant in mutants]
        left -= len(mutants)
        if min(losses) < least:
            best, least = mutants[int(np.argmin(losses))], min(losses)
    return best


def cheapest(cost: Cost, budget: int) -> Actions:
    """The smallest allocation; raises `ValueError` where not even that fits."""
    actions = np.where(cost > 0, cost, np.iinfo(cost.dtype).max).argmin(axis=1)
    if _sum(cost, actions) > budget:
        raise ValueError("no allocation fits the budget; choose a larger one.")
    return actions


def filled(cost: Cost, loss: Loss, budget: int, actions: Actions, pairs: Pairs | None = None) -> Actions:
    """Spend what is left: one tensor at a time takes another level, the one that saves most loss per unit."""
    actions, rows = actions.copy(), np.arange(len(cost))
    while True:
        saved = np.where(cost > 0, _saved(loss, actions, pairs), 0.0)
        extra = cost - cost[rows, actions][:, None]
        rate = np.where((saved > 0) & (extra <= budget - _sum(cost, actions)), saved / np.maximum(extra, 1e-3), 0.0)
        if not rate.any():
            return actions
        t, a = np.unravel_index(np.argmax(rate), rate.shape)
        actions[t] = a


def exchanged(
    cost: Cost, loss: Loss, budget: int, actions: Actions, pairs: Pairs | None = None, *, rounds: int = 1000
) -> Actions:
    """Repair: spend what is left, then let pairs of tensors trade levels while that saves a thousandth and fits.

    `pairs` is what two tensors lose together beyond their sum, symmetric, 0 between levels of one tensor.
    """
    actions, rows = filled(cost, loss, budget, actions, pairs), np.arange(len(cost))
    tensor = np.repeat(rows, cost.shape[1])
    for _ in range(rounds):
        saved = np.where(cost > 0, _saved(loss, actions, pairs), -np.inf).ravel()
        extra = (cost - cost[rows, actions][:, None]).ravel()
        both = saved[:, None] + saved[None, :] + _saved_together(actions, pairs)
        fits = extra[:, None] + extra[None, :] <= budget - _sum(cost, actions)
        both = np.where(fits & (tensor[:, None] != tensor[None, :]), both, -np.inf)
        i, j = np.unravel_index(np.argmax(both), both.shape)
        if not both[i, j] > 1e-3 * abs(total_loss(loss, actions, pairs)):
            break
        for move in (i, j):
            actions[tensor[move]] = move % cost.shape[1]
        actions = filled(cost, loss, budget, actions, pairs)
    return actions


def _saved(loss: Loss, actions: Actions, pairs: Pairs | None) -> Loss:
    """What each level of one tensor saves, all others unchanged."""
    rows = np.arange(len(loss))
    if pairs is not None:
        loss = loss + pairs[:, :, rows, actions].sum(axis=2)
    return loss[rows, actions][:, None] - loss


def total_loss(loss: Loss, actions: Actions, pairs: Pairs | None = None) -> float:
    """What an allocation loses by the table, and by pairs where they are known."""
    rows = np.arange(actions.size)
    together = 0.0 if pairs is None else pairs[rows[:, None], actions[:, None], rows[None], actions[None]].sum() / 2
    return _sum(loss, actions) + together


def _saved_together(actions: Actions, pairs: Pairs | None) -> Float[np.ndarray, "M M"] | float:
    """What two moves save beyond the sum of what each saves alone, M = T · A."""
    if pairs is None:
        return 0.0
    n_levels = pairs.shape[1]
    products = pairs.reshape(actions.size * n_levels, -1)
    here = np.repeat(np.arange(actions.size) * n_levels + actions, n_levels)  # where each move starts
    return products[:, here] + products[here] - products - products[np.ix_(here, here)]


def mutant(cost: Cost, budget: int, parent: Actions, rng: np.random.Generator) -> Actions:
    """One or two tensors up, others down until it fits, then what is left used.

    Up by one level, with chance ½ by another, and so on: with steps of one level alone, levels that lie close (4 and
    4.5) pay for no step down, and uniform parents stay.
    """
    actions = parent.copy()
    for t in rng.choice(len(cost), size=min(rng.integers(1, 3), len(cost)), replace=False):
        for _ in range(rng.geometric(0.5)):
            actions[t] = _step(cost[t], actions[t], up=True)
    while _sum(cost, actions) > budget:
        t = rng.integers(len(cost))
        actions[t] = _step(cost[t], actions[t], up=False)
    for t in rng.permutation(len(cost)):
        higher = _step(cost[t], actions[t], up=True)
        if _sum(cost, actions) - cost[t, actions[t]] + cost[t, higher] <= budget:
            actions[t] = higher
    return actions


def _step(cost: Int[np.ndarray, " A"], action: int, *, up: bool) -> int:
    """The next dearer (cheaper) valid level, or the same one at the end."""
    order = np.argsort(np.where(cost > 0, cost, np.iinfo(cost.dtype).max), kind="stable")[: (cost > 0).sum()]
    place = int(np.flatnonzero(order == action)[0]) + (1 if up else -1)
    return int(order[min(max(place, 0), len(order) - 1)])


def _sum(table: np.ndarray, actions: Actions) -> float:
    return table[np.arange(len(table)), actions].sum()


def _nearest(valid: np.ndarray, level: int) -> int:
    levels = np.flatnonzero(valid)
    below = levels[levels <= level]
    return int(below[-1] if below.size else levels[0])

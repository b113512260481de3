"""The optimum of a table: a multiple-choice knapsack."""

import logging

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from ramp_jax.allocators.tables import Actions, Cost, Loss, cheapest, exchange, total

_LOG = logging.getLogger(__name__)
_OPTIMAL = 0  # of `scipy.optimize.milp`


def knapsack(cost: Cost, loss: Loss, budget: int, *, time_limit: float = 60.0) -> Actions:
    """The allocation of least predicted loss that fits, exactly: a multiple-choice knapsack solved by HiGHS.

    Where it is not solved within `time_limit` seconds, a warning says so, and the better of what HiGHS has found and of
    what exchanges reach from the greedy allocation is returned. Raises `ValueError` where nothing fits.
    """
    smallest = cheapest(cost, budget)
    solution = _solve(cost, loss, budget, time_limit)
    found = [] if solution.x is None else [solution.x.reshape(cost.shape).argmax(axis=1)]
    found = [actions for actions in found if total(cost, actions) <= budget]  # the solver's tolerance is not ours
    if found and solution.status == _OPTIMAL:
        return found[0]
    _LOG.warning(
        "the knapsack of %d tensors is not solved (%s); what is taken instead may be close to its optimum, not exact.",
        len(cost),
        solution.message,
    )
    return min([exchange(cost, loss, budget, smallest), *found], key=lambda actions: total(loss, actions))


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

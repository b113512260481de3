"""What the policy is compared with. Every method maps (cost, loss, budget) to one level index per tensor.

`cost` is what each level takes, `[T, A]` in any unit, 0 where masked; `loss` the sensitivity table in nats per token,
`[T, A]`; `budget` is in the unit of the costs. llama.cpp's own type mixes are whole files, made by llama.cpp itself:
see `halo/handoff.py`.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

Cost = Int[np.ndarray, "T A"]
Loss = Float[np.ndarray, "T A"]
Actions = Int[np.ndarray, " T"]


def uniform(cost: Cost, loss: Loss, budget: int) -> Actions:
    """One level for all, the highest that fits; a tensor that cannot take it takes the next one below, else above.

    Raises `ValueError` where no level fits.
    """
    for level in reversed(range(cost.shape[1])):
        actions = np.asarray([_nearest(row > 0, level) for row in cost])
        if np.take_along_axis(cost, actions[:, None], 1).sum() <= budget:
            return actions
    raise ValueError("no uniform level fits the budget; choose a larger one.")


def knapsack(cost: Cost, loss: Loss, budget: int) -> Actions:
    """The allocation of least predicted loss that fits, exactly: a multiple-choice knapsack solved by HiGHS.

    Raises `ValueError` where nothing fits.
    """
    n_tensors, n_levels = cost.shape
    pick_one = np.kron(np.eye(n_tensors), np.ones((1, n_levels)))
    solution = milp(
        np.asarray(loss, np.float64).ravel() / max(np.abs(loss).max(), 1e-30),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, (cost > 0).ravel().astype(float)),
        constraints=[LinearConstraint(pick_one, 1, 1), LinearConstraint(cost.reshape(1, -1).astype(float), 0, budget)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60},
    )
    if solution.x is None:
        raise ValueError(f"no allocation fits the budget ({solution.message}); choose a larger one.")
    return solution.x.reshape(n_tensors, n_levels).argmax(axis=1)


def _nearest(valid: np.ndarray, level: int) -> int:
    levels = np.flatnonzero(valid)
    below = levels[levels <= level]
    return int(below[-1] if below.size else levels[0])

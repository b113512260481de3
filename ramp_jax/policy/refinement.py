"""Search by true evaluations that a table guides: the evaluator `mixed` for one budget, without learning.

Generation by generation the estimated table is corrected by what was measured (`table_correction.py`), and says which
allocations to measure next: the optimum that exchanges reach under it, and the best of many mutants of the best one so
far. Some mutants are measured whatever it says of them, since it knows nothing of errors that meet.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ramp_jax.allocators import Actions, Allocator, Cost, Loss, Problem
from ramp_jax.allocators.allocator import estimated_optimum, tables, true_loss
from ramp_jax.allocators.evolution import mutate
from ramp_jax.allocators.tables import exchange, total
from ramp_jax.policy.table_correction import Evidence, correct_table

_EVIDENCE = 256  # best allocations that correct the table
_GENERATION, _FREE, _MUTANTS = 4, 2, 32  # evaluations at a time, how many of them go unscreened, mutants to choose from
_DRAWN = 16  # of so many true evaluations, one goes to a draw


def refine(allocator: Allocator, evaluations: int) -> Allocator:
    """The allocator whose choice goes on by up to `evaluations` true evaluations, its own choice the first of them.

    The optimum of the estimate and some of what the allocator draws come next, then `search` goes on. Its choice raises
    `ValueError` where a problem cannot be evaluated.
    """

    def choose(problem: Problem, budget: int) -> Actions:
        first = [allocator.choose(problem, budget), estimated_optimum(problem, budget)]
        start = [*first, *allocator.draw(problem, budget, evaluations // _DRAWN)]
        evaluate = true_loss(problem)
        return search(*tables(problem), budget, evaluate=evaluate, evaluations=evaluations, start=start)

    name, spent = f"{allocator.name}, refined", allocator.evaluations + evaluations
    sees = "estimates" if allocator.sees == "sizes" else allocator.sees
    return dataclasses.replace(allocator, name=name, choose=choose, sees=sees, evaluations=spent)


def search(
    cost: Cost,
    loss: Loss,
    budget: int,
    *,
    evaluate: Callable[[Actions], float],
    evaluations: int,
    start: Sequence[Actions],
    seed: int = 0,
) -> Actions:
    """The least true loss that up to `evaluations` calls of `evaluate` find; those of `start` come first.

    `loss` is the estimated table. No allocation is evaluated twice; the search ends early where it finds no new one.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], float] = {}
    proposed = list(start)
    while len(found) < evaluations:
        new = list(dict.fromkeys(key for action in proposed if (key := tuple(map(int, action))) not in found))
        if not new:
            break
        for key in new[: evaluations - len(found)]:
            found[key] = evaluate(np.asarray(key))
        ranked = sorted(found, key=found.__getitem__)
        table = np.asarray(correct_table(jnp.asarray(loss, jnp.float32), _evidence(found, ranked)), np.float64)
        proposed = _propose(cost, table, budget, np.asarray(ranked[0]), found, rng)
    return np.asarray(min(found, key=found.__getitem__))


def _propose(
    cost: Cost, table: Loss, budget: int, best: Actions, found: dict[tuple[int, ...], float], rng: np.random.Generator
) -> list[Actions]:
    """One generation: the exchanged optimum of the table, some mutants as they come, and those that it likes best."""
    mutants = [mutate(cost, budget, best, rng) for _ in range(_MUTANTS)]
    fresh = list({key: m for m in mutants if (key := tuple(map(int, m))) not in found}.values())
    liked = sorted(fresh[_FREE:], key=lambda m: total(table, m))
    optimum = exchange(cost, table, budget, best)
    first = [optimum] if tuple(map(int, optimum)) not in found else []
    return (first + fresh[:_FREE] + liked)[:_GENERATION]


def _evidence(found: dict[tuple[int, ...], float], ranked: list[tuple[int, ...]]) -> Evidence:
    """The best allocations, in a fixed number of places, so that the correction is compiled once."""
    keys = [key for key in ranked[:_EVIDENCE] if np.isfinite(found[key])]
    action = np.zeros((_EVIDENCE, len(ranked[0])), np.int32)
    measured = np.zeros(_EVIDENCE, np.float32)
    if keys:
        action[: len(keys)], measured[: len(keys)] = keys, [found[key] for key in keys]
    return Evidence(jnp.asarray(action), jnp.asarray(measured))

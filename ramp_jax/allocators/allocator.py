"""What an allocator may know, and the record that all of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.allocation import ALIGNMENT, Costs
from ramp_jax.allocators.evolution import evolution
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.allocators.simple import greedy, random, uniform
from ramp_jax.allocators.tables import Actions, Cost, Loss, Pairs, exchange, total_loss
from ramp_jax.checkpoint import digest
from ramp_jax.models import DecoderSpec, Model, allocatable
from ramp_jax.overrides import format_at
from ramp_jax.sensitivity.table import Sensitivity

Sees = Literal["sizes", "estimates", "embeddings"]
"""How much of a problem an allocator looks at, each more than the one before; nobody has to find out the rest."""

MIX = "llama.cpp"
"""Name of the allocator that takes the largest of llama.cpp's own mixes that fits (`halo/llama_quantize.py`)."""

FOLD_LEVEL = 4.5
"""Level of Scale Folding for whom no training decided it."""


class Problem(NamedTuple):
    """What an allocator may know of a model: nothing that needs an evaluation of it, but for `evaluate`."""

    embedding: Float[Array, "T E"]
    weights: Float[Array, " T"]
    """Weights per tensor."""
    cost: Int[Array, "T A"]
    """Units of the tensor's data at each level, 0 where the level is masked."""
    expected: Float[Array, "T A"]
    """What each level is estimated to lose, up to one factor for the whole model."""
    pairs: Float[Array, "T A T A"] | None = None
    """What two tensors at two levels are estimated to lose beyond that; no observation shows it, repair looks at it."""
    unit: Float[Array, ""] | float = float(ALIGNMENT)
    """Bytes of a unit."""
    evaluate: Callable[[Actions], float] | None = None
    """What an allocation truly loses, for whoever may ask; a problem that has it is no argument of jitted functions."""
    model: Model | None = None
    """Whose tensors these are, for whoever asks another program; likewise."""
    importance: Mapping[str, Float[np.ndarray, " I"]] | None = None
    """Mean squared input of each tensor's channels, by name; likewise."""


def _draw_none(problem: Problem, budget: int, count: int) -> list[Actions]:
    return []


@dataclasses.dataclass(frozen=True)
class Allocator:
    """A way of choosing: `choose` maps a problem and a budget in its units to one index into `levels` per tensor.

    The model is folded for `fold_level` first, unless that is None. `evaluations` counts the calls of
    `Problem.evaluate` that a choice may make, `seconds` what it needed of the model beforehand (a measured table).
    `draw` proposes allocations that a search may start from beside the choice. A level may be a format's name. `sha256`
    is that of the policy or the table that chooses, where there is one. `reach` is the smallest and the largest file in
    bytes that it can choose, where that is less than its levels allow.
    """

    name: str
    levels: tuple[float | str, ...]
    fold_level: float | None
    choose: Callable[[Problem, int], Actions]
    sees: Sees = "embeddings"
    evaluations: int = 0
    seconds: float = 0.0
    draw: Callable[[Problem, int, int], list[Actions]] = _draw_none
    sha256: str | None = None
    reach: Callable[[Model, Costs], tuple[int, int]] = lambda model, table: (table.smallest, table.largest)


def estimated_optimum(problem: Problem, budget: int) -> Actions:
    """Least estimated loss: the exact knapsack of single losses and, where pairs are known, exchanges from there."""
    optimum, pairs = knapsack(*tables(problem), budget), pairs_of(problem)
    return optimum if pairs is None else exchange(*tables(problem), budget, optimum, pairs)


RULES: Mapping[str, Callable[[Problem, int], Actions]] = {
    "fisher": estimated_optimum,
    "greedy": lambda problem, budget: greedy(*tables(problem), budget),
    "uniform": lambda problem, budget: uniform(*tables(problem), budget),
    "random": lambda problem, budget: random(*tables(problem), budget),
}
"""Choices that need neither training nor evaluations, by name."""


def has_own_levels(source: str | Path) -> bool:
    """Whether who is named by `source` chooses among levels of its own: llama.cpp's mixes and measured tables."""
    return source == MIX or Path(source).suffix == ".npz"


def by_rule(name: str, levels: tuple[float | str, ...]) -> Allocator:
    """One of `RULES` over these levels."""
    return Allocator(
        name, levels, FOLD_LEVEL, RULES[name], sees="sizes" if name in ("uniform", "random") else "estimates"
    )


def by_evolution(levels: tuple[float | str, ...], evaluations: int) -> Allocator:
    """Evolution from the uniform allocation; its choice raises `ValueError` where a problem cannot be evaluated."""

    def choose(problem: Problem, budget: int) -> Actions:
        return evolution(*tables(problem), budget, evaluate=true_loss(problem), evaluations=evaluations)

    return Allocator("evolution", levels, FOLD_LEVEL, choose, sees="sizes", evaluations=evaluations)


def by_formats(
    name: str,
    spec: DecoderSpec,
    formats: Mapping[str, str],
    levels: tuple[float | str, ...],
    *,
    fold_level: float | None = None,
) -> Allocator:
    """The given formats of a model's tensors, whatever the budget; a search goes on from there among `levels` as well.

    A format that no level means for its row is a level of its own.
    """
    members = allocatable(spec)
    meant = [{level: format_at(level, tensor) for level in levels} for tensor in members]
    of_level = [{fmt.name: level for level, fmt in by_level.items() if fmt is not None} for by_level in meant]
    wanted = [known.get(formats[t.name], formats[t.name]) for t, known in zip(members, of_level, strict=True)]
    for tensor, level in zip(members, wanted, strict=True):
        if format_at(level, tensor) is None:
            raise ValueError(f"{tensor.name} is {level}, which needs importance that only matrices of blocks have.")
    every = (*levels, *sorted({level for level in wanted if isinstance(level, str)} - set(levels)))
    actions = np.asarray([every.index(level) for level in wanted])
    return Allocator(name, every, fold_level, lambda problem, budget: actions, sees="sizes")


def by_table(table: Sensitivity) -> Allocator:
    """The knapsack of a table that was measured on the model; its choice raises `ValueError` for another model's."""

    def choose(problem: Problem, budget: int) -> Actions:
        cost, _ = tables(problem)
        if problem.model is not None:
            check_measured_on(table, tuple(tensor.name for tensor in allocatable(problem.model.spec)))
        elif len(cost) != len(table.tensors):
            check_measured_on(table, ("",) * len(cost))
        return knapsack(cost, table.kld, budget)

    return Allocator(
        "knapsack", table.levels, FOLD_LEVEL, choose, sees="sizes", seconds=table.seconds, sha256=digest(table.kld)
    )


def check_measured_on(table: Sensitivity, names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless a table has exactly the tensors of a model, by their `names` in forward order."""
    if names != table.tensors:
        raise ValueError(
            f"the table was measured on another model, with {len(table.tensors)} tensors where this one has "
            f"{len(names)}; measure one with launch/train.py."
        )


def tables(problem: Problem) -> tuple[Cost, Loss]:
    """Units and estimated loss of each level, on the host."""
    return np.asarray(problem.cost, np.int64), np.asarray(problem.expected, np.float64)


def pairs_of(problem: Problem) -> Pairs | None:
    """What pairs are estimated to lose, on the host."""
    return None if problem.pairs is None else np.asarray(problem.pairs, np.float64)


def expected_loss(problem: Problem, actions: Actions) -> float:
    """What an allocation is estimated to lose, pairs included."""
    return total_loss(tables(problem)[1], actions, pairs_of(problem))


def changes(problem: Problem, actions: Actions) -> Loss:
    """What an allocation is estimated to lose more, pairs included, if one tensor alone took each of its levels."""
    loss, pairs, rows = tables(problem)[1], pairs_of(problem), np.arange(actions.size)
    beside = loss if pairs is None else loss + pairs[:, :, rows, actions].sum(axis=-1)
    return beside - beside[rows, actions][:, None]


def true_loss(problem: Problem) -> Callable[[Actions], float]:
    """`problem.evaluate`; raises `ValueError` where there is none."""
    if problem.evaluate is None:
        raise ValueError("the allocator needs true evaluations of the model; pass `evaluate`.")
    return problem.evaluate

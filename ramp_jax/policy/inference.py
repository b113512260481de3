"""A trained policy: how it is saved, and how it allocates for a model it may never have seen."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from ramp_jax import schema
from ramp_jax.allocation import Allocation, Choice, Costs, FoldLevel, Levels, check_budget, costs, from_actions
from ramp_jax.allocators import Actions, Allocator, Problem
from ramp_jax.allocators.allocator import (
    MIX,
    RULES,
    Sees,
    by_evolution,
    by_rule,
    by_table,
    changes,
    estimated_optimum,
    expected_loss,
    has_own_levels,
    pairs_of,
    tables,
)
from ramp_jax.allocators.tables import exchange, fill
from ramp_jax.checkpoint import digest
from ramp_jax.files import write_bytes
from ramp_jax.formats import LEVELS, ordered, written
from ramp_jax.halo import llama_quantize
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import Model, allocatable
from ramp_jax.overrides import Override
from ramp_jax.policy import embedding, networks
from ramp_jax.policy.env import CONTEXT, Process
from ramp_jax.policy.networks import Params
from ramp_jax.policy.refinement import refine
from ramp_jax.policy.train import greedy, sample
from ramp_jax.quantization import Stats, importance_of
from ramp_jax.sensitivity.table import Sensitivity

POLICY_FILE = "policy.msgpack"
_MOST_DOUBT = 1.15  # of its own optimum, that the estimate may expect a policy's choice to lose

PRETRAINED = "pretrained"
"""Name of the policy that comes with the package; configs/pretrained.py made it."""
EVOLUTION = "evolution"
"""Name of the allocator that knows nothing but true evaluations."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """An actor and what it was trained for: `trained_on` names the models, `levels` what it chose among there, and
    `fold_level` is the level of Scale Folding. It can choose among any others."""

    actor: Params
    hidden: tuple[int, ...]
    levels: tuple[float | str, ...]
    fold_level: float
    trained_on: tuple[str, ...]
    embedding_version: int = embedding.VERSION

    def save(self, folder: str | Path) -> None:
        """Write `policy.msgpack` into `folder`, the fields of `_Saved`."""
        content = self._plain()
        write_bytes(Path(folder) / POLICY_FILE, serialization.msgpack_serialize(content | {"sha256": digest(content)}))

    def _plain(self) -> dict[str, Any]:
        content = {**vars(self), "actor": jax.tree.map(np.asarray, self.actor)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}

    def allocator(self, levels: tuple[float | str, ...] | None = None) -> Allocator:
        """The policy as one way of choosing among others, by default among the numbered levels of its training.

        Formats by name are left to whoever knows how many bits there are, and that what rounds them has importance.
        """
        numbered = tuple(level for level in self.levels if not isinstance(level, str))
        name = f"policy trained on {' '.join(self.trained_on)}"
        chosen, drawn = functools.partial(choose, self), functools.partial(draw, self)
        return Allocator(
            name, levels or numbered or self.levels, self.fold_level, chosen, draw=drawn, sha256=digest(self._plain())
        )


class _Saved(TypedDict):
    """What a policy's file holds; `sha256` is the digest of all other fields."""

    actor: Any
    hidden: networks.Widths
    levels: Levels
    fold_level: FoldLevel
    trained_on: tuple[schema.Name, ...]
    embedding_version: int
    sha256: NotRequired[schema.Sha256]


def load_policy(source: str | Path) -> Policy:
    """The policy in a training run's workdir, or the one that comes with the package for `pretrained`.

    Raises `FileNotFoundError` where there is none, `ValueError` for a damaged file or another embedding version.
    """
    source = Path(__file__).with_name(PRETRAINED) if source == PRETRAINED else Path(source)
    path = source / POLICY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{source} holds no {POLICY_FILE}; train one with launch/train.py --workdir={source}.")
    with schema.gate(path, "a policy of this program", "delete it and train it again"):
        content = serialization.msgpack_restore(schema.content(path))
        saved: _Saved = schema.read(_Saved, content)
        if saved["embedding_version"] != embedding.VERSION:
            raise ValueError(
                f"it was trained on version {saved['embedding_version']} of the embedding, this program computes "
                f"version {embedding.VERSION}"
            )
        if saved.pop("sha256", found := digest({**content, "sha256": None})) != found:
            raise ValueError("it is not as it was written, its sha256 is another")
        _check_actor(saved["actor"], saved["hidden"])
        values: dict[str, Any] = {**saved, "actor": jax.tree.map(jnp.asarray, saved["actor"])}
        return Policy(**values)


def _check_actor(actor: Any, hidden: tuple[int, ...]) -> None:
    """Raise `ValueError` unless these are the finite f32 weights of an actor that sees what this program shows."""
    shown = len(embedding.NAMES) + CONTEXT
    network = networks.actor(hidden)
    expected = jax.eval_shape(lambda: network.init(jax.random.key(0), shown))
    found, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (actor, expected))
    for path in wanted | found:
        have, want = found.get(path), wanted.get(path)
        fits = want is not None and isinstance(have, np.ndarray)
        if not fits or (have.shape, have.dtype) != (want.shape, want.dtype):
            raise ValueError(f"by its {_name(path)} it is no network of the {shown} numbers that this program shows it")
        if not np.isfinite(have).all():
            raise ValueError(f"its {_name(path)} is not finite")
    if jax.tree.structure(actor) != jax.tree.structure(expected):
        raise ValueError("it has empty parts beside those of a network")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def problem(
    model: Model,
    stats: Stats,
    levels: tuple[Any, ...],
    table: Costs | None = None,
    *,
    sees: Sees = "embeddings",
    journal: Journal = NOWHERE,
) -> Problem:
    """The decision process of `model`, whose tensors are embedded as they are (fold first).

    What nobody `sees` is 0: without estimates no backward pass is made, without embeddings no sweep over the folded
    weights.
    """
    table = costs(model, levels) if table is None else table
    members = allocatable(model.spec)
    found = Problem(
        jnp.zeros((len(members), len(embedding.NAMES))),
        jnp.asarray([tensor.size for tensor in members], jnp.float32),
        jnp.asarray(table.in_units, jnp.int32),
        jnp.zeros((len(members), len(levels))),
        unit=float(table.unit),
    )
    if sees == "sizes":
        return found
    measured = tuple(sorted({*levels, embedding.LOSS_LEVEL}, key=lambda level: (isinstance(level, str), level)))
    estimate = embedding.estimated(model, stats, measured, journal)
    loss, mine = estimate.loss, [measured.index(level) for level in levels]
    if sees == "embeddings":
        embedded = embedding.embed(model, stats, loss[:, measured.index(embedding.LOSS_LEVEL)])
        found = found._replace(embedding=jnp.asarray(embedded))
    return found._replace(
        expected=jnp.asarray(loss[:, mine], jnp.float32),
        pairs=jnp.asarray(estimate.pairs[:, mine][..., mine]),
    )


def find_allocator(
    source: str | Path, *, levels: Sequence[float | str] | None = None, evaluations: int = 0
) -> Allocator:
    """The allocator that `source` names, refined by `evaluations` true evaluations where there are any.

    `fisher`, `greedy`, `uniform` and `random` choose among `levels`, by default all that have numbers, and so does
    `evolution`, which spends the evaluations itself. `llama.cpp` takes the largest of llama.cpp's own mixes that fits.
    An `.npz` is a sensitivity table of the model, of which the knapsack is taken. All else is what `load_policy` finds,
    which chooses among `levels`, by default those with numbers of its training. Raises `ValueError` for evolution
    without evaluations, for llama.cpp with them or with levels, and where a table has other levels.
    """
    chosen = LEVELS if levels is None else ordered(levels)
    if source == MIX:
        if levels is not None or evaluations:
            raise ValueError(
                "llama.cpp's mixes choose among formats of their own; leave --levels and --refine_evals out."
            )
        return llama_quantize.mix_allocator()
    if source == EVOLUTION:
        if not evaluations:
            raise ValueError("evolution searches by true evaluations; say how many with --refine_evals=N.")
        return by_evolution(chosen, evaluations)
    if source in RULES:
        found = by_rule(str(source), chosen)
    elif has_own_levels(source):
        found = by_table(Sensitivity.load(source))
        if levels is not None and found.levels != chosen:
            raise ValueError(
                f"the table was measured for levels {_list(found.levels)}, not {_list(chosen)}; ask for its levels."
            )
    else:
        found = load_policy(source).allocator(None if levels is None else chosen)
    return refine(found, evaluations) if evaluations else found


def allocate(
    source: Policy | Allocator,
    model: Model,
    stats: Stats,
    *,
    budget_bytes: int,
    overrides: Sequence[Override] = (),
    evaluate: Callable[[Actions], float] | None = None,
    evaluations: int = 0,
    journal: Journal = NOWHERE,
) -> Allocation:
    """What a policy or any other allocator chooses for `model` (folded as it is to be quantized) and `budget_bytes`.

    `overrides` decide about single tensors before. With `evaluations`, that many calls of `evaluate` refine it, a loss
    of level indices in forward order (as of `variants.measuring`); else nothing of the model is evaluated, unless the
    allocator does. Raises `ValueError` with the reachable range where no file of that size exists, where evaluations
    are needed and `evaluate` is missing, and for overrides as `overrides.formats_of`.
    """
    allocator = source.allocator() if isinstance(source, Policy) else source
    allocator = refine(allocator, evaluations) if evaluations else allocator
    (found,) = allocations(allocator, model, stats, [budget_bytes], overrides, evaluate=evaluate, journal=journal)
    return found


def allocations(
    allocator: Allocator,
    model: Model,
    stats: Stats,
    budgets: Sequence[int],
    overrides: Sequence[Override] = (),
    *,
    evaluate: Callable[[Actions], float] | None = None,
    journal: Journal = NOWHERE,
) -> list[Allocation]:
    """As `allocate`, for several budgets in bytes, of one look at the model."""
    table = costs(model, allocator.levels, overrides)
    for budget_bytes in budgets:
        check_budget(allocator.reach(model, table), budget_bytes)
    known = problem(model, stats, allocator.levels, table, sees=allocator.sees, journal=journal)
    known = known._replace(evaluate=evaluate, model=model, importance=importance_of(model.spec, stats))
    chosen = [allocator.choose(known, table.units(budget_bytes)) for budget_bytes in budgets]
    return [_allocation(allocator, known, table, model, actions) for actions in chosen]


def _allocation(allocator: Allocator, known: Problem, table: Costs, model: Model, actions: Actions) -> Allocation:
    """The allocation of level indices, with what there was to choose among."""
    found = from_actions(model, table, actions)
    choices: dict[str, dict[str, Choice]] = {tensor.name: {} for tensor in allocatable(model.spec)}
    predicted = {} if allocator.sees == "sizes" else {"predicted_kld": max(0.0, expected_loss(known, actions))}
    loss, change = tables(known)[1], changes(known, actions)
    for t, tensor in enumerate(allocatable(model.spec)):
        for a, fmt in enumerate(table.formats[tensor.name]):
            if fmt is not None:
                choice: Choice = {"bytes": int(table.per_level[t, a])}
                if predicted:
                    choice.update(loss=_rounded(loss[t, a]), change=_rounded(change[t, a]))
                choices[tensor.name][fmt] = choice
    return dataclasses.replace(found, made={**found.made, **predicted, "choices": choices})


def _rounded(nats: float) -> float:
    """A prediction has fewer digits that mean something."""
    return float(f"{nats:.5g}")


def choose(policy: Policy, known: Problem, units: int, *, repair: bool = True) -> Actions:
    """Level indices for a budget: the actor's most probable actions and, with `repair`, exchanges from there.

    Repair spends what is left of the budget, and lets pairs of tensors trade levels where the estimate expects that to
    save: on a model unlike those it was trained on, an actor can starve a tensor that it should not. No trade of two
    gives back what a large embedding took from all others, so where the estimate expects the end to lose far more than
    its own optimum does, that optimum is taken.
    """
    action = np.asarray(greedy(policy.actor, process(known), jnp.int32(units), policy.hidden))
    if not repair:
        return action
    repaired = exchange(*tables(known), units, action, pairs_of(known))
    optimum = estimated_optimum(known, units)
    return repaired if expected_loss(known, repaired) <= _MOST_DOUBT * expected_loss(known, optimum) else optimum


def draw(policy: Policy, known: Problem, units: int, count: int, seed: int = 0) -> list[Actions]:
    """`count` allocations drawn from the actor's probabilities, what is left spent."""
    keys = jax.random.split(jax.random.key(seed), count)
    actions = np.asarray(sample(policy.actor, process(known), jnp.int32(units), keys, policy.hidden))
    return [fill(*tables(known), units, action) for action in actions]


def process(known: Problem) -> Process:
    """What a policy sees of a problem."""
    return Process(**{name: getattr(known, name) for name in Process._fields})


def _list(levels: Sequence[float | str]) -> str:
    return ",".join(map(written, levels))

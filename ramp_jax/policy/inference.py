"""A trained policy: how it is saved, and how it allocates for a model it may never have seen."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jaxtyping import Float, Int

from ramp_jax import baselines
from ramp_jax.allocation import Allocation, Costs, check_budget, costs, from_levels
from ramp_jax.baselines import Actions
from ramp_jax.checkpoint import write_bytes
from ramp_jax.formats import LEVELS
from ramp_jax.models import Model, allocatable
from ramp_jax.policy import embedding, networks
from ramp_jax.policy.env import CONTEXT, Problem
from ramp_jax.policy.networks import Params
from ramp_jax.policy.search import search
from ramp_jax.policy.train import greedy, sample
from ramp_jax.quantization import Stats

POLICY_FILE = "policy.msgpack"
_MOST_DOUBT = 1.15  # of its own optimum, that the estimate may expect a policy's choice to lose
_DRAWN = 16  # of so many true evaluations, one goes to a draw

PRETRAINED = "pretrained"
"""Name of the policy that comes with the package; configs/pretrained.py made it."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """An actor and what it was trained for. `trained_on` names the models, `fold_level` the level of Scale Folding."""

    actor: Params
    hidden: tuple[int, ...]
    levels: tuple[float, ...]
    fold_level: float
    trained_on: tuple[str, ...]
    embedding_version: int = embedding.VERSION

    def save(self, folder: str | Path) -> None:
        """Write `policy.msgpack` into `folder`."""
        content = {**vars(self), "actor": jax.tree.map(np.asarray, self.actor)}
        tuples = {name: list(value) for name, value in content.items() if isinstance(value, tuple)}
        write_bytes(Path(folder) / POLICY_FILE, serialization.msgpack_serialize(content | tuples))


def load_policy(source: str | Path) -> Policy:
    """The policy in a training run's workdir, or the one that comes with the package for `pretrained`.

    Raises `FileNotFoundError` where there is none, `ValueError` for a damaged file or another embedding version.
    """
    source = Path(__file__).with_name(PRETRAINED) if source == PRETRAINED else Path(source)
    path = source / POLICY_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{source} holds no {POLICY_FILE}; train one with launch/train.py --workdir={source}.")
    try:
        content = serialization.msgpack_restore(path.read_bytes())
        tuples = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        policy = Policy(**{**content, **tuples, "actor": jax.tree.map(jnp.asarray, content["actor"])})
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); train the policy again.") from error
    if policy.embedding_version != embedding.VERSION:
        raise ValueError(
            f"the policy in {source} was trained on version {policy.embedding_version} of the embedding, this program "
            f"computes version {embedding.VERSION}; train it again."
        )
    shown = len(embedding.NAMES) + CONTEXT + len(policy.levels)
    network = networks.actor(policy.hidden, len(policy.levels))
    expected = jax.eval_shape(lambda: network.init(jax.random.key(0), shown))
    if _shapes(policy.actor) != _shapes(expected):
        raise ValueError(
            f"the policy in {source} is no network of the {shown} numbers that this program shows it; train it again."
        )
    return policy


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def problem(model: Model, stats: Stats, levels: tuple[float, ...], table: Costs | None = None) -> Problem:
    """The decision process of `model`, whose tensors are embedded as they are (fold first)."""
    table = costs(model, levels) if table is None else table
    measured = tuple(sorted({*levels, embedding.LOSS_LEVEL}))
    estimate = embedding.estimated(model, stats, measured)
    loss, mine = estimate.loss, [measured.index(level) for level in levels]
    return Problem(
        jnp.asarray(embedding.embed(model, stats, loss[:, measured.index(embedding.LOSS_LEVEL)])),
        jnp.asarray([tensor.size for tensor in allocatable(model.spec)], jnp.float32),
        jnp.asarray(table.in_units, jnp.int32),
        jnp.asarray(levels, jnp.float32),
        jnp.asarray(loss[:, mine], jnp.float32),
        jnp.asarray(estimate.pairs[:, mine][..., mine]),
        float(table.unit),
    )


def allocate(
    policy: Policy | None,
    model: Model,
    stats: Stats,
    *,
    budget_bytes: int,
    evaluate: Callable[[Actions], float] | None = None,
    evaluations: int = 0,
) -> Allocation:
    """The policy's allocation of `model` (folded as it is to be quantized) for a file of at most `budget_bytes`.

    Without a policy it is the optimum of the estimated losses over all levels (`estimated_optimum`). With
    `evaluations`, that many calls of `evaluate` refine it, a loss of level indices in forward order (as of
    `variants.measuring`); else nothing of the model is evaluated. Raises `ValueError` with the reachable range where no
    file of that size exists.
    """
    levels = LEVELS if policy is None else policy.levels
    table = costs(model, levels)
    check_budget(table, budget_bytes)
    known, units = problem(model, stats, levels, table), table.units(budget_bytes)

    def allocation(action: Actions) -> Allocation:
        return from_levels(model, [levels[a] for a in action])

    if evaluations and evaluate is not None:
        return allocation(refine(policy, known, units, evaluate, evaluations))
    return allocation(estimated_optimum(known, units) if policy is None else choose(policy, known, units))


def choose(policy: Policy, known: Problem, units: int, *, repair: bool = True) -> Actions:
    """Level indices for a budget: the actor's most probable actions and, with `repair`, exchanges from there.

    Repair spends what is left of the budget, and lets pairs of tensors trade levels where the estimate expects that to
    save: on a model unlike those it was trained on, an actor can starve a tensor that it should not. No trade of two
    gives back what a large embedding took from all others, so where the estimate expects the end to lose far more than
    its own optimum does, that optimum is taken.
    """
    action = np.asarray(greedy(policy.actor, known, jnp.int32(units), policy.hidden))
    if not repair:
        return action
    repaired = baselines.exchanged(*_tables(known), units, action, _pairs(known))
    optimum = estimated_optimum(known, units)
    return repaired if _expected(known, repaired) <= _MOST_DOUBT * _expected(known, optimum) else optimum


def draw(policy: Policy, known: Problem, units: int, count: int, seed: int = 0) -> list[Actions]:
    """`count` allocations drawn from the actor's probabilities, what is left spent."""
    keys = jax.random.split(jax.random.key(seed), count)
    actions = np.asarray(sample(policy.actor, known, jnp.int32(units), keys, policy.hidden))
    return [baselines.filled(*_tables(known), units, action) for action in actions]


def estimated_optimum(known: Problem, units: int) -> Actions:
    """Least estimated loss: the exact knapsack of single losses and, where pairs are known, exchanges from there."""
    optimum = baselines.knapsack(*_tables(known), units)
    return optimum if known.pairs is None else baselines.exchanged(*_tables(known), units, optimum, _pairs(known))


def refine(
    policy: Policy | None, known: Problem, units: int, evaluate: Callable[[Actions], float], evaluations: int
) -> Actions:
    """The least true loss that `evaluations` calls of `evaluate` find, the choice without them among them.

    The optimum of the estimate and some allocations drawn from the policy come first, then `search` goes on.
    """
    start = [estimated_optimum(known, units)]
    if policy is not None:
        start = [choose(policy, known, units), *start, *draw(policy, known, units, evaluations // _DRAWN)]
    return search(*_tables(known), units, evaluate=evaluate, evaluations=evaluations, start=start)


def _tables(known: Problem) -> tuple[Int[np.ndarray, "T A"], Float[np.ndarray, "T A"]]:
    return np.asarray(known.cost, np.int64), np.asarray(known.expected, np.float64)


def _expected(known: Problem, action: Actions) -> float:
    return baselines.total_loss(np.asarray(known.expected, np.float64), action, _pairs(known))


def _pairs(known: Problem) -> Float[np.ndarray, "T A T A"] | None:
    return None if known.pairs is None else np.asarray(known.pairs, np.float64)


def check_levels(policy: Policy, levels: tuple[float, ...]) -> None:
    """Raise `ValueError` where a policy chooses among other levels than those asked for."""
    if policy.levels != levels:
        raise ValueError(
            f"the policy was trained for levels {_list(policy.levels)}, not {_list(levels)}; "
            f"ask for its levels or train a policy with --config.levels={_list(levels)}."
        )


def _list(levels: tuple[float, ...]) -> str:
    return ",".join(f"{level:g}" for level in levels)

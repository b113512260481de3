"""The decision process: one step per weight matrix in forward order, the action is its level.

Everything is an array; nothing here knows a model. T tensors, A levels, S numbers of the state and F of every action
that an observation shows. What a level is called is nowhere: an action is known by its bits per weight and by what it
is estimated to lose, so that who learned on some formats can be shown others. Sizes are int32
counts of a process's unit: 32 bytes, the alignment to which a GGUF file pads every tensor, so files of up to 64 GiB are
counted exactly; larger ones in a multiple of it, such that the largest allocation is below 2³¹ units
(`allocation.Costs`). Every sum and difference here then lies between −2³¹ and 2³¹.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ramp_jax.policy.lagrangian import from_here_on, lagrangian_bound, lookahead, symlog, unit_of_loss

CONTEXT = 6
"""Numbers of a state beside the embedding: of the whole budget and of what is left of it the bits per weight and the
place between the smallest and the largest completion, the bits per weight of the last choice, and the progress."""

ACTION = 3
"""Numbers of an action: its bits per weight, its estimated loss, and its regret, by how much the least loss that is
estimated to be reachable after it exceeds that after the best one. Losses are in mean losses of a tensor at the optimum
and compressed as rewards are. All are 0 where the action is masked."""

_MOST = 10.0  # of a compressed loss or regret


class Process(NamedTuple):
    """What the policy sees of a model."""

    embedding: Float[Array, "T E"]
    weights: Float[Array, " T"]
    """Weights per tensor."""
    cost: Int[Array, "T A"]
    """Units of the tensor's data at each level, 0 where the level is masked."""
    expected: Float[Array, "T A"]
    """What each level is estimated to lose, up to one factor for the whole model."""
    unit: Float[Array, ""] | float
    """Bytes of a unit."""


class Observation(NamedTuple):
    """What is shown before a choice: the `state`, which is the tensor's embedding and `CONTEXT` numbers, and `ACTION`
    numbers of each of the `actions`."""

    state: Float[Array, "*batch S"]
    actions: Float[Array, "*batch A F"]


class Episode(NamedTuple):
    """One finished allocation, step by step `[T, ...]`; `left` are the units of the budget that remain at the end."""

    observation: Observation
    mask: Bool[Array, "T A"]
    action: Int[Array, " T"]
    left: Int[Array, ""]


Choose = Callable[[PRNGKeyArray, Observation, Bool[Array, " A"]], Int[Array, ""]]


def valid_levels(process: Process) -> Bool[Array, "T A"]:
    """Which levels can hold each tensor."""
    return process.cost > 0


def cheapest_completion(process: Process) -> Int[Array, "T+1"]:
    """Units of the smallest completion from each step on; 0 at the end."""
    return from_here_on(jnp.min(jnp.where(valid_levels(process), process.cost, jnp.iinfo(jnp.int32).max), axis=1))


def costliest_completion(process: Process) -> Int[Array, "T+1"]:
    """Units of the largest completion from each step on; 0 at the end."""
    return from_here_on(jnp.max(process.cost, axis=1))


def budget_range(process: Process) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Units of the smallest and of the largest allocation."""
    return cheapest_completion(process)[0], costliest_completion(process)[0]


def rollout(
    process: Process, budget: Int[Array, ""], choose: Choose, key: PRNGKeyArray, *, soft: bool = False
) -> Episode:
    """One episode under `choose(key, observation, mask)`.

    A level after which even the cheapest completion exceeds the budget is masked, so an episode whose budget is at
    least the smallest allocation always fits; with a `soft` budget only levels that cannot hold a tensor are masked,
    and what is left may end below 0.
    """
    steps = process.cost.shape[0]
    completion, costliest = cheapest_completion(process), costliest_completion(process)
    weights_left = from_here_on(process.weights)

    bits = process.cost.astype(jnp.float32) * (8 * process.unit) / process.weights[:, None]

    def budget_context(left: jax.Array, t: jax.Array | int) -> list[jax.Array]:
        slack = (left - completion[t]) / jnp.maximum(costliest[t] - completion[t], 1)  # float32
        bits_left = left.astype(jnp.float32) * (8 * process.unit) / weights_left[t]
        return [_centered(bits_left), 2 * jnp.clip(slack, 0.0, 1.0) - 1]

    budget = jnp.asarray(budget, jnp.int32)
    target, bound = budget_context(budget, 0), lagrangian_bound(process.expected, process.cost)
    scale = steps / unit_of_loss(bound, budget)

    def actions(left: jax.Array, t: jax.Array, mask: Bool[Array, " A"]) -> Float[Array, "A F"]:
        reachable = lookahead(bound, process.expected[t], process.cost[t], left, t)
        regret = reachable - jnp.min(jnp.where(mask, reachable, jnp.inf))
        losses = (jnp.minimum(symlog(scale * loss), _MOST) for loss in (process.expected[t], regret))
        return jnp.where(mask[:, None], jnp.stack([_centered(bits[t]), *losses], axis=-1), 0.0)

    def step(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        left, last = carry
        cost = process.cost[t]
        mask = (cost > 0) & (soft | (cost <= left - completion[t + 1]))
        context = [*target, *budget_context(left, t), last, 2 * t.astype(jnp.float32) / steps - 1]
        state = jnp.concatenate([process.embedding[t], jnp.stack(context)])
        observation = Observation(state, actions(left, t, mask))
        action = choose(jax.random.fold_in(key, t), observation, mask)
        return (left - cost[action], _centered(bits[t, action])), (observation, mask, action)

    start = (budget, jnp.float32(0.0))
    (left, _), (observation, mask, action) = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return Episode(observation, mask, action, left)


def _centered(bits: jax.Array) -> jax.Array:
    """Bits per weight to the order of 1; clipped, since the last tensors of an episode may have more than enough."""
    return jnp.clip((bits - 5.0) / 2.0, -2.0, 2.0)

"""Uniform replay of transitions as device arrays: a ring of rounds, the oldest overwritten first.

A round is what one iteration plays, on whatever models: episodes of different lengths become one list of transitions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ramp_jax.policy.env import Observation


class Batch(NamedTuple):
    """Transitions `[B, ...]`; after the last step of an episode `done` is 1 and the next observation has no meaning."""

    observation: Observation
    mask: Bool[Array, "B A"]
    action: Int[Array, " B"]
    reward: Float[Array, " B"]
    next_observation: Observation
    next_mask: Bool[Array, "B A"]
    done: Float[Array, " B"]


class Replay(NamedTuple):
    """`rounds` holds up to R rounds of M transitions, leaves `[R, M, ...]`; `added` counts all that were ever added."""

    rounds: Batch
    added: Int[Array, ""]


def transitions(
    observation: Observation,
    mask: Bool[Array, "N T A"],
    action: Int[Array, "N T"],
    reward: Float[Array, "N T"],
) -> Batch:
    """N whole episodes of T steps, leaves `[N, T, ...]`, as `[N·T]` transitions."""

    def following(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf[:, 1:], leaf[:, -1:]], axis=1), tree)

    done = jnp.zeros(reward.shape, jnp.float32).at[:, -1].set(1.0)
    steps = Batch(observation, mask, action, reward, following(observation), following(mask), done)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), steps)


def empty(capacity: int, like: Batch) -> Replay:
    """A replay for `capacity` rounds shaped as `like`."""
    return Replay(jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), like), jnp.int32(0))


def add(replay: Replay, new: Batch) -> Replay:
    """Add one round."""
    place = replay.added % replay.rounds.action.shape[0]
    rounds = jax.tree.map(
        lambda old, leaf: jax.lax.dynamic_update_index_in_dim(old, leaf, place, 0), replay.rounds, new
    )
    return Replay(rounds, replay.added + 1)


def sample(replay: Replay, key: PRNGKeyArray, size: int) -> Batch:
    """`size` transitions, uniform over all that are stored, with replacement."""
    capacity, length = replay.rounds.action.shape
    round_key, step_key = jax.random.split(key)
    place = jax.random.randint(round_key, (size,), 0, jnp.minimum(replay.added, capacity))
    step = jax.random.randint(step_key, (size,), 0, length)
    return jax.tree.map(lambda leaf: leaf[place, step], replay.rounds)

"""Uniform replay of whole episodes as device arrays: a ring, oldest episodes overwritten first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Steps(NamedTuple):
    """Episodes `[N, T, ...]`: what was seen, which actions were valid, what was done and what it earned."""

    observation: Float[Array, "N T O"]
    mask: Bool[Array, "N T A"]
    action: Int[Array, "N T"]
    reward: Float[Array, "N T"]


class Batch(NamedTuple):
    """Transitions `[B, ...]`; after the last step of an episode `done` is 1 and the next observation has no meaning."""

    observation: Float[Array, "B O"]
    mask: Bool[Array, "B A"]
    action: Int[Array, " B"]
    reward: Float[Array, " B"]
    next_observation: Float[Array, "B O"]
    next_mask: Bool[Array, "B A"]
    done: Float[Array, " B"]


class Replay(NamedTuple):
    """`steps` holds up to N episodes; `added` counts all that were ever added."""

    steps: Steps
    added: Int[Array, ""]


def empty(capacity: int, like: Steps) -> Replay:
    """A replay for `capacity` episodes shaped as those of `like`."""
    steps = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), like)
    return Replay(steps, jnp.int32(0))


def add(replay: Replay, new: Steps) -> Replay:
    """Add episodes; their number must divide the capacity."""
    capacity, count = replay.steps.action.shape[0], new.action.shape[0]
    if capacity % count:
        raise ValueError(f"a replay of {capacity} episodes cannot be filled {count} at a time; make it a multiple.")
    start = replay.added % capacity
    steps = jax.tree.map(lambda old, leaf: jax.lax.dynamic_update_slice_in_dim(old, leaf, start, 0), replay.steps, new)
    return Replay(steps, replay.added + count)


def sample(replay: Replay, key: PRNGKeyArray, size: int) -> Batch:
    """`size` transitions, uniform over all that are stored, with replacement."""
    capacity, length = replay.steps.action.shape
    episode_key, step_key = jax.random.split(key)
    episode = jax.random.randint(episode_key, (size,), 0, jnp.minimum(replay.added, capacity))
    t = jax.random.randint(step_key, (size,), 0, length)
    following = jnp.minimum(t + 1, length - 1)
    now = jax.tree.map(lambda leaf: leaf[episode, t], replay.steps)
    return Batch(
        *now,
        next_observation=replay.steps.observation[episode, following],
        next_mask=replay.steps.mask[episode, following],
        done=(t == length - 1).astype(jnp.float32),
    )

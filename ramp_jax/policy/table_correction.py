"""A sensitivity table that agrees with what whole allocations were measured to lose.

The table says Σ_t s[t, a_t]; the truth differs, since errors of rounding meet and the table was measured on few tokens.
Let every entry be s (1 + δ + δ₀) with independent δ of deviation τ and one δ₀ of deviation τ₀ for all, and a measured
loss be that sum within a share σ of itself. The mean of δ and δ₀ given some measurements is a ridge regression with one
weight per entry and one for their sum, solved in as many unknowns as there are measurements.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_DEVIATION, _COMMON, _NOISE = 0.5, 0.5, 0.03  # τ, τ₀ and σ
_LEAST = 0.05  # of its table entry, that an entry keeps


class Evidence(NamedTuple):
    """Allocations and their measured losses, 0 in places that wait for one."""

    action: Int[Array, "E T"]
    loss: Float[Array, " E"]


def empty_evidence(places: int, tensors: int) -> Evidence:
    """Room for `places` measurements."""
    return Evidence(jnp.zeros((places, tensors), jnp.int32), jnp.zeros(places))


def add_evidence(evidence: Evidence, new: Evidence, start: Int[Array, ""]) -> Evidence:
    """With the measurements `new` from place `start` on."""
    return jax.tree.map(lambda old, leaf: jax.lax.dynamic_update_slice_in_dim(old, leaf, start, 0), evidence, new)


@jax.jit
def correct_table(table: Float[Array, "T A"], evidence: Evidence) -> Float[Array, "T A"]:
    """The table after the measurements, each allocation counted once; without any it is the same."""
    places = jnp.arange(len(evidence.loss))
    same = jnp.all(evidence.action[:, None] == evidence.action[None], axis=-1) & (evidence.loss > 0)[None]
    known = (evidence.loss > 0) & ~jnp.any(same & (places[None] < places[:, None]), axis=1)
    share = jnp.where(known, 1 / jnp.where(known, evidence.loss, 1.0), 0.0)[:, None, None] * table[None]
    chosen = jax.nn.one_hot(evidence.action, table.shape[1], dtype=table.dtype) * share  # [E, T, A]
    entries, total = chosen.reshape(len(known), -1), jnp.sum(chosen, axis=(1, 2))  # in units of what was measured
    kernel = _DEVIATION**2 * entries @ entries.T + _COMMON**2 * total[:, None] * total[None]
    weight = jnp.linalg.solve(kernel + _NOISE**2 * jnp.eye(len(known)), jnp.where(known, 1 - total, 0.0))
    change = _DEVIATION**2 * (weight @ entries).reshape(table.shape) + _COMMON**2 * jnp.sum(weight * total)
    return table * jnp.maximum(1 + change, _LEAST)

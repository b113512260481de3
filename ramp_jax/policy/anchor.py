"""A sensitivity table that agrees with what whole allocations were measured to lose.

The table says Σ_t s[t, a_t]; the truth differs, since errors of rounding meet and the table was measured on few tokens.
Let every entry be s (1 + δ) with independent δ of deviation τ, and a measured loss be that sum within a share σ of
itself. The mean of δ given some measurements is that of a Gaussian process whose kernel between two allocations is
τ² Σ s² over the tensors to which both give the same level: ridge regression with one weight per entry, solved in as
many unknowns as there are measurements.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ramp_jax.policy.yardstick import taken

_DEVIATION, _NOISE = 0.5, 0.1  # τ and σ
_LEAST = 0.05  # of its table entry, that an entry keeps


class Evidence(NamedTuple):
    """Allocations and their measured losses, 0 in places that wait for one."""

    action: Int[Array, "E T"]
    loss: Float[Array, " E"]


def no_evidence(places: int, tensors: int) -> Evidence:
    """Room for `places` measurements."""
    return Evidence(jnp.zeros((places, tensors), jnp.int32), jnp.zeros(places))


def noted(evidence: Evidence, new: Evidence, start: Int[Array, ""]) -> Evidence:
    """With the measurements `new` from place `start` on."""
    return jax.tree.map(lambda old, leaf: jax.lax.dynamic_update_slice_in_dim(old, leaf, start, 0), evidence, new)


@jax.jit
def anchored(table: Float[Array, "T A"], evidence: Evidence) -> Float[Array, "T A"]:
    """The table after the measurements; without any it is the same."""
    known = evidence.loss > 0
    per_loss = jnp.where(known, 1 / jnp.where(known, evidence.loss, 1.0), 0.0)
    entries = jax.vmap(taken, (None, 0))(table, evidence.action)  # [E, T]
    same = evidence.action[:, None] == evidence.action[None]  # [E, E, T]
    kernel = _DEVIATION**2 * jnp.einsum("et,ft,eft->ef", entries, entries, same.astype(table.dtype))
    kernel *= per_loss[:, None] * per_loss[None]
    off = jnp.where(known, 1 - per_loss * jnp.sum(entries, axis=1), 0.0)
    weight = jnp.linalg.solve(kernel + _NOISE**2 * jnp.eye(len(known)), off) * per_loss
    chosen = jax.nn.one_hot(evidence.action, table.shape[1], dtype=table.dtype)  # [E, T, A]
    change = _DEVIATION**2 * jnp.einsum("e,et,eta->ta", weight, entries, chosen)
    return table * jnp.maximum(1 + change, _LEAST)

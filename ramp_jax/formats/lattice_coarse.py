"""Coarse codes of the lattice formats: a few scales, the nearest of all points under each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ramp_jax.formats.codes import SuperScaledCodes
from ramp_jax.formats.lattice import Lattice
from ramp_jax.formats.rounding import clip, reciprocal, round_half_even, rounded_to_f16, to_f16
from ramp_jax.formats.superblocks import sub_blocks, whole


def coarse_codes(
    x: Float[Array, "256 N"],
    weight: Float[Array, "256 N"],
    lattice: Lattice,
    search: Callable[[jax.Array, jax.Array], jax.Array],
    reaches: tuple[float, ...],
) -> SuperScaledCodes:
    """Scales of sub-blocks as the best of few, the nearest points under these, and again under what is stored.

    `search(v, weight)` finds the codes nearest to v `[together, *n]`; `reaches` are where the largest weight of a
    sub-block comes to lie, of the largest code.
    """
    subs, weight = (sub_blocks(a, lattice.sub) for a in (x, weight))  # [E, S, N]
    largest = jnp.max(jnp.abs(subs), axis=0)

    def points(step: jax.Array) -> jax.Array:
        both = subs * reciprocal(step)[None], weight
        groups = [a.reshape(-1, lattice.together, *largest.shape).swapaxes(0, 1) for a in both]
        return search(*groups).swapaxes(0, 1).reshape(subs.shape)

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q = points(largest / (jnp.asarray(reaches, jnp.float32)[i] * lattice.largest))
        xq, qq = jnp.sum(weight * subs * q, axis=0), jnp.sum(weight * q * q, axis=0)
        better = xq * xq > best[0] * qq
        return jnp.where(better, xq * xq / qq, best[0]), jnp.where(better, xq / qq, best[1])

    start = jnp.zeros_like(largest), jnp.zeros_like(largest)
    _, scale = lax.fori_loop(0, len(reaches), attempt, start)
    d = rounded_to_f16(jnp.max(scale, axis=0) / (lattice.top * lattice.unit))
    s = clip(round_half_even(0.5 * (scale * reciprocal(d * lattice.unit)[None] - 1)), 0, lattice.top // 2)
    scales = lattice.unit * (2 * s + 1)
    q = whole(points(d[None] * scales))
    return SuperScaledCodes(to_f16(d), scales.astype(jnp.float16), q.astype(jnp.int8))

"""Rounding as ggml does it, bit for bit, whatever the compiler fuses.

ggml's reference encoders are scalar C: every product and every sum is rounded to f32. XLA is free to fuse them into
multiply-adds and to turn divisions by constants into multiplications; the functions here leave it no such choice.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def round_half_away(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """C's `roundf`: nearest integer, halves away from zero (`jnp.round` takes halves to even)."""
    return lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)


def truncate_sum(x: Float[Array, "*n"], z: float) -> Float[Array, "*n"]:
    """trunc(x + z) for sums ≥ 0 and half-integral z, x and the sum each rounded to f32: `(int)(a * b + z)` in C.

    Only the integer nearest to the sum decides. The rounded sum reaches it where x is at most half a unit in the last
    place short of it; that is a comparison, which cannot be fused with the product behind x.
    """
    boundary = jnp.maximum(jnp.floor(x + (z + 0.5)), 1.0)
    below = lax.bitcast_convert_type(lax.bitcast_convert_type(boundary, jnp.uint32) - 1, jnp.float32)
    return jnp.where(x >= (boundary - z) - (boundary - below) / 2, boundary, boundary - 1)


def divide(x: Float[Array, "*n"], by: float) -> Float[Array, "*n"]:
    """x / by, correctly rounded, for finite x ≥ 0: a divisor that depends on the data keeps the division."""
    return x / jnp.where(x > 0, jnp.float32(by), jnp.float32(1.0))


def reciprocal(d: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """1 / d, and 0 where d is 0: ggml's inverse block scale."""
    return jnp.where(d == 0, 0.0, 1.0 / jnp.where(d == 0, 1.0, d))


def blocks_of(w: Float[Array, "*rows I"], size: int) -> Float[Array, "*rows I/size size"]:
    """Cut the last axis into blocks of `size`."""
    return jnp.reshape(w, (*w.shape[:-1], w.shape[-1] // size, size))


def flatten_blocks(blocks: jax.Array) -> jax.Array:
    """Undo `blocks_of`."""
    return jnp.reshape(blocks, (*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1]))

"""Group-wise affine integers, the quantizer of the papers (AWQ, GPTQ): `INT{bits}_G{group}`, simulated only.

w ≈ s · (q − z) with q in 0..2^bits − 1 and f16 scale s and zero point z per group: bits + 32 / group per weight.
No GGUF type stores them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.formats.rounding import blocks_of, clip, flatten_blocks, quotient, round_half_even, rounded_to_f16, to_f16

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


class GroupCodes(NamedTuple):
    """`scale`, `zero` f16 `[*rows, groups]`, `q` uint8 `[*rows, groups, group]`."""

    scale: jax.Array
    zero: jax.Array
    q: jax.Array


def encode(
    w: Float[Array, "*rows I"],
    importance: Float[Array, " I"] | None = None,
    coarse: bool = False,
    *,
    bits: int,
    group: int,
) -> GroupCodes:
    """Minimum and maximum of each group (0 included) become the ends of the grid; it needs no search."""
    del importance, coarse
    groups = blocks_of(w, group)
    top = (1 << bits) - 1
    low = jnp.minimum(jnp.min(groups, axis=-1), 0.0)
    high = jnp.maximum(jnp.max(groups, axis=-1), 0.0)
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    scale = jnp.maximum(rounded_to_f16(jnp.where(high > low, (high - low) / top, 1.0)), smallest)
    zero = clip(round_half_even(quotient(-low, scale)), 0, top)
    q = round_half_even(quotient(groups, scale[..., None])) + zero[..., None]
    return GroupCodes(to_f16(scale), to_f16(zero), clip(q, 0, top).astype(jnp.uint8))


def decode(codes: GroupCodes) -> Float[Array, "*rows I"]:
    """Weights f32."""
    q = codes.q.astype(jnp.float32) - codes.zero.astype(jnp.float32)[..., None]
    return flatten_blocks(codes.scale.astype(jnp.float32)[..., None] * q)


def named() -> dict[str, tuple[int, int, functools.partial]]:
    """Name → (bits, group, encoder) of every such format."""
    return {
        f"INT{bits}_G{group}": (bits, group, functools.partial(encode, bits=bits, group=group))
        for bits in BITS
        for group in GROUPS
    }

"""What blocks hold between bytes: integer codes and f16 scales, and the weights that they stand for.

Decoders are jittable and vmappable and equal ggml's dequantization of the same bytes bit for bit: a scale in f16, or a
power of two, times its integers has at most 24 bits, so only sums are rounded, whatever the compiler fuses. Products
that are f32 denormals are zeros where a backend flushes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.formats.rounding import blocks_of, flatten_blocks, two_to


class ScaledCodes(NamedTuple):
    """w = d · q: `d` f16 `[*rows, blocks]`, `q` int8 `[*rows, blocks, 32]`."""

    d: jax.Array
    q: jax.Array


class AffineCodes(NamedTuple):
    """w = d · q + m: `d`, `m` f16 `[*rows, blocks]`, `q` uint8 `[*rows, blocks, 32]`."""

    d: jax.Array
    m: jax.Array
    q: jax.Array


class ExponentCodes(NamedTuple):
    """w = 2^(exponent − 128) · q: `exponent` uint8 `[*rows, blocks]`, `q` int8 `[*rows, blocks, 32]`."""

    exponent: jax.Array
    q: jax.Array


class SuperScaledCodes(NamedTuple):
    """w = (d · scale) · q: `d` f16 `[*rows, blocks]`, `scales` int8 `[*rows, blocks, S]`, `q` int8 `[…, 256]`."""

    d: jax.Array
    scales: jax.Array
    q: jax.Array


class SuperAffineCodes(NamedTuple):
    """w = (d · scale) · q − dmin · min: `d`, `dmin` f16 `[*rows, blocks]`, `scales`, `mins` `[…, S]` and `q` uint8."""

    d: jax.Array
    dmin: jax.Array
    scales: jax.Array
    mins: jax.Array
    q: jax.Array


Codes = ScaledCodes | AffineCodes | ExponentCodes | SuperScaledCodes | SuperAffineCodes


def decode(codes: Codes) -> Float[Array, "*rows I"]:
    """Weights f32."""
    f32 = jnp.float32
    if isinstance(codes, ExponentCodes):
        low = codes.exponent.astype(jnp.int32) // 2  # in two steps, neither of which leaves the normal numbers
        steps = (two_to(part - 64)[..., None] for part in (low, codes.exponent.astype(jnp.int32) - low))
        return flatten_blocks(functools.reduce(jnp.multiply, steps, codes.q.astype(f32)))
    d, q = codes.d.astype(f32)[..., None], codes.q.astype(f32)
    match codes:
        case ScaledCodes():
            return flatten_blocks(d * q)
        case AffineCodes():
            return flatten_blocks(d * q + codes.m.astype(f32)[..., None])
        case SuperScaledCodes():
            scales = d * codes.scales.astype(f32)
            return flatten_blocks(flatten_blocks(scales[..., None] * _sub_blocks(q, scales)))
        case SuperAffineCodes():
            scales = d * codes.scales.astype(f32)
            mins = codes.dmin.astype(f32)[..., None] * codes.mins.astype(f32)
            return flatten_blocks(flatten_blocks(scales[..., None] * _sub_blocks(q, scales) - mins[..., None]))


def _sub_blocks(q: jax.Array, scales: jax.Array) -> jax.Array:
    return blocks_of(q, q.shape[-1] // scales.shape[-1])

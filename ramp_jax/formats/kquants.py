"""ggml's superblocks of 256 weights: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS.

| format | sub-blocks | bytes of one superblock | bits per weight |
|---|---|---|---|
| Q2_K | 16 × 16, affine | 16 scale and minimum nibbles, 64 of bit pairs, f16 d, f16 dmin | 84 · 8 / 256 = 2.625 |
| Q3_K | 16 × 16, symmetric | 32 third bits, 64 bit pairs, 12 of 6-bit scales, f16 d | 110 · 8 / 256 = 3.4375 |
| Q4_K | 8 × 32, affine | f16 d, f16 dmin, 12 of 6-bit scales and minima, 128 nibbles | 144 · 8 / 256 = 4.5 |
| Q5_K | 8 × 32, affine | as Q4_K and 32 fifth bits | 176 · 8 / 256 = 5.5 |
| Q6_K | 16 × 16, symmetric | 128 nibbles, 64 bit pairs, 16 int8 scales, f16 d | 210 · 8 / 256 = 6.5625 |
| IQ4_XS | 8 × 32, 16 fixed values | f16 d, u16 and 4 bytes of 6-bit scales, 128 nibbles | 136 · 8 / 256 = 4.25 |

A sub-block is searched on its own, then the sub-scales (and minima) are quantized together, then the codes are
rounded again under the scales that are stored. With or without importance, encoders make the bytes of
`ggml_quantize_chunk` for at least 99.968 % of blocks (measured on SmolLM2-135M; all of IQ4_XS and Q4_K). The others
have other codes under a sub-scale of 0, so exactly ggml's error. XLA on CPUs takes f32 denormals for zeros: Q3_K
without importance differs where weights are near 1e-6, whose sums are denormals. Everything is jittable and vmappable.
"""

import functools

import jax
import jax.numpy as jnp

from ramp_jax.formats import search
from ramp_jax.formats.codes import SuperAffineCodes, SuperScaledCodes
from ramp_jax.formats.rounding import (
    clip,
    divide,
    quotient,
    reciprocal,
    round_half_even,
    rounded_to_f16,
    square_root,
    sum_rows,
    to_f16,
)
from ramp_jax.formats.search import LANES, AffineGrid
from ramp_jax.formats.superblocks import (
    Importance,
    Weights,
    encode_superblocks,
    error_weights,
    search_lanes,
    sub_blocks,
    whole,
)


def encode_q2_k(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperAffineCodes:
    """Codes in 0..3, sub-scales and minima in 0..15."""
    grid = AffineGrid(3, -0.5, 0.1, 16, absolute=True) if importance is None else AffineGrid(3, -0.9, 0.05, 37)
    return encode_superblocks(functools.partial(_affine, grid=grid, size=16, top=15, spread=1), w, importance, coarse)


def encode_q3_k(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperScaledCodes:
    """Codes in −4..3, sub-scales in −32..31."""
    return encode_superblocks(_q3_k, w, importance, coarse)


def encode_q4_k(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperAffineCodes:
    """Codes in 0..15, sub-scales and minima in 0..63."""
    grid = AffineGrid(15, -1.0, 0.1, 21) if importance is None else AffineGrid(15, -0.9, 0.05, 37)
    return encode_superblocks(functools.partial(_affine, grid=grid, size=32, top=63, spread=2), w, importance, coarse)


def encode_q5_k(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperAffineCodes:
    """Codes in 0..31, sub-scales and minima in 0..63."""
    grid = AffineGrid(31, -0.5, 0.1, 16) if importance is None else AffineGrid(31, -0.9, 0.05, 37)
    return encode_superblocks(functools.partial(_affine, grid=grid, size=32, top=63, spread=2), w, importance, coarse)


def encode_q6_k(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperScaledCodes:
    """Codes in −32..31, sub-scales in −128..127."""
    return encode_superblocks(_q6_k, w, importance, coarse)


def encode_iq4_xs(w: Weights, importance: Importance = None, coarse: bool = False) -> SuperScaledCodes:
    """Codes among the 16 IQ4 values, sub-scales in −32..31."""
    return encode_superblocks(_iq4_xs, w, importance, coarse)


def _affine(
    x: jax.Array,
    importance: jax.Array | None,
    one: jax.Array,
    coarse: bool,
    *,
    grid: AffineGrid,
    size: int,
    top: int,
    spread: int,
) -> SuperAffineCodes:
    """Q2_K, Q4_K, Q5_K: `spread` is ggml's factor on the mean square in the error weights."""
    grid = grid.thinned() if coarse else grid
    subs = sub_blocks(x, size)  # [E, S, N]
    if importance is not None:
        weight = error_weights(x, importance, spread, size, one)
    elif grid.absolute:
        weight = jnp.abs(subs)
    else:
        weight = square_root(sum_rows(list(subs * subs), one) / size)[None] + jnp.abs(subs)
    scale, low, searched = search_lanes(lambda a, b: search.search_affine(a, b, grid, one), subs, weight)
    if importance is None:
        d, scales = _largest_scale(scale, top)
        dmin, mins = _largest_scale(low, top)
    else:
        total = sum_rows(list(weight), one)
        d, scales = search.search_positive(scale, total, top, one, coarse)
        dmin, mins = search.search_positive(low, total, top, one, coarse)
    d, dmin = rounded_to_f16(d), rounded_to_f16(dmin)
    sub_d = d[None] * scales
    sub_m = one * (dmin[None] * mins)
    q = clip(round_half_even(quotient(subs + sub_m[None], sub_d[None])), 0, grid.top)
    q = jnp.where(sub_d[None] == 0, searched, q)
    u8 = jnp.uint8
    return SuperAffineCodes(to_f16(d), to_f16(dmin), scales.astype(u8), mins.astype(u8), whole(q).astype(u8))


def _q3_k(x: jax.Array, importance: jax.Array | None, one: jax.Array, coarse: bool) -> SuperScaledCodes:
    subs = sub_blocks(x, 16)
    if importance is None:
        scale, searched = search_lanes(lambda a, _: search.descend_symmetric(a, 4, one), subs, subs, 8 * LANES)
        largest = search.first_largest(scale)
        inverse = one * quotient(-32.0, largest)
        scales = jnp.where(largest == 0, -32.0, clip(round_half_even(inverse[None] * scale), -32, 31))
        d = jnp.where(largest == 0, 0.0, quotient(1.0, inverse))
    else:
        weight = error_weights(x, importance, 2, 16, one)
        scale, searched = search_lanes(lambda a, b: search.search_symmetric(a, b, 4, one, coarse), subs, weight)
        d, scales = search.search_symmetric(scale, sum_rows(list(weight), one), 32, one, coarse)
    return _symmetric_codes(subs, rounded_to_f16(d), scales, searched, 4)


def _q6_k(x: jax.Array, importance: jax.Array | None, one: jax.Array, coarse: bool) -> SuperScaledCodes:
    subs = sub_blocks(x, 16)
    weight = subs * subs if importance is None else sub_blocks(importance, 16)
    scale, searched = search_lanes(lambda a, b: search.search_symmetric(a, b, 32, one, coarse), subs, weight)
    largest = search.first_largest(scale)
    zero = jnp.abs(largest) < 1e-15
    inverse = one * quotient(-128.0, largest)
    scales = jnp.where(zero, 0.0, jnp.minimum(round_half_even(inverse[None] * scale), 127))
    d = jnp.where(zero, 0.0, quotient(1.0, inverse))
    return _symmetric_codes(subs, rounded_to_f16(d), scales, jnp.where(zero, -32.0, searched), 32)


def _iq4_xs(x: jax.Array, importance: jax.Array | None, one: jax.Array, coarse: bool) -> SuperScaledCodes:
    subs = sub_blocks(x, 32)
    weight = subs * subs if importance is None else error_weights(x, importance, 2, 32, one)
    (scale,) = search_lanes(lambda a, b: (search.search_iq4(a, b, one, coarse),), subs, weight)
    d = -search.first_largest(scale) / 32
    scales = jnp.where(d == 0, 0.0, clip(round_half_even(quotient(1.0, d)[None] * scale), -32, 31))
    sub_d = d[None] * scales
    inverse = reciprocal(sub_d)
    q = search.nearest_iq4(inverse[None] * subs)
    return SuperScaledCodes(to_f16(d), scales.astype(jnp.int8), whole(q).astype(jnp.int8))


def _symmetric_codes(
    subs: jax.Array, d: jax.Array, scales: jax.Array, searched: jax.Array, half: int
) -> SuperScaledCodes:
    """Codes rounded under the stored scales, the searched ones where the stored scale is 0."""
    sub_d = d[None] * scales
    q = clip(round_half_even(quotient(subs, sub_d[None])), -half, half - 1)
    q = jnp.where(sub_d[None] == 0, searched, q)
    return SuperScaledCodes(to_f16(d), scales.astype(jnp.int8), whole(q).astype(jnp.int8))


def _largest_scale(scale: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Superscale that gives the largest of the sub-scales `[S, N]` the code `top`, and the codes."""
    largest = functools.reduce(jnp.maximum, list(scale), jnp.zeros_like(scale[0]))
    codes = clip(round_half_even(quotient(top, largest)[None] * scale), 0, top)
    return divide(largest, top), jnp.where(largest > 0, codes, 0.0)

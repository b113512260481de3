"""ggml's blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.

| format | bytes of one block of 32 weights | bits per weight |
|---|---|---|
| Q4_0 | f16 d, 16 bytes: weight j in the low nibble of byte j, weight j + 16 in the high one | 18 · 8 / 32 = 4.5 |
| Q4_1 | f16 d, f16 m, nibbles as in Q4_0 | 20 · 8 / 32 = 5 |
| Q5_0 | f16 d, u32 with the fifth bits, 16 bytes of nibbles as in Q4_0 | 22 · 8 / 32 = 5.5 |
| Q5_1 | f16 d, f16 m, fifth bits, nibbles | 24 · 8 / 32 = 6 |
| Q8_0 | f16 d, 32 signed bytes | 34 · 8 / 32 = 8.5 |
| IQ4_NL | f16 d, nibbles that index 16 fixed values | 18 · 8 / 32 = 4.5 |
| MXFP4 | 8-bit exponent of a scale, nibbles of a sign and one of 8 values | 17 · 8 / 32 = 4.25 |

Q4_0 and Q5_0 give their scale the sign that lets the largest weight take the most negative code, of which there is
one more than of positive ones. Encoders make the bytes of `ggml_quantize_chunk`, except that XLA on CPUs takes f32
denormals for zeros, where codes may differ but decoded weights are zero both ways. Without importance most formats use
a closed form, with it a search. Everything is jittable and vmappable.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ramp_jax.formats import search
from ramp_jax.formats.codes import AffineCodes, ExponentCodes, ScaledCodes
from ramp_jax.formats.rounding import (
    blocks_of,
    divide,
    floor_log2,
    map_lanes,
    opaque_one,
    reciprocal,
    round_half_away,
    square_root,
    sum_rows,
    to_f16,
    truncate_sum,
    two_to,
)
from ramp_jax.formats.search import LANES, AffineGrid

BLOCK = 32

Weights = Float[Array, "*rows I"]
Importance = Float[Array, " I"] | Float[Array, "*rows I"] | None
RowSquare = Float[Array, "*rows"] | None
"""The mean square of the whole row, where w holds pieces of rows."""


def encode_q4_0(
    w: Weights, importance: Importance = None, coarse: bool = False, row_square: RowSquare = None
) -> ScaledCodes:
    """Codes in −8..7."""
    return _encode_signed(w, importance, coarse, row_square, half=8)


def encode_q5_0(
    w: Weights, importance: Importance = None, coarse: bool = False, row_square: RowSquare = None
) -> ScaledCodes:
    """Codes in −16..15."""
    return _encode_signed(w, importance, coarse, row_square, half=16)


def encode_q4_1(
    w: Weights, importance: Importance = None, coarse: bool = False, row_square: RowSquare = None
) -> AffineCodes:
    """Codes in 0..15."""
    return _encode_affine(w, importance, coarse, row_square, top=15)


def encode_q5_1(
    w: Weights, importance: Importance = None, coarse: bool = False, row_square: RowSquare = None
) -> AffineCodes:
    """Codes in 0..31."""
    return _encode_affine(w, importance, coarse, row_square, top=31)


def encode_q8_0(w: Weights, importance: Importance = None, coarse: bool = False) -> ScaledCodes:
    """Codes in −127..127; it needs no search."""
    del importance, coarse
    blocks = blocks_of(w, BLOCK)
    d = divide(jnp.max(jnp.abs(blocks), axis=-1), 127)
    return ScaledCodes(to_f16(d), round_half_away(blocks * reciprocal(d)[..., None]).astype(jnp.int8))


def encode_iq4_nl(w: Weights, importance: Importance = None, coarse: bool = False) -> ScaledCodes:
    """Codes among the 16 IQ4 values."""
    one = opaque_one(w)
    blocks = blocks_of(w, BLOCK)
    x = _lanes(blocks)
    if importance is None:
        weight = x * x
    else:
        mean_square = sum_rows(list(x * x), one) / 16
        weight = _lane_importance(importance, blocks) * square_root(mean_square[None] + one * (x * x))
    scale = map_lanes(lambda a, b: search.search_iq4(a, b, one, coarse), LANES, x, weight)
    q = search.nearest_iq4(reciprocal(scale)[None] * x)
    return ScaledCodes(to_f16(_rows(scale, blocks)), _rows(q, blocks).astype(jnp.int8))


def encode_mxfp4(w: Weights, importance: Importance = None, coarse: bool = False) -> ExponentCodes:
    """Codes among the FP4 values, of which the largest weight takes one of the two upper ones; it needs no search."""
    del importance, coarse
    blocks = blocks_of(w, BLOCK)
    peak = jnp.max(jnp.abs(blocks), axis=-1)
    exponent = jnp.clip(floor_log2(peak) + 125, 2, 254)
    q = search.nearest_fp4(blocks * two_to(128 - exponent)[..., None])
    return ExponentCodes(jnp.where(peak == 0, 0, exponent).astype(jnp.uint8), q.astype(jnp.int8))


def _encode_signed(w: Weights, importance: Importance, coarse: bool, row_square: RowSquare, half: int) -> ScaledCodes:
    blocks = blocks_of(w, BLOCK)
    if importance is None:
        largest = search.first_largest(jnp.moveaxis(blocks, -1, 0))
        d = jnp.where(largest == 0, 0.0, largest) / -half  # C starts from +0, which no zero of a block replaces
        unsigned = truncate_sum(blocks * reciprocal(d)[..., None], half + 0.5)
        q = jnp.clip(unsigned, 0, 2 * half - 1) - half
        return ScaledCodes(to_f16(d), q.astype(jnp.int8))
    one = opaque_one(w)
    weight = _row_weights(w, importance, row_square, one)
    scale, q = map_lanes(lambda a, b: search.search_symmetric(a, b, half, one, coarse), LANES, _lanes(blocks), weight)
    return ScaledCodes(to_f16(_rows(scale, blocks)), _rows(q, blocks).astype(jnp.int8))


def _encode_affine(w: Weights, importance: Importance, coarse: bool, row_square: RowSquare, top: int) -> AffineCodes:
    blocks = blocks_of(w, BLOCK)
    if importance is None:
        low, high = search.first_smallest(jnp.moveaxis(blocks, -1, 0)), jnp.max(blocks, axis=-1)
        d = divide(jnp.where(high > low, high - low, 0.0), top)
        q = jnp.minimum(truncate_sum((blocks - low[..., None]) * reciprocal(d)[..., None], 0.5), top)
        return AffineCodes(to_f16(d), to_f16(low), q.astype(jnp.uint8))
    one = opaque_one(w)
    grid = AffineGrid(top, -0.9, 0.05, 37)
    grid = grid.thinned() if coarse else grid
    weight = _row_weights(w, importance, row_square, one)
    scale, low, q = map_lanes(lambda a, b: search.search_affine(a, b, grid, one), LANES, _lanes(blocks), weight)
    d, m = (to_f16(_rows(a, blocks)) for a in (scale, -low))
    return AffineCodes(d, m, _rows(q, blocks).astype(jnp.uint8))


def mean_square(w: Weights) -> Float[Array, "*rows"]:
    """Of every row, summed in order: what ggml adds to each square where it weighs errors by importance."""
    one = opaque_one(w)
    by_column = jnp.moveaxis(w, -1, 0)

    def add(total: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        return total + one * (column * column), None

    total, _ = lax.scan(add, jnp.zeros_like(by_column[0]), by_column, unroll=min(32, w.shape[-1]))
    return divide(total, w.shape[-1])


def _row_weights(w: Weights, importance: jax.Array, row_square: RowSquare, one: jax.Array) -> Float[Array, "32 N"]:
    """importance · √(mean square of the whole row + w²), lanes last."""
    square = (mean_square(w) if row_square is None else row_square)[..., None]
    weight = jnp.broadcast_to(importance, w.shape) * square_root(square + one * (w * w))
    return _lanes(blocks_of(weight, BLOCK))


def _lane_importance(importance: Float[Array, " I"], blocks: jax.Array) -> Float[Array, "32 N"]:
    return _lanes(jnp.broadcast_to(blocks_of(importance, BLOCK), blocks.shape))


def _lanes(blocks: Float[Array, "*rows B 32"]) -> Float[Array, "32 N"]:
    return blocks.reshape(-1, BLOCK).T


def _rows(a: Float[Array, "*e N"], blocks: jax.Array) -> jax.Array:
    """Undo `_lanes`: lanes become rows and blocks, an element axis comes last."""
    return jnp.moveaxis(a, -1, 0).reshape(*blocks.shape[:-1], *a.shape[:-1])

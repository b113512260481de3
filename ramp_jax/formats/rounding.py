"""Rounding as ggml does it, bit for bit, whatever the compiler fuses.

ggml's reference encoders are scalar C: every product and every sum is rounded to f32. XLA is free to fuse them into
multiply-adds, to turn divisions by constants into multiplications, and on accelerators to divide less than exactly; the
functions here leave it no such choice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


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


def quotient(a: Float[Array, "*n"] | float, b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """a / b, correctly rounded on accelerators too (but for one in 10⁷, and where remainders are subnormal).

    There XLA divides to within two units in the last place. ggml's searches try scales that put a block's peak exactly
    between two codes, so the last bit decides which one it gets.
    """
    q = a / b
    return q if jax.default_backend() == "cpu" else sharpened_quotient(q, jnp.asarray(a, jnp.float32), b)


def square_root(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """√a, correctly rounded on accelerators too, as `quotient`."""
    root = jnp.sqrt(a)
    return root if jax.default_backend() == "cpu" else sharpened_root(root, a)


def sharpened_quotient(q: Float[Array, "*n"], a: Float[Array, "*n"], b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The f32 nearest to a / b from q, which is a few units off."""
    return _added(q, _remainder(a, q, b) / b)


def sharpened_root(root: Float[Array, "*n"], a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The f32 nearest to √a from `root`, which is a few units off."""
    return _added(root, _remainder(a, root, root) / (2 * root))


def _added(x: Float[Array, "*n"], change: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x + change; x where it is zero or the sum is not finite."""
    return jnp.where((x == 0) | ~jnp.isfinite(x + change), x, x + change)


def _remainder(a: Float[Array, "*n"], x: Float[Array, "*n"], y: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """a − x · y without rounding, for products near a (Dekker 1971): halves of 12 bits have exact products."""
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    one = _opaque_ones(x)  # or the products of x · y, or those that a may be made of, would not be rounded
    product = one * (x * y)
    lost = ((x_high * y_high - product) + x_high * y_low) + x_low * y_high + x_low * y_low
    return (one * a - product) - lost


def _halves(x: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32)
    return high, x - high


def divide(x: Float[Array, "*n"], by: float) -> Float[Array, "*n"]:
    """x / by, correctly rounded: a divisor that depends on each element keeps the division."""
    return quotient(x, by * _opaque_ones(x))


def reciprocal(d: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """1 / d, and 0 where d is 0: ggml's inverse block scale."""
    return jnp.where(d == 0, 0.0, quotient(1.0, jnp.where(d == 0, 1.0, d)))


def rounded_to_f16(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The f16 nearest to x, as f32.

    Accelerators drop conversions to f16 and back (`xla_allow_excess_precision`); what is rounded here stays rounded.
    """
    tiny = round_half_even(x * 2.0**24) * 2.0**-24  # where f16 is subnormal
    return jnp.where(jnp.abs(x) < 2.0**-14, tiny, lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10))


def to_f16(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The f16 nearest to x, as f16."""
    return rounded_to_f16(x).astype(jnp.float16)


def two_to(exponent: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """2^exponent for −126..127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def exponent_of(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """The exponent of the largest power of two up to x ≥ 0; −127 for zeros and denormals."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def floor_log2(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """C's `floorf(log2f(x))` for x > 0: a few values just below a power of two have its logarithm, rounded to f32."""
    exponent = exponent_of(x)
    above = (exponent + 1).astype(jnp.float32)
    short = ((1 << 23) - (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF)).astype(jnp.float32)  # of 2^above
    size = jnp.abs(above - jnp.where(above > 0, 0.5, 0.0))  # numbers next to `above` are as far apart as next to this
    reach = jnp.where(size == 0, 0.0, two_to(exponent_of(size)))
    return exponent + (short < float(np.log(2)) * reach).astype(jnp.int32)


def nearest_power_of_two(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Of 2^−126..2^124 the one nearest to |x|, the upper of two."""
    nearest = (lax.bitcast_convert_type(x, jnp.int32) + (1 << 22)) & 0x7F800000
    return lax.bitcast_convert_type(jnp.clip(nearest, 1 << 23, 251 << 23), jnp.float32)


def blocks_of(w: Float[Array, "*rows I"], size: int) -> Float[Array, "*rows I/size size"]:
    """Cut the last axis into blocks of `size`."""
    return jnp.reshape(w, (*w.shape[:-1], w.shape[-1] // size, size))


def flatten_blocks(blocks: jax.Array) -> jax.Array:
    """Undo `blocks_of`."""
    return jnp.reshape(blocks, (*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1]))


def opaque_one(w: Float[Array, "*n"]) -> Float[Array, ""]:
    """1 that the compiler cannot know to be 1: `one * (a * b) + c` rounds the product even where it is fused.

    A multiply-add of `one * p` and `c` is p + c rounded once, so the result is C's whatever the backend contracts.
    1 / (one * (a / b)) is not simplified to b / a.
    """
    return _opaque_ones(jnp.ravel(w)[0])


def _opaque_ones(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(jnp.isnan(x), x, jnp.float32(1.0))


def round_half_even(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Nearest integer, halves to even."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def nearest_int(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """ggml's rounding of K-quants: `round_half_even` up to 2²², low bits of the sum beyond, −2²² for infinities.

    A search range that collapses to nothing makes infinities, whose codes decide which candidate wins.
    """
    bits = lax.bitcast_convert_type(x + jnp.float32(12582912.0), jnp.int32)
    return ((bits & 0x007FFFFF) - 0x00400000).astype(jnp.float32)


def clip(x: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """x in [low, high], low where x is not a number: one machine instruction per bound."""
    x = jnp.where(x > low, x, jnp.float32(low))
    return jnp.where(x < high, x, jnp.float32(high))


def sum_rows(terms: Sequence[Float[Array, "*n"]], one: Float[Array, ""]) -> Float[Array, "*n"]:
    """Sum of products in their order, every product and partial sum rounded to f32.

    The closing division by one is exact; it keeps XLA from computing the sum again in every consumer.
    """
    total = one * terms[0]
    for term in terms[1:]:
        total = total + one * term
    return total / one


def map_lanes(f: Callable[..., Any], lanes: int, *arrays: Float[Array, "*n N"]) -> Any:
    """f over chunks of `lanes` of the last axis, one after the other, so that a chunk's arrays stay in a CPU's cache.

    Accelerators take all lanes at once.
    """
    total = arrays[0].shape[-1]
    chunks = -(-total // lanes)
    if chunks == 1 or jax.default_backend() != "cpu":
        return f(*arrays)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, chunks * lanes - total)])
        return jnp.moveaxis(padded.reshape(*a.shape[:-1], chunks, lanes), -2, 0)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)[..., :total]

    return jax.tree.map(join, lax.map(lambda chunk: f(*chunk), tuple(split(a) for a in arrays)))

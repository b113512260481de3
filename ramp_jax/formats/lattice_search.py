"""Encoders of the lattice formats with signs; those with a shift are in `ternary_search`.

ggml tries a few scales per sub-block, rounds every weight, and where the result is no point takes the one of smallest
weighted error among the points that are nearest without weights. `nearest`, for `effort="best"` and compensation, looks
at all points.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ramp_jax.formats.codes import SuperScaledCodes
from ramp_jax.formats.lattice import SIGNED, Lattice, listed
from ramp_jax.formats.lattice_coarse import coarse_codes
from ramp_jax.formats.rounding import (
    clip,
    divide,
    map_lanes,
    nearest_int,
    quotient,
    square_root,
    sum_rows,
    to_f16,
)
from ramp_jax.formats.search import LANES
from ramp_jax.formats.superblocks import (
    BLOCK,
    Importance,
    Weights,
    encode_superblocks,
    error_weights,
    search_lanes,
    sub_blocks,
    whole,
)

_EDGES = (8, 24, 56)

_REACHES = (0.8, 0.95, 1.1)

_UNROLLED = 16


def encode(w: Weights, importance: Importance = None, coarse: bool = False, *, lattice: Lattice) -> SuperScaledCodes:
    """Codes d f16, scales f16 in odd multiples of `unit`, q int8 magnitudes with signs."""
    return encode_superblocks(functools.partial(_superblocks, lattice=lattice), w, importance, coarse)


def _superblocks(
    x: jax.Array, importance: jax.Array | None, one: jax.Array, coarse: bool, *, lattice: Lattice
) -> SuperScaledCodes:
    if coarse:
        search = functools.partial(nearest, lattice=lattice)
        return coarse_codes(x, jnp.ones_like(x) if importance is None else importance, lattice, search, _REACHES)
    subs = sub_blocks(x, lattice.sub)  # [E, S, N]
    if importance is not None:
        weight = error_weights(x, importance, lattice.spread, lattice.sub, one)
    elif lattice.floor:
        mean_square = sum_rows(list(x * x), one) / BLOCK
        weight = (lattice.floor * mean_square)[None, None] + one * (subs * subs)
    else:
        weight = subs * subs
    find = functools.partial(_search, lattice=lattice, one=one)
    scale, level, negative = search_lanes(find, subs, weight)
    d, s = sub_scales(scale, lattice, one)
    values = jnp.asarray(lattice.values)
    magnitude = values[level.astype(jnp.int32)]
    q = whole(jnp.where(negative, -magnitude, magnitude))
    d = one * (d * np.float32(lattice.fudge))
    return SuperScaledCodes(to_f16(d), (lattice.unit * (2 * s + 1)).astype(jnp.float16), q.astype(jnp.int8))


def sub_scales(
    scale: Float[Array, "S N"], lattice: Lattice, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, "S N"]]:
    """ggml's superscale of the scales of sub-blocks, and s of what stands for each, 2 s + 1 units."""
    largest = jnp.max(scale, axis=0)
    d = one * divide(largest, lattice.top)  # or 1 / d would become top / largest
    s = clip(nearest_int(0.5 * (one * (quotient(1.0, d)[None] * scale) - 1)), 0, lattice.top // 2)
    return jnp.where(largest == 0, 0.0, d), jnp.where(largest == 0, 0.0, s)


def _search(
    x: Float[Array, "E N"], weight: Float[Array, "E N"], *, lattice: Lattice, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, "E N"], Float[Array, "E N"]]:
    """Scale, indices of magnitudes and where weights are negative, sub-block by sub-block."""
    negative = x < 0
    if lattice.even:
        negative = _made_even(x, weight, negative)
    value = jnp.where(negative, -x, x)
    largest = functools.reduce(jnp.maximum, list(value))
    root = square_root(weight)
    top = len(lattice.values)
    steps = np.arange(-lattice.tries, lattice.tries + 1, dtype=np.float32)
    numerators = jnp.asarray(np.float32(2 * top - 1) + steps * np.float32(lattice.step))
    span, start = largest, divide(largest, 2 * top - 1)
    if lattice.fitted:
        start = _first_fit(value, weight, top + 1, one)
        span = one * (start * top)

    def sums(level: jax.Array) -> tuple[jax.Array, jax.Array]:
        terms = [(weight[i], value[i], 2 * level[i] + 1) for i in range(len(level))]
        return sum_rows([w * v * q for w, v, q in terms], one), sum_rows([w * q * q for w, _, q in terms], one)

    def found(inverse: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        level = clip(nearest_int(0.5 * (one * (inverse[None] * value) - 1)), 0, top - 1)
        return nearest_listed(lattice, level, value, root, scale, jnp.ones_like(value), one)

    def candidate(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inverse = one * quotient(numerators[i], span)
        level, exact = found(inverse, quotient(1.0, inverse))
        xq, qq = sums(level)
        better = (qq > 0) & (xq * xq > best[0] * qq)
        scale = quotient(xq, qq) / one
        return tuple(jnp.where(better, a, b) for a, b in zip((scale * xq, scale, level, exact), best, strict=True))

    first = (jnp.zeros_like(start), start, jnp.zeros_like(x), jnp.full(x.shape, not lattice.again))
    _, scale, level, exact = lax.fori_loop(0, len(numerators), candidate, first)
    kept = exact
    if lattice.again:
        kept = jnp.broadcast_to(jnp.all(exact, axis=0)[None], exact.shape)
    if lattice.fitted:
        kept = jnp.zeros_like(exact)
    once_more, _ = found(quotient(1.0, scale), scale)
    level = jnp.where(kept | (scale[None] <= 0), level, once_more)
    xq, qq = sums(level)
    refit = (scale > 0) & (qq > 0) & ~jnp.all(kept, axis=0)
    scale = jnp.where(refit, quotient(xq, qq), scale)
    flipped = scale < 0
    zero = (largest <= 0) | (largest < lattice.least) | (span <= 0)
    negative = (negative ^ flipped[None]) & ~zero[None]
    return jnp.where(zero, 0.0, jnp.abs(scale)), jnp.where(zero[None], 0.0, level), negative


def _made_even(x: jax.Array, weight: jax.Array, negative: jax.Array) -> jax.Array:
    """One sign of eight is turned, where it costs least, if an odd number is negative."""
    cost = (weight * x * x).reshape(-1, SIGNED, x.shape[-1])
    signs = negative.reshape(cost.shape)
    odd = jnp.sum(signs, axis=1, keepdims=True) % 2 == 1
    place = lax.broadcasted_iota(jnp.int32, cost.shape, 1)
    cheapest = jnp.min(jnp.where(cost == jnp.min(cost, axis=1, keepdims=True), place, SIGNED), axis=1, keepdims=True)
    return (signs ^ (odd & (place == cheapest))).reshape(x.shape)


def nearest_listed(
    lattice: Lattice,
    level: Float[Array, "E N"],
    value: Float[Array, "E N"],
    root: Float[Array, "E N"],
    scale: Float[Array, " N"],
    base: Float[Array, "E N"],
    one: Float[Array, ""],
) -> tuple[Float[Array, "E N"], jax.Array]:
    """Of the points that ggml compares the one with the smallest weighted error, and whether it is `level` itself.

    An index i of a magnitude stands for scale · (2 i + base), with a shift for scale · (i + base); all weights of a
    point have the same `base`.
    """
    count, bits, dim = len(lattice.values), lattice.bits, lattice.dim
    lanes = value.shape[-1]

    def split(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a.reshape(-1, dim, lanes), 0, 1).reshape(dim, -1)  # [D, K N]

    level, value, root = split(level), split(value), split(root)
    scale = jnp.tile(scale, value.shape[1] // lanes)
    corner = functools.reduce(lambda total, digit: total * count + digit, list(level.astype(jnp.int32))[::-1])
    code = _least(lattice, corner, value, root, (scale, split(base)[0]), one)
    chosen = jnp.stack([_digit(code, i, bits) for i in range(dim)])
    exact = jnp.broadcast_to(jnp.all(chosen == level, axis=0)[None], chosen.shape)
    return tuple(jnp.swapaxes(a.reshape(dim, -1, lanes), 0, 1).reshape(-1, lanes) for a in (chosen, exact))


def _digit(code: jax.Array, i: int, bits: int) -> jax.Array:
    return ((code >> bits * i) & ((1 << bits) - 1)).astype(jnp.float32)


def _least(
    lattice: Lattice, corner: jax.Array, value: jax.Array, root: jax.Array, line: tuple[jax.Array, ...], one: jax.Array
) -> jax.Array:
    """Packed indices of the best point of each list `[M]`.

    Few lists are long: after the first columns the others go on together, brought together a sixteenth at a time.
    """
    table, bits = jnp.asarray(listed(lattice)), lattice.bits
    lengths = jnp.asarray(_lengths(lattice))[corner]
    every, gap = len(corner), 1 if lattice.shared else 2

    def columns(low: int, high: int | jax.Array, best: tuple[jax.Array, ...], *lanes: jax.Array) -> tuple[Any, ...]:
        corner, scale, base, *parts = lanes
        value, root = parts[: len(parts) // 2], parts[len(parts) // 2 :]

        def compare(j: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            code = table[j][corner].astype(jnp.int32)
            error = jnp.zeros_like(best[0])
            for i, (v, w) in enumerate(zip(value, root, strict=True)):
                off = one * (scale * (gap * _digit(code, i, bits) + base)) - v
                error = error + one * (w * off * off)
            better = error < best[0]
            return jnp.where(better, error, best[0]), jnp.where(better, code, best[1])

        return lax.fori_loop(low, high, compare, best)

    lanes = [corner, *line, *value, *root]
    best = jnp.full(every, jnp.inf), jnp.zeros(every, jnp.int32)
    edges = [edge for edge in _EDGES if edge < len(table)] + [len(table)]
    best = columns(0, edges[0], best, *lanes)
    share = max(1, every // 16)
    for low, high in itertools.pairwise(edges):
        open_still = lengths > low
        left = jnp.sum(open_still)
        order = jnp.nonzero(open_still, size=every + share, fill_value=every)[0]

        def some(state: tuple[Any, ...], low: int = low, high: int = high, order: jax.Array = order) -> tuple[Any, ...]:
            cursor, best = state
            index = lax.dynamic_slice_in_dim(order, cursor, share)
            took = [jnp.take(a, index, mode="clip") for a in (*best, *lanes)]
            found = columns(low, high, tuple(took[:2]), *took[2:])
            return cursor + share, tuple(a.at[index].set(b, mode="drop") for a, b in zip(best, found, strict=True))

        _, best = lax.while_loop(lambda state, left=left: state[0] < left, some, (0, best))
    return best[1]


@functools.cache
def _lengths(lattice: Lattice) -> np.ndarray:
    table = listed(lattice)
    return 1 + (table != table[:1]).sum(0)


def _first_fit(x: Float[Array, "E N"], w: Float[Array, "E N"], top: int, one: Float[Array, ""]) -> Float[Array, " N"]:
    """ggml's scale of x ≈ scale · code for codes up to `top`, meant for x ≥ 0.

    It keeps codes in a byte, so that −1 (x of a turned sign) is read back as 255; what that leads to is done here too.
    """
    peak = jnp.max(x, axis=0)
    steps = np.asarray([0, *(i for i in range(-4, 5) if i)], np.float32)
    numerators = jnp.asarray(np.float32(0.1) * steps + np.float32(top))

    def codes(inverse: jax.Array) -> jax.Array:
        return jnp.minimum(nearest_int(one * (inverse[None] * x)), top)

    def candidate(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inverse = one * quotient(numerators[i], peak)
        q = codes(inverse)
        off = x - one * (quotient(1.0, inverse)[None] * jnp.where(i == 0, _as_byte(q), q))
        error = sum_rows([b * a * a for a, b in zip(off, w, strict=True)], one)
        better = (i == 0) | (error < best[0])
        return jnp.where(better, error, best[0]), jnp.where(better, inverse, best[1])

    _, inverse = lax.fori_loop(0, len(steps), candidate, (jnp.zeros_like(peak), jnp.zeros_like(peak)))
    q = codes(inverse) / one
    xq = sum_rows([a * b * c for a, b, c in zip(w, x, q, strict=True)], one)
    qq = sum_rows([a * c * c for a, c in zip(w, q, strict=True)], one)

    def visit(sums: tuple[jax.Array, jax.Array], element: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        xq, qq = sums
        x, w, q = element
        rest_xq, rest_qq = xq - one * (w * x * q), qq - one * (w * q * q)
        new = jnp.minimum(nearest_int(quotient(one * (x * rest_qq), rest_xq)), top)
        new_xq, new_qq = rest_xq + one * (w * x * new), rest_qq + one * (w * new * new)
        better = (rest_xq > 0) & (rest_qq > 0) & (new != q) & (new_xq * new_xq * qq > xq * xq * new_qq)
        return (jnp.where(better, new_xq, xq), jnp.where(better, new_qq, qq)), jnp.where(better, _as_byte(new), q)

    def one_round(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums, q = lax.scan(visit, state[:2], (x, w, state[2]))
        return *sums, q

    xq, qq, _ = lax.fori_loop(0, 5, one_round, (xq, qq, _as_byte(q)))
    return jnp.where(qq > 0, quotient(xq, qq), 0.0)


def _as_byte(q: jax.Array) -> jax.Array:
    return jnp.where(q < 0, q + 256, q)


def nearest(v: Float[Array, "8 *n"], weight: Float[Array, "8 *n"], lattice: Lattice) -> Float[Array, "8 *n"]:
    """Of all that eight codes with signs can be the ones of smallest weighted squared distance to v.

    Where signs are even and those of v are not, one turns, which costs 4 · weight · |v| · magnitude at the weight where
    that is least; of two points that share their signs, either has it.
    """
    lanes = v.reshape(SIGNED, -1), weight.reshape(SIGNED, -1)
    return map_lanes(functools.partial(_nearest, lattice=lattice), LANES, *lanes).reshape(v.shape)


def _nearest(v: Float[Array, "8 M"], weight: Float[Array, "8 M"], *, lattice: Lattice) -> Float[Array, "8 M"]:
    dim, negative, size = lattice.dim, v < 0, jnp.abs(v)
    values = jnp.asarray(lattice.values)[None, :, None]
    apart = weight[:, None] * jnp.square(size[:, None] - values)  # [8, L, M]
    parts = [slice(start, start + dim) for start in range(0, SIGNED, dim)]
    if lattice.even:
        odd = jnp.sum(negative, axis=0) % 2 == 1
        turned = _spread(jnp.where(odd[None], 4 * weight * size, 0), lattice)
        points, turns = _points_with_a_turn(lattice, [(apart[part], turned[part]) for part in parts])
        turns = [odd & turn for turn in turns]
    else:
        points, turns = [least_point(lattice, apart[part])[0] for part in parts], []
    magnitude = jnp.concatenate([jnp.asarray(lattice.points.T, jnp.float32)[:, point] for point in points])
    if turns:
        cost = weight * size * magnitude
        places = [jnp.argmin(cost[part], axis=0)[None] == jnp.arange(dim)[:, None] for part in parts]
        negative ^= jnp.concatenate([turn[None] & place for turn, place in zip(turns, places, strict=True)])
    return jnp.where(negative, -magnitude, magnitude)


def _spread(a: Float[Array, "8 M"], lattice: Lattice) -> Float[Array, "8 L M"]:
    """Times every magnitude, as a matrix product: that is computed once, all else again in every consumer."""
    spread = np.kron(np.eye(SIGNED, dtype=np.float32), lattice.values[:, None])
    return jnp.matmul(spread, a, precision="highest").reshape(SIGNED, -1, a.shape[-1])


def _points_with_a_turn(
    lattice: Lattice, parts: list[tuple[jax.Array, jax.Array]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The point of each part and whether it has the turn: just one of them has."""
    turned = [least_point(lattice, *part) for part in parts]
    if len(parts) == 1:
        return [turned[0][0]], [jnp.ones(turned[0][0].shape, bool)]
    plain = [least_point(lattice, apart) for apart, _ in parts]
    first = turned[0][1] + plain[1][1] <= plain[0][1] + turned[1][1]
    turns = [first, ~first]
    return [jnp.where(t, a[0], b[0]) for t, a, b in zip(turns, turned, plain, strict=True)], turns


def least_point(
    lattice: Lattice, apart: Float[Array, "D L M"], turned: Float[Array, "D L M"] | None = None
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Which point has the least sum of `apart` of its weights and the least of `turned`, and that sum.

    Sums and minima go over weights, so each half of a point is looked up in a table of its own. Sums give up the last
    bits of their mantissas, a ten-thousandth of them at most, to the point's number: one minimum finds both.
    """
    half, count, lanes = lattice.dim // 2, len(lattice.values), apart.shape[-1]
    digits = np.arange(count**half)[:, None] // count ** np.arange(half)[::-1] % count
    ones = np.eye(count, dtype=np.float32)[digits].reshape(len(digits), -1)
    sums = [jnp.matmul(ones, part.reshape(-1, lanes), precision="highest") for part in (apart[:half], apart[half:])]
    least = []
    if turned is not None:
        halves = turned[:half], turned[half:]
        least = [functools.reduce(jnp.minimum, [part[i][digits[:, i]] for i in range(half)]) for part in halves]
    places = count ** np.arange(half)[::-1]
    first, second = (jnp.asarray(part @ places) for part in (lattice.levels[:, :half], lattice.levels[:, half:]))
    low = np.int32(len(lattice.points) - 1)

    def some(i: jax.Array, best: Int[Array, " M"]) -> Int[Array, " M"]:
        for j in range(_UNROLLED):
            place = i * _UNROLLED + j
            a, b = first[place], second[place]
            cost = sums[0][a] + sums[1][b]
            if least:
                cost = cost + jnp.minimum(least[0][a], least[1][b])
            best = jnp.minimum(best, (lax.bitcast_convert_type(cost, jnp.int32) & ~low) | place)
        return best

    start = jnp.full(lanes, np.iinfo(np.int32).max)
    best = lax.fori_loop(0, len(lattice.points) // _UNROLLED, some, start)
    return best & low, lax.bitcast_convert_type(best & ~low, jnp.float32)

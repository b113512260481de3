"""Encoders of IQ1_S and IQ1_M, lattices of −1, 0 and 1 whose weights are shifted together.

ggml sorts the weights of a sub-block and tries every way to split them in three, with every shift: that is the best
scale if all points were there. Then each point is the one of smallest weighted error among those that are nearest
without weights. `nearest`, for `effort="best"` and compensation, looks at all points with both shifts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ramp_jax.formats.codes import SuperScaledCodes
from ramp_jax.formats.lattice import SHIFTED, SIGNED, Lattice
from ramp_jax.formats.lattice_coarse import coarse_codes
from ramp_jax.formats.lattice_search import least_point, nearest_listed, sub_scales
from ramp_jax.formats.rounding import map_lanes, quotient, sum_rows, to_f16
from ramp_jax.formats.search import LANES
from ramp_jax.formats.superblocks import (
    Importance,
    Weights,
    encode_superblocks,
    error_weights,
    search_lanes,
    sub_blocks,
    whole,
)

_REACHES = (1.2, 1.6, 2.2)


def encode(w: Weights, importance: Importance = None, coarse: bool = False, *, lattice: Lattice) -> SuperScaledCodes:
    """Codes d f16, scales f16 in odd multiples of `unit`, q int8, 8 · point ± 1."""
    return encode_superblocks(functools.partial(_superblocks, lattice=lattice), w, importance, coarse)


def _superblocks(
    x: Float[Array, "256 N"], importance: Float[Array, "256 N"], one: jax.Array, coarse: bool, *, lattice: Lattice
) -> SuperScaledCodes:
    if coarse:
        return coarse_codes(x, importance, lattice, functools.partial(nearest, lattice=lattice), _REACHES)
    subs = sub_blocks(x, lattice.sub)  # [E, S, N]
    weight = error_weights(x, importance, lattice.spread, lattice.sub, one)
    scale, level, shift = search_lanes(functools.partial(_search, lattice=lattice, one=one), subs, weight)
    d, s = sub_scales(scale, lattice, one)
    if lattice.fitted:
        q = (level - 1 + shift) * (2 * s + 1)[None]
        xq = sum_rows(list(whole(one * (weight * q) * subs)), one)
        qq = sum_rows(list(whole(one * (weight * q) * q)), one)
        d = jnp.where((d > 0) & (qq > 0), quotient(xq, qq), d)
    d = one * (d * np.float32(lattice.fudge))
    q = whole(SHIFTED * (level - 1 + shift)).astype(jnp.int8)
    return SuperScaledCodes(to_f16(d), (lattice.unit * (2 * s + 1)).astype(jnp.float16), q)


def _search(
    x: Float[Array, "E N"], weight: Float[Array, "E N"], *, lattice: Lattice, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, "E N"], Float[Array, "E N"]]:
    """Scale, indices of −1, 0 and 1, and shifts of weights, sub-block by sub-block."""
    groups = lattice.sub // lattice.shared
    scale, level, pattern = _best_split(x, weight, groups, one)
    bits = [pattern >> (groups - 1 - group) & 1 for group in range(groups)]
    shift = jnp.repeat(jnp.where(jnp.stack(bits) == 1, -1 / SHIFTED, 1 / SHIFTED), lattice.shared, axis=0)
    level, exact = nearest_listed(lattice, level, x, weight, scale, shift - 1, one)
    q = level - 1 + shift
    xq = sum_rows([w * a * b for w, a, b in zip(weight, q, x, strict=True)], one)
    qq = sum_rows([w * a * a for w, a in zip(weight, q, strict=True)], one)
    refit = (xq > 0) & (qq > 0) & ~jnp.all(exact, axis=0)
    scale = jnp.where(refit, quotient(xq, qq), scale)
    zero = (jnp.max(jnp.abs(x), axis=0) < lattice.least) | (pattern < 0)
    first = jnp.asarray(np.tile(lattice.levels[0], len(x) // lattice.dim), jnp.float32)[:, None]
    return (
        jnp.where(zero, 0.0, scale),
        jnp.where(zero[None], first, level),
        jnp.where(zero[None], 1 / SHIFTED, shift),
    )


def _best_split(
    x: Float[Array, "E N"], weight: Float[Array, "E N"], groups: int, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, "E N"], Int[Array, " N"]]:
    """The split of smallest error: its scale ≥ 0, which third each weight is in, and the pattern of shifts.

    A pattern has a bit per group, 1 where it goes down, that of the first group highest; −1 where nothing has weight.
    """
    rank = _ranks(x)
    sums = _running_sums(rank, jnp.stack([one * (weight * x), weight]), groups)  # [E + 1, 2, groups, N]
    patterns = 1 << groups
    low, high = np.triu_indices(len(x) + 1)
    lows, highs = jnp.asarray(low), jnp.asarray(high)

    def candidate(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        for pattern, (xq, qq) in enumerate(_moments(sums[lows[i]], sums[highs[i]], sums[-1], one)):
            better = (qq > 0) & (xq * xq > best[0] * qq)
            scale = quotient(xq, qq) / one
            new = scale * xq, scale, jnp.full_like(best[2], i * patterns + pattern)
            best = tuple(jnp.where(better, a, b) for a, b in zip(new, best, strict=True))
        return best

    worst = jnp.full_like(x[0], np.finfo(np.float32).min)
    _, scale, place = lax.fori_loop(
        0, len(low), candidate, (worst, jnp.zeros_like(x[0]), jnp.full(x.shape[1], -1, jnp.int32))
    )
    split = jnp.maximum(place, 0) // patterns
    level = (rank >= lows[split][None]).astype(jnp.float32) + (rank >= highs[split][None]).astype(jnp.float32)
    turned = scale < 0
    pattern = jnp.where(turned, patterns - 1 - place % patterns, place % patterns)
    return jnp.abs(scale), jnp.where(turned[None], 2 - level, level), jnp.where(place < 0, -1, pattern)


def _ranks(x: Float[Array, "E N"]) -> Int[Array, "E N"]:
    """The place of each weight in ascending order, the first of equals first."""
    places = jnp.arange(len(x))[:, None]

    def add(j: jax.Array, rank: Int[Array, "E N"]) -> Int[Array, "E N"]:
        return rank + ((x[j][None] < x) | ((x[j][None] == x) & (j < places))).astype(jnp.int32)

    return lax.fori_loop(0, len(x), add, jnp.zeros(x.shape, jnp.int32))


def _running_sums(rank: Int[Array, "E N"], terms: Float[Array, "K E N"], groups: int) -> Float[Array, "E1 K G N"]:
    """Sums of the first j terms in the order of ranks for all j, of every group of neighbours on its own."""
    apart = terms.reshape(len(terms), groups, -1, terms.shape[-1])
    ranks = rank.reshape(1, groups, -1, rank.shape[-1])

    def add(total: Float[Array, "K G N"], j: jax.Array) -> tuple[Float[Array, "K G N"], Float[Array, "K G N"]]:
        total = total + jnp.sum(jnp.where(ranks == j, apart, 0.0), axis=2)
        return total, total

    start = jnp.zeros((len(terms), groups, terms.shape[-1]))
    _, totals = lax.scan(add, start, jnp.arange(len(rank)))
    return jnp.concatenate([start[None], totals])


def _moments(
    low: Float[Array, "2 G N"], high: Float[Array, "2 G N"], every: Float[Array, "2 G N"], one: Float[Array, ""]
) -> list[tuple[Float[Array, " N"], Float[Array, " N"]]]:
    """Σ w·x·q and Σ w·q² of a split for every pattern of shifts, from sums of w·x and w up to it, as ggml adds them."""
    up, down = ([one * np.float32(point + shift) for point in (-1, 0, 1)] for shift in (1 / SHIFTED, -1 / SHIFTED))
    if low.shape[1] == 1:
        parts = [low[:, 0], high[:, 0] - low[:, 0], every[:, 0] - high[:, 0]]
        return [
            (
                _added(*(one * (part[0] * q) for part, q in zip(parts, of, strict=True))),
                _added(*(one * (part[1] * q * q) for part, q in zip(parts, of, strict=True))),
            )
            for of in (up, down)
        ]
    both = []
    for of, differences in ((up, (0.75, -1.25)), (down, (1.25, -0.75))):  # of neighbours' squares
        first, second = (one * np.float32(difference) for difference in differences)
        xq = one * (every[0] * of[2]) - (low[0] + high[0])
        qq = _added(one * (every[1] * of[2] * of[2]), one * (low[1] * first), one * (high[1] * second))
        both.append((xq, qq))
    return [(a[0][0] + b[0][1], a[1][0] + b[1][1]) for a in both for b in both]


def _added(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return a + b + c


def nearest(v: Float[Array, "C *n"], weight: Float[Array, "C *n"], lattice: Lattice) -> Float[Array, "C *n"]:
    """Of all that codes with one shift can be the ones of smallest weighted squared distance to v."""
    lanes = v.reshape(len(v), -1), weight.reshape(len(v), -1)
    return map_lanes(functools.partial(_nearest, lattice=lattice), LANES, *lanes).reshape(v.shape)


def _nearest(v: Float[Array, "C M"], weight: Float[Array, "C M"], *, lattice: Lattice) -> Float[Array, "C M"]:
    points = jnp.asarray(SHIFTED * lattice.points.T, jnp.float32)
    found = []
    for shift in (1, -1):
        codes = jnp.asarray(SHIFTED * lattice.values + shift)[None, :, None]
        apart = weight[:, None] * jnp.square(v[:, None] - codes)  # [C, 3, M]
        parts = [least_point(lattice, apart[at : at + SIGNED]) for at in range(0, len(v), SIGNED)]
        q = jnp.concatenate([points[:, point] for point, _ in parts]) + shift
        found.append((q, functools.reduce(jnp.add, [cost for _, cost in parts])))
    (up, high), (down, low) = found
    return jnp.where((high <= low)[None], up, down)

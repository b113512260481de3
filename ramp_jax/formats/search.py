"""ggml's scale searches, for many blocks at once.

Arrays are `[elements, N]`: one lane per block, so that every sum runs over a block's elements in ggml's order while
the lanes fill the vector unit. `w` are the elements' weights in the squared error. `one` is `rounding.opaque_one`.
Codes are floats with integer values until a format packs them. A `coarse` search tries a few of the same candidates.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ramp_jax.formats.rounding import clip, divide, nearest_int, quotient, round_half_even, sum_rows

LANES = 528
"""Blocks of one search chunk; not a power of two, or a block's elements would share few cache sets."""

_TINY = 1e-15  # magnitudes below count as an all-zero block

IQ4_VALUES = np.asarray([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""The 16 values that IQ4 codes stand for."""


FP4_VALUES = np.asarray([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
"""The magnitudes of FP4 codes (E2M1), doubled."""


class AffineGrid(NamedTuple):
    """Candidates of an affine search: inverse scales (`first` + `step` · i + `top`) / range for i < `count`."""

    top: int
    first: float
    step: float
    count: int
    absolute: bool = False  # the error is absolute, not squared

    def numerators(self) -> np.ndarray:
        """f32, summed in ggml's order."""
        i = np.arange(self.count, dtype=np.float32)
        return (np.float32(self.first) + np.float32(self.step) * i) + np.float32(self.top)

    def thinned(self) -> "AffineGrid":
        """Every sixth candidate, the middle one among them."""
        skipped = self.count // 2 % 6
        first = self.first + self.step * skipped
        return self._replace(first=first, step=6 * self.step, count=-(-(self.count - skipped) // 6))


def first_largest(x: Float[Array, "E *n"]) -> Float[Array, "*n"]:
    """Along the first axis the element of largest magnitude, the first of equals, with its sign."""
    return functools.reduce(lambda best, v: jnp.where(jnp.abs(v) > jnp.abs(best), v, best), list(x))


def first_smallest(x: Float[Array, "E *n"]) -> Float[Array, "*n"]:
    """Along the first axis the smallest element, the first of equals: of zeros of both signs the one that C keeps.

    Two reductions: XLA would copy a chain of comparisons into every consumer, and compile for a minute.
    """
    low = jnp.min(x, axis=0)
    place = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    first = jnp.min(jnp.where(x == low[None], 2 * place + jnp.signbit(x).astype(jnp.int32), 2 * x.shape[0]), axis=0)
    return jnp.where(low == 0, jnp.where(first % 2 == 1, -0.0, 0.0), low)


def search_affine(
    x: Float[Array, "E N"], w: Float[Array, "E N"], grid: AffineGrid, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, "E N"]]:
    """Scale, negated minimum ≥ 0 and codes in 0..top of w ≈ scale · code − minimum."""
    highest = functools.reduce(jnp.maximum, list(x))
    smallest = first_smallest(x)
    lowest = jnp.where(smallest > 0, 0.0, smallest)
    sum_w = sum_rows(list(w), one)
    sum_x = sum_rows([a * b for a, b in zip(w, x, strict=True)], one)
    numerators = jnp.asarray(grid.numerators())

    def codes(inverse: jax.Array, low: jax.Array) -> jax.Array:
        return clip(nearest_int(one * (inverse[None] * (x - low[None]))), 0, grid.top)

    def error(q: jax.Array, scale: jax.Array, low: jax.Array) -> jax.Array:
        terms = []
        for j in range(x.shape[0]):
            off = (one * (scale * q[j]) + low) - x[j]
            terms.append(w[j] * (jnp.abs(off) if grid.absolute else off * off))
        return sum_rows(terms, one)

    def candidate(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        least, _, low, *_ = best
        inverse = quotient(numerators[i], highest - low)
        q = codes(inverse, low)
        weighted = [w[j] * q[j] for j in range(x.shape[0])]
        sum_q = sum_rows(weighted, one)
        sum_qq = sum_rows([p * q[j] for j, p in enumerate(weighted)], one)
        sum_qx = sum_rows([p * x[j] for j, p in enumerate(weighted)], one)
        det = one * (sum_w * sum_qq) - one * (sum_q * sum_q)
        scale = quotient(one * (sum_w * sum_qx) - one * (sum_x * sum_q), det)
        new_low = quotient(one * (sum_qq * sum_x) - one * (sum_q * sum_qx), det)
        scale = jnp.where(new_low > 0, quotient(sum_qx, sum_qq), scale) / one
        new_low = jnp.where(new_low > 0, 0.0, new_low) / one
        e = error(q, scale, new_low)
        better = (det > 0) & (e < least)
        return tuple(jnp.where(better, a, b) for a, b in zip((e, scale, new_low, inverse, low), best, strict=True))

    inverse = one * quotient(grid.top, highest - lowest)
    scale = quotient(1.0, inverse)
    start = (error(codes(inverse, lowest), scale, lowest), scale, lowest, inverse, lowest)
    _, scale, low, inverse, used_low = lax.fori_loop(0, grid.count, candidate, start)
    flat = highest <= lowest
    q = jnp.where(flat[None], 0.0, codes(inverse, used_low))
    return jnp.where(flat, 0.0, scale), -jnp.where(flat, lowest, low), q


def search_symmetric(
    x: Float[Array, "E N"], w: Float[Array, "E N"], half: int, one: Float[Array, ""], coarse: bool = False
) -> tuple[Float[Array, " N"], Float[Array, "E N"]]:
    """Scale and codes in −half..half − 1 of w ≈ scale · code; an all-zero block has scale 0 and codes −half."""
    peak = first_largest(x)
    steps = np.asarray([i for i in range(-9, 10, 3 if coarse else 1) if i], np.float32)
    numerators = jnp.asarray(-(np.float32(half) + np.float32(0.1) * steps))

    def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = clip(round_half_even(inverse[None] * x), -half, half - 1)
        return _products(x, w, q, one)

    def candidate(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inverse = quotient(numerators[i], peak)
        xq, qq = sums(inverse)
        better = (qq > 0) & (xq * xq > best[0] * qq)
        scale = quotient(xq, qq)
        return tuple(jnp.where(better, a, b) for a, b in zip((scale * xq, scale, inverse), best, strict=True))

    inverse = quotient(-half, peak)
    xq, qq = sums(inverse)
    scale = jnp.where(qq == 0, 0.0, quotient(xq, qq))
    _, scale, inverse = lax.fori_loop(0, len(steps), candidate, (scale * xq, scale, inverse))
    zero = jnp.abs(peak) < _TINY
    q = clip(round_half_even(inverse[None] * x), -half, half - 1)
    return jnp.where(zero, 0.0, scale), jnp.where(zero[None], -float(half), q)


def search_iq4(
    x: Float[Array, "E N"], w: Float[Array, "E N"], one: Float[Array, ""], coarse: bool = False
) -> Float[Array, " N"]:
    """Scale of w ≈ scale · value for the 16 IQ4 values."""
    peak = first_largest(x)
    numerators = jnp.asarray(np.arange(-7, 8, 3 if coarse else 1, dtype=np.float32) + np.float32(IQ4_VALUES[0]))

    def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = nearest_iq4(inverse[None] * x)
        weighted = [w[j] * q[j] for j in range(x.shape[0])]
        xq = sum_rows([p * x[j] for j, p in enumerate(weighted)], one)
        return xq, sum_rows([p * q[j] for j, p in enumerate(weighted)], one)

    def candidate(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        xq, qq = sums(quotient(numerators[i], peak))
        better = (qq > 0) & (xq * xq > best[0] * qq)
        scale = quotient(xq, qq)
        return jnp.where(better, scale * xq, best[0]), jnp.where(better, scale, best[1])

    xq, qq = sums(quotient(1.0, one * divide(-peak, float(IQ4_VALUES[0]))))
    scale = jnp.where(qq > 0, quotient(xq, qq), 0.0)
    _, scale = lax.fori_loop(0, len(numerators), candidate, (scale * xq, scale))
    return jnp.where(jnp.abs(peak) < _TINY, 0.0, scale)


def nearest_iq4(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The nearest IQ4 value, the larger of two equally near ones."""
    values = IQ4_VALUES.astype(np.float32)
    q = jnp.full_like(v, values[0])
    for low, high in itertools.pairwise(values):
        q = jnp.where(v >= (low + high) / 2, high, q)
    return q


def nearest_fp4(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The nearest FP4 value, the smaller of two equally near ones."""
    values, size = FP4_VALUES.astype(np.float32), jnp.abs(v)
    q = jnp.zeros_like(v)
    for low, high in itertools.pairwise(values):
        q = jnp.where(size > (low + high) / 2, high, q)
    return jnp.where(v < 0, -q, q)


def descend_symmetric(
    x: Float[Array, "E N"], half: int, one: Float[Array, ""]
) -> tuple[Float[Array, " N"], Float[Array, "E N"]]:
    """As `search_symmetric` with weights x², by five rounds of coordinate descent over the codes."""
    peak = first_largest(x)
    q = clip(round_half_even(quotient(-half, peak)[None] * x), -half, half - 1)
    scale, q = _descend(x, x * x, q, (-half, half - 1), one)
    zero = jnp.abs(peak) < _TINY
    return jnp.where(zero, 0.0, scale), jnp.where(zero[None], -float(half), q)


def search_positive(
    x: Float[Array, "E N"], w: Float[Array, "E N"], top: int, one: Float[Array, ""], coarse: bool = False
) -> tuple[Float[Array, " N"], Float[Array, "E N"]]:
    """Scale and codes in 0..top of x ≈ scale · code for x ≥ 0: the sub-scales or minima of a superblock."""
    peak = functools.reduce(jnp.maximum, list(x))
    steps = np.asarray([0, *(i for i in range(-4, 5) if i)], np.float32)
    numerators = jnp.asarray(np.float32(0.1) * steps + np.float32(top))

    def candidate(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inverse = one * quotient(numerators[i], peak)
        scale = quotient(1.0, inverse)
        off = x - one * (scale[None] * jnp.minimum(round_half_even(inverse[None] * x), top))
        e = sum_rows([w[j] * off[j] * off[j] for j in range(x.shape[0])], one)
        return jnp.where(e < best[0], e, best[0]), jnp.where(e < best[0], inverse, best[1])

    _, inverse = lax.fori_loop(0, len(steps), candidate, (jnp.full_like(peak, jnp.inf), quotient(top, peak)))
    q = jnp.minimum(round_half_even(inverse[None] * x), top)
    if coarse:
        xq, qq = _products(x, w, q, one)
        scale = jnp.where(qq > 0, quotient(xq, qq), 0.0)
    else:
        scale, q = _descend(x, w, q, (None, top), one)
    zero = peak < _TINY
    return jnp.where(zero, 0.0, scale), jnp.where(zero[None], 0.0, q)


def _products(x: jax.Array, w: jax.Array, q: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Σ w·x·q and Σ w·q² in ggml's order."""
    rows = range(x.shape[0])
    return sum_rows([w[j] * x[j] * q[j] for j in rows], one), sum_rows([w[j] * q[j] * q[j] for j in rows], one)


def _descend(
    x: jax.Array, w: jax.Array, q: jax.Array, bounds: tuple[int | None, int], one: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Five rounds over the elements: each takes the code that best fits the scale of all others, if that helps.

    Until a lane moves, its sums stay, so whether it moves at all is seen for all elements at once. Four of five do not;
    the rounds go to the others, brought together; where those are more than a quarter, to all.
    """
    lanes = x.shape[1]
    few = -(-lanes // 4)
    q = q / one  # exact; or XLA would compute the first codes again wherever one is used

    def rounds(x: jax.Array, w: jax.Array, *state: jax.Array) -> tuple[jax.Array, ...]:
        def one_round(state: tuple[Any, ...]) -> tuple[Any, ...]:
            left, _, xq, qq, q = state
            after = _visit_all(x, w, xq, qq, q, bounds, one)
            return left - 1, jnp.any(after[2] != q), *after

        return lax.while_loop(lambda state: (state[0] > 0) & state[1], one_round, (5, True, *state))[2:]

    def rounds_of_few(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        index = jnp.nonzero(moves, size=few, fill_value=lanes)[0]
        found = rounds(*(jnp.take(a, index, axis=-1, mode="clip") for a in arrays))
        return tuple(old.at[..., index].set(new, mode="drop") for old, new in zip(arrays[2:], found, strict=True))

    xq, qq = _products(x, w, q, one)
    moves = functools.reduce(jnp.logical_or, list(_preferred(x, w, q, xq[None], qq[None], bounds, one)[0] != q))
    xq, qq, q = lax.cond(jnp.sum(moves) > few, rounds, rounds_of_few, x, w, xq, qq, q)
    return jnp.where(qq > 0, quotient(xq, qq), 0.0), q


def _visit_all(
    x: jax.Array, w: jax.Array, xq: jax.Array, qq: jax.Array, q: jax.Array, bounds: tuple[int | None, int], one: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One round of `_descend`: Σ w·x·q, Σ w·q² and the codes after every element had its turn."""

    def visit(
        sums: tuple[jax.Array, jax.Array], element: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        kept, xq, qq = _preferred(*element, *sums, bounds, one)
        return (xq, qq), kept

    (xq, qq), q = lax.scan(visit, (xq, qq), (x, w, q), unroll=2)
    return xq, qq, q


def _preferred(
    x: jax.Array, w: jax.Array, q: jax.Array, xq: jax.Array, qq: jax.Array, bounds: tuple[int | None, int], one: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The code that an element takes where the others' stay, and the sums with it; the old ones where it helps not."""
    low, high = bounds
    rest_xq, rest_qq = xq - one * (w * x * q), qq - one * (w * q * q)
    new = jnp.minimum(round_half_even(quotient(x * rest_qq, rest_xq)), high)
    new = new if low is None else jnp.maximum(new, low)
    new_xq, new_qq = rest_xq + one * (w * x * new), rest_qq + one * (w * new * new)
    open_to_change = (rest_xq > 0) & ((rest_qq > 0) if low is None else (new_qq > 0))
    better = open_to_change & (new != q) & (new_xq * new_xq * qq > xq * xq * new_qq)
    kept = jnp.where(better, new, q) / one  # exact; keeps XLA from computing all this again for the sums
    change = kept != q
    return (
        kept,
        jnp.where(change, rest_xq + one * (w * x * kept), xq) / one,
        jnp.where(change, rest_qq + one * (w * kept * kept), qq) / one,
    )

"""`effort="best"`: from the reference's codes to a smaller importance-weighted squared error, block by block.

Three moves in turn, all with codes rounded again under the new scales: every sub-block tries the neighbours of its
integer scale and minimum; the f16 superscales are fitted by least squares to the codes; a block without sub-scales
tries multiples of its scale. A block keeps a move only if its error falls, so the result is never above the reference.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ramp_jax.formats.codes import AffineCodes, Codes, ExponentCodes, ScaledCodes, SuperAffineCodes, SuperScaledCodes
from ramp_jax.formats.integers import GroupCodes
from ramp_jax.formats.rounding import (
    blocks_of,
    clip,
    exponent_of,
    map_lanes,
    reciprocal,
    round_half_even,
    rounded_to_f16,
    two_to,
)
from ramp_jax.formats.search import LANES

_ROUNDS = 2
_FACTORS = (*np.arange(0.80, 1.0, 0.02), *np.arange(1.02, 1.13, 0.02))


AnyCodes = Codes | GroupCodes


class Grid(NamedTuple):
    """What a format can store: code rounding, and the ends of its sub-scales and integer minima.

    `round(v, weight)` are the codes nearest to v: of each number alone, or, of `columns` that go together, the ones of
    smallest weighted squared distance to v `[columns, *n]`. Sub-scales are `unit` apart; `reach` is how many of them a
    sub-scale looks for a better neighbour. A scale of the whole block becomes the nearest one that can be `stored`;
    without sub-scales, `factors` are the multiples of it that are tried. Only where scales are `searched` may anything
    but codes be replaced.
    """

    round: Callable[[jax.Array, jax.Array], jax.Array]
    scales: tuple[float, float] = (1, 1)
    mins: tuple[int, int] = (0, 0)
    reach: int = 1
    unit: float = 1
    columns: int = 1
    stored: Callable[[jax.Array], jax.Array] = rounded_to_f16
    factors: tuple[float, ...] = _FACTORS
    searched: bool = True

    def rounded(self, v: Float[Array, "E *n"], weight: Float[Array, "E *n"]) -> Float[Array, "E *n"]:
        """Codes nearest to v, whose first axis are neighbours in a row."""
        if self.columns == 1:
            return self.round(v, weight)
        groups = [jnp.swapaxes(a.reshape(-1, self.columns, *a.shape[1:]), 0, 1) for a in (v, weight)]
        return jnp.swapaxes(self.round(*groups), 0, 1).reshape(v.shape)

    def nearest_scale(self, v: Float[Array, "*n"], ends: tuple[float, float]) -> Float[Array, "*n"]:
        """The nearest of what a sub-scale or a minimum between `ends` can be."""
        if self.unit == 1:
            return clip(round_half_even(v), *ends)
        return clip(ends[0] + self.unit * round_half_even((v - ends[0]) / self.unit), *ends)


def whole(low: int, high: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Rounding to the nearest integer in low..high."""
    return lambda v, _: clip(round_half_even(v), low, high)


class State(NamedTuple):
    """w ≈ d·scale·q − dmin·min: `d`, `dmin` `[1, N]`, `scale`, `min` `[S, N]`, `q` `[E, S, N]`, all f32."""

    d: jax.Array
    dmin: jax.Array
    scale: jax.Array
    min: jax.Array
    q: jax.Array

    @property
    def step(self) -> Float[Array, "B N"]:
        """What a code of each weight of the block is multiplied by."""
        return self._spread(self.d * self.scale)

    @property
    def low(self) -> Float[Array, "B N"]:
        """What is taken from each weight then."""
        return self._spread(self.dmin * self.min)

    @property
    def by_column(self) -> Float[Array, "B N"]:
        """The codes in the order of a block's weights."""
        return jnp.swapaxes(self.q, 0, 1).reshape(-1, self.q.shape[-1])

    @property
    def weights(self) -> Float[Array, "B N"]:
        """What the blocks stand for."""
        return self.step * self.by_column - self.low

    def with_columns(self, q: Float[Array, "B N"]) -> "State":
        """With other codes, in the order of `by_column`."""
        return self._replace(q=_split(q, self.scale.shape[0]))

    def _spread(self, by_sub: Float[Array, "S N"]) -> Float[Array, "B N"]:
        return jnp.repeat(by_sub, self.q.shape[0], axis=0)


def improve(codes: AnyCodes, w: Float[Array, "*rows I"], importance: Float[Array, " I"] | None, grid: Grid) -> AnyCodes:
    """Codes of the same format, no block of which has a larger weighted squared error than `codes`."""
    if not grid.searched:
        return codes
    size = codes.q.shape[-1]
    blocks = blocks_of(w, size)
    weight = jnp.ones_like(w) if importance is None else jnp.broadcast_to(importance, w.shape)
    lanes = [_lanes(a) for a in (blocks, blocks_of(weight, size))]
    parts = _lane_parts(codes)
    found = map_lanes(functools.partial(_improve_lanes, type(codes), grid), LANES * 32 // size, *lanes, *parts)
    return _from_lanes(found, codes)


def state_of(codes: AnyCodes) -> State:
    """The codes of N blocks as lanes."""
    return _state(type(codes), tuple(_lane_parts(codes)))


def codes_of(state: State, like: AnyCodes) -> AnyCodes:
    """Undo `state_of`; `like` has the kind, shapes and dtypes."""
    return _from_lanes(_parts(type(like), state), like)


def _lane_parts(codes: AnyCodes) -> list[jax.Array]:
    return [_lanes(a[..., None] if a.ndim < codes.q.ndim else a) for a in codes]


def _from_lanes(parts: tuple[jax.Array, ...], like: AnyCodes) -> AnyCodes:
    pairs = zip(parts, like, strict=True)
    return type(like)(*(jnp.moveaxis(new, -1, 0).reshape(old.shape).astype(old.dtype) for new, old in pairs))


def _improve_lanes(kind: type, grid: Grid, x: jax.Array, weight: jax.Array, *parts: jax.Array) -> tuple[jax.Array, ...]:
    state = _state(kind, parts)
    x, weight = (_split(a, state.scale.shape[0]) for a in (x, weight))
    moves = [_fit] if grid.scales == (1, 1) else [_step, _fit]

    def one_round(_: int, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        for move in moves:
            carry = _keep(carry, move(carry[0], x, weight, grid), x, weight)
        return carry

    carry = (state, _error(state, x, weight))
    if grid.scales == (1, 1):
        carry = _stretch(carry, x, weight, grid)
    best, _ = lax.fori_loop(0, _ROUNDS, one_round, carry)
    return _parts(kind, best)


def _stretch(carry: tuple[State, jax.Array], x: jax.Array, weight: jax.Array, grid: Grid) -> tuple[State, jax.Array]:
    """The best multiple of the block's scale, each one fitted."""
    start = carry[0]
    factors = jnp.asarray(grid.factors, jnp.float32)

    def attempt(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        moved = _rounded(start._replace(d=grid.stored(start.d * factors[i])), x, weight, grid)
        carry = _keep(carry, moved, x, weight)
        return _keep(carry, _fit(moved, x, weight, grid), x, weight)

    return lax.fori_loop(0, len(grid.factors), attempt, carry)


def _step(state: State, x: jax.Array, weight: jax.Array, grid: Grid) -> State:
    """Every sub-block takes the best of its neighbouring integer scales and minima."""
    scales = range(-grid.reach, grid.reach + 1)
    mins = (-1, 0, 1) if grid.mins[1] > grid.mins[0] else (0,)
    deltas = [d for d in itertools.product(scales, mins) if any(d)]
    table = jnp.asarray(np.asarray(deltas, np.float32))

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale = clip(state.scale + grid.unit * table[i, 0], *grid.scales)
        low = clip(state.min + table[i, 1], *grid.mins)
        e = _sub_errors(_rounded(state._replace(scale=scale, min=low), x, weight, grid), x, weight)
        return tuple(jnp.where(e < best[0], a, b) for a, b in zip((e, scale, low), best, strict=True))

    start = (_sub_errors(state, x, weight), state.scale, state.min)
    _, scale, low = lax.fori_loop(0, len(deltas), attempt, start)
    return _rounded(state._replace(scale=scale, min=low), x, weight, grid)


def _fit(state: State, x: jax.Array, weight: jax.Array, grid: Grid) -> State:
    """Superscales by weighted least squares for the codes at hand, rounded to f16."""
    a = state.scale[None] * state.q
    aa, ax = _total(weight * a * a), _total(weight * a * x)
    if grid.mins == (0, 0):
        return _rounded(state._replace(d=grid.stored(ax / aa)), x, weight, grid)
    b = jnp.broadcast_to(-state.min[None], a.shape)
    ab, bb, bx = _total(weight * a * b), _total(weight * b * b), _total(weight * b * x)
    det = aa * bb - ab * ab
    both = (rounded_to_f16((ax * bb - bx * ab) / det), rounded_to_f16((bx * aa - ax * ab) / det))
    sound = det > 1e-6 * aa * bb
    d, dmin = (jnp.where(sound, new, old) for new, old in zip(both, (rounded_to_f16(ax / aa), state.dmin), strict=True))
    return _rounded(state._replace(d=d, dmin=dmin), x, weight, grid)


def _keep(carry: tuple[State, jax.Array], new: State, x: jax.Array, weight: jax.Array) -> tuple[State, jax.Array]:
    """Per block the state with the smaller error; a state that is not finite never wins."""
    old, least = carry
    e = _error(new, x, weight)
    better = e < least

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better[None] if a.ndim == 3 else better, a, b)

    return jax.tree.map(pick, new, old), jnp.where(better, e, least)


def _rounded(state: State, x: jax.Array, weight: jax.Array, grid: Grid) -> State:
    step = (state.d * state.scale)[None]
    q = grid.rounded((x + (state.dmin * state.min)[None]) * reciprocal(step), weight)
    return state._replace(q=jnp.where(step == 0, state.q, q))


def _sub_errors(state: State, x: jax.Array, weight: jax.Array) -> Float[Array, "S N"]:
    off = (state.d * state.scale)[None] * state.q - (state.dmin * state.min)[None] - x
    return functools.reduce(jnp.add, list(weight * off * off))


def _error(state: State, x: jax.Array, weight: jax.Array) -> Float[Array, "1 N"]:
    return jnp.sum(_sub_errors(state, x, weight), axis=0, keepdims=True)


def _total(a: Float[Array, "E S N"]) -> Float[Array, "1 N"]:
    return jnp.sum(functools.reduce(jnp.add, list(a)), axis=0, keepdims=True)


def _state(kind: type, parts: tuple[jax.Array, ...]) -> State:
    parts = tuple(a.astype(jnp.float32) for a in parts)
    ones = jnp.ones_like(parts[0])
    if kind is ScaledCodes:
        d, q = parts
        return State(d, 0 * d, ones, 0 * ones, q[:, None])
    if kind is ExponentCodes:
        exponent, q = parts
        d = jnp.where(exponent < 2, 0.0, two_to(exponent.astype(jnp.int32) - 128))  # where f32 is denormal
        return State(d, 0 * d, ones, 0 * ones, q[:, None])
    if kind is AffineCodes:
        d, m, q = parts
        return State(d, -m, ones, ones, q[:, None])
    if kind is GroupCodes:
        d, zero, q = parts
        return State(d, d, ones, zero, q[:, None])
    if kind is SuperScaledCodes:
        d, scales, q = parts
        return State(d, 0 * d, scales, 0 * scales, _split(q, scales.shape[0]))
    d, dmin, scales, mins, q = parts
    return State(d, dmin, scales, mins, _split(q, scales.shape[0]))


def _parts(kind: type, state: State) -> tuple[jax.Array, ...]:
    d, dmin, q = state.d, state.dmin, state.by_column
    if kind is ScaledCodes:
        return d, q
    if kind is ExponentCodes:
        return jnp.where(d == 0, 0, exponent_of(d) + 128), q
    if kind is AffineCodes:
        return d, -dmin, q
    if kind is GroupCodes:
        return d, state.min, q
    if kind is SuperScaledCodes:
        return d, state.scale, q
    return SuperAffineCodes(d, dmin, state.scale, state.min, q)


def _lanes(a: jax.Array) -> jax.Array:
    return a.reshape(-1, a.shape[-1]).T


def _split(a: Float[Array, "B N"], subs: int) -> Float[Array, "E S N"]:
    return jnp.swapaxes(a.reshape(subs, -1, a.shape[-1]), 0, 1)

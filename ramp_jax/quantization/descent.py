"""Coordinate descent on what outputs lose, over all that a block format stores.

Codes that were chosen one after the other (`compensate`) are no minimum of tr(E H Eᵀ). Here every number of a block
takes the best of its values while all others stay: each code; then each integer sub-scale and minimum; then the f16
superscales, both at once where a format has two. Of formats whose scales are not searched only codes move. All are
quadratics in one or two variables whose curvature is a block's part of H and whose slope is `pull`, H Eᵀ, so that no
step raises the loss. Rows do not depend on each other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.formats import decode, get_format
from ramp_jax.formats.best import Grid, State, codes_of, state_of
from ramp_jax.formats.rounding import reciprocal, rounded_to_f16

PASSES = 2
"""Over all columns; a third gains a hundredth."""

matmul = functools.partial(jnp.matmul, precision="highest")
"""Whose f32 is not cut short on accelerators."""


def descended(w: Float[Array, "O I"], codes: Any, second: Float[Array, "I I"], name: str) -> Any:
    """Codes of w in format `name` that lose no more than `codes` under H = `second`, and as a rule less."""
    size = get_format(name).block_size
    starts = range(0, w.shape[1], size)
    blocks = {start: jax.tree.map(lambda a, i=i: a[:, i : i + 1], codes) for i, start in enumerate(starts)}
    pull = _pull(w, codes, second, name)
    for start in [*starts] * PASSES:
        pull, blocks[start] = _descend(pull, second, blocks[start], start, name)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *blocks.values())


@functools.partial(jax.jit, static_argnames="name")
def _pull(w: Float[Array, "O I"], codes: Any, second: Float[Array, "I I"], name: str) -> Float[Array, "I O"]:
    return matmul(second, (decode(codes, name) - w).T)


@functools.partial(jax.jit, static_argnames="name", donate_argnames="pull")
def _descend(
    pull: Float[Array, "I O"], second: Float[Array, "I I"], codes: Any, start: int, name: str
) -> tuple[Float[Array, "I O"], Any]:
    """One block of every row; `pull` before and after."""
    fmt = get_format(name)
    if (grid := fmt.grid) is None:
        raise ValueError(f"{name} has no codes to choose among.")
    rows = jax.lax.dynamic_slice_in_dim(second, start, fmt.block_size)  # [S, I]
    h = jax.lax.dynamic_slice_in_dim(rows, start, fmt.block_size, axis=1)
    slope = jax.lax.dynamic_slice_in_dim(pull, start, fmt.block_size)
    before = state_of(codes)
    state, slope = _codes(before, slope, h, grid)
    if grid.scales != (1, 1):
        state, slope = _sub_scales(state, slope, h, grid)
    if grid.searched:
        state = _superscales(state, slope, h, grid)
    return pull + matmul(rows.T, state.weights - before.weights), codes_of(state, codes)


def _codes(
    state: State, slope: Float[Array, "B N"], h: Float[Array, "B B"], grid: Grid
) -> tuple[State, Float[Array, "B N"]]:
    """One code after the other, or those that go together."""
    if grid.columns > 1:
        return _groups(state, slope, h, grid)
    step = state.step
    free = (step != 0) & (jnp.diagonal(h)[:, None] > 0)
    per_step = reciprocal(step) / jnp.where(jnp.diagonal(h) > 0, jnp.diagonal(h), 1)[:, None]

    def one(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, slope = carry
        code = jnp.where(free[j], grid.round(q[j] - slope[j] * per_step[j], slope[j]), q[j])
        return q.at[j].set(code), slope + h[j][:, None] * (step[j] * (code - q[j]))[None]

    q, slope = jax.lax.fori_loop(0, len(h), one, (state.by_column, slope))
    return state.with_columns(q), slope


def _groups(
    state: State, slope: Float[Array, "B N"], h: Float[Array, "B B"], grid: Grid
) -> tuple[State, Float[Array, "B N"]]:
    """One group of codes after the other: the one nearest to the minimum over its weights, where that loses less."""
    size, step = grid.columns, state.step
    within = jnp.stack([h[at : at + size, at : at + size] for at in range(0, len(h), size)])
    inverse, curve = jnp.linalg.inv(within), jnp.diagonal(within, axis1=1, axis2=2)

    def one(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, slope = carry
        at = j * size
        old, pulled, by = (jax.lax.dynamic_slice_in_dim(a, at, size) for a in (q, slope, step))
        wanted = old - matmul(inverse[j], pulled) * reciprocal(by)
        off = by * (grid.round(wanted, jnp.broadcast_to(curve[j][:, None], old.shape)) - old)
        moved = matmul(jax.lax.dynamic_slice_in_dim(h, at, size, axis=1), off)
        lost = jnp.sum(off * (2 * pulled + jax.lax.dynamic_slice_in_dim(moved, at, size)), axis=0)
        better = lost < 0
        codes = jnp.where(better[None] & (by != 0), old + off * reciprocal(by), old)
        return jax.lax.dynamic_update_slice_in_dim(q, jnp.round(codes), at, 0), slope + jnp.where(
            better[None], moved, 0
        )

    q, slope = jax.lax.fori_loop(0, len(within), one, (state.by_column, slope))
    return state.with_columns(q), slope


def _sub_scales(
    state: State, slope: Float[Array, "B N"], h: Float[Array, "B B"], grid: Grid
) -> tuple[State, Float[Array, "B N"]]:
    """One sub-block after the other: its scale, then its minimum."""
    size, subs, _ = state.q.shape

    def moved(
        value: Float[Array, " N"], ends: tuple[float, float], at: jax.Array, slope: jax.Array, unit: Float[Array, "E N"]
    ) -> tuple[Float[Array, " N"], Float[Array, "B N"]]:
        """The best number for what the weights of a sub-block hold `unit` times."""
        pulled = matmul(jax.lax.dynamic_slice_in_dim(h, at, size, axis=1), unit)
        curve = jnp.sum(unit * jax.lax.dynamic_slice_in_dim(pulled, at, size), axis=0)
        gradient = jnp.sum(unit * jax.lax.dynamic_slice_in_dim(slope, at, size), axis=0)
        best = grid.nearest_scale(value - gradient / jnp.where(curve > 0, curve, 1), ends)
        new = jnp.where((curve > 0) & (_change(best - value, gradient, curve) < 0), best, value)
        return new, slope + pulled * (new - value)[None]

    def one(s: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scale, low, slope = carry
        new, slope = moved(scale[s], grid.scales, s * size, slope, state.d * state.q[:, s])
        scale = scale.at[s].set(new)
        if grid.mins[1] > grid.mins[0]:
            ones = jnp.ones_like(state.q[:, s])
            new, slope = moved(low[s], grid.mins, s * size, slope, -state.dmin * ones)
            low = low.at[s].set(new)
        return scale, low, slope

    scale, low, slope = jax.lax.fori_loop(0, subs, one, (state.scale, state.min, slope))
    return state._replace(scale=scale, min=low), slope


def _superscales(state: State, slope: Float[Array, "B N"], h: Float[Array, "B B"], grid: Grid) -> State:
    """Least squares under H for the integers at hand, rounded to f16; kept where that loses less."""
    a = state._replace(d=jnp.ones_like(state.d), dmin=jnp.zeros_like(state.d)).weights
    pulled = matmul(h, a)
    aa, ar = jnp.sum(a * pulled, axis=0), jnp.sum(a * slope, axis=0)
    alone = -ar / jnp.where(aa > 0, aa, jnp.inf)
    if grid.mins == (0, 0):
        d = grid.stored(state.d + alone[None])
        better = _change((d - state.d)[0], ar, aa) < 0
        return state._replace(d=jnp.where(better[None] & jnp.isfinite(d), d, state.d))
    b = state._replace(d=jnp.zeros_like(state.d), dmin=jnp.ones_like(state.d)).weights
    ab, bb, br = jnp.sum(b * pulled, axis=0), jnp.sum(b * matmul(h, b), axis=0), jnp.sum(b * slope, axis=0)
    det = aa * bb - ab * ab
    sound = det > 1e-6 * aa * bb
    safe = jnp.where(sound, det, 1)
    d = rounded_to_f16(state.d + jnp.where(sound, (br * ab - ar * bb) / safe, alone)[None])
    dmin = rounded_to_f16(state.dmin + jnp.where(sound, (ar * ab - br * aa) / safe, 0)[None])
    u, v = (d - state.d)[0], (dmin - state.dmin)[0]
    better = _change(u, ar, aa) + _change(v, br, bb) + 2 * u * v * ab < 0
    better = better[None] & jnp.isfinite(d) & jnp.isfinite(dmin)
    return state._replace(d=jnp.where(better, d, state.d), dmin=jnp.where(better, dmin, state.dmin))


def _change(step: Float[Array, " N"], slope: Float[Array, " N"], curve: Float[Array, " N"]) -> Float[Array, " N"]:
    """Of the loss, by a step along one number."""
    return step * (2 * slope + step * curve)

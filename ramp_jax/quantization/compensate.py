"""Error-compensated rounding inside GGUF blocks (GPTQ, Frantar et al. 2023, in the grids of block formats).

Columns of W are rounded one after the other; what a column loses is made up for in the columns that are still to
come, which the outputs Σ x_i w_i allow as far as inputs are correlated. With the second moment H = E[x xᵀ] the loss is
tr(E H Eᵀ), and H⁻¹ = Uᵀ U with upper triangular U tells how: column j loses e_j = (w_j − ŵ_j) / U_jj, and column k > j
takes w_k − e_j U_jk. A block's scales and minima are chosen when its turn comes, by `effort="best"` on the weights as
they are then, and its codes replaced column by column. Coordinate descent goes on from there (`descent`); the result is
ordinary codes of the format.

What is rounded is not W itself. Inputs x̂ come from matrices that are rounded already, outputs are wanted as the model
has them of its own inputs x: E|W x − Ŵ x̂|² is least around W + W E[(x − x̂) x̂ᵀ] H⁻¹ with H = E[x̂ x̂ᵀ], so that each
matrix also makes up for what those before it lost (asymmetric calibration, Li et al. 2025, GPTAQ). Half of that step is
taken, since it shrinks what inputs full of errors say, and leaves the errors of the residual stream.

H is shrunk before: what a few thousand tokens say of correlations holds for other text in part only.
"""

import functools
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax import scratch, sweep
from ramp_jax.cores import cores
from ramp_jax.formats import decode, get_format
from ramp_jax.formats.best import Grid, State, codes_of, improve, state_of
from ramp_jax.formats.rounding import reciprocal
from ramp_jax.models import Tensor
from ramp_jax.models.decoder import Params, block_taps
from ramp_jax.models.layout import Block, of_block, replace_in_block
from ramp_jax.quantization.descent import descended, matmul
from ramp_jax.quantization.encoder import Encoder

SHRINKAGE = 0.5
"""Of what is added to the diagonal of H: this much of the geometric mean of each entry and of all entries' mean."""

MADE_UP = 0.5
"""Of the step from a matrix to the one that makes up for all that was lost before it."""

_ROWS = 96
"""That one core of a CPU rounds together."""

_PANEL = 1024
"""Columns that are inverted at a time."""

_LOG = logging.getLogger(__name__)


class Curvature(NamedTuple):
    """What outputs lose by errors of the columns that they are made of: H, and U with H⁻¹ = Uᵀ U."""

    second: Float[Array, "I I"]
    upper: Float[Array, "I I"]


class Inputs(NamedTuple):
    """Second moments of what matrices read, x̂ where blocks and matrices before them are rounded and x where nothing is:
    H = E[x̂ x̂ᵀ], and E[(x − x̂) x̂ᵀ]."""

    second: Float[Array, "I I"]
    missed: Float[Array, "I I"]


class Uncompensated:
    """Tensors that were rounded without compensation although their format takes it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def report(self) -> None:
        """Say so once, for all of them."""
        if self.names:
            _LOG.warning(
                "the inputs of %d tensors have no usable second moment, first %s; they are rounded without "
                "compensation.",
                len(self.names),
                self.names[0],
            )


def compensated_block(
    at: sweep.Place,
    members: Mapping[str, Tensor],
    formats: Mapping[str, str],
    plain: Encoder,
    folding: Mapping[str, jax.Array],
    exact: Float[Array, "W T D"],
    rounded: Float[Array, "W T D"],
    left_out: Uncompensated,
) -> tuple[Float[Array, "W T D"], dict[str, Any]]:
    """Hidden states after a block whose matrices were rounded, and their codes by name inside the block.

    The block is folded by `folding`, as it is to be quantized; hidden states before it are `exact` where nothing is
    rounded and `rounded` where the blocks before it are, which are given up. Matrices go in order, so that inputs are
    those that already quantized ones make. A quarter of the windows is not fitted on but decides, row by row, whether
    outputs are nearer to the model's own than as `plain` rounds them. Tensors before which nothing was seen, or whose
    second moments are singular, are rounded by `plain` and noted in `left_out`. What is known of one activation exists
    at a time.
    """
    border, original, found = len(rounded) // 4, at, {}
    fit, check = slice(border, None), slice(border or None)

    def of_readers(at: sweep.Place, activation: str, weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Codes of the matrices that read an activation, of which nothing else is left."""
        codes = {name: plain.encode_rows(members[name], w, formats[name], folding) for name, w in weights.items()}
        gridded = [name for name in weights if get_format(formats[name]).grid]
        if not gridded:
            return codes
        second, missed = inputs_of(at, rounded[fit], original, exact[fit], activation)
        lost = {name: matmul(weights[name].astype(jnp.float32), missed) for name in gridded}
        del missed
        loss_of = curvature(second)
        if not all(jnp.isfinite(a).all() for a in (loss_of.upper, *lost.values())):
            left_out.names += [at.full(name) for name in gridded]
            return codes
        fitted = {}
        for name in gridded:
            wanted = making_up(weights[name].astype(jnp.float32), lost.pop(name), loss_of)
            fitted[name] = in_chunks(wanted, loss_of, formats[name])
        del loss_of
        inputs = read_by(at, rounded[check], activation)
        exact_inputs = read_by(original, exact[check], activation)
        for name, new in fitted.items():
            w = weights[name].astype(jnp.float32)
            codes[name] = _better(w, inputs, exact_inputs, formats[name], new, codes[name])
        return codes

    for activation in at.block.activations:
        weights = {weight.name: of_block(at.weights, weight.name) for weight in at.block.readers(activation.name)}
        found |= jax.tree.map(np.asarray, of_readers(at, activation.name, weights))
        changed = {name: decode(found[name], formats[name]).astype(w.dtype) for name, w in weights.items()}
        at = at._replace(weights=replace_in_block(at.weights, changed))
    return sweep.advance(at, rounded), found


def inputs_of(
    at: sweep.Place, rounded: Float[Array, "W T D"], original: sweep.Place, exact: Float[Array, "W T D"], name: str
) -> Inputs:
    """Of an activation of a block, from the hidden states before that, as it is rounded so far and as it was; one
    window at a time."""
    (width,) = (a.width for a in at.block.activations if a.name == name)
    total = Inputs(jnp.zeros((width, width)), jnp.zeros((width, width)))
    for windows in zip(rounded, exact, strict=True):
        total = _with_window(total, at.block, at.weights, original.weights, *map(jnp.asarray, windows), name)
        scratch.release(rounded)
        scratch.release(exact)
    return jax.tree.map(lambda sums: sums / (rounded.shape[0] * rounded.shape[1]), total)


@functools.partial(jax.jit, static_argnames=("block", "name"), donate_argnums=0)
def _with_window(
    total: Inputs,
    block: Block,
    w: Params,
    original: Params,
    rounded: Float[Array, "T D"],
    exact: Float[Array, "T D"],
    name: str,
) -> Inputs:
    read, wanted = (_read_by(block, p, x[None], name)[0] for p, x in ((w, rounded), (original, exact)))
    return Inputs(total.second + matmul(read.T, read), total.missed + matmul((wanted - read).T, read))


def read_by(at: sweep.Place, x: Float[Array, "W T D"], name: str) -> Float[Array, "W T C"]:
    """An activation of a block as its readers multiply it, from the hidden states before that."""
    return sweep.in_batches(functools.partial(_read_by, at.block, at.weights, name=name), x)


@functools.partial(jax.jit, static_argnames=("block", "name"))
def _read_by(block: Block, w: Params, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T C"]:
    return block_taps(block, w, x, lambda a: a)[1][name]


def in_chunks(w: Float[Array, "O I"], loss_of: Curvature, fmt: str) -> Any:
    """`compensated`, then `descended`, in chunks of rows, which are independent, on all cores; accelerators take all
    rows at once."""
    on_cpu = jax.default_backend() == "cpu"
    size = _ROWS if on_cpu else len(w)

    def one_chunk(start: int) -> Any:
        rows = jnp.pad(w[start : start + size], ((0, max(0, start + size - len(w))), (0, 0)))
        codes = compensated(rows, loss_of.upper, fmt)
        return jax.block_until_ready(descended(rows, codes, loss_of.second, fmt))

    with ThreadPoolExecutor(cores() if on_cpu else 1) as pool:
        chunks = list(pool.map(one_chunk, range(0, len(w), size)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(w)], *chunks)


@functools.partial(jax.jit, static_argnames="fmt")
def _better(
    w: Float[Array, "O I"], inputs: Float[Array, "W T I"], exact: Float[Array, "W T I"], fmt: str, new: Any, old: Any
) -> Any:
    """Codes of each row from `new` where its outputs lose less than with `old`."""
    decoded = tuple(get_format(fmt).decode(codes) for codes in (new, old))
    better = jnp.less(*losses(decoded, inputs, w, exact))

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def curvature(second: Float[Array, "I I"]) -> Curvature:
    """Of outputs whose inputs have the second moment H, which is given up; not finite where nothing was seen.

    Channels that were never active get the mean, so that their weights are rounded as they are.
    """
    shrunk = _shrunk(jnp.asarray(second))
    return Curvature(shrunk, factor(shrunk))


@jax.jit
def making_up(w: Float[Array, "O I"], missed: Float[Array, "O I"], loss_of: Curvature) -> Float[Array, "O I"]:
    """Weights on the way to those that outputs want of inputs x̂, W + E[W (x − x̂) x̂ᵀ] H⁻¹, of which `missed` is the
    expectation."""
    return w + MADE_UP * matmul(matmul(missed, loss_of.upper.T), loss_of.upper)


@functools.partial(jax.jit, donate_argnames="second")
def _shrunk(second: Float[Array, "I I"]) -> Float[Array, "I I"]:
    diagonal = jnp.diagonal(second)
    mean = jnp.mean(diagonal)
    added = jnp.where(diagonal > 0, SHRINKAGE * jnp.sqrt(mean * diagonal), mean)
    return jnp.fill_diagonal(second, diagonal + added, inplace=False)


def factor(second: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """Upper triangular U with H⁻¹ = Uᵀ U; not finite where H is singular. Three matrices of its size exist at most."""
    turned = _root_of_turned(second)  # R Rᵀ = H turned around, of which R⁻¹ turned around is U
    for start in range(0, len(second), _PANEL):
        turned = _with_inverse_columns(turned, start, min(_PANEL, len(second) - start))
    return _turned(turned)


@jax.jit
def _root_of_turned(second: Float[Array, "I I"]) -> Float[Array, "I I"]:
    return jax.lax.linalg.cholesky(second[::-1, ::-1], symmetrize_input=False)


@functools.partial(jax.jit, static_argnames="size", donate_argnames="lower")
def _with_inverse_columns(lower: Float[Array, "I I"], start: int, size: int) -> Float[Array, "I I"]:
    """Some columns replaced by those of the inverse: zeros above them, so what stands there by now does not matter."""
    rows = jnp.arange(len(lower))
    unit = (rows[:, None] == start + jnp.arange(size)[None]).astype(lower.dtype)
    columns = jax.scipy.linalg.solve_triangular(lower, unit, lower=True)
    return jax.lax.dynamic_update_slice_in_dim(lower, columns, start, 1)


@functools.partial(jax.jit, donate_argnames="a")
def _turned(a: Float[Array, "I I"]) -> Float[Array, "I I"]:
    return a[::-1, ::-1]


def compensated(w: Float[Array, "O I"], upper: Float[Array, "I I"], name: str) -> Any:
    """Codes of w in format `name`, every column's error passed on to the columns after it."""
    size, rest, codes = get_format(name).block_size, w.T, []
    for start in range(0, w.shape[1], size):
        found, errors = _round_block(*_block_of(rest, upper, start, size), name)
        rest = _passed_on(rest, upper, errors, start)
        codes.append(found)
    return jax.tree.map(lambda *blocks: jnp.concatenate(blocks, axis=1), *codes)  # [O, 1, ...] → [O, blocks, ...]


@functools.partial(jax.jit, static_argnames="size")
def _block_of(
    rest: Float[Array, "I O"], upper: Float[Array, "I I"], start: int, size: int
) -> tuple[Float[Array, "S O"], Float[Array, "S S"]]:
    """A block's columns as they are when its turn comes, and its part of U."""
    x = jax.lax.dynamic_slice_in_dim(rest, start, size)
    return x, jax.lax.dynamic_slice(upper, (start, start), (size, size))


@functools.partial(jax.jit, donate_argnames="rest")
def _passed_on(
    rest: Float[Array, "I O"], upper: Float[Array, "I I"], errors: Float[Array, "S O"], start: int
) -> Float[Array, "I O"]:
    """Columns that make up for a block's errors; those of the block itself and before it are done with."""
    rows = jax.lax.dynamic_slice_in_dim(upper, start, len(errors))  # [S, I]
    return rest - matmul(rows.T, errors)


@functools.partial(jax.jit, static_argnames="name")
def _round_block(x: Float[Array, "S O"], upper: Float[Array, "S S"], name: str) -> tuple[Any, Float[Array, "S O"]]:
    """Codes of one block per row, and each column's error over U_jj; one compilation per format and number of rows."""
    importance = 1 / jnp.square(jnp.diagonal(upper))  # of a column's error, once later columns have made up for it
    fmt = get_format(name)
    if (grid := fmt.grid) is None:
        raise ValueError(f"{name} has no codes to choose among.")
    chosen = improve(fmt.encode(x.T, importance, "coarse"), x.T, importance, grid)
    state = state_of(chosen)
    q, errors = (_by_columns if grid.columns == 1 else _by_groups)(x, upper, state, grid)
    return codes_of(state.with_columns(q), chosen), errors


def _by_columns(x: Float[Array, "S O"], upper: Float[Array, "S S"], state: State, grid: Grid) -> tuple[Any, ...]:
    """Codes by column, and errors as `_round_block` gives them."""
    step, low, before = state.step, state.low, state.by_column
    size = len(x)

    def one_column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, q, errors = carry
        rounded = grid.round((x[j] + low[j]) * reciprocal(step[j]), x[j])
        code = jnp.where(step[j] == 0, before[j], rounded)
        error = (x[j] - (step[j] * code - low[j])) / upper[j, j]
        later = jnp.where(jnp.arange(size) > j, upper[j], 0)
        return x - later[:, None] * error[None], q.at[j].set(code), errors.at[j].set(error)

    _, q, errors = jax.lax.fori_loop(0, size, one_column, (x, before, jnp.zeros_like(x)))
    return q, errors


def _by_groups(x: Float[Array, "S O"], upper: Float[Array, "S S"], state: State, grid: Grid) -> tuple[Any, ...]:
    """The same where codes go together: errors e of a group lose |z|² with Uᵀ z = e for its part of U."""
    size, step, before = grid.columns, state.step, state.by_column
    within = jnp.stack([upper[at : at + size, at : at + size] for at in range(0, len(x), size)])
    eye = jnp.broadcast_to(jnp.eye(size), within.shape)
    solved = jnp.swapaxes(jax.scipy.linalg.solve_triangular(within, eye, lower=False), 1, 2)
    weight = jnp.sum(jnp.square(solved), axis=1)

    def one_group(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, q, errors = carry
        at = j * size
        wanted, by, old = (jax.lax.dynamic_slice_in_dim(a, at, size) for a in (x, step, before))
        rounded = grid.round(wanted * reciprocal(by), jnp.broadcast_to(weight[j][:, None], old.shape))
        code = jnp.where(by == 0, old, rounded)
        error = matmul(solved[j], wanted - by * code)
        rows = jax.lax.dynamic_slice_in_dim(upper, at, size)
        later = jnp.where(jnp.arange(len(x)) >= at + size, rows, 0)
        x = x - matmul(later.T, error)
        put = jax.lax.dynamic_update_slice_in_dim
        return x, put(q, code, at, 0), put(errors, error, at, 0)

    _, q, errors = jax.lax.fori_loop(0, len(within), one_group, (x, before, jnp.zeros_like(x)))
    return q, errors


@jax.jit
def losses(
    rounded: tuple[Float[Array, "O I"], ...],
    inputs: Float[Array, "W T I"],
    w: Float[Array, "O I"],
    exact: Float[Array, "W T I"],
) -> tuple[Float[Array, " O"], ...]:
    """What every row of each of `rounded` makes of its inputs, beside what w makes of the exact ones: squared
    differences, their mean over all tokens."""

    def add(totals: Any, window: tuple[Float[Array, "T I"], Float[Array, "T I"]]) -> tuple[Any, None]:
        wanted = matmul(w, window[1].T)
        off = [matmul(one, window[0].T) - wanted for one in rounded]
        return tuple(total + jnp.sum(jnp.square(o), axis=1) for total, o in zip(totals, off, strict=True)), None

    totals, _ = jax.lax.scan(add, tuple(jnp.zeros(len(w)) for _ in rounded), (inputs, exact))
    return tuple(total / (inputs.shape[0] * inputs.shape[1]) for total in totals)

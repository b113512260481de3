"""Error-compensated rounding inside GGUF blocks (GPTQ, Frantar et al. 2023, in the grids of block formats).

Columns of W are rounded one after the other; what a column loses is made up for in the columns that are still to
come, which the outputs Σ x_i w_i allow as far as inputs are correlated. With the second moment H = E[x xᵀ] the loss is
tr(E H Eᵀ), and H⁻¹ = Uᵀ U with upper triangular U tells how: column j loses e_j = (w_j − ŵ_j) / U_jj, and column k > j
takes w_k − e_j U_jk. A block's scales and minima are chosen when its turn comes, by `effort="best"` on the weights as
they are then, and its codes replaced column by column; the result is ordinary codes of the format.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax import sweep
from ramp_jax.allocation import Allocation
from ramp_jax.checkpoint import digest
from ramp_jax.formats import decode, get_format
from ramp_jax.formats.best import codes_of, state_of
from ramp_jax.formats.rounding import reciprocal
from ramp_jax.formats.row_chunks import in_row_chunks
from ramp_jax.models import Model, lookup, matrices, tensors
from ramp_jax.models.decoder import Params, look_up
from ramp_jax.models.layout import Block, replace_in_block
from ramp_jax.quantization.calibrate import block_second_moments
from ramp_jax.quantization.encoder import Encoder, Fitted
from ramp_jax.quantization.fake_quant import decoded

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""

_LOG = logging.getLogger(__name__)


def compensate(model: Model, allocation: Allocation, windows: Int[np.ndarray, "W T"], plain: Encoder) -> Encoder:
    """`plain` with compensated codes for every linear of the blocks, fitted on calibration windows.

    `model` is folded as it is to be quantized. Blocks go in order, and so do the linears of a block: inputs are those
    that already quantized tensors make. A quarter of the windows is not fitted on but decides, row by row, whether the
    outputs lose less than as `plain` rounds them. Tensors before which nothing was seen, or whose second moments are
    singular, are rounded by `plain`. Second moments of one activation exist at a time.
    """
    members = {tensor.name: tensor for tensor in matrices(model.spec)}
    first = tensors(model.spec)[0]
    embedding = decoded(model, first, allocation.format_of(first), plain)
    x, fitted, failed = look_up(model.spec, embedding, windows), {}, []
    for at in sweep.forward(model.spec, model.params, "compensating"):
        w = at.weights
        for activation in at.block.activations:
            readers = [members[at.full(weight.name)] for weight in at.block.readers(activation.name)]
            gridded = [tensor for tensor in readers if get_format(allocation.formats[tensor.name]).grid]
            second, check = _seconds(at.block, w, x, activation.name) if gridded else (None, None)
            upper = factor(second) if gridded else None
            usable = gridded and bool(jnp.isfinite(upper).all())
            failed += [] if usable else [tensor.name for tensor in gridded]
            for tensor in readers:
                fmt = allocation.formats[tensor.name]
                found = plain.encode(model, tensor, fmt)
                value = lookup(model.params, tensor)
                exact = value.astype(jnp.float32)
                if usable and tensor in gridded:
                    found = _better(exact, check, fmt, in_chunks(exact, upper, fmt), found)
                fitted[tensor.name, fmt] = Fitted(jax.tree.map(np.asarray, found), digest(exact))
                w = replace_in_block(w, {tensor.weight.name: decode(found, fmt).astype(value.dtype)})
        x = sweep.advance(at._replace(weights=w), x)
    if failed:
        _LOG.warning(
            "the inputs of %d tensors have no usable second moment, first %s; they are rounded without compensation.",
            len(failed),
            failed[0],
        )
    return dataclasses.replace(plain, fitted=fitted)


def _seconds(
    block: Block, w: Params, x: Float[Array, "W T D"], name: str
) -> tuple[Float[Array, "C C"], Float[Array, "C C"]]:
    """Second moments to fit on and to decide by: of three quarters of the windows and of the rest, if there is one."""
    border = len(x) // 4
    _, fit = block_second_moments(block, w, x[border:], (name,))
    _, check = block_second_moments(block, w, x[:border], (name,)) if border else (x, fit)
    return fit[name], check[name]


def in_chunks(w: Float[Array, "O I"], upper: Float[Array, "I I"], fmt: str) -> Any:
    """`compensated` in chunks of rows, which are independent, on all cores."""
    chunks = in_row_chunks(functools.partial(compensated, name=fmt), w, upper)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(w)], *chunks)


@functools.partial(jax.jit, static_argnames="fmt")
def _better(w: Float[Array, "O I"], second: Float[Array, "I I"], fmt: str, new: Any, old: Any) -> Any:
    """Codes of each row from `new` where its outputs lose less than with `old`."""
    known = get_format(fmt)
    better = loss(known.decode(new) - w, second) < loss(known.decode(old) - w, second)

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


@jax.jit
def factor(second: Float[Array, "I I"], damping: Float[Array, ""] | float = DAMPING) -> Float[Array, "I I"]:
    """Upper triangular U with (H + damping · mean diagonal)⁻¹ = Uᵀ U; not finite where H is singular beyond that.

    Channels that were never active get the mean, so that their weights are rounded as they are.
    """
    diagonal = jnp.diagonal(second)
    mean = jnp.mean(diagonal)
    damped = second + jnp.diag(jnp.where(diagonal > 0, damping * mean, mean))
    flipped = jnp.linalg.cholesky(damped[::-1, ::-1])  # H = R Rᵀ with R = flipped, turned around
    return jax.scipy.linalg.solve_triangular(flipped[::-1, ::-1], jnp.eye(len(second)), lower=False)


@functools.partial(jax.jit, static_argnames="name")
def compensated(w: Float[Array, "O I"], upper: Float[Array, "I I"], name: str) -> Any:
    """Codes of w in format `name`, every column's error passed on to the columns after it."""
    size = get_format(name).block_size
    importance = 1 / jnp.square(jnp.diagonal(upper))  # of a column's error, once later columns have made up for it

    def one_block(rest: Float[Array, "I O"], start: jax.Array) -> tuple[Float[Array, "I O"], Any]:
        x = jax.lax.dynamic_slice_in_dim(rest, start, size)
        weight = jax.lax.dynamic_slice_in_dim(importance, start, size)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, size)  # [size, I]
        codes, errors = _round_block(x, weight, jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1), name)
        later = jnp.arange(rest.shape[0]) >= start + size
        return rest - jnp.matmul(jnp.where(later[None], rows, 0).T, errors, precision="highest"), codes

    _, codes = jax.lax.scan(one_block, w.T, jnp.arange(0, w.shape[1], size))
    return jax.tree.map(lambda a: jnp.moveaxis(a[:, :, 0], 0, 1), codes)  # [blocks, O, 1, ...] → [O, blocks, ...]


def _round_block(
    x: Float[Array, "S O"], importance: Float[Array, " S"], upper: Float[Array, "S S"], name: str
) -> tuple[Any, Float[Array, "S O"]]:
    """Codes of one block per row, and each column's error over U_jj."""
    chosen = get_format(name).encode(x.T, importance, "best")
    state = state_of(chosen)
    size, subs = x.shape[0], state.scale.shape[0]
    step, low = (jnp.repeat(a, size // subs, axis=0) for a in (state.d * state.scale, state.dmin * state.min))
    before = _columns(state.q)

    def one_column(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, q, errors = carry
        rounded = get_format(name).grid.round((x[j] + low[j]) * reciprocal(step[j]))
        code = jnp.where(step[j] == 0, before[j], rounded)
        error = (x[j] - (step[j] * code - low[j])) / upper[j, j]
        later = jnp.where(jnp.arange(size) > j, upper[j], 0)
        return x - later[:, None] * error[None], q.at[j].set(code), errors.at[j].set(error)

    _, q, errors = jax.lax.fori_loop(0, size, one_column, (x, before, jnp.zeros_like(x)))
    return codes_of(state._replace(q=_sub_blocks(q, subs)), chosen), errors


def _columns(q: Float[Array, "E S N"]) -> Float[Array, "S*E N"]:
    return jnp.swapaxes(q, 0, 1).reshape(-1, q.shape[-1])


def _sub_blocks(q: Float[Array, "S*E N"], subs: int) -> Float[Array, "E S N"]:
    return jnp.swapaxes(q.reshape(subs, -1, q.shape[-1]), 0, 1)


@jax.jit
def loss(off: Float[Array, "O I"], second: Float[Array, "I I"]) -> Float[Array, " O"]:
    """e H eᵀ of every row of errors: what the row's output loses, mean squared."""
    return jnp.sum(jnp.matmul(off, second, precision="highest") * off, axis=1)

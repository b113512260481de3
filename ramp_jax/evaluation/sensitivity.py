"""The exact sensitivity table: what quantizing one tensor to one level costs, everything else unchanged.

The cost is the mean KL divergence to the unquantized model on calibration windows. Hidden states before a layer do
not change when that layer is quantized: they are advanced layer by layer, each measurement runs from its layer on, and
all tensors and levels of one layer run together as a batch that shares the reference's logits.

Memory beside the weights, for W windows of T tokens and batches of K cells (K · W · T is at most `_TOKENS_AT_ONCE`,
or W · T where that is more): (K + 3) · W · T · D f32 of hidden states, one layer's activations of K · W · T tokens
(about 3 · F f32 each), K tensors and one chunk of logits. With 7B shapes and 8 × 2,048 tokens (K = 1): 1.1 GB, 2.2 GB
and less than 0.5 GB. No axis grows with the number of layers.
"""

import functools
import itertools
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.evaluation.perplexity import Protocol, first_scored, mean_divergences
from ramp_jax.evaluation.table import Sensitivity, fingerprint
from ramp_jax.formats import Format, format_for
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable
from ramp_jax.models.decoder import Params, block_forward, embed, head_weights, layer_params, rms_norm
from ramp_jax.progress import track
from ramp_jax.quantization import REFERENCE, Encoder, decoded

_TOKENS_AT_ONCE = 8192  # of all variants that run together
_NUDGE = 2.0**-20  # of every hidden state; Q8_0 moves a tensor's outputs by about 2⁻⁸, which costs 10⁷ times more


def exact_sensitivity(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[int, ...],
    protocol: Protocol = "llama.cpp",
    *,
    path: str | Path | None = None,
    tensors: Collection[str] | None = None,
    encoder: Encoder = REFERENCE,
) -> Sensitivity:
    """Measure tensors (default: every allocatable one), rounded by `encoder`, at every level that can hold their rows.

    Counts the tokens that `protocol` scores and runs in the dtype of the model's weights. The noise floor of a row is
    what the same computation reads when the hidden states before the row's layer move by a part in a million, up and
    down by turns over the channels. With `path`, the table is saved there after every batch, and
    one that was stopped goes on to the same bits. Raises `ValueError` where `path` holds a table of other inputs.
    """
    members = [tensor for tensor in allocatable(model.spec) if tensors is None or tensor.name in tensors]
    inputs = fingerprint(model, windows, members, levels, protocol, "exact", encoder)
    table = Sensitivity.begin(members, levels, inputs, path)
    if table.finished:
        return table
    scored = slice(first_scored(protocol, windows.shape[1]), -1)
    batches = _batches(members, levels, size=max(1, _TOKENS_AT_ONCE // windows.size))
    with jax.default_matmul_precision("default"):
        state, depth = embed(model.spec, model.params["token_embd"], windows), 0
        reference = _run_from(model.spec, model.params, state[None], 0)[0, :, scored]
        for batch in track(batches, "measuring sensitivity", "batch"):
            started = time.monotonic()
            while depth < _depth(model.spec, batch[0].tensor):
                state, depth = block_forward(model.spec, layer_params(model.params, depth), state), depth + 1
            rows, columns = zip(*((cell.row, cell.column) for cell in batch), strict=True)
            if np.isnan(table.kld[rows, columns]).any():
                floor, *kld = _costs(model, batch, state, windows, reference, scored, encoder)
                table = table.with_cells(rows, columns, kld, floor, time.monotonic() - started)
                if path is not None:
                    table.save(path)
    return table


class Cell(NamedTuple):
    """One cell of the table: tensor `row` at level `column`."""

    row: int
    column: int
    tensor: Tensor
    format: Format


def cells(members: list[Tensor], levels: tuple[int, ...]) -> list[Cell]:
    """Every cell that is not masked, row by row."""
    return [
        Cell(row, column, tensor, fmt)
        for row, tensor in enumerate(members)
        for column, level in enumerate(levels)
        if (fmt := format_for(level, tensor.shape[-1]))
    ]


def _batches(members: list[Tensor], levels: tuple[int, ...], size: int) -> list[list[Cell]]:
    """All cells, in batches of one layer and up to `size`; those of a layer are equally long, so that all layers share
    one compiled function: the last cell fills up what is missing."""
    layers = [list(group) for _, group in itertools.groupby(cells(members, levels), lambda cell: cell.tensor.layer)]
    return [part for layer in layers for part in _split(layer, size)]


def _split(layer: list[Cell], size: int) -> list[list[Cell]]:
    equal = -(-len(layer) // -(-len(layer) // size))
    filled = layer + layer[-1:] * (-len(layer) % equal)
    return [filled[start : start + equal] for start in range(0, len(filled), equal)]


def _depth(spec: DecoderSpec, tensor: Tensor) -> int:
    """How many layers of the unchanged model run before the tensor is read."""
    if tensor.layer is not None:
        return tensor.layer
    return spec.n_layers if tensor.key == "output" else 0


def _costs(
    model: Model,
    batch: list[Cell],
    state: Float[Array, "W T D"],
    windows: Int[np.ndarray, "W T"],
    reference: Float[Array, "W S D"],
    scored: slice,
    encoder: Encoder,
) -> Float[np.ndarray, " K"]:
    """Mean KL of the nudged reference and of each cell of one layer, which share every later layer."""
    spec, params, first = model.spec, model.params, batch[0].tensor
    new = [decoded(model, cell.tensor, cell.format.name, encoder) for cell in batch]
    nudged = state * (1 + _NUDGE * (1 - 2 * (jax.lax.broadcasted_iota(jnp.float32, state.shape, 2) % 2)))
    if first.layer is not None:
        layer = layer_params(params, first.layer)
        changed = [block_forward(spec, layer | {cell.tensor.key: w}, state) for cell, w in zip(batch, new, strict=True)]
        starts, depth = [block_forward(spec, layer, nudged), *changed], first.layer + 1
    elif first.key == "output":
        starts, depth = [nudged] + [state] * len(new), spec.n_layers
    else:
        starts, depth = [nudged, *(embed(spec, w, windows) for w in new)], 0
    hidden = _tokens(_run_from(spec, params, jnp.stack(starts), depth)[:, :, scored])
    head, reference = head_weights(params), _tokens(reference)
    if first.layer is not None or (first.key == "token_embd" and not spec.tied):
        return np.asarray(mean_divergences(hidden, head, reference, head))
    pairs = zip(hidden, [head, *new], strict=True)
    return np.concatenate([mean_divergences(x[None], changed, reference, head) for x, changed in pairs])


def _tokens(hidden: Float[Array, "... W S D"]) -> Float[Array, "... W*S D"]:
    """Windows and their tokens on one axis."""
    return hidden.reshape(*hidden.shape[:-3], -1, hidden.shape[-1])


@functools.partial(jax.jit, static_argnames="spec")
def _run_from(
    spec: DecoderSpec, params: Params, x: Float[Array, "K W T D"], layer: Int[Array, ""]
) -> Float[Array, "K W T D"]:
    """Normed hidden states after the last layer, from those before `layer`; one compilation for all layers."""

    def one_layer(i: jax.Array, y: jax.Array) -> jax.Array:
        return block_forward(spec, layer_params(params, i), y)

    y = jax.lax.fori_loop(layer, spec.n_layers, one_layer, x.reshape(-1, *x.shape[2:]))
    return rms_norm(y, params["output_norm"], spec.norm_eps).reshape(x.shape)

"""The exact sensitivity table: what quantizing one tensor to one level costs, everything else unchanged.

The cost is the mean KL divergence to the unquantized model on calibration windows. Hidden states before a layer do
not change when that layer is quantized: they are advanced layer by layer, each measurement runs from its layer on, and
all tensors and levels of one layer run together as a batch that shares the reference's logits.

Memory beside the weights, for W windows of T tokens and batches of K variants (K · W · T is at most `_TOKENS_AT_ONCE`,
on accelerators `_TOKENS_ON_ACCELERATORS`, or 2 · W · T where that is more): (K + 3) · W · T · D f32 of hidden states,
one layer's activations of K · W · T tokens (about 3 · F f32 each, or one block of attention scores), K tensors and one
chunk of logits. With 7B shapes and 8 × 2,048 tokens on an accelerator (K = 4): 1.9 GB, 8.7 GB and less than 1 GB. No
axis grows with the number of layers.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax import devices, hosts, sweep
from ramp_jax.formats import Format
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable
from ramp_jax.models.decoder import Params, block_forward, embed, final_norm, look_up, output_head
from ramp_jax.models.layout import replace_in_block
from ramp_jax.overrides import format_at
from ramp_jax.progress import track
from ramp_jax.quantization import REFERENCE, Encoder, decoded
from ramp_jax.scoring.perplexity import Protocol, first_scored, mean_divergences
from ramp_jax.sensitivity.table import Sensitivity, fingerprint

_TOKENS_AT_ONCE = 1 << 13  # of all variants that run together
_TOKENS_ON_ACCELERATORS = 1 << 16
_NUDGE = 2.0**-20  # of every hidden state; Q8_0 moves a tensor's outputs by about 2⁻⁸, which costs 10⁷ times more


def exact_sensitivity(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float | str, ...],
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
    at_once = _TOKENS_AT_ONCE if jax.default_backend() == "cpu" else _TOKENS_ON_ACCELERATORS
    batches = _batches(members, levels, size=max(2, at_once // windows.size))
    # TPUs round the factors of f32 products to bf16 by default, in whose noise the highest levels drown
    with jax.default_matmul_precision("highest" if jax.default_backend() == "tpu" else "default"):
        state, depth = embed(model.spec, model.params, windows), 0
        blocks = sweep.forward(model.spec, model.params)
        reference = _run_from(model.spec, model.params, state[None], 0)[0, :, scored]
        hosts.barrier()  # all have read the table that process 0 goes on with
        todo = [batch for batch in batches if np.isnan(table.kld[batch.rows, batch.columns]).any()]
        bar = track(todo, "measuring sensitivity", "batch")
        for layer, same in itertools.groupby(bar, lambda batch: _depth(model.spec, batch.cells[0].tensor)):
            while depth < layer:
                state, depth = sweep.advance(next(blocks), state), depth + 1

            def measure(own: Sequence[Batch], state: jax.Array = state) -> list[Float[np.ndarray, " K"]]:
                return [_costs(model, batch, state, windows, reference, scored, encoder) for batch in own]

            while together := list(itertools.islice(same, hosts.count())):
                started = time.monotonic()
                for batch, kld in zip(together, hosts.shared(measure, together), strict=True):
                    floor, kld = (kld[0], kld[1:]) if batch.nudged else (table.floor[batch.first_row], kld)
                    table = table.with_cells(batch.rows, batch.columns, kld, floor, time.monotonic() - started)
                    started = time.monotonic()
                if path is not None and hosts.index() == 0:
                    table.save(path)
    return table


class Cell(NamedTuple):
    """One cell of the table: tensor `row` at level `column`."""

    row: int
    column: int
    tensor: Tensor
    format: Format


def cells(members: Sequence[Tensor], levels: tuple[float | str, ...]) -> list[Cell]:
    """Every cell that is not masked, row by row."""
    return [
        Cell(row, column, tensor, fmt)
        for row, tensor in enumerate(members)
        for column, level in enumerate(levels)
        if (fmt := format_at(level, tensor))
    ]


class Batch(NamedTuple):
    """Cells of one layer that run together, the nudged reference before them in the first batch of a layer."""

    cells: list[Cell]
    nudged: bool
    first_row: int  # of the layer; the nudge gives it its floor

    @property
    def rows(self) -> list[int]:
        """Of the table, by cell."""
        return [cell.row for cell in self.cells]

    @property
    def columns(self) -> list[int]:
        """Of the table, by cell."""
        return [cell.column for cell in self.cells]


def _batches(members: Sequence[Tensor], levels: tuple[float | str, ...], size: int) -> list[Batch]:
    """All cells, in batches of one layer and up to `size` variants; those of a layer are equally long, so that all
    layers share one compiled function: the last cell fills up what is missing."""
    layers = [list(group) for _, group in itertools.groupby(cells(members, levels), lambda cell: _place(cell.tensor))]
    return [part for layer in layers for part in _split(layer, size)]


def _split(layer: list[Cell], size: int) -> list[Batch]:
    variants = len(layer) + 1  # with the nudge
    equal = -(-variants // -(-variants // size))
    filled = layer + layer[-1:] * (-variants % equal)
    cuts = [0, *range(equal - 1, len(filled) + 1, equal)]
    return [Batch(filled[a:b], a == 0, layer[0].row) for a, b in itertools.pairwise(cuts)]


def _place(tensor: Tensor) -> int | str:
    """Tensors of one place run together: those of a layer, the embedding, the head."""
    return tensor.name if tensor.layer is None else tensor.layer


def _is_head(tensor: Tensor) -> bool:
    """Whether it is a head of its own, not an embedding (which may be the head as well)."""
    return tensor.path[0] == "output"


def _depth(spec: DecoderSpec, tensor: Tensor) -> int:
    """How many blocks of the unchanged model run before the tensor is read."""
    if tensor.layer is not None:
        return tensor.layer
    return len(spec.blocks) if _is_head(tensor) else 0


def _costs(
    model: Model,
    batch: Batch,
    state: Float[Array, "W T D"],
    windows: Int[np.ndarray, "W T"],
    reference: Float[Array, "W S D"],
    scored: slice,
    encoder: Encoder,
) -> Float[np.ndarray, " K"]:
    """Mean KL of the nudged reference, if it is in the batch, and of each cell, which share every later layer."""
    spec, params, first = model.spec, model.params, batch.cells[0].tensor
    new = [decoded(model, cell.tensor, cell.format.name, encoder) for cell in batch.cells]
    nudged = [_nudged(state)] if batch.nudged else []
    if first.layer is not None:
        at = next(sweep.forward(spec, params, first=first.layer))
        at = at._replace(weights=sweep.placed(at))
        pairs = zip(batch.cells, new, strict=True)
        changed = [at._replace(weights=replace_in_block(at.weights, {c.tensor.weight.name: w})) for c, w in pairs]
        starts = [sweep.advance(at, x) for x in nudged] + [sweep.advance(place, state) for place in changed]
        depth = first.layer + 1
    elif _is_head(first):
        starts, depth = nudged + [state] * len(new), len(spec.blocks)
    else:
        starts, depth = nudged + [look_up(spec, w, windows) for w in new], 0
    hidden = _tokens(_run_from(spec, params, jnp.stack(starts), depth)[:, :, scored])
    head, reference = output_head(spec, params), _tokens(reference)
    if first.layer is not None or not (spec.tied or _is_head(first)):
        found = devices.each(mean_divergences, _shares(hidden), head, reference, head)
        return np.concatenate(list(found))[: len(hidden)]
    heads = [head] * batch.nudged + [dataclasses.replace(head, weight=w) for w in new]
    pairs = ((x[None], changed) for x, changed in zip(hidden, heads, strict=True))
    return np.concatenate(list(devices.each(mean_divergences, pairs, reference, head)))


def _shares(hidden: Float[Array, "K N D"]) -> list[tuple[Float[Array, "S N D"]]]:
    """Variants in equal shares, one per device; the last variant fills up what is missing."""
    size = -(-len(hidden) // devices.count())
    shares = np.minimum(np.arange(-(-len(hidden) // size) * size), len(hidden) - 1).reshape(-1, size)
    return [(hidden[share],) for share in shares]


@jax.jit
def _nudged(state: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
    return state * (1 + _NUDGE * (1 - 2 * (jax.lax.broadcasted_iota(jnp.float32, state.shape, 2) % 2)))


def _tokens(hidden: Float[Array, "... W S D"]) -> Float[Array, "... W*S D"]:
    """Windows and their tokens on one axis."""
    return hidden.reshape(*hidden.shape[:-3], -1, hidden.shape[-1])


def _run_from(spec: DecoderSpec, params: Params, x: Float[Array, "K W T D"], depth: int) -> Float[Array, "K W T D"]:
    """Normed hidden states after the last block, from those before the block at `depth`."""
    y = x.reshape(-1, *x.shape[2:])
    for at in sweep.forward(spec, params, first=depth):
        y = devices.along_data(functools.partial(block_forward, at.block, sweep.placed(at)), y)
    return final_norm(spec, params, y).reshape(x.shape)

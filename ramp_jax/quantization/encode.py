"""All tensors of an allocation as codes, from one sweep: what an encoder needs is found while a block is there."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from ramp_jax import sweep
from ramp_jax.allocation import Allocation
from ramp_jax.formats import decode
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import Model, Tensor, tensors
from ramp_jax.models.layout import of_block
from ramp_jax.models.store import pieces_of, rows_named
from ramp_jax.quantization.calibrate import Seen, no_signs, observe
from ramp_jax.quantization.compensate import Uncompensated, compensated_block
from ramp_jax.quantization.encoder import Encoder
from ramp_jax.quantization.fold import folded_block, scales_to
from ramp_jax.quantization.importance import Importance

_PIECE = 1 << 23  # weights that are encoded at a time: searches need several times that in f32

TAKEN = "encoding"
"""The step of a journal that says how many blocks were taken, and the hidden states after them."""

Codes = Iterator[Any]
"""Codes of a tensor, some rows at a time; they are made as they are asked for."""


def encoded(
    model: Model, allocation: Allocation, encoder: Encoder, doing: str = "encoding", journal: Journal = NOWHERE
) -> Iterator[tuple[Tensor, Codes]]:
    """Every tensor in the file's order with its codes, `model` folded as the allocation says whatever it was.

    One sweep over the weights. Beside two blocks, memory holds the hidden states of the encoder's windows, up to four
    times where it compensates, and the codes of one block. Tensors that were taken before `journal` last kept a block
    are left out. Raises `ValueError` where a tensor cannot be encoded.
    """
    spec, windows, observes = model.spec, encoder.windows, encoder.observes
    embedding, *ends = (tensor for tensor in tensors(spec) if tensor.layer is None)
    inside = {tensor.name: tensor for tensor in tensors(spec) if tensor.layer is not None}
    scales = scales_to(model, allocation.folding)
    folding = model.folding | {name: model.folding.get(name, 1.0) * s for name, s in scales.items()}

    def pieces(tensor: Tensor) -> Codes:
        """Of a tensor outside the blocks."""
        for rows in pieces_of(model.params, tensor, max(1, _PIECE // tensor.shape[-1])):
            yield encoder.encode_rows(tensor, rows, allocation.format_of(tensor), folding)

    if (kept := journal.load(TAKEN)) is not None:
        seen, rounded = (None if x is None else sweep.held(x) for x in kept["states"])
    else:
        yield embedding, pieces(embedding)
        seen = sweep.begin(spec, model.params, windows) if observes or encoder.compensated else None
        rounded = _rounded_start(model, allocation, encoder) if encoder.compensated else None
    left_out = Uncompensated()
    for at in sweep.forward(spec, model.params, doing, first=kept["blocks"] if kept else 0):
        exact = None if rounded is None else sweep.held(seen)
        if observes:
            seen, found = observe(at, seen, no_signs(windows))
            encoder = dataclasses.replace(encoder, importance=_importance(at, found, model))
        elif seen is not None:
            seen = sweep.advance(at, seen)
        at = at._replace(weights=folded_block(at.block, at.index, at.weights, scales))
        members = {weight.name: inside[at.full(weight.name)] for weight in at.block.weights}
        formats = {name: allocation.format_of(tensor) for name, tensor in members.items()}
        codes: dict[str, Any] = {}
        if rounded is not None:
            rounded, codes = compensated_block(at, members, formats, encoder, folding, exact, rounded, left_out)
        del exact
        for name, tensor in members.items():
            w, known = of_block(at.weights, name), codes.pop(name, None)
            yield tensor, iter([known]) if known is not None else _rows(encoder, tensor, w, formats[name], folding)
        journal.save(TAKEN, {"blocks": at.index + 1, "states": [seen, rounded]})
    left_out.report()
    for tensor in ends:
        yield tensor, pieces(tensor)


def _rows(encoder: Encoder, tensor: Tensor, w: Float[Array, "O I"], fmt: str, folding: Any) -> Codes:
    """Of a tensor that is there."""
    step = max(1, _PIECE // w.shape[-1]) if w.ndim > 1 else len(w)
    for start in range(0, len(w), step):
        yield encoder.encode_rows(tensor, w[start : start + step], fmt, folding)


def _rounded_start(model: Model, allocation: Allocation, encoder: Encoder) -> Float[Array, "W T D"]:
    """What enters the first block where the embedding is rounded: rows of the windows' tokens, rounded again."""
    embedding = tensors(model.spec)[0]
    fmt, (rows, places) = allocation.format_of(embedding), rows_named(model.params, embedding, encoder.windows)
    decoded = decode(encoder.encode_rows(embedding, rows, fmt, {}), fmt).astype(rows.dtype)
    return sweep.begin(model.spec, {"token_embd": {"weight": decoded}}, places)


def _importance(at: sweep.Place, seen: Seen, model: Model) -> Importance:
    """Mean squares of what a block's matrices read, as the unfolded model has them, by the matrices' names."""
    found = {}
    for weight in at.block.weights:
        if weight.reads is not None:
            moments = seen.moments[weight.reads].scaled(model.folding.get(at.full(weight.reads), 1.0))
            found[at.full(weight.name)] = np.ascontiguousarray(moments.square, np.float32)
    return found

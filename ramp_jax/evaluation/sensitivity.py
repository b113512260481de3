"""The exact sensitivity table: what quantizing one tensor to one level costs, everything else unchanged.

The cost is the mean KL divergence to the unquantized model on calibration windows. Hidden states before a layer do
not change when a later layer is quantized, so they are computed once and each measurement runs from its layer on; all
tensors and levels of one layer run together as a batch, and share the reference's logits.
"""

import dataclasses
import functools
import io
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.checkpoint import write_bytes
from ramp_jax.evaluation.perplexity import Protocol, first_scored, head_losses, mean_divergences
from ramp_jax.formats import Format, format_for, round_trip
from ramp_jax.models import DecoderSpec, Model, allocatable, lookup
from ramp_jax.models.decoder import Params, block_forward, head_weights, hidden_states, rms_norm
from ramp_jax.models.names import Tensor
from ramp_jax.progress import track

_TOKENS_AT_ONCE = 8192  # of all variants that run together


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Mean KL divergence in nats per token, `[T, A]`: rows are `tensors`, columns `levels`, 0 where masked.

    `seconds` is what measuring took.
    """

    tensors: tuple[str, ...]
    levels: tuple[int, ...]
    kld: Float[np.ndarray, "T A"]
    seconds: float = 0.0

    def save(self, path: Any) -> None:
        """Write a NumPy archive, whole or not at all."""
        archive = io.BytesIO()
        np.savez(archive, **{field: np.asarray(value) for field, value in vars(self).items()})
        write_bytes(path, archive.getvalue())

    @classmethod
    def load(cls, path: Any) -> "Sensitivity":
        """Read what `save` wrote."""
        with np.load(path) as saved:
            names, levels = saved["tensors"].tolist(), saved["levels"].tolist()
            return cls(tuple(names), tuple(levels), saved["kld"], float(saved["seconds"]))


def exact_sensitivity(
    model: Model, windows: Int[np.ndarray, "W T"], levels: tuple[int, ...], protocol: Protocol = "llama.cpp"
) -> Sensitivity:
    """Measure every allocatable tensor at every level that can hold its rows, on the tokens that `protocol` scores.

    Runs in the dtype of the model's weights. Rounding to bf16 adds the same small floor to every entry of a tensor,
    which leaves the order of its levels unchanged.
    """
    started = time.monotonic()
    members = allocatable(model.spec)
    table = np.zeros((len(members), len(levels)))
    scored = slice(first_scored(protocol, windows.shape[1]), -1)
    batches = _batches(members, levels, size=max(1, _TOKENS_AT_ONCE // windows.size))
    with jax.default_matmul_precision("default"):
        prefixes = _prefixes(model.spec, model.params, windows)
        for batch in track(batches, "measuring sensitivity", "batch"):
            rows, columns = zip(*((entry.row, entry.column) for entry in batch), strict=True)
            measure = _top_costs if batch[0].tensor.layer is None else _layer_costs
            table[rows, columns] = measure(model, batch, prefixes, windows, scored)
    names = tuple(tensor.name for tensor in members)
    return Sensitivity(names, levels, table, time.monotonic() - started)


class _Entry(NamedTuple):
    """One cell of the table: tensor `row` at level `column`."""

    row: int
    column: int
    tensor: Tensor
    format: Format


def _batches(members: list[Tensor], levels: tuple[int, ...], size: int) -> list[list[_Entry]]:
    """All cells, in batches of up to `size` of one layer."""
    entries = [
        _Entry(row, column, tensor, fmt)
        for row, tensor in enumerate(members)
        for column, level in enumerate(levels)
        if (fmt := format_for(level, tensor.shape[-1]))
    ]
    layers = [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.tensor.layer)]
    return [layer[start : start + size] for layer in layers for start in range(0, len(layer), size)]


def _layer_costs(
    model: Model, batch: list[_Entry], prefixes: jax.Array, windows: Int[np.ndarray, "W T"], scored: slice
) -> Float[np.ndarray, " K"]:
    """Mean KL of each cell of one layer: the layer runs once per cell, all later layers once for the whole batch."""
    spec, params = model.spec, model.params
    index = batch[0].tensor.layer
    layer = {key: value[index] for key, value in params["blk"].items()}
    changed = [_block(spec, layer | {e.tensor.key: _quantized(params, e)}, prefixes[index]) for e in batch]
    hidden = _run_from(spec, params, jnp.stack(changed), index + 1)[:, :, scored]
    reference = prefixes[-1][:, scored]
    return np.asarray(mean_divergences(_tokens(hidden, 1), _tokens(reference), head_weights(params)))


def _top_costs(
    model: Model, batch: list[_Entry], prefixes: jax.Array, windows: Int[np.ndarray, "W T"], scored: slice
) -> list[float]:
    """Mean KL of embedding or head at each format: whole forward passes, since every layer or the head differs."""
    spec, params = model.spec, model.params
    reference = prefixes[-1]
    costs = []
    for entry in batch:
        changed = {**params, entry.tensor.key: _quantized(params, entry)}
        runs = [reference] if entry.tensor.key == "output" else [_hidden(spec, changed, row[None]) for row in windows]
        hidden = jnp.concatenate(runs)[:, scored]
        targets = windows[:, scored.start + 1 :].reshape(-1)
        heads = (head_weights(changed), head_weights(params))
        _, kld = head_losses(_tokens(hidden), heads[0], targets, _tokens(reference[:, scored]), heads[1])
        costs.append(float(jnp.mean(kld)))
    return costs


def _quantized(params: Params, entry: _Entry) -> jax.Array:
    w = lookup(params, entry.tensor)
    return round_trip(w.astype(jnp.float32), entry.format.name).astype(w.dtype)


def _tokens(hidden: jax.Array, keep: int = 0) -> jax.Array:
    """Windows and their tokens on one axis, behind the first `keep` axes."""
    return hidden.reshape(*hidden.shape[:keep], -1, hidden.shape[-1])


@functools.partial(jax.jit, static_argnames="spec")
def _prefixes(spec: DecoderSpec, params: Params, ids: Int[Array, "W T"]) -> Float[Array, "L+1 W T D"]:
    """Hidden states before every layer, then the normed ones after the last."""
    x = params["token_embd"][ids].astype(jnp.float32)
    last, before = jax.lax.scan(lambda x, layer: (block_forward(spec, layer, x), x), x, params["blk"])
    return jnp.concatenate([before, rms_norm(last, params["output_norm"], spec.norm_eps)[None]])


@functools.partial(jax.jit, static_argnames="spec")
def _run_from(
    spec: DecoderSpec, params: Params, x: Float[Array, "K W T D"], layer: Int[Array, ""]
) -> Float[Array, "K W T D"]:
    """Normed hidden states after the last layer, from those before `layer`; one compilation for all layers."""

    def one_layer(i: jax.Array, y: jax.Array) -> jax.Array:
        return block_forward(spec, jax.tree.map(lambda a: a[i], params["blk"]), y)

    y = jax.lax.fori_loop(layer, spec.n_layers, one_layer, x.reshape(-1, *x.shape[2:]))
    return rms_norm(y, params["output_norm"], spec.norm_eps).reshape(x.shape)


_block = jax.jit(block_forward, static_argnames="spec")
_hidden = jax.jit(hidden_states, static_argnames="spec")

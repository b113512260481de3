"""The 11 numbers by which the policy knows a weight matrix, comparable across models of any family and scale.

| # | name | meaning |
|---|---|---|
| 0 | act_outlier | log₁₀(max / rms) of the input activation |
| 1 | act_spread | standard deviation over channels of log₁₀ channel rms |
| 2 | act_written | log₁₀ of the energy that the sub-block writes, over the residual stream's |
| 3 | weight_outlier | log₁₀(max / standard deviation) |
| 4 | weight_kurtosis | log(1 + excess kurtosis) |
| 5 | weight_error | log₁₀ of the activation-weighted relative squared error of 3-bit rounding in blocks of 32 |
| 6 | loss_rate | log₁₀ of the share of what all tensors lose at level 4, over the share of the weights |
| 7 | depth | l / (L − 1); 0 for the embedding, 1 for the head |
| 8 | share | log₁₀ of the tensor's share of the allocatable weights |
| 9 | fan | log₁₀(out / in) |
| 10 | role | place in the forward pass: q, k, v, attention output, gate, up, down, head |

Every number is a ratio, a log or a position, moved by a fixed map to the order of 1; nothing is fitted to a model. The
loss is `estimated`: one backward pass over a few calibration tokens; no quantized model is run.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax import sweep
from ramp_jax.formats.rounding import blocks_of, flatten_blocks, reciprocal, round_half_away
from ramp_jax.formats.row_chunks import in_row_chunks
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import Model, Tensor, allocatable, tensors
from ramp_jax.models.layout import LOOKED_UP, STREAM, full_name, of_block
from ramp_jax.models.store import pieces_of
from ramp_jax.quantization import Encoder, Stats, importance_of
from ramp_jax.quantization.calibrate import Moments
from ramp_jax.sensitivity.pairs import Estimate, estimate

VERSION = 5
"""Raised whenever a number changes its meaning, or what an observation shows beside them (`env.py`); a policy refuses
embeddings of another version."""

NAMES = (
    "act_outlier",
    "act_spread",
    "act_written",
    "weight_outlier",
    "weight_kurtosis",
    "weight_error",
    "loss_rate",
    "depth",
    "share",
    "fan",
    "role",
)

# (value − center) / width: the ranges seen over layers of small and large decoders
_CENTER = np.array([1.2, 0.3, -1.5, 1.0, 0.7, -1.4, 0.0, 0.5, -2.5, 0.0, 0.5], np.float32)
_WIDTH = np.array([0.5, 0.2, 0.7, 0.3, 0.7, 0.3, 0.5, 0.35, 0.7, 0.5, 0.35], np.float32)

LOSS_LEVEL = 4
"""The one level that every allocatable tensor can take."""

_TINY = 1e-12

_VOCABULARY_ROWS = 1 << 12  # read at one time


def estimated(model: Model, stats: Stats, levels: tuple[float | str, ...], journal: Journal = NOWHERE) -> Estimate:
    """What allocatable tensors lose at each level by the Fisher estimate, alone and in pairs.

    Weights are rounded by a coarse search, weighted by importance: finer ones take longer and choose no better. Blocks
    that `journal` has are not gone through again. Raises `ValueError` where `stats` lack a sample of the text.
    """
    if stats.sample is None:
        raise ValueError("the statistics hold no sample of the text, which the estimate needs; calibrate the model.")
    encoder = Encoder("coarse", importance_of(model.spec, stats))
    return estimate(model, stats.sample, levels, encoder, stats.states, journal)


def embed(model: Model, stats: Stats, loss: Float[np.ndarray, " T"] | None = None) -> Float[np.ndarray, "T 11"]:
    """Embeddings of the allocatable tensors in forward order, of the model as it is (folded or not).

    `loss` is that of `estimated` at `LOSS_LEVEL` where it is known. Raises `KeyError` where `stats` lacks activations
    of the model, `ValueError` where they lack a sample of the text.
    """
    members = allocatable(model.spec)
    loss = estimated(model, stats, (LOSS_LEVEL,)).loss[:, 0] if loss is None else loss
    size = np.asarray([tensor.size for tensor in members], np.float64)
    rates = np.log10((loss / max(loss.sum(), _TINY**2) + _TINY) / (size / size.sum()))
    stats = stats.under(model.folding)
    weights = _weights(model, stats)
    rows = [
        [*_activation(stats, tensor), *weights[tensor], rate, *_structure(model, tensor, size.sum())]
        for tensor, rate in zip(members, rates, strict=True)
    ]
    return (np.asarray(rows, np.float32) - _CENTER) / _WIDTH


def _activation(stats: Stats, tensor: Tensor) -> list[float]:
    if tensor.reads == LOOKED_UP:
        return _CENTER[:3].tolist()
    x = _moments(stats, tensor.reads)
    mean_square = float(x.square.mean())
    rms = np.sqrt(np.maximum(x.square, _TINY * mean_square + _TINY))
    share = 1.0
    if tensor.written is not None:
        residual = _moments(stats, full_name(tensor.layer, STREAM)).square.mean()
        share = float(_moments(stats, tensor.written).square.mean() / (residual + _TINY))
    return [
        float(np.log10(x.abs_max.max() / (np.sqrt(mean_square) + _TINY) + _TINY)),
        float(np.log10(rms).std()),
        float(np.log10(share + _TINY)),
    ]


def _weights(model: Model, stats: Stats) -> dict[Tensor, list[float]]:
    """The numbers of every allocatable matrix's weights, from one sweep; vocabularies go in pieces."""
    members = allocatable(model.spec)
    found = {
        tensor: _weight(stats, tensor, pieces_of(model.params, tensor, _VOCABULARY_ROWS))
        for tensor in members
        if tensor.layer is None
    }
    for at in sweep.forward(model.spec, model.params, "embedding tensors"):
        for tensor in members:
            if tensor.layer == at.index:
                found[tensor] = _weight(stats, tensor, [of_block(at.weights, tensor.weight.name)])
    return found


def _weight(stats: Stats, tensor: Tensor, pieces: Iterable[Float[Array, "R I"]]) -> list[float]:
    looked_up = tensor.reads == LOOKED_UP
    square = np.ones(tensor.shape[-1], np.float32) if looked_up else _moments(stats, tensor.reads).square
    chunks = jax.device_get([sums for piece in pieces for sums in in_row_chunks(_weight_sums, piece, square)])
    largest = max(float(chunk.largest) for chunk in chunks)
    powers, error, energy = (np.sum(parts, axis=0, dtype=np.float64) for parts in list(zip(*chunks, strict=True))[1:])
    first, second, third, fourth = powers / tensor.size
    variance = second - first**2 + _TINY
    centered = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return [
        float(np.log10(largest / np.sqrt(variance) + _TINY)),
        _log_kurtosis(centered / variance**2),
        float(np.log10(error / (energy + _TINY) + _TINY)),
    ]


def _structure(model: Model, tensor: Tensor, total: float) -> list[float]:
    last = max(len(model.spec.blocks) - 1, 1)
    depth = tensor.layer / last if tensor.layer is not None else float(tensor != tensors(model.spec)[0])
    n_out, n_in = tensor.shape
    return [depth, float(np.log10(tensor.size / total)), float(np.log10(n_out / n_in)), tensor.weight.place]


def _moments(stats: Stats, activation: str | None) -> Moments:
    return Moments(*map(np.asarray, stats.moments[activation]))


def _log_kurtosis(kurtosis: float) -> float:
    """log(1 + excess), for a fourth moment over the squared second one; at least that of two values ±1."""
    return float(np.log(max(kurtosis - 2.0, 0.1)))


class _Sums(NamedTuple):
    """Over some rows: max |w|, Σ w to Σ w⁴, and the activation-weighted squares of 3-bit rounding's error and of w."""

    largest: jax.Array
    powers: Float[Array, " 4"]
    error: jax.Array
    energy: jax.Array


@jax.jit
def _weight_sums(w: Float[Array, "R I"], square: Float[Array, " I"]) -> _Sums:
    off = _round_3_bits(w) - w
    powers = jnp.stack([jnp.sum(w**power) for power in (1, 2, 3, 4)])
    error, energy = (jnp.sum(jnp.square(a) * square[None]) for a in (off, w))
    return _Sums(jnp.max(jnp.abs(w)), powers, error, energy)


def _round_3_bits(w: Float[Array, "O I"]) -> Float[Array, "O I"]:
    """Codes −4..3 in blocks of 32, the largest magnitude at −4: the plainest 3-bit grid, for rows of every length."""
    blocks = blocks_of(w, 32)
    largest = jnp.take_along_axis(blocks, jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True), axis=-1)
    d = largest / -4
    return flatten_blocks(jnp.clip(round_half_away(blocks * reciprocal(d)), -4, 3) * d)

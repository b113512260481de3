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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax.formats.rounding import blocks_of, flatten_blocks, reciprocal, round_half_away
from ramp_jax.models import Model, Tensor, allocatable, lookup, tensors
from ramp_jax.models.layout import LOOKED_UP, STREAM, full_name
from ramp_jax.progress import track
from ramp_jax.quantization import Encoder, Stats, importance_of
from ramp_jax.quantization.calibrate import Moments
from ramp_jax.sensitivity.pairs import Estimate, estimate

VERSION = 4
"""Raised whenever a number changes its meaning; a policy refuses embeddings of another version."""

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


def estimated(model: Model, stats: Stats, levels: tuple[float, ...]) -> Estimate:
    """What allocatable tensors lose at each level by the Fisher estimate, alone and in pairs.

    Weights are rounded by ggml's search, weighted by importance: the wider one takes three times as long, and its
    estimate chooses no better. Raises `ValueError` where `stats` lack a sample of the text.
    """
    if stats.sample is None:
        raise ValueError("the statistics hold no sample of the text, which the estimate needs; calibrate the model.")
    encoder = Encoder("reference", importance_of(model.spec, stats))
    return estimate(model, stats.sample, levels, encoder, stats.states)


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
    rows = [
        [*_activation(stats, tensor), *_weight(model, stats, tensor), rate, *_structure(model, tensor, size.sum())]
        for tensor, rate in zip(track(members, "embedding tensors", "tensor"), rates, strict=True)
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


def _weight(model: Model, stats: Stats, tensor: Tensor) -> list[float]:
    w = lookup(model.params, tensor).astype(jnp.float32)
    looked_up = tensor.reads == LOOKED_UP
    square = np.ones(tensor.shape[-1], np.float32) if looked_up else _moments(stats, tensor.reads).square
    outlier, kurtosis, error = (float(x) for x in _weight_numbers(w, square))
    return [float(np.log10(outlier + _TINY)), _log_kurtosis(kurtosis), float(np.log10(error + _TINY))]


def _structure(model: Model, tensor: Tensor, total: float) -> list[float]:
    last = max(len(model.spec.blocks) - 1, 1)
    depth = tensor.layer / last if tensor.layer is not None else float(tensor != tensors(model.spec)[0])
    n_out, n_in = tensor.shape
    return [depth, float(np.log10(tensor.size / total)), float(np.log10(n_out / n_in)), tensor.weight.place]


def _moments(stats: Stats, activation: str) -> Moments:
    return Moments(*map(np.asarray, stats.moments[activation]))


def _log_kurtosis(kurtosis: float) -> float:
    """log(1 + excess), for a fourth moment over the squared second one; at least that of two values ±1."""
    return float(np.log(max(kurtosis - 2.0, 0.1)))


@jax.jit
def _weight_numbers(w: Float[Array, "O I"], square: Float[Array, " I"]) -> Any:
    """max / std, fourth moment / squared second, activation-weighted relative error of 3-bit rounding."""
    centered = w - jnp.mean(w)
    variance = jnp.mean(jnp.square(centered)) + _TINY
    kurtosis = jnp.mean(jnp.square(jnp.square(centered))) / jnp.square(variance)
    error = jnp.sum(jnp.square(_round_3_bits(w) - w) * square[None, :]) / (
        jnp.sum(jnp.square(w) * square[None, :]) + _TINY
    )
    return jnp.max(jnp.abs(w)) / jnp.sqrt(variance), kurtosis, error


def _round_3_bits(w: Float[Array, "O I"]) -> Float[Array, "O I"]:
    """Codes −4..3 in blocks of 32, the largest magnitude at −4: the plainest 3-bit grid, for rows of every length."""
    blocks = blocks_of(w, 32)
    largest = jnp.take_along_axis(blocks, jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True), axis=-1)
    d = largest / -4
    return flatten_blocks(jnp.clip(round_half_away(blocks * reciprocal(d)), -4, 3) * d)

"""Scale Folding: move activation outliers into the weights before they are quantized.

Dividing an activation by s and multiplying the columns of the linears that read it by s leaves the output unchanged,
while the quantizer sees other magnitudes. A norm divides by its gain (γ' = γ / s), a linear by its rows: v for what
attention passes on to its output, up for what the gated MLP passes on to down. With grouped queries, all query heads
of a key/value head share one s.

s_c = a_c^α · b_c^−β of activation and weight magnitudes per channel (root mean squares), scaled to geometric mean 1;
α and β are searched per layer and group. The search follows AWQ (Lin et al. 2024), the grouping the paper's Scale
Folding. Norms that multiply by 1 + γ are stored as 1 + γ in the parameter tree, as in GGUF.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ramp_jax.formats import format_up_to, get_format
from ramp_jax.formats.row_chunks import in_row_chunks
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.names import block_shapes
from ramp_jax.progress import track
from ramp_jax.quantization.calibrate import Stats


class Group(NamedTuple):
    """What divides an activation by its scales, a norm or a linear, and the linears that read it."""

    producer: str
    readers: tuple[str, ...]


GROUPS = {
    "attn_in": Group("attn_norm", ("attn_q", "attn_k", "attn_v")),
    "attn_mid": Group("attn_v", ("attn_output",)),
    "ffn_in": Group("ffn_norm", ("ffn_gate", "ffn_up")),
    "ffn_mid": Group("ffn_up", ("ffn_down",)),
}
"""By tap, the activation that is divided."""

ALPHAS = tuple(round(0.1 * i, 1) for i in range(8))
BETAS = (0.0, 0.3)
"""The grids of α and β; both 0 leaves the group as it is, so folding never raises the objective."""

_SMALLEST = 1e-4  # magnitude, of the group's largest; a dead channel keeps a finite scale
_LARGEST_SCALE = 64.0
_SEARCH_ROWS = 256  # of a group: they decide among the candidates, all rows whether to fold at all
_LOG = logging.getLogger(__name__)


def fold(
    model: Model,
    stats: Stats,
    level: float,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    betas: tuple[float, ...] = BETAS,
    second: Iterable[Mapping[str, Float[Array, "C C"]]] | None = None,
) -> Model:
    """The same function with scales chosen for quantization at `level`, or the next lower one that rows can take.

    Per layer and group, (α, β) minimizes the squared error of the outputs of the linears, quantized with the
    activations' importance: tr(E H Eᵀ) with the second moments H of `model`, layer by layer as `second_moments` gives
    them, else with their diagonal from `stats`. Groups whose rows none can hold stay as they are; scales beyond 64 are
    clipped and reported. Raises `ValueError` where that is every group.
    """
    shapes = block_shapes(model.spec)
    formats = {tap: format_up_to(level, shapes[group.readers[0]][1]) for tap, group in GROUPS.items()}
    formats = {tap: fmt.name for tap, fmt in formats.items() if fmt is not None}
    if not formats:
        raise ValueError(
            f"no level up to {level} can hold rows of {model.spec.d_model} weights; fold at another level."
        )
    moments = stats.under(model.folding).moments
    grid = jnp.asarray([(a, b) for a in alphas for b in betas])
    chosen: dict[str, list[jax.Array]] = {tap: [] for tap in formats}
    clipped = 0
    layers = itertools.repeat({}, model.spec.n_layers) if second is None else second
    for layer, matrices in enumerate(track(layers, "folding", "layer")):
        for tap, fmt in formats.items():
            rows = [model.params["blk"][name][layer].astype(jnp.float32) for name in GROUPS[tap].readers]
            w, square = jnp.concatenate(rows), moments[tap].square[layer]
            scales, beyond = _scales(model.spec, tap, w, square, grid)
            best = _best(w, scales, square, jnp.asarray(matrices.get(tap, square)), fmt)
            clipped += int(beyond[best].sum())
            chosen[tap].append(scales[best])
    if clipped:
        _LOG.warning("%d scales of folding went beyond %g and were clipped.", clipped, _LARGEST_SCALE)
    return _scaled(model, {tap: jnp.stack(per_layer) for tap, per_layer in chosen.items()})


def refold(model: Model, folding: Mapping[str, Any]) -> Model:
    """The same function with exactly the scales of `folding`, whatever the model was folded with before.

    Raises `ValueError` where a scale has another shape than the model's activation.
    """
    if unknown := folding.keys() - GROUPS.keys():
        raise ValueError(f"the folding names {min(unknown)}, which no model has; make the allocation again.")
    shapes, scales = block_shapes(model.spec), {}
    for tap in folding.keys() | model.folding.keys():
        shape = (model.spec.n_layers, shapes[GROUPS[tap].readers[0]][1])
        target = jnp.asarray(folding.get(tap, np.ones(shape)), jnp.float32)
        if target.shape != shape:
            raise ValueError(f"the folding of {tap} has shape {target.shape}, this model needs {shape}.")
        scales[tap] = target / model.folding.get(tap, 1.0)
    return _scaled(model, {tap: scales[tap] for tap in GROUPS if tap in scales})


def _scaled(model: Model, scales: dict[str, Float[Array, "L C"]]) -> Model:
    """Divide the activation of each tap by its scales, and multiply the linears that read it."""
    folding, blk = dict(model.folding), dict(model.params["blk"])
    for tap, s in scales.items():
        producer, readers = GROUPS[tap]
        divisor = s if tap != "attn_mid" else _of_heads(model.spec, s)
        for key in (producer, f"{producer}_bias"):
            if key in blk:
                rows = divisor if blk[key].ndim == 2 else divisor[..., None]
                blk[key] = (blk[key].astype(jnp.float32) / rows).astype(blk[key].dtype)
        widened = {name: blk[name].astype(jnp.float32) * s[:, None, :] for name in readers}
        blk |= {name: w.astype(blk[name].dtype) for name, w in widened.items()}
        folding[tap] = folding.get(tap, 1.0) * s
    return dataclasses.replace(model, params={**model.params, "blk": blk}, folding=folding)


def _of_heads(spec: DecoderSpec, s: Float[Array, "L NH"]) -> Float[Array, "L KH"]:
    """Scales of the values' rows from those of attention's outputs: the first query head of each key/value head."""
    layers = s.shape[0]
    return s.reshape(layers, spec.n_kv_heads, spec.queries_per_kv, -1)[:, :, 0].reshape(layers, -1)


def _shared(spec: DecoderSpec, magnitude: Float[Array, " NH"]) -> Float[Array, " NH"]:
    """Root mean squares over the query heads that share a key/value head, at each of them."""
    heads = magnitude.reshape(spec.n_kv_heads, spec.queries_per_kv, -1)
    mean = jnp.sqrt(jnp.mean(jnp.square(heads), axis=1, keepdims=True))
    return jnp.broadcast_to(mean, heads.shape).reshape(-1)


@functools.partial(jax.jit, static_argnames=("spec", "tap"))
def _scales(
    spec: DecoderSpec, tap: str, w: Float[Array, "O C"], square: Float[Array, " C"], grid: Float[Array, "A 2"]
) -> tuple[Float[Array, "A C"], Bool[Array, "A C"]]:
    """Candidates, and which of their entries were clipped."""
    share = functools.partial(_shared, spec) if tap == "attn_mid" else lambda a: a
    activation, weight = share(jnp.sqrt(square)), share(jnp.sqrt(jnp.mean(jnp.square(w), axis=0)))

    def one(pair: Float[Array, " 2"]) -> tuple[jax.Array, jax.Array]:
        log_s = pair[0] * _log(activation) - pair[1] * _log(weight)
        s = jnp.exp(log_s - jnp.mean(log_s))
        clipped = jnp.clip(s, 1 / _LARGEST_SCALE, _LARGEST_SCALE)
        return clipped, clipped != s

    return jax.vmap(one)(grid)


def _log(magnitude: Float[Array, " C"]) -> Float[Array, " C"]:
    return jnp.log(jnp.maximum(magnitude, _SMALLEST * jnp.maximum(jnp.max(magnitude), 1e-30)))


def _best(w: jax.Array, scales: jax.Array, square: jax.Array, moment: jax.Array, fmt: str) -> int:
    """The candidate of the least error over evenly spaced rows, unless the first one's is smaller over all rows."""
    some = w[:: -(-len(w) // _SEARCH_ROWS)]
    found = int(np.argmin(_errors(some, scales, square, moment, fmt)))
    if found == 0:
        return 0
    first, best = _errors(w, scales[np.array([0, found])], square, moment, fmt)
    return found if best < first else 0


def _errors(w: jax.Array, scales: jax.Array, square: jax.Array, moment: jax.Array, fmt: str) -> Float[np.ndarray, " A"]:
    """Of each candidate, over all rows; candidates and parts of rows keep all cores busy."""
    run = functools.partial(_part_error, fmt=fmt)
    parts = in_row_chunks(run, w, square, moment, each=np.asarray(scales))
    return np.reshape(parts, (len(scales), -1)).sum(axis=1, dtype=np.float64)


@functools.partial(jax.jit, static_argnames="fmt")
def _part_error(
    w: Float[Array, "R C"],
    s: Float[Array, " C"],
    square: Float[Array, " C"],
    moment: Float[Array, " C"] | Float[Array, "C C"],
    fmt: str,
) -> Float[Array, ""]:
    """Squared error of the outputs of rows whose columns were widened by s before rounding."""
    known = get_format(fmt)
    importance = jnp.maximum(square, 1e-4 * jnp.mean(square)) / jnp.square(s)
    off = known.decode(known.encode(w * s[None], importance)) / s[None] - w
    across = off * moment[None] if moment.ndim == 1 else off @ moment
    return jnp.sum(off * across)

"""Scale Folding: move activation outliers into the weights before they are quantized.

For a norm with gain γ that feeds linears W_j, γ' = γ / s and W_j' = W_j · diag(s) leave the output unchanged, while
the quantizer sees other magnitudes. s_c = rms(x_c)^α, scaled to geometric mean 1; α is searched per layer and group.
The search follows AWQ (Lin et al. 2024), the grouping the paper's Scale Folding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax.formats import format_for, round_trip
from ramp_jax.models import Model
from ramp_jax.progress import track
from ramp_jax.quantization.calibrate import Stats

GROUPS = {
    "attn_in": ("attn_norm", ("attn_q", "attn_k", "attn_v")),
    "ffn_in": ("ffn_norm", ("ffn_gate", "ffn_up")),
}
"""tap: (norm that produces it, linears that read it)."""

ALPHAS = tuple(round(0.1 * i, 1) for i in range(8))
"""The grid of α; 0 leaves the group as it is, so folding never raises the objective."""

_SMALLEST_RMS = 1e-4  # of the group's largest; a dead channel keeps a finite scale
_LARGEST_SCALE = 64.0


def fold(model: Model, stats: Stats, level: int, alphas: tuple[float, ...] = ALPHAS) -> Model:
    """The same function with scales chosen for quantization at `level`.

    Per layer and group, α minimizes the activation-weighted squared error of the fake-quantized linears. Raises
    `ValueError` where the level cannot hold the rows.
    """
    fmt = format_for(level, model.spec.d_model)
    if fmt is None:
        raise ValueError(f"level {level} cannot hold rows of {model.spec.d_model} weights; fold at another level.")
    square = {tap: stats.under(model.folding).moments[tap].square for tap in GROUPS}
    blk, scales = model.params["blk"], {}
    for tap, (norm, linears) in GROUPS.items():
        per_layer = []
        for layer in track(range(model.spec.n_layers), f"folding {norm}", "layer"):
            group = jnp.concatenate([blk[name][layer].astype(jnp.float32) for name in linears])
            per_layer.append(_best_scale(group, square[tap][layer], alphas, fmt.name))
        scales[tap] = jnp.stack(per_layer)  # [L, D]
    return _scaled(model, scales)


def refold(model: Model, folding: Mapping[str, Any]) -> Model:
    """The same function with exactly the scales of `folding`, whatever the model was folded with before.

    Raises `ValueError` where a scale has another shape than the model's activation.
    """
    if not folding and not model.folding:
        return model
    shape = (model.spec.n_layers, model.spec.d_model)
    scales = {}
    for tap in GROUPS:
        target = jnp.asarray(folding.get(tap, np.ones(shape)), jnp.float32)
        if target.shape != shape:
            raise ValueError(f"the folding of {tap} has shape {target.shape}, this model needs {shape}.")
        scales[tap] = target / model.folding.get(tap, 1.0)
    return _scaled(model, scales)


def _scaled(model: Model, scales: dict[str, Float[Array, "L D"]]) -> Model:
    """Divide the activations of each tap by its scales, and multiply the linears that read them."""
    folding, blk = dict(model.folding), dict(model.params["blk"])
    for tap, s in scales.items():
        norm, linears = GROUPS[tap]
        blk[norm] = blk[norm] / s
        widened = {name: blk[name].astype(jnp.float32) * s[:, None, :] for name in linears}
        blk |= {name: w.astype(blk[name].dtype) for name, w in widened.items()}
        folding[tap] = folding.get(tap, 1.0) * s
    return dataclasses.replace(model, params={**model.params, "blk": blk}, folding=folding)


def _best_scale(
    group: Float[Array, "O D"], square: Float[Array, " D"], alphas: tuple[float, ...], fmt: str
) -> Float[Array, " D"]:
    candidates = [_scale(square, alpha) for alpha in alphas]
    errors = [_error(group, round_trip(group * s[None, :], fmt), s, square) for s in candidates]
    return candidates[int(np.argmin(errors))]


@jax.jit
def _error(
    w: Float[Array, "O D"], rounded: Float[Array, "O D"], s: Float[Array, " D"], square: Float[Array, " D"]
) -> Float[Array, ""]:
    """Activation-weighted squared error of w, whose columns were widened by s before rounding."""
    return jnp.sum(jnp.square(rounded / s[None, :] - w) * square[None, :])


@jax.jit
def _scale(square: Float[Array, " D"], alpha: Any) -> Float[Array, " D"]:
    rms = jnp.sqrt(square)
    log_s = alpha * jnp.log(jnp.maximum(rms, _SMALLEST_RMS * jnp.maximum(jnp.max(rms), 1e-30)))
    s = jnp.exp(log_s - jnp.mean(log_s))
    return jnp.clip(s, 1 / _LARGEST_SCALE, _LARGEST_SCALE)

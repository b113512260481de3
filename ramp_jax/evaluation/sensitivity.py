"""The exact sensitivity table: what quantizing one tensor to one level costs, everything else unchanged.

The cost is the mean KL divergence to the unquantized model on calibration windows. Hidden states before a layer do
not change when a later layer is quantized, so they are computed once and each measurement runs from its layer on; the
levels of one tensor run together as a batch.
"""

import dataclasses
import functools
import io
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.checkpoint import write_bytes
from ramp_jax.evaluation.perplexity import Protocol, first_scored, head_losses
from ramp_jax.formats import Format, format_for, round_trip
from ramp_jax.models import DecoderSpec, Model, allocatable, lookup
from ramp_jax.models.decoder import Params, block_forward, head_weights, hidden_states, rms_norm
from ramp_jax.models.names import Tensor
from ramp_jax.progress import track


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
    start = first_scored(protocol, windows.shape[1])
    table = np.zeros((len(members), len(levels)))
    with jax.default_matmul_precision("default"):
        prefixes = _prefixes(model.spec, model.params, windows)
        for row, tensor in enumerate(track(members, "measuring sensitivity", "tensor")):
            columns = [a for a, level in enumerate(levels) if format_for(level, tensor.shape[-1])]
            formats = [format_for(levels[a], tensor.shape[-1]) for a in columns]
            table[row, columns] = _tensor_costs(model, tensor, formats, prefixes, windows, start)
    names = tuple(tensor.name for tensor in members)
    return Sensitivity(names, levels, table, time.monotonic() - started)


def _tensor_costs(
    model: Model,
    tensor: Tensor,
    formats: list[Format],
    prefixes: jax.Array,
    windows: Int[np.ndarray, "W T"],
    start: int,
) -> Float[np.ndarray, " A"]:
    """Mean KL of one tensor at each format."""
    spec, params = model.spec, model.params
    w = lookup(params, tensor)
    candidates = [round_trip(w.astype(jnp.float32), fmt.name).astype(w.dtype) for fmt in formats]
    reference = prefixes[-1]  # [W, T, D], normed
    if tensor.layer is None:
        hidden = jnp.stack([_top_hidden(spec, params, tensor.key, new, reference, windows) for new in candidates])
        heads = [head_weights({**params, tensor.key: new}) for new in candidates]
    else:
        layer = {key: value[tensor.layer] for key, value in params["blk"].items()}
        variants = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(candidates), *a.shape)), layer)
        variants[tensor.key] = jnp.stack(candidates)
        hidden = _run_from(spec, params, variants, prefixes[tensor.layer], tensor.layer)
        heads = [head_weights(params)] * len(candidates)
    targets = windows[:, start + 1 :].reshape(-1)
    ref = reference[:, start:-1].reshape(-1, spec.d_model)
    means = []
    for x, head in zip(hidden[:, :, start:-1], heads, strict=True):
        _, kld = head_losses(x.reshape(-1, spec.d_model), head, targets, ref, head_weights(params))
        means.append(float(jnp.mean(kld)))
    return np.asarray(means)


@functools.partial(jax.jit, static_argnames="spec")
def _prefixes(spec: DecoderSpec, params: Params, ids: Int[Array, "W T"]) -> Float[Array, "L+1 W T D"]:
    """Hidden states before every layer, then the normed ones after the last."""
    x = params["token_embd"][ids].astype(jnp.float32)
    last, before = jax.lax.scan(lambda x, layer: (block_forward(spec, layer, x), x), x, params["blk"])
    return jnp.concatenate([before, rms_norm(last, params["output_norm"], spec.norm_eps)[None]])


@functools.partial(jax.jit, static_argnames="spec")
def _run_from(
    spec: DecoderSpec, params: Params, variants: Params, x: Float[Array, "W T D"], layer: Int[Array, ""]
) -> Float[Array, "A W T D"]:
    """Normed hidden states of every variant of layer `layer`, whose input is `x`; one compilation for all layers."""
    y = jax.vmap(lambda weights: block_forward(spec, weights, x))(variants)  # [A, W, T, D]
    shape = y.shape

    def one_layer(i: jax.Array, y: jax.Array) -> jax.Array:
        weights = jax.tree.map(lambda a: a[i], params["blk"])
        return block_forward(spec, weights, y)

    y = jax.lax.fori_loop(layer + 1, spec.n_layers, one_layer, y.reshape(-1, *shape[2:]))
    return rms_norm(y, params["output_norm"], spec.norm_eps).reshape(shape)


def _top_hidden(
    spec: DecoderSpec, params: Params, key: str, new: jax.Array, reference: jax.Array, windows: np.ndarray
) -> Float[Array, "W T D"]:
    """Hidden states with a tensor outside the blocks replaced: the head changes none, the embedding all."""
    if key == "output":
        return reference
    return jnp.concatenate([_hidden(spec, {**params, key: new}, window[None]) for window in windows])


_hidden = jax.jit(hidden_states, static_argnames="spec")

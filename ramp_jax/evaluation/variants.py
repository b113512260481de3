"""The true loss of any allocation inside jit: every tensor lies on the device at every level, an allocation picks.

What a search, or a policy that learns with the model in the loop, asks for thousands of times: one forward pass, no
encoding, no way back to the host. Memory, in the model's dtype: the weights once per level, and the picked embedding,
head and matrices of one layer, once more for every seed that learns beside others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ramp_jax.evaluation.perplexity import Protocol, first_scored, mean_divergences, reference_of
from ramp_jax.formats import format_for
from ramp_jax.models import DecoderSpec, Model, allocatable
from ramp_jax.models.decoder import Params, block_forward, embed, layer_params, rms_norm
from ramp_jax.models.names import LINEARS
from ramp_jax.progress import track
from ramp_jax.quantization import REFERENCE, Encoder, decoded


class Variants(struct.PyTreeNode):
    """A model at every level, and what the reference predicts on some windows."""

    linears: dict[str, Float[Array, "L K O I"]]
    """The matrices of the layers at the K levels that can hold them."""
    top: dict[str, Float[Array, "K V D"]]
    place: dict[str, Int[Array, " A"]]
    """Where each level lies among the K, by key."""
    params: Params
    """Everything that an allocation does not cover."""
    windows: Int[Array, "W T"]
    hidden: Float[Array, "S D"]
    """The reference's normed hidden states at the scored tokens of all windows."""
    head: Float[Array, "V D"]
    spec: DecoderSpec = struct.field(pytree_node=False)
    start: int = struct.field(pytree_node=False)


def prepare(
    model: Model,
    reference: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float, ...],
    protocol: Protocol = "llama.cpp",
    encoder: Encoder = REFERENCE,
) -> Variants:
    """Quantize every allocatable tensor of `model` to every level and run the reference once.

    Raises `ValueError` where a tensor cannot be encoded or what the reference predicts is not finite.
    """
    spec, members = model.spec, allocatable(model.spec)
    beside = reference_of(reference, windows, protocol)
    formats = {tensor.key: [format_for(level, tensor.shape[-1]) for level in levels] for tensor in members}
    at = {}
    for tensor in track(members, "quantizing to every level", "tensor"):
        at[tensor] = jnp.stack([decoded(model, tensor, fmt.name, encoder) for fmt in formats[tensor.key] if fmt])
    covered = {tensor.key for tensor in members}
    return Variants(
        {key: jnp.stack([at.pop(t) for t in members if t.key == key]) for key in LINEARS},
        {tensor.key: at[tensor] for tensor in members if tensor.layer is None},
        {key: jnp.cumsum(jnp.asarray([fmt is not None for fmt in fmts])) - 1 for key, fmts in formats.items()},
        {"output_norm": model.params["output_norm"]}
        | {"blk": {key: value for key, value in model.params["blk"].items() if key not in covered}},
        jnp.asarray(windows),
        jnp.concatenate([jnp.asarray(x) for x in beside.hidden]),
        beside.head,
        spec,
        first_scored(protocol, windows.shape[1]),
    )


@jax.jit
def mean_kld(variants: Variants, action: Int[Array, " T"]) -> Float[Array, ""]:
    """Mean KL divergence of one allocation, level indices in forward order; infinite where it is not a number."""
    spec = variants.spec
    chosen = action[1 : 1 + spec.n_layers * len(LINEARS)].reshape(spec.n_layers, len(LINEARS))
    picked = {"token_embd": action[0], "output": action[-1]}
    top = {key: w[variants.place[key][picked[key]]] for key, w in variants.top.items()}

    def one_layer(i: Int[Array, ""], x: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
        places = {key: variants.place[key][a] for key, a in zip(LINEARS, chosen[i], strict=True)}
        linears = {key: w[i, places[key]] for key, w in variants.linears.items()}
        return block_forward(spec, layer_params(variants.params, i) | linears, x)

    x = embed(spec, top["token_embd"], variants.windows)
    x = jax.lax.fori_loop(0, spec.n_layers, one_layer, x)
    x = rms_norm(x, variants.params["output_norm"], spec.norm_eps)[:, variants.start : -1]
    head = top.get("output", top["token_embd"])
    kld = mean_divergences(x.reshape(1, -1, x.shape[-1]), head, variants.hidden, variants.head)[0]
    return jnp.where(jnp.isfinite(kld), kld, jnp.inf)


def measuring(variants: Variants) -> Callable[[Int[np.ndarray, " T"]], float]:
    """`mean_kld` for searches on the host."""
    return lambda action: float(mean_kld(variants, jnp.asarray(action, jnp.int32)))

"""The true loss of any allocation inside jit: every tensor lies on the device at every level, an allocation picks.

What a search, or a policy that learns with the model in the loop, asks for thousands of times: one forward pass, no
encoding, no way back to the host. Memory, in the model's dtype: the weights once per level, and the picked embedding,
head and matrices of one layer, once more for every seed that learns beside others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from ramp_jax.allocation import Costs
from ramp_jax.models import DecoderSpec, Model, allocatable, matrices
from ramp_jax.models.decoder import Head, Params, final_norm, look_up
from ramp_jax.models.layout import by_run, full_name, of_block, replace_in_block, scan_blocks, stack
from ramp_jax.progress import track
from ramp_jax.quantization import REFERENCE, Encoder, decoded
from ramp_jax.scoring.perplexity import Protocol, first_scored, mean_divergences, reference_of


class Variants(struct.PyTreeNode):
    """A model at every level, and what the reference predicts on some windows."""

    runs: tuple[tuple[dict[str, "Matrix"], ...], ...]
    """Per run of blocks and place in its period, by name inside the block: a matrix at every level that can hold it."""
    others: tuple[tuple[Params, ...], ...]
    """What an allocation does not cover, likewise; every leaf has a first axis of the run's repetitions."""
    top: dict[str, "Matrix"]
    """Embedding and head."""
    output_norm: Params
    windows: Int[Array, "W T"]
    hidden: Float[Array, "S D"]
    """The reference's normed hidden states at the scored tokens of all windows."""
    head: Head
    spec: DecoderSpec = struct.field(pytree_node=False)
    start: int = struct.field(pytree_node=False)


class Matrix(NamedTuple):
    """A matrix at the K levels that can hold it, or in F16 where no block can (K = 1).

    In a run every leaf has a first axis, and so has each part of it.
    """

    values: Float[Array, "K O I"]
    place: Int[Array, " A"]
    """Where each level lies among the K."""
    index: Int[Array, ""]
    """Its place in an allocation, 0 where it has none."""

    def pick(self, action: Int[Array, " T"]) -> Float[Array, "O I"]:
        """The matrix at the level that an allocation gives it."""
        return self.values[self.place[action[self.index]]]


def prepare(
    model: Model,
    reference: Model,
    windows: Int[np.ndarray, "W T"],
    table: Costs,
    protocol: Protocol = "llama.cpp",
    encoder: Encoder = REFERENCE,
) -> Variants:
    """Quantize every tensor of `model` to every level that `table` has for it and run the reference once.

    Raises `ValueError` where a tensor cannot be encoded or what the reference predicts is not finite.
    """
    spec = model.spec
    beside = reference_of(reference, windows, protocol)
    index_of = {tensor.name: index for index, tensor in enumerate(allocatable(spec))}
    at = {}
    for tensor in track(matrices(spec), "quantizing to every level", "tensor"):
        formats = table.formats[tensor.name]
        values = jnp.stack([decoded(model, tensor, fmt, encoder) for fmt in formats if fmt])
        places = jnp.cumsum(jnp.asarray([fmt is not None for fmt in formats])) - 1
        at[tensor.name] = Matrix(values, places, jnp.int32(index_of.get(tensor.name, 0)))

    def chosen(indices: Sequence[int]) -> dict[str, Matrix]:
        names = [weight.name for weight in spec.blocks[indices[0]].weights if weight.kind == "matrix"]
        return {name: _side_by_side([at.pop(full_name(index, name)) for index in indices]) for name in names}

    def others(indices: Sequence[int]) -> Params:
        names = [weight.name for weight in spec.blocks[indices[0]].weights if weight.kind != "matrix"]
        blocks = [model.params["blk"][index] for index in indices]
        return stack([replace_in_block({}, {name: of_block(w, name) for name in names}) for w in blocks])

    return Variants(
        by_run(spec.blocks, chosen),
        by_run(spec.blocks, others),
        dict(at),
        {"output_norm": model.params["output_norm"]},
        jnp.asarray(windows),
        jnp.concatenate([jnp.asarray(x) for x in beside.hidden]),
        beside.head,
        spec,
        first_scored(protocol, windows.shape[1]),
    )


def _side_by_side(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one place in a run's periods; those with fewer levels have the last one more often."""
    most = max(len(matrix.values) for matrix in matrices)
    filled = [jnp.minimum(jnp.arange(most), len(matrix.values) - 1) for matrix in matrices]
    return stack([m._replace(values=m.values[rows]) for m, rows in zip(matrices, filled, strict=True)])


@jax.jit
def mean_kld(variants: Variants, action: Int[Array, " T"]) -> Float[Array, ""]:
    """Mean KL divergence of one allocation, level indices in forward order; infinite where it is not a number."""
    spec = variants.spec
    top = {name: matrix.pick(action) for name, matrix in variants.top.items()}

    def picked(entry: tuple[dict[str, Matrix], Params]) -> Params:
        matrices, others = entry
        return replace_in_block(others, {name: matrix.pick(action) for name, matrix in matrices.items()})

    entries = tuple(tuple(zip(*run, strict=True)) for run in zip(variants.runs, variants.others, strict=True))
    x = look_up(spec, top["token_embd.weight"], variants.windows)
    x = final_norm(spec, variants.output_norm, scan_blocks(spec.blocks, entries, x, picked))[:, variants.start : -1]
    head = Head(top.get("output.weight", top["token_embd.weight"]), spec.final_cap)
    kld = mean_divergences(x.reshape(1, -1, x.shape[-1]), head, variants.hidden, variants.head)[0]
    return jnp.where(jnp.isfinite(kld), kld, jnp.inf)


def measuring(variants: Variants) -> Callable[[Int[np.ndarray, " T"]], float]:
    """`mean_kld` for searches on the host."""
    return lambda action: float(mean_kld(variants, jnp.asarray(action, jnp.int32)))

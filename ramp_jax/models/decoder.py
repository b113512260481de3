"""The whole decoder: embedding, blocks, final norm and head.

Axes: B batch, T time, D model width, V vocabulary. The residual stream and all accumulation are f32; matrix products
take their operands in the dtype of the weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from ramp_jax.models.layers import matmul, rms_norm, soft_cap
from ramp_jax.models.layout import Block, Params, by_run, lookup, nest, scan_blocks, stack, tensors
from ramp_jax.models.spec import DecoderSpec
from ramp_jax.models.store import StoredParams, rows_named

_HEAD_ROWS = 1 << 13  # of a head, that are held in another dtype than the head at a time


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["cap", "dtype", "stored"])
@dataclasses.dataclass(frozen=True)
class Head:
    """What makes logits f32 of normed hidden states: a matrix, and a cap that keeps them within ±cap.

    Products are taken in `dtype`, by default the matrix's own. A matrix of another dtype is held as the bits of what
    is `stored`, and converted some rows at a time: on CPUs XLA cuts no bfloat16, but converts and keeps all of it.
    """

    weight: Float[Array, "V D"] | UInt[Array, "V D"]
    cap: float | None = None
    dtype: Any = None
    stored: Any = None

    @classmethod
    def of_stored(cls, weight: Float[np.ndarray, "V D"], cap: float | None, dtype: Any) -> "Head":
        """Of a matrix as a checkpoint holds it."""
        if weight.dtype == dtype:
            return cls(jax.device_put(weight), cap)
        bits = weight.view(f"uint{8 * weight.dtype.itemsize}")
        return cls(jax.device_put(bits), cap, jnp.dtype(dtype), weight.dtype)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Logits."""
        weight = self._values(self.weight)
        return soft_cap(matmul(x, weight.astype(self.dtype or weight.dtype)), self.cap)

    def vocabulary_first(self, x: Float[Array, "T D"]) -> Float[Array, "V T"]:
        """Logits whose sums over the vocabulary run side by side for all tokens: twice as fast on CPUs."""
        size, dtype = len(self.weight), self.dtype or self.weight.dtype
        x = x.astype(dtype)

        def some(rows: Float[Array, "R D"]) -> Float[Array, "R T"]:
            return jnp.einsum("VD,TD->VT", rows.astype(dtype), x, preferred_element_type=jnp.float32)

        if self.stored is None or size <= _HEAD_ROWS:
            return soft_cap(some(self._values(self.weight)), self.cap)

        def more(i: jax.Array, found: Float[Array, "V T"]) -> Float[Array, "V T"]:
            start = jnp.minimum(i * _HEAD_ROWS, size - _HEAD_ROWS)
            return jax.lax.dynamic_update_slice_in_dim(found, some(self._rows(start)), start, axis=0)

        found = jnp.zeros((size, len(x)), jnp.float32)
        return soft_cap(jax.lax.fori_loop(0, -(-size // _HEAD_ROWS), more, found), self.cap)

    @jax.jit
    def finite(self) -> Bool[Array, ""]:
        """Whether all weights are."""
        size = len(self.weight)
        if self.stored is None or size <= _HEAD_ROWS:
            return jnp.isfinite(self._values(self.weight)).all()

        def more(i: jax.Array, whole: Bool[Array, ""]) -> Bool[Array, ""]:
            return whole & jnp.isfinite(self._rows(jnp.minimum(i * _HEAD_ROWS, size - _HEAD_ROWS))).all()

        return jax.lax.fori_loop(0, -(-size // _HEAD_ROWS), more, jnp.bool(True))

    def _rows(self, start: jax.Array) -> Float[Array, "R D"]:
        return self._values(jax.lax.dynamic_slice_in_dim(self.weight, start, _HEAD_ROWS))

    def _values(self, held: jax.Array) -> Float[Array, "R D"]:
        return held if self.stored is None else held.view(self.stored)


def embed(spec: DecoderSpec, params: Params, ids: Int[Array, "*b T"]) -> Float[Array, "*b T D"]:
    """What enters the first block, f32. Of an embedding on disk only the rows of these tokens are read."""
    if not isinstance(params, StoredParams):
        return look_up(spec, params["token_embd"]["weight"], ids)
    return look_up(spec, *rows_named(params, tensors(spec)[0], np.asarray(ids)))


@functools.partial(jax.jit, static_argnames="spec")
def look_up(spec: DecoderSpec, embedding: Float[Array, "V D"], ids: Int[Array, "*b T"]) -> Float[Array, "*b T D"]:
    """Rows of an embedding as they enter the first block, f32."""
    return embedding[ids].astype(jnp.float32) * spec.embedding_scale


@functools.partial(jax.jit, static_argnames="block")
def block_forward(block: Block, w: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The stream after a block from that before it; one compilation per kind of block."""
    return block(w, x)


def block_taps(
    block: Block, w: Params, x: Float[Array, "B T D"], see: Any
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """The stream after a block, and `see(activation)` of everything that its taps see, by name."""
    found: dict[str, Any] = {}

    def tap(name: str, a: jax.Array) -> jax.Array:
        found[name] = see(a)
        return a

    return block(w, x, tap), found


def final_norm(spec: DecoderSpec, params: Params, x: Float[Array, "*b T D"]) -> Float[Array, "*b T D"]:
    """What the head reads, from the stream after the last block; what divides logits has divided it."""
    normed = rms_norm(x, params["output_norm"]["weight"], spec.norm_eps)
    return normed if spec.logit_divisor == 1 else normed / spec.logit_divisor


def output_head(spec: DecoderSpec, params: Params) -> Head:
    """The head: `output`, or the tied embedding; of weights on disk as they are stored."""
    name = "token_embd" if spec.tied else "output"
    if isinstance(params, StoredParams):
        return Head.of_stored(params.as_stored(name), spec.final_cap, params.dtype)
    return Head(params[name]["weight"], spec.final_cap)


def hidden_states(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Normed hidden states f32 after the last block, block by block."""
    x = embed(spec, params, ids)
    for index, block in enumerate(spec.blocks):
        x = block_forward(block, params["blk"][index], x)
    return final_norm(spec, params, x)


def scanned_hidden_states(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`hidden_states` inside a compiled function, which compiles every run of equal blocks once."""
    x = embed(spec, params, ids)
    entries = by_run(spec.blocks, lambda indices: stack([params["blk"][index] for index in indices]))
    return final_norm(spec, params, scan_blocks(spec.blocks, entries, x))


def logits(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits f32 of every position."""
    return output_head(spec, params)(hidden_states(spec, params, ids))


def cast_weights(spec: DecoderSpec, params: Params, dtype: Any) -> Params:
    """Matrices in `dtype` (the dtype of all matrix products); gains and biases stay f32."""
    if isinstance(params, StoredParams):
        return params.astype(dtype)
    members = tensors(spec)
    return nest((t, jnp.asarray(lookup(params, t), dtype if t.is_matrix else jnp.float32)) for t in members)


def weights_dtype(params: Params) -> Any:
    """The dtype of all matrix products."""
    return params.dtype if isinstance(params, StoredParams) else params["token_embd"]["weight"].dtype

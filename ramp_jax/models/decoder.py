"""One Flax decoder for the dense families, scanned over layers.

Axes: B batch, T time, S time of keys, D model width, N query heads, K key/value heads, G query heads per key/value
head, H head size, V vocabulary, L layers. The residual stream and all accumulation are f32; matrix products take
their operands in the dtype of the weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ramp_jax.models.names import block_shapes
from ramp_jax.models.spec import DecoderSpec

Params = dict[str, Any]
Tap = Callable[[jax.Array], Any]
Rope = tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]

_QUERY_BLOCK = 128  # queries that attend together; each group meets only the keys of its causal prefix
_QUERY_BLOCK_ON_ACCELERATORS = 512  # where launching a kernel costs more than keys that are masked
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": nn.gelu}  # flax's gelu is the tanh approximation
_UNINITIALIZED = nn.initializers.zeros_init()  # weights are loaded, never drawn


def matmul(x: Float[Array, "... I"], w: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """x · wᵀ with operands in the weights' dtype, accumulated in f32."""
    return jnp.einsum("...i,oi->...o", x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) · gain."""
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return normed * jnp.broadcast_to(gain, x.shape)


@functools.partial(jax.jit, static_argnames="spec")
def embed(spec: DecoderSpec, embedding: Float[Array, "V D"], ids: Int[Array, "*b T"]) -> Float[Array, "*b T D"]:
    """What enters the first layer, f32."""
    return embedding[ids].astype(jnp.float32) * spec.embedding_scale


def rope_tables(spec: DecoderSpec, time: int) -> Rope:
    """Cosines and sines of the rotary angles of positions 0..time − 1."""
    half = spec.head_size // 2
    frequency = spec.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(time, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotary position embedding; dimension i turns with dimension i + H/2 (HF order)."""
    cos, sin = (table[None, :, None, :] for table in rope)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], dtype: Any
) -> Float[Array, "B T NH"]:
    """Grouped-query attention; operands of the products in `dtype`, softmax in f32.

    Queries go in blocks that meet only the keys of their causal prefix. The query heads of one key/value head are
    folded into rows, and the softmax is normalized after the product with the values, where there is less to divide.
    """
    batch, time, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = (q * size**-0.5).astype(dtype).reshape(batch, time, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    k, v = k.astype(dtype).transpose(0, 2, 3, 1), v.astype(dtype).transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    block = _QUERY_BLOCK if jax.default_backend() == "cpu" else _QUERY_BLOCK_ON_ACCELERATORS
    outputs = []
    for start in range(0, time, block):
        stop = min(start + block, time)
        rows = q[:, :, :, start:stop].reshape(batch, kv_heads, -1, size)  # [B, K, G·T, H]
        scores = jnp.einsum("BKTH,BKHS->BKTS", rows, k[..., :stop], preferred_element_type=jnp.float32)
        visible = jnp.tile(jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :], (group, 1))
        scores = jnp.where(visible[None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(dtype), v[:, :, :stop], preferred_element_type=jnp.float32)
        outputs.append((mixed / total).reshape(batch, kv_heads, group, -1, size))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * size)


class Block(nn.Module):
    """One layer: attention and gated MLP, each behind a norm and added to the residual stream.

    With `tap`, the collection "taps" receives `tap(x)` of each linear's input and of what is written to the stream.
    """

    spec: DecoderSpec
    tap: Tap | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rope: Rope) -> Float[Array, "B T D"]:
        """Hidden states after the layer."""
        spec = self.spec
        w = {key: self.param(key, _UNINITIALIZED, shape) for key, shape in block_shapes(spec).items()}
        batch, time, _ = x.shape

        self._tap("residual", x)
        h = self._tap("attn_in", rms_norm(x, w["attn_norm"], spec.norm_eps))
        q = matmul(h, w["attn_q"]).reshape(batch, time, spec.n_heads, spec.head_size)
        k = matmul(h, w["attn_k"]).reshape(batch, time, spec.n_kv_heads, spec.head_size)
        v = matmul(h, w["attn_v"]).reshape(batch, time, spec.n_kv_heads, spec.head_size)
        if spec.qk_norm:
            q, k = rms_norm(q, w["attn_q_norm"], spec.norm_eps), rms_norm(k, w["attn_k_norm"], spec.norm_eps)
        q, k = rotate(q, rope), rotate(k, rope)
        mixed = self._tap("attn_mid", causal_attention(q, k, v, w["attn_q"].dtype))
        x = x + self._tap("attn_out", matmul(mixed, w["attn_output"]))

        h = self._tap("ffn_in", rms_norm(x, w["ffn_norm"], spec.norm_eps))
        gated = self._tap("ffn_mid", _ACTIVATIONS[spec.activation](matmul(h, w["ffn_gate"])) * matmul(h, w["ffn_up"]))
        return x + self._tap("ffn_out", matmul(gated, w["ffn_down"]))

    def _tap(self, name: str, x: jax.Array) -> jax.Array:
        if self.tap is not None:
            self.sow("taps", name, self.tap(x), reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x


class Decoder(nn.Module):
    """Embedding, `L` blocks under one scan, final norm. The head is `head_weights`, applied by the caller in chunks."""

    spec: DecoderSpec
    tap: Tap | None = None

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Normed hidden states, ready for the head."""
        spec = self.spec
        embedding = self.param("token_embd", _UNINITIALIZED, (spec.vocab_size, spec.d_model))
        gain = self.param("output_norm", _UNINITIALIZED, (spec.d_model,))
        if not spec.tied:
            self.param("output", _UNINITIALIZED, (spec.vocab_size, spec.d_model))
        layers = nn.scan(
            lambda block, x, rope: (block(x, rope), None),
            in_axes=nn.broadcast,
            variable_axes={"params": 0, "taps": 0},
            split_rngs={"params": True},
            length=spec.n_layers,
        )
        x = embed(spec, embedding, ids)
        x, _ = layers(Block(spec, self.tap, name="blk"), x, rope_tables(spec, ids.shape[1]))
        x = rms_norm(x, gain, spec.norm_eps)
        if self.tap is not None:
            self.sow("taps", "head_in", self.tap(x), reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x


def head_weights(params: Params) -> Float[Array, "V D"]:
    """The matrix that maps normed hidden states to logits: `output`, or the tied embedding."""
    return params.get("output", params["token_embd"])


def head_logits(x: Float[Array, "T D"], head: Float[Array, "V D"]) -> Float[Array, "V T"]:
    """Logits f32 with the vocabulary first, whose sums then run side by side for all tokens: twice as fast on CPUs."""
    return jnp.einsum("VD,TD->VT", head, x.astype(head.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="spec")
def hidden_states(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Normed hidden states f32 of the last layer."""
    return Decoder(spec).apply({"params": params}, ids)


@functools.partial(jax.jit, static_argnames="spec")
def logits(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits f32 of every position."""
    return matmul(hidden_states(spec, params, ids), head_weights(params))


def layer_params(params: Params, index: int | Int[Array, ""]) -> Params:
    """The tensors of one layer."""
    return {key: value[index] for key, value in params["blk"].items()}


@functools.partial(jax.jit, static_argnames="spec")
def block_forward(spec: DecoderSpec, layer: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Hidden states after a layer from those before it; `layer` is `layer_params` of one."""
    return Block(spec).apply({"params": layer}, x, rope_tables(spec, x.shape[1]))


def block_taps(
    spec: DecoderSpec, layer: Params, x: Float[Array, "B T D"], tap: Tap
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """`block_forward`, and `tap` of each linear's input and of what is written to the residual stream, by name."""
    y, variables = Block(spec, tap).apply({"params": layer}, x, rope_tables(spec, x.shape[1]), mutable=["taps"])
    return y, variables["taps"]


def cast_weights(params: Params, dtype: Any) -> Params:
    """Matrices in `dtype` (the dtype of all matrix products); norms stay f32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf, jnp.float32 if path[-1].key.endswith("norm") else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)

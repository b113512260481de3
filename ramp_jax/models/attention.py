"""Grouped-query attention with rotary positions.

Axes: B batch, T time, S time of keys, D model width, N query heads, K key/value heads, G query heads per key/value
head, H head size.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.devices import by_head
from ramp_jax.models.layers import gain, linear, linear_weights, norm, soft_cap
from ramp_jax.models.layout import Activation, Params, SubBlock, Tap, Weight, pass_on
from ramp_jax.models.rope import Rope, rotate

_QUERY_BLOCK = 128  # queries that attend together; each group meets only the keys that one of them may see
_QUERY_BLOCK_ON_ACCELERATORS = 512  # where launching a kernel costs more than keys that are masked


@dataclasses.dataclass(frozen=True)
class Attention(SubBlock):
    """Causal attention of `n_heads` query heads over `n_kv_heads` keys and values.

    Without `rope`, positions are not told. A query sees the last `window` tokens, itself among them, or all before it.
    Scores are multiplied by `scale` (default: 1 / √head_size) and kept within ±`score_cap`. `qk_norm` norms queries and
    keys before rotation: every head by itself, or all heads as one vector. With `temperature` (β, length), queries at
    position t are multiplied by 1 + β · log(1 + ⌊t / length⌋). What is added to the stream is multiplied by
    `residual_scale`.

    `fused` says that q, k and v are rows of one matrix, `attn_qkv`. `biased` names the linears that have a bias. `norm`
    is the norm before it and `post_norm` the one after it, None where the family has none.
    """

    name: ClassVar[str] = "attn"
    mixes: ClassVar[bool] = True

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    norm_eps: float
    rope: Rope | None
    window: int | None = None
    scale: float | None = None
    score_cap: float | None = None
    qk_norm: Literal["heads", "width"] | None = None
    temperature: tuple[float, int] | None = None
    residual_scale: float = 1.0
    fused: bool = False
    biased: tuple[str, ...] = ()
    norm: str | None = "attn_norm"
    post_norm: str | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Norm, q, k, v (or all of them at once), norms of queries and keys, output, norm."""
        d, q, kv = self.d_model, self.inner, self.n_kv_heads * self.head_size
        if self.fused:
            projections = self._linear("attn_qkv", (q + 2 * kv, d), "attn_in", 0)
        else:
            projections = (
                *self._linear("attn_q", (q, d), "attn_in", 0, rope_heads=self.n_heads),
                *self._linear("attn_k", (kv, d), "attn_in", 1, rope_heads=self.n_kv_heads),
                *self._linear("attn_v", (kv, d), "attn_in", 2),
            )
        normed = {"heads": (self.head_size, self.head_size), "width": (q, kv)}
        q_gain, k_gain = normed[self.qk_norm] if self.qk_norm else (0, 0)
        return (
            *gain(self.norm, d),
            *projections,
            *gain("attn_q_norm" if self.qk_norm else None, q_gain),
            *gain("attn_k_norm" if self.qk_norm else None, k_gain),
            *self._linear("attn_output", (d, q), "attn_mid", 3, writes=True),
            *gain(self.post_norm, d),
        )

    def _linear(self, name: str, shape: tuple[int, int], reads: str, place: int, **kinds: Any) -> tuple[Weight, ...]:
        return linear_weights(name, shape, reads, place / 7, biased=name in self.biased, **kinds)

    @property
    def activations(self) -> tuple[Activation, ...]:
        """What q, k and v read, and what the output does, where all query heads of a value share its channels."""
        repeats = self.n_heads // self.n_kv_heads
        value = ("attn_qkv", self.inner + self.n_kv_heads * self.head_size) if self.fused else ("attn_v", 0)
        maker, first_row = value
        return (
            Activation("attn_in", self.d_model, self.norm),
            Activation("attn_mid", self.inner, maker, self.n_kv_heads, repeats, first_row),
        )

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.n_heads * self.head_size

    @property
    def cache_channels(self) -> int:
        """Keys and values."""
        return 2 * self.n_kv_heads * self.head_size

    def __call__(self, w: Params, x: Float[Array, "B T D"], tap: Tap = pass_on) -> Float[Array, "B T D"]:
        """The stream after it."""
        h = tap("attn_in", norm(x, w, self.norm, self.norm_eps))
        q, k, v = by_head(self.n_kv_heads, *self._heads(w, h))
        if self.rope is not None:
            rotation = self.rope.rotation(x.shape[1])
            q, k = rotate(q, rotation), rotate(k, rotation)
        q = q * (self.head_size**-0.5 if self.scale is None else self.scale)
        if self.temperature is not None:
            q = q * _temperature(*self.temperature, x.shape[1])
        dtype = w["attn_output"]["weight"].dtype
        mixed = tap("attn_mid", causal_attention(q, k, v, dtype, self.window, self.score_cap))
        y = norm(linear(mixed, w["attn_output"]), w, self.post_norm, self.norm_eps)
        return x + tap("attn_out", y if self.residual_scale == 1 else y * self.residual_scale)

    def _heads(self, w: Params, h: Float[Array, "B T D"]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, before positions are told."""
        if self.fused:
            kv = self.n_kv_heads * self.head_size
            q, k, v = jnp.split(linear(h, w["attn_qkv"]), (self.inner, self.inner + kv), axis=-1)
        else:
            q, k, v = (linear(h, w[name]) for name in ("attn_q", "attn_k", "attn_v"))
        by_head = (*h.shape[:2], -1, self.head_size)
        if self.qk_norm == "width":
            q, k = self._normed(w, q, k)
        q, k, v = q.reshape(by_head), k.reshape(by_head), v.reshape(by_head)
        if self.qk_norm == "heads":
            q, k = self._normed(w, q, k)
        return q, k, v

    def _normed(self, w: Params, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm(q, w, "attn_q_norm", self.norm_eps), norm(k, w, "attn_k_norm", self.norm_eps)


def _temperature(beta: float, length: int, time: int) -> Float[Array, "1 T 1 1"]:
    """What multiplies the queries of every position."""
    return 1 + beta * jnp.log1p(jnp.floor(jnp.arange(time, dtype=jnp.float32) / length))[None, :, None, None]


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    dtype: Any,
    window: int | None = None,
    score_cap: float | None = None,
) -> Float[Array, "B T NH"]:
    """Grouped-query attention of scaled queries; operands of the products in `dtype`, softmax in f32.

    Queries go in blocks that meet only the keys that one of them may see. The query heads of one key/value head are
    folded into rows, and the softmax is normalized after the product with the values, where there is less to divide.
    """
    batch, time, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.astype(dtype).reshape(batch, time, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    k, v = k.astype(dtype).transpose(0, 2, 3, 1), v.astype(dtype).transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    block = _QUERY_BLOCK if jax.default_backend() == "cpu" else _QUERY_BLOCK_ON_ACCELERATORS
    outputs = []
    for start in range(0, time, block):
        stop = min(start + block, time)
        first = 0 if window is None else max(0, start - window + 1)
        rows = q[:, :, :, start:stop].reshape(batch, kv_heads, -1, size)  # [B, K, G·T, H]
        scores = jnp.einsum("BKTH,BKHS->BKTS", rows, k[..., first:stop], preferred_element_type=jnp.float32)
        back = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]  # positions from key to query
        visible = (back >= 0) if window is None else (back >= 0) & (back < window)
        scores = jnp.where(jnp.tile(visible, (group, 1))[None, None], soft_cap(scores, score_cap), -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        values = v[:, :, first:stop]
        mixed = jnp.einsum("BKTS,BKSH->BKTH", weights.astype(dtype), values, preferred_element_type=jnp.float32)
        outputs.append((mixed / total).reshape(batch, kv_heads, group, -1, size))
    return jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * size)

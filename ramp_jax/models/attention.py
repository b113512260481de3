"""Grouped-query attention with rotary positions.

Axes: B batch, T time, S time of keys, D model width, N query heads, K key/value heads, G query heads per key/value
head, H head size.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.models.layers import gain, linear, linear_weights, norm
from ramp_jax.models.layout import Activation, Params, SubBlock, Tap, Weight, pass_on

Rope = tuple[Float[Array, "T H/2"], Float[Array, "T H/2"]]

_QUERY_BLOCK = 128  # queries that attend together; each group meets only the keys of its causal prefix
_QUERY_BLOCK_ON_ACCELERATORS = 512  # where launching a kernel costs more than keys that are masked


@dataclasses.dataclass(frozen=True)
class Attention(SubBlock):
    """Causal attention of `n_heads` query heads over `n_kv_heads` keys and values.

    Without `rope_theta`, positions are not told. `qk_norm` norms every query and key head before rotation. `biased`
    names the linears that have a bias. `norm` is the norm before it and `post_norm` the one after it, None where the
    family has none.
    """

    name: ClassVar[str] = "attn"
    mixes: ClassVar[bool] = True

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    norm_eps: float
    rope_theta: float | None
    qk_norm: bool = False
    biased: tuple[str, ...] = ()
    norm: str | None = "attn_norm"
    post_norm: str | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Norm, q, k, v, norms of heads, output, norm."""
        d, q, kv = self.d_model, self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        head_norms = ("attn_q_norm", "attn_k_norm") if self.qk_norm else ()
        return (
            *gain(self.norm, d),
            *self._linear("attn_q", (q, d), "attn_in", 0, rope_heads=self.n_heads),
            *self._linear("attn_k", (kv, d), "attn_in", 1, rope_heads=self.n_kv_heads),
            *self._linear("attn_v", (kv, d), "attn_in", 2),
            *(weight for name in head_norms for weight in gain(name, self.head_size)),
            *self._linear("attn_output", (d, q), "attn_mid", 3, writes=True),
            *gain(self.post_norm, d),
        )

    def _linear(self, name: str, shape: tuple[int, int], reads: str, place: int, **kinds: Any) -> tuple[Weight, ...]:
        return linear_weights(name, shape, reads, place / 7, biased=name in self.biased, **kinds)

    @property
    def activations(self) -> tuple[Activation, ...]:
        """What q, k and v read, and what the output does, where all query heads of a value share its channels."""
        return (
            Activation("attn_in", self.d_model, self.norm),
            Activation("attn_mid", self.inner, "attn_v", self.n_kv_heads, self.n_heads // self.n_kv_heads),
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
        q, k, v = (
            linear(h, w[name]).reshape(*x.shape[:2], -1, self.head_size) for name in ("attn_q", "attn_k", "attn_v")
        )
        if self.qk_norm:
            q, k = norm(q, w, "attn_q_norm", self.norm_eps), norm(k, w, "attn_k_norm", self.norm_eps)
        if self.rope_theta is not None:
            rope = rope_tables(self.rope_theta, self.head_size, x.shape[1])
            q, k = rotate(q, rope), rotate(k, rope)
        mixed = tap("attn_mid", causal_attention(q, k, v, w["attn_q"]["weight"].dtype))
        y = norm(linear(mixed, w["attn_output"]), w, self.post_norm, self.norm_eps)
        return x + tap("attn_out", y)


def rope_tables(theta: float, size: int, time: int) -> Rope:
    """Cosines and sines of the rotary angles of positions 0..time − 1, for heads of that size.

    They are constants of compiled functions: XLA would fuse them into every head's rotation and compute them there
    again, which costs a forward pass on a CPU a fifth of its time.
    """
    with jax.ensure_compile_time_eval():
        half = size // 2
        frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
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

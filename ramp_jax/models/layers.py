"""What sub-blocks have in common: linears, norms, and the tensors that these need."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ramp_jax.devices import whole
from ramp_jax.models.layout import Weight

ACTIVATIONS = {"silu": nnx.silu, "gelu_tanh": nnx.gelu}  # flax's gelu is the tanh approximation


def matmul(x: Float[Array, "... I"], w: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """x · wᵀ with operands in the weights' dtype, accumulated in f32."""
    return jnp.einsum("...i,oi->...o", whole(x.astype(w.dtype)), w, preferred_element_type=jnp.float32)


def linear(x: Float[Array, "... I"], module: dict[str, Any]) -> Float[Array, "... O"]:
    """x · weightᵀ, plus the bias where the module has one."""
    y = matmul(x, module["weight"])
    return y + jnp.broadcast_to(module["bias"], y.shape) if "bias" in module else y


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) · gain."""
    x = whole(x)
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return normed * jnp.broadcast_to(gain, x.shape)


def norm(x: Float[Array, "... D"], w: Mapping[str, Any], name: str | None, eps: float) -> Float[Array, "... D"]:
    """`rms_norm` by the gain of the module of that name; x itself where there is no name."""
    return x if name is None else rms_norm(x, w[name]["weight"], eps)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap), which never leaves ±cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def gain(name: str | None, size: int) -> tuple[Weight, ...]:
    """The tensor of a norm; none where there is no name."""
    return () if name is None else (Weight(f"{name}.weight", (size,), "gain"),)


def linear_weights(
    name: str,
    shape: tuple[int, int],
    reads: str,
    place: float,
    *,
    biased: bool = False,
    writes: bool = False,
    rope_heads: int | None = None,
) -> tuple[Weight, ...]:
    """The tensors of a linear `[out, in]`."""
    matrix = Weight(f"{name}.weight", shape, "matrix", reads, place, writes, rope_heads)
    bias = Weight(f"{name}.bias", shape[:1], "bias", rope_heads=rope_heads)
    return (matrix, bias) if biased else (matrix,)

"""Gated MLPs."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.models.layers import ACTIVATIONS, gain, linear, linear_weights, norm
from ramp_jax.models.layout import Activation, Params, SubBlock, Tap, Weight, pass_on

ActivationName = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class GatedMlp(SubBlock):
    """down(f(gate(x)) · up(x)), between the norms `norm` and `post_norm`, None where the family has none.

    `fused` says that gate and up are rows of one matrix, `ffn_up`, gate first. `biased` names the linears that have a
    bias. What is added to the stream is multiplied by `residual_scale`.
    """

    name: ClassVar[str] = "ffn"

    d_model: int
    d_ff: int
    norm_eps: float
    activation: ActivationName = "silu"
    residual_scale: float = 1.0
    fused: bool = False
    biased: tuple[str, ...] = ()
    norm: str | None = "ffn_norm"
    post_norm: str | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Norm, gate, up (or both at once), down, norm."""
        d, f = self.d_model, self.d_ff
        gate = () if self.fused else self._linear("ffn_gate", (f, d), "ffn_in", 4)
        return (
            *gain(self.norm, d),
            *gate,
            *self._linear("ffn_up", (2 * f if self.fused else f, d), "ffn_in", 5),
            *self._linear("ffn_down", (d, f), "ffn_mid", 6),
            *gain(self.post_norm, d),
        )

    def _linear(self, name: str, shape: tuple[int, int], reads: str, place: int) -> tuple[Weight, ...]:
        writes = name == "ffn_down"
        return linear_weights(name, shape, reads, place / 7, biased=name in self.biased, writes=writes)

    @property
    def activations(self) -> tuple[Activation, ...]:
        """What gate and up read, and the gated activation, whose channels up scales."""
        first_row = self.d_ff if self.fused else 0
        return (
            Activation("ffn_in", self.d_model, self.norm),
            Activation("ffn_mid", self.d_ff, "ffn_up", first_row=first_row),
        )

    @property
    def inner(self) -> int:
        """Width of the gated activation."""
        return self.d_ff

    def __call__(self, w: Params, x: Float[Array, "B T D"], tap: Tap = pass_on) -> Float[Array, "B T D"]:
        """The stream after it."""
        h = tap("ffn_in", norm(x, w, self.norm, self.norm_eps))
        if self.fused:
            gate, up = jnp.split(linear(h, w["ffn_up"]), 2, axis=-1)
        else:
            gate, up = linear(h, w["ffn_gate"]), linear(h, w["ffn_up"])
        gated = tap("ffn_mid", ACTIVATIONS[self.activation](gate) * up)
        y = norm(linear(gated, w["ffn_down"]), w, self.post_norm, self.norm_eps)
        return x + tap("ffn_out", y if self.residual_scale == 1 else y * self.residual_scale)

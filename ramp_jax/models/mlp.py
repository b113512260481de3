"""Gated MLPs."""

import dataclasses
from typing import ClassVar, Literal

from jaxtyping import Array, Float

from ramp_jax.models.layers import ACTIVATIONS, gain, linear, linear_weights, norm
from ramp_jax.models.layout import Activation, Params, SubBlock, Tap, Weight, pass_on

ActivationName = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class GatedMlp(SubBlock):
    """down(f(gate(x)) · up(x)), between the norms `norm` and `post_norm`, None where the family has none.

    `biased` names the linears that have a bias.
    """

    name: ClassVar[str] = "ffn"

    d_model: int
    d_ff: int
    norm_eps: float
    activation: ActivationName = "silu"
    biased: tuple[str, ...] = ()
    norm: str | None = "ffn_norm"
    post_norm: str | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Norm, gate, up, down, norm."""
        d, f = self.d_model, self.d_ff
        return (
            *gain(self.norm, d),
            *linear_weights("ffn_gate", (f, d), "ffn_in", 4 / 7, biased="ffn_gate" in self.biased),
            *linear_weights("ffn_up", (f, d), "ffn_in", 5 / 7, biased="ffn_up" in self.biased),
            *linear_weights("ffn_down", (d, f), "ffn_mid", 6 / 7, biased="ffn_down" in self.biased, writes=True),
            *gain(self.post_norm, d),
        )

    @property
    def activations(self) -> tuple[Activation, ...]:
        """What gate and up read, and the gated activation, whose channels up scales."""
        return Activation("ffn_in", self.d_model, self.norm), Activation("ffn_mid", self.d_ff, "ffn_up")

    @property
    def inner(self) -> int:
        """Width of the gated activation."""
        return self.d_ff

    def __call__(self, w: Params, x: Float[Array, "B T D"], tap: Tap = pass_on) -> Float[Array, "B T D"]:
        """The stream after it."""
        h = tap("ffn_in", norm(x, w, self.norm, self.norm_eps))
        gated = tap("ffn_mid", ACTIVATIONS[self.activation](linear(h, w["ffn_gate"])) * linear(h, w["ffn_up"]))
        return x + tap("ffn_out", norm(linear(gated, w["ffn_down"]), w, self.post_norm, self.norm_eps))

"""Activation statistics of every linear's input, from one pass over calibration windows."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Decoder, Params
from ramp_jax.progress import track

_LAYER_TAPS = ("residual", "attn_in", "attn_mid", "attn_out", "ffn_in", "ffn_mid", "ffn_out")  # in forward order


class Moments(NamedTuple):
    """Per channel of one activation, `[L, C]` inside the blocks and `[C]` outside: E[x²], E[x⁴] and max |x|."""

    square: jax.Array
    fourth: jax.Array
    abs_max: jax.Array

    def scaled(self, s: Float[Array, "*l C"]) -> "Moments":
        """The moments of x · s."""
        return Moments(self.square * s**2, self.fourth * s**4, self.abs_max * jnp.abs(s))


@dataclasses.dataclass(frozen=True)
class Stats:
    """Moments by tap, of a model whose activations were divided by `folding` (see `Model.folding`).

    Taps are `attn_in`, `attn_mid`, `ffn_in`, `ffn_mid` (inputs of linears), `head_in`, and what moves along the
    residual stream: `residual` before each layer, `attn_out` and `ffn_out` written to it.
    """

    moments: dict[str, Moments]
    folding: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def under(self, folding: dict[str, jax.Array]) -> "Stats":
        """The same statistics as they are under another folding."""
        moments = dict(self.moments)
        for tap in folding.keys() | self.folding.keys():
            moments[tap] = moments[tap].scaled(self.folding.get(tap, 1.0) / folding.get(tap, 1.0))
        return Stats(moments, folding)


def calibrate(model: Model, windows: Int[np.ndarray, "W T"]) -> Stats:
    """Statistics over all tokens of the windows, one window at a time.

    Raises `ValueError` where an activation is not finite, naming the tap, the layer and the window.
    """
    total: dict[str, Moments] = {}
    for i, window in enumerate(track(windows, "calibrating", "window")):
        sums = _window_sums(model.spec, model.params, window[None])
        _check_finite(sums, i)
        for tap, new in sums.items():
            old = total.get(tap, Moments(*(jnp.zeros_like(leaf) for leaf in new)))
            total[tap] = Moments(
                old.square + new.square, old.fourth + new.fourth, jnp.maximum(old.abs_max, new.abs_max)
            )
    tokens = windows.size
    means = {tap: Moments(m.square / tokens, m.fourth / tokens, m.abs_max) for tap, m in total.items()}
    return Stats(means, model.folding)


@functools.partial(jax.jit, static_argnames="spec")
def _window_sums(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> dict[str, Moments]:
    _, variables = Decoder(spec, _sums).apply({"params": params}, ids, mutable=["taps"])
    taps = variables["taps"]
    return {"head_in": taps["head_in"], **taps["blk"]}


def _sums(x: Float[Array, "B T C"]) -> Moments:
    return Moments(jnp.sum(jnp.square(x), axis=(0, 1)), jnp.sum(x**4, axis=(0, 1)), jnp.max(jnp.abs(x), axis=(0, 1)))


def _check_finite(sums: dict[str, Moments], window: int) -> None:
    """Raise for the first activation of the forward pass that is not finite."""
    finite = {tap: np.isfinite(np.asarray(moments.fourth)).all(axis=-1) for tap, moments in sums.items()}
    broken = [(int(np.argmin(finite[tap])), i, tap) for i, tap in enumerate(_LAYER_TAPS) if not finite[tap].all()]
    if broken or not finite["head_in"]:
        layer, _, tap = min(broken, default=("last", 0, "head_in"))
        raise ValueError(
            f"activation {tap} of layer {layer} is not finite in calibration window {window}; "
            f"load the model with dtype=float32, or check its weights."
        )

"""Activation statistics of every linear's input, from one sweep over calibration windows."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ramp_jax import sweep
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Params, block_taps, embed, final_norm
from ramp_jax.models.layout import HEAD_INPUT, Block

_SAMPLE = (2, 64)  # windows, and tokens of each, that statistics keep


class Moments(NamedTuple):
    """Per channel of one activation, `[C]`: E[x²], E[x⁴], max |x| and E[x]."""

    square: jax.Array
    fourth: jax.Array
    abs_max: jax.Array
    mean: jax.Array

    def scaled(self, s: Float[Array, " C"] | float) -> "Moments":
        """The moments of x · s."""
        return Moments(self.square * s**2, self.fourth * s**4, self.abs_max * jnp.abs(s), self.mean * s)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Moments by activation, of a model whose activations were divided by `folding` (see `Model.folding`).

    Names are full, as `blk.3.attn_in`: what matrices of the blocks read, `head_in`, and what moves along the residual
    stream, before every block and written to it. `sample` is some of the text, for what needs gradients.
    """

    moments: Mapping[str, Moments]
    folding: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    sample: Int[np.ndarray, "W T"] | None = None

    def under(self, folding: Mapping[str, jax.Array]) -> "Stats":
        """The same statistics as they are under another folding."""
        changed = {
            name: self.moments[name].scaled(self.folding.get(name, 1.0) / folding.get(name, 1.0))
            for name in folding.keys() | self.folding.keys()
        }
        return dataclasses.replace(self, moments={**self.moments, **changed}, folding=folding)


def calibrate(model: Model, windows: Int[np.ndarray, "W T"]) -> Stats:
    """Statistics over all tokens of the windows, one window at a time.

    Raises `ValueError` where an activation is not finite, naming it, the layer and the window.
    """
    spec, params = model.spec, model.params
    moments: dict[str, Moments] = {}
    x = embed(spec, params, windows)
    for at in sweep.forward(spec, params, "calibrating"):
        x, found = _block_moments(at.block, at.weights, x)
        for tap in at.block.taps:
            moments[at.full(tap)], finite = found[tap]
            _check_finite(finite, tap, f"layer {at.index}")
    moments[HEAD_INPUT], finite = _head_moments(spec, {"output_norm": params["output_norm"]}, x)
    _check_finite(finite, HEAD_INPUT, "the last layer")
    return Stats(moments, model.folding, np.asarray(windows[: _SAMPLE[0], : _SAMPLE[1]]))


Seen = tuple[Moments, Bool[Array, " W"]]
"""Moments over all windows, and in which of these they are finite."""


@functools.partial(jax.jit, static_argnames="block")
def _block_moments(block: Block, w: Params, x: Float[Array, "W T D"]) -> tuple[Float[Array, "W T D"], dict[str, Seen]]:
    """Hidden states after a block, and what its taps see."""

    def one_window(window: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], dict[str, Moments]]:
        y, sums = block_taps(block, w, window[None], lambda a: _sums(a[0]))
        return y[0], sums

    y, sums = jax.lax.map(one_window, x)
    return y, {tap: _over_windows(found, x.shape[0] * x.shape[1]) for tap, found in sums.items()}


@functools.partial(jax.jit, static_argnames="spec")
def _head_moments(spec: DecoderSpec, params: Params, x: Float[Array, "W T D"]) -> Seen:
    """Of what the head reads."""
    return _over_windows(jax.lax.map(lambda window: _sums(final_norm(spec, params, window)), x), x[..., 0].size)


def _sums(x: Float[Array, "T C"]) -> Moments:
    square, fourth, mean = (jnp.sum(x**power, axis=0) for power in (2, 4, 1))
    return Moments(square, fourth, jnp.max(jnp.abs(x), axis=0), mean)


def _over_windows(sums: Moments, tokens: int) -> Seen:
    """From sums per window, `[W, C]`."""
    square, fourth, mean = (jnp.sum(a, axis=0) / tokens for a in (sums.square, sums.fourth, sums.mean))
    finite = jnp.all(jnp.isfinite(sums.fourth), axis=-1)
    return Moments(square, fourth, jnp.max(sums.abs_max, axis=0), mean), finite


def _check_finite(finite: Bool[Array, " W"], activation: str, where: str) -> None:
    if not np.asarray(finite).all():
        raise ValueError(
            f"activation {activation} of {where} is not finite in calibration window {int(np.argmin(finite))}; "
            f"load the model with dtype=float32, or check its weights."
        )


def second_moments(model: Model, windows: Int[np.ndarray, "W T"]) -> Iterator[dict[str, Float[Array, "C C"]]]:
    """E[x xᵀ] f32 of what matrices read, by the name inside the block: one block's matrices exist at a time.

    Beside the weights, memory holds the hidden states of all windows, `[W, T, D]` f32, twice. Raises `ValueError` where
    an activation is not finite.
    """
    x = embed(model.spec, model.params, windows)
    for at in sweep.forward(model.spec, model.params, "second moments"):
        x, second = block_second_moments(at.block, at.weights, x)
        for name, matrix in second.items():
            if not np.isfinite(np.asarray(jnp.trace(matrix))):
                raise ValueError(
                    f"activation {name} of layer {at.index} is not finite; load the model with dtype=float32, "
                    f"or check its weights."
                )
        yield second


@functools.partial(jax.jit, static_argnames=("block", "names"))
def block_second_moments(
    block: Block, w: Params, x: Float[Array, "W T D"], names: tuple[str, ...] | None = None
) -> tuple[Float[Array, "W T D"], dict[str, Float[Array, "C C"]]]:
    """Hidden states after a block, and E[x xᵀ] of the activations `names` (default: all that are read), one window at
    a time."""
    widths = {a.name: a.width for a in block.activations if names is None or a.name in names}

    def one_window(total: dict[str, jax.Array], window: Float[Array, "T D"]) -> tuple[dict[str, jax.Array], jax.Array]:
        y, found = block_taps(block, w, window[None], lambda a: jnp.einsum("btc,btd->cd", a, a))
        return {name: total[name] + found[name] for name in widths}, y[0]

    total = {name: jnp.zeros((width, width)) for name, width in widths.items()}
    total, y = jax.lax.scan(one_window, total, x)
    return y, {name: matrix / (x.shape[0] * x.shape[1]) for name, matrix in total.items()}

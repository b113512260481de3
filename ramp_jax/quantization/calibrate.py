"""Activation statistics of every linear's input, from one sweep over calibration windows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax import sweep
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Params, block_taps, final_norm
from ramp_jax.models.layout import HEAD_INPUT, Block, full_name

_SERIES = "calibrating"
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
    stream, before every block and written to it. `sample` is some of the text, for what needs gradients, and `states`
    the stream `[L + 1, W, T, D]` f32 of these tokens before every block and after the last one.
    """

    moments: Mapping[str, Moments]
    folding: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    sample: Int[np.ndarray, "W T"] | None = None
    states: Float[np.ndarray, "L+1 W T D"] | None = None

    def under(self, folding: Mapping[str, jax.Array]) -> "Stats":
        """The same statistics as they are under another folding."""
        changed = {
            name: self.moments[name].scaled(self.folding.get(name, 1.0) / folding.get(name, 1.0))
            for name in folding.keys() | self.folding.keys()
        }
        return dataclasses.replace(self, moments={**self.moments, **changed}, folding=folding)


class Seen(NamedTuple):
    """What calibration saw in one block: moments of everything that its taps see, by name inside the block, and a
    sketch `[K, C]` of every activation that matrices read, whose Σ s sᵀ is E[x xᵀ] on average."""

    moments: dict[str, Moments]
    sketches: dict[str, Float[Array, "K C"]]


def calibrate(model: Model, windows: Int[np.ndarray, "W T"], journal: Journal = NOWHERE) -> Stats:
    """Statistics over all tokens of the windows, from one sweep over the blocks that `journal` does not have.

    Raises `ValueError` where an activation is not finite, naming it, the layer and the window.
    """
    return calibrated(model, windows, lambda at, seen: {}, journal=journal)[0]


def calibrated(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    visit: Callable[[sweep.Place, Seen], Mapping[str, Any]],
    sketch: int = 0,
    journal: Journal = NOWHERE,
) -> tuple[Stats, list[Mapping[str, Any]]]:
    """`calibrate`, with what a `visit` of every block found, that is told what was seen there.

    Sketches have about `sketch` rows, none by default. Blocks that `journal` has are not visited again.
    """
    spec, params = model.spec, model.params
    signs = _signs(windows, sketch)
    passed, x = journal.passed(_SERIES)
    x = sweep.begin(spec, params, windows) if x is None else sweep.held(x)
    for at in sweep.forward(spec, params, _SERIES, first=len(passed)):
        before = _sampled(x)
        x, seen = observe(at, x, signs)
        passed.append({"state": before, "moments": seen.moments, "visit": visit(at, seen)})
        journal.append(_SERIES, at.index, passed[-1], x)
    moments = {
        full_name(index, tap): Moments(*map(jnp.asarray, found))
        for index, block in enumerate(passed)
        for tap, found in block["moments"].items()
    }
    sums = sweep.in_batches(functools.partial(_head_sums, spec, {"output_norm": params["output_norm"]}), x)
    moments[HEAD_INPUT] = _over_windows(sums, windows.size, HEAD_INPUT, "the last layer")
    states = np.stack([*(block["state"] for block in passed), _sampled(x)])
    return Stats(moments, model.folding, _sampled(windows), states), [block["visit"] for block in passed]


def observe(
    at: sweep.Place, x: Float[Array, "W T D"], signs: Float[np.ndarray, "W K T"]
) -> tuple[Float[Array, "W T D"], Seen]:
    """Hidden states after a block, and what was seen there; `signs` are those of the sketches, of every window."""
    y, (sums, sketches) = sweep.through(functools.partial(_observe_windows, at.block, sweep.placed(at)), x, signs)
    tokens = x.shape[0] * x.shape[1]
    moments = {tap: _over_windows(sums[tap], tokens, tap, f"layer {at.index}") for tap in at.block.taps}
    scale = 1 / np.sqrt(max(1, signs.shape[1]) * tokens)
    return y, Seen(moments, {name: part.reshape(-1, part.shape[-1]) * scale for name, part in sketches.items()})


@functools.partial(jax.jit, static_argnames="block")
def _observe_windows(
    block: Block, w: Params, x: Float[Array, "B T D"], signs: Float[Array, "B K T"]
) -> tuple[Float[Array, "B T D"], tuple[dict[str, Moments], dict[str, Float[Array, "B K C"]]]]:
    """Hidden states after a block, sums per window of what its taps see, and signed sums of what is read."""
    y, found = block_taps(block, w, x, lambda a: a)
    sketches = {a.name: jnp.einsum("bkt,btc->bkc", signs, found[a.name]) for a in block.activations}
    return y, ({tap: _sums(a) for tap, a in found.items()}, sketches)


@functools.partial(jax.jit, static_argnames="spec")
def _head_sums(spec: DecoderSpec, params: Params, x: Float[Array, "B T D"]) -> Moments:
    """Of what the head reads, per window."""
    return _sums(final_norm(spec, params, x))


def _signs(windows: Int[np.ndarray, "W T"], sketch: int) -> Float[np.ndarray, "W K T"]:
    """Random signs by which tokens of a window are added up: E[ε εᵀ] = 1 makes Σ_k (Σ_t ε_kt x_t)² unbiased."""
    count, time = windows.shape
    each = -(-sketch // count)
    return np.random.default_rng(0).choice(np.float32([-1, 1]), (count, each, time))


def no_signs(windows: Int[np.ndarray, "W T"]) -> Float[np.ndarray, "W 0 T"]:
    """For `observe`, where nobody needs a sketch."""
    return _signs(windows, 0)


def _sampled(by_token: Any) -> np.ndarray:
    """Of the windows' tokens, those that statistics keep; hidden states depend on none that come after."""
    return np.asarray(by_token[: _SAMPLE[0], : _SAMPLE[1]])


def _sums(x: Float[Array, "B T C"]) -> Moments:
    """Per window, `[B, C]`."""
    square, fourth, mean = (jnp.sum(x**power, axis=1) for power in (2, 4, 1))
    return Moments(square, fourth, jnp.max(jnp.abs(x), axis=1), mean)


def _over_windows(sums: Moments, tokens: int, activation: str, where: str) -> Moments:
    """From sums per window, `[W, C]`; raises `ValueError` that names a window where they are not finite."""
    finite = np.isfinite(np.asarray(sums.fourth)).all(axis=-1)
    if not finite.all():
        raise ValueError(
            f"activation {activation} of {where} is not finite in calibration window {int(np.argmin(finite))}; "
            f"load the model with dtype=float32, or check its weights."
        )
    square, fourth, mean = (jnp.sum(a, axis=0) / tokens for a in (sums.square, sums.fourth, sums.mean))
    return Moments(square, fourth, jnp.max(sums.abs_max, axis=0), mean)

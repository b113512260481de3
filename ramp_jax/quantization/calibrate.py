"""Activation statistics of every linear's input, from one pass over calibration windows."""

import dataclasses
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.checkpoint import digest, write_bytes
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Decoder, Params, block_taps, embed, layer_params
from ramp_jax.progress import track

_LAYER_TAPS = ("residual", "attn_in", "attn_mid", "attn_out", "ffn_in", "ffn_mid", "ffn_out")  # in forward order


class Moments(NamedTuple):
    """Per channel of one activation, `[L, C]` inside the blocks and `[C]` outside: E[x²], E[x⁴], max |x| and E[x]."""

    square: jax.Array
    fourth: jax.Array
    abs_max: jax.Array
    mean: jax.Array

    @property
    def kurtosis(self) -> Float[Array, "*l C"]:
        """E[x⁴] / E[x²]² per channel, about zero: 3 for a normal one, 0 where nothing was seen."""
        return jnp.where(self.square > 0, self.fourth / jnp.maximum(jnp.square(self.square), 1e-30), 0.0)

    def total(self) -> "Moments":
        """Over all channels, `[L]` or one number."""
        square, fourth, mean = (jnp.mean(leaf, axis=-1) for leaf in (self.square, self.fourth, self.mean))
        return Moments(square, fourth, jnp.max(self.abs_max, axis=-1), mean)

    def scaled(self, s: Float[Array, "*l C"]) -> "Moments":
        """The moments of x · s."""
        return Moments(self.square * s**2, self.fourth * s**4, self.abs_max * jnp.abs(s), self.mean * s)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Moments by tap, of a model whose activations were divided by `folding` (see `Model.folding`).

    Taps are `attn_in`, `attn_mid`, `ffn_in`, `ffn_mid` (inputs of linears), `head_in`, and what moves along the
    residual stream: `residual` before each layer, `attn_out` and `ffn_out` written to it. `sample` is some of the text,
    for what needs gradients.
    """

    moments: dict[str, Moments]
    folding: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    sample: Int[np.ndarray, "W T"] | None = None

    def under(self, folding: dict[str, jax.Array]) -> "Stats":
        """The same statistics as they are under another folding."""
        moments = dict(self.moments)
        for tap in folding.keys() | self.folding.keys():
            moments[tap] = moments[tap].scaled(self.folding.get(tap, 1.0) / folding.get(tap, 1.0))
        return dataclasses.replace(self, moments=moments, folding=folding)

    def save(self, path: str | Path, model: Model, windows: Int[np.ndarray, "W T"]) -> None:
        """Write a NumPy archive with a fingerprint of what was measured: `model` on `windows`."""
        arrays = {f"{tap} {name}": leaf for tap, m in self.moments.items() for name, leaf in m._asdict().items()}
        arrays |= {f"folding {tap}": s for tap, s in self.folding.items()}
        archive = io.BytesIO()
        np.savez(archive, inputs=json.dumps(_inputs(model, windows)), **arrays)
        write_bytes(path, archive.getvalue())

    @classmethod
    def load(cls, path: str | Path, model: Model, windows: Int[np.ndarray, "W T"]) -> "Stats":
        """Read what `save` wrote; raises `ValueError` where it was measured on another model or other windows."""
        try:
            with np.load(path) as saved:
                inputs = json.loads(saved["inputs"].item())
                arrays = {tuple(name.split(" ")): jnp.asarray(saved[name]) for name in saved.files if name != "inputs"}
            taps = dict.fromkeys(tap for tap, _ in arrays if tap != "folding")
            moments = {tap: Moments(**{name: arrays[tap, name] for name in Moments._fields}) for tap in taps}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} holds no statistics ({error}); calibrate again.") from error
        for name, value in _inputs(model, windows).items():
            if inputs.get(name) != value:
                raise ValueError(f"{path} was measured with another {name}; calibrate again or choose another file.")
        folding = {tap: s for (kind, tap), s in arrays.items() if kind == "folding"}
        return cls(moments, folding, _sample(windows))


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
                old.square + new.square,
                old.fourth + new.fourth,
                jnp.maximum(old.abs_max, new.abs_max),
                old.mean + new.mean,
            )
    tokens = windows.size
    means = {tap: Moments(m.square / tokens, m.fourth / tokens, m.abs_max, m.mean / tokens) for tap, m in total.items()}
    return Stats(means, model.folding, _sample(windows))


def _sample(windows: Int[np.ndarray, "W T"]) -> Int[np.ndarray, "W T"]:
    return np.asarray(windows[:2, :64])


def second_moments(model: Model, windows: Int[np.ndarray, "W T"]) -> Iterator[dict[str, Float[Array, "C C"]]]:
    """E[x xᵀ] f32 of every linear's input by tap, one layer after the other: one layer's matrices exist at a time.

    Beside the weights, memory holds the hidden states of all windows, `[W, T, D]` f32, twice. Raises `ValueError` where
    an activation is not finite.
    """
    x = embed(model.spec, model.params["token_embd"], windows)
    for index in track(range(model.spec.n_layers), "second moments", "layer"):
        x, second = layer_second_moments(model.spec, layer_params(model.params, index), x)
        for tap, matrix in second.items():
            if not np.isfinite(np.asarray(jnp.trace(matrix))):
                raise ValueError(
                    f"activation {tap} of layer {index} is not finite; load the model with dtype=float32, "
                    f"or check its weights."
                )
        yield second


INPUTS = ("attn_in", "attn_mid", "ffn_in", "ffn_mid")
"""The taps before the linears of a block, in forward order."""


@functools.partial(jax.jit, static_argnames=("spec", "taps"))
def layer_second_moments(
    spec: DecoderSpec, layer: Params, x: Float[Array, "W T D"], taps: tuple[str, ...] = INPUTS
) -> tuple[Float[Array, "W T D"], dict[str, Float[Array, "C C"]]]:
    """Hidden states after a layer, and E[x xᵀ] of its `taps`, one window at a time."""

    def one_window(total: dict[str, jax.Array], window: Float[Array, "T D"]) -> tuple[dict[str, jax.Array], jax.Array]:
        y, found = block_taps(spec, layer, window[None], lambda a: jnp.einsum("btc,btd->cd", a, a))
        return {tap: total[tap] + found[tap] for tap in taps}, y[0]

    shapes = jax.eval_shape(lambda a: block_taps(spec, layer, a, lambda b: jnp.zeros((b.shape[-1],) * 2))[1], x[:1])
    total = {tap: jnp.zeros(shapes[tap].shape) for tap in taps}
    total, y = jax.lax.scan(one_window, total, x)
    return y, {tap: matrix / (x.shape[0] * x.shape[1]) for tap, matrix in total.items()}


def _inputs(model: Model, windows: Int[np.ndarray, "W T"]) -> dict[str, str]:
    """What statistics depend on, as SHA-256 digests."""
    return {"model": digest(model.params), "windows": digest(windows), "folding": digest(model.folding)}


@functools.partial(jax.jit, static_argnames="spec")
def _window_sums(spec: DecoderSpec, params: Params, ids: Int[Array, "B T"]) -> dict[str, Moments]:
    _, variables = Decoder(spec, _sums).apply({"params": params}, ids, mutable=["taps"])
    taps = variables["taps"]
    return {"head_in": taps["head_in"], **taps["blk"]}


def _sums(x: Float[Array, "B T C"]) -> Moments:
    square, fourth, mean = (jnp.sum(x**power, axis=(0, 1)) for power in (2, 4, 1))
    return Moments(square, fourth, jnp.max(jnp.abs(x), axis=(0, 1)), mean)


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

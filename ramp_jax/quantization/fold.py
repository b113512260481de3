"""Scale Folding: move activation outliers into the weights before they are quantized.

Dividing an activation by s and multiplying the columns of the linears that read it by s leaves the output unchanged,
while the quantizer sees other magnitudes. A norm divides by its gain (γ' = γ / s), a linear by its rows: v for what
attention passes on to its output, up for what the gated MLP passes on to down. With grouped queries, all query heads
of a key/value head share one s.

s_c = a_c^α · b_c^−β of activation and weight magnitudes per channel (root mean squares), scaled to geometric mean 1;
α and β are searched per layer and group. The search follows AWQ (Lin et al. 2024), the grouping the paper's Scale
Folding. Norms that multiply by 1 + γ are stored as 1 + γ in the parameter tree, as in GGUF.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ramp_jax import sweep
from ramp_jax.formats import Format, format_up_to, round_trip
from ramp_jax.formats.registry import Effort
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.layout import (
    SMALLEST_BLOCK,
    Activation,
    Block,
    Params,
    foldable,
    full_name,
    of_block,
    replace_in_block,
)
from ramp_jax.models.store import StoredParams
from ramp_jax.quantization.calibrate import Seen, Stats, calibrated

ALPHAS = tuple(round(0.1 * i, 1) for i in range(8))
BETAS = (0.0, 0.3)
"""The grids of α and β; both 0 leaves the group as it is, so folding never raises the objective."""

Target = float | Callable[[int], Format | None]
"""What is folded for: a level, or the format of rows by their length, None where they are not quantized."""

_SMALLEST = 1e-4  # magnitude, of the group's largest; a dead channel keeps a finite scale
_LARGEST_SCALE = 64.0
_SKETCH = 256  # signed sums of tokens that stand for all of them
_SEARCH_ROWS, _CHECK_ROWS, _CHECKED = 64, 256, 3  # of a group: on those rows the best few of these are decided among
_LAST_ROWS = 128  # and on these the best one and no folding
_LOG = logging.getLogger(__name__)


def calibrate_and_fold(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    level: Target,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    betas: tuple[float, ...] = BETAS,
    journal: Journal = NOWHERE,
) -> tuple[Model, Stats]:
    """The model folded for `level`, and the statistics that decided it, from one sweep.

    As `fold`, but (α, β) minimizes the error of the outputs on the tokens themselves, tr(E H Eᵀ) with a sketch of
    H = E[x xᵀ] that exists for one block at a time. Blocks that `journal` has are not searched again.
    """
    search = _Search(model.spec, level, alphas, betas)

    def visit(at: sweep.Place, seen: Seen) -> dict[str, Found]:
        return search.visit(at, {name: moments.square for name, moments in seen.moments.items()}, seen.sketches)

    stats, found = calibrated(model, windows, visit, _SKETCH, journal)
    return _folded(model, found), stats


def fold(
    model: Model,
    stats: Stats,
    level: Target,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    betas: tuple[float, ...] = BETAS,
) -> Model:
    """The same function with scales chosen for quantization at `level`, or the next lower one that rows can take.

    Per activation, (α, β) minimizes the squared error of the outputs of the matrices that read it, quantized with the
    activations' importance, as far as `stats` knows them: channel by channel. Activations whose readers' rows no level
    can hold stay as they are; scales beyond 64 are clipped and reported. Raises `ValueError` where other levels could
    hold rows, but none up to this one.
    """
    search = _Search(model.spec, level, alphas, betas)
    moments = stats.under(model.folding).moments
    found = []
    for at in sweep.forward(model.spec, model.params, "folding"):
        found.append(search.visit(at, {a.name: moments[at.full(a.name)].square for a in at.block.activations}, {}))
    return _folded(model, found)


Found = tuple[Float[Array, " C"], int]
"""Scales of an activation, and how many of them were clipped."""


class _Search:
    """Folding block by block: candidates (α, β) `[A, 2]`, and the formats of a level by width."""

    def __init__(self, spec: DecoderSpec, level: Target, alphas: tuple[float, ...], betas: tuple[float, ...]) -> None:
        widths = {a.width for a in foldable(spec).values() if a.width % SMALLEST_BLOCK == 0}
        format_of = level if callable(level) else functools.partial(format_up_to, level)
        self.formats = {width: fmt.name for width in widths if (fmt := format_of(width)) is not None}
        if widths and not self.formats:
            raise ValueError(f"no level up to {level} can hold rows of {min(widths)} weights; fold at another level.")
        self.grid = np.asarray([(a, b) for a in alphas for b in betas], np.float32)

    def visit(
        self, at: sweep.Place, squares: Mapping[str, jax.Array], sketches: Mapping[str, jax.Array]
    ) -> dict[str, Found]:
        """Find a block's scales, from its activations' mean squares and, where they are known, sketches."""
        found = {}
        for activation in at.block.activations:
            fmt = self.formats.get(activation.width)
            if activation.maker is not None and fmt is not None:
                rows = [of_block(at.weights, r.name).astype(jnp.float32) for r in at.block.readers(activation.name)]
                w, square = jnp.concatenate(rows), squares[activation.name]
                scales, beyond = _scales(activation, w, square, self.grid)
                best = _best(w, scales, square, sketches.get(activation.name), fmt)
                found[at.full(activation.name)] = scales[best], int(beyond[best].sum())
        return found


def _folded(model: Model, blocks: Sequence[Mapping[str, Found]]) -> Model:
    """The model with all scales that were found."""
    found = {name: one for block in blocks for name, one in block.items()}
    if clipped := sum(count for _, count in found.values()):
        _LOG.warning("%d scales of folding went beyond %g and were clipped.", clipped, _LARGEST_SCALE)
    return _scaled(model, {name: jnp.asarray(scales) for name, (scales, _) in found.items()})


def refold(model: Model, folding: Mapping[str, Any]) -> Model:
    """The same function with exactly the scales of `folding`, whatever the model was folded with before.

    Raises `ValueError` where a scale has another shape than the model's activation.
    """
    return _scaled(model, scales_to(model, folding))


def scales_to(model: Model, folding: Mapping[str, Any]) -> dict[str, Float[Array, " C"]]:
    """What still divides each activation of `model` until it is folded by `folding`; raises as `refold`."""
    members = foldable(model.spec)
    if unknown := folding.keys() - members.keys():
        raise ValueError(f"the folding names {min(unknown)}, which the model has not; make the allocation again.")
    scales = {}
    for name, activation in members.items():
        if name in folding or name in model.folding:
            target = jnp.asarray(folding.get(name, np.ones(activation.width)), jnp.float32)
            if target.shape != (activation.width,):
                shape = f"{target.shape}, this model needs ({activation.width},)"
                raise ValueError(f"the folding of {name} has shape {shape}; make the allocation again.")
            scales[name] = target / model.folding.get(name, 1.0)
    return scales


def _scaled(model: Model, scales: Mapping[str, Float[Array, " C"]]) -> Model:
    """Divide each activation by its scales, and multiply the matrices that read it."""
    folding = model.folding | {name: model.folding.get(name, 1.0) * s for name, s in scales.items()}

    def change(index: int, w: Params) -> Params:
        return folded_block(model.spec.blocks[index], index, w, scales)

    if isinstance(model.params, StoredParams):
        params = model.params.changed(change)
    else:
        params = {**model.params, "blk": {index: change(index, w) for index, w in model.params["blk"].items()}}
    return dataclasses.replace(model, params=params, folding=folding)


def folded_block(block: Block, index: int, w: Params, scales: Mapping[str, Float[Array, " C"]]) -> Params:
    """A block's tensors with every activation divided by its `scales`, by full name."""
    for activation in block.activations:
        if (s := scales.get(full_name(index, activation.name))) is not None:
            w = fold_block(block, w, activation, s)
    return w


def fold_block(block: Block, w: Params, activation: Activation, s: Float[Array, " C"]) -> Params:
    """A block's tensors with one activation divided by `s`: the rows (or gains, and biases) of what makes it, too."""
    divisor = activation.maker_rows(s)
    own = slice(activation.first_row, activation.first_row + len(divisor))
    changed = {}
    for weight in block.weights:
        if weight.name.rpartition(".")[0] == activation.maker:
            value = of_block(w, weight.name)
            rows = jnp.ones(len(value)).at[own].set(divisor).reshape(-1, *[1] * (value.ndim - 1))
            changed[weight.name] = (value.astype(jnp.float32) / rows).astype(value.dtype)
    for weight in block.readers(activation.name):
        value = of_block(w, weight.name)
        changed[weight.name] = (value.astype(jnp.float32) * s[None]).astype(value.dtype)
    return replace_in_block(w, changed)


@functools.partial(jax.jit, static_argnames="activation")
def _scales(
    activation: Activation, w: Float[Array, "O C"], square: Float[Array, " C"], grid: Float[Array, "A 2"]
) -> tuple[Float[Array, "A C"], Bool[Array, "A C"]]:
    """Candidates, and which of their entries were clipped."""
    seen, weight = (activation.share(a) for a in (jnp.sqrt(square), jnp.sqrt(jnp.mean(jnp.square(w), axis=0))))

    def one(pair: Float[Array, " 2"]) -> tuple[jax.Array, jax.Array]:
        log_s = pair[0] * _log(seen) - pair[1] * _log(weight)
        s = jnp.exp(log_s - jnp.mean(log_s))
        clipped = jnp.clip(s, 1 / _LARGEST_SCALE, _LARGEST_SCALE)
        return clipped, clipped != s

    return jax.vmap(one)(grid)


def _log(magnitude: Float[Array, " C"]) -> Float[Array, " C"]:
    return jnp.log(jnp.maximum(magnitude, _SMALLEST * jnp.maximum(jnp.max(magnitude), 1e-30)))


def _best(w: jax.Array, scales: jax.Array, square: jax.Array, sketch: jax.Array | None, fmt: str) -> int:
    """Of the candidates of the least errors over a few evenly spaced rows the one that is best over more; the first
    candidate, no folding, where rounding as carefully as files are rounded says so.

    Coarse rounding does not see that weights lie on a format's grid, as long as nothing moves them.
    """
    few, more, last = (w[:: -(-len(w) // count)] for count in (_SEARCH_ROWS, _CHECK_ROWS, _LAST_ROWS))
    found = np.argsort(_errors(few, scales, square, sketch, fmt), kind="stable")[:_CHECKED]
    folded = found[np.argmin(_errors(more, scales[found], square, sketch, fmt))]
    if folded == 0:
        return 0
    two = np.asarray([0, folded])
    return int(two[np.argmin(_errors(last, scales[two], square, sketch, fmt, "best"))])


def _errors(
    w: jax.Array,
    scales: jax.Array,
    square: jax.Array,
    sketch: jax.Array | None,
    fmt: str,
    effort: Effort = "coarse",
) -> Float[np.ndarray, " A"]:
    """Of each candidate, over all rows, which are rounded together."""
    wide, importance = _widened(w, scales, square)
    return np.asarray(_output_errors(round_trip(wide, fmt, importance, effort), w, scales, square, sketch))


@jax.jit
def _widened(
    w: Float[Array, "R C"], scales: Float[Array, "A C"], square: Float[Array, " C"]
) -> tuple[Float[Array, "A R C"], Float[Array, "A R C"]]:
    """Rows whose columns each candidate widens, and the importance of these."""
    wide = w[None] * scales[:, None]
    importance = jnp.maximum(square, 1e-4 * jnp.mean(square))[None] / jnp.square(scales)
    return wide, jnp.broadcast_to(importance[:, None], wide.shape)


@jax.jit
def _output_errors(
    rounded: Float[Array, "A R C"],
    w: Float[Array, "R C"],
    scales: Float[Array, "A C"],
    square: Float[Array, " C"],
    sketch: Float[Array, "K C"] | None,
) -> Float[Array, " A"]:
    """Squared errors of the rows' outputs."""

    def one(candidate: tuple[Float[Array, "R C"], Float[Array, " C"]]) -> Float[Array, ""]:
        off = candidate[0] / candidate[1][None] - w
        return jnp.sum(jnp.square(off) * square[None] if sketch is None else jnp.square(off @ sketch.T))

    return jax.lax.map(one, (rounded, scales))

"""The sensitivity table from one backward pass: a second-order estimate of every tensor at every level.

Near the model, KL(p ‖ p') = ½ δzᵀ F δz with the change δz of a token's logits and F = diag(p) − p pᵀ; there is no
first-order part, since a model is the minimum of its own divergence (Schraudolph 2002). Probes r with E[r rᵀ] = F make
it a squared inner product, E[(r · δz)²] = δzᵀ F δz (Hutchinson 1990), and one backward pass from r gives the gradient
g of Σ_t r_t · z_t at every layer. A change δW changes what its matrix makes of a token's x by δy = δW x, moves the
token by m = g · δy, and costs ½ Σ m²: the square of the sum over tokens less the products of different tokens, which
are small on average and very noisy. Where tokens meet between the matrix and the stream, δy is pushed to the stream
first: counted at the tokens of the keys and values, not at those that attend to them, moves estimate far worse.

All of this needs δy only, so rounding errors are made, used and dropped some rows at a time. Vocabularies pass by in
pieces, twice: first the normalizer of p, then probes r = e − p Σ e, where e = √p ∘ ε has random signs ε; Σ e is known
only at the end, so what e and p pull back and move is summed apart.

Memory beside the weights: one block in f32, the hidden states before all layers on the host, L · W · T · D f32, and per
token (P + A) · O f32 of a block's matrices with A changes and P probes.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ramp_jax import sweep
from ramp_jax.formats.check import check
from ramp_jax.formats.registry import Effort
from ramp_jax.formats.row_chunks import in_row_chunks, round_trip_rows, side_by_side
from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable, tensors
from ramp_jax.models.decoder import Params, embed, final_norm
from ramp_jax.models.layers import matmul, soft_cap
from ramp_jax.models.layout import Block, SubBlock, of_block, replace_in_block
from ramp_jax.models.store import pieces_of, rows_named
from ramp_jax.quantization import REFERENCE, Encoder
from ramp_jax.scoring.perplexity import Protocol, first_scored
from ramp_jax.sensitivity.exact import Cell, cells
from ramp_jax.sensitivity.table import Sensitivity, fingerprint

PROBES = 4
_SERIES = "estimating"

_NUMBERS_AT_ONCE = 1 << 24  # of a vocabulary's weights, or of its logits' gradients


def fisher_sensitivity(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float | str, ...],
    protocol: Protocol = "llama.cpp",
    *,
    path: str | Path | None = None,
    probes: int = PROBES,
    seed: int = 0,
    encoder: Encoder = REFERENCE,
) -> Sensitivity:
    """Estimate what `exact_sensitivity` measures, for every allocatable tensor; the table's floor is 0.

    With `path`, the finished table is saved there and read from there. Raises `ValueError` where `path` holds a table
    of other inputs.
    """
    members = allocatable(model.spec)
    every = cells(members, levels)
    method = f"fisher at outputs, {probes} probes of seed {seed}"
    inputs = fingerprint(model, windows, members, levels, protocol, method, encoder)
    table = Sensitivity.begin(members, levels, inputs, path)
    if not table.finished:
        started = time.monotonic()
        changes = rounding_errors(model, every, encoder)
        moves = fisher_moves(model, windows, changes, protocol, probes=probes, seed=seed)
        costs = {name: half_squares(values) for name, values in moves.items()}
        ordered = [(cell, cost) for t in members for cell, cost in zip(cells_of(every, t), costs[t.name], strict=True)]
        rows, columns, values = zip(*((cell.row, cell.column, float(cost)) for cell, cost in ordered), strict=True)
        table = table.with_cells(rows, columns, list(values), 0.0, time.monotonic() - started)
        if path is not None:
            table.save(path)
    return table


class Change(NamedTuple):
    """What is added to a matrix: `rule(w, data)` to each of its rows f32, however many there are at a time."""

    rule: Callable[[Float[Array, "R I"], Any], Float[Array, "R I"]]
    data: Any = None


Changes = Callable[[Tensor, Float[Array, "O I"]], Sequence[Change]]
"""What may be added to a tensor, of which it is shown some rows; each change alone."""


def rounding_errors(model: Model, every: list[Cell], encoder: Encoder) -> Changes:
    """What rounding changes in a tensor, for each of its cells among `every`.

    Raises `ValueError` where a tensor cannot be encoded.
    """

    def changes(tensor: Tensor, w: Float[Array, "O I"]) -> list[Change]:
        weights = encoder.weights_of(tensor, model.folding)
        formats = [cell.format.name for cell in cells_of(every, tensor)]
        return [Change(_rounding(fmt, encoder.effort), check(tensor.name, w, fmt, weights)) for fmt in formats]

    return changes


@functools.cache
def _rounding(fmt: str, effort: Effort) -> Callable[..., Float[Array, "R I"]]:
    """One function per format, so that what it is part of compiles once."""

    def error(w: Float[Array, "R I"], importance: Float[Array, " I"] | None) -> Float[Array, "R I"]:
        return round_trip_rows(w, importance, fmt, effort) - w

    return error


def cells_of(every: list[Cell], tensor: Tensor) -> list[Cell]:
    """Those of one tensor."""
    return [cell for cell in every if cell.tensor == tensor]


def half_squares(moves: Float[np.ndarray, "A S"]) -> Float[np.ndarray, " A"]:
    """Nats per scored token that changes with these moves cost, each alone."""
    return np.sum(np.square(moves, dtype=np.float64), axis=1) / 2


def fisher_moves(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    changes: Changes,
    protocol: Protocol = "llama.cpp",
    *,
    states: Float[np.ndarray, "L+1 W T D"] | None = None,
    probes: int = PROBES,
    seed: int = 0,
    journal: Journal = NOWHERE,
) -> dict[str, Float[np.ndarray, "A S"]]:
    """How far each of `changes(tensor)` moves every sample (a probe at a token), by name of the allocatable tensors.

    Several changes together move a sample by the sum of their moves; half the sum of the squares is what they cost,
    in nats per scored token. `states` are the stream before every block and after the last one, where that is known;
    else one more sweep finds it. Computes in f32, whatever the model's dtype. Blocks that `journal` has are not gone
    through again.
    """
    spec, params = model.spec, model.params
    start = first_scored(protocol, windows.shape[1])
    members = {tensor.name: tensor for tensor in allocatable(spec)}
    embedding, head = tensors(spec)[0], _head(spec)
    passed, g = journal.passed(_SERIES)
    with jax.default_matmul_precision("default"):
        states = _states(model, windows) if states is None else states
        if g is None:
            g, moved = _from_head(model, states[-1], changes, jax.random.key(seed), probes, start)
            passed = [{head.name: moved}]
            journal.append(_SERIES, 0, passed[0], g)
        for at in sweep.backward(spec, params, "estimating sensitivity", passed=len(passed) - 1):
            g, moved = _through_block(at, states[at.index], jnp.asarray(g), changes, members)
            journal.append(_SERIES, len(passed), moved, g)
            passed.append(moved)
        moves: dict[str, Float[np.ndarray, "A P W*T"]] = {name: m for moved in passed for name, m in moved.items()}
        if embedding.name in members:
            rows, places = rows_named(params, embedding, windows)
            w = rows[places.ravel()]
            looked_up = _row_changes(w, changes(embedding, w)) * np.float32(spec.embedding_scale)
            moved = np.asarray(_moves(jnp.reshape(g, (probes, *w.shape)), looked_up))
            moves[embedding.name] = moves.get(embedding.name, 0) + moved  # as a head, where it is one
    scored = windows.shape[0] * (windows.shape[1] - 1 - start)
    scale = np.float32(1 / np.sqrt(probes * scored))
    return {name: moves[name].reshape(-1, probes * windows.size) * scale for name in members}


def _states(model: Model, windows: Int[np.ndarray, "W T"]) -> list[Float[np.ndarray, "W T D"]]:
    """The stream before every block and after the last one."""
    x = embed(model.spec, model.params, windows)
    states = [np.asarray(x)]
    for at in sweep.forward(model.spec, model.params):
        x = sweep.advance(at._replace(weights=_wide(at.weights)), x)
        states.append(np.asarray(x))
    return states


def _wide(tree: Params) -> Any:
    """In f32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _row_changes(w: Float[Array, "O I"], changes: Sequence[Change]) -> Float[np.ndarray, "A O I"]:
    """δW of every change of a small matrix."""

    def one(change: Change) -> Float[np.ndarray, "O I"]:
        return np.concatenate(in_row_chunks(change.rule, w, change.data))[: len(w)]

    return np.reshape(side_by_side(one, changes), (len(changes), *w.shape))


def _output_changes(
    w: Float[Array, "O I"], x: Float[Array, "N I"], changes: Sequence[Change]
) -> Float[np.ndarray, "A N O"]:
    """δW x of every change of a matrix."""

    def one(change: Change) -> Float[np.ndarray, "N O"]:
        run = functools.partial(_output_change, change.rule)
        return np.concatenate(in_row_chunks(run, w, x, change.data), axis=1)[:, : len(w)]

    return np.reshape(side_by_side(one, changes), (len(changes), len(x), len(w)))


def _output_change(
    rule: Callable[..., Float[Array, "R I"]], w: Float[Array, "R I"], x: Float[Array, "N I"], data: Any
) -> Float[Array, "N R"]:
    return matmul(x, rule(w, data))


@jax.jit
def _moves(g: Float[Array, "P N O"], changes: Float[Array, "A N O"]) -> Float[Array, "A P N"]:
    """g · δy of every change and probe."""
    return jnp.einsum("PNO,ANO->APN", g, changes)


def _head(spec: DecoderSpec) -> Tensor:
    """The head, or the embedding that is tied to it."""
    return tensors(spec)[0 if spec.tied else -1]


def _from_head(
    model: Model, state: Float[np.ndarray, "W T D"], changes: Changes, key: Key[Array, ""], probes: int, start: int
) -> tuple[Float[Array, "P W T D"], Float[np.ndarray, "A P N"]]:
    """Gradients of r · z at the last layer's output, and r · δz of the head's changes; 0 where no token is scored."""
    spec, head = model.spec, _head(model.spec)
    ends = {"output_norm": model.params["output_norm"]}
    rows = max(1, _NUMBERS_AT_ONCE // max(spec.d_model, (probes + 1) * state[..., 0].size))
    vocabulary = functools.partial(pieces_of, model.params, head, rows)
    x = _scored(spec, ends, state, start)
    normalizer = jnp.full(len(x), -jnp.inf)
    for w in vocabulary():
        normalizer = _normalized(normalizer, w, x, spec.final_cap)
    total: Any = 0.0
    g: Any = 0.0
    moved: Any = 0.0
    for index, w in enumerate(vocabulary()):
        signs = jax.random.fold_in(key, index)
        at_logits, added, pulled = _probed(w, x, normalizer, signs, spec.final_cap, probes)
        total, g = total + added, g + pulled
        moved = moved + _moves(at_logits, _output_changes(w, x, changes(head, w) if head.allocatable else []))
    moved = (moved[:, :-1] - total[None] * moved[:, -1:]).reshape(len(moved), probes, len(state), len(x) // len(state))
    moved = jnp.pad(moved, (*[(0, 0)] * 3, (start, 1))).reshape(len(moved), probes, state[..., 0].size)
    return _before_norm(spec, ends, state, g[:-1] - total[..., None] * g[-1:], start), np.asarray(moved)


@functools.partial(jax.jit, static_argnames=("spec", "start"))
def _scored(spec: DecoderSpec, ends: Params, state: Float[Array, "W T D"], start: int) -> Float[Array, "N D"]:
    """What the head reads of the tokens that count."""
    return final_norm(spec, ends, state)[:, start:-1].reshape(-1, state.shape[-1])


@functools.partial(jax.jit, static_argnames=("spec", "start"))
def _before_norm(
    spec: DecoderSpec, ends: Params, state: Float[Array, "W T D"], g: Float[Array, "P N D"], start: int
) -> Float[Array, "P W T D"]:
    """Gradients at the last layer's output from those at `_scored`."""
    _, pull = jax.vjp(lambda x: _scored(spec, ends, x, start), state)
    (g,) = jax.vmap(pull)(g)
    return g


@functools.partial(jax.jit, static_argnames="cap")
def _normalized(
    normalizer: Float[Array, " N"], w: Float[Array, "R D"], x: Float[Array, "N D"], cap: float | None
) -> Float[Array, " N"]:
    """log Σ exp z of some more rows of the vocabulary."""
    z = soft_cap(matmul(x, w.astype(jnp.float32)), cap)
    return jnp.logaddexp(normalizer, jax.nn.logsumexp(z, axis=1))


@functools.partial(jax.jit, static_argnames=("cap", "probes"))
def _probed(
    w: Float[Array, "R D"],
    x: Float[Array, "N D"],
    normalizer: Float[Array, " N"],
    key: Key[Array, ""],
    cap: float | None,
    probes: int,
) -> tuple[Float[Array, "P+1 N R"], Float[Array, "P N"], Float[Array, "P+1 N D"]]:
    """For some rows of the vocabulary: e of every probe and, last, p, each times the cap's slope; Σ e; and what the
    rows pull back of the former."""
    w = w.astype(jnp.float32)
    z, uncap = jax.vjp(lambda z: soft_cap(z, cap), matmul(x, w))
    p = jnp.exp(z - normalizer[:, None])[None]
    (slope,) = uncap(jnp.ones_like(z))
    e = jnp.sqrt(p) * jax.random.rademacher(key, (probes, *z.shape), jnp.float32)
    g = jnp.concatenate([e, p]) * slope[None]
    return g, jnp.sum(e, axis=2), matmul(g, w.T)


def _through_block(
    at: sweep.Place,
    x: Float[np.ndarray, "W T D"],
    g: Float[Array, "P W T D"],
    changes: Changes,
    members: Mapping[str, Tensor],
) -> tuple[Float[Array, "P W T D"], dict[str, Float[np.ndarray, "A P N"]]]:
    """The gradients before a block from those after it, and the moves of those of its tensors that are `members`."""
    starts, moves = _starts(at.block, at.weights, x), {}
    for sub, start in reversed(list(zip(at.block.sub_blocks, starts, strict=True))):
        before, outputs, read = _through_sub_block(sub, at.weights, start, g)
        for weight in sub.weights:
            if (tensor := members.get(at.full(weight.name))) is not None:
                w = of_block(at.weights, weight.name)
                new = _output_changes(w, read[weight.reads], changes(tensor, w))
                if weight.name in outputs:
                    moved = _moves(outputs[weight.name], new)
                else:
                    moved = _pushed_moves(sub, at.weights, start, g, new, weight.name)
                moves[tensor.name] = np.asarray(moved)
        g = before
    return g, moves


@functools.partial(jax.jit, static_argnames="block")
def _starts(block: Block, w: Params, x: Float[Array, "W T D"]) -> list[Float[Array, "W T D"]]:
    """The stream before every sub-block."""
    w, starts = _wide(w), [x]
    for sub in block.sub_blocks[:-1]:
        starts.append(sub(w, starts[-1]))
    return starts


@functools.partial(jax.jit, static_argnames="sub")
def _through_sub_block(
    sub: SubBlock, w: Params, x: Float[Array, "W T D"], g: Float[Array, "P W T D"]
) -> tuple[Float[Array, "P W T D"], dict[str, Float[Array, "P N O"]], dict[str, Float[Array, "N I"]]]:
    """The gradients before a sub-block from those after it; by name, those at the outputs of matrices behind which
    tokens do not meet, and what its matrices read."""
    w = _wide(w)
    apart = [weight for weight in sub.weights if weight.kind == "matrix" and (weight.writes or not sub.mixes)]

    def run(
        x: Float[Array, "W T D"], added: dict[str, jax.Array]
    ) -> tuple[Float[Array, "W T D"], dict[str, jax.Array]]:
        seen = {}

        def tap(name: str, a: jax.Array) -> jax.Array:
            seen[name] = a
            return a

        return sub(_with_outputs(w, added), x, tap), seen

    added = {weight.name: jnp.zeros((*x.shape[:2], weight.shape[0])) for weight in apart}
    _, pull, seen = jax.vjp(run, x, added, has_aux=True)
    before, outputs = jax.vmap(pull)(g)
    outputs = {name: output.reshape(len(g), -1, output.shape[-1]) for name, output in outputs.items()}
    return before, outputs, {a.name: seen[a.name].reshape(-1, a.width) for a in sub.activations}


@functools.partial(jax.jit, static_argnames=("sub", "name"))
def _pushed_moves(
    sub: SubBlock,
    w: Params,
    x: Float[Array, "W T D"],
    g: Float[Array, "P W T D"],
    changes: Float[Array, "A N O"],
    name: str,
) -> Float[Array, "A P N"]:
    """g · δh of every change δy of what the matrix `name` makes, where δh is what that changes after the sub-block."""
    w, changes = _wide(w), changes.reshape(len(changes), *x.shape[:2], -1)
    _, push = jax.linearize(lambda output: sub(_with_outputs(w, {name: output}), x), jnp.zeros_like(changes[0]))
    moved = jax.lax.map(lambda change: jnp.einsum("PWTD,WTD->PWT", g, push(change)), changes)
    return moved.reshape(*moved.shape[:2], x[..., 0].size)


def _with_outputs(w: Params, added: Mapping[str, Float[Array, "W T O"]]) -> Params:
    """A block's tensors with something added to the outputs of its matrices: a bias for every token."""
    changed = {}
    for name, output in added.items():
        module = name.removesuffix(".weight")
        bias = w[module].get("bias", jnp.zeros(output.shape[-1]))
        changed[f"{module}.bias"] = jnp.broadcast_to(bias, output.shape) + output
    return replace_in_block(w, changed)

"""The sensitivity table from one backward pass: a second-order estimate of every tensor at every level.

Near the model, KL(p ‖ p') = ½ δzᵀ F δz with the change δz of a token's logits and F = diag(p) − p pᵀ; there is no
first-order part, since a model is the minimum of its own divergence (Schraudolph 2002). Probes r with E[r rᵀ] = F make
it a squared inner product, E[(r · δz)²] = δzᵀ F δz (Hutchinson 1990), and one backward pass from r gives the gradient
g of Σ_t r_t · z_t at every layer. What a quantized tensor changes in the stream after its sub-block is linear in
the change of its weights, δh = J δW, and costs ½ Σ_u (g_u · δh_u)², summed token by token: the square of the sum over
tokens less the products of different tokens, which are small on average and very noisy.

Memory beside the weights: hidden states of all layers lie on the host, L · W · T · D f32; the device holds A changes
of the embedding, the head and one layer's tensors, and (P + 3A) · W · T · F f32 of one layer's activations with A
levels and P probes.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ramp_jax import sweep
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable, lookup, tensors
from ramp_jax.models.decoder import Params, embed, final_norm, output_head
from ramp_jax.models.layers import matmul, soft_cap
from ramp_jax.models.layout import Block, SubBlock, of_block, replace_in_block
from ramp_jax.quantization import REFERENCE, Encoder, decoded
from ramp_jax.scoring.perplexity import Protocol, first_scored
from ramp_jax.sensitivity.exact import Cell, cells
from ramp_jax.sensitivity.table import Sensitivity, fingerprint

PROBES = 4

_ROWS_AT_ONCE = 64  # scored tokens whose logits exist at one time


def fisher_sensitivity(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float, ...],
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
    method = f"fisher, {probes} probes of seed {seed}"
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


Changes = Callable[[Tensor], Float[Array, "A O I"]]


def rounding_errors(model: Model, every: list[Cell], encoder: Encoder) -> Changes:
    """What rounding changes in a tensor, for each of its cells among `every`."""

    def changes(tensor: Tensor) -> Float[Array, "A O I"]:
        w = lookup(model.params, tensor).astype(jnp.float32)
        formats = [cell.format.name for cell in cells_of(every, tensor)]
        new = jnp.zeros((len(formats), *tensor.shape))
        for i, fmt in enumerate(formats):
            new = _with_change(new, i, decoded(model, tensor, fmt, encoder).astype(jnp.float32), w)
        return new

    return changes


@functools.partial(jax.jit, donate_argnums=0)
def _with_change(
    changes: Float[Array, "A O I"], at: int, new: Float[Array, "O I"], w: Float[Array, "O I"]
) -> Float[Array, "A O I"]:
    """In place, so that an embedding's changes do not lie in memory twice."""
    return changes.at[at].set(new - w)


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
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "A S"]]:
    """How far each of `changes(tensor)` moves every sample (a probe at a token), by name of the allocatable tensors.

    Several changes together move a sample by the sum of their moves; half the sum of the squares is what they cost,
    in nats per scored token. Forward to the last block, then back, block by block; `changes` is asked for one block's
    tensors at a time.
    """
    spec, params = model.spec, model.params
    start = first_scored(protocol, windows.shape[1])
    members = {tensor.name: tensor for tensor in allocatable(spec)}
    embedding, head = tensors(spec)[0].name, tensors(spec)[0 if spec.tied else -1].name
    with jax.default_matmul_precision("default"):
        state, states = embed(spec, params, windows), []
        for at in sweep.forward(spec, params):
            states.append(np.asarray(state))
            state = sweep.advance(at, state)
        outside = {name: changes(tensor) for name, tensor in members.items() if tensor.layer is None}
        of_head = {name: change for name, change in outside.items() if name == head}
        ends = {name: params[name] for name in params if name != "blk"}
        g, moves = _from_head(spec, ends, state, of_head, jax.random.key(seed), probes, start)
        for at in sweep.backward(spec, params, "estimating sensitivity"):
            names = [weight.name for weight in at.block.weights if at.full(weight.name) in members]
            new = {name: changes(members[at.full(name)]) for name in names}
            g, moved = _through_block(at.block, at.weights, states.pop(), g, new)
            moves |= {at.full(name): value for name, value in moved.items()}
        if embedding in outside:
            looked_up = outside[embedding][:, windows] * spec.embedding_scale
            tied = moves.get(embedding, 0.0)  # as a head, where it is one
            moves[embedding] = tied + jnp.einsum("PWTD,AWTD->APWT", g, looked_up)
    scored = windows.shape[0] * (windows.shape[1] - 1 - start)
    scale = np.float32(1 / np.sqrt(probes * scored))
    samples = probes * windows.size
    return {name: np.asarray(moves[name]).reshape(-1, samples) * scale for name in members}


@functools.partial(jax.jit, static_argnames=("spec", "probes", "start"))
def _from_head(
    spec: DecoderSpec,
    params: Params,
    state: Float[Array, "W T D"],
    changes: dict[str, Float[Array, "A V D"]],
    key: Key[Array, ""],
    probes: int,
    start: int,
) -> tuple[Float[Array, "P W T D"], dict[str, Float[Array, "A P W T"]]]:
    """Gradients of r · z at the last layer's output, and r · δz of the head's changes, by name.

    Both are 0 where no token is scored. r = e − p Σ e with e = √p ∘ ε and random signs ε has E[r rᵀ] = diag(p) − p pᵀ.
    """
    head = output_head(spec, params)
    normed, pull = jax.vjp(functools.partial(final_norm, spec, params), state)

    def one_token(inputs: tuple[jax.Array, jax.Array]) -> tuple[Float[Array, "P D"], dict[str, Float[Array, "A P"]]]:
        x, key = inputs
        logits, uncap = jax.vjp(lambda z: soft_cap(z, head.cap), matmul(x, head.weight))
        p = jax.nn.softmax(logits)
        signed = jnp.sqrt(p)[None] * jax.random.rademacher(key, (probes, p.size), jnp.float32)
        r = signed - p[None] * jnp.sum(signed, axis=1, keepdims=True)
        (r,) = jax.vmap(uncap)(r)
        moved = {name: jnp.einsum("PV,AV->AP", r, jnp.einsum("AVD,D->AV", c, x)) for name, c in changes.items()}
        return matmul(r, head.weight.T), moved

    def by_window(moved: Float[Array, "W*S A P"]) -> Float[Array, "A P W T"]:
        return jnp.pad(moved.reshape(state.shape[0], -1, *moved.shape[1:]).transpose(2, 3, 0, 1), ((0, 0), *outside))

    scored = normed[:, start:-1].reshape(-1, normed.shape[-1])
    keys = jax.random.split(key, scored.shape[0])
    batches = -(-scored.shape[0] // _ROWS_AT_ONCE)  # of equal size: a shorter one would be compiled on its own
    g, moves = jax.lax.map(one_token, (scored, keys), batch_size=-(-scored.shape[0] // batches))
    outside = ((0, 0), (0, 0), (start, 1))
    g = g.reshape(state.shape[0], -1, probes, state.shape[-1]).transpose(2, 0, 1, 3)
    (g,) = jax.vmap(pull)(jnp.pad(g, (*outside, (0, 0))))
    return g, {name: by_window(moved) for name, moved in moves.items()}


@functools.partial(jax.jit, static_argnames="block")
def _through_block(
    block: Block,
    w: Params,
    x: Float[Array, "W T D"],
    g: Float[Array, "P W T D"],
    changes: dict[str, Float[Array, "A O I"]],
) -> tuple[Float[Array, "P W T D"], dict[str, Float[Array, "A P W T"]]]:
    """The gradients before a block from those after it, and g · δh of every change, of the stream after its sub-block.

    One compilation per kind of block.
    """
    starts, pulls = [], []
    for sub in block.sub_blocks:
        starts.append(x)
        x, pull = jax.vjp(functools.partial(sub, w), x)
        pulls.append(pull)
    moves = {}
    for sub, before, pull in reversed(list(zip(block.sub_blocks, starts, pulls, strict=True))):
        for weight in sub.weights:
            if weight.name in changes:
                moves[weight.name] = _moves(sub, w, weight.name, before, g, changes[weight.name])
        (g,) = jax.vmap(pull)(g)
    return g, moves


def _moves(
    sub: SubBlock,
    w: Params,
    name: str,
    x: Float[Array, "W T D"],
    g: Float[Array, "P W T D"],
    changes: Float[Array, "A O I"],
) -> Float[Array, "A P W T"]:
    """g · δh of changes of one matrix, of the stream after its sub-block."""
    _, push = jax.linearize(lambda matrix: sub(replace_in_block(w, {name: matrix}), x), of_block(w, name))

    def one(change: Float[Array, "O I"]) -> Float[Array, "P W T"]:
        return jnp.einsum("PWTD,WTD->PWT", g, push(change.astype(of_block(w, name).dtype)))

    return jax.lax.map(one, changes)

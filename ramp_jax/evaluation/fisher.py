"""The sensitivity table from one backward pass: a second-order estimate of every tensor at every level.

Near the model, KL(p ‖ p') = ½ δzᵀ F δz with the change δz of a token's logits and F = diag(p) − p pᵀ; there is no
first-order part, since a model is the minimum of its own divergence (Schraudolph 2002). Probes r with E[r rᵀ] = F make
it a squared inner product, E[(r · δz)²] = δzᵀ F δz (Hutchinson 1990), and one backward pass from r gives the gradient
g of Σ_t r_t · z_t at every layer. What a quantized tensor changes in the stream after its half of a layer is linear in
the change of its weights, δh = J δW, and costs ½ Σ_u (g_u · δh_u)², summed token by token: the square of the sum over
tokens less the products of different tokens, which are small on average and very noisy.

Memory beside the weights: hidden states of all layers lie on the host, L · W · T · D f32; the device holds A changes
of the embedding, the head and one layer's tensors, and (P + 3A) · W · T · F f32 of one layer's activations with A
levels and P probes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ramp_jax.evaluation.perplexity import Protocol, first_scored
from ramp_jax.evaluation.sensitivity import Cell, cells
from ramp_jax.evaluation.table import Sensitivity, fingerprint
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable, lookup
from ramp_jax.models.decoder import Params, block_forward, embed, head_weights, layer_params, matmul, rms_norm
from ramp_jax.models.names import LINEARS, block_shapes
from ramp_jax.progress import track
from ramp_jax.quantization import REFERENCE, Encoder, decoded

PROBES = 4

Place = tuple[str, int | None]  # key and layer of a tensor

_ROWS_AT_ONCE = 64  # scored tokens whose logits exist at one time
# half of a layer: sizes of a layer without the other half
_SILENT = {"attn": {"d_ff": 1}, "ffn": {"n_heads": 1, "n_kv_heads": 1, "head_size": 2}}


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
    """How far each of `changes(tensor)` moves every sample (a probe at a token), by tensor name.

    Several changes together move a sample by the sum of their moves; half the sum of the squares is what they cost,
    in nats per scored token. Forward to the last layer, then back, layer by layer; `changes` is asked for one layer's
    tensors at a time.
    """
    spec, params = model.spec, model.params
    start = first_scored(protocol, windows.shape[1])
    at = {(tensor.key, tensor.layer): tensor for tensor in allocatable(spec)}
    moves: dict[Place, Float[Array, "A P W T"]] = {}
    with jax.default_matmul_precision("default"):
        state, states = embed(spec, params["token_embd"], windows), []
        for layer in range(spec.n_layers):
            states.append(np.asarray(state))
            state = block_forward(spec, layer_params(params, layer), state)
        embedding = changes(at["token_embd", None])
        head = embedding if spec.tied else changes(at["output", None])
        g, moves["output", None] = _from_head(spec, params, state, head, jax.random.key(seed), probes, start)
        for layer in track(range(spec.n_layers - 1, -1, -1), "estimating sensitivity", "layer"):
            new = {key: changes(at[key, layer]) for key in LINEARS}
            g, moved = _through_layer(spec, layer_params(params, layer), states[layer], g, new)
            moves |= {(key, layer): value for key, value in moved.items()}
        looked_up = embedding[:, windows] * spec.embedding_scale
        moves["token_embd", None] = jnp.einsum("PWTD,AWTD->APWT", g, looked_up)
    if spec.tied:
        moves["token_embd", None] += moves.pop(("output", None))
    scored = windows.shape[0] * (windows.shape[1] - 1 - start)
    scale = np.float32(1 / np.sqrt(probes * scored))
    samples = probes * windows.size
    return {at[place].name: np.asarray(values).reshape(-1, samples) * scale for place, values in moves.items()}


@functools.partial(jax.jit, static_argnames=("spec", "probes", "start"))
def _from_head(
    spec: DecoderSpec,
    params: Params,
    state: Float[Array, "W T D"],
    changes: Float[Array, "A V D"],
    key: Key[Array, ""],
    probes: int,
    start: int,
) -> tuple[Float[Array, "P W T D"], Float[Array, "A P W T"]]:
    """Gradients of r · z at the last layer's output, and r · δz of the head's changes; 0 where no token is scored.

    r = e − p Σ e with e = √p ∘ ε and random signs ε has E[r rᵀ] = diag(p) − p pᵀ.
    """
    head = head_weights(params)
    normed, pull = jax.vjp(lambda x: rms_norm(x, params["output_norm"], spec.norm_eps), state)

    def one_token(inputs: tuple[jax.Array, jax.Array]) -> tuple[Float[Array, "P D"], Float[Array, "A P"]]:
        x, key = inputs
        p = jax.nn.softmax(matmul(x, head))
        signed = jnp.sqrt(p)[None] * jax.random.rademacher(key, (probes, p.size), jnp.float32)
        r = signed - p[None] * jnp.sum(signed, axis=1, keepdims=True)
        return matmul(r, head.T), jnp.einsum("PV,AV->AP", r, jnp.einsum("AVD,D->AV", changes, x))

    scored = normed[:, start:-1].reshape(-1, normed.shape[-1])
    keys = jax.random.split(key, scored.shape[0])
    batches = -(-scored.shape[0] // _ROWS_AT_ONCE)  # of equal size: a shorter one would be compiled on its own
    g, moves = jax.lax.map(one_token, (scored, keys), batch_size=-(-scored.shape[0] // batches))
    outside = ((0, 0), (0, 0), (start, 1))
    g = g.reshape(state.shape[0], -1, probes, state.shape[-1]).transpose(2, 0, 1, 3)
    moves = moves.reshape(state.shape[0], -1, *moves.shape[1:]).transpose(2, 3, 0, 1)
    (g,) = jax.vmap(pull)(jnp.pad(g, (*outside, (0, 0))))
    return g, jnp.pad(moves, ((0, 0), *outside))


@functools.partial(jax.jit, static_argnames="spec")
def _through_layer(
    spec: DecoderSpec,
    layer: Params,
    x: Float[Array, "W T D"],
    g: Float[Array, "P W T D"],
    changes: dict[str, Float[Array, "A O I"]],
) -> tuple[Float[Array, "P W T D"], dict[str, Float[Array, "A P W T"]]]:
    """The gradients before a layer from those after it, and g · δh of every change; one compilation for all layers."""
    middle, pull_attn = jax.vjp(lambda x: _half(spec, layer, "attn", x), x)
    _, pull_ffn = jax.vjp(lambda x: _half(spec, layer, "ffn", x), middle)
    (g_middle,) = jax.vmap(pull_ffn)(g)
    (g_before,) = jax.vmap(pull_attn)(g_middle)
    ends = {"attn": (x, g_middle), "ffn": (middle, g)}

    def moves(key: str) -> Float[Array, "A P W T"]:
        half = key.split("_")[0]
        before, gradient = ends[half]

        _, push = jax.linearize(lambda w: _half(spec, layer | {key: w}, half, before), layer[key])

        def one(change: Float[Array, "O I"]) -> Float[Array, "P W T"]:
            return jnp.einsum("PWTD,WTD->PWT", gradient, push(change.astype(layer[key].dtype)))

        return jax.lax.map(one, changes[key])

    return g_before, {key: moves(key) for key in changes}


def _half(spec: DecoderSpec, layer: Params, half: str, x: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
    """The stream after one half of a layer: a layer whose other half is as small as can be and writes nothing."""
    only = dataclasses.replace(spec, **_SILENT[half])
    silent = {key: jnp.zeros(new, x.dtype) for key, new in block_shapes(only).items() if new != layer[key].shape}
    return block_forward(only, layer | silent, x)

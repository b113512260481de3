"""Pretraining of small decoders: a pure train step, several of them per call, and a loop that resumes.

AdamW (Loshchilov & Hutter 2019) on f32 weights under a cosine schedule with warm-up; matrix products take their
operands in bf16 and accumulate in f32. What a step sees depends on the seed and the step's number alone, so a run that
was stopped goes on to the same bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from ramp_jax import checkpoint
from ramp_jax.models import DecoderSpec
from ramp_jax.models.decoder import Params, cast_weights, output_head, scanned_hidden_states
from ramp_jax.models.layout import Tensor, Weight, nest, tensors
from ramp_jax.progress import track
from ramp_jax.schema import Count, NotNegative, Positive, within

_LOGIT_ROWS = 1024  # tokens whose logits exist at one time
_HEAD_STD = 0.02


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`steps` of `batch_size` windows; the learning rate rises over `warmup` steps and falls to a tenth.

    A call runs `steps_per_call` of them, and every `calls_per_checkpoint` calls the state is saved. Embeddings start
    with the standard deviation `embedding_std`.
    """

    steps: Count = 1000
    batch_size: Count = 4
    learning_rate: Positive = 3e-3
    warmup: Annotated[int, within(0, 2**31 - 1)] = 50
    weight_decay: NotNegative = 0.1
    clip_norm: Positive = 1.0
    embedding_std: Positive = 0.02
    steps_per_call: Count = 5
    calls_per_checkpoint: Count = 10


class State(NamedTuple):
    """All that a run is made of between two steps."""

    params: Params
    optimizer: optax.OptState
    key: Key[Array, ""]
    step: Int[Array, ""]


def init_params(key: Key[Array, ""], spec: DecoderSpec, embedding_std: float = 0.02) -> Params:
    """Normal weights, f32: matrices with variance 1 / in, those that write to the stream 1 / (2 L in); gains are 1."""
    members = sorted(tensors(spec), key=lambda tensor: tensor.layer is not None)  # those outside the blocks first
    alike: dict[Weight, list[Tensor]] = {}
    for tensor in members:
        alike.setdefault(tensor.weight, []).append(tensor)
    outside = {"token_embd.weight": embedding_std, "output.weight": _HEAD_STD}

    def draw(i: int, weight: Weight, count: int) -> Float[Array, "..."]:
        if weight.kind in ("gain", "bias"):
            return jnp.full((count, *weight.shape), float(weight.kind == "gain"), jnp.float32)
        std = outside.get(weight.name, weight.shape[-1] ** -0.5)
        if weight.writes:
            std *= (2 * len(spec.blocks)) ** -0.5
        return std * jax.random.normal(jax.random.fold_in(key, i), (count, *weight.shape), jnp.float32)

    values = [(group, draw(i, weight, len(group))) for i, (weight, group) in enumerate(alike.items())]
    return nest((tensor, value[i]) for group, value in values for i, tensor in enumerate(group))


def loss(spec: DecoderSpec, params: Params, ids: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean negative log-likelihood in nats of every token but the first, products in bf16."""
    low = cast_weights(spec, params, jnp.bfloat16)
    head = output_head(spec, low)
    hidden = scanned_hidden_states(spec, low, ids[:, :-1]).reshape(-1, spec.d_model)
    targets = ids[:, 1:].reshape(-1)
    rows = min(_LOGIT_ROWS, len(targets))
    padding = -len(targets) % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, spec.d_model)
    padded = jnp.pad(targets, (0, padding), constant_values=-1).reshape(-1, rows)

    @jax.checkpoint
    def chunk(inputs: tuple[Float[Array, "C D"], Int[Array, " C"]]) -> Float[Array, ""]:
        x, wanted = inputs
        nll = optax.softmax_cross_entropy_with_integer_labels(head(x), jnp.maximum(wanted, 0))
        return jnp.sum(jnp.where(wanted >= 0, nll, 0.0))

    return jnp.sum(jax.lax.map(chunk, (hidden, padded))) / len(targets)


def optimizer(spec: DecoderSpec, config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient norm; gains and biases do not decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, max(config.steps, config.warmup + 1), config.learning_rate / 10
    )

    def decays(params: Params) -> Any:
        del params
        return nest((tensor, tensor.is_matrix) for tensor in tensors(spec))

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decays),
    )


def begin(key: Key[Array, ""], spec: DecoderSpec, config: OptimizerConfig) -> State:
    """The state before the first step."""
    key_params, key_data = jax.random.split(key)
    params = init_params(key_params, spec, config.embedding_std)
    return State(params, optimizer(spec, config).init(params), key_data, jnp.int32(0))


def batch(key: Key[Array, ""], step: Int[Array, ""], windows: Int[Array, "W T+1"], size: int) -> Int[Array, "size T+1"]:
    """The windows of a step: every epoch is another permutation of all of them, the rest of a division left out."""
    per_epoch = len(windows) // size
    order = jax.random.permutation(jax.random.fold_in(key, step // per_epoch), len(windows))
    return windows[jax.lax.dynamic_slice_in_dim(order, step % per_epoch * size, size)]


@functools.partial(jax.jit, static_argnames=("spec", "config", "count"), donate_argnames="state")
def train_steps(
    spec: DecoderSpec, config: OptimizerConfig, state: State, windows: Int[Array, "W T+1"], count: int
) -> tuple[State, Float[Array, " count"]]:
    """`count` steps and the loss of each before its update."""

    def one(state: State, _: None) -> tuple[State, Float[Array, ""]]:
        ids = batch(state.key, state.step, windows, config.batch_size)
        value, gradient = jax.value_and_grad(loss, argnums=1)(spec, state.params, ids)
        updates, opt_state = optimizer(spec, config).update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state, state.key, state.step + 1), value

    return jax.lax.scan(one, state, length=count)


def run(
    key: Key[Array, ""],
    spec: DecoderSpec,
    config: OptimizerConfig,
    windows: Int[np.ndarray, "W T+1"],
    *,
    log: Callable[[dict[str, float]], None] = lambda _: None,
    checkpoint_path: Path | None = None,
) -> Params:
    """Trained parameters, f32; `log` gets the mean loss of every call.

    With `checkpoint_path` the state is saved there now and then, and a run that finds one goes on. Raises `ValueError`
    where the text is too short for one batch, the checkpoint is another run's, or the loss is not finite.
    """
    if len(windows) < config.batch_size:
        raise ValueError(
            f"the text holds {len(windows)} windows of {windows.shape[1]} tokens, fewer than a batch of "
            f"{config.batch_size}; pass a longer text or a smaller batch."
        )
    state = begin(key, spec, config)
    if checkpoint_path is not None and checkpoint_path.exists():
        state = checkpoint.load(checkpoint_path, state)
    on_device = jnp.asarray(windows)
    done = int(state.step)
    starts = range(done, config.steps, config.steps_per_call)
    for i, start in enumerate(track(starts, "pretraining", f"{config.steps_per_call} steps")):
        count = min(config.steps_per_call, config.steps - start)
        state, losses = train_steps(spec, config, state, on_device, count)
        value = float(jnp.mean(losses))
        if not np.isfinite(value):
            raise ValueError(f"the loss is not finite after step {start + count}; lower the learning rate.")
        log({"step": start + count, "loss": value})
        last = start + count == config.steps
        if checkpoint_path is not None and (last or (i + 1) % config.calls_per_checkpoint == 0):
            checkpoint.save(checkpoint_path, state)
    return state.params

"""Negative log-likelihood, perplexity and KL divergence over token windows.

Protocols: `llama.cpp` scores the second half of each window, as llama-perplexity does (context 512 by default);
`sliding` scores every token but the first, as papers do (context 2,048). The two are not comparable. All losses are
in nats per token.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Params, head_weights, hidden_states, matmul
from ramp_jax.progress import track

Protocol = Literal["llama.cpp", "sliding"]

_HEAD_CHUNK = 128  # tokens whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Losses of the scored tokens, in text order; `kld` per token against the reference, None without one."""

    nll: Float[np.ndarray, " tokens"]
    kld: Float[np.ndarray, " tokens"] | None = None

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return float(self.nll.mean(dtype=np.float64))

    @property
    def ppl(self) -> float:
        """Perplexity, exp of the mean loss."""
        return math.exp(self.mean_nll)

    @property
    def ppl_stderr(self) -> float:
        """Standard error of the perplexity, tokens taken as independent."""
        return self.ppl * float(self.nll.std(dtype=np.float64)) / math.sqrt(self.nll.size)

    @property
    def mean_kld(self) -> float | None:
        """Nats per token."""
        return None if self.kld is None else float(self.kld.mean(dtype=np.float64))


def first_scored(protocol: Protocol, context: int) -> int:
    """The first position of a window whose prediction of the next token counts."""
    return context // 2 if protocol == "llama.cpp" else 0


class Reference(NamedTuple):
    """What a model predicts at the scored tokens: normed hidden states, and the head that turns them into logits."""

    hidden: Float[np.ndarray, "W S D"]
    head: Float[Array, "V D"]


def reference_of(model: Model, windows: Int[np.ndarray, "W T"], protocol: Protocol = "llama.cpp") -> Reference:
    """The model's predictions, computed once for any number of comparisons on the same windows and protocol."""
    start = first_scored(protocol, windows.shape[1])
    bar = track(windows, "running the reference", "window")
    hidden = [np.asarray(_scored_hidden(model.spec, model.params, window[None], start)) for window in bar]
    return Reference(np.stack(hidden), head_weights(model.params))


def evaluate_reference(
    reference: Reference, windows: Int[np.ndarray, "W T"], protocol: Protocol = "llama.cpp"
) -> Evaluation:
    """What `evaluate` finds for the reference itself, from its hidden states alone; the divergence is 0."""
    start = first_scored(protocol, windows.shape[1])
    pairs = zip(reference.hidden, windows, strict=True)
    nll = [head_losses(x, reference.head, ids[start + 1 :], None, None)[0] for x, ids in pairs]
    together = np.concatenate([np.asarray(losses) for losses in nll])
    return Evaluation(together, np.zeros_like(together))


def evaluate(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    *,
    params: Params | None = None,
    reference: Model | Reference | None = None,
    protocol: Protocol = "llama.cpp",
    doing: str = "evaluating",
) -> Evaluation:
    """Score `params` (default: the model's own) on the windows, one window at a time.

    With `reference`, also the KL divergence of its next-token distributions from the scored ones. Only one chunk of
    logits is held in memory. Raises `ValueError` where the loss is not finite.
    """
    start = first_scored(protocol, windows.shape[1])
    params = model.params if params is None else params
    if isinstance(reference, Model):
        reference = reference_of(reference, windows, protocol)
    nll, kld = [], []
    for i, window in enumerate(track(windows, doing, "window")):
        x = _scored_hidden(model.spec, params, window[None], start)
        ref_x, ref_head = (None, None) if reference is None else (reference.hidden[i], reference.head)
        losses, divergences = head_losses(x, head_weights(params), window[start + 1 :], ref_x, ref_head)
        if not all(np.isfinite(values).all() for values in jax.tree.leaves((losses, divergences))):
            raise ValueError(f"the loss of window {i} is not finite; load the models with dtype=float32.")
        nll.append(np.asarray(losses))
        kld.append(divergences)
    together = None if reference is None else np.concatenate([np.asarray(k) for k in kld])
    return Evaluation(np.concatenate(nll), together)


def token_losses(
    logits: Float[Array, "T V"], targets: Int[Array, " T"], ref_logits: Float[Array, "T V"] | None
) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
    """Per token: −log p(target) and, with a reference, KL(p_ref ‖ p)."""
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    if ref_logits is None:
        return nll, None
    log_ref = jax.nn.log_softmax(ref_logits)
    return nll, jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)


@jax.jit
def head_losses(
    x: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    ref_x: Float[Array, "T D"] | None,
    ref_head: Float[Array, "V D"] | None,
) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
    """Per token: −log p(target) and, with a reference, KL(p_ref ‖ p); only one chunk of logits exists at a time."""

    def one_chunk(chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        hidden, target, ref_hidden = chunk
        return token_losses(matmul(hidden, head), target, None if ref_hidden is None else matmul(ref_hidden, ref_head))

    losses = jax.lax.map(one_chunk, jax.tree.map(_chunked, (x, targets, ref_x)))
    return jax.tree.map(lambda a: a.reshape(-1)[: x.shape[0]], losses)


@jax.jit
def mean_divergences(
    x: Float[Array, "K T D"], head: Float[Array, "V D"], ref_x: Float[Array, "T D"], ref_head: Float[Array, "V D"]
) -> Float[Array, " K"]:
    """Mean KL(p_ref ‖ p) of K variants' hidden states under one head; the reference's logits are computed once.

    Tokens go in equal chunks of up to `_HEAD_CHUNK`, and the sum over the vocabulary has no first-order part that
    would have to cancel, so divergences far below the precision of f32 logits keep their digits.
    """
    tokens = ref_x.shape[0]
    chunks = -(-tokens // _HEAD_CHUNK)
    size = -(-tokens // chunks)

    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> Float[Array, "K T"]:
        hidden, ref_hidden = chunk
        log_ref = jax.nn.log_softmax(matmul(ref_hidden, ref_head))
        p_ref = jnp.exp(log_ref)

        def one_variant(hidden: Float[Array, "T D"]) -> Float[Array, " T"]:
            return divergence(p_ref, log_ref, jax.nn.log_softmax(matmul(hidden, head)))

        return jax.lax.map(one_variant, hidden.swapaxes(0, 1))

    divergences = jax.lax.map(one_chunk, (_chunked(x.swapaxes(0, 1), size), _chunked(ref_x, size)))  # [chunks, K, T]
    return jnp.mean(divergences.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :tokens], axis=1)


def divergence(p: Float[Array, "T V"], log_p: Float[Array, "T V"], log_q: Float[Array, "T V"]) -> Float[Array, " T"]:
    """KL(p ‖ q) as Σ p · (eᵈ − 1 − d), d = log q − log p: the same sum, since Σ q = Σ p, but of terms that are all ≥ 0.

    Small d go through the series, where eᵈ − 1 − d would cancel; large ones through q, where eᵈ could overflow.
    """
    d = log_q - log_p
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return jnp.sum(jnp.where(jnp.abs(d) < 0.25, p * series, jnp.exp(log_q) - p * (1 + d)), axis=-1)


def _chunked(a: jax.Array, size: int = _HEAD_CHUNK) -> jax.Array:
    """`[T, ...]` → `[chunks, size, ...]`, padded with zeros."""
    padding = -a.shape[0] % size
    padded = jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
    return padded.reshape(-1, size, *a.shape[1:])


@functools.partial(jax.jit, static_argnames=("spec", "start"))
def _scored_hidden(spec: DecoderSpec, params: Params, ids: Int[Array, "1 T"], start: int) -> Float[Array, "S D"]:
    return hidden_states(spec, params, ids)[0, start:-1]

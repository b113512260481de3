"""Negative log-likelihood, perplexity and KL divergence over token windows.

Protocols: `llama.cpp` scores the second half of each window, as llama-perplexity does (context 512 by default);
`sliding` scores every token but the first, as papers do (context 2,048). The two are not comparable. All losses are
in nats per token.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ramp_jax import devices, sweep
from ramp_jax.models import DecoderSpec, Model
from ramp_jax.models.decoder import Head, Params, final_norm, output_head
from ramp_jax.models.store import StoredParams
from ramp_jax.progress import track
from ramp_jax.scoring.diagnose import check_windows, explain
from ramp_jax.scoring.scores import Evaluation

Protocol = Literal["llama.cpp", "sliding"]

_HEAD_CHUNK = 128  # tokens whose logits exist at one time
_NUMBERS_AT_ONCE = 1 << 25  # of hidden states that travel over the blocks together


def first_scored(protocol: Protocol, context: int) -> int:
    """The first position of a window whose prediction of the next token counts."""
    return context // 2 if protocol == "llama.cpp" else 0


class Reference(NamedTuple):
    """What a model predicts at the scored tokens: normed hidden states per window, and the head that makes logits.

    Where there is no model, both are None.
    """

    hidden: Iterable[Float[Array, "S D"] | None]
    head: Head | None


def reference_of(model: Model, windows: Int[np.ndarray, "W T"], protocol: Protocol = "llama.cpp") -> Reference:
    """The model's predictions, computed once for any number of comparisons on the same windows and protocol.

    Raises `ValueError` where they are not finite.
    """
    running = _running(model, windows, first_scored(protocol, windows.shape[1]))
    bar = track(range(len(windows)), "running the reference", "window")
    return running._replace(hidden=[np.asarray(hidden) for _, hidden in zip(bar, running.hidden, strict=True)])


def predictions(
    reference: Model | Reference | None, windows: Int[np.ndarray, "W T"], vocab_size: int, protocol: Protocol
) -> Reference:
    """The reference beside a model of `vocab_size` tokens; one that has not run yet runs as it is read.

    Without a reference its hidden states and head are None. Raises `ValueError` for a token outside of the vocabulary,
    or a reference with another one.
    """
    check_windows(windows, vocab_size)
    if reference is None:
        return Reference(itertools.repeat(None, len(windows)), None)
    if isinstance(reference, Model):
        reference = _running(reference, windows, first_scored(protocol, windows.shape[1]))
    if (known := len(reference.head.weight)) != vocab_size:
        raise ValueError(
            f"the reference predicts {known} tokens and the model {vocab_size}; compare models of one vocabulary."
        )
    return reference


def _running(model: Model, windows: Int[np.ndarray, "W T"], start: int) -> Reference:
    """A reference whose hidden states are computed as they are read."""
    check_windows(windows, model.spec.vocab_size)
    head = output_head(model.spec, model.params)

    def checked() -> Iterator[Float[Array, "S D"]]:
        whole = bool(head.finite())
        states = _window_hidden(model.spec, model.params, windows, start, "running the reference")
        for i, hidden in enumerate(states):
            if not (whole and jnp.isfinite(hidden).all()):
                cause = explain(model.spec, model.params, windows[i])
                raise ValueError(f"what the reference predicts in window {i} is not finite, {cause}.")
            yield hidden

    return Reference(checked(), head)


def evaluate(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    *,
    params: Params | None = None,
    reference: Model | Reference | None = None,
    protocol: Protocol = "llama.cpp",
    doing: str = "evaluating",
) -> Evaluation:
    """Score `params` (default: the model's own) on the windows.

    With `reference`, also how its next-token distributions differ from the scored ones. Only one chunk of logits is
    held in memory. Raises `ValueError` where the loss is not finite, naming where that began.
    """
    start = first_scored(protocol, windows.shape[1])
    params = model.params if params is None else params
    beside = predictions(reference, windows, model.spec.vocab_size, protocol)
    head, scores = output_head(model.spec, params), []
    states = _window_hidden(model.spec, params, windows, start, doing)
    items = ((x, window[start + 1 :], ref_x) for x, window, ref_x in zip(states, windows, beside.hidden, strict=True))
    found = devices.each(_window_scores, items, head, beside.head)
    for i, (window, one) in enumerate(zip(track(windows, doing, "window"), found, strict=True)):
        if not np.isfinite(one.nll).all():
            raise ValueError(f"the loss of window {i} is not finite, {explain(model.spec, params, window)}.")
        scores.append(one)
    return joined(scores)


class TokenScores(NamedTuple):
    """`Evaluation` of some tokens, on the device."""

    nll: Float[Array, " T"]
    kld: Float[Array, " T"] | None = None
    ref_nll: Float[Array, " T"] | None = None
    same_top: Bool[Array, " T"] | None = None


def joined(scores: Sequence[TokenScores]) -> Evaluation:
    """All tokens in one."""
    columns = zip(*scores, strict=True)
    return Evaluation(*(None if parts[0] is None else np.concatenate(parts) for parts in columns))


def token_scores(
    logits: Float[Array, "V T"], targets: Int[Array, " T"], ref_logits: Float[Array, "V T"] | None
) -> TokenScores:
    """Scores of the logits against the true tokens and, if given, against the reference's logits."""
    log_p = jax.nn.log_softmax(logits, axis=0)
    nll = -jnp.take_along_axis(log_p, targets[None], axis=0)[0]
    if ref_logits is None:
        return TokenScores(nll)
    log_ref = jax.nn.log_softmax(ref_logits, axis=0)
    kld = jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=0)
    ref_nll = -jnp.take_along_axis(log_ref, targets[None], axis=0)[0]
    likeliest = (a == jnp.max(a, axis=0, keepdims=True) for a in (log_p, log_ref))
    return TokenScores(nll, kld, ref_nll, same_top=jnp.any(jnp.logical_and(*likeliest), axis=0))


def _window_scores(
    x: Float[Array, "T D"],
    targets: Int[Array, " T"],
    ref_x: Float[Array, "T D"] | None,
    head: Head,
    ref_head: Head | None,
) -> TokenScores:
    """`head_scores`, with what windows share behind what is each window's own."""
    return head_scores(x, head, targets, ref_x, ref_head)


@jax.jit
def head_scores(
    x: Float[Array, "T D"],
    head: Head,
    targets: Int[Array, " T"],
    ref_x: Float[Array, "T D"] | None,
    ref_head: Head | None,
) -> TokenScores:
    """`token_scores` of hidden states under their heads; only one chunk of logits exists at a time."""

    def one_chunk(chunk: tuple[jax.Array, ...]) -> TokenScores:
        hidden, target, ref_hidden = chunk
        ref_logits = None if ref_hidden is None else ref_head.vocabulary_first(ref_hidden)
        return token_scores(head.vocabulary_first(hidden), target, ref_logits)

    scores = jax.lax.map(one_chunk, jax.tree.map(_chunked, (x, targets, ref_x)))
    return jax.tree.map(lambda a: a.reshape(-1)[: x.shape[0]], scores)


@jax.jit
def mean_divergences(
    x: Float[Array, "K T D"], head: Head, ref_x: Float[Array, "T D"], ref_head: Head
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
        log_ref = jax.nn.log_softmax(ref_head.vocabulary_first(ref_hidden), axis=0)
        p_ref = jnp.exp(log_ref)

        def one_variant(hidden: Float[Array, "T D"]) -> Float[Array, " T"]:
            return divergence(p_ref, log_ref, jax.nn.log_softmax(head.vocabulary_first(hidden), axis=0))

        return jax.lax.map(one_variant, hidden.swapaxes(0, 1))

    divergences = jax.lax.map(one_chunk, (_chunked(x.swapaxes(0, 1), size), _chunked(ref_x, size)))  # [chunks, K, T]
    return jnp.mean(divergences.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :tokens], axis=1)


def divergence(p: Float[Array, "V T"], log_p: Float[Array, "V T"], log_q: Float[Array, "V T"]) -> Float[Array, " T"]:
    """KL(p ‖ q) as Σ p · (eᵈ − 1 − d), d = log q − log p: the same sum, since Σ q = Σ p, but of terms that are all ≥ 0.

    Small d go through the series, where eᵈ − 1 − d would cancel; large ones through q, where eᵈ could overflow.
    """
    d = log_q - log_p
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))))
    return jnp.sum(jnp.where(jnp.abs(d) < 0.25, p * series, jnp.exp(log_q) - p * (1 + d)), axis=0)


def _chunked(a: jax.Array, size: int = _HEAD_CHUNK) -> jax.Array:
    """`[T, ...]` → `[chunks, size, ...]`, padded with zeros."""
    padding = -a.shape[0] % size
    padded = jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
    return padded.reshape(-1, size, *a.shape[1:])


def _window_hidden(
    spec: DecoderSpec, params: Params, windows: Int[np.ndarray, "W T"], start: int, doing: str | None = None
) -> Iterator[Float[Array, "S D"]]:
    """Normed hidden states of each window from `start` on but the last token.

    Windows sweep in groups over weights in memory, all together over those on disk.
    """
    stored = isinstance(params, StoredParams)
    size = len(windows) if stored else max(1, _NUMBERS_AT_ONCE // (windows.shape[1] * spec.d_model))
    ends = {"output_norm": params["output_norm"]}
    for first in range(0, len(windows), size):
        x = sweep.begin(spec, params, windows[first : first + size])
        for at in sweep.forward(spec, params, doing if stored else None):
            x = sweep.advance(at, x)
        for window in x:
            yield final_norm(spec, ends, jnp.asarray(window[start:-1]))

"""Negative log-likelihood, perplexity and KL divergence over token windows.

Protocols: `llama.cpp` scores the second half of each window, as llama-perplexity does (context 512 by default);
`sliding` scores every token but the first, as papers do (context 2,048). The two are not comparable. All losses are
in nats per token.
"""

import dataclasses
import functools
import math
from typing import Literal

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
    def mean_kld(self) -> float | None:
        """Nats per token."""
        return None if self.kld is None else float(self.kld.mean(dtype=np.float64))


def first_scored(protocol: Protocol, context: int) -> int:
    """The first position of a window whose prediction of the next token counts."""
    return context // 2 if protocol == "llama.cpp" else 0


def evaluate(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    *,
    params: Params | None = None,
    reference: Model | None = None,
    protocol: Protocol = "llama.cpp",
    doing: str = "evaluating",
) -> Evaluation:
    """Score `params` (default: the model's own) on the windows, one window at a time.

    With `reference`, also the KL divergence of its next-token distributions from the scored ones. Only one chunk of
    logits is held in memory. Raises `ValueError` where the loss is not finite.
    """
    start = first_scored(protocol, windows.shape[1])
    params = model.params if params is None else params
    nll, kld = [], []
    for i, window in enumerate(track(windows, doing, "window")):
        x = _scored_hidden(model.spec, params, window[None], start)
        ref_x = None if reference is None else _scored_hidden(reference.spec, reference.params, window[None], start)
        ref_head = None if reference is None else head_weights(reference.params)
        losses, divergences = head_losses(x, head_weights(params), window[start + 1 :], ref_x, ref_head)
        if not all(np.isfinite(values).all() for values in jax.tree.leaves((losses, divergences))):
            raise ValueError(f"the loss of window {i} is not finite; load the models with dtype=float32.")
        nll.append(np.asarray(losses))
        kld.append(divergences)
    together = None if reference is None else np.concatenate([np.asarray(k) for k in kld])
    return Evaluation(np.concatenate(nll), together)


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
        log_p = jax.nn.log_softmax(matmul(hidden, head))
        nll = -jnp.take_along_axis(log_p, target[:, None], axis=-1)[:, 0]
        if ref_hidden is None:
            return nll, None
        log_ref = jax.nn.log_softmax(matmul(ref_hidden, ref_head))
        return nll, jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)

    time = x.shape[0]
    padding = -time % _HEAD_CHUNK

    def chunked(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1))
        return padded.reshape(-1, _HEAD_CHUNK, *a.shape[1:])

    chunks = jax.tree.map(chunked, (x, targets, ref_x))
    return jax.tree.map(lambda a: a.reshape(-1)[:time], jax.lax.map(one_chunk, chunks))


@functools.partial(jax.jit, static_argnames=("spec", "start"))
def _scored_hidden(spec: DecoderSpec, params: Params, ids: Int[Array, "1 T"], start: int) -> Float[Array, "S D"]:
    return hidden_states(spec, params, ids)[0, start:-1]

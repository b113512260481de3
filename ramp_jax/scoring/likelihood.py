"""Log-likelihoods of continuations: what multiple-choice tasks ask of a model, batched by length."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ramp_jax.models import Model
from ramp_jax.models.decoder import Head, hidden_states, output_head
from ramp_jax.progress import track
from ramp_jax.scoring.diagnose import check_windows, explain

_BATCH_TOKENS = 2048  # of one forward pass, padding included
_ROWS = 128  # positions whose logits exist at one time

Pair = tuple[Sequence[int], Sequence[int]]


def log_likelihoods(model: Model, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Per pair of context and continuation: ln p(continuation | context), and whether greedy decoding would write it.

    What does not fit the model's context is cut from the left, as in lm-eval. One program is compiled per bucket of
    lengths (2^k and 3·2^k); pairs that differ in their last token only share a forward pass. Raises `ValueError` for an
    empty context, a continuation longer than the model's context, tokens outside of the vocabulary, or a result that is
    not finite.
    """
    limit = model.spec.context_length
    asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > limit:
            raise ValueError(
                f"request {i} has {len(context)} tokens of context and {len(continuation)} of continuation; the model "
                f"needs at least 1 of the first and scores at most {limit} of the second."
            )
        asked[tuple(itertools.chain(context, continuation))[-limit - 1 : -1]].append(i)
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for batch in track(list(_batches(list(asked), limit)), "scoring continuations", "batch"):
        ids = _padded(batch, limit)
        check_windows(ids, model.spec.vocab_size)
        hidden = np.asarray(hidden_states(model.spec, model.params, ids))
        owners = [(row, i) for row, inputs in enumerate(batch) for i in asked[inputs]]
        rows = [hidden[row, len(batch[row]) - len(pairs[i][1]) : len(batch[row])] for row, i in owners]
        targets = [token for _, i in owners for token in pairs[i][1]]
        scored = _scored(np.concatenate(rows), output_head(model.spec, model.params), targets)
        borders = np.cumsum([len(part) for part in rows])[:-1]
        for (row, i), log_p, top in zip(owners, *(np.split(values, borders) for values in scored), strict=True):
            if not np.isfinite(log_p).all():
                raise ValueError(f"a log-likelihood is not finite, {explain(model.spec, model.params, ids[row])}.")
            answers[i] = (float(log_p.sum(dtype=np.float64)), bool(top.all()))
    return answers


def bucket(length: int, limit: int) -> int:
    """The length that inputs of `length` tokens are padded to: 16, 24, 32, 48, 64, ..., at most `limit`."""
    sizes = (size << k for k in itertools.count() for size in (16, 24))
    return min(limit, next(size for size in sizes if size >= length))


def _batches(inputs: list[tuple[int, ...]], limit: int) -> Iterator[list[tuple[int, ...]]]:
    """Inputs of one bucket together, longest first, as many as a forward pass takes."""
    ordered = sorted(inputs, key=len, reverse=True)
    for length, members in itertools.groupby(ordered, key=lambda ids: bucket(len(ids), limit)):
        together, size = list(members), _batch_size(length)
        yield from (together[start : start + size] for start in range(0, len(together), size))


def _batch_size(length: int) -> int:
    return max(1, _BATCH_TOKENS // length)


def _padded(batch: list[tuple[int, ...]], limit: int) -> Int[np.ndarray, "B T"]:
    """One shape per bucket: short batches are filled with rows of zeros, which nobody reads."""
    length = bucket(len(batch[0]), limit)
    ids = np.zeros((_batch_size(length), length), np.int32)
    for row, inputs in zip(ids, batch, strict=False):
        row[: len(inputs)] = inputs
    return ids


def _scored(
    x: Float[np.ndarray, "S D"], head: Head, targets: Sequence[int]
) -> tuple[Float[np.ndarray, " S"], Bool[np.ndarray, " S"]]:
    """ln p of the targets and whether they are likeliest, from hidden states; one program for any number of them."""
    padding = -len(x) % _ROWS
    x = np.pad(x, ((0, padding), (0, 0))).reshape(-1, _ROWS, x.shape[-1])
    ids = np.pad(np.asarray(targets, np.int32), (0, padding)).reshape(-1, _ROWS)
    log_p, top = zip(*(_rows(*chunk, head) for chunk in zip(x, ids, strict=True)), strict=True)
    return np.concatenate(log_p)[: len(targets)], np.concatenate(top)[: len(targets)]


@jax.jit
def _rows(
    x: Float[Array, "S D"], targets: Int[Array, " S"], head: Head
) -> tuple[Float[Array, " S"], Bool[Array, " S"]]:
    log_p = jax.nn.log_softmax(head(x))
    picked = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return picked, picked == jnp.max(log_p, axis=-1)

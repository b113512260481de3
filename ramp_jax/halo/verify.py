"""What stock llama.cpp makes of a file: its losses on the very tokens that were scored in JAX, and its logits.

Needs the `verify` extra (llama-cpp-python).
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.cores import cores
from ramp_jax.halo.llama_quantize import captured_log, last_line, require
from ramp_jax.models import Model
from ramp_jax.models.decoder import Head
from ramp_jax.progress import track
from ramp_jax.scoring.perplexity import (
    Protocol,
    Reference,
    TokenScores,
    first_scored,
    joined,
    predictions,
    token_scores,
)
from ramp_jax.scoring.scores import Evaluation

_CHUNK = 128  # tokens scored at one time


def evaluate_gguf(
    path: str | Path,
    windows: Int[np.ndarray, "W T"],
    *,
    reference: Model | Reference | None = None,
    protocol: Protocol = "llama.cpp",
) -> Evaluation:
    """What `evaluate` finds, with the GGUF run by llama.cpp; a reference still runs in JAX.

    Raises `RuntimeError` where llama.cpp cannot load or run the file, `ValueError` where its loss is not finite.
    """
    context = windows.shape[1]
    start = first_scored(protocol, context)
    scores = []
    with session(path, context) as (run, vocab_size):
        beside = predictions(reference, windows, vocab_size, protocol)
        bar = track(windows, f"scoring {Path(path).stem} in llama.cpp", "window")
        for i, (window, hidden) in enumerate(zip(bar, beside.hidden, strict=True)):
            logits = run(window, range(start, context - 1))
            for first in range(0, len(logits), _CHUNK):
                rows = slice(first, first + _CHUNK)
                ref_hidden = None if hidden is None else hidden[rows]
                scores.append(_scores(logits[rows], window[start + 1 :][rows], ref_hidden, beside.head))
                if not np.isfinite(scores[-1].nll).all():
                    raise ValueError(f"llama.cpp's loss of window {i} is not finite; score {path} with --backend=jax.")
    return joined(scores)


def gguf_logits(path: str | Path, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    """Logits of every position in llama.cpp, with keys and values in f32: its usual f16 moves them by 1e-2.

    Raises `RuntimeError` where llama.cpp cannot load or run the file.
    """
    with session(path, ids.shape[1], exact=True) as (run, _):
        return np.stack([run(window, range(len(window))) for window in ids])


@jax.jit
def _scores(
    logits: Float[Array, "S V"], targets: Int[Array, " S"], hidden: Float[Array, "S D"] | None, head: Head | None
) -> TokenScores:
    return token_scores(logits.T, targets, None if hidden is None else head.vocabulary_first(hidden))


class Generation(NamedTuple):
    """What a file writes after a prompt, the likeliest token each time, and how many tokens it reads and writes in a
    second."""

    tokens: list[int]
    read_per_second: float
    written_per_second: float


def generate(path: str | Path, prompt: Int[np.ndarray, " T"], count: int) -> Generation:
    """`count` tokens after `prompt`, however many of them end the text; the prompt is read twice and timed then.

    Raises `RuntimeError` where llama.cpp cannot load or run the file.
    """
    with session(path, len(prompt) + count) as (run, _):
        run(prompt, range(len(prompt) - 1, len(prompt)))
        started = time.monotonic()
        (logits,) = run(prompt, range(len(prompt) - 1, len(prompt)))
        read, tokens = time.monotonic(), [int(np.argmax(logits))]
        for position in range(len(prompt), len(prompt) + count - 1):
            (logits,) = run(np.asarray(tokens[-1:]), range(1), position)
            tokens.append(int(np.argmax(logits)))
        written = time.monotonic()
    return Generation(tokens, len(prompt) / (read - started), (count - 1) / (written - read))


@contextlib.contextmanager
def session(path: str | Path, context: int, exact: bool = False) -> Iterator[tuple[Any, int]]:
    """A function (ids `[T]`, which of them are wanted, position of the first) → their logits `[S, V]`; V.

    At position 0 a new text begins. `exact` keeps keys and values in f32. Both raise `RuntimeError` where llama.cpp
    cannot load or run the file.
    """
    require()
    import llama_cpp

    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False  # repacked weights crash on some virtual machines with AMX
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_threads = params.n_threads_batch = cores()
    if exact:
        params.type_k = params.type_v = int(gguf.GGMLQuantizationType.F32)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with captured_log() as log, contextlib.ExitStack() as stack:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}: {last_line(log)}.")
        stack.callback(llama_cpp.llama_model_free, model)
        session = llama_cpp.llama_init_from_model(model, params)
        if not session:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens for {path}.")
        stack.callback(llama_cpp.llama_free, session)
        batch = llama_cpp.llama_batch_init(context, 0, 1)
        stack.callback(llama_cpp.llama_batch_free, batch)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

        def run(ids: Int[np.ndarray, " T"], wanted: range, first: int = 0) -> Float[np.ndarray, "S V"]:
            batch.n_tokens = len(ids)
            for t, token in enumerate(ids):
                batch.token[t], batch.pos[t], batch.n_seq_id[t], batch.seq_id[t][0] = int(token), first + t, 1, 0
                batch.logits[t] = t in wanted
            if first == 0:
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session), True)
            if llama_cpp.llama_decode(session, batch):
                raise RuntimeError(f"llama.cpp failed to run {path}: {last_line(log)}.")
            logits = ctypes.cast(llama_cpp.llama_get_logits(session), ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(logits, (len(wanted), vocabulary)).copy()

        yield run, vocabulary

"""The suite `parity` of launch/benchmark.py: one F16 file in JAX, llama.cpp and transformers, window by window.

SmolLM2-135M, held-out text, f32 matrix products, both protocols; and log-likelihoods of continuations in JAX beside
transformers. With --plots (or --json, beside whose file it then lies) `parity.png` is written.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from benchmarks.measuring import Numbers, said, save_plots
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.torch_model import token_losses, torch_model
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import Model, load_model
from ramp_jax.scoring.likelihood import Pair, log_likelihoods
from ramp_jax.scoring.perplexity import evaluate, first_scored

_PROTOCOLS = {"llama.cpp": {"context": 512, "count": 8}, "sliding": {"context": 2048, "count": 2}}
_PAIRS, _LONGEST_CONTEXT, _LONGEST_CONTINUATION, _SEED = 32, 200, 24, 0

Losses = dict[str, Float[np.ndarray, " W"]]  # by what ran it: nats per scored token of each window


class Found(NamedTuple):
    """Losses of one protocol."""

    context: int
    losses: Losses


def parity(_: int) -> Numbers:
    """Perplexity of each, the largest difference of a window's loss, and of a log-likelihood."""
    original = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "F16.gguf"
        export_gguf(original, Allocation.uniform(original, "F16"), path)
        model = load_model(str(path))
        beside = torch_model(model)
        found, numbers = {}, {}
        with jax.default_matmul_precision("highest"):
            for protocol, wanted in _PROTOCOLS.items():
                windows = data.windows("builtin", model.tokenizer, split="heldout", **wanted)
                start = first_scored(protocol, windows.shape[1])
                token = {
                    "JAX": evaluate(model, windows, protocol=protocol).nll,
                    "llama.cpp": evaluate_gguf(path, windows, protocol=protocol).nll,
                    "transformers": token_losses(beside, windows, start),
                }
                losses = {name: nll.reshape(len(windows), -1).mean(axis=1) for name, nll in token.items()}
                found[protocol] = Found(windows.shape[1], losses)
                numbers |= said(_numbers(protocol, token["JAX"].size, losses))
            pairs = _continuations(np.random.default_rng(_SEED), windows)
            numbers |= said(_likelihoods(model, beside, pairs))
    save_plots({"parity": lambda: _plot(found)})
    return numbers


def _numbers(protocol: str, tokens: int, losses: Losses) -> Numbers:
    ours = losses["JAX"]
    numbers: Numbers = {f"{protocol}_tokens": tokens}
    for name, values in losses.items():
        numbers[f"{protocol}_ppl_{name}"] = math.exp(values.mean())
        if name != "JAX":
            numbers[f"{protocol}_largest_difference_of_a_window_{name}"] = float(np.abs(ours - values).max())
    return numbers


def _continuations(rng: np.random.Generator, windows: Int[np.ndarray, "W T"]) -> list[Pair]:
    """Contexts and continuations of random lengths, cut from random places of the windows."""
    pairs = []
    for _ in range(_PAIRS):
        longest = min(_LONGEST_CONTEXT, windows.shape[1] - _LONGEST_CONTINUATION)
        before, after = rng.integers(1, longest + 1), rng.integers(1, _LONGEST_CONTINUATION + 1)
        start = rng.integers(0, windows.shape[1] - before - after + 1)
        ids = windows[rng.integers(len(windows)), start : start + before + after].tolist()
        pairs.append((ids[:before], ids[before:]))
    return pairs


def _likelihoods(model: Model, beside: Any, pairs: list[Pair]) -> Numbers:
    ours = np.array([log_p for log_p, _ in log_likelihoods(model, pairs)])
    theirs = [-token_losses(beside, np.array([[*a, *b]]), len(a) - 1).sum(dtype=np.float64) for a, b in pairs]
    return {
        "continuations": len(pairs),
        "mean_log_likelihood": float(np.mean(theirs)),
        "largest_difference_of_a_log_likelihood": float(np.abs(ours - theirs).max()),
    }


def _plot(found: dict[str, Found]) -> Figure:
    """Losses per window above, their differences from transformers below; one column per protocol."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for column, (protocol, (context, losses)) in enumerate(found.items()):
        above, below = axes[:, column]
        for (name, values), marker in zip(losses.items(), "ox+", strict=True):
            above.plot(values, marker, label=name, fillstyle="none")
            if name != "transformers":
                below.plot(np.abs(values - losses["transformers"]), marker, label=name, fillstyle="none")
        above.set(title=f"{protocol}, {context} tokens", ylabel="loss, nats per token")
        below.set(xlabel="window", ylabel="|difference from transformers|", yscale="log")
        below.set_xticks(range(len(values)))
        above.legend()
        below.legend()
    return figure

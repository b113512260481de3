"""The suite `sensitivity` of launch/benchmark.py: exact table, plain loop, noise floor, Fisher, additive model.

SmolLM2-135M, 2 windows of 48 tokens, all of them scored, levels 4, 5 and 8. The plain loop measures the cells of three
layers by whole forward passes, and the exact table measures the same cells again beside it. With --plots (or --json,
beside whose file they then lie) two plots are written.
"""

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measuring import Numbers, said, save_plots, timed
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from ramp_jax import data
from ramp_jax.models import Model, allocatable, load_model
from ramp_jax.models.decoder import Params, hidden_states, output_head
from ramp_jax.models.layout import replaced
from ramp_jax.quantization import decoded
from ramp_jax.scoring.perplexity import mean_divergences
from ramp_jax.sensitivity import additive
from ramp_jax.sensitivity.exact import Cell, cells, exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity
from ramp_jax.sensitivity.table import Sensitivity

_LEVELS = (4, 5, 8)
_WINDOWS = {"context": 48, "count": 2}
_ALLOCATIONS, _PAIRS, _SEED = 64, 3, 1


def sensitivity(repeats: int) -> Numbers:
    """All measurements, each once (`repeats` is for shorter suites), printed as they come."""
    model = load_model("smollm2-135m")
    windows = data.windows("builtin", model.tokenizer, **_WINDOWS)
    with jax.default_matmul_precision("default"):
        exact = exact_sensitivity(model, windows, _LEVELS, "sliding")
        numbers = {"tokens": windows.size, "cells": int((exact.kld > 0).sum()), "exact_seconds": exact.seconds}
        numbers |= said(_beside_the_plain_loop(model, windows))
        numbers |= said(_floors(model, windows, exact))
        estimate, fisher = _fisher(model, windows, exact)
        numbers |= said(fisher)
        losses, added = _additive(model, windows, exact, estimate)
        numbers |= said(added)
    save_plots({"fisher": lambda: _plot_fisher(exact, estimate), "additive": lambda: _plot_additive(losses)})
    return numbers


def plain_loop(model: Model, windows: Int[np.ndarray, "W T"], some: list[Cell]) -> Float[np.ndarray, " K"]:
    """Mean KL of each cell by a whole forward pass, every token scored."""
    spec, params, head = model.spec, model.params, output_head(model.spec, model.params)

    def run(params: Params) -> Float[Array, "S D"]:
        return hidden_states(spec, params, windows)[:, :-1].reshape(-1, spec.d_model)

    reference, costs = run(params), []
    for cell in some:
        changed = replaced(params, [(cell.tensor, decoded(model, cell.tensor, cell.format.name))])
        costs.append(mean_divergences(run(changed)[None], head, reference, head)[0])
    return np.asarray(costs)


def _beside_the_plain_loop(model: Model, windows: Int[np.ndarray, "W T"]) -> Numbers:
    """Both ways take turns, layer by layer, so that what else the machine does meets both."""
    depth = len(model.spec.blocks)
    seconds, plain, found = {"plain": 0.0, "exact": 0.0}, [], []
    for layer in (depth // 6, depth // 2, depth - 1 - depth // 6):  # on average in the middle
        members = [tensor for tensor in allocatable(model.spec) if tensor.layer == layer]
        some, names = cells(members, _LEVELS), {tensor.name for tensor in members}
        if not plain:
            plain_loop(model, windows, some[:1])
        took, costs = timed(lambda some=some: plain_loop(model, windows, some))
        seconds["plain"] += took
        took, table = timed(lambda names=names: exact_sensitivity(model, windows, _LEVELS, "sliding", tensors=names))
        seconds["exact"] += took
        plain += costs.tolist()
        found += [table.kld[cell.row, cell.column] for cell in some]
    plain, found = np.array(plain), np.array(found)
    return {
        "plain_loop_cells": len(plain),
        "plain_loop_seconds": seconds["plain"],
        "exact_seconds_same_cells": seconds["exact"],
        "exact_speedup": seconds["plain"] / seconds["exact"],
        "largest_difference": float(np.abs(found - plain).max()),
        "largest_relative_difference": float(np.abs(found / plain - 1).max()),
    }


def _floors(model: Model, windows: Int[np.ndarray, "W T"], exact: Sensitivity) -> Numbers:
    """The floor of f32, and of bf16 beside what Q8_0 costs in f32, for the queries of three layers."""
    names = [f"blk.{layer}.attn_q.weight" for layer in (0, len(model.spec.blocks) // 2, len(model.spec.blocks) - 1)]
    coarse = exact_sensitivity(model.astype(jnp.bfloat16), windows, (8,), "sliding", tensors=names)
    rows = [exact.tensors.index(name) for name in names]
    return {
        "floor_f32": float(exact.floor.max()),
        "smallest_cost": float(exact.kld[exact.kld > 0].min()),
        "floor_bf16": coarse.floor.tolist(),
        "q8_0_of_the_same_in_bf16": coarse.kld[:, 0].tolist(),
        "q8_0_of_the_same_in_f32": exact.kld[rows, _LEVELS.index(8)].tolist(),
    }


def _fisher(model: Model, windows: Int[np.ndarray, "W T"], exact: Sensitivity) -> tuple[Sensitivity, Numbers]:
    first, estimate = (fisher_sensitivity(model, windows, _LEVELS, "sliding") for _ in range(2))
    used = exact.kld > 0
    ratio = estimate.kld[used] / exact.kld[used]
    return estimate, {
        "fisher_seconds_with_compilation": first.seconds,
        "fisher_seconds": estimate.seconds,
        "fisher_time_share": estimate.seconds / exact.seconds,
        "fisher_spearman": _spearman(estimate.kld[used], exact.kld[used]),
        "fisher_spearman_by_level": [
            _spearman(estimate.kld[used[:, a], a], exact.kld[used[:, a], a]) for a in range(len(_LEVELS))
        ],
        "fisher_over_exact_5_50_95_percent": np.quantile(ratio, (0.05, 0.5, 0.95)).tolist(),
    }


def _additive(
    model: Model, windows: Int[np.ndarray, "W T"], exact: Sensitivity, estimate: Sensitivity
) -> tuple[dict[str, np.ndarray], Numbers]:
    """Fitted on the first half of the allocations; everything here is of the other half."""
    members = allocatable(model.spec)
    valid = np.zeros_like(exact.kld, bool)
    for cell in cells(members, _LEVELS):
        valid[cell.row, cell.column] = True
    actions = additive.random_actions(np.random.default_rng(_SEED), valid, _ALLOCATIONS)
    kld, delta_nll = additive.true_losses(model, windows, _LEVELS, actions, "sliding")
    half = _ALLOCATIONS // 2
    predicted = additive.predict(exact.kld, actions)
    terms = additive.pair_terms(exact.kld, members, actions)
    first = {pair: values[:half] for pair, values in terms.items()}
    rest = {pair: values[half:] for pair, values in terms.items()}
    scale, full = (additive.fit(predicted[:half], first, kld[:half], pairs) for pairs in (0, _PAIRS))
    guesses = {
        "sum": predicted[half:],
        "sum_of_fisher": additive.predict(estimate.kld, actions)[half:],
        "scaled": scale(predicted[half:], rest),
        "scaled_with_pairs": full(predicted[half:], rest),
    }
    numbers: Numbers = {"additive_scale": scale.scale, "additive_scale_with_pairs": full.scale}
    numbers["additive_pairs"] = {" × ".join(pair): weight for pair, weight in full.pairs.items()}
    for name, guess in guesses.items():
        numbers[f"additive_spearman_kl_{name}"] = _spearman(guess, kld[half:])
        numbers[f"additive_relative_error_{name}"] = float(np.median(np.abs(guess / kld[half:] - 1)))
    numbers["additive_spearman_kl_all_64"] = _spearman(predicted, kld)
    numbers["additive_spearman_delta_nll_all_64"] = _spearman(predicted, delta_nll)
    return {"true": kld[half:], **guesses}, numbers


def _plot_fisher(exact: Sensitivity, estimate: Sensitivity) -> Figure:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    modules = [name.split(".")[-2] for name in exact.tensors]
    for module in dict.fromkeys(modules):
        rows = [i for i, other in enumerate(modules) if other == module]
        axes.scatter(exact.kld[rows].ravel(), estimate.kld[rows].ravel(), s=8, label=module)
    axes.set(xlabel="exact, nats per token", ylabel="Fisher estimate, nats per token")
    return _with_diagonal(figure, axes)


def _plot_additive(losses: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    for name in ("sum", "scaled", "scaled_with_pairs"):
        axes.scatter(losses["true"], losses[name], s=12, label=name.replace("_", " "))
    axes.set(xlabel="KL divergence of the allocation, nats per token", ylabel="predicted from the table")
    return _with_diagonal(figure, axes)


def _with_diagonal(figure: Figure, axes: Axes) -> Figure:
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_xlim()
    axes.axline((low, low), (high, high), color="gray", linewidth=0.8)
    axes.legend()
    return figure


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)

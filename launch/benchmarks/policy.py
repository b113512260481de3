"""The suite `policy` of launch/benchmark.py: what each way of choosing loses, over the sizes of llama.cpp's mixes.

Each of llama.cpp's mixes (importance matrix from the same calibration text) gives one budget; every method gets exactly
its bytes, one folding and one encoder, and is measured by mean KL divergence on held-out text. `--suite_policies` are
workdirs of training runs or `pretrained`, `--suite_levels` what all choose among; `--suite_table` the exact sensitivity
table of the target, for the row `exact knapsack`; `--suite_evolution` true evaluations on calibration text for the rows
`evolution`, which starts at the uniform allocation, and `refined`, which starts at the policy's. A plot is written
beside --json.
"""

import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags
from benchmarks.measuring import Numbers, said, save_plots
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.figure import Figure

from ramp_jax import data
from ramp_jax.allocation import Costs, costs, from_levels
from ramp_jax.allocators import Actions, Allocator, Problem, simple
from ramp_jax.allocators.allocator import RULES, by_evolution, by_rule, tables
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.formats import DEFAULT_LEVELS, levels_of, written
from ramp_jax.formats.check import EncodeCache
from ramp_jax.halo.llama_quantize import Mixes
from ramp_jax.models import Model, load_model
from ramp_jax.policy import inference
from ramp_jax.policy.inference import Policy, load_policy
from ramp_jax.policy.refinement import refine
from ramp_jax.quantization import Encoder, Stats, calibrate_and_fold, fake_quantize, importance_of
from ramp_jax.scoring import variants
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of

_TARGET = flags.DEFINE_string("suite_target", "smollm2-135m", "Model that the suite `policy` allocates for.")
_POLICIES = flags.DEFINE_list("suite_policies", ["pretrained"], "Policies that the suite `policy` compares.")
_EVOLUTION = flags.DEFINE_integer("suite_evolution", 0, "True evaluations of the suite's evolution, per budget.")
_MIXES = flags.DEFINE_list(
    "suite_mixes",
    ["Q3_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"],
    "Mixes of llama.cpp whose sizes are the budgets of the suite `policy`.",
)
_LEVELS = flags.DEFINE_list(
    "suite_levels", [*map(written, DEFAULT_LEVELS)], "Levels that the methods of the suite `policy` choose among."
)
_TABLE = flags.DEFINE_string("suite_table", None, "Exact sensitivity table (.npz) of the target, folded as the policy.")

_CALIBRATION, _HELDOUT = {"context": 512, "count": 4}, {"context": 512, "count": 6}
_RANDOM_SEEDS = 3
_SEED = re.compile(r"[- ]?\d+(?=$|,)")  # at the end of a method's name


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all methods share."""

    model: Model
    levels: tuple[float | str, ...]
    sizes: Costs
    encoder: Encoder

    def kld(
        self, windows: Int[np.ndarray, "W T"], reference: Reference, actions: Int[np.ndarray, " T"]
    ) -> tuple[float, int]:
        """Mean KL divergence on the windows and file bytes."""
        allocation = from_levels(self.model, [self.levels[a] for a in actions])
        params = fake_quantize(self.model, allocation, self.encoder)
        scored = evaluate(self.model, windows, params=params, reference=reference, doing="scoring")
        return scored.mean_kld, allocation.file_bytes


def policy(repeats: int) -> Numbers:
    """Rows of budget × method, printed as they come; nothing is timed but choosing itself (`repeats` is not used)."""
    del repeats
    policies = {name: load_policy(name) for name in _POLICIES.value}
    first = next(iter(policies.values()))
    levels = levels_of(_LEVELS.value)
    model = load_model(_TARGET.value)
    calibration = data.windows("builtin", model.tokenizer, **_CALIBRATION)
    heldout = data.windows("builtin", model.tokenizer, split="heldout", **_HELDOUT)
    reference = reference_of(model, heldout)
    folded, stats = calibrate_and_fold(model, calibration, first.fold_level)
    encoder = Encoder("best", importance_of(model.spec, stats), EncodeCache(1 << 33))
    bench = Bench(folded, levels, costs(folded, levels), encoder)
    started = time.monotonic()
    known = inference.problem(folded, stats, levels, bench.sizes)
    estimating, quantizing = time.monotonic() - started, 0.0
    if _EVOLUTION.value:
        started = time.monotonic()
        choices = variants.prepare(folded, model, calibration[:1], bench.sizes, encoder=encoder)
        known, quantizing = known._replace(evaluate=variants.measuring(choices)), time.monotonic() - started
    ways = list(_allocators(levels, policies, estimating, quantizing))
    rows = []
    for mix, budget, kld in _mixes(model, stats, heldout, reference):
        rows.append(_said(mix, f"llama.cpp {mix}", budget, budget, kld, 0.0))
        for way in ways if bench.sizes.smallest <= budget else []:
            started = time.monotonic()
            actions = way.choose(known, bench.sizes.units(budget))
            seconds = way.seconds + time.monotonic() - started
            loss, size = bench.kld(heldout, reference, actions)
            rows.append(_said(mix, way.name, budget, size, loss, seconds))
    save_plots({"policy": lambda: _plot(rows)})
    ratios = said(_over_mixes(rows))
    return {"target": _TARGET.value, "heldout_tokens": heldout.size, "over_the_mixes": ratios, "rows": rows}


def _allocators(
    levels: tuple[float | str, ...], policies: dict[str, Policy], estimating: float, quantizing: float
) -> Iterator[Allocator]:
    """Rules, searches and policies, with the seconds that they need of the target once: what estimated losses and the
    embedding took, and every tensor at every level."""
    yield by_rule("uniform", levels)
    for seed in range(_RANDOM_SEEDS):
        draw = functools.partial(_draw, seed=seed)
        yield dataclasses.replace(by_rule("random", levels), name=f"random {seed}", choose=draw)
    estimated = dataclasses.replace(by_rule("fisher", levels), seconds=estimating)
    for name, choose in {"greedy": RULES["greedy"], "knapsack": _knapsack, "pairs": estimated.choose}.items():
        yield dataclasses.replace(estimated, name=f"estimate, {name}", choose=choose)
    if _TABLE.value:
        yield dataclasses.replace(inference.find_allocator(_TABLE.value, levels=levels), name="exact knapsack")
    ours = {f"policy {Path(name).name}": found for name, found in policies.items()}
    for name, found in ours.items():
        whole = dataclasses.replace(found.allocator(levels), name=name, seconds=estimating)
        alone = functools.partial(inference.choose, found, repair=False)
        yield dataclasses.replace(whole, name=f"{name}, no repair", choose=alone)
        yield whole
    if _EVOLUTION.value:
        yield dataclasses.replace(by_evolution(levels, _EVOLUTION.value), seconds=quantizing)
        for name, found in ours.items():
            refined = refine(found.allocator(levels), _EVOLUTION.value)
            yield dataclasses.replace(refined, name=f"{name}, refined", seconds=estimating + quantizing)


def _draw(problem: Problem, budget: int, seed: int) -> Actions:
    return simple.random(*tables(problem), budget, seed=seed)


def _knapsack(problem: Problem, budget: int) -> Actions:
    return knapsack(*tables(problem), budget)


def _mixes(
    model: Model, stats: Stats, heldout: Int[np.ndarray, "W T"], reference: Reference
) -> Iterator[tuple[str, int, float]]:
    """llama.cpp's mixes: name, file bytes, mean KL divergence."""
    with tempfile.TemporaryDirectory() as folder:
        mixes = Mixes.of(model, importance_of(model.spec, stats), Path(folder))
        for mix in _MIXES.value:
            path = mixes.write(mix)
            scored = evaluate(load_model(str(path)), heldout, reference=reference, doing=f"scoring {mix}")
            size = path.stat().st_size
            path.unlink()
            yield mix, size, scored.mean_kld


def _said(mix: str, method: str, budget: int, size: int, kld: float, seconds: float) -> Numbers:
    row = {"budget_of": mix, "method": method, "budget": budget, "bytes": size, "kld": kld, "seconds": seconds}
    print(f"{mix:8} {method:22} {size:>12,} of {budget:>12,}  KL {kld:.4f}  {seconds:.1f} s", flush=True)
    return row


def _over_mixes(rows: list[Numbers]) -> Numbers:
    """Per method the KL divergence over that of the mix: mean over budgets, and largest."""
    ratios: dict[str, list[float]] = {}
    for row, ratio in _ratios(rows):
        ratios.setdefault(row["method"], []).append(ratio)
    return {name: f"{np.mean(values):.3f} of the mix, {max(values):.3f} at most" for name, values in ratios.items()}


def _ratios(rows: list[Numbers]) -> Iterator[tuple[Numbers, float]]:
    """The rows beside llama.cpp's, each with its KL divergence over that of the mix."""
    mixes = {row["budget_of"]: row["kld"] for row in rows if _is_mix(row)}
    return ((row, row["kld"] / mixes[row["budget_of"]]) for row in rows if not _is_mix(row))


def _is_mix(row: Numbers) -> bool:
    return row["method"].startswith("llama.cpp")


def _plot(rows: list[Numbers]) -> Figure:
    """Loss over that of llama.cpp's mix of these bytes, a line per method; seeds of a method share one, their mean."""
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    budgets = {row["budget_of"]: row["budget"] for row in rows if _is_mix(row)}
    places = sorted(budgets, key=budgets.__getitem__)
    lines: dict[str, dict[str, list[float]]] = {}
    for row, ratio in _ratios(rows):
        line = lines.setdefault(_SEED.sub("", row["method"]), {mix: [] for mix in places})
        line[row["budget_of"]].append(ratio)
    colors = colormaps["tab20"](np.arange(len(lines)) % 20)
    for (name, found), color in zip(lines.items(), colors, strict=True):
        ratios = [np.mean(found[mix]) if found[mix] else np.nan for mix in places]
        axes.plot(range(len(places)), ratios, marker="o", ms=4, color=color, label=name)
    axes.axhline(1.0, color="black", lw=1, label="llama.cpp's mixes")
    axes.set_xticks(range(len(places)), [f"{mix}\n{budgets[mix] / 1e6:.4g} MB" for mix in places], fontsize=7)
    axes.set(ylabel="KL divergence / that of the mix of these bytes", yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    return figure

"""The suite `policy` of launch/benchmark.py: what each way of choosing loses, over the sizes of llama.cpp's mixes.

Each of llama.cpp's mixes (importance matrix from the same calibration text) gives one budget; every method gets exactly
its bytes, one folding and one encoder, and is measured by mean KL divergence on held-out text. `--suite_policies` are
workdirs of training runs or `pretrained`; `--suite_tables` the exact sensitivity table of the target, for the knapsack
and greedy rows. A plot is written beside --json.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Int
from matplotlib.figure import Figure
from measuring import Numbers, save_plots

from ramp_jax import baselines, data
from ramp_jax.allocation import ALIGNMENT, Allocation, Costs, costs, from_levels
from ramp_jax.evaluation.fisher import fisher_sensitivity
from ramp_jax.evaluation.perplexity import Reference, evaluate, reference_of
from ramp_jax.evaluation.table import Sensitivity
from ramp_jax.formats.check import EncodeCache
from ramp_jax.halo import handoff
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import Model, allocatable, load_model
from ramp_jax.policy import rollout
from ramp_jax.policy.rollout import Policy, load_policy
from ramp_jax.quantization import Encoder, Stats, calibrate, fake_quantize, fold, importance_of

_TARGET = flags.DEFINE_string("suite_target", "smollm2-135m", "Model that the suite `policy` allocates for.")
_POLICIES = flags.DEFINE_list("suite_policies", ["pretrained"], "Policies that the suite `policy` compares.")
_TABLE = flags.DEFINE_string("suite_table", None, "Exact sensitivity table (.npz) of the target, folded as the policy.")

_MIXES = ("Q3_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
_CALIBRATION, _HELDOUT = {"context": 512, "count": 4}, {"context": 512, "count": 6}
_FISHER = {"context": 48, "count": 2}
_RANDOM_SEEDS = 3

Choose = Callable[[int], Int[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of choosing: level indices for a budget in units; `seconds` is what it needed of the target once."""

    name: str
    choose: Choose
    seconds: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all methods share."""

    model: Model
    levels: tuple[int, ...]
    sizes: Costs
    encoder: Encoder
    heldout: Int[np.ndarray, "W T"]
    reference: Reference

    def kld(self, actions: Int[np.ndarray, " T"]) -> tuple[float, int]:
        """Mean KL divergence on held-out text and file bytes."""
        allocation = from_levels(self.model, [self.levels[a] for a in actions])
        params = fake_quantize(self.model, allocation, self.encoder)
        scored = evaluate(self.model, self.heldout, params=params, reference=self.reference, doing="scoring")
        return scored.mean_kld, allocation.file_bytes


def policy(repeats: int) -> Numbers:
    """Rows of budget × method, printed as they come; nothing is timed but choosing itself (`repeats` is not used)."""
    del repeats
    policies = {name: load_policy(name) for name in _POLICIES.value}
    first = next(iter(policies.values()))
    model = load_model(_TARGET.value)
    calibration = data.windows("builtin", model.tokenizer, **_CALIBRATION)
    heldout = data.windows("builtin", model.tokenizer, split="heldout", **_HELDOUT)
    stats, reference = calibrate(model, calibration), reference_of(model, heldout)
    folded = fold(model, stats, first.fold_level)
    encoder = Encoder("best", importance_of(model.spec, stats), EncodeCache(1 << 33))
    bench = Bench(folded, first.levels, costs(folded, first.levels), encoder, heldout, reference)
    methods = list(_methods(bench, folded))
    for name, found in policies.items():
        methods += _policy(bench, name, found, stats)
    rows = []
    for mix, budget, kld in _mixes(model, stats, heldout, reference):
        rows.append(_said(mix, f"llama.cpp {mix}", budget, budget, kld, 0.0))
        for method in methods if bench.sizes.smallest <= budget else []:
            started = time.monotonic()
            actions = method.choose(bench.sizes.units(budget))
            seconds = method.seconds + time.monotonic() - started
            loss, size = bench.kld(actions)
            rows.append(_said(mix, method.name, budget, size, loss, seconds))
    save_plots({"policy": lambda: _plot(rows)})
    return {"target": _TARGET.value, "heldout_tokens": heldout.size, "rows": rows}


def _methods(bench: Bench, folded: Model) -> Iterator[Method]:
    """Uniform, random, and the optimum of the Fisher estimate and of the exact table; the greedy one beside it."""
    cost = bench.sizes.per_level // ALIGNMENT
    yield Method("uniform", lambda units: baselines.uniform(cost, cost, units), 0.0)
    for seed in range(_RANDOM_SEEDS):
        yield Method(f"random {seed}", lambda units, s=seed: baselines.random(cost, cost, units, seed=s), 0.0)
    windows = data.windows("builtin", folded.tokenizer, **_FISHER)
    estimate = fisher_sensitivity(folded, windows, bench.levels, "sliding", encoder=bench.encoder)
    tables = {"Fisher knapsack": estimate}
    if _TABLE.value:
        tables["exact knapsack"] = Sensitivity.load(_TABLE.value)
    for name, table in tables.items():
        yield Method(name, lambda units, t=table: baselines.knapsack(cost, t.kld, units), table.seconds)
    yield Method("Fisher greedy", lambda units: baselines.greedy(cost, estimate.kld, units), estimate.seconds)


def _policy(bench: Bench, name: str, found: Policy, stats: Stats) -> list[Method]:
    """The policy, its rollout without repair, and what the embedding's expected loss finds without a policy."""
    started = time.monotonic()
    problem = rollout.problem(bench.model, stats, found.levels, bench.sizes)
    seconds = time.monotonic() - started
    cost, expected = np.asarray(problem.cost, np.int64), np.asarray(problem.expected, np.float64)
    short = f"policy {Path(name).name}"
    return [
        Method("expected greedy", lambda units: baselines.greedy(cost, expected, units), seconds),
        Method(f"{short}, no repair", lambda units: rollout.choose(found, problem, units, repair=False), seconds),
        Method(short, lambda units: rollout.choose(found, problem, units), seconds),
    ]


def _mixes(
    model: Model, stats: Stats, heldout: Int[np.ndarray, "W T"], reference: Reference
) -> Iterator[tuple[str, int, float]]:
    """llama.cpp's mixes: name, file bytes, mean KL divergence."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "F16.gguf"
        plain = {tensor.name: "F16" for tensor in allocatable(model.spec)}
        export_gguf(model, Allocation(model.spec, model.metadata, plain), source)
        for mix in _MIXES:
            path = Path(folder) / f"{mix}.gguf"
            size = handoff.quantize(source, path, mix, importance_of(model.spec, stats))
            scored = evaluate(load_model(str(path)), heldout, reference=reference, doing=f"scoring {mix}")
            path.unlink()
            yield mix, size, scored.mean_kld


def _said(mix: str, method: str, budget: int, size: int, kld: float, seconds: float) -> Numbers:
    row = {"budget_of": mix, "method": method, "budget": budget, "bytes": size, "kld": kld, "seconds": seconds}
    print(f"{mix:8} {method:22} {size:>12,} of {budget:>12,}  KL {kld:.4f}  {seconds:.1f} s", flush=True)
    return row


def _plot(rows: list[Numbers]) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys("llama.cpp" if row["method"].startswith("llama.cpp") else row["method"] for row in rows)
    for name in names:
        chosen = [row for row in rows if row["method"] == name or (name == "llama.cpp" and name in row["method"])]
        mine = sorted((row["bytes"] / 1e6, row["kld"]) for row in chosen)
        axes.plot(*zip(*mine, strict=True), marker="o", label=name)
    axes.set(xlabel="file size (MB)", ylabel="mean KL divergence (nats per token)", yscale="log")
    axes.legend(frameon=False)
    return figure

"""The suite `encoder` of launch/benchmark.py: what each way of rounding loses at equal tensor types.

SmolLM2-135M, or --encoder_model. Cases are llama.cpp's mixes and levels (2, or uniform:IQ2_S) of every block tensor
that can hold them, embeddings F16; --encoder_cases chooses. Columns: llama-quantize with the importance matrix of the
calibration windows, ggml's bytes without one, `best`, `best` with folding, and `compensated` with folding. Every fit is
on the same windows of --encoder_calibrated_on, and all are scored on the held-out part of each of --encoder_texts. With
--plots (or --json, beside whose file it then lies) a plot is written.
"""

import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from absl import flags
from benchmarks.measuring import save_plots, timed
from jaxtyping import Int
from matplotlib.figure import Figure

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.formats import format_for, get_format
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import Model, allocatable, load_model
from ramp_jax.quantization import (
    REFERENCE,
    Encoder,
    Stats,
    calibrate,
    calibrate_and_fold,
    fake_quantize,
    importance_of,
    make_encoder,
)
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of
from ramp_jax.scoring.scores import numbers

_MODEL = flags.DEFINE_string("encoder_model", "smollm2-135m", "The model of the suite encoder.")
_CASES = flags.DEFINE_list(
    "encoder_cases", ["2", "3", "4", "5", "Q3_K_M", "Q4_K_M"], "Levels, uniform:FORMAT and mixes."
)
_CALIBRATION = flags.DEFINE_integer("encoder_calibration", 32, "Calibration windows of 512 tokens.", lower_bound=1)
_CALIBRATED_ON = flags.DEFINE_string("encoder_calibrated_on", "builtin", "Text that the suite encoder calibrates on.")
_TEXTS = flags.DEFINE_list("encoder_texts", ["builtin"], "Texts that it scores, files too.")
_HELDOUT = flags.DEFINE_integer("encoder_heldout", 8, "Held-out windows of 512 tokens.", lower_bound=1)

_CONTEXT, _FOLD_LEVEL = 512, 4.5  # the level that mixes and formats are folded for
_UNIFORM = "uniform:"
_THEIRS = "llama-quantize"

Row = dict[str, Any]
Cost = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The model, what calibration found, and of each text the held-out windows with the model's predictions."""

    model: Model
    fit: Int[np.ndarray, "W T"]
    stats: Stats
    heldout: Mapping[str, tuple[Int[np.ndarray, "W T"], Reference]]

    def scored(self, case: str, column: str, model: Model, params: Any, cost: Cost) -> Iterator[Row]:
        """A row per text: how far `params` are from the reference."""
        kept = ("kld", "kld_stderr", "delta_nll", "delta_nll_stderr", "same_top")
        for text, (windows, reference) in self.heldout.items():
            found = numbers(evaluate(model, windows, params=params, reference=reference))
            row = {"text": text, "case": case, "column": column, **{name: found[name] for name in kept}, **cost}
            print("  ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            yield row


def encoder(repeats: int) -> dict[str, Any]:
    """All cases, each once (`repeats` is for shorter suites)."""
    model = load_model(_MODEL.value)
    fit = data.windows(_CALIBRATED_ON.value, model.tokenizer, context=_CONTEXT, count=_CALIBRATION.value)
    heldout = {}
    for text in _TEXTS.value:
        windows = data.windows(text, model.tokenizer, context=_CONTEXT, count=_HELDOUT.value, split="heldout")
        heldout[Path(text).name] = windows, reference_of(model, windows)
    cost, stats = _cost(lambda: calibrate(model, fit))
    bench = Bench(model, fit, stats, heldout)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "F16.gguf"
        export_gguf(model, Allocation.uniform(model, "F16"), source)
        for case in _CASES.value:
            rows += _case(bench, case, source, Path(folder))
    costs = {"calibration": cost, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    save_plots({"encoder": lambda: plot(rows)})
    print(table(rows))
    of_calibration = {"calibrated_on": _CALIBRATED_ON.value, "calibration_tokens": fit.size}
    return {"model": _MODEL.value, **of_calibration, **costs, "ratios": ratios(rows), "rows": rows}


def _case(bench: Bench, case: str, source: Path, folder: Path) -> list[Row]:
    model, rows, path = bench.model, [], folder / "llama.gguf"
    importance = importance_of(model.spec, bench.stats)
    level = _level(case)
    uniform = None if level is None else _uniform(model, level)
    base, types = ("Q4_0", uniform.formats) if uniform else (case, {"token_embd.weight": "F16"})
    cost, _ = _cost(lambda: llama_quantize.quantize(source, path, base, importance, types))
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    allocation = Allocation(model.spec, model.metadata, {t.name: stored[t.name] for t in allocatable(model.spec)})
    theirs = load_model(str(path))
    rows += bench.scored(case, _THEIRS, theirs, theirs.params, cost)
    best = Encoder("best", importance)
    unweighted = not any(get_format(fmt).needs_importance for fmt in allocation.formats.values())
    for column, encoder in (({"plain": REFERENCE} if unweighted else {}) | {"best": best}).items():
        rows += _rounded(bench, case, column, model, allocation, encoder, {})
    fold_level = level if isinstance(level, float) else _FOLD_LEVEL
    cost, (folded, _) = _cost(lambda: calibrate_and_fold(model, bench.fit, fold_level))
    rows += _rounded(bench, case, "best, folded", folded, allocation, best, cost)
    compensated = make_encoder("compensated", bench.fit, importance=importance)
    rows += _rounded(bench, case, "compensated, folded", folded, allocation, compensated, cost)
    return rows


def _level(case: str) -> float | str | None:
    """The level that a case names, None for a mix."""
    if case.startswith(_UNIFORM):
        return case.removeprefix(_UNIFORM)
    return float(case) if case.replace(".", "", 1).isdigit() else None


def _rounded(
    bench: Bench, case: str, column: str, model: Model, allocation: Allocation, encoder: Encoder, before: Cost
) -> Iterator[Row]:
    allocation = dataclasses.replace(allocation, folding=model.folding)
    cost, params = _cost(lambda: jax.block_until_ready(fake_quantize(model, allocation, encoder)))
    return bench.scored(case, column, model, params, {name: cost[name] + before.get(name, 0.0) for name in cost})


def _uniform(model: Model, level: float | str) -> Allocation:
    """Every block tensor at the level where it can hold the rows, all else F16."""

    def name(n_in: int) -> str:
        fmt = format_for(level, n_in)
        return "F16" if fmt is None else fmt.name

    formats = {t.name: "F16" if t.layer is None else name(t.shape[-1]) for t in allocatable(model.spec)}
    return Allocation(model.spec, model.metadata, formats)


def _cost(run: Callable[[], Any]) -> tuple[Cost, Any]:
    """Seconds on the clock, and of all cores; compilation included."""
    before = time.process_time()
    seconds, result = timed(run)
    return {"seconds": seconds, "cpu_seconds": time.process_time() - before}, result


def ratios(rows: list[Row]) -> list[Row]:
    """Mean KL divergence of every column over llama-quantize's, a row per text and case."""
    kld = {(row["text"], row["case"], row["column"]): row["kld"] for row in rows}
    columns = dict.fromkeys(column for _, _, column in kld)
    return [
        {"text": text, "case": case}
        | {c: kld[text, case, c] / kld[text, case, _THEIRS] for c in columns if c != _THEIRS and (text, case, c) in kld}
        for text, case in dict.fromkeys((text, case) for text, case, _ in kld)
    ]


def table(rows: list[Row]) -> str:
    """Mean KL divergence, one line per text and case, and over llama-quantize's."""
    columns, lines = list(dict.fromkeys(row["column"] for row in rows)), []
    lines.append("text and case".ljust(32) + "".join(column.rjust(24) for column in columns))
    for text, case in dict.fromkeys((row["text"], row["case"]) for row in rows):
        kld = {row["column"]: row["kld"] for row in rows if (row["text"], row["case"]) == (text, case)}
        cells = [f"{kld[c]:.5f} ({kld[c] / kld[_THEIRS]:.2f})" if c in kld else "–" for c in columns]
        lines.append(f"{text} {case}".ljust(32) + "".join(cell.rjust(24) for cell in cells))
    return "\n".join(lines)


def plot(rows: list[Row]) -> Figure:
    """Mean KL divergence of every column over llama-quantize's, by case and text; half of it is the aim."""
    found = ratios(rows)
    figure = Figure(figsize=(max(8.0, 1.2 * len(found)), 4), layout="constrained")
    axes = figure.subplots()
    for i, column in enumerate(column for column in dict.fromkeys(row["column"] for row in rows) if column != _THEIRS):
        heights = [row.get(column, np.nan) for row in found]
        axes.bar(np.arange(len(found)) + 0.15 * i, heights, 0.15, label=column)
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle="--")
    several = len({row["text"] for row in found}) > 1
    labels = [f"{row['case']}\n{row['text']}" if several else row["case"] for row in found]
    axes.set(xticks=np.arange(len(found)) + 0.3, xticklabels=labels, ylabel=f"mean KL divergence / {_THEIRS}")
    figure.legend(loc="outside upper center", ncols=4)
    return figure

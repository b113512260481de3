"""The suite `paper` of launch/benchmark.py: the RAMP paper's own comparison, by proxy.

The paper claims files 6 % smaller than those of 4-bit AWQ and GPTQ, with a perplexity 1 to 3 % lower than both. Here
`AWQ` is uniform INT4 in groups of 128, folded for that format; AWQ's clipping is left out. `GPTQ` is the same format
without folding, compensated as our own files are, which goes on where GPTQ ends: H is shrunk and the codes descend.
`GPTQ, 3 bits` is that in INT3. A group has 32 bits beside its codes, as the paper counts: a scale and a zero point in
f16. Where 128 does not divide a row, 64 or 32 is the group. As in the papers, embedding and head stay in F16, on both
sides: `RAMP` has `--paper_share` of what all other matrices take in 4 bits, and is chosen by `--paper_policy` among
GGUF formats, folded and compensated as users get it. `RAMP, free` chooses formats for embedding and head too, in that
share of the whole 4-bit file.

Every seed calibrates on other windows of `--paper_calibrated_on`; what is scored is the held-out part of each text.
Standard errors are over tokens, of the mean over seeds. The claim holds on a text where the perplexity is at least 1 %
and two standard errors below both, and the file, or what blocks' matrices take of it, at least 6 % smaller. `kept` is
the share of the unquantized model's accuracy on the offline task `passages`.
"""

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from benchmarks.measuring import Numbers
from jaxtyping import Int

from ramp_jax import data
from ramp_jax.allocation import Allocation, tensor_bytes, worthwhile
from ramp_jax.allocators.allocator import has_own_levels
from ramp_jax.formats import DEFAULT_LEVELS, Format, get_format
from ramp_jax.models import DecoderSpec, Model, allocatable, load_model
from ramp_jax.models.decoder import Params
from ramp_jax.overrides import Override
from ramp_jax.policy import inference
from ramp_jax.policy.inference import find_allocator
from ramp_jax.quantization import REFERENCE, Stats, calibrate_and_fold, fake_quantize, importance_of, make_encoder
from ramp_jax.scoring import questions
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of
from ramp_jax.scoring.scores import Evaluation, numbers

_MODELS = flags.DEFINE_list("paper_models", ["smollm2-135m", "ref-llama", "ref-qwen3"], "Models of the suite `paper`.")
_CALIBRATED_ON = flags.DEFINE_string("paper_calibrated_on", "builtin", "Text that all methods are calibrated on.")
_TEXTS = flags.DEFINE_list("paper_texts", ["builtin", "code"], "Texts that it scores, files too.")
_SEEDS = flags.DEFINE_integer("paper_seeds", 3, "Sets of calibration windows.", lower_bound=1)
_CALIBRATION = flags.DEFINE_integer("paper_calibration", 16, "Calibration windows of a seed.", lower_bound=1)
_HELDOUT = flags.DEFINE_integer("paper_heldout", 8, "Scored windows of each text.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("paper_context", 512, "Tokens of every window.", lower_bound=2)
_POLICY = flags.DEFINE_string("paper_policy", "fisher", "Who allocates, as --source_policy.")
_SHARE = flags.DEFINE_float("paper_share", 0.94, "Of the bytes of 4-bit matrices, what RAMP may have.", lower_bound=0)
_QUESTIONS = flags.DEFINE_integer("paper_questions", 100, "Questions of the task `passages`; 0: none.", lower_bound=0)

GROUPS = (128, 64, 32)
AWQ, GPTQ, GPTQ3, RAMP, FREE = "AWQ", "GPTQ", "GPTQ, 3 bits", "RAMP", "RAMP, free"
_GAIN, _SMALLER = 0.99, 0.94  # of the others' perplexity and bytes, that the claim allows at most


class Made(NamedTuple):
    """What a method makes of a model, folded as it is: formats of its allocatable matrices, and decoded weights."""

    method: str
    model: Model
    formats: Mapping[str, str]
    params: Params


class Bench(NamedTuple):
    """A model, the held-out windows of every text with what it predicts there, and its accuracy where that is asked."""

    model: Model
    heldout: Mapping[str, Int[np.ndarray, "W T"]]
    reference: Mapping[str, Reference]
    accuracy: float | None


def paper(repeats: int) -> Numbers:
    """Means over seeds, what becomes of the claim, and every seed's rows; `repeats` is not used, nothing is timed."""
    del repeats
    found: dict[str, list[Numbers]] = {"means": [], "claims": [], "rows": []}
    for ref in _MODELS.value:
        for name, rows in _on_model(ref).items():
            found[name] += rows
    return {"calibrated_on": _CALIBRATED_ON.value, "policy": _POLICY.value, "share": _SHARE.value} | found


def _on_model(ref: str) -> dict[str, list[Numbers]]:
    bench, rows = _bench(load_model(ref)), []
    scored: dict[tuple[str, str], list[Evaluation]] = collections.defaultdict(list)
    for seed, fit in enumerate(_calibrations(bench.model)):
        for made in _methods(bench.model, fit):
            sizes, answers = _sizes(made), _answers(bench, made)
            for text, windows in bench.heldout.items():
                found = evaluate(made.model, windows, params=made.params, reference=bench.reference[text])
                scored[text, made.method].append(found)
                row = {"model": Path(ref).name, "text": text, "method": made.method, "seed": seed}
                rows.append(row | sizes | _losses(found) | answers)
                print(_line(rows[-1]), flush=True)
    averaged = {(text, method): over_seeds(found) for (text, method), found in scored.items()}
    means = [_mean(rows, text, method, found) for (text, method), found in averaged.items()]
    claims = [claim(means, averaged, text, method) for text in bench.heldout for method in (RAMP, FREE)]
    print(table(means), *map(verdict, claims), sep="\n", flush=True)
    return {"means": means, "claims": claims, "rows": rows}


def _bench(model: Model) -> Bench:
    how = {"context": _CONTEXT.value, "count": _HELDOUT.value}
    heldout = {Path(t).name: data.windows(t, model.tokenizer, split="heldout", **how) for t in _TEXTS.value}
    reference = {text: reference_of(model, windows) for text, windows in heldout.items()}
    return Bench(model, heldout, reference, _accuracy(model) if _QUESTIONS.value else None)


def _calibrations(model: Model) -> list[Int[np.ndarray, "W T"]]:
    """Windows of every seed; each set is spread over the whole text."""
    seeds = _SEEDS.value
    count = seeds * _CALIBRATION.value
    windows = data.windows(_CALIBRATED_ON.value, model.tokenizer, context=_CONTEXT.value, count=count)
    return [windows[seed::seeds] for seed in range(seeds)]


def _methods(model: Model, fit: Int[np.ndarray, "W T"]) -> Iterator[Made]:
    """One method after the other: decoded weights of one exist at a time."""
    four, three = uniform(model.spec, 4), uniform(model.spec, 3)
    folded, stats = calibrate_and_fold(model, fit, functools.partial(group_format, 4))
    compensated = make_encoder("compensated", fit, importance=importance_of(model.spec, stats))
    for method, source, formats, encoder in (
        (AWQ, folded, four, REFERENCE),
        (GPTQ, model, four, compensated),
        (GPTQ3, model, three, compensated),
    ):
        yield Made(method, source, formats, fake_quantize(source, Allocation.of(source, formats), encoder))
    folded, stats = calibrate_and_fold(model, fit, find_allocator(_POLICY.value).fold_level)
    for method, budget, overrides in (
        (RAMP, budget_of(model, _SHARE.value), in_f16(model.spec)),
        (FREE, int(_SHARE.value * budget_of(model, 1.0)), ()),
    ):
        allocation = _allocated(folded, stats, budget, overrides)
        yield Made(method, folded, allocation.formats, fake_quantize(folded, allocation, compensated))


def _allocated(model: Model, stats: Stats, budget: int, overrides: Sequence[Override]) -> Allocation:
    offered = worthwhile(model, DEFAULT_LEVELS, budget, overrides)
    allocator = find_allocator(_POLICY.value, levels=None if has_own_levels(_POLICY.value) else offered)
    return inference.allocate(allocator, model, stats, budget_bytes=budget, overrides=overrides)


def group_format(bits: int, n_in: int) -> Format:
    """`INT{bits}` in the largest groups that divide rows of `n_in` weights, which are multiples of 32."""
    return get_format(f"INT{bits}_G{max(group for group in GROUPS if n_in % group == 0)}")


def uniform(spec: DecoderSpec, bits: int) -> dict[str, str]:
    """Of all allocatable matrices: those of blocks in groups, embedding and head in F16."""
    return {t.name: "F16" if t.layer is None else group_format(bits, t.shape[-1]).name for t in allocatable(spec)}


def linear_bytes(spec: DecoderSpec, formats: Mapping[str, str]) -> int:
    """Bytes of the matrices of blocks that are allocatable."""
    return sum(tensor_bytes(t, formats[t.name]) for t in allocatable(spec) if t.layer is not None)


def file_bytes(model: Model, formats: Mapping[str, str]) -> int:
    """Bytes of a GGUF with such tensors, whether or not it has types for them."""
    beyond = (tensor_bytes(t, formats[t.name]) - tensor_bytes(t, "F16") for t in allocatable(model.spec))
    return Allocation.uniform(model, "F16").file_bytes + sum(beyond)


def budget_of(model: Model, share: float) -> int:
    """Bytes of a file whose blocks' matrices take `share` of what they take in 4 bits, all else in F16."""
    four = uniform(model.spec, 4)
    taken = linear_bytes(model.spec, four)
    return file_bytes(model, four) - taken + int(share * taken)


def in_f16(spec: DecoderSpec) -> list[Override]:
    """Embedding and head stay as they are."""
    names = [t.name for t in allocatable(spec) if t.layer is None]
    return [Override(kind="keep", pattern=name, format="F16") for name in names]


def _sizes(made: Made) -> Numbers:
    spec = made.model.spec
    return {"bytes": file_bytes(made.model, made.formats), "linear_bytes": linear_bytes(spec, made.formats)}


def _losses(scored: Evaluation) -> Numbers:
    found = numbers(scored)
    return {key: found[key] for key in ("ppl", "delta_nll", "delta_nll_stderr", "kld", "kld_stderr")}


def _answers(bench: Bench, made: Made) -> Numbers:
    """Accuracy, and the share of the unquantized model's; nothing where no questions are asked."""
    if bench.accuracy is None:
        return {}
    found = _accuracy(dataclasses.replace(made.model, params=made.params))
    return {"accuracy": found, "kept": found / bench.accuracy if bench.accuracy else math.nan}


def _accuracy(model: Model) -> float:
    from ramp_jax.scoring.tasks import accuracies, compared

    found = accuracies(model, [questions.TASK], limit=_QUESTIONS.value)
    return compared(found, None)[questions.TASK]["score"]


def over_seeds(scored: Sequence[Evaluation]) -> Evaluation:
    """The mean of every token's numbers: seeds share their tokens, and so count once in standard errors."""
    columns = zip(*(vars(one).values() for one in scored), strict=True)
    return Evaluation(*(np.mean(parts, axis=0, dtype=np.float64) for parts in columns))


def _mean(rows: Sequence[Numbers], text: str, method: str, scored: Evaluation) -> Numbers:
    """A row over seeds; `ppl_range` is that of the seeds' perplexities."""
    mine = [row for row in rows if (row["text"], row["method"]) == (text, method)]
    ppl = [row["ppl"] for row in mine]
    found = {key: mine[0][key] for key in ("model", "text", "method")}
    found |= {key: round(statistics.mean(row[key] for row in mine)) for key in ("bytes", "linear_bytes")}
    found |= _losses(scored) | {"ppl_range": max(ppl) - min(ppl)}
    return found | {key: statistics.mean(row[key] for row in mine) for key in ("accuracy", "kept") if key in mine[0]}


def claim(means: Sequence[Numbers], scored: Mapping[tuple[str, str], Evaluation], text: str, method: str) -> Numbers:
    """Bytes and perplexity over those of 4-bit AWQ and GPTQ, and whether that is what the paper says: of bytes, those
    of the file or those of the blocks' matrices."""
    by = {row["method"]: row for row in means if row["text"] == text}
    found = {"model": by[method]["model"], "text": text, "method": method}
    found |= {f"{size}_over_4_bits": by[method][size] / by[AWQ][size] for size in ("bytes", "linear_bytes")}
    holds = min(found["bytes_over_4_bits"], found["linear_bytes_over_4_bits"]) <= _SMALLER
    for other in (AWQ, GPTQ):
        change = numbers(dataclasses.replace(scored[text, method], ref_nll=scored[text, other].nll))
        ratio = math.exp(change["delta_nll"])
        stderr = ratio * change["delta_nll_stderr"]
        found |= {f"ppl_over_{other}": ratio, f"ppl_over_{other}_stderr": stderr}
        holds = holds and ratio <= min(_GAIN, 1 - 2 * stderr)
    return found | {"holds": holds}


def table(means: Sequence[Numbers]) -> str:
    """A line per text and method; beside the perplexity stands half of its range over seeds."""
    names = f"{'model':14}{'text':14}{'method':14}{'bytes':>13}{'linear bytes':>14}{'perplexity':>17}"
    return "\n".join([f"{names}{'delta nll':>18}{'KL':>20}{'kept':>9}", *map(_line, means)])


def _line(row: Numbers) -> str:
    spread = f" ± {row['ppl_range'] / 2:.3f}" if row.get("ppl_range") else ""
    return (
        f"{row['model']:14}{row['text'][:13]:14}{row['method']:14}{row['bytes']:>13,}{row['linear_bytes']:>14,}"
        f"{row['ppl']:>9.3f}{spread:8}{row['delta_nll']:>+9.4f} ± {row['delta_nll_stderr']:.4f}"
        f"{row['kld']:>10.5f} ± {row['kld_stderr']:.5f}" + (f"{row['kept']:>9.1%}" if "kept" in row else "")
    )


def verdict(row: Numbers) -> str:
    """One sentence on a claim."""
    ratios = (f"{row[f'ppl_over_{other}']:.4f} ± {row[f'ppl_over_{other}_stderr']:.4f}" for other in (AWQ, GPTQ))
    return (
        f"{row['model']}, {row['text']}, {row['method']}: {row['bytes_over_4_bits']:.1%} of the 4-bit file, "
        f"{row['linear_bytes_over_4_bits']:.1%} of its blocks' matrices; perplexity {next(ratios)} of AWQ's, "
        f"{next(ratios)} of GPTQ's: the claim {'holds' if row['holds'] else 'does not hold'}."
    )

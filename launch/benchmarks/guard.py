"""The suite `guard` of launch/benchmark.py: is a file ever worse than the largest of llama.cpp's mixes that fits?

The sizes of llama.cpp's mixes are the budgets. Every model of `--guard_models` is calibrated on every text of
`--guard_texts`, allocated by `--guard_policy` among numbered levels, IQ2 and IQ3 at every size (if it takes any), and
rounded by `--guard_encoder`, and scored on the part of the text that calibration does not see, beside the mix with an
importance matrix of the same windows. `beyond` is how much more KL divergence our file has, `stderr` the standard error
of that over tokens; a regression is more than one of it. `ratio` is the mean of our KL divergences over the mixes'.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from benchmarks.measuring import Numbers

from ramp_jax import data
from ramp_jax.allocation import costs, from_levels
from ramp_jax.allocators.allocator import has_own_levels
from ramp_jax.formats import DEFAULT_LEVELS
from ramp_jax.formats.check import EncodeCache
from ramp_jax.halo.llama_quantize import Mixes, predicted_bytes
from ramp_jax.models import load_model
from ramp_jax.policy import inference
from ramp_jax.policy.inference import find_allocator
from ramp_jax.quantization import Encoder, calibrate_and_fold, fake_quantize, importance_of, make_encoder
from ramp_jax.scoring.perplexity import evaluate, reference_of
from ramp_jax.scoring.scores import Evaluation, paired

_MODELS = flags.DEFINE_list("guard_models", ["smollm2-135m", "ref-llama"], "Models of the suite `guard`.")
_TEXTS = flags.DEFINE_list("guard_texts", ["builtin", "code", "mixture"], "Texts that it calibrates and scores on.")
_POLICY = flags.DEFINE_string("guard_policy", "pretrained", "Who allocates, as --source_policy.")
_ENCODER = flags.DEFINE_enum("guard_encoder", "best", ["best", "compensated"], "How our files are rounded.")

_CALIBRATION, _HELDOUT = {"context": 512, "count": 8}, {"context": 512, "count": 4}


def guard(repeats: int) -> Numbers:
    """A row per model, text and budget, printed as they come; `repeats` is not used, nothing is timed."""
    del repeats
    rows = [row for ref in _MODELS.value for text in _TEXTS.value for row in _rows(ref, text)]
    worse = sum(row["beyond"] > row["stderr"] for row in rows)
    ratio = statistics.mean(row["kld"] / row["mix_kld"] for row in rows)
    how = {"policy": _POLICY.value, "encoder": _ENCODER.value}
    return how | {"pairs": len(rows), "regressions": worse, "ratio": ratio, "rows": rows}


def _rows(ref: str, text: str) -> Iterator[Numbers]:
    levels = None if has_own_levels(_POLICY.value) else DEFAULT_LEVELS
    allocator, model = find_allocator(_POLICY.value, levels=levels), load_model(ref)
    heldout = data.windows(text, model.tokenizer, split="heldout", **_HELDOUT)
    reference = reference_of(model, heldout)
    windows = data.windows(text, model.tokenizer, **_CALIBRATION)
    folded, stats = calibrate_and_fold(model, windows, allocator.fold_level)
    importance = importance_of(model.spec, stats)
    sizes = costs(folded, allocator.levels)
    known = inference.problem(folded, stats, allocator.levels, sizes)
    encoder = Encoder("best", importance, EncodeCache(1 << 33))
    if _ENCODER.value == "compensated":
        encoder = make_encoder("compensated", windows, importance=importance)
    with tempfile.TemporaryDirectory() as folder:
        mixes = Mixes.of(model, importance, Path(folder))
        budgets = predicted_bytes(*mixes)
        for budget in sorted({size for size in budgets.values() if sizes.smallest <= size <= sizes.largest}):
            mix = mixes.below(budget)
            path = mixes.write(mix)
            theirs = evaluate(load_model(str(path)), heldout, reference=reference, doing=f"scoring {mix}")
            path.unlink()
            actions = allocator.choose(known, sizes.units(budget))
            allocation = from_levels(folded, [allocator.levels[action] for action in actions])
            allocation = dataclasses.replace(allocation, folding=folded.folding)
            params = fake_quantize(folded, allocation, encoder)
            ours = evaluate(folded, heldout, params=params, reference=reference, doing="scoring")
            yield _said(ref, text, budget, mix, allocation.file_bytes, ours, theirs)


def _said(ref: str, text: str, budget: int, mix: str, size: int, ours: Evaluation, theirs: Evaluation) -> Numbers:
    beyond, stderr = paired(ours, theirs)
    row = {"model": ref, "text": text, "budget": budget, "bytes": size, "kld": ours.mean_kld, "mix": mix}
    row |= {"mix_kld": theirs.mean_kld, "beyond": beyond, "stderr": stderr}
    print(
        f"{ref} {text:8} {size:>12,} of {budget:>12,}  KL {ours.mean_kld:.5f}  {mix} {theirs.mean_kld:.5f}  "
        f"{beyond:+.5f} ± {stderr:.5f}{'  WORSE' if beyond > stderr else ''}",
        flush=True,
    )
    return row

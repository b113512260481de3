"""The suite `memory` of launch/benchmark.py: memory, seconds and sweeps over the weights of every script.

A model is allocated on 8 windows of 512 tokens, exported by encoders that calibrate, and the first file evaluated on as
many held-out windows beside the model, each in a process of its own. `peak_gb` is the most that it had resident, in
10^9 bytes, pages of memory-mapped files among it, and `peak_over_checkpoint` that over the bytes of the model's files.
Llama-2-7B takes 30 GB of disk:

    python launch/benchmark.py --suite=memory --memory_models=llama-2-7b --synthetic_folder=FOLDER
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from absl import flags
from benchmarks import watched
from benchmarks.measuring import Numbers, said, timed
from benchmarks.synthetic import KNOWN, checkpoint, workspace
from benchmarks.watched import Took

from ramp_jax.models.references import model_files

_MODELS = flags.DEFINE_list(
    "memory_models", ["smollm2-135m", "qwen2.5-1.5b"], f"Models; weights of {', '.join(KNOWN)} are made up."
)
_POLICY = flags.DEFINE_string("memory_policy", "fisher", "Who allocates, as --source_policy of launch/allocate.py.")
_ENCODERS = flags.DEFINE_list("memory_encoders", ["best", "compensated"], "Encoders of the exports.")

BITS = 5.0
"""Mean bits per weight of the allocations."""
CONTEXT, COUNT = 512, 8
"""Windows that are calibrated and evaluated on."""


def memory(repeats: int) -> dict[str, list[Numbers]]:
    """A row per model and script; `repeats` is not used, memory does not vary."""
    del repeats
    rows = []
    with workspace() as folder:
        for name in _MODELS.value:
            ref = checkpoint(name, folder)
            size = sum(file.stat().st_size for file in model_files(ref))
            rows += [said({"model": name, "command": command} | _row(run, size)) for command, run in _runs(ref, folder)]
    return {"rows": rows}


def _runs(ref: str, folder: Path) -> list[tuple[str, Callable[[], Took]]]:
    """What each row runs, in an order in which every script finds its inputs."""
    allocation = folder / "alloc.json"
    files = {encoder: folder / f"{encoder}.gguf" for encoder in _ENCODERS.value}
    exports = [
        (f"export --encoder={encoder}", functools.partial(export, ref, allocation, file, encoder))
        for encoder, file in files.items()
    ]
    return [
        ("allocate", lambda: allocate(ref, allocation, _POLICY.value)),
        *exports,
        ("evaluate --reference", lambda: _evaluate(next(iter(files.values())), ref)),
    ]


def _row(run: Callable[[], Took], checkpoint_bytes: int) -> Numbers:
    seconds, took = timed(run)
    return {
        "seconds": seconds,
        "cpu_seconds": took.cpu_seconds,
        "peak_gb": took.peak_bytes / 1e9,
        "peak_over_checkpoint": took.peak_bytes / checkpoint_bytes,
        "sweeps": took.sweeps,
        "sweep_seconds": took.sweep_seconds,
        "programs": took.programs,
        "compile_seconds": took.compile_seconds,
    }


def allocate(ref: str, output: Path, policy: str, settings: Mapping[str, str] | None = None) -> Took:
    """Allocate `BITS` on the first windows of the built-in text."""
    windows = (f"--context={CONTEXT}", f"--count={COUNT}")
    how = (f"--model={ref}", f"--source_policy={policy}", f"--budget_bits={BITS}", f"--output={output}")
    return watched.run("allocate", *how, *windows, settings=settings)


def export(ref: str, allocation: Path, output: Path, encoder: str, settings: Mapping[str, str] | None = None) -> Took:
    """Export a GGUF, whose importance comes from the windows that the allocation records."""
    how = (f"--model={ref}", f"--allocation={allocation}", f"--output={output}", "--overwrite", f"--encoder={encoder}")
    return watched.run("export_gguf", *how, settings=settings)


def _evaluate(model: Path, reference: str) -> Took:
    windows = (f"--context={CONTEXT}", f"--count={COUNT}")
    return watched.run("evaluate", f"--model={model}", f"--reference={reference}", *windows)

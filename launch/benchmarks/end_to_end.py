"""The suite `end_to_end` of launch/benchmark.py: seconds from a checkpoint to a file, beside llama.cpp's.

Here `allocate` and `export`, each from the start of its process to its end; in llama.cpp a forward pass of the F16 file
over the same calibration tokens with every token's logits, as llama-imatrix makes it, and `llama_model_quantize` to
Q4_K_M with an importance matrix. Loading the file counts, starting a process and counting importance do not. All take
turns. In the first turn nothing is compiled before, in the others everything: programs are kept in a new folder, where
the second export finds those of the first.
"""

import statistics
from pathlib import Path

import numpy as np
from absl import flags
from benchmarks import memory
from benchmarks.measuring import Numbers, said, turns
from benchmarks.synthetic import KNOWN, checkpoint, workspace
from jaxtyping import Int

from ramp_jax import workflow
from ramp_jax.allocation import Allocation
from ramp_jax.config import WindowsConfig
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.llama_quantize import quantize
from ramp_jax.halo.verify import session
from ramp_jax.models import load_model, matrices
from ramp_jax.quantization.importance import Importance

_MODELS = flags.DEFINE_list(
    "end_to_end_models", ["smollm2-135m", "qwen2.5-1.5b"], f"Models; weights of {', '.join(KNOWN)} are made up."
)
_POLICY = flags.DEFINE_string("end_to_end_policy", "fisher", "Who allocates, as --source_policy of launch/allocate.py.")

_MIX = "Q4_K_M"


def end_to_end(repeats: int) -> dict[str, list[Numbers]]:
    """A row per model: medians of `repeats` turns, their ratios, and the turn before them."""
    with workspace() as folder:
        return {"rows": [said(_row(name, folder, repeats)) for name in _MODELS.value]}


def _row(name: str, parent: Path, repeats: int) -> Numbers:
    ref, folder = checkpoint(name, parent), parent / Path(name).name
    folder.mkdir()
    source, allocation = folder / "F16.gguf", folder / "alloc.json"
    ids, importance = _prepared(ref, source)
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    here = {
        "allocate": lambda: memory.allocate(ref, allocation, _POLICY.value, compiled),
        "best": lambda: memory.export(ref, allocation, folder / "best.gguf", "best", compiled),
        "compensated": lambda: memory.export(ref, allocation, folder / "compensated.gguf", "compensated", compiled),
    }
    there = {
        "llama.cpp forward": lambda: _forward(source, ids),
        "llama.cpp quantize": lambda: quantize(source, folder / "mix.gguf", _MIX, importance),
    }
    taken = turns(here | there, repeats)
    seconds = {step: statistics.median(values[1:]) for step, values in taken.items()}
    theirs = sum(seconds[step] for step in there)
    ratios = {f"{how} over llama.cpp": (seconds["allocate"] + seconds[how]) / theirs for how in ("best", "compensated")}
    return {"model": name} | seconds | ratios | {f"{step}, not compiled before": taken[step][0] for step in here}


def _prepared(ref: str, source: Path) -> tuple[Int[np.ndarray, "W T"], Importance]:
    """Write the F16 file; returns the calibration tokens, and an importance matrix whose values matter to no clock."""
    model = load_model(ref, "stored")
    export_gguf(model, Allocation.uniform(model, "F16"), source)
    ids = workflow.tokens(model, WindowsConfig("builtin", memory.CONTEXT, memory.COUNT), "calibration")
    return ids, {tensor.name: np.ones(tensor.shape[-1], np.float32) for tensor in matrices(model.spec)}


def _forward(source: Path, ids: Int[np.ndarray, "W T"]) -> None:
    with session(source, ids.shape[1]) as (run, _):
        for window in ids:
            run(window, range(len(window)))

"""The suite `footprint` of launch/benchmark.py: memory as predicted beside what llama.cpp logs on loading, in MiB.

Files of five models at level 8, whose weights are holes, at four contexts. Parts are file, KV cache, compute buffer and
output buffer.
"""

import dataclasses
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from benchmarks.measuring import Numbers, said
from benchmarks.sizes import at_level, without_weights

from ramp_jax.halo.export import write_skeleton
from ramp_jax.halo.footprint import Runtime, footprint
from ramp_jax.halo.llama_quantize import captured_log
from ramp_jax.models import Model, load_model
from ramp_jax.models.metadata import typed

KNOWN = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-0.6B", "google/gemma-3-270m")
REAL = "smollm2-135m"
CONTEXTS = (100, 1000, 4096, 8192)

_MIB = 1 << 20


class Loaded:
    """A file whose weights are holes and that has no vocabulary, in llama.cpp; needs the `verify` extra."""

    def __init__(self, model: Model, path: Path) -> None:
        import llama_cpp

        sizeless = {
            "tokenizer.ggml.model": "none",
            f"{model.spec.architecture}.vocab_size": np.uint32(model.spec.vocab_size),
        }
        self.spec, self.allocation = model.spec, at_level(model, 8)
        self.allocation = dataclasses.replace(self.allocation, metadata=model.metadata | typed(sizeless))
        write_skeleton(model, self.allocation, path)
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        with captured_log() as log:
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        self.weights = sum(map(float, re.findall(r"model buffer size = +([\d.]+) MiB", "".join(log))))

    def taken(self, runtime: Runtime) -> dict[str, float]:
        """MiB by the kind of the buffer, as llama.cpp logs them when it is asked to run like that."""
        import llama_cpp

        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.swa_full = runtime.context * runtime.parallel, runtime.parallel, False
        types = {name: int(getattr(llama_cpp, f"GGML_TYPE_{name.upper()}")) for name in (runtime.keys, runtime.values)}
        params.type_k, params.type_v = types[runtime.keys], types[runtime.values]
        params.flash_attn_type = int(runtime.flash_attention)
        with captured_log() as log:
            llama_cpp.llama_free(llama_cpp.llama_init_from_model(self.model, params))
        mib: dict[str, float] = {}
        for name, size in re.findall(r"(KV|output|compute) buffer size = +([\d.]+) MiB", "".join(log)):
            mib[name] = mib.get(name, 0.0) + float(size)
        return mib

    def close(self) -> None:
        """Give it up."""
        import llama_cpp

        llama_cpp.llama_model_free(self.model)


def loaded(name: str, folder: Path) -> Loaded:
    """A model of the suite as a file in the folder."""
    model = load_model(name) if name == REAL else without_weights(name)
    return Loaded(model, folder / "model.gguf")


def footprints(repeats: int) -> list[Numbers]:
    """A row per model and context; `repeats` is not used, nothing is timed."""
    del repeats
    rows = []
    for name in (*KNOWN, REAL):
        with tempfile.TemporaryDirectory() as folder:
            one = loaded(name, Path(folder))
            rows += [said(row(name, one, context)) for context in CONTEXTS]
            one.close()
    return rows


def row(name: str, one: Loaded, context: int) -> Numbers:
    """What is predicted and what llama.cpp says."""
    runtime = Runtime(context)
    beside, mib = footprint(one.spec, runtime), one.taken(runtime)
    parts = (one.allocation.file_bytes, beside.cache, beside.compute, beside.output)
    predicted, reported = sum(parts) / _MIB, one.weights + sum(mib.values())
    return {
        "model": name,
        "context": context,
        "predicted": predicted,
        "reported": reported,
        "off": f"{predicted / reported - 1:+.2%}",
        "predicted parts": ", ".join(f"{part / _MIB:.2f}" for part in parts),
        "reported parts": ", ".join(
            f"{mib_of:.2f}" for mib_of in (one.weights, mib["KV"], mib["compute"], mib["output"])
        ),
    }

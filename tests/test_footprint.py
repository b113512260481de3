"""Memory beside the weights, against what llama.cpp says on loading that it takes."""

import collections
import dataclasses
import os
import re

import llama_cpp
import numpy as np
import pytest
from benchmarks import sizes, zoo

from ramp_jax.allocation import costs
from ramp_jax.halo.export import write_skeleton
from ramp_jax.halo.footprint import KV_TYPES, Runtime, bytes_that_fit, footprint, runtime_bytes
from ramp_jax.halo.llama_quantize import captured_log
from ramp_jax.models import Model, load_model
from ramp_jax.models.metadata import typed
from ramp_jax.models.spec import describe, spec_from_hf

KNOWN = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-0.6B", "google/gemma-3-270m")
KINDS = ("llama-bias", "mistral-window", "smollm3", "gemma2", "phi3", "olmo2", "granite", "ministral3")
TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


def of_kind(name):
    """A tiny model of a family, wider than its heads are, without weights."""
    config = zoo.hf_model(name).config.to_dict() | {"architectures": [zoo.ZOO[name].hf]}
    spec = dataclasses.replace(spec_from_hf(config), context_length=8192)
    return Model(spec, {}, describe(spec, name, 1))


class Loaded:
    """A file whose weights are holes and that has no vocabulary, in llama.cpp."""

    def __init__(self, model, path):
        sizeless = {
            "tokenizer.ggml.model": "none",
            f"{model.spec.architecture}.vocab_size": np.uint32(model.spec.vocab_size),
        }
        self.spec, self.allocation = model.spec, sizes.at_level(model, 8)
        self.allocation = dataclasses.replace(self.allocation, metadata=model.metadata | typed(sizeless))
        write_skeleton(model, self.allocation, path)
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        with captured_log() as log:
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        self.weights = sum(map(float, re.findall(r"model buffer size = +([\d.]+) MiB", "".join(log))))

    def taken(self, runtime):
        """MiB by the kind of the buffer, as llama.cpp logs them when it is asked to run like that."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.swa_full = runtime.context * runtime.parallel, runtime.parallel, False
        params.type_k, params.type_v = TYPES[runtime.keys], TYPES[runtime.values]
        params.flash_attn_type = int(runtime.flash_attention)
        with captured_log() as log:
            llama_cpp.llama_free(llama_cpp.llama_init_from_model(self.model, params))
        mib = collections.Counter()
        for name, size in re.findall(r"(KV|output|compute) buffer size = +([\d.]+) MiB", "".join(log)):
            mib[name] += float(size)
        return mib


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    kept = {}

    def get(name):
        if name not in kept:
            make = load_model if name == "smollm2-135m" else sizes.without_weights if "/" in name else of_kind
            kept[name] = Loaded(make(name), tmp_path_factory.mktemp("gguf") / "model.gguf")
        return kept[name]

    yield get
    for one in kept.values():
        llama_cpp.llama_model_free(one.model)


def check(one, runtime, within):
    found, mib = footprint(one.spec, runtime), one.taken(runtime)
    assert found.cache / 2**20 == pytest.approx(mib["KV"], abs=0.011)
    assert found.output / 2**20 == pytest.approx(mib["output"], abs=0.006)
    assert found.compute / 2**20 == pytest.approx(mib["compute"], rel=within, abs=0.006)
    return sum(found) / 2**20, sum(mib.values())


@pytest.mark.parametrize("context", [100, 1000, 4096, 8192])
@pytest.mark.parametrize("name", [*KNOWN, "smollm2-135m"])
def test_peak_is_what_llama_cpp_reports(loaded, name, context):
    """Of five models of known shapes: the file and all beside it."""
    one = loaded(name)
    beside, said = check(one, Runtime(context), within=0.003)
    predicted = one.allocation.file_bytes / 2**20 + beside
    assert predicted == pytest.approx(one.weights + said, rel=0.02)


RUNTIMES = (
    Runtime(1),
    Runtime(700, flash_attention=False),
    Runtime(512, parallel=3),
    Runtime(1100, 4, flash_attention=False),
    Runtime(4096, keys="q8_0", values="q8_0"),
    Runtime(600, 2, keys="q4_0", values="q4_0"),
    Runtime(600, keys="f16", values="q4_0"),
    Runtime(600, keys="q8_0", flash_attention=False),
)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
@pytest.mark.parametrize("name", [*KNOWN[1:], *KINDS])
def test_every_way_to_run_it(loaded, name, runtime):
    """Almost always exact: Qwen2.5's biases move a hundredth of a compute buffer when only keys are quantized."""
    check(loaded(name), runtime, within=0.01)


@pytest.mark.parametrize("context", [0, -5, 257])
def test_context_that_the_model_was_not_made_for(untied, context):
    with pytest.raises(ValueError, match=f"context length of {context} is not between 1 and the 256 that the model"):
        footprint(untied.spec, Runtime(context))


def test_caches_that_llama_cpp_refuses(untied):
    with pytest.raises(ValueError, match=r"cache cannot be q5_K here; choose f16, q8_0, q4_0\."):
        Runtime(10, keys="q5_K")
    with pytest.raises(ValueError, match="keeps values in q4_0 with flash attention alone; turn it on or keep"):
        Runtime(10, values="q4_0", flash_attention=False)
    with pytest.raises(ValueError, match="heads of 16 are no multiple of the 32 numbers of q8_0; keep f16"):
        footprint(untied.spec, Runtime(10, keys="q8_0"))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_memory_of_a_gpu(name, request):
    """An embedding that is only looked up stays with the program, and so does the output buffer."""
    model = request.getfixturevalue(name)
    table, cpu, gpu = costs(model, (4, 8)), Runtime(100), Runtime(100, device="gpu")
    left = runtime_bytes(model.spec, cpu) - runtime_bytes(model.spec, gpu)
    assert left == model.spec.vocab_size * 4
    memory = runtime_bytes(model.spec, cpu) + table.smallest
    more = bytes_that_fit(model.spec, table, memory, gpu) - bytes_that_fit(model.spec, table, memory, cpu)
    assert more == left + (0 if name == "tied" else table.per_level[0].min())


def test_types_are_those_of_the_flags():
    assert set(TYPES) == set(KV_TYPES)

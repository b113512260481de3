"""Memory beside the weights, against what llama.cpp says that it takes."""

import collections
import dataclasses
import os
import re

import llama_cpp
import pytest
from benchmarks import zoo

from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.footprint import cache_bytes, runtime_bytes
from ramp_jax.halo.llama_quantize import captured_log
from ramp_jax.models import load_model


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gemma3", "mistral-window", "ref-llama", "smollm2-135m"])
def model(request, tmp_path_factory):
    if request.param in zoo.ZOO:
        return load_model(str(zoo.save(zoo.hf_model(request.param), tmp_path_factory.mktemp("hf") / "model")))
    return load_model(request.param)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(model, Allocation.uniform(model, "Q8_0"), path)
    return path


def taken(path, context):
    """MiB by the kind of the buffer, as llama.cpp logs them for a context of its programs' defaults."""
    model_params, params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.use_extra_bufts, params.n_ctx, params.swa_full = False, context, False
    with captured_log() as log:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        llama_cpp.llama_free(llama_cpp.llama_init_from_model(model, params))
        llama_cpp.llama_model_free(model)
    mib = collections.Counter()
    for name, size in re.findall(r"(KV|output|compute) buffer size = +([\d.]+) MiB", "".join(log)):
        mib[name] += float(size)
    return mib


@pytest.mark.parametrize("context", [1, 100, 512, 1100, 8192])
def test_bound_is_above_what_llama_cpp_takes_and_near_it(model, path, context):
    """llama.cpp allows contexts that the model was not made for."""
    mib = taken(path, context)
    assert mib.keys() == {"KV", "output", "compute"}
    bound = runtime_bytes(dataclasses.replace(model.spec, context_length=8192), context) / 2**20
    assert sum(mib.values()) <= bound <= 1.1 * sum(mib.values()) + 2


@pytest.mark.parametrize("context", [512, 8192])
def test_cache_of_windows_is_what_llama_cpp_takes(model, path, context):
    """To what its log rounds; where it runs windows, a long context takes hardly more than a short one."""
    spec = dataclasses.replace(model.spec, context_length=8192)
    assert cache_bytes(spec, context) / 2**20 == pytest.approx(taken(path, context)["KV"], abs=0.011)


@pytest.mark.parametrize("context", [0, -5, 257])
def test_context_that_the_model_was_not_made_for(untied, context):
    with pytest.raises(ValueError, match=f"context length of {context} is not between 1 and the 256 that the model"):
        runtime_bytes(untied.spec, context)

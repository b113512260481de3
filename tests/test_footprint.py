"""Memory beside the weights, against what llama.cpp says that it takes."""

import dataclasses
import os
import re

import llama_cpp
import pytest
import tiny

from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.footprint import runtime_bytes
from ramp_jax.halo.llama_quantize import captured_log
from ramp_jax.models import load_model


@pytest.fixture(scope="module", params=["untied", "qwen3", "gemma", "ref-llama", "smollm2-135m"])
def model(request, tmp_path_factory):
    if request.param in ("qwen3", "gemma"):
        return load_model(str(tiny.save(tiny.family_model(request.param), tmp_path_factory.mktemp("hf") / "model")))
    return request.getfixturevalue("untied") if request.param == "untied" else load_model(request.param)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(model, Allocation.uniform(model, "Q8_0"), path)
    return path


def taken(path, context):
    """MiB by the name of the buffer, as llama.cpp logs them for a context of its defaults."""
    model_params, params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.use_extra_bufts, params.n_ctx = False, context
    with captured_log() as log:
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        llama_cpp.llama_free(llama_cpp.llama_init_from_model(model, params))
        llama_cpp.llama_model_free(model)
    return {
        name: float(mib) for name, mib in re.findall(r"(KV|output|compute) buffer size = +([\d.]+) MiB", "".join(log))
    }


@pytest.mark.parametrize("context", [1, 100, 512, 1100, 8192])
def test_bound_is_above_what_llama_cpp_takes_and_near_it(model, path, context):
    """llama.cpp allows contexts that the model was not made for."""
    mib = taken(path, context)
    assert mib.keys() == {"KV", "output", "compute"}
    bound = runtime_bytes(dataclasses.replace(model.spec, context_length=8192), context) / 2**20
    assert sum(mib.values()) <= bound <= 1.1 * sum(mib.values()) + 2


@pytest.mark.parametrize("context", [0, -5, 257])
def test_context_that_the_model_was_not_made_for(untied, context):
    with pytest.raises(ValueError, match=f"context length of {context} is not between 1 and the 256 that the model"):
        runtime_bytes(untied.spec, context)

"""Memory beside the weights, against what llama.cpp says on loading that it takes."""

import dataclasses

import pytest
from benchmarks import zoo
from benchmarks.footprint import CONTEXTS, KNOWN, REAL, Loaded, row
from benchmarks.footprint import loaded as of_suite

from ramp_jax.allocation import costs
from ramp_jax.halo.footprint import Runtime, bytes_that_fit, footprint, runtime_bytes
from ramp_jax.models import Model
from ramp_jax.models.spec import describe, spec_from_hf

KINDS = ("llama-bias", "mistral-window", "smollm3", "gemma2", "phi3", "olmo2", "granite", "ministral3")


def of_kind(name):
    """A tiny model of a family, wider than its heads are, without weights."""
    config = zoo.hf_model(name).config.to_dict() | {"architectures": [zoo.ZOO[name].hf]}
    spec = dataclasses.replace(spec_from_hf(config), context_length=8192)
    return Model(spec, {}, describe(spec, name, 1))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("gguf")
            known = name in (*KNOWN, REAL)
            kept[name] = of_suite(name, folder) if known else Loaded(of_kind(name), folder / "model.gguf")
        return kept[name]

    yield get
    for one in kept.values():
        one.close()


def check(one, runtime, within):
    found, mib = footprint(one.spec, runtime), one.taken(runtime)
    assert found.cache / 2**20 == pytest.approx(mib["KV"], abs=0.011)
    assert found.output / 2**20 == pytest.approx(mib["output"], abs=0.006)
    assert found.compute / 2**20 == pytest.approx(mib["compute"], rel=within, abs=0.006)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", [*KNOWN, REAL])
def test_peak_is_what_llama_cpp_reports(loaded, name, context):
    """Of five models of known shapes: the file and all beside it."""
    one = loaded(name)
    check(one, Runtime(context), within=0.003)
    found = row(name, one, context)
    assert found["predicted"] == pytest.approx(found["reported"], rel=0.02)


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

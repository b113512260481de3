"""The configs for known models, checked without weights: their decoders, and what their files weigh."""

import dataclasses
import functools
import re
import runpy
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from ramp_jax.allocation import costs
from ramp_jax.allocators.simple import uniform
from ramp_jax.config import RunConfig, from_dict
from ramp_jax.formats import LEVELS, format_for
from ramp_jax.halo.export import write_skeleton
from ramp_jax.models import allocatable, tensors
from ramp_jax.models.decoder import logits
from ramp_jax.models.layout import nest
from ramp_jax.models.metadata import plain
from ramp_jax.models.spec import spec_from_gguf

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import sizes as suite
from benchmarks.sizes import MODELS, PAPER_GB, at_level, paper_mixes

ROOT = Path(__file__).parent.parent

CONFIGS = {
    "llama_2_7b": "meta-llama/Llama-2-7b-hf",
    "llama_2_13b": "meta-llama/Llama-2-13b-hf",
    "mistral_7b": "mistralai/Mistral-7B-v0.3",
    "llama_3_2_1b": "meta-llama/Llama-3.2-1B",
    "qwen2_5_1_5b": "Qwen/Qwen2.5-1.5B",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B",
    "gemma_3_270m": "google/gemma-3-270m",
}
PUBLISHED_Q8_0 = {
    "meta-llama/Llama-2-7b-hf": (7_161_089_728, 723_869),
    "Qwen/Qwen3-0.6B": (639_446_688, 5_928_681),
}
"""Bytes of files whose matrices are all Q8_0, and of llama.cpp's own file with nothing but that vocabulary."""

without_weights = functools.cache(suite.without_weights)


def read(stem):
    """What is in a file of `configs/`: its docstring, and the config."""
    content = runpy.run_path(str(ROOT / "configs" / f"{stem}.py"))
    return content["__doc__"], content["get_config"]().to_dict()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return without_weights(name)


def test_every_model_of_the_hub_has_a_config_and_facts():
    stems = [path.stem for path in (ROOT / "configs").glob("*.py")]
    named = {stem: read(stem)[1].get("models", ()) for stem in stems}
    assert {stem: models for stem, models in named.items() if any("/" in ref for ref in models)} == {
        stem: (ref,) for stem, ref in CONFIGS.items()
    }
    assert set(CONFIGS.values()) == set(MODELS)


@pytest.mark.parametrize("stem", CONFIGS)
def test_config_fits_its_model(stem):
    """Every tensor can take a level of the config's, and windows are no longer than the model's context."""
    config, model = from_dict(read(stem)[1]), without_weights(CONFIGS[stem])
    assert isinstance(config, RunConfig)
    assert config.dtype == "bfloat16"
    assert costs(model, config.levels).valid.any(axis=1).all()
    assert max(config.calibration.context, config.sensitivity.context) <= model.spec.context_length
    assert not model.spec.caveat


@pytest.mark.parametrize("stem", CONFIGS)
def test_docstring_holds_commands_and_sizes(stem):
    """Flags exist, the budget can be reached, and sizes are those of the smallest and the largest file."""
    (doc, config), ref = read(stem), CONFIGS[stem]
    commands = [line.split()[1:] for line in doc.replace("\\\n", " ").splitlines() if "python launch/" in line]
    scripts = [Path(command[0]).stem for command in commands]
    assert scripts[:3] == ["train", "allocate", "export_gguf"]
    assert f"--config=configs/{stem}.py" in commands[0]
    for script, (_, *arguments) in zip(scripts, commands, strict=True):
        source = "".join(p.read_text() for p in (ROOT / f"launch/{script}.py", *(ROOT / "ramp_jax/cli").glob("*.py")))
        defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | set(re.findall(r'"(budget_\w+)"', source))
        assert {argument.split("=")[0].removeprefix("--") for argument in arguments} <= defined
    assert f"--model={ref}" in commands[1]
    assert f"--model={ref}" in commands[2]
    table = costs(without_weights(ref), config["levels"])
    said = re.search(r"files from ([\d.]+) to ([\d.]+) GB", doc)
    assert said.groups() == (f"{table.smallest / 1e9:.3f}", f"{table.largest / 1e9:.3f}")
    budget = float(re.search(r"--budget_gb=(\S+)", doc)[1])
    assert table.smallest < budget * 1e9 < table.largest


def test_tensors_are_those_of_the_checkpoint(name, model):
    """Names, shapes and number, beside the model that transformers makes of the same config."""
    config = transformers.AutoConfig.for_model(**MODELS[name].config)
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in oracle.named_parameters()}
    assert {model.spec.family.hf_name(tensor): tensor.shape for tensor in tensors(model.spec)} == expected
    assert sum(tensor.size for tensor in tensors(model.spec)) == MODELS[name].parameters


def test_forward_pass_of_abstract_parameters(model):
    shapes = (
        (t, jax.ShapeDtypeStruct(t.shape, jnp.bfloat16 if t.is_matrix else jnp.float32)) for t in tensors(model.spec)
    )
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    found = jax.eval_shape(functools.partial(logits, model.spec), nest(shapes), ids)
    assert (found.shape, found.dtype) == ((1, 5, model.spec.vocab_size), jnp.float32)


def test_gguf_describes_the_same_decoder(model):
    """A GGUF of a Mistral without windows is one of a Llama; blocks are all that they compute."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(model.spec)}
    found = spec_from_gguf(plain(model.metadata), shapes, model.spec.tables)
    assert found.blocks == model.spec.blocks
    assert dataclasses.replace(found, model_type=model.spec.model_type) == model.spec


def test_what_sets_the_models_apart():
    """Of what two readers of one config could agree on and both be wrong."""
    specs = {ref: without_weights(ref).spec for ref in MODELS}
    gemma, llama, qwen = specs["google/gemma-3-270m"], specs["meta-llama/Llama-3.2-1B"], specs["Qwen/Qwen2.5-1.5B"]
    assert [layer for layer, windowed in enumerate(gemma.windowed) if not windowed] == [5, 11, 17]
    assert (gemma.window, gemma.rope.theta, gemma.local_rope.theta, gemma.tied) == (512, 1e6, 1e4, True)
    assert (gemma.embedding_scale, gemma.attention_scale, gemma.query_factor) == (640**0.5, 1 / 16, 1.0)
    assert (llama.rope.factors[0], llama.rope.factors[-1], len(llama.rope.factors)) == (1.0, 32.0, 32)
    assert (qwen.window, qwen.biased) == (None, ("attn_q", "attn_k", "attn_v"))
    assert specs["mistralai/Mistral-7B-v0.3"].window is None
    assert [spec.tied for spec in specs.values()] == [False, False, False, True, True, True, True]


@pytest.mark.parametrize("level", [2, 4.5, 8])
def test_sizes_are_those_of_files(model, level, tmp_path):
    """Of a file whose weights are holes, as gguf reads it: it ends with the last tensor and its padding."""
    allocation = at_level(model, level)
    write_skeleton(model, allocation, tmp_path / "holes.gguf")
    reader = gguf.GGUFReader(tmp_path / "holes.gguf")
    last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
    end = last.data_offset + int(last.n_bytes)
    assert allocation.file_bytes == end + -end % reader.alignment
    names = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {t: names[t] for t in allocation.formats} == allocation.formats


def test_sizes_grow_with_the_level(model):
    """As the allocator `uniform` chooses for just that size; between them lies what the levels' own formats differ."""
    table = costs(model, LEVELS)
    found = [at_level(model, level).file_bytes for level in LEVELS]
    assert found == sorted(set(found))
    for level, size in zip(LEVELS, found, strict=True):
        chosen = uniform(table.in_units, None, table.units(size))
        assert table.fixed + int(table.per_level[range(len(chosen)), chosen].sum()) == size
        assert level in {LEVELS[a] for a in chosen}
    assert (found[0], found[-1]) == (table.smallest, table.largest)


@pytest.mark.parametrize("ref", MODELS)
def test_rows_that_no_superblock_divides(ref):
    """Only Gemma has them: all but those of attn_output and ffn_down."""
    spec = without_weights(ref).spec
    masked = {t.weight.name for t in allocatable(spec) for level in LEVELS if format_for(level, t.shape[-1]) is None}
    inside = {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "token_embd"}
    assert masked == ({f"{module}.weight" for module in inside} if spec.d_model == 640 else set())


@pytest.mark.parametrize("ref", PUBLISHED_Q8_0)
def test_sizes_of_published_files(ref):
    """Within a ten-thousandth: names and templates differ."""
    size, vocabulary = PUBLISHED_Q8_0[ref]
    assert at_level(without_weights(ref), 8).file_bytes + vocabulary == pytest.approx(size, rel=1e-4)


def test_weights_of_gemma_in_q8_0():
    """What llama.cpp says that the tensors of such a file take; descriptions of 236 tensors and padding come on top."""
    beyond = at_level(without_weights("google/gemma-3-270m"), 8).file_bytes - 285_018_624
    assert 236 * 50 < beyond < 236 * 80


def test_code_bits_of_the_paper():
    """Its 3.68 GB are 3.65 code bits with F16 scales and zeros of groups of 128, embedding and head in F16."""
    rows = paper_mixes()
    assert all(row["code bits of the mix"] == pytest.approx(3.65, abs=0.01) for row in rows)
    by = {(row["in F16"], row["mix"].split(":")[0]): row["GB"] for row in rows}
    both = "embedding and head"
    assert by[both, "the paper's"] == pytest.approx(PAPER_GB, abs=0.005)
    for what in ("none", both):
        assert by[what, "smallest"] < by[what, "neighbours"] < by[what, "largest"]
    assert by["none", "largest"] < PAPER_GB < by[both, "neighbours"]


def test_suite_has_a_row_per_model():
    rows = suite.sizes(1)["levels"]
    assert [row["model"] for row in rows] == list(MODELS)
    gigabytes = [row["level 4.5: GB, bpw"][0] for row in rows]
    assert gigabytes[0] == pytest.approx(6_738_415_616 * 4.5 / 8e9, rel=1e-3)

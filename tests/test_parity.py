"""Every dense kind beside transformers, llama.cpp and gguf's own tables: logits, files, and the way through scripts."""

import dataclasses

import gguf
import numpy as np
import pytest
import tiny
import torch
from benchmarks import families, zoo

from ramp_jax.allocation import Allocation
from ramp_jax.formats import get_format
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.torch_model import torch_model
from ramp_jax.halo.verify import gguf_logits
from ramp_jax.models import allocatable, load_model
from ramp_jax.quantization import Encoder, fake_quantize

PERMUTED = ("llama", "mistral3", "smollm3", "granite")
"""Architectures whose GGUF holds rows of q and k with neighbours that rotate together."""

WAYS = ("gemma2", "phi4-mini")
"""Kinds whose blocks differ in what folding looks at: norms around, fused matrices. `test_toy_family.py` has biases and
norms after; the suite `families` folds all."""

LONG = ("folded", "estimate")
QUANTIZED = tuple(column for column in families.CHECKS if "bits" in column or "llama-quantize" in column)
ONE_PER_ARCHITECTURE = set({kind.architecture: name for name, kind in reversed(zoo.ZOO.items())}.values())
"""Kinds that are quantized here; the suite `families` quantizes all."""


def subjects(names):
    return pytest.fixture(scope="module", params=names)(
        lambda request, tmp_path_factory: families.Subject(request.param, tmp_path_factory.mktemp("kind"))
    )


subject, way = subjects(tuple(zoo.ZOO)), subjects(WAYS)


def hf_values(name):
    """Tensors of the text decoder by their names in a checkpoint that holds nothing else."""
    state = zoo.hf_model(name).state_dict()
    values = {key.replace("language_model.", "").removeprefix("model."): value.numpy() for key, value in state.items()}
    text = {
        key: value for key, value in values.items() if key.startswith(("layers.", "embed_tokens.", "norm.", "lm_head"))
    }
    return {key if key == "lm_head.weight" else f"model.{key}": value for key, value in text.items()}


def expected_tensors(name):
    """What a GGUF of the kind must hold, by name."""
    kind, config = zoo.ZOO[name], zoo.hf_model(name).config.get_text_config()
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind.architecture]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    values = {}
    for key, value in hf_values(name).items():
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue
        stored = table.get_name(key, try_suffixes=(".weight", ".bias"))
        module = stored.split(".")[-2]
        if kind.architecture in PERMUTED and module in heads:
            value = tiny.neighbours_rotate(value, heads[module])
        values[stored] = value + np.float32(1 - kind.gain) if "norm" in module else value
    return values | rope_values(name, config)


def rope_values(name, config):
    """Tensors that a GGUF holds instead of what a config says of its frequencies."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{way}.weight": np.float32(rope[f"{way}_factor"]) for way in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        scaled = zoo.hf_model(name).model.rotary_emb.inv_freq.numpy()
        plain = rope["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    return {}


def test_predictions_are_peaked(subject):
    assert np.ptp(subject.expected) > 5


@pytest.mark.parametrize("column", [column for column in families.CHECKS if column not in (*LONG, *QUANTIZED)])
def test_within_its_limit(subject, column):
    check = families.CHECKS[column]
    assert check.measure(subject) <= check.allowed(subject.kind)


def test_quantized_files_are_those_that_jax_decodes(subject):
    if subject.name in ONE_PER_ARCHITECTURE:
        for column in QUANTIZED:
            assert families.CHECKS[column].measure(subject) <= families.CHECKS[column].limit, column


def test_gguf_holds_what_llama_cpp_reads(subject):
    """Names by gguf's own table; q and k permuted, gains whole."""
    reader, expected = gguf.GGUFReader(subject.exported), expected_tensors(subject.name)
    stored = {t.name: t.data for t in reader.tensors}
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        if name == "rope_freqs.weight":
            np.testing.assert_allclose(stored[name], value, rtol=1e-5)
        else:
            np.testing.assert_array_equal(stored[name], value, err_msg=name)
    keys = ("block_count", "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base")
    assert {f"{subject.kind.architecture}.{key}" for key in keys} <= set(reader.fields)


def test_file_describes_the_same_model(subject):
    again = load_model(str(subject.exported))
    again_as_named = dataclasses.replace(again.spec, model_type=subject.model.spec.model_type)
    assert again_as_named == subject.model.spec  # a Mistral without windows is a Llama in a GGUF
    assert again.spec.blocks == subject.model.spec.blocks
    np.testing.assert_allclose(again.logits(subject.ids), subject.ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("column", LONG)
def test_the_way_to_an_allocation(way, column):
    assert families.CHECKS[column].measure(way) <= families.CHECKS[column].limit


@pytest.mark.parametrize("name", [name for name, kind in zoo.ZOO.items() if kind.departs])
def test_llama_cpp_computes_something_else_where_the_zoo_says_so(name, tmp_path):
    subject = families.Subject(name, tmp_path)
    off = np.abs(gguf_logits(subject.exported, subject.ids) - subject.expected).max((0, 2))
    assert off[: subject.kind.llama_cpp].max() < subject.kind.tolerance
    assert off[subject.kind.llama_cpp :].max() > 1


def test_short_texts_turn_by_short_factors(tmp_path):
    subject = families.Subject("phi3-longrope", tmp_path)
    short = subject.ids[:, : zoo.SHORT]
    expected = zoo.hf_logits(subject.name, short)
    assert np.abs(expected - subject.expected[:, : zoo.SHORT]).max() > 1
    np.testing.assert_allclose(subject.model.logits(short), expected, atol=1e-4, rtol=0)


def test_llama_cpp_takes_the_long_factors_by_its_context(tmp_path):
    """Where a context is longer than the original one, though the text is not."""
    subject = families.Subject("phi3-longrope", tmp_path)
    short = subject.ids[:, : zoo.SHORT]
    off = np.abs(gguf_logits(subject.exported, short) - zoo.hf_logits(subject.name, short))
    assert off.max() > 1


@pytest.mark.parametrize("name", ["phi4-mini"])
def test_allocate_export_evaluate(name, call, tmp_path):
    def run(*arguments):
        code, _, errors = call(*arguments)
        assert code == 0, errors

    directory = zoo.save(zoo.hf_model(name), tmp_path / "model")
    found = families.through_scripts(directory, tmp_path, run)
    assert found["perplexity, llama.cpp"] == pytest.approx(found["perplexity, jax"], rel=0.03)


def by_blocks(x, size):
    """Activations `[..., I]` as llama.cpp rounds them to 8 bits: by 32 with an f16 scale (Q8_0), or by 256 (Q8_K)."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if size == 32:
        scale = largest.abs() / 127
        return (torch.round(blocks / scale) * scale.half().float()).reshape(x.shape)
    return (torch.round(blocks * (-127 / largest)).clamp(max=127) * (largest / -127)).reshape(x.shape)


@pytest.mark.parametrize(
    ("name", "fmt", "size"),
    [
        ("llama", "Q8_0", 32),
        ("llama", "Q4_0", 32),
        ("llama", "MXFP4", 32),
        ("qwen3-tied", "Q4_K", 256),
        ("qwen3-tied", "IQ1_M", 256),
    ],
)
def test_rounded_activations_are_all_that_sets_quantized_files_apart(name, fmt, size, tmp_path):
    subject = families.Subject(name, tmp_path)
    allocation = Allocation.uniform(subject.model, fmt)
    weighted = allocatable(subject.model.spec) if get_format(fmt).needs_importance else ()
    encoder = Encoder(importance={tensor.name: np.ones(tensor.shape[-1], np.float32) for tensor in weighted})
    path = tmp_path / "quantized.gguf"
    export_gguf(subject.model, allocation, path, encoder)
    decoded = dataclasses.replace(subject.model, params=fake_quantize(subject.model, allocation, encoder))
    beside, ids = torch_model(decoded), torch.from_numpy(subject.ids.astype(np.int64))
    with torch.no_grad():
        plain = beside(ids).logits.numpy()
        for module in beside.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (by_blocks(inputs[0], size),))
        rounded = beside(ids).logits.numpy()
    assert families.apart(subject, rounded, path) < families.apart(subject, plain, path) / 2


class GeluOfHalves(torch.nn.Module):
    """ggml's GELU on CPUs: a table of f16 numbers by f16 numbers."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_ggml_s_gelu_is_all_that_sets_gemmas_apart(name, tmp_path):
    subject = families.Subject(name, tmp_path)
    twin, theirs = torch_model(subject.model), gguf_logits(subject.exported, subject.ids)
    for module in twin.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = GeluOfHalves()
    with torch.no_grad():
        rounded = twin(torch.from_numpy(subject.ids.astype(np.int64))).logits.numpy()
    usual, left = (np.abs(theirs - logits).max() for logits in (subject.expected, rounded))
    assert left < usual / 2
    assert np.sqrt(np.mean((theirs - rounded) ** 2)) < 3e-4

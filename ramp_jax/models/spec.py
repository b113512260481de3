"""What a decoder looks like, read from a Hugging Face config or from GGUF metadata, and written as the former."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ramp_jax.models.families import FAMILIES, Family
from ramp_jax.models.layout import Block
from ramp_jax.models.metadata import Metadata, typed

_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The numbers that describe a decoder of one family; `blocks` is what they mean."""

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    d_ff: int
    vocab_size: int
    context_length: int
    rope_theta: float
    norm_eps: float
    tied: bool

    @property
    def family(self) -> Family:
        """What its decoder computes and how its files store it."""
        return FAMILIES[self.architecture]

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Its layers, in forward order."""
        return self.family.blocks(self)

    @property
    def embedding_scale(self) -> float:
        """What multiplies that which enters the first block."""
        return float(self.d_model) ** 0.5 if self.family.scaled_embedding else 1.0

    @property
    def tables(self) -> dict[str, Float[np.ndarray, " N"]]:
        """Tables f32 that follow from the spec and that its GGUF holds after the tensors, by name, in order."""
        return {}


def make_spec(architecture: str, **sizes: Any) -> DecoderSpec:
    """Spec of a family with the other fields given; raises `ValueError` for an unknown family or an untied Gemma."""
    if architecture not in FAMILIES:
        raise ValueError(f"GGUF architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}.")
    family = FAMILIES[architecture]
    if family.tied and not sizes["tied"]:
        raise ValueError(f"llama.cpp runs {architecture} with its embedding as the head only; use a tied checkpoint.")
    return DecoderSpec(architecture=architecture, **sizes)


def spec_from_hf(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec from the contents of `config.json`; raises `ValueError` for what the decoder does not compute."""
    name = (config.get("architectures") or ["none named"])[0]
    by_class = {family.hf: arch for arch, family in FAMILIES.items()}
    if name not in by_class:
        raise ValueError(f"architecture {name} is not supported; supported are {', '.join(by_class)}.")
    arch, family = by_class[name], FAMILIES[by_class[name]]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = _HF_ACTIVATIONS[family.activation]
    activation = config.get("hidden_activation") or config.get("hidden_act") or expected
    unsupported = {
        f"rope scaling {kind!r}": kind != "default",
        "attention biases": config.get("attention_bias", False),
        "MLP biases": config.get("mlp_bias", False),
        "attention in sliding windows": config.get("use_sliding_window", False),
        "attention in both directions": config.get("use_bidirectional_attention", False),
        f"activation {activation!r}": activation != expected,
    }
    for what, present in unsupported.items():
        if present:
            raise ValueError(
                f"config.json asks for {what}, which this decoder does not compute; use another checkpoint."
            )
    heads = config["num_attention_heads"]
    return make_spec(
        arch,
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or family.head_size or config["hidden_size"] // heads,
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
    )


def hf_config(spec: DecoderSpec) -> dict[str, Any]:
    """The contents of a `config.json` that `spec_from_hf` and transformers read as `spec`."""
    activation = _HF_ACTIVATIONS[spec.family.activation]
    return {
        "architectures": [spec.family.hf],
        "model_type": spec.architecture,
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_size,
        "intermediate_size": spec.d_ff,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "hidden_act": activation,
        "attention_bias": False,
    } | ({"hidden_activation": activation} if spec.family.activation == "gelu_tanh" else {})


def spec_from_gguf(fields: Mapping[str, Any], tied: bool) -> DecoderSpec:
    """Spec from GGUF key-value pairs; raises `ValueError` for what the decoder does not compute."""
    arch = fields.get("general.architecture", "none named")
    if arch not in FAMILIES:
        raise ValueError(f"GGUF architecture {arch} is not supported; supported are {', '.join(FAMILIES)}.")
    if fields.get(f"{arch}.rope.scaling.type", "none") != "none" or f"{arch}.expert_count" in fields:
        raise ValueError(f"the GGUF asks for rope scaling or experts, which this {arch} decoder does not compute.")
    heads = fields[f"{arch}.attention.head_count"]
    d_model = fields[f"{arch}.embedding_length"]
    return make_spec(
        arch,
        n_layers=fields[f"{arch}.block_count"],
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=fields.get(f"{arch}.attention.head_count_kv", heads),
        head_size=fields.get(f"{arch}.attention.key_length", d_model // heads),
        d_ff=fields[f"{arch}.feed_forward_length"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        context_length=fields[f"{arch}.context_length"],
        rope_theta=fields.get(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=fields[f"{arch}.attention.layer_norm_rms_epsilon"],
        tied=tied,
    )


def describe(spec: DecoderSpec, name: str, parameters: int) -> Metadata:
    """The `general.*` and `<architecture>.*` pairs that llama.cpp needs to run `spec`."""
    arch = spec.architecture
    return typed(
        {
            "general.architecture": arch,
            "general.type": "model",
            "general.name": name,
            "general.size_label": f"{parameters / 1e6:.0f}M" if parameters < 1e9 else f"{parameters / 1e9:.1f}B",
            f"{arch}.block_count": spec.n_layers,
            f"{arch}.context_length": spec.context_length,
            f"{arch}.embedding_length": spec.d_model,
            f"{arch}.feed_forward_length": spec.d_ff,
            f"{arch}.attention.head_count": spec.n_heads,
            f"{arch}.attention.head_count_kv": spec.n_kv_heads,
            f"{arch}.attention.key_length": spec.head_size,
            f"{arch}.attention.value_length": spec.head_size,
            f"{arch}.attention.layer_norm_rms_epsilon": spec.norm_eps,
            f"{arch}.rope.freq_base": spec.rope_theta,
            f"{arch}.rope.dimension_count": spec.head_size,
            f"{arch}.vocab_size": spec.vocab_size,
        }
    )

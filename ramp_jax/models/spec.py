"""What a decoder looks like, read from a Hugging Face config or from GGUF metadata."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SUPPORTED_HF = ("LlamaForCausalLM",)
SUPPORTED_GGUF = ("llama",)


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A dense decoder: pre-norm blocks of grouped-query attention with rotary positions and a gated MLP."""

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
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads


def spec_from_hf(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec from the contents of `config.json`; raises `ValueError` for what the decoder does not compute."""
    names = config.get("architectures") or ["none named"]
    if names[0] not in SUPPORTED_HF:
        raise ValueError(f"architecture {names[0]} is not supported; supported are {', '.join(SUPPORTED_HF)}.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        f"rope scaling {kind!r}": kind != "default",
        "attention biases": config.get("attention_bias", False),
        "MLP biases": config.get("mlp_bias", False),
        f"activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    for what, present in unsupported.items():
        if present:
            raise ValueError(
                f"config.json asks for {what}, which this decoder does not compute; use another checkpoint."
            )
    heads = config["num_attention_heads"]
    return DecoderSpec(
        architecture="llama",
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n_heads=heads,
        n_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def spec_from_gguf(fields: Mapping[str, Any], tied: bool) -> DecoderSpec:
    """Spec from GGUF key-value pairs; raises `ValueError` for what the decoder does not compute."""
    arch = fields.get("general.architecture", "none named")
    if arch not in SUPPORTED_GGUF:
        raise ValueError(f"GGUF architecture {arch} is not supported; supported are {', '.join(SUPPORTED_GGUF)}.")
    if fields.get(f"{arch}.rope.scaling.type", "none") != "none" or f"{arch}.expert_count" in fields:
        raise ValueError(f"the GGUF asks for rope scaling or experts, which this {arch} decoder does not compute.")
    heads = fields[f"{arch}.attention.head_count"]
    d_model = fields[f"{arch}.embedding_length"]
    return DecoderSpec(
        architecture=arch,
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

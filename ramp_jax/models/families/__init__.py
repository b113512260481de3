"""The families of decoders, by GGUF architecture: a row says what sets one apart from the others."""

from ramp_jax.models.families.family import HF_NAMES, Family, pre_norm_blocks

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", permuted_rope=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_size=128),
    "gemma": Family(
        "GemmaForCausalLM",
        activation="gelu_tanh",
        scaled_embedding=True,
        norm_offset=1.0,
        head_size=256,
        tied=True,
    ),
}

__all__ = ["FAMILIES", "HF_NAMES", "Family", "pre_norm_blocks"]

"""Tiny random models of every dense family, made with transformers: what tests and the suite `families` run on.

Shapes are odd on purpose: heads wider than D/N where the family allows it, one key/value head or as many as heads, odd
numbers of layers, windows and original contexts shorter than the texts that are run. All numbers of the configs are f32
numbers, so that a GGUF keeps them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from ramp_jax import data

VOCABULARY = 320
LENGTH = 150  # tokens of the texts that are run: beyond windows, most original contexts, and one block of queries
SHORT = 24  # tokens of a text within every original context
WINDOW = 16
ORIGINAL_CONTEXT = 32
END, STOP = "<|endoftext|>", "<|im_end|>"

_TEXT_FOR_MERGES = 20_000  # characters
_THETA = 5000.0
_SHORT = [1.0 + 0.0625 * i for i in range(16)]
_LONG = [1.5 + 0.5 * i for i in range(16)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tiny model: its transformers class, GGUF architecture, and what its config says beyond the common sizes.

    `gain` is what its norms store for a channel that stays as it is. `around` is what a model with a vision tower says
    beside the config of its text decoder. llama.cpp computes what transformers does at the first `llama_cpp` positions,
    to within `tolerance` of a logit; `departs` says why not beyond.
    """

    hf: str
    architecture: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gain: float = 1.0
    around: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    llama_cpp: int = LENGTH
    tolerance: float = 1e-3
    departs: str = ""


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": _THETA, **values}}


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 2.0**-17,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    **_rope("default"),
}
_NARROW = {"num_attention_heads": 3, "num_key_value_heads": 1}  # for families whose heads are D/N wide: 32
_WIDE_HEADS = {"head_dim": 32}  # of 4 in 96
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT)
_LLAMA3 = _rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
_MINISTRAL3 = _rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.125,
)
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_PIXTRAL = {"vision_config": {"model_type": "pixtral", **_TOWER}, "image_token_index": 5}
_SIGLIP = {
    "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
    "image_token_index": 5,
    "boi_token_index": 6,
    "eoi_token_index": 7,
    "mm_tokens_per_image": 4,
}
_GEMMA = {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 32}
_GEMMA2 = _GEMMA | {
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 7,  # the last one full attention and one more
    "query_pre_attn_scalar": 32,
    "sliding_window": WINDOW,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
    },
}
_AS_GEMMA = {"gain": 0.0, "tolerance": 1e-2}  # llama.cpp's GELU is a table of f16 numbers
_SUPERBLOCKS = {"hidden_size": 256, "intermediate_size": 512}  # rows that K-quants take
_WINDOW_IGNORED = "llama.cpp reads no window for this architecture"

ZOO = {
    "llama": Kind("LlamaForCausalLM", "llama", _WIDE_HEADS),
    "llama-tied": Kind("LlamaForCausalLM", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-bias": Kind("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True, **_WIDE_HEADS}),
    "llama-linear": Kind("LlamaForCausalLM", "llama", _rope("linear", factor=4.0) | {"num_key_value_heads": 1}),
    "llama-llama3": Kind("LlamaForCausalLM", "llama", _LLAMA3 | _WIDE_HEADS),
    "llama-yarn": Kind("LlamaForCausalLM", "llama", _YARN | _WIDE_HEADS),
    "mistral": Kind("MistralForCausalLM", "llama", {"sliding_window": None, **_WIDE_HEADS}),
    "mistral-window": Kind(
        "MistralForCausalLM",
        "llama",
        {"sliding_window": WINDOW, **_WIDE_HEADS},
        llama_cpp=WINDOW,
        departs=_WINDOW_IGNORED,
    ),
    "ministral": Kind(
        "MinistralForCausalLM",
        "llama",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **_WIDE_HEADS,
        },
        llama_cpp=WINDOW,
        departs=_WINDOW_IGNORED,
    ),
    "ministral3": Kind("Ministral3ForCausalLM", "mistral3", _MINISTRAL3 | _WIDE_HEADS),
    "mistral3": Kind(
        "Mistral3ForConditionalGeneration",
        "llama",
        {"model_type": "mistral", "sliding_window": None, **_WIDE_HEADS},
        around=_PIXTRAL,
    ),
    "ministral3-vision": Kind(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {"model_type": "ministral3", **_MINISTRAL3, **_WIDE_HEADS},
        around=_PIXTRAL,
    ),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", _NARROW),
    "qwen2-tied": Kind("Qwen2ForCausalLM", "qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-yarn": Kind("Qwen2ForCausalLM", "qwen2", _NARROW | _YARN),
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", {"num_key_value_heads": 1, **_WIDE_HEADS}),
    "qwen3-tied": Kind("Qwen3ForCausalLM", "qwen3", {"tie_word_embeddings": True, "head_dim": 128, **_SUPERBLOCKS}),
    "smollm2": Kind("LlamaForCausalLM", "llama", _NARROW | {"tie_word_embeddings": True}),
    "smollm3": Kind("SmolLM3ForCausalLM", "smollm3", _NARROW | {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "gemma": Kind("GemmaForCausalLM", "gemma", _GEMMA, **_AS_GEMMA),
    "gemma2": Kind("Gemma2ForCausalLM", "gemma2", _GEMMA2, **_AS_GEMMA),
    "gemma3": Kind("Gemma3ForCausalLM", "gemma3", _GEMMA3, **_AS_GEMMA),
    "gemma3-vision": Kind(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {"model_type": "gemma3_text", **_GEMMA3},
        around=_SIGLIP,
        **_AS_GEMMA,
    ),
    "phi3": Kind(
        "Phi3ForCausalLM",
        "phi3",
        {"num_key_value_heads": 4, "original_max_position_embeddings": 256, **_SUPERBLOCKS},
    ),
    "phi3-longrope": Kind(
        "Phi3ForCausalLM",
        "phi3",
        _rope("longrope", short_factor=_SHORT, long_factor=_LONG, original_max_position_embeddings=ORIGINAL_CONTEXT)
        | {"original_max_position_embeddings": ORIGINAL_CONTEXT, **_NARROW},
    ),
    "phi4-mini": Kind(
        "Phi3ForCausalLM",
        "phi3",
        _rope(
            "longrope",
            short_factor=_SHORT[:12],
            long_factor=_LONG[:12],
            partial_rotary_factor=0.75,
            original_max_position_embeddings=256,
        )
        | {
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            **_NARROW,
        },
    ),
    "olmo2": Kind("Olmo2ForCausalLM", "olmo2", _NARROW),
    "granite": Kind(
        "GraniteForCausalLM",
        "granite",
        _NARROW
        | {
            "attention_multiplier": 0.109375,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.625,
            "logits_scaling": 0.75,
        },
    ),
}
"""Kinds by name."""


@functools.cache
def hf_model(name: str) -> Any:
    """The random transformers model of a kind, f32; do not modify."""
    kind = ZOO[name]
    cls = getattr(transformers, kind.hf)
    values = _COMMON | kind.config
    if kind.around:
        values = {**kind.around, "text_config": values, "tie_word_embeddings": values["tie_word_embeddings"]}
    model = cls._from_config(cls.config_class(**values), attn_implementation="eager")
    width = model.config.get_text_config().hidden_size
    return drawn(model, seed=len(name), gain=kind.gain, spread=1.2 / width**0.5)


def drawn(model: Any, seed: int, gain: float = 1.0, spread: float = 0.15) -> Any:
    """The model with random weights; `gain` is what its norms store for a channel that stays as it is.

    `spread` is the standard deviation of all other weights.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            values = rng.normal(gain, 0.3, value.shape) if "norm" in name else rng.normal(0.0, spread, value.shape)
            value.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.eval()


def builtin_tokenizer(
    pre_tokenizer: PreTokenizer | None = None, **special: Any
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of at most VOCABULARY tokens trained on a little of the built-in text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([data.read_text("builtin")[:_TEXT_FOR_MERGES]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=STOP, **special)


def save(model: Any, path: Path) -> Path:
    """Directory of a transformers model with the tiny tokenizer."""
    model.save_pretrained(path)
    builtin_tokenizer().save_pretrained(path)
    return path


def hf_logits(name: str, ids: np.ndarray) -> np.ndarray:
    """What transformers predicts for ids `[B, T]`: logits `[B, T, V]`, f32."""
    with torch.no_grad():
        return hf_model(name)(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.numpy()

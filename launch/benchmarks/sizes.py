"""The suite `sizes` of launch/benchmark.py: what files of known models weigh, from their `config.json` alone.

Every level: all matrices at it, those whose rows it cannot hold at the next below, else above, as the rule `uniform`
does. Sizes are those of the exported file without its vocabulary, which the hub has. Then Llama-2-7B at the code bits
of the paper, by mixes of two levels: neighbours, and those that make the smallest and the largest file of all.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.measuring import Numbers, said

from ramp_jax.allocation import Allocation, costs, from_levels, tensor_bytes
from ramp_jax.formats import LEVELS, format_for, format_up_to, get_format
from ramp_jax.models import Model, Tensor, matrices
from ramp_jax.models.layout import allocatable
from ramp_jax.models.spec import describe, spec_from_hf


class Published(NamedTuple):
    """What is known of a model without its weights: how many parameters it has, and its `config.json`, of which keys
    are left out that say nothing of the decoder."""

    parameters: int
    config: Mapping[str, Any]


PAPER_MODEL, PAPER_CODE_BITS, PAPER_GB = "meta-llama/Llama-2-7b-hf", 3.65, 3.68

_LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

MODELS = {
    PAPER_MODEL: Published(
        6_738_415_616,
        _LLAMA_2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
    ),
    "meta-llama/Llama-2-13b-hf": Published(
        13_015_864_320,
        _LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
    ),
    "mistralai/Mistral-7B-v0.3": Published(
        7_248_023_552,
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32768,
        },
    ),
    "meta-llama/Llama-3.2-1B": Published(
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "Qwen/Qwen2.5-1.5B": Published(
        1_543_714_304,
        _QWEN
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "eos_token_id": 151643,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_position_embeddings": 131072,
            "model_type": "qwen2",
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "sliding_window": 131072,
            "use_mrope": False,
        },
    ),
    "Qwen/Qwen3-0.6B": Published(
        596_049_920,
        _QWEN
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "sliding_window": None,
        },
    ),
    "google/gemma-3-270m": Published(
        268_098_176,
        {
            "_sliding_window_pattern": 6,
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 640,
            "intermediate_size": 2048,
            "layer_types": 3 * [*5 * ["sliding_attention"], "full_attention"],
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
            "vocab_size": 262144,
        },
    ),
}
"""By hub id."""


def sizes(repeats: int) -> dict[str, list[Numbers]]:
    """Size and bits per weight of every model at every level, and Llama-2-7B as the paper has it.

    `repeats` is not used, sizes do not vary.
    """
    del repeats
    levels = []
    for name, published in MODELS.items():
        model = without_weights(name)
        files = {f"level {level:g}: GB, bpw": at_level(model, level) for level in LEVELS}
        found = {column: [file.file_bytes / 1e9, file.linear_bpw] for column, file in files.items()}
        levels.append(said({"model": name, "parameters": published.parameters} | found))
    return {"levels": levels, "paper": [said(row) for row in paper_mixes()]}


def without_weights(name: str) -> Model:
    """A model of `MODELS` with its shapes and metadata, but neither weights nor a vocabulary."""
    published = MODELS[name]
    spec = spec_from_hf(published.config)
    return Model(spec, {}, describe(spec, name.rsplit("/", 1)[-1], published.parameters))


def at_level(model: Model, level: float) -> Allocation:
    """The level for all, the next below for rows that it cannot hold, else the next above."""

    def nearest(n_in: int) -> str:
        held = (format_up_to(other, n_in) for other in (level, *LEVELS))
        return next(fmt.name for fmt in held if fmt is not None)

    return from_levels(model, [nearest(tensor.shape[-1]) for tensor in allocatable(model.spec)])


def paper_mixes() -> list[Numbers]:
    """Llama-2-7B at the paper's code bits: all matrices mixed, and with the embedding and the head in F16."""
    model = without_weights(PAPER_MODEL)
    every = matrices(model.spec)
    linears = [tensor for tensor in every if tensor.layer is not None]
    names = [format_for(level, every[0].shape[-1]).name for level in LEVELS]
    pairs = [
        pair
        for pair in itertools.combinations(names, 2)
        if get_format(pair[0]).level < PAPER_CODE_BITS < get_format(pair[1]).level
    ]
    rows = []
    for what, members in (("none", every), ("embedding and head", linears)):
        mixes = {pair: _mix(model, members, *pair) for pair in pairs}
        smallest, largest = (choose(mixes, key=lambda pair: mixes[pair]["GB"]) for choose in (min, max))
        chosen = {"neighbours": ("Q3_K", "IQ4_XS"), "smallest": smallest, "largest": largest}
        rows += [{"in F16": what, "mix": f"{how}: {' and '.join(pair)}"} | mixes[pair] for how, pair in chosen.items()]
    simulated = ("INT3_G128", "INT4_G128")
    rows.append({"in F16": what, "mix": f"the paper's: {' and '.join(simulated)}"} | _mix(model, linears, *simulated))
    return rows


def _mix(model: Model, members: Sequence[Tensor], low: str, high: str) -> Numbers:
    """Sizes with `members` in two formats, of mean level `PAPER_CODE_BITS` as nearly as whole tensors allow from below,
    and all other matrices in F16."""
    bits = {name: get_format(name).code_bits for name in (low, high)}
    weights = sum(tensor.size for tensor in members)
    left = weights * (PAPER_CODE_BITS - bits[low]) / (bits[high] - bits[low])
    formats = dict.fromkeys(members, low)
    for tensor in sorted(members, key=lambda tensor: -tensor.size):
        if tensor.size <= left:
            formats[tensor], left = high, left - tensor.size
    held = sum(tensor_bytes(tensor, fmt) for tensor, fmt in formats.items())
    others = sum(tensor_bytes(tensor, "F16") for tensor in matrices(model.spec) if tensor not in formats)
    size = costs(model, LEVELS).fixed + held + others
    return {
        "code bits of the mix": sum(bits[fmt] * tensor.size for tensor, fmt in formats.items()) / weights,
        "bpw of the mix": 8 * held / weights,
        "GB": size / 1e9,
        "over the paper's": size / 1e9 / PAPER_GB,
    }

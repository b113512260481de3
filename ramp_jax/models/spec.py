"""What a decoder looks like, read from a Hugging Face config or from GGUF metadata, and written as either."""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from ramp_jax.models.families import FAMILIES, Family, tables, usual_blocks
from ramp_jax.models.families.properties import is_neutral, not_computed, unexpected
from ramp_jax.models.layout import Block
from ramp_jax.models.metadata import Metadata, typed
from ramp_jax.models.rope import Rope
from ramp_jax.models.source import reason

_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_OF_THE_FILE = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map")

# What configs of other families can ask for beyond the keys that any family here reads.
_OTHER_HF_KEYS = (
    "alibi",
    "clip_qkv",
    "kv_lora_rank",
    "moe_intermediate_size",
    "mrope_section",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "parallel_attn",
    "q_lora_rank",
    "qk_layernorm",
    "qkv_bias",
    "quantization_config",
    "rotary_pct",
    "use_alibi",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "use_qk_norm",
    "use_qkv_bias",
)
_HARMLESS_GGUF_KEYS = (
    "attention.causal",
    "attention.layer_norm_epsilon",
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
)


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The numbers that describe a decoder of one family, by the `model_type` of its config; `blocks` is what they mean.

    `local_rope` are the positions of layers with a window where they have their own, `windowed` says which layers those
    are (none: no windows), `unrotated` lists the layers that tell no positions. `attention_scale` multiplies scores
    (None: 1 / √head_size), `attention_cap` and `final_cap` keep scores and logits within ±cap. Embeddings are
    multiplied by `embedding_multiplier` (and by √d_model where the family does), what sub-blocks add by
    `residual_scale`, logits divided by `logit_divisor`.
    `temperature`: see `Attention`. `biased` names the linears with a bias. `query_factor` multiplies the queries of a
    checkpoint when it is loaded, and is no part of what the loaded decoder is.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied: bool
    rope: Rope
    local_rope: Rope | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    unrotated: tuple[int, ...] = ()
    biased: tuple[str, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    final_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    temperature: tuple[float, int] | None = None
    query_factor: float = dataclasses.field(default=1.0, compare=False)

    @property
    def family(self) -> Family:
        """What its decoder computes and how its files store it."""
        return FAMILIES[self.model_type]

    @property
    def architecture(self) -> str:
        """What its GGUFs call it."""
        return self.family.architecture or self.model_type

    @property
    def embedding_scale(self) -> float:
        """What multiplies that which enters the first block."""
        return self.embedding_multiplier * (float(self.d_model) ** 0.5 if self.family.scaled_embedding else 1.0)

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Its layers, in forward order."""
        return (self.family.blocks or usual_blocks)(self)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Tensors f32 of its GGUF that follow from the spec, by name: divisors of rotary frequencies."""
        return {name: np.asarray(values, np.float32) for name, values in tables(self.rope).items()}

    @property
    def caveat(self) -> str | None:
        """What llama.cpp computes differently in a file of this decoder, None where nothing."""
        if self.window is None or self.window >= self.context_length or self.family.windows_run:
            return None
        return (
            f"llama.cpp runs {self.architecture} files without the model's sliding windows of {self.window:,} tokens: "
            f"in longer texts its results are not the model's."
        )


def make_spec(model_type: str, *, rope_theta: float | None = None, **fields: Any) -> DecoderSpec:
    """Spec of a family with the other fields given; `rope_theta` stands for plain rotary positions of whole heads.

    Raises `ValueError` for an unknown family and for sizes that do not fit each other or that llama.cpp cannot run.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type} is not supported; supported are {', '.join(FAMILIES)}.")
    if rope_theta is not None:
        fields["rope"] = Rope(rope_theta, fields["head_size"])
    spec = DecoderSpec(model_type=model_type, **fields)
    if spec.n_heads % spec.n_kv_heads:
        raise ValueError(
            f"{spec.n_heads} query heads cannot share {spec.n_kv_heads} key/value heads evenly; download it again."
        )
    if (reason := spec.family.limits(spec)) is not None:
        raise ValueError(f"llama.cpp cannot run a {spec.architecture} model with {reason}; use another checkpoint.")
    return spec


def spec_from_hf(config: Mapping[str, Any]) -> DecoderSpec:
    """Spec from the contents of `config.json`, of the text decoder where the model has other parts too.

    Keys that the config leaves out have the defaults of its class in transformers. Raises `ValueError` for what the
    decoder does not compute.
    """
    if not isinstance(config, Mapping):
        raise ValueError("config.json is not a JSON object; download the model again.")
    model_type, text = _text_part(config)
    family = FAMILIES[model_type]
    whole = text is config
    if whole and (missing := [key for key in _REQUIRED if text.get(key) is None]):
        raise ValueError(f"config.json lacks {missing[0]}; download the model again or add it.")
    read = {key for part in family.all_properties for key in part.hf_keys}
    known = {key for other in FAMILIES.values() for part in other.all_properties for key in part.hf_keys}
    for key in sorted((known | {*_OTHER_HF_KEYS}) - read):
        if not is_neutral(key, text.get(key)):
            raise not_computed(f"config.json asks for {key} {text[key]!r:.60}")
    _check_ropes(text)
    for part in family.all_properties:
        part.check_hf(text)
    filled = _filled(text, model_type)
    if not whole and "tie_word_embeddings" not in text and "tie_word_embeddings" in config:
        filled["tie_word_embeddings"] = config["tie_word_embeddings"]
    found: dict[str, Any] = {}
    for part in family.all_properties:
        found |= part.from_hf(filled, found)
    return make_spec(model_type, **found)


def hf_config(spec: DecoderSpec) -> dict[str, Any]:
    """The contents of a `config.json` that `spec_from_hf` and transformers read as `spec`."""
    # some classes of transformers pad with a token that small vocabularies do not have
    config = {"architectures": [spec.family.hf], "model_type": spec.model_type, "pad_token_id": None}
    for part in spec.family.all_properties:
        config |= part.to_hf(spec)
    return config


def spec_from_gguf(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tables: Mapping[str, np.ndarray]
) -> DecoderSpec:
    """Spec from GGUF key-value pairs, the shapes of the file's tensors, and those tensors of it that are tables.

    Raises `ValueError` for what the decoder does not compute.
    """
    arch = fields.get("general.architecture", "none named")
    candidates = [name for name, family in FAMILIES.items() if (family.architecture or name) == arch]
    if not candidates:
        raise ValueError(f"GGUF architecture {arch} is not supported; supported are {', '.join(_architectures())}.")
    pairs = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    if (tokens := fields.get("tokenizer.ggml.tokens")) is not None:
        pairs["vocab_size"] = len(tokens)
    name = next(name for name in candidates if FAMILIES[name].of_gguf(pairs))
    return _read_pairs(name, pairs, {"tensors": shapes, "tables": tables})


def describe(spec: DecoderSpec, name: str, parameters: int, folder: str = "") -> Metadata:
    """The `general.*` and `<architecture>.*` pairs that llama.cpp needs to run `spec`, as its converter writes them.

    What a model's `folder` or repository is called says its base, version, size and what it was tuned for.
    """
    arch = spec.architecture
    _, _, base, tuned, version, size = gguf.Metadata.get_model_id_components(folder, parameters)
    pairs: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.version": version,
        "general.finetune": tuned,
        "general.basename": base,
        "general.size_label": size or gguf.size_label(parameters, parameters, 0, 0),
    }
    pairs = {key: value for key, value in pairs.items() if value is not None}
    for part in spec.family.all_properties:
        pairs |= {f"{arch}.{key}": value for key, value in part.to_gguf(spec).items()}
    return typed(pairs)


def _text_part(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The model type of the decoder of text, and its part of the config."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and str(text.get("model_type")) in FAMILIES:
        return str(text["model_type"]), text
    if text is not None:
        kind = text.get("model_type") if isinstance(text, Mapping) else text
        raise ValueError(
            f"a text_config of model type {kind!r:.60} is not supported; supported are {', '.join(FAMILIES)}."
        )
    by_class = {family.hf: name for name, family in FAMILIES.items()}
    named, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(kind, str | None):
        raise unexpected("config.json: model_type", kind, "a text")
    asked = str(named[0] if isinstance(named, list) and named else kind)
    name = by_class.get(asked, asked if asked in FAMILIES else None)
    if name is None:
        nearest = difflib.get_close_matches(asked, by_class, 1)
        hint = f" (nearest: {nearest[0]})" if nearest else ""
        raise ValueError(f"architecture {asked:.60} is not supported; supported are {', '.join(by_class)}{hint}.")
    if kind not in (None, name):
        raise ValueError(f"config.json: model_type {kind!r:.60} and architecture {asked} are two; correct one of them.")
    return name, config


def _filled(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The config with the defaults of its class in transformers, which also brings older keys into today's form."""
    if model_type not in CONFIG_MAPPING:
        return dict(config)
    given = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    for key in ("head_dim", "hidden_activation"):  # some classes take no null for what they derive
        if given.get(key, False) is None:
            del given[key]
    if given.get("num_key_value_heads", False) is None:
        given["num_key_value_heads"] = given.get("num_attention_heads")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its advice is for who writes configs, not for who reads them
    try:
        return given | CONFIG_MAPPING[model_type].from_dict(given).to_dict()
    except Exception as error:
        raise ValueError(
            f"config.json is not a sound description of a {model_type} model ({reason(error)}); correct it."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_ropes(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the old key for rotary positions says other things than the new one beside it."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        renamed = {"rope_type" if key == "type" else key: value for key, value in old.items()}
        if differs := [key for key, value in renamed.items() if new.get(key) != value]:
            raise ValueError(f"config.json: rope_scaling and rope_parameters differ in {differs[0]}; remove one.")


def _read_pairs(name: str, pairs: Mapping[str, Any], file: Mapping[str, Any]) -> DecoderSpec:
    family = FAMILIES[name]
    read = {key for part in family.all_properties for key in part.gguf_keys}
    if pairs.get("attention.causal") is False:
        raise not_computed("the GGUF asks for attention in both directions (attention.causal)")
    for key in sorted(pairs.keys() - read - {*_HARMLESS_GGUF_KEYS}):
        if not is_neutral(key, pairs[key]):
            raise not_computed(f"the GGUF asks for {key} {pairs[key]!r:.60}")
    found: dict[str, Any] = dict(file)
    for part in family.all_properties:
        found |= part.from_gguf(pairs, found)
    return make_spec(name, **{key: value for key, value in found.items() if key not in file})


def _architectures() -> Iterator[str]:
    yield from dict.fromkeys(family.architecture or name for name, family in FAMILIES.items())

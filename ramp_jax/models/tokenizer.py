"""Tokenizers from GGUF metadata, and GGUF metadata from Hugging Face tokenizers.

GGUF names a byte-level BPE's pre-tokenizer (`tokenizer.ggml.pre`) instead of storing it; `_PRE_TOKENIZERS` is that
table, read in both directions.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}{_TAIL}",
    "qwen2": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{_TAIL}",
}


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
} | {name: _split(pattern) for name, pattern in _SPLITS.items()}

# llama.cpp's token types
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def tokenizer_from_gguf(fields: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that llama.cpp builds from the same metadata.

    Raises `ValueError` for a pre-tokenizer or vocabulary type that is not known here.
    """
    model = fields.get("tokenizer.ggml.model")
    if model == "llama":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if model != "gpt2":
        raise ValueError(f"{path}: tokenizer model {model!r} is not supported; supported are gpt2, llama.")
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"{path}: pre-tokenizer {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}.")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])
    special = {
        f"{role}_token": tokens[fields[key]]
        for role, key in {
            "bos": "tokenizer.ggml.bos_token_id",
            "eos": "tokenizer.ggml.eos_token_id",
            "unk": "tokenizer.ggml.unknown_token_id",
            "pad": "tokenizer.ggml.padding_token_id",
        }.items()
        if key in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=fields.get("tokenizer.chat_template"), **special
    )


def gguf_from_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` metadata for a byte-level BPE of a Hugging Face checkpoint.

    Raises `ValueError` where llama.cpp has no name for the tokenizer, which would make it cut text differently.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    if saved["model"]["type"] != "BPE" or saved["model"].get("byte_fallback"):
        raise ValueError("only byte-level BPE tokenizers can be exported; convert this checkpoint to GGUF first.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, i in saved["model"]["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in saved["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(saved["pre_tokenizer"]),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
    }
    for key, value in {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }.items():
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = np.uint32(value)
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _pre_name(saved: dict[str, Any]) -> str:
    for name, known in _PRE_TOKENIZERS.items():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = known
        if _essence(json.loads(backend.to_str())["pre_tokenizer"]) == _essence(saved):
            return name
    raise ValueError(f"no llama.cpp pre-tokenizer matches this checkpoint's; known are {', '.join(_PRE_TOKENIZERS)}.")


def _essence(node: Any) -> Any:
    """A pre-tokenizer's JSON without what does not change where it cuts."""
    if isinstance(node, dict):
        return {key: _essence(value) for key, value in node.items() if key not in ("trim_offsets", "invert")}
    return [_essence(item) for item in node] if isinstance(node, list) else node

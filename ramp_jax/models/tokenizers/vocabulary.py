"""A vocabulary as GGUF stores it: tokens by id, each of a type, and which of them play a part."""

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gguf import Keys

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""What SentencePiece calls the tokens of single bytes."""

SPACE = "▁"
"""What SentencePiece writes for a space."""

WAY_OUT = "take the tokenizer of a GGUF of this model with --tokenizer_from=FILE.gguf."


class Kind(enum.IntEnum):
    """llama.cpp's types of tokens, which are SentencePiece's too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


ROLES = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "sep_token": Keys.Tokenizer.SEP_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
    "mask_token": Keys.Tokenizer.MASK_ID,
}
"""GGUF key of each special token of transformers."""

_NONE = (None, -1, 2**32 - 1)  # ids that llama.cpp's tools write for no token
_DEFAULTS = {"llama": {Keys.Tokenizer.BOS_ID: 1, Keys.Tokenizer.EOS_ID: 2, Keys.Tokenizer.UNK_ID: 0}}

# Tokens that llama.cpp takes for control tokens by their text, whatever their type in the file.
_CONTROL_NAMES = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[ <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> "
    "<|prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> <|fim_pad|> "
    "<fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>"
)
_CONTROL_BY_TEXT = frozenset(_CONTROL_NAMES.split())
_USER_DEFINED_BY_TEXT = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


def padding(i: int) -> str:
    """What llama.cpp's converter calls an id that the tokenizer leaves out."""
    return f"[PAD{i}]"


def too_large(folder: Path, size: int, vocab_size: int) -> str:
    """What to say of a tokenizer with ids up to `size` that the model's vocabulary does not have."""
    return (
        f"{folder}: its tokenizer has {size:,} tokens, the model a vocabulary of {vocab_size:,}; put the tokenizer "
        f"files there that came with these weights."
    )


def kind_in_llama_cpp(token: str, kind: int) -> int:
    """The type by which llama.cpp goes, for which it also looks at the token's text."""
    if token in _USER_DEFINED_BY_TEXT:
        return Kind.USER_DEFINED
    return Kind.CONTROL if token in _CONTROL_BY_TEXT else kind


def looks_special(token: str) -> bool:
    """Whether llama.cpp's converter writes an added token as a control token though it is not marked as special."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    named = token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return named or any(token.startswith(left) and token.endswith(right) for left, right in brackets)


def special_ids(fields: dict[str, Any], model: str, size: int, path: Path) -> dict[str, int]:
    """Id of each special token that a file's metadata names; −1, also as u32, means that there is none.

    Raises `ValueError` for any other id beyond the vocabulary.
    """
    for key, i in fields.items():
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")) or i in _NONE:
            continue
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size:
            raise ValueError(f"{path}: {key} is {i!r:.60}, a token from 0 to {size - 1:,} was expected; correct it.")
    defaults = _DEFAULTS.get(model, {})
    ids = {role: defaults.get(key) if fields.get(key) in _NONE else fields[key] for role, key in ROLES.items()}
    return {role: i for role, i in ids.items() if i is not None and 0 <= i < size}


def first_duplicate(tokens: Iterable[str]) -> str | None:
    """A token that stands in the vocabulary twice, which llama.cpp does not run."""
    seen: set[str] = set()
    return next((token for token in tokens if token in seen or seen.add(token)), None)

"""Text to token windows: deterministic, and calibration never overlaps held-out text."""

import pydoc_data.topics
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "heldout"]

_CALIBRATION_SHARE = 0.8  # of the tokens, from the start; the rest is held out


def read_text(source: str) -> str:
    """The text of `builtin` (the standard library's language topics), a file, or `hf:NAME:CONFIG:SPLIT`.

    Raises `FileNotFoundError` for anything else or for a data set that the hub does not deliver.
    """
    if source == "builtin":
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    if source.startswith("hf:"):
        return _read_hub(source)
    if not Path(source).is_file():
        raise FileNotFoundError(f"data {source!r} is not a file; pass a text file, builtin, or hf:NAME:CONFIG:SPLIT.")
    return Path(source).read_text(encoding="utf-8")


def windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, context: int, count: int, split: Split = "calibration"
) -> Int[np.ndarray, "count context"]:
    """`count` disjoint windows of `context` tokens, spread evenly over one split of the text.

    Where the tokenizer begins texts with BOS, each window's first token is replaced by it (as llama.cpp does).
    Raises `ValueError` where the split is too short.
    """
    tokens = np.asarray(tokenizer.encode(read_text(source), add_special_tokens=False), np.int32)
    border = int(len(tokens) * _CALIBRATION_SHARE)
    tokens = tokens[:border] if split == "calibration" else tokens[border:]
    available = len(tokens) // context
    if count > available:
        raise ValueError(
            f"the {split} part of {source!r} holds {available} windows of {context} tokens, fewer than the {count} "
            f"asked for; ask for fewer or shorter windows, or pass a longer text."
        )
    chosen = np.arange(count) * available // count
    cut = tokens[: available * context].reshape(available, context)[chosen]
    if tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id:
        cut[:, 0] = tokenizer.bos_token_id
    return cut


def _read_hub(source: str) -> str:
    from datasets import load_dataset

    try:
        _, name, config, split = source.split(":")
        rows = load_dataset(name, config or None, split=split)
        return "\n".join(rows["text"])
    except Exception as error:
        raise FileNotFoundError(
            f"data set {source!r} could not be read ({type(error).__name__}: {str(error)[:200]}); "
            f"the form is hf:NAME:CONFIG:SPLIT, and offline choices are builtin or a text file."
        ) from error

"""Text to token windows: deterministic, and calibration never overlaps held-out text."""

import functools
import hashlib
import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "heldout", "all"]
Begin = Literal["window", "text"]

_CALIBRATION_SHARE = 0.8  # of the tokens, from the start; the rest is held out

STDLIB_WITHOUT = (
    *("test", "tests", "idle_test", "pydoc_data", "encodings"),
    *("site-packages", "dist-packages", "ensurepip", "__pycache__"),
)
"""Folders that `stdlib` leaves out: tests, topics (which are taken as text), tables, and what is no part of it."""

_OF_THE_MACHINE = ("config-", "_sysconfigdata")  # how a name begins that differs between builds of one version

_TOPICS_SHARE = 0.75  # of the characters of `builtin` that `stdlib` holds: nothing of what `builtin` holds out


def read_text(source: str) -> str:
    """The text of `builtin` (the standard library's language topics), a file, or `hf:NAME:CONFIG:SPLIT`.

    `stdlib` is what `builtin` does not hold out and the standard library's source files in the order of their paths;
    `stdlib:NAME,NAME` only those modules and packages of it, e.g. `stdlib:json,abc`. Raises `FileNotFoundError` for
    anything else or for a data set that the hub does not deliver.
    """
    if source == "builtin":
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    if source == "stdlib":
        return _topics_to_learn() + "\n\n" + _read_stdlib(None)
    if source.startswith("stdlib:"):
        return _read_stdlib(source.removeprefix("stdlib:").split(","))
    if source.startswith("hf:"):
        return _read_hub(source)
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"data {source!r} is not a file; pass a text file, builtin, stdlib, or hf:NAME:CONFIG:SPLIT."
        )
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data {source!r} is not UTF-8 text ({error}); convert it or pass a text file.") from error


def is_inside(source: str) -> bool:
    """Whether `source` is a text that every machine has, or a file that truly lies in the working folder."""
    if source in ("builtin", "stdlib") or source.startswith("stdlib:"):
        return True
    return not source.startswith("hf:") and Path(source).resolve().is_relative_to(Path.cwd().resolve())


def windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    count: int | None,
    split: Split = "calibration",
    bos: Begin = "window",
) -> Int[np.ndarray, "count context"]:
    """`count` disjoint windows of `context` tokens, spread evenly over one split of the text; None takes all.

    `calibration` is the first four fifths of the tokens and `heldout` the rest, so that they never overlap; `all` is
    for texts that are a test set as a whole. A tokenizer that begins texts with BOS begins the text with it; with
    `bos="window"` it also replaces each window's first token, as in llama.cpp, and with `"text"` it does not, as in
    GPTQ's evaluation and those after it. Raises `ValueError` for a count below 1 or where the split is too short.
    """
    tokens = _encode(read_text(source), tokenizer)
    border = int(len(tokens) * _CALIBRATION_SHARE)
    tokens = {"calibration": tokens[:border], "heldout": tokens[border:], "all": tokens}[split]
    available = len(tokens) // context
    if not available:
        raise ValueError(
            f"the {split} part of {source!r} holds {len(tokens)} tokens, fewer than one window of {context}; "
            f"ask for shorter windows, or pass a longer text."
        )
    if count is not None and count < 1:
        raise ValueError(f"{count} windows were asked for; ask for at least one.")
    if count is not None and count > available:
        raise ValueError(
            f"the {split} part of {source!r} holds {available} windows of {context} tokens, fewer than the {count} "
            f"asked for; ask for fewer or shorter windows, or pass a longer text."
        )
    count = available if count is None else count
    cut = tokens[: available * context].reshape(available, context)[np.arange(count) * available // count]
    if bos == "window" and _begins_with_bos(tokenizer):
        cut[:, 0] = tokenizer.bos_token_id
    return cut


def fingerprint(source: str) -> str:
    """SHA-256 of the text that `source` names, whatever its name and the white space around it."""
    return hashlib.sha256(read_text(source).strip().encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " tokens"]:
    """Tokens of a text, kept: a run cuts several sets of windows from one text."""
    begin = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    return np.asarray(begin + tokenizer.encode(text, add_special_tokens=False), np.int32)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def _topics_to_learn() -> str:
    """The beginning of `builtin` without paragraphs that share a line with its end: topics quote each other."""
    text = read_text("builtin")
    border = int(len(text) * _TOPICS_SHARE)
    held = {line.strip() for line in text[border:].splitlines()} - {""}
    paragraphs = text[:border].split("\n\n")
    return "\n\n".join(p for p in paragraphs if held.isdisjoint(line.strip() for line in p.splitlines()))


def _read_stdlib(chosen: list[str] | None) -> str:
    """Source files of the standard library with blank lines between; `chosen` modules and packages, or all."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    paths = (path for path in paths if not path.parts[0].startswith(_OF_THE_MACHINE))
    kept = {path.as_posix(): path for path in paths if not set(path.parts) & set(STDLIB_WITHOUT)}
    if chosen is not None:
        tops = {path.parts[0].removesuffix(".py") for path in kept.values()}
        if missing := [name for name in chosen if name not in tops]:
            raise FileNotFoundError(f"the standard library has no source of {missing[0]!r}; pass names of its modules.")
        kept = {name: path for name, path in kept.items() if path.parts[0].removesuffix(".py") in chosen}
    return "\n\n".join((root / kept[name]).read_text(encoding="utf-8", errors="replace") for name in sorted(kept))


def _read_hub(source: str) -> str:
    """All texts of a data set with blank lines between, as GPTQ and the papers after it join WikiText's rows.

    (`wiki.test.raw`, which llama.cpp's numbers are on, has no added lines; pass that file where those are wanted.)
    """
    from datasets import load_dataset

    try:
        _, name, config, split = source.split(":", 3)
        return "\n\n".join(load_dataset(name, config or None, split=split, trust_remote_code=False)["text"])
    except Exception as error:
        cause = str(error).splitlines()[0][:200] if str(error) else ""
        raise FileNotFoundError(
            f"data set {source!r} could not be read ({type(error).__name__}: {cause}); "
            f"the form is hf:NAME:CONFIG:SPLIT, and offline choices are builtin or a text file."
        ) from error

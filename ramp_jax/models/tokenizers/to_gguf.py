"""The vocabulary of a Hugging Face tokenizer as GGUF pairs, under which llama.cpp gives the same ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from ramp_jax.models.tokenizers import pre, spm
from ramp_jax.models.tokenizers.pieces import Pieces
from ramp_jax.models.tokenizers.vocabulary import (
    BYTES,
    SPACE,
    WAY_OUT,
    Kind,
    first_duplicate,
    looks_special,
    padding,
    too_large,
)

Saved = dict[str, Any]  # a `tokenizer.json`


def vocabulary_pairs(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: Path, pieces: Pieces | None, alone: bool
) -> dict[str, Any]:
    """Model, tokens, types, and merges or scores.

    `pieces` are SentencePiece's where its file is there, whose scores are taken if the tokenizer goes by them;
    `alone`: the tokenizer was built of them, so tokens and types are theirs as well. Raises `ValueError` for a
    tokenizer with more tokens than `vocab_size`, for a token of several ids, and for what GGUF cannot express.
    """
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    model = saved["model"]
    for expected, what in (
        (model["type"] == "BPE", f"llama.cpp's models have no vocabulary of type {model['type']}"),
        (not model.get("dropout"), "its merges drop out at random"),
        (not model.get("continuing_subword_prefix"), "its tokens inside words have a prefix"),
        (not model.get("end_of_word_suffix"), "its tokens at the end of words have a suffix"),
    ):
        if not expected:
            raise _inexpressible(folder, what)
    tokens, kinds = _tokens(saved, vocab_size, tokenizer.unk_token, folder)
    if alone and pieces is not None:
        tokens, kinds = _tokens_of(pieces, tokens, kinds)
    if (twice := first_duplicate(tokens)) is not None:
        raise ValueError(f"{folder}: token {twice!r} stands in the vocabulary twice; save the tokenizer again.")
    pairs = {Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: np.asarray(kinds, np.int32)}
    if model.get("byte_fallback"):
        return pairs | _sentencepiece_pairs(tokenizer.backend_tokenizer, saved, pairs, pieces, folder)
    if not model["merges"]:
        raise _inexpressible(folder, "it has no merges")
    name = _pre_name(tokenizer, saved)
    if name is None:
        raise _inexpressible(folder, "llama.cpp has no pre-tokenizer that cuts words as this one does")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: name,
        **pairs,
        Keys.Tokenizer.MERGES: merges,
    }


def _inexpressible(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder}: its tokenizer cannot be written to GGUF, since {what}; {WAY_OUT}")


def _tokens(saved: Saved, vocab_size: int, unknown: str | None, folder: Path) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids that the tokenizer leaves out hold unused tokens."""
    vocabulary, added = saved["model"]["vocab"], saved["added_tokens"]
    if isinstance(vocabulary, list):  # of other models than BPE
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    count = 1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1)
    if count > vocab_size:
        raise ValueError(too_large(folder, count, vocab_size))
    tokens, kinds = [padding(i) for i in range(vocab_size)], [int(Kind.UNUSED)] * vocab_size
    bytes_too = BYTES if saved["model"].get("byte_fallback") else ()
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, Kind.BYTE if token in bytes_too else Kind.NORMAL
    for token in added:
        tokens[token["id"]], kinds[token["id"]] = _added(token, bool(bytes_too), unknown)
    return tokens, kinds


def _tokens_of(pieces: Pieces, tokens: list[str], kinds: list[int]) -> tuple[list[str], list[int]]:
    """Tokens and types of pieces in place of those of the tokenizer built of them, which keeps neither all types nor
    duplicates. Pieces of texts that files beside name as special tokens stay these."""
    own = [
        Kind.CONTROL if built == Kind.CONTROL and kind in (Kind.NORMAL, Kind.UNUSED) else kind
        for built, kind in zip(kinds, pieces.kinds, strict=False)
    ]
    return [*pieces.tokens, *tokens[len(own) :]], [*own, *kinds[len(own) :]]


def _added(token: Saved, sentencepiece: bool, unknown: str | None) -> tuple[str, int]:
    text = token["content"]
    if sentencepiece and text == unknown:
        return text, Kind.UNKNOWN
    if token["special"] or looks_special(text):
        return text, Kind.CONTROL
    # llama.cpp looks for these in the text as it is, spaces not escaped
    return text.replace(SPACE, " ") if sentencepiece else text, Kind.USER_DEFINED


def _pre_name(tokenizer: PreTrainedTokenizerBase, saved: Saved) -> str | None:
    backend = tokenizer.backend_tokenizer
    normalizers = _flat(saved["normalizer"])
    if backend.pre_tokenizer is None or any(normalizer["type"] != "NFC" for normalizer in normalizers):
        return None
    return pre.find(
        backend.pre_tokenizer,
        [text for step in _flat(saved["pre_tokenizer"]) for text in step.get("pattern", {}).values()],
        nfc=bool(normalizers),
        ignore_merges=bool(saved["model"].get("ignore_merges")),
        merges_matter=lambda: _merges_matter(saved),
        cleans=tokenizer.clean_up_tokenization_spaces,
    )


def _flat(node: Saved | None) -> list[Saved]:
    """The steps of a normalizer or a pre-tokenizer."""
    if node is None:
        return []
    parts = node.get("normalizers", node.get("pretokenizers")) if node["type"] == "Sequence" else None
    return [node] if parts is None else [step for part in parts for step in _flat(part)]


def _merges_matter(saved: Saved) -> bool:
    """Whether any token of the vocabulary is not what merging makes of its text."""
    model = saved["model"]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged = models.BPE(model["vocab"], merges, ignore_merges=False)
    special = {token["content"] for token in saved["added_tokens"]}
    return any(len(merged.tokenize(token)) != 1 for token in model["vocab"] if token not in special)


def _sentencepiece_pairs(
    backend: Tokenizer, saved: Saved, pairs: dict[str, Any], pieces: Pieces | None, folder: Path
) -> dict[str, Any]:
    """What llama.cpp's model `llama` needs besides tokens and types."""
    model, tokens, kinds = saved["model"], pairs[Keys.Tokenizer.LIST], pairs[Keys.Tokenizer.TOKEN_TYPE]
    if missing := set(BYTES) - set(tokens):
        raise _inexpressible(folder, f"it has no token for byte {min(missing)}")
    prefix = _prefix(backend, model["vocab"]) if _only_spaces(saved) else None
    if prefix is None or model.get("ignore_merges"):
        raise _inexpressible(folder, "it changes texts in a way that llama.cpp's SentencePiece does not")
    made = {merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    others = (token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL and token not in made)
    if (alone := next((t for t in others if len(t) > 1 and spm.can_be_made(t, model["vocab"])), None)) is not None:
        raise _inexpressible(folder, f"no merge makes {alone!r:.60}, which llama.cpp would make of its parts")
    return {
        Keys.Tokenizer.MODEL: "llama",
        Keys.Tokenizer.PRE: "default",
        Keys.Tokenizer.SCORES: np.asarray(_scores(model, tokens, pieces), np.float32),
        Keys.Tokenizer.ADD_PREFIX: prefix,
    }


_PROBES = ("a", "a b", "a  b   c ", "a\t\n \r\nb", "Éa\u0301 ﬁ ａ ½ ①", "don't 12345 x=[1,2];", "日本 🙂", f"a{SPACE}b")


def _only_spaces(saved: Saved) -> bool:
    """Whether a tokenizer's file changes and cuts texts at spaces alone, as far as that is written down."""
    steps = [*_flat(saved["normalizer"]), *_flat(saved["pre_tokenizer"])]
    return all(
        step["type"] in ("Prepend", "Metaspace")
        or (step["type"] in ("Replace", "Split") and step["pattern"] in ({"String": " "}, {"String": SPACE}))
        for step in steps
    )


def _prefix(backend: Tokenizer, vocabulary: dict[str, int]) -> bool | None:
    """Whether texts get a space in front; None where more is done to them than this and the escaping of spaces."""
    inner = any(SPACE in token.lstrip(SPACE) for token in vocabulary)
    runs = any(token.startswith(2 * SPACE) for token in vocabulary)
    found = set()
    for probe in _PROBES:
        text = probe if backend.normalizer is None else backend.normalizer.normalize_str(probe)
        words = (
            [text] if backend.pre_tokenizer is None else [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        )
        escaped = probe.replace(" ", SPACE)
        joined = "".join(words)
        cut_where_tokens_begin = all(word.startswith(SPACE) for word in words[1:]) and not (inner or runs)
        if joined not in (escaped, SPACE + escaped) or (len(words) > 1 and not cut_where_tokens_begin):
            return None
        found.add(joined != escaped)
    return found.pop() if len(found) == 1 else None


def _scores(model: Saved, tokens: list[str], pieces: Pieces | None) -> list[float]:
    """A score per token, such that merging by scores is merging by the tokenizer's ranks."""
    made = [merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    if pieces is not None:
        own = dict(zip(pieces.tokens, pieces.scores, strict=True))
        by_rank: list[Any] = [own.get(token) for token in made]
        if None not in by_rank and by_rank == sorted(by_rank, reverse=True):
            return [own.get(token, -1000.0) for token in tokens]
    ranks: dict[str, int] = {}
    for rank, token in enumerate(made):
        ranks.setdefault(token, rank)
    return [-float(ranks.get(token, len(made))) for token in tokens]

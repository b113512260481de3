"""Tokenizers from GGUF metadata: the ids that llama.cpp gives for the same file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import Keys
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ramp_jax.models.tokenizers import names, pre, spm
from ramp_jax.models.tokenizers.templates import templates_from_gguf
from ramp_jax.models.tokenizers.vocabulary import (
    BYTES,
    SPACE,
    WAY_OUT,
    Kind,
    first_duplicate,
    kind_in_llama_cpp,
    padding,
    special_ids,
)

_BYTES = frozenset(BYTES)
_SUPPORTED = ("gpt2", "llama")
_FOUND_IN_TEXTS = (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)
_BPE_BOS = _BPE_EOS = 11  # llama.cpp's for a file that asks for them and names none


def tokenizer_from_gguf(fields: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that llama.cpp builds from the same metadata; special tokens are found in texts.

    `fields` are the file's values, `path` names it in errors. Raises `ValueError` for a model or pre-tokenizer that is
    not known here and for a damaged vocabulary.
    """
    model = fields.get(Keys.Tokenizer.MODEL)
    if model in (None, "none", "no_vocab"):
        raise ValueError(f"{path} brings no tokenizer; {WAY_OUT}")
    if model not in _SUPPORTED:
        raise ValueError(f"{path}: tokenizer model {model!r} is not supported; supported are {', '.join(_SUPPORTED)}.")
    if not isinstance(pre_name := fields.get(Keys.Tokenizer.PRE, ""), str):
        raise ValueError(f"{path}: {Keys.Tokenizer.PRE} is {pre_name!r:.60}, a text was expected; correct it.")
    tokens = _tokens(fields, path)
    kinds = _kinds(fields, tokens, path)
    kinds = [kind_in_llama_cpp(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    vocabulary = without_padding(tokens, kinds)
    scores: dict[str, float] = {}
    if model == "llama":
        scores = makeable(tokens, kinds, _per_token(fields, Keys.Tokenizer.SCORES, [0.0] * len(tokens), path))
        backend = spm.backend(vocabulary, scores, prefix=_flag(fields, Keys.Tokenizer.ADD_PREFIX, True, path))
        adds_bos = True
    else:
        known = _pre(pre_name or "default", path)
        backend = _byte_level(known, vocabulary, _merges(fields, vocabulary, path))
        adds_bos = known.add_bos
    backend.add_tokens(added_tokens(tokens, kinds, str(fields.get(Keys.General.NAME, ""))))
    ids = special_ids(fields, model, len(tokens), path)
    add_around(
        backend,
        ids.get("bos_token", _BPE_BOS) if _flag(fields, Keys.Tokenizer.ADD_BOS, adds_bos, path) else None,
        ids.get("eos_token", _BPE_EOS) if _flag(fields, Keys.Tokenizer.ADD_EOS, False, path) else None,
    )
    by_score = model == "llama" and not spm.ranks_suffice(vocabulary, scores)
    built = (spm.ScoredTokenizer if by_score else PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        chat_template=templates_from_gguf(fields, path),
        clean_up_tokenization_spaces=False,
        **{role: tokens[i] for role, i in ids.items() if kinds[i] in _FOUND_IN_TEXTS},
    )
    for role, i in ids.items():  # given above, an ordinary token such as "!" for padding would be cut out of texts
        setattr(built, role, tokens[i])
    if by_score:
        spm.use_scores(built.backend_tokenizer, vocabulary, scores)
    return built


def add_around(backend: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Let every text begin and end with these tokens, where they are given and in the vocabulary."""
    special = [
        {"id": name, "ids": [i], "tokens": [backend.id_to_token(i)]}
        for name, i in (("bos", bos), ("eos", eos))
        if i is not None and backend.id_to_token(i) is not None
    ]
    given = {token["id"] for token in special}
    single = [part for part in ("bos", "$A", "eos") if part == "$A" or part in given]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=special
    )


def _tokens(fields: dict[str, Any], path: Path) -> list[str]:
    tokens = fields.get(Keys.Tokenizer.LIST)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path} has no vocabulary ({Keys.Tokenizer.LIST}); download or convert the file again.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp calls them
    if (twice := first_duplicate(tokens)) is not None:
        raise ValueError(f"{path}: token {twice!r} stands in the vocabulary twice; convert the file again.")
    return tokens


def without_padding(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Ids of tokens, without those that only fill the vocabulary up."""
    return {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != Kind.UNUSED or token != padding(i)
    }


def makeable(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> dict[str, float]:
    """Scores of the tokens that merging may make. Special ones are cut out of a text before, spaces not yet escaped."""
    return {
        token: score
        for token, kind, score in zip(tokens, kinds, scores, strict=True)
        if kind not in _FOUND_IN_TEXTS or SPACE in token
    }


def _per_token(fields: dict[str, Any], key: str, default: list[Any], path: Path) -> list[Any]:
    values = fields.get(key, default)
    numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not numbers or len(values) != len(default) or not all(map(math.isfinite, values)):
        raise ValueError(f"{path}: {key} does not hold a number for each of {len(default)} tokens; convert it again.")
    return values


def _kinds(fields: dict[str, Any], tokens: list[str], path: Path) -> list[int]:
    key = Keys.Tokenizer.TOKEN_TYPE
    kinds = _per_token(fields, key, [Kind.NORMAL] * len(tokens), path)
    if unknown := set(kinds) - set(Kind):
        raise ValueError(f"{path}: {key} has {min(unknown)}, types from 1 to 6 were expected; convert the file again.")
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == Kind.BYTE and token not in _BYTES:
            raise ValueError(f"{path}: {key} says that {token!r:.60} is a byte, as <0x0A> is; convert the file again.")
    return kinds


def _flag(fields: dict[str, Any], key: str, default: bool, path: Path) -> bool:
    value = fields.get(key, default)
    if value not in (0, 1):
        raise ValueError(f"{path}: {key} is {value!r:.60}, true or false was expected; convert the file again.")
    return bool(value)


def _pre(name: str, path: Path) -> pre.Pre:
    if (known := pre.get(name)) is None:
        supported = ", ".join(pre.PRE_TOKENIZERS)
        raise ValueError(f"{path}: pre-tokenizer {name!r} is not supported; supported are {supported}.")
    return known


def _merges(fields: dict[str, Any], vocabulary: dict[str, int], path: Path) -> list[tuple[str, str]]:
    merges = fields.get(Keys.Tokenizer.MERGES)
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError(f"{path} has no merges ({Keys.Tokenizer.MERGES}); download or convert the file again.")
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not all(token in vocabulary for token in (left, right, left + right)):
            raise ValueError(f"{path}: merge {merge!r} is not of two tokens to a third; convert the file again.")
        pairs.append((left, right))
    if (twice := first_duplicate(merges)) is not None:
        raise ValueError(f"{path}: merge {twice!r:.60} stands there twice; convert the file again.")
    return pairs


def _byte_level(known: pre.Pre, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=known.ignore_merges))
    backend.pre_tokenizer = pre.pre_tokenizer(known.splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def added_tokens(tokens: Sequence[str], kinds: Sequence[int], name: str = "") -> list[AddedToken]:
    """What llama.cpp cuts out of a text before anything else.

    In a model whose `name` is Phi-3's, the white space behind most of these goes with them.
    """
    strip = names.stripping(tokens, name)
    return [
        AddedToken(token, normalized=False, special=kind != Kind.USER_DEFINED, rstrip=token in strip)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in _FOUND_IN_TEXTS
    ]

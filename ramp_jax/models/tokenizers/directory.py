"""Tokenizers from Hugging Face directories, with the GGUF metadata under which llama.cpp gives the same ids.

What counts is `tokenizer.json`, or `tokenizer.model` where that is all there is, and the special tokens and templates
of the files beside them. Classes that these files name are not asked, since they put parts of their own in place of
what is stored.
"""

import dataclasses
from pathlib import Path
from typing import Any

from gguf import Keys
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ramp_jax.models.metadata import Metadata, plain, typed
from ramp_jax.models.source import read_json, read_optional_json, reason
from ramp_jax.models.tokenizers import names, spm
from ramp_jax.models.tokenizers.from_gguf import (
    add_around,
    added_tokens,
    makeable,
    tokenizer_from_gguf,
    without_padding,
)
from ramp_jax.models.tokenizers.pieces import Pieces, read_pieces
from ramp_jax.models.tokenizers.saved import check_saved
from ramp_jax.models.tokenizers.special import ends, special_pairs
from ramp_jax.models.tokenizers.templates import templates_from_directory, templates_to_gguf
from ramp_jax.models.tokenizers.to_gguf import vocabulary_pairs
from ramp_jax.models.tokenizers.vocabulary import ROLES

_FILE, _PIECES, _CONFIG, _MAP = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"
_LIMIT = 1 << 31  # ids are i32 in llama.cpp


def tokenizer_from_directory(folder: Path, vocab_size: int) -> tuple[PreTrainedTokenizerBase, Metadata] | None:
    """The tokenizer of a Hugging Face directory and its pairs `tokenizer.*`; None where it has no tokenizer's files.

    The pairs hold `vocab_size` tokens; those that the tokenizer lacks are unused ones, as llama.cpp's converter has it.
    Raises `ValueError` for damaged files, a tokenizer larger than the vocabulary, and what GGUF has no name for.
    """
    config = read_optional_json(folder / _CONFIG)
    listed = _listed(folder, config)
    pieces = None
    if (folder / _FILE).is_file():
        backend = _backend(folder / _FILE, vocab_size)
        _add_missing(backend, listed, folder)
    elif (folder / _PIECES).is_file():
        pieces = read_pieces(folder / _PIECES).with_added(listed, vocab_size, folder)
        pieces = dataclasses.replace(pieces, prefix=_prefix(config, pieces.prefix, folder))
        backend = _backend_of(pieces)
    else:
        return None
    configs = _configs(folder)
    unknown = getattr(backend.model, "unk_token", None)
    roles = ({"unk_token": unknown} if unknown else {}) | (pieces.roles() if pieces else {}) | _roles(folder, config)
    roles |= _roles_by_id(backend, roles, configs)
    if backend.post_processor is None:
        _add_as_configured(backend, config, roles, bos=pieces is not None)
    templates = templates_from_directory(folder, config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=templates,
        clean_up_tokenization_spaces=config.get("clean_up_tokenization_spaces") is True,
        extra_special_tokens=_extra(config, folder),
        **roles,
    )
    pairs = vocabulary_pairs(tokenizer, vocab_size, folder, pieces or _scores_beside(folder), alone=pieces is not None)
    pairs |= special_pairs(tokenizer, ends(configs), folder) | templates_to_gguf(templates)
    metadata = typed(pairs)
    if pieces is not None:  # nothing but scores says how it merges, so it is read as llama.cpp reads it
        name = {Keys.General.NAME: names.STRIPPING_NAME} if names.strips(listed.values()) else {}
        tokenizer = tokenizer_from_gguf(plain(metadata) | name, folder / _PIECES)
    return tokenizer, metadata


def _backend(path: Path, vocab_size: int) -> Tokenizer:
    """What the file stores, without its rules of truncation and padding, which are no part of a text's ids."""
    saved = read_json(path)
    check_saved(saved, path, vocab_size)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is damaged ({reason(error)}); download or save it again.") from error
    for token in saved.get("added_tokens", []):  # the library counts on where one is missing
        if (i := backend.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"{path}: token {token['content']!r:.60} has id {token['id']}, which becomes {i}, since ids before it "
                f"are missing; download or save it again."
            )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _backend_of(pieces: Pieces) -> Tokenizer:
    vocabulary = without_padding(pieces.tokens, pieces.kinds)
    scores = makeable(pieces.tokens, pieces.kinds, pieces.scores)
    backend = spm.backend(vocabulary, scores, pieces.prefix)
    backend.add_tokens(added_tokens(pieces.tokens, pieces.kinds))
    return backend


def _prefix(config: dict[str, Any], default: bool, folder: Path) -> bool:
    """Whether texts get a space in front: what the config has counts more than the pieces' own file."""
    prefix = default if (asked := config.get("add_prefix_space")) is None else asked
    if not isinstance(prefix, bool):
        raise ValueError(f"{folder / _CONFIG}: add_prefix_space is {prefix!r}; write true or false there.")
    return prefix


def _scores_beside(folder: Path) -> Pieces | None:
    """The pieces beside a `tokenizer.json`, where they are SentencePiece's: the file may be of another kind."""
    try:
        return read_pieces(folder / _PIECES) if (folder / _PIECES).is_file() else None
    except ValueError:
        return None


def _content(value: Any, key: str, source: Path) -> str:
    """The text of a token, which files give as text or as an object with its properties."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"{source}: {key} is {value!r}, not a token; write the token's text there.")
    return text


def _roles(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that play a part, by transformers' names."""
    found = {}
    for source, content in ((_MAP, read_optional_json(folder / _MAP)), (_CONFIG, config)):
        for role in ROLES:
            if content.get(role) not in (None, ""):
                found[role] = _content(content[role], role, folder / source)
    return found


def _extra(config: dict[str, Any], folder: Path) -> list[str]:
    """Further special tokens, under the names that transformers had for them over time."""
    extra: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or []
        values = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise ValueError(f"{folder / _CONFIG}: {key} is {value!r}, not a list of tokens; write a list there.")
        extra += [_content(token, key, folder / _CONFIG) for token in values]
    return extra


def _listed(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens by id that stand in files beside `tokenizer.json` or `tokenizer.model`."""
    source = folder / "added_tokens.json"
    entries = [(i, token, {}, source) for token, i in read_optional_json(source).items()]
    source = folder / _CONFIG
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{source}: added_tokens_decoder is no object of tokens by id; download it again.")
    entries += [(i, token, token if isinstance(token, dict) else {}, source) for i, token in decoder.items()]
    listed = {}
    for i, token, flags, source in entries:
        try:
            number = int(i)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < _LIMIT:
            raise ValueError(f"{source}: {i!r} is no id of a token; download the file again.")
        known = {key: flags[key] for key in ("special", "lstrip", "rstrip", "single_word") if flags.get(key) is True}
        listed[number] = AddedToken(_content(token, f"token {i}", source), normalized=False, **known)
    return listed


def _add_missing(backend: Tokenizer, listed: dict[int, AddedToken], folder: Path) -> None:
    """Add what the tokenizer's own file lacks; raises `ValueError` where ids disagree."""
    for i, token in sorted(listed.items()):
        held = backend.token_to_id(token.content)
        if held is None or (held == i and i not in backend.get_added_tokens_decoder()):
            backend.add_tokens([token])
            held = backend.token_to_id(token.content)
        if held != i:
            raise ValueError(
                f"{folder}: token {token.content!r} has id {held} in the tokenizer and {i} beside it; download the "
                f"tokenizer's files again, all of one version."
            )


def _configs(folder: Path) -> list[dict[str, Any]]:
    """What says which ids end a text, what was meant for generation first."""
    config = read_optional_json(folder / "config.json")
    text = config.get("text_config")
    return [read_optional_json(folder / "generation_config.json"), config, text if isinstance(text, dict) else {}]


def _roles_by_id(backend: Tokenizer, roles: dict[str, str], configs: list[dict[str, Any]]) -> dict[str, str]:
    """BOS and EOS of the configs, where the tokenizer's files do not name them."""
    begins = [config.get("bos_token_id") for config in configs]
    found = {}
    for role, ids in (("bos_token", begins), ("eos_token", ends(configs))):
        tokens = [backend.id_to_token(i) for i in ids if isinstance(i, int) and 0 <= i < _LIMIT]
        known = [token for token in tokens if token is not None]
        if role not in roles and known:
            found[role] = known[0]
    return found


def _add_as_configured(backend: Tokenizer, config: dict[str, Any], roles: dict[str, str], bos: bool) -> None:
    """BOS and EOS around texts as the config has it, for a tokenizer that stores no rule of its own."""
    ids = {
        role: backend.token_to_id(roles[role]) if role in roles and config.get(f"add_{role}", default) else None
        for role, default in (("bos_token", bos), ("eos_token", False))
    }
    add_around(backend, ids["bos_token"], ids["eos_token"])

"""Text to token windows: deterministic, and calibration never overlaps held-out text."""

import encodings.aliases
import functools
import hashlib
import html.entities
import http
import json
import math
import mimetypes
import pydoc_data.topics
import re
import sysconfig
from pathlib import Path
from typing import Any, Literal, NamedTuple

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


MIXTURE = "mixture"
"""The name of a mixture of what is there wherever Python is, and free."""

_MIXED = (
    "builtin:0.4,"  # English prose with examples: Python's language reference (PSF licence)
    "code:0.4,"  # Python: the standard library's own sources (PSF licence)
    "lists:0.1,"  # tables of names and numbers: HTML entities, HTTP statuses, media types, encodings (PSF licence)
    "languages:0.1"  # one article in 16 languages: the Universal Declaration of Human Rights (public domain)
)
_WEIGHED = re.compile(r"(.+):(\d+(?:\.\d+)?)")


class Part(NamedTuple):
    """One text of a mixture and its share of the windows."""

    source: str
    share: float


def parts_of(source: str) -> list[Part]:
    """The texts that `source` names: several with weights, as in `builtin:0.5,notes.txt:0.5`, or one.

    Raises `ValueError` where a weight is 0 or a text is named twice.
    """
    found = [_WEIGHED.fullmatch(part) for part in (_MIXED if source == MIXTURE else source).split(",")]
    if not all(found) or Path(source).is_file():
        return [Part(source, 1.0)]
    parts = [Part(part[1], float(part[2])) for part in found]
    total = sum(part.share for part in parts)
    if not all(part.share > 0 and math.isfinite(part.share) for part in parts):
        raise ValueError(f"data {source!r} gives a text no weight above 0; leave it out or give it one.")
    if len({part.source for part in parts}) < len(parts):
        raise ValueError(f"data {source!r} names a text twice; add its weights up.")
    return [Part(part.source, part.share / total) for part in parts]


def read_text(source: str) -> str:
    """The text of `builtin` (the standard library's language topics), a file, or `hf:NAME:CONFIG:SPLIT`.

    `stdlib` is what `builtin` does not hold out and the standard library's source files in the order of their paths;
    `stdlib:NAME,NAME` only those modules and packages of it, e.g. `stdlib:json,abc`. `code`, `lists` and `languages`
    are the other texts of `mixture`. Raises `FileNotFoundError` for anything else or for a data set that the hub does
    not deliver.
    """
    if source == "builtin":
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    if source == "stdlib":
        return _topics_to_learn() + "\n\n" + _read_stdlib(None)
    if source == "code":
        return _read_stdlib(None)
    if source == "lists":
        return _lists()
    if source == "languages":
        return Path(__file__).with_name("languages.txt").read_text(encoding="utf-8")
    if source.startswith("stdlib:"):
        return _read_stdlib(source.removeprefix("stdlib:").split(","))
    if source.startswith("hf:"):
        return _read_hub(source)
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"data {source!r} is not a file; pass a text file, builtin, stdlib, mixture, hf:NAME:CONFIG:SPLIT, or "
            f"several of them with weights, as in builtin:0.5,notes.txt:0.5."
        )
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data {source!r} is not UTF-8 text ({error}); convert it or pass a text file.") from error


def is_inside(source: str) -> bool:
    """Whether `source` is a text that every machine has, or a file that truly lies in the working folder."""
    return all(_is_inside(part.source) for part in parts_of(source))


def _is_inside(source: str) -> bool:
    if source in ("builtin", "stdlib", "code", "lists", "languages") or source.startswith("stdlib:"):
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
    for texts that are a test set as a whole. Of several texts each gives its share, one window at least, and any first
    windows are mixed alike; what one of them cannot give of what is held out comes from the others. Files of JSON Lines
    with `messages` are conversations, which the tokenizer's chat template writes out. A tokenizer that begins texts
    with BOS begins the text with it; with `bos="window"` it also replaces each window's first token, as in llama.cpp,
    and with `"text"` it does not, as in GPTQ's evaluation and those after it. Raises `ValueError` for a count below 1
    or where the split is too short.
    """
    if len(parts := parts_of(source)) > 1:
        counts = _counts(source, parts, tokenizer, context, count, split)
        how: dict[str, Any] = {"context": context, "split": split, "bos": bos}
        each = [windows(name, tokenizer, count=n, **how) for name, n in counts.items()]
        order = np.argsort(np.concatenate([(np.arange(len(one)) + 0.5) / len(one) for one in each]), kind="stable")
        return np.concatenate(each)[order]
    tokens = _tokens(source, tokenizer, split)
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
    """SHA-256 of the text that `source` names, whatever its name and the white space around it.

    Of several texts, of theirs and their shares.
    """
    parts = [(part, hashlib.sha256(read_text(part.source).strip().encode()).hexdigest()) for part in parts_of(source)]
    if len(parts) == 1:
        return parts[0][1]
    return hashlib.sha256(" ".join(f"{part.share:.6f} {found}" for part, found in parts).encode()).hexdigest()


def _counts(
    source: str, parts: list[Part], tokenizer: PreTrainedTokenizerBase, context: int, count: int | None, split: Split
) -> dict[str, int | None]:
    """Windows of each text: its share rounded, so that they add up to `count`, and one at least."""
    most = [math.inf] * len(parts)
    if split != "calibration":
        held = [len(_tokens(part.source, tokenizer, split)) // context for part in parts]
        parts, most = [part for part, n in zip(parts, held, strict=True) if n], [n for n in held if n]
    if not parts or (count is not None and count > sum(most)):
        raise ValueError(
            f"the {split} parts of {source!r} hold {sum(most):,} windows of {context} tokens, fewer than asked for; "
            f"ask for fewer or shorter windows, or pass longer texts."
        )
    if count is None:
        return dict.fromkeys(part.source for part in parts)
    if count < len(parts):
        raise ValueError(f"data {source!r} names {len(parts)} texts and {count} windows were asked for; ask for more.")
    shares = np.asarray([part.share for part in parts]) * count / sum(part.share for part in parts)
    counts = np.minimum(np.maximum(1, np.floor(shares)), most)
    while (missing := count - counts.sum()) != 0:
        room = counts < most if missing > 0 else counts > 1
        short = np.where(room, (shares - counts) * np.sign(missing), -np.inf)
        counts[np.argmax(short)] += np.sign(missing)
    return {part.source: int(n) for part, n in zip(parts, counts, strict=True)}


def _tokens(source: str, tokenizer: PreTrainedTokenizerBase, split: Split) -> Int[np.ndarray, " tokens"]:
    """Those of a split of one text."""
    tokens = _encode(_written_out(source, tokenizer), tokenizer)
    border = int(len(tokens) * _CALIBRATION_SHARE)
    return {"calibration": tokens[:border], "heldout": tokens[border:], "all": tokens}[split]


def _written_out(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a source; conversations as the model is used to read them."""
    text = read_text(source)
    talks = _conversations(text) if source.endswith(".jsonl") else None
    if talks is None:
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"data {source!r} holds conversations, and the model has no chat template; pass plain text.")
    try:
        return "\n".join(str(tokenizer.apply_chat_template(talk, tokenize=False)) for talk in talks)
    except Exception as error:  # of any class, from the template
        raise ValueError(
            f"the model's chat template cannot write out the conversations of {source!r} ({error}); mend them or pass "
            f"plain text."
        ) from error


def _conversations(text: str) -> list[Any] | None:
    """What JSON Lines hold as `messages`, None where a line holds something else."""
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return None
    talks = [row.get("messages") if isinstance(row, dict) else None for row in rows]
    return talks if talks and all(isinstance(talk, list) and talk for talk in talks) else None


@functools.lru_cache(maxsize=4)
def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " tokens"]:
    """Tokens of a text, kept: a run cuts several sets of windows from one text."""
    begin = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    return np.asarray(begin + tokenizer.encode(text, add_special_tokens=False), np.int32)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id


def _lists() -> str:
    """Tables of the standard library, a line each."""
    tables = {
        "HTML entities": {name: f"{code} {chr(code)}" for name, code in sorted(html.entities.name2codepoint.items())},
        "HTTP status codes": {str(s.value): f"{s.phrase}. {s.description}".strip() for s in http.HTTPStatus},
        "Media types by file name extension": dict(sorted(mimetypes.MimeTypes().types_map[True].items())),
        "Names of character encodings": dict(sorted(encodings.aliases.aliases.items())),
    }
    lines = {title: [f"- {key}: {value}" for key, value in rows.items()] for title, rows in tables.items()}
    return "\n\n".join("\n".join([f"{title}:", *items]) for title, items in lines.items())


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

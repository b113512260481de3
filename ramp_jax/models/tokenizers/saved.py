"""What a `tokenizer.json` holds, held against itself before `tokenizers` reads it: that believes ids, and ends the
process over some of them."""

import collections
from pathlib import Path
from typing import Any

from ramp_jax.models.tokenizers.vocabulary import first_duplicate, too_large


def check_saved(saved: dict[str, Any], path: Path, vocab_size: int) -> None:
    """Raise `ValueError` for ids beyond the model's vocabulary or given twice, and for merges of missing tokens.

    Vocabularies of other models than BPE, which are refused later, are only searched for large ids.
    """
    model, added = saved.get("model"), saved.get("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(added, list):
        raise _damaged(path, "model is no object or added_tokens is no list")
    known = model.get("vocab")
    ids = {text: _id(text, i, path) for text, i in known.items()} if isinstance(known, dict) else {}
    more = dict(_added(token, path) for token in added)
    if (largest := max([*ids.values(), *more.values()], default=-1)) >= vocab_size:
        raise ValueError(too_large(path.parent, largest + 1, vocab_size))
    if twice := [i for i, count in collections.Counter((ids | more).values()).items() if count > 1]:
        raise _damaged(path, f"{twice[0]} is the id of two tokens")
    if len(more) < len(added):
        raise _damaged(path, "added_tokens lists a token twice")
    if moved := [text for text, i in more.items() if ids.get(text, i) != i]:
        raise _damaged(path, f"token {moved[0]!r:.60} has two ids")
    if model.get("type", "BPE") == "BPE" and not model.get("continuing_subword_prefix"):
        _check_merges(model.get("merges"), ids, path)


def _check_merges(merges: Any, ids: dict[str, int], path: Path) -> None:
    if not isinstance(merges, list):
        raise _damaged(path, "merges is no list")
    pairs = [_pair(merge, path) for merge in merges]
    for pair in pairs:
        if not (pair[0] in ids and pair[1] in ids and "".join(pair) in ids):
            raise _damaged(path, f"merge {' '.join(pair)!r:.60} is not of two tokens to a third")
    if (twice := first_duplicate(map(" ".join, pairs))) is not None:
        raise _damaged(path, f"merge {twice!r:.60} stands there twice")


def _pair(merge: Any, path: Path) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise _damaged(path, f"merge {merge!r:.60} is not of two tokens")
    return parts[0], parts[1]


def _added(token: Any, path: Path) -> tuple[str, int]:
    if not isinstance(token, dict) or not isinstance(text := token.get("content"), str) or not text:
        raise _damaged(path, f"added token {token!r:.60} has no text")
    return text, _id(text, token.get("id"), path)


def _id(text: str, i: Any, path: Path) -> int:
    if isinstance(i, bool) or not isinstance(i, int) or i < 0:
        raise _damaged(path, f"the id of {text!r:.60} is {i!r:.60}, a number from 0 was expected")
    return i


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged ({what}); download or save it again.")

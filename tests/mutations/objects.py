"""Mutations of JSON: keys removed, renamed, moved and repeated, values out of range, of another type, too deep."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from mutations import Mutation

_DEEP, TWICE, _HUGE = "\x00deep", "\x00twice", "\x00huge"  # what json.dumps does not write
_ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    -0.5,
    1e-30,
    1e30,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    10**30,
    "",
    "text",
    "1",
    "ä\ud800",
    "../../etc/passwd",
    "a" * 5000,
    [],
    {},
    [1],
    [[1.5], "a"],
    {"a": 1},
    {"content": 7},
    _DEEP,
    _HUGE,
]

_BITS = {2: 2.625, 3: 3.4375, "IQ3_S": 3.4376, 4: 4.25, 4.5: 4.5, 5: 5.5, 6: 6.5625, 8: 8.5}  # by level

Place = tuple[Any, Any]  # a list or an object, and an index or a key of it


def in_order(levels: Any) -> bool:
    """Whether these are levels, each once, the smallest formats first."""
    known = all(level in _BITS and not isinstance(level, bool) for level in levels)
    return known and all(_BITS[a] < _BITS[b] for a, b in itertools.pairwise(levels))


def of_file(name: str | None = None) -> dict[str, Mutation]:
    """Edits of the JSON file at the path, or of `name` in the folder there."""

    def mutation(edit) -> Mutation:
        def change(path: Path, rng: np.random.Generator) -> str:
            file = path / name if name else path
            content = json.loads(file.read_text())
            what = edit(content, rng)
            file.write_text(written(content))
            return f"{file.name}: {what}"

        return change

    def whole(path: Path, rng: np.random.Generator) -> str:
        file = path / name if name else path
        value = odd(rng)
        file.write_text(written(value))
        return f"{file.name} is {shown(value)}"

    prefix = f"{name} " if name else ""
    return {prefix + what: mutation(edit) for what, edit in EDITS.items()} | {f"{prefix}whole": whole}


def places(content: Any, rng: np.random.Generator) -> Place:
    """A random place, the upper levels more often: at each level any child, where that is a container often its."""
    parent, key = None, None
    while isinstance(content, dict | list) and content and (parent is None or rng.random() < 0.7):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        parent, key = content, keys[rng.integers(len(keys))]
        content = parent[key]
    if parent is None:
        raise ValueError("a mutation needs a good input that is a list or an object, with something in it.")
    return parent, key


def odd(rng: np.random.Generator) -> Any:
    """A value that hardly any place expects."""
    return copy.deepcopy(_ODD[rng.integers(len(_ODD))])


def replace(content: Any, rng: np.random.Generator) -> str:
    """Another value, in place of any or of one inside it."""
    parent, key = places(content, rng)
    old, value = parent[key], odd(rng)
    wrapped = [[old], {"value": old}, str(old), value, value, value, value, value]
    parent[key] = wrapped[rng.integers(len(wrapped))]
    return f"{key} = {shown(parent[key])}, was {shown(old)}"


def vary(content: Any, rng: np.random.Generator) -> str:
    """A number near the one that is there; a text or a list one element shorter or longer; a flag turned."""
    parent, key = places(content, rng)
    old = parent[key]
    if isinstance(old, bool):
        value = not old
    elif isinstance(old, int | float):
        value = [old + 1, old - 1, -old, 2 * old, old / 2, old + 0.5, old * 1000][rng.integers(7)]
    elif isinstance(old, str | list):
        value = [old[:-1], old + old[-1:], old[1:], old[::-1], old + old][rng.integers(5)]
    else:
        value = odd(rng)
    parent[key] = value
    return f"{key} = {shown(value)}, was {shown(old)}"


def remove(content: Any, rng: np.random.Generator) -> str:
    """A key or an element less."""
    parent, key = places(content, rng)
    del parent[key]
    return f"{key} removed"


def rename(content: Any, rng: np.random.Generator) -> str:
    """A key under another name, or an element elsewhere in its list."""
    parent, key = places(content, rng)
    value = parent.pop(key)
    if isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), value)
        return f"element {key} moved"
    new = [key.upper(), key + "_", key[:-1], "", "ä"][rng.integers(5)]
    parent[new] = value
    return f"{key} renamed to {new!r}"


def repeat(content: Any, rng: np.random.Generator) -> str:
    """A key of an object twice with two values, which JSON allows; an element of a list twice."""
    parent, key = places(content, rng)
    if isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
        return f"element {key} repeated"
    value = odd(rng)
    parent[f"{TWICE}{key}"] = value
    return f"{key} repeated as {shown(value)}"


def swap(content: Any, rng: np.random.Generator) -> str:
    """Two values of one list or object change places."""
    parent, key = places(content, rng)
    keys = list(parent) if isinstance(parent, dict) else range(len(parent))
    other = keys[rng.integers(len(keys))]
    parent[key], parent[other] = parent[other], parent[key]
    return f"{key} and {other} swapped"


EDITS = {"value": replace, "number": vary, "key": rename, "remove": remove, "repeat": repeat, "swap": swap}
"""What can be done to a list or an object, in place."""


def written(content: Any) -> str:
    """The JSON text, with what only text can hold: repeated keys, numbers of 400 digits, 100,000 nested lists."""
    text = json.dumps(content)
    text = text.replace(json.dumps(TWICE)[:-1], '"').replace(json.dumps(_HUGE), "9" * 400)
    return text.replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000)


def shown(value: Any) -> str:
    """A value in short."""
    return f"{value!r:.60}"

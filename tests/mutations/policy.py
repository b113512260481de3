"""Policies: the bytes of their file, its fields, and the arrays inside."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np

from mutations import Kind, Mutation, objects, raw
from ramp_jax.policy import networks
from ramp_jax.policy.inference import Policy, load_policy

_ARRAY, _SCALAR = 1, 3  # codes of arrays in what flax writes
_HIDDEN, _LEVELS, _SHOWN = (8, 8), (2, "IQ3_S", 8), 11 + 6


def make(folder: Path) -> Path:
    """An actor that nobody trained."""
    actor = networks.actor(_HIDDEN).init(jax.random.key(0), _SHOWN)
    Policy(actor, _HIDDEN, _LEVELS, 4.5, ("tiny", "other")).save(folder)
    return folder / "policy.msgpack"


def make_unsigned(folder: Path) -> Path:
    """The same without its digest."""
    path = make(folder)
    content = _unpacked(path.read_bytes())
    del content["sha256"]
    path.write_bytes(_packed(content))
    return path


def load(path: Path) -> Policy:
    """As every script does."""
    return load_policy(path.parent)


def right(path: Path, result: Policy) -> bool:
    """What msgpack alone finds in the file, and a network whose sizes follow from its widths and levels."""
    content = _unpacked(path.read_bytes())
    widths, levels = content["hidden"], content["levels"]
    return (
        all(list(getattr(result, name)) == content[name] for name in ("hidden", "levels", "trained_on"))
        and result.fold_level == content["fold_level"]
        and 2 <= result.fold_level <= 8
        and content["embedding_version"] == result.embedding_version == 5
        and objects.in_order(levels)
        and _same(content["actor"], result.actor)
        and _shapes(content["actor"]) == _expected(widths)
    )


def _same(stored: Any, loaded: Any) -> bool:
    if isinstance(stored, dict):
        return stored.keys() == loaded.keys() and all(_same(stored[key], loaded[key]) for key in stored)
    return stored.dtype == np.float32 and np.isfinite(stored).all() and np.array_equal(stored, np.asarray(loaded))


def _shapes(tree: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    if not isinstance(tree, dict):
        return {prefix: tree.shape}
    return {name: shape for key, part in tree.items() for name, shape in _shapes(part, f"{prefix}/{key}").items()}


def _expected(widths: list[int]) -> dict[str, tuple[int, ...]]:
    sizes = [_SHOWN, *widths]
    found = {"/action/kernel": (3, sizes[-1]), "/head/kernel": (sizes[-1], 1), "/trust": ()}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        found |= {f"/hidden/{i}/linear/kernel": (n_in, n_out), f"/hidden/{i}/linear/bias": (n_out,)}
        found |= {f"/hidden/{i}/norm/scale": (n_out,), f"/hidden/{i}/norm/bias": (n_out,)}
    return found


def _unpacked(content: bytes) -> Any:
    def array(code: int, data: bytes) -> np.ndarray:
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"no array: {code}")
        shape, dtype, values = msgpack.unpackb(data, raw=True)
        return np.frombuffer(values, dtype.decode()).reshape(shape)

    return msgpack.unpackb(content, ext_hook=array, strict_map_key=False)


def _packed(content: Any) -> bytes:
    def array(value: Any) -> Any:
        if isinstance(value, _Lie):
            return msgpack.ExtType(_ARRAY, msgpack.packb((value.shape, value.dtype, value.values)))
        if isinstance(value, np.ndarray):
            return msgpack.ExtType(_ARRAY, msgpack.packb((value.shape, value.dtype.name, value.tobytes())))
        return str(value)  # of integers that msgpack cannot hold

    return msgpack.packb(content, default=array, unicode_errors="surrogatepass")


class _Lie:
    """An array whose bytes are not those of its shape or type."""

    def __init__(self, shape: tuple[int, ...], dtype: str, values: bytes):
        self.shape, self.dtype, self.values = shape, dtype, values


def _edit(change: Callable[[Any, np.random.Generator], str]) -> Mutation:
    """A change of what the file holds."""

    def mutation(path: Path, rng: np.random.Generator) -> str:
        content = _unpacked(path.read_bytes())
        what = change(content, rng)
        path.write_bytes(_packed(content))
        return what

    return mutation


def _leaf(content: Any, rng: np.random.Generator) -> tuple[dict, str]:
    tree, key = content, "actor"
    while isinstance(tree[key], dict):
        tree = tree[key]
        key = sorted(tree)[rng.integers(len(tree))]
    return tree, key


def _values(content: Any, rng: np.random.Generator) -> str:
    tree, key = _leaf(content, rng)
    odd = [np.nan, np.inf, -np.inf, 0.0, 1e38, -1.0][rng.integers(6)]
    new = np.array(tree[key])
    new.reshape(-1)[rng.integers(new.size)] = odd
    tree[key] = new
    return f"{key} holds {odd}"


def _form(content: Any, rng: np.random.Generator) -> str:
    tree, key = _leaf(content, rng)
    old = np.array(tree[key])
    forms = [old.T.copy(), old[None], old.reshape(-1), old.astype(np.float64), old.astype(np.float16), old.astype(int)]
    forms += [np.zeros(0, np.float32), old.reshape(-1)[:1], old.astype(complex), old > 0]
    tree[key] = forms[rng.integers(len(forms))]
    return f"{key} is {tree[key].dtype}{tree[key].shape}"


def _lie(content: Any, rng: np.random.Generator) -> str:
    tree, key = _leaf(content, rng)
    old = np.array(tree[key])
    shapes = [old.shape, (2**31,), (-1,), (0,), (2**40, 2**40), (), tuple(reversed(old.shape)), "x", 5]
    dtypes = ["float32", "O", "object", "float999", "", "V8", "<U4", "M8[ns]", "bfloat16", "float32"]
    tree[key] = _Lie(shapes[rng.integers(len(shapes))], dtypes[rng.integers(len(dtypes))], old.tobytes())
    return f"{key} claims to be {tree[key].dtype}{tree[key].shape}"


def _levels(content: Any, rng: np.random.Generator) -> str:
    odd = [
        [4, 8, 4.5],
        [4, 4, 8],
        [8, 4.5, 4],
        [3, 4, 8],
        [4, 7, 8],
        [4, 4.5],
        [4, 4.5, 5, 8],
        [],
        [4, 4.5, float("nan")],
    ]
    odd += [
        ["4", "4.5", "8"],
        "448",
        3,
        [4, [4.5], 8],
        [True, 2, 3],
        [-4, 4.5, 8],
        [4.0, 4.5, 8.0],
        {"4": 1},
        [10**400, 4, 8],
    ]
    content["levels"] = odd[rng.integers(len(odd))]
    return f"levels = {content['levels']!r:.60}"


def _hidden(content: Any, rng: np.random.Generator) -> str:
    odd = [[8], [8, 8, 8], [], [0, 8], [-8, 8], [2**31, 8], [8.0, 8.0], ["8", "8"], [8] * 10**5, [2**62], 8, None]
    content["hidden"] = odd[rng.integers(len(odd))]
    return f"hidden = {content['hidden']!r:.60}"


_EDITS = {name.__name__.strip("_"): _edit(name) for name in (_values, _form, _lie, _levels, _hidden)}
_MUTATIONS: dict[str, Mutation] = {
    **_EDITS,
    **{name: _edit(edit) for name, edit in objects.EDITS.items()},
    **raw.of_file(),
    **{f"beginning {name}": change for name, change in raw.of_file(first=256).items()},
}

KINDS = (
    Kind("policy", make, _MUTATIONS, load, right),
    Kind("policy-unsigned", make_unsigned, _MUTATIONS, load, right),
)

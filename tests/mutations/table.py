"""Sensitivity tables: the archive, the headers of its arrays, and their values."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mutations import Kind, Mutation, objects, raw
from ramp_jax.sensitivity.table import Sensitivity

_TENSORS = [f"blk.{i}.{name}.weight" for i in range(3) for name in ("attn_q", "ffn_up", "ffn_down")]
_LEVELS = [2, "IQ3_S", 8]


def make(folder: Path) -> Path:
    """A finished table, one of whose cells is masked."""
    kld = np.exp(np.random.default_rng(0).normal(-8, 2, (len(_TENSORS), len(_LEVELS))))
    kld[0, 1] = 0.0
    inputs = {"code version": "2", "method": "exact", "windows": 64 * "a"}
    table = Sensitivity(tuple(_TENSORS), tuple(_LEVELS), kld, np.full(len(_TENSORS), 1e-9), 2.5, inputs)
    table.save(folder / "table.npz")
    return folder / "table.npz"


def load(path: Path) -> Sensitivity:
    """As who allocates by it does."""
    return Sensitivity.load(path)


def right(path: Path, result: Sensitivity) -> bool:
    """What `numpy.load` finds in it, and a finished table whose parts fit each other."""
    with np.load(path, allow_pickle=False) as saved:
        content = {name: saved[name] for name in saved.files}
    kld = content["kld"]
    levels = [level if level == "IQ3_S" else float(level) for level in content["levels"].tolist()]
    return (
        list(result.tensors) == content["tensors"].tolist()
        and list(result.levels) == levels
        and objects.in_order(levels)
        and np.array_equal(result.kld, kld)
        and np.array_equal(result.floor, content["floor"], equal_nan=True)
        and kld.shape == (len(result.tensors), len(levels))
        and np.isfinite(kld).all()
        and kld.min() > -1e-2
        and result.seconds == content["seconds"].item() >= 0
        and dict(result.inputs) == json.loads(content["inputs"].item())
        and len(set(result.tensors)) == len(result.tensors)
    )


def _parts(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def _write(path: Path, parts: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def _raw(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=True)
    return file.getvalue()


def _array(name: str, change: Callable[[np.ndarray, np.random.Generator], Any]) -> Mutation:
    """Another array in place of one."""

    def mutation(path: Path, rng: np.random.Generator) -> str:
        parts = _parts(path)
        old = np.load(io.BytesIO(parts[f"{name}.npy"]), allow_pickle=False)
        new = change(old.copy(), rng)
        parts[f"{name}.npy"] = new if isinstance(new, bytes) else _raw(new)
        _write(path, list(parts.items()))
        return f"{name}: {new!r:.80}"

    return mutation


def _numbers(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    value = [np.nan, np.inf, -np.inf, -1.0, -1e-9, 1e300, 0.0, 5e-324][rng.integers(8)]
    old.reshape(-1)[rng.integers(old.size)] = value
    return old


def _form(old: np.ndarray, rng: np.random.Generator) -> Any:
    forms = [old.T, old[:-1], old[..., :-1] if old.ndim else old, old.reshape(-1), old[None], old.astype(object)]
    forms += [np.asfortranarray(old), old.astype(">f8") if old.dtype.kind == "f" else old, old.astype("S8")]
    forms += [np.zeros(0), np.zeros((0, 3)), old.astype(np.float32) if old.dtype.kind == "f" else old, old * 1j]
    return forms[rng.integers(len(forms))]


def _header(old: np.ndarray, rng: np.random.Generator) -> bytes:
    """A header that says something else than what follows."""
    shapes = [(2**40,), (2**31, 2**31), (-1,), old.shape[::-1], (), (1,) * 40, old.shape]
    kinds = ["'<f8'", "'|O'", "'<U4000000'", "'|V1'", "[('a', '<f8')]", "'x'", "__import__('os')", "'<f8'" + "(" * 300]
    shape, kind = shapes[rng.integers(len(shapes))], kinds[rng.integers(len(kinds))]
    text = f"{{'descr': {kind}, 'fortran_order': {bool(rng.integers(2))}, 'shape': {shape}, }}".encode()
    version = [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"][rng.choice([0, 0, 0, 0, 1, 2, 3])]
    text = text.ljust(118) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + old.tobytes()


def _levels(old: np.ndarray, rng: np.random.Generator) -> Any:
    odd = [
        [8, 4.5, 4],
        [4, 4, 8],
        [4, 7, 8],
        [4, 4.5],
        [4, 4.5, np.nan],
        [-4, 4.5, 8],
        ["4", "4.5", "8"],
        4,
        [[4, 4.5, 8]],
    ]
    return np.asarray([*odd][rng.integers(len(odd))])


def _tensors(old: np.ndarray, rng: np.random.Generator) -> Any:
    i, j = rng.integers(len(old), size=2)
    return [
        np.where(old == old[i], old[j], old),
        old[::-1],
        old.astype("S"),
        old[:0],
        np.where(old == old[i], "", old),
    ][rng.integers(5)]


def _inputs(old: np.ndarray, rng: np.random.Generator) -> Any:
    content = json.loads(old.item())
    edit = list(objects.EDITS.values())[rng.integers(len(objects.EDITS))]
    edit(content, rng)
    return np.asarray(objects.written(content))


def _seconds(old: np.ndarray, rng: np.random.Generator) -> Any:
    return np.asarray([np.nan, -1.0, np.inf, 3, True, "2.5", 1j, 0.0][rng.integers(8)])


def members(path: Path, rng: np.random.Generator) -> str:
    """Arrays missing, twice, under another name, beside others, compressed."""
    parts = list(_parts(path).items())
    i, j = rng.integers(len(parts), size=2)
    name, content = parts[i]
    how = ["removed", "repeated", "renamed", "exchanged", "added", "compressed", "bomb", "pickle"][rng.integers(8)]
    compression = zipfile.ZIP_STORED
    if how == "removed":
        del parts[i]
    elif how == "repeated":
        parts.append((name, parts[j][1]))
    elif how == "renamed":
        parts[i] = (["../" + name, name.upper(), name[:-4], ""][rng.integers(4)] or "x", content)
    elif how == "exchanged":
        parts[i], parts[j] = (name, parts[j][1]), (parts[j][0], content)
    elif how == "added":
        parts.append(("more.npy", content))
    elif how == "pickle":
        parts[i] = (name, pickle.dumps(content))
    else:
        compression = zipfile.ZIP_DEFLATED
        parts[i] = (name, content) if how == "compressed" else (name, content + bytes(1 << 26))
    _write(path, parts, compression)
    return f"{name} {how}"


_ARRAYS = {
    **{
        f"{name} {change.__name__[1:]}": _array(name, change)
        for name in ("kld", "floor")
        for change in (_numbers, _form, _header)
    },
    **{change.__name__[1:]: _array(change.__name__[1:], change) for change in (_levels, _tensors, _inputs, _seconds)},
    **{f"{name} header": _array(name, _header) for name in ("levels", "tensors", "seconds", "inputs")},
}
_MUTATIONS: dict[str, Mutation] = {**_ARRAYS, "members": members, **raw.of_file()}

KINDS = (Kind("table", make, _MUTATIONS, load, right),)

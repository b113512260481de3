"""Importance matrices of llama.cpp: GGUF, and the older format whose numbers say how long everything is."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from mutations import Kind, Mutation, raw
from mutations.allocation import model
from ramp_jax.models import matrices
from ramp_jax.quantization.importance import Importance, read_imatrix

_TOKENS = 512.0


def _values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    linear = [tensor for tensor in matrices(model().spec) if tensor.layer is not None]
    return {tensor.name: np.exp(rng.normal(0, 1, tensor.shape[-1])).astype(np.float32) for tensor in linear}


def make(folder: Path) -> Path:
    """As llama-imatrix writes it."""
    tensors: dict[str, np.ndarray] = {}
    for name, values in _values().items():
        tensors |= {name + ".in_sum2": (values * _TOKENS)[None], name + ".counts": np.full((1, 1), _TOKENS, np.float32)}
    return _written(folder / "imatrix.gguf", tensors)


def make_dat(folder: Path) -> Path:
    """The older format, with the name of its data set at the end."""
    path, content = folder / "imatrix.dat", struct.pack("<i", len(_values()))
    for name, values in _values().items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, len(values))
        content += (values * 4).tobytes()
    path.write_bytes(content + struct.pack("<ii", 4, 4) + b"text")
    return path


def load(path: Path) -> Importance:
    """As `--imatrix` does."""
    return read_imatrix(path, model().spec)


def right(path: Path, result: Importance) -> bool:
    """What gguf's own reader finds in it."""
    stored = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in GGUFReader(path).tensors}
    found = {}
    for name in (name.removesuffix(".in_sum2") for name in stored if name.endswith(".in_sum2")):
        sums, count = stored[name + ".in_sum2"].ravel(), stored[name + ".counts"].item()
        found[name] = sums / count if count else np.ones_like(sums)
    return 2 * len(found) == len(stored) and _same(found, result)


def right_dat(path: Path, result: Importance) -> bool:
    """What a few lines read, by names that are looked for."""
    content, found = path.read_bytes(), {}
    for name in _values():
        at = content.index(struct.pack("<i", len(name)) + name.encode()) + 4 + len(name)
        calls, size = struct.unpack_from("<ii", content, at)
        found[name] = np.frombuffer(content, "<f4", size, at + 8).astype(np.float64) / max(calls, 1)
    return struct.unpack_from("<i", content)[0] == len(found) and _same(found, result)


def _same(found: dict[str, np.ndarray], result: Importance) -> bool:
    """Whether these are the numbers that a model of this description needs, as they are and nothing else."""
    return found.keys() == result.keys() == _values().keys() and all(
        len(values) == len(_values()[name])
        and np.isfinite(values).all()
        and values.min() >= 0
        and np.allclose(result[name], values, rtol=1e-5, atol=1e-45)
        for name, values in found.items()
    )


def _written(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 128)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ODD = [0.0, -1.0, np.nan, np.inf, -np.inf, 1e-45, 1e38, -0.0, 1.0]


def _tensors(change: Callable[[dict[str, np.ndarray], str, np.random.Generator], str]) -> Mutation:
    """Another set of tensors in a file that is whole."""

    def mutation(path: Path, rng: np.random.Generator) -> str:
        tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
        name = sorted(tensors)[rng.integers(len(tensors))]
        what = change(tensors, name, rng)
        _written(path, tensors)
        return f"{name} {what}"

    return mutation


def _numbers(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> str:
    value = _ODD[rng.integers(len(_ODD))]
    tensors[name].reshape(-1)[rng.integers(tensors[name].size)] = value
    return f"holds {value}"


def _form(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> str:
    old = tensors[name]
    forms = [old.astype(np.float16), old.astype(np.float64), old.astype(np.int32), old.ravel(), np.repeat(old, 2, 0)]
    forms += [
        old.reshape(-1, 1),
        old[:, :-1] if old.shape[1] > 1 else np.repeat(old, 2, 1),
        old.reshape(2, -1) if old.size > 1 else old,
    ]
    tensors[name] = np.ascontiguousarray(forms[rng.integers(len(forms))])
    return f"is {tensors[name].dtype}{tensors[name].shape}"


def _names(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> str:
    value = tensors.pop(name)
    how = rng.integers(4)
    if how:
        tensors[["", "token_embd.weight" + name[name.rindex(".") :], name + "x", "x" + name][how]] = value
    return "removed" if not how else "renamed"


def _exchanged(tensors: dict[str, np.ndarray], name: str, rng: np.random.Generator) -> str:
    other = sorted(tensors)[rng.integers(len(tensors))]
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"exchanged with {other}"


def numbers(path: Path, rng: np.random.Generator) -> str:
    """Another number in the older format: of entries, of characters, of calls, of values, or a value."""
    content, places = bytearray(path.read_bytes()), [0]
    at = 4
    for _ in range(struct.unpack_from("<i", content)[0]):
        length = struct.unpack_from("<i", content, at)[0]
        size = struct.unpack_from("<i", content, at + 8 + length)[0]
        places += [at, at + 4 + length, at + 8 + length, at + 12 + length]
        at += 12 + length + 4 * size
    place = [*places, at, at + 4][rng.integers(len(places) + 2)]
    old = struct.unpack_from("<i", content, place)[0]
    odd = [0, 1, -1, 2**31 - 1, -(2**31), old + 1, old - 1, 2 * old, 0x7FC00000, 0x7F800000, 1 << 20]
    new = max(-(2**31), min(odd[rng.integers(len(odd))], 2**31 - 1))
    struct.pack_into("<i", content, place, new)
    path.write_bytes(content)
    return f"{new} in place of {old} at {place}"


def entries(path: Path, rng: np.random.Generator) -> str:
    """An entry of the older format twice, or one less, the number of them right."""
    content, places = path.read_bytes(), [4]
    count = struct.unpack_from("<i", content)[0]
    for _ in range(count):
        length = struct.unpack_from("<i", content, places[-1])[0]
        size = struct.unpack_from("<i", content, places[-1] + 8 + length)[0]
        places.append(places[-1] + 12 + length + 4 * size)
    i, twice = rng.integers(count), rng.random() < 0.5
    entry = content[places[i] : places[i + 1]]
    body = content[4 : places[i]] + (2 * entry if twice else b"") + content[places[i + 1] :]
    path.write_bytes(struct.pack("<i", count + (1 if twice else -1)) + body)
    return f"entry {i} {'twice' if twice else 'removed'}"


_BYTES = {**raw.of_file(), **{f"beginning {name}": change for name, change in raw.of_file(first=2048).items()}}
_GGUF = {change.__name__[1:]: _tensors(change) for change in (_numbers, _form, _names, _exchanged)}

KINDS = (
    Kind("importance", make, {**_GGUF, **_BYTES}, load, right),
    Kind("importance-dat", make_dat, {"numbers": numbers, "entries": entries, **_BYTES}, load, right_dat),
)

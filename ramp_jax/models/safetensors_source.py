"""Hugging Face directories: which files of theirs hold the weights, and the weights one by one."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ramp_jax.models.source import (
    Reader,
    Rows,
    Stamp,
    check_unchanged,
    piecewise,
    read_json,
    reason,
    refuse_pointer,
    some,
    stamp,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_NO_MODEL = ("consolidated", "adapter_model", "training_args", "optimizer", "scheduler")
"""How files begin that lie beside a model: Meta's own format, adapters, what a trainer keeps."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SAVE = "save the model with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
_UNSAFE = f"pickled, which can run code when it is opened, and so is not; where you trust it, {_SAVE}."


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of a directory's safetensors files. Files are open only while a piece of a tensor is read, so that
    the pages through which the library sees them are given back."""

    paths: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    files: Mapping[str, Stamp]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor in its file; f32 for a wider one."""
        return np.dtype({"F16": np.float16, "BF16": jnp.bfloat16}.get(self.dtypes[name], np.float32))

    def read(self, name: str, dtype: Any, rows: Rows = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all, in `dtype`; raises `ValueError` for values that are not finite."""
        return piecewise(f"{self.paths[name]}: {name}", self.shapes[name], dtype, rows, self._opener(name))

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same values; a piece of each is in memory at a time."""
        if self.shapes[a] != self.shapes[b]:
            return False
        rows, step = self.shapes[a][0], 256
        for start in range(0, rows, step):
            with self._opener(a)() as first, self._opener(b)() as second:
                piece = start, min(start + step, rows)
                if not np.array_equal(first(*piece), second(*piece), equal_nan=True):
                    return False
        return True

    def _opener(self, name: str) -> Callable[[], Reader]:
        path = self.paths[name]
        if self.dtypes[name] not in _FLOATS:
            raise ValueError(
                f"{path}: {name} is stored as {self.dtypes[name]}; use the checkpoint in one of {', '.join(_FLOATS)}."
            )

        @contextlib.contextmanager
        def opened() -> Iterator[Callable[[int, int], np.ndarray]]:
            check_unchanged(path, self.files[str(path)])
            with safe_open(path, framework="numpy") as file:
                rows = file.get_slice(name)
                yield lambda first, end: rows[first:end]

        return opened


class Shards(NamedTuple):
    """The names of the files that make up a model, and where its index puts each tensor; empty without one."""

    names: list[str]
    index: dict[str, str]


def find_shards(folder: Path) -> Shards:
    """The files of a directory that make up its model.

    The index says which those are; without one `model.safetensors`, else the files `model-*.safetensors`, else the only
    one there is. Raises `FileNotFoundError` where there are none or one is missing, `ValueError` where the index is
    damaged or none says which of several files count.
    """
    index = _index(folder)
    return Shards(sorted(set(index.values())) if index else _without_index(folder), index)


def open_shards(folder: Path, shards: Shards) -> SafetensorsSource:
    """The tensors of these files, none of them read.

    Raises `ValueError` for a damaged file, for tensors that are there twice and for an index that does not fit.
    """
    index, files, shapes, dtypes = shards.index, {}, {}, {}
    known = {str(folder / name): stamp(folder / name) for name in shards.names}
    for name in shards.names:
        path = folder / name
        for key, (shape, dtype) in _contents(path).items():
            if key in files:
                raise ValueError(f"{path} and {files[key]} both hold {key}; keep the files of one model only.")
            if index.get(key, name) != name:
                raise ValueError(f"{path} holds {key}, which {INDEX} puts in {index[key]}; download both again.")
            files[key], shapes[key], dtypes[key] = path, shape, dtype
    if absent := [key for key in index if key not in files]:
        raise ValueError(f"{folder / index[absent[0]]} lacks {some(absent)}, which {INDEX} puts there; download both.")
    return SafetensorsSource(files, shapes, dtypes, known)


def refuse_file(path: Path) -> None:
    """Raise `ValueError` where `path` is one file of such a directory, or holds pickled weights."""
    if path.suffix in (".safetensors", ".json"):
        raise ValueError(f"{path} is one file of a model; name its folder, {path.parent}.")
    if path.suffix in _PICKLED:
        raise ValueError(f"{path} is {_UNSAFE}")


def _index(folder: Path) -> dict[str, str]:
    """Files by tensor as the index has them; empty without an index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files; download or save it again.")
    for name in sorted(set(files.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}; a shard has to be a .safetensors in the same folder.")
    if missing := {name for name in files.values() if not (folder / name).is_file()}:
        raise FileNotFoundError(f"{folder} lacks {some(missing)}, which {INDEX} names; download the rest of the model.")
    return files


def _without_index(folder: Path) -> list[str]:
    """The files that make up the model where no index says it."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    files = (path.name for path in folder.glob("*.safetensors") if path.is_file())
    found = sorted(name for name in files if not name.startswith(_NO_MODEL))
    shards = [name for name in found if name.startswith("model-")] or found
    counts = {match[3]: match[1] for name in shards if (match := _SHARD.fullmatch(name))}
    if len(shards) == 1 and not counts:
        return shards
    if not found:
        raise FileNotFoundError(_no_weights(folder))
    if len(counts) > 1 or not (counts or shards[0].startswith("model-")):
        raise ValueError(f"{folder} holds {some(shards)} and no {INDEX} that says what is the model; keep only that.")
    for count, stem in counts.items():
        expected = {f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))}
        if missing := expected - set(shards):
            raise FileNotFoundError(f"{folder} lacks {some(missing)}; download the rest of the model.")
    return shards


def _no_weights(folder: Path) -> str:
    """Why a folder is no model, from what else lies there."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if adapters := [name for name in names if name.startswith("adapter_model")]:
        return f"{folder} holds an adapter ({adapters[0]}), no model; merge it into its base model and save that."
    if pickled := [name for name in names if name.endswith(_PICKLED) and not name.startswith(_NO_MODEL)]:
        return f"{folder} holds no safetensors; {some(pickled)} is {_UNSAFE}"
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        return f"{folder} is not a model directory, but holds {some(ggufs)}; name the file."
    return f"{folder} is not a model directory: it needs config.json and *.safetensors; {_SAVE}."


def _contents(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a file."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is a damaged safetensors file ({reason(error)}); download or save it again."
        ) from error
    if odd := [key for key in found if not key.isprintable()]:
        raise ValueError(f"{path} holds a tensor called {odd[0]!r:.60}; download or save it again.")
    return found

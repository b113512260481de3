"""Checkpoints as loaders see them: names and shapes first, then one tensor at a time in the dtype that is wanted."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

Rows = slice | Int[np.ndarray, " R"]
"""Some rows of a matrix: a slice, or the index of each in ascending order."""

_PIECE = 1 << 20
"""Weights that are read and converted at a time: some megabytes, whatever the tensor."""

_ALIGNMENT = 64
"""Bytes at which an array has to begin for JAX to take it over without a copy on CPUs."""

_LARGEST, _DEEPEST = 1 << 26, 64  # bytes and levels of a JSON file; what is read of a byte takes up to 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Source(Protocol):
    """The tensors of a checkpoint, under the names that it gives them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name, `[out, in]` of a matrix; known without reading any weight."""

    def dtype(self, name: str) -> np.dtype:
        """The float that holds what is stored: its own dtype, f32 where that is quantized or wider."""

    def read(self, name: str, dtype: Any, rows: Rows = slice(None)) -> np.ndarray:
        """A tensor (or some of its rows) in `dtype`, dequantized; never the whole of it in another dtype beside.

        Raises `ValueError` where the file changed since it was opened.
        """

    @property
    def files(self) -> Mapping[str, "Stamp"]:
        """Size and time of each of its files, by path, when they were opened."""


class Stamp(NamedTuple):
    """What tells that a file is the one that was opened."""

    size: int
    modified_ns: int


def stamp(path: Path) -> Stamp:
    """A file's size and time stamp now."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, known: Stamp) -> None:
    """Raise `ValueError` where a file is no longer what it was."""
    if not path.is_file() or stamp(path) != known:
        raise ValueError(f"{path} changed while it was read; leave it as it is and run the command again.")


Reader = AbstractContextManager[Callable[[int, int], np.ndarray]]
"""An open tensor: rows `first` to `end` as they are stored."""


def piecewise(where: str, shape: tuple[int, ...], dtype: Any, rows: Rows, opened: Callable[[], Reader]) -> np.ndarray:
    """The `rows` of a tensor of `shape` in `dtype`; the tensor is opened for each piece of it anew.

    Raises `ValueError` for values that are not finite, or not in `dtype`; it begins with `where`, the tensor's place.
    """
    if not isinstance(rows, slice):
        return _gathered(where, shape, dtype, rows, opened)
    first, end, _ = rows.indices(shape[0])
    shape = (end - first, *shape[1:])
    values = _aligned(shape, np.dtype(dtype))
    step = max(1, _PIECE // max(1, int(np.prod(shape[1:]))))
    for start in range(first, end, step):
        stop = min(start + step, end)
        with opened() as read_rows, np.errstate(over="ignore", invalid="ignore"):
            _put(where, read_rows(start, stop), values[start - first : stop - first])
    return values


def _gathered(
    where: str, shape: tuple[int, ...], dtype: Any, rows: np.ndarray, opened: Callable[[], Reader]
) -> np.ndarray:
    values = _aligned((len(rows), *shape[1:]), np.dtype(dtype))
    with opened() as read_rows, np.errstate(over="ignore", invalid="ignore"):
        for run in _runs(rows):
            _put(where, read_rows(int(rows[run.start]), int(rows[run.stop - 1]) + 1), values[run])
    return values


def _put(where: str, stored: np.ndarray, values: np.ndarray) -> None:
    values[...] = stored
    if _finite(values):
        return
    if not np.isfinite(stored).all():
        raise ValueError(f"{where} holds values that are NaN or infinite; download or save it again.")
    raise ValueError(f"{where} holds values that {values.dtype} cannot; choose bfloat16 or float32.")


def _finite(values: np.ndarray) -> bool:
    """`np.isfinite(values).all()`, which takes ten times as long where floats have 16 bits."""
    if values.dtype.itemsize != 2 or not values.size:
        return bool(np.isfinite(values).all())
    infinity = np.asarray(np.inf, values.dtype).view(np.uint16)
    return bool((values.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Places in `rows` where indices follow each other."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        if stop > start:
            yield slice(int(start), int(stop))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    skipped = -raw.ctypes.data % _ALIGNMENT
    return raw[skipped : skipped + size].view(dtype).reshape(shape)


def refuse_pointer(path: Path) -> None:
    """Raise `ValueError` where the file is Git-LFS's note of a file that was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git-LFS pointer, not the file itself; run `git lfs pull` in its folder.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `ValueError` where it holds none."""
    refuse_pointer(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, at most {_LARGEST:,} were expected; download or save it again.")
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({reason(error)}); download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, no object; download or save it again.")
    return content


def _parsed(text: str) -> Any:
    """The content of JSON that every reader reads alike: no key has two values, nothing is nested too deep."""
    content = json.loads(text, object_pairs_hook=_object)
    level, depth = [content], 0
    while level := [value for part in level for value in _inside(part)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels")
    if _SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"two values of {key!r:.60}")
    return content


def _inside(part: Any) -> Iterable[Any]:
    if isinstance(part, dict):
        return part.values()
    return part if isinstance(part, list) else ()


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file; raises `ValueError` where it holds none."""
    return read_json(path) if path.is_file() else {}


def check_used(architecture: str, unused: Iterable[str], path: Path) -> None:
    """Raise `ValueError` where a checkpoint holds what a decoder would ignore."""
    if unused := list(unused):
        raise ValueError(f"{path} holds tensors that the {architecture} decoder does not use: {some(unused)}.")


def reason(error: BaseException) -> str:
    """What a library says of an error, on one line and short enough to stand in a sentence."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""GGUF files: their pairs, and their tensors one by one, dequantized. The parts of a split model are one source."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from ramp_jax.models.gguf_header import Header, StoredTensor, read_header
from ramp_jax.models.metadata import Metadata
from ramp_jax.models.source import Reader, Rows, Stamp, check_unchanged, piecewise, refuse_pointer, some, stamp

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]*)?")
_UNQUANTIZED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class GgufSource:
    """The pairs and tensors of a GGUF, or of all parts of one."""

    metadata: Metadata
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, Stamp]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, `[out, in]` of a matrix."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor in its file; f32 for a quantized one."""
        return _UNQUANTIZED.get(self.tensors[name].type, np.dtype(np.float32))

    def read(self, name: str, dtype: Any, rows: Rows = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all, dequantized to `dtype`.

        Raises `ValueError` for a type that is not known and for values that are not finite.
        """
        tensor = self.tensors[name]
        if len(tensor.shape) == 1:
            tensor = tensor._replace(shape=(1, *tensor.shape))
            return self._dequantized(name, tensor, dtype, slice(None))[0][rows]
        return self._dequantized(name, tensor, dtype, rows)

    def _dequantized(self, name: str, tensor: StoredTensor, dtype: Any, rows: Rows) -> np.ndarray:
        try:
            opener = _opener(tensor, self.files[str(tensor.path)])
            return piecewise(f"{tensor.path}: {name}", tensor.shape, dtype, rows, opener)
        except NotImplementedError as error:
            raise ValueError(
                f"{tensor.path}: {name} is {tensor.type.name}, which cannot be dequantized here; use another file."
            ) from error


def open_gguf(path: Path) -> GgufSource:
    """A GGUF, none of whose weights is read; any part of a split one stands for all.

    `split.*` is left out of its pairs. Raises `ValueError` for a damaged file, `FileNotFoundError` for a part that is
    missing.
    """
    refuse_pointer(path)
    header = read_header(path)
    parts = [header] if _is_whole(header) else [read_header(part) for part in _parts(path, header)]
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"two parts of {path} hold {some(twice)}; download the model again.")
        tensors |= part.tensors
    expected = _split(header, "tensors.count")
    if len(parts) > 1 and expected is not None and expected != len(tensors):
        raise ValueError(f"the parts of {path} hold {len(tensors)} of {expected} tensors; download the model again.")
    carried = {name: pair for name, pair in parts[0].metadata.items() if not name.startswith("split.")}
    files = {str(where): stamp(where) for where in dict.fromkeys(tensor.path for tensor in tensors.values())}
    return GgufSource(carried, tensors, files)


def parts_beside(path: Path) -> list[Path]:
    """The files of the split model that `path` is a part of by its name, in order; `path` alone where it is none."""
    if (match := _PART.fullmatch(path.name)) is None:
        return [path]
    names = [f"{match[1]}-{i + 1:05d}-of-{match[3]}{match[4] or ''}" for i in range(int(match[3]))]
    return [path.with_name(name) for name in names]


def _opener(tensor: StoredTensor, known: Stamp) -> Callable[[], Reader]:
    row_bytes = tensor.n_bytes // max(1, tensor.shape[0])

    def read_rows(first: int, end: int) -> np.ndarray:
        raw = np.fromfile(tensor.path, np.uint8, (end - first) * row_bytes, offset=tensor.offset + first * row_bytes)
        if tensor.type in _UNQUANTIZED:
            return raw.view(_UNQUANTIZED[tensor.type]).reshape(-1, *tensor.shape[1:])
        # as one long row: gguf goes over 16 rows at a time, which for short ones is four times as slow
        return gguf.quants.dequantize(raw[None], tensor.type).reshape(-1, *tensor.shape[1:])

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[int, int], np.ndarray]]:
        check_unchanged(Path(tensor.path), known)
        yield read_rows

    return opened


def _split(header: Header, key: str) -> int | None:
    pair = header.metadata.get(f"split.{key}")
    return pair.value if pair is not None and isinstance(pair.value, int) else None


def _is_whole(header: Header) -> bool:
    """Whether a file is all of its model: it is no part, or only says so although every tensor is there."""
    return (_split(header, "count") or 1) < 2 or _split(header, "tensors.count") == len(header.tensors)


def _parts(path: Path, header: Header) -> list[Path]:
    """The files of a split model, in order."""
    count, held = _split(header, "count"), len(header.tensors)
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"{path} holds {held} tensors of a model in {count} files; give them their names again, "
            f"which end in -00001-of-{count:05d}.gguf and so on."
        )
    parts = parts_beside(path)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {some(missing)}; download the rest of the model.")
    return parts

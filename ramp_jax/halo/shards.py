"""Which files a model is written to: one, or several as llama-gguf-split makes them, with their sizes to the byte."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gguf import GGMLQuantizationType, GGUFValueType

from ramp_jax.allocation import Allocation, header_of, info_bytes, padded
from ramp_jax.formats import get_format
from ramp_jax.models import tensors
from ramp_jax.models.metadata import KeyValue, Metadata, metadata_bytes

_MOST = 500  # each of which takes a descriptor while all of them get their names
_NAME = "{}-{:05d}-of-{:05d}.gguf"


class Stored(NamedTuple):
    """A tensor of a file: `[out, in]` of a matrix, ggml's type, bytes without padding."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    n_bytes: int


class Shard(NamedTuple):
    """One file: its name, its pairs, its tensors in order, its size in bytes."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Stored]
    n_bytes: int


def plan(allocation: Allocation, metadata: Metadata, path: Path, largest: int | None = None) -> list[Shard]:
    """The files of an allocation: `path` alone, or where they may have up to `largest` bytes, parts named after it.

    The first part has all pairs. Raises `ValueError` where a tensor does not fit into a part, or there are too many.
    """
    stored, pairs = _stored(allocation), metadata_bytes(metadata)
    whole = _file_bytes(stored, pairs)
    if largest is None or whole <= largest:
        return [Shard(path, metadata, stored, whole)]
    parts = _divided(stored, pairs, largest)
    if len(parts) > _MOST:
        raise ValueError(
            f"files of up to {largest:,} bytes make {len(parts):,}, at most {_MOST} are written; choose a larger "
            f"--shard_size."
        )
    found = []
    for i, part in enumerate(parts):
        own = (metadata if i == 0 else {}) | _split(i, len(parts), len(stored))
        name = path.with_name(_NAME.format(path.name.removesuffix(".gguf"), i + 1, len(parts)))
        found.append(Shard(name, own, part, _file_bytes(part, metadata_bytes(own))))
    return found


def _divided(stored: Mapping[str, Stored], pairs: int, largest: int) -> list[dict[str, Stored]]:
    """Part after part as many tensors as fit, behind `pairs` bytes of pairs in the first."""
    split = metadata_bytes(_split(0, 0, 0))
    parts: list[dict[str, Stored]] = [{}]
    before, infos, data = pairs + split, 0, 0
    for name, tensor in stored.items():
        info, size = info_bytes(name, tensor.shape), padded(tensor.n_bytes)
        if parts[-1] and header_of(before, infos + info) + data + size > largest:
            parts.append({})
            before, infos, data = split, 0, 0
        infos, data = infos + info, data + size
        parts[-1][name] = tensor
        if (needed := header_of(before, infos) + data) > largest:
            raise ValueError(
                f"no file of {largest:,} bytes holds {name}, which takes one of {needed:,}; choose a larger "
                f"--shard_size."
            )
    return parts


def _split(index: int, count: int, n_tensors: int) -> Metadata:
    """What says which part a file is; of one size whatever the numbers."""
    return {
        "split.no": KeyValue(index, GGUFValueType.UINT16),
        "split.count": KeyValue(count, GGUFValueType.UINT16),
        "split.tensors.count": KeyValue(n_tensors, GGUFValueType.INT32),
    }


def _stored(allocation: Allocation) -> dict[str, Stored]:
    """Every tensor of the files, tables last."""
    found = {}
    for tensor in tensors(allocation.spec):
        fmt = get_format(allocation.format_of(tensor))
        n_bytes = tensor.size // tensor.shape[-1] * fmt.row_bytes(tensor.shape[-1])
        found[tensor.name] = Stored(tensor.shape, fmt.ggml_type, n_bytes)
    for name, table in allocation.spec.tables.items():
        found[name] = Stored(table.shape, GGMLQuantizationType.F32, table.nbytes)
    return found


def _file_bytes(stored: Mapping[str, Stored], pairs: int) -> int:
    infos = sum(info_bytes(name, tensor.shape) for name, tensor in stored.items())
    return header_of(pairs, infos) + sum(padded(tensor.n_bytes) for tensor in stored.values())

"""What stands before the weights of a GGUF: key-value pairs and where each tensor lies.

Every length is held against the bytes that are left before anything is made of it, so a damaged file is refused at
once. The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `gguf.GGUFReader` reads the same
but makes several arrays of every token, which takes seconds.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from ramp_jax.models.metadata import KeyValue, Metadata

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_MOST = 1 << 20  # pairs, and tensors
_MOST_ELEMENTS = 1 << 23  # of all arrays of metadata; the largest vocabularies have 2^18 tokens and 2^19 merges
_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class StoredTensor(NamedTuple):
    """Where a tensor lies: `offset` in bytes from the beginning of its file; `shape` is `[out, in]` of a matrix."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


class Header(NamedTuple):
    """Pairs and tensors of one file, both in its order."""

    metadata: Metadata
    tensors: dict[str, StoredTensor]


class _DamagedError(ValueError):
    """What is wrong with a file that another download would mend."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins as every GGUF does, whatever its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Pairs and tensors of a GGUF; raises `ValueError` where it is damaged or of a kind that is not read here."""
    try:
        if not is_gguf(path):
            raise _DamagedError("it does not begin with GGUF")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header()
    except _DamagedError as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); download or export it again.") from error


class _Reader:
    """A place in a file, which goes on with everything that is read."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.content, self.at = path, content, len(MAGIC)
        self.elements = 0  # of arrays, so far

    def header(self) -> Header:
        """Everything before the tensors' data."""
        version = self.number(_U32)
        if version & 0xFFFF == 0:
            raise ValueError(f"{self.path} is big-endian; convert it with `gguf-convert-endian {self.path} little`.")
        if version not in _VERSIONS:
            raise ValueError(f"{self.path} is a GGUF of version {version}, not of 2 or 3; convert the model again.")
        n_tensors, n_pairs = self.number(_U64), self.number(_U64)
        if max(n_tensors, n_pairs) > _MOST:
            raise _DamagedError(f"it says that it holds {n_tensors:,} tensors and {n_pairs:,} fields")
        metadata: Metadata = {}
        for _ in range(n_pairs):
            key = self.name("field")
            if key in metadata:
                raise _DamagedError(f"it holds {key} twice")
            metadata[key] = self.pair(key)
        return Header(metadata, self.tensors(n_tensors, metadata))

    def pair(self, key: str) -> KeyValue:
        """The value of a field with its type."""
        kind = self.kind(key)
        if kind != GGUFValueType.ARRAY:
            return KeyValue(self.values(key, kind, 1)[0], kind)
        kind, length = self.kind(key), self.number(_U64)
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"{self.path}: {key} is an array of arrays, which is not supported; convert it again.")
        self.elements += length
        if self.elements > _MOST_ELEMENTS:
            raise _DamagedError(f"{key} is an array of {length:,}")
        return KeyValue(self.values(key, kind, length), GGUFValueType.ARRAY, kind)

    def values(self, key: str, kind: GGUFValueType, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string(key) for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize)
        if kind == GGUFValueType.BOOL and raw.strip(b"\0\1"):
            raise _DamagedError(f"{key} is neither true nor false")
        return np.frombuffer(raw, dtype).tolist()

    def tensors(self, count: int, metadata: Metadata) -> dict[str, StoredTensor]:
        """Where tensors lie, one after the other behind the header, each at a multiple of the alignment."""
        found = {}
        for _ in range(count):
            name = self.name("tensor")
            if name in found:
                raise _DamagedError(f"it holds tensor {name} twice")
            found[name] = self.tensor(name)
        alignment = metadata.get("general.alignment", KeyValue(gguf.GGUF_DEFAULT_ALIGNMENT, GGUFValueType.UINT32))
        if alignment.type != GGUFValueType.UINT32 or alignment.value.bit_count() != 1:
            raise _DamagedError(f"general.alignment is {alignment.value!r}")
        start, end = -(-self.at // alignment.value) * alignment.value, 0
        for name, tensor in found.items():
            if tensor.offset != end:
                raise _DamagedError(f"{name} begins at {tensor.offset:,} of its data instead of {end:,}")
            if start + end + tensor.n_bytes > len(self.content):
                raise _DamagedError(f"it ends inside {name}")
            end += -(-tensor.n_bytes // alignment.value) * alignment.value
        if found and start + end < len(self.content):
            raise _DamagedError(f"{len(self.content) - start - end:,} bytes follow its last tensor")
        return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}

    def tensor(self, name: str) -> StoredTensor:
        """The description of a tensor, whose offset is still that within the data."""
        if not 1 <= (rank := self.number(_U32)) <= _MOST_DIMENSIONS:
            raise _DamagedError(f"{name} has {rank:,} dimensions")
        shape = tuple(self.number(_U64) for _ in range(rank))[::-1]
        kind, offset = self.number(_U32), self.number(_U64)
        try:
            tensor = StoredTensor(self.path, offset, shape, GGMLQuantizationType(kind))
        except ValueError as error:
            unknown = f"{name} has type {kind}, which gguf does not know"
            raise ValueError(f"{self.path}: {unknown}; use another file.") from error
        if shape[-1] % gguf.GGML_QUANT_SIZES[tensor.type][0]:
            raise _DamagedError(f"{name} has rows of {shape[-1]:,}, which {tensor.type.name} cannot hold")
        return tensor

    def kind(self, key: str) -> GGUFValueType:
        number = self.number(_U32)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise _DamagedError(f"{key} has type {number:,}") from error

    def name(self, of: str) -> str:
        if not (name := self.string(f"the name of a {of}")).isprintable():
            raise _DamagedError(f"a {of} is called {name!r:.60}")
        return name

    def string(self, key: str) -> str:
        raw = self.take(self.number(_U64))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError(f"{key} is no UTF-8") from error

    def number(self, layout: struct.Struct) -> int:
        return layout.unpack(self.take(layout.size))[0]

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.content):
            raise _DamagedError("it ends inside its header")
        return self.content[start : self.at]

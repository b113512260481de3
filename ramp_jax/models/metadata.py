"""GGUF key-value pairs with their types, and how many bytes they take in a file."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGUFValueType


class KeyValue(NamedTuple):
    """One value with its GGUF type; `sub_type` is the element type of an array."""

    value: Any
    type: GGUFValueType
    sub_type: GGUFValueType | None = None


Metadata = dict[str, KeyValue]

_SCALARS = {
    np.dtype(np.uint8): GGUFValueType.UINT8,
    np.dtype(np.int8): GGUFValueType.INT8,
    np.dtype(np.uint16): GGUFValueType.UINT16,
    np.dtype(np.int16): GGUFValueType.INT16,
    np.dtype(np.uint32): GGUFValueType.UINT32,
    np.dtype(np.int32): GGUFValueType.INT32,
    np.dtype(np.uint64): GGUFValueType.UINT64,
    np.dtype(np.int64): GGUFValueType.INT64,
    np.dtype(np.float32): GGUFValueType.FLOAT32,
    np.dtype(np.float64): GGUFValueType.FLOAT64,
    np.dtype(np.bool_): GGUFValueType.BOOL,
}
_SCALAR_BYTES = {scalar: dtype.itemsize for dtype, scalar in _SCALARS.items()}


class Written(NamedTuple):
    """Where a tensor's bytes are in a file, and their CRC-32."""

    begin: int
    size: int
    checksum: int


class PairsWriter(gguf.GGUFWriter):
    """gguf's writer, which also writes arrays without elements, which files have and which are carried on, and tensors
    piece by piece."""

    def go_on_with(self, path: Path) -> None:
        """Write into the file that is there, whose tensors stay where no other data is written."""
        self.fout, self.path = [path.open("r+b")], path
        self.state = gguf.gguf_writer.WriterState.EMPTY

    def write_tensor_pieces(self, name: str, pieces: Iterable[np.ndarray]) -> Written:
        """The data of a tensor, whose info says how many bytes all pieces have; those before it stay as they are.

        When this returns, the data is in the file whatever happens to the process.
        """
        file, infos = self.fout[0], self.tensors[0]
        self.write_padding(file, file.tell())
        while (before := next(iter(infos))) != name:
            file.seek(self.ggml_pad(infos.pop(before).nbytes, self.data_alignment), os.SEEK_CUR)
        announced, written, begin, checksum = infos.pop(name).nbytes, 0, file.tell(), 0
        for piece in pieces:
            raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            file.write(raw)
            written, checksum = written + raw.nbytes, zlib.crc32(raw, checksum)
        if written != announced:
            raise ValueError(f"{name} has {written:,} bytes, {announced:,} were announced; please report it.")
        self.write_padding(file, written)
        file.flush()
        self.state = gguf.gguf_writer.WriterState.WEIGHTS
        return Written(begin, written, checksum)

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype == GGUFValueType.ARRAY and not len(val) and sub_type is not None:
            head = self._pack("I", vtype) if add_vtype else b""
            return head + self._pack("I", sub_type) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def typed(values: dict[str, Any]) -> Metadata:
    """Pairs with the GGUF type that each Python or NumPy value asks for (int: u32 where it fits, float: f32).

    An empty list is one of strings; an empty array keeps the type of its elements. Raises `ValueError` for what GGUF
    cannot hold.
    """
    return {name: _typed_value(name, value) for name, value in values.items()}


def plain(metadata: Metadata) -> dict[str, Any]:
    """The values alone."""
    return {name: pair.value for name, pair in metadata.items()}


def metadata_bytes(metadata: Metadata) -> int:
    """Bytes of the key-value section of a GGUF file."""
    return sum(_string_bytes(name) + 4 + _value_bytes(pair) for name, pair in metadata.items())


def _typed_value(name: str, value: Any) -> KeyValue:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in _SCALARS:
        return KeyValue(value.tolist(), GGUFValueType.ARRAY, _SCALARS[value.dtype])
    if isinstance(value, list):
        of = {_scalar(item) for item in value} or {GGUFValueType.STRING}
        if len(of) == 1 and None not in of:
            return KeyValue(value, GGUFValueType.ARRAY, of.pop())
    elif (kind := _scalar(value)) is not None:
        return KeyValue(value.item() if isinstance(value, np.generic) else value, kind)
    raise ValueError(f"{name} cannot be written to GGUF: {value!r:.80} is neither text, a number nor a list of these.")


def _scalar(value: Any) -> GGUFValueType | None:
    """The type of one value; None where GGUF has none."""
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, bool | np.bool_):
        return GGUFValueType.BOOL
    if isinstance(value, float | np.floating):
        return GGUFValueType.FLOAT32
    if isinstance(value, int | np.integer):
        fitting = (GGUFValueType.UINT32, 0, 32), (GGUFValueType.INT64, -(1 << 63), 63), (GGUFValueType.UINT64, 0, 64)
        return next((kind for kind, least, bits in fitting if least <= value < 1 << bits), None)
    return None


def _value_bytes(pair: KeyValue) -> int:
    if pair.type == GGUFValueType.STRING:
        return _string_bytes(pair.value)
    if pair.type == GGUFValueType.ARRAY:
        strings = pair.sub_type == GGUFValueType.STRING
        elements = sum(map(_string_bytes, pair.value)) if strings else len(pair.value) * _SCALAR_BYTES[pair.sub_type]
        return 4 + 8 + elements
    return _SCALAR_BYTES[pair.type]


def _string_bytes(text: str) -> int:
    return 8 + len(text.encode("utf-8"))

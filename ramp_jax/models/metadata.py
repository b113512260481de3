"""GGUF key-value pairs with their types, and how many bytes they take in a file."""

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

_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
_NUMPY_TYPES = {
    np.dtype(np.uint8): GGUFValueType.UINT8,
    np.dtype(np.uint32): GGUFValueType.UINT32,
    np.dtype(np.int32): GGUFValueType.INT32,
    np.dtype(np.float32): GGUFValueType.FLOAT32,
    np.dtype(np.bool_): GGUFValueType.BOOL,
}


def read_metadata(reader: gguf.GGUFReader) -> Metadata:
    """Every key-value pair of a file, in file order."""
    pairs = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            pairs[name] = KeyValue(field.contents(), field.types[0], sub_type)
    return pairs


def typed(values: dict[str, Any]) -> Metadata:
    """Pairs with the GGUF type that each Python or NumPy value asks for (int: u32, float: f32)."""
    return {name: _typed_value(value) for name, value in values.items()}


def plain(metadata: Metadata) -> dict[str, Any]:
    """The values alone."""
    return {name: pair.value for name, pair in metadata.items()}


def metadata_bytes(metadata: Metadata) -> int:
    """Bytes of the key-value section of a GGUF file."""
    return sum(_string_bytes(name) + 4 + _value_bytes(pair) for name, pair in metadata.items())


def _typed_value(value: Any) -> KeyValue:
    if isinstance(value, str):
        return KeyValue(value, GGUFValueType.STRING)
    if isinstance(value, bool | np.bool_):
        return KeyValue(bool(value), GGUFValueType.BOOL)
    if isinstance(value, np.ndarray):
        return KeyValue(value.tolist(), GGUFValueType.ARRAY, _NUMPY_TYPES[value.dtype])
    if isinstance(value, list):
        return KeyValue(value, GGUFValueType.ARRAY, GGUFValueType.STRING)
    is_int = isinstance(value, int | np.integer)
    return KeyValue(value, GGUFValueType.UINT32 if is_int else GGUFValueType.FLOAT32)


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

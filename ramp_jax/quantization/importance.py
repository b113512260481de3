"""Importance: the mean squared activation of each linear's input channels, from our statistics or llama.cpp's files.

llama.cpp's importance matrix is a GGUF with Σx² and counts per tensor, or an older binary `.dat`. Both are read; ours
is written as the GGUF, which `llama-quantize --imatrix` takes.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gguf
import jax
import numpy as np
from jaxtyping import Float

from ramp_jax import files, schema
from ramp_jax.models import DecoderSpec, Tensor, matrices
from ramp_jax.models.gguf_header import is_gguf
from ramp_jax.models.gguf_source import GgufSource, open_gguf
from ramp_jax.models.metadata import plain
from ramp_jax.quantization.calibrate import Stats

Importance = Mapping[str, Float[np.ndarray, " I"]]
"""`[I]` f32 by tensor name, as the unfolded model has it."""

_Chunks = Annotated[int, schema.within(0, 2**31 - 1)]

_LONGEST = 127
"""Bytes of a text that llama-quantize passes on to a file."""
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DEAD = 1e-4  # of the mean: channels that calibration hardly saw still count a little


class Origin(NamedTuple):
    """Where an importance matrix comes from: its file, the text that it was found on, in how many windows of how many
    tokens.

    What is None nobody knows, or there is none.
    """

    file: str | None = None
    dataset: str | None = None
    chunks: int | None = None
    chunk_size: int | None = None

    def pairs(self, entries: int) -> dict[str, Any]:
        """What llama-quantize writes into a file rounded with the matrix of so many entries; nothing of none."""
        if not entries:
            return {}
        texts = {"file": self.file, "dataset": self.dataset}
        named = {name: text.encode()[:_LONGEST].decode(errors="ignore") for name, text in texts.items() if text}
        numbers = {"entries_count": entries, "chunks_count": self.chunks}
        counts = {name: np.uint32(number) for name, number in numbers.items() if number}
        return {f"quantize.imatrix.{name}": value for name, value in (named | counts).items()}


NO_ORIGIN = Origin()


def importance_of(spec: DecoderSpec, stats: Stats) -> dict[str, Float[np.ndarray, " I"]]:
    """Importance of every linear of the blocks; as in llama.cpp, embeddings have no entry."""
    moments = stats.under({}).moments
    return {tensor.name: np.ascontiguousarray(moments[tensor.reads].square, np.float32) for tensor in linears(spec)}


def folded(importance: Importance, tensor: Tensor, folding: Mapping[str, jax.Array]) -> Float[np.ndarray, " I"] | None:
    """Importance of a tensor's input after Scale Folding has divided it by its scales, None where there is no entry.

    Channels that calibration hardly saw get a ten-thousandth of the mean, so that their weights are not given up.
    """
    values, scales = importance.get(tensor.name), folding.get(tensor.reads or "")
    if values is None:
        return None
    values = np.maximum(values, _DEAD * values.mean(dtype=np.float64)).astype(np.float32)
    return values if scales is None else values / np.square(np.asarray(scales, np.float32))


def write_imatrix(
    path: str | Path, importance: Importance, dataset: str, chunks: int, chunk_size: int, tokens: int | None = None
) -> None:
    """Write an importance matrix that llama-quantize reads: `chunks` windows of `chunk_size` tokens of `dataset`.

    It holds sums over `tokens`, by default all, and that number, whose quotient is read. Where it is a power of two
    that is the importance to the last bit.
    """
    needed = sum(values.nbytes for values in importance.values())
    with files.replacing(Path(path), needed) as temporary:
        _write_gguf(temporary, importance, dataset, chunks, chunk_size, float(tokens or chunks * chunk_size))


def _write_gguf(path: Path, importance: Importance, dataset: str, chunks: int, chunk_size: int, tokens: float) -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name, values in importance.items():
        writer.add_tensor(name + _SUMS, np.asarray(values[None] * tokens, np.float32))
        writer.add_tensor(name + _COUNTS, np.full((1, 1), tokens, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_imatrix(path: str | Path, spec: DecoderSpec) -> dict[str, Float[np.ndarray, " I"]]:
    """Importance from llama.cpp's file, GGUF or `.dat`; raises as `load_imatrix`."""
    return load_imatrix(path, spec)[0]


def load_imatrix(path: str | Path, spec: DecoderSpec) -> tuple[dict[str, Float[np.ndarray, " I"]], Origin]:
    """Importance from llama.cpp's file, GGUF or `.dat`, and what that says of its origin.

    Raises `FileNotFoundError` where there is none, `ValueError` where it is damaged, a value is not finite, or the
    first tensor that does not fit shows that it was made for another model.
    """
    way_out = "make an importance matrix of this model with launch/calibrate.py"
    with schema.gate(path, "an importance matrix of llama.cpp", way_out):
        found, origin = _from_gguf(Path(path)) if is_gguf(Path(path)) else _from_dat(schema.content(path))
        for name, values in found.items():
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"it has a negative or non-finite value for {name}")
    wanted = {tensor.name: tensor for tensor in matrices(spec)}
    for tensor in linears(spec):
        size = len(found[tensor.name]) if tensor.name in found else "no"
        if size != tensor.shape[-1]:
            raise ValueError(
                f"{path} was made for another model: it has {size} values for {tensor.name}, this model needs "
                f"{tensor.shape[-1]}; {way_out}."
            )
    if unknown := [name for name in found if name not in wanted]:
        raise ValueError(f"{path} was made for another model: this one has no {unknown[0]}; {way_out}.")
    importance = {name: values for name, values in found.items() if wanted[name].layer is not None}
    return importance, origin._replace(file=Path(path).name)


_Found = tuple[dict[str, Float[np.ndarray, " I"]], Origin]


def _from_gguf(path: Path) -> _Found:
    """Σx² over counts; 1 where nothing was counted, as llama.cpp reads it."""
    source = open_gguf(path)
    found = {}
    for name in sorted({name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in source.shapes}):
        rows, width = _shape(source, name + _SUMS)
        if rows != 1 or _shape(source, name + _COUNTS) != (1, 1):
            raise ValueError(f"{name} has sums and counts of several matrices, which a dense model has not")
        sums, counts = (source.read(name + part, np.float32).ravel() for part in (_SUMS, _COUNTS))
        if not 0 <= counts[0] < np.inf:
            raise ValueError(f"it has {counts[0]} tokens for {name}")
        with np.errstate(over="ignore"):  # what is not finite is refused
            found[name] = sums / counts[0] if counts[0] > 0 else np.ones(width, np.float32)
    fields = plain(source.metadata)
    datasets = schema.read(tuple[str, ...], fields.get("imatrix.datasets", ()), "imatrix.datasets")
    chunks, size = (
        schema.read(_Chunks, fields.get(key, 0), key) for key in ("imatrix.chunk_count", "imatrix.chunk_size")
    )
    return found, Origin(dataset=next(iter(datasets), None), chunks=chunks, chunk_size=size)


def _shape(source: GgufSource, name: str) -> tuple[int, int]:
    """Of a tensor of f32."""
    shape = source.shapes.get(name, ())
    if not shape or source.tensors[name].type != gguf.GGMLQuantizationType.F32:
        raise ValueError(f"it has no {name} of F32")
    return math.prod(shape[:-1]), shape[-1]


def _from_dat(raw: bytes) -> _Found:
    """The older format, little-endian i32 throughout: entries; per entry name, calls, size and f32 means · calls.

    Newer ones of it end in the number of chunks and the name of a data set.
    """
    place = 0

    def number() -> int:
        return struct.unpack("<i", part(4))[0]

    def part(size: int) -> bytes:
        nonlocal place
        if not 0 < size <= len(raw) - place:
            raise ValueError("it ends too early, or has a part of no size")
        place += size
        return raw[place - size : place]

    found: dict[str, Float[np.ndarray, " I"]] = {}
    for _ in range(number()):
        name, calls = part(number()).decode(), number()
        values = np.frombuffer(part(4 * number()), "<f4")
        if name in found or calls < 0:
            raise ValueError(f"it has {name} twice, or {calls} calls of it")
        found[name] = (values / np.float32(max(calls, 1))).astype(np.float32)
    origin = NO_ORIGIN
    if place < len(raw):
        chunks = schema.read(_Chunks, number(), "its number of chunks")
        origin = Origin(chunks=chunks, dataset=part(size).decode() if (size := number()) != 0 else None)
    if place < len(raw):
        raise ValueError(f"{len(raw) - place:,} bytes are left at its end")
    return found, origin


def linears(spec: DecoderSpec) -> list[Tensor]:
    """The matrices that have importance: those of the blocks."""
    return [tensor for tensor in matrices(spec) if tensor.layer is not None]

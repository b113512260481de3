"""Importance: the mean squared activation of each linear's input channels, from our statistics or llama.cpp's files.

llama.cpp's importance matrix is a GGUF with Σx² and counts per tensor, or an older binary `.dat`. Both are read; ours
is written as the GGUF, which `llama-quantize --imatrix` takes.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import jax
import numpy as np
from jaxtyping import Float

from ramp_jax import files
from ramp_jax.models import DecoderSpec, Tensor, matrices
from ramp_jax.quantization.calibrate import Stats

Importance = Mapping[str, Float[np.ndarray, " I"]]
"""`[I]` f32 by tensor name, as the unfolded model has it."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DEAD = 1e-4  # of the mean: channels that calibration hardly saw still count a little


def importance_of(spec: DecoderSpec, stats: Stats) -> dict[str, Float[np.ndarray, " I"]]:
    """Importance of every linear of the blocks; as in llama.cpp, embeddings have no entry."""
    moments = stats.under({}).moments
    return {tensor.name: np.ascontiguousarray(moments[tensor.reads].square, np.float32) for tensor in _linears(spec)}


def folded(importance: Importance, tensor: Tensor, folding: Mapping[str, jax.Array]) -> Float[np.ndarray, " I"] | None:
    """Importance of a tensor's input after Scale Folding has divided it by its scales, None where there is no entry.

    Channels that calibration hardly saw get a ten-thousandth of the mean, so that their weights are not given up.
    """
    values, scales = importance.get(tensor.name), folding.get(tensor.reads or "")
    if values is None:
        return None
    values = np.maximum(values, _DEAD * values.mean(dtype=np.float64)).astype(np.float32)
    return values if scales is None else values / np.square(np.asarray(scales, np.float32))


def write_imatrix(path: str | Path, importance: Importance, dataset: str, chunks: int, chunk_size: int) -> None:
    """Write an importance matrix that llama-quantize reads: `chunks` windows of `chunk_size` tokens of `dataset`."""
    needed = sum(values.nbytes for values in importance.values())
    with files.replacing(Path(path), needed) as temporary:
        _write_gguf(temporary, importance, dataset, chunks, chunk_size)


def _write_gguf(path: Path, importance: Importance, dataset: str, chunks: int, chunk_size: int) -> None:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    tokens = float(chunks * chunk_size)
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
    """Importance from llama.cpp's file, GGUF or `.dat`.

    Raises `ValueError` where the file is damaged, a value is not finite, or the first tensor that does not fit shows
    that it was made for another model.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            found = _from_gguf(path) if file.read(4) == b"GGUF" else _from_dat(path.read_bytes())
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no importance matrix of llama.cpp ({error}); make it again.") from error
    wanted = {tensor.name: tensor for tensor in matrices(spec)}
    for tensor in _linears(spec):
        size = len(found[tensor.name]) if tensor.name in found else "no"
        if size != tensor.shape[-1]:
            raise ValueError(
                f"{path} was made for another model: it has {size} values for {tensor.name}, this model needs "
                f"{tensor.shape[-1]}; make an importance matrix of this model."
            )
    if unknown := [name for name in found if name not in wanted]:
        raise ValueError(
            f"{path} was made for another model: this one has no {unknown[0]}; make an importance matrix of this model."
        )
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ValueError(f"{path} has a negative or non-finite value for {name}; make it again.")
    return {name: values for name, values in found.items() if wanted[name].layer is not None}


def _from_gguf(path: Path) -> dict[str, Float[np.ndarray, " I"]]:
    """Σx² over counts; 1 where nothing was counted, as llama.cpp reads it."""
    stored = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(_SUMS) for name in stored if name.endswith(_SUMS)]
    if not names:
        raise ValueError("it holds no tensor that ends in .in_sum2")
    found = {}
    for name in names:
        sums, count = stored[name + _SUMS].ravel(), float(stored[name + _COUNTS].ravel()[0])
        found[name] = sums / np.float32(count) if count > 0 else np.ones_like(sums)
    return found


def _from_dat(raw: bytes) -> dict[str, Float[np.ndarray, " I"]]:
    """The older format, little-endian i32 throughout: entries; per entry name, calls, size and f32 means · calls."""
    place = 0

    def number() -> int:
        nonlocal place
        (value,) = struct.unpack_from("<i", raw, place)
        place += 4
        return value

    def part(size: int) -> bytes:
        nonlocal place
        if not 0 < size <= len(raw) - place:
            raise ValueError("it ends too early")
        place += size
        return raw[place - size : place]

    found = {}
    for _ in range(number()):
        name, calls = part(number()).decode(), number()
        values = np.frombuffer(part(4 * number()), "<f4")
        found[name] = (values / np.float32(max(calls, 1))).astype(np.float32)
    return found


def _linears(spec: DecoderSpec) -> list[Tensor]:
    return [tensor for tensor in matrices(spec) if tensor.layer is not None]

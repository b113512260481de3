"""Folded weights and an allocation → a GGUF that stock llama.cpp runs."""

import collections
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ramp_jax import hosts
from ramp_jax.allocation import Allocation, export_metadata
from ramp_jax.formats import get_format
from ramp_jax.journal import NOWHERE, Journal, checksum
from ramp_jax.models import Model, Tensor, tensors
from ramp_jax.models.metadata import PairsWriter, Written
from ramp_jax.models.rope import permute_rope
from ramp_jax.quantization import REFERENCE, Encoder
from ramp_jax.quantization.encode import TAKEN, Codes, encoded

_ARCHITECTURE = "general.architecture"
_WRITTEN = "written"


def export_gguf(
    model: Model,
    allocation: Allocation,
    path: str | Path,
    encoder: Encoder = REFERENCE,
    journal: Journal = NOWHERE,
) -> int:
    """Quantize `model` as `allocation` says (Scale Folding included) and write the file; returns its size in bytes.

    The bytes are those that `fake_quantize` decodes with the same encoder. The file appears under its name only when it
    is whole; what was written of it before `journal` last kept a block is not made again. Of several processes only the
    first writes. Raises `ValueError` where the allocation is another model's or there is no vocabulary, `OSError` where
    the folder cannot be written.
    """
    if allocation.spec != model.spec:
        raise ValueError("the allocation was made for another model; make one for this model with launch/allocate.py.")
    if "tokenizer.ggml.tokens" not in allocation.metadata:
        raise ValueError("the model has no vocabulary to write; load it with `tokenizer_from` a GGUF that has its own.")
    path = Path(path)
    check_writable(path)
    kept = hosts.index() == 0 and journal.load(TAKEN) is not None
    if kept and not _holds(journal.begun(path), journal.load(_WRITTEN)):
        journal.save(TAKEN, None)
        journal.save(_WRITTEN, {})
    hosts.barrier()  # all begin where process 0 does
    if hosts.index() > 0:
        for _, pieces in encoded(model, allocation, encoder, "encoding", journal):
            collections.deque(pieces, maxlen=0)
        return allocation.file_bytes
    with journal.replacing(path, allocation.file_bytes) as file:
        _write(model, allocation, file, encoder, journal, f"writing {path.name}")
        size = file.stat().st_size
        if size != allocation.file_bytes:
            raise ValueError(
                f"the file has {size:,} bytes, {allocation.file_bytes:,} were predicted; please report it."
            )
    return size


def _holds(path: Path, written: dict[str, Written] | None) -> bool:
    """Whether a file that was begun has what was written of it: a disk that lost its power may have less."""
    if written is None or not path.is_file():
        return False
    with path.open("rb") as file:
        return all(
            file.seek(begin) == begin and checksum(file, size) == known for begin, size, known in written.values()
        )


def check_writable(path: Path) -> None:
    """Raise `OSError` where a file of that name cannot be made, before long work starts."""
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder; choose another output.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"cannot write {path}: {path.parent} is not a writable folder; choose another output.")


def write_skeleton(model: Model, allocation: Allocation, path: Path) -> None:
    """A file of the right size whose weights are holes: all that a program needs which asks for shapes alone."""
    with _begun(model, allocation, path):
        pass
    os.truncate(path, allocation.file_bytes)


def _write(model: Model, allocation: Allocation, path: Path, encoder: Encoder, journal: Journal, doing: str) -> None:
    written: dict[str, Written] = journal.load(_WRITTEN) or {}
    with _begun(model, allocation, path, go_on=journal.load(TAKEN) is not None) as writer:
        for tensor, pieces in encoded(model, allocation, encoder, doing, journal):
            raw = _raw(model, tensor, allocation.format_of(tensor), pieces)
            written[tensor.name] = writer.write_tensor_pieces(tensor.name, raw)
            journal.save(_WRITTEN, written)
        for table in model.spec.tables.values():
            writer.write_tensor_data(table)


@contextlib.contextmanager
def _begun(model: Model, allocation: Allocation, path: Path, go_on: bool = False) -> Iterator[PairsWriter]:
    """A writer behind everything that comes before the first tensor's data, of a new file or one to `go_on` with."""
    writer = PairsWriter(None if go_on else path, model.spec.architecture)
    for name, pair in export_metadata(allocation).items():
        if name != _ARCHITECTURE:  # the writer's constructor adds it
            writer.add_key_value(name, pair.value, pair.type, pair.sub_type)
    for tensor in tensors(model.spec):
        fmt = get_format(allocation.format_of(tensor))
        size = tensor.size // tensor.shape[-1] * fmt.row_bytes(tensor.shape[-1])
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=fmt.ggml_type)
    for name, table in model.spec.tables.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    if go_on:
        writer.go_on_with(path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer
    finally:
        writer.close()


def _raw(model: Model, tensor: Tensor, fmt: str, pieces: Codes) -> Iterator[np.ndarray]:
    """The tensor's bytes, some rows at a time in the file's order."""
    raw = (get_format(fmt).to_bytes(codes) for codes in pieces)
    if heads := model.spec.family.permuted_heads(tensor):
        rows = np.concatenate([piece.ravel() for piece in raw]).reshape(tensor.shape[0], -1)
        return iter([permute_rope(rows, heads)])  # a row of a bias is one number
    return raw

"""Folded weights and an allocation → a GGUF that stock llama.cpp runs."""

import collections
import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ramp_jax import hosts
from ramp_jax.allocation import Allocation, export_metadata
from ramp_jax.formats import get_format
from ramp_jax.halo.shards import Shard, plan
from ramp_jax.journal import NOWHERE, Journal, checksum
from ramp_jax.models import Model, Tensor
from ramp_jax.models.gguf_header import read_header
from ramp_jax.models.metadata import Metadata, PairsWriter, Written
from ramp_jax.models.rope import permute_rope
from ramp_jax.quantization import REFERENCE, Encoder
from ramp_jax.quantization.encode import TAKEN, Codes, encoded

_WRITTEN = "written"


def export_gguf(
    model: Model,
    allocation: Allocation,
    path: str | Path,
    encoder: Encoder = REFERENCE,
    journal: Journal = NOWHERE,
    *,
    shard_bytes: int | None = None,
    metadata: Metadata | None = None,
) -> int:
    """Quantize `model` as `allocation` says (Scale Folding included) and write the file; returns its size in bytes.

    The bytes are those that `fake_quantize` decodes with the same encoder. The file appears under its name only when it
    is whole and every tensor was read again as it was encoded; what was written of it before `journal` last kept a
    block is not made again. With `shard_bytes` it is divided into files of at most that size where it is larger (see
    `shards.plan`), and the size is that of all. `metadata` takes the place of the allocation's own pairs. Of several
    processes only the first writes. Raises `ValueError` where the allocation is another model's, there is no vocabulary
    or a tensor is larger than a file may be, `OSError` where the folder cannot be written or the disk changes bytes.
    """
    if allocation.spec != model.spec:
        raise ValueError("the allocation was made for another model; make one for this model with launch/allocate.py.")
    if "tokenizer.ggml.tokens" not in allocation.metadata:
        raise ValueError("the model has no vocabulary to write; load it with `tokenizer_from` a GGUF that has its own.")
    path = Path(path)
    check_writable(path)
    if metadata is None:
        metadata = export_metadata(allocation, encoder.imatrix_pairs(model.spec))
    shards = plan(allocation, metadata, path, shard_bytes)
    kept = hosts.index() == 0 and journal.load(TAKEN) is not None
    if kept and not _holds(dict(zip(map(journal.begun, _paths(shards)), shards, strict=True)), journal.load(_WRITTEN)):
        journal.save(TAKEN, None)
        journal.save(_WRITTEN, {})
    hosts.barrier()  # all begin where process 0 does
    if hosts.index() > 0:
        for _, pieces in encoded(model, allocation, encoder, "encoding", journal):
            collections.deque(pieces, maxlen=0)
        return sum(shard.n_bytes for shard in shards)
    with journal.replacing({shard.path: shard.n_bytes for shard in shards}) as begun:
        files = dict(zip(begun, shards, strict=True))
        written = _write(model, allocation, files, encoder, journal, f"writing {path.name}")
        for file, shard in files.items():
            _verify(file, shard, written)
    return sum(shard.n_bytes for shard in shards)


def _paths(shards: Sequence[Shard]) -> list[Path]:
    return [shard.path for shard in shards]


def _holds(files: Mapping[Path, Shard], written: Mapping[str, Written] | None) -> bool:
    """Whether files that were begun have what was written of them: a disk that lost its power may have less."""
    return written is not None and all(_changed(path, shard, written) is None for path, shard in files.items())


def _changed(path: Path, shard: Shard, written: Mapping[str, Written]) -> str | None:
    """The first tensor of a file that does not hold the bytes that were written of it, None where all do."""
    known = {name: written[name] for name in shard.tensors if name in written}
    if not known:
        return None
    if not path.is_file():
        return next(iter(known))
    with path.open("rb") as file:
        for name, (begin, size, expected) in known.items():
            if file.seek(begin) != begin or checksum(file, size) != expected:
                return name
    return None


def _verify(path: Path, shard: Shard, written: Mapping[str, Written]) -> None:
    """Raise where a file, read again as any other GGUF, is not what was planned and encoded, tensor by tensor.

    `ValueError` for a size that was not predicted, `OSError` for other bytes.
    """
    if (size := path.stat().st_size) != shard.n_bytes:
        raise ValueError(f"{shard.path} has {size:,} bytes, {shard.n_bytes:,} were predicted; please report it.")
    found = read_header(path).tensors
    for name, stored in shard.tensors.items():
        here, (begin, size, _) = found.get(name), written[name]
        if here is None or (here.shape, here.type, here.offset, here.n_bytes) != (*stored[:2], begin, size):
            raise ValueError(f"{shard.path} does not describe {name} as it was written; please report it.")
    if name := _changed(path, shard, written):
        raise OSError(f"{shard.path}: {name} reads back other than it was written; check the disk, then run again.")


def check_writable(path: Path) -> None:
    """Raise `OSError` where a file of that name cannot be made, before long work starts."""
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder; choose another output.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"cannot write {path}: {path.parent} is not a writable folder; choose another output.")


def write_skeleton(model: Model, allocation: Allocation, path: Path) -> None:
    """A file of the right size whose weights are holes: all that a program needs which asks for shapes alone."""
    (shard,) = plan(allocation, export_metadata(allocation), path)
    with _begun(model, path, shard):
        pass
    os.truncate(path, shard.n_bytes)


def _write(
    model: Model,
    allocation: Allocation,
    files: Mapping[Path, Shard],
    encoder: Encoder,
    journal: Journal,
    doing: str,
) -> dict[str, Written]:
    """Tensor after tensor in the files' order; returns where the bytes of each are."""
    written: dict[str, Written] = (journal.load(_WRITTEN) or {}) if journal.load(TAKEN) is not None else {}
    home = {name: path for path, shard in files.items() for name in shard.tensors}
    data = itertools.chain(
        (
            (tensor.name, _raw(model, tensor, allocation.format_of(tensor), pieces))
            for tensor, pieces in encoded(model, allocation, encoder, doing, journal)
        ),
        ((name, iter([table])) for name, table in model.spec.tables.items()),
    )
    for path, part in itertools.groupby(data, key=lambda item: home[item[0]]):
        go_on = any(name in written for name in files[path].tensors)
        with _begun(model, path, files[path], go_on) as writer:
            for name, raw in part:
                written[name] = writer.write_tensor_pieces(name, raw)
                journal.save(_WRITTEN, written)
    return {name: Written(*where) for name, where in written.items()}


@contextlib.contextmanager
def _begun(model: Model, path: Path, shard: Shard, go_on: bool = False) -> Iterator[PairsWriter]:
    """A writer behind everything that comes before the first tensor's data, of a new file or one to `go_on` with."""
    writer = PairsWriter(None if go_on else path, model.spec.architecture)
    writer.kv_data = [{}]  # of a part that is not the first, the architecture is no pair
    for name, pair in shard.metadata.items():
        writer.add_key_value(name, pair.value, pair.type, pair.sub_type)
    for name, stored in shard.tensors.items():
        size, dtype = stored.n_bytes, np.dtype(np.float32)
        writer.add_tensor_info(name, stored.shape, dtype, size, raw_dtype=stored.type)
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

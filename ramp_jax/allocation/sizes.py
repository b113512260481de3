"""Bytes of what a GGUF holds, padding included."""

from collections.abc import Mapping

import gguf

from ramp_jax.formats import get_format
from ramp_jax.models import DecoderSpec, Tensor, matrices, tensors
from ramp_jax.models.layout import SMALLEST_BLOCK
from ramp_jax.models.metadata import Metadata, metadata_bytes

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT

STORED = "F32"
"""Format of gains, biases and tables."""

_NAMED = 3  # such matrices in a summary's sentence


def padded(size: int) -> int:
    """Bytes that data of that size takes in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(tensor: Tensor, fmt: str) -> int:
    """Bytes of a tensor's data in a file, padding included."""
    rows = tensor.size // tensor.shape[-1]
    return padded(rows * get_format(fmt).row_bytes(tensor.shape[-1]))


def header_bytes(spec: DecoderSpec, metadata: Metadata) -> int:
    """Bytes before the first tensor's data of a file of the whole model."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(spec)}
    shapes |= {name: table.shape for name, table in spec.tables.items()}
    return header_of(metadata_bytes(metadata), sum(info_bytes(name, shape) for name, shape in shapes.items()))


def header_of(pairs: int, infos: int) -> int:
    """Bytes of a header: magic, version, two counts, so many of pairs and of tensor descriptions, padding."""
    return padded(4 + 4 + 8 + 8 + pairs + infos)


def info_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's description."""
    return 8 + len(name) + 4 + 8 * len(shape) + 4 + 8


def fallback(spec: DecoderSpec, formats: Mapping[str, str], linear_bpw: float) -> str | None:
    """One sentence on the matrices that blocks cannot hold, beside others at `linear_bpw`; None where there is none."""
    members = [tensor for tensor in matrices(spec) if not tensor.allocatable]
    if not members:
        return None
    size = sum(tensor_bytes(tensor, formats[tensor.name]) for tensor in members)
    beyond = size - linear_bpw * sum(tensor.size for tensor in members) / 8
    named = ", ".join(tensor.name for tensor in members[:_NAMED])
    rest = f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
    return (
        f"{len(members)} of {len(matrices(spec))} matrices stay in "
        f"{' and '.join(dict.fromkeys(formats[tensor.name] for tensor in members))}, since their rows are no multiple "
        f"of {SMALLEST_BLOCK} weights: {named}{rest}; they take {size:,} bytes, {beyond:,.0f} beyond the "
        f"{linear_bpw:.3f} bits per weight of the others."
    )

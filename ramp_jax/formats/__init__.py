"""GGUF block formats as pure JAX functions."""

from ramp_jax.formats.registry import EXPORTABLE, LEVELS, Format, format_for, format_up_to, get_format
from ramp_jax.formats.row_chunks import decode, encode, round_trip

__all__ = [
    "EXPORTABLE",
    "LEVELS",
    "Format",
    "decode",
    "encode",
    "format_for",
    "format_up_to",
    "get_format",
    "round_trip",
]

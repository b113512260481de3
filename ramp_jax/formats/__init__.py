"""GGUF block formats as pure JAX functions."""

from ramp_jax.formats.registry import (
    DEFAULT_LEVELS,
    EXPORTABLE,
    LEVEL_NAMES,
    LEVELS,
    Format,
    format_for,
    format_up_to,
    get_format,
    level_of,
    levels_of,
    ordered,
    unweighted,
    written,
)
from ramp_jax.formats.row_chunks import decode, encode, round_trip

__all__ = [
    "DEFAULT_LEVELS",
    "EXPORTABLE",
    "LEVELS",
    "LEVEL_NAMES",
    "Format",
    "decode",
    "encode",
    "format_for",
    "format_up_to",
    "get_format",
    "level_of",
    "levels_of",
    "ordered",
    "round_trip",
    "unweighted",
    "written",
]

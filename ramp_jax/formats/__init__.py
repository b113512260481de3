"""GGUF block formats as pure JAX functions."""

from ramp_jax.formats.registry import (
    LEVEL_FORMATS,
    LEVELS,
    Format,
    encode,
    format_for,
    formats_for,
    get_format,
    round_trip,
)

__all__ = [
    "LEVELS",
    "LEVEL_FORMATS",
    "Format",
    "encode",
    "format_for",
    "formats_for",
    "get_format",
    "round_trip",
]

"""GGUF block formats as pure JAX functions."""

from ramp_jax.formats.parts import decode, encode, round_trip
from ramp_jax.formats.registry import LEVEL_FORMATS, LEVELS, Format, format_for, format_up_to, get_format

__all__ = [
    "LEVELS",
    "LEVEL_FORMATS",
    "Format",
    "decode",
    "encode",
    "format_for",
    "format_up_to",
    "get_format",
    "round_trip",
]

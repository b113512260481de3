"""GGUF block formats as pure JAX functions."""

from ramp_jax.formats.registry import LEVELS, Format, format_for, formats_for, get_format, round_trip

__all__ = ["LEVELS", "Format", "format_for", "formats_for", "get_format", "round_trip"]

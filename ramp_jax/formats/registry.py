"""The formats that an allocation may name, and which of them a level means for a row length."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from ramp_jax.formats import legacy


@dataclasses.dataclass(frozen=True)
class Format:
    """One GGUF block format.

    `encode` maps weights f32 `[*rows, I]` to a pytree of codes, `decode` codes to f32 `[*rows, I]`; both are pure and
    jittable. `to_bytes` and `from_bytes` map codes to and from `[*rows, row_bytes(I)]` uint8 on the host. `level` is
    the action that chooses the format, `None` for plain floats.
    """

    name: str
    level: int | None
    encode: Callable[[jax.Array], Any]
    decode: Callable[[Any], jax.Array]
    to_bytes: Callable[[Any], np.ndarray]
    from_bytes: Callable[[np.ndarray], Any]

    @property
    def ggml_type(self) -> gguf.GGMLQuantizationType:
        """The type number that a GGUF file stores."""
        return gguf.GGMLQuantizationType[self.name]

    @property
    def block_size(self) -> int:
        """Weights per block."""
        return gguf.GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return gguf.GGML_QUANT_SIZES[self.ggml_type][1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, n_in: int) -> int:
        """Bytes of one row of `n_in` weights; raises `ValueError` where the row is not a whole number of blocks."""
        if n_in % self.block_size:
            raise ValueError(
                f"{self.name} holds rows of a multiple of {self.block_size} weights, not {n_in}; "
                f"choose a format with a smaller block or keep the tensor in F16."
            )
        return n_in // self.block_size * self.block_bytes


def _float_format(name: str, dtype: Any) -> Format:
    dtype = jnp.dtype(dtype)
    return Format(
        name,
        None,
        encode=lambda w: w.astype(dtype),
        decode=lambda codes: codes.astype(jnp.float32),
        to_bytes=lambda codes: np.ascontiguousarray(codes, dtype).view(np.uint8),
        from_bytes=lambda raw: np.ascontiguousarray(raw).view(dtype),
    )


_FORMATS = {
    fmt.name: fmt
    for fmt in (
        _float_format("F32", jnp.float32),
        _float_format("F16", jnp.float16),
        _float_format("BF16", jnp.bfloat16),
        Format("Q4_0", 4, legacy.encode_q4_0, legacy.decode, legacy.q4_0_to_bytes, legacy.q4_0_from_bytes),
        Format("Q5_0", 5, legacy.encode_q5_0, legacy.decode, legacy.q5_0_to_bytes, legacy.q5_0_from_bytes),
        Format("Q8_0", 8, legacy.encode_q8_0, legacy.decode, legacy.q8_0_to_bytes, legacy.q8_0_from_bytes),
    )
}

LEVELS = tuple(sorted(fmt.level for fmt in _FORMATS.values() if fmt.level))
"""Every level that some format serves: the largest action set."""


def get_format(name: str) -> Format:
    """The format of that ggml name; raises `ValueError` that lists the known ones."""
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats are {', '.join(_FORMATS)}.")
    return _FORMATS[name]


def format_for(level: int, n_in: int) -> Format | None:
    """The format that `level` means for rows of `n_in` weights, or None where the level is masked."""
    candidates = [f for f in _FORMATS.values() if f.level == level and n_in % f.block_size == 0]
    return max(candidates, key=lambda f: f.block_size, default=None)


def formats_for(n_in: int, levels: tuple[int, ...]) -> list[Format]:
    """The formats that rows of `n_in` weights can take at `levels`, masked levels left out."""
    return [fmt for level in levels if (fmt := format_for(level, n_in))]


@functools.partial(jax.jit, static_argnames="name")
def round_trip(w: jax.Array, name: str) -> jax.Array:
    """`decode(encode(w))` in one compiled call: what the weights `[*rows, I]` become in format `name`."""
    fmt = get_format(name)
    return fmt.decode(fmt.encode(w))

"""The formats that an allocation may name, and which of them a level means for a row length."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ramp_jax.formats import codes, integers, kquants, legacy, packing, refine
from ramp_jax.formats.rounding import rounded_to_f16

Effort = Literal["reference", "best"]

LEVEL_FORMATS: dict[float, tuple[str | None, str | None]] = {
    2: ("Q2_K", None),
    3: ("Q3_K", None),
    4: ("IQ4_XS", "IQ4_NL"),
    4.5: ("Q4_K", None),
    5: ("Q5_K", "Q5_0"),
    6: ("Q6_K", "Q5_1"),
    8: ("Q8_0", "Q8_0"),
}
"""Level → the format where rows are a multiple of 256 weights, and where only of 32 (None: the level is masked).

A level is about the bits of a code, and orders the formats by size."""

LEVELS = tuple(LEVEL_FORMATS)
"""The largest action set."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One block format.

    `encode(w, importance, effort)` maps weights f32 `[*rows, I]` to a pytree of codes, `decode` codes to f32
    `[*rows, I]`; both are pure and jittable. `to_bytes` and `from_bytes` map codes to and from
    `[*rows, row_bytes(I)]` uint8 on the host, None where no GGUF type stores the format. `level` is the nominal code
    width in bits, None for plain floats.
    """

    name: str
    level: float | None
    block_size: int
    block_bytes: int
    encoder: Callable[..., Any]
    decode: Callable[[Any], jax.Array]
    to_bytes: Callable[[Any], np.ndarray] | None
    from_bytes: Callable[[np.ndarray], Any] | None

    def encode(self, w: jax.Array, importance: jax.Array | None = None, effort: Effort = "reference") -> Any:
        """Codes of w `[*rows, I]`, weighted by `importance` `[I]`.

        `reference` makes ggml's bytes; `best` searches on from there and is never worse in any block. Inputs are not
        checked here: `formats.check` does, on the host.
        """
        if effort not in ("reference", "best"):
            raise ValueError(f"unknown effort {effort!r}; choose reference or best.")
        found = self.encoder(w, importance)
        if effort == "best" and self.name in refine.GRIDS:
            found = refine.refine(found, w, importance, refine.GRIDS[self.name])
        return found

    @property
    def exportable(self) -> bool:
        """Whether a GGUF type stores it."""
        return self.to_bytes is not None

    @property
    def ggml_type(self) -> gguf.GGMLQuantizationType:
        """The type number that a GGUF file stores; raises `ValueError` for simulated formats."""
        if not self.exportable:
            raise ValueError(f"{self.name} is simulated only; export level {self.level} with format_for(level, n_in).")
        return gguf.GGMLQuantizationType[self.name]

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


def _ggml(name: str, level: float | None, encoder: Any, decode: Any, to_bytes: Any, from_bytes: Any) -> Format:
    size, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return Format(name, level, size, size_bytes, encoder, decode, to_bytes, from_bytes)


def _float(name: str, dtype: Any, rounded: Callable[[jax.Array], jax.Array] = lambda w: w) -> Format:
    dtype = jnp.dtype(dtype)
    return _ggml(
        name,
        None,
        lambda w, _importance: rounded(w).astype(dtype),
        lambda stored: stored.astype(jnp.float32),
        lambda stored: np.ascontiguousarray(stored, dtype).view(np.uint8),
        lambda raw: np.ascontiguousarray(raw).view(dtype),
    )


def _blocks(name: str, level: float, encoder: Any, to_bytes: Any, from_bytes: Any, bits: int | None = None) -> Format:
    if bits is not None:
        to_bytes, from_bytes = functools.partial(to_bytes, bits=bits), functools.partial(from_bytes, bits=bits)
    return _ggml(name, level, encoder, codes.decode, to_bytes, from_bytes)


def _group(name: str, bits: int, group: int, encoder: Any) -> Format:
    return Format(name, bits, group, group * bits // 8 + 4, encoder, integers.decode, None, None)


_FORMATS = {
    fmt.name: fmt
    for fmt in (
        _float("F32", jnp.float32),
        _float("F16", jnp.float16, rounded_to_f16),
        _float("BF16", jnp.bfloat16, lambda w: lax.reduce_precision(w, 8, 7)),
        _blocks("Q4_0", 4, legacy.encode_q4_0, packing.scaled_to_bytes, packing.scaled_from_bytes, bits=4),
        _blocks("Q4_1", 4, legacy.encode_q4_1, packing.affine_to_bytes, packing.affine_from_bytes, bits=4),
        _blocks("Q5_0", 5, legacy.encode_q5_0, packing.scaled_to_bytes, packing.scaled_from_bytes, bits=5),
        _blocks("Q5_1", 5, legacy.encode_q5_1, packing.affine_to_bytes, packing.affine_from_bytes, bits=5),
        _blocks("Q8_0", 8, legacy.encode_q8_0, packing.q8_0_to_bytes, packing.q8_0_from_bytes),
        _blocks("IQ4_NL", 4, legacy.encode_iq4_nl, packing.iq4_nl_to_bytes, packing.iq4_nl_from_bytes),
        _blocks("Q2_K", 2, kquants.encode_q2_k, packing.q2_k_to_bytes, packing.q2_k_from_bytes),
        _blocks("Q3_K", 3, kquants.encode_q3_k, packing.q3_k_to_bytes, packing.q3_k_from_bytes),
        _blocks("Q4_K", 4, kquants.encode_q4_k, packing.q45_k_to_bytes, packing.q45_k_from_bytes, bits=4),
        _blocks("Q5_K", 5, kquants.encode_q5_k, packing.q45_k_to_bytes, packing.q45_k_from_bytes, bits=5),
        _blocks("Q6_K", 6, kquants.encode_q6_k, packing.q6_k_to_bytes, packing.q6_k_from_bytes),
        _blocks("IQ4_XS", 4, kquants.encode_iq4_xs, packing.iq4_xs_to_bytes, packing.iq4_xs_from_bytes),
        *(_group(name, *parts) for name, parts in integers.named().items()),
    )
}


def get_format(name: str) -> Format:
    """The format of that name; raises `ValueError` that lists the known ones."""
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats are {', '.join(_FORMATS)}.")
    return _FORMATS[name]


def format_for(level: float, n_in: int) -> Format | None:
    """The exportable format that `level` means for rows of `n_in` weights, or None where the level is masked."""
    for name in LEVEL_FORMATS.get(level, ()):
        if name is not None and n_in % get_format(name).block_size == 0:
            return get_format(name)
    return None


def format_up_to(level: float, n_in: int) -> Format | None:
    """The format of the highest level up to `level` that rows of `n_in` weights can take, or None."""
    formats = (format_for(other, n_in) for other in sorted(LEVELS, reverse=True) if other <= level)
    return next((fmt for fmt in formats if fmt is not None), None)

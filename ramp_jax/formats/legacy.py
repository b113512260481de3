"""ggml's blocks of 32 with one f16 scale: Q4_0, Q5_0 and Q8_0.

| format | bytes of one block of 32 weights | bits per weight |
|---|---|---|
| Q4_0 | f16 d, 16 bytes: weight j in the low nibble of byte j, weight j + 16 in the high one | 18 · 8 / 32 = 4.5 |
| Q5_0 | f16 d, u32 with the fifth bits, 16 bytes of nibbles as in Q4_0 | 22 · 8 / 32 = 5.5 |
| Q8_0 | f16 d, 32 signed bytes | 34 · 8 / 32 = 8.5 |

w = d · q with signed q. The 4- and 5-bit formats give their scale the sign that lets the largest weight take the most
negative code, of which there is one more than of positive ones. Encoders make the bytes of ggml's reference
(`quantize_row_*_ref`), decoders its dequantization. Everything but `to_bytes`/`from_bytes` is jittable and vmappable.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ramp_jax.formats.rounding import (
    blocks_of,
    divide,
    flatten_blocks,
    reciprocal,
    round_half_away,
    truncate_sum,
)

BLOCK = 32


class ScaledCodes(NamedTuple):
    """Codes of symmetric blocks: `d` f16 `[*rows, blocks]`, `q` int8 `[*rows, blocks, 32]`."""

    d: jax.Array
    q: jax.Array


def decode(codes: ScaledCodes) -> Float[Array, "*rows I"]:
    """Weights f32: d · q, block by block."""
    return flatten_blocks(codes.d.astype(jnp.float32)[..., None] * codes.q.astype(jnp.float32))


def encode_q4_0(w: Float[Array, "*rows I"]) -> ScaledCodes:
    """Codes in −8..7."""
    return _encode_signed_max(w, half=8)


def encode_q5_0(w: Float[Array, "*rows I"]) -> ScaledCodes:
    """Codes in −16..15."""
    return _encode_signed_max(w, half=16)


def encode_q8_0(w: Float[Array, "*rows I"]) -> ScaledCodes:
    """Codes in −127..127."""
    blocks = blocks_of(w, BLOCK)
    d = divide(jnp.max(jnp.abs(blocks), axis=-1), 127)
    return ScaledCodes(d.astype(jnp.float16), round_half_away(blocks * reciprocal(d)[..., None]).astype(jnp.int8))


def _encode_signed_max(w: Float[Array, "*rows I"], half: int) -> ScaledCodes:
    blocks = blocks_of(w, BLOCK)
    largest = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
    d = jnp.take_along_axis(blocks, largest, axis=-1) / -half
    unsigned = truncate_sum(blocks * reciprocal(d), half + 0.5)
    q = jnp.clip(unsigned, 0, 2 * half - 1) - half
    return ScaledCodes(d[..., 0].astype(jnp.float16), q.astype(jnp.int8))


def q4_0_to_bytes(codes: ScaledCodes) -> UInt8[np.ndarray, "*rows bytes"]:
    """Bytes as in a GGUF file."""
    return _join(_scale_bytes(codes.d), _pack_nibbles(_unsigned(codes.q, 8)))


def q4_0_from_bytes(raw: UInt8[np.ndarray, "*rows bytes"]) -> ScaledCodes:
    """Inverse of `q4_0_to_bytes`."""
    d, nibbles = _split(raw, 2, 16)
    return ScaledCodes(_scales(d), _signed(_unpack_nibbles(nibbles), 8))


def q5_0_to_bytes(codes: ScaledCodes) -> UInt8[np.ndarray, "*rows bytes"]:
    """Bytes as in a GGUF file."""
    q = _unsigned(codes.q, 16)
    fifth = np.packbits(q >> 4, axis=-1, bitorder="little")
    return _join(_scale_bytes(codes.d), fifth, _pack_nibbles(q & 15))


def q5_0_from_bytes(raw: UInt8[np.ndarray, "*rows bytes"]) -> ScaledCodes:
    """Inverse of `q5_0_to_bytes`."""
    d, fifth, nibbles = _split(raw, 2, 4, 16)
    high = np.unpackbits(fifth, axis=-1, bitorder="little")
    return ScaledCodes(_scales(d), _signed(_unpack_nibbles(nibbles) | (high << 4), 16))


def q8_0_to_bytes(codes: ScaledCodes) -> UInt8[np.ndarray, "*rows bytes"]:
    """Bytes as in a GGUF file."""
    return _join(_scale_bytes(codes.d), np.asarray(codes.q, np.int8).view(np.uint8))


def q8_0_from_bytes(raw: UInt8[np.ndarray, "*rows bytes"]) -> ScaledCodes:
    """Inverse of `q8_0_to_bytes`."""
    d, q = _split(raw, 2, 32)
    return ScaledCodes(_scales(d), np.ascontiguousarray(q).view(np.int8))


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    return q[..., :16] | (q[..., 16:] << 4)


def _unpack_nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _unsigned(q: jax.Array, half: int) -> np.ndarray:
    return (np.asarray(q, np.int16) + half).astype(np.uint8)


def _signed(q: np.ndarray, half: int) -> np.ndarray:
    return (q.astype(np.int16) - half).astype(np.int8)


def _scale_bytes(d: jax.Array) -> np.ndarray:
    return np.asarray(d, np.float16)[..., None].view(np.uint8)


def _scales(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _join(*parts: np.ndarray) -> np.ndarray:
    """Parts `[*rows, blocks, n_i]` → `[*rows, blocks · Σ n_i]`."""
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def _split(raw: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """`[*rows, blocks · Σ sizes]` → parts `[*rows, blocks, size]`."""
    blocks = np.asarray(raw, np.uint8).reshape(*raw.shape[:-1], -1, sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)

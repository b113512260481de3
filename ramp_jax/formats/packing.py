"""Codes to the bytes of a GGUF file and back, in NumPy on the host.

Codes are `[*rows, blocks, weights]`; bytes `[*rows, blocks · block_bytes]` uint8. Signed codes are stored with an
offset, bit planes little-endian. Superblock formats interleave their weights so that one 32-byte load of the nibbles
(or bit pairs) yields 32 weights that are neighbours.
"""

import numpy as np

from ramp_jax.formats.codes import AffineCodes, ExponentCodes, ScaledCodes, SuperAffineCodes, SuperScaledCodes
from ramp_jax.formats.search import FP4_VALUES, IQ4_VALUES


def scaled_to_bytes(codes: ScaledCodes, bits: int) -> np.ndarray:
    """Q4_0, Q5_0 (`bits` 4, 5): f16 d, fifth bits, nibbles."""
    return join(halves(codes.d), *_planes(_unsigned(codes.q, 1 << (bits - 1)), bits))


def scaled_from_bytes(raw: np.ndarray, bits: int) -> ScaledCodes:
    """Inverse of `scaled_to_bytes`."""
    d, *planes = split(raw, 2, *_plane_sizes(bits))
    return ScaledCodes(floats(d), _signed(_from_planes(planes), 1 << (bits - 1)))


def affine_to_bytes(codes: AffineCodes, bits: int) -> np.ndarray:
    """Q4_1, Q5_1: f16 d, f16 m, fifth bits, nibbles."""
    return join(halves(codes.d), halves(codes.m), *_planes(np.asarray(codes.q, np.uint8), bits))


def affine_from_bytes(raw: np.ndarray, bits: int) -> AffineCodes:
    """Inverse of `affine_to_bytes`."""
    d, m, *planes = split(raw, 2, 2, *_plane_sizes(bits))
    return AffineCodes(floats(d), floats(m), _from_planes(planes))


def q8_0_to_bytes(codes: ScaledCodes) -> np.ndarray:
    """f16 d, 32 signed bytes."""
    return join(halves(codes.d), np.asarray(codes.q, np.int8).view(np.uint8))


def q8_0_from_bytes(raw: np.ndarray) -> ScaledCodes:
    """Inverse of `q8_0_to_bytes`."""
    d, q = split(raw, 2, 32)
    return ScaledCodes(floats(d), np.ascontiguousarray(q).view(np.int8))


def iq4_nl_to_bytes(codes: ScaledCodes) -> np.ndarray:
    """f16 d, nibbles of value indices."""
    return join(halves(codes.d), _nibbles(_iq4_index(codes.q)))


def iq4_nl_from_bytes(raw: np.ndarray) -> ScaledCodes:
    """Inverse of `iq4_nl_to_bytes`."""
    d, nibbles = split(raw, 2, 16)
    return ScaledCodes(floats(d), IQ4_VALUES[_from_nibbles(nibbles)])


def mxfp4_to_bytes(codes: ExponentCodes) -> np.ndarray:
    """The exponent, nibbles of signs and value indices; of the two zeros that without a sign."""
    q = np.asarray(codes.q, np.int8)
    index = np.searchsorted(FP4_VALUES, np.abs(q)).astype(np.uint8)
    return join(np.asarray(codes.exponent, np.uint8)[..., None], _nibbles(index | (q < 0).astype(np.uint8) << 3))


def mxfp4_from_bytes(raw: np.ndarray) -> ExponentCodes:
    """Inverse of `mxfp4_to_bytes`."""
    exponent, nibbles = split(raw, 1, 16)
    index = _from_nibbles(nibbles)
    magnitude = FP4_VALUES[index & 7]
    return ExponentCodes(exponent[..., 0], np.where(index > 7, -magnitude, magnitude))


def q2_k_to_bytes(codes: SuperAffineCodes) -> np.ndarray:
    """16 bytes of sub-scale and sub-minimum nibbles, bit pairs, f16 d, f16 dmin."""
    scales = np.asarray(codes.scales, np.uint8) | (np.asarray(codes.mins, np.uint8) << 4)
    return join(scales, _pack(np.asarray(codes.q, np.uint8), 2), halves(codes.d), halves(codes.dmin))


def q2_k_from_bytes(raw: np.ndarray) -> SuperAffineCodes:
    """Inverse of `q2_k_to_bytes`."""
    scales, q, d, dmin = split(raw, 16, 64, 2, 2)
    return SuperAffineCodes(floats(d), floats(dmin), scales & 15, scales >> 4, _unpack(q, 2))


def q45_k_to_bytes(codes: SuperAffineCodes, bits: int) -> np.ndarray:
    """Q4_K, Q5_K: f16 d, f16 dmin, 12 bytes of 6-bit sub-scales and minima, fifth bits, nibbles."""
    s, m = np.asarray(codes.scales, np.uint8), np.asarray(codes.mins, np.uint8)
    low = [s[..., :4] | (s[..., 4:] >> 4 << 6), m[..., :4] | (m[..., 4:] >> 4 << 6)]
    scales = np.concatenate([*low, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4], axis=-1)
    q = np.asarray(codes.q, np.uint8)
    fifth = [_pack(q >> 4, 1)] if bits == 5 else []
    return join(halves(codes.d), halves(codes.dmin), scales, *fifth, _pack_pairs(q & 15))


def q45_k_from_bytes(raw: np.ndarray, bits: int) -> SuperAffineCodes:
    """Inverse of `q45_k_to_bytes`."""
    d, dmin, packed, *fifth, nibbles = split(raw, 2, 2, 12, *([32] if bits == 5 else []), 128)
    s, m, mixed = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([s & 63, (mixed & 15) | (s >> 6 << 4)], axis=-1)
    mins = np.concatenate([m & 63, (mixed >> 4) | (m >> 6 << 4)], axis=-1)
    q = _unpack_pairs(nibbles)
    if fifth:
        q = q | _unpack(fifth[0], 1) << 4
    return SuperAffineCodes(floats(d), floats(dmin), scales, mins, q)


def q3_k_to_bytes(codes: SuperScaledCodes) -> np.ndarray:
    """Third bits, bit pairs, 12 bytes of 6-bit sub-scales, f16 d."""
    q, s = _unsigned(codes.q, 4), _unsigned(codes.scales, 32)
    high = s >> 4
    top = high[..., :4] | high[..., 4:8] << 2 | high[..., 8:12] << 4 | high[..., 12:] << 6
    scales = np.concatenate([(s[..., :8] & 15) | (s[..., 8:] & 15) << 4, top], axis=-1)
    return join(_pack(q >> 2, 1), _pack(q & 3, 2), scales, halves(codes.d))


def q3_k_from_bytes(raw: np.ndarray) -> SuperScaledCodes:
    """Inverse of `q3_k_to_bytes`."""
    third, pairs, packed, d = split(raw, 32, 64, 12, 2)
    low, top = packed[..., :8], packed[..., 8:]
    high = np.concatenate([top >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    s = np.concatenate([low & 15, low >> 4], axis=-1) | high << 4
    return SuperScaledCodes(floats(d), _signed(s, 32), _signed(_unpack(pairs, 2) | _unpack(third, 1) << 2, 4))


def q6_k_to_bytes(codes: SuperScaledCodes) -> np.ndarray:
    """Low nibbles, high bit pairs, 16 signed sub-scales, f16 d."""
    q = _unsigned(codes.q, 32)
    four = (q & 15).reshape(*q.shape[:-1], 2, 2, 64)
    low = (four[..., 0, :] | four[..., 1, :] << 4).reshape(*q.shape[:-1], 128)
    return join(low, _pack(q >> 4, 2), np.asarray(codes.scales, np.int8).view(np.uint8), halves(codes.d))


def q6_k_from_bytes(raw: np.ndarray) -> SuperScaledCodes:
    """Inverse of `q6_k_to_bytes`."""
    low, high, scales, d = split(raw, 128, 64, 16, 2)
    two = low.reshape(*low.shape[:-1], 2, 64)
    q = np.stack([two & 15, two >> 4], axis=-2).reshape(*low.shape[:-1], 256)
    s = np.ascontiguousarray(scales).view(np.int8)
    return SuperScaledCodes(floats(d), s, _signed(q | _unpack(high, 2) << 4, 32))


def iq4_xs_to_bytes(codes: SuperScaledCodes) -> np.ndarray:
    """f16 d, u16 of the sub-scales' high bit pairs, their low nibbles, nibbles of value indices per 32 weights."""
    s = _unsigned(codes.scales, 32)
    high = np.sum((s >> 4).astype(np.uint16) << (2 * np.arange(8, dtype=np.uint16)), axis=-1, dtype=np.uint16)
    low = (s[..., 0::2] & 15) | (s[..., 1::2] & 15) << 4
    index = _iq4_index(codes.q)
    nibbles = _nibbles(index.reshape(*index.shape[:-1], 8, 32)).reshape(*index.shape[:-1], 128)
    return join(halves(codes.d), high[..., None].view(np.uint8), low, nibbles)


def iq4_xs_from_bytes(raw: np.ndarray) -> SuperScaledCodes:
    """Inverse of `iq4_xs_to_bytes`."""
    d, high, low, nibbles = split(raw, 2, 2, 4, 128)
    pairs = np.ascontiguousarray(high).view(np.uint16) >> (2 * np.arange(8, dtype=np.uint16)) & 3
    s = np.stack([low & 15, low >> 4], axis=-1).reshape(*low.shape[:-1], 8) | pairs.astype(np.uint8) << 4
    index = _from_nibbles(nibbles.reshape(*nibbles.shape[:-1], 8, 16)).reshape(*nibbles.shape[:-1], 256)
    return SuperScaledCodes(floats(d), _signed(s, 32), IQ4_VALUES[index])


def _pack(q: np.ndarray, bits: int) -> np.ndarray:
    """256 codes of 1 or 2 bits: byte j of each run of 32 holds the weights j, j + 32, j + 64, …"""
    per_byte = 8 // bits
    rows = q.reshape(*q.shape[:-1], -1, per_byte, 32)
    shifts = (bits * np.arange(per_byte, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(rows << shifts, axis=-2).reshape(*q.shape[:-1], -1)


def _unpack(raw: np.ndarray, bits: int) -> np.ndarray:
    rows = raw.reshape(*raw.shape[:-1], -1, 1, 32)
    shifts = (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    return (rows >> shifts & ((1 << bits) - 1)).reshape(*raw.shape[:-1], 256)


def _pack_pairs(q: np.ndarray) -> np.ndarray:
    """256 nibbles: byte j of each run of 32 holds the weights j and j + 32."""
    rows = q.reshape(*q.shape[:-1], 4, 2, 32)
    return (rows[..., 0, :] | rows[..., 1, :] << 4).reshape(*q.shape[:-1], 128)


def _unpack_pairs(raw: np.ndarray) -> np.ndarray:
    rows = raw.reshape(*raw.shape[:-1], 4, 1, 32)
    return np.concatenate([rows & 15, rows >> 4], axis=-2).reshape(*raw.shape[:-1], 256)


def _planes(q: np.ndarray, bits: int) -> list[np.ndarray]:
    """Fifth bits (only for 5-bit codes) and nibbles of 32 codes."""
    fifth = [np.packbits(q >> 4, axis=-1, bitorder="little")] if bits == 5 else []
    return [*fifth, _nibbles(q & 15)]


def _plane_sizes(bits: int) -> list[int]:
    return [4, 16] if bits == 5 else [16]


def _from_planes(planes: list[np.ndarray]) -> np.ndarray:
    *fifth, nibbles = planes
    q = _from_nibbles(nibbles)
    return q | np.unpackbits(fifth[0], axis=-1, bitorder="little") << 4 if fifth else q


def _nibbles(q: np.ndarray) -> np.ndarray:
    """32 codes: byte j holds the weights j and j + 16."""
    return q[..., :16] | (q[..., 16:] << 4)


def _from_nibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _iq4_index(q: np.ndarray) -> np.ndarray:
    return np.searchsorted(IQ4_VALUES, np.asarray(q, np.int8)).astype(np.uint8)


def _unsigned(q: np.ndarray, offset: int) -> np.ndarray:
    return (np.asarray(q, np.int16) + offset).astype(np.uint8)


def _signed(q: np.ndarray, offset: int) -> np.ndarray:
    return (q.astype(np.int16) - offset).astype(np.int8)


def halves(d: np.ndarray) -> np.ndarray:
    """Bytes of f16 scales, as a part of each block."""
    return np.asarray(d, np.float16)[..., None].view(np.uint8)


def floats(raw: np.ndarray) -> np.ndarray:
    """Undo `halves`."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def join(*parts: np.ndarray) -> np.ndarray:
    """Parts `[*rows, blocks, n_i]` → `[*rows, blocks · Σ n_i]`."""
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def split(raw: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """`[*rows, blocks · Σ sizes]` → parts `[*rows, blocks, size]`."""
    blocks = np.asarray(raw, np.uint8).reshape(*raw.shape[:-1], -1, sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)

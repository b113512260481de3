"""Codes of the lattice formats to the bytes of a GGUF file and back, in NumPy on the host.

Three things are stored: which point every `dim` weights are, their signs, eight to a byte of which formats with even
signs keep seven bits (of IQ1 whether weights are shifted down instead), and sub-scales. The formats differ in where.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ramp_jax.formats.codes import SuperScaledCodes
from ramp_jax.formats.lattice import SHIFTED, SIGNED, Lattice
from ramp_jax.formats.packing import floats, halves, join, split


def packers(lattice: Lattice) -> tuple[Callable[[SuperScaledCodes], np.ndarray], Callable[[np.ndarray], Any]]:
    """To bytes, and from bytes."""
    if lattice.shared:
        to_bytes, from_bytes = _SHIFTED[lattice.name]
        return functools.partial(to_bytes, lattice=lattice), functools.partial(from_bytes, lattice=lattice)
    pack, unpack, sizes = _LAYOUTS[lattice.name]
    return (
        functools.partial(_to_bytes, lattice=lattice, pack=pack),
        functools.partial(_from_bytes, lattice=lattice, unpack=unpack, sizes=sizes),
    )


def _to_bytes(codes: SuperScaledCodes, lattice: Lattice, pack: Callable[..., tuple[np.ndarray, ...]]) -> np.ndarray:
    q = np.asarray(codes.q, np.int8)
    point = lattice.point_of(np.abs(q).reshape(*q.shape[:-1], -1, lattice.dim))
    negative = np.packbits(q < 0, axis=-1, bitorder="little")
    signs = negative & 127 if lattice.even else negative
    scales = ((np.asarray(codes.scales, np.float32) / lattice.unit - 1) / 2).astype(np.uint8)
    return join(halves(codes.d), *pack(point, signs, scales))


def _from_bytes(
    raw: np.ndarray, lattice: Lattice, unpack: Callable[..., tuple[np.ndarray, ...]], sizes: tuple[int, ...]
) -> SuperScaledCodes:
    d, *parts = split(raw, 2, *sizes)
    point, signs, scales = unpack(*parts)
    if lattice.even:
        odd = np.bitwise_count(signs) & 1
        signs = signs | odd << 7
    negative = np.unpackbits(np.ascontiguousarray(signs), axis=-1, bitorder="little").astype(bool)
    magnitude = lattice.points[point].astype(np.int8).reshape(negative.shape)
    units = (lattice.unit * (2 * scales.astype(np.float32) + 1)).astype(np.float16)
    return SuperScaledCodes(floats(d), units, np.where(negative, -magnitude, magnitude))


def _iq1_s_to_bytes(codes: SuperScaledCodes, lattice: Lattice) -> np.ndarray:
    """d, low bytes of points, per sub-block 16 bits of four times three high ones, a scale and whether it goes down."""
    point, down, scales = _with_shifts(codes, lattice)
    words = _spread(point >> 8, 3, 4) | scales.astype(np.uint16) << 12 | down.astype(np.uint16) << 15
    return join(halves(codes.d), (point & 255).astype(np.uint8), words.view(np.uint8))


def _iq1_s_from_bytes(raw: np.ndarray, lattice: Lattice) -> SuperScaledCodes:
    d, low, high = split(raw, 2, 32, 16)
    words = np.ascontiguousarray(high).view(np.uint16)
    point = low | _gathered_again(words, 3, 4) << 8
    return _shifted_codes(floats(d), point, words >> 15, words >> 12 & 7, lattice)


def _iq1_m_to_bytes(codes: SuperScaledCodes, lattice: Lattice) -> np.ndarray:
    """Low bytes of points, nibbles of high bits and whether they go down, per four scales 16 bits with four of d."""
    point, down, scales = _with_shifts(codes, lattice)
    nibbles = _nibbles((point >> 8 | down << 3).astype(np.uint8))
    d = np.asarray(codes.d, np.float16).view(np.uint16)[..., None] >> _FOURS & 15
    return join((point & 255).astype(np.uint8), nibbles, (_spread(scales, 3, 4) | d << 12).view(np.uint8))


def _iq1_m_from_bytes(raw: np.ndarray, lattice: Lattice) -> SuperScaledCodes:
    low, nibbles, last = split(raw, 32, 16, 8)
    words, high = np.ascontiguousarray(last).view(np.uint16), _from_nibbles(nibbles)
    d = np.bitwise_or.reduce(words >> 12 << _FOURS, axis=-1).view(np.float16)
    point = low | (high & 7).astype(np.uint16) << 8
    return _shifted_codes(d, point, high >> 3, _gathered_again(words, 3, 4), lattice)


def _with_shifts(codes: SuperScaledCodes, lattice: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, 1 for each shift that goes down, and sub-scales."""
    q = np.asarray(codes.q, np.int8).astype(np.int16)
    down = (q & 7) == 7
    point = lattice.point_of((q + np.where(down, 1, -1)).reshape(*q.shape[:-1], -1, lattice.dim) // SHIFTED)
    scales = ((np.asarray(codes.scales, np.float32) / lattice.unit - 1) / 2).astype(np.uint16)
    return point, down[..., :: lattice.shared].astype(np.uint16), scales


def _shifted_codes(
    d: np.ndarray, point: np.ndarray, down: np.ndarray, scales: np.ndarray, lattice: Lattice
) -> SuperScaledCodes:
    shift = np.repeat(1 - 2 * down.astype(np.int8), lattice.shared, axis=-1)
    q = SHIFTED * lattice.points[point].astype(np.int8).reshape(shift.shape) + shift
    return SuperScaledCodes(d, (lattice.unit * (2 * scales.astype(np.float32) + 1)).astype(np.float16), q)


def _pack_iq2_xxs(point: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per sub-block 4 points, then their signs and the scale in one word."""
    both = [point.astype(np.uint8).reshape(*point.shape[:-1], SIGNED, 4), _words(signs, scales)]
    return (np.concatenate(both, axis=-1).reshape(*point.shape[:-1], 64),)


def _unpack_iq2_xxs(both: np.ndarray) -> tuple[np.ndarray, ...]:
    pairs = both.reshape(*both.shape[:-1], 8, 8)
    return pairs[..., :4].reshape(*both.shape[:-1], 32), *_from_words(pairs[..., 4:])


def _pack_iq2_xs(point: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """A 9-bit point and 7 signs in 16 bits, nibbles of scales."""
    pairs = point.astype(np.uint16) | signs.astype(np.uint16) << 9
    return pairs.view(np.uint8), _nibbles(scales)


def _unpack_iq2_xs(pairs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    words = np.ascontiguousarray(pairs).view(np.uint16)
    return words & 511, (words >> 9).astype(np.uint8), _from_nibbles(scales)


def _pack_iq2_s(point: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Low bytes of points, signs, pairs of high bits, nibbles of scales."""
    return (point & 255).astype(np.uint8), signs, _gathered(point >> 8, 2), _nibbles(scales)


def _unpack_iq2_s(low: np.ndarray, signs: np.ndarray, high: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    return low | _scattered(high, 2).astype(np.uint16) << 8, signs, _from_nibbles(scales)


def _pack_iq3_xxs(point: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Points, then a word of signs and scale per sub-block."""
    return point.astype(np.uint8), _words(signs, scales).reshape(*point.shape[:-1], 32)


def _unpack_iq3_xxs(point: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, ...]:
    return point, *_from_words(words.reshape(*words.shape[:-1], 8, 4))


def _pack_iq3_s(point: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """Low bytes of points, high bits, signs, nibbles of scales."""
    return (point & 255).astype(np.uint8), _gathered(point >> 8, 1), signs, _nibbles(scales)


def _unpack_iq3_s(low: np.ndarray, high: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    return low | _scattered(high, 1).astype(np.uint16) << 8, signs, _from_nibbles(scales)


_LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "IQ2_XXS": (_pack_iq2_xxs, _unpack_iq2_xxs, (64,)),
    "IQ2_XS": (_pack_iq2_xs, _unpack_iq2_xs, (64, 8)),
    "IQ2_S": (_pack_iq2_s, _unpack_iq2_s, (32, 32, 8, 8)),
    "IQ3_XXS": (_pack_iq3_xxs, _unpack_iq3_xxs, (64, 32)),
    "IQ3_S": (_pack_iq3_s, _unpack_iq3_s, (64, 8, 32, 4)),
}
"""How points, signs and scales become parts behind d, how parts become these, and the parts' bytes."""

_SHIFTED = {
    "IQ1_S": (_iq1_s_to_bytes, _iq1_s_from_bytes),
    "IQ1_M": (_iq1_m_to_bytes, _iq1_m_from_bytes),
}
"""Formats whose parts have bits of each other."""

_FOURS = 4 * np.arange(4, dtype=np.uint16)

_SHIFTS = 7 * np.arange(4, dtype=np.uint32)


def _words(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes `[…, 8, 4]` of little-endian words: four times seven signs, then a scale."""
    sevens = signs.astype(np.uint32).reshape(*signs.shape[:-1], 8, 4) << _SHIFTS
    words = np.bitwise_or.reduce(sevens, axis=-1) | scales.astype(np.uint32) << 28
    return words.astype("<u4")[..., None].view(np.uint8)


def _from_words(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(raw).view("<u4")  # [..., 8, 1]
    signs = (words >> _SHIFTS & 127).astype(np.uint8)
    return signs.reshape(*signs.shape[:-2], 32), (words[..., 0] >> 28).astype(np.uint8)


def _nibbles(scales: np.ndarray) -> np.ndarray:
    """Two neighbours per byte."""
    return scales[..., 0::2] | scales[..., 1::2] << 4


def _from_nibbles(raw: np.ndarray) -> np.ndarray:
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _spread(q: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` neighbours in one word, from its lowest bits on."""
    rows = q.astype(np.uint16).reshape(*q.shape[:-1], -1, count)
    return np.bitwise_or.reduce(rows << bits * np.arange(count, dtype=np.uint16), axis=-1)


def _gathered_again(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    shifts = bits * np.arange(count, dtype=np.uint16)
    return (words[..., None] >> shifts & ((1 << bits) - 1)).reshape(*words.shape[:-1], -1)


def _gathered(q: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of a few bits, neighbours in one byte."""
    rows = q.astype(np.uint8).reshape(*q.shape[:-1], -1, 8 // bits)
    return np.bitwise_or.reduce(rows << bits * np.arange(8 // bits, dtype=np.uint8), axis=-1)


def _scattered(raw: np.ndarray, bits: int) -> np.ndarray:
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    return (raw[..., None] >> shifts & ((1 << bits) - 1)).reshape(*raw.shape[:-1], -1)

"""ggml's formats whose codes are points of a lattice: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

| format | sub-blocks | magnitudes | signs | bytes of one superblock | bits per weight |
|---|---|---|---|---|---|
| IQ2_XXS | 8 × 32 | 256 points of 8 weights | even | f16 d, per sub-block 4 points, 4 × 7 signs, 4-bit scale | 2.0625 |
| IQ2_XS | 16 × 16 | 512 points of 8 | even | f16 d, 32 × (9-bit point, 7 signs), 8 of 4-bit scales | 2.3125 |
| IQ2_S | 16 × 16 | 1,024 points of 8 | free | f16 d, 32 low bytes, 32 of signs, 8 of high bits, 8 of scales | 2.5625 |
| IQ3_XXS | 8 × 32 | 256 points of 4 | even | f16 d, 64 points, per sub-block 4 × 7 signs, 4-bit scale | 3.0625 |
| IQ3_S | 8 × 32 | 512 points of 4 | free | f16 d, 64 low bytes, 8 of high bits, 32 of signs, 4 of scales | 3.4375 |

A weight is d · scale · q: q a magnitude with its sign, scale an odd multiple of the format's unit. Which magnitudes go
together is a table, gguf's; even signs mean that among 8 weights an even number is negative, so that 7 bits say it.

The formats of one bit and a half hold other things and are not here.
"""

import dataclasses
import functools

import numpy as np
from gguf import quants
from jaxtyping import Int

SIGNED = 8
"""Weights whose signs are stored together."""


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The points of a format, and how ggml looks for them.

    `name` is the format's; `sub` are the weights of a sub-block; scales are odd multiples of `unit`. ggml weighs errors
    by importance · √(`spread` · mean square + x²), tries inverse scales (top + `step` · i) / largest for |i| ≤ `tries`,
    looks among the points of the `shells` smallest distances, and stretches d by `fudge`. Sub-blocks below `least` are
    zero. `fitted` ones are searched around a first fit of the scale; `again` looks for all points once more at the end,
    not only for those that rounding missed. Without importance, where it does not need any, ggml weighs by `floor` ·
    mean square + x².
    """

    name: str
    sub: int
    unit: float
    even: bool
    spread: int
    step: float
    tries: int
    shells: int
    fudge: float
    least: float
    fitted: bool = False
    again: bool = False
    needs_importance: bool = False
    floor: float = 0.0

    @property
    def points(self) -> Int[np.ndarray, "G D"]:
        """Magnitudes of the weights of each point."""
        return _points(self.name)

    @property
    def dim(self) -> int:
        """Weights of a point."""
        return self.points.shape[1]

    @property
    def values(self) -> np.ndarray:
        """The magnitudes f32, increasing."""
        return np.unique(self.points).astype(np.float32)

    @property
    def levels(self) -> Int[np.ndarray, "G D"]:
        """The points as indices of `values`."""
        return np.searchsorted(self.values, self.points)

    @property
    def bits(self) -> int:
        """Of an index of `values`."""
        return (len(self.values) - 1).bit_length()

    def point_of(self, magnitudes: Int[np.ndarray, "*n D"]) -> Int[np.ndarray, "*n"]:
        """Which point has these magnitudes."""
        levels = np.searchsorted(self.values, magnitudes)
        return _places(self)[levels @ len(self.values) ** np.arange(self.dim)]


@functools.cache
def _points(name: str) -> Int[np.ndarray, "G D"]:
    known = getattr(quants, name)
    known.init_grid()
    return np.asarray(known.grid, np.int64).reshape(-1, known.grid_shape[-1])


@functools.cache
def _places(lattice: Lattice) -> Int[np.ndarray, " U"]:
    count = len(lattice.values)
    places = np.zeros(count**lattice.dim, np.uint16)
    places[lattice.levels @ count ** np.arange(lattice.dim)] = np.arange(len(lattice.points))
    return places


@functools.cache
def listed(lattice: Lattice) -> Int[np.ndarray, "K U"]:
    """The points that ggml compares where weights round to the indices u, U = Σ u_i · values^i: packed indices, `bits`
    each, of the points of the `shells` smallest distances; u itself where it is a point.

    In ggml's order, less those that cannot win: a point that has another one between itself and u in every coordinate
    is further from whatever rounds to u, under any weights. The first fills up the columns.
    """
    levels, count, dim = lattice.levels, len(lattice.values), lattice.dim
    corners = np.arange(count**dim)[:, None] // count ** np.arange(dim) % count
    apart = (corners**2).sum(1)[:, None] + (levels**2).sum(1) - 2 * corners @ levels.T
    packed = (levels << lattice.bits * np.arange(dim)).sum(1)
    lists = [packed[_unbeaten(u, levels, distance, lattice.shells)] for u, distance in zip(corners, apart, strict=True)]
    longest = max(map(len, lists))
    filled = [np.concatenate([found, np.repeat(found[:1], longest - len(found))]) for found in lists]
    return np.asarray(filled, np.uint16).T.copy()


def _unbeaten(u: np.ndarray, levels: np.ndarray, distance: np.ndarray, shells: int) -> np.ndarray:
    if not distance.min():
        return np.flatnonzero(distance == 0)
    radius = np.unique(distance)[:shells][-1]
    index = np.flatnonzero(distance <= radius)
    index = index[np.argsort(distance[index], kind="stable")]
    near = levels[index]
    low, high = np.minimum(near, u)[:, None], np.maximum(near, u)[:, None]
    between = ((near >= low) & (near <= high)).all(-1)  # [a, b]: b between u and a, as a itself is
    return index[between.sum(1) == 1]


LATTICES = {
    lattice.name: lattice
    for lattice in (
        Lattice("IQ2_XXS", 32, 0.125, True, 1, 0.1, 6, 2, 1.0, 1e-15, fitted=True, needs_importance=True),
        Lattice("IQ2_XS", 16, 0.125, True, 1, 0.1, 9, 2, 1.0, 1e-15, needs_importance=True),
        Lattice("IQ2_S", 16, 0.125, False, 2, 0.1, 9, 1, 0.9875, 1e-8, floor=0.5),
        Lattice("IQ3_XXS", 32, 0.25, True, 2, 0.2, 15, 2, 1.0125, 1e-8),
        Lattice("IQ3_S", 32, 1.0, False, 2, 0.2, 9, 3, 1.033, 0.0, again=True),
    )
}

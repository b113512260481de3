"""ggml's formats whose codes are points of a lattice: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

| format | sub-blocks | points | signs | bytes of one superblock | bits per weight |
|---|---|---|---|---|---|
| IQ1_S | 8 × 32 | 2,048 of 8 weights | | f16 d, 32 low bytes, 8 × (4 × 3 high bits, 3-bit scale, shift) | 1.5625 |
| IQ1_M | 16 × 16 | 2,048 of 8 | | 32 low bytes, 32 × (3 high bits, shift), 4 × (4 of 3-bit scales, ¼ of d) | 1.75 |
| IQ2_XXS | 8 × 32 | 256 of 8 | even | f16 d, per sub-block 4 points, 4 × 7 signs, 4-bit scale | 2.0625 |
| IQ2_XS | 16 × 16 | 512 of 8 | even | f16 d, 32 × (9-bit point, 7 signs), 8 of 4-bit scales | 2.3125 |
| IQ2_S | 16 × 16 | 1,024 of 8 | free | f16 d, 32 low bytes, 32 of signs, 8 of high bits, 8 of scales | 2.5625 |
| IQ3_XXS | 8 × 32 | 256 of 4 | even | f16 d, 64 points, per sub-block 4 × 7 signs, 4-bit scale | 3.0625 |
| IQ3_S | 8 × 32 | 512 of 4 | free | f16 d, 64 low bytes, 8 of high bits, 32 of signs, 4 of scales | 3.4375 |

A weight is d · scale · q, scale an odd multiple of the format's unit. Of IQ2 and IQ3, q is a magnitude with its sign;
which magnitudes go together is a table, gguf's; even signs mean that among 8 weights an even number is negative, so
that 7 bits say it. Points of IQ1 are of −1, 0 and 1, and all weights that share a shift are moved by an eighth of that,
up or down: q is 8 · point ± 1.
"""

import dataclasses
import functools

import numpy as np
from gguf import quants
from jaxtyping import Int

SIGNED = 8
"""Weights whose signs are stored together."""

SHIFTED = 8
"""Shifts between −1, 0 and 1."""


@dataclasses.dataclass(frozen=True)
class Lattice:
    """The points of a format, and how ggml looks for them.

    `name` is the format's; `sub` are the weights of a sub-block; scales are odd multiples of `unit`, up to `top` of
    them; `shared` are the weights that are shifted together, 0 where points have signs instead. ggml weighs errors
    by importance · √(`spread` · mean square + x²), tries inverse scales (top + `step` · i) / largest for |i| ≤ `tries`
    (for points with a shift all ways to split a sub-block in three), looks among the points of the `shells` smallest
    distances, and stretches d by `fudge`. Sub-blocks below `least` are zero. `fitted` ones are searched around a first
    fit of the scale, of points with a shift d is fitted at last; `again` looks for all points once more at the end, not
    only for those that rounding missed. Without importance, where it does not need any, ggml weighs by `floor` · mean
    square + x².
    """

    name: str
    sub: int
    unit: float
    even: bool
    spread: int
    shells: int
    fudge: float
    least: float
    step: float = 0.0
    tries: int = 0
    top: int = 31
    shared: int = 0
    fitted: bool = False
    again: bool = False
    needs_importance: bool = False
    floor: float = 0.0

    @property
    def together(self) -> int:
        """Weights whose codes depend on each other."""
        return self.shared or SIGNED

    @property
    def points(self) -> Int[np.ndarray, "G D"]:
        """Magnitudes of the weights of each point, with a shift −1, 0 or 1."""
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
    def largest(self) -> float:
        """The largest code."""
        return float(SHIFTED * self.values[-1] + 1 if self.shared else self.values[-1])

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
    is further from whatever rounds to u, under any weights. Where sub-blocks are split without regard to their shifts,
    weights may be nearer to the next index than to that in u, not further off. The first fills up the columns.
    """
    levels, count, dim = lattice.levels, len(lattice.values), lattice.dim
    corners = np.arange(count**dim)[:, None] // count ** np.arange(dim) % count
    apart = (corners**2).sum(1)[:, None] + (levels**2).sum(1) - 2 * corners @ levels.T
    packed = (levels << lattice.bits * np.arange(dim)).sum(1)
    steps, near = _thermometer(corners, count), _thermometer(levels, count)
    lists = [packed[_unbeaten(near ^ u, lattice, distance)] for u, distance in zip(steps, apart, strict=True)]
    longest = max(map(len, lists))
    filled = [np.concatenate([found, np.repeat(found[:1], longest - len(found))]) for found in lists]
    return np.asarray(filled, np.uint16).T.copy()


def _thermometer(levels: np.ndarray, count: int) -> np.ndarray:
    """A bit for every step up to an index, `count` − 1 per weight: those of an index between two lie between theirs."""
    bits = levels[:, :, None] >= np.arange(1, count)
    return (bits.reshape(len(levels), -1).astype(np.int64) << np.arange(bits[0].size)).sum(1)


def _unbeaten(steps: Int[np.ndarray, " G"], lattice: Lattice, distance: Int[np.ndarray, " G"]) -> np.ndarray:
    """Which points stay of those near by, from the steps of each point to u and its squared distance."""
    if not distance.min():
        return np.flatnonzero(distance == 0)
    radius = np.unique(distance)[: lattice.shells][-1]
    index = np.flatnonzero(distance <= radius)
    index = index[np.argsort(distance[index], kind="stable")]
    steps = steps[index]
    between = (steps & ~steps[:, None]) == 0  # [a, b]: b between u and a, as a itself is
    if 0 < lattice.shared < lattice.sub:  # just where a weight of a is two steps off
        single = (steps ^ steps >> 1) & sum(1 << 2 * i for i in range(lattice.dim))
        between &= (steps[:, None] & (single | single << 1)[:, None] & ~steps) == 0
    return index[between.sum(1) == 1]


_iq1 = functools.partial(Lattice, unit=1 / SHIFTED, even=False, spread=2, shells=3, top=15, needs_importance=True)

LATTICES = {
    lattice.name: lattice
    for lattice in (
        _iq1("IQ1_S", 32, shared=32, fudge=1.125, least=1e-12),
        _iq1("IQ1_M", 16, shared=8, fudge=1.1125, least=1e-7, fitted=True),
        Lattice("IQ2_XXS", 32, 0.125, True, 1, 2, 1.0, 1e-15, 0.1, 6, fitted=True, needs_importance=True),
        Lattice("IQ2_XS", 16, 0.125, True, 1, 2, 1.0, 1e-15, 0.1, 9, needs_importance=True),
        Lattice("IQ2_S", 16, 0.125, False, 2, 1, 0.9875, 1e-8, 0.1, 9, floor=0.5),
        Lattice("IQ3_XXS", 32, 0.25, True, 2, 2, 1.0125, 1e-8, 0.2, 15),
        Lattice("IQ3_S", 32, 1.0, False, 2, 3, 1.033, 0.0, 0.2, 9, again=True),
    )
}

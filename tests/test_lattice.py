"""Points of the lattice formats: which are compared, and the nearest of all, beside brute force."""

import numpy as np
import pytest

from ramp_jax.formats import lattice_search, ternary_search
from ramp_jax.formats.lattice import LATTICES, SHIFTED, SIGNED, listed

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.parametrize("name", LATTICES)
def test_points_are_known_by_their_magnitudes(name):
    lattice = LATTICES[name]
    assert lattice.points.shape == (lattice.points.shape[0], lattice.dim)
    np.testing.assert_array_equal(lattice.point_of(lattice.points), np.arange(len(lattice.points)))
    np.testing.assert_array_equal(lattice.values[lattice.levels], lattice.points)


@pytest.mark.parametrize("name", LATTICES)
def test_what_is_not_listed_cannot_win(name):
    """For weights that round to a corner, and any error weights, the best of ggml's whole list is in the short one."""
    lattice, rng = LATTICES[name], np.random.default_rng(0)
    count, dim, table = len(lattice.values), lattice.dim, listed(lattice)
    packed = (lattice.levels << lattice.bits * np.arange(dim)).sum(1)
    for corner in rng.integers(0, count**dim, 300):
        u = corner // count ** np.arange(dim) % count
        distance = np.square(lattice.levels - u).sum(1)
        nearby = np.flatnonzero(distance <= np.unique(distance)[: lattice.shells][-1])
        # a step is 2 wide around 2 u + 1; the ends reach further, and all where neighbours have other shifts
        reach = 1.25 if 0 < lattice.shared < lattice.sub else 1
        value = 2 * u + 1 + rng.uniform(-reach, reach, dim) + np.where(u == count - 1, rng.exponential(2, dim), 0)
        value -= np.where(u == 0, rng.exponential(2, dim), 0)
        weight = rng.exponential(size=dim) ** 3
        errors = (weight * np.square(2 * lattice.levels + 1 - value)).sum(1)
        if distance.min():
            assert packed[nearby[np.argmin(errors[nearby])]] in table[:, corner]
        else:
            assert set(table[:, corner]) == {packed[np.argmin(distance)]}


def brute_force(v, weight, lattice):
    """The least weighted distance of eight codes with all signs that are allowed."""
    halves = []
    for part in (slice(start, start + lattice.dim) for start in range(0, SIGNED, lattice.dim)):
        signs = 1 - 2 * (np.arange(2**lattice.dim)[:, None] >> np.arange(lattice.dim) & 1)
        off = np.square(signs[:, None] * lattice.points - v[part])
        errors = (weight[part] * off).sum(-1).min(1)  # of every pattern of signs
        odd = (signs < 0).sum(1) % 2
        halves.append([errors.min()] * 2 if not lattice.even else [errors[odd == p].min() for p in (0, 1)])
    if not lattice.even:
        return sum(both[0] for both in halves)
    if len(halves) == 1:
        return halves[0][0]
    return min(halves[0][p] + halves[1][p] for p in (0, 1))


@pytest.mark.parametrize("name", [name for name, lattice in LATTICES.items() if not lattice.shared])
def test_nearest_of_all_points_and_signs(name):
    lattice, rng = LATTICES[name], np.random.default_rng(1)
    v = (rng.standard_normal((SIGNED, 5, 12)) * lattice.values[-1] / 2).astype(np.float32)
    weight = rng.exponential(size=v.shape).astype(np.float32) ** 2
    found = np.asarray(lattice_search.nearest(v, weight, lattice))
    lattice.point_of(np.abs(np.moveaxis(found, 0, -1)).astype(np.int64).reshape(5, 12, -1, lattice.dim))
    if lattice.even:
        assert not ((found < 0).sum(0) % 2).any()
    for at in np.ndindex(5, 12):
        mine = (weight[:, *at] * np.square(found[:, *at] - v[:, *at])).sum()
        assert mine == pytest.approx(brute_force(v[:, *at], weight[:, *at], lattice), rel=1e-5)


@pytest.mark.parametrize("name", [name for name, lattice in LATTICES.items() if lattice.shared])
def test_nearest_of_all_points_and_shifts(name):
    lattice, rng = LATTICES[name], np.random.default_rng(2)
    v = (rng.standard_normal((lattice.shared, 30)) * SHIFTED).astype(np.float32)
    weight = rng.exponential(size=v.shape).astype(np.float32) ** 2
    found = np.asarray(ternary_search.nearest(v, weight, lattice))
    least = []
    for shift in (-1, 1):
        off = np.square(SHIFTED * lattice.points + shift - v.T.reshape(30, -1, 1, lattice.dim))
        least.append((weight.T.reshape(30, -1, 1, lattice.dim) * off).sum(-1).min(-1).sum(-1))
    assert ((found - found[:1]) % SHIFTED).max() == 0
    np.testing.assert_allclose((weight * np.square(found - v)).sum(0), np.minimum(*least), rtol=3e-4)

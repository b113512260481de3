"""What loss is normal at which size, and the least that is still possible with what is left, for one table of losses.

Relaxing the budget to a price λ per unit lets every tensor choose alone: min_a s[i, a] + λ c[i, a]. Over a grid of
prices that gives size and loss of every such solution, from each step to the end. Between two of them lies a mixture
of both, so the curve through them is, within the spacing of the grid, the lower bound of Lagrangian relaxation on what
the remaining steps lose with so many units, and next to exact where these steps are many.

T tensors, A levels, P prices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

_PRICES = 128
_LARGE = 1e30


class LagrangianBound(NamedTuple):
    """Curves over sizes, in units, ascending."""

    uniform_units: Float[Array, " A"]
    uniform_loss: Float[Array, " A"]
    units: Float[Array, "P T+1"]
    """What the solution at each price, from the highest down, takes from each step on; 0 at the end."""
    loss: Float[Array, "P T+1"]
    """What it loses."""


def lagrangian_bound(loss: Float[Array, "T A"], cost: Int[Array, "T A"]) -> LagrangianBound:
    """Size and loss of the uniform allocations (a masked level is replaced by the nearest one above, else below), and
    the sizes of the relaxed solutions."""
    every = jax.vmap(select, (None, 0))
    valid = cost > 0
    size = cost.astype(jnp.float32)
    level = jnp.arange(loss.shape[1])
    distance = jnp.where(level[None, :] >= level[:, None], level[None, :] - level[:, None], 2 * loss.shape[1])
    distance = jnp.where(level[None, :] < level[:, None], loss.shape[1] + level[:, None] - level[None, :], distance)
    nearest = jnp.argmin(jnp.where(valid[None], distance[:, None, :], 4 * loss.shape[1]), axis=-1)  # [A, T]
    uniform_units, uniform_loss = (jnp.sum(every(table, nearest), axis=1) for table in (size, loss))
    order = jnp.argsort(uniform_units)

    prices = _price_grid(loss, size, valid)
    lagrangian = jnp.where(valid, loss, _LARGE)[None] + prices[:, None, None] * size[None]
    chosen = jnp.argmin(lagrangian, axis=-1)  # [P, T]
    units, onward = (from_here_on(every(table, chosen)) for table in (size, loss))
    return LagrangianBound(uniform_units[order], uniform_loss[order], units, onward)


def uniform_loss(bound: LagrangianBound, budget: Int[Array, ""]) -> Float[Array, ""]:
    """The loss of a uniform allocation of that size, log-linear between the levels."""
    logs = jnp.log(jnp.maximum(bound.uniform_loss, 1e-12))
    return jnp.exp(jnp.interp(budget.astype(jnp.float32), bound.uniform_units, logs))


def least_loss(bound: LagrangianBound, left: Int[Array, "*n"], step: Int[Array, ""]) -> Float[Array, "*n"]:
    """The bound on what the steps from `step` on lose with `left` units."""
    return jnp.interp(left.astype(jnp.float32), bound.units[:, step], bound.loss[:, step])


def unit_of_loss(bound: LagrangianBound, budget: Int[Array, ""]) -> Float[Array, ""]:
    """q_ref: the bound for the whole budget, at least a millionth of what the smallest allocation loses.

    A model may hold the highest level without loss, as one that was stored in it.
    """
    return jnp.maximum(least_loss(bound, budget, 0), 1e-6 * bound.loss[0, 0] + 1e-30)


def lookahead(
    bound: LagrangianBound, loss: Float[Array, " A"], cost: Int[Array, " A"], left: Int[Array, ""], step: Int[Array, ""]
) -> Float[Array, " A"]:
    """What each level of step `step` loses, and all later steps at least, with `left` units before it."""
    return loss + least_loss(bound, left - cost, step + 1)


def select(table: Num[Array, "T A"], action: Int[Array, " T"]) -> Num[Array, " T"]:
    """The entry of each step's action."""
    return jnp.take_along_axis(table, action[:, None], axis=1)[:, 0]


def from_here_on(values: Num[Array, "*n T"]) -> Num[Array, "*n T+1"]:
    """Sums from each step to the end; 0 at the end."""
    sums = jnp.flip(jnp.cumsum(jnp.flip(values, axis=-1), axis=-1), axis=-1)
    return jnp.pad(sums, [(0, 0)] * (values.ndim - 1) + [(0, 1)])


def symlog(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """sign(x) · log(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def _price_grid(loss: jax.Array, size: jax.Array, valid: Bool[Array, "T A"]) -> Float[Array, " P"]:
    """Prices that cover every trade between two levels of one tensor, geometrically spaced, falling."""
    gain = jnp.abs(loss[:, :, None] - loss[:, None, :])
    extra = jnp.abs(size[:, :, None] - size[:, None, :])
    both = valid[:, :, None] & valid[:, None, :] & (extra > 0)
    rate = jnp.where(both, gain / jnp.maximum(extra, 1.0), 0.0)
    highest = jnp.maximum(jnp.max(rate), 1e-20)
    lowest = jnp.maximum(jnp.min(jnp.where(rate > 0, rate, highest)), 1e-9 * highest)
    return jnp.exp(jnp.linspace(jnp.log(2.0 * highest), jnp.log(0.5 * lowest), _PRICES))

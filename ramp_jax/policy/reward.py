"""Rewards of a finished allocation: quality first, and every byte of the budget has its price.

The terminal reward is −q / q_ref − penalty, where q is the loss of the allocation (mean KL divergence in nats per token
unless the evaluator measures another) and q_ref that of a uniform allocation of the same size, which makes rewards
comparable across models and budgets. Dense shaping spreads it over the steps in two parts, neither of which moves the
optimum by itself:

1. r_t = −s[t, a_t] / q_ref from the sensitivity table s; the last step adds predicted minus true loss.
2. A potential (Ng, Harada and Russell 1999): minus the Lagrangian bound on what the remaining steps must lose,
   Φ_t = −(Σ_{i ≥ t} min_a(s[i, a] + λ c[i, a]) − λ · left_t) / q_ref and Φ_T = 0, with λ the dual price of a byte at
   the episode's budget. What remains of a step is its Lagrangian regret, and of the last one also the worth of unused
   bytes: credit for a choice arrives at the choice itself instead of up to T steps later.

Regrets span five orders of magnitude (an embedding at 4 bits against one attention matrix), more than a critic can
resolve; `symlog` compresses them. It is monotone, so the action without regret stays the best one of its step; where
the budget forces regrets on some steps, many small ones weigh more, and one large one less, than in the sum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_PRICES = 256  # λ grid of the dual solutions
_LARGE = 1e30


class Penalty(NamedTuple):
    """Asymmetric: `over` relative to the budget costs `cliff + c_over · over`, unused budget `c_under · under`."""

    cliff: float = 1.0
    c_over: float = 10.0
    c_under: float = 0.1


NO_PENALTY = Penalty(0.0, 0.0, 0.0)
"""For episodes whose mask keeps them inside the budget."""


class Yardstick(NamedTuple):
    """What loss is normal at which size, for one sensitivity table; curves are indexed by units, ascending."""

    uniform_units: Float[Array, " A"]
    uniform_loss: Float[Array, " A"]
    price_units: Float[Array, " P"]
    price: Float[Array, " P"]
    """λ, loss per unit."""


def yardstick(loss: Float[Array, "T A"], cost: Int[Array, "T A"]) -> Yardstick:
    """Size and loss of the uniform allocations (a masked level is replaced by the nearest one above, else below), and
    the dual prices at which the Lagrangian solution takes each size."""
    valid = cost > 0
    size = cost.astype(jnp.float32)
    level = jnp.arange(loss.shape[1])
    distance = jnp.where(level[None, :] >= level[:, None], level[None, :] - level[:, None], 2 * loss.shape[1])
    distance = jnp.where(level[None, :] < level[:, None], loss.shape[1] + level[:, None] - level[None, :], distance)
    nearest = jnp.argmin(jnp.where(valid[None], distance[:, None, :], 4 * loss.shape[1]), axis=-1)  # [A, T]
    uniform = (_chosen(size, nearest), _chosen(loss, nearest))
    order = jnp.argsort(uniform[0])

    prices = _price_grid(loss, size, valid)
    lagrangian = jnp.where(valid, loss, _LARGE)[None] + prices[:, None, None] * size[None]
    solution_units = _chosen(size, jnp.argmin(lagrangian, axis=-1))  # falls with the price
    return Yardstick(uniform[0][order], uniform[1][order], solution_units[::-1], prices[::-1])


def reference_loss(yard: Yardstick, budget: Int[Array, ""]) -> Float[Array, ""]:
    """q_ref: the loss of a uniform allocation of that size, log-linear between the levels."""
    logs = jnp.log(jnp.maximum(yard.uniform_loss, 1e-12))
    return jnp.exp(jnp.interp(budget.astype(jnp.float32), yard.uniform_units, logs))


def price_at(yard: Yardstick, budget: Int[Array, ""]) -> Float[Array, ""]:
    """λ at that budget, in loss per unit."""
    return jnp.exp(jnp.interp(budget.astype(jnp.float32), yard.price_units, jnp.log(yard.price)))


def penalty(used: Int[Array, ""], budget: Int[Array, ""], terms: Penalty) -> Float[Array, ""]:
    """Penalty of an allocation of `used` units, in units of the terminal reward."""
    over = (used - budget).astype(jnp.float32) / budget.astype(jnp.float32)
    return jnp.where(over > 0, terms.cliff + terms.c_over * over, -terms.c_under * over)


def terminal_reward(q: Float[Array, ""], q_ref: Float[Array, ""], fine: Float[Array, ""]) -> Float[Array, ""]:
    """−q / q_ref − penalty."""
    return -q / q_ref - fine


def step_rewards(
    loss: Float[Array, "T A"],
    cost: Int[Array, "T A"],
    yard: Yardstick,
    action: Int[Array, " T"],
    budget: Int[Array, ""],
    *,
    true_loss: Float[Array, ""] | None = None,
    terms: Penalty = NO_PENALTY,
    potential: bool = True,
) -> Float[Array, " T"]:
    """Shaped rewards of one episode; without the potential they sum to the terminal reward.

    `true_loss` is the evaluator's; None trusts the table.
    """
    q_ref = reference_loss(yard, budget)
    predicted = _taken(loss, action)
    spent = _taken(cost, action)
    correction = 0.0 if true_loss is None else jnp.sum(predicted) - true_loss
    base = -predicted / q_ref
    base = base.at[-1].add(correction / q_ref - penalty(jnp.sum(spent), budget, terms))
    if not potential:
        return base
    price = price_at(yard, budget)
    bound = jnp.min(jnp.where(cost > 0, loss + price * cost.astype(jnp.float32), _LARGE), axis=1)
    change = bound - price * spent.astype(jnp.float32)  # q_ref (Φ_{t+1} − Φ_t), but for the last step
    left = (budget - jnp.sum(spent)).astype(jnp.float32)
    return base + change.at[-1].add(-price * left) / q_ref


def symlog(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """sign(x) · log(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def _price_grid(loss: jax.Array, size: jax.Array, valid: Bool[Array, "T A"]) -> Float[Array, " P"]:
    """Prices that cover every trade between two levels of one tensor, geometrically spaced."""
    gain = jnp.abs(loss[:, :, None] - loss[:, None, :])
    extra = jnp.abs(size[:, :, None] - size[:, None, :])
    both = valid[:, :, None] & valid[:, None, :] & (extra > 0)
    rate = jnp.where(both, gain / jnp.maximum(extra, 1.0), 0.0)
    highest = jnp.maximum(jnp.max(rate), 1e-20)
    lowest = jnp.maximum(jnp.min(jnp.where(rate > 0, rate, highest)), 1e-9 * highest)
    return jnp.exp(jnp.linspace(jnp.log(0.5 * lowest), jnp.log(2.0 * highest), _PRICES))


def _taken(table: jax.Array, action: Int[Array, " T"]) -> jax.Array:
    return jnp.take_along_axis(table, action[:, None], axis=1)[:, 0]


def _chosen(table: Float[Array, "T A"], actions: Int[Array, "K T"]) -> Float[Array, " K"]:
    return jax.vmap(lambda action: jnp.sum(_taken(table, action)))(actions)

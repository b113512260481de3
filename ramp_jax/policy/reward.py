"""Rewards of a finished allocation: quality first, and every byte of the budget has its price.

The terminal reward is −q / q_ref − penalty, where q is the loss of the allocation (mean KL divergence in nats per token
unless the evaluator measures another) and q_ref the bound on what any allocation of that size loses, which makes
rewards comparable across models and budgets. Dense shaping spreads it over the steps in two parts, neither of which
moves the optimum by itself:

1. r_t = −s[t, a_t] / q_ref from the sensitivity table s; the last step adds predicted minus true loss. The penalty of
   a soft budget comes on top of the last step as it is, since a compressed one would be worth paying.
2. A potential (Ng, Harada and Russell 1999): minus the bound on what the remaining steps must lose with the units that
   are left, Φ_t = −L_t(left_t) / q_ref and Φ_T = 0 (`lagrangian.least_loss`). What remains of a step is its regret: by
   how much it and the best possible rest lose more than was possible before it. Credit for a choice arrives at the
   choice itself instead of up to T steps later.

Regrets span five orders of magnitude (an embedding at 4 bits against one attention matrix), more than a critic can
resolve; `symlog` compresses them. It is monotone, so the action without regret stays the best one of its step; where
the budget forces regrets on some steps, many small ones weigh more, and one large one less, than in the sum.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ramp_jax.policy.lagrangian import LagrangianBound, least_loss, select, unit_of_loss
from ramp_jax.schema import NotNegative


@dataclasses.dataclass(frozen=True)
class Penalty:
    """Asymmetric: `over` relative to the budget costs `cliff + c_over · over`, unused budget `c_under · under`.

    In units of q / q_ref, so small penalties are a reward that puts quality first.
    """

    cliff: NotNegative = 1.0
    c_over: NotNegative = 10.0
    c_under: NotNegative = 0.1


NO_PENALTY = Penalty(0.0, 0.0, 0.0)
"""For episodes whose mask keeps them inside the budget."""


def penalty(used: Int[Array, ""], budget: Int[Array, ""], terms: Penalty) -> Float[Array, ""]:
    """Penalty of an allocation of `used` units, in units of the terminal reward."""
    over = (used - budget).astype(jnp.float32) / budget.astype(jnp.float32)
    return jnp.where(over > 0, terms.cliff + terms.c_over * over, -terms.c_under * over)


def terminal_reward(q: Float[Array, ""], q_ref: Float[Array, ""], penalty: Float[Array, ""]) -> Float[Array, ""]:
    """−q / q_ref − penalty."""
    return -q / q_ref - penalty


def step_rewards(
    loss: Float[Array, "T A"],
    cost: Int[Array, "T A"],
    bound: LagrangianBound,
    action: Int[Array, " T"],
    budget: Int[Array, ""],
    *,
    true_loss: Float[Array, ""] | None = None,
    potential: bool = True,
) -> Float[Array, " T"]:
    """Shaped rewards of one episode; without the potential they sum to the terminal reward before its penalty.

    `true_loss` is the evaluator's; None trusts the table.
    """
    q_ref = unit_of_loss(bound, budget)
    predicted, spent = select(loss, action), select(cost, action)
    correction = 0.0 if true_loss is None else jnp.sum(predicted) - true_loss
    if potential:
        left = budget - jnp.cumsum(spent)
        least = jax.vmap(functools.partial(least_loss, bound))
        steps = jnp.arange(len(action))
        predicted += least(left, steps + 1) - least(left + spent, steps)
    return (-predicted / q_ref).at[-1].add(correction / q_ref)

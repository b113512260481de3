"""Actor and critics: small perceptrons over one observation, beside what the observation itself says.

The last numbers of an observation are each level's regret by the estimate (see `env.py`). Both networks start from
minus these and learn what to add: residual reinforcement learning (Silver et al. 2018), so an untrained policy already
solves the estimated problem, and training corrects the estimate where the truth differs.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

CRITICS = 2
_ACTOR_TRUST = 3.0  # logits per unit of compressed regret; enough to prefer, and to try others still
_MASKED = -1e9  # logit of an invalid action; finite, so that no gradient becomes NaN


class Residual(nn.Module):
    """Normalized hidden layers of the given widths and a linear layer to `n_out`, minus the regrets that end the
    observation times a learned factor that starts at `trust`."""

    hidden: tuple[int, ...]
    n_out: int
    trust: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch O"]) -> Float[Array, "*batch n_out"]:
        """One number per action."""
        regret = x[..., -self.n_out :]
        trust = self.param("trust", nn.initializers.constant(self.trust), ())
        for width in self.hidden:
            x = nn.silu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.n_out, kernel_init=nn.initializers.orthogonal(0.01))(x) - trust * regret


def actor(hidden: tuple[int, ...], n_actions: int) -> nn.Module:
    """Observation → one logit per action."""
    return Residual(hidden, n_actions, _ACTOR_TRUST)


def critic(hidden: tuple[int, ...], n_actions: int) -> nn.Module:
    """Observation → soft action values `[CRITICS, *batch, A]` of independent networks, run as one."""
    ensemble = nn.vmap(
        Residual, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=CRITICS, out_axes=0
    )
    return ensemble(hidden, n_actions, 1.0)


def masked_log_softmax(logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Log probabilities over the valid actions; about −1e9 for the others, never −inf."""
    return jax.nn.log_softmax(jnp.where(mask, logits, _MASKED))

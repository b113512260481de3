"""Actor and critics: small perceptrons over one observation."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

CRITICS = 2
_MASKED = -1e9  # logit of an invalid action; finite, so that no gradient becomes NaN


class MLP(nn.Module):
    """Normalized hidden layers of the given widths, then a linear layer to `n_out`."""

    hidden: tuple[int, ...]
    n_out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch O"]) -> Float[Array, "*batch n_out"]:
        """One number per action."""
        for width in self.hidden:
            x = nn.silu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.n_out, kernel_init=nn.initializers.orthogonal(0.01))(x)


def actor(hidden: tuple[int, ...], n_actions: int) -> nn.Module:
    """Observation → one logit per action."""
    return MLP(hidden, n_actions)


def critic(hidden: tuple[int, ...], n_actions: int) -> nn.Module:
    """Observation → soft action values `[CRITICS, *batch, A]` of independent networks, run as one."""
    ensemble = nn.vmap(
        MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=CRITICS, out_axes=0
    )
    return ensemble(hidden, n_actions)


def masked_log_softmax(logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Log probabilities over the valid actions; about −1e9 for the others, never −inf."""
    return jax.nn.log_softmax(jnp.where(mask, logits, _MASKED))

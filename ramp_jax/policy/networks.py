"""Actor and critics: small perceptrons over one observation, beside what the observation itself says.

The last numbers of an observation are each level's regret by the estimate (see `env.py`). Both networks start from
minus these and learn what to add: residual reinforcement learning (Silver et al. 2018), so an untrained policy already
solves the estimated problem, and training corrects the estimate where the truth differs.

A network here is two pure functions; its parameters are nested dictionaries of f32 arrays.
"""

import dataclasses
from itertools import pairwise
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ramp_jax.schema import Check, within

CRITICS = 2
_ACTOR_TRUST = 3.0  # logits per unit of compressed regret; enough to prefer, and to try others still
_MASKED = -1e9  # logit of an invalid action; finite, so that no gradient becomes NaN

Widths = Annotated[
    tuple[Annotated[int, within(1, 2**16)], ...], Check(lambda widths: len(widths) <= 16, "at most 16 widths of layers")
]
Params = dict[str, Any]


class Residual(nnx.Module):
    """Normalized hidden layers of the given widths and a linear layer to `n_out`, minus the regrets that end the
    observation times a learned factor that starts at `trust`."""

    def __init__(self, n_in: int, hidden: tuple[int, ...], n_out: int, trust: float, *, rngs: nnx.Rngs) -> None:
        widths = (n_in, *hidden)
        self.hidden = nnx.Dict({str(i): Hidden(*pair, rngs=rngs) for i, pair in enumerate(pairwise(widths))})
        self.head = nnx.Linear(widths[-1], n_out, kernel_init=nnx.initializers.orthogonal(0.01), rngs=rngs)
        self.trust = nnx.Param(jnp.float32(trust))

    def __call__(self, x: Float[Array, "*batch O"]) -> Float[Array, "*batch n_out"]:
        """One number per action."""
        regret = x[..., -self.head.out_features :]
        for i in range(len(self.hidden)):
            x = self.hidden[str(i)](x)
        return self.head(x) - self.trust * regret


class Hidden(nnx.Module):
    """A linear layer, normalized, then SiLU."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(n_in, n_out, rngs=rngs)
        self.norm = nnx.LayerNorm(n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        """Activations of the layer."""
        return nnx.silu(self.norm(self.linear(x)))


@dataclasses.dataclass(frozen=True)
class Network:
    """One perceptron, or `members` independent ones that see the same observations and run as one."""

    hidden: tuple[int, ...]
    n_actions: int
    trust: float
    members: int | None = None

    def init(self, key: PRNGKeyArray, n_observation: int) -> Params:
        """Fresh parameters for observations of so many numbers, with a leading axis where there are members."""

        def one(key: PRNGKeyArray) -> Params:
            return nnx.to_pure_dict(nnx.state(self._build(key, n_observation)))

        return one(key) if self.members is None else jax.vmap(one)(jax.random.split(key, self.members))

    def apply(self, params: Params, x: Float[Array, "*batch O"]) -> Float[Array, "*members_batch A"]:
        """One number per action, `[*batch, A]`, or `[members, *batch, A]`."""
        graph = nnx.graphdef(nnx.eval_shape(lambda: self._build(jax.random.key(0), x.shape[-1])))

        def one(params: Params) -> Float[Array, "*batch A"]:
            return nnx.merge(graph, params)(x)

        return one(params) if self.members is None else jax.vmap(one)(params)

    def _build(self, key: PRNGKeyArray, n_observation: int) -> Residual:
        return Residual(n_observation, self.hidden, self.n_actions, self.trust, rngs=nnx.Rngs(key))


def actor(hidden: tuple[int, ...], n_actions: int) -> Network:
    """Observation → one logit per action."""
    return Network(hidden, n_actions, _ACTOR_TRUST)


def critic(hidden: tuple[int, ...], n_actions: int) -> Network:
    """Observation → soft action values `[CRITICS, *batch, A]` of independent networks, run as one."""
    return Network(hidden, n_actions, 1.0, CRITICS)


def masked_log_softmax(logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Log probabilities over the valid actions; about −1e9 for the others, never −inf."""
    return jax.nn.log_softmax(jnp.where(mask, logits, _MASKED))

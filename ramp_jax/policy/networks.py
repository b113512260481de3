"""Actor and critics: small perceptrons that score one action after the other by the same weights.

The last number of an action is its regret by the estimate (see `env.py`). Both networks start from minus that and learn
what to add: residual reinforcement learning (Silver et al. 2018), so an untrained policy already solves the estimated
problem, and training corrects the estimate where the truth differs. What is added follows from the state and from the
action's numbers alone (as in Q(s, a) of continuous control), so a network serves any number of actions in any order.

A network here is two pure functions; its parameters are nested dictionaries of f32 arrays.
"""

import dataclasses
from itertools import pairwise
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ramp_jax.policy.env import ACTION, Observation
from ramp_jax.schema import Check, within

CRITICS = 2
_ACTOR_TRUST = 3.0  # logits per unit of compressed regret; enough to prefer, and to try others still
_MASKED = -1e9  # logit of an invalid action; finite, so that no gradient becomes NaN

Widths = Annotated[
    tuple[Annotated[int, within(1, 2**16)], ...],
    Check(lambda widths: 1 <= len(widths) <= 16, "1 to 16 widths of layers"),
]
Params = dict[str, Any]


class Residual(nnx.Module):
    """Normalized layers of the given widths; the last one sees the action as well. What a linear layer makes of it is
    added to minus the action's regret times a learned factor that starts at `trust`."""

    def __init__(self, n_state: int, widths: tuple[int, ...], trust: float, *, rngs: nnx.Rngs) -> None:
        pairs = list(pairwise((n_state, *widths)))
        self.hidden = nnx.Dict({str(i): Hidden(*pair, rngs=rngs) for i, pair in enumerate(pairs)})
        self.action = nnx.Linear(ACTION, widths[-1], use_bias=False, rngs=rngs)
        small = nnx.initializers.orthogonal(0.01)
        self.head = nnx.Linear(widths[-1], 1, use_bias=False, kernel_init=small, rngs=rngs)
        self.trust = nnx.Param(jnp.float32(trust))

    def __call__(self, seen: Observation) -> Float[Array, "*batch A"]:
        """One number per action."""
        x, last = seen.state, len(self.hidden) - 1
        for i in range(last):
            x = self.hidden[str(i)](x)
        x = self.hidden[str(last)](x[..., None, :], self.action(seen.actions))
        return self.head(x)[..., 0] - self.trust * seen.actions[..., -1]


class Hidden(nnx.Module):
    """A linear layer, normalized, then SiLU."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(n_in, n_out, rngs=rngs)
        self.norm = nnx.LayerNorm(n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch n_in"], beside: jax.Array | float = 0.0) -> Float[Array, "*batch n_out"]:
        """Activations of the layer, `beside` added before they are normalized."""
        return nnx.silu(self.norm(self.linear(x) + beside))


@dataclasses.dataclass(frozen=True)
class Network:
    """One perceptron, or `members` independent ones that see the same observations and run as one."""

    hidden: tuple[int, ...]
    trust: float
    members: int | None = None

    def init(self, key: PRNGKeyArray, n_state: int) -> Params:
        """Fresh parameters for states of so many numbers, with a leading axis where there are members."""

        def one(key: PRNGKeyArray) -> Params:
            return nnx.to_pure_dict(nnx.state(self._build(key, n_state)))

        return one(key) if self.members is None else jax.vmap(one)(jax.random.split(key, self.members))

    def apply(self, params: Params, seen: Observation) -> Float[Array, "*members_batch A"]:
        """One number per action, `[*batch, A]`, or `[members, *batch, A]`."""
        graph = nnx.graphdef(nnx.eval_shape(lambda: self._build(jax.random.key(0), seen.state.shape[-1])))

        def one(params: Params) -> Float[Array, "*batch A"]:
            return nnx.merge(graph, params)(seen)

        return one(params) if self.members is None else jax.vmap(one)(params)

    def _build(self, key: PRNGKeyArray, n_state: int) -> Residual:
        return Residual(n_state, self.hidden, self.trust, rngs=nnx.Rngs(key))


def actor(hidden: tuple[int, ...]) -> Network:
    """Observation → one logit per action."""
    return Network(hidden, _ACTOR_TRUST)


def critic(hidden: tuple[int, ...]) -> Network:
    """Observation → soft action values `[CRITICS, *batch, A]` of independent networks, run as one."""
    return Network(hidden, 1.0, CRITICS)


def masked_log_softmax(logits: Float[Array, "*batch A"], mask: Bool[Array, "*batch A"]) -> Float[Array, "*batch A"]:
    """Log probabilities over the valid actions; about −1e9 for the others, never −inf."""
    return jax.nn.log_softmax(jnp.where(mask, logits, _MASKED))

"""Discrete Soft Actor-Critic: one update of actor, twin critics and temperature from one batch.

Haarnoja et al. 2018 in the categorical form of Christodoulou 2019 (arXiv 1910.07207): expectations over actions are
sums, not samples; invalid actions are masked everywhere. With π the actor, Q̄ the target critics, α the temperature:

    y       = r + γ (1 − done) Σ_a π(a|s') [min_i Q̄_i(s', a) − α log π(a|s')]
    L_Q     = ½ Σ_i (Q_i(s, a) − y)²
    L_π     = Σ_a π(a|s) [α log π(a|s) − min_i Q_i(s, a)]
    L_α     = log α · (H(π(·|s)) − η log |valid(s)|)

all as means over the batch. η is the share of the largest possible entropy that is aimed at.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ramp_jax.policy import networks
from ramp_jax.policy.networks import Params, Widths, masked_log_softmax
from ramp_jax.policy.replay import Batch
from ramp_jax.schema import Count, Positive, Share


@dataclasses.dataclass(frozen=True)
class SacConfig:
    """Hyperparameters of the learner. `entropy_share` is η, `target_rate` the share of new weights in the targets."""

    hidden: Widths = (128, 32)
    learning_rate: Positive = 1e-3
    alpha_learning_rate: Positive = 3e-3
    initial_alpha: Positive = 0.1
    entropy_share: Share = 0.1
    discount: Share = 1.0
    target_rate: Share = 0.01
    max_grad_norm: Positive = 10.0
    batch_size: Count = 512


class Learner(NamedTuple):
    """Everything an update reads and writes."""

    actor: Params
    critic: Params
    target: Params
    log_alpha: Float[Array, ""]
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState


def init(key: PRNGKeyArray, config: SacConfig, n_state: int) -> Learner:
    """A fresh learner for states of so many numbers."""
    actor_key, critic_key = jax.random.split(key)
    actor = networks.actor(config.hidden).init(actor_key, n_state)
    critic = networks.critic(config.hidden).init(critic_key, n_state)
    log_alpha = jnp.log(jnp.float32(config.initial_alpha))
    return Learner(
        actor,
        critic,
        critic,
        log_alpha,
        _optimizer(config).init(actor),
        _optimizer(config).init(critic),
        optax.adam(config.alpha_learning_rate).init(log_alpha),
    )


def soft_value(log_pi: Float[Array, "*B A"], q: Float[Array, "*B A"], alpha: Float[Array, ""]) -> Float[Array, "*B"]:
    """Σ_a π(a) [Q(a) − α log π(a)]."""
    return jnp.sum(jnp.exp(log_pi) * (q - alpha * log_pi), axis=-1)


def td_target(
    batch: Batch,
    next_log_pi: Float[Array, "B A"],
    next_q: Float[Array, "C B A"],
    alpha: Float[Array, ""],
    discount: float,
) -> Float[Array, " B"]:
    """y of the module's docstring."""
    value = soft_value(next_log_pi, jnp.min(next_q, axis=0), alpha)
    return batch.reward + discount * (1.0 - batch.done) * value


def critic_loss(q: Float[Array, "C B A"], batch: Batch, target: Float[Array, " B"]) -> Float[Array, ""]:
    """L_Q."""
    taken = jnp.take_along_axis(q, batch.action[None, :, None], axis=-1)[..., 0]  # [C, B]
    return 0.5 * jnp.mean(jnp.sum(jnp.square(taken - target[None, :]), axis=0))


def actor_loss(log_pi: Float[Array, "B A"], q: Float[Array, "C B A"], alpha: Float[Array, ""]) -> Float[Array, ""]:
    """L_π."""
    return -jnp.mean(soft_value(log_pi, jnp.min(q, axis=0), alpha))


def alpha_loss(
    log_alpha: Float[Array, ""], log_pi: Float[Array, "B A"], batch: Batch, entropy_share: float
) -> Float[Array, ""]:
    """L_α."""
    entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)
    aim = entropy_share * jnp.log(jnp.sum(batch.mask, axis=-1).astype(jnp.float32))
    return log_alpha * jnp.mean(entropy - aim)


def update(learner: Learner, batch: Batch, config: SacConfig) -> tuple[Learner, dict[str, Float[Array, ""]]]:
    """One gradient step of critics, actor and temperature, then of the target critics."""
    actor, critic = networks.actor(config.hidden), networks.critic(config.hidden)
    alpha = jnp.exp(learner.log_alpha)

    next_log_pi = masked_log_softmax(actor.apply(learner.actor, batch.next_observation), batch.next_mask)
    next_q = critic.apply(learner.target, batch.next_observation)
    target = td_target(batch, next_log_pi, next_q, alpha, config.discount)

    def loss_of_critic(params: Params) -> jax.Array:
        return critic_loss(critic.apply(params, batch.observation), batch, target)

    def loss_of_actor(params: Params) -> tuple[jax.Array, jax.Array]:
        log_pi = masked_log_softmax(actor.apply(params, batch.observation), batch.mask)
        return actor_loss(log_pi, q, alpha), log_pi

    q_loss, q_grad = jax.value_and_grad(loss_of_critic)(learner.critic)
    new_critic, critic_opt = _descend(config, q_grad, learner.critic_opt, learner.critic)
    q = critic.apply(new_critic, batch.observation)
    (pi_loss, log_pi), pi_grad = jax.value_and_grad(loss_of_actor, has_aux=True)(learner.actor)
    new_actor, actor_opt = _descend(config, pi_grad, learner.actor_opt, learner.actor)
    alpha_grad = jax.grad(alpha_loss)(learner.log_alpha, log_pi, batch, config.entropy_share)
    step, alpha_opt = optax.adam(config.alpha_learning_rate).update(alpha_grad, learner.alpha_opt)

    new = Learner(
        new_actor,
        new_critic,
        optax.incremental_update(new_critic, learner.target, config.target_rate),
        learner.log_alpha + step,
        actor_opt,
        critic_opt,
        alpha_opt,
    )
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))
    return new, {"critic_loss": q_loss, "actor_loss": pi_loss, "alpha": alpha, "entropy": entropy}


def _optimizer(config: SacConfig) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.learning_rate))


def _descend(config: SacConfig, grad: Any, state: optax.OptState, params: Any) -> tuple[Any, optax.OptState]:
    step, state = _optimizer(config).update(grad, state, params)
    return optax.apply_updates(params, step), state

"""Discrete Soft Actor-Critic against numbers by hand, and the replay that feeds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ramp_jax.policy import networks, replay, sac
from ramp_jax.policy.env import ACTION, Observation
from ramp_jax.policy.networks import masked_log_softmax
from ramp_jax.policy.replay import Batch, transitions
from ramp_jax.policy.sac import SacConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LN2 = float(np.log(2))
CONFIG = SacConfig(hidden=(8,), target_rate=0.25)
update = jax.jit(sac.update, static_argnames="config")


def fresh(seed=0):
    """A learner for 3 observed numbers and 3 actions."""
    return sac.init(jax.random.key(seed), CONFIG, n_state=3)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch_of(action=(0, 1), reward=(1.0, 2.0), done=(0.0, 1.0), mask=((True, True), (True, True))):
    n, a = len(action), len(mask[0])
    state = jnp.arange(n * 3, dtype=jnp.float32).reshape(n, 3) / 10
    observation = Observation(state, jnp.linspace(-1, 1, n * a * ACTION).reshape(n, a, ACTION))
    action, reward, done = jnp.array(action, jnp.int32), jnp.array(reward), jnp.array(done)
    mask = jnp.array(mask)
    assert mask.shape == (n, a)
    return Batch(observation, mask, action, reward, jax.tree.map(lambda leaf: leaf + 1, observation), mask, done)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def test_td_target_by_hand():
    """π = (½, ½), min Q = (1, 2), α = ½: V = 1.5 + ½ ln 2; nothing follows a last step."""
    next_q = jnp.array([[[1.0, 5.0], [9.0, 9.0]], [[3.0, 2.0], [9.0, 9.0]]])
    log_pi = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    y = sac.td_target(batch_of(), log_pi, next_q, jnp.float32(0.5), discount=0.9)
    np.testing.assert_allclose(y, [1 + 0.9 * (1.5 + 0.5 * LN2), 2], rtol=1e-6)


def test_critic_loss_by_hand():
    """Taken: (1, 4) and (3, 8) against (2, 4): squares summed over critics, mean over the batch."""
    q = jnp.array([[[1.0, 9.0], [9.0, 4.0]], [[3.0, 9.0], [9.0, 8.0]]])
    loss = sac.critic_loss(q, batch_of(), jnp.array([2.0, 4.0]))
    assert loss == pytest.approx(0.5 * ((1 + 1) + (0 + 16)) / 2)


def test_actor_loss_by_hand():
    """First row: ½(½ ln ½ − 1) + ½(½ ln ½ − 2); second: ¼(½ ln ¼ − 4) + ¾(½ ln ¾ − 0). Summed, then the mean."""
    q = jnp.array([[[1.0, 2.0], [4.0, 0.0]], [[7.0, 7.0], [7.0, 7.0]]])
    log_pi = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    first = -0.5 * LN2 - 1.5
    second = 0.25 * (0.5 * np.log(0.25) - 4) + 0.75 * 0.5 * np.log(0.75)
    assert sac.actor_loss(log_pi, q, jnp.float32(0.5)) == pytest.approx((first + second) / 2, rel=1e-6)


def test_alpha_loss_by_hand():
    """Aim is 0.3 of log |valid|: ln 2 of two valid actions, nothing of one."""
    batch = batch_of(mask=((True, True, False), (False, True, False)))
    log_pi = masked_log_softmax(jnp.zeros((2, 3)), batch.mask)
    loss = sac.alpha_loss(jnp.float32(2.0), log_pi, batch, entropy_share=0.3)
    assert loss == pytest.approx(2 * (0.7 * LN2 + 0) / 2, rel=1e-6)


def test_masked_actions_have_no_probability(rng):
    logits = jnp.asarray(rng.normal(0, 1e3, (200, 5)), jnp.float32)
    mask = rng.random((200, 5)) < 0.5
    mask[np.arange(200), rng.integers(0, 5, 200)] = True
    log_pi = masked_log_softmax(logits, jnp.asarray(mask))
    pi = np.exp(np.asarray(log_pi))
    assert (pi[~mask] == 0).all()
    np.testing.assert_allclose(pi.sum(axis=1), 1, rtol=1e-5)
    assert finite(log_pi)
    drawn = jax.vmap(jax.random.categorical)(jax.random.split(jax.random.key(0), 200), log_pi)
    assert mask[np.arange(200), np.asarray(drawn)].all()


def test_masked_probabilities_by_hand():
    log_pi = masked_log_softmax(jnp.log(jnp.array([1.0, 7.0, 3.0])), jnp.array([True, False, True]))
    np.testing.assert_allclose(np.exp(log_pi), [0.25, 0, 0.75], rtol=1e-6)


def test_untrained_networks_say_what_the_estimate_says(rng):
    """An action ends with its regret: values are minus that, and the actor prefers the action without."""
    seen = seen_of(rng, 50, 3)
    regret, learner = np.asarray(seen.actions[..., -1]), sac.init(jax.random.key(0), CONFIG, 4)
    q = networks.critic(CONFIG.hidden).apply(learner.critic, seen)
    np.testing.assert_allclose(q, -np.broadcast_to(regret, q.shape), atol=0.1)
    logits = networks.actor(CONFIG.hidden).apply(learner.actor, seen)
    clear = np.ptp(np.sort(regret, axis=1)[:, :2], axis=1) > 0.1
    np.testing.assert_array_equal(jnp.argmax(logits, -1)[clear], np.argmin(regret, -1)[clear])


def seen_of(rng, n, actions):
    """Observations of 4 numbers and so many actions."""
    shown = np.concatenate([rng.normal(size=(n, actions, ACTION - 1)), rng.uniform(0, 5, (n, actions, 1))], -1)
    return Observation(jnp.asarray(rng.normal(size=(n, 4)), jnp.float32), jnp.asarray(shown, jnp.float32))


def test_actions_are_scored_alike_in_any_order_and_number(rng):
    """A network that learned on some actions serves others: each is known by its numbers alone."""
    seen = seen_of(rng, 20, 7)
    for network in (networks.actor((16, 8)), networks.critic((16, 8))):
        params = jax.tree.map(
            lambda leaf: np.asarray(leaf) * 3, jax.jit(network.init, static_argnums=1)(jax.random.key(1), 4)
        )
        apply, picked = jax.jit(network.apply), np.array([5, 0, 3])
        whole = np.asarray(apply(params, seen))
        some = apply(params, seen._replace(actions=seen.actions[:, picked]))
        np.testing.assert_allclose(some, whole[..., picked], rtol=1e-5, atol=1e-5)
        learned = whole + np.asarray(params["trust"])[..., None, None] * np.asarray(seen.actions[..., -1])
        assert np.ptp(learned, axis=-1).min() > 1e-3


def test_one_valid_action_gives_finite_gradients_and_moves_nothing():
    mask = jnp.array([[False, True, False]])
    q = jnp.array([[[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]]])

    def loss(logits):
        return sac.actor_loss(masked_log_softmax(logits, mask), q, jnp.float32(0.2))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([[5.0, -3.0, 0.5]])), 0)


def test_update_with_one_valid_action_stays_finite():
    batch = batch_of(mask=((False, False, True), (True, False, False)), action=(2, 0), done=(0.0, 0.0))
    learner, metrics = update(fresh(), batch, CONFIG)
    assert finite((learner, metrics))
    assert metrics["entropy"] == 0


@jax.jit
def by_parts(old, batch):
    """New critic, and new actor against it, from losses and optimizer alone."""
    actor, critic = networks.actor(CONFIG.hidden), networks.critic(CONFIG.hidden)
    optimizer = optax.chain(optax.clip_by_global_norm(CONFIG.max_grad_norm), optax.adam(CONFIG.learning_rate))
    alpha = jnp.exp(old.log_alpha)

    def stepped(loss, params):
        step, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
        return optax.apply_updates(params, step)

    next_log_pi = masked_log_softmax(actor.apply(old.actor, batch.next_observation), batch.next_mask)
    y = sac.td_target(batch, next_log_pi, critic.apply(old.target, batch.next_observation), alpha, CONFIG.discount)
    new_critic = stepped(lambda p: sac.critic_loss(critic.apply(p, batch.observation), batch, y), old.critic)
    q = critic.apply(new_critic, batch.observation)

    def loss_of_actor(params):
        return sac.actor_loss(masked_log_softmax(actor.apply(params, batch.observation), batch.mask), q, alpha)

    return new_critic, stepped(loss_of_actor, old.actor)


def test_update_is_critic_then_actor_against_the_new_critic():
    old, batch = fresh(1), batch_of(mask=((True, True, False), (True, True, True)))
    old = old._replace(target=jax.tree.map(lambda x: x + 1, old.critic))
    new, metrics = update(old, batch, CONFIG)
    expected = by_parts(old, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (new.critic, new.actor), expected)
    assert metrics["alpha"] == pytest.approx(CONFIG.initial_alpha)


def test_targets_move_by_the_target_rate():
    old = fresh()
    old = old._replace(target=jax.tree.map(lambda x: x + 1, old.critic))
    new, _ = update(old, batch_of(mask=((True,) * 3,) * 2), CONFIG)

    def moved(target, before, critic):
        np.testing.assert_allclose(target, 0.75 * np.asarray(before) + 0.25 * np.asarray(critic), rtol=1e-5, atol=1e-6)

    jax.tree.map(moved, new.target, old.target, new.critic)


def test_critics_are_independent():
    seen = Observation(jnp.ones((5, 3)), jnp.ones((5, 3, ACTION)))
    q = networks.critic(CONFIG.hidden).apply(fresh().critic, seen)
    assert q.shape == (networks.CRITICS, 5, 3)
    assert (np.asarray(q[0]) != np.asarray(q[1])).all()


@pytest.mark.parametrize(("confident", "direction"), [(False, -1), (True, 1)])
def test_temperature_steers_entropy_to_its_aim(confident, direction):
    """A fresh actor is nearly uniform, far above the aim; one that is sure of its action is below."""
    learner = fresh()
    if confident:
        learner = learner._replace(actor=learner.actor | {"trust": jnp.float32(100.0)})
    new, metrics = update(learner, batch_of(mask=((True,) * 3,) * 2), CONFIG)
    assert (metrics["entropy"] > CONFIG.entropy_share * np.log(3)) == (not confident)
    assert np.sign(new.log_alpha - learner.log_alpha) == direction


def episodes(numbers, length=3):
    """Observation and reward of step t of episode n: 10 n + t; the action is t."""
    value = jnp.array([[10 * n + t for t in range(length)] for n in numbers], jnp.float32)
    t = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), value.shape)
    mask = jnp.broadcast_to(t[..., None] >= jnp.arange(length)[None, None], (*value.shape, length))
    seen = Observation(value[..., None], jnp.broadcast_to(value[..., None, None], (*value.shape, length, ACTION)))
    return transitions(seen, mask, t, value)


def test_replay_overwrites_the_oldest_first():
    store = replay.empty(2, episodes([0, 0]))
    for first in (0, 2, 4):
        store = replay.add(store, episodes([first, first + 1]))
    assert store.added == 3
    np.testing.assert_array_equal(store.rounds.reward, [[40, 41, 42, 50, 51, 52], [20, 21, 22, 30, 31, 32]])


def test_replay_samples_only_what_is_stored():
    store = replay.add(replay.empty(8, episodes([0, 0])), episodes([5, 7]))
    batch = replay.sample(store, jax.random.key(0), 500)
    values, counts = np.unique(np.asarray(batch.reward), return_counts=True)
    np.testing.assert_array_equal(values, [50, 51, 52, 70, 71, 72])
    assert counts.min() > 50


def test_replay_samples_all_once_it_is_full():
    store = replay.empty(2, episodes([0, 0]))
    for first in (0, 2, 4):
        store = replay.add(store, episodes([first, first + 1]))
    batch = replay.sample(store, jax.random.key(1), 2000)
    expected = [10 * n + t for n in (2, 3, 4, 5) for t in range(3)]
    np.testing.assert_array_equal(np.unique(np.asarray(batch.reward)), expected)


def test_transitions_belong_together():
    store = replay.add(replay.empty(2, episodes([0, 0])), episodes([1, 2]))
    batch = replay.sample(store, jax.random.key(2), 300)
    t = np.asarray(batch.action)
    np.testing.assert_array_equal(batch.observation.state[:, 0], batch.reward)
    np.testing.assert_array_equal(batch.observation.actions[:, 2, 1], batch.reward)
    np.testing.assert_array_equal(np.asarray(batch.reward) % 10, t)
    np.testing.assert_array_equal(batch.mask.sum(axis=1), t + 1)
    np.testing.assert_array_equal(batch.done, t == 2)
    going = np.asarray(batch.done) == 0
    np.testing.assert_array_equal(batch.next_observation.state[going, 0], batch.reward[going] + 1)
    np.testing.assert_array_equal(batch.next_mask[going].sum(axis=1), t[going] + 2)

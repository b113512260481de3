"""Training on problems with a known optimum: what it reaches, resuming, seeds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.allocators import Problem
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.allocators.simple import uniform
from ramp_jax.policy import train
from ramp_jax.policy.env import budget_range
from ramp_jax.policy.reward import Penalty
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import Task, TrainConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BITS = np.array([4, 5, 8])
SHORT = TrainConfig(
    iterations=6,
    episodes=4,
    updates=3,
    replay_iterations=2,
    seeds=2,
    log_every=2,
    sac=SacConfig(hidden=(8,), batch_size=16),
)
SOLVER = TrainConfig(
    iterations=50,
    episodes=16,
    updates=16,
    replay_iterations=32,
    seeds=2,
    log_every=10,
    sac=SacConfig(hidden=(64, 64), learning_rate=1e-3, alpha_learning_rate=3e-3, target_rate=0.01, batch_size=128),
)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax raises a float to an integer power, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def task_of(rng, tensors=12):
    """Losses fall fourfold per bit from a level that differs a hundredfold by tensor; the estimate is wrong by a factor
    of 4.5, up or down, as the last number of the embedding tells."""
    weights = 32 * rng.choice([64, 128, 256], tensors)
    level, wrong = rng.normal(0, 1.5, tensors), rng.choice([-1.0, 1.0], tensors)
    loss = np.exp(level)[:, None] * weights[:, None] * 2.0 ** (-2 * BITS[None, :]) / 20
    problem = Problem(
        jnp.asarray(np.stack([level / 2, wrong], axis=1), jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(weights[:, None] * BITS[None, :] // 256, jnp.int32),
        jnp.asarray(loss * np.exp(1.5 * wrong)[:, None], jnp.float32),
    )
    return Task(problem, jnp.asarray(loss, jnp.float32))


@pytest.fixture(scope="module")
def task():
    return task_of(np.random.default_rng(0))


def equal(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


class StoppedError(Exception):
    """What ends a run from outside."""


def test_probe_is_solved():
    """50 iterations correct a wrong estimate: from over 1.4 times the loss of the exact optimum to below 1.15, where
    uniform allocations lose over 4 times as much."""
    task = task_of(np.random.default_rng(0), 24)
    cost, loss = np.asarray(task.problem.cost), np.asarray(task.loss)
    budgets = np.asarray(train.probe_budgets(task.problem)).tolist()

    def total(actions):
        return loss[np.arange(len(loss)), np.asarray(actions)].sum()

    best = np.asarray([total(knapsack(cost, loss, budget)) for budget in budgets])

    def over_optimum(actor):
        played = [train.greedy(actor, task.problem, jnp.int32(budget), SOLVER.sac.hidden) for budget in budgets]
        for actions, budget in zip(played, budgets, strict=True):
            assert cost[np.arange(len(cost)), np.asarray(actions)].sum() <= budget
        return np.asarray([total(actions) for actions in played]) / best

    rows = []
    found = train.run(jax.random.key(0), (task,), SOLVER, log=rows.append)
    assert [row["iteration"] for row in rows] == [10, 20, 30, 40, 50]
    assert rows[-1]["best_loss_over_uniform"] == float(found.score) == min(min(r["loss_over_uniform"]) for r in rows)
    untrained = train.initial_state(jax.random.key(0), (task,), SOLVER).learner.actor
    assert over_optimum(found.actor).min() > 1 - 1e-5
    assert over_optimum(untrained).mean() > 1.4
    assert over_optimum(found.actor).mean() < 1.15
    assert np.mean([total(uniform(cost, loss, budget)) for budget in budgets] / best) > 4


def test_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path, task):
    """Killed in its third scan and started again: the rows, the state and the actor of a run that was not."""
    whole, resumed = [], []

    def until_the_third(row):
        resumed.append(row)
        if len(resumed) == 3:
            raise StoppedError

    expected = train.run(jax.random.key(3), (task,), SHORT, log=whole.append, checkpoint_path=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train.run(jax.random.key(3), (task,), SHORT, log=until_the_third, checkpoint_path=tmp_path / "parts")
    del resumed[2:]
    result = train.run(jax.random.key(3), (task,), SHORT, log=resumed.append, checkpoint_path=tmp_path / "parts")
    equal(result, expected)
    assert resumed == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_finished_run_returns_its_best_at_once(tmp_path, task):
    rows = []
    first = train.run(jax.random.key(3), (task,), SHORT, checkpoint_path=tmp_path / "checkpoint")
    again = train.run(jax.random.key(3), (task,), SHORT, log=rows.append, checkpoint_path=tmp_path / "checkpoint")
    equal(first, again)
    assert rows == []


def test_same_seed_gives_the_same_actor_and_another_seed_another(task):
    first, again, other = (train.run(jax.random.key(seed), (task,), SHORT) for seed in (5, 5, 6))
    equal(first, again)
    different = jax.tree.map(lambda a, b: bool((a != b).any()), first.actor, other.actor)
    assert any(jax.tree.leaves(different))


def initial(task, keys):
    return jax.vmap(lambda key: train.initial_state(key, (task,), SHORT))(keys)


def test_a_seed_learns_the_same_alone_as_beside_others(task):
    """Seeds share nothing; the last place differs where vmap changes the order of sums."""
    keys = jax.random.split(jax.random.key(7), 2)
    together, metrics = train.learn(initial(task, keys), (task,), SHORT, 2)
    alone, metrics_alone = train.learn(initial(task, keys[1:]), (task,), SHORT, 2)
    np.testing.assert_array_equal(together.replay.rounds.action[1], alone.replay.rounds.action[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-3, atol=1e-5),
        (together.learner, metrics),
        (alone.learner, metrics_alone),
    )
    actions = np.asarray(together.replay.rounds.action)
    assert (actions[0] != actions[1]).any()


def test_one_policy_learns_on_models_of_different_depth():
    """Two problems, 12 and 7 tensors: one round holds the episodes of both, and the score is their geometric mean."""
    rng = np.random.default_rng(1)
    tasks = (task_of(rng, 12), task_of(rng, 7))
    state = jax.vmap(lambda key: train.initial_state(key, tasks, SHORT))(jax.random.split(jax.random.key(0), 2))
    state, _ = train.learn(state, tasks, SHORT, 1)
    assert state.replay.rounds.action.shape == (2, SHORT.replay_iterations, SHORT.episodes * (12 + 7))
    actors = state.learner.actor
    each = [np.asarray(train.score(actors, (task,), SHORT)[0]) for task in tasks]
    both, _ = train.score(actors, tasks, SHORT)
    np.testing.assert_allclose(both, np.sqrt(each[0] * each[1]), rtol=1e-5)


def test_equal_scans_are_traced_at_most_once(task):
    before = train.learn._cache_size()
    for seed in (0, 1):
        train.run(jax.random.key(seed), (task,), SHORT)
    assert train.learn._cache_size() <= before + 1


def test_episodes_of_training_fit_and_start_over_the_whole_range(task):
    keys = jax.random.split(jax.random.key(7), 2)
    state, metrics = train.learn(initial(task, keys), (task,), SHORT, 2)
    steps = state.replay.rounds
    assert np.take_along_axis(np.asarray(steps.mask), np.asarray(steps.action)[..., None], -1).all()
    assert np.asarray(steps.done).sum() == 2 * 2 * SHORT.episodes
    targets = np.asarray(steps.observation.state)[..., 2].ravel()  # of 16 episodes
    assert len(np.unique(targets)) > 10
    assert (np.asarray(metrics["return"]) < 0).all()


def test_checkpoint_of_another_run_is_refused(tmp_path, task):
    path = tmp_path / "checkpoint"
    train.run(jax.random.key(3), (task,), SHORT, checkpoint_path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"is not a checkpoint of this run .* delete it to start afresh\.$"):
        train.run(jax.random.key(3), (task,), dataclasses.replace(SHORT, seeds=3), checkpoint_path=path)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="is not a checkpoint of this run"):
        train.run(jax.random.key(3), (task,), SHORT, checkpoint_path=path)


def test_probe_budgets_lie_inside_the_range_and_densest_where_files_are_small(task):
    budgets = np.asarray(train.probe_budgets(task.problem))
    lowest, highest = (int(x) for x in budget_range(task.problem))
    assert len(budgets) == train.PROBES
    assert lowest < budgets[0] < budgets[-1] < highest
    assert (np.diff(budgets, 2) >= -1).all()


def wanting_bits(actor, sign):
    """Parameters of zeros, whose logits then rise with the bits of an action, or fall, by the sign of each seed."""
    bits, first = actor["action"]["kernel"].at[:, 0, 0].set(1.0), actor["hidden"]["0"]
    linear = first["linear"] | {"bias": first["linear"]["bias"].at[:, 1].set(2.0).at[:, 2].set(-2.0)}
    norm = {"scale": first["norm"]["scale"].at[:, 0].set(1.0), "bias": first["norm"]["bias"] + 5.0}  # SiLU rises there
    head = actor["head"] | {"kernel": actor["head"]["kernel"].at[:, 0, 0].set(sign)}
    return actor | {"action": {"kernel": bits}, "hidden": {"0": {"linear": linear, "norm": norm}}, "head": head}


def test_score_by_hand(task):
    """An actor that always wants the largest level and one that wants the smallest, against a plain loop."""
    hidden = (8,)
    state = initial(task, jax.random.split(jax.random.key(0), 2))
    actor = jax.tree.map(jnp.zeros_like, state.learner.actor)
    actor = wanting_bits(actor, jnp.array([1.0, -1.0]))
    cost, loss = np.asarray(task.problem.cost), np.asarray(task.loss)
    budgets = np.asarray(train.probe_budgets(task.problem))
    logs = []
    for budget in budgets:
        left, total = int(budget), 0.0
        for t, row in enumerate(cost):
            level = max(a for a in range(3) if row[a] <= left - cost[t + 1 :, 0].sum())
            left, total = left - row[level], total + loss[t, level]
        logs.append(np.log(total) - np.log(np.exp(np.interp(budget, cost.sum(0), np.log(loss.sum(0))))))
    config = dataclasses.replace(SHORT, sac=dataclasses.replace(SHORT.sac, hidden=hidden))
    scores, (found,) = train.score(actor, (task,), config)
    smallest = np.log(loss.sum(0)[0]) - np.interp(budgets, cost.sum(0), np.log(loss.sum(0)))
    np.testing.assert_allclose(scores, np.exp([np.mean(logs), np.mean(smallest)]), rtol=1e-4)
    assert found.action.shape == (2 * train.PROBES, len(cost))
    np.testing.assert_allclose(found.loss, loss[np.arange(len(loss)), np.asarray(found.action)].sum(1), rtol=1e-5)


def interacting(task, strength=0.6):
    """The task with a model in the loop: pairs of neighbouring tensors lose more together than their sum."""

    def true_loss(loss, action):
        chosen = jnp.take_along_axis(loss, action[:, None], axis=1)[:, 0]
        return jnp.sum(chosen) + strength * jnp.sum(jnp.sqrt(chosen[1:] * chosen[:-1]))

    return task._replace(true_loss=jax.tree_util.Partial(true_loss, task.loss))


@pytest.mark.parametrize("evaluator", ["perplexity", "mixed"])
def test_evaluators_judge_by_the_true_loss(tmp_path, task, evaluator):
    """Scores are true losses over uniform ones, and a run that was stopped goes on to the same bits."""
    config = dataclasses.replace(SHORT, evaluator=evaluator)
    measured, whole, resumed = interacting(task), [], []
    expected = train.run(jax.random.key(1), (measured,), config, log=whole.append, checkpoint_path=tmp_path / "whole")
    bound = train.lagrangian_bound(task.loss, task.problem.cost)
    logs = []
    for budget in train.probe_budgets(task.problem):
        action = train.greedy(expected.actor, task.problem, budget, config.sac.hidden)
        logs.append(np.log(measured.true_loss(action) / train.uniform_loss(bound, budget)))
    assert float(expected.score) == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)

    def until_the_second(row):
        resumed.append(row)
        if len(resumed) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train.run(jax.random.key(1), (measured,), config, log=until_the_second, checkpoint_path=tmp_path / "parts")
    del resumed[1:]
    result = train.run(jax.random.key(1), (measured,), config, log=resumed.append, checkpoint_path=tmp_path / "parts")
    equal(result, expected)
    assert resumed == whole

    plain = []
    train.run(jax.random.key(1), (task,), SHORT, log=plain.append)
    returns = [[row["return"] for row in rows] for rows in (whole, plain)]
    assert (returns[0][0] == returns[1][0]) == (evaluator == "mixed")  # its first scan has nothing to correct by
    assert returns[0][1] != returns[1][1]


def test_true_losses_are_what_perplexity_rewards(task):
    """Returns and sums of rewards of a round: minus the true loss over the bound, episode by episode."""
    config = dataclasses.replace(SHORT, evaluator="perplexity", potential=False)
    measured = interacting(task)
    learner = train.initial_state(jax.random.key(0), (measured,), config).learner
    steps, returns = train.interact((measured,), config, learner, jax.random.key(1))
    actions = steps.action.reshape(config.episodes, -1)
    cost = np.asarray(task.problem.cost)
    lowest, highest = budget_range(task.problem)
    bound = train.lagrangian_bound(task.loss, task.problem.cost)
    keys = jax.random.split(jax.random.split(jax.random.key(1), 1)[0], config.episodes)
    rewarded = steps.reward.reshape(actions.shape).sum(axis=1) / len(cost)
    for key, action, found, total in zip(keys, actions, returns, rewarded, strict=True):
        share = jax.random.uniform(jax.random.split(key, 5)[3]) ** 2
        budget = lowest + (share * (highest - lowest).astype(jnp.float32)).astype(jnp.int32)
        assert cost[np.arange(len(cost)), np.asarray(action)].sum() <= budget
        expected = -measured.true_loss(action) / train.unit_of_loss(bound, budget)
        assert float(found) == pytest.approx(float(expected), rel=1e-4)
        assert float(total) == pytest.approx(float(expected), rel=1e-4)


def test_what_cannot_be_evaluated_is_bad_but_finite(task):
    """A model that breaks at some level: its loss is a number, worse than any that the table knows."""

    def broken(action):
        return jnp.where(jnp.any(action == 0), jnp.inf, 0.0)

    actions = jnp.zeros((2, 12), jnp.int32).at[1].set(2)
    losses = train._losses(task._replace(true_loss=broken), actions, true=True)
    assert losses.tolist() == pytest.approx([10 * float(task.loss.max(axis=1).sum()), 0.0])


def test_evaluator_without_a_model_is_refused(task):
    with pytest.raises(ValueError, match="'mixed' needs the true losses"):
        train.run(jax.random.key(0), (task,), dataclasses.replace(SHORT, evaluator="mixed"))


def test_soft_budgets_mask_nothing_but_penalize_what_is_over(task):
    """The penalty of the smallest excess, uncompressed, exactly where an episode is over its budget."""
    penalty = Penalty(cliff=1000.0, c_over=0.0, c_under=0.0)
    config = dataclasses.replace(SHORT, episodes=32, soft=True, penalty=penalty)
    learner = train.initial_state(jax.random.key(0), (task,), config).learner
    steps, returns = train.interact((task,), config, learner, jax.random.key(1))
    assert steps.mask.all()
    cost, n_tensors = np.asarray(task.problem.cost), len(task.loss)
    used = cost[np.arange(n_tensors), np.asarray(steps.action).reshape(32, -1)].sum(axis=1)
    lowest, highest = (int(x) for x in budget_range(task.problem))
    keys = jax.random.split(jax.random.split(jax.random.key(1), 1)[0], 32)
    shares = np.asarray([jax.random.uniform(jax.random.split(key, 5)[3]) ** 2 for key in keys])
    over = used > lowest + (shares * (highest - lowest)).astype(int)
    assert over.any()
    assert not over.all()
    last = np.asarray(steps.reward).reshape(32, -1)[:, -1]
    np.testing.assert_array_equal(last < -900 * n_tensors, over)
    np.testing.assert_array_equal(np.asarray(returns) < -900, over)


def test_narrowed_episodes_lack_the_lowest_levels_of_some_tensors(task):
    """Never the highest level, never all of a tensor; nothing changes where no episode is narrowed."""
    assert train._narrow(task.problem, jax.random.key(0), 0.0) is task.problem
    costs = [np.asarray(train._narrow(task.problem, jax.random.key(i), 0.5).cost) for i in range(100)]
    full = np.asarray(task.problem.cost)
    for cost in costs:
        lacking = cost == 0
        assert (cost[~lacking] == full[~lacking]).all()
        assert not lacking[:, -1].any()
        assert (lacking[:, :-1] >= lacking[:, 1:]).all()
    share = np.mean([(cost != full).any() for cost in costs])
    assert 0.1 < share < 0.5
    assert any((cost != full).any() and (cost == full).all(axis=1).any() for cost in costs)


def test_thinned_episodes_lack_levels_of_all_tensors_that_have_others(task):
    """Any level, each of all tensors or of none; a tensor that has only such keeps them."""
    assert train._thin(task.problem, jax.random.key(0), 0.0) is task.problem
    full = np.asarray(task.problem.cost)
    only = full.copy()
    only[0, 1:] = 0
    costs = [
        np.asarray(train._thin(task.problem._replace(cost=jnp.asarray(only)), jax.random.key(i), 0.5).cost)
        for i in range(100)
    ]
    for cost in costs:
        assert cost[0].tolist() == only[0].tolist()
        lacking = cost[1:] == 0
        assert (lacking == lacking[:1]).all()
        assert (cost[1:][~lacking] == full[1:][~lacking]).all()
    lacking = np.asarray([cost[1] == 0 for cost in costs])
    assert 0.2 < lacking.any(axis=1).mean() < 0.6
    assert lacking.any(axis=0).all()


def test_shifts_move_all_tensors_of_an_episode_alike(task):
    moved = [np.asarray(train._shift(task.problem, jax.random.key(i), 0.5).embedding) for i in range(200)]
    offsets = np.asarray(moved) - np.asarray(task.problem.embedding)
    np.testing.assert_allclose(offsets, np.broadcast_to(offsets[:, :1], offsets.shape), atol=1e-6)
    assert offsets[:, 0].std(axis=0) == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(train._shift(task.problem, jax.random.key(0), 0.0).embedding, task.problem.embedding)

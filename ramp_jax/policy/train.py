"""Training: scans of interaction and updates, seeds side by side, checkpoints between scans.

`learn` is pure: arrays in, arrays out. `run` is the loop around it that scores, logs, saves and resumes.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from ramp_jax import checkpoint
from ramp_jax.policy import networks, replay, reward, sac
from ramp_jax.policy.env import CONTEXT, Choose, Episode, Observation, Process, budget_range, rollout
from ramp_jax.policy.lagrangian import lagrangian_bound, select, symlog, uniform_loss, unit_of_loss
from ramp_jax.policy.networks import Params, masked_log_softmax
from ramp_jax.policy.reward import NO_PENALTY, Penalty
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.table_correction import Evidence, add_evidence, correct_table, empty_evidence
from ramp_jax.progress import track
from ramp_jax.schema import Count, NotNegative, Share

Metrics = dict[str, Float[Array, " S"]]

Evaluator = Literal["surrogate", "perplexity", "mixed"]
"""What says how good a finished allocation is. `surrogate`: the sensitivity table. `perplexity`: the model, one forward
pass per episode. `mixed`: the table, corrected between scans by what the policies' allocations truly lose."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the policy learns: each iteration plays `episodes` per task and makes `updates` gradient steps.

    Seeds learn side by side, each on its own episodes; the last `replay_iterations` iterations are replayed. Under the
    evaluator `mixed` they share one corrected table, and what is replayed keeps the rewards of the table of its time.
    `potential` adds the Lagrangian potential to the rewards and compresses them (see `reward.py`). A share `narrowed`
    of the episodes lacks the lowest levels of some tensors, as a model does whose rows no superblock divides; a share
    `thinned` lacks each level of all tensors with a chance of its own, since formats are to be chosen that nobody
    learned on.
    Every episode moves each number of all its embeddings by one normal offset of standard deviation `shift`: models
    differ in where they lie, and what tensors of one model lose against each other is what is to be learned.
    With a `soft` budget nothing is masked for its size in training, and the reward holds the `penalty` instead, as in
    the paper; scores and allocations are masked all the same.
    """

    iterations: Count = 150
    episodes: Count = 16
    updates: Count = 32
    replay_iterations: Count = 64
    seeds: Count = 2
    log_every: Count = 10
    potential: bool = True
    narrowed: Share = 0.0
    thinned: Share = 0.0
    shift: NotNegative = 0.0
    soft: bool = False
    penalty: Penalty = dataclasses.field(default_factory=Penalty)
    evaluator: Evaluator = "surrogate"
    sac: SacConfig = dataclasses.field(default_factory=SacConfig)


PROBES = 8
"""Budgets at which a policy is scored while it learns."""

_LOW_BUDGETS = 2.0  # power of the uniform draw: small files are what people ask for, and where choices matter


class Task(NamedTuple):
    """What is learned on: a model's `Process` (or a problem, which has its fields), and what each level of each tensor
    loses (nats per token).

    `true_loss` maps a whole allocation to what it loses; a pytree, as `jax.tree_util.Partial` is.
    """

    problem: Any
    loss: Float[Array, "T A"]
    true_loss: Callable[[Int[Array, " T"]], Float[Array, ""]] | None = None


Tasks = tuple[Task, ...]
"""The models that are learned on together, each with as many tensors as it has, all with the same levels."""


class TrainState(NamedTuple):
    """Everything a run consists of between two scans."""

    learner: sac.Learner
    replay: replay.Replay
    key: PRNGKeyArray
    iteration: Int[Array, ""]


def initial_state(key: PRNGKeyArray, tasks: Tasks, config: TrainConfig) -> TrainState:
    """A fresh run of one seed."""
    learner_key, key = jax.random.split(key)
    learner = sac.init(learner_key, config.sac, state_size(tasks[0].problem))
    steps, _ = jax.eval_shape(functools.partial(interact, tasks, config), learner, key)
    stored = replay.empty(config.replay_iterations, steps)
    return TrainState(learner, stored, key, jnp.int32(0))


def state_size(process: Process) -> int:
    """S for the embeddings of `process`."""
    return process.embedding.shape[-1] + CONTEXT


@functools.partial(jax.jit, static_argnames=("config", "iterations"))
def learn(
    state: TrainState, tasks: Tasks, config: TrainConfig, iterations: int
) -> tuple[TrainState, dict[str, Float[Array, "..."]]]:
    """`iterations` of interaction and updates for every seed of `state` (leading axis S); metrics are `[S]` means."""

    def iteration(state: TrainState, _: None) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.iteration)
        play_key, update_key = jax.random.split(key)
        steps, returns = interact(tasks, config, state.learner, play_key)
        stored = replay.add(state.replay, steps)

        def one_update(learner: sac.Learner, key: jax.Array) -> tuple[sac.Learner, dict[str, jax.Array]]:
            return sac.update(learner, replay.sample(stored, key, config.sac.batch_size), config.sac)

        keys = jax.random.split(update_key, config.updates)
        learner, metrics = jax.lax.scan(one_update, state.learner, keys)
        metrics = jax.tree.map(jnp.mean, metrics) | {"return": jnp.mean(returns)}
        return TrainState(learner, stored, state.key, state.iteration + 1), metrics

    def one_seed(state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = jax.lax.scan(iteration, state, length=iterations)
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.vmap(one_seed)(state)


def interact(
    tasks: Tasks, config: TrainConfig, learner: sac.Learner, key: PRNGKeyArray
) -> tuple[replay.Batch, Float[Array, " N"]]:
    """A round of episodes on every task, and their terminal rewards."""
    keys = jax.random.split(key, len(tasks))
    rounds, returns = zip(*(_play(task, config, learner, k) for task, k in zip(tasks, keys, strict=True)), strict=True)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rounds), jnp.concatenate(returns)


def _play(
    task: Task, config: TrainConfig, learner: sac.Learner, key: PRNGKeyArray
) -> tuple[replay.Batch, Float[Array, " N"]]:
    """Episodes of the current actor at budgets drawn over the feasible range, and their terminal rewards."""
    loss, steps = task.loss, len(task.loss)
    draw = _drawing(learner.actor, config.sac.hidden)

    def episode(key: jax.Array) -> tuple[Episode, jax.Array, jax.Array]:
        level_key, thin_key, shift_key, budget_key, play_key = jax.random.split(key, 5)
        process = _thin(_narrow(task.problem, level_key, config.narrowed), thin_key, config.thinned)
        process = _shift(process, shift_key, config.shift)
        lowest, highest = budget_range(process)
        share = jax.random.uniform(budget_key) ** _LOW_BUDGETS
        budget = lowest + (share * (highest - lowest).astype(jnp.float32)).astype(jnp.int32)
        return rollout(process, budget, draw, play_key, soft=config.soft), process.cost, budget

    def rewarded(played: Episode, cost: jax.Array, budget: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        bound = lagrangian_bound(loss, cost)
        terms = config.penalty if config.soft else NO_PENALTY
        penalty = reward.penalty(budget - played.left, budget, terms)
        shaped = functools.partial(reward.step_rewards, loss, cost, bound, played.action, budget)
        rewards = steps * shaped(true_loss=q, potential=config.potential)  # in units of the mean loss of a tensor
        rewards = symlog(rewards) if config.potential else rewards
        terminal = reward.terminal_reward(q, unit_of_loss(bound, budget), penalty)
        return rewards.at[-1].add(-steps * penalty), terminal

    played, cost, budget = jax.vmap(episode)(jax.random.split(key, config.episodes))
    q = _losses(task, played.action, true=config.evaluator == "perplexity")
    rewards, terminal = jax.vmap(rewarded)(played, cost, budget, q)
    return replay.transitions(played.observation, played.mask, played.action, rewards), terminal


def _losses(task: Task, action: Int[Array, "N T"], *, true: bool) -> Float[Array, " N"]:
    """What allocations lose, by the model if asked for `true` losses, else by the table.

    A true loss is taken as ten times the table's largest where it is more, or infinite.
    """
    if true and task.true_loss is not None:
        return jnp.minimum(jax.lax.map(task.true_loss, action), 10 * jnp.sum(jnp.max(task.loss, axis=1)))
    return jax.vmap(lambda a: jnp.sum(select(task.loss, a)))(action)


def _drawing(actor: Params, hidden: tuple[int, ...]) -> Choose:
    network = networks.actor(hidden)

    def draw(key: jax.Array, observation: Observation, mask: jax.Array) -> jax.Array:
        log_pi = masked_log_softmax(network.apply(actor, observation), mask)
        return jax.random.categorical(key, log_pi).astype(jnp.int32)

    return draw


def _narrow(process: Process, key: PRNGKeyArray, share: float) -> Process:
    """With probability `share`, a random part of the tensors lacks the levels below a random one, if it has others.

    Rows of a real model differ: those of one width hold superblocks, those of another do not.
    """
    if not share:
        return process
    chance_key, level_key, part_key, tensor_key = jax.random.split(key, 4)
    levels = jnp.arange(process.cost.shape[1])
    lowest = jax.random.randint(level_key, (), 0, len(levels) - 1) * jax.random.bernoulli(chance_key, share)
    narrow = jax.random.uniform(tensor_key, (len(process.cost), 1)) < 2 * jax.random.uniform(part_key)
    return _without(process, narrow & (levels < lowest)[None, :])


def _thin(process: Process, key: PRNGKeyArray, share: float) -> Process:
    """With probability `share`, each level is left out of all tensors that have others, with a chance that is drawn."""
    if not share:
        return process
    chance_key, rate_key, level_key = jax.random.split(key, 3)
    rate = jax.random.uniform(rate_key) * jax.random.bernoulli(chance_key, share)
    return _without(process, jax.random.uniform(level_key, (1, process.cost.shape[1])) < rate)


def _without(process: Process, left_out: Bool[Array, "#T A"]) -> Process:
    """Without some levels of the tensors that have others."""
    cost = jnp.where(left_out, 0, process.cost)
    return process._replace(cost=jnp.where(jnp.any(cost > 0, axis=1, keepdims=True), cost, process.cost))


def _shift(process: Process, key: PRNGKeyArray, deviation: float) -> Process:
    """All embeddings moved by the same offset."""
    offset = deviation * jax.random.normal(key, (1, process.embedding.shape[1]))
    return process._replace(embedding=process.embedding + offset)


def probe_budgets(process: Process) -> Int[Array, " PROBES"]:
    """Budgets spread over the feasible range, denser where files are small."""
    lowest, highest = budget_range(process)
    shares = (jnp.arange(1, PROBES + 1) / (PROBES + 1)) ** _LOW_BUDGETS
    return lowest + (shares * (highest - lowest).astype(jnp.float32)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("hidden", "soft"))
def greedy(
    actor: Params, process: Process, budget: Int[Array, ""], hidden: tuple[int, ...], *, soft: bool = False
) -> Int[Array, " T"]:
    """Level indices of the actor's most probable actions; with a `soft` budget they may not fit."""
    network = networks.actor(hidden)

    def best(_: jax.Array, observation: Observation, mask: jax.Array) -> jax.Array:
        return jnp.argmax(masked_log_softmax(network.apply(actor, observation), mask)).astype(jnp.int32)

    return rollout(process, budget, best, jax.random.key(0), soft=soft).action


@functools.partial(jax.jit, static_argnames="hidden")
def sample(
    actor: Params, process: Process, budget: Int[Array, ""], keys: Key[Array, " N"], hidden: tuple[int, ...]
) -> Int[Array, "N T"]:
    """Level indices drawn from the actor's probabilities, one allocation per key."""
    draw = _drawing(actor, hidden)
    return jax.vmap(lambda key: rollout(process, budget, draw, key).action)(keys)


@functools.partial(jax.jit, static_argnames="config")
def score(actors: Params, tasks: Tasks, config: TrainConfig) -> tuple[Float[Array, " S"], tuple[Evidence, ...]]:
    """Per seed: loss of greedy allocations over the predicted one of uniform ones, the geometric mean over tasks and
    `probe_budgets`; and these allocations with their losses, S · PROBES per task.

    The loss is the true one, unless the evaluator is the surrogate. Budgets are masks here, however it was trained.
    """
    logs, found = [], []
    for task in tasks:
        budgets, bound = probe_budgets(task.problem), lagrangian_bound(task.loss, task.problem.cost)
        played = functools.partial(greedy, process=task.problem, hidden=config.sac.hidden)
        at_budgets = jax.vmap(lambda actor, budget, play=played: play(actor, budget=budget), (None, 0))
        action = jax.vmap(at_budgets, (0, None))(actors, budgets).reshape(-1, len(task.loss))
        loss = _losses(task, action, true=config.evaluator != "surrogate")
        uniform = jax.vmap(functools.partial(uniform_loss, bound))(budgets)
        logs.append(jnp.log(jnp.maximum(loss.reshape(-1, PROBES), 1e-12) / uniform[None]))
        found.append(Evidence(action, loss))
    return jnp.exp(jnp.mean(jnp.concatenate(logs, axis=1), axis=1)), tuple(found)


class Best(NamedTuple):
    """The best-scoring actor so far, of any seed."""

    actor: Params
    score: Float[Array, ""]


def run(
    key: PRNGKeyArray,
    tasks: Tasks,
    config: TrainConfig,
    *,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    checkpoint_path: Path | None = None,
) -> Best:
    """Train all seeds on all tasks and return the best actor; `log` receives one row per `log_every` iterations.

    With `checkpoint_path`, a run that was stopped goes on where it was and ends with the same bits. Raises `ValueError`
    where that file belongs to another run, or a task cannot say the true losses that the evaluator needs.
    """
    if config.evaluator != "surrogate" and any(task.true_loss is None for task in tasks):
        raise ValueError(f"the evaluator {config.evaluator!r} needs the true losses of every task.")
    state = jax.vmap(lambda k: initial_state(k, tasks, config))(jax.random.split(key, config.seeds))
    best = Best(_member(state.learner.actor, 0), jnp.float32(jnp.inf))
    per_scan = config.seeds * PROBES
    places = per_scan * -(-config.iterations // config.log_every) if config.evaluator == "mixed" else 0
    evidence = tuple(empty_evidence(places, len(task.loss)) for task in tasks)
    if checkpoint_path is not None and checkpoint_path.exists():
        state, best, evidence = checkpoint.load(checkpoint_path, (state, best, evidence))
    done = int(state.iteration[0])
    chunks = range(done, config.iterations, config.log_every)
    for start in track(chunks, f"training {config.seeds} policies", "scan"):
        iterations = min(config.log_every, config.iterations - start)
        learned_on = _correct_tables(tasks, evidence) if places else tasks
        state, metrics = learn(state, learned_on, config, iterations)
        scores, found = score(state.learner.actor, tasks, config)
        if places:
            place = jnp.int32(start // config.log_every * per_scan)
            evidence = tuple(add_evidence(*pair, place) for pair in zip(evidence, found, strict=True))
        leader = int(jnp.argmin(scores))
        if scores[leader] < best.score:
            best = Best(_member(state.learner.actor, leader), scores[leader])
        log(_row(start + iterations, metrics, scores, best))
        if checkpoint_path is not None:
            checkpoint.save(checkpoint_path, (state, best, evidence))
    return best


def _correct_tables(tasks: Tasks, evidence: tuple[Evidence, ...]) -> Tasks:
    pairs = zip(tasks, evidence, strict=True)
    return tuple(task._replace(loss=correct_table(task.loss, known)) for task, known in pairs)


def _member(tree: Any, seed: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[seed], tree)


def _row(iteration: int, metrics: Metrics, scores: Float[Array, " S"], best: Best) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "loss_over_uniform": np.asarray(scores).tolist(),
        "best_loss_over_uniform": float(best.score),
        **{name: np.asarray(values).tolist() for name, values in metrics.items()},
    }

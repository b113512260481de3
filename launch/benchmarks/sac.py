"""The suite `sac` of launch/benchmark.py: how fast the policy plays and learns, on a synthetic model of 211 tensors.

Sizes are those of SmolLM2-135M if its rows could hold every level; losses fall fourfold per bit from a level that spans
a factor of a thousand, of which the estimate knows all but a factor of two. `steps_per_second` are steps of episodes,
choosing and rewards included; `seeds_8_over_1` is the time of a scan of 8 seeds over that of one.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measuring import Numbers, medians, said
from benchmarks.transfer import geometric_mean, judge_of, totals
from jaxtyping import Array, Float

from ramp_jax.allocation import ALIGNMENT
from ramp_jax.allocators.allocator import Problem, estimated_optimum
from ramp_jax.formats import LEVELS
from ramp_jax.policy import train
from ramp_jax.policy.inference import Policy, choose
from ramp_jax.policy.train import Task, TrainConfig

_LAYERS, _D, _F, _V = 30, 576, 1536, 49_152
_EPISODES = 512


def sac(repeats: int) -> Numbers:
    """Steps per second, seeds side by side, and a run to convergence."""
    task = synthetic()
    config = TrainConfig(episodes=_EPISODES)
    state = _states(task, config, 1)
    learner = jax.tree.map(lambda leaf: leaf[0], state.learner)
    play = jax.jit(functools.partial(train.interact, (task,), config))
    few = TrainConfig()
    states = {seeds: _states(task, few, seeds) for seeds in (1, 8)}
    times = medians(
        {
            "play": lambda: jax.block_until_ready(play(learner, jax.random.key(0))),
            1: lambda: jax.block_until_ready(train.learn(states[1], (task,), few, few.log_every)),
            8: lambda: jax.block_until_ready(train.learn(states[8], (task,), few, few.log_every)),
        },
        repeats,
    )
    steps = len(task.loss) * _EPISODES
    numbers = said({"steps_per_second": steps / times["play"], "seeds_8_over_1": times[8] / times[1]})
    started = time.monotonic()
    best = train.run(jax.random.key(0), (task,), few)
    numbers |= said({"run_seconds": time.monotonic() - started, "run_iterations": few.iterations})
    return numbers | said(_over_optimum(task, best.actor, few))


def synthetic(seed: int = 0) -> Task:
    """A task of SmolLM2's shape; tensors differ in what they lose, and the estimate errs by a factor of two."""
    rng = np.random.default_rng(seed)
    layer = [_D * _D, _D * _D // 3, _D * _D // 3, _D * _D, _D * _F, _D * _F, _D * _F]
    weights = np.array([_V * _D, *layer * _LAYERS])
    role = np.array([7, *[*range(7)] * _LAYERS])
    rate = np.array([1.0, 0.3, 3.0, 1.0, 0.5, 0.7, 2.0, 4.0])[role] * np.exp(rng.normal(0, 1.0, len(weights)))
    bits = np.asarray(LEVELS, np.float64)
    estimate = (weights * rate / weights.sum())[:, None] * 4.0 ** -bits[None, :]
    bias = np.exp(0.7 * np.sin(3 * role))  # a function of what the embedding tells
    embedding = np.zeros((len(weights), 11))
    embedding[:, 0], embedding[:, 1], embedding[:, 2] = role / 4 - 1, np.log10(rate), np.log10(weights) - 6
    return Task(
        Problem(
            _single(embedding),
            _single(weights),
            jnp.asarray(weights[:, None] * (bits + 0.5)[None, :] / (8 * ALIGNMENT), jnp.int32),
            _single(estimate),
        ),
        _single(estimate * bias[:, None]),
    )


def _single(values: np.ndarray) -> Float[Array, "..."]:
    return jnp.asarray(values, jnp.float32)


def _states(task: Task, config: TrainConfig, seeds: int) -> train.TrainState:
    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.vmap(lambda key: train.initial_state(key, (task,), config))(keys)


def _over_optimum(task: Task, actor: Any, config: TrainConfig) -> Numbers:
    """Loss over that of the exact knapsack, geometric mean over budgets: of the policy, the estimate, and uniform."""
    judge = judge_of("synthetic", task)
    policy = Policy(actor, config.sac.hidden, LEVELS, 0, ())
    found = {
        "policy": totals(judge.loss, judge.budgets, functools.partial(choose, policy, task.problem, repair=False)),
        "estimate": totals(judge.loss, judge.budgets, functools.partial(estimated_optimum, task.problem)),
        "uniform": judge.uniform,
    }
    return {f"{name}_over_optimum": geometric_mean(loss / judge.best) for name, loss in found.items()}

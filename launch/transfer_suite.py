"""The suite `transfer` of launch/benchmark.py: what policies do on models they were not trained on, by exact tables.

`--suite_run` is the workdir of a training run on several models (configs/pretrained.py); what it measured is used
again. Policies are trained for each of the run's models alone, for each choice that leaves one out, and for all, three
seeds each, and allocate for every model and for `--suite_held`. Then rewards go without their potential, and one number
of the embedding after the other is blanked, for all models.

A result is the predicted loss (exact table) over that of the exact knapsack, the geometric mean over the budgets of
`train.probe_budgets`, so 1 is the optimum; `way` is how far it went from the uniform allocation to that optimum, the
mean over budgets.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int
from measuring import Numbers

from ramp_jax import baselines, workflow
from ramp_jax.config import RunConfig, from_dict
from ramp_jax.models import load_model
from ramp_jax.policy import embedding, train
from ramp_jax.policy.train import Task, TrainConfig

_RUN = flags.DEFINE_string("suite_run", "runs/pretrained", "Training run whose models the suite `transfer` takes.")
_HELD = flags.DEFINE_string("suite_held", "smollm2-135m", "Model that no policy of the suite `transfer` trains on.")
_ITERATIONS = flags.DEFINE_integer("suite_iterations", 150, "Iterations of each training of the suite `transfer`.")
_SEEDS, _HELD_WINDOWS = 3, 2  # windows of the held model's exact table

Actions = Int[np.ndarray, " T"]
Tasks = dict[str, Task]


def transfer(repeats: int) -> Numbers:
    """Rows of training set × model, printed as they come (`repeats` is not used: nothing is timed)."""
    del repeats
    workdir = Path(_RUN.value)
    saved = json.loads((workdir / workflow.CONFIG).read_text(encoding="utf-8"))
    config = from_dict(saved)
    names = (*config.models, _HELD.value)
    held = dataclasses.replace(config, sensitivity=dataclasses.replace(config.sensitivity, count=_HELD_WINDOWS))
    tasks = {name: _task(name, held if name == _HELD.value else config, workdir) for name in names}
    rows = [row for name in names for row in _without_training(name, tasks[name])]
    learning = dataclasses.replace(config.train, iterations=_ITERATIONS.value, seeds=_SEEDS)
    for sources in _sources(config.models):
        rows += _rows(f"trained on {' '.join(sources)}", sources, tasks, learning)
    plain = dataclasses.replace(learning, potential=False)
    rows += _rows("all, rewards without potential", config.models, tasks, plain)
    for i, number in enumerate(embedding.NAMES):
        blanked = {name: _blanked(task, i) for name, task in tasks.items()}
        rows += _rows(f"all, without {number}", config.models, blanked, learning)
    return {"rows": rows}


def _task(name: str, config: RunConfig, workdir: Path) -> Task:
    return workflow.prepare_task(name, load_model(name, config.dtype), config, workdir, print)


def _sources(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Each model alone, all but one, and all."""
    sizes = sorted({1, max(len(names) - 1, 1), len(names)})
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes)


def _blanked(task: Task, column: int) -> Task:
    return task._replace(problem=task.problem._replace(embedding=task.problem.embedding.at[:, column].set(0.0)))


def _rows(label: str, sources: tuple[str, ...], tasks: Tasks, config: TrainConfig) -> Iterator[Numbers]:
    """One training with several seeds; every seed's last actor on every model."""
    learned_on = tuple(tasks[name] for name in sources)
    state = jax.vmap(lambda key: train.initial_state(key, learned_on, config))(
        jax.random.split(jax.random.key(0), config.seeds)
    )
    state, _ = train.learn(state, learned_on, config, config.iterations)
    for name, task in tasks.items():
        cost, estimate = np.asarray(task.problem.cost, np.int64), np.asarray(task.problem.expected, np.float64)
        for seed in range(config.seeds):
            actor = jax.tree.map(lambda leaf, s=seed: leaf[s], state.learner.actor)
            play = functools.partial(train.greedy, actor, task.problem, hidden=config.sac.hidden)
            alone = functools.partial(_rolled, play)
            yield _judged(label, name, "rollout", seed, task, alone)
            repaired = functools.partial(_repaired, cost, estimate, alone)
            yield _judged(label, name, "repaired", seed, task, repaired)


def _rolled(play: Callable[..., jax.Array], units: int) -> Actions:
    return np.asarray(play(budget=jnp.int32(units)))


def _repaired(cost: np.ndarray, estimate: np.ndarray, alone: Callable[[int], Actions], units: int) -> Actions:
    return baselines.exchanged(cost, estimate, units, alone(units))


def _without_training(name: str, task: Task) -> Iterator[Numbers]:
    cost, loss = np.asarray(task.problem.cost, np.int64), np.asarray(task.loss, np.float64)
    estimate = np.asarray(task.problem.expected, np.float64)
    for table, values in {"estimate": estimate, "exact table": loss}.items():
        for method in (baselines.knapsack, baselines.greedy):
            yield _judged(f"{table}, {method.__name__}", name, "", 0, task, functools.partial(method, cost, values))
    yield _judged("uniform", name, "", 0, task, functools.partial(baselines.uniform, cost, loss))
    for seed in range(_SEEDS):
        yield _judged("random", name, "", seed, task, functools.partial(baselines.random, cost, loss, seed=seed))


def _judged(label: str, name: str, how: str, seed: int, task: Task, choose: Callable[[int], Actions]) -> Numbers:
    cost, loss = np.asarray(task.problem.cost, np.int64), np.asarray(task.loss, np.float64)

    def total(actions: Actions) -> float:
        return float(loss[np.arange(len(loss)), actions].sum())

    budgets = np.asarray(train.probe_budgets(task.problem)).tolist()
    found = np.asarray([total(choose(units)) for units in budgets])
    best = np.asarray([total(baselines.knapsack(cost, loss, units)) for units in budgets])
    uniform = np.asarray([total(baselines.uniform(cost, loss, units)) for units in budgets])
    over = (found / best).round(3).tolist()
    row = {"method": label, "model": name, "how": how, "seed": seed, "over_optimum_by_budget": over}
    row |= {"over_optimum": float(np.exp(np.log(found / best).mean()))}
    row |= {"way": float(((uniform - found) / (uniform - best)).mean())}
    print(
        f"{label:50} {name:14} {how:9} seed {seed}  {row['over_optimum']:.3f} of the optimum, way {row['way']:.3f}",
        flush=True,
    )
    return row

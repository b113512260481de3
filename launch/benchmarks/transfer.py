"""The suite `transfer` of launch/benchmark.py: what policies do on models they were not trained on, by exact tables.

`--suite_run` is the workdir of a training run on several models (configs/pretrained.py); what it measured is used
again. Policies are trained as that run was, for each of its models alone, for each choice that leaves one out, and
for all, three seeds each, and allocate for every model and for `--suite_held`. Then policies learn on all models
without the formats that only have names, and are shown them; rewards go without their potential; and one number of the
embedding after the other is blanked, those of `--suite_blanked`.

A result is the predicted loss (exact table) over that of the exact knapsack, the geometric mean over the budgets of
`train.probe_budgets`, so 1 is the optimum; `way` is how far it went from the uniform allocation to that optimum, the
mean over budgets. A plot over budgets is written beside --json.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from benchmarks.measuring import Numbers, save_plots
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from ramp_jax import workflow
from ramp_jax.allocators import simple
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.config import RunConfig, read_config
from ramp_jax.models import load_model
from ramp_jax.policy import embedding, inference, train
from ramp_jax.policy.inference import Policy
from ramp_jax.policy.train import Task, TrainConfig

_RUN = flags.DEFINE_string("suite_run", "runs/pretrained", "Training run whose models the suite `transfer` takes.")
_HELD = flags.DEFINE_string(
    "suite_held", "smollm2-135m", "Model that no policy of the suite `transfer` trains on, if any."
)
_BLANKED = flags.DEFINE_list("suite_blanked", list(embedding.NAMES), "Numbers that the suite `transfer` leaves out.")
SEEDS, _HELD_WINDOWS = 3, 2  # windows of the held model's exact table

Actions = Int[np.ndarray, " T"]
Tasks = dict[str, Task]
Choose = Callable[[int], Actions]


@dataclasses.dataclass(frozen=True)
class Judge:
    """What can be reached on one model, by its exact table: budgets in units, and loss of optimum and uniform there."""

    model: str
    unit: float
    cost: Int[np.ndarray, "T A"]
    loss: Float[np.ndarray, "T A"]
    estimate: Float[np.ndarray, "T A"]
    budgets: list[int]
    best: Float[np.ndarray, " B"]
    uniform: Float[np.ndarray, " B"]

    def row(self, method: str, seed: int, choose: Choose, how: str = "") -> Numbers:
        """A way of choosing, beside optimum and uniform."""
        found = totals(self.loss, self.budgets, choose)
        row = {"method": method, "model": self.model, "how": how, "seed": seed}
        row |= {"over_optimum": geometric_mean(found / self.best)}
        row |= {"way": float(((self.uniform - found) / (self.uniform - self.best)).mean())}
        numbers = f"{row['over_optimum']:.3f} of the optimum, way {row['way']:.3f}"
        print(f"{method:50} {self.model:14} {how:9} seed {seed}  {numbers}", flush=True)
        return row | {"over_optimum_by_budget": (found / self.best).round(3).tolist()}


def transfer(repeats: int) -> Numbers:
    """Rows of training set × model, printed as they come (`repeats` is not used: nothing is timed)."""
    del repeats
    config, tasks = read_run()
    if _HELD.value:
        held = dataclasses.replace(config, sensitivity=dataclasses.replace(config.sensitivity, count=_HELD_WINDOWS))
        tasks[_HELD.value] = _task(_HELD.value, held)
    judges = [judge_of(name, task) for name, task in tasks.items()]
    rows = [row for judge in judges for row in _without_training(judge)]
    learning = dataclasses.replace(config.train, seeds=SEEDS)
    for sources in _sources(config.models):
        rows += _rows(f"trained on {' '.join(sources)}", sources, tasks, judges, learning)
    numbered = [a for a, level in enumerate(config.levels) if not isinstance(level, str)]
    if 0 < len(numbered) < len(config.levels):
        fewer = {name: _offering(task, numbered) for name, task in tasks.items()}
        rows += _rows("all, without formats by name", config.models, tasks, judges, learning, fewer)
    plain = dataclasses.replace(learning, potential=False)
    rows += _rows("all, rewards without potential", config.models, tasks, judges, plain)
    for number in _BLANKED.value:
        blanked = {name: _blanked(task, embedding.NAMES.index(number)) for name, task in tasks.items()}
        rows += _rows(f"all, without {number}", config.models, blanked, judges, learning)
    save_plots({"transfer": lambda: _plot(rows, judges, config.models)})
    return {"rows": rows}


def read_run() -> tuple[RunConfig, Tasks]:
    """Config and tasks of `--suite_run`, whose tables judge here, whatever judged there."""
    config = read_config(Path(_RUN.value) / workflow.CONFIG)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, evaluator="surrogate", soft=False))
    return config, {name: _task(name, config) for name in config.models}


def _task(name: str, config: RunConfig) -> Task:
    """Without what the estimate says of pairs, which a sum over tensors cannot judge."""
    task = workflow.prepare_task(name, load_model(name, config.dtype), config, Path(_RUN.value), print)
    return task._replace(problem=task.problem._replace(pairs=None))


def judge_of(name: str, task: Task) -> Judge:
    """The judge of a task, at the budgets of `train.probe_budgets`."""
    cost, loss = np.asarray(task.problem.cost, np.int64), np.asarray(task.loss, np.float64)
    budgets = np.asarray(train.probe_budgets(task.problem)).tolist()
    best, uniform = (
        totals(loss, budgets, functools.partial(method, cost, loss)) for method in (knapsack, simple.uniform)
    )
    return Judge(
        name,
        float(task.problem.unit),
        cost,
        loss,
        np.asarray(task.problem.expected, np.float64),
        budgets,
        best,
        uniform,
    )


def totals(loss: Float[np.ndarray, "T A"], budgets: list[int], choose: Choose) -> Float[np.ndarray, " B"]:
    """Loss of what is chosen at each budget."""
    return np.asarray([loss[np.arange(len(loss)), choose(units)].sum() for units in budgets])


def geometric_mean(ratios: Float[np.ndarray, " B"]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.log(ratios).mean()))


def _sources(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Each model alone, all but one, and all."""
    sizes = sorted({1, max(len(names) - 1, 1), len(names)})
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in sizes)


def _blanked(task: Task, column: int) -> Task:
    return task._replace(problem=task.problem._replace(embedding=task.problem.embedding.at[:, column].set(0.0)))


def _offering(task: Task, columns: list[int]) -> Task:
    """With some levels alone."""
    problem = task.problem._replace(cost=task.problem.cost[:, columns], expected=task.problem.expected[:, columns])
    return task._replace(problem=problem, loss=task.loss[:, columns])


def _without_training(judge: Judge) -> Iterator[Numbers]:
    for table, values in {"estimate": judge.estimate, "exact table": judge.loss}.items():
        for method in (knapsack, simple.greedy):
            yield judge.row(f"{table}, {method.__name__}", 0, functools.partial(method, judge.cost, values))
    yield judge.row("uniform", 0, functools.partial(simple.uniform, judge.cost, judge.loss))
    for seed in range(SEEDS):
        yield judge.row("random", seed, functools.partial(simple.random, judge.cost, judge.loss, seed=seed))


def _rows(
    method: str,
    sources: tuple[str, ...],
    tasks: Tasks,
    judges: list[Judge],
    config: TrainConfig,
    learning: Tasks | None = None,
) -> Iterator[Numbers]:
    """One training with several seeds, on other tasks where these are given; every seed's last actor on every model,
    without repair and with it."""
    learned_on = tuple((learning or tasks)[name] for name in sources)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    state = jax.vmap(lambda key: train.initial_state(key, learned_on, config))(keys)
    state, _ = train.learn(state, learned_on, config, config.iterations)
    for judge, seed in itertools.product(judges, range(config.seeds)):
        actor = jax.tree.map(lambda leaf, s=seed: leaf[s], state.learner.actor)
        policy = Policy(actor, config.sac.hidden, (), 0, sources)
        for how in ("rollout", "repaired"):
            choose = functools.partial(inference.choose, policy, tasks[judge.model].problem, repair=how == "repaired")
            yield judge.row(method, seed, choose, how)


def _plot(rows: list[Numbers], judges: list[Judge], models: tuple[str, ...]) -> Figure:
    """Per model the loss over the optimum at each budget, over all seeds, of policies that know it and that do not."""
    figure = Figure(figsize=(4 * len(judges), 4), layout="constrained")
    for axes, judge in zip(np.atleast_1d(figure.subplots(1, len(judges))), judges, strict=True):
        others = [model for model in models if model != judge.model]
        shown = {
            ("estimate, knapsack", ""): "optimum of the estimate",
            (f"trained on {' '.join(others)}", "rollout"): "policy that never saw it",
            (f"trained on {' '.join(others)}", "repaired"): "policy that never saw it, repaired",
            (f"trained on {judge.model}", "rollout"): "policy of this model",
        }
        for key, label in shown.items():
            mine = [row for row in rows if row["model"] == judge.model and (row["method"], row["how"]) == key]
            if mine:
                size = np.asarray(judge.budgets) * judge.unit / 1e6
                curves = np.asarray([row["over_optimum_by_budget"] for row in mine])
                (line,) = axes.plot(size, np.exp(np.log(curves).mean(axis=0)), marker=".", label=label)
                axes.fill_between(size, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15)
        axes.set(title=judge.model, xlabel="tensor data (MB)")
    figure.axes[0].set_ylabel("loss over that of the exact optimum")
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure

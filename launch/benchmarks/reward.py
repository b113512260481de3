"""The suite `reward` of launch/benchmark.py: what the reward is made of, and how training converges under it.

On the tables of `--suite_run`, as the suite `transfer`. Every variant is trained with the run's config on all its
models, three seeds, and judged every ten iterations: its greedy allocations under masks by the exact tables, loss over
that of the exact knapsack, geometric mean over models and budgets. `over_budget` is the share of greedy allocations
without masks that do not fit. `quality x 10` is the soft reward whose penalties are a tenth. A plot is written
beside --json.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measuring import Numbers, save_plots
from benchmarks.transfer import SEEDS, Judge, Tasks, geometric_mean, judge_of, read_run, totals
from jaxtyping import Float
from matplotlib.figure import Figure

from ramp_jax.policy import inference, train
from ramp_jax.policy.inference import Policy
from ramp_jax.policy.reward import Penalty
from ramp_jax.policy.train import TrainConfig

_EVERY = 10  # iterations between two judgements


def reward(repeats: int) -> Numbers:
    """Rows of variant × iteration, printed as they come (`repeats` is not used: nothing is timed)."""
    del repeats
    config, tasks = read_run()
    judges = [judge_of(name, task) for name, task in tasks.items()]
    rows = [row for name, how in _variants(config.train).items() for row in _curve(name, how, tasks, judges)]
    save_plots({"reward": lambda: _plot(rows)})
    return {"rows": rows}


def _variants(config: TrainConfig) -> dict[str, TrainConfig]:
    soft = functools.partial(dataclasses.replace, config, soft=True)
    paper = Penalty()
    tenth, tenfold = (
        Penalty(factor * paper.cliff, factor * paper.c_over, factor * paper.c_under) for factor in (0.1, 10)
    )
    return {
        "masks, regrets": config,
        "masks, plain losses": dataclasses.replace(config, potential=False),
        "soft, regrets": soft(),
        "soft, regrets, quality x 10": soft(penalty=tenth),
        "soft, regrets, quality / 10": soft(penalty=tenfold),
        "soft, regrets, no cliff": soft(penalty=dataclasses.replace(paper, cliff=0.0)),
        "soft, plain losses": soft(potential=False),
    }


def _curve(variant: str, config: TrainConfig, tasks: Tasks, judges: list[Judge]) -> Iterator[Numbers]:
    config = dataclasses.replace(config, seeds=SEEDS)
    learned_on = tuple(tasks.values())
    keys = jax.random.split(jax.random.key(0), SEEDS)
    state = jax.vmap(lambda key: train.initial_state(key, learned_on, config))(keys)
    for iteration in range(0, config.iterations + 1, _EVERY):
        if iteration:
            state, _ = train.learn(state, learned_on, config, _EVERY)
        found = [_judged(actor, config, tasks, judges) for actor in _actors(state.learner.actor)]
        row = {"variant": variant, "iteration": iteration}
        row |= {name: [numbers[name] for numbers in found] for name in found[0]}
        shown = "  ".join(f"{name} {np.mean(row[name]):.3f} ± {np.std(row[name], ddof=1):.3f}" for name in found[0])
        print(f"{variant:30} {iteration:4}  {shown}", flush=True)
        yield row


def _actors(stacked: Any) -> Iterator[Any]:
    return (jax.tree.map(lambda leaf, seed=seed: leaf[seed], stacked) for seed in range(SEEDS))


def _judged(actor: Any, config: TrainConfig, tasks: Tasks, judges: list[Judge]) -> dict[str, float]:
    """Loss over the optimum with masks, and the share over budget and the excess without them."""
    policy = Policy(actor, config.sac.hidden, (), 0, ())
    ratios, excess = [], []
    for judge in judges:
        known = tasks[judge.model].problem
        choose = functools.partial(inference.choose, policy, known, repair=False)
        ratios.append(totals(judge.loss, judge.budgets, choose) / judge.best)
        free = functools.partial(train.greedy, actor, known, hidden=config.sac.hidden, soft=True)
        chosen = [np.asarray(free(budget=jnp.int32(budget))) for budget in judge.budgets]
        used = np.asarray([judge.cost[np.arange(len(judge.cost)), actions].sum() for actions in chosen])
        excess.append(used / np.asarray(judge.budgets) - 1)
    over: Float[np.ndarray, " B"] = np.concatenate(excess)
    return {
        "over_optimum": geometric_mean(np.concatenate(ratios)),
        "over_budget": float((over > 0).mean()),
        "largest_excess": float(over.max()),
    }


def _plot(rows: list[Numbers]) -> Figure:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        iterations, values = [row["iteration"] for row in mine], np.asarray([row["over_optimum"] for row in mine])
        (line,) = axes.plot(iterations, np.exp(np.log(values).mean(axis=1)), marker=".", label=name)
        axes.fill_between(iterations, values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="iteration", ylabel="loss over that of the exact optimum", yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    return figure

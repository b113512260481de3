"""The jobs that `launch/` runs, from files to files: train a policy, allocate with it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.checkpoint import write_bytes
from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.evaluation.fisher import fisher_sensitivity
from ramp_jax.evaluation.sensitivity import exact_sensitivity
from ramp_jax.evaluation.table import Sensitivity
from ramp_jax.halo.export import check_writable
from ramp_jax.models import Model, load_model
from ramp_jax.policy import rollout, train
from ramp_jax.policy.rollout import Policy, load_policy
from ramp_jax.quantization import Stats, calibrate, fold

CONFIG, SENSITIVITY, METRICS, CHECKPOINT = "config.json", "sensitivity.npz", "metrics.jsonl", "checkpoint.msgpack"

Say = Callable[[str], None]


def tokens(model: Model, config: WindowsConfig, split: data.Split) -> Int[np.ndarray, "W T"]:
    """The windows that a config asks for; raises `ValueError` where the model brings no tokenizer."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so no text can be read; add its tokenizer files.")
    return data.windows(config.data, model.tokenizer, context=config.context, count=config.count, split=split)


def prepare(model: Model, calibration: WindowsConfig, fold_level: int) -> tuple[Model, Stats]:
    """The model folded for `fold_level`, and the statistics that decided it."""
    stats = calibrate(model, tokens(model, calibration, "calibration"))
    return fold(model, stats, fold_level), stats


def train_policy(config: RunConfig, workdir: Path, say: Say = print) -> Policy:
    """Load, calibrate, fold, measure and train; everything lands in `workdir`, and a stopped run goes on there.

    Raises `ValueError` where `workdir` holds a run of another config.
    """
    claim(workdir, config)
    if (workdir / rollout.POLICY_FILE).is_file():
        say(f"{workdir} already holds the policy of this config.")
        return load_policy(workdir)
    say(f"Loading {config.model}")
    model = load_model(config.model, config.dtype)
    write_bytes(workdir / CONFIG, (json.dumps(as_dict(config), indent=1) + "\n").encode())
    model, stats = prepare(model, config.calibration, config.fold_level)
    table = sensitivity(model, config, workdir, say)
    problem = rollout.problem(model, stats, config.levels)
    task = train.Task(problem, jnp.asarray(table.kld, jnp.float32))
    say(f"Training on {len(table.tensors)} tensors with levels {', '.join(map(str, config.levels))}")
    with (workdir / METRICS).open("a", encoding="utf-8") as metrics:

        def log(row: dict[str, Any]) -> None:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()

        key = jax.random.key(config.seed)
        best = train.run(key, task, config.train, log=log, checkpoint_path=workdir / CHECKPOINT)
    policy = Policy(best.actor, config.train.sac.hidden, config.levels, config.fold_level, (config.model,))
    policy.save(workdir)
    return policy


def claim(workdir: Path, config: RunConfig) -> None:
    """Make the folder; raises `ValueError` where it holds another run, `OSError` where it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {workdir} ({error.strerror}); choose another --workdir.") from error
    path = workdir / CONFIG
    check_writable(path)
    wanted = json.loads(json.dumps(as_dict(config)))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in wanted if wanted[name] != found.get(name)]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another {changed[0]} ({found.get(changed[0])}, not {wanted[changed[0]]}); "
                f"choose another --workdir or delete it."
            )


def sensitivity(model: Model, config: RunConfig, workdir: Path, say: Say) -> Sensitivity:
    """The table of a run, measured once in f32; one that was stopped goes on.

    Raises `ValueError` where `workdir` holds a table of other inputs.
    """
    windows = tokens(model, config.sensitivity, "calibration")
    say(f"What every tensor loses at every level ({config.sensitivity_method}), on {windows.size} tokens")
    measure = {"exact": exact_sensitivity, "fisher": fisher_sensitivity}[config.sensitivity_method]
    return measure(model.astype(jnp.float32), windows, config.levels, "sliding", path=workdir / SENSITIVITY)


def allocate(
    model: Model, policy: Policy, budget_bytes: int, calibration: WindowsConfig, output: Path, ref: str
) -> Allocation:
    """Calibrate, fold and allocate with a trained policy, and save the allocation; no perplexity is measured."""
    check_writable(output)
    started = time.monotonic()
    folded, stats = prepare(model, calibration, policy.fold_level)
    allocation = rollout.allocate(policy, folded, stats, budget_bytes=budget_bytes)
    allocation.save(
        output,
        model=ref,
        budget_bytes=budget_bytes,
        calibration=as_dict(calibration),
        trained_on=list(policy.trained_on),
        seconds=time.monotonic() - started,
    )
    return allocation

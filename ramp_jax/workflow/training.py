"""From models to a policy: measure, learn, and go on where it was stopped."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from ramp_jax.allocation import costs
from ramp_jax.config import RunConfig, as_dict, read_config
from ramp_jax.files import alone_in, rows_to, write_bytes
from ramp_jax.formats import written
from ramp_jax.halo.export import check_writable
from ramp_jax.models import Model, load_model
from ramp_jax.policy import inference, train
from ramp_jax.policy.inference import Policy, load_policy
from ramp_jax.quantization import REFERENCE, Encoder, importance_of
from ramp_jax.scoring import variants
from ramp_jax.sensitivity.exact import exact_sensitivity
from ramp_jax.sensitivity.fisher import fisher_sensitivity
from ramp_jax.sensitivity.table import Sensitivity
from ramp_jax.workflow.shared import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    Say,
    check_context,
    check_rounded,
    prepare,
    table_path,
    tokenizer_of,
    tokens,
)


def train_policy(config: RunConfig, workdir: Path, say: Say = print) -> Policy:
    """Load, calibrate, fold, measure and train; everything lands in `workdir`, and a stopped run goes on there.

    Raises `ValueError` where `workdir` holds a run of another config or the encoder cannot make its levels, `OSError`
    where another process works there.
    """
    check_rounded(config.levels, config.encoder)
    claim(workdir, config)
    with alone_in(workdir):
        return _train_policy(config, workdir, say)


def _train_policy(config: RunConfig, workdir: Path, say: Say) -> Policy:
    if (workdir / inference.POLICY_FILE).is_file():
        say(f"{workdir} already holds the policy of this config.")
        return load_policy(workdir)
    models = [load_model(ref, config.dtype, config.tokenizer_from, resident=False) for ref in config.models]
    for model in models:
        tokenizer_of(model)
        for windows in (config.calibration, config.sensitivity):
            check_context(windows.context, model.spec.context_length)
    write_bytes(workdir / CONFIG, (json.dumps(as_dict(config), indent=1) + "\n").encode())
    tasks = tuple(
        prepare_task(ref, model.in_memory(), config, workdir, say)
        for ref, model in zip(config.models, models, strict=True)
    )
    say(f"Training on {' and '.join(config.models)} with levels {', '.join(map(written, config.levels))}")
    log, key = rows_to(workdir / METRICS, "iteration"), jax.random.key(config.seed)
    best = train.run(key, tasks, config.train, log=log, checkpoint_path=workdir / CHECKPOINT)
    policy = Policy(best.actor, config.train.sac.hidden, config.levels, config.fold_level, config.models)
    policy.save(workdir)
    return policy


def prepare_task(ref: str, model: Model, config: RunConfig, workdir: Path, say: Say) -> train.Task:
    """What the policy learns on a model: calibrated, folded, measured and embedded."""
    say(f"Preparing {ref}")
    folded, stats = prepare(model, config.calibration, config.fold_level)
    encoder = REFERENCE if config.encoder == "reference" else Encoder(config.encoder, importance_of(model.spec, stats))
    table = sensitivity(folded, config, table_path(workdir, ref), say, encoder)
    task = train.Task(inference.problem(folded, stats, config.levels), jnp.asarray(table.kld, jnp.float32))
    if config.train.evaluator == "surrogate":
        return task
    windows = tokens(model, config.sensitivity, "calibration")
    table = costs(folded, config.levels)
    choices = variants.prepare(folded, model, windows, table, "sliding", encoder)
    return task._replace(true_loss=jax.tree_util.Partial(variants.mean_kld, choices))


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
        found = json.loads(json.dumps(as_dict(read_config(path))))
        changed = [name for name in wanted if wanted[name] != found.get(name)]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another {changed[0]} ({found.get(changed[0])}, not {wanted[changed[0]]}); "
                f"choose another --workdir or delete it."
            )


def sensitivity(model: Model, config: RunConfig, path: Path, say: Say, encoder: Encoder = REFERENCE) -> Sensitivity:
    """A table of a run, measured once in f32; one that was stopped goes on.

    Raises `ValueError` where `path` holds a table of other inputs.
    """
    windows = tokens(model, config.sensitivity, "calibration")
    say(f"What every tensor loses at every level ({config.sensitivity_method}), on {windows.size} tokens")
    measure = {"exact": exact_sensitivity, "fisher": fisher_sensitivity}[config.sensitivity_method]
    return measure(model.astype(jnp.float32), windows, config.levels, "sliding", path=path, encoder=encoder)

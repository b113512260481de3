"""Train an allocation policy on one model or several.

    python launch/train.py --config=configs/smollm2_135m.py --workdir=runs/smollm2-135m [--config.seed=1 ...]

Loads the models, calibrates and folds them, measures what every tensor loses at every level, and trains Soft
Actor-Critic on those tables. With `--config.train.evaluator=perplexity` the quantized model judges every episode
instead, with `mixed` the tables are corrected between scans by what whole allocations truly lose. `--workdir` receives
the policy, the tables, `metrics.jsonl` and `training.png`. A run that was stopped goes on with the same command.
"""

import dataclasses
from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.config import RunConfig, from_dict
from ramp_jax.files import read_rows
from ramp_jax.halo import report
from ramp_jax.models.references import model_files
from ramp_jax.policy.inference import POLICY_FILE
from ramp_jax.resources import check_output

_CONFIG = cli.define_config(RunConfig)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder that receives everything the run makes.")
_TOKENIZER = cli.define_tokenizer_from()
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    workdir = Path(_WORKDIR.value)
    config = from_dict(_CONFIG.value.to_dict())
    if _TOKENIZER.value:
        config = dataclasses.replace(config, tokenizer_from=_TOKENIZER.value)
    named = (config.calibration.data, config.sensitivity.data, config.tokenizer_from)
    inputs = [file for ref in config.models for file in model_files(ref)] + [Path(name) for name in named if name]
    for name in (workflow.CONFIG, workflow.METRICS, workflow.CHECKPOINT, POLICY_FILE, report.TRAINING_PNG):
        check_output(workdir / name, inputs)
    cli.announce(config.dtype, config.seed)
    check_output(workdir / workflow.CONFIG, [file for ref in config.models for file in model_files(ref)])
    workflow.train_policy(config, workdir)
    rows = read_rows(workdir / workflow.METRICS)
    picture = report.save_png(workdir / report.TRAINING_PNG, report.plot_training(rows))
    score = rows[-1]["best_loss_over_uniform"]
    print(f"Loss of its allocations over uniform ones, mean over budgets: {score:.3f}; see {picture}")
    print(
        f"Allocate with: python launch/allocate.py --source_policy={workdir} --model=... --budget_gb=... --output=..."
    )


if __name__ == "__main__":
    cli.run(main)

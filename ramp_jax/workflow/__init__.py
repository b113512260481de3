"""The jobs that `launch/` runs, from files to files: train a policy, allocate with it, export, evaluate, report."""

from ramp_jax.workflow.allocating import allocate, allocate_as, chooser, is_made
from ramp_jax.workflow.evaluation import evaluate, evaluate_tasks
from ramp_jax.workflow.exporting import check_export, export, exported_files, write_importance
from ramp_jax.workflow.reporting import facts
from ramp_jax.workflow.shared import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    Say,
    calibrated_on,
    check_context,
    check_rounded,
    job_inputs,
    prepare,
    table_path,
    tokenizer_of,
    tokens,
)
from ramp_jax.workflow.training import claim, prepare_task, sensitivity, train_policy

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "METRICS",
    "Say",
    "allocate",
    "allocate_as",
    "calibrated_on",
    "check_context",
    "check_export",
    "check_rounded",
    "chooser",
    "claim",
    "evaluate",
    "evaluate_tasks",
    "export",
    "exported_files",
    "facts",
    "is_made",
    "job_inputs",
    "prepare",
    "prepare_task",
    "sensitivity",
    "table_path",
    "tokenizer_of",
    "tokens",
    "train_policy",
    "write_importance",
]

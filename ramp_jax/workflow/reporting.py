"""What there is to report of an allocation."""

import dataclasses
from pathlib import Path

from ramp_jax.allocation import Saved, read_saved
from ramp_jax.allocators.allocator import MIX, RULES
from ramp_jax.halo.compare import COMPARISON, read_comparison
from ramp_jax.halo.report import Facts, read_metrics
from ramp_jax.policy import inference
from ramp_jax.policy.inference import load_policy
from ramp_jax.sensitivity.table import Sensitivity
from ramp_jax.workflow.shared import METRICS, table_path


def facts(allocation: Path, workdir: Path | None = None, gguf: str | None = None) -> Facts:
    """What there is to report of an allocation: its file, and what a folder holds of comparison, training and table.

    A table of another model is left out. Raises `ValueError` where something of it is damaged.
    """
    saved = read_saved(allocation)
    found = Facts(saved, allocation, gguf or f"{allocation.stem}.gguf", _source(saved, workdir))
    if workdir is None:
        return found
    compared, metrics = workdir / COMPARISON, workdir / METRICS
    comparison = read_comparison(compared) if compared.is_file() else None
    table = table_path(workdir, saved.get("model", ""))
    measured = Sensitivity.load(table) if table.is_file() else None
    if comparison and comparison["allocation"] != saved["sha256"]:
        raise ValueError(
            f"{compared} compares another allocation than {allocation}; run launch/compare.py with this one."
        )
    found = dataclasses.replace(
        found,
        comparison=comparison,
        metrics=read_metrics(metrics) if metrics.is_file() else (),
        table=measured if measured and {*measured.tensors} <= saved["formats"].keys() else None,
    )
    exported = gguf or (found.ours.file if found.ours else None)
    return dataclasses.replace(found, gguf=exported or found.gguf)


def _source(saved: Saved, workdir: Path | None) -> str:
    """The `--source_policy` with which an allocation was made, as far as its file and a folder tell."""
    name = saved.get("allocator", "").removesuffix(", refined")
    if name in (*RULES, inference.EVOLUTION, MIX):
        return name
    held = [inference.PRETRAINED] + ([str(workdir)] if workdir and (workdir / inference.POLICY_FILE).is_file() else [])
    sha256 = saved.get("allocator_sha256")
    return next((source for source in held if load_policy(source).allocator().sha256 == sha256), "DIR")

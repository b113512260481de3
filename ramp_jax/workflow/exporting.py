"""From an allocation to GGUF files, and what they are worth; importance matrices."""

import dataclasses
from pathlib import Path

import numpy as np

from ramp_jax.allocation import Allocation, export_metadata
from ramp_jax.checkpoint import digest
from ramp_jax.config import WindowsConfig
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.guard import Check, Guard, check
from ramp_jax.halo.recipe import write_recipe
from ramp_jax.halo.shards import plan
from ramp_jax.journal import Journal, beside
from ramp_jax.models import Model
from ramp_jax.quantization import EncoderName, calibrate, importance_of, recorded_encoder, write_imatrix
from ramp_jax.quantization.encoder_factory import calibration_windows
from ramp_jax.quantization.importance import Importance, read_imatrix
from ramp_jax.workflow.shared import job_inputs, job_journal, tokens


def write_importance(model: Model, calibration: WindowsConfig, output: Path) -> Importance:
    """Calibrate and write the importance matrix; a job that was killed goes on where it was.

    Raises `ValueError` where a killed job had other inputs.
    """
    windows = tokens(model, calibration, "calibration")
    with Journal(beside(output), job_inputs(model) | {"calibration tokens": digest(windows)}) as journal:
        importance = importance_of(model.spec, calibrate(model, windows, journal))
        write_imatrix(output, importance, calibration.data, calibration.count, calibration.context)
    return importance


def export(
    model: Model,
    allocation: str | Path,
    output: Path,
    encoder: EncoderName | None = None,
    imatrix: str | Path | None = None,
    trust_calibration: bool = False,
    *,
    shard_bytes: int | None = None,
    recipe: Path | None = None,
) -> int:
    """Write the GGUF of an allocation file, rounded by `encoder` or as the file records; returns its size in bytes.

    `trust_calibration` lets the file name any text to calibrate on, `shard_bytes` divides it as `export_gguf` does,
    `recipe` is a folder for `write_recipe`, which comes first. A job that was killed goes on where it was; raises
    `ValueError` where that had other inputs.
    """
    loaded = Allocation.load(allocation, model)
    used = encoder or ("best" if imatrix else loaded.made.get("encoder", "reference"))
    loaded = dataclasses.replace(loaded, made={**loaded.made, "encoder": used})
    rounding = recorded_encoder(loaded, model, encoder, imatrix, trust_calibration=trust_calibration)
    inputs = job_inputs(model) | {
        "allocation": digest(np.frombuffer(Path(allocation).read_bytes(), np.uint8)),
        "encoder": f"{rounding.effort} {rounding.compensated}",
        "calibration": digest((dict(rounding.importance), rounding.windows)),
        "size of shards": str(shard_bytes),
    }
    if recipe is not None:
        write_recipe(model, loaded, recipe, rounding)
    with job_journal(output, inputs) as journal:
        return export_gguf(model, loaded, output, rounding, journal, shard_bytes=shard_bytes)


def exported_files(model: Model, allocation: str | Path, output: Path, shard_bytes: int | None) -> list[Path]:
    """The files that `export` writes, the first of which programs are given.

    Raises `ValueError` where a tensor is larger than a file may be.
    """
    loaded = Allocation.load(allocation, model)
    return [shard.path for shard in plan(loaded, export_metadata(loaded), output, shard_bytes)]


def check_export(
    model: Model,
    allocation: str | Path,
    output: Path,
    heldout: WindowsConfig,
    guard: Guard = "check",
    imatrix: str | Path | None = None,
    trust_calibration: bool = False,
) -> Check:
    """Score an exported file on held-out text, beside llama.cpp's largest mix that fits: `halo.guard.check`."""
    loaded = Allocation.load(allocation, model)

    def importance() -> Importance:
        if imatrix is not None:
            return read_imatrix(imatrix, model.spec)
        windows = calibration_windows(loaded, model, trust_calibration=trust_calibration)
        return importance_of(model.spec, calibrate(model, windows))

    return check(model, loaded, output, tokens(model, heldout, "heldout"), importance, guard)

"""From a model and a budget to the file of an allocation."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramp_jax import data as texts
from ramp_jax import hosts
from ramp_jax.allocation import Allocation, Costs, costs, offered_levels, read_saved
from ramp_jax.allocators import Actions, Allocator
from ramp_jax.allocators.allocator import by_formats, has_own_levels
from ramp_jax.checkpoint import digest
from ramp_jax.config import WindowsConfig, as_dict
from ramp_jax.halo.compare import Choose
from ramp_jax.halo.export import check_writable
from ramp_jax.models import Model
from ramp_jax.models.references import resolve
from ramp_jax.models.sketch import same, sketch
from ramp_jax.overrides import Override
from ramp_jax.policy import inference
from ramp_jax.policy.refinement import refine
from ramp_jax.quantization import DEFAULT_ENCODER, Encoder, EncoderName, Stats, importance_of
from ramp_jax.scoring import variants
from ramp_jax.workflow.shared import job_inputs, job_journal, prepare, tokens

_REFINE_WINDOWS = 2  # of a true evaluation


def allocate(
    model: Model,
    allocator: Allocator,
    budget_bytes: int,
    calibration: WindowsConfig,
    output: Path,
    ref: str,
    encoder: EncoderName = DEFAULT_ENCODER,
    overrides: Sequence[Override] = (),
) -> Allocation:
    """Calibrate, fold, allocate, and save the allocation; a job that was killed goes on where it was.

    `overrides` decide about single tensors before. No quantized model is run, but for as many of them on calibration
    text as the allocator evaluates. Raises `ValueError` where a killed job had other inputs.
    """
    check_writable(output)
    started, how = time.monotonic(), _seen(model, calibration)
    made = _made(allocator, model, ref, budget_bytes, encoder)
    inputs = job_inputs(model) | {
        "calibration tokens": how["tokens"],
        "level of folding": f"{allocator.fold_level}",
        "levels": " ".join(map(str, allocator.levels)),
    }
    with job_journal(output, inputs) as journal:
        folded, stats = prepare(model, calibration, allocator.fold_level, journal)
        evaluate = None
        if allocator.evaluations:
            evaluate = _true_loss(model, folded, stats, calibration, costs(folded, allocator.levels, overrides))
        allocation = inference.allocate(
            allocator, folded, stats, budget_bytes=budget_bytes, overrides=overrides, evaluate=evaluate, journal=journal
        )
        allocation = dataclasses.replace(allocation, calibration=how, made={**allocation.made, **made})
        if hosts.index() == 0:
            allocation.save(output, seconds=allocator.seconds + time.monotonic() - started)
    return allocation


def _seen(model: Model, calibration: WindowsConfig) -> dict[str, Any]:
    """What an allocation records of its calibration."""
    seen: dict[str, Any] = {"text": texts.fingerprint(calibration.data)}
    seen["tokens"] = digest(tokens(model, calibration, "calibration"))
    if len(parts := texts.parts_of(calibration.data)) > 1:
        seen["texts"] = [texts.fingerprint(part.source) for part in parts]
    return as_dict(calibration) | seen


def _made(allocator: Allocator, model: Model, ref: str, budget_bytes: int, encoder: EncoderName) -> dict[str, Any]:
    """How an allocation is made, as its file says it."""
    return {
        "model": ref,
        "weights": sketch(model),
        "budget_bytes": budget_bytes,
        "encoder": encoder,
        "allocator": allocator.name,
        **({"allocator_sha256": allocator.sha256} if allocator.sha256 else {}),
        **({} if allocator.fold_level is None else {"fold_level": allocator.fold_level}),
        "refine_evals": allocator.evaluations,
        "levels": allocator.levels,
    }


def is_made(
    path: Path,
    allocator: Allocator,
    model: Model,
    budget_bytes: int,
    calibration: WindowsConfig,
    encoder: EncoderName,
    overrides: Sequence[Override] = (),
) -> bool:
    """Whether a file holds the allocation that `allocate` would make of the same arguments."""
    saved: Mapping[str, Any] = read_saved(path)
    wanted = _made(allocator, model, "", budget_bytes, encoder) | {"overrides": tuple(overrides) or None}
    found = {name: saved.get(name) for name in wanted} | {"model": ""}
    found["levels"] = saved.get("levels", allocator.levels)  # files of version 0.2 do not say
    seen = as_dict(calibration) | {"tokens": digest(tokens(model, calibration, "calibration"))}
    alike = same(saved.get("weights", ()), wanted.pop("weights"))
    del found["weights"]
    return alike and found == wanted and seen.items() <= dict(saved.get("calibration", {})).items()


def allocate_as(
    model: Model,
    path: str | Path,
    levels: tuple[float | str, ...],
    calibration: WindowsConfig,
    output: Path,
    ref: str,
    encoder: EncoderName = DEFAULT_ENCODER,
    *,
    evaluations: int = 0,
    fold_level: float | None = None,
) -> Allocation:
    """As `allocate`, with the types of a GGUF of the same model, whoever made it; the windows are for the encoder.

    True `evaluations` refine them among `levels` and the file's own types, in as many bytes. Without these and without
    folding no pass over the model is made. Raises as `Allocation.from_gguf`.
    """
    check_writable(output)
    started, path = time.monotonic(), resolve(path)
    known = Allocation.from_gguf(path, model)
    allocator = by_formats(f"types of {path.name}", model.spec, known.formats, levels, fold_level=fold_level)
    if evaluations or fold_level is not None:
        allocator = refine(allocator, evaluations) if evaluations else allocator
        return allocate(model, allocator, known.file_bytes, calibration, output, ref, encoder)
    made = _made(allocator, model, ref, known.file_bytes, encoder)
    known = dataclasses.replace(known, calibration=_seen(model, calibration), made=made)
    if hosts.index() == 0:
        known.save(output, seconds=time.monotonic() - started)
    return known


def chooser(source: str | Path, allocation: str | Path, model: Model) -> Choose:
    """How whoever made an allocation file chooses at other budgets; `source` names it, `model` is as it was loaded.

    Raises `ValueError` where `source` is not who made the file, as far as the file says.
    """
    saved = read_saved(allocation)
    overrides = saved.get("overrides", ())
    levels = () if has_own_levels(source) else offered_levels(saved)
    allocator = inference.find_allocator(source, levels=levels or None, evaluations=saved.get("refine_evals", 0))
    made_by = saved.get("allocator")
    if (allocator.name, allocator.sha256) != (made_by, saved.get("allocator_sha256")):
        same_name = " of other weights" if allocator.name == made_by else ""
        raise ValueError(
            f"{allocation} was made by {made_by}, and {source} is {allocator.name}{same_name}; name with "
            f"--source_policy who made it, so that what is chosen at other budgets belongs to it."
        )

    def choose(folded: Model, stats: Stats, budgets: Sequence[int]) -> list[Allocation]:
        how = saved["calibration"]
        windows = WindowsConfig(how["data"], how["context"], how["count"])
        table = costs(folded, allocator.levels, overrides)
        evaluate = _true_loss(model, folded, stats, windows, table) if allocator.evaluations else None
        return inference.allocations(allocator, folded, stats, budgets, overrides, evaluate=evaluate)

    return choose


def _true_loss(
    model: Model, folded: Model, stats: Stats, calibration: WindowsConfig, table: Costs
) -> Callable[[Actions], float]:
    """Mean KL divergence of level indices on the first calibration windows, rounded with importance."""
    few = dataclasses.replace(calibration, count=min(calibration.count, _REFINE_WINDOWS))
    encoder = Encoder("reference", importance_of(model.spec, stats))
    choices = variants.prepare(folded, model, tokens(model, few, "calibration"), table, encoder=encoder)
    return variants.measuring(choices)

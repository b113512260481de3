"""The encoder that an allocation is evaluated and exported with: by name, fed with the calibration it records."""

from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int

from ramp_jax import data
from ramp_jax.allocation import Allocation, read_saved
from ramp_jax.formats.check import EncodeCache
from ramp_jax.models import Model
from ramp_jax.quantization import REFERENCE, Encoder, EncoderName, calibrate, importance_of, read_imatrix, refold
from ramp_jax.quantization.compensate import compensate

DEFAULT: EncoderName = "compensated"
"""For new allocations; those that record none were made for ggml's own bytes."""


def best(model: Model, windows: Int[np.ndarray, "W T"]) -> Encoder:
    """The wider search, weighted by what `model` (folded or not) does on calibration windows; encodes nothing twice."""
    return Encoder("best", importance_of(model.spec, calibrate(model, windows)), EncodeCache())


def make(
    name: EncoderName,
    model: Model,
    windows: Int[np.ndarray, "W T"],
    allocation: Allocation,
    weighted: Encoder | None = None,
) -> Encoder:
    """The encoder of that name for an allocation, with what `model` (folded or not) does on calibration windows.

    `weighted` is `best` of the same model and windows where that is known. Raises `ValueError` for an unknown name.
    """
    if name == "reference":
        return REFERENCE
    weighted = best(model, windows) if weighted is None else weighted
    if name == "best":
        return weighted
    if name == "compensated":
        return compensate(refold(model, allocation.folding), allocation, windows, weighted)
    raise ValueError(f"unknown encoder {name!r}; choose {', '.join(get_args(EncoderName))}.")


def recorded(
    path: str | Path, model: Model, name: EncoderName | None = None, imatrix: str | Path | None = None
) -> Encoder:
    """The encoder that the allocation file at `path` asks for, or the one of that name.

    `model` is as it was loaded. What calibration found is found again on the windows that the file records, or, for
    `best`, read from an importance matrix of llama.cpp. Raises `ValueError` where the file does not say how it was
    calibrated.
    """
    notes = read_saved(path)
    name = name or ("best" if imatrix else notes.get("encoder", "reference"))
    if imatrix is not None:
        if name != "best":
            raise ValueError(f"--imatrix serves --encoder=best, not {name}; leave one of them out.")
        return Encoder("best", read_imatrix(imatrix, model.spec))
    if name == "reference":
        return REFERENCE
    return make(name, model, calibration_windows(path, model), Allocation.load(path, model))


def calibration_windows(path: str | Path, model: Model) -> Int[np.ndarray, "W T"]:
    """The windows that an allocation was calibrated on; raises `ValueError` where it does not say or has no tokens."""
    calibration = read_saved(path).get("calibration")
    if not calibration:
        raise ValueError(f"{path} does not say what it was calibrated on; pass --imatrix=FILE or --encoder=reference.")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so the calibration text cannot be read; pass --imatrix=FILE.")
    return data.windows(
        calibration["data"], model.tokenizer, context=calibration["context"], count=calibration["count"]
    )

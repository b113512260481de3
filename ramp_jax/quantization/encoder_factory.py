"""Encoders fed with what calibration saw: by name for a model and windows, or as an allocation file records them."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.checkpoint import digest
from ramp_jax.models import Model
from ramp_jax.quantization.encoder import REFERENCE, Encoder, EncoderName
from ramp_jax.quantization.importance import Importance, Origin, load_imatrix


def make_encoder(
    name: EncoderName,
    windows: Int[np.ndarray, "W T"],
    *,
    importance: Importance | None = None,
    dataset: str | None = None,
) -> Encoder:
    """The encoder of that name; what it needs to know of a model is found on calibration windows.

    `importance` is that of the model where it is known already, `dataset` what the windows' text is called. Raises
    `ValueError` for an unknown name.
    """
    if name not in get_args(EncoderName):
        raise ValueError(f"unknown encoder {name!r}; choose {', '.join(get_args(EncoderName))}.")
    if name == "reference":
        return REFERENCE
    compensated = name == "compensated"
    return Encoder(
        "best",
        {} if importance is None else importance,
        windows=windows if compensated or importance is None else None,
        compensated=compensated,
        origin=Origin(dataset=dataset, chunks=len(windows), chunk_size=windows.shape[1]),
    )


def recorded_encoder(
    allocation: Allocation,
    model: Model,
    name: EncoderName | None = None,
    imatrix: str | Path | None = None,
    *,
    trust_calibration: bool = False,
    say: Callable[[str], None] = print,
) -> Encoder:
    """The encoder that an allocation asks for, or the one of that name.

    `model` is as it was loaded. What calibration found is found again on the windows that the allocation records (see
    `calibration_windows`), or, for `best`, read from an importance matrix of llama.cpp. Raises `ValueError` where it
    does not say how it was calibrated, or names a text that it may not.
    """
    name = name or ("best" if imatrix else allocation.made.get("encoder", "reference"))
    if imatrix is not None:
        if name != "best":
            raise ValueError(f"--imatrix serves --encoder=best, not {name}; leave one of them out.")
        importance, origin = load_imatrix(imatrix, model.spec)
        return Encoder("best", importance, origin=origin)
    if name == "reference":
        return REFERENCE
    windows = calibration_windows(allocation, model, trust_calibration=trust_calibration, say=say)
    return make_encoder(name, windows, dataset=allocation.calibration["data"])


def calibration_windows(
    allocation: Allocation, model: Model, *, trust_calibration: bool = False, say: Callable[[str], None] = print
) -> Int[np.ndarray, "W T"]:
    """The windows that an allocation was calibrated on; `say` receives whose text is read, before it is.

    An allocation may come from anyone, so a text that lies outside (`data.is_inside`) is read only with
    `trust_calibration`. Raises `ValueError` where it may not be read or is not named, text or tokens have changed
    since, or the model has no tokenizer.
    """
    how = allocation.calibration
    if not how:
        raise ValueError(
            "the allocation does not say what it was calibrated on; pass --imatrix=FILE or --encoder=reference."
        )
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, so the calibration text cannot be read; pass --imatrix=FILE.")
    if not (trust_calibration or data.is_inside(how["data"])):
        raise ValueError(
            f"the allocation asks for its calibration text {how['data']!r}, which lies outside of this folder; pass "
            f"--trust_calibration where that may be read, else --imatrix=FILE or --encoder=reference."
        )
    say(f"Calibration text, as the allocation says: {how['data']}")
    if how["text"] != data.fingerprint(how["data"]):
        raise ValueError(
            f"the text of {how['data']!r} is not the one that the allocation was calibrated on; restore it, or pass "
            f"--imatrix=FILE."
        )
    windows = data.windows(how["data"], model.tokenizer, context=how["context"], count=how["count"])
    if how["tokens"] != digest(windows):
        raise ValueError(
            f"the tokens of {how['data']!r} are not those that the allocation was calibrated on; name the tokenizer of "
            f"that time with --tokenizer_from, or pass --imatrix=FILE."
        )
    return windows

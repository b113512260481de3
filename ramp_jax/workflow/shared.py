"""What several jobs need: windows, a prepared model, the names of a run's files, and the journal of a long job."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from ramp_jax import data as texts
from ramp_jax import hosts
from ramp_jax.allocation import EncoderName, read_saved
from ramp_jax.checkpoint import digest
from ramp_jax.config import WindowsConfig
from ramp_jax.formats import ordered, unweighted
from ramp_jax.formats.registry import Effort
from ramp_jax.journal import NOWHERE, Followed, Journal, beside, code_version
from ramp_jax.models import Model, store
from ramp_jax.models.decoder import weights_dtype
from ramp_jax.quantization import Stats, calibrate, calibrate_and_fold

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.msgpack"

Say = Callable[[str], None]


def tokens(model: Model, config: WindowsConfig, split: texts.Split) -> Int[np.ndarray, "W T"]:
    """The windows that a config asks for; raises `ValueError` where they are longer than the model's context, or it
    brings no tokenizer."""
    tokenizer = tokenizer_of(model)
    check_context(config.context, model.spec.context_length)
    return texts.windows(config.data, tokenizer, context=config.context, count=config.count, split=split)


def check_context(context: int, longest: int) -> None:
    """Raise `ValueError` where windows of `context` tokens are longer than a model's context."""
    if context > longest:
        raise ValueError(
            f"windows of {context} tokens are longer than the {longest} that the model was made for; choose a shorter "
            f"--context."
        )


def check_rounded(levels: Sequence[float | str], encoder: EncoderName | Effort) -> None:
    """Raise `ValueError` where the encoder cannot make a format that is to be chosen among."""
    if encoder == "reference" and (unmade := set(levels) - set(unweighted(levels))):
        raise ValueError(
            f"{ordered(unmade)[0]} is rounded by importance only, which encoder=reference goes without; choose another "
            f"encoder or other levels."
        )


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises `ValueError` where it has none, without which nothing is allocated or exported."""
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so no text can be read and llama.cpp runs no file of it; add its tokenizer "
            "files, or name a GGUF of the same vocabulary with --tokenizer_from=FILE.gguf."
        )
    return model.tokenizer


def prepare(
    model: Model, calibration: WindowsConfig, fold_level: float | None, journal: Journal = NOWHERE
) -> tuple[Model, Stats]:
    """The model folded for `fold_level` or, where that is None, as it is, and the statistics that decided it."""
    windows = tokens(model, calibration, "calibration")
    if fold_level is None:
        return model, calibrate(model, windows, journal)
    return calibrate_and_fold(model, windows, fold_level, journal=journal)


def table_path(workdir: Path, ref: str) -> Path:
    """Where a run keeps the sensitivity table of one of its models."""
    return workdir / f"sensitivity-{Path(ref).name}.npz"


def calibrated_on(allocation: str | Path) -> str | None:
    """The name of the text that an allocation file was calibrated on, None where it does not say."""
    return read_saved(allocation).get("calibration", {}).get("data")


def job_inputs(model: Model) -> dict[str, str]:
    """What all steps of a long job on a model depend on."""
    return {
        "model": store.fingerprint(model.params),
        "folding": digest(model.folding),
        "dtype": str(weights_dtype(model.params)),
        "code": code_version(),
    }


def job_journal(output: Path, inputs: dict[str, str]) -> Journal:
    """What process 0 writes beside its output and the others read."""
    own = Journal(beside(output), inputs) if hosts.index() == 0 else Followed(beside(output))
    hosts.barrier()
    return own

"""Flags that several scripts have."""

import re
from collections.abc import Iterable
from typing import Any, get_args

from absl import flags
from ml_collections import config_flags

from ramp_jax import hosts
from ramp_jax.config import field_names
from ramp_jax.models.load import Dtype
from ramp_jax.quantization import DEFAULT_ENCODER, EncoderName

TEXTS = (
    "Calibration text: builtin, mixture (prose, code, lists, languages), a text file, conversations as JSON Lines with "
    "messages, hf:NAME:CONFIG:SPLIT, or several with weights, as in builtin:0.5,notes.txt:0.5."
)


def refuse_flags(names: Iterable[str], where: str) -> None:
    """Raise `ValueError` where flags were given that would be ignored: `where`, as in "without --tasks"."""
    if given := [f"--{name}" for name in names if flags.FLAGS[name].present]:
        raise ValueError(f"{' and '.join(given)} would be ignored {where}; leave it out.")


def define_config(cls: type) -> flags.FlagHolder[Any]:
    """`--config`: a file whose `get_config()` gives the values of a `cls`, and --config.FIELD=VALUE for each field."""
    names = ", ".join(field_names(cls))
    text = f"A file of configs/. After it, --config.FIELD=VALUE replaces any of its fields: {names}."
    return config_flags.DEFINE_config_file("config", None, text)


def define_dtype(default: Dtype, help_text: str) -> flags.FlagHolder[str]:
    """`--dtype`: what matrices are in while they are computed with."""
    return flags.DEFINE_enum("dtype", default, get_args(Dtype), help_text)


def define_trust_calibration() -> flags.FlagHolder[bool]:
    """`--trust_calibration`: whether an allocation may name any text."""
    return flags.DEFINE_bool(
        "trust_calibration",
        False,
        "Read the calibration text that the allocation names, whatever file or data set that is; without it only "
        "built-in texts and files in the folder of this command are read.",
    )


def define_tokenizer_from() -> flags.FlagHolder[str | None]:
    """`--tokenizer_from`: whose vocabulary takes the place of the model's own."""
    return flags.DEFINE_string(
        "tokenizer_from",
        None,
        "A GGUF of the same vocabulary, whose tokenizer is used and exported instead of the model's own.",
    )


def define_hosts() -> None:
    """`--hosts` and `--patience`: processes that work on one job."""
    flags.DEFINE_string(
        "hosts",
        None,
        "Run the same command in every process of a job, whose --output lies where all see it: auto under SLURM "
        "and on TPU pods, else ADDRESS:PORT,COUNT,INDEX of process 0, of all and of this one.",
    )
    flags.register_validator(
        "hosts",
        lambda text: text in (None, "auto") or re.fullmatch(r"[^,]+:\d+,\d+,\d+", text),
        "must be auto, or as in 10.0.0.1:8476,4,0.",
    )
    flags.DEFINE_float(
        "patience", hosts.PATIENCE, "Seconds without a sign of life, after which a process of --hosts is given up."
    )
    must_be("patience", 1e6)


def define_mesh() -> None:
    """`--mesh`: how the devices of this machine share the work."""
    flags.DEFINE_string(
        "mesh",
        None,
        "Devices that windows and chunks of rows are dealt out to, by devices that the rows of a matrix are cut over, "
        "as in 4x2. Default: all of them by 1.",
    )
    flags.register_validator(
        "mesh", lambda text: text is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", text), "must be two numbers, as in 4x2."
    )


def define_encoder(*, recorded: bool = True) -> flags.FlagHolder[str | None]:
    """`--encoder`: how weights become codes; by default what the allocation records, or `DEFAULT_ENCODER`."""
    default = f" Default: what the allocation records; of a new one {DEFAULT_ENCODER}." if recorded else ""
    return flags.DEFINE_enum(
        "encoder",
        None if recorded else DEFAULT_ENCODER,
        get_args(EncoderName),
        "How weights are rounded: as ggml does without importance, by a wider search weighted by what calibration saw, "
        f"or with every column's error made up for in later ones.{default}",
    )


def must_be(name: str, most: float) -> None:
    """Let a flag hold nothing but a number above 0, up to `most`: bounds of absl let pass what is no number."""
    flags.register_validator(
        name, lambda value: value is None or 0 < value <= most, f"must be a number above 0, up to {most:,.0f}."
    )

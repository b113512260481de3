"""What a run is made of: frozen, and readable from the dictionaries in `configs/`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from ramp_jax import schema
from ramp_jax.allocation import FoldLevel, Levels
from ramp_jax.allocators.allocator import FOLD_LEVEL
from ramp_jax.formats import levels_of
from ramp_jax.formats.registry import Effort
from ramp_jax.models.load import Dtype
from ramp_jax.policy.train import TrainConfig

SensitivityMethod = Literal["exact", "fisher"]


@dataclasses.dataclass(frozen=True)
class WindowsConfig:
    """`count` windows of `context` tokens from `data` (`builtin`, a text file, or `hf:NAME:CONFIG:SPLIT`)."""

    data: schema.Name = "builtin"
    context: Annotated[int, schema.within(2, 2**31 - 1)] = 512
    count: schema.Count = 8


def _different(models: tuple[str, ...]) -> bool:
    """Whether each has a name of its own, under which files of a run are kept."""
    return 0 < len({Path(model).name for model in models}) == len(models)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run: the models to learn on, their calibration and sensitivity windows, the levels, and the learner.

    `encoder` rounds the weights whose sensitivity is measured: `reference` as ggml without importance, or `best`.
    `sensitivity_method` is `exact` (half a forward pass per tensor and level) or `fisher` (an estimate from one
    backward pass for all of them, for models that are too large to measure). `tokenizer_from` is a GGUF whose
    vocabulary takes the place of the models' own.
    """

    models: Annotated[tuple[schema.Name, ...], schema.Check(_different, "at least one model, none of them twice")] = (
        "smollm2-135m",
    )
    dtype: Dtype = "auto"
    seed: Annotated[int, schema.within(0, 2**31 - 1)] = 0
    levels: Levels = (4, 5, 8)
    fold_level: FoldLevel = FOLD_LEVEL
    encoder: Effort = "best"
    calibration: WindowsConfig = dataclasses.field(default_factory=WindowsConfig)
    sensitivity: WindowsConfig = dataclasses.field(default_factory=lambda: WindowsConfig(context=64, count=2))
    sensitivity_method: SensitivityMethod = "exact"
    tokenizer_from: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def field_names(cls: type, prefix: str = "") -> list[str]:
    """All fields of a config by the names under which a command line replaces them."""
    names = []
    for field in dataclasses.fields(cls):
        kind: Any = field.type
        inside = dataclasses.is_dataclass(kind)
        names += field_names(kind, f"{prefix}{field.name}.") if inside else [prefix + field.name]
    return names


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as in a config file or JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], cls: type = RunConfig) -> Any:
    """Inverse of `as_dict`; fields that are left out keep their defaults.

    Raises `ValueError` for a field that the config does not have, or whose value is not what it expects.
    """
    try:
        return schema.read(cls, {**values, "levels": _levels(values["levels"])} if "levels" in values else values)
    except ValueError as error:
        raise ValueError(
            f"the config does not serve: {schema.cause_of(error)}; change it there or with --config.FIELD=VALUE."
        ) from error


def _levels(value: Any) -> Any:
    """Levels as they are, or as `--levels=4,IQ3_S` has them, which a command line leaves as one text."""
    one = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return levels_of(one.split(",")) if isinstance(one, str) and "," in one else value


def read_config(path: Path) -> RunConfig:
    """The config that a training run keeps in its workdir; raises `ValueError` where it is damaged."""
    with schema.gate(path, "the config of a run", "choose another --workdir, or delete it and train again"):
        return schema.read(RunConfig, schema.read_json(path))

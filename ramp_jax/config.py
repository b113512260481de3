"""What a run is made of: frozen, and readable from the dictionaries in `configs/`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ramp_jax.allocators.allocator import FOLD_LEVEL
from ramp_jax.formats.registry import Effort
from ramp_jax.policy.train import TrainConfig

SensitivityMethod = Literal["exact", "fisher"]


@dataclasses.dataclass(frozen=True)
class WindowsConfig:
    """`count` windows of `context` tokens from `data` (`builtin`, a text file, or `hf:NAME:CONFIG:SPLIT`)."""

    data: str = "builtin"
    context: int = 512
    count: int = 8


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run: the models to learn on, their calibration and sensitivity windows, the levels, and the learner.

    `encoder` rounds the weights whose sensitivity is measured: `reference` as ggml without importance, or `best`.
    `sensitivity_method` is `exact` (half a forward pass per tensor and level) or `fisher` (an estimate from one
    backward pass for all of them, for models that are too large to measure). `tokenizer_from` is a GGUF whose
    vocabulary takes the place of the models' own.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    dtype: str = "auto"
    seed: int = 0
    levels: tuple[float, ...] = (4, 5, 8)
    fold_level: float = FOLD_LEVEL
    encoder: Effort = "best"
    calibration: WindowsConfig = dataclasses.field(default_factory=WindowsConfig)
    sensitivity: WindowsConfig = dataclasses.field(default_factory=lambda: WindowsConfig(context=64, count=2))
    sensitivity_method: SensitivityMethod = "exact"
    tokenizer_from: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        names = [Path(model).name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models are {self.models!r}; name at least one, and none twice.")
        if self.sensitivity_method not in (known := get_args(SensitivityMethod)):
            raise ValueError(f"sensitivity_method is {self.sensitivity_method!r}; choose {' or '.join(known)}.")
        if self.encoder not in (known := get_args(Effort)):
            raise ValueError(f"encoder is {self.encoder!r}; the table is measured with {' or '.join(known)}.")


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

    Raises `ValueError` for a name that the config does not have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"the config has no {unknown[0]!r}; it has {', '.join(fields)}.")
    return cls(**{name: _value(fields[name].type, value) for name, value in values.items()})


def _value(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(value, kind)
    return tuple(value) if isinstance(value, list | tuple) else value

"""Configs of training runs, as a workdir keeps them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mutations import Kind, Mutation, objects, raw
from ramp_jax.config import RunConfig, as_dict, read_config

_WINDOWS = {"data": "builtin", "context": 512, "count": 8}
_SAC = {
    **{"hidden": [128, 32], "learning_rate": 1e-3, "alpha_learning_rate": 3e-3, "initial_alpha": 0.1},
    **{"entropy_share": 0.1, "discount": 1.0, "target_rate": 0.01, "max_grad_norm": 10.0, "batch_size": 512},
}
_TRAIN = {
    **{"iterations": 150, "episodes": 16, "updates": 32, "replay_iterations": 64, "seeds": 2, "log_every": 10},
    **{"potential": True, "narrowed": 0.0, "thinned": 0.0, "shift": 0.0, "soft": False},
    **{"evaluator": "surrogate", "sac": _SAC},
    "penalty": {"cliff": 1.0, "c_over": 10.0, "c_under": 0.1},
}
_DEFAULTS = {
    **{"models": ["smollm2-135m"], "dtype": "auto", "seed": 0, "levels": [4, 5, 8], "fold_level": 4.5},
    **{"encoder": "best", "calibration": _WINDOWS, "sensitivity": _WINDOWS, "sensitivity_method": "exact"},
    **{"tokenizer_from": None, "train": _TRAIN},
}
"""What fields that are left out are, of windows those of windows; all of `sensitivity` left out is 2 of 64 tokens."""


def make(folder: Path) -> Path:
    """All defaults, with a second model."""
    content = _DEFAULTS | {
        "models": ["tiny", "other"],
        "levels": [2, "IQ3_S", 8],
        "sensitivity": {"data": "builtin", "context": 64, "count": 2},
    }
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    return folder / "config.json"


def load(path: Path) -> RunConfig:
    """As whoever goes on with a run does."""
    return read_config(path)


def right(path: Path, result: RunConfig) -> bool:
    """What `json` finds in the file over the defaults, value by value and type by type."""
    content = json.loads(path.read_bytes())
    content.setdefault("sensitivity", {"data": "builtin", "context": 64, "count": 2})
    return _same(_over(_DEFAULTS, content), json.loads(json.dumps(as_dict(result)))) and _sound(result)


def _over(defaults: Any, content: Any) -> Any:
    if not isinstance(defaults, dict):
        return content
    return {**defaults, **{key: _over(defaults.get(key), value) for key, value in content.items()}}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _sound(config: RunConfig) -> bool:
    """Whether every number can be what it is for."""
    train, sac = config.train, config.train.sac
    numbers = [train.iterations, train.episodes, train.updates, train.replay_iterations, train.seeds, train.log_every]
    numbers += [sac.batch_size, *sac.hidden, config.calibration.count, config.sensitivity.count]
    reals = [
        train.narrowed,
        train.thinned,
        train.shift,
        config.fold_level,
        sac.learning_rate,
        sac.initial_alpha,
        sac.max_grad_norm,
    ]
    return (
        all(type(n) is int and n >= 1 for n in numbers)
        and all(np.isfinite(value) and value >= 0 for value in reals)
        and objects.in_order(config.levels)
        and len(config.models) > 0
        and all(isinstance(name, str) and name for name in config.models)
    )


_MUTATIONS: dict[str, Mutation] = {**objects.of_file(), **raw.of_file()}

KINDS = (Kind("config", make, _MUTATIONS, load, right),)

"""Allocations: JSON as a whole and its fields, and the scales of folding inside their base64."""

import base64
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mutations import Kind, Mutation, objects, raw
from ramp_jax.allocation import Allocation, from_levels, read_saved
from ramp_jax.models import Model, allocatable
from ramp_jax.models.layout import foldable
from ramp_jax.models.spec import describe, make_spec

_GOOD = "good.json"  # beside the input, as it was written
_EXPORTABLE = {
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
}


class Loaded(NamedTuple):
    """What the project believes of an allocation."""

    allocation: Allocation
    encoder: str


@functools.cache
def model() -> Model:
    """A tiny Llama without weights: allocations look at its description alone."""
    sizes = {"n_layers": 2, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_size": 64, "d_ff": 512}
    more = {"tied": False, "context_length": 256, "rope_theta": 5000.0, "norm_eps": 1e-5, "vocab_size": 320}
    spec = make_spec("llama", **sizes, **more)
    return Model(spec, {}, describe(spec, "tiny", 0))


def make(folder: Path) -> Path:
    """As `launch/allocate.py` writes it, with levels in turn and scales of folding."""
    rng, spec = np.random.default_rng(0), model().spec
    levels = [(4, 4.5, 8)[i % 3] for i in range(len(allocatable(spec)))]
    chosen = from_levels(model(), levels)
    folding = {n: np.exp(rng.normal(0, 0.3, a.width)).astype(np.float32) for n, a in foldable(spec).items()}
    how = {"data": "builtin", "context": 64, "count": 8, "text": 64 * "a", "tokens": 64 * "b"}
    notes = {"model": "tiny", "budget_bytes": 10**6, "allocator": "fisher", "refine_evals": 0, "seconds": 1.5}
    offered = {fmt: {"bytes": 10**4, "loss": 0.1, "change": -0.01} for fmt in ("IQ4_XS", "Q8_0")}
    choices = {"choices": dict.fromkeys(list(chosen.formats)[:3], offered)}
    made = Allocation(spec, chosen.metadata, chosen.formats, folding, how, choices)
    made.save(folder / "alloc.json", encoder="best", **notes)
    (folder / _GOOD).write_bytes((folder / "alloc.json").read_bytes())
    return folder / "alloc.json"


def make_unsigned(folder: Path) -> Path:
    """The same without its digest, as who edits it by hand leaves it."""
    path = make(folder)
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    return path


def load(path: Path) -> Loaded:
    """The allocation and its encoder."""
    return Loaded(Allocation.load(path, model()), read_saved(path).get("encoder", "reference"))


def right(path: Path, result: Loaded) -> bool:
    """What `json` and `base64` find in the file; where it has a digest, nothing but what was written."""
    content = json.loads(path.read_bytes())
    good = json.loads((path.parent / _GOOD).read_bytes())
    if "sha256" in content and content | {"seconds": 0} != good | {"seconds": 0}:
        return False
    found, scales = result.allocation, {n: _scales(text) for n, text in content["folding"].items()}
    return (
        dict(found.formats) == content["formats"]
        and set(content["formats"].values()) <= _EXPORTABLE
        and dict(found.calibration) == content.get("calibration", {})
        and result.encoder == content.get("encoder", "reference")
        and found.folding.keys() == scales.keys() <= foldable(model().spec).keys()
        and all(
            np.array_equal(found.folding[name], s) and np.isfinite(s).all() and s.min() > 0
            for name, s in scales.items()
        )
        and _whole(found.calibration)
    )


def _whole(how: Any) -> bool:
    """Whether a calibration record says everything, in numbers that windows can have."""
    return not how or (
        how["count"] >= 1 and 2 <= how["context"] <= 256 and how["data"] != "" and len(how["text"]) == 64
    )


def _scales(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def _folding(change: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, str]]) -> Mutation:
    """Other scales of one activation."""

    def mutation(path: Path, rng: np.random.Generator) -> str:
        content = json.loads(path.read_text())
        names = sorted(content["folding"])
        name = names[rng.integers(len(names))]
        scales, what = change(_scales(content["folding"][name]).copy(), rng)
        content["folding"][name] = base64.b64encode(scales.tobytes()).decode()
        path.write_text(json.dumps(content))
        return f"{name}: {what}"

    return mutation


_ODD = [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-38, 1e-45, 1e38, 1e-6, 1e6, 1.0, 2.0]


def _value(scales: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    value = _ODD[rng.integers(len(_ODD))]
    scales[rng.integers(len(scales), size=rng.choice([1, len(scales)]))] = value
    return scales, f"some are {value}"


def _shape(scales: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    size = [0, 1, len(scales) - 1, len(scales) + 1, len(scales) // 2, 2 * len(scales)][rng.integers(6)]
    return np.resize(scales, size), f"{size} scales"


def _order(scales: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    return [scales[::-1], np.roll(scales, 1), 1 / scales, rng.permutation(scales)][rng.integers(4)], "in another order"


def _wider(scales: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    return scales.astype([np.float64, np.float16, ">f4"][rng.integers(3)]), "of another type"


def exchange(path: Path, rng: np.random.Generator) -> str:
    """Scales, or formats, of two tensors change places."""
    content = json.loads(path.read_text())
    part = content[["folding", "formats"][rng.integers(2)]]
    one, other = rng.choice(sorted(part), 2, replace=False)
    part[one], part[other] = part[other], part[one]
    path.write_text(json.dumps(content))
    return f"{one} and {other} exchanged"


def text(path: Path, rng: np.random.Generator) -> str:
    """Characters inside a base64 text that base64 does not have, or has too many of."""
    content = json.loads(path.read_text())
    name = sorted(content["folding"])[rng.integers(len(content["folding"]))]
    old = content["folding"][name]
    at = int(rng.integers(len(old)))
    content["folding"][name] = old[:at] + ["", "=", "\n", "*", "é", "AAAA", old[at:]][rng.integers(7)] + old[at + 1 :]
    path.write_text(json.dumps(content))
    return f"{name}: base64 changed at {at}"


def calibration(path: Path, rng: np.random.Generator) -> str:
    """Another value in the calibration record."""
    content = json.loads(path.read_text())
    key = sorted(content["calibration"])[rng.integers(5)]
    values = [0, 1, -1, 257, 2**40, True, None, "", "a" * 63, "A" * 64, "hf:a:b:c", "/etc/passwd", "a\nb", [], 2.0]
    content["calibration"][key] = values[rng.integers(len(values))]
    path.write_text(json.dumps(content))
    return f"{key} = {content['calibration'][key]!r}"


_MUTATIONS: dict[str, Mutation] = {
    **objects.of_file(),
    **raw.of_file(),
    **{f"scales {change.__name__[1:]}": _folding(change) for change in (_value, _shape, _order, _wider)},
    **{"exchange": exchange, "text": text, "calibration": calibration},
}

KINDS = (
    Kind("allocation", make, _MUTATIONS, load, right),
    Kind("allocation-unsigned", make_unsigned, _MUTATIONS, load, right),
)

"""The block formats beside ggml's: speed, errors and bytes, as suites of launch/benchmark.py.

`quantize`: encoding speed in million weights per second beside `ggml_quantize_chunk` in two threads on the same arrays,
medians of interleaved repetitions; `fused` is the time of a round trip over that of encoding. `errors`:
importance-weighted squared error of `best` over that of `reference`. `bytes`: how many blocks of SmolLM2-135M's tensors
equal ggml's, and how far the errors of the others are off.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from benchmarks.measuring import medians
from jaxtyping import Float

from ramp_jax.formats import encode, get_format, round_trip
from ramp_jax.halo import libggml
from ramp_jax.models import Tensor, allocatable, load_model, lookup
from ramp_jax.progress import track

SUPERBLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
LATTICES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")

_SPEED_FORMATS = (*SUPERBLOCKS, "IQ4_NL", *LATTICES)
_SPEED_SHAPE = (4224, 1024)
_ERROR_SHAPE = (264, 1024)

Row = dict[str, Any]
Importance = Float[np.ndarray, " I"] | None


def speed(repeats: int) -> list[Row]:
    """Million weights per second and ratios to ggml, one row per format, with and without importance."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(_SPEED_SHAPE).astype(np.float32)
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for name, importance in _settings(_SPEED_FORMATS, _importance(rng, w.shape[1])):
            contestants = {
                "ggml": lambda name=name, imp=importance: _ggml(pool, name, w, imp),
                "reference": lambda name=name, imp=importance: jax.block_until_ready(encode(w, name, imp)),
                "best": lambda name=name, imp=importance: jax.block_until_ready(encode(w, name, imp, "best")),
                "trip": lambda name=name, imp=importance: jax.block_until_ready(round_trip(w, name, imp)),
            }
            seconds = medians(contestants, repeats)
            rate = {key: w.size / seconds[key] / 1e6 for key in ("ggml", "reference", "best")}
            row = {"format": name, "importance": importance is not None}
            row |= {f"{key}_mw_s": value for key, value in rate.items()}
            row |= {f"{key}_ratio": rate[key] / rate["ggml"] for key in ("reference", "best")}
            rows.append(_shown(row | {"fused": seconds["trip"] / seconds["reference"]}))
    return rows


def errors(repeats: int) -> list[Row]:
    """Weighted squared error of `best` over `reference` on heavy-tailed weights; never above 1 in any block."""
    del repeats  # nothing is timed
    rng = np.random.default_rng(0)
    w = (rng.standard_t(4, _ERROR_SHAPE) * 0.02).astype(np.float32)
    rows = []
    for name, importance in _settings(SUPERBLOCKS + BLOCKS + LATTICES, _importance(rng, w.shape[1])):
        reference, best = (
            _block_errors(name, np.asarray(round_trip(w, name, importance, effort)), w, importance)
            for effort in ("reference", "best")
        )
        worst = float(np.max(best / np.maximum(reference, 1e-30)))
        row = {"format": name, "importance": importance is not None, "ratio": best.sum() / reference.sum()}
        rows.append(_shown(row | {"worst_block": worst}))
    return rows


def equal_bytes(repeats: int) -> list[Row]:
    """Share of equal blocks over all tensors of SmolLM2-135M whose rows fit, and the worst gap of the others."""
    del repeats
    model = load_model("smollm2-135m", dtype="float32")
    members = allocatable(model.spec)
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for name in SUPERBLOCKS + BLOCKS + LATTICES:
            for weighted in (False, True)[get_format(name).needs_importance :]:
                fitting = [t for t in members if t.shape[-1] % get_format(name).block_size == 0]
                found = [_compare(pool, name, model.params, t, weighted) for t in track(fitting, name, "tensor")]
                blocks, equal, worst = (np.asarray(column) for column in zip(*found, strict=True))
                row = {"format": name, "importance": weighted, "tensors": len(fitting), "blocks": int(blocks.sum())}
                row |= {"different": int((blocks - equal).sum()), "equal": float(equal.sum() / blocks.sum())}
                rows.append(_shown(row | {"worst_gap": float(worst.max())}))
    return rows


def _compare(
    pool: ThreadPoolExecutor, name: str, params: Any, tensor: Tensor, weighted: bool
) -> tuple[int, int, float]:
    """Blocks, equal blocks, and the largest |error − ggml's error| / ggml's of a block, weighted by importance."""
    w = np.asarray(lookup(params, tensor), np.float32)
    importance = _importance(np.random.default_rng(0), w.shape[1]) if weighted else None
    ours = get_format(name).to_bytes(encode(w, name, importance))
    theirs = np.concatenate(_ggml(pool, name, w, importance))
    size = get_format(name).block_bytes
    unequal = np.flatnonzero((ours.reshape(-1, size) != theirs.reshape(-1, size)).any(-1))
    mine, ggml = (_block_errors(name, libggml.dequantize(name, raw), w, importance)[unequal] for raw in (ours, theirs))
    gap = float(np.max(np.abs(mine - ggml) / np.maximum(ggml, 1e-30), initial=0.0))
    blocks = ours.size // size
    return blocks, blocks - len(unequal), gap


def _settings(names: tuple[str, ...], importance: Importance) -> Iterator[tuple[str, Importance]]:
    both = ((name, imp) for name in names for imp in (None, importance))
    return ((name, imp) for name, imp in both if imp is not None or not get_format(name).needs_importance)


def _importance(rng: np.random.Generator, n_in: int) -> Float[np.ndarray, " I"]:
    return rng.chisquare(1, n_in).astype(np.float32) + np.float32(0.05)


def _ggml(pool: ThreadPoolExecutor, name: str, w: np.ndarray, importance: Importance) -> list[np.ndarray]:
    return list(pool.map(lambda part: libggml.quantize(name, part, importance), np.array_split(w, 2)))


def _block_errors(name: str, decoded: np.ndarray, w: np.ndarray, importance: Importance) -> np.ndarray:
    off = np.square(decoded.astype(np.float64) - w)
    return (off if importance is None else off * importance).reshape(-1, get_format(name).block_size).sum(-1)


def _shown(row: Row) -> Row:
    print("  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return row

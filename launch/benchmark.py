"""Measure this machine.

    python launch/benchmark.py --suite=forward,parity,quantize,sensitivity [--json=FILE] [--plots=FOLDER]

`forward`: tokens per second of perplexity in JAX beside transformers on torch (launch/forward_suite.py).
`parity`: losses of one file in JAX, llama.cpp and transformers (launch/parity_suite.py).
`quantize`: encoding speed in million weights per second beside `ggml_quantize_chunk` in two threads on the same arrays,
medians of interleaved repetitions. `sensitivity`: what launch/sensitivity_suite.py says; it took 12 minutes on two busy
cores.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from forward_suite import forward
from measuring import medians
from parity_suite import parity
from sensitivity_suite import sensitivity

from ramp_jax.formats import encode
from ramp_jax.halo import libggml

_SUITE = flags.DEFINE_list("suite", ["quantize"], "Suites to run, separated by commas.")
_JSON = flags.DEFINE_string("json", None, "Also write the results to this file.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions per measurement.", lower_bound=1)

_FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_SHAPE = (1056, 1024)


def quantize(repeats: int) -> list[dict[str, Any]]:
    """One row per format, with and without importance."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(_SHAPE).astype(np.float32)
    importance = rng.chisquare(1, _SHAPE[1]).astype(np.float32) + np.float32(0.05)
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for name in _FORMATS:
            for weighted in (False, True):
                imp = importance if weighted else None
                contestants = {
                    "ggml": lambda name=name, imp=imp: list(
                        pool.map(lambda part: libggml.quantize(name, part, imp), np.array_split(w, 2))
                    ),
                    "reference": lambda name=name, imp=imp: jax.block_until_ready(encode(w, name, imp)),
                    "best": lambda name=name, imp=imp: jax.block_until_ready(encode(w, name, imp, "best")),
                }
                rate = {key: w.size / seconds / 1e6 for key, seconds in medians(contestants, repeats).items()}
                row = {"format": name, "importance": weighted} | {f"{key}_mw_s": value for key, value in rate.items()}
                row |= {f"{key}_ratio": rate[key] / rate["ggml"] for key in ("reference", "best")}
                rows.append(row)
                print("  ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return rows


SUITES: dict[str, Callable[[int], Any]] = {
    "forward": forward,
    "parity": parity,
    "quantize": quantize,
    "sensitivity": sensitivity,
}


def main(argv: list[str]) -> None:
    """Run the suites asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}.")
    if unknown := set(_SUITE.value) - set(SUITES):
        raise app.UsageError(f"--suite names {min(unknown)!r}; choose from {', '.join(SUITES)}.")
    results = {name: SUITES[name](_REPEATS.value) for name in _SUITE.value}
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)

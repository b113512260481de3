"""Measure this machine.

    python launch/benchmark.py --suite=SUITE[,SUITE ...] [--json=FILE] [--plots=FOLDER] [--record]

`forward`: tokens per second of perplexity in JAX beside transformers on torch.
`families`: tiny models of every family beside transformers and llama.cpp.
`parity`: losses of one file in JAX, llama.cpp and transformers.
`quantize`, `errors`, `bytes`: the block formats beside ggml's.
`sensitivity`: the two estimates beside each other and the truth.
`policy`: what each way of choosing formats loses, at the sizes of llama.cpp's mixes.
`footprint`: memory as predicted beside what llama.cpp reports on loading.
`guard`: whether a file is ever worse than the largest of llama.cpp's mixes that fits.
`sac`: steps per second of the decision process, seeds side by side, a whole run.
`transfer`: policies on models that they were not trained on, and without each number.
`reward`: what rewards are made of, and how training converges under them.
`accelerator`: what 7B shapes take on one GPU or TPU.
`memory`: memory, seconds and sweeps of every script, also on weights of real shapes that are made up.
`end_to_end`: seconds from a checkpoint to a file, beside llama.cpp's.
`devices`: forced devices of one CPU beside a single one: losses, allocation and bytes.
`loading`: memory and seconds of loading a sharded model of 1.5 billion weights, and a GGUF.
`tokenizers`: ids of Hugging Face, llama.cpp and our reading of its file, for every kind of tokenizer.
`fuzz`: what becomes of damaged files of every kind.
`encoder`: what each way of rounding loses beside llama-quantize at equal tensor types.
`paper`: RAMP beside 4-bit AWQ and GPTQ at 94 % of their bytes, by proxy: does the paper's claim hold?
`kills`: scripts that are killed at random moments and run again: what they make, and what they leave.
`sizes`: what files of known models weigh at every level, and Llama-2-7B as the paper has it.

Each lives in launch/benchmarks/, where its file says what it does. --record writes a suite's table, the command and the
machine to launch/benchmarks/results/, and its plots beside it; these are the numbers that README and notes speak of.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from benchmarks import formats
from benchmarks.accelerator import accelerator
from benchmarks.devices import devices
from benchmarks.encoder import encoder
from benchmarks.end_to_end import end_to_end
from benchmarks.families import families
from benchmarks.footprint import footprints
from benchmarks.forward import forward
from benchmarks.fuzz import fuzz
from benchmarks.guard import guard
from benchmarks.kills import kills
from benchmarks.loading import loading
from benchmarks.measuring import RESULTS, plots_go_to, record
from benchmarks.memory import memory
from benchmarks.paper import paper
from benchmarks.parity import parity
from benchmarks.policy import policy
from benchmarks.reward import reward
from benchmarks.sac import sac
from benchmarks.sensitivity import sensitivity
from benchmarks.sizes import sizes
from benchmarks.tokenizers import tokenizers
from benchmarks.transfer import transfer

from ramp_jax import cli
from ramp_jax.files import write_bytes

_SUITE = flags.DEFINE_list("suite", ["quantize"], "Suites to run, separated by commas.")
_JSON = flags.DEFINE_string("json", None, "Also write the results to this file.")
_PLOTS = flags.DEFINE_string("plots", None, "Folder for plots; default: that of --json.")
_RECORD = flags.DEFINE_bool("record", False, f"Write each table to {RESULTS}, with its plots.")
_NAME = flags.DEFINE_string("record_as", None, "Name of the recorded table; default: that of the suite.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions per measurement.", lower_bound=1)

SUITES: dict[str, Callable[[int], Any]] = {
    "forward": forward,
    "families": families,
    "parity": parity,
    "quantize": formats.speed,
    "errors": formats.errors,
    "bytes": formats.equal_bytes,
    "sensitivity": sensitivity,
    "sac": sac,
    "transfer": transfer,
    "reward": reward,
    "policy": policy,
    "footprint": footprints,
    "guard": guard,
    "memory": memory,
    "end_to_end": end_to_end,
    "devices": devices,
    "loading": loading,
    "encoder": encoder,
    "fuzz": fuzz,
    "accelerator": accelerator,
    "tokenizers": tokenizers,
    "sizes": sizes,
    "kills": kills,
    "paper": paper,
}


def main() -> None:
    """Run the suites asked for."""
    if unknown := set(_SUITE.value) - set(SUITES):
        raise ValueError(f"--suite names {min(unknown)!r}; choose from {', '.join(SUITES)}.")
    if _NAME.value and len(_SUITE.value) > 1:
        raise ValueError("--record_as names one table; run one suite with it.")
    if _JSON.value:
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for suite in _SUITE.value:
        name = _NAME.value or suite
        plots_go_to(RESULTS if _RECORD.value else _plots_folder(), suite, name)
        results[suite] = SUITES[suite](_REPEATS.value)
        if _RECORD.value:
            print(f"Recorded: {record(name, suite, results[suite])}")
    if _JSON.value:
        write_bytes(_JSON.value, (json.dumps(results, indent=1) + "\n").encode())


def _plots_folder() -> Path | None:
    if _PLOTS.value:
        return Path(_PLOTS.value)
    return Path(_JSON.value).parent if _JSON.value else None


if __name__ == "__main__":
    cli.run(main)

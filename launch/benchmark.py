"""Measure this machine.

    python launch/benchmark.py --suite=SUITE[,SUITE ...] [--json=FILE] [--plots=FOLDER]

`forward`: tokens per second of perplexity in JAX beside transformers on torch (launch/forward_suite.py).
`parity`: losses of one file in JAX, llama.cpp and transformers (launch/parity_suite.py).
`quantize`, `errors`, `bytes`: the block formats beside ggml's (launch/formats_suite.py).
`sensitivity`: the two estimates beside each other and the truth (launch/sensitivity_suite.py).
`policy`: what each way of choosing formats loses, at the sizes of llama.cpp's mixes (launch/policy_suite.py).
`sac`: steps per second of the decision process, seeds side by side, a whole run (launch/sac_suite.py).
`transfer`: policies on models that they were not trained on, and without each number (launch/transfer_suite.py).
`reward`: what rewards are made of, and how training converges under them (launch/reward_suite.py).
`accelerator`: what 7B shapes take on one GPU or TPU (launch/accelerator_suite.py).
`encoder`: what each way of rounding loses beside llama-quantize at equal tensor types (launch/encoder_suite.py).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats_suite
from absl import app, flags
from accelerator_suite import accelerator
from encoder_suite import encoder
from forward_suite import forward
from parity_suite import parity
from policy_suite import policy
from reward_suite import reward
from sac_suite import sac
from sensitivity_suite import sensitivity
from transfer_suite import transfer

from ramp_jax.checkpoint import write_bytes

_SUITE = flags.DEFINE_list("suite", ["quantize"], "Suites to run, separated by commas.")
_JSON = flags.DEFINE_string("json", None, "Also write the results to this file.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions per measurement.", lower_bound=1)

SUITES: dict[str, Callable[[int], Any]] = {
    "forward": forward,
    "parity": parity,
    "quantize": formats_suite.speed,
    "errors": formats_suite.errors,
    "bytes": formats_suite.equal_bytes,
    "sensitivity": sensitivity,
    "sac": sac,
    "transfer": transfer,
    "reward": reward,
    "policy": policy,
    "encoder": encoder,
    "accelerator": accelerator,
}


def main(argv: list[str]) -> None:
    """Run the suites asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}.")
    if unknown := set(_SUITE.value) - set(SUITES):
        raise app.UsageError(f"--suite names {min(unknown)!r}; choose from {', '.join(SUITES)}.")
    if _JSON.value:
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    results = {name: SUITES[name](_REPEATS.value) for name in _SUITE.value}
    if _JSON.value:
        write_bytes(_JSON.value, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    app.run(main)

"""The suite `fuzz` of launch/benchmark.py: what becomes of files that were damaged on purpose.

Seeded mutations of every kind of file that people hand around (`tests/mutations/`), each loaded in a process with
limits: 10 seconds, and 1 GiB of memory beyond twice the file. It has to be `refused` by one sentence that names the
file, or to be `right`: what a reader that shares no code with ours gives.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

from absl import flags
from benchmarks.measuring import Numbers

_CASES = flags.DEFINE_integer("fuzz_cases", 2000, "Damaged files, over all kinds.", lower_bound=1)
_SEED = flags.DEFINE_integer("fuzz_seed", 0, "Other damages under another number.", lower_bound=0)
_KINDS = flags.DEFINE_list("fuzz_kinds", [], "Kinds of files; default: all.")

_HERE = Path(__file__).parents[2]
_OUTCOMES = ("refused", "right", "wrong", "crashed", "hung", "memory")


def fuzz(repeats: int) -> list[Numbers]:
    """Cases and outcomes per kind; `repeats` is not used, a case gives the same every time."""
    del repeats
    options = ["--cases", str(_CASES.value), "--seed", str(_SEED.value)]
    if _KINDS.value:
        options += ["--kinds", ",".join(_KINDS.value)]
    return table(cases(*options))


def cases(*options: str) -> list[dict[str, str]]:
    """What became of every case; `options` are those of `python -m mutations`."""
    search = os.pathsep.join([str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "mutations", *options],
        cwd=_HERE / "tests",
        env={**os.environ, "PYTHONPATH": search, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(found: list[dict[str, str]]) -> list[Numbers]:
    """A row per kind: how many cases, and how they ended."""
    rows = []
    for kind in sorted({case["kind"] for case in found}):
        counts = collections.Counter(case["outcome"] for case in found if case["kind"] == kind)
        rows.append({"kind": kind, "cases": counts.total()} | {name: counts[name] for name in _OUTCOMES})
    return rows

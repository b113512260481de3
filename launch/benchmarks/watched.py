"""Scripts of `launch/` in processes of their own, and what each took.

    python -P launch/benchmarks/watched.py REPORT SCRIPT FLAGS

runs a script and writes REPORT, the JSON of `Took`, when it ends. The peak is what `/usr/bin/time -v` calls maximum
resident set size, but read by the process itself: to a large parent the kernel reports no less than that parent had
when it started the child.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ramp_jax import sweep

_ROOT = Path(__file__).parents[2]
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Took(NamedTuple):
    """What a script took.

    `programs` were compiled or read from the compilation cache in `compile_seconds` of all threads. `sweeps` over all
    blocks, and the seconds from their first block to what follows the last, are counted by what the progress bar calls
    them, or by their direction where it does not.
    """

    peak_bytes: int
    cpu_seconds: float
    programs: int
    compile_seconds: float
    sweeps: dict[str, float]
    sweep_seconds: dict[str, float]


def run(script: str, *flags: str, settings: Mapping[str, str] | None = None) -> Took:
    """Run a script of `launch/` with `settings` added to the environment.

    Raises `RuntimeError` with what it said where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-P", __file__, report, f"launch/{script}.py", *flags]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (settings or {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"launch/{script}.py {' '.join(flags)} failed: {done.stderr.strip()}")
        return Took(**json.loads(report.read_text()))


def _watch(report: Path, script: str) -> None:
    """Run a script in this process, whose `sys.argv` are its own, and write what it took."""
    compiling: list[float] = []
    sweeps: Counter[str] = Counter()
    seconds: Counter[str] = Counter()

    def heard(event: str, duration: float, **_: Any) -> None:
        if event == _COMPILED:
            compiling.append(duration)

    jax.monitoring.register_event_duration_secs_listener(heard)
    for direction in ("forward", "backward"):
        setattr(sweep, direction, _counted(getattr(sweep, direction), direction, sweeps, seconds))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        took = Took(peak, time.process_time(), len(compiling), sum(compiling), sweeps, seconds)
        report.write_text(json.dumps(took._asdict()))


def _counted(
    visits: Callable[..., Iterator[sweep.Place]], direction: str, sweeps: Counter[str], seconds: Counter[str]
) -> Callable[..., Iterator[sweep.Place]]:
    """`sweep.forward` or `sweep.backward`, counting."""

    def counted(spec: Any, params: Any, doing: str | None = None, **keywords: Any) -> Iterator[sweep.Place]:
        started = time.perf_counter()
        try:
            for at in visits(spec, params, doing, **keywords):
                sweeps[doing or direction] += 1 / len(spec.blocks)
                yield at
        finally:
            seconds[doing or direction] += time.perf_counter() - started

    return counted


if __name__ == "__main__":
    report, *sys.argv = sys.argv[1:]
    _watch(Path(report), sys.argv[0])

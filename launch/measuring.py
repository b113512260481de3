"""What the suites of launch/benchmark.py share."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.figure import Figure

from ramp_jax.halo.report import save_png

_PLOTS = flags.DEFINE_string("plots", None, "Folder for plots; default: that of --json.")

Numbers = dict[str, Any]


def medians(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, after one warm-up, taking turns."""
    times: dict[str, list[float]] = {key: [] for key in contestants}
    for turn in range(repeats + 1):
        for key, run in contestants.items():
            seconds, _ = timed(run)
            if turn:
                times[key].append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def said(numbers: Numbers) -> Numbers:
    """Print numbers as they come."""
    print("\n".join(f"{name}={value}" for name, value in numbers.items()), flush=True)
    return numbers


def save_plots(figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw and write `NAME.png` into the folder of --plots or, without it, of --json; without both nothing is drawn."""
    folder = _PLOTS.value or (flags.FLAGS.json and Path(flags.FLAGS.json).parent)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, draw in figures.items():
            save_png(Path(folder) / f"{name}.png", draw())

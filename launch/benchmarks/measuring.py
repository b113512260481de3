"""What the suites of launch/benchmark.py share: clocks, plots, and the tables that are recorded."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from ramp_jax import __version__
from ramp_jax.cores import cores
from ramp_jax.files import write_bytes
from ramp_jax.halo.report import save_png

Numbers = dict[str, Any]

RESULTS = Path("launch/benchmarks/results")
"""Where tables are recorded, from the root of the project."""

_READING = "## Reading"
_PLOTS: dict[str, Any] = {"folder": None, "suite": "", "prefix": ""}


def medians(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each, after one warm-up, taking turns."""
    return {key: statistics.median(times[1:]) for key, times in turns(contestants, repeats).items()}


def turns(contestants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns: of a first call and of `repeats` more."""
    times: dict[str, list[float]] = {key: [] for key in contestants}
    for _ in range(repeats + 1):
        for key, run in contestants.items():
            times[key].append(timed(run)[0])
    return times


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def said(numbers: Numbers) -> Numbers:
    """Print numbers as they come."""
    print("\n".join(f"{name}={value}" for name, value in numbers.items()), flush=True)
    return numbers


def plots_go_to(folder: Path | None, suite: str, prefix: str) -> None:
    """Where `save_plots` writes what a suite draws, and how names begin; None: nowhere."""
    _PLOTS.update(folder=folder, suite=suite, prefix=prefix)


def save_plots(figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw and write each figure; one that is named as its suite is named by the prefix alone."""
    if _PLOTS["folder"] is not None:
        _PLOTS["folder"].mkdir(parents=True, exist_ok=True)
        for name, draw in figures.items():
            prefix = _PLOTS["prefix"]
            file = prefix if name == _PLOTS["suite"] else f"{prefix}-{name}"
            save_png(_PLOTS["folder"] / f"{file}.png", draw())


def record(name: str, suite: str, result: Any) -> Path:
    """Write a suite's result as a page of tables, with the command and the machine that made it; returns its path.

    What people wrote on an earlier page, from its heading "Reading" on, stays.
    """
    path = RESULTS / f"{name}.md"
    command = " ".join(["python", *sys.argv])
    plots = [f"![{plot.stem}]({plot.name})" for plot in sorted(RESULTS.glob("*.png")) if _belongs(plot.stem, name)]
    lines = [f"# `{suite}`", "", f"    {command}", "", machine(), "", *_tables(result), "", *plots]
    page = "\n".join(lines).rstrip() + "\n"
    if path.is_file() and _READING in (before := path.read_text(encoding="utf-8")):
        page += "\n" + before[before.index(_READING) :]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode())
    return path


def _belongs(plot: str, name: str) -> bool:
    """Whether a plot is one of this page, not of another whose name begins as this one's."""
    pages = [page.stem for page in RESULTS.glob("*.md")]
    owners = [page for page in [*pages, name] if plot == page or plot.startswith(f"{page}-")]
    return max(owners, key=len, default=None) == name


def machine() -> str:
    """One sentence on where and with what something was measured."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    wide = "AVX-512" if "avx512f" in text else "AVX2" if "avx2" in text else ""
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f"{device.device_kind}; "
    day = time.strftime("%Y-%m-%d")
    host = ", ".join(part for part in (model or platform.machine(), f"{cores()} cores", wide) if part)
    return f"{day}; {kind}{host}; jax {jax.__version__}, ramp_jax {__version__}."


def _tables(result: Any) -> Iterator[str]:
    """Rows as a table, numbers as a list, one below the other."""
    if isinstance(result, Mapping):
        plain = {key: value for key, value in result.items() if not _is_rows(value)}
        yield from (f"- {key}: {_cell(value)}" for key, value in plain.items())
        for value in result.values():
            if _is_rows(value):
                yield from ("", *_table(value))
    elif _is_rows(result):
        yield from _table(result)
    else:
        yield _cell(result)


def _is_rows(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    yield from (f"| {' | '.join(_cell(row.get(key, '')) for key in columns)} |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return str(value)

"""Whether this machine has what a job needs, asked before the job begins."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
_CGROUPS, _CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_V1, _V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def check_memory(needed: int, what: str) -> None:
    """Raise `OSError` where the memory that arrays go to has less than `needed` bytes left; `what` begins the error."""
    if needed > (available := available_memory()):
        raise OSError(
            f"{what} needs {needed:,} bytes of memory, and {available:,.0f} are available; choose a smaller dtype, "
            f"free some or use a larger machine."
        )


def check_disk(path: Path, needed: int, way_out: str = "free some or choose another output") -> None:
    """Raise `OSError` where the disk of `path`, which need not exist, has less than `needed` bytes left."""
    if needed > (free := free_bytes(path)):
        raise OSError(f"{path} needs {needed:,} bytes on disk, and {free:,} are free; {way_out}.")


def free_bytes(path: Path) -> int:
    """What the disk of `path`, which need not exist, has left for this user."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Raise `ValueError` where writing `path` would overwrite one of the inputs, under whatever name or link."""
    for source in inputs:
        if path.exists() and source.exists() and source.samefile(path):
            raise ValueError(f"the output {path} is the input {source}; choose another output.")


def available_memory() -> float:
    """Bytes that can still be allocated where JAX puts arrays, infinite where the machine does not say.

    On CPUs the least of what the kernel, the control groups of this process and its own limit leave.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else math.inf
    return min((_kernel(), _own_limit(), *_control_groups()))


def _kernel() -> float:
    if not _MEMINFO.exists():
        return math.inf
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else math.inf


def _own_limit() -> float:
    """What `ulimit -v` leaves of this process's address space."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return math.inf
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or not _STATM.exists():
        return math.inf
    return limit - int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _control_groups() -> Iterator[float]:
    """What each control group around this process leaves: its limit, less what it cannot give back."""
    if not _CGROUP.exists():
        return
    for line in _CGROUP.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        limit, usage = _V1 if controllers else _V2
        here = root / name.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(root):
                yield _left(folder / limit, folder / usage, folder / "memory.stat")


def _left(limit: Path, usage: Path, stat: Path) -> float:
    try:
        text = limit.read_text().strip()
        files = dict(line.split() for line in stat.read_text().splitlines())
        cached = int(files.get("inactive_file", 0)) + int(files.get("active_file", 0))
        return math.inf if text == "max" else int(text) - int(usage.read_text()) + cached
    except (OSError, ValueError):
        return math.inf

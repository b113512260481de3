"""How many cores this process may use, which is fewer than the machine has under `taskset` or in a container."""

import os


def cores() -> int:
    """At least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Arrays that outgrow memory: they lie in files without a name, which end with the array or with the process."""

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ramp_jax.resources import check_disk

FOLDER = "RAMP_SCRATCH"
"""The environment variable that names the folder for these files; else they go where large temporary files belong."""

LARGEST = 1 << 28
"""Bytes of an array that may lie in memory."""


def empty(shape: tuple[int, ...], dtype: Any = np.float32, largest: int | None = None) -> np.ndarray:
    """An array to be written, in memory up to the `largest` size in bytes, else in a file that is mapped into it.

    `largest` is `LARGEST` unless given. Whoever works on such an array part by part says `release` after each.
    Raises `OSError` where the disk does not hold it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= (LARGEST if largest is None else largest):
        return np.empty(shape, dtype)
    folder = _folder()
    way_out = f"free some or name another folder with {FOLDER}"
    check_disk(folder / "scratch", size, way_out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            return np.ndarray(shape, dtype, buffer=mmap.mmap(file.fileno(), size))
    except OSError as error:
        raise OSError(f"cannot keep {size:,} bytes in {folder} ({error.strerror}); {way_out}.") from error


def release(array: np.ndarray) -> None:
    """Let go of the memory of an array (or of that which it is a view of) if that lies in a file: values stay there."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _folder() -> Path:
    if named := os.environ.get(FOLDER) or os.environ.get("TMPDIR"):
        return Path(named).expanduser()
    large = Path("/var/tmp")  # on a disk, where /tmp may be memory
    return large if os.access(large, os.W_OK) else Path(tempfile.gettempdir())


def _reserve(file: int, size: int) -> None:
    """Take the space now: on a disk that is full later, writing to mapped memory would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)

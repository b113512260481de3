"""No kind of file, but loaders that fail in every way, by which the runner itself is tested."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from mutations import Kind, Mutation

EXPECTED = {
    "refused": "refused",
    "right": "right",
    "wrong": "wrong",
    "unread": "wrong",  # by the independent reader
    "raised": "crashed",
    "unnamed": "crashed",  # an error that does not name the file
    "died": "crashed",
    "hung": "hung",
    "memory": "memory",
    "disguised": "memory",  # as an error of the file
}
"""What the loader does: how that has to be called."""


def make(folder: Path) -> Path:
    """A file that says what its loader does."""
    path = folder / "a.txt"
    path.write_text("right")
    return path


def _saying(what: str) -> Mutation:
    def change(path: Path, rng: np.random.Generator) -> str:
        del rng
        path.write_text(what)
        return what

    return change


def load(path: Path) -> Any:
    """What the file says."""
    what = path.read_text()
    if what == "refused":
        raise ValueError(f"{path} is refused; take another.")
    if what == "unnamed":
        raise ValueError("something is refused.")
    if what == "raised":
        raise KeyError(what)
    if what == "died":
        os.abort()
    if what == "hung":
        time.sleep(3600)
    if what in ("memory", "disguised"):
        try:
            return np.ones(1 << 31, np.uint8)
        except MemoryError as error:
            raise (error if what == "memory" else ValueError(f"{path} is too large.")) from error
    return what


def right(path: Path, result: Any) -> bool:
    """Whether it was to be right."""
    return {"right": True, "wrong": False}[result]


KINDS = (Kind("faulty", make, {what: _saying(what) for what in EXPECTED}, load, right),)

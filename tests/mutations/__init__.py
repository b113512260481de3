"""Inputs damaged on purpose, one module per kind of file: what is made of them has to be right, or one sentence.

A module of this package holds `KINDS`, one `Kind` or some: how a good input is made, named mutations that damage a copy
of it, how the project loads it, and what an independent reader says of the result. `raw.py` and `objects.py` have
mutations of bytes and of JSON that kinds share (`**raw.of_file()`, `**objects.of_file("config.json")`); `runner.py`
runs cases in processes with limits. By hand, in `tests/` with the project on PYTHONPATH:

    python -m mutations --kinds=gguf,directory --cases=500 --seed=1 --verbose

and `mutations.runner.one("gguf", "counts", 17)` runs a single one in this process.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Mutation = Callable[[Path, np.random.Generator], str]
"""Damages the input at a path, by random numbers alone, and says what was done in a few words."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input, which is called after its module (`gguf`, or `gguf-` and more).

    `make(folder)` writes a good one into an empty folder and returns its path there, a file or a directory; every case
    gets a copy of the whole folder, so the input may have companions (a model beside its allocation). `mutations` are
    taken in turn. `load(path)` does all that the project does before it believes an input, and returns what it made of
    it; `ValueError` and `OSError` with one sentence that names the file are the only errors that it may end in.
    `right(path, result)` says whether that is what the damaged input holds, by a reader that shares no code with the
    one under test; its own errors count as no. Both run in worker processes, so all four are functions of a module.
    """

    name: str
    make: Callable[[Path], Path]
    mutations: Mapping[str, Mutation]
    load: Callable[[Path], Any]
    right: Callable[[Path, Any], bool]

"""Several processes that work on one job, on one machine or many: each runs the same program on its own devices.

Hidden states travel everywhere, since forward passes cost little beside the searches. What is independent and takes
long is shared out: item i is done by process i mod n, and results are exchanged through files in a folder that all of
them see. Only process 0 writes outputs. With one process everything here passes on what it gets.

`jax.distributed` tells processes who they are, and SLURM and TPU pods tell it. No array lies on several hosts, so a
process that dies takes nobody with it: whoever waits for it notices that it no longer shows that it is alive.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ramp_jax.journal import keep, kept

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds for which a process need not show that it is alive."""

_BEAT = 1.0  # seconds between two signs of life
_LOOK = 0.005  # seconds between two looks for a file


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a job: how many, which of them this one is, and the folder of this run that all of them see."""

    folder: Path
    index: int
    count: int
    patience: float = PATIENCE
    steps: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def sign(self, process: int) -> Path:
        """The file that a process touches as long as it lives."""
        return self.folder / f"alive-{process}"

    def part(self, step: int, process: int) -> Path:
        """What a process has to say at one step."""
        return self.folder / f"{step}-{process}.part"


_GROUP: list[Group] = []
_LAST: list[Path] = []  # what a process removes when it ends


def leave(code: int) -> NoReturn:
    """End this process. One that had joined others ends at once: JAX would wait for those that are gone, and abort
    those that are left when process 0 ends, which therefore waits for their signs to disappear."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    for sign in _LAST:
        sign.unlink(missing_ok=True)
    os._exit(code)


@contextlib.contextmanager
def joined(
    folder: Path,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    patience: float = PATIENCE,
) -> Iterator[Group]:
    """Work together with the other processes of a job while the context lasts; then `leave`.

    `coordinator` is HOST:PORT of process 0, `count` the number of processes and `index` which of them this is; what is
    None SLURM or the TPU pod says. `folder` is one that all of them see. Raises `RuntimeError` where they do not find
    each other, `OSError` where the folder cannot be written.
    """
    jax.config.update("jax_enable_recoverability", True)  # else the death of one process ends the others at once
    jax.config.update("jax_enable_preemption_service", False)  # which takes SIGTERM for itself and goes on
    try:
        jax.distributed.initialize(coordinator, count, index)
    except ValueError as error:
        raise RuntimeError(f"the processes of this job do not find each other: {error}") from error
    run = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % (1 << 31))))
    group = Group(folder / f"hosts-{run}", jax.process_index(), jax.process_count(), patience)
    group.folder.mkdir(parents=True, exist_ok=True)
    group.sign(group.index).touch()
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(group, over), daemon=True)
    beating.start()
    _GROUP.append(group)
    try:
        barrier()
        yield group
        barrier()
    finally:
        _GROUP.remove(group)
        over.set()
        beating.join()
        _LAST.append(group.sign(group.index))
        if group.index == 0:  # once all others have read what they wait for and left
            others, end = [group.sign(i) for i in range(1, group.count)], time.monotonic() + group.patience
            while any(sign.exists() for sign in others) and time.monotonic() < end:
                time.sleep(_LOOK)
            shutil.rmtree(group.folder, ignore_errors=True)


def _beat(group: Group, over: threading.Event) -> None:
    while not over.wait(_BEAT):
        with contextlib.suppress(OSError):
            group.sign(group.index).touch()


def index() -> int:
    """Which process this is."""
    return _GROUP[-1].index if _GROUP else 0


def count() -> int:
    """How many processes work together."""
    return _GROUP[-1].count if _GROUP else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if _GROUP:
        _exchanged(_GROUP[-1], [])


def shared(work: Callable[[Sequence[Any]], list[T]], items: Sequence[Any]) -> list[T]:
    """`work(items)`, one result per item, each of them from the process that it belongs to.

    Results are trees of arrays; those of other processes are on the host. Fewer items than processes are done by all.
    Raises `RuntimeError` where a process is gone.
    """
    if count() == 1 or len(items) < count():
        return work(items)
    group = _GROUP.pop()  # what is shared out is done by one process, all of it
    try:
        own = work(items[group.index :: group.count])
    finally:
        _GROUP.append(group)
    structure = jax.tree.structure(own[0])
    found: list[Any] = [None] * len(items)
    for process, leaves in enumerate(_exchanged(group, [np.asarray(leaf) for leaf in jax.tree.leaves(own)])):
        parts = [leaves[i : i + structure.num_leaves] for i in range(0, len(leaves), structure.num_leaves)]
        theirs = own if process == group.index else [structure.unflatten(part) for part in parts]
        found[process :: group.count] = theirs
    return found


def _exchanged(group: Group, leaves: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The arrays that every process has at this step, in the order of processes."""
    step = next(group.steps)
    keep(group.part(step, group.index), leaves)
    found = [leaves if process == group.index else _awaited(group, step, process) for process in range(group.count)]
    group.part(step - 1, group.index).unlink(missing_ok=True)  # whoever wrote this step has read the one before
    return found


def _awaited(group: Group, step: int, process: int) -> list[np.ndarray]:
    path, waiting = group.part(step, process), time.monotonic()
    while not path.exists():
        time.sleep(_LOOK)
        if (waited := time.monotonic() - waiting) > _BEAT:
            _check_alive(group, process, waited)
    found = kept(path)
    if found is None:
        raise RuntimeError(f"{path} is damaged; run the command again on all hosts to go on.")
    return [np.array(leaf) for leaf in found]


def _check_alive(group: Group, process: int, waited: float) -> None:
    """Raise `RuntimeError` where a process shows no sign of life, by time stamps of one file system alone: its clock
    need not be this machine's."""
    silent = waited  # of one that has ended, or has not begun
    with contextlib.suppress(FileNotFoundError):
        mine, theirs = (os.stat(group.sign(who)).st_mtime for who in (group.index, process))
        silent = mine - theirs
    if silent > group.patience:
        raise RuntimeError(
            f"process {process} of {group.count} has not been heard of for {silent:.0f} seconds; run the command again "
            f"on all hosts, and it goes on where it was."
        )

"""Runs mutations in worker processes with limits: 10 seconds, and 1 GiB of memory beyond twice the input's size.

Workers serve case after case and are replaced when one dies or is killed. They are forked from a server that has
imported everything, so a new one is there at once.
"""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import queue
import resource
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import numpy as np

import mutations
from mutations import Kind

SECONDS = 10
MEMORY = 1 << 30
_NO_FILES = ("faulty", "runner", "__main__")  # modules of this package that are no kinds of files
_STARTING = 120  # seconds until a worker has judged its first good input
_LONGEST = 600  # characters of an error that is still a sentence

Outcome = Literal["refused", "right", "wrong", "crashed", "hung", "memory"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
GOOD: tuple[Outcome, ...] = ("refused", "right")


class Case(NamedTuple):
    """One damaged input: what was done to it, and what became of that (an error's text in `detail`)."""

    kind: str
    mutation: str
    number: int
    what: str
    outcome: Outcome
    detail: str


class _Job(NamedTuple):
    """A case to run: the good input of a kind in its folder, and what is to be done to a copy in `scratch`."""

    kind: str
    folder: Path
    path: Path
    scratch: Path
    mutation: str
    seed: int
    number: int


def kinds() -> dict[str, Kind]:
    """All kinds of files by name: those of every module of this package that has some."""
    return {kind.name: kind for name in _names() for kind in getattr(_module(name), "KINDS", ())}


def run(names: Sequence[str], cases: int, seed: int = 0, workers: int = 2, seconds: float = SECONDS) -> Iterator[Case]:
    """So many cases, spread over the kinds of these names (none: over all) and their mutations.

    A case follows from `names`, `seed` and its number. Workers import what the process that calls this began with, so
    that should be little, as in `python -m mutations`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_module_name(name) for name in names or _names()])
    pool = [_Worker(context, seconds) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def done(job: _Job) -> Case:
        worker = idle.get()
        try:
            return worker.run(job)
        finally:
            idle.put(worker)

    with tempfile.TemporaryDirectory() as scratch:
        jobs = pool[0].plan(names, cases, seed, Path(scratch))
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            yield from threads.map(done, jobs)
        for worker in pool:
            worker.end()


def one(name: str, mutation: str, number: int, seed: int = 0) -> tuple[str, Outcome, str]:
    """A case in this process, to look at with a debugger; what was done, the outcome and its detail."""
    with tempfile.TemporaryDirectory() as scratch:
        (job,) = _jobs([name], 1, seed, Path(scratch))
        job, kind = job._replace(mutation=mutation, number=number), _kind(name)
        path = _copied(job)
        what = kind.mutations[mutation](path, np.random.default_rng([seed, number]))
        return what, *_judged(kind, path)


def _jobs(names: Sequence[str], cases: int, seed: int, scratch: Path) -> list[_Job]:
    """Every case to run, after a good input of each kind was made."""
    jobs, names = [], names or sorted(kinds())
    for index, name in enumerate(names):
        kind, folder = _kind(name), scratch / name
        folder.mkdir()
        path = kind.make(folder)
        todo = list(kind.mutations)
        for number in range(index, cases, len(names)):
            jobs.append(_Job(name, folder, path, scratch, todo[number // len(names) % len(todo)], seed, number))
    return sorted(jobs, key=lambda job: job.number)


def _names() -> list[str]:
    """The modules of this package."""
    found = (module.name for module in pkgutil.iter_modules(mutations.__path__))
    return sorted(name for name in found if name not in _NO_FILES)


def _kind(name: str) -> Kind:
    return next(kind for kind in _module(name).KINDS if kind.name == name)


def _module(name: str) -> ModuleType:
    return importlib.import_module(_module_name(name))


def _module_name(kind: str) -> str:
    return f"mutations.{kind.split('-')[0]}"


class _Worker:
    """A process that runs cases, with another in its place as soon as it is needed after one died."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, seconds: float):
        self._context, self._seconds, self._process = context, seconds, None

    def run(self, job: _Job) -> Case:
        """The case, whatever becomes of the process."""
        self._start()
        what = "not begun"
        try:
            self._connection.send(job)
            if self._connection.poll(_STARTING):
                what = self._connection.recv()
                if self._connection.poll(self._seconds):
                    return self._case(job, what, *self._connection.recv())
            self.end()
            return self._case(job, what, "hung", f"no result after {self._seconds} seconds")
        except (EOFError, OSError):
            self._process.join()
            code, self._process = self._process.exitcode, None
            return self._case(job, what, "crashed", f"the process ended with exit code {code}")

    def plan(self, names: Sequence[str], cases: int, seed: int, scratch: Path) -> list[_Job]:
        """What `_jobs` gives, made by the process."""
        self._start()
        self._connection.send((names, cases, seed, scratch))
        return self._connection.recv()

    def _start(self) -> None:
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    @staticmethod
    def _case(job: _Job, what: str, outcome: Outcome, detail: str) -> Case:
        return Case(job.kind, job.mutation, job.number, _short(what), outcome, _short(detail))


def _serve(connection: Connection) -> None:
    """Plan jobs, or run those that come: what was done is sent before it is tried, then the outcome."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    tried = set()
    while True:
        job = connection.recv()
        if not isinstance(job, _Job):
            connection.send(_jobs(*job))
            continue
        kind = _kind(job.kind)
        if job.kind not in tried:  # libraries load, programs compile
            tried.add(job.kind)
            if (found := _judged(kind, job.path)) != ("right", ""):
                connection.send("the good input itself")
                connection.send(found)
                continue
        path = _copied(job)
        connection.send(kind.mutations[job.mutation](path, np.random.default_rng([job.seed, job.number])))
        connection.send(_judged(kind, path))
        shutil.rmtree(_case_folder(job))


def _case_folder(job: _Job) -> Path:
    return job.scratch / f"case-{job.number}"


def _copied(job: _Job) -> Path:
    folder = shutil.copytree(job.folder, _case_folder(job))
    return folder / job.path.relative_to(job.folder)


def _judged(kind: Kind, path: Path) -> tuple[Outcome, str]:
    try:
        with _limited(MEMORY + 2 * _size(path)):
            result = kind.load(path)
    except BaseException as error:  # Rust's panics are no Exception
        return _ended(error, path)
    try:
        return ("right", "") if kind.right(path, result) else ("wrong", "not what the independent reader gives")
    except Exception as error:
        return "wrong", f"the independent reader ends in {type(error).__name__}: {error}; {_where(error)}"


def _ended(error: BaseException, path: Path) -> tuple[Outcome, str]:
    """Whether an error is one that a user should meet."""
    text, cause = str(error), error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "memory", f"{text}; {_where(cause)}"
        cause = cause.__cause__ or cause.__context__
    if type(error) is not ValueError and not isinstance(error, OSError):
        return "crashed", f"{type(error).__name__}: {text}; {_where(error)}"
    if path.name not in text or "\n" in text or not text.endswith(".") or len(text) > _LONGEST:
        return "crashed", f"no sentence that names {path.name}: {text!r}; {_where(error)}"
    return "refused", text


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _where(error: BaseException) -> str:
    """The last places of an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


@contextlib.contextmanager
def _limited(more: int) -> Iterator[None]:
    """Let the process take `more` bytes of address space beyond what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size

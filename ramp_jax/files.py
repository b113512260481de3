"""Files that are whole or not there, and folders in which one process works at a time."""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ramp_jax.resources import check_disk, free_bytes

_LOCK = "lock"
_DRAWN = "[0-9a-f]" * 16  # what makes a temporary name this call's own
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_IN_WORDS = re.compile(r"\d+ requested and \d+ written|os error (28|122)\b")  # of NumPy and of safetensors
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)  # of disks and systems that cannot


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0, *, folder: bool = False, durable: bool = True) -> Iterator[Path]:
    """A file or a `folder` to fill under a name of its own beside `path`, which it takes when the body ends.

    Where the body raises, nothing is left. What dead processes left of the same `path` is removed first. Unless it is
    not `durable`, it is on the disk before it is renamed. Raises `OSError` where it cannot be made, or the disk does
    not hold it, of which `needed` bytes are known before.
    """
    with replacing_all([path], needed, folder=folder, durable=durable) as (begun,):
        yield begun


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder to work in beside `path`, removed at the end; what dead processes left of one is removed first.

    Raises `OSError` where it cannot be made.
    """
    with _temporary(path, folder=True) as folder:
        yield folder


@contextlib.contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """A locked name of its own beside `path`, where in the end nothing is left."""
    _clear(path.parent, glob.escape(path.name))
    begun = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        lock = _held(begun, folder=folder, wait=True)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); choose another output.") from error
    try:
        yield begun
    finally:
        _remove(begun)
        os.close(lock)


@contextlib.contextmanager
def replacing_all(
    paths: Sequence[Path], needed: int = 0, *, folder: bool = False, durable: bool = True
) -> Iterator[list[Path]]:
    """As `replacing`, of several beside each other that take their names when all are whole, the first one last.

    `needed` are the bytes of all.
    """
    check_disk(paths[0], needed)
    with contextlib.ExitStack() as held:
        begun = {held.enter_context(_temporary(path, folder=folder)): path for path in paths}
        with finishing(begun, needed, durable=durable):
            yield list(begun)


@contextlib.contextmanager
def finishing(begun: Mapping[Path, Path], needed: int, *, durable: bool = True) -> Iterator[None]:
    """As `replacing_all`, under names that are the caller's, where what was written stays if the body raises.

    `begun` maps these names to the final ones.
    """
    try:
        yield
        if durable:
            for temporary in begun:
                for part in temporary.rglob("*") if temporary.is_dir() else ():
                    _sync(part)
                _sync(temporary)
        for temporary, path in reversed([*begun.items()]):
            os.replace(temporary, path)
        if durable:
            for folder in {path.parent for path in begun.values()}:
                _sync(folder)
    except Exception as error:
        if getattr(error, "errno", None) not in _FULL and not _FULL_IN_WORDS.search(str(error)):
            raise
        path = next(iter(begun.values()))
        why, there = getattr(error, "strerror", None) or os.strerror(errno.ENOSPC), sum(map(size, begun))
        raise OSError(
            f"cannot write {path} ({why}): it needs {f'{needed:,}' if needed else f'more than {there:,}'} bytes, and "
            f"{free_bytes(path) + there:,} are free; free some space there, then run again."
        ) from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file or none."""
    with replacing(Path(path), len(content)) as temporary:
        temporary.write_bytes(content)


def rows_to(path: Path, index: str) -> Callable[[dict[str, Any]], None]:
    """A function that adds a row to a file of JSON Lines, in place of those that have its `index` or a later one."""
    rows = read_rows(path) if path.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows[:] = [*(before for before in rows if before[index] < row[index]), row]
        write_bytes(path, "".join(json.dumps(one) + "\n" for one in rows).encode())

    return add


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines; raises `ValueError` where it holds something else."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} does not hold one JSON object per line ({error}); delete it.") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, from which what dead ones left half-written is removed.

    Raises `OSError` that says who works there.
    """
    path = folder / _LOCK
    try:
        lock = _held(path)
    except BlockingIOError as error:
        who = path.read_text(encoding="utf-8") or "it has just begun"
        raise OSError(f"another run works on {folder} ({who}); wait for its end, or choose another output.") from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # where the disk is full, what is written next says so and names its file
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        _clear(folder, "*")
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _clear(folder: Path, name: str) -> None:
    """Remove what processes left of files whose names match, if they are dead: their locks are gone with them."""
    for left in folder.glob(f"{name}.{_DRAWN}.partial"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY if left.is_dir() else os.O_RDWR)
            try:
                if _locked(lock):
                    _remove(left)
            finally:
                os.close(lock)


def _held(path: Path, *, folder: bool = False, wait: bool = False) -> int:
    """A descriptor that locks the file or folder of that name, which is made if it is not there.

    Raises `BlockingIOError` where another process has it, unless told to `wait`.
    """
    while True:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _locked(lock, wait=wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):  # not removed by the one that had it
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _locked(lock: int, *, wait: bool = False) -> bool:
    """Lock a file, False where system or disk cannot; raises `BlockingIOError` where another process has, or waits."""
    try:
        import fcntl  # absent on Windows

        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


def _sync(path: Path) -> None:
    """Have a file, or the entries of a folder, reach the disk."""
    with contextlib.suppress(PermissionError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder, 0 where there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

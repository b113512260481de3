"""What a long job keeps beside its output, so that one that was killed goes on where it was."""

import contextlib
import functools
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
import numpy as np

from ramp_jax import files
from ramp_jax.resources import check_disk

_INPUTS, _STEP, _BEGUN = "inputs.json", ".step", ".begun"
_ARRAY = "__array__"
_ALIGNMENT = 64  # bytes at which JAX takes over an array without a copy
_TREE, _CHECKSUM = struct.Struct("<QQ"), struct.Struct("<I")  # where the tree begins and its length; of all before it
_AT_ONCE = 1 << 20  # bytes


class Journal:
    """Steps of a job by name, in a folder that is there until the job is done.

    `inputs` says by name what the steps depend on. A context manager: where the body ends, the output is in place and
    the folder is removed; where it raises, the folder stays for the next run unless nothing was saved. Opening raises
    `ValueError` where the folder holds steps of a run with other inputs, `OSError` where it cannot be made or another
    process works on it.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot keep steps in {folder} ({error.strerror}); choose another output.") from error
        with contextlib.ExitStack() as until_closed:
            until_closed.enter_context(files.alone_in(folder))
            self._claim(dict(inputs))
            self._alone = until_closed.pop_all()

    def save(self, step: str, tree: Any) -> None:
        """Keep a tree under the name of a step, in place of what that held; a kill leaves the one or the other whole.

        Trees are dicts by strings, sequences, strings, numbers, None, and arrays of the host or of the device, which
        reach the disk one by one.
        """
        keep(self._path(step), tree)

    def load(self, step: str) -> Any | None:
        """What `save` kept, None where that is not there or damaged.

        Tuples come back as lists. Arrays are read-only views of the file, which may be replaced while they are used.
        """
        return kept(self._path(step))

    def append(self, series: str, index: int, result: Any, state: Any) -> None:
        """Keep the result of the next item of a series, and the state that the items after it begin with."""
        self.save(f"{series} {index}", result)
        self.save(series, {"count": index + 1, "state": state})

    def passed(self, series: str) -> tuple[list[Any], Any | None]:
        """Results of the items that a series has been through and its state; none and None if one is damaged."""
        last = self.load(series)
        results = [self.load(f"{series} {index}") for index in range(last["count"])] if last else []
        return ([], None) if not last or any(result is None for result in results) else (results, last["state"])

    def begun(self, output: Path) -> Path:
        """Where `replacing` writes an output."""
        return self.folder / (output.name + _BEGUN)

    @contextlib.contextmanager
    def replacing(self, outputs: Mapping[Path, int]) -> Iterator[list[Path]]:
        """As `files.replacing_all`, of outputs with their bytes; where the body raises, what it wrote stays for the
        next run as the steps do."""
        begun = {self.begun(output): output for output in outputs}
        needed = sum(outputs.values())
        check_disk(next(iter(outputs)), needed - sum(map(files.size, begun)))
        with files.finishing(begun, needed):
            yield list(begun)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        over = kind is None or not any(self._steps())
        for path in (*self._steps(), *self.folder.glob(f"*{_BEGUN}"), self.folder / _INPUTS) if over else ():
            path.unlink(missing_ok=True)
        self._alone.close()
        if over:
            with contextlib.suppress(OSError):  # of someone who keeps files of his own there
                self.folder.rmdir()

    def _path(self, step: str) -> Path:
        return self.folder / (step + _STEP)

    def _steps(self) -> list[Path]:
        return [*self.folder.glob(f"*{_STEP}")]

    def _claim(self, inputs: dict[str, str]) -> None:
        """Raise `ValueError` where there are steps of other inputs."""
        try:
            found = json.loads((self.folder / _INPUTS).read_text(encoding="utf-8"))
            found = found if isinstance(found, dict) else {}
        except (FileNotFoundError, ValueError):
            found = {}
        changed = sorted(name for name in inputs.keys() | found.keys() if inputs.get(name) != found.get(name))
        if changed and self._steps():
            raise ValueError(
                f"{self.folder} keeps what a run with other inputs has done (changed: {', '.join(changed)}); restore "
                f"these to go on, or delete that folder to start afresh."
            )
        files.write_bytes(self.folder / _INPUTS, json.dumps(inputs, indent=1).encode())


class _Nowhere(Journal):
    """Keeps nothing."""

    def __init__(self) -> None:
        pass

    def save(self, step: str, tree: Any) -> None:
        pass

    def load(self, step: str) -> None:
        return None

    @contextlib.contextmanager
    def replacing(self, outputs: Mapping[Path, int]) -> Iterator[list[Path]]:
        with files.replacing_all(list(outputs), sum(outputs.values())) as temporary:
            yield temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


class Followed(Journal):
    """The journal that another process writes of the same job: read, never written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: str, tree: Any) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


NOWHERE: Journal = _Nowhere()
"""For jobs that are not worth keeping, or have no file to keep something beside."""


def keep(path: Path, tree: Any) -> None:
    """Write a tree as `Journal.save` describes it; the file is whole or not there.

    Where the machine loses its power, it may come to be damaged, which its checksum shows.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
    with files.replacing(path, needed, durable=False) as temporary, temporary.open("wb") as file:
        _write(file, tree)


def kept(path: Path) -> Any | None:
    """What `keep` wrote, None where that is not there or damaged."""
    try:
        return _read(path)
    except FileNotFoundError:
        return None


def beside(output: Path) -> Path:
    """The folder in which the job that writes `output` keeps its steps."""
    return output.with_name(output.name + ".journal")


@functools.cache
def code_version() -> str:
    """A fingerprint of this package and of what compiles it: with another one, steps need not fit together."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return f"{digest.hexdigest()}, jax {jax.__version__}, {jax.default_backend()}"


def _write(file: IO[bytes], tree: Any) -> None:
    """The arrays, then the tree that says where they are, then where the tree is, then the checksum."""
    size = total = 0

    def append(content: Any) -> None:
        nonlocal size, total
        file.write(content)
        size, total = size + len(content), zlib.crc32(content, total)

    def place(leaf: Any) -> dict[str, Any]:
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
            raise TypeError(f"a journal keeps arrays, numbers and strings, no {type(leaf).__name__}")
        array = np.asarray(leaf, order="C")
        append(bytes(-size % _ALIGNMENT))
        where = size
        append(array.reshape(-1).view(np.uint8))
        return {_ARRAY: [array.dtype.name, array.shape, where]}

    text = json.dumps(tree, default=place).encode()
    tree_at = _TREE.pack(size, len(text))
    append(text + tree_at)
    file.write(_CHECKSUM.pack(total))


def _read(path: Path) -> Any | None:
    """The tree in a file, its arrays mapped; None where the file is not as it was written."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size - _CHECKSUM.size
        if end < _TREE.size or _CHECKSUM.pack(checksum(file, end)) != file.read():
            return None
        file.seek(end - _TREE.size)
        begin, length = _TREE.unpack(file.read(_TREE.size))
        file.seek(begin)
        text, mapped = file.read(length), np.memmap(file, mode="r")

    def find(found: dict[str, Any]) -> Any:
        if found.keys() != {_ARRAY}:
            return found
        name, shape, where = found[_ARRAY]
        return np.ndarray(shape, np.dtype(name), buffer=mapped, offset=where)

    return json.loads(text, object_hook=find)


def checksum(file: IO[bytes], size: int) -> int:
    """CRC-32 of the next bytes of a file, which are read piece by piece."""
    found = 0
    while part := file.read(min(size, _AT_ONCE)):
        size, found = size - len(part), zlib.crc32(part, found)
    return found

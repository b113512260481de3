"""A script from its first line to its exit code."""

import contextlib
import functools
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from ramp_jax import devices, hosts
from ramp_jax.cli.flags import refuse_flags
from ramp_jax.cli.parsing import fail, parse

_MOST_COMPILED = 1 << 28  # bytes on disk
_WORTH_KEEPING = 0.05  # seconds of compiling; JAX keeps what took one, and most of a short job are many small programs

_STOPS = (signal.SIGINT, signal.SIGTERM)


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 0 where it succeeds.

    A foreseen failure prints its one sentence and ends with 1; SIGINT and SIGTERM let it clean up and end with 130 and
    143, so that whoever stopped a machine can tell that the job goes on when it is run again.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)
        try:
            with _stoppable():
                _keep_compiled()
                with _hosts():
                    _use_mesh()
                    main()
        except (ValueError, OSError, RuntimeError) as error:
            fail(error)
        except KeyboardInterrupt as stop:
            stopped = stop.args[0] if stop.args else signal.SIGINT
            print(f"stopped by {stopped.name}; run the same command again to go on.", file=sys.stderr)
            hosts.leave(128 + stopped)
        if jax.distributed.is_initialized():
            hosts.leave(0)

    app.run(guarded, flags_parser=functools.partial(parse, sys.modules[main.__module__]))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask for an end raise `KeyboardInterrupt` with the signal; a second one ends the process at once."""

    def stop(number: int, _: object) -> NoReturn:
        for asked in _STOPS:
            signal.signal(asked, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number))

    before = {asked: signal.getsignal(asked) for asked in _STOPS}
    for asked, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and the shell's & have it
            signal.signal(asked, stop)
    try:
        yield
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


def _keep_compiled() -> None:
    """Compiled programs serve later runs on the same machine; `JAX_COMPILATION_CACHE_DIR` names another folder.

    Only the own folder is kept small: another one may hold what is not ours.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        own = caches / "ramp_jax" / platform.node()
        keep_small(own, _MOST_COMPILED)
        jax.config.update("jax_compilation_cache_dir", str(own))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def keep_small(folder: Path, most: int) -> None:
    """Of compiled programs that take more than `most` bytes, keep as many of the last used as take half of that.

    JAX's own limit reads the age of every entry whenever it adds one, which takes longer than most compilations. When
    a program was last used is known as well as the file system tells. What cannot be dropped stays.
    """
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another script drops some as well
            known = path.stat()
            found.append((max(known.st_atime, known.st_mtime), known.st_size, path))
    left = sum(size for _, size, _ in found)
    if left <= most:
        return
    for _, size, path in sorted(found):
        if left <= most // 2:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            path.with_name(path.name.removesuffix("-cache") + "-atime").unlink(missing_ok=True)  # of JAX's own limit
        left -= size


def _hosts() -> contextlib.AbstractContextManager[Any]:
    """All processes of the job, where a script has the flags of `define_hosts` and they are given."""
    values = flags.FLAGS
    if "hosts" not in values:
        return contextlib.nullcontext()
    if values.hosts is None:
        refuse_flags(["patience"], "without --hosts")
        return contextlib.nullcontext()
    if values.output is None:
        raise ValueError("--output is missing; its folder is where the processes of --hosts exchange what they find.")
    where, count, index = (None, None, None) if values.hosts == "auto" else values.hosts.split(",")
    folder = Path(values.output).expanduser().parent
    return hosts.joined(folder, where, count and int(count), index and int(index), values.patience)


def _use_mesh() -> None:
    """Compute on the mesh that `--mesh` describes, where a script has that flag and it is given."""
    if "mesh" in flags.FLAGS and (text := flags.FLAGS.mesh) is not None:
        devices.use(devices.make_mesh(*map(int, text.split("x"))))

"""Whole tensors from the host: rows go in chunks, so that memory is bounded and all cores work.

On one CPU device encoders see blocks and not rows, so that one program per format serves all row lengths: compiling an
encoder takes longer than running it on a small model. Accelerators encode rows, up to whole matrices of one row length
at once, and so do several devices. Inside a compiled function the same calls simply become part of it.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax import devices, hosts
from ramp_jax.cores import cores
from ramp_jax.formats.legacy import mean_square
from ramp_jax.formats.registry import Effort, get_format
from ramp_jax.formats.search import LANES

_CPU_CHUNK = 256 * LANES  # weights; the searches' own chunks fit into it without a remainder
_ACCELERATOR_CHUNK = 1 << 24
_ACCELERATOR_ROWS = 1 << 27  # weights of rows that go through long loops of small steps, where only their number counts


def encode(
    w: Float[Array, "*rows I"],
    name: str,
    importance: Float[Array, " I"] | None = None,
    effort: Effort = "reference",
) -> Any:
    """Codes of w in format `name`, see `Format.encode`; peaks below 6 times the size of w in f32, w included."""
    return _in_chunks(functools.partial(encode_rows, name=name, effort=effort), w, importance)


def round_trip(
    w: Float[Array, "*rows I"],
    name: str,
    importance: Float[Array, " I"] | Float[Array, "*rows I"] | None = None,
    effort: Effort = "reference",
) -> Float[Array, "*rows I"]:
    """What w becomes in format `name`: encoded and decoded."""
    return _in_chunks(functools.partial(round_trip_rows, name=name, effort=effort), w, importance)


@functools.partial(jax.jit, static_argnames="name")
def decode(codes: Any, name: str) -> Float[Array, "*rows I"]:
    """Weights that codes of format `name` stand for."""
    return get_format(name).decode(codes)


def encode_rows(
    w: Float[Array, "R I"],
    importance: Float[Array, " I"] | Float[Array, "R I"] | None,
    name: str,
    effort: Effort,
) -> Any:
    """Codes of rows that are encoded together, as `in_row_chunks` cuts them."""
    if not _in_blocks(w, name):
        return _encode(w, importance, name, effort)
    rows, per_row = len(w), w.shape[1] // get_format(name).block_size
    codes = _encode_blocks(w, importance, name, effort)
    return jax.tree.map(lambda a: np.asarray(a)[: rows * per_row].reshape(rows, per_row, *a.shape[2:]), codes)


def round_trip_rows(
    w: Float[Array, "R I"],
    importance: Float[Array, " I"] | Float[Array, "R I"] | None,
    name: str,
    effort: Effort,
) -> Float[Array, "R I"]:
    """What rows that are encoded together become."""
    if not _in_blocks(w, name):
        return decode(_encode(w, importance, name, effort), name)
    blocks = np.asarray(decode(_encode_blocks(w, importance, name, effort), name))
    return blocks[: w.size // blocks.shape[1]].reshape(w.shape)


def _in_blocks(w: jax.Array, name: str) -> bool:
    """Whether rows are encoded block by block; plain floats have none."""
    traced = isinstance(w, jax.core.Tracer)
    return not traced and jax.default_backend() == "cpu" and get_format(name).block_size > 1


def _encode_blocks(w: jax.Array, importance: jax.Array | None, name: str, effort: Effort) -> Any:
    """Codes of rows of one block each: those of w, filled up to the lanes of a search or to a chunk."""
    fmt = get_format(name)
    size = fmt.block_size
    fmt.row_bytes(w.shape[1])  # says so where blocks do not divide rows
    blocks = np.asarray(w, np.float32).reshape(-1, size)
    count = LANES if len(blocks) <= LANES else max(len(blocks), _CPU_CHUNK // size)
    weights = square = None
    if importance is not None:
        weights = np.broadcast_to(np.asarray(importance, np.float32), w.shape).reshape(-1, size)
        square = np.repeat(np.asarray(_mean_square(w)), w.shape[1] // size) if fmt.weighs_rows else None
    blocks, weights, square = jax.tree.map(lambda a: _filled(a, count), (blocks, weights, square))
    return _encode(blocks, weights, name, effort, square)


_mean_square = jax.jit(mean_square)


@functools.partial(jax.jit, static_argnames=("name", "effort"))
def _encode(
    w: jax.Array, importance: jax.Array | None, name: str, effort: Effort, row_square: jax.Array | None = None
) -> Any:
    return get_format(name).encode(w, importance, effort, row_square)


def in_row_chunks(
    run: Callable[..., Any],
    w: Float[Array, "R I"],
    *rest: Any,
    beside: Sequence[Float[Array, "R ..."]] = (),
    apart: bool = False,
    on_accelerator: int = _ACCELERATOR_ROWS,
) -> list[Any]:
    """`run(rows, *rest)` of equal chunks of w's rows in f32, on all cores, devices and hosts; zeros fill up the last.

    The rows of arrays `beside` it come after w's. Accelerators take up to `on_accelerator` weights at once, whole
    matrices as a rule. Where rows are `apart`, which makes a result the same however many go together, several devices
    and hosts share what is less than a chunk for each.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = max(1, (_CPU_CHUNK if on_cpu else on_accelerator) // w.shape[1])
    if not on_cpu:
        size = min(size, len(w))
    elif 2 * (filled := 1 << (len(w) - 1).bit_length()) <= size:
        size = filled  # a program of its own; above half of a chunk, filling it up costs less than compiling
    if apart and (workers := devices.count() * hosts.count()) > 1:
        size = min(size, -(-len(w) // workers))
    arrays = _arrays()
    together = [arrays.asarray(a) for a in (w, *beside)]

    def chunk(start: int) -> tuple[Float[Array, "S ..."], ...]:
        return tuple(jnp.asarray(_filled(a[start : start + size], size), jnp.float32) for a in together)

    def all_jobs(starts: Sequence[int]) -> list[Any]:
        if devices.current() is not None:
            return list(devices.each(run, map(chunk, starts), *rest))
        return list((_pool().map if on_cpu else map)(one_job, starts))

    def one_job(start: int) -> Any:
        return jax.block_until_ready(run(*chunk(start), *rest))

    return hosts.shared(all_jobs, range(0, len(w), size))


def side_by_side(run: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`run(item)` of every item, each of which calls `in_row_chunks`: at the same time on the cores of one device, so
    that tensors of few chunks fill them, and what is compiled for one does not wait for another."""
    together = jax.default_backend() == "cpu" and devices.current() is None and hosts.count() == 1
    return list((_callers().map if together else map)(run, items))


def _in_chunks(run: Callable[..., Any], w: jax.Array, importance: jax.Array | None) -> Any:
    """`run(rows [R, I], importance)` over all rows of w, put together again."""
    if isinstance(w, jax.core.Tracer):
        return run(w, importance)
    *lead, n_in = w.shape
    rows = w.reshape(-1, n_in)
    own = importance is not None and importance.ndim > 1
    beside, rest = ([_arrays().broadcast_to(importance, w.shape).reshape(-1, n_in)], []) if own else ([], [importance])
    chunks = in_row_chunks(run, rows, *rest, beside=beside, apart=True, on_accelerator=_ACCELERATOR_CHUNK)

    def join(*leaves: jax.Array) -> jax.Array | np.ndarray:
        return _arrays().concatenate(leaves)[: len(rows)].reshape(*lead, *leaves[0].shape[1:])

    return jax.tree.map(join, *chunks)


def _filled(a: Float[Array, "R ..."], count: int) -> Float[Array, "N ..."]:
    """Zeros after the last row where there are fewer than `count`."""
    pad = np.pad if isinstance(a, np.ndarray) else jnp.pad
    return pad(a, [(0, count - len(a)), *[(0, 0)] * (a.ndim - 1)]) if len(a) < count else a


def _arrays() -> Any:
    """What cuts rows and joins chunks: NumPy where weights lie on the host, since JAX would compile every cut and join
    for its number of rows."""
    return np if jax.default_backend() == "cpu" and devices.current() is None else jnp


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """One thread per core: a chunk of this size keeps one core busy, XLA does not spread it over more."""
    return ThreadPoolExecutor(cores())


@functools.cache
def _callers() -> ThreadPoolExecutor:
    """Threads that only wait for those of `_pool`."""
    return ThreadPoolExecutor(cores())

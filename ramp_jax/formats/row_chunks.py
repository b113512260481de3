"""Whole tensors from the host: rows go in chunks, so memory is bounded, all cores work and one compilation serves all
tensors with the same row length (on accelerators, tensors of less than a chunk compile for their number of rows, too).

Inside a compiled function the same calls simply become part of it.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax import devices, hosts
from ramp_jax.cores import cores
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
    return _in_chunks(functools.partial(_encode, name=name, effort=effort), w, importance)


def round_trip(
    w: Float[Array, "*rows I"],
    name: str,
    importance: Float[Array, " I"] | None = None,
    effort: Effort = "reference",
) -> Float[Array, "*rows I"]:
    """What w becomes in format `name`: encoded and decoded in one compiled call."""
    return _in_chunks(functools.partial(_round_trip, name=name, effort=effort), w, importance)


@functools.partial(jax.jit, static_argnames="name")
def decode(codes: Any, name: str) -> Float[Array, "*rows I"]:
    """Weights that codes of format `name` stand for."""
    return get_format(name).decode(codes)


@functools.partial(jax.jit, static_argnames=("name", "effort"))
def _encode(w: jax.Array, importance: jax.Array | None, name: str, effort: Effort) -> Any:
    return get_format(name).encode(w, importance, effort)


@functools.partial(jax.jit, static_argnames=("name", "effort"))
def _round_trip(w: jax.Array, importance: jax.Array | None, name: str, effort: Effort) -> jax.Array:
    fmt = get_format(name)
    return fmt.decode(fmt.encode(w, importance, effort))


def in_row_chunks(
    run: Callable[..., Any],
    w: Float[Array, "R I"],
    *rest: Any,
    each: Iterable[Any] | None = None,
    on_accelerator: int = _ACCELERATOR_ROWS,
) -> list[Any]:
    """`run(rows, *rest)` of equal chunks of w's rows in f32, on all cores, devices and hosts; zeros fill up the last.

    With `each`, `run(rows, item, *rest)` for every item of it, all chunks of the first item first. Accelerators take up
    to `on_accelerator` weights at once, whole matrices as a rule.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = max(1, (_CPU_CHUNK if on_cpu else on_accelerator) // w.shape[1])
    if not on_cpu:
        size = min(size, len(w))
    elif 2 * (filled := 1 << (len(w) - 1).bit_length()) <= size:
        size = filled  # a program of its own; above half of a chunk, filling it up costs less than compiling
    items = [()] if each is None else [(item,) for item in each]
    arrays = _arrays()
    w = arrays.asarray(w)

    def chunk(start: int) -> Float[Array, "S I"]:
        rows = w[start : start + size]
        short = size - len(rows)
        return jnp.asarray(arrays.pad(rows, ((0, short), (0, 0))) if short else rows, jnp.float32)

    def all_jobs(jobs: Sequence[tuple[tuple[Any, ...], int]]) -> list[Any]:
        if devices.current() is not None:
            return list(devices.each(run, ((chunk(start), *item) for item, start in jobs), *rest))
        return list((_pool().map if on_cpu else map)(one_job, jobs))

    def one_job(job: tuple[tuple[Any, ...], int]) -> Any:
        item, start = job
        return jax.block_until_ready(run(chunk(start), *item, *rest))

    return hosts.shared(all_jobs, list(itertools.product(items, range(0, len(w), size))))


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
    chunks = in_row_chunks(run, rows, importance, on_accelerator=_ACCELERATOR_CHUNK)

    def join(*leaves: jax.Array) -> jax.Array | np.ndarray:
        return _arrays().concatenate(leaves)[: len(rows)].reshape(*lead, *leaves[0].shape[1:])

    return jax.tree.map(join, *chunks)


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

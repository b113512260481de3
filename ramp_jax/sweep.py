"""The one way over a decoder's blocks: hidden states travel, weights do not.

A stage of the work is a visit: what it does with a block while that block is there, and the hidden states that it
passes on. `forward` and `backward` say which block is there.
"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax import devices, scratch
from ramp_jax.models import DecoderSpec, sharding
from ramp_jax.models.decoder import Params, block_forward, embed
from ramp_jax.models.layout import Block, full_name
from ramp_jax.models.store import StoredParams
from ramp_jax.progress import track

# of windows that go through a block together; on CPUs few, since a call maps what it needs for a moment anew each time
_TOKENS_AT_ONCE, _TOKENS_ON_ACCELERATORS = 512, 2048


class Place(NamedTuple):
    """Where a sweep is: a block, its index, and its part of the parameter tree."""

    index: int
    block: Block
    weights: Params

    def full(self, name: str) -> str:
        """An activation of this block by its name in the whole decoder."""
        return full_name(self.index, name)


def forward(spec: DecoderSpec, params: Params, doing: str | None = None, *, first: int = 0) -> Iterator[Place]:
    """Every block from `first` on, in order; `doing` is what a progress bar says."""
    return _visited(spec, params, range(first, len(spec.blocks)), doing)


def backward(spec: DecoderSpec, params: Params, doing: str | None = None, *, passed: int = 0) -> Iterator[Place]:
    """Every block, the last one first, but for as many as were `passed` before."""
    return _visited(spec, params, range(len(spec.blocks) - 1 - passed, -1, -1), doing)


def _visited(spec: DecoderSpec, params: Params, order: range, doing: str | None) -> Iterator[Place]:
    blocks = _read_ahead(params, order) if isinstance(params, StoredParams) else (params["blk"][i] for i in order)
    for index, weights in zip(track(order, doing, "block") if doing else order, blocks, strict=True):
        yield Place(index, spec.blocks[index], weights)


def _read_ahead(params: StoredParams, order: range) -> Iterator[Params]:
    """Blocks from disk; the next one is read while the current one computes."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(params.fetch, order[0]) if order else None
        for index, after in zip(order, [*order[1:], None], strict=True):
            fetched = ahead.result()
            ahead = None if after is None else reader.submit(params.fetch, after)
            yield params.finished(index, fetched)


def begin(spec: DecoderSpec, params: Params, windows: Int[np.ndarray, "W T"]) -> Float[Array, "W T D"]:
    """Hidden states before the first block; where they outgrow memory, in a file that every `through` writes anew."""
    shape = (*windows.shape, spec.d_model)
    if math.prod(shape) * 4 <= scratch.LARGEST:
        return embed(spec, params, windows)
    x = scratch.empty(shape)
    for window, ids in zip(x, windows, strict=True):
        window[:] = embed(spec, params, ids)
    scratch.release(x)
    return x


def held(x: Float[np.ndarray, "W T D"]) -> Float[Array, "W T D"]:
    """Hidden states that were kept somewhere, where a sweep can go on with them and leave those as they are."""
    if x.nbytes <= scratch.LARGEST:
        return jnp.asarray(x)
    copy = scratch.empty(x.shape)
    for window, kept in zip(copy, x, strict=True):
        window[:] = kept
        scratch.release(copy)
        scratch.release(x)
    return copy


def advance(at: Place, x: Float[Array, "W T D"]) -> Float[Array, "W T D"]:
    """Hidden states after the block; those before it are given up.

    One block computes at a time: whoever runs ahead of that holds the weights of all blocks that wait for their turn.
    """
    x = jax.block_until_ready(x)
    run = functools.partial(block_forward, at.block, placed(at))
    return through(lambda part: (run(part), None), x)[0]


def placed(at: Place) -> Params:
    """The block's tensors where windows go through it: on all devices, rows of matrices along `model`."""
    return sharding.placed(at.block, at.weights)


def through(
    run: Callable[..., tuple[Float[Array, "B T D"], Any]], x: Float[Array, "W T D"], *more: Any
) -> tuple[Float[Array, "W T D"], Any]:
    """Hidden states after what `run` does with batches of windows, and what else it finds, `[W, ...]`.

    `more` are arrays `[W, ...]` beside the states, which are given up.
    """
    if not isinstance(x, np.ndarray):
        return in_batches(run, x, *more)

    def in_place(part: np.ndarray, *beside: Any) -> Any:
        y, found = devices.along_data(run, part, *beside)
        part[:] = y
        return found

    size, found = _batch(*x.shape[:2]), []
    for start in range(0, len(x), size):
        batch = slice(start, start + size)
        found.append(in_place(x[batch], *(a[batch] for a in more)))
        scratch.release(x)
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)


def in_batches(run: Callable[..., Any], x: Float[Array, "W T D"], *more: Any) -> Any:
    """`run` over equal batches of windows, put together again; `more` are arrays `[W, ...]` beside the states.

    The windows of a batch are dealt out along the mesh's `data`.
    """
    windows, size = len(x), _batch(*x.shape[:2])
    if size == windows:
        return jax.tree.map(jnp.asarray, devices.along_data(run, x, *more))
    padded = [jnp.pad(a, ((0, -windows % size), *[(0, 0)] * (a.ndim - 1))) for a in (x, *more)]
    batches = ([a[start : start + size] for a in padded] for start in range(0, len(padded[0]), size))
    parts = [devices.along_data(run, *batch) for batch in batches]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:windows], *parts)


def _batch(windows: int, time: int) -> int:
    """How many windows go together, so that all batches but the last are equal and no device gets too much."""
    each = _TOKENS_AT_ONCE if jax.default_backend() == "cpu" else _TOKENS_ON_ACCELERATORS
    count = min(-(-windows * time // (each * devices.width())), windows)
    return -(-windows // count)

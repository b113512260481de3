"""What ggml's superblocks of 256 weights share: lanes of blocks, sub-blocks, and how errors are weighed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ramp_jax.formats.rounding import blocks_of, map_lanes, opaque_one, square_root, sum_rows
from ramp_jax.formats.search import LANES

BLOCK = 256

_CHUNK = 2 * LANES  # superblocks whose intermediate arrays exist at one time

Weights = Float[Array, "*rows I"]
Importance = Float[Array, " I"] | Float[Array, "*rows I"] | None


def encode_superblocks(one_chunk: Callable[..., Any], w: Weights, importance: Importance, coarse: bool) -> Any:
    """Apply `one_chunk(x [256, N], importance [256, N] or None, one, coarse)` → codes, lanes last, to all blocks."""
    one = opaque_one(w)
    blocks = blocks_of(w, BLOCK)
    lead = blocks.shape[:-1]
    columns = [blocks]
    if importance is not None:
        columns.append(jnp.broadcast_to(blocks_of(importance, BLOCK), blocks.shape))
    lanes = [a.reshape(-1, BLOCK).T for a in columns]
    codes = map_lanes(lambda x, i=None: one_chunk(x, i, one, coarse), _CHUNK, *lanes)
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0).reshape(*lead, *a.shape[:-1]), codes)


def error_weights(x: jax.Array, importance: jax.Array, spread: int, size: int, one: jax.Array) -> jax.Array:
    """importance · √(spread · mean square of the superblock + x²), `[E, S, N]`."""
    mean_square = spread * sum_rows(list(x * x), one) / BLOCK
    return sub_blocks(importance * square_root(mean_square[None] + one * (x * x)), size)


def search_lanes(
    find: Callable[..., tuple[jax.Array, ...]], subs: jax.Array, weight: jax.Array, lanes: int = LANES
) -> tuple[jax.Array, ...]:
    """Run a search over the lanes of all sub-blocks `[E, S, N]`; results `[…, S, N]`."""
    tail = subs.shape[1:]
    found = map_lanes(find, lanes, subs.reshape(subs.shape[0], -1), weight.reshape(subs.shape[0], -1))
    return tuple(a.reshape(*a.shape[:-1], *tail) for a in found)


def sub_blocks(x: jax.Array, size: int) -> jax.Array:
    """`[256, N]` → elements first, `[size, 256 / size, N]`."""
    return jnp.swapaxes(x.reshape(-1, size, x.shape[-1]), 0, 1)


def whole(subs: jax.Array) -> jax.Array:
    """Undo `sub_blocks`."""
    return jnp.swapaxes(subs, 0, 1).reshape(-1, subs.shape[-1])

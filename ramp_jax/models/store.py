"""Parameter trees whose tensors stay in the checkpoint and are read whenever they are asked for.

A tree is either a dictionary of arrays, all of it in memory, or `StoredParams`, a mapping of the same shape:
`params["blk"][3]` reads one block. Sweeps fetch the next block while the current one computes (`fetch`, then
`finish`), so that memory holds two blocks whatever the number of layers.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.checkpoint import digest
from ramp_jax.models.layout import Params, Tensor, lookup, nest, tensors
from ramp_jax.models.source import Rows

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

Read = Callable[[Tensor, Rows], np.ndarray]
"""Rows of a tensor as the checkpoint stores them, in its own dtype or the tree's, whichever is narrower."""

Finish = Callable[[Tensor, np.ndarray], jax.Array]
"""What was read, on the device as the tree holds it."""

Change = Callable[[int, Params], Params]
"""Another block from the index and the tensors of one."""

ALL = slice(None)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredParams(Mapping[str, Any]):
    """The tree of a decoder's parameters, read from its checkpoint.

    `dtype` is that of the matrices. `changes` are applied to every block in turn after it was read. `stamp` names the
    files with their sizes and time stamps.
    """

    spec: "DecoderSpec"
    read: Read
    finish: Finish
    dtype: Any
    stamp: Mapping[str, str]
    changes: tuple[Change, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name == "blk":
            return _Blocks(self)
        for tensor in self._outside:
            if tensor.path[0] == name:
                return {"weight": self.rows(tensor)}
        raise KeyError(name)

    def __iter__(self) -> Iterator[int | str]:
        return iter(dict.fromkeys(tensor.path[0] for tensor in tensors(self.spec)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def _outside(self) -> list[Tensor]:
        return [tensor for tensor in tensors(self.spec) if tensor.layer is None]

    def rows(self, tensor: Tensor, rows: Rows = ALL) -> jax.Array:
        """Some rows of a tensor outside the blocks."""
        value = self.finish(tensor, self.read(tensor, rows))
        return value.astype(self.dtype) if tensor.is_matrix else value

    def as_stored(self, name: str) -> np.ndarray:
        """A matrix outside the blocks in its own dtype or the tree's, whichever is narrower."""
        (tensor,) = (tensor for tensor in self._outside if tensor.path[0] == name)
        return self.read(tensor, ALL)

    def fetch(self, index: int) -> dict[Tensor, np.ndarray]:
        """A block's tensors as they are stored: what can be done while another block computes."""
        return {tensor: self.read(tensor, ALL) for tensor in tensors(self.spec) if tensor.layer == index}

    def finished(self, index: int, fetched: Mapping[Tensor, np.ndarray]) -> Params:
        """The block of what was fetched, with all changes."""
        block = nest((tensor, self.finish(tensor, value)) for tensor, value in fetched.items())["blk"][index]
        for change in self.changes:
            block = change(index, block)
        return block

    def changed(self, change: Change) -> "StoredParams":
        """The tree with one more change of every block."""
        return dataclasses.replace(self, changes=(*self.changes, change))

    def astype(self, dtype: Any) -> "StoredParams":
        """The tree with matrices in another dtype, converted from this one."""
        matrices = {tensor.path[2:] for tensor in tensors(self.spec) if tensor.layer is not None and tensor.is_matrix}

        def cast(_: int, block: Params) -> Params:
            return {
                module: {
                    name: value.astype(dtype) if (module, name) in matrices else value for name, value in part.items()
                }
                for module, part in block.items()
            }

        return dataclasses.replace(self.changed(cast), dtype=jnp.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class _Blocks(Mapping[int, Params]):
    """The blocks of a tree by their index, each read when it is asked for."""

    params: StoredParams

    def __getitem__(self, index: int) -> Params:
        if not 0 <= index < len(self):
            raise KeyError(index)
        return self.params.finished(index, self.params.fetch(index))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.params.spec.blocks)


def rows_of(params: Params, tensor: Tensor, rows: Rows = ALL) -> Float[Array, "R I"]:
    """Some rows of a matrix, or all; of one outside the blocks nothing else is read."""
    if isinstance(params, StoredParams) and tensor.layer is None:
        return params.rows(tensor, rows)
    return lookup(params, tensor)[rows]


def rows_named(params: Params, tensor: Tensor, ids: Int[np.ndarray, "*n"]) -> tuple[Any, Int[np.ndarray, "*n"]]:
    """The rows `[R, I]` of a matrix that ids name, each of them once, and at which of these the row of each id lies."""
    named, places = np.unique(ids, return_inverse=True)
    return rows_of(params, tensor, named), places.reshape(np.shape(ids))


def pieces_of(params: Params, tensor: Tensor, rows: int) -> Iterator[Float[Array, "R I"]]:
    """A matrix in pieces of so many rows, one after the other; the last may be shorter."""
    for start in range(0, tensor.shape[0], rows):
        yield rows_of(params, tensor, slice(start, start + rows))


def fingerprint(params: Params) -> str:
    """What tells parameters from others: their files with sizes and time stamps, or a digest of the arrays."""
    return json.dumps(dict(params.stamp)) if isinstance(params, StoredParams) else digest(params)


def in_memory(params: Params) -> Params:
    """The tree as a dictionary of arrays."""
    if not isinstance(params, StoredParams):
        return params
    ends = {name: params[name] for name in params if name != "blk"}
    return ends | {"blk": dict(params["blk"])}

"""Whole states in one file, PRNG keys included; digests of arrays."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import serialization

from ramp_jax.files import write_bytes

T = TypeVar("T")


def save(path: str | Path, tree: Any) -> None:
    """Write a pytree of arrays, keys, numbers, strings, dicts and named tuples; the file is whole or not there."""
    write_bytes(path, serialization.to_bytes(jax.tree.map(_plain, tree)))


def load(path: str | Path, like: T) -> T:
    """Read what `save` wrote into the structure of `like`, bit for bit.

    Raises `ValueError` where the file is damaged or holds another structure.
    """
    try:
        template, saved = jax.tree.map(_plain, like), serialization.msgpack_restore(Path(path).read_bytes())
        if jax.tree.structure(saved) != jax.tree.structure(serialization.to_state_dict(template)):
            raise ValueError("it is built differently")
        return jax.tree.map(_restore, like, serialization.from_state_dict(template, saved))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this run ({error}); delete it to start afresh.") from error


def digest(tree: Any) -> str:
    """SHA-256 of a pytree's arrays with their names, shapes and dtypes; one array is on the host at a time."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array: np.ndarray | jax.Array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.view(np.uint8))
    return digest.hexdigest()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf))
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _restore(like: Any, leaf: Any) -> Any:
    if not isinstance(like, jax.Array):
        return leaf
    expected = _plain(like)
    if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
        raise ValueError(f"an array is {leaf.dtype}{list(leaf.shape)}, expected {expected.dtype}{list(expected.shape)}")
    return jax.random.wrap_key_data(leaf) if _is_key(like) else jax.numpy.asarray(leaf)

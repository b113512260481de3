"""Checks before encoding and a cache behind it, on the host: what jitted encoders cannot do."""

import collections
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ramp_jax.formats.registry import NEEDS_IMPORTANCE, Effort, get_format
from ramp_jax.formats.row_chunks import encode


def check(tensor: str, w: np.ndarray, fmt: str, importance: np.ndarray | None = None) -> np.ndarray | None:
    """Raise `ValueError` where format `fmt` cannot encode w `[*rows, I]` of the tensor of that name.

    Returns the importance `[I]` to encode with: where it is all zeros None, or ones for formats that need some.
    """
    known = get_format(fmt)
    n_in = w.shape[-1]
    if n_in % known.block_size:
        raise ValueError(f"{tensor} cannot be {fmt}: rows of {n_in} weights are no multiple of {known.block_size}.")
    peak = float(_peak(w) if isinstance(w, jax.Array) else np.max(np.abs(np.asarray(w, np.float32)), initial=0.0))
    if not np.isfinite(peak):
        kind = "NaN" if np.isnan(peak) else "infinity"
        raise ValueError(f"{tensor} cannot be {fmt}: a weight is {kind}; repair the source model.")
    if peak > known.largest:
        bound = f"|weight| {peak:g} is beyond its scales, at most {known.largest:g}"
        raise ValueError(f"{tensor} cannot be {fmt}: {bound}.")
    if known.needs_importance and importance is None:
        raise ValueError(f"{tensor} cannot be {fmt}: there is no importance of its inputs; {NEEDS_IMPORTANCE}.")
    if importance is None:
        return None
    importance = np.asarray(importance, np.float32)
    if importance.shape != (n_in,):
        raise ValueError(f"{tensor} cannot be {fmt}: importance has shape {importance.shape}, not ({n_in},).")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"{tensor} cannot be {fmt}: importance has a negative or non-finite entry.")
    if importance.any():
        return importance
    return np.ones_like(importance) if known.needs_importance else None


@jax.jit
def _peak(w: Float[Array, "*rows I"]) -> Float[Array, ""]:
    """Largest magnitude, found where the weights are; not finite where one is not."""
    return jnp.max(jnp.abs(w), initial=0.0)


def checked_encode(
    tensor: str,
    w: Float[np.ndarray, "*rows I"],
    fmt: str,
    importance: Float[np.ndarray, " I"] | None = None,
    effort: Effort = "reference",
) -> Any:
    """Codes of w after `check`; `tensor` names it in errors."""
    return encode(w, fmt, check(tensor, w, fmt, importance), effort)


class EncodeCache:
    """Codes by content: the same weights, format, importance and effort are encoded once.

    Holds at most `max_bytes` of codes and forgets the least recently used.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self._codes: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._bytes = 0

    def encode(
        self,
        tensor: str,
        w: Float[np.ndarray, "*rows I"],
        fmt: str,
        importance: Float[np.ndarray, " I"] | None = None,
        effort: Effort = "reference",
    ) -> Any:
        """Checked codes of w; `tensor` names it in errors."""
        w = np.asarray(w, np.float32)
        importance = check(tensor, w, fmt, importance)
        key = _content(w, importance, fmt, effort)
        if key in self._codes:
            self.hits += 1
            self._codes.move_to_end(key)
            return self._codes[key]
        codes = encode(w, fmt, importance, effort)
        self._codes[key] = codes
        self._bytes += _size(codes)
        while self._bytes > self.max_bytes and len(self._codes) > 1:
            self._bytes -= _size(self._codes.popitem(last=False)[1])
        return codes


def _content(w: np.ndarray, importance: np.ndarray | None, fmt: str, effort: str) -> str:
    digest = hashlib.blake2b(f"{fmt} {effort} {w.shape} {importance is None}".encode(), digest_size=16)
    for part in (w, importance):
        if part is not None:
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


def _size(codes: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(codes))

"""Weights as they will be after export, for the forward pass."""

import jax.numpy as jnp

from ramp_jax.allocation import Allocation
from ramp_jax.formats import decode
from ramp_jax.formats.check import EncodeCache
from ramp_jax.models import Model, Tensor, allocatable, lookup
from ramp_jax.models.decoder import Params


def fake_quantize(model: Model, allocation: Allocation, cache: EncodeCache | None = None) -> Params:
    """Parameters whose every allocated tensor went through its format; shapes and dtypes are the model's.

    With a `cache`, what an earlier allocation encoded is only decoded. Raises `ValueError` where a tensor cannot be
    encoded.
    """
    cache = EncodeCache(max_bytes=0) if cache is None else cache

    def rounded(tensor: Tensor) -> jnp.ndarray:
        w, fmt = lookup(model.params, tensor), allocation.formats[tensor.name]
        return decode(cache.encode(tensor.name, w, fmt), fmt).astype(w.dtype)

    members = allocatable(model.spec)
    top = {tensor.key: rounded(tensor) for tensor in members if tensor.layer is None}
    keys = dict.fromkeys(tensor.key for tensor in members if tensor.layer is not None)
    layers = {key: jnp.stack([rounded(t) for t in members if t.key == key]) for key in keys}
    return {**model.params, **top, "blk": {**model.params["blk"], **layers}}

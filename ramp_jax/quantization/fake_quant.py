"""Weights as they will be after export, for the forward pass."""

import jax

from ramp_jax.allocation import Allocation
from ramp_jax.formats import decode
from ramp_jax.formats.check import EncodeCache, checked_encode
from ramp_jax.models import Model, Tensor, allocatable, lookup
from ramp_jax.models.decoder import Params
from ramp_jax.models.names import replaced


def fake_quantize(model: Model, allocation: Allocation, cache: EncodeCache | None = None) -> Params:
    """Parameters whose every allocated tensor went through its format; shapes and dtypes are the model's.

    With a `cache`, what an earlier allocation encoded is only decoded. Raises `ValueError` where a tensor cannot be
    encoded.
    """
    encode = checked_encode if cache is None else cache.encode

    def rounded(tensor: Tensor) -> jax.Array:
        w, fmt = lookup(model.params, tensor), allocation.formats[tensor.name]
        return decode(encode(tensor.name, w, fmt), fmt).astype(w.dtype)

    return replaced(model.params, allocatable(model.spec), rounded)

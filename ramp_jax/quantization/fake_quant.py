"""Weights as they will be after export, for the forward pass."""

import jax.numpy as jnp

from ramp_jax.allocation import Allocation
from ramp_jax.formats import round_trip
from ramp_jax.models import Model, Tensor, allocatable, lookup
from ramp_jax.models.decoder import Params


def fake_quantize(model: Model, allocation: Allocation) -> Params:
    """Parameters whose every allocated tensor went through its format; shapes and dtypes are the model's."""

    def rounded(tensor: Tensor) -> jnp.ndarray:
        w = lookup(model.params, tensor)
        return round_trip(w.astype(jnp.float32), allocation.formats[tensor.name]).astype(w.dtype)

    members = allocatable(model.spec)
    top = {tensor.key: rounded(tensor) for tensor in members if tensor.layer is None}
    keys = dict.fromkeys(tensor.key for tensor in members if tensor.layer is not None)
    layers = {key: jnp.stack([rounded(t) for t in members if t.key == key]) for key in keys}
    return {**model.params, **top, "blk": {**model.params["blk"], **layers}}

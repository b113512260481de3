"""Weights as they will be after export, for the forward pass."""

import jax

from ramp_jax.allocation import Allocation
from ramp_jax.formats import decode
from ramp_jax.models import Model, Tensor, lookup, matrices
from ramp_jax.models.decoder import Params
from ramp_jax.models.layout import replaced
from ramp_jax.quantization.encoder import REFERENCE, Encoder


def fake_quantize(model: Model, allocation: Allocation, encoder: Encoder = REFERENCE) -> Params:
    """Parameters whose every matrix went through its format; shapes and dtypes are the model's.

    Raises `ValueError` where a tensor cannot be encoded.
    """
    members = matrices(model.spec)
    return replaced(model.params, ((t, decoded(model, t, allocation.format_of(t), encoder)) for t in members))


def decoded(model: Model, tensor: Tensor, fmt: str, encoder: Encoder = REFERENCE) -> jax.Array:
    """The tensor as it is after its format, in its own dtype."""
    return decode(encoder.encode(model, tensor, fmt), fmt).astype(lookup(model.params, tensor).dtype)

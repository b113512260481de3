"""Weights as they will be after export, for the forward pass."""

import jax
import jax.numpy as jnp

from ramp_jax.allocation import Allocation
from ramp_jax.formats import decode
from ramp_jax.models import Model, Tensor, lookup
from ramp_jax.models.decoder import Params, weights_dtype
from ramp_jax.models.layout import nest
from ramp_jax.models.load import parameter_bytes
from ramp_jax.quantization.encode import Codes, encoded
from ramp_jax.quantization.encoder import REFERENCE, Encoder
from ramp_jax.resources import check_memory


def fake_quantize(model: Model, allocation: Allocation, encoder: Encoder = REFERENCE) -> Params:
    """Parameters in memory whose every tensor went through its format, folded as `allocation` says: those of the file
    that `export_gguf` writes of the same model with the same encoder.

    Shapes and dtypes are the model's. Raises `ValueError` where a tensor cannot be encoded, `OSError` where memory does
    not hold them: a file that was exported is evaluated block by block.
    """
    dtype = jnp.dtype(weights_dtype(model.params))
    check_memory(parameter_bytes(model.spec, dtype), f"the decoded model in {dtype.name}")

    def value(tensor: Tensor, pieces: Codes) -> jax.Array:
        fmt = allocation.format_of(tensor)
        kept = dtype if tensor.is_matrix else jnp.float32
        return jnp.concatenate([decode(codes, fmt).astype(kept) for codes in pieces])

    return nest((tensor, value(tensor, pieces)) for tensor, pieces in encoded(model, allocation, encoder))


def decoded(model: Model, tensor: Tensor, fmt: str, encoder: Encoder = REFERENCE) -> jax.Array:
    """The tensor as it is after its format, in its own dtype."""
    return decode(encoder.encode(model, tensor, fmt), fmt).astype(lookup(model.params, tensor).dtype)

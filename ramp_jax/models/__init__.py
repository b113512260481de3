"""Decoders: what they look like, their tensors, their forward pass, and how they are loaded."""

from ramp_jax.models.layout import Tensor, allocatable, lookup, matrices, tensors
from ramp_jax.models.load import Model, load_model
from ramp_jax.models.module import DecoderModule
from ramp_jax.models.save import save_model
from ramp_jax.models.spec import DecoderSpec

__all__ = [
    "DecoderModule",
    "DecoderSpec",
    "Model",
    "Tensor",
    "allocatable",
    "load_model",
    "lookup",
    "matrices",
    "save_model",
    "tensors",
]

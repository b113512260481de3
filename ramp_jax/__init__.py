"""Mixed-precision GGUF quantization by a learned policy, in JAX.

import ramp_jax
model = ramp_jax.load_model("smollm2-135m")
windows = ramp_jax.data.windows("builtin", model.tokenizer, context=512, count=8)
policy = ramp_jax.load_policy("runs/smollm2-135m")
model, stats = ramp_jax.calibrate_and_fold(model, windows, policy.fold_level)
allocation = ramp_jax.allocate(policy, model, stats, budget_bytes=92_000_000)
encoder = ramp_jax.make_encoder("best", windows)
ramp_jax.export_gguf(model, allocation, "model.gguf", encoder)
ramp_jax.evaluate("model.gguf", reference="smollm2-135m", data="builtin")  # {"ppl": ..., "kld": ..., ...}
"""

__version__ = "0.2.0"

from ramp_jax import xla  # noqa: F401, I001  (before JAX meets its first device)

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.allocators import Allocator
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import Model, load_model, save_model
from ramp_jax.policy.inference import Policy, allocate, find_allocator, load_policy
from ramp_jax.quantization import (
    Encoder,
    Stats,
    calibrate,
    calibrate_and_fold,
    fake_quantize,
    fold,
    make_encoder,
    refold,
)
from ramp_jax.workflow import evaluate


__all__ = [
    "Allocation",
    "Allocator",
    "Encoder",
    "Model",
    "Policy",
    "Stats",
    "allocate",
    "calibrate",
    "calibrate_and_fold",
    "data",
    "evaluate",
    "export_gguf",
    "fake_quantize",
    "find_allocator",
    "fold",
    "load_model",
    "load_policy",
    "make_encoder",
    "refold",
    "save_model",
]

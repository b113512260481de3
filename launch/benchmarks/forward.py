"""The suite `forward` of launch/benchmark.py: how fast perplexity is beside transformers on torch.

SmolLM2-135M, 4 windows of 512 held-out tokens, every token scored. JAX in bf16, the same with every matrix at level 4,
JAX in f32, and `LlamaForCausalLM` on torch in bf16 with the same weights take turns; ratios are those of medians.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measuring import Numbers, medians, said

from ramp_jax import data
from ramp_jax.allocation import from_levels
from ramp_jax.halo.torch_model import torch_model
from ramp_jax.models import allocatable, load_model
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring.perplexity import evaluate

_WINDOWS = {"context": 512, "count": 4, "split": "heldout"}
_LEVEL = 4


def forward(repeats: int) -> Numbers:
    """Tokens per second and perplexity of each, and the ratios that are asked for."""
    import torch

    model = load_model("smollm2-135m")
    windows = data.windows("builtin", model.tokenizer, **_WINDOWS)
    half, beside = model.astype(jnp.bfloat16), torch_model(model).to(torch.bfloat16)
    levels = [_LEVEL] * len(allocatable(model.spec))
    quantized = jax.block_until_ready(fake_quantize(half, from_levels(model, levels)))
    ids = torch.from_numpy(windows.astype(np.int64))

    def in_torch() -> float:
        with torch.inference_mode():
            return math.exp(beside(ids, labels=ids).loss.item())

    contestants = {
        "jax_bf16": lambda: evaluate(half, windows, protocol="sliding").ppl,
        "jax_bf16_quantized": lambda: evaluate(half, windows, params=quantized, protocol="sliding").ppl,
        "jax_f32": lambda: evaluate(model, windows, protocol="sliding").ppl,
        "torch_bf16": in_torch,
    }
    with jax.default_matmul_precision("default"):
        numbers = said({f"{name}_ppl": run() for name, run in contestants.items()})
        seconds = medians(contestants, repeats)
    numbers |= said({f"{name}_tokens_per_second": windows.size / value for name, value in seconds.items()})
    return numbers | said(
        {
            "jax_over_torch_bf16": seconds["torch_bf16"] / seconds["jax_bf16"],
            "quantized_over_plain": seconds["jax_bf16"] / seconds["jax_bf16_quantized"],
        }
    )

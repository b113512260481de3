"""Where a forward pass stops being finite, and windows that a model cannot read."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ramp_jax import sweep
from ramp_jax.models import DecoderSpec
from ramp_jax.models.decoder import Params, embed, final_norm, output_head
from ramp_jax.models.layout import of_block


def check_windows(windows: Int[np.ndarray, "W T"], vocab_size: int) -> None:
    """Raise `ValueError` where a token lies outside of the vocabulary."""
    if windows.min() < 0 or windows.max() >= vocab_size:
        token = windows.min() if windows.min() < 0 else windows.max()
        raise ValueError(
            f"the text holds token {token}, the model's vocabulary ends at {vocab_size - 1}; the tokenizer belongs to "
            f"another model: cut the text with the tokenizer that came with this one."
        )


def explain(spec: DecoderSpec, params: Params, window: Int[np.ndarray, " T"]) -> str:
    """Where values that are not finite first appear in the pass over a window, and what to do about it.

    A damaged tensor is named itself; where weights are finite, the layer whose output is not.
    """
    x = embed(spec, params, window[None])
    if not _finite(x):
        return _damaged("token_embd.weight")
    for at in sweep.forward(spec, params):
        if not _finite(x := sweep.advance(at, x)):
            broken = [weight.name for weight in at.block.weights if not _finite(of_block(at.weights, weight.name))]
            return _damaged(f"blk.{at.index}.{broken[0]}") if broken else _overflow(f"layer blk.{at.index}")
    if not _finite(final_norm(spec, params, x)):
        gain = params["output_norm"]["weight"]
        return _damaged("output_norm.weight") if not _finite(gain) else _overflow("output_norm")
    head = "token_embd" if spec.tied else "output"
    return _overflow(f"the head, {head}") if output_head(spec, params).finite() else _damaged(f"{head}.weight")


def _damaged(tensor: str) -> str:
    return f"first in the weights of {tensor}, which are damaged; download or export the model again"


def _overflow(place: str) -> str:
    return f"first in the output of {place}, although its weights are; load the model with dtype=float32"


def _finite(values: Array) -> bool:
    return bool(jnp.isfinite(values).all())

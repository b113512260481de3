"""The same decoder in transformers on torch: the oracle of the forward pass, and what its speed is measured against.

Needs torch, which the `test` extra brings.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ramp_jax.models import Model, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def torch_model(model: Model) -> "PreTrainedModel":
    """The model's weights in its family's own class of transformers, f32, in evaluation mode.

    It is what transformers reads of the directory that `save_model` writes, on the disk for a moment. Raises
    `RuntimeError` where torch is not installed, or where the class has other tensors.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise RuntimeError(f"torch is not installed ({error}); run `pip install 'ramp-jax[test]'`.") from error
    family = getattr(transformers, model.spec.family.hf)
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(dataclasses.replace(model, tokenizer=None), Path(folder) / "model", "float32")
        how = {"dtype": "float32", "output_loading_info": True, "trust_remote_code": False}
        made, found = family.from_pretrained(path, **how)
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise RuntimeError(f"transformers' {family.__name__} has other tensors: {wrong}.")
    return made.eval()


def token_losses(made: "PreTrainedModel", windows: Int[np.ndarray, "W T"], start: int) -> Float[np.ndarray, "W S"]:
    """−log p of every token after position `start` of each window, nats; one window's logits exist at a time."""
    import torch

    losses = []
    with torch.inference_mode():
        for ids in torch.from_numpy(windows.astype(np.int64)):
            logits = made(ids[None]).logits[0, start:-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 :], reduction="none").numpy())
    return np.stack(losses)

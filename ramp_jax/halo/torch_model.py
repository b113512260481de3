"""The same decoder in transformers on torch: the oracle of the forward pass, and what its speed is measured against.

Needs torch, which the `test` extra brings.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ramp_jax.models import Model, lookup, tensors
from ramp_jax.models.spec import hf_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def torch_model(model: Model) -> "PreTrainedModel":
    """The model's weights in its family's own class of transformers, f32, in evaluation mode.

    Raises `RuntimeError` where torch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise RuntimeError(f"torch is not installed ({error}); run `pip install 'ramp-jax[test]'`.") from error
    spec, family = model.spec, model.spec.family
    described = hf_config(spec)
    config = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    with torch.device("meta"):
        made = getattr(transformers, family.hf)(config)
    made.to_empty(device="cpu")
    made.model.rotary_emb = type(made.model.rotary_emb)(config)  # its tables are no weights
    values = {
        family.hf_name(t): torch.from_numpy(np.array(lookup(model.params, t), np.float32) - family.hf_offset(t))
        for t in tensors(spec)
    }
    if spec.tied:
        made.tie_weights()
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    missing = made.load_state_dict(values, strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise RuntimeError(f"transformers' {family.hf} has other tensors: {missing}.")
    for name, value in made.named_buffers():
        if "embed_scale" in name:
            value.fill_(spec.embedding_scale)
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

"""The same decoder in transformers on torch: the oracle of the forward pass, and what its speed is measured against.

Needs torch, which the `test` extra brings.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ramp_jax.models import Model, lookup, tensors
from ramp_jax.models.names import hf_name

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def torch_model(model: Model) -> "LlamaForCausalLM":
    """The model's weights in `LlamaForCausalLM`, f32, in evaluation mode.

    Raises `RuntimeError` where torch is not installed.
    """
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise RuntimeError(f"torch is not installed ({error}); run `pip install 'ramp-jax[test]'`.") from error
    spec = model.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_size,
        max_position_embeddings=spec.context_length,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tied,
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
    made.to_empty(device="cpu")
    made.model.rotary_emb = type(made.model.rotary_emb)(config)  # its tables are no weights
    values = {hf_name(t): torch.from_numpy(np.array(lookup(model.params, t), np.float32)) for t in tensors(spec)}
    if spec.tied:
        made.tie_weights()
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    made.load_state_dict(values)
    return made.eval()


def token_losses(made: "LlamaForCausalLM", windows: Int[np.ndarray, "W T"], start: int) -> Float[np.ndarray, "W S"]:
    """−log p of every token after position `start` of each window, nats; one window's logits exist at a time."""
    import torch

    losses = []
    with torch.inference_mode():
        for ids in torch.from_numpy(windows.astype(np.int64)):
            logits = made(ids[None]).logits[0, start:-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 :], reduction="none").numpy())
    return np.stack(losses)

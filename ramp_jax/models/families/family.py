"""What a family of decoders is: which blocks its config means, and how its files name and store their tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ramp_jax.models.attention import Attention
from ramp_jax.models.layout import Block, Tensor
from ramp_jax.models.mlp import ActivationName, GatedMlp

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of a GGUF by the names that most Hugging Face checkpoints have for them, inside a layer or outside."""


def pre_norm_blocks(spec: "DecoderSpec") -> tuple[Block, ...]:
    """Equal blocks of attention and a gated MLP, each behind a norm."""
    attention = Attention(
        spec.d_model,
        spec.n_heads,
        spec.n_kv_heads,
        spec.head_size,
        spec.norm_eps,
        spec.rope_theta,
        qk_norm=spec.family.qk_norm,
    )
    mlp = GatedMlp(spec.d_model, spec.d_ff, spec.norm_eps, spec.family.activation)
    return (Block((attention, mlp)),) * spec.n_layers


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart from others: what its decoder computes, and how its files store it.

    `hf` is the class that its checkpoints name, `blocks` what a spec means, `hf_names` the names of its modules.
    `norm_offset` is what Hugging Face checkpoints leave out of every gain (γ is stored, 1 + γ multiplies); GGUFs and
    the parameter tree hold whole gains. `permuted_rope`: GGUF stores the rows of q and k with neighbours that rotate
    together. `head_size` and `tied` are what a config means that does not name them (None: d_model / n_heads).
    """

    hf: str
    blocks: Callable[["DecoderSpec"], tuple[Block, ...]] = pre_norm_blocks
    hf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: HF_NAMES)
    qk_norm: bool = False
    activation: ActivationName = "silu"
    scaled_embedding: bool = False
    norm_offset: float = 0.0
    permuted_rope: bool = False
    head_size: int | None = None
    tied: bool = False

    def hf_name(self, tensor: Tensor) -> str:
        """Name of a tensor in a Hugging Face checkpoint."""
        module, _, kind = tensor.weight.name.rpartition(".")
        inside = f"{self.hf_names[module]}.{kind}"
        return inside if tensor.layer is None else f"model.layers.{tensor.layer}.{inside}"

    def hf_offset(self, tensor: Tensor) -> float:
        """What a Hugging Face checkpoint leaves out of the tensor's values: 1 for the norms of Gemma, else 0."""
        return self.norm_offset if tensor.weight.kind == "gain" else 0.0

    def permuted_heads(self, tensor: Tensor) -> int | None:
        """Heads of a tensor whose rows GGUF stores permuted, None for the others."""
        return tensor.weight.rope_heads if self.permuted_rope else None

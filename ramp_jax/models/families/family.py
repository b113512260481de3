"""What a family of decoders is: how its config and its GGUF describe it, which blocks that means, and how its files
name and store their tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ramp_jax.models.attention import Attention
from ramp_jax.models.families.positions import Positions
from ramp_jax.models.families.properties import Activation, AllFull, Equal, Number, Property, Tied, Values
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
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules of a GGUF by the names that most Hugging Face checkpoints have for them, inside a layer or outside."""

_MOST_BLOCKS = 512  # llama.cpp's limit
_MOST_OF_A_HEAD = 1 << 16  # positions make tables of it before any tensor confirms it
_OF_WINDOWED_HEADS = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")


def _embedding_rows(found: Values) -> int:
    """The vocabulary of a GGUF that does not say it."""
    if (shape := found["tensors"].get("token_embd.weight")) is None:
        raise ValueError("the GGUF lacks token_embd.weight; the file is incomplete or of another architecture.")
    return shape[0]


SIZES: tuple[Property, ...] = (
    Number("n_layers", "num_hidden_layers", "block_count", whole=True, most=_MOST_BLOCKS),
    Number("d_model", "hidden_size", "embedding_length", whole=True),
    Number("n_heads", "num_attention_heads", "attention.head_count", whole=True),
    Number(
        "n_kv_heads",
        "num_key_value_heads",
        "attention.head_count_kv",
        whole=True,
        default=lambda found: found["n_heads"],
    ),
    Number(
        "head_size",
        "head_dim",
        "attention.key_length",
        whole=True,
        most=_MOST_OF_A_HEAD,
        default=lambda found: found["d_model"] // found["n_heads"],
    ),
    Equal("attention.value_length", "head_size", written=True),
    *(Equal(key, "head_size") for key in _OF_WINDOWED_HEADS),
    Number("d_ff", "intermediate_size", "feed_forward_length", whole=True),
    Number("vocab_size", "vocab_size", "vocab_size", whole=True, gguf_default=_embedding_rows),
    Number("context_length", "max_position_embeddings", "context_length", whole=True),
    Number("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon", most=1),
    Tied(),
)
"""What all families are described by."""

Norms = Literal["before", "after", "around"]
"""Where a block has norms: before its sub-blocks, after them, or both."""

_POST_NORMS = ("post_attention_norm", "post_ffw_norm")


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart from others.

    `hf` is the class that its checkpoints name; `architecture` what its GGUFs do, by default the family's own name.
    `properties` are read and written beside `SIZES`. `blocks` is what a spec means. `hf_names` are the names of its
    modules. `scaled_embedding`: embeddings are multiplied by √d_model. `norm_offset` is what Hugging Face checkpoints
    leave out of every gain (γ is stored, 1 + γ multiplies); GGUFs and the parameter tree hold whole gains.
    `permuted_rope`: GGUF stores the rows of q and k with neighbours that rotate together. `limits` says what of a spec
    llama.cpp could not run, None where nothing; `windows_run` whether it computes windows. Of several families of one
    architecture, `of_gguf` says which one a GGUF's pairs mean.
    """

    hf: str
    architecture: str | None = None
    properties: tuple[Property, ...] = (Positions(), AllFull(), Activation())
    blocks: Callable[["DecoderSpec"], tuple[Block, ...]] | None = None
    hf_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: HF_NAMES)
    qk_norm: Literal["heads", "width"] | None = None
    norms: Norms = "before"
    fused: bool = False
    activation: ActivationName = "silu"
    scaled_embedding: bool = False
    norm_offset: float = 0.0
    permuted_rope: bool = False
    limits: Callable[["DecoderSpec"], str | None] = lambda spec: None
    windows_run: bool = True
    of_gguf: Callable[[Mapping[str, Any]], bool] = lambda pairs: True

    @property
    def queries(self) -> str:
        """The module that scales queries: their norm, or their projection where they have none."""
        return "attn_q_norm." if self.qk_norm else "attn_q."

    @property
    def all_properties(self) -> tuple[Property, ...]:
        """`SIZES` and its own."""
        return SIZES + self.properties

    def hf_name(self, tensor: Tensor) -> str:
        """Name of a tensor in a Hugging Face checkpoint."""
        module, _, kind = tensor.weight.name.rpartition(".")
        inside = f"{self.hf_names[module]}.{kind}"
        return inside if tensor.layer is None else f"model.layers.{tensor.layer}.{inside}"

    def hf_offset(self, tensor: Tensor) -> float:
        """What a Hugging Face checkpoint leaves out of the tensor's values: 1 for the norms of Gemma, else 0."""
        return self.norm_offset if tensor.weight.kind == "gain" else 0.0

    def from_checkpoint(self, spec: "DecoderSpec", tensor: Tensor, value: np.ndarray) -> np.ndarray:
        """A tensor's values from those in a Hugging Face checkpoint, in the same dtype."""
        factor = spec.query_factor if tensor.weight.name.startswith(self.queries) else 1.0
        offset = self.hf_offset(tensor)
        if factor == 1 and offset == 0:
            return value
        return ((value.astype(np.float32) + np.float32(offset)) * np.float32(factor)).astype(value.dtype)

    def permuted_heads(self, tensor: Tensor) -> int | None:
        """Heads of a tensor whose rows GGUF stores permuted, None for the others."""
        return tensor.weight.rope_heads if self.permuted_rope else None


def usual_blocks(spec: "DecoderSpec") -> tuple[Block, ...]:
    """Attention and a gated MLP in every layer, as the spec and its family's switches say."""
    family = spec.family
    before = family.norms != "after"
    post_attention, post_mlp = (None, None) if family.norms == "before" else _POST_NORMS
    mlp = GatedMlp(
        spec.d_model,
        spec.d_ff,
        spec.norm_eps,
        family.activation,
        residual_scale=spec.residual_scale,
        fused=family.fused,
        biased=_biased(spec, "ffn"),
        norm="ffn_norm" if before else None,
        post_norm=post_mlp,
    )

    def block(windowed: bool, rotated: bool) -> Block:
        rope = spec.local_rope if windowed and spec.local_rope else spec.rope
        attention = Attention(
            spec.d_model,
            spec.n_heads,
            spec.n_kv_heads,
            spec.head_size,
            spec.norm_eps,
            rope if rotated else None,
            window=spec.window if windowed else None,
            scale=spec.attention_scale,
            score_cap=spec.attention_cap,
            qk_norm=family.qk_norm,
            temperature=spec.temperature,
            residual_scale=spec.residual_scale,
            fused=family.fused,
            biased=_biased(spec, "attn"),
            norm="attn_norm" if before else None,
            post_norm=post_attention,
        )
        return Block((attention, mlp))

    kinds = {(w, r): block(w, r) for w in (False, True) for r in (False, True)}
    windowed = spec.windowed or (False,) * spec.n_layers
    return tuple(kinds[w, layer not in spec.unrotated] for layer, w in enumerate(windowed))


def _biased(spec: "DecoderSpec", part: str) -> tuple[str, ...]:
    return tuple(name for name in spec.biased if name.startswith(part))

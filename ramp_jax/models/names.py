"""One table of tensors: their GGUF names (the parameter tree), their Hugging Face names, which may be quantized.

The parameter tree is the GGUF namespace: `{"token_embd", "blk": {"attn_q": [L, O, I], ...}, "output_norm", "output"}`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ramp_jax.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file, in the order of the forward pass.

    `key` is its name in the parameter tree and `layer` its index on the stacked axis (None outside the blocks). `tap`
    names the activation that it multiplies; a tensor without one is stored in F32 and never allocated.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    tap: str | None

    @property
    def name(self) -> str:
        """GGUF name, e.g. `blk.3.attn_q.weight`."""
        return f"{self.key}.weight" if self.layer is None else f"blk.{self.layer}.{self.key}.weight"

    @property
    def allocatable(self) -> bool:
        """Whether a level is chosen for it."""
        return self.tap is not None

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))


# key: (HF name inside a layer, tap of its input)
_BLOCK = {
    "attn_norm": ("input_layernorm", None),
    "attn_q": ("self_attn.q_proj", "attn_in"),
    "attn_k": ("self_attn.k_proj", "attn_in"),
    "attn_v": ("self_attn.v_proj", "attn_in"),
    "attn_q_norm": ("self_attn.q_norm", None),
    "attn_k_norm": ("self_attn.k_norm", None),
    "attn_output": ("self_attn.o_proj", "attn_mid"),
    "ffn_norm": ("post_attention_layernorm", None),
    "ffn_gate": ("mlp.gate_proj", "ffn_in"),
    "ffn_up": ("mlp.up_proj", "ffn_in"),
    "ffn_down": ("mlp.down_proj", "ffn_mid"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

LINEARS = tuple(key for key, (_, tap) in _BLOCK.items() if tap)
"""The weight matrices of a block, in forward order."""


def block_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape `[O, I]` of each matrix and `[I]` of each norm of one block."""
    d, f, q, kv = spec.d_model, spec.d_ff, spec.n_heads * spec.head_size, spec.n_kv_heads * spec.head_size
    head_norms = {"attn_q_norm": (spec.head_size,), "attn_k_norm": (spec.head_size,)} if spec.qk_norm else {}
    return {
        "attn_norm": (d,),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        **head_norms,
        "attn_output": (d, q),
        "ffn_norm": (d,),
        "ffn_gate": (f, d),
        "ffn_up": (f, d),
        "ffn_down": (d, f),
    }


def tensors(spec: DecoderSpec) -> list[Tensor]:
    """Every tensor of the file in forward order. A tied embedding is read as the head, so its tap is the head's."""
    vocabulary = (spec.vocab_size, spec.d_model)
    head = [] if spec.tied else [Tensor("output", None, vocabulary, "head_in")]
    return [
        Tensor("token_embd", None, vocabulary, "head_in" if spec.tied else "token"),
        *(
            Tensor(key, layer, shape, _BLOCK[key][1])
            for layer in range(spec.n_layers)
            for key, shape in block_shapes(spec).items()
        ),
        Tensor("output_norm", None, (spec.d_model,), None),
        *head,
    ]


def allocatable(spec: DecoderSpec) -> list[Tensor]:
    """The tensors that an allocation covers, in forward order."""
    return [tensor for tensor in tensors(spec) if tensor.allocatable]


def hf_name(tensor: Tensor) -> str:
    """Name of the tensor in a Hugging Face checkpoint."""
    if tensor.layer is None:
        return f"{_TOP[tensor.key]}.weight"
    return f"model.layers.{tensor.layer}.{_BLOCK[tensor.key][0]}.weight"


def hf_offset(spec: DecoderSpec, tensor: Tensor) -> float:
    """What a Hugging Face checkpoint leaves out of the tensor's values: 1 for the norms of Gemma, else 0."""
    return 0.0 if tensor.allocatable else spec.family.norm_offset


def lookup(params: dict[str, Any], tensor: Tensor) -> jax.Array:
    """The tensor's values in a parameter tree."""
    return params[tensor.key] if tensor.layer is None else params["blk"][tensor.key][tensor.layer]


def replaced(
    params: dict[str, Any], members: Sequence[Tensor], new: Callable[[Tensor], jax.typing.ArrayLike]
) -> dict[str, Any]:
    """The tree with `new(tensor)` in place of each member's values; a key of the blocks has all its layers among them.

    Keys are made one after the other, so that only one is held twice.
    """
    top = {t.key: jnp.asarray(new(t)) for t in members if t.layer is None}
    keys = dict.fromkeys(t.key for t in members if t.layer is not None)
    layers = {key: jnp.stack([jnp.asarray(new(t)) for t in members if t.key == key]) for key in keys}
    return {**params, **top, "blk": {**params["blk"], **layers}}


def stack(spec: DecoderSpec, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Parameter tree from values by GGUF name; consumes `values`, so that one copy is held at a time."""
    top = {t.key: values.pop(t.name) for t in tensors(spec) if t.layer is None}
    by_key = {key: [t for t in tensors(spec) if t.key == key and t.layer is not None] for key in block_shapes(spec)}
    return top | {"blk": {key: np.stack([values.pop(t.name) for t in members]) for key, members in by_key.items()}}


def rope_heads(spec: DecoderSpec, key: str) -> int | None:
    """Heads of a tensor whose rows GGUF stores permuted (q and k of the llama architecture), None for the others."""
    if not spec.family.permuted_rope:
        return None
    return {"attn_q": spec.n_heads, "attn_k": spec.n_kv_heads}.get(key)


def permute_rope(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[O, ...]` from HF order (halves rotate together) to GGUF llama order (neighbours rotate together)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute_rope(w: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `permute_rope`."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

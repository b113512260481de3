"""Tiny random models as Hugging Face directories and as GGUF files, made without the code under test; allocations."""

import dataclasses
import functools
import sys
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from ramp_jax.halo import libggml
from ramp_jax.models import tensors

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks.zoo import END, STOP, VOCABULARY, builtin_tokenizer, drawn, save
from benchmarks.zoo import hf_model as family_model

__all__ = ["END", "STOP", "VOCABULARY", "builtin_tokenizer", "drawn", "family_model", "save"]

LAYERS, HEADS, KV_HEADS = 3, 4, 2

GROUPS = {
    "attn_in": ("attn_norm", ("attn_q", "attn_k", "attn_v")),
    "attn_mid": ("attn_v", ("attn_output",)),
    "ffn_in": ("ffn_norm", ("ffn_gate", "ffn_up")),
    "ffn_mid": ("ffn_up", ("ffn_down",)),
}
"""By activation of a block: what makes it channel by channel, and the linears that read it."""

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@functools.cache
def hf_model(tied, d_model=64, d_ff=96):
    """Random `LlamaForCausalLM` with weights large enough for peaked predictions and gains that are not 1."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
    )
    return drawn(LlamaForCausalLM(config), seed=int(tied))


def tensor_of(model, name):
    """The tensor of a GGUF name."""
    return next(tensor for tensor in tensors(model.spec) if tensor.name == name)


def changed(model, name, change):
    """The model with `change(values)` in place of one tensor's values, by its GGUF name."""

    def inside(tree, first, *rest):
        return {**tree, first: inside(tree[first], *rest) if rest else change(tree[first])}

    path = [int(part) if part.isdigit() else part for part in name.split(".")]
    return dataclasses.replace(model, params=inside(model.params, *path))


def with_blocks(model, **values):
    """The model with weights `[L, ...]` in place of some modules' in all blocks."""
    for module, stack in values.items():
        for layer, w in enumerate(stack):
            model = changed(model, f"blk.{layer}.{module}.weight", lambda _, w=w: w)
    return model


def stacked(params):
    """Weights of all blocks, `[L, ...]` by module."""
    blocks = [params["blk"][layer] for layer in range(len(params["blk"]))]
    return {module: np.stack([np.asarray(block[module]["weight"]) for block in blocks]) for module in blocks[0]}


def save_hf(path, tied):
    """Directory with config, safetensors and tokenizer."""
    return save(hf_model(tied), path)


def gguf_values(tied):
    """Weights by GGUF name, rows of q and k in the order of GGUF's llama architecture."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    values = {}
    for key, value in hf_model(tied).state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if not (tied and name == "output.weight"):
            values[name] = neighbours_rotate(value.numpy(), heads) if heads else value.numpy()
    return values


def neighbours_rotate(w, heads):
    """Row i of each head goes to 2i, row i + H/2 to 2i + 1."""
    half = w.shape[0] // heads // 2
    order = [head * 2 * half + i + second * half for head in range(heads) for i in range(half) for second in (0, 1)]
    return w[order]


def write_gguf(path, metadata, values, types=None):
    """GGUF file with `metadata` (pairs of value and type) and `values`, in F32 or the ggml type of `types`."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"].value)
    for name, pair in metadata.items():
        if name != "general.architecture":
            writer.add_key_value(name, pair.value, pair.type, pair.sub_type)
    for name, value in values.items():
        ggml_type = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        blocks = gguf.GGML_QUANT_SIZES[ggml_type][0] > 1
        raw = libggml.quantize(ggml_type.name, value) if blocks else gguf.quants.quantize(value, ggml_type)
        writer.add_tensor(name, raw, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

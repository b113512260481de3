"""Models as Hugging Face directories, which transformers and `load_model` read."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.flax import save_file

from ramp_jax import files
from ramp_jax.models.layout import Tensor, lookup, tensors
from ramp_jax.models.load import Model
from ramp_jax.models.spec import hf_config

_SPECIAL = ("bos", "eos", "pad")  # tokens whose ids transformers else takes from its class, beyond small vocabularies


def save_model(model: Model, path: str | Path, dtype: str = "bfloat16") -> Path:
    """Write `config.json`, `model.safetensors` in `dtype` and the tokenizer's files to the new folder `path`.

    The folder appears under its name only when it is whole. A model whose values `dtype` can hold is read back
    identical, others rounded to nearest. Raises `FileExistsError` where `path` exists, `OSError` where it cannot be
    made or the disk is too full.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; delete it or choose another output.")
    needed = sum(tensor.size for tensor in tensors(model.spec)) * jnp.dtype(dtype).itemsize
    with files.replacing(path, needed, folder=True) as partial:
        ids = {f"{kind}_token_id": getattr(model.tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
        config = hf_config(model.spec) | ids | {"dtype": dtype, "torch_dtype": dtype}
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        values = {model.spec.family.hf_name(t): _stored(model, t, dtype) for t in tensors(model.spec)}
        save_file(values, partial / "model.safetensors", metadata={"format": "pt"})
    return path


def _stored(model: Model, tensor: Tensor, dtype: str) -> jax.Array:
    value = lookup(model.params, tensor).astype(jnp.float32) - model.spec.family.hf_offset(tensor)
    stored = value.astype(dtype)
    if not bool(jnp.isfinite(stored).all()):
        raise ValueError(f"{tensor.name} holds values that {dtype} cannot; choose another dtype.")
    return stored

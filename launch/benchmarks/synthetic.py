"""Checkpoints of known shapes with random weights, for suites that measure what sizes cost.

Those of `KNOWN` have the published shapes and a vocabulary filled up with unused tokens. Weights are drawn as models
initialize them, so that activations stay finite; text is read by the byte-level tokenizer of the tiny models.
"""

import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from benchmarks.sizes import MODELS
from benchmarks.zoo import builtin_tokenizer
from transformers import PreTrainedTokenizerBase

from ramp_jax.files import replacing
from ramp_jax.models import Tensor, tensors
from ramp_jax.models.safetensors_source import INDEX
from ramp_jax.models.spec import DecoderSpec, hf_config, spec_from_hf

_FOLDER = flags.DEFINE_string(
    "synthetic_folder", None, "Where checkpoints with random weights stay for the next run; by default nowhere."
)
_LAYERS = flags.DEFINE_integer(
    "synthetic_layers", None, "Blocks of checkpoints with random weights; by default all.", lower_bound=1
)

KNOWN = {ref.rsplit("/", 1)[-1].removesuffix("-hf").lower(): ref for ref in MODELS}
"""Names of checkpoints that can be made → hub id of the model that has these shapes."""

_SHARDS = 4
_SPREAD = 0.02  # standard deviation of what is no gain
_CHUNK = 1 << 22  # weights in memory at a time


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for what a run makes, removed at its end."""
    if _FOLDER.value:
        Path(_FOLDER.value).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        yield Path(folder)


def checkpoint(name: str, folder: Path) -> str:
    """The reference of a model: one of `KNOWN` is made in --synthetic_folder or else in `folder`, others stay."""
    if name not in KNOWN:
        return name
    spec = spec_from_hf(MODELS[KNOWN[name]].config)
    layers = _LAYERS.value or spec.n_layers
    path = Path(_FOLDER.value or folder) / f"{name}-{layers}-layers"
    if not path.exists():
        made = dataclasses.replace(spec, n_layers=layers, windowed=spec.windowed[:layers])
        write_checkpoint(path, made, builtin_tokenizer())
    return str(path)


def write_checkpoint(path: Path, spec: DecoderSpec, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """A Hugging Face directory in four shards, which appears under its name when it is whole.

    Matrices and biases are normal of standard deviation 0.02, gains 1, all in bfloat16; a chunk of a tensor is in
    memory at a time. Raises `OSError` where the disk is too full.
    """
    members = tensors(spec)
    rng, shards = np.random.default_rng(0), {}
    with replacing(path, 2 * sum(tensor.size for tensor in members), folder=True) as folder:
        (folder / "config.json").write_text(json.dumps(hf_config(spec) | {"torch_dtype": "bfloat16"}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for i in range(_SHARDS):
            name = f"model-{i + 1:05d}-of-{_SHARDS:05d}.safetensors"
            mine = members[i * len(members) // _SHARDS : (i + 1) * len(members) // _SHARDS]
            _write_shard(folder / name, spec, mine, rng)
            shards |= {spec.family.hf_name(tensor): name for tensor in mine}
        (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def _write_shard(path: Path, spec: DecoderSpec, members: Sequence[Tensor], rng: np.random.Generator) -> None:
    """A safetensors file: the length of its header as u64, the header in JSON up to a multiple of 8 bytes, the data."""
    offsets = [0, *itertools.accumulate(2 * tensor.size for tensor in members)]
    header = {
        spec.family.hf_name(tensor): {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets[i : i + 2]}
        for i, tensor in enumerate(members)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in members:
            for values in _drawn(spec, tensor, rng):
                file.write(values.astype(jnp.bfloat16).tobytes())


def _drawn(spec: DecoderSpec, tensor: Tensor, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The values of a tensor as a checkpoint holds them, f32, a chunk at a time."""
    for start in range(0, tensor.size, _CHUNK):
        count = min(_CHUNK, tensor.size - start)
        if tensor.weight.kind == "gain":
            yield np.full(count, 1 - spec.family.hf_offset(tensor), np.float32)
        else:
            yield rng.standard_normal(count, np.float32) * np.float32(_SPREAD)

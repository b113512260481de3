"""Models from GGUF files and Hugging Face directories; strict about shapes and about tensors nobody reads.

What a reference means is found in `references.py`, what a checkpoint holds by a source (`safetensors_source.py`,
`gguf_source.py`), what it computes by `spec.py`; the tensors then go one by one into the tree, in the dtype they keep.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from ramp_jax.models import decoder
from ramp_jax.models.families import TABLES
from ramp_jax.models.gguf_header import is_gguf
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.hf_names import find_decoder
from ramp_jax.models.layout import Params, Tensor, tensors
from ramp_jax.models.metadata import Metadata, plain, typed
from ramp_jax.models.references import model_name, resolve
from ramp_jax.models.rope import unpermute_rope
from ramp_jax.models.safetensors_source import find_shards, open_shards, refuse_file
from ramp_jax.models.source import Rows, Source, check_used, read_json, reason
from ramp_jax.models.spec import DecoderSpec, describe, spec_from_gguf, spec_from_hf
from ramp_jax.models.store import StoredParams, in_memory
from ramp_jax.models.tokenizers import name_for_llama_cpp, tokenizer_from_directory, tokenizer_from_gguf
from ramp_jax.resources import available_memory, check_memory

Dtype = Literal["auto", "stored", "float32", "bfloat16", "float16"]
"""What matrices can be asked to be in."""
_DTYPES = get_args(Dtype)[2:]
_RESIDENT = 0.1
"""Of the memory that is available: models up to this share are held in it, since work on them needs several times
their size."""

_PER_TOKEN = {"tokenizer.ggml.token_type": np.int32, "tokenizer.ggml.scores": np.float32}
_PANIC = "PanicException"  # of libraries in Rust, no Exception of Python's
_NAME, _TOKENIZER, _TOKENS, _FLAGS = "general.name", "tokenizer.", "tokenizer.ggml.tokens", "tokenizer.ggml.add_"


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its weights.

    `params` is the tree of `layout.py`, in memory or read from the checkpoint when it is asked for (`store.py`),
    matrices `[O, I]` in one dtype, gains and biases f32. `metadata` are the GGUF pairs that an exported file carries
    on. `tokenizer` is None where the source has none. `folding` maps an activation to the scales `[C]` by which Scale
    Folding has divided it; empty before folding.
    """

    spec: DecoderSpec
    params: Params
    metadata: Metadata
    tokenizer: PreTrainedTokenizerBase | None = None
    folding: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def logits(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits f32 of every position."""
        return decoder.logits(self.spec, self.params, ids)

    def astype(self, dtype: Any) -> "Model":
        """The same model with matrices (and so all matrix products) in `dtype`."""
        return dataclasses.replace(self, params=decoder.cast_weights(self.spec, self.params, dtype))

    def in_memory(self) -> "Model":
        """The same model with all its weights in memory; raises `OSError` where that does not suffice."""
        if not isinstance(self.params, StoredParams):
            return self
        dtype = jnp.dtype(self.params.dtype)
        check_memory(parameter_bytes(self.spec, dtype), f"the model in {dtype.name}")
        return dataclasses.replace(self, params=in_memory(self.params))


_Vocabulary = tuple[PreTrainedTokenizerBase, Metadata]


class _Checkpoint(NamedTuple):
    """What is known of a model before a weight is read.

    `stored` is the source's name of each tensor that it has, `finish` makes what it stores what the tree holds.
    """

    spec: DecoderSpec
    source: Source
    stored: dict[Tensor, str]
    finish: Callable[[Tensor, np.ndarray], np.ndarray]
    metadata: Metadata
    tokenizer: PreTrainedTokenizerBase | None


def load_model(
    ref: str | Path,
    dtype: str = "float32",
    tokenizer_from: str | Path | None = None,
    *,
    resident: bool | None = None,
) -> Model:
    """Load a local Hugging Face directory, a GGUF, a hub id, or a name that works offline (`ref-llama`).

    `dtype` is that of the matrices: `auto` is the faster one of bfloat16 and float32 on this machine, `stored` the one
    that all of them have in the checkpoint (float32 where they differ or are quantized). Weights that take more than a
    tenth of the memory stay on disk and are read block by block, others go into memory one by one; `resident` says
    which. `tokenizer_from` is a GGUF whose vocabulary takes the place of the model's own. Raises `FileNotFoundError`
    for an unknown reference or files that are missing, `ValueError` for a damaged file, an unsupported architecture, or
    tensors that do not fit the description, `OSError` where memory does not suffice.
    """
    wanted, path = None if dtype == "stored" else _dtype(dtype), resolve(ref)
    with _describing(path):
        opened = _open_directory(path, tokenizer_from) if path.is_dir() else _open_gguf(path, tokenizer_from)
    wanted = _stored_dtype(opened) if wanted is None else wanted
    if opened.spec.caveat is not None:
        logging.warning("%s: %s", ref, opened.spec.caveat)
    needed, params = parameter_bytes(opened.spec, wanted), _stored(opened, wanted)
    if resident is None:
        resident = needed <= _RESIDENT * available_memory()
    check_memory(needed if resident else _working(opened.spec, wanted), f"{ref} in {wanted.name}")
    with _describing(path):
        return Model(opened.spec, in_memory(params) if resident else params, opened.metadata, opened.tokenizer)


def fast_dtype() -> str:
    """`bfloat16` on accelerators and on CPUs that multiply it in hardware, else `float32`."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"


def read_description(
    ref: str | Path, tokenizer_from: str | Path | None = None
) -> tuple[Metadata, PreTrainedTokenizerBase]:
    """Metadata and tokenizer of a GGUF of any architecture, or the tokenizer of another; no weight is read.

    Raises `FileNotFoundError` where it does not exist, `ValueError` where it is damaged or its tokenizer not supported.
    """
    path = resolve(ref)
    with _describing(path):
        metadata = open_gguf(path).metadata
        if tokenizer_from is not None:
            return metadata, _other_vocabulary(tokenizer_from)[0]
        found = _vocabulary_of_gguf(metadata, path)
    if found is None:
        raise ValueError(f"{path} holds no vocabulary; name a GGUF that does with --tokenizer_from.")
    return metadata, found[0]


def _dtype(name: str) -> np.dtype:
    name = fast_dtype() if name == "auto" else name
    if name not in _DTYPES:
        raise ValueError(f"matrices cannot be {name}; choose auto, stored or one of {', '.join(_DTYPES)}.")
    return jnp.dtype(name)


def _stored_dtype(opened: _Checkpoint) -> np.dtype:
    found = {opened.source.dtype(name) for tensor, name in opened.stored.items() if tensor.is_matrix}
    return found.pop() if len(found) == 1 else jnp.dtype(jnp.float32)


@contextlib.contextmanager
def _describing(path: Path) -> Iterator[None]:
    """What a damaged or unsupported description makes the code inside raise becomes an error that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{path} does not describe its model: {error} is missing; download or save it again."
        ) from error
    except MemoryError as error:
        raise OSError(f"{path} needs more memory than there is; free some or use a larger machine.") from error
    except Exception as error:
        if isinstance(error, OSError) or (type(error) is ValueError and str(path) in str(error)):
            raise
        if type(error) is ValueError:
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(
            f"{path} does not describe its model: {reason(error)} ({type(error).__name__}); download or save it again."
        ) from error


def _open_gguf(path: Path, tokenizer_from: str | Path | None) -> _Checkpoint:
    if not is_gguf(path):
        refuse_file(path)
    source = open_gguf(path)
    shapes, fields = source.shapes, plain(source.metadata)
    tables = {name: source.read(name, np.float32) for name in TABLES if name in shapes}
    spec = spec_from_gguf(fields, shapes, tables)
    stored = {tensor: tensor.name for tensor in tensors(spec) if tensor.name in shapes}
    check_used(spec.architecture, shapes.keys() - {*stored.values(), *tables}, path)
    _check_shapes(spec, source, stored, path)

    def finish(tensor: Tensor, value: np.ndarray) -> np.ndarray:
        heads = spec.family.permuted_heads(tensor)
        return unpermute_rope(value, heads) if heads else value

    tokenizer, pairs = _vocabulary(tokenizer_from, spec, lambda: _vocabulary_of_gguf(source.metadata, path))
    kept = _carried(source.metadata, spec)
    if (name := fields.get(_NAME)) is not None:
        if not isinstance(name, str):
            raise ValueError(f"{path}: {_NAME} is {name!r:.60}, a text was expected; correct it.")
        kept[_NAME] = kept[_NAME]._replace(value=name_for_llama_cpp(name, tokenizer, pairs))
    return _Checkpoint(spec, source, stored, finish, kept | pairs, tokenizer)


def _open_directory(folder: Path, tokenizer_from: str | Path | None) -> _Checkpoint:
    shards, described = find_shards(folder), folder / "config.json"
    if not described.is_file():
        raise FileNotFoundError(f"{folder} is not a model directory: it lacks config.json; download the whole model.")
    config = read_json(described)
    spec = spec_from_hf(config)
    source = open_shards(folder, shards)
    stored = find_decoder(spec, config, source, folder)
    _check_shapes(spec, source, stored, folder)

    def finish(tensor: Tensor, value: np.ndarray) -> np.ndarray:
        return spec.family.from_checkpoint(spec, tensor, value)

    tokenizer, pairs = _vocabulary(tokenizer_from, spec, lambda: _vocabulary_of_directory(folder, spec.vocab_size))
    called = model_name(folder)
    name = name_for_llama_cpp(gguf.Metadata.id_to_title(called) or called, tokenizer, pairs)
    metadata = describe(spec, name, sum(tensor.size for tensor in tensors(spec)), called)
    return _Checkpoint(spec, source, stored, finish, metadata | pairs, tokenizer)


def _carried(metadata: Metadata, spec: DecoderSpec) -> Metadata:
    """A GGUF's pairs without its vocabulary, what the spec says written as llama.cpp reads it, whatever it was."""
    prefix = f"{spec.architecture}."
    read = {prefix + key for part in spec.family.all_properties for key in part.gguf_keys}
    kept = {name: pair for name, pair in metadata.items() if not name.startswith(_TOKENIZER) and name not in read}
    return kept | {name: pair for name, pair in describe(spec, "", 0).items() if name.startswith(prefix)}


def _check_shapes(spec: DecoderSpec, source: Source, stored: dict[Tensor, str], path: Path) -> None:
    """Raise `ValueError` for a tensor that is missing or of another shape than the description says.

    From here on sizes of the description are those of the file, and may be allocated.
    """
    for tensor in tensors(spec):
        if tensor not in stored:
            name = f"{tensor.name} ({spec.family.hf_name(tensor)})" if path.is_dir() else tensor.name
            raise ValueError(f"{path} lacks tensor {name}; it is incomplete or of another architecture.")
        if (shape := source.shapes[stored[tensor]]) != tensor.shape:
            name = tensor.name if stored[tensor] == tensor.name else f"{tensor.name} ({stored[tensor]})"
            raise ValueError(f"{path}: {name} has shape {shape}, expected {tensor.shape}.")


def _stored(opened: _Checkpoint, wanted: np.dtype) -> StoredParams:
    """The tree whose matrices are in `wanted`, each tensor of which is read when it is asked for."""

    def dtype_of(tensor: Tensor) -> np.dtype:
        return wanted if tensor.is_matrix else jnp.dtype(jnp.float32)

    def read(tensor: Tensor, rows: Rows) -> np.ndarray:
        name = opened.stored[tensor]
        narrow = min((dtype_of(tensor), opened.source.dtype(name)), key=lambda dtype: dtype.itemsize)
        return opened.source.read(name, narrow, rows)

    def finish(tensor: Tensor, value: np.ndarray) -> jax.Array:
        """On the device; on CPUs the very array that was read, and nothing waits on the host elsewhere."""
        value = opened.finish(tensor, value.astype(dtype_of(tensor), copy=False))
        return jax.block_until_ready(jax.device_put(value))

    files = {path: f"{size} bytes of {modified}" for path, (size, modified) in opened.source.files.items()}
    return StoredParams(opened.spec, read, finish, wanted, files)


def parameter_bytes(spec: DecoderSpec, dtype: np.dtype) -> int:
    """Of all parameters, matrices in `dtype`."""
    return sum(tensor.size * (dtype.itemsize if tensor.is_matrix else 4) for tensor in tensors(spec))


def _working(spec: DecoderSpec, dtype: np.dtype) -> int:
    """What a sweep over weights that stay on disk needs: two blocks, or the vocabulary's matrix."""
    blocks = collections.Counter()
    for tensor in tensors(spec):
        blocks[tensor.layer if tensor.layer is not None else tensor.name] += tensor.size * dtype.itemsize
    return 2 * max(blocks.values())


def _vocabulary(
    tokenizer_from: str | Path | None, spec: DecoderSpec, own: Callable[[], _Vocabulary | None]
) -> tuple[PreTrainedTokenizerBase | None, Metadata]:
    """The tokenizer with its pairs, from the model or from the GGUF that is named instead."""
    if tokenizer_from is None:
        return own() or (None, {})
    tokenizer, pairs = _other_vocabulary(tokenizer_from)
    if (size := len(pairs[_TOKENS].value)) > spec.vocab_size:
        raise ValueError(
            f"{tokenizer_from} has a vocabulary of {size} tokens, the model one of {spec.vocab_size}; name a GGUF of "
            f"the same vocabulary with --tokenizer_from."
        )
    return tokenizer, _padded(pairs, spec.vocab_size)


def _other_vocabulary(tokenizer_from: str | Path) -> _Vocabulary:
    path = resolve(tokenizer_from)
    if not is_gguf(path):
        raise ValueError(f"{path} is no GGUF; name one with --tokenizer_from.")
    with _describing(path):
        found = _vocabulary_of_gguf(open_gguf(path).metadata, path)
    if found is None:
        raise ValueError(f"{path} holds no vocabulary; name another GGUF with --tokenizer_from.")
    return found


def _padded(pairs: Metadata, size: int) -> Metadata:
    """Pairs of a vocabulary with unused tokens up to `size`, as llama.cpp's converter writes them."""
    fillers = {
        _TOKENS: lambda i: f"[PAD{i}]",
        "tokenizer.ggml.token_type": lambda _: int(gguf.TokenType.UNUSED),
        "tokenizer.ggml.scores": lambda _: -10000.0,
    }
    longer = {}
    for name in fillers.keys() & pairs.keys():
        values = pairs[name].value
        longer[name] = pairs[name]._replace(value=[*values, *map(fillers[name], range(len(values), size))])
    return pairs | longer


def _vocabulary_of_gguf(metadata: Metadata, path: Path) -> _Vocabulary | None:
    if _TOKENS not in metadata:
        return None
    with _reading_tokenizer(path):
        tokenizer = tokenizer_from_gguf(plain(metadata), path)
    pairs = {name: pair for name, pair in metadata.items() if name.startswith(_TOKENIZER)}
    ids = {name: pair.value for name, pair in pairs.items() if name.endswith("_token_id")}
    sound = typed({name: np.uint32(i) for name, i in ids.items() if 0 <= i < len(pairs[_TOKENS].value)})
    flags = typed({name: bool(pair.value) for name, pair in pairs.items() if name.startswith(_FLAGS)})
    numbers = typed({name: np.asarray(pairs[name].value, dtype) for name, dtype in _PER_TOKEN.items() if name in pairs})
    return tokenizer, {name: pair for name, pair in pairs.items() if name not in ids} | sound | flags | numbers


def _vocabulary_of_directory(folder: Path, vocab_size: int) -> _Vocabulary | None:
    with _reading_tokenizer(folder):
        return tokenizer_from_directory(folder, vocab_size)


@contextlib.contextmanager
def _reading_tokenizer(path: Path) -> Iterator[None]:
    """The libraries' errors, which are of any class, become one that names the file."""
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, OSError | MemoryError) or type(error) is ValueError
        if expected or not (isinstance(error, Exception) or type(error).__name__ == _PANIC):
            raise
        raise ValueError(
            f"{path}: its tokenizer cannot be read ({reason(error)}); download or save it again, "
            f"or name a GGUF of the same vocabulary with --tokenizer_from."
        ) from error

"""Which format every weight matrix gets, and what the finished file says of itself.

Three sizes, never mixed: code bits (mean nominal level), linear bpw (allocated tensors with their scales) and file
bpw (the whole GGUF over all parameters). Matrices whose rows blocks cannot hold stay in F16, as in llama.cpp's own
files.
"""

import base64
import collections
import dataclasses
import functools
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from ramp_jax import __version__, schema
from ramp_jax.allocation.saved import MADE, MAKE_IT, read_saved, sha256_of
from ramp_jax.allocation.sizes import STORED, fallback, header_bytes, padded, tensor_bytes
from ramp_jax.files import write_bytes
from ramp_jax.formats import get_format
from ramp_jax.formats.registry import EXPORTABLE, Format
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable, matrices, tensors
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.layout import foldable
from ramp_jax.models.metadata import Metadata, metadata_bytes, typed
from ramp_jax.models.sketch import same, sketch
from ramp_jax.overrides import FALLBACK

_CALIBRATION_TEXT = "ramp.calibration_text"
_UNKNOWN = 64 * "0"  # as long as a fingerprint, so that sizes do not depend on it
_NAME_BYTES = 64  # of names in an exported file, cut or filled with spaces for the same reason

PADDING, ROUNDING_ROOM = "ramp.padding", 512
"""The pair that takes what is left of the bytes kept for pairs that only rounding knows."""

_LARGEST_SCALE = 2.0**16  # of folding, and the smallest's inverse: beyond, float16 holds nothing of a weight


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Tensor name → format name for every matrix of `spec`; `metadata` is the source model's.

    A matrix that is not allocatable has a plain float format, `FALLBACK` unless a uniform float format was asked for.
    `folding` are the scales of Scale Folding with which the weights are meant to be quantized (see `Model.folding`),
    `calibration` says on which windows of which text they were found (`data`, `context`, `count`, and as `text` its
    `data.fingerprint`), `made` whatever else `Saved` tells of how it was made; equality leaves all three out.
    """

    spec: DecoderSpec
    metadata: Metadata
    formats: Mapping[str, str]
    folding: Mapping[str, Float[np.ndarray, " C"]] = dataclasses.field(default_factory=dict, compare=False)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        expected = {tensor.name for tensor in matrices(self.spec)}
        if wrong := expected ^ set(self.formats):
            side = "lacks" if wrong & expected else "names unknown"
            raise ValueError(f"the allocation {side} tensor {min(wrong)}; it was made for another model.")
        for tensor in matrices(self.spec):
            get_format(self.formats[tensor.name]).row_bytes(tensor.shape[-1])

    @classmethod
    def of(cls, model: Model, formats: Mapping[str, str], rest: str = FALLBACK) -> "Allocation":
        """Of `model`, folded as it is: `formats` of its allocatable tensors by name, `rest` for all other matrices."""
        every = {tensor.name: formats.get(tensor.name, rest) for tensor in matrices(model.spec)}
        return cls(model.spec, model.metadata, every, {name: np.asarray(s) for name, s in model.folding.items()})

    @classmethod
    def uniform(cls, model: Model, fmt: str) -> "Allocation":
        """One format for all that is allocated of `model`, folded as it is; a plain float format for all matrices.

        Raises `ValueError` where it cannot hold a row.
        """
        chosen = dict.fromkeys((t.name for t in allocatable(model.spec)), fmt)
        return cls.of(model, chosen, fmt if get_format(fmt).block_size == 1 else FALLBACK)

    @classmethod
    def from_gguf(cls, path: str | Path, model: Model) -> "Allocation":
        """The types of a GGUF of the same model, whoever made it, for `model` folded as it is.

        A part of a split file stands for all. Raises `FileNotFoundError` where there is none, `ValueError` where it is
        damaged, another model's, or has a type that is not written here.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file, where a GGUF of this model was expected; name one.")
        source = open_gguf(path)
        wrong = f"{path} is a file of another model, name one of this: it"
        for tensor in tensors(model.spec):
            if (shape := source.shapes.get(tensor.name)) != tensor.shape:
                kind = "lacks" if shape is None else f"has shape {shape} for"
                raise ValueError(f"{wrong} {kind} {tensor.name}, which has shape {tensor.shape} here.")
        known = {tensor.name for tensor in tensors(model.spec)} | model.spec.tables.keys()
        if unknown := [name for name in source.shapes if name not in known]:
            raise ValueError(f"{wrong} has {unknown[0]}, which this model has not.")
        formats = {tensor.name: source.tensors[tensor.name].type.name for tensor in matrices(model.spec)}
        if foreign := [name for name, fmt in formats.items() if fmt not in EXPORTABLE]:
            size = sum(stamp.size for stamp in source.files.values())
            raise ValueError(
                f"{path} holds {foreign[0]} as {formats[foreign[0]]} and {len(foreign) - 1} more in types that are not "
                f"written here, which are {', '.join(EXPORTABLE)}; choose other types of its size with "
                f"--source_policy=fisher --budget_bytes={size}."
            )
        return cls.of(model, formats)

    @functools.cached_property
    def file_bytes(self) -> int:
        """Size of the exported GGUF."""
        data = sum(tensor_bytes(tensor, self.format_of(tensor)) for tensor in tensors(self.spec))
        tables = sum(padded(table.nbytes) for table in self.spec.tables.values())
        return header_bytes(self.spec, _pairs(self, file_bpw=0.0) | _padding({})) + data + tables

    @property
    def linear_bpw(self) -> float:
        """Stored bits per allocated weight."""
        bits = sum(8 * tensor_bytes(tensor, self.format_of(tensor)) for tensor in allocatable(self.spec))
        return bits / sum(tensor.size for tensor in allocatable(self.spec))

    @property
    def file_bpw(self) -> float:
        """Bits of the whole file per parameter."""
        return 8 * self.file_bytes / sum(tensor.size for tensor in tensors(self.spec))

    @property
    def code_bits(self) -> float:
        """Mean nominal level per allocated weight (what papers count), 16 or 32 for float formats."""
        members = allocatable(self.spec)
        levels = [get_format(self.formats[tensor.name]).code_bits * tensor.size for tensor in members]
        return sum(levels) / sum(tensor.size for tensor in members)

    def format_of(self, tensor: Tensor) -> str:
        """Format name of any tensor of the file."""
        return self.formats.get(tensor.name, STORED)

    @property
    def fallback(self) -> str | None:
        """One sentence on the matrices that blocks cannot hold, None where there is none."""
        return fallback(self.spec, self.formats, self.linear_bpw)

    def summary(self) -> dict[str, Any]:
        """Sizes and formats as plain values; `fallback` where there is something to say."""
        return {
            "file_bytes": self.file_bytes,
            "linear_bpw": self.linear_bpw,
            "file_bpw": self.file_bpw,
            "code_bits": self.code_bits,
            **({"fallback": self.fallback} if self.fallback else {}),
            "formats": dict(self.formats),
        }

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write JSON, the fields of `Saved`, of which `notes` are some beside `made`."""
        folding = {name: np.asarray(scales, "<f4") for name, scales in self.folding.items()}
        encoded = {name: base64.b64encode(scales.tobytes()).decode() for name, scales in folding.items()}
        calibration = {"calibration": dict(self.calibration)} if self.calibration else {}
        made = {name: value for name, value in {**self.made, **notes}.items() if name != "sha256"}
        last = {"choices": made.pop("choices")} if "choices" in made else {}  # they are many
        content = {**made, **self.summary(), **calibration, "folding": encoded, **last}
        write_bytes(path, (json.dumps(content | {"sha256": sha256_of(content)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, model: Model) -> "Allocation":
        """Read what `save` wrote; raises `ValueError` where it is not an allocation of `model`."""
        saved = read_saved(path)
        with schema.gate(path, "an allocation of this model", MAKE_IT):
            known, calibration = foldable(model.spec), saved.get("calibration", {})
            if unknown := saved["folding"].keys() - known.keys():
                raise ValueError(f"the folding names {min(unknown)}, which the model has not")
            if calibration and calibration["context"] > model.spec.context_length:
                raise ValueError(
                    f"it was calibrated on windows of {calibration['context']} tokens, and the model was made for "
                    f"{model.spec.context_length}"
                )
            folding = {name: _scales(name, text, known[name].width) for name, text in saved["folding"].items()}
            made = {name: value for name, value in saved.items() if name in MADE}
            found = cls(model.spec, model.metadata, saved["formats"], folding, calibration, made)
            if "weights" in saved and not model.folding and not same(saved["weights"], sketch(model)):
                raise ValueError("it was made for other weights of the same shapes")
            return found


def _scales(name: str, text: str, width: int) -> Float[np.ndarray, " C"]:
    try:
        scales = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except ValueError as error:
        raise ValueError(f"the folding of {name} is no base64 of float32, {error}") from error
    if scales.shape != (width,):
        raise ValueError(f"the folding of {name} has {len(scales)} scales, expected {width}")
    if not ((scales >= 1 / _LARGEST_SCALE) & (scales <= _LARGEST_SCALE)).all():
        raise ValueError(
            f"the folding of {name} has scales that are not numbers from {1 / _LARGEST_SCALE:g} to {_LARGEST_SCALE:g}"
        )
    return scales


def export_metadata(allocation: Allocation, rounding: Mapping[str, Any] = types.MappingProxyType({})) -> Metadata:
    """The pairs of the exported file: the source's, the file's type, in `ramp.*` all that makes it again, `rounding`'s.

    The type is that of the format with most bytes. The size of the pairs depends neither on which formats were chosen
    nor on how, nor on what is only known where they are rounded: `ramp.padding` fills what `rounding` leaves of its
    room.
    """
    late = typed(dict(rounding))
    return _pairs(allocation, allocation.file_bpw) | late | _padding(late)


def _padding(late: Metadata) -> Metadata:
    return typed({PADDING: " " * (ROUNDING_ROOM - metadata_bytes(late))})


def _pairs(allocation: Allocation, file_bpw: float) -> Metadata:
    kept = {
        name: pair
        for name, pair in allocation.metadata.items()
        if not name.startswith(("ramp.", "quantize.")) and name != "general.alignment"
    }
    return kept | typed(
        {
            "general.file_type": np.uint32(_dominant(allocation).llama_ftype),
            "general.quantization_version": np.uint32(gguf.GGML_QUANT_VERSION),
            "general.quantized_by": "RAMP-JAX",
        }
        | _provenance(allocation)
        | {"ramp.file_bpw": file_bpw}
    )


def _dominant(allocation: Allocation) -> Format:
    """The format with most bytes."""
    bytes_of = collections.Counter()
    for tensor in matrices(allocation.spec):
        bytes_of[allocation.format_of(tensor)] += tensor_bytes(tensor, allocation.format_of(tensor))
    return get_format(bytes_of.most_common(1)[0][0])


def _provenance(allocation: Allocation) -> dict[str, Any]:
    """What `ramp.*` says: program, allocation, who chose, folding, rounding, calibration, budget, bits."""
    made, how = allocation.made, allocation.calibration
    types = [int(get_format(allocation.format_of(tensor)).ggml_type) for tensor in allocatable(allocation.spec)]
    return {
        "ramp.version": _name(__version__),
        "ramp.recipe": np.asarray(types, np.int32),
        "ramp.allocation_sha256": made.get("sha256", _UNKNOWN),
        "ramp.allocator": _name(made.get("allocator", "")),
        "ramp.allocator_sha256": made.get("allocator_sha256", _UNKNOWN),
        "ramp.fold_level": float(made.get("fold_level", 0) if allocation.folding else 0),
        "ramp.encoder": _name(made.get("encoder", "")),
        "ramp.calibration_data": _name(how.get("data", "")),
        _CALIBRATION_TEXT: how.get("text", _UNKNOWN),
        "ramp.calibration_context": np.uint32(how.get("context", 0)),
        "ramp.calibration_count": np.uint32(how.get("count", 0)),
        "ramp.budget_bytes": np.uint64(made.get("budget_bytes", 0)),
        "ramp.code_bits": allocation.code_bits,
        "ramp.linear_bpw": allocation.linear_bpw,
    }


def _name(text: str) -> str:
    """A text of `_NAME_BYTES` bytes that begins with this one."""
    kept = text.encode()[:_NAME_BYTES].decode(errors="ignore")
    return kept + " " * (_NAME_BYTES - len(kept.encode()))


def calibration_text(metadata: Metadata) -> str | None:
    """Fingerprint of the text that an exported file was calibrated on, None where it does not say."""
    pair = metadata.get(_CALIBRATION_TEXT)
    return None if pair is None or pair.value == _UNKNOWN else str(pair.value)

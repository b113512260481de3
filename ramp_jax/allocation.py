"""An allocation: which format every weight matrix gets, and what the finished file then weighs.

Three sizes, never mixed: code bits (mean nominal level), linear bpw (allocated tensors with their scales) and file
bpw (the whole GGUF over all parameters). Byte counts are exact: every tensor of a GGUF is padded to the alignment, so
the file is a fixed part plus one term per allocated tensor. Matrices whose rows blocks cannot hold stay in F16, as in
llama.cpp's own files, and belong to the fixed part.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import gguf
import numpy as np
from jaxtyping import Bool, Float, Int

from ramp_jax import __version__, schema
from ramp_jax.files import write_bytes
from ramp_jax.formats import LEVELS, format_for, get_format
from ramp_jax.formats.registry import EXPORTABLE, Format
from ramp_jax.models import DecoderSpec, Model, Tensor, allocatable, matrices, tensors
from ramp_jax.models.gguf_source import open_gguf
from ramp_jax.models.layout import SMALLEST_BLOCK, foldable
from ramp_jax.models.metadata import Metadata, metadata_bytes, typed
from ramp_jax.models.sketch import same, sketch
from ramp_jax.overrides import FALLBACK, Override, formats_of

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_CALIBRATION_TEXT = "ramp.calibration_text"
_UNKNOWN = 64 * "0"  # as long as a fingerprint, so that sizes do not depend on it
_NAME_BYTES = 64  # of names in an exported file, cut or filled with spaces for the same reason
STORED = "F32"
"""Format of gains, biases and tables."""
_NAMED = 3  # such matrices in a summary's sentence
PADDING, ROUNDING_ROOM = "ramp.padding", 512
"""The pair that takes what is left of the bytes kept for pairs that only rounding knows."""
_LARGEST_SCALE = 2.0**16  # of folding, and the smallest's inverse: beyond, float16 holds nothing of a weight
_MAKE_IT = "make one with launch/allocate.py"

EncoderName = Literal["reference", "best", "compensated"]
"""How weights become codes, which an allocation records."""

Levels = Annotated[
    tuple[float, ...],
    schema.Check(
        lambda levels: (
            bool(levels) and set(levels) <= set(LEVELS) and all(a < b for a, b in itertools.pairwise(levels))
        ),
        f"increasing levels among {', '.join(f'{level:g}' for level in LEVELS)}",
    ),
]
"""What is chosen among."""

FoldLevel = Annotated[float, schema.within(LEVELS[0], LEVELS[-1])]
"""For which Scale Folding moves outliers."""


FormatName = Annotated[str, schema.Check(EXPORTABLE.__contains__, f"one of {', '.join(EXPORTABLE)}")]
"""What a matrix of a file can be."""


class Calibration(TypedDict):
    """On which windows an allocation was calibrated: `count` of `context` tokens of the text that `data` names.

    `text` is the text's fingerprint, `texts` those of a mixture's parts, `tokens` the digest of the windows.
    """

    data: schema.Name
    context: Annotated[int, schema.within(2, 2**31 - 1)]
    count: schema.Count
    text: schema.Sha256
    texts: NotRequired[tuple[schema.Sha256, ...]]
    tokens: schema.Sha256


class Choice(TypedDict):
    """A format that a tensor could have: the bytes of its data, and what the choice was told of its loss.

    `loss` is what the tensor in this format is predicted to lose alone, `change` what the whole model would lose more
    if this tensor alone took it instead of the one that was chosen; nats per token. Both are left out where whoever
    chose saw no prediction.
    """

    bytes: schema.Bytes
    loss: NotRequired[float]
    change: NotRequired[float]


class Saved(TypedDict):
    """What the file of an allocation holds: formats, folding as base64 of f32, how both were found, a summary.

    `weights` is the model's `sketch`, `allocator_sha256` that of the policy or table that chose, `predicted_kld` what
    the estimate expects the file to lose in nats per token, `choices` what there was to choose among, by tensor and
    format. `sha256` is that of all other fields but `seconds`, so that runs which find the same differ in nothing else.
    """

    model: NotRequired[schema.Name]
    weights: NotRequired[tuple[float, ...]]
    budget_bytes: NotRequired[schema.Bytes]
    encoder: NotRequired[EncoderName]
    allocator: NotRequired[schema.Name]
    allocator_sha256: NotRequired[schema.Sha256]
    fold_level: NotRequired[FoldLevel]
    refine_evals: NotRequired[Annotated[int, schema.within(0, 2**31 - 1)]]
    predicted_kld: NotRequired[schema.NotNegative]
    seconds: NotRequired[schema.NotNegative]
    file_bytes: schema.Bytes
    linear_bpw: schema.Positive
    file_bpw: schema.Positive
    code_bits: schema.Positive
    fallback: NotRequired[str]
    overrides: NotRequired[tuple[Override, ...]]
    formats: Mapping[str, FormatName]
    calibration: NotRequired[Calibration]
    folding: Mapping[str, str]
    choices: NotRequired[Mapping[str, Mapping[str, Choice]]]
    sha256: NotRequired[schema.Sha256]


_MADE = Saved.__annotations__.keys() - {"formats", "folding", "calibration", "file_bytes", "linear_bpw", "file_bpw"}
_MADE -= {"code_bits", "fallback"}


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
    def uniform(cls, model: Model, fmt: str) -> "Allocation":
        """One format for all that is allocated of `model`, folded as it is; a plain float format for all matrices.

        Raises `ValueError` where it cannot hold a row.
        """
        chosen = dict.fromkeys((t.name for t in allocatable(model.spec)), fmt)
        return _completed(model, chosen, fmt if get_format(fmt).block_size == 1 else FALLBACK)

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
        return cls(model.spec, model.metadata, formats, {name: np.asarray(s) for name, s in model.folding.items()})

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
        write_bytes(path, (json.dumps(content | {"sha256": _sha256(content)}, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, model: Model) -> "Allocation":
        """Read what `save` wrote; raises `ValueError` where it is not an allocation of `model`."""
        saved = read_saved(path)
        with schema.gate(path, "an allocation of this model", _MAKE_IT):
            known, calibration = foldable(model.spec), saved.get("calibration", {})
            if unknown := saved["folding"].keys() - known.keys():
                raise ValueError(f"the folding names {min(unknown)}, which the model has not")
            if calibration and calibration["context"] > model.spec.context_length:
                raise ValueError(
                    f"it was calibrated on windows of {calibration['context']} tokens, and the model was made for "
                    f"{model.spec.context_length}"
                )
            folding = {name: _scales(name, text, known[name].width) for name, text in saved["folding"].items()}
            made = {name: value for name, value in saved.items() if name in _MADE}
            found = cls(model.spec, model.metadata, saved["formats"], folding, calibration, made)
            if "weights" in saved and not model.folding and not same(saved["weights"], sketch(model)):
                raise ValueError("it was made for other weights of the same shapes")
            return found


def read_saved(path: str | Path) -> Saved:
    """The JSON that `Allocation.save` wrote; raises `ValueError` for any other file, and one that was changed since."""
    with schema.gate(path, "an allocation", _MAKE_IT):
        saved: Saved = schema.read(Saved, schema.read_json(path))
        offered = {fmt for known in saved.get("choices", {}).values() for fmt in known}
        if unknown := offered - set(EXPORTABLE):
            raise ValueError(f"choices offer {min(unknown)!r}, expected some of {', '.join(EXPORTABLE)}")
    found = _sha256(saved)
    if saved.setdefault("sha256", found) != found:
        raise ValueError(
            f"{path} is not as it was written, its sha256 is another; restore it or make it again with "
            f"launch/allocate.py, or delete the line of its sha256 where you changed it yourself."
        )
    return saved


def offered_levels(saved: Saved) -> tuple[float, ...]:
    """Among which levels a file says that was chosen, as far as rows hold them; empty where it does not say."""
    several = [known for known in saved.get("choices", {}).values() if len(known) > 1]  # others may be overridden
    formats = {fmt for known in several for fmt in known}
    return tuple(sorted({level for fmt in formats if (level := get_format(fmt).level) is not None}))


def _sha256(content: Mapping[str, Any]) -> str:
    """As `Saved` describes it, in whatever order fields stand."""
    fields = {name: value for name, value in content.items() if name not in ("sha256", "seconds")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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


class Costs(NamedTuple):
    """What each level costs: `fixed` bytes, and per allocatable tensor and level the padded bytes, 0 where masked.

    Searches count in units, so that every sum over tensors is an int32: costs are rounded up to whole units and budgets
    down, so nothing that fits in units exceeds its budget in bytes. Below 64 GiB a unit is the alignment, and exact.

    `formats` are what levels mean for every matrix by name, None where masked, and `overrides` what they follow.
    """

    fixed: int
    per_level: Int[np.ndarray, "T A"]
    formats: Mapping[str, tuple[str | None, ...]] = {}
    overrides: tuple[Override, ...] = ()

    @property
    def valid(self) -> Bool[np.ndarray, "T A"]:
        """Which levels a tensor can take."""
        return self.per_level > 0

    @property
    def unit(self) -> int:
        """Bytes of a unit: the alignment times the least power of two with which the largest allocation is an int32."""
        unit = ALIGNMENT
        while int(self._in(unit).max(axis=1).sum()) > np.iinfo(np.int32).max:
            unit *= 2
        return unit

    @property
    def in_units(self) -> Int[np.ndarray, "T A"]:
        """What each level costs in units, in which `units` counts budgets; 0 where masked."""
        return self._in(self.unit)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest budget that can be kept: the smallest file, each of its tensors in whole units."""
        units = np.where(self.valid, self.in_units, np.iinfo(np.int64).max).min(axis=1).sum()
        return self.fixed + self.unit * int(units)

    @property
    def largest(self) -> int:
        """Bytes of the largest budget that can be used: the largest file, each of its tensors in whole units."""
        return self.fixed + self.unit * int(self.in_units.max(axis=1).sum())

    def units(self, budget_bytes: int) -> int:
        """Units that a file of `budget_bytes` leaves for allocated tensors, at most what they can use."""
        return (min(budget_bytes, self.largest) - self.fixed) // self.unit

    def fallback(self, spec: DecoderSpec, budget_bytes: int) -> str | None:
        """What matrices that blocks cannot hold cost in a file of that size, before anybody has chosen."""
        weights = sum(tensor.size for tensor in allocatable(spec))
        fixed = {name: row[0] for name, row in self.formats.items() if row[0] is not None}
        return fallback(spec, fixed, 8 * (budget_bytes - self.fixed) / weights)

    def _in(self, unit: int) -> Int[np.ndarray, "T A"]:
        return -(-self.per_level // unit)


def from_levels(model: Model, levels: Iterable[float | str]) -> Allocation:
    """Allocation from one level per allocatable tensor; raises `ValueError` for a masked level."""
    formats = {}
    for tensor, level in zip(allocatable(model.spec), levels, strict=True):
        fmt = format_for(level, tensor.shape[-1])
        if fmt is None:
            raise ValueError(f"{tensor.name} has rows of {tensor.shape[-1]} weights, which level {level} cannot hold.")
        formats[tensor.name] = fmt.name
    return _completed(model, formats, FALLBACK)


def _completed(model: Model, formats: Mapping[str, str], fallback: str) -> Allocation:
    """Allocation of `model`, folded as it is, from the formats of its allocatable tensors."""
    every = {tensor.name: formats.get(tensor.name, fallback) for tensor in matrices(model.spec)}
    return Allocation(model.spec, model.metadata, every, {name: np.asarray(s) for name, s in model.folding.items()})


def costs(model: Model, levels: tuple[float | str, ...], overrides: Sequence[Override] = ()) -> Costs:
    """Byte costs of every allocatable tensor at every level that overrides leave.

    Raises `ValueError` where no level can hold a tensor, and as `overrides.formats_of`.
    """
    members, formats = allocatable(model.spec), formats_of(model.spec, levels, overrides)
    table = np.zeros((len(members), len(levels)), np.int64)
    for tensor, row in zip(members, table, strict=True):
        row[:] = [tensor_bytes(tensor, fmt) if fmt else 0 for fmt in formats[tensor.name]]
        if not row.any():
            raise ValueError(f"no level of {levels} can hold {tensor.name} with rows of {tensor.shape[-1]} weights.")
    found = Costs(0, table, formats, tuple(overrides))
    cheapest = np.argmax(table > 0, axis=1)
    return found._replace(
        fixed=from_actions(model, found, cheapest).file_bytes - int(table[range(len(table)), cheapest].sum())
    )


def from_actions(model: Model, table: Costs, actions: Iterable[int]) -> Allocation:
    """Allocation of one level index per allocatable tensor of `table`; raises `ValueError` for a masked level."""
    levels = {tensor.name: int(a) for tensor, a in zip(allocatable(model.spec), actions, strict=True)}
    formats: dict[str, str] = {}
    for name, row in table.formats.items():
        if (fmt := row[levels.get(name, 0)]) is None:
            raise ValueError(f"{name} cannot have level {levels[name]} of {row}.")
        formats[name] = fmt
    made = {"overrides": table.overrides} if table.overrides else {}
    return dataclasses.replace(_completed(model, formats, FALLBACK), made=made)


def check_budget(reach: tuple[int, int], budget_bytes: int) -> None:
    """Raise `ValueError` where no allocation is as small or as large: `reach` are the bytes of smallest and largest."""
    smallest, largest = reach
    if not smallest <= budget_bytes <= largest:
        side = "below the smallest" if budget_bytes < smallest else "above the largest"
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes is {side} reachable file; "
            f"choose between {smallest:,} and {largest:,} bytes."
        )


def bytes_for_bits(spec: DecoderSpec, table: Costs, linear_bpw: float) -> int:
    """Size of a file whose allocated weights take `linear_bpw` bits each, scales included."""
    return table.fixed + int(linear_bpw * sum(tensor.size for tensor in allocatable(spec)) / 8)


def fallback(spec: DecoderSpec, formats: Mapping[str, str], linear_bpw: float) -> str | None:
    """One sentence on the matrices that blocks cannot hold, beside others at `linear_bpw`; None where there is none."""
    members = [tensor for tensor in matrices(spec) if not tensor.allocatable]
    if not members:
        return None
    size = sum(tensor_bytes(tensor, formats[tensor.name]) for tensor in members)
    beyond = size - linear_bpw * sum(tensor.size for tensor in members) / 8
    named = ", ".join(tensor.name for tensor in members[:_NAMED])
    rest = f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
    return (
        f"{len(members)} of {len(matrices(spec))} matrices stay in "
        f"{' and '.join(dict.fromkeys(formats[tensor.name] for tensor in members))}, since their rows are no multiple "
        f"of {SMALLEST_BLOCK} weights: {named}{rest}; they take {size:,} bytes, {beyond:,.0f} beyond the "
        f"{linear_bpw:.3f} bits per weight of the others."
    )


def tensor_bytes(tensor: Tensor, fmt: str) -> int:
    """Bytes of a tensor's data in a file, padding included."""
    rows = tensor.size // tensor.shape[-1]
    return padded(rows * get_format(fmt).row_bytes(tensor.shape[-1]))


def header_bytes(spec: DecoderSpec, metadata: Metadata) -> int:
    """Bytes before the first tensor's data of a file of the whole model."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(spec)}
    shapes |= {name: table.shape for name, table in spec.tables.items()}
    return header_of(metadata_bytes(metadata), sum(info_bytes(name, shape) for name, shape in shapes.items()))


def header_of(pairs: int, infos: int) -> int:
    """Bytes of a header: magic, version, two counts, so many of pairs and of tensor descriptions, padding."""
    return padded(4 + 4 + 8 + 8 + pairs + infos)


def info_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's description."""
    return 8 + len(name) + 4 + 8 * len(shape) + 4 + 8


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


def padded(size: int) -> int:
    """Bytes that data of that size takes in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT

"""An allocation as a recipe that stock llama-quantize follows: a folder with all that its command needs.

The folder holds the folded model in plain floats, the type of every matrix, an importance matrix of the folded model
where the encoder has importance, the command, and `plan.json`, which says what all of it was made from and what comes
out. llama-quantize then writes a file of the predicted size with the same types, and with the same bytes as
`export_gguf` with ggml's own rounding (`effort="reference"`) and the same importance. Where that differs from ggml in
one block of K-quants of three thousand (`Format.encode`), so do these. Encoders that search further (`best`,
`compensated`) have no counterpart there: types and importance are theirs, the rounding is ggml's.

Folding multiplies columns by numbers of f32, so the folded weights of an F16 or BF16 checkpoint are as a rule neither.
Every matrix therefore has the first of F16, BF16 and F32 that holds it to the last bit: F16 has more digits, BF16 the
range of f32, and what was not folded, as embeddings, keeps its checkpoint's type.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ramp_jax import files, hosts, schema
from ramp_jax.allocation import (
    Allocation,
    Calibration,
    EncoderName,
    FoldLevel,
    FormatName,
    export_metadata,
    tensor_bytes,
)
from ramp_jax.checkpoint import digest
from ramp_jax.formats import get_format
from ramp_jax.formats.registry import NEEDS_IMPORTANCE
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.llama_quantize import pattern
from ramp_jax.models import Model, matrices
from ramp_jax.models.metadata import Metadata
from ramp_jax.models.sketch import sketch
from ramp_jax.overrides import Override
from ramp_jax.quantization import REFERENCE, Encoder, calibrate, importance_of, write_imatrix
from ramp_jax.quantization.encode import encoded
from ramp_jax.quantization.importance import Importance, Origin, folded, linears

FOLDED, IMATRIX, TYPES = "folded.gguf", "imatrix.gguf", "tensor-types.txt"
COMMAND, PLAN, OUTPUT = "command.txt", "plan.json", "model.gguf"
"""Names in the folder, `OUTPUT` what the command writes."""

_FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_EXACT = "F32"
_BY_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_OF_ITS_OWN = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}
"""Matrices whose option of llama-quantize comes before any pattern."""
_OF_THE_ALLOCATION = {
    **{name: name for name in ("model", "budget_bytes", "overrides", "allocator", "allocator_sha256", "fold_level")},
    "allocation": "sha256",
}
"""Fields of a plan by what the allocation's file calls them."""
_NO_BLOCKS = "Q8_0"  # without blocks to name the file after; a type of plain floats would have patterns ignored
_UNKNOWN = "unknown"  # a text that an importance matrix does not name, though llama-quantize wants it to


class Folding(TypedDict):
    """How many activations Scale Folding divided, and the digest of their scales."""

    activations: Annotated[int, schema.within(0, 2**31 - 1)]
    sha256: schema.Sha256


class Plan(TypedDict):
    """What `plan.json` holds.

    `model` is the reference that it was loaded from and `weights` its `sketch`, `allocation` the sha256 of its file,
    `allocator` who chose (a policy, a rule) with the sha256 of a policy or a table, `encoder` how the exported file is
    rounded beside which the recipe was written, `importance` whether the recipe has a matrix of it, `file_bytes` the
    size of what the command writes, which is that of the exported file. Bits are counted as in `Allocation`.
    """

    version: Literal[1]
    model: NotRequired[schema.Name]
    weights: tuple[float, ...]
    allocation: NotRequired[schema.Sha256]
    allocator: NotRequired[schema.Name]
    allocator_sha256: NotRequired[schema.Sha256]
    fold_level: NotRequired[FoldLevel]
    budget_bytes: NotRequired[schema.Bytes]
    overrides: NotRequired[tuple[Override, ...]]
    folding: Folding
    encoder: EncoderName
    importance: bool
    calibration: NotRequired[Calibration]
    code_bits: schema.Positive
    linear_bpw: schema.Positive
    file_bpw: schema.Positive
    file_bytes: schema.Bytes
    formats: Mapping[str, FormatName]
    command: schema.Name


def read_plan(folder: str | Path) -> Plan:
    """What `write_recipe` wrote into `plan.json`; raises `ValueError` where it is damaged."""
    path = Path(folder) / PLAN
    with schema.gate(path, "the plan of a recipe", "delete its folder and write it again with --recipe"):
        return schema.read(Plan, schema.read_json(path))


def check_folder(folder: Path) -> None:
    """Raise `OSError` where a recipe cannot be written to `folder`: it holds other things, or cannot be made."""
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / PLAN).is_file():
            raise FileExistsError(f"{folder} is a folder of other things; choose another --recipe.")
    elif folder.exists() or not folder.parent.is_dir():
        raise OSError(f"cannot make {folder}: {folder.parent} is not a folder, or it is a file; choose another.")


def write_recipe(
    model: Model,
    allocation: Allocation,
    folder: str | Path,
    encoder: Encoder = REFERENCE,
) -> Plan:
    """Write the recipe of an allocation to the new `folder`, which appears when it is whole; returns its plan.

    `encoder` is the exported file's, whose importance is found on its windows where it has none. A folder that holds
    this very recipe is left as it is. Sweeps once over the weights to see which floats hold them and once to write
    them, and once more to calibrate. Raises `FileExistsError` where the folder holds something else, `OSError` where it
    cannot be made or the disk is too full, `ValueError` as `export_gguf`.
    """
    folder = Path(folder)
    check_folder(folder)
    importance, origin = _importance(model, allocation, encoder)
    if not importance:
        _check_goes_without(allocation)
    found = _plan(model, allocation, encoder, bool(importance))
    known = (folder / PLAN).is_file()
    if known and read_plan(folder) != found:
        raise FileExistsError(f"{folder} holds another recipe; delete it or choose another --recipe.")
    hosts.barrier()  # all know the folder as it was
    if known:
        return found
    floats = _exact_floats(model, allocation)
    source = dataclasses.replace(allocation, formats=floats)
    pairs = _source_pairs(allocation, source, origin.pairs(len(importance)))
    if hosts.index() > 0:
        export_gguf(model, source, folder, metadata=pairs)
        return found
    needed = sum(tensor_bytes(tensor, floats[tensor.name]) for tensor in matrices(model.spec))
    with files.replacing(folder, needed, folder=True) as partial:
        export_gguf(model, source, partial / FOLDED, metadata=pairs)
        if importance:
            dataset, chunks = origin.dataset or _UNKNOWN, origin.chunks or 0
            write_imatrix(partial / IMATRIX, importance, dataset, chunks, origin.chunk_size or 0, tokens=1)
        files.write_bytes(partial / TYPES, tensor_types(allocation).encode())
        files.write_bytes(partial / COMMAND, (found["command"] + "\n").encode())
        files.write_bytes(partial / PLAN, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _check_goes_without(allocation: Allocation) -> None:
    """Raise `ValueError` where llama-quantize makes a type by importance only."""
    for tensor in matrices(allocation.spec):
        if tensor.layer is not None and (fmt := allocation.format_of(tensor)) in _BY_IMPORTANCE:
            raise ValueError(f"llama-quantize makes {tensor.name} {fmt} by importance only; {NEEDS_IMPORTANCE}.")


def tensor_types(allocation: Allocation) -> str:
    """A line per matrix for `--tensor-type-file`: a regular expression that fits its name alone, and its type.

    llama-quantize searches every name for each expression, in lower case, and takes the first.
    """
    return "".join(f"{pattern(name)}={fmt.lower()}\n" for name, fmt in allocation.formats.items())


def command(allocation: Allocation, *, importance: bool) -> str:
    """The command that follows the recipe, in its folder.

    Its last word names the file's type, and the types of tensors that no pattern fits, of which there are none.
    """
    options = ["--imatrix", IMATRIX] if importance else []
    options += ["--tensor-type-file", TYPES]
    for name, option in _OF_ITS_OWN.items():
        if name in allocation.formats:
            options += [option, allocation.formats[name].lower()]
    return shlex.join(["llama-quantize", *options, FOLDED, OUTPUT, _file_type(allocation)])


def _file_type(allocation: Allocation) -> str:
    """llama-quantize's name of a file whose blocks are mostly of the type that takes most bytes here."""
    sizes: dict[str, int] = {}
    for tensor in matrices(allocation.spec):
        fmt = allocation.format_of(tensor)
        if get_format(fmt).block_size > 1:
            sizes[fmt] = sizes.get(fmt, 0) + tensor_bytes(tensor, fmt)
    kind = get_format(max(sizes, key=sizes.__getitem__, default=_NO_BLOCKS)).llama_ftype
    return kind.name.removeprefix("MOSTLY_") if kind else _NO_BLOCKS


def _plan(model: Model, allocation: Allocation, encoder: Encoder, importance: bool) -> Plan:
    """Everything as JSON gives it back."""
    name, made = "compensated" if encoder.compensated else encoder.effort, allocation.made
    scales = {name: np.asarray(values, np.float32) for name, values in allocation.folding.items()}
    content = {
        "version": 1,
        **{plan: made[key] for plan, key in _OF_THE_ALLOCATION.items() if key in made},
        **({"calibration": dict(allocation.calibration)} if allocation.calibration else {}),
        "weights": sketch(model),
        "folding": {"activations": len(scales), "sha256": digest(scales)},
        "encoder": name,
        "importance": importance,
        "command": command(allocation, importance=importance),
        **{key: value for key, value in allocation.summary().items() if key != "fallback"},
    }
    return schema.read(Plan, content)


def _importance(model: Model, allocation: Allocation, encoder: Encoder) -> tuple[Importance, Origin]:
    """Of the folded model, as the encoder weighs errors; what is not weighed has no entry."""
    known = encoder.importance
    if encoder.observes:
        known = importance_of(model.spec, calibrate(model, encoder.windows))
    found = {}
    for tensor in linears(model.spec):
        values = folded(known, tensor, allocation.folding)
        if values is not None and values.any():
            found[tensor.name] = values
    return found, encoder.origin._replace(file=IMATRIX, dataset=encoder.origin.dataset or _UNKNOWN)


def _source_pairs(allocation: Allocation, source: Allocation, rounding: Mapping[str, Any]) -> Metadata:
    """The pairs of the exported file but for its type and for those that llama-quantize adds, which have their room."""
    rounded = dataclasses.replace(allocation, made={**allocation.made, "encoder": "reference"})
    pairs = {name: pair for name, pair in export_metadata(rounded, rounding).items() if name not in rounding}
    return pairs | {"general.file_type": export_metadata(source)["general.file_type"]}


def _exact_floats(model: Model, allocation: Allocation) -> dict[str, str]:
    """The first plain float that holds a matrix folded as the allocation says, by name."""
    names = {tensor.name for tensor in matrices(model.spec)}
    exact = Allocation(model.spec, model.metadata, dict.fromkeys(names, _EXACT), allocation.folding)
    found = {}
    for tensor, pieces in encoded(model, exact, REFERENCE, "looking for the floats of"):
        fitting = list(_FLOATS)
        for piece in pieces:
            fitting = [name for name in fitting if _holds(np.asarray(piece), name)]
        found[tensor.name] = next(iter(fitting), _EXACT)
    return {name: found[name] for name in allocation.formats}


def _holds(w: Float[np.ndarray, "*rows I"], name: str) -> bool:
    with np.errstate(over="ignore"):  # what is beyond is infinite there
        return bool((w.astype(_FLOATS[name]).astype(np.float32) == w).all())

"""The file of an allocation: what its JSON may hold, and the gate through which it is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from ramp_jax import schema
from ramp_jax.formats import LEVEL_NAMES, LEVELS, get_format, level_of, ordered, written
from ramp_jax.formats.registry import EXPORTABLE
from ramp_jax.overrides import Override

MAKE_IT = "make one with launch/allocate.py"

EncoderName = Literal["reference", "best", "compensated"]
"""How weights become codes, which an allocation records."""


def _in_order(levels: tuple[float | str, ...]) -> bool:
    """Whether these are levels, each once, the smallest formats first."""
    names = [written(level) for level in levels]
    known = set(names) <= set(LEVEL_NAMES) and levels == tuple(map(level_of, names))
    return bool(levels) and known and levels == ordered(levels)


Levels = Annotated[
    tuple[float | str, ...],
    schema.Check(_in_order, f"levels by increasing size among {', '.join(LEVEL_NAMES)}"),
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
    the estimate expects the file to lose in nats per token, `levels` what whoever chose was offered, `choices` what
    they meant by tensor and format. `sha256` is that of all other fields but `seconds`, so that runs which find the
    same differ in nothing else.
    """

    model: NotRequired[schema.Name]
    weights: NotRequired[tuple[float, ...]]
    budget_bytes: NotRequired[schema.Bytes]
    encoder: NotRequired[EncoderName]
    allocator: NotRequired[schema.Name]
    allocator_sha256: NotRequired[schema.Sha256]
    fold_level: NotRequired[FoldLevel]
    levels: NotRequired[tuple[float | str, ...]]
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


MADE = Saved.__annotations__.keys() - {"formats", "folding", "calibration", "file_bytes", "linear_bpw", "file_bpw"}
MADE -= {"code_bits", "fallback"}


def read_saved(path: str | Path) -> Saved:
    """The JSON that `Allocation.save` wrote; raises `ValueError` for any other file, and one that was changed since."""
    with schema.gate(path, "an allocation", MAKE_IT):
        saved: Saved = schema.read(Saved, schema.read_json(path))
        offered = {fmt for known in saved.get("choices", {}).values() for fmt in known}
        if unknown := offered - set(EXPORTABLE):
            raise ValueError(f"choices offer {min(unknown)!r}, expected some of {', '.join(EXPORTABLE)}")
    found = sha256_of(saved)
    if saved.setdefault("sha256", found) != found:
        raise ValueError(
            f"{path} is not as it was written, its sha256 is another; restore it or make it again with "
            f"launch/allocate.py, or delete the line of its sha256 where you changed it yourself."
        )
    return saved


def offered_levels(saved: Saved) -> tuple[float | str, ...]:
    """Among which levels a file says that was chosen, as far as rows hold them; empty where it does not say."""
    several = [known for known in saved.get("choices", {}).values() if len(known) > 1]  # others may be overridden
    formats = {fmt for known in several for fmt in known}
    known = [get_format(fmt) for fmt in formats]
    return ordered(fmt.chosen_as for fmt in known if fmt.level is not None)


def sha256_of(content: Mapping[str, Any]) -> str:
    """As `Saved` describes it, in whatever order fields stand."""
    fields = {name: value for name, value in content.items() if name not in ("sha256", "seconds")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

"""Sensitivity tables: what each tensor costs at each level, the inputs that decided it, and saving while they grow."""

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from jaxtyping import Float, Int

from ramp_jax import schema
from ramp_jax.allocation import Levels
from ramp_jax.checkpoint import digest
from ramp_jax.files import write_bytes
from ramp_jax.formats import level_of, written
from ramp_jax.models import Model, Tensor, store
from ramp_jax.models.decoder import weights_dtype
from ramp_jax.overrides import format_at
from ramp_jax.quantization import Encoder
from ramp_jax.scoring.perplexity import Protocol

VERSION = 2
"""Raised whenever the bytes of a format or the measure change; tables of another version are refused."""


def _all_different(names: tuple[str, ...]) -> bool:
    return 0 < len(set(names)) == len(names)


_CODE = "code version"
_NOISE = 1e-3  # nats per token; rounding makes a divergence of almost nothing negative


class _Saved(TypedDict):
    """What a table's file holds, arrays of text and single values as plain ones."""

    tensors: Annotated[tuple[schema.Name, ...], schema.Check(_all_different, "different names, at least one")]
    levels: Levels
    kld: Any
    floor: Any
    seconds: schema.NotNegative
    inputs: str


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Mean KL divergence in nats per token, `[T, A]`: rows are `tensors`, columns `levels`, 0 where masked.

    `floor` `[T]` is what a change too small to matter reads in each row: entries near it are noise. Where nothing was
    measured yet, both hold NaN. `seconds` is what measuring took, over all runs that took part. `inputs` is the
    fingerprint of what the table depends on.
    """

    tensors: tuple[str, ...]
    levels: tuple[float | str, ...]
    kld: Float[np.ndarray, "T A"]
    floor: Float[np.ndarray, " T"]
    seconds: float = 0.0
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every cell was measured."""
        return not np.isnan(self.kld).any()

    def with_cells(
        self, rows: Sequence[int], columns: Sequence[int], kld: Any, floor: float, seconds: float
    ) -> "Sensitivity":
        """The table with some cells filled in, measured above `floor` in `seconds`.

        Raises `ValueError` that names the first cell whose cost is not finite.
        """
        for row, column, cost in zip(rows, columns, kld, strict=True):
            if not np.isfinite(cost):
                raise ValueError(
                    f"what {self.tensors[row]} costs at level {written(self.levels[column])} is not finite; "
                    f"load the model with dtype=float32, or check its weights."
                )
        table, floors, rows = self.kld.copy(), self.floor.copy(), np.asarray(rows)
        table[rows, columns], floors[rows] = kld, np.fmax(floors[rows], floor)
        return dataclasses.replace(self, kld=table, floor=floors, seconds=self.seconds + seconds)

    def save(self, path: str | Path) -> None:
        """Write a NumPy archive, whole or not at all."""
        archive = io.BytesIO()
        fields = {name: np.asarray(value) for name, value in vars(self).items() if name not in ("inputs", "levels")}
        levels = [written(level) for level in self.levels]
        np.savez(archive, inputs=json.dumps(dict(self.inputs)), levels=levels, **fields)
        write_bytes(path, archive.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read a finished table; raises `ValueError` for an unfinished one or one of an older version."""
        table = cls._read(path)
        if table.inputs.get(_CODE, str(VERSION)) != str(VERSION):
            raise ValueError(f"{path} is of version {table.inputs[_CODE]}, not {VERSION}; delete it to measure again.")
        if not table.finished:
            raise ValueError(f"measuring {path} was stopped; run launch/train.py with its config again to go on.")
        return table

    @classmethod
    def _read(cls, path: str | Path) -> "Sensitivity":
        with schema.gate(
            path,
            f"a sensitivity table of version {VERSION}",
            "delete what is there and measure it with launch/train.py",
        ):
            saved: _Saved = schema.read(_Saved, _archive(schema.content(path)))
            inputs = schema.read(Mapping[str, str], json.loads(saved["inputs"]))
            kld, floor = saved["kld"], saved["floor"]
            shape = len(saved["tensors"]), len(saved["levels"])
            if kld.dtype != np.float64 or kld.shape != shape or floor.dtype != np.float64 or floor.shape != shape[:1]:
                raise ValueError(f"kld and floor are no float64 of {shape[0]} tensors at {shape[1]} levels")
            if np.isinf(kld).any() or (kld < -_NOISE).any() or np.isinf(floor).any() or (floor < 0).any():
                raise ValueError("kld or floor hold infinite or negative numbers")
            return cls(saved["tensors"], saved["levels"], kld, floor, saved["seconds"], inputs)

    @classmethod
    def begin(
        cls,
        members: Sequence[Tensor],
        levels: tuple[float | str, ...],
        inputs: Mapping[str, str],
        path: str | Path | None,
    ) -> "Sensitivity":
        """The table to go on with: what `path` holds of it, else one where nothing is measured.

        Raises `ValueError` that names the inputs which are not those of the table at `path`.
        """
        names = tuple(tensor.name for tensor in members)
        if path is not None and Path(path).exists():
            found = cls._read(path)
            changed = [name for name in inputs if found.inputs.get(name) != inputs[name]]
            if not changed and (found.tensors, found.levels) != (names, levels):
                changed = ["tensors or levels"]
            if changed:
                raise ValueError(
                    f"{path} was measured with other inputs (changed: {', '.join(changed)}); "
                    f"delete it to measure again, or choose another folder."
                )
            return found
        valid = [[format_at(level, tensor) is not None for level in levels] for tensor in members]
        kld = np.where(valid, np.nan, 0.0)
        return cls(names, levels, kld, np.full(len(members), np.nan), 0.0, inputs)


def fingerprint(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    members: Sequence[Tensor],
    levels: tuple[float | str, ...],
    protocol: Protocol,
    method: str,
    encoder: Encoder,
) -> dict[str, str]:
    """What a table depends on, by name; arrays as SHA-256 digests."""
    formats = [fmt.name if (fmt := format_at(a, tensor)) else "" for tensor in members for a in levels]
    return {
        _CODE: str(VERSION),
        "method": method,
        "protocol": protocol,
        "levels": ", ".join(map(written, levels)),
        "tensors": digest(np.asarray([tensor.name for tensor in members])),
        "formats": digest(np.asarray(formats)),
        "encoder": f"{encoder.effort} {digest(dict(encoder.importance))}",
        "dtype": str(weights_dtype(model.params)),
        "windows": digest(windows),
        "folding": digest(model.folding),
        "folded weights": store.fingerprint(model.params),
    }


def _archive(content: bytes) -> dict[str, Any]:
    """The members of what `np.savez` writes, uncompressed as it does; texts and single values as Python's own.

    Sizes are held against what is there, and nothing is unpickled. Raises `ValueError` or an error of the libraries.
    """
    found: dict[str, Any] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found or name not in _Saved.__annotations__:
                raise ValueError(f"it has {name!r} twice, or in vain")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content):
                raise ValueError(f"{name} is not stored as NumPy does")
            array = _array(archive.read(member))
            found[name] = array.tolist() if array.ndim == 0 or array.dtype.kind == "U" or name == "levels" else array
    if isinstance(levels := found.get("levels"), list):
        found["levels"] = [level_of(level) if isinstance(level, str) else level for level in levels]
    return found


def _array(raw: bytes) -> np.ndarray:
    file = io.BytesIO(raw)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array is of another version of NumPy's format")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if math.prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise ValueError(f"an array of shape {shape} does not fill its part of the file")
    return np.frombuffer(raw, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")

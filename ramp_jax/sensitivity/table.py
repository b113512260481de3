"""Sensitivity tables: what each tensor costs at each level, the inputs that decided it, and saving while they grow."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ramp_jax.checkpoint import digest
from ramp_jax.files import write_bytes
from ramp_jax.formats import format_for
from ramp_jax.models import Model, Tensor, store
from ramp_jax.models.decoder import weights_dtype
from ramp_jax.quantization import Encoder
from ramp_jax.scoring.perplexity import Protocol

VERSION = 2
"""Raised whenever the bytes of a format or the measure change; tables of another version are refused."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Mean KL divergence in nats per token, `[T, A]`: rows are `tensors`, columns `levels`, 0 where masked.

    `floor` `[T]` is what a change too small to matter reads in each row: entries near it are noise. Where nothing was
    measured yet, both hold NaN. `seconds` is what measuring took, over all runs that took part. `inputs` is the
    fingerprint of what the table depends on.
    """

    tensors: tuple[str, ...]
    levels: tuple[float, ...]
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
                    f"what {self.tensors[row]} costs at level {self.levels[column]} is not finite; "
                    f"load the model with dtype=float32, or check its weights."
                )
        table, floors, rows = self.kld.copy(), self.floor.copy(), np.asarray(rows)
        table[rows, columns], floors[rows] = kld, np.fmax(floors[rows], floor)
        return dataclasses.replace(self, kld=table, floor=floors, seconds=self.seconds + seconds)

    def save(self, path: str | Path) -> None:
        """Write a NumPy archive, whole or not at all."""
        archive = io.BytesIO()
        fields = {name: np.asarray(value) for name, value in vars(self).items() if name != "inputs"}
        np.savez(archive, inputs=json.dumps(dict(self.inputs)), **fields)
        write_bytes(path, archive.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read a finished table; raises `ValueError` for an unfinished one or one of an older version."""
        table = cls._read(path)
        if not table.finished:
            raise ValueError(f"measuring {path} was stopped; run launch/train.py with its config again to go on.")
        return table

    @classmethod
    def _read(cls, path: str | Path) -> "Sensitivity":
        try:
            with np.load(path) as saved:
                names, levels = saved["tensors"].tolist(), saved["levels"].tolist()
                inputs, seconds = json.loads(saved["inputs"].item()), float(saved["seconds"])
                return cls(tuple(names), tuple(levels), saved["kld"], saved["floor"], seconds, inputs)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is no sensitivity table of this version; delete it to measure again.") from error

    @classmethod
    def begin(
        cls, members: Sequence[Tensor], levels: tuple[float, ...], inputs: Mapping[str, str], path: str | Path | None
    ) -> "Sensitivity":
        """The table to go on with: what `path` holds of it, else one where nothing is measured.

        Raises `ValueError` that names the inputs which are not those of the table at `path`.
        """
        if path is not None and Path(path).exists():
            found = cls._read(path)
            if changed := [name for name in inputs if found.inputs.get(name) != inputs[name]]:
                raise ValueError(
                    f"{path} was measured with other inputs (changed: {', '.join(changed)}); "
                    f"delete it to measure again, or choose another folder."
                )
            return found
        valid = [[format_for(level, tensor.shape[-1]) is not None for level in levels] for tensor in members]
        kld = np.where(valid, np.nan, 0.0)
        return cls(tuple(tensor.name for tensor in members), levels, kld, np.full(len(members), np.nan), 0.0, inputs)


def fingerprint(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    members: Sequence[Tensor],
    levels: tuple[float, ...],
    protocol: Protocol,
    method: str,
    encoder: Encoder,
) -> dict[str, str]:
    """What a table depends on, by name; arrays as SHA-256 digests."""
    formats = [fmt.name if (fmt := format_for(a, tensor.shape[-1])) else "" for tensor in members for a in levels]
    return {
        "code version": str(VERSION),
        "method": method,
        "protocol": protocol,
        "levels": ", ".join(f"{level:g}" for level in levels),
        "tensors": digest(np.asarray([tensor.name for tensor in members])),
        "formats": digest(np.asarray(formats)),
        "encoder": f"{encoder.effort} {digest(dict(encoder.importance))}",
        "dtype": str(weights_dtype(model.params)),
        "windows": digest(windows),
        "folding": digest(model.folding),
        "folded weights": store.fingerprint(model.params),
    }

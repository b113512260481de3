"""What a report tells: an allocation tensor by tensor, and what was measured beside it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ramp_jax import schema
from ramp_jax.allocation import Choice, Saved
from ramp_jax.files import read_rows
from ramp_jax.formats import get_format
from ramp_jax.halo.compare import Comparison, Row
from ramp_jax.sensitivity.table import Sensitivity

_PER_SEED = tuple[float, ...]
_METRICS = {"iteration": schema.Count, "loss_over_uniform": _PER_SEED, "return": _PER_SEED, "entropy": _PER_SEED}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What a report shows of a run's `metrics.jsonl`; raises `ValueError` where that is damaged."""
    with schema.gate(path, "the metrics of a training run", "delete the run and train again"):
        rows = [
            {name: schema.read(kind, row.get(name), name) for name, kind in _METRICS.items()} for row in read_rows(path)
        ]
        if not rows or len({len(row[name]) for row in rows for name in _METRICS if name != "iteration"}) != 1:
            raise ValueError("it has no rows, or not one value per seed in each")
        return rows


class Price(NamedTuple):
    """What another format of a tensor would change: bytes of the file, nats per token where that is predicted."""

    format: str
    bytes: int
    kld: float | None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A matrix of the allocation: its place, its format, and what else it could have had, from the smallest up.

    `layer` is None outside the blocks; `module` is the name inside the block, without `.weight`.
    """

    name: str
    layer: int | None
    module: str
    format: str
    choices: Mapping[str, Choice]

    @property
    def bits(self) -> float:
        """Nominal bits of its format."""
        return float(get_format(self.format).code_bits)

    @property
    def bytes(self) -> int | None:
        """Bytes of its data, None where the allocation does not say."""
        return self.choices[self.format]["bytes"] if self.format in self.choices else None

    @property
    def loss(self) -> float | None:
        """What it is predicted to lose alone, in nats per token, None where nothing is predicted."""
        return self.choices.get(self.format, {}).get("loss")

    def losses(self) -> dict[str, float]:
        """What it is predicted to lose in each format."""
        return {fmt: choice["loss"] for fmt, choice in self.choices.items() if "loss" in choice}

    def next(self, step: int) -> Price | None:
        """One format up (1) or down (-1) by size; None at the end, or where bytes are not known."""
        order = sorted(self.choices, key=lambda fmt: self.choices[fmt]["bytes"])
        if self.format not in order or not 0 <= (at := order.index(self.format) + step) < len(order):
            return None
        fmt = order[at]
        return Price(
            fmt, self.choices[fmt]["bytes"] - self.choices[self.format]["bytes"], self.choices[fmt].get("change")
        )


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that a page is made of; what was not measured is None or empty.

    `path` is the allocation's file, `gguf` what was or is to be exported, `source` the `--source_policy` with which
    launch/allocate.py chooses alike. `table` holds measured losses, which stand in where the allocation predicts none.
    """

    allocation: Saved
    path: Path
    gguf: str
    source: str
    comparison: Comparison | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    table: Sensitivity | None = None

    @property
    def model(self) -> str:
        """The model's reference, as whoever allocated gave it."""
        return self.allocation.get("model") or (self.comparison or {}).get("model") or "the model"

    @property
    def allocator(self) -> str:
        """Who chose."""
        return self.allocation.get("allocator") or "an unknown allocator"

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Every matrix in forward order."""
        cells, table = [], self.table if self.measured else None
        for name, fmt in self.allocation["formats"].items():
            choices = self.allocation.get("choices", {}).get(name, {})
            if table is not None and name in table.tensors:
                choices = _with_losses(choices, fmt, _of_tensor(table, name))
            inside = name.split(".", 2) if name.startswith("blk.") else []
            layer = int(inside[1]) if len(inside) == 3 and inside[1].isdecimal() else None
            module = (inside[2] if layer is not None else name).removesuffix(".weight")
            cells.append(Cell(name, layer, module, fmt, choices))
        return cells

    @property
    def inside(self) -> list[Cell]:
        """Those of the blocks."""
        return [cell for cell in self.cells if cell.layer is not None]

    @property
    def outside(self) -> list[Cell]:
        """Embedding and head."""
        return [cell for cell in self.cells if cell.layer is None]

    @functools.cached_property
    def modules(self) -> list[str]:
        """Names inside blocks, in forward order."""
        return list(dict.fromkeys(cell.module for cell in self.inside))

    @functools.cached_property
    def layers(self) -> list[int]:
        """Numbers of the blocks."""
        return sorted({cell.layer for cell in self.inside if cell.layer is not None})

    @property
    def measured(self) -> bool:
        """Whether losses are those of the table."""
        every = self.allocation.get("choices", {}).values()
        return self.table is not None and not any("loss" in choice for known in every for choice in known.values())

    @property
    def predicted(self) -> float | None:
        """Mean KL divergence in nats per token that the allocation was predicted to lose."""
        return self.allocation.get("predicted_kld")

    @property
    def ours(self) -> Row | None:
        """The compared row of this allocation."""
        return next((row for row in reversed(self.rivals) if row.kld_beyond is None), None)

    @property
    def rivals(self) -> list[Row]:
        """All rows of the allocation's own budget, its own the last."""
        known = self.comparison
        return [row for row in known["rows"] if row.budget_bytes == known["budget_bytes"]] if known else []

    @property
    def reference(self) -> Row | None:
        """The unquantized model's row."""
        return (
            next((row for row in self.comparison["rows"] if row.budget_bytes is None), None)
            if self.comparison
            else None
        )

    def totals(self, key: Callable[[Cell], Any]) -> dict[Any, tuple[int, float]]:
        """Bytes and summed losses of cells by key, in forward order."""
        found: dict[Any, tuple[int, float]] = {}
        for cell in self.cells:
            size, loss = found.get(key(cell), (0, 0.0))
            found[key(cell)] = size + (cell.bytes or 0), loss + max(cell.loss or 0.0, 0.0)
        return found


def _with_losses(
    choices: Mapping[str, Choice], chosen: str, of_level: Mapping[float | str, float]
) -> dict[str, Choice]:
    """The choices with losses by level, those of the formats that have one of these levels."""
    losses = {fmt: of_level[level] for fmt in choices if (level := get_format(fmt).chosen_as) in of_level}
    if chosen not in losses:
        return dict(choices)
    changes = {fmt: loss - losses[chosen] for fmt, loss in losses.items()}
    return {
        fmt: {"bytes": choice["bytes"], **({"loss": losses[fmt], "change": changes[fmt]} if fmt in losses else {})}
        for fmt, choice in choices.items()
    }


def _of_tensor(table: Sensitivity, name: str) -> dict[float | str, float]:
    """What a tensor was measured to lose, by level."""
    return dict(zip(table.levels, table.kld[table.tensors.index(name)].tolist(), strict=True))

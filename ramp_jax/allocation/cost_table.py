"""What choices cost: bytes of every tensor at every level, exact, and allocations from levels.

Every tensor of a GGUF is padded to the alignment, so a file is a fixed part plus one term per allocated tensor.
Matrices whose rows blocks cannot hold belong to the fixed part.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ramp_jax.allocation.allocation import Allocation
from ramp_jax.allocation.sizes import ALIGNMENT, fallback, tensor_bytes
from ramp_jax.formats import get_format
from ramp_jax.formats.registry import LATTICE_LEVELS
from ramp_jax.models import DecoderSpec, Model, allocatable
from ramp_jax.overrides import Override, format_at, formats_of


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
        fixed = {name: row[0] for name, row in self.formats.items() if row[0] is not None}
        return fallback(spec, fixed, self.bits(spec, budget_bytes))

    def bits(self, spec: DecoderSpec, budget_bytes: int) -> float:
        """Per allocated weight in a file of that size, scales included."""
        return 8 * (budget_bytes - self.fixed) / sum(tensor.size for tensor in allocatable(spec))

    def bits_of_choices(self, spec: DecoderSpec, budget_bytes: int) -> float:
        """Per weight of the matrices that more than one format is left for; 0 where there are none."""
        decided = self.valid.sum(axis=1) == 1
        size = sum(tensor.size for tensor, one in zip(allocatable(spec), decided, strict=True) if not one)
        taken = self.fixed + int(self.per_level[decided].sum())
        return 8 * (budget_bytes - taken) / size if size else 0.0

    def _in(self, unit: int) -> Int[np.ndarray, "T A"]:
        return -(-self.per_level // unit)


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


def worthwhile(
    model: Model, levels: tuple[float | str, ...], budget_bytes: int, overrides: Sequence[Override] = ()
) -> tuple[float | str, ...]:
    """Those of `levels` that are worth looking at for a file of that size, where it can still be reached with them.

    Left out are lattices of less than half the bits per weight that there are for the matrices with a choice: they are
    chosen there for next to nothing. All stay where an override names one.
    """
    if any(override["format"] in LATTICE_LEVELS for override in overrides):
        return levels
    least = costs(model, levels, overrides).bits_of_choices(model.spec, budget_bytes) / 2
    small = {name for name in LATTICE_LEVELS if get_format(name).bits_per_weight < least}
    fewer = tuple(level for level in levels if level not in small)
    return fewer if costs(model, fewer, overrides).smallest <= budget_bytes else levels


def from_levels(model: Model, levels: Iterable[float | str]) -> Allocation:
    """Allocation from one level per allocatable tensor; raises `ValueError` for a masked level."""
    formats = {}
    for tensor, level in zip(allocatable(model.spec), levels, strict=True):
        fmt = format_at(level, tensor)
        if fmt is None:
            raise ValueError(f"{tensor.name} has rows of {tensor.shape[-1]} weights, which level {level} cannot hold.")
        formats[tensor.name] = fmt.name
    return Allocation.of(model, formats)


def from_actions(model: Model, table: Costs, actions: Iterable[int]) -> Allocation:
    """Allocation of one level index per allocatable tensor of `table`; raises `ValueError` for a masked level."""
    levels = {tensor.name: int(a) for tensor, a in zip(allocatable(model.spec), actions, strict=True)}
    formats: dict[str, str] = {}
    for name, row in table.formats.items():
        if (fmt := row[levels.get(name, 0)]) is None:
            raise ValueError(f"{name} cannot have level {levels[name]} of {row}.")
        formats[name] = fmt
    made = {"overrides": table.overrides} if table.overrides else {}
    return dataclasses.replace(Allocation.of(model, formats), made=made)


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

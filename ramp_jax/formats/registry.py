"""The formats that an allocation may name, and which of them a level means for a row length."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ramp_jax.formats import codes, integers, kquants, lattice_search, legacy, packing, ternary_search
from ramp_jax.formats.best import Grid, improve, whole
from ramp_jax.formats.lattice import LATTICES, Lattice
from ramp_jax.formats.lattice_packing import packers
from ramp_jax.formats.rounding import nearest_power_of_two, rounded_to_f16
from ramp_jax.formats.search import nearest_fp4, nearest_iq4

Effort = Literal["coarse", "reference", "best"]
"""How long an encoder searches."""

NEEDS_IMPORTANCE = "calibrate, as the encoders best and compensated do, or choose another format"
"""The way out where importance is missing."""

_F16_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class Format:
    """One block format: all that is known of it.

    `encoder(w, importance, coarse)` maps weights f32 `[*rows, I]` to a pytree of codes, `decode` these to f32; both
    are pure and jittable. An encoder that `weighs_rows` takes the rows' mean squares as well, one that
    `needs_importance` makes nothing without. `to_bytes` and `from_bytes` map codes to and from `[*rows, row_bytes(I)]`
    uint8 on the host, None where no GGUF type stores the format. No |weight| may be above `largest`. `llama_ftype` is
    the type of a file that is made of it. `grid` is what `effort="best"` and compensation search, None where there are
    no codes to choose among.

    `level` orders formats by size and is about the bits of a code; None for plain floats. An allocation may choose
    among numbers, `LEVELS`, which are those of the formats with `action`: of several at one level, the one with the
    largest block that divides a row stands for it. All others are chosen by their names.
    """

    name: str
    level: float | None
    block_size: int
    block_bytes: int
    encoder: Callable[..., Any]
    decode: Callable[[Any], jax.Array]
    to_bytes: Callable[[Any], np.ndarray] | None = None
    from_bytes: Callable[[np.ndarray], Any] | None = None
    largest: float = _F16_MAX
    llama_ftype: gguf.LlamaFileType | None = None
    grid: Grid | None = None
    action: bool = False
    weighs_rows: bool = False
    needs_importance: bool = False

    def encode(
        self,
        w: jax.Array,
        importance: jax.Array | None = None,
        effort: Effort = "reference",
        row_square: jax.Array | None = None,
    ) -> Any:
        """Codes of w `[*rows, I]`, weighted by `importance`, `[I]` or `[*rows, I]`.

        Where w holds pieces of rows, formats that weigh by whole rows want their mean squares, `row_square` `[*rows]`.

        `reference` makes the bytes of `ggml_quantize_chunk` for all blocks of 32 and IQ4_XS and for at least 99.968 %
        of the blocks of K-quants (measured on SmolLM2-135M); the others have other codes where their scale is 0, and
        exactly ggml's error. Lattices are ggml's bytes but where it misplaces what follows zeros (IQ3_S). Weights, sums
        and scales that are f32 denormals are zeros on CPUs, but not in ggml. `coarse` tries fewer scales, for
        comparing formats: weighted errors are up to 4 % larger, of lattices, where it looks at all points, smaller.
        `best` searches on from the reference; no block's weighted squared error, summed in f32, becomes larger. Inputs
        are not checked here: `formats.check` does, on the host. Raises `ValueError` for an unknown effort.
        """
        if effort not in get_args(Effort):
            raise ValueError(f"unknown effort {effort!r}; choose {', '.join(get_args(Effort))}.")
        if importance is None and self.needs_importance:
            raise ValueError(f"{self.name} is rounded by importance only; {NEEDS_IMPORTANCE}.")
        of_rows = (row_square,) if self.weighs_rows else ()
        found = self.encoder(w, importance, effort == "coarse", *of_rows)
        if effort == "best" and self.grid is not None:
            found = improve(found, w, importance, self.grid)
        return found

    @property
    def exportable(self) -> bool:
        """Whether a GGUF type stores it."""
        return self.to_bytes is not None

    @property
    def ggml_type(self) -> gguf.GGMLQuantizationType:
        """The type number that a GGUF file stores; raises `ValueError` for simulated formats."""
        if not self.exportable:
            raise ValueError(f"{self.name} is simulated only; export level {self.level} with format_for(level, n_in).")
        return gguf.GGMLQuantizationType[self.name]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def chosen_as(self) -> float | str:
        """The level that means it: its number where it has an `action`, else its name."""
        return self.level if self.action and self.level is not None else self.name

    @property
    def code_bits(self) -> float:
        """What papers count: the level, all stored bits for plain floats."""
        return self.bits_per_weight if self.level is None else self.level

    def row_bytes(self, n_in: int) -> int:
        """Bytes of one row of `n_in` weights; raises `ValueError` where the row is not a whole number of blocks."""
        if n_in % self.block_size:
            raise ValueError(
                f"{self.name} holds rows of a multiple of {self.block_size} weights, not {n_in}; "
                f"choose a format with a smaller block or keep the tensor in F16."
            )
        return n_in // self.block_size * self.block_bytes


def _float(
    name: str,
    dtype: Any,
    llama_ftype: gguf.LlamaFileType,
    rounded: Callable[[jax.Array], jax.Array] = lambda w: w,
    largest: float = np.inf,
) -> Format:
    dtype = jnp.dtype(dtype)
    return Format(
        name,
        None,
        *_block_sizes(name),
        encoder=lambda w, _importance, _coarse: rounded(w).astype(dtype),
        decode=lambda stored: stored.astype(jnp.float32),
        to_bytes=lambda stored: np.ascontiguousarray(stored, dtype).view(np.uint8),
        from_bytes=lambda raw: np.ascontiguousarray(raw).view(dtype),
        largest=largest,
        llama_ftype=llama_ftype,
    )


def _blocks(
    name: str,
    level: float,
    encoder: Callable[..., codes.Codes],
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    most: int,
    grid: Grid,
    bits: int | None = None,
    mix: str = "",
    scale: float = _F16_MAX,
    action: bool = True,
    weighs_rows: bool = False,
    needs_importance: bool = False,
) -> Format:
    """A type of ggml's: the `pair` to and from bytes takes `bits`, unless None; weights reach `most` times a `scale`.

    llama.cpp names files after mixes of K-quants: `mix` is the ending of the one that is mostly this type.
    """
    to_bytes, from_bytes = pair if bits is None else (functools.partial(packer, bits=bits) for packer in pair)
    return Format(
        name,
        level,
        *_block_sizes(name),
        encoder=encoder,
        decode=codes.decode,
        to_bytes=to_bytes,
        from_bytes=from_bytes,
        largest=most * scale,
        llama_ftype=gguf.LlamaFileType[f"MOSTLY_{name}{mix}"],
        grid=grid,
        action=action,
        weighs_rows=weighs_rows,
        needs_importance=needs_importance,
    )


def _block_sizes(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def _lattice(lattice: Lattice, level: float) -> Format:
    search, ends = ternary_search if lattice.shared else lattice_search, (lattice.unit, lattice.top * lattice.unit)
    nearest = functools.partial(search.nearest, lattice=lattice)
    return _blocks(
        lattice.name,
        level,
        functools.partial(search.encode, lattice=lattice),
        packers(lattice),
        int(12 * lattice.top * lattice.unit * lattice.largest / 31),
        Grid(nearest, ends, unit=2 * lattice.unit, columns=lattice.together),
        action=False,
        needs_importance=lattice.needs_importance,
    )


def _group(name: str, bits: int, group: int, encoder: Callable[..., integers.GroupCodes]) -> Format:
    grid = Grid(whole(0, (1 << bits) - 1), searched=False)
    return Format(name, bits, group, group * bits // 8 + 4, encoder, integers.decode, grid=grid)


def _nearest_iq4(v: jax.Array, _: jax.Array) -> jax.Array:
    return nearest_iq4(v)


def _nearest_fp4(v: jax.Array, _: jax.Array) -> jax.Array:
    return nearest_fp4(v)


_rows = functools.partial(_blocks, weighs_rows=True)

_SCALED = packing.scaled_to_bytes, packing.scaled_from_bytes
_AFFINE = packing.affine_to_bytes, packing.affine_from_bytes
_Q8_0 = packing.q8_0_to_bytes, packing.q8_0_from_bytes
_IQ4_NL = packing.iq4_nl_to_bytes, packing.iq4_nl_from_bytes
_MXFP4 = packing.mxfp4_to_bytes, packing.mxfp4_from_bytes
_Q2_K = packing.q2_k_to_bytes, packing.q2_k_from_bytes
_Q3_K = packing.q3_k_to_bytes, packing.q3_k_from_bytes
_Q45_K = packing.q45_k_to_bytes, packing.q45_k_from_bytes
_Q6_K = packing.q6_k_to_bytes, packing.q6_k_from_bytes
_IQ4_XS = packing.iq4_xs_to_bytes, packing.iq4_xs_from_bytes

_FORMATS = {
    fmt.name: fmt
    for fmt in (
        _float("F32", jnp.float32, gguf.LlamaFileType.ALL_F32),
        _float("F16", jnp.float16, gguf.LlamaFileType.MOSTLY_F16, rounded_to_f16, _F16_MAX),
        _float("BF16", jnp.bfloat16, gguf.LlamaFileType.MOSTLY_BF16, lambda w: lax.reduce_precision(w, 8, 7)),
        _rows("Q4_0", 4, legacy.encode_q4_0, _SCALED, 8, Grid(whole(-8, 7)), bits=4, action=False),
        _rows("Q4_1", 4.5, legacy.encode_q4_1, _AFFINE, 1, Grid(whole(0, 15), mins=(1, 1)), bits=4, action=False),
        _rows("Q5_0", 5, legacy.encode_q5_0, _SCALED, 16, Grid(whole(-16, 15)), bits=5),
        _rows("Q5_1", 6, legacy.encode_q5_1, _AFFINE, 1, Grid(whole(0, 31), mins=(1, 1)), bits=5),
        _blocks("Q8_0", 8, legacy.encode_q8_0, _Q8_0, 127, Grid(whole(-127, 127))),
        _blocks("IQ4_NL", 4, legacy.encode_iq4_nl, _IQ4_NL, 113, Grid(_nearest_iq4)),
        _blocks("Q2_K", 2, kquants.encode_q2_k, _Q2_K, 15, Grid(whole(0, 3), (0, 15), (0, 15))),
        _blocks("Q3_K", 3, kquants.encode_q3_k, _Q3_K, 4 * 31, Grid(whole(-4, 3), (-32, 31), reach=3), mix="_M"),
        _blocks("Q4_K", 4.5, kquants.encode_q4_k, _Q45_K, 63, Grid(whole(0, 15), (0, 63), (0, 63)), bits=4, mix="_M"),
        _blocks("Q5_K", 5, kquants.encode_q5_k, _Q45_K, 63, Grid(whole(0, 31), (0, 63), (0, 63)), bits=5, mix="_M"),
        _blocks("Q6_K", 6, kquants.encode_q6_k, _Q6_K, 32 * 127, Grid(whole(-32, 31), (-128, 127))),
        _blocks("IQ4_XS", 4, kquants.encode_iq4_xs, _IQ4_XS, 113 * 31, Grid(_nearest_iq4, (-32, 31))),
        _blocks(
            *("MXFP4", 4, legacy.encode_mxfp4, _MXFP4, 12),
            Grid(_nearest_fp4, stored=nearest_power_of_two, factors=(0.25, 0.5, 2)),
            mix="_MOE",
            scale=2.0**124,
            action=False,
        ),
        _lattice(LATTICES["IQ1_S"], 1.4),
        _lattice(LATTICES["IQ1_M"], 1.5),
        _lattice(LATTICES["IQ2_XXS"], 1.75),
        _lattice(LATTICES["IQ2_XS"], 1.9),
        _lattice(LATTICES["IQ2_S"], 1.95),
        _lattice(LATTICES["IQ3_XXS"], 2.9),
        _lattice(LATTICES["IQ3_S"], 3.25),
        *(_group(name, *parts) for name, parts in integers.named().items()),
    )
}

_ACTIONS = [fmt for fmt in _FORMATS.values() if fmt.action]

LEVELS = tuple(sorted({fmt.level for fmt in _ACTIONS if fmt.level is not None}))
"""The levels that name formats by their bits; a format's own name is a level too."""


def get_format(name: str) -> Format:
    """The format of that name; raises `ValueError` that lists the known ones."""
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats are {', '.join(_FORMATS)}.")
    return _FORMATS[name]


EXPORTABLE = tuple(fmt.name for fmt in _FORMATS.values() if fmt.exportable)
"""Names of the formats that a GGUF can hold; `format_for` takes them in place of levels."""


LATTICE_LEVELS = tuple(LATTICES)
"""Levels below four bits that have no number."""


def unweighted(levels: Iterable[float | str]) -> tuple[float | str, ...]:
    """The levels that can be rounded without importance."""
    return tuple(level for level in levels if not isinstance(level, str) or not get_format(level).needs_importance)


_NAMED = (fmt.name for fmt in _FORMATS.values() if fmt.exportable and fmt.grid and not fmt.action)
LEVEL_NAMES = (*(f"{level:g}" for level in LEVELS), *_NAMED)
"""How levels are written: numbers, and formats that no number means."""


def levels_of(names: Iterable[str]) -> tuple[float | str, ...]:
    """Levels of some of `LEVEL_NAMES`, each once, in the order of their sizes."""
    return ordered(map(level_of, names))


def level_of(name: str) -> float | str:
    """The level that is `written` so; raises `ValueError` that lists them for anything else."""
    if name not in LEVEL_NAMES and name not in EXPORTABLE:
        raise ValueError(f"{name!r} is no level; choose among {', '.join(LEVEL_NAMES)}.")
    return {f"{level:g}": level for level in LEVELS}.get(name, name)


def ordered(levels: Iterable[float | str]) -> tuple[float | str, ...]:
    """Levels, each once, by the bits per weight of their largest blocks."""
    found = {level: format_for(level, 256) for level in levels}

    def size(level: float | str) -> tuple[float, float]:
        if (fmt := found[level]) is None:
            raise ValueError(f"no format has level {written(level)}; choose among {', '.join(LEVEL_NAMES)}.")
        return fmt.bits_per_weight, fmt.code_bits

    return tuple(sorted(found, key=size))


def written(level: float | str) -> str:
    """A level as one of `LEVEL_NAMES`."""
    return level if isinstance(level, str) else f"{level:g}"


def format_for(level: float | str, n_in: int) -> Format | None:
    """The exportable format that `level` means for rows of `n_in` weights, or None where the level is masked.

    A format's own name means that format and no other.
    """
    known = [get_format(level)] if isinstance(level, str) else [fmt for fmt in _ACTIONS if fmt.level == level]
    fitting = (fmt for fmt in known if n_in % fmt.block_size == 0)
    return max(fitting, key=lambda fmt: fmt.block_size, default=None)


DEFAULT_LEVELS = ordered((*LEVELS, *(name for name, lattice in LATTICES.items() if not lattice.shared)))
"""What scripts choose among where nobody says otherwise: numbers, IQ2 and IQ3 (`allocation.worthwhile`)."""


def format_up_to(level: float, n_in: int) -> Format | None:
    """The format of the highest level up to `level` that rows of `n_in` weights can take, or None."""
    formats = (format_for(other, n_in) for other in sorted(LEVELS, reverse=True) if other <= level)
    return next((fmt for fmt in formats if fmt is not None), None)

"""What is decided about single tensors before anybody chooses: formats that are kept, floors and ceilings.

Whoever chooses does so among what is left (`formats_of`): levels that an override forbids are masked as those that a
row cannot hold, and a kept tensor has its format in place of one level, with all others masked. So no allocator knows
of overrides.
"""

import fnmatch
from collections.abc import Sequence
from typing import Literal, TypedDict

from ramp_jax.formats import EXPORTABLE, Format, format_for, get_format
from ramp_jax.models import DecoderSpec, Tensor, matrices

Kind = Literal["keep", "floor", "ceiling"]
FALLBACK = "F16"
"""Format of matrices whose rows blocks cannot hold."""


class Override(TypedDict):
    """A format for all matrices whose GGUF name matches `pattern`, whose `*`, `?` and `[...]` are those of file names:
    exactly it, or no fewer (no more) bits per weight than it has."""

    kind: Kind
    pattern: str
    format: str


def parse_override(kind: Kind, text: str) -> Override:
    """An override of `PATTERN=FORMAT`; raises `ValueError` for any other text."""
    pattern, _, fmt = text.rpartition("=")
    if not pattern:
        raise ValueError(f"--{kind}={text} is no PATTERN=FORMAT, as in --{kind}=blk.*.attn_v.weight=Q6_K.")
    if fmt.upper() not in EXPORTABLE:
        raise ValueError(f"--{kind}={text} names a format that no file has; choose one of {', '.join(EXPORTABLE)}.")
    return Override(kind=kind, pattern=pattern, format=fmt.upper())


def format_at(level: float | str, tensor: Tensor) -> Format | None:
    """What a level means for a matrix; None where its rows cannot hold it, and where it needs importance, which only
    matrices of blocks have."""
    found = format_for(level, tensor.shape[-1])
    return None if found and found.needs_importance and tensor.layer is None else found


def formats_of(
    spec: DecoderSpec, levels: Sequence[float | str], overrides: Sequence[Override] = ()
) -> dict[str, tuple[str | None, ...]]:
    """Per matrix what each level means for it, None where the level is masked; in forward order.

    A matrix whose rows blocks cannot hold has one format at the first level. Raises `ValueError` for an override that
    matches no matrix or asks for what a row cannot hold, a bound that is none of a matrix's choices, and overrides that
    leave nothing to choose.
    """
    for override in overrides:
        _check_matches(spec, override)
    return {tensor.name: _left(tensor, _held(tensor, levels), overrides) for tensor in matrices(spec)}


def _held(tensor: Tensor, levels: Sequence[float | str]) -> tuple[str | None, ...]:
    """What levels mean for a matrix before anything is overridden."""
    if not tensor.allocatable:
        return FALLBACK, *[None] * (len(levels) - 1)
    return tuple(fmt.name if (fmt := format_at(level, tensor)) else None for level in levels)


def _left(tensor: Tensor, held: tuple[str | None, ...], overrides: Sequence[Override]) -> tuple[str | None, ...]:
    """What overrides leave of it."""
    mine = [override for override in overrides if fnmatch.fnmatchcase(tensor.name, override["pattern"])]
    for override in mine:
        _check_holds(tensor, held, override)
    kept = [override for override in mine if override["kind"] == "keep"]
    if kept:
        for override in mine:
            if not _allows(override, kept[0]["format"]):
                raise ValueError(f"{_said(kept[0])} and {_said(override)} contradict each other for {tensor.name}.")
        return _in_place_of_nearest(held, kept[0]["format"])
    left = tuple(fmt if fmt and all(_allows(override, fmt) for override in mine) else None for fmt in held)
    if mine and not any(left):
        raise ValueError(f"{' and '.join(map(_said, mine))} leave nothing to choose for {tensor.name}.")
    return left


def _allows(override: Override, fmt: str) -> bool:
    """Whether a format is what the override asks for."""
    bits, bound = get_format(fmt).bits_per_weight, get_format(override["format"]).bits_per_weight
    return {"keep": fmt == override["format"], "floor": bits >= bound, "ceiling": bits <= bound}[override["kind"]]


def _in_place_of_nearest(held: tuple[str | None, ...], fmt: str) -> tuple[str | None, ...]:
    """A format at the level nearest to it, which stands for it in tables of losses; all others masked."""
    bits = get_format(fmt).bits_per_weight
    known = [a for a, other in enumerate(held) if other is not None] or [0]
    nearest = min(known, key=lambda a: (held[a] != fmt, abs(get_format(held[a] or fmt).bits_per_weight - bits)))
    return tuple(fmt if a == nearest else None for a in range(len(held)))


def _check_matches(spec: DecoderSpec, override: Override) -> None:
    names = [tensor.name for tensor in matrices(spec)]
    if not fnmatch.filter(names, override["pattern"]):
        raise ValueError(
            f"{_said(override)} matches no matrix of the model, which are named as in {', '.join(_examples(names))}."
        )


def _check_holds(tensor: Tensor, held: tuple[str | None, ...], override: Override) -> None:
    fmt, n_in = get_format(override["format"]), tensor.shape[-1]
    if n_in % fmt.block_size:
        raise ValueError(
            f"{_said(override)} matches {tensor.name}, whose rows of {n_in} weights are no multiple of the "
            f"{fmt.block_size} in a block; choose another format or a narrower pattern."
        )
    choices = list(dict.fromkeys(other for other in held if other))
    if override["kind"] != "keep" and fmt.name not in choices:
        raise ValueError(
            f"{_said(override)} is no bound for {tensor.name}, which is chosen among {', '.join(choices)}; name one of "
            f"these."
        )


def _examples(names: Sequence[str]) -> list[str]:
    """Names outside of blocks and those of the first one."""
    return [name for name in names if not name.startswith("blk.") or name.startswith("blk.0.")]


def _said(override: Override) -> str:
    return f"--{override['kind']}={override['pattern']}={override['format']}"

"""Budgets in the units that people think in."""

import re

from absl import flags

from ramp_jax.allocation import Costs, bytes_for_bits, check_budget
from ramp_jax.cli.flags import must_be
from ramp_jax.halo.footprint import bytes_that_fit, runtime_bytes
from ramp_jax.models import Model

_BUDGETS = ("budget_bytes", "budget_gb", "budget_bits", "fit_memory")
BUDGET_FLAGS = (*_BUDGETS, "fit_context")
_MOST_BYTES = 10**15
_MEMORY = "must be a size, as in 8GiB (2^30 bytes) or 8GB (10^9)."


def define_budget() -> None:
    """`--budget_bytes`, `--budget_gb`, `--budget_bits` and `--fit_memory`, of which `budget` wants exactly one."""
    flags.DEFINE_integer("budget_bytes", None, "Largest size of the finished file in bytes.")
    flags.DEFINE_float("budget_gb", None, "Largest size of the finished file in units of 10^9 bytes.")
    flags.DEFINE_float("budget_bits", None, "Mean bits per allocated weight, scales included.")
    for name, most in (("budget_bytes", _MOST_BYTES), ("budget_gb", _MOST_BYTES / 1e9), ("budget_bits", 64)):
        must_be(name, most)
    flags.DEFINE_string(
        "fit_memory",
        None,
        "Memory, as in 8GiB, for weights, KV cache of --fit_context tokens and compute buffer, as llama.cpp's defaults "
        "need them: f16 KV cache, flash attention, batches of 512.",
    )
    flags.DEFINE_integer(
        "fit_context", None, "Context length for --fit_memory; default: all that the model was made for.", lower_bound=1
    )
    flags.register_validator("fit_memory", lambda text: text is None or parse_bytes(text) is not None, _MEMORY)


def check_budget_flags(*, required: bool = True) -> None:
    """Raise `ValueError` unless exactly one budget is given, or at most one where none is `required`."""
    given = _given()
    if len(given) > 1 or (required and not given):
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given) or 'no budget'} given; "
            f"give one of {', '.join(f'--{name}' for name in _BUDGETS)}."
        )
    if flags.FLAGS.fit_context is not None and "fit_memory" not in given:
        raise ValueError("--fit_context belongs to --fit_memory; give that, or leave it out.")


def budget(model: Model, table: Costs) -> int | None:
    """The budget in bytes, None where none was given.

    Raises `ValueError` with the reachable range where no file of that size exists.
    """
    values = flags.FLAGS
    if not _given():
        return None
    if values.fit_memory is not None:
        context = values.fit_context or model.spec.context_length
        print(f"KV cache of {context:,} tokens and compute buffer: {runtime_bytes(model.spec, context):,} bytes")
        return bytes_that_fit(model.spec, table, parse_bytes(values.fit_memory) or 0, context)
    if values.budget_bits is not None:
        size = bytes_for_bits(model.spec, table, values.budget_bits)
    else:
        size = values.budget_bytes if values.budget_bytes is not None else int(values.budget_gb * 1e9)
    check_budget(table, size)
    return size


def _given() -> list[str]:
    return [name for name in _BUDGETS if flags.FLAGS[name].value is not None]


def parse_bytes(text: str) -> int | None:
    """Bytes of a size such as 8GiB, None where it is none, or one that no machine has."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    if not found or (found[3] and not found[2]):
        return None
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    return int(size) if size <= _MOST_BYTES else None

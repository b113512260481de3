"""Budgets in the units that people think in."""

import re
from typing import get_args

from absl import flags

from ramp_jax.allocation import Costs, bytes_for_bits, check_budget
from ramp_jax.cli.flags import must_be, refuse_flags
from ramp_jax.halo.footprint import KV_TYPES, Device, Runtime, bytes_that_fit, footprint
from ramp_jax.models import DecoderSpec, Model

_RUNTIME = ("fit_context", "parallel", "kv_type", "flash_attention", "device")
_BUDGETS = ("budget_bytes", "budget_gb", "budget_bits", "fit_memory")
BUDGET_FLAGS = (*_BUDGETS, *_RUNTIME)
_MOST_BYTES, _MOST_PARALLEL = 10**15, 256
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
        "Memory, as in 8GiB, for weights, KV cache, compute buffer and output buffer, as llama.cpp takes it for the "
        "flags below and batches of 512 tokens.",
    )
    flags.DEFINE_integer(
        "fit_context", None, "Tokens of each sequence; default: all that the model was made for.", lower_bound=1
    )
    flags.DEFINE_integer("parallel", 1, "Sequences at a time (llama.cpp's -np).", 1, _MOST_PARALLEL)
    flags.DEFINE_string(
        "kv_type",
        "f16",
        f"Type of the KV cache (-ctk, -ctv), {', '.join(KV_TYPES)}, or two: keys,values.",
    )
    flags.register_validator("kv_type", _are_kv_types, f"must be one or two of {', '.join(KV_TYPES)}.")
    flags.DEFINE_bool("flash_attention", True, "Whether llama.cpp uses flash attention (-fa).")
    flags.DEFINE_enum("device", "cpu", get_args(Device), "Where all layers and the cache lie (gpu: -ngl all).")
    flags.register_validator("fit_memory", lambda text: text is None or parse_bytes(text) is not None, _MEMORY)


def check_budget_flags(*, required: bool = True) -> None:
    """Raise `ValueError` unless exactly one budget is given, or at most one where none is `required`.

    Where one is, flags that say how a file is run belong to --fit_memory.
    """
    given = _given()
    if len(given) > 1 or (required and not given):
        raise ValueError(
            f"{' and '.join(f'--{name}' for name in given) or 'no budget'} given; "
            f"give one of {', '.join(f'--{name}' for name in _BUDGETS)}."
        )
    if required and "fit_memory" not in given:
        refuse_flags(_RUNTIME, "without --fit_memory")


def budget(model: Model, table: Costs, reach: tuple[int, int] | None = None) -> int | None:
    """The budget in bytes, None where none was given; `reach` is what is reachable where that is less than `table`.

    Raises `ValueError` with the reachable range where no file of that size exists.
    """
    values = flags.FLAGS
    if not _given():
        return None
    if values.fit_memory is not None:
        how = runtime(model.spec)
        beside = footprint(model.spec, how)
        sizes = f"KV cache {beside.cache:,}, compute buffer {beside.compute:,}"
        if how.device == "cpu":
            sizes += f", output buffer {beside.output:,}"
        print(f"Beside the weights, for {how.parallel} x {how.context:,} tokens: {sizes} bytes")
        size = bytes_that_fit(model.spec, table, parse_bytes(values.fit_memory) or 0, how)
    elif values.budget_bits is not None:
        size = bytes_for_bits(model.spec, table, values.budget_bits)
    else:
        size = values.budget_bytes if values.budget_bytes is not None else int(values.budget_gb * 1e9)
    check_budget(reach or (table.smallest, table.largest), size)
    return size


def runtime(spec: DecoderSpec, context: int | None = None) -> Runtime:
    """How the flags say that llama.cpp is to run a file; `context` in place of --fit_context, or all that `spec` has.

    Raises `ValueError` for what llama.cpp refuses.
    """
    values = flags.FLAGS
    keys, _, of_values = values.kv_type.partition(",")
    return Runtime(
        context or values.fit_context or spec.context_length,
        values.parallel,
        keys,
        of_values or keys,
        values.flash_attention,
        values.device,
    )


def _are_kv_types(text: str) -> bool:
    found = text.split(",")
    return len(found) <= 2 and set(found) <= set(KV_TYPES)


def _given() -> list[str]:
    return [name for name in _BUDGETS if flags.FLAGS[name].value is not None]


def parse_bytes(text: str) -> int | None:
    """Bytes of a size such as 8GiB, None where it is none, or one that no machine has."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    if not found or (found[3] and not found[2]):
        return None
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    return int(size) if size <= _MOST_BYTES else None

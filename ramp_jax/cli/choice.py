"""How formats are chosen, for the scripts that choose: flags, and what they ask for."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from ramp_jax.allocation import Costs, EncoderName, costs, worthwhile
from ramp_jax.allocators import Allocator
from ramp_jax.allocators.allocator import has_own_levels
from ramp_jax.cli.budget import BUDGET_FLAGS, budget, check_budget_flags, define_budget
from ramp_jax.cli.flags import TEXTS, define_dtype, refuse_flags
from ramp_jax.cli.inputs import load
from ramp_jax.cli.overrides import OVERRIDE_FLAGS, define_overrides, overrides
from ramp_jax.config import WindowsConfig
from ramp_jax.data import parts_of
from ramp_jax.formats import DEFAULT_LEVELS, LEVEL_NAMES, levels_of, unweighted
from ramp_jax.models import Model
from ramp_jax.policy.inference import POLICY_FILE, find_allocator
from ramp_jax.quantization import DEFAULT_ENCODER
from ramp_jax.workflow import check_context, check_rounded

_FLAGS = (
    "source_policy",
    "levels",
    "data",
    "context",
    "count",
    "dtype",
    "refine_evals",
    *BUDGET_FLAGS,
    *OVERRIDE_FLAGS,
)


class Choice(NamedTuple):
    """Who chooses for which model, and on which windows that one is calibrated; `size` is the budget in bytes, `table`
    what is chosen among, after overrides."""

    allocator: Allocator
    windows: WindowsConfig
    model: Model
    size: int | None
    table: Costs


def define_choice() -> None:
    """`--source_policy`, `--levels`, budgets, calibration windows, `--dtype` and `--refine_evals`."""
    flags.DEFINE_string(
        "source_policy",
        None,
        "Who chooses: the workdir of a training run, pretrained, fisher, greedy, uniform, random, evolution, "
        "llama.cpp, or a measured table (.npz).",
    )
    flags.DEFINE_list(
        "levels",
        None,
        "Levels to choose among, or formats by name; a measured table's must be these. By default all that have "
        "numbers, and IQ2 and IQ3 formats of at least half the budget's bits that the encoder can make.",
    )
    flags.register_validator(
        "levels",
        lambda levels: levels is None or (bool(levels) and set(levels) <= set(LEVEL_NAMES)),
        f"must be some of {','.join(LEVEL_NAMES)}.",
    )
    flags.DEFINE_string("data", "builtin", TEXTS)
    flags.DEFINE_integer("context", 512, "Tokens of a calibration window.", lower_bound=2)
    flags.DEFINE_integer("count", 8, "Calibration windows.", lower_bound=1)
    define_dtype(
        "auto", "Data type of the matrices while calibrating: auto is the fastest here, stored the checkpoint's."
    )
    flags.DEFINE_integer("refine_evals", 0, "True evaluations that refine the allocation.", lower_bound=0)
    define_budget()
    define_overrides()


def refuse_choice(where: str) -> None:
    """Raise `ValueError` where a flag of `define_choice` was given that would be ignored."""
    refuse_flags(_FLAGS, where)


def choice_files() -> list[str]:
    """The files that the choice reads beside the model."""
    policy = Path(flags.FLAGS.source_policy)
    return [
        *(part.source for part in parts_of(flags.FLAGS.data)),
        str(policy / POLICY_FILE if policy.is_dir() else policy),
    ]


def choice(
    ref: str, tokenizer_from: str | None = None, *, required: bool = True, encoder: EncoderName = DEFAULT_ENCODER
) -> Choice:
    """What the flags ask for, with the model loaded; says which sizes can be reached and what fallbacks cost.

    Without a `required` budget, its size may be None. Raises `ValueError` where the flags contradict each other, the
    model, what can be reached, or what the `encoder` can do.
    """
    values = flags.FLAGS
    levels = levels_of(values.levels) if values.levels else None
    check_rounded(levels or (), encoder)
    by_default = levels is None and not has_own_levels(values.source_policy)
    every = unweighted(DEFAULT_LEVELS) if encoder == "reference" else DEFAULT_LEVELS
    allocator = _allocator(every if by_default else levels)
    check_budget_flags(required=required)
    decided = overrides()
    model = load(ref, values.dtype, tokenizer_from)
    check_context(values.context, model.spec.context_length)
    table = costs(model, allocator.levels, decided)
    smallest, largest = reach = allocator.reach(model, table)
    print(f"Reachable files of {ref}: {smallest:,} to {largest:,} bytes")
    size = budget(model, table, reach)
    if size is not None:
        print(f"Budget: {size:,} bytes")
        if cost := table.fallback(model.spec, size):
            print(cost)
        if by_default:
            allocator = _allocator(worthwhile(model, every, size, decided))
            table = costs(model, allocator.levels, decided)
    return Choice(allocator, WindowsConfig(values.data, values.context, values.count), model, size, table)


def _allocator(levels: Sequence[float | str] | None) -> Allocator:
    return find_allocator(flags.FLAGS.source_policy, levels=levels, evaluations=flags.FLAGS.refine_evals)

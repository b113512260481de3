"""What every script in `launch/` shares: how it runs and fails, flags, budgets in the units that people think in."""

from ramp_jax.cli.budget import budget, check_budget_flags, define_budget, parse_bytes
from ramp_jax.cli.flags import (
    define_config,
    define_dtype,
    define_encoder,
    define_hosts,
    define_mesh,
    define_tokenizer_from,
    define_trust_calibration,
    refuse_flags,
)
from ramp_jax.cli.inputs import announce, check_output_path, load
from ramp_jax.cli.running import run

__all__ = [
    "announce",
    "budget",
    "check_budget_flags",
    "check_output_path",
    "define_budget",
    "define_config",
    "define_dtype",
    "define_encoder",
    "define_hosts",
    "define_mesh",
    "define_tokenizer_from",
    "define_trust_calibration",
    "load",
    "parse_bytes",
    "refuse_flags",
    "run",
]

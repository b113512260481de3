"""What every script in `launch/` shares: how it runs and fails, flags, budgets in the units that people think in."""

from ramp_jax.cli.budget import parse_bytes, runtime
from ramp_jax.cli.choice import Choice, choice, choice_files, define_choice, refuse_choice
from ramp_jax.cli.flags import (
    TEXTS,
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
    "TEXTS",
    "Choice",
    "announce",
    "check_output_path",
    "choice",
    "choice_files",
    "define_choice",
    "define_config",
    "define_dtype",
    "define_encoder",
    "define_hosts",
    "define_mesh",
    "define_tokenizer_from",
    "define_trust_calibration",
    "load",
    "parse_bytes",
    "refuse_choice",
    "refuse_flags",
    "run",
    "runtime",
]

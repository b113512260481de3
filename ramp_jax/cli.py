"""What every script in `launch/` shares: failures in one sentence, and budgets in the units that people think in."""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import jax
from absl import app, flags, logging

from ramp_jax.allocation import Costs, bytes_for_bits, check_budget
from ramp_jax.encoders import DEFAULT
from ramp_jax.models import Model, load_model
from ramp_jax.quantization import EncoderName

_MOST_COMPILED = 1 << 30  # bytes on disk; what was not used for longest goes first

BUDGET_FLAGS = ("budget_bytes", "budget_gb", "budget_bits")


def run(main: Callable[[], None]) -> None:
    """Run a script; a foreseen failure prints its one sentence and ends with exit code 1."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)
        try:
            _keep_compiled()
            main()
        except (ValueError, OSError, RuntimeError) as error:
            _fail(error)
        except KeyboardInterrupt:
            print("stopped; run the same command again to go on.", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _keep_compiled() -> None:
    """Compiled programs serve later runs on the same machine; `JAX_COMPILATION_CACHE_DIR` names another folder."""
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        jax.config.update("jax_compilation_cache_dir", str(caches / "ramp_jax" / platform.node()))
        jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ValueError, TypeError, OSError, AttributeError) as error:  # all but the first from --config
        _fail(f"{error} (--help lists the flags)")


def _fail(cause: object) -> NoReturn:
    """Print one line and end with exit code 1."""
    print("error:", " ".join(str(cause).split()), file=sys.stderr)
    sys.exit(1)


def load(ref: str, dtype: str = "float32") -> Model:
    """`load_model`, saying so: large models take a while."""
    print(f"Loading {ref}", flush=True)
    return load_model(ref, dtype)


def define_encoder(*, recorded: bool = True) -> flags.FlagHolder[str | None]:
    """`--encoder`: how weights become codes; by default what the allocation records, or `encoders.DEFAULT`."""
    default = "what the allocation records" if recorded else DEFAULT
    return flags.DEFINE_enum(
        "encoder",
        None if recorded else DEFAULT,
        get_args(EncoderName),
        "How weights are rounded: as ggml does without importance, by a wider search weighted by what calibration saw, "
        f"or with every column's error made up for in later ones. Default: {default}.",
    )


def define_budget() -> None:
    """`--budget_bytes`, `--budget_gb` and `--budget_bits`; exactly one must be given."""
    flags.DEFINE_integer("budget_bytes", None, "Largest size of the finished file in bytes.", lower_bound=1)
    flags.DEFINE_float("budget_gb", None, "Largest size of the finished file in units of 10^9 bytes.", lower_bound=0)
    flags.DEFINE_float("budget_bits", None, "Mean bits per allocated weight, scales included.", lower_bound=0)
    flags.mark_flags_as_mutual_exclusive(BUDGET_FLAGS, required=True)


def budget(model: Model, table: Costs) -> int:
    """The budget in bytes; raises `ValueError` with the reachable range where no file of that size exists."""
    values = flags.FLAGS
    if values.budget_bits is not None:
        size = bytes_for_bits(model.spec, table, values.budget_bits)
    else:
        size = values.budget_bytes if values.budget_bytes is not None else int(values.budget_gb * 1e9)
    check_budget(table, size)
    return size

"""What every script in `launch/` shares: failures in one sentence, and budgets in the units that people think in."""

import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import jax
from absl import app, flags, logging

from ramp_jax.allocation import Costs, bytes_for_bits, check_budget
from ramp_jax.encoders import DEFAULT
from ramp_jax.halo.footprint import runtime_bytes
from ramp_jax.models import Model, load_model
from ramp_jax.quantization import EncoderName

_MOST_COMPILED = 1 << 28  # bytes on disk; what was not used for longest goes first
_WORTH_KEEPING = 0.05  # seconds of compiling; JAX keeps what took one, and most of a short job are many small programs

BUDGET_FLAGS = ("budget_bytes", "budget_gb", "budget_bits", "fit_memory")
_MEMORY = "must be a number with B, MB, GB, MiB or GiB, as in 8GiB."
_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}


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
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


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
    """`--budget_bytes`, `--budget_gb`, `--budget_bits` and `--fit_memory`; exactly one must be given."""
    flags.DEFINE_integer("budget_bytes", None, "Largest size of the finished file in bytes.", lower_bound=1)
    flags.DEFINE_float("budget_gb", None, "Largest size of the finished file in units of 10^9 bytes.", lower_bound=0)
    flags.DEFINE_float("budget_bits", None, "Mean bits per allocated weight, scales included.", lower_bound=0)
    flags.DEFINE_string(
        "fit_memory", None, "Memory, as in 8GiB, that weights, keys and values and llama.cpp's buffers must fit."
    )
    flags.DEFINE_integer("fit_context", None, "Tokens that --fit_memory leaves room for; default: all the model takes.")
    flags.register_validator("fit_memory", lambda text: text is None or _bytes(text) is not None, _MEMORY)
    flags.mark_flags_as_mutual_exclusive(BUDGET_FLAGS, required=True)


def budget(model: Model, table: Costs) -> int:
    """The budget in bytes; raises `ValueError` with the reachable range where no file of that size exists."""
    values = flags.FLAGS
    if values.budget_bits is not None:
        size = bytes_for_bits(model.spec, table, values.budget_bits)
    elif values.fit_memory is not None:
        size = _bytes_that_fit(model, table, values.fit_memory, values.fit_context or model.spec.context_length)
    else:
        size = values.budget_bytes if values.budget_bytes is not None else int(values.budget_gb * 1e9)
    check_budget(table, size)
    return size


def _bytes_that_fit(model: Model, table: Costs, memory: str, context: int) -> int:
    """Of the largest file with room for the context; raises `ValueError` where not even the smallest has it."""
    beside = runtime_bytes(model.spec, context)
    print(f"Beside the weights, llama.cpp needs up to {beside:,} bytes for {context:,} tokens")
    size = _bytes(memory) - beside
    if size < table.smallest:
        raise ValueError(
            f"{memory} cannot hold the smallest file, {table.smallest:,} bytes, and {beside:,} more for {context:,} "
            f"tokens; choose a larger --fit_memory or a smaller --fit_context."
        )
    return min(size, table.largest)


def _bytes(text: str) -> int | None:
    """Of a size with its unit, None where it is none."""
    found = re.fullmatch(rf"(\d+\.?\d*) ?({'|'.join(_UNITS)})", text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None

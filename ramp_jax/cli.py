"""What every script in `launch/` shares: failures in one sentence, and budgets in the units that people think in."""

import contextlib
import difflib
import os
import platform
import re
import runpy
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from ramp_jax import __version__, devices, hosts
from ramp_jax.allocation import Costs, bytes_for_bits, check_budget
from ramp_jax.config import field_names
from ramp_jax.halo.export import check_writable
from ramp_jax.halo.footprint import bytes_that_fit, runtime_bytes
from ramp_jax.models import Model, load_model
from ramp_jax.models.load import Dtype, fast_dtype
from ramp_jax.models.references import model_files
from ramp_jax.quantization import DEFAULT_ENCODER, EncoderName
from ramp_jax.resources import check_output
from ramp_jax.workflow import tokenizer_of

_MOST_COMPILED = 1 << 28  # bytes on disk; what was not used for longest goes first
_WORTH_KEEPING = 0.05  # seconds of compiling; JAX keeps what took one, and most of a short job are many small programs

_STOPS = (signal.SIGINT, signal.SIGTERM)
_HELP = {"-h", "-help", "--help", "-?"}
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")

_BUDGETS = ("budget_bytes", "budget_gb", "budget_bits", "fit_memory")
_MOST_BYTES = 10**15
_MEMORY = "must be a size, as in 8GiB (2^30 bytes) or 8GB (10^9)."


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 0 where it succeeds.

    A foreseen failure prints its one sentence and ends with 1; SIGINT and SIGTERM let it clean up and end with 130 and
    143, so that whoever stopped a machine can tell that the job goes on when it is run again.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; every option is a flag, --name=value.")
        logging.set_verbosity(logging.WARNING)
        try:
            with _stoppable():
                _keep_compiled()
                with _hosts():
                    _use_mesh()
                    main()
        except (ValueError, OSError, RuntimeError) as error:
            _fail(error)
        except KeyboardInterrupt as stop:
            stopped = stop.args[0] if stop.args else signal.SIGINT
            print(f"stopped by {stopped.name}; run the same command again to go on.", file=sys.stderr)
            hosts.leave(128 + stopped)
        if jax.distributed.is_initialized():
            hosts.leave(0)

    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask for an end raise `KeyboardInterrupt` with the signal; a second one ends the process at once."""

    def stop(number: int, _: object) -> NoReturn:
        for asked in _STOPS:
            signal.signal(asked, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number))

    before = {asked: signal.getsignal(asked) for asked in _STOPS}
    for asked, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and the shell's & have it
            signal.signal(asked, stop)
    try:
        yield
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


def _keep_compiled() -> None:
    """Compiled programs serve later runs on the same machine; `JAX_COMPILATION_CACHE_DIR` names another folder.

    Only the own folder is kept small: another one may hold what is not ours.
    """
    if jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        jax.config.update("jax_compilation_cache_dir", str(caches / "ramp_jax" / platform.node()))
        jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def _hosts() -> contextlib.AbstractContextManager[Any]:
    """All processes of the job, where a script has the flags of `define_hosts` and they are given."""
    values = flags.FLAGS
    if "hosts" not in values:
        return contextlib.nullcontext()
    if values.hosts is None:
        refuse_flags(["patience"], "without --hosts")
        return contextlib.nullcontext()
    if values.output is None:
        raise ValueError("--output is missing; its folder is where the processes of --hosts exchange what they find.")
    where, count, index = (None, None, None) if values.hosts == "auto" else values.hosts.split(",")
    folder = Path(values.output).expanduser().parent
    return hosts.joined(folder, where, count and int(count), index and int(index), values.patience)


def _use_mesh() -> None:
    """Compute on the mesh that `--mesh` describes, where a script has that flag and it is given."""
    if "mesh" in flags.FLAGS and (text := flags.FLAGS.mesh) is not None:
        devices.use(devices.make_mesh(*map(int, text.split("x"))))


def _parse(argv: Sequence[str]) -> list[str]:
    if _HELP & set(argv):
        print(_help())
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # of any class where a config is wrong
        _fail(_wrong_field(argv) or f"{error} (--help lists the flags)")


def _help() -> str:
    """What the script's docstring teaches, and all flags of the script and of this project's modules."""
    members = flags.FLAGS.flags_by_module_dict()
    ours = [module for module in members if module.split(".")[0] in ("ramp_jax", "benchmarks")]
    shown = [_described(flag) for module in (sys.argv[0], *ours) for flag in members.get(module, [])]
    return "\n".join([(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:", "", *shown])


def _described(flag: flags.Flag) -> str:
    """A flag with what it takes, what it is for and what it is if left out."""
    choices = "|".join(getattr(flag.parser, "enum_values", ()))
    takes = {"int": "=N", "float": "=X", "bool": ""}.get(flag.flag_type(), f"={choices or '...'}")
    text = flag.help.removeprefix(f"<{choices}>: ")
    if any("must have a value" in validator.message for validator in flag.validators):
        text += " Required."
    elif flag.default is not None and flag.default is not False and flag.default != []:
        text += f" Default: {flag.default_as_str.strip(chr(39))}."
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    return f"  {name}{takes}\n{textwrap.indent(textwrap.fill(text, 110), ' ' * 6)}"


def _wrong_field(argv: Sequence[str]) -> str | None:
    """A sentence on the first --config.FIELD that the config does not have, None where that is not what is wrong."""
    overrides = [found[1] for arg in argv if (found := _OVERRIDE.match(arg))]
    file = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), None)
    if not overrides or file is None:
        return None
    try:
        fields = dict(_fields(runpy.run_path(file)["get_config"]().to_dict()))
    except Exception:  # then it is the file that is wrong
        return None
    wrong = next((name for name in overrides if name not in fields), None)
    if wrong is None:
        return None
    leaves = [name for name, value in fields.items() if not isinstance(value, dict)]
    (nearest,) = difflib.get_close_matches(wrong, leaves, n=1, cutoff=0)
    return f"{file} has no {wrong}; the nearest that it has is --config.{nearest}."


def _fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values in a config and the dictionaries around them, by name."""
    for name, value in values.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")


def _fail(cause: object) -> NoReturn:
    """Print one line and end with exit code 1."""
    print("error:", " ".join(str(cause).split()), file=sys.stderr)
    hosts.leave(1)


def announce(dtype: str, seed: int = 0) -> None:
    """Print in one line what a log is of no use without: versions, devices, the dtype of matrices, the seed."""
    found = jax.local_devices()
    where = f"{len(found)} x {found[0].device_kind}"
    dtype = fast_dtype() if dtype == "auto" else dtype
    print(f"ramp_jax {__version__}, jax {jax.__version__}, {where}, {dtype}, seed {seed}", flush=True)


def load(ref: str, dtype: str = "float32", tokenizer_from: str | None = None) -> Model:
    """`load_model`, saying so: large models take a while. Raises `ValueError` where it has no vocabulary."""
    announce(dtype)
    print(f"Loading {ref}", flush=True)
    model = load_model(ref, dtype, tokenizer_from)
    tokenizer_of(model)
    return model


def check_output_path(path: str | Path, *, models: Iterable[str | None] = (), files: Iterable[str | None] = ()) -> Path:
    """The path of a file that a script will write, of whose inputs some are models and some files, as flags name them.

    Raises `OSError` where it cannot be written, `ValueError` where it is one of the inputs.
    """
    path = Path(path).expanduser()
    check_writable(path)
    inputs = [Path(file).expanduser() for file in files if file]
    check_output(path, inputs + [file for ref in models if ref for file in model_files(ref)])
    return path


def define_config(cls: type) -> flags.FlagHolder[Any]:
    """`--config`: a file whose `get_config()` gives the values of a `cls`, and --config.FIELD=VALUE for each field."""
    names = ", ".join(field_names(cls))
    text = f"A file of configs/. After it, --config.FIELD=VALUE replaces any of its fields: {names}."
    return config_flags.DEFINE_config_file("config", None, text)


def refuse_flags(names: Iterable[str], where: str) -> None:
    """Raise `ValueError` where flags were given that would be ignored: `where`, as in "without --tasks"."""
    if given := [f"--{name}" for name in names if flags.FLAGS[name].present]:
        raise ValueError(f"{' and '.join(given)} would be ignored {where}; leave it out.")


def define_dtype(default: Dtype, help_text: str) -> flags.FlagHolder[str]:
    """`--dtype`: what matrices are in while they are computed with."""
    return flags.DEFINE_enum("dtype", default, get_args(Dtype), help_text)


def define_trust_calibration() -> flags.FlagHolder[bool]:
    """`--trust_calibration`: whether an allocation may name any text."""
    return flags.DEFINE_bool(
        "trust_calibration",
        False,
        "Read the calibration text that the allocation names, whatever file or data set that is; without it only "
        "built-in texts and files in the folder of this command are read.",
    )


def _must_be(name: str, most: float) -> None:
    """Let a flag hold nothing but a number above 0, up to `most`: bounds of absl let pass what is no number."""
    flags.register_validator(
        name, lambda value: value is None or 0 < value <= most, f"must be a number above 0, up to {most:,.0f}."
    )


def define_tokenizer_from() -> flags.FlagHolder[str | None]:
    """`--tokenizer_from`: whose vocabulary takes the place of the model's own."""
    return flags.DEFINE_string(
        "tokenizer_from",
        None,
        "A GGUF of the same vocabulary, whose tokenizer is used and exported instead of the model's own.",
    )


def define_hosts() -> None:
    """`--hosts` and `--patience`: processes that work on one job."""
    flags.DEFINE_string(
        "hosts",
        None,
        "Run the same command in every process of a job, whose --output lies where all see it: auto under SLURM "
        "and on TPU pods, else ADDRESS:PORT,COUNT,INDEX of process 0, of all and of this one.",
    )
    flags.register_validator(
        "hosts",
        lambda text: text in (None, "auto") or re.fullmatch(r"[^,]+:\d+,\d+,\d+", text),
        "must be auto, or as in 10.0.0.1:8476,4,0.",
    )
    flags.DEFINE_float(
        "patience", hosts.PATIENCE, "Seconds without a sign of life, after which a process of --hosts is given up."
    )
    _must_be("patience", 1e6)


def define_mesh() -> None:
    """`--mesh`: how the devices of this machine share the work."""
    flags.DEFINE_string(
        "mesh",
        None,
        "Devices that windows and chunks of rows are dealt out to, by devices that the rows of a matrix are cut over, "
        "as in 4x2. Default: all of them by 1.",
    )
    flags.register_validator(
        "mesh", lambda text: text is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", text), "must be two numbers, as in 4x2."
    )


def define_encoder(*, recorded: bool = True) -> flags.FlagHolder[str | None]:
    """`--encoder`: how weights become codes; by default what the allocation records, or `DEFAULT_ENCODER`."""
    default = " Default: what the allocation records." if recorded else ""
    return flags.DEFINE_enum(
        "encoder",
        None if recorded else DEFAULT_ENCODER,
        get_args(EncoderName),
        "How weights are rounded: as ggml does without importance, by a wider search weighted by what calibration saw, "
        f"or with every column's error made up for in later ones.{default}",
    )


def define_budget() -> None:
    """`--budget_bytes`, `--budget_gb`, `--budget_bits` and `--fit_memory`, of which `budget` wants exactly one."""
    flags.DEFINE_integer("budget_bytes", None, "Largest size of the finished file in bytes.")
    flags.DEFINE_float("budget_gb", None, "Largest size of the finished file in units of 10^9 bytes.")
    flags.DEFINE_float("budget_bits", None, "Mean bits per allocated weight, scales included.")
    for name, most in (("budget_bytes", _MOST_BYTES), ("budget_gb", _MOST_BYTES / 1e9), ("budget_bits", 64)):
        _must_be(name, most)
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

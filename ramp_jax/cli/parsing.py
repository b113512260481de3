"""Flags from a command line, the help that lists them all, and failures in one sentence."""

import difflib
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import flags

from ramp_jax import hosts

_HELP = {"-h", "-help", "--help", "-?"}
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def parse(module: ModuleType, argv: Sequence[str]) -> list[str]:
    """What is left of a command line without its flags; ends the process where it asks for help or is wrong."""
    if _HELP & set(argv):
        try:
            print(_help(module), flush=True)
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # of any class where a config is wrong
        fail(_wrong_field(argv) or f"{error} (--help lists the flags)")


def _help(script: ModuleType) -> str:
    """What the script's docstring teaches, and all flags of the script and of this project's modules."""
    members = flags.FLAGS.flags_by_module_dict()
    own = sys.argv[0] if script.__name__ == "__main__" else script.__name__
    ours = [module for module in members if module != own and module.split(".")[0] in ("ramp_jax", "benchmarks")]
    shown = [_described(flag) for module in (own, *ours) for flag in members.get(module, [])]
    return "\n".join([(script.__doc__ or "").strip(), "", "Flags:", "", *shown])


def _described(flag: flags.Flag) -> str:
    """A flag with what it takes, what it is for and what it is if left out."""
    choices = "|".join(getattr(flag.parser, "enum_values", ()))
    takes = {"int": "=N", "float": "=X", "bool": ""}.get(flag.flag_type(), f"={choices or '...'}")
    text = flag.help.removeprefix(f"<{choices}>: ").partition(";\n")[0]  # absl's own words on repeating it follow
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


def fail(cause: object) -> NoReturn:
    """Print one line and end with exit code 1."""
    print("error:", " ".join(str(cause).split()), file=sys.stderr)
    hosts.leave(1)

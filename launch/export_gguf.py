"""Write a GGUF that fits a size; stock llama.cpp runs it.

    python launch/export_gguf.py --model=REF --source_policy=pretrained --budget_gb=3.7 --output=model.gguf
    python launch/export_gguf.py --model=REF --allocation=alloc.json --output=model.gguf

The first does the whole way: it calibrates, folds, estimates what every format loses, chooses, rounds and writes, then
scores the file on held-out text beside the largest of llama.cpp's own mixes that fits the same budget (--guard). What
was chosen goes to the output's name with .json. One of --budget_bytes, --budget_gb, --budget_bits and --fit_memory says
how large the file may be; `launch/allocate.py --help` explains --source_policy. The second writes what
launch/allocate.py chose.

--shard_size divides the file into parts as llama-gguf-split does, of which programs are given the first. --recipe
writes a folder with which stock llama-quantize makes a file of the same types and size: the folded model in floats, a
type per tensor, an importance matrix, the command, and plan.json, which says what all of it was made from.

Weights are rounded by --encoder, or as the allocation records. What calibration saw is found again on the windows that
the allocation records; --imatrix takes an importance matrix of llama.cpp (GGUF or .dat) instead. An allocation that
someone else made may name any file or data set as its text: one outside of the folder of this command is read only with
--trust_calibration. A command that was stopped goes on when it is run again.
"""

import json
from pathlib import Path
from typing import get_args

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import read_saved
from ramp_jax.config import WindowsConfig
from ramp_jax.files import write_bytes
from ramp_jax.halo import guard
from ramp_jax.halo.recipe import check_folder
from ramp_jax.models import load_model
from ramp_jax.quantization import DEFAULT_ENCODER

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_ALLOCATION = flags.DEFINE_string("allocation", None, "What launch/allocate.py wrote, in place of --source_policy.")
_OUTPUT = flags.DEFINE_string("output", None, "The GGUF to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what exists under the names of the outputs.")
cli.define_choice()
_ENCODER = cli.define_encoder()
_IMATRIX = flags.DEFINE_string("imatrix", None, "Importance matrix of the model, as llama-imatrix writes it.")
_TRUST = cli.define_trust_calibration()
_SHARD_SIZE = flags.DEFINE_string("shard_size", None, "Write parts of at most this size where the file is larger.")
flags.register_validator(
    "shard_size",
    lambda text: text is None or cli.parse_bytes(text),
    "must be a size, as in 2GB (10^9 bytes) or 2GiB (2^30).",
)
_RECIPE = flags.DEFINE_string("recipe", None, "Also write the recipe for llama-quantize to this new folder.")
_VERIFY = flags.DEFINE_integer(
    "verify_windows",
    None,
    "Score the file on so many held-out windows of --data, 512 tokens each; default: 8, none with --allocation.",
    lower_bound=0,
)
_GUARD = flags.DEFINE_enum(
    "guard",
    "check",
    get_args(guard.Guard),
    "Score llama.cpp's largest mix that fits beside the file, with an importance matrix of the same text; replace puts "
    "it in the file's place where it loses less by more than a standard error.",
)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers of the closing summary to this file.")
cli.define_mesh()
cli.define_hosts()
flags.mark_flags_as_required(["model", "output"])

_CONTEXT = 512  # tokens of a held-out window
_RUN_CONTEXT = 4096  # of the command that runs the file


def main() -> None:
    output, windows = Path(_OUTPUT.value).expanduser(), _verified_windows()
    shard_bytes = cli.parse_bytes(_SHARD_SIZE.value) if _SHARD_SIZE.value else None
    recipe = Path(_RECIPE.value).expanduser() if _RECIPE.value else None
    if shard_bytes and _GUARD.value == "replace":
        raise ValueError("--guard=replace puts one file in the place of one; leave it out with --shard_size.")
    if recipe:
        check_folder(recipe)
    if _ALLOCATION.value:
        cli.refuse_choice("with --allocation, which holds what was chosen")
        allocation = Path(_ALLOCATION.value)
        _check_outputs(str(allocation), workflow.calibrated_on(allocation))
        model = cli.load(_MODEL.value, tokenizer_from=_TOKENIZER.value)
    else:
        allocation = _chosen(output)
        model = load_model(_MODEL.value, tokenizer_from=_TOKENIZER.value)
    trusted = _TRUST.value or not _ALLOCATION.value
    first, *others = workflow.exported_files(model, allocation, output, shard_bytes)
    for part in [first, *others] if others else []:
        _check_new(part, str(allocation), workflow.calibrated_on(allocation))
    how = (_ENCODER.value, _IMATRIX.value, trusted)
    size = workflow.export(model, allocation, output, *how, shard_bytes=shard_bytes, recipe=recipe)
    print(f"{size:,} bytes: {first}{f' and {len(others)} more' if others else ''}")
    if others and (beyond := size - read_saved(allocation).get("budget_bytes", size)) > 0:
        print(f"{beyond:,} bytes beyond the budget are headers of the parts.")
    if recipe:
        print(f"Recipe for llama-quantize: {recipe}")
    if not windows:
        return
    context = min(_CONTEXT, model.spec.context_length)
    heldout = WindowsConfig(workflow.calibrated_on(allocation) or "builtin", context, windows)
    found = workflow.check_export(model, allocation, first, heldout, _GUARD.value, _IMATRIX.value, trusted)
    if _JSON.value:
        write_bytes(_JSON.value, (json.dumps(found, indent=1) + "\n").encode())
    print(guard.summary(found, first, min(_RUN_CONTEXT, model.spec.context_length)))


def _verified_windows() -> int:
    """How many windows score the file; raises `ValueError` for flags that would then be ignored."""
    alone = flags.FLAGS.hosts is None
    if not alone:
        cli.refuse_flags(["verify_windows"], "with --hosts, whose file launch/evaluate.py scores")
    asked = _VERIFY.value if _VERIFY.value is not None else 0 if _ALLOCATION.value else 8
    if not (asked and alone):
        cli.refuse_flags(["guard", "json"], "without --verify_windows")
    return asked if alone else 0


def _chosen(output: Path) -> Path:
    """The allocation file beside the output: chosen now, or what a command that was stopped has chosen."""
    if not flags.FLAGS.source_policy:
        raise ValueError("--source_policy says who chooses formats, --allocation names what was chosen; give one.")
    path, encoder = output.with_suffix(".json"), _ENCODER.value or DEFAULT_ENCODER
    _check_outputs(*cli.choice_files())
    cli.check_output_path(path, models=[_MODEL.value], files=[*cli.choice_files(), _JSON.value])
    allocator, windows, model, size, table = cli.choice(_MODEL.value, _TOKENIZER.value, encoder=encoder)
    if not path.exists() or _OVERWRITE.value:
        workflow.allocate(model, allocator, size, windows, path, _MODEL.value, encoder, table.overrides)
    elif workflow.is_made(path, allocator, model, size, windows, encoder, table.overrides):
        print(f"{path} already holds this allocation.")
    else:
        raise FileExistsError(f"{path} holds another allocation; choose another --output or pass --overwrite.")
    return path


def _check_outputs(*inputs: str | None) -> None:
    """Raise an error where an output is an input, cannot be written or exists."""
    for path in (_OUTPUT.value, _JSON.value):
        if path is not None:
            _check_new(path, *inputs)


def _check_new(path: str | Path, *inputs: str | None) -> None:
    files = [*inputs, _IMATRIX.value, _TOKENIZER.value]
    if cli.check_output_path(path, models=[_MODEL.value], files=files).exists() and not _OVERWRITE.value:
        raise FileExistsError(f"{path} exists; choose another name or pass --overwrite.")


if __name__ == "__main__":
    cli.run(main)

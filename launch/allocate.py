"""Choose a format for every weight matrix, with a trained policy or any other allocator.

    python launch/allocate.py --model=REF --source_policy=DIR --budget_bytes=92000000 --output=alloc.json

REF is a local Hugging Face directory, a hub id, a .gguf, or smollm2-135m. The policy may have been trained on other
models; `pretrained` is the one of this package. Needs one calibration pass over the model and one backward pass over a
few tokens, nothing else. One of --budget_bytes, --budget_gb, --budget_bits and --fit_memory says how large the file may
be, --levels among which formats is chosen. Other names do without a policy: `fisher` is the optimum of what that
backward pass says of every format, alone and in pairs; `greedy`, `uniform` and `random` are rules; `evolution` searches
by --refine_evals true evaluations alone; `llama.cpp` takes the largest of its own mixes that fits; an .npz that
launch/train.py measured on this model gives its table's knapsack, at its levels. `--refine_evals=N` spends N
evaluations of quantized models on calibration text, each of them proposed by a table that the ones before corrected;
the weights then lie in memory once per level. The allocation records --encoder for whoever evaluates or exports it.
`--from_gguf=FILE` takes the types of another GGUF of this model, whoever made it, in place of --source_policy and a
budget: to score or round them, or to go on from there in as many bytes with --refine_evals. The model is then not
folded, unless by --fold.

--keep, --floor and --ceiling decide about single tensors before, whoever chooses the rest. `--dry_run` prints which
sizes can be reached and, for a budget, a file of that size, what llama.cpp will need to run it at some contexts
(--fit_context, --parallel, --kv_type, --flash_attention, --device), and time and memory of the work; it writes nothing
but what --json names: the same for programs.
"""

import contextlib
import sys
from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import Allocation
from ramp_jax.allocators.allocator import FOLD_LEVEL
from ramp_jax.cli.budget import BUDGET_FLAGS
from ramp_jax.cli.overrides import OVERRIDE_FLAGS
from ramp_jax.config import WindowsConfig
from ramp_jax.data import is_inside
from ramp_jax.files import write_bytes
from ramp_jax.formats import LEVELS, levels_of
from ramp_jax.halo.plan import described, make_plan, plan_json
from ramp_jax.models.gguf_source import parts_beside
from ramp_jax.models.references import resolve

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_OUTPUT = flags.DEFINE_string("output", None, "Where the allocation goes (.json).")
cli.define_choice()
_ENCODER = cli.define_encoder(recorded=False)
_FROM_GGUF = flags.DEFINE_string("from_gguf", None, "A GGUF of this model whose types are taken.")
_FOLD = flags.DEFINE_bool("fold", False, "With --from_gguf, fold the model.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print what would be made and what that needs.")
_JSON = flags.DEFINE_string("json", None, "With --dry_run, also write the plan to this file; - prints nothing else.")
cli.define_mesh()
cli.define_hosts()
flags.mark_flags_as_required(["model"])


def main() -> None:
    if _FROM_GGUF.value:
        return _from_gguf()
    cli.refuse_flags(["fold"], "without --from_gguf")
    if not flags.FLAGS.source_policy:
        raise ValueError("--source_policy says who chooses formats, --from_gguf names a file that has them; give one.")
    if _DRY_RUN.value:
        _dry_run()
    else:
        cli.refuse_flags(["json"], "without --dry_run")
        _allocate()


def _dry_run() -> None:
    printed = _JSON.value == "-"
    if _JSON.value and not printed:
        cli.check_output_path(_JSON.value, models=[_MODEL.value], files=(*cli.choice_files(), _TOKENIZER.value))
    with contextlib.redirect_stdout(sys.stderr) if printed else contextlib.nullcontext():
        asked = cli.choice(_MODEL.value, _TOKENIZER.value, required=False, encoder=_ENCODER.value)
        plan = make_plan(
            asked.model,
            _MODEL.value,
            asked.allocator,
            asked.table,
            asked.size,
            cli.runtime(asked.model.spec),
            asked.windows.context * asked.windows.count,
        )
        print(described(plan))
    if printed:
        print(plan_json(plan), end="")
    elif _JSON.value:
        write_bytes(_JSON.value, plan_json(plan).encode())


def _allocate() -> None:
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the file that receives the allocation.")
    files = (*cli.choice_files(), _TOKENIZER.value)
    cli.check_output_path(_OUTPUT.value, models=[_MODEL.value], files=files)
    chosen = cli.choice(_MODEL.value, _TOKENIZER.value, encoder=_ENCODER.value)
    allocation = workflow.allocate(
        chosen.model,
        chosen.allocator,
        chosen.size,
        chosen.windows,
        Path(_OUTPUT.value),
        _MODEL.value,
        _ENCODER.value,
        chosen.table.overrides,
    )
    _say(allocation, chosen.size, chosen.windows)


def _from_gguf() -> None:
    values = flags.FLAGS
    ignored = ["source_policy", "dry_run", "json", *BUDGET_FLAGS, *OVERRIDE_FLAGS]
    cli.refuse_flags(ignored, "with --from_gguf, whose types and size are taken")
    if not _OUTPUT.value:
        raise ValueError("--output is missing; name the file that receives the allocation.")
    if not values.refine_evals:
        cli.refuse_flags(["levels"], "with --from_gguf, without --refine_evals")
    path = resolve(_FROM_GGUF.value)
    inputs = (values.data, _TOKENIZER.value, *map(str, parts_beside(path)))
    output = cli.check_output_path(_OUTPUT.value, models=[_MODEL.value], files=inputs)
    model = cli.load(_MODEL.value, values.dtype, _TOKENIZER.value)
    windows = WindowsConfig(values.data, values.context, values.count)
    levels = levels_of(values.levels) if values.levels else LEVELS
    how = {"evaluations": values.refine_evals, "fold_level": FOLD_LEVEL if _FOLD.value else None}
    allocation = workflow.allocate_as(model, path, levels, windows, output, _MODEL.value, _ENCODER.value, **how)
    _say(allocation, allocation.made["budget_bytes"], windows)


def _say(allocation: Allocation, size: int, windows: WindowsConfig) -> None:
    print(
        f"{allocation.file_bytes:,} of {size:,} bytes ({size - allocation.file_bytes:,} unused), "
        f"{allocation.linear_bpw:.3f} bits per weight: {_OUTPUT.value}"
    )
    if not is_inside(windows.data):
        print(f"Calibrated on {windows.data}; whoever reads it again for this allocation passes --trust_calibration.")


if __name__ == "__main__":
    cli.run(main)

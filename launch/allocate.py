"""Choose a format for every weight matrix, with a trained policy or any other allocator.

    python launch/allocate.py --model=REF --source_policy=DIR --budget_bytes=92000000 --output=alloc.json

REF is a local Hugging Face directory, a hub id, a .gguf, or smollm2-135m. The policy may have been trained on other
models; `pretrained` is the one of this package. Needs one calibration pass over the model and one backward pass over a
few tokens, nothing else. One of --budget_bytes, --budget_gb, --budget_bits and --fit_memory says how large the file may
be. Other names do without a policy, over --levels: `fisher` is the optimum of what that backward
pass says of every format, alone and in pairs; `greedy`, `uniform` and `random` are rules; `evolution` searches by
--refine_evals true evaluations alone; `llama.cpp` takes the largest of its own mixes that fits; an .npz that
launch/train.py measured on this model gives its table's knapsack. `--refine_evals=N` spends N evaluations of quantized
models on calibration text, each of them proposed by a table that the ones before corrected; the weights then lie in
memory once per level. The allocation records --encoder for whoever evaluates or exports it.

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
from ramp_jax.data import is_inside
from ramp_jax.files import write_bytes
from ramp_jax.halo.plan import described, make_plan, plan_json

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_OUTPUT = flags.DEFINE_string("output", None, "Where the allocation goes (.json).")
cli.define_choice()
_ENCODER = cli.define_encoder(recorded=False)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print what would be made and what that needs.")
_JSON = flags.DEFINE_string("json", None, "With --dry_run, also write the plan to this file; - prints nothing else.")
cli.define_mesh()
cli.define_hosts()
flags.mark_flags_as_required(["model", "source_policy"])


def main() -> None:
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
        asked = cli.choice(_MODEL.value, _TOKENIZER.value, required=False)
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
    chosen = cli.choice(_MODEL.value, _TOKENIZER.value)
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
    print(
        f"{allocation.file_bytes:,} of {chosen.size:,} bytes ({chosen.size - allocation.file_bytes:,} unused), "
        f"{allocation.linear_bpw:.3f} bits per weight: {_OUTPUT.value}"
    )
    if not is_inside(chosen.windows.data):
        print(
            f"Calibrated on {chosen.windows.data}; whoever reads it again for this allocation passes "
            f"--trust_calibration."
        )


if __name__ == "__main__":
    cli.run(main)

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
memory once per level. The allocation records --encoder for whoever evaluates or exports it. `--dry_run` prints what
sizes can be reached and, with --fit_memory, what fits.
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import costs
from ramp_jax.config import WindowsConfig
from ramp_jax.data import is_inside
from ramp_jax.formats import LEVELS
from ramp_jax.policy.inference import POLICY_FILE, find_allocator

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_POLICY = flags.DEFINE_string("source_policy", None, "Workdir of a training run, or a name of those above.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the allocation goes (.json).")
_LEVELS = flags.DEFINE_list("levels", None, "Levels to choose among; a policy's and a table's must be these.")
flags.register_validator(
    "levels",
    lambda levels: levels is None or (bool(levels) and all(level in map(str, LEVELS) for level in levels)),
    f"must be some of {','.join(f'{level:g}' for level in LEVELS)}.",
)
_DATA = flags.DEFINE_string("data", "builtin", "Calibration text: builtin, a text file, or hf:NAME:CONFIG:SPLIT.")
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a calibration window.", lower_bound=2)
_COUNT = flags.DEFINE_integer("count", 8, "Calibration windows.", lower_bound=1)
_DTYPE = cli.define_dtype(
    "auto", "Data type of the matrices while calibrating: auto is the fastest here, stored the checkpoint's."
)
_ENCODER = cli.define_encoder(recorded=False)
_REFINE_EVALS = flags.DEFINE_integer("refine_evals", 0, "True evaluations that refine the allocation.", lower_bound=0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the sizes that can be reached, and what fits.")
cli.define_mesh()
cli.define_hosts()
cli.define_budget()
flags.mark_flags_as_required(["model", "source_policy"])


def main() -> None:
    levels = tuple(map(float, _LEVELS.value)) if _LEVELS.value else None
    allocator = find_allocator(_POLICY.value, levels=levels, evaluations=_REFINE_EVALS.value)
    cli.check_budget_flags(required=not _DRY_RUN.value)
    if not _DRY_RUN.value and not _OUTPUT.value:
        raise ValueError("--output is missing; name the file that receives the allocation.")
    if _OUTPUT.value:
        policy = Path(_POLICY.value)
        files = (_DATA.value, str(policy / POLICY_FILE if policy.is_dir() else policy), _TOKENIZER.value)
        cli.check_output_path(_OUTPUT.value, models=[_MODEL.value], files=files)
    model = cli.load(_MODEL.value, _DTYPE.value, _TOKENIZER.value)
    workflow.check_context(_CONTEXT.value, model.spec.context_length)
    table = costs(model, allocator.levels)
    print(f"Reachable files of {_MODEL.value}: {table.smallest:,} to {table.largest:,} bytes")
    size = cli.budget(model, table)
    if size is not None:
        print(f"Budget: {size:,} bytes")
    if size is None or _DRY_RUN.value:
        return
    windows = WindowsConfig(_DATA.value, _CONTEXT.value, _COUNT.value)
    output = Path(_OUTPUT.value)
    allocation = workflow.allocate(model, allocator, size, windows, output, _MODEL.value, _ENCODER.value)
    print(
        f"{allocation.file_bytes:,} of {size:,} bytes ({size - allocation.file_bytes:,} unused), "
        f"{allocation.linear_bpw:.3f} bits per weight: {_OUTPUT.value}"
    )
    if allocation.fallback:
        print(allocation.fallback)
    if not is_inside(_DATA.value):
        print(f"Calibrated on {_DATA.value}; whoever reads it again for this allocation passes --trust_calibration.")


if __name__ == "__main__":
    cli.run(main)

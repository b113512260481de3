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
from ramp_jax.data import is_inside

_MODEL = flags.DEFINE_string("model", None, "The model: directory, hub id, .gguf, or a name that works offline.")
_TOKENIZER = cli.define_tokenizer_from()
_OUTPUT = flags.DEFINE_string("output", None, "Where the allocation goes (.json).")
cli.define_choice()
_ENCODER = cli.define_encoder(recorded=False)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only print the sizes that can be reached, and what fits.")
cli.define_mesh()
cli.define_hosts()
flags.mark_flags_as_required(["model", "source_policy"])


def main() -> None:
    if not _DRY_RUN.value and not _OUTPUT.value:
        raise ValueError("--output is missing; name the file that receives the allocation.")
    if _OUTPUT.value:
        files = (*cli.choice_files(), _TOKENIZER.value)
        cli.check_output_path(_OUTPUT.value, models=[_MODEL.value], files=files)
    chosen = cli.choice(_MODEL.value, _TOKENIZER.value, required=not _DRY_RUN.value)
    if chosen.size is None or _DRY_RUN.value:
        return
    allocation = workflow.allocate(
        chosen.model,
        chosen.allocator,
        chosen.size,
        chosen.windows,
        Path(_OUTPUT.value),
        _MODEL.value,
        _ENCODER.value,
    )
    print(
        f"{allocation.file_bytes:,} of {chosen.size:,} bytes ({chosen.size - allocation.file_bytes:,} unused), "
        f"{allocation.linear_bpw:.3f} bits per weight: {_OUTPUT.value}"
    )
    if allocation.fallback:
        print(allocation.fallback)
    if not is_inside(chosen.windows.data):
        print(
            f"Calibrated on {chosen.windows.data}; whoever reads it again for this allocation passes "
            f"--trust_calibration."
        )


if __name__ == "__main__":
    cli.run(main)

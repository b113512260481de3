"""The closing table of a run: reference, uniform, llama.cpp's own mix, knapsack and the policy, on held-out text.

    python launch/compare.py --workdir=runs/smollm2-135m --allocation=alloc.json --gguf=model.gguf

Exports and scores every row, in JAX and in llama.cpp where llama-cpp-python is installed. The rows also go to
`comparison.json` in the workdir, from which launch/report.py makes the page.
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import read_saved
from ramp_jax.config import RunConfig, WindowsConfig, read_config
from ramp_jax.files import alone_in
from ramp_jax.halo.compare import COMPARISON, compare
from ramp_jax.halo.report import text_table

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the training run.")
_ALLOCATION = flags.DEFINE_string("allocation", None, "What launch/allocate.py wrote for the same model.")
_GGUF = flags.DEFINE_string("gguf", None, "What launch/export_gguf.py wrote for that allocation.")
_TOKENIZER = cli.define_tokenizer_from()
_ENCODER = cli.define_encoder()
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a held-out window; the second half counts.", lower_bound=4)
_COUNT = flags.DEFINE_integer("count", 8, "Held-out windows.", lower_bound=1)
_TRUST = cli.define_trust_calibration()
_WRITTEN = (COMPARISON, "reference-", "uniform-", "llama.cpp-", "knapsack-")
flags.mark_flags_as_required(["workdir", "allocation", "gguf"])


def main() -> None:
    workdir = Path(_WORKDIR.value)
    config_path = workdir / workflow.CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(f"{workdir} is not the workdir of a training run; train with launch/train.py first.")
    config = read_config(config_path)
    ref = _model(config, _ALLOCATION.value)
    for output in (workdir / COMPARISON, *workdir.glob("*-*.gguf")):
        if output.name.startswith(_WRITTEN):
            cli.check_output_path(output, models=[ref], files=[_ALLOCATION.value, _GGUF.value, _TOKENIZER.value])
    model = cli.load(ref, tokenizer_from=_TOKENIZER.value or config.tokenizer_from)
    heldout = WindowsConfig(config.calibration.data, _CONTEXT.value, _COUNT.value)
    with alone_in(workdir):
        rows = compare(
            model,
            Path(_ALLOCATION.value),
            Path(_GGUF.value),
            workdir,
            workflow.table_path(workdir, ref),
            workflow.tokens(model, heldout, "heldout"),
            _ENCODER.value,
            trust_calibration=_TRUST.value or workflow.calibrated_on(_ALLOCATION.value) == config.calibration.data,
        )
    print(text_table([vars(row) for row in rows]))


def _model(config: RunConfig, allocation: str) -> str:
    """The model of the run that an allocation was made for: what else it may name is not loaded."""
    named = str(read_saved(allocation).get("model"))
    for ref in config.models:
        if Path(ref).name == Path(named).name:
            return ref
    raise ValueError(
        f"{allocation} was made for {named}, and the run learned on {', '.join(config.models)}; compare an allocation "
        f"for one of these."
    )


if __name__ == "__main__":
    cli.run(main)

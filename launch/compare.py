"""The closing table: reference, uniform, llama.cpp's own mix, knapsack and an allocation, on held-out text.

    python launch/compare.py --workdir=runs/smollm2-135m --allocation=alloc.json --gguf=model.gguf
        [--budgets=88000000,102000000] [--source_policy=fisher] [--model=REF]

Exports and scores every row, in JAX and in llama.cpp where llama-cpp-python is installed. With --budgets every method
is also compared at other sizes, for which the allocation's maker chooses anew, among the levels that it was offered for
this one: the points of a curve. The rows go to `comparison.json` in the workdir, from which launch/report.py makes the
page. The workdir is that of a training run, whose table gives the row of the knapsack, or any other folder for an
allocation that needed no training.
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import read_saved
from ramp_jax.allocators.allocator import RULES
from ramp_jax.config import RunConfig, WindowsConfig, read_config
from ramp_jax.files import alone_in
from ramp_jax.halo.compare import COMPARISON, compare
from ramp_jax.halo.report import text_table

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the training run, or another folder for what is made here.")
_ALLOCATION = flags.DEFINE_string("allocation", None, "What launch/allocate.py wrote for the same model.")
_GGUF = flags.DEFINE_string("gguf", None, "What launch/export_gguf.py wrote for that allocation.")
_MODEL = flags.DEFINE_string("model", None, "The model of the allocation, where the workdir is of no training run.")
_BUDGETS = flags.DEFINE_list("budgets", [], "More sizes in bytes at which to compare.")
flags.register_validator(
    "budgets", lambda sizes: all(size.isdecimal() and int(size) > 0 for size in sizes), "must be numbers of bytes."
)
_SOURCE = flags.DEFINE_string(
    "source_policy",
    None,
    "Who made the allocation and chooses at --budgets; default: a rule if it names one, else the run.",
)
_DATA = flags.DEFINE_string("data", None, "Text whose last fifth is scored; default: that of the run, or builtin.")
_TOKENIZER = cli.define_tokenizer_from()
_ENCODER = cli.define_encoder()
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of a held-out window; the second half counts.", lower_bound=4)
_COUNT = flags.DEFINE_integer("count", 8, "Held-out windows.", lower_bound=1)
_TRUST = cli.define_trust_calibration()
_WRITTEN = (COMPARISON, "reference-", "uniform-", "llama.cpp-", "knapsack-", "chosen-")
flags.mark_flags_as_required(["workdir", "allocation", "gguf"])


def main() -> None:
    workdir, allocation = Path(_WORKDIR.value), Path(_ALLOCATION.value)
    config = read_config(workdir / workflow.CONFIG) if (workdir / workflow.CONFIG).is_file() else None
    if config is None and not _MODEL.value:
        raise ValueError(f"{workdir} is not the workdir of a training run; say with --model what was allocated for.")
    if not _BUDGETS.value:
        cli.refuse_flags(["source_policy"], "without --budgets")
    ref = _MODEL.value or _model(config, _ALLOCATION.value)
    workdir.mkdir(parents=True, exist_ok=True)
    for output in (workdir / COMPARISON, *workdir.glob("*-*.gguf")):
        if output.name.startswith(_WRITTEN):
            cli.check_output_path(output, models=[ref], files=[_ALLOCATION.value, _GGUF.value, _TOKENIZER.value])
    model = cli.load(ref, tokenizer_from=_TOKENIZER.value or (config and config.tokenizer_from))
    data = _DATA.value or (config.calibration.data if config else "builtin")
    table = workflow.table_path(workdir, ref)
    saved = read_saved(allocation)
    source = _SOURCE.value or (saved.get("allocator") if saved.get("allocator") in RULES else workdir)
    with alone_in(workdir):
        rows = compare(
            model,
            allocation,
            Path(_GGUF.value),
            workdir,
            table if table.is_file() else None,
            workflow.tokens(model, WindowsConfig(data, _CONTEXT.value, _COUNT.value), "heldout"),
            _ENCODER.value,
            budgets=tuple(map(int, _BUDGETS.value)),
            choose=workflow.chooser(source, allocation, model) if _BUDGETS.value else None,
            trust_calibration=_TRUST.value or workflow.calibrated_on(allocation) == data,
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

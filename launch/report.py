"""One self-contained page of an allocation: report.html, with allocation.png and training.png beside it.

    python launch/report.py --allocation=alloc.json [--workdir=runs/smollm2-135m] [--gguf=model.gguf]

Shows what was asked and what came out, a map of formats with the price of every tensor, where the loss comes from, and
the commands that make the file again. What --workdir holds is shown as well: the comparison of launch/compare.py, how
the policy of launch/train.py learned, and its table of measured losses. No network is needed to read the page.
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.files import write_bytes
from ramp_jax.halo import report

_ALLOCATION = flags.DEFINE_string("allocation", None, "The allocation; default: allocation.json in the workdir.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run or of a comparison; default: no such folder.")
_GGUF = flags.DEFINE_string("gguf", None, "The exported file, named in the commands; default: the one compared.")
_OUTPUT = flags.DEFINE_string("output", None, "The page; default: report.html in the workdir, else by the allocation.")


def main() -> None:
    if not (_ALLOCATION.value or _WORKDIR.value):
        raise ValueError("--allocation is missing; name what launch/allocate.py wrote.")
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else None
    allocation = Path(_ALLOCATION.value or workdir / "allocation.json")
    output = Path(_OUTPUT.value or (workdir or allocation.parent) / report.REPORT)
    for path in (output, output.with_name(report.ALLOCATION_PNG), output.with_name(report.TRAINING_PNG)):
        cli.check_output_path(path, files=[str(allocation)])
    facts = workflow.facts(allocation, workdir, _GGUF.value)
    if facts.comparison:
        print(report.text_table([vars(row) for row in facts.comparison["rows"]]))
    pictures = {report.ALLOCATION_PNG: report.plot_allocation(facts.allocation)}
    if facts.metrics:
        pictures[report.TRAINING_PNG] = report.plot_training(facts.metrics)
    for name, figure in pictures.items():
        write_bytes(output.with_name(name), report.png(figure))
    print(f"Report: {report.write_report(output, facts)}")


if __name__ == "__main__":
    cli.run(main)

"""One self-contained page of a run, with its plots: report.html, allocation.png, training.png.

    python launch/report.py --workdir=runs/smollm2-135m [--allocation=alloc.json]

The run is one that launch/train.py made and launch/compare.py compared.
"""

from pathlib import Path

from absl import flags

from ramp_jax import cli, workflow
from ramp_jax.allocation import read_saved
from ramp_jax.files import read_rows
from ramp_jax.halo import report
from ramp_jax.halo.compare import COMPARISON, read_comparison

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the training run.")
_ALLOCATION = flags.DEFINE_string(
    "allocation", None, "The allocation to show; default: allocation.json in the workdir."
)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    workdir = Path(_WORKDIR.value)
    for name, maker in {workflow.METRICS: "launch/train.py", COMPARISON: "launch/compare.py"}.items():
        if not (workdir / name).is_file():
            raise FileNotFoundError(f"{workdir} holds no {name}; run {maker} first.")
    allocation = read_saved(_ALLOCATION.value or workdir / "allocation.json")
    known = read_comparison(workdir / COMPARISON)
    comparison = {**known, "rows": [vars(row) for row in known["rows"]]}
    print(report.text_table(comparison["rows"]))
    page = report.write_report(workdir, allocation, read_rows(workdir / workflow.METRICS), comparison)
    print(f"Report: {page}")


if __name__ == "__main__":
    cli.run(main)

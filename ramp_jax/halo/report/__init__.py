"""What a run looks like: plots of the allocation and of training, the closing table, and one self-contained page."""

from ramp_jax.halo.report.facts import Facts, read_metrics
from ramp_jax.halo.report.page import write_report
from ramp_jax.halo.report.plots import plot_allocation, plot_training, png, save_png
from ramp_jax.halo.report.table import table_cells, text_table

ALLOCATION_PNG, TRAINING_PNG, REPORT = "allocation.png", "training.png", "report.html"

__all__ = [
    "ALLOCATION_PNG",
    "REPORT",
    "TRAINING_PNG",
    "Facts",
    "plot_allocation",
    "plot_training",
    "png",
    "read_metrics",
    "save_png",
    "table_cells",
    "text_table",
    "write_report",
]

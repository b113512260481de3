"""What a run looks like: plots of the allocation and of training, the closing table, and one self-contained page."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ramp_jax.checkpoint import write_bytes
from ramp_jax.formats import get_format

ALLOCATION_PNG, TRAINING_PNG, REPORT = "allocation.png", "training.png", "report.html"

_HEADINGS = {
    "name": "",
    "file_bytes": "file bytes",
    "linear_bpw": "linear bpw",
    "file_bpw": "file bpw",
    "ppl": "PPL (JAX)",
    "ppl_llama_cpp": "PPL (llama.cpp)",
    "kld": "mean KL",
    "seconds": "seconds",
}
_SHOW = {
    "file_bytes": "{:,}".format,
    "linear_bpw": "{:.3f}".format,
    "file_bpw": "{:.3f}".format,
    "ppl": "{:.3f}".format,
    "ppl_llama_cpp": "{:.3f}".format,
    "kld": "{:.4f}".format,
    "seconds": "{:.1f}".format,
}


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings and rows of the closing table as text; columns without any value are left out."""
    columns = [name for name in _HEADINGS if any(row.get(name) is not None for row in rows)]
    body = [["–" if row[name] is None else _SHOW.get(name, str)(row[name]) for name in columns] for row in rows]
    return [[_HEADINGS[name] for name in columns], *body]


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The closing table for a terminal."""
    cells = table_cells(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def plot_allocation(allocation: Mapping[str, Any]) -> Figure:
    """Layers × modules, colored by nominal bits; the tensors outside the layers stand in the title.

    `allocation` is `Allocation.summary()`, or what `read_saved` reads.
    """
    formats = allocation["formats"]
    inside = {tuple(name.split(".", 2)[1:]): fmt for name, fmt in formats.items() if name.startswith("blk.")}
    modules = list(dict.fromkeys(name for _, name in inside))
    layers = list(dict.fromkeys(layer for layer, _ in inside))
    bits = np.full((len(layers), len(modules)), np.nan)  # where layers differ in kind, some lack some
    for (layer, name), fmt in inside.items():
        bits[layers.index(layer), modules.index(name)] = _bits(fmt)
    outside = {name: fmt for name, fmt in formats.items() if not name.startswith("blk.")}
    levels = sorted({_bits(fmt) for fmt in formats.values()})
    colors = matplotlib.colormaps["viridis"].resampled(max(len(levels), 2))
    figure = Figure(figsize=(max(6.0, 0.24 * len(bits) + 2), 3.4), layout="constrained")
    axes = figure.subplots()
    places = np.where(np.isnan(bits), np.nan, np.searchsorted(levels, bits))
    image = axes.imshow(places.T, aspect="auto", cmap=colors, vmin=-0.5, vmax=colors.N - 0.5)
    axes.set_yticks(range(len(modules)), [name.removesuffix(".weight") for name in modules])
    axes.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, ticks=range(len(levels)), label="bits")
    bar.ax.set_yticklabels([f"{level:g}" for level in levels])
    named = ", ".join(f"{name.removesuffix('.weight')} {fmt}" for name, fmt in outside.items())
    size = f"{allocation['file_bytes']:,} bytes, {allocation['linear_bpw']:.2f} bits per weight"
    axes.set_title(f"{size}; {named}", fontsize=9)
    return figure


def plot_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Greedy loss over uniform, terminal reward and entropy against iterations, one line per seed."""
    iterations = [row["iteration"] for row in rows]
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = {
        "loss_over_uniform": "predicted loss / uniform",
        "return": "terminal reward",
        "entropy": "policy entropy (nats)",
    }
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for seed, values in enumerate(zip(*(row[name] for row in rows), strict=True)):
            axes.plot(iterations, values, label=f"seed {seed}")
        axes.set_xlabel("iteration")
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    return content.getvalue()


def save_png(path: Path, figure: Figure) -> Path:
    """Write the figure, whole or not at all; returns the path."""
    write_bytes(path, png(figure))
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`; where a run was resumed, the last row of an iteration counts."""
    whole_lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in whole_lines if line.endswith("\n")]  # a killed run may end within a line
    return [*{row["iteration"]: row for row in rows}.values()]


def write_report(
    workdir: Path, allocation: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]
) -> Path:
    """Write both PNGs and `report.html`, which holds them, into `workdir`; returns the page's path."""
    pictures = {ALLOCATION_PNG: png(plot_allocation(allocation)), TRAINING_PNG: png(plot_training(metrics))}
    for name, content in pictures.items():
        write_bytes(workdir / name, content)
    page = _page(workdir.name, comparison, pictures)
    write_bytes(workdir / REPORT, page.encode())
    return workdir / REPORT


def _page(title: str, comparison: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    head, *body = table_cells(comparison["rows"])
    cells = [f"<tr>{''.join(f'<th>{html.escape(text)}</th>' for text in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in body]
    images = [
        f"<h2>{html.escape(name.removesuffix('.png').capitalize())}</h2>"
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in pictures.items()
    ]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ccc; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
<h1>{html.escape(title)}</h1>
<p>Budget {comparison["budget_bytes"]:,} bytes; {comparison["heldout_tokens"]:,} held-out tokens, of which the second
half of every window counts. KL divergence is in nats per token, against the unquantized model. Seconds are what
choosing and measuring took on this model; training the policy is not among them, since it serves any model.</p>
<table>{"".join(cells)}</table>
{"".join(images)}
</html>
"""


def _bits(fmt: str) -> float:
    return float(get_format(fmt).code_bits)

"""What a run looks like, as PNG files: the allocation, and how a policy learned."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ramp_jax.files import write_bytes
from ramp_jax.formats import get_format

PANELS = {
    "loss_over_uniform": "predicted loss / uniform",
    "return": "terminal reward",
    "entropy": "policy entropy (nats)",
}
"""What is shown of training: columns of its metrics, one value per seed, and their labels."""


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
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
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


def _bits(fmt: str) -> float:
    return float(get_format(fmt).code_bits)

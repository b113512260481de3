"""Sections that go tensor by tensor: formats with their prices, sensitivities, where the loss comes from."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np

from ramp_jax.formats import get_format
from ramp_jax.halo.report import svg
from ramp_jax.halo.report.facts import Cell, Facts, Price
from ramp_jax.halo.report.text import count, escaped, listed, nats, or_dash, power, section, signed

_NARROW, _ROUND = 40, 5  # layers from which on a wide map has no room for text, and then numbers each so many


def bit_map(facts: Facts) -> str:
    """Bits of layers × modules, with bytes and prices of every tensor."""
    bits = sorted({cell.bits for cell in facts.cells})
    colors = _palette("viridis", len(bits))

    def drawn(cell: Cell) -> tuple[str, str]:
        return f"{cell.bits:g}", colors[bits.index(cell.bits)]

    legend = "".join(
        f'<li><i style="background:{color}"></i>{level:g} bits: {escaped(", ".join(_formats_of(facts, level)))}</li>'
        for level, color in zip(bits, colors, strict=True)
    )
    rows = [
        [cell.name, cell.format, count(cell.bytes), *_price_cells(cell.next(-1)), *_price_cells(cell.next(1))]
        for cell in facts.cells
    ]
    heads = ["Tensor", "Format", "Bytes", "One less", "Bytes", "Nats", "One more", "Bytes", "Nats"]
    return section(
        "Bit map",
        f"""<p>Nominal bits of every weight matrix, layer by layer. Point at a cell or tap it for its bytes and for what
one format less or more would change in the file and in the predicted loss; the list below says it of all.</p>
<ul class="legend">{legend}</ul>
{_map(facts, drawn)}
{listed("All tensors, with prices", heads, rows)}""",
    )


def _formats_of(facts: Facts, bits: float) -> list[str]:
    return sorted({cell.format for cell in facts.cells if cell.bits == bits})


def sensitivities(facts: Facts) -> str:
    """What tensors would lose at one level, of layers × modules, and in all formats."""
    known = [cell for cell in facts.cells if len(cell.losses()) > 0]
    if not known:
        return section(
            "Sensitivities",
            "<p>Who chose saw no prediction of what tensors lose, and no table of this model was measured: "
            "<code>--source_policy=fisher</code> or a policy predicts, <code>launch/train.py</code> measures.</p>",
        )
    level = _common_level(known)
    at = {cell.name: loss for cell in known if (loss := _loss_at(cell, level)) is not None and loss > 0}
    logs = np.log10([at[cell.name] for cell in (facts.inside or known) if cell.name in at] or [1.0])
    low, high = float(logs.min()), float(logs.max())
    beyond = [at[cell.name] for cell in known if cell.name in at and cell.layer is None]
    ends = ["≤ " if min(beyond, default=1.0) < 10**low else "", "≥ " if max(beyond, default=0.0) > 10**high else ""]
    colors = _palette("YlOrRd", 64)

    def drawn(cell: Cell) -> tuple[str, str]:
        if cell.name not in at:
            return "", "transparent"
        share = np.clip((np.log10(at[cell.name]) - low) / max(high - low, 1e-9), 0, 1)
        return "", colors[round(share * (len(colors) - 1))]

    formats = sorted({fmt for cell in known for fmt in cell.losses()}, key=lambda fmt: (get_format(fmt).code_bits, fmt))
    rows = [[cell.name, *(or_dash(cell.losses().get(fmt), "{:.2e}") for fmt in formats)] for cell in known]
    how = "was measured on calibration text" if facts.measured else "is estimated from one backward pass"
    ramp = ", ".join(colors[:: max(1, len(colors) // 8)])
    return section(
        "Sensitivities",
        f"""<p>What every matrix would lose if it alone went to {level:g} bits, in nats per token. It {how}.</p>
<p class="ramp"><span>{ends[0]}{power(10**low)}</span><i style="background:linear-gradient(90deg,{ramp})"></i>
<span>{ends[1]}{power(10**high)}</span></p>
{_map(facts, drawn)}
{listed("All tensors in all formats, nats per token", ["Tensor", *formats], rows)}""",
    )


def _common_level(cells: Sequence[Cell]) -> float:
    """The lowest number of bits that most of the cells know the loss of."""
    counts: dict[float, int] = {}
    for cell in cells:
        for bits in {float(get_format(fmt).code_bits) for fmt in cell.losses()}:
            counts[bits] = counts.get(bits, 0) + 1
    most = max(counts.values())
    return min(bits for bits, count in counts.items() if count == most)


def _loss_at(cell: Cell, bits: float) -> float | None:
    return next((loss for fmt, loss in cell.losses().items() if get_format(fmt).code_bits == bits), None)


def origins(facts: Facts) -> str:
    """Shares of the loss by role and by depth; nothing where no loss is known."""
    total = sum(max(cell.loss or 0.0, 0.0) for cell in facts.cells)
    size = sum(cell.bytes or 0 for cell in facts.cells)
    if not total or not size:
        return ""
    bars, of_module = [], facts.totals(lambda cell: cell.module)
    longest = max(max(loss / total, held / size) for held, loss in of_module.values())
    for module, (held, loss) in sorted(of_module.items(), key=lambda item: -item[1][1]):
        bars.append(
            f"<tr><th>{escaped(module)}</th>"
            f"<td>{_bar(loss / total / longest, 'loss')}{_bar(held / size / longest, 'held')}</td>"
            f"<td>{loss / total:.1%}</td><td>{held / size:.1%}</td></tr>"
        )
    by_layer = facts.totals(lambda cell: cell.layer)
    stacks = [
        (
            str(layer),
            100 * by_layer[layer][1] / total,
            f"Layer {layer}: {by_layer[layer][1] / total:.1%} of the loss, "
            f"{by_layer[layer][0] / size:.1%} of the bytes",
        )
        for layer in facts.layers
    ]
    chart = ""
    if stacks:
        y = svg.linear_axis("share", [value for _, value, _ in stacks], lambda value: f"{value:g}%", zero=True)
        chart = f"<h3>By depth</h3><figure>{svg.columns('Share of the loss by layer', stacks, y, 'layer')}</figure>"
    met = ""
    if facts.predicted is not None:
        met = (
            f" Alone, tensors lose {nats(total)} nats in sum; together they are predicted to lose "
            f"{nats(facts.predicted)}, since errors meet."
        )
    return section(
        "Where the loss comes from",
        f"""<p>Shares of what every matrix loses in its own format, beside its share of the bytes.{escaped(met)}</p>
<h3>By role</h3>
<ul class="legend"><li><i class="loss"></i>loss</li><li><i class="held"></i>bytes</li></ul>
<table class="bars"><thead><tr><th></th><td></td><td>Loss</td><td>Bytes</td></tr></thead>
<tbody>{"".join(bars)}</tbody></table>
{chart}""",
    )


def _bar(share: float, kind: str) -> str:
    return f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>'


def _map(facts: Facts, drawn: Callable[[Cell], tuple[str, str]]) -> str:
    """Cells of layers × modules, and those outside below; `drawn` gives text and background of a cell."""
    at = {(cell.layer, cell.module): cell for cell in facts.inside}
    names = "".join(f'<span class="name">{escaped(module)}</span>' for module in facts.modules)
    lines = [f'<span class="corner">layer</span>{names}']
    for layer in facts.layers:
        cells = (at.get((layer, module)) for module in facts.modules)
        lines.append(
            f'<span class="layer{"" if layer % _ROUND else " round"}">{layer}</span>'
            + "".join(_drawn(cell, drawn) if cell else '<span class="none"></span>' for cell in cells)
        )
    many = " many" if len(facts.layers) > _NARROW else ""
    sizes = f"--modules:{len(facts.modules)};--layers:{len(facts.layers)}"
    outside = "".join(
        f'<span class="out"><span>{escaped(cell.module)}</span>{_drawn(cell, drawn)}</span>' for cell in facts.outside
    )
    grid = (
        f'<div class="scroll"><div class="map{many}" style="{sizes}">{"".join(lines)}</div></div>'
        if facts.layers
        else ""
    )
    return f'{grid}<p class="outside">{outside}</p>'


def _drawn(cell: Cell, drawn: Callable[[Cell], tuple[str, str]]) -> str:
    text, color = drawn(cell)
    ink = f";color:{_ink(color)}" if color.startswith("#") else ""
    return (
        f'<span class="cell" tabindex="-1" style="background:{color}{ink}"><b>{escaped(text)}</b>'
        f'<span class="tip"><strong>{escaped(cell.name)}</strong>{_tip(cell)}</span></span>'
    )


def _tip(cell: Cell) -> str:
    """What pointing at a cell shows."""
    size = "" if cell.bytes is None else f", {cell.bytes:,} bytes"
    lines = [f"{cell.format}{size}"]
    if cell.loss is not None:
        lines.append(f"loses {nats(cell.loss)} nats per token alone")
    for name, price in (("less", cell.next(-1)), ("more", cell.next(1))):
        if price is not None:
            loss = "" if price.kld is None else f", {'+' if price.kld >= 0 else ''}{nats(price.kld)} nats"
            lines.append(f"one {name}, {price.format}: {price.bytes:+,} bytes{loss}".replace(" -", " −"))
    return "".join(f"<span>{escaped(line)}</span>" for line in lines)


def _price_cells(price: Price | None) -> list[str]:
    if price is None:
        return ["–", "–", "–"]
    return [price.format, f"{price.bytes:+,}", "–" if price.kld is None else signed(price.kld)]


def _palette(name: str, count: int) -> list[str]:
    """`count` colors as #rrggbb, from low to high."""
    shares = np.linspace(0.12, 0.95, count) if count > 1 else [0.5]
    return [matplotlib.colors.to_hex(matplotlib.colormaps[name](share)) for share in shares]


def _ink(color: str) -> str:
    """Black or white, whichever reads better on a color (relative luminance of WCAG 2)."""
    rgb = np.asarray(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#000" if linear @ [0.2126, 0.7152, 0.0722] > 0.18 else "#fff"

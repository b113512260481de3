"""Sections of what was measured: quality against size, the table of rivals, how a policy learned."""

import math

from ramp_jax.halo.compare import Row
from ramp_jax.halo.report import svg
from ramp_jax.halo.report.facts import Facts
from ramp_jax.halo.report.plots import PANELS
from ramp_jax.halo.report.text import escaped, line, or_dash, section, with_error

_ORDER = ("uniform", "llama.cpp", "knapsack")
"""Methods whose colors are fixed; ours is color 0."""


def curve(facts: Facts) -> str:
    """Mean KL divergence against file size, a line per method; nothing where nothing was compared."""
    known = facts.comparison
    rows = [row for row in known["rows"] if row.budget_bytes is not None and row.kld > 0] if known else []
    if not rows:
        return ""
    methods = sorted({row.method for row in rows}, key=lambda method: (_kind(method), method))
    series = []
    for method in methods:
        points = {
            (row.file_bytes, row.kld): svg.Point(row.file_bytes / 1e6, row.kld, row.kld_stderr, _row_title(row))
            for row in rows
            if row.method == method
        }
        series.append(svg.Series(method, _kind(method), list(points.values())))
    reached = [
        end for row in rows for end in (row.kld - (row.kld_stderr or 0), row.kld + (row.kld_stderr or 0)) if end > 0
    ]
    x = svg.linear_axis("file size (MB)", [row.file_bytes / 1e6 for row in rows], "{:g}".format)
    y = svg.log_axis("mean KL", reached, "{:g}".format)
    legend = "".join(f"<li>{svg.mark(one.kind)} {escaped(one.name)}</li>" for one in series)
    budgets = len({row.budget_bytes for row in rows})
    more = "" if budgets > 1 else " More sizes: <code>launch/compare.py --budgets=BYTES,BYTES</code>."
    return section(
        "Quality and size",
        f"""<p>Mean KL divergence to the unquantized model in nats per token, lower is better, on
{known["heldout_tokens"]:,} held-out tokens, of which the second half of every window counts. Every point is a finished
file at one of {budgets} budget{"s" if budgets > 1 else ""}; bars are one standard error.{more}</p>
<figure><ul class="legend">{legend}</ul>{svg.lines("Mean KL divergence against file size", series, x, y)}</figure>""",
    )


def _kind(method: str) -> int:
    return _ORDER.index(method) + 1 if method in _ORDER else 0


def _row_title(row: Row) -> str:
    return f"{row.name}: {row.file_bytes:,} bytes, {with_error(row.kld, row.kld_stderr)} nats per token"


def table(facts: Facts) -> str:
    """All rows of the comparison, by budget."""
    known = facts.comparison
    if known is None:
        return ""
    smallest = min((row.kld for row in known["rows"] if row.budget_bytes is not None and row.kld > 0), default=1.0)
    digits = min(max(4, 1 - math.floor(math.log10(smallest))), 6)  # of which the smallest shows two
    heads = ["", "Mean KL", "Beyond ours", "File bytes", "Bits", "PPL", "PPL llama.cpp", "Seconds"]
    body = []
    for budget in dict.fromkeys(row.budget_bytes for row in known["rows"]):
        if budget is not None:
            mine = " (this file)" if budget == known["budget_bytes"] else ""
            body.append(
                f'<tr class="group"><th colspan="{len(heads)}"><span>Budget {budget:,} bytes{mine}</span></th></tr>'
            )
        body += [_row(row, digits) for row in known["rows"] if row.budget_bytes == budget]
    return (
        f'<div class="scroll"><table class="rivals"><thead>{line(heads, "th")}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">“Beyond ours” is how far a KL divergence is above that of this allocation’s maker at the same '
        "budget, token by token; its standard error is paired. Bits are those of quantized weights, scales included. "
        "Seconds are what choosing took on this model; training a policy is not among them, since it serves any "
        "model.</p>\n"
    )


def _row(row: Row, digits: int) -> str:
    cells = [
        row.name,
        _measured(row.kld, row.kld_stderr, f"z.{digits}f"),
        _measured(row.kld_beyond, row.kld_beyond_stderr, f"+z.{digits}f"),
        f"{row.file_bytes:,}",
        f"{row.linear_bpw:.3f}",
        f"{row.ppl:.3f}",
        or_dash(row.ppl_llama_cpp, "{:.3f}"),
        or_dash(row.seconds, "{:.1f}"),
    ]
    ours = row.budget_bytes is not None and row.kld_beyond is None
    return line(cells, "td", "ours" if ours else "")


def _measured(value: float | None, error: float | None, form: str) -> str:
    """A cell of the table."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.removeprefix('+')}}")


def training(facts: Facts) -> str:
    """How the policy learned; nothing where none did."""
    rows = facts.metrics
    if not rows:
        return ""
    charts = []
    for name, label in PANELS.items():
        series = [
            svg.Series(f"seed {seed}", seed, [svg.Point(row["iteration"], row[name][seed]) for row in rows])
            for seed in range(len(rows[0][name]))
        ]
        x = svg.linear_axis("iteration", [row["iteration"] for row in rows], "{:g}".format)
        y = svg.linear_axis(label, [value for row in rows for value in row[name]], "{:.3g}".format)
        chart = svg.lines(label, series, x, y, 220, marks=False)
        charts.append(f"<figure><figcaption>{escaped(label)}</figcaption>{chart}</figure>")
    legend = "".join(f'<li><i class="c{i}"></i>seed {i}</li>' for i in range(len(rows[0]["entropy"])))
    return section(
        "Training",
        f"""<p>What the policy learned, on the table of losses of its run: its predicted loss over that of uniform
allocations, the reward of whole episodes, and how undecided it is.</p>
<ul class="legend">{legend}</ul><div class="three">{"".join(charts)}</div>""",
    )

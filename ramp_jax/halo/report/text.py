"""Texts, numbers and tables of the page; everything that comes from a file goes through `escaped`."""

import html
from collections.abc import Iterable, Sequence

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def escaped(text: object) -> str:
    """Text as HTML has it, also inside quotes."""
    return html.escape(str(text))


def megabytes(size: int) -> str:
    """Bytes in the largest decimal unit below them."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def nats(value: float) -> str:
    """A loss, small ones as powers of ten."""
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else power(value)


def with_error(value: float, error: float | None) -> str:
    """Both with as many digits."""
    if error is None:
        return nats(value)
    return f"{value:.4f} ± {error:.4f}" if abs(value) >= 1e-3 else f"{power(value)} ± {power(error)}"


def power(value: float) -> str:
    """A small number as 1.2 × 10⁻⁵."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(int(power)).translate(_RAISED)}"


def signed(value: float) -> str:
    """A change of loss for a column."""
    return f"{value:+.1e}" if abs(value) < 1e-3 and value else f"{value:+.4f}"


def count(size: int | None) -> str:
    """A whole number, a dash for None."""
    return "–" if size is None else f"{size:,}"


def or_dash(value: float | None, form: str) -> str:
    """A number by a form such as `{:.3f}`, a dash for None."""
    return "–" if value is None else form.format(value)


def line(texts: Iterable[str], tag: str, kind: str = "") -> str:
    """A row of a table, of `td` or `th`."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<tr{attribute}>{''.join(f'<{tag}>{escaped(text)}</{tag}>' for text in texts)}</tr>"


def listed(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A long table that opens when it is asked for, and in print."""
    body = "".join(line(row, "td") for row in rows)
    inside = f'<table class="long"><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table>'
    return f'<details><summary>{escaped(title)}</summary><div class="scroll">{inside}</div></details>'


def section(title: str, inside: str) -> str:
    """A part of the page, whose inside is HTML."""
    return f"<section>\n<h2>{escaped(title)}</h2>\n{inside}\n</section>\n"

"""The closing table as text."""

from collections.abc import Mapping, Sequence
from typing import Any

_HEADINGS = {
    "name": "",
    "file_bytes": "file bytes",
    "linear_bpw": "linear bpw",
    "file_bpw": "file bpw",
    "ppl": "PPL (JAX)",
    "ppl_llama_cpp": "PPL (llama.cpp)",
    "kld": "mean KL",
    "kld_stderr": "±",
    "kld_beyond": "beyond ours",
    "kld_beyond_stderr": "± ",
    "seconds": "seconds",
}
_SHOW = {
    "file_bytes": "{:,}".format,
    "linear_bpw": "{:.3f}".format,
    "file_bpw": "{:.3f}".format,
    "ppl": "{:.3f}".format,
    "ppl_llama_cpp": "{:.3f}".format,
    "kld": "{:.4f}".format,
    "kld_stderr": "{:.4f}".format,
    "kld_beyond": "{:+.4f}".format,
    "kld_beyond_stderr": "{:.4f}".format,
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

"""The page: what was asked and what came out, as one HTML file that needs nothing beside it.

Every text that comes from a file is escaped. The page is complete without scripts: what hovering or tapping shows
stands in its tables as well.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from ramp_jax.allocation import offered_levels
from ramp_jax.allocators.allocator import has_own_levels
from ramp_jax.files import write_bytes
from ramp_jax.formats import get_format, written
from ramp_jax.halo.report.curves import curve, table, training
from ramp_jax.halo.report.facts import Cell, Facts
from ramp_jax.halo.report.maps import bit_map, origins, sensitivities
from ramp_jax.halo.report.text import escaped, line, megabytes, nats, section, with_error
from ramp_jax.overrides import Kind

_LINE = 78  # characters of a command


def write_report(path: Path, facts: Facts) -> Path:
    """Write the page, whole or not at all; returns its path."""
    write_bytes(path, page(facts).encode())
    return path


def page(facts: Facts) -> str:
    """The page as text."""
    sections = (_head, _asked, curve, table, bit_map, sensitivities, origins, training, _recipe, _commands)
    title, style = escaped(f"{Path(facts.model).name}, {megabytes(facts.allocation['file_bytes'])}"), _style()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(section(facts) for section in sections)}</main>
</body>
</html>
"""


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def _head(facts: Facts) -> str:
    known, ours, reference = facts.allocation, facts.ours, facts.reference
    unused = (
        f"{known['budget_bytes'] - known['file_bytes']:,} bytes below the budget" if "budget_bytes" in known else ""
    )
    tiles = [("File", megabytes(known["file_bytes"]), unused or f"{known['file_bytes']:,} bytes")]
    tiles.append(("Bits per weight", f"{known['linear_bpw']:.2f}", "of the quantized matrices, scales included"))
    if ours:
        error = "" if ours.kld_stderr is None else f"± {nats(ours.kld_stderr)} "
        tiles.append(("KL divergence", nats(ours.kld), f"{error}nats per token, on text it never saw"))
    elif facts.predicted is not None:
        tiles.append(("KL divergence", f"≈ {nats(facts.predicted)}", "nats per token, predicted; not measured"))
    if ours and reference:
        tiles.append(("Perplexity", f"{ours.ppl:.2f}", f"{reference.ppl:.2f} unquantized"))
    shown = "".join(
        f'<div class="tile"><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(note)}</small></dd></div>'
        for name, value, note in tiles
    )
    verdicts = "".join(f"<li>{escaped(sentence)}</li>" for sentence in _verdicts(facts))
    return f"""<header>
<p class="kicker">RAMP-JAX allocation report</p>
<h1>{escaped(Path(facts.model).name)} <span>in {escaped(megabytes(known["file_bytes"]))}</span></h1>
<p class="lead">{escaped(_lead(facts))}</p>
<dl class="tiles">{shown}</dl>
{f"<ul>{verdicts}</ul>" if verdicts else ""}
</header>
"""


def _lead(facts: Facts) -> str:
    budget = facts.allocation.get("budget_bytes")
    asked = "" if budget is None else f" for a file of at most {budget:,} bytes"
    who = facts.ours.method if facts.ours else facts.allocator
    return f"A format for each of {len(facts.cells)} weight matrices, chosen by {who}{asked}."


def _verdicts(facts: Facts) -> Iterable[str]:
    """One sentence per baseline of the same budget: who loses less, by how much, and whether that is certain."""
    for row in facts.rivals:
        if row.kld_beyond is None:
            continue
        error = row.kld_beyond_stderr
        certain = error is None or abs(row.kld_beyond) > error
        how = "loses" if certain else "loses, within one standard error,"
        side = "more" if row.kld_beyond > 0 else "less"
        by = with_error(abs(row.kld_beyond), error)
        yield f"{row.name} ({row.file_bytes:,} bytes) {how} {by} nats per token {side} than this allocation."


def _asked(facts: Facts) -> str:
    known, how = facts.allocation, facts.allocation.get("calibration")
    asked = [
        ("Model", facts.model),
        ("Budget", f"{known['budget_bytes']:,} bytes" if "budget_bytes" in known else None),
        ("Chosen by", facts.allocator),
        *(("Decided", f"--{one['kind']}={one['pattern']}={one['format']}") for one in known.get("overrides", ())),
        ("True evaluations", f"{known['refine_evals']:,}" if known.get("refine_evals") else None),
        ("Rounded by", f"--encoder={known['encoder']}" if "encoder" in known else None),
        ("Calibrated on", f"{how['count']} × {how['context']} tokens of {how['data']}" if how else None),
    ]
    came = [
        ("File", f"{known['file_bytes']:,} bytes"),
        ("Code bits", f"{known['code_bits']:.3f} per weight, without scales"),
        ("Linear bits", f"{known['linear_bpw']:.3f} per quantized weight, scales included"),
        ("File bits", f"{known['file_bpw']:.3f} per parameter, of all that the file holds"),
        ("Predicted loss", f"{nats(facts.predicted)} nats per token" if facts.predicted is not None else None),
        ("Measured loss", f"{nats(facts.ours.kld)} nats per token" if facts.ours else None),
        ("Folded", f"{len(known['folding'])} activations" if known["folding"] else "nothing"),
        ("Choosing took", f"{known['seconds']:,.0f} seconds" if "seconds" in known else None),
    ]
    fallback = f'<p class="note">{escaped(known["fallback"])}</p>' if known.get("fallback") else ""
    return section(
        "What was asked, what came out",
        f'<div class="two">{_facts("Asked", asked)}{_facts("Came out", came)}</div>{fallback}',
    )


def _facts(title: str, pairs: Sequence[tuple[str, str | None]]) -> str:
    lines = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in pairs if value is not None)
    return f'<div><h3>{escaped(title)}</h3><dl class="facts">{lines}</dl></div>'


def _recipe(facts: Facts) -> str:
    size = sum(cell.bytes or 0 for cell in facts.cells)
    of: dict[str, list[Cell]] = {}
    for cell in facts.cells:
        of.setdefault(cell.format, []).append(cell)
    rows = []
    for fmt, cells in sorted(of.items(), key=lambda item: (get_format(item[0]).bits_per_weight, item[0])):
        held = sum(cell.bytes or 0 for cell in cells)
        shown = [f"{held:,}", f"{held / size:.1%}"] if size else []
        rows.append([fmt, f"{get_format(fmt).bits_per_weight:g}", f"{len(cells)}", *shown])
    heads = ["Format", "Bits", "Tensors", *(["Bytes", "Share"] if size else [])]
    body = "".join(line(row, "td") for row in rows)
    how = facts.allocation.get("calibration")
    text = f" Fingerprint of the calibration text: <code>{escaped(how['text'])}</code>." if how else ""
    digest = facts.allocation.get("sha256")
    return section(
        "Recipe",
        f"""<div class="scroll"><table><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table></div>
<p class="note">The whole recipe is <code>{escaped(facts.path.name)}</code>: formats, folding, calibration.
{f"Its SHA-256: <code>{escaped(digest)}</code>." if digest else ""}{text}</p>""",
    )


def _commands(facts: Facts) -> str:
    known, how = facts.allocation, facts.allocation.get("calibration")
    allocate = {
        "model": facts.model,
        "source_policy": facts.source,
        "levels": None if has_own_levels(facts.source) else ",".join(map(written, offered_levels(known))) or None,
        "budget_bytes": known.get("budget_bytes"),
        **({"data": how["data"], "context": how["context"], "count": how["count"]} if how else {}),
        **{
            kind: [f"{one['pattern']}={one['format']}" for one in known.get("overrides", ()) if one["kind"] == kind]
            for kind in get_args(Kind)
        },
        "encoder": known.get("encoder"),
        "refine_evals": known.get("refine_evals") or None,
        "output": facts.path,
    }
    export = {"model": facts.model, "allocation": facts.path, "output": facts.gguf}
    blocks = {
        "Choose again": _command("ramp-allocate", allocate),
        "Write the file again": _command("ramp-export", export),
        "Run it": f"llama-cli -m {shlex.quote(facts.gguf)}",
        "Check it": _command("ramp-evaluate", {"model": facts.gguf, "reference": facts.model}),
        "Check it in llama.cpp": _command(
            "ramp-evaluate", {"model": facts.gguf, "reference": facts.model, "backend": "llama.cpp"}
        ),
    }
    shown = "".join(f"<h3>{escaped(name)}</h3><pre><code>{escaped(text)}</code></pre>" for name, text in blocks.items())
    return section("Commands", shown)


def _command(script: str, flags: Mapping[str, object]) -> str:
    lines = [script]
    for name, value in flags.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            flag = shlex.quote(f"--{name}={one}")
            lines[-1:] = [f"{lines[-1]} {flag}"] if len(lines[-1] + flag) < _LINE else [f"{lines[-1]} \\", f"  {flag}"]
    return "\n".join(lines)

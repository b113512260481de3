"""The page of an allocation: what it says, and how it looks in a browser, on a phone, in the dark and in print."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import browser
import matplotlib.image
import numpy as np
import pytest

from ramp_jax import workflow
from ramp_jax.allocation import Allocation, costs, from_levels, read_saved
from ramp_jax.halo import report
from ramp_jax.halo.compare import COMPARISON, Row
from ramp_jax.halo.report import svg
from ramp_jax.halo.report.page import page
from ramp_jax.models import allocatable
from ramp_jax.sensitivity.table import Sensitivity

WIDTHS = (390, 1200)
BUDGETS = (80_000, 92_000, 120_000)
HOSTILE = "<script>alert('x')</script>\"&" + "verylongname" * 12
METRICS = [
    {"iteration": i, "loss_over_uniform": [1.0, 0.9], "return": [-1.0, -2.0], "entropy": [0.1, 0.2]} for i in (10, 20)
]


def row(name, method, budget, size, kld, beyond=None):
    stderr = None if beyond is None else abs(beyond) / 4
    numbers = {"linear_bpw": 4.5, "file_bpw": 4.6125, "ppl": 9.5, "ppl_llama_cpp": 9.25, "seconds": 1.0}
    sizes = {"budget_bytes": budget, "file": f"{method}.gguf", "file_bytes": size}
    errors = {"kld_stderr": kld / 9, "kld_beyond": beyond, "kld_beyond_stderr": stderr}
    return Row(name=name, method=method, kld=kld, **sizes, **numbers, **errors)


def comparison(name="policy"):
    rows = [row("reference F16", "reference", None, 270_000, 1e-6)]
    for budget in BUDGETS:
        loss = 3e3 / budget
        rows += [
            row("uniform IQ4_NL", "uniform", budget, budget - 900, 4 * loss, 3 * loss),
            row("llama.cpp Q4_0 + imatrix", "llama.cpp", budget, budget - 500, 1.1 * loss, 0.1 * loss),
            row(name, name, budget, budget - 9, loss),
        ]
    known = {"fingerprint": 64 * "a", "model": name, "budget_bytes": BUDGETS[1], "heldout_tokens": 4096}
    return {**known, "rows": [vars(one) for one in rows]}


@pytest.fixture(scope="module")
def chosen(untied):
    """Levels in turn, with predictions as an estimate makes them."""
    rng, levels = np.random.default_rng(0), (4, 5, 8)
    choices, picked = {}, []
    for tensor, row in zip(allocatable(untied.spec), costs(untied, levels).per_level, strict=True):
        loss = np.sort(10 ** rng.uniform(-6, -2, 3))[::-1]
        picked.append(len(choices) % 3)
        numbers = zip(row.tolist(), loss.tolist(), (loss - loss[picked[-1]]).tolist(), strict=True)
        found = [{"bytes": size, "loss": one, "change": change} for size, one, change in numbers]
        choices[tensor.name] = dict(zip(("IQ4_NL", "Q5_0", "Q8_0"), found, strict=True))
    made = from_levels(untied, [levels[a] for a in picked])
    return dataclasses.replace(made, made={"choices": choices, "predicted_kld": 0.0123})


@pytest.fixture(scope="module")
def alone(chosen, tmp_path_factory):
    """An allocation that needed no training, and nothing beside it."""
    path = tmp_path_factory.mktemp("alone") / "alloc.json"
    notes = {"model": "tiny", "budget_bytes": BUDGETS[1], "allocator": "fisher", "seconds": 1.5, "encoder": "best"}
    how = {"data": "builtin", "context": 24, "count": 3, "text": 64 * "a", "tokens": 64 * "b"}
    dataclasses.replace(chosen, calibration=how).save(path, **notes)
    return workflow.facts(path)


@pytest.fixture(scope="module")
def whole(chosen, tmp_path_factory):
    """A run with all that a page can show, whose names are hostile and long."""
    folder = tmp_path_factory.mktemp("whole")
    how = {"data": HOSTILE, "context": 24, "count": 3, "text": 64 * "a", "tokens": 64 * "b"}
    made = dataclasses.replace(chosen, calibration=how)
    decided = [{"kind": "keep", "pattern": HOSTILE, "format": "Q8_0"}] * 2
    notes = {"allocator": HOSTILE, "refine_evals": 3, "overrides": decided}
    made.save(folder / "alloc.json", model=HOSTILE, budget_bytes=BUDGETS[1], **notes)
    digest = read_saved(folder / "alloc.json")["sha256"]
    (folder / COMPARISON).write_text(json.dumps(comparison(HOSTILE) | {"allocation": digest}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in METRICS))
    return workflow.facts(folder / "alloc.json", folder)


def deep(facts, layers):
    """The same with that many layers, each a copy of one."""
    formats, choices = ({**facts.allocation[part]} for part in ("formats", "choices"))
    for part in (formats, choices):
        inside = {name: value for name, value in part.items() if name.startswith("blk.0.")}
        part |= {name.replace("blk.0.", f"blk.{n}."): value for n in range(layers) for name, value in inside.items()}
    return dataclasses.replace(facts, allocation={**facts.allocation, "formats": formats, "choices": choices})


@pytest.fixture(scope="module")
def pages(alone, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    shown = {"alone": alone, "whole": whole, "deep": deep(whole, 80)}
    return {name: report.write_report(folder / f"{name}.html", facts) for name, facts in shown.items()}


@pytest.fixture(scope="module")
def chromium():
    with browser.running() as running:
        yield running


class Page(HTMLParser):
    """Texts, tags, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.data, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset") or name.startswith("on")]

    def handle_data(self, data):
        self.data.append(data)


def test_a_page_stands_alone_and_escapes_names(whole):
    text = page(whole)
    found = Page(text)
    assert found.sources == []
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"https?://|url\(|@import", text)
    assert sum(HOSTILE in data for data in found.data) > 5
    said = "".join(found.data)
    for expected in (
        "92,000 bytes",
        "4,096 held-out tokens",
        "llama.cpp Q4_0 + imatrix",
        "seed 1",
        "3 × 24 tokens",
    ):
        assert expected in said, expected


def test_a_page_without_a_run_has_no_curve_and_predicts(alone):
    said = "".join(Page(page(alone)).data)
    assert "Training" not in said
    assert "Quality and size" not in said
    assert f"≈ {alone.predicted:.4f}nats per token, predicted; not measured" in said
    assert "--source_policy=fisher --levels=4,5,8" in said
    for source, levels in {"runs/mine": True, "evolution": True, "llama.cpp": False, "table.npz": False}.items():
        said = "".join(Page(page(dataclasses.replace(alone, source=source))).data)
        assert (f"--source_policy={source} --levels=4,5,8" in said) == levels
    for cell in alone.cells:
        assert cell.name in said
        assert f"{cell.bytes:,}" in said


def test_what_is_said_of_baselines(whole):
    """Which of two loses less, and whether that is more than one standard error."""
    said = "".join(Page(page(whole)).data)
    loss = 3e3 / BUDGETS[1]
    assert f"uniform IQ4_NL (91,100 bytes) loses {3 * loss:.4f} ± {0.75 * loss:.4f} nats per token more" in said
    rows = [
        {**one, "kld_beyond": -1e-4, "kld_beyond_stderr": 2e-4} if one["kld_beyond"] else one
        for one in comparison()["rows"]
    ]
    other = dataclasses.replace(whole, comparison={**comparison(), "rows": [Row(**one) for one in rows]})
    said = "".join(Page(page(other)).data)
    said = said.replace("\N{NO-BREAK SPACE}", " ")
    assert "loses, within one standard error, 1.0 × 10⁻⁴ ± 2.0 × 10⁻⁴ nats per token less than this allocation" in said


def test_prices_are_those_of_the_next_format(alone):
    cell = next(cell for cell in alone.cells if cell.format == "Q5_0")
    down, up = cell.next(-1), cell.next(1)
    assert (down.format, up.format) == ("IQ4_NL", "Q8_0")
    assert down.bytes < 0 < up.bytes
    assert cell.choices["Q8_0"]["bytes"] == cell.bytes + up.bytes
    assert cell.choices["Q8_0"]["change"] == up.kld
    ends = [cell for cell in alone.cells if cell.format == "Q8_0"]
    assert ends
    assert all(cell.next(1) is None for cell in ends)


def test_a_measured_table_stands_in_for_a_prediction(untied, tmp_path):
    """Where whoever chose saw none: its levels are those of the formats."""
    names = tuple(tensor.name for tensor in allocatable(untied.spec))
    kld = np.tile([0.5, 0.25, 0.125], (len(names), 1))
    Sensitivity(names, (4, 5, 8), kld, np.zeros(len(names))).save(tmp_path / "sensitivity-tiny.npz")
    choices = {name: {fmt: {"bytes": 10 * b} for b, fmt in enumerate(("IQ4_NL", "Q5_0", "Q8_0"), 4)} for name in names}
    made = dataclasses.replace(from_levels(untied, [5] * len(names)), made={"choices": choices})
    made.save(tmp_path / "alloc.json", model="some/tiny", allocator="uniform")
    assert not workflow.facts(tmp_path / "alloc.json").measured
    found = workflow.facts(tmp_path / "alloc.json", tmp_path)
    assert found.measured
    assert {cell.loss for cell in found.cells} == {0.25}
    assert {(cell.next(1).kld, cell.next(-1).kld) for cell in found.cells} == {(-0.125, 0.25)}
    assert "measured on calibration text" in page(found)


def test_files_of_a_run_that_are_damaged_or_of_another_allocation(chosen, tmp_path):
    path = tmp_path / "alloc.json"
    chosen.save(path, budget_bytes=1)
    (tmp_path / COMPARISON).write_text(json.dumps(comparison() | {"allocation": 64 * "b"}))
    with pytest.raises(ValueError, match="compares another allocation"):
        workflow.facts(path, tmp_path)
    (tmp_path / COMPARISON).unlink()
    for lines in ('{"iteration": 1}\n', "", json.dumps(METRICS[0] | {"entropy": [1.0]}), json.dumps([1])):
        (tmp_path / "metrics.jsonl").write_text(lines)
        with pytest.raises(ValueError, match=r"metrics.jsonl is not the metrics of a training run \(.*\); delete"):
            workflow.facts(path, tmp_path)
    saved = {name: value for name, value in read_saved(path).items() if name != "sha256"}
    saved["choices"]["token_embd.weight"] = {"Q9_9": {"bytes": 1}}
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="choices offer 'Q9_9'"):
        read_saved(path)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["alone", "whole", "deep"])
def test_a_page_as_it_is_looked_at(chromium, pages, name, width, dark):
    """Nothing is asked for, nothing fails, nothing reaches beyond the window, pictures are drawn, texts can be read."""
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(pages[name], width=width, dark=dark)
    assert chromium.errors == []
    assert set(chromium.requests) == {pages[name].as_uri()}
    assert chromium.evaluate("document.documentElement.scrollWidth") == width
    assert chromium.evaluate(BEYOND) == []
    assert chromium.evaluate(PALE) == []
    boxes = chromium.evaluate(PICTURES)
    assert len(boxes) == {"alone": 1}.get(name, 5)
    assert all(across > 200 and down > 100 and parts > 5 for across, down, parts in boxes)
    pixels = matplotlib.image.imread(io.BytesIO(chromium.screenshot()), format="png")[..., :3]
    assert pixels.shape[:2] == (chromium.evaluate("document.documentElement.scrollHeight"), width)
    assert (np.median(pixels) < 0.2) == dark
    assert np.ptp(pixels) > 0.8


BEYOND = """[...document.querySelectorAll('main *')].filter(e => {
  const r = e.getBoundingClientRect();
  return r.width && (r.right > innerWidth + 1 || r.left < -1) && !e.closest('.scroll, pre');
}).map(e => e.outerHTML.slice(0, 200))"""
"""What reaches beyond the window, but for what scrolls in a place of its own."""

PICTURES = """[...document.querySelectorAll('svg.chart')].map(svg => {
  const r = svg.getBoundingClientRect();
  return [r.width, r.height, svg.querySelectorAll('line, path, rect, text').length];
})"""

PALE = """(() => {
  const parts = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor); if (c.length && c[3] !== 0) return c; } };
  const texts = [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().width &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return texts.filter(e => {
    const style = getComputedStyle(e), ink = light(parts(e.namespaceURI.includes('svg') ? style.fill : style.color));
    const paper = light(behind(e));
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) < 4.5;
  }).map(e => e.outerHTML.slice(0, 200));
})()"""
"""Texts whose contrast is below 4.5, what WCAG 2 asks of small ones."""


@pytest.mark.parametrize("width", WIDTHS)
def test_pointing_at_a_cell_shows_its_price(chromium, pages, alone, width):
    chromium.open(pages["alone"], width=width)
    tip = "document.querySelectorAll('.map .cell')[4].querySelector('.tip')"
    assert chromium.evaluate(f"getComputedStyle({tip}).display") == "none"
    chromium.evaluate("document.querySelectorAll('.map .cell')[4].focus()")
    found = chromium.evaluate(
        f"(() => {{ const r = {tip}.getBoundingClientRect(); return [r.left, r.right, r.bottom]; }})()"
    )
    assert found == [0, width, 900]
    said = chromium.evaluate(f"{tip}.innerText")
    cell = alone.inside[4]
    for expected in (cell.name, cell.format, f"{cell.bytes:,} bytes"):
        assert expected in said


def test_a_page_in_print_is_light_and_says_everything(chromium, pages):
    chromium.open(pages["whole"], width=794, dark=True, media="print")
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate("[...document.querySelectorAll('details td')].every(e => e.checkVisibility())")
    assert chromium.evaluate(PALE) == []


def test_a_machine_without_a_browser_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"no Chromium is installed.*; run `apt-get install chromium`"):
        browser.executable()


def test_ticks_are_round_and_inside():
    axis = svg.linear_axis("MB", [70.8, 112.0], "{:g}".format)
    assert [label for _, label in axis.ticks] == ["70", "80", "90", "100", "110"]
    assert axis.low < 70.8 < 112.0 < axis.high
    axis = svg.log_axis("KL", [0.003, 0.4], "{:g}".format)
    assert [label for _, label in axis.ticks] == ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    assert axis.share(axis.low) == 0
    assert axis.share(np.sqrt(axis.low * axis.high)) == pytest.approx(0.5)
    one = svg.linear_axis("loss", [2.0, 2.0], "{:g}".format)
    assert 0.4 < one.share(2.0) < 0.6
    assert len(one.ticks) > 1


def test_error_bars_reach_one_standard_error_both_ways():
    x, y = svg.Axis("x", 0, 1, []), svg.Axis("y", 0, 10, [])
    drawn = svg.lines("", [svg.Series("a", 0, [svg.Point(0.5, 5, 2, "<b>")])], x, y, height=svg.TOP + svg.BOTTOM + 100)
    assert re.search(r'class="error" x1="50.000%" x2="50.000%" y1="70.0" y2="30.0"', drawn)
    assert "<title>&lt;b&gt;</title>" in drawn


ROWS = [
    vars(row("reference F16", "reference", None, 1234567, 0.1234567)),
    vars(row("RAMP", "RAMP", 200, 123, 0.1, 0.05)) | {"ppl_llama_cpp": None},
]


def test_text_table():
    found = [re.split("  +", line.strip()) for line in report.text_table(ROWS).splitlines()]
    assert found[0][:5] == ["file bytes", "linear bpw", "file bpw", "PPL (JAX)", "PPL (llama.cpp)"]
    assert found[0][5:] == ["mean KL", "±", "beyond ours", "±", "seconds"]
    assert found[1:] == [
        ["reference F16", "1,234,567", "4.500", "4.612", "9.500", "9.250", "0.1235", "0.0137", "–", "–", "1.0"],
        ["RAMP", "123", "4.500", "4.612", "9.500", "–", "0.1000", "0.0111", "+0.0500", "0.0125", "1.0"],
    ]
    assert len({len(line) for line in report.text_table(ROWS).splitlines()}) == 1


def test_column_without_values_is_left_out():
    rows = [one | {"ppl_llama_cpp": None} for one in ROWS]
    assert "llama.cpp" not in report.text_table(rows)


def test_plot_shows_the_level_of_every_layer_and_module(untied):
    """Only blk.1.ffn_down differs: its cell, and no other, has another color."""
    levels = [4] * 23
    members = [t.name for t in allocatable(untied.spec)]
    levels[members.index("blk.1.ffn_down.weight")] = 8
    figure = report.plot_allocation(from_levels(untied, levels).summary())
    axes = figure.axes[0]
    image = np.asarray(axes.images[0].get_array())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert image.shape == (7, 3)
    assert np.argwhere(image != image[0, 0]).tolist() == [[labels.index("ffn_down"), 1]]
    assert "token_embd IQ4_NL, output IQ4_NL" in axes.get_title()


def test_plot_of_one_level_and_one_seed(tied):
    assert report.png(report.plot_allocation(Allocation.uniform(tied, "F16").summary())).startswith(b"\x89PNG")
    rows = [{name: value[:1] if isinstance(value, list) else value for name, value in one.items()} for one in METRICS]
    figure = report.plot_training(rows)
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 1]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[10, 1], [20, 1]])

"""Formats that are decided before anybody chooses: what is refused, and that nobody can ignore them."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax.allocation import Allocation, costs, from_actions
from ramp_jax.allocators.allocator import by_table
from ramp_jax.formats import LEVELS, get_format
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable, matrices
from ramp_jax.overrides import formats_of, parse_override
from ramp_jax.policy import inference
from ramp_jax.policy.inference import allocate, find_allocator
from ramp_jax.quantization import fake_quantize
from ramp_jax.scoring import variants
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.table import Sensitivity

DECIDED = (
    parse_override("keep", "blk.1.attn_v.weight=f16"),
    parse_override("keep", "token_embd.weight=Q4_1"),
    parse_override("floor", "*.ffn_down.weight=Q5_1"),
    parse_override("ceiling", "blk.[02].*=Q5_1"),
    parse_override("ceiling", "output.weight=IQ4_NL"),
)
NAMES = ("fisher", "greedy", "uniform", "random", "evolution", "pretrained", "llama.cpp", "table", "refined")


def follows(allocation):
    bits = {name: get_format(fmt).bits_per_weight for name, fmt in allocation.formats.items()}
    assert allocation.formats["blk.1.attn_v.weight"] == "F16"
    assert allocation.formats["token_embd.weight"] == "Q4_1"
    assert bits["output.weight"] <= get_format("IQ4_NL").bits_per_weight
    assert {allocation.formats[f"blk.{layer}.ffn_down.weight"] for layer in (0, 2)} == {"Q5_1"}
    assert bits["blk.1.ffn_down.weight"] >= get_format("Q5_1").bits_per_weight
    held = [bits[name] for name in bits if name.startswith(("blk.0.", "blk.2."))]
    assert max(held) <= get_format("Q5_1").bits_per_weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_every_allocator_follows(untied, name, share, monkeypatch, rng):
    """Between the smallest and the largest file that overrides leave; what is kept is no level of anybody."""
    members = allocatable(untied.spec)
    loss = np.sort(rng.gamma(1.0, 1.0, (len(members), len(LEVELS))))[:, ::-1]
    if name == "table":
        names = tuple(tensor.name for tensor in members)
        found = by_table(Sensitivity(names, LEVELS, loss, loss[:, 0], 0.0, {}))
    else:
        spends = name in ("evolution", "refined")
        found = find_allocator({"refined": "fisher"}.get(name, name), evaluations=12 if spends else 0)
    sizes = inference.problem(untied, None, found.levels, costs(untied, found.levels), sees="sizes")

    def known(model, stats, levels, table, **_):
        expected = sizes.expected if len(levels) != len(LEVELS) else jnp.asarray(loss, jnp.float32)
        return sizes._replace(cost=jnp.asarray(table.in_units, jnp.int32), expected=expected)

    monkeypatch.setattr(inference, "problem", known)
    monkeypatch.setattr(inference, "importance_of", lambda *_: None)
    table = costs(untied, found.levels, DECIDED)
    smallest, largest = found.reach(untied, table)
    budget = smallest + int(share * (largest - smallest))
    made = allocate(
        found, untied, None, budget_bytes=budget, overrides=DECIDED, evaluate=lambda actions: float(actions.sum())
    )
    follows(made)
    assert smallest <= made.file_bytes <= budget
    assert made.made["overrides"] == DECIDED
    with pytest.raises(ValueError, match=f"choose between {smallest:,} and {largest:,} bytes"):
        allocate(found, untied, None, budget_bytes=smallest - 1, overrides=DECIDED)


def test_recorded_and_exported(untied, tmp_path):
    """Also a kept format that is no level: sizes are those of the file, and the JSON says what was decided."""
    table = costs(untied, (4, 8), DECIDED[:2])
    made = from_actions(untied, table, np.argmax(table.per_level > 0, axis=1))
    made.save(tmp_path / "alloc.json")
    loaded = Allocation.load(tmp_path / "alloc.json", untied)
    assert loaded == made
    assert loaded.made["overrides"] == made.made["overrides"] == DECIDED[:2]
    assert export_gguf(untied, loaded, tmp_path / "out.gguf") == made.file_bytes
    assert made.formats["token_embd.weight"] == "Q4_1"


def test_true_losses_know_what_is_kept(untied, windows):
    """One layer's matrix has fewer variants than the same matrix of other layers."""
    table = costs(untied, (4, 8), DECIDED[:2])
    prepared = variants.prepare(untied, untied, windows, table)
    highest = table.per_level.argmax(axis=1)
    params = fake_quantize(untied, from_actions(untied, table, highest))
    expected = evaluate(untied, windows, params=params, reference=untied).mean_kld
    assert variants.measuring(prepared)(highest) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("keep", "Q8_0", "--keep=Q8_0 is no PATTERN=FORMAT, as in --keep=blk"),
        ("keep", "=Q8_0", "is no PATTERN=FORMAT"),
        ("floor", "*=Q9_Z", r"--floor=\*=Q9_Z names a format that no file has; choose one of F32, F16"),
        ("keep", "*=INT4_G128", "names a format that no file has"),
    ],
)
def test_what_is_no_override(kind, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_override(kind, text)


@pytest.mark.parametrize(
    ("decided", "sentence"),
    [
        (["keep blk.*.attn_w.weight=Q8_0"], r"attn_w.weight=Q8_0 matches no matrix .* named as in token_embd.weight"),
        (["keep output_norm.weight=F32"], "matches no matrix"),
        (["keep TOKEN_EMBD.weight=F32"], "matches no matrix"),
        (["keep blk.2.*=Q6_K"], "matches blk.2.attn_q.weight, whose rows of 64 weights are no multiple of the 256"),
        (["floor *=Q4_1"], "Q4_1 is no bound for token_embd.weight, which is chosen among IQ4_NL, Q5_0, Q8_0"),
        (["ceiling *=Q5_1"], "Q5_1 is no bound for token_embd.weight"),
        (["keep *=Q8_0", "keep output.*=F16"], r"--keep=\*=Q8_0 and --keep=output.\*=F16 contradict each other for o"),
        (["keep output.*=Q4_0", "floor *=Q5_0"], "contradict each other for output.weight"),
        (["keep output.*=F16", "ceiling *=Q8_0"], "contradict each other for output.weight"),
        (["floor *_q.*=Q8_0", "ceiling *=Q5_0"], "leave nothing to choose for blk.0.attn_q.weight"),
    ],
)
def test_what_cannot_be(untied, decided, sentence):
    overrides = [parse_override(*text.split(" ")) for text in decided]
    with pytest.raises(ValueError, match=sentence):
        costs(untied, (4, 5, 8), overrides)


def test_bounds_meet_and_repeat(untied):
    """The higher of two floors counts; a kept format may be said twice."""
    decided = ["floor *=Q5_0", "floor *=Q8_0", "ceiling *=Q8_0", "keep output.weight=F16", "keep output*=F16"]
    found = formats_of(untied.spec, (4, 5, 8), [parse_override(*text.split(" ")) for text in decided[:3]])
    assert set(found.values()) == {(None, None, "Q8_0")}
    kept = formats_of(untied.spec, (4, 5, 8), [parse_override(*text.split(" ")) for text in decided[3:]])
    assert kept["output.weight"] == (None, None, "F16")


def test_rows_that_no_block_divides(untied):
    """What would be F16 can be kept in another float format, but in no block."""
    spec = dataclasses.replace(untied.spec, d_ff=40)
    found = formats_of(spec, (4, 8), [parse_override("keep", "*.ffn_down.*=BF16")])
    assert found["blk.0.ffn_down.weight"] == ("BF16", None)
    assert formats_of(spec, (4, 8))["blk.0.ffn_down.weight"] == ("F16", None)
    with pytest.raises(ValueError, match=re.escape("rows of 40 weights are no multiple of the 32")):
        formats_of(spec, (4, 8), [parse_override("keep", "*.ffn_down.*=Q8_0")])
    with pytest.raises(ValueError, match=r"BF16 is no bound for blk\.0\.ffn_down\.weight, which is chosen among F16"):
        formats_of(spec, (4, 8), [parse_override("ceiling", "*.ffn_down.*=BF16")])
    assert len(found) == len(matrices(spec))


def test_cost_of_a_fallback_is_known_before_anybody_chooses(untied):
    """At the smallest file it is what the finished allocation says of itself."""
    model = dataclasses.replace(untied, spec=dataclasses.replace(untied.spec, d_ff=40))
    for decided, kept in ((), "F16"), ((parse_override("keep", "blk.0.ffn_down.*=F32"),), "F32 and F16"):
        table = costs(model, (4, 8), decided)
        said = table.fallback(model.spec, table.smallest)
        assert said == from_actions(model, table, [0] * len(allocatable(model.spec))).fallback
        assert f"3 of 23 matrices stay in {kept}, since their rows are no multiple of 32 weights" in said
    assert costs(untied, (4, 8)).fallback(untied.spec, 10**6) is None

"""Sizes by hand and against written files, and what allocations refuse."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ramp_jax.allocation import (
    Allocation,
    check_budget,
    costs,
    export_metadata,
    from_levels,
    tensor_bytes,
    worthwhile,
)
from ramp_jax.formats import DEFAULT_LEVELS, get_format
from ramp_jax.formats import LEVELS as AVAILABLE
from ramp_jax.models import Tensor, allocatable, load_model, tensors
from ramp_jax.models.layout import Weight, foldable
from ramp_jax.models.metadata import plain, typed
from ramp_jax.overrides import parse_override

LEVELS = (4, 5, 8)
EMBEDDING = 320 * 64  # weights
LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
NORMS = 7 * 64


def data_bytes(allocation):
    return sum(tensor_bytes(t, allocation.format_of(t)) for t in tensors(allocation.spec))


@pytest.mark.parametrize(("name", "bits", "nominal"), [("Q4_0", 4.5, 4), ("Q5_0", 5.5, 5), ("Q8_0", 8.5, 8)])
def test_bits_of_uniform_allocations(model, name, bits, nominal):
    allocation = Allocation.uniform(model, name)
    assert allocation.linear_bpw == bits
    assert allocation.code_bits == nominal


@pytest.mark.parametrize(("name", "bits"), [("F16", 16), ("F32", 32), ("BF16", 16)])
def test_bits_of_floats(untied, name, bits):
    assert Allocation.uniform(untied, name).code_bits == Allocation.uniform(untied, name).linear_bpw == bits


def test_bits_of_a_mixture_by_hand(tied):
    levels = [8] + [4] * 7 + [5] * 7 + [4] * 7
    allocation = from_levels(tied, levels)
    weights = EMBEDDING + 3 * LAYER
    assert allocation.linear_bpw == pytest.approx((8.5 * EMBEDDING + (4.5 + 5.5 + 4.5) * LAYER) / weights, rel=1e-12)
    assert allocation.code_bits == pytest.approx((8 * EMBEDDING + 13 * LAYER) / weights, rel=1e-12)
    assert allocation.file_bpw == pytest.approx(8 * allocation.file_bytes / (weights + NORMS), rel=1e-12)


@pytest.mark.parametrize("kept", ["", "token_embd.weight=F16"])
@pytest.mark.parametrize(
    ("bits", "named"),
    [
        (2.5, ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]),
        (4.5, ["IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]),
        (6, ["IQ3_XXS", "IQ3_S"]),
        (7, []),
    ],
)
def test_lattices_are_worthwhile_where_the_choice_has_few_bits(bits, named, kept):
    """Whatever else is in the file: an embedding that is kept in F16 leaves the blocks no more."""
    model = load_model("ref-llama")
    overrides = [parse_override("keep", kept)] if kept else []
    table, members = costs(model, DEFAULT_LEVELS, overrides), allocatable(model.spec)
    chosen = [t for t in members if t.name not in kept]
    decided = sum(tensor_bytes(t, "F16") for t in members if t.name in kept)
    budget = table.fixed + decided + -(-int(bits * sum(t.size for t in chosen)) // 8)
    assert table.bits_of_choices(model.spec, budget) == pytest.approx(bits, rel=1e-5)
    levels = worthwhile(model, DEFAULT_LEVELS, budget, overrides)
    assert [level for level in levels if isinstance(level, str)] == named
    assert set(levels) - set(named) == set(AVAILABLE)


def test_all_levels_are_worthwhile_where_fewer_do_not_fit_or_one_is_asked_for():
    model = load_model("ref-llama")
    table = costs(model, DEFAULT_LEVELS)
    assert worthwhile(model, DEFAULT_LEVELS, table.smallest) == DEFAULT_LEVELS
    asked = [parse_override("keep", "blk.0.attn_q.weight=IQ2_XXS")]
    assert worthwhile(model, DEFAULT_LEVELS, table.largest, asked) == DEFAULT_LEVELS
    decided = [parse_override("keep", "*.weight=Q8_0")]
    assert costs(model, DEFAULT_LEVELS, decided).bits_of_choices(model.spec, table.largest) == 0


def test_file_holds_the_data_and_a_header(untied):
    allocation = Allocation.uniform(untied, "Q4_0")
    assert data_bytes(allocation) == (2 * EMBEDDING + 3 * LAYER) // 32 * 18 + NORMS * 4
    assert 0 < allocation.file_bytes - data_bytes(allocation) < 20_000


@pytest.mark.parametrize(
    ("shape", "fmt", "expected"), [((3, 32), "Q4_0", 64), ((3, 32), "F32", 384), ((5,), "F32", 32)]
)
def test_tensor_bytes_are_padded_to_32(shape, fmt, expected):
    assert tensor_bytes(Tensor(Weight("output.weight", shape, "other")), fmt) == expected


def test_file_bytes_equal_a_written_file(tmp_path, model):
    """Metadata with every kind of value, formats mixed."""
    odd = typed({"general.name": "naïve", "x.list": ["a", "é"], "x.flag": True, "x.value": 1.5})
    model = dataclasses.replace(model, metadata=model.metadata | odd)
    members = allocatable(model.spec)
    allocation = from_levels(model, [LEVELS[i % 3] for i in range(len(members))])
    types = {t.name: get_format(allocation.formats[t.name]).ggml_type for t in members}
    values = tiny.gguf_values(model.spec.tied)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", export_metadata(allocation), values, types)
    assert path.stat().st_size == allocation.file_bytes


def test_exported_metadata_names_the_recipe_and_the_type_of_most_weights(untied):
    stale = typed(
        {"ramp.recipe": "old", "quantize.imatrix.file": "old", "general.alignment": 64, "general.url": "kept"}
    )
    model = dataclasses.replace(untied, metadata=untied.metadata | stale)
    exported = plain(export_metadata(from_levels(model, [8, *[5] * 21, 4])))
    assert exported["ramp.recipe"] == [8, *[6] * 21, 20]
    assert exported["general.file_type"] == 8
    assert exported["general.quantization_version"] == 2
    assert exported["general.url"] == "kept"
    assert not exported.keys() & {"quantize.imatrix.file", "general.alignment"}


@pytest.mark.parametrize("level", AVAILABLE)
def test_every_level_has_a_file_type(untied, level):
    wide = dataclasses.replace(untied.spec, d_model=256, d_ff=256, head_size=64)
    allocation = from_levels(dataclasses.replace(untied, spec=wide), [level] * 23)
    assert plain(export_metadata(allocation))["general.file_type"] > 1
    assert allocation.code_bits == level


def test_file_type_is_that_of_most_bytes(tied):
    """The embedding has a fifth of the weights, but in F32 most of the bytes."""
    formats = Allocation.uniform(tied, "Q4_0").formats | {"token_embd.weight": "F32"}
    assert plain(export_metadata(Allocation(tied.spec, tied.metadata, formats)))["general.file_type"] == 0


def test_saved_and_loaded(tmp_path, untied):
    allocation = from_levels(untied, [8] + [4, 5] * 11)
    allocation.save(tmp_path / "allocation.json", budget_bytes=123)
    assert Allocation.load(tmp_path / "allocation.json", untied) == allocation
    content = json.loads((tmp_path / "allocation.json").read_text())
    assert content["budget_bytes"] == 123
    assert content["file_bytes"] == allocation.file_bytes
    assert content["linear_bpw"] == allocation.linear_bpw
    assert [path.name for path in tmp_path.iterdir()] == ["allocation.json"]


@pytest.mark.parametrize(
    "content", ["not json", "{}", "[]", '{"formats": 3}', "null", '""', "", "[" * 10**5, '{"formats": NaN}', "\xff"]
)
def test_file_that_is_no_allocation(tmp_path, untied, content):
    (tmp_path / "allocation.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"json is not an allocation \(.*\); make one with launch/allocate\.py\.$"):
        Allocation.load(tmp_path / "allocation.json", untied)


def test_allocation_that_is_not_there(tmp_path, untied):
    for path in (tmp_path / "allocation.json", tmp_path, Path("/dev/null")):
        with pytest.raises(FileNotFoundError, match=rf"{path} is no file, where an allocation was expected; make one"):
            Allocation.load(path, untied)


HOW = {"data": "builtin", "context": 24, "count": 2, "text": 64 * "a", "tokens": 64 * "b"}


@pytest.fixture
def written(tmp_path, untied):
    """What a file of an allocation holds, and the file; with scales of folding and a calibration record."""
    folding = {name: np.linspace(0.5, 2, a.width, dtype=np.float32) for name, a in foldable(untied.spec).items()}
    made = dataclasses.replace(from_levels(untied, [4] * 23), folding=folding, calibration=HOW)
    path = tmp_path / "allocation.json"
    made.save(path, encoder="best", budget_bytes=123)
    return json.loads(path.read_text()), path


@pytest.mark.parametrize(
    ("part", "value", "cause"),
    [
        ("formats", ["Q4_0"], r"formats is \['Q4_0'\], expected an object"),
        ("formats output.weight", ["Q4_0"], r"formats.output.weight is \['Q4_0'\], expected a text"),
        ("formats output.weight", "INT4_G128", "formats.output.weight is 'INT4_G128', expected one of F32, F16, BF16"),
        ("formats output.weight", "Q4_K", "Q4_K holds rows of a multiple of 256 weights, not 64"),
        ("encoder", "worst", "encoder is 'worst', expected reference or best or compensated"),
        ("budget_bytes", -1, "budget_bytes is -1, expected a number from 1 to"),
        ("model", "a\x1b[2J", "expected a text that can be printed"),
        ("more", 1, "it has no field 'more', there are model, weights, budget_bytes, encoder, "),
        ("calibration", {}, "calibration lacks the field 'data'"),
        ("calibration", "builtin", "calibration is 'builtin', expected an object"),
        ("calibration count", 0, "calibration.count is 0, expected a number from 1 to"),
        ("calibration count", 2.0, "calibration.count is 2.0, expected a whole number"),
        ("calibration context", 257, "it was calibrated on windows of 257 tokens, and the model was made for 256"),
        ("calibration data", None, "calibration.data is None, expected a text"),
        ("calibration text", 64 * "g", "calibration.text is .*, expected 64 hex digits"),
        ("folding", [], r"folding is \[\], expected an object"),
        ("folding head_in", "AAAA", "the folding names head_in, which the model has not"),
        ("folding blk.0.attn_in", "*", "the folding of blk.0.attn_in is no base64 of float32"),
        ("folding blk.0.attn_in", np.ones(63), "the folding of blk.0.attn_in has 63 scales, expected 64"),
        *(
            (
                "folding blk.0.attn_in",
                np.full(64, odd),
                "the folding of blk.0.attn_in has scales that are not numbers from",
            )
            for odd in (0, -1, np.nan, np.inf, 1e-30, 1e30)
        ),
    ],
)
def test_field_of_an_allocation_that_does_not_serve(untied, written, part, value, cause):
    """The file is blamed, not the model; also where it has no digest."""
    content, path = written
    del content["sha256"]
    field, _, key = part.partition(" ")
    if isinstance(value, np.ndarray):
        value = base64.b64encode(value.astype("<f4").tobytes()).decode()
    content[field] = content[field] | {key: value} if key else value
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"^{path} is not an allocation.* \(.*{cause}.*\); make one with launch/allocate"
    ):
        Allocation.load(path, untied)


def test_allocation_that_was_changed_says_how_to_go_on(untied, written):
    """Scales that changed places fit everywhere; so do formats, which who edits them means."""
    content, path = written
    assert Allocation.load(path, untied).formats["output.weight"] == "IQ4_NL"
    path.write_text(json.dumps(dict(reversed(content.items()))))
    Allocation.load(path, untied)
    folding, formats = content["folding"], content["formats"]
    attn, ffn = "blk.0.attn_in", "blk.0.ffn_in"
    folding[attn] = base64.b64encode(np.linspace(2, 0.5, 64, dtype="<f4").tobytes()).decode()
    for change in (
        {"folding": folding | {attn: folding[ffn], ffn: folding[attn]}},
        {"formats": formats | {"output.weight": "Q8_0"}},
    ):
        path.write_text(json.dumps(content | change))
        sentence = "json is not as it was written, .* delete the line of its sha256 where you changed it yourself"
        with pytest.raises(ValueError, match=sentence):
            Allocation.load(path, untied)
    path.write_text(json.dumps({name: value for name, value in (content | change).items() if name != "sha256"}))
    assert Allocation.load(path, untied).formats["output.weight"] == "Q8_0"


def test_allocation_of_another_model(untied, tied, tmp_path):
    Allocation.uniform(untied, "Q4_0").save(tmp_path / "allocation.json")
    with pytest.raises(ValueError, match=r"names unknown tensor output\.weight; it was made for another model"):
        Allocation.load(tmp_path / "allocation.json", tied)
    with pytest.raises(ValueError, match=r"lacks tensor output\.weight"):
        Allocation(untied.spec, untied.metadata, Allocation.uniform(tied, "Q4_0").formats)


def test_norms_cannot_be_allocated(untied):
    with pytest.raises(ValueError, match=r"names unknown tensor blk\.0\.attn_norm\.weight"):
        Allocation(
            untied.spec, untied.metadata, Allocation.uniform(untied, "Q4_0").formats | {"blk.0.attn_norm.weight": "F32"}
        )


def test_unknown_format(untied):
    with pytest.raises(ValueError, match="unknown format 'Q1_X'"):
        Allocation(untied.spec, untied.metadata, Allocation.uniform(untied, "Q4_0").formats | {"output.weight": "Q1_X"})


def resized(model, **sizes):
    """The same model described with other sizes."""
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, **sizes))


def test_masked_level_names_the_tensor(untied):
    with pytest.raises(ValueError, match=r"token_embd\.weight has rows of 64 weights, which level 3 cannot hold"):
        from_levels(untied, [3] * 23)


def test_format_that_cannot_hold_the_rows(untied):
    with pytest.raises(ValueError, match="Q4_K holds rows of a multiple of 256 weights, not 64"):
        Allocation.uniform(untied, "Q4_K")


def test_tensor_that_no_level_can_hold(untied):
    with pytest.raises(ValueError, match=r"no level of \(2, 3\) can hold token_embd\.weight"):
        costs(untied, (2, 3))


DOWN = 64 * 80  # weights of an `ffn_down` whose rows no block can hold


def test_rows_that_no_block_can_hold_stay_in_f16(untied):
    """They are counted with what is fixed, and with nothing that is said of the allocated weights."""
    model = resized(untied, d_ff=80)
    names = {f"blk.{layer}.ffn_down.weight" for layer in range(3)}
    assert names == {t.name for t in tensors(model.spec) if t.is_matrix} - {t.name for t in allocatable(model.spec)}
    allocation = from_levels(model, [4] * 20)
    assert {allocation.formats[name] for name in names} == {"F16"}
    assert set(allocation.formats.values()) == {"F16", "IQ4_NL"}
    assert (allocation.linear_bpw, allocation.code_bits) == (4.5, 4)
    assert len(plain(export_metadata(allocation))["ramp.recipe"]) == 20
    table = costs(model, LEVELS)
    assert len(table.per_level) == 20
    assert table.smallest == allocation.file_bytes == data_bytes(allocation) + table.fixed - 3 * 2 * DOWN - NORMS * 4
    assert Allocation.uniform(model, "Q8_0").formats["blk.0.ffn_down.weight"] == "F16"


@pytest.mark.parametrize("name", ["F32", "BF16", "F16"])
def test_uniform_float_format_is_that_of_every_matrix(untied, name):
    assert set(Allocation.uniform(resized(untied, d_ff=80), name).formats.values()) == {name}


def test_summary_says_which_tensors_fell_back_and_what_that_takes(untied):
    summary = from_levels(resized(untied, d_ff=80, n_layers=4), [4] * 26).summary()
    assert summary["fallback"] == (
        "4 of 30 matrices stay in F16, since their rows are no multiple of 32 weights: blk.0.ffn_down.weight, "
        "blk.1.ffn_down.weight, blk.2.ffn_down.weight and 1 more; they take 40,960 bytes, 29,440 beyond the 4.500 bits "
        "per weight of the others."
    )
    assert "fallback" not in from_levels(untied, [4] * 23).summary()


def test_block_format_where_no_block_fits(untied):
    model = resized(untied, d_ff=80)
    formats = Allocation.uniform(model, "Q8_0").formats | {"blk.1.ffn_down.weight": "Q8_0"}
    with pytest.raises(ValueError, match="Q8_0 holds rows of a multiple of 32 weights, not 80"):
        Allocation(model.spec, model.metadata, formats)


def test_model_of_which_nothing_can_be_quantized(untied):
    model = resized(untied, d_model=60, d_ff=80, head_size=12)
    for ask in (lambda: costs(model, LEVELS), lambda: Allocation.uniform(model, "F16")):
        with pytest.raises(ValueError, match=r"^nothing of this model can be .* have rows of 48, 60, 80; use another"):
            ask()


def test_number_of_levels_must_match(untied):
    with pytest.raises(ValueError, match="shorter"):
        from_levels(untied, [4] * 22)


@settings(max_examples=50)
@given(st.data())
def test_costs_add_up_to_file_bytes(untied, tied, data):
    model = data.draw(st.sampled_from([untied, tied]))
    table = costs(model, LEVELS)
    rows = len(table.per_level)
    actions = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    allocation = from_levels(model, [LEVELS[a] for a in actions])
    assert table.fixed + table.per_level[np.arange(rows), actions].sum() == allocation.file_bytes
    assert table.smallest <= allocation.file_bytes <= table.largest


def test_reachable_range_is_that_of_uniform_allocations(model):
    table = costs(model, LEVELS)
    assert table.valid.all()
    assert table.smallest == Allocation.uniform(model, "Q4_0").file_bytes
    assert table.largest == Allocation.uniform(model, "Q8_0").file_bytes


def test_levels_nobody_serves_cost_nothing_and_are_invalid(untied):
    table = costs(untied, (7, 8))
    assert not table.valid[:, 0].any()
    assert table.smallest == table.largest == Allocation.uniform(untied, "Q8_0").file_bytes


def test_budget_outside_the_range_prints_it(untied):
    table = costs(untied, LEVELS)
    smallest, largest = table.smallest, table.largest
    check_budget((smallest, largest), smallest)
    check_budget((smallest, largest), largest)
    with pytest.raises(ValueError, match=f"below the smallest .* between {smallest:,} and {largest:,} bytes"):
        check_budget((smallest, largest), smallest - 1)
    with pytest.raises(ValueError, match=f"above the largest .* between {smallest:,} and {largest:,} bytes"):
        check_budget((smallest, largest), largest + 1)

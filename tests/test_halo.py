"""Exported files: sizes, weights, metadata, and what llama.cpp makes of them."""

import gguf
import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.halo import export, llama_quantize, shards
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.journal import Journal, beside
from ramp_jax.models import DecoderSpec, allocatable, load_model, matrices, tensors
from ramp_jax.models.metadata import plain
from ramp_jax.policy.inference import allocate
from ramp_jax.quantization import Encoder, calibrate, fake_quantize, fold, importance_of, refold
from ramp_jax.scoring.perplexity import evaluate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

LEVELS = (4, 5, 8)
FORMATS = ("Q4_0", "Q5_0", "Q8_0", "F16", "BF16", "F32")


def mixed(model, rng):
    return from_levels(model, rng.choice(LEVELS, len(allocatable(model.spec))))


@pytest.fixture(scope="module")
def stats(untied, windows):
    return calibrate(untied, windows)


@pytest.fixture(scope="module")
def folded(untied, stats):
    return fold(untied, stats, 4)


@pytest.fixture(scope="module")
def reference(untied, tmp_path_factory):
    """The untied model as an F16 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "reference.gguf"
    export_gguf(untied, Allocation.uniform(untied, "F16"), path)
    return path


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@settings(max_examples=6)
@given(st.integers(0, 2**32 - 1))
def test_any_mixture_has_the_predicted_size(untied, tied, tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    for model in (untied, tied):
        formats = {t.name: str(rng.choice(FORMATS)) for t in allocatable(model.spec)}
        allocation = Allocation(model.spec, model.metadata, formats)
        path = tmp_path_factory.mktemp("size") / "out.gguf"
        assert export_gguf(model, allocation, path) == path.stat().st_size == allocation.file_bytes
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert {name: stored[name] for name in formats} == formats
        assert {fmt for name, fmt in stored.items() if name not in formats} == {"F32"}


def test_file_holds_exactly_the_weights_that_were_evaluated(model, windows, tmp_path, rng):
    """Scale Folding and rope's row order included; `model` may be handed over folded or not."""
    folded = fold(model, calibrate(model, windows), 4)
    allocation = mixed(folded, rng)
    assert any(np.ptp(s) > 0 for s in allocation.folding.values())
    export_gguf(model, allocation, tmp_path / "out.gguf")
    expected = fake_quantize(refold(model, allocation.folding), allocation)
    equal(load_model(str(tmp_path / "out.gguf")).params, jax.tree.map(np.asarray, expected))
    export_gguf(refold(model, allocation.folding), allocation, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_tokenizer_and_metadata_travel(model, tmp_path, rng):
    allocation = mixed(model, rng)
    export_gguf(model, allocation, tmp_path / "out.gguf")
    loaded = load_model(str(tmp_path / "out.gguf"))
    assert loaded.spec == model.spec
    source, found = plain(model.metadata), plain(loaded.metadata)
    kept = [name for name in source if name.startswith(("tokenizer.", "llama."))]
    assert len(kept) > 10
    for name in kept:
        assert found[name] == (pytest.approx(source[name]) if isinstance(source[name], float) else source[name])
    text = "def spam(eggs):\n    return 'Ünïcode' * 3  # <|im_end|>"
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    types = [int(gguf.GGMLQuantizationType[allocation.formats[t.name]]) for t in allocatable(model.spec)]
    assert found["ramp.recipe"] == types


def test_exported_twice_is_the_same_file_but_for_its_recipe(untied, tmp_path, rng):
    """An exported file is a model like any other: to export it again as it is changes no byte."""
    allocation = mixed(untied, rng)
    export_gguf(untied, allocation, tmp_path / "out.gguf")
    loaded = load_model(str(tmp_path / "out.gguf"))
    again = Allocation(loaded.spec, loaded.metadata, allocation.formats)
    assert export_gguf(loaded, again, tmp_path / "again.gguf") == allocation.file_bytes


def test_nothing_is_left_of_an_export_that_fails(untied, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("stopped")

    (tmp_path / "out.gguf").write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(export, "_raw", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            export_gguf(untied, Allocation.uniform(untied, "Q4_0"), tmp_path / "out.gguf")
    header_of = shards.header_of
    with monkeypatch.context() as patched:
        patched.setattr(shards, "header_of", lambda *sizes: header_of(*sizes) + 32)
        with pytest.raises(ValueError, match="were predicted"):
            export_gguf(untied, Allocation.uniform(untied, "Q4_0"), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


def test_a_file_that_was_begun_goes_on_where_it_is_whole(untied, tmp_path, monkeypatch):
    """Tensors of blocks that were kept are not made again, unless some byte of them is not as it was written."""
    path, allocation = tmp_path / "out.gguf", Allocation.uniform(untied, "Q4_0")
    begun, made, raw = beside(path) / "out.gguf.begun", [], export._raw
    export_gguf(untied, allocation, tmp_path / "whole.gguf")

    def run(stop_at):
        def made_until(model, tensor, fmt, pieces):
            made.append(tensor.name)
            if tensor.name == stop_at:
                raise KeyboardInterrupt
            return raw(model, tensor, fmt, pieces)

        made.clear()
        monkeypatch.setattr(export, "_raw", made_until)
        with Journal(beside(path), {}) as journal:
            export_gguf(untied, allocation, path, journal=journal)

    def damage(change):
        content = bytearray(begun.read_bytes())
        begin = content.index(b"token_embd.weight")
        begun.write_bytes(change(content, (begin + len(content)) // 2))

    for change, first in (
        (lambda content, _: content, "blk.2.attn_norm.weight"),
        (lambda content, at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], "token_embd.weight"),
        (lambda content, at: content[:at], "token_embd.weight"),
    ):
        with pytest.raises(KeyboardInterrupt):
            run("blk.2.ffn_up.weight")
        damage(change)
        run(None)
        assert made[0] == first
        assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert sorted(left.name for left in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_matrices_that_no_block_can_hold_are_written_in_f16(odd, windows, tmp_path):
    """Folded with the others; the file is what was evaluated, and runs in llama.cpp."""
    folded = fold(odd, calibrate(odd, windows), 4)
    allocation = from_levels(folded, [LEVELS[i % 3] for i in range(len(allocatable(odd.spec)))])
    assert len(folded.folding) in (9, 6)
    encoder = Encoder("reference", importance_of(odd.spec, calibrate(odd, windows)))
    export_gguf(odd, allocation, tmp_path / "out.gguf", encoder)
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    odd_ones = [t.name for t in tensors(odd.spec) if t.is_matrix and not t.allocatable]
    assert len(odd_ones) in (3, 17)
    assert {stored[name] for name in odd_ones} == {"F16"}
    expected = fake_quantize(folded, allocation, encoder)
    equal(load_model(str(tmp_path / "out.gguf")).params, jax.tree.map(np.asarray, expected))
    ours = evaluate(folded, windows, params=expected, protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, protocol="sliding")
    assert theirs.ppl == pytest.approx(ours.ppl, rel=0.02)
    np.testing.assert_allclose(theirs.nll, ours.nll, atol=0.5)


def test_f32_file_of_matrices_that_no_block_can_hold(odd, windows, tmp_path):
    export_gguf(odd, Allocation.uniform(odd, "F32"), tmp_path / "out.gguf")
    equal(load_model(str(tmp_path / "out.gguf")).params, jax.tree.map(np.asarray, odd.params))
    ours = evaluate(odd, windows, protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, protocol="sliding")
    np.testing.assert_allclose(theirs.nll, ours.nll, atol=0.02)  # its cache holds keys and values in f16


def test_llama_cpp_falls_back_as_we_do(odd, windows, tmp_path):
    """Its mixes keep the same matrices in F16, and have the predicted sizes."""
    source, importance = tmp_path / "F32.gguf", importance_of(odd.spec, calibrate(odd, windows))
    export_gguf(odd, Allocation.uniform(odd, "F32"), source)
    sizes = llama_quantize.predicted_bytes(source, importance)
    for mix in ("Q4_K_M", "Q8_0"):
        path = tmp_path / f"{mix}.gguf"
        assert llama_quantize.quantize(source, path, mix, importance) == sizes[mix]
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        allocation = Allocation(odd.spec, odd.metadata, {t.name: stored[t.name] for t in matrices(odd.spec)})
        assert {name for name, fmt in stored.items() if fmt == "F16"} == {
            name for name, fmt in Allocation.uniform(odd, "Q8_0").formats.items() if fmt == "F16"
        }
        assert allocation.fallback
    budget = Allocation.uniform(odd, "Q5_1").file_bytes
    found = allocate(llama_quantize.mix_allocator(), odd, calibrate(odd, windows), budget_bytes=budget)
    assert found.file_bytes <= budget


TABLES = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}


@pytest.fixture
def with_tables(monkeypatch):
    """Every spec asks for the table by which llama.cpp divides rotary frequencies."""
    monkeypatch.setattr(DecoderSpec, "tables", TABLES)


@pytest.mark.usefixtures("with_tables")
def test_tables_are_written_after_the_tensors(untied, windows, tmp_path):
    """Files have the predicted size with them, llama.cpp reads them, and its quantizer copies them."""
    for fmt in ("Q8_0", "F32"):
        allocation = Allocation.uniform(untied, fmt)
        assert export_gguf(untied, allocation, tmp_path / fmt) == allocation.file_bytes
        stored = gguf.GGUFReader(tmp_path / fmt).tensors
        assert [t.name for t in stored] == [*(t.name for t in tensors(untied.spec)), *TABLES]
        assert stored[-1].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(stored[-1].data, TABLES["rope_freqs.weight"])
    size = llama_quantize.quantize(tmp_path / "F32", tmp_path / "Q4_0", "Q4_0")
    assert size == llama_quantize.predicted_bytes(tmp_path / "F32")["Q4_0"]
    budget = Allocation.uniform(untied, "Q5_1").file_bytes
    allocate(llama_quantize.mix_allocator(), untied, calibrate(untied, windows), budget_bytes=budget)
    ours = evaluate(untied, windows, protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "F32", windows, protocol="sliding")
    assert np.abs(theirs.nll - ours.nll).max() > 0.1  # our decoder does not know this table


def test_folder_that_cannot_be_written(untied, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for output in (tmp_path / "file" / "out.gguf", tmp_path / "nowhere" / "out.gguf", tmp_path):
        with pytest.raises(OSError, match=r"cannot write .*; choose another output\.$"):
            export_gguf(untied, Allocation.uniform(untied, "Q4_0"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_allocation_of_another_model_is_refused(untied, tied, tmp_path):
    with pytest.raises(ValueError, match="made for another model"):
        export_gguf(untied, Allocation.uniform(tied, "Q4_0"), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["F32", "F16"])
def test_llama_cpp_agrees_on_floats(model, windows, tmp_path, name):
    """Same tokens, within 0.1 % of perplexity."""
    allocation = Allocation.uniform(model, name)
    export_gguf(model, allocation, tmp_path / "out.gguf")
    ours = evaluate(model, windows, params=fake_quantize(model, allocation), protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, protocol="sliding")
    assert theirs.nll.shape == ours.nll.shape
    assert theirs.ppl == pytest.approx(ours.ppl, rel=1e-3)
    np.testing.assert_allclose(theirs.nll, ours.nll, atol=0.05)


def test_llama_cpp_agrees_on_a_folded_mixture(folded, windows, tmp_path, rng):
    """Within 2 % of perplexity, not 0.5 %: llama.cpp rounds activations to 8 bits for quantized weights, which moves
    the losses of this random model with its peaked predictions by 0.03 nats each, and 69 tokens average little of it
    out. That is a tenth of what quantization itself moves them."""
    allocation = mixed(folded, rng)
    export_gguf(folded, allocation, tmp_path / "out.gguf")
    ours = evaluate(folded, windows, params=fake_quantize(folded, allocation), protocol="sliding")
    theirs = evaluate_gguf(tmp_path / "out.gguf", windows, protocol="sliding")
    assert theirs.ppl == pytest.approx(ours.ppl, rel=0.02)
    unquantized = evaluate(folded, windows, protocol="sliding")
    difference, effect = np.abs(theirs.nll - ours.nll).mean(), np.abs(unquantized.nll - ours.nll).mean()
    assert difference < 0.2 * effect


def test_divergence_in_llama_cpp(untied, windows, reference):
    """The same numbers from llama.cpp's logits as from ours; nearly none for the model itself."""
    from ramp_jax.scoring.perplexity import reference_of

    other = evaluate_gguf(reference, windows, reference=reference_of(untied, windows))
    assert other.kld.shape == (3 * 11,)
    assert 0 <= other.mean_kld < 1e-4


def test_file_that_llama_cpp_cannot_load(tmp_path, windows):
    (tmp_path / "out.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(RuntimeError, match=r"llama.cpp cannot load"):
        evaluate_gguf(tmp_path / "out.gguf", windows)


def test_llama_cpp_s_own_mixes(untied, stats, windows, reference, tmp_path):
    """Q4_0 without an importance matrix holds our bytes; with one, other bytes of the same size that lose no more."""
    plain_path, better_path = tmp_path / "plain.gguf", tmp_path / "better.gguf"
    llama_quantize.quantize(reference, plain_path, "Q4_0")
    size = llama_quantize.quantize(reference, better_path, "Q4_0", importance_of(untied.spec, stats))
    assert size == better_path.stat().st_size
    plain_model, better = load_model(str(plain_path)), load_model(str(better_path))
    rounded = fake_quantize(load_model(str(reference)), Allocation.uniform(untied, "Q4_0"))
    equal(plain_model.params["blk"], jax.tree.map(np.asarray, rounded["blk"]))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain_model.params, better.params)), strict=True))
    klds = [evaluate(m, windows, reference=untied, protocol="sliding").mean_kld for m in (plain_model, better)]
    assert klds[1] < 1.1 * klds[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["better.gguf", "plain.gguf"]


def test_importance_is_the_mean_square_of_each_linear_s_input(untied, stats):
    importance = importance_of(untied.spec, stats)
    assert set(importance) == {t.name for t in allocatable(untied.spec) if t.layer is not None}
    np.testing.assert_array_equal(importance["blk.2.ffn_down.weight"], stats.moments["blk.2.ffn_mid"].square)
    np.testing.assert_array_equal(importance["blk.1.attn_v.weight"], stats.moments["blk.1.attn_in"].square)
    assert all(values.dtype == np.float32 for values in importance.values())


def test_largest_mix_that_fits(reference, tmp_path):
    """Predictions are exact, and the largest fitting one is taken."""
    sizes = llama_quantize.predicted_bytes(reference)
    assert sizes["Q4_0"] < sizes["Q5_0"] < sizes["Q8_0"]
    for mix in ("Q4_0", "Q8_0"):
        assert llama_quantize.quantize(reference, tmp_path / mix, mix) == sizes[mix]
    budget = (sizes["Q5_0"] + sizes["Q8_0"]) // 2
    chosen = llama_quantize.Mixes(reference, {}).below(budget)
    assert sizes[chosen] == max(size for size in sizes.values() if size <= budget)
    assert llama_quantize.Mixes(reference, {}).below(min(sizes.values()) - 1) is None
    assert [path.name for path in reference.parent.iterdir()] == ["reference.gguf"]


def test_mixes_are_an_allocator(untied, stats, reference, tmp_path):
    """It chooses the types that llama.cpp itself writes, of the largest mix that fits in our file."""
    budget = Allocation.uniform(untied, "Q5_1").file_bytes
    found = allocate(llama_quantize.mix_allocator(), untied, stats, budget_bytes=budget)
    assert found.file_bytes <= budget
    written = {}
    for mix in llama_quantize.MIXES:
        llama_quantize.quantize(reference, tmp_path / mix, mix, importance_of(untied.spec, stats))
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / mix).tensors}
        written[mix] = Allocation(untied.spec, untied.metadata, {name: stored[name] for name in found.formats})
        assert llama_quantize.mix_types(reference, mix, importance_of(untied.spec, stats)) == stored
    fitting = [allocation for allocation in written.values() if allocation.file_bytes <= budget]
    assert found.file_bytes == max(allocation.file_bytes for allocation in fitting)
    assert found.formats in [allocation.formats for allocation in fitting]
    too_small = min(allocation.file_bytes for allocation in written.values()) - 64
    with pytest.raises(ValueError, match=r"is below the smallest reachable file; choose between"):
        allocate(llama_quantize.mix_allocator(), untied, stats, budget_bytes=too_small)


def test_mix_that_does_not_exist(reference, tmp_path):
    with pytest.raises(ValueError, match=r"llama.cpp has no mix 'Q9'; known mixes are IQ2_XXS, .*Q2_K"):
        llama_quantize.quantize(reference, tmp_path / "out.gguf", "Q9")
    with pytest.raises(RuntimeError, match=r"llama.cpp could not quantize"):
        llama_quantize.quantize(tmp_path / "nowhere.gguf", tmp_path / "out.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_llama_cpp_at_our_types(untied, stats, reference, tmp_path, rng):
    """Formats named tensor by tensor, the embedding in F16; with importance, the bytes of our reference encoder."""
    allocation = mixed(untied, rng)
    types = {**allocation.formats, "token_embd.weight": "F16"}
    llama_quantize.quantize(reference, tmp_path / "out.gguf", "Q4_0", importance_of(untied.spec, stats), types)
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {name: stored[name] for name in types} == types
    theirs = tiny.stacked(load_model(str(tmp_path / "out.gguf")).params)
    encoder = Encoder("reference", importance_of(untied.spec, stats))
    ours = tiny.stacked(fake_quantize(load_model(str(reference)), allocation, encoder))
    for module in tiny.LINEARS:
        assert np.mean(theirs[module] == ours[module]) > 0.999, module

"""Importance and encoders: what is evaluated is what is exported, and llama.cpp's importance matrices."""

import dataclasses
import struct

import gguf
import jax
import numpy as np
import pytest
import tiny

from ramp_jax import data
from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.checkpoint import digest
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable, load_model, lookup
from ramp_jax.quantization import (
    REFERENCE,
    Encoder,
    calibrate,
    fake_quantize,
    fold,
    importance_of,
    make_encoder,
    read_imatrix,
    recorded_encoder,
    refold,
    write_imatrix,
)
from ramp_jax.quantization.importance import Origin, load_imatrix

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def stats(untied, windows):
    return calibrate(untied, windows)


@pytest.fixture(scope="module")
def importance(untied, stats):
    return importance_of(untied.spec, stats)


@pytest.fixture(scope="module")
def allocation(untied, stats):
    """A folded mixture of levels."""
    return from_levels(fold(untied, stats, 4), [(4, 5, 8)[i % 3] for i in range(23)])


def test_file_holds_exactly_what_was_evaluated(untied, windows, allocation, tmp_path):
    """Importance follows the folding, and the search is not ggml's own."""
    encoder = make_encoder("best", windows)
    export_gguf(untied, allocation, tmp_path / "out.gguf", encoder)
    params = fake_quantize(untied, allocation, encoder)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "out.gguf")).params, params)
    plain = fake_quantize(refold(untied, allocation.folding), allocation)
    assert (tiny.stacked(params)["attn_q"] != tiny.stacked(plain)["attn_q"]).any()


def test_best_lowers_the_error_of_the_outputs(untied, stats, importance, allocation):
    """Σ_i E[x_i²] (ŵ_i − w_i)² of every weighted tensor, at the activations of the folded model."""
    model = refold(untied, allocation.folding)
    moments = stats.under(model.folding).moments
    best, plain = (fake_quantize(model, allocation, e) for e in (Encoder("best", importance), REFERENCE))
    for tensor in allocatable(untied.spec):
        if tensor.layer is not None:
            weight, w = np.asarray(moments[tensor.reads].square), lookup(model.params, tensor)
            off = [(np.square(np.asarray(lookup(p, tensor) - w)) * weight).sum() for p in (best, plain)]
            assert off[0] <= off[1] * (1 + 1e-5), tensor.name


def test_importance_is_that_of_the_unfolded_model(untied, stats, importance):
    folded = fold(untied, stats, 4)
    again = importance_of(untied.spec, stats.under(folded.folding))
    for name, values in importance.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-5)


def test_tensor_that_calibration_never_reached_is_rounded_unweighted(untied, importance, allocation, caplog):
    name = "blk.1.attn_k.weight"
    tensor = next(t for t in allocatable(untied.spec) if t.name == name)
    dead = Encoder("best", {**importance, name: np.zeros(64, np.float32)})
    found = dead.encode(untied, tensor, allocation.formats[name])
    expected = Encoder("best").encode(untied, tensor, allocation.formats[name])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [record.getMessage().split(" ")[-5] for record in caplog.records] == [name + ";"]


def test_dead_channels_keep_their_weights(untied, importance, allocation):
    name = "blk.1.attn_k.weight"
    tensor = next(t for t in allocatable(untied.spec) if t.name == name)
    half = importance[name] * (np.arange(64) < 32)
    codes = Encoder("best", {name: half}).encode(untied, tensor, "IQ4_NL")
    assert (np.asarray(codes.d) != 0).all()


def test_encoder_that_looks_at_activations_rounds_no_single_tensor(untied, windows):
    with pytest.raises(ValueError, match="this encoder looks at activations; take all tensors from `encoded`"):
        make_encoder("best", windows).encode(untied, allocatable(untied.spec)[0], "Q8_0")


def write_dat(path, entries, calls=7):
    """llama.cpp's older format, written with struct alone."""
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        raw += (np.asarray(values, np.float32) * calls).astype("<f4").tobytes()
    path.write_bytes(raw + struct.pack("<ii", 3, 4) + b"text")
    return path


def test_imatrix_as_llama_cpp_reads_it(untied, importance, tmp_path):
    """Σx² and counts per tensor, and the keys that llama-quantize asks for."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, importance, "builtin", 3, 24)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["builtin"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 24)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(stored) == 2 * len(importance)
    for name, values in importance.items():
        sums, counts = stored[name + ".in_sum2"], stored[name + ".counts"]
        assert (sums.shape.tolist(), counts.shape.tolist()) == ([len(values), 1], [1, 1])
        np.testing.assert_allclose(sums.data[0] / counts.data[0, 0], values, rtol=1e-6)
    for name, values in read_imatrix(path, untied.spec).items():
        np.testing.assert_allclose(values, importance[name], rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["imatrix.gguf"]
    found, origin = load_imatrix(path, untied.spec)
    assert (origin, set(found)) == (Origin("imatrix.gguf", "builtin", 3, 24), set(importance))
    write_imatrix(path, importance, "builtin", 3, 24, tokens=1)
    jax.tree.map(np.testing.assert_array_equal, read_imatrix(path, untied.spec), dict(importance))


def test_imatrix_of_the_older_format(untied, importance, tmp_path):
    found = read_imatrix(write_dat(tmp_path / "imatrix.dat", importance), untied.spec)
    assert set(found) == set(importance)
    for name, values in found.items():
        np.testing.assert_allclose(values, importance[name], rtol=1e-6)


def test_imatrix_of_another_model(untied, importance, tmp_path):
    """The first tensor that does not fit is named."""
    name, third = "blk.0.ffn_down.weight", "blk.2.attn_q.weight"
    cases = {
        f"it has 64 values for {name}, this model needs 96": {**importance, name: np.ones(64)},
        f"it has no values for {third}, this model needs 64": {n: v for n, v in importance.items() if "blk.2" not in n},
        "this one has no blk.3.attn_q.weight": {**importance, "blk.3.attn_q.weight": np.ones(64)},
    }
    for sentence, entries in cases.items():
        with pytest.raises(ValueError, match=f"was made for another model: {sentence}"):
            read_imatrix(write_dat(tmp_path / "other.dat", entries), untied.spec)


def test_imatrix_that_is_damaged(untied, importance, tmp_path):
    path = write_dat(tmp_path / "imatrix.dat", importance)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"is not an importance matrix of llama\.cpp"):
        read_imatrix(path, untied.spec)
    bad = {**importance, "blk.1.attn_q.weight": np.full(64, np.nan)}
    with pytest.raises(ValueError, match=r"negative or non-finite value for blk\.1\.attn_q\.weight"):
        read_imatrix(write_dat(path, bad), untied.spec)
    for change, cause in (
        (lambda raw: raw + b"more", "bytes are left at its end"),
        (lambda raw: struct.pack("<i", 2**31 - 1) + raw[4:], "ends too early"),
        (lambda raw: raw[:4] + struct.pack("<i", 2**31 - 1) + raw[8:], "ends too early"),
        (lambda raw: raw[:4] + struct.pack("<i", -5) + raw[8:], "ends too early, or has a part of no size"),
        (lambda raw: raw[:8] + b"\xff" + raw[9:], "can't decode byte"),
    ):
        path.write_bytes(change(write_dat(path, importance).read_bytes()))
        with pytest.raises(ValueError, match=rf"imatrix.dat is not an importance matrix of llama.cpp \(.*{cause}"):
            read_imatrix(path, untied.spec)
    write_imatrix(tmp_path / "empty.gguf", {}, "builtin", 1, 1)
    with pytest.raises(ValueError, match=r"it has no values for blk\.0\.attn_q\.weight, this model needs 64"):
        read_imatrix(tmp_path / "empty.gguf", untied.spec)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({".counts": np.full((1, 1), np.nan, np.float32)}, "nan tokens for|counts holds values that are NaN"),
        ({".counts": np.full((1, 1), -1, np.float32)}, "it has -1.0 tokens for blk.0.attn_q.weight"),
        ({".counts": np.ones((2, 1), np.float32)}, "sums and counts of several matrices"),
        ({".counts": None}, "it has no blk.0.attn_q.weight.counts of F32"),
        ({".in_sum2": None}, "it has no blk.0.attn_q.weight.in_sum2 of F32"),
        ({".in_sum2": np.ones((1, 64), np.float16)}, "it has no blk.0.attn_q.weight.in_sum2 of F32"),
        ({".in_sum2": np.ones((2, 32), np.float32)}, "sums and counts of several matrices"),
        ({".in_sum2": np.full((1, 64), -1, np.float32)}, "a negative or non-finite value for blk.0.attn_q.weight"),
    ],
)
def test_imatrix_whose_tensors_do_not_serve(untied, importance, tmp_path, changed, cause):
    path, name = tmp_path / "imatrix.gguf", "blk.0.attn_q.weight"
    write_imatrix(path, importance, "builtin", 3, 24)
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    stored |= {name + part: value for part, value in changed.items()}
    writer = gguf.GGUFWriter(path, "imatrix")
    for key, value in stored.items():
        if value is not None:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=rf"imatrix.gguf is not an importance matrix of llama.cpp \(.*({cause}).*\); make"
    ):
        read_imatrix(path, untied.spec)


def test_encoder_of_an_allocation_file(untied, windows, importance, allocation, tmp_path):
    path = tmp_path / "alloc.json"
    known = {"text": data.fingerprint("builtin"), "tokens": digest(windows)}
    calibration = {"data": "builtin", "context": 24, "count": 3, **known}

    def recorded(*how, calibration=calibration, model=untied, **named):
        dataclasses.replace(allocation, calibration=calibration).save(path, encoder="best")
        return recorded_encoder(Allocation.load(path, untied), model, *how, **named)

    found = recorded()
    assert (found.effort, found.compensated) == ("best", False)
    np.testing.assert_array_equal(found.windows, windows)
    known = dataclasses.replace(found, importance=importance, windows=None)
    jax.tree.map(
        np.testing.assert_array_equal,
        fake_quantize(untied, allocation, found),
        fake_quantize(untied, allocation, known),
    )
    assert found.origin == Origin(None, "builtin", 3, 24)
    assert recorded("reference") == REFERENCE
    imatrix = write_dat(tmp_path / "imatrix.dat", {name: values * 2 for name, values in importance.items()})
    assert recorded(imatrix=imatrix).imatrix_pairs(untied.spec) == {
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.dataset": "text",
        "quantize.imatrix.entries_count": len(importance),
        "quantize.imatrix.chunks_count": 3,
    }
    np.testing.assert_allclose(
        recorded(imatrix=imatrix).importance["blk.0.attn_q.weight"],
        2 * importance["blk.0.attn_q.weight"],
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="--imatrix serves --encoder=best, not reference"):
        recorded("reference", imatrix)
    with pytest.raises(ValueError, match="no tokenizer, so the calibration text cannot be read; pass --imatrix"):
        recorded(model=dataclasses.replace(untied, tokenizer=None))
    with pytest.raises(ValueError, match=r"the tokens of 'builtin' are not those .* with --tokenizer_from"):
        recorded(calibration=calibration | {"tokens": digest(windows + 1)})
    with pytest.raises(ValueError, match="the text of 'builtin' is not the one that the allocation was calibrated on"):
        recorded(calibration=calibration | {"text": data.fingerprint("stdlib:json")})
    assert recorded_encoder(allocation, untied) == REFERENCE
    with pytest.raises(ValueError, match="does not say what it was calibrated on; pass --imatrix=FILE"):
        recorded_encoder(allocation, untied, "best")

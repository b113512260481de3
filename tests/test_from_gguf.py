"""The types of a file of any maker as an allocation: read, scored, refined, rounded again."""

import ctypes
import os

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny

from ramp_jax import workflow
from ramp_jax.allocation import Allocation, from_levels, read_saved
from ramp_jax.config import WindowsConfig
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable
from ramp_jax.policy import embedding
from ramp_jax.quantization import calibrate, recorded_encoder, refold
from ramp_jax.sensitivity.pairs import Estimate
from ramp_jax.workflow import allocating, shared

MIXES = ("Q4_K_M", "Q4_0", "IQ4_XS", "Q8_0")
WINDOWS = WindowsConfig("builtin", 24, 3)


def types(*paths):
    stored = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    return {tensor.name: tensor.tensor_type.name for tensor in stored if tensor.tensor_type.name != "F32"}


@pytest.fixture(scope="module")
def mixes(untied, tmp_path_factory):
    """llama.cpp's own, by name."""
    folder = tmp_path_factory.mktemp("mixes")
    export_gguf(untied, Allocation.uniform(untied, "F16"), folder / "F16.gguf")
    for mix in MIXES:
        llama_quantize.quantize(folder / "F16.gguf", folder / f"{mix}.gguf", mix)
    return {mix: folder / f"{mix}.gguf" for mix in MIXES}


@pytest.mark.parametrize("mix", MIXES)
def test_types_of_llama_cpp_s_mixes(untied, mixes, mix):
    found = Allocation.from_gguf(mixes[mix], untied)
    assert found.formats == types(mixes[mix])
    assert found.folding == {}
    reader = gguf.GGUFReader(mixes[mix])
    theirs, ours = (
        mixes[mix].stat().st_size - reader.data_offset,
        sum(-(-int(tensor.n_bytes) // 32) * 32 for tensor in reader.tensors),
    )
    assert theirs == ours
    assert 0 < found.file_bytes - theirs < 20_000


def test_split_file_that_llama_cpp_wrote(untied, tmp_path):
    """Any part stands for all."""
    export_gguf(untied, Allocation.uniform(untied, "F16"), tmp_path / "F16.gguf", shard_bytes=60_000)
    first, *rest = sorted(tmp_path.iterdir())
    assert rest
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.keep_split = llama_quantize.MIXES["Q5_0"], 2, True
    prefix = tmp_path / "Q5_0"
    with llama_quantize.captured_log():
        assert not llama_cpp.llama_model_quantize(os.fsencode(first), os.fsencode(prefix), ctypes.byref(params))
    parts = sorted(tmp_path.glob("Q5_0-*"))
    assert len(parts) == 1 + len(rest)
    for part in parts[:2]:
        assert Allocation.from_gguf(part, untied).formats == types(*parts)
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {parts[1].name}; download the rest of the model"):
        Allocation.from_gguf(parts[0], untied)


def test_file_of_another_model(untied, tied, odd, mixes, tmp_path):
    with pytest.raises(ValueError, match=r"Q4_0.gguf is a file of another .*has output.weight, which this model"):
        Allocation.from_gguf(mixes["Q4_0"], tied)
    with pytest.raises(ValueError, match=r"another model, .*it has shape \(.*\) for \S+, which has shape \(.*\) here"):
        Allocation.from_gguf(mixes["Q4_0"], odd)
    export_gguf(tied, Allocation.uniform(tied, "Q8_0"), tmp_path / "tied.gguf")
    with pytest.raises(ValueError, match=r"it lacks output.weight, which has shape \(320, 64\) here"):
        Allocation.from_gguf(tmp_path / "tied.gguf", untied)
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf is no file, where a GGUF of this model was expected"):
        Allocation.from_gguf(tmp_path / "nowhere.gguf", untied)
    (tmp_path / "text.gguf").write_text("It is none")
    with pytest.raises(ValueError, match=r"text.gguf is not a whole GGUF file"):
        Allocation.from_gguf(tmp_path / "text.gguf", untied)


def test_type_that_is_not_written_here(untied, tmp_path):
    values = tiny.gguf_values(False)
    foreign = {f"blk.{layer}.attn_q.weight": gguf.GGMLQuantizationType.NVFP4 for layer in range(3)}
    path = tiny.write_gguf(tmp_path / "foreign.gguf", untied.metadata, values, foreign)
    way_out = f"--source_policy=fisher --budget_bytes={path.stat().st_size}"
    with pytest.raises(ValueError, match=f"holds blk.0.attn_q.weight as NVFP4 and 2 more in types .*Q8_0.*{way_out}"):
        Allocation.from_gguf(path, untied)


def read(untied, path, output, levels=(4.0, 5.0, 8.0), **how):
    return workflow.allocate_as(untied, path, levels, WINDOWS, output, "tiny", "best", **how)


def test_read_and_rounded_again(untied, mixes, tmp_path, monkeypatch):
    """No pass over the model; an encoder finds its windows as with any allocation."""
    monkeypatch.setattr(allocating, "prepare", None)
    read(untied, mixes["Q4_0"], tmp_path / "a.json")
    found, notes = Allocation.load(tmp_path / "a.json", untied), read_saved(tmp_path / "a.json")
    assert found.formats == types(mixes["Q4_0"])
    assert (notes["allocator"], notes["encoder"]) == ("types of Q4_0.gguf", "best")
    assert notes["budget_bytes"] == found.file_bytes
    encoder = recorded_encoder(found, untied)
    assert (encoder.effort, encoder.windows.shape) == ("best", (3, 24))


def test_folded_for_its_types(untied, mixes, tmp_path, monkeypatch):
    scales, asked = {"blk.1.attn_in": np.linspace(0.5, 2, 64, dtype=np.float32)}, []

    def folded(model, windows, level, journal):
        asked.append(level)
        return refold(model, scales), calibrate(model, windows)

    monkeypatch.setattr(shared, "calibrate_and_fold", folded)
    found = read(untied, mixes["Q8_0"], tmp_path / "a.json", fold_level=4)
    assert found.formats == types(mixes["Q8_0"])
    np.testing.assert_array_equal(found.folding["blk.1.attn_in"], scales["blk.1.attn_in"])
    assert asked == [4]


def test_refined_in_as_many_bytes(untied, mixes, tmp_path, monkeypatch):
    """What is measured first are the file's own types, which no level means; what is found loses no more."""
    losses, own = {}, types(mixes["Q4_0"])
    levels = (4.0, 8.0, *sorted({fmt for fmt in own.values() if fmt not in ("IQ4_NL", "Q8_0")}))

    def estimated(model, stats, measured, journal):
        members = allocatable(model.spec)
        assert {*levels} <= {*measured}
        return Estimate(np.ones((len(members), len(measured))), np.zeros((len(members), len(measured)) * 2))

    def true_loss(model, folded, stats, calibration, table):
        assert {len(formats) for formats in table.formats.values()} == {len(levels)}

        def measure(actions):
            losses[tuple(map(int, actions))] = loss = float(np.cos(actions + np.arange(len(actions))).sum())
            return loss

        return measure

    monkeypatch.setattr(embedding, "estimated", estimated)
    monkeypatch.setattr(allocating, "_true_loss", true_loss)
    found = read(untied, mixes["Q4_0"], tmp_path / "six.json", (4.0, 8.0), evaluations=6)
    first, *_ = losses
    assert from_levels(untied, [levels[a] for a in first]).formats == own
    assert len(losses) == 6
    best = min(losses, key=losses.get)
    assert found.formats == from_levels(untied, [levels[a] for a in best]).formats != own
    assert found.file_bytes <= Allocation.from_gguf(mixes["Q4_0"], untied).file_bytes
    assert read_saved(tmp_path / "six.json")["refine_evals"] == 6


def test_command_line(call, fails, untied, untied_directory, mixes, tmp_path):
    """A file of another maker as an allocation that evaluate and export take."""
    output = f"--output={tmp_path / 'a.json'}"
    arguments = [f"--model={untied_directory}", f"--from_gguf={mixes['Q4_0']}", output, "--context=24", "--count=3"]
    code, printed, errors = call("allocate", *arguments, "--encoder=reference")
    assert code == 0, errors
    found = Allocation.load(tmp_path / "a.json", untied)
    assert found.formats == types(mixes["Q4_0"])
    assert f"{found.file_bytes:,} of {found.file_bytes:,} bytes (0 unused)" in printed
    for more, sentence in {
        "--budget_gb=1": "--budget_gb would be ignored with --from_gguf, whose types and size are taken",
        "--source_policy=fisher": "--source_policy would be ignored with --from_gguf",
        "--levels=4,8": "--levels would be ignored with --from_gguf, without --refine_evals",
        f"--output={mixes['Q4_0']}": "is the input",
    }.items():
        assert sentence in fails("allocate", *arguments, more)
    assert "--from_gguf names a file that has them; give one" in fails("allocate", *arguments[:1], output)
    assert "--fold would be ignored without --from_gguf" in fails("allocate", *arguments[:1], output, "--fold")

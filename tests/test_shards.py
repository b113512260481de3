"""Files in parts: sizes to the byte, what llama.cpp loads, what goes on after a kill, what is read again."""

import gguf
import numpy as np
import pytest

from ramp_jax.allocation import Allocation, from_levels
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.journal import Journal, beside
from ramp_jax.models import allocatable, load_model
from ramp_jax.models.metadata import PairsWriter
from ramp_jax.quantization import Encoder, calibrate, importance_of, make_encoder

LARGEST = 25_000
"""Bytes that leave room for the embedding beside the vocabulary, and for less than a block."""


@pytest.fixture(scope="module")
def allocation(untied):
    return from_levels(untied, [(4, 5, 8)[i % 3] for i in range(len(allocatable(untied.spec)))])


@pytest.fixture(scope="module")
def whole(untied, allocation, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out.gguf"
    export_gguf(untied, allocation, path)
    return path


def written(reader):
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def pairs(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def test_parts_hold_the_file(untied, allocation, whole, windows, tmp_path):
    """None is larger than asked for and none needlessly small; llama.cpp and we read them as the one file."""
    size = export_gguf(untied, allocation, tmp_path / "out.gguf", shard_bytes=LARGEST)
    files = sorted(tmp_path.iterdir())
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"out-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    sizes = [file.stat().st_size for file in files]
    assert sum(sizes) == size
    assert max(sizes) <= LARGEST
    parts = [gguf.GGUFReader(file) for file in files]
    for part, following in zip(sizes[:-1], parts[1:], strict=True):
        assert part + 100 + int(following.tensors[0].n_bytes) > LARGEST
    one, found = gguf.GGUFReader(whole), {}
    for i, part in enumerate(parts):
        found |= written(part)
        split = {name: value for name, value in pairs(part).items() if name.startswith("split.")}
        assert split == {"split.no": i, "split.count": count, "split.tensors.count": len(one.tensors)}
        kinds = [part.fields[name].types[0].name for name in ("split.no", "split.count", "split.tensors.count")]
        assert kinds == ["UINT16", "UINT16", "INT32"]
        assert pairs(part) == (split if i else pairs(one) | split)
    assert found == written(one)
    ours, theirs = (evaluate_gguf(path, windows, protocol="sliding") for path in (whole, files[0]))
    np.testing.assert_array_equal(ours.nll, theirs.nll)
    assert load_model(str(files[1])).spec == untied.spec


def test_a_file_that_fits_is_one(untied, allocation, whole, tmp_path):
    assert export_gguf(untied, allocation, tmp_path / "out.gguf", shard_bytes=whole.stat().st_size)
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("largest", "cause"), [(18_000, "holds token_embd.weight, which takes one of"), (0, "holds")])
def test_a_tensor_larger_than_a_part(untied, allocation, tmp_path, largest, cause):
    with pytest.raises(ValueError, match=f"no file of {largest:,} bytes {cause}.*choose a larger --shard_size"):
        export_gguf(untied, allocation, tmp_path / "out.gguf", shard_bytes=largest)
    assert list(tmp_path.iterdir()) == []


def test_too_many_parts(untied, allocation, tmp_path, monkeypatch):
    monkeypatch.setattr("ramp_jax.halo.shards._MOST", 2)
    with pytest.raises(ValueError, match=r"files of up to 25,000 bytes make \d, at most 2 are written"):
        export_gguf(untied, allocation, tmp_path / "out.gguf", shard_bytes=LARGEST)


@pytest.mark.parametrize("stop_at", ["blk.0.attn_q.weight", "blk.2.ffn_up.weight", "output.weight"])
def test_parts_that_were_begun_go_on(untied, allocation, tmp_path, monkeypatch, stop_at):
    path, write, made = tmp_path / "out.gguf", PairsWriter.write_tensor_pieces, []

    def run(stop):
        def until(self, name, pieces):
            if name == stop:
                raise KeyboardInterrupt
            made.append(name)
            return write(self, name, pieces)

        made.clear()
        monkeypatch.setattr(PairsWriter, "write_tensor_pieces", until)
        with Journal(beside(path), {}) as journal:
            export_gguf(untied, allocation, path, journal=journal, shard_bytes=LARGEST)

    with pytest.raises(KeyboardInterrupt):
        run(stop_at)
    assert [left.name for left in tmp_path.iterdir()] == ["out.gguf.journal"]
    run(None)
    again = {"blk.0.attn_q.weight": "token_embd.weight", "blk.2.ffn_up.weight": "blk.2.attn_norm.weight"}
    assert made[0] == again.get(stop_at, "output_norm.weight")
    found = {left.name: left.read_bytes() for left in tmp_path.iterdir()}
    export_gguf(untied, allocation, path, shard_bytes=LARGEST)
    assert found == {left.name: left.read_bytes() for left in tmp_path.iterdir()}


def test_bytes_that_the_disk_changes_are_found(untied, tmp_path, monkeypatch):
    """One bit of the last tensor after it was written."""
    close = PairsWriter.close

    def close_and_damage(self):
        close(self)
        with self.path.open("r+b") as file:
            at = file.seek(-40, 2)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(PairsWriter, "close", close_and_damage)
    with pytest.raises(OSError, match=r"out.gguf: output.weight reads back other than it was written; check the disk"):
        export_gguf(untied, Allocation.uniform(untied, "Q8_0"), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_which_importance_it_was_rounded_with(untied, windows, tmp_path):
    """As llama-quantize says it; sizes do not depend on it."""
    allocation = Allocation.uniform(untied, "F16")
    importance = importance_of(untied.spec, calibrate(untied, windows))
    found = {}
    for name, encoder in {
        "reference": make_encoder("reference", windows),
        "best": make_encoder("best", windows, dataset="ünicode " * 40),
        "known": Encoder("best", importance),
    }.items():
        path = tmp_path / f"{name}.gguf"
        assert export_gguf(untied, allocation, path, encoder) == allocation.file_bytes == path.stat().st_size
        found[name] = {k: v for k, v in pairs(gguf.GGUFReader(path)).items() if k.startswith("quantize.")}
    assert found["reference"] == {}
    assert found["best"].pop("quantize.imatrix.dataset") == ("ünicode " * 40).encode()[:127].decode(errors="ignore")
    assert found["best"] == {"quantize.imatrix.entries_count": 21, "quantize.imatrix.chunks_count": 3}
    assert found["known"] == {"quantize.imatrix.entries_count": 21}

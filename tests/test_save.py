"""Saved directories: read back identical, read by transformers, and whole or not there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ramp_jax import data, save_model
from ramp_jax.models import load_model

FAMILIES = ("llama", "qwen3", "gemma")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A tiny random model whose values all are bfloat16's, gains without Gemma's 1 included."""
    original = tiny.hf_model(tied=False) if request.param == "llama" else tiny.family_model(request.param)
    folder = tiny.save(original, tmp_path_factory.mktemp("hf") / "original")
    return load_model(str(save_model(load_model(str(folder)), folder.with_name("rounded"))))


def same_files(a, b):
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    return all((b / p.name).read_bytes() == p.read_bytes() for p in a.iterdir())


def test_read_back_is_the_identical_model(model, tmp_path):
    loaded = load_model(str(save_model(model, tmp_path / "saved")))
    assert loaded.spec == model.spec
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    text = data.read_text("builtin")[:2000]
    assert loaded.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert (loaded.tokenizer.bos_token, loaded.tokenizer.eos_token) == (tiny.END, tiny.STOP)
    assert same_files(tmp_path / "saved", save_model(loaded, tmp_path / "again"))


def test_transformers_reads_the_same_model(model, tmp_path, rng):
    save_model(model, tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert type(theirs).__name__ == model.spec.family.hf
    ids = rng.integers(0, tiny.VOCABULARY, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(model.logits(ids.astype(np.int32)), expected, atol=1e-4, rtol=0)


def test_matrices_and_norms_are_stored_in_the_dtype(model, tmp_path):
    for dtype, name in (("bfloat16", "BF16"), ("float32", "F32")):
        path = save_model(model, tmp_path / dtype, dtype)
        with safe_open(path / "model.safetensors", framework="numpy") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {name}  # noqa: SIM118
        assert json.loads((path / "config.json").read_text())["dtype"] == dtype


def test_values_are_rounded_to_nearest(untied, tmp_path):
    loaded = load_model(str(save_model(untied, tmp_path / "saved")))
    for ours, exact in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(untied.params), strict=True):
        np.testing.assert_array_equal(ours, jnp.asarray(exact).astype(jnp.bfloat16).astype(jnp.float32))
    exact = load_model(str(save_model(untied, tmp_path / "exact", "float32")))
    jax.tree.map(np.testing.assert_array_equal, exact.params, untied.params)


def test_nothing_is_left_of_a_save_that_fails(untied, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("ramp_jax.models.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(untied, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_left_alone(untied, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"saved exists already; delete it or choose another output"):
        save_model(untied, tmp_path / "saved")
    assert [p.name for p in tmp_path.rglob("*")] == ["saved", "notes.txt"]

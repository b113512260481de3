"""Weights that stay on disk: what is read, and that nothing that is made of them depends on where they are."""

import os
import shutil

import jax
import numpy as np
import pytest

from ramp_jax import scratch, sweep
from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import load_model, save_model, tensors
from ramp_jax.models.layout import lookup
from ramp_jax.models.store import StoredParams, rows_of
from ramp_jax.policy.inference import allocate, find_allocator
from ramp_jax.quantization import calibrate_and_fold, make_encoder, refold
from ramp_jax.scoring.perplexity import evaluate

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module", params=["gguf", "directory"])
def path(request, untied, tmp_path_factory):
    """A GGUF in float32, whose rows of q and k are permuted, and a directory in bfloat16."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "directory":
        return save_model(untied, folder / "model", "bfloat16")
    export_gguf(untied, Allocation.uniform(untied, "F32"), folder / "model.gguf")
    return folder / "model.gguf"


@pytest.fixture
def both(path):
    """The model in memory and on disk, as bfloat16 from the directory."""
    dtype = "bfloat16" if path.is_dir() else "float32"
    return tuple(load_model(path, dtype, resident=resident) for resident in (True, False))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_tensor_is_the_same_wherever_it_is(both, path):
    resident, stored = both
    assert list(stored.params) == [name for name in ("token_embd", "blk", "output_norm", "output")]
    same(resident.params, stored.in_memory().params)
    same(
        load_model(path, "float16", resident=True).params,
        load_model(path, "float16", resident=False).in_memory().params,
    )
    same(resident.astype("float16").params, stored.astype("float16").in_memory().params)
    for tensor in tensors(resident.spec):
        assert lookup(stored.params, tensor).dtype == lookup(resident.params, tensor).dtype
        some = np.asarray([0, 1, 5]) if tensor.shape[0] > 5 else slice(1, 3)
        for rows in (some, slice(2, 4), slice(None)):
            np.testing.assert_array_equal(rows_of(stored.params, tensor, rows), lookup(resident.params, tensor)[rows])


def test_folding_is_the_same_wherever_weights_are(both):
    scales = {"blk.1.attn_in": np.linspace(0.5, 2, 64), "blk.2.ffn_mid": np.linspace(2, 0.5, 96)}
    resident, stored = (refold(model, scales) for model in both)
    same(resident.params, stored.in_memory().params)
    same(resident.folding, stored.folding)


def test_allocation_bytes_and_scores_are_the_same_wherever_weights_are(both, windows, tmp_path):
    results = []
    for model in both:
        folded, stats = calibrate_and_fold(model, windows, 4)
        found = find_allocator("fisher", levels=(4, 5, 8))
        allocation = allocate(found, folded, stats, budget_bytes=110_000)
        for name in ("reference", "best", "compensated"):
            export_gguf(model, allocation, tmp_path / name, make_encoder(name, windows))
        raw = [(tmp_path / name).read_bytes() for name in ("reference", "best", "compensated")]
        results.append((allocation.formats, raw, np.asarray(evaluate(model, windows, reference=model).nll)))
    (formats, raw, nll), (others, more, beside) = results
    assert formats == others
    assert raw == more
    np.testing.assert_array_equal(nll, beside)


def test_sweeps_read_each_tensor_of_the_blocks_once(path, monkeypatch):
    model, seen, fetch = load_model(path, resident=False), [], StoredParams.fetch
    monkeypatch.setattr(StoredParams, "fetch", lambda self, index: seen.append(index) or fetch(self, index))
    assert [at.index for at in sweep.forward(model.spec, model.params)] == seen == [0, 1, 2]
    seen.clear()
    assert [at.index for at in sweep.backward(model.spec, model.params)] == seen == [2, 1, 0]


def test_large_models_stay_on_disk_unless_asked(path, monkeypatch):
    known = load_model(path, resident=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(known.params))
    for memory, on_disk in ((10 * size, False), (10 * size - 1, True)):
        monkeypatch.setattr("ramp_jax.models.load.available_memory", lambda memory=memory: memory)
        assert isinstance(load_model(path).params, dict) != on_disk


def test_file_that_changes_is_noticed(path, tmp_path):
    copy = tmp_path / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    model = load_model(copy, resident=False)
    file = copy if copy.is_file() else copy / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=rf"{file.name} changed while it was read; leave it as it is"):
        model.params["blk"][1]


def test_hidden_states_that_outgrow_memory_are_the_same(untied, windows, monkeypatch):
    expected = evaluate(untied, windows, reference=untied)
    monkeypatch.setattr(scratch, "LARGEST", 0)
    monkeypatch.setattr(sweep, "_TOKENS_AT_ONCE", 3 * windows.shape[1])
    same(vars(expected), vars(evaluate(untied, windows, reference=untied)))

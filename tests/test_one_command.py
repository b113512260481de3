"""From a model and a budget to a checked file in one command, launch/export_gguf.py, and the guard."""

import dataclasses
import json
import re

import gguf
import numpy as np
import pytest

from ramp_jax.allocation import Allocation, costs, read_saved
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.guard import check, summary
from ramp_jax.models import load_model
from ramp_jax.models.metadata import plain
from ramp_jax.quantization import calibrate, importance_of

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture
def one(untied, untied_directory, tmp_path):
    """Arguments of the whole way; given ones replace or, as None, remove them."""
    table = costs(untied, (4, 5, 8))
    good = {"model": untied_directory, "source_policy": "uniform", "levels": "4,5,8", "context": 24, "count": 2}
    good |= {"budget_bytes": (table.smallest + table.largest) // 2, "encoder": "best", "verify_windows": 2}
    good |= {"output": tmp_path / "model.gguf", "json": tmp_path / "check.json"}
    return lambda **changed: [f"--{name}={value}" for name, value in (good | changed).items() if value is not None]


def test_the_whole_way(call, fails, one, untied_directory, tmp_path):
    """The file is the one that both scripts make; what exists is used again, refused or replaced."""
    code, printed, errors = call("export_gguf", *one())
    assert code == 0, errors
    whole, saved = (tmp_path / "model.gguf").read_bytes(), read_saved(tmp_path / "model.json")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["file_bytes"] == len(whole) <= found["budget_bytes"] == saved["budget_bytes"]
    assert found["rival"]["file_bytes"] <= found["budget_bytes"]
    assert sum(found["levels"].values()) == pytest.approx(1)
    assert found["scored"]["kld"] > 0
    for line in (r"bits per weight +\d", r"llama.cpp's \w+ +[\d,]+ bytes", r"run it +llama-cli -m .*model.gguf -c 256"):
        assert re.search(line, printed)
    recipe = plain(load_model(str(tmp_path / "model.gguf")).metadata)
    assert recipe["ramp.allocation_sha256"] == saved["sha256"]
    assert (recipe["ramp.allocator"].strip(), recipe["ramp.encoder"].strip()) == ("uniform", "best")
    assert recipe["ramp.budget_bytes"] == saved["budget_bytes"]
    assert recipe["ramp.file_bpw"] == pytest.approx(found["file_bpw"])

    apart = one(output=tmp_path / "alloc.json", verify_windows=None, json=None)
    assert call("allocate", *apart)[0] == 0
    model, allocation = f"--model={untied_directory}", f"--allocation={tmp_path / 'alloc.json'}"
    assert call("export_gguf", model, allocation, f"--output={tmp_path / 'two.gguf'}")[0] == 0
    assert (tmp_path / "two.gguf").read_bytes() == whole

    assert "model.gguf exists; choose another name or pass --overwrite" in fails("export_gguf", *one())
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "check.json").unlink()
    assert "model.json holds another allocation" in fails("export_gguf", *one(count=3))
    assert "model.json holds another allocation" in fails("export_gguf", *one(levels="4,5,6,8"))
    code, printed, errors = call("export_gguf", *one(verify_windows=0, json=None))
    assert code == 0, errors
    assert "model.json already holds this allocation" in printed
    assert (tmp_path / "model.gguf").read_bytes() == whole


def test_flags_that_contradict_each_other(fails, one, tmp_path):
    allocation = f"--allocation={tmp_path / 'alloc.json'}"
    assert "--source_policy says who chooses" in fails("export_gguf", *one(source_policy=None))
    assert "no budget given" in fails("export_gguf", *one(budget_bytes=None))
    assert "would be ignored with --allocation" in fails("export_gguf", *one(), allocation)
    assert "--json would be ignored without --verify" in fails("export_gguf", *one(verify_windows=0))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model.json").write_text("a text to calibrate on")
    assert "model.json is the input" in fails("export_gguf", *one(data=tmp_path / "model.json"), "--overwrite")


@pytest.fixture
def checked(untied, windows, tmp_path):
    """Check a file of one format under the budget of another."""
    importance = importance_of(untied.spec, calibrate(untied, windows))

    def run(fmt, budget, guard):
        path = tmp_path / "model.gguf"
        allocation = Allocation.uniform(untied, fmt)
        export_gguf(untied, allocation, path)
        budget_bytes = Allocation.uniform(untied, budget).file_bytes
        allocation = dataclasses.replace(allocation, made={"budget_bytes": budget_bytes})
        found = check(untied, allocation, path, windows, lambda: importance, guard)
        return found, summary(found, path, 64), path

    return run


def test_a_worse_file_is_named_and_replaced(checked, tmp_path):
    """4 bits under a budget of 8, where llama.cpp has a mix of 8."""
    found, said, _ = checked("Q4_0", "Q8_0", "check")
    rival = found["rival"]
    assert rival["mix"] in ("Q6_K", "Q8_0")  # the same on these rows
    assert rival["kld_beyond"] > 5 * rival["kld_beyond_stderr"] > 0
    assert rival["kld_beyond"] == pytest.approx(found["scored"]["kld"] - rival["kld"])
    assert "loses LESS than this file" in said
    found, said, path = checked("Q4_0", "Q8_0", "replace")
    assert found["rival"]["replaced"]
    assert "took the file's place" in said
    assert path.stat().st_size == found["rival"]["file_bytes"] == found["file_bytes"]
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert "Q8_0" in types
    assert "Q4_0" not in types
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_better_file_stays(checked):
    found, said, _ = checked("Q8_0", "Q8_0", "replace")
    assert not found["rival"]["replaced"]
    assert "LESS" not in said
    assert 0 <= found["same_tokens"] <= found["written_tokens"] == 32


def test_without_a_rival(checked, monkeypatch):
    assert checked("Q4_0", "Q8_0", "off")[0]["rival"] is None
    assert "none of llama.cpp's mixes fits" in checked("Q4_0", "Q4_0", "check")[1]
    monkeypatch.setattr("ramp_jax.halo.guard.free_bytes", lambda path: 1000)
    assert "1,000 are free" in checked("Q4_0", "Q8_0", "check")[1]
    monkeypatch.setattr(llama_quantize, "available", lambda: False)
    found, said, _ = checked("Q4_0", "Q8_0", "check")
    assert (found["rival"], found["ppl_llama_cpp"], found["read_per_second"]) == (None, None, None)
    assert "llama-cpp-python is not installed" in said
    assert np.isfinite(found["scored"]["kld"])

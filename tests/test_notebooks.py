"""The notebooks of launch/colab, cell after cell with small parameters in place of theirs."""

import json
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure

import ramp_jax
from ramp_jax import workflow
from ramp_jax.allocation import costs
from ramp_jax.files import read_rows
from ramp_jax.halo.footprint import Runtime, runtime_bytes
from ramp_jax.models import tensors
from ramp_jax.models.spec import make_spec

pytestmark = pytest.mark.usefixtures("compiled_quickly")

COLAB = Path(__file__).parent.parent / "launch/colab"
SHORT = {"context": 24, "count": 2}
NOT_HERE = {"setup", "colab"}  # installs packages, downloads through the browser


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(notebook, parameters in place of those of its cell) → its variables, and the values that its cells end with."""

    def cells(name, **parameters):
        monkeypatch.chdir(tmp_path)
        notebook = json.loads((COLAB / name).read_text(encoding="utf-8"))
        variables, shown = {}, []
        for cell in notebook["cells"]:
            tags = set(cell["metadata"].get("tags", ()))
            if cell["cell_type"] != "code" or tags & NOT_HERE:
                continue
            assert cell["outputs"] == []
            *lines, last = "".join(cell["source"]).splitlines()
            with jax.numpy_dtype_promotion("standard"):
                exec("\n".join(lines), variables)
                try:
                    shown.append(eval(last, variables))
                except SyntaxError:  # of a statement
                    exec(last, variables)
            if "parameters" in tags:
                assert parameters.keys() <= variables.keys()
                variables |= parameters
        return variables, shown

    return cells


def test_a_gguf_that_fits_memory(run, untied_directory, untied, tmp_path):
    memory = (costs(untied, (4, 5, 8)).smallest * 5 // 4) + runtime_bytes(untied.spec, Runtime(100))
    calibration = {"source": "builtin", **SHORT}
    sizes = {"MEMORY": memory, "CONTEXT": 100, "CALIBRATION": calibration, "HELDOUT": SHORT}
    variables, shown = run("allocate.ipynb", MODEL=str(untied_directory), **sizes)
    size = (tmp_path / "model.gguf").stat().st_size
    assert size == variables["size"] == variables["allocation"].file_bytes
    assert 0 <= memory - runtime_bytes(untied.spec, Runtime(100)) - size < 5000
    assert any(isinstance(value, Figure) for value in shown)
    assert 0 < shown[-1]["kld"] < 1


def test_a_policy_is_trained_and_compared(run, untied_directory, tmp_path):
    model = str(untied_directory)
    sizes = {"WINDOWS": SHORT, "MEASURED": SHORT, "HELDOUT": SHORT, "LEVELS": (4, 5, 8), "ITERATIONS": 2, "SHARE": 0.8}
    variables, shown = run("train_policy.ipynb", MODELS=(model,), TARGET=model, **sizes)
    assert (tmp_path / "ramp-policy/policy.msgpack").is_file()
    assert sum(isinstance(value, Figure) for value in shown) == 2
    found = variables["found"]
    assert found.keys() == {"policy", "uniform"}
    assert max(row["bytes"] for row in found.values()) <= variables["budget"]
    assert found["policy"]["kld"] < found["uniform"]["kld"]
    assert ramp_jax.load_policy(tmp_path / "ramp-policy").levels == (4, 5, 8)
    assert read_rows(tmp_path / "ramp-policy" / workflow.METRICS)[-1]["iteration"] == 2


def test_the_memory_that_the_notebook_asks_for_leaves_five_bits():
    """Sizes of the default model, Qwen3-0.6B; 4 to 7 bits a weight are neither damage nor waste."""
    cells = json.loads((COLAB / "allocate.ipynb").read_text(encoding="utf-8"))["cells"]
    chosen = {}
    exec("".join(next(c["source"] for c in cells if "parameters" in c["metadata"].get("tags", ()))), chosen)
    assert chosen["MODEL"] == "Qwen/Qwen3-0.6B"
    width = {"n_layers": 28, "d_model": 1024, "n_heads": 16, "n_kv_heads": 8, "head_size": 128, "d_ff": 3072}
    rest = {"vocab_size": 151936, "context_length": 40960, "rope_theta": 1e6, "norm_eps": 1e-6, "tied": True}
    spec = make_spec("qwen3", **width, **rest)
    left = chosen["MEMORY"] - runtime_bytes(spec, Runtime(chosen["CONTEXT"]))
    assert 4 < 8 * left / sum(tensor.size for tensor in tensors(spec)) < 7

"""Eight forced host devices beside one: the same statistics, allocation and bytes, whatever divides or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import VOCABULARY, drawn, save
from transformers import LlamaConfig, LlamaForCausalLM

from ramp_jax import data, devices, workflow
from ramp_jax.allocation import Allocation, costs
from ramp_jax.checkpoint import digest
from ramp_jax.config import WindowsConfig
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import allocatable, load_model, sharding
from ramp_jax.policy.inference import find_allocator
from ramp_jax.quantization import calibrate, recorded_encoder
from ramp_jax.scoring.perplexity import evaluate
from ramp_jax.sensitivity.exact import exact_sensitivity

HEADS = {"even": (4, 2), "odd": (6, 3)}
"""Of queries, and of keys and values: each of two devices has half of them, or not."""

MESHES = {"all along data": None, "4x2": (4, 2)}
CASES = [("all along data", "odd"), ("4x2", "even"), ("4x2", "odd")]
ONE = "one device"
ENCODED = ("4x2, odd", f"{ONE}, odd")
"""Where the whole way to a file is gone, which compiles for long."""

LEVELS = (4.0, 8.0)


def save_model(folder, heads, kv_heads):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return save(drawn(LlamaForCausalLM(config), seed=heads), folder)


def losses(folder):
    """Statistics and losses of three windows, and some of the exact table, as JSON holds them."""
    model = load_model(folder)
    windows = data.windows("builtin", model.tokenizer, context=24, count=3)
    members = [tensor.name for tensor in allocatable(model.spec)]
    table = exact_sensitivity(model, windows, LEVELS, tensors=[members[3], members[-1]])
    return {
        "moments": digest(calibrate(model, windows).moments),
        "nll": evaluate(model, windows, reference=model).nll.tolist(),
        "exact": table.kld.tolist(),
    }


def exported(folder, output):
    """Formats by tensor, and the digest of the exported file."""
    model, path, gguf = load_model(folder), Path(output) / "allocation.json", Path(output) / "model.gguf"
    reach = costs(model, LEVELS)
    allocator, budget = find_allocator("fisher", levels=LEVELS), (reach.smallest + reach.largest) // 2
    allocation = workflow.allocate(model, allocator, budget, WindowsConfig("builtin", 24, 3), path, str(folder))
    export_gguf(model, allocation, gguf, recorded_encoder(Allocation.load(path, model), model))
    return [dict(allocation.formats), digest(np.fromfile(gguf, np.uint8))]


def found_on(count, folders, output):
    """What every model finds on every mesh, or on one device, and the one that is exported."""
    found = {}
    for mesh, shape in MESHES.items() if count > 1 else [(ONE, None)]:
        if count > 1:
            devices.use(None if shape is None else devices.make_mesh(*shape))
            assert devices.current().size == count
        for name, folder in folders.items():
            if count > 1 and (mesh, name) not in CASES:
                continue
            found[f"{mesh}, {name}"] = losses(folder)
            if f"{mesh}, {name}" in ENCODED:
                found["exported"] = exported(folder, output)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(save_model(root / name, *heads)) for name, heads in HEADS.items()}


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """What processes of eight devices and of one find, by mesh and model; compiled quickly rather than well."""
    processes, found = {}, {}
    for count in (8, 1):
        output = tmp_path_factory.mktemp("found")
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={count}"
        settings = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        run = [sys.executable, __file__, str(count), json.dumps(folders), str(output)]
        processes[output] = subprocess.Popen(run, env=settings, stderr=subprocess.PIPE, text=True)
    for output, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        found[process.args[2]] = json.loads((output / "found.json").read_text())
    return found


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_eight_devices_lose_what_one_does(found, mesh, name):
    eight, one = found["8"][f"{mesh}, {name}"], found["1"][f"{ONE}, {name}"]
    assert eight["moments"] == one["moments"]
    np.testing.assert_allclose(eight["nll"], one["nll"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(eight["exact"], one["exact"], rtol=1e-5)


def test_eight_devices_write_the_file_that_one_does(found):
    formats, content = found["1"]["exported"]
    assert len(set(formats.values())) > 1
    assert found["8"]["exported"] == [formats, content]


def test_rows_of_matrices_are_cut_where_every_part_fills_its_tiles(folders):
    block = load_model(folders["odd"]).spec.blocks[0]
    cut = {weight.name for weight in block.weights if sharding.spec_of(weight, 2) == P(devices.MODEL)}
    assert cut == {f"{name}.weight" for name in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    assert sharding.spec_of(block.weights[1], 1) == P(devices.MODEL)
    assert all(sharding.spec_of(weight, 8) == P() for weight in block.weights)


def test_one_device_passes_on_what_it_gets(rng):
    x = rng.normal(size=(3, 4))
    assert devices.current() is None
    assert devices.placed(x) is x
    assert devices.along_data(lambda a: a, x) is x
    assert next(devices.each(lambda a, b: (a, b), [(x,)], x)) == (x, x)


@pytest.mark.parametrize("mesh", ["2x2", "1x3"])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(call, tied_directory, mesh):
    code, _, err = call("evaluate", f"--model={tied_directory}", f"--mesh={mesh}")
    assert code == 1
    assert f"a mesh of {mesh} has places for" in err
    assert "there is 1" in err
    assert err.count("\n") == 1


def test_a_mesh_is_two_numbers(call, tied_directory):
    code, _, err = call("evaluate", f"--model={tied_directory}", "--mesh=4")
    assert code == 1
    assert "must be two numbers, as in 4x2" in err


if __name__ == "__main__":
    import conftest  # noqa: F401, the same strict flags

    count, folders, output = int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    (output / "found.json").write_text(json.dumps(found_on(count, folders, output)))

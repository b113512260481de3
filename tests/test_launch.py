"""The scripts as people run them: the whole way on a tiny model, and one sentence for every bad input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from ramp_jax import cli, data, journal, workflow
from ramp_jax.allocation import Allocation, costs, read_saved
from ramp_jax.files import alone_in
from ramp_jax.halo.footprint import Runtime, runtime_bytes
from ramp_jax.models import load_model
from ramp_jax.policy import embedding
from ramp_jax.policy.inference import load_policy
from ramp_jax.quantization import DEFAULT_ENCODER

sys.path.append(str(Path(__file__).parent.parent / "launch"))
from benchmarks import kills

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CONFIG = """
from ml_collections import ConfigDict
from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

def get_config():
    short = WindowsConfig(context=24, count=2)
    sac = SacConfig(hidden=(8,), batch_size=8)
    train = TrainConfig(iterations=4, episodes=4, updates=2, replay_iterations=2, log_every=2, sac=sac)
    return ConfigDict(as_dict(RunConfig(
        models=({model!r},), dtype="float32", calibration=short, sensitivity=short, train=train)))
"""
WINDOWS = ("--context=24", "--count=2")
OTHER = ("--context=24", "--count=3")
"""What the allocation is calibrated on, other windows than those of the training run."""


def begun(cache, name, *arguments):
    """A script in a process of its own, as from a shell.

    Compiled quickly rather than well, and only once for all processes that share `cache`.
    """
    settings = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, LAUNCH / f"{name}.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=os.environ | settings)


def script(cache, name, *arguments):
    """Run a script to its end; returns what it printed."""
    process = begun(cache, name, *arguments)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return printed


def killed(step, cache, name, *arguments):
    """Kill a script as soon as it has kept `step`, a file of its journal."""
    process = begun(cache, name, *arguments)
    while process.poll() is None and not step.exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert step.exists()


@dataclasses.dataclass(frozen=True)
class Run:
    """Files of a run that went the whole way, and what its scripts printed."""

    model: str
    config: Path
    cache: Path
    workdir: Path
    allocation: Path
    exported: Path
    budget: int
    smaller: int
    printed: dict


@pytest.fixture(scope="module")
def whole(untied_directory, untied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    table = costs(untied, (4, 5, 8))
    run = Run(
        model=str(untied_directory),
        config=folder / "config.py",
        cache=folder / "compiled",
        workdir=folder / "run",
        allocation=folder / "alloc.json",
        exported=folder / "out.gguf",
        budget=(table.smallest + table.largest) // 2,
        smaller=(3 * table.smallest + table.largest) // 4,
        printed={},
    )
    run.config.write_text(CONFIG.format(model=run.model))
    at, policy = f"--workdir={run.workdir}", f"--source_policy={run.workdir}"
    allocation = f"--allocation={run.allocation}"
    output = f"--output={run.allocation}"
    steps = {
        "train": (f"--config={run.config}", at),
        "allocate": (f"--model={run.model}", policy, f"--budget_bytes={run.budget}", output, *OTHER),
        "export_gguf": (f"--model={run.model}", allocation, f"--output={run.exported}"),
        "compare": (at, allocation, f"--gguf={run.exported}", f"--budgets={run.smaller}", *WINDOWS),
        "report": (at, allocation),
    }
    for name, arguments in steps.items():
        run.printed[name] = script(run.cache, name, *arguments)
    return run


@pytest.fixture
def allocate(whole):
    """Arguments of a good call of launch/allocate.py; given ones replace or, as None, remove them."""

    def arguments(**changed):
        good = {"model": whole.model, "source_policy": whole.workdir, "budget_bytes": whole.budget}
        good |= {"output": whole.workdir.parent / "other.json", "context": 24, "count": 3}
        return [f"--{name}={value}" for name, value in (good | changed).items() if value is not None]

    return arguments


def test_the_whole_way(whole, untied):
    """Every file is there and nothing half-written; sizes are those predicted; all rows are in table and page."""
    names = {path.name for path in whole.workdir.iterdir()}
    assert names >= {"config.json", "policy.msgpack", "metrics.jsonl", "comparison.json"}
    assert f"sensitivity-{Path(whole.model).name}.npz" in names
    assert names >= {"report.html", "allocation.png", "training.png"}
    assert not [path for path in whole.workdir.parent.rglob("*.partial")]
    allocation = Allocation.load(whole.allocation, untied)
    assert whole.exported.stat().st_size == allocation.file_bytes <= whole.budget
    assert f"{allocation.file_bytes:,} bytes" in whole.printed["export_gguf"]
    every = json.loads((whole.workdir / "comparison.json").read_text())["rows"]
    rows = [row for row in every if row["budget_bytes"] in (None, whole.budget)]
    kinds = ["reference F16", "uniform Q5_1", "llama.cpp", "knapsack", "RAMP policy"]
    assert [kind for kind, row in zip(kinds, rows, strict=True) if row["name"].startswith(kind)] == kinds
    page = (whole.workdir / "report.html").read_text()
    for row in every:
        assert row["name"] in whole.printed["compare"]
        assert row["name"] in page
        assert f"{row['file_bytes']:,}" in whole.printed["report"]
        assert row["ppl_llama_cpp"] == pytest.approx(row["ppl"], rel=0.05)
        assert row["kld_stderr"] > 0
    for row in rows:
        path = whole.exported if row["name"] == "RAMP policy" else whole.workdir / row["file"]
        assert path.stat().st_size == row["file_bytes"]
    assert all(row["file_bytes"] <= whole.budget for row in rows[1:])
    assert rows[0]["ppl_llama_cpp"] == pytest.approx(rows[0]["ppl"], rel=1e-3)
    assert 0 <= rows[0]["kld"] < 1e-3 < rows[1]["kld"]


def test_a_comparison_at_another_budget(whole):
    """Every method chooses anew; errors are paired with the policy's; only files of the allocation's budget stay."""
    rows = json.loads((whole.workdir / "comparison.json").read_text())["rows"]
    assert [row["budget_bytes"] for row in rows[1:]] == sorted(row["budget_bytes"] for row in rows[1:])
    smaller = [row for row in rows if row["budget_bytes"] == whole.smaller]
    assert {row["method"] for row in smaller} >= {"uniform", "knapsack", "RAMP policy"}
    assert all(row["file_bytes"] <= whole.smaller for row in smaller)
    assert smaller[-1]["seconds"] is None
    for group in (smaller, [row for row in rows if row["budget_bytes"] == whole.budget]):
        *others, ours = group
        assert ours["method"] == "RAMP policy"
        assert ours["kld_beyond"] is None
        for row in others:
            assert row["kld_beyond"] == pytest.approx(row["kld"] - ours["kld"], rel=1e-4, abs=1e-7)
            assert row["kld_beyond_stderr"] < row["kld_stderr"] + ours["kld_stderr"]
    kept = {row["file"] for row in rows if row["file"]} - {whole.exported.name}
    assert {path.name for path in whole.workdir.glob("*.gguf")} == kept


def test_metrics_hold_one_row_per_scan(whole):
    rows = [json.loads(line) for line in (whole.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [2, 4]
    assert all(len(row["loss_over_uniform"]) == 2 for row in rows)


def test_second_training_reuses_the_first(whole, call):
    before = {path: path.stat().st_mtime_ns for path in whole.workdir.iterdir() if path.suffix != ".png"}
    code, printed, _ = call("train", f"--config={whole.config}", f"--workdir={whole.workdir}")
    assert code == 0
    assert "already holds the policy" in printed
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_second_comparison_reuses_the_first(whole, call):
    before = (whole.workdir / "comparison.json").read_bytes()
    arguments = (f"--workdir={whole.workdir}", f"--allocation={whole.allocation}", f"--gguf={whole.exported}")
    code, printed, _ = call("compare", *arguments, f"--budgets={whole.smaller}", *WINDOWS)
    assert code == 0
    assert "already holds this comparison" in printed
    assert (whole.workdir / "comparison.json").read_bytes() == before


def test_a_training_that_is_killed_twice_ends_with_the_same_files(whole, tmp_path):
    """Where it has measured a little, then where it has learned a little: all bytes are those of the run that was not
    killed, but for the seconds that the table records. More kills are in the suite `kills`."""
    run = tmp_path / "run"
    arguments = (f"--config={whole.config}", f"--workdir={run}")
    for file in (workflow.table_path(run, whole.model), run / workflow.CHECKPOINT):
        killed(file, whole.cache, "train", *arguments)
    script(whole.cache, "train", *arguments)
    found, expected = kills.contents(run), kills.contents(whole.workdir)
    assert found.keys() > {"config.json", "policy.msgpack", "checkpoint.msgpack", "metrics.jsonl", "training.png"}
    assert found == {name: expected[name] for name in found}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_second_run_in_a_workdir_is_told_who_works_there(fails, whole):
    with alone_in(whole.workdir):
        error = fails("train", f"--config={whole.config}", f"--workdir={whole.workdir}")
    assert re.search(rf"another run works on .* \(process {os.getpid()} on .* since .*\); wait for its end", error)


def test_a_killed_allocation_goes_on(whole, allocate, fails, tmp_path):
    output = tmp_path / "alloc.json"
    killed(journal.beside(output) / "calibrating 1.step", whole.cache, "allocate", *allocate(output=output))
    assert not output.exists()
    assert "(changed: calibration tokens)" in fails("allocate", *allocate(output=output, context=23))
    script(whole.cache, "allocate", *allocate(output=output))
    assert list(tmp_path.iterdir()) == [output]
    first, second = (json.loads(path.read_text()) for path in (whole.allocation, output))
    assert first.pop("seconds") != second.pop("seconds")
    assert first == second


def test_a_killed_export_goes_on(whole, tmp_path):
    """What a second run finds already written stays as it is, so that what it makes alone shows."""
    output = tmp_path / "out.gguf"
    arguments = (f"--model={whole.model}", f"--allocation={whole.allocation}", f"--output={output}")
    killed(journal.beside(output) / "encoding.step", whole.cache, "export_gguf", *arguments)
    assert not output.exists()
    script(whole.cache, "export_gguf", *arguments)
    assert list(tmp_path.iterdir()) == [output]
    assert output.read_bytes() == whole.exported.read_bytes()


def test_budgets_in_every_unit(whole, call, allocate, untied, tmp_path):
    output = tmp_path / "alloc.json"
    for budget, limit in (({"budget_gb": whole.budget / 1e9}, whole.budget), ({"budget_bits": 6.0}, None)):
        code, _, errors = call("allocate", *allocate(budget_bytes=None, **budget, output=output))
        assert code == 0, errors
        allocation = Allocation.load(output, untied)
        assert allocation.file_bytes <= limit if limit else 4.5 <= allocation.linear_bpw <= 6.0


def test_budget_that_memory_leaves(call, fails, allocate, untied, tmp_path):
    """Room for the context goes first, by default all of it; more memory than the largest file needs gives that."""
    output, table = tmp_path / "alloc.json", costs(untied, (4, 5, 8))
    short, long = (runtime_bytes(untied.spec, Runtime(n)) for n in (100, untied.spec.context_length))
    for memory, context, beside, limit in (
        (f"{table.smallest + short}B", 100, short, table.smallest),
        ("2MiB", None, long, min(table.largest, (2 << 20) - long)),
        ("8GiB", 100, short, table.largest),
    ):
        arguments = allocate(budget_bytes=None, fit_memory=memory, fit_context=context, output=output)
        code, printed, errors = call("allocate", *arguments)
        assert code == 0, errors
        assert f"Budget: {limit:,} bytes" in printed
        parts = re.search(r"KV cache ([\d,]+), compute buffer ([\d,]+), output buffer ([\d,]+) bytes", printed).groups()
        assert sum(int(part.replace(",", "")) for part in parts) == beside
        assert limit - 5000 <= Allocation.load(output, untied).file_bytes <= limit
    output.unlink()
    common = {"budget_bytes": None, "fit_context": 100, "output": output}
    for wrong, said in (
        ({"fit_memory": f"{table.smallest + short - 1}B"}, "choose more memory or a shorter context"),
        ({"fit_memory": "lots"}, "as in 8GiB"),
        ({"fit_memory": "8GiB", "fit_context": 1000}, "between 1 and the 256 that the model was made for"),
        ({"fit_memory": "8GiB", "fit_context": 0}, "fit_context=0"),
        ({"budget_gb": 0.001}, "--fit_context would be ignored without --fit_memory"),
    ):
        assert said in fails("allocate", *allocate(**(common | wrong)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5GB", 1_500_000_000), ("512MiB", 512 << 20), ("8 gib", 8 << 30), ("2G", 2 * 10**9)]
    + [("10kb", 10_000), ("77B", 77), ("77", 77), ("1TiB", 1 << 40)]
    + [(wrong, None) for wrong in ("", "GiB", "8iB", "-1GB", "8 G i B", "8GiBs", "1e9", "8,5GB")],
)
def test_sizes_with_units(text, size):
    assert cli.parse_bytes(text) == size


def test_dry_run_prints_the_range_and_writes_nothing(call, allocate, untied, tmp_path):
    table = costs(untied, (4, 5, 8))
    code, printed, _ = call("allocate", *allocate(output=tmp_path / "alloc.json"), "--dry_run")
    assert code == 0
    assert f"{table.smallest:,} to {table.largest:,} bytes" in printed
    arguments = allocate(budget_bytes=None, output=tmp_path / "alloc.json")
    code, printed, errors = call("allocate", *arguments, "--dry_run")
    assert code == 0, errors
    assert f"{table.smallest:,} to {table.largest:,} bytes" in printed
    assert list(tmp_path.iterdir()) == []


def test_exported_file_scores_as_its_row(whole, call, tmp_path):
    row = json.loads((whole.workdir / "comparison.json").read_text())["rows"][-1]
    """Also where the allocation was calibrated on other windows than the run whose comparison it is."""
    for backend, column, rel in (("jax", "ppl", 1e-3), ("llama.cpp", "ppl_llama_cpp", 0.2)):  # 8-bit activations
        output = tmp_path / "numbers.json"
        arguments = (f"--model={whole.exported}", f"--backend={backend}", f"--json={output}", *WINDOWS)
        code, printed, errors = call("evaluate", *arguments, f"--reference={whole.model}")
        assert code == 0, errors
        found = json.loads(output.read_text())
        assert found["ppl"] == pytest.approx(row[column], rel=1e-4)
        assert found["kld"] == pytest.approx(row["kld"], rel=rel)
        assert f"{found['ppl']:.4f} ± {found['ppl_stderr']:.4f}" in printed
        assert f"{found['kld']:.6f} ± {found['kld_stderr']:.6f}" in printed


def test_encoders_by_name_and_by_imatrix(whole, call, untied, tmp_path):
    """The default is the recorded one; an importance matrix of the same windows makes the same rounding."""
    assert json.loads(whole.allocation.read_text())["encoder"] == DEFAULT_ENCODER
    imatrix, files = tmp_path / "imatrix.gguf", {}
    code, printed, errors = call("calibrate", f"--model={whole.model}", f"--output={imatrix}", *OTHER)
    assert code == 0, errors
    assert "72 tokens" in printed
    for name, choice in {
        "plain": "--encoder=reference",
        "again": "--encoder=best",
        "given": f"--imatrix={imatrix}",
    }.items():
        arguments = (f"--model={whole.model}", f"--allocation={whole.allocation}", f"--output={tmp_path / name}")
        code, _, errors = call("export_gguf", *arguments, choice)
        assert code == 0, errors
        files[name] = (tmp_path / name).read_bytes()[gguf.GGUFReader(tmp_path / name).data_offset :]
    assert files["plain"] != whole.exported.read_bytes()[-len(files["plain"]) :]
    different = np.frombuffer(files["again"], np.uint8) != np.frombuffer(files["given"], np.uint8)
    assert np.mean(different) < 1e-3


def test_accuracy_of_the_exported_file(whole, call, tmp_path):
    output = tmp_path / "numbers.json"
    arguments = (f"--model={whole.exported}", f"--reference={whole.model}", "--tasks=passages", "--limit=4")
    code, printed, errors = call("evaluate", *arguments, f"--json={output}")
    assert code == 0, errors
    found = json.loads(output.read_text())
    assert found["passages"]["examples"] == 4
    assert re.search(rf"passages +4 +{found['passages']['acc']:.2%} ± ", printed)
    assert re.search(rf"mean +{found['mean']['score']:.2%} +{found['mean']['reference']:.2%}", printed)


def test_inputs_that_cannot_be_evaluated(fails, whole, tmp_path):
    """One sentence each, and no file of numbers."""
    (tmp_path / "short.txt").write_text("Too short.")
    output, model = tmp_path / "numbers.json", f"--model={whole.model}"
    for arguments, sentence in {
        (model, f"--data={tmp_path / 'short.txt'}", *WINDOWS): "tokens, fewer than one window of 24",
        (model, f"--data={tmp_path / 'none.txt'}", *WINDOWS): "is not a file; pass a text file, builtin, stdlib",
        (model, "--data=hf:a:b", *WINDOWS): "offline choices are builtin or a text file",
        (model, "--protocol=sliding"): "windows of 2048 tokens are longer than the 256",
        (model, "--backend=llama.cpp"): "llama.cpp scores a .gguf; make one with launch/export_gguf.py",
        (model, "--tasks=passages", "--backend=llama.cpp"): "--tasks runs in JAX only; leave --backend out",
        (model, f"--allocation={whole.allocation}", "--split=all", *WINDOWS): "score it with --split=heldout",
    }.items():
        assert sentence in fails("evaluate", *arguments, f"--json={output}")
    assert not output.exists()


def test_calibration_text_is_known_by_what_it_says(fails, call, whole, tmp_path):
    """Under another name, and to an exported file; any other text may be scored as a whole."""
    text = data.read_text("builtin")
    (tmp_path / "copy.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(text[: len(text) // 50], encoding="utf-8")
    copy, other = (f"--data={tmp_path / '.' / name}.txt" for name in ("copy", "other"))
    sources = {
        whole.allocation: (f"--model={whole.model}", f"--allocation={whole.allocation}"),
        "the file": (f"--model={whole.exported}",),
        " the file": (f"--model={whole.exported}", "--backend=llama.cpp"),
    }
    for name, arguments in sources.items():
        sentence = f"{str(name).strip()} was calibrated on the first four fifths of"
        assert sentence in fails("evaluate", *arguments, copy, "--split=all", *WINDOWS)
    code, _, errors = call("evaluate", f"--model={whole.exported}", other, "--split=all", *WINDOWS)
    assert code == 0, errors


ALL_FLAGS = {
    "train": "config workdir tokenizer_from config.FIELD",
    "calibrate": "model output data context count",
    "allocate": "model from_gguf fold levels encoder mesh hosts patience budget_bytes fit_memory fit_context",
    "export_gguf": "model allocation output encoder imatrix shard_size recipe mesh hosts",
    "evaluate": "model reference encoder mesh tasks json",
    "compare": "workdir allocation gguf encoder budgets source_policy model data",
    "report": "workdir allocation gguf output",
    "pretrain": "config output report json",
    "benchmark": "suite record repeats synthetic_layers kills_count",
}
"""By script, flags that its help must show, also those that other modules define."""


@pytest.mark.parametrize("name", ALL_FLAGS)
def test_help_shows_the_command_and_all_flags(call, name):
    code, printed, _ = call(name, "--help")
    assert code == 0
    assert f"    python launch/{name}.py --" in printed
    assert [flag for flag in ALL_FLAGS[name].split() if f"--{flag}" not in printed.replace("[no]", "")] == []
    assert "chex" not in printed


def broken_models(tmp_path, whole):
    """Name → (reference, what the sentence must say)."""
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    (empty / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architectures": ["BloomForCausalLM"]}')
    (foreign / "model.safetensors").write_bytes(b"")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.exported.read_bytes()[:-5000])
    return {
        "unknown": ("smollm3", "'smollm3' is neither a file, a directory, a hub id .* nor one of smollm2-135m"),
        "missing": (tmp_path / "nowhere", "is neither a file"),
        "without safetensors": (empty, r"needs config.json and \*.safetensors; save the model with"),
        "truncated": (cut, "cut.gguf is not a whole GGUF file .* download or export it again"),
        "architecture": (foreign, "BloomForCausalLM is not supported; supported are LlamaForCausalLM"),
    }


@pytest.mark.parametrize("kind", ["unknown", "missing", "without safetensors", "truncated", "architecture"])
def test_models_that_cannot_be_read(fails, whole, allocate, tmp_path, kind):
    reference, sentence = broken_models(tmp_path, whole)[kind]
    output = tmp_path / "output"
    output.mkdir()
    assert re.search(sentence, fails("allocate", *allocate(model=reference, output=output / "alloc.json")))
    arguments = (f"--model={reference}", f"--allocation={whole.allocation}", f"--output={output / 'out.gguf'}")
    assert re.search(sentence, fails("export_gguf", *arguments))
    assert list(output.iterdir()) == []


def test_nothing_is_allocated_or_exported_without_a_vocabulary(call, fails, allocate, whole, tmp_path):
    bare, allocation, output = tmp_path / "bare", tmp_path / "alloc.json", tmp_path / "out.gguf"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(whole.model) / name, bare)
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(bare)))
    arguments = allocate(model=bare, source_policy="uniform", output=allocation)
    export = (f"--model={bare}", f"--output={output}", "--encoder=reference")
    for name, given in {
        "allocate": arguments,
        "export_gguf": (*export, f"--allocation={whole.allocation}"),
        "calibrate": (f"--model={bare}", f"--output={output}", *WINDOWS),
        "evaluate": (f"--model={bare}", *WINDOWS),
        "train": (f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"),
    }.items():
        assert "name a GGUF of the same vocabulary with --tokenizer_from=FILE.gguf" in fails(name, *given)
    assert not allocation.exists()
    assert not output.exists()
    vocabulary = f"--tokenizer_from={whole.exported}"
    code, _, errors = call("allocate", *arguments, vocabulary)
    assert code == 0, errors
    code, _, errors = call("export_gguf", *export, f"--allocation={allocation}", vocabulary)
    assert code == 0, errors
    text = data.read_text("builtin")[:500]
    assert load_model(output).tokenizer.encode(text) == load_model(whole.model).tokenizer.encode(text)


def test_outputs_that_are_inputs(fails, allocate, whole, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(whole.exported)
    same = {
        "allocate": allocate(model=whole.exported, output=link),
        "export_gguf": (f"--model={link}", f"--allocation={whole.allocation}", f"--output={whole.exported}"),
        "calibrate": (f"--model={whole.exported}", f"--output={link}"),
        "evaluate": (f"--model={whole.model}", f"--reference={whole.exported}", f"--json={link}"),
    }
    for name, arguments in same.items():
        assert re.search(r"the output .* is the input .*; choose another output", fails(name, *arguments))
    target = tmp_path / "alloc.json"
    shutil.copy(whole.allocation, target)
    given = (f"--model={whole.model}", f"--allocation={target}", f"--output={target}")
    assert "alloc.json is the input" in fails("export_gguf", *given)
    knapsack = next(whole.workdir.glob("knapsack-*.gguf"))
    given = (f"--workdir={whole.workdir}", f"--allocation={whole.allocation}", f"--gguf={knapsack}")
    assert "gguf is the input" in fails("compare", *given)
    given = (f"--config={whole.config}", f"--workdir={whole.model}")
    assert "config.json is the input" in fails("train", *given)


def test_machines_that_are_too_small(fails, allocate, whole, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        given = (f"--model={whole.model}", f"--allocation={whole.allocation}", f"--output={tmp_path / 'out.gguf'}")
        needed = f"needs {whole.exported.stat().st_size:,} bytes on disk, and 1,000 are free"
        assert needed in fails("export_gguf", *given)
    monkeypatch.setattr("ramp_jax.resources.available_memory", lambda: 1000)
    error = fails("allocate", *allocate(output=tmp_path / "alloc.json"))
    assert re.search(r"needs [\d,]{7,} bytes of memory, and 1,000 are available", error)


@pytest.mark.parametrize("source", ["fisher", "pretrained", "greedy"])
def test_allocation_without_training(call, allocate, whole, untied, tmp_path, source):
    """By the estimate alone, or by the policy of the package: the file fits and holds what its rows allow."""
    output = tmp_path / "alloc.json"
    code, printed, errors = call("allocate", *allocate(source_policy=source, output=output))
    assert code == 0, errors
    allocation = Allocation.load(output, untied)
    assert 0.9 * whole.budget < allocation.file_bytes <= whole.budget
    assert f"{allocation.file_bytes:,} of {whole.budget:,} bytes" in printed
    assert set(allocation.formats.values()) <= {"IQ4_NL", "Q5_0", "Q5_1", "Q8_0"}


@pytest.mark.parametrize("source", ["uniform", "random", "llama.cpp"])
def test_allocation_by_a_rule(call, allocate, whole, untied, tmp_path, source):
    output = tmp_path / "alloc.json"
    code, _, errors = call("allocate", *allocate(source_policy=source, output=output))
    assert code == 0, errors
    assert Allocation.load(output, untied).file_bytes <= whole.budget
    assert read_saved(output)["allocator"] == source


def test_evolution_needs_evaluations_and_chooses_its_levels(call, fails, allocate, whole, untied, tmp_path):
    arguments = allocate(source_policy="evolution", output=tmp_path / "alloc.json")
    assert "say how many with --refine_evals=N." in fails("allocate", *arguments)
    code, _, errors = call("allocate", *arguments, "--refine_evals=3", "--levels=4,8")
    assert code == 0, errors
    allocation = Allocation.load(tmp_path / "alloc.json", untied)
    assert allocation.file_bytes <= whole.budget
    assert set(allocation.formats.values()) <= {"IQ4_NL", "Q8_0"}
    notes = read_saved(tmp_path / "alloc.json")
    assert (notes["allocator"], notes["refine_evals"]) == ("evolution", 3)


def test_mixes_take_no_levels_and_no_evaluations(fails, allocate):
    for more in ("--levels=4,5", "--refine_evals=2"):
        sentence = "llama.cpp's mixes choose among formats of their own; leave --levels and --refine_evals out"
        assert sentence in fails("allocate", *allocate(source_policy="llama.cpp"), more)


def test_refined_allocation(call, allocate, whole, untied, tmp_path):
    """Three true evaluations on calibration text: the file says so, fits, and is no other at the next call."""
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    for output in outputs:
        code, _, errors = call("allocate", *allocate(output=output), "--refine_evals=3")
        assert code == 0, errors
    first, again = (Allocation.load(output, untied) for output in outputs)
    assert first.file_bytes <= whole.budget
    assert first.formats == again.formats
    assert read_saved(outputs[0])["refine_evals"] == 3


def test_training_with_the_model_in_the_loop(whole, tmp_path):
    """Tables corrected by true losses, through the script: the score is of true losses, and a policy comes out."""
    arguments = (f"--config={whole.config}", f"--workdir={tmp_path}", "--config.train.evaluator=mixed")
    script(whole.cache, "train", *arguments)
    plain = json.loads((whole.workdir / "metrics.jsonl").read_text().splitlines()[0])
    mixed = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert plain["return"] == mixed["return"]  # nothing was measured before the first scan
    assert plain["loss_over_uniform"] != mixed["loss_over_uniform"]
    assert load_policy(tmp_path).levels == (4, 5, 8)


def test_training_on_a_model_that_is_mistyped_can_be_repeated(fails, whole, tmp_path):
    """The folder does not remember the mistake."""
    arguments = (f"--config={whole.config}", f"--workdir={tmp_path / 'run'}", "--config.models=('smollm3',)")
    assert "'smollm3' is neither" in fails("train", *arguments)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("unit", "budget"), [("bytes", 1000), ("bytes", 10**9), ("gb", 5.0), ("bits", 2.0), ("bits", 9)]
)
def test_budget_that_cannot_be_met(fails, allocate, untied, tmp_path, unit, budget):
    table = costs(untied, (4, 5, 8))
    arguments = allocate(**{"budget_bytes": None, f"budget_{unit}": budget, "output": tmp_path / "alloc.json"})
    error = fails("allocate", *arguments)
    assert f"choose between {table.smallest:,} and {table.largest:,} bytes" in error
    assert list(tmp_path.iterdir()) == []


def test_budget_that_is_not_given(fails, allocate):
    every = "give one of --budget_bytes, --budget_gb, --budget_bits, --fit_memory."
    assert f"no budget given; {every}" in fails("allocate", *allocate(budget_bytes=None))
    assert f"--budget_bytes and --budget_gb given; {every}" in fails("allocate", *allocate(budget_gb=1.0))


def test_flags_that_are_wrong(fails, allocate, whole, tmp_path):
    assert "--model must have a value" in fails("allocate", *allocate(model=None))
    assert "--output is missing" in fails("allocate", *allocate(output=None))
    assert "Did you mean: budget_bytes" in fails("allocate", *allocate(budget_byte=5))
    assert "unexpected argument 'alloc.json'" in fails("allocate", *allocate(), "alloc.json")
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "nowhere.py" in fails("train", f"--config={tmp_path / 'nowhere.py'}", workdir)
    for wrong, nearest in {
        "sed": "seed",
        "train.iteration": "train.iterations",
        "seed.x": "seed",
        "models[9]": "models",
    }.items():
        error = fails("train", f"--config={whole.config}", workdir, f"--config.{wrong}=1")
        assert f"has no {wrong}; the nearest that it has is --config.{nearest}." in error
    sentence = "levels is (4, 4), expected levels by increasing size among 2, 3, 4"
    assert sentence in fails("train", f"--config={whole.config}", workdir, "--config.levels=(4,4)")
    needy = ("--config.levels=IQ2_XS,8", "--config.encoder=reference")
    sentence = "IQ2_XS is rounded by importance only, which encoder=reference goes without"
    assert sentence in fails("train", f"--config={whole.config}", workdir, *needy)
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(fails, allocate, whole, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", tmp_path / "nowhere" / "out", tmp_path):
        assert "cannot write" in fails("allocate", *allocate(output=output))
        arguments = (f"--model={whole.model}", f"--allocation={whole.allocation}", f"--output={output}")
        assert "cannot write" in fails("export_gguf", *arguments)
    workdir = tmp_path / "file" / "run"
    assert "choose another --workdir" in fails("train", f"--config={whole.config}", f"--workdir={workdir}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_policy_that_does_not_serve(fails, allocate, whole, tmp_path):
    output = tmp_path / "alloc.json"
    policy = dataclasses.replace(load_policy(whole.workdir), embedding_version=embedding.VERSION + 1)
    (tmp_path / "newer").mkdir()
    policy.save(tmp_path / "newer")
    error = fails("allocate", *allocate(source_policy=tmp_path / "newer", output=output))
    assert f"version {embedding.VERSION + 1} of the embedding" in error
    assert "holds no policy.msgpack" in fails("allocate", *allocate(source_policy=tmp_path, output=output))
    assert not output.exists()


def test_workdir_of_another_config(fails, whole):
    before = (whole.workdir / workflow.CONFIG).read_bytes()
    error = fails("train", f"--config={whole.config}", f"--workdir={whole.workdir}", "--config.seed=1")
    assert "holds a run with another seed (0, not 1); choose another --workdir" in error
    assert (whole.workdir / workflow.CONFIG).read_bytes() == before


def test_allocation_of_another_model(fails, whole, tied_directory, tmp_path):
    output = tmp_path / "out.gguf"
    arguments = (f"--model={tied_directory}", f"--allocation={whole.allocation}", f"--output={output}")
    assert "made for another model" in fails("export_gguf", *arguments)
    assert not output.exists()


def test_report_and_comparison_before_their_time(fails, whole, tmp_path):
    assert "--allocation is missing" in fails("report")
    assert "allocation.json is no file, where an allocation was expected" in fails("report", f"--workdir={tmp_path}")
    files = (f"--allocation={whole.allocation}", f"--gguf={whole.exported}")
    assert "is not the workdir of a training run" in fails("compare", f"--workdir={tmp_path}", *files)
    missing = (f"--allocation={whole.allocation}", f"--gguf={tmp_path / 'nowhere.gguf'}")
    assert "write it with launch/export_gguf.py" in fails("compare", f"--workdir={whole.workdir}", *missing, *WINDOWS)
    other = tmp_path / "other.json"
    saved = {name: value for name, value in read_saved(whole.allocation).items() if name != "sha256"}
    other.write_text(json.dumps(saved | {"model": "somewhere/else"}))
    named = (f"--workdir={whole.workdir}", f"--allocation={other}", f"--gguf={whole.exported}")
    assert "was made for somewhere/else, and the run learned on" in fails("compare", *named, *WINDOWS)


def test_comparison_of_a_file_that_is_not_the_allocation_s(fails, whole, tmp_path):
    uniform = tmp_path / "uniform.gguf"
    shutil.copy(whole.workdir / "uniform-Q5_1.gguf", uniform)
    arguments = (f"--workdir={whole.workdir}", f"--allocation={whole.allocation}", f"--gguf={uniform}", *WINDOWS)
    assert re.search("holds .* as Q5_1, the allocation says (Q[58]_0|IQ4_NL)", fails("compare", *arguments))


def test_an_allocation_without_training_is_compared_and_reported(fails, call, allocate, whole, tmp_path):
    allocation, gguf, folder = tmp_path / "alloc.json", tmp_path / "out.gguf", tmp_path / "compared"
    model, file = f"--model={whole.model}", f"--allocation={allocation}"
    steps = {
        "allocate": (*allocate(source_policy="fisher", output=allocation), "--encoder=reference", "--levels=4,5,8"),
        "export_gguf": (model, file, f"--output={gguf}"),
        "report": (file,),
    }
    for name, arguments in steps.items():
        code, _, errors = call(name, *arguments)
        assert code == 0, errors
    page = (tmp_path / "report.html").read_text()
    assert "predicted; not measured" in page
    assert "--source_policy=fisher --levels=4,5,8" in page
    given = (f"--workdir={folder}", file, f"--gguf={gguf}", *WINDOWS)
    assert "say with --model what was allocated for" in fails("compare", *given)
    assert "--source_policy would be ignored without --budgets" in fails("compare", *given, model, "--source_policy=x")
    budgets = f"--budgets={whole.smaller}"
    assert "was made by fisher, and greedy is greedy" in fails(
        "compare", *given, model, budgets, "--source_policy=greedy"
    )
    code, _, errors = call("compare", *given, model, budgets)
    assert code == 0, errors
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows if row["kld_beyond"] is None] == ["reference", "fisher", "fisher"]
    assert {row["method"] for row in rows} == {"reference", "uniform", "llama.cpp", "fisher"}
    code, _, errors = call("report", file, f"--workdir={folder}")
    assert code == 0, errors
    page = (folder / "report.html").read_text()
    assert "Quality and size" in page
    assert "<h2>Training</h2>" not in page
    assert "compares another allocation" in fails("report", f"--allocation={whole.allocation}", f"--workdir={folder}")


SMALL = (
    f"--config={ROOT / 'configs' / 'ref_llama.py'}",
    "--data=stdlib:json",
    "--config.vocab_size=300",
    "--config.context=24",
    *(f"--config.decoder.{name}=32" for name in ("d_model", "d_ff", "head_size", "context_length")),
    "--config.decoder.n_layers=1",
    "--config.optimizer.steps=5",
)


def test_pretraining_and_its_report(call, fails, tmp_path):
    output, numbers = tmp_path / "ref", tmp_path / "numbers.json"
    code, printed, errors = call("pretrain", *SMALL, f"--output={output}")
    assert code == 0, errors
    assert "Held-out text: 5." in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ref", "ref.run"]
    assert f"{output} exists already; delete it" in fails("pretrain", *SMALL, f"--output={output}")
    report = (f"--report={output}", "--data=stdlib:json", "--count=1", f"--json={numbers}")
    code, printed, errors = call("pretrain", *report, "--context=24")
    assert code == 0, errors
    rows = json.loads(numbers.read_text())
    assert [row["level"] for row in rows] == [4, 5, 6, 8]
    assert all(f"{row['kld']:.4f}" in printed for row in rows)
    assert "pass --config and --output to train, or --report=MODEL" in fails("pretrain", *SMALL)

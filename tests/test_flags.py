"""Flags of the scripts: what no flag takes, what would be ignored, and inputs that an output may not replace."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from ramp_jax import data
from ramp_jax.allocation import Allocation, costs
from ramp_jax.checkpoint import digest
from ramp_jax.formats import DEFAULT_LEVELS
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import load_model
from ramp_jax.overrides import parse_override
from ramp_jax.policy import networks
from ramp_jax.policy.env import CONTEXT
from ramp_jax.policy.inference import Policy
from ramp_jax.sensitivity.table import Sensitivity

ROOT = Path(__file__).parent.parent
WINDOWS = ("--context=24", "--count=2")


@pytest.fixture
def allocate(untied, untied_directory, tmp_path):
    """Arguments of a good call of launch/allocate.py; given ones replace or, as None, remove them."""

    def arguments(**changed):
        table = costs(untied, (4, 5, 8))
        good = {"model": untied_directory, "source_policy": "uniform", "context": 24, "count": 2}
        good |= {"budget_bytes": (table.smallest + table.largest) // 2, "output": tmp_path / "alloc.json"}
        return [f"--{name}={value}" for name, value in (good | changed).items() if value is not None]

    return arguments


@pytest.fixture
def exported(untied, tmp_path):
    export_gguf(untied, Allocation.uniform(untied, "F16"), tmp_path / "exported.gguf")
    return tmp_path / "exported.gguf"


def test_flags_that_would_be_ignored(fails, allocate):
    """Each is refused before any work: no model is looked for."""
    model, small = "--model=nowhere", f"--config={ROOT / 'configs' / 'ref_llama.py'}"
    for name, arguments, sentence in (
        ("evaluate", (model, "--encoder=best"), "--encoder would be ignored without --allocation"),
        ("evaluate", (model, "--trust_calibration"), "--trust_calibration would be ignored without --all"),
        ("evaluate", (model, "--limit=4", "--task_path=x"), "--task_path and --limit would be ignored without --tasks"),
        ("evaluate", (model, "--tasks=passages", "--split=all"), "--split would be ignored with --tasks"),
        ("evaluate", (model, "--tasks=passages", "--context=24"), "--context would be ignored with --tasks"),
        ("evaluate", (model, "--backend=llama.cpp", "--dtype=bfloat16"), "ignored by llama.cpp, without --reference"),
        ("allocate", (*allocate(), "--patience=9"), "--patience would be ignored without --hosts"),
        ("allocate", allocate(fit_context=9), "--fit_context would be ignored without --fit_memory"),
        ("allocate", (*allocate(), "--device=gpu", "--parallel=2"), "--parallel and --device would be ignored without"),
        ("pretrain", ("--report=ref-llama", "--workdir=x"), "--workdir would be ignored with --report"),
        ("pretrain", (small, "--output=x", "--json=y"), "--json would be ignored without --report"),
        ("pretrain", (small, "--output=x", "--workdir=./x"), "--workdir and --output are one folder"),
    ):
        assert sentence in fails(name, *arguments)


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("budget_bytes", ("nan", "inf", "0", "-1", "1.5", HUGE)),
        ("budget_gb", ("nan", "inf", "-inf", "0", "-1", "1e400", HUGE)),
        ("budget_bits", ("nan", "inf", "0", "-4", "65", "1e400", HUGE)),
        ("fit_memory", ("nan", "inf", "-8GiB", HUGE, f"{HUGE}GiB")),
        ("kv_type", ("q5_0", "", "f16,", "f16,f16,f16", "F16")),
        ("parallel", ("0", "257", "nan")),
        ("device", ("cuda", "")),
        ("levels", ("", "4,", "7", "nan", "4,x", "²", HUGE)),
        ("dtype", ("int8", "bool", "float64", "float8_e4m3fn", "")),
        ("context", ("nan", "1", "-1", "1.5")),
        ("count", ("nan", "0", "-1")),
        ("patience", ("nan", "inf", "0", "-1")),
        ("refine_evals", ("nan", "-1")),
        ("mesh", ("0x1", "nan", "1", "1x1x1")),
    ],
)
def test_values_that_no_flag_takes(fails, allocate, flag, values):
    for value in values:
        error = fails("allocate", *allocate(budget_bytes=None), f"--{flag}={value}")
        assert error.startswith(f"error: flag --{flag}=")
        assert error.endswith(" (--help lists the flags)")


@pytest.mark.parametrize("source", ["fisher", "greedy", "uniform", "random"])
def test_levels_are_what_rules_choose_among(call, allocate, untied, source):
    table = costs(untied, (4, 5))
    code, printed, errors = call(
        "allocate", *allocate(source_policy=source, budget_bytes=table.largest), "--levels=5,4", "--dry_run"
    )
    assert code == 0, errors
    assert f"{table.smallest:,} to {table.largest:,} bytes" in printed


def test_formats_that_an_encoder_cannot_make(fails, allocate):
    said = fails("allocate", *allocate(source_policy="fisher"), "--levels=IQ2_XXS,8", "--encoder=reference")
    assert "IQ2_XXS is rounded by importance only, which encoder=reference goes without" in said


def test_sizes_that_are_said_to_be_reachable_are(call):
    """Also where a tensor that is kept takes most of the bits, so that the blocks need the smallest formats."""
    kept = "token_embd.weight=F16"
    table = costs(load_model("ref-llama"), DEFAULT_LEVELS, [parse_override("keep", kept)])
    size = table.smallest + 4096
    arguments = ("--model=ref-llama", "--source_policy=fisher", f"--keep={kept}", f"--budget_bytes={size}", "--dry_run")
    code, said, _ = call("allocate", *arguments)
    assert code == 0
    assert f"{table.smallest:,} to {table.largest:,} bytes" in said


def test_windows_longer_than_the_model(fails, allocate, untied_directory, exported, tmp_path):
    """The number is said before anything is calibrated or trained."""
    output, config = f"--output={tmp_path / 'out'}", f"--config={ROOT / 'configs' / 'smollm2_135m.py'}"
    models = f"--config.models=('{untied_directory}',)"
    for name, arguments in {
        "allocate": allocate(context=257),
        "calibrate": (f"--model={untied_directory}", output, "--context=257"),
        "train": (
            config,
            models,
            f"--workdir={tmp_path / 'run'}",
            "--config.calibration.context=24",
            "--config.sensitivity.context=257",
        ),
        "evaluate": (f"--model={exported}", "--backend=llama.cpp", "--context=257"),
        "pretrain": (f"--report={untied_directory}", "--context=257"),
    }.items():
        assert "windows of 257 tokens are longer than the 256 that the model was made for" in fails(name, *arguments)
    assert {path.name for path in tmp_path.rglob("*")} == {"exported.gguf", "run"}


def test_text_that_only_the_allocation_names(call, fails, untied, untied_directory, tmp_path, monkeypatch):
    """A file outside is read only where that is allowed; one in the working folder, and what was named, without."""
    (tmp_path / "here").mkdir()
    outside, inside = tmp_path / "outside.txt", tmp_path / "here" / "text.txt"
    for text in (outside, inside):
        text.write_text(data.read_text("builtin")[:20_000], encoding="utf-8")
    (tmp_path / "here" / "link.txt").symlink_to(outside)
    windows, allocation = data.windows(str(outside), untied.tokenizer, context=24, count=2), tmp_path / "alloc.json"
    how = {"context": 24, "count": 2, "text": data.fingerprint(str(outside)), "tokens": digest(windows)}

    def calibrated_on(name):
        made = dataclasses.replace(Allocation.uniform(untied, "Q5_0"), calibration={"data": str(name), **how})
        made.save(allocation, encoder="best")
        return (f"--model={untied_directory}", f"--allocation={allocation}")

    output = f"--output={tmp_path / 'out.gguf'}"
    monkeypatch.chdir(tmp_path / "here")
    for name in (outside, "../outside.txt", "link.txt", "/dev/zero", "hf:a:b:c"):
        error = fails("export_gguf", *calibrated_on(name), output)
        assert f"its calibration text '{name}', which lies outside" in error
        assert "pass --trust_calibration where that may be read, else --imatrix=FILE or --encoder=reference" in error
    assert not (tmp_path / "out.gguf").exists()
    assert "lies outside" in fails("evaluate", *calibrated_on(outside), *WINDOWS)
    for name, script, *more in (
        (outside, "export_gguf", output, "--trust_calibration"),
        (outside, "evaluate", f"--data={outside}", *WINDOWS),
        ("text.txt", "export_gguf", output, "--overwrite"),
        (inside, "export_gguf", output, "--overwrite"),
    ):
        code, printed, errors = call(script, *calibrated_on(name), *more)
        assert code == 0, errors
        assert f"Calibration text, as the allocation says: {name}\n" in printed
    code, printed, errors = call("export_gguf", *calibrated_on(outside), output, "--encoder=reference", "--overwrite")
    assert code == 0, errors
    assert "Calibration text" not in printed
    assert "text.txt is the input" in fails("export_gguf", *calibrated_on("text.txt"), f"--output={inside}")


def test_outputs_that_are_inputs_of_an_allocation(fails, allocate, tmp_path):
    """A policy in its folder, and a table."""
    actor = networks.actor((8,)).init(jax.random.key(0), 11 + CONTEXT)
    Policy(actor, (8,), (4, 5, 8), 4.5, ("tiny",)).save(tmp_path)
    Sensitivity(("a",), (4, 5, 8), np.ones((1, 3)), np.zeros(1)).save(tmp_path / "table.npz")
    for source, output in ((tmp_path, "policy.msgpack"), (tmp_path / "table.npz", "table.npz")):
        given = allocate(source_policy=source, output=tmp_path / output)
        assert f"{output} is the input" in fails("allocate", *given)

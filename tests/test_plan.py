"""What a dry run says: that it is what the job would make, and that programs can read it."""

import json

import numpy as np
import pytest

from ramp_jax import workflow
from ramp_jax.allocation import costs
from ramp_jax.halo.footprint import Runtime, footprint
from ramp_jax.halo.plan import described, make_plan, plan_json, read_plan
from ramp_jax.models import allocatable
from ramp_jax.overrides import parse_override
from ramp_jax.policy import inference
from ramp_jax.policy.inference import find_allocator

KEPT = (parse_override("keep", "output.weight=F16"),)


@pytest.fixture
def planned(untied):
    """The plan of an allocator between its smallest and its largest file, its table and its budget."""

    def make(name, *, evaluations=0, share=0.5, runtime=None, tokens=48):
        found = find_allocator(name, evaluations=evaluations)
        table = costs(untied, found.levels, KEPT)
        smallest, largest = found.reach(untied, table)
        budget = smallest + int(share * (largest - smallest))
        return make_plan(untied, "tiny", found, table, budget, runtime or Runtime(200), tokens), found, budget

    return make


@pytest.mark.parametrize("name", ["uniform", "random", "llama.cpp"])
def test_what_needs_sizes_alone_is_what_will_be_chosen(untied, planned, name, monkeypatch):
    plan, found, budget = planned(name)
    importance = {tensor.name: np.ones(tensor.shape[-1], np.float32) for tensor in allocatable(untied.spec)}
    monkeypatch.setattr(inference, "importance_of", lambda *_: importance)
    made = inference.allocate(found, untied, None, budget_bytes=budget, overrides=KEPT)
    assert plan["example"]["chosen_by"] == plan["allocator"] == name
    assert plan["example"]["formats"] == made.formats
    assert plan["example"]["file_bytes"] == made.file_bytes <= budget == plan["budget_bytes"]
    assert made.formats["output.weight"] == "F16"


@pytest.mark.parametrize(("name", "evaluations"), [("fisher", 0), ("pretrained", 0), ("evolution", 5)])
def test_uniform_stands_for_whoever_needs_the_model(planned, name, evaluations):
    plan, _, budget = planned(name, evaluations=evaluations)
    uniform, _, _ = planned("uniform")
    assert plan["example"]["chosen_by"] == "uniform"
    assert plan["example"] == uniform["example"]
    assert plan["example"]["file_bytes"] <= budget
    assert sum(plan["example"]["share"].values()) == pytest.approx(1)
    assert "as uniform would choose" in described(plan)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_memory_of_every_context(untied, planned, device):
    """The parts make the whole; a GPU holds neither the embedding nor the output buffer."""
    plan, _, _ = planned("uniform", runtime=Runtime(200, parallel=2, device=device))
    (row,) = plan["memory"]
    beside = footprint(untied.spec, Runtime(200, parallel=2))
    size = plan["example"]["file_bytes"]
    assert (row["context"], row["parallel"]) == (200, 2)
    assert (row["cache"], row["compute"]) == (beside.cache, beside.compute)
    assert row["output"] == (0 if device == "gpu" else beside.output)
    assert row["weights"] < size if device == "gpu" else row["weights"] == size
    assert row["total"] == row["weights"] + row["cache"] + row["compute"] + row["output"]


def test_work_grows_with_what_is_asked(planned):
    """By tokens, estimates and true evaluations, which also hold the weights once per level."""
    least, _, _ = planned("uniform")
    more, _, _ = planned("fisher")
    tokens, _, _ = planned("fisher", tokens=10**6)
    most, _, _ = planned("fisher", evaluations=10**4, tokens=10**6)
    seconds = [plan["seconds"] for plan in (least, more, tokens, most)]
    assert seconds == sorted(set(seconds))
    assert least["work_memory"] == more["work_memory"] < most["work_memory"]


def test_programs_read_it(planned, tmp_path):
    plan, _, _ = planned("uniform")
    path = tmp_path / "plan.json"
    path.write_text(plan_json(plan))
    assert read_plan(path) == plan
    for changed, cause in (
        ({"version": 2}, "version is 2, expected 1"),
        ({"memory": [{"context": 3}]}, r"it lacks the field|lacks"),
        ({"seconds": "soon"}, "seconds is 'soon', expected a finite number"),
        ({"more": 1}, "it has no field 'more'"),
    ):
        path.write_text(json.dumps(plan | changed))
        with pytest.raises(ValueError, match=rf"plan.json is not a plan \(.*{cause}.*\); make one with"):
            read_plan(path)


@pytest.fixture
def arguments(untied_directory):
    return (f"--model={untied_directory}", "--source_policy=fisher", "--context=24", "--count=2")


def test_the_script_prints_it_and_writes_nothing_else(call, fails, arguments, untied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decided = [parse_override("keep", "token_embd.weight=q8_0")]
    size = costs(untied, find_allocator("fisher").levels, decided).smallest + 5000
    asked = (*arguments, f"--budget_bytes={size}", "--keep=token_embd.weight=q8_0", "--dry_run", "--parallel=2")
    code, printed, errors = call("allocate", *asked, "--json=-")
    assert code == 0, errors
    plan = json.loads(printed)
    assert plan["example"]["formats"]["token_embd.weight"] == "Q8_0"
    assert plan["overrides"] == decided
    assert {row["parallel"] for row in plan["memory"]} == {2}
    assert list(tmp_path.iterdir()) == []
    code, printed, errors = call("allocate", *asked, f"--json={tmp_path / 'plan.json'}")
    assert code == 0, errors
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    assert "tokens: " in printed
    refused = fails("allocate", *arguments, f"--budget_bytes={size}", "--json=x.json", "--output=y.json")
    assert "--json would be ignored without --dry_run" in refused


def test_nothing_is_calibrated_for_what_cannot_be(fails, arguments, untied, tmp_path, monkeypatch):
    """The range is that of the overrides and of the allocator."""
    monkeypatch.setattr(workflow, "allocate", lambda *_: pytest.fail("calibrated"))
    common = (*arguments, f"--output={tmp_path / 'alloc.json'}")
    kept = costs(untied, find_allocator("fisher").levels, KEPT)
    error = fails("allocate", *common, "--keep=output.weight=F16", f"--budget_bytes={kept.smallest - 1}")
    assert f"choose between {kept.smallest:,} and {kept.largest:,} bytes" in error
    mixes = find_allocator("llama.cpp")
    smallest, _ = mixes.reach(untied, costs(untied, mixes.levels))
    error = fails("allocate", *common, "--source_policy=llama.cpp", f"--budget_bytes={smallest - 1}")
    assert f"choose between {smallest:,} and " in error
    for flag, said in (
        ("--keep=x", "is no PATTERN=FORMAT"),
        ("--floor=blk.9.*=Q5_0", "matches no matrix"),
        ("--ceiling=*=Q6_K", "no multiple of the 256"),
    ):
        assert said in fails("allocate", *common, f"--budget_bytes={kept.smallest}", flag)
    assert list(tmp_path.iterdir()) == []

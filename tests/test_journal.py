"""What a job keeps: whole or not at all, for the same inputs, of one process at a time."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ramp_jax import checkpoint, journal, sweep
from ramp_jax.journal import NOWHERE, Journal, beside
from ramp_jax.quantization import calibrate_and_fold

pytestmark = pytest.mark.usefixtures("compiled_quickly")

INPUTS = {"model": "a", "windows": "b"}

KILLED_AGAIN_AND_AGAIN = """
import contextlib, os, signal, sys, time
from pathlib import Path
import numpy as np
from ramp_jax.journal import Journal

def job(count):
    with Journal(Path(sys.argv[1]), {}) as journal:
        kept = journal.load("state") or {"count": 0, "x": np.zeros(1 << 16)}
        while kept["count"] < count:
            kept = {"count": kept["count"] + 1, "x": kept["x"] + 1}
            journal.save(f"result-{kept['count']}", kept["count"])
            journal.save("state", kept)

def written():
    path = Path(sys.argv[1]) / "state.step"
    return path.stat().st_mtime_ns if path.exists() else 0

last = 0
for pause in np.random.default_rng(0).uniform(0, 0.02, size=12):
    before = written()
    if not (child := os.fork()):
        job(10**9)
    while written() == before:  # a busy machine may take long to get there
        time.sleep(0.001)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with contextlib.suppress(KeyboardInterrupt), Journal(Path(sys.argv[1]), {}) as journal:
        kept = journal.load("state") or {"count": 0, "x": np.zeros(1 << 16)}
        assert kept["count"] >= last and (kept["x"] == kept["count"]).all()
        last = kept["count"]
        assert all(journal.load(f"result-{n + 1}") == n + 1 for n in range(last))
        raise KeyboardInterrupt
job(last + 1)
print(last)
"""


@pytest.fixture
def folder(tmp_path):
    return beside(tmp_path / "out.json")


def stopped(folder, inputs, **steps):
    """A run that saved some steps before it was interrupted."""
    with contextlib.suppress(KeyboardInterrupt), Journal(folder, inputs) as kept:
        for step, tree in steps.items():
            kept.save(step, tree)
        raise KeyboardInterrupt


def test_trees_come_back_as_they_were(folder, rng):
    tree = {
        "x": rng.normal(size=(3, 5)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "turned": rng.integers(0, 9, size=(2, 3)).T,
        "scalar": jnp.float32(0.1),
        "none": np.zeros((0, 4), np.int8),
        "plain": [None, "text", 3, 0.1, True],
    }
    stopped(folder, INPUTS, one=tree)
    with Journal(folder, INPUTS) as kept:
        found = kept.load("one")
        assert kept.load("other") is None
    assert found.keys() == tree.keys()
    assert found["plain"] == tree["plain"]
    for name in tree.keys() - {"plain"}:
        assert found[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(found[name], tree[name])
    assert not folder.exists()


def test_what_is_no_array_is_refused(folder):
    with pytest.raises(TypeError, match="no set"), Journal(folder, INPUTS) as kept:
        kept.save("one", {"x": {1}})
    assert not folder.exists()


def test_a_file_with_any_byte_changed_is_not_believed(folder):
    with Journal(folder, INPUTS) as kept:
        kept.save("one", {"x": np.arange(9)})
        (path,) = folder.glob("one*")
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert kept.load("one") is None
            path.write_bytes(whole[:at])
            assert kept.load("one") is None
        path.write_bytes(whole)
        assert kept.load("one")["x"].tolist() == list(range(9))


def test_other_inputs_are_refused_by_name_once_there_is_something_to_lose(folder):
    stopped(folder, INPUTS)
    assert not folder.exists()
    folder.mkdir()
    (folder / "inputs.json").write_text(json.dumps({"model": "as a kill before the first step leaves it"}))
    stopped(folder, INPUTS, one=1)
    for changed, names in ({"windows": "c"}, "windows"), ({"model": "c", "code": "d"}, "code, model"):
        with pytest.raises(ValueError, match=rf"other inputs has done \(changed: {names}\); restore these to go on"):
            Journal(folder, INPUTS | changed)
    with Journal(folder, INPUTS) as kept:
        assert kept.load("one") == 1
    stopped(folder, INPUTS, one=1)
    (folder / "inputs.json").write_text("[")
    with pytest.raises(ValueError, match=r"changed: model, windows"):
        Journal(folder, INPUTS)


def test_a_job_killed_at_any_moment_goes_on(folder):
    job = subprocess.run([sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, folder], stdout=subprocess.PIPE, text=True)
    assert job.returncode == 0
    assert int(job.stdout) >= 12
    assert not folder.exists()


def test_two_runs_do_not_work_on_one_folder(folder):
    with Journal(folder, INPUTS) as kept:
        with pytest.raises(OSError, match=r"another run works on .*journal \(process \d+ on .*\); wait for its end"):
            Journal(folder, INPUTS)
        kept.save("one", 1)
        assert kept.load("one") == 1
    with Journal(folder, INPUTS) as kept:
        assert kept.load("one") is None


def test_a_step_that_does_not_fit_the_disk_leaves_the_old_one(folder, monkeypatch):
    with Journal(folder, INPUTS) as kept:
        kept.save("one", 1)
        with monkeypatch.context() as full:
            full.setattr(journal, "_write", lambda file, tree: Path("/dev/full").write_bytes(b"x"))
            with pytest.raises(OSError, match=r"one\.step \(No space left on device\): it needs 24 bytes, and [\d,]+"):
                kept.save("one", np.zeros(3))
        assert kept.load("one") == 1
        assert len(list(folder.glob("one*"))) == 1


def test_files_that_are_not_the_journals_stay(folder):
    with Journal(folder, INPUTS) as kept:
        kept.save("one", 1)
        (folder / "notes.txt").write_text("mine")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    checkpoint.write_bytes(tmp_path / "file", b"")
    with pytest.raises(OSError, match=r"cannot keep steps in .*journal \(Not a directory\); choose another output"):
        Journal(beside(tmp_path / "file" / "out"), INPUTS)


def test_nowhere_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NOWHERE as kept:
        kept.save("one", 1)
        assert kept.load("one") is None
    assert list(tmp_path.iterdir()) == []


def test_a_series_goes_on_where_it_was_or_from_the_start(folder):
    with Journal(folder, INPUTS) as kept:
        assert kept.passed("blocks") == ([], None)
        for index in range(3):
            kept.append("blocks", index, {"x": index}, {"sum": index})
        assert kept.passed("blocks") == ([{"x": 0}, {"x": 1}, {"x": 2}], {"sum": 2})
        (folder / "blocks 1.step").write_bytes(b"")
        assert kept.passed("blocks") == ([], None)


def test_calibration_goes_on_with_the_next_block(folder, untied, windows, monkeypatch):
    whole = calibrate_and_fold(untied, windows, 4.5)
    visited = []
    forward = sweep.forward

    def stopped_before(last):
        def visits(*arguments, **keywords):
            for at in forward(*arguments, **keywords):
                visited.append(at.index)
                if at.index == last:
                    raise KeyboardInterrupt
                yield at

        monkeypatch.setattr(sweep, "forward", visits)
        with Journal(folder, INPUTS) as kept:
            return calibrate_and_fold(untied, windows, 4.5, journal=kept)

    for last in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            stopped_before(last)
    model, stats = stopped_before(None)
    assert visited == [0, 1, 1, 2, 2]
    assert checkpoint.digest((model.params, model.folding)) == checkpoint.digest((whole[0].params, whole[0].folding))
    assert checkpoint.digest(vars(stats)) == checkpoint.digest(vars(whole[1]))

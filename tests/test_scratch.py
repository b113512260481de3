"""Arrays that outgrow memory: like others, but on the disk, and gone with their process."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ramp_jax import scratch

SIZE, PART = 1 << 29, 1 << 24

PART_BY_PART = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from ramp_jax import scratch

def most():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = most()
x = scratch.empty(({SIZE // PART}, {PART // 4}), np.float32)
for index, part in enumerate(x):
    part[:] = index
    scratch.release(part)
for index, part in enumerate(x):
    assert part[0] == part[-1] == index
    scratch.release(part)
print(most() - before, len(os.listdir(sys.argv[1])), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(scratch.FOLDER, str(tmp_path / "large"))
    return tmp_path / "large"


def test_an_array_is_in_a_file_from_its_limit_on(folder, rng):
    small, large = (scratch.empty((5, 4), np.float64, largest) for largest in (160, 159))
    values = rng.normal(size=(5, 4))
    assert small.base is None
    for array in (small, large):
        assert array.shape == (5, 4)
        assert array.dtype == np.float64
        array[:] = values
        scratch.release(array[2:])
        np.testing.assert_array_equal(array, values)
    assert list(folder.iterdir()) == []


def test_memory_holds_a_part_at_a_time_and_a_kill_leaves_nothing(folder):
    child = subprocess.run([sys.executable, "-c", PART_BY_PART, folder], stdout=subprocess.PIPE, text=True)
    most, files = map(int, child.stdout.split())
    assert child.returncode == -9
    assert PART // 2 < most < 2 * PART
    assert files == 0
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_too_full(folder, monkeypatch):
    way_out = f"free some or name another folder with {scratch.FOLDER}"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=rf"large/scratch needs 1,004 bytes on disk, and 1,000 are free; {way_out}"):
        scratch.empty((251,), np.float32, 100)
    monkeypatch.undo()
    monkeypatch.setenv(scratch.FOLDER, str(folder))
    folder.write_text("a file")
    with pytest.raises(OSError, match=rf"cannot keep 1,004 bytes in .*large \(File exists\); {way_out}"):
        scratch.empty((251,), np.float32, 100)

"""What a job needs of the machine, and outputs that are inputs."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ramp_jax import cli, resources, save_model


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose files say what a test writes: (name, content), names as below /."""
    for name in ("_MEMINFO", "_STATM", "_CGROUP", "_CGROUPS"):
        monkeypatch.setattr(resources, name, tmp_path / str(getattr(resources, name)).lstrip("/"))

    def write(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    return write


def test_memory_that_the_kernel_has(machine):
    assert resources.available_memory() == float("inf")
    machine("proc/meminfo", "MemTotal:       16000000 kB\nMemAvailable:    2000000 kB\nHugePages_Total:       0\n")
    assert resources.available_memory() == 2_000_000 * 1024
    resources.check_memory(2_000_000 * 1024, "a model")
    with pytest.raises(OSError, match=r"^a model needs 2,048,000,001 bytes of memory, and 2,048,000,000 are available"):
        resources.check_memory(2_000_000 * 1024 + 1, "a model")


@pytest.mark.parametrize("limited", ["outer", "outer/inner"])
def test_memory_that_a_control_group_leaves(machine, limited):
    machine("proc/self/cgroup", "0::/outer/inner\n")
    for group in ("outer", "outer/inner"):
        machine(f"sys/fs/cgroup/{group}/memory.max", "5000\n" if group == limited else "max\n")
        machine(f"sys/fs/cgroup/{group}/memory.current", "3000\n")
        machine(f"sys/fs/cgroup/{group}/memory.stat", "anon 1500\nactive_file 600\ninactive_file 400\n")
    assert resources.available_memory() == 5000 - 3000 + 1000


def test_memory_that_an_older_control_group_leaves(machine):
    machine("proc/self/cgroup", "5:cpu:/x\n4:memory:/x\n")
    machine("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "5000\n")
    machine("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "3000\n")
    machine("sys/fs/cgroup/memory/x/memory.stat", "cache 1\n")
    assert resources.available_memory() == 2000


def test_disk_that_is_too_full(monkeypatch, tmp_path, untied):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"new needs [\d,]{7} bytes on disk, and 1,000 are free"):
        save_model(untied, tmp_path / "a" / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", [os.link, os.symlink, shutil.copy, None], ids=["hard", "soft", "copy", "same"])
def test_output_that_is_an_input(tmp_path, way):
    source, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(b"GGUF")
    if way is None:
        output = tmp_path / "." / "in.gguf"
    else:
        way(source, output)
    if way is shutil.copy:
        assert cli.check_output_path(output, models=[str(source)]) == output
        return
    for inputs in ({"models": [None, str(source)]}, {"files": [str(source), None]}):
        with pytest.raises(ValueError, match=r"the output .* is the input .*in\.gguf; choose another output"):
            cli.check_output_path(str(output), **inputs)


def test_output_among_the_files_of_a_model(tmp_path):
    for name in ("config.json", "notes.json", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is the input"):
        cli.check_output_path(tmp_path / "config.json", models=[str(tmp_path)])
    with pytest.raises(ValueError, match=r"m-00001-of-00002\.gguf is the input"):
        cli.check_output_path(tmp_path / "m-00001-of-00002.gguf", models=[str(tmp_path / "m-00002-of-00002.gguf")])
    allowed = cli.check_output_path(tmp_path / "notes.json", models=[str(tmp_path), "owner/name"], files=["builtin"])
    assert isinstance(allowed, Path)

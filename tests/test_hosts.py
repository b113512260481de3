"""Two processes of four devices each, on loopback, beside one process: the same outputs, also after one was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ramp_jax import hosts, journal

LAUNCH = Path(__file__).parent.parent / "launch"
PATIENCE = 4


def begun(cache, name, *arguments, devices=4):
    settings = {
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, LAUNCH / f"{name}.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=os.environ | settings)


def both(cache, name, *arguments):
    """The two processes of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    return [begun(cache, name, *arguments, f"--hosts={where},2,{i}", f"--patience={PATIENCE}") for i in range(2)]


def ended(processes):
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def allocation(path):
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def test_two_processes_make_what_one_makes_also_after_one_was_killed(untied_directory, cache, tmp_path):
    model = f"--model={untied_directory}"
    choose = (model, "--source_policy=uniform", "--levels=4,8", "--budget_bytes=110000", "--context=24", "--count=3")
    choose = (*choose, "--dtype=float32", "--encoder=reference")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    ended([begun(cache, "allocate", *choose, f"--output={one}", devices=1)])

    job = both(cache, "allocate", *choose, f"--output={two}")
    while not (journal.beside(two) / "calibrating 0.step").exists():
        assert job[0].poll() is None, job[0].communicate()[1]
        time.sleep(0.01)
    job[1].kill()
    _, errors = job[0].communicate(timeout=60)
    assert job[0].returncode == 1
    assert "process 1 of 2 has not been heard of for" in errors.splitlines()[-1]
    assert job[1].wait() == -signal.SIGKILL
    assert not two.exists()

    ended(both(cache, "allocate", *choose, f"--output={two}"))
    assert allocation(one) == allocation(two)
    write = (model, f"--allocation={one}")
    ended([begun(cache, "export_gguf", *write, f"--output={tmp_path / 'one.gguf'}", devices=1)])
    ended(both(cache, "export_gguf", *write, f"--output={tmp_path / 'two.gguf'}"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("hosts-")}  # of the killed job
    assert left == {"one.json", "two.json", "one.gguf", "two.gguf"}


def test_alone_everything_is_passed_on():
    assert (hosts.index(), hosts.count()) == (0, 1)
    hosts.barrier()
    assert hosts.shared(lambda items: [2 * item for item in items], [1, 2, 3]) == [2, 4, 6]

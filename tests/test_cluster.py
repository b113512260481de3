"""Scripts of `launch/cluster/`: what they would run, and what they do when a job is preempted."""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TPU = {"TPU": "ramp", "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite"}
TPU |= {"NFS": "10.0.0.2:/share"}
GIVEN = ["allocate", "--model=/mnt/ramp/two words", "--budget_gb=3.7"]
JOB = ["launch/allocate.py", "--model=/mnt/ramp/two words", "--budget_gb=3.7", "--hosts=auto"]


def begun(script, *arguments, path="/nowhere", **settings):
    environment = {"PATH": f"{path}:/usr/bin:/bin"} | settings
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["bash", ROOT / "launch" / "cluster" / f"{script}.sh", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def ended(process):
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def programs(folder, **scripts):
    """Stand-ins for programs of a cluster, each of which writes down how it was called."""
    for name, body in scripts.items():
        path = folder / name
        note = f'printf "%q " {name} "$@" >> {folder}/calls; echo >> {folder}/calls'
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        path.chmod(0o755)
    return folder


def calls(folder):
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def test_dry_run_on_slurm():
    code, output, errors = ended(begun("slurm", "--dry_run", *GIVEN))
    assert code == 0, errors
    srun = ["srun", "--kill-on-bad-exit=1", ".venv/bin/python"]
    assert shlex.split(output) == [*srun, *JOB]


def test_slurm_queues_a_job_again_before_its_time_limit(tmp_path):
    path = programs(tmp_path, srun="exec sleep 2 > /dev/null 2>&1", scontrol="")
    process = begun("slurm", *GIVEN, path=path, SLURM_JOB_ID="17")
    while not (tmp_path / "calls").exists():
        assert process.poll() is None, ended(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    code, *_ = ended(process)
    assert code == 1
    assert calls(tmp_path)[-1] == ["scontrol", "requeue", "17"]


def test_slurm_ends_as_the_job_ended(tmp_path):
    code, *_ = ended(begun("slurm", *GIVEN, path=programs(tmp_path, srun="exit 3", scontrol="")))
    assert code == 3
    assert [call[0] for call in calls(tmp_path)] == ["srun"]


def test_dry_run_on_a_tpu_pod(tmp_path):
    path = programs(tmp_path, gcloud="exit 1")
    code, output, errors = ended(begun("tpu_pod", "--dry_run", *GIVEN, path=path, **TPU))
    assert code == 0, errors
    assert not (tmp_path / "calls").exists()
    create, archive, copy, setup, job = [shlex.split(line) for line in output.splitlines()]
    vm, zone = ["gcloud", "compute", "tpus", "tpu-vm"], "--zone=us-west4-a"
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == [*vm, "create", "ramp", *kind, zone]
    assert archive[:2] == ["git", "archive"]
    assert copy == [*vm, "scp", "/tmp/ramp-ramp.tar.gz", "ramp:", "--worker=all", zone]
    for command in (setup, job):
        assert command[:7] == [*vm, "ssh", "ramp", "--worker=all"]
        assert command[-1] == zone
    assert "sudo mount -t nfs 10.0.0.2:/share /mnt/ramp" in setup[-2]
    remote = job[-2].removeprefix("--command=")
    start = ["cd", "ramp", "&&", ".venv/bin/python"]
    assert shlex.split(remote) == [*start, *JOB]


def test_a_preempted_pod_is_made_again(tmp_path):
    """The slice is there; while the job runs it is preempted; on a new one the job ends."""
    (tmp_path / "state").write_text("READY")
    body = f"""
case "$4 $*" in
  describe*) cat {tmp_path}/state ;;
  create*) echo READY > {tmp_path}/state; touch {tmp_path}/new ;;
  ssh*launch/allocate.py*) [ -e {tmp_path}/new ] || {{ echo PREEMPTED > {tmp_path}/state; exit 255; }} ;;
esac"""
    path = programs(tmp_path, gcloud=body, git="")
    code, _, errors = ended(begun("tpu_pod", *GIVEN, path=path, TMPDIR=str(tmp_path), **TPU))
    assert code == 0, errors
    once = ["scp", "ssh", "ssh"]
    assert [call[4] for call in calls(tmp_path) if call[0] == "gcloud"] == [
        "describe",
        *once,
        "describe",
        "describe",
        "delete",
        "create",
        *once,
    ]


def test_a_job_that_fails_on_a_pod_is_not_begun_again(tmp_path):
    body = 'case "$4 $*" in describe*) echo READY ;; ssh*launch*) exit 1 ;; esac'
    path = programs(tmp_path, gcloud=body, git="")
    code, _, errors = ended(begun("tpu_pod", *GIVEN, path=path, TMPDIR=str(tmp_path), **TPU))
    assert code == 1
    assert "the same command goes on where it was" in errors
    assert sum(call[4:5] == ["ssh"] for call in calls(tmp_path)) == 2


@pytest.mark.parametrize(
    ("script", "arguments", "missing", "message"),
    [
        ("slurm", [], {}, "name a script of launch/ first"),
        ("tpu_pod", ["alocate"], TPU, "name a script of launch/ first"),
        ("tpu_pod", GIVEN, TPU | {"NFS": ""}, "NFS is not set"),
    ],
)
def test_what_is_missing_is_named(script, arguments, missing, message):
    code, _, errors = ended(begun(script, *arguments, **missing))
    assert code == 1
    assert message in errors

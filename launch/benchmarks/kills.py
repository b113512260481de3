"""The suite `kills` of launch/benchmark.py: scripts that are killed at random moments and run again.

On a tiny model, one, two or three times in a row a script is killed (SIGKILL) at a moment that is uniform over what it
takes undisturbed, start of the process included; after each kill every file under a final name must be whole. Then it
runs to its end, and its folder must hold what that of the undisturbed run holds and nothing else: the same bytes, but
for the `seconds` that tables and allocations record. `sensitivity` is a training run that mostly measures.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from absl import flags
from benchmarks.measuring import Numbers, said, timed
from benchmarks.zoo import hf_model, save
from flax import serialization

_COUNT = flags.DEFINE_integer("kills_count", 50, "Kills of the suite `kills`, of all scripts together.", lower_bound=1)
_SEED = flags.DEFINE_integer("kills_seed", 0, "Seed of the moments at which the suite `kills` kills.")

_ROOT = Path(__file__).parents[2]
_IN_A_ROW = 3
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
"""Compiled quickly rather than well, once for all runs."""
_CONFIG = """
from ml_collections import ConfigDict
from ramp_jax.config import RunConfig, WindowsConfig, as_dict
from ramp_jax.policy.sac import SacConfig
from ramp_jax.policy.train import TrainConfig

def get_config():
    sac = SacConfig(hidden=(8,), batch_size=8)
    train = TrainConfig(iterations={iterations}, episodes=4, updates=2, replay_iterations=2, log_every=1, sac=sac)
    return ConfigDict(as_dict(RunConfig(models=({model!r},), dtype="float32", levels={levels}, train=train,
        calibration=WindowsConfig(context=24, count=2), sensitivity=WindowsConfig(context=24, count={windows}))))
"""


class Job(NamedTuple):
    """A script with its flags; those that end in a folder get the folder that a run writes to."""

    name: str
    script: str
    flags: tuple[str, ...]
    output: str  # the flag's beginning, to which the folder is added

    def begin(self, folder: Path, settings: Mapping[str, str]) -> subprocess.Popen[str]:
        """The script in a process of its own."""
        command = [sys.executable, "-P", f"launch/{self.script}.py", *self.flags, self.output.format(folder)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])} | settings
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, text=True, cwd=_ROOT, env=environment)

    def finish(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Run it to its end; raises `RuntimeError` with what it said where it fails."""
        process = self.begin(folder, settings)
        errors = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"{self.name} failed: {errors.strip()}")

    def killed(self, folder: Path, settings: Mapping[str, str], moment: float) -> bool:
        """Run it until a moment in seconds; False where it ended before.

        Raises `RuntimeError` where it failed instead.
        """
        process = self.begin(folder, settings)
        try:
            errors = process.communicate(timeout=moment)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True
        if process.returncode:
            raise RuntimeError(f"{self.name} failed: {errors.strip()}")
        return False


def kills(repeats: int) -> dict[str, list[Numbers]]:
    """A row per script; `repeats` is not used."""
    del repeats
    rng = np.random.default_rng(_SEED.value)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = SETTINGS | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        jobs = _jobs(folder, settings)
        counts = [_COUNT.value // len(jobs) + (i < _COUNT.value % len(jobs)) for i in range(len(jobs))]
        pairs = zip(jobs, counts, strict=True)
        return {"rows": [said(_row(job, count, folder / job.name, settings, rng)) for job, count in pairs]}


def _jobs(folder: Path, settings: Mapping[str, str]) -> list[Job]:
    """All five on one model; the allocation to export is made here."""
    model = save(hf_model("llama"), folder / "model")
    sizes = {"train": (8, (4, 5, 8), 1), "sensitivity": (1, (4, 5, 6, 8), 4)}
    for name, (iterations, levels, windows) in sizes.items():
        text = _CONFIG.format(model=str(model), iterations=iterations, levels=levels, windows=windows)
        (folder / f"{name}.py").write_text(text)
    short = (f"--model={model}", "--context=24", "--count=4")
    allocate = (*short, "--source_policy=fisher", "--budget_bits=6")
    allocation = Job("allocation", "allocate", allocate, "--output={}/alloc.json")
    (folder / "allocation").mkdir()
    allocation.finish(folder / "allocation", settings)
    export = (f"--model={model}", f"--allocation={folder / 'allocation' / 'alloc.json'}", "--encoder=compensated")
    return [
        *(Job(name, "train", (f"--config={folder / name}.py",), "--workdir={}/run") for name in sizes),
        Job("calibrate", "calibrate", short, "--output={}/imatrix.gguf"),
        allocation._replace(name="allocate"),
        Job("export", "export_gguf", export, "--output={}/model.gguf"),
    ]


def _row(job: Job, count: int, folder: Path, settings: Mapping[str, str], rng: np.random.Generator) -> Numbers:
    folder.mkdir()
    for name in ("compiling", "undisturbed"):
        (folder / name).mkdir()
        seconds, _ = timed(lambda name=name: job.finish(folder / name, settings))
    found: Counter[str] = Counter()
    for turn in itertools.count():
        if found["kills"] >= count:
            break
        moments = rng.uniform(0, seconds, min(rng.integers(1, _IN_A_ROW + 1), count - found["kills"]))
        again = folder / f"turn {turn}"
        again.mkdir()
        found += trial(job, folder / "undisturbed", again, settings, moments)
    columns = ("kills", "with work begun", "resumed", "equal", "half-written", "left over")
    return {"script": job.name, "seconds": seconds} | {column: found[column] for column in columns}


def trial(
    job: Job, undisturbed: Path, folder: Path, settings: Mapping[str, str], moments: Sequence[float]
) -> Counter[str]:
    """Kill a job at moments one after the other, run it to its end in the same folder, and count what was found."""
    found: Counter[str] = Counter()
    for moment in moments:
        if not job.killed(folder, settings, moment):
            break
        found["kills"] += 1
        found["with work begun"] += any(folder.iterdir())
        pairs = ((path, undisturbed / path.relative_to(folder)) for path in _final(folder))
        found["half-written"] += sum(not _whole(*pair) for pair in pairs)
    if not found["kills"]:
        return found  # it ended before the first moment
    job.finish(folder, settings)
    there, expected = contents(folder), contents(undisturbed)
    found["resumed"] += 1
    found["equal"] += there == expected
    found["left over"] += len(there.keys() - expected.keys())
    return found


def _final(folder: Path) -> list[Path]:
    """Files under final names: not those that a job keeps to go on with."""
    kept = (".journal", ".partial")
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and not any(part.endswith(kept) for part in path.parts)
    ]


def _whole(path: Path, undisturbed: Path) -> bool:
    """Whether a file is all that its kind asks for, where the undisturbed run's may hold a later state."""
    try:
        if path.suffix == ".gguf":
            return path.read_bytes() == undisturbed.read_bytes() and bool(gguf.GGUFReader(path).fields)
        if path.suffix == ".msgpack":
            return bool(serialization.msgpack_restore(path.read_bytes()))
        return bool(_content(path))
    except Exception:
        return False


def contents(folder: Path) -> dict[str, Any]:
    """Everything that lies in a folder, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _content(path) for path in paths}


def _content(path: Path) -> Any:
    """What a file holds, without the seconds that it records."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return {name: value for name, value in json.loads(raw).items() if name != "seconds"}
    if path.suffix == ".jsonl":
        return raw if [json.loads(line) for line in raw.splitlines()] and raw.endswith(b"\n") else None
    if path.suffix == ".npz":
        with np.load(io.BytesIO(raw)) as table:
            return {name: table[name].tobytes() for name in table.files if name != "seconds"}
    return raw

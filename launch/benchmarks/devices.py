"""The suite `devices` of launch/benchmark.py: forced devices of one CPU beside a single one.

A model is allocated, exported by the encoder that compensates, and the file evaluated, each in a process of its own, on
every mesh of --devices_meshes: windows and chunks of rows by rows of matrices. Losses, formats, scales and the file are
compared with the first mesh's. The devices share the cores, so seconds only say what dividing costs.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from absl import flags
from benchmarks import memory, watched
from benchmarks.measuring import Numbers, said, timed
from benchmarks.synthetic import workspace

from ramp_jax.allocation import read_saved

_MODEL = flags.DEFINE_string("devices_model", "ref-llama", "The model.")
_MESHES = flags.DEFINE_list("devices_meshes", ["1x1", "8x1", "4x2", "2x4"], "Meshes; the first is what others equal.")

_LOSSES = ("nll", "kld")


def devices(repeats: int) -> dict[str, list[Numbers]]:
    """A row per mesh; `repeats` is not used."""
    del repeats
    with workspace() as folder:
        found = {mesh: computed(_MODEL.value, mesh, folder / mesh) for mesh in _MESHES.value}
    first = found[_MESHES.value[0]]
    return {"rows": [said({"mesh": mesh} | beside(one, first)) for mesh, one in found.items()]}


def computed(ref: str, mesh: str, folder: Path) -> dict[str, Any]:
    """What a mesh finds: formats and scales, the file, losses, and seconds of every script."""
    folder.mkdir()
    allocation, gguf, losses = folder / "alloc.json", folder / "model.gguf", folder / "losses.json"
    count = math.prod(map(int, mesh.split("x")))
    forced = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"}
    windows = (f"--context={memory.CONTEXT}", f"--count={memory.COUNT}")
    flags_of = {
        "allocate": ("--source_policy=fisher", f"--budget_bits={memory.BITS}", f"--output={allocation}", *windows),
        "export_gguf": (f"--allocation={allocation}", f"--output={gguf}"),
        "evaluate": (f"--reference={ref}", f"--json={losses}", *windows),
    }
    seconds = {}
    for script, how in flags_of.items():
        model = gguf if script == "evaluate" else ref
        run = functools.partial(watched.run, script, f"--model={model}", f"--mesh={mesh}", *how, settings=forced)
        seconds[f"{script} seconds"] = timed(run)[0]
    saved, found = read_saved(allocation), json.loads(losses.read_text())
    kept = {"formats": saved["formats"], "folding": saved["folding"], "file": gguf.read_bytes()}
    return kept | {"losses": [found[name] for name in _LOSSES], "seconds": seconds}


def beside(one: dict[str, Any], first: dict[str, Any]) -> Numbers:
    """How far a mesh is from the first one."""
    apart = [abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True)]
    same = {f"{name} equal": one[name] == first[name] for name in ("formats", "folding", "file")}
    return dict(zip((f"{name} difference" for name in _LOSSES), apart, strict=True)) | same | one["seconds"]

"""The suite `loading` of launch/benchmark.py: what memory and time it takes to load a model.

A Llama of 1.5 billion random weights in bfloat16, in four shards with an index, its vocabulary that of Llama 3 and its
head not tied; and SmolLM2-135M as a Q8_0 file. Each is loaded in a process of its own. `peak_over_bytes` is the most
memory that the process had while loading, less what it had before, over the bytes of the parameters in the dtype.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags
from benchmarks.measuring import Numbers, said
from benchmarks.synthetic import write_checkpoint

from ramp_jax.allocation import Allocation
from ramp_jax.halo.export import export_gguf
from ramp_jax.models import load_model
from ramp_jax.models.spec import DecoderSpec, make_spec

_WIDTH = flags.DEFINE_integer("loading_width", 2048, "Width of the sharded model.", lower_bound=64)
_DTYPES = flags.DEFINE_list("loading_dtypes", ["bfloat16", "float32"], "Dtypes that it is loaded in.")
_GGUF = flags.DEFINE_string("loading_gguf", "smollm2-135m", "The model that becomes a Q8_0 file.")

_LOAD = """
import json, sys, time
import jax
import ramp_jax
jax.block_until_ready(jax.numpy.zeros(1))
status = lambda name: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
before, started, busy = status("VmRSS"), time.perf_counter(), time.process_time()
model = jax.block_until_ready(ramp_jax.load_model(sys.argv[1], sys.argv[2]).params)
seconds = time.perf_counter() - started
held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
cpu, peak = time.process_time() - busy, (status("VmHWM") - before) / held
print(json.dumps({"bytes": held, "seconds": seconds, "cpu_seconds": cpu, "peak_over_bytes": peak}))
"""


def loading(repeats: int) -> list[Numbers]:
    """Bytes, seconds and relative peak memory of each load; `repeats` is not used, memory does not vary."""
    del repeats
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sharded, file = Path(folder) / "sharded", Path(folder) / "Q8_0.gguf"
        write_checkpoint(sharded, llama_spec(_WIDTH.value))
        rows += [loaded("shards in bfloat16", sharded, dtype) for dtype in _DTYPES.value]
        model = load_model(_GGUF.value)
        export_gguf(model, Allocation.uniform(model, "Q8_0"), file)
        rows += [loaded("GGUF in Q8_0", file, dtype) for dtype in _DTYPES.value]
    return rows


def llama_spec(width: int) -> DecoderSpec:
    """Llama-3.2-1B's shapes, without its scaled positions and with a head of its own, at another width."""
    return make_spec(
        "llama",
        n_layers=16,
        d_model=width,
        n_heads=width // 64,
        n_kv_heads=max(1, width // 256),
        head_size=64,
        d_ff=4 * width,
        vocab_size=width * 128_256 // 2048,
        context_length=4096,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        tied=False,
    )


def loaded(what: str, path: Path, dtype: str) -> Numbers:
    done = subprocess.run([sys.executable, "-c", _LOAD, path, dtype], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"loading {what} failed: {done.stderr.strip()}")
    return said({"checkpoint": what, "dtype": dtype} | json.loads(done.stdout))

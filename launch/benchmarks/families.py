"""The suite `families` of launch/benchmark.py: every kind of `zoo.py` beside transformers and llama.cpp.

Logits of random tokens, f32 matrix products, the largest differences; what a column compares, `CHECKS` says. `read
again` counts numbers that a written file changed, `estimate` losses of the Fisher estimate that are no positive
numbers. Quantized files are compared by the root mean square of the differences over the spread of the logits:
llama.cpp rounds activations to 8 bits there, JAX does not. The last columns are perplexities of a text after
`allocate`, `export_gguf` and `evaluate` as scripts, for one kind of every class of transformers.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from benchmarks import zoo
from benchmarks.measuring import Numbers
from jaxtyping import Float, Int

from ramp_jax import data
from ramp_jax.allocation import Allocation
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.torch_model import torch_model
from ramp_jax.halo.verify import gguf_logits
from ramp_jax.models import Model, allocatable, load_model
from ramp_jax.models.save import save_model
from ramp_jax.quantization import calibrate, fake_quantize, fold
from ramp_jax.sensitivity.fisher import fisher_sensitivity

LAUNCH = Path(__file__).parents[1]

_SEED = 0
_CALIBRATION = {"context": 24, "count": 3}

_EIGHT_BITS = 0.07
"""What activations of 8 bits do to the logits of these models: root mean square over the spread."""

Logits = Float[np.ndarray, "B T V"]


class Subject:
    """A kind, its model as read from a Hugging Face directory in an own folder, and what several checks need."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind, self.folder = name, zoo.ZOO[name], folder
        self.directory = zoo.save(zoo.hf_model(name), folder / "model")
        self.model = load_model(str(self.directory))
        rng = np.random.default_rng(_SEED)
        self.ids: Int[np.ndarray, "B T"] = rng.integers(0, zoo.VOCABULARY, (1, zoo.LENGTH), np.int32)

    @functools.cached_property
    def expected(self) -> Logits:
        """What transformers predicts."""
        return zoo.hf_logits(self.name, self.ids)

    @functools.cached_property
    def ours(self) -> Logits:
        """What the model as it was read predicts."""
        return np.asarray(self.model.logits(self.ids))

    @functools.cached_property
    def exported(self) -> Path:
        """The model as a file of F32 tensors."""
        return self.export("F32", Allocation.uniform(self.model, "F32"))

    def export(self, name: str, allocation: Allocation) -> Path:
        """A file of the model in the subject's folder."""
        path = self.folder / f"{name}.gguf"
        export_gguf(self.model, allocation, path)
        return path


def from_transformers(subject: Subject) -> float:
    """JAX beside transformers, largest difference of a logit."""
    return largest(subject.ours - subject.expected)


def rebuilt(subject: Subject) -> float:
    """The model that JAX describes to transformers beside the one it was read from."""
    import torch

    with torch.no_grad():
        logits = torch_model(subject.model)(torch.from_numpy(subject.ids.astype(np.int64))).logits.numpy()
    return largest(logits - subject.expected)


def saved_again(subject: Subject) -> float:
    """Numbers that a written Hugging Face directory changed."""
    return changed(load_model(str(save_model(subject.model, subject.folder / "saved", "float32"))), subject.model)


def from_llama_cpp(subject: Subject) -> float:
    """The exported F32 file in llama.cpp beside transformers, at the positions where both mean the same."""
    same = slice(0, subject.kind.llama_cpp)
    return largest((gguf_logits(subject.exported, subject.ids) - subject.expected)[:, same])


def read_again(subject: Subject) -> float:
    """Numbers that the exported F32 file changed."""
    return changed(load_model(str(subject.exported)), subject.model)


def by_llama_quantize(mix: str, subject: Subject) -> float:
    """A file of llama.cpp's own quantizer in JAX beside the same file in llama.cpp."""
    path = subject.folder / f"{mix}.gguf"
    llama_quantize.quantize(subject.exported, path, mix)
    return apart(subject, np.asarray(load_model(str(path)).logits(subject.ids)), path)


def fake_quantized(blocks: str, superblocks: str, subject: Subject) -> float:
    """Fake-quantized logits beside the exported file's in llama.cpp, in the second format where all rows allow it."""
    model = subject.model
    wide = all(tensor.shape[-1] % 256 == 0 for tensor in allocatable(model.spec))
    allocation = Allocation.uniform(model, superblocks if wide else blocks)
    path = subject.export(f"ours-{blocks}", allocation)
    logits = Model(model.spec, fake_quantize(model, allocation), model.metadata).logits(subject.ids)
    return apart(subject, np.asarray(logits), path)


def folded(subject: Subject) -> float:
    """The model after Scale Folding beside the model before, largest difference of a logit."""
    windows = data.windows("builtin", subject.model.tokenizer, **_CALIBRATION)
    model = fold(subject.model, calibrate(subject.model, windows), 4)
    return largest(np.asarray(model.logits(subject.ids)) - subject.ours)


def estimated(subject: Subject) -> float:
    """Losses of the Fisher estimate that are no positive numbers."""
    windows = data.windows("builtin", subject.model.tokenizer, **_CALIBRATION)
    loss = fisher_sensitivity(subject.model, windows, (4,), "sliding").kld
    return float((~(np.isfinite(loss) & (loss > 0))).sum())


class Check(NamedTuple):
    """What a column of the table measures, and the most that it may be."""

    measure: Callable[[Subject], float]
    limit: float | None = None

    def allowed(self, kind: zoo.Kind) -> float:
        """The limit for a kind; where a check has none of its own, that of llama.cpp's agreement."""
        return kind.tolerance if self.limit is None else self.limit


CHECKS: Mapping[str, Check] = {
    "transformers": Check(from_transformers, 1e-4),
    "torch model": Check(rebuilt, 1e-4),
    "saved again": Check(saved_again, 0),
    "F32 in llama.cpp": Check(from_llama_cpp),
    "F32 read again": Check(read_again, 0),
    "llama-quantize Q8_0": Check(functools.partial(by_llama_quantize, "Q8_0"), _EIGHT_BITS),
    "llama-quantize Q4_0": Check(functools.partial(by_llama_quantize, "Q4_0"), _EIGHT_BITS),
    "8 bits in llama.cpp": Check(functools.partial(fake_quantized, "Q8_0", "Q8_0"), _EIGHT_BITS),
    "4 bits in llama.cpp": Check(functools.partial(fake_quantized, "Q4_0", "Q4_K"), _EIGHT_BITS),
    "folded": Check(folded, 1e-3),
    "estimate": Check(estimated, 0),
}
"""By column of the table."""


def families(_: int) -> list[Numbers]:
    """A row per kind."""
    rows = []
    with jax.default_matmul_precision("highest"):
        for name, kind in zoo.ZOO.items():
            with tempfile.TemporaryDirectory() as folder:
                subject = Subject(name, Path(folder))
                row = {"kind": name, "architecture": kind.architecture}
                row |= {column: check.measure(subject) for column, check in CHECKS.items()}
                if kind.hf not in (zoo.ZOO[other["kind"]].hf for other in rows):
                    row |= through_scripts(subject.directory, Path(folder))
                rows.append(row)
                print(json.dumps(rows[-1]), flush=True)
    return rows


def script(name: str, *arguments: str) -> None:
    """Run a script of launch/ in a process of its own; raises `CalledProcessError` where it fails."""
    command = [sys.executable, str(LAUNCH / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(LAUNCH.parent)}
    subprocess.run(command, check=True, capture_output=True, text=True, env=environment)


def through_scripts(directory: Path, folder: Path, run: Callable[..., Any] = script) -> Numbers:
    """`allocate → export → evaluate` on a model, in llama.cpp and in JAX: perplexities of the exported file."""
    allocation, exported = folder / "allocation.json", folder / "exported.gguf"
    short = ("--context=24", "--count=2")
    model = f"--model={directory}"
    size = ("--levels=4,8", "--budget_bits=6.5")
    run("allocate", model, "--source_policy=random", "--encoder=reference", *size, *short, f"--output={allocation}")
    run("export_gguf", model, f"--allocation={allocation}", f"--output={exported}")
    found = {}
    for backend in ("llama.cpp", "jax"):
        numbers = folder / f"{backend}.json"
        run("evaluate", f"--model={exported}", f"--backend={backend}", *short, f"--json={numbers}")
        found[f"perplexity, {backend}"] = json.loads(numbers.read_text())["ppl"]
    return found


def largest(difference: Logits) -> float:
    """The largest absolute value."""
    return float(np.abs(difference).max())


def apart(subject: Subject, logits: Logits, path: Path) -> float:
    """Logits beside those of a file in llama.cpp where both mean the same: root mean square over their spread."""
    same = slice(0, subject.kind.llama_cpp)
    theirs = gguf_logits(path, subject.ids)[:, same]
    return float(np.sqrt(np.mean((logits[:, same] - theirs) ** 2)) / theirs.std())


def changed(read: Model, model: Model) -> float:
    """Numbers of the parameters that differ; raises `ValueError` where the trees do."""
    counts = jax.tree.map(lambda a, b: int((np.asarray(a) != np.asarray(b)).sum()), read.params, model.params)
    return float(sum(jax.tree.leaves(counts)))

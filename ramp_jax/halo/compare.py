"""The closing table: what each way of choosing formats makes of one model at one size, on held-out text."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import gguf
import numpy as np
from jaxtyping import Int

from ramp_jax import schema
from ramp_jax.allocation import Allocation, costs, from_levels, read_saved
from ramp_jax.allocators.allocator import check_measured_on
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.files import write_bytes
from ramp_jax.formats.check import EncodeCache
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import Model, allocatable, load_model, tensors
from ramp_jax.quantization import EncoderName, calibrate, importance_of, make_encoder, refold
from ramp_jax.quantization.encoder_factory import calibration_windows
from ramp_jax.quantization.importance import Importance
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of
from ramp_jax.sensitivity.table import Sensitivity

COMPARISON = "comparison.json"
UNIFORM = "IQ4_NL"
"""The format of the uniform row: the smallest that every row length of a multiple of 32 can take."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Perplexities and KL divergence (nats per token) are on the held-out tokens; `ppl_llama_cpp` is None where llama.cpp
    is not installed. `seconds` is what choosing and measuring took on this model, evaluation and export left out.
    """

    name: str
    file: str
    file_bytes: int
    linear_bpw: float
    file_bpw: float
    ppl: float
    ppl_llama_cpp: float | None
    kld: float
    seconds: float


class Comparison(TypedDict):
    """What `comparison.json` holds; `fingerprint` is of all that the rows depend on."""

    fingerprint: schema.Sha256
    budget_bytes: schema.Bytes
    heldout_tokens: schema.Count
    rows: tuple[Row, ...]


def read_comparison(path: Path) -> Comparison:
    """What `compare` wrote; raises `ValueError` where it is damaged."""
    with schema.gate(path, "a comparison", "delete it and run launch/compare.py again"):
        return schema.read(Comparison, schema.read_json(path))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share: the model as loaded, held-out windows, the reference's predictions on them, the encoder
    with the calibration windows and their importance, and where files go. What is scored is the exported file."""

    model: Model
    windows: Int[np.ndarray, "W T"]
    reference: Reference
    encoder: EncoderName
    calibration: Int[np.ndarray, "W T"]
    importance: Importance
    cache: EncodeCache
    workdir: Path
    with_llama_cpp: bool

    def export(self, allocation: Allocation, name: str) -> Path:
        """The allocation's file, rounded as all others."""
        path = self.workdir / f"{name}.gguf"
        encoder = make_encoder(self.encoder, self.calibration, importance=self.importance)
        encoder = dataclasses.replace(encoder, cache=self.cache)
        export_gguf(self.model, allocation, path, encoder)
        return path

    def mix(self, source: Path, budget_bytes: int) -> tuple[str, Path] | None:
        """llama.cpp's largest mix that fits, with the importance matrix of our calibration; None where none fits."""
        mix = llama_quantize.mix_below(source, budget_bytes, self.importance)
        if mix is None:
            return None
        path = self.workdir / f"llama.cpp-{mix}.gguf"
        llama_quantize.quantize(source, path, mix, self.importance)
        return mix, path

    def row(self, name: str, path: Path, seconds: float) -> Row:
        """Score a file, in JAX and, where it is installed, in llama.cpp."""
        scored = evaluate(load_model(str(path)), self.windows, reference=self.reference, doing=f"scoring {name}")
        checked = evaluate_gguf(path, self.windows).ppl if self.with_llama_cpp else None
        return Row(name, path.name, *_sizes(self.model, path), scored.ppl, checked, scored.mean_kld, seconds)


def compare(
    model: Model,
    allocation_path: Path,
    gguf_path: Path,
    workdir: Path,
    sensitivity_path: Path,
    heldout: Int[np.ndarray, "W T"],
    encoder: EncoderName | None = None,
    say: Callable[[str], None] = print,
    *,
    trust_calibration: bool = False,
) -> list[Row]:
    """Rows reference, uniform, llama.cpp's mix next below the budget, knapsack, policy; also in `comparison.json`.

    Uniform and knapsack share the policy's folding, calibration windows and encoder (default: what the allocation
    records), the mix has an importance matrix from the same windows; what is scored are the files. Without llama.cpp
    its row and its column are left out. Rows that were made from the same inputs are read, not made again.
    `trust_calibration` is that of `calibration_windows`. Raises `ValueError` where the GGUF is not the allocation's, or
    that does not say its budget.
    """
    ours = Allocation.load(allocation_path, model)
    _check_export(ours, gguf_path)
    table, notes = Sensitivity.load(sensitivity_path), read_saved(allocation_path)
    if "budget_bytes" not in notes or "seconds" not in notes:
        raise ValueError(f"{allocation_path} does not say its budget; compare what launch/allocate.py wrote.")
    encoder = encoder or notes.get("encoder", "reference")
    budget, with_llama_cpp = notes["budget_bytes"], llama_quantize.available()
    fingerprint = _fingerprint(gguf_path, [allocation_path, sensitivity_path], heldout, (encoder, with_llama_cpp))
    if (known := _stored(workdir / COMPARISON, fingerprint)) is not None:
        say(f"{workdir / COMPARISON} already holds this comparison.")
        return known
    say(f"Comparing on {heldout.size:,} held-out tokens" + ("" if with_llama_cpp else ", without llama.cpp"))
    calibration = calibration_windows(ours, model, trust_calibration=trust_calibration, say=say)
    importance = importance_of(model.spec, calibrate(model, calibration))
    reference = reference_of(model, heldout)
    bench = Bench(model, heldout, reference, encoder, calibration, importance, EncodeCache(), workdir, with_llama_cpp)

    source = workdir / "reference-F16.gguf"
    export_gguf(model, Allocation.uniform(model, "F16"), source)
    rows = [bench.row("reference F16", source, 0.0)]
    folded = refold(model, ours.folding)
    uniform = Allocation.uniform(folded, UNIFORM)
    rows.append(bench.row(f"uniform {UNIFORM}", bench.export(uniform, f"uniform-{UNIFORM}"), 0.0))
    started = time.monotonic()
    if with_llama_cpp and (mix := bench.mix(source, budget)):
        name, path = mix
        rows.append(bench.row(f"llama.cpp {name} + imatrix", path, time.monotonic() - started))
    best, seconds = _knapsack(folded, table, budget)
    rows.append(bench.row("knapsack", bench.export(best, f"knapsack-{budget}"), seconds))
    rows.append(bench.row(_who(notes), gguf_path, notes["seconds"]))
    content = {
        "fingerprint": fingerprint,
        "budget_bytes": budget,
        "heldout_tokens": heldout.size,
        "rows": [vars(row) for row in rows],
    }
    write_bytes(workdir / COMPARISON, (json.dumps(content, indent=1) + "\n").encode())
    return rows


def _who(notes: Mapping[str, Any]) -> str:
    """Name of the allocation's own row."""
    name = str(notes.get("allocator", "policy"))
    return "RAMP policy" if name.startswith("policy") else name


def _fingerprint(exported: Path, others: Sequence[Path], heldout: Int[np.ndarray, "W T"], how: object) -> str:
    """SHA-256 of all that a comparison depends on."""
    with exported.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for part in (*(path.read_bytes() for path in others), heldout.tobytes(), repr(how).encode()):
        digest.update(part)
    return digest.hexdigest()


def _stored(path: Path, fingerprint: str) -> list[Row] | None:
    """The rows of an earlier comparison of the same inputs."""
    if not path.is_file():
        return None
    known = read_comparison(path)
    return list(known["rows"]) if known["fingerprint"] == fingerprint else None


def _check_export(allocation: Allocation, path: Path) -> None:
    """Raise `ValueError` where the file at `path` does not hold the allocation's formats."""
    advice = "write it with launch/export_gguf.py first"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {advice}.")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    for name, fmt in allocation.formats.items():
        if stored.get(name) != fmt:
            raise ValueError(f"{path} holds {name} as {stored.get(name)}, the allocation says {fmt}; {advice}.")


def _knapsack(model: Model, table: Sensitivity, budget_bytes: int) -> tuple[Allocation, float]:
    """The best allocation by the sensitivity table, and the seconds that table and search took."""
    started = time.monotonic()
    check_measured_on(table, tuple(tensor.name for tensor in allocatable(model.spec)))
    sizes = costs(model, table.levels)
    actions = knapsack(sizes.in_units, table.kld, sizes.units(budget_bytes))
    allocation = from_levels(model, [table.levels[a] for a in actions])
    return allocation, table.seconds + time.monotonic() - started


def _sizes(model: Model, path: Path) -> tuple[int, float, float]:
    """File bytes, linear bpw and file bpw of a file of `model`."""
    size = path.stat().st_size
    members = {tensor.name: tensor for tensor in tensors(model.spec)}
    stored = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    linear = [tensor for tensor in members.values() if tensor.allocatable]
    bpw = 8 * sum(stored[tensor.name] for tensor in linear) / sum(tensor.size for tensor in linear)
    return size, bpw, 8 * size / sum(tensor.size for tensor in members.values())

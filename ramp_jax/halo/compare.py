"""The closing table: what each way of choosing formats makes of one model at one size, on held-out text."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from jaxtyping import Int

from ramp_jax import encoders
from ramp_jax.allocation import Allocation, costs, from_levels, read_saved
from ramp_jax.allocators.knapsack import knapsack
from ramp_jax.checkpoint import write_bytes
from ramp_jax.evaluation.perplexity import Reference, evaluate, evaluate_reference, reference_of
from ramp_jax.evaluation.scores import Evaluation
from ramp_jax.evaluation.table import Sensitivity
from ramp_jax.halo import handoff
from ramp_jax.halo.export import export_gguf
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import Model, load_model, tensors
from ramp_jax.quantization import Encoder, EncoderName, fake_quantize, refold

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


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share: the model as loaded, held-out windows, the reference's predictions, the encoder with the
    windows that it is calibrated on and their importance, and where files go."""

    model: Model
    windows: Int[np.ndarray, "W T"]
    reference: Reference
    encoder: EncoderName
    calibration: Int[np.ndarray, "W T"]
    weighted: Encoder
    workdir: Path
    with_llama_cpp: bool

    def reference_row(self, plain: Allocation, path: Path) -> Row:
        """The model itself; its F16 file is also what llama.cpp quantizes from."""
        export_gguf(self.model, plain, path)
        scored = evaluate_reference(self.reference, self.windows)
        return self._scored("reference F16", path, _planned(plain), scored, 0.0)

    def row(self, name: str, allocation: Allocation, seconds: float, path: Path, *, exported: bool = False) -> Row:
        """Export the allocation to `path`, unless it is there already, and score it."""
        model = refold(self.model, allocation.folding)
        encoder = encoders.make(self.encoder, self.model, self.calibration, allocation, self.weighted)
        if not exported:
            export_gguf(model, allocation, path, encoder)
        params = fake_quantize(model, allocation, encoder)
        scored = evaluate(model, self.windows, params=params, reference=self.reference, doing=f"scoring {name}")
        return self._scored(name, path, _planned(allocation), scored, seconds)

    def mix_row(self, source: Path, budget_bytes: int) -> Row | None:
        """llama.cpp's largest mix that fits, with the importance matrix of our calibration; None where none fits."""
        started = time.monotonic()
        mix = handoff.mix_below(source, budget_bytes)
        if mix is None:
            return None
        path = self.workdir / f"llama.cpp-{mix}.gguf"
        handoff.quantize(source, path, mix, self.weighted.importance)
        seconds = time.monotonic() - started
        quantized = load_model(str(path))
        scored = evaluate(quantized, self.windows, reference=self.reference, doing=f"scoring {mix}")
        sizes = _sizes(self.model, path)
        return self._scored(f"llama.cpp {mix} + imatrix", path, sizes, scored, seconds)

    def _scored(
        self, name: str, path: Path, sizes: tuple[int, float, float], scored: Evaluation, seconds: float
    ) -> Row:
        checked = evaluate_gguf(path, self.windows).ppl if self.with_llama_cpp else None
        return Row(name, path.name, *sizes, scored.ppl, checked, scored.mean_kld, seconds)


def compare(
    model: Model,
    allocation_path: Path,
    gguf_path: Path,
    workdir: Path,
    sensitivity_path: Path,
    heldout: Int[np.ndarray, "W T"],
    calibration: Int[np.ndarray, "W T"],
    encoder: EncoderName | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Rows reference, uniform, llama.cpp's mix next below the budget, knapsack, policy; also in `comparison.json`.

    Uniform and knapsack share the policy's folding and encoder (default: what the allocation records), the mix has an
    importance matrix from the same calibration windows.
    Without llama.cpp its row and its column are left out. Rows that were made from the same inputs are read, not made
    again. Raises `ValueError` where the GGUF is not the allocation's.
    """
    ours = Allocation.load(allocation_path, model)
    _check_export(ours, gguf_path)
    if not sensitivity_path.is_file():
        raise FileNotFoundError(f"{sensitivity_path} does not exist; train with launch/train.py first.")
    notes = read_saved(allocation_path)
    budget, seconds = notes["budget_bytes"], notes["seconds"]
    with_llama_cpp = handoff.available()
    with gguf_path.open("rb") as exported:
        digest = hashlib.file_digest(exported, "sha256")
    for part in (allocation_path.read_bytes(), sensitivity_path.read_bytes(), heldout.tobytes(), calibration.tobytes()):
        digest.update(part)
    digest.update(bytes([with_llama_cpp]) + str(encoder).encode())
    fingerprint = digest.hexdigest()
    if (known := _stored(workdir / COMPARISON, fingerprint)) is not None:
        say(f"{workdir / COMPARISON} already holds this comparison.")
        return known
    say(f"Comparing on {heldout.size:,} held-out tokens" + ("" if with_llama_cpp else ", without llama.cpp"))
    encoder = encoder or notes.get("encoder", "reference")
    weighted = encoders.best(model, calibration)
    reference = reference_of(model, heldout)
    bench = Bench(model, heldout, reference, encoder, calibration, weighted, workdir, with_llama_cpp)

    plain = Allocation(model.spec, model.metadata, dict.fromkeys(ours.formats, "F16"))
    source = workdir / "reference-F16.gguf"
    rows = [bench.reference_row(plain, source)]
    table = Sensitivity.load(sensitivity_path)
    folded = refold(model, ours.folding)
    uniform = dataclasses.replace(ours, formats=dict.fromkeys(ours.formats, UNIFORM))
    rows.append(bench.row(f"uniform {UNIFORM}", uniform, 0.0, workdir / f"uniform-{UNIFORM}.gguf"))
    if with_llama_cpp:
        mix = bench.mix_row(source, budget)
        rows += [mix] if mix else []
    best, search_seconds = _knapsack(folded, table, budget)
    rows.append(bench.row("knapsack", best, search_seconds, workdir / f"knapsack-{budget}.gguf"))
    rows.append(bench.row("RAMP policy", ours, seconds, gguf_path, exported=True))
    content = {
        "fingerprint": fingerprint,
        "budget_bytes": budget,
        "heldout_tokens": heldout.size,
        "rows": [vars(row) for row in rows],
    }
    write_bytes(workdir / COMPARISON, (json.dumps(content, indent=1) + "\n").encode())
    return rows


def _stored(path: Path, fingerprint: str) -> list[Row] | None:
    """The rows of an earlier comparison of the same inputs."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in content["rows"]] if content["fingerprint"] == fingerprint else None


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
    sizes = costs(model, table.levels)
    actions = knapsack(sizes.in_units, table.kld, sizes.units(budget_bytes))
    allocation = from_levels(model, [table.levels[a] for a in actions])
    return allocation, table.seconds + time.monotonic() - started


def _planned(allocation: Allocation) -> tuple[int, float, float]:
    """File bytes, linear bpw and file bpw."""
    return allocation.file_bytes, allocation.linear_bpw, allocation.file_bpw


def _sizes(model: Model, path: Path) -> tuple[int, float, float]:
    """File bytes, linear bpw and file bpw of a file that llama.cpp made of `model`."""
    size = path.stat().st_size
    members = {tensor.name: tensor for tensor in tensors(model.spec)}
    stored = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    linear = [tensor for tensor in members.values() if tensor.allocatable]
    bpw = 8 * sum(stored[tensor.name] for tensor in linear) / sum(tensor.size for tensor in linear)
    return size, bpw, 8 * size / sum(tensor.size for tensor in members.values())

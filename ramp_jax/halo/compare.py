"""The closing table: what each way of choosing formats makes of one model at one size, on held-out text."""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

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
from ramp_jax.halo.llama_quantize import Mixes
from ramp_jax.halo.verify import evaluate_gguf
from ramp_jax.models import Model, allocatable, load_model, tensors
from ramp_jax.quantization import EncoderName, Stats, calibrate, importance_of, make_encoder, refold
from ramp_jax.quantization.encoder_factory import calibration_windows
from ramp_jax.quantization.importance import Importance
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of
from ramp_jax.scoring.scores import Evaluation, paired
from ramp_jax.sensitivity.table import Sensitivity

COMPARISON = "comparison.json"
UNIFORM = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
"""The formats of uniform rows, smallest first: those that every row length of a multiple of 32 can take."""

Choose = Callable[[Model, Stats, Sequence[int]], list[Allocation]]
"""What the allocator of an allocation chooses for other budgets: (the folded model, statistics, budgets)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, and one point of the curve of its `method`.

    Perplexities and KL divergence (nats per token) are on the held-out tokens; `ppl_llama_cpp` is None where llama.cpp
    is not installed. `seconds` is what choosing and measuring took on this model, evaluation and export left out.
    `kld_beyond` is how far the KL divergence is above that of the allocator compared at the same budget, token by
    token, which gives `kld_beyond_stderr`. The reference has no budget. `file` is None where it was not kept.
    """

    name: str
    method: str
    budget_bytes: schema.Bytes | None
    file: str | None
    file_bytes: schema.Bytes
    linear_bpw: schema.Positive
    file_bpw: schema.Positive
    ppl: schema.Positive
    ppl_llama_cpp: schema.Positive | None
    kld: float
    kld_stderr: schema.NotNegative | None
    kld_beyond: float | None
    kld_beyond_stderr: schema.NotNegative | None
    seconds: schema.NotNegative | None


class Comparison(TypedDict):
    """What `comparison.json` holds; `fingerprint` is of all that the rows depend on.

    `allocation` is the digest of the allocation that was compared, `model` and `budget_bytes` are its own. `rows` are
    ordered by budget, and those of one budget end with the allocator that is compared.
    """

    fingerprint: schema.Sha256
    allocation: schema.Sha256
    model: NotRequired[schema.Name]
    budget_bytes: schema.Bytes
    heldout_tokens: schema.Count
    rows: tuple[Row, ...]


def read_comparison(path: Path) -> Comparison:
    """What `compare` wrote; raises `ValueError` where it is damaged."""
    with schema.gate(path, "a comparison", "delete it and run launch/compare.py again"):
        return schema.read(Comparison, schema.read_json(path))


class Contender(NamedTuple):
    """A file to score and whose it is; `make` writes it, None where it is there. `seconds` as in `Row`."""

    name: str
    method: str
    path: Path
    make: Callable[[Path], object] | None
    seconds: float | None = 0.0


class Scored(NamedTuple):
    """What was found of a file: losses in JAX, perplexity in llama.cpp, its sizes."""

    found: Evaluation
    ppl_llama_cpp: float | None
    file_bytes: int
    linear_bpw: float
    file_bpw: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share: the model as loaded and folded as the allocation is, the held-out windows and what the model
    predicts on them, the encoder with the calibration windows and their importance, and where files go.

    What is scored is the exported file, each once: `known` keeps what was found.
    """

    model: Model
    folded: Model
    windows: Int[np.ndarray, "W T"]
    reference: Reference
    encoder: EncoderName
    calibration: Int[np.ndarray, "W T"]
    importance: Importance
    table: Sensitivity | None
    workdir: Path
    with_llama_cpp: bool
    cache: EncodeCache = dataclasses.field(default_factory=EncodeCache)
    known: dict[Path, Scored] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The unquantized model, which llama.cpp makes its mixes of."""
        return self.workdir / "reference-F16.gguf"

    def unquantized(self) -> Contender:
        """The model in F16."""
        write = functools.partial(export_gguf, self.model, Allocation.uniform(self.model, "F16"))
        return Contender("reference F16", "reference", self.source, write)

    def baselines(self, budget_bytes: int) -> Iterator[Contender]:
        """What others make of a budget: uniform and llama.cpp's mix if one fits, the knapsack if there is a table."""
        every = {fmt: Allocation.uniform(self.folded, fmt) for fmt in UNIFORM}
        if fitting := [fmt for fmt in UNIFORM if every[fmt].file_bytes <= budget_bytes]:
            fmt = fitting[-1]
            yield self.allocated(f"uniform {fmt}", "uniform", f"uniform-{fmt}", every[fmt], 0.0)
        started = time.monotonic()
        mixes = Mixes(self.source, self.importance)
        if self.with_llama_cpp and (mix := mixes.below(budget_bytes)):
            path, seconds = self.workdir / f"llama.cpp-{mix}.gguf", time.monotonic() - started
            write = functools.partial(mixes.write, mix)
            yield Contender(f"llama.cpp {mix} + imatrix", "llama.cpp", path, write, seconds)
        if self.table is not None:
            best, seconds = _knapsack(self.folded, self.table, budget_bytes)
            yield self.allocated("knapsack", "knapsack", f"knapsack-{budget_bytes}", best, seconds)

    def allocated(self, name: str, method: str, file: str, allocation: Allocation, seconds: float | None) -> Contender:
        """An allocation whose file is rounded as all others."""

        def write(path: Path) -> None:
            encoder = make_encoder(self.encoder, self.calibration, importance=self.importance)
            export_gguf(self.model, allocation, path, dataclasses.replace(encoder, cache=self.cache))

        return Contender(name, method, self.workdir / f"{file}.gguf", write, seconds)

    def score(self, contender: Contender) -> Scored:
        """Make a file if it is not there, and score it in JAX and, where it is installed, in llama.cpp."""
        path = contender.path
        if path not in self.known:
            if contender.make is not None:
                contender.make(path)
            doing = f"scoring {contender.name}"
            found = evaluate(load_model(str(path)), self.windows, reference=self.reference, doing=doing)
            checked = evaluate_gguf(path, self.windows).ppl if self.with_llama_cpp else None
            self.known[path] = Scored(found, checked, *_sizes(self.model, path))
        return self.known[path]

    def rows(self, contenders: Sequence[Contender], budget_bytes: int | None, *, keep: bool) -> list[Row]:
        """Their lines; the last is what the others are compared with. Without `keep`, new files are removed."""
        there = {*self.known}
        scored = [self.score(contender) for contender in contenders]
        rows = []
        for contender, one in zip(contenders, scored, strict=True):
            beyond, stderr = (None, None) if one is scored[-1] else paired(one.found, scored[-1].found)
            if not keep and contender.path not in there:
                contender.path.unlink()
            rows.append(
                Row(
                    name=contender.name,
                    method=contender.method,
                    budget_bytes=budget_bytes,
                    file=contender.path.name if contender.path.is_file() else None,
                    file_bytes=one.file_bytes,
                    linear_bpw=one.linear_bpw,
                    file_bpw=one.file_bpw,
                    ppl=one.found.ppl,
                    ppl_llama_cpp=one.ppl_llama_cpp,
                    kld=one.found.mean_kld,
                    kld_stderr=_finite(one.found.kld_stderr),
                    kld_beyond=beyond,
                    kld_beyond_stderr=_finite(stderr),
                    seconds=contender.seconds,
                )
            )
        return rows


def compare(
    model: Model,
    allocation_path: Path,
    gguf_path: Path,
    workdir: Path,
    sensitivity_path: Path | None,
    heldout: Int[np.ndarray, "W T"],
    encoder: EncoderName | None = None,
    say: Callable[[str], None] = print,
    *,
    budgets: Sequence[int] = (),
    choose: Choose | None = None,
    trust_calibration: bool = False,
) -> list[Row]:
    """Rows reference and, per budget, uniform, llama.cpp's mix, knapsack, policy; also in `comparison.json`.

    Uniform and mix are the largest that fit, left out where none does. Uniform and knapsack share the policy's folding,
    calibration windows and encoder (default: what the allocation records), the mix has an importance matrix from the
    same windows; what is scored are the files. Without llama.cpp its row and its column are left out, without a table
    the knapsack's. Beside the allocation's budget there are those of `budgets`, for which `choose` stands in for the
    allocation; their files are removed when they are scored. Rows that were made from the same inputs are read, not
    made again. `trust_calibration` is that of `calibration_windows`. Raises `ValueError` where the GGUF is not the
    allocation's, or that does not say its budget.
    """
    ours = Allocation.load(allocation_path, model)
    _check_export(ours, gguf_path)
    notes = read_saved(allocation_path)
    table = None if sensitivity_path is None else Sensitivity.load(sensitivity_path)
    if "budget_bytes" not in notes or "seconds" not in notes:
        raise ValueError(f"{allocation_path} does not say its budget; compare what launch/allocate.py wrote.")
    encoder = encoder or notes.get("encoder", "reference")
    budget, with_llama_cpp = notes["budget_bytes"], llama_quantize.available()
    others = sorted({*budgets} - {budget})
    read = [allocation_path] if sensitivity_path is None else [allocation_path, sensitivity_path]
    fingerprint = _fingerprint(gguf_path, read, heldout, (encoder, with_llama_cpp, others))
    if (known := _stored(workdir / COMPARISON, fingerprint)) is not None:
        say(f"{workdir / COMPARISON} already holds this comparison.")
        return known
    say(f"Comparing on {heldout.size:,} held-out tokens" + ("" if with_llama_cpp else ", without llama.cpp"))
    calibration = calibration_windows(ours, model, trust_calibration=trust_calibration, say=say)
    stats, folded, who = calibrate(model, calibration), refold(model, ours.folding), _who(notes)
    chosen = dict(zip(others, choose(folded, stats, others) if others else [], strict=True))
    bench = Bench(
        model=model,
        folded=folded,
        windows=heldout,
        reference=reference_of(model, heldout),
        encoder=encoder,
        calibration=calibration,
        importance=importance_of(model.spec, stats),
        table=table,
        workdir=workdir,
        with_llama_cpp=with_llama_cpp,
    )
    rows = bench.rows([bench.unquantized()], None, keep=True)
    mine = Contender(who, who, gguf_path, None, notes["seconds"])
    at = {budget: bench.rows([*bench.baselines(budget), mine], budget, keep=True)}
    for other, allocation in chosen.items():
        say(f"At {other:,} bytes")
        last = bench.allocated(who, who, f"chosen-{other}", allocation, None)
        at[other] = bench.rows([*bench.baselines(other), last], other, keep=False)
    rows += [row for size in sorted(at) for row in at[size]]
    content = {
        "fingerprint": fingerprint,
        "allocation": notes["sha256"],
        **({"model": notes["model"]} if "model" in notes else {}),
        "budget_bytes": budget,
        "heldout_tokens": heldout.size,
        "rows": [vars(row) for row in rows],
    }
    write_bytes(workdir / COMPARISON, (json.dumps(content, indent=1) + "\n").encode())
    return rows


def _finite(value: float | None) -> float | None:
    """The value, None where it is NaN, which JSON does not have."""
    return None if value is None or math.isnan(value) else value


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

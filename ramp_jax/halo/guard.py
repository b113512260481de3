"""What an exported file is worth: its losses on held-out text, beside llama.cpp's largest mix that fits as well."""

import collections
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from jaxtyping import Int

from ramp_jax.allocation import Allocation
from ramp_jax.files import folder_beside
from ramp_jax.formats import get_format
from ramp_jax.formats.registry import LATTICE_LEVELS
from ramp_jax.halo import llama_quantize
from ramp_jax.halo.llama_quantize import Mixes
from ramp_jax.halo.verify import evaluate_gguf, generate
from ramp_jax.models import Model, allocatable, load_model
from ramp_jax.models.gguf_source import parts_beside
from ramp_jax.quantization.importance import Importance
from ramp_jax.resources import free_bytes
from ramp_jax.scoring.perplexity import Reference, evaluate, reference_of
from ramp_jax.scoring.scores import Evaluation, numbers, paired

Guard = Literal["check", "replace", "off"]
"""Whether the mix is looked at, and whether it takes the file's place where it loses less."""

_PROMPT, _WRITTEN = 64, 32  # tokens of the generation that is compared
_BESIDE = 1.02  # of the bytes of an F16 file, for its header and the mix


class Rival(TypedDict):
    """llama.cpp's mix beside a file: how much more KL divergence than it the file has, and what that is uncertain by.

    Speeds in tokens per second, of reading a prompt and of writing.
    """

    mix: str
    file_bytes: int
    kld: float
    kld_beyond: float
    kld_beyond_stderr: float
    replaced: bool
    read_per_second: float
    written_per_second: float


class Check(TypedDict):
    """Sizes of a file and what it loses; numbers as in `scores.numbers`, None where llama.cpp is not installed.

    `levels` is the share of the allocated weights at each level, `predicted_kld` what the estimate expected,
    `same_tokens` how many of `written_tokens` it writes as the F16 model does before the first other one.
    """

    file_bytes: int
    budget_bytes: int | None
    code_bits: float
    linear_bpw: float
    file_bpw: float
    levels: dict[str, float]
    predicted_kld: float | None
    scored: dict[str, Any]
    ppl_llama_cpp: float | None
    read_per_second: float | None
    written_per_second: float | None
    same_tokens: int | None
    written_tokens: int
    rival: Rival | None
    unguarded: str | None


def check(
    model: Model,
    allocation: Allocation,
    path: Path,
    heldout: Int[np.ndarray, "W T"],
    importance: Callable[[], Importance],
    guard: Guard = "check",
) -> Check:
    """Score the file at `path` on held-out windows against the unquantized `model`, and beside llama.cpp's mix.

    The mix is the largest that fits the allocation's budget, with `importance` as its importance matrix. Under
    `replace` it takes the name of the file where that has more KL divergence by more than a standard error. Raises
    `RuntimeError` where llama.cpp cannot run a file, `ValueError` where a loss is not finite.
    """
    reference = reference_of(model, heldout)
    ours = evaluate(load_model(str(path)), heldout, reference=reference, doing=f"scoring {path.name}")
    runs, prompt = llama_quantize.available(), heldout[0][:_PROMPT]
    mine = generate(path, prompt, _WRITTEN) if runs else None
    needed = int(_BESIDE * Allocation.uniform(model, "F16").file_bytes) + allocation.file_bytes
    unguarded, rival, same = None, None, None
    if guard == "off":
        unguarded = "not compared with llama.cpp's mixes, as --guard=off asks"
    elif not runs:
        unguarded = "not compared with llama.cpp's mixes, since llama-cpp-python is not installed (extra `verify`)"
    elif (free := free_bytes(path)) < needed:
        unguarded = f"not compared with llama.cpp's mixes: that takes {needed:,} bytes of disk, {free:,} are free"
    else:
        with folder_beside(path.with_name(f"{path.name}.guard")) as folder:
            mixes = Mixes.of(model, importance(), folder)
            same = _same(mine.tokens, generate(mixes.source, prompt, _WRITTEN).tokens)
            mix = mixes.below(allocation.made.get("budget_bytes", path.stat().st_size))
            if mix is None:
                unguarded = "none of llama.cpp's mixes fits the budget"
            else:
                written = mixes.write(mix)
                rival = _rival(mix, written, heldout, reference, ours)
                if guard == "replace" and rival["kld_beyond"] > rival["kld_beyond_stderr"]:
                    os.replace(written, path)
                    rival["replaced"] = True
    return {
        "file_bytes": sum(part.stat().st_size for part in parts_beside(path)),
        "budget_bytes": allocation.made.get("budget_bytes"),
        "code_bits": allocation.code_bits,
        "linear_bpw": allocation.linear_bpw,
        "file_bpw": allocation.file_bpw,
        "levels": levels(allocation),
        "predicted_kld": allocation.made.get("predicted_kld"),
        "scored": numbers(ours),
        "ppl_llama_cpp": evaluate_gguf(path, heldout).ppl if runs else None,
        "read_per_second": None if mine is None else mine.read_per_second,
        "written_per_second": None if mine is None else mine.written_per_second,
        "same_tokens": same,
        "written_tokens": _WRITTEN,
        "rival": rival,
        "unguarded": unguarded,
    }


def levels(allocation: Allocation) -> dict[str, float]:
    """Share of the allocated weights at each level, as it is written, the lowest first."""
    sizes: collections.Counter[tuple[float, str]] = collections.Counter()
    for tensor in allocatable(allocation.spec):
        fmt = get_format(allocation.formats[tensor.name])
        sizes[fmt.code_bits, fmt.name if fmt.name in LATTICE_LEVELS else f"{fmt.code_bits:g}"] += tensor.size
    return {name: sizes[bits, name] / sizes.total() for bits, name in sorted(sizes)}


def _rival(mix: str, path: Path, heldout: Int[np.ndarray, "W T"], reference: Reference, ours: Evaluation) -> Rival:
    """llama.cpp's mix, whose file is at `path`, beside ours."""
    scored = evaluate(load_model(str(path)), heldout, reference=reference, doing=f"scoring llama.cpp's {mix}")
    beyond, stderr = paired(ours, scored)
    written = generate(path, heldout[0][:_PROMPT], _WRITTEN)
    return {
        "mix": mix,
        "file_bytes": path.stat().st_size,
        "kld": scored.mean_kld,
        "kld_beyond": beyond,
        "kld_beyond_stderr": stderr,
        "replaced": False,
        "read_per_second": written.read_per_second,
        "written_per_second": written.written_per_second,
    }


def _same(tokens: list[int], others: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))


def summary(found: Check, path: Path, context: int) -> str:
    """The result of `check` for a terminal, with the command that runs the file at a context length."""
    scored, rival = found["scored"], found["rival"]
    budget = f" of {found['budget_bytes']:,}" if found["budget_bytes"] else ""
    expected = "" if found["predicted_kld"] is None else f"; expected {found['predicted_kld']:.4f}"
    in_llama = "" if found["ppl_llama_cpp"] is None else f", in llama.cpp {found['ppl_llama_cpp']:.3f}"
    lines = [
        ("file", f"{path}: {found['file_bytes']:,}{budget} bytes"),
        (
            "bits per weight",
            f"{found['code_bits']:.3f} of codes, {found['linear_bpw']:.3f} with scales, "
            f"{found['file_bpw']:.3f} of the whole file",
        ),
        ("weights at levels", ", ".join(f"{level}: {share:.0%}" for level, share in found["levels"].items())),
        ("KL divergence", f"{scored['kld']:.4f} ± {scored['kld_stderr']:.4f} nats per token{expected}"),
        (
            "perplexity",
            f"{scored['ppl']:.3f}{in_llama}; unquantized {scored['reference_ppl']:.3f} "
            f"({scored['tokens']:,} held-out tokens)",
        ),
    ]
    if found["read_per_second"] is not None:
        beside = (
            ""
            if rival is None
            else (f"; {rival['mix']} {rival['read_per_second']:.1f} and {rival['written_per_second']:.1f}")
        )
        lines += [
            (
                "tokens per second",
                f"reads {found['read_per_second']:.1f}, writes {found['written_per_second']:.1f}{beside}",
            )
        ]
    if found["same_tokens"] is not None:
        lines += [("writes as F16 does", f"{found['same_tokens']} of {found['written_tokens']} tokens")]
    if rival is not None:
        lines += [
            (
                f"llama.cpp's {rival['mix']}",
                f"{rival['file_bytes']:,} bytes, KL divergence {rival['kld']:.4f}: {_verdict(rival)}",
            )
        ]
    elif found["unguarded"]:
        lines += [("guard", found["unguarded"])]
    lines += [("run it", f"llama-cli -m {path} -c {context}")]
    return "\n".join(f"{name:<20}{text}" for name, text in lines)


def _verdict(rival: Rival) -> str:
    beyond, stderr = rival["kld_beyond"], rival["kld_beyond_stderr"]
    how = f"{abs(beyond):.4f} ± {stderr:.4f}"
    if rival["replaced"]:
        return f"it loses less by {how} and took the file's place"
    if beyond > stderr:
        return f"it loses LESS than this file by {how}; --guard=replace would take it"
    if beyond > 0:
        return f"no difference beyond the standard error ({how})"
    return f"this file loses {'less' if beyond < -stderr else 'as much, less'} by {how}"

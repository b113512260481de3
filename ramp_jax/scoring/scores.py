"""What an evaluation found: losses per token, and the numbers made of them.

The numbers are those of `llama-perplexity --kl-divergence` (llama.cpp, `tools/perplexity/perplexity.cpp`), standard
errors included; tokens count as independent.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

# Name → percentile of the KL divergences, in the order of llama-perplexity.
_PERCENTILES = {"maximum": 100.0} | {f"{q}%": q for q in (99.9, 99.0, 95.0, 90.0)} | {"median": 50.0}
_PERCENTILES |= {f"{q}%": q for q in (10.0, 5.0, 1.0, 0.1)} | {"minimum": 0.0}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scored tokens in text order: −log p of the true token and, beside a reference, what it predicts there.

    `kld` is KL(p_ref ‖ p), `ref_nll` the reference's own loss, `same_top` whether both find the same token likeliest;
    all three are None without a reference. Nats.
    """

    nll: Float[np.ndarray, " tokens"]
    kld: Float[np.ndarray, " tokens"] | None = None
    ref_nll: Float[np.ndarray, " tokens"] | None = None
    same_top: Bool[np.ndarray, " tokens"] | None = None

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return _mean(self.nll)

    @property
    def ppl(self) -> float:
        """Perplexity, exp of the mean loss."""
        return math.exp(self.mean_nll)

    @property
    def ppl_stderr(self) -> float:
        """Standard error of the perplexity."""
        return self.ppl * _stderr(self.nll)

    @property
    def mean_kld(self) -> float:
        """Nats per token, NaN without a reference."""
        return math.nan if self.kld is None else _mean(self.kld)

    @property
    def kld_stderr(self) -> float:
        """Standard error of the mean KL divergence, NaN without a reference or with a single token."""
        return math.nan if self.kld is None else _stderr(self.kld)


def numbers(scored: Evaluation) -> dict[str, Any]:
    """All numbers as plain values: losses and divergences in nats per token, Δp in percent, `same_top` as a share.

    Δp is the change of the true token's probability. `*_stderr` is NaN where a single token was scored.
    """
    found = {"tokens": scored.nll.size, "nll": scored.mean_nll, "ppl": scored.ppl, "ppl_stderr": scored.ppl_stderr}
    if scored.kld is None:
        return found
    base = Evaluation(scored.ref_nll)
    change = scored.nll.astype(np.float64) - scored.ref_nll
    delta_p = 100 * (np.exp(-scored.nll.astype(np.float64)) - np.exp(-scored.ref_nll.astype(np.float64)))
    rms = math.sqrt(_mean(delta_p**2))
    percentiles = np.percentile(scored.kld, list(_PERCENTILES.values())).tolist()
    return found | {
        "reference_ppl": base.ppl,
        "reference_ppl_stderr": base.ppl_stderr,
        "delta_nll": _mean(change),
        "delta_nll_stderr": _stderr(change),
        "kld": scored.mean_kld,
        "kld_stderr": scored.kld_stderr,
        "kld_percentiles": dict(zip(_PERCENTILES, percentiles, strict=True)),
        "delta_p": _mean(delta_p),
        "delta_p_stderr": _stderr(delta_p),
        "rms_delta_p": rms,
        "rms_delta_p_stderr": _stderr(delta_p**2) / (2 * rms) if rms else 0.0,
        "same_top": _mean(scored.same_top),
        "same_top_stderr": _stderr(scored.same_top),
    }


def paired(scored: Evaluation, other: Evaluation) -> tuple[float, float]:
    """How much more KL divergence the one has than the other on the same tokens, and the standard error of that."""
    difference = scored.kld.astype(np.float64) - other.kld
    return _mean(difference), _stderr(difference)


def text_table(found: dict[str, Any]) -> str:
    """The result of `numbers`, one line each, aligned."""
    lines = [("tokens scored", f"{found['tokens']:,}"), ("perplexity", _pair(found, "ppl", "10.4f"))]
    if "kld" in found:
        lines += [
            ("perplexity of the reference", _pair(found, "reference_ppl", "10.4f")),
            ("ln(PPL / PPL of the reference)", _pair(found, "delta_nll", "10.6f")),
            ("KL divergence, mean", _pair(found, "kld", "10.6f")),
            *((f"KL divergence, {name}", f"{value:10.6f}") for name, value in found["kld_percentiles"].items()),
            ("Δp, mean", _pair(found, "delta_p", "10.3f") + " %"),
            ("Δp, root mean square", _pair(found, "rms_delta_p", "10.3f") + " %"),
            ("same top token", _pair(found, "same_top", "10.3%")),
        ]
    return "\n".join(f"{name:<32}{value:>10}" for name, value in lines)


def _pair(found: dict[str, Any], name: str, form: str) -> str:
    return f"{found[name]:{form}} ± {format(found[name + '_stderr'], form).strip()}"


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))


def _stderr(values: np.ndarray) -> float:
    """Standard error of the mean."""
    if values.size < 2:
        return math.nan
    return float(np.std(values, ddof=1, dtype=np.float64)) / math.sqrt(values.size)

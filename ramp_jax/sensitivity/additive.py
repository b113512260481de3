"""How far the costs of single tensors add up to the loss of a whole allocation, and a correction fitted to it.

The table predicts Σ_t s[t, a_t]. To second order the loss also holds a product per pair of tensors; those of one layer
are the largest. For a pair of kinds such as (gate, up) it is taken as w Σ_layers √(s_gate s_up): two changes that cost
s_gate and s_up alone, with effects on the logits of correlation ρ, add 2 ρ √(s_gate s_up), so w lies between −2 and 2.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import lsq_linear

from ramp_jax.models import Model, Tensor, allocatable, matrices
from ramp_jax.models.layout import replaced
from ramp_jax.overrides import FALLBACK
from ramp_jax.progress import track
from ramp_jax.quantization import decoded
from ramp_jax.scoring.perplexity import Protocol, evaluate, reference_of
from ramp_jax.sensitivity.exact import cells

Actions = Int[np.ndarray, "N T"]
Pair = tuple[str, str]
_UNUSED = np.zeros(1, np.float32)  # stands for weights of a masked level


@dataclasses.dataclass(frozen=True)
class Correction:
    """Corrected loss = scale · predicted + Σ over pairs of their weight · `pair_terms`."""

    scale: float
    pairs: Mapping[Pair, float]

    def __call__(self, predicted: Float[np.ndarray, " N"], terms: Mapping[Pair, np.ndarray]) -> np.ndarray:
        """Corrected losses `[N]`."""
        return self.scale * predicted + sum(weight * terms[pair] for pair, weight in self.pairs.items())


def random_actions(rng: np.random.Generator, valid: Bool[np.ndarray, "T A"], count: int) -> Actions:
    """Level indices of random allocations of all sizes: each draws its own shares of the levels."""
    shares = rng.dirichlet(np.ones(valid.shape[1]), count)
    weight = shares[:, None, :] * valid  # [N, T, A]
    limits = np.cumsum(weight, axis=-1)
    return (rng.random((count, len(valid), 1)) * limits[..., -1:] >= limits).sum(axis=-1)


def predict(kld: Float[np.ndarray, "T A"], actions: Actions) -> Float[np.ndarray, " N"]:
    """Sum of the chosen cells."""
    return _chosen(kld, actions).sum(axis=1)


def pair_terms(kld: Float[np.ndarray, "T A"], members: Sequence[Tensor], actions: Actions) -> dict[Pair, np.ndarray]:
    """Σ_layers √(s_i s_j) of each pair of kinds of one layer, `[N]`."""
    root = np.sqrt(_chosen(kld, actions))
    of: dict[str, dict[int, np.ndarray]] = {}
    for i, tensor in enumerate(members):
        if tensor.layer is not None:
            of.setdefault(tensor.weight.name, {})[tensor.layer] = root[:, i]
    return {
        (a, b): sum((of[a][layer] * of[b][layer] for layer in of[a].keys() & of[b].keys()), np.zeros(len(root)))
        for a, b in itertools.combinations(of, 2)
    }


def fit(
    predicted: Float[np.ndarray, " N"], terms: Mapping[Pair, np.ndarray], true: Float[np.ndarray, " N"], pairs: int
) -> Correction:
    """Least relative squares with weights of pairs in −2..2; each pair taken is the one that lowers the error most."""
    chosen: list[Pair] = []
    weights, _ = _solve([predicted], true)
    for _ in range(pairs):
        rest = [pair for pair in terms if pair not in chosen]
        tried = {pair: _solve([predicted, *(terms[p] for p in [*chosen, pair])], true) for pair in rest}
        best = min(rest, key=lambda pair: tried[pair][1])
        chosen, weights = [*chosen, best], tried[best][0]
    return Correction(float(weights[0]), dict(zip(chosen, weights[1:].tolist(), strict=True)))


def true_losses(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float | str, ...],
    actions: Actions,
    protocol: Protocol = "llama.cpp",
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Mean KL divergence and change of the loss of whole allocations, nats per token.

    Every tensor is quantized once per level and kept on the host: as many copies of the weights as there are levels.
    """
    members = allocatable(model.spec)
    choices = [[_UNUSED] * len(levels) for _ in members]
    for cell in track(cells(members, levels), "quantizing", "tensor"):
        choices[cell.row][cell.column] = np.asarray(decoded(model, cell.tensor, cell.format.name))
    reference = reference_of(model, windows, protocol)
    before = evaluate(model, windows, protocol=protocol).mean_nll
    stored = ((t, decoded(model, t, FALLBACK)) for t in matrices(model.spec) if not t.allocatable)
    others, runs = replaced(model.params, stored), []
    for row in track(actions, "measuring allocations", "allocation"):
        chosen = [(tensor, jnp.asarray(choices[i][a])) for i, (tensor, a) in enumerate(zip(members, row, strict=True))]
        params = replaced(others, chosen)
        runs.append(evaluate(model, windows, params=params, reference=reference, protocol=protocol))
    return np.array([run.mean_kld for run in runs]), np.array([run.mean_nll - before for run in runs])


def _chosen(kld: Float[np.ndarray, "T A"], actions: Actions) -> Float[np.ndarray, "N T"]:
    return kld[np.arange(len(kld))[None], actions]


def _solve(columns: list[np.ndarray], true: Float[np.ndarray, " N"]) -> tuple[np.ndarray, float]:
    """Weights of the columns for the least mean squared relative error, and that error."""
    relative = np.stack(columns, axis=1) / true[:, None]
    pairs = len(columns) - 1
    bounds = ([0.0] + [-2.0] * pairs, [np.inf] + [2.0] * pairs)
    weights = lsq_linear(relative, np.ones(len(true)), bounds, method="bvls").x
    return weights, float(np.mean((relative @ weights - 1) ** 2))

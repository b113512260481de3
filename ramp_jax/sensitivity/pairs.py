"""What pairs of rounded tensors cost beyond the sum of their costs, from the same backward pass as the costs.

Rounded together, tensors move every sample of the Fisher estimate by the sum of their moves m (see `fisher.py`), and
cost ½ |Σ m|² = Σ ½ |m_i|² + Σ_{i<j} m_i · m_j. The products are small against the squares, but there are many, and an
optimizer finds those that are wrong: each is a sum over samples, whose scatter tells its variance, and it is shrunk
towards 0 as James and Stein (1961) do, by 1 − k · variance / square, to nothing where the noise could be all of it.
Samples are taken as independent, which probes of one token are not; k makes up for it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ramp_jax.journal import NOWHERE, Journal
from ramp_jax.models import Model, allocatable
from ramp_jax.quantization import Encoder
from ramp_jax.sensitivity.exact import cells
from ramp_jax.sensitivity.fisher import cells_of, fisher_moves, half_squares, rounding_errors

_PROBES = 8
_DOUBT = 8.0  # k; with 1 to 4, allocations of SmolLM2 got worse, with 16 those of smaller models gained less


class Estimate(NamedTuple):
    """Nats per token, 0 where a level is masked."""

    loss: Float[np.ndarray, "T A"]
    pairs: Float[np.ndarray, "T A T A"]
    """What two tensors at two levels lose together beyond their sum; 0 between levels of one tensor."""


def estimate(
    model: Model,
    windows: Int[np.ndarray, "W T"],
    levels: tuple[float | str, ...],
    encoder: Encoder,
    states: Float[np.ndarray, "L+1 W T D"] | None = None,
    journal: Journal = NOWHERE,
) -> Estimate:
    """Losses of single tensors and of pairs, for every allocatable tensor of `model`, scoring every token.

    `states` and `journal` as in `fisher_moves`. Raises `ValueError` naming the tensor where a loss is not finite.
    """
    members = allocatable(model.spec)
    every = cells(members, levels)
    changes = rounding_errors(model, every, encoder)
    moves = fisher_moves(model, windows, changes, "sliding", states=states, probes=_PROBES, journal=journal)
    at = [(cell.row, cell.column) for tensor in members for cell in cells_of(every, tensor)]
    m = np.concatenate([moves[tensor.name] for tensor in members])  # [cells, S]
    rows, columns = np.transpose(at)
    loss = np.zeros((len(members), len(levels)))
    loss[rows, columns] = half_squares(m)
    if not np.isfinite(loss).all():
        name = members[int(np.argwhere(~np.isfinite(loss))[0, 0])].name
        raise ValueError(f"what {name} loses is not finite; its weights or what calibration saw before it are not.")
    pairs = np.zeros((*loss.shape, *loss.shape), np.float32)
    apart = rows[:, None] != rows[None]
    pairs[rows[:, None], columns[:, None], rows[None], columns[None]] = np.where(apart, shrunk_products(m), 0.0)
    return Estimate(loss, pairs)


def shrunk_products(m: Float[np.ndarray, "C S"]) -> Float[np.ndarray, "C C"]:
    """m_i · m_j, each as much as its own noise leaves of it."""
    product = m @ m.T
    square = np.square(product)
    variance = np.maximum(np.square(m) @ np.square(m).T - square / m.shape[1], 0.0)
    return product * np.maximum(1 - _DOUBT * variance / np.maximum(square, np.finfo(np.float32).tiny), 0.0)

"""A few numbers that tell a model's weights from another model's, whatever precision either is stored in."""

from collections.abc import Sequence

import numpy as np

from ramp_jax.models.layout import Tensor, lookup, matrices
from ramp_jax.models.load import Model
from ramp_jax.models.store import rows_of

_EMBEDDED = 512  # rows of the embedding that are looked at
_SAME = 0.02  # that numbers of the same weights may differ by: Q8_0 moves them by 0.006, bfloat16 by 0.001


def sketch(model: Model) -> list[float]:
    """One number of the embedding and one of each matrix of the block in the middle.

    A number is xᵀ W y / |W| of two fixed vectors of signs: of other weights another one, of the order of 1. Rounding
    moves it by its own relative error, and so does fine-tuning.
    """
    middle = len(model.spec.blocks) // 2
    block = [tensor for tensor in matrices(model.spec) if tensor.layer == middle]
    embedding = next(tensor for tensor in matrices(model.spec) if tensor.layer is None)
    rows = slice(0, _EMBEDDED)
    values = [(embedding, rows_of(model.params, embedding, rows))]
    params = {"blk": {middle: model.params["blk"][middle]}}  # read once
    values += [(tensor, lookup(params, tensor)) for tensor in block]
    return [_number(tensor, np.asarray(value, np.float32)) for tensor, value in values]


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two sketches may be of the same weights."""
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=_SAME))


def _number(tensor: Tensor, weights: np.ndarray) -> float:
    draw = np.random.default_rng(len(tensor.name))
    left, right = (draw.choice(np.float32([-1, 1]), size) for size in weights.shape)
    norm = float(np.linalg.norm(weights))
    return float(left @ weights @ right) / norm if norm else 0.0

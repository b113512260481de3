"""How weights become codes: the one way for what is evaluated and for what is exported."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ramp_jax.checkpoint import digest
from ramp_jax.formats.check import EncodeCache, checked_encode
from ramp_jax.formats.registry import Effort
from ramp_jax.models import Model, Tensor, lookup
from ramp_jax.quantization.importance import Importance, folded

EncoderName = Literal["reference", "best", "compensated"]
DEFAULT_ENCODER: EncoderName = "compensated"
"""For new allocations; those that record none were made for ggml's own bytes."""

_LOG = logging.getLogger(__name__)


class Fitted(NamedTuple):
    """Codes that were found beforehand, and a fingerprint of the weights that they stand for."""

    codes: Any
    weights: str


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Codes for a model's tensors: `effort` of the search, weighted by `importance` where a tensor has an entry.

    Importance is that of the unfolded model; what a folding changes in it is applied here. With a `cache`, the same
    weights are encoded once. `fitted` codes by tensor and format were found before, for the weights of one folding.
    """

    effort: Effort = "reference"
    importance: Importance = dataclasses.field(default_factory=dict)
    cache: EncodeCache | None = None
    fitted: Mapping[tuple[str, str], Fitted] = dataclasses.field(default_factory=dict)

    def encode(self, model: Model, tensor: Tensor, fmt: str) -> Any:
        """Codes of one tensor of `model`, folded as it is.

        Raises `ValueError` where it cannot be encoded, or where codes were fitted to other weights of that name.
        """
        w = lookup(model.params, tensor).astype(jnp.float32)
        if (known := self.fitted.get((tensor.name, fmt))) is not None:
            if known.weights != digest(w):
                raise ValueError(
                    f"the codes of {tensor.name} were fitted to other weights; make the encoder again for this model "
                    f"and its folding."
                )
            return known.codes
        encode = checked_encode if self.cache is None else self.cache.encode
        return encode(tensor.name, w, fmt, self.weights_of(tensor, model.folding), self.effort)

    def weights_of(self, tensor: Tensor, folding: Mapping[str, jax.Array]) -> Float[np.ndarray, " I"] | None:
        """What weighs the errors of a tensor's columns in a model of this folding; None where all count alike."""
        weights = folded(self.importance, tensor, folding)
        if weights is not None and not weights.any():
            _say_unweighted(tensor.name)
            return None
        return weights


@functools.cache
def _say_unweighted(tensor: str) -> None:
    """Once per tensor, however often it is encoded."""
    _LOG.warning("calibration saw no activation before %s; it is rounded unweighted.", tensor)


REFERENCE = Encoder()
"""ggml's own bytes, without importance."""

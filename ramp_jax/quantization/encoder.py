"""How weights become codes: the one way for what is evaluated and for what is exported."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ramp_jax.allocation import EncoderName
from ramp_jax.formats.check import EncodeCache, checked_encode
from ramp_jax.formats.registry import Effort
from ramp_jax.models import DecoderSpec, Model, Tensor, lookup
from ramp_jax.quantization.importance import NO_ORIGIN, Importance, Origin, folded, linears

DEFAULT_ENCODER: EncoderName = "compensated"
"""For new allocations; those that record none were made for ggml's own bytes."""

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Codes for a model's tensors: `effort` of the search, weighted by `importance` where a tensor has an entry.

    Importance is that of the unfolded model; what a folding changes in it is applied here. With calibration `windows`,
    `encoded` finds what is not known while a block is there: importance where there is none, and what `compensated`
    rounding needs. With a `cache`, the same weights are encoded once. `origin` says where importance comes from.
    """

    effort: Effort = "reference"
    importance: Importance = dataclasses.field(default_factory=dict)
    cache: EncodeCache | None = None
    windows: Int[np.ndarray, "W T"] | None = None
    compensated: bool = False
    origin: Origin = NO_ORIGIN

    def imatrix_pairs(self, spec: DecoderSpec) -> dict[str, Any]:
        """What a file says of the importance that it was rounded with; nothing where there was none."""
        return self.origin.pairs(len(linears(spec)) if self.observes else len(self.importance))

    @property
    def observes(self) -> bool:
        """Whether importance is to be found on the windows."""
        return self.windows is not None and not self.importance

    def encode(self, model: Model, tensor: Tensor, fmt: str) -> Any:
        """Codes of one tensor of `model`, folded as it is, by itself.

        Raises `ValueError` where it cannot be encoded, or where that takes a sweep.
        """
        if self.windows is not None:
            raise ValueError("this encoder looks at activations; take all tensors from `encoded`.")
        return self.encode_rows(tensor, lookup(model.params, tensor), fmt, model.folding)

    def encode_rows(
        self, tensor: Tensor, w: Float[Array, "*rows I"], fmt: str, folding: Mapping[str, jax.Array]
    ) -> Any:
        """Codes of some rows of a tensor of a model folded by `folding`; raises `ValueError` where that cannot be."""
        encode = checked_encode if self.cache is None else self.cache.encode
        return encode(tensor.name, w.astype(jnp.float32), fmt, self.weights_of(tensor, folding), self.effort)

    def weights_of(self, tensor: Tensor, folding: Mapping[str, jax.Array]) -> Float[np.ndarray, " I"] | None:
        """What weighs the errors of a tensor's columns in a model of this folding: None where nothing is known, zeros
        where calibration saw nothing, so that all count alike."""
        weights = folded(self.importance, tensor, folding)
        if weights is not None and not weights.any():
            _say_unweighted(tensor.name)
        return weights


@functools.cache
def _say_unweighted(tensor: str) -> None:
    """Once per tensor, however often it is encoded."""
    _LOG.warning("calibration saw no activation before %s; it is rounded unweighted.", tensor)


REFERENCE = Encoder()
"""ggml's own bytes, without importance."""

"""What only the Gemmas have: queries scaled by a number of the config, which llama.cpp derives from the sizes."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ramp_jax.models.families.properties import Property, Values, positive

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec


@dataclasses.dataclass(frozen=True)
class QueryScale(Property):
    """Scores of attention scaled by 1 / √`query_pre_attn_scalar`.

    GGUFs do not say it: llama.cpp scales by 1 / √head_size, in models of `wide_layers` layers by 1 / √(d_model /
    n_heads). A checkpoint with another number is loaded with its queries multiplied by the ratio (`query_factor`),
    which is the same function.
    """

    wide_layers: int
    hf_keys = ("query_pre_attn_scalar",)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """The scale that llama.cpp has, and the ratio of the config's to it."""
        scale = self._scale(found)
        asked = config.get("query_pre_attn_scalar")
        asked = found["head_size"] if asked is None else positive("config.json: query_pre_attn_scalar", asked)
        return {"attention_scale": scale, "query_factor": asked**-0.5 / scale}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """The number of the scale as it is."""
        return {"query_pre_attn_scalar": round(spec.attention_scale**-2)}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """The scale that llama.cpp has."""
        return {"attention_scale": self._scale(found)}

    def _scale(self, found: Values) -> float:
        wide = found["n_layers"] == self.wide_layers
        return float(found["d_model"] // found["n_heads"] if wide else found["head_size"]) ** -0.5

"""What only SmolLM3 has: layers without rotary positions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ramp_jax.models.families.properties import Property, Values, not_computed

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

_PERIOD = 4  # llama.cpp knows no other


class Unrotated(Property):
    """Every fourth layer tells no positions."""

    hf_keys = ("no_rope_layers", "no_rope_layer_interval")

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """By `no_rope_layers`, where 0 marks the layers without positions."""
        layers = self._layers(found)
        marks = config.get("no_rope_layers")
        if marks is not None and [i for i, mark in enumerate(marks[: found["n_layers"]]) if not mark] != list(layers):
            raise not_computed(f"config.json asks for no_rope_layers {marks} instead of every {_PERIOD}th")
        return {"unrotated": layers}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Both keys."""
        marks = [int(layer not in spec.unrotated) for layer in range(spec.n_layers)]
        return {"no_rope_layers": marks, "no_rope_layer_interval": _PERIOD}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """As llama.cpp has it."""
        return {"unrotated": self._layers(found)}

    @staticmethod
    def _layers(found: Values) -> tuple[int, ...]:
        return tuple(range(_PERIOD - 1, found["n_layers"], _PERIOD))

"""Rotary positions in both kinds of description: base frequency, rotated dimensions, scaling for long contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ramp_jax.models.families.properties import (
    FULL,
    WINDOWED,
    Property,
    Values,
    not_computed,
    positive,
    shortest,
    unexpected,
    whole,
)
from ramp_jax.models.rope import Rope, Yarn, llama3_factors

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (FREQS, SHORT, LONG)
"""Tensors of a GGUF that divide frequencies one by one; they follow from the spec and are no parameters."""

_THETA = 10_000.0
_LEAST_BASE = 1.0625  # YaRN divides by its logarithm
_SCALING = "rope.scaling."


@dataclasses.dataclass(frozen=True)
class Positions(Property):
    """Rotary positions, equal in all layers or of their own base frequency in layers with a window (`local`).

    `scalings` are the kinds that llama.cpp computes for the architecture beside linear scaling: `llama3` and `longrope`
    where it reads tables of divisors, `yarn` with the usual bounds, or with any (`free_yarn`). `partial` says that it
    can rotate a part of each head. `optional`: a GGUF can switch positions off. `length_key`: it always holds the
    original context.
    """

    scalings: tuple[str, ...] = ("yarn",)
    free_yarn: bool = False
    partial: bool = False
    local: bool = False
    optional: bool = False
    length_key: bool = False
    hf_keys = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "rope_local_base_freq",
    )
    gguf_keys = (
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.dimension_count",
        "rope.scale_linear",
        *(_SCALING + key for key in ("type", "factor", "attn_factor", "original_context_length", "finetuned")),
        *(_SCALING + key for key in ("yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")),
    )

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """By `rope_parameters`, or `rope_theta` and `rope_scaling` of older configs."""
        described = _mapping(config, "rope_parameters") or _mapping(config, "rope_scaling")
        by_kind = {kind: described[kind] for kind in (FULL, WINDOWED) if isinstance(described.get(kind), Mapping)}
        main = by_kind.get(FULL, described)
        if not self.local and any(other != main for other in by_kind.values()):
            raise not_computed("config.json asks for other positions in layers with a window")
        rope = self._rope_from_hf(config, main, found)
        local = None
        if self.local:
            theta = by_kind.get(WINDOWED, {}).get("rope_theta", config.get("rope_local_base_freq"))
            if (kind := by_kind.get(WINDOWED, {}).get("rope_type", "default")) != "default":
                raise not_computed(f"config.json asks for rope scaling {kind!r} in layers with a window")
            theta = rope.theta if theta is None else _base("config.json: rope_theta of windows", theta)
            local = Rope(theta, rope.size)
        return {"rope": rope, "local_rope": local if local != rope else None}

    def _rope_from_hf(self, config: Mapping[str, Any], rope: Mapping[str, Any], found: Values) -> Rope:
        kind = rope.get("rope_type", rope.get("type"))
        kind = "default" if kind is None else "longrope" if kind == "su" else kind
        if kind not in ("default", "linear", *self.scalings):
            raise not_computed(f"config.json asks for rope scaling {kind!r}")
        theta = _base("config.json: rope_theta", rope.get("rope_theta", config.get("rope_theta", _THETA)))
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        part = 1.0 if share is None else positive("config.json: partial_rotary_factor", share)
        size = int(found["head_size"] * part)
        self._check_size(size, found, f"config.json asks for partial_rotary_factor {share}")
        plain = Rope(theta, size)
        if kind == "default":
            return plain
        key = "original_max_position_embeddings"
        given = (part[key] for part in (rope, config) if part.get(key) is not None)
        original = whole(f"config.json: {key}", next(given, found["context_length"]), least=2)
        if kind == "longrope":
            return _longrope_from_hf(plain, rope, original, found["context_length"])
        factor = positive("config.json: factor of the rope scaling", rope.get("factor"))
        if kind == "linear":
            return dataclasses.replace(plain, factor=factor)
        if kind == "llama3":
            low, high = (
                positive(f"config.json: {key}", rope.get(key)) for key in ("low_freq_factor", "high_freq_factor")
            )
            if low >= high:
                raise ValueError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}.")
            factors = llama3_factors(theta, size, factor, low, high, original)
            return dataclasses.replace(plain, factors=tuple(map(shortest, factors)))
        if rope.get("truncate", True) is not True:
            raise not_computed("config.json asks for YaRN whose bounds are not whole dimensions (truncate)")
        betas = {"beta_fast": _or(32, rope.get("beta_fast")), "beta_slow": _or(1, rope.get("beta_slow"))}
        bounds = Yarn(original, *(positive(f"config.json: {key}", beta) for key, beta in betas.items()))
        self._check_bounds(bounds, "config.json")
        return dataclasses.replace(plain, factor=factor, yarn=bounds, magnitude=_yarn_magnitude(rope, factor))

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """`rope_parameters`; divisors one by one are written as LongRoPE's, whose magnitude can be given."""
        rope = spec.rope
        described: Values = {"rope_theta": rope.theta, "rope_type": "default"}
        if self.partial:
            described["partial_rotary_factor"] = rope.size / spec.head_size
        if rope.yarn is not None:
            bounds = {"beta_fast": rope.yarn.beta_fast, "beta_slow": rope.yarn.beta_slow}
            described |= {"rope_type": "yarn", "factor": rope.factor, "attention_factor": rope.magnitude, **bounds}
            described["original_max_position_embeddings"] = rope.yarn.original_context
        elif rope.factors or rope.magnitude != 1:
            original = rope.original_context or spec.context_length
            short = rope.factors or (1.0,) * (rope.size // 2)
            both = {"short_factor": short, "long_factor": rope.long_factors or short}
            factors = {key: [shortest(f * rope.factor) for f in values] for key, values in both.items()}
            described |= {"rope_type": "longrope", "attention_factor": rope.magnitude, **factors}
            described |= {"factor": spec.context_length / original, "original_max_position_embeddings": original}
        elif rope.factor != 1:
            described |= {"rope_type": "linear", "factor": rope.factor}
        if spec.temperature:
            described["llama_4_scaling_beta"] = spec.temperature[0]
        if self.local:
            windowed = {"rope_type": "default", "rope_theta": (spec.local_rope or rope).theta}
            described = {FULL: described, WINDOWED: windowed}
        length = {"original_max_position_embeddings": rope.original_context or spec.context_length}
        return {"rope_parameters": described} | (length if self.length_key else {})

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """By `rope.*` and the tables of divisors; what the architecture's decoder in llama.cpp ignores is refused."""
        scaling = {key.removeprefix(_SCALING): value for key, value in pairs.items() if key.startswith(_SCALING)}
        size = whole("the GGUF's rope.dimension_count", pairs.get("rope.dimension_count", found["head_size"]))
        self._check_size(size, found, f"the GGUF asks for rope.dimension_count {size} of {found['head_size']}")
        if self.optional and scaling.get("finetuned") is False:
            raise not_computed("the GGUF asks for attention without positions (rope.scaling.finetuned)")
        theta = _base("the GGUF's rope.freq_base", pairs.get("rope.freq_base", _THETA))
        kind = scaling.get("type", "linear")
        stretch = _or(1.0, scaling.get("factor", pairs.get("rope.scale_linear")))
        factor = 1.0 if kind == "none" else positive("the GGUF's rope.scaling.factor", stretch)
        magnitude = positive("the GGUF's rope.scaling.attn_factor", scaling.get("attn_factor", 1.0))
        if kind not in ("none", "linear", *self.scalings):
            raise not_computed(f"the GGUF asks for rope scaling {kind!r}")
        rope = Rope(theta, size, factor, magnitude=magnitude, **self._tables(found, size))
        original = scaling.get("original_context_length", found["context_length"])
        if rope.long_factors:
            rope = dataclasses.replace(rope, original_context=whole("the GGUF's original_context_length", original))
        if kind == "yarn":
            bounds = Yarn(whole("the GGUF's original_context_length", original), *_bounds(scaling))
            self._check_bounds(bounds, "the GGUF")
            grown = _grown(factor)
            if (share := _or(None, scaling.get("yarn_log_multiplier"))) is not None and self.free_yarn:
                grown /= _grown(factor, positive("the GGUF's yarn_log_multiplier", share))
            rope = dataclasses.replace(rope, yarn=bounds, magnitude=shortest(magnitude * grown))
        local = None
        if self.local:
            local = Rope(_base("the GGUF's rope.freq_base_swa", pairs.get("rope.freq_base_swa", _THETA)), size)
        return {"rope": rope, "local_rope": local if local != rope else None}

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """`rope.*`; the tables are `tables`."""
        rope = spec.rope
        pairs: Values = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.size}
        if self.local:
            pairs["rope.freq_base_swa"] = (spec.local_rope or rope).theta
        magnitude = rope.magnitude
        if rope.yarn is not None:
            pairs |= {_SCALING + "type": "yarn", _SCALING + "factor": rope.factor}
            pairs[_SCALING + "original_context_length"] = rope.yarn.original_context
            if self.free_yarn:
                pairs[_SCALING + "yarn_beta_fast"] = rope.yarn.beta_fast
                pairs[_SCALING + "yarn_beta_slow"] = rope.yarn.beta_slow
            magnitude /= _grown(rope.factor)
        elif rope.factor != 1:
            pairs |= {_SCALING + "type": "linear", _SCALING + "factor": rope.factor}
        if rope.long_factors or self.length_key:
            pairs[_SCALING + "original_context_length"] = rope.original_context or spec.context_length
        if rope.long_factors and not self.length_key:
            pairs[_SCALING + "type"] = "longrope"  # where it is always there, the architecture looks for the tables
        if not math.isclose(magnitude, 1.0, rel_tol=1e-6):
            pairs[_SCALING + "attn_factor"] = magnitude
        return pairs

    def _tables(self, found: Values, size: int) -> Values:
        """Divisors by the tables of a GGUF."""
        tables = {name: tuple(map(shortest, values)) for name, values in found["tables"].items()}
        for name, values in tables.items():
            kind = "llama3" if name == FREQS else "longrope"
            if kind not in self.scalings:
                raise not_computed(f"the GGUF holds {name}")
            if len(values) != size // 2:
                raise ValueError(f"{name} holds {len(values)} numbers instead of {size // 2}; download the file again.")
            for value in values:
                positive(f"a divisor of {name}", value)
        if (SHORT in tables) != (LONG in tables):
            raise ValueError(f"the GGUF holds only one of {SHORT} and {LONG}; download the file again.")
        if FREQS in tables:
            return {"factors": tables[FREQS]}
        return {"factors": tables[SHORT], "long_factors": tables[LONG]} if LONG in tables else {}

    def _check_size(self, size: int, found: Values, asked: str) -> None:
        if found["head_size"] % 2:
            raise ValueError(f"heads of {found['head_size']} dimensions have no pairs to rotate; use other sizes.")
        if size % 2 or not 0 < size <= found["head_size"] or (size < found["head_size"] and not self.partial):
            raise not_computed(asked)

    def _check_bounds(self, bounds: Yarn, source: str) -> None:
        usual = Yarn(bounds.original_context)
        if bounds != usual and not self.free_yarn:
            asked = f"beta_fast {bounds.beta_fast:g} and beta_slow {bounds.beta_slow:g}"
            raise not_computed(f"{source} asks for YaRN with {asked}; llama.cpp has 32 and 1 for this architecture")


def tables(rope: Rope) -> dict[str, tuple[float, ...]]:
    """The tables of divisors of a GGUF, by name."""
    if rope.long_factors:
        return {LONG: rope.long_factors, SHORT: rope.factors}
    return {FREQS: rope.factors} if rope.factors else {}


@dataclasses.dataclass(frozen=True)
class Temperature(Property):
    """Queries that grow with their position: `llama_4_scaling_beta`, over the original context of the rope scaling."""

    gguf_keys = ("attention.temperature_scale",)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """β among the `rope_parameters`."""
        beta = _mapping(config, "rope_parameters").get("llama_4_scaling_beta")
        return self._field("config.json: llama_4_scaling_beta", beta, found)

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Nothing: `Positions` writes it among the `rope_parameters`."""
        return {}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """β."""
        return self._field("the GGUF's attention.temperature_scale", pairs.get("attention.temperature_scale"), found)

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """β."""
        return {"attention.temperature_scale": spec.temperature[0]} if spec.temperature else {}

    @staticmethod
    def _field(where: str, beta: Any, found: Values) -> Values:
        if _or(None, beta) is None:
            return {}
        if found["rope"].yarn is None:
            raise not_computed(f"{where} without YaRN")
        return {"temperature": (positive(where, beta), found["rope"].yarn.original_context)}


def _base(where: str, value: Any) -> float:
    """A base frequency, which slower and slower turns are the powers of."""
    return positive(where, value, least=_LEAST_BASE)


def _or(default: Any, value: Any) -> Any:
    """A value, or the default where it is left out or 0, which means the same."""
    return default if value is None or (value == 0 and not isinstance(value, bool)) else value


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = {} if config.get(key) is None else config[key]
    if not isinstance(value, Mapping):
        raise unexpected(f"config.json: {key}", value, "an object")
    return value


def _longrope_from_hf(plain: Rope, rope: Mapping[str, Any], original: int, context: int) -> Rope:
    short, long = (_factors(rope, key, plain.size) for key in ("short_factor", "long_factor"))
    factor = positive("config.json: factor of the rope scaling", _or(context / original, rope.get("factor")))
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = rope.get("attention_factor")
    magnitude = positive("config.json: attention_factor", usual if given is None else given)
    if short == long:
        return dataclasses.replace(plain, factors=short, magnitude=magnitude)
    return dataclasses.replace(plain, factors=short, long_factors=long, original_context=original, magnitude=magnitude)


def _factors(rope: Mapping[str, Any], key: str, size: int) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or len(values) != size // 2:
        raise ValueError(f"config.json: {key} of the rope scaling is not a list of {size // 2} numbers.")
    return tuple(positive(f"config.json: {key}", value) for value in values)


def _yarn_magnitude(rope: Mapping[str, Any], factor: float) -> float:
    """What multiplies cosines and sines: as given, or by the factor and the two `mscale`."""
    if (given := rope.get("attention_factor")) is not None:
        return positive("config.json: attention_factor", given)
    over, under = (_or(None, rope.get(key)) for key in ("mscale", "mscale_all_dim"))
    if over is None or under is None:
        return shortest(_grown(factor))
    return shortest(
        _grown(factor, positive("config.json: mscale", over))
        / _grown(factor, positive("config.json: mscale_all_dim", under))
    )


def _grown(factor: float, share: float = 1.0) -> float:
    """YaRN's magnitude of a context stretched by `factor`."""
    return 1 + 0.1 * share * math.log(factor) if factor > 1 else 1.0


def _bounds(scaling: Mapping[str, Any]) -> tuple[float, float]:
    fast, slow = scaling.get("yarn_beta_fast", 32.0), scaling.get("yarn_beta_slow", 1.0)
    return positive("the GGUF's yarn_beta_fast", fast), positive("the GGUF's yarn_beta_slow", slow)

"""How the properties of a decoder stand in a `config.json` and among a GGUF's pairs: read and written by one object.

A property reads fields of `DecoderSpec` from either description and writes them to both. A description that has a key
which no property of its family reads asks for something that the decoder does not compute, and is refused by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ramp_jax.models.spec import DecoderSpec

Values = dict[str, Any]
"""Fields of `DecoderSpec`, or keys of a description, by name."""

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_LEAST, _MOST = 1e-20, 1e20  # products of a few such numbers are finite in f32

FULL, WINDOWED = "full_attention", "sliding_attention"


class Property:
    """One property, or a few that belong together, in both kinds of description.

    `hf_keys` and `gguf_keys` (without the architecture's name) are all that it reads. `found` are the fields that
    properties before it found. Readers raise `ValueError` for values that make no sense or that are not computed.
    """

    hf_keys: tuple[str, ...] = ()
    gguf_keys: tuple[str, ...] = ()

    def check_hf(self, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` for values of a `config.json` that make no sense, before defaults are filled in."""

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """Fields by the contents of a `config.json`; none where the property is not said there."""
        return {}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Keys of a `config.json`."""
        return {}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Fields by a GGUF's pairs; none where the property is not said there."""
        return {}

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """A GGUF's pairs."""
        return {}


@dataclasses.dataclass(frozen=True)
class Number(Property):
    """A number that both descriptions hold as it is, at most `most`: a count (`whole`) or any positive number.

    `default` makes it of the fields found before where a description lacks it (`gguf_default` where a GGUF does, if
    that differs); None where it must be there. A `neutral` value is not written to a GGUF.
    """

    field: str
    hf: str
    gguf: str
    whole: bool = False
    most: float | None = None
    default: Callable[[Values], Any] | None = None
    neutral: float | None = None
    gguf_default: Callable[[Values], Any] | None = None

    @property
    def hf_keys(self) -> tuple[str, ...]:
        """Its key in `config.json`."""
        return (self.hf,)

    @property
    def gguf_keys(self) -> tuple[str, ...]:
        """Its key in a GGUF."""
        return (self.gguf,)

    def check_hf(self, config: Mapping[str, Any]) -> None:
        """The number, where there is one."""
        if config.get(self.hf) is not None:
            self.from_hf(config, {})

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """The number under its key."""
        return {self.field: self._checked(f"config.json: {self.hf}", config.get(self.hf), found, self.default)}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """The number under its key."""
        return {self.hf: getattr(spec, self.field)}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """The number under its key; a list of one number per layer counts as that number."""
        value = pairs.get(self.gguf)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        default = self.gguf_default or self.default
        return {self.field: self._checked(f"the GGUF's {self.gguf}", value, found, default)}

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """The number under its key."""
        value = getattr(spec, self.field)
        return {} if value == self.neutral else {self.gguf: value}

    def _checked(self, where: str, value: Any, found: Values, default: Callable[[Values], Any] | None) -> Any:
        if value is None:
            if default is None:
                raise ValueError(f"{where} is missing; download the model again or add it.")
            if (value := default(found)) is None:
                return None
        check: Callable[..., Any] = whole if self.whole else positive
        return check(where, value) if self.most is None else check(where, value, most=self.most)


@dataclasses.dataclass(frozen=True)
class Equal(Property):
    """A GGUF key that says again what another field says; any other value asks for what is not computed."""

    gguf: str
    field: str
    written: bool = False

    @property
    def gguf_keys(self) -> tuple[str, ...]:
        """Its key."""
        return (self.gguf,)

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Nothing, or an error."""
        if self.gguf in pairs and pairs[self.gguf] != found[self.field]:
            raise not_computed(f"the GGUF asks for {self.gguf} = {pairs[self.gguf]} beside {found[self.field]}")
        return {}

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """The field again."""
        return {self.gguf: getattr(spec, self.field)} if self.written else {}


class Tied(Property):
    """Whether the embedding is the head; a GGUF says it by having no `output.weight`."""

    hf_keys = ("tie_word_embeddings",)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """The flag."""
        return {"tied": flag("config.json: tie_word_embeddings", config.get("tie_word_embeddings", False))}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """The flag."""
        return {"tie_word_embeddings": spec.tied}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Whether `output.weight` is absent among the file's tensors."""
        return {"tied": "output.weight" not in found["tensors"]}


@dataclasses.dataclass(frozen=True)
class Biases(Property):
    """Which linears have biases: those of `always`, and those that a flag of the config switches on.

    A GGUF says it by the tensors that it has.
    """

    always: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def hf_keys(self) -> tuple[str, ...]:
        """The flags."""
        return tuple(self.flags)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """Linears of all flags that are set."""
        on = [
            name for key, names in self.flags.items() if flag(f"config.json: {key}", config.get(key)) for name in names
        ]
        return {"biased": (*self.always, *on)}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Every flag."""
        return {key: set(names) <= set(spec.biased) for key, names in self.flags.items()}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Linears of the first block that have a bias."""
        able = (*self.always, *(name for names in self.flags.values() for name in names))
        return {"biased": tuple(name for name in able if f"blk.0.{name}.bias" in found["tensors"])}


@dataclasses.dataclass(frozen=True)
class Activation(Property):
    """The function of the MLP, which a family fixes: any other that a config names is refused.

    `names` are those that mean it under `hidden_activation` or `hidden_act`, the first of them written; `old_names`
    mean it under `hidden_act` alone, where `hidden_activation` is null.
    """

    names: tuple[str, ...] = ("silu", "swish")
    old_names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ("hidden_act",)
    hf_keys = ("hidden_act", "hidden_activation")
    gguf_keys = ("hidden_activation",)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """Nothing, or an error."""
        new, old = config.get("hidden_activation"), config.get("hidden_act")
        allowed = self.names if new is not None else (*self.names, *self.old_names)
        asked = old if new is None else new
        if asked is not None and asked not in allowed:
            raise not_computed(f"config.json asks for activation {asked!r} instead of {self.names[0]!r}")
        return {}

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Its name, under each of the family's keys."""
        return dict.fromkeys(self.keys, self.names[0])

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Nothing, or an error."""
        if (asked := pairs.get("hidden_activation")) not in (None, *self.names, *self.old_names):
            raise not_computed(f"the GGUF asks for activation {asked!r} instead of {self.names[0]!r}")
        return {}


class AllFull(Property):
    """Attention without windows: configs that ask for some are refused."""

    hf_keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    gguf_keys = (WINDOW, PATTERN)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """Nothing, or an error."""
        others = set(config.get("layer_types") or ()) - {FULL}
        size = config.get("sliding_window")
        if config.get("use_sliding_window", size is not None):
            raise not_computed(f"config.json asks for attention in sliding windows of {size} tokens")
        if others:
            raise not_computed(f"config.json asks for layers of type {min(map(str, others))!r}")
        return {}

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """Nothing, or an error."""
        if size := pairs.get(WINDOW):
            raise not_computed(f"the GGUF asks for attention in sliding windows of {size} tokens")
        return {}


@dataclasses.dataclass(frozen=True)
class Windows(Property):
    """Attention in sliding windows: their size, and which layers have them.

    Without a list of layers, every `period`-th sees all tokens; 0: all layers have windows, always. `gguf_size` is the
    window of a GGUF that does not name one, None: no windows. `zero` says that a GGUF without windows says so by a 0.
    """

    period: int = 0
    gguf_size: int | None = None
    zero: bool = False
    hf_keys = ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")
    gguf_keys = (WINDOW, PATTERN)

    def from_hf(self, config: Mapping[str, Any], found: Values) -> Values:
        """By `sliding_window` and `layer_types`."""
        size = config.get("sliding_window")
        if size is None:
            return {}
        types = config.get("layer_types")
        if types is not None and (len(types) != found["n_layers"] or set(types) - {FULL, WINDOWED}):
            raise not_computed(f"config.json: layer_types {types} is no list of {FULL} and {WINDOWED} for every layer")
        period = config.get("sliding_window_pattern", self.period)
        layers = [kind == WINDOWED for kind in types] if types else self._layers(period, found)
        return self._fields("config.json: sliding_window", size, layers)

    def to_hf(self, spec: "DecoderSpec") -> Values:
        """Both keys; types of layers only where the family has two."""
        types = [WINDOWED if windowed else FULL for windowed in spec.windowed]
        return {"sliding_window": spec.window} | ({"layer_types": types} if spec.window and self.period else {})

    def from_gguf(self, pairs: Mapping[str, Any], found: Values) -> Values:
        """By the window's size and its pattern: one flag per layer, or a period."""
        size = pairs.get(WINDOW, self.gguf_size)
        if not size:
            return {}
        pattern = pairs.get(PATTERN, self.period)
        if isinstance(pattern, list) and len(pattern) < found["n_layers"]:
            raise ValueError("the GGUF's attention.sliding_window_pattern is shorter than its list of blocks.")
        layers = [bool(p) for p in pattern] if isinstance(pattern, list) else self._layers(pattern, found)
        return self._fields("the GGUF's attention.sliding_window", size, layers[: found["n_layers"]])

    def to_gguf(self, spec: "DecoderSpec") -> Values:
        """The size, and the pattern where it is not the family's own."""
        if spec.window is None:
            return {WINDOW: 0} if self.zero else {}
        usual = self._layers(self.period, {"n_layers": spec.n_layers})
        pairs: Values = {WINDOW: spec.window}
        return pairs if list(spec.windowed) == usual else pairs | {PATTERN: np.asarray(spec.windowed)}

    @staticmethod
    def _layers(period: int, found: Values) -> list[bool]:
        period = whole("the period of sliding windows", period) if period else 0
        return [period == 0 or (layer + 1) % period != 0 for layer in range(found["n_layers"])]

    def _fields(self, where: str, size: Any, layers: list[bool]) -> Values:
        if self.period == 0 and not all(layers):
            raise not_computed(f"{where} of some layers only")
        return {"window": whole(where, size), "windowed": tuple(layers)} if any(layers) else {}


def whole(where: str, value: Any, most: int = 2**31 - 1, least: int = 1) -> int:
    """A whole number from `least` to `most`; raises `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise unexpected(where, value, f"a whole number from {least} to {most:,}")
    return int(value)


def flag(where: str, value: Any) -> bool:
    """A flag, off where it is None; raises `ValueError` for anything but true and false."""
    if value is not None and not isinstance(value, bool):
        raise unexpected(where, value, "true or false")
    return bool(value)


def positive(where: str, value: Any, least: float = _LEAST, most: float = _MOST) -> float:
    """A number from `least` to `most`, as `shortest`; raises `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise unexpected(where, value, f"a number from {least:g} to {most:g}")
    return shortest(value)


def shortest(value: float) -> float:
    """The shortest decimal of the same f32: one number whether a config says it or a GGUF, which rounds it."""
    return float(str(np.float32(value)))


def unexpected(where: str, value: Any, expected: str) -> ValueError:
    """The error of a description whose value makes no sense."""
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return ValueError(f"{where} is {shown}, {expected} was expected; correct it or download the model again.")


def not_computed(asked: str) -> ValueError:
    """The error of a description that asks for what a family's decoder does not compute."""
    return ValueError(f"{asked}, which this decoder does not compute; use another checkpoint.")


def is_neutral(key: str, value: Any) -> bool:
    """Whether a key that nobody reads asks for nothing: absent, off, empty, or a factor of 1."""
    if isinstance(value, list):
        return all(is_neutral(key, item) for item in value)
    if value == 1 and not isinstance(value, bool):
        return any(word in key for word in ("factor", "multiplier", "scal"))
    return value is None or value in (0, "", "none", {})

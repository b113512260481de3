"""What a file or a config may hold, written as types, and the gate through which its content comes in.

A schema is `str`, `bool`, `int`, `float` (finite; whole numbers count as well), a `Literal`, `tuple[X, ...]`,
`Mapping[str, X]`, a `TypedDict`, a dataclass (whose fields may be left out), a union of one of these and None or of the
plain ones, or one of them `Annotated` with a `Check`. Nothing is converted but lists, which become tuples.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")

_PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}
_LONGEST_CAUSE, _LONGEST_VALUE = 300, 80  # characters


class Check(NamedTuple):
    """What a value of a type must fulfil beside, and in words, after "expected"."""

    holds: Callable[[Any], bool]
    expected: str


def within(least: float, most: float) -> Check:
    """A number from `least` to `most`."""
    return Check(lambda value: least <= value <= most, f"a number from {least:,} to {most:,}")


Count = Annotated[int, within(1, 2**31 - 1)]
Bytes = Annotated[int, within(1, 2**50)]
Share = Annotated[float, within(0, 1)]
Positive = Annotated[float, Check(lambda value: value > 0, "a finite number above 0")]
NotNegative = Annotated[float, Check(lambda value: value >= 0, "a finite number, not below 0")]
Name = Annotated[str, Check(lambda text: bool(text) and text.isprintable(), "a text that can be printed")]
Sha256 = Annotated[str, Check(lambda text: len(text) == 64 and set(text) <= set("0123456789abcdef"), "64 hex digits")]


def read(kind: Any, value: Any, name: str = "") -> Any:
    """`value` as the schema `kind` has it; raises `ValueError` for the first part of it that does not fit.

    `name` is what the error calls it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType) and type(None) in arguments:
        (other,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else read(other, value, name)
    if origin in (Union, types.UnionType):
        expected = " or ".join(_PLAIN[argument] for argument in arguments)
        _expect(any(_is_plain(argument, value) for argument in arguments), name, value, expected)
        return value
    if origin is Annotated:
        found = read(arguments[0], value, name)
        for check in kind.__metadata__:
            _expect(check.holds(found), name, value, check.expected)
        return found
    if origin is Literal:
        _expect(value in arguments, name, value, " or ".join(map(str, arguments)))
    elif origin is tuple:
        _expect(isinstance(value, list | tuple), name, value, "a list")
        return tuple(read(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    elif origin is Mapping:
        _expect(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), name, value, "an object")
        return {key: read(arguments[1], item, _within(name, key)) for key, item in value.items()}
    elif dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _read_fields(kind, value, name)
    elif kind in _PLAIN:
        _expect(_is_plain(kind, value), name, value, _PLAIN[kind])
    return value


@contextlib.contextmanager
def gate(path: str | Path, what: str, way_out: str) -> Iterator[None]:
    """Around all that makes sense of a file that has to be `what`.

    Whatever is raised inside, of whatever library, becomes a `ValueError` that names the file, the cause and the
    `way_out`; `FileNotFoundError` where `content` finds no file.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is no file, where {what} was expected; {way_out}.") from error
    except Exception as error:
        raise ValueError(f"{path} is not {what} ({cause_of(error)}); {way_out}.") from error


def content(path: str | Path) -> bytes:
    """All bytes of a file; raises `FileNotFoundError` where there is none, or what has no end (a device, a pipe)."""
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    return Path(path).read_bytes()


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; raises `ValueError` also for repeated keys and for numbers that JSON does not have."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{_shown(key)} is there twice")
            found[key] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(content(path).decode("utf-8"), object_pairs_hook=object_of, parse_constant=refuse)


def cause_of(error: BaseException) -> str:
    """What an error says, in one short line that does not end a sentence."""
    said = " ".join(str(error).split()).removesuffix(".")
    said = said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}".removesuffix(": ")
    return said if len(said) <= _LONGEST_CAUSE else said[:_LONGEST_CAUSE] + " ..."


def _read_fields(kind: Any, value: Any, name: str) -> Any:
    """The fields of a dataclass or a `TypedDict`."""
    _expect(isinstance(value, Mapping), name, value, "an object")
    hints, owner = get_type_hints(kind, include_extras=True), name or "it"
    required = frozenset() if dataclasses.is_dataclass(kind) else kind.__required_keys__
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(_shown(key), hints, 1)
            advice = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(hints)}"
            raise ValueError(f"{owner} has no field {_shown(key)}, {advice}")
    if missing := [key for key in hints if key in required and key not in value]:
        raise ValueError(f"{owner} lacks the field {missing[0]!r}")
    return kind(**{key: read(_optional(hints[key]), item, _within(name, key)) for key, item in value.items()})


def _optional(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is NotRequired else kind


def _is_plain(kind: type, value: Any) -> bool:
    if kind in (str, bool):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    if kind is int:
        return True
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _expect(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name or 'it'} is {_shown(value)}, expected {expected}")


def _within(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shown(value: Any) -> str:
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " ..."

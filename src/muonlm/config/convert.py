"""A value from TOML, JSON, a flag or Python as what its field wants: first the type, then the constraints.

    steps: Annotated[int, Ge(0)]                     dropout: Annotated[float, In("[0, 1)")]
    mlp: Literal["swiglu", "relu2", "gelu"]          kind: Annotated[str, Table("muonlm.model", "KINDS")]

A dataclass that is a `Section` converts and checks its fields whenever one is made, from wherever their values came.
A constraint is a small class with `problem(value)`: empty, or what is wrong and what to write instead, as the end of a
sentence that begins "model.dropout = 1.0". Constraints of items stand inside: list[Annotated[int, Ge(1)]].

Raises   UserError: wrong type, impossible value
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, get_args, get_origin

from muonlm.errors import UserError

from .spelling import nearest

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

# --- constraints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ge:
    """At least `low`."""

    low: float
    usual: str = ""

    def problem(self, value: float) -> str:
        if value >= self.low:
            return ""
        return f"must be at least {self.low}{_usual(self.usual)}."


@dataclass(frozen=True)
class Gt:
    """More than `low`."""

    low: float
    usual: str = ""

    def problem(self, value: float) -> str:
        return "" if value > self.low else f"must be above {self.low}{_usual(self.usual)}."


@dataclass(frozen=True)
class In:
    """A number of an interval, as it is written in mathematics: "[0, 1)" holds 0, but not 1."""

    interval: str
    usual: str = ""

    def problem(self, value: float) -> str:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return "" if above and below else f"must be in {self.interval}{_usual(self.usual)}."


@dataclass(frozen=True)
class Matches:
    """Text of a form. what: its name, with an article; form: how it is written, with an example."""

    pattern: str
    what: str
    form: str

    def problem(self, value: str) -> str:
        return "" if re.fullmatch(self.pattern, value) else f"is not {self.what}; write {self.form}."


@dataclass(frozen=True)
class Table:
    """A key of a table in an upper room, which is imported when a value is checked; that must not bring torch."""

    module: str
    table: str

    def problem(self, value: str) -> str:
        return unknown(value, getattr(import_module(self.module), self.table))


@dataclass(frozen=True)
class Told:
    """What is valid is told by a function of an upper room, in a sentence; the section itself checks it."""

    module: str
    function: str

    def problem(self, value: str) -> str:
        return ""

    def sentence(self) -> str:
        return getattr(import_module(self.module), self.function)()


@dataclass(frozen=True)
class Device:
    """A type of device, perhaps with a number: cuda:1."""

    types: tuple[str, ...]

    def problem(self, value: str) -> str:
        return unknown(value.partition(":")[0], self.types)


@dataclass(frozen=True)
class Joined:
    """Text that TOML may also write as a list of texts, which are joined by this."""

    by: str

    def problem(self, value: str) -> str:
        return ""


def _usual(value: str) -> str:
    return f"; {value} is usual" if value else ""


def unknown(value: str, valid: Iterable[str]) -> str:
    """What to say of a name that is not among the valid ones; empty if it is."""
    valid = tuple(valid)
    if value in valid:
        return ""
    return f"is not known.{nearest(value, valid) or ' Choose one of: ' + ', '.join(valid) + '.'}"


# --- values -----------------------------------------------------------------------------------------------------------


def convert(key: str, value: Any, kind: Any, where: str = "") -> Any:
    """`value` as `kind`, a type with its constraints. The UserError names the key and, if it is known, the place."""
    if get_origin(kind) is Annotated:
        kind, *constraints = get_args(kind)
        for constraint in constraints:
            if isinstance(constraint, Joined) and isinstance(value, list):
                value = constraint.by.join(map(str, value))
        value = convert(key, value, kind, where)
        problem = next((text for constraint in constraints if (text := constraint.problem(value))), "")
    elif get_origin(kind) is Literal:
        value = convert(key, value, str, where)
        problem = unknown(value, get_args(kind))
    elif get_origin(kind) in (list, tuple):
        return _items(key, value, kind, where)
    else:
        try:
            return _plain(value, kind)
        except (TypeError, ValueError, OverflowError):
            problem = f"should be {_describe(kind)}."
    if problem:
        raise _refused(key, value, where, problem)
    return value


def _refused(key: str, value: Any, where: str, problem: str) -> UserError:
    return UserError(f"{key} = {value!r}{where and f' ({where})'} {problem}")


def _items(key: str, value: Any, kind: Any, where: str) -> Any:
    given, args = value, get_args(kind)
    if isinstance(value, str):
        given = [part.strip() for part in value.split(",") if part.strip()]
    fits = isinstance(given, (list, tuple)) and (get_origin(kind) is list or len(given) == len(args))
    if not fits:
        raise _refused(key, value, where, f"should be {_describe(kind)}.")
    if get_origin(kind) is list:
        return [convert(key, item, args[0], where) for item in given]
    return tuple(convert(key, item, arg, where) for item, arg in zip(given, args, strict=True))


def _plain(value: Any, kind: type) -> Any:
    """`value` as a bool, str, int or float. Raises TypeError, ValueError or OverflowError."""
    if kind is bool:
        return (YES + NO).index(str(value).lower()) < len(YES)
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise TypeError
    if kind is str:
        return value
    if kind is int:
        if re.fullmatch(r"-?[\d_]+", str(value)):
            return int(value)
        value = float(value)  # "1e8" is a whole number
        if value != int(value):
            raise ValueError
        return int(value)
    value = float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _describe(kind: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in plain:
        return plain[kind]
    return f"{len(get_args(kind))} numbers separated by a comma" if get_origin(kind) is tuple else "a list"


def plain_type(kind: Any) -> Any:
    """The type of an annotation without its constraints: int, float, bool, str, list[…] or tuple[…]."""
    if get_origin(kind) is Annotated:
        return plain_type(get_args(kind)[0])
    return str if get_origin(kind) is Literal else kind


# --- dataclasses ------------------------------------------------------------------------------------------------------


class Section:
    """A dataclass whose annotations are the constraints of its fields. Its name without "Config" is the section's."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for field, kind in annotations(type(self)).items():
            if not dataclasses.is_dataclass(kind):
                key = f"{section}.{field}" if section else field
                setattr(self, field, convert(key, getattr(self, field), kind))


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
    """Field -> type with its constraints."""
    return typing.get_type_hints(cls, include_extras=True)

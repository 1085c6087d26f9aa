"""Names that are loaded when they are first asked for: reading a table, or `muonlm --help`, does not wait for torch."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def load(where: str, package: str | None = None) -> Any:
    """What "module:name" stands for; a module that begins with a dot is in `package`."""
    module, _, name = where.partition(":")
    return getattr(import_module(module, package), name)


def public(name: str, package: str, home: Mapping[str, str]) -> Any:
    """The work of a package's `__getattr__`: `home` says in which of its modules each public name is defined."""
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = load(f".{home[name]}:{name}", package)
    setattr(sys.modules[package], name, value)  # the next time it is there
    return value

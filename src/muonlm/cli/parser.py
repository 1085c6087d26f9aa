"""Flags: argparse with our own words for mistakes, the keys of the config as flags, dataclasses as flags."""

import argparse
import ast
import dataclasses
import inspect
from typing import get_args

from muonlm.config.convert import Told, annotations
from muonlm.config.schema import keys
from muonlm.config.spelling import nearest
from muonlm.errors import UserError

SHORT = {"--data": "data.source", "--seed": "seed", "--track": "track"}
EXAMPLES = {int: "100", float: "0.01", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors that name the nearest flag.

    takes_keys    every key of the config is a flag too; `parse` puts them into args.flags, {key: text}
    """

    def __init__(self, verb: str, description: str, *, takes_keys: bool = False, epilog: str | None = None):
        form = argparse.RawDescriptionHelpFormatter
        words = {"prog": f"muonlm {verb}", "description": description, "epilog": epilog, "formatter_class": form}
        super().__init__(allow_abbrev=False, **words)
        self.takes_keys = takes_keys
        self.add_argument(
            "--json", action="store_true", help="print one JSON document on stdout; progress goes to stderr"
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    @property
    def actions(self) -> list[argparse.Action]:
        return self._actions

    def error(self, message: str):
        raise UserError(f"{message}. `{self.prog} --help` lists the flags.")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        argv, flags = take_overrides(argv) if self.takes_keys else (argv, {})
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [flag for action in self.actions for flag in action.option_strings]
            known += ["--" + key for key in keys()] if self.takes_keys else []
            hint = nearest(unknown[0], known) if unknown[0].startswith("-") else ""
            raise UserError(f"unexpected argument {unknown[0]!r}.{hint or f' `{self.prog} --help` lists the flags.'}")
        if self.takes_keys:
            args.flags = flags
        return args

    def add_run(self, many: bool = False) -> None:
        """The run to load, which of its checkpoints, and where to."""
        if many:
            self.add_argument("runs", nargs="+", metavar="RUN", help="run or checkpoint directories")
        else:
            self.add_argument("run", metavar="RUN", help="run or checkpoint directory")
        self.add_argument("--checkpoint", default="best", help="best, latest or step-N (default best)")
        self.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")

    def add_fields(self, defaults, prefix: str = "") -> None:
        """A flag for each field of a dataclass instance; the help is the string under the field."""
        docs = field_docs(type(defaults))
        for field in dataclasses.fields(defaults):
            value = getattr(defaults, field.name)
            shown = f" (default {value})" if value not in ("", None) else ""
            kind = {"type": text if isinstance(value, str) else type(value)}
            if isinstance(value, bool):
                shown, kind = f" (default {'yes' if value else 'no'})", {"action": argparse.BooleanOptionalAction}
            action = self.add_argument("--" + field.name.replace("_", "-"), default=value, **kind)
            action.help = (prefix + docs[field.name] + shown).replace("%", "%%")


def values(defaults, args: argparse.Namespace):
    """The dataclass that `add_fields` made flags of, with what was typed."""
    return dataclasses.replace(
        defaults, **{field.name: getattr(args, field.name) for field in dataclasses.fields(defaults)}
    )


def field_docs(cls) -> dict[str, str]:
    """Field -> the string under it, with what a table of an upper room tells of its values."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    docs = {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }
    for field, kind in annotations(cls).items():
        for told in (part for part in get_args(kind) if isinstance(part, Told)):
            docs[field] += f" {told.sentence()}"
    return docs


def take_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Split off --section.key VALUE (or =VALUE); the last wins. A boolean key may stand alone."""
    kinds, rest, flags = keys(), [], {}
    words = iter(range(len(argv)))
    for i in words:
        name, equals, value = argv[i].partition("=")
        key = SHORT.get(name, name.removeprefix("--").replace("-", "_"))
        if not name.startswith("--") or ("." not in key and key not in kinds) or key == "recipe":
            rest.append(argv[i])
            continue
        if key not in kinds:
            raise UserError(f"unknown key {name!r}.{nearest(key, kinds) or ' `muonlm info --keys` lists all keys.'}")
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            if following.startswith("--"):
                if kinds[key] is not bool:
                    raise UserError(f"{name} needs a value, as in {name} {EXAMPLES.get(kinds[key], 'a,b')}")
                value = "true"
            else:
                value = argv[next(words)]
        flags[key] = text(value) if key == "eval.prompt" else value  # other values may be paths, of any bytes
    return rest, flags


def text(given: str) -> str:
    """A flag's text; bytes of the command line that are no UTF-8 become U+FFFD, as they do in files."""
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

"""`muonlm info`: what a recipe, a run or prepared data is, without training it."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

from muonlm.errors import UserError

from . import facts, prepared, rates, tables
from .parser import Parser


def parser() -> Parser:
    parser = Parser(
        "info",
        "What a recipe or run is, without training it; without a name, the recipes. Of a folder of prepared data:\n"
        "what it holds, and whether every file is as recorded.",
        takes_keys=True,
    )
    parser.add_argument("what", nargs="?", metavar="RECIPE|RUN|DATA")
    parser.add_argument("--preset", default="", help="a [preset.NAME] of the recipe")
    parser.add_argument("--smoke", action="store_true", help="as it is with --smoke")
    parser.add_argument("--routing", action="store_true", help="every tensor: who trains it, at which rate, and why")
    parser.add_argument("--toml", action="store_true", help="print the resolved recipe, to copy and edit")
    parser.add_argument("--presets", action="store_true", help="every preset of every recipe")
    parser.add_argument("--keys", action="store_true", help="every config key: default, meaning, if a recipe sets it")
    parser.add_argument(
        "--convert-lr",
        metavar="LR",
        help="the same update in another lr mode: --convert-lr 0.02 --from original --to adamw",
    )
    parser.add_argument(
        "--from", dest="from_mode", metavar="MODE", help="original, match_rms_adamw, spectral, none or adamw"
    )
    parser.add_argument("--to", metavar="MODE", help="as --from")
    parser.add_argument("--shape", metavar="ROWSxCOLUMNS", help="of the matrix; without it, a table of usual shapes")
    parser.add_argument("--wd", metavar="WD", help="weight decay, converted too: lr x wd stays the same")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.toml and args.what and not prepared.is_data(args.what):
        cfg = facts.find(args.what, args.flags, preset=args.preset, smoke=args.smoke)
        print(json.dumps(cfg.to_dict()) if args.json else cfg.to_toml(), end="\n" if args.json else "")
        return 0
    found, shown = answer(args)
    if args.json:
        print(json.dumps(found))
    else:
        tables.show(*shown(found))
    return 0


def answer(args: argparse.Namespace) -> tuple[dict | list, Callable]:
    """(what was asked for, JSON-able; the function that makes tables and texts of it)."""
    if args.convert_lr is not None:
        if args.what or args.flags:
            stray = args.what or "--" + next(iter(args.flags))
            raise UserError(f"--convert-lr takes no recipe and no key, found {stray!r}; leave it out.")
        found = rates.convert(args.convert_lr, args.wd, args.from_mode, args.to, args.shape)
        return found, lambda found: [rates.as_text(found)]
    for flag, value in (("--from", args.from_mode), ("--to", args.to), ("--shape", args.shape), ("--wd", args.wd)):
        if value is not None:
            raise UserError(
                f"{flag} belongs to --convert-lr; add the rate, as in --convert-lr 0.02 --from original --to adamw"
            )
    if args.keys:
        return facts.describe_keys(), tables.keys
    if args.presets:
        return facts.describe_presets(args.what), tables.presets
    if not args.what:
        return facts.describe_recipes(), tables.recipes
    if prepared.is_data(args.what):
        stray = {name: "" for name in ("preset", "smoke", "toml", "routing") if getattr(args, name)}
        return prepared.describe(args.what, args.flags | stray), lambda found: tables.facts(*prepared.rows(found))
    cfg = facts.find(args.what, args.flags, preset=args.preset, smoke=args.smoke)
    if Path(args.what).is_dir():
        cfg = facts.anywhere(cfg)
    shown = tables.every_tensor if args.routing else tables.config
    return facts.describe(cfg), lambda found: shown(found, asked(args))


def asked(args: argparse.Namespace) -> str:
    """What was typed to name this config, to type again."""
    words = [args.what, *(["--preset", args.preset] if args.preset else []), *(["--smoke"] if args.smoke else [])]
    return shlex.join(words + [word for key, value in args.flags.items() for word in (f"--{key}", value)])

"""`muonlm info`: what a recipe, a run or prepared data is, without training it."""

import argparse
import json

from muonlm.errors import UserError

from .parser import Parser


def parser() -> Parser:
    parser = Parser(
        "info",
        "What a recipe or run is, without training it; without a name, the recipes. Of a folder of prepared data: what\n"
        "it holds, and whether every file is as recorded.",
        takes_keys=True,
    )
    parser.add_argument("what", nargs="?", metavar="RECIPE|RUN|DATA")
    parser.add_argument("--preset", default="", help="a [preset.NAME] of the recipe")
    parser.add_argument("--smoke", action="store_true", help="as it is with --smoke")
    parser.add_argument("--toml", action="store_true", help="print the resolved recipe, to copy and edit")
    parser.add_argument("--presets", action="store_true", help="every preset of every recipe")
    parser.add_argument("--keys", action="store_true", help="every config key with its default and meaning")
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
    from . import facts as inform

    flags = args.flags

    if args.convert_lr is not None:
        if args.what or flags:
            raise UserError(
                f"--convert-lr takes no recipe and no key, found {args.what or '--' + next(iter(flags))!r}; leave it out."
            )
        facts = inform.rates(args.convert_lr, args.wd, args.from_mode, args.to, args.shape)
        print(json.dumps(facts) if args.json else inform.rates_as_text(facts))
        return 0
    for flag, value in (("--from", args.from_mode), ("--to", args.to), ("--shape", args.shape), ("--wd", args.wd)):
        if value is not None:
            raise UserError(
                f"{flag} belongs to --convert-lr; add the rate, as in --convert-lr 0.02 --from original --to adamw"
            )
    if args.keys:
        table = inform.describe_keys()
        print(
            json.dumps(table)
            if args.json
            else "\n".join(f"--{k['key']}  ({k['default']})\n      {k['help']}" for k in table)
        )
        return 0
    if args.presets:
        table = inform.describe_presets(args.what)
        lines = [
            f"{p['recipe']:36} --preset {p['preset']:24} " + ", ".join(f"{k} {v}" for k, v in p["sets"].items())
            for p in table
        ]
        print(json.dumps(table) if args.json else "\n".join(lines))
        return 0
    if not args.what:
        table = inform.describe_recipes()
        print(json.dumps(table) if args.json else "\n".join(f"{r['recipe']:28} {r['about']}" for r in table))
        return 0
    if inform.is_data(args.what):
        flags |= {name: "" for name in ("preset", "smoke", "toml") if getattr(args, name)}
        facts = inform.describe_data(args.what, flags)
        print(json.dumps(facts) if args.json else inform.data_as_text(facts))
        return 0
    cfg = inform.find(args.what, flags, preset=args.preset, smoke=args.smoke)
    if args.toml:
        print(json.dumps(cfg.to_dict()) if args.json else cfg.to_toml(), end="\n" if args.json else "")
        return 0
    facts = inform.describe(cfg)
    print(json.dumps(facts) if args.json else inform.as_text(facts))
    return 0

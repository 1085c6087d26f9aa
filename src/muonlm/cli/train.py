"""`muonlm train`: what was typed becomes a config and a directory, or one of each a seed; the loop does the rest."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from muonlm.config.schema import flatten
from muonlm.config.spelling import nearest
from muonlm.errors import UserError

from .parser import Parser


def parser() -> Parser:
    parser = Parser(
        "train",
        "Train a recipe (quickstart if none is named) on a CPU or GPU; with torchrun, on many.",
        takes_keys=True,
        epilog="--init-from RUN starts at step 0 from another run's weights, with its model and tokenizer (a stage\n"
        "such as minimind/sft finds its parent's newest run itself). Any config key is a flag:\n"
        "--optim.lr 0.01 --train.steps 500 --data my.txt --seed 7   (all: muonlm info --keys)",
    )
    parser.add_argument("recipe", nargs="?", help="name of a recipe (muonlm info lists them) or path of a .toml file")
    parser.add_argument("--out", help="run directory; default runs/RECIPE, numbered if taken. {seed} is replaced")
    parser.add_argument("--preset", default="", help="a [preset.NAME] of the recipe")
    parser.add_argument(
        "--resume", nargs="?", const=True, help="continue a run: --resume RUN, or RECIPE --out RUN --resume"
    )
    parser.add_argument("--seeds", help="several runs, one per seed: 1,2,3")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a CPU, under a minute: does it work at all?")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--show-mask",
        action="store_true",
        help="sft, dpo: print the first example, its trained tokens marked, and stop",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    resumed = args.resume if isinstance(args.resume, str) else (args.out if args.resume else None)
    if args.resume and not resumed:
        raise UserError("--resume needs to know the run: muonlm train --resume RUN (or RECIPE --out RUN --resume).")
    if args.resume and "init_from" in args.flags:
        raise UserError("--resume continues a run with everything it had; --init-from starts a new one. Choose one.")
    if resumed and args.out and resumed != args.out:
        raise UserError(
            f"--resume {resumed} and --out {args.out} name different directories; a resumed run stays where it is."
        )
    cfg = resume_config(resumed, args, args.flags) if resumed else begin_config(args, args.flags)
    if args.dry_run:
        from muonlm.training.resolve import check

        check(cfg)  # no recipe is printed that training would refuse
        print(json.dumps(cfg.to_dict()) if args.json else cfg.to_toml(), end="\n" if args.json else "")
        return 0
    if args.show_mask:
        return show_mask(cfg, args.json)
    if args.seeds and resumed:
        raise UserError("--seeds starts several runs; resume them one by one.")
    if args.seeds:
        from muonlm.training.run import directories

        seeds = numbers_of(args.seeds)
        runs = [(replace(cfg, seed=seed), out) for seed, out in directories(cfg.recipe, seeds, args.out).items()]
    else:
        runs = [(cfg, resumed or args.out and args.out.replace("{seed}", str(cfg.seed)))]
    reports = train_all(runs, resume=bool(resumed), json_mode=args.json)
    if args.json and reports:
        print(json.dumps(reports if args.seeds else reports[0]))
    return 130 if reports and reports[-1]["interrupted"] else 0


def train_all(runs: list[tuple], *, resume: bool, json_mode: bool) -> list[dict]:
    """The reports of these (config, directory), one after another until one is interrupted; none but on rank 0."""
    from muonlm.evals import trigram
    from muonlm.evals.bpb import preferences
    from muonlm.training import report as pictures
    from muonlm.training.loop import train

    def log(text: str) -> None:
        print(text, file=sys.stderr if json_mode else sys.stdout)

    reports = []
    for cfg, out in runs:
        report = train(cfg, out, resume=resume, json_mode=json_mode)
        if report is None:  # not rank 0
            continue
        if not report["interrupted"]:
            scale = trigram.for_scale(report["run"]) if "val_bpb" in report else {}
            if scale:
                shown = ", ".join(f"{name.removesuffix('_bpb')} {bits:.4f}" for name, bits in scale.items())
                log(f"for scale: {shown} bits per byte")
            if "val_pairs" in report:
                log(preferences(report))
            report = pictures.write(report["run"], log, scale)
            log("\nnext:\n" + "\n".join(f"  {line}" for line in next_steps(report)))
        reports.append(report)
        if report["interrupted"]:
            break
    return reports


def begin_config(args, flags: dict):
    """The config of a new run; what a preset sets is told."""
    from muonlm.config.recipes import load_recipe, presets

    name = args.recipe or "quickstart"
    cfg = load_recipe(name, flags, preset=args.preset, smoke=args.smoke, out=args.out)
    if args.preset and int(os.environ.get("RANK", 0)) == 0:
        place, table = presets(name)[args.preset]
        shown = ", ".join(f"{key} {value}" for key, value in flatten(table).items())
        print(f"{place}: {shown or 'the recipe as it stands'}", file=sys.stderr)
    return cfg


def resume_config(run: str, args, flags: dict):
    """The run's own config with flags on top."""
    from muonlm.config.recipes import resume
    from muonlm.config.runs import RUNS, read_config, runs_in

    if not (Path(run) / "config.json").exists():
        empty = Path(run).is_dir() and not any(p for p in Path(run).iterdir() if p.name[0] != ".")
        if args.recipe and (empty or args.resume is True and not Path(run).exists()):
            return begin_config(args, flags)  # killed before it began: begin
        known = runs_in(RUNS) + runs_in(Path(run).parent)
        raise UserError(f"--resume {run}: there is no run to continue (no config.json).{nearest(run, known)}")
    recipe = read_config(run).recipe
    if args.recipe and args.recipe != recipe:
        raise UserError(f"run {run} was made by recipe {recipe!r}, not {args.recipe!r}; leave the recipe out.")
    if not args.smoke and args.preset:
        raise UserError("--preset cannot change a run that has begun; leave it out, or start another with --out.")
    return resume(run, flags)


def numbers_of(seeds: str) -> list[int]:
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds!r} should be different whole numbers separated by commas, as in 1,2,3")
    return numbers


def next_steps(report: dict) -> list[str]:
    """Commands to go on with."""
    from muonlm.optim import OPTIMIZERS
    from muonlm.training.objectives import OBJECTIVES

    run, again, objective = report["run"], f"muonlm train {report['recipe']}", OBJECTIVES[report["objective"]]
    if objective.converses:
        return [f"muonlm chat {run}     talk to it"]
    if "val_bpb" in report:
        return [
            f'muonlm generate {run} --prompt "The people of"     continue a text',
            f"muonlm eval {run} --tasks bpb                      held-out bits per byte beside a byte trigram model",
            f"{again} --data YOUR.txt             this recipe on your own text (.txt, .jsonl, .parquet, folders)",
        ]
    other = next(name for name in OPTIMIZERS if name != report["optimizer"])
    return [
        f"{again} --optim.name {other} --out {run}-other     another optimizer",
        f"{again} {objective.more}",
    ]


def show_mask(cfg, json_mode: bool) -> int:
    """The first example that a run would train, what of it is trained marked; in colour on a terminal."""
    from muonlm.data.text.mask import first_example, marked
    from muonlm.training.objectives import OBJECTIVES
    from muonlm.training.parallel import start
    from muonlm.training.resolve import open_data
    from muonlm.training.start import check_tokenizer

    if not OBJECTIVES[cfg.train.objective].converses:
        raise UserError(
            "--show-mask is for conversations (--train.objective sft or dpo); elsewhere every token is trained."
        )
    with start("cpu") as dist:
        data = open_data(cfg, dist)
        check_tokenizer(cfg, data.train.tokenizer)
        examples, index = first_example(data.train.batch(0), data.train.tokenizer), data.train.index["splits"]["train"]
        if not dist.main:
            return 0
    if json_mode:
        print(json.dumps({"template": data.template, "notes": data.train.notes, "examples": examples}))
        return 0
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for side, example in zip(("chosen", "rejected") if len(examples) == 2 else ("example",), examples):
        how = "coloured" if colour else "marked [[ ]]"
        print(f"{side}: {example['tokens']:,} tokens, {example['trained']:,} of them trained, {how}")
        print(marked(example["pieces"], colour) + "\n")
    print(f"template {data.template}; train: {index['tokens']:,} tokens, {index['targets']:,} of them trained")
    for note in data.train.notes:
        print(note)
    return 0

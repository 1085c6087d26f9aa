"""`muonlm eval`: the tasks of evals/, each with its own flags, on trained models."""

import argparse
import json

from muonlm.config.spelling import nearest
from muonlm.errors import UserError
from muonlm.evals import TASKS, load_task, measure

from .parser import Parser, values


def parser() -> Parser:
    parser = Parser("eval", "Measure trained models; results are kept in RUN/evals/TASK.json.")
    parser.add_run(many=True)
    about = "; ".join(f"{name}: {task.help}" for name, task in TASKS.items())
    usual = next(iter(TASKS))
    parser.add_argument("--tasks", default=usual, help=f"comma-separated (default {usual}). {about}")
    counts = "; ".join(f"{name}: {task.counts}, 0 = {task.enough or 'all'}" for name, task in TASKS.items())
    parser.add_argument("--limit", type=int, default=0, help=f"how much to measure (default 0). {counts}")
    for name in TASKS:
        parser.add_fields(load_task(name).Options(), prefix=f"{name}: ")
    return parser


def run(args: argparse.Namespace) -> int:
    names = args.tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}.{nearest(name, TASKS) or ' Known: ' + ', '.join(TASKS) + '.'}")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit} must be 0 (everything) or more.")
    for name in TASKS:
        if name not in names:
            _refuse_options(name, args)
    options = {name: values(load_task(name).Options(), args) for name in names}
    where = {"limit": args.limit, "which": args.checkpoint, "device": args.device}
    results = []
    for run in args.runs:
        for name in names:
            results.append(measure(name, run, options[name], **where))
            if not args.json:
                print("\n".join(load_task(name).lines(results[-1])))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    return 0


def _refuse_options(name: str, args: argparse.Namespace) -> None:
    """UserError if something was typed that only this task would hear."""
    for option, default in vars(load_task(name).Options()).items():
        if getattr(args, option) != default:
            raise UserError(f"`{option}` is an option of the task {name}; add it, as in --tasks {args.tasks},{name}")

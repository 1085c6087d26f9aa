"""`muonlm eval`: the tasks of evals/, each with its own flags, on trained models."""

import argparse
import json

from muonlm.config.spelling import nearest
from muonlm.errors import UserError
from muonlm.evals import TASKS, load_task

from .parser import Parser, values


def parser() -> Parser:
    parser = Parser("eval", "Measure trained models on held-out text and on word problems.")
    parser.add_run(many=True)
    about = "; ".join(f"{name}: {task.help}" for name, task in TASKS.items())
    parser.add_argument("--tasks", default="bpb", help=f"comma-separated (default bpb). {about}")
    limit = "batches or problems; 0 = the whole split, or 200 problems"
    parser.add_argument("--limit", type=int, default=0, help=limit)
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
    chosen = [(task := load_task(name), values(task.Options(), args)) for name in names]
    where = {"limit": args.limit, "which": args.checkpoint, "device": args.device}
    results = []
    for run in args.runs:
        for task, options in chosen:
            results.append(task.measure(run, options, **where))
            if not args.json:
                print("\n".join(task.lines(results[-1])))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    return 0

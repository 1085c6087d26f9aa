"""THE table of tasks that `muonlm eval` can run. A new task is a file beside this one and a line of the table.

The file of a task defines

    Options   a frozen dataclass; each field is a flag of `muonlm eval`, its help the string below the field
    measure   (run, options, *, limit, which, device) -> dict: the result, JSON-able, recorded in RUN/evals/TASK.json
    lines     (result) -> list[str]: what of it a reader is shown

    run    a run or checkpoint directory       limit   how much to measure, 0 = the task's own measure of enough
    which  best, latest or step-N              device  auto, cpu, cuda or mps

It is imported to make the flags, so it imports what brings torch inside of functions.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from muonlm.storage import write_atomically


@dataclass(frozen=True)
class Task:
    module: str  # relative to this package
    help: str


TASKS = {
    "bpb": Task(".bpb", "held-out loss in nats per token and bits per byte"),
    "word_problems": Task(".exam", "exact match on arithmetic stories that no training row is like"),
}


def load_task(name: str):
    """The module of a task."""
    return import_module(TASKS[name].module, __name__)


def record(run: Path, task: str, result: dict) -> None:
    """Keep a result as RUN/evals/TASK.json."""
    (run / "evals").mkdir(exist_ok=True)
    write_atomically(run / "evals" / f"{task}.json", json.dumps(result, indent=1, ensure_ascii=False))

"""THE table of tasks that `muonlm eval` can run. A new task is a file beside this one and a line of the table.

    result = measure("word_problems", "runs/qa", limit=50)          run, and kept in RUN/evals/word_problems.json

The file of a task defines

    Options   a frozen dataclass: each field is a flag of `muonlm eval`, of its default's type (a bool: --x, --no-x),
              its help the string below it. No name may be that of another task's option or of a flag of `eval`
    measure   (subject, options, *, limit) -> dict: the result, JSON-able. "items", if it has some, are recorded only
    lines     (result) -> list[str]: what of it a reader is shown

    subject   the checkpoint that is measured: subject.py. It knows folder, config and device, and loads the model
    limit     how much to measure, in what the table says it counts; never negative. 0 means everything, and arrives
              only where the table says that everything is enough

`measure` below adds "task", "run", "checkpoint" and "step" to the result and records it; a task does neither.

Imports   the file is imported to make the flags, without waiting for torch: at its top it imports the standard library,
          numpy, `muonlm.config`, `muonlm.errors` and `muonlm.sampling`; inside of functions what it needs of
          `muonlm.training`, `muonlm.engine`, `muonlm.data` and torch
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from muonlm.storage import write_atomically

from .subject import Subject


@dataclass(frozen=True)
class Task:
    module: str
    """Relative to this package."""
    help: str
    """What it measures."""
    counts: str
    """What `limit` counts."""
    enough: int = 0
    """What no `limit` stands for; 0 = everything."""


TASKS = {
    "bpb": Task(".bpb", "held-out loss in nats per token and bits per byte", counts="batches"),
    "word_problems": Task(
        ".exam", "exact match on arithmetic stories that no training row is like", counts="questions", enough=200
    ),
}


def load_task(name: str):
    """The module of a task."""
    return import_module(TASKS[name].module, __name__)


def measure(name: str, run: str | Path, options=None, *, limit=0, which="best", device="cpu") -> dict:
    """The result of a task on a run or checkpoint directory, kept as RUN/evals/NAME.json.

    options   of the task, else its defaults          which    best, latest or step-N
    limit     how much; 0: what the task calls enough device   auto, cpu, cuda or mps
    """
    task, subject = load_task(name), Subject.find(run, which, device)
    options = task.Options() if options is None else options
    found = task.measure(subject, options, limit=limit or TASKS[name].enough)
    result = {"task": name} | subject.names() | found
    (subject.folder / "evals").mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_atomically(subject.folder / "evals" / f"{name}.json", text)
    return {key: value for key, value in result.items() if key != "items"}

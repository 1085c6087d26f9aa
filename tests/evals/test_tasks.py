"""The table of tasks: what a new task needs is one file and one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from muonlm.cli.main import main
from muonlm.evals import TASKS, Task, load_task

TOY = '''
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    letter: str = "e"
    """which letter is counted"""
    at_least: int = 0
    """50 % of them, say"""
    any_case: bool = False
    """count capitals too"""


def measure(subject, options, *, limit):
    name = subject.folder.name[:limit]
    count = name.count(options.letter) + (name.count(options.letter.upper()) if options.any_case else 0)
    return {"count": count, "enough": count >= options.at_least, "items": list(name)}


def lines(result):
    return [f"{result['run']}: {result['count']}"]
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A task in a package of its own, and its line in the table."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "__init__.py").touch()
    (tmp_path / "toys" / "letters.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        TASKS,
        "letters",
        Task("toys.letters", "how often a letter occurs in the name of a run", counts="letters", enough=5),
    )
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "toys"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A run whose name has letters to count."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("named") / "Nineteen")


def test_a_task_of_one_file_and_one_line_has_flags_help_results_and_lines(toy, run, capsys):
    flags = ["--letter", "n", "--at-least", "2", "--limit", "8", "--any-case"]
    assert main(["eval", str(run), "--tasks", "letters", *flags, "--json"]) == 0
    where = {"task": "letters", "run": str(run), "checkpoint": "step-00000006", "step": 6}
    found = where | {"count": 3, "enough": True}
    assert json.loads(capsys.readouterr().out) == found
    assert json.loads((run / "evals" / "letters.json").read_text()) == found | {"items": list("Nineteen")}
    assert main(["eval", str(run), str(run), "--tasks", "letters", "--letter", "n", "--no-any-case"]) == 0
    assert capsys.readouterr().out == f"{run}: 1\n{run}: 1\n"  # of the five letters that are enough
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "letters: which letter is counted (default e)" in out and "50 % of them" in out
    assert "letters: count capitals too (default no)" in out
    assert "letters: how often a letter occurs" in out and "letters: letters, 0 = 5" in out
    assert main(["eval", "run", "--tasks", "leters"]) == 2
    assert "'letters'" in capsys.readouterr().err


def test_an_option_of_a_task_that_is_not_asked_for_is_refused(toy, run, capsys):
    assert main(["eval", str(run), "--at-least", "3"]) == 2
    says = "--at-least is an option of the task letters; add it, as in --tasks bpb,letters"
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_to_the_contract(name):
    task = load_task(name)
    assert task.Options() == task.Options() and callable(task.measure) and callable(task.lines)
    assert Path(task.__file__).parent.name == "evals"
    kinds = {type(value) for value in vars(task.Options()).values()}
    assert kinds <= {bool, int, float, str}, "flags are made of these alone"
    owners = dict.fromkeys(("runs", "json", "debug", "checkpoint", "device", "tasks", "limit"), "muonlm eval itself")
    owners |= {field: other for other in TASKS if other != name for field in vars(load_task(other).Options())}
    for field in vars(task.Options()):
        taken = f"{name} and {owners.get(field)} both have {field!r}: call it {name}_{field}"
        assert field not in owners, taken


def test_the_flags_of_all_tasks_do_not_wait_for_torch():
    code = "import sys; from muonlm.cli.eval import parser; parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

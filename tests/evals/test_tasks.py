"""The table of tasks: what a new task needs is one file and one line."""

import json
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


def measure(run, options, *, limit=0, which="best", device="auto"):
    name = run[:limit] if limit else run
    return {"run": run, "count": name.count(options.letter), "enough": name.count(options.letter) >= options.at_least}


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
    monkeypatch.setitem(TASKS, "letters", Task("toys.letters", "how often a letter occurs in the name of a run"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "toys"]:
        del sys.modules[name]


def test_a_task_of_one_file_and_one_line_has_flags_help_results_and_lines(toy, capsys):
    assert main(["eval", "seventeen", "--tasks", "letters", "--letter", "n", "--at-least", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "seventeen", "count": 2, "enough": False}
    assert main(["eval", "seventeen", "tree", "--tasks", "letters", "--limit", "4"]) == 0
    assert capsys.readouterr().out == "seventeen: 2\ntree: 2\n"
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "letters: which letter is counted (default e)" in out and "50 % of them" in out
    assert "letters: how often a letter occurs" in out
    assert main(["eval", "run", "--tasks", "leters"]) == 2
    assert "'letters'" in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_to_the_contract(name):
    task = load_task(name)
    assert task.Options() == task.Options() and callable(task.measure) and callable(task.lines)
    assert Path(task.__file__).parent.name == "evals"


def test_the_flags_of_all_tasks_do_not_wait_for_torch():
    code = "import sys; from muonlm.cli.eval import parser; parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

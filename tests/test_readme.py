"""README's commands run as they are typed; only training is made small (--smoke)."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from muonlm import load_recipe
from muonlm.cli.main import VERBS, main
from muonlm.config.recipes import recipe_names

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def commands(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_novel.txt").write_text("It was a dark night.\n" * 400)
    Path("corpus").mkdir()
    Path("corpus/a.jsonl").write_text(
        "".join(
            json.dumps({"title": f"Chapter {i}", "text": f"{i} is the sum of {i - 1} and 1. " * 20}) + "\n"
            for i in range(90)
        )
    )
    talk = [{"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Yes."}]
    Path("my_chats.jsonl").write_text(
        "".join(
            json.dumps({"conversations": [{**talk[0], "content": f"Ready {i}?"}, talk[1]]}) + "\n" for i in range(90)
        )
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"How many apples are there?\n")))
    return tmp_path


def test_every_muonlm_line_of_the_shell_blocks_works(workplace):
    assert main(["train", "--smoke"]) == 0, "the first command ends in `muonlm train`"
    road = [
        "train",
        "road/sft",
        "--smoke",
        "--init-from",
        "none",
        "--data",
        "word_problems:200:1-1",
        "--train.steps",
        "3",
    ]
    assert main([*road, "--out", "runs/road-muon-1/dpo"]) == 0, (
        "what examples/road.sh leaves (test_examples.py runs it)"
    )
    lines = [line for block in commands("bash")[2:] for line in block.splitlines() if line.startswith("muonlm ")]
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":
            words += ["--smoke"] if "data/mine" not in words else ["--smoke", "--train.steps", "5"]
        if words[0] == "prep":
            words[words.index("bpe:8192")] = "bpe:300"  # so little text has no 8,192 tokens
        assert main(words) == 0, line


def test_the_python_block_works(workplace, capsys):
    (block,) = commands("python")
    exec(block.replace('{"train.steps": 100}', "smoke=True").replace("max_tokens=50", "max_tokens=5"), {})
    assert capsys.readouterr().out.strip()


def test_inline_muonlm_commands_name_verbs_and_recipes_that_exist():
    named = re.findall(r"`muonlm ([a-z]+)\b", README)
    assert len(named) >= 10 and set(named) == set(VERBS)
    for recipe in re.findall(r"`((?:keller|minimind)/[\w-]+)`", README):
        assert recipe in recipe_names() and load_recipe(recipe)

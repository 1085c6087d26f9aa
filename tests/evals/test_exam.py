"""The exam: replies of known worth are scored, through the run, its template and its tokenizer."""

import json
import re
from collections import Counter
from decimal import Decimal

import pytest

from muonlm.cli.main import main
from muonlm.data.synthetic.word_problems import rows
from muonlm.errors import UserError
from muonlm.evals import exam, measure
from muonlm.evals.exam import flexible_answer, strict_answer
from muonlm.evals.stats import wilson


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """A run of one step that sees 256 bytes, and names no template."""
    out = tmp_path_factory.mktemp("word-problems") / "run"
    assert main(smoke(out, "--model.block_size", "256", "--train.steps", "1", "--eval.iters", "1")) == 0
    return out


@pytest.fixture
def replies(run, monkeypatch):
    """replies(texts, …) lets the model write these texts, one list a call of `complete`; gives the calls' arguments."""
    from muonlm.training import checkpoint

    _, tokenizer = checkpoint.load(run)
    calls = []

    def script(*answers):
        def complete(model, prompts, sampling, **settings):
            calls.append(([tokenizer.decode(p) for p in prompts], sampling, settings))
            return [tokenizer.encode(text) for text in answers[len(calls) - 1]]

        monkeypatch.setattr("muonlm.engine.complete", complete)
        return calls

    return script


def worked(row):
    return f" {row['rationale']}\n#### {row['answer']}"


def test_exact_match_counts_the_replies_that_end_in_the_right_number(run, replies):
    asked = list(rows(5, (1, 2), seed=exam.SEED, split="held_out"))
    wrong_steps = re.sub(r"= \d+", "= 99", asked[1]["rationale"])
    texts = [
        worked(asked[0]),
        f" {wrong_steps}\n#### {asked[1]['answer']}.0",  # right by number, wrong in its steps
        f" {asked[2]['rationale']}\n#### {int(asked[2]['answer']) + 1}",
        f" The answer is {asked[3]['answer']}",  # right, but not written as asked: flexible alone
        " I do not know.",
    ]
    calls = replies(texts)
    result = measure("word_problems", run, exam.Options(steps="1-2"), limit=5)
    prompts, sampling, settings = calls[0]
    assert all(f"Question: {row['question']}\nAnswer:" in prompt for row, prompt in zip(asked, prompts, strict=True))
    assert sampling.temperature == 0 and len(settings["stop"]) == 1
    longest = max(len(worked(row)) for row in asked) + 1  # bytes, and the stop token
    assert sampling.max_tokens == min(
        2 * longest, 256 - max(len(f"_Question: {row['question']}\nAnswer:") for row in asked)
    )
    assert (result["n"], result["correct"], result["accuracy"]) == (5, 2, 0.4)
    assert result["interval"] == list(wilson(2, 5))
    assert (result["flexible"]["correct"], result["right_steps"]["correct"]) == (3, 2)
    per_step = {k: Counter(str(row["steps"]) for row in asked)[k] for k in result["by_steps"]}
    assert {k: v["n"] for k, v in result["by_steps"].items()} == per_step
    assert sum(v["correct"] for v in result["by_steps"].values()) == 2
    assert result["guessing"] == max(Counter(row["answer"] for row in asked).values()) / 5
    stored = json.loads((run / "evals" / "word_problems.json").read_text())
    assert {k: v for k, v in stored.items() if k != "items"} == result
    assert [item["correct"] for item in stored["items"]] == [True, True, False, False, False]
    assert stored["items"][0]["reply"] == worked(asked[0]).strip() and "gsm8k" not in json.dumps(stored).lower()


def test_samples_vote_and_a_tie_goes_to_the_answer_seen_first(run, replies):
    (row,) = rows(1, (1, 1), seed=exam.SEED, split="held_out")
    right, wrong, none = worked(row), " #### 1", " no idea"
    for drawn, single, majority in [
        ([wrong, right, right], 2, True),
        ([right, wrong, none], 1, True),
        ([wrong, right, none], 1, False),
        ([none, none, right], 1, True),  # no vote without an answer
    ]:
        calls = replies([wrong], *([text] for text in drawn))
        calls.clear()
        result = measure("word_problems", run, exam.Options(steps="1", samples=3), limit=1)
        assert [(call[1].temperature, call[1].seed) for call in calls] == [(0, 0), (0.7, 0), (0.7, 1), (0.7, 2)]
        assert result["single"]["correct"] == single and result["single"]["n"] == 3
        assert result["majority"]["correct"] == majority and result["any_sample"]["correct"] == 1
        assert result["correct"] == 0  # the greedy reply counts by itself


def test_a_model_answers_for_itself_and_the_command_line_prints_it(run, capsys):
    assert main(["eval", str(run), "--tasks", "word_problems", "--limit", "3", "--steps", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["task"] == "word_problems" and printed["n"] == 3 and list(printed["by_steps"]) == ["1"]
    stored = json.loads((run / "evals" / "word_problems.json").read_text())
    assert len(stored["items"]) == 3 and all(item["reply"] for item in stored["items"])
    assert main(["eval", str(run), "--tasks", "word_problems,bpb", "--limit", "2", "--steps", "1-1"]) == 0
    out = capsys.readouterr().out
    assert "word_problems (held_out) exact" in out and "of 2" in out and "val_bpb" in out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--steps", "one"], "such as 1-3"),
        (["--steps", "1-9"], "try 1-3"),
        (["--split", "test"], "'train' or 'held_out'"),
        (["--samples", "0"], "at least 1"),
        (["--tasks", "word_problem"], "'word_problems'"),
    ],
)
def test_mistyped_flags_are_refused_with_what_to_type(run, flags, says, capsys):
    tasks = [] if "--tasks" in flags else ["--tasks", "word_problems"]
    assert main(["eval", str(run), *tasks, *flags]) == 2
    assert says in capsys.readouterr().err


def test_problems_longer_than_the_context_are_refused_with_the_length_to_train_with(run, monkeypatch):
    from muonlm.model.lm import LM

    monkeypatch.setattr(LM, "context", 20)
    with pytest.raises(UserError, match=r"--model.block_size \d+"):
        measure("word_problems", run, limit=2)


def test_answers_are_read_as_decimals():
    assert strict_answer("2 + 3 = 5\n#### 5") == 5
    assert strict_answer("#### 1,200.0.") == Decimal("1200") and strict_answer("#### -3") == -3
    assert strict_answer("#### 7\n#### 8") == 7  # the first: what follows was written past the end
    assert strict_answer("The answer is 5") is None and strict_answer("#### ...") is None
    assert flexible_answer("2 + 3 = 5, I think") == 5 and flexible_answer("It costs $1,200.") == 1200
    assert flexible_answer("none") is None

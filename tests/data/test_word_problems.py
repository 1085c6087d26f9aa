"""Word problems: solutions recomputed and stories read by a second program, mistakes traced, splits compared."""

import re
from collections import Counter
from fractions import Fraction

import pytest

from muonlm.data.synthetic.word_problems import NAMES, TEMPLATES, THINGS, problem, reserved, rows
from muonlm.errors import UserError

SPLITS = ("train", "held_out")
SETTINGS = [((1, 1), 99), ((1, 3), 99), ((4, 4), 20), ((2, 4), 300)]
MANY = {(split, *s): list(rows(400, s[0], largest=s[1], split=split)) for split in SPLITS for s in SETTINGS}
ALL = [(split, row) for (split, *_), found in MANY.items() for row in found]
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
WORK = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
}


def equations(rationale):
    """[(a, op, b, written result)] of a solution; every line is an equation and nothing else."""
    found = [EQUATION.fullmatch(line) for line in rationale.split("\n")]
    assert all(found), rationale
    return [(int(m[1]), m[2], int(m[3]), int(m[4])) for m in found]


def is_true(a, op, b, result):
    return WORK[op](a, b) == result


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_every_right_solution_is_true_leads_from_step_to_step_and_ends_in_the_answer():
    for _, row in ALL:
        steps = equations(row["rationale"])
        assert len(steps) == row["steps"]
        assert all(is_true(*step) for step in steps), row
        assert all(after[0] == before[3] for before, after in zip(steps, steps[1:])), row
        assert row["answer"] == str(steps[-1][3])
        assert EQUATION.findall(row["text"]) == EQUATION.findall(row["rationale"])
        assert row["text"].startswith(row["question"]) and row["text"].endswith(f"The answer is {row['answer']}.")


def read(question, names):
    """The story as a second reader understands it, from its words alone: the first number, the equations' (op, b)."""
    first, *events, ask = re.findall(r"[^.?]+[.?]", question)
    cast = [[word for word in re.findall(r"[A-Z][a-z]+", s) if word in names] for s in (first, *events, ask)]
    (holder,) = cast[0]
    seen, given = numbers(first), []
    if len(seen) == 2:
        assert "each" in first
        given.append(("*", seen[1]))
    for sentence, people in zip(events, cast[1:-1]):
        (n,) = numbers(sentence)
        words = set(re.findall(r"[a-z]+", sentence))
        if "times" in words:
            op = "*"
        elif "equal" in words:
            op = "/"
        elif {"gives", "to"} <= words or words & {"fewer", "loses", "sells", "takes"}:
            op = "-"
        else:
            assert words & {"more", "buys", "gets", "finds"}, sentence
            op = "+"
        given.append((op, n))
        if words & {"than", "as"} and len(people) == 2:
            assert people[1] == holder, question
            holder = people[0]
        elif people:
            assert holder in people or "takes" in words, question
    assert cast[-1] == [holder], question
    return seen[0], given


@pytest.mark.parametrize("split", SPLITS)
def test_a_reader_of_the_words_alone_writes_the_same_equations(split):
    for side, row in ALL:
        if side == split:
            steps = equations(row["rationale"])
            assert read(row["question"], NAMES) == (steps[0][0], [step[1:3] for step in steps])


def test_wrong_solutions_have_exactly_one_mistake_the_one_that_is_named_and_another_answer():
    for _, row in ALL:
        right, wrong = equations(row["rationale"]), equations(row["wrong_rationale"])
        assert len(right) == len(wrong) and row["wrong_answer"] == str(wrong[-1][3]) != row["answer"]
        at = next(k for k in range(len(right)) if right[k] != wrong[k])
        (a, op, b, result), slip = right[at], wrong[at]
        assert slip[0] == a, row
        if slip[1:3] == (op, b):
            kind = "result"
            assert not is_true(*slip) and abs(slip[3] - result) in (1, 2, 10)
        elif slip[2] == b:
            kind = "operation"
            assert is_true(*slip)
        else:
            kind = "number"
            assert slip[1] == op and is_true(*slip) and slip[2] in numbers(row["question"])
        assert row["mistake"] == f"{kind} in step {at + 1}"
        for k in range(at + 1, len(right)):  # the steps after it are done right, with what was wrong before
            assert wrong[k][0] == wrong[k - 1][3] and wrong[k][1:3] == right[k][1:3] and is_true(*wrong[k]), row


def test_copying_a_number_of_the_question_is_never_right_and_all_numbers_stay_in_range():
    for (_, _, largest), found in MANY.items():
        for row in found:
            assert int(row["answer"]) not in numbers(row["question"])
            assert all(2 <= n <= largest for n in numbers(row["rationale"]))
            assert all(1 <= n <= largest for n in numbers(row["wrong_rationale"]))


def test_no_sum_or_difference_of_a_held_out_solution_is_in_any_training_row_whatever_the_settings():
    def bare(side, keys):  # a + b and b + a are one
        found = {step[:3] for split, row in ALL if split == side for key in keys for step in equations(row[key])}
        return {(op, *(sorted((a, b)) if op == "+" else (a, b))) for a, op, b in found}

    train, held = bare("train", ["rationale", "wrong_rationale"]), bare("held_out", ["rationale"])
    assert not {e for e in train & held if e[0] in "+-"}
    assert len(train) > 1000 and len(held) > 500  # two sets large enough to have met
    for split, row in ALL:
        steps, wrong = equations(row["rationale"]), equations(row["wrong_rationale"])
        if split == "train":  # the rule covers all rows, not these alone
            assert not any(reserved(*step[:3]) for step in steps + wrong)
        else:
            assert all(reserved(*step[:3]) == (step[1] in "+-") for step in steps)
            assert any(step[1] in "+-" for step in steps)
    assert all(reserved(a, "+", b) == reserved(b, "+", a) for a in range(2, 60) for b in range(2, 60))


def test_training_questions_never_name_a_number_of_the_reserved_range():
    band = {n for n in range(1000) if n % 20 in (13, 14)}
    share = {split: sum(bool(band & set(numbers(row["question"]))) for s, row in ALL if s == split) for split in SPLITS}
    assert share["train"] == 0
    assert share["held_out"] > 400  # of 1600; about half


def test_sentences_of_the_splits_are_disjoint_and_the_words_are_the_same():
    own = {*NAMES, *THINGS}

    def sentences(split):
        texts = [row["question"] for side, row in ALL if side == split]
        found = {s.strip() for text in texts for s in re.findall(r"[^.?]+[.?]", text)}
        return {re.sub(r"\d+|[A-Za-z]+", lambda m: "_" if m[0].isdigit() or m[0] in own else m[0], s) for s in found}

    seen = {split: sentences(split) for split in SPLITS}
    assert not seen["train"] & seen["held_out"]
    # All sentences occur, so that what is compared is the whole of both.
    for split in SPLITS:
        assert len(seen[split]) == sum(len(set(v)) for v in TEMPLATES[split].values())
    words = {split: {w.lower() for s in seen[split] for w in re.findall(r"[A-Za-z]+", s)} for split in SPLITS}
    assert words["held_out"] <= words["train"]


def test_a_row_is_found_at_once_and_depends_on_seed_split_and_number_alone():
    whole = list(rows(50, seed=3))
    assert list(rows(50, seed=3, start=37)) == whole[37:]
    assert list(rows(20, seed=3)) == whole[:20]
    assert problem(41, seed=3) == whole[41]
    assert problem(10**12, seed=3)["steps"] in (1, 2, 3)  # nothing in front of it is made
    assert list(rows(50, seed=4)) != whole
    assert len({row["question"] for row in whole}) == 50


def test_rows_do_not_change_between_machines_or_versions():
    # Written down on 2026-11-22: another generator would silently make other data under the same name.
    assert problem(0)["text"] == (
        "Lucy has 42 ships at home. Next Lucy buys another 20 ships. After that Lucy finds 21 more of them. "
        "Later Ralph takes 30 of them. How many ships does Lucy have now? 42 + 20 = 62, then 62 + 21 = 83, "
        "then 83 - 30 = 53. The answer is 53."
    )
    assert problem(0)["mistake"] == "number in step 3"


def test_answers_operations_steps_and_mistakes_are_spread():
    # 2000 rows: a share of 5 % has a standard error of 0.5 %, one of a third 1.1 %; the bounds are 4 of them away.
    for split, most_frequent in (("train", 0.035), ("held_out", 0.045)):
        found = list(rows(2000, (1, 3), split=split))
        answers = Counter(row["answer"] for row in found)
        assert answers.most_common(1)[0][1] / 2000 < most_frequent  # measured 2.1 % and 2.6 % of 5000
        assert len(answers) > 90
        assert all(abs(n / 2000 - 1 / 3) < 0.045 for n in Counter(row["steps"] for row in found).values())
        mistakes = Counter(row["mistake"].split()[0] for row in found)
        assert set(mistakes) == {"result", "operation", "number"} and min(mistakes.values()) > 200
        operations = Counter(step[1] for row in found for step in equations(row["rationale"]))
        assert set(operations) == set("+-*/")
        assert min(operations.values()) / sum(operations.values()) > 0.03  # quotients: measured 7 % and 5 %
        assert len({row["question"] for row in found}) > 1950  # few are drawn twice
        assert max(len((row["question"] + " " + row["rationale"]).split()) for row in found) <= 68


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"steps": (0, 2)}, "try 1-3"),
        ({"steps": (3, 2)}, "try 1-3"),
        ({"steps": (1, 5)}, "try 1-3"),
        ({"largest": 10}, "99 is usual"),
        ({"largest": 5000}, "99 is usual"),
        ({"split": "test"}, "'train' or 'held_out'"),
        ({"n": -1}, "word_problems:20000"),
    ],
)
def test_impossible_settings_are_refused_at_once_with_what_to_type(settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        rows(**{"n": 5} | settings)  # before the first row is asked for

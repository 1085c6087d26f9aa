"""Chain-of-thought data: answers found where they stand, programs and test questions kept out, all counted."""

import hashlib
import json

import pytest

from muonlm.data.prep import cot
from muonlm.data.prep.cot import is_program, kind, number, prepare_cot, take_answer
from muonlm.data.sources.expand import documents
from muonlm.data.synthetic.word_problems import rows
from muonlm.errors import UserError

MATH = [  # MathInstruct's schema
    {"source": "data/CoT/a.json", "instruction": "What is 15% of 60?", "output": "0.15 * 60 = 9. The answer is 9."},
    {"source": "data/PoT/b.json", "instruction": "What is 2 + 2?", "output": "x = 2 + 2\nprint(x)"},
    {"source": "data/CoT/c.json", "instruction": "Which letter is first?", "output": "A comes first.\nThe answer is A"},
    {"source": "data/CoT/d.json", "instruction": "Say nothing.", "output": "There is nothing to say."},
    {"source": "data/CoT/e.json", "instruction": "What is 3 + 4?", "output": "The answer is 7."},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def made(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "solution, reasoning, answer",
    [
        ("0.15 * 60 = 9. The answer is 9.", "0.15 * 60 = 9.", "9"),
        ("12 / 4 = 3\n#### 3", "12 / 4 = 3", "3"),
        ("So we get \\boxed{1,200}.", "So we get \\boxed{1,200}.", "1200"),
        ("\\boxed{\\frac{3}{4}} it is", "\\boxed{\\frac{3}{4}} it is", "\\frac{3}{4}"),
        ("2 * 3.5 = 7. Therefore, the final answer is: $7.00.", "2 * 3.5 = 7.", "7.00"),
        ("The answer is 9. Because 3 * 3 = 9.", "Because 3 * 3 = 9.", "9"),  # the reasoning goes before the answer
        (
            "First the answer is 4.\nNo: 2 + 3 = 5. The answer is 5 apples.",
            "First the answer is 4.\nNo: 2 + 3 = 5.",
            "5",
        ),
        ("B has more.\nThe answer is (B).", "B has more.", "(B)"),
        ("3.5 m + 1 m = 4.5 m. Answer: 4.5", "3.5 m + 1 m = 4.5 m.", "4.5"),
    ],
)
def test_the_answer_is_found_and_the_reasoning_stands_before_it(solution, reasoning, answer):
    assert take_answer(solution) == (reasoning, answer)


def test_a_solution_without_an_answer_has_none():
    assert take_answer("It depends on the weather, says the answering machine.") is None


@pytest.mark.parametrize(
    "text, found",
    {
        **{"1,200": "1200", "$5.": "5", "-3": "-3", "−3": "-3", "-$4": "-4", "x = 5": "5", "10%": "10"},
        **{"12 apples": "12", "$ 1,200.00 in all.": "1200.00", "72.0": "72.0"},
        **dict.fromkeys(("3/4", "5x", "(B)", "2 or 3", "")),
    }.items(),
)
def test_a_number_loses_what_is_written_around_it_and_nothing_else_becomes_a_number(text, found):
    assert number(text) == found


@pytest.mark.parametrize(
    "question, rationale, expected",
    [
        ("What is 15% of 60?", "0.15 * 60 = 9", "percentage"),
        ("Solve for x: 2x + 3 = 7.", "x = 2", "equation"),
        ("What is the area of a circle of radius 3?", "9 * 3.14 = 28.26", "geometry"),
        ("Ann has 3 bags of 4 nuts. How many nuts?", "3 * 4 = 12", "arithmetic"),
        ("What is 3 + 4 + 5?", "3 + 4 = 7\n7 + 5 = 12", "arithmetic"),
        ("Ann has 3 bags of 4 nuts and eats 5. How many nuts?", "3 * 4 = 12\n12 - 5 = 7", "word_problem"),
        ("Why is the sky blue?", "Light scatters.", "default"),
    ],
)
def test_questions_are_sorted_by_type(question, rationale, expected):
    assert kind(question, rationale) == expected


def test_programs_are_known_by_their_source_and_by_their_looks_and_worked_equations_are_not_programs():
    assert is_program("anything", "data/PoT/gsm.json") and not is_program("anything", "data/CoT/gsm.json")
    assert (
        is_program("import math\nmath.sqrt(2)") and is_program("def solve():\n    return 1") and is_program("print(2)")
    )
    assert is_program("apples = 3\npears = 4 * apples\napples + pears")
    assert not is_program("3 + 4 = 7\n7 * 2 = 14") and not is_program("x = 3") and not is_program("We print the page.")


def test_rows_come_out_in_one_form_and_everything_that_does_not_is_counted(tmp_path):
    said = prepare_cot(write(tmp_path / "math.jsonl", MATH), tmp_path / "out")
    first, second = made(tmp_path / "out")
    assert first == {
        "question": "What is 15% of 60?",
        "rationale": "0.15 * 60 = 9.",
        "answer": "9",
        "type": "percentage",
        "text": "Question: What is 15% of 60?\nAnswer: 0.15 * 60 = 9.\n#### 9",
    }
    assert second["answer"] == "A"
    assert said["dropped"] == {"program": 1, "overlap": 0, "no answer": 1, "no reasoning": 1, "dialogue": 0}
    assert (said["rows_read"], said["examples"], sum(said["types"].values())) == (5, 2, 2)
    assert said["sha256"] == hashlib.sha256((tmp_path / "out" / "train.jsonl").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == said
    assert json.loads((tmp_path / "out" / "examples.json").read_text()) == [first, second]


def test_programs_can_be_kept_as_they_are_with_a_tag(tmp_path):
    said = prepare_cot(write(tmp_path / "math.jsonl", MATH), tmp_path / "out", drop_programs=False)
    tagged = [row for row in made(tmp_path / "out") if row.get("program")]
    assert [(row["answer"], row["rationale"]) for row in tagged] == [("", "x = 2 + 2\nprint(x)")]
    assert "####" not in tagged[0]["text"] and said["examples"] == 3 and said["dropped"]["program"] == 0


def test_questions_of_a_test_set_are_dropped_whole_or_by_thirteen_words_in_a_row(tmp_path):
    thirteen = "a farmer walks to the market with two baskets of eggs every single"
    assert len(thirteen.split()) == 13
    test = [
        {"question": "How many legs have 3 cows?", "answer": "3 * 4 = 12\n#### 12"},
        {"question": f"Once, {thirteen} day. He sells 5. How many?", "answer": "#### 5"},
    ]
    work = "3 * 4 = 12\n#### 12"
    train = [
        {"question": "how many legs have 3 COWS", "answer": work},  # the same but for case and punctuation
        {"question": f"Yesterday, {thirteen}", "answer": work},
        {"question": f"Yesterday {thirteen.removeprefix('a ')} week, and 7 sheep?", "answer": work},  # twelve only
        {"question": "How many legs have 4 cows?", "answer": work},
    ]
    exclude = write(tmp_path / "test.jsonl", test)
    said = prepare_cot(write(tmp_path / "train.jsonl", train), tmp_path / "out", exclude=exclude)
    assert [row["question"] for row in made(tmp_path / "out")] == [row["question"] for row in train[2:]]
    assert said["dropped"]["overlap"] == 2
    assert said["excluded"] == {"sources": [exclude], "questions": 2, "words_in_a_row": 13}


def test_gsm8k_is_excluded_by_itself_where_a_source_is_of_the_hub(tmp_path, monkeypatch):
    test = [({"question": "How many legs have 3 cows?", "answer": "#### 12"}, "gsm8k:1")]
    train = [
        ({"question": q, "answer": "3 * 4 = 12\n#### 12"}, "x:1")
        for q in ("How many legs have 3 cows?", "And 3 birds?")
    ]
    asked = []

    def answer(specs, **how):
        asked.append((specs, how["split"]))
        return iter(test if specs == ["openai/gsm8k"] else train)

    hub = [cot.src.Source(tmp_path, "TIGER-Lab/MathInstruct", "hub", options={"id": "TIGER-Lab/MathInstruct"})]
    monkeypatch.setattr(cot.src, "expand", lambda spec, **how: hub)
    monkeypatch.setattr(cot.src, "rows", answer)
    said = prepare_cot("TIGER-Lab/MathInstruct", tmp_path / "out")
    assert asked[0] == (["openai/gsm8k"], "test") and said["dropped"]["overlap"] == 1 and said["examples"] == 1
    assert said["licences"]


def test_sources_are_combined_and_each_gives_at_most_max_examples(tmp_path):
    stories = write(tmp_path / "stories.jsonl", rows(20))
    said = prepare_cot([stories, write(tmp_path / "math.jsonl", MATH)], tmp_path / "out", max_examples=3)
    found = made(tmp_path / "out")
    assert [row["rationale"] for row in found[:3]] == [row["rationale"] for row in rows(3)]
    assert len(found) == said["examples"] == 5 and found[3]["type"] == "percentage"


def test_the_folder_is_training_text_of_all_its_rows(tmp_path):
    prepare_cot(write(tmp_path / "stories.jsonl", rows(25)), tmp_path / "out")
    texts = [document.text for document in documents(str(tmp_path / "out"))]
    assert texts == [f"Question: {r['question']}\nAnswer: {r['rationale']}\n#### {r['answer']}" for r in rows(25)]


def test_columns_of_other_names_are_read_when_they_are_named(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"ask": "What is 2 + 3?", "solve": "2 + 3 = 5. The answer is 5."}])
    with pytest.raises(UserError, match="ask"):  # the message lists what was found
        prepare_cot(path, tmp_path / "out")
    assert prepare_cot(path, tmp_path / "out", columns="ask,solve")["examples"] == 1
    with pytest.raises(UserError, match="QUESTION,SOLUTION"):
        prepare_cot(path, tmp_path / "more", columns="ask")
    with pytest.raises(UserError, match="'reply'.*found ask, solve"):
        prepare_cot(path, tmp_path / "more", columns=["ask", "reply"])


def test_gsm8k_marks_stay_and_dialogues_are_left_out(tmp_path):
    turns = [{"role": role, "content": "1 + 1 = 2. The answer is 2."} for role in ("user", "assistant") * 2]
    records = [
        {"question": "3 bags of 4 nuts. How many?", "answer": "3*4 = <<3*4=12>>12\n#### 12"},
        {"conversations": turns},
    ]
    path = write(tmp_path / "gsm.jsonl", records)
    said = prepare_cot(path, tmp_path / "kept")
    assert made(tmp_path / "kept")[0]["rationale"] == "3*4 = <<3*4=12>>12"
    assert said["dropped"]["dialogue"] == 1


def test_a_target_is_replaced_only_if_it_is_ours_and_a_failure_leaves_nothing(tmp_path):
    source, out = write(tmp_path / "math.jsonl", MATH), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="`overwrite`"):
        prepare_cot(source, out)
    with pytest.raises(UserError, match="delete something else"):
        prepare_cot(source, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "precious"

    prepare_cot(source, tmp_path / "made")
    before = (tmp_path / "made" / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="none can be used .1 no answer"):
        prepare_cot(write(tmp_path / "bad.jsonl", MATH[3:4]), tmp_path / "made", overwrite=True)
    assert (tmp_path / "made" / "train.jsonl").read_bytes() == before
    assert prepare_cot(source, tmp_path / "made", overwrite=True, max_examples=1)["examples"] == 1
    (tmp_path / ".made.partial" / "out").mkdir(parents=True)  # what a kill leaves: the next run clears it
    (tmp_path / ".made.partial" / "out" / "train.jsonl").write_text("half a row")
    assert prepare_cot(source, tmp_path / "made", overwrite=True, max_examples=1)["examples"] == 1
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]

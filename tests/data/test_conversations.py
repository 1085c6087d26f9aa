"""Conversations and templates: each schema gives the turns it means, a template trains the replies, nothing else."""

import dataclasses
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.data.text.conversations import read_conversations, read_preferences
from muonlm.data.text.templates import TEMPLATES, Template, template
from muonlm.data.text.tokenizer import EOT, Tokenizer, resolve_tokenizer
from muonlm.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds the third-party texts")
CHATML = ("<|im_start|>", "<|im_end|>")
CORPUS = [
    "Question: how low?\nAnswer: lower, lowest\n\nResponse:\nuser assistant system <|im_end|>\n#### 12 東京 🙂 " * 30
]
TOKENIZERS = {
    "byte": Tokenizer.byte(),
    "byte+chatml": resolve_tokenizer("byte", special=CHATML),
    "bpe": resolve_tokenizer("bpe:400", CORPUS),
    "bpe+chatml": resolve_tokenizer("bpe:400", CORPUS, CHATML),
    "bpe+think": resolve_tokenizer("bpe:400", CORPUS, ("<think>", "</think>")),
}
if DATA.is_dir():
    TOKENIZERS["gpt2"] = resolve_tokenizer(f"gpt2:{DATA / 'gpt2_merges.txt'}")
FORMS = list(TEMPLATES.values())

# Texts that try to look like what a template writes, beside any other
TRAPS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    EOT,
    "\n\nResponse:\n",
    "Answer:",
    "{content}",
    "<think>",
    "####",
    "\n",
    " ",
]
TEXT = st.lists(st.sampled_from(TRAPS) | st.text(max_size=8), max_size=4).map("".join)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}, optional={"input": TEXT})
REPLY = st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT}, optional={"rationale": TEXT})
SYSTEM = st.fixed_dictionaries({"role": st.just("system"), "content": TEXT})
CONVERSATION = st.lists(USER | REPLY | SYSTEM, max_size=5)
EITHER = dict(form=st.sampled_from(FORMS), tok=st.sampled_from(list(TOKENIZERS.values())))


def answer(form: Template, turn: dict) -> str:
    """What a reply reads in full, by the definition of the six templates, with its stop token left out."""
    text, why = turn["content"], turn.get("rationale")
    if why:
        text = f"<think>{why}</think>\n#### {text}" if form.name == "think" else f"{why}\n#### {text}"
    return text if form.name.startswith(("alpaca", "minimind")) else " " + text


def runs(ids: np.ndarray, trained: np.ndarray) -> list[list[int]]:
    """The trained tokens of each reply, its stop token included."""
    found = []
    for i, t, before in zip(ids.tolist(), trained.tolist(), [False, *trained.tolist()], strict=False):
        if t and not before:
            found.append([])
        if t:
            found[-1].append(i)
    return found


# ----------------------------------------------------------------------------------------------------- what is trained


@given(conversation=CONVERSATION, **EITHER)
@settings(max_examples=400, deadline=None)
def test_the_trained_tokens_are_the_replies_and_their_stop_token_and_nothing_else(conversation, form, tok):
    ids, trained = form.encode(conversation, tok)
    assert ids.dtype == tok.dtype and trained.dtype == bool and len(ids) == len(trained)
    stop, replies = form.stop_id(tok), [t for t in conversation if t["role"] == "assistant"]
    found = runs(ids, trained)
    assert [run[-1] for run in found] == [stop] * len(replies)
    assert [tok.decode(run[:-1]) for run in found] == [answer(form, t) for t in replies]
    assert not replies or trained[-1]  # the tail from which nothing can be learned is left out


@given(conversation=CONVERSATION, **EITHER)
@settings(max_examples=300, deadline=None)
def test_a_prompt_is_a_prefix_of_the_example_and_goes_on_from_turn_to_turn(conversation, form, tok):
    ids, trained = form.encode(conversation, tok)
    ids, read, known = ids.tolist(), [], 0
    for number, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        whole = form.prompt(conversation[:number], tok)
        read += form.prompt(conversation[known:number], tok, continues=known > 0)
        assert whole == read == ids[: len(whole)]  # re-reading = going on behind the stop token = training
        assert not trained[len(whole) - 1] and trained[len(whole)]
        reply = runs(np.array(ids[len(read) :]), trained[len(read) :])[0]
        read, known = read + reply, number + 1
    assert known == 0 or read == ids


@given(conversation=CONVERSATION, **EITHER)
@settings(max_examples=300, deadline=None)
def test_special_tokens_come_from_the_template_never_from_a_text(conversation, form, tok):
    blank = [{k: "x" if k != "role" and v else v for k, v in turn.items()} for turn in conversation]
    special = set(tok.special.values())
    ours, plain = ([i for i in form.encode(c, tok)[0].tolist() if i in special] for c in (conversation, blank))
    assert ours == plain


@given(st.lists(CONVERSATION, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_many_at_once_are_as_one_by_one_and_given_turns_are_not_trained(conversations, data):
    form, tok = data.draw(st.sampled_from(FORMS)), data.draw(st.sampled_from(list(TOKENIZERS.values())))
    given_turns = [data.draw(st.integers(0, len(c))) for c in conversations]
    for (ids, trained), conversation in zip(form.encode_batch(conversations, tok), conversations, strict=True):
        assert np.array_equal(ids, form.encode(conversation, tok)[0])
        assert np.array_equal(trained, form.encode(conversation, tok)[1])
    both = zip(form.encode_batch(conversations, tok, given=given_turns), conversations, given_turns, strict=True)
    for (ids, trained), conversation, many in both:
        all_ids, all_trained = form.encode(conversation, tok)
        replies = sum(t["role"] == "assistant" for t in conversation)
        context = sum(t["role"] == "assistant" for t in conversation[:many])
        assert np.array_equal(ids[: len(all_ids)], all_ids[: len(ids)])  # the same tokens, whatever is trained
        assert len(runs(ids, trained)) == replies - context
        assert runs(ids, trained) == runs(all_ids, all_trained)[context:]


def test_no_token_straddles_the_border_of_a_reply():
    tok = resolve_tokenizer("bpe:300", ["Answer: yes " * 50])  # learns " yes" and longer; "e: ye" must not be one token
    form = template({"name": "tight", "user": "{content}", "assistant": ["Answer: y", "{content}" + EOT, ""]})
    ids, trained = form.encode([{"role": "user", "content": ""}, {"role": "assistant", "content": "es"}], tok)
    assert tok.decode(ids[~trained]) == EOT + "Answer: y" and tok.decode(ids[trained]) == "es" + EOT
    assert len(tok.encode("Answer: yes")) < len(ids) - 2  # the tokenizer would have joined them


# --------------------------------------------------------------------------------------------------- the six templates

TASK = [{"role": "user", "content": "Give the plural.", "input": "leaf"}, {"role": "assistant", "content": "leaves"}]
SUM = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "rationale": "2 + 2 = 4"}]
CLASSIC = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@pytest.mark.parametrize(
    ("name", "conversation", "text"),
    [
        (
            "minimind-chatml",
            SUM,
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n[2 + 2 = 4\n#### 4<|im_end|>]",
        ),
        (
            "minimind-chatml",
            [{"role": "system", "content": "Be brief."}, *SUM[:1], {"role": "assistant", "content": "4"}] * 2,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
            "[4<|im_end|>]\n"
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
            "[4<|im_end|>]",
        ),
        ("alpaca-plain", TASK, f"{EOT}Instruction:\nGive the plural.\n\nInput:\nleaf\n\nResponse:\n[leaves{EOT}]"),
        ("alpaca-plain", SUM, f"{EOT}Instruction:\n2+2?\n\nResponse:\n[2 + 2 = 4\n#### 4{EOT}]"),
        (
            "alpaca-stanford",
            TASK,
            f"{EOT}Below is an instruction that describes a task, paired with an input that provides further context. "
            f"{CLASSIC}Give the plural.\n\n### Input:\nleaf\n\n### Response:[leaves{EOT}]",
        ),
        (
            "alpaca-stanford",
            SUM,
            f"{EOT}Below is an instruction that describes a task. {CLASSIC}2+2?\n\n"
            f"### Response:[2 + 2 = 4\n#### 4{EOT}]",
        ),
        ("qa", SUM, f"{EOT}Question: 2+2?\nAnswer:[ 2 + 2 = 4\n#### 4{EOT}]"),
        ("qa", TASK * 2, f"{EOT}" + f"Question: Give the plural.\nleaf\nAnswer:[ leaves{EOT}]" * 2),
        ("think", SUM, f"{EOT}Question: 2+2?\nAnswer:[ <think>2 + 2 = 4</think>\n#### 4{EOT}]"),
        ("stepwise", SUM, f"{EOT}Question: 2+2?\nAnswer: Let's think step by step.[ 2 + 2 = 4\n#### 4{EOT}]"),
    ],
)
def test_a_template_writes_what_it_is_known_for_and_trains_what_stands_in_brackets(name, conversation, text):
    for tok in (TOKENIZERS["byte+chatml"], TOKENIZERS["bpe+chatml"]):
        ids, trained = TEMPLATES[name].encode(conversation, tok)
        marks, before = "", False
        for i, t in zip([*ids.tolist(), -1], [*trained.tolist(), False], strict=True):
            marks += "[" * (t and not before) + "]" * (before and not t) + (tok.decode([i]) if i >= 0 else "")
            before = t
        assert marks == text


def test_chatml_without_its_tokens_stops_with_eot_and_writes_the_start_as_text():
    tok, form = TOKENIZERS["byte"], TEMPLATES["minimind-chatml"]
    ids, trained = form.encode(SUM, tok)
    assert form.stop_id(tok) == tok.eot_id and ids.tolist().count(tok.eot_id) == 3
    begin = f"<|im_start|>system\nYou are a helpful assistant{EOT}\n<|im_start|>user\n2+2?{EOT}\n"
    assert tok.decode(ids).startswith(begin)
    chatml = TOKENIZERS["bpe+chatml"]
    assert (form.stop_id(chatml), TEMPLATES["qa"].stop_id(chatml)) == (2, 0)
    assert form.encode(SUM, chatml)[0].tolist().count(1) == 3


def test_reasoning_marks_are_tokens_where_the_tokenizer_has_them():
    tok = TOKENIZERS["bpe+think"]
    ids = TEMPLATES["think"].encode(SUM, tok)[0].tolist()
    assert [i for i in ids if i in (1, 2)] == [1, 2] and tok.decode(ids).count("<think>") == 1


def test_a_continued_chat_has_no_second_opening():
    form, tok = TEMPLATES["minimind-chatml"], TOKENIZERS["bpe+chatml"]
    more = form.prompt([{"role": "user", "content": "and 3+3?"}], tok, continues=True)
    assert tok.decode(more) == "\n<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(TEMPLATES["qa"].prompt([], tok)) == EOT + "Answer:"


def test_a_shown_reply_has_lost_what_the_template_put_around_it():
    assert TEMPLATES["qa"].reply(" 4") == "4" and TEMPLATES["qa"].reply("4") == "4"
    assert TEMPLATES["qa"].reply("  4 ") == " 4 " and TEMPLATES["alpaca-plain"].reply(" 4") == " 4"
    quoted = template({"name": "q", "user": "{content}", "assistant": ["", '"{content}"' + EOT, ""]})
    assert quoted.reply('"4"') == "4"


@given(conversation=CONVERSATION, form=st.sampled_from(FORMS))
@settings(max_examples=100, deadline=None)
def test_the_texts_for_training_a_tokenizer_are_those_that_are_tokenised(conversation, form):
    for special, name in (((), "byte"), (CHATML, "byte+chatml")):
        tok = TOKENIZERS[name]
        texts, marks = form.texts(conversation, special), set(tok.special.values())
        ids = [i for i in form.encode(conversation, tok)[0].tolist() if i not in marks]
        assert ids == [i for text in texts for i in tok.encode(text)]


# -------------------------------------------------------------------------------------------------- a user's template

GOOD = 'user = "U: {content}\\n"\nassistant = ["A: ", "{content}<|endoftext|>", "\\n"]\n'


def test_a_template_file_is_read_and_its_definition_gives_it_back(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD + 'default_system = "hi"\n')
    form = template(file)
    assert (form.name, form.user, form.default_system) == ("mine", "U: {content}\n", "hi")
    text = TOKENIZERS["byte"].decode(form.encode(SUM * 2, TOKENIZERS["byte"])[0])
    assert f"{EOT}hi\n\n" + f"U: 2+2?\nA: 2 + 2 = 4\n#### 4{EOT}\n" * 2 == text + "\n"
    for known in (form, *FORMS):
        assert template(json.loads(json.dumps(dataclasses.asdict(known)))) == known
    assert template("qa") is TEMPLATES["qa"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("<|endoftext|>", ""), r"does not end in the stop token '<\|endoftext\|>'.*write assistant = \["),
        (GOOD + 'stop = "<|im_end|>"', r"does not end in the stop token '<\|im_end\|>'"),
        (GOOD + 'stop = ""', r"stop is ''; name a special token: stop = .<\|endoftext\|>"),
        (GOOD + 'stop = "END"', "stop is 'END'; name a special token"),
        (GOOD.replace("U: {content}", "U: "), r"user is .* must hold \{content\} once"),
        (GOOD.replace("{content}<", "{content}{content}<"), r"trained is .* must hold \{content\} once"),
        (GOOD.replace("U: {content}", "{contents}{content}"), r"user has \{contents\}; it takes \{content\}"),
        (GOOD + 'begin = "{content}"', r"begin has \{content\}; it takes no slots"),
        (GOOD + "default_system = 3", "default_system is 3; give a string"),
        (GOOD + 'sytem = "{content}"', "unknown key 'sytem'; did you mean system"),
        (GOOD + 'user_input = "{content}"', r"user_input is .* must hold \{input\} once"),
        (GOOD.replace(', "\\n"]', "]"), r"write assistant = \["),
        ('user = "{content}"', "no 'assistant'; a template needs at least"),
        ("user = ", "cannot be read"),
    ],
)
def test_a_broken_template_file_is_refused_with_what_to_write(content, message, tmp_path):
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        template(tmp_path / "mine.toml")


def test_an_unknown_template_is_answered_with_those_there_are():
    with pytest.raises(UserError, match="did you mean alpaca-plain.*minimind-chatml, alpaca-plain.*toml file"):
        template("alpaca-plane")
    with pytest.raises(UserError, match=r"nowhere.toml cannot be read \(No such file"):
        template("nowhere.toml")


def test_a_tokenizer_without_any_stop_token_is_refused():
    tok = resolve_tokenizer("char", ["<|im_start|>Question: 2+2?\nAnswer 4#"])
    with pytest.raises(UserError, match="neither <.endoftext.> nor.*`tokenizer` bpe:4096 or byte$"):
        TEMPLATES["qa"].encode(SUM, tok)
    with pytest.raises(UserError, match=r"`special` '<\|im_end\|>'"):
        TEMPLATES["minimind-chatml"].prompt(SUM[:1], tok)
    assert TEMPLATES["qa"].stop_id(tok.with_special([EOT])) == tok.vocab_size
    begins = dataclasses.replace(TEMPLATES["minimind-chatml"], begin=EOT, default_system="")
    assert begins.encode([], tok.with_special(CHATML))[0].tolist() == []  # no EOT to begin with, but a stop token
    assert TEMPLATES["minimind-chatml"].stop_id(tok.with_special(CHATML)) == tok.vocab_size + 1


# -------------------------------------------------------------------------------------------------------- the schemas


def user(text, **more):
    return {"role": "user", "content": text} | more


def says(text, **more):
    return {"role": "assistant", "content": text} | more


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [user("a"), says("b")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [{"role": "system", "content": "s"}, user("a"), says("b")],
        ),
        (
            {"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a", "from": None}]},
            [says("hi"), user("a")],  # roles from the field, not from parity
        ),
        ({"messages": [{"role": None, "from": "Human", "content": None, "value": "a"}]}, [user("a")]),
        ({"instruction": "a", "input": "i", "output": "b", "text": "…"}, [user("a", input="i"), says("b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [user("a"), says("b")]),
        ({"instruction": "a", "input": None, "output": "b", "source": "x"}, [user("a"), says("b")]),
        (
            {"question": "a", "answer": "2*3=<<2*3=6>>6\nso\n#### 6"},
            [user("a"), says("6", rationale="2*3=<<2*3=6>>6\nso")],
        ),
        ({"question": "a", "answer": "b"}, [user("a"), says("b")]),
        ({"question": "a", "rationale": "r", "answer": 6, "type": "x"}, [user("a"), says("6", rationale="r")]),
        ({"question": "a", "rationale": "", "answer": "b"}, [user("a"), says("b")]),
        ({"prompt": "a", "completion": "b"}, [user("a"), says("b")]),
        ({"prompt": "a", "response": "b"}, [user("a"), says("b")]),
        ({"conversations": []}, []),
    ],
)
def test_each_schema_gives_the_turns_it_means(row, conversation):
    assert list(read_conversations([(row, "f:1")])) == [(conversation, "f:1")]


def test_a_seed_task_gives_one_conversation_an_instance():
    row = {"instruction": "plural", "instances": [{"input": "leaf", "output": "leaves"}, {"input": "", "output": "s"}]}
    found = [c for c, _ in read_conversations([(row, "f:1")])]
    assert found == [[user("plural", input="leaf"), says("leaves")], [user("plural"), says("s")]]


HH = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("q"), says("x")], "rejected": [user("q"), says("y")]},
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"prompt": [user("q")], "chosen": [says("x")], "rejected": [says("y")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"},
        {"prompt": None, "chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"},
        # each side repeats the prompt
        {"prompt": "q", "chosen": [user("q"), says("x")], "rejected": [user("q"), says("y")]},
        {"prompt": [user("q")], "chosen": [user("q"), says("x")], "rejected": [user("q"), says("y")]},
        {
            "prompt": "\n\nHuman: q\n\nAssistant:",
            "chosen": "\n\nHuman: q\n\nAssistant: x",
            "rejected": "\n\nHuman: q\n\nAssistant: y",
        },
    ],
)
def test_each_preference_schema_gives_the_shared_turns_and_both_sides(row):
    assert list(read_preferences([(row, "f:1")])) == [([user("q")], [says("x")], [says("y")], "f:1")]


def test_dialogues_split_where_they_part():
    row = {"chosen": HH + " e", "rejected": HH + " f\n\nHuman: g\n\nAssistant: "}
    [(shared, chosen, rejected, _)] = read_preferences([(row, "f:1")])
    assert shared == [user("a\n\nb"), says("c"), user("d")]
    assert (chosen, rejected) == ([says("e")], [says("f"), user("g"), says("")])
    [(shared, chosen, rejected, _)] = read_preferences([({"prompt": HH, "chosen": "e", "rejected": "f"}, "f:1")])
    assert (len(shared), chosen, rejected) == (3, [says("e")], [says("f")])


def test_a_prompt_that_only_quotes_a_dialogue_is_one_turn():
    row = {"prompt": "He said:\n\nHuman: no", "chosen": "x", "rejected": "y"}
    assert [shared for shared, *_ in read_preferences([(row, "f:1")])] == [[user("He said:\n\nHuman: no")]]


def test_word_problems_are_preferences_and_conversations():
    row = {"question": "q", "rationale": "r", "answer": "1", "wrong_rationale": "w", "wrong_answer": "2", "text": "…"}
    assert list(read_preferences([(row, "f:1")])) == [
        ([user("q")], [says("1", rationale="r")], [says("2", rationale="w")], "f:1")
    ]
    assert list(read_conversations([(row, "f:1")])) == [([user("q"), says("1", rationale="r")], "f:1")]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (
            read_conversations,
            {"text": "a"},
            r"^f:1: no conversation in the columns text\. Known are conversations; .*output",
        ),
        (read_conversations, {"chosen": "a", "rejected": "b"}, "they are for `objective` dpo"),
        (read_preferences, {"instruction": "a", "output": "b"}, "no preference .*they are for `objective` sft"),
        (read_conversations, {}, "columns none"),
        (
            read_conversations,
            {"messages": [{"role": "tool", "content": "x"}]},
            "f:1: messages, turn 1: the role is 'tool'",
        ),
        (read_conversations, {"messages": [{"speaker": "user"}]}, "turn 1: the role is None, found keys speaker"),
        (read_conversations, {"messages": [{"role": "user"}]}, "turn 1: no text, found keys role"),
        (read_conversations, {"messages": [{"role": "user", "content": 3.5}]}, "content holds float '3.5', not text"),
        (read_conversations, {"messages": ["hi"]}, "turn 1 is str 'hi'"),
        (read_conversations, {"messages": "hi"}, "messages holds str 'hi', not a list of turns"),
        (read_conversations, {"prompt": "a", "completion": True}, "completion holds bool"),
        (read_conversations, {"prompt": "a", "response": "\ud800"}, "lone surrogate"),
        (read_conversations, {"instruction": "a", "instances": "b"}, "instances is not a list"),
        (read_conversations, {"instruction": "a", "instances": [{"input": "b"}]}, "output holds NoneType"),
        (read_preferences, {"chosen": "a", "rejected": "b"}, "chosen begins 'a'.*a column prompt"),
        (read_preferences, {"chosen": 3, "rejected": "b"}, "chosen holds int '3', not a list of turns"),
    ],
)
def test_a_row_of_no_known_schema_is_refused_by_name(read, row, message):
    with pytest.raises(UserError, match=message):
        list(read([(row, "f:1")]))


@needs_data
def test_the_published_files_are_read_whole():
    rows = {}
    for name in ("alpaca_seed_tasks.jsonl", "gsm8k_train.jsonl", "hh_rlhf_harmless_test.jsonl.gz"):
        with (gzip.open if name.endswith("gz") else open)(DATA / name, "rt", encoding="utf-8") as file:
            rows[name[:2]] = [(json.loads(line), f"{name}:{n}") for n, line in enumerate(file, 1)]
    tasks = [c for c, _ in read_conversations(rows["al"])]
    assert len(tasks) == 175 and all(len(c) == 2 and c[1]["content"] for c in tasks)
    problems = [c for c, _ in read_conversations(rows["gs"])]
    assert len(problems) == 7473 and all(re.fullmatch(r"-?[\d,]+", c[1]["content"]) for c in problems)
    assert all("####" not in c[1]["rationale"] for c in problems)
    pairs = list(read_preferences(rows["hh"]))
    assert len(pairs) == 2312 and all(shared[0]["role"] == "user" for shared, *_ in pairs)
    # 2,307 of 2,312 part in the last reply alone; 5 part a turn earlier
    assert sum(len(chosen) == len(rejected) == 1 for _, chosen, rejected, _ in pairs) == 2307
    assert not any(re.search(r"\n\n(Human|Assistant):", t["content"]) for p in pairs for side in p[:3] for t in side)

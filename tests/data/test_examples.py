"""Examples: what is sealed is what the template wrote, packing loses and repeats nothing, held-out prompts stay out."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.data.batch import IGNORE, Batch
from muonlm.data.examples import ExampleData, plan
from muonlm.data.prep import examples as module
from muonlm.data.prep import sealed
from muonlm.data.prep.examples import prepare_examples, prepared_examples
from muonlm.data.prep.index import read_examples, verify
from muonlm.data.prep.text import prepare
from muonlm.data.text.templates import TEMPLATES, template
from muonlm.data.text.tokenizer import Tokenizer
from muonlm.errors import UserError
from muonlm.storage import Growing

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent: it holds the third-party texts")
QA, BYTE = TEMPLATES["qa"], Tokenizer.byte()


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def replies(*lengths):
    """Conversations whose prompts all differ: number and filler, reply of so many characters."""
    return [{"prompt": f"{i}?", "completion": chr(97 + i % 26) * n} for i, n in enumerate(lengths)]


def pairs(*lengths):
    return [{"prompt": f"{i}" + "?" * p, "chosen": "y" * c, "rejected": "n" * r} for i, (p, c, r) in enumerate(lengths)]


def make(folder, rows, kind="sft", **settings):
    settings = {"template": "qa", "tokenizer": "byte", "val": "tail:0.000001"} | settings
    prepare_examples(jsonl(folder.parent / f"{folder.name}.jsonl", rows), folder, kind=kind, **settings)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name → folder of 60 training items; sizes from a few to about 60 positions, many of them equal."""
    base, random = tmp_path_factory.mktemp("examples"), np.random.default_rng(5)
    found = {"sft": make(base / "sft", replies(*random.integers(1, 40, 61)))}
    lengths = random.integers(1, 14, (61, 3)).tolist()
    return found | {"preferences": make(base / "preferences", pairs(*lengths), "preferences")}


def segments(batch: Batch) -> list[list[tuple]]:
    """Of each row, its segments as (inputs, targets); everything else about the layout is asserted."""
    found = []
    for inputs, targets, numbers in zip(batch.inputs, batch.targets, batch.segments, strict=True):
        used = int((numbers >= 0).sum())
        assert (numbers[used:] == -1).all() and (targets[used:] == IGNORE).all() and (inputs[used:] == 0).all()
        many = int(numbers[used - 1]) + 1
        assert torch.equal(numbers[:used].unique_consecutive(), torch.arange(many))
        row = [(inputs[numbers == s].tolist(), targets[numbers == s].tolist()) for s in range(many)]
        assert [t for inside, _ in row for t in inside] == inputs[:used].tolist()
        found.append(row)
    if batch.pairs:
        assert all(len(row) % 2 == 0 for row in found) and batch.count == sum(len(row) for row in found) // 2
    else:
        assert batch.count == int((batch.targets != IGNORE).sum())
    return found


def items(batch: Batch) -> list:
    """Examples, or pairs, of a batch, each as something that can be counted."""
    step = 2 if batch.pairs else 1
    return [repr(row[at : at + step]) for row in segments(batch) for at in range(0, len(row), step)]


def truth(folder, kind: str, split: str = "train") -> list:
    """The same from the source and the template, by plain Python."""
    rows = [json.loads(line) for line in open(f"{folder}.jsonl", encoding="utf-8")]
    rows = rows[:-1] if split == "train" else rows[-1:]
    found = []
    for row in rows:
        item = []
        for side in ["completion"] if kind == "sft" else ["chosen", "rejected"]:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            ids, trained = QA.encode(turns, BYTE)
            targets = [int(t) if on else IGNORE for t, on in zip(ids[1:], trained[1:], strict=True)]
            item.append((ids[:-1].tolist(), targets))
        found.append(item)
    return found


# ------------------------------------------------------------------------------------------------------- the plan


def first_fit_decreasing(sizes, width):
    left, rows = sorted(sizes, reverse=True), []
    while left:
        room, row, rest = width, [], []
        for size in left:
            if size <= room:
                row.append(size)
                room -= size
            else:
                rest.append(size)
        rows.append(row)
        left = rest
    return rows


@given(width=st.integers(1, 60), data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_plan_is_first_fit_decreasing_with_each_item_once(width, data):
    sizes = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=150))
    first, slot = plan(np.array(sizes, np.uint16), width)
    assert np.array_equal(np.sort(slot), np.arange(len(sizes)))
    ordered = np.sort(sizes)
    rows = [ordered[slot[a:b]].tolist() for a, b in zip(first[:-1], first[1:], strict=True)]
    assert rows == first_fit_decreasing(sizes, width)


@needs_data
def test_gsm8k_fills_rows_of_512_to_97_percent(tmp_path):
    rows = [json.loads(line) for line in open(DATA / "gsm8k_train.jsonl", encoding="utf-8")]
    source = jsonl(tmp_path / "third.jsonl", rows[::3])  # fewer items fill worse: all 7,473 reach 0.978
    prepare_examples(source, tmp_path / "out", kind="sft", template="qa", tokenizer=f"gpt2:{DATA / 'gpt2_merges.txt'}")
    data = ExampleData(tmp_path / "out", block_size=512, rows=8, seed=1)
    batches = list(data.sequential(64))
    filled = sum(int((b.segments >= 0).sum()) for b in batches) / (len(data) * 512)
    assert filled > 0.97 and f"{filled:.1%} filled" in data.notes[0]
    assert sum(b.count for b in batches) == data.index["splits"]["train"]["targets"]  # nothing is cut at 512


# ------------------------------------------------------------------------------------------- every item, every epoch


@pytest.mark.parametrize("kind", ["sft", "preferences"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("width", [100, 163, 400])
def test_every_epoch_holds_every_item_once(folders, kind, pack, width):
    data = ExampleData(folders[kind], block_size=width, rows=1, seed=3, pack=pack)
    expected = Counter(map(repr, truth(folders[kind], kind)))
    assert sum(expected.values()) == 60 == data.num_examples
    data.rows = len(data)  # one step is one epoch
    epochs = [items(data.batch(epoch)) for epoch in range(3)]
    for found in epochs:
        assert Counter(found) == expected
    assert epochs[0] != epochs[1] != epochs[2]
    if pack and len(data) <= 30:  # else most rows hold one item
        mates = [{frozenset(items(one)) for one in data.batch(epoch).split(1)} for epoch in range(2)]
        assert mates[0] != mates[1]  # an epoch also mixes who shares a row with whom
    if not pack:
        assert len(data) == 60


@given(
    kind=st.sampled_from(["sft", "preferences"]),
    width=st.integers(90, 300),
    rows=st.integers(1, 25),
    step=st.integers(0, 40),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_a_function_of_seed_and_step_whatever_the_world(folders, kind, width, rows, step, seed):
    def fresh(seed=seed):
        return ExampleData(folders[kind], block_size=width, rows=rows, seed=seed)

    unbroken = fresh()
    for before in range(max(0, step - 3), step):
        unbroken.batch(before)
    whole = unbroken.batch(step)
    for world in (1, 2, 3):  # each rank resumes at this very step
        parts = [fresh().batch(step, rank, world) for rank in range(world)]
        for name in ("inputs", "targets", "segments"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert sum(p.count for p in parts) == whole.count
    if rows > 3:
        assert not torch.equal(fresh(seed + 1).batch(step).inputs, whole.inputs)


def test_seed_and_epoch_choose_the_order_of_the_rows(folders):
    def shapes(seed, epoch):
        data = ExampleData(folders["sft"], block_size=100, rows=1, seed=seed)
        data.rows = len(data)
        return [[len(inputs) for inputs, _ in row] for row in segments(data.batch(epoch))]

    orders = [shapes(1, 0), shapes(2, 0), shapes(1, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != sorted(orders[0], reverse=True)


def test_steps_run_on_across_epochs(folders):
    data = ExampleData(folders["sft"], block_size=200, rows=7, seed=1)
    n, expected = len(data), Counter(map(repr, truth(folders["sft"], "sft")))
    assert n % 7  # an epoch ends inside a step
    stream = [items(one) for step in range(2 * n // 7 + 1) for one in data.batch(step).split(1)]
    for epoch in range(2):
        assert Counter(i for row in stream[epoch * n : (epoch + 1) * n] for i in row) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_evaluation_reads_everything_once_in_the_same_order_for_every_seed(folders, world):
    data = ExampleData(folders["sft"], block_size=200, rows=3, seed=1)
    batches = [b for rank in range(world) for b in data.sequential(4, rank, world)]
    assert Counter(i for b in batches for i in items(b)) == Counter(map(repr, truth(folders["sft"], "sft")))
    other = ExampleData(folders["sft"], block_size=200, rows=3, seed=2)
    assert torch.equal(torch.cat([b.inputs for b in batches]), torch.cat([b.inputs for b in other.sequential(5)]))
    some = torch.cat([b.inputs for rank in range(world) for b in data.sequential(4, rank, world, limit=5)])
    assert torch.equal(some, torch.cat([b.inputs for b in batches])[:5])


def test_the_first_prompt_is_what_leads_to_a_reply_and_no_token_of_it(folders, tmp_path):
    prompt = BYTE.decode(ExampleData(folders["sft"], block_size=200, rows=3, seed=1).first_prompt())
    known = [BYTE.decode(QA.prompt([{"role": "user", "content": f"{i}?"}], BYTE)) for i in range(60)]
    assert prompt in known and prompt.endswith("?\nAnswer:")
    rows = [
        {
            "chosen": [{"role": r, "content": c} for r, c in turns],
            "rejected": [{"role": r, "content": c} for r, c in bad],
        }
        for i in range(3)
        for before in [[("user", f"{i}"), ("assistant", "a"), ("user", "so")]]
        for turns, bad in [(before + [("assistant", "good")], before + [("assistant", "bad")])]
    ]
    data = ExampleData(make(tmp_path / "d", rows, "preferences"), "val", block_size=300, rows=1, seed=1)
    assert BYTE.decode(data.first_prompt()).endswith("Question: 2\nAnswer: a<|endoftext|>Question: so\nAnswer:")


# -------------------------------------------------------------------------------------------------------- preferences


def test_the_two_sides_of_a_pair_lie_together_and_reference_values_follow_them(folders):
    data = ExampleData(folders["preferences"], block_size=260, rows=5, seed=1)
    known = truth(folders["preferences"], "preferences")
    plain = data.batch(2)
    assert plain.pairs and plain.reference is None
    # A value that says which item and side it is of
    data.reference = np.array([[i + 0.25, i + 0.5] for i in range(len(known))], np.float32)
    seen = set()
    for batch, numbers in data.pairs_in_order(4):
        rows = segments(batch)
        assert batch.reference.dtype == torch.float32 and batch.reference.shape[1] == max(map(len, rows))
        assert numbers.shape == (len(rows), max(len(row) // 2 for row in rows))
        for row, of_row, values in zip(rows, numbers, batch.reference, strict=True):
            present = of_row[of_row >= 0]
            assert len(present) * 2 == len(row) and (of_row[len(present) :] == -1).all()
            for j, number in enumerate(present):
                assert row[2 * j : 2 * j + 2] == known[number]
                assert values[2 * j : 2 * j + 2].tolist() == [number + 0.25, number + 0.5]
            assert (values[len(row) :] == 0).all()
            seen |= set(present.tolist())
    assert seen == set(range(60))
    again = data.batch(2)
    assert torch.equal(again.inputs, plain.inputs) and again.reference is not None
    assert sum(part.count for part in again.split(2)) == again.count


def test_turns_that_both_sides_share_are_not_trained(tmp_path):
    shared = [f"\n\nHuman: {i}\n\nAssistant: both\n\nHuman: so\n\nAssistant: " for i in range(4)]
    rows = [{"chosen": text + "good", "rejected": text + "bad"} for text in shared]
    data = ExampleData(make(tmp_path / "d", rows, "preferences"), block_size=300, rows=1, seed=1)
    for batch in data.sequential(1):
        for row in segments(batch):
            told = [BYTE.decode([t for t in targets if t != IGNORE]) for _, targets in row]
            assert told == [" good<|endoftext|>", " bad<|endoftext|>"] * (len(row) // 2)


# ------------------------------------------------------------------------------------------------ too long for a row


def cut_by_hand(item, width):
    """The stated rule, a token at a time: of a pair the prompt's beginning on both sides, then ends of the longer."""
    item = [list(zip(*side, strict=True)) for side in item]
    if sum(map(len, item)) > width and len(item) == 2:
        while sum(map(len, item)) > width and all(side[0][1] == IGNORE for side in item):
            item = [side[1:] for side in item]
    while sum(map(len, item)) > width:
        longest = max(range(len(item)), key=lambda i: len(item[i]))
        item[longest].pop()
    for side in item:
        while side and side[-1][1] == IGNORE:
            side.pop()
    return [tuple(map(list, zip(*side, strict=True))) for side in item] if all(item) else None


CUT = [("sft", width) for width in (21, 22, 31, 40, 55)] + [("preferences", width) for width in (2, 5, 16, 33, 63, 80)]


@pytest.mark.parametrize(("kind", "width"), CUT)
def test_what_is_too_long_is_cut_or_dropped_as_stated_and_counted(folders, kind, width):
    known = truth(folders[kind], kind)
    long = [sum(len(inputs) for inputs, _ in item) > width for item in known]
    wanted = [cut_by_hand(item, width) for item in known]
    assert any(long)
    data = ExampleData(folders[kind], block_size=width, rows=2, seed=1)
    found = Counter(i for batch in data.sequential(3) for i in items(batch))
    assert found == Counter(repr(w) for w in wanted if w)
    cut, out = sum(w is not None and on for w, on in zip(wanted, long, strict=True)), sum(w is None for w in wanted)
    text = " ".join(data.notes)
    assert (f" {cut} {module.KINDS[kind].items}" in text) == (cut > 0) and (
        f" {out} {module.KINDS[kind].items} left out" in text
    ) == (out > 0)
    if not all(long):
        dropped = ExampleData(folders[kind], block_size=width, rows=2, seed=1, overlong="drop")
        kept = Counter(i for batch in dropped.sequential(3) for i in items(batch))
        assert kept == Counter(repr(item) for item, on in zip(known, long, strict=True) if not on)
        assert f"{sum(long)} " in dropped.notes[1] and "left out" in dropped.notes[1]
        assert dropped.fingerprint != data.fingerprint


def test_a_pair_with_one_untrained_side_left_is_left_out(tmp_path):
    def turns(prompt, reply):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]

    rows = [{"chosen": turns(f"{i}", "y"), "rejected": turns(f"{i}" * (200 if i == 1 else 1), "n")} for i in range(4)]
    data = ExampleData(make(tmp_path / "d", rows, "preferences"), block_size=50, rows=1, seed=1)
    assert data.num_examples == 2 and "1 pairs left out: cut to 50 tokens" in data.notes[1] and len(data.notes) == 2


def test_a_cut_inside_a_question_also_takes_away_what_is_left_of_it(tmp_path):
    def turns(i):
        return [{"role": r, "content": c} for r, c in (("user", f"{i}"), ("assistant", "yes"), ("user", "w" * 99))]

    rows = [{"messages": [*turns(i), {"role": "assistant", "content": "no"}]} for i in range(3)]
    data = ExampleData(make(tmp_path / "d", rows), block_size=60, rows=1, seed=1)
    for batch in data.sequential(2):
        for row in segments(batch):
            assert [BYTE.decode([t for t in targets if t != IGNORE]) for _, targets in row] == [" yes<|endoftext|>"] * 2
            assert all(targets[-1] == BYTE.eot_id for _, targets in row)


def test_a_row_that_nothing_fits_names_the_size_that_does(folders):
    with pytest.raises(UserError, match=r"none of the 60 examples .* fits .* `block_size` (\d+)") as error:
        ExampleData(folders["sft"], block_size=3, rows=1, seed=1)
    enough = int(str(error.value).split()[-1])
    assert len(ExampleData(folders["sft"], block_size=enough, rows=1, seed=1, overlong="drop").notes) == 1
    assert len(ExampleData(folders["sft"], block_size=enough - 1, rows=1, seed=1, overlong="drop").notes) == 2
    with pytest.raises(UserError, match="cut or drop"):
        ExampleData(folders["sft"], block_size=30, rows=1, seed=1, overlong="skip")
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        ExampleData(folders["sft"], "test", block_size=30, rows=1, seed=1)


def test_the_fingerprint_knows_what_changes_a_batch(folders):
    def mark(**change):
        return ExampleData(folders["sft"], **({"block_size": 200, "rows": 1, "seed": 1} | change)).fingerprint

    assert len({mark(), mark(block_size=201), mark(pack=False), mark(overlong="drop")}) == 4
    assert mark() == mark(rows=9, seed=4)


# ------------------------------------------------------------------------------------------------------- held out


def prompts(folder, split) -> list[str]:
    data, found = ExampleData(folder, split, block_size=2000, rows=1, seed=1), []
    for batch in data.sequential(50):
        for row in segments(batch):
            found += [BYTE.decode(inputs).split("Question: ")[1].split("\n")[0] for inputs, _ in row]
    return found


def test_equal_prompts_share_a_side_and_a_larger_fraction_only_adds(tmp_path):
    rows = [{"prompt": f"p{i % 100}", "completion": f"answer {i}"} for i in range(300)]
    small, large = (make(tmp_path / f"{f}", rows, val=f"hash:{f}") for f in (0.1, 0.3))
    for folder in (small, large):
        train, val = prompts(folder, "train"), prompts(folder, "val")
        assert len(train) + len(val) == 300 and not set(train) & set(val)
        assert set(Counter(train + val).values()) == {3}
        assert read_examples(folder)["val"]["overlap"] == 0
    # 100 prompts: 0.1 ± 5 sd (0.03), 0.3 ± 5 sd (0.046)
    assert 0 < len(prompts(small, "val")) < 3 * 25 and 3 * 7 < len(prompts(large, "val")) < 3 * 53
    assert set(prompts(small, "val")) < set(prompts(large, "val"))
    shuffled = make(tmp_path / "shuffled", rows[::-1], val="hash:0.3")
    assert set(prompts(shuffled, "val")) == set(prompts(large, "val"))


def test_under_tail_and_path_training_examples_with_a_held_out_prompt_are_left_out(tmp_path):
    rows = [{"prompt": f"p{i % 30}", "completion": f"answer {i}"} for i in range(100)]
    folder = make(tmp_path / "tail", rows, val="tail:0.1")
    train, val = prompts(folder, "train"), prompts(folder, "val")
    assert sorted(val) == sorted(f"p{i % 30}" for i in range(90, 100)) and not set(train) & set(val)
    assert sorted(train) == sorted(f"p{i % 30}" for i in range(90) if i % 30 not in range(10))
    assert read_examples(folder)["val"] == {"rule": "tail:0.1", "fallback": False, "left_out": 30, "overlap": 0}
    others = jsonl(tmp_path / "held.jsonl", [{"prompt": "p3", "completion": "x"}, {"prompt": "new", "completion": "y"}])
    folder = make(tmp_path / "path", rows, val=str(others))
    assert prompts(folder, "val") == ["p3", "new"] or prompts(folder, "val") == ["new", "p3"]
    assert read_examples(folder)["val"]["left_out"] == 4 and "p3" not in prompts(folder, "train")


def test_a_side_that_hash_leaves_empty_becomes_a_tail(tmp_path):
    rows = replies(1, 2, 3)
    index = read_examples(make(tmp_path / "d", rows, val="hash:0.0000001"))
    assert index["val"]["fallback"] and [index["splits"][s]["examples"] for s in ("train", "val")] == [2, 1]
    assert prompts(tmp_path / "d", "val") == ["2?"]
    with pytest.raises(UserError, match="no examples to hold out: 1 in all"):
        make(tmp_path / "one", rows[:1])
    with pytest.raises(UserError, match="all 5 examples have the prompt of a held-out one"):
        make(tmp_path / "same", [{"prompt": "p", "completion": f"{i}"} for i in range(5)])


def test_examples_without_a_prompt_are_told_apart_by_the_whole(tmp_path):
    rows = [{"prompt": " ", "completion": f"story {i}"} for i in range(100)]
    index = read_examples(make(tmp_path / "d", rows, val="hash:0.2"))
    assert not index["val"]["fallback"] and 2 <= index["splits"]["val"]["examples"] <= 45  # 20 ± 5 sd (4)


# ------------------------------------------------------------------------------------------------ what is sealed


def test_rows_that_train_nothing_are_skipped_and_counted(tmp_path):
    asks = {"role": "user", "content": "why"}
    rows = [
        {"messages": [asks]},
        {"messages": []},
        {"messages": [asks, {"role": "assistant", "content": "  "}]},
        *({"messages": [asks | {"content": str(i)}, {"role": "assistant", "content": "so"}]} for i in range(3)),
    ]
    index = read_examples(make(tmp_path / "d", rows))
    assert index["skipped"] == {"untrained": 2, "empty": 1}
    assert index["splits"]["train"]["examples"] + index["splits"]["val"]["examples"] == 3
    rows = [{"prompt": f"{i}", "chosen": "same", "rejected": "same" if i < 2 else "other"} for i in range(5)]
    rows.append({"prompt": "9", "chosen": "good", "rejected": ""})
    index = read_examples(make(tmp_path / "p", rows, "preferences"))
    assert index["skipped"] == {"untrained": 0, "empty": 1, "equal": 2}
    with pytest.raises(UserError, match="no examples to train on: of the rows read, 2 untrained, 0 empty"):
        make(tmp_path / "none", [{"messages": [asks]}, {"messages": []}])


def test_the_folder_brings_its_template_and_tokenizer(tmp_path):
    special = ("<|im_start|>", "<|im_end|>")
    rows = replies(*range(5, 60))
    folder = make(tmp_path / "d", rows, template="minimind-chatml", tokenizer="bpe:300", special=special)
    data = ExampleData(folder, block_size=300, rows=1, seed=1)
    assert data.template == "minimind-chatml" and data.tokenizer.special["<|im_end|>"] == 2 and data.vocab_size == 300
    ids, trained = TEMPLATES["minimind-chatml"].encode(
        [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "a" * 5}], data.tokenizer
    )
    packed = [row for batch in data.sequential(9) for row in segments(batch)]
    found = [row[0][0] for row in packed] + [segment[0] for row in packed for segment in row]
    assert repr(ids[:-1].tolist())[1:-1] in repr(found)
    assert trained[-1] and ids[-1] == 2
    mine = tmp_path / "mine.toml"
    mine.write_text('user = "Q \\"{content}\\" é\\t\\n"\nassistant = ["A:", "{content}<|endoftext|>", ""]\n', "utf-8")
    data = ExampleData(make(tmp_path / "m", rows, template=str(mine)), block_size=300, rows=1, seed=1)
    mine.unlink()
    assert template(data.template) == template(data.index["template"])
    assert template(data.template).user == 'Q "{content}" é\t\n' and data.template.endswith("mine.toml")


def test_a_character_that_a_char_vocabulary_lacks_is_found_in_its_row(tmp_path):
    folder = make(tmp_path / "d", replies(3, 4, 5), tokenizer="char")
    assert ExampleData(folder, block_size=50, rows=1, seed=1).tokenizer.kind == "char"
    with pytest.raises(UserError, match=r"x.jsonl:2: the character 'é'"):
        rows = [*replies(3), {"prompt": "2", "completion": "é"}, *replies(2)]
        make(tmp_path / "x", rows, tokenizer=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("damage", ["trained", "lengths", "tokens", "index.json", "tokenizer.json", "absent"])
def test_an_altered_folder_is_refused_by_name(tmp_path, damage):
    folder = make(tmp_path / "d", replies(3, 4, 5))
    file = folder / (damage if "." in damage else f"train-{damage}.bin")
    if damage == "absent":
        file = folder / "val-trained.bin"
        file.unlink()
    elif damage == "index.json":
        file.write_text(file.read_text("utf-8").replace('"qa"', '"think"'), "utf-8")
    elif damage == "tokenizer.json":
        Tokenizer.char("ab", eot=True).save(folder)
    else:
        os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(UserError, match=f"{file.name}.*make it again"):
        ExampleData(folder, block_size=50, rows=1, seed=1)


def test_a_failure_leaves_nothing_and_the_older_folder_stands(tmp_path, monkeypatch):
    folder = make(tmp_path / "d", replies(3, 4, 5))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="exists already; add `overwrite`"):
        make(tmp_path / "d", replies(7, 8))
    monkeypatch.setattr(module._Writer, "close", lambda self: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(RuntimeError):
        make(tmp_path / "d", replies(7, 8), overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / ".d.partial").exists()
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "d.jsonl"]
    make(tmp_path / "d", replies(7, 8), overwrite=True)
    assert read_examples(folder)["splits"]["train"]["examples"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "d.jsonl"]


def same(a, b) -> bool:
    """Equal files but for the moment that an index names."""

    def content(folder):
        found = {p.name: p.read_bytes() for p in folder.iterdir()}
        index = json.loads(found.pop("index.json"))
        return found, {k: v for k, v in index.items() if k not in ("created", "checksum")}

    return content(a) == content(b)


def break_at(patch, number: int, error: BaseException) -> list[str]:
    """Make the number-th of the calls that change the disk raise instead; the names of all that were made."""
    calls = []
    for owner, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (Growing, "write"), (Growing, "close")):

        def call(*args, _plain=getattr(owner, name), _name=name):
            calls.append(_name)
            if len(calls) == number:
                raise error
            return None if _name == "fsync" else _plain(*args)

        patch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("val", ["hash:0.3", "tail:0.3", "PATH"])
@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_stopped_before_any_change_of_the_disk_it_goes_on_to_the_same_bytes(kind, val, tmp_path, monkeypatch):
    made = replies(*range(2, 22)) if kind == "sft" else pairs(*((n, n + 1, n + 2) for n in range(2, 22)))
    source = jsonl(tmp_path / "a.jsonl", made)
    rule = str(jsonl(tmp_path / "v.jsonl", made[3:9])) if val == "PATH" else val
    options = dict(kind=kind, template="qa", tokenizer="bpe:300", val=rule)
    monkeypatch.setattr(sealed, "SAVE_SECONDS", 0)
    monkeypatch.setattr(module, "BATCH", 400)
    with monkeypatch.context() as patch:
        calls = break_at(patch, 0, KeyboardInterrupt())
        prepare_examples(source, tmp_path / "whole", **options)
    resumed = 0
    for number in range(1, len(calls) + 1, 17):
        out, told = tmp_path / f"out{number}", []
        with monkeypatch.context() as patch:
            break_at(patch, number, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                prepare_examples(source, out, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: None)
            index = prepare_examples(source, out, **options, log=told.append)
        resumed += any("going on" in line for line in told)
        assert same(out, tmp_path / "whole") and not sealed.partial_path(out).exists(), calls[number - 1]
        assert index == read_examples(out) and verify(out)
    assert resumed > len(calls) / 20


KILLED = """
import os, pathlib, random, shutil, signal, sys, time
from muonlm.data.prep import examples, sealed
examples.BATCH, sealed.SAVE_SECONDS = 1 << 14, 0.01
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]

def begin(to):
    child = os.fork()
    if not child:
        log = lambda line: print(line, file=sys.stderr, flush=True)
        examples.prepare_examples("word_problems:4000:1-3", to, kind=kind, template="qa", tokenizer="bpe:400", log=log)
        os._exit(0)
    return child

start = time.monotonic()
os.waitpid(begin(folder / "whole"), 0)
gap, rng, kills = (time.monotonic() - start) / 4, random.Random(5), 0
while kills < 8:
    child = begin(folder / "out")
    time.sleep(rng.uniform(0, gap))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if (folder / "out").exists():  # done too early: once more, killed more often
        shutil.rmtree(folder / "out")
        gap, kills = gap / 2, 0
child = begin(folder / "out")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_killed_at_random_moments_and_run_again_it_makes_the_same_bytes(kind, tmp_path):
    """Real processes, real SIGKILL; forked from one that has imported everything."""
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path, kind], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("going on where") >= 3, run.stderr
    assert same(tmp_path / "out", tmp_path / "whole") and verify(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    folder, real = make(tmp_path / "d", replies(3, 4, 5)), module.expand

    def slow(*args, **settings):
        if not (tmp_path / "e").exists():
            shutil.copytree(folder, tmp_path / "e")
        return real(*args, **settings)

    monkeypatch.setattr(module, "expand", slow)
    with pytest.raises(UserError, match="exists already"):
        make(tmp_path / "e", replies(7, 8))
    assert read_examples(tmp_path / "e")["splits"]["train"]["examples"] == 2


def test_other_folders_and_kinds_are_refused_before_anything_is_made(tmp_path):
    (tmp_path / "t.txt").write_text("some text, long enough to be packed\n" * 20, "utf-8")
    prepare(tmp_path / "t.txt", tmp_path / "packed", tokenizer="byte", val="tail:0.1")
    with pytest.raises(UserError, match="packed text, not examples"):
        prepared_examples(tmp_path / "packed", kind="sft", template="qa")
    folder = make(tmp_path / "d", replies(3, 4, 5))
    assert prepared_examples(str(folder), kind="sft", template="think") == folder
    with pytest.raises(
        UserError, match=r"holds examples \(sft\), but pairs \(preferences\) are wanted.*`objective` sft"
    ):
        prepared_examples(folder, kind="preferences", template="qa")
    with pytest.raises(UserError, match="`kind` = 'dpo'"):
        prepare_examples(tmp_path / "d.jsonl", tmp_path / "e", kind="dpo", template="qa")
    with pytest.raises(UserError, match="neither .* nor another end-of-text"):  # before a row is read
        Tokenizer.char("ab", eot=False).save(tmp_path)
        prepare_examples(
            tmp_path / "t.txt", tmp_path / "e", kind="sft", template="qa", tokenizer=str(tmp_path / "tokenizer.json")
        )
    with pytest.raises(UserError, match="plain text"):
        prepare_examples(tmp_path / "t.txt", tmp_path / "e", kind="sft", template="qa", tokenizer="byte")
    assert not (tmp_path / "e").exists()


def test_the_cache_is_keyed_by_content_and_every_setting(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", pairs(*[(3, 4, 5)] * 9))
    cache, base = tmp_path / "cache", dict(kind="preferences", template="qa", tokenizer="byte")

    def made(source=source, **change):
        return prepared_examples(source, **(base | change), cache=cache)

    first = made()
    stamp = (first / "index.json").stat().st_mtime_ns
    assert made() == first and (first / "index.json").stat().st_mtime_ns == stamp
    named = dataclasses.replace(QA, user="Q: {content}\n")
    changes = [{"template": "think"}, {"template": named}, {"tokenizer": "char"}, {"special": ("<x>",)}]
    found = {made(**change) for change in [*changes, {"val": "tail:0.3"}]}
    (tmp_path / "b").mkdir()
    same = jsonl(tmp_path / "b" / "a.jsonl", pairs(*[(3, 4, 5)] * 9))
    assert made(same) == first and first not in found and len(found) == 5
    jsonl(source, pairs(*[(3, 4, 6)] * 9))
    assert made() != first
    (first / "train-trained.bin").unlink()  # damaged: made anew
    assert made(same) == first and read_examples(first)
    assert made("word_problems:20") != made("word_problems:20", kind="sft")


def test_word_problems_become_examples_and_pairs(tmp_path):
    for kind in ("sft", "preferences"):
        folder = tmp_path / kind
        prepare_examples("word_problems:50:1-2", folder, kind=kind, template="qa", tokenizer="byte", val="tail:0.2")
        data = ExampleData(folder, block_size=1024, rows=2, seed=1)
        assert data.num_examples + read_examples(folder)["val"]["left_out"] == 40 and data.batch(0).count > 0

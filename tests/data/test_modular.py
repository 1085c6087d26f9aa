"""The grokking data and model: arithmetic against Python integers, the fast model against a plain one."""

import numpy as np
import pytest
import torch

from muonlm.data.synthetic.modular import OPERATIONS, ModularData
from muonlm.errors import UserError


def rows_of(data) -> set[tuple[int, int, int]]:
    return {(r["a"], r["b"], r["answer"]) for r in data.rows_as_dicts()}


def both_splits(**options) -> set[tuple[int, int, int]]:
    return rows_of(ModularData(split="train", **options)) | rows_of(ModularData(split="val", **options))


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


# ---- data


def test_prime_223_has_the_documented_sizes():
    train, val = ModularData(), ModularData(split="val")
    assert (len(train), len(val)) == (24_753, 24_753)
    assert train.steps_per_epoch == 49 and train.batch(48).count == 24_753 - 48 * 512
    assert train.vocab_size == val.vocab_size == 234
    assert ModularData(op="x+y", operations=6).vocab_size == 231
    assert ModularData(prime=97).vocab_size == 108


# Each operation in Python's own integers, by search where it divides: independent of inverses and of numpy.
BY_DEFINITION = {
    "x+y": lambda x, y, c, p: c == (x + y) % p,
    "x-y": lambda x, y, c, p: c == (x - y) % p,
    "x/y": lambda x, y, c, p: c * y % p == x,
    "(x//y)if(y%2==1)else(x-y)": lambda x, y, c, p: c * y % p == x if y % 2 else c == (x - y) % p,
    "x^2+y^2": lambda x, y, c, p: c == (x * x + y * y) % p,
    "x^2+xy+y^2": lambda x, y, c, p: c == (x * x + x * y + y * y) % p,
    "x^2+xy+y^2+x": lambda x, y, c, p: c == (x * x + x * y + y * y + x) % p,
    "x^3+xy": lambda x, y, c, p: c == (x * x * x + x * y) % p,
    "x^3+xy^2+x": lambda x, y, c, p: c == (x * x * x + x * y * y + x) % p,
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_pair_occurs_once_with_the_answer_of_the_definition(op):
    p = 23
    rows = both_splits(op=op, prime=p)
    first = 1 if op in ("x/y", "(x//y)if(y%2==1)else(x-y)") else 0
    assert {(a, b) for a, b, _ in rows} == {(a, b) for a in range(p) for b in range(first, p)}
    assert len(rows) == p * (p - first)
    assert all(0 <= c < p and BY_DEFINITION[op](a, b, c, p) for a, b, c in rows)


def test_the_row_of_the_feature_contract_is_there_and_its_tokens_spell_it():
    assert (12, 7, 161) in both_splits()  # 161·7 = 1127 = 5·223 + 12
    data = ModularData()
    eos, a, op, b, equals = data.inputs[0].tolist()
    row = data.rows_as_dicts()[0]
    assert (eos, op, equals) == (0, 2 + list(OPERATIONS).index("x/y"), 1) and row["op"] == "/"
    assert (a - 11, b - 11, int(data.targets[0]) - 11) == (row["a"], row["b"], row["answer"])


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.9])
def test_train_and_validation_share_no_row_and_miss_none(fraction):
    train, val = (ModularData(prime=97, train_fraction=fraction, split=s) for s in ("train", "val"))
    assert not rows_of(train) & rows_of(val)
    assert len(rows_of(train) | rows_of(val)) == len(train) + len(val) == 97 * 96
    assert len(train) == round(fraction * 97 * 96)


def test_the_split_depends_on_split_seed_alone_and_looks_drawn_at_random():
    assert ModularData(prime=97, seed=1).fingerprint == ModularData(prime=97, seed=2, rows=7).fingerprint
    assert ModularData(prime=97).fingerprint != ModularData(prime=97, split_seed=43).fingerprint
    assert ModularData(prime=97).fingerprint != ModularData(prime=97, split="val").fingerprint
    count = np.zeros(97, int)
    for a, _, _ in rows_of(ModularData(prime=97)):
        count[a] += 1
    # 48 ± 4.9 of 96 for each a, were it 97 coins thrown 96 times: 5 standard deviations, for 97 values and one draw
    assert abs(count - 48).max() < 25 and count.std() > 2.5


def test_an_epoch_takes_every_row_once_and_the_next_one_in_another_order():
    data = ModularData(prime=31, rows=64)
    m = data.steps_per_epoch
    first, _ = joined(data.batch(s) for s in range(m))
    second, _ = joined(data.batch(s) for s in range(m, 2 * m))
    whole = sorted(map(tuple, data.inputs.tolist()))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist())) == whole
    assert not torch.equal(first, second) and not torch.equal(first, data.inputs)
    again = ModularData(prime=31, rows=64).batch(m + 1)
    assert torch.equal(again.inputs, data.batch(m + 1).inputs) and torch.equal(again.targets, data.batch(m + 1).targets)
    assert not torch.equal(ModularData(prime=31, rows=64, seed=9).batch(0).inputs, data.batch(0).inputs)


@pytest.mark.parametrize("world", [2, 3, 70])
def test_the_ranks_together_hold_the_batch_of_one_process(world):
    data = ModularData(prime=31, rows=64)
    for step in (0, data.steps_per_epoch - 1, data.steps_per_epoch):
        whole = data.batch(step)
        shares = [data.batch(step, rank, world) for rank in range(world)]
        inputs, targets = joined(shares)
        assert torch.equal(inputs, whole.inputs) and torch.equal(targets, whole.targets)
        assert sum(b.count for b in shares) == whole.count == len(whole.targets)
        assert max(b.count for b in shares) - min(b.count for b in shares) <= 1
    inputs, targets = joined(b for rank in range(world) for b in data.sequential(10, rank, world))
    assert torch.equal(inputs, data.inputs) and torch.equal(targets, data.targets)


def test_micro_batches_of_a_batch_keep_all_rows_and_counts():
    batch = ModularData(prime=31, rows=64).batch(0)
    parts = batch.split(24)
    assert [b.count for b in parts] == [24, 24, 16]
    assert torch.equal(joined(parts)[1], batch.targets) and batch.targets.shape == (64,)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"op": "/"}, "did you mean 'x/y'"),
        ({"op": "x^2+y2"}, "did you mean 'x^2+y^2'"),
        ({"op": "x^3+xy", "operations": 6}, "is no operation"),
        ({"prime": 221}, "not a prime number; the nearest is 223"),
        ({"prime": -5}, "nearest is 2"),
        ({"prime": 5003}, "largest prime taken is 4093"),
        ({"train_fraction": 1.0}, "between 0 and 1"),
        ({"train_fraction": 0.0}, "between 0 and 1"),
        ({"train_fraction": float("nan")}, "between 0 and 1"),
        ({"split": "test"}, "'train' or 'val'"),
        ({"rows": 0}, "at least 1 row"),
        ({"operations": 10}, "1 to 9 operations"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(options, text):
    with pytest.raises(UserError) as caught:
        ModularData(**options)
    assert text in str(caught.value)

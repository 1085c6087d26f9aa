"""Packed data: the permutation, the epochs, ranks, and damaged folders."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.data.batch import IGNORE, Batch
from muonlm.data.packed import PackedData
from muonlm.data.permutation import KeyedPermutation
from muonlm.data.prep import formats
from muonlm.data.prep.index import read_index, verify
from muonlm.data.prep.text import prepare
from muonlm.errors import UserError


def make(folder, tokens: int, shard: int | None = None):
    """A prepared folder whose training stream is `tokens` distinct-looking characters; `shard`: tokens per shard."""
    text = "".join(chr(0x4E00 + i) for i in range(tokens))  # every token differs, so a position can be read off its id
    source = folder.parent / f"{folder.name}.txt"
    source.write_text(text + "一丁", "utf-8")
    old, formats.SHARD = formats.SHARD, shard or formats.SHARD
    try:
        index = prepare(source, folder, tokenizer="char", val="tail:0.000001")
    finally:
        formats.SHARD = old
    assert index["splits"]["train"]["tokens"] == tokens
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("packed")
    cases = [(3, None), (5, None), (17, None), (64, 7), (65, 64), (200, None), (200, 33)]
    return {(n, s): make(base / f"{n}-{s}", n, s) for n, s in cases}


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_the_permutation_is_a_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(KeyedPermutation(n, seed, epoch)(np.arange(n))), np.arange(n))


def test_the_permutation_depends_on_seed_and_epoch_and_mixes_well():
    n, index = 10_000, np.arange(10_000)
    a, b, c = (KeyedPermutation(n, *k)(index) for k in ((1, 0), (2, 0), (1, 1)))
    for x, y in ((a, b), (a, c), (a, index)):
        # Two random permutations agree in a Poisson(1) number of places and correlate within ±1/√n = 0.01: 5 sigma
        assert (x == y).sum() < 12 and abs(np.corrcoef(x, y)[0, 1]) < 0.05
    # Neighbours land far apart: for independent places the mean distance is n/3, sd of the mean n/√(18·n) = 24
    assert abs(np.abs(np.diff(a)).mean() - n / 3) < 5 * 24


def test_a_huge_permutation_needs_no_table():
    big = KeyedPermutation(2**45 + 12345, 3, 0)
    out = big(np.arange(1000))
    assert len(set(out.tolist())) == 1000 and out.max() < big.n and out.max() > 2**44


def pairs(batch: Batch) -> list[tuple[int, int]]:
    keep = batch.targets != IGNORE
    assert int(keep.sum()) == batch.count
    return list(zip(batch.inputs[keep].tolist(), batch.targets[keep].tolist(), strict=True))


@pytest.mark.parametrize("shape", [(3, None), (5, None), (17, None), (64, 7), (65, 64), (200, None), (200, 33)])
@pytest.mark.parametrize("block_size", [1, 4, 7, 64, 300])
def test_every_epoch_trains_every_target_once(folders, shape, block_size):
    data = PackedData(folders[shape], "train", block_size=block_size, rows=3, seed=11)
    n, ring = len(data), data.num_tokens - 1
    assert n == -(-ring // block_size)
    stream = [PackedData(folders[shape], "train", block_size=1, rows=1, seed=0)._take(np.arange(ring + 1))][0].tolist()
    truth = sorted(pairwise(stream))
    data.rows = n  # one step is one epoch
    for epoch in range(3):
        batch = data.batch(epoch)
        assert sorted(pairs(batch)) == truth
        if epoch == 0 and ring > block_size:  # phase 0: some row begins with the stream's first tokens
            assert stream[:block_size] in batch.inputs.tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(5, None), (200, 33)])
def test_the_ranks_together_hold_the_batch_of_one_process(folders, shape, world):
    data = PackedData(folders[shape], "train", block_size=16, rows=7, seed=5)
    for step in (0, 1, 2, 9, 1000):
        whole, parts = data.batch(step), [data.batch(step, r, world) for r in range(world)]
        assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
        assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
        assert sum(p.count for p in parts) == whole.count
        assert max(len(p.inputs) for p in parts) - min(len(p.inputs) for p in parts) <= 1


def test_a_batch_depends_on_seed_and_step_alone(folders):
    def open_one(seed=5, rows=7):
        return PackedData(folders[200, None], "train", block_size=16, rows=rows, seed=seed)

    one, other = open_one(), open_one()
    later = [one.batch(s) for s in range(30)][29]
    assert torch.equal(later.inputs, other.batch(29).inputs) and torch.equal(later.targets, other.batch(29).targets)
    assert not torch.equal(open_one(seed=6).batch(0).inputs, one.batch(0).inputs)
    # The order is one sequence of samples: it does not change with how many make a step
    joined = torch.cat([open_one(rows=14).batch(s).inputs for s in range(4)])
    assert torch.equal(joined, torch.cat([one.batch(s).inputs for s in range(8)]))


def test_epochs_are_cut_at_different_places(folders):
    data = PackedData(
        folders[200, None],
        "train",
        block_size=16,
        rows=len(PackedData(folders[200, None], block_size=16, rows=1, seed=1)),
        seed=1,
    )
    firsts = [frozenset(data.batch(epoch).inputs[:, 0].tolist()) for epoch in range(4)]
    assert len(set(firsts)) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, None), (64, 7), (200, None)])
def test_sequential_gives_every_target_once_in_order(folders, shape, world):
    data = PackedData(folders[shape], "train", block_size=16, rows=2, seed=1)
    got = [p for rank in range(world) for batch in data.sequential(3, rank, world) for p in pairs(batch)]
    stream = data._take(np.arange(data.num_tokens)).tolist()
    assert got == list(pairwise(stream))


@given(rows=st.integers(1, 9), micro=st.integers(1, 10), masked=st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_splitting_a_batch_loses_no_row_and_no_count(rows, micro, masked):
    inputs = torch.arange(rows * 5).view(rows, 5)
    targets = inputs + 1
    targets.view(-1)[:masked] = IGNORE
    batch = Batch(inputs, targets, int((targets != IGNORE).sum()))
    parts = batch.split(micro)
    assert torch.equal(torch.cat([p.inputs for p in parts]), inputs)
    assert torch.equal(torch.cat([p.targets for p in parts]), targets)
    assert all(len(p.inputs) <= micro and p.count == int((p.targets != IGNORE).sum()) for p in parts)


def test_the_tensors_are_int64_contiguous_and_separate(folders):
    batch = PackedData(folders[200, None], "train", block_size=16, rows=4, seed=1).batch(0).to("cpu")
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.inputs.data_ptr() != batch.targets.data_ptr()
    whole = (batch.targets != IGNORE).all(
        dim=1
    )  # in epoch 0 only the last sample, which has surplus, crosses the ring's seam
    assert whole.any() and torch.equal(batch.inputs[whole, 1:], batch.targets[whole, :-1])


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "data", 120, 50)


def reopen(folder):
    return PackedData(folder, "train", block_size=8, rows=2, seed=0)


def test_a_truncated_or_missing_shard_is_refused_by_name(folder):
    shard = folder / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00001.bin has 98 bytes, its index says 100; .*muonlm prep"):
        reopen(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.bin is missing; .*muonlm prep"):
        reopen(folder)


def test_a_flipped_bit_is_found_by_verify_and_named(folder):
    verify(folder)
    shard = folder / "val-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 4]) + shard.read_bytes()[1:])
    reopen(folder)  # the size is right: the cheap checks pass
    with pytest.raises(UserError, match=r"val-00000.bin was altered.*muonlm prep"):
        verify(folder)


def test_an_altered_index_or_another_tokenizer_is_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"created": "yesterday"}))
    with pytest.raises(UserError, match=r"index.json was altered"):
        reopen(folder)
    (folder / "index.json").write_text(json.dumps(index)[:-9])
    with pytest.raises(UserError, match=r"index.json is not an index"):
        reopen(folder)
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text('{"muonlm": "byte"}')
    with pytest.raises(UserError, match=r"tokenizer.json is not the tokenizer this data was made with"):
        reopen(folder)


def test_a_folder_that_is_not_prepared_says_how_to_prepare_it(tmp_path, folder):
    with pytest.raises(UserError, match=r"no index.json in it\); make it: muonlm prep"):
        read_index(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; make it: muonlm prep"):
        read_index(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, val"):
        PackedData(folder, "test", block_size=8, rows=2, seed=0)
    with pytest.raises(UserError, match=r"`block_size` 0, `rows` 2"):
        PackedData(folder, "train", block_size=0, rows=2, seed=0)


def test_reset_is_refused_where_no_token_says_that_documents_end(tmp_path):
    (tmp_path / "t.txt").write_text("some text " * 100)
    for eod in (True, False):
        prepare(tmp_path / "t.txt", tmp_path / str(eod), tokenizer="byte", eod=eod)
    PackedData(tmp_path / "True", block_size=8, rows=1, seed=0, reset=True)
    PackedData(tmp_path / "False", block_size=8, rows=1, seed=0)
    with pytest.raises(UserError, match="first 990 tokens of .*False hold no end of text.*--eod"):
        PackedData(tmp_path / "False", block_size=8, rows=1, seed=0, reset=True)

"""Rows of several segments: each is computed as if it were alone, in every mixer, forwards and backwards."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlm.config.schema import ModelConfig
from muonlm.data.batch import IGNORE
from muonlm.model import build_model
from muonlm.model.mixers import MIXERS
from muonlm.model.packing import Segments, _groups

V, T = 50, 36
LENGTHS = [[7, 13, 9, 7], [20, 1, 3], [36], [2]]  # rows with and without an unused tail
HARD = dict(embed_conv=3, positions="learned", loops=2, inject=True)


def small(pattern: str, **extra) -> torch.nn.Module:
    layers = max(2, len(pattern))
    cfg = ModelConfig(
        pattern=pattern,
        n_layer=layers,
        d_model=32,
        n_head=2,
        vocab_size=V,
        block_size=T,
        window=5,
        delta_heads=2,
        ssm_head=16,
        scan_chunk=8,
        init="lm",
        **extra,
    )
    return build_model(cfg, torch.device("cpu"), 1).double()


def packed(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, V, (len(LENGTHS), T), generator=generator) for _ in range(2))
    segments = torch.full_like(tokens, -1)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths):
            segments[row, at : at + length] = number
            at += length
        targets[row, at:] = IGNORE
    return tokens, targets, segments


def alone(tokens, targets, segments):
    """Each segment as a batch of one row, with where it lies."""
    for row in range(len(tokens)):
        for number in range(int(segments[row].max()) + 1):
            where = segments[row] == number
            yield row, where, tokens[row, where][None], targets[row, where][None]


@pytest.mark.parametrize("extra", [{}, HARD], ids=["plain", "conv, learned positions, loops"])
@pytest.mark.parametrize("pattern", [*MIXERS, "MALG"])
def test_packed_segments_equal_segments_alone_forwards_and_backwards(pattern, extra):
    model, (tokens, targets, segments) = small(pattern, **extra), packed()
    logits, state = model(tokens, segments=segments)
    assert state is None
    nats = model(tokens, targets, segments=segments, per_token=True)
    loss = model(tokens, targets, segments=segments)
    assert nats.shape == tokens.shape and torch.allclose(nats.sum(), loss, rtol=1e-12)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0
    for row, where, x, y in alone(tokens, targets, segments):
        # fp64: what differs is the order of sums, 1e-12 at most
        assert torch.allclose(logits[row, where], model(x)[0][0], atol=1e-12, rtol=1e-10)
        own = model(x, y, per_token=True)
        assert torch.allclose(nats[row, where], own[0], atol=1e-12, rtol=1e-10)
        total = total + own.sum()
    total.backward()
    assert (nats[segments < 0] == 0).all()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-10, rtol=1e-9), name


@pytest.mark.parametrize("pattern", MIXERS)
def test_changing_a_segment_changes_no_other_by_a_single_bit(pattern):
    model, (tokens, _, segments) = small(pattern), packed()
    with torch.no_grad():
        before = model(tokens, segments=segments)[0]
        other = (segments == 1) | (segments == -1)
        after = model(torch.where(other, (tokens + 1) % V, tokens), segments=segments)[0]
        leaks = model(torch.where(other, (tokens + 1) % V, tokens))[0]
    kept = (segments == 0) | (segments > 1)
    assert torch.equal(before[kept], after[kept]) and not torch.equal(before[other], after[other])
    later = segments == 2
    assert not torch.allclose(leaks[later], model(tokens)[0][later]), "without segments the rows do mix"


@pytest.mark.parametrize("pattern", ["A", "M", "g"])
def test_recomputed_blocks_give_the_same_gradients(pattern):
    model, (tokens, targets, segments) = small(pattern), packed()
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(tokens, targets, segments=segments).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients))


def test_rows_of_nothing_but_padding_and_no_rows_give_zero_and_reach_every_parameter():
    for rows in (2, 0):
        model = small("MA")
        tokens = torch.zeros(rows, T, dtype=torch.long)
        loss = model(tokens, torch.full_like(tokens, IGNORE), segments=torch.full_like(tokens, -1))
        loss.backward()
        assert loss == 0 and all(p.grad is not None for p in model.parameters())  # data-parallel wrappers wait for all


def test_a_scattered_segment_is_our_mistake_and_is_caught():
    with pytest.raises(AssertionError, match="contiguous"):
        Segments(torch.tensor([[0, 1, 0]]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([300, 304]))
def test_groups_cover_every_segment_in_few_shapes_at_the_least_cost(lengths, T):
    lengths.sort(reverse=True)
    groups, sizes = _groups(lengths, T), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    left = lengths
    for n, L in groups:
        assert left and L == min(-(-left[0] // 8) * 8, T) and n in sizes
        left = left[n:]
    assert not left

    @cache
    def least(i):  # of everything from segment i on: whatever stands first is tried
        if i >= len(lengths):
            return 0
        L = min(-(-lengths[i] // 8) * 8, T)
        return min(n * L + 64 + least(i + n) for n in sizes)

    assert sum(n * L + 64 for n, L in groups) == least(0)


def test_batches_of_other_documents_share_their_shapes():
    random = torch.Generator().manual_seed(0)
    shapes, tokens, real = set(), 0, 0
    for _ in range(200):
        lengths = sorted((40 + 60 * torch.rand(60, generator=random)).long().tolist(), reverse=True)
        groups = _groups(lengths, 256)
        shapes.update(groups)
        tokens, real = tokens + sum(n * L for n, L in groups), real + sum(lengths)
    assert len(shapes) < 60 and tokens < 1.1 * real

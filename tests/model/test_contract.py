"""The contract of a mixer, for every line of the table: a new mixer is tested by being in it.

States are values that nobody looks into (slots of a cache may hold anything), so they are compared by what follows from
them. Tolerance 1e-10 in fp64: two orders of the same sums; seen 3e-13.
"""

import pytest
import torch

from muonlm.config.schema import ModelConfig
from muonlm.engine import map_state
from muonlm.model import build_model
from muonlm.model.mixers import MIXERS
from muonlm.model.packing import Segments

SMALL = {"n_layer": 1, "d_model": 32, "n_head": 4, "vocab_size": 8, "block_size": 64, "window": 5, "init": "lm"}
SMALL |= {"ssm_head": 16, "ssm_groups": 2, "delta_heads": 3, "delta_key": 5, "d_state": 6}
SMALL |= {"scan": "chunked", "scan_chunk": 8}  # short rows have several chunks
EXACT = {"rtol": 0, "atol": 1e-10}
T = 21

pytestmark = pytest.mark.parametrize("letter", MIXERS)


def make(letter, dtype=torch.float64):
    """A mixer of weights that are at no special value."""
    mixer = build_model(ModelConfig(**SMALL, pattern=letter), seed=1).blocks[0].mixer
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    return mixer.to(dtype).eval()


def tokens(rows, length, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, SMALL["d_model"], generator=draw, dtype=torch.float64).to(dtype)


def clone(state):
    return map_state(torch.clone, state)


def pick(state, rows):
    return map_state(lambda s: s[rows].clone(), state)


def following(mixer, state):
    """Outputs of five more tokens."""
    return mixer(tokens(len(state[0]), 5, seed=9), clone(state))[0]


def test_a_row_in_pieces_or_token_by_token_gives_the_same_outputs_and_states(letter):
    mixer, x = make(letter), tokens(3, T)
    whole, end = mixer(x)
    then, draw = following(mixer, end), torch.Generator().manual_seed(0)
    random = [[0, *sorted(torch.randperm(T - 1, generator=draw)[:n].add(1).tolist()), T] for n in (1, 2, 3, 5)]
    for cuts in (*random, list(range(T + 1)), [0, T - 1, T]):
        for gradients in (False, True):  # decoding may have a path of its own, where no gradient is wanted
            pieces, state = [], mixer.init_state(3, dtype=torch.float64)
            with torch.set_grad_enabled(gradients):
                for start, stop in zip(cuts, cuts[1:]):
                    y, state = mixer(x[:, start:stop], state)
                    pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
            torch.testing.assert_close(following(mixer, state), then, **EXACT)


MASKS = {
    "left": [[0] * 7 + [1] * 14, [0] * 19 + [1] * 2, [1] * T],
    "right": [[1] * 14 + [0] * 7, [1] * 2 + [0] * 19, [1] * T],
    "scattered": [[1, 0, 0, 1, 1, 0, 1] * 3, [0, 1] * 10 + [0], [1] * 10 + [0] + [1] * 10],
    "empty rows": [[0] * T, [1] * T, [0] * 10 + [1] * 11],
    "nothing real": [[0] * T] * 3,
    "nothing masked": [[1] * T] * 3,
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("begun", [False, True])
def test_masked_tokens_are_deleted_from_outputs_states_and_gradients(letter, kind, begun):
    mixer, mask = make(letter), torch.tensor(MASKS[kind], dtype=torch.bool)
    x, weigh = tokens(3, T).requires_grad_(), tokens(3, T, seed=4)
    start = mixer(tokens(3, 11, seed=8))[1] if begun else mixer.init_state(3, dtype=torch.float64)
    start = map_state(torch.Tensor.detach, start)
    y, state = mixer(x, clone(start), mask)
    assert y.shape == x.shape and not y[~mask].any()
    then, loss, alone = following(mixer, state), (y * weigh).sum(), 0
    for row, real in enumerate(mask):
        one, end = slice(row, row + 1), pick(start, slice(row, row + 1))
        if real.any():
            out, end = mixer(x[one, real], end)
            torch.testing.assert_close(y[one, real], out, **EXACT)
            alone = alone + (out * weigh[one, real]).sum()
        tail = mixer(tokens(3, 5, seed=9)[one], end)[0]
        torch.testing.assert_close(then[one], tail, **EXACT)
        alone = alone + tail.square().sum()
    wanted = [x, *mixer.parameters()]
    got = torch.autograd.grad(loss + then.square().sum(), wanted, materialize_grads=True)
    for a, b in zip(got, torch.autograd.grad(alone, wanted, materialize_grads=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_decoding_with_some_rows_masked_moves_the_others_alone(letter):
    mixer, x, mask = make(letter), tokens(3, 1), torch.tensor([[True], [False], [True]])
    with torch.no_grad():
        _, state = mixer(tokens(3, 6, seed=3))
        free, moved = mixer(x, clone(state))
        before = following(mixer, state)
        y, new = mixer(x, state, mask)
        assert not y[1].any()
        torch.testing.assert_close(y[[0, 2]], free[[0, 2]], **EXACT)
        then = following(mixer, new)
        torch.testing.assert_close(then[1], before[1], **EXACT)
        torch.testing.assert_close(then[[0, 2]], following(mixer, moved)[[0, 2]], **EXACT)


def test_a_state_has_the_batch_first_and_can_be_cloned_to_branch_and_reordered_by_rows(letter):
    mixer, x, order = make(letter), tokens(3, 4, seed=5), torch.tensor([2, 0, 0])
    with torch.no_grad():
        _, state = mixer(tokens(3, 9))
        assert isinstance(state, tuple) and all(len(s) == 3 for s in (*state, *mixer.init_state(3)))
        branch, picked = clone(state), pick(state, order)
        y, _ = mixer(x, state)
        torch.testing.assert_close(mixer(x, branch)[0], y, rtol=0, atol=0)
        torch.testing.assert_close(mixer(x[order], picked)[0], y[order], **EXACT)


def test_gradients_flow_through_a_returned_state_into_a_given_one(letter):
    mixer, x, weigh = make(letter), tokens(2, T).requires_grad_(), tokens(2, T, seed=4)
    y, _ = mixer(x)
    state, pieces = None, []
    for start, stop in ((0, 10), (10, 11), (11, 13), (13, T)):
        piece, state = mixer(x[:, start:stop], state)
        pieces.append(piece)
    wanted = [x, *mixer.parameters()]
    parts = torch.autograd.grad((torch.cat(pieces, 1) * weigh).sum(), wanted)
    for a, b in zip(parts, torch.autograd.grad((y * weigh).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_packed_rows_are_each_document_alone(letter):
    segments = torch.tensor([[0] * 9 + [1] * 4 + [2] * 8, [0] * 2 + [1] * 16 + [-1] * 3])
    mixer, x = make(letter), tokens(2, T)
    y = Segments(segments).apply(lambda part: mixer(part)[0], x)
    for row, numbers in enumerate(segments):
        for number in numbers.unique():
            here = numbers == number
            alone = mixer(x[row : row + 1, here])[0][0] if number >= 0 else torch.zeros_like(y[row, here])
            torch.testing.assert_close(y[row, here], alone, **EXACT)


def test_nothing_depends_on_a_later_token_and_the_own_one_counts(letter):
    mixer, x = make(letter), tokens(1, T).requires_grad_()
    y, _ = mixer(x)
    for t in (0, 7, 8, T - 2):
        (g,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        size = g[0].abs().amax(-1)
        assert (size[t + 1 :] <= 1e-13 * size.max()).all() and size[t] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_have_the_dtype_of_the_inputs_and_states_that_of_a_fresh_one(letter, dtype):
    """Integers (positions) aside; sums over tokens are kept in full precision beside bf16, caches are not."""
    mixer = make(letter, dtype)
    y, state = mixer(tokens(2, T, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()
    assert [s.dtype for s in state] == [s.dtype for s in mixer.init_state(2, dtype=dtype)]


def test_autocast_decoding_continues_an_autocast_prefill(letter):
    mixer, x = make(letter, torch.float32), tokens(2, 12, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _ = mixer(x)
        pieces, state = mixer(x[:, :9])
        pieces = [pieces]
        for t in range(9, 12):
            piece, state = mixer(x[:, t : t + 1], state)
            pieces.append(piece)
    z = torch.cat(pieces, 1)
    # that of a Linear, or of x where y is formed from it outside any product
    assert y.dtype == z.dtype and y.dtype in (torch.bfloat16, torch.float32)
    assert (z.float() - y.float()).norm() < 2e-2 * y.float().norm()  # a product of one row may round otherwise

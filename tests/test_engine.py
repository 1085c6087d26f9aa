"""Generation: cached decoding equals the full forward, sampling settings mean what they say, pieces join to a text."""

import copy
import dataclasses
import importlib
import io
import json
import random
import sys

import pytest
import torch

from muonlm import build_model
from muonlm.cli.main import main
from muonlm.config.schema import ModelConfig
from muonlm.data.text.tokenizer import resolve_tokenizer
from muonlm.engine import complete, generate, pick, stream
from muonlm.errors import UserError
from muonlm.model.mixers import MIXERS
from muonlm.sampling import Sampling

BASE = {"n_layer": 2, "d_model": 32, "n_head": 4, "vocab_size": 50, "block_size": 24}
VARIANTS = {
    "plain": {},
    "window": {"pattern": "WA", "window": 5},
    "grouped queries, tied, soft-caps": {"n_kv_head": 2, "tie": True, "attn_softcap": 20.0, "logit_softcap": 15.0},
    "learned positions, layernorm, biases": {
        "positions": "learned",
        "norm": "layernorm",
        "bias": True,
        "mlp": "gelu",
        "qk_norm": False,
    },
    "partial rotation, dropout configured": {"rotary_fraction": 0.5, "dropout": 0.3, "mlp": "relu2"},
}


def model_of(**variant):
    model = build_model(ModelConfig(**BASE | variant), seed=3).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # larger than at initialisation, so that the likeliest token changes from step to step
            parameter.mul_(3)
    return model


def tokens_of(model, prompt, **kwargs) -> list[list[int]]:
    """Sample -> its tokens up to a stop."""
    plain = {name: kwargs.pop(name) for name in ("samples", "stop") if name in kwargs}
    steps = list(stream(model, prompt, Sampling(**kwargs), **plain))
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(steps[0]))]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_cached_greedy_decoding_equals_the_full_forward(variant):
    model, prompt = model_of(**variant), [7, 3, 11]
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(model(torch.tensor([expected]))[0][0, -1].argmax()))
    got = tokens_of(model, prompt, max_tokens=20, temperature=0)
    assert got == [expected[3:]] and len(set(got[0])) > 3


@pytest.mark.parametrize(
    "variant", [{}, {"positions": "learned"}, {"pattern": "W", "window": 5}], ids=["rope", "learned", "window"]
)
def test_beyond_block_size_the_last_half_is_read_again(variant):
    """The rule written out without a cache: a row that outgrows block_size keeps its last half."""
    model = model_of(**variant)
    row, expected, block = [1, 2, 3, 4, 5], [], BASE["block_size"]
    with torch.no_grad():
        for _ in range(60):
            if len(row) > block:
                row = row[-(block // 2) :]
            expected.append(int(model(torch.tensor([row]))[0][0, -1].argmax()))
            row = [*row, expected[-1]]
    assert tokens_of(model, [1, 2, 3, 4, 5], max_tokens=60, temperature=0) == [expected]


def test_a_prompt_longer_than_block_size_keeps_its_end():
    model, long = model_of(), [i % 50 for i in range(100)]
    assert tokens_of(model, long, max_tokens=5, temperature=0) == tokens_of(
        model, long[-24:], max_tokens=5, temperature=0
    )


def test_many_samples_come_from_one_prefill_and_are_what_each_would_be():
    """Greedy: all equal the single one. Sampled: they differ from one another."""
    model, calls = model_of(), []
    model.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    many = tokens_of(model, [7, 3, 11], samples=3, max_tokens=8, temperature=0)
    assert calls[0] == (1, 3) and set(calls[1:]) == {(3, 1)}
    assert many == 3 * tokens_of(model, [7, 3, 11], max_tokens=8, temperature=0)
    assert len(set(map(tuple, tokens_of(model, [7, 3, 11], samples=3, max_tokens=8, temperature=2.0)))) == 3


def test_the_seed_decides_the_text_and_nothing_else_does():
    model, settings = model_of(), {"max_tokens": 12, "temperature": 1.5, "samples": 2}
    torch.manual_seed(1)
    first = tokens_of(model, [1, 2], seed=5, **settings)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert tokens_of(model, [1, 2], seed=5, **settings) == first != tokens_of(model, [1, 2], seed=6, **settings)
    assert torch.equal(torch.get_rng_state(), state)


PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])


def frequencies(n=20000, *, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    draws = torch.rand(n, generator=torch.Generator().manual_seed(0))
    logits = PROBABILITIES.log().expand(n, -1) + 3.0  # a constant shift changes nothing
    return (
        torch.bincount(pick(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p), draws), minlength=5)
        / n
    )


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),  # the first token alone reaches it, and is kept
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),  # the token that crosses is kept
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1, 0, 0, 0, 0]),  # top_p of what top_k left: 0.5/0.9 = 0.56 reaches 0.5 at once
        ({"temperature": 0.5}, (PROBABILITIES**2 / (PROBABILITIES**2).sum()).tolist()),  # p^(1/τ), normalised
    ],
)
def test_temperature_top_k_and_top_p_select_by_hand_computed_shares(settings, expected):
    found = frequencies(**settings)
    # 5 standard deviations of a share in 20,000 draws: 5·sqrt(.25/20000) = 0.018; what is excluded is never drawn
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float), atol=0.018)
    assert all(float(f) == 0 for f, e in zip(found, expected) if e == 0)


def test_the_ends_of_the_interval_draw_tokens_that_may_be_drawn():
    """Also where the sum of the probabilities is not 1 to the last bit."""
    logits = torch.randn(200, 31, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, [0, 30]] = float("-inf")  # the first and the last, which a careless search would find
    for draw in (0.0, 1 - 2**-24):  # the smallest and the largest number that torch.rand gives
        drawn = pick(logits, Sampling(temperature=1.0), torch.full((200,), draw))
        assert ((drawn > 0) & (drawn < 30)).all()


def test_a_stop_token_ends_its_sample_only():
    """Sample i meets the stop at another time; afterwards it yields None, and the stream ends with the last."""
    model = model_of()
    free = tokens_of(model, [1, 2], samples=4, max_tokens=20, temperature=2.0, seed=1)
    stop = free[0][4]
    stopped = tokens_of(model, [1, 2], samples=4, max_tokens=20, temperature=2.0, seed=1, stop=frozenset([stop]))
    assert stopped == [sample[: sample.index(stop)] if stop in sample else sample for sample in free]
    assert len(stopped[0]) == free[0].index(stop) < 20
    assert tokens_of(model, [1, 2], max_tokens=20, temperature=2.0, seed=1, stop=frozenset(range(50))) == [[]]


EVERY = VARIANTS | {letter: {"pattern": letter, "qk_norm": True} for letter in MIXERS}
EVERY |= {"a convolution on the embedding": {"embed_conv": 4}, "loops": {"loops": 2}}


def prompts_of(lengths) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(50) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("variant", EVERY.values(), ids=EVERY.keys())
def test_prompts_of_all_lengths_at_once_are_continued_as_each_alone(variant, monkeypatch):
    """Some longer than the context, some outgrow it, some stop early; in one batch, and in small ones in pieces."""
    model, stop = model_of(**variant), frozenset(range(40, 43))
    prompts = prompts_of([1, 2, 5, 5, 9, 20, 23, 24, 60, 3])
    alone = [tokens_of(model, p, max_tokens=25, temperature=0, stop=stop)[0] for p in prompts]
    assert len(set(map(tuple, alone))) > 4, "the test needs continuations that differ"
    assert complete(model, prompts, Sampling(max_tokens=25, temperature=0), stop=stop) == alone
    monkeypatch.setattr(importlib.import_module("muonlm.engine"), "LOGITS_PER_PIECE", 7 * 3 * 50)
    assert complete(model, prompts, Sampling(max_tokens=25, temperature=0), stop=stop, rows=3) == alone


def test_what_is_drawn_depends_neither_on_batches_nor_on_rows_that_stopped():
    model, prompts = model_of(), prompts_of([3, 8, 5, 12, 8])
    settings = Sampling(max_tokens=10, temperature=1.5, seed=4)
    free = complete(model, prompts, settings, stop=frozenset())
    assert complete(model, prompts, settings, stop=frozenset(), rows=2) == free
    stop = free[1][3]
    stopped = complete(model, prompts, settings, stop=frozenset([stop]))
    assert stopped == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert complete(model, prompts, dataclasses.replace(settings, seed=5), stop=frozenset()) != free


def test_rows_that_stopped_leave_the_batch():
    """The model sees each token that was drawn once, and no stop token."""
    model, sizes = model_of(), []
    prompts = prompts_of([4] * 8)
    free = complete(model, prompts, Sampling(max_tokens=12, temperature=1.5), stop=frozenset())
    stop = frozenset(range(0, 50, 5))
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    lengths = list(map(len, complete(model, prompts, Sampling(max_tokens=12, temperature=1.5), stop=stop)))
    assert len(set(lengths)) > 3, "the test needs rows that stop at different times"
    assert sizes[1:] == [n for t in range(11) if (n := sum(length > t for length in lengths))]
    assert max(map(len, free)) == 12


def test_streamed_pieces_join_to_the_returned_text_and_are_whole_characters():
    """Bytes at random: most are broken UTF-8, and the pieces must still join."""
    model, tokenizer = model_of(vocab_size=257), resolve_tokenizer("byte")
    pieces: list[str] = []
    texts = generate(model, tokenizer, "añ→", samples=2, max_tokens=80, temperature=1.5, on_text=pieces.append)
    assert "".join(pieces) == texts[0] and len(pieces) > 5 and len(texts) == 2
    assert all(pieces)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"samples": 0}, "samples"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_impossible_settings_are_refused_by_their_name(settings, said):
    with pytest.raises(UserError, match=said):
        tokens_of(model_of(), [1], **settings)


def test_a_stop_must_be_one_token():
    with pytest.raises(UserError, match="exactly one"):
        generate(model_of(vocab_size=257), resolve_tokenizer("byte"), "a", stop=["ab"])


def test_bytes_that_are_no_text_are_read_as_the_character_for_such(finished, capsys, monkeypatch):
    """Typed, as Python hands them over, and in a file."""
    for given in ("a\udcffb", "a\ufffdb"):
        assert main(["generate", str(finished), "--prompt", given, "--max-tokens", "2", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second and first["prompt"] == "a\ufffdb"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb"), "utf-8"))
    assert main(["generate", str(finished), "--prompt", "-", "--max-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_A_DEVICE = VARIANTS | {entry.name: {"pattern": entry.letter, "window": 7} for entry in MIXERS.values()}
ON_A_DEVICE |= {"hybrid": {"pattern": "MMMA", "n_layer": 4}, "loops": {"pattern": "AM", "loops": 2, "inject": True}}


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ON_A_DEVICE.values(), ids=ON_A_DEVICE.keys())
@torch.no_grad()
def test_a_device_generates_what_the_cpu_does(device, within, variant):
    """64 greedy tokens, and logits of the whole row at once and token by token, in fp32.

    1e-4 of the largest logit: four layers of weights thrice as large as at first amplify rounding of 1e-7 by a hundred.
    A token may be another only where the CPU's two likeliest are nearer than the two devices' logits.
    """
    small = {"delta_heads": 2, "ssm_head": 16, "block_size": 80}
    model, prompt, number = model_of(**small | variant), [7, 3, 11], 64
    there = copy.deepcopy(model).to(device)
    expected = tokens_of(model, prompt, max_tokens=number, temperature=0)[0]
    row = torch.tensor([prompt + expected])
    theirs, mine = model(row)[0][0], there(row.to(device))[0][0].cpu()
    largest = float(theirs.abs().max())
    error = float((mine - theirs).abs().max())
    within("logits of a whole row", error / largest, 1e-4)
    state, steps = None, []
    for token in row.unbind(1):
        logits, state = there(token[:, None].to(device), state=state)
        steps.append(logits[0, 0].cpu())
    within("logits token by token", float((torch.stack(steps) - theirs).abs().max()) / largest, 1e-4)
    got = tokens_of(there, prompt, max_tokens=number, temperature=0)[0]
    other = next((i for i in range(number) if got[i] != expected[i]), None)
    if other is not None:
        best = theirs[len(prompt) + other - 1].topk(2).values
        within("lead of the CPU's token where the device draws another", float(best[0] - best[1]), 2 * error)


@pytest.mark.cuda
@pytest.mark.parametrize("pattern", ["A", "W", "S", "R", "M", "d", "g"])
def test_prompts_of_any_length_are_completed_on_the_device_as_alone(device, pattern):
    """Padding is masked, rows end at different steps, and the same seed draws what it draws on a CPU."""
    model = model_of(pattern=pattern, window=5, delta_heads=2, ssm_head=16).to(device)
    draw = random.Random(0)
    prompts = [[draw.randrange(50) for _ in range(length)] for length in (3, 17, 1, 9)]
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, max_tokens=12, seed=5)
    found = complete(model, prompts, sampling, stop=frozenset({4}))
    assert found == complete(model, prompts, sampling, stop=frozenset({4}), rows=1)
    assert found == complete(model.cpu(), prompts, sampling, stop=frozenset({4}))

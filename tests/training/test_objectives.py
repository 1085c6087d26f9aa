"""DPO from its definition: loss, gradients, metrics, and the batch that carries pairs. The table of objectives."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from muonlm.cli.main import main
from muonlm.config.schema import ModelConfig
from muonlm.data.batch import IGNORE, Batch
from muonlm.model import build_model
from muonlm.training.objectives import OBJECTIVES, Objective
from muonlm.training.objectives.dpo import DPO, segment_sums
from muonlm.training.objectives.next_token import next_token

T = 24
PAIRS = [[(5, 7), (4, 3)], [(9, 2)], [(6, 6)]]  # tokens of (chosen, rejected), row by row


def make_model(seed: int):
    cfg = ModelConfig(pattern="MA", n_layer=2, d_model=32, n_head=2, vocab_size=40, block_size=T, init="lm")
    return build_model(cfg, torch.device("cpu"), seed).double()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 40, (len(PAIRS), T), generator=generator)
    targets = torch.randint(0, 40, (len(PAIRS), T), generator=generator)
    segments = torch.full_like(inputs, -1)
    for row, pairs in enumerate(PAIRS):
        at = 0
        for number, length in enumerate(n for pair in pairs for n in pair):
            segments[row, at : at + length] = number
            targets[row, at : at + length // 2] = IGNORE  # the prompt
            at += length
        targets[row, at:] = IGNORE
    return Batch(inputs, targets, 4, segments, pairs=True)


def by_hand(model, reference, batch, beta, smoothing=0.0, normalize=False):
    """(losses, margins) of each pair, one segment at a time."""

    def logp(net, row, number):
        where = batch.segments[row] == number
        logits, y = net(batch.inputs[row, where][None])[0][0], batch.targets[row, where]
        found = torch.log_softmax(logits, -1)[torch.arange(len(y))[y >= 0], y[y >= 0]]
        return found.mean() if normalize else found.sum()

    losses, margins = [], []
    for row, pairs in enumerate(PAIRS):
        for j in range(len(pairs)):
            chosen, rejected = (logp(model, row, n) - logp(reference, row, n).detach() for n in (2 * j, 2 * j + 1))
            m = beta * (chosen - rejected)
            losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(m)) - smoothing * torch.log(torch.sigmoid(-m)))
            margins.append(m)
    return torch.stack(losses), torch.stack(margins)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kept", ["cached", "model"])
def test_dpo_is_its_definition(kept, smoothing, normalize):
    model, reference, batch = make_model(1), make_model(2), make_batch()
    objective = DPO(0.3, smoothing, normalize, reference if kept == "model" else None)
    if kept == "cached":
        with torch.no_grad():
            batch.reference = segment_sums(reference, batch)
    loss, count, metrics = objective(model, batch)
    losses, margins = by_hand(model, reference, batch, 0.3, smoothing, normalize)
    assert count == 4 and torch.allclose(loss, losses.sum(), rtol=1e-10)
    assert metrics["acc"] == (margins > 0).sum() and torch.allclose(metrics["margin"], margins.sum(), rtol=1e-9)
    assert torch.allclose(metrics["chosen"] - metrics["rejected"], margins.sum(), rtol=1e-9)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    assert all(p.grad is None for p in reference.parameters())
    model.zero_grad()
    losses.sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-11, rtol=1e-8) for a, p in zip(ours, model.parameters()))


def test_the_first_loss_is_ln_2_exactly_and_a_tie_is_half_right():
    model, batch = make_model(1), make_batch()
    loss, count, metrics = DPO(0.1, reference=model)(model, batch)
    assert loss.item() / count == math.log(2) and metrics["acc"] == count / 2 and metrics["margin"] == 0


def test_prompts_and_padding_do_not_touch_the_loss():
    model, reference, batch = make_model(1), make_model(2), make_batch()
    before = DPO(0.1, reference=reference)(model, batch)[0]
    tail = batch.segments < 0
    batch.inputs = torch.where(tail, 7, batch.inputs)
    assert DPO(0.1, reference=reference)(model, batch)[0] == before
    batch.targets = torch.where(batch.targets == IGNORE, -5, batch.targets)
    with pytest.raises(IndexError):  # torch itself: only IGNORE is ignored
        DPO(0.1, reference=reference)(model, batch)


def test_micro_batches_of_pairs_add_up_to_the_whole():
    model, reference, batch = make_model(1), make_model(2), make_batch()
    with torch.no_grad():
        batch.reference = segment_sums(reference, batch)
    whole = DPO(0.1)(model, batch)
    parts = [DPO(0.1)(model, part) for part in batch.split(1)]
    assert [count for _, count, _ in parts] == [2, 1, 1] == [len(p) for p in PAIRS]
    assert torch.allclose(sum(loss for loss, _, _ in parts), whole[0], rtol=1e-12)
    assert batch.tokens == sum(part.tokens for part in batch.split(1)) == int((batch.targets >= 0).sum())


def test_sft_is_the_loss_of_the_trained_tokens_alone():
    model, batch = make_model(1), make_batch()
    batch = Batch(batch.inputs, batch.targets, int((batch.targets >= 0).sum()), batch.segments)
    loss, count, _ = next_token(model, batch)
    logits, _ = model(batch.inputs, segments=batch.segments)
    kept = batch.targets >= 0
    assert count == kept.sum() and torch.allclose(
        loss, F.cross_entropy(logits[kept], batch.targets[kept], reduction="sum")
    )
    assert sum(part.count for part in batch.split(2)) == count


TOY = """
import torch

def likelihood_of_the_same(model, batch):
    # the input again, in place of the next token
    copied = torch.where(batch.targets >= 0, batch.inputs, batch.targets)
    return model(batch.inputs, copied, segments=batch.segments), batch.count, {"half": torch.tensor(batch.count / 2)}

def twice(means, count):
    return {"twice": 2 * means["loss"], "number": int(count)}
"""


def test_a_new_objective_is_one_file_and_one_line_of_the_table(smoke, tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_objective.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    metrics = {"half": "half {:.2f}"}
    line = Objective(
        "toy_objective:likelihood_of_the_same", "text", metrics=metrics, report="toy_objective:twice", unit="copy"
    )
    monkeypatch.setitem(OBJECTIVES, "copy", line)
    assert main(["info", "quickstart", "--train.objective", "copy", "--json"]) == 0
    capsys.readouterr()
    assert main(smoke(tmp_path / "run", "--train.objective", "copy", "--train.steps", "30")) == 0
    told = capsys.readouterr().out
    assert "half 0.50" in told and "nats per copy" in told
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["val_twice"] == 2 * report["val_loss"] and report["val_number"] > 0 and report["val_half"] == 0.5
    assert report["val_loss"] < 1 < report["val_bpb"] + 1  # copying is learned in no time
    assert main(["train", "quickstart", "--train.objective", "copie", "--dry-run"]) == 2
    assert "'copy'" in capsys.readouterr().err

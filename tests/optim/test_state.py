"""State of torch.optim.Muon taken over: a run that changes its optimizer half way ends where the unbroken run ends."""

import pytest
import torch
from torch import nn

from muonlm.errors import UserError
from muonlm.optim import Muon, load_torch_state

ADAM = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def net() -> nn.ParameterDict:
    draw = torch.Generator().manual_seed(0)
    shapes = {"square": (16, 16), "tall": (32, 16), "wide": (16, 32), "gain": (16,)}
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()})


def split(model: nn.ParameterDict) -> tuple[list, list]:
    return [(n, p) for n, p in model.items() if p.ndim == 2], [(n, p) for n, p in model.items() if p.ndim < 2]


def torchs(model: nn.ParameterDict) -> list[torch.optim.Optimizer]:
    matrices, rest = split(model)
    muon = torch.optim.Muon([p for _, p in matrices], lr=0.02, weight_decay=0.1, momentum=0.9)
    return [muon, torch.optim.AdamW([p for _, p in rest], fused=True, **ADAM)]


def ours(model: nn.ParameterDict, **options) -> Muon:
    matrices, rest = split(model)
    groups = [
        {"params": matrices, "use_muon": True, "name": "matrices", "lr": 0.02, "weight_decay": 0.1},
        {"params": rest, "use_muon": False, "name": "rest", **ADAM},
    ]
    return Muon(groups, momentum=0.9, **options)


def run(model: nn.ParameterDict, optimizers: list, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in model.values():
            p.grad = (0.3 * p.detach() + torch.randn(p.shape, generator=draw)).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()


def test_a_run_of_torch_that_moves_to_muon_ends_where_it_would_have_ended():
    whole, moved = net(), net()
    run(whole, torchs(whole), range(6))
    olds = torchs(moved)
    run(moved, olds, range(3))
    optimizer = ours(moved, compat="torch")
    load_torch_state(optimizer, *olds, step=3)
    run(moved, [optimizer], range(3, 6))
    assert optimizer.param_groups[0]["step"] == 6
    assert all(torch.equal(p, whole[name]) for name, p in moved.items())
    forgetful = net()
    run(forgetful, torchs(forgetful), range(3))
    run(forgetful, [ours(forgetful, compat="torch")], range(3, 6))
    assert not torch.equal(forgetful["square"], whole["square"])


def test_what_was_taken_over_is_a_copy_in_the_precision_of_its_new_owner():
    model = net().bfloat16()
    olds = torchs(model)
    run(model, olds, range(2))
    optimizer = ours(model, variant="normuon")
    load_torch_state(optimizer, *olds, step=2)
    old, new = olds[0].state[model["tall"]]["momentum_buffer"], optimizer.state[model["tall"]]["momentum_buffer"]
    assert old.dtype == torch.bfloat16 and new.dtype == torch.float32 and torch.equal(old.float(), new)
    assert optimizer.state[model["gain"]]["exp_avg"] is not olds[1].state[model["gain"]]["exp_avg"]
    run(model, [optimizer], range(2, 4))
    assert torch.equal(old, olds[0].state[model["tall"]]["momentum_buffer"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda olds, model: olds[:1], "parameter gain is in none of the optimizers given"),
        (lambda olds, model: [torch.optim.AdamW(model.values())], "parameter square was trained with step, exp_avg"),
    ],
)
def test_state_that_does_not_fit_is_refused_before_anything_is_changed(change, message):
    model = net()
    olds = change(torchs(model), model)
    run(model, olds, range(1))
    optimizer = ours(model)
    with pytest.raises(UserError, match=message):
        load_torch_state(optimizer, *olds, step=1)
    assert not optimizer.state
    with pytest.raises(UserError, match='use momentum_form="ema"'):
        load_torch_state(ours(model, momentum_form="classical"), *torchs(model), step=1)

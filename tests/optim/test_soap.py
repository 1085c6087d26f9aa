"""SOAP against its equations written out in fp64, and as an entry of the table: trained, resumed, refused by name."""

import json

import pytest
import torch
from torch import nn

from muonlm.cli.main import main
from muonlm.errors import UserError
from muonlm.optim import SOAP, build_optimizer, load_named_state, named_state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 24)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)
        self.lm_head = nn.Linear(24, 40, bias=False)


def feed(params, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (0.3 * p.detach() + torch.randn(p.shape, generator=draw)).to(p.dtype)


def naive(W, gradients, bases, lr, wd, b1, b2, eps, frequency):
    """Algorithm 3 of the paper, a line an equation. The first gradient only gives L, R and the `bases`."""
    W, (QL, QR) = W.double(), (Q.double() for Q in bases)
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    G = gradients[0](W.float()).double()
    L, R = (1 - b2) * G @ G.T, (1 - b2) * G.T @ G
    for t, gradient in enumerate(gradients[1:], 1):
        G = gradient(W.float()).double()
        M = b1 * M + (1 - b1) * G
        V = b2 * V + (1 - b2) * (QL.T @ G @ QR) ** 2
        N = (QL.T @ (M / (1 - b1**t)) @ QR) / ((V / (1 - b2**t)).sqrt() + eps)
        W = W - lr * wd * W - lr * (QL @ N @ QR.T)
        L, R = b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G
        if t % frequency == 0:
            QL, QR = torch.linalg.qr(L @ QL).Q, torch.linalg.qr(R @ QR).Q
    return W


@pytest.mark.parametrize("shape", [(16, 16), (24, 12), (12, 24)])
def test_a_few_steps_are_those_of_the_equations(shape):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    noise = [torch.randn(shape, generator=draw) for _ in range(8)]
    gradients = [lambda W, n=n: 0.3 * W + n for n in noise]
    p = nn.Parameter(start.clone())
    optimizer = SOAP([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, frequency=3)
    for i, gradient in enumerate(gradients):
        p.grad = gradient(p.detach())
        optimizer.step()
        if i == 0:  # of a matrix that is not square one side is singular: its null space has no one basis
            bases = [optimizer.state[p][side].clone() for side in ("left_basis", "right_basis")]
            L, basis = optimizer.state[p]["left"], bases[0]
            assert torch.equal(p, start) and torch.allclose(
                basis.T @ L @ basis, torch.linalg.eigvalsh(L).flip(0).diag(), atol=1e-5
            )
    exact = naive(start, gradients, bases, 0.01, 0.1, 0.9, 0.95, 1e-8, 3)
    still = naive(start, gradients, bases, 0.01, 0.1, 0.9, 0.95, 1e-8, 1000)
    assert (p.double() - exact).norm() <= 1e-4 * (exact - start).norm()
    assert (still - exact).norm() > 0.05 * (exact - start).norm()  # the turns of the basis matter


def test_stacked_experts_are_trained_one_by_one():
    draw = torch.Generator().manual_seed(0)
    start, grads = torch.randn(3, 12, 8, generator=draw), torch.randn(4, 3, 12, 8, generator=draw)
    stack, alone = nn.Parameter(start.clone()), [nn.Parameter(x.clone()) for x in start]
    together, apart = SOAP([stack], frequency=2), SOAP(alone, frequency=2)
    for G in grads:
        stack.grad = G.clone()
        for p, g in zip(alone, G):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]), rtol=0, atol=1e-5)


def test_what_is_no_hidden_matrix_is_trained_by_adam_to_the_bit():
    mine, theirs = Net(), Net()
    optimizer = build_optimizer(mine, name="soap", lr=0.01, wd=0.1)
    adamw = build_optimizer(theirs, name="adamw", lr=0.01, wd=0.1)
    for step in range(5):
        for model, one in ((mine, optimizer), (theirs, adamw)):
            feed(model.parameters(), step)
            one.step()
    same = {name for name, p in mine.named_parameters() if torch.equal(p, theirs.get_parameter(name))}
    # the draws of a step follow one another, so all gradients agree only while no matrix before them differs in shape
    assert same == {"embed.weight", "lm_head.weight", "up.bias", "down.bias"}
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "decay", "no_decay"]


def test_state_by_name_resumes_to_the_bit_and_is_fp32_for_16_bit_weights():
    whole, first, again = (Net().bfloat16() for _ in range(3))
    optimizers = [build_optimizer(model, name="soap", lr=0.01, frequency=2) for model in (whole, first, again)]
    for step in range(6):
        feed(whole.parameters(), step)
        optimizers[0].step()
    for step in range(3):
        feed(first.parameters(), step)
        optimizers[1].step()
    again.load_state_dict(first.state_dict())
    load_named_state(optimizers[2], again, *named_state(optimizers[1], first))
    for step in range(3, 6):
        feed(again.parameters(), step)
        optimizers[2].step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    assert {t.dtype for t in optimizers[2].state[again.up.weight].values()} == {torch.float32}


def test_a_run_is_trained_through_the_loop(smoke, tmp_path):
    """Resumed to the bit: test_loop.py."""
    flags = ["--optim.name", "soap", "--optim.lr", "3e-3", "--soap.frequency", "2"]
    assert main(smoke(tmp_path / "run", *flags)) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert steps[0]["lr_soap"] == pytest.approx(3e-3) and "lr_muon" not in steps[0] and "momentum" not in steps[0]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2  # 6 steps


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(UserError, match='`name` = "soap" runs on one process: start it without torchrun'):
        build_optimizer(Net(), name="soap", lr=0.01, process_group="world")
    with pytest.raises(UserError, match="`frequency` = 0 is no number of steps"):
        build_optimizer(Net(), name="soap", lr=0.01, frequency=0)
    model = Net()
    _, meta = named_state(build_optimizer(model, name="adamw", lr=0.01), model)
    with pytest.raises(UserError, match="holds AdamW state, this run uses SOAP; resume with the same `name`"):
        load_named_state(build_optimizer(model, name="soap", lr=0.01), model, {}, meta)

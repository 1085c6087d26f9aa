"""Converting: lr and weight decay between lr modes, and state between our Muon and five other projects' layouts.

The foreign states are real: torch.optim.Muon and torch.optim.AdamW run, and for the others a few lines from their equations that
keep state as they do, ranks included. A run that changes its optimizer half way must end where the unbroken run ends.
"""

import json
import math
import shlex
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from muonlm.cli.main import main
from muonlm.errors import UserError
from muonlm.optim import Muon
from muonlm.optim.rates import MODES, convert_lr, from_muonlm, parameter_names, to_muonlm

MU, LR, WD, ADAM = 0.9, 0.02, 0.1, {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
MATRICES = ("down.weight", "a.weight", "up.weight", "b.weight", "c.weight")
REST = ("gain", "embed.weight")  # 16 elements: on every rank of nanochat; 2048: sharded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.gain = nn.Parameter(torch.ones(16))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def gradients(model: nn.Module, step: int) -> None:
    """They depend on the weights, so an error in one step is carried on; full rank, so Newton-Schulz is well conditioned."""
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=draw)


def run(model: nn.Module, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        gradients(model, step)
        for optimizer in optimizers:
            optimizer.step()


# --- the other projects, from their equations -----------------------------------------------------------------------------------


def polar(U):
    """Keller's five steps in fp32."""
    X = U.mT if U.shape[0] > U.shape[1] else U
    X = X / X.norm()
    for _ in range(5):
        R = X @ X.mT
        X = 3.4445 * X + (-4.7750 * R + 2.0315 * R @ R) @ X
    return X.mT if U.shape[0] > U.shape[1] else X


def adam(p, g, m, v, t, group, write=True):
    b1, b2 = group["betas"]
    m.lerp_(g, 1 - b1)
    v.lerp_(g * g, 1 - b2)
    if write:
        p.sub_(group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


def zeros(state, like, *keys):
    for key in keys:
        state.setdefault(key, torch.zeros_like(like))
    return [state[key] for key in keys]


class Foreign(Optimizer):
    """rank, world: the ranks of one run share the parameters, which saves the all-gather; each has a state of its own."""

    def __init__(self, groups, rank=0, world=1):
        self.rank, self.world = rank, world
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.update(group)


class Keller(Foreign):
    def update(self, group):
        for i, p in enumerate(group["params"]):
            if not group["use_muon"]:
                m, v = zeros(self.state[p], p, "exp_avg", "exp_avg_sq")
                t = self.state[p]["step"] = self.state[p].get("step", 0) + 1
                adam(p, p.grad, m, v, t, group, write=self.rank == 0)
            elif i % self.world == self.rank:
                (M,) = zeros(self.state[p], p, "momentum_buffer")
                M.lerp_(p.grad, 1 - group["momentum"])
                A, B = p.shape
                O = polar(p.grad.lerp(M, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * max(1, A / B) ** 0.5 * O)


class Moonlight(Foreign):
    def __init__(self, groups):
        super().__init__([{**groups[0], "params": groups[0]["params"] + groups[1]["params"], "adamw": ADAM}])
        for p in self.param_groups[0]["params"]:
            self.state[p]["use_muon"] = any(p is q for q in groups[0]["params"])

    def update(self, group):
        for p in group["params"]:
            state, mu = self.state[p], group["momentum"]
            if state["use_muon"]:
                (C,) = zeros(state, p, "momentum_buffer")
                C.mul_(mu).add_(p.grad)
                O = polar(p.grad + mu * C)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(0.2 * max(p.shape) ** 0.5 * group["lr"] * O)
            else:
                m, v = zeros(state, p, "moment1", "moment2")
                state["step"] = state.get("step", 0) + 1
                adam(p, p.grad, m, v, state["step"], group["adamw"])


class Dion(Foreign):
    def update(self, group):
        group["step"] += 1
        for p in group["params"]:
            if group["algorithm"] == "adamw":
                m, v = zeros(self.state[p], p, "momentum", "variance")
                adam(p, p.grad, m, v, group["step"], group)
            else:
                (C,) = zeros(self.state[p], p, "momentum")
                C.mul_(group["mu"]).add_(p.grad)  # nesterov off, as by default
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    group["lr"] * (p.shape[0] / p.shape[1]) ** 0.5 * polar(C)
                )


class Nanochat(Foreign):
    """Keeps the second momentum and, unlike nanochat, does not divide by it: this is about where things are."""

    def update(self, group):
        params, state = group["params"], self.state[group["params"][0]]
        if group["kind"] == "muon":
            A, B = params[0].shape
            rows = math.ceil(len(params) / self.world)
            state.setdefault("momentum_buffer", torch.zeros(rows, A, B))
            state.setdefault("second_momentum_buffer", torch.zeros((rows, A, 1) if A >= B else (rows, 1, B)))
            for i, p in enumerate(params[self.rank * rows : (self.rank + 1) * rows]):
                M, v = state["momentum_buffer"][i], state["second_momentum_buffer"][i]
                M.lerp_(p.grad, 1 - group["momentum"])
                O = polar(p.grad.lerp(M, group["momentum"]))
                v.lerp_((O * O).mean(-1 if A >= B else -2, keepdim=True), 1 - group["beta2"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * max(1, A / B) ** 0.5 * O)
            return
        for p in params:
            shard = slice(None)
            if self.world > 1 and p.numel() >= 1024:
                shard = slice(self.rank * len(p) // self.world, (self.rank + 1) * len(p) // self.world)
            m, v = zeros(self.state[p], p[shard], "exp_avg", "exp_avg_sq")
            t = self.state[p]["step"] = self.state[p].get("step", 0) + 1
            adam(p[shard], p.grad[shard], m, v, t, group, write=shard != slice(None) or self.rank == 0)


def foreign(layout: str, model: Net, world: int = 1) -> list[Optimizer]:
    """The optimizers of one run: one for each rank, and for torch one for the matrices and one for the rest."""
    of = dict(model.named_parameters())
    matrices, rest = [of[n] for n in MATRICES], [of[n] for n in REST]
    muon = {"params": matrices, "lr": LR, "weight_decay": WD}
    if layout == "torch":
        return [
            torch.optim.Muon(matrices, lr=LR, weight_decay=WD, momentum=MU),
            torch.optim.AdamW(rest, weight_decay=0.0, fused=True, **ADAM),
        ]
    if layout == "keller":
        by_size = sorted(matrices, key=lambda p: p.size(), reverse=True)  # as its distributed class does
        groups = [
            {"params": rest, "use_muon": False, **ADAM},
            {**muon, "params": by_size, "use_muon": True, "momentum": MU},
        ]
        return [Keller(groups, rank, world) for rank in range(world)]
    if layout == "moonlight":
        return [Moonlight([{**muon, "momentum": MU}, {"params": rest}])]
    if layout == "dion":
        shared = {"mu": MU, "step": 0}
        return [
            Dion([{**muon, "algorithm": "muon", **shared}, {"params": rest, "algorithm": "adamw", **shared, **ADAM}])
        ]
    shapes = {p.shape: [q for q in matrices if q.shape == p.shape] for p in matrices}
    groups = [{"params": rest, "kind": "adamw", **ADAM}]
    groups += [{**muon, "params": params, "kind": "muon", "momentum": MU, "beta2": 0.9} for params in shapes.values()]
    return [Nanochat(groups, rank, world) for rank in range(world)]


MODE = {"moonlight": "match_rms_adamw", "dion": "spectral"}


def ours(layout: str, model: Net, wd: float = WD, **options) -> Muon:
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(n, p) for n, p in named if n in REST],
            "use_muon": False,
            "name": "rest",
            "weight_decay": 0.0,
            **ADAM,
        },
        {
            "params": [(n, p) for n, p in named if n in MATRICES],
            "use_muon": True,
            "name": "matrices",
            "lr": LR,
            "weight_decay": wd,
        },
    ]
    numbers = {"compat": "torch"} if layout == "torch" else {"coefficients": "keller", "ns_dtype": "float32"}
    return Muon(
        groups, momentum=MU, nesterov=layout != "dion", lr_mode=MODE.get(layout, "original"), **(numbers | options)
    )


def saved(optimizers: list[Optimizer], path) -> list[dict]:
    """Through files, as with a real checkpoint."""
    dicts = []
    for optimizer in optimizers:
        torch.save(optimizer.state_dict(), path / "state.pt")
        dicts.append(torch.load(path / "state.pt", weights_only=True))
    return dicts


def read(layout: str, model: Net, optimizers: list[Optimizer], dicts: list[dict]) -> dict:
    if layout == "torch":
        names = [parameter_names(optimizer, model) for optimizer in optimizers]
        return to_muonlm(dicts[0], "torch", model, names=names[0]) | to_muonlm(dicts[1], "torch", model, names=names[1])
    return to_muonlm(dicts, layout, model, names=parameter_names(optimizers[0], model))


def apart(one: Net, other: Net) -> float:
    """Largest distance of a tensor, as a share of the way it went from the common start."""
    start = dict(net().named_parameters())
    others = dict(other.named_parameters())
    return max(((p - others[n]).norm() / (p - start[n]).norm()).item() for n, p in one.named_parameters())


# Newton-Schulz multiplies rounding in the small singular directions by up to 485, so fp32's 6e-8 could become 3e-5; seen: 6e-7 after
# six steps. torch's own bf16 is compared bit for bit. A run that loses its state is 0.4 away: `lost` below.
NEAR = 1e-5
CASES = [
    ("torch", 1),
    ("keller", 1),
    ("keller", 3),
    ("moonlight", 1),
    ("dion", 1),
    ("nanochat", 1),
    ("nanochat", 2),
    ("nanochat", 4),
]


@pytest.mark.filterwarnings("ignore:the 'muonlm' target has no place for .*second_momentum")  # nanochat's; see below
@pytest.mark.parametrize("layout, world", CASES)
def test_a_run_that_moves_to_muonlm_ends_where_it_would_have_ended(layout, world, tmp_path):
    unbroken, moved, lost = net(), net(), net()
    run(unbroken, foreign(layout, unbroken, world), range(12))
    before = foreign(layout, moved, world)
    run(moved, before, range(6))
    lost.load_state_dict(moved.state_dict())
    state = read(layout, moved, before, saved(before, tmp_path))
    after = ours(layout, moved)
    after.load_state_dict(from_muonlm(state, "muonlm", moved, after))
    run(moved, [after], range(6, 12))
    run(lost, [ours(layout, lost)], range(6, 12))
    assert apart(unbroken, moved) <= (0.0 if layout == "torch" else NEAR)
    assert apart(unbroken, lost) > 0.1


@pytest.mark.parametrize("layout, world", CASES)
def test_a_run_that_leaves_muonlm_ends_where_it_would_have_ended(layout, world):
    unbroken, moved = net(), net()
    run(unbroken, [ours(layout, unbroken)], range(12))
    before = ours(layout, moved)
    run(moved, [before], range(6))
    state = to_muonlm(before, "muonlm", moved)
    after = foreign(layout, moved, world)
    if world > 1:
        for optimizer, part in zip(after, from_muonlm(state, layout, moved, after[0], ranks=world), strict=True):
            optimizer.load_state_dict(part)
    else:
        for optimizer in after:
            optimizer.load_state_dict(from_muonlm(state, layout, moved, optimizer))
    run(moved, after, range(6, 12))
    assert apart(unbroken, moved) <= (0.0 if layout == "torch" else NEAR)


@pytest.mark.parametrize("layout, world", CASES)
def test_there_and_back_again_changes_no_tensor_by_more_than_one_ulp(layout, world, tmp_path):
    model = net()
    optimizers = foreign(layout, model, world)
    run(model, optimizers, range(3))
    dicts = saved(optimizers, tmp_path)
    state = read(layout, model, optimizers, dicts)
    if world > 1:
        back = from_muonlm(state, layout, model, optimizers[0], ranks=world)
    else:
        back = [from_muonlm(state, layout, model, optimizer) for optimizer in optimizers]
    steps = (
        0 if layout not in ("moonlight", "dion") else 1
    )  # EMA layouts are copied, classical ones are multiplied and divided
    for old, new in zip(dicts, back, strict=True):
        assert old["param_groups"] == new["param_groups"] and old["state"].keys() == new["state"].keys()
        for index, entry in old["state"].items():
            assert entry.keys() == new["state"][index].keys()
            for key, value in entry.items():
                other = new["state"][index][key]
                if isinstance(value, torch.Tensor) and value.ndim:
                    # neighbouring floats are neighbouring integers
                    assert (value.view(torch.int32).long() - other.view(torch.int32).long()).abs().max() <= steps, key
                else:
                    assert value == other, key


def test_the_factor_of_the_classical_form_is_one_minus_mu_to_the_last_bit():
    model, mu = net(), 0.95
    optimizer = foreign("moonlight", model)[0]
    run(model, [optimizer], range(2))
    state = to_muonlm(optimizer, "moonlight", model, momentum=mu)
    for name in MATRICES:
        exact = optimizer.state[model.get_parameter(name)]["momentum_buffer"].double() * (1 - mu)
        assert torch.equal(state[name]["momentum_buffer"], exact.float())
    again = from_muonlm(state, "moonlight", model, optimizer, momentum=mu)["state"]
    for index, name in enumerate(MATRICES):
        exact = state[name]["momentum_buffer"].double() / (1 - mu)
        assert torch.equal(again[index]["momentum_buffer"], exact.float())
        assert state[name].keys() == {"momentum_buffer"}
    assert {key: value.shape for key, value in state["gain"].items()} == {
        "exp_avg": (16,),
        "exp_avg_sq": (16,),
        "step": (),
    }


def test_what_was_read_is_a_copy():
    model = net()
    optimizers = foreign("keller", model)
    run(model, optimizers, range(1))
    state = to_muonlm(optimizers[0], "keller", model)
    old = {n: {k: v.clone() for k, v in entry.items()} for n, entry in state.items()}
    after = ours("keller", model)
    after.load_state_dict(from_muonlm(state, "muonlm", model, after))
    run(model, [*optimizers, after], range(1, 3))
    assert all(torch.equal(old[n][k], state[n][k]) for n in state for k in state[n])


def test_a_classical_muonlm_group_is_read_and_written_in_its_own_form():
    model = net()
    optimizer = ours("keller", model)
    run(model, [optimizer], range(2))
    ema, source = to_muonlm(optimizer, "muonlm", model), optimizer.state_dict()
    for group in source["param_groups"]:
        if group["use_muon"]:
            group["momentum_form"] = "classical"
    classical = from_muonlm(ema, "muonlm", model, source, names=parameter_names(optimizer, model))
    index = parameter_names(optimizer, model).index("a.weight")
    ratio = classical["state"][index]["momentum_buffer"] / ema["a.weight"]["momentum_buffer"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / (1 - MU)))
    again = to_muonlm(classical, "muonlm", model, names=parameter_names(optimizer, model))
    torch.testing.assert_close(
        again["a.weight"]["momentum_buffer"], ema["a.weight"]["momentum_buffer"], rtol=2e-7, atol=0
    )


def test_the_step_goes_where_each_layout_counts_it():
    model = net()
    dion = foreign("dion", model)[0]
    run(model, [dion], range(7))
    state = to_muonlm(dion, "dion", model)
    after = ours("dion", model)
    after.load_state_dict(from_muonlm(state, "muonlm", model, after))
    assert [g["step"] for g in after.param_groups if g["use_muon"]] == [7]  # a momentum schedule goes on from here
    assert after.state[model.gain]["step"] == 7
    torch_muon = foreign("torch", model)
    run(model, torch_muon, range(2))
    state = read("torch", model, torch_muon, [o.state_dict() for o in torch_muon])
    target = from_muonlm(state, "muonlm", model, after, step=2)  # torch.optim.Muon does not count
    assert [g["step"] for g in target["param_groups"] if g["use_muon"]] == [2]


def test_low_precision_buffers_are_widened_and_come_back_exactly():
    model = net().to(torch.bfloat16)
    optimizers = foreign("dion", model)
    run_bf16 = {n: torch.randn(p.shape).bfloat16() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        optimizers[0].state[p] = {"momentum": run_bf16[n]} | ({"variance": run_bf16[n].abs()} if n in REST else {})
    state = to_muonlm(optimizers[0], "dion", model)
    assert all(v.dtype == torch.float32 for entry in state.values() for v in entry.values())
    optimizers[0].load_state_dict(from_muonlm(state, "dion", model, optimizers[0]))
    assert all(torch.equal(optimizers[0].state[p]["momentum"], run_bf16[n]) for n, p in model.named_parameters())


def test_shards_of_a_list_of_ranks_are_put_together_in_rank_order():
    model = net()
    dion = foreign("dion", model)[0]
    run(model, [dion], range(2))
    whole, names = dion.state_dict(), parameter_names(dion, model)
    cut = (5, 16 - 5)  # uneven, as FSDP2 leaves them for sizes that the ranks do not divide
    ranks = [{"param_groups": whole["param_groups"], "state": {}} for _ in cut]
    for index, entry in whole["state"].items():
        for rank, at in zip(ranks, (0, 1), strict=True):
            rank["state"][index] = {k: v.split([5, len(v) - 5])[at] for k, v in entry.items()}
    state, expected = to_muonlm(ranks, "dion", model, names=names), to_muonlm(dion, "dion", model)
    assert all(torch.equal(state[n][k], expected[n][k]) for n in expected for k in expected[n])
    with pytest.raises(UserError, match="all ranks"):
        to_muonlm(ranks[:1], "dion", model, names=names)


def test_a_flattened_convolution_of_moonlight_gets_its_shape_back_and_loses_it_again():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False))
    p = model[0].weight
    source = {
        "state": {0: {"use_muon": True, "momentum_buffer": torch.randn(8, 36)}},
        "param_groups": [{"params": [0], "momentum": 0.5}],
    }
    state = to_muonlm(source, "moonlight", model, names=["0.weight"])
    assert torch.equal(state["0.weight"]["momentum_buffer"], 0.5 * source["state"][0]["momentum_buffer"].view_as(p))
    back = from_muonlm(state, "moonlight", model, source, names=["0.weight"])
    assert torch.equal(back["state"][0]["momentum_buffer"], source["state"][0]["momentum_buffer"])


def test_names_in_the_file_are_used_whether_torch_or_the_distributed_checkpoint_put_them_there():
    model = net()
    muon = torch.optim.Muon([(n, p) for n, p in model.named_parameters() if n in MATRICES])
    run(model, [muon], range(1))
    state = to_muonlm(muon.state_dict(), "torch", model)  # param_names
    plain = muon.state_dict()
    names = [n for g in plain["param_groups"] for n in g.pop("param_names")]
    by_name = {
        "state": {names[i]: v for i, v in plain["state"].items()},
        "param_groups": [{**plain["param_groups"][0], "params": names}],
    }
    other = to_muonlm(by_name, "torch", model)
    assert state.keys() == other.keys() == set(MATRICES)
    assert all(torch.equal(state[n]["momentum_buffer"], other[n]["momentum_buffer"]) for n in state)
    assert torch.equal(state["up.weight"]["momentum_buffer"], muon.state[model.up.weight]["momentum_buffer"])


# --- momentum schedules ---------------------------------------------------------------------------------------------------------

SCHEDULE = [(0, 0.5), (10, 0.9)]


@pytest.mark.parametrize("step, moving", [(0, True), (5, True), (40, True), (200, False)])
def test_a_schedule_is_warned_about_once_and_only_while_it_matters(step, moving):
    """At mu = 0.9, 50 steps of constant momentum leave e^-5 of what came before: from step 60 on there is nothing to say."""
    model = net()
    optimizer = foreign("moonlight", model)[0]
    run(model, [optimizer], range(1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state = to_muonlm(optimizer, "moonlight", model, momentum=SCHEDULE, step=step)
    assert len(seen) == moving and all("under a schedule" in str(w.message) and w.filename == __file__ for w in seen)
    mu = 0.5 + 0.4 * min(step, 10) / 10
    C = optimizer.state[model.a.weight]["momentum_buffer"]
    torch.testing.assert_close(state["a.weight"]["momentum_buffer"], C * (1 - mu))


def test_the_schedule_of_a_muonlm_run_is_seen_without_being_told():
    model = net()
    optimizer = ours("keller", model, momentum_schedule=SCHEDULE)
    run(model, [optimizer], range(4))
    source, names = optimizer.state_dict(), parameter_names(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_muonlm(source, "muonlm", model, names=names)  # EMA to EMA is a copy: nothing is approximate
    for group in source["param_groups"]:
        if group["use_muon"]:
            group["momentum_form"] = "classical"
    with pytest.warns(UserWarning, match="now 0.66"):  # the mu of step 4, the next one
        to_muonlm(source, "muonlm", model, names=names)


# --- mistakes -------------------------------------------------------------------------------------------------------------------


def without(dicts, *indices):
    for d in dicts:
        for index in indices:
            d["state"].pop(index, None)
    return dicts


def twisted(dicts):
    dicts[1]["state"][0]["exp_avg"] += 1
    return dicts


def later(dicts):
    dicts[2]["state"][0]["step"] += 1
    return dicts


def stacked_wrong(dicts):
    return dicts[::-1]


FILES = [  # layout, ranks, what is done to the list of state dicts, options, fragments of the answer
    ("keler", 1, None, {}, "unknown layout 'keler'", "'keller'"),
    ("keller", 1, lambda d: without(d, 3), {}, "no momentum_buffer for 'down.weight'", "fresh=['down.weight']"),
    ("keller", 3, lambda d: d[:2], {}, "no rank's state dict has momentum_buffer for 'a.weight'", "all ranks (2 given)"),
    ("keller", 3, twisted, {}, "different exp_avg for 'gain'", "one step of one run"),
    ("keller", 3, later, {}, "at different steps of 'gain': [3.0, 4.0]", "one step of one run"),
    ("keller", 1, None, {"names": None}, "holds no names", "names=parameter_names(old_optimizer, model)"),
    ("keller", 1, None, {"names": [*REST, *MATRICES]}, "momentum_buffer for 'down.weight' has shape (32, 16), expected (16, 32)", "sort by size"),
    ("keller", 1, None, {"names": list(MATRICES)}, "names has 5 entries, the groups hold 7", "parameter_names(old_optimizer, model)"),
    ("keller", 1, None, {"names": [*REST, "up.wieght", *MATRICES[1:]]}, "no parameter 'up.wieght'", "'up.weight'"),
    ("keller", 1, None, {"names": ["gain"] * 7}, "'gain' is named twice", "once"),
    ("keller", 1, lambda d: [{"model": {}, "optimizer": d[0]}], {}, "no state or param_groups", "torch.load(path)['optimizer']"),
    ("keller", 1, lambda d: [], {}, "no state dict to read", "one for each rank"),
    ("moonlight", 1, lambda d: without(d, 0), {}, "'down.weight' does not say use_muon", "whole state dicts"),
    ("moonlight", 1, lambda d: d[0]["param_groups"][0].pop("momentum") and d, {}, "does not hold 'momentum'", "momentum=0.95"),
    ("moonlight", 1, None, {"momentum": 95}, "momentum=95", "[0, 1)"),
    ("moonlight", 1, None, {"momentum": SCHEDULE}, "momentum is a schedule", "step=N"),
    ("dion", 1, lambda d: d[0]["param_groups"][0].update(algorithm="lion") or d, {}, "algorithm = 'lion'", "adamw only"),
    ("dion", 1, lambda d: d[0]["param_groups"][1].pop("step") and d, {}, "no step for 'gain'", "whole state dict"),
    ("nanochat", 2, lambda d: d[:1], {}, "has 64 of 128 rows", "in rank order (1 given)"),
    ("nanochat", 2, stacked_wrong, {}, "padding behind momentum_buffer of 'down.weight' is not zero", "rank 0 first"),
    ("nanochat", 2, lambda d: [d[0], without(d[1:], 2)[0]], {}, "momentum_buffer of 'down.weight' in state dict 1 should stack 1", "all ranks"),
]  # fmt: skip


@pytest.mark.parametrize("layout, world, damage, options, what, fix", FILES, ids=[f"{c[0]}-{c[4]}" for c in FILES])
def test_a_file_that_does_not_fit_is_answered_with_the_tensor_and_the_remedy(
    layout, world, damage, options, what, fix, tmp_path
):
    model = net()
    optimizers = foreign("keller" if layout == "keler" else layout, model, world)
    run(model, optimizers, range(3))
    dicts = saved(optimizers, tmp_path)
    options = {"names": parameter_names(optimizers[0], model)} | options
    with pytest.raises(UserError) as error:
        to_muonlm(damage(dicts) if damage else dicts, layout, model, **options)
    assert what in str(error.value) and fix in str(error.value), error.value


def test_a_target_that_does_not_fit_is_answered_with_the_tensor_and_the_remedy():
    model = net()
    optimizer = ours("keller", model)
    run(model, [optimizer], range(2))

    def answer(change=lambda state: None, layout="keller", world=1, like=None, **options):
        state = to_muonlm(optimizer, "muonlm", model)
        change(state)
        with pytest.raises(UserError) as error:
            from_muonlm(state, layout, model, like or foreign(layout, model, world)[0], **options)
        return str(error.value)

    swap = {"params": [model.gain], "use_muon": True, "momentum": MU}
    assert (
        "no state for 'up.weight'" in (text := answer(lambda s: s.pop("up.weight"))) and "fresh=['up.weight']" in text
    )
    assert "'gain' has no momentum_buffer: it was trained by AdamW" in answer(like=Keller([swap]))
    assert "shape (32, 16), the parameter (16, 32)" in answer(lambda s: s.update({"down.weight": s["up.weight"]}))
    assert "leave ranks out" in answer(layout="moonlight", ranks=2) and "1 or more" in answer(ranks=0)
    assert "'embed.weight' along its 128 rows" in answer(layout="nanochat", world=3, ranks=3)
    assert (
        "is in no group of the target" in (text := answer(lambda s: s.update(extra=s["gain"])))
        and "state.pop('extra')" in text
    )
    assert (
        "steps" not in (text := answer(lambda s: s["gain"].update(step=torch.tensor(9.0)), "dion")) and "[2, 9]" in text
    )
    assert "slices of 'a.weight'" in answer(lambda s: s["a.weight"].update(exp_avg=torch.zeros(2, 16)), "torch")


def test_tensors_without_a_gradient_may_be_named_as_fresh(tmp_path):
    model = net()
    for layout in ("keller", "moonlight", "nanochat"):
        optimizers = foreign(layout, model)
        run(model, optimizers, range(1))
        names, dicts = parameter_names(optimizers[0], model), saved(optimizers, tmp_path)
        index = names.index("gain")
        dicts[0]["state"][index] = {"use_muon": False} if layout == "moonlight" else {}
        state = to_muonlm(dicts, layout, model, names=names, fresh=["gain"])
        assert set(state) == set(MATRICES) | {"embed.weight"}
        after = ours("keller", model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after.load_state_dict(from_muonlm(state, "muonlm", model, after, fresh=["gain"]))
        run(model, [after], range(1, 2))
        assert after.state[model.gain]["step"] == 1 and after.state[model.embed.weight]["step"] == 2


def test_a_second_moment_that_the_target_has_no_place_for_is_dropped_aloud():
    model = net()
    optimizers = foreign("nanochat", model)
    run(model, optimizers, range(1))
    state = to_muonlm(optimizers[0], "nanochat", model)
    assert state["up.weight"]["second_momentum"].shape == (32, 1) and state["down.weight"]["second_momentum"].shape == (
        1,
        32,
    )
    adamuon = ours("nanochat", model, variant="adamuon")  # one number an entry: nothing of nanochat's fits
    with pytest.warns(UserWarning, match=r"no place for .*second_momentum \(5 tensors"):
        from_muonlm(state, "muonlm", model, adamuon)
    with pytest.warns(UserWarning, match=r"no place for .*second_momentum \(5 tensors"):
        from_muonlm(state, "moonlight", model, foreign("moonlight", model)[0])
    like = foreign("dion", model)[0]
    like.param_groups[0]["algorithm"] = "normuon"
    with pytest.warns(
        UserWarning, match=r"down.weight/second_momentum \(1 tensors"
    ):  # dion keeps one number a row, whatever the shape
        out = from_muonlm(state, "dion", model, like, step=1)
    assert [("variance_neuron" in out["state"][i]) for i in range(5)] == [name != "down.weight" for name in MATRICES]


def test_normuon_takes_the_second_moment_along_and_gives_it_back(tmp_path):
    model = net()
    optimizers = foreign("nanochat", model, 2)
    run(model, optimizers, range(2))
    state = read("nanochat", model, optimizers, saved(optimizers, tmp_path))
    after = ours("nanochat", model, variant="normuon", beta2=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(from_muonlm(state, "muonlm", model, after))
        back = from_muonlm(to_muonlm(after, "muonlm", model), "nanochat", model, optimizers[0], ranks=2)
    assert torch.equal(after.state[model.up.weight]["second_momentum"], state["up.weight"]["second_momentum"].flatten())
    assert state["down.weight"]["second_momentum"].abs().min() > 0
    for optimizer, part in zip(optimizers, back, strict=True):
        for index, entry in optimizer.state_dict()["state"].items():
            assert all(torch.equal(v, part["state"][index][k]) for k, v in entry.items() if isinstance(v, torch.Tensor))
    run(model, [after], range(2, 4))


@pytest.mark.parametrize("variant", ["normuon", "adamuon", "hyperball"])
def test_a_variant_that_the_source_did_not_have_starts_as_it_would_anew(variant):
    model = net()
    keller = foreign("keller", model)
    run(model, keller, range(2))
    after, anew = (ours("keller", model, wd=0.0, variant=variant) for _ in range(2))  # hyperball takes no decay
    after.load_state_dict(from_muonlm(to_muonlm(keller[0], "keller", model), "muonlm", model, after))
    run(model, [anew, after], range(2, 3))
    for name in MATRICES:
        p = model.get_parameter(name)
        assert after.state[p]["second_momentum"].shape == anew.state[p]["second_momentum"].shape
        assert after.state[p]["second_momentum"].count_nonzero()


def test_our_own_splits_slices_and_variants_survive_the_way_through_names():
    model = net()

    def fused(momentum_form):
        split = {"split": (0, [12, 12, 8]), "adamw": [2]}
        slices = {"lr_ratio": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
        group = {
            "params": [("up.weight", model.up.weight)],
            "use_muon": True,
            "name": "fused",
            "splits": [split],
            "slices": slices,
        }
        return Muon([group], variant="normuon", momentum_form=momentum_form, ns_dtype="float32")

    one, other = fused("classical"), fused("classical")
    run(model, [one], range(3))
    state = to_muonlm(one, "muonlm", model)
    other.load_state_dict(from_muonlm(state, "muonlm", model, other))
    mine, theirs = one.state[model.up.weight], other.state[model.up.weight]
    assert mine.keys() == theirs.keys() >= {"momentum_buffer", "second_momentum", "exp_avg", "exp_avg_sq", "step"}
    for key in mine:
        torch.testing.assert_close(
            mine[key], theirs[key], rtol=1.2e-7 if key == "momentum_buffer" else 0, atol=0
        )  # an ulp
    with pytest.raises(UserError, match="slices of 'up.weight' belong to AdamW here"):
        del state["up.weight"]["exp_avg"]
        from_muonlm(state, "muonlm", model, other)


def test_momentum_is_stored_in_the_type_that_the_target_asks_for():
    model = net()
    keller = foreign("keller", model)
    run(model, keller, range(1))
    after = ours("keller", model, state_dtype="bfloat16")
    after.load_state_dict(from_muonlm(to_muonlm(keller[0], "keller", model), "muonlm", model, after))
    assert after.state[model.up.weight]["momentum_buffer"].dtype == torch.bfloat16


# --- learning rates -------------------------------------------------------------------------------------------------------------

SHAPES = [(768, 768), (3072, 768), (768, 3072), (7, 1), (1, 7)]


@pytest.mark.parametrize("A, B", SHAPES)
def test_rates_follow_the_table_of_the_specification(A, B):
    """Its column "lr giving the AdamW-like RMS 0.2 lr_adamw", typed again."""
    table = {
        "original": 0.2 * math.sqrt(B),
        "match_rms_adamw": 1.0,
        "spectral": 0.2 * math.sqrt(max(A, B)) * math.sqrt(B / A),
        "none": 0.2 * math.sqrt(max(A, B)),
        "adamw": 1.0,
    }
    for mode, factor in table.items():
        lr, wd = convert_lr(3e-4, 0.1, (A, B), "adamw", mode)
        assert lr == pytest.approx(3e-4 * factor, rel=1e-14) and lr * wd == pytest.approx(3e-5, rel=1e-14)


def test_the_examples_of_the_specification():
    assert round(convert_lr(0.02, 0.0, (768, 768), "original", "match_rms_adamw")[0], 4) == 0.0036
    assert round(convert_lr(0.025, 0.0, (768, 768), "original", "match_rms_adamw")[0], 4) == 0.0045


@pytest.mark.parametrize("shape", [*SHAPES, (4, 32, 16), (8, 4, 3, 3)])
def test_rates_come_back_to_the_last_bits(shape):
    for one in MODES:
        for other in MODES:
            there = convert_lr(0.017, 0.03, shape, one, other, 0.229)
            back = convert_lr(*there, shape, other, one, 0.229)
            assert back == pytest.approx(
                (0.017, 0.03), rel=1e-15 * 2
            )  # two roundings of 1.1e-16 each way, in each factor
    assert convert_lr(0.0, 0.1, shape, "original", "none")[0] == 0.0


def test_a_convolution_counts_flattened_and_experts_by_their_last_two():
    assert convert_lr(0.1, 0.0, (8, 4, 3, 3), "none", "match_rms_adamw") == convert_lr(
        0.1, 0.0, (8, 36), "none", "match_rms_adamw"
    )
    assert convert_lr(0.1, 0.0, (5, 8, 36), "none", "match_rms_adamw") == convert_lr(
        0.1, 0.0, (8, 36), "none", "match_rms_adamw"
    )


@pytest.mark.parametrize("name", ["a.weight", "up.weight", "down.weight"])
@pytest.mark.parametrize("mode", ["match_rms_adamw", "spectral", "none"])
def test_the_same_weights_come_out_under_the_converted_rate_and_decay(mode, name):
    """Decay multiplies the unadjusted rate, so without its conversion the weights would part: the second assertion."""
    shape = tuple(net().get_parameter(name).shape)

    def trained(lr, wd, lr_mode):
        model = net()
        run(
            model,
            [Muon([model.get_parameter(name)], lr=lr, weight_decay=wd, lr_mode=lr_mode, ns_dtype="float32")],
            range(20),
        )
        return model.get_parameter(name).detach()

    reference = trained(0.05, 0.5, "original")
    lr, wd = convert_lr(0.05, 0.5, shape, "original", mode)
    torch.testing.assert_close(
        trained(lr, wd, mode), reference, rtol=0, atol=2e-5
    )  # 20 steps of fp32 rounding through Newton-Schulz
    if not math.isclose(lr, 0.05):
        assert (trained(lr, 0.5, mode) - reference).abs().max() > 1e-2


@pytest.mark.parametrize(
    "arguments, what, fix",
    [
        ((0.02, 0.1, (8, 8), "orignal", "none"), "'orignal'", "'original'"),
        ((0.02, 0.1, (8, 8), "original", "muP"), "'muP'", "original, match_rms_adamw, spectral, none, adamw"),
        ((0.02, 0.1, (8,), "original", "none"), "(8,) is no matrix", "(768, 3072)"),
        ((0.02, 0.1, (8, 0), "original", "none"), "(8, 0) is no matrix", "(768, 3072)"),
        ((-1, 0.1, (8, 8), "original", "none"), "lr=-1", ">= 0"),
        ((0.02, math.nan, (8, 8), "original", "none"), "wd=nan", ">= 0"),
        ((0.02, 0.1, (8, 8), "original", "none", 0.0), "rms_target=0.0", "0.2"),
    ],
)
def test_a_rate_that_cannot_be_converted_is_answered_with_the_remedy(arguments, what, fix):
    with pytest.raises(UserError) as error:
        convert_lr(*arguments)
    assert what in str(error.value) and fix in str(error.value)


# --- muonlm info --convert-lr ---------------------------------------------------------------------------------------------------


def test_info_converts_a_rate_and_says_what_stays_the_same(capsys):
    assert (
        main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768 --wd 0.05")) == 0
    )
    out = capsys.readouterr().out
    assert "lr 0.02 with wd 0.05 under original  =  lr 0.00360844 with wd 0.277128 under match_rms_adamw" in out
    assert "0.000722 (RMS) a step" in out and "lr x wd = 0.001" in out
    assert main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768")) == 0
    assert "add --wd" in capsys.readouterr().out


def test_info_without_a_shape_shows_that_the_rate_depends_on_it(capsys):
    assert main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw")) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[3:6]] == [
        ["768x768", "0.00360844", "0.000721688"],
        ["3072x768", "0.00360844", "0.000721688"],
        ["768x3072", "0.00180422", "0.000360844"],
    ]
    assert "depends on the shape" in out


def test_info_prints_one_json_document_of_the_rates(capsys):
    for shape in ("", "--shape 64x32"):
        assert main(shlex.split(f"info --convert-lr 3e-4 --wd 0.1 --from adamw --to spectral --json {shape}")) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["from"] == {"mode": "adamw", "lr": 3e-4, "wd": 0.1} and facts["to"] == "spectral"
        for one in facts["conversions"]:
            assert (one["lr"], one["wd"]) == convert_lr(3e-4, 0.1, one["shape"], "adamw", "spectral")
            assert one["update_rms"] == pytest.approx(0.2 * 3e-4)
    assert [one["shape"] for one in facts["conversions"]] == [[64, 32]]


@pytest.mark.parametrize(
    "typed, what, fix",
    [
        ("--convert-lr 0.02 --from original", "--convert-lr needs --from and --to", "--to match_rms_adamw"),
        ("--convert-lr fast --from original --to none", "--convert-lr 'fast'", "--convert-lr 0.02"),
        ("--convert-lr nan --from original --to none", "--convert-lr 'nan'", "--convert-lr 0.02"),
        ("--convert-lr 0.02 --wd inf --from original --to none", "--wd 'inf'", "--wd 0.05"),
        ("--convert-lr 0.02 --from original --to non", "'non'", "'none'"),
        ("--convert-lr 0.02 --from original --to none --shape 768", "--shape '768'", "--shape 768x768"),
        ("--convert-lr 0.02 --from original --to none --shape 0x8", "--shape '0x8'", "--shape 768x768"),
        (
            "--convert-lr 0.02 --from original --to none quickstart",
            "takes no recipe and no key, found 'quickstart'",
            "leave it out",
        ),
        ("--convert-lr 0.02 --from original --to none --optim.lr 1", "found '--optim.lr'", "leave it out"),
        ("--from original", "--from belongs to --convert-lr", "--convert-lr 0.02"),
        ("--shape 8x8", "--shape belongs to --convert-lr", "--convert-lr 0.02"),
        ("--convert-rl 0.02", "'--convert-rl'", "'--convert-lr'"),
    ],
)
def test_a_rate_typed_wrongly_is_answered_with_what_to_type(capsys, typed, what, fix):
    assert main(["info", *shlex.split(typed)]) == 2
    err = capsys.readouterr().err
    assert what in err and fix in err and err.count("\n") == 1, err

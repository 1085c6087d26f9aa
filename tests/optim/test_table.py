"""THE table of optimizers: it is read without torch, its names are real, and one file and one line add a toy."""

import json
import subprocess
import sys

import pytest
from torch import nn

from muonlm.cli.main import main
from muonlm.config.schema import Config, OptimConfig
from muonlm.errors import UserError
from muonlm.lazy import load
from muonlm.optim import OPTIMIZERS, Entry, build_optimizer, plan_routes
from muonlm.training.setup import own_settings

TOY = '''
"""Gradient descent with a memory of how often it stepped."""
import torch


def build(plan, *, lr, wd, decay, betas, eps, process_group=None):
    params = [(d.name, d.param) for d in plan.trained]
    return Descent([{"params": params, "name": "all", "lr": lr, "base_lr": lr}], {})


class Descent(torch.optim.Optimizer):
    group_state = ("steps",)

    def state_layout(self, p, group):
        return {"last": (tuple(p.shape), p.dtype)}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                self.state[p]["last"] = p.grad.clone()
                p.add_(p.grad, alpha=-group["lr"])
'''


def test_a_toy_optimizer_is_one_file_and_one_line_and_trains_through_the_loop(smoke, tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "__init__.py").write_text("")
    (tmp_path / "toys" / "descent.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(OPTIMIZERS, "descent", Entry("toys.descent:build"))  # the line
    flags = ["--optim.name", "descent", "--optim.lr", "0.5"]
    assert main(smoke(tmp_path / "whole", *flags)) == 0
    assert main(smoke(tmp_path / "half", *flags, "--sched.kind", "constant", "--train.steps", "3")) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--train.steps", "6"]) == 0
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if "loss" in r]
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["lr_descent"] == 0.5
    meta = json.loads((tmp_path / "half" / "checkpoints" / "step-00000006" / "meta.json").read_text())
    assert meta["optimizer"]["groups"] == {"all": {"steps": 6}} and meta["optimizer"]["optimizer"] == "Descent"
    assert all(name.endswith("/last") for name in meta["optimizer"]["tensors"])


def test_the_table_is_read_without_torch():
    code = "import sys; from muonlm.optim import OPTIMIZERS; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_entry_names_is_there(name):
    entry = OPTIMIZERS[name]
    assert callable(load(entry.build, "muonlm.optim"))
    assert issubclass(load(entry.watch, "muonlm.optim"), load(Entry.watch, "muonlm.optim"))
    named = {*entry.routed, *entry.watched, *entry.rates, *entry.exact}
    assert named <= own_settings(Config(optim=OptimConfig(name=name))).keys()  # refused if the section cannot be one


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_trains_a_tensor_is_shown_by_the_name_of_the_optimizer(name):
    own = own_settings(Config(optim=OptimConfig(name=name)))
    model = nn.Sequential(nn.Linear(32, 32))
    plan = plan_routes(name, model, **own)
    optimizer = build_optimizer(plan, name=name, lr=0.01, **own)
    shown = {row["by"] for row in plan.to_dict(optimizer.param_groups)["tensors"]}
    who = type(optimizer).__name__
    assert who in shown, f'only {shown} is shown: give the groups that {who} steps "rule": "{who}"'


@pytest.mark.parametrize(
    "section, says",
    [
        ("descents", "'descents' is no field of Config: give it a class and a field in config/schema.py"),
        ("optim", "has betas, decay, eps, lr, name, wd, which every optimizer is given from"),
    ],
)
def test_a_section_that_is_missing_or_takes_a_shared_name_is_told_so(section, says, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "descent", Entry("toys.descent:build", section=section))
    with pytest.raises(AssertionError, match=says):
        own_settings(Config(optim=OptimConfig(name="descent")))


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="`name` = 'mun' is no optimizer: did you mean 'muon'"):
        build_optimizer(None, name="mun", lr=0.1)

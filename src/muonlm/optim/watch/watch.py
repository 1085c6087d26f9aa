"""What the loop asks of an optimizer beside its step: is it at work, is it healthy, what is shown of it?

    watch = build_watch(name, optimizer, model, ...)             the table of optimizers knows which class
    watch.opening(table)                                         lines to say before the first step
    with watch.step(n):                                          optimizer step n = 1, 2, ...
        optimizer.step()
    metrics = watch.clip()                                       what is done to the weights after a step
    measurements, advice = watch.measure(n, loss)                where they are due
    watch.rates(), watch.unclipped                               for the log; for gradient clipping

On many ranks every rank calls all of them.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from muonlm.errors import UserError

from ..muon.muon import Muon
from .activity import ActivityCheck
from .diagnostics import Diagnostics
from .qk_clip import qk_clip


class Watch:
    """Of an optimizer that has nothing to watch: no check, no measurement, its rate."""

    unclipped: frozenset[Tensor] = frozenset()  # whose gradients clipping leaves as they are

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, model: nn.Module, **settings):
        self.name, self.optimizer = name, optimizer

    def opening(self, table: str) -> list[str]:
        """What to say of the routing, given the text of routing.txt."""
        return []

    def step(self, number: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def clip(self) -> dict[str, float]:
        return {}

    def measure(self, step: int, loss: float) -> tuple[dict, list[str]]:
        """(measurements, lines of advice) after `step`, whose mean loss in nats per token is `loss`."""
        return {}, []

    def rates(self) -> dict[str, float | Tensor]:
        """The rates of the step just taken, as they stand in the log."""
        return {f"lr_{self.name}": self.optimizer.param_groups[0]["lr"]}


class MuonWatch(Watch):
    """Muon's activity check, its measurements with their advice, QK-clip.

    qk_clip       tau of QK-clip; 0 = off
    clip_scope    "aux": gradient clipping leaves the matrices alone, whose step does not depend on the size of a
                  gradient; "all": it scales them, which damps a spike in the momentum
    every, spectra, advice, seed   of Diagnostics; spectra is rounded up to a multiple of `every`

    Every "auto" is decided here, on rank 0 for all, so that what cannot work is refused before the first step.
    """

    optimizer: Muon

    def __init__(
        self,
        name: str,
        optimizer: Muon,
        model: nn.Module,
        *,
        every: int = 0,
        spectra: int = 0,
        advice: bool = True,
        seed: int = 0,
        qk_clip: float = 0.0,
        clip_scope: str = "aux",
    ):
        super().__init__(name, optimizer, model)
        if clip_scope not in ("all", "aux"):
            raise UserError(
                f'`clip_scope` = {clip_scope!r} is unknown; use "all", or "aux" to leave the matrices alone'
            )
        optimizer.assign_owners()  # brings rank 0's choices, too
        optimizer.choose_methods()
        if clip_scope == "aux":
            self.unclipped = frozenset(p for g in optimizer.param_groups if g["use_muon"] for p in g["params"])
        self.tau, self.layers = qk_clip, _layers_to_clip(model, qk_clip)
        self.check, self.diagnostics = ActivityCheck(optimizer), None
        if every:
            self.diagnostics = Diagnostics(every, -(-spectra // every) * every, advice, seed).attach(optimizer)

    def opening(self, table: str) -> list[str]:
        lines = [line for line in table.splitlines() if line.startswith(("Muon o", "AdamW o", "Using"))]
        return lines + ([self.optimizer.replicas.describe()] if self.optimizer.replicas else [])

    def step(self, number: int) -> contextlib.AbstractContextManager:
        return self.check(number)

    def clip(self) -> dict[str, float]:
        return qk_clip([layer.qk_heads() for layer in self.layers], tau=self.tau) if self.layers else {}

    def measure(self, step: int, loss: float) -> tuple[dict, list[str]]:
        if not self.diagnostics:
            return {}, []
        found = self.diagnostics.collect() if self.diagnostics.due(step) else {}
        return found, self.diagnostics.advise(step, loss)

    def rates(self) -> dict[str, float | Tensor]:
        """lr_muon and momentum, lr_adamw: the first group of each kind."""
        rates = {}
        for group in self.optimizer.param_groups:
            rates.setdefault("lr_muon" if group["use_muon"] else "lr_adamw", group["lr"])
            if group["use_muon"]:
                rates.setdefault("momentum", group["momentum"])
        return rates


def _layers_to_clip(model: nn.Module, tau: float) -> list:
    """The attention layers of ours that QK-clip measures from now on; none if it is off."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "qk_heads")] if tau else []
    if tau and not layers:
        raise UserError(f"`qk_clip` = {tau:g}, but this model has no attention to clip; leave it out.")
    for layer in layers:
        layer.qk_heads()  # refuses QK-norm
        layer.track_logits = True
    return layers

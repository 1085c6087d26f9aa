"""A routing plan: what was decided about every tensor, and the groups that follow for an optimizer.

Raises   UserError for a Muon run without a Muon tensor, for one on flattened shards, for rates that are missing, and
         for an optimizer that forgets a parameter
"""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from muonlm.errors import UserError

from ..muon.blocks import adamw_blocks, blocks
from . import table


@dataclass(frozen=True)
class Decision:
    name: str
    aliases: list[str]
    shape: tuple[int, ...]
    numel: int
    route: str
    role: str
    split: dict | None
    reason: str
    param: Tensor = field(repr=False, compare=False)
    lr_mult: float = 1.0
    wd: float | None = None  # None: its group's
    flat: str = ""  # why it is no whole tensor

    def block_shapes(self) -> list[tuple[int, int]]:
        """(fan out, fan in) of every block that Muon orthogonalises."""
        split = self.split or {}
        cut = {key: split[key] for key in ("split", "heads", "flatten") if key in split} or None
        every = blocks(torch.empty(self.shape, device="meta"), cut)
        aux = adamw_blocks(split, len(every))
        kept = [b.shape for i, b in enumerate(every) if i not in aux]
        return [(B, A) if split.get("transposed") else (A, B) for A, B in kept]

    @property
    def group_role(self) -> str:
        """The group of Muon's that it belongs to: muon, embed, head or scalar."""
        return "muon" if self.route == "muon" else self.role if self.role in ("embed", "head") else "scalar"

    def counts(self) -> dict[str, int]:
        """Values trained by each: a tensor of Muon may have slices of AdamW."""
        muon = sum(A * B for A, B in self.block_shapes()) if self.route == "muon" else 0
        return {"muon": muon, "adamw": self.numel - muon if self.route in ("muon", "adamw") else 0}


@dataclass(frozen=True)
class RoutingPlan:
    decisions: list[Decision]

    def counts(self) -> dict[str, int]:
        """Values trained by Muon and by AdamW when this plan is followed."""
        return {who: sum(d.counts()[who] for d in self.decisions) for who in ("muon", "adamw")}

    @property
    def trained(self) -> list[Decision]:
        """The decisions about all that is trained; UserError if nothing is."""
        if trained := [d for d in self.decisions if d.route in ("muon", "adamw")]:
            return trained
        raise UserError(
            "no parameter is left to train: all are frozen or excluded; set requires_grad=True on some, "
            "or remove an override that excludes them (`route`)"
        )

    def groups(
        self,
        *,
        lr: float,
        adamw_lr: float | None = None,
        embed_lr: float | None = None,
        head_lr: float | None = None,
        scalar_lr: float | None = None,
        wd: float = 0.0,
        adamw_wd: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        allow_empty_muon: bool = False,
    ) -> list[dict]:
        """Parameter groups "muon", "embed", "head", "scalar" for `Muon`; empty ones are dropped, vectors not decayed.

        Tensors with their own lr_mult or wd get groups of their own, e.g. "muon x2" and "embed wd 0.1". AdamW's slices
        of fused matrices stay in the Muon group, whose "slices" gives their rate as a multiple of the group's.
        """
        trained = self.trained
        _check_for_muon(trained, allow_empty_muon)
        given = {"embed": embed_lr, "head": head_lr, "scalar": scalar_lr}
        rates = {"muon": lr} | {role: adamw_lr if rate is None else rate for role, rate in given.items()}
        decays = {"muon": wd, "embed": adamw_wd, "head": adamw_wd, "scalar": 0.0}
        sliced = any((d.split or {}).get("adamw") for d in trained if d.route == "muon")
        needed = {d.group_role for d in trained} | ({"scalar"} if sliced else set())
        if missing := [role for role in rates if role in needed and rates[role] is None]:
            raise UserError(
                f"the {missing[0]} parameters are trained by AdamW and need a rate of their own, found none; "
                f"give `adamw_lr` 3e-4 or `{missing[0]}_lr`"
            )
        members: dict[tuple, list[Decision]] = {(role, 1.0, decay): [] for role, decay in decays.items()}
        for d in trained:
            usual = adamw_wd if d.group_role == "scalar" and d.role == "matrix" else decays[d.group_role]
            members.setdefault((d.group_role, d.lr_mult, usual if d.wd is None else d.wd), []).append(d)

        groups = []
        for (role, mult, decay), chosen in sorted(members.items(), key=lambda item: list(decays).index(item[0][0])):
            if not chosen:
                continue
            name = role + (f" x{mult:g}" if mult != 1.0 else "") + (f" wd {decay:g}" if decay != decays[role] else "")
            group = {"params": [(d.name, d.param) for d in chosen], "name": name, "use_muon": role == "muon"}
            group |= {"weight_decay": decay, "lr": rates[role] * mult, "base_lr": rates[role] * mult}
            adam = {"betas": tuple(betas), "eps": eps}
            groups.append(group | (_of_muon(chosen, name, lr, rates["scalar"], adam) if role == "muon" else adam))
        return groups

    def table(self, groups: list[dict] | None = None) -> str:
        """The text of routing.txt. With the optimizer's `param_groups` also rates, decay and predicted update RMS."""
        return table.text(self, groups)

    def to_dict(self, groups: list[dict] | None = None) -> dict:
        """Decisions and totals as JSON values; with `param_groups` also lr, wd, s(A, B) and update RMS."""
        return table.as_json(self, groups)


def assert_complete(optimizer: torch.optim.Optimizer, model_or_plan: nn.Module | RoutingPlan) -> None:
    """UserError unless every trainable parameter is in exactly one group, by identity; a plan may leave some out."""
    if isinstance(model_or_plan, RoutingPlan):
        wanted = {id(d.param): d.name for d in model_or_plan.decisions if d.route in ("muon", "adamw")}
    else:
        wanted = {id(p): name for name, p in model_or_plan.named_parameters() if p.requires_grad}
    found = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    if lost := [name for key, name in wanted.items() if key not in found]:
        raise UserError(
            f"{lost[0]} is trainable but in no group of the optimizer ({len(lost)} in all), so it would stay as it is; "
            f"build the groups with route(model).groups(...), or set requires_grad_(False) on it"
        )
    if twice := [wanted.get(key, "a tensor") for key, count in found.items() if count > 1]:
        raise UserError(f"{twice[0]} is in two groups of the optimizer and would be updated twice; remove it from one")
    if strangers := [key for key in found if key not in wanted]:
        raise UserError(
            f"the optimizer trains {len(strangers)} tensors that are not trainable parameters of this model; "
            f"build it after the model is final: moved, wrapped, tied and frozen"
        )


def _check_for_muon(trained: list[Decision], allow_empty_muon: bool) -> None:
    if flat := next((d for d in trained if d.flat), None):
        raise UserError(
            f"{flat.name} has shape {flat.shape}: {flat.flat}. Muon orthogonalises whole matrices, and a flat piece "
            f"has neither rows nor columns; use DDP or FSDP2 (fully_shard keeps the shapes), or `name` adamw"
        )
    if not allow_empty_muon and all(d.route != "muon" for d in trained):
        raise UserError(
            "this run asks for Muon but no parameter is routed to it (see the reasons in plan.table(), routing.txt); "
            "use `name` adamw, or allow_empty_muon=True if that is intended"
        )


def _of_muon(chosen: list[Decision], name: str, lr: float, scalar_lr: float | None, adam: dict) -> dict:
    """What a group of Muon holds besides: how its tensors are cut, and how their slices are trained."""
    splits = [d.split for d in chosen]
    if not any((split or {}).get("adamw") for split in splits):
        return {"splits": splits}
    assert scalar_lr is not None
    if not lr > 0.0:
        raise UserError(
            f"slices of group {name!r} are trained by AdamW at a multiple of Muon's rate, {lr}; set `lr` above 0"
        )
    return {"splits": splits, "slices": {"lr_ratio": scalar_lr / lr, **adam, "weight_decay": 0.0}}

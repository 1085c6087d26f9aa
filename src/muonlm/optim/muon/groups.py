"""Parameter groups of Muon: every hyper-parameter, tensor and split is checked when a group is added.

Raises   ValueError for values and tensors that cannot work, naming them and the remedy
"""

import math
import warnings
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..schedule import check_momentum_schedule
from .blocks import blocks
from .choices import COEFFICIENTS, LR_MODES, MOMENTUM_FORMS, VARIANTS, WHOLE
from .distributed import check_sharding
from .newton_schulz import check_method, triples
from .probe import NS_DTYPES, dtype_name

SETTINGS = (  # arguments of Muon that a group of Muon may set for itself
    "momentum nesterov momentum_form momentum_schedule decoupled_wd cautious wd_follows_lr ns_steps coefficients "
    "ns_method ns_dtype lr_mode rms_target variant beta2 adamuon_sign batch_by_shape max_batch_bytes compile "
    "state_dtype param_dtype_comp none_grad compat"
).split()
OTHERS = ("params", "name", "use_muon", "splits", "slices")  # what a group may hold beside
FOREIGN = ("base_lr", "max_lr", "initial_lr", "first_lr", "param_names")  # what others put into groups
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-10}  # defaults of AdamW's groups
ROUTED = "Muon(route(model).groups(lr=0.02, adamw_lr=3e-4)), with route from muonlm.optim"


def settled(muon: dict) -> dict:
    """The settings of all Muon groups from the constructor's: what was left out is decided, counters are added."""
    if muon["compat"] == "torch":
        for key in ("ns_method", "ns_dtype"):
            if muon[key] != "auto":
                raise ValueError(f'{key}={muon[key]!r} does not go with compat="torch", which fixes it; leave it out')
        muon |= {"ns_method": "direct", "ns_dtype": "bfloat16", "coefficients": muon["coefficients"] or "keller"}
    elif muon["compat"] is not None:
        raise ValueError(f'compat={muon["compat"]!r} is unknown; use compat="torch", or None')
    if muon["coefficients"] is None:
        muon["coefficients"] = "polar_express"
    if muon["ns_steps"] is None:  # a schedule that makes sense in its own length only, or five
        whole = muon["coefficients"] in WHOLE
        muon["ns_steps"] = len(COEFFICIENTS[muon["coefficients"]]) if whole else 5
    return muon | {"step": 0, "ns_chosen": {}}


def names_of(group: dict) -> list[str]:
    return group.get("param_names") or [f"#{i} of group {group['name']!r}" for i in range(len(group["params"]))]


def complete(given: dict, others: list[dict], defaults: dict) -> dict:
    """A group as the optimizer keeps it: every tensor and value checked, defaults and splits filled in.

    others     the groups that the optimizer has already
    defaults   lr, weight_decay; "muon" and "adamw": those of each kind
    """
    group = dict(given)
    names, tensors = _members(group, others)
    _check_keys(group, defaults)
    own = "muon" if group["use_muon"] else "adamw"
    shared = {key: defaults[key] for key in ("lr", "weight_decay")}
    for key, value in (shared | defaults[own]).items():
        group.setdefault(key, dict(value) if isinstance(value, dict) else value)
    check_group(group)
    if group["use_muon"]:
        group["splits"] = check_splits(group.get("splits"), names, tensors)
        check_sharding(group, names, tensors)
        if group["variant"] == "hyperball":
            check_spheres(group["splits"], names, tensors)
        if any(split and split.get("adamw") for split in group["splits"]) and "slices" not in group:
            raise ValueError(
                f"group {group['name']!r} leaves slices to AdamW but does not say how; set slices=dict(lr_ratio="
                f"adamw_lr / muon_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)"
            )
    return group


def _members(group: dict, others: list[dict]) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of a group; "params", "name" and "use_muon" are set."""
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("parameters must come in an order that is the same in every run; pass a list instead of a set")
    members: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    group["params"] = members
    tensors = [p[1] if isinstance(p, tuple) else p for p in members]
    if strange := [type(p).__name__ for p in tensors if not isinstance(p, Tensor)]:
        raise TypeError(f"a group holds tensors or (name, tensor) pairs, found {strange[0]}")
    group.setdefault("name", f"group{len(others)}")
    names = [p[0] if isinstance(p, tuple) else f"#{i} of group {group['name']!r}" for i, p in enumerate(members)]
    if group["name"] in {other["name"] for other in others}:
        raise ValueError(f"two groups are named {group['name']!r}; give each a name of its own")
    seen = {id(p) for other in others for p in other["params"]}
    for name, p in zip(names, tensors, strict=True):
        if id(p) in seen:
            raise ValueError(f"parameter {name} is given twice and would be updated twice; remove it from one place")
        seen.add(id(p))
        if "use_muon" not in group and p.ndim != 2:
            raise ValueError(
                f"parameter {name} has shape {tuple(p.shape)} and its group does not say how to train it; set "
                f"use_muon=True or use_muon=False, or write {ROUTED}"
            )
        if not p.is_floating_point():
            raise ValueError(
                f"parameter {name} is {p.dtype}; Muon and AdamW train real floating-point tensors only, so leave it "
                f"out of the groups"
            )
    group.setdefault("use_muon", True)
    return names, tensors


def _check_keys(group: dict, defaults: dict) -> None:
    known = {*defaults["muon"], *defaults["adamw"], *defaults, *OTHERS}
    for key in sorted(set(group) - known - set(FOREIGN)):
        if near := get_close_matches(key, known, n=1, cutoff=0.75):
            raise ValueError(
                f"group {group['name']!r} has a key {key!r}, which nothing reads; did you mean {near[0]!r}?"
            )
    if group.get("compat") and not defaults["muon"]["compat"]:
        raise ValueError('compat="torch" is for a whole optimizer: pass it to Muon, not to a group')
    other = "adamw" if group["use_muon"] else "muon"
    if stray := sorted(set(group) & set(defaults[other])):
        raise ValueError(
            f"group {group['name']!r} has use_muon={group['use_muon']} but sets {', '.join(stray)}, which only {other} "
            f"groups take; remove it or change use_muon"
        )
    if not group["use_muon"] and "lr" not in group:
        raise ValueError(f"AdamW group {group['name']!r} has no lr; set one, e.g. lr=3e-4: a Muon lr is no AdamW lr")


def check_group(group: dict) -> None:
    """ValueError for hyper-parameters that cannot work; rewrites dtypes and the schedule to plain, saveable values."""

    def need(condition: bool, key: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"`{key}` = {group[key]!r} in group {group['name']!r} is not allowed; use {fix}")

    if isinstance(group["lr"], Tensor):
        need(group["lr"].numel() == 1, "lr", "one number, or a tensor of one")
        group["lr"] = group["lr"].reshape(())
    for key in ("lr", "weight_decay"):
        need(math.isfinite(group[key]) and group[key] >= 0.0, key, "a finite number >= 0")
    if not group["use_muon"]:
        need(len(group["betas"]) == 2 and all(0.0 <= b < 1.0 for b in group["betas"]), "betas", "two numbers in [0, 1)")
        need(math.isfinite(group["eps"]) and group["eps"] >= 0.0, "eps", "a finite number >= 0")
        return
    group.setdefault("first_lr", float(group["lr"]))
    need(0.0 <= group["momentum"] < 1.0, "momentum", "a number in [0, 1), e.g. 0.95")
    need(group["momentum_form"] in MOMENTUM_FORMS, "momentum_form", " or ".join(MOMENTUM_FORMS))
    need(callable(group["lr_mode"]) or group["lr_mode"] in LR_MODES, "lr_mode", f"one of {', '.join(LR_MODES)}")
    need(math.isfinite(group["rms_target"]) and group["rms_target"] > 0.0, "rms_target", "a number > 0, e.g. 0.2")
    limit = group["max_batch_bytes"]
    need(limit is None or limit > 0, "max_batch_bytes", "a number of bytes > 0")
    need(group["variant"] in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}")
    need(0.0 <= group["beta2"] < 1.0, "beta2", "a number in [0, 1), e.g. 0.95")
    need(group["none_grad"] in ("skip", "zero"), "none_grad", '"skip" or "zero"')
    hyperball = group["variant"] == "hyperball"
    need(not (hyperball and group["weight_decay"]), "weight_decay", '0 with variant="hyperball", which fixes the norm')
    if group["compat"]:
        plain = group["variant"] == "muon" and group["momentum_form"] == "ema" and not group["state_dtype"]
        need(plain, "compat", 'it with variant="muon", momentum_form="ema" and no state_dtype only: torch has no other')
        group["batch_by_shape"] = False
    triples(group["coefficients"], group["ns_steps"])
    if group["ns_dtype"] != "auto":
        group["ns_dtype"] = dtype_name(group["ns_dtype"], "`ns_dtype`")
    if group["ns_method"] != "auto":
        check_method(group["ns_method"], group["coefficients"], NS_DTYPES.get(group["ns_dtype"]))
    if group["state_dtype"] is not None:
        group["state_dtype"] = dtype_name(group["state_dtype"], "`state_dtype`")
    if group["momentum_schedule"] is not None:
        check_momentum_schedule(group["momentum_schedule"])
        group["momentum_schedule"] = [(int(step), float(mu)) for step, mu in group["momentum_schedule"]]
    if not group["decoupled_wd"] and group["weight_decay"]:
        need(not group["cautious"], "cautious", "False with decoupled_wd=False")
        warnings.warn(
            "decoupled_wd=False adds wd * W to the gradient, whose size Newton-Schulz forgets: wd is then no rate of "
            "decay. Use decoupled_wd=True unless you must repeat an old run.",
            stacklevel=5,
        )


def check_splits(given: list[dict | None] | None, names: list[str], tensors: list[Tensor]) -> list[dict | None]:
    """One checked split per parameter of a Muon group, from `given` or else from the parameters' tags."""
    if given is None:
        cuts = ("split", "heads", "flatten", "adamw", "transposed")
        tags = [getattr(p, "muonlm", None) or {} for p in tensors]
        found = [{key: tag[key] for key in cuts if key in tag} for tag in tags]
        for split in found:
            if "split" in split:
                split.pop("heads", None)  # a tag may offer both; single heads are asked of `route`
        given = [split or None for split in found]
    if len(given) != len(tensors):
        raise ValueError(f"splits has {len(given)} entries for {len(tensors)} parameters; give one (or None) for each")
    for name, p, split in zip(names, tensors, given, strict=True):
        what = f"parameter {name} of shape {tuple(p.shape)}"
        if p.ndim < 2 or p.numel() == 0:
            raise ValueError(
                f"{what} is no matrix, so it has no orthogonal factor; put it into a group with use_muon=False (a "
                f"sharded, flattened matrix must be gathered first)"
            )
        if p.ndim == 2 and min(p.shape) == 1:
            warnings.warn(
                f"{what} is a vector: Muon just normalises it; AdamW suits it better (use_muon=False)", stacklevel=6
            )
        flat = p.ndim > 3 or bool(split and split.get("flatten"))
        if flat and not p.is_contiguous():
            raise ValueError(
                f"{what} is not contiguous, so it cannot be seen as a matrix; call .contiguous() on it (no "
                f"channels_last), or set use_muon=False"
            )
        if split and ("split" in split or "heads" in split):
            if flat:
                raise ValueError(f"{what} is flattened and cannot be split; remove its split")
            _check_split(name, p, split)
    return given


def _check_split(name: str, p: Tensor, split: dict) -> None:
    dim, parts = split.get("split") or split["heads"]
    if not p.ndim - 2 <= dim < p.ndim:
        raise ValueError(
            f"the split of parameter {name} is along dimension {dim} of shape {tuple(p.shape)}; "
            f"use {p.ndim - 2} or {p.ndim - 1}"
        )
    whole = p.shape[dim]
    if "split" in split and (sum(parts) != whole or min(parts) < 1):
        raise ValueError(
            f"the split {list(parts)} of parameter {name} does not add up to its {whole} entries along dimension {dim}"
        )
    if "split" not in split and (parts < 1 or whole % parts):
        raise ValueError(f"{parts} heads do not divide the {whole} entries of parameter {name} along dimension {dim}")


def check_spheres(splits: list[dict | None], names: list[str], tensors: list[Tensor]) -> None:
    """ValueError for a block of norm 0, which hyperball could never move."""
    for name, p, split in zip(names, tensors, splits, strict=True):
        if not p.is_meta and any(not block.any() for block in blocks(p.detach(), split)):
            raise ValueError(
                f'variant="hyperball" keeps the norm of a weight, but {name} of shape {tuple(p.shape)} is, or has a '
                f'block that is, all zero; initialise it, or put it into a group with variant="muon"'
            )

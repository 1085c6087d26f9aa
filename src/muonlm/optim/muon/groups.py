"""What a parameter group of Muon may hold: every hyper-parameter and every split is checked when the group is added.

Raises   ValueError for values and tensors that cannot work, naming them and the remedy
"""

import math
import warnings

from torch import Tensor

from ..schedule import check_momentum_schedule
from .blocks import LR_MODES, blocks
from .newton_schulz import check_method, triples
from .probe import NS_DTYPES, dtype_name
from .variants import VARIANTS


def check_group(group: dict) -> None:
    """ValueError for hyper-parameters that cannot work; rewrites dtypes and the schedule to plain, saveable values."""

    def need(condition: bool, key: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{key}={group[key]!r} in group {group['name']!r} is not allowed; use {fix}")

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
    need(group["momentum_form"] in ("ema", "classical"), "momentum_form", '"ema" or "classical"')
    need(callable(group["lr_mode"]) or group["lr_mode"] in LR_MODES, "lr_mode", f"one of {', '.join(LR_MODES)}")
    need(math.isfinite(group["rms_target"]) and group["rms_target"] > 0.0, "rms_target", "a number > 0, e.g. 0.2")
    need(group["max_batch_bytes"] > 0, "max_batch_bytes", "a number of bytes > 0")
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
        group["ns_dtype"] = dtype_name(group["ns_dtype"], "ns_dtype")
    if group["ns_method"] != "auto":
        check_method(group["ns_method"], group["coefficients"], NS_DTYPES.get(group["ns_dtype"]))
    if group["state_dtype"] is not None:
        group["state_dtype"] = dtype_name(group["state_dtype"], "state_dtype")
    if group["momentum_schedule"] is not None:
        check_momentum_schedule(group["momentum_schedule"])
        group["momentum_schedule"] = [(int(step), float(mu)) for step, mu in group["momentum_schedule"]]
    if not group["decoupled_wd"] and group["weight_decay"]:
        need(not group["cautious"], "cautious", "False with decoupled_wd=False")
        warnings.warn(
            "decoupled_wd=False adds wd * W to the gradient, whose size Newton-Schulz forgets: wd is then no rate of decay. "
            "Use decoupled_wd=True unless you must repeat an old run.",
            stacklevel=4,
        )


def check_splits(given: list[dict | None] | None, names: list[str], tensors: list[Tensor]) -> list[dict | None]:
    """One checked split per parameter of a Muon group, from `given` or else from the parameters' tags."""
    if given is None:
        cuts = ("split", "heads", "flatten", "adamw", "transposed")
        tags = [getattr(p, "muonlm", None) or {} for p in tensors]
        given = [{key: tag[key] for key in cuts if key in tag} for tag in tags]
        for split in given:
            if "split" in split:
                split.pop("heads", None)  # a tag may offer both; single heads are asked of `route`
        given = [split or None for split in given]
    if len(given) != len(tensors):
        raise ValueError(f"splits has {len(given)} entries for {len(tensors)} parameters; give one (or None) for each")
    for name, p, split in zip(names, tensors, given, strict=True):
        if p.ndim < 2 or p.numel() == 0:
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} is no matrix, so it has no orthogonal factor; "
                             f"put it into a group with use_muon=False (a sharded, flattened matrix must be gathered first)")  # fmt: skip
        if p.ndim == 2 and min(p.shape) == 1:
            warnings.warn(f"parameter {name} of shape {tuple(p.shape)} is a vector: Muon just normalises it; AdamW suits it better "
                          f"(use_muon=False)", stacklevel=5)  # fmt: skip
        flat = p.ndim > 3 or bool(split and split.get("flatten"))
        if flat and not p.is_contiguous():
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} is not contiguous, so it cannot be seen as a matrix; "
                             f"call .contiguous() on it (no channels_last), or set use_muon=False")  # fmt: skip
        if not split or not ("split" in split or "heads" in split):
            continue
        if flat:
            raise ValueError(
                f"parameter {name} of shape {tuple(p.shape)} is flattened and cannot be split; remove its split"
            )
        dim, parts = split.get("split") or split["heads"]
        if not p.ndim - 2 <= dim < p.ndim:
            raise ValueError(f"the split of parameter {name} is along dimension {dim} of shape {tuple(p.shape)}; "
                             f"use {p.ndim - 2} or {p.ndim - 1}")  # fmt: skip
        whole = p.shape[dim]
        if "split" in split and (sum(parts) != whole or min(parts) < 1):
            raise ValueError(f"the split {list(parts)} of parameter {name} does not add up to its {whole} entries along "
                             f"dimension {dim}")  # fmt: skip
        if "split" not in split and (parts < 1 or whole % parts):
            raise ValueError(
                f"{parts} heads do not divide the {whole} entries of parameter {name} along dimension {dim}"
            )
    return given


def check_spheres(splits: list[dict | None], names: list[str], tensors: list[Tensor]) -> None:
    """ValueError for a block of norm 0, which hyperball could never move."""
    for name, p, split in zip(names, tensors, splits, strict=True):
        if not p.is_meta and any(not block.any() for block in blocks(p.detach(), split)):
            raise ValueError(f'variant="hyperball" keeps the norm of a weight, but {name} of shape {tuple(p.shape)} is, or has a '
                             f'block that is, all zero; initialise it, or put it into a group with variant="muon"')  # fmt: skip

"""Optimizer state as tensors named by parameter, whatever the order, the grouping or the number of ranks.

    tensors, meta = named_state(optimizer, model)        "blocks.0.attn.qkv.weight/momentum_buffer" -> whole tensor
    load_named_state(optimizer, model, tensors, meta)    bit for bit, also on another number of ranks; meta is JSON-able
    load_torch_state(optimizer, *olds, step=1000)        a run of torch.optim.Muon (and AdamW) goes on in Muon

Ranks    under a distributed Muon both are collective calls. The tensors arrive on rank 0, one by one (it needs room for
         the whole state, the others for one tensor), and the other ranks get an empty dict; `meta` is equal on all.
         To load, every rank brings all tensors, as read from the file, and keeps what it owns, or its shard.
         `optimizer.state_dict()` is a rank's own part instead: good for the same number of ranks with one file a rank.
         torch.distributed.checkpoint can save it under FSDP2, where momenta are DTensors (variant="muon").
Asked    of the optimizer, all three optional, since those of torch have none: `state_layout(p, group)` -> {key: (shape,
         dtype)}, else AdamW's; `group_state`, the keys that a group remembers; `owners()`, the groups of ranks that
         share the state
Raises   UserError, before anything is changed, for state that does not fit, naming the tensor and the remedy
"""

import math

import torch
from torch import Tensor, nn

from muonlm.errors import UserError

from . import adamw
from .muon.groups import names_of
from .muon.muon import Muon
from .tensors import Kept, is_sharded, sharded_like


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """({"<parameter>/<key>": tensor}, meta). The tensors may be the optimizer's own: save them before stepping on."""
    names = _names(optimizer, model)
    spread = _owners(optimizer)
    tensors = {f"{name}/{key}": value for name, p in names.items() for key, value in optimizer.state.get(p, {}).items()}
    assert all(isinstance(value, Tensor) for value in tensors.values())
    groups = {g["name"]: _copied(g, optimizer) for g in optimizer.param_groups}
    listed = list(tensors)
    for owners in spread:
        tensors, listed = _gathered(owners, names, tensors, listed)
    if any(owners.rank for owners in spread):
        tensors = {}
    return tensors, {
        "optimizer": type(optimizer).__name__,
        "parameters": sorted(names),
        "tensors": sorted(listed),
        "groups": groups,
    }


def _gathered(
    owners, names: dict[str, nn.Parameter], tensors: dict[str, Tensor], listed: list[str]
) -> tuple[dict, list]:
    """(`tensors` with shards joined and owned ones fetched, on rank 0; elsewhere what has no owner here; all names)."""
    joined = {}
    for full in sorted(full for full in tensors if is_sharded(tensors[full])):
        shard, dtype = tensors[full], tensors[full].dtype
        wide = shard.to(torch.int32) if dtype == torch.int16 else shard  # no backend gathers int16
        assert is_sharded(wide)
        whole = wide.full_tensor()
        joined[full] = whole.to("cpu", dtype) if owners.rank == 0 else None
    mine = {
        full: t for full, t in tensors.items() if full not in joined and owners.owns(names[full.rpartition("/")[0]])
    }
    fetched, held = owners.gather(mine)
    owned = {full for full in tensors if names[full.rpartition("/")[0]] in owners.owner}
    rest = {full: t for full, t in tensors.items() if full not in joined and full not in owned}
    return (rest | joined | fetched if owners.rank == 0 else rest), sorted({*joined, *rest, *held, *listed})


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], meta: dict
) -> None:
    """The inverse of `named_state`, for an optimizer over the same parameters; nothing changes if a name is wrong."""
    names = _names(optimizer, model)
    if meta["optimizer"] != type(optimizer).__name__:
        raise UserError(
            f"the checkpoint holds {meta['optimizer']} state, this run uses {type(optimizer).__name__}; "
            f"resume with the same `name`, or start a new run from its weights"
        )
    _same("parameter", names, meta["parameters"])
    _same("optimizer tensor", tensors, meta["tensors"])
    _same("group", [g["name"] for g in optimizer.param_groups], meta["groups"])
    layouts = _layouts(optimizer)
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in names:
            raise UserError(f"the checkpoint's optimizer tensor {full} belongs to no parameter of this run")
        layout = layouts[names[name]]
        if key not in layout:
            raise UserError(
                f"the checkpoint's {full} does not fit: {name} now keeps {', '.join(layout)}; resume with the same "
                f"routes and the same variant of the optimizer"
            )
        if value.shape != layout[key][0]:
            raise UserError(
                f"the checkpoint's {full} has shape {tuple(value.shape)}, this run needs {layout[key][0]}; "
                f"resume with the same model and routing"
            )
    for group in optimizer.param_groups:
        group.update(_copied(meta["groups"][group["name"]], optimizer))
    spread = _owners(optimizer)
    optimizer.state.clear()
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        p = names[name]
        if is_sharded(p) and value.shape == p.shape and value.ndim:
            optimizer.state[p][key] = sharded_like(p, value)
        elif all(p not in owners.owner or owners.owns(p) for owners in spread):
            optimizer.state[p][key] = value.to(p.device, copy=True)


@torch.no_grad()
def load_torch_state(optimizer: Muon, *olds: torch.optim.Optimizer, step: int) -> None:
    """Give `optimizer` the buffers of torch.optim.Muon, and of torch.optim.AdamW beside it, over the same parameters.

    olds   with their own states loaded; a parameter without state in them (it never had a gradient) starts from zero
    step   optimizer steps that were done: momentum schedules count from there

    torch's momentum is the EMA form, in the dtype of the gradients; ours is widened to fp32. Second moments of variants
    start from zero. On many ranks: load on one, save with `named_state`.
    """
    if optimizer.replicas or optimizer.shards:
        raise UserError("the state of torch.optim is loaded on one process; save it with named_state, then distribute")
    found = {p: old.state.get(p, {}) for old in olds for group in old.param_groups for p in group["params"]}
    layouts, loaded = _layouts(optimizer), {}
    for group in optimizer.param_groups:
        if group["use_muon"] and group["momentum_form"] != "ema":
            raise UserError('torch.optim.Muon averages gradients; use momentum_form="ema" to go on with its momentum')
        for p, name in zip(group["params"], names_of(group), strict=True):
            if p not in found:
                raise UserError(f"parameter {name} is in none of the optimizers given; add the one that trained it")
            layout = layouts[p]
            needed = layout.keys() - {"second_momentum", "mantissa"}
            if found[p] and (found[p].keys() != needed or any(found[p][key].shape != layout[key][0] for key in needed)):
                raise UserError(
                    f"parameter {name} was trained with {', '.join(found[p])}, and keeps {', '.join(sorted(needed))} "
                    f"now; leave its optimizer out and let it start anew, or route it as before"
                )
            loaded[p] = found[p]
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if group["use_muon"] and loaded[p]:
                optimizer.new_state(p, group["splits"][i], group)
                optimizer.state[p]["momentum_buffer"].copy_(loaded[p]["momentum_buffer"])
            elif loaded[p]:
                optimizer.state[p] = {key: value.to(p.device, copy=True) for key, value in loaded[p].items()}
        if group["use_muon"]:
            group["step"] = step


def _layouts(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Kept]]:
    """Per parameter the keys that its state may have, with shape and dtype."""
    layout = getattr(optimizer, "state_layout", lambda p, group: adamw.layout(p))
    return {p: layout(p, group) for group in optimizer.param_groups for p in group["params"]}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of the whole state once every parameter has stepped; counters of steps are not counted."""
    layouts = _layouts(optimizer)
    return sum(
        dtype.itemsize * math.prod(shape) for kept in layouts.values() for shape, dtype in kept.values() if shape
    )


def _owners(optimizer: torch.optim.Optimizer) -> list:
    return getattr(optimizer, "owners", list)()


def _copied(group: dict, optimizer: torch.optim.Optimizer) -> dict:
    """What a group remembers."""
    kept = {key: group[key] for key in getattr(optimizer, "group_state", ()) if key in group}
    return {key: dict(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for everything the optimizer trains; a tied tensor goes by its first name in the model."""
    of = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(id(p) in of for p in params), "the optimizer trains a tensor that is not in this model"
    assert all("name" in group for group in optimizer.param_groups), "state is keyed by group name; use build_optimizer"
    return {of[id(p)]: p for p in params}


def _same(what: str, found, expected) -> None:
    fix = "resume with the same model and routing, from a complete checkpoint"
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"the checkpoint's {what} {missing[0]!r} is missing here ({len(missing)} in all); {fix}")
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"the {what} {extra[0]!r} is not in the checkpoint's list ({len(extra)} in all); {fix}")

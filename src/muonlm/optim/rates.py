"""Moving a run between Muon implementations: learning rates between lr modes, optimizer state between layouts.

Rates.  RMS of an update = lr s(A, B) / sqrt(max(A, B)), s of muon.py; AdamW's own lr counts as match_rms_adamw's
    r = s_from(A, B) / s_to(A, B),   lr_new = lr r,   wd_new = wd / r         same update RMS, same shrinkage lr wd
    convert_lr(0.02, 0.05, (768, 768), "original", "match_rms_adamw")          # (0.003608..., 0.277128...)
    nanochat alone decays by the shape-adjusted lr: give it wd * shape_factor("original", A, B).

State.  Each layout is read into and written from one form: parameter name -> whole tensors, on the CPU, at least fp32
    {"momentum_buffer": as p, "second_momentum": (A, 1) | (1, B)}              trained by Muon (a variant's: flat)
    {"exp_avg": as p, "exp_avg_sq": as p, "step": ()}                          trained by AdamW
    momentum_buffer is the EMA form M <- mu M + (1 - mu) G. Classical layouts keep C <- mu C + G, and M = (1 - mu) C;
    the factor is applied in fp64, so A -> B -> A is off by at most one unit in the last place (normal numbers).
    Muon entries hold "step" too where the layout knows it.

Into muonlm (old: the foreign optimizer, built as it was; without it, write its order of names yourself):
    names = parameter_names(old, model)
    state = to_muonlm(torch.load("old.pt"), "dion", model, names=names)        # distributed: a list, one dict per rank
    optimizer = Muon(groups, lr=...)
    optimizer.load_state_dict(from_muonlm(state, "muonlm", model, optimizer))

Out of muonlm:
    state = to_muonlm(optimizer, "muonlm", model)
    old = ForeignMuon(model.parameters(), lr=...)                              # gives groups and hyper-parameters
    old.load_state_dict(from_muonlm(state, "moonlight", model, old))           # ranks=8 (keller, nanochat): 8 dicts

layout      momentum, form              second moment            AdamW
torch       momentum_buffer, EMA        -                        exp_avg, exp_avg_sq, step
keller      momentum_buffer, EMA        -                        exp_avg, exp_avg_sq, step
moonlight   momentum_buffer, classical  -                        moment1, moment2, step
dion        momentum, classical         variance_neuron          momentum, variance; step in the group
nanochat    momentum_buffer, EMA        second_momentum_buffer   exp_avg, exp_avg_sq, step
muonlm      momentum_buffer, group's    second_momentum          exp_avg, exp_avg_sq, step      Muon.state_dict()

torch       torch.optim.Muon and torch.optim.AdamW: one call each; join what you read with |
keller      KellerJordan/Muon: distributed, a buffer is in its owner's file only, and matrices are sorted by size
moonlight   use_muon is kept inside the state
dion        Muon and NorMuon; shards along dim 0 may come as DTensor or as a list of ranks
nanochat    matrices of a group are stacked (K, A, B) at its first parameter, in chunks of ceil(K / ranks), zero padded

The mu of the factor is that of the NEXT step: training then goes on exactly as it would have, for as long as mu stays
constant. With `momentum` a schedule [(step, mu), ...] and mu moving near or after `step`, one warning is given.

Raises   UserError, naming the tensor and the remedy: missing buffers, other shapes, a wrong order of names, ranks that
         contradict each other, unknown names of layouts, modes and parameters
Warns    of a form conversion under a momentum schedule, and of state that the target cannot hold
Source   the state dicts of torch.optim, KellerJordan/Muon, MoonshotAI/Moonlight, microsoft/dion and karpathy/nanochat
         (optim.py, one optimizer for all; its older DistMuon is "keller")
"""

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from muonlm.config.spelling import nearest
from muonlm.errors import UserError

from .muon.blocks import LR_MODES, block_shapes, shape_factor
from .muon.variants import second_momentum_size
from .schedule import check_momentum_schedule, momentum_at

MODES = (*LR_MODES, "adamw")
SHARDED_FROM = 1024  # nanochat splits the AdamW state of a tensor over its ranks from so many elements on


@dataclass(frozen=True)
class Layout:
    """Under which keys a project keeps what; `mu` is the key of its groups."""

    momentum: str = "momentum_buffer"
    mu: str = "momentum"
    classical: bool = False
    second: str | None = None
    adam: tuple[str, str] = ("exp_avg", "exp_avg_sq")
    tensor_step: bool = False  # AdamW's step is a 0-d tensor, not an int


LAYOUTS = {
    "torch": Layout(tensor_step=True),
    "keller": Layout(),
    "moonlight": Layout(classical=True, adam=("moment1", "moment2")),
    "dion": Layout("momentum", mu="mu", classical=True, second="variance_neuron", adam=("momentum", "variance")),
    "nanochat": Layout(second="second_momentum_buffer"),
    "muonlm": Layout(second="second_momentum", tensor_step=True),
}


# ------------------------------------------------------------------------------------------------ learning rates


def convert_lr(
    lr: float, wd: float, shape: Sequence[int], from_mode: str, to_mode: str, rms_target: float = 0.2
) -> tuple[float, float]:
    """(lr, wd) that move a tensor of `shape` in `to_mode` as (lr, wd) do in `from_mode`: same update RMS, same lr * wd.

    shape   (out, in) as nn.Linear stores it; of 3-D tensors the last two count, convolutions are flattened;
            for a tensor that is orthogonalised in blocks, the shape of the block
    modes   original, match_rms_adamw, spectral, none, adamw (lr and wd of AdamW itself)
    """
    for key, value in (("lr", lr), ("wd", wd)):
        if not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"{key}={value} cannot be converted; use a finite number >= 0")
    if not (math.isfinite(rms_target) and rms_target > 0.0):
        raise UserError(f"rms_target={rms_target} is no update RMS; use a number > 0, e.g. 0.2")
    shape = tuple(shape)
    if len(shape) < 2 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise UserError(f"shape {shape} is no matrix; give (rows, columns) as nn.Linear stores them, e.g. (768, 3072)")
    A, B = shape[-2:] if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))
    s = {}
    for mode in (from_mode, to_mode):
        if mode not in MODES:
            raise UserError(f"unknown lr mode {mode!r}.{_hint(mode, MODES)}")
        s[mode] = shape_factor("match_rms_adamw" if mode == "adamw" else mode, A, B, rms_target)
    ratio = s[from_mode] / s[to_mode]
    return lr * ratio, wd / ratio


# ------------------------------------------------------------------------------------------------ state


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in the order of its groups, as its state_dict numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if strange := [i for i, p in enumerate(params) if id(p) not in names]:
        raise UserError(
            f"parameter {strange[0]} of the optimizer, of shape {tuple(params[strange[0]].shape)}, is not in the "
            "model; give the model that the optimizer was built for"
        )
    return [names[id(p)] for p in params]


def to_muonlm(
    source,
    layout: str,
    model: nn.Module,
    *,
    names: Sequence[str] | None = None,
    momentum: float | Sequence[tuple[int, float]] | None = None,
    step: int | None = None,
    fresh: Collection[str] = (),
) -> dict[str, dict[str, Tensor]]:
    """{parameter name: state} of the module docstring, out of a state dict in one of the layouts.

    source    an optimizer, its state_dict(), or a list of the state dicts of all ranks, in rank order
    names     parameter names in the order of the source's groups; not needed if the source knows them
    momentum  instead of the mu in the groups; a schedule [(step, mu), ...] if there was one, with `step` = steps done
    fresh     names that may lack state (they never had a gradient); they are left out and start from zero
    """
    spec = _layout(layout)
    ranks = list(source) if isinstance(source, (list, tuple)) else [source]
    if not ranks:
        raise UserError("there is no state dict to read; give one, or a list with one for each rank")
    if names is None and isinstance(ranks[0], torch.optim.Optimizer):
        names = parameter_names(ranks[0], model)
    ranks = [r.state_dict() if isinstance(r, torch.optim.Optimizer) else r for r in ranks]
    for i, r in enumerate(ranks):
        if not isinstance(r, dict) or not {"state", "param_groups"} <= r.keys():
            raise UserError(f"state dict {i} is not what optimizer.state_dict() returns (no state or param_groups); "
                            f"pick the optimizer's part of the checkpoint, e.g. torch.load(path)['optimizer']")  # fmt: skip
        if [len(g["params"]) for g in r["param_groups"]] != [len(g["params"]) for g in ranks[0]["param_groups"]]:
            raise UserError(
                f"state dicts 0 and {i} have different groups; give the files of one run, one for each rank"
            )
    fresh = _known(fresh, model)
    state: dict[str, dict[str, Tensor]] = {}
    moving: set[float] = set()
    for group, members in _members(ranks[0]["param_groups"], names, model):
        stacked = _unstack(ranks, members) if layout == "nanochat" and group.get("kind") == "muon" else None
        for position, (index, name, p) in enumerate(members):
            pieces = stacked[name] if stacked else [r["state"][index] for r in ranks if index in r["state"]]
            if name in fresh and not any(isinstance(v, Tensor) for piece in pieces for v in piece.values()):
                continue
            state[name] = entry = {}
            muon = _takes_muon(layout, group, pieces[0] if pieces else {}, name)
            if muon:
                M = _whole(name, spec.momentum, pieces, p.shape, len(ranks))
                entry["momentum_buffer"] = M
                if _is_classical(spec, group):
                    entry["momentum_buffer"] = _ema(M, _mu(momentum, step, group, spec, moving))
                if spec.second and any(spec.second in piece for piece in pieces):
                    entry["second_momentum"] = _second(layout, group, position, name, p, pieces, len(ranks))
            else:
                for key, theirs in zip(("exp_avg", "exp_avg_sq"), spec.adam, strict=True):
                    entry[key] = _whole(name, theirs, pieces, p.shape, len(ranks))
            if (count := _step(layout, group, pieces, name, muon)) is not None:
                entry["step"] = count
            if layout == "muonlm":  # what a variant or an AdamW slice keeps beside
                beside = {
                    k: v for piece in pieces for k, v in piece.items() if k not in entry and isinstance(v, Tensor)
                }
                entry |= {k: v.to("cpu", copy=True) for k, v in beside.items()}
    _warn_of_schedule(moving)
    return state


def from_muonlm(
    state: dict[str, dict[str, Tensor]],
    layout: str,
    model: nn.Module,
    like,
    *,
    names: Sequence[str] | None = None,
    momentum: float | Sequence[tuple[int, float]] | None = None,
    step: int | None = None,
    ranks: int | None = None,
    fresh: Collection[str] = (),
):
    """A state dict for `like.load_state_dict`; with `ranks`, the list of one for each rank of a distributed optimizer.

    like      the target: an optimizer (or its state_dict()), freshly built; its groups and hyper-parameters are kept
    names, momentum, step, fresh    as in to_muonlm; `step` is also set in groups that count steps
    """
    spec = _layout(layout)
    if ranks is not None and layout not in ("keller", "nanochat"):
        raise UserError(f"ranks={ranks}: all ranks of {layout!r} load the same state dict; leave ranks out")
    if ranks is not None and ranks < 1:
        raise UserError(f"ranks={ranks} is no number of processes; use 1 or more")
    if names is None and isinstance(like, torch.optim.Optimizer):
        names = parameter_names(like, model)
    target = like.state_dict() if isinstance(like, torch.optim.Optimizer) else like
    groups = [dict(group) for group in target["param_groups"]]
    fresh = _known(fresh, model)
    states: list[dict] = [{} for _ in range(ranks or 1)]
    moving: set[float] = set()
    lost, seen = [], set()
    for group, members in _members(groups, names, model):
        written, steps = {}, set()
        for position, (index, name, p) in enumerate(members):
            seen.add(name)
            if name not in state:
                if name in fresh:
                    continue
                missing = [
                    n for g, m in _members(groups, names, model) for _, n, _ in m if n not in state and n not in fresh
                ]
                raise UserError(
                    f"there is no state for {name!r} ({len(missing)} in all); join it, if another optimizer has it: "
                    f"to_muonlm(muon, …) | to_muonlm(adamw, …); or start these tensors from zero: fresh={missing!r}"
                )
            entry = state[name]
            muon = _takes_muon(layout, group, target["state"].get(index, {}), name)
            _check_entry(name, entry, p, muon)
            split = _split(group, position) if muon else None
            _check_slices(layout, name, entry, bool(split and split.get("adamw")))
            mu = _mu(momentum, step, group, spec, moving) if muon and _is_classical(spec, group) else None
            written[name], dropped = _entry_for(layout, group, entry, p, muon, mu, split)
            lost += [f"{name}/{key}" for key in dropped]
            steps |= {int(entry["step"])} if "step" in entry else set()
        for rank, index, values in _dealt(layout, group, members, written, len(states)):
            states[rank][index] = values
        if layout in ("dion", "muonlm") and "step" in group:
            _set_step(group, steps, step, layout)
    if layout != "torch" and (extra := sorted(set(state) - seen)):  # torch: Muon and AdamW are two optimizers
        raise UserError(f"{extra[0]!r} has state but is in no group of the target ({len(extra)} in all); "
                        f"add it to the optimizer, or take it out with state.pop({extra[0]!r})")  # fmt: skip
    _warn_of_schedule(moving)
    if lost:
        warnings.warn(
            f"the {layout!r} target has no place for {lost[0]} ({len(lost)} tensors in all), so it is dropped and "
            "starts from zero there; a second moment is kept by NorMuon of the same shape only",
            stacklevel=2,
        )
    dicts = [{"state": values, "param_groups": [dict(group) for group in groups]} for values in states]
    return dicts[0] if ranks is None else dicts


# ------------------------------------------------------------------------------------------------ names and groups


def _hint(word, valid: Collection[str]) -> str:
    return nearest(str(word), valid) or f" Choose one of: {', '.join(valid)}."


def _layout(layout: str) -> Layout:
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}.{_hint(layout, LAYOUTS)}")
    return LAYOUTS[layout]


def _known(names: Collection[str], model: nn.Module) -> list[str]:
    """Each as the model's first name for that tensor: a tied one has several."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in every:
            raise UserError(
                f"the model has no parameter {name!r}.{nearest(str(name), every) or ' See model.named_parameters().'}"
            )
    return [first[id(every[name])] for name in names]


def _members(groups: list[dict], names: Sequence[str] | None, model: nn.Module) -> list[tuple[dict, list[tuple]]]:
    """[(group, [(index in the state dict, name, parameter), ...]), ...]"""
    indices = [index for group in groups for index in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    elif names is None and all(isinstance(index, str) for index in indices):
        names = indices  # torch.distributed.checkpoint keys by name
    if names is None:
        raise UserError(
            "the state dict numbers its parameters and holds no names; pass names=parameter_names(old_optimizer, "
            "model), or the list of names in the order in which the optimizer was given them"
        )
    if len(names) != len(indices):
        raise UserError(
            f"names has {len(names)} entries, the groups hold {len(indices)} parameters; name each once, in the order "
            "of the groups: parameter_names(old_optimizer, model)"
        )
    names = _known(names, model)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice!r} is named twice; name each parameter once, in the order of the groups")
    params = dict(model.named_parameters())
    rest = iter([(index, name, params[name]) for index, name in zip(indices, names, strict=True)])
    return [(group, list(islice(rest, len(group["params"])))) for group in groups]


def _takes_muon(layout: str, group: dict, entry: dict, name: str) -> bool:
    if layout == "moonlight":
        if "use_muon" not in entry:
            raise UserError(
                f"Moonlight's state of {name!r} does not say use_muon; give the optimizer as its constructor leaves "
                "it, and whole state dicts, not stripped ones"
            )
        return bool(entry["use_muon"])
    if layout in ("dion", "nanochat"):
        key = "algorithm" if layout == "dion" else "kind"
        if group.get(key) not in ("muon", "normuon", "adamw"):
            raise UserError(
                f"{name!r} is in a group with {key} = {group.get(key)!r}, whose state nothing else has; convert "
                "groups of muon, normuon and adamw only, and leave the others out of the state dict"
            )
        return group[key] != "adamw"
    return bool(group["use_muon"]) if "use_muon" in group else "betas" not in group


def _split(group: dict, position: int) -> dict | None:
    """How our Muon cuts the parameter; a transposed one is still in one piece."""
    split = (group.get("splits") or {position: None})[position]
    return split if split and {"split", "heads", "flatten"} & split.keys() else None


# ------------------------------------------------------------------------------------------------ reading


def _whole(name: str, key: str, pieces: list[dict], shape: Sequence[int], ranks: int) -> Tensor:
    """One tensor from what the ranks hold of it: the same on all, on one, or shards along dim 0. At least fp32."""
    found = [piece[key] for piece in pieces if isinstance(piece.get(key), Tensor)]
    found = [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().cpu() for t in found]
    if not found:
        where = "no rank's state dict has" if ranks > 1 else "the state dict has no"
        raise UserError(
            f"{where} {key} for {name!r}; give the state dicts of all ranks ({ranks} given) of a run that has "
            f"stepped, and check the order of names; if it never had a gradient, pass fresh=[{name!r}]"
        )
    shape, t = tuple(shape), found[0]
    if t.shape == shape[:1] + (math.prod(shape[1:]),):  # Moonlight flattens convolutions
        found = [f.reshape(shape) for f in found]
    if all(f.shape == shape for f in found):
        if any(not torch.equal(f, found[0]) for f in found[1:]):
            raise UserError(f"the ranks hold different {key} for {name!r}; give the files of one step of one run")
        return _copied(found[0])
    if all(f.ndim and f.shape[1:] == shape[1:] for f in found):
        if sum(len(f) for f in found) == shape[0]:
            return _copied(torch.cat(found))
        if sum(len(f) for f in found) < shape[0]:
            raise UserError(
                f"{key} for {name!r} has {sum(len(f) for f in found)} of {shape[0]} rows: it looks like shards; give "
                f"the state dicts of all ranks, in rank order ({ranks} given)"
            )
    raise UserError(
        f"{key} for {name!r} has shape {tuple(t.shape)}, expected {shape}; names must be in the order of the "
        "optimizer's groups, which some optimizers sort by size: parameter_names(old_optimizer, model) gives it"
    )


def _copied(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32), copy=True)


def _second(layout: str, group: dict, position: int, name: str, p: Tensor, pieces: list[dict], ranks: int) -> Tensor:
    """A second moment as (A, 1) or (1, B). What muonlm keeps for split blocks or other variants stays flat."""
    key = LAYOUTS[layout].second
    v = next(piece[key] for piece in pieces if key in piece)
    if layout == "muonlm":
        v = _whole(name, key, pieces, v.shape, ranks)
        return v.view(_short_side(p)) if group["variant"] == "normuon" and _split(group, position) is None else v
    columns = v.ndim == 2 and v.shape[0] == 1 != v.shape[1]  # of one matrix: never sharded
    return _whole(name, key, pieces, v.shape if columns else (len(p), *v.shape[1:]), ranks)


def _short_side(p: Tensor) -> tuple[int, ...]:
    """Shape of NorMuon's second moment, the mean over the shorter side; a convolution counts flattened."""
    *batch, A, B = p.shape if p.ndim <= 3 else p.flatten(1).shape
    return (*batch, A, 1) if A >= B else (*batch, 1, B)


def _unstack(ranks: list[dict], members: list[tuple]) -> dict[str, list[dict]]:
    """nanochat's stacks, which hang on the group's first parameter: one piece of state per parameter, padding cut."""
    if not members:
        return {}
    first, lead, _ = members[0]
    pieces: dict[str, list[dict]] = {name: [{}] for _, name, _ in members}
    for key in ("momentum_buffer", "second_momentum_buffer"):
        chunks = [r["state"].get(first, {}).get(key) for r in ranks]
        if all(chunk is None for chunk in chunks):
            continue
        rows = math.ceil(len(members) / len(ranks))
        for i, chunk in enumerate(chunks):
            if chunk is None or len(chunk) != rows:
                raise UserError(
                    f"{key} of {lead!r} in state dict {i} should stack {rows} of the group's {len(members)} matrices "
                    f"for {len(ranks)} ranks, and has {'none' if chunk is None else len(chunk)}; give the state dicts "
                    "of all ranks, in rank order"
                )
        stack = torch.cat([chunk.detach().cpu() for chunk in chunks])
        if stack[len(members) :].count_nonzero():
            raise UserError(
                f"the padding behind {key} of {lead!r} is not zero; give the state dicts in rank order: rank 0 first"
            )
        for (_, name, _), matrix in zip(members, stack, strict=False):
            pieces[name][0][key] = matrix
    return pieces


def _step(layout: str, group: dict, pieces: list[dict], name: str, muon: bool) -> Tensor | None:
    found = {float(piece["step"]) for piece in pieces if "step" in piece}
    if not found and layout in ("dion", "muonlm") and "step" in group:
        found = {float(group["step"])}
    if not found and not muon:
        raise UserError(f"the state dict has no step for {name!r}, which AdamW needs; give a whole state dict of a run")
    if len(found) > 1:
        raise UserError(
            f"the ranks are at different steps of {name!r}: {sorted(found)}; give the files of one step of one run"
        )
    return torch.tensor(found.pop(), dtype=torch.float32) if found else None


# ------------------------------------------------------------------------------------------------ momentum forms


def _is_classical(spec: Layout, group: dict) -> bool:
    return spec.classical or group.get("momentum_form") == "classical"


def _mu(given, step: int | None, group: dict, spec: Layout, moving: set[float]) -> float:
    """mu of the next step; added to `moving` if it moves in the last 5 / (1 - mu) steps, or later."""
    schedule = group.get("momentum_schedule") if given is None else given if isinstance(given, (list, tuple)) else None
    if schedule:
        check_momentum_schedule(schedule)
        step = group.get("step") if step is None else step
        if step is None:
            raise UserError("momentum is a schedule; say where the run stands in it: step=N, the number of steps done")
        mu = momentum_at(schedule, step)
        since = max(0, step - math.ceil(5 / (1.0 - mu)))
        if any(momentum_at(schedule, at) != mu for at in (since, *(at for at, _ in schedule if at > since))):
            moving.add(mu)
        return mu
    mu = group.get(spec.mu) if given is None else given
    if mu is None:
        raise UserError(
            f"the group does not hold {spec.mu!r}, by which classical momentum is converted; pass the run's, e.g. "
            "momentum=0.95"
        )
    if not 0.0 <= mu < 1.0:
        raise UserError(f"momentum={mu} is not allowed; use a number in [0, 1), e.g. 0.95")
    return float(mu)


def _ema(classical: Tensor, mu: float) -> Tensor:
    return (classical.double() * (1.0 - mu)).to(classical.dtype)


def _classical(ema: Tensor, mu: float) -> Tensor:
    return (ema.double() / (1.0 - mu)).to(ema.dtype)


def _warn_of_schedule(moving: set[float]) -> None:
    for mu in sorted(moving)[:1]:
        warnings.warn(
            f"the momentum is under a schedule here (now {mu:g}): EMA and classical form weigh past gradients "
            "differently while it moves, so the converted direction is approximate; the error fades in about "
            f"{1 / (1 - mu):.0f} steps at constant momentum. Converting where the momentum stays constant is exact",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------ writing


def _check_entry(name: str, entry: dict, p: Tensor, muon: bool) -> None:
    need = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")
    if missing := [key for key in need if key not in entry]:
        was, now = ("AdamW", "Muon") if muon else ("Muon", "AdamW")
        raise UserError(
            f"{name!r} has no {missing[0]}: it was trained by {was}, and here it is in a group of {now}; put it into "
            f"a group of {was}, or take it out with state.pop({name!r}) and pass fresh=[{name!r}]"
        )
    for key in need:
        if key != "step" and entry[key].shape != p.shape:
            raise UserError(f"{key} of {name!r} has shape {tuple(entry[key].shape)}, the parameter {tuple(p.shape)}; "
                            f"give the model that the state belongs to")  # fmt: skip


def _check_slices(layout: str, name: str, entry: dict, wanted: bool) -> None:
    """Slices of a fused matrix that AdamW trains exist in muonlm alone."""
    there = {"momentum_buffer", "exp_avg"} <= entry.keys()
    if there and layout != "muonlm":
        raise UserError(
            f"slices of {name!r} are trained by AdamW, which {layout!r} cannot do; take it out with "
            f"state.pop({name!r}) and pass fresh=[{name!r}]"
        )
    if wanted and not there:
        raise UserError(
            f"slices of {name!r} belong to AdamW here, and the state has no moments for them; build the optimizer "
            f"without AdamW in that tensor's split, or take it out with state.pop({name!r}) and pass fresh=[{name!r}]"
        )


def _entry_for(
    layout: str, group: dict, entry: dict, p: Tensor, muon: bool, mu: float | None, split: dict | None
) -> tuple[dict, list[str]]:
    """(one parameter's state as the target names it, keys for which the target has no place)."""
    spec, out, held = LAYOUTS[layout], {}, {"step"}
    if muon:
        M = entry["momentum_buffer"] if mu is None else _classical(entry["momentum_buffer"], mu)
        out[spec.momentum] = M.flatten(1).clone() if layout == "moonlight" else M.clone()
        held.add("momentum_buffer")
        v = entry.get("second_momentum")
        if layout == "muonlm":
            wide = p.dtype if group.get("compat") or p.dtype == torch.float64 else torch.float32
            stored = group.get("state_dtype") if wide == torch.float32 else None
            out["momentum_buffer"] = M.to(getattr(torch, stored) if stored else wide, copy=True)
            if size := sum(second_momentum_size(group["variant"], A, B) for A, B in block_shapes(p.shape, split)):
                # flat, and there from the first step on: a variant that the source did not have starts from zero
                fits = (
                    v is not None
                    and v.numel() == size
                    and (v.ndim == 1 or (split is None and v.shape == _short_side(p)))
                )
                out["second_momentum"] = v.flatten().to(wide, copy=True) if fits else torch.zeros(size, dtype=wide)
                held |= {"second_momentum"} if fits else set()
        elif v is not None and v.shape == _theirs(layout, group, p):
            out[spec.second] = v.clone()
            held.add("second_momentum")
    else:
        for key, theirs in zip(("exp_avg", "exp_avg_sq"), spec.adam, strict=True):
            out[theirs] = entry[key].clone()
            held.add(key)
    if layout != "dion" and "exp_avg" in entry:
        out["step"] = entry["step"].clone() if spec.tensor_step else int(entry["step"])
    if layout == "moonlight":
        out["use_muon"] = muon
    if layout == "muonlm":
        beside = entry.keys() - held - {"second_momentum"}
        out |= {key: entry[key].clone() for key in beside}
        held |= beside
    return out, sorted(entry.keys() - held)


def _theirs(layout: str, group: dict, p: Tensor) -> tuple[int, ...] | None:
    """Shape in which the target keeps a second moment: dion by rows, nanochat over the shorter side."""
    if layout == "dion":
        return (*p.shape[:-1], 1) if group["algorithm"] == "normuon" else None
    return _short_side(p) if layout == "nanochat" else None


def _dealt(
    layout: str, group: dict, members: list[tuple], written: dict[str, dict], world: int
) -> Iterator[tuple[int, int, dict]]:
    """(rank, index, state) for all that each rank holds."""
    if not written:
        return
    owned = layout == "keller" and _takes_muon(layout, group, {}, "")
    if layout == "nanochat" and group["kind"] == "muon":
        yield from _stacked(members, written, world)
        return
    for position, (index, name, p) in enumerate(members):
        if name not in written:
            continue
        if layout == "nanochat" and world > 1 and p.numel() >= SHARDED_FROM:
            if len(p) % world:
                raise UserError(
                    f"nanochat shards the state of {name!r} along its {len(p)} rows, which {world} ranks do not "
                    "divide; use a number of ranks that does"
                )
            for rank in range(world):
                yield (
                    rank,
                    index,
                    {k: v.chunk(world)[rank].clone() if isinstance(v, Tensor) else v for k, v in written[name].items()},
                )
        else:  # KellerJordan/Muon deals the matrices of a group out in turn; all else is on every rank
            for rank in [position % world] if owned else range(world):
                yield rank, index, _cloned(written[name])


def _cloned(state: dict) -> dict:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _stacked(members: list[tuple], entries: dict[str, dict], world: int) -> list[tuple]:
    rows = math.ceil(len(members) / world)
    states: list[dict] = [{} for _ in range(world)]
    for key in ("momentum_buffer", "second_momentum_buffer"):
        found = {name: entry[key] for name, entry in entries.items() if key in entry}
        if not found:
            continue
        like = next(iter(found.values()))
        for name, value in found.items():
            if value.shape != like.shape:
                raise UserError(
                    f"nanochat stacks a group, and {name!r} has {tuple(value.shape)} among {tuple(like.shape)}; give "
                    "each shape a group of its own"
                )
        stack = torch.zeros(rows * world, *like.shape, dtype=like.dtype)
        for slot, (_, name, _) in zip(stack, members, strict=False):
            if name in found:
                slot.copy_(found[name])
        for state, chunk in zip(states, stack.split(rows), strict=True):
            state[key] = chunk.clone()
    return [(rank, members[0][0], state) for rank, state in enumerate(states) if state]


def _set_step(group: dict, found: set[int], given: int | None, layout: str) -> None:
    if len(found) > 1 and layout == "dion":
        raise UserError(f"dion counts one step for a whole group, and these parameters are at {sorted(found)}; "
                        f"put parameters of different age into groups of their own")  # fmt: skip
    if given is not None or found:
        group["step"] = max(found) if given is None else given

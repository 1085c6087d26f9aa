"""Muon: momentum orthogonalised by Newton-Schulz for matrices, AdamW for everything else, in one torch optimizer.

    G <- G + wd W                                              coupled decay only (decoupled_wd=False)
    M <- mu M + (1 - mu) G     U = (1 - mu) G + mu M           momentum_form="ema"; without Nesterov U = M
    M <- mu M + G              U = G + mu M                    momentum_form="classical"
    O  = NS(U)                                                 per block, see newton_schulz.py
    O <- variant(O)                                            normuon, adamuon, hyperball: see variants.py
    W <- (1 - lr wd) W                                         decay by the UNADJUSTED lr; cautious: only where O * W >= 0
    W <- W - lr s(A, B) O                                      A, B: shape of the block

    s(A, B)   original: sqrt(max(1, A/B)) · match_rms_adamw: rms_target sqrt(max(A, B)) · spectral: sqrt(A/B) · none: 1 ·
              or a function of (A, B)

    muon = Muon(matrices, lr=0.02)                             alone, beside any optimizer for the rest, or with mixed groups:
    Muon([dict(params=matrices, use_muon=True), dict(params=others, use_muon=False, lr=3e-4)])

Units    lr is in spectral norm per step under `original` (0.02 is usual): it is no AdamW rate. RMS(O) ~ 1/sqrt(max(A, B)), so an
         AdamW rate fits under `match_rms_adamw`; optim/convert.py translates.
Groups   dict(params=..., use_muon=True|False, name=..., lr=..., ...). A bare iterable of matrices is one Muon group. AdamW
         groups take lr, betas, eps, weight_decay and are bit for bit torch.optim.AdamW(fused=True).
Blocks   2-D: one matrix · 3-D (E, A, B): E matrices · 4-D and above (convolution): flattened to (out, -1). A parameter tag
         `p.muonlm = {"split": (dim, [sizes])}` or `{"heads": (dim, n)}`, or the group's `splits` (one entry per parameter,
         it wins over the tag), cuts a matrix into blocks. {"flatten": True} treats a 3-D tensor like a convolution;
         {"transposed": True} says that it is stored (in, out), so that s takes (B, A); "adamw": [i, ...] beside "split" leaves
         those slices to AdamW, by group["slices"] = dict(lr_ratio=..., betas=..., eps=..., weight_decay=...).
         Blocks of equal shape share one batched Newton-Schulz, within `max_batch_bytes`.
Memory   a step needs, beyond the state, about 4 x max_batch_bytes, or 4 x 4 bytes an entry of the largest parameter
State    Muon: `momentum_buffer` (fp32, or `state_dtype`; fp64 for fp64 parameters), variants `second_momentum`; bf16 parameters
         `mantissa`, the 16 bits that make them as exact as fp32 ones (param_dtype_comp=False: rounded each step instead).
         AdamW: `exp_avg`, `exp_avg_sq`, `step`. In the group: `step`, `ns_chosen` {"128x512": "hybrid bfloat16"}, what "auto"
         chose, kept so that a resumed run repeats it, and `ns_budget` {block name: steps} where diagnostics set one.
Counters `ns_calls`: number of blocks orthogonalised in the last step, for a check that Muon is really at work.
Raises   ValueError for bad hyper-parameters and for tensors that have no polar factor, naming the tensor and the remedy.
         A non-finite gradient is not looked for (that would stall a GPU): it makes the weights NaN, so check the loss first.
Source   Keller Jordan, github.com/KellerJordan/Muon; classical momentum, match_rms_adamw: Liu et al., arXiv 2502.16982; cautious
         decay: Chen et al., arXiv 2510.12402. `compat="torch"`: torch.optim.Muon bit for bit, with its defaults and names.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .newton_schulz import check_method, iterate, orthogonalise, triples
from .probe import NS_DTYPES, choose, dtype_name
from .schedule import check_momentum_schedule, momentum_at
from .variants import VARIANTS, adapt, second_momentum_size, stay_on_sphere

LR_MODES = ("original", "match_rms_adamw", "spectral", "none")
ADAMW_DEFAULTS = {"betas": (0.9, 0.95), "eps": 1e-10}
TORCH_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.1}  # of torch.optim.Muon, for compat="torch"
DEFAULTS = {"lr": 0.02, "weight_decay": 0.0}


def shape_factor(lr_mode: str | Callable[[int, int], float], A: int, B: int, rms_target: float = 0.2) -> float:
    """s(A, B) of the module docstring, for a block of A rows (fan out) and B columns (fan in)."""
    match lr_mode:
        case "original":
            return math.sqrt(max(1.0, A / B))
        case "match_rms_adamw":
            return rms_target * math.sqrt(max(A, B))
        case "spectral":
            return math.sqrt(A / B)
        case "none":
            return 1.0
    if callable(lr_mode):
        return float(lr_mode(A, B))
    raise ValueError(f"unknown lr_mode {lr_mode!r}: use one of {', '.join(LR_MODES)}")


def blocks(t: Tensor, split: dict | None) -> list[Tensor]:
    """The matrices of a parameter (or of its gradient or momentum) as 2-D views, in a fixed order."""
    split = split or {}
    if t.ndim > 3 or split.get("flatten"):
        return [t.flatten(1)]
    matrices = [t] if t.ndim == 2 else list(t.unbind(0))
    if "split" in split:
        dim, sizes = split["split"]
    elif "heads" in split:
        dim, sizes = split["heads"][0], t.shape[split["heads"][0]] // split["heads"][1]
    else:
        return matrices
    return [block for matrix in matrices for block in matrix.split(sizes, dim - t.ndim)]


@dataclass
class _Block:
    """One matrix of the current step; all views have the parameter's orientation."""

    name: str
    weight: Tensor  # where - lr s O is added: the parameter, or its fp32 twin
    grad: Tensor
    momentum: Tensor  # fp32 after this step's update
    second: Tensor | None  # flat, state of the variant
    factor: float
    steps: int


@dataclass
class Observation:
    """What diagnostics see of one batch in a sampled step, before the weights change."""

    names: list[str]
    U: Tensor  # (N, m, n), wide: the input of Newton-Schulz at any scale
    O: Tensor  # (N, m, n), wide: its result before s(A, B) and before the variant
    weights: list[Tensor]
    factors: list[float]
    lr: float
    weight_decay: float
    step: int


class Muon(torch.optim.Optimizer):
    """See the module docstring. Hyper-parameters given here are the defaults of every group that does not set its own.

    lr, weight_decay   0.02 and 0.0 if left out (compat="torch": 1e-3 and 0.1)
    ns_method          "auto" picks among direct, hybrid and gram by a probe; ns_dtype "auto" among fp32 and bf16
    rms_target         of match_rms_adamw and adamuon; sqrt((1 - b1) / (1 + b1)) of the AdamW to match is another choice
    wd_follows_lr      wd_t = wd lr_t / lr_0, with lr_0 the group's first lr (its "base_lr" or "initial_lr" if set)
    none_grad          a parameter without gradient is skipped, or ("zero") treated as if it had a zero one
    diagnostics        see optim/diagnostics.py
    """

    def __init__(
        self,
        params_or_groups: Iterable,
        lr: float | Tensor | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float | None = None,
        *,
        momentum_form: str = "ema",
        momentum_schedule: list[tuple[int, float]] | None = None,
        decoupled_wd: bool = True,
        cautious: bool = False,
        wd_follows_lr: bool = False,
        ns_steps: int = 5,
        coefficients: str | list[tuple[float, float, float]] = "polar_express",
        ns_method: str = "auto",
        ns_dtype: str | torch.dtype = "auto",
        lr_mode: str | Callable[[int, int], float] = "original",
        rms_target: float = 0.2,
        variant: str = "muon",
        beta2: float = 0.95,
        adamuon_sign: bool = True,
        batch_by_shape: bool = True,
        max_batch_bytes: int = 64 * 2**20,
        compile: bool = False,
        state_dtype: str | torch.dtype | None = None,
        param_dtype_comp: bool = True,
        none_grad: str = "skip",
        diagnostics=None,
        compat: str | None = None,
        ns_coefficients: tuple[float, float, float] | None = None,
        adjust_lr_fn: str | None = None,
    ):
        if compat not in (None, "torch"):
            raise ValueError(
                f'compat={compat!r} is unknown; use compat="torch" for the arithmetic of torch.optim.Muon, or None'
            )
        if compat is None and (ns_coefficients is not None or adjust_lr_fn is not None):
            raise ValueError(
                'ns_coefficients and adjust_lr_fn are names of torch.optim.Muon; here they are coefficients=[(a, b, c)] and '
                'lr_mode="original" or "match_rms_adamw" (or pass compat="torch")'
            )
        base = DEFAULTS
        if compat == "torch":
            base = TORCH_DEFAULTS
            coefficients = [tuple(ns_coefficients)] if ns_coefficients else "keller"
            ns_method, ns_dtype, lr_mode = "direct", "bfloat16", adjust_lr_fn or lr_mode
        muon = {
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "momentum_schedule": momentum_schedule,
            "decoupled_wd": decoupled_wd,
            "cautious": cautious,
            "wd_follows_lr": wd_follows_lr,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "ns_method": ns_method,
            "ns_dtype": ns_dtype,
            "lr_mode": lr_mode,
            "rms_target": rms_target,
            "variant": variant,
            "beta2": beta2,
            "adamuon_sign": adamuon_sign,
            "batch_by_shape": batch_by_shape,
            "max_batch_bytes": max_batch_bytes,
            "compile": compile,
            "state_dtype": state_dtype,
            "param_dtype_comp": param_dtype_comp,
            "none_grad": none_grad,
            "compat": compat,
            "step": 0,
            "ns_chosen": {},
            "ns_budget": {},
        }
        self.ns_calls = 0
        self.diagnostics = diagnostics
        defaults = {
            "lr": base["lr"] if lr is None else lr,
            "weight_decay": base["weight_decay"] if weight_decay is None else weight_decay,
            "muon": muon,
            "adamw": dict(ADAMW_DEFAULTS),
        }
        super().__init__(params_or_groups, defaults)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("ns_calls", 0)
        self.__dict__.setdefault("diagnostics", None)

    # ---------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict) -> None:
        group = dict(param_group)
        params = group["params"]
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        group.setdefault("name", f"group{len(self.param_groups)}")
        names = [p[0] if isinstance(p, tuple) else f"#{i} of group {group['name']!r}" for i, p in enumerate(params)]
        if group["name"] in {g["name"] for g in self.param_groups}:
            raise ValueError(f"two groups are named {group['name']!r}; give each a name of its own")
        if "use_muon" not in group:
            for name, p in zip(names, tensors, strict=True):
                if p.ndim != 2:
                    raise ValueError(f"parameter {name} has shape {tuple(p.shape)} and its group does not say how to train it; "
                                     f"set use_muon=True or use_muon=False, or let muonlm.optim.route decide")  # fmt: skip
            group["use_muon"] = True
        for name, p in zip(names, tensors, strict=True):
            if not p.is_floating_point():
                raise ValueError(f"parameter {name} is {p.dtype}; Muon and AdamW train real floating-point tensors only, "
                                 f"so leave it out of the groups")  # fmt: skip
        own, other = ("muon", "adamw") if group["use_muon"] else ("adamw", "muon")
        if stray := sorted(set(group) & set(self.defaults[other])):
            raise ValueError(f"group {group['name']!r} has use_muon={group['use_muon']} but sets {', '.join(stray)}, "
                             f"which only {other} groups take; remove it or change use_muon")  # fmt: skip
        if not group["use_muon"] and "lr" not in group:
            raise ValueError(
                f"AdamW group {group['name']!r} has no lr; set one, e.g. lr=3e-4: a Muon lr is no AdamW lr"
            )
        shared = {key: self.defaults[key] for key in ("lr", "weight_decay")}
        for key, value in (shared | self.defaults[own]).items():
            group.setdefault(key, dict(value) if isinstance(value, dict) else value)
        _check_group(group)
        if group["use_muon"]:
            group["splits"] = _splits(group.get("splits"), names, tensors)
            if any(split and split.get("adamw") for split in group["splits"]) and "slices" not in group:
                raise ValueError(f"group {group['name']!r} leaves slices to AdamW but does not say how; set slices=dict(lr_ratio="
                                 f"adamw_lr / muon_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)")  # fmt: skip
        super().add_param_group(group)
        for key in ("muon", "adamw"):
            del self.param_groups[-1][key]

    def load_state_dict(self, state_dict: dict) -> None:
        splits = [group.get("splits") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, split in zip(self.param_groups, state_dict["param_groups"], splits, strict=True):
            # torch casts floating state to the parameter's dtype, lossy for bf16 weights, and leaves `step` where it was
            keys = ("momentum_buffer", "second_momentum", "exp_avg", "exp_avg_sq") if group["use_muon"] else ()
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key in (*keys, "step"):
                    if key in state_dict["state"].get(index, ()):
                        self.state[p][key] = state_dict["state"][index][key].to(p.device, copy=True)
            if group["use_muon"]:
                group["splits"] = split  # belongs to the model at hand, not to the file

    # ---------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None):
        """One step of every group; parameters without a gradient are left alone. Returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.ns_calls = 0
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group)
            else:
                self._adamw_step(group)
        return loss

    def choose_methods(self) -> list[dict[str, str]]:
        """Decide every "auto" now instead of at the first step; returns the groups' own dicts of choices.

        Ranks that hold the same parameters must take rank 0's choices, or their weights drift apart: broadcast and update.
        """
        choices = []
        for group in (g for g in self.param_groups if g["use_muon"] and not g["compat"]):
            counts = defaultdict(int)
            for p, split in zip(group["params"], group["splits"], strict=True):
                dtype = p.dtype if p.dtype == torch.float64 else torch.float32
                for A, B in (block.shape for block in blocks(p, split)):
                    counts[A, B, dtype, p.device] += 1
            for (A, B, dtype, device), count in counts.items():
                choose(group, A, B, count, dtype, device)
            choices.append(group["ns_chosen"])
        return choices

    def _muon_step(self, group: dict) -> None:
        if group["momentum_schedule"] is not None:
            group["momentum"] = momentum_at(group["momentum_schedule"], group["step"])
        group["step"] += 1
        found = []
        for p, split, name in zip(group["params"], group["splits"], _names(group), strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"parameter {name} of shape {tuple(p.shape)} has a sparse gradient, which Newton-Schulz cannot "
                                 f"use; route it to AdamW or use sparse=False")  # fmt: skip
            if p.grad is not None or group["none_grad"] == "zero":
                found.append((p, torch.zeros_like(p) if p.grad is None else p.grad, split, name))
        if found:
            twins = self._twins(group, [p for p, *_ in found])
            weights = [twins.get(p, p) for p, *_ in found]
            work = self._momentum(group, found, weights)
            self._update(group, work)
            for p, twin in twins.items():
                _store(p, self.state[p]["mantissa"], twin)

    def _twins(self, group: dict, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """fp32 twins of bf16 parameters, made of their 16 bits and the 16 of `mantissa`."""
        if not group["param_dtype_comp"] or group["compat"]:
            return {}
        twins = {}
        for p in params:
            if p.dtype == torch.bfloat16:
                state = self.state[p]
                if "mantissa" not in state:
                    state["mantissa"] = torch.zeros_like(p, dtype=torch.int16)
                bits = p.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
                twins[p] = bits.add_(state["mantissa"]).view(torch.float32)
        return twins

    def _momentum(self, group: dict, found: list[tuple], weights: list[Tensor]) -> list[_Block]:
        """Update the momentum of all parameters and cut everything into blocks; AdamW slices are stepped here and left out."""
        mu, coupled = group["momentum"], not group["decoupled_wd"] and group["weight_decay"]
        momenta, grads = [], []
        for p, grad, split, _ in found:
            state = self.state[p]
            if "momentum_buffer" not in state:
                self._new_state(p, split, group)
            M = state["momentum_buffer"]
            wide = M.dtype if M.dtype not in (torch.bfloat16, torch.float16) or group["compat"] else torch.float32
            momenta.append(M.to(wide))
            grads.append(grad.to(wide))
        if coupled:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if group["momentum_form"] == "ema":
            torch._foreach_lerp_(momenta, grads, 1.0 - mu)
        else:
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, grads)

        work = []
        for (p, _, split, name), weight, G, M in zip(found, weights, grads, momenta, strict=True):
            state = self.state[p]
            if M is not state["momentum_buffer"]:
                state["momentum_buffer"].copy_(M)
            pieces = list(zip(blocks(weight, split), blocks(G, split), blocks(M, split), strict=True))
            aux = (split or {}).get("adamw", ())
            if aux:
                self._slices_step(group, state, split, [pieces[i][:2] for i in aux])
            transposed, start = bool(split and split.get("transposed")), 0
            for i, (w, g, m) in enumerate(pieces):
                if i in aux:
                    continue
                A, B = w.shape
                second = None
                if size := second_momentum_size(group["variant"], A, B):
                    second = state["second_momentum"][start : start + size]
                    start += size
                block = f"{name}[{i}]" if len(pieces) > 1 else name
                factor = shape_factor(group["lr_mode"], *((B, A) if transposed else (A, B)), group["rms_target"])
                steps = group["ns_budget"].get(block, group["ns_steps"])
                work.append(_Block(block, w, g, m, second, factor, steps))
        return work

    def _new_state(self, p: Tensor, split: dict | None, group: dict) -> None:
        dtype = p.dtype if group["compat"] or p.dtype == torch.float64 else torch.float32
        stored = getattr(torch, group["state_dtype"]) if group["state_dtype"] and dtype == torch.float32 else dtype
        state, aux = self.state[p], (split or {}).get("adamw", ())
        state["momentum_buffer"] = torch.zeros_like(p, dtype=stored, memory_format=torch.contiguous_format)
        shapes = [block.shape for i, block in enumerate(blocks(p, split)) if i not in aux]
        if size := sum(second_momentum_size(group["variant"], A, B) for A, B in shapes):
            state["second_momentum"] = torch.zeros(size, dtype=dtype, device=p.device)
        if aux:
            size = sum(block.numel() for i, block in enumerate(blocks(p, split)) if i in aux)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros(size, dtype=dtype, device=p.device)
            state["step"] = torch.zeros((), dtype=torch.float32)

    def _slices_step(self, group: dict, state: dict, split: dict, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """AdamW on the slices of a fused matrix that are too thin for Newton-Schulz; their state lies flat, one after the other."""
        options, sizes = group["slices"], [w.numel() for w, _ in pieces]
        moments = [[v.view(w.shape) for v, (w, _) in zip(state[key].split(sizes), pieces)] for key in ("exp_avg", "exp_avg_sq")]
        steps = [state["step"].clone() for _ in pieces]
        adamw(
            [w for w, _ in pieces],
            [g for _, g in pieces],
            *moments,
            [],
            steps,
            foreach=False,
            amsgrad=False,
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            lr=float(group["lr"]) * options["lr_ratio"],
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=False,
        )
        state["step"].copy_(steps[0])

    def _update(self, group: dict, work: list[_Block]) -> None:
        """Orthogonalise the blocks, batched by shape, and change their weights."""
        decay = group["weight_decay"] if group["decoupled_wd"] else 0.0
        if group["wd_follows_lr"]:
            decay = decay * float(group["lr"]) / (group.get("base_lr") or group.get("initial_lr") or group["first_lr"])
        if decay and not group["cautious"]:
            shrink = 1.0 - group["lr"] * decay
            torch._foreach_mul_([block.weight for block in work], shrink)
        buckets = defaultdict(list)
        for block in work:
            key = (*block.weight.shape, block.factor, block.steps, block.momentum.dtype, block.momentum.device)
            buckets[key if group["batch_by_shape"] else block.name].append(block)
        for bucket in buckets.values():
            self.ns_calls += len(bucket)
            entries = bucket[0].weight.numel() * bucket[0].momentum.element_size()
            per_batch = max(1, group["max_batch_bytes"] // entries)
            for i in range(0, len(bucket), per_batch):
                self._update_batch(group, bucket[i : i + per_batch], len(bucket), decay if group["cautious"] else 0.0)

    def _update_batch(self, group: dict, batch: list[_Block], count: int, cautious_decay: float) -> None:
        first, weights = batch[0], [block.weight for block in batch]
        if group["compat"] == "torch":
            assert len(batch) == 1
            O, variant = _torch_orthogonalise(first, group)[None], "muon"
        else:
            U = _stack(batch, group)
            watched = self.diagnostics is not None and self.diagnostics.due(group["step"])
            before = U.clone() if watched else None
            variant = group["variant"]
            if variant == "adamuon" and group["adamuon_sign"]:
                U.sign_()
            method, dtype = choose(group, *first.weight.shape, count, U.dtype, U.device)
            polar = _compiled() if group["compile"] else orthogonalise
            O = polar(U, group["coefficients"], first.steps, method, dtype)
            O = U.copy_(O) if O.dtype != U.dtype else O
            if watched:
                tall = U.shape[1] > U.shape[2]
                self.diagnostics.observe(
                    Observation([b.name for b in batch], before.mT if tall else before, O.mT if tall else O, weights,
                                [b.factor for b in batch], float(group["lr"]), group["weight_decay"], group["step"])
                )  # fmt: skip
            if variant in ("normuon", "adamuon"):
                O = adapt(variant, O, [block.second for block in batch], group["beta2"], group["rms_target"])
        lr = group["lr"]
        if variant == "hyperball":
            stay_on_sphere(weights, O, [block.second for block in batch], lr)
            return
        directions = list(O.unbind(0))
        if cautious_decay:
            keep = [(o * w).ge_(0.0).to(w.dtype) for o, w in zip(directions, weights, strict=True)]
            torch._foreach_mul_(keep, weights)  # what decays: W where the update pulls the same way, 0 elsewhere
            torch._foreach_mul_(keep, lr * cautious_decay)
            torch._foreach_sub_(weights, keep)
        scale = lr * (1.0 if variant == "adamuon" else first.factor)
        if isinstance(scale, Tensor):  # stays on the device: no synchronisation
            torch._foreach_sub_(weights, [o * scale for o in directions])
        else:
            torch._foreach_add_(weights, directions, alpha=-scale)

    def _adamw_step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if p.grad.is_sparse:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} in group {group['name']!r} has a sparse gradient; "
                                 f"use sparse=False in its embedding, or torch.optim.SparseAdam for it")  # fmt: skip
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _names(group: dict) -> list[str]:
    return group.get("param_names") or [f"#{i} of group {group['name']!r}" for i in range(len(group["params"]))]


def _store(p: Tensor, mantissa: Tensor, twin: Tensor) -> None:
    """Round an fp32 twin into bf16 `p` (to nearest) and keep what the rounding took, so that the pair is the twin exactly."""
    bits = twin.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    mantissa.copy_(bits - (high << 16))
    p.view(torch.int16).copy_(high)


def _stack(batch: list[_Block], group: dict) -> Tensor:
    """U of blocks that share a shape, as one contiguous batch (N, A, B)."""
    mu, first = group["momentum"], batch[0].momentum
    U = torch.empty(len(batch), *first.shape, dtype=first.dtype, device=first.device)
    for block, slot in zip(batch, U.unbind(0), strict=True):
        if not group["nesterov"]:
            slot.copy_(block.momentum)
        elif group["momentum_form"] == "ema":
            torch.lerp(block.grad, block.momentum, mu, out=slot)
        else:
            torch.add(block.grad, block.momentum, alpha=mu, out=slot)
    return U


def _torch_orthogonalise(block: _Block, group: dict) -> Tensor:
    """What torch.optim.Muon does, in its order of operations: bf16 first, then a norm clamped at 1e-7, one matrix a time."""
    g, m = block.grad, block.momentum
    X = (g.lerp(m, group["momentum"]) if group["nesterov"] else m).to(torch.bfloat16, copy=True)
    X = X.mT if g.shape[0] > g.shape[1] else X
    X.div_(X.norm().clamp(min=1e-7))
    O = iterate(X, triples(group["coefficients"], group["ns_steps"]))
    return O.mT if g.shape[0] > g.shape[1] else O


_compiled_orthogonalise = None


def _compiled():
    global _compiled_orthogonalise
    if _compiled_orthogonalise is None:
        _compiled_orthogonalise = torch.compile(orthogonalise, dynamic=False)
    return _compiled_orthogonalise


# -------------------------------------------------------------------------------------------------- checks


def _check_group(group: dict) -> None:
    """ValueError for hyper-parameters that cannot work; rewrites dtypes and the schedule to plain, saveable values."""

    def need(condition: bool, key: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{key}={group[key]!r} in group {group['name']!r} is not allowed; use {fix}")

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
    elif isinstance(group["coefficients"], str) and group["coefficients"].startswith("aol"):
        group["ns_method"] = "aol"
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


def _splits(given: list[dict | None] | None, names: list[str], tensors: list[Tensor]) -> list[dict | None]:
    """One checked split per parameter of a Muon group, from `given` or else from the parameters' tags."""
    if given is None:
        tags = [getattr(p, "muonlm", None) or {} for p in tensors]
        kinds = ("split", "heads")
        extra = ("adamw", "transposed")
        given = [next(({k: tag[k]} | {e: tag[e] for e in extra if e in tag} for k in kinds if k in tag), None) for tag in tags]
    if len(given) != len(tensors):
        raise ValueError(f"splits has {len(given)} entries for {len(tensors)} parameters; give one (or None) for each")
    for name, p, split in zip(names, tensors, given, strict=True):
        if p.ndim < 2 or p.numel() == 0:
            raise ValueError(f"parameter {name} of shape {tuple(p.shape)} is no matrix, so it has no orthogonal factor; "
                             f"put it into a group with use_muon=False (a sharded, flattened matrix must be gathered first)")  # fmt: skip
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
        if "heads" in split and (parts < 1 or whole % parts):
            raise ValueError(
                f"{parts} heads do not divide the {whole} entries of parameter {name} along dimension {dim}"
            )
    return given

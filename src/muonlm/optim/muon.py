"""Muon: momentum orthogonalised by Newton-Schulz for matrices, AdamW for everything else, in one torch optimizer.

    M <- mu M + (1 - mu) G                                     momentum, an exponential moving average in fp32
    U  = (1 - mu) G + mu M   (Nesterov)   |   U = M
    O  = NS(U)                                                 per block, see newton_schulz.py
    W <- (1 - lr wd) W                                         decay by the UNADJUSTED lr; cautious: only where O * W >= 0
    W <- W - lr s(A, B) O                                      A, B: shape of the block

    s(A, B)   original: sqrt(max(1, A/B)) · match_rms_adamw: rms_target sqrt(max(A, B)) · spectral: sqrt(A/B) · none: 1

Units    lr is in spectral norm per step under `original` (0.02 is usual): it is no AdamW rate. RMS(O) ~ 1/sqrt(max(A, B)).
Groups   dict(params=..., use_muon=True|False, name=..., lr=..., ...). A bare iterable of matrices is one Muon group. AdamW
         groups take lr, betas, eps, weight_decay and are bit for bit torch.optim.AdamW(fused=True).
Blocks   2-D: one matrix · 3-D (E, A, B): E matrices · 4-D and above (convolution): flattened to (out, -1). A parameter tag
         `p.muonlm = {"split": (dim, [sizes])}` or `{"heads": (dim, n)}`, or the group's `splits` (one entry per parameter,
         it wins over the tag), cuts a matrix into blocks; {"flatten": True} treats a 3-D tensor like a convolution.
         Blocks of equal wide shape share one batched Newton-Schulz, within `max_batch_bytes`.
State    Muon: `momentum_buffer` (fp32; fp64 for fp64 parameters). AdamW: `exp_avg`, `exp_avg_sq`, `step`. In the group:
         `step`, and `ns_dtype_chosen`, {"128x512": "bfloat16"}: what "auto" chose, kept so that a resumed run repeats it.
Counters `ns_calls`: number of blocks orthogonalised in the last step, for a check that Muon is really at work.
Raises   ValueError for bad hyper-parameters and for tensors that have no polar factor, naming the tensor and the remedy.
         A non-finite gradient is not looked for (that would stall a GPU): it makes the weights NaN, so check the loss first.
Source   Keller Jordan, github.com/KellerJordan/Muon; match_rms_adamw: Liu et al., arXiv 2502.16982; cautious decay:
         Chen et al., arXiv 2510.12402. `compat="torch"`: the Newton-Schulz of torch.optim.Muon, bit for bit.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .newton_schulz import COEFFICIENTS, SAFETY, iterate, normalise, triples
from .schedule import check_momentum_schedule, momentum_at

LR_MODES = ("original", "match_rms_adamw", "spectral", "none")
NS_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
ADAMW_DEFAULTS = {"betas": (0.9, 0.95), "eps": 1e-10}
PROBE_FLOPS = 6e7  # of one iteration of the dtype probe: about a millisecond on one core
BF16_GAIN = 1.3  # bf16 must be this much faster than fp32 to be worth its rounding


def shape_factor(lr_mode: str, A: int, B: int, rms_target: float = 0.2) -> float:
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
    raise ValueError(f"unknown lr_mode {lr_mode!r}: use one of {', '.join(LR_MODES)}")


def blocks(t: Tensor, split: dict | None) -> list[Tensor]:
    """The matrices of a parameter (or of its gradient or momentum) as 2-D views, in a fixed order."""
    if t.ndim > 3 or (split and split.get("flatten")):
        return [t.flatten(1)]
    matrices = [t] if t.ndim == 2 else list(t.unbind(0))
    if not split:
        return matrices
    if "split" in split:
        dim, sizes = split["split"]
    else:
        dim, sizes = split["heads"][0], t.shape[split["heads"][0]] // split["heads"][1]
    return [block for matrix in matrices for block in matrix.split(sizes, dim - t.ndim)]


@dataclass
class _Block:
    """One matrix of the current step; all views have the parameter's orientation."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    factor: float


class Muon(torch.optim.Optimizer):
    """See the module docstring. Hyper-parameters given here are the defaults of every group that does not set its own."""

    def __init__(
        self,
        params_or_groups: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        momentum_schedule: list[tuple[int, float]] | None = None,
        cautious: bool = False,
        ns_steps: int = 5,
        coefficients: str | list[tuple[float, float, float]] = "polar_express",
        ns_dtype: str | torch.dtype = "auto",
        lr_mode: str = "original",
        rms_target: float = 0.2,
        max_batch_bytes: int = 256 * 2**20,
        compat: str | None = None,
    ):
        if compat not in (None, "torch"):
            raise ValueError(
                f'compat={compat!r} is unknown; use compat="torch" for the arithmetic of torch.optim.Muon, or None'
            )
        if compat == "torch":
            coefficients, ns_dtype = "keller", "bfloat16"
        muon = {
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_schedule": momentum_schedule,
            "cautious": cautious,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "ns_dtype": ns_dtype,
            "lr_mode": lr_mode,
            "rms_target": rms_target,
            "max_batch_bytes": max_batch_bytes,
            "compat": compat,
            "step": 0,
            "ns_dtype_chosen": {},
        }
        self.ns_calls = 0
        defaults = {"lr": lr, "weight_decay": weight_decay, "muon": muon, "adamw": dict(ADAMW_DEFAULTS)}
        super().__init__(params_or_groups, defaults)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.ns_calls = 0

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
        super().add_param_group(group)
        for key in ("muon", "adamw"):
            del self.param_groups[-1][key]

    def load_state_dict(self, state_dict: dict) -> None:
        splits = [group.get("splits") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, split in zip(self.param_groups, state_dict["param_groups"], splits, strict=True):
            # torch casts floating state to the parameter's dtype, lossy for bf16 weights, and leaves `step` where it was
            key = "momentum_buffer" if group["use_muon"] else "step"
            for p, index in zip(group["params"], saved["params"], strict=True):
                if index in state_dict["state"]:
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

    def choose_ns_dtypes(self) -> list[dict[str, str]]:
        """Decide every "auto" now instead of at the first step; returns the groups' own dicts of choices.

        Ranks that hold the same parameters must take rank 0's choices, or their weights drift apart: broadcast and update.
        """
        choices = []
        for group in (g for g in self.param_groups if g["use_muon"] and g["ns_dtype"] == "auto" and not g["compat"]):
            counts = defaultdict(int)
            for p, split in zip(group["params"], group["splits"], strict=True):
                dtype = p.dtype if p.dtype == torch.float64 else torch.float32
                for A, B in (block.shape for block in blocks(p, split)):
                    counts[min(A, B), max(A, B), dtype, p.device] += 1
            for (rows, columns, dtype, device), count in counts.items():
                _ns_dtype(group, rows, columns, count, dtype, device)
            choices.append(group["ns_dtype_chosen"])
        return choices

    def _muon_step(self, group: dict) -> None:
        if group["momentum_schedule"] is not None:
            group["momentum"] = momentum_at(group["momentum_schedule"], group["step"])
        group["step"] += 1
        mu, lr, decay = group["momentum"], float(group["lr"]), float(group["lr"]) * group["weight_decay"]

        params, grads, momenta, splits = [], [], [], []
        for p, split in zip(group["params"], group["splits"], strict=True):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} in group {group['name']!r} has a sparse gradient, which "
                                 f"Newton-Schulz cannot use; route it to AdamW or use sparse=False")  # fmt: skip
            state = self.state[p]
            if "momentum_buffer" not in state:
                dtype = p.dtype if group["compat"] or p.dtype == torch.float64 else torch.float32
                state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
            params.append(p)
            momenta.append(state["momentum_buffer"])
            grads.append(p.grad if p.grad.dtype == momenta[-1].dtype else p.grad.to(momenta[-1].dtype))
            splits.append(split)
        if not params:
            return

        torch._foreach_lerp_(momenta, grads, 1.0 - mu)
        if decay != 0.0 and not group["cautious"]:
            torch._foreach_mul_(params, 1.0 - decay)

        buckets = defaultdict(list)  # blocks of equal wide shape
        for p, g, m, split in zip(params, grads, momenta, splits, strict=True):
            for w, gb, mb in zip(blocks(p, split), blocks(g, split), blocks(m, split), strict=True):
                A, B = w.shape
                factor = shape_factor(group["lr_mode"], A, B, group["rms_target"])
                buckets[min(A, B), max(A, B), m.dtype, m.device].append(_Block(w, gb, mb, factor))

        for (rows, columns, dtype, device), bucket in buckets.items():
            self.ns_calls += len(bucket)
            per_batch = max(1, group["max_batch_bytes"] // (rows * columns * dtype.itemsize))
            if group["compat"] == "torch":
                for block in bucket:
                    _apply([block], [_torch_orthogonalise(block, group)], lr, decay if group["cautious"] else 0.0)
                continue
            ns_dtype = _ns_dtype(group, rows, columns, len(bucket), dtype, device)
            for i in range(0, len(bucket), per_batch):
                batch = bucket[i : i + per_batch]
                updates = _orthogonalise(batch, group, rows, columns, ns_dtype)
                _apply(batch, updates, lr, decay if group["cautious"] else 0.0)

    def _adamw_step(self, group: dict) -> None:
        params, states = [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} in group {group['name']!r} has a sparse gradient; "
                                 f"use sparse=False in its embedding")  # fmt: skip
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            params.append(p)
            states.append(state)
        if not params:
            return
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


def _orthogonalise(batch: list[_Block], group: dict, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """NS(U) of blocks that share a wide shape, in one batch; results are views in each block's own orientation."""
    mu, first = group["momentum"], batch[0].momentum
    U = torch.empty(len(batch), rows, columns, dtype=first.dtype, device=first.device)
    for block, slot in zip(batch, U.unbind(0), strict=True):
        g, m = block.grad, block.momentum
        if g.shape[0] > g.shape[1]:  # copy_ knows how to transpose in cache, lerp does not
            slot.copy_((torch.lerp(g, m, mu) if group["nesterov"] else m).mT)
        elif group["nesterov"]:
            torch.lerp(g, m, mu, out=slot)
        else:
            slot.copy_(m)
    coefficients = group["coefficients"]
    c0 = SAFETY.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0
    O = iterate(normalise(U, c0, dtype), triples(coefficients, group["ns_steps"]))
    return [o.mT if b.grad.shape[0] > b.grad.shape[1] else o for b, o in zip(batch, O.unbind(0), strict=True)]


def _torch_orthogonalise(block: _Block, group: dict) -> Tensor:
    """What torch.optim.Muon does, in its order of operations: bf16 first, then a norm clamped at 1e-7, one matrix a time."""
    g, m = block.grad, block.momentum
    X = (g.lerp(m, group["momentum"]) if group["nesterov"] else m).to(torch.bfloat16, copy=True)
    X = X.mT if g.shape[0] > g.shape[1] else X
    X.div_(X.norm().clamp(min=1e-7))
    O = iterate(X, triples(group["coefficients"], group["ns_steps"]))
    return O.mT if g.shape[0] > g.shape[1] else O


def _apply(batch: list[_Block], updates: list[Tensor], lr: float, cautious_decay: float) -> None:
    """W <- W - lr s O for the blocks of a batch, after the cautious decay (0: none) that looks at O and the old W."""
    if cautious_decay:
        for block, o in zip(batch, updates, strict=True):
            keep = (o * block.weight).ge_(0.0)  # 1 where the update and the decay pull the same way
            block.weight.addcmul_(block.weight, keep.to(block.weight.dtype), value=-cautious_decay)
    by_factor = defaultdict(lambda: ([], []))
    for block, o in zip(batch, updates, strict=True):
        weights, directions = by_factor[block.factor]
        weights.append(block.weight)
        directions.append(o)
    for factor, (weights, directions) in by_factor.items():
        torch._foreach_add_(weights, directions, alpha=-lr * factor)


# -------------------------------------------------------------------------------------------------- dtype of the iteration


def _ns_dtype(
    group: dict, rows: int, columns: int, count: int, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The iteration's dtype for one bucket; "auto" decides once per shape and remembers it in the group."""
    if group["ns_dtype"] != "auto":
        return NS_DTYPES[group["ns_dtype"]]
    if dtype == torch.float64:
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    if forced := os.environ.get("MUONLM_NS_DTYPE"):
        return NS_DTYPES[_dtype_name(forced, "MUONLM_NS_DTYPE")]
    key = f"{rows}x{columns}"
    if key not in group["ns_dtype_chosen"]:
        group["ns_dtype_chosen"][key] = probe_dtype(rows, columns, count) if device.type == "cpu" else "float32"
    return NS_DTYPES[group["ns_dtype_chosen"][key]]


_probed: dict[
    tuple, str
] = {}  # one measurement per process and kind of work, so that many groups cost no more than one


def probe_dtype(rows: int, columns: int, count: int) -> str:
    """Time one iteration in fp32 and bf16 on a bounded stand-in of the bucket: "bfloat16" if that is clearly faster.

    Forced bf16 is several times slower on CPUs without native bf16 products, and on those with them small matrices may
    still gain nothing; so it is measured, a few milliseconds once. Large shapes are represented by smaller ones.
    """
    m = min(rows, 256)
    n = min(columns, 2 * m if rows > 256 else 4 * m)
    batch = max(1, min(count, int(PROBE_FLOPS / (4 * m * m * n + 2 * m**3))))
    key = (m, n, batch, torch.get_num_threads())
    if key not in _probed:
        X = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(0)) / math.sqrt(m * n)
        best = {}
        for attempt in range(4):  # the first one is a warm-up; interleaved, so that a noisy neighbour hits both
            for name in ("float32", "bfloat16"):
                work = X.to(NS_DTYPES[name])
                began = time.perf_counter()
                iterate(work, COEFFICIENTS["keller"])
                took = time.perf_counter() - began
                best[name] = min(best.get(name, math.inf), took) if attempt else math.inf
        _probed[key] = "bfloat16" if best["float32"] >= BF16_GAIN * best["bfloat16"] else "float32"
    return _probed[key]


# -------------------------------------------------------------------------------------------------- checks


def _dtype_name(value, source: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in NS_DTYPES:
        raise ValueError(
            f"{source}={value!r} is not a dtype of the Newton-Schulz iteration; use one of {', '.join(NS_DTYPES)}"
        )
    return name


def _check_group(group: dict) -> None:
    """ValueError for hyper-parameters that cannot work; rewrites ns_dtype and the schedule to plain, saveable values."""

    def need(condition: bool, key: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{key}={group[key]!r} in group {group['name']!r} is not allowed; use {fix}")

    for key in ("lr", "weight_decay"):
        need(math.isfinite(group[key]) and group[key] >= 0.0, key, "a finite number >= 0")
    if not group["use_muon"]:
        need(len(group["betas"]) == 2 and all(0.0 <= b < 1.0 for b in group["betas"]), "betas", "two numbers in [0, 1)")
        need(math.isfinite(group["eps"]) and group["eps"] >= 0.0, "eps", "a finite number >= 0")
        return
    need(0.0 <= group["momentum"] < 1.0, "momentum", "a number in [0, 1), e.g. 0.95")
    need(group["lr_mode"] in LR_MODES, "lr_mode", f"one of {', '.join(LR_MODES)}")
    need(math.isfinite(group["rms_target"]) and group["rms_target"] > 0.0, "rms_target", "a number > 0, e.g. 0.2")
    need(group["max_batch_bytes"] > 0, "max_batch_bytes", "a number of bytes > 0")
    triples(group["coefficients"], group["ns_steps"])
    if group["ns_dtype"] != "auto":
        group["ns_dtype"] = _dtype_name(group["ns_dtype"], "ns_dtype")
    if group["momentum_schedule"] is not None:
        check_momentum_schedule(group["momentum_schedule"])
        group["momentum_schedule"] = [(int(step), float(mu)) for step, mu in group["momentum_schedule"]]


def _splits(given: list[dict | None] | None, names: list[str], tensors: list[Tensor]) -> list[dict | None]:
    """One checked split per parameter of a Muon group, from `given` or else from the parameters' tags."""
    if given is None:
        tags = [getattr(p, "muonlm", None) or {} for p in tensors]
        kinds = ("split", "heads")
        given = [next(({k: tag[k]} for k in kinds if k in tag), None) for tag in tags]
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
        if not split or "flatten" in split:
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

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
         AdamW rate fits under `match_rms_adamw`; optim/rates.py translates.
Groups   dict(params=..., use_muon=True|False, name=..., lr=..., ...). A bare iterable of matrices is one Muon group. AdamW
         groups take lr, betas, eps, weight_decay and are bit for bit torch.optim.AdamW(fused=True).
Blocks   2-D: one matrix · 3-D (E, A, B): E matrices · 4-D and above (convolution): flattened to (out, -1). A parameter tag
         `p.muonlm = {"split": (dim, [sizes])}` or `{"heads": (dim, n)}`, or the group's `splits` (one entry per parameter,
         it wins over the tag), cuts a matrix into blocks. {"flatten": True} treats a 3-D tensor like a convolution;
         {"transposed": True} says that it is stored (in, out), so that s takes (B, A); "adamw": [i, ...] beside "split" leaves
         those slices to AdamW, by group["slices"] = dict(lr_ratio=..., betas=..., eps=..., weight_decay=...).
         Blocks of equal shape share one batched Newton-Schulz, within `max_batch_bytes`.
Memory   a step needs, beyond the state, about 4 x max_batch_bytes (8 x with 16-bit weights or momentum, which are widened as
         many at a time), or as many fp32 copies of the largest parameter, if that is more
State    Muon: `momentum_buffer` (fp32, or `state_dtype`; fp64 for fp64 parameters), variants `second_momentum`; bf16 parameters
         `mantissa`, the 16 bits that make them as exact as fp32 ones (param_dtype_comp=False: rounded each step instead).
         AdamW: `exp_avg`, `exp_avg_sq`, `step`. In the group: `step`, `ns_chosen` {"128x512": "hybrid bfloat16"}, what "auto"
         chose, kept so that a resumed run repeats it.
Counters `ns_calls`: number of blocks orthogonalised in the last step, for a check that Muon is really at work.
Raises   ValueError for bad hyper-parameters and for tensors that have no polar factor, naming the tensor and the remedy.
         A non-finite gradient is not looked for (that would stall a GPU): it makes the weights NaN, so check the loss first.
Source   Keller Jordan, github.com/KellerJordan/Muon; classical momentum, match_rms_adamw: Liu et al., arXiv 2502.16982; cautious
         decay: Chen et al., arXiv 2510.12402. `compat="torch"`: torch.optim.Muon bit for bit, with its defaults and names.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..schedule import momentum_at
from .blocks import LR_MODES, Block, adamw_blocks, block_shapes, blocks, shape_factor
from .distributed import GRADS, Owners, check_sharding, cost, is_sharded, like, local
from .groups import check_group, check_spheres, check_splits
from .newton_schulz import COEFFICIENTS, WHOLE, iterate, orthogonalise, triples
from .probe import choose
from .variants import adapt, second_momentum_size, stay_on_sphere

__all__ = ["LR_MODES", "Muon", "Observation", "blocks", "shape_factor"]

ADAMW_DEFAULTS = {"betas": (0.9, 0.95), "eps": 1e-10}
TORCH_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.1}  # of torch.optim.Muon, for compat="torch"
DEFAULTS = {"lr": 0.02, "weight_decay": 0.0}
ROUTED = "Muon(route(model).groups(lr=0.02, adamw_lr=3e-4)), with route from muonlm.optim"


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

    params_or_groups   a bare list trains all of it by Muon, embeddings too: let `route` choose
    lr, weight_decay   0.02 and 0.0 if left out (compat="torch": 1e-3 and 0.1)
    ns_steps           5 if left out, or the length of a set that is a schedule (polar_express4: 4)
    ns_method          "auto" picks among direct, hybrid and gram by a probe; ns_dtype "auto" among fp32 and bf16
    rms_target         of match_rms_adamw and adamuon; sqrt((1 - b1) / (1 + b1)) of the AdamW to match is another choice
    schedulers         OneCycleLR needs cycle_momentum=False: momentum has its own schedule here
    wd_follows_lr      wd_t = wd lr_t / peak; peak: the group's "base_lr", OneCycleLR's "max_lr", "initial_lr", or its first lr
    process_group      None, "world" or a ProcessGroup: matrices are shared out among its ranks, see distributed.py; `grads` says
                       whether gradients arrive "averaged" (by DDP) or "local". FSDP2's DTensors bring their own group
    compile            Newton-Schulz through torch.compile; torch gives up after 8 kinds of batch (recompile_limit)
    none_grad          a parameter without gradient is skipped, or ("zero") treated as if it had a zero one
    diagnostics        see optim/watch/diagnostics.py
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
        ns_steps: int | None = None,
        coefficients: str | list[tuple[float, float, float]] | None = None,
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
        process_group=None,
        grads: str = "averaged",
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
                "ns_coefficients and adjust_lr_fn are names of torch.optim.Muon; here they are coefficients=[(a, b, c)] and "
                'lr_mode="original" or "match_rms_adamw" (or pass compat="torch")'
            )
        if grads not in GRADS:
            raise ValueError(
                f'grads={grads!r} is unknown; use "averaged" (DDP did it) or "local" (nobody did, Muon shall)'
            )
        base = DEFAULTS
        if compat == "torch":
            base = TORCH_DEFAULTS
            for key, value, unset in (("coefficients", coefficients, None), ("ns_method", ns_method, "auto"),
                                      ("ns_dtype", ns_dtype, "auto")):  # fmt: skip
                if value != unset:
                    raise ValueError(f'{key}={value!r} does not go with compat="torch", which fixes it; leave it out')
            coefficients = [tuple(ns_coefficients)] if ns_coefficients else "keller"
            ns_method, ns_dtype, lr_mode = "direct", "bfloat16", adjust_lr_fn or lr_mode
        if ns_steps is None and coefficients in WHOLE:  # a schedule that makes sense in its own length only
            ns_steps = len(COEFFICIENTS[coefficients])
        muon = {
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_form": momentum_form,
            "momentum_schedule": momentum_schedule,
            "decoupled_wd": decoupled_wd,
            "cautious": cautious,
            "wd_follows_lr": wd_follows_lr,
            "ns_steps": 5 if ns_steps is None else ns_steps,
            "coefficients": "polar_express" if coefficients is None else coefficients,
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
        }
        self.ns_calls = 0
        self.diagnostics = diagnostics
        self.replicas = Owners.of(process_group, grads)
        self.shards = None  # the owners of DTensor parameters
        self.settled = False  # whether all matrices have an owner, see `assign_owners`
        defaults = {
            "lr": base["lr"] if lr is None else lr,
            "weight_decay": base["weight_decay"] if weight_decay is None else weight_decay,
            "muon": muon,
            "adamw": dict(ADAMW_DEFAULTS),
        }
        if isinstance(params_or_groups, torch.nn.Module) or hasattr(params_or_groups, "groups"):
            raise TypeError(
                f"Muon takes parameters or groups, found a {type(params_or_groups).__name__}; write {ROUTED}"
            )
        super().__init__(params_or_groups, defaults)
        for key, given in (("lr", lr), ("weight_decay", weight_decay)):
            used = [float(group[key]) for group in self.param_groups if group["use_muon"]]
            if given is not None and used and float(given) not in used:
                raise ValueError(f"{key}={given} was given, but every Muon group brings its own ({used[0]:g}); set it there, "
                                 f"e.g. plan.groups(lr=0.02, wd=0.1), and leave it out here")  # fmt: skip

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("ns_calls", 0)
        for name in ("diagnostics", "replicas", "shards"):
            self.__dict__.setdefault(name, None)
        self.__dict__.setdefault("settled", False)

    def __getstate__(self):
        if self.replicas or self.shards:
            raise ValueError("a distributed Muon holds a part of the state and cannot be copied or pickled; "
                             "use named_state, which gathers the whole")  # fmt: skip
        return super().__getstate__()

    # ---------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict) -> None:
        group = dict(param_group)
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(
                "parameters must come in an order that is the same in every run; pass a list instead of a set"
            )
        group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        if strange := [type(p).__name__ for p in tensors if not isinstance(p, Tensor)]:
            raise TypeError(f"a group holds tensors or (name, tensor) pairs, found {strange[0]}")
        group.setdefault("name", f"group{len(self.param_groups)}")
        names = [p[0] if isinstance(p, tuple) else f"#{i} of group {group['name']!r}" for i, p in enumerate(params)]
        if group["name"] in {g["name"] for g in self.param_groups}:
            raise ValueError(f"two groups are named {group['name']!r}; give each a name of its own")
        seen = {id(p) for other in self.param_groups for p in other["params"]}
        for name, p in zip(names, tensors, strict=True):
            if id(p) in seen:
                raise ValueError(
                    f"parameter {name} is given twice and would be updated twice; remove it from one place"
                )
            seen.add(id(p))
        if "use_muon" not in group:
            for name, p in zip(names, tensors, strict=True):
                if p.ndim != 2:
                    raise ValueError(f"parameter {name} has shape {tuple(p.shape)} and its group does not say how to train it; "
                                     f"set use_muon=True or use_muon=False, or write {ROUTED}")  # fmt: skip
            group["use_muon"] = True
        for name, p in zip(names, tensors, strict=True):
            if not p.is_floating_point():
                raise ValueError(f"parameter {name} is {p.dtype}; Muon and AdamW train real floating-point tensors only, "
                                 f"so leave it out of the groups")  # fmt: skip
        known = {
            *self.defaults["muon"],
            *self.defaults["adamw"],
            *self.defaults,
            "params",
            "name",
            "use_muon",
            "splits",
            "slices",
        }
        for key in sorted(set(group) - known - {"base_lr", "max_lr", "initial_lr", "first_lr", "param_names"}):
            if near := get_close_matches(key, known, n=1, cutoff=0.75):
                raise ValueError(
                    f"group {group['name']!r} has a key {key!r}, which nothing reads; did you mean {near[0]!r}?"
                )
        if group.get("compat") and not self.defaults["muon"]["compat"]:
            raise ValueError('compat="torch" is for a whole optimizer: pass it to Muon, not to a group')
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
        check_group(group)
        if group["use_muon"]:
            group["splits"] = check_splits(group.get("splits"), names, tensors)
            check_sharding(group, names, tensors)
            if group["variant"] == "hyperball":
                check_spheres(group["splits"], names, tensors)
            if any(split and split.get("adamw") for split in group["splits"]) and "slices" not in group:
                raise ValueError(f"group {group['name']!r} leaves slices to AdamW but does not say how; set slices=dict(lr_ratio="
                                 f"adamw_lr / muon_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)")  # fmt: skip
        super().add_param_group(group)
        self.settled = False
        for key in ("muon", "adamw"):
            del self.param_groups[-1][key]

    def load_state_dict(self, state_dict: dict) -> None:
        splits = [group.get("splits") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, split in zip(self.param_groups, state_dict["param_groups"], splits, strict=True):
            # torch casts state to the parameter's dtype, lossy for bf16 weights, and does not copy what needs no cast
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device, copy=True)
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
        gradients = self._gradients()
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group, gradients)
            else:
                self._adamw_step(group, gradients)
        if self.replicas:
            self.replicas.share_weights()
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Of every parameter that this rank shall update now, the gradient to use."""
        params = {
            p: name for group in self.param_groups for p, name in zip(group["params"], names_of(group), strict=True)
        }
        for p, name in params.items():
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"parameter {name} of shape {tuple(p.shape)} has a sparse gradient, which neither Newton-Schulz "
                                 f"nor this AdamW can use; use sparse=False in its embedding")  # fmt: skip
        self.assign_owners()
        found = {p: p.grad for p in params if p.grad is not None}
        if self.replicas and (whole := {p: name for p, name in params.items() if not is_sharded(p)}):
            found = self.replicas.gradients(whole, found)
        if self.shards:
            found = self.shards.complete([p for p in params if is_sharded(p)], found)
        for group in self.param_groups:
            for p in group["params"] if group["use_muon"] and group["none_grad"] == "zero" else ():
                if p not in found and self.updates(p):
                    found[p] = torch.zeros_like(p)
        return found

    def updates(self, p: Tensor) -> bool:
        """Whether this rank updates the matrix `p` (or its shard of it)."""
        return not self.replicas or is_sharded(p) or self.replicas.owns(p)

    def assign_owners(self) -> None:
        """Give every matrix without an owner one, and let all ranks take rank 0's choice of methods: a collective call.

        Nothing happens on one device, or when all have an owner. `step` and `load_named_state` call it.
        """
        if self.settled:
            return
        self.settled, new = True, {True: [], False: []}
        for group in (g for g in self.param_groups if g["use_muon"]):
            for p, split, name in zip(group["params"], group["splits"], names_of(group), strict=True):
                if self.replicas or is_sharded(p):
                    new[is_sharded(p)].append((cost(block_shapes(p.shape, split)), name, p))
        if new[True] and self.shards is None:
            self.shards = Owners.of_mesh([p for *_, p in new[True]])
        for owners, items in ((self.shards, new[True]), (self.replicas, new[False])):
            if owners and owners.assign(items):
                if owners.rank == 0:
                    self.choose_methods()
                own = [group["ns_chosen"] for group in self.param_groups if group["use_muon"]]
                for mine, chosen in zip(own, owners.broadcast(own), strict=True):
                    mine.update(chosen)

    def choose_methods(self) -> list[dict[str, str]]:
        """Decide every "auto" now instead of at the first step; returns the groups' own dicts of choices."""
        choices = []
        for group in (g for g in self.param_groups if g["use_muon"] and not g["compat"]):
            counts = defaultdict(int)
            for p, split in zip(group["params"], group["splits"], strict=True):
                dtype = p.dtype if p.dtype == torch.float64 else torch.float32
                for A, B in block_shapes(p.shape, split):
                    counts[A, B, dtype, p.device] += 1
            for (A, B, dtype, device), count in counts.items():
                choose(group, A, B, count, dtype, device)
            choices.append(group["ns_chosen"])
        return choices

    def _muon_step(self, group: dict, gradients: dict[Tensor, Tensor]) -> None:
        if group["momentum_schedule"] is not None:
            group["momentum"] = momentum_at(group["momentum_schedule"], group["step"])
        group["step"] += 1
        members = zip(group["params"], group["splits"], names_of(group), strict=True)
        found = [(p, gradients[p], split, name) for p, split, name in members if p in gradients]
        whole, shards = ([f for f in found if is_sharded(f[0]) == sharded] for sharded in (False, True))
        for part, update in ((whole, self._update_whole), (shards, self._update_shards)):
            for chunk in _chunks(group, part):
                twins = self._twins(group, [p for p, *_ in chunk])
                weights = [twins.get(p, local(p)) for p, *_ in chunk]
                update(group, chunk, weights, *self._momentum(group, chunk, weights))
                for p, twin in twins.items():
                    _store(local(p), local(self.state[p]["mantissa"]), twin)

    def _update_whole(
        self, group: dict, found: list[tuple], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        self._update(group, self._cut(group, found, weights, grads, momenta))

    def _update_shards(
        self, group: dict, found: list[tuple], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        """U's shards go to the owners, who step zero weights without decay: what comes back is the change of each shard."""
        shards = {
            f[0]: direction(group, G, M, torch.empty_like(M)) for f, G, M in zip(found, grads, momenta, strict=True)
        }
        owned = self.shards.to_owners(shards)
        changes = {p: torch.zeros_like(U) for p, U in owned.items()}
        plain = {**group, "nesterov": False, "weight_decay": 0.0}
        mine, U = [f for f in found if f[0] in owned], list(owned.values())
        self._update(plain, self._cut(plain, mine, list(changes.values()), U, U), watch=False)
        deltas = self.shards.from_owners(changes, shards)
        decay = decay_rate(group)
        for weight, delta in zip(weights, deltas, strict=True):
            if decay and group["cautious"]:
                weight.sub_(weight * (delta * weight <= 0.0), alpha=float(group["lr"]) * decay)
            elif decay:
                weight.mul_(1.0 - group["lr"] * decay)
            weight.add_(delta)

    def _twins(self, group: dict, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """fp32 twins of bf16 parameters (of their shards), made of their 16 bits and the 16 of `mantissa`."""
        if not group["param_dtype_comp"] or group["compat"]:
            return {}
        twins = {}
        for p in params:
            if p.dtype == torch.bfloat16:
                state = self.state[p]
                if "mantissa" not in state:
                    state["mantissa"] = like(p, torch.int16)
                bits = local(p).view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
                twins[p] = bits.add_(local(state["mantissa"])).view(torch.float32)
        return twins

    def _momentum(self, group: dict, found: list[tuple], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Update the momentum of all parameters (of their shards); return gradients and momenta, both fp32 or fp64."""
        mu, coupled = group["momentum"], not group["decoupled_wd"] and group["weight_decay"]
        momenta, grads = [], []
        for p, grad, split, _ in found:
            if "momentum_buffer" not in self.state[p]:
                self.new_state(p, split, group)
            M = local(self.state[p]["momentum_buffer"])
            wide = M.dtype if M.dtype not in (torch.bfloat16, torch.float16) or group["compat"] else torch.float32
            momenta.append(M.to(wide))
            grads.append(local(grad).to(wide))
        if coupled:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if group["momentum_form"] == "ema":
            torch._foreach_lerp_(momenta, grads, 1.0 - mu)
        else:
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, grads)
        for (p, *_), M in zip(found, momenta, strict=True):
            stored = local(self.state[p]["momentum_buffer"])
            if M is not stored:
                stored.copy_(M)
        return grads, momenta

    def _cut(
        self, group: dict, found: list[tuple], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> list[Block]:
        """The blocks of whole parameters; AdamW slices are stepped here and left out."""
        work = []
        for (p, grad, split, name), weight, G, M in zip(found, weights, grads, momenta, strict=True):
            state = self.state[p]
            pieces = list(zip(blocks(weight, split), blocks(G, split), blocks(M, split), strict=True))
            aux = adamw_blocks(split, len(pieces))
            if aux:
                plain = blocks(G, split) if group["decoupled_wd"] else blocks(local(grad).to(G.dtype), split)
                self._slices_step(group, state, split, [(pieces[i][0], plain[i]) for i in sorted(aux)])
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
                work.append(Block(block, w, g, m, second, factor, transposed))
        return work

    def state_layout(
        self, p: Tensor, split: dict | None, group: dict
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{key: (shape, dtype)} of the state of one whole Muon parameter; with the mantissa if it has one."""
        dtype = p.dtype if group["compat"] or p.dtype == torch.float64 else torch.float32
        stored = getattr(torch, group["state_dtype"]) if group["state_dtype"] and dtype == torch.float32 else dtype
        layout = {"momentum_buffer": (tuple(p.shape), stored)}
        if size := sum(second_momentum_size(group["variant"], A, B) for A, B in block_shapes(p.shape, split)):
            layout["second_momentum"] = ((size,), dtype)
        if (split or {}).get("adamw"):
            size = p.numel() - sum(A * B for A, B in block_shapes(p.shape, split))
            layout |= {"exp_avg": ((size,), dtype), "exp_avg_sq": ((size,), dtype), "step": ((), torch.float32)}
        if p.dtype == torch.bfloat16 and group["param_dtype_comp"] and not group["compat"]:
            layout["mantissa"] = (tuple(p.shape), torch.int16)
        return layout

    def new_state(self, p: Tensor, split: dict | None, group: dict) -> None:
        """All but the mantissa, which `_twins` makes. Of a sharded parameter what is not sharded is the owner's alone."""
        for key, (shape, dtype) in self.state_layout(p, split, group).items():
            if key == "momentum_buffer":
                self.state[p][key] = like(p, dtype)
            elif key != "mantissa" and (not is_sharded(p) or self.shards.owns(p)):
                self.state[p][key] = torch.zeros(shape, dtype=dtype, device="cpu" if key == "step" else p.device)

    def _slices_step(self, group: dict, state: dict, split: dict, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """AdamW on the slices of a fused matrix that are too thin for Newton-Schulz; their state lies flat, one after the other."""
        options, sizes = group["slices"], [w.numel() for w, _ in pieces]
        moments = [
            [v.view(w.shape) for v, (w, _) in zip(state[key].split(sizes), pieces)] for key in ("exp_avg", "exp_avg_sq")
        ]
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

    def _update(self, group: dict, work: list[Block], watch: bool = True) -> None:
        """Orthogonalise the blocks, batched by shape, and change their weights."""
        decay = decay_rate(group)
        if decay and not group["cautious"]:
            shrink = 1.0 - _rate(group) * decay
            torch._foreach_mul_([block.weight for block in work], shrink)
        buckets = defaultdict(list)
        for block in work:
            key = (
                *block.weight.shape,
                block.factor,
                block.transposed,
                block.momentum.dtype,
                block.momentum.device,
            )
            buckets[key if group["batch_by_shape"] else len(buckets)].append(block)
        for bucket in buckets.values():
            self.ns_calls += len(bucket)
            entries = bucket[0].weight.numel() * bucket[0].momentum.element_size()
            per_batch = max(1, group["max_batch_bytes"] // entries)
            for i in range(0, len(bucket), per_batch):
                self._update_batch(
                    group, bucket[i : i + per_batch], len(bucket), decay if group["cautious"] else 0.0, watch
                )

    def _update_batch(self, group: dict, batch: list[Block], count: int, cautious_decay: float, watch: bool) -> None:
        first, weights = batch[0], [block.weight for block in batch]
        if group["compat"] == "torch":
            assert len(batch) == 1
            O, variant = _torch_orthogonalise(first, group)[None], "muon"
        else:
            U = _stack(batch, group)
            watched = watch and self.diagnostics is not None and self.diagnostics.due(group["step"])
            before = U.clone() if watched else None
            variant = group["variant"]
            if variant == "adamuon" and group["adamuon_sign"]:
                U.sign_()
            method, dtype = choose(group, *first.weight.shape, count, U.dtype, U.device)
            polar = _compiled() if group["compile"] else orthogonalise
            O = polar(U, group["coefficients"], group["ns_steps"], method, dtype)
            O = U.copy_(O) if O.dtype != U.dtype else O
            if watched:
                tall = U.shape[1] > U.shape[2]
                self.diagnostics.observe(
                    Observation([b.name for b in batch], before.mT if tall else before, O.mT if tall else O, weights,
                                [b.factor for b in batch], float(group["lr"]), group["weight_decay"], group["step"])
                )  # fmt: skip
            if variant in ("normuon", "adamuon"):
                second = [block.second for block in batch]
                O = adapt(variant, O, second, group["beta2"], group["rms_target"], first.transposed)
        lr = _rate(group)
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

    def _adamw_step(self, group: dict, gradients: dict[Tensor, Tensor]) -> None:
        params = [p for p in group["params"] if p in gradients]
        if not params:
            return
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            [local(gradients[p]) for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
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


def names_of(group: dict) -> list[str]:
    return group.get("param_names") or [f"#{i} of group {group['name']!r}" for i in range(len(group["params"]))]


def _chunks(group: dict, found: list[tuple]) -> Iterator[list[tuple]]:
    """Parameters that need fp32 copies (16-bit weights or momentum): as many at a time as max_batch_bytes holds. Else all."""
    chunk, size = [], 0
    for item in found:
        copied = min(item[0].element_size(), 2 if group["state_dtype"] in ("bfloat16", "float16") else 4) < 4
        copies = 4 * item[0].numel() if copied else 0
        if chunk and size + copies > group["max_batch_bytes"]:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += copies
    if chunk:
        yield chunk


def _store(p: Tensor, mantissa: Tensor, twin: Tensor) -> None:
    """Round an fp32 twin into bf16 `p` (to nearest) and keep what the rounding took, so that the pair is the twin exactly."""
    bits = twin.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    mantissa.copy_(bits - (high << 16))
    p.view(torch.int16).copy_(high)


def _rate(group: dict) -> float | Tensor:
    """lr, as a number under compat="torch": a tensor would round its bf16 updates once more."""
    return float(group["lr"]) if group["compat"] else group["lr"]


def decay_rate(group: dict) -> float:
    """The decoupled decay of this step, before lr."""
    decay = group["weight_decay"] if group["decoupled_wd"] else 0.0
    if decay and group["wd_follows_lr"]:
        peaks = (float(group[key]) for key in ("base_lr", "max_lr", "initial_lr", "first_lr") if group.get(key))
        peak = next(peaks, 0.0)  # the loop's, OneCycleLR's, other schedulers', the constructor's
        decay = decay * float(group["lr"]) / peak if peak else 0.0
    return decay


def direction(group: dict, G: Tensor, M: Tensor, out: Tensor) -> Tensor:
    """U, written to `out`."""
    if not group["nesterov"]:
        return out.copy_(M)
    if group["momentum_form"] == "ema":
        return torch.lerp(G, M, group["momentum"], out=out)
    return torch.add(G, M, alpha=group["momentum"], out=out)


def _stack(batch: list[Block], group: dict) -> Tensor:
    """U of blocks that share a shape, as one contiguous batch (N, A, B)."""
    first = batch[0].momentum
    U = torch.empty(len(batch), *first.shape, dtype=first.dtype, device=first.device)
    for block, slot in zip(batch, U.unbind(0), strict=True):
        direction(group, block.grad, block.momentum, slot)
    return U


def _torch_orthogonalise(block: Block, group: dict) -> Tensor:
    """What torch.optim.Muon does, in its order of operations: bf16 first, then a norm clamped at 1e-7, one matrix a time."""
    g, m = block.grad, block.momentum
    X = (g.lerp(m, group["momentum"]) if group["nesterov"] else m).to(torch.bfloat16, copy=True)
    X = X.mT if g.shape[0] > g.shape[1] else X
    X.div_(X.norm().clamp(min=1e-7))
    O = iterate(X, triples(group["coefficients"], group["ns_steps"]))
    return O.contiguous().mT if g.shape[0] > g.shape[1] else O  # a bf16 add_ rounds differently with other strides


_compiled_orthogonalise = None


def _compiled():
    global _compiled_orthogonalise
    if _compiled_orthogonalise is None:
        _compiled_orthogonalise = torch.compile(orthogonalise, dynamic=False)
    return _compiled_orthogonalise

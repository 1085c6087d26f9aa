"""Muon: momentum orthogonalised by Newton-Schulz for matrices, AdamW for everything else, in one torch optimizer.

    G <- G + wd W                                              coupled decay only (decoupled_wd=False)
    M <- mu M + (1 - mu) G     U = (1 - mu) G + mu M           momentum_form="ema"; without Nesterov U = M
    M <- mu M + G              U = G + mu M                    momentum_form="classical"
    O  = NS(U)                                                 per block, see newton_schulz.py
    O <- variant(O)                                            normuon, adamuon, hyperball: see variants.py
    W <- (1 - lr wd) W                                         decay by the UNADJUSTED lr; cautious: where O * W >= 0
    W <- W - lr s(A, B) O                                      A, B: shape of the block

    s(A, B)   original: sqrt(max(1, A/B)) · match_rms_adamw: rms_target sqrt(max(A, B)) · spectral: sqrt(A/B) ·
              none: 1 · or a function of (A, B)

    muon = Muon(matrices, lr=0.02)                             alone, beside any optimizer for the rest; or mixed:
    Muon([dict(params=matrices, use_muon=True), dict(params=others, use_muon=False, lr=3e-4)])

Units    lr is in spectral norm per step under `original` (0.02 is usual): it is no AdamW rate. RMS(O) ~ 1/sqrt(max(A,
         B)), so an AdamW rate fits under `match_rms_adamw`; optim/rates.py translates.
Groups   dict(params=..., use_muon=True|False, name=..., lr=..., ...). A bare iterable of matrices is one Muon group.
         AdamW groups take lr, betas, eps, weight_decay and are bit for bit torch.optim.AdamW(fused=True).
Blocks   2-D: one matrix · 3-D (E, A, B): E matrices · 4-D and above (convolution): flattened to (out, -1). A parameter
         tag `p.muonlm = {"split": (dim, [sizes])}` or `{"heads": (dim, n)}`, or the group's `splits` (one entry per
         parameter, it wins over the tag), cuts a matrix into blocks. {"flatten": True} treats a 3-D tensor like a
         convolution; {"transposed": True} says that it is stored (in, out), so that s takes (B, A); "adamw": [i, ...]
         beside "split" leaves those slices to AdamW, by group["slices"] = dict(lr_ratio=..., betas=..., eps=...,
         weight_decay=...). Blocks of equal shape share one batched Newton-Schulz, within `max_batch_bytes`.
Memory   a step needs, beyond the state, about 4 x max_batch_bytes (8 x with 16-bit weights or momentum, which are
         widened as many at a time), or as many fp32 copies of the largest parameter, if that is more. It is 64 MiB
         unless given, on a GPU 128 MiB
State    Muon: `momentum_buffer` (fp32, or `state_dtype`; fp64 for fp64 parameters), variants `second_momentum`; bf16
         parameters `mantissa`, the 16 bits that make them as exact as fp32 ones (param_dtype_comp=False: rounded each
         step instead). AdamW: `exp_avg`, `exp_avg_sq`, `step`. In the group: `step`, `ns_chosen` {"128x512": "hybrid
         bfloat16"}, what "auto" chose, kept so that a resumed run repeats it.
GPU      after the first step nothing in `step()` waits for the device, unless grads="local", sharded matrices,
         ns_method="cayley" or compat="torch" with a tensor as lr are used. A step can be captured in a CUDA graph, once
         one was taken: gradients then stay where they are (zero_grad(set_to_none=False)), an lr that is to change is a
         tensor on the device, and a momentum schedule must have come to its end. A replay runs no Python: add the
         replays to the groups' `step` before the state is saved.
Counters `ns_calls`: number of blocks orthogonalised in the last step, for a check that Muon is really at work.
Raises   ValueError for bad hyper-parameters, for tensors that have no polar factor, and for a captured step that would
         not go on when replayed, naming the tensor and the remedy. A non-finite gradient is not looked for (that would
         stall a GPU): it makes the weights NaN, so check the loss first.
Source   Keller Jordan, github.com/KellerJordan/Muon; classical momentum, match_rms_adamw: Liu et al., arXiv 2502.16982;
         cautious decay: Chen et al., arXiv 2510.12402.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import adamw
from ..schedule import momentum_at
from ..tensors import Kept, is_sharded, like, local
from .blocks import block_shapes
from .cut import cut
from .distributed import GRADS, Owners, cost
from .groups import ADAMW, ROUTED, SETTINGS, complete, names_of, settled
from .memory import chunks, master_weights, matrix_layout, round_master
from .probe import choose
from .update import decay_rate, decays, direction, update


class Muon(torch.optim.Optimizer):
    """See the module docstring. Hyper-parameters given here are the defaults of every group that does not set its own.

    params_or_groups   a bare list trains all of it by Muon, embeddings too: let `route` choose
    lr, weight_decay   0.02 and 0.0 if left out
    ns_steps           5 if left out, or the length of a set that is a schedule (polar_express4: 4)
    coefficients       polar_express if left out
    ns_method          "auto" picks among direct, hybrid and gram by a probe; ns_dtype "auto" among fp32 and bf16
    rms_target         of match_rms_adamw and adamuon; sqrt((1 - b1) / (1 + b1)) of the AdamW to match is another choice
    schedulers         OneCycleLR needs cycle_momentum=False: momentum has its own schedule here
    wd_follows_lr      wd_t = wd lr_t / peak; peak: the group's "base_lr", OneCycleLR's "max_lr", "initial_lr", or its
                       first lr
    process_group      None, "world" or a ProcessGroup: matrices are shared out among its ranks, see distributed.py;
                       `grads` says whether gradients arrive "averaged" (by DDP) or "local". FSDP2's DTensors bring
                       their own group
    compile            Newton-Schulz through torch.compile; torch gives up after 8 kinds of batch (recompile_limit)
    none_grad          a parameter without gradient is skipped, or ("zero") treated as if it had a zero one
    diagnostics        see optim/watch/diagnostics.py
    compat             "torch": the arithmetic of torch.optim.Muon bit for bit, to compare with: Keller's coefficients,
                       bf16, a floor of 1e-7 under the norm, one matrix at a time
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
        max_batch_bytes: int | None = None,
        compile: bool = False,
        state_dtype: str | torch.dtype | None = None,
        param_dtype_comp: bool = True,
        none_grad: str = "skip",
        diagnostics=None,
        process_group=None,
        grads: str = "averaged",
        compat: str | None = None,
    ):
        muon = settled({key: value for key, value in locals().items() if key in SETTINGS})
        if grads not in GRADS:
            raise ValueError(f'grads={grads!r} is unknown; use "averaged" (DDP did it) or "local" (Muon shall)')
        self.ns_calls = 0
        self.diagnostics: Any = diagnostics
        self.replicas = Owners.of(process_group, grads)
        self.shards = None  # the owners of DTensor parameters
        self.settled = False  # whether all matrices have an owner, see `assign_owners`
        if isinstance(params_or_groups, torch.nn.Module) or hasattr(params_or_groups, "groups"):
            kind = type(params_or_groups).__name__
            raise TypeError(f"Muon takes parameters or groups, found a {kind}; write {ROUTED}")
        shared = {"lr": 0.02 if lr is None else lr, "weight_decay": 0.0 if weight_decay is None else weight_decay}
        super().__init__(params_or_groups, shared | {"muon": muon, "adamw": dict(ADAMW)})
        for key, given in (("lr", lr), ("weight_decay", weight_decay)):
            used = [float(group[key]) for group in self.param_groups if group["use_muon"]]
            if given is not None and used and float(given) not in used:
                raise ValueError(
                    f"{key}={given} was given, but every Muon group brings its own ({used[0]:g}); set it there, e.g. "
                    f"plan.groups(lr=0.02, wd=0.1), and leave it out here"
                )

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("ns_calls", 0)
        for name in ("diagnostics", "replicas", "shards"):
            self.__dict__.setdefault(name, None)
        self.__dict__.setdefault("settled", False)

    def __getstate__(self):
        if self.replicas or self.shards:
            raise ValueError(
                "a distributed Muon holds a part of the state and cannot be copied or pickled; use named_state, which "
                "gathers the whole"
            )
        return super().__getstate__()

    # ---------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(complete(param_group, self.param_groups, self.defaults))
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

    # ---------------------------------------------------------------------------------------------- state

    group_state = ("step", "ns_chosen")  # what a group remembers; its hyper-parameters come from the config

    def owners(self) -> list[Owners]:
        """The groups of ranks over which the state is spread; none on one device. A collective call."""
        self.assign_owners()
        return [owners for owners in (self.replicas, self.shards) if owners]

    def state_layout(self, p: Tensor, group: dict) -> dict[str, Kept]:
        """{key: (shape, dtype)} of the state of one parameter of a group, whole."""
        if not group["use_muon"]:
            return adamw.layout(p)
        split = next(split for q, split in zip(group["params"], group["splits"]) if q is p)
        return matrix_layout(p, split, group)

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
        if any(p.is_cuda for p in gradients) and torch.cuda.is_current_stream_capturing():
            self._check_capture(gradients)
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group, gradients)
            else:
                adamw.step(group, self.state, gradients)
        if self.replicas:
            self.replicas.share_weights()
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Of every parameter that this rank shall update now, the gradient to use."""
        found = {p: grad for group in self.param_groups for p in group["params"] if (grad := p.grad) is not None}
        if sparse := [p for p, grad in found.items() if grad.is_sparse]:
            name = next(name for group in self.param_groups for name, p in _named(group) if p is sparse[0])
            raise ValueError(
                f"parameter {name} of shape {tuple(sparse[0].shape)} has a sparse gradient, which neither "
                f"Newton-Schulz nor this AdamW can use; use sparse=False in its embedding"
            )
        self.assign_owners()
        if self.replicas or self.shards:
            params = {p: name for group in self.param_groups for name, p in _named(group)}
            if self.replicas and (whole := {p: name for p, name in params.items() if not is_sharded(p)}):
                found = self.replicas.gradients(whole, found)
            if self.shards:
                found = self.shards.complete([p for p in params if is_sharded(p)], found)
        for group in self.param_groups:
            for p in group["params"] if group["use_muon"] and group["none_grad"] == "zero" else ():
                if p not in found and self.updates(p):
                    found[p] = torch.zeros_like(p)
        return found

    def _check_capture(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """ValueError for a step whose replays would begin anew, or stand still."""
        if new := [p for p in gradients if not self.state[p]]:
            raise ValueError(
                f"a tensor of shape {tuple(new[0].shape)} has no state yet, and a captured step would reset it in each "
                f"replay; take one step before capturing"
            )
        for group in (g for g in self.param_groups if g["use_muon"] and g["momentum_schedule"]):
            if group["step"] < (end := group["momentum_schedule"][-1][0]):
                raise ValueError(
                    f"the momentum of group {group['name']!r} changes until step {end}, and a captured step repeats "
                    f"that of step {group['step']}; capture from step {end} on, or leave `momentum_schedule` out"
                )

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
        found = [(p, grad, split, name) for p, split, name in members if (grad := gradients.get(p)) is not None]
        whole, shards = ([f for f in found if is_sharded(f[0]) == sharded] for sharded in (False, True))
        for part, step in ((whole, self._step_whole), (shards, self._step_shards)):
            for chunk in chunks(group, part):
                masters = self.master_weights(group, [p for p, *_ in chunk])
                weights = [masters.get(p, local(p)) for p, *_ in chunk]
                step(group, chunk, weights, *self._momentum(group, chunk, weights))
                for p, master in masters.items():
                    round_master(local(p), local(self.state[p]["mantissa"]), master)

    def master_weights(self, group: dict, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """What is really updated of those `params` that are bf16; see memory.py."""
        return master_weights(group, params, self.state)

    def _step_whole(
        self, group: dict, found: list[tuple], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        watch = self.diagnostics
        observe = watch.observe if watch is not None and watch.due(group["step"]) else None
        self.ns_calls += update(group, cut(group, self.state, found, weights, grads, momenta), observe)

    def _step_shards(
        self, group: dict, found: list[tuple], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        """U's shards go to the owners, who step zero weights without decay; the change of each shard comes back."""
        assert self.shards is not None
        shards = {
            f[0]: direction(group, G, M, torch.empty_like(M)) for f, G, M in zip(found, grads, momenta, strict=True)
        }
        owned = self.shards.to_owners(shards)
        changes = {p: torch.zeros_like(U) for p, U in owned.items()}
        plain = {**group, "nesterov": False, "weight_decay": 0.0}
        mine, U = [f for f in found if f[0] in owned], list(owned.values())
        self.ns_calls += update(plain, cut(plain, self.state, mine, list(changes.values()), U, U))
        deltas = self.shards.from_owners(changes, shards)
        decay = decay_rate(group)
        for weight, delta in zip(weights, deltas, strict=True):
            if decays(decay) and group["cautious"]:
                rate, kept = group["lr"] * decay, weight * (delta * weight <= 0.0)
                weight.sub_(kept * rate) if isinstance(rate, Tensor) else weight.sub_(kept, alpha=rate)
            elif decays(decay):
                weight.mul_(1.0 - group["lr"] * decay)
            weight.add_(delta)

    def _momentum(self, group: dict, found: list[tuple], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Update the momentum of all parameters (of their shards); return gradients and momenta, both fp32 or fp64."""
        mu, coupled = group["momentum"], not group["decoupled_wd"] and group["weight_decay"]
        momenta, grads, stored = [], [], []
        for p, grad, split, _ in found:
            kept = self.state[p]
            if "momentum_buffer" not in kept:
                self.new_state(p, split, group)
            M = local(kept["momentum_buffer"])
            stored.append(M)
            wide = M.dtype if M.dtype not in (torch.bfloat16, torch.float16) or group["compat"] else torch.float32
            G = local(grad)
            momenta.append(M if M.dtype == wide else M.to(wide))  # half of the time of .to is finding that out
            grads.append(G if G.dtype == wide else G.to(wide))
        if coupled:
            grads = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
        if group["momentum_form"] == "ema":
            torch._foreach_lerp_(momenta, grads, 1.0 - mu)
        else:
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, grads)
        for kept, M in zip(stored, momenta, strict=True):
            if M is not kept:
                kept.copy_(M)
        return grads, momenta

    def new_state(self, p: Tensor, split: dict | None, group: dict) -> None:
        """All but the mantissa, which `master_weights` makes. What is not sharded like the parameter is the owner's."""
        for key, (shape, dtype) in matrix_layout(p, split, group).items():
            if key == "momentum_buffer":
                self.state[p][key] = like(p, dtype)
            elif key != "mantissa" and (not is_sharded(p) or (self.shards and self.shards.owns(p))):
                self.state[p][key] = torch.zeros(shape, dtype=dtype, device=p.device)


def _named(group: dict) -> Iterator[tuple[str, Tensor]]:
    return zip(names_of(group), group["params"], strict=True)

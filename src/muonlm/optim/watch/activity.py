"""Is Muon at work? A check that stops a run whose matrices are silently trained by something else, or not at all.

    check = ActivityCheck(optimizer, every=1000)
    with check(step): optimizer.step()                           step = 1, 2, ...: the one about to be taken

Raises   MuonInactive (a RunFailed), naming the tensor, what was found and what to do
Source   silent SGD and empty Muon groups that went unnoticed elsewhere: DeepSpeed #8441, #8438, LlamaFactory #8041
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from muonlm.errors import RunFailed

from ..muon.blocks import blocks, predicted_rms
from ..muon.groups import names_of
from ..muon.muon import Muon
from ..muon.update import decay_rate, direction
from ..tensors import is_sharded
from .advice import HIGH_ERROR, RMS_BAND
from .diagnostics import PROBES, block_list, exact_error, hutchinson_error, probe_vectors, rms, scalar_map, unit

ERROR_SLACK = 0.3  # of the estimate and of bf16, when e is compared with that of exact arithmetic


class MuonInactive(RunFailed):
    """Muon does not do what its settings say; the text names the tensor, what was found and what to do."""


class ActivityCheck:
    """Stops a run in which Muon is not at work, in step 1 and every `every` steps; other steps cost nothing.

    with check(step): optimizer.step()

    Asserts   ns_calls = number of Muon blocks that have a gradient; every Muon weight whose direction is not zero
              moved; the update (decay taken out) has an RMS within RMS_BAND of lr s / sqrt(max(A, B)) and, for variant
              "muon", is nearly orthogonal. Where U lacks rank, both are compared with what NS makes of its spectrum
    Ranks     ns_calls is summed over the owners; each checks the weights whose momentum it holds
    Cost      in a checked step: a copy of the Muon weights, O(mn) a block; svdvals only in doubt
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int = 1000):
        self.optimizer, self.every = optimizer, every
        if not any(group.get("use_muon") for group in optimizer.param_groups):
            raise MuonInactive(
                f"{type(optimizer).__name__} has no group with use_muon=True, so nothing is trained by Muon: "
                "look at the routing table, or use `name` adamw"
            )

    @contextlib.contextmanager
    def __call__(self, step: int):
        """Around optimizer step number `step` (the first is 1)."""
        if step != 1 and (not self.every or step % self.every):
            yield
            return
        groups = [group for group in self.optimizer.param_groups if group.get("use_muon")]
        for group in groups:
            for name, p in zip(names_of(group), group["params"], strict=True):
                if p.ndim < 2:
                    raise MuonInactive(
                        f"{name} has become a flat tensor of shape {tuple(p.shape)}, a shard without rows and "
                        "columns: it has no polar factor. Use FSDP2 (fully_shard) or DDP instead of FSDP1 or "
                        "ZeRO flattening"
                    )
        with torch.no_grad():
            before = [found for group in groups for found in self._before(group)]
        yield
        with torch.no_grad():
            self._count([name for _, name, *_ in before])
            for found in before:
                if found[5] is not None:
                    self._check(*found)

    def _before(self, group: dict) -> Iterator[tuple]:
        """The arguments of _check for every block with a gradient."""
        alive = [p for p in group["params"] if p.grad is not None or group["none_grad"] == "zero"]
        mine = [
            p
            for p in alive
            if not is_sharded(p) and (not isinstance(self.optimizer, Muon) or self.optimizer.updates(p))
        ]
        old = {p: w.clone() for p, w in self._weights(group, mine).items()}
        for name, p, split, i, factor in block_list(group):
            if p in old:
                yield group, name, p, split, i, blocks(old[p], split)[i].double(), factor
            elif any(p is q for q in alive):
                yield group, name, p, split, i, None, factor  # sharded, or another rank's: counted here, checked there

    def _weights(self, group: dict, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """What the optimizer really updates: the parameter, or the fp32 numbers of a bf16 one and its mantissa."""
        masters = self.optimizer.master_weights(group, params) if isinstance(self.optimizer, Muon) else {}
        return {p: masters.get(p, p.detach()) for p in params}

    def _count(self, names: list[str]) -> None:
        calls, owners = getattr(self.optimizer, "ns_calls", 0), self._owners()
        if owners:
            ranks = owners.gather_objects((calls, names))
            calls, names = sum(c for c, _ in ranks), sorted({name for _, there in ranks for name in there})
        if calls != len(names):
            some = ", ".join(sorted(names)[:2])
            raise MuonInactive(
                f"Muon inactive: {calls} Newton-Schulz calls for {len(names)} blocks that have a gradient "
                f"({some}, …). Does a wrapper step in Muon's place? Call muonlm.optim.Muon.step itself"
            )

    def _check(self, group: dict, name: str, p: Tensor, split: dict | None, i: int, old: Tensor, factor: float) -> None:
        momentum, lr = self.optimizer.state[p].get("momentum_buffer"), float(group["lr"])
        if momentum is None and not self._owners():
            raise MuonInactive(
                f"{name} has a gradient but no momentum after a step: what stepped is not muonlm.optim.Muon. "
                "Look for a wrapper (DeepSpeed, Accelerate) that builds its own optimizer"
            )
        if momentum is None or lr == 0.0:
            return  # another rank owns it, or the schedule says to stand still
        M = blocks(momentum, split)[i].double()
        G = torch.zeros_like(M) if p.grad is None else blocks(p.grad, split)[i].double()
        if not M.any():
            return  # an expert without tokens, or a layer behind a projection that starts at zero
        new = self._weights(group, [p])[p]
        moved = blocks(new, split)[i].double() - old
        if not moved.any():
            raise MuonInactive(
                f"{name} did not move in a Muon step of lr {lr:g}, though it has a gradient. Does a wrapper "
                f"undo or redirect the step, or is the update below the rounding of {p.dtype}? Keep "
                "param_dtype_comp=True"
            )
        update = moved + lr * decay_rate(group) * (old * (moved * old <= 0.0) if group["cautious"] else old)
        weight_rms = rms(old)
        predicted = predicted_rms(group, lr, factor, max(old.shape), weight_rms)
        if predicted < 8 * torch.finfo(new.dtype).eps * weight_rms:
            return  # the rounding of the weights would be measured
        size, error, plain = rms(update), 0.0, group["variant"] == "muon"
        if plain:
            O = (update if update.shape[0] <= update.shape[1] else update.mT) / (lr * factor)
            error = hutchinson_error(O, probe_vectors(name, O.shape[0], PROBES, O)).item()
        if RMS_BAND[0] <= size / predicted <= RMS_BAND[1] and error <= HIGH_ERROR:
            return
        k, e = self._reference(group, G, M) if plain else (1.0, 0.0)
        if plain:  # the estimate only chooses whom to look at: on few rows it is off by more than the slack
            error = exact_error(O).item()
        ratio = size / (k * predicted)
        if not RMS_BAND[0] <= ratio <= RMS_BAND[1]:
            raise MuonInactive(
                f"{name}: update RMS {size:.3g} is {ratio:.2g}x the prediction {k * predicted:.3g} (lr {lr:g}, "
                f"lr_mode {group['lr_mode']}): no Newton-Schulz step is that long. Check lr_mode, and what "
                "wraps the optimizer"
            )
        if error > e + ERROR_SLACK:
            raise MuonInactive(
                f"{name}: the update is not orthogonal, ||O O^T - I||_F / sqrt(m) = {error:.2g} where "
                f"Newton-Schulz gives {e:.2g}: it was replaced or skipped. Check what wraps the optimizer, or "
                'set ns_dtype="float32"'
            )

    def _owners(self):
        """Who shares the matrices out among ranks, or None on one."""
        return getattr(self.optimizer, "replicas", None) or getattr(self.optimizer, "shards", None)

    def _reference(self, group: dict, G: Tensor, M: Tensor) -> tuple[float, float]:
        """(k, e) that Newton-Schulz reaches on this U in exact arithmetic."""
        if not group["decoupled_wd"] and group["weight_decay"]:
            return 1.0, math.inf  # decay is a part of the gradient that is not at hand
        # with grads="local" the averaged gradient is gone; in the first step M is parallel to U
        owners = self._owners()
        U = M if owners and owners.grads == "local" else direction(group, G, M, torch.empty_like(M))
        sigma = torch.linalg.svdvals(unit(U))
        if group["ns_method"] == "cayley":
            f = (sigma > 1e-3).double()  # it lifts what is above that to about 1
        else:
            f = scalar_map(sigma, group["coefficients"], group["ns_steps"])
        return f.square().mean().sqrt().item(), (f.square() - 1.0).square().mean().sqrt().item()

"""Muon on many ranks: every matrix has one owner, who alone keeps its momentum, orthogonalises it and updates it.

    cost    20 m^2 n + 10 m^3 a block (m <= n), summed over the blocks of a parameter; a stack of experts counts as one
    owner   longest first to the least loaded rank, ties by name (then by rank): a function of names, shapes and N alone
    best    speed-up with K equal matrices is K / ceil(K / N); `describe()` prints max/mean of the predicted load

A step's collectives, and the bytes a rank sends in them; P: bytes of Muon's parameters
    grads="averaged"   DDP averages them   all-gather of the weights                  (N-1)/N P
    grads="local"      nobody does         reduce-scatter of gradients, all-gather    2 (N-1)/N P    *
    FSDP2, Shard(0)    FSDP2 does          all-to-all of U's shards and back          2 (N-1)/N P/N  *
                                                                                     * and a small all-reduce

Local    covers every gradient of the optimizer. Matrices are averaged into their owners. AdamW's tensors are
         all-reduced (mean), unless the first step finds them equal on all ranks: then somebody, such as DDP with the
         matrices on its ignore list, does that already. `p.grad` itself stays local: do not clip by it. A gradient that
         only some ranks have counts as zero on the others; a parameter that has none anywhere is skipped.
Buffers  flat, one row an owner, padded to the longest, at most ROUND_BYTES a row (or one parameter): a step needs N + 1
         rows beyond the state. Every rank enters every collective, also one that owns nothing or holds an empty shard.
Weights  travel in their own dtype; the mantissa of bf16 parameters stays with the owner.
FSDP2    `momentum_buffer` and `mantissa` are DTensors like the parameter; the variants' `second_momentum` is the
         owner's. Owners see U whole, cut into its blocks; decay and the cautious mask act on the shards. Diagnostics do
         not see sharded matrices. fully_shard makes new parameters, without the tags of our models: call it in
         `keep_tags`.
State    of one rank is partial: `optimizer.state_dict()` is local. named_state (state.py) gathers it, for any other N.
Raises   ValueError on all ranks if gradients or weights are not as promised in the first step: averaged twice, not
         averaged, or different weights to start from; and for DTensors that are not Shard(0) on one 1-D mesh
Source   owners: KellerJordan/Muon; reduce-scatter to owners: nanochat. LPT: Graham, SIAM J. Appl. Math. 17 (1969)
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

GRADS = ("averaged", "local")
ROUND_BYTES = 64 * 2**20
SAME = 1e-5  # relative difference of norms: equal bits give equal norms up to their summation order


def cost(shapes: list[tuple[int, int]]) -> float:
    """Flops of five direct steps on blocks of these shapes."""
    return sum(20.0 * min(s) ** 2 * max(s) + 10.0 * min(s) ** 3 for s in shapes)


def share_out(items: list[tuple[float, str]], load: list[float]) -> list[tuple[int, int]]:
    """[(item, rank)] for items (cost, name), longest first to the least loaded rank. `load`: what each has already."""
    shares = []
    for i in sorted(range(len(items)), key=lambda i: (-items[i][0], items[i][1])):
        rank = load.index(min(load))
        load[rank] += items[i][0]
        shares.append((i, rank))
    return shares


@contextlib.contextmanager
def keep_tags(model: torch.nn.Module):
    """`with keep_tags(model): fully_shard(model)`: the parameters that it makes keep their tags, such as splits."""
    tags = {name: getattr(p, "muonlm") for name, p in model.named_parameters() if hasattr(p, "muonlm")}
    yield
    for name, p in model.named_parameters():
        if name in tags:
            setattr(p, "muonlm", tags[name])


def check_sharding(group: dict, names: list[str], tensors: list[Tensor]) -> None:
    """ValueError for the DTensors of a Muon group that cannot be gathered to an owner."""
    for name, p, split in zip(names, tensors, group["splits"], strict=True):
        if not is_sharded(p):
            continue
        if p.device_mesh.ndim != 1 or not p.placements[0].is_shard(0):
            raise ValueError(
                f"parameter {name} is a DTensor with placements {p.placements} on a mesh of {p.device_mesh.ndim} "
                f"dimensions; Muon takes Shard(0) on one dimension: use fully_shard(model) with a 1-D mesh, or DDP"
            )
        if group["variant"] == "hyperball":
            raise ValueError(
                f'variant="hyperball" needs whole weights, but parameter {name} is sharded; use another variant, or DDP'
            )
        if (split or {}).get("adamw"):
            raise ValueError(
                f"parameter {name} is sharded and leaves slices to AdamW, which needs it whole; drop the slices "
                f"from its split, put it into an AdamW group, or use DDP"
            )


class Owners:
    """The ranks of one process group, what each owns, and how gradients, shards and weights travel between them."""

    def __init__(self, group, grads: str):
        self.group, self.grads = group, grads
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.owner: dict[Tensor, int] = {}  # in the order of the exchanges, equal on all ranks
        self.load = [0.0] * self.size
        self.checked = False
        self.averaged: set[Tensor] = set()  # AdamW's tensors that somebody else averages, under grads="local"

    @classmethod
    def of(cls, process_group, grads: str) -> "Owners | None":
        """None where there is nobody to share with."""
        if process_group is None:
            if grads == "local":
                raise ValueError('grads="local" needs a group to average them over; set process_group="world"')
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"process_group={process_group!r}, but there is no process group yet; call "
                f"torch.distributed.init_process_group first, or leave it out on one device"
            )
        group = dist.group.WORLD if process_group == "world" else process_group
        if isinstance(group, str) or dist.get_rank(group) < 0:
            raise ValueError(
                f'process_group={process_group!r} is not a group that this rank is in; use "world" or one of its own'
            )
        return cls(group, grads) if dist.get_world_size(group) > 1 else None

    @classmethod
    def of_mesh(cls, params: list["DTensor"]) -> "Owners":
        mesh = params[0].device_mesh
        if any(p.device_mesh != mesh for p in params):
            raise ValueError(
                "the matrices are sharded over different meshes; shard the model by one mesh, or make one Muon for each"
            )
        return cls(mesh.get_group(), "averaged")

    def assign(self, items: list[tuple[float, str, Tensor]]) -> bool:
        """Give the (cost, name, parameter) that have no owner one, beside what is owned already; False if all have."""
        new = [item for item in items if item[2] not in self.owner]
        for i, rank in share_out([(price, name) for price, name, _ in new], self.load):
            self.owner[new[i][2]] = rank
        self.checked &= not new
        return bool(new)

    def owns(self, p: Tensor) -> bool:
        return self.owner.get(p) == self.rank

    def describe(self) -> str:
        mean = sum(self.load) / self.size
        counts = "+".join(str(sum(o == r for o in self.owner.values())) for r in range(self.size))
        return (
            f"Muon owners: {counts} matrices on {self.size} ranks, predicted load max/mean {max(self.load) / mean:.2f}"
        )

    def broadcast(self, value):
        """Rank 0's value."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    # ---------------------------------------------------------------------------------------------- replicas

    def gradients(self, params: dict[Tensor, str], found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Of `found` what this rank works with, averaged: gradients of its own matrices and of all that nobody owns."""
        if not self.checked:
            self._check(params, found)
        if self.grads == "averaged":
            return {p: g for p, g in found.items() if p not in self.owner or self.owns(p)}
        result = {p: g for p, g in found.items() if p not in params or p in self.averaged}
        waiting = [p for p in self.owner if p in params] + [
            p for p in params if p not in self.owner and p not in self.averaged
        ]
        waiting = self._present(waiting, found)
        for batch in self._rounds([p for p in waiting if p in self.owner]):
            result |= self._reduce_scatter(batch, found)
        for batch in self._rounds([p for p in waiting if p not in self.owner]):
            flat = _flat([found.get(p, p.new_zeros(())).expand(p.shape) for p in batch[0]])
            dist.all_reduce(flat, group=self.group)
            result |= _unflat(flat.div_(self.size), batch[0])
        return result

    def share_weights(self) -> None:
        """Every rank gets the matrices of the others."""
        for batch in self._rounds(list(self.owner)):
            width, example = _width(batch), next(p for row in batch for p in row)
            row = example.new_zeros(width)
            if batch[self.rank]:
                mine = _flat(batch[self.rank])
                row[: mine.numel()] = mine
            rows = row.new_empty(self.size * width)
            _newest("all_gather_single", "all_gather_into_tensor")(rows, row, group=self.group)
            for rank, (params, theirs) in enumerate(zip(batch, rows.split(width), strict=True)):
                if params and rank != self.rank:
                    torch._foreach_copy_(params, list(_unflat(theirs, params).values()))

    def _reduce_scatter(self, batch: list[list[Tensor]], found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        width, example = _width(batch), next(p for row in batch for p in row)
        rows = example.new_zeros(self.size, width)
        for row, params in zip(rows, batch, strict=True):
            for slot, p in zip(
                row.split([*(p.numel() for p in params), width - _length(params)]), params, strict=False
            ):
                if p in found:
                    slot.copy_(found[p].reshape(-1))
        mine = rows.new_empty(width)
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        scatter(mine, rows.view(-1), group=self.group)  # sum and divide: not every backend has AVG
        return _unflat(mine.div_(self.size), batch[self.rank])

    def _check(self, params: dict[Tensor, str], found: dict[Tensor, Tensor]) -> None:
        """Compare norms over the ranks; all come to one verdict. Postponed while gradients are zero or not finite."""
        tensors = [found.get(p) for p in params] + list(params)
        zero = next(iter(params)).new_zeros((), dtype=torch.float32)
        norms = torch.stack(
            [
                zero
                if t is None
                else torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).float()
                for t in tensors
            ]
        )
        both = torch.cat([norms, -norms])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        high, low = both.tolist()[: len(norms)], [-x for x in both.tolist()[len(norms) :]]
        if not all(map(math.isfinite, [*high, *low])):
            return
        differ = [h - l > SAME * h for h, l in zip(high, low, strict=True)]
        weights = dict(zip(params, differ[len(params) :], strict=True))
        if other := [params[p] for p, differs in weights.items() if differs]:
            raise ValueError(
                f"the ranks hold different weights, first {other[0]} ({len(other)} in all); start them equal: same "
                f"seed or same checkpoint, or wrap the model in DDP before the optimizer is made"
            )
        nonzero = {p: d for p, h, d in zip(params, high, differ) if h > 0.0}
        matrices = {p: d for p, d in nonzero.items() if p in self.owner}
        if not matrices:
            return
        self.checked = True
        if self.grads == "averaged":
            if other := [params[p] for p, differs in nonzero.items() if differs]:
                raise ValueError(
                    f'grads="averaged", but the gradients of {other[0]} differ between ranks ({len(other)} tensors in '
                    f'all): wrap the model in DDP, or let Muon average them with grads="local"'
                )
        elif not any(matrices.values()):
            raise ValueError(
                'grads="local", but the gradients of all matrices are already equal on all ranks: DDP averages them '
                'too, or all ranks read the same data. Use grads="averaged", or keep the matrices out of DDP'
            )
        else:
            self.averaged = {p for p, differs in nonzero.items() if p not in self.owner and not differs}

    # ---------------------------------------------------------------------------------------------- shards

    def complete(self, params: list[Tensor], found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """`found`, with zeros for the gradients of sharded parameters that only other ranks have."""
        zeros = {p: torch.zeros_like(p) for p in self._present(params, found) if p not in found}
        return found | zeros

    def to_owners(self, shards: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Shards (local tensors) of parameters -> the whole tensors of those that this rank owns."""
        whole = {}
        for batch in self._rounds(list(shards)):
            mine, example = batch[self.rank], next(shards[p] for row in batch for p in row)
            sent = torch.cat([shards[p].reshape(-1) for row in batch for p in row])
            lengths = [sum(self._rows(p, r) * (p.numel() // len(p)) for p in mine) for r in range(self.size)]
            received = example.new_empty(sum(lengths))
            splits = [sum(shards[p].numel() for p in row) for row in batch]
            dist.all_to_all_single(received, sent, lengths, splits, group=self.group)
            parts = [
                dict(zip(mine, chunk.split([self._rows(p, r) * (p.numel() // len(p)) for p in mine]), strict=True))
                for r, chunk in enumerate(received.split(lengths))
            ]
            whole |= {p: torch.cat([part[p] for part in parts]).view(p.shape) for p in mine}
        return whole

    def from_owners(self, whole: dict[Tensor, Tensor], shards: dict[Tensor, Tensor]) -> list[Tensor]:
        """The way back: this rank's shard of every parameter in `shards`, in that order and shape."""
        result = {}
        for batch in self._rounds(list(shards)):
            mine, example = batch[self.rank], next(shards[p] for row in batch for p in row)
            cut = {p: whole[p].reshape(len(p), -1).split([self._rows(p, r) for r in range(self.size)]) for p in mine}
            pieces = [[cut[p][r].reshape(-1) for p in mine] for r in range(self.size)]
            sent = torch.cat([piece for row in pieces for piece in row] or [example.new_empty(0)])
            lengths = [sum(shards[p].numel() for p in row) for row in batch]
            received = example.new_empty(sum(lengths))
            dist.all_to_all_single(
                received, sent, lengths, [sum(map(Tensor.numel, row)) for row in pieces], group=self.group
            )
            order = [p for row in batch for p in row]
            slots = received.split([shards[p].numel() for p in order])
            result |= {p: slot.view(shards[p].shape) for p, slot in zip(order, slots, strict=True)}
        return [result[p] for p in shards]

    def _rows(self, p: Tensor, rank: int) -> int:
        """Rows of p on a rank under Shard(0): ceil(A / N) each until they run out."""
        step = -(-len(p) // self.size)
        return min(step, max(0, len(p) - rank * step))

    # ---------------------------------------------------------------------------------------------- state

    def gather(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """(all that the ranks hold, on rank 0: what it receives on its CPU; elsewhere nothing; the names of all)."""
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, group=self.group)
        device = next((p.device for p in self.owner), torch.device("cpu"))
        whole = {}
        for rank, index in enumerate(held):
            for name, (shape, dtype) in index.items():  # one by one, as bytes: no backend sends every dtype
                if rank == 0:
                    whole |= {name: tensors[name]} if self.rank == 0 else {}
                elif self.rank == rank:
                    dist.send(tensors[name].to(device).reshape(-1).view(torch.uint8), group=self.group, group_dst=0)
                elif self.rank == 0:
                    bytes_ = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device)
                    dist.recv(bytes_, group=self.group, group_src=rank)
                    whole[name] = bytes_.view(dtype).view(shape).cpu()
        return whole, [name for index in held for name in index]

    def gather_objects(self, value) -> list:
        """Every rank's value, on every rank."""
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value, group=self.group)
        return held

    # ---------------------------------------------------------------------------------------------- pieces

    def _present(self, params: list[Tensor], found: dict[Tensor, Tensor]) -> list[Tensor]:
        """Those of `params` that have a gradient on any rank."""
        if not params:
            return []
        mask = torch.tensor([float(p in found) for p in params], device=params[0].device)
        dist.all_reduce(mask, dist.ReduceOp.MAX, group=self.group)
        return [p for p, present in zip(params, mask.tolist(), strict=True) if present]

    def _rounds(self, params: list[Tensor]) -> Iterator[list[list[Tensor]]]:
        """Parameters that travel together: one list an owner (those without owner: in the first), of one dtype."""
        for dtype in dict.fromkeys(p.dtype for p in params):
            queues = [[p for p in params if p.dtype == dtype and self.owner.get(p, 0) == r] for r in range(self.size)]
            while any(queues):
                batch = []
                for queue in queues:
                    count, used = 0, 0
                    while count < len(queue) and (not count or used + queue[count].nbytes <= ROUND_BYTES):
                        used += queue[count].nbytes
                        count += 1
                    batch.append(queue[:count])
                    del queue[:count]
                yield batch


def _newest(*names: str):
    """The collective under the first name that this torch has: 2.13 renamed some."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def _length(params: list[Tensor]) -> int:
    return sum(p.numel() for p in params)


def _width(batch: list[list[Tensor]]) -> int:
    return max(map(_length, batch))


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflat(flat: Tensor, params: list[Tensor]) -> dict[Tensor, Tensor]:
    """The beginning of `flat` as tensors of the parameters' shapes."""
    slots = flat[: _length(params)].split([p.numel() for p in params])
    return {p: slot.view(p.shape) for p, slot in zip(params, slots, strict=True)}

"""Where a step runs: device, process group, gradient synchronisation, clipping, autocast.

One process is the data-parallel path with world 1: the same calls, no collectives. Under `torchrun` each rank takes its
share of the global batch, DDP averages gradients, and the loop scales losses by world / global count: the result is the
sum over the global batch divided by its count, whatever the number of ranks.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonlm.errors import UserError
from muonlm.optim.tensors import is_sharded, local

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets; keys are parts of torch.cuda.get_device_name().
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


@dataclass(frozen=True)
class Dist:
    rank: int
    world: int
    device: torch.device
    grouped: bool = False  # whether there is a process group, so that collectives are called

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all ranks; the tensor itself without a process group."""
        if self.grouped:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def broadcast(self, value):
        """Rank 0's value (anything picklable; it comes from our own processes, not from a file)."""
        box = [value]
        if self.grouped:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.grouped:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        if not self.grouped:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def unwrap(self, net: nn.Module) -> nn.Module:
        """The inverse of `wrap`."""
        return net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net

    def sync(self, net: nn.Module, last: bool):
        """Context of one micro-batch's backward: gradients cross the wire with the last one only."""
        several = isinstance(net, nn.parallel.DistributedDataParallel)
        return net.no_sync() if several and not last else contextlib.nullcontext()


@contextlib.contextmanager
def start(device: str = "auto"):
    """Yield this process's `Dist`; joins the process group that torchrun announces, and leaves it at the end."""
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    place = pick_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        cuda = place.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)  # or barriers warn
    try:
        yield Dist(rank, world, place, grouped=world > 1)
    finally:
        if world > 1:
            dist.destroy_process_group()


def repeat(model: nn.Module) -> None:
    """Attention of `model` shall give the same gradients each time, to the bit."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no such form
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # which finds bugs and takes time
    for module in model.modules():
        if hasattr(module, "repeatable"):
            setattr(module, "repeatable", True)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"train.device = {name!r}, but torch {torch.__version__} sees no CUDA device; use --train.device cpu"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.device = 'mps', but this machine has no Metal device; use --train.device cpu")
    return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)


def autocast(device: torch.device, dtype: str):
    """bf16 autocast over fp32 masters, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def has_bf16() -> bool:
    """Whether the GPU multiplies bf16 itself; older ones emulate it, slower than fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(step, device: torch.device) -> tuple[str, str]:
    """(dtype, reason). GPU: bfloat16 where supported. CPU: time `step()`, forward and backward of the model, both ways.

    bf16 must win by 10 %: below that the noise of a shared machine decides, and fp32 is the more exact.
    """
    if device.type == "cuda":
        return ("bfloat16", "GPU supports it") if has_bf16() else ("float32", "GPU lacks bf16")
    if device.type != "cpu":
        return "float32", f"no probe for {device.type}"
    times = {"float32": [], "bfloat16": []}
    for repeat in range(4):
        for dtype, seconds in times.items():
            begin = time.perf_counter()
            with autocast(device, dtype):
                loss = step()
            loss.backward()
            if repeat:  # the first call of each warms up
                seconds.append(time.perf_counter() - begin)
    fp32, bf16 = (1e3 * statistics.median(times[dtype]) for dtype in times)
    return (
        "bfloat16" if bf16 < 0.9 * fp32 else "float32",
        f"probe: fp32 {fp32:.0f} ms, bf16 {bf16:.0f} ms forward+backward",
    )


def clip(parameters: list[nn.Parameter], mode: str, limit: float, unclipped: frozenset[Tensor] = frozenset()) -> Tensor:
    """Apply the clip mode to the gradients in place; return their global norm before it.

    unclipped   what mode "clip" leaves as it is. The norm is that of all `parameters`, each counted once
    Called after synchronisation, so every rank sees the same norm, never a local one; of DTensors that of the whole.
    """
    parameters = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    norms = _whole_norms(parameters, list(torch._foreach_norm(grads)))
    total = torch.linalg.vector_norm(torch.stack(norms))
    if unclipped and mode == "clip":
        grads, norms = (
            [x for p, x in zip(parameters, values, strict=True) if p not in unclipped] for values in (grads, norms)
        )
    if grads and mode == "normalize_per_param":
        torch._foreach_div_(grads, [norm.clamp(min=torch.finfo(norm.dtype).tiny) for norm in norms])
    elif grads and mode == "clip":
        torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))
    return total


def _whole_norms(parameters: Sequence[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """Norms of whole gradients from those of this rank's shards: one all-reduce for all tensors sharded alike."""
    alike: dict[tuple, list[int]] = {}
    for i, p in enumerate(parameters):
        if is_sharded(p):  # a DTensor
            alike.setdefault((getattr(p, "device_mesh"), getattr(p, "placements")), []).append(i)
    for (mesh, placements), places in alike.items():
        squares = torch.stack([norms[i] for i in places]).square()
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=mesh.get_group(dim))
        for i, norm in zip(places, squares.sqrt(), strict=True):
            norms[i] = norm
    return norms


def peak_memory_gib(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)

"""GPT-2 from transformers, trained by Muon in plain PyTorch: on one process, under DDP, or under FSDP2.

    python examples/train_gpt2.py
    torchrun --nproc_per_node 2 examples/train_gpt2.py
    torchrun --nproc_per_node 2 examples/train_gpt2.py --fsdp

A tiny model of random weights on fixed synthetic tokens, on the CPU. All three print the same losses, up to rounding:
each rank takes its share of the same batch.   pip install "muonlm[hf]"
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from muonlm.optim import Muon, route

STEPS, ROWS, LENGTH = 20, 8, 32
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")

torch.manual_seed(0)
config = GPT2Config(
    n_layer=2,
    n_embd=64,
    n_head=2,
    vocab_size=256,
    n_positions=LENGTH,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
model = GPT2LMHeadModel(config)
steps = torch.arange(LENGTH) * torch.randint(1, 5, (STEPS, ROWS, 1))
tokens = (torch.randint(256, (STEPS, ROWS, 1)) + steps) % 256  # arithmetic sequences

# --- training: all that a model of your own needs -------------------------------------------------------------------
if "--fsdp" in sys.argv:
    mesh = init_device_mesh("cpu", (world,))
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=mesh)
net = DistributedDataParallel(model) if world > 1 and "--fsdp" not in sys.argv else model
groups = route(model).groups(lr=0.02, adamw_lr=3e-3, wd=0.01)
optimizer = Muon(groups, cautious=True, ns_dtype="float32", process_group="world" if net is not model else None)

for step in range(STEPS):
    batch = tokens[step].chunk(world)[rank]
    loss = net(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    # ----------------------------------------------------------------------------------------------------------------
    mean = loss.detach() / world
    if world > 1:
        dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step + 1} loss {mean:.6f}", flush=True)

if world > 1:
    del net, optimizer  # their threads first: DDP's must not outlive the process group
    dist.barrier()
    dist.destroy_process_group()

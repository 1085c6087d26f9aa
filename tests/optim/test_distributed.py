"""Distributed Muon on real gloo processes: 2 and 3 ranks against one process on the joint batch.

Starting processes is the slow part, so this file is also their script: `python test_distributed.py RANK WORLD FOLDER`
runs all functions named check_* in order, and each is a test of its own here, per number of ranks. Every rank computes
the one-process reference itself. A rank that fails stops; the others then run into the timeout and say so.
"""

import copy
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import muonlm.optim.muon.probe as probe
from muonlm.errors import UserError
from muonlm.optim import Muon, build_watch, load_named_state, named_state
from muonlm.optim.muon.distributed import cost, keep_tags, share_out
from muonlm.optim.tensors import local
from muonlm.training import parallel

STEPS = 20
EXACT = {"ns_dtype": "float32", "ns_method": "direct"}
TOLERANCE = 1e-5  # relative, after 20 steps: sums over ranks and batches are in another order; measured: below 2e-6
MIXED = [(24, 24), (48, 24), (8, 40), (24, 24), (1, 9), (3, 8, 12), (6, 4, 3, 3)]


# --- what the ranks train ---------------------------------------------------------------------------------------------


def matrices(shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [(f"w{i}", nn.Parameter((0.1 * torch.randn(s, generator=g)).to(dtype))) for i, s in enumerate(shapes)]


def one_group(named):
    return [{"params": named, "use_muon": True}]


class Holder(nn.Module):
    """A model for `named_state`."""

    def __init__(self, named):
        super().__init__()
        for name, p in named:
            self.register_parameter(name, p)


def gradients(named, step, rank):
    g = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(p.shape, generator=g) for _, p in named]


def mean_gradients(named, step, world):
    return [sum(parts) / world for parts in zip(*(gradients(named, step, r) for r in range(world)), strict=True)]


def feed(named, grads):
    for (_, p), g in zip(named, grads, strict=True):
        p.grad = g.to(p.dtype)


def error(named, reference) -> float:
    """Largest relative distance of a matrix, joined if it is sharded, from the reference."""
    with torch.no_grad():
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for _, p in named]
        return max(float((p - q).norm() / q.norm()) for p, (_, q) in zip(whole, reference, strict=True))


class Net(nn.Module):
    """Tied embedding and head, a fused matrix, a vector, and experts each row of the batch chooses one of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.qkv = nn.Linear(12, 36)
        self.qkv.weight.muonlm = {"split": (0, [12, 12, 12])}
        self.experts = nn.ParameterList([nn.Parameter(0.3 * torch.randn(12, 12)) for _ in range(3)])
        self.out = nn.Linear(36, 12, bias=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x, expert):
        h = self.embed(x)
        h = h + self.out(torch.tanh(self.qkv(h)))
        for i, weight in enumerate(self.experts):
            if (expert == i).any():
                h = h + torch.where(expert[:, None, None] == i, h @ weight, 0.0)
        return self.head(h)


def groups(net):
    named = [(n, p) for n, p in net.named_parameters()]
    muon = [(n, p) for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [(n, p) for n, p in named if p.ndim != 2 or "embed" in n]
    return [
        {"params": muon, "name": "muon", "use_muon": True, "lr": 0.02, "weight_decay": 0.1},
        {"params": others, "name": "rest", "use_muon": False, "lr": 0.01, "eps": 1e-6},
    ]


def batch(step, world):
    """12 rows (6 ranks at most), and the expert of each: every other step rank 0 lacks expert 2, and all lack 1."""
    g = torch.Generator().manual_seed(step)
    x = torch.randint(11, (12, 6), generator=g)
    share = 12 // world
    expert = torch.tensor([0 if i < share or step % 2 else 2 for i in range(12)])
    return x, (torch.arange(12) % 3 if step % 3 == 0 else expert)


def loss_of(net, x, expert):
    logits = net(x[:, :-1], expert)
    return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())


def train_net(world, rank, wrap, accumulate=1, **muon):
    """Losses do not matter here: the weights after 20 steps, of this rank's share and of one process on all."""
    net, reference = Net(), Net()
    wrapped = wrap(net)
    ours, alone = Muon(groups(net), **EXACT, **muon), Muon(groups(reference), **EXACT)
    for step in range(STEPS):
        x, expert = batch(step, world)
        loss_of(reference, x, expert).backward()
        parts = list(
            zip(x.chunk(world)[rank].chunk(accumulate), expert.chunk(world)[rank].chunk(accumulate), strict=True)
        )
        for i, part in enumerate(parts):
            if isinstance(wrapped, DistributedDataParallel) and i + 1 < len(parts):
                with wrapped.no_sync():
                    (loss_of(wrapped, *part) / accumulate).backward()
            else:
                (loss_of(wrapped, *part) / accumulate).backward()
        for optimizer in (ours, alone):
            optimizer.step()
            optimizer.zero_grad()
    assert error(list(net.named_parameters()), list(reference.named_parameters())) < TOLERANCE
    return net, ours


# --- checks: replicas -------------------------------------------------------------------------------------------------


def check_any_number_of_matrices_moves_as_in_one_process(rank, world, folder):
    settings = {"weight_decay": 0.1, "cautious": True, "momentum_schedule": [(0, 0.85), (10, 0.95)]}
    for shapes in ([(12, 8)], [(12, 8)] * 2, [(12, 8)] * 5, MIXED):
        for grads in ("averaged", "local"):
            ours, alone = matrices(shapes), matrices(shapes)
            muon = Muon(one_group(ours), process_group="world", grads=grads, **EXACT, **settings)
            plain = Muon(one_group(alone), **EXACT, **settings)
            for step in range(STEPS):
                mean = mean_gradients(ours, step, world)
                feed(alone, mean)
                feed(ours, mean if grads == "averaged" else gradients(ours, step, rank))
                muon.step(), plain.step()
            assert error(ours, alone) < TOLERANCE, (shapes, grads, error(ours, alone))
            calls = torch.tensor(muon.ns_calls)
            dist.all_reduce(calls)
            assert calls == plain.ns_calls  # nothing is done twice
            held = torch.tensor([float("momentum_buffer" in muon.state.get(p, ())) for _, p in ours])
            assert held.bool().tolist() == [muon.replicas.owns(p) for _, p in ours]
            dist.all_reduce(held)
            assert (held == 1).all()  # one owner each


def check_variants_and_bf16_weights_move_as_in_one_process(rank, world, folder):
    """Bit for bit: the owner does what one process does, and bf16 weights travel as they are."""
    for variant, dtype in (("normuon", torch.float32), ("adamuon", torch.bfloat16), ("hyperball", torch.float32)):
        ours, alone = matrices(MIXED, dtype), matrices(MIXED, dtype)
        options = {"variant": variant, "batch_by_shape": False, **EXACT}
        muon, plain = Muon(one_group(ours), process_group="world", **options), Muon(one_group(alone), **options)
        for step in range(5):
            for named in (ours, alone):
                feed(named, mean_gradients(named, step, world))
            muon.step(), plain.step()
        assert all(torch.equal(p, q) for (_, p), (_, q) in zip(ours, alone, strict=True)), variant


def check_ddp_with_accumulation_a_tied_head_and_idle_experts_equals_the_joint_batch(rank, world, folder):
    def wrap(net):
        return DistributedDataParallel(net, find_unused_parameters=True)

    for accumulate in (1, 2):
        train_net(world, rank, wrap, accumulate, process_group="world")


def check_local_gradients_without_ddp_are_averaged_even_where_a_rank_has_none(rank, world, folder):
    _, muon = train_net(world, rank, lambda net: net, process_group="world", grads="local")
    assert not muon.replicas.averaged


def check_ddp_that_ignores_the_matrices_leaves_only_them_to_muon(rank, world, folder):
    def wrap(net):
        names = [name for name, _ in groups(net)[0]["params"]]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)
        return DistributedDataParallel(net)

    net, muon = train_net(world, rank, wrap, process_group="world", grads="local")
    assert muon.replicas.averaged == {net.embed.weight, net.qkv.bias}


def check_a_missing_gradient_is_zero_where_another_rank_has_one_and_skipped_where_none_has(rank, world, folder):
    named, alone = matrices([(12, 8)] * 3), matrices([(12, 8)] * 3)
    vector, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

    def both(named, vector):
        return [{"params": named, "name": "m"}, {"params": [("v", vector)], "name": "v", "use_muon": False, "lr": 0.1}]

    ours = Muon(both(named, vector), process_group="world", grads="local", **EXACT)
    plain = Muon(both(alone, other), **EXACT)
    for step in range(3):
        g = gradients(named, step, 0)
        named[0][1].grad = g[0] if rank == 0 else None  # on rank 0 only
        named[1][1].grad = gradients(named, step, rank)[1]
        vector.grad = torch.ones(5) if rank == 1 else None
        alone[0][1].grad, alone[1][1].grad = g[0] / world, mean_gradients(named, step, world)[1]
        other.grad = torch.ones(5) / world
        ours.step(), plain.step()
    assert error([*named, ("v", vector)], [*alone, ("v", other)]) < TOLERANCE
    torch.testing.assert_close(ours.state[vector]["exp_avg"], plain.state[other]["exp_avg"])
    for (_, p), (_, q) in zip(named[:2], alone[:2], strict=True):
        if ours.replicas.owns(p):
            torch.testing.assert_close(ours.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
    assert torch.equal(named[2][1], matrices([(12, 8)] * 3)[2][1]) and not ours.state.get(named[2][1])


class Counted:
    """Counts the bytes that a rank sends in the large collectives, as their ring forms do, and the calls by name."""

    NAMES = {
        "all_gather_single": "all_gather",
        "all_gather_into_tensor": "all_gather",
        "all_reduce": "all_reduce",
        "reduce_scatter_single": "reduce_scatter",
        "reduce_scatter_tensor": "reduce_scatter",
        "all_to_all_single": "all_to_all",
    }

    def __enter__(self):
        self.sent, self.calls = 0, []
        self.real = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name in self.real:
            setattr(dist, name, self.wrap(name))
        return self

    def wrap(self, name):
        def call(first, *args, **kwargs):
            kind, world, rank = self.NAMES[name], dist.get_world_size(), dist.get_rank()
            self.calls.append(kind)
            if kind == "all_gather":
                self.sent += (world - 1) * args[0].nbytes
            elif kind == "reduce_scatter":
                self.sent += (world - 1) * args[0].nbytes // world
            elif kind == "all_to_all":
                splits = args[2]
                self.sent += (sum(splits) - splits[rank]) * args[0].element_size()
            return self.real[name](first, *args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, real in self.real.items():
            setattr(dist, name, real)


def check_bytes_sent_are_those_of_the_table(rank, world, folder):
    for dtype in (torch.float32, torch.bfloat16):
        named = matrices([(12, 8)] * (2 * world), dtype)  # all ranks own alike: nothing is padded
        total = sum(p.nbytes for _, p in named)
        share = total * (world - 1) // world
        for grads, expected, calls in (
            ("averaged", share, ["all_gather"]),
            ("local", 2 * share, ["all_reduce", "reduce_scatter", "all_gather"]),
        ):
            muon = Muon(named, process_group="world", grads=grads, **EXACT)
            for step in range(2):
                feed(named, gradients(named, step, rank if grads == "local" else 0))
                with Counted() as counted:
                    muon.step()
            assert counted.sent == expected and counted.calls == calls, (grads, counted.sent, expected, counted.calls)


def check_double_and_missing_averaging_and_unequal_weights_are_refused_on_every_rank(rank, world, folder):
    def attempt(grads, rank_of_gradient, message, spoil=False):
        named = matrices([(12, 8)] * 2)
        if spoil and rank == 1:
            named[1][1].data[0, 0] += 1.0
        muon = Muon(named, process_group="world", grads=grads, **EXACT)
        feed(named, [torch.zeros(12, 8)] * 2)
        if not spoil:
            muon.step()  # zero gradients prove nothing
        feed(named, gradients(named, 0, rank_of_gradient))
        with pytest.raises(ValueError, match=message):
            muon.step()

    attempt("local", 0, 'already equal on all ranks.*Use grads="averaged"')
    attempt("averaged", rank, 'gradients of w. differ between ranks.*grads="local"')
    attempt("averaged", 0, "different weights, first w1", spoil=True)
    named = matrices([(12, 8)])
    with pytest.raises(ValueError, match="named_state"):
        copy.deepcopy(Muon(named, process_group="world"))


def check_all_ranks_follow_the_method_that_rank_0_measured(rank, world, folder):
    real = probe.fastest
    probe.fastest = lambda *args: ("direct", torch.bfloat16 if rank == 0 else torch.float32)
    try:
        named = matrices([(12, 8), (8, 16)])
        muon = Muon(named, process_group="world")
        feed(named, gradients(named, 0, 0))
        muon.step()
        late = [("late", nn.Parameter(torch.ones(4, 5)))]
        muon.add_param_group({"params": late, "name": "late"})
        feed([*named, *late], gradients([*named, *late], 1, 0))
        muon.step()
    finally:
        probe.fastest = real
    assert [g["ns_chosen"] for g in muon.param_groups] == [
        {"8x12": "direct bfloat16", "8x16": "direct bfloat16"},
        {"4x5": "direct bfloat16"},
    ]


# --- checks: state ----------------------------------------------------------------------------------------------------


def shared_groups(named):
    return [
        {"params": named[:3], "name": "a", "use_muon": True, "momentum_schedule": [(0, 0.8), (9, 0.95)]},
        {
            "params": named[3:6],
            "name": "b",
            "use_muon": True,
            "splits": [{"heads": (1, 4)}, None, {"split": (0, [8, 3]), "adamw": [1]}],
            "variant": "normuon",
            "slices": {"lr_ratio": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
        },
        {"params": named[6:], "name": "c", "use_muon": False, "lr": 1e-3},
    ]


SHARED = [(12, 8), (8, 20), (12, 8), (6, 12), (3, 5, 7), (11, 6), (4,)]


def check_a_run_moves_from_1_to_3_to_2_to_1_ranks_bit_for_bit(rank, world, folder):
    phases = [n for n in (1, 3, 2, 1) if n <= world]
    teams = {n: list(range(n)) for n in (1, 2, 3) if n <= world}
    process_groups = {n: dist.new_group(ranks) for n, ranks in teams.items()}
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"batch_by_shape": True, "state_dtype": "bfloat16"}),
    ):
        options = {"batch_by_shape": False, **EXACT, **options}
        unbroken = matrices(SHARED, dtype)
        plain = Muon(shared_groups(unbroken), **options)
        for step in range(3 * len(phases)):
            feed(unbroken, gradients(unbroken, step, 0))
            plain.step()
        step, saved = 0, None
        for n in phases:
            if rank in teams[n]:
                named = matrices(SHARED, dtype)
                model = Holder(named)
                muon = Muon(shared_groups(named), process_group=process_groups[n], **options)
                if saved:
                    weights, tensors, meta = torch.load(saved)
                    model.load_state_dict(weights)
                    load_named_state(muon, model, tensors, json.loads(meta))
                for later in range(step, step + 3):
                    feed(named, gradients(named, later, 0))
                    muon.step()
                tensors, meta = named_state(muon, model)
                assert bool(tensors) == (rank == 0)
                if rank == 0:
                    torch.save((model.state_dict(), tensors, json.dumps(meta)), f"{folder}/state-{n}-{step}.pt")
            saved = f"{folder}/state-{n}-{step}.pt"
            step += 3
            dist.barrier()
        weights, tensors, meta = torch.load(saved)
        expected, expected_meta = named_state(plain, Holder(unbroken))
        assert json.loads(meta) == json.loads(json.dumps(expected_meta))
        # products of batches may add in another order than those of single matrices
        close = dict(rtol=1e-5, atol=1e-6) if options["batch_by_shape"] else dict(rtol=0, atol=0)
        for name, p in unbroken:
            torch.testing.assert_close(weights[name], p.detach(), **close)
        assert tensors.keys() == expected.keys() and len(tensors) > 2 * len(SHARED) - 2
        for name, value in expected.items():
            loose = dict(rtol=1e-2, atol=1e-4) if value.dtype == torch.bfloat16 else close
            torch.testing.assert_close(tensors[name], value, **loose)


def check_state_that_does_not_fit_is_refused_and_changes_nothing(rank, world, folder):
    named = matrices([(12, 8), (8, 20)])
    muon, model = Muon([{"params": named, "name": "a"}], process_group="world", **EXACT), Holder(named)
    feed(named, gradients(named, 0, 0))
    muon.step()
    tensors, meta = named_state(muon, model)
    box = [tensors]
    dist.broadcast_object_list(box, 0)
    tensors = box[0]
    before = {key: value.clone() for p in muon.state for key, value in muon.state[p].items()}
    for bad, message in (
        ({k: v for k, v in tensors.items() if k != "w0/momentum_buffer"}, "w0/momentum_buffer' is missing"),
        (tensors | {"w0/momentum_buffer": torch.zeros(8, 12)}, r"has shape \(8, 12\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_named_state(muon, model, bad, meta)
    variant = Muon([{"params": named, "name": "a", "variant": "muon"}], process_group="world", **EXACT)
    with pytest.raises(UserError, match="the same variant"):
        load_named_state(
            variant,
            model,
            tensors | {"w0/second_momentum": torch.zeros(12)},
            meta | {"tensors": [*meta["tensors"], "w0/second_momentum"]},
        )
    assert all(torch.equal(before[key], value) for p in muon.state for key, value in muon.state[p].items())


# --- checks: FSDP2 ----------------------------------------------------------------------------------------------------


def sharded(named, world, placements=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    return [(n, nn.Parameter(distribute_tensor(p.detach(), mesh, placements or [Shard(0)]))) for n, p in named]


def feed_sharded(shards, named, grads):
    from torch.distributed.tensor import distribute_tensor

    for (_, s), (_, p), g in zip(shards, named, grads, strict=True):
        s.grad = distribute_tensor(g.to(p.dtype), s.device_mesh, s.placements)


UNEVEN = [
    (7, 12),
    (12, 8),
    (2, 9),
    (1, 6),
    (5, 8, 12),
    (11, 4, 3, 3),
    (10,),
]  # no multiples of 2 or 3 ranks; empty shards


def uneven_groups(named, **options):
    splits = [None, {"heads": (0, 3)}, None, None, {"split": (1, [4, 4])}, None]
    return [
        {"params": named[:6], "name": "m", "use_muon": True, "splits": splits, **options},
        {"params": named[6:], "name": "v", "use_muon": False, "lr": 0.01},
    ]


def check_shards_move_as_whole_matrices_do(rank, world, folder):
    for dtype, options in (
        (torch.float32, {"weight_decay": 0.2, "cautious": True, "momentum_form": "classical"}),
        (torch.float32, {"weight_decay": 0.2, "variant": "normuon", "nesterov": False}),
        (torch.float32, {"weight_decay": 0.2, "variant": "adamuon", "decoupled_wd": False}),
        (torch.bfloat16, {"weight_decay": 0.2}),
    ):
        alone = matrices(UNEVEN, dtype)
        ours = sharded(alone, world)
        muon, plain = Muon(uneven_groups(ours, **options), **EXACT), Muon(uneven_groups(alone, **options), **EXACT)
        for step in range(STEPS):
            grads = gradients(alone, step, 0)
            feed(alone, grads)
            feed_sharded(ours, alone, grads)
            if step == 3:  # a matrix that one rank, or nobody, has a gradient for
                ours[1][1].grad = alone[1][1].grad = None
                alone[0][1].grad = torch.zeros_like(alone[0][1])
                ours[0][1].grad = torch.zeros_like(ours[0][1]) if rank == 0 else None
            muon.step(), plain.step()
        # bf16: twins agree to fp32 rounding, so a weight may round the other way once in a while, by 2^-8
        assert error(ours, alone) < (TOLERANCE if dtype == torch.float32 else 1e-3), (options, error(ours, alone))
        calls = torch.tensor(muon.ns_calls)
        dist.all_reduce(calls)
        assert calls == plain.ns_calls
        assert all(local(muon.state[p]["momentum_buffer"]).shape == local(p).shape for _, p in ours[:6])

        tensors, meta = named_state(muon, Holder(ours))  # and the state is that of one process, bar rounding
        expected, expected_meta = named_state(plain, Holder(alone))
        assert meta["tensors"] == expected_meta["tensors"] and (rank or tensors.keys() == expected.keys())
        if rank == 0 and dtype == torch.float32:
            for name, value in expected.items():
                assert float((tensors[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def check_a_sharded_run_goes_on_as_one_process_and_the_other_way_round(rank, world, folder):
    for variant in ("muon", "normuon"):
        alone = matrices(UNEVEN)
        ours = sharded(alone, world)
        muon, plain = (
            Muon(uneven_groups(ours, variant=variant), **EXACT),
            Muon(uneven_groups(alone, variant=variant), **EXACT),
        )
        for step in range(3):
            feed_sharded(ours, alone, gradients(alone, step, 0))
            muon.step()
        tensors, meta = named_state(muon, Holder(ours))
        box = [tensors]
        dist.broadcast_object_list(box, 0)
        with torch.no_grad():
            for (_, p), (_, q) in zip(alone, ours, strict=True):
                p.copy_(q.full_tensor())
        load_named_state(plain, Holder(alone), box[0], meta)
        again = sharded(alone, world)
        back = Muon(uneven_groups(again, variant=variant), **EXACT)
        load_named_state(back, Holder(again), box[0], meta)
        for step in range(3, 6):
            grads = gradients(alone, step, 0)
            feed(alone, grads)
            for named, optimizer in ((ours, muon), (again, back)):
                feed_sharded(named, alone, grads)
                optimizer.step()
            plain.step()
        assert all(torch.equal(local(p), local(q)) for (_, p), (_, q) in zip(ours, again, strict=True))
        assert error(ours, alone) < TOLERANCE


def check_fully_shard_trains_as_one_process_and_its_state_survives_dcp(rank, world, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    net, reference = Net(), Net()
    with keep_tags(net):
        fully_shard(net, mesh=mesh)
    assert net.qkv.weight.muonlm == reference.qkv.weight.muonlm
    ours, alone = Muon(groups(net), **EXACT), Muon(groups(reference), **EXACT)
    everyone = torch.arange(12) % 3  # every rank uses every expert: FSDP2 itself needs that
    for step in range(STEPS):
        x, _ = batch(step, world)
        loss_of(reference, x, everyone).backward()
        loss_of(net, x.chunk(world)[rank], everyone.chunk(world)[rank]).backward()
        norms = [parallel.clip([*m.parameters(), m.head.weight], "clip", 0.5) for m in (net, reference)]
        assert abs(norms[0] - norms[1]) < 1e-5 * norms[1]  # of the whole, the tied tensor counted once
        ours.step(), alone.step()
        ours.zero_grad(), alone.zero_grad()
    assert error(list(net.named_parameters()), list(reference.named_parameters())) < TOLERANCE

    state = get_optimizer_state_dict(net, ours)
    dcp.save({"optimizer": state}, checkpoint_id=f"{folder}/dcp-{world}")
    other = Net()
    with keep_tags(other):
        fully_shard(other, mesh=mesh)
    fresh = Muon(groups(other), **EXACT)
    empty = get_optimizer_state_dict(other, fresh)
    dcp.load({"optimizer": empty}, checkpoint_id=f"{folder}/dcp-{world}")
    set_optimizer_state_dict(other, fresh, empty)
    pairs = list(zip(net.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(local(v), local(fresh.state[q][k])) for p, q in pairs for k, v in ours.state[p].items())
    assert fresh.param_groups[0]["step"] == STEPS


def check_shards_send_the_bytes_of_the_table(rank, world, folder):
    alone = matrices([(12, 8)] * (2 * world))
    ours = sharded(alone, world)
    muon = Muon(ours, **EXACT)
    for step in range(2):
        feed_sharded(ours, alone, gradients(alone, step, 0))
        with Counted() as counted:
            muon.step()
    total = sum(p.nbytes for _, p in alone)
    assert counted.calls == ["all_reduce", "all_to_all", "all_to_all"]
    assert counted.sent == 2 * (world - 1) * total // world // world


def check_other_shardings_are_refused_by_name(rank, world, folder):
    from torch.distributed.tensor import Replicate, Shard

    for placements in ([Shard(1)], [Replicate()]):
        with pytest.raises(ValueError, match=r"w0 is a DTensor.*Shard\(0\) on one dimension.*fully_shard"):
            Muon(sharded(matrices([(12, 8)]), world, placements))
    named = sharded(matrices([(12, 8)]), world)
    with pytest.raises(ValueError, match="hyperball.*w0 is sharded"):
        Muon(named, variant="hyperball")
    with pytest.raises(ValueError, match="w0 is sharded and leaves slices"):
        slices = {"lr_ratio": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
        Muon([{"params": named, "splits": [{"split": (0, [10, 2]), "adamw": [1]}], "slices": slices}])


CHECKS = [name for name in globals() if name.startswith("check_")]


# --- the processes ----------------------------------------------------------------------------------------------------


def run_checks(rank, world, folder):
    results = dict.fromkeys(CHECKS, "not run: an earlier check failed")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=30))
    only = os.environ.get("ONLY", "")
    for name in CHECKS:
        if only and only not in name:
            continue
        try:
            globals()[name](rank, world, folder)
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break
        finally:
            Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))
    else:
        dist.barrier()
        dist.destroy_process_group()


_outcomes: dict[int, list[dict[str, str]]] = {}


def outcomes(world, tmp_path_factory):
    if world not in _outcomes:
        folder = tmp_path_factory.mktemp(f"world-{world}")
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen([sys.executable, __file__, str(r), str(world), str(folder)], env=env) for r in range(world)
        ]
        try:
            for process in ranks:
                process.wait(timeout=150)
        finally:
            for process in ranks:
                process.kill()
        _outcomes[world] = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(world)]
    return _outcomes[world]


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world, name, tmp_path_factory):
    for rank, results in enumerate(outcomes(world, tmp_path_factory)):
        assert results[name] == "passed", f"rank {rank}: {results[name]}"


# --- without processes ------------------------------------------------------------------------------------------------


def test_owners_are_balanced_and_a_function_of_names_shapes_and_ranks_alone():
    shapes = {
        f"blocks.{i}.{n}": s
        for i in range(4)
        for n, s in {"qkv": [(64, 64)] * 3, "up": [(256, 64)], "down": [(64, 256)]}.items()
    }
    items = [(cost(s), name) for name, s in shapes.items()]
    for world in (1, 2, 3, 5, 8):
        load = [0.0] * world
        owner = {items[i][1]: rank for i, rank in share_out(items, load)}
        assert owner == {items[::-1][i][1]: rank for i, rank in share_out(items[::-1], [0.0] * world)}
        assert sum(load) == sum(price for price, _ in items)
        # Graham's bound for longest first: 4/3 - 1/(3N) of the optimum, itself at least the mean and the longest
        assert max(load) <= (4 / 3 - 1 / (3 * world)) * max(
            sum(load) / world, max(price for price, _ in items), 2 * sorted(load)[0]
        )
    for count, world in ((12, 8), (5, 3), (2, 3)):  # K equal matrices: the busiest rank has ceil(K / N)
        load = [0.0] * world
        share_out([(1.0, f"w{i}") for i in range(count)], load)
        assert max(load) == -(-count // world) and min(load) == count // world


def test_a_group_that_is_missing_or_unknown_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="init_process_group"):
        Muon(matrices([(4, 4)]), process_group="world")
    with pytest.raises(ValueError, match='process_group="world"'):
        Muon(matrices([(4, 4)]), grads="local")
    with pytest.raises(ValueError, match="grads='global' is unknown"):
        Muon(matrices([(4, 4)]), grads="global")


def test_clipping_leaves_what_is_exempt_and_scales_the_rest_by_the_norm_of_all():
    named = matrices([(3, 4), (5,)])
    everything = [p for _, p in named] + [named[0][1]]  # tied: given twice, counted once
    norm = float(torch.cat([g.flatten() for g in gradients(named, 0, 0)]).norm())
    for unclipped, scaled in ((frozenset(), (True, True)), (frozenset([named[0][1]]), (False, True))):
        feed(named, gradients(named, 0, 0))
        assert float(parallel.clip(everything, "clip", 0.5, unclipped)) == pytest.approx(norm, rel=1e-6)
        for (_, p), g, small in zip(named, gradients(named, 0, 0), scaled, strict=True):
            expected = g * 0.5 / norm if small else g
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=0)  # the 1e-6 beside the norm


def test_the_scope_of_clipping_exempts_the_matrices_of_muon():
    named = matrices([(3, 4), (5,)])
    groups = [{"params": named[:1], "use_muon": True}, {"params": named[1:], "use_muon": False, "lr": 0.1}]
    model = torch.nn.Module()
    scopes = [build_watch("muon", Muon(groups), model, clip_scope=scope).unclipped for scope in ("aux", "all")]
    assert scopes == [{named[0][1]}, frozenset()]
    with pytest.raises(UserError, match="`clip_scope` = 'some'"):
        build_watch("muon", Muon(groups), model, clip_scope="some")


def test_a_run_of_two_ranks_is_resumed_by_one_and_ends_like_a_run_of_one(smoke, tmp_path):
    """1e-4: sums over ranks are in another order, and AdamW divides the smallest gradients by their size."""
    from muonlm.cli.main import main

    def launch(*argv):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
            "-m",
            "muonlm",
        ]
        run = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr

    said = launch(*smoke(tmp_path / "moved"))
    assert "matrices on 2 ranks, predicted load max/mean" in said
    assert main(smoke(tmp_path / "alone")) == 0
    for name in ("moved", "alone"):
        assert main(["train", "--resume", str(tmp_path / name), "--train.steps", "9"]) == 0
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step-00000009" / "model.safetensors")
        for name in ("moved", "alone")
    ]
    states = [
        load_file(tmp_path / name / "checkpoints" / "step-00000009" / "state.safetensors")
        for name in ("moved", "alone")
    ]
    assert weights[0].keys() == weights[1].keys() and states[0].keys() == states[1].keys()
    for name, value in weights[1].items():
        assert float((weights[0][name] - value).norm()) <= 1e-4 * float(value.norm()), name


if __name__ == "__main__":
    run_checks(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""Muon on a GPU: the same steps as in fp64 on a CPU, no wait for the device, whole steps in CUDA graphs.

The tests marked `cuda` run at toy size on a CPU in a rehearsal. There a dispatch mode finds what would wait for a
device, and a step that cannot be captured is called again instead.
"""

import contextlib
import gc
import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from muonlm.config.schema import ModelConfig
from muonlm.model import build_model
from muonlm.optim import Muon, build_optimizer, build_watch, named_state, route
from muonlm.optim.muon import fused, symmetric, update
from muonlm.optim.muon.choices import COEFFICIENTS
from muonlm.optim.muon.distributed import Owners
from muonlm.optim.muon.newton_schulz import check_method, newton_schulz, orthogonalise
from muonlm.optim.tensors import local
from muonlm.training import parallel

EXACT = {"ns_method": "direct", "ns_dtype": "float32"}
BF16 = {"ns_dtype": "bfloat16"}
LR = 0.02
WORKS = fused.works  # a rehearsal replaces it

# ------------------------------------------------------------------------------------------------ what is stepped

KINDS = {  # settings of Muon that take different ways through a step
    "default": {},
    "decay": {"weight_decay": 0.1},
    "cautious": {"weight_decay": 0.1, "cautious": True, "wd_follows_lr": True},
    "follows": {"weight_decay": 0.1, "wd_follows_lr": True},
    "plain momentum": {"nesterov": False, "lr_mode": "match_rms_adamw"},
    "classical": {"momentum_form": "classical", "state_dtype": "bfloat16"},
    "normuon": {"variant": "normuon", "weight_decay": 0.1},
    "adamuon": {"variant": "adamuon"},
    "hyperball": {"variant": "hyperball"},
    "polar_express4": {"coefficients": "polar_express4"},
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(request, device, monkeypatch):
    """A rehearsal takes the GPU's way through the code, too; the kernels, slowly interpreted, where that says most."""
    monkeypatch.setattr(update, "NARROW_ON", (device.type,))
    if device.type == "cpu" and not request.node.name.startswith(("test_steps_agree", "test_the_kernels")):
        monkeypatch.setattr(fused, "works", lambda device: False)


M = 128 if torch.cuda.is_available() else 32  # rows of the matrices
SHAPES = [(M, M), (M, M), (4 * M, M), (M, 4 * M), (3, M // 2, M), (M // 4, 3, 1, 1), (M, M // 2), (44, 16), (24,)]


def numbers(shapes, seed, scale=1.0):
    """fp64 on the CPU, equal for every dtype and device up to rounding; nothing is near a singular value of 0."""
    g = torch.Generator().manual_seed(seed)
    found = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [(t / t.norm() * t.numel() ** 0.5 if t.numel() else t) * scale for t in found]


def matrices(device, dtype=torch.float32, exact=False, **settings):
    """(parameters, Muon) of matrices, heads, slices, thin slices that AdamW trains, and an AdamW group.

    exact   the reference: the same rounded numbers in fp64 on the CPU
    """
    params = [nn.Parameter(t.to(dtype).to(device)) for t in numbers(SHAPES, 0, 0.1)]
    if exact:
        params = [nn.Parameter(p.detach().double().cpu()) for p in params]
    splits = [None, {"heads": (0, 2)}, None, None, None, None, {"split": (1, [M // 2 - 4, 4]), "adamw": [1]}]
    splits.append({"split": (0, [20, 20, 4]), "adamw": [2]})
    slices = {"lr_ratio": 0.1, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.01}
    groups = [
        {"params": params[:-1], "use_muon": True, "name": "muon", "splits": splits, "slices": slices},
        {"params": params[-1:], "use_muon": False, "name": "rest", "lr": 1e-3, "weight_decay": 0.01},
    ]
    return params, Muon(groups, lr=LR, **settings)


def feed(params, step):
    """The gradients of a step, in the memory that the last ones had."""
    for p, g in zip(params, numbers([p.shape for p in params], 100 + step, 1e-3), strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(g)


SMALL = {"n_layer": 4, "d_model": 64, "n_head": 4, "vocab_size": 50, "block_size": 64}
SMALL |= {"d_state": 4, "delta_heads": 2, "ssm_head": 16, "window": 5}


def whole_model(device, per_head=False, wd=0.1, pattern="MAGd", **settings):
    """(model, routed optimizer) of attention and state spaces: all groups, fused matrices, thin slices among them."""
    model = build_model(ModelConfig(**SMALL, pattern=pattern), torch.device("cpu"), 3).to(device)
    return model, build_optimizer(route(model, per_head=per_head), lr=LR, wd=wd, adamw_lr=1e-3, **settings)


def weights_of(optimizer, params):
    """What is really updated: the parameter, or the fp32 numbers of a bf16 one and its mantissa."""
    masters = optimizer.master_weights(optimizer.param_groups[0], optimizer.param_groups[0]["params"])
    return {p: masters.get(p, p) for p in params}


def moved(before, params):
    return [p.detach().double().cpu() - b.detach().double().cpu() for b, p in zip(before, params, strict=True)]


def worst(found, expected):
    """The largest relative difference of two lists of tensors, tensor by tensor."""
    return max(
        ((f.double().cpu() - e.double().cpu()).norm() / e.double().norm().clamp(min=1e-30).cpu()).item()
        for f, e in zip(found, expected, strict=True)
    )


# ------------------------------------------------------------------------------------------------ against fp64

WAYS = {  # (method, dtype) -> relative error allowed; measured: see the figures that `within` records
    ("direct", "bfloat16"): 0.06,  # small singular values of squares are lifted with their rounding, 3e-3 each
    ("hybrid", "bfloat16"): 0.08,
    ("direct", "float32"): 1e-3,  # slopes of 1000 at 0
    ("hybrid", "float32"): 1e-3,
    ("gram", "float32"): 5e-3,
    ("cayley", "float32"): 1e-3,
}


def takes(coefficients, method, dtype):
    if method == "cayley":
        return coefficients == "keller"  # any: it has none
    try:
        check_method(method, coefficients, getattr(torch, dtype))
    except ValueError:
        return False
    return True


@pytest.mark.cuda
@pytest.mark.parametrize(
    "coefficients, method, dtype", [(c, *way) for c in COEFFICIENTS for way in WAYS if takes(c, *way)]
)
def test_newton_schulz_agrees_with_fp64(device, within, coefficients, method, dtype):
    steps, ns_dtype = max(len(COEFFICIENTS[coefficients]), 4), getattr(torch, dtype)
    for shape in ((3, M, M), (2, M, 4 * M), (2, 4 * M, M), (1, 9, 200)):
        (U,) = numbers([shape], 7, 1e-6)
        exact = newton_schulz(U, steps, coefficients, "cayley" if method == "cayley" else "direct")
        start = U.to(device, ns_dtype)
        found = orthogonalise(start, coefficients, steps, method, ns_dtype)
        within(f"{coefficients} {method} {dtype} {shape}", worst([found], [exact]), WAYS[method, dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["wide", "tall", "square"])
def test_half_of_a_symmetric_product_is_the_whole(device, within, kind):
    """On a CPU Triton's interpreter, in fp32."""
    if fused.triton is None or device.type == "cpu" and not fused.INTERPRETED:
        pytest.skip("needs Triton, and on a CPU TRITON_INTERPRET=1")
    dtype, tolerance = (torch.bfloat16, 4e-3) if device.type == "cuda" else (torch.float32, 1e-6)
    X = torch.randn(3, 256, 320 if kind == "wide" else 256, generator=torch.Generator().manual_seed(0)).to(
        device, dtype
    )
    X = X.mT.contiguous().mT if kind == "tall" else X
    exact = X.double() @ X.double().mT
    R = symmetric.symmetric(X, out=torch.full((3, 256, 256), torch.nan, dtype=dtype, device=device))
    within(f"{kind}, X Xᵀ", worst([R], [exact]), tolerance)
    assert torch.equal(R, R.mT)
    R = (R / 512).contiguous()
    exact = -2.0 * R.double() + 0.5 * R.double() @ R.double()
    within(f"{kind}, b R + c R R", worst([symmetric.symmetric(R, R, -2.0, 0.5)], [exact]), tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_do_what_they_can_do(device, monkeypatch, dtype):
    """Every block of the default step but those that do not lie in one piece; a rehearsal has no symmetric products."""
    if fused.triton is None or device.type == "cpu" and not fused.INTERPRETED:
        pytest.skip("needs Triton, and on a CPU TRITON_INTERPRET=1")
    taken = {"directions": 0, "change": 0, "symmetric": 0}
    for module, name in ((fused, "directions"), (fused, "change"), (symmetric, "symmetric")):
        whole = getattr(module, name)

        def counted(first, *others, name=name, whole=whole, **options):
            taken[name] += len(first)
            return whole(first, *others, **options)

        monkeypatch.setattr(module, name, counted)
    params, optimizer = matrices(device, getattr(torch, dtype), **BF16)
    feed(params, 0)
    optimizer.step()
    apart = 1  # the columns of a split matrix
    assert taken["directions"] == taken["change"] == optimizer.ns_calls - apart
    assert device.type == "cpu" or taken["symmetric"] > 0


def test_where_triton_cannot_compile_torchs_own_functions_do_the_work(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", True)
    monkeypatch.setattr(fused, "triton", object())
    monkeypatch.setattr(fused, "divide", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="without its Triton kernels, more slowly: ZeroDivisionError"):
        assert not WORKS.__wrapped__(torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ns", [EXACT, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_agree_with_fp64_on_the_cpu(device, within, kind, ns, dtype):
    """Three steps from the same rounded weights and gradients; bf16 weights keep their mantissa."""
    dtype = getattr(torch, dtype)
    params, optimizer = matrices(device, dtype, **KINDS[kind], **ns)
    expected, reference = matrices(device, dtype, exact=True, **KINDS[kind], ns_method="direct")
    before = [p.detach().clone() for p in params]
    for step in range(3):
        feed(params, step)
        for p, q in zip(params, expected, strict=True):
            q.grad = p.grad.double().cpu()
        optimizer.step()
        reference.step()
    products, matrix = optimizer.param_groups[0]["ns_dtype"], slice(None if dtype == torch.float32 else -1)
    found, wanted = moved(before, weights_of(optimizer, params).values()), moved(before, expected)
    tolerance = {"float32": 2e-3, "bfloat16": 0.12}[products]
    if kind == "adamuon":  # after one step entries of O count by their sign: those near 0 may have the other
        tolerance *= 5
    if kind == "classical":  # momentum in 8 bits
        tolerance = max(tolerance, 0.01)
    if dtype == torch.float16:  # weights of 0.1 are rounded by 3e-5
        tolerance = max(tolerance, 0.1)
    # AdamW steps 16-bit vectors in 16 bits, as torch does: nothing to learn from their rounding
    within(f"{kind}, weights {dtype}, products {products}", worst(found[matrix], wanted[matrix]), tolerance)


@pytest.mark.cuda
def test_every_step_of_a_routed_model_agrees_with_fp64_on_the_cpu(device, within):
    settings = {"per_head": True, "cautious": True, "momentum_warmup": "0.85:0.95:4"}
    model, optimizer = whole_model(device, **settings, **EXACT)
    reference, exact = whole_model(torch.device("cpu"), **settings, ns_method="direct")
    reference.double()  # the same Parameters: the optimizer follows
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        feed(list(model.parameters()), step)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad.double().cpu()
        optimizer.step()
        exact.step()
    found = moved(before, model.parameters())
    within("weights of a model", worst(found, moved(before, reference.parameters())), 5e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compat_torch_is_bit_equal_to_torch_optim_muon(device, within, mode, dtype):
    start = [t.to(device, getattr(torch, dtype)) for t in numbers([(M, M), (2 * M, M), (M, 2 * M)], 0, 0.1)]
    a, b = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    ours = Muon(a, lr=0.01, weight_decay=0.1, lr_mode=mode, compat="torch")
    theirs = torch.optim.Muon(b, lr=0.01, weight_decay=0.1, adjust_lr_fn=mode)
    for step in range(10):
        for params, optimizer in ((a, ours), (b, theirs)):
            feed(params, step)
            optimizer.step()
    momenta = [[o.state[p]["momentum_buffer"] for p in ps] for o, ps in ((ours, a), (theirs, b))]
    within(f"weights {dtype}, {mode}", max((p - q).abs().max().item() for p, q in zip(a, b, strict=True)), 0.0)
    within(f"momenta {dtype}, {mode}", max((p - q).abs().max().item() for p, q in zip(*momenta, strict=True)), 0.0)


# ------------------------------------------------------------------------------------------------ no wait

READS = {"tolist", "numpy", "cpu", "__array__"}  # methods of a tensor that torch does not dispatch as an operator
SIZED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")  # operators
HOST = ("_slices_step",)  # AdamW's slices: their counter, which is on the GPU there, is read on a CPU


def spot(what: str) -> None:
    """AssertionError with the line of ours that reads a tensor's values."""
    frame, place = sys._getframe(2), ""
    while frame:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name in HOST:
            return
        if not place and ("muonlm" in file or file == __file__) and not name.startswith("__torch"):
            place = f"{os.path.basename(file)}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    raise AssertionError(f"{what} reads values: on a GPU the host waits for it ({place})")


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if mask or name.startswith(SIZED) and not name.startswith("nonzero_static"):
            spot(name)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and getattr(torch.Tensor, func.__name__, None) is func:
            spot(func.__name__)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits(device):
    """An error where the host would wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with Called(), Dispatched():
            yield


def planted(optimizer, params):
    """With MUONLM_PLANT=sync every step of `optimizer` reads a number of the device."""
    if os.environ.get("MUONLM_PLANT") == "sync":
        optimizer.register_step_post_hook(lambda *_: params[0].sum().item())


@pytest.mark.cuda
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_matrices_never_waits_for_the_device(device, kind, dtype, rate):
    params, optimizer = matrices(device, getattr(torch, dtype), **KINDS[kind], **BF16)
    if kind == "default":
        planted(optimizer, params)
    for group in optimizer.param_groups if rate == "tensor" else ():
        group["lr"] = torch.tensor(group["lr"], device=device)
    feed(params, 0)
    optimizer.step()  # may make and measure
    feed(params, 1)
    with nothing_waits(device):
        optimizer.step()
        optimizer.step()


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["muon", "normuon", "adamuon", "hyperball"])
def test_a_step_of_a_whole_model_with_its_watch_and_clipping_never_waits_for_the_device(device, variant):
    """As the training loop takes it: clipped gradients, a momentum schedule, new rates, the watch in ordinary steps."""
    wd, cautious = (0.0, False) if variant == "hyperball" else (0.1, True)
    settings = {"variant": variant, "cautious": cautious, "momentum_warmup": "0.85:0.95:10"}
    model, optimizer = whole_model(device, wd=wd, **settings, **BF16)
    params = list(model.parameters())
    if variant == "muon":
        planted(optimizer, params)
    watch = build_watch("muon", optimizer, model, every=100)
    for step in range(3):
        feed(params, step)
        waiting = contextlib.nullcontext() if step == 0 else nothing_waits(device)
        with waiting:
            parallel.clip(params, "clip", 1.0, watch.unclipped)
            for group in optimizer.param_groups:
                group["lr"] = group.get("base_lr", LR) / (step + 1)
            with watch.step(step + 1):
                optimizer.step()
            watch.measure(step + 1, 1.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool(t.sum() > 0),
        lambda t: float(t.sum()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: torch.equal(t, t),
    ],
    ids=["item", "tolist", "bool", "float", "nonzero", "mask", "cpu", "numpy", "equal"],
)
def test_whatever_reads_values_is_spotted_without_a_gpu(read):
    with pytest.raises(AssertionError, match="reads values.*test_device.py"), nothing_waits(torch.device("cpu")):
        read(torch.randn(4))


# ------------------------------------------------------------------------------------------------ CUDA graphs


def captured(step, device):
    """step() as a CUDA graph, which is not run yet; on a CPU, where nothing can be captured, step itself."""
    if device.type != "cuda":
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # what is freed during a capture, by chance, may end it
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    finally:
        gc.enable()
    return graph.replay


def compare_replays(device, make):
    """Two equal optimizers, make() -> (parameters, optimizer): one takes eager steps, one replays. Bits must agree."""
    (a, eager), (b, graphed) = make(), make()
    for optimizer in (eager, graphed):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
    replay, side = None, torch.cuda.Stream() if device.type == "cuda" else None
    for step in range(5):
        for params, optimizer in ((a, eager), (b, graphed)):
            feed(params, step)
            for group in optimizer.param_groups:
                group["lr"].mul_(0.9)
        if replay:
            replay()
        elif side is None:
            graphed.step()
        else:  # the first step on another stream, as torch.cuda.graph wants its warm-up
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graphed.step()
            torch.cuda.current_stream().wait_stream(side)
        replay = replay or captured(graphed.step, device)
        eager.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q), f"step {step}: weights of shape {tuple(p.shape)}"
            for key, value in eager.state[p].items():
                assert torch.equal(value, graphed.state[q][key]), f"step {step}: {key} of shape {tuple(p.shape)}"
    return eager


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_replayed_equals_eager_steps_to_the_bit(device, kind, dtype):
    eager = compare_replays(device, lambda: matrices(device, getattr(torch, dtype), **KINDS[kind], **BF16))
    (p,) = eager.param_groups[1]["params"]
    assert eager.state[p]["step"].item() == 5


@pytest.mark.cuda
def test_a_captured_step_of_a_whole_model_replayed_equals_eager_steps_to_the_bit(device):
    def make():
        model, optimizer = whole_model(device, variant="normuon", cautious=True, **BF16)
        return list(model.parameters()), optimizer

    compare_replays(device, make)


def test_a_capture_that_would_stand_still_or_begin_anew_is_refused():
    params, optimizer = matrices(torch.device("cpu"), momentum_schedule=[(0, 0.85), (2, 0.95)], **EXACT)
    with pytest.raises(ValueError, match="no state yet.*take one step before capturing"):
        optimizer._check_capture(dict.fromkeys(params))
    feed(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="changes until step 2.*capture from step 2 on"):
        optimizer._check_capture(dict.fromkeys(params))
    optimizer.step()
    optimizer._check_capture(dict.fromkeys(params))


# ------------------------------------------------------------------------------------------------ state, processes


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["default", "normuon", "classical"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_dict_moves_to_another_device_and_back(device, within, tmp_path, kind, dtype):
    dtype, settings = getattr(torch, dtype), KINDS[kind] | EXACT
    params, optimizer = matrices(device, dtype, **settings)
    for step in range(2):
        feed(params, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    start, kept = [p.detach().clone() for p in params], {p: dict(s) for p, s in optimizer.state.items()}
    kept = {p: {key: value.clone() for key, value in s.items()} for p, s in kept.items()}
    feed(params, 2)
    optimizer.step()
    for place in (torch.device("cpu"), device):
        others, other = matrices(place, dtype, **settings)
        other.load_state_dict(torch.load(tmp_path / "state.pt", map_location=place, weights_only=True))
        for p, q, w in zip(params, others, start, strict=True):
            q.data.copy_(w)
            for key, value in kept[p].items():
                assert torch.equal(value.cpu(), other.state[q][key].cpu()) and other.state[q][key].device == q.device
        feed(others, 2)
        other.step()
        ends = [[*weights_of(o, ps).values()] for o, ps in ((other, others), (optimizer, params))]
        within(f"{kind} {dtype} on {place.type}", worst(moved(start, ends[0]), moved(start, ends[1])), 2e-3)


@pytest.fixture
def alone(device, tmp_path):
    """A process group of this process alone: NCCL on a GPU, gloo in a rehearsal."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("grads", ["averaged", "local"])
def test_collectives_of_one_rank_change_no_bit(device, alone, grads):
    """One rank has nobody to share with, so its owners are put in by hand."""
    (a, plain), (b, shared) = (matrices(device, weight_decay=0.1, **BF16) for _ in range(2))
    shared.replicas = Owners(alone, grads)
    shared.assign_owners()
    shared.replicas.checked = grads == "local"  # its gradients are equal on all ranks, which is refused
    for step in range(3):
        for params, optimizer in ((a, plain), (b, shared)):
            feed(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    holder = nn.ParameterList(b)
    tensors, meta = named_state(shared, holder)
    for key in meta["tensors"]:
        name, _, kind = key.rpartition("/")
        assert torch.equal(tensors[key].cpu(), plain.state[a[int(name)]][kind].cpu())


@pytest.mark.cuda
def test_a_model_under_ddp_takes_the_steps_it_takes_alone(device, alone, within):
    # attention: no scan is compiled for this
    (one, plain), (other, shared) = (whole_model(device, pattern="A", cautious=True, **EXACT) for _ in range(2))
    shared.replicas = Owners(alone, "averaged")
    before = [p.detach().clone() for p in one.parameters()]
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    for net, optimizer in ((one, plain), (DistributedDataParallel(other, device_ids=ids), shared)):
        tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
        for _ in range(2):
            logits = net(tokens[:, :-1])[0]
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    error = worst(moved(before, other.parameters()), moved(before, one.parameters()))
    within("weights", error, 1e-2)  # sums of the backward pass may come in another order, and AdamW divides by them


@pytest.mark.cuda
def test_shards_of_one_rank_move_as_whole_matrices(device, alone, within):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    nets = [nn.Sequential(nn.Linear(M, 2 * M), nn.Linear(2 * M, M)).to(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = [p.detach().clone() for p in nets[0].parameters()]
    fully_shard(nets[1], mesh=init_device_mesh(device.type, (1,)))
    for net in nets:
        groups = [{"params": [m.weight for m in net], "use_muon": True, "name": "muon"}]
        groups.append({"params": [m.bias for m in net], "use_muon": False, "lr": 1e-3, "name": "rest"})
        optimizer = Muon(groups, weight_decay=0.1, **EXACT)
        for step in range(3):
            (x,) = numbers([(8, M)], step)
            net(x.float().to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    ends = [[local(p.detach()) for p in net.parameters()] for net in nets]
    within("weights", worst(moved(before, ends[1]), moved(before, ends[0])), 1e-3)

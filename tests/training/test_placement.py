"""Does each tensor lie where it is used? Runs on a device that is not there find, without a GPU, what a GPU refuses.

Pretence   tensors of the CPU say that they are on a device if they were asked for there, or computed from such. Whoever
           computes with tensors of both kinds is told so, but for what a GPU allows: a number (0-dim) of the CPU,
           indices of the CPU, copies. Values are real, so that what depends on them (packing, prefix trees) runs.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from muonlm.engine import complete
from muonlm.model import kernels
from muonlm.sampling import Sampling
from muonlm.training import parallel
from muonlm.training.loop import loop
from muonlm.training.setup import setup

Tensor = torch.Tensor
MOVES = {Tensor.to, Tensor.cpu, Tensor.copy_, Tensor.type_as}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__, torch.Tensor.index_put_}
AUTOGRAD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
NAMES = {
    "__get__",
    "__set__",
    "_parse_to",
    "_has_compatible_shallow_copy_type",
}  # properties, and what a model asks to move
FREE = {
    Tensor.untyped_storage,
    Tensor.data_ptr,
    Tensor.__repr__,
    Tensor.__hash__,
    Tensor.__len__,
    Tensor.requires_grad_,
}


class Pretence(TorchFunctionMode):
    there: dict[int, tuple[StorageWeakRef, bool]] = {}  # by storage; the reference keeps its address taken

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def on_it(self, t: Tensor) -> bool | None:
        """None: made by torch's own backward pass, so where its results are."""
        with torch._C.DisableTorchFunction():
            found = self.there.get(t.untyped_storage()._cdata)
        return found and found[1]

    def put(self, t: Tensor, there: bool) -> None:
        with torch._C.DisableTorchFunction():
            storage = t.untyped_storage()
            self.there[storage._cdata] = (StorageWeakRef(storage), there)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return func(*args) if self.on_it(args[0]) is False else self.device
        if func == Tensor.is_cuda.__get__:
            return self.on_it(args[0]) is not False
        if func in AUTOGRAD or func in FREE or getattr(func, "__name__", "") in NAMES:
            found = func(*args, **kwargs)
            return found
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {self.on_it(t) for t in tensors if t.dim()} - {None}
        numbers = {self.on_it(t) for t in tensors if not t.dim()} - {None}
        if func in (Tensor.numpy, Tensor.__array__) and True in places | numbers:
            raise AssertionError("numpy cannot read a tensor of the device; call .cpu() first")
        wanted = self.wanted(func, args, kwargs)
        if func not in MOVES and func not in INDEXED and (len(places) == 2 or places == {False} and True in numbers):
            shapes = [(tuple(t.shape), "device" if self.on_it(t) else "cpu") for t in tensors]
            raise AssertionError(f"{getattr(func, '__name__', func)} of tensors in two places: {shapes}")
        if func in INDEXED and self.on_it(args[0]) is False and True in places:
            raise AssertionError("indices of the device for a tensor of the CPU")
        args, kwargs = tree_map(self.hidden, (args, kwargs))
        with torch._C.DisableTorchFunction():
            found = func(*args, **kwargs)
        if wanted is None and func in MOVES | INDEXED and tensors:
            wanted = self.on_it(tensors[0])
        if wanted is None and (places | numbers or not tensors):  # else of a backward pass, too
            wanted = True in places | numbers
        return tree_map(lambda t: self.placed(t, wanted) if isinstance(t, Tensor) else t, found)

    def placed(self, t: Tensor, there: bool | None) -> Tensor:
        known = self.on_it(t)
        if there is None:
            return t
        if known is not None and known != there:
            with torch._C.DisableTorchFunction():
                t = t.clone()  # a move that moved nothing
            known = None
        if known is None:
            self.put(t, there)
        return t

    def wanted(self, func, args, kwargs) -> bool | None:
        """Where a call asks for its result to be."""
        if func is Tensor.cpu:
            return False
        named = [kwargs.get("device"), *(args[1:] if func is Tensor.to else ())]
        for value in named:
            if isinstance(value, Tensor):
                return bool(self.on_it(value))
            if isinstance(value, torch.device):
                return value.type == self.device.type
            if isinstance(value, str):
                return torch.device(value).type == self.device.type
        return None

    def hidden(self, value):
        """For torch itself the device is the CPU."""
        if isinstance(value, torch.device) and value.type == self.device.type:
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and value.split(":")[0] == self.device.type else value


# --- the pretence -----------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda:0")
CARD = SimpleNamespace(name="none", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0)


@pytest.fixture
def device() -> torch.device:
    """For `config`: toy sizes."""
    return torch.device("cpu")


@pytest.fixture
def pretence(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    monkeypatch.setattr(kernels, "_kernels", lambda: None)
    engine = torch.autograd._engine_run_backward

    def watched(*args, **kwargs):
        with mode:  # torch calls its engine without it
            return engine(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", watched)
    with Pretence(CUDA) as mode:
        yield mode


@pytest.mark.parametrize(
    "mistake",
    [
        lambda there, here: there + here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: here[there.long()],
        lambda there, here: torch.where(there > 0, here, 0.0),
        lambda there, here: (there * 2).sum() * here,
        lambda there, here: there.detach().view(-1)[1:].numpy(),
        lambda there, here: torch._foreach_add([there, here], [there, there]),
        lambda there, here: torch.nn.functional.embedding(here.long(), there.view(-1, 1)),
    ],
)
def test_a_mixture_of_devices_is_seen(pretence, mistake):
    here = torch.ones(4)
    there = torch.ones(4).to(CUDA)
    assert (there * 2).device == torch.zeros(1, device="cuda").device == CUDA and here.device.type == "cpu"
    assert (there + torch.tensor(1.0)).device == CUDA and there.cpu().device.type == here.to("cpu").device.type == "cpu"
    with pytest.raises(AssertionError, match="two places|of the device"):
        mistake(there, here)


def test_no_tensors_of_two_devices_meet_in_a_run(pretence, case, config, tmp_path):
    """Data, model, loss, backward of our own functions, optimizer, watch, evaluation, checkpoint, generation."""
    few = {"train.steps": 2, "train.micro_batch": 4, "eval.iters": 1, "log.diagnostics": 1, "log.spectra": 1}
    job = setup(config(case, **few), tmp_path / "run", parallel.Dist(0, 1, CUDA), resume=False, json_mode=True)
    assert all(p.device == CUDA for p in job.model.parameters())
    loop(job)
    state = [value for kept in job.optimizer.state.values() for value in kept.values()]
    assert state and all(value.device == CUDA for value in state if value.dim())
    if job.data.train.tokenizer:
        prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
        replies = complete(job.model.eval(), prompts, Sampling(max_tokens=4, top_k=9, top_p=0.9), stop=frozenset())
        assert [len(reply) for reply in replies] == [4, 4, 4]

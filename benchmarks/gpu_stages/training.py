"""Training on the device: the tests marked `cuda` of the loop, of generation and of the verbs are the checks.

One figure: what it costs that attention's backward pass adds in one order (train.repeatable).
"""

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from muonlm.model.mixers.attention import in_one_order

from .report import Stage
from .suite import run_tests
from .timing import median_ms

TESTS = [  # what is quick first
    "tests/cli/test_on_a_device.py",
    "tests/training/test_memory.py",
    "tests/export/test_hf.py",
    "tests/test_engine.py",
    "tests/training/test_device.py",
]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FP32 = {"efficient fp32": SDPBackend.EFFICIENT_ATTENTION}


def run(stage: Stage) -> None:
    if stage.figures:
        stage.part("attention's backward", lambda: orders(stage))
    if stage.checks:
        workers = max(2, (os.cpu_count() or 2) - 2)
        run_tests(stage, TESTS, workers=2 if stage.rehearse else workers, seconds=stage.left() - 5)


def orders(stage: Stage) -> None:
    """Of each way of attention: ms both ways, and whether its gradients repeat themselves; rows of 1024 tokens."""
    ways = {"math": SDPBackend.MATH} if stage.rehearse else BACKENDS | FP32
    found = {}
    for name, backend in ways.items():
        for ordered in (False, True):
            label = name + ", one order" * ordered
            try:
                found[label] = order(stage, backend, torch.float32 if name in FP32 else torch.bfloat16, ordered)
            except RuntimeError as error:  # what torch refuses in this mode is an answer, too
                found[label] = f"{label}: {str(error).splitlines()[0][:80]}"
    stage.row("attention both ways, by order of its sums", note="; ".join(found.values()), found=found)


def order(stage: Stage, backend: SDPBackend, dtype: torch.dtype, ordered: bool) -> str:
    shape = (1, 2, 64, 16) if stage.rehearse else (8, 12, 1024, 64)
    q, k, v, g = (torch.randn(shape, device=stage.device).to(dtype) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def both():
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(in_one_order(y) if ordered else y, leaves, g)

    first = both()
    same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, both(), strict=True))
    ms = median_ms(both, stage.device, seconds=0.1).median
    return f"{backend.name.split('_')[0].lower()}{' ordered' * ordered} {ms:.3f} ms {'repeats' if same else 'varies'}"

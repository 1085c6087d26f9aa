"""What the tests of scans on a device share: memory that nobody wrote holds NaN, and a fault that can be planted."""

import os

import pytest
import torch

from muonlm.scan import dispatch


@pytest.fixture(autouse=True)
def poisoned(request):
    """In a test marked `cuda`, torch.empty and its kin hand out NaN: what a kernel forgets to write is seen."""
    if not request.node.get_closest_marker("cuda"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # warn only: of the deterministic, the fill is wanted
    yield
    torch.use_deterministic_algorithms(before)


class _Skewed(torch.autograd.Function):
    """The identity, whose gradient is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g


@pytest.fixture(autouse=True)
def planted(request, monkeypatch):
    """MUONLM_PLANT=gradient: delta_scan's gradient of k is wrong, but in fp64, where the truth is computed."""
    if os.environ.get("MUONLM_PLANT") != "gradient" or not request.node.get_closest_marker("cuda"):
        return
    run = dispatch._run

    def wrong(scan, backend, value, k, *tensors, **options):
        if scan == "delta_scan" and value.dtype != torch.float64:
            tensors = [_Skewed.apply(x) if x is k else x for x in tensors]
        return run(scan, backend, value, k, *tensors, **options)

    monkeypatch.setattr(dispatch, "_run", wrong)

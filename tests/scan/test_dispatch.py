"""The choice of a backend, for every scan: what the table says is what runs."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from muonlm import scan
from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.scan import BACKENDS, CHOICES, Backend, backends, choose_backend, dispatch

CPU, META = torch.device("cpu"), torch.device("meta")
SCANS = list(dict.fromkeys(row.scan for row in BACKENDS))
HEADS = [name for name in SCANS if name != "diag_scan"]
F32, F64 = torch.float32, torch.float64


def test_auto_takes_what_can_run_here():
    assert choose_backend("diag_scan", "auto", CPU, F32) == "cpu"  # numba is a dependency
    assert choose_backend("diag_scan", "auto", CPU, F64) == "chunked"
    assert choose_backend("diag_scan", "auto", META, F32) == "chunked"
    assert {choose_backend(name, "auto", CPU, F32) for name in HEADS} == {"chunked"}


@pytest.mark.parametrize("name", SCANS)
def test_every_scan_has_its_definition_and_a_form_for_any_device(name):
    assert {"chunked", "reference"} <= set(backends(name)) <= set(CHOICES)
    for device in (CPU, META, torch.device("mps")):
        for dtype in (F32, F64):
            assert [choose_backend(name, b, device, dtype) for b in ("chunked", "reference")] == [
                "chunked",
                "reference",
            ]


@pytest.mark.parametrize(
    "name, backend, device, dtype, states, says",
    [
        ("diag_scan", "cpu", CPU, F64, 16, "`backend` = 'cpu' computes in fp32, and the tensors are fp64; use auto"),
        ("diag_scan", "cpu", META, F32, 16, "`backend` = 'cpu' needs .* numba, and would run on meta; use auto"),
        (
            "diag_scan",
            "numba",
            CPU,
            F32,
            16,
            "does not compute diag_scan; choose one of auto, triton, cpu, chunked, ref",
        ),
        ("scalar_scan", "cpu", CPU, F32, 16, "does not compute scalar_scan; choose one of auto, triton, chunked, ref"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(name, backend, device, dtype, states, says):
    with pytest.raises(UserError, match=says):
        choose_backend(name, backend, device, dtype, states)


def test_auto_passes_over_a_backend_whose_keys_are_too_narrow_or_that_is_not_there(monkeypatch):
    cpu = next(row for row in BACKENDS if row.name == "cpu")
    narrow = dataclasses.replace(cpu, max_states=8)
    monkeypatch.setattr(dispatch, "BACKENDS", [narrow if row is cpu else row for row in BACKENDS])
    assert [choose_backend("diag_scan", "auto", CPU, F32, n) for n in (0, 8, 9)] == ["cpu", "cpu", "chunked"]
    monkeypatch.setattr("muonlm.scan.diagonal_cpu.available", lambda device: False)
    assert choose_backend("diag_scan", "auto", CPU, F32, 8) == "chunked"


TOY = """
from muonlm.scan import heads

calls = []

def available(device):
    return True

def scalar_scan(lg, w, k, q, S0=None, M0=None, *, gamma=0.0, alpha=1.0, lengths=None, chunk=0):
    calls.append(chunk)
    return heads.scalar_scan(lg, w, k, q, S0, M0, gamma=gamma, alpha=alpha, lengths=lengths, chunk=chunk)
"""


def test_a_new_kernel_of_a_head_scan_is_one_file_and_one_line_of_the_table(tmp_path, monkeypatch):
    """Mamba-2 takes it unasked, or by its name, and its Muon form too; fp64 and the other scans do not."""
    (tmp_path / "toy_kernels.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    row = Backend("scalar_scan", "toy", "toy_kernels", "cpu", fp64=False, needs="nothing")
    monkeypatch.setattr(dispatch, "BACKENDS", [row, *BACKENDS])
    try:
        for name in ("auto", "toy"):
            assert choose_backend("scalar_scan", name, CPU, F32) == "toy"
        assert choose_backend("scalar_scan", "auto", CPU, F64) == "chunked"
        assert choose_backend("delta_scan", "auto", CPU, F32) == "chunked"
        for letter in "Dd":
            cfg = ModelConfig(pattern=letter, n_layer=1, d_model=16, vocab_size=8, ssm_head=8, d_state=4, scan_chunk=5)
            model, tokens = build_model(cfg), torch.arange(8)[None]
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        assert sys.modules["toy_kernels"].calls == [5, 5]
    finally:
        sys.modules.pop("toy_kernels", None)


def test_the_table_is_read_without_torch():
    code = "import sys; from muonlm.scan import BACKENDS, CHOICES; assert BACKENDS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_names_of_the_room_are_found_and_others_are_not():
    assert all(callable(getattr(scan, name)) for name in scan._HOME)
    with pytest.raises(AttributeError, match="diagscan"):
        scan.diagscan

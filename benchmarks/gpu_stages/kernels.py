"""The scans: their tests on this device; what the compiler made of the kernels; then time, and bytes against the least.

Checks   the tests of tests/scan and tests/model/test_kernels.py that are marked `cuda`
ahead    each Triton kernel as training launches it, compiled for sm_90 or for the device's own architecture (ahead.py)
times    forward, and forward and backward, at the sizes of scans.py, medians. "bytes" are those that must move: inputs
         read once, outputs written once, forward; backward inputs and the gradient of y read, gradients written. GB/s
         and the fraction of the copy ceiling count these alone, whatever the kernel moves besides
traffic  is not counted: told is the time over that of a copy of the bytes that must move
peers    fla's chunk_gated_delta_rule, the same shape in bf16 (what it is made for) beside ours with bf16 values (what
         our mixer hands over), in a process of its own, since its search for block sizes may take minutes
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from . import interpreter
from .report import Stage
from .scans import FORMS, must_move, outputs, tensors
from .suite import ROOT, environment, run_tests
from .timing import Times, median_ms

TEST_SECONDS = 85.0
FOR_TIMES = 50.0  # kept back from the tests
B, L = 8, 2048
ONE_OF_EACH = ("muon longhorn", "mamba2", "delta rule", "muon delta rule")  # for a rehearsal, which has two cores


def run(stage: Stage) -> None:
    """Children compile while the tests run; nothing else does while times are taken."""
    interpreter.mend()
    theirs = starting_fla(stage) if stage.figures else None
    children = [*compiling(stage), *(warming(stage) if stage.figures else [])]
    if stage.checks:
        measured = stage.figures and not stage.rehearse
        seconds = min(TEST_SECONDS, stage.left() - FOR_TIMES) if measured else stage.left() - 20
        workers = 2 if stage.rehearse else 14
        paths = ["tests/model/test_kernels.py", "tests/scan"]
        stage.part("tests", lambda: run_tests(stage, paths, workers=workers, seconds=seconds))
    stage.part("ahead of time", lambda: compiled(stage, children))
    wait_for_fla(stage, theirs)
    times: dict[tuple[str, str], Times] = {}
    for name, backend in arms(stage) if stage.figures else ():
        found = stage.part(f"{name}, {backend}", partial(timed, stage, name, backend), seconds=5)
        times |= {(name, backend): found} if found else {}
    if not stage.figures:
        return
    stage.part("ratios", lambda: ratios(stage, times))
    stage.part("fla", lambda: beside_fla(stage, times, theirs))
    if os.environ.get("MUONLM_EXPLORE") == "1" and not stage.rehearse:
        stage.part("workers", lambda: shared_rows(stage), seconds=20)


# ------------------------------------------------------------------------------------------------------------ compiling


def start(stage: Stage, name: str, *command: str) -> tuple[str, Path, subprocess.Popen]:
    """A child without Triton's interpreter, its output in a file."""
    env = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
    path = stage.out / f"{name.replace(' ', '-')}.out"
    with open(path, "w") as out, open(path.with_suffix(".err"), "w") as err:
        return name, path, subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=out, stderr=err)


def compiling(stage: Stage) -> list:
    if importlib.util.find_spec("triton") is None:
        return []
    arch = 90 if stage.rehearse else sum(d * n for d, n in zip((10, 1), torch.cuda.get_device_capability()))
    names = ONE_OF_EACH if stage.rehearse else FORMS
    groups = [",".join(names)] if stage.rehearse else names
    script = str(Path(__file__).with_name("ahead.py"))
    return [start(stage, f"ahead {i}", script, "--arch", str(arch), "--forms", each) for i, each in enumerate(groups)]


def warming(stage: Stage) -> list:
    """Each timed kernel compiled once at its size, all at once, into Triton's cache on disk."""
    if stage.rehearse:
        return []
    names = dict.fromkeys(name for name, backend in arms(stage) if backend == "triton")
    return [start(stage, f"warm {name}", "-m", "gpu_stages.kernels", name) for name in names]


def warm(name: str) -> None:
    given = tensors(name, B, L, torch.device("cuda"))
    for work in passes(name, "triton", given):
        work()
    torch.cuda.synchronize()


def compiled(stage: Stage, children: list) -> None:
    """One row for all kernels, and one for each that spills."""
    found, wrong, late = [], [], []
    for name, path, process in children:
        try:
            process.wait(timeout=max(1.0, stage.left() - (0 if stage.rehearse else FOR_TIMES - 10)))
        except subprocess.TimeoutExpired:  # it would disturb the times
            process.kill()
            process.wait()
            late.append(name)
        if process.returncode and name not in late:
            lines = path.with_suffix(".err").read_text().strip().splitlines() or ["nothing said"]
            wrong.append(f"{name}: exit code {process.returncode}, {lines[-1]}")
        if name.startswith("ahead"):
            found += [json.loads(line) for line in path.read_text().splitlines()]
    for text in wrong:
        stage.row("  compiling", ok=False, note=text[:160])
    if late:
        stage.not_run("  compiling", f"not ready in time: {', '.join(late)}")
    if not found:
        why = "none was ready in time" if late else "triton is not installed, or no scan has kernels"
        return stage.not_run("kernels compiled ahead", why)
    most = max(found, key=lambda kernel: kernel["registers"])
    note = f"most registers {most['registers']} ({most['form']}, {most['kernel']}), most shared memory "
    note += (
        f"{max(kernel['shared'] for kernel in found) / 1024:.0f} KiB, longest {max(k['seconds'] for k in found):.1f} s"
    )
    spilling = [kernel for kernel in found if kernel["spilled"]]
    stage.row("kernels compiled ahead", len(found), ok=not wrong, note=note, kernels=found)
    for kernel in spilling:
        what = f"  spills: {kernel['form']}, {kernel['kernel']}"
        stage.row(what, kernel["spilled"], "B/thread", note=f"{kernel['registers']} registers, {kernel['warps']} warps")


# ---------------------------------------------------------------------------------------------------------------- times


def arms(stage: Stage) -> list[tuple[str, str]]:
    """(form, backend): every backend of the device but the loop; the diagonal scan in plain PyTorch once."""
    from muonlm.errors import UserError
    from muonlm.scan import BACKENDS, choose_backend

    found = []
    for name, form in FORMS.items():
        for row in BACKENDS:
            if row.scan != form.scan or row.name == "reference" or row.device == "cpu":
                continue
            if (row.scan, row.name) == ("diag_scan", "chunked") and name != "muon longhorn":
                continue
            if row.name == "chunked" and form.dtype != torch.float32:  # it widens them
                continue
            try:
                found.append((name, choose_backend(row.scan, row.name, stage.device, torch.float32, form.keys)))
            except UserError:
                continue
    return found


def passes(name: str, backend: str, given: dict) -> tuple[Callable, Callable]:
    """Forward alone, and forward and backward."""
    from muonlm import scan

    function, leaves = getattr(scan, FORMS[name].scan), list(given.values())
    gy = torch.randn_like(given.get("w", given.get("u")), dtype=torch.float32)

    def forward():
        with torch.no_grad():
            outputs(function, name, given, backend=backend)

    def both():
        y, *_ = outputs(function, name, given, backend=backend)
        torch.autograd.grad(y, leaves, gy)

    return forward, both


def timed(stage: Stage, name: str, backend: str) -> Times:
    """A row. velocity_scan is a loop of Python over tokens: few of them are enough."""
    rows, tokens = (1, 4) if stage.rehearse else (B, 64 if name == "velocity" else L)
    given = tensors(name, rows, tokens, stage.device, toy=stage.rehearse)
    seconds, warmup = (0.0, 0) if stage.rehearse else (0.4, 3)
    one, both = (median_ms(f, stage.device, seconds=seconds, warmup=warmup) for f in passes(name, backend, given))
    bytes_one, bytes_both = must_move(given)
    rate = bytes_both / (1e-3 * both.median)
    note = f"forward {one.median:.3g} ms; {bytes_both / 1e6:.0f} MB must move: {rate / 1e9:.0f} GB/s"
    details = {"forward_ms": one.median, "p10": both.p10, "p90": both.p90, "n": both.n, "bytes": bytes_both}
    if copy := stage.ceilings.get("copy_bytes_per_s"):
        traffic = {"forward": one.median * 1e-3 * copy / bytes_one, "both": copy / rate}
        note += f", {rate / copy:.0%} of a copy's"
        details |= {"traffic": traffic}
    if tokens == 64:
        note += f"; {1e3 * both.median / tokens:.0f} µs a token of {rows} rows"
    stage.row(f"{name}, {backend}", both.median, "ms", note=note, **details)
    return both


def ratios(stage: Stage, times: dict) -> None:
    ours, mamba = times.get(("muon longhorn", "triton")), times.get(("mamba", "triton"))
    if not ours or not mamba:
        return stage.not_run("muon longhorn / mamba", "no kernel was timed")
    stage.row("muon longhorn / mamba, time", ours.median / mamba.median, target=1.3)
    copy = stage.ceilings.get("copy_bytes_per_s")
    if not copy:
        return stage.not_run("muon longhorn, time over its bytes' time", "stage ceilings did not measure a copy here")
    least = must_move(tensors("muon longhorn", B, L, torch.device("meta")))[1] / copy
    note = "its bytes at a copy's speed; what really moves, at most 2 times the bytes, no counter here tells"
    stage.row("muon longhorn, time over its bytes' time", 1e-3 * ours.median / least, "x", note=note)


def shared_rows(stage: Stage) -> None:
    """Rows: what the diagonal scan takes when 1 (the sequential form), 2, … programs share a row's chunks."""
    from muonlm.scan import diagonal_triton

    for name in ("muon longhorn", "mamba"):
        works, found = passes(name, "triton", tensors(name, B, L, stage.device)), []
        for count in (1, 2, 4, 8, 16, 32):
            with mock.patch.object(diagonal_triton, "workers", lambda *_, n=count, **__: n):
                one, both = (median_ms(work, stage.device, seconds=0.1).median for work in works)
            found.append(f"{count}: {one:.3f}, {both:.3f}")
        stage.row(f"{name}, programs a row: forward, both", "; ".join(found), "ms")


# ---------------------------------------------------------------------------------------------------------------- peers


def starting_fla(stage: Stage):
    """fla's kernel in a process of its own, which seeks its block sizes while ours compile and are tested."""
    if stage.rehearse or importlib.util.find_spec("fla") is None:
        return None
    return start(stage, "fla", "-m", "gpu_stages.kernels", "fla", str(stage.out / "fla"))


def wait_for_fla(stage: Stage, theirs) -> None:
    """Until it has its block sizes and is still; killed if that takes too long, for it would disturb the times."""
    if theirs is None:
        return
    while theirs[2].poll() is None and not (stage.out / "fla.ready").exists():
        if stage.left() < FOR_TIMES - 10:
            theirs[2].kill()
        time.sleep(0.1)


def beside_fla(stage: Stage, times: dict, theirs) -> None:
    what = "delta rule / fla's kernel, time"
    if theirs is None:
        return stage.not_run(what, "fla's kernels need a GPU" if stage.rehearse else "fla is not installed")
    _, path, process = theirs
    (stage.out / "fla.go").touch()  # nothing else runs now
    try:
        process.wait(timeout=max(1.0, stage.left() - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        return stage.not_run(what, "fla was not ready in the time that the stage has")
    if process.returncode:
        lines = path.with_suffix(".err").read_text().strip().splitlines() or ["nothing said"]
        return stage.not_run(what, f"fla: {lines[-1][:120]}")
    found = json.loads(path.read_text().splitlines()[-1])
    ours = times.get(("delta rule bf16", "triton"))
    if ours is None:
        return stage.not_run(what, "ours was not timed")
    note = f"theirs {found['both']:.3g} ms, forward {found['forward']:.3g} ms, all bf16; ours bf16 values"
    stage.row(what, ours.median / found["both"], target=1.0, note=note, **found)


def fla() -> None:
    """In a process of its own: a line of JSON, milliseconds of fla's kernel."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    device, signs = torch.device("cuda"), Path(sys.argv[2])
    given = {key: x.detach().bfloat16() for key, x in tensors("delta rule", B, L, device).items()}
    given["lg"] = given["lg"].float()
    lg, b, u, k, q = (x.requires_grad_() for x in given.values())
    gy = torch.randn_like(u)

    def forward():
        with torch.no_grad():
            chunk_gated_delta_rule(q=q, k=k, v=u, g=lg, beta=b, scale=1.0)

    def both():
        y, _ = chunk_gated_delta_rule(q=q, k=k, v=u, g=lg, beta=b, scale=1.0)
        torch.autograd.grad(y, [lg, b, u, k, q], gy)

    both()
    torch.cuda.synchronize()
    signs.with_suffix(".ready").touch()
    while not signs.with_suffix(".go").exists():
        time.sleep(0.05)
    print(json.dumps({name: median_ms(f, device).median for name, f in (("forward", forward), ("both", both))}))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    fla() if sys.argv[1] == "fla" else warm(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # with the interpreter's own end, threads of CUDA libraries were seen to abort

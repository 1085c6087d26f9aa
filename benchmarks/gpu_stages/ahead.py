"""The Triton kernels of the scans compiled for a GPU that need not be here: registers, shared memory, spills.

    PYTHONPATH=src python benchmarks/gpu_stages/ahead.py [--arch 90] [--forms mamba,…] [--dtype float32]

Nobody lists kernels or their arguments: every scan of the table with a backend `triton` is called, forward and
backward, on meta tensors of a training shape (scans.py), with each kernel of its module replaced by one that notes how
it is launched. What is compiled is what training compiles, kernels added later too.
One line of JSON a kernel: form, kernel, registers and spilled bytes a thread, shared bytes, warps, seconds.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script
from gpu_stages.scans import FORMS, outputs, tensors  # noqa: E402

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


@dataclass
class Noted:
    """In a kernel's place: kernel[grid](…) appends (kernel, arguments by name, options) and runs nothing."""

    kernel: object
    launches: list

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, args)) | named, options))


def launches(name: str, dtype: torch.dtype = torch.float32, B: int = 8, L: int = 2048) -> list:
    """How the kernels of form `name` are launched in a training step; [] where no backend is called triton.

    With fewer rows a module may take more programs a row (`workers`): both ways are noted.
    """
    from triton.runtime.jit import JITFunction

    from muonlm.scan import BACKENDS

    found: list = []
    for row in BACKENDS:
        if row.scan != FORMS[name].scan or row.name != "triton":
            continue
        module = importlib.import_module(row.module, "muonlm.scan")
        kernels = {key: value for key, value in vars(module).items() if isinstance(value, JITFunction)}
        for workers in (1, 4) if hasattr(module, "workers") else (1,):
            with ExitStack() as stack:
                for key, kernel in kernels.items():
                    stack.enter_context(mock.patch.object(module, key, Noted(kernel, found)))
                if hasattr(module, "workers"):
                    stack.enter_context(mock.patch.object(module, "workers", lambda *_, n=workers, **__: n))
                given = tensors(name, B, L, torch.device("meta"))
                narrow = {key for key, x in given.items() if key != "A" and x.dtype == torch.float32}
                cast = {k: x.detach().to(dtype).requires_grad_() if k in narrow else x for k, x in given.items()}
                y, *_ = outputs(getattr(module, row.scan), name, cast)
                y.backward(torch.empty_like(y))
    return found


def described(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes, as Triton's launcher specialises: 1 and None are constants, 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = arguments[name]
        plain = parameter.is_constexpr or parameter.do_not_specialize
        if parameter.is_constexpr or value is None or type(value) is int and value == 1 and not plain:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # where torch allocates; these have no offsets
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled(kernel, arguments: dict, options: dict, arch: int) -> dict:
    """What the compiler made of one launch. Raises what Triton or ptxas raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    began = time.monotonic()
    source = ASTSource(kernel, *described(kernel, arguments))
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = resources(built.asm["cubin"])
    return {
        "kernel": kernel.__name__,
        "registers": registers,
        "spilled": spilled,
        "shared": built.metadata.shared,
        "warps": built.metadata.num_warps,
        "seconds": round(time.monotonic() - began, 2),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread. A kernel that indexes no local array has a stack for its spills alone."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump said {done.stdout} {done.stderr}")
    return int(found[1]), int(found[2])


def unlike(every: list) -> list:
    """Launches that compile to different kernels."""
    found = {}
    for kernel, arguments, options in every:
        found.setdefault(str((kernel.__name__, described(kernel, arguments), options)), (kernel, arguments, options))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    for name in args.forms.split(","):
        for launch in unlike(launches(name, getattr(torch, args.dtype))):
            print(json.dumps({"form": name, **compiled(*launch, args.arch)}), flush=True)


if __name__ == "__main__":
    main()

"""How long each kernel of the delta rule takes at other block sizes, warps, stages: for delta_triton.blocks.

    PYTHONPATH=src python benchmarks/gpu_stages/blocks.py [--dtype bfloat16] [--keys 56] [--values 112] [--workers 14]

One forward and backward pass at Gated DeltaNet 170M's shape notes how the kernels are launched; processes compile the
variants side by side into Triton's cache; then each is launched again, on the same tensors, and timed. A line a
kernel and variant, the fastest first, "now" beside what is in use. Nothing is checked here: tests/scan does that.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script
from gpu_stages.timing import graph_ms  # noqa: E402

KERNELS = ("squares", "walk", "outputs", "walk_back", "gradients")
ROWS, TOKENS, HEADS, CALLS = 8, 2048, 9, 20


def variants(name: str, dtype: torch.dtype) -> list[dict]:
    half = dtype == torch.bfloat16
    warps, stages = (2, 4, 8), (1, 2, 3)
    if name == "squares":
        return [dict(num_warps=w, num_stages=s) for w, s in product(warps, (1, 2))]
    if name == "outputs":
        return [dict(BP=p, num_warps=w, num_stages=s) for p, w, s in product((32, 64, 128), (4, 8), (1, 2))]
    if name == "gradients":
        sizes = product((32, 64), (32, 64, 128), (4, 8)) if half else product((16, 32), (16, 32), (4, 8))
        return [dict(BN=n, BP=p, num_warps=w, num_stages=s) for (n, p, w), s in product(sizes, (1, 2))]
    return [
        dict(BP=p, num_warps=w, num_stages=s) for p, w, s in product((16, 32, 64) if half else (16, 32), warps, stages)
    ]


def noted(keys: int, values: int, dtype: torch.dtype) -> dict[str, tuple]:
    """name -> (kernel, arguments, named arguments) of one forward and backward pass, that has run."""
    from muonlm.scan import delta_triton

    launches = {}

    class Note:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*args, **named):
                launches[self.name] = self.kernel, args, named
                return self.kernel[grid](*args, **named)

            return launch

    for name in KERNELS:
        setattr(delta_triton, name, Note(name, getattr(delta_triton, name)))
    shape = ROWS, TOKENS, HEADS
    normal = lambda *size: torch.randn(*size, device="cuda")  # noqa: E731
    k = torch.nn.functional.normalize(normal(*shape, keys), dim=-1)
    given = [-0.1 * normal(*shape).abs(), torch.sigmoid(normal(*shape)), normal(*shape, values).to(dtype), k, k / 8]
    y, _ = delta_triton.delta_scan(*(x.requires_grad_() for x in given))
    y.backward(torch.randn_like(y))
    return launches


def launcher(name: str, launch: tuple, variant: dict, keys: int, values: int):
    """The kernel at a variant's sizes. What it writes by blocks of keys goes where there is room for all blocks."""
    kernel, args, named = launch
    named, args = named | variant, list(args)
    n, rows = -(-TOKENS // named["C"]), ROWS * HEADS
    parts = {
        width: -(-all_ // named[block])
        for width, block, all_ in (("P", "BP", values), ("N", "BN", keys))
        if block in named
    }
    grid = {
        "squares": lambda: (n, rows),
        "walk": lambda: (parts["P"], rows),
        "outputs": lambda: (n, rows, parts["P"]),
        "walk_back": lambda: (parts["P"], rows),
        "gradients": lambda: (n, rows, parts["N"]),
    }[name]()
    if name == "gradients":
        args[kernel.arg_names.index("dlg")] = torch.empty(parts["N"], ROWS, TOKENS, HEADS, device="cuda")
    if name == "walk_back":
        args[kernel.arg_names.index("ends")] = torch.empty(parts["P"], rows, n, named["C"] + keys, device="cuda")
    return lambda: kernel[grid](*args, **named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keys", type=int, default=56)
    parser.add_argument("--values", type=int, default=112)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--compile", type=int, default=-1, help=argparse.SUPPRESS)  # this process compiles its share
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.compile < 0:
        command = [sys.executable, __file__, *(x for x in sys.argv[1:])]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda i: subprocess.run([*command, "--compile", str(i)]), range(args.workers)))
    launches = noted(args.keys, args.values, dtype)
    every = [(name, variant) for name in KERNELS for variant in variants(name, dtype)]
    if args.compile >= 0:
        every = every[args.compile :: args.workers]
    found: dict[str, list] = {name: [] for name in KERNELS}
    for name, variant in every:
        try:
            work = launcher(name, launches[name], variant, args.keys, args.values)
            work() if args.compile >= 0 else found[name].append((1e3 * graph_ms(work, CALLS), variant))
        except Exception as error:  # too much shared memory, say
            found[name].append((float("inf"), variant | {"error": str(error)[:60]}))
    if args.compile >= 0:
        return
    for name in KERNELS:
        now = launches[name][2]
        for us, variant in sorted(found[name], key=lambda pair: pair[0]):
            mark = "now" if all(now.get(key) == value for key, value in variant.items()) else ""
            print(f"{name:10} {us:8.1f} us  {variant} {mark}", flush=True)


if __name__ == "__main__":
    main()

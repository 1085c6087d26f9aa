"""How long the diagonal scan takes at other tiles and with other numbers of programs a row:
for diagonal_triton.tile and workers.

    PYTHONPATH=src python benchmarks/gpu_stages/tiles.py [--forms "muon longhorn,mamba"] [--processes 14]

At MuonLonghorn-97m's shape. Processes compile the tiles side by side into Triton's cache; then the forward and the
backward pass are timed, each from a CUDA graph, since a launch takes the host as long as some kernels. First a line for
each kernel of the tiles in use: microseconds of the device (torch.profiler).
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script
from gpu_stages.scans import FORMS, tensors  # noqa: E402
from gpu_stages.timing import graph_ms  # noqa: E402

TILES = {  # BLOCK_D, warps; the first is in use
    "forward": [(32, 1), (16, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 4)],
    "backward": [(32, 2), (16, 1), (16, 2), (32, 1), (32, 4), (64, 2), (64, 4)],
}
PARTS = {"forward": (1, 4, 9, 18, 32), "backward": (1, 3, 9, 18)}
CALLS = 5


def passes(name: str) -> dict:
    """direction -> the pass itself, on the same tensors at every call."""
    from muonlm.scan import diagonal_triton as gpu

    given = {key: x.detach() for key, x in tensors(name, 8, 2048, torch.device("cuda")).items()}
    delta, w, k, q = (given[key] for key in ("delta", "w", "k", "q"))
    A, gamma = given.get("A"), FORMS[name].options.get("gamma", 0.0)
    _, _, _, Sc, Mc = gpu.forward(delta, A, w, k, q, None, None, gamma, 1.0, None, 64)
    gy = torch.randn_like(w)
    return {
        "forward": partial(gpu.forward, delta, A, w, k, q, None, None, gamma, 1.0, None, 64),
        "backward": partial(gpu.backward, delta, A, w, k, q, Sc, Mc, gamma, 1.0, None, 64, gy, None, None),
    }


def fixed(direction: str, block: int, warps: int, parts: int):
    """diagonal_triton with this tile and this many programs a row."""
    from muonlm.scan import diagonal_triton as gpu

    tile = (block, warps, warps)
    return mock.patch.multiple(gpu, tile=lambda N: tile, workers=lambda *_, **__: parts)


def profiled(name: str, works: dict) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            for work in works.values():
                work()
        torch.cuda.synchronize()
    for event in sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:12]:
        print(f"{name:14} {event.key[:40]:40} {event.device_time_total / CALLS:9.1f} us, {event.count // CALLS} calls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", default="muon longhorn")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--compile", type=int, default=-1, help=argparse.SUPPRESS)  # this process compiles its share
    args = parser.parse_args()
    every = [(name, way, tile) for name in args.forms.split(",") for way in TILES for tile in TILES[way]]
    if args.compile < 0:
        command = [sys.executable, __file__, *sys.argv[1:], "--compile"]
        with ThreadPoolExecutor(args.processes) as pool:
            list(pool.map(lambda i: subprocess.run([*command, str(i)]), range(args.processes)))
    else:
        every = every[args.compile :: args.processes]
    works = {name: passes(name) for name in args.forms.split(",")}
    for name in works if args.compile < 0 else ():
        profiled(name, works[name])
    for name, way, tile in every:
        for parts in PARTS[way][:2] if args.compile >= 0 else PARTS[way]:
            with fixed(way, *tile, parts):
                try:
                    if args.compile >= 0:
                        works[name][way]()
                        continue
                    ms = graph_ms(works[name][way], CALLS)
                    print(f"{name:14} {way:8} tile {tile} programs a row {parts:2} {ms:8.3f} ms", flush=True)
                except Exception as error:  # a tile that does not fit, say
                    print(f"{name:14} {way:8} tile {tile} programs a row {parts:2} {str(error)[:80]}", flush=True)


if __name__ == "__main__":
    main()

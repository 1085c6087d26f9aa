"""One command that proves and measures all of muonlm on a GPU, in the minutes that one has.

    PYTHONPATH=src python benchmarks/gpu.py [--stages kernels,training] [--minutes 9] [--out DIR] [--text FILE]
    PYTHONPATH=src python benchmarks/gpu.py --rehearse        every stage at toy size on a CPU, Triton interpreted
    … --only checks|figures                                   the tests, or what is measured
    … --plant gradient|nan|sync|exception                     does the examination see a fault? FAILED rows are wanted

Stages, in this order, each in a process of its own (a broken CUDA context ends one stage) and with a share of the time
that is left; what one does not use goes to the next:
    ceilings     copy bandwidth, bf16 and fp32 products, launch cost: later figures are also fractions of these
    kernels      every scan and backend against the fp64 reference, forward and gradients; then time and bytes
    training     every kind of layer and objective: 20 steps on the device as on the CPU, resume, generation, …
    optimizer    Muon beside torch.optim.Muon and fused AdamW on models' matrices; no synchronisation; CUDA graphs
    throughput   training steps of the recipes at their own sizes: tokens/s, MFU, memory, where the time goes
    quality      `shakespeare` to nanoGPT's published validation loss
The checks are the tests marked `cuda`. Needs torch and what muonlm needs, pytest, and for the kernels triton; fla is
measured too where it is there. No installation, no network. To choose block sizes: gpu_stages/blocks.py and tiles.py.

DIR (default: build/gpu) gets STAGE.jsonl row by row, STAGE.log, gpu.json and gpu.md, a page for LOG.md, of all that
DIR holds. A stage that is run again replaces its rows there; with --only it adds to them. The table goes to stdout.
Verdicts   ok, FAILED: a check · met, missed: a target · not run: with the reason
Exit code  0; 1 if a row is FAILED; 2 for wrong arguments
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"ceilings": 2, "kernels": 26, "training": 14, "optimizer": 12, "throughput": 31, "quality": 15}  # of 100
CHECKED = ("kernels", "training", "optimizer")  # the stages that have checks
GRACE = 5.0  # seconds that a stage may be late
FAULTS = ("gradient", "nan", "sync", "exception")
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
MADE_UP = "We the people of these states ordain that every year the union shall keep the peace and its laws. "
PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "flash-linear-attention", "fla-core")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default=",".join(SHARES), help="which, separated by commas")
    parser.add_argument("--minutes", type=float, help="for all stages together; 9, rehearsed 40")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--text", type=Path, default=TEXT, help="tiny Shakespeare, for stage quality")
    parser.add_argument("--commit", default="", help="what to write where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--only", choices=("checks", "figures"), help="the tests of a stage, or what it measures")
    parser.add_argument("--plant", choices=FAULTS, help="a fault that the stages must report")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process is a stage
    args = parser.parse_args()
    args.stages = [name for name in SHARES if name in args.stages.split(",")]
    args.out, args.text = args.out.resolve(), args.text.resolve()
    if args.only == "checks":
        args.stages = [name for name in args.stages if name in CHECKED]
    args.minutes = args.minutes or (40.0 if args.rehearse else 9.0)
    if unknown := set(parser.parse_args().stages.split(",")) - SHARES.keys():
        parser.error(f"unknown stage {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(SHARES)}")
    return args


def main() -> int:
    args = arguments()
    if args.one:
        run_stage(args)
        return 0
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} sees no CUDA device; --rehearse tries everything at toy size", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends its stage, and the rows are told
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        if not args.only:
            (args.out / f"{name}.jsonl").unlink(missing_ok=True)
        for kept in args.out.glob(f"{name}-*.tests.jsonl"):  # what an earlier run's workers wrote
            kept.unlink()
    if args.rehearse:
        args.text = args.out / "text.txt"
        args.text.write_text(MADE_UP * 400)  # 38 kB
    os.environ |= surroundings(args)
    began = time.monotonic()
    try:
        for i, name in enumerate(args.stages):
            left = 60 * args.minutes - (time.monotonic() - began)
            shares = [SHARES[later] for later in args.stages[i:]]
            start(args, name, left * shares[0] / sum(shares))
    finally:
        failed = tell(args, time.monotonic() - began)
    return 1 if failed else 0


def surroundings(args: argparse.Namespace) -> dict[str, str]:
    """Environment of the stages: no installation, no network, in a rehearsal Triton's interpreter."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    found["MUONLM_CACHE"] = str(args.out / "cache")
    if args.rehearse:
        found |= {"MUONLM_REHEARSE": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if args.plant:
        found["MUONLM_PLANT"] = args.plant
    return found


def start(args: argparse.Namespace, name: str, seconds: float) -> None:
    """A stage in its process; ended when its time is over, with all that it started."""
    command = [sys.executable, __file__, "--one", name, "--minutes", str(seconds / 60), "--out", str(args.out)]
    command += ["--text", str(args.text)] + ["--rehearse"] * args.rehearse
    command += ["--only", args.only] if args.only else []
    began = time.monotonic()
    with open(args.out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        why = ""
        try:
            if process.wait(timeout=seconds + GRACE):
                why = f"the stage ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"ended after its {seconds:.0f} s"
        except KeyboardInterrupt:
            why = "interrupted"
            raise
        finally:
            kill_group(process)
            took = time.monotonic() - began
            row = {"stage": name, "what": "stage", "figure": round(took, 1), "unit": "s", "note": why or "in all"}
            row["verdict"] = "FAILED" if why else "ok"
            with open(args.out / f"{name}.jsonl", "a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")
    print(f"{name}: {took:.0f} s {why}", file=sys.stderr, flush=True)


def kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def run_stage(args: argparse.Namespace) -> None:
    """In the stage's process."""
    from gpu_stages.report import Stage

    kept = args.out / "ceilings.json"
    ceilings = json.loads(kept.read_text()) if kept.exists() else {}
    stage = Stage(args.one, args.out, 60 * args.minutes, args.rehearse, args.text, ceilings)
    stage.checks, stage.figures = args.only != "figures", args.only != "checks"
    stage.part("stage", lambda: importlib.import_module(f"gpu_stages.{args.one}").run(stage))
    if args.one == "ceilings":
        kept.write_text(json.dumps({name: value for name, value in stage.ceilings.items() if value}))


# -------------------------------------------------------------------------------------------------------------- the end


def tell(args: argparse.Namespace, seconds: float) -> int:
    """Print and write what is known; how many rows are FAILED."""
    from gpu_stages.report import FAILED, NOT_RUN, line, records

    rows = [row for name in SHARES for row in records(args.out / f"{name}.jsonl")]
    machine = described(args) | {"seconds": round(seconds)}
    (args.out / "gpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    (args.out / "gpu.md").write_text(page(machine, rows), "utf-8")
    print(f"{'stage':10} {'what':52} {'figure':>18} {'target':>8} verdict")
    for row in rows:
        print(line(row))
    failed, lost = (sum(row["verdict"] == verdict for row in rows) for verdict in (FAILED, NOT_RUN))
    print(f"{len(rows)} rows, {failed} failed, {lost} not run, {seconds:.0f} s; {args.out / 'gpu.md'}")
    return failed


def described(args: argparse.Namespace) -> dict[str, str]:
    import importlib.metadata

    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    commit = args.commit
    if not commit and shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip()
    return {
        "device": "a rehearsal on a CPU" if args.rehearse else torch.cuda.get_device_name(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        **versions,
    }


def page(machine: dict, rows: list[dict]) -> str:
    """The rows as a page of Markdown for LOG.md."""
    from gpu_stages.report import shown

    lines = ["Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
    lines += ["| stage | what | figure | target | verdict | note |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["stage"], row["what"], shown(row), row.get("target") or "", row["verdict"], row.get("note") or ""]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").strip() for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

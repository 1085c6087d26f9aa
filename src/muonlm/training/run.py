"""A run directory and what a run tells the world while it goes on.

    RUN/config.json        the resolved config          RUN/metrics.jsonl   one flushed line per log or evaluation
    RUN/environment.json   versions, device, git        RUN/routing.txt     which optimizer takes which tensor, and why
    RUN/tokenizer.json     what decodes its samples     RUN/report.json     the result
    RUN/checkpoints/  RUN/samples/  RUN/report/

The console and the trackers read the same dicts as metrics.jsonl. A tracker that is missing or fails never stops a run.
Units in names: `_seconds`, `_ms`, `_gib`; `loss` in nats per token; `tok_per_s` over all ranks.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from muonlm import __version__
from muonlm.config.runs import default_directory
from muonlm.config.schema import Config
from muonlm.errors import UserError
from muonlm.storage import append_line, write_atomically

from .objectives import OBJECTIVES

BAR = 16  # columns of the progress bar


def directories(recipe: str, seeds: list[int], out: str | None = None) -> dict[int, str]:
    """A free directory for each seed: `out` with {seed} in it replaced, or with -seedN behind it."""
    pattern = out or str(default_directory(recipe))
    pattern = pattern if "{seed}" in pattern else pattern + "-seed{seed}"
    found = {seed: pattern.replace("{seed}", str(seed)) for seed in seeds}
    for path in found.values():
        Run.refuse_used(Path(path))
    return found


class OurConsole(Console):
    def on_broken_pipe(self) -> None:
        """`muonlm train | head`: the reader has gone, the run goes on in silence (rich's own answer is to exit)."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Run:
    def __init__(self, path: Path, cfg: Config, *, steps: int, json_mode: bool = False):
        self.path, self.cfg, self.steps = Path(path), cfg, steps
        self.console = OurConsole(stderr=json_mode, highlight=False, soft_wrap=True)
        self.progress = None
        self.trackers = []
        self.last_line = 0.0

    # --- the directory ------------------------------------------------------------------------------------------------

    @staticmethod
    def refuse_used(path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            free = path.with_name(path.name + "-2")
            if (path / "config.json").exists():
                raise UserError(
                    f"--out {path} is already in use. Continue it with `muonlm train --resume {path}`, or choose "
                    f"another, such as --out {free}"
                )
            raise UserError(f"--out {path} is already in use, and not by a run. Choose another, such as --out {free}")

    @staticmethod
    def refuse_unwritable(path: Path) -> None:
        try:
            tempfile.TemporaryFile(dir=next(p for p in (path, *path.absolute().parents) if p.exists())).close()
        except OSError as error:
            raise UserError(
                f"--out {path} cannot be written: {error.strerror}. Choose another, such as --out /tmp/{path.name}"
            ) from None

    def create(self, device: torch.device) -> None:
        """Make the directory, or complete one that a kill left half made. With config.json, which comes first, the run
        can be resumed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.json", json.dumps(self.cfg.to_dict(), indent=1))
            (self.path / "samples").mkdir(exist_ok=True)
            if not (self.path / "environment.json").exists():
                write_atomically(self.path / "environment.json", json.dumps(environment(device), indent=1))
        except OSError as error:
            raise UserError(
                f"--out {self.path} cannot be written: {error.strerror}. Choose another, such as --out "
                f"/tmp/{self.path.name}"
            ) from None

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be repeated (from step 0: all), and a last line that a kill cut short."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if step and json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue
            write_atomically(path, "".join(kept))

    # --- metrics ------------------------------------------------------------------------------------------------------

    def record(self, record: dict) -> None:
        """Append to metrics.jsonl and pass on to the trackers."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **record}
        append_line(self.path / "metrics.jsonl", json.dumps(record))
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in list(self.trackers):
            try:
                tracker(numbers, record["step"])
            except Exception as error:  # a tracker's outage is not the run's
                self.log(f"tracking with {self.cfg.track} stopped: {error}")
                self.trackers.remove(tracker)

    def start_tracker(self) -> None:
        if self.cfg.track == "none":
            return
        try:
            self.trackers.append(_open_tracker(self.cfg, self.path))
        except Exception as error:
            self.log(
                f"--track {self.cfg.track} is not available ({error}); going on with metrics.jsonl alone. "
                f'Install it with: pip install "muonlm[track]"'
            )

    # --- console ------------------------------------------------------------------------------------------------------

    def __enter__(self):
        if self.console.is_terminal and os.environ.get("RANK", "0") == "0":
            self.progress = Progress(
                BarColumn(bar_width=BAR), TextColumn("{task.description}"), console=self.console, transient=True
            )
            self.task = self.progress.add_task("starting", total=self.steps)
            self.progress.start()
        return self

    def __exit__(self, *_):
        if self.progress:
            self.progress.stop()

    def log(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show(self, record: dict, seconds_left: float) -> None:
        """The live line of a training step."""
        line = step_line(record, self.steps, seconds_left, OBJECTIVES[self.cfg.train.objective].metrics)
        if self.progress:
            if len(line) + BAR + 1 > self.console.width:  # a narrow terminal: the rates go into a second line
                line = line.replace("  lr_", "\nlr_", 1)
            self.progress.update(self.task, completed=record["step"], description=line)
        elif time.monotonic() - self.last_line > 2 or record["step"] == self.steps:  # a log file wants fewer lines
            self.last_line = time.monotonic()
            self.log(line)


def step_line(record: dict, steps: int, seconds_left: float, metrics: Mapping[str, str]) -> str:
    parts = [f"step {record['step']:,}/{steps:,}", f"epoch {record['epoch']:.3g}", f"loss {record['loss']:.4f}"]
    parts += [form.format(record[name]) for name, form in metrics.items() if name in record]
    parts.append(f"{record['tok_per_s']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    parts.append(f"{duration(record['train_seconds'])}, {duration(seconds_left)} left")
    parts += [f"{key} {record[key]:.2g}" for key in record if key.startswith("lr_")]
    parts += [f"{key} {record[key]:.2g}" for key in ("momentum",) if key in record]
    return "  ".join([*parts, f"{record['peak_memory_gib']:.2f} GiB"])


def duration(seconds: float) -> str:
    """0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def environment(device: torch.device) -> dict:
    def git(*command):
        try:
            return subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, timeout=5
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "muonlm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
        "host_cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _open_tracker(cfg: Config, path: Path):
    """A function (numbers, step) that reports to the chosen service. Imports it only here."""
    project, name = f"muonlm-{cfg.recipe.replace('/', '-') or 'run'}", path.name
    if cfg.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(path / "tensorboard")
        return lambda numbers, step: [writer.add_scalar(key, value, step) for key, value in numbers.items()]
    if cfg.track == "wandb":
        import wandb as service  # pyright: ignore[reportMissingImports]

        options = (
            {"mode": "offline"} if not os.environ.get("WANDB_API_KEY") else {}
        )  # a login prompt would block the run
        handle = service.init(project=project, name=name, dir=path, config=cfg.to_dict(), **options)
    else:
        import trackio as service  # pyright: ignore[reportMissingImports]

        handle = service.init(project=project, name=name, config=cfg.to_dict())
    return lambda numbers, step: handle.log(numbers, step=step) if cfg.track == "wandb" else service.log(numbers)

"""What a stage is given, and how it reports: one row a figure, on disk the moment it is known."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

OK, FAILED, MET, MISSED, NOT_RUN = "ok", "FAILED", "met", "missed", "not run"


@dataclass
class Stage:
    """One stage in its own process.

    rehearse   toy sizes on a CPU, Triton interpreted
    text       a text file to train on
    ceilings   what stage `ceilings` measured here: copy_bytes_per_s, bf16_flops, fp32_flops, launch_s; maybe empty
    """

    name: str
    out: Path
    seconds: float
    rehearse: bool = False
    text: Path | None = None
    ceilings: dict = field(default_factory=dict)
    checks: bool = True  # whether tests are wanted
    figures: bool = True  # whether anything is to be measured
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def left(self) -> float:
        """Seconds until this stage is ended."""
        return self.seconds - (time.monotonic() - self.began)

    def row(
        self,
        what: str,
        figure: float | str | None = None,
        unit: str = "",
        *,
        target: float | None = None,
        better: str = "lower",
        ok: bool | None = None,
        note: str = "",
        **details,
    ) -> None:
        """One line of the table. `ok` is the verdict of a check, `target` that of a figure; `details`: JSON only.

        A rehearsal measures nothing that a target could be held against.
        """
        verdict = ""
        if ok is not None:
            verdict = OK if ok else FAILED
        elif target is not None and not self.rehearse:
            good = isinstance(figure, (int, float)) and (figure <= target if better == "lower" else figure >= target)
            verdict = MET if good else MISSED
        self.write(
            {
                "stage": self.name,
                "what": what,
                "figure": figure,
                "unit": unit,
                "target": target and f"{'≤' if better == 'lower' else '≥'} {target:g}",
                "verdict": verdict,
                "note": note,
                **details,
            }
        )

    def not_run(self, what: str, why: str, **details) -> None:
        self.write({"stage": self.name, "what": what, "verdict": NOT_RUN, "note": why, **details})

    def write(self, row: dict) -> None:
        with open(self.out / f"{self.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(line(row), file=sys.stderr, flush=True)

    def part(self, what: str, work: Callable[[], object], *, seconds: float = 0.0):
        """work(), or None where it raised (a FAILED row; the stage goes on) or where fewer `seconds` are left."""
        if self.left() < seconds:
            self.not_run(what, f"no time: {self.left():.0f} s left, {seconds:.0f} wanted")
            return None
        try:
            return work()
        except Exception as error:  # whatever one part does, the others are measured
            traceback.print_exception(error)
            self.row(what, ok=False, note=reason(error))
            return None


def plant(fault: str) -> None:
    """With gpu.py --plant FAULT this raises: the part that calls it must become a FAILED row."""
    if os.environ.get("MUONLM_PLANT") == fault:
        raise RuntimeError(f"a planted {fault}")


def records(path: Path) -> list[dict]:
    """Lines of JSON; the last may be cut off, where its process was killed."""
    found = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def shown(row: dict) -> str:
    """The figure of a row and its unit."""
    figure = row.get("figure")
    if isinstance(figure, float):
        figure = f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"
    return f"{'' if figure is None else figure} {row.get('unit', '')}".strip()


def line(row: dict) -> str:
    """A row of the table as text."""
    target, note = row.get("target") or "", row.get("note") or ""
    return f"{row['stage']:10} {row['what'][:52]:52} {shown(row):>18} {target:>8} {row['verdict']:8} {note}".rstrip()

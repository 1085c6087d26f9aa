"""Seconds of training that `shakespeare` takes to validation loss 1.4697.

That is nanoGPT's published result on tiny Shakespeare by characters: 10.7M parameters, 5,000 steps of 16,384 tokens,
about 3 minutes on an A100. Ours is `muonlm train shakespeare --eval.target 1.4697` in a process of its own; every
evaluation is over the whole last 10 % of the text, in windows of the model's block. Seconds of training: up to the
first evaluation that reaches the target, evaluations not counted.

MUONLM_EXPLORE=1 first trains VARIANTS side by side, one process each, to their end. Then the one that reached the
target in the fewest steps, or came nearest to it, runs alone. Side by side, steps and losses mean something, seconds
do not.
Planted    MUONLM_PLANT=exception raises in the part, nan lets the loss diverge: FAILED rows
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from .report import Stage, plant

RECIPE, TARGET, SECONDS = "shakespeare", 1.4697, 60.0
DATA = "tiny Shakespeare, whole last 10 %"
VARIANTS: dict[str, dict[str, object]] = {  # what each changes of the recipe
    "recipe": {},
    "dropout .1": {"model.dropout": 0.1},
    "rate .04": {"optim.lr": 0.04},
    "500 steps": {"train.steps": 500},
}


def run(stage: Stage) -> None:
    flags = {}
    if os.environ.get("MUONLM_EXPLORE") == "1":
        flags = stage.part("variants", lambda: explore(stage)) or {}
    stage.part(f"{RECIPE} to {TARGET}", lambda: to_target(stage, flags), seconds=20)


def to_target(stage: Stage, flags: dict[str, object]) -> None:
    plant("exception")
    target = 4.0 if stage.rehearse else TARGET
    training = Training(stage, "alone", flags | {"eval.target": target})
    found = training.finish(stage)
    reached = next((r for r in found["evaluations"] if r["val_loss"] <= target), None)
    note = f"{DATA}: {found['val_loss']:.4f} at step {found['steps']}, {found['ms']:.1f} ms a step, "
    note += f"{found['wall']:.0f} s with start and evaluations" + "".join(f", {k} {v}" for k, v in flags.items())
    figure = reached["train_seconds"] if reached else f"not in {found['seconds']:.0f}"
    stage.row(f"{RECIPE} to {target}", figure, "s", target=SECONDS, note=note, **found)


def explore(stage: Stage) -> dict[str, object]:
    """A row for each variant; the flags of the best."""
    variants = {name: {"eval.every": 50} | flags for name, flags in VARIANTS.items()}
    began = [Training(stage, name, flags) for name, flags in variants.items()]
    best, least = {}, (math.inf, math.inf)
    for training, (name, flags) in zip(began, variants.items()):
        found = stage.part(f"variant {name}", lambda: training.finish(stage, spare=30))
        if found is None:
            continue
        low = min(found["evaluations"], key=lambda r: r["val_loss"])
        reached = next((r["step"] for r in found["evaluations"] if r["val_loss"] <= TARGET), math.inf)
        note = f"at step {low['step']} of {found['steps']}; {TARGET} at step {reached}; side by side"
        stage.row(f"variant {name}", low["val_loss"], "nats", note=note, **found)
        if (reached, low["val_loss"]) < least:
            best, least = flags, (reached, low["val_loss"])
    return best


class Training:
    """`muonlm train shakespeare` in its process."""

    def __init__(self, stage: Stage, name: str, flags: dict[str, object]):
        self.out = stage.out / "quality" / "".join(c if c.isalnum() else "-" for c in name)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        given = {"data.source": stage.text, "eval.iters": 0, "eval.sample": 0}
        if os.environ.get("MUONLM_PLANT") == "nan":
            given["optim.lr"] = 1e38
        large = ("model.", "train.") if stage.rehearse else ()
        given |= {key: value for key, value in flags.items() if not key.startswith(large)}
        command = [sys.executable, "-m", "muonlm", "train", RECIPE, "--json", "--out", str(self.out)]
        command += ["--smoke"] * stage.rehearse + [part for k, v in given.items() for part in (f"--{k}", str(v))]
        self.began, self.log = time.monotonic(), Path(f"{self.out}.log")
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)

    def finish(self, stage: Stage, spare: float = 3.0) -> dict:
        """What it reached by its end, or until only `spare` seconds of the stage are left. Raises what it died of."""
        late = False
        try:
            code = self.process.wait(timeout=max(0.1, stage.left() - spare))
        except subprocess.TimeoutExpired:
            late, code = True, 0
        finally:
            self.process.kill()
        if code:
            said = self.log.read_text("utf-8").strip().splitlines()
            raise RuntimeError(f"exit code {code}: {said[-1] if said else 'it said nothing'}")
        path = self.out / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        evaluations = [r for r in records if "val_loss" in r and r["step"]]
        if not evaluations:
            raise RuntimeError("no evaluation in the time that the stage has")
        last = evaluations[-1]
        return {
            "evaluations": [{key: r[key] for key in ("step", "val_loss", "train_seconds")} for r in evaluations],
            "val_loss": last["val_loss"],
            "steps": last["step"],
            "seconds": last["train_seconds"],
            "ms": 1e3 * last["train_seconds"] / last["step"],
            "wall": time.monotonic() - self.began,
            "stopped": late,
        }

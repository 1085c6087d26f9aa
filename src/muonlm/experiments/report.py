"""Pictures and crossings of finished runs, from metrics.jsonl alone.

    write(run)      report/curves.png (where matplotlib is installed) and, for accuracies, the crossing steps in report.json
"""

import json
from pathlib import Path

from ..checkpoint import write_atomically

CROSSINGS = {  # name in report.json -> (metric, level)
    "train_100_step": ("train_acc", 1.0),
    "val_99_step": ("val_acc", 0.99),
    "val_100_step": ("val_acc", 1.0),
}


def read_metrics(run: Path) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def first_crossing(history: list[dict], metric: str, level: float) -> int | None:
    """First evaluated step at which `metric` is at least `level`."""
    return next((r["step"] for r in history if r.get(metric, float("-inf")) >= level), None)


def crossings(history: list[dict]) -> dict:
    """The steps of CROSSINGS and delay_ratio = val_99_step / train_100_step; {} for runs without accuracies."""
    if not any("val_acc" in r for r in history):
        return {}
    steps = {name: first_crossing(history, *rule) for name, rule in CROSSINGS.items()}
    ratio = steps["val_99_step"] / steps["train_100_step"] if steps["val_99_step"] and steps["train_100_step"] else None
    return steps | {"delay_ratio": ratio}


def write(run: str | Path, say=print, facts: dict | None = None) -> dict:
    """Add `facts` and the crossings to report.json, draw the curves, and return the completed report."""
    run, history = Path(run), read_metrics(run)
    report = json.loads((run / "report.json").read_text())
    found = crossings(history)
    report |= (facts or {}) | found
    if found:
        say("  ".join(f"{name} {'not reached' if step is None else f'{step:,}' if isinstance(step, int) else f'{step:.2f}'}" for name, step in found.items()))
    picture = draw(history, run / "report" / "curves.png", title=f"{report['recipe']}, seed {report['seed']}", crossings=found)
    if picture:
        report["curves"] = str(picture)
        say(f"curves: {picture}")
    write_atomically(run / "report.json", json.dumps(report, indent=1))
    return report


def draw(history: list[dict], target: Path, *, title: str, crossings: dict) -> Path | None:
    """Loss (and accuracy) over steps as a PNG; None where matplotlib is missing or there is nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {key: [(r["step"], r[key]) for r in history if key in r] for key in ("loss", "train_loss", "val_loss", "train_acc", "val_acc")}
    series = {key: points for key, points in series.items() if points}
    if not series:
        return None
    accuracy = "val_acc" in series
    figure, axes = plt.subplots(1, 2 if accuracy else 1, figsize=(11 if accuracy else 7, 4.2), squeeze=False, layout="constrained")
    names = {"loss": ("training batches", "C7", 0.9), "train_loss": ("training split", "C0", 1.6), "val_loss": ("held out", "C3", 1.8),
             "train_acc": ("training split", "C0", 1.6), "val_acc": ("held out", "C3", 1.8)}
    for axis, keys, label in ((axes[0, 0], ("loss", "train_loss", "val_loss"), "loss, nats per token"), (axes[0, -1], ("train_acc", "val_acc"), "accuracy")):
        for key in keys:
            if key in series:
                name, colour, width = names[key]
                if key == "loss" and "train_loss" in series:
                    continue  # the whole split says more than its batches
                axis.plot(*zip(*series[key]), color=colour, linewidth=width, label=name, marker="o" if len(series[key]) < 30 and key != "loss" else None, markersize=3)
        if label == "accuracy" and not accuracy:
            continue
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        if accuracy:
            axis.set_xscale("symlog", linthresh=100)
            for name, step in crossings.items():
                if isinstance(step, int):
                    axis.axvline(step, color="C2", linewidth=0.8, linestyle=":")
                    if label == "accuracy":
                        axis.annotate(name.removesuffix("_step").replace("_", " ") + f" %: {step:,}", (step, 0.05), rotation=90,
                                      fontsize=7, ha="right", va="bottom", color="C2")
        axis.legend(frameon=False)
    if accuracy:
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_ylim(-0.02, 1.05)
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target

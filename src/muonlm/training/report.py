"""Pictures and crossings of finished runs, from metrics.jsonl alone.

write(run)      report/curves.png (where matplotlib is installed) and, for accuracies, the crossing steps in report.json
"""

import json
from pathlib import Path

from .checkpoint import write_atomically

CROSSINGS = {  # name in report.json -> (metric, level)
    "train_99_step": ("train_acc", 0.99),
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
    """The steps of CROSSINGS and delay_ratio = val_99_step / train_99_step; {} for runs without accuracies.

    (Training accuracy of exactly 1 over the whole split comes late, if at all, while the rate is constant: it is reported, not divided by.)
    """
    if not any("train_acc" in r for r in history):
        return {}
    steps = {name: first_crossing(history, *rule) for name, rule in CROSSINGS.items()}
    ratio = steps["val_99_step"] / steps["train_99_step"] if steps["val_99_step"] and steps["train_99_step"] else None
    return steps | {"delay_ratio": ratio}


def write(run: str | Path, say=print, facts: dict | None = None) -> dict:
    """Add `facts` and the crossings to report.json, draw the curves, and return the completed report."""
    run, history = Path(run), read_metrics(run)
    report = json.loads((run / "report.json").read_text())
    found = crossings(history)
    report |= (facts or {}) | found
    if found:
        say(
            "  ".join(
                f"{name} {'not reached' if step is None else f'{step:,}' if isinstance(step, int) else f'{step:.2f}'}"
                for name, step in found.items()
            )
        )
    picture = draw(
        history, run / "report" / "curves.png", title=f"{report['recipe']}, seed {report['seed']}", crossings=found
    )
    if picture:
        report["curves"] = str(picture)
        say(f"curves: {picture}")
    write_atomically(run / "report.json", json.dumps(report, indent=1))
    return report


STYLE = {  # metric -> (label, colour, line width)
    "loss": ("training batches", "C7", 0.9),
    "train_loss": ("training split", "C0", 1.6),
    "val_loss": ("held out", "C3", 1.8),
    "train_acc": ("training split", "C0", 1.6),
    "val_acc": ("held out", "C3", 1.8),
}


def draw(history: list[dict], target: Path, *, title: str, crossings: dict) -> Path | None:
    """Loss over steps as a PNG, and accuracy beside it where there is one; None without matplotlib or anything to draw."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {key: [(r["step"], r[key]) for r in history if key in r] for key in STYLE}
    series = {key: points for key, points in series.items() if points}
    if not series:
        return None
    if "train_loss" in series:
        series.pop("loss", None)  # the whole split says more than its batches
    accuracy = "val_acc" in series
    figure, axes = plt.subplots(
        1, 2 if accuracy else 1, figsize=(11 if accuracy else 7, 4.2), squeeze=False, layout="constrained"
    )
    _panel(axes[0, 0], {key: points for key, points in series.items() if key.endswith("loss")}, "loss, nats per token")
    if accuracy:
        _panel(axes[0, 1], {key: points for key, points in series.items() if key.endswith("acc")}, "accuracy")
        axes[0, 0].set_yscale("log")
        axes[0, 0].set_ylabel("loss, nats per answer")
        for axis in axes[0]:
            axis.set_xscale("symlog", linthresh=100)
            axis.set_xlim(left=0)
        lines = []
        for name, step in crossings.items():
            if isinstance(step, int):
                axes[0, 1].axvline(step, color="C2", linewidth=0.8, linestyle=":")
                what, level, _ = name.split("_")
                lines.append(f"{what} {level} %: step {step:,}")
        axes[0, 1].text(0.04, 0.5, "\n".join(lines), transform=axes[0, 1].transAxes, color="C2", fontsize=9)
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def _panel(axis, series: dict[str, list], label: str) -> None:
    for key, points in series.items():
        name, colour, width = STYLE[key]
        marker = "o" if key != "loss" and len(points) < 30 else None
        axis.plot(*zip(*points), color=colour, linewidth=width, label=name, marker=marker, markersize=3)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="best")

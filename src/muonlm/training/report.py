"""What a run leaves behind: its report and sample, then pictures and crossings, which need metrics.jsonl alone.

finish(job)     report.json and a sample of the trained model
write(run)      report/curves.png (where matplotlib is installed) and, for accuracies, the crossing steps in report.json
"""

import json
import math
import shutil
from pathlib import Path

from muonlm.data.text.templates import template
from muonlm.engine import complete, generate
from muonlm.errors import UserError
from muonlm.model import count_parameters
from muonlm.sampling import Sampling
from muonlm.storage import write_atomically

from .run import duration
from .setup import Setup

CROSSINGS = {  # name in report.json -> (metric, level)
    "train_99_step": ("train_acc", 0.99),
    "train_100_step": ("train_acc", 1.0),
    "val_99_step": ("val_acc", 0.99),
    "val_100_step": ("val_acc", 1.0),
}


def read_metrics(run: Path) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def finish(job: Setup, stopped: bool) -> dict:
    """Write report.json and the sample; return the report. A run that was `stopped` gets neither."""
    cfg, path, progress = job.cfg, job.run.path, job.progress
    final = next((r for r in reversed(read_metrics(path)) if "val_loss" in r), {})
    report = {
        "run": str(path),
        "recipe": cfg.recipe,
        "seed": cfg.seed,
        "objective": cfg.train.objective,
        "optimizer": cfg.optim.name,
        "init_from": cfg.init_from,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(progress.train_seconds, 3),
        "parameters": count_parameters(cfg.model)["total"],
        "dtype": cfg.train.dtype,
        **{k: v for k, v in final.items() if k.startswith(("val_", "train_")) and k != "train_seconds"},
        "best_val_loss": progress.best_loss if math.isfinite(progress.best_loss) else None,
        "best_step": progress.best_step,
        "interrupted": stopped,
    }
    if stopped:
        job.log(
            f"stopped at step {progress.step:,} of {cfg.train.steps:,}. Go on with: muonlm train --resume {path}"
            if progress.step
            else f"stopped before the first step. Begin with: muonlm train --resume {path}"
        )
        return report
    write_atomically(path / "report.json", json.dumps(report, indent=1))
    if cfg.eval.sample and job.data.train.tokenizer:
        job.model.eval()
        text = sample(job)
        write_atomically(path / "samples" / f"step-{progress.step:08d}.txt", text)
        width = min(100, shutil.get_terminal_size().columns)
        job.log(f"\n{' sample ':-^{width}}\n{text}\n{'-' * width}")
    bits = f" = {report['val_bpb']:.4f} bits per byte" if "val_bpb" in report else ""
    job.log(
        f"done: {progress.step:,} steps in {duration(progress.train_seconds)} of training, "
        f"held-out loss {report['val_loss']:.4f} nats per {job.objective.unit}{bits}"
    )
    return report


def sample(job: Setup) -> str:
    """What the trained model writes: eval.prompt continued, or an answer to it or to the first held-out prompt."""
    cfg, model, data, tokenizer = job.cfg, job.model, job.data, job.data.train.tokenizer
    assert tokenizer is not None
    try:
        if not data.template:
            options = {"max_tokens": cfg.eval.sample, "seed": cfg.seed}
            return cfg.eval.prompt + generate(model, tokenizer, cfg.eval.prompt, **options)[0]
        form = template(data.template)
        if cfg.eval.prompt:
            prompt = form.prompt([{"role": "user", "content": cfg.eval.prompt}], tokenizer)
        else:
            prompt = data.evaluated["val"].first_prompt()
        stop = frozenset({form.stop_id(tokenizer)})
        greedy = Sampling(temperature=0, max_tokens=cfg.eval.sample)
        reply = complete(model, [prompt], greedy, stop=stop, vocab=tokenizer.vocab_size)[0]
        return tokenizer.decode([*prompt, *reply])
    except UserError as error:  # a prompt that the new tokenizer cannot express is no reason to fail a finished run
        return f"no sample of --eval.prompt {cfg.eval.prompt!r}: {error}"


def first_crossing(history: list[dict], metric: str, level: float) -> int | None:
    """First evaluated step at which `metric` is at least `level`."""
    return next((r["step"] for r in history if r.get(metric, float("-inf")) >= level), None)


def crossings(history: list[dict]) -> dict:
    """The steps of CROSSINGS and delay_ratio = val_99_step / train_99_step; {} for runs without accuracies.

    (Training accuracy of exactly 1 over the whole split comes late, if at all, while the rate is constant: it is told,
    not divided by.)
    """
    if not any("train_acc" in r for r in history):
        return {}
    steps = {name: first_crossing(history, *rule) for name, rule in CROSSINGS.items()}
    ratio = steps["val_99_step"] / steps["train_99_step"] if steps["val_99_step"] and steps["train_99_step"] else None
    return steps | {"delay_ratio": ratio}


def write(run: str | Path, log=print, facts: dict | None = None) -> dict:
    """Add `facts` and the crossings to report.json, draw the curves, and return the completed report."""
    run = Path(run)
    history = read_metrics(run)
    report = json.loads((run / "report.json").read_text())
    found = crossings(history)
    report |= (facts or {}) | found
    if found:
        log(
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
        log(f"curves: {picture}")
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
    """Loss over steps as a PNG, and accuracy beside it where there is one; None without matplotlib or lines to draw."""
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
        series.pop("loss", None)  # the whole split logs more than its batches
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

"""Runs as directories: where one lies, which is the newest, which settings it had. JSON and paths; no torch.

Raises   UserError: what is no run, has no such checkpoint, or cannot be read, with the nearest that would do
"""

import json
import typing
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from muonlm.errors import UserError

from .schema import Config, MuonConfig
from .spelling import nearest

RUNS = "runs"  # where runs lie that were given no --out


def default_directory(recipe: str) -> Path:
    """runs/<recipe>, or the first of runs/<recipe>-2, -3, … that is free."""
    base = Path(RUNS) / recipe.removesuffix(".toml")
    if base.is_absolute() or ".." in base.parts:
        base = Path(RUNS) / base.name
    number, path = 1, base
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def runs_in(folder: str | Path) -> list[str]:
    return sorted(str(file.parent) for file in Path(folder).glob("*/config.json"))


def newest_run(recipe: str, out: str | Path | None = None, *, shrunk: bool = False) -> Path | None:
    """The run of `recipe` that finished last, of those beside `out`; where none is, of those under runs/.

    shrunk   one that was made by --smoke will do
    """
    beside = Path(out).resolve().parent.glob("*/report.json") if out else ()
    under = (path for depth in ("*", "*/*", "*/*/*") for path in Path(RUNS).resolve().glob(f"{depth}/report.json"))
    return _last(beside, recipe, shrunk) or _last(under, recipe, shrunk)


def _last(reports: Iterable[Path], recipe: str, shrunk: bool) -> Path | None:
    found = [path for path in reports if recipe_of(path.parent, shrunk) == recipe]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def recipe_of(run: Path, shrunk: bool = True) -> str:
    """The recipe of a run; empty if it cannot be read, or was made by --smoke where that will not do."""
    try:
        tree = json.loads((run / "config.json").read_text("utf-8"))
        return tree["recipe"] if shrunk or not tree.get("shrunk") else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def checkpoints(run: str | Path) -> list[Path]:
    """Complete-looking checkpoint directories of a run, oldest first."""
    return sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if path.is_dir())


def locate(source: str | Path, which: str = "best") -> tuple[Path, Path]:
    """(run directory, checkpoint directory) of a run, or of a checkpoint directory inside one."""
    path = Path(source)
    if not path.exists():
        siblings = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(
            f"{str(source)!r} does not exist.{nearest(str(path), siblings)} A run is a folder such as runs/quickstart."
        )
    if (path / "meta.json").exists():
        return path.parent.parent, path
    if not (path / "config.json").exists():
        above = [p for p in list(path.absolute().parents)[:2] if (p / "config.json").exists()]  # RUN/checkpoints/latest
        inside = [str(p) for p in above] or runs_in(path)
        hint = f" Did you mean {inside[-1]!r}?" if inside else " `muonlm train` makes one."
        raise UserError(f"{str(source)!r} is not a run directory (it has no config.json).{hint}")
    root = path / "checkpoints"
    for name in [which] if which.startswith("step-") else [which, "latest"]:
        target = root / name
        if target.is_file():
            target = root / target.read_text().strip()
        if target.is_dir():
            return path, target
    found = ", ".join(p.name for p in checkpoints(path)) or "none"
    raise UserError(
        f"run {path} has no checkpoint {which!r} (found: {found})."
        + (f" Finish or resume it first: muonlm train --resume {path}" if found == "none" else "")
    )


def read_config(run: str | Path) -> Config:
    """The run's config. Tokenizer and template files are those in the run, wherever it went and they came from."""
    try:
        tree = json.loads((Path(run) / "config.json").read_text())
        cfg = Config.from_dict(upgrade(tree), where=f"{run}/config.json")
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{run}/config.json cannot be read: {error}.") from None
    own = {"tokenizer": Path(run, "tokenizer.json"), "template": Path(run, Path(cfg.data.template).name)}
    named = {
        "tokenizer": cfg.data.tokenizer.endswith((".json", ".txt")),
        "template": cfg.data.template.endswith(".toml"),
    }
    kept = {key: str(path.resolve()) for key, path in own.items() if named[key] and path.is_file()}
    return replace(cfg, data=replace(cfg.data, **kept))


def upgrade(tree: dict) -> dict:
    """The config.json of an older run in today's keys.

    Until 2026-11-26 Muon's own settings stood in [optim], among them adaptive_ns (LOG.md tells why it went), and
    selectors stood beside the pattern that they had become.
    """
    model = {key: value for key, value in tree.get("model", {}).items() if not key.endswith("_per_layer")}
    own = typing.get_type_hints(MuonConfig).keys()
    optim, muon = dict(tree.get("optim", {})), dict(tree.get("muon", {}))
    muon |= {key: optim.pop(key) for key in list(optim) if key in own}
    for section in (optim, muon):
        section.pop("adaptive_ns", None)
    return tree | {"model": model, "optim": optim, "muon": muon}

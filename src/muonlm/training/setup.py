"""From a config and a directory to everything that the loop needs: data, model, optimizer, where the run stands.

`setup` makes a run that begins, goes on from its last checkpoint, or has nothing left to do, and tells what it is.

Raises   UserError before anything is trained: a directory in use, data that changed, weights that do not fit, …
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from muonlm import optim
from muonlm.config.runs import checkpoints, default_directory, read_config
from muonlm.config.schema import Config
from muonlm.data.batch import Splits
from muonlm.errors import UserError
from muonlm.model import build_model, count_parameters, scan_choice
from muonlm.optim import OPTIMIZERS, RoutingPlan, load_named_state
from muonlm.optim.build import SHARED
from muonlm.optim.watch.watch import Watch
from muonlm.storage import write_atomically

from . import checkpoint, parallel
from .objectives import OBJECTIVES, Objective
from .parallel import Dist
from .resolve import check, open_data, resolve
from .run import Run
from .start import check_tokenizer
from .start import describe as describe_start


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside weights and optimizer state."""

    step: int = 0
    tokens: int = 0  # trained targets so far
    train_seconds: float = 0.0
    best_loss: float = math.inf  # held-out
    best_step: int = 0

    def counters(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "step"}


@dataclass(frozen=True)
class Setup:
    cfg: Config  # resolved
    dist: Dist
    run: Run
    log: Callable[[str], None]  # lines for people, of rank 0
    data: Splits
    model: nn.Module
    net: nn.Module  # the model as it is called: wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    watch: Watch
    objective: Objective
    loss: Callable
    progress: Progress
    resumed_at: int  # step of the checkpoint that the run goes on from; -1: it begins

    @property
    def ended(self) -> bool:
        """Nothing is left to train."""
        return has_ended(self.cfg, self.progress)


def setup(cfg: Config, out: str | Path | None, dist: Dist, *, resume: bool, json_mode: bool) -> Setup:
    check(cfg)
    path, started = directory(cfg, out, dist, resume)
    data = open_data(cfg, dist)
    check_tokenizer(cfg, data.train.tokenizer)
    cfg = resolve(cfg, data, dist.world, started=started)
    run = Run(path, cfg, steps=cfg.train.steps, json_mode=json_mode)
    log = run.log if dist.main else (lambda text: None)

    saved = last_checkpoint(path, log) if started else None
    model = build_model(cfg.model, dist.device, cfg.seed)
    model.recompute = cfg.train.recompute
    if cfg.train.repeatable and dist.device.type == "cuda":
        parallel.repeat(model)
    if cfg.init_from and saved is None:  # also a run that was killed before its first checkpoint
        tensors, _, _ = checkpoint.read(Path(cfg.init_from), state=False)
        checkpoint.load_weights(model, tensors, cfg.init_from)
    plan = plan_routes(cfg, model)
    optimizer = make_optimizer(cfg, plan, process_group="world" if dist.grouped else None)
    progress = restore(saved, cfg, path, data, model, optimizer) if saved else Progress()
    if cfg.train.dtype == "auto":
        dtype, why = choose_dtype(model, data, cfg, dist)
        cfg = run.cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, dtype=dtype))
        log(f"dtype: {dtype} ({why})")
    watch = make_watch(cfg, optimizer, model)

    idle = bool(saved) and has_ended(cfg, progress)
    if idle:  # the run's record must not name settings that trained nothing
        run.cfg = read_config(path)
    if dist.main:
        begin_run(run, data, progress.step, started, dist)
        describe_run(run, cfg, plan, watch, data, progress.step, started, dist)
    if idle:
        log(nothing_left(cfg, path, progress.step))
    dist.barrier()
    objective = OBJECTIVES[cfg.train.objective]
    try:
        loss = objective.start(cfg, model, data, path, started=bool(saved), dist=dist, log=log)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted. Go on with: muonlm train --resume {path}") from None
    if cfg.train.compile:
        # it is right to trace through that cache: what we keep there are constants
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        model.compile()
    net = dist.wrap(model)
    resumed_at = progress.step if saved else -1
    return Setup(cfg, dist, run, log, data, model, net, optimizer, watch, objective, loss, progress, resumed_at)


def directory(cfg: Config, out: str | Path | None, dist: Dist, resume: bool) -> tuple[Path, bool]:
    """The run directory, and whether it holds a run that goes on; refuses one that is used or cannot be written."""
    path = Path(out) if out else default_directory(cfg.recipe or "run")
    started = resume and (path / "config.json").exists()
    if not started and not resume:
        Run.refuse_used(path)
        Run.refuse_unwritable(path)  # before what may be hours of preparing data
    dist.barrier()  # nobody creates the directory before all have looked
    return path, started


def last_checkpoint(path: Path, log: Callable[[str], None]):
    """What checkpoint.read gives of the newest that reads whole; None for a run that was killed before its first."""
    saved = checkpoint.latest_valid(path, warn=log)
    if saved is None and checkpoints(path):
        raise UserError(f"run {path} has no checkpoint that can be read; start again with another --out.")
    return saved


def restore(saved, cfg: Config, path: Path, data: Splits, model, optimizer) -> Progress:
    """Weights and optimizer state of a checkpoint are put back; where the run stood is returned."""
    tensors, state, meta = saved
    if meta["data"] != data.fingerprint:
        raise UserError(
            f"run {path} was trained on other data: {cfg.data.source!r} changed since. Put the old data back, or start "
            f"a new run from its weights: muonlm train {cfg.recipe} --init-from {path} --out {path}-2"
        )
    checkpoint.load_weights(model, tensors, str(path))
    load_named_state(optimizer, model, state, meta["optimizer"])
    progress = Progress(step=meta["step"], **meta["counters"])
    if progress.step > cfg.train.steps:
        raise UserError(
            f"run {path} has done {progress.step:,} steps, and --train.steps {cfg.train.steps} is fewer; "
            "leave it out, or name more."
        )
    return progress


def has_ended(cfg: Config, progress: Progress) -> bool:
    """The last step is done, or an evaluation reached eval.target."""
    reached = bool(cfg.eval.target) and progress.best_loss <= cfg.eval.target
    return reached or progress.step == cfg.train.steps


def choose_dtype(model: nn.Module, data: Splits, cfg: Config, dist: Dist) -> tuple[str, str]:
    """Rank 0 decides for all, by timing at most 4,096 tokens of the first batch."""
    loss = OBJECTIVES[cfg.train.objective].function()
    rows = min(cfg.train.micro_batch, max(1, 4096 // cfg.model.block_size))
    part = data.train.batch(0, dist.rank, dist.world).split(rows)[0].to(dist.device)
    choice = parallel.choose_dtype(lambda: loss(model, part)[0], dist.device)
    model.zero_grad()
    return dist.broadcast(choice)


# --- what is told and written when a run begins -----------------------------------------------------------------------


def begin_run(run: Run, data: Splits, step: int, started: bool, dist: Dist) -> None:
    """Make or continue the run directory."""
    run.create(dist.device)
    if started:
        run.forget_after(step)
    if data.train.tokenizer:
        data.train.tokenizer.save(run.path)
    if data.template.endswith(".toml"):  # a user's own: with it and the tokenizer the run can be moved, its data lost
        write_atomically(run.path / Path(data.template).name, Path(data.template).read_bytes())
    run.start_tracker()


def describe_run(run, cfg: Config, plan: RoutingPlan, watch: Watch, data: Splits, step: int, started: bool, dist: Dist):
    counts, block = count_parameters(cfg.model), cfg.model.block_size
    rows = cfg.train.global_batch // block
    table = plan.table(watch.optimizer.param_groups)
    write_atomically(run.path / "routing.txt", table)
    run.log(f"run {run.path}" + (f": resumed at step {step:,}" if step else ""))
    if (cfg.init_from or cfg.parent) and not started:
        run.log(describe_start(cfg, counts["total"]))
    run.log(
        f"model: {counts['total']:,} parameters ({counts['tied']:,} tied, {counts['untied']:,} untied, "
        f"{counts['without_embeddings']:,} without embeddings)"
    )
    if data.vocab_size < cfg.model.vocab_size:
        run.log(f"vocabulary: {data.vocab_size:,} tokens, padded to {cfg.model.vocab_size:,} rows")
    for line in watch.opening(table):
        run.log(line)
    for note in data.train.notes:
        run.log(f"data: {note}")
    micro = -(-rows // (dist.world * cfg.train.micro_batch))
    run.log(
        f"training: {cfg.train.steps:,} steps × {cfg.train.global_batch:,} tokens ({rows} rows of {block}; "
        f"{micro} micro-batches × {dist.world} ranks) = {cfg.train.steps / data.train.steps_per_epoch:.3g} epochs, "
        f"{cfg.train.dtype} on {dist.device}"
    )
    if scan := scan_choice(cfg.model, dist.device):
        run.log(f"scan: {scan}")


def nothing_left(cfg: Config, path: Path, step: int) -> str:
    done = step == cfg.train.steps
    why = f"has done its {step:,} steps" if done else f"reached eval.target = {cfg.eval.target:g}"
    more = f"--train.steps {2 * cfg.train.steps}" + ("" if done else " --eval.target 0")
    return (
        f"nothing is left to train: run {path} {why}. More steps: muonlm train --resume {path} {more}; "
        f"another run from its weights: muonlm train {cfg.recipe} --init-from {path}"
    )


# --- the optimizer ----------------------------------------------------------------------------------------------------


def own_settings(cfg: Config) -> dict:
    """The keys of the section that belongs to the optimizer of a run."""
    section = OPTIMIZERS[cfg.optim.name].section
    if not section:
        return {}
    line = f"OPTIMIZERS[{cfg.optim.name!r}].section = {section!r}"
    assert hasattr(cfg, section), f"{line} is no field of Config: give it a class and a field in config/schema.py"
    own = dict(vars(getattr(cfg, section)))
    shared = sorted(own.keys() & {"name", "process_group", *SHARED})
    assert not shared, f"{line} has {', '.join(shared)}, which every optimizer is given from [optim]: rename them"
    return own


def plan_routes(cfg: Config, model: nn.Module) -> RoutingPlan:
    return optim.plan_routes(cfg.optim.name, model, **own_settings(cfg))


def make_optimizer(cfg: Config, plan: RoutingPlan, process_group=None) -> torch.optim.Optimizer:
    shared = {key: getattr(cfg.optim, key) for key in ("name", *SHARED)}
    return optim.build_optimizer(plan, process_group=process_group, **shared, **own_settings(cfg))


def make_watch(cfg: Config, optimizer: torch.optim.Optimizer, model: nn.Module) -> Watch:
    log = {"every": cfg.log.diagnostics, "spectra": cfg.log.spectra, "advice": cfg.log.advice}
    return optim.build_watch(cfg.optim.name, optimizer, model, seed=cfg.seed, **log, **own_settings(cfg))


def smaller_rates(cfg: Config) -> str:
    """What to lower when a loss diverges."""
    entry = OPTIMIZERS[cfg.optim.name]
    rates = {"optim.lr": cfg.optim.lr}
    rates |= {f"{entry.section}.{key}": own_settings(cfg)[key] for key in entry.rates}
    return " or ".join(f"--{key} {rate / 2:g} (now {rate:g})" for key, rate in rates.items())

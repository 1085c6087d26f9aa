"""From what a user asked for to what a run is: which configs are refused, and the values that depend on others."""

import dataclasses
import math

from muonlm.config.schema import Config
from muonlm.data.batch import Splits
from muonlm.data.open import open_splits, source_of
from muonlm.errors import UserError
from muonlm.model import check_model, scan_choice
from muonlm.optim import OPTIMIZERS, lr_scale

from .objectives import OBJECTIVES
from .parallel import Dist, pick_device


def check(cfg: Config) -> None:
    """Refuse, before anything is allocated or read, a config whose parts do not go together, or not on this machine."""
    check_model(cfg.model)
    scan_choice(cfg.model, pick_device(cfg.train.device))
    name, kind = cfg.train.objective, cfg.model.kind
    objective = OBJECTIVES[name]
    if objective.model != kind:
        fits = " or ".join(other for other, entry in OBJECTIVES.items() if entry.model == kind)
        raise UserError(
            f"train.objective = {name} trains a model.kind = {objective.model}, and this one is {kind}; "
            f"add --train.objective {fits}, or --model.kind {objective.model}."
        )
    if cfg.train.repeatable and cfg.train.compile:
        raise UserError(
            "train.repeatable = true orders sums that train.compile = true fuses as it likes; "
            "leave one out: --train.compile false, or --train.repeatable false."
        )
    source_of(cfg.data.source, objective.data)
    rows = rows_per_step(cfg, world=1)
    if steps := cfg.train.fixed_steps(rows * cfg.model.block_size):
        check_schedule(cfg, steps)


def rows_per_step(cfg: Config, world: int) -> int:
    """Rows of an optimizer step over all ranks, from whichever of budget, global_batch, accum, micro_batch are set."""
    t, block = cfg.train, cfg.model.block_size
    tokens = t.parse_budget()[0] if t.budget and not t.global_batch else t.global_batch
    if tokens:
        if tokens % block:
            raise UserError(
                f"train.global_batch = {tokens} tokens is not a multiple of model.block_size = {block}; "
                f"use --train.global_batch {max(1, round(tokens / block)) * block}"
            )
        rows = tokens // block
        if t.accum and rows != (t.micro_batch or -(-rows // (t.accum * world))) * t.accum * world:
            raise UserError(
                f"train.global_batch = {tokens} tokens = {rows} rows, but micro_batch × accum × ranks = "
                f"{t.micro_batch} × {t.accum} × {world}; leave one of the three at 0."
            )
    else:
        rows = (t.micro_batch or 8) * (t.accum or 1) * world
    if rows < world:
        raise UserError(
            f"a step of {rows} rows cannot be shared by {world} ranks; "
            f"use --train.global_batch {world * block} or fewer ranks."
        )
    return rows


def check_schedule(cfg: Config, steps: int) -> None:
    """A schedule that does not fit is refused here, not in the loop."""
    lr_scale(0, steps=steps, **dataclasses.asdict(cfg.sched))


def open_data(cfg: Config, dist: Dist) -> Splits:
    return open_splits(cfg, OBJECTIVES[cfg.train.objective].data, rows_per_step(cfg, dist.world), dist)


def resolve(cfg: Config, data: Splits, world: int, started: bool = False) -> Config:
    """The config with every derived value filled in: vocabulary, template, batch in tokens and rows, steps. A `started`
    run has them."""
    vocab_size = data.vocab_size
    if cfg.model.vocab_size and cfg.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {cfg.model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            f"use --model.vocab_size {vocab_size}, or 0 to follow the tokenizer"
        )
    rows, block, t = rows_per_step(cfg, world), cfg.model.block_size, cfg.train
    share = -(-rows // world)
    steps = t.fixed_steps(rows * block) or math.ceil(t.epochs * data.train.steps_per_epoch)
    if not steps:
        raise UserError(
            "the length of the run is not set; "
            "use --train.steps N, --train.epochs E, --train.tokens T or --train.budget"
        )
    check_schedule(cfg, steps)
    micro_batch = min(t.micro_batch or share, share)
    lengths = dict(steps=steps, epochs=0.0, tokens=0, budget="")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=max(vocab_size, cfg.model.vocab_size)),
        data=dataclasses.replace(cfg.data, template=data.template or cfg.data.template),
        train=dataclasses.replace(t, global_batch=rows * block, micro_batch=micro_batch, accum=0, **lengths),
    )
    return cfg if started else repeatable(cfg)


def repeatable(cfg: Config) -> Config:
    """train.dtype = float32 means all of it, and nothing that a timing decides: such a run can be repeated."""
    if cfg.train.dtype != "float32":
        return cfg
    entry = OPTIMIZERS[cfg.optim.name]
    if not entry.exact:
        return cfg
    own = getattr(cfg, entry.section)
    exact = {key: value for key, value in entry.exact.items() if getattr(own, key) == "auto"}
    return dataclasses.replace(cfg, **{entry.section: dataclasses.replace(own, **exact)})

"""THE loop: pretraining, grokking and whatever comes next are this one function with another objective and other data.

    step n:  g = ∇ Σ_{tokens of batch n} loss / (their global count);   clip;   lr ← base_lr · schedule(n);   optimizer step

`train()` is read from top to bottom. Batch n is a pure function of (seed, n), dropout of (seed, n, rank), rates of n, and the
optimizer's state is saved whole: a resumed run repeats the unbroken one bit for bit on the same device and number of ranks.

Raises   UserError before anything is allocated or trained; RunFailed when the loss is no longer finite (nothing was
updated); MuonInactive when the activity check of optim/watch/activity.py fails.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from muonlm.config.schema import Config
from muonlm.data.batch import Splits
from muonlm.data.open import open_splits
from muonlm.data.text.templates import template
from muonlm.engine import complete, generate
from muonlm.errors import RunFailed, UserError
from muonlm.model import build_model, check_model, count_parameters, scan_choice, train_flops_per_token
from muonlm.optim import RoutingPlan, build_optimizer, load_named_state, lr_scale, named_state, route
from muonlm.optim.watch.activity import ActivityCheck
from muonlm.optim.watch.diagnostics import Diagnostics
from muonlm.optim.watch.qk_clip import qk_clip
from muonlm.sampling import Sampling

from . import checkpoint, parallel
from .dpo import dpo_objective
from .objectives import NEEDS, OBJECTIVES, next_token
from .parallel import Dist
from .run import Run, default_directory, duration
from .stages import check_tokenizer
from .stages import describe as describe_start

# arguments of Muon that are keys of [muon] by the same name
MUON_KEYS = ("momentum", "momentum_form", "nesterov", "variant", "beta2", "cautious", "wd_follows_lr", "ns_steps", "coefficients",
             "ns_method", "ns_dtype", "state_dtype", "lr_mode")  # fmt: skip


def train(cfg: Config, out: str | Path | None = None, *, resume: bool = False, json_mode: bool = False) -> dict:
    """Train `cfg` in the run directory `out` and return its report. `resume` continues what `out` holds."""
    with parallel.start(cfg.train.device) as dist:
        path = Path(out) if out else default_directory(cfg.recipe or "run")
        started = resume and (path / "config.json").exists()
        check_model(cfg.model)
        if not started and not resume:
            Run.refuse_used(path)
            refuse_unwritable(path)  # before what may be hours of preparing data
        dist.barrier()  # nobody creates the directory before all have looked
        data = open_data(cfg, dist)
        check_tokenizer(cfg, data.train.tokenizer)
        cfg = resolve(cfg, data, dist.world, started=started)
        scan = scan_choice(cfg.model, dist.device)
        run = Run(path, cfg, steps=cfg.train.steps, json_mode=json_mode)
        say = run.say if dist.main else (lambda text: None)

        saved = checkpoint.latest_valid(path, warn=say) if started else None
        if started and saved is None and checkpoint.checkpoints(path):
            raise UserError(f"run {path} has no checkpoint that can be read; start again with another --out.")
        model = build_model(cfg.model, dist.device, cfg.seed)
        if cfg.init_from and saved is None:  # also a run that was killed before its first checkpoint
            tensors, _, _ = checkpoint.read(Path(cfg.init_from), state=False)
            checkpoint.load_weights(model, tensors, cfg.init_from)
        model.recompute = cfg.train.recompute
        plan = plan_routes(cfg, model)
        optimizer = make_optimizer(cfg, plan, process_group="world" if dist.world > 1 else None)
        step, counters = 0, {"train_seconds": 0.0, "tokens": 0, "best_loss": math.inf, "best_step": 0}
        if saved:
            tensors, state, meta = saved
            if meta["data"] != data.fingerprint:
                raise UserError(
                    f"run {path} was trained on other data: {cfg.data.source!r} changed since. Put the old data back, or start "
                    f"a new run from its weights: muonlm train {cfg.recipe} --init-from {path} --out {path}-2"
                )
            checkpoint.load_weights(model, tensors, str(path))
            load_named_state(optimizer, model, state, meta["optimizer"])
            step, counters = meta["step"], meta["counters"]
            if step > cfg.train.steps:
                raise UserError(
                    f"run {path} has done {step:,} steps, and --train.steps {cfg.train.steps} is fewer; leave it out, or name more."
                )
        if cfg.optim.name == "muon":
            with user_errors():
                optimizer.assign_owners()  # brings rank 0's choices, too
                optimizer.choose_methods()
        if cfg.train.dtype == "auto":
            dtype, why = choose_dtype(model, data, cfg, dist)
            cfg = run.cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, dtype=dtype))
            say(f"dtype: {dtype} ({why})")
        idle = bool(saved) and (step == cfg.train.steps or reached_target(cfg, counters))
        if idle:  # the run's record must not name settings that trained nothing
            run.cfg = checkpoint.read_config(path)
        clipped = layers_to_clip(cfg, model)
        diagnostics, check = watch(cfg, optimizer)
        if dist.main:
            begin_run(run, cfg, plan, optimizer, data, step, started, dist, say)
            if scan:
                say(f"scan: {scan}")
        if idle:
            say(nothing_left(cfg, path, step))
        dist.barrier()
        if cfg.train.objective == "dpo":
            try:
                objective = dpo_objective(cfg, model, data, run.path, started=bool(saved), dist=dist, say=say)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted. Go on with: muonlm train --resume {path}") from None
        else:
            objective = OBJECTIVES[cfg.train.objective]

        net = dist.wrap(torch.compile(model) if cfg.train.compile else model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        flops, peak = train_flops_per_token(cfg.model), parallel.peak_flops(dist.device)
        autocast = parallel.autocast(dist.device, cfg.train.dtype)
        resumed_at = step if saved else -1
        window = (time.perf_counter(), counters["tokens"], step)  # since the last log line: clock, tokens, step

        with run, Signals() as signals:
            while True:
                last, stopping = step == cfg.train.steps or reached_target(cfg, counters), signals.caught
                best = False
                if (last or (cfg.eval.every and step % cfg.eval.every == 0)) and step != resumed_at:
                    begin = time.perf_counter()
                    result = evaluate(net, objective, data, cfg, dist)
                    took = time.perf_counter() - begin
                    best = result["val_loss"] < counters["best_loss"]
                    if best:
                        counters |= {"best_loss": result["val_loss"], "best_step": step}
                    last |= reached_target(cfg, counters)
                    if dist.main:
                        run.log(
                            {"step": step, "train_seconds": counters["train_seconds"], "eval_seconds": took, **result}
                        )
                        say(
                            f"eval step {step:,}: "
                            + "  ".join(
                                f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in result.items()
                            )
                            + f"  in {took:.1f} s"
                        )
                    window = (time.perf_counter(), counters["tokens"], step)
                due = last or stopping or best or (cfg.train.save_every and step % cfg.train.save_every == 0)
                if due and step > 0 and step != resumed_at:
                    tensors, meta = named_state(optimizer, model)  # all ranks send rank 0 what they own
                    if dist.main:
                        checkpoint.save(
                            path,
                            step,
                            dict(model.named_parameters()),
                            tensors,
                            {"optimizer": meta, "counters": counters, "data": data.fingerprint, "world": dist.world},
                            best=best,
                            keep=cfg.train.keep,
                        )
                    window = (time.perf_counter(), counters["tokens"], step)
                if last or stopping:
                    break

                begin = time.perf_counter()
                net.train()
                if cfg.model.dropout:
                    torch.manual_seed(hash((cfg.seed, step, dist.rank)))
                batch = data.train.batch(step, dist.rank, dist.world)
                count, tokens = dist.sum(torch.tensor([batch.count, batch.tokens])).tolist()
                micro = batch.to(dist.device).split(cfg.train.micro_batch)
                sums = {}
                for i, part in enumerate(micro):
                    with dist.sync(net, last=i == len(micro) - 1):
                        with autocast:
                            loss_sum, _, metrics = objective(net, part)
                        (loss_sum * (dist.world / count)).backward()
                    for name, value in {"loss": loss_sum, **metrics}.items():
                        sums[name] = sums.get(name, 0) + value.detach()
                norm = parallel.clip(
                    parameters, cfg.optim.clip_mode, cfg.optim.grad_clip, cfg.muon.clip_scope, optimizer.param_groups
                )
                # one small all-reduce carries the loss, the metrics and whether any rank was told to stop
                told = torch.tensor(float(signals.pending), device=dist.device)
                *totals, votes = dist.sum(torch.stack([*(value.float() for value in sums.values()), told])).tolist()
                means = {name: total / count for name, total in zip(sums, totals)}
                signals.agree(votes)
                if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
                    raise diverged(step, means["loss"], float(norm), cfg, path)
                scale = lr_scale(step, steps=cfg.train.steps, **dataclasses.asdict(cfg.sched))
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * scale
                with check(step + 1):
                    optimizer.step()
                optimizer.zero_grad()
                if clipped:
                    means |= qk_clip([layer.qk_heads() for layer in clipped], tau=cfg.muon.qk_clip)

                step += 1
                counters["tokens"] += tokens
                counters["train_seconds"] += time.perf_counter() - begin
                if diagnostics:
                    signals_of_muon = diagnostics.collect() if diagnostics.due(step) else {}  # all ranks
                    if dist.main and signals_of_muon:
                        run.log({"step": step, **signals_of_muon})
                    for line in diagnostics.advise(step, loss=means["loss"]):
                        say(f"advice: {line}")
                if dist.main and (step % cfg.log.every == 0 or step == cfg.train.steps):
                    now = (time.perf_counter(), counters["tokens"], step)
                    seconds, tokens, steps = (after - before for after, before in zip(now, window))
                    record = {
                        "step": step,
                        "epoch": step / data.train.steps_per_epoch,
                        **means,
                        "grad_norm": float(norm),
                        **current_rates(optimizer),
                        "tokens": counters["tokens"],
                        "step_ms": 1e3 * seconds / steps,
                        "tok_per_s": tokens / seconds,
                        "train_seconds": counters["train_seconds"],
                        "peak_memory_gib": parallel.peak_memory_gib(dist.device),
                    }
                    if peak:
                        record["mfu"] = flops * record["tok_per_s"] / (peak * dist.world)
                    run.log(record)
                    run.show(record, (cfg.train.steps - step) * seconds / steps)
                    window = (time.perf_counter(), counters["tokens"], step)

        report = None
        if dist.main:
            report = finish(run, cfg, model, data, step, counters, stopped=stopping and not last, say=say)
        del net  # DDP's threads must not outlive the process group
        dist.barrier()
        return report


# --- before the loop ----------------------------------------------------------------------------------------------------------


def refuse_unwritable(path: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=next(p for p in (path, *path.absolute().parents) if p.exists())).close()
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written: {error.strerror}. Choose another, such as --out /tmp/{path.name}"
        ) from None


def global_rows(cfg: Config, world: int) -> int:
    """Rows of one optimizer step over all ranks, from whichever of budget, global_batch, accum and micro_batch are set."""
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
                f"train.global_batch = {tokens} tokens = {rows} rows, but micro_batch × accum × ranks = {t.micro_batch} × "
                f"{t.accum} × {world}; leave one of the three at 0."
            )
    else:
        rows = (t.micro_batch or 8) * (t.accum or 1) * world
    if rows < world:
        raise UserError(
            f"a step of {rows} rows cannot be shared by {world} ranks; use --train.global_batch {world * block} or fewer ranks."
        )
    return rows


def open_data(cfg: Config, dist: Dist) -> Splits:
    return open_splits(cfg, NEEDS[cfg.train.objective], global_rows(cfg, dist.world), dist)


def resolve(cfg: Config, data: Splits, world: int, started: bool = False) -> Config:
    """The config with every derived value filled in: vocabulary, template, batch in tokens and rows, steps. A `started` run has them."""
    vocab_size = data.vocab_size
    if cfg.model.vocab_size and cfg.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {cfg.model.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            f"use --model.vocab_size {vocab_size}, or 0 to follow the tokenizer"
        )
    rows, block = global_rows(cfg, world), cfg.model.block_size
    share = -(-rows // world)
    t = cfg.train
    steps = t.fixed_steps(rows * block) or math.ceil(t.epochs * data.train.steps_per_epoch)
    if not steps:
        raise UserError(
            "the length of the run is not set; use --train.steps N, --train.epochs E, --train.tokens T or --train.budget"
        )
    # a schedule that does not fit is refused here, not in the loop
    lr_scale(0, steps=steps, **dataclasses.asdict(cfg.sched))
    # train.dtype = float32 means all of it, and nothing that a timing decides: such a run can be repeated
    exact = {"ns_dtype": "float32", "ns_method": "aol" if cfg.muon.coefficients.startswith("aol") else "direct"}
    exact = {
        key: value
        for key, value in exact.items()
        if t.dtype == "float32" and not started and getattr(cfg.muon, key) == "auto"
    }
    return dataclasses.replace(
        cfg,
        muon=dataclasses.replace(cfg.muon, **exact),
        model=dataclasses.replace(cfg.model, vocab_size=max(vocab_size, cfg.model.vocab_size)),
        data=dataclasses.replace(cfg.data, template=data.template or cfg.data.template),
        train=dataclasses.replace(
            t,
            steps=steps,
            global_batch=rows * block,
            micro_batch=min(t.micro_batch or share, share),
            accum=0,
            epochs=0.0,
            tokens=0,
            budget="",
        ),
    )


def plan_routes(cfg: Config, model: torch.nn.Module) -> RoutingPlan:
    overrides = [tuple(rule.rsplit("=", 1)) for rule in cfg.muon.route]
    return route(model, overrides=overrides, split_fused=cfg.muon.split_fused, per_head=cfg.muon.per_head)


def make_optimizer(cfg: Config, plan: RoutingPlan, process_group=None) -> torch.optim.Optimizer:
    o, m = cfg.optim, cfg.muon
    roles = {f"{role}_lr": getattr(m, f"{role}_lr") or None for role in ("embed", "head", "scalar")}
    shared = {key: getattr(o, key) for key in ("name", "lr", "wd", "decay", "betas", "eps")}
    own = {key: getattr(m, key) for key in ("adamw_lr", "adamw_wd", *MUON_KEYS)}
    warmup = m.momentum_warmup or None
    return build_optimizer(plan, momentum_warmup=warmup, process_group=process_group, **shared, **roles, **own)


@contextlib.contextmanager
def user_errors():
    """A method that cannot go with a dtype is known only once the device is: it came from a recipe, a flag or the environment."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"[optim] {error}") from None


def watch(cfg: Config, optimizer: torch.optim.Optimizer):
    """(Diagnostics or None, a function of the step that gives the context of its optimizer step: the activity check)."""
    if cfg.optim.name != "muon":
        return None, lambda step: contextlib.nullcontext()
    diagnostics, every = None, cfg.log.diagnostics
    if every or cfg.muon.adaptive_ns:  # which Diagnostics refuses without measurements
        spectra = -(-cfg.log.spectra // every) * every if every else 0  # the next multiple
        diagnostics = Diagnostics(every, spectra, cfg.log.advice, cfg.muon.adaptive_ns, cfg.seed)
        diagnostics.attach(optimizer)
    return diagnostics, ActivityCheck(optimizer)


def layers_to_clip(cfg: Config, model: torch.nn.Module) -> list[torch.nn.Module]:
    """Attention layers that QK-clip watches; none if it is off."""
    if not cfg.muon.qk_clip:
        return []
    layers = [module for module in model.modules() if hasattr(module, "qk_heads")]
    if not layers:
        raise UserError(f"muon.qk_clip = {cfg.muon.qk_clip:g}, but this model has no attention to clip; leave it out.")
    for layer in layers:
        layer.qk_heads()  # refuses QK-norm
        layer.track_logits = True
    return layers


def choose_dtype(model, data: Splits, cfg: Config, dist: Dist) -> tuple[str, str]:
    """Rank 0 decides for all, by timing at most 4,096 tokens of the first batch."""
    objective = OBJECTIVES.get(cfg.train.objective, next_token)  # DPO's time is that of its tokens
    part = (
        data.train.batch(0, dist.rank, dist.world)
        .split(min(cfg.train.micro_batch, max(1, 4096 // cfg.model.block_size)))[0]
        .to(dist.device)
    )
    choice = parallel.choose_dtype(lambda: objective(model, part)[0], dist.device)
    model.zero_grad()
    return dist.broadcast(choice)


def begin_run(run: Run, cfg: Config, plan, optimizer, data: Splits, step: int, started: bool, dist: Dist, say) -> None:
    """Make or continue the run directory, and say what is about to happen."""
    run.create(dist.device)
    if started:
        run.forget_after(step)
    if data.train.tokenizer:
        data.train.tokenizer.save(run.path)
    if data.template.endswith(".toml"):  # a user's own: with it and the tokenizer the run can be moved, its data lost
        shutil.copyfile(data.template, run.path / Path(data.template).name)
    run.start_tracker()
    counts = count_parameters(cfg.model)
    table = plan.table(optimizer.param_groups)
    checkpoint.write_atomically(run.path / "routing.txt", table)
    say(f"run {run.path}" + (f": resumed at step {step:,}" if step else ""))
    if (cfg.init_from or cfg.parent) and not started:
        say(describe_start(cfg, counts["total"]))
    say(
        f"model: {counts['total']:,} parameters ({counts['tied']:,} tied, {counts['untied']:,} untied, {counts['without_embeddings']:,} without embeddings)"
    )
    if data.vocab_size < cfg.model.vocab_size:
        say(f"vocabulary: {data.vocab_size:,} tokens, padded to {cfg.model.vocab_size:,} rows")
    if cfg.optim.name == "muon":
        for line in table.splitlines():
            if line.startswith(("Muon o", "AdamW o", "Using")):
                say(line)
        if optimizer.replicas:
            say(optimizer.replicas.describe())
    for note in data.train.notes:
        say(f"data: {note}")
    rows, block = cfg.train.global_batch // cfg.model.block_size, cfg.model.block_size
    say(
        f"training: {cfg.train.steps:,} steps × {cfg.train.global_batch:,} tokens ({rows} rows of {block}; {-(-rows // (dist.world * cfg.train.micro_batch))} "
        f"micro-batches × {dist.world} ranks) = {cfg.train.steps / data.train.steps_per_epoch:.3g} epochs, {cfg.train.dtype} on {dist.device}"
    )


def nothing_left(cfg: Config, path: Path, step: int) -> str:
    done = step == cfg.train.steps
    why = f"has done its {step:,} steps" if done else f"reached eval.target = {cfg.eval.target:g}"
    more = f"--train.steps {2 * cfg.train.steps}" + ("" if done else " --eval.target 0")
    return (
        f"nothing is left to train: run {path} {why}. More steps: muonlm train --resume {path} {more}; another run from its "
        f"weights: muonlm train {cfg.recipe} --init-from {path}"
    )


# --- inside the loop ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net, objective, data: Splits, cfg: Config, dist: Dist) -> dict[str, float]:
    """Means over whole splits (or cfg.eval.iters batches): val_loss in nats per token, val_bpb in bits per byte of held-out text."""
    model = net.module if dist.world > 1 else net
    model.eval()
    result = {}
    for name, split in data.evaluated.items():
        rows = cfg.eval.rows or split.rows_to_evaluate(cfg.model.block_size)
        batches = split.sequential(rows, dist.rank, dist.world, limit=cfg.eval.iters * rows)
        sums, count = total_sums(model, objective, batches, dist, cfg)
        means = split.report({key: value / count for key, value in sums.items()})
        result |= {f"{name}_{key}": value for key, value in means.items()}
        if cfg.train.objective == "dpo":
            result[f"{name}_pairs"] = int(count)
    return result


def total_sums(model, objective, batches: Iterable, dist: Dist, cfg: Config) -> tuple[dict[str, float], float]:
    """Sums of the objective and its metrics, and their count, over batches and ranks."""
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for batch in batches:
        with parallel.autocast(dist.device, cfg.train.dtype):
            loss_sum, number, metrics = objective(model, batch.to(dist.device))
        count += number
        for name, value in {"loss": loss_sum, **metrics}.items():
            sums[name] = sums.get(name, 0) + value.to("cpu", torch.float64)  # not every device has fp64
    totals = dist.sum(torch.stack([*sums.values(), torch.tensor(count, dtype=torch.float64)])).tolist()
    return dict(zip(sums, totals)), totals[-1]


def reached_target(cfg: Config, counters: dict) -> bool:
    return bool(cfg.eval.target) and counters["best_loss"] <= cfg.eval.target


def current_rates(optimizer) -> dict[str, float]:
    """lr_muon and momentum, lr_adamw: those of the step just taken (the first group of each kind)."""
    rates = {}
    for group in optimizer.param_groups:
        muon = group.get("use_muon", False)
        rates.setdefault("lr_muon" if muon else "lr_adamw", group["lr"])
        if muon:
            rates.setdefault("momentum", group["momentum"])
    return rates


def diverged(step: int, loss: float, norm: float, cfg: Config, path: Path) -> RunFailed:
    o, aux = cfg.optim, cfg.muon.adamw_lr
    rates = [f"--optim.lr {o.lr / 2:g} (now {o.lr:g})"]
    rates += [f"--muon.adamw_lr {aux / 2:g} (now {aux:g})"] * (o.name == "muon")
    good = checkpoint.checkpoints(path)
    kept = f"The last good checkpoint is {good[-1]}." if good else "No checkpoint was written yet."
    return RunFailed(
        f"loss {loss} and gradient norm {norm} at step {step + 1}: nothing was updated. Lower {' or '.join(rates)}. {kept}"
    )


class Signals:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end; a second Ctrl-C ends at once."""

    def __enter__(self):
        self.pending = self.caught = False
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever embeds us handles signals
                pass
        return self

    def _note(self, number, frame):
        self.pending = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, votes: float) -> None:
        """All ranks stop at the same step, once any of them was told to."""
        self.caught = votes > 0

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- after the loop -----------------------------------------------------------------------------------------------------------


def finish(run: Run, cfg: Config, model, data: Splits, step: int, counters: dict, *, stopped: bool, say) -> dict:
    """Write report.json and the sample; return the report."""
    path = run.path
    history = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        if (path / "metrics.jsonl").exists()
        else []
    )
    final = next((r for r in reversed(history) if "val_loss" in r), {})
    report = {
        "run": str(path),
        "recipe": cfg.recipe,
        "seed": cfg.seed,
        "objective": cfg.train.objective,
        "optimizer": cfg.optim.name,
        "init_from": cfg.init_from,
        "steps": step,
        "tokens": counters["tokens"],
        "train_seconds": round(counters["train_seconds"], 3),
        "parameters": count_parameters(cfg.model)["total"],
        "dtype": cfg.train.dtype,
        **{k: v for k, v in final.items() if k.startswith(("val_", "train_")) and k != "train_seconds"},
        "best_val_loss": counters["best_loss"] if math.isfinite(counters["best_loss"]) else None,
        "best_step": counters["best_step"],
        "interrupted": stopped,
    }
    if stopped:
        say(
            f"stopped at step {step:,} of {cfg.train.steps:,}. Go on with: muonlm train --resume {path}"
            if step
            else f"stopped before the first step. Begin with: muonlm train --resume {path}"
        )
        return report
    checkpoint.write_atomically(path / "report.json", json.dumps(report, indent=1))
    if cfg.eval.sample and data.train.tokenizer:
        model.eval()
        text = sample(cfg, model, data)
        checkpoint.write_atomically(path / "samples" / f"step-{step:08d}.txt", text)
        width = min(100, shutil.get_terminal_size().columns)
        say(f"\n{' sample ':-^{width}}\n{text}\n{'-' * width}")
    bits = f" = {report['val_bpb']:.4f} bits per byte" if "val_bpb" in report else ""
    per = "pair" if cfg.train.objective == "dpo" else "token"
    say(
        f"done: {step:,} steps in {duration(counters['train_seconds'])} of training, held-out loss {report['val_loss']:.4f} nats per {per}{bits}"
    )
    return report


def sample(cfg: Config, model, data: Splits) -> str:
    """What the trained model writes: a continuation of eval.prompt, or an answer to it (or to the first held-out prompt)."""
    tokenizer = data.train.tokenizer
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

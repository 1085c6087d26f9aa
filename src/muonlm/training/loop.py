"""THE loop: pretraining, SFT, DPO, grokking are this one function with another objective and other data.

    step n:  g = ∇ Σ_{tokens of batch n} loss / their global count;  clip;  lr ← base_lr · schedule(n);  optimizer step

Batch n is a pure function of (seed, n), dropout of (seed, n, rank), rates of n, and the optimizer's state is saved
whole: a resumed run repeats the unbroken one bit for bit on the same device and number of ranks. On a GPU this was seen
with rows of 160 tokens; attention of long rows, whose fastest backward pass adds in any order, needs train.repeatable.

Raises   UserError before anything is trained (setup.py); RunFailed when the loss is no longer finite (then nothing was
         updated), memory does not suffice (memory.py), or the optimizer turns out not to train (optim/watch).
"""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from muonlm.config.runs import checkpoints
from muonlm.config.schema import Config
from muonlm.data.batch import Batch
from muonlm.errors import RunFailed
from muonlm.model import train_flops_per_token
from muonlm.optim import lr_scale, named_state

from . import checkpoint, memory, parallel
from .evaluate import evaluate, rows_at_once
from .report import finish
from .setup import Setup, setup, smaller_rates


def train(cfg: Config, out: str | Path | None = None, *, resume: bool = False, json_mode: bool = False) -> dict | None:
    """Train `cfg` in the run directory `out` and return its report; None on ranks other than 0.

    resume   go on with the run that `out` holds     json_mode   lines for people go to stderr
    """
    with parallel.start(cfg.train.device) as dist:
        with memory.told(dist.device, Path(out) if out else None, memory.weights(cfg)):
            job = setup(cfg, out, dist, resume=resume, json_mode=json_mode)
        stopped = loop(job)
        report = finish(job, stopped) if dist.main else None
        del job  # DDP's threads must not outlive the process group
        dist.barrier()
        return report


def loop(job: Setup) -> bool:
    """Step after step to the end of the run, its target, or a signal; True if a signal stopped it before its end."""
    cfg, dist, net, optimizer, watch, progress = job.cfg, job.dist, job.net, job.optimizer, job.watch, job.progress
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    meter, fits = Meter(job), functools.partial(memory.told, dist.device, job.run.path)
    with job.run, StopSignals() as signals:
        while True:
            with meter.paused(), fits(memory.evaluation(cfg, rows_at_once(job.data, cfg))):
                judge_and_save(job, signals.agreed)
            if job.ended or signals.agreed:
                return not job.ended

            begin = time.perf_counter()
            net.train()
            if cfg.model.dropout:
                torch.manual_seed(hash((cfg.seed, progress.step, dist.rank)))
            batch = job.data.train.batch(progress.step, dist.rank, dist.world)
            count, tokens = dist.sum(torch.tensor([batch.count, batch.tokens])).tolist()
            with fits(memory.step(cfg)):
                sums = backward(job, batch, scale=dist.world / count)  # DDP averages over ranks, hence their number
            norm = parallel.clip(parameters, cfg.optim.clip_mode, cfg.optim.grad_clip, watch.unclipped)
            # one small all-reduce carries the loss, the metrics and whether any rank was told to stop
            told = torch.tensor(float(signals.pending), device=dist.device)
            *totals, votes = dist.sum(torch.stack([*(value.float() for value in sums.values()), told])).tolist()
            means = {name: total / count for name, total in zip(sums, totals)}
            signals.agree(votes)
            if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
                raise diverged(job, means["loss"], float(norm))
            scale = lr_scale(progress.step, steps=cfg.train.steps, **dataclasses.asdict(cfg.sched))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            with fits(memory.weights(cfg)), watch.step(progress.step + 1):
                optimizer.step()
            optimizer.zero_grad()
            means |= watch.clip()

            progress.step += 1
            progress.tokens += tokens
            progress.train_seconds += time.perf_counter() - begin
            measurements, advice = watch.measure(progress.step, means["loss"])  # all ranks
            if dist.main and measurements:
                job.run.record({"step": progress.step, **measurements})
            for line in advice:
                job.log(f"advice: {line}")
            if dist.main and (due(progress.step, cfg.log.every) or progress.step == cfg.train.steps):
                tell(job, meter, means, float(norm))


def due(step: int, every: int) -> bool:
    """Whether `step` is one of each `every`; 0 = none is."""
    return bool(every) and step % every == 0


def backward(job: Setup, batch: Batch, scale: float) -> dict[str, Tensor]:
    """Gradients of scale · Σ loss over the micro-batches of `batch`; the detached sums of loss and metrics."""
    micro = [part.to(job.dist.device) for part in batch.split(job.cfg.train.micro_batch)]  # counts need no device
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(micro):
        with job.dist.sync(job.net, last=i == len(micro) - 1):
            with parallel.autocast(job.dist.device, job.cfg.train.dtype):
                loss_sum, _, metrics = job.loss(job.net, part)
            (loss_sum * scale).backward()
        for name, value in {"loss": loss_sum, **metrics}.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums


def judge_and_save(job: Setup, stopping: bool) -> None:
    """Evaluate and write a checkpoint, where they are due before the next step."""
    step, best = job.progress.step, False
    if step == job.resumed_at:  # what a checkpoint holds was evaluated and saved with it
        return
    if job.ended or due(step, job.cfg.eval.every):
        best = judge(job)
    if step > 0 and (job.ended or stopping or best or due(step, job.cfg.train.save_every)):
        save(job, best)


def judge(job: Setup) -> bool:
    """Evaluate, tell and record it; True if this is the best held-out loss so far."""
    progress, begin = job.progress, time.perf_counter()
    result = evaluate(job.net, job.loss, job.data, job.cfg, job.dist)
    took = time.perf_counter() - begin
    best = result["val_loss"] < progress.best_loss
    if best:
        progress.best_loss, progress.best_step = result["val_loss"], progress.step
    if job.dist.main:
        seconds = {"train_seconds": progress.train_seconds, "eval_seconds": took}
        job.run.record({"step": progress.step, **seconds, **result})
    shown = [f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4f}" for k, v in result.items()]
    job.log(f"eval step {progress.step:,}: {'  '.join(shown)}  in {took:.1f} s")
    return best


def save(job: Setup, best: bool) -> None:
    """A checkpoint of this step."""
    tensors, layout = named_state(job.optimizer, job.model)  # all ranks send rank 0 what they own
    if job.dist.main:
        meta = {
            "optimizer": layout,
            "counters": job.progress.counters(),
            "data": job.data.fingerprint,
            "world": job.dist.world,
        }
        weights, step, keep = dict(job.model.named_parameters()), job.progress.step, job.cfg.train.keep
        checkpoint.save(job.run.path, step, weights, tensors, meta, best=best, keep=keep)


def tell(job: Setup, meter: "Meter", means: dict[str, float], norm: float) -> None:
    """A line of metrics.jsonl, and the live line."""
    progress, cfg = job.progress, job.cfg
    speed = meter.read()
    record = {
        "step": progress.step,
        "epoch": progress.step / job.data.train.steps_per_epoch,
        **means,
        "grad_norm": norm,
        **job.watch.rates(),
        "tokens": progress.tokens,
        **speed,
        "train_seconds": progress.train_seconds,
        "peak_memory_gib": parallel.peak_memory_gib(job.dist.device),
    }
    if meter.peak:
        record["mfu"] = meter.flops * record["tok_per_s"] / meter.peak
    job.run.record(record)
    job.run.show(record, (cfg.train.steps - progress.step) * speed["step_ms"] / 1e3)


def diverged(job: Setup, loss: float, norm: float) -> RunFailed:
    good = checkpoints(job.run.path)
    kept = f"The last good checkpoint is {good[-1]}." if good else "No checkpoint was written yet."
    return RunFailed(
        f"loss {loss} and gradient norm {norm} at step {job.progress.step + 1}: nothing was updated. "
        f"Lower {smaller_rates(job.cfg)}. {kept}"
    )


class Meter:
    """Speed since it was last read, over all ranks; evaluations and checkpoints do not count."""

    def __init__(self, job: Setup):
        self.progress = job.progress
        self.flops = train_flops_per_token(job.cfg.model)
        self.peak = (parallel.peak_flops(job.dist.device) or 0) * job.dist.world  # 0: unknown
        self._restart()

    def _restart(self) -> None:
        self._since = (time.perf_counter(), self.progress.tokens, self.progress.step)

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        clock, tokens, step = self._since
        self._since = (clock + time.perf_counter() - begin, tokens, step)

    def read(self) -> dict[str, float]:
        clock, tokens, step = self._since
        self._restart()
        seconds = self._since[0] - clock
        return {
            "step_ms": 1e3 * seconds / (self.progress.step - step),
            "tok_per_s": (self.progress.tokens - tokens) / seconds,
        }


class StopSignals:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end; a second Ctrl-C ends at once."""

    def __enter__(self):
        self.pending = self.agreed = False
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
        self.agreed = votes > 0

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

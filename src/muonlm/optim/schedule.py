"""Learning-rate and momentum schedules: pure functions of the step, so that a resumed run needs no scheduler state.

    lr(t) = base_lr * lr_scale(t)          t = 0 ... steps-1, an optimizer step (never a micro-step)
    warm-up     1/w at t = 0, linear to 1 at t = w (w = `warmup`); never 0, so that no step is wasted
    constant    1
    linear      1 at t = w, linear to `end_factor` at the last step
    cosine      1 at t = w, half a cosine to `end_factor` at the last step
    wsd         1, then linear to `end_factor` over the last `cooldown_frac` of the steps

Units    multipliers in [0, 1]; steps are optimizer steps
Raises   UserError for impossible values
Source   wsd: Hu et al., arXiv 2404.06395; cooldown share 0.4 and momentum 0.85 -> 0.95 in 300 steps: nanoGPT-Extend,
         modded-nanogpt
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise

from muonlm.errors import UserError

KINDS = ("wsd", "cosine", "linear", "constant")


def lr_scale(
    step: int,
    *,
    kind: str = "wsd",
    steps: int,
    warmup: int = 0,
    cooldown_frac: float = 0.4,
    end_factor: float = 0.0,
) -> float:
    """Multiplier of the base learning rate at `step`; past the last step it stays at its last value."""
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"`kind` = {kind!r} is no schedule: did you mean {near}? Known: {', '.join(KINDS)}")
    if steps < 1:
        raise UserError(f"`steps` = {steps}: a schedule needs at least one")
    if not 0 <= warmup <= steps:
        raise UserError(f"`warmup` = {warmup} does not fit into {steps} steps; use a value from 0 to {steps}")
    if not 0.0 <= cooldown_frac <= 1.0:
        raise UserError(f"`cooldown_frac` = {cooldown_frac} is not a share of the run; use a value from 0 to 1")
    if not 0.0 <= end_factor <= 1.0:
        raise UserError(f"`end_factor` = {end_factor} is not a share of the base rate; use a value from 0 to 1")
    last = steps - 1
    step = min(step, last)
    rising = (1.0 + (warmup - 1.0) * step / warmup) / warmup if step < warmup else 1.0
    if kind == "constant":
        return rising
    start = last - round(cooldown_frac * steps) if kind == "wsd" else warmup  # the last step at full rate
    done = (step - start) / max(1, last - start)
    if done <= 0.0:
        return rising
    left = (1.0 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1.0 - done
    return min(rising, end_factor + (1.0 - end_factor) * left)


def parse_momentum_warmup(text: str) -> list[tuple[int, float]]:
    """ "0.85:0.95:300" -> [(0, 0.85), (300, 0.95)]: from, to, number of steps."""
    try:
        first, last, steps = text.split(":")
        schedule = [(0, float(first)), (int(steps), float(last))]
    except (ValueError, AttributeError):
        raise UserError(
            f'`momentum_warmup` = {text!r} is not FROM:TO:STEPS; write for example "0.85:0.95:300"'
        ) from None
    if schedule[1][0] < 1:
        raise UserError(f"`momentum_warmup` = {text!r} takes {steps} steps; use at least 1, or leave it out")
    try:
        check_momentum_schedule(schedule)
    except ValueError as error:
        raise UserError(f"`momentum_warmup` = {text!r}: {error}") from None
    return schedule


def check_momentum_schedule(schedule: Sequence[tuple[int, float]]) -> None:
    """ValueError unless `schedule` is [(step, momentum), ...] with rising steps and momenta in [0, 1)."""
    points = list(schedule)
    if not points or any(len(point) != 2 for point in points):
        raise ValueError(f"a momentum schedule is a list [(step, momentum), ...], found {schedule!r}")
    if any(b[0] <= a[0] for a, b in pairwise(points)):
        raise ValueError(f"the steps of a momentum schedule must rise, found {[s for s, _ in points]}")
    if any(not 0.0 <= mu < 1.0 for _, mu in points):
        raise ValueError(f"momentum must lie in [0, 1), found {[mu for _, mu in points]}")


def momentum_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """Piecewise linear through the points (step, momentum); constant before the first and after the last."""
    after = bisect_right(schedule, step, key=lambda point: point[0])
    if after == 0:
        return schedule[0][1]
    if after == len(schedule):
        return schedule[-1][1]
    (s0, mu0), (s1, mu1) = schedule[after - 1], schedule[after]
    return mu0 + (mu1 - mu0) * ((step - s0) / (s1 - s0))

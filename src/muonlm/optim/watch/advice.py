"""Plain lines of advice from Muon's measurements: what is wrong, where, and what to try. Silent on a healthy run.

`Advice.see` judges the measurements of one event (diagnostics.py), `Advice.lines` adds what the loop knows and says
each kind of line at most once in QUIET_STEPS steps. The thresholds are ours.
"""

import math
from collections import deque
from statistics import median

from ..muon.blocks import FIXED

Layers = dict[str, dict[str, float]]  # layer -> what was measured -> value

# A line is said beyond these.
RMS_BAND = (0.5, 1.5)  # measured update RMS over prediction
ADAMW_LR = 1e-3  # a usual AdamW rate, as match_rms_adamw takes
LARGEST_ADAMW_LR = 1e-2  # no AdamW rate is larger, so it must be a spectral one
HIGH_U_W, HIGH_U_W_STEPS = 0.05, 200
LOW_U_W = 1e-4
SPIKE, SPIKE_SPREADS, SPIKE_HISTORY = 0.3, 8.0, 8  # nats, and median deviations of at least that many earlier losses
HIGH_ERROR = 0.85  # e of an exact partial factor of rank r is sqrt(1 - r/m): lower rank than m/4 is seldom the data's
GROWTH_STEPS, GROWTH_EXPONENT = 1000, 0.8  # uncorrelated updates give exponent 0.5, steady drift 1
QUIET_STEPS = 1000  # between two lines of one kind


class Advice:
    """Turns measurements into lines, at most one of each kind in QUIET_STEPS steps."""

    def __init__(self):
        self.said: dict[str, int] = {}
        self.losses: deque[float] = deque(maxlen=20)
        self.high_since: dict[str, int] = {}
        self.growth: dict[str, list[tuple[int, float]]] = {}
        self.pending: dict[str, str] = {}  # kind -> line, of the last event

    def see(self, layers: Layers, names: list[str], groups: dict[str, dict]) -> None:
        """Judge one event; `names` are all layers that Muon should train."""
        pending = self.pending
        pending.clear()
        step = int(max(v["step"] for v in layers.values()))
        for name in names:
            if name not in layers:
                pending.setdefault("inactive", f"Muon inactive: no Newton-Schulz call for {name}")
        for name, v in sorted(layers.items()):
            if v["nonfinite"]:
                pending.setdefault(
                    "nonfinite",
                    f"non-finite update in {name} at step {step}: skip or stop; lower optim.lr (now {v['lr']:g})",
                )
            elif v["zero_update"]:
                pending.setdefault(
                    "dead",
                    f"dead layer: the gradient of {name} has been exactly 0: it is not used, or cut off from the loss",
                )
        sound = {name: v for name, v in layers.items() if not v["nonfinite"] and not v["zero_update"]}
        self._rms(sound, groups)
        self._u_w(sound, groups, step)
        self._error(sound, groups)
        self._growth(sound, step)

    def _rms(self, layers: Layers, groups: dict[str, dict]) -> None:
        """Measured against predicted. A low k is the rank of the data, or an error of NS that _error reports."""
        ratios = {
            name: v["update_rms"] / (v["predicted_rms"] * (v["k"] if v["k"] <= RMS_BAND[1] else 1.0))
            for name, v in layers.items()
            if v["predicted_rms"] * v["k"] > 0.0 and groups[name]["variant"] not in FIXED
        }
        name = max(ratios, key=lambda n: abs(math.log(ratios[n])), default=None)
        if name and not RMS_BAND[0] <= ratios[name] <= RMS_BAND[1]:
            self.pending["rms"] = (
                f"update RMS {layers[name]['update_rms']:.2g} is {ratios[name]:.2g}x the prediction: "
                f"check lr_mode ({name})"
            )
            return
        for name, v in sorted(layers.items()):
            group = groups[name]
            if group["lr_mode"] == "match_rms_adamw" and group["variant"] != "hyperball" and v["lr"] > LARGEST_ADAMW_LR:
                times = v["update_rms"] / (ADAMW_LR * group["rms_target"])
                self.pending["rms"] = (
                    f"update RMS {v['update_rms']:.2g} is {times:.0f}x the prediction: check lr_mode "
                    f"(match_rms_adamw takes AdamW rates such as {ADAMW_LR:g}, found {v['lr']:g}; {name})"
                )
                return

    def _u_w(self, layers: Layers, groups: dict[str, dict], step: int) -> None:
        ratios = {name: v["u_w"] for name, v in layers.items() if "u_w" in v}
        self.high_since = {n: self.high_since.get(n, step) for n, r in ratios.items() if r > HIGH_U_W}
        long = [n for n, since in self.high_since.items() if step - since >= HIGH_U_W_STEPS]
        if long:
            name = max(long, key=ratios.__getitem__)
            line = f"Muon lr too high: u/w > {HIGH_U_W} for {step - self.high_since[name]} steps in {name}; try lr/2"
            self.pending["high"] = line + f" (u/w {ratios[name]:.2g}, lr {layers[name]['lr']:g})"
        # a low rate in warm-up or cooldown is meant
        at_peak = {n: r for n, r in ratios.items() if layers[n]["lr"] >= 0.5 * _peak_lr(groups[n])}
        if at_peak and median(at_peak.values()) < LOW_U_W:
            name = min(at_peak, key=at_peak.__getitem__)
            self.pending["low"] = (
                f"lr too low: u/w < {LOW_U_W:g} (u/w {at_peak[name]:.2g} in {name}, lr {layers[name]['lr']:g})"
            )

    def _error(self, layers: Layers, groups: dict[str, dict]) -> None:
        errors = {name: v["orthogonality_error"] for name, v in layers.items() if "orthogonality_error" in v}
        name = max(errors, key=errors.__getitem__, default=None)
        if name and errors[name] > HIGH_ERROR:
            steps = groups[name]["ns_steps"]
            self.pending["error"] = (
                f"NS output error {errors[name]:.2g}: spectrum too flat/small for {steps} steps: "
                f'use coefficients="polar_express" or ns_steps+2 ({name})'
            )

    def _growth(self, layers: Layers, step: int) -> None:
        for name, v in sorted(layers.items()):
            past = self.growth.setdefault(name, [])
            past.append((step, v["weight_rms"]))
            then = next((p for p in reversed(past) if step >= 2 * p[0] and step - p[0] >= GROWTH_STEPS), None)
            if v["weight_decay"] or then is None or then[1] == 0.0 or v["weight_rms"] == 0.0:
                continue
            exponent = math.log(v["weight_rms"] / then[1]) / math.log(step / then[0])
            if exponent > GROWTH_EXPONENT:
                grown = f"{then[1]:.2g} at step {then[0]}, {v['weight_rms']:.2g} at {step}, {name}"
                self.pending.setdefault(
                    "growth", f"weight RMS growing linearly with wd=0: set wd or hyperball ({grown})"
                )

    def lines(self, step: int, loss: float) -> list[str]:
        """What to tell the user after `step`, whose mean loss in nats per token is `loss`: call it in every step."""
        told, self.pending = self.pending, {}
        if len(self.losses) >= SPIKE_HISTORY and math.isfinite(loss):
            usual = median(self.losses)
            spread = median(abs(x - usual) for x in self.losses)
            if loss - usual > max(SPIKE, SPIKE_SPREADS * spread):
                rise = f"loss spike +{loss - usual:.2g} at step {step}"
                told["spike"] = (
                    f"{rise}: try a lower lr or a longer warm-up; qk_norm or qk_clip bound the attention's logits"
                )
        self.losses.append(loss)
        fresh = {kind: line for kind, line in told.items() if step - self.said.get(kind, -QUIET_STEPS) >= QUIET_STEPS}
        self.said |= dict.fromkeys(fresh, step)
        return list(fresh.values())


def _peak_lr(group: dict) -> float:
    return float(group.get("base_lr") or group.get("initial_lr") or group["first_lr"])
